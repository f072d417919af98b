"""Feynman-Kac steering (Singhal et al. 2025): particles that follow any reward."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import foreign
from ..arguments import as_float, got, integer, one_of
from ..likelihoods import Gaussian, Likelihood
from ..ops._arguments import Coefficients, Scalar
from ..profiling import phase
from .base import Run, Schedulable, State, entry, per_sample, per_step
from .checks import check_covariance, default_covariance, prepare_likelihood
from .conditional import check_conditional
from .particles import check_particles, log_ratio, on_the_way, propose_guided, resample_particles
from .scores import PullBack, exact_log_prob, gradient_blamed, likelihood_score, likelihood_value

POTENTIALS = ("difference", "max", "sum")
PROPOSALS = ("base", "guided")

RewardFunction = Callable[..., Any]
Reward = Likelihood | RewardFunction | Sequence[tuple[Any, ...]]  # pairs (weight, reward)
Potential = Callable[[Tensor, Tensor | None], Tensor]
Proposal = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FK:
    """Feynman-Kac steering: weighted particles that follow any reward, differentiable or not.

    The particles of each observation have the target ``p(x_0) exp(strength * r(x_0))``. The weight of a particle is the
    product of its potentials, and of the density ratios of its proposals. A level has a potential where the step that
    starts there is one of ``resample_steps``. ``x_0`` always has one: it makes the product of all potentials
    ``exp(strength * r(x_0))``.

    The ``log_evidence`` of the result estimates ``log E[exp(strength * r(x_0))]``, with ``x_0`` drawn by the sampler
    without guidance. Where a callback ends the run early, weights and evidence are those of the level reached.

    With a likelihood, ``"difference"`` and ``"guided"`` this is `TDS`, number for number.

    **Reward.** A function ``r(x0 [n, *event]) -> [n]`` is called with ``x0_hat`` on the way and with ``x_0`` at the
    end. It returns a tensor, an array or a list. With a parameter named ``t`` it also gets the schedule's time of the
    level. The clean time is always a float; that of a table of betas is -1.0, so it cannot be used as an index. NaN and
    infinite rewards:

    - NaN gives the particle weight 0, with a warning. ``+inf`` is an error.
    - ``-inf`` at ``x_0`` gives weight 0. On the way ``x0_hat`` may break a constraint that ``x_0`` will meet, so
      ``-inf`` counts as the lowest finite reward of the observation's particles there.

    **Proposal of your own.** ``f(x, x0_hat, coefficients, *, seed, step) -> (x_s, log_ratio [n])``, where ``log_ratio``
    is the log-density of the base kernel minus its own. The function gets all ``B * K`` particles in one call, whatever
    the ``chunk_size``. It cannot be used with a list of seeds or ``first_sample > 0``. ``coefficients``, ``seed`` and
    ``step`` can be passed on to `fastguide.ops.reverse_step`; in `fastguide.capture` ``seed`` is a tensor.

    Args:
        reward: A function, see above. Or pairs ``(weight, r)``, for the weighted sum of several; a weight is finite and
            not 0. Or a likelihood: ``r = log p(y | x_0)``, approximated on the way with ``covariance``, as in TDS.
        particles: Number K of particles per observation, at least 1.
        potential: The log-potential of a level. ``"difference"``, the default, is ``strength * r`` minus the same at
            the last level that had a potential. ``"max"`` is ``strength`` times the largest reward so far, and
            ``"sum"`` is ``strength`` times the sum of the rewards so far. Or ``f(r [n], r of the last such level [n],
            or None at the first) -> [n]``.
        strength: Factor of the reward, finite and ``>= 0``; 1 by default. A number, a table with one entry per step, or
            a function of the schedule's time. The potential of a level takes the entry of the step that starts there.
            ``x_0`` takes the last entry, which must be above 0: it is the strength of the target.
        proposal: ``"base"``, the default, is the reverse step. ``"guided"`` is that of TDS, with the gradient of the
            reward; all rewards of a sum that have a gradient count. It needs ``eta > 0``, and for a reward that is not
            a likelihood ``covariance="point"``. Or a function, see above.
        covariance: For a likelihood, ``"point"``, ``"isotropic"`` or ``"moment"``, see `DPS`. None takes the default of
            TDS for ``"guided"``; for another proposal it takes ``"isotropic"`` where that can be had, else ``"point"``,
            and no derivative is needed. For a reward function None, or ``"point"`` for ``"guided"``: the gradient is
            taken at ``x0_hat`` as if that were certain, and a sharp reward makes the particles diverge.
        resampler: ``"systematic"`` (the default), ``"stratified"``, ``"multinomial"`` or ``"residual"``.
        ess_threshold: A number in ``[0, 1]``; 0.5 by default. At each of the ``resample_steps``, the particles of an
            observation are resampled if their effective sample size is below ``ess_threshold * particles``. Otherwise
            they stay, with their weights. None always resamples.
        resample_steps: The steps that may resample. Before each, the weights are multiplied by a potential. None means
            every step. A list gives them, counted from 0, each below the number of steps. An integer ``n >= 1`` means
            steps n, 2n, 3n, ..., not step 0. Before other steps there is no potential, and the reward is called only
            where the guided proposal needs its gradient.
        base_kernel: Covariance of the base kernel, ``"trace"`` or ``"ddpm"``, see `TDS`. None takes ``"trace"`` for
            ``"guided"``. Other proposals have no gradient, from which the variance comes: they take ``"ddpm"`` only.
        conditional: Whether the guided proposal narrows its noise by what ``y`` says, see `TDS`. None does not where
            ``strength`` is another number than 1.

    Raises:
        TypeError: An argument has the wrong type. Like all errors of guidance objects, this is raised when the run
            starts.
        ValueError: An argument is outside its range, ``covariance`` does not fit the reward, or ``eta`` is 0 in every
            step of a guided proposal.

    Source:
        Singhal et al. 2025.
    """

    reward: Reward
    particles: int
    potential: str | Potential = "difference"
    strength: Schedulable = 1.0
    proposal: str | Proposal = "base"
    covariance: str | None = None
    resampler: str = "systematic"
    ess_threshold: float | None = 0.5
    resample_steps: int | Iterable[int] | None = None
    base_kernel: str | None = None
    conditional: bool | None = None

    def prepare(self, run: Run) -> FK:
        reward: Likelihood | tuple[_Term, ...]
        covariance = self.covariance
        if not callable(self.potential):
            one_of("potential", self.potential, POTENTIALS, " or a callable")
        if not callable(self.proposal):
            one_of("proposal", self.proposal, PROPOSALS, " or a callable")
        if isinstance(self.reward, Likelihood):
            reward, measurements = prepare_likelihood(run, self.reward)
            if covariance is None:
                covariance = _covariance(reward, measurements, derivatives=self.proposal == "guided")
            reward = check_covariance(run, reward, covariance, measurements, guided=self.proposal == "guided")
        else:
            reward = _terms(self.reward)
            point = isinstance(covariance, str) and covariance == "point"
            if not point and (covariance is not None or self.proposal == "guided"):
                raise ValueError(
                    f"covariance: expected 'point' with a reward that is no likelihood, got {got(covariance)}. With "
                    "proposal='guided' pass it explicitly; it can diverge where the reward is sharp"
                )
        if callable(self.proposal) and (isinstance(run.seed, tuple) or run.first_sample):
            raise ValueError(
                "proposal: a custom proposal cannot be used with a list of seeds or first_sample > 0, "
                f"got {'a list of seeds' if isinstance(run.seed, tuple) else f'first_sample={run.first_sample}'}"
            )
        strength = per_step("strength", self.strength, run.levels)
        if strength[-1] == 0.0:
            raise ValueError(
                "strength: expected a number > 0 at the last step, which sets the strength of the target, got 0.0"
            )
        guided = self.proposal == "guided"
        base_kernel = ("trace" if guided else "ddpm") if self.base_kernel is None else self.base_kernel
        check_particles(run, self.resampler, self.ess_threshold, base_kernel, guided)
        conditional = self.conditional
        if conditional is None and any(factor != 1.0 for factor in strength):
            conditional = False  # the measurement is weighted otherwise than its noise says
        reward, conditional = check_conditional(run, conditional, reward, covariance, base_kernel)
        return replace(
            self,
            reward=reward,
            covariance=covariance,
            conditional=conditional,
            strength=(*strength, strength[-1]),  # one entry per level
            base_kernel=base_kernel,
            resample_steps=_steps(self.resample_steps, run.steps),
        )

    def start(self, run: Run) -> State:
        x = run.initial()
        zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        # NaN: no reward has been evaluated yet.
        before = {"reward": torch.full_like(zero, math.nan), "log_product": zero}
        if self.potential in ("max", "sum"):
            before["so_far"] = torch.full_like(zero, -math.inf) if self.potential == "max" else zero.clone()
        log_weights = torch.zeros(run.observations, run.particles, dtype=torch.float64, device=x.device)
        return self._arrive(run, x, 0, before, log_weights)

    def step(self, run: Run, state: State, i: int) -> State:
        threshold = self.ess_threshold if self._weighs(run, i) else 0.0
        ancestors, log_weights, ess = resample_particles(run, state, i, self.resampler, threshold)
        with phase("step"):
            x, log_weights = self._propose(run, state, log_weights, i)
        new = self._arrive(run, x, i + 1, state.particles, log_weights)
        return replace(new, ess=ess, ancestors=ancestors)

    def decides(self, i: int) -> tuple[bool, ...]:
        """What step ``i`` decides on the host.

        This is whether it resamples, whether the next level has a potential, and whether that potential is the first
        that a callable gets.
        """
        assert isinstance(self.resample_steps, tuple)
        first = callable(self.potential) and i + 1 == min(self.resample_steps, default=-1)
        return i in self.resample_steps, i + 1 in self.resample_steps, first

    def _weighs(self, run: Run, i: int) -> bool:
        """Whether level ``i`` has a potential."""
        assert isinstance(self.resample_steps, tuple)
        return i == run.steps or i in self.resample_steps

    def _propose(self, run: Run, state: State, log_weights: Tensor, i: int) -> tuple[Tensor, Tensor]:
        if self.proposal == "base":
            return run.reverse_step(state.x, state.particles.pop("x0_hat"), i), log_weights
        if self.proposal == "guided":
            narrowed = self.reward if self.conditional else None
            assert narrowed is None or isinstance(narrowed, Gaussian)
            blamed = gradient_blamed(self.reward)
            return propose_guided(run, state, log_weights, i, blamed, entry(self.strength, i), narrowed)
        assert callable(self.proposal)
        coefficients: Coefficients = run.coefficients(i)
        counter = {name: run.counter(i)[name] for name in ("seed", "step")}
        x0_hat = state.particles.pop("x0_hat")
        proposed = foreign.call(self.proposal, state.x, x0_hat, coefficients, **counter)
        if not isinstance(proposed, tuple) or len(proposed) != 2:
            raise TypeError(f"proposal: expected it to return (x_s, log_ratio), got {type(proposed).__name__}")
        x = _returned("proposal", proposed[0], state.x.shape)
        ratio = _returned("proposal", proposed[1], state.x.shape[:1])
        run.watch.finite(i, "proposal", x)
        run.watch.log_prob(i, "proposal", ratio)
        # A copy, since the particles are moved in place and the function may keep its result.
        return x.detach().to(state.x.dtype, copy=True), log_weights + ratio.detach().reshape(log_weights.shape)

    def _arrive(self, run: Run, x: Tensor, i: int, old: dict[str, Tensor], log_weights: Tensor) -> State:
        """The particles ``x`` at level ``i``. Their weights are multiplied by the potential, where the level has one.

        ``old``: what is known about them from the levels before.
        """
        weighs, last = self._weighs(run, i), i == run.steps
        found = {"x0_hat": x, "reward": self._final_reward(run, x)} if last else self._evaluate(run, x, i, weighs)
        if not weighs:
            kept = {name: value for name, value in old.items() if name not in ("x0_hat", "gradient", "variance")}
            return State(x, log_weights, {**found, **kept})
        with phase("weights"):
            dead = old["log_product"] == -math.inf
            reward = found["reward"] if last else on_the_way(run, found["reward"])
            if not isinstance(self.reward, Likelihood):
                unknown = torch.isnan(reward)
                run.watch.dropped(min(i, run.steps - 1), "reward", unknown & ~dead)
                reward = reward.masked_fill(unknown, -math.inf)
                run.watch.log_prob(min(i, run.steps - 1), "reward", reward)
                dead = dead | unknown
            found["reward"] = reward
            log_potential, log_product = self._log_potential(run, found, old, dead, i)
            found["log_product"] = log_product.masked_fill(dead, -math.inf)
            log_potential = log_potential.masked_fill(dead, -math.inf)
            return State(x, log_weights + log_potential.reshape(log_weights.shape), found)

    def _evaluate(self, run: Run, x: Tensor, i: int, weighs: bool) -> dict[str, Tensor]:
        """``x0_hat``, its reward where the level has a potential, and the reward's gradient for the guided proposal."""
        guided = self.proposal == "guided"
        if not (weighs or guided):
            return {"x0_hat": run.x0_hat(x, i)}
        gradient, variance, wide = None, [], self.base_kernel == "trace"
        if isinstance(self.reward, Likelihood):
            assert self.covariance is not None
            if guided or self.covariance == "moment":
                x0_hat, gradient, reward, *variance = likelihood_score(
                    run, self.reward, self.covariance, x, i, variance=wide
                )  # fmt: skip
            else:
                x0_hat, reward = likelihood_value(run, self.reward, self.covariance, x, i)
        elif guided:
            x0_hat, gradient, reward, *variance = run.in_chunks(lambda rows, x: self._reward_score(run, x, i, rows), x)
        else:
            x0_hat = run.x0_hat(x, i)
            reward = self._reward(run, x0_hat, i)
        found = {"x0_hat": x0_hat}
        if weighs:
            found["reward"] = reward
        if guided:
            assert gradient is not None
            found["gradient"] = gradient
        if wide:
            found["variance"] = variance[0]
        return found

    def _reward_score(self, run: Run, x: Tensor, i: int, rows: Tensor) -> tuple[Tensor, ...]:
        pull_back = PullBack(run, x, i, rows)
        with phase("gradient"):
            with torch.enable_grad():
                x0 = pull_back.x0.detach().requires_grad_()
                reward = self._call_reward(run, x0, i)
            if not reward.requires_grad:
                raise ValueError("reward: expected one that autograd can differentiate for the guided proposal")
            (back,) = torch.autograd.grad(reward, x0, torch.ones_like(reward))
            gradient, reward = pull_back(back), reward.detach()
            variance = (pull_back.variance(back, gradient),) if self.base_kernel == "trace" else ()
            # The gradient of a reward of NaN or -inf is of no use.
            gradient = torch.where(per_sample(reward > -math.inf, gradient).bool(), gradient, 0.0)
            return pull_back.x0_hat, gradient, reward, *variance

    def _reward(self, run: Run, x0: Tensor, i: int) -> Tensor:
        with torch.no_grad(), phase("weights"):
            return run.in_chunks(lambda rows, x0: (self._call_reward(run, x0, i),), x0)[0]

    def _call_reward(self, run: Run, x0: Tensor, i: int) -> Tensor:
        """The reward, ``[n]`` in float64."""
        assert isinstance(self.reward, tuple)
        total, t = None, run.levels[i].t
        if i == run.steps:
            t = float(t)  # a table's clean time is -1, which as an int would index another level
        for weight, function, takes_t in self.reward:
            returned = foreign.call(function, x0, **({"t": t} if takes_t else {}))
            value = weight * _as_tensor("reward", returned, x0)
            total = value if total is None else total + value
        assert total is not None
        return total

    def _final_reward(self, run: Run, x: Tensor) -> Tensor:
        if isinstance(self.reward, Likelihood):
            return exact_log_prob(run, self.reward, x)
        return self._reward(run, x, run.steps)

    def _log_potential(
        self, run: Run, new: dict[str, Tensor], old: dict[str, Tensor], dead: Tensor, i: int
    ) -> tuple[Tensor, Tensor]:
        """The log-potential of level ``i``, and the sum of the log-potentials so far, each ``[n]``.

        For ``"max"`` and ``"sum"`` the reward so far is added to ``new``.
        """
        reward, last = new["reward"], i == run.steps
        strength = entry(self.strength, i)
        if self.potential == "difference" or last:
            product = _tempered(strength, reward)
            return log_ratio(product, old["log_product"]), product
        if self.potential in ("max", "sum"):
            combine = torch.maximum if self.potential == "max" else torch.add
            new["so_far"] = combine(reward, old["so_far"])
            log_potential = _tempered(strength, new["so_far"])
        else:
            assert callable(self.potential) and isinstance(self.resample_steps, tuple)
            before = None if i == min(self.resample_steps) else old["reward"]
            log_potential = _as_tensor("potential", foreign.call(self.potential, reward, before), reward).detach()
            # For a dead particle it may be the difference of two infinities.
            run.watch.log_prob(i, "potential", log_potential.masked_fill(dead, 0.0))
        return log_potential, old["log_product"] + log_potential


