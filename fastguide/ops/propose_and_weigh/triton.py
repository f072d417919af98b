"""`fastguide.ops.propose_and_weigh` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _arguments
from .._arguments import DynamicThreshold
from .._triton import (
    OPTIONS,
    SUM_BLOCK,
    VARYING,
    abreast,
    aligned,
    alignment,
    ceil_div,
    device_of,
    flag_not_finite,
    normals,
    read_counter,
    rounded,
    shape_of_tile,
    sum_of_splits,
)
from ..reverse_step.triton import clipped, dynamic_bounds, multiplier, multipliers

BLOCK = 2048  # elements in a tile; not tuned, because the order of a sum must not depend on timings
SPLIT = 8192  # elements of a particle that one program takes; several programs share a larger particle

_MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=VARYING)
def propose_and_weigh_kernel(
    x, x0_hat, displacement, x_s, before, after, not_finite, sums, particles, elements: tl.int64,
    a: tl.float32, b: tl.float32, tau: tl.float32, displacement_scale: tl.float32, table,
    extra_variance, extra_variance_scale: tl.float32, low: tl.float32, high: tl.float32, bounds,
    seed: tl.uint64, step: tl.uint32, stream: tl.uint32, first_particle: tl.int64, seed_on_device, step_on_device,
    CLIP: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, ABREAST: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    seed, step = read_counter(seed, step, seed_on_device, step_on_device)
    elements = elements // ALIGN * ALIGN  # tells the compiler that it is a multiple of ALIGN
    splits = tl.cdiv(elements, SPLIT)
    program = tl.program_id(0).to(tl.int64)
    row = program // splits * ROWS + tl.arange(0, ROWS)
    split = program % splits
    live = row < particles
    a = multiplier(a, table, 2, row, live, particles)
    b = multiplier(b, table, 3, row, live, particles)
    tau = multiplier(tau, table, 4, row, live, particles)
    if extra_variance is not None:
        tau = wider(tau, extra_variance, extra_variance_scale, row, live)[:, None]
    displacement_scale = multiplier(displacement_scale, table, 6, row, live, particles)
    if bounds is not None:  # each particle's dynamic threshold
        bound = tl.load(bounds + row, mask=live, other=1.0)[:, None]
    half_inverse = tl.where(tau != 0.0, tl.minimum(tl.div_rn(0.5, tl.where(tau != 0.0, tau, 1.0)), _MOST), 0.0)

    # The sum of these terms is -tau times the log-density ratio: tau delta (z + delta / 2), delta = displacement / tau.
    terms = tl.zeros([ROWS, 4 * GROUPS], tl.float32)
    end = tl.minimum(elements, (split + 1) * SPLIT)
    for column in range(split * SPLIT, end, 4 * GROUPS):
        columns = column + tl.arange(0, 4 * GROUPS)
        mask = live[:, None] & (columns < end)[None, :]
        place = row[:, None] * elements + columns[None, :]
        state = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        x0 = tl.load(x0_hat + place, mask=mask, other=0.0).to(tl.float32)
        moved = tl.load(displacement + place, mask=mask, other=0.0).to(tl.float32)
        moved = tl.where(tau != 0.0, moved, 0.0)
        if not_finite is not None:
            flag_not_finite(not_finite, state)
            flag_not_finite(not_finite + 1, x0)
            flag_not_finite(not_finite + 2, moved)
        if bounds is not None:
            x0 = tl.div_rn(clipped(x0, -bound, bound), bound)
        if CLIP:
            x0 = clipped(x0, low, high)
        mean = tl.fma(b, x0, a * state)
        moved = displacement_scale * moved
        z = normals(seed, step, stream, first_particle + row, column // 4, GROUPS, ABREAST)
        result = tl.fma(tau, z, mean + moved)
        tl.store(x_s + place, rounded(result, x_s.dtype.element_ty), mask=mask)
        terms += moved * tl.fma(half_inverse, moved, z)
    total = tl.sum(terms.to(tl.float64), axis=1)
    if sums is not None:
        tl.store(sums + row * splits + split, total, mask=live)
    else:
        scale = tl.reshape(tau + tl.zeros([ROWS, 1], tl.float32), [ROWS])
        weigh(before, after, row, live, total, scale)


@triton.jit
def wider(tau, extra_variance, scale, row, live):
    """``sqrt(tau^2 + scale variance)`` of each row. A product that is negative or NaN counts as 0."""
    more = scale * tl.load(extra_variance + row, mask=live, other=0.0).to(tl.float64)
    tau = tl.reshape(tau + tl.zeros([row.shape[0], 1], tl.float32), [row.shape[0]]).to(tl.float64)
    return tl.sqrt(tau * tau + tl.where(more > 0.0, more, 0.0)).to(tl.float32)


@triton.jit
def weigh(before, after, row, live, total, tau):
    """The log-weights plus the log-density ratio ``-total / tau``."""
    weight = tl.load(before + row, mask=live, other=0.0)
    scale = tl.zeros(total.shape, tl.float64) + tau.to(tl.float64)
    noisy = scale != 0.0
    change = weight.to(tl.float64) - total / tl.where(noisy, scale, 1.0)
    tl.store(after + row, tl.where(noisy, change.to(after.dtype.element_ty), weight), mask=live)


@triton.jit(do_not_specialize=["particles", "splits"])
def weigh_kernel(
    sums, before, after, particles, splits, tau: tl.float32, table, extra_variance, extra_variance_scale: tl.float32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    total = sum_of_splits(sums, row, splits, BLOCK)
    if table is not None:
        tau = tl.load(table + 4 * particles + row)[:, None]
    if extra_variance is not None:
        tau = wider(tau, extra_variance, extra_variance_scale, row, row < particles)
    weigh(before, after, row, row < particles, total, tl.reshape(tau + tl.zeros([1], tl.float32), [1]))


def call(
    x, x0_hat, displacement, log_weights, coefficients, table, clip, displacement_scale, displacement_scale_tensor,
    extra_variance, extra_variance_scale, seed, step, stream, first_particle, seed_tensor, step_tensor,
    out=None, not_finite=None,
):  # fmt: skip
    x, x0_hat, displacement = aligned(x), aligned(x0_hat), aligned(displacement)
    log_weights = log_weights.contiguous()
    extra_variance = None if extra_variance is None else extra_variance.contiguous()
    x_s, after = out or (torch.empty_like(x), torch.empty_like(log_weights))
    if x.numel() == 0:
        return x_s, after.copy_(log_weights)
    particles, elements = x.shape[0], x.numel() // x.shape[0]
    scalars = _arguments.unpacked_scalars(coefficients, table)
    scale = _arguments.unpacked(displacement_scale, displacement_scale_tensor)
    (_, _, a, b, tau, _, scale, _), multiplied = multipliers(x, scalars, "sample", scale=scale)
    threshold = _arguments.unpacked_clip(clip)
    dynamic = isinstance(threshold, DynamicThreshold)
    bounds = dynamic_bounds(x, x0_hat, scalars, "sample", threshold) if dynamic else None
    low, high = clip if len(clip) == 2 else (0.0, 0.0)
    splits = ceil_div(elements, SPLIT)
    rows, groups = shape_of_tile(elements, BLOCK, abreast(x.dtype))
    sums = torch.empty((particles, splits), dtype=torch.float64, device=x.device) if splits > 1 else None
    with device_of(x):
        propose_and_weigh_kernel[(ceil_div(particles, rows) * splits,)](
            x, x0_hat, displacement, x_s, log_weights, after, not_finite, sums, particles, elements, a, b, tau, scale,
            multiplied, extra_variance, extra_variance_scale, low, high, bounds, seed, step, stream,
            first_particle, seed_tensor, step_tensor,
            CLIP=len(clip) == 2, SPLIT=SPLIT, ALIGN=alignment(elements), ABREAST=abreast(x.dtype),
            ROWS=rows, GROUPS=groups, num_warps=4, **OPTIONS,
        )  # fmt: skip
        if sums is not None:
            weigh_kernel[(particles,)](
                sums, log_weights, after, particles, splits, tau, multiplied, extra_variance, extra_variance_scale,
                BLOCK=SUM_BLOCK, num_warps=1, **OPTIONS,
            )  # fmt: skip
    return x_s, after
