"""What the Triton kernels share: tiles of ``[particles, elements]``, launches, and normals.

The normals are added while a state is in registers. Philox4x32-10 is Triton's own; the counters are exactly those of
``csrc/common/philox.h``. The floating-point operations are those of ``csrc/common/math.h`` and ``normal.h``, where
comments say why they are right. They need multiply-adds to be fused only where written, so kernels are launched with
``enable_fp_fusion=False``.
"""

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

# ``do_not_specialize`` of every kernel: special values of these arguments (1, multiples of 16) compile no new kernel.
VARYING = ["particles", "seed", "step", "stream", "first_particle"]

OPTIONS = {} if INTERPRETED.value else {"enable_fp_fusion": False}  # options of every launch

_LEAST_GROUPS = 8  # a tile's row has at least so many groups, if the particle has: 128 bytes of float32


def ceil_div(a: int, b: int) -> int:
    """The same as `triton.cdiv`, which takes 2 us on the host."""
    return -(-a // b)


def groups_of_tile(elements: int, block: int) -> int:
    """How many groups of four elements a tile's row has: a power of two, at most ``block`` elements. It is the largest
    number with which tiles exceed the end of a row by at most an eighth of the row."""
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
    """The largest power of two up to 16 that divides the number of elements, which the compiler may rely on."""
    return math.gcd(elements, 16)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16. Kernels that sum need this: for other
    addresses the compiler lays out tiles differently and sums in another order."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def abreast(dtype: torch.dtype) -> int:
    """How many groups of normals fill 16 bytes of a state."""
    return 1 if dtype == torch.float32 else 2


@functools.cache  # needed at every launch
def shape_of_tile(elements: int, block: int, abreast: int) -> tuple[int, int]:
    """``(ROWS, GROUPS)`` of a launch whose tiles have ``block`` elements."""
    groups = max(groups_of_tile(elements, block), abreast)
    return max(1, block // (4 * groups)), groups


def _shape_of_config(args: Mapping[str, Any]) -> tuple[int, int]:
    return shape_of_tile(args["elements"], args["BLOCK"], args["ABREAST"])


_HEURISTICS = {"ROWS": lambda args: _shape_of_config(args)[0], "GROUPS": lambda args: _shape_of_config(args)[1]}

CONFIGS = [triton.Config(dict(BLOCK=block), num_warps=warps) for block, warps in ((1024, 4), (2048, 4), (4096, 8))]

_WORTH_TUNING = 1 << 22  # elements; below this, every configuration takes about as long as its launch


class Tuned:
    """An element-wise kernel in two forms. Large states take the fastest of `CONFIGS`. It is measured once for each set
    of the constants ``key``; this must happen before a capture. Other states take the first of `CONFIGS`.

    The kernel has arguments ``particles, elements`` and five constants. The call passes ``ALIGN`` and ``ABREAST``, from
    `alignment` and `abreast`. ``BLOCK, ROWS, GROUPS`` are added here; `tile_of_program` gives the tile."""

    def __init__(self, kernel: Any, key: list[str]):
        self.plain = kernel
        self.large = triton.autotune(CONFIGS, key)(triton.heuristics(_HEURISTICS)(kernel))

    def __call__(self, particles: int, elements: int, *args: Any, **constants: Any) -> None:
        """``args``: the kernel's arguments. The first is a state ``[particles, elements]``."""

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
    """Makes the device of ``x`` the current one, because Triton launches on the current device."""
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
    """The seed and the step of a launch: numbers, or values read from the device."""
    if seed_on_device is not None:
        seed = tl.load(seed_on_device).to(tl.uint64, bitcast=True)
    if step_on_device is not None:
        step = tl.load(step_on_device).to(tl.uint32)
    return seed, step


@triton.jit
def flag_not_finite(flag, tile):
    """Sets the flag if a value of the ``tile`` ``[ROWS, COLUMNS]`` is NaN or infinite."""
    finite = tl.abs(tile) < float("inf")  # False for NaN
    tl.store(flag, 1, mask=tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 rounded to the nearest value of ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, up, value)
    return value.to(dtype)


# --- sums ---------------------------------------------------------------------------------------------------


@triton.jit
def sum_of_splits(sums, row, splits, BLOCK: tl.constexpr):
    """The sum ``[1]`` of the float64 parts ``sums[row]`` of ``sums`` ``[rows, splits]``. The order of the sum depends
    only on the number of parts; with `torch.sum` it would depend on the number of rows too."""
    total = tl.zeros([1, BLOCK], tl.float64)
    for first in range(0, splits, BLOCK):
        place = first + tl.arange(0, BLOCK)[None, :]
        total += tl.load(sums + row[:, None] * splits + place, mask=place < splits, other=0.0)
    return tl.sum(total, axis=1)


SUM_BLOCK = 64  # parts that are added at a time; not tuned, because the order of a sum depends on it


# --- normals ------------------------------------------------------------------------------------------------


def _constants(*values: str) -> tl.constexpr:
    """Several numbers as one global, because Triton checks each global at every launch."""
    return tl.constexpr(tuple(float.fromhex(value) for value in values))


_LOG = _constants(
    "0x1.be525ap-9", "-0x1.3cfc7cp-7", "0x1.f88f3p-7", "-0x1.2f3e04p-7", "0x1.5c3ae6p-7", "0x1.6830e8p-7",
    "0x1.01e9dap-5", "0x1.5542f6p-4", "0x1.00001ep-2",
)  # fmt: skip
_TWO_LN2 = tl.constexpr(float.fromhex("0x1.62e43p+0"))
_SIN = _constants("-0x1.2d7928p-8", "0x1.465e16p-4", "-0x1.4abbb8p-1", "-0x1.a34p-25", "0x1.921fb6p+0")
_COS = _constants("0x1.d4f7eep-11", "-0x1.55b2b6p-6", "0x1.03c1bp-2", "-0x1.3bd3ccp+0")


@triton.jit
def _minus_two_log(w):
    """-2 ln((w + 1) / 2^32)."""
    c = (w ^ 0xFFFFFFFF).to(tl.int32, bitcast=True)
    above_half = c >= 0
    high = c & -256
    leading = 414 - (c.to(tl.float32).to(tl.uint32, bitcast=True) >> 23).to(tl.int32)
    halvings = tl.where(above_half, 0, leading)
    scale = ((halvings + 96) << 23).to(tl.float32, bitcast=True)
    s_high = tl.fma(high.to(tl.float32), scale, tl.where(above_half, 0.0, 2.0))
    s_low = (c - high).to(tl.float32) * scale
    s = s_high + s_low
    q = tl.fma(s, _LOG[0], _LOG[1])
    q = tl.fma(q, s, _LOG[2])
    q = tl.fma(q, s, _LOG[3])
    q = tl.fma(q, s, _LOG[4])
    q = tl.fma(q, s, _LOG[5])
    q = tl.fma(q, s, _LOG[6])
    q = tl.fma(q, s, _LOG[7])
    q = tl.fma(q, s, _LOG[8])
    return tl.fma(halvings.to(tl.float32), _TWO_LN2, s_high + tl.fma(s * s, q, s_low))


@triton.jit
def _cos_sin_of_turn(w):
    """Cosine and sine of 2 pi w / 2^32."""
    y = (w << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    z = y * y
    tail = tl.fma(z, _SIN[0], _SIN[1])
    tail = tl.fma(tail, z, _SIN[2])
    tail = tl.fma(tail, z, _SIN[3])
    s = tl.fma(y, _SIN[4], y * tail)
    bend = tl.fma(z, _COS[0], _COS[1])
    bend = tl.fma(bend, z, _COS[2])
    bend = tl.fma(bend, z, _COS[3])
    c = tl.fma(bend, z, 1.0)
    turned = w + 0x20000000  # its two top bits are the quadrant
    odd = (turned & 0x40000000) != 0
    cos_sign, sin_sign = (turned + 0x40000000) & 0x80000000, turned & 0x80000000
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = (cos.to(tl.uint32, bitcast=True) ^ cos_sign).to(tl.float32, bitcast=True)
    return cos, (sin.to(tl.uint32, bitcast=True) ^ sin_sign).to(tl.float32, bitcast=True)


@triton.jit
def _four_normals(seed, step, stream, particle, group):
    """Elements 4g .. 4g + 3 of each particle (int64) and group g. Particles and groups are broadcast."""
    low = particle.to(tl.uint32)
    high = ((particle >> 32).to(tl.uint32) & 0xFFFF) | (stream.to(tl.uint32) << 16)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), low, high, step.to(tl.uint32))
    r01, r23 = tl.sqrt_rn(_minus_two_log(w0)), tl.sqrt_rn(_minus_two_log(w2))
    c01, s01 = _cos_sin_of_turn(w1)
    c23, s23 = _cos_sin_of_turn(w3)
    return r01 * c01, r01 * s01, r23 * c23, r23 * s23


@triton.jit
def normals(seed, step, stream, particle, first_group, GROUPS: tl.constexpr, ABREAST: tl.constexpr):
    """The normals ``[ROWS, 4 GROUPS]`` of ``particle`` ``[ROWS]`` (int64) and the groups from ``first_group`` on.
    A thread makes ABREAST (1 or 2) groups in a row: as many elements as 16 bytes of a state hold."""
    particle = particle[:, None]
    if ABREAST == 1:
        group = first_group + tl.arange(0, GROUPS)[None, :]
        z0, z1, z2, z3 = _four_normals(seed, step, stream, particle, group)
    else:
        group = first_group + 2 * tl.arange(0, GROUPS // 2)[None, :]
        a0, a1, a2, a3 = _four_normals(seed, step, stream, particle, group)
        b0, b1, b2, b3 = _four_normals(seed, step, stream, particle, group + 1)
        z0, z1, z2, z3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    # The last join makes the fastest dimension.
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return z.reshape([particle.shape[0], 4 * GROUPS])
