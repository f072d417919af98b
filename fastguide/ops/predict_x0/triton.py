"""`fastguide.ops.predict_x0` and its backward pass in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Tuned, abreast, alignment, flag_not_finite, rounded, tile_of_program
from . import _empty_gradients, _unpacked
from .reference import x0_coefficients


@triton.jit
def multiplier(value, table, index: tl.constexpr, row, mask, particles):
    """A multiplier: one number for all samples, or row ``index`` of the float32 table ``[3, N]`` as a column."""
    if table is not None:
        value = tl.load(table + index * particles + row, mask=mask, other=0.0)[:, None]
    return value


@triton.jit(do_not_specialize=["particles"])
def predict_x0_kernel(
    x, output, unconditional, x0, not_finite, particles, elements: tl.int64,
    p: tl.float32, q: tl.float32, guidance_scale: tl.float32, table,
    SAMPLE: tl.constexpr, ALIGN: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    elements = elements // ALIGN * ALIGN  # tells the compiler that it is a multiple of ALIGN
    row, column = tile_of_program(particles, elements, ROWS, GROUPS)
    columns = column + tl.arange(0, 4 * GROUPS)
    live = row < particles
    mask = live[:, None] & (columns < elements)[None, :]
    place = row[:, None] * elements + columns[None, :]

    x0_hat = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    if not_finite is not None:
        flag_not_finite(not_finite, x0_hat)
    if unconditional is not None:
        base = tl.load(unconditional + place, mask=mask, other=0.0).to(tl.float32)
        if not_finite is not None:
            flag_not_finite(not_finite + 1, base)
        x0_hat = tl.fma(multiplier(guidance_scale, table, 2, row, live, particles), x0_hat - base, base)
    if not SAMPLE:
        p = multiplier(p, table, 0, row, live, particles)
        q = multiplier(q, table, 1, row, live, particles)
        x0_hat = tl.fma(q, x0_hat, p * tl.load(x + place, mask=mask, other=0.0).to(tl.float32))
    tl.store(x0 + place, rounded(x0_hat, x0.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["particles"])
def predict_x0_backward_kernel(
    grad, grad_x, grad_output, grad_unconditional, particles, elements: tl.int64,
    of_x: tl.float32, of_output: tl.float32, of_unconditional: tl.float32, table,
    ALIGN: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    elements = elements // ALIGN * ALIGN
    row, column = tile_of_program(particles, elements, ROWS, GROUPS)
    columns = column + tl.arange(0, 4 * GROUPS)
    live = row < particles
    mask = live[:, None] & (columns < elements)[None, :]
    place = row[:, None] * elements + columns[None, :]

    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    if grad_x is not None:
        value = multiplier(of_x, table, 0, row, live, particles) * g
        tl.store(grad_x + place, rounded(value, grad_x.dtype.element_ty), mask=mask)
    if grad_output is not None:
        value = multiplier(of_output, table, 1, row, live, particles) * g
        tl.store(grad_output + place, rounded(value, grad_output.dtype.element_ty), mask=mask)
    if grad_unconditional is not None:
        value = multiplier(of_unconditional, table, 2, row, live, particles) * g
        tl.store(grad_unconditional + place, rounded(value, grad_unconditional.dtype.element_ty), mask=mask)


_launch = Tuned(predict_x0_kernel, key=["SAMPLE", "ALIGN"])
_launch_backward = Tuned(predict_x0_backward_kernel, key=["ALIGN"])


def call(
    x, model_output, levels, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    out=None, not_finite=None,
):  # fmt: skip
    x, model_output = x.contiguous(), model_output.contiguous()
    unconditional = None if unconditional is None else unconditional.contiguous()
    x0 = torch.empty_like(x) if out is None else out[0]
    if x.numel():
        levels, scale = _unpacked(levels, table, guidance_scale, guidance_scale_tensor)
        numbers, multiplied = _columns(x, *x0_coefficients(prediction, *levels), scale)
        particles, elements = x.shape[0], x.numel() // x.shape[0]
        _launch(
            particles, elements,
            x, model_output, unconditional, x0, not_finite, particles, elements, *numbers, multiplied,
            SAMPLE=prediction == "sample", ALIGN=alignment(elements), ABREAST=abreast(x.dtype),
        )  # fmt: skip
    return x0


def backward(
    grad, levels, table, prediction, guidance_scale, guidance_scale_tensor, x_dtype, output_dtype, unconditional_dtype
):
    grad = grad.contiguous()
    found = _empty_gradients(grad, x_dtype, output_dtype, unconditional_dtype)
    if grad.numel():
        levels, scale = _unpacked(levels, table, guidance_scale, guidance_scale_tensor)
        p, q = x0_coefficients(prediction, *levels)
        numbers, multiplied = _columns(grad, p, q * scale, q * (1.0 - scale))
        particles, elements = grad.shape[0], grad.numel() // grad.shape[0]
        _launch_backward(
            particles, elements, grad, *found, particles, elements, *numbers, multiplied,
            ALIGN=alignment(elements), ABREAST=abreast(grad.dtype),
        )  # fmt: skip
    return tuple(found)


def _columns(x: Tensor, *values: float | Tensor) -> tuple[tuple[float, ...], Tensor | None]:
    """The values as floats, or, if any differs between samples, as a float32 table with a row ``[N]`` for each."""
    if not any(isinstance(value, Tensor) for value in values):
        return tuple(map(float, values)), None
    columns = [
        v.float() if isinstance(v, Tensor) else torch.full((x.shape[0],), v, dtype=torch.float32, device=x.device)
        for v in values
    ]
    return (0.0,) * len(values), torch.stack(columns)
