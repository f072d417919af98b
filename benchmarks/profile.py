"""``python -m benchmarks.profile --sampler NAME [--steps N] [--particles K] [--device cuda] [--eager]``

One run of a sampler on the digits prior, for Nsight Systems and Nsight Compute. It is between cudaProfilerStart and
cudaProfilerStop, in the NVTX range ``fastguide.run``, after a run that warms up. On a GPU the loop is one CUDA graph,
unless ``--eager`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

from fastguide.profiling import phase

from . import timing
from .cases import Setting
from .samplers.digits import METHODS, Digits


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--sampler", choices=METHODS, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--particles", type=int, default=1024, help="samples of those that have no particles")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--eager", action="store_true", help="without a CUDA graph, so that each phase has its range")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")

    device = torch.device(options.device)
    task = Digits(Setting(device), options.sampler, observations=1, samples=options.particles)
    task.steps = options.steps
    run = task.run if options.device == "cpu" or options.eager else task.capture()
    run()
    with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext(), phase("run"):
        begin = timing.now(device)
        run()
        seconds = timing.now(device) - begin
    print(f"{options.sampler}, {options.steps} steps, {options.particles} samples on {device}: {seconds:.4f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
