"""`fastguide.ops.log_prob_and_gradient` in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._triton import (
    OPTIONS,
    SUM_BLOCK,
    aligned,
    alignment,
    ceil_div,
    device_of,
    rounded,
    shape_of_tile,
    sum_of_splits,
)
from .reference import FAMILIES, POISSON_LEAST, POISSON_SHARE, density_constant

BLOCK = 1024  # measurements in a tile; not tuned, because the order of a sum must not depend on timings
SPLIT = 8192  # measurements of a sample that one program takes; several programs share a larger sample

_GAUSSIAN, _STUDENT_T, _LAPLACE, _POISSON = (tl.constexpr(code) for code in range(len(FAMILIES)))
_SHARE, _LEAST = tl.constexpr(POISSON_SHARE), tl.constexpr(POISSON_LEAST)


@triton.jit
def _log1p(u):
    """log(1 + u) for u >= 0, accurate also if 1 + u rounds away most of u."""
    w = 1.0 + u
    kept = w - 1.0
    exact = (kept == u) | (kept == 0.0)
    return tl.where(kept == 0.0, u, tl.log(w) * tl.where(exact, 1.0, tl.div_rn(u, tl.where(exact, 1.0, kept))))


@triton.jit
def _density(z, y, extra_variance, scale, background, variance, df, FAMILY: tl.constexpr):
    """The term of each measurement and its derivative. Quotients are rounded to nearest, because ``/`` of float32 is
    only good to 2 ulp on GPUs."""
    if FAMILY == _POISSON:  # in float64: counts of 1e4 have terms of 1e5, which cancel to a few units
        counts = y.to(tl.float64) / scale
        rate = (z.to(tl.float64) + background) / scale
        floor = _SHARE * tl.maximum(counts, tl.full(counts.shape, _LEAST, tl.float64))
        below = tl.where(rate < floor, floor - rate, 0.0)
        rate = tl.where(rate < floor, floor, rate)
        bend = below / tl.maximum(counts, tl.full(counts.shape, 1.0, tl.float64))
        slope = counts / rate - 1.0
        term = tl.where(counts == 0.0, 0.0, counts * tl.log(rate)) - rate - below * (slope + 0.5 * bend)
        slope = ((slope + bend) / scale).to(tl.float32)
    else:
        residual = y.to(tl.float32) - z.to(tl.float32)
        v = variance
        if extra_variance is not None:
            v = variance + extra_variance.to(tl.float32)
        if FAMILY == _GAUSSIAN:
            slope = tl.div_rn(residual, v)
            term = -0.5 * residual * slope
        elif FAMILY == _STUDENT_T:
            square, spread = residual * residual, df * v
            slope = tl.div_rn((df + 1.0) * residual, spread + square)
            term = -0.5 * (df + 1.0) * _log1p(tl.div_rn(square, spread))
        else:
            inverse = tl.div_rn(1.0, tl.sqrt_rn(v))
            slope = tl.where(residual > 0.0, inverse, tl.where(residual < 0.0, -inverse, residual))  # a NaN stays
            term = -tl.abs(residual) * inverse
        if extra_variance is not None:
            term -= 0.5 * tl.log(v)
    return term, slope


@triton.jit(do_not_specialize=["samples", "y_rows", "extra_rows"])
def log_prob_and_gradient_kernel(
    z, y, extra_variance, rows, constants, gradient, sums, samples, y_rows, extra_rows, elements: tl.int64,
    scale: tl.float64, background: tl.float64, constant: tl.float64, variance: tl.float32, df: tl.float32,
    FAMILY: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    elements = elements // ALIGN * ALIGN  # tells the compiler that it is a multiple of ALIGN
    splits = tl.cdiv(elements, SPLIT)
    program = tl.program_id(0).to(tl.int64)
    row = program // splits * ROWS + tl.arange(0, ROWS)
    split = program % splits
    live = row < samples
    y_row = row if rows is None else tl.load(rows + row, mask=live, other=0)
    y_row = tl.where(y_rows == 1, 0, y_row) if rows is None else y_row
    there = live & (y_row >= 0) & (y_row < y_rows)  # a row out of range counts as NaN, and is never read
    y_row = tl.minimum(tl.maximum(y_row, 0), y_rows - 1)  # safe even if the index is loaded twice and changes meanwhile
    extra_row = tl.where(extra_rows == 1, 0, row)

    total = tl.zeros([ROWS], tl.float64)
    end = tl.minimum(elements, (split + 1) * SPLIT)
    for column in range(split * SPLIT, end, 4 * GROUPS):
        columns = (column + tl.arange(0, 4 * GROUPS))[None, :]
        mask = live[:, None] & (columns < end)
        place = row[:, None] * elements + columns
        known = tl.load(y + y_row[:, None] * elements + columns, mask=mask & there[:, None], other=float("nan"))
        more = None
        if extra_variance is not None:
            more = tl.load(extra_variance + extra_row[:, None] * elements + columns, mask=mask, other=1.0)
        term, slope = _density(
            tl.load(z + place, mask=mask, other=0.0), known, more, scale, background, variance, df, FAMILY
        )
        if gradient is not None:
            tl.store(gradient + place, rounded(slope, gradient.dtype.element_ty), mask=mask)
        total += tl.sum(tl.where(mask, term, 0.0).to(tl.float64), axis=1)
    if split == 0:
        total += constant
        if constants is not None:
            total -= tl.load(constants + y_row, mask=there, other=float("nan"))
    tl.store(sums + row * splits + split, total, mask=live)


@triton.jit(do_not_specialize=["splits"])
def total_kernel(sums, total, splits, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(total + row, sum_of_splits(sums, row, splits, BLOCK))


def totals(sums: torch.Tensor, block: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """``sums.sum(1)`` for ``sums`` ``[rows, splits]`` in float64, with the same bits for any number of rows. A single
    split is returned as it is."""
    if sums.shape[1] == 1:
        return sums.reshape(-1)
    total = torch.empty(sums.shape[0], dtype=torch.float64, device=sums.device) if out is None else out
    with device_of(sums):
        total_kernel[(len(sums),)](sums, total, sums.shape[1], BLOCK=block, num_warps=max(1, block // 256))
    return total


def warps_of(family: str) -> int:
    """Warps of a program. Poisson's float64 takes twice the registers, so its threads have half the measurements."""
    return 8 if family == "poisson" else 4


