"""How times are measured: contestants in turn, in one process, with one allocator; medians and quartiles.

Times drift with the clock rate and with other programs. So every round runs each contestant once, in a new random
order, and numbers that are compared were measured at the same time.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastguide as fg

SAMPLE = 1e-3  # seconds: the least time of one sample; shorter calls are repeated within it
LONG = 1.0  # seconds: longer calls are not called again to warm up
MOST_ROUNDS = 101

_L2_FLUSH = 1 << 28  # bytes: larger than the second-level cache of any GPU


def alternate(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, least_rounds: int = 5
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of each contestant, one sample in each round, for about ``seconds`` in all. Also the errors of
    those that raised."""
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    repeats, lasts, broken = {}, {}, {}
    for name, call in calls.items():
        try:
            measure(call, 1)  # compiles, allocates memory and touches its pages
            lasts[name] = max(measure(call, 1), 1e-9)
            repeats[name] = max(1, math.ceil(SAMPLE / lasts[name]))
        except Exception as error:  # keep the reason, and go on with the others
            broken[name] = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"

    times: dict[str, list[float]] = {name: [] for name in repeats}
    order, shuffle, rounds = list(repeats), random.Random(0).shuffle, 0
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < least_rounds or (rounds < MOST_ROUNDS and time.perf_counter() < end):
            shuffle(order)
            for name in order:
                if lasts[name] < LONG:  # untimed: brings its memory into the caches again
                    calls[name]()
                times[name].append(measure(calls[name], repeats[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times, broken


def _on_cpu(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _on_gpu(call: Callable[[], Any], repeats: int) -> float:
    """The time between two events on the stream. It includes waits for a host that is too slow to launch."""
    torch.empty(_L2_FLUSH, dtype=torch.int8, device="cuda").zero_()  # empties the cache
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


# --- the allocator ------------------------------------------------------------------------------------------

AS_USERS_HAVE_IT = "the process's own, as users have it"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>


def keep_memory() -> str:
    """Make glibc keep freed memory, for all contestants. Returns a description.

    By default glibc maps every block above some size (128 KiB to 32 MiB, adaptive) anew and returns it when it is
    freed. A large new tensor then costs page faults, which can double or triple the time of a call. Some blocks are
    above the largest threshold that glibc accepts, so mapping is turned off.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "the allocator's own defaults: this C library has no mallopt"
    if mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1):
        return "glibc, set to keep freed memory (mallopt: M_MMAP_MAX 0, M_TRIM_THRESHOLD -1), for all alike"
    return "glibc's own defaults: mallopt refused"


# --- the machine --------------------------------------------------------------------------------------------


def machine(device: torch.device, allocator: str) -> dict[str, Any]:
    """The facts about the machine that someone needs to repeat a number."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "instruction_set": fg.backends()["cpu"].details.get("instruction_set", "no compiled kernels"),
        "allocator": allocator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }
    return found


def commit(folder: Path = Path(__file__).parent) -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
