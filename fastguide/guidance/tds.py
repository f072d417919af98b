"""Twisted diffusion sampling (Wu et al. 2023): a particle filter whose weights make it exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Gaussian, Likelihood
from ..profiling import phase
from .base import Run, State
from .checks import check_covariance, default_covariance, prepare_likelihood
from .conditional import check_conditional
from .particles import check_particles, log_ratio, on_the_way, propose_guided, resample_particles
from .scores import exact_log_prob, gradient_blamed, likelihood_score


@dataclass(frozen=True)
class TDS:
    """Twisted diffusion sampling: weighted particles, exact for ``p(x_0 | y)`` as their number grows.

    Each step resamples, draws from the guided proposal and multiplies the weights:

        x_s ~ N(m_y, S),   w_s = w_t N(x_s; m, S) / N(x_s; m_y, S) p~(y | x_s) / p~(y | x_t)

    ``N(m, S)`` is the base kernel: ``m`` is the mean of the reverse step. ``m_y`` is the mean with the gradient of
    ``log p~(y | x_t)`` added. At the last level ``p~`` is the exact ``p(y | x_0)``. The run needs ``eta > 0``.
    Where a callback ends it early, weights and evidence are those of the level reached.

    Args:
        likelihood: The error model. Its operator must be differentiable, or linear with an adjoint.
        particles: Number K of particles per observation, at least 1.
        covariance: Covariance of ``x_0`` given ``x_t`` in the twisting function ``p~(y | x_t)``: ``"point"``,
            ``"isotropic"`` or ``"moment"``, see `DPS`. It changes the variance, never the limit. None takes
            ``"moment"`` where it can be had, else ``"isotropic"``; where neither can be had, it is an error.
            ``"point"`` can diverge where the likelihood is sharp, so it must be named. It is the only one for Poisson
            and Callable likelihoods.
        resampler: ``"systematic"`` (the default), ``"stratified"``, ``"multinomial"`` or ``"residual"``.
        ess_threshold: A number in ``[0, 1]``; 0.5 by default. The particles of an observation are resampled before a
            step if their effective sample size is below ``ess_threshold * particles``. None resamples before every
            step.
        base_kernel: Covariance ``S`` of the base kernel. ``"trace"``, the default, is ``(tau^2 + b^2 v) I``: the noise
            of the reverse step, and the mean variance ``v`` of ``x_0`` given ``x_t`` (second-order Tweedie) times the
            square of the factor ``b`` of ``x0_hat`` in ``m``. ``v`` belongs to each particle. It is taken in directions
            that the operator measures: over the rows of ``A`` with ``covariance="moment"``, else along the gradient in
            ``x_0``. No further network pass is needed. ``"ddpm"`` is the paper's ``tau^2 I``. It leaves out that
            ``x_0`` is uncertain given ``x_t``, so with few steps the particles follow another prior than the
            network's.
        conditional: Whether the proposal's noise is narrowed by what ``y`` says. The covariance of ``x_s`` is then

                S - b^2 v^2 A^T (v A A^T + s^2 I)^-1 A

            in place of ``S``, with the noise's scale ``s``. The target stays the same. With ``eta = 1`` the weights
            vary less: not at all for a Gaussian prior of covariance ``I``. With ``eta`` below 0.5 they vary more. It
            needs ``base_kernel="trace"``, a Gaussian likelihood with one scale for all measurements, and a linear
            operator whose spectrum is known or that has at most 256 measurements. A step costs two more products with
            ``A`` and one with ``A^T``. None does it with ``covariance="isotropic"`` and ``eta = 1``, where it can be
            had.

    Raises:
        TypeError: ``likelihood`` is not a likelihood, or another argument has the wrong type. Like all errors of
            guidance objects, this is raised when the run starts.
        ValueError: An argument is outside its range, ``covariance`` does not fit the likelihood, or ``eta`` is 0 in
            every step.

    Source:
        Wu et al. 2023; Bao et al. 2022 (Analytic-DPM) for the variance of the reverse step; Doucet et al. 2000 for the
        conditional proposal.
    """

    likelihood: Likelihood
    particles: int
    covariance: str | None = None
    resampler: str = "systematic"
    ess_threshold: float | None = 0.5
    base_kernel: str = "trace"
    conditional: bool | None = None

    def prepare(self, run: Run) -> TDS:
        likelihood, measurements = prepare_likelihood(run, self.likelihood)
        covariance = default_covariance(likelihood, measurements) if self.covariance is None else self.covariance
        likelihood = check_covariance(run, likelihood, covariance, measurements)
        check_particles(run, self.resampler, self.ess_threshold, self.base_kernel, guided=True)
        likelihood, conditional = check_conditional(run, self.conditional, likelihood, covariance, self.base_kernel)
        return replace(self, likelihood=likelihood, covariance=covariance, conditional=conditional)

    def start(self, run: Run) -> State:
        x = run.initial()  # [B*K, *event]
        twist = self._twist(run, x, 0)
        return State(x, twist["log_prob"].reshape(run.observations, run.particles).clone(), twist)

    def step(self, run: Run, state: State, i: int) -> State:
        ancestors, log_weights, ess = resample_particles(run, state, i, self.resampler, self.ess_threshold)
        with phase("step"):
            narrowed = self.likelihood if self.conditional else None
            assert narrowed is None or isinstance(narrowed, Gaussian)
            x, log_weights = propose_guided(
                run, state, log_weights, i, gradient_blamed(self.likelihood), likelihood=narrowed
            )
        if i + 1 < run.steps:
            twist = self._twist(run, x, i + 1)
        else:  # x is x_0: the exact likelihood
            twist = {"log_prob": exact_log_prob(run, self.likelihood, x)}
        with phase("weights"):
            new, old = twist["log_prob"], state.particles["log_prob"]
            # Only a Callable says that a particle is dead.
            change = log_ratio(new, old) if isinstance(self.likelihood, CallableLikelihood) else new - old
            log_weights = log_weights + change.reshape(log_weights.shape)
        return State(x, log_weights, twist, ess, ancestors)

    def _twist(self, run: Run, x: Tensor, i: int) -> dict[str, Tensor]:
        """``x0_hat``, ``log p~(y | x_t)``, its gradient, and the variance that the base kernel adds.

        One evaluation of the network serves the weight of this step and the proposal of the next.
        """
        assert self.covariance is not None
        wide = self.base_kernel == "trace"
        x0_hat, gradient, log_prob, *variance = likelihood_score(
            run, self.likelihood, self.covariance, x, i, variance=wide
        )  # fmt: skip
        if isinstance(self.likelihood, CallableLikelihood):  # only such a likelihood may return -inf
            log_prob = on_the_way(run, log_prob)
        twist = {"x0_hat": x0_hat, "gradient": gradient, "log_prob": log_prob}
        return {**twist, "variance": variance[0]} if wide else twist
