"""Plug-and-play by half-quadratic splitting (Zhu et al. 2023, DiffPIR)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import got, integer, one_of
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Gaussian, Likelihood
from ..operators import LinearOperator, conjugate_gradients, solve_with_noise
from ..ops._arguments import Scalar
from ..profiling import phase
from .base import Run, Schedulable, State, entry, isotropic_variance, per_sample, per_step
from .checks import prepare_likelihood
from .scores import measure, own_adjoint

SOLVERS = ("auto", "closed", "cg", "gauss-newton", "gradient")
_LENGTHS = (1.0, 0.25, 0.0625, 0.015625)  # of a Gauss-Newton step: the whole one may climb far above its start
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
        solver = choose_solver(likelihood, self.solver)
        if solver == "gauss-newton" and not isinstance(likelihood.operator, LinearOperator):
            obstacle = _obstacle_to_gauss_newton(run, likelihood)
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


def choose_solver(likelihood: Likelihood, solver: str) -> str:
    """The solver to use. Raises ValueError where the one named does not fit, and says why."""
    operator = likelihood.operator
    linear = isinstance(likelihood, Gaussian) and isinstance(operator, LinearOperator)
    serves = {
        "closed": linear and operator.spectral,  # type: ignore[attr-defined]
        "cg": linear,
        "gauss-newton": not isinstance(likelihood, CallableLikelihood),
        "gradient": True,
    }
    one_of("solver", solver, SOLVERS)
    if solver == "auto":
        return next(name for name, serving in serves.items() if serving)
    if not serves[solver]:
        needs = {
            "closed": "a Gaussian likelihood and a linear operator of known spectrum",
            "cg": "a Gaussian likelihood and a linear operator",
            "gauss-newton": "an error model around an operator",
        }
        raise ValueError(f"solver: {solver!r} needs {needs[solver]}, got {likelihood!r}")
    return solver


@torch.no_grad()
def solve(
    likelihood: Likelihood, x0: Tensor, y: Tensor, scale: float | Tensor, rho: Scalar, solver: str, iterations: int
) -> Tensor:
    """``argmin_x -log p(y | x) + rho/2 norm(x - x0)^2`` for ``x0`` ``[n, *event]`` and its rows of ``y``."""
    operator = likelihood.operator
    if solver == "closed":
        assert isinstance(operator, LinearOperator)
        noise = scale**2 * rho if isinstance(scale, Tensor) or scale > 0.0 else 0.0
        return x0 + operator.adjoint(solve_with_noise(operator, y - operator(x0), 1.0, noise))
    if solver == "gradient":
        return _gradient(likelihood, x0, y, scale, rho, iterations)
    outer, inner = (1, iterations) if solver == "cg" else (iterations, 16)

    def objective(log_prob: Tensor, x: Tensor) -> Tensor:
        return 0.5 * rho * (x - x0).square().flatten(1).sum(1).double() - log_prob

    x = x0
    for _ in range(outer):
        z, forward, adjoint = _linearise(likelihood, x)
        weight = likelihood.curvature(z, y, scale)
        log_prob, gradient = likelihood.log_prob_and_gradient(z, y, scale)

        def normal(p: Tensor, forward=forward, adjoint=adjoint, weight=weight) -> Tensor:
            return adjoint(weight * forward(p)) + rho * p

        step = conjugate_gradients(normal, adjoint(gradient) - rho * (x - x0), inner)
        if solver == "cg":
            best = x + step
        else:
            best, lowest = x, objective(log_prob, x)
            for length in _LENGTHS:
                tried = x + length * step
                value = objective(likelihood.log_prob_and_gradient(operator(tried), y, scale)[0], tried)
                best = torch.where(per_sample(value < lowest, x).bool(), tried, best)
                lowest = torch.where(value < lowest, value, lowest)
        x = torch.where(per_sample(log_prob.isfinite(), x).bool(), best, math.nan)  # else the solver would hide it
    return x


def _linearise(
    likelihood: Likelihood, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``A(x)``, and the products with its Jacobian at ``x`` and with the transpose."""
    operator = likelihood.operator
    if isinstance(operator, LinearOperator):
        return operator(x), operator, operator.adjoint
    z, leaf = _recorded(likelihood, x)
    return z.detach(), *_jacobian(z, leaf)


