"""What the scripts that train the shipped priors share: the loop, the loss, and what they measure.

Noise levels are those of `vp_cosine(1000)`, `x_t = alpha x_0 + sigma eps`. Networks predict `v = alpha eps - sigma
x_0`, and the loss is the mean square of the error in `v`.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .denoiser import Denoiser
from .schedules import vp_cosine

Net = TypeVar("Net", bound=nn.Module)
Report = Callable[[int, float, nn.Module], None]  # step, recent mean of the loss, averaged network

STEPS = 1000  # of the noise table


def noise_table() -> tuple[Tensor, Tensor]:
    """alpha and sigma of the noise table, [1000] float32 each."""
    schedule, t = vp_cosine(STEPS), torch.arange(STEPS)
    return schedule.alpha(t).float(), schedule.sigma(t).float()


def cosine(step: int, steps: int) -> float:
    """The learning rate over its peak: a short warm-up, then half a cosine down to 0."""
    warm = min(100, max(1, steps // 10))
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def optimise(
    net: Net,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    ema: float = 0.999,
    rate: Callable[[int, int], float] = cosine,
    report: Report | None = None,
    checkpoint: Path | None = None,
    interval: float = 120.0,
) -> Net:
    """Train with AdamW. Returns the exponential moving average of the weights.

    Args:
        net: What to train, in place.
        loss: The loss at a step. To continue from a checkpoint to the same bits it must depend on nothing but the step
            and the weights.
        steps: In all, those before a checkpoint included.
        learning_rate: At its peak.
        weight_decay: The weight decay of AdamW.
        ema: Decay of the average for each step.
        rate: The learning rate over its peak, from the step and `steps`.
        report: Called after each step.
        checkpoint: A file that holds the state of the training. The run continues from it if it exists.
        interval: Seconds between writes of `checkpoint`; it is also written at the end.

    Returns:
        The averaged network, in eval mode.
    """
    average = copy.deepcopy(net).eval()
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    done, recent, written = 0, 0.0, time.monotonic()
    parts: dict[str, Any] = {"net": net, "average": average, "optimiser": optimiser}
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, recent = state["done"], state["recent"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    net.train()
    for step in range(done, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate(step, steps)
        value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        # The average forgets the first iterates quickly, so that it is useful in short runs too.
        weight = 1 - min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, current in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(current, weight)
        recent += (value.item() - recent) * max(0.01, 1 / (step + 1))
        if report is not None:
            report(step + 1, recent, average)
        if checkpoint is not None and (step + 1 == steps or time.monotonic() - written > interval):
            new = checkpoint.with_suffix(".new")
            torch.save({"done": step + 1, "recent": recent} | {k: v.state_dict() for k, v in parts.items()}, new)
            new.replace(checkpoint)  # a run that is stopped while it writes leaves the file before
            written = time.monotonic()
    return average


def v_loss(
    net: nn.Module,
    x0: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    table: tuple[Tensor, Tensor],
) -> Tensor:
    """The mean square of the error in `v` at random levels; x0 [N, C, H, W], labels [N] int64 or None."""
    n = len(x0)
    # One level per stratum of the table: the same expectation as independent levels, with much less variance.
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) * (STEPS / n)).long().clamp_(max=STEPS - 1)
    t = t[torch.randperm(n, generator=generator)]
    alpha, sigma = (entry[t].view(-1, 1, 1, 1) for entry in table)
    eps = torch.randn(x0.shape, generator=generator)
    return F.mse_loss(net(alpha * x0 + sigma * eps, t, labels), alpha * eps - sigma * x0)


@torch.no_grad()
def draw(denoiser: Denoiser, shape: tuple[int, ...], *, steps: int = 100, eta: float = 1.0, seed: int = 0) -> Tensor:
    """Plain samples without clipping: DDIM for eta = 0, DDPM for eta = 1.

    The loop is written out here, so that the figures do not depend on the kernels.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for t, s in itertools.pairwise(denoiser.schedule.levels(steps)):
        x0 = denoiser.x0_hat(x, t)
        eps = (x - t.alpha * x0) / t.sigma
        variance = (s.sigma / t.sigma) ** 2 * (t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2)
        tau = eta * math.sqrt(max(variance, 0.0))
        x = s.alpha * x0 + math.sqrt(s.sigma**2 - tau**2) * eps + tau * torch.randn(shape, generator=generator)
    return x


@torch.no_grad()
def held_out_loss(net: nn.Module, x0: Tensor, labels: Tensor | None = None, repeats: int = 8) -> float:
    """The loss `v_loss` on given images, with the same noise at every call."""
    generator = torch.Generator().manual_seed(1234)
    table = noise_table()
    return sum(v_loss(net, x0, labels, generator, table).item() for _ in range(repeats)) / repeats


@torch.no_grad()
def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, for a range of 2."""
    return 10 * math.log10(4 / F.mse_loss(others, images).item())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased energy distance in pixels, `2 E|a - b| - E|a - a'| - E|b - b'|`. It is 0 for equal distributions."""
    a, b = a.flatten(1), b.flatten(1)
    within = sum(torch.cdist(x, x).sum().item() / (len(x) * (len(x) - 1)) for x in (a, b))
    return 2 * torch.cdist(a, b).mean().item() - within
