"""Plug-and-play by half-quadratic splitting (Zhu et al. 2023, DiffPIR)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..arguments import got, integer
from ..likelihoods import Likelihood
from ..operators import LinearOperator
from ..profiling import phase
from .base import Run, Schedulable, State, entry, isotropic_variance, per_step
from .checks import prepare_likelihood
from .solvers import choose_solver, obstacle_to_gauss_newton, solve

_ITERATIONS = {"closed": 1, "cg": 32, "gauss-newton": 4, "gradient": 32}


@dataclass(frozen=True)
class PnP:
    """Plug-and-play: each step finds a clean sample near ``x0_hat`` that fits the measurement.

        x0* = argmin_x -log p(y | x; scale(t)) + rho(t) / 2 norm(x - x0_hat)^2

    The reverse step then starts from ``x0*``. The network is only evaluated, never differentiated. PnP is not exact.

    A solver starts at ``x0_hat`` and runs a fixed number of iterations:

    - ``"closed"``: a Gaussian, a linear operator and a known spectrum. No iterations.
    - ``"cg"``: a Gaussian and a linear operator. Conjugate gradients, 32 by default.
    - ``"gauss-newton"``: any error model around an operator. 4 steps by default, each with 16 conjugate gradients;
      reweighted least squares where the error is not Gaussian. Each sample moves by 1, 1/4, 1/16 or 1/64 of the step,
      or stays, whatever is lowest. A nonlinear operator needs a backward pass that autograd can differentiate.
    - ``"gradient"``: any likelihood. Gradient descent with Barzilai-Borwein lengths, 32 steps by default. It needs only
      derivatives of the log-density.

    Args:
        likelihood: The error model. ``Gaussian(..., scale=0)``, an exact measurement, needs ``"closed"``.
        rho: Weight of the distance to ``x0_hat``, finite and ``> 0``. A number, a table with one entry per step, or a
            function of the schedule's time. None is ``1 / r_t^2``, the precision of ``x_0`` given ``x_t`` for
            unit-variance data, with ``r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2)``. At low noise that is ``(alpha_t /
            sigma_t)^2``, DiffPIR's with ``lambda = 1``.
        zeta: Share of fresh noise in the step, in ``[0, 1]``; 0.5 by default. The fresh noise is ``tau = sigma_s
            sqrt(zeta)``, and the predicted ``eps`` gives the rest. A number, a table with one entry per step, or a
            function of the schedule's time. It takes the place of ``eta``.
        solver: ``"closed"``, ``"cg"``, ``"gauss-newton"`` or ``"gradient"``. ``"auto"``, the default, takes the first
            of these that applies. One trial tells whether a nonlinear operator serves ``"gauss-newton"``.
        iterations: Number of iterations, at least 1. None takes the solver's default. Must be None for ``"closed"``.

    Raises:
        TypeError: ``likelihood`` is not a likelihood, or another argument has the wrong type. Like all errors of
            guidance objects, this is raised when the run starts.
        ValueError: An argument is outside its range, or ``solver`` does not fit the likelihood. Also where ``sample``
            is given an ``eta``.

    Source:
        Zhu et al. 2023 (DiffPIR).
    """

    likelihood: Likelihood
    rho: Schedulable | None = None
    zeta: Schedulable = 0.5
    solver: str = "auto"
    iterations: int | None = None

    takes_eta = False

    def prepare(self, run: Run) -> PnP:
        likelihood, _ = prepare_likelihood(run, self.likelihood)
        solver = choose_solver(likelihood, self.solver, _ITERATIONS)
        if solver == "gauss-newton" and not isinstance(likelihood.operator, LinearOperator):
            obstacle = obstacle_to_gauss_newton(run, likelihood)
            if obstacle and self.solver != "auto":
                raise ValueError(
                    "solver: 'gauss-newton' needs an operator whose backward pass autograd can differentiate "
                    f"('gradient' does not), got {likelihood.operator}: {obstacle}"
                )
            solver = "gradient" if obstacle else solver
        if self.iterations is not None and solver == "closed":
            raise ValueError(f"iterations: expected None with the closed form, got {got(self.iterations)}")
        rho = None if self.rho is None else per_step("rho", self.rho, run.levels)
        if rho is not None and min(rho) == 0.0:
            raise ValueError("rho: expected values > 0 (an exact measurement has scale=0), got 0")
        return replace(
            self,
            likelihood=likelihood,
            solver=solver,
            iterations=None if self.iterations is None else integer("iterations", self.iterations, 1),
            rho=rho,
            zeta=per_step("zeta", self.zeta, run.levels, high=1.0),
        )

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        x0_hat = run.x0_hat(state.x, i)
        with phase("solve"):
            x0 = self.data_step(run, x0_hat, i)
        with phase("step"):
            x = run.reverse_step(state.x, x0, i, tau=self.fresh_noise(run, i), blamed=(self.likelihood.blamed,))
            return State(x, x0_hat=x0_hat)

    def fresh_noise(self, run: Run, i: int) -> float:
        """The noise ``tau = sigma_s sqrt(zeta)`` of step ``i``."""
        return run.levels[i + 1].sigma * entry(self.zeta, i) ** 0.5

    def data_step(self, run: Run, x0_hat: Tensor, i: int) -> Tensor:
        """``x0*`` for ``x0_hat`` ``[n, *event]`` at level ``i``."""
        rho = 1.0 / isotropic_variance(run.levels[i]) if self.rho is None else entry(self.rho, i)
        iterations = self.iterations or _ITERATIONS[self.solver]

        def chunk(rows: Tensor, x0: Tensor) -> tuple[Tensor]:
            own = self.likelihood.at(rows)
            scale = own.scale_at(run.levels[i].t)
            x = solve(own, x0.to(run.compute_dtype), own.y, scale, rho, self.solver, iterations)
            return (x.to(x0.dtype),)

        return run.in_chunks(chunk, x0_hat)[0]
