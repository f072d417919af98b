"""The operations in plain PyTorch: what every kernel must compute.

Symbols, the same in every backend:

- ``N`` samples or particles, ``*event`` the shape of one, ``B`` observations, ``K`` particles each.
- ``x_t = alpha_t x_0 + sigma_t eps``; a step goes from level ``t`` to the lower level ``s``.
- ``coefficients = (alpha_t, sigma_t, alpha_s, sigma_s, tau)``, each a float or a tensor ``[N]``.
- ``z`` standard normals from counters, `randn`.

States are float16, bfloat16, float32 (arithmetic in float32) or float64 (in float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FAMILIES",
    "PREDICTIONS",
    "SCHEMES",
    "DynamicThreshold",
    "clip_x0",
    "density_constant",
    "dynamic_bound",
    "gather_particles_",
    "integer_weights",
    "log_prob_and_gradient",
    "output_from_x0",
    "philox",
    "propose_and_weigh",
    "randn",
    "resample",
    "reverse_step",
    "reverse_step_vjp",
    "scaled",
    "step_coefficients",
    "x0_from_output",
]

Scalar = float | Tensor
Coefficients = tuple[Scalar, Scalar, Scalar, Scalar, Scalar]
Counted = int | Tensor  # a seed or a step: a number, or an int64 tensor of one element, whose bits are the number's

PREDICTIONS = ("epsilon", "sample", "score", "v", "flow")
SCHEMES = ("systematic", "stratified", "multinomial", "residual")
FAMILIES = ("gaussian", "student_t", "laplace", "poisson")


# --- random numbers -----------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product; int64 wraps, and its bits are the right ones."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Counted, Counted]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four words from a counter of four and a key of two, each word an
    int64 in ``[0, 2^32)``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _words(
    particles: int, groups: int, seed: Counted, step: Counted, stream: int, first_particle: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Four words ``[particles, groups]`` for each particle and group of four elements.

    Counter: group, particle's low word, particle's next 16 bits with the stream above them, step; key: seed.
    """
    particle = torch.arange(first_particle, first_particle + particles, device=device)[:, None]
    group = torch.arange(groups, device=device)[None, :]
    zero = torch.zeros_like(particle + group)
    counter = (
        zero + group,
        zero + (particle & _MASK32),
        zero + ((particle >> 32) | (stream << 16)),
        zero + step,
    )
    return philox(counter, (seed & _MASK32, (seed >> 32) & _MASK32))


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 normals ``r cos, r sin`` from two words: ``r = sqrt(-2 log((w0 + 1) / 2^32))``, angle
    ``2 pi w1 / 2^32``. The quadrant is taken off in integers, so that both keep their relative accuracy."""
    r = torch.sqrt(-2.0 * torch.log((w0 + 1).double() * 2.0**-32))
    quadrant = (w1 + (1 << 29)) >> 30
    angle = (w1 - (quadrant << 30)).double() * (2.0 * math.pi * 2.0**-32)
    c, s = torch.cos(angle), torch.sin(angle)
    odd, quadrant = (quadrant & 1).bool(), quadrant & 3
    cos = torch.where(odd, s, c) * torch.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0).double()
    sin = torch.where(odd, c, s) * torch.where(quadrant >= 2, -1.0, 1.0).double()
    return r * cos, r * sin


def randn(
    shape: Sequence[int],
    *,
    seed: Counted,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals ``shape``; ``shape[0]`` counts particles. A value depends on the seed, the stream, the
    step, the global particle and the element within it, and on nothing else. See `fastguide.ops.randn`."""
    device = torch.device(device)
    particles, elements = shape[0], math.prod(shape[1:])
    w0, w1, w2, w3 = _words(particles, (elements + 3) // 4, seed, step, stream, first_particle, device)
    z = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1).flatten(1)[:, :elements]
    if dtype in (torch.float16, torch.bfloat16):
        z = z.float()  # what a kernel rounds is its float32 value
    return z.to(dtype).reshape(tuple(shape)).contiguous()