class _Term(NamedTuple):
    """One reward of a weighted sum."""

    weight: float
    function: RewardFunction
    takes_t: bool


def _terms(reward: Any) -> tuple[_Term, ...]:
    """The weighted rewards in ``reward``."""
    if callable(reward):
        return (_Term(1.0, reward, _takes_t(reward)),)
    if not isinstance(reward, Sequence) or isinstance(reward, str) or not reward:
        raise TypeError(f"reward: expected a callable, a likelihood or pairs (weight, callable), got {got(reward)}")
    terms = []
    for pair in reward:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not callable(pair[1]):
            raise TypeError(f"reward: expected pairs (weight, callable), got {got(pair)}")
        weight, function = as_float(pair[0]), pair[1]
        if weight is None or not math.isfinite(weight) or weight == 0.0:
            raise ValueError(f"reward: expected weights that are finite numbers other than 0, got {got(pair[0])}")
        terms.append(_Term(weight, function, _takes_t(function)))
    return tuple(terms)


def _takes_t(function: RewardFunction) -> bool:
    """Whether the function has a parameter ``t`` that is not bound yet."""
    if isinstance(function, functools.partial) and "t" in function.keywords:
        return False
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        parameter = inspect.signature(function).parameters.get("t")
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _covariance(likelihood: Likelihood, measurements: int, derivatives: bool) -> str:
    """The default covariance.

    Without a gradient it is one that needs values alone. Where a likelihood supports none, it is taken at ``x0_hat``,
    as a reward is: the proposal does not follow it, so nothing diverges.
    """
    if not derivatives:
        return "point" if likelihood.supports("isotropic", measurements) else "isotropic"
    return default_covariance(likelihood, measurements)


