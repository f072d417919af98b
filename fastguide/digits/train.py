"""Trains everything in `fastguide.digits` from scikit-learn's digits: `python -m fastguide.digits.train`.

It overwrites the shipped `weights.safetensors` and `held_out.safetensors`. `--out FOLDER` writes elsewhere, and
`--validate` writes nothing.

A run is seeded, and deterministic for a given torch version and number of threads. It needs scikit-learn and
safetensors. The shipped run took 35 minutes on two cores beside other work; on a busy machine `--threads 1` is faster.

Held-out images are only used to measure. Hyperparameters were chosen with `--validate`, which sets aside a further
fifth of the training images and measures on those.

`fastguide.training` has the loop and the loss.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguide import weights
from fastguide.denoiser import Denoiser
from fastguide.digits.networks import CLASSES, Autoencoder, Classifier
from fastguide.schedules import vp_cosine
from fastguide.training import (
    STEPS,
    Net,
    Report,
    draw,
    energy_distance,
    held_out_loss,
    noise_table,
    optimise,
    psnr,
    v_loss,
)
from fastguide.unet import UNet

HELD_OUT = 297
SAMPLERS = ((100, 1.0), (50, 1.0), (50, 0.0), (20, 0.0))  # (steps, eta) that are measured; the first in full


# ---------------------------------------------------------------------------------------------- data


def split(labels: np.ndarray, seed: int = 0, held_out: int = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """A stratified split of labels [M] into training and held-out indices, both sorted.

    Every class gives its share of `held_out`, rounded by largest remainder. The legacy generator is used because its
    stream never changes.
    """
    generator = np.random.RandomState(seed)
    counts = np.bincount(labels, minlength=CLASSES)
    share = counts * held_out / counts.sum()
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: held_out - take.sum()]] += 1
    held = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[: take[c]] for c in range(CLASSES)])
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def load(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All images [1797, 1, 8, 8] uint8 in 0..16, labels [1797] uint8, training indices and held-out indices."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.uint8)
    return images, labels, *split(labels, seed)


def scaled(images: np.ndarray) -> Tensor:
    """Images in 0..16 as float32 in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32)) / 8 - 1


def jitter(images: Tensor, generator: torch.Generator, *, shift: float, angle: float, zoom: float) -> Tensor:
    """Each image [N, 1, 8, 8] moved, turned and scaled at random.

    The limits are `shift` pixels, `angle` radians and a factor of `1 +- zoom`. Bilinear, background -1.
    """

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    turn, size = uniform(angle), 1 + uniform(zoom)
    cos, sin = size * turn.cos(), size * turn.sin()
    theta = torch.stack([cos, -sin, uniform(shift) / 4, sin, cos, uniform(shift) / 4], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


# ------------------------------------------------------------------------------------------ training


def train_denoiser(
    net: UNet,
    x0: Tensor | Callable[[Tensor, torch.Generator], Tensor],
    labels: Tensor,
    *,
    steps: int,
    batch: int = 256,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    drop_label: float = 0.5,
    seed: int = 0,
    report: Report | None = None,
) -> UNet:
    """Train a denoiser on x0 [M, C, H, W] and labels [M] int64.

    `x0` may also be a function of (indices, generator) that returns a batch. A label is dropped with probability
    `drop_label`.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    table = noise_table()

    def loss(step: int) -> Tensor:
        index = torch.randint(len(labels), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < drop_label
        images = x0[index] if isinstance(x0, Tensor) else x0(index, generator)
        return v_loss(net, images, labels[index].masked_fill(dropped, CLASSES), generator, table)

    return optimise(
        net, loss, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay, ema=ema, report=report
    )


def train_classifier(
    net: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 128,
    noise: float = 0.2,
    learning_rate: float = 2e-3,
    seed: int = 0,
    report: Report | None = None,
) -> Classifier:
    """Train a classifier by cross-entropy on jittered images [M, 1, 8, 8] with a little noise; labels [M] int64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=generator)
        x = jitter(images[index], generator, shift=0.7, angle=0.15, zoom=0.1)
        level = noise * torch.rand(batch, 1, 1, 1, generator=generator)
        x = x + level * torch.randn(x.shape, generator=generator)
        return F.cross_entropy(net(x), labels[index])

    return optimise(net, loss, steps=steps, learning_rate=learning_rate, weight_decay=0.02, ema=0.995, report=report)


