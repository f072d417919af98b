"""Priors whose every quantity is known in closed form, for the tests of the samplers."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

import fastguide as fg


class GaussianPrior:
    """``x_0 ~ N(mean, covariance)`` ``[D]`` with its exact denoiser, and the exact law of the discretised chain."""

    def __init__(self, mean: Tensor, covariance: Tensor, schedule: fg.schedules.Schedule):
        self.mean, self.covariance, self.schedule = mean.double(), covariance.double(), schedule
        self.eye = torch.eye(len(mean), dtype=torch.float64)

    def gain(self, alpha: float, sigma: float) -> Tensor:
        """``G`` with ``E[x_0 | x_t] = mean + G (x_t - alpha mean)``."""
        c = self.covariance
        return alpha * c @ torch.linalg.inv(alpha**2 * c + sigma**2 * self.eye)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.schedule.level(t[0].item())
        mean, gain = self.mean.to(x), self.gain(level.alpha, level.sigma).to(x)
        return mean + (x.flatten(1) - level.alpha * mean) @ gain.T

    def denoiser(self) -> fg.Denoiser:
        return fg.Denoiser(self, self.schedule, "sample")

    def chain(self, steps: int, eta: float = 1.0, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what ``steps`` exact reverse steps make of the starting noise: the prior that the
        particle methods target. Written from the transition's definition, not from the package's coefficients. With
        ``rows`` ``[m, D]`` the noise has also the variance of ``x_0`` given ``x_t``, its mean over these rows."""
        levels = self.schedule.levels(steps)
        m = torch.zeros_like(self.mean)
        v = (levels[0].alpha ** 2 + levels[0].sigma ** 2) * self.eye
        for t, s in pairwise(levels):
            given = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
            tau = eta * math.sqrt(given) * s.sigma / t.sigma
            a = math.sqrt(s.sigma**2 - tau**2) / t.sigma
            b = s.alpha - t.alpha * a
            gain = self.gain(t.alpha, t.sigma)
            m = a * m + b * (self.mean + gain @ (m - t.alpha * self.mean))
            step = a * self.eye + b * gain
            given_x_t = t.sigma**2 / t.alpha * gain if t.alpha > 0 else self.eye
            added = (
                0.0 if rows is None else b**2 * (torch.trace(rows @ given_x_t @ rows.T) / rows.square().sum()).item()
            )
            v = step @ v @ step.T + (tau**2 + added) * self.eye
        return m, v


def posterior(
    mean: Tensor, covariance: Tensor, matrix: Tensor, y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[B, D]``, covariance ``[D, D]`` and ``log p(y)`` ``[B]`` of ``N(mean, covariance)`` under
    ``y = A x + scale * noise``."""
    gram = matrix @ covariance @ matrix.T + scale**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = covariance @ matrix.T @ torch.linalg.inv(gram)
    residual = y - mean @ matrix.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(matrix), dtype=torch.float64), gram)
    return mean + residual @ gain.T, covariance - gain @ matrix @ covariance, evidence.log_prob(residual)


def example(schedule: fg.schedules.Schedule | None = None) -> GaussianPrior:
    """A correlated three-dimensional prior."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    return GaussianPrior(mean, root @ root.T, schedule or fg.schedules.flow())


MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([[0.7, -0.4], [-0.6, 0.9]], dtype=torch.float64)
SCALE = 0.3


def gaussian_likelihood(y: Tensor = Y, scale: float = SCALE) -> fg.likelihoods.Gaussian:
    return fg.likelihoods.Gaussian(y, fg.operators.Matrix(MATRIX), scale)
