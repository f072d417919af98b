"""The guided step of a particle filter and the change of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import number
from .. import _arguments, _native
from .._arguments import COUNTER, SCALARS, SCALE, WEIGHT_DTYPES, Clip, Coefficients, IntOrTensor, Scalar
from .._operation import UNUSUAL, Operation, plain, tell_autograd, writable
from ..predict_x0.reference import columns, compute_dtype
from ..reverse_step.reference import has_noise
from . import reference
from .reference import widened


def propose_and_weigh(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    coefficients: Coefficients,
    *,
    clip: Clip = None,
    displacement_scale: Scalar = 1.0,
    extra_variance: Tensor | None = None,
    extra_variance_scale: float = 1.0,
    seed: IntOrTensor,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    not_finite: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Takes the guided step of a particle filter and updates the log-weights, in one pass over memory.

        m           = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat           from the clipped x0_hat
        d           = displacement_scale displacement
        x_s         = m + d + tau z
        log_weights = log_weights + log N(x_s; m, tau^2 I) - log N(x_s; m + d, tau^2 I)

    With ``extra_variance``, ``tau^2 + extra_variance_scale extra_variance`` takes the place of ``tau^2``, except in
    ``m``. Where ``tau = 0`` the displacement is left out, and the log-weights stay as they are. The noise ``z`` is
    `randn` of the seed, step, stream and first particle. The arithmetic is in float32, or in float64 where ``x`` is
    float64. The operation has no derivative.

    Args:
        x: The state at level ``t``, ``[N, *event]``: float32, float16, bfloat16 or float64. No tensor may require a
            gradient while gradients are enabled.
        x0_hat: The predicted clean sample before the clip, with the shape and device of ``x`` and any of these dtypes.
        displacement: By how much guidance moves the mean, like ``x0_hat``.
        log_weights: ``N`` values of any shape, float32 or float64.
        coefficients: ``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``, as in `reverse_step`.
        clip: The range of ``x0_hat``, as in `reverse_step`.
        displacement_scale: A finite number, or a floating tensor ``[]`` or ``[N]``.
        extra_variance: The variance that the noise of each particle has besides, a floating tensor ``[N]``; None for
            none. The product with its scale counts as 0 where it is negative or NaN.
        extra_variance_scale: A finite number, a factor of ``extra_variance``.
        seed: Seed of the noise, as in `randn`.
        step: Sampling step of the noise, as in `randn`.
        stream: Stream of the noise, as in `randn`.
        first_particle: Global index of the first particle, as in `randn`.
        out: A tuple of tensors for both results, as in `randn`.
        not_finite: A contiguous int32 tensor ``[3]`` of flags for ``x``, ``x0_hat`` and ``displacement``, as in
            `reverse_step`. The displacement counts only where it is used: where ``tau`` is not 0 in the dtype of the
            arithmetic.
        backend: As in `randn`.

    Returns:
        x_s: ``[N, *event]`` in the dtype and layout (contiguous or channels_last) of ``x``.
        log_weights: The new log-weights, in the shape and dtype of the argument.

    Raises:
        TypeError: A tensor has an unsupported dtype, or an argument is not a tensor or a number where one is expected.
        ValueError: Shapes or devices differ, a value is out of range, or a tensor requires a gradient.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Wu et al. 2023 (twisted diffusion sampling), algorithm 1.
    """
    bounds = () if clip is None else _arguments.clip(clip)
    results = () if out is None else out
    ordinary = type(backend) is str and backend == "auto" and type(coefficients) is tuple and type(results) is tuple
    ordinary = ordinary and plain(x, x0_hat, displacement, *results[:1]) and plain(log_weights, *results[1:])
    ordinary = ordinary and type(displacement_scale) is float and log_weights.dtype in WEIGHT_DTYPES
    ordinary = ordinary and log_weights.numel() == x.shape[0] and (extra_variance is None or plain(extra_variance))
    given = x, x0_hat, displacement, log_weights, *(() if extra_variance is None else (extra_variance,))
    ordinary = ordinary and writable(out, (x, log_weights), not_finite, 3, given)
    if ordinary and x.is_cpu and log_weights.is_cpu and extra_variance is None:
        try:
            moved = _cpu(
                x, x0_hat, displacement, log_weights, coefficients, None, bounds, displacement_scale, None, None, 1.0,
                seed, step, stream, first_particle, None, None, out=out, not_finite=not_finite,
            )  # fmt: skip
            tell_autograd(out, not_finite)
            return moved if out is None else out
        except UNUSUAL:
            pass
    ordinary = ordinary and not x.is_cpu and log_weights.device == x.device
    if not ordinary:
        x = _arguments.state("x", x)
        x0_hat, displacement = _arguments.state("x0_hat", x0_hat, x), _arguments.state("displacement", displacement, x)
        log_weights = _arguments.own("log_weights", log_weights, "a float32 or float64 tensor")
        if log_weights.numel() != x.shape[0] or log_weights.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"log_weights: expected {x.shape[0]} float32 or float64 values, "
                f"got {log_weights.dtype} {list(log_weights.shape)}"
            )
        if log_weights.device != x.device:
            raise ValueError(f"log_weights: expected a tensor on {x.device}, where x is, got {log_weights.device}")
    scale = _arguments.per_sample("displacement_scale", displacement_scale, x)
    wider = _extra_variance(extra_variance, extra_variance_scale, x)
    scalars = _arguments.scalars(coefficients, x, "sample")
    counter = _arguments.counter(seed, step, stream, first_particle, x.shape, x.device)
    ordinary = ordinary and scalars[1] is counter[4] is counter[5] is None  # numbers alone
    into: Any = out
    if not ordinary:
        expected = (x.shape, x.dtype), (log_weights.shape, log_weights.dtype)
        inputs = x, x0_hat, displacement, log_weights, scale[1], wider[0], *counter[-2:]
        into = _arguments.out(out, expected, x.device, inputs)
        not_finite = _arguments.not_finite(not_finite, 3, x.device, (*inputs, *(into or ())))
    results = _propose_and_weigh(
        backend, x, x0_hat, displacement, log_weights, *scalars, bounds, *scale, *wider, *counter,
        out=into, not_finite=not_finite, ordinary=ordinary,
    )  # fmt: skip
    if out is not None:
        return out
    return results[0].contiguous(memory_format=_arguments.layout(x)), results[1]


