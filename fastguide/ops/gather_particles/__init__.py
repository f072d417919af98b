"""Replaces particles by their ancestors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import arguments
from ...arguments import flag, got, is_batched, transformed
from .. import _arguments, _native
from .._operation import Operation
from . import reference


def gather_particles_(ancestors: Tensor, *states: Tensor, check: bool = True, backend: str = "auto") -> None:
    """Replaces every particle by its ancestor, in place.

        state[b, k] = state[b, ancestors[b, k]]

    Only particles whose ancestor is another particle are copied. Ancestors from `resample` with ``sorted=False`` copy
    the fewest. An error leaves every state as it was.

    Args:
        ancestors: ``[B, K]`` or ``[K]``, int32 or int64, values in ``[0, K)``.
        *states: Tensors ``[B, K, *event]``, or ``[K, *event]`` for ancestors ``[K]``, of any dtype, on the device of
            ``ancestors``. No element may share memory with another element. A state moves without a copy if its
            particles are dense, in any order of the event's dimensions (``channels_last``); any other view moves
            through a contiguous copy.
        check: On a GPU, whether to raise for an ancestor outside ``[0, K)``. The check waits for the GPU. With False
            the CUDA kernel moves no particle at all if an ancestor is out of range. On the CPU this argument does
            nothing: an ancestor out of range always raises. Must be False inside ``torch.vmap``.
        backend: As in `randn`.

    Raises:
        TypeError: ``ancestors`` is not an int32 or int64 tensor, or a state is not a tensor.
        ValueError: Shapes or devices do not match, an ancestor is out of range, states overlap, or a state requires a
            gradient while gradients are enabled.
        RuntimeError: The named backend cannot serve the call.
    """
    ancestors = _arguments.own("ancestors", ancestors, "an int32 or int64 tensor")
    if ancestors.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ancestors: expected an int32 or int64 tensor, got {ancestors.dtype}")
    if ancestors.ndim not in (1, 2):
        raise ValueError(f"ancestors: expected shape [B, K] or [K], got {list(ancestors.shape)}")
    check = flag("check", check)
    moved = []
    for i, state in enumerate(states):
        arguments.tensor(f"states[{i}]", state)
        if state.shape[: ancestors.ndim] != ancestors.shape or state.device != ancestors.device:
            raise ValueError(
                f"states[{i}]: expected shape {list(ancestors.shape)} + event on {ancestors.device}, as ancestors are, "
                f"got {list(state.shape)} on {state.device}"
            )
        if state.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"states[{i}]: expected a tensor that needs no gradient, since it is changed in place")
        moved.append(_arguments.unwrapped(state))
    if check and transformed() and any(map(is_batched, (ancestors, *moved))):
        raise ValueError(
            f"check: expected False inside torch.vmap, since it looks at values, got True with {got(ancestors)}"
        )
    _gather_particles(backend, ancestors, moved, check)


def _reference(ancestors, states, check):
    if not transformed():  # inside a transform, tensors have no addresses
        _check_overlaps(states)
    for i, state in enumerate(states):
        if state.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"states[{i}]: torch changes a tensor made in inference_mode only inside that mode")
    if check:
        _arguments.index("ancestors", ancestors, ancestors.shape[-1])
    reference.gather_particles_(ancestors, *states)


def _cpu(ancestors, states, check):
    particles = ancestors.shape[-1]
    rows = ancestors.numel() // particles if particles else 0
    given = states
    ancestors, states = _dense(ancestors, states)
    arrays = [(state.data_ptr(), state.nbytes // ancestors.numel()) for state in states] if rows else []
    bad, _ = _native.module("cpu").gather_particles(
        ancestors.data_ptr(), ancestors.dtype == torch.int64, rows, particles, arrays, torch.get_num_threads()
    )
    if bad >= 0:
        _arguments.refuse_index("ancestors", ancestors, particles, bad)
    _written(given, states)


def _cuda(ancestors, states, check):
    particles = ancestors.shape[-1]
    rows = ancestors.numel() // particles if particles else 0
    given = states
    ancestors, states = _dense(ancestors, states)
    flags = torch.empty(rows + 2, dtype=torch.int32, device=ancestors.device)  # last: any ancestor out of range
    arrays = [(state.data_ptr(), state.nbytes // ancestors.numel()) for state in states] if rows else []
    cuda = _native.module("cuda")
    workspace = flags.new_empty(cuda.gather_workspace(rows, particles, arrays), dtype=torch.uint8)
    with _native.cuda_stream(ancestors.device) as queue:
        cuda.gather_particles(
            ancestors.data_ptr(), ancestors.dtype == torch.int64, rows, particles, arrays, flags.data_ptr(),
            workspace.data_ptr(), workspace.nbytes, queue,
        )  # fmt: skip
    if check and flags[-1].item():
        _arguments.index("ancestors", ancestors, particles)
    _written(given, states)


def _dense(ancestors: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Contiguous ancestors and states for a kernel. `_written` copies states back."""
    if _lie_apart(ancestors, states):
        return ancestors.contiguous(), states
    _check_overlaps(states)
    # a state may share the ancestors' memory
    return ancestors.clone(memory_format=torch.contiguous_format), [_in_order(s, ancestors.ndim) for s in states]