def call(z, y, family, scale, df, background, extra_variance, rows, log_factorials, return_gradient, out=None):
    """As the operation, but an index of a row that ``y`` does not have gives NaN."""
    z, y = aligned(z), aligned(y)
    extra_variance = None if extra_variance is None else aligned(extra_variance)
    samples, elements = z.shape[0], math.prod(z.shape[1:])
    constant = elements * density_constant(family, scale, df, extra_variance is not None)
    gradient = None
    if return_gradient:
        gradient = torch.empty_like(z) if out is None else out[1]
    log_prob = None if out is None else out[0]
    if z.numel() == 0:
        log_prob = torch.empty(samples, dtype=torch.float64, device=z.device) if log_prob is None else log_prob
        return log_prob.fill_(constant), gradient
    constants = None if log_factorials is None else aligned(log_factorials)
    if family == "poisson" and constants is None:
        constants = totals(torch.lgamma(y.double() / scale + 1.0).reshape(y.shape[0], elements), 1024)
    splits = ceil_div(elements, SPLIT)
    tile_rows, groups = shape_of_tile(elements, BLOCK, 1)
    if splits == 1 and log_prob is not None:
        sums = log_prob.reshape(samples, 1)
    else:
        sums = torch.empty((samples, splits), dtype=torch.float64, device=z.device)
    with device_of(z):
        log_prob_and_gradient_kernel[(ceil_div(samples, tile_rows) * splits,)](
            z, y, extra_variance, rows, constants, gradient, sums, samples, y.shape[0],
            0 if extra_variance is None else extra_variance.shape[0], elements,
            scale, background, constant, scale**2, df or 0.0,
            FAMILY=FAMILIES.index(family), SPLIT=SPLIT, ALIGN=alignment(elements),
            ROWS=tile_rows, GROUPS=groups, num_warps=warps_of(family), **OPTIONS,
        )  # fmt: skip
    return totals(sums, SUM_BLOCK, log_prob), gradient