def train_autoencoder(
    net: Autoencoder,
    images: Tensor,
    *,
    steps: int,
    batch: int = 128,
    noise: float = 0.05,
    learning_rate: float = 2e-3,
    seed: int = 0,
    report: Report | None = None,
) -> Autoencoder:
    """Train an autoencoder by the mean square error of the reconstruction, then set `shift` and `scale`.

    Noise is added to the latents, so that the decoder is smooth.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=generator)
        x = images[index]
        x = torch.where(
            torch.rand(batch, 1, 1, 1, generator=generator) < 0.5,
            x,
            jitter(x, generator, shift=0.5, angle=0.1, zoom=0.1),
        )
        z = net.encode(x)
        # The noise is relative to the batch's spread: otherwise larger latents would make it negligible.
        spread = z.detach().std(dim=(0, 2, 3), keepdim=True)
        noisy = z + noise * spread * torch.randn(z.shape, generator=generator)
        return F.mse_loss(net.decode(noisy), x) + 1e-4 * z.square().mean()

    net = optimise(net, loss, steps=steps, learning_rate=learning_rate, ema=0.995, report=report)
    with torch.no_grad():
        latents = net.encode(images)
        net.shift.copy_(latents.mean(dim=(0, 2, 3)).view_as(net.shift))
        net.scale.copy_(latents.std(dim=(0, 2, 3)).view_as(net.scale))
    return net


# ----------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def confident(classifier: nn.Module, images: Tensor, above: float = 0.9) -> tuple[float, list[int]]:
    """The share of images [N, 1, 8, 8] that the classifier assigns with more than `above`, and the ten counts."""
    confidence, classes = classifier(images).softmax(1).max(1)
    return (confidence > above).float().mean().item(), torch.bincount(classes, minlength=CLASSES).tolist()


def nearest(images: Tensor, references: Tensor) -> Tensor:
    """The Euclidean distance [N] from each image to the closest reference."""
    return torch.cdist(images.flatten(1), references.flatten(1)).amin(1)


@dataclass
class Models:
    """The networks that are trained and shipped. Their names are those in the file and in CONFIG."""

    classifier: Classifier
    autoencoder: Autoencoder
    latent_prior: UNet
    prior: UNet


def measure(
    models: Models, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], samples: int = 1000
) -> dict[str, object]:
    """Every figure that is printed and kept in the metadata. `train` and `held` are (images, labels)."""
    (x, _), (x_held, labels_held) = train, held
    classify, autoencoder, schedule = models.classifier, models.autoencoder, vp_cosine(STEPS)
    figures: dict[str, object] = {}

    def note(name: str, value: object) -> None:
        figures[name] = round(value, 4) if isinstance(value, float) else value
        print(f"  {name}: {figures[name]}", flush=True)

    with torch.no_grad():
        note("classifier accuracy, held-out", (classify(x_held).argmax(1) == labels_held).float().mean().item())
        share, counts = confident(classify, x_held)
        note("confident (> 0.9), held-out digits", share)
        note("v loss, training", held_out_loss(models.prior, x, repeats=2))
        note("v loss, held-out", held_out_loss(models.prior, x_held))
        note("energy distance, training to held-out", energy_distance(x, x_held))

        prior = Denoiser(models.prior, schedule, prediction="v")
        for steps, eta in SAMPLERS:
            name = f"{'DDPM' if eta else 'DDIM'} {steps}"
            drawn = draw(prior, (samples, 1, 8, 8), steps=steps, eta=eta)
            share, counts = confident(classify, drawn)
            note(f"confident, {name}", share)
            note(f"classes, {name}", counts)
            note(f"energy distance to held-out, {name}", energy_distance(drawn, x_held))
            if (steps, eta) == SAMPLERS[0]:
                # A network that repeats its training data lies far closer to it than new digits do.
                for source, images in (("samples", drawn), ("held-out", x_held)):
                    quantiles = nearest(images, x).quantile(torch.tensor([0.01, 0.1, 0.5, 0.9])).tolist()
                    note(f"nearest training image, 1/10/50/90 %, {source}", [round(q, 3) for q in quantiles])

        asked = torch.arange(samples) % CLASSES
        for scale in (None, 2.0):
            conditional = Denoiser(
                lambda z, t: models.prior(z, t, asked),
                schedule,
                prediction="v",
                unconditional=None if scale is None else models.prior,
                guidance_scale=scale,
            )
            drawn = draw(conditional, (samples, 1, 8, 8), steps=SAMPLERS[0][0])
            note(
                f"in the asked class, scale {scale or 1:g}",
                (classify(drawn).argmax(1) == asked).float().mean().item(),
            )

        note("autoencoder PSNR, training, dB", psnr(x, autoencoder(x)))
        note("autoencoder PSNR, held-out, dB", psnr(x_held, autoencoder(x_held)))
        note("confident, held-out reconstructed", confident(classify, autoencoder(x_held))[0])
        latent = Denoiser(models.latent_prior, schedule, prediction="v")
        shape = autoencoder.encode(x_held[:1]).shape[1:]
        for steps, eta in SAMPLERS:
            name = f"{'DDPM' if eta else 'DDIM'} {steps}"
            drawn = autoencoder.decode(draw(latent, (samples, *shape), steps=steps, eta=eta))
            share, counts = confident(classify, drawn)
            note(f"confident, latent {name}", share)
            note(f"classes, latent {name}", counts)
            note(f"energy distance to held-out, latent {name}", energy_distance(drawn, x_held))
    return figures


# -------------------------------------------------------------------------------------------- script

CONFIG: dict[str, dict[str, Any]] = {
    "prior": {"channels": 1, "widths": [32, 56]},
    "latent_prior": {"channels": 2, "widths": [64]},
    "autoencoder": {"latent_channels": 2, "width": 32},
    "classifier": {"width": 32},
}
TRAINING_STEPS = {"prior": 4000, "latent_prior": 4000, "autoencoder": 4000, "classifier": 1500}


def train_all(x: Tensor, labels: Tensor, steps: dict[str, int], seed: int = 0) -> Models:
    """Train the four networks from images [M, 1, 8, 8] and labels [M] int64, for `steps` as in TRAINING_STEPS."""

    def options(name: str) -> dict[str, Any]:
        start = time.perf_counter()

        def report(step: int, loss: float, average: nn.Module) -> None:
            if step % 500 == 0 or step == steps[name]:
                seconds = time.perf_counter() - start
                print(f"  {name} {step}/{steps[name]}: loss {loss:.4f}, {seconds:.0f} s", flush=True)

        return {"steps": steps[name], "seed": seed, "report": report}

    def fresh(kind: type[Net], name: str, **extra: float) -> Net:
        torch.manual_seed(seed)
        return kind(**CONFIG[name], **extra)

    classifier = fresh(Classifier, "classifier", dropout=0.2)
    classifier = train_classifier(classifier, x, labels, **options("classifier"))
    autoencoder = train_autoencoder(fresh(Autoencoder, "autoencoder"), x, **options("autoencoder"))
    with torch.no_grad():
        latents = autoencoder.encode(x)
    latent_prior = fresh(UNet, "latent_prior", dropout=0.1)
    latent_prior = train_denoiser(latent_prior, latents, labels, drop_label=1.0, **options("latent_prior"))
    prior = fresh(UNet, "prior", dropout=0.1)
    prior = train_denoiser(prior, x, labels, drop_label=0.5, **options("prior"))
    return Models(classifier, autoencoder, latent_prior, prior)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write the files, see the module. `--help` lists the options."""
    parser = argparse.ArgumentParser(prog="python -m fastguide.digits.train", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; the last bits depend on it")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of training steps")
    parser.add_argument("--samples", type=int, default=1000, help="drawn for every figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--validate", action="store_true", help="measure on a fifth of the training images; write nothing"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    images, labels, train, held = load(options.seed)
    if options.validate:
        keep, other = split(labels[train], options.seed + 1, len(train) // 5)
        train, held = train[keep], train[other]
    data, measured_on = [(scaled(images[i]), torch.from_numpy(labels[i]).long()) for i in (train, held)]
    print(f"{len(train)} training images, {len(held)} to measure on, torch {torch.__version__}", flush=True)

    start = time.perf_counter()
    steps = {name: max(1, round(options.scale * n)) for name, n in TRAINING_STEPS.items()}
    models = train_all(*data, steps, options.seed)
    tensors = weights.pack(vars(models))
    print(f"trained in {time.perf_counter() - start:.0f} s; measured:", flush=True)
    figures = measure(models, data, measured_on, options.samples)
    if options.validate:
        return

    metadata = {
        "config": json.dumps(CONFIG),
        "steps": json.dumps(steps),
        "seed": str(options.seed),
        "split": f"stratified, seed {options.seed}, {len(train)} training, {len(held)} held out",
        "torch": f"{torch.__version__}, {options.threads} threads",
        "measured": json.dumps(figures),
    }
    weights.write(options.out / "weights.safetensors", tensors, metadata)
    held_out = {
        "images": torch.from_numpy(images[held]),
        "labels": torch.from_numpy(labels[held]),
        "indices": torch.from_numpy(held.astype(np.int16)),
    }
    source = "UCI Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998, CC BY 4.0"
    weights.write(options.out / "held_out.safetensors", held_out, {"source": source})


if __name__ == "__main__":
    main()
