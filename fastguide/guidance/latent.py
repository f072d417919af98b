"""Plug-and-play where the state is a latent of an autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import foreign
from ..arguments import function, got, number, one_of
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..operators import Function, Operator
from ..profiling import phase
from ..reference import scaled
from .base import STREAM_RENOISE, Run, Schedulable, State
from .pnp import PnP

SPACES = ("latent", "pixel")


@dataclass(frozen=True)
class LatentPnP:
    """`PnP` on the latents ``z`` of an autoencoder. The measurement is of ``decoder(z)``.

    `fastguide.sample` returns latents. The operator of the likelihood acts on decoded images.

    Args:
        likelihood: The error model of the decoded image.
        decoder: ``[n, *latent] -> [n, *image]``, each sample alone, real. Where it returns an output object, its tensor
            ``sample`` counts. Differentiable for ``space="latent"``.
        encoder: ``[n, *image] -> [n, *latent]``, the same way. Needed for ``space="pixel"``, and None for ``"latent"``.
        space: ``"latent"``, the default, solves ``z0* = argmin_z -log p(y | D(z)) + rho/2 norm(z - z0_hat)^2`` by
            Gauss-Newton or gradient steps through the decoder. ``"pixel"`` solves the same problem for the decoded
            ``D(z0_hat)`` and encodes the solution.
        rho: As for `PnP`, ``> 0``.
        zeta: As for `PnP`, in ``[0, 1]``; 0.5 by default. It has no effect with ``gamma``.
        gamma: None adds noise by ``zeta`` as `PnP` does. A number ``> 0`` draws ``z_s`` as ReSample does: from the
            product of ``N(alpha_s z0*, sigma_s^2)`` and a Gaussian around the unconditional step, with variance ``gamma
            (sigma_s / alpha_t)^2 Var(x_t | x_s)``. The paper's value is 40.
        solver: As for `PnP`. With ``space="latent"`` one of ``"auto"``, ``"gauss-newton"`` and ``"gradient"``, since
            the decoder is not linear.
        iterations: As for `PnP`, at least 1.

    Raises:
        TypeError: An argument has the wrong type. Like all errors of guidance objects, this is raised when the run
            starts.
        ValueError: An argument is outside its range, ``space`` and ``encoder`` do not fit each other, or the decoder or
            the encoder returns another shape. Also where ``sample`` is given an ``eta``.

    Source:
        Zhu et al. 2023 (DiffPIR); Song et al. 2024 (ReSample), proposition 1 (``gamma``).
    """

    likelihood: Likelihood
    decoder: Callable[[Tensor], Tensor]
    encoder: Callable[[Tensor], Tensor] | None = None
    space: str = "latent"
    rho: Schedulable | None = None
    zeta: Schedulable = 0.5
    gamma: float | None = None
    solver: str = "auto"
    iterations: int | None = None
    _pnp: PnP | None = field(default=None, init=False, repr=False)  # prepare() fills it in

    takes_eta = False

    def prepare(self, run: Run) -> LatentPnP:
        one_of("space", self.space, SPACES)
        if (self.space == "pixel") != (self.encoder is not None):
            expected = "an encoder with space='pixel'" if self.space == "pixel" else "None with space='latent'"
            raise ValueError(f"encoder: expected {expected}, got {got(self.encoder)}")
        gamma = None if self.gamma is None else number("gamma", self.gamma, above=0.0)
        function("decoder", self.decoder)
        if self.encoder is not None:
            function("encoder", self.encoder)
        if not isinstance(self.likelihood, Likelihood):
            came = type(self.likelihood).__name__
            raise TypeError(f"likelihood: expected a fastguide.likelihoods likelihood, got {came}")
        probe = torch.zeros(1, *run.event, dtype=run.dtype, device=run.device)
        with torch.no_grad():
            image = called("decoder", self.decoder, probe)
            latent = probe if self.encoder is None else called("encoder", self.encoder, image)
        if latent.shape != probe.shape:
            raise ValueError(f"encoder: expected latents of shape {list(run.event)}, got {list(latent.shape[1:])}")
        pnp = PnP(self.likelihood, self.rho, self.zeta, self.solver, self.iterations)
        if self.space == "latent":
            decoded = replace_operator(self.likelihood.to(run.device, run.compute_dtype), self.decoder, run.dtype)
            pnp = replace(pnp, likelihood=decoded).prepare(run)
        else:
            pnp = pnp.prepare(replace(run, event=tuple(image.shape[1:])))
        prepared = copy.copy(self)
        object.__setattr__(prepared, "gamma", gamma)
        object.__setattr__(prepared, "_pnp", pnp)
        return prepared

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        assert self._pnp is not None
        z0_hat = run.x0_hat(state.x, i)
        with torch.no_grad(), phase("solve"):
            start = z0_hat if self.encoder is None else self._coded(run, "decoder", z0_hat, i)
            z0 = self._pnp.data_step(run, start, i)
            run.watch.finite(i, self._pnp.likelihood.blamed, z0)
            if self.encoder is not None:
                z0 = self._coded(run, "encoder", z0, i)
        with phase("step"):
            if self.gamma is None:
                tau, blamed = self._pnp.fresh_noise(run, i), self._pnp.likelihood.blamed
                x = run.reverse_step(state.x, z0, i, tau=tau, blamed=(blamed,))
            else:
                x = self._stochastic_resample(run, state.x, z0_hat, z0, i)
            return State(x, x0_hat=z0_hat)

    def _coded(self, run: Run, name: str, x: Tensor, i: int) -> Tensor:
        """The result of the decoder or the encoder for ``x``, in the run's dtype."""
        function = getattr(self, name)
        (y,) = run.in_chunks(lambda rows, x: (called(name, function, x).to(run.dtype),), x)
        run.watch.finite(i, name, y)
        return y

    def _stochastic_resample(self, run: Run, x: Tensor, z0_hat: Tensor, z0: Tensor, i: int) -> Tensor:
        assert self.gamma is not None
        t, s, last = run.levels[i], run.levels[i + 1], run.levels[i + 1].sigma == 0.0
        given = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2  # variance of x_t given x_s
        prior = self.gamma * s.sigma**2 * given
        # The share of alpha_s z0* in the product's mean, written so that it is 1 at alpha_t = 0.
        share = 1.0 if last else prior / (prior + s.sigma**2 * t.alpha**2)
        unconditional = run.reverse_step(x, z0_hat, i)
        z = scaled(z0, share * s.alpha) + scaled(unconditional, 1.0 - share)
        if last:
            return z
        return z + scaled(run.randn(i, STREAM_RENOISE), s.sigma * share**0.5)


