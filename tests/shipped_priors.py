"""Helpers for the tests of the shipped priors."""

from __future__ import annotations

import torch

import fastguide as fg


def assert_gradient_in_x(prior: fg.Denoiser, shape: tuple[int, ...]) -> None:
    """The gradient in ``x_t`` of a float64 prior, along one direction, equals central differences."""
    level, generator = prior.schedule.level(300), torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, *shape, dtype=torch.float64, generator=generator)

    def value(x: torch.Tensor) -> torch.Tensor:
        return prior.x0_hat(x, level).square().sum()

    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    with torch.no_grad():
        slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)
