"""TDS on a mixture of 25 Gaussians, whose posterior and evidence are known exactly.

    python examples/tds_mixture.py --particles 4000 --out fastguide-examples

One number is measured: x1 + 0.6 x2, with noise. The table compares the estimate of log p(y) with the exact value. More
steps remove the bias, more particles the scatter. The picture has particles, evidence and effective sample size.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

import fastguide as fg

GRID, WIDTH = torch.arange(-2.0, 3.0), 0.15
MODES = torch.cartesian_prod(GRID, GRID)  # [25, 2]
A, NOISE, Y = torch.tensor([[1.0, 0.6]]), 0.25, torch.tensor([[0.9]])


def net(x, t):
    """E[x_0 | x_t] of the mixture, [n, 2], for x_t = (1 - t) x_0 + t eps: in place of a trained network."""
    alpha, sigma = 1 - t[:, None, None], t[:, None, None]
    variance = (alpha * WIDTH) ** 2 + sigma**2  # of x_t in one mode
    residual = x[:, None] - alpha * MODES  # [n, 25, 2]
    share = torch.softmax(-residual.square().sum(-1, keepdim=True) / (2 * variance), dim=1)
    return (share * (MODES + alpha * WIDTH**2 / variance * residual)).sum(1)


def log_joint(x):
    """log p(x) p(y | x) at points [..., 2]."""
    mode = Normal(MODES, WIDTH).log_prob(x[..., None, :]).sum(-1).logsumexp(-1) - math.log(len(MODES))
    return mode + Normal(x @ A[0], NOISE).log_prob(Y[0])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--particles", type=int, default=4000)
parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100, 200])
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the picture")
options = parser.parse_args()

prior = fg.Denoiser(net, fg.schedules.flow(), prediction="sample")
guidance = fg.TDS(fg.likelihoods.Gaussian(Y, fg.operators.Matrix(A), NOISE), particles=options.particles)
of_mode = Normal(MODES @ A.T, math.sqrt(WIDTH**2 * A.square().sum() + NOISE**2)).log_prob(Y)  # log p(y | mode)
exact, estimates = (of_mode.logsumexp(0) - math.log(len(MODES))).item(), []
print(f"exact log p(y) {exact:.3f}\n{'steps':>5} {'log p(y)':>9} {'scatter':>8} {'error':>7}")
for steps in options.steps:
    out = fg.sample(prior, (8, 2), guidance=guidance, steps=steps, seed=0)  # eight runs: the row of y serves all
    mean, scatter = out.log_evidence.mean().item(), out.log_evidence.std().item()
    print(f"{steps:5d} {mean:9.3f} {scatter:8.3f} {mean - exact:+7.3f}")
    estimates.append((mean, scatter))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
line = torch.linspace(-3, 3, 301)
density = (log_joint(torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)) - exact).exp()
left.scatter(*out.draw(1000)[0].T, s=3, color="C1", label="1000 draws of TDS")
left.contour(line, line, density, levels=[0.05, 0.2, 0.8], colors="black", linewidths=0.7)
left.set(title=f"TDS, {steps} steps; contours: exact posterior", xlabel="x1", ylabel="x2", aspect="equal")
left.legend(fontsize=8)
(means, scatters), label = zip(*estimates, strict=True), f"TDS, 8 runs of {options.particles} particles"
middle.errorbar(options.steps, means, scatters, marker="o", capsize=3, label=label)
middle.axhline(exact, color="black", ls="--", label="exact")
middle.set(title="evidence", xlabel="steps", ylabel="log p(y)", xscale="log")
middle.set_xticks(options.steps, options.steps)
middle.minorticks_off()
middle.legend(fontsize=8)
right.plot(out.ess[:, 0] / options.particles, lw=1)
right.axhline(guidance.ess_threshold, color="gray", ls=":", label="resampled below")
right.set(title="effective sample size, first run", xlabel="step", ylabel="ESS / K", ylim=(0, 1.02))
right.legend(fontsize=8, loc="lower left")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "tds_mixture.png", dpi=120)
