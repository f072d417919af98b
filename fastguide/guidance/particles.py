"""What the particle methods, TDS and FK, share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import number, one_of
from ..likelihoods import Gaussian
from ..profiling import phase
from ..reference import SCHEMES
from .base import STREAM_RESAMPLE, Run, State
from .conditional import condition
from .watch import STATE

BASE_KERNELS = ("trace", "ddpm")


def check_particles(run: Run, resampler: str, ess_threshold: float | None, base_kernel: str, guided: bool) -> None:
    """Raise unless the settings of a particle method are in range. A ``guided`` proposal needs noise."""
    one_of("resampler", resampler, SCHEMES)
    one_of("base_kernel", base_kernel, BASE_KERNELS)
    if base_kernel != "ddpm" and not guided:
        raise ValueError(
            f"base_kernel: expected 'ddpm' without the guided proposal, whose gradient gives the variance, got "
            f"{base_kernel!r}"
        )
    if ess_threshold is not None:
        number("ess_threshold", ess_threshold, low=0.0, high=1.0, what="share of the particles")
    if guided and not any(tau > 0 for tau in run.taus):
        raise ValueError("eta: expected > 0, since the weight of a guided proposal needs noise; got 0 at every step")


def resample_particles(
    run: Run, state: State, i: int, resampler: str, ess_threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Resample, and move the particles of the state in place.

    Returns the ancestors ``[B, K]``, the log-weights ``[B, K]`` and the ESS ``[B]``.
    """
    assert state.log_weights is not None
    with phase("resample"):

        def draw(counter: dict[str, Any], log_weights: Tensor) -> tuple[Tensor, ...]:
            return ops.resample(
                log_weights,
                scheme=resampler,
                ess_threshold=ess_threshold,
                seed=counter["seed"],
                step=counter["step"],
                stream=STREAM_RESAMPLE,
                first_row=run.first_sample,
                sorted=False,
                check=False,  # checked once, after the loop
            )

        ancestors, log_weights, _, ess = run.with_counters(i, draw, state.log_weights)
    with phase("gather"):
        shape = (run.observations, run.particles)
        views = [t.view(*shape, *t.shape[1:]) for t in (state.x, *state.particles.values())]
        ops.gather_particles_(ancestors, *views, check=False)
    return ancestors, log_weights, ess


def propose_guided(
    run: Run,
    state: State,
    log_weights: Tensor,
    i: int,
    blamed: str,
    strength: float = 1.0,
    likelihood: Gaussian | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw ``x_s ~ N(m_y, S)``, and add ``log N(x_s; m, S) - log N(x_s; m_y, S)`` to the log-weights.

    With a ``likelihood`` the draws are those of `condition`.

    ``S`` is the covariance of the base kernel: ``tau^2 I``, or ``(tau^2 + b^2 v) I`` where the state has a variance
    ``v`` of ``x_0`` given ``x_t``, in units of `Run.shift_scale`. ``strength`` multiplies the
    gradient. ``blamed`` names what the gradient came from, for an error.
    """
    coefficients, b = run.coefficients(i), run.x0_weight(i)
    unit, variance = run.shift_scale(i), state.particles.pop("variance", None)
    not_finite = run.watch.flags(i, run.device, STATE, "x0_hat", blamed)

    def draw(
        counter: dict[str, Any], x: Tensor, x0_hat: Tensor, displacement: Tensor, log_weights: Tensor, *variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_s = run.memory(x)
        out = None if x_s is None else (x_s, torch.empty_like(log_weights))
        return ops.propose_and_weigh(
            x, x0_hat, displacement, log_weights, coefficients, clip=run.clip,
            displacement_scale=b * unit * strength, extra_variance=variance[0] if variance else None,
            extra_variance_scale=b**2 * unit, out=out, not_finite=not_finite, **counter,
        )  # fmt: skip

    # Taken out of the state, so that the next level can use their memory.
    x0_hat, gradient = state.particles.pop("x0_hat"), state.particles.pop("gradient")
    own = () if variance is None else (variance,)
    x, log_weights = run.with_counters(i, draw, state.x, x0_hat, gradient, log_weights, *own)
    if likelihood is None:
        return x, log_weights
    assert variance is not None
    return condition(run, likelihood, x, log_weights, gradient, variance, i)


def on_the_way(run: Run, log_prob: Tensor) -> Tensor:
    """``log_prob`` ``[B * K]`` of a level before the last, without ``-inf``.

    The lowest finite value of the observation's particles replaces ``-inf``, or 0 where there is none. The prediction
    ``x0_hat`` may break a constraint that the sample will meet. A particle that died of it would be missing at the end,
    and more particles would not bring it back. Any finite value leaves the target as it is, since the last level takes
    it back.
    """
    rows = log_prob.view(run.observations, run.particles)
    dead = rows == -math.inf
    lowest = rows.masked_fill(dead | rows.isnan(), math.inf).amin(1, keepdim=True)
    lowest = lowest.masked_fill(lowest == math.inf, 0.0)
    return torch.where(dead, lowest, rows).view(-1)


def log_ratio(new: Tensor, old: Tensor) -> Tensor:
    """``new - old``, and ``-inf`` for a particle that is already dead."""
    return torch.where(old == -math.inf, old, new - old)
