"""Distances from posteriors that are known: the mixture of 25 Gaussians of Cardoso et al. 2024 (MCGDiff).

The modes are at ``(8 i, 8 j, 8 i, 8 j, ...)`` for ``i`` and ``j`` from -2 to 2, with unit covariance. A problem draws
the modes' shares, an operator, the noise's scale, a truth and its measurement. The posterior is a mixture again, so
draws of it and ``log p(y)`` are exact. The distance is the sliced Wasserstein distance (order 2, 500 directions). Its
floor is the distance of two sets of exact draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import fastguide as fg

from ..cases import Case, Figure, Setting, case

SCHEDULE = fg.schedules.vp_linear(1000)


class Problem:
    """One measurement of a mixture in ``dimensions``, in float64. ``net(x [N, D], t [N])`` is its exact denoiser."""

    def __init__(self, dimensions: int, measurements: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        places = 8.0 * torch.arange(-2, 3, dtype=torch.float64)
        self.means = torch.cartesian_prod(places, places).repeat(1, dimensions // 2)  # [25, D]
        shares = randn(25).square()
        self.log_shares = torch.log(shares / shares.sum())
        right, left = torch.linalg.qr(randn(dimensions, measurements)).Q, torch.linalg.qr(randn(*[measurements] * 2)).Q
        singular = torch.rand(measurements, generator=generator, dtype=torch.float64)
        self.matrix = left @ torch.diag(singular) @ right.T
        self.scale = (singular.max() * torch.rand((), generator=generator, dtype=torch.float64)).item()
        mode = torch.multinomial(self.log_shares.exp(), 1, generator=generator)
        truth = self.means[mode] + randn(1, dimensions)
        self.y = truth @ self.matrix.T + self.scale * randn(1, measurements)  # [1, m]
        times = torch.arange(1000)
        self._levels = torch.stack([SCHEDULE.alpha(times), SCHEDULE.sigma(times)]).float()
        self._float32 = self.means.float(), self.log_shares.float()

    def net(self, x: Tensor, t: Tensor) -> Tensor:
        means, log_shares = self._float32
        alpha, sigma = (v[:, None] for v in self._levels[:, t.long()])
        variance = alpha**2 + sigma**2
        exponent = alpha * (x @ means.T) - 0.5 * alpha**2 * means.square().sum(1)
        share = torch.softmax(log_shares + exponent / variance, dim=1)
        return (alpha * x + sigma**2 * (share @ means)) / variance

    @cached_property
    def _posterior(self) -> tuple[Tensor, Tensor, float]:
        """The logarithms of the modes' weights ``[25]``, the gain ``[D, m]``, and ``log p(y)``."""
        gram = self.matrix @ self.matrix.T + self.scale**2 * torch.eye(len(self.matrix), dtype=torch.float64)
        residual = self.y - self.means @ self.matrix.T
        of_y = torch.distributions.MultivariateNormal(torch.zeros_like(residual[0]), gram)
        log_weights = of_y.log_prob(residual) + self.log_shares
        return log_weights, torch.linalg.solve(gram, self.matrix).T, log_weights.logsumexp(0).item()

    @property
    def log_evidence(self) -> float:
        return self._posterior[2]

    @property
    def weights(self) -> Tensor:
        """The posterior mass of each mode, ``[25]``."""
        return torch.softmax(self._posterior[0], 0)

    def draw(self, number: int, seed: int) -> Tensor:
        """Exact draws of the posterior, ``[number, D]``."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        x = self.means[mode] + torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        noise = torch.randn(number, len(self.matrix), generator=generator, dtype=torch.float64)
        return x + (self.y + self.scale * noise - x @ self.matrix.T) @ self._posterior[1].T

    def masses(self, x: Tensor) -> Tensor:
        """The share of the samples ``x`` nearest to each mode, ``[25]``."""
        return torch.bincount(torch.cdist(x, self.means).argmin(1), minlength=25) / len(x)


def sliced_distance(x: Tensor, other: Tensor, directions: int = 500) -> float:
    """The sliced Wasserstein distance of order 2 between two sets of as many samples ``[n, D]``."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64)
    normals = normals / normals.norm(dim=0)
    first, second = ((v @ normals).sort(0).values for v in (x, other))
    return (first - second).square().mean().sqrt().item()


