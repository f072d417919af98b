"""The reverse step, its clip and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import Clip, Coefficients, DynamicThreshold, IntOrTensor, Scalar
from ..predict_x0.reference import columns, compute_dtype, guided, x0_coefficients
from ..randn.reference import randn

__all__ = [
    "clip_x0",
    "displaced",
    "dynamic_bound",
    "has_noise",
    "multipliers",
    "neighbours",
    "reverse_step",
    "reverse_step_vjp",
    "scaled",
    "square_root",
    "step_coefficients",
]


def square_root(value: Scalar) -> Scalar:
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def scaled(x: Tensor, factor: Scalar) -> Tensor:
    """``x * factor``. A number and a float64 tensor ``[]`` with the same value give the same bits."""
    if isinstance(factor, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return (x.float() * factor).to(x.dtype)  # torch would round the factor to the dtype of x
    return x * factor


def step_coefficients(coefficients: Coefficients) -> tuple[Scalar, Scalar, Scalar]:
    """The factors ``a``, ``b`` and ``tau`` of a step.

        x_s = a x_t + b x0_hat + tau z
            = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + tau z      eps_hat = (x_t - alpha_t x0_hat) / sigma_t

    Args:
        coefficients: ``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``, each a float or a tensor ``[N]``.

    Returns:
        a: A float or a float64 tensor ``[N]``.
        b: A float or a float64 tensor ``[N]``.
        tau: A float or a float64 tensor ``[N]``.
    """
    alpha_t, sigma_t, alpha_s, sigma_s, tau = (c.double() if isinstance(c, Tensor) else c for c in coefficients)
    a = square_root(sigma_s * sigma_s - tau * tau) / sigma_t
    return a, alpha_s - alpha_t * a, tau


def clip_x0(x0: Tensor, clip: Clip) -> Tensor:
    """Clips the predicted clean sample.

    Args:
        x0: ``[N, *event]``.
        clip: As in `fastguide.ops.reverse_step`.

    Returns:
        The clipped ``x0``; ``x0`` itself where ``clip`` is None.
    """
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
    """The bound of dynamic thresholding for each sample. See `DynamicThreshold`.

    Args:
        x0: ``[N, *event]``, with at least one element in ``event``.
        clip: The quantile and its largest value.

    Returns:
        The bounds ``[N]``.
    """
    values, _, between = neighbours(x0.reshape(x0.shape[0], -1).abs(), clip.ratio)
    return torch.lerp(values[:, 0], values[:, 1], between).clamp(1.0, clip.max_value)


def neighbours(values: Tensor, ratio: float) -> tuple[Tensor, Tensor, float]:
    """The two order statistics around the ``ratio`` quantile of each row: values and places ``[N, 2]``, and the
    fraction between them.

    By selection, since a sort takes many passes. ``kthvalue`` on a GPU refuses ``torch.use_deterministic_algorithms``.
    """
    number = values.shape[1]
    rank = ratio * (number - 1)
    below, above = int(rank), min(int(rank) + 1, number - 1)
    if 2 * below >= number:  # the shorter end
        found, low, high = values.topk(number - below, dim=1), number - 1 - below, number - 1 - above
    else:
        found, low, high = values.topk(above + 1, dim=1, largest=False), below, above
    ordered, places = (torch.stack([end[:, low], end[:, high]], dim=1) for end in found)
    return ordered, places, rank - below


def has_noise(tau: Scalar) -> bool:
    return isinstance(tau, Tensor) or tau > 0.0


def multipliers(x: Tensor, coefficients: Coefficients, prediction: str, clip_noise: bool = True) -> list[Scalar]:
    """``p, q, a, b, tau, c`` of ``x_s = a x + b clip(unclipped) + c unclipped + tau z`` with
    ``unclipped = p x + q output``.
    """
    alpha_t, sigma_t, alpha_s = (c.double() if isinstance(c, Tensor) else c for c in coefficients[:3])
    a, b, tau = step_coefficients(coefficients)
    b, c = (b, 0.0) if clip_noise else (alpha_s, -(alpha_t * a))
    values = *x0_coefficients(prediction, alpha_t, sigma_t), a, b, tau, c
    return columns(values, x, compute_dtype(x))


def displaced(displacement: Tensor, scale: Scalar) -> Tensor:
    """A displacement ``[N, *event]`` times its scale (a number or ``[N]``), in the dtype of the arithmetic."""
    dtype = compute_dtype(displacement)
    (scale,) = columns((scale,), displacement, dtype)
    return scale * displacement.to(dtype)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    *,
    prediction: str = "epsilon",
    unconditional: Tensor | None = None,
    guidance_scale: Scalar | None = None,
    clip: Clip = None,
    clip_noise: bool = True,
    displacement: Tensor | None = None,
    displacement_scale: Scalar = 1.0,
    seed: IntOrTensor = 0,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Steps from noise level ``t`` to the lower level ``s``. See `fastguide.ops.reverse_step`.

        p, q      = x0_coefficients(prediction, alpha_t, sigma_t)
        guided    = unconditional + guidance_scale (model_output - unconditional)
        unclipped = p x + q guided
        x0_hat    = clip(unclipped)
        x_s       = a x + b x0_hat + displacement_scale displacement + tau z

    Without ``unconditional``, ``guided`` is ``model_output``. ``a``, ``b`` and ``tau`` are those of
    `step_coefficients`. With ``clip_noise=False`` the noise of the step comes from the unclipped prediction: ``b
    x0_hat`` becomes ``alpha_s x0_hat - alpha_t a unclipped``.
    """
    dtype = compute_dtype(x)
    p, q, a, b, tau, c = multipliers(x, coefficients, prediction, clip_noise)
    state, output = x.to(dtype), guided(model_output.to(dtype), unconditional, guidance_scale)
    unclipped = output if prediction == "sample" else p * state + q * output
    x0 = clip_x0(unclipped, clip)
    x_s = a * state + b * x0
    if not clip_noise:
        x_s = x_s + c * unclipped
    if displacement is not None:
        x_s = x_s + displaced(displacement.to(dtype), displacement_scale)
    if has_noise(tau):
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
    # x0 may be model_output itself, and results share no memory with arguments
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
    unconditional: Tensor | None = None,
    guidance_scale: Scalar = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `reverse_step` in ``x``, ``model_output`` and ``unconditional``, from those in its results.

    The noise is additive and has no part in them. The gradient in ``displacement`` is not included: it is ``grad_x_s``
    times ``displacement_scale``.

    Args:
        grad_x_s: The gradient in ``x_s``, ``[N, *event]``.
        grad_x0: The gradient in the clipped ``x0_hat``, or None.
        x: As in `fastguide.ops.reverse_step`, like the rest.
        model_output: The network's output, ``[N, *event]``.
        coefficients: ``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``.
        prediction: What the network predicts.
        clip: The range of ``x0_hat``.
        clip_noise: Whether ``eps_hat`` is computed from the clipped ``x0_hat``.
        unconditional: The output without the condition, or None.
        guidance_scale: A float or a tensor ``[N]``; 1 without ``unconditional``.

    Returns:
        The gradients in ``x``, ``model_output`` and ``unconditional``, ``[N, *event]``, in their dtypes. The last is
            None without ``unconditional``.
    """
    dtype = compute_dtype(x)
    p, q, a, b, _, c = multipliers(x, coefficients, prediction, clip_noise)
    grad_x_s, state = grad_x_s.to(dtype), x.to(dtype)
    output = guided(model_output.to(dtype), unconditional, guidance_scale)
    grad = b * grad_x_s if grad_x0 is None else b * grad_x_s + grad_x0.to(dtype)
    grad = _clip_x0_vjp(grad, p * state + q * output, clip)
    if not clip_noise:
        grad = grad + c * grad_x_s
    grad_x, grad_output = a * grad_x_s + p * grad, q * grad
    grad_unconditional = None
    if unconditional is not None:
        (scale,) = columns((guidance_scale,), x, dtype)
        grad_unconditional = ((1.0 - scale) * grad_output).to(unconditional.dtype).contiguous()
        grad_output = scale * grad_output
    return grad_x.to(x.dtype).contiguous(), grad_output.to(model_output.dtype).contiguous(), grad_unconditional


def _clip_x0_vjp(grad: Tensor, x0: Tensor, clip: Clip) -> Tensor:
    """The gradient in ``x0`` from the gradient in ``clip_x0(x0, clip)``."""
    if clip is None or x0.numel() == 0:
        return grad
    if isinstance(clip, DynamicThreshold):  # the result is x0 / bound inside, and +-1 outside
        flat, grad = (v.reshape(v.shape[0], -1) for v in (x0, grad))
        values, places, between = neighbours(flat.abs(), clip.ratio)
        quantile = torch.lerp(values[:, :1], values[:, 1:], between)
        bound = quantile.clamp(1.0, clip.max_value)
        grad = torch.where(flat.abs() < bound, grad / bound, 0.0)
        grad_bound = -(grad * flat).sum(1, keepdim=True) / bound
        grad_quantile = torch.where(bound == quantile, grad_bound, 0.0)
        for one, share in zip(places.split(1, dim=1), (1.0 - between, between), strict=True):
            grad = grad.scatter_add(1, one, share * grad_quantile * flat.gather(1, one).sign())
        return grad.reshape(x0.shape)
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    return torch.where((x0 >= low) & (x0 <= high), grad, 0.0)
