"""A custom operator: sparse-view tomography by DPS, PnP and PiGDM side by side.

    python examples/tomography.py --views 4 --out fastguide-examples

The projector is a differentiable function: it turns the image and sums along the columns. autograd finds its adjoint,
and conjugate gradients solve with it. `--matrix` makes the same projector a matrix, which has closed forms.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import fastguide as fg
from fastguide import digits

NOISE, EVENT = 0.3, (1, 8, 8)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--views", type=int, default=4, help="projections, spread over half a turn")
parser.add_argument("--matrix", action="store_true", help="the projector as a matrix")
parser.add_argument("--images", type=int, default=16, help="number of held-out digits; the picture shows three")
parser.add_argument("--samples", type=int, default=8, help="of each image")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the picture")
options = parser.parse_args()


def project(x):
    """Images [n, 1, 8, 8] to their sums along parallel rays, [n, views, 8]."""
    sums = []
    for angle in torch.arange(options.views, device=x.device) * (math.pi / options.views):
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])]).to(x)
        grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        sums.append(F.grid_sample(x, grid, align_corners=False).sum(2))  # [n, 1, 8]
    return torch.cat(sums, dim=1)


operator = fg.operators.Function(project, linear=True, event=EVENT)
truth = digits.held_out()[0][: options.images]  # [B, 1, 8, 8]
y = operator(truth)
y += NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
if options.matrix:
    operator, y = fg.operators.Matrix(operator.matrix(EVENT).float(), EVENT), y.flatten(1)
likelihood = fg.likelihoods.Gaussian(y, operator, NOISE)
methods = {"DPS": fg.DPS(likelihood, zeta=0.08), "PnP": fg.PnP(likelihood), "PiGDM": fg.PiGDM(likelihood)}
run = dict(steps=options.steps, samples_per_observation=options.samples, seed=0)
print(f"{options.views} views, {y[0].numel()} measurements of {truth[0].numel()} pixels")
print(f"{'method':8}{'PSNR':>6}{'residual / noise':>18}{'seconds':>9}")
found = {}
for name, guidance in {"prior": None, **methods}.items():
    begin = time.perf_counter()
    found[name] = out = fg.sample(digits.prior(), truth.shape, guidance=guidance, **run)
    seconds = time.perf_counter() - begin
    psnr = 10 * math.log10(4 / (out.mean() - truth).square().mean())  # of the mean; pixels in [-1, 1]
    residual = (operator(out.x.flatten(0, 1)) - y.repeat_interleave(options.samples, 0)).square().mean().sqrt() / NOISE
    print(f"{name:8}{psnr:6.1f}{residual:18.2f}{seconds:9.1f}")

figure, axes = plt.subplots(6, 6, figsize=(7.5, 7.2), layout="constrained", subplot_kw=dict(xticks=[], yticks=[]))
for b, (above, below) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
    below[0].axis("off"), below[1].axis("off")
    above[0].imshow(truth[b, 0], cmap="gray", vmin=-1, vmax=1)
    rays = above[1].imshow(y[b].reshape(options.views, 8), vmin=y.min(), vmax=y.max())
    above[1].set(xlabel="detector", ylabel="view")
    for axis, deviation, out in zip(above[2:], below[2:], found.values(), strict=True):
        grey = axis.imshow(out.mean()[b, 0], cmap="gray", vmin=-1, vmax=1)
        std = deviation.imshow(out.variance()[b, 0].sqrt(), cmap="magma", vmin=0, vmax=1)
    above[2].set_ylabel("mean"), below[2].set_ylabel("std")
for axis, title in zip(axes[0], ["truth", "projections", *found], strict=True):
    axis.set_title(title)
bars = (grey, axes[:2], "grey value"), (std, axes[2:4], "standard deviation"), (rays, axes[4:], "projection")
for image, rows, label in bars:
    figure.colorbar(image, ax=rows, label=label)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "tomography.png", dpi=120)
