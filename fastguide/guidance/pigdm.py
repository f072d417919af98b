"""Pseudo-inverse guidance (Song et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import got
from ..foreign import returned
from ..likelihoods import Gaussian, Likelihood
from ..operators import LinearOperator, solve_with_noise
from ..ops._arguments import Scalar
from ..profiling import phase
from .base import Run, Schedulable, State, entry, isotropic_variance, per_step
from .checks import prepare_likelihood
from .scores import PullBack, gradient_blamed


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance: the reverse step with a vector ``g`` added to the score.

        g = zeta r_t^-2 (d x0_hat / d x_t)^T v,    r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2)

    - For an exact measurement, ``Gaussian(..., scale=0)``, ``v = h^+(y) - h^+(h(x0_hat))``. Any operator ``h`` with a
      pseudo-inverse will do: quantisation, JPEG and the like need no derivative.
    - With noise, ``v = r_t^2 A^T (r_t^2 A A^T + scale^2 I)^-1 (y - A x0_hat)``, for a linear operator. Where the
      spectrum is known this has a closed form; elsewhere 100 conjugate gradients solve it. It tends to the first as
      ``scale`` tends to 0.

    Args:
        likelihood: A `Gaussian`.
        zeta: Factor of the guidance, finite and ``>= 0``. A number, a table with one entry per step, or a function of
            the schedule's time. At 1, the default, the step is the guided mean of the isotropic approximation.

    Raises:
        TypeError: ``likelihood`` is not a Gaussian, or ``zeta`` has the wrong type. Like all errors of guidance
            objects, this is raised when the run starts.
        ValueError: ``zeta`` is outside its range, ``scale`` is above 0 and the operator is not linear, or ``scale`` is
            0 and the operator has no pseudo-inverse.

    Source:
        Song et al. 2023 (PiGDM).
    """

    likelihood: Gaussian
    zeta: Schedulable = 1.0

    def prepare(self, run: Run) -> PiGDM:
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"likelihood: expected a Gaussian for PiGDM, got {got(self.likelihood)}")
        likelihood, _ = prepare_likelihood(run, self.likelihood)
        assert isinstance(likelihood, Gaussian)
        operator = likelihood.operator
        scales = [likelihood.scale_at(level.t) for level in run.levels[:-1]]
        noisy = any(isinstance(scale, Tensor) or scale > 0 for scale in scales)
        if noisy and not isinstance(operator, LinearOperator):
            raise ValueError(f"likelihood: with scale > 0 expected a linear operator, got {operator}")
        return replace(self, likelihood=likelihood, zeta=per_step("zeta", self.zeta, run.levels))

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        spread = isotropic_variance(run.levels[i])

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            pull_back = PullBack(run, x, i, rows)
            with phase("gradient"):
                with torch.no_grad():
                    v = self.vector(pull_back.x0, self.likelihood.at(rows), run.levels[i].t, spread)
                return pull_back.x0_hat, pull_back(v)

        x0_hat, gradient = run.in_chunks(chunk, state.x)
        with phase("step"):
            scale = entry(self.zeta, i) * run.x0_weight(i) * run.shift_scale(i) / spread
            x = run.reverse_step(
                state.x,
                x0_hat,
                i,
                displacement=gradient,
                displacement_scale=scale,
                blamed=("x0_hat", gradient_blamed(self.likelihood)),
            )
            return State(x, x0_hat=x0_hat)

    @staticmethod
    def vector(x0_hat: Tensor, likelihood: Likelihood, t: float, spread: Scalar) -> Tensor:
        """The vector ``v`` of the class docstring, ``[n, *event]``, for the likelihood of these samples."""
        operator, y, scale = likelihood.operator, likelihood.y, likelihood.scale_at(t)
        if not isinstance(scale, Tensor) and scale == 0.0:
            known = returned("pseudo_inverse", operator.pseudo_inverse(y))
            return known - operator.pseudo_inverse(operator(x0_hat))
        assert isinstance(operator, LinearOperator)
        return operator.adjoint(solve_with_noise(operator, y - operator(x0_hat), spread, scale**2)) * spread
