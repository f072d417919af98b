"""``python -m benchmarks.integrations_deepinv``: deepinv's DPS and DiffPIR and ours in turn, of the same denoiser,
inpainting task and number of steps, on one thread; medians in ms. That both give the same samples of the same noise is
tested (tests/test_integrations_deepinv.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.samplers import _import_deepinv
from benchmarks.timing import alternate, keep_memory
from fastguide import digits
from fastguide.integrations import deepinv as ours

STEPS = 50


class DigitsDenoiser(nn.Module):
    """The digits prior as a denoiser of images in [0, 1], at the nearest of its levels."""

    def __init__(self) -> None:
        super().__init__()
        prior, times = digits.prior(), torch.arange(1000)
        self.net = prior.net
        self.alpha, self.sigma = (f(times).float() for f in (prior.schedule.alpha, prior.schedule.sigma))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = (self.sigma / self.alpha - 2.0 * sigma).abs().argmin()
        alpha, x = self.alpha[t], 2.0 * x - 1.0
        x0 = alpha * (alpha * x) - self.sigma[t] * self.net(alpha * x, t.expand(len(x)))
        return (x0 + 1.0) / 2.0


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of standard normals: next to nothing beside the samplers themselves."""
    return x / (1.0 + sigma**2)


def main() -> None:
    deepinv = _import_deepinv()
    torch.set_num_threads(1)
    print(f"allocator: {keep_memory()}\n")
    network, fidelity = DigitsDenoiser(), deepinv.optim.data_fidelity.L2()
    denoisers: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
        "the digits network, 64 images of 8 x 8": (network, (64, 1, 8, 8)),
        "the digits network, one of 8 x 8": (network, (1, 1, 8, 8)),
        "none, one of 8 x 8": (shrink, (1, 1, 8, 8)),
        "none, one of 3 x 256 x 256": (shrink, (1, 3, 256, 256)),
    }
    samplers: dict[str, Callable] = {
        "DPS": lambda module, denoiser: module.DPS(denoiser, num_steps=STEPS + 1),
        "DPS in float32": lambda module, denoiser: module.DPS(denoiser, num_steps=STEPS + 1, dtype=torch.float32),
        "DiffPIR": lambda module, denoiser: module.DiffPIR(denoiser, fidelity, max_iter=STEPS),
    }
    print("| sampler, network | deepinv | fastguide | |\n| --- | --- | --- | --- |")
    for name, make in samplers.items():
        for kind, (denoiser, shape) in denoisers.items():
            torch.manual_seed(0)
            noise = deepinv.physics.GaussianNoise(0.05)
            physics = deepinv.physics.Inpainting(shape[1:], mask=0.5, noise_model=noise)
            y = physics(torch.rand(shape))
            calls = {
                "deepinv": partial(make(deepinv.sampling, denoiser), y, physics),
                "fastguide": partial(make(ours, denoiser), y, physics),
            }
            first, second = (call() for call in calls.values())
            assert first.shape == second.shape
            assert first.dtype == second.dtype
            samples, broken = alternate(calls, torch.device("cpu"), seconds=10.0)
            assert not broken, broken
            before, after = (1e3 * statistics.median(samples[who]) for who in calls)
            print(f"| {name}, {kind} | {before:.0f} | {after:.0f} | {before / after:.2f}x |")


if __name__ == "__main__":
    main()