# --- the reverse step ---------------------------------------------------------------------------------------


class DynamicThreshold(NamedTuple):
    """Dynamic thresholding (Saharia et al. 2022): clip to the ``ratio`` quantile of ``|x0|`` of each sample,
    held in ``[1, max_value]``, and divide by it."""

    ratio: float = 0.995
    max_value: float = 1.0


Clip = float | tuple[float, float] | DynamicThreshold | None


def _sqrt(value: Scalar) -> Scalar:
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def _x0_coefficients(prediction: str, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
    """``(p, q)`` with ``x0_hat = p x + q output``."""
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v":
        total = alpha * alpha + sigma * sigma
        return alpha / total, -sigma / total
    if prediction == "flow":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if not isinstance(alpha, Tensor) and alpha == 0.0:
        raise ValueError(f"prediction: {prediction!r} does not determine x_0 where alpha_t = 0")
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "score":
        return 1.0 / alpha, sigma * sigma / alpha
    raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def _columns(values: Sequence[Scalar], x: Tensor, dtype: torch.dtype) -> list[Scalar]:
    """Coefficients as floats, or as ``[N, 1, ...]`` in ``dtype`` to multiply a state ``x`` ``[N, *event]``."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return [v.to(dtype).reshape(shape) if isinstance(v, Tensor) else v for v in values]


def scaled(x: Tensor, factor: Scalar) -> Tensor:
    """``x * factor``, the same bits for a number and for a float64 tensor ``[]`` of it."""
    if isinstance(factor, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return (x.float() * factor).to(x.dtype)  # torch would round the factor to the dtype of x
    return x * factor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def x0_from_output(x: Tensor, output: Tensor, alpha: Scalar, sigma: Scalar, prediction: str) -> Tensor:
    """``x0_hat`` from a network's output of any prediction type; all ``[N, *event]``."""
    p, q = _columns(_x0_coefficients(prediction, alpha, sigma), x, x.dtype)
    return output if prediction == "sample" else p * x + q * output


def output_from_x0(x: Tensor, x0: Tensor, alpha: Scalar, sigma: Scalar, prediction: str) -> Tensor:
    """The inverse of `x0_from_output`: what a network of this type would have said; needs ``sigma > 0``."""
    alpha, sigma = _columns((alpha, sigma), x, x.dtype)
    if prediction == "sample":
        return x0
    eps = (x - alpha * x0) / sigma
    if prediction == "epsilon":
        return eps
    if prediction == "score":
        return -eps / sigma
    if prediction == "v":
        return alpha * eps - sigma * x0
    if prediction == "flow":
        return eps - x0
    raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def step_coefficients(coefficients: Coefficients) -> tuple[Scalar, Scalar, Scalar]:
    """``(a, b, tau)`` of ``x_s = a x_t + b x0_hat + tau z``: the step
    ``alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + tau z`` with ``eps_hat = (x_t - alpha_t x0_hat) / sigma_t``."""
    alpha_t, sigma_t, alpha_s, sigma_s, tau = (c.double() if isinstance(c, Tensor) else c for c in coefficients)
    a = _sqrt(sigma_s * sigma_s - tau * tau) / sigma_t
    return a, alpha_s - alpha_t * a, tau


def clip_x0(x0: Tensor, clip: Clip) -> Tensor:
    """``x0`` ``[N, *event]`` clipped; ``clip`` as in `reverse_step`."""
    if clip is None:
        return x0
    if isinstance(clip, DynamicThreshold):
        if x0.numel() == 0:
            return x0
        bound = dynamic_bound(x0, clip).reshape(-1, *(1,) * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -bound), bound) / bound
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    return x0.clamp(low, high)


def dynamic_bound(x0: Tensor, clip: DynamicThreshold) -> Tensor:
    """The threshold ``[N]`` of each ``x0`` ``[N, *event]``, none of which is empty."""
    ordered = x0.reshape(x0.shape[0], -1).abs().sort(dim=1).values
    below, above, between = _ranks(clip.ratio, ordered.shape[1])
    return torch.lerp(ordered[:, below], ordered[:, above], between).clamp(1.0, clip.max_value)


