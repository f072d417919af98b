"""Exact resampling: weights are integers, so that sums do not depend on their order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import IntOrTensor
from ..randn.reference import MASK32, words

__all__ = ["SCHEMES", "integer_weights", "resample"]

SCHEMES = ("systematic", "stratified", "multinomial", "residual")

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_EXP2 = [  # 2^f on |f| <= 1/2: the minimax polynomial of degree 11, with a relative error of 5e-18
    4.4353538352506337e-10,
    7.073245400775912e-09,
    1.0178180978790253e-07,
    1.3215438809462704e-06,
    1.5252733590777546e-05,
    0.00015403530449011938,
    0.0013333558146581574,
    0.009618129107601656,
    0.05550410866482163,
    0.24022650695910108,
    0.6931471805599453,
    1.0,
]
_LOG = [  # ln(3/2 + f) on |f| <= 1/2: degree 10, with an error of 7e-10
    -0.002376162972939694,
    0.0037526511339678846,
    -0.0046663716278311,
    0.008132962281705085,
    -0.01466320672911913,
    0.026363116970939914,
    -0.04938061267387683,
    0.09876426639700793,
    -0.22222227464793023,
    0.6666666814068787,
    0.40546510832503946,
]


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x
        value = value + coefficient
    return value


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, highest power first. Even and odd powers are summed apart, each by
    Horner's rule, one operation at a time.
    """
    even, odd = (_horner(coefficients[last::-2][::-1], x * x) for last in (-1, -2))
    return odd * x + even


def _power_of_two(n: Tensor) -> Tensor:
    return ((n + 1023) << 52).view(torch.float64)


