"""``log p(y | x_t)`` and its gradient in ``x_t``, through the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import foreign
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..memory import Memory
from ..operators import Function, LinearOperator, Operator, Pairs
from ..ops._arguments import Scalar
from ..profiling import phase
from ..reference import scaled, x0_coefficients
from .base import Run, isotropic_variance, per_sample


def likelihood_score(
    run: Run, likelihood: Likelihood, covariance: str, x: Tensor, i: int, *, norm: bool = False, variance: bool = False
) -> tuple[Tensor, ...]:
    """``x0_hat``, the gradient of ``log p~(y | x_t)`` as `PullBack` has it, and ``log p~(y | x_t)`` ``[n]``.

    ``p~`` approximates ``p(y | x_t)`` with the covariance named. `Run.shift_scale` times the gradient is the shift of
    ``x0_hat``, ``C_t A^T grad_z log p~``. With ``norm`` also the norm ``[n]`` of the gradient in ``z = A x0_hat``. With
    ``variance`` also the mean variance ``[n]`` of ``x_0`` given ``x_t``, in directions that the operator measures, over
    `Run.shift_scale`. It is NaN where no direction is measured, or where the gradient is not finite.
    """
    score = moment_score if covariance == "moment" else direct_score
    spread = {
        "point": 0.0, "isotropic": isotropic_variance(run.levels[i]), "moment": run.shift_scale(i)
    }[covariance]  # fmt: skip

    def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        pull_back = PullBack(run, x, i, rows)
        with phase("gradient"):
            own = likelihood.at(rows)
            scale = own.scale_at(run.levels[i].t)
            gradient, log_prob, in_z, mean_variance = score(pull_back, own, own.y, scale, spread)
            more = (in_z.flatten(1).norm(dim=1),) if norm else ()
            return pull_back.x0_hat, gradient, log_prob, *more, *((mean_variance(),) if variance else ())

    x0_hat, gradient, log_prob, *more = run.in_chunks(chunk, x)
    if isinstance(likelihood, CallableLikelihood):  # -inf has no useful gradient
        gradient = torch.where(per_sample(log_prob, gradient) == -math.inf, 0.0, gradient)
    # The density of second moments knows the network's derivative.
    blamed = gradient_blamed(likelihood) if covariance == "moment" else likelihood.blamed
    _watch_log_prob(run, i, likelihood, log_prob, blamed)
    return x0_hat, gradient, log_prob, *more


def likelihood_value(run: Run, likelihood: Likelihood, covariance: str, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """``x0_hat`` and ``log p~(y | x_t)`` without a derivative. Not for ``"moment"``, which needs derivatives."""
    level = run.levels[i]
    scale = likelihood.scale_at(level.t)
    spread = isotropic_variance(level) if covariance == "isotropic" else 0.0

    def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with phase("network"):
            x0_hat = run.convert(x, i, run.denoiser.outputs(x, level, rows))
        with phase("weights"):
            return x0_hat, likelihood.value(x0_hat.to(run.compute_dtype), rows, scale, spread)

    with torch.no_grad():
        x0_hat, log_prob = run.in_chunks(chunk, x)
    _watch_log_prob(run, i, likelihood, log_prob, likelihood.blamed)
    return x0_hat, log_prob


def exact_log_prob(run: Run, likelihood: Likelihood, x: Tensor) -> Tensor:
    """``log p(y | x_0)`` ``[n]`` for the clean samples ``x``."""
    scale = likelihood.scale_at(run.levels[-1].t)

    def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor]:
        return (likelihood.exact_value(x.to(run.compute_dtype), rows, scale),)

    with torch.no_grad(), phase("weights"):
        log_prob = run.in_chunks(chunk, x)[0]
    _watch_log_prob(run, run.steps - 1, likelihood, log_prob, likelihood.blamed)
    return log_prob


def _watch_log_prob(run: Run, i: int, likelihood: Likelihood, log_prob: Tensor, blamed: str) -> None:
    # A user's function may return -inf for an impossible y. An error model does so only where A x is infinite.
    allowed = isinstance(likelihood, CallableLikelihood)
    (run.watch.log_prob if allowed else run.watch.finite)(i, blamed, log_prob)


def gradient_blamed(likelihood: Any) -> str:
    """The name that an error gives to the source of a gradient in ``x_t``."""
    return f"gradient of the net or the {getattr(likelihood, 'blamed', 'reward')}"


class PullBack:
    """``x0_hat(x_t)``, and ``v -> (d x0_hat / d x_t)^T v / q`` through the network's graph.

    ``q`` is the network's factor in ``x0_hat = p x_t + q output``, so that ``v`` goes through the network as it is.
    `Run.shift_scale` times the result is ``C_t v``, with the second-order Tweedie covariance ``C_t`` (Boys et al.
    2023).

    As ``alpha_t`` tends to 0, the state says nothing about ``x_0`` and the Jacobian vanishes. A network's Jacobian
    divided by ``alpha_t`` is then mostly error. Where ``alpha_t < 0.001 sigma_t`` the limit is used instead: ``C_t`` is
    the isotropic ``r_t^2 I = I`` of unit-variance data, and a vector stays as it is.
    """

    def __init__(self, run: Run, x: Tensor, i: int, rows: Tensor):
        level, denoiser, self.run, self._i = run.levels[i], run.denoiser, run, i
        self._x, self._vanishing = x.detach().requires_grad_(), run.vanishing(i)
        with torch.enable_grad(), phase("network"):
            output, base, scale = denoiser.outputs(self._x, level, rows)
        self.x0_hat = run.convert(x.detach(), i, (output, base, scale))
        self.x0 = self.x0_hat.to(run.compute_dtype)
        p, q = x0_coefficients(denoiser.prediction, level.alpha, level.sigma)
        self._of_x: Any = p / q
        self._outputs = [(output, 1.0)] if base is None else [(output, scale), (base, 1 - scale)]

    def __call__(self, v: Tensor, retain_graph: bool = False, out: Tensor | None = None) -> Tensor:
        """The product ``(d x0_hat / d x_t)^T v / q`` for ``v`` ``[n, *event]``, in ``out`` or in new memory."""
        memory = foreign.memory()
        if self._vanishing:
            return memory.copy(v) if out is None else out.copy_(v)
        outputs = [output for output, _ in self._outputs]
        with torch.no_grad():
            given = [weighted(v, factor, memory) for _, factor in self._outputs]
            size = None
            if torch.float16 in (self._x.dtype, *(output.dtype for output in outputs), *foreign.autocast_dtypes()):
                # float16 holds 6e-8 to 65504. Each sample goes through the network as large as 1, and back after it.
                size = per_sample(power_of_two(given), v)
                given = [g / size for g in given]
            given = [g.to(output.dtype) for g, output in zip(given, outputs, strict=True)]
        (through,) = torch.autograd.grad(outputs, self._x, given, retain_graph=retain_graph, allow_unused=True)
        if through is None:
            raise ValueError("net: expected an output that depends on x, got one that autograd cannot follow to it")
        with torch.no_grad():
            through = through if size is None else through * size
            return torch.add(through, v, alpha=self._of_x, out=memory.like(v) if out is None else out)

    def variance(self, v: Tensor, back: Tensor) -> Tensor:
        """The variance ``[n]`` of ``x_0`` given ``x_t`` in the direction of ``v``, over `Run.shift_scale`:

            v^T C_t v / v^T v

        ``back`` is what a call made of ``v``.
        """
        row = v.flatten(1)[:, None]  # [n, 1, elements]
        along, square = (torch.bmm(row, other.flatten(1)[:, :, None])[:, 0, 0] for other in (back, v))
        return along / square


def power_of_two(vectors: Sequence[Tensor]) -> Tensor:
    """For each sample ``[n]`` the power of two next to the largest value of all its vectors; 1 if that is 0 or not
    finite."""
    largest = torch.stack([v.flatten(1).abs().amax(1) for v in vectors]).amax(0)
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where((largest > 0) & largest.isfinite(), size, 1.0)


def weighted(v: Tensor, factor: Scalar, memory: Memory) -> Tensor:
    """``v`` times a number, or times one number per sample, in memory that a network may write into."""
    if isinstance(factor, Tensor):
        return torch.mul(v, per_sample(factor, v) if factor.ndim else factor, out=memory.like(v))
    return memory.copy(v) if factor == 1.0 else torch.mul(v, factor, out=memory.like(v))


def measure(likelihood: Likelihood, x0: Tensor) -> Tensor:
    """``A x0``, with its graph to ``x0``."""
    with torch.enable_grad():
        z = likelihood.operator(x0)
    if not z.requires_grad:
        raise ValueError(
            f"operator: expected one that autograd can differentiate, got {likelihood.operator}; "
            "PiGDM takes its pseudo-inverse, FK with the base proposal needs no derivative"
        )
    return z


def own_adjoint(operator: Operator) -> Callable[[Tensor], Tensor] | None:
    """The adjoint of a linear operator that states one, so that its products need no derivative; else None."""
    stated = isinstance(operator, LinearOperator) and not (isinstance(operator, Function) and not operator.has_adjoint)
    return operator.adjoint if stated else None  # type: ignore[attr-defined]


Score = tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]


def direct_score(
    pull_back: PullBack, likelihood: Likelihood, y: Tensor, scale: float | Tensor, spread: Scalar
) -> Score:
    """The gradient of ``log p~`` in ``x_t``, ``log p~`` ``[n]``, the gradient in ``z``, and a function that returns
    `PullBack.variance` in the direction of the gradient in ``x_0``."""
    x0, adjoint = pull_back.x0, own_adjoint(likelihood.operator)
    if adjoint is None:
        x0 = x0.detach().requires_grad_()
        z = measure(likelihood, x0)
        log_prob, gradient = likelihood.log_prob_and_gradient(z.detach(), y, scale, spread)
        (back,) = torch.autograd.grad(z, x0, gradient.to(z.dtype))
    else:
        with torch.no_grad():
            z = likelihood.operator(x0)
            log_prob, gradient = likelihood.log_prob_and_gradient(z, y, scale, spread)
            back = adjoint(gradient.to(z.dtype)).to(x0.dtype)
    in_x = pull_back(back)
    return in_x, log_prob, gradient, lambda: pull_back.variance(back, in_x)


class _Rows(list):
    """The rows of ``A``, each ``[1, *event]``; where samples have an ``A`` of their own, ``[n, *event]``."""

    @functools.cached_property
    def norm(self) -> Tensor:
        """The squared Frobenius norm of ``A``, ``[1]`` or ``[n]`` in float64."""
        norms = [row.flatten(1).square().sum(1, dtype=torch.float64) for row in self]
        return torch.stack(norms).sum(0)


def _rows(run: Run, linear: LinearOperator, y: Tensor, samples: int) -> _Rows:
    m = y[0].numel()
    if linear.observations is not None:
        units = torch.eye(m, dtype=y.dtype, device=y.device).reshape(m, 1, *y.shape[1:])
        return _Rows(linear.adjoint(unit.expand(samples, *y.shape[1:])).clone() for unit in units)
    if not run.rows_of_operator:
        units = torch.eye(m, dtype=y.dtype, device=y.device).reshape(m, *y.shape[1:])
        run.rows_of_operator.append(_Rows(linear.adjoint(units).clone()[:, None]))
    return run.rows_of_operator[0]


def moment_score(
    pull_back: PullBack, likelihood: Likelihood, y: Tensor, scale: float | Tensor, spread: Scalar
) -> Score:
    """The results of `direct_score`, with the second-order covariance.

    One backward pass per measurement gives the columns of ``C_t A^T``, up to the factor ``spread``. The gradient is a
    combination of these columns. The variance is the mean over the rows of ``A``, weighted by their squared norms.
    """
    linear, x0 = likelihood.operator, pull_back.x0
    assert isinstance(linear, LinearOperator)  # `supports` has checked it
    memory, m = foreign.memory(), y[0].numel()
    with torch.no_grad():
        columns = memory.shaped((m, *x0.shape), x0)
        columns = x0.new_empty(m, *x0.shape) if columns is None else columns
        rows = _rows(pull_back.run, linear, y, len(x0))
        for j, row in enumerate(rows):
            pull_back(row.expand_as(x0), retain_graph=j + 1 < m, out=columns[j])
        # The user's own operator gets no more samples than a chunk has, and may return the same memory at every call.
        users = type(linear).__module__ != Operator.__module__ or isinstance(linear, Function | Pairs)
        if linear.observations is None and not users:
            gram = linear(columns.flatten(0, 1).to(y.dtype)).reshape(m, len(x0), m).permute(1, 2, 0)
        else:
            gram = torch.stack([linear(column.to(y.dtype)).flatten(1).clone() for column in columns], dim=2)
        variances = gram.diagonal(dim1=1, dim2=2)
        gram = scaled(gram, spread)
        log_prob, gradient = likelihood.moment(linear(x0), y, scale, gram)  # type: ignore[attr-defined]
        weights = gradient.flatten(1).to(x0.dtype)
        in_x = torch.mul(columns[0], per_sample(weights[:, 0], x0), out=memory.like(x0))
        for j in range(1, m):
            in_x.addcmul_(columns[j], per_sample(weights[:, j], x0))

    return in_x, log_prob, gradient, lambda: variances.sum(1, dtype=torch.float64) / rows.norm