def _ranks(ratio: float, number: int) -> tuple[int, int, float]:
    """The two order statistics that the ``ratio`` quantile of ``number`` values lies between, and how far."""
    rank = ratio * (number - 1)
    return int(rank), min(int(rank) + 1, number - 1), rank - int(rank)


def _has_noise(tau: Scalar) -> bool:
    return isinstance(tau, Tensor) or tau > 0.0


def _multipliers(x: Tensor, coefficients: Coefficients, prediction: str, clip_noise: bool = True) -> list[Scalar]:
    """``p, q, a, b, tau, c`` of ``x0_hat = p x + q output`` and ``x_s = a x + b clip(x0_hat) + c x0_hat + tau z``."""
    alpha_t, sigma_t, alpha_s = (c.double() if isinstance(c, Tensor) else c for c in coefficients[:3])
    a, b, tau = step_coefficients(coefficients)
    b, c = (b, 0.0) if clip_noise else (alpha_s, -(alpha_t * a))
    values = *_x0_coefficients(prediction, alpha_t, sigma_t), a, b, tau, c
    return _columns(values, x, _compute_dtype(x))


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    clip_noise: bool = True,
    displacement: Tensor | None = None,
    seed: Counted = 0,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x_s = a x_t + b clip(x0_hat) + c x0_hat + displacement + tau z``. See `fastguide.ops.reverse_step`."""
    dtype = _compute_dtype(x)
    p, q, a, b, tau, c = _multipliers(x, coefficients, prediction, clip_noise)
    state, output = x.to(dtype), model_output.to(dtype)
    unclipped = output if prediction == "sample" else p * state + q * output
    x0 = clip_x0(unclipped, clip)
    x_s = a * state + b * x0
    if not clip_noise:
        x_s = x_s + c * unclipped
    if displacement is not None:
        x_s = x_s + displacement.to(dtype)
    if _has_noise(tau):
        x_s = x_s + tau * randn(
            x.shape,
            seed=seed,
            step=step,
            stream=stream,
            first_particle=first_particle,
            dtype=dtype,
            device=x.device,
        )
    x_s = x_s.to(x.dtype).contiguous()
    # x0 may be model_output itself: what is returned shares no memory with what was given
    return (x_s, x0.to(x.dtype).clone(memory_format=torch.contiguous_format)) if return_x0 else x_s


def reverse_step_vjp(
    grad_x_s: Tensor,
    grad_x0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    prediction: str,
    clip: Clip,
    clip_noise: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients in ``x`` and ``model_output`` from those in the results of `reverse_step`. The noise is additive and
    takes no part; the gradient in ``displacement`` is ``grad_x_s`` itself."""
    dtype = _compute_dtype(x)
    p, q, a, b, _, c = _multipliers(x, coefficients, prediction, clip_noise)
    grad_x_s, state, output = grad_x_s.to(dtype), x.to(dtype), model_output.to(dtype)
    grad = b * grad_x_s if grad_x0 is None else b * grad_x_s + grad_x0.to(dtype)
    grad = _clip_x0_vjp(grad, p * state + q * output, clip)
    if not clip_noise:
        grad = grad + c * grad_x_s
    grad_x, grad_output = a * grad_x_s + p * grad, q * grad
    return grad_x.to(x.dtype).contiguous(), grad_output.to(model_output.dtype).contiguous()


