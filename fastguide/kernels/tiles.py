"""How kernels cut ``[particles, elements]`` into tiles, and what a launch has in common."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

# Arguments for whose values (1, multiples of 16) no kernel is compiled anew.
VARYING = ["particles", "seed", "step", "stream", "first_particle"]

OPTIONS = {} if INTERPRETED.value else {"enable_fp_fusion": False}  # of every launch, see noise.py

_LEAST_GROUPS = 8  # of a tile's row, where the row has as many: 128 bytes of float32


def ceil_div(a: int, b: int) -> int:
    """As `triton.cdiv`, which the host takes 2 us to call."""
    return -(-a // b)


def groups_of_tile(elements: int, block: int) -> int:
    """Groups of four elements in a tile's row, a power of two and at most ``block`` elements: the most with which no
    more than an eighth of the tiles stands past the end of a row."""
    groups = max(1, (elements + 3) // 4)
    most = min(1 << (groups - 1).bit_length(), block // 4)
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


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, at an address that 16 divides. A kernel that sums gets no others: the compiler would cut its tiles
    otherwise, and sum in another order."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def abreast(dtype: torch.dtype) -> int:
    """Groups of normals that fill 16 bytes of a state."""
    return 1 if dtype == torch.float32 else 2


@functools.cache  # asked for at every launch
def shape_of_tile(elements: int, block: int, abreast: int) -> tuple[int, int]:
    """``(ROWS, GROUPS)`` of a launch whose tiles have ``block`` elements."""
    groups = max(groups_of_tile(elements, block), abreast)
    return max(1, block // (4 * groups)), groups


def _shape_of_config(args: Mapping[str, Any]) -> tuple[int, int]:
    return shape_of_tile(args["elements"], args["BLOCK"], args["ABREAST"])


_HEURISTICS = {"ROWS": lambda args: _shape_of_config(args)[0], "GROUPS": lambda args: _shape_of_config(args)[1]}

CONFIGS = [triton.Config(dict(BLOCK=block), num_warps=warps) for block, warps in ((1024, 4), (2048, 4), (4096, 8))]

_WORTH_TUNING = 1 << 22  # elements: below, every configuration takes as long as its launch


class Tuned:
    """An element-wise kernel in two forms: for large states the fastest of `CONFIGS`, measured once for each set of
    the constants ``key``, and before a capture; for others the first of them."""

    def __init__(self, kernel: Any, key: list[str]):
        self.plain = kernel
        self.large = triton.autotune(CONFIGS, key)(triton.heuristics(_HEURISTICS)(kernel))

    def __call__(self, particles: int, elements: int, *args: Any, **constants: Any) -> None:
        """``args``: of the kernel, of which the first is a state of ``particles`` of ``elements``."""

        def grid(meta: Mapping[str, Any]) -> tuple[int]:
            return (ceil_div(particles, meta["ROWS"]) * ceil_div(elements, 4 * meta["GROUPS"]),)

        with device_of(args[0]):
            if particles * elements >= _WORTH_TUNING and not INTERPRETED.value:
                self.large[grid](*args, **constants, **OPTIONS)
            else:
                first = CONFIGS[0]
                constants |= first.kwargs
                constants["ROWS"], constants["GROUPS"] = shape_of_tile(
                    elements, constants["BLOCK"], constants["ABREAST"]
                )
                self.plain[grid(constants)](*args, **constants, num_warps=first.num_warps, **OPTIONS)


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the device that is current: for the body, that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def tile_of_program(particles, elements, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The rows and the first column of this program's tile."""
    columns = 4 * GROUPS
    across = tl.cdiv(elements, columns)
    program = tl.program_id(0).to(tl.int64)
    row = program // across * ROWS + tl.arange(0, ROWS)
    return row, program % across * columns


@triton.jit
def read_counter(seed, step, seed_on_device, step_on_device):
    """The seed and the step of a launch: numbers, or what stands on the device."""
    if seed_on_device is not None:
        seed = tl.load(seed_on_device).to(tl.uint64, bitcast=True)
    if step_on_device is not None:
        step = tl.load(step_on_device).to(tl.uint32)
    return seed, step


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
