"""csrc's CUDA kernels compiled as plain C++ with the replacement headers in this folder, and run on the host.

This tests without a GPU what the kernels compute: the arithmetic, all bounds, and missing barriers between threads and
blocks, as far as cuda_runtime_api.h says. It shows nothing about the hardware: no races between two barriers, no limits
of registers or memory, no speed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [CSRC / "common" / "module.cpp", *sorted(CSRC.glob("**/*.cu"))]

# No contraction, as in csrc/rules.ninja. A misaligned access traps, as on a GPU. A fortified longjmp would reject the
# stack of another coroutine.
_FLAGS = (
    "-DFG_MODULE=_cuda -std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE "
    "-fno-strict-aliasing -fsanitize=alignment -fsanitize-undefined-trap-on-error -x c++"
)


def compile_library(library: Path, sources: Sequence[Path], *headers: str) -> None:
    """Compile ``sources`` in parallel into the shared ``library``. Raises with the compiler's output."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    include = [f"-I{HERE}", *(f"-isystem{folder}" for folder in headers)]
    objects = [str(library.with_name(f"{source.parent.name}.{source.name}.o")) for source in sources]
    commands = [
        [*cxx, *_FLAGS.split(), *include, "-c", str(source), "-o", made]
        for source, made in zip(sources, objects, strict=True)
    ]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    words = "".join(process.communicate()[0] for process in running)
    if any(process.returncode for process in running):
        raise RuntimeError(words)
    subprocess.run([*cxx, "-shared", *objects, "-o", str(library)], check=True)


def build_module(folder: Path) -> ModuleType:
    """``fastguide._cuda`` for pointers on the host, built in ``folder``. It ignores the streams that it is given."""
    library = folder / "_cuda.so"
    compile_library(library, SOURCES, sysconfig.get_paths()["include"])
    return load(library)


def load(library: Path) -> ModuleType:
    """Load the module that `build_module` built."""
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``module`` serve ``backend="cuda"``, for tensors on the CPU."""
    from fastguide.ops import _native  # after conftest.py has set Triton's environment

    backends = sys.modules["fastguide.ops._operation"]  # the package's attribute of that name is its function
    device_of, device_reason = backends._device_of, backends._device_reason
    monkeypatch.setitem(_native._modules, "cuda", (module, ""))
    monkeypatch.setattr(_native, "cuda_stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(backends, "_device_of", lambda name: "cpu" if name == "cuda" else device_of(name))
    monkeypatch.setattr(backends, "_device_reason", lambda name, on: "" if name == "cuda" else device_reason(name, on))