def _clip_x0_vjp(grad: Tensor, x0: Tensor, clip: Clip) -> Tensor:
    """The gradient in ``x0`` from that in ``clip_x0(x0, clip)``."""
    if clip is None or x0.numel() == 0:
        return grad
    if isinstance(clip, DynamicThreshold):  # y = x0 / bound inside; outside +-1, whatever x0 and the bound
        flat, grad = (v.reshape(v.shape[0], -1) for v in (x0, grad))
        ordered, order = flat.abs().sort(dim=1)
        below, above, between = _ranks(clip.ratio, flat.shape[1])
        quantile = torch.lerp(ordered[:, below], ordered[:, above], between)[:, None]
        bound = quantile.clamp(1.0, clip.max_value)
        grad = torch.where(flat.abs() < bound, grad / bound, 0.0)
        grad_bound = -(grad * flat).sum(1, keepdim=True) / bound
        grad_quantile = torch.where(bound == quantile, grad_bound, 0.0)
        for place, share in ((below, 1.0 - between), (above, between)):
            one = order[:, place : place + 1]
            grad = grad.scatter_add(1, one, share * grad_quantile * flat.gather(1, one).sign())
        return grad.reshape(x0.shape)
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    return torch.where((x0 >= low) & (x0 <= high), grad, 0.0)


def propose_and_weigh(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    coefficients: Coefficients,
    *,
    seed: Counted,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
) -> tuple[Tensor, Tensor]:
    """``x_s = m + displacement + tau z`` with ``m = a x_t + b x0_hat``, and ``log_weights`` with the log of
    ``N(x_s; m, tau^2) / N(x_s; m + displacement, tau^2)`` added: with ``delta = displacement / tau`` that is
    ``-(sum(delta z) + sum(delta^2) / 2)``. Where ``tau = 0`` the step is the base kernel's and the ratio is 1.
    See `fastguide.ops.propose_and_weigh`."""
    dtype = _compute_dtype(x)
    a, b, tau = _columns(step_coefficients(coefficients), x, dtype)
    mean = a * x.to(dtype) + b * x0_hat.to(dtype)
    if not _has_noise(tau):
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
        delta = torch.where(tau > 0, displacement.to(dtype) / tau, 0.0)
    else:
        delta = displacement.to(dtype) / tau
    terms = delta.double() * (z.double() + 0.5 * delta.double())
    ratio = -terms.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)
    log_weights = (log_weights.double() + ratio.reshape(log_weights.shape)).to(log_weights.dtype)
    return (mean + tau * (delta + z)).to(x.dtype).contiguous(), log_weights.contiguous()


