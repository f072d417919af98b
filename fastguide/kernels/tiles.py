"""How kernels cut ``[particles, elements]`` into tiles, and what a launch has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

OPTIONS = {} if INTERPRETED.value else {"enable_fp_fusion": False}  # of every launch, see noise.py

_LEAST_GROUPS = 8  # of a tile's row, where the row has as many: 128 bytes of float32


def groups_of_tile(elements: int, block: int) -> int:
    """Groups of four elements in a tile's row, a power of two and at most ``block`` elements: the most with which no
    more than an eighth of the tiles stands past the end of a row."""
    groups = max(1, (elements + 3) // 4)
    most = min(triton.next_power_of_2(groups), block // 4)
    width, best, least = most, most, math.inf
    while width >= min(_LEAST_GROUPS, most):
        waste = (-groups % width) / groups
        if waste <= 0.125:
            return width
        if waste < least:
            best, least = width, waste
        width //= 2
    return best


def alignment(elements: int) -> int:
    """The largest power of two up to 16 that divides the elements of a particle: what the compiler may count on."""
    return math.gcd(elements, 16)


def abreast(dtype: torch.dtype) -> int:
    """Groups of normals that fill 16 bytes of a state."""
    return 1 if dtype == torch.float32 else 2


def shape_of_tile(args: Mapping[str, Any]) -> tuple[int, int]:
    """``(ROWS, GROUPS)`` of a kernel with arguments ``elements`` and ``BLOCK``, the elements of a tile."""
    groups = max(groups_of_tile(args["elements"], args["BLOCK"]), args["ABREAST"])
    return max(1, args["BLOCK"] // (4 * groups)), groups


HEURISTICS = {
    "ROWS": lambda args: shape_of_tile(args)[0],
    "GROUPS": lambda args: shape_of_tile(args)[1],
}

CONFIGS = (
    [triton.Config({"BLOCK": 2048}, num_warps=4)]
    if INTERPRETED.value
    else [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (2048, 4), (4096, 8))]
)


@triton.jit
def tile_of_program(particles, elements, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The rows and the first column of this program's tile."""
    columns = 4 * GROUPS
    across = tl.cdiv(elements, columns)
    program = tl.program_id(0).to(tl.int64)
    row = program // across * ROWS + tl.arange(0, ROWS)
    return row, program % across * columns


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 as a state of ``dtype``, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, up, value)
    return value.to(dtype)


def counter(seed: int | torch.Tensor, step: int | torch.Tensor, stream: int, first_particle: int) -> tuple:
    """``seed, step, stream, first_particle, seed_on_device, step_on_device`` of a launch: a seed or a step that is an
    int64 tensor of one element is read by the kernel, so that a captured launch has what stands there when it runs."""
    on_device = [v if isinstance(v, torch.Tensor) else None for v in (seed, step)]
    values = [0 if isinstance(v, torch.Tensor) else v for v in (seed, step)]
    return *values, stream, first_particle, *on_device


def grid(particles: int, elements: int) -> Callable[[Mapping[str, Any]], tuple[int]]:
    """The grid of a kernel whose programs have one tile each."""
    return lambda meta: (triton.cdiv(particles, meta["ROWS"]) * triton.cdiv(elements, 4 * meta["GROUPS"]),)
