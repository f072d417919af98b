"""Feynman-Kac steering (Singhal et al. 2025): particles that follow any reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from ..likelihoods import Likelihood
from ..ranges import phase
from ..reference import Coefficients, scaled
from .base import PullBack, Run, State, check_covariance, default_covariance, integer, prepare_likelihood
from .particles import check_particles, log_ratio, propose_guided, resample_particles

POTENTIALS = ("difference", "max", "sum")
PROPOSALS = ("base", "guided")

Reward = Likelihood | Callable[[Tensor], Tensor]
Potential = Callable[[Tensor, Tensor | None], Tensor]
Proposal = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FK:
    """``particles`` weighted particles per observation whose target is ``p(x_0) exp(strength * r(x_0))``.

    - ``reward``: ``r(x0 [n, *event]) -> [n]``, differentiable or not, taken at ``x0_hat`` on the way and at ``x_0`` at
      the end; or a likelihood, ``r = log p(y | x_0)``, approximated on the way with ``covariance`` as in TDS.
    - ``potential``, the log-weight of a step: ``"difference"`` ``strength * (r_s - r_t)``; ``"max"`` and ``"sum"``
      ``strength *`` the largest reward, or their sum, so far; or ``f(r_s [n], r_t [n] or None at the first level) ->
      log-potential [n]``. The last one always makes the product ``exp(strength * r(x_0))``.
    - ``proposal``: ``"base"`` the reverse step; ``"guided"`` that of TDS, with the gradient of the reward; or
      ``f(x, x0_hat, coefficients, *, seed, step) -> (x_s, log_ratio [n])``, ``log_ratio`` the base kernel's
      log-density minus its own. All three are as the operations take them: in a CUDA graph, tensors.
    - Resampling at ``resample_steps`` (None: every step; an integer: every so many; a list of steps), of the rows whose
      effective sample size is below ``ess_threshold * particles`` (None: of all).

    With a likelihood, ``"difference"`` and ``"guided"`` this is `TDS`, number for number.
    """

    reward: Reward
    particles: int
    potential: str | Potential = "difference"
    strength: float = 1.0
    proposal: str | Proposal = "base"
    covariance: str | None = None
    resampler: str = "systematic"
    ess_threshold: float | None = 0.5
    resample_steps: int | Sequence[int] | None = None

    device_inputs = ("strength",)

    def prepare(self, run: Run) -> FK:
        reward, covariance = self.reward, self.covariance
        if isinstance(reward, Likelihood):
            reward, measurements = prepare_likelihood(run, reward)
            covariance = default_covariance(reward, measurements) if covariance is None else covariance
            check_covariance(reward, covariance, measurements)
        elif not callable(reward):
            raise TypeError(f"reward: expected a callable or a likelihood, got {type(reward).__name__}")
        elif covariance is not None:
            raise ValueError(f"covariance: expected None with a reward that is no likelihood, got {covariance!r}")
        if not callable(self.potential) and self.potential not in POTENTIALS:
            raise ValueError(f"potential: expected one of {POTENTIALS} or a callable, got {self.potential!r}")
        if not callable(self.proposal) and self.proposal not in PROPOSALS:
            raise ValueError(f"proposal: expected one of {PROPOSALS} or a callable, got {self.proposal!r}")
        if callable(self.proposal) and (isinstance(run.seed, tuple) or run.first_sample):
            raise ValueError(
                "proposal: a function draws with one seed from sample 0 on; expected seed an integer and first_sample 0"
            )
        if not isinstance(self.strength, Real) or not 0.0 < self.strength < math.inf:
            raise ValueError(f"strength: expected a finite number > 0, got {self.strength!r}")
        if isinstance(self.resample_steps, Sequence):
            for i in self.resample_steps:
                integer("resample_steps", i, 0, run.steps)
        elif self.resample_steps is not None:
            integer("resample_steps", self.resample_steps, 1)
        check_particles(run, self.resampler, self.ess_threshold, guided=self.proposal == "guided")
        return replace(self, reward=reward, covariance=covariance)

    def start(self, run: Run) -> State:
        x = run.initial()
        particles = self._evaluate(run, x, 0)
        with phase("weights"):
            log_potential = self._log_potential(particles, None, last=False)
        return State(x, log_potential.reshape(run.observations, run.particles).clone(), particles)

    def step(self, run: Run, state: State, i: int) -> State:
        threshold = self.ess_threshold if self.decides(i) else 0.0
        ancestors, log_weights, ess = resample_particles(run, state, i, self.resampler, threshold)
        with phase("step"):
            x, log_weights = self._propose(run, state, log_weights, i)
        last = i + 1 == run.steps
        particles = {"reward": self._final_reward(run, x)} if last else self._evaluate(run, x, i + 1)
        with phase("weights"):
            log_potential = self._log_potential(particles, state.particles, last)
            log_weights = log_weights + log_potential.reshape(log_weights.shape)
        return State(x, log_weights, particles, ess, ancestors)

    def decides(self, i: int) -> bool:
        """Whether step ``i`` resamples."""
        if self.resample_steps is None:
            return True
        if isinstance(self.resample_steps, Sequence):
            return i in self.resample_steps
        return i > 0 and i % self.resample_steps == 0

    def _propose(self, run: Run, state: State, log_weights: Tensor, i: int) -> tuple[Tensor, Tensor]:
        x0_hat = state.particles["x0_hat"]
        if self.proposal == "base":
            return run.reverse_step(state.x, x0_hat, i), log_weights
        if self.proposal == "guided":
            return propose_guided(run, state, log_weights, i)
        assert callable(self.proposal)
        coefficients: Coefficients = run.coefficients(i)
        counter = {name: run.counter(i)[name] for name in ("seed", "step")}
        proposed = self.proposal(state.x, x0_hat, coefficients, **counter)
        if not isinstance(proposed, tuple) or len(proposed) != 2:
            raise TypeError(f"proposal: expected it to return (x_s, log_ratio), got {type(proposed).__name__}")
        x = _returned("proposal", proposed[0], state.x.shape)
        ratio = _returned("proposal", proposed[1], state.x.shape[:1])
        return x.to(state.x.dtype), log_weights + ratio.reshape(log_weights.shape)

    def _evaluate(self, run: Run, x: Tensor, i: int) -> dict[str, Tensor]:
        """``x0_hat``, its reward and, for the guided proposal, its shift."""
        if isinstance(self.reward, Likelihood):
            assert self.covariance is not None
            if self.proposal == "guided" or self.covariance == "moment":
                x0_hat, shift, reward, _ = run.likelihood_score(self.reward, self.covariance, x, i)
                shift = scaled(shift, self.strength)
            else:
                x0_hat, reward = run.likelihood_value(self.reward, self.covariance, x, i)
        elif self.proposal == "guided":
            x0_hat, shift, reward = run.in_chunks(lambda rows, x: self._reward_score(run, x, i, rows), x)
        else:
            x0_hat = run.x0_hat(x, i)
            reward = self._reward(run, x0_hat)
        particles = {"x0_hat": x0_hat, "reward": reward}
        return {**particles, "shift": shift} if self.proposal == "guided" else particles

    def _reward_score(self, run: Run, x: Tensor, i: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pull_back = PullBack(run, x, i, rows)
        with phase("gradient"):
            with torch.enable_grad():
                reward = self._call_reward(pull_back.x0)
            if not reward.requires_grad:
                raise ValueError("reward: expected one that autograd can differentiate for the guided proposal")
            shift = pull_back(reward, scaled(torch.ones_like(reward), self.strength))
            return pull_back.x0.detach().to(x.dtype), shift.to(x.dtype), reward.detach().double()

    def _reward(self, run: Run, x0: Tensor) -> Tensor:
        with torch.no_grad(), phase("weights"):
            return run.in_chunks(lambda rows, x0: (self._call_reward(x0).double(),), x0)[0]

    def _call_reward(self, x0: Tensor) -> Tensor:
        assert not isinstance(self.reward, Likelihood)
        return _returned("reward", self.reward(x0), x0.shape[:1])

    def _final_reward(self, run: Run, x: Tensor) -> Tensor:
        if isinstance(self.reward, Likelihood):
            return run.exact_log_prob(self.reward, x)
        return self._reward(run, x)

    def _log_potential(self, new: dict[str, Tensor], old: dict[str, Tensor] | None, last: bool) -> Tensor:
        """``[n]``; what later levels need of the rewards so far joins ``new``."""
        reward = new["reward"]
        if self.potential == "difference":
            return self.strength * (reward if old is None else log_ratio(reward, old["reward"]))
        if last:
            assert old is not None
            return log_ratio(self.strength * reward, old["log_product"])
        if self.potential == "max":
            new["so_far"] = reward if old is None else torch.maximum(reward, old["so_far"])
            log_potential = self.strength * new["so_far"]
        elif self.potential == "sum":
            new["so_far"] = reward if old is None else reward + old["so_far"]
            log_potential = self.strength * new["so_far"]
        else:
            assert callable(self.potential)
            log_potential = self.potential(reward, None if old is None else old["reward"])
            log_potential = _returned("potential", log_potential, reward.shape)
        new["log_product"] = log_potential if old is None else old["log_product"] + log_potential
        return log_potential


def _returned(name: str, value: object, shape: torch.Size) -> Tensor:
    """What a user's function returned, if it is a tensor of the shape expected."""
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected it to return a tensor of shape {list(shape)}, got {got}")
    return value