# --- resampling ---------------------------------------------------------------------------------------------

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_EXP2 = [  # 2^f on |f| <= 1/2: the minimax polynomial of degree 11, to 5e-18 of it
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
_LOG = [  # ln(3/2 + f) on |f| <= 1/2: degree 10, to 7e-10
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
    """The highest power first; even and odd powers apart, each by Horner's rule, one operation at a time."""
    even, odd = (_horner(coefficients[last::-2][::-1], x * x) for last in (-1, -2))
    return odd * x + even


def _power_of_two(n: Tensor) -> Tensor:
    return ((n + 1023) << 52).view(torch.float64)


def integer_weights(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weights ``[B, K]`` as integers, ``q = round(exp(log_w - max) 2^S)``, with ``S = 62 - ceil(log2 K)``, so that
    sums of them are exact and do not depend on their order.

    Returns ``q``, ``v = round(exp(2 (log_w - max)) 2^S)`` for the effective sample size (both int64 ``[B, K]``),
    the row maxima ``[B]`` in float64, and ``S``. Every step is one IEEE operation on float64, none fused, so
    that all backends get the same integers. A row whose maximum is not finite gets ones.
    """
    scale = 62 - max(log_weights.shape[1] - 1, 0).bit_length()
    lw = log_weights.double().contiguous()
    top = lw.amax(dim=1)
    good = torch.isfinite(top)[:, None]
    d = torch.where(good, lw - torch.where(good, top[:, None], 0.0), 0.0)
    return *_exp_times(d, scale), top, scale


def _exp_times(d: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """``round(exp(d) 2^scale)`` and ``round(exp(2 d) 2^scale)`` of ``d <= 0`` in float64, as int64."""
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
    q0, q1 = q & _MASK32, q >> 32
    cross = w1 * q0  # up to 2^64: its bits are right, its sign is not
    middle = (((w0 * q0) >> 32) & _MASK32) + (cross & _MASK32) + ((w0 * q1) & _MASK32)
    return w1 * q1 + ((cross >> 32) & _MASK32) + ((w0 * q1) >> 32) + (middle >> 32)


def _uniforms(
    rows: int, number: int, seed: Counted, step: Counted, stream: int, device: torch.device, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Words of ``[rows, number]`` 64-bit uniforms; row ``b`` is the counter's particle ``first_row + b``."""
    words = _words(rows, (number + 1) // 2, seed, step, stream, first_row, device)
    w0 = torch.stack([words[0], words[2]], dim=-1).flatten(1)[:, :number]
    w1 = torch.stack([words[1], words[3]], dim=-1).flatten(1)[:, :number]
    return w0, w1


def _exponentials(
    rows: int, number: int, seed: Counted, step: Counted, stream: int, device: torch.device, first_row: int = 0
) -> Tensor:
    """Standard exponentials ``[rows, number]`` as integers, ``round(-ln((word + 1) / 2^32) 2^26)``, from the words in
    the order of `randn`'s elements. Their distribution function is within 1e-8 of the exponential one, and their sums
    are exact."""
    words = _words(rows, (number + 3) // 4, seed, step, stream, first_row, device)
    u = (torch.stack(words, dim=-1).flatten(1)[:, :number] + 1).double()  # 2^exponent times [1, 2)
    exponent = (u.view(torch.int64) >> 52) - 1023
    ln = _polynomial(_LOG, u * _power_of_two(-exponent) - 1.5)
    return torch.round(((32 - exponent).double() * _LN_2 - ln) * 2.0**26).long()


def _sorted_uniforms(exponentials: Tensor, number: Tensor, total: Tensor) -> Tensor:
    """``[B, n]``: in each row ``number`` ``[B, 1]`` sorted uniforms below ``total`` ``[B, 1]`` (float64), then
    infinity, from exponentials ``[B, n + 1]``: order statistics are sums of exponential spacings over the sum of one
    more (Chopin & Papaspiliopoulos 2020, chapter 9)."""
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
    # The quotient from floating point is off by one at most; the rest, exact modulo 2^64, mends it.
    quotient = torch.floor(number * (q.double() / total.double())).long()
    rest = number * q - quotient * total
    shift = (rest >= total).long() - (rest < 0).long()
    return quotient + shift, rest - shift * total


def _residual(q: Tensor, total: Tensor, number: int, exponentials: Tensor) -> Tensor:
    """``floor(N w)`` copies of each, the rest multinomial from the remainders; sorted."""
    copies = _shares(q, total, number)[0].cumsum(1)
    whole, rest = _shares(q.cumsum(1), total, number)
    # What is left of N w after the copies, summed: whole - copies and a fraction.
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
    rank = (~alive).cumsum(1) - 1  # of a dead slot among the dead
    spare = _search((counts - 1).clamp(min=0).cumsum(1), rank.clamp(min=0))
    return torch.where(alive, torch.arange(particles, device=ancestors.device), spare)


def resample(
    log_weights: Tensor,
    *,
    scheme: str = "systematic",
    num: int | None = None,
    ess_threshold: float | None = None,
    seed: Counted = 0,
    step: Counted = 0,
    stream: int = 0,
    first_row: int = 0,
    sorted: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(ancestors, log_weights, log_mean_weight, ess)`` of ``[B, K]`` or ``[K]``. A row without a usable weight keeps
    its particles (its ancestors are zeros where ``num`` is not ``K``), and its mean weight and ESS are NaN. See
    `fastguide.ops.resample`."""
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


def gather_particles_(ancestors: Tensor, *states: Tensor) -> None:
    """``state[b, k] = state[b, ancestors[b, k]]`` in place for each ``state`` ``[B, K, *event]`` with ancestors
    ``[B, K]``, or ``[K, *event]`` with ``[K]``. See `fastguide.ops.gather_particles_`."""
    ancestors = ancestors.to(torch.int64, copy=True)  # a state may share their memory
    for state in states:
        if state.is_floating_point() and state.element_size() == 1:
            state = state.view(torch.uint8)  # torch.gather knows no float8
        dim = ancestors.ndim - 1
        index = ancestors.reshape(ancestors.shape + (1,) * (state.ndim - ancestors.ndim))
        state.copy_(torch.gather(state, dim, index.expand(state.shape)))


# --- log-densities of measurements --------------------------------------------------------------------------

# Of c counts the Poisson density goes on as a parabola below the rate POISSON_SHARE * max(c, POISSON_LEAST).
POISSON_SHARE, POISSON_LEAST = 0.5, 0.2


def density_constant(family: str, scale: float, df: float | None, added: bool) -> float:
    """The part of the log-density of one measurement that depends on neither ``z``, ``y`` nor ``added`` variances (the
    scale then has its part with them)."""
    log_scale = 0.0 if added else math.log(scale)
    if family == "gaussian":
        return -0.5 * math.log(2 * math.pi) - log_scale
    if family == "laplace":
        return -math.log(2.0) - log_scale
    if family == "student_t":
        assert df is not None
        if df < 1e6:
            constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        else:  # the two cancel; to O(1 / df^3)
            constant = -0.5 * math.log(2 * math.pi) - 0.25 / df
        return constant - log_scale
    return 0.0


def log_prob_and_gradient(
    z: Tensor,
    y: Tensor,
    *,
    family: str,
    scale: float,
    df: float | None = None,
    background: float = 0.0,
    added: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``log p(y | z)`` ``[n]`` in float64 and its gradient in ``z`` ``[n, *measurement]``. With the residual
    ``r = y - z`` and the variance ``v = scale^2 + added`` of each measurement::

        gaussian    -r^2 / 2v - log(2 pi v) / 2                                   r / v
        student_t   -(df + 1)/2 log(1 + r^2 / (df v)) - log(v) / 2 + constant     (df + 1) r / (df v + r^2)
        laplace     -|r| / sqrt(v) - log(2 sqrt(v))                               sign(r) / sqrt(v)
        poisson     c log(rate) - rate - log c!                                   (c / rate - 1) / scale

    with ``c = y / scale`` and ``rate = (z + background) / scale``. Below ``r0 = max(c, 0.2) / 2`` the Poisson term is
    the parabola of the same value and slope at ``r0``, of curvature ``1 / max(c, 1)``: the logarithm has no bound at a
    rate of 0 and no value below, and a Gaussian of the counts' variance has that curvature. At most 9 % of the
    likelihood's mass is at rates that low (of one count; 4 % of five, 1 % of ten).
    See `fastguide.ops.log_prob_and_gradient`.
    """
    # Poisson in float64: counts of 1e4 have terms of 1e5, which cancel to a few units.
    wide = family == "poisson" or torch.float64 in (z.dtype, y.dtype)
    dtype = torch.float64 if wide else torch.float32
    location, y = z.to(dtype), (y if rows is None else y.index_select(0, rows)).to(dtype)
    variance: Scalar = scale**2 if added is None else scale**2 + added.to(dtype)
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
        slope = 1.0 / _sqrt(variance)
        sign = torch.where(residual > 0, 1.0, torch.where(residual < 0, -1.0, residual))  # of NaN it is NaN
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
        terms = torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1.0) - below * (slope + 0.5 * bend)
    else:
        raise ValueError(f"family: expected one of {FAMILIES}, got {family!r}")
    log_prob = _sum(terms) + math.prod(z.shape[1:]) * density_constant(family, scale, df, added is not None)
    if isinstance(variance, Tensor):
        log_prob = log_prob - 0.5 * _sum(torch.log(variance.double()))
    return log_prob, gradient.to(z.dtype).contiguous()


def _sum(values: Tensor) -> Tensor:
    """Per-sample sum in float64: log-densities of large events cancel to a few units between levels."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:])).sum(1, dtype=torch.float64)
