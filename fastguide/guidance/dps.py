"""Diffusion posterior sampling (Chung et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..arguments import flag
from ..likelihoods import Likelihood
from ..ops._arguments import Scalar
from ..profiling import phase
from .base import Run, Schedulable, State, entry, per_step
from .checks import check_covariance, default_covariance, prepare_likelihood
from .scores import gradient_blamed, likelihood_score


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling: each step follows the gradient of the log-likelihood.

        x_s = reverse_step(x_t) + zeta(t) grad_{x_t} log p(y | x_t)

    Where ``alpha_t < 0.001 sigma_t``, ``x_t`` says nothing about ``x_0``, and the gradient is that of the limit
    ``alpha_t = 0``.

    DPS is not exact. Its samples are not draws of ``p(x | y)``, whatever the number of steps; those of `TDS` are, as
    its particles grow in number.

    Args:
        likelihood: The error model. Its operator must be differentiable, or linear with an adjoint.
        zeta: Size of the step along the gradient, finite and ``>= 0``. A number, a table with one entry per step, or a
            function of the schedule's time. With ``normalize`` and Gaussian noise, start with ``sqrt(m) scale / s^2``
            for m measurements and an operator whose largest singular value is s: less where the samples diverge, more
            where they miss the measurement. A step moves ``A x0_hat`` by up to ``2 zeta s^2``, and overshoots where
            that is much more than the norm of the noise. So 0.1 to 1 suits masks and pooling, where s is at most 1. A
            projection sums the pixels of each ray, and with ``s^2 = 29`` the same range is far too large. ``"score"``
            gives the gradient the weight that the score has in the mean, so that the step is the guided one; it needs
            ``normalize=False``.
        normalize: Divide by half the norm of the gradient in ``A x0_hat``. For a Gaussian that is the step of the
            paper, ``-zeta / norm(y - A x0_hat) * grad norm(y - A x0_hat)^2``. The authors' code takes the gradient of
            the norm itself, which is half as long: their ``scale: 1.0`` is ``zeta=0.5`` here.
        covariance: Covariance of ``x_0`` given ``x_t`` in ``p(y | x_t)``. ``"point"`` is none, as published.
            ``"isotropic"`` is ``r_t^2 I``, with ``r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2)``. ``"moment"`` is
            second-order Tweedie; it needs a linear operator and at most 16 measurements. None takes ``"point"``. With
            ``zeta="score"``, where that can diverge, None takes ``"moment"`` where it can be had, else ``"isotropic"``.

    Raises:
        TypeError: ``likelihood`` is not a likelihood, or ``zeta`` or ``normalize`` has the wrong type. Like all errors
            of guidance objects, this is raised when the run starts.
        ValueError: ``zeta`` is outside its range, ``normalize`` is True with ``zeta="score"``, or ``covariance`` is
            unknown or does not fit the likelihood.

    Source:
        Chung et al. 2023, algorithm 1. With ``covariance="moment"``, ``zeta="score"`` and ``normalize=False``: TMPD,
        Boys et al. 2023.
    """

    likelihood: Likelihood
    zeta: Schedulable | str = 1.0
    normalize: bool = True
    covariance: str | None = None

    def prepare(self, run: Run) -> DPS:
        likelihood, measurements = prepare_likelihood(run, self.likelihood)
        covariance = self.covariance
        if covariance is None:
            scored = isinstance(self.zeta, str) and self.zeta == "score"  # an array would compare entry by entry
            covariance = default_covariance(likelihood, measurements) if scored else "point"
        likelihood = check_covariance(run, likelihood, covariance, measurements)
        normalize = flag("normalize", self.normalize)
        prepared = replace(self, likelihood=likelihood, covariance=covariance, normalize=normalize)
        if not isinstance(self.zeta, str):
            return replace(prepared, zeta=per_step("zeta", self.zeta, run.levels))
        if self.zeta != "score":
            raise ValueError(f"zeta: expected a number, a table, a function or 'score', got {self.zeta!r}")
        if normalize:
            raise ValueError("normalize: expected False with zeta='score', which fixes the weight, got True")
        return prepared

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        assert self.covariance is not None
        x0_hat, gradient, _, *norm = likelihood_score(
            run, self.likelihood, self.covariance, state.x, i, norm=self.normalize
        )
        with phase("step"):
            scale = self._weight(run, i)
            if self.normalize:
                length = norm[0].double()  # its inverse may be beyond float32
                scale = scale * torch.where(length > 0, 2.0 / length, 0.0)
            x = run.reverse_step(
                state.x,
                x0_hat,
                i,
                displacement=gradient,
                displacement_scale=scale,
                blamed=("x0_hat", gradient_blamed(self.likelihood)),
            )
            return State(x, x0_hat=x0_hat)

    def _weight(self, run: Run, i: int) -> Scalar:
        """The weight of the gradient as `PullBack` has it."""
        if isinstance(self.zeta, str):
            return run.x0_weight(i) * run.shift_scale(i)
        level = run.levels[i]
        return entry(self.zeta, i) * level.alpha / level.sigma**2 * run.shift_scale(i)
