"""Log-densities of measurements, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...arguments import flag, got, number, one_of, transformed
from .. import _arguments, _native
from .._operation import Operation
from . import reference
from .reference import FAMILIES, density_constant


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
    return_gradient: bool = True,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Computes ``log p(y | z)`` and its gradient in ``z``, in one pass over both.

    Formulas are in `fastguide.reference.log_prob_and_gradient`. Every normalising constant is kept. Results are
    differentiable in ``z``, ``y`` and ``extra_variance``, any number of times.

    Args:
        z: The predicted measurements, ``[n, *measurement]``: float32, float16, bfloat16 or float64.
        y: The measurements, ``[rows, *measurement]``, in any of these dtypes: 1 or ``n`` rows, or any number with
            ``rows``.
        family: ``"gaussian"``, ``"student_t"``, ``"laplace"`` or ``"poisson"``. For ``"poisson"`` ``y >= 0``, and
            ``y / scale`` has the mean ``(z + background) / scale``.
        scale: A number > 0 in units of ``y``, with a square that float64 can hold: the standard deviation for
            ``"gaussian"``, the scale parameter for ``"student_t"`` and ``"laplace"``, the value of one count for
            ``"poisson"``.
        df: Degrees of freedom > 0, for ``"student_t"`` alone.
        background: A number >= 0 in units of ``y``, for ``"poisson"`` alone.
        extra_variance: ``[n, *measurement]`` or ``[1, *measurement]``, values >= 0, added to ``scale^2``. Not for
            ``"poisson"``.
        rows: An int64 tensor ``[n]``: sample ``i`` is measured by ``y[rows[i]]``. None takes ``y[i]``, or the only row
            of ``y``.
        log_factorials: `fastguide.reference.log_factorials` of this ``y`` and ``scale``, for ``"poisson"`` alone. None
            computes it, which takes half of a call with one sample per row of ``y`` and a tenth with 16. Pass it if
            many calls have the same ``y``. Negative counts then raise no error.
        return_gradient: Whether to return the gradient.
        out: A tuple of tensors for both results, or without ``return_gradient`` a tensor for the log-densities, as in
            `randn`.
        backend: As in `randn`.

    Returns:
        log_prob: ``[n]`` in float64.
        gradient: In the shape, dtype and layout (contiguous or channels_last) of ``z``; None without
            ``return_gradient``.

    Raises:
        TypeError: A tensor has an unsupported dtype, or an argument is not a tensor, number or bool where one is
            expected.
        ValueError: Shapes or devices do not match, a value is out of range, an argument is given for a family that does
            not take it, or ``out`` is given for a result that has a gradient. On the CPU negative counts, negative
            variances and rows out of range raise too; values on a GPU are not checked.
        RuntimeError: The named backend cannot serve the call.
    """
    z, y, extra_variance, rows = _measurements(z, y, extra_variance, rows)
    scale, df, background = _density(family, scale, df, background, extra_variance)
    log_factorials = _factorials(log_factorials, y, family)
    _expect_positive(y if family == "poisson" and log_factorials is None else None, extra_variance)
    return_gradient = flag("return_gradient", return_gradient)
    both = return_gradient or (z.requires_grad and torch.is_grad_enabled())  # the derivative needs the gradient
    expected = ((z.shape[:1], torch.float64), (z.shape, z.dtype))[: 1 + return_gradient]
    into = _arguments.out(out, expected, z.device, (z, y, extra_variance, rows, log_factorials))
    log_prob, gradient = _log_prob_and_gradient(
        backend, z, y, family, scale, df, background, extra_variance, rows, log_factorials, both, out=into
    )
    if isinstance(out, Tensor):
        return out, None
    if out is not None:
        return out
    return log_prob, gradient.contiguous(memory_format=_arguments.layout(z)) if return_gradient else None


