"""The predicted clean sample from a network's output, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import PREDICTIONS, Scalar

__all__ = [
    "columns",
    "compute_dtype",
    "guided",
    "output_from_x0",
    "predict_x0",
    "predict_x0_vjp",
    "x0_coefficients",
    "x0_from_output",
]


def x0_coefficients(prediction: str, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
    """The factors ``p`` and ``q`` of a prediction type.

        x0_hat = p x + q output

    Args:
        prediction: A name in `PREDICTIONS`.
        alpha: A float or a tensor ``[N]``.
        sigma: A float or a tensor ``[N]``.

    Returns:
        p: A float or a tensor ``[N]``.
        q: A float or a tensor ``[N]``.

    Raises:
        ValueError: ``prediction`` is unknown, or it is ``"epsilon"`` or ``"score"`` and the number ``alpha`` is 0.
    """
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


def x0_from_output(x: Tensor, output: Tensor, alpha: Scalar, sigma: Scalar, prediction: str) -> Tensor:
    """``x0_hat`` from a network's output.

    Args:
        x: The state, ``[N, *event]``.
        output: The network's output, ``[N, *event]``.
        alpha: A float or a tensor ``[N]``.
        sigma: A float or a tensor ``[N]``.
        prediction: What the network predicts, a name in `PREDICTIONS`.

    Returns:
        ``x0_hat``, ``[N, *event]``. It is ``output`` itself for ``"sample"``.
    """
    p, q = columns(x0_coefficients(prediction, alpha, sigma), x, x.dtype)
    return output if prediction == "sample" else p * x + q * output


def predict_x0(
    x: Tensor,
    model_output: Tensor,
    levels: tuple[Scalar, Scalar],
    *,
    prediction: str,
    unconditional: Tensor | None = None,
    guidance_scale: Scalar | None = None,
) -> Tensor:
    """Predicts the clean sample with classifier-free guidance. See `fastguide.ops.predict_x0`.

        guided = unconditional + guidance_scale (model_output - unconditional)
        p, q   = x0_coefficients(prediction, alpha, sigma)
        x0_hat = p x + q guided

    Without ``unconditional``, ``guided`` is ``model_output``.
    """
    dtype = compute_dtype(x)
    p, q = _multipliers(x, levels, prediction)
    output = guided(model_output.to(dtype), unconditional, guidance_scale)
    if prediction == "sample":  # the result shares no memory with the arguments
        return output.to(x.dtype).clone(memory_format=torch.contiguous_format)
    return (p * x.to(dtype) + q * output).to(x.dtype).contiguous()


def guided(output: Tensor, unconditional: Tensor | None, guidance_scale: Scalar | None) -> Tensor:
    """Classifier-free guidance of a network's output, in its dtype.

    Args:
        output: With the condition, ``[N, *event]``.
        unconditional: Without it, ``[N, *event]``, or None.
        guidance_scale: A float or a tensor ``[N]``; None without ``unconditional``.

    Returns:
        ``unconditional + guidance_scale (output - unconditional)``, or ``output`` without ``unconditional``.
    """
    if unconditional is None or guidance_scale is None:
        return output
    (scale,) = columns((guidance_scale,), output, output.dtype)
    base = unconditional.to(output.dtype)
    return base + scale * (output - base)


def predict_x0_vjp(
    grad: Tensor, levels: tuple[Scalar, Scalar], prediction: str, guidance_scale: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `predict_x0` from the gradient in its result.

    Args:
        grad: The gradient in ``x0_hat``, ``[N, *event]``.
        levels: ``(alpha, sigma)``, each a float or a tensor ``[N]``.
        prediction: What the network predicts.
        guidance_scale: A float or a tensor ``[N]``; 1 where there is no guidance.

    Returns:
        The gradients in ``x``, ``model_output`` and ``unconditional``, ``[N, *event]``, in float32, or in float64 where
            ``grad`` is float64.
    """
    dtype = compute_dtype(grad)
    p, q = x0_coefficients(prediction, *_doubles(levels))
    factors = columns((p, q * guidance_scale, q * (1.0 - guidance_scale)), grad, dtype)
    grad = grad.to(dtype)
    return factors[0] * grad, factors[1] * grad, factors[2] * grad


def _doubles(levels: Sequence[Scalar]) -> list[Scalar]:
    return [level.double() if isinstance(level, Tensor) else level for level in levels]


def _multipliers(x: Tensor, levels: Sequence[Scalar], prediction: str) -> list[Scalar]:
    return columns(x0_coefficients(prediction, *_doubles(levels)), x, compute_dtype(x))


def output_from_x0(x: Tensor, x0: Tensor, alpha: Scalar, sigma: Scalar, prediction: str) -> Tensor:
    """What a network would have predicted: the inverse of `x0_from_output`.

    Args:
        x: The state, ``[N, *event]``.
        x0: The clean sample, ``[N, *event]``.
        alpha: A float or a tensor ``[N]``.
        sigma: A float or a tensor ``[N]``, above 0 unless the prediction is ``"sample"``.
        prediction: What the network predicts, a name in `PREDICTIONS`.

    Returns:
        The network's output, ``[N, *event]``. It is ``x0`` itself for ``"sample"``.
    """
    alpha, sigma = columns((alpha, sigma), x, x.dtype)
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


def columns(values: Sequence[Scalar], x: Tensor, dtype: torch.dtype) -> list[Scalar]:
    """Coefficients that multiply a state ``x`` ``[N, *event]``: floats, or tensors ``[N, 1, ...]`` in ``dtype``."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return [v.to(dtype).reshape(shape) if isinstance(v, Tensor) else v for v in values]


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
