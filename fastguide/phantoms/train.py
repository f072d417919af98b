"""Trains the prior of `fastguide.phantoms`: `python -m fastguide.phantoms.train`.

It overwrites the shipped `weights.safetensors`; `--out FOLDER` writes elsewhere. `--checkpoint FILE` keeps the state of
the training every two minutes, and a run with the same file continues from it to the same bits.

Every step draws new phantoms, so that no image is seen twice. Their seed is 2^63 plus that of `--seed`: no smaller seed
has been trained on. A run is deterministic for a given torch version and number of threads. It needs safetensors.

The shipped run took 35 minutes of processor time on one core of an Intel Xeon with AVX-512, in 70 minutes beside other
work. It began with `--steps 12000`, and was continued from its checkpoint with `--steps 9000` where the rate was flat.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguide import weights
from fastguide.denoiser import Denoiser
from fastguide.phantoms.generator import SIZE, generate
from fastguide.schedules import vp_cosine
from fastguide.training import (
    STEPS,
    draw,
    energy_distance,
    held_out_loss,
    noise_table,
    optimise,
    v_loss,
)
from fastguide.unet import UNet

CONFIG: dict[str, Any] = {"channels": 1, "widths": [48, 64, 96], "classes": 0, "patch": 2}
TRAINING_STEPS, BATCH, LEARNING_RATE, EMA = 9_000, 16, 2e-3, 0.999
SEEDS = 2**63  # those of the training begin here
LEVELS = (50, 200, 400, 600, 800)  # of the noise table: where the denoiser is measured


def rate(step: int, steps: int) -> float:
    """The learning rate over its peak: a warm-up, then flat, then a straight line down to 0 over the last third.

    Where it is flat it does not depend on `steps`: a run may still be made shorter or longer before its last third.
    """
    return min(1.0, (step + 1) / 100, 3 * (1 - step / steps))


def train_prior(net: UNet, *, steps: int, seed: int = 0, **options: Any) -> UNet:
    """Train a denoiser on new phantoms at every step, and return the average of its weights; see `optimise`."""
    table = noise_table()

    def loss(step: int) -> Tensor:
        images = generate(BATCH, seed=SEEDS + seed, first=step * BATCH)
        return v_loss(net, images, None, torch.Generator().manual_seed((seed << 32) + step), table)

    return optimise(
        net,
        loss,
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        ema=EMA,
        rate=rate,
        **options,
    )


@torch.no_grad()
def denoising_errors(prior: Denoiser, images: Tensor) -> dict[int, float]:
    """The mean square error of `x0_hat` at each of `LEVELS` on images [N, 1, 64, 64], with the same noise each time."""
    generator = torch.Generator().manual_seed(1234)
    errors = {}
    for t in LEVELS:
        level = prior.schedule.level(t)
        x = level.alpha * images + level.sigma * torch.randn(images.shape, generator=generator)
        errors[t] = F.mse_loss(prior.x0_hat(x, level), images).item()
    return errors


def measure(net: UNet, number: int) -> dict[str, object]:
    """Every figure that is printed and kept in the metadata, on `number` new phantoms and as many samples."""
    prior, images, others = Denoiser(net, vp_cosine(STEPS), prediction="v"), *generate(2 * number, seed=0).chunk(2)
    figures: dict[str, object] = {"v loss": round(held_out_loss(net, images), 5)}
    figures["mean square error of x0_hat"] = {t: round(e, 5) for t, e in denoising_errors(prior, images).items()}
    figures["energy distance, phantoms"] = round(energy_distance(others, images), 4)
    for steps, eta in ((100, 1.0), (50, 0.0)):
        drawn = draw(prior, (number, 1, SIZE, SIZE), steps=steps, eta=eta)
        figures[f"energy distance, {'DDPM' if eta else 'DDIM'} {steps}"] = round(energy_distance(drawn, images), 4)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write the file, see the module. `--help` lists the options."""
    parser = argparse.ArgumentParser(prog="python -m fastguide.phantoms.train", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the last bits depend on it")
    parser.add_argument("--steps", type=int, default=TRAINING_STEPS)
    parser.add_argument("--samples", type=int, default=256, help="drawn, and new phantoms, for every figure")
    parser.add_argument("--checkpoint", type=Path, help="a file to which the training is written, and continued from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    start = time.process_time()

    def report(step: int, loss: float, average: torch.nn.Module) -> None:
        if step % 100 == 0 or step == options.steps:
            print(f"{step}/{options.steps}: loss {loss:.5f}, {time.process_time() - start:.0f} s", flush=True)

    torch.manual_seed(options.seed)
    net = UNet(**CONFIG)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on the CPU
    net = train_prior(net, steps=options.steps, seed=options.seed, report=report, checkpoint=options.checkpoint)
    tensors = weights.pack({"prior": net})
    figures = measure(net, options.samples)
    print(json.dumps(figures, indent=2), flush=True)
    metadata = {
        "config": json.dumps({"prior": CONFIG}),
        "steps": f"{options.steps} of {BATCH} phantoms",
        "seed": str(options.seed),
        "torch": f"{torch.__version__}, {options.threads} threads",
        "measured": json.dumps(figures),
    }
    weights.write(options.out / "weights.safetensors", tensors, metadata)


if __name__ == "__main__":
    main()
