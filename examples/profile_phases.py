"""Where the time of a run goes: the phases of TDS on the digits.

    python examples/profile_phases.py --out fastguide-examples

prints a table by torch.profiler, and writes a trace for https://ui.perfetto.dev. On a GPU the host's time says little,
as the kernels run later. There,

    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop \\
        python examples/profile_phases.py --device cuda --nsys

shows the same phases as NVTX ranges above the kernels. The ranges are free when no profiler is attached.
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

import fastguide as fg
from fastguide import digits
from fastguide.profiling import phase

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--particles", type=int, default=256)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
parser.add_argument("--nsys", action="store_true", help="run for Nsight Systems, without torch.profiler")
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the trace")
options = parser.parse_args()

prior, operator = digits.prior(device=options.device), fg.operators.AveragePool(2)
y = operator(digits.held_out()[0][:1])
likelihood = fg.likelihoods.Gaussian(y, operator, scale=0.1)
guidance = fg.TDS(likelihood, particles=options.particles, covariance="isotropic")


def run():
    with phase("run"):  # a range of one's own, beside those of the phases
        fg.sample(prior, (1, 1, 8, 8), guidance=guidance, steps=options.steps, seed=0, device=options.device)
        if options.device == "cuda":
            torch.cuda.synchronize()


run()  # warms up
if options.nsys:
    with torch.cuda.profiler.profile():
        run()
else:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    ranges = {e.key: e for e in profiler.key_averages() if e.key.startswith("fastguide.")}
    total = ranges["fastguide.run"].cpu_time_total
    print(f"{'range':22}{'calls':>6}{'host ms':>9}{'share':>8}")
    for name, event in sorted(ranges.items(), key=lambda item: -item[1].cpu_time_total):
        print(f"{name:22}{event.count:6d}{event.cpu_time_total / 1e3:9.1f}{event.cpu_time_total / total:8.1%}")
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "profile_phases.json"))
