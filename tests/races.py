"""Another thread writes to the inputs of a kernel while it reads them. The results may be any numbers. But no other
memory is read or written, every ancestor is a particle, and the kernel returns.

The races run in a new process with this file as its program, so that a crash is a failed assertion:
``races.py SECONDS [MODULE]``, with the CPU's kernels or with the emulated ones of ``MODULE``.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch

import fastguide
from fastguide import ops
from fastguide.ops import _native
from fastguide.reference import SCHEMES, DynamicThreshold

Case = tuple[str, Callable[[int], object], Callable[[int], object]]  # a name; write(which of four); read(seed)
WILD = torch.iinfo(torch.int32)
BACKEND = "cuda" if len(sys.argv) > 2 else "cpu"  # in the process with the races


def resample(
    scheme: str, sorted: bool, threshold: float | None, dtype: torch.dtype, rows: int = 1, particles: int = 60_000
) -> Case:
    log_weights, kinds = torch.zeros(rows, particles, dtype=dtype), torch.zeros(4, particles, dtype=dtype)
    kinds[0].normal_(0.0, 5.0)
    kinds[1, 1:] = -torch.inf
    kinds[2].normal_(0.0, 300.0)
    kinds[3].normal_(1e3, 5.0)
    kinds[3, ::1000] = torch.nan

    def read(seed: int) -> None:
        torch.set_num_threads(1 + seed % 2)
        options = dict(sorted=sorted, ess_threshold=threshold, seed=seed, check=False, backend=BACKEND)
        ancestors = ops.resample(log_weights, scheme=scheme, **options)[0]
        low, high = ancestors.min(), ancestors.max()
        assert low >= 0 and high < particles, f"ancestors from {low} to {high}"

    name = f"resample {scheme} {sorted=} {threshold=} {dtype} {rows=}"
    return name, lambda i: log_weights.copy_(kinds[i]), read


def gather(name: str, kinds: list[torch.Tensor], events: list[tuple[int, ...]], dtype: torch.dtype) -> Case:
    kinds = [kind.to(dtype) for kind in kinds]
    ancestors = kinds[0].clone()
    states = [torch.zeros(*ancestors.shape, *event) for event in events]

    def read(seed: int) -> None:
        torch.set_num_threads(1 + seed % 2)
        try:
            ops.gather_particles_(ancestors, *states, backend=BACKEND)
        except ValueError as error:  # it saw an ancestor or a row out of range
            assert "ancestors: expected values in" in str(error)

    return f"gather {name} {events} {dtype}", lambda i: ancestors.copy_(kinds[i % len(kinds)]), read


def gathers() -> list[Case]:
    particles = 20_000
    uniform, places = torch.randint(particles, (2, particles)), torch.arange(particles)
    survivors = torch.where(torch.isin(places, uniform[0]), places, uniform[0]).expand(2, particles)
    wild = torch.randint(WILD.min, WILD.max, (2, particles))
    tangled = [uniform, uniform.flip(1), wild, survivors]
    kept = [survivors, wild, survivors, survivors.flip(1)]
    return [
        gather("ascending", [uniform.sort().values, wild, uniform], [(4,)], torch.int64),
        gather("any order", tangled, [(4,)], torch.int64),
        gather("any order", tangled, [(4,)], torch.int32),
        gather("several states", tangled, [(), (7,), (2, 20)], torch.int64),
        gather("survivors in place", kept, [(4,)], torch.int64),
        gather("survivors in place", kept, [(20,)], torch.int32),
    ]


def rows_of_y(family: str, elements: int) -> Case:
    samples = 20_000
    z, y = torch.randn(samples, elements), torch.ones(50, elements)
    rows, good = torch.zeros(samples, dtype=torch.int64), torch.arange(samples) % 50
    wild = torch.randint(WILD.min, WILD.max, (samples,))
    kinds = [good, wild, good.sort().values, wild]
    background = 1.0 if family == "poisson" else 0.0

    def read(_: int) -> None:
        try:
            ops.log_prob_and_gradient(z, y, family=family, scale=1.0, background=background, rows=rows)
        except ValueError as error:
            assert "rows: expected values in" in str(error)

    return f"rows of y {family} {elements}", lambda i: rows.copy_(kinds[i]), read


def dynamic_threshold() -> Case:
    x, output = torch.randn(8, 3000), torch.randn(8, 3000)
    kinds = [torch.randn(8, 3000) * 10.0**power for power in (-3, 0, 3, 30)]
    coefficients, clip = (0.5, 0.8, 0.8, 0.6, 0.1), DynamicThreshold(0.995, 10.0)

    def read(seed: int) -> None:
        ops.reverse_step(x, output, coefficients, prediction="epsilon", clip=clip, seed=seed)

    return "dynamic threshold", lambda i: output.copy_(kinds[i]), read


def mersenne_twister() -> Case:
    state, out = np.arange(625, dtype=np.uint32), np.empty(5000)
    position = state[624:].view(np.int32)

    def write(i: int) -> None:
        position[0] = (600, -(1 << 30), 1 << 30, 623)[i]

    def read(_: int) -> None:
        _native.module("cpu").mersenne_doubles(state.ctypes.data, position.ctypes.data, out.ctypes.data, len(out))

    return "mersenne twister", write, read


def race(write: Callable[[int], object], read: Callable[[int], object], seconds: float) -> None:
    end = time.perf_counter() + seconds

    def write_on() -> None:
        for i in itertools.cycle(range(4)):
            if time.perf_counter() > end:
                return
            write(i)

    thread = threading.Thread(target=write_on, daemon=True)
    thread.start()
    isas = _native.instruction_sets()
    for seed in itertools.count():
        if time.perf_counter() > end:
            break
        with _native.instruction_set(isas[seed // 2 % len(isas)]):
            read(seed)
    thread.join()


def cases() -> list[Case]:
    if BACKEND == "cuda":
        plain = itertools.product(SCHEMES, (True, False), (None,), (torch.float32,))
        return [resample(*of) for of in plain] + gathers()
    long = itertools.product(SCHEMES, (True, False), (None, 0.5), (torch.float32, torch.float64))
    short = itertools.product(SCHEMES, (False,), (None,), (torch.float32,), (30,), (3000,))  # weighed once
    resamples = [resample(*of) for of in (*long, *short)]
    others = [rows_of_y("gaussian", 3), rows_of_y("poisson", 40), dynamic_threshold(), mersenne_twister()]
    return resamples + gathers() + others


def check(seconds: float, *module: str) -> None:
    """Run the races for ``seconds`` in another process."""
    command = [sys.executable, __file__, str(seconds), *module]
    environment = os.environ | {"PYTHONPATH": str(Path(fastguide.__file__).parents[1])}  # the same package
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ran.returncode == 0 and ran.stdout.endswith("done\n"), (ran.returncode, ran.stdout[-200:], ran.stderr)


if __name__ == "__main__":
    if BACKEND == "cuda":
        emulated_cuda.serve(emulated_cuda.load(Path(sys.argv[2])), pytest.MonkeyPatch())
    torch.manual_seed(0)
    every = cases()
    for name, write, read in every:
        print(name, flush=True)
        race(write, read, float(sys.argv[1]) / len(every))
    print("done", flush=True)
