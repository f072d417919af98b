"""Draws the ancestors of particles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...arguments import expect_alike, flag, got, is_batched, number, one_of
from .. import _arguments, _native
from .._arguments import COUNTER, WEIGHT_DTYPES, IntOrTensor
from .._operation import UNUSUAL, Operation, plain
from . import reference
from .reference import SCHEMES


def resample(
    log_weights: Tensor,
    *,
    scheme: str = "systematic",
    num: int | None = None,
    ess_threshold: float | None = None,
    seed: IntOrTensor = 0,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_row: int = 0,
    sorted: bool = True,
    check: bool = True,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws ancestors for the particles of each row, in proportion to their weights.

    Weights are integers inside (see `fastguide.reference.integer_weights`), so that sums are exact: results do not
    depend on the thread count or on how sums are split. Calls that leave the seed and the step at their defaults all
    draw the same uniforms. The operation has no derivative.

    Args:
        log_weights: ``[B, K]`` or ``[K]``, float32 or float64, not necessarily normalised. ``-inf`` is a dead particle.
        scheme: ``"systematic"`` draws one uniform per row, ``"stratified"`` one per ancestor. ``"multinomial"`` draws
            ancestors independently. ``"residual"`` gives each particle ``floor(num * weight)`` copies and draws the
            rest independently.
        num: How many ancestors to draw for each row; None is ``K``.
        ess_threshold: A share of ``K`` in ``[0, 1]``. A row whose effective sample size is at least this share keeps
            its particles and weights. The decision is made on the device. None resamples every row. Needs ``num == K``.
        seed: Seed of the uniforms, as in `randn`.
        step: Sampling step of the uniforms, as in `randn`.
        stream: Stream of the uniforms, as in `randn`.
        first_row: Row ``b`` draws what row ``first_row + b`` of a larger call draws. An integer in ``[0, 2^48)``.
        sorted: Whether ancestors ascend. False leaves every survivor in its place, so that `gather_particles_` copies
            as little as possible. False needs ``num == K``.
        check: Whether to raise for a row without a usable weight: one with a NaN, with ``+inf``, or with all weights
            ``-inf``. The check waits for a GPU. With False such a row keeps its particles where ``num == K``, and gets
            zeros as ancestors otherwise; its mean weight and effective sample size are NaN. Must be False inside
            ``torch.compile`` and ``torch.vmap``, and for tensors without values.
        out: A tuple of tensors for the four results, as in `randn`.
        backend: As in `randn`.

    Returns:
        ancestors: ``[B, num]`` in int32, or in int64 from ``K = 2^31`` on. No result has the dimension ``B`` if the
            argument has none.
        log_weights: ``[B, num]`` in the dtype of the argument. In a resampled row all are the log of its mean weight,
            so that the mean weight does not change.
        log_mean_weight: ``[B]`` in float64: the log of the mean weight of each row.
        ess: ``[B]`` in float64: the effective sample size before resampling, in ``[1, K]``.

    Raises:
        TypeError: ``log_weights`` is not a float32 or float64 tensor, a flag is not a bool, or ``out`` is not a tuple.
        ValueError: A shape or value is out of range, ``log_weights`` requires a gradient while gradients are enabled,
            or ``check`` finds a row without a usable weight, which the error names.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Chopin & Papaspiliopoulos 2020, chapter 9; Murray, Lee, Jacob 2016 for the order with ``sorted=False``.
    """
    ordinary = type(backend) is str and backend == "auto" and plain(log_weights)
    if not ordinary:
        log_weights = _arguments.own("log_weights", log_weights, "a float32 or float64 tensor")
    if log_weights.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"log_weights: expected a float32 or float64 tensor, got {log_weights.dtype}")
    shape = log_weights.shape
    if len(shape) not in (1, 2) or shape[-1] == 0:
        raise ValueError(f"log_weights: expected shape [B, K] or [K] with K >= 1, got {list(shape)}")
    particles = shape[-1]
    one_of("scheme", scheme, SCHEMES)
    sorted, check = flag("sorted", sorted), flag("check", check)
    if ess_threshold is not None:
        ess_threshold = number("ess_threshold", ess_threshold, low=0.0, high=1.0, what="share of the particles")
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or not 1 <= num < 1 << 31):
        raise ValueError(f"num: expected an integer in [1, 2^31), got {got(num)}")
    if num is not None and num != particles and (ess_threshold is not None or not sorted):
        raise ValueError(f"num: expected {particles} with ess_threshold or sorted=False, got {num}")
    count = particles if num is None else num
    ordinary = ordinary and out is None
    if ordinary and log_weights.is_cpu and particles < 1 << 31:
        try:
            return _cpu(
                log_weights, scheme, count, ess_threshold,
                seed, step, stream, first_row, None, None, sorted, check,
            )  # fmt: skip
        except UNUSUAL:
            log_weights = _arguments.own("log_weights", log_weights, "a float32 or float64 tensor")
    rows = shape[0] if len(shape) == 2 else 1
    counter = _arguments.counter(seed, step, stream, first_row, (rows, 4 * count), log_weights.device, "first_row")
    if ordinary and not log_weights.is_cpu and counter[4] is counter[5] is None:
        return _resample(backend, log_weights, scheme, count, ess_threshold, *counter, sorted, check, ordinary=True)
    if check and torch.compiler.is_compiling():
        raise ValueError("check: expected False inside torch.compile, since it looks at values, got True")
    given = {"log_weights": log_weights, "seed": seed, "step": step}
    if check and (log_weights.is_meta or expect_alike(given) or any(map(is_batched, given.values()))):
        values = ", ".join(got(value) for value in given.values() if isinstance(value, Tensor))
        raise ValueError(f"check: expected False for results without values, got True with {values}")
    of_rows, drawn = shape[:-1], (*shape[:-1], count)
    index = torch.int32 if particles < 1 << 31 else torch.int64
    expected = (drawn, index), (drawn, log_weights.dtype), (of_rows, torch.float64), (of_rows, torch.float64)
    into = _arguments.out(out, expected, log_weights.device, (log_weights, *counter[-2:]))
    results = _resample(backend, log_weights, scheme, count, ess_threshold, *counter, sorted, check, out=into)
    return results if out is None else out


