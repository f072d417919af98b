"""DPS and DiffPIR against deepinv's own: inpainting, with the digits network and with a denoiser that costs nothing.
With the same noise both give the same samples: see tests/integrations/test_deepinv.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastguide import digits
from fastguide.integrations import deepinv as ours

from ..cases import Case, Figure, Setting, case, cpu_only, rival
from ..samplers.digits import import_deepinv


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
    """The denoiser of standard normals. It costs next to nothing."""
    return x / (1.0 + sigma**2)


def _build(name: str, network: bool, options: dict[str, Any], setting: Setting) -> Case:
    cpu_only(setting)
    deepinv = import_deepinv()  # its physics are needed on both sides
    steps = setting.pick(50, 4)
    shape = setting.pick((64, 1, 8, 8) if network else (1, 3, 256, 256), (1, 1, 8, 8))
    denoiser = DigitsDenoiser() if network else shrink
    torch.manual_seed(0)
    noise = deepinv.physics.GaussianNoise(0.05)
    physics = deepinv.physics.Inpainting(shape[1:], mask=0.5, noise_model=noise)
    y = physics(torch.rand(shape))

    def sampler(module: Any) -> Any:
        if name == "DPS":
            return module.DPS(denoiser, num_steps=steps + 1, **options)
        return module.DiffPIR(denoiser, deepinv.optim.data_fidelity.L2(), max_iter=steps)

    calls = [partial(sampler(module), y, physics) for module in (ours, deepinv.sampling)]

    def check() -> None:
        got, expected = (call() for call in calls)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        for far in (lambda x: physics.A(x) - y, lambda x: x.diff()):  # residuals, and differences of neighbours
            ours_far, theirs_far = (far(x).square().mean().sqrt() for x in (got, expected))
            assert abs(ours_far / theirs_far - 1.0) < (0.05 if y.numel() > 1000 else 0.5), (ours_far, theirs_far)

    return Case(
        f"{name}{' in float32' if options else ''}, {steps} steps of {list(shape)}, "
        f"{'the digits network' if network else 'no network'}",
        elements=y.numel() * steps,
        bytes=None,
        ours=calls[0],
        check=check,
        rivals=[rival("deepinv", lambda: calls[1])],
        figures=lambda seconds: [Figure("ours, one step", seconds / steps * 1e6, "us")],
    )


for _kind, _name, _options in (
    ("dps", "DPS", {}),
    ("dps-float32", "DPS", dict(dtype=torch.float32)),
    ("diffpir", "DiffPIR", {}),
):
    for _network in (True, False):
        _suffix = "network" if _network else "bare"
        case(f"integrations/deepinv-{_kind}-{_suffix}")(partial(_build, _name, _network, _options))
