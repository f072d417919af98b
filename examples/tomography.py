"""Sparse-view tomography: every method side by side, on a phantom that the prior has never seen.

    python examples/tomography.py --views 10 --noise 2 --out fastguide-examples

If the truth is one more draw of the same distribution as 19 samples, it lies between the smallest and the largest of
them with probability 18 / 20: they make an interval of 90 %.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

import fastguide as fg
from fastguide import phantoms

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--views", type=int, default=10, help="projections, spread over half a turn")
parser.add_argument("--noise", type=float, default=2.0, help="standard deviation, for sums of up to 64 pixels")
parser.add_argument("--images", type=int, default=1, help="number of phantoms; the picture shows the first")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--particles", type=int, default=4, help="for each of the 19 samples of a particle filter")
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the picture")
options = parser.parse_args()
views, noise = options.views, options.noise

SAMPLES, EVENT = 19, (1, 64, 64)
truth = phantoms.generate(options.images, seed=0, first=38)  # [B, 1, 64, 64]
operator = fg.operators.ParallelBeam(torch.arange(views) * (torch.pi / views), size=64)
y = operator(truth)
y += noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
ridge = operator.adjoint(operator.solve_gram(y, 1.0, noise**2))  # all that it knows of x: variance 1
likelihood = fg.likelihoods.Gaussian(y, operator, noise)
copies = fg.likelihoods.Gaussian(y.repeat_interleave(SAMPLES, 0), operator, noise)
methods = {
    "prior": None,
    "DPS": fg.DPS(likelihood, zeta=0.05),
    "PnP": fg.PnP(likelihood),
    "PiGDM": fg.PiGDM(likelihood),
    "FK, 1 filter": fg.FK(likelihood, particles=SAMPLES * options.particles),
    "TDS, 1 filter": fg.TDS(likelihood, particles=SAMPLES * options.particles),
    "TDS, 19 filters": fg.TDS(copies, particles=options.particles),  # as many particles, one sample of each filter
}
grey, spread = dict(cmap="gray", vmin=-1, vmax=1), dict(cmap="magma", vmin=0, vmax=0.3)
rows = {"sample": grey, "another": grey, "mean": grey, "deviation": spread, "error of mean": spread}
rows["in 90 %?"] = dict(cmap=ListedColormap(["#2166ac", "#eeeeee", "#b2182b"]), vmin=-1.5, vmax=1.5)
head = torch.nn.functional.max_pool2d(truth, 3, stride=1, padding=1) > -1  # the background is easy
figure, axes = plt.subplots(6, 8, figsize=(10, 7.4), layout="constrained", subplot_kw=dict(xticks=[], yticks=[]))
print(f"{'method':16}{'PSNR':>6}{'residual / noise':>18}{'coverage':>10}{'ancestors':>11}{'seconds':>9}")
for (name, guidance), column in zip(methods.items(), axes.T[1:], strict=True):
    begin, runs = time.perf_counter(), len(copies.y if "filters" in name else y)
    several = {} if (filters := hasattr(guidance, "particles")) else dict(samples_per_observation=SAMPLES)
    out = fg.sample(phantoms.prior(), (runs, *EVENT), guidance=guidance, steps=options.steps, seed=0, **several)
    seconds = time.perf_counter() - begin
    x = out.draw(len(copies.y) // runs).reshape(-1, SAMPLES, *EVENT)
    side = (truth > x.amax(1)).float() - (truth < x.amin(1)).float()  # 0 in the interval, 1 above, -1 below
    psnr, covered = fg.metrics.psnr(x.mean(1), truth, data_range=2).mean(), (side[head] == 0).float().mean()
    residual = (operator(x.flatten(0, 1)) - copies.y).square().mean().sqrt() / noise
    ancestors = f"{out.effective_ancestors.mean():.1f}" if filters else ""
    print(f"{name:16}{psnr:6.1f}{residual:18.2f}{covered:10.2f}{ancestors:>11}{seconds:9.1f}", flush=True)
    column[0].set_title(f"{name}\n{psnr:.1f} dB, {covered:.0%}", fontsize=10)
    shown = x[0, 0], x[0, 1], x[0].mean(0), x[0].std(0), (x.mean(1) - truth)[0].abs(), side[0]
    images = [axis.imshow(image[0], **style) for axis, image, style in zip(column, shown, rows.values(), strict=True)]
for axis, label in zip(axes[:, 1], rows, strict=True):
    axis.set_ylabel(label)
left = {"truth": truth[0, 0], "projections": y[0].reshape(views, 64), "ridge": ridge[0, 0]}
for axis, (label, image), style in zip(axes[:3, 0], left.items(), (grey, {"aspect": "auto"}, grey), strict=True):
    axis.imshow(image, **style).axes.set_title(label, fontsize=10)
[axis.axis("off") for axis in axes[3:, 0]]
note = f"{views} views, noise {noise:g}\n\ndB: PSNR\nof the mean\n%: of the head\nthat the interval\ncovers"
axes[4, 0].text(0, 0.5, note, va="center", fontsize=8, in_layout=False)
figure.colorbar(images[0], ax=axes[:3], label="grey value", aspect=30)
figure.colorbar(images[3], ax=axes[3:5], label="deviation, error")
figure.colorbar(images[5], ax=axes[5:], ticks=[-1, 0, 1]).set_ticklabels(["below", "in", "above"])
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "tomography.png", dpi=100)
