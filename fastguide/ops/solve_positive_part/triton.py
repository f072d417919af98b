"""`fastguide.ops.solve_positive_part` in Triton: one launch instead of some 250."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._triton import OPTIONS, ceil_div, device_of
from . import reference

PRODUCTS, MOST = (
    4096,
    32,
)  # limits for one program: terms of a product, and matrices that fit its registers

_QUINTICS, _NEWTON_STEPS = tl.constexpr(reference.QUINTICS), tl.constexpr(reference.NEWTON_STEPS)
_QUINTIC = tl.constexpr(reference.QUINTIC)


@triton.jit
def _product(a, b):
    """The product of matrices ``[MATRICES, M, M]``. They are too small for tl.dot."""
    return tl.sum(a[:, :, :, None] * b[:, None, :, :], axis=2)


@triton.jit(do_not_specialize=["number", "size"])
def solve_positive_part_kernel(
    gram, residual, solution, log_density, number, size, variance: tl.float64, constant: tl.float64,
    MATRICES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64) * MATRICES + tl.arange(0, MATRICES)
    i, live = tl.arange(0, M), matrix < number
    inside = live[:, None] & (i < size)[None, :]
    identity = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)[None, :, :]
    place = matrix[:, None, None] * (size * size) + i[None, :, None] * size + i[None, None, :]
    whole = inside[:, :, None] & (i < size)[None, None, :]
    mirrored = matrix[:, None, None] * (size * size) + i[None, None, :] * size + i[None, :, None]
    g = tl.load(gram + place, mask=whole, other=0.0)
    g = 0.5 * (g + tl.load(gram + mirrored, mask=whole, other=0.0))

    norm = tl.sqrt(tl.sum(tl.sum(g * g, axis=2), axis=1))[:, None, None]
    sign = g / tl.where(norm > 0.0, norm, 1.0)
    for _ in range(_QUINTICS):
        square = _product(sign, sign)
        quartic = _product(square, square)
        sign = _product(sign, _QUINTIC[0] * identity + _QUINTIC[1] * square + _QUINTIC[2] * quartic)
    for _ in range(_NEWTON_STEPS):
        sign = _product(sign, 1.5 * identity - 0.5 * _product(sign, sign))
    held = 0.5 * (g + _product(g, sign))
    a = 0.5 * (held + tl.trans(held, 0, 2, 1)) + variance * identity

    # Gauss-Jordan. Rows past the last are those of `variance` times the identity; they change nothing.
    given = tl.load(residual + matrix[:, None] * size + i[None, :], mask=inside, other=0.0)
    r = given
    total = tl.zeros([MATRICES], tl.float64)
    for j in range(size):
        here = (i == j)[None, :]
        row = tl.sum(tl.where(here[:, :, None], a, 0.0), axis=1)
        column = tl.sum(tl.where(here[:, None, :], a, 0.0), axis=2)
        pivot = tl.sum(tl.where(here, row, 0.0), axis=1)
        known = tl.sum(tl.where(here, r, 0.0), axis=1) / pivot
        total += tl.log(pivot)
        row = row / pivot[:, None]
        a = tl.where(here[:, :, None], row[:, None, :], a - column[:, :, None] * row[:, None, :])
        r = tl.where(here, known[:, None], r - column * known[:, None])
    tl.store(solution + matrix[:, None] * size + i[None, :], r, mask=inside)
    tl.store(log_density + matrix, constant - 0.5 * (total + tl.sum(given * r, axis=1)), mask=live)


def call(gram, residual, variance, out=None):
    gram, residual = gram.contiguous(), residual.contiguous()
    number, rows = residual.shape
    solution, log_density = out or (torch.empty_like(residual), residual.new_empty(number))
    if residual.numel() == 0:
        return solution, log_density.zero_()
    padded = triton.next_power_of_2(max(rows, 2))
    matrices = min(PRODUCTS // padded**3, MOST)
    with device_of(gram):
        solve_positive_part_kernel[(ceil_div(number, matrices),)](
            gram,
            residual,
            solution,
            log_density,
            number,
            rows,
            variance,
            -0.5 * rows * math.log(2 * math.pi),
            MATRICES=matrices,
            M=padded,
            num_warps=4,
            **OPTIONS,
        )
    return solution, log_density
