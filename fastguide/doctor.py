"""What `fastguide doctor` prints: what this installation has, what it lacks and why, and a live check."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from . import __version__, reference
from .ops import _native
from .ops._operation import OPERATIONS, backends, explain

__all__ = ["KNOWN_ANSWERS", "report"]

Words = tuple[int, ...]

# Philox4x32-10: counter, key and output, those of Random123 (Salmon et al. 2011).
KNOWN_ANSWERS: tuple[tuple[Words, Words, Words], ...] = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def _philox_reference(counter: Words, key: Words) -> Words:
    c0, c1, c2, c3 = (torch.tensor([word], device="cpu") for word in counter)
    return tuple(int(word) for word in reference.philox((c0, c1, c2, c3), (key[0], key[1])))


def _philox_cpu(counter: Words, key: Words) -> Words:
    return _native.module("cpu").philox(counter, key)


def _philox_cuda(counter: Words, key: Words) -> Words:
    out = torch.zeros(4, dtype=torch.int32, device="cuda")
    queue = torch.cuda.current_stream().cuda_stream
    _native.module("cuda").philox(out.data_ptr(), counter, key, queue)
    return tuple(word & 0xFFFFFFFF for word in out.tolist())


def _philox_triton(counter: Words, key: Words) -> Words:
    kernels = importlib.import_module("fastguide.ops.randn.triton")
    out = torch.zeros(4, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    kernels.philox_words(out, counter, key)
    return tuple(word & 0xFFFFFFFF for word in out.tolist())


_PHILOX: dict[str, Callable[[Words, Words], Words]] = {
    "reference": _philox_reference,
    "cpu": _philox_cpu,
    "cuda": _philox_cuda,
    "triton": _philox_triton,
}


def _self_check(name: str) -> str:
    for counter, key, expected in KNOWN_ANSWERS:
        try:
            words = _PHILOX[name](counter, key)
        except Exception as error:  # whatever a compiler or a driver raises, the report goes on
            return f"FAILED: {type(error).__name__}: {error}".strip().splitlines()[0]
        if words != expected:
            got, wanted = (" ".join(f"{word:08x}" for word in four) for four in (words, expected))
            return f"FAILED: Philox gives {got}, expected {wanted}"
    return f"passed ({len(KNOWN_ANSWERS)} known answers of Philox, bit for bit)"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _shadow() -> list[tuple[str, str]]:
    """Unbuilt sources in the working directory, which Python started there would import before this package."""
    sources = Path.cwd() / "fastguide"
    if not (sources / "__init__.py").exists() or sources.resolve() == Path(__file__).parent.resolve():
        return []
    if list(sources.glob("_cpu*.so")):
        return []
    return [("note", f"python started in this folder imports {sources}, which is not built: pip install -e .")]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<12} {value}" for name, value in rows]


def report() -> str:
    """The whole report, plain text."""
    record = _native.build_record()
    lines = ["fastguide"]
    lines += _table(
        [
            ("fastguide", f"{__version__}, in {Path(__file__).parent}"),
            ("Python", f"{platform.python_version()} on {platform.platform()}"),
            ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
            ("numpy", numpy.__version__),
            (
                "compiler",
                record.get("compiler") or "nothing was compiled here; a build takes g++, clang++ or what CXX names",
            ),
            ("CPU", f"{_cpu_name()}, {os.cpu_count()} visible, {torch.get_num_threads()} threads (torch's)"),
            *_shadow(),
        ]
    )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines += _table([(f"GPU {i}", name) for i, name in enumerate(names)])
    for backend in backends().values():
        state = "usable" if not backend.reason else "loaded, not usable" if backend.loaded else "not loaded"
        rows = [("operations", ", ".join(backend.operations))]
        if backend.reason:
            rows.append(("why not", backend.reason))
        else:
            rows.append(("self-check", _self_check(backend.name)))
        if backend.name == "cpu" and backend.loaded:
            rows.append(("vectors", backend.details["instruction_set"]))
        if backend.name == "triton" and backend.loaded:
            how = "in Triton's interpreter" if backend.details["interpreted"] else "compiled"
            rows.append(("version", f"{backend.details['triton']}, {how}"))
        if backend.name == "cuda" and record:
            cuda = record["cuda"]
            rows.append(("build", " ".join(filter(None, (cuda["status"], cuda["reason"])))))
            if cuda["nvcc"]:
                archs = ", ".join(f"sm_{arch}" for arch in cuda["archs"])
                rows.append(("nvcc", f"{cuda['nvcc']}, for {archs}"))
            rows += [("", line) for line in cuda["error"]]
        lines += ["", f"backend {backend.name}: {state}", *_table(rows)]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    lines += ["", "what auto chooses"]
    for device in devices:
        for operation in OPERATIONS:
            lines += ["  " + line for line in explain(operation, device, torch.float32).splitlines()]
    return "\n".join(lines)