Guidance = Callable[[fg.likelihoods.Gaussian, int], Any]
METHODS: dict[str, Guidance] = {
    "TDS": lambda likelihood, k: fg.TDS(likelihood, k),
    "TDS with DDPM's kernel": lambda likelihood, k: fg.TDS(likelihood, k, base_kernel="ddpm"),
    "TMPD": lambda likelihood, k: fg.DPS(likelihood, zeta="score", normalize=False, covariance="moment"),
    "PiGDM": lambda likelihood, k: fg.PiGDM(likelihood),
    "PnP": lambda likelihood, k: fg.PnP(likelihood),
}


def solve(problem: Problem, method: str, samples: int, steps: int, seed: int) -> tuple[Tensor, float | None]:
    """Samples ``[samples, D]`` of equal weight, and the estimate of ``log p(y)`` of a particle method."""
    operator = fg.operators.Matrix(problem.matrix.float())
    guidance = METHODS[method](fg.likelihoods.Gaussian(problem.y.float(), operator, problem.scale), samples)
    weighted = hasattr(guidance, "particles")
    out = fg.sample(
        fg.Denoiser(problem.net, SCHEDULE, "sample"),
        (1, problem.means.shape[1]),
        guidance=guidance,
        steps=steps,
        seed=seed,
        start="matched",  # in 800 dimensions the data move x_T by up to three standard deviations
        samples_per_observation=None if weighted else samples,
    )
    x = (out.draw(samples) if weighted else out.x)[0].double()
    return x, out.log_evidence.item() if out.log_evidence is not None else None


def _mixture(setting: Setting, dimensions: int) -> Case:
    measured = [m for m in (1, 2, 4) if m <= dimensions]
    problems, samples, steps = setting.pick((20, 2000, (20, 100)), (1, 64, (4,)))

    def check() -> None:
        problem = Problem(dimensions, measured[-1], 0)
        exact = problem.draw(20_000, 0)
        torch.testing.assert_close(problem.masses(exact), problem.weights, rtol=0, atol=0.02, check_dtype=False)

    def figures(_: float) -> list[Figure]:
        found = []
        for m in measured:
            instances = [Problem(dimensions, m, seed) for seed in range(problems)]
            exact = [(p.draw(samples, 1), p.draw(samples, 2)) for p in instances]
            floors = [sliced_distance(*pair) for pair in exact]
            for number in steps:
                for method in METHODS:
                    name = f"{method}, {m} measured, {number} steps"
                    distances, masses, errors = [], [], []
                    for problem, (truth, _other), floor in zip(instances, exact, floors, strict=True):
                        x, log_evidence = solve(problem, method, samples, number, seed=0)
                        distances.append(sliced_distance(x, truth) / floor)
                        masses.append((problem.masses(x) - problem.weights).abs().sum().item() / 2)
                        if log_evidence is not None:
                            errors.append(abs(log_evidence - problem.log_evidence))
                    aim = (3.0 if dimensions > 80 else 2.5) if number < 100 else (2.0 if dimensions > 80 else 1.5)
                    judged = method == "TDS" and not setting.quick
                    found.append(
                        Figure(f"{name}: distance / floor", statistics.median(distances), "", aim if judged else None)
                    )
                    found.append(Figure(f"{name}: mass in wrong modes", statistics.median(masses), ""))
                    if errors:
                        most = (0.2 if dimensions > 80 else 0.1) if judged else None
                        found.append(Figure(f"{name}: error of log p(y)", statistics.median(errors), "", most))
        return found

    what = f"mixture of 25 modes in {dimensions} dimensions, {samples} samples, medians over {problems} problems"
    return Case(what, problems * samples, None, None, check, figures=figures)


for _dimensions in (2, 8, 80, 800):
    case(f"exactness/mixture-{_dimensions}")(partial(_mixture, dimensions=_dimensions))