def _written(given: list[Tensor], states: list[Tensor]) -> None:
    """Tell autograd about the kernel's writes, and copy back the states that `_dense` copied."""
    torch.autograd.graph.increment_version([state for state in states if not state.is_inference()])
    if states is not given:
        for state, moved in zip(given, states, strict=True):
            if moved.data_ptr() != state.data_ptr():
                with torch.inference_mode() if state.is_inference() else contextlib.nullcontext():
                    state.copy_(moved)


def _lie_apart(ancestors: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether the states are contiguous and no two of the tensors share memory, as in nearly every call."""
    start = ancestors.data_ptr()
    spans = [(start, start + ancestors.nbytes)]
    for state in states:
        if not state.is_contiguous():
            return False
        start, end = state.data_ptr(), state.data_ptr() + state.nbytes
        for other_start, other_end in spans:
            if start < other_end and other_start < end:
                return False
        spans.append((start, end))
    return True


def _in_order(state: Tensor, leading: int) -> Tensor:
    """The state with the event's dimensions in the order of memory if that view is contiguous, else a contiguous
    copy."""
    if state.is_contiguous():
        return state
    event = sorted(range(leading, state.ndim), key=state.stride, reverse=True)
    turned = state.permute(*range(leading), *event)
    return turned if turned.is_contiguous() else state.contiguous()


def _check_overlaps(states: Sequence[Tensor]) -> None:
    """Raise if an element of the states would be written twice."""
    spans = [_arguments.span(state) for state in states]
    for i, state in enumerate(states):
        if not state.is_contiguous() and _share_bytes(_layout(state, spans[i][0])):
            raise ValueError(
                f"states[{i}]: expected elements that share no memory, got shape {list(state.shape)} "
                f"with strides {list(state.stride())}"
            )
        for j in range(i):
            first = min(spans[i][0], spans[j][0])
            meet = spans[i][0] < spans[j][1] and spans[j][0] < spans[i][1]
            if meet and _share_bytes(_layout(states[j], first), _layout(state, first)):
                raise ValueError(f"states[{i}]: expected memory of its own, got a tensor that overlaps states[{j}]")


def _layout(x: Tensor, first: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes and strides in bytes, and the offset of the tensor from the address ``first``. Dimensions that are
    contiguous with each other are merged.
    """
    sizes, strides = [x.element_size()], [1]
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride * x.element_size() == strides[-1] * sizes[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride * x.element_size())
    return tuple(sizes), tuple(strides), x.data_ptr() - first


@functools.lru_cache(maxsize=64)
def _share_bytes(*layouts: tuple[tuple[int, ...], tuple[int, ...], int]) -> bool:
    """Whether two elements of the layouts share a byte. Cached: a loop has the same layouts at every step."""
    nested = all(
        step >= size * stride
        for sizes, strides, _ in layouts
        for size, stride, step in zip(sizes, strides, strides[1:], strict=False)
    )
    if nested and len(layouts) == 1:
        return False
    if any(0 in strides for _, strides, _ in layouts):
        return True
    ends = [at + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1 for sizes, strides, at in layouts]
    taken, bytes_of_all = torch.zeros(max(ends), dtype=torch.bool, device="cpu"), 0
    for sizes, strides, at in layouts:
        taken.as_strided(sizes, strides, at).fill_(True)
        bytes_of_all += math.prod(sizes)
    return int(taken.count_nonzero()) < bytes_of_all


def _fake(ancestors, states, check):
    return None


_gather_particles = Operation(
    "gather_particles_(Tensor ancestors, Tensor(a!)[] states, bool check) -> ()",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "cuda": _cuda},
    dtypes=None,
)
