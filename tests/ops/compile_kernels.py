"""Compiles the Triton kernels for GPUs that need not be there, and prints one line of JSON for each.

``python tests/ops/compile_kernels.py`` (without TRITON_INTERPRET), on every core. Registers and spills are those that
ptxas reports. Every kernel is compiled for every architecture, for some of them in one form alone, unless
FASTGUIDE_EVERY_KERNEL=1 asks for every form, dtype and tile.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from fastguide.ops import _triton as tiles
from fastguide.reference import FAMILIES

# Not by an import statement: in fastguide.ops, the name of an operation is a function.
NAMES = ("log_prob_and_gradient", "predict_x0", "propose_and_weigh", "randn", "reverse_step", "solve_positive_part")
log_prob_and_gradient, predict_x0, propose_and_weigh, randn, reverse_step, solve_positive_part = (
    importlib.import_module(f"fastguide.ops.{name}.triton") for name in NAMES
)

EVERY = os.environ.get("FASTGUIDE_EVERY_KERNEL") == "1"
# What is compiled for which architecture. Registers hardly differ between them, nor between dtypes: the one that has
# fewest instructions for bfloat16 gets that.
PARTS = ((90, "fp32"), (80, "bf16"), (100, "fp32"), (90, None), (80, None), (100, None))
PARTS += ((90, "bf16"),) * EVERY
WHOLE = {(90, "fp32"), (90, None)}  # of the others the last form of each kernel
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
INTEGERS = dict(particles="i32", elements="i64", seed="u64", step="u32", stream="u32", first_particle="i64")
INTEGERS |= dict.fromkeys(("samples", "y_rows", "extra_rows", "splits", "number", "size"), "i32")
FLOATS = dict.fromkeys(("p", "q", "a", "b", "tau", "c", "low", "high", "variance", "df"), "fp32")
FLOATS |= dict.fromkeys(
    ("guidance_scale", "displacement_scale", "extra_variance_scale", "of_x", "of_output", "of_unconditional"), "fp32"
)
FLOATS |= dict.fromkeys(("scale", "background", "constant"), "fp64")
ABSENT = dict.fromkeys(
    (
        "displacement",
        "unconditional",
        "not_finite",
        "x0",
        "table",
        "bounds",
        "seed_on_device",
        "step_on_device",
        "sums",
        "extra_variance",
        "rows",
        "constants",
    )
)


def cases(state: str) -> Iterator[tuple[str, object, dict[str, str], dict[str, object], tuple[int, int] | None]]:
    """For each kernel: its name, which begins with the operation's; the kernel; the types of its pointers; constants;
    and how many states it reads and writes, or None if it also moves other large tensors."""
    pointer, count = f"*{state}", dict(ALIGN=16, ABREAST=4 // TYPES[state] if state == "fp32" else 2)
    step = dict(x=pointer, output=pointer, x_s=pointer)
    weigher = propose_and_weigh.propose_and_weigh_kernel
    flags = dict(SAMPLE=False, CLIP=True, CLIP_NOISE=True, NOISE=True, X0=False)
    table = dict(
        displacement=pointer, x0=pointer, not_finite="*i32", table="*fp32", bounds="*fp32", seed_on_device="*i64"
    )
    weigh = dict(x=pointer, x0_hat=pointer, displacement=pointer, x_s=pointer, before="*fp64", after="*fp64")
    kernel = reverse_step.reverse_step_kernel
    split = dict(SPLIT=propose_and_weigh.SPLIT, BLOCK=propose_and_weigh.BLOCK)
    yield "randn", randn.randn_kernel, dict(out=pointer), count, (0, 1)
    outputs = dict(x=pointer, output=pointer, unconditional=pointer, x0=pointer)
    gradients = dict(grad=pointer, grad_x=pointer, grad_output=pointer, grad_unconditional=pointer)
    for name, flags_of in (("predict_x0", {}), ("predict_x0, watched", dict(not_finite="*i32"))):
        yield name, predict_x0.predict_x0_kernel, outputs | flags_of, count | dict(SAMPLE=False), (3, 1)
    yield "predict_x0_backward", predict_x0.predict_x0_backward_kernel, gradients, count, (1, 3)
    yield "reverse_step", kernel, step, count | flags, (2, 1)
    guided = dict(unconditional=pointer, not_finite="*i32")
    yield "reverse_step, guided and watched", kernel, step | guided, count | flags, (3, 1)
    yield "reverse_step, deterministic", kernel, step, count | flags | dict(NOISE=False), (2, 1)
    each = flags | dict(X0=True, CLIP=False, CLIP_NOISE=False)
    yield "reverse_step, per sample", kernel, step | table, count | each, (3, 2)
    split = split | dict(CLIP=True)
    yield "propose_and_weigh", weigher, weigh, count | split, (3, 1)
    more = dict(sums="*fp64", not_finite="*i32", extra_variance="*fp64")
    yield "propose_and_weigh, split, watched and wide", weigher, weigh | more, count | split, (3, 1)

    density, alike = dict(z=pointer, y="*fp32", gradient=pointer, sums="*fp64"), dict(ALIGN=16)
    for code, family in enumerate(FAMILIES):
        more = dict(rows="*i64", constants="*fp64") if family == "poisson" else dict(extra_variance="*fp32")
        number = dict(FAMILY=code, SPLIT=log_prob_and_gradient.SPLIT, BLOCK=log_prob_and_gradient.BLOCK)
        kernel = log_prob_and_gradient.log_prob_and_gradient_kernel
        yield f"log_prob_and_gradient, {family}", kernel, density | more, alike | number, None


def cases_without_states() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], tuple[int, int]]]:
    """The same as `cases`, for kernels without states."""
    sums = dict(BLOCK=tiles.SUM_BLOCK)
    weigh = dict(sums="*fp64", before="*fp64", after="*fp64")
    yield "weigh", propose_and_weigh.weigh_kernel, weigh, sums, (0, 0)
    yield "weigh, wide", propose_and_weigh.weigh_kernel, weigh | dict(extra_variance="*fp64"), sums, (0, 0)
    yield "total", log_prob_and_gradient.total_kernel, dict(sums="*fp64", total="*fp64"), sums, (0, 0)
    matrices = dict(gram="*fp64", residual="*fp64", solution="*fp64", log_density="*fp64")
    for m in (16, 4):  # one matrix a program, which takes seconds to compile, and several
        several = min(solve_positive_part.PRODUCTS // m**3, solve_positive_part.MOST)
        kernel = solve_positive_part.solve_positive_part_kernel
        yield f"solve_positive_part, {m}", kernel, matrices, dict(BLOCK=several, MATRICES=several, M=m), (0, 0)


def compiled(kernel, pointers: dict[str, str], constants: dict[str, object], architecture: int, warps: int) -> dict:
    signature, attributes = {}, {}
    known = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        if name in known or (name in ABSENT and name not in pointers):
            signature[name] = "constexpr"
            known.setdefault(name, None)
        else:
            signature[name] = pointers.get(name) or INTEGERS.get(name) or FLOATS[name]
        if name in pointers:
            attributes[(place,)] = [["tt.divisibility", 16]]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = triton.compile(
            ASTSource(kernel, signature, known, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options=dict(num_warps=warps, **tiles.OPTIONS),
        )
    ptx, cubin, report = result.asm["ptx"], result.asm["cubin"], said.getvalue()
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return dict(
        cubin=len(cubin),
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared=result.metadata.shared,
        recompiled_for=[p.name for p in kernel.params if p.name in INTEGERS and not p.do_not_specialize],
        loads=len(re.findall(r"ld\.global", ptx)),
        wide_loads=len(re.findall(r"ld\.global[^;]*\.v4\.b32", ptx)),
        wide_stores=len(re.findall(r"st\.global[^;]*\.v4\.b32", ptx)),
    )


def compile_all(architecture: int, state: str | None) -> list[str]:
    """A line of JSON for each kernel: for states of one dtype, or for kernels without states."""
    lines = []
    # Among configurations with equally many elements per thread, the last needs the most registers.
    configs = (tiles.CONFIGS[0], tiles.CONFIGS[-1])[-1 - EVERY :] if architecture == 90 else tiles.CONFIGS[1:2]
    found = [*(cases(state) if state else cases_without_states())]
    if not EVERY and (architecture, state) not in WHOLE:
        found = list({case[1]: case for case in found}.values())
    for name, kernel, pointers, constants, moved in found:
        for config in tiles.CONFIGS[1:2] if "BLOCK" in constants else configs:
            block = constants.get("BLOCK", config.kwargs["BLOCK"])
            tile = dict(BLOCK=block, ROWS=1, GROUPS=block // 4)
            family = name.removeprefix("log_prob_and_gradient, ")
            warps = log_prob_and_gradient.warps_of(family) if family != name else config.num_warps
            made = compiled(kernel, pointers, constants | tile, architecture, warps)
            about = dict(
                name=name, kernel=kernel.fn.__name__, state=state, architecture=architecture, block=block, moved=moved
            )
            lines.append(json.dumps(about | made))
    return lines


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(PARTS))) as pool:
        for lines in pool.starmap(compile_all, PARTS, chunksize=1):
            print(*lines, sep="\n")


if __name__ == "__main__":
    main()