def _reference(
    log_weights, scheme, num, ess_threshold,
    seed, step, stream, first_row, seed_tensor, step_tensor, sorted, check,
):  # fmt: skip
    results = reference.resample(
        log_weights,
        scheme=scheme,
        num=num,
        ess_threshold=ess_threshold,
        seed=seed if seed_tensor is None else seed_tensor,
        step=step if step_tensor is None else step_tensor,
        stream=stream,
        first_row=first_row,
        sorted=sorted,
    )
    return _checked(log_weights, results) if check else results


# The codes of csrc/common/weights.h.
_SCHEMES = {scheme: code for code, scheme in enumerate(SCHEMES)}


def _cpu(
    log_weights, scheme, num, ess_threshold,
    seed, step, stream, first_row, seed_tensor, step_tensor, sorted, check, out=None,
):  # fmt: skip
    seed, step = _arguments.read(seed, step, seed_tensor, step_tensor)
    log_weights = log_weights.contiguous()
    *rows, particles = log_weights.shape
    if out is not None:
        ancestors, after, log_mean_weight, ess = out
    else:
        if num == particles:  # empty_like is faster than empty
            ancestors = torch.empty_like(log_weights, dtype=torch.int32)
            after = torch.empty_like(log_weights)
        else:
            ancestors = torch.empty((*rows, num), dtype=torch.int32, device="cpu")
            after = torch.empty((*rows, num), dtype=log_weights.dtype, device="cpu")
        log_mean_weight = torch.empty(rows, dtype=torch.float64, device="cpu")
        ess = torch.empty_like(log_mean_weight)
    bad = _native.module("cpu").resample(
        log_weights.data_ptr(),
        _native.CPU_DTYPES[log_weights.dtype],
        rows[0] if rows else 1,
        particles,
        num,
        _SCHEMES[scheme],
        sorted,
        math.inf if ess_threshold is None else float(ess_threshold * particles),
        seed,
        step,
        stream,
        first_row,
        ancestors.data_ptr(),
        after.data_ptr(),
        log_mean_weight.data_ptr(),
        ess.data_ptr(),
        torch.get_num_threads(),
    )
    if check and bad >= 0:
        _refuse(log_weights, bad)
    return ancestors, after, log_mean_weight, ess


def _cuda(
    log_weights, scheme, num, ess_threshold,
    seed, step, stream, first_row, seed_tensor, step_tensor, sorted, check, out=None,
):  # fmt: skip
    log_weights = log_weights.contiguous()
    *rows, particles = log_weights.shape
    ancestors, after, log_mean_weight, ess = out or _fake(log_weights, scheme, num)
    cuda = _native.module("cuda")
    shape = rows[0] if rows else 1, particles, num, _SCHEMES[scheme], sorted
    with _native.cuda_stream(log_weights.device) as queue:
        workspace = log_weights.new_empty(cuda.resample_workspace(*shape), dtype=torch.uint8)
        cuda.resample(
            log_weights.data_ptr(),
            log_weights.dtype == torch.float64,
            *shape,
            math.inf if ess_threshold is None else float(ess_threshold * particles),
            seed,
            step,
            stream,
            first_row,
            _native.address(seed_tensor),
            _native.address(step_tensor),
            ancestors.data_ptr(),
            after.data_ptr(),
            log_mean_weight.data_ptr(),
            ess.data_ptr(),
            workspace.data_ptr(),
            queue,
        )
    results = ancestors, after, log_mean_weight, ess
    return _checked(log_weights, results) if check else results


def _checked(log_weights: Tensor, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results, unless a row has no usable weight: its mean weight is NaN, and this raises. Waits for a GPU."""
    bad_rows = results[2].isnan().reshape(-1)
    if bad_rows.any():
        _refuse(log_weights, int(bad_rows.nonzero()[0]))
    return results


def _refuse(log_weights: Tensor, row: int) -> None:
    value = log_weights.reshape(-1, log_weights.shape[-1])[row].amax().item()
    what = "NaN" if math.isnan(value) else "+inf" if value > 0 else "no live particle (all are -inf)"
    raise ValueError(f"log_weights: expected a finite largest weight in every row, got {what} in row {row}")


def _fake(log_weights, scheme, num, *_):
    rows = log_weights.shape[:-1]
    index_dtype = torch.int32 if log_weights.shape[-1] < 2**31 else torch.int64
    return (
        log_weights.new_empty((*rows, num), dtype=index_dtype),
        log_weights.new_empty((*rows, num)),
        log_weights.new_empty(rows, dtype=torch.float64),
        log_weights.new_empty(rows, dtype=torch.float64),
    )


def _obstacle(log_weights, *_):
    particles = log_weights.shape[-1]
    return f"counts particles in 31 bits, and there are {particles}" if particles >= 1 << 31 else ""


_resample = Operation(
    f"resample(Tensor log_weights, str scheme, SymInt num, float? ess_threshold, {COUNTER}, bool sorted, bool check) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "cuda": _cuda},
    dtypes=WEIGHT_DTYPES,
    obstacle=_obstacle,
)
