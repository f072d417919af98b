"""`fastguide.ops.randn` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .noise import normals
from .tiles import CONFIGS, HEURISTICS, OPTIONS, abreast, alignment, counter, grid, rounded, tile_of_program


@triton.autotune(CONFIGS, key=["elements"])
@triton.heuristics(HEURISTICS)
@triton.jit
def randn_kernel(
    out, particles, elements: tl.int64, seed: tl.uint64, step: tl.uint32, stream: tl.uint32, first_particle: tl.int64,
    seed_on_device, step_on_device,
    ALIGN: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    if seed_on_device is not None:
        seed = tl.load(seed_on_device).to(tl.uint64, bitcast=True)
    if step_on_device is not None:
        step = tl.load(step_on_device).to(tl.uint32)
    elements = elements // ALIGN * ALIGN  # says that it is a multiple
    row, column = tile_of_program(particles, elements, ROWS, GROUPS)
    z = normals(seed, step, stream, first_particle + row, column // 4, GROUPS, ABREAST)
    columns = column + tl.arange(0, 4 * GROUPS)
    mask = (row < particles)[:, None] & (columns < elements)[None, :]
    tl.store(out + row[:, None] * elements + columns[None, :], rounded(z, out.dtype.element_ty), mask=mask)


def randn(
    out: torch.Tensor, seed: int | torch.Tensor, step: int | torch.Tensor, stream: int, first_particle: int
) -> None:
    """Fill ``out [N, *event]``, contiguous, with the standard normals of `fastguide.ops.randn`; returns at once."""
    if out.numel() == 0:
        return
    particles = out.shape[0]
    elements = out.numel() // particles
    randn_kernel[grid(particles, elements)](
        out, particles, elements, *counter(seed, step, stream, first_particle),
        ALIGN=alignment(elements), ABREAST=abreast(out.dtype), **OPTIONS,
    )  # fmt: skip
