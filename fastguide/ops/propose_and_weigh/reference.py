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
    extra_variance: Tensor | None = None,
    extra_variance_scale: float = 1.0,
    seed: IntOrTensor,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
) -> tuple[Tensor, Tensor]:
    """The guided step and the change of the log-weight. See `fastguide.ops.propose_and_weigh`.

        m           = a x_t + b clip(x0_hat)                            a, b, tau = step_coefficients(coefficients)
        d           = displacement_scale displacement
        x_s         = m + d + tau z
        log_weights = log_weights - (sum(d z) / tau + sum(d^2) / (2 tau^2))

    The last line adds the log of ``N(x_s; m, tau^2 I) / N(x_s; m + d, tau^2 I)``, written with the noise. Where
    ``tau = 0`` the displacement is left out and the log-weights stay as they are. ``extra_variance`` widens ``tau`` and
    leaves ``a`` and ``b`` as they are.
    """
    dtype = compute_dtype(x)
    a, b, tau = columns(step_coefficients(widened(coefficients, extra_variance, extra_variance_scale)), x, dtype)
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


def widened(coefficients: Coefficients, variance: Tensor | None, scale: float) -> Coefficients:
    """The coefficients of the same mean, with ``scale * variance`` ``[N]`` added to the variance of the noise.

    The mean depends on ``sigma_s^2 - tau^2``, so the same is added to both.
    """
    if variance is None:
        return coefficients
    alpha_t, sigma_t, alpha_s, sigma_s, tau = coefficients
    added = scale * variance.double()
    added = torch.where(added > 0, added, 0.0)
    return alpha_t, sigma_t, alpha_s, torch.sqrt(sigma_s**2 + added), torch.sqrt(tau**2 + added)
