"""The first two moments of ``x_T``, for data that are not small in the noise of the first level.

A sampler starts from ``N(0, (alpha_T^2 + sigma_T^2) I)``. That is the marginal of ``x_T`` for data of mean 0 and
variance 1, or in the limit ``alpha_T = 0``. Otherwise an error is left that neither steps nor particles reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..denoiser import Conditional
from ..profiling import phase
from ..schedules import Level
from .watch import Watch

if TYPE_CHECKING:
    from .base import Run

STARTS = ("prior", "matched")

_STREAM = 11  # no sampler draws from it
_DRAWS, _ROUNDS = 128, 4  # so many times each is the denoiser evaluated
_DIRECTIONS = 8  # most directions that get a variance of their own
_LARGEST_SHARE = 0.95  # of the data in a variance of x_T: above it, moments are not extrapolated further


@dataclass(frozen=True)
class Moments:
    """A normal distribution of ``x_T``. Its tensors are float64, with one row for each observation, or one for all.

    Attributes:
        mean: ``[rows, 1, D]``, where D is the number of elements of an event.
        deviation: ``[rows, 1, 1]``, the standard deviation outside of ``basis``.
        basis: ``[rows, r, D]``, orthonormal directions.
        root: ``[rows, r, r]``, the square root of the covariance within ``basis``, less ``deviation``.
    """

    mean: Tensor
    deviation: Tensor
    basis: Tensor
    root: Tensor

    def draw(self, z: Tensor) -> Tensor:
        """What standard normals ``z`` ``[rows * n, *event]`` become."""
        flat = z.reshape(self.mean.shape[0], -1, self.mean.shape[2]).double()
        within = flat @ self.basis.mT @ self.root @ self.basis
        return (self.mean + self.deviation * flat + within).to(z.dtype).view(z.shape)


def match_start(run: Run) -> Moments:
    """The mean and the covariance of ``x_T`` at the first level of a run, from what its denoiser predicts there.

    With the prediction ``x0_hat`` and second-order Tweedie, ``Cov[x_0 | x_T] = (sigma^2 / alpha) d x0_hat / d x_T``:

        E[x_T] = alpha E[x0_hat]
        Cov[x_T] = sigma^2 I + alpha sigma^2 E[d x0_hat / d x_T] + alpha^2 Cov[x0_hat]

    The expectations are over ``x_T``: draws of the last estimate stand for it, a few times. The mean derivative is the
    regression of ``x0_hat`` on the draws (Stein 1981), so the network needs none. Outside of the few directions in
    which ``x0_hat`` varies most, the covariance is a multiple of the identity.

    The result depends on the network and the level, and not on the seed or the batch.
    """
    nets = (run.denoiser.net, run.denoiser.unconditional)
    conditions = max((net.observations for net in nets if isinstance(net, Conditional)), default=1)
    alike = conditions == 1 and not isinstance(run.denoiser.guidance_scale, Tensor)
    found = [_of_observation(run, b) for b in range(1 if alike else run.observations)]
    return Moments(*(torch.cat([getattr(m, field.name) for m in found]) for field in fields(Moments)))


def _of_observation(run: Run, b: int) -> Moments:
    level, size, watch = run.levels[0], math.prod(run.event), Watch()
    few = replace(run, observations=1, particles=_DRAWS, watch=watch)

    def predict(rows: Tensor, x: Tensor) -> tuple[Tensor]:
        return (few.convert(x, 0, run.denoiser.outputs(x, level, rows + b)),)

    zero = torch.zeros(1, 1, size, dtype=torch.float64, device=run.device)
    moments = Moments(zero, zero[..., :1] + math.hypot(level.alpha, level.sigma), zero, zero[..., :1])
    for i in range(_ROUNDS):
        half = ops.randn(
            (_DRAWS // 2, size), seed=0, step=i, stream=_STREAM, dtype=torch.float64, device=run.device
        )  # fmt: skip
        x = moments.draw(torch.cat([half, -half]))  # pairs: their mean is exact where the denoiser is linear
        x = x.to(run.dtype)
        with torch.no_grad(), phase("network"):
            (x0_hat,) = few.in_chunks(predict, x.view(-1, *run.event))
        watch.report()
        moments = _moments(level, x.double()[None], x0_hat.view(x.shape).double()[None])
    return moments


def _moments(level: Level, x: Tensor, x0_hat: Tensor) -> Moments:
    """The moments of ``x_T`` from draws ``[rows, n, D]`` and their predictions."""
    n, size, alpha, noise = *x.shape[1:], level.alpha, level.sigma**2
    was, mean = x.mean(1, keepdim=True), x0_hat.mean(1, keepdim=True)
    a, b = x - was, x0_hat - mean
    basis = torch.linalg.svd(b, full_matrices=False).Vh[:, :_DIRECTIONS]
    a_in, b_in = a @ basis.mT, b @ basis.mT
    slope = torch.linalg.solve(a_in.mT @ a_in, a_in.mT @ b_in)
    shares, own = torch.linalg.eigh(alpha * (slope + slope.mT) / 2)  # of the data in the variance of x_T
    basis, a_in, b_in = own.mT @ basis, a_in @ own, b_in @ own
    shares = shares.clamp(0.0, _LARGEST_SHARE)
    # Draws of other moments have predictions along the slope. So the moments that reproduce themselves are further on.
    mean = alpha * mean + ((alpha * mean - was) @ basis.mT * (shares / (1 - shares))[:, None]) @ basis
    drawn = a_in.mT @ a_in / n
    found = noise * torch.diag_embed(1 + shares) + alpha**2 * (b_in.mT @ b_in) / n
    further = 1 / (1 - shares[:, :, None] * shares[:, None, :])
    values, vectors = torch.linalg.eigh(drawn + further * (found - drawn))
    a_out, b_out = a - a_in @ basis, b - b_in @ basis
    slope_out = alpha * (a_out * b_out).sum((1, 2)) / a_out.square().sum((1, 2)).clamp(min=noise)
    spread_out = alpha**2 * b_out.square().sum((1, 2)) / (n * max(size - basis.shape[1], 1))
    # Data and noise are independent, so each variance is at least that of the noise.
    deviation = torch.sqrt(noise + (noise * slope_out + spread_out).clamp(min=0.0))[:, None, None]
    deviations = torch.diag_embed(values.clamp(min=noise).sqrt() - deviation[:, 0])
    return Moments(mean, deviation, basis, vectors @ deviations @ vectors.mT)