def _extra_variance(variance: Any, scale: Any, x: Tensor) -> tuple[Tensor | None, float]:
    """The checked variance and its factor. The values of the tensor are not read."""
    if variance is not None:
        variance = _arguments.own("extra_variance", variance, f"a floating tensor [{x.shape[0]}], or None")
        if variance.shape != x.shape[:1] or not variance.is_floating_point() or variance.device != x.device:
            raise ValueError(
                f"extra_variance: expected a floating tensor [{x.shape[0]}] on {x.device}, got {variance.dtype} "
                f"{list(variance.shape)} on {variance.device}"
            )
        if variance.requires_grad and torch.is_grad_enabled():
            raise ValueError("extra_variance: expected a tensor that needs no gradient, got one that does")
    return variance, number("extra_variance_scale", scale)


def _reference(
    x, x0_hat, displacement, log_weights, coefficients, table, clip, displacement_scale, displacement_scale_tensor,
    extra_variance, extra_variance_scale, seed, step, stream, first_particle, seed_tensor, step_tensor,
):  # fmt: skip
    _arguments.expect_scalars(table, "sample")
    return reference.propose_and_weigh(
        x,
        x0_hat,
        displacement,
        log_weights,
        _arguments.unpacked_scalars(coefficients, table),
        clip=_arguments.unpacked_clip(clip),
        displacement_scale=_arguments.unpacked(displacement_scale, displacement_scale_tensor),
        extra_variance=extra_variance,
        extra_variance_scale=extra_variance_scale,
        seed=seed if seed_tensor is None else seed_tensor,
        step=step if step_tensor is None else step_tensor,
        stream=stream,
        first_particle=first_particle,
    )


def _cpu(
    x, x0_hat, displacement, log_weights, coefficients, table, clip, displacement_scale, displacement_scale_tensor,
    extra_variance, extra_variance_scale, seed, step, stream, first_particle, seed_tensor, step_tensor,
    out=None, not_finite=None,
):  # fmt: skip
    seed, step = _arguments.read(seed, step, seed_tensor, step_tensor)
    x, x0_hat, displacement = x.contiguous(), x0_hat.contiguous(), displacement.contiguous()
    log_weights = log_weights.contiguous()
    if displacement_scale_tensor is not None:
        displacement_scale_tensor = displacement_scale_tensor.contiguous()
    if table is not None:
        _arguments.expect_scalars(table, "sample")
    if extra_variance is not None:
        five = _arguments.unpacked_scalars(coefficients, table)
        wide = widened(five, extra_variance, extra_variance_scale)
        full = torch.ones_like(extra_variance, dtype=torch.float64)
        table = torch.stack([v * full for v in wide])
    if table is not None:
        coefficients = table.data_ptr()
    x_s, after = out or (torch.empty_like(x), torch.empty_like(log_weights))
    _native.module("cpu").propose_and_weigh(
        x.data_ptr(),
        _native.CPU_DTYPES[x.dtype],
        x0_hat.data_ptr(),
        _native.CPU_DTYPES[x0_hat.dtype],
        displacement.data_ptr(),
        _native.CPU_DTYPES[displacement.dtype],
        x_s.data_ptr(),
        log_weights.data_ptr(),
        after.data_ptr(),
        log_weights.dtype == torch.float64,
        None if not_finite is None else not_finite.data_ptr(),
        *_arguments.codes(clip),
        coefficients,
        _arguments.address(displacement_scale, displacement_scale_tensor),
        x.shape,
        seed,
        step,
        stream,
        first_particle,
        torch.get_num_threads(),
    )
    return x_s, after


def _fake(x, x0_hat, displacement, log_weights, *_):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(log_weights, memory_format=contiguous)


def _watched(
    x, x0_hat, displacement, log_weights, coefficients, table, clip, displacement_scale, displacement_scale_tensor,
    extra_variance, extra_variance_scale, *_,
):  # fmt: skip
    five = widened(_arguments.unpacked_scalars(coefficients, table), extra_variance, extra_variance_scale)
    *_, tau = columns(five, x, compute_dtype(x))
    if not has_noise(tau):
        return x, x0_hat, None
    return x, x0_hat, torch.where(tau != 0, displacement, 0) if isinstance(tau, Tensor) else displacement


_propose_and_weigh = Operation(
    f"propose_and_weigh(Tensor x, Tensor x0_hat, Tensor displacement, Tensor log_weights, {SCALARS}, "
    f"float[] clip, {SCALE}, Tensor? extra_variance, float extra_variance_scale, {COUNTER}) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": "fastguide.ops.propose_and_weigh.triton:call"},
    watched=_watched,
)
