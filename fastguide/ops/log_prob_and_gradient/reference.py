"""Log-densities of measurements, and their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import Scalar
from ..reverse_step.reference import square_root

__all__ = [
    "FAMILIES",
    "POISSON_LEAST",
    "POISSON_SHARE",
    "density_constant",
    "log_factorials",
    "log_prob_and_gradient",
]

FAMILIES = ("gaussian", "student_t", "laplace", "poisson")

# For c counts, the Poisson log-density is a parabola below the rate POISSON_SHARE * max(c, POISSON_LEAST).
POISSON_SHARE, POISSON_LEAST = 0.5, 0.2


def density_constant(family: str, scale: float, df: float | None, has_extra_variance: bool) -> float:
    """The part of the log-density of one measurement that depends on neither ``z`` nor ``y``.

    Args:
        family: A name in `FAMILIES`.
        scale: A number > 0. It is left out if there is an extra variance, which changes with the measurement.
        df: Degrees of freedom, for ``"student_t"`` alone.
        has_extra_variance: Whether ``extra_variance`` is given.

    Returns:
        A constant to add for each measurement; 0 for ``"poisson"``.
    """
    log_scale = 0.0 if has_extra_variance else math.log(scale)
    if family == "gaussian":
        return -0.5 * math.log(2 * math.pi) - log_scale
    if family == "laplace":
        return -math.log(2.0) - log_scale
    if family == "student_t":
        assert df is not None
        if df < 1e6:
            constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        else:  # the two lgamma would cancel; the error is O(1 / df^3)
            constant = -0.5 * math.log(2 * math.pi) - 0.25 / df
        return constant - log_scale
    return 0.0


def log_factorials(y: Tensor, scale: float) -> Tensor:
    """The sum of ``log c!`` over the counts ``c = y / scale`` of each row.

    This is the part of the Poisson log-density that does not depend on ``z``. The bits of a row do not depend on the
    other rows, since its sum has a fixed order.

    Args:
        y: ``[rows, *measurement]``, values >= 0.
        scale: The value of one count, a number > 0.

    Returns:
        ``[rows]`` in float64.
    """
    terms = torch.lgamma(y.double() / scale + 1.0).reshape(y.shape[0], math.prod(y.shape[1:]))
    while (width := terms.shape[1]) > 1:
        half = width // 2
        terms = torch.cat([terms[:, :half] + terms[:, width - half :], terms[:, half : width - half]], 1)
    return terms.sum(1)


def log_prob_and_gradient(
    z: Tensor,
    y: Tensor,
    *,
    family: str,
    scale: float,
    df: float | None = None,
    background: float = 0.0,
    extra_variance: Tensor | None = None,
    rows: Tensor | None = None,
    log_factorials: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``log p(y | z)`` and its gradient in ``z``. See `fastguide.ops.log_prob_and_gradient`.

    With ``r = y - z``, and ``v = scale^2 + extra_variance`` for each measurement:

        family      log-density of one measurement                                gradient in z
        gaussian    -r^2 / 2v - log(2 pi v) / 2                                   r / v
        student_t   -(df + 1)/2 log(1 + r^2 / (df v)) - log(v) / 2 + constant     (df + 1) r / (df v + r^2)
        laplace     -|r| / sqrt(v) - log(2 sqrt(v))                               sign(r) / sqrt(v)
        poisson     c log(rate) - rate - log c!                                   (c / rate - 1) / scale

    For ``"poisson"``, ``c = y / scale`` and ``rate = (z + background) / scale``. At rates below
    ``r0 = max(c, 0.2) / 2`` the log-density is a parabola, because the logarithm goes to ``-inf`` at a rate of 0 and is
    undefined below. The parabola has the value and slope of the formula at ``r0``, and the curvature ``1 / max(c, 1)``
    of a Gaussian with the variance of the counts. Rates below ``r0`` hold at most 9 % of the likelihood's mass (for one
    count; 4 % for five, 1 % for ten).

    Returns:
        log_prob: ``[n]`` in float64.
        gradient: ``[n, *measurement]`` in the dtype of ``z``.

    Raises:
        ValueError: ``family`` is not in `FAMILIES`.
    """
    # float64 where float32 fails: Poisson counts of 1e4 have terms of 1e5 that cancel to a few units, and the square of
    # a residual of 1e20 overflows float32 in Student's t.
    wide = family in ("poisson", "student_t") or torch.float64 in (z.dtype, y.dtype)
    dtype = torch.float64 if wide else torch.float32
    location, y = z.to(dtype), (y if rows is None else y.index_select(0, rows)).to(dtype)
    variance: Scalar = scale**2 if extra_variance is None else scale**2 + extra_variance.to(dtype)
    residual = y - location
    if family == "gaussian":
        gradient = residual / variance
        terms = -0.5 * residual * gradient
    elif family == "student_t":
        assert df is not None
        square = residual * residual
        gradient = (df + 1) * residual / (df * variance + square)
        terms = -0.5 * (df + 1) * torch.log1p(square / (df * variance))
    elif family == "laplace":
        slope = 1.0 / square_root(variance)
        sign = torch.where(residual > 0, 1.0, torch.where(residual < 0, -1.0, residual))  # the sign of NaN is NaN
        gradient = sign * slope
        terms = -residual.abs() * slope
    elif family == "poisson":
        counts = y / scale
        rate = (location + background) / scale
        floor = POISSON_SHARE * counts.clamp(min=POISSON_LEAST)
        below = torch.where(rate < floor, floor - rate, 0.0)
        rate = torch.where(rate < floor, floor, rate)
        slope, bend = counts / rate - 1.0, below / counts.clamp(min=1.0)
        gradient = (slope + bend) / scale
        terms = torch.xlogy(counts, rate) - rate - below * (slope + 0.5 * bend)
        if log_factorials is None:
            terms = terms - torch.lgamma(counts + 1.0)
    else:
        raise ValueError(f"family: expected one of {FAMILIES}, got {family!r}")
    log_prob = _sum(terms) + math.prod(z.shape[1:]) * density_constant(family, scale, df, extra_variance is not None)
    if isinstance(variance, Tensor):
        log_prob = log_prob - 0.5 * _sum(torch.log(variance.double()))
    if log_factorials is not None:
        log_prob = log_prob - (log_factorials if rows is None else log_factorials.index_select(0, rows))
    return log_prob, gradient.to(z.dtype).contiguous()


def _sum(values: Tensor) -> Tensor:
    """The sum of each sample in float64: differences between log-densities of large events can be a few units."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:])).sum(1, dtype=torch.float64)
