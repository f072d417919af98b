"""Inpainting and super-resolution with a diffusers pipeline that is saved on disk.

    python examples/diffusers_pipeline.py FOLDER --image photo.png --out fastguide-examples

FOLDER is what `pipe.save_pretrained(FOLDER)` wrote, of pixels or of latents, with a prompt or without. The image is
measured with noise, in two ways, and restored. Without --image it is a sample of the pipeline.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import fastguide as fg
from fastguide.integrations.diffusers import from_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="of the pipeline")
parser.add_argument("--image", type=Path, help="of the size that the pipeline draws")
parser.add_argument("--prompt", help="for a pipeline that takes one")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--samples", type=int, default=4)
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the picture")
options = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(options.folder, local_files_only=True).to(options.device)
network = getattr(pipe, "unet", None) or pipe.transformer
prior, encode, decode = from_pipeline(pipe, prompt=options.prompt)
size, NOISE = network.config.sample_size, 0.05
shape = (1, network.config.in_channels, size, size)  # of the state: an image, or its latents
run = dict(steps=options.steps, samples_per_observation=options.samples, device=options.device)


@torch.no_grad()
def restored(guidance, seed=0):
    """Images [samples, C, H, W] in [-1, 1]."""
    return decode(fg.sample(prior, shape, guidance=guidance, seed=seed, **run).x[0]).clamp(-1, 1)


def psnr(images):
    """dB, of the mean of the samples."""
    return 10 * math.log10(4 / (images.mean(0) - truth).square().mean().item())


unguided = restored(None)
truth = restored(None, seed=1)[0]  # [C, H, W], of other noise
if options.image is not None:
    pixels = np.array(Image.open(options.image).convert("RGB" if len(truth) == 3 else "L"), dtype=np.float32)
    truth = torch.from_numpy(pixels / 127.5 - 1).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).to(options.device)
mask = torch.ones(truth.shape, dtype=torch.bool)
height, width = truth.shape[1:]
mask[:, height // 4 : -height // 4, width // 4 : -width // 4] = False  # the middle is missing
tasks = {
    "inpainting": fg.operators.Inpainting(mask.to(options.device)),
    "super-resolution": fg.operators.AveragePool(2),
}
figure, axes = plt.subplots(2, 4, figsize=(9, 4.9), layout="constrained", subplot_kw=dict(xticks=[], yticks=[]))
for row, (name, operator) in zip(axes, tasks.items(), strict=True):
    clean = operator(truth[None])
    y = clean + NOISE * torch.randn_like(clean)
    likelihood = fg.likelihoods.Gaussian(y, operator, NOISE)
    latent = shape[1:] != truth.shape
    images = restored(fg.LatentPnP(likelihood, decode) if latent else fg.PnP(likelihood))
    residual = (operator(images) - y).square().mean().sqrt().item() / NOISE
    print(f"{name}: PSNR {psnr(images):.1f} dB, prior {psnr(unguided):.1f} dB, residual / noise {residual:.2f}")
    measured = operator.pseudo_inverse(y)[0]
    shown = {"truth": truth, "measured": measured, "a sample": images[0], "mean": images.mean(0)}
    row[0].set_ylabel(name)
    for axis, (title, image) in zip(row, shown.items(), strict=True):
        axis.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "diffusers_pipeline.png", dpi=120)
