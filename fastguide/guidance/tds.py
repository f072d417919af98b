"""Twisted diffusion sampling (Wu et al. 2023): a particle filter whose weights make it exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..profiling import phase
from .base import Run, State, check_covariance, default_covariance, gradient_blamed, prepare_likelihood
from .particles import check_particles, log_ratio, on_the_way, propose_guided, resample_particles


@dataclass(frozen=True)
class TDS:
    """``particles`` weighted particles per observation, exact for ``p(x_0 | y)`` as their number grows.

    - ``covariance`` of ``x_0`` given ``x_t`` in the twisting function ``p~(y | x_t)``: ``"point"``, ``"isotropic"``,
      ``"moment"``; None takes ``"moment"`` where it can be had, else ``"isotropic"``. ``"point"``, the only one for
      Poisson and Callable likelihoods, can diverge where the likelihood is sharp, and must be named. It changes the
      variance, never the limit: the last weight uses the exact ``p(y | x_0)``.
    - ``resampler``: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"``.
    - ``ess_threshold`` in ``[0, 1]``: a row is resampled if its effective sample size is below
      ``ess_threshold * particles``; with None, before every step.

    Needs ``eta > 0``. After a run that a callback ends early, weights and evidence are those of the level reached.
    """

    likelihood: Likelihood
    particles: int
    covariance: str | None = None
    resampler: str = "systematic"
    ess_threshold: float | None = 0.5

    def prepare(self, run: Run) -> TDS:
        likelihood, measurements = prepare_likelihood(run, self.likelihood)
        covariance = default_covariance(likelihood, measurements) if self.covariance is None else self.covariance
        likelihood = check_covariance(run, likelihood, covariance, measurements)
        check_particles(run, self.resampler, self.ess_threshold, guided=True)
        return replace(self, likelihood=likelihood, covariance=covariance)

    def start(self, run: Run) -> State:
        x = run.initial()  # [B*K, *event]
        twist = self._twist(run, x, 0)
        return State(x, twist["log_prob"].reshape(run.observations, run.particles).clone(), twist)

    def step(self, run: Run, state: State, i: int) -> State:
        ancestors, log_weights, ess = resample_particles(run, state, i, self.resampler, self.ess_threshold)
        with phase("step"):
            x, log_weights = propose_guided(run, state, log_weights, i, gradient_blamed(self.likelihood))
        if i + 1 < run.steps:
            twist = self._twist(run, x, i + 1)
        else:  # x is x_0: the exact likelihood
            twist = {"log_prob": run.exact_log_prob(self.likelihood, x)}
        with phase("weights"):
            change = log_ratio(twist["log_prob"], state.particles["log_prob"])
            log_weights = log_weights + change.reshape(log_weights.shape)
        return State(x, log_weights, twist, ess, ancestors)

    def _twist(self, run: Run, x: Tensor, i: int) -> dict[str, Tensor]:
        """``x0_hat``, ``log p~(y | x_t)`` and its gradient: one evaluation of the network serves the weight of this
        step and the proposal of the next."""
        assert self.covariance is not None
        x0_hat, gradient, log_prob = run.likelihood_score(self.likelihood, self.covariance, x, i)
        if isinstance(self.likelihood, CallableLikelihood):  # the only one that may be -inf
            log_prob = on_the_way(run, log_prob)
        return {"x0_hat": x0_hat, "gradient": gradient, "log_prob": log_prob}
