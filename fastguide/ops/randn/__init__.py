"""Standard normals from counters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import arguments
from .. import _arguments, _native
from .._arguments import COUNTER, STATE_DTYPES, IntOrTensor
from .._operation import Operation
from . import reference


def randn(
    shape: Sequence[int],
    *,
    seed: IntOrTensor,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normals ``shape = [N, *event]`` from counters: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.

    The value of particle ``first_particle + n`` at an element depends on ``seed`` (below 2^64), ``step`` (2^32),
    ``stream`` (2^16), that global index and the element's place in the event, and on nothing else: not on ``N``, the
    backend (to 4 ulp of float32), the thread count or what was drawn before. ``|z|`` reaches 6.66. float16 and bfloat16
    are the float32 values rounded.

    ``seed`` and ``step`` are integers, or int64 tensors of one element on ``device`` with their bits: a CUDA graph then
    draws from what stands there when it is replayed. So in all operations.

    ``out``: a contiguous tensor that the normals are written into, and that is returned: memory that is used again
    costs no page faults, which for large tensors is most of the time. It must not need a gradient nor share memory with
    an input. So in all operations that have one; with several results it is a tuple.
    """
    sizes = arguments.shape("shape", shape, "[N, *event]")
    if not sizes:
        raise ValueError("shape: expected [N, *event], got []")
    if not isinstance(dtype, torch.dtype) or dtype not in STATE_DTYPES:
        arguments.torch_dtype("dtype", dtype, STATE_DTYPES)
    device = arguments.torch_device("device", device)
    counter = _arguments.counter(seed, step, stream, first_particle, sizes, device)
    if out is None:
        return _randn(backend, sizes, *counter, dtype, device)
    _randn(backend, sizes, *counter, dtype, device, out=_arguments.out(out, ((sizes, dtype),), device, counter[-2:]))
    return out


def _reference(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device):
    return reference.randn(
        shape,
        seed=seed if seed_tensor is None else seed_tensor,
        step=step if step_tensor is None else step_tensor,
        stream=stream,
        first_particle=first_particle,
        dtype=dtype,
        device=device,
    )


def _cpu(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device, out=None):
    z = torch.empty(shape, dtype=dtype, device=device) if out is None else out[0]
    _native.module("cpu").randn(
        z.data_ptr(),
        _native.CPU_DTYPES[dtype],
        shape[0],
        math.prod(shape[1:]),
        *_arguments.read(seed, step, seed_tensor, step_tensor),
        stream,
        first_particle,
        torch.get_num_threads(),
    )
    return z


def _cuda(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device, out=None):
    z = torch.empty(shape, dtype=dtype, device=device) if out is None else out[0]
    with _native.cuda_stream(z.device) as queue:
        _native.module("cuda").randn(
            z.data_ptr(),
            _native.CUDA_DTYPES[dtype],
            shape[0],
            math.prod(shape[1:]),
            seed,
            step,
            stream,
            first_particle,
            _native.address(seed_tensor),
            _native.address(step_tensor),
            queue,
        )
    return z


def _fake(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


_randn = Operation(
    f"randn(SymInt[] shape, {COUNTER}, ScalarType dtype, Device device) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "cuda": _cuda, "triton": "fastguide.ops.randn.triton:call"},
    place=lambda *args: (args[-1], args[-2]),
)
