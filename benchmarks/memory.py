"""Peak memory, each measured in a process of its own with glibc's own allocator settings.

``measure`` starts ``python -m benchmarks.memory WHAT DEVICE SIZE...``, which prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguide import ops
from fastguide.ops.resample.reference import _exp_times

from . import timing

CHUNK = 1 << 22  # particles checked at a time


def measure(what: str, device: torch.device, *sizes: int) -> dict[str, float]:
    """The results of `resample` or `gather`, run in a new process. Raises with its last output if it failed."""
    command = [sys.executable, "-m", "benchmarks.memory", what, str(device), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=1800)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{' '.join(command[1:])}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in the child -------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """The largest number of bytes held during ``call``, less those held before, and what it returned."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    before = _high_water()
    result = call()
    return _high_water() - before, result


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def resample(device: torch.device, particles: int) -> dict[str, float]:
    """Peak bytes beyond the input, wrong offspring counts, and the median time of three calls, in seconds."""
    log_weights = torch.empty(particles, device=device).normal_(generator=torch.Generator(device).manual_seed(0))

    def call() -> tuple[Tensor, ...]:
        return ops.resample(log_weights, seed=7)

    ops.resample(log_weights[:1000].clone(), seed=7)  # so that threads and code do not count for the peak
    peak, (ancestors, *_) = peak_of(call, device)
    wrong = wrong_offspring(log_weights, ancestors)
    del ancestors, _
    times = []
    for _ in range(3):
        start = timing.now(device)
        call()
        times.append(timing.now(device) - start)
    return {"bytes": peak, "wrong": wrong, "seconds": statistics.median(times)}


def wrong_offspring(log_weights: Tensor, ancestors: Tensor) -> int:
    """How many particles have a number of offspring other than ``floor`` or ``ceil`` of ``N q_k / Q``, in integers.
    Both arguments are ``[K]``; ancestors ascend."""
    particles = len(log_weights)
    scale = 62 - max(particles - 1, 0).bit_length()
    top = log_weights.max().double()
    starts = range(0, particles, CHUNK)
    total = sum(int(_integer_weights(log_weights[i : i + CHUNK], top, scale).sum()) for i in starts)
    wrong = 0
    for i in starts:
        expected = particles * _integer_weights(log_weights[i : i + CHUNK], top, scale)  # below 2^62, as N = K
        low, more = expected // total, expected % total > 0
        edges = torch.tensor([i, i + len(low)], dtype=ancestors.dtype, device=ancestors.device)
        first, last = torch.searchsorted(ancestors, edges).tolist()
        offspring = torch.bincount(ancestors[first:last] - i, minlength=len(low))
        wrong += int(((offspring < low) | (offspring > low + more.long())).sum())
    return wrong


def _integer_weights(log_weights: Tensor, top: Tensor, scale: int) -> Tensor:
    """`reference.integer_weights` for some particles ``[n]`` of a row, from the maximum and scale of the row. For a
    whole row of 1e8 that function would take 9 GB."""
    return _exp_times(log_weights.double() - top, scale)[0]


def gather(device: torch.device, particles: int, elements: int) -> dict[str, float]:
    """Peak bytes of a state and gathering it: ours in place, and ``index_select`` into a second buffer."""
    state = torch.ones(particles, elements, device=device)
    log_weights = 0.5**0.5 * torch.randn(particles, device=device)
    ancestors = ops.resample(log_weights, seed=7, sorted=False)[0]
    ops.gather_particles_(ancestors, state)
    ours, _ = peak_of(lambda: ops.gather_particles_(ancestors, state), device)
    torch.index_select(state[:100], 0, ancestors[:100] % 100)
    theirs, _ = peak_of(lambda: torch.index_select(state, 0, ancestors), device)
    return {"ours": state.nbytes + ours, "index_select": state.nbytes + theirs}


def _limit() -> None:
    """Limit this process to the memory that is free now, so that it fails and not the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.8 * free), -1))


if __name__ == "__main__":
    what, device, *sizes = sys.argv[1:]
    if device == "cpu":  # a GPU driver maps far more memory than it uses
        _limit()
    print(json.dumps({"resample": resample, "gather": gather}[what](torch.device(device), *map(int, sizes))))
