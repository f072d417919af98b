"""What the algorithms share: the constants of a run, its noise, and the network in chunks.

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
from ..denoiser import Denoiser
from ..ops._arguments import Clip, Coefficients, IntOrTensor, Scalar
from ..profiling import phase
from ..reference import step_coefficients, x0_coefficients
from ..schedules import Level
from ..schedules import Schedulable as Schedulable
from ..schedules import per_step as per_step
from .start import Moments
from .watch import STATE, Watch

STREAM_INITIAL, STREAM_RESAMPLE, STREAM_RENOISE = 1, 2, 3  # the noise of the steps has 0, the default
STREAM_X0, STREAM_Y, STREAM_LANGEVIN = 8, 9, 10  # the draws of x_0 given x_t and y

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
    start: Moments | None = None  # of x_T; None takes those of unit-variance data
    differentiable: bool = False  # whether the result keeps its graph to x_T
    keep_x0_hat: bool = field(default=False, compare=False)
    watch: Watch = field(default_factory=Watch, compare=False)  # notes where values stop being finite
    rows_of_operator: list[Any] = field(default_factory=list, compare=False)  # made once, see `scores`

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

    def coefficients(self, i: int, tau: float | None = None, to: int | None = None) -> Coefficients:
        """The coefficients of step ``i`` for an operation, or of a step to level ``to``. ``tau`` replaces the run's."""
        t, s = self.levels[i], self.levels[i + 1 if to is None else to]
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
        """``x_T`` of the prior: from `start`, or with the variance of unit-variance data at the first level."""
        if self.start is not None:
            return foreign.memory().keep(self.start.draw(self.randn(0, STREAM_INITIAL)))
        top = self.levels[0]
        z, scale = foreign.memory().keep(self.randn(0, STREAM_INITIAL)), math.hypot(top.alpha, top.sigma)
        return z if math.isclose(scale, 1.0, rel_tol=1e-12) else z.mul_(scale)  # VP: 1 up to rounding

    def randn(
        self, i: int, stream: int, event: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Standard normals ``[B * K, *event]`` of step ``i``, by default in the shape and dtype of the state."""
        event, dtype = self.event if event is None else event, dtype or self.dtype

        def draw(counter: dict[str, Any], rows: Tensor) -> Tensor:
            return ops.randn((len(rows), *event), **counter, stream=stream, dtype=dtype, device=self.device)

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
        to: int | None = None,
        prediction: str = "sample",
        return_x0: bool = False,
        blamed: Sequence[str] = ("x0_hat",),
        **others: Any,
    ) -> Any:
        """Step ``i`` from a predicted clean sample or another ``prediction``, with the run's clip. ``to`` is the level
        where it ends, the next one by default.

        ``others``: a displacement, the unconditional output and their scales. ``blamed`` names what ``x0_hat``, the
        displacement and the unconditional output came from, for an error where they are not finite.
        """
        coefficients = self.coefficients(i, tau, to)
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

    def shift_scale(self, i: int) -> Any:
        """The factor from what `PullBack` makes of a gradient in ``x_0`` to the shift of ``x0_hat``."""
        t = self.levels[i]
        if self.vanishing(i):
            return isotropic_variance(t)
        return t.sigma**2 / t.alpha * x0_coefficients(self.denoiser.prediction, t.alpha, t.sigma)[1]


def isotropic_variance(level: Level) -> Any:
    """The variance of ``x_0`` given ``x_t`` for unit-variance data (Song et al. 2023, PiGDM):

    r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2)
    """
    return level.sigma**2 / (level.alpha**2 + level.sigma**2)


def noise(t: Level, s: Level, eta: float) -> float:
    """The noise of the step from level ``t`` to ``s``:

    tau = eta sqrt(Var(x_s | x_t, x_0))
    """
    given = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2  # variance of x_t given x_s
    return min(eta * math.sqrt(max(given, 0.0)) * s.sigma / t.sigma, s.sigma)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``values`` ``[n]``, reshaped to multiply ``like`` ``[n, *event]`` and in its dtype."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
