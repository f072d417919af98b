"""Standard normals from counters: Philox4x32-10 and Box-Muller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import IntOrTensor

__all__ = ["philox", "randn"]

MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product. int64 may overflow, but its bits are right."""
    product = a * b
    return (product >> 32) & MASK32, product & MASK32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[IntOrTensor, IntOrTensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words from a counter of four words and a key of two.

    Args:
        counter: Four int64 tensors with values in ``[0, 2^32)``.
        key: Two integers or int64 tensors with values in ``[0, 2^32)``.

    Returns:
        Four int64 tensors with values in ``[0, 2^32)``.

    Source:
        Salmon et al. 2011 (Random123).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def words(
    particles: int,
    groups: int,
    seed: IntOrTensor,
    step: IntOrTensor,
    stream: int,
    first_particle: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Four words ``[particles, groups]`` for each particle and group of four elements.

    The counter's words are the group; the low word of the particle; the particle's next 16 bits, with the stream above
    them; and the step. The key is the seed.
    """
    particle = torch.arange(first_particle, first_particle + particles, device=device)[:, None]
    group = torch.arange(groups, device=device)[None, :]
    zero = torch.zeros_like(particle + group)
    counter = (
        zero + group,
        zero + (particle & MASK32),
        zero + ((particle >> 32) | (stream << 16)),
        zero + step,
    )
    return philox(counter, (seed & MASK32, (seed >> 32) & MASK32))


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 normals ``r cos`` and ``r sin`` from two words.

    ``r = sqrt(-2 log((w0 + 1) / 2^32))``, and the angle is ``2 pi w1 / 2^32``. The quadrant is taken off in integers,
    so that the cosine and the sine keep their relative accuracy.
    """
    r = torch.sqrt(-2.0 * torch.log((w0 + 1).double() * 2.0**-32))
    quadrant = (w1 + (1 << 29)) >> 30
    angle = (w1 - (quadrant << 30)).double() * (2.0 * math.pi * 2.0**-32)
    c, s = torch.cos(angle), torch.sin(angle)
    odd, quadrant = (quadrant & 1).bool(), quadrant & 3
    cos = torch.where(odd, s, c) * torch.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0).double()
    sin = torch.where(odd, c, s) * torch.where(quadrant >= 2, -1.0, 1.0).double()
    return r * cos, r * sin


def randn(
    shape: Sequence[int],
    *,
    seed: IntOrTensor,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of the given shape; ``shape[0]`` counts particles. See `fastguide.ops.randn`.

    Four elements of a particle come from the four words of `philox`, by Box-Muller in float64.
    """
    device = torch.device(device)
    particles, elements = shape[0], math.prod(shape[1:])
    w0, w1, w2, w3 = words(particles, (elements + 3) // 4, seed, step, stream, first_particle, device)
    z = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1).flatten(1)[:, :elements]
    if dtype in (torch.float16, torch.bfloat16):
        z = z.float()  # as in a kernel, which rounds the float32 value
    return z.to(dtype).reshape(tuple(shape)).contiguous()
