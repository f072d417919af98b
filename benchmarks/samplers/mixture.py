"""Twisted diffusion sampling of a mixture in two dimensions, against a straightforward loop in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastguide as fg
from fastguide import sampling
from fastguide.reference import step_coefficients

from ..cases import Absent, Call, Case, Figure, Setting, case, cpu_only, rival
from .meter import Meter, Net, time_outside, unwrapped


class Mixture:
    """25 equal modes on a grid: the exact denoiser ``net(x [N, 2], t [N])``, and ``log p(y)``. On a grid the
    coordinates are independent, so only five modes for each coordinate are computed."""

    def __init__(self, device: torch.device):
        self.grid, self.width = torch.arange(-2.0, 3.0, device=device), 0.15
        self.schedule = fg.schedules.vp_linear(1000)
        times = torch.arange(1000)
        levels = torch.stack([self.schedule.alpha(times), self.schedule.sigma(times)])
        self.levels = levels.to(device, torch.float32)  # on the device: a graph cannot wait for the host
        self.matrix, self.scale = torch.tensor([[1.0, 0.6]], device=device), 0.25
        self.y = torch.tensor([[0.9]], device=device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels[:, t[:1].long()]  # one level for all
        variance = (alpha * self.width) ** 2 + sigma**2
        residual = x[..., None] - alpha * self.grid  # [N, 2, 5]
        share = torch.softmax(-0.5 * residual.square() / variance, dim=-1)
        return (share * (self.grid + alpha * self.width**2 / variance * residual)).sum(-1)

    def evidence(self) -> float:
        variance = (self.width**2 * self.matrix.square().sum() + self.scale**2).item()
        means = torch.cartesian_prod(self.grid, self.grid)
        residual = (self.y - means @ self.matrix.T).double()  # [25, 1]
        terms = -0.5 * (residual.square() / variance + math.log(2 * math.pi * variance))
        return torch.logsumexp(terms, 0).item() - math.log(len(means))


def eager_tds(model: Mixture, net: Net, particles: int, steps: int, resample: Callable[[Tensor], Tensor]) -> float:
    """Twisted diffusion sampling with the ``"moment"`` covariance of one measurement, written directly in PyTorch.
    ``resample(weights [K])`` returns ancestors ``[K]``. Returns ``log p(y)``."""
    levels = model.schedule.levels(steps)
    matrix, y, scale = model.matrix, model.y, model.scale

    def log_density(residual: Tensor, variance: Tensor | float) -> Tensor:
        return -0.5 * (residual.square() / variance + torch.log(2 * math.pi * torch.as_tensor(variance)))[:, 0].double()

    def twist(x: Tensor, level: fg.schedules.Level) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        x0 = net(x, torch.full((particles,), level.t, device=x.device))
        z = x0 @ matrix.T  # [K, 1]
        (gradient,) = torch.autograd.grad(z.sum(), x)
        with torch.no_grad():
            column = level.sigma**2 / level.alpha * gradient  # C_t A^T, [K, 2]
            variance = (column @ matrix.T).clamp(min=0) + scale**2
            residual = y - z
            return x0.detach(), column * (residual / variance), log_density(residual, variance)

    top = levels[0]
    x = torch.randn(particles, 2, device=y.device) * math.hypot(top.alpha, top.sigma)
    x0, shift, log_prob = twist(x, top)
    log_weights = log_prob.clone()
    for i, (t, s) in enumerate(pairwise(levels), start=1):
        weights = torch.softmax(log_weights, 0)
        if 1.0 / weights.square().sum() < 0.5 * particles:
            ancestors = resample(weights)
            x, x0, shift, log_prob = (v[ancestors] for v in (x, x0, shift, log_prob))
            log_weights = (torch.logsumexp(log_weights, 0) - math.log(particles)).expand(particles)
        a, b, tau = step_coefficients((t.alpha, t.sigma, s.alpha, s.sigma, sampling.noise(t, s, 1.0)))
        x = a * x + b * x0
        if tau > 0:
            delta, z = b / tau * shift, torch.randn_like(x)
            x = x + tau * (delta + z)
            log_weights = log_weights - (delta * z + 0.5 * delta.square()).sum(1).double()
        if i < steps:
            x0, shift, new = twist(x, s)
        else:
            new = log_density(y - x @ matrix.T, scale**2)
        log_weights, log_prob = log_weights + new - log_prob, new
    return (torch.logsumexp(log_weights, 0) - math.log(particles)).item()


def _resample_particles(weights: Tensor) -> Tensor:
    from particles import resampling

    return torch.from_numpy(resampling.systematic(weights.numpy(), len(weights)))


def _resample_numpy(weights: Tensor) -> Tensor:
    positions = (np.arange(len(weights)) + np.random.random()) / len(weights)
    found = np.searchsorted(np.cumsum(weights.numpy()), positions)
    return torch.from_numpy(found).clamp_(max=len(weights) - 1)  # rounding may leave the sum below 1


def _resample_torch(weights: Tensor) -> Tensor:
    grid = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    positions = (grid + torch.rand((), device=weights.device)) / len(weights)
    return torch.searchsorted(weights.cumsum(0), positions).clamp_(max=len(weights) - 1)


class Points:
    """Twisted diffusion sampling of the mixture given one measurement."""

    def __init__(self, setting: Setting, particles: int, steps: int):
        self.device, self.samples, self.steps = setting.device, particles, steps
        self.model = model = Mixture(setting.device)
        self.likelihood = fg.likelihoods.Gaussian(model.y, fg.operators.Matrix(model.matrix), model.scale)
        self.what = f"TDS, mixture of 25 modes in two dimensions, K = {particles}, {steps} steps"

    def run(self, wrap: Callable[[Net], Net] = unwrapped) -> fg.Samples:
        return fg.sample(**self.arguments(wrap), seed=0)

    def capture(self) -> Call:
        return partial(fg.capture(**self.arguments()), seed=0)

    def arguments(self, wrap: Callable[[Net], Net] = unwrapped) -> dict[str, Any]:
        prior = fg.Denoiser(wrap(self.model), self.model.schedule, "sample")
        guidance = fg.TDS(self.likelihood, self.samples, covariance="moment")
        return dict(prior=prior, shape=(1, 2), guidance=guidance, steps=self.steps, device=self.device)

    def check(self, meter: Meter) -> None:
        found, exact = self.run(meter.wrap).log_evidence.item(), self.model.evidence()
        allowed = max(0.05, 20.0 * self.samples**-0.5)  # about four standard deviations, and the error of the steps
        assert abs(found - exact) < allowed, f"log p(y) = {found}, expected {exact}"


@case("samplers/mixture-tds")
def mixture_tds(setting: Setting) -> Case:
    task = Points(setting, *setting.pick((100_000, 100), (4000, 60)))
    model, particles, steps, run = task.model, task.samples, task.steps, task.run
    exact = model.evidence()
    meter = Meter(setting.device, record=True)

    def eager(resample: Callable[[Tensor], Tensor]) -> Call:
        # Fewer particles are enough to see that it is the same algorithm.
        torch.manual_seed(0)
        found = eager_tds(model, model, setting.pick(10_000, particles), steps, resample)
        assert abs(found - exact) < 0.3, f"the eager loop finds log p(y) = {found}, expected {exact}"
        return partial(eager_tds, model, model, particles, steps, resample)

    def figures(_: float) -> list[Figure]:
        def eagerly(wrap: Callable[[Net], Net]) -> float:
            return eager_tds(model, wrap(model), particles, steps, resample)

        resample, times = _resample_particles if rivals[0].call else stand_in, setting.pick(3, 1)
        ours, share = time_outside(setting.device, run, times)
        theirs, their_share = time_outside(setting.device, eagerly, times)
        return [
            Figure("time outside the denoiser's passes", share, "of all"),
            Figure("of the eager loop", their_share, "of all"),
            Figure("seconds outside, the eager loop's over ours", theirs / ours, "x"),
        ]

    def with_particles() -> Call:
        cpu_only(setting)
        try:
            import particles as _  # noqa: F401
        except ImportError as error:
            raise Absent(f"particles is not installed (0.4 needs numpy < 2): {error}") from error
        return eager(_resample_particles)

    rivals = [rival("eager loop, resampling of particles", with_particles)]
    stand_in = _resample_numpy if setting.device.type == "cpu" else _resample_torch
    if rivals[0].absent:
        name = "numpy's" if stand_in is _resample_numpy else "torch's"
        rivals.append(rival(f"eager loop, resampling by {name} searchsorted", lambda: eager(stand_in)))
    rivals.append(rival("the denoiser's passes alone, same inputs", lambda: meter.replay))
    return Case(
        task.what,
        elements=particles * steps,
        bytes=None,
        ours=run,
        check=partial(task.check, meter),
        rivals=rivals,
        least_rounds=3,
        figures=figures,
    )
