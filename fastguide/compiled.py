"""The compiled modules, and a thin caller for each of their kernels.

A caller takes contiguous tensors whose device and dtype `fastguide.backends` has checked, and passes on
pointers, sizes and the stream: the modules know no PyTorch.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the modules: the libgomp.so.1 that they ask for is then torch's, and so are the threads
from torch import Tensor

from .reference import FAMILIES, density_constant

__all__ = [
    "CPU_DTYPES",
    "CUDA_DTYPES",
    "build_record",
    "gather_particles_cpu",
    "load_error",
    "log_prob_and_gradient_cpu",
    "module",
    "randn_cpu",
    "randn_cuda",
]

# The codes of csrc/common/dtype.h.
CPU_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
CUDA_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


# The codes of csrc/cpu/kernels.h.
_FAMILY_CODES = {family: code for code, family in enumerate(FAMILIES)}


def build_record() -> dict[str, Any]:
    """What setup.py wrote of the build: compiler, flags, what became of CUDA. Empty without a build."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or why it is not there."""
    full = f"fastguide._{name}"
    try:
        return importlib.import_module(full), ""
    except ModuleNotFoundError as error:
        if error.name != full:
            return None, f"{full} did not load: {error}"
    except ImportError as error:
        return None, f"{full} did not load: {error}"
    record = build_record()
    if not record:
        return None, f"{full} was not built: no build has run here (pip install . builds it)"
    cuda = record["cuda"]
    if name == "cuda" and cuda["status"] != "built":
        return None, f"{full} was not built: {cuda['status']}, {cuda['reason']}"
    return None, f"{full} was built and is gone, or was built for another Python"


_modules = {name: _load(name) for name in ("cpu", "cuda")}


def load_error(name: str) -> str:
    """Why the module of backend ``name`` is not there, or ``""``."""
    return _modules[name][1]


def module(name: str) -> ModuleType:
    """The module of backend ``name``, "cpu" or "cuda"."""
    loaded, error = _modules[name]
    if loaded is None:
        raise RuntimeError(error)
    return loaded


def _rows(out: Tensor) -> tuple[int, int]:
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()} for shape {list(out.shape)}")
    particles = out.shape[0]
    return particles, out.numel() // particles if particles else 0


def randn_cpu(out: Tensor, seed: int, step: int, stream: int, first_particle: int) -> None:
    """Fill ``out [N, *event]``, on the CPU, with the standard normals of `fastguide.ops.randn`."""
    particles, elements = _rows(out)
    code, threads = CPU_DTYPES[out.dtype], torch.get_num_threads()
    module("cpu").randn(out.data_ptr(), code, particles, elements, seed, step, stream, first_particle, threads)


def randn_cuda(out: Tensor, seed: int, step: int, stream: int, first_particle: int) -> None:
    """Fill ``out [N, *event]``, on a CUDA device, on the current stream; returns at once."""
    particles, elements = _rows(out)
    code = CUDA_DTYPES[out.dtype]
    with torch.cuda.device(out.device):
        queue = torch.cuda.current_stream().cuda_stream
        module("cuda").randn(out.data_ptr(), code, particles, elements, seed, step, stream, first_particle, queue)


def gather_particles_cpu(ancestors: Tensor, states: Sequence[Tensor]) -> int:
    """Move the particles of contiguous ``states`` to where ``ancestors`` ``[B, K]`` or ``[K]``, contiguous, say. The
    place of the first ancestor out of range, flat, and then nothing is moved; or -1."""
    particles = ancestors.shape[-1]
    rows = ancestors.numel() // particles if particles else 0
    wide = ancestors.dtype == torch.int64
    arrays = [(state.data_ptr(), state.nbytes // ancestors.numel()) for state in states] if rows else []
    threads = torch.get_num_threads()
    bad, _ = module("cpu").gather_particles(ancestors.data_ptr(), wide, rows, particles, arrays, threads)
    if bad < 0:  # written past autograd's eyes
        torch.autograd.graph.increment_version([state for state in states if not state.is_inference()])
    return bad


def log_prob_and_gradient_cpu(
    z: Tensor,
    y: Tensor,
    family: str,
    scale: float,
    df: float | None,
    background: float,
    added: Tensor | None,
    rows: Tensor | None,
    return_gradient: bool,
) -> tuple[int, Tensor, Tensor | None]:
    """The results of `fastguide.ops.log_prob_and_gradient`, after the place of the first of ``rows`` out of range (then
    they mean nothing) or -1. float16 and bfloat16 are read and written in ``z`` alone."""
    wide = torch.float64 in (z.dtype, y.dtype)
    dtype = torch.float64 if wide else torch.float32
    state = (z.double() if wide else z).contiguous()
    y = y.to(dtype).contiguous()
    added = None if added is None else added.to(dtype).contiguous()
    rows = None if rows is None else rows.contiguous()
    samples, elements = z.shape[0], math.prod(z.shape[1:])
    log_prob = torch.empty(samples, dtype=torch.float64)
    gradient = torch.empty_like(state, memory_format=torch.contiguous_format) if return_gradient else None

    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    bad = module("cpu").log_prob_and_gradient(
        _FAMILY_CODES[family], scale, df or 0.0, background, density_constant(family, scale, df, added is not None),
        CPU_DTYPES[state.dtype], samples, elements, state.data_ptr(), y.data_ptr(), y.shape[0], pointer(rows),
        pointer(added), 0 if added is None else added.shape[0], log_prob.data_ptr(), pointer(gradient),
        torch.get_num_threads(),
    )  # fmt: skip
    return bad, log_prob, gradient if gradient is None else gradient.to(z.dtype)
