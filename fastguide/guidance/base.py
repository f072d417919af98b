"""What the algorithms share: the constants of a run, the network in chunks, and ``log p(y | x_t)``.

An algorithm is a dataclass with ``start(run) -> State`` and ``step(run, state, i) -> State``. Both are pure, except
that they may reuse the memory of states. `fastguide.sample` runs the loop. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import foreign, ops
from ..arguments import one_of
from ..denoiser import Denoiser
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..memory import Memory
from ..operators import Function, LinearOperator, Operator, Pairs
from ..ops._arguments import Clip, Coefficients, IntOrTensor, Scalar
from ..profiling import phase
from ..reference import scaled, step_coefficients, x0_coefficients
from ..schedules import Level
from ..schedules import Schedulable as Schedulable
from ..schedules import per_step as per_step
from .watch import STATE, Watch

STREAM_INITIAL, STREAM_RESAMPLE, STREAM_RENOISE = 1, 2, 3  # the noise of the steps has 0, the default

COVARIANCES = ("point", "isotropic", "moment")

_VANISHING = 1e-3  # below this alpha / sigma, dividing a derivative by alpha mostly amplifies its error


@dataclass
class State:
    """What a run carries from step to step.

    Attributes:
        x: ``[B * K, *event]``.
        log_weights: ``[B, K]``, or None without particles.
        particles: Further tensors ``[B * K, ...]`` of the algorithm, one row per particle.
        ess: ``[B]``, of the last resampling decision.
        ancestors: ``[B, K]``.
        x0_hat: ``[B * K, *event]``, the prediction of the step, where ``Run.keep_x0_hat`` asks for it.
    """

    x: Tensor
    log_weights: Tensor | None = None
    particles: dict[str, Tensor] = field(default_factory=dict)
    ess: Tensor | None = None  # [B]
    ancestors: Tensor | None = None  # [B, K]
    x0_hat: Tensor | None = None  # [B * K, *event]


def entry(table: Any, i: int) -> float:
    """The entry of step ``i`` in the table that `per_step` made."""
    return table[i]


@dataclass(frozen=True)
class Run:
    """The constants of one call of `fastguide.sample`, or of one captured loop."""

    denoiser: Denoiser
    levels: tuple[Level, ...]
    taus: tuple[float, ...]  # noise tau of each step
    observations: int  # B
    particles: int  # K
    event: tuple[int, ...]
    seed: IntOrTensor | tuple[int, ...]  # one for all, or one per observation; a tensor in a capture
    clip: Clip
    chunk_size: int | None
    dtype: torch.dtype
    device: torch.device
    x_T: Tensor | None = None
    grouped: bool = False  # whether the result is [B, K, *event]
    first_sample: int = 0  # index of the first observation, for the noise
    differentiable: bool = False  # whether the result keeps its graph to x_T
    keep_x0_hat: bool = field(default=False, compare=False)
    watch: Watch = field(default_factory=Watch, compare=False)  # notes where values stop being finite

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return (self.observations, *((self.particles,) if self.grouped else ()), *self.event)

    @functools.cached_property
    def rows(self) -> Tensor:
        """The observation of each sample, ``[B * K]``."""
        return torch.arange(self.observations * self.particles, device=self.device) // self.particles

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def counter(self, i: int) -> dict[str, Any]:
        """The seed, the step and the first particle of the noise in step ``i``.

        A run with a seed for each observation draws through `with_counters`.
        """
        return {"seed": self.seed, "step": i, "first_particle": self.first_sample * self.particles}

    def with_counters(self, i: int, f: Callable[..., Any], *tensors: Tensor) -> Any:
        """``f(counter, *tensors)``; with a seed for each observation, one call for each, and the results concatenated.

        ``tensors`` are ``[B * K, ...]`` or ``[B, ...]``.
        """
        counter = self.counter(i)
        if not isinstance(self.seed, tuple):
            return f(counter, *tensors)
        parts = []
        for b, seed in enumerate(self.seed):
            own = [t[b * (size := len(t) // self.observations) : (b + 1) * size] for t in tensors]
            parts.append(f({**counter, "seed": seed}, *own))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def coefficients(self, i: int, tau: float | None = None) -> Coefficients:
        """The coefficients of step ``i`` for an operation. ``tau`` replaces the run's."""
        t, s = self.levels[i], self.levels[i + 1]
        return t.alpha, t.sigma, s.alpha, s.sigma, self.taus[i] if tau is None else tau

    def x0_weight(self, i: int) -> Scalar:
        """How far the mean of step ``i`` moves with ``x0_hat``: the ``b`` of ``a x_t + b x0_hat``.

        Guidance moves ``x0_hat`` by ``(sigma_t^2 / alpha_t) g``, so it moves the mean by ``b`` times that.
        """
        return step_coefficients(self.coefficients(i))[1]

    def vanishing(self, i: int) -> bool:
        """Whether the state at level ``i`` says almost nothing about ``x_0``, see `PullBack`."""
        return self.levels[i].alpha < _VANISHING * self.levels[i].sigma

    def initial(self) -> Tensor:
        """``x_T``, or the prior's noise."""
        if self.x_T is None:
            return self.prior_noise()
        with torch.set_grad_enabled(self.differentiable):
            return foreign.memory().keep(self.x_T.to(self.device, self.dtype, copy=True))

    def prior_noise(self) -> Tensor:
        """``x_T`` of the prior. Its variance is that of unit-variance data at the first level."""
        top = self.levels[0]
        z, scale = foreign.memory().keep(self.randn(0, STREAM_INITIAL)), math.hypot(top.alpha, top.sigma)
        return z if math.isclose(scale, 1.0, rel_tol=1e-12) else z.mul_(scale)  # VP: 1 up to rounding

    def randn(self, i: int, stream: int) -> Tensor:
        """Standard normals ``[B * K, *event]`` of step ``i``."""
        shape = (self.observations * self.particles, *self.event)

        def draw(counter: dict[str, Any], rows: Tensor) -> Tensor:
            size = (len(rows), *shape[1:])
            return ops.randn(size, **counter, stream=stream, dtype=self.dtype, device=self.device)

        return self.with_counters(i, draw, self.rows)

    def memory(self, x: Tensor, twice: bool = False) -> Any:
        """``out`` for one result like ``x``, or for two; or None, see `fastguide.memory`."""
        if self.differentiable:
            return None
        memory = foreign.memory()
        return memory.pair(x) if twice else memory.like(x)

    def reverse_step(
        self,
        x: Tensor,
        x0_hat: Tensor,
        i: int,
        *,
        tau: float | None = None,
        prediction: str = "sample",
        return_x0: bool = False,
        blamed: Sequence[str] = ("x0_hat",),
        **others: Any,
    ) -> Any:
        """Step ``i`` from a predicted clean sample or another ``prediction``, with the run's clip.

        ``others``: a displacement, the unconditional output and their scales. ``blamed`` names what ``x0_hat``, the
        displacement and the unconditional output came from, for an error where they are not finite.
        """
        coefficients = self.coefficients(i, tau)
        not_finite = self.watch.flags(i, self.device, STATE, *blamed, *("",) * (3 - len(blamed)))
        of_samples = {name: value for name, value in others.items() if isinstance(value, Tensor) and value.ndim}

        def draw(counter: dict[str, Any], x: Tensor, x0_hat: Tensor, *values: Tensor) -> Any:
            return ops.reverse_step(
                x,
                x0_hat,
                coefficients,
                prediction=prediction,
                clip=self.clip,
                return_x0=return_x0,
                out=self.memory(x, return_x0),
                not_finite=not_finite,
                **others | dict(zip(of_samples, values, strict=True)),
                **counter,
            )

        return self.with_counters(i, draw, x, x0_hat, *of_samples.values())

    def in_chunks(self, f: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """``f(rows, *chunks)`` over chunks of the leading dimension, with the outputs put together again.

        Each output is copied before the next call, since a network may return the same memory every time.
        """
        n = tensors[0].shape[0]
        if self.chunk_size is None or self.chunk_size >= n:
            return f(self.rows, *tensors)
        whole: tuple[Tensor, ...] = ()
        for low in range(0, n, self.chunk_size):
            high = min(low + self.chunk_size, n)
            parts = f(self.rows[low:high], *(t[low:high] for t in tensors))
            whole = whole or tuple(part.new_empty((n, *part.shape[1:])) for part in parts)
            for tensor, part in zip(whole, parts, strict=True):
                tensor[low:high] = part
        return whole

    def outputs(self, x: Tensor, i: int) -> tuple[Tensor, Tensor | None, Any]:
        """`Denoiser.outputs` at level ``i``."""

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part for part in self.denoiser.outputs(x, self.levels[i], rows)[:2] if part is not None)

        output, *base = self.in_chunks(chunk, x)
        if not base:
            return output, None, None
        return output, base[0], self.denoiser.scale_at(self.levels[i], x, self.rows)

    def convert(self, x: Tensor, i: int, outputs: tuple[Tensor, Tensor | None, Any]) -> Tensor:
        """``E[x_0 | x_t]`` from `Denoiser.outputs`, without a graph."""
        with torch.no_grad():
            not_finite = self.watch.flags(i, self.device, "net", "unconditional")
            return self.denoiser.convert(x, self.levels[i], *outputs, not_finite)

    def x0_hat(self, x: Tensor, i: int) -> Tensor:
        """``E[x_0 | x_t]`` at level ``i``, without a graph."""

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor]:
            return (self.convert(x, i, self.denoiser.outputs(x, self.levels[i], rows)),)

        with torch.no_grad(), phase("network"):
            return self.in_chunks(chunk, x)[0]

    def likelihood_score(
        self, likelihood: Likelihood, covariance: str, x: Tensor, i: int, norm: bool = False
    ) -> tuple[Tensor, ...]:
        """``x0_hat``, the gradient of ``log p~(y | x_t)`` as `PullBack` has it, and ``log p~(y | x_t)`` ``[n]``.

        ``p~`` approximates ``p(y | x_t)`` with the covariance named. `shift_scale` times the gradient is the shift of
        ``x0_hat``, ``C_t A^T grad_z log p~``. With ``norm`` also the norm ``[n]`` of the gradient in ``z = A x0_hat``.
        """
        score = moment_score if covariance == "moment" else direct_score
        spread = {
            "point": 0.0, "isotropic": isotropic_variance(self.levels[i]), "moment": self.shift_scale(i)
        }[covariance]  # fmt: skip

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            pull_back = PullBack(self, x, i, rows)
            with phase("gradient"):
                own = likelihood.at(rows)
                scale = own.scale_at(self.levels[i].t)
                gradient, log_prob, in_z = score(pull_back, own, own.y, scale, spread)
                more = (in_z.flatten(1).norm(dim=1),) if norm else ()
                return pull_back.x0_hat, gradient, log_prob, *more

        x0_hat, gradient, log_prob, *more = self.in_chunks(chunk, x)
        if isinstance(likelihood, CallableLikelihood):  # -inf has no useful gradient
            gradient = torch.where(per_sample(log_prob, gradient) == -math.inf, 0.0, gradient)
        self._watch_log_prob(i, likelihood, log_prob)
        return x0_hat, gradient, log_prob, *more

    def shift_scale(self, i: int) -> Any:
        """The factor from what `PullBack` makes of a gradient in ``x_0`` to the shift of ``x0_hat``."""
        t = self.levels[i]
        if self.vanishing(i):
            return isotropic_variance(t)
        return t.sigma**2 / t.alpha * x0_coefficients(self.denoiser.prediction, t.alpha, t.sigma)[1]

    def likelihood_value(self, likelihood: Likelihood, covariance: str, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """``x0_hat`` and ``log p~(y | x_t)`` without a derivative. Not for ``"moment"``, which needs derivatives."""
        level = self.levels[i]
        scale = likelihood.scale_at(level.t)
        spread = isotropic_variance(level) if covariance == "isotropic" else 0.0

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            with phase("network"):
                x0_hat = self.convert(x, i, self.denoiser.outputs(x, level, rows))
            with phase("weights"):
                return x0_hat, likelihood.value(x0_hat.to(self.compute_dtype), rows, scale, spread)

        with torch.no_grad():
            x0_hat, log_prob = self.in_chunks(chunk, x)
        self._watch_log_prob(i, likelihood, log_prob)
        return x0_hat, log_prob

    def exact_log_prob(self, likelihood: Likelihood, x: Tensor) -> Tensor:
        """``log p(y | x_0)`` ``[n]`` for the clean samples ``x``."""
        scale = likelihood.scale_at(self.levels[-1].t)

        def chunk(rows: Tensor, x: Tensor) -> tuple[Tensor]:
            return (likelihood.exact_value(x.to(self.compute_dtype), rows, scale),)

        with torch.no_grad(), phase("weights"):
            log_prob = self.in_chunks(chunk, x)[0]
        self._watch_log_prob(self.steps - 1, likelihood, log_prob)
        return log_prob

    def _watch_log_prob(self, i: int, likelihood: Likelihood, log_prob: Tensor) -> None:
        # A user's function may return -inf for an impossible y. An error model does so only where A x is infinite.
        allowed = isinstance(likelihood, CallableLikelihood)
        (self.watch.log_prob if allowed else self.watch.finite)(i, likelihood.blamed, log_prob)


def isotropic_variance(level: Level) -> Any:
    """The variance of ``x_0`` given ``x_t`` for unit-variance data (Song et al. 2023, PiGDM):

    r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2)
    """
    return level.sigma**2 / (level.alpha**2 + level.sigma**2)


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
        level, denoiser = run.levels[i], run.denoiser
        self._x, self._vanishing = x.detach().requires_grad_(), run.vanishing(i)
        with torch.enable_grad(), phase("network"):
            output, base, scale = denoiser.outputs(self._x, level, rows)
        self.x0_hat = run.convert(x.detach(), i, (output, base, scale))
        self.x0 = self.x0_hat.to(run.compute_dtype)
        p, q = x0_coefficients(denoiser.prediction, level.alpha, level.sigma)
        self._of_x: Any = p / q
        self._outputs = [(output, 1.0)] if base is None else [(output, scale), (base, 1 - scale)]

    def __call__(self, v: Tensor, retain_graph: bool = False) -> Tensor:
        """The product ``(d x0_hat / d x_t)^T v / q`` for ``v`` ``[n, *event]``, in new memory."""
        memory = foreign.memory()
        if self._vanishing:
            return memory.copy(v)
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
            out = None if retain_graph else memory.like(v)  # many results would empty the cache of the loop's blocks
            return torch.add(through, v, alpha=self._of_x, out=out)


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


def direct_score(
    pull_back: PullBack, likelihood: Likelihood, y: Tensor, scale: float | Tensor, spread: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``log p~`` in ``x_t``, ``log p~`` ``[n]``, and the gradient in ``z``."""
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
    return pull_back(back), log_prob, gradient


def moment_score(
    pull_back: PullBack, likelihood: Likelihood, y: Tensor, scale: float | Tensor, spread: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `direct_score`, with the second-order covariance.

    One backward pass per measurement gives the columns of ``C_t A^T``, up to the factor ``spread``. The gradient is a
    combination of these columns.
    """
    linear, x0 = likelihood.operator, pull_back.x0
    assert isinstance(linear, LinearOperator)  # `supports` has checked it
    with torch.no_grad():
        z = linear(x0).clone()  # an operator may return the same memory at every call, here and below
        m = z[0].numel()
        units = torch.eye(m, dtype=z.dtype, device=z.device).reshape(m, *z.shape[1:])
        # The rows of A; where samples have an A of their own, the rows of each.
        one = linear.observations is None
        rows = linear.adjoint(units) if one else [linear.adjoint(u.expand_as(z)).clone() for u in units]
        # Contiguous, since zero strides would slow every operation of the network's backward pass.
        columns = [pull_back(row.expand_as(x0).contiguous(), retain_graph=j + 1 < m) for j, row in enumerate(rows)]
        gram = scaled(torch.stack([linear(c.to(z.dtype)).flatten(1).clone() for c in columns], dim=2), spread)
        log_prob, gradient = likelihood.moment(z, y, scale, gram)  # type: ignore[attr-defined]
        weights = gradient.flatten(1).to(columns[0].dtype)
        in_x = columns[0].mul_(per_sample(weights[:, 0], columns[0]))
        for j, column in enumerate(columns[1:], start=1):
            in_x.addcmul_(column, per_sample(weights[:, j], column))
    return in_x, log_prob, gradient


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``values`` ``[n]``, reshaped to multiply ``like`` ``[n, *event]`` and in its dtype."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def default_covariance(likelihood: Likelihood, measurements: int) -> str:
    """``"moment"`` where the likelihood supports it, else ``"isotropic"``.

    Never ``"point"``: it diverges where the measurement's noise is small beside the uncertainty of ``x_0``.
    """
    for covariance in ("moment", "isotropic"):
        if not likelihood.supports(covariance, measurements):
            return covariance
    raise ValueError(
        f"covariance: {type(likelihood).__name__} supports only covariance='point'. Pass it explicitly; it can diverge "
        "where the likelihood is sharp"
    )


def check_covariance(
    run: Run, likelihood: Likelihood, covariance: str, measurements: int, guided: bool = True
) -> Likelihood:
    """The likelihood, with what the covariance needs to know about the operator.

    ``guided``: whether the gradient guides the samples.
    """
    one_of("covariance", covariance, COVARIANCES)
    reason = likelihood.supports(covariance, measurements)
    if reason:
        raise ValueError(f"covariance: {reason}")
    return likelihood.measure_spread(run.event, guided) if covariance == "isotropic" else likelihood


def prepare_likelihood(run: Run, likelihood: Likelihood) -> tuple[Likelihood, int]:
    """The likelihood on the run's device, and the number of its measurements.

    Raises unless ``y`` has the shape of a measurement, and one row or one per observation.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood: expected a fastguide.likelihoods likelihood, got {type(likelihood).__name__}")
    likelihood = likelihood.to(run.device, run.compute_dtype)
    rows = likelihood.y.shape[0]
    if rows not in (1, run.observations):
        raise ValueError(f"y: expected {_rows(run)}, got {rows}")
    for level in run.levels:
        likelihood.scale_at(level.t)
    if isinstance(likelihood, CallableLikelihood):
        return likelihood, 0
    own = likelihood.operator.observations
    if own not in (None, run.observations):
        raise ValueError(f"operator: expected {_rows(run)}, got {own} from {likelihood.operator}")
    rows = rows if own is None else own
    probe = torch.zeros(rows, *run.event, dtype=run.compute_dtype, device=run.device)
    with torch.no_grad():
        z = likelihood.operator(probe)
    if z.is_complex():
        raise TypeError(
            f"y: expected complex values, as {likelihood.operator} returns {z.dtype}, got {likelihood.y.dtype}; pairs "
            "of reals need torch.view_as_real in the operator too"
        )
    apart = run.particles == 1 and (run.chunk_size is None or run.chunk_size >= run.observations)
    if own is None and run.observations > 1 and not apart and not z.is_meta:
        with torch.no_grad():
            count = len(likelihood.operator(probe[:1]))
        if count != 1:
            raise ValueError(
                f"operator: expected one that takes each sample alone, got {count} rows for one from "
                f"{likelihood.operator}; an operator for each observation defines observations and at(rows)"
            )
    if isinstance(likelihood.operator, LinearOperator) and not z.is_meta and (z != 0).any():
        raise ValueError(
            f"operator: expected a linear one, which maps 0 to 0, got {z.abs().max().item():g} from "
            f"{likelihood.operator}; subtract a constant from y, or do not declare the operator linear"
        )
    with torch.no_grad():
        _try_operator(likelihood.operator, probe)
    if z.shape[1:] != likelihood.y.shape[1:]:
        raise ValueError(
            f"y: expected shape [B, {', '.join(map(str, z.shape[1:]))}], what {likelihood.operator} makes of an event "
            f"{list(run.event)}, got {list(likelihood.y.shape)}"
        )
    return likelihood, z[0].numel()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The real part of the inner product, in double precision."""
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b.real).sum()


def _rows(run: Run) -> str:
    """The numbers of rows that ``y`` may have, and why, for an error."""
    number = "1 row" if run.observations == 1 else f"1 row or {run.observations}"
    return f"{number}, since shape (B, *event) says B = {run.observations} and event {list(run.event)}"


def _try_operator(operator: Operator, like: Tensor) -> None:
    """Raise where a user's operator writes into its input, or its methods contradict each other."""
    if isinstance(operator, Pairs):
        operator = operator.operator
    known = type(operator).__module__.startswith("fastguide.") and not (
        isinstance(operator, Function) and operator.linear
    )
    if known or like.is_meta:
        return

    def call(name: str, *tensors: Tensor) -> Tensor:
        copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        result = getattr(operator, name)(*tensors)
        for tensor, copy, version in zip(tensors, copies, versions, strict=True):
            if tensor._version != version or not torch.equal(tensor, copy):
                raise ValueError(
                    f"operator: expected one that leaves its input as it is, got {operator} whose {name} writes into it"
                )
        return result.clone()  # the next call may return the same memory

    def draw(like: Tensor, step: int) -> Tensor:
        return ops.randn(like.shape, seed=0, step=step, stream=7, dtype=like.dtype, device=like.device)

    x = draw(like, 0)
    z = call("__call__", x)
    if not isinstance(operator, LinearOperator):
        return
    back = foreign.returned("adjoint", call("adjoint", z), real=not z.is_complex())
    if back.shape != x.shape:
        raise ValueError(
            f"operator: expected an adjoint that returns {list(x.shape)}, got {list(back.shape)} from {operator}"
        )
    errors = []
    for step in (1, 2, 3):
        w = torch.view_as_complex(draw(torch.view_as_real(z), step)) if z.is_complex() else draw(z, step)
        errors.append(_dot(z, w) - _dot(x, call("adjoint", w)))
    # Both products are about as large as the norm of z. The tolerance admits half precision inside the operator.
    if torch.stack(errors).abs().max() > 0.05 * _dot(z, z).sqrt():
        raise ValueError(f"operator: expected a linear one with <A x, z> = <x, A^T z>, got another from {operator}")
    if type(operator).eigenvalues is not LinearOperator.eigenvalues:
        gram = operator(back)
        spectrum = operator.inverse_transform(operator.transform(z) * operator.eigenvalues(z))
        if not (spectrum - gram).norm() <= 1e-2 * gram.norm() + 1e-6 * z.norm():
            raise ValueError(
                "operator: expected eigenvalues, transform and inverse_transform that give A A^T, "
                f"got others from {operator}, a {type(operator).__name__}; a class that inherits them from another "
                "operator and changes what it does can derive from LinearOperator instead, which needs none"
            )
