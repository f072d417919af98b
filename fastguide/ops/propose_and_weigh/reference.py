"""The guided step and the change of the log-weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import Clip, Coefficients, IntOrTensor, Scalar
from ..predict_x0.reference import columns, compute_dtype
from ..randn.reference import randn
from ..reverse_step.reference import clip_x0, displaced, has_noise, step_coefficients

__all__ = ["propose_and_weigh"]


def propose_and_weigh(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    coefficients: Coefficients,
    *,
    clip: Clip = None,
    displacement_scale: Scalar = 1.0,
    seed: IntOrTensor,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
) -> tuple[Tensor, Tensor]:
    """``x_s = m + displacement + tau z`` with ``m = a x_t + b clip(x0_hat)`` and the displacement scaled, and
    ``log_weights`` with the log of ``N(x_s; m, tau^2) / N(x_s; m + displacement, tau^2)`` added: with
    ``delta = displacement / tau`` that is ``-(sum(delta z) + sum(delta^2) / 2)``. Where ``tau = 0`` the step is the
    base kernel's and the ratio is 1. See `fastguide.ops.propose_and_weigh`."""
    dtype = compute_dtype(x)
    a, b, tau = columns(step_coefficients(coefficients), x, dtype)
    mean = a * x.to(dtype) + b * clip_x0(x0_hat.to(dtype), clip)
    displacement = displaced(displacement.to(dtype), displacement_scale)
    if not has_noise(tau):
        return mean.to(x.dtype).contiguous(), log_weights.clone(memory_format=torch.contiguous_format)
    z = randn(
        x.shape,
        seed=seed,
        step=step,
        stream=stream,
        first_particle=first_particle,
        dtype=dtype,
        device=x.device,
    )
    if isinstance(tau, Tensor):
        delta = torch.where(tau > 0, displacement / tau, 0.0)
    else:
        delta = displacement / tau
    terms = delta.double() * (z.double() + 0.5 * delta.double())
    ratio = -terms.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)
    log_weights = (log_weights.double() + ratio.reshape(log_weights.shape)).to(log_weights.dtype)
    return (mean + tau * (delta + z)).to(x.dtype).contiguous(), log_weights.contiguous()
