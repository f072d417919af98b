"""Loads the compiled modules. They know no PyTorch: callers pass on pointers, sizes and the stream."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import torch  # before the modules, so that they use torch's libgomp.so.1 and its threads
from torch import Tensor

if TYPE_CHECKING:
    from ._modules import Cpu, Cuda

__all__ = [
    "CPU_DTYPES",
    "CUDA_DTYPES",
    "address",
    "build_record",
    "cuda_stream",
    "instruction_set",
    "instruction_sets",
    "load_error",
    "loaded",
    "log",
    "module",
]

log = logging.getLogger("fastguide")  # the package's only logger: loaded modules, and the backend of a call
log.addHandler(logging.NullHandler())

_PACKAGE = Path(__file__).parents[1]

# The codes of csrc/common/dtype.h.
CPU_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
CUDA_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build: compiler, flags, whether CUDA was built. Empty without a build."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _installed_elsewhere(here: Path) -> Path | None:
    """The copy of the package that pip installed and ``here`` hides, if there is one."""
    for distribution in importlib.metadata.distributions(name="fastguide"):
        folder = Path(str(distribution.locate_file("fastguide"))).resolve()
        if (folder / "__init__.py").exists() and folder != here:
            return folder
    return None


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """Module ``name``, or why it is not there."""
    module, reason = _find(name)
    log.debug("%s", reason or f"loaded fastguide.{name} from {getattr(module, '__file__', None)}")
    return module, reason


def _find(name: str) -> tuple[ModuleType | None, str]:
    full, here, other, record = f"fastguide.{name}", _PACKAGE.resolve(), None, build_record()
    if (said := _build_of(name, record)) != "built":  # if there is a file, it is from an earlier build
        return None, f"{full} was not built: {said}"
    try:
        module = importlib.import_module(full)
        folder = Path(str(module.__file__)).parent.resolve()
        if folder == here:
            return module, ""
        other = folder  # an editable installation of other sources redirects the import to its own modules
    except ModuleNotFoundError as error:
        if error.name != full:
            return None, f"{full} did not load: {error}"
    except ImportError as error:
        return None, f"{full} did not load: {error}"
    if not record:
        if other := other or _installed_elsewhere(here):
            return None, (
                f"{full} was not built: Python imported the sources in {here}, where no build has run, in place of the "
                f"copy that pip installed in {other}. `pip install -e {here.parent}` builds it here; from another "
                "folder Python finds the installed copy"
            )
        return None, f"{full} was not built: no build has run in {here} (`pip install -e {here.parent}` runs it)"
    return None, (
        f"{full} was built and is gone, or was built for another Python or from other sources "
        f"(`pip install -e {here.parent}` builds it)"
    )


def _build_of(name: str, record: dict[str, Any]) -> str:
    """The result of building module ``name``, from ``record``: "built", or why not."""
    if name != "_cuda":
        return record.get("cpu", {}).get(name.removeprefix("_cpu_"), "built")
    cuda = record.get("cuda", {"status": "built"})
    return cuda["status"] if cuda["status"] == "built" else f"{cuda['status']}, {cuda['reason']}"


def instruction_sets() -> list[str]:
    """The instruction sets whose CPU module runs on this processor, best first."""
    portable, error = _load("_cpu_portable")  # runs on every processor
    if portable is None:
        raise RuntimeError(error)
    return portable.instruction_sets()


def _load_cpu() -> tuple[ModuleType | None, str]:
    """The module of the best instruction set, or the one that FASTGUIDE_ISA names; or why it did not load."""
    error = _load("_cpu_portable")[1]
    if error:
        return None, error
    found, wish = instruction_sets(), os.environ.get("FASTGUIDE_ISA")
    if wish and wish not in found:
        raise ValueError(
            f"FASTGUIDE_ISA: expected one of {', '.join(found)} (this processor has no others), got {wish!r}"
        )
    return _load(f"_cpu_{wish or found[0]}")


_modules = {"cpu": _load_cpu(), "cuda": _load("_cuda")}


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """``with instruction_set("avx2"):`` runs the CPU kernels of its body with AVX2. For tests only: results have the
    same bits."""
    if isa not in (found := instruction_sets()):
        raise ValueError(f"isa: expected one of {', '.join(found)} (this processor has no others), got {isa!r}")
    before, loaded = _modules["cpu"], _load(f"_cpu_{isa}")
    if loaded[0] is None:
        raise RuntimeError(loaded[1])
    _modules["cpu"] = loaded
    try:
        yield
    finally:
        _modules["cpu"] = before


def load_error(name: str) -> str:
    """Why the module of backend ``name`` is not there, or ``""``."""
    return _modules[name][1]


def loaded(name: str) -> bool:
    """Whether the module of backend ``name`` is there."""
    return _modules[name][0] is not None


@overload
def module(name: Literal["cpu"]) -> Cpu: ...
@overload
def module(name: Literal["cuda"]) -> Cuda: ...
def module(name: str) -> Any:
    """The module of backend ``name``, "cpu" or "cuda"."""
    loaded, error = _modules[name]
    if loaded is None:
        raise RuntimeError(error)
    return loaded


@contextlib.contextmanager
def cuda_stream(device: torch.device) -> Iterator[int]:
    """The current stream of ``device``. In the body, ``device`` is the current device."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
