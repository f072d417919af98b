"""`fastguide.ops.reverse_step` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _arguments
from .._arguments import Coefficients, DynamicThreshold, Scalar
from .._triton import (
    VARYING,
    Tuned,
    abreast,
    alignment,
    flag_not_finite,
    normals,
    read_counter,
    rounded,
    tile_of_program,
)
from ..predict_x0.reference import guided
from . import reference


@triton.jit
def multiplier(value, table, index: tl.constexpr, row, mask, particles):
    """A multiplier: one number for all particles, or row ``index`` of the float32 table ``[8, N]`` as a column."""
    if table is not None:
        value = tl.load(table + index * particles + row, mask=mask, other=0.0)[:, None]
    return value


@triton.jit(do_not_specialize=VARYING)
def reverse_step_kernel(
    x, output, unconditional, displacement, x_s, x0, not_finite, particles, elements: tl.int64,
    p: tl.float32, q: tl.float32, a: tl.float32, b: tl.float32, tau: tl.float32, c: tl.float32,
    displacement_scale: tl.float32, guidance_scale: tl.float32, table,
    low: tl.float32, high: tl.float32, bounds,
    seed: tl.uint64, step: tl.uint32, stream: tl.uint32, first_particle: tl.int64, seed_on_device, step_on_device,
    SAMPLE: tl.constexpr, CLIP: tl.constexpr, CLIP_NOISE: tl.constexpr, NOISE: tl.constexpr, X0: tl.constexpr,
    ALIGN: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    seed, step = read_counter(seed, step, seed_on_device, step_on_device)
    elements = elements // ALIGN * ALIGN  # tells the compiler that it is a multiple of ALIGN
    row, column = tile_of_program(particles, elements, ROWS, GROUPS)
    columns = column + tl.arange(0, 4 * GROUPS)
    live = row < particles
    mask = live[:, None] & (columns < elements)[None, :]
    place = row[:, None] * elements + columns[None, :]

    state = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    x0_hat = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    if not_finite is not None:
        flag_not_finite(not_finite, state)
        flag_not_finite(not_finite + 1, x0_hat)
    if unconditional is not None:
        base = tl.load(unconditional + place, mask=mask, other=0.0).to(tl.float32)
        if not_finite is not None:
            flag_not_finite(not_finite + 3, base)
        x0_hat = tl.fma(multiplier(guidance_scale, table, 7, row, live, particles), x0_hat - base, base)
    if not SAMPLE:
        p = multiplier(p, table, 0, row, live, particles)
        q = multiplier(q, table, 1, row, live, particles)
        x0_hat = tl.fma(q, x0_hat, p * state)
    unclipped = x0_hat
    if bounds is not None:  # each particle's dynamic threshold
        bound = tl.load(bounds + row, mask=live, other=1.0)[:, None]
        x0_hat = tl.div_rn(clipped(x0_hat, -bound, bound), bound)
    if CLIP:
        x0_hat = clipped(x0_hat, low, high)
    a = multiplier(a, table, 2, row, live, particles)
    b = multiplier(b, table, 3, row, live, particles)
    result = tl.fma(b, x0_hat, a * state)
    if not CLIP_NOISE:
        c = multiplier(c, table, 5, row, live, particles)
        result = tl.fma(c, unclipped, result)
    if displacement is not None:
        displacement_scale = multiplier(displacement_scale, table, 6, row, live, particles)
        moved = tl.load(displacement + place, mask=mask, other=0.0).to(tl.float32)
        if not_finite is not None:
            flag_not_finite(not_finite + 2, moved)
        result += displacement_scale * moved
    if NOISE:
        tau = multiplier(tau, table, 4, row, live, particles)
        z = normals(seed, step, stream, first_particle + row, column // 4, GROUPS, ABREAST)
        result = tl.fma(tau, z, result)
    tl.store(x_s + place, rounded(result, x_s.dtype.element_ty), mask=mask)
    if X0:
        tl.store(x0 + place, rounded(x0_hat, x0.dtype.element_ty), mask=mask)


@triton.jit
def clipped(value, low, high):
    """``value`` clipped to ``[low, high]``. A NaN stays NaN."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


_launch = Tuned(reverse_step_kernel, key=["ALIGN", "NOISE", "X0"])


def call(
    x, model_output, coefficients, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    clip, clip_noise, displacement, displacement_scale, displacement_scale_tensor,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0, out=None, not_finite=None,
):  # fmt: skip
    """One pass over memory, except for the quantile of a dynamic threshold."""
    x, model_output = x.contiguous(), model_output.contiguous()
    unconditional = None if unconditional is None else unconditional.contiguous()
    displacement = None if displacement is None else displacement.contiguous()
    x_s = torch.empty_like(x) if out is None else out[0]
    x0 = (torch.empty_like(x) if out is None else out[1]) if return_x0 else None
    if x.numel():
        particles, elements = x.shape[0], x.numel() // x.shape[0]
        scalars = _arguments.unpacked_scalars(coefficients, table)
        scale = _arguments.unpacked(displacement_scale, displacement_scale_tensor)
        guidance = _arguments.unpacked(guidance_scale, guidance_scale_tensor)
        numbers, multiplied = multipliers(x, scalars, prediction, clip_noise, scale, guidance)
        threshold = _arguments.unpacked_clip(clip)
        bounds = None
        if isinstance(threshold, DynamicThreshold):
            output = guided(model_output.float(), unconditional, guidance)
            bounds = dynamic_bounds(x, output, scalars, prediction, threshold)
        low, high = clip if len(clip) == 2 else (0.0, 0.0)
        _launch(
            particles, elements,
            x, model_output, unconditional, displacement, x_s, x0, not_finite, particles, elements,
            *numbers, multiplied,
            low, high, bounds, seed, step, stream, first_particle, seed_tensor, step_tensor,
            SAMPLE=prediction == "sample", CLIP=len(clip) == 2, CLIP_NOISE=clip_noise,
            NOISE=multiplied is not None or numbers[4] > 0.0, X0=return_x0,
            ALIGN=alignment(elements), ABREAST=abreast(x.dtype),
        )  # fmt: skip
    return x_s, x0


def multipliers(
    x: Tensor,
    coefficients: Coefficients,
    prediction: str,
    clip_noise: bool = True,
    scale: Scalar = 1.0,
    guidance_scale: Scalar = 1.0,
) -> tuple[tuple[float, ...], Tensor | None]:
    """``p, q, a, b, tau, c``, the displacement's scale and the guidance scale: floats, or a float32 table ``[8, N]`` if
    any differs between samples."""
    values = [*reference.multipliers(x, coefficients, prediction, clip_noise), scale, guidance_scale]
    if not any(isinstance(v, Tensor) for v in values):
        return tuple(float(v) for v in values), None
    columns = [
        v.reshape(-1).float()
        if isinstance(v, Tensor)
        else torch.full((x.shape[0],), v, dtype=torch.float32, device=x.device)
        for v in values
    ]
    return (0.0,) * 8, torch.stack(columns).contiguous()


def dynamic_bounds(
    x: Tensor, model_output: Tensor, coefficients: Coefficients, prediction: str, clip: DynamicThreshold
) -> Tensor:
    """Each particle's dynamic threshold ``[N]``, float32."""
    p, q = reference.multipliers(x, coefficients, prediction)[:2]
    output = model_output.float()
    x0 = output if prediction == "sample" else p * x.float() + q * output
    return reference.dynamic_bound(x0, clip)
