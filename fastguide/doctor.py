"""What `fastguide doctor` prints: what this installation has, what it lacks and why, and a live check."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from . import __version__, reference
from .ops import _native
from .ops._operation import OPERATIONS, backends, choice, explain

__all__ = ["KNOWN_ANSWERS", "facts", "report"]

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


def _self_check(name: str) -> dict[str, Any]:
    for counter, key, expected in KNOWN_ANSWERS:
        try:
            words = _PHILOX[name](counter, key)
        except Exception as error:  # whatever a compiler or a driver raises, the report goes on
            return {"passed": False, "error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        if words != expected:
            got, wanted = (" ".join(f"{word:08x}" for word in four) for four in (words, expected))
            return {"passed": False, "error": f"Philox gives {got}, expected {wanted}"}
    return {"passed": True, "error": ""}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _shadow() -> str | None:
    """Unbuilt sources in the working directory, which Python started there would import before this package."""
    sources = Path.cwd() / "fastguide"
    if not (sources / "__init__.py").exists() or sources.resolve() == Path(__file__).parent.resolve():
        return None
    return None if list(sources.glob("_cpu*.so")) else str(sources)


def facts() -> dict[str, Any]:
    """What `report` says, as ``fastguide doctor --json`` prints it. Reasons are "" where there is none."""
    record, gpus = _native.build_record(), []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fastguide": {"version": __version__, "folder": str(Path(__file__).parent), "unbuilt_sources_here": _shadow()},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": {"version": str(torch.__version__), "cuda": torch.version.cuda},
        "numpy": {"version": numpy.__version__},
        "cpu": {"name": _cpu_name(), "visible": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": gpus,
        "build": record,
        "backends": {
            backend.name: {
                "loaded": backend.loaded,
                "why_not": backend.reason,
                "operations": list(backend.operations),
                "self_check": None if backend.reason else _self_check(backend.name),
                "details": backend.details,
            }
            for backend in backends().values()
        },
        "auto": [
            {"operation": operation, "device": device, "dtype": "float32", "backend": chosen, "why_not": passed_over}
            for device in ("cpu", *(("cuda",) if gpus else ()))
            for operation in OPERATIONS
            for chosen, passed_over in (choice(operation, device, torch.float32),)
        ],
    }


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<12} {value}" for name, value in rows]


def report() -> str:
    """The whole report, plain text."""
    found = facts()
    package, cpu, record = found["fastguide"], found["cpu"], found["build"]
    compiler = record.get("compiler") or "nothing was compiled here; a build takes g++, clang++ or what CXX names"
    rows = [
        ("fastguide", f"{package['version']}, in {package['folder']}"),
        ("Python", f"{found['python']['version']} on {found['python']['platform']}"),
        ("torch", f"{found['torch']['version']}, CUDA {found['torch']['cuda'] or 'none'}"),
        ("numpy", found["numpy"]["version"]),
        ("compiler", compiler),
        ("CPU", f"{cpu['name']}, {cpu['visible']} visible, {cpu['threads']} threads (torch's)"),
    ]
    if sources := package["unbuilt_sources_here"]:
        rows.append(("note", f"python started in this folder imports {sources}, which is not built: pip install -e ."))
    rows += [(f"GPU {i}", name) for i, name in enumerate(found["gpus"])]
    lines = ["fastguide", *_table(rows)]
    for name, backend in found["backends"].items():
        reason, details, check = backend["why_not"], backend["details"], backend["self_check"]
        state = "usable" if not reason else "loaded, not usable" if backend["loaded"] else "not loaded"
        rows = [("operations", ", ".join(backend["operations"]))]
        if reason:
            rows.append(("why not", reason))
        elif check["passed"]:
            rows.append(("self-check", f"passed ({len(KNOWN_ANSWERS)} known answers of Philox, bit for bit)"))
        else:
            rows.append(("self-check", f"FAILED: {check['error']}"))
        if name == "cpu" and backend["loaded"]:
            rows.append(("vectors", details["instruction_set"]))
        if name == "triton" and backend["loaded"]:
            how = "in Triton's interpreter" if details["interpreted"] else "compiled"
            rows.append(("version", f"{details['triton']}, {how}"))
        if name == "cuda" and record:
            cuda = record["cuda"]
            rows.append(("build", " ".join(filter(None, (cuda["status"], cuda["reason"])))))
            if cuda["nvcc"]:
                archs = ", ".join(f"sm_{arch}" for arch in cuda["archs"])
                rows.append(("nvcc", f"{cuda['nvcc']}, for {archs}"))
            rows += [("", line) for line in cuda["error"]]
        lines += ["", f"backend {name}: {state}", *_table(rows)]
    lines += ["", "what auto chooses"]
    for call in found["auto"]:
        words = explain(call["operation"], call["device"], torch.float32)
        lines += ["  " + line for line in words.splitlines()]
    return "\n".join(lines)