def _measurements(z: Any, y: Any, extra: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four tensors, checked, as kernels read them."""
    z, y = _arguments.state("z", z), _arguments.state("y", y)
    samples, measurement = z.shape[0], z.shape[1:]
    extra = None if extra is None else _arguments.state("extra_variance", extra)
    for name, value in (("y", y), ("extra_variance", extra)):
        if value is None:
            continue
        any_rows = name == "y" and rows is not None
        if value.shape[1:] != measurement or not (any_rows or value.shape[0] in (1, samples)):
            expected = "any number of rows" if any_rows else f"{samples} rows or 1"
            raise ValueError(
                f"{name}: expected {expected}, each of shape {list(measurement)}, got {list(value.shape)} "
                f"beside z {list(z.shape)}"
            )
        if value.device != z.device:
            raise ValueError(f"{name}: expected a tensor on {z.device}, where z is, got {value.device}")
    if rows is not None:
        expected = f"an int64 tensor [{samples}] on {z.device}"
        rows = _arguments.own("rows", rows, expected)
        if rows.dtype != torch.int64 or rows.shape != z.shape[:1] or rows.device != z.device:
            raise ValueError(f"rows: expected {expected}, got {got(rows)}")
    return z, y, extra, rows


def _density(
    family: str, scale: Any, df: Any, background: Any, extra: Tensor | None
) -> tuple[float, float | None, float]:
    """The scale, the degrees of freedom and the background."""
    one_of("family", family, FAMILIES)
    scale = number("scale", scale, above=0.0)
    if not 0.0 < scale * scale < math.inf:
        raise ValueError(f"scale: expected a number whose square float64 can hold, got {scale}")
    if (df is not None) != (family == "student_t"):
        raise ValueError(f"df: expected a number for 'student_t' and None for the others, got {got(df)} for {family!r}")
    df = None if df is None else number("df", df, above=0.0)
    background = number("background", background, low=0.0)
    if background and family != "poisson":
        raise ValueError(f"background: expected 0 unless family is 'poisson', got {background} for {family!r}")
    if extra is not None and family == "poisson":
        raise ValueError("extra_variance: expected None for 'poisson', got a tensor")
    return scale, df, background


def _expect_positive(counts: Tensor | None, extra: Tensor | None) -> None:
    """Raise for negative values on the CPU. On a GPU the check would wait for the device."""
    for name, value in (("y", counts), ("extra_variance", extra)):
        if value is not None and value.numel() and _arguments.readable(value) and not transformed():
            least = value.detach().min()
            if least < 0.0:
                raise ValueError(f"{name}: expected values >= 0, got {least.item():g}")


def _factorials(log_factorials: Any, y: Tensor, family: str) -> Tensor | None:
    if log_factorials is None:
        return None
    if family != "poisson":
        raise ValueError(f"log_factorials: expected None unless family is 'poisson', got a tensor for {family!r}")
    expected = f"a float64 tensor [{y.shape[0]}] on {y.device}, one number for each row of y"
    log_factorials = _arguments.own("log_factorials", log_factorials, expected)
    wrong = log_factorials.dtype != torch.float64 or log_factorials.shape != y.shape[:1]
    if wrong or log_factorials.device != y.device:
        raise ValueError(f"log_factorials: expected {expected}, got {got(log_factorials)}")
    return log_factorials


def _reference(z, y, family, scale, df, background, extra_variance, rows, log_factorials, return_gradient):
    if rows is not None and _arguments.readable(rows):
        _arguments.index("rows", rows, y.shape[0])
    log_prob, gradient = reference.log_prob_and_gradient(
        z,
        y,
        family=family,
        scale=scale,
        df=df,
        background=background,
        extra_variance=extra_variance,
        rows=rows,
        log_factorials=log_factorials,
    )
    return log_prob, gradient if return_gradient else None


# The codes of csrc/ops/log_prob_and_gradient/cpu.cpp.
_FAMILIES = {family: code for code, family in enumerate(FAMILIES)}


def _cpu(z, y, family, scale, df, background, extra_variance, rows, log_factorials, return_gradient, out=None):
    wide = torch.float64 in (z.dtype, y.dtype)  # the kernel takes float16 and bfloat16 only for z
    dtype = torch.float64 if wide else torch.float32
    state = (z.double() if wide else z).contiguous()
    y = y.to(dtype).contiguous()
    extra = None if extra_variance is None else extra_variance.to(dtype).contiguous()
    rows = None if rows is None else rows.contiguous()
    log_factorials = None if log_factorials is None else log_factorials.contiguous()
    log_prob = torch.empty(z.shape[0], dtype=torch.float64, device="cpu") if out is None else out[0]
    gradient = None
    if return_gradient:
        contiguous = torch.contiguous_format
        written = out is not None and state.dtype == z.dtype
        gradient = out[1] if written else torch.empty_like(state, memory_format=contiguous)
    bad = _native.module("cpu").log_prob_and_gradient(
        _FAMILIES[family],
        scale,
        df or 0.0,
        background,
        density_constant(family, scale, df, extra is not None),
        _native.CPU_DTYPES[state.dtype],
        z.shape[0],
        math.prod(z.shape[1:]),
        state.data_ptr(),
        y.data_ptr(),
        y.shape[0],
        None if rows is None else rows.data_ptr(),
        None if extra is None else extra.data_ptr(),
        0 if extra is None else extra.shape[0],
        None if log_factorials is None else log_factorials.data_ptr(),
        log_prob.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        _arguments.refuse_index("rows", rows, y.shape[0], bad)
    if gradient is not None and state.dtype != z.dtype:
        gradient = gradient.to(z.dtype) if out is None else out[1].copy_(gradient)
    return log_prob, gradient


def _fake(z, y, family, scale, df, background, extra_variance, rows, log_factorials, return_gradient):
    log_prob = z.new_empty(z.shape[0], dtype=torch.float64)
    contiguous = torch.contiguous_format
    return log_prob, torch.empty_like(z, memory_format=contiguous) if return_gradient else z.new_empty(0)


def _vjp(args, results, grads, needed):
    """The gradient that the kernel has computed. The reference serves second derivatives and those in ``y``."""
    grad_log_prob, grad_gradient = grads
    if grad_log_prob is grad_gradient is None:
        return {}
    if needed != ["z"] or grad_gradient is not None or torch.is_grad_enabled():
        return None
    z, gradient = args[0], results[1]
    return {"z": grad_log_prob.to(gradient.dtype).reshape(-1, *(1,) * (z.ndim - 1)) * gradient}


_log_prob_and_gradient = Operation(
    "log_prob_and_gradient(Tensor z, Tensor y, str family, float scale, float? df, float background, "
    "Tensor? extra_variance, Tensor? rows, Tensor? log_factorials, bool return_gradient) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": "fastguide.ops.log_prob_and_gradient.triton:call"},
    place=lambda z, y, *_: (z.device, torch.float64 if y.dtype == torch.float64 else z.dtype),
    differentiable=True,
    vjp=_vjp,
    keep_results=True,
)
