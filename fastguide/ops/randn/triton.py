"""`fastguide.ops.randn` in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._triton import VARYING, Tuned, abreast, alignment, normals, read_counter, rounded, tile_of_program


@triton.jit(do_not_specialize=VARYING)
def randn_kernel(
    out, particles, elements: tl.int64, seed: tl.uint64, step: tl.uint32, stream: tl.uint32, first_particle: tl.int64,
    seed_on_device, step_on_device,
    ALIGN: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    seed, step = read_counter(seed, step, seed_on_device, step_on_device)
    elements = elements // ALIGN * ALIGN  # tells the compiler that it is a multiple of ALIGN
    row, column = tile_of_program(particles, elements, ROWS, GROUPS)
    z = normals(seed, step, stream, first_particle + row, column // 4, GROUPS, ABREAST)
    columns = column + tl.arange(0, 4 * GROUPS)
    mask = (row < particles)[:, None] & (columns < elements)[None, :]
    tl.store(out + row[:, None] * elements + columns[None, :], rounded(z, out.dtype.element_ty), mask=mask)


_launch = Tuned(randn_kernel, key=["ALIGN"])


def call(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device, out=None):
    z = torch.empty(shape, dtype=dtype, device=device) if out is None else out[0]
    if z.numel():
        particles, elements = shape[0], math.prod(shape[1:])
        _launch(
            particles, elements, z, particles, elements,
            seed, step, stream, first_particle, seed_tensor, step_tensor,
            ALIGN=alignment(elements), ABREAST=abreast(dtype),
        )  # fmt: skip
    return z


@triton.jit
def _philox_kernel(out, seed: tl.uint64, c0: tl.uint32, c1: tl.uint32, c2: tl.uint32, c3: tl.uint32):
    lane = tl.arange(0, 4)
    zero = tl.zeros([4], tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero + c3)
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out + lane, word.to(tl.int32, bitcast=True))


def philox_words(out: torch.Tensor, counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    """Philox4x32-10 of one counter into ``out``, int32 ``[4]``. For tests of the known answers on the hardware."""
    _philox_kernel[(1,)](out, key[0] | key[1] << 32, *counter)
