"""Solvers of the data step of PnP and DAPS: a clean sample near ``x0_hat`` that fits the measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .. import ops
from ..arguments import one_of
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Gaussian, Likelihood
from ..operators import STREAM_PROBES, LinearOperator, conjugate_gradients, solve_with_noise
from ..ops._arguments import Scalar
from .base import Run, per_sample
from .scores import measure, own_adjoint

_LENGTHS = (1.0, 0.25, 0.0625, 0.015625)  # of a Gauss-Newton step: the whole one may climb far above its start
_POWER_ITERATIONS = 10


def choose_solver(likelihood: Likelihood, solver: str, solvers: Collection[str]) -> str:
    """The solver to use, one of ``solvers``. ``"auto"`` takes the first that applies.

    Raises ValueError where the one named does not fit, and says why.
    """
    operator = likelihood.operator
    linear = isinstance(likelihood, Gaussian) and isinstance(operator, LinearOperator)
    serves = {
        "closed": linear and operator.spectral,  # type: ignore[attr-defined]
        "cg": linear,
        "gauss-newton": not isinstance(likelihood, CallableLikelihood),
        "gradient": True,
        "langevin": True,
    }
    one_of("solver", solver, ("auto", *solvers))
    if solver == "auto":
        return next(name for name in solvers if serves[name])
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


def obstacle_to_gauss_newton(run: Run, likelihood: Likelihood) -> str:
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


def log_prob_and_gradient(likelihood: Likelihood, x: Tensor, y: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """``log p(y | x)`` ``[n]`` and its gradient in the clean samples ``x`` ``[n, *event]``."""
    adjoint = own_adjoint(likelihood.operator)
    z, leaf = (likelihood.operator(x), x) if adjoint else _recorded(likelihood, x)
    log_prob, gradient = likelihood.log_prob_and_gradient(z.detach(), y, scale)
    return log_prob, adjoint(gradient) if adjoint else torch.autograd.grad(z, leaf, gradient)[0]


def largest_curvature(likelihood: Likelihood, x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """The largest curvature of ``-log p(y | x)`` at ``x`` ``[n, *event]`` in any direction, shaped to multiply ``x``.

    Power iterations estimate it from slightly below, from one start for all samples. Where the error model knows no
    bound, they follow the Hessian itself.
    """
    operator, bound = likelihood.operator, likelihood.largest_curvature(y, scale)
    small = torch.finfo(x.dtype).eps ** (1 / 3)

    def difference(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        return (f(x + small * u).clone() - f(x - small * u)) / (2 * small)

    if bound is None:

        def product(u: Tensor) -> Tensor:
            return difference(lambda x: log_prob_and_gradient(likelihood, x, y, scale)[1], u)

    elif adjoint := own_adjoint(operator):

        def product(u: Tensor) -> Tensor:
            return adjoint(bound * operator(u))

    else:
        z, leaf = _recorded(likelihood, x)

        def product(u: Tensor) -> Tensor:
            return torch.autograd.grad(z, leaf, bound * difference(operator, u), retain_graph=True)[0]

    def size(u: Tensor) -> Tensor:  # the root mean square of each sample
        return per_sample(u.flatten(1).square().mean(1).sqrt(), u)

    u = ops.randn((1, *x.shape[1:]), seed=0, stream=STREAM_PROBES, dtype=x.dtype, device=x.device).expand_as(x)
    curvature = size(u)
    for _ in range(_POWER_ITERATIONS):
        u = product(u / curvature.clamp(min=torch.finfo(x.dtype).tiny))
        curvature = size(u)
    return curvature


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

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective ``[n]`` and its gradient."""
        log_prob, pulled = log_prob_and_gradient(likelihood, x, y, scale)
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
