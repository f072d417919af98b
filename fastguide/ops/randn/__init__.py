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
    """Draws standard normals from counters: Philox4x32-10, then Box-Muller.

    A value depends on the seed, the step, the stream, the global index of its particle and the index of its element
    within the particle. It depends on nothing else: not on ``N``, the thread count or earlier draws. Calls with the
    same arguments therefore draw the same numbers. Backends agree within 4 ulp of float32. ``|z|`` reaches 6.66.

    Args:
        shape: ``[N, *event]``, ``N`` particles of shape ``event``. ``event`` has at most 2^34 elements, and
            ``first_particle + N`` is at most 2^48.
        seed: An integer in ``[0, 2^64)``, or an int64 tensor of one element on ``device`` that holds its 64 bits. A
            CUDA graph reads the tensor again at each replay. Seeds of all operations may be tensors.
        step: The sampling step: an integer in ``[0, 2^32)``, or a tensor like ``seed``.
        stream: An integer in ``[0, 2^16)``. Draws of one seed and step are independent if their streams differ.
        first_particle: The global index of the first particle, an integer in ``[0, 2^48)``.
        dtype: float32, float16, bfloat16 or float64. float16 and bfloat16 are the float32 values, rounded.
        device: Where the result is.
        out: A contiguous tensor to write the result into, of its shape, dtype and device. It must require no gradient
            and share no memory with an input. A large call spends most of its time on page faults of new memory; memory
            that is used again has none. Operations with several results take a tuple of tensors.
        backend: ``"auto"`` takes the fastest backend that can serve the call. See `fastguide.backends` for the names.

    Returns:
        Normals ``[N, *event]``; ``out`` itself where it is given.

    Raises:
        TypeError: ``dtype`` or ``out`` has the wrong type.
        ValueError: ``shape``, a counter, ``device`` or ``out`` is not as described, or ``backend`` has no such name.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Salmon et al. 2011 (Random123) for Philox4x32-10.
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