def _steps(resample_steps: int | Iterable[int] | None, steps: int) -> tuple[int, ...]:
    """The steps that resample."""
    if resample_steps is None:
        return tuple(range(steps))
    if isinstance(resample_steps, str | bytes | Tensor) or not isinstance(resample_steps, Iterable):
        every = integer("resample_steps", resample_steps, 1)
        return tuple(range(every, steps, every))
    return tuple(sorted({integer("resample_steps", i, 0, steps) for i in resample_steps}))


def _tempered(strength: Scalar, reward: Tensor) -> Tensor:
    """``strength * reward``; 0 where ``strength`` is 0, also for a reward of ``-inf``."""
    return torch.where((reward == -math.inf) & (strength == 0.0), 0.0, strength * reward)


def _as_tensor(name: str, value: object, x: Tensor) -> Tensor:
    """A float64 tensor ``[n]`` from what a user's function returned: a tensor, an array or a list."""
    if isinstance(value, list | tuple) or (hasattr(value, "__array__") and not isinstance(value, Tensor)):
        try:
            # Keep the array's dtype: a cast in numpy would drop an imaginary part.
            dtype = None if hasattr(value, "dtype") else torch.float64
            value = torch.as_tensor(value, dtype=dtype, device=x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected it to return {len(x)} numbers, got {value!r}") from error
    return _returned(name, value, x.shape[:1]).to(x.device, torch.float64)


def _returned(name: str, value: object, shape: torch.Size) -> Tensor:
    """What a user's function returned, if it is a tensor of the expected shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected it to return a tensor of shape {list(shape)}, got {got}")
    return foreign.returned(name, value)