def _recorded(likelihood: Likelihood, x: Tensor) -> tuple[Tensor, Tensor]:
    """``A(x)`` with its graph, and the leaf of that graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return measure(likelihood, leaf), leaf


def _jacobian(z: Tensor, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The products with the Jacobian ``J`` of ``z`` in ``x`` and with ``J^T``, by backward passes alone.

    ``J^T u`` is linear in ``u``, and its derivative there is ``J``. Forward-mode derivatives and `torch.func` do not
    work with old `torch.autograd.Function`s and with many kernels.
    """
    u = torch.zeros_like(z, requires_grad=True)
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(z, x, u, create_graph=True)

    def forward(p: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, u, p, retain_graph=True)[0]

    def adjoint(v: Tensor) -> Tensor:
        return torch.autograd.grad(z, x, v, retain_graph=True)[0]

    return forward, adjoint


def _obstacle_to_gauss_newton(run: Run, likelihood: Likelihood) -> str:
    """Empty, or the reason why the products of `_jacobian` cannot be computed, found by a trial.

    A backward pass that leaves autograd in part would give a wrong ``J`` without an error. So the two products are
    compared.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)

    own = likelihood.at(torch.zeros(1, dtype=torch.int64, device=run.device))
    z, x = _recorded(own, draw(torch.empty(1, *run.event, dtype=run.compute_dtype, device=run.device)))
    try:
        forward, adjoint = _jacobian(z, x)
        pairs = []
        for _ in range(2):
            p, w = draw(x), draw(z)
            pairs.append(torch.stack([(forward(p) * w).sum(), (p * adjoint(w)).sum()]))
    except Exception as error:  # raised by torch, or by the function's own backward pass
        return f"{type(error).__name__}: {error}"
    a, b = torch.stack(pairs, 1).double()
    # The tolerance admits half precision inside. NaN and tensors without values prove nothing and pass.
    if not a.is_meta and (a - b).norm() > 0.1 * torch.maximum(a.norm(), b.norm()):
        return "the derivative of its backward pass is not that of a linear map"
    return ""


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """The inner product of each row, shaped to multiply it."""
    return per_sample((u * v).flatten(1).sum(1), u)


def _gradient(
    likelihood: Likelihood, x0: Tensor, y: Tensor, scale: float | Tensor, rho: Scalar, iterations: int
) -> Tensor:
    """Gradient descent with a Barzilai-Borwein length for each sample, at most ``1 / rho``.

    ``1 / rho`` is exact for the quadratic term alone, and an upper bound where the log-density is concave. The
    objective may rise between two steps. A sample that ends well above its lowest point goes back there.
    """

    adjoint = own_adjoint(likelihood.operator)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective ``[n]`` and its gradient."""
        z, leaf = (likelihood.operator(x), x) if adjoint else _recorded(likelihood, x)
        log_prob, gradient = likelihood.log_prob_and_gradient(z.detach(), y, scale)
        pulled = adjoint(gradient) if adjoint else torch.autograd.grad(z, leaf, gradient)[0]
        distance = x - x0
        return 0.5 * rho * distance.square().flatten(1).sum(1).double() - log_prob, rho * distance - pulled

    start, g = evaluate(x0)
    lowest, best = start, x0
    # A first step that is very short: it only measures the curvature.
    probe = 1e-3 / (per_sample(g.flatten(1).norm(dim=1), g) + 1e-12)
    x, previous_x, previous_g = x0 - probe.clamp(max=1.0 / rho) * g, x0, g
    for _ in range(iterations):
        value, g = evaluate(x)
        best = torch.where(per_sample(value < lowest, x).bool(), x, best)
        lowest = torch.where(value < lowest, value, lowest)
        dx, dg = x - previous_x, g - previous_g
        curvature = _dot(dx, dg) / _dot(dx, dx).clamp(min=torch.finfo(x.dtype).tiny)
        length = 1.0 / curvature.abs().clamp(min=rho)
        x, previous_x, previous_g = x - length * g, x, g
    value = 0.5 * rho * (x - x0).square().flatten(1).sum(1).double()
    value = value - likelihood.log_prob_and_gradient(likelihood.operator(x), y, scale)[0]
    fine = value - lowest <= 0.01 * (start - lowest)  # not so if it overflowed
    x = torch.where(per_sample(fine, x).bool(), x, best)
    unknown = start.isnan() if isinstance(likelihood, CallableLikelihood) else ~start.isfinite()
    return torch.where(per_sample(unknown, x).bool(), math.nan, x)