def called(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, if it is a real tensor with as many samples."""
    expected = (
        f"a tensor [{len(x)}, ...] or an object with such a sample (of a diffusers VAE: "
        "fastguide.integrations.diffusers.codec)"
    )
    y = foreign.returned(name, foreign.call(function, x), expected)
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"{name}: expected it to return {expected}, got shape {list(y.shape)}")
    return y


def replace_operator(likelihood: Likelihood, decoder: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Likelihood:
    """The likelihood of a latent: its operator measures what the decoder makes, which computes in ``dtype``."""
    if isinstance(likelihood, CallableLikelihood):
        f = likelihood.f
        decoded = likelihood.to()
        decoded.f = lambda z, **kw: f(called("decoder", decoder, z.to(dtype)), **kw)  # type: ignore[attr-defined]
        decoded.blamed = "decoder or likelihood"  # type: ignore[misc]
        return decoded
    decoded = likelihood.to()
    decoded.operator = _Decoded(likelihood.operator, decoder, dtype)
    return decoded


class _Decoded(Function):
    """The operator applied to the decoder's result. The decoder computes in ``dtype``."""

    blamed = "decoder or operator"

    def __init__(self, operator: Operator, decoder: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__(lambda z: operator(called("decoder", decoder, z.to(dtype)).to(z.dtype)))
        self._parts, self.observations = (operator, decoder, dtype), operator.observations

    def at(self, rows: Tensor) -> Operator:
        operator, decoder, dtype = self._parts
        return self if self.observations is None else _Decoded(operator.at(rows), decoder, dtype)
