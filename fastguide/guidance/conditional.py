"""The proposal of the particle methods with the covariance of a step given the measurement."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..arguments import flag
from ..likelihoods import Gaussian, Likelihood
from .base import Run, noise, per_sample


def check_conditional(
    run: Run, conditional: bool | None, likelihood: Any, covariance: str | None, base_kernel: str
) -> tuple[Any, bool]:
    """The likelihood, with what it must know about its operator, and whether the proposal is that of `condition`.

    None means: with ``"isotropic"`` and ``eta = 1``, where it can be had.
    """
    if conditional is not None and not flag("conditional", conditional, " or None"):
        return likelihood, False
    if conditional is None and (covariance != "isotropic" or not _full_noise(run)):
        return likelihood, False
    if isinstance(likelihood, Gaussian) and covariance != "isotropic":
        likelihood = likelihood.measure_spread(run.event)
    reason = _why_not(likelihood, base_kernel, run)
    if conditional and reason:
        raise ValueError(f"conditional: expected {reason}")
    return likelihood, not reason


def _full_noise(run: Run) -> bool:
    """Whether each step has all the noise of DDPM. With less, the chain draws ``x_0`` anew at each step, and what
    `condition` leaves is too narrow."""
    return all(tau >= 0.999 * noise(t, s, 1.0) for tau, (t, s) in zip(run.taus, pairwise(run.levels), strict=True))


def _why_not(likelihood: Any, base_kernel: str, run: Run) -> str:
    if base_kernel != "trace":
        return f"base_kernel='trace', got {base_kernel!r}"
    if not isinstance(likelihood, Gaussian):
        what = type(likelihood).__name__ if isinstance(likelihood, Likelihood) else "a reward"
        return f"a Gaussian likelihood, got {what}"
    if any(isinstance(likelihood.scale_at(level.t), Tensor) for level in run.levels):
        return "one scale for all measurements, got a tensor"
    if likelihood.closed_form is None:
        return f"a linear operator whose spectrum is known or found from at most 256 rows, got {likelihood.operator}"
    return ""


def condition(
    run: Run, likelihood: Gaussian, x: Tensor, log_weights: Tensor, gradient: Tensor, variance: Tensor, i: int
) -> tuple[Tensor, Tensor]:
    """Turn draws of ``N(m_y, c I)`` into draws of ``N(m_y, S_y)``, from the same normals, and mend their weights.

    Where ``x_0`` given ``x_t`` is ``N(x0_hat, v I)``, the step given ``y`` has the covariance

        S_y = c I - b^2 v^2 A^T (v A A^T + s^2 I)^-1 A,   c = tau^2 + b^2 v

    ``l`` is an eigenvalue of ``A A^T``. In its basis ``w`` is ``A z``, for normals ``z``, and ``h`` is ``A (m_y - m)``:

        k = b^2 v^2 / (c (v l + s^2)),   q = (1 - k l)^(1/2),   f = k / (1 + q)
        x_s = m_y + c^(1/2) (z - A^T f w)
        log N(x_s; m, c I) - log N(x_s; m_y, S_y)  is that of the first draw
            plus the sum over l of  f h w / c^(1/2) + k w^2 / 2 + log q

    Args:
        run: The run.
        likelihood: Its likelihood, with the scale ``s``.
        x: ``[n, *event]``, drawn with the step's own normals.
        log_weights: ``[B, K]``, with the ratio of these draws.
        gradient: ``[n, *event]``; its shift of ``m`` is ``b`` times `Run.shift_scale` times this.
        variance: ``v`` over `Run.shift_scale`, ``[n]``.
        i: The step.

    Returns:
        The new ``x`` and log-weights.

    Source:
        Doucet et al. 2000, section II.D, for the proposal of least variance.
    """
    b, unit, tau = run.x0_weight(i), run.shift_scale(i), run.taus[i]
    dtype, t = run.compute_dtype, run.levels[i].t
    z = run.randn(i, 0, dtype=dtype)

    def chunk(rows: Tensor, x: Tensor, z: Tensor, gradient: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        own = likelihood.at(rows)
        assert isinstance(own, Gaussian) and own.closed_form is not None
        operator, spectrum = own.closed_form
        # Copies, since a user's operator may return the same memory at every call. A blur's coefficients are complex.
        measured = operator(z)
        eigenvalues, w = spectrum.eigenvalues(measured), _double(spectrum.transform(measured))
        h = _double(spectrum.transform(operator(gradient.to(dtype))))
        # An unknown variance counts as 0, as in the base kernel. With the floor, a step without noise divides by no 0.
        v = per_sample(torch.nan_to_num(unit * variance.double(), 0.0, 0.0).clamp_(min=0.0), w.real)
        s, floor = own.scale_at(t), tau**2 + 1e-200
        c, of_y = floor + b**2 * v, v * eigenvalues + s**2
        k = b**2 * v * (v / c) / of_y
        q = ((floor * of_y + b**2 * s**2 * v) / (c * of_y)).sqrt()  # (1 - k l)^(1/2), which would cancel
        root = c.sqrt()
        narrowed = w * k / (1.0 + q)
        change = (narrowed.conj() * h).real * (b * unit / root) + 0.5 * k * (w.conj() * w).real + q.log()
        coefficients = (narrowed * root).to(dtype.to_complex() if w.is_complex() else dtype)
        less = operator.adjoint(spectrum.inverse_transform(coefficients))
        return x - less.to(x.dtype), change.flatten(1).sum(1)

    x, change = run.in_chunks(chunk, x, z, gradient, variance)
    return x, log_weights + change.reshape(log_weights.shape)


def _double(c: Tensor) -> Tensor:
    return c.to(torch.complex128 if c.is_complex() else torch.float64, copy=True)
