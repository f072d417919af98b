"""Decoupled annealing posterior sampling (Zhang et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..arguments import got, integer, number
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..profiling import phase
from .base import (
    STREAM_LANGEVIN,
    STREAM_X0,
    STREAM_Y,
    Run,
    Schedulable,
    State,
    entry,
    isotropic_variance,
    per_sample,
    per_step,
)
from .checks import prepare_likelihood
from .pnp import PnP
from .solvers import choose_solver, largest_curvature, log_prob_and_gradient, solve

_ITERATIONS = {"closed": 1, "cg": 32, "langevin": 20}
_MOST = 1 << 16  # iterations and ODE steps: 2^32 counters serve 2^16 iterations of as many steps


@dataclass(frozen=True)
class DAPS:
    """Decoupled annealing posterior sampling: each step draws a clean sample given ``y``, and adds fresh noise to it.

        x0_hat = the prediction from x_t
        x_0 ~ N(x_0; x0_hat, r_t^2 I) p(y | x_0; scale(t))
        x_s = alpha_s x_0 + sigma_s z,    z ~ N(0, I)

    The sample is the ``x_0`` of the last step. Nothing of ``x_t`` is left in ``x_s``, so a step can correct the errors
    of earlier ones. The network is only evaluated, never differentiated. Where ``N(x0_hat, r_t^2 I)`` is the law of
    ``x_0`` given ``x_t``, as for independent standard normals, DAPS is exact. For other data it is not: the law is
    mostly narrower, so that the samples tend to spread too much.

    ``x_0`` is drawn by one of these:

    - ``"closed"``: a Gaussian, a linear operator and a known spectrum. An exact draw: the solution of `PnP` for
      ``x0_hat + r_t z_1`` and ``y + scale z_2``.
    - ``"cg"``: a Gaussian and a linear operator. The same by conjugate gradients, 32 by default.
    - ``"langevin"``: any likelihood. 20 unadjusted Langevin steps by default. They start at the solution of `PnP` for
      ``x0_hat + r_t z_1``, from where 20 do as well as 100 from ``x0_hat``, where the paper starts. An operator needs
      an adjoint or a derivative.

    Args:
        likelihood: The error model. ``Gaussian(..., scale=0)``, an exact measurement, needs ``"closed"``.
        r: Standard deviation ``r_t`` of ``x_0`` given ``x_t``, finite and ``> 0``. A number, a table with one entry per
            step, or a function of the schedule's time. None is that of unit-variance data, ``r_t^2 = sigma_t^2 /
            (alpha_t^2 + sigma_t^2)``. The paper's is ``sigma_t / alpha_t``, which is the same at low noise. A smaller
            one trusts the network more, and misses the measurement by more.
        ode_steps: Number of network evaluations in a step, in ``[1, 2^16)``. ``x0_hat`` is the end of the
            probability-flow ODE, by as many Euler steps over levels of the run, or fewer where fewer are left. 1, the
            default, is ``E[x_0 | x_t]``. The paper takes about 5.
        solver: ``"closed"``, ``"cg"`` or ``"langevin"``. ``"auto"``, the default, takes the first of these that
            applies.
        iterations: Number of Langevin steps or conjugate gradients, in ``[1, 2^16)``. None takes the solver's default.
            Must be None for ``"closed"``.
        step_size: Length of the Langevin steps times the largest curvature of ``-log(N(x_0; x0_hat, r_t^2 I) p(y |
            x_0))``, a number in ``(0, 1]``. Power iterations estimate the curvature for each sample and level. None is
            0.5. A step of ``c`` makes the variance in the steepest direction ``1 / (1 - c / 2)`` times too large. Must
            be None for the other solvers.

    Raises:
        TypeError: ``likelihood`` is not a likelihood, or another argument has the wrong type. Like all errors of
            guidance objects, this is raised when the run starts.
        ValueError: An argument is outside its range, or ``solver`` does not fit the likelihood. Also where ``sample``
            is given an ``eta``.

    Source:
        Zhang et al. 2025 (DAPS), algorithm 1.
    """

    likelihood: Likelihood
    r: Schedulable | None = None
    ode_steps: int = 1
    solver: str = "auto"
    iterations: int | None = None
    step_size: float | None = None
    _pnp: PnP | None = field(default=None, init=False, repr=False)  # the start of Langevin steps

    takes_eta = False

    def prepare(self, run: Run) -> DAPS:
        likelihood, _ = prepare_likelihood(run, self.likelihood)
        solver = choose_solver(likelihood, self.solver, _ITERATIONS)
        iterations, step_size = self.iterations, self.step_size
        if iterations is not None and solver == "closed":
            raise ValueError(f"iterations: expected None with the closed form, got {got(iterations)}")
        if step_size is not None and solver != "langevin":
            raise ValueError(f"step_size: expected None with solver={solver!r}, got {got(step_size)}")
        r = None if self.r is None else per_step("r", self.r, run.levels)
        if r is not None and min(r) == 0.0:
            raise ValueError("r: expected values > 0, got 0")
        prepared = replace(
            self,
            likelihood=likelihood,
            r=r,
            ode_steps=integer("ode_steps", self.ode_steps, 1, _MOST),
            solver=solver,
            iterations=_ITERATIONS[solver] if iterations is None else integer("iterations", iterations, 1, _MOST),
            step_size=0.5 if step_size is None else number("step_size", step_size, above=0.0, high=1.0),
        )
        if solver == "langevin":
            rho = None if r is None else [v**-2 for v in r]
            object.__setattr__(prepared, "_pnp", PnP(self.likelihood, rho).prepare(run))
        return prepared

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        x0_hat = self.x0_hat(run, state.x, i)
        with phase("solve"):
            x0 = self.draw(run, x0_hat, i)
        with phase("step"):  # decoupled: with tau = sigma_s nothing of x_t is left
            x = run.reverse_step(state.x, x0, i, tau=run.levels[i + 1].sigma, blamed=(self.likelihood.blamed,))
            return State(x, x0_hat=x0_hat)

    def x0_hat(self, run: Run, x: Tensor, i: int) -> Tensor:
        """The end of the probability-flow ODE from ``x`` at level ``i``, by Euler steps over levels of the run.

        The last Euler step is Tweedie's prediction, so that one step is that alone.
        """
        left = run.steps - i
        count = min(self.ode_steps, left)
        *levels, last = (i + k * left // count for k in range(count))
        for level, following in pairwise([*levels, last]):
            x0_hat = run.x0_hat(x, level)
            with torch.no_grad(), phase("network"):
                x = run.reverse_step(x, x0_hat, level, tau=0.0, to=following)
        return run.x0_hat(x, last)

    @torch.no_grad()
    def draw(self, run: Run, x0_hat: Tensor, i: int) -> Tensor:
        """A draw of ``x_0`` given ``x_t`` and ``y``, for ``x0_hat`` ``[n, *event]`` at level ``i``."""
        variance = isotropic_variance(run.levels[i]) if self.r is None else entry(self.r, i) ** 2
        mean = x0_hat.to(run.compute_dtype)
        x0 = (self._langevin if self.solver == "langevin" else self._exact)(run, mean, variance, i)
        return x0.to(x0_hat.dtype)

    def _exact(self, run: Run, mean: Tensor, variance: float, i: int) -> Tensor:
        """Perturb and solve: the most likely point for a perturbed mean and a perturbed ``y`` is a draw."""
        iterations = self.iterations
        assert iterations is not None
        event = tuple(self.likelihood.y.shape[1:])
        z, error = (run.randn(i, STREAM_X0, dtype=mean.dtype), run.randn(i, STREAM_Y, event, mean.dtype))

        def chunk(rows: Tensor, mean: Tensor, z: Tensor, error: Tensor) -> tuple[Tensor]:
            own, scale = self._of_samples(rows, run.levels[i].t)
            perturbed, y = mean + math.sqrt(variance) * z, own.y + scale * error
            return (solve(own, perturbed, y, scale, 1.0 / variance, self.solver, iterations),)

        return run.in_chunks(chunk, mean, z, error)[0]

    def _langevin(self, run: Run, mean: Tensor, variance: float, i: int) -> Tensor:
        """Langevin steps, each a share of the longest stable one.

        They start at the most likely point for a perturbed mean. There the directions that ``y`` does not measure have
        their spread already, and the others are near their peak.

        No drift is longer than the first one and twice the noise together. This bounds the steps where the density is
        steeper than at the start; around a Gaussian's peak all drifts are shorter.
        """
        assert self.iterations is not None and self.step_size is not None and self._pnp is not None
        t, of_callable = run.levels[i].t, isinstance(self.likelihood, CallableLikelihood)

        def curvature(rows: Tensor, x: Tensor) -> tuple[Tensor]:
            own, scale = self._of_samples(rows, t)
            return (largest_curvature(own, x, own.y, scale),)

        def score(rows: Tensor, x: Tensor) -> tuple[Tensor]:
            own, scale = self._of_samples(rows, t)
            log_prob, gradient = log_prob_and_gradient(own, x, own.y, scale)
            if of_callable:  # -inf has no useful gradient
                gradient = torch.where(per_sample(log_prob, gradient) == -math.inf, 0.0, gradient)
            return (gradient,)

        x = self._pnp.data_step(run, mean + math.sqrt(variance) * run.randn(i, STREAM_X0, dtype=mean.dtype), i)
        eta = self.step_size / (run.in_chunks(curvature, x)[0] + 1.0 / variance)
        noise = (2.0 * eta).sqrt()  # [n, 1, ...], as eta
        longest = 2.0 * math.sqrt(x[0].numel()) * noise
        for j in range(self.iterations):
            drift = eta * (run.in_chunks(score, x)[0] + (mean - x) / variance)
            length = per_sample(drift.flatten(1).norm(dim=1), drift)
            longest = longest + length if j == 0 else longest
            z = run.randn(i * self.iterations + j, STREAM_LANGEVIN, dtype=x.dtype)
            x = x + drift * (longest / length).clamp(max=1.0) + noise * z
        return x

    def _of_samples(self, rows: Tensor, t: float) -> tuple[Likelihood, float | Tensor]:
        """The likelihood of these samples, and its scale."""
        own = self.likelihood.at(rows)
        return own, own.scale_at(t)