def integer_weights(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weights as integers, so that their sums are exact and do not depend on the order.

        q = round(exp(log_w - max) 2^S)             S = 62 - ceil(log2 K)
        v = round(exp(2 (log_w - max)) 2^S)         for the effective sample size

    Every step is one IEEE operation on float64, and none is fused. All backends therefore get the same integers. In a
    row whose maximum is not finite, every weight is treated as the largest.

    Args:
        log_weights: ``[B, K]``, float32 or float64.

    Returns:
        q: ``[B, K]`` in int64.
        v: ``[B, K]`` in int64.
        maximum: The row maxima ``[B]`` in float64.
        scale: ``S``.
    """
    scale = 62 - max(log_weights.shape[1] - 1, 0).bit_length()
    lw = log_weights.double().contiguous()
    top = lw.amax(dim=1)
    good = torch.isfinite(top)[:, None]
    d = torch.where(good, lw - torch.where(good, top[:, None], 0.0), 0.0)
    return *_exp_times(d, scale), top, scale


def _exp_times(d: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """``round(exp(d) 2^scale)`` and ``round(exp(2 d) 2^scale)`` as int64, for ``d <= 0`` in float64."""
    t = d.clamp(min=-64.0) * _LOG2_E  # exp(-64) 2^62 rounds to 0
    n = torch.round(t)
    e = _polynomial(_EXP2, t - n)
    n = n.long()
    return (
        torch.round(e * _power_of_two(n + scale)).long(),
        torch.round((e * e) * _power_of_two(2 * n + scale)).long(),
    )


def _uniform_below(q: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    """``floor(u q / 2^64)`` for the 64-bit ``u`` with words ``(w0, w1)`` and ``0 <= q <= 2^62``, in 32-bit limbs."""
    q0, q1 = q & MASK32, q >> 32
    cross = w1 * q0  # up to 2^64: its bits are right, its sign may be wrong
    middle = (((w0 * q0) >> 32) & MASK32) + (cross & MASK32) + ((w0 * q1) & MASK32)
    return w1 * q1 + ((cross >> 32) & MASK32) + ((w0 * q1) >> 32) + (middle >> 32)


def _uniforms(
    rows: int, number: int, seed: IntOrTensor, step: IntOrTensor, stream: int, device: torch.device, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Words of ``[rows, number]`` 64-bit uniforms; row ``b`` is the counter's particle ``first_row + b``."""
    w = words(rows, (number + 1) // 2, seed, step, stream, first_row, device)
    w0 = torch.stack([w[0], w[2]], dim=-1).flatten(1)[:, :number]
    w1 = torch.stack([w[1], w[3]], dim=-1).flatten(1)[:, :number]
    return w0, w1


def _exponentials(
    rows: int, number: int, seed: IntOrTensor, step: IntOrTensor, stream: int, device: torch.device, first_row: int = 0
) -> Tensor:
    """Standard exponentials ``[rows, number]`` as integers: ``round(-ln((word + 1) / 2^32) 2^26)``.

    The words come in the order of `randn`'s elements. The distribution function is within 1e-8 of the exponential one,
    and sums are exact.
    """
    w = words(rows, (number + 3) // 4, seed, step, stream, first_row, device)
    u = (torch.stack(w, dim=-1).flatten(1)[:, :number] + 1).double()  # 2^exponent times [1, 2)
    exponent = (u.view(torch.int64) >> 52) - 1023
    ln = _polynomial(_LOG, u * _power_of_two(-exponent) - 1.5)
    return torch.round(((32 - exponent).double() * _LN_2 - ln) * 2.0**26).long()


def _sorted_uniforms(exponentials: Tensor, number: Tensor, total: Tensor) -> Tensor:
    """``[B, n]``: in each row the first ``number`` ``[B, 1]`` values are sorted uniforms below ``total`` ``[B, 1]``
    (float64), and the rest are infinity.

    Sorted uniforms are sums of exponential spacings, divided by the sum with one spacing more (Chopin &
    Papaspiliopoulos 2020, chapter 9). The spacings are ``exponentials`` ``[B, n + 1]``.
    """
    sums = exponentials.cumsum(1)
    u = sums.double() * (total / sums.gather(1, number).clamp(min=1).double())
    u = torch.minimum(u, total * (1.0 - 2.0**-53))  # the next float64 below
    return torch.where(torch.arange(sums.shape[1], device=sums.device) < number, u, math.inf)[:, :-1].contiguous()


def _search(prefix: Tensor, positions: Tensor) -> Tensor:
    """First particle whose inclusive prefix sum exceeds the position."""
    index = torch.searchsorted(prefix, positions.contiguous(), right=True)
    return index.clamp(max=prefix.shape[1] - 1)


def _stratum_positions(total: Tensor, number: int, r: Tensor) -> Tensor:
    """``floor((i Q + r) / N)`` for ``i = 0..N-1`` without leaving int64: ``Q = N h + g``."""
    i = torch.arange(number, device=total.device)[None, :]
    h, g = total // number, total % number
    return i * h + (i * g + r) // number


def _shares(q: Tensor, total: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """``floor(N q / Q)`` and the rest of that division, for ``0 <= q <= Q <= 2^62``."""
    # The floating-point quotient is off by one at most. The rest, exact modulo 2^64, corrects it.
    quotient = torch.floor(number * (q.double() / total.double())).long()
    rest = number * q - quotient * total
    shift = (rest >= total).long() - (rest < 0).long()
    return quotient + shift, rest - shift * total


def _residual(q: Tensor, total: Tensor, number: int, exponentials: Tensor) -> Tensor:
    """``floor(N w)`` copies of each particle; the rest is drawn independently from the remainders. All sorted."""
    copies = _shares(q, total, number)[0].cumsum(1)
    whole, rest = _shares(q.cumsum(1), total, number)
    # The prefix sums of the remainders N w - floor(N w): whole - copies, and a fraction.
    remainders = (whole - copies).double() + (rest.double() * (1.0 / total.double())).clamp(max=1.0)
    left = number - copies[:, -1:]
    u = _sorted_uniforms(exponentials, left, left.double())
    offspring = copies + torch.searchsorted(u, remainders)
    slots = torch.arange(number, device=q.device).expand(q.shape[0], -1)
    return _search(offspring, slots)


def _keep_in_place(ancestors: Tensor) -> Tensor:
    """The same ancestors ``[B, K]``, permuted so that every survivor keeps its place (Murray et al. 2016)."""
    particles = ancestors.shape[1]
    counts = torch.zeros_like(ancestors).scatter_add_(1, ancestors, torch.ones_like(ancestors))
    alive = counts > 0
    rank = (~alive).cumsum(1) - 1  # a dead slot's rank among the dead
    spare = _search((counts - 1).clamp(min=0).cumsum(1), rank.clamp(min=0))
    return torch.where(alive, torch.arange(particles, device=ancestors.device), spare)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws ancestors for the particles of each row. See `fastguide.ops.resample`.

    A row without a usable weight raises no error here. It keeps its particles, or gets zeros as ancestors if ``num`` is
    not ``K``. Its mean weight and effective sample size are NaN.
    """
    if log_weights.ndim == 1:
        out = resample(
            log_weights[None],
            scheme=scheme,
            num=num,
            ess_threshold=ess_threshold,
            seed=seed,
            step=step,
            stream=stream,
            first_row=first_row,
            sorted=sorted,
        )
        return out[0][0], out[1][0], out[2][0], out[3][0]
    rows, particles = log_weights.shape
    number = particles if num is None else num
    q, v, top, scale = integer_weights(log_weights)
    total = q.sum(1, keepdim=True)
    w = total[:, 0].double() * 2.0**-scale  # sum of exp(log_w - max)
    bad = ~torch.isfinite(top)  # NaN, +inf, or no live particle
    ess = torch.where(bad, math.nan, w * w / (v.sum(1).double() * 2.0**-scale))
    log_mean_weight = torch.where(bad, math.nan, top + torch.log(w / particles))

    device = log_weights.device
    if scheme in ("systematic", "stratified"):
        w0, w1 = _uniforms(rows, 1 if scheme == "systematic" else number, seed, step, stream, device, first_row)
        ancestors = _search(q.cumsum(1), _stratum_positions(total, number, _uniform_below(total, w0, w1)))
    elif scheme in ("multinomial", "residual"):
        exponentials = _exponentials(rows, number + 1, seed, step, stream, device, first_row)
        if scheme == "residual":
            ancestors = _residual(q, total, number, exponentials)
        else:
            u = _sorted_uniforms(exponentials, torch.full_like(total, number), total.double())
            ancestors = _search(q.cumsum(1).double(), u)
    else:
        raise ValueError(f"scheme: expected one of {SCHEMES}, got {scheme!r}")
    if not sorted:
        ancestors = _keep_in_place(ancestors)

    after = log_mean_weight[:, None].to(log_weights.dtype).expand(rows, number)
    if number == particles:
        keep = bad if ess_threshold is None else bad | (ess >= ess_threshold * particles)
        ancestors = torch.where(keep[:, None], torch.arange(particles, device=device), ancestors)
        after = torch.where(keep[:, None], log_weights, after)
    else:
        ancestors = torch.where(bad[:, None], 0, ancestors)
    index_dtype = torch.int32 if particles < 2**31 else torch.int64
    return ancestors.to(index_dtype), after.contiguous(), log_mean_weight, ess
