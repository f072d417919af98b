"""The normals of `fastguide.ops.randn` as a Triton device function: added before a state leaves the registers.

Philox4x32-10 is Triton's own; its counters are those of ``csrc/common/philox.h``, integer for integer. The floats are
the operations of ``csrc/common/math.h`` and ``normal.h``, whose comments say why they are right: multiply-adds fused
where they are written and nowhere else, which is why kernels are launched with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _constants(*values: str) -> tl.constexpr:
    """One global: Triton looks at each at every launch."""
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
    """Elements 4g .. 4g + 3 of each particle (int64) and group, which are broadcast."""
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
    A thread makes ABREAST (1 or 2) groups that follow each other: as many elements as 16 bytes of a state hold."""
    particle = particle[:, None]
    if ABREAST == 1:
        group = first_group + tl.arange(0, GROUPS)[None, :]
        z0, z1, z2, z3 = _four_normals(seed, step, stream, particle, group)
    else:
        group = first_group + 2 * tl.arange(0, GROUPS // 2)[None, :]
        a0, a1, a2, a3 = _four_normals(seed, step, stream, particle, group)
        b0, b1, b2, b3 = _four_normals(seed, step, stream, particle, group + 1)
        z0, z1, z2, z3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    # The index that joins last is the one that counts fastest.
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return z.reshape([particle.shape[0], 4 * GROUPS])
