"""The samplers of ``k_diffusion.sampling`` (0.1.1), from a loop that never waits for the device.

Signatures, defaults, callbacks, and results from the same torch seed (to rounding) are k-diffusion's: noise is drawn in
the same order, and also where it then goes unused. Two things differ:

- The sigmas are read to the host once, before the first step; whatever a step decides or computes of them are floats
  there. Levels must be above 0, but the last. Where a rising or repeated level makes the original's result NaN, it is
  an error before the first step.
- `PhiloxNoiseSampler` as ``noise_sampler`` draws the noise inside the kernel that steps.

Names of ``k_diffusion.sampling`` that this module does not define (``sample_lms``, ``sample_dpm_fast``,
``log_likelihood``, ...) are those of the installed k-diffusion. This module can therefore stand in for that one, also
as ``sys.modules["k_diffusion.sampling"]``.

``sigmas`` ``[steps + 1]``, a tensor or a numpy array, decrease, most often to 0; ``x`` ``[N, *event]`` starts at
``sigmas[0]``; ``eta``, ``s_noise`` and other options are numbers, or tensors ``[]``, read before the first step;
``model(x, sigma, **extra_args)`` predicts the clean sample, ``sigma`` being ``[N]`` in the dtype of ``x``. The callback
is given ``x``, ``i``, ``sigma``, ``sigma_hat`` and ``denoised`` of every step, tensors. ``disable`` is tqdm's; without
tqdm there is no bar.

Every step below is one formula (Karras et al. 2022; Lu et al. 2022, DPM-Solver++, solved for the clean sample)::

    x_s = ratio x + (1 - ratio) D + std z

A first-order method has ``D = denoised`` and ``ratio = sigma_s / sigma_t``. Ancestral steps and SDEs go below
``sigma_s`` and come back by ``z``. A second-order method has ``D = (1 - w) denoised + w other``, the other evaluation
being between the levels (Heun: at ``sigma_s``) or that of the step before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import arguments, ops
from ..arguments import flag, function, got, integer, number, one_of, real, torch_device
from ..foreign import as_tensor
from ..memory import Memory
from ..ops._arguments import STATE_DTYPES

__all__ = [
    "BrownianTreeNoiseSampler",
    "PhiloxNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "to_d",
]

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], Any]
NoiseSampler = Callable[[Any, Any], Tensor]
Device = torch.device | str
Sigmas = Tensor | NDArray[np.floating[Any]]

_STREAM = 4  # of PhiloxNoiseSampler: other numbers than `ops.randn` of the same seed, from which a state may start


# --- the original -------------------------------------------------------------------------------------------


@functools.cache
def _original() -> ModuleType:
    """``k_diffusion.sampling`` as installed, also where this module stands in ``sys.modules`` for it."""
    name = "k_diffusion.sampling"
    if sys.modules.get(name) is not sys.modules[__name__]:
        return importlib.import_module(name)
    spec = importlib.machinery.PathFinder.find_spec(name, importlib.import_module("k_diffusion").__path__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        original = _original()
    except Exception as error:  # whatever the packages that k-diffusion imports raise
        raise AttributeError(
            f"{name}: not of {__name__!r}, and k-diffusion, which may have it, cannot be imported: {error}"
        ) from error
    return getattr(original, name)


def __dir__() -> list[str]:
    names = set(globals())
    with contextlib.suppress(Exception):  # not installed: the names of this module are all there are
        names.update(name for name in dir(_original()) if not name.startswith("_"))
    return sorted(names)


# --- levels -------------------------------------------------------------------------------------------------


def _count(n: Any) -> int:
    return integer("n", n, 0, 1 << 32)


def append_zero(x: Tensor) -> Tensor:
    """``[n]`` to ``[n + 1]``."""
    arguments.tensor("x", x)
    if x.ndim != 1:
        raise ValueError(f"x: expected shape [n], got {list(x.shape)}")
    return torch.nn.functional.pad(x, (0, 1))


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """``[n + 1]``, ``sigma ** (1 / rho)`` evenly spaced, then 0 (Karras et al. 2022, eq. 5)."""
    n, device = _count(n), torch_device("device", device)
    sigma_min, sigma_max = number("sigma_min", sigma_min, low=0.0), number("sigma_max", sigma_max, low=0.0)
    rho = number("rho", rho, above=0.0)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    roots = high + torch.linspace(0, 1, n, device="cpu") * (low - high)
    return append_zero(roots**rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """``[n + 1]``, ``log sigma`` evenly spaced, then 0."""
    n, device = _count(n), torch_device("device", device)
    sigma_min, sigma_max = number("sigma_min", sigma_min, above=0.0), number("sigma_max", sigma_max, above=0.0)
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """``[n + 1]``, ``log sigma`` a power ``rho`` of the time, then 0."""
    n, device, rho = _count(n), torch_device("device", device), number("rho", rho)
    low, high = math.log(number("sigma_min", sigma_min, above=0.0)), math.log(number("sigma_max", sigma_max, above=0.0))
    return append_zero((low + torch.linspace(1, 0, n, device=device) ** rho * (high - low)).exp())


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Device = "cpu"
) -> Tensor:
    """``[n + 1]``, those of the continuous variance-preserving process with linear betas, then 0."""
    n, device, eps_s = _count(n), torch_device("device", device), number("eps_s", eps_s)
    beta_d, beta_min = number("beta_d", beta_d), number("beta_min", beta_min)
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """``dx / dsigma`` of the probability-flow ODE; ``sigma`` is ``[]`` or ``[N]``."""
    return (x - denoised) / sigma.reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """``(sigma_down, sigma_up)``, whose squares add to that of ``sigma_to``: the level that a deterministic step goes
    to, and the noise then added; with ``eta = 1`` the variance of ``x_s`` given ``x_t`` and ``x_0``. Floats, or tensors
    ``[]``, which are waited for."""
    for name, value in (("sigma_from", sigma_from), ("sigma_to", sigma_to), ("eta", eta)):
        real(name, value)
    if not sigma_from > 0.0:
        raise ValueError(f"sigma_from: expected a number > 0, got {got(sigma_from)}")
    if not eta:
        return sigma_to, 0.0
    share = 1 - (sigma_to / sigma_from) ** 2
    sigma_up = min(sigma_to, eta * sigma_to * share**0.5) if share >= 0 else sigma_to  # upwards: noise alone
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


# --- noise --------------------------------------------------------------------------------------------------


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Standard normals of torch's generator, like ``x``."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BrownianTreeNoiseSampler:
    """Increments of one Brownian path in ``transform(sigma)``, scaled to unit variance: the same path whatever the
    number of steps. Needs torchsde.

    ``seed`` is an integer, or one for each sample of ``x``; None draws one from torch's generator on the host.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    ):
        try:
            import torchsde
        except ImportError as error:
            raise ImportError(
                "noise_sampler: the default, a BrownianTreeNoiseSampler, expects torchsde to be installed "
                "(pip install torchsde)"
            ) from error
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, [], device="cpu"))
        self._transform, self._batched = transform, isinstance(seed, Sized)
        seeds = [int(s) for s in seed] if self._batched else [seed]  # type: ignore[union-attr]
        if self._batched and len(seeds) != len(x):
            raise ValueError(f"seed: expected one, or {len(x)}, one for each sample, got {len(seeds)}")
        t0, t1, self._sign = self._interval(sigma_min, sigma_max)
        w0 = torch.zeros_like(x[0] if self._batched else x)
        self._trees = [torchsde.BrownianTree(t0, w0, t1, entropy=s) for s in seeds]

    def _interval(self, sigma: Any, sigma_next: Any) -> tuple[Tensor, Tensor, int]:
        t0, t1 = (self._transform(as_tensor(level)) for level in (sigma, sigma_next))
        return (t0, t1, 1) if t0 < t1 else (t1, t0, -1)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        t0, t1, sign = self._interval(sigma, sigma_next)
        if t0 == t1:
            raise ValueError(f"sigma_next: expected another level than sigma, got {float(sigma_next):g} for both")
        increments = [tree(t0, t1) for tree in self._trees]
        increment = torch.stack(increments) if self._batched else increments[0]
        return increment * (self._sign * sign / (t1 - t0).sqrt())


class PhiloxNoiseSampler:
    """Standard normals like ``x`` from `fastguide.ops.randn`, of ``seed``, the number of draws before and the sample's
    index ``first_particle + n``. A sample is therefore the same in whatever batch. A second run with the same object
    goes on counting, and so has other noise.

    ``seed``: an integer; None draws one from torch's generator. The attribute ``seed`` has it.

    The samplers of this module that take a ``noise_sampler`` draw it inside the kernel that steps, in one pass over
    memory; k-diffusion's call it as any other. Draws are independent of one another: where a sampler asks twice about
    one interval (`sample_dpmpp_sde`), a Brownian path is not.
    """

    def __init__(self, x: Tensor, seed: int | None = None, first_particle: int = 0):
        _check_state(x)
        self.seed = int(torch.randint(1 << 62, (), device="cpu")) if seed is None else integer("seed", seed, 0, 1 << 64)
        first_particle = integer("first_particle", first_particle, 0, 1 << 48)
        self._x, self._first_particle, self._draws, self._memory = x, first_particle, 0, Memory()

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        x = self._x
        return ops.randn(
            x.shape,
            seed=self.seed,
            step=self._next_draw(),
            stream=_STREAM,
            first_particle=self._first_particle,
            dtype=x.dtype,
            device=x.device,
        )

    def step(self, x: Tensor, denoised: Tensor, ratio: float, std: float) -> Tensor:
        """``ratio x + (1 - ratio) denoised + std z`` with the next ``z``."""
        x = x.to(torch.promote_types(x.dtype, denoised.dtype))
        x_s = ops.reverse_step(
            x,
            denoised,
            (1.0, 1.0, 1.0, math.hypot(ratio, std), std),
            prediction="sample",
            seed=self.seed,
            step=self._next_draw(),
            stream=_STREAM,
            first_particle=self._first_particle,
            out=self._memory.like(x, denoised),
        )
        assert isinstance(x_s, Tensor)  # without return_x0
        return x_s

    def _next_draw(self) -> int:
        self._draws += 1
        return self._draws - 1


# --- steps --------------------------------------------------------------------------------------------------


class _Run:
    """What every sampler does at each step: iterated over, ``(i, sigma_t, sigma_s)`` in floats."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Sigmas,
        extra_args: dict[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ):
        function("model", model, "a callable model(x, sigma, ...)")
        _check_state(x)
        if extra_args is not None and not isinstance(extra_args, Mapping):
            raise TypeError(f"extra_args: expected a dict or None, got {got(extra_args)}")
        if callback is not None:
            function("callback", callback, "a callable or None")
        if disable is not None:
            disable = flag("disable", disable)
        expected = "finite levels above 0, the last perhaps 0"
        if isinstance(sigmas, Tensor):
            arguments.tensor("sigmas", sigmas, expected)
            if not (sigmas.dtype in STATE_DTYPES or arguments.is_integer(sigmas)):
                raise TypeError(f"sigmas: expected {expected}, got {got(sigmas)}")
        else:
            arguments.real_array("sigmas", sigmas, expected)
            sigmas = np.array(sigmas)  # a copy: torch takes no negative strides
        if sigmas.ndim != 1:
            raise ValueError(f"sigmas: expected shape [steps + 1], got {list(sigmas.shape)}")
        sigmas = torch.as_tensor(sigmas, device=sigmas.device if isinstance(sigmas, Tensor) else x.device)
        try:
            self.host = _to_host(sigmas)
            self.levels: list[float] = self.host.tolist()
        except RuntimeError as error:  # a fake tensor, or one on the meta device, has no values
            raise ValueError(f"sigmas: expected {expected}, got {got(sigmas)}") from error
        finite = all(0.0 < level < math.inf for level in self.levels[:-1])
        if not (finite and all(0.0 <= level < math.inf for level in self.levels[-1:])):
            raise ValueError(f"sigmas: expected {expected}, got {self.levels}")
        self.model, self.x, self.sigmas = model, x, sigmas
        self.extra_args, self.callback, self.disable = extra_args or {}, callback, disable

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        steps: Any = range(len(self.levels) - 1)
        if not self.disable:
            try:
                from tqdm.auto import tqdm

                steps = tqdm(steps, disable=self.disable)
            except ImportError:
                pass  # a bar is all that is missing
        for i in steps:
            yield i, self.levels[i], self.levels[i + 1]

    @property
    def positive(self) -> list[float]:
        """The levels without a last 0."""
        return self.levels[:-1] if self.levels[-1:] == [0.0] else self.levels

    def expect_no_repeats(self, levels: list[float]) -> None:
        """Of the first ``levels``: a method that divides by the step between two of them."""
        for i, (sigma_t, sigma_s) in enumerate(pairwise(levels)):
            if sigma_t == sigma_s:
                raise ValueError(
                    f"sigmas: expected levels that differ from step to step for this sampler, got {sigma_t:g} at "
                    f"{i} and {i + 1}"
                )

    def expect_decreasing(self, eta: float) -> None:
        """The noise of an SDE upwards would have a negative variance."""
        for i, (sigma_t, sigma_s) in enumerate(pairwise(self.levels)):
            if sigma_s > sigma_t:
                raise ValueError(
                    f"sigmas: expected decreasing levels for this sampler with eta = {eta:g}, got {sigma_t:g} and "
                    f"{sigma_s:g} at {i} and {i + 1}"
                )

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        return self.model(x, self.x.new_full(x.shape[:1], sigma), **self.extra_args)

    def widened(self, x: Tensor) -> Tensor:
        """In the wider of its dtype and the sigmas', as k-diffusion's Euler steps leave it, its others not."""
        return x.to(torch.promote_types(x.dtype, self.sigmas.dtype))

    def toward(self, i: int, x: Tensor, denoised: Tensor, ratio: float, growth: float) -> tuple[Tensor, Tensor]:
        """``x``, and ``ratio x + (1 - ratio) denoised``, reported: the callback may change ``x``, and not where it was
        heading."""
        if self.callback is None:
            x = self.widened(x)
            return x, _mix(denoised, x, ratio)
        apart = denoised - x
        self.report(i, x, denoised, growth)
        x = self.widened(x)
        return x, torch.add(x, apart, alpha=1 - ratio)

    def report(self, i: int, x: Tensor, denoised: Tensor, growth: float = 1.0) -> None:
        if self.callback is not None:
            sigma = self.sigmas[i]
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma * growth, "denoised": denoised})


def _check_state(x: Any) -> None:
    arguments.tensor("x", x)
    if x.ndim == 0 or x.dtype not in STATE_DTYPES:
        raise ValueError(f"x: expected floating values [N, *event], got {got(x)}")


def _not_negative(name: str, value: Any) -> float:
    value = real(name, value)
    if value < 0.0:
        raise ValueError(f"{name}: expected a number >= 0, got {value:g}")
    return value


def _to_host(sigmas: Tensor) -> Tensor:
    """The only wait for the device."""
    return sigmas.detach().cpu()


class _Churn:
    """The noise by which an ODE sampler may go up before a step (Karras et al. 2022, algorithm 2)."""

    def __init__(self, run: _Run, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float):
        most = min(_not_negative("s_churn", s_churn) / max(len(run.levels) - 1, 1), 2**0.5 - 1)
        within = (real("s_tmin", s_tmin) <= run.host) & (run.host <= real("s_tmax", s_tmax))
        self.gammas = [most if inside else 0.0 for inside in within.tolist()]
        self.s_noise = real("s_noise", s_noise)

    def __call__(self, i: int, x: Tensor, sigma: float) -> tuple[Tensor, float, float]:
        """``x`` at its new level, that level, and by what factor it grew."""
        z = torch.randn_like(x)  # also where it goes unused, as k-diffusion does: what follows has its z
        gamma = self.gammas[i]
        if gamma > 0.0:
            x = torch.add(x, z, alpha=self.s_noise * sigma * ((gamma + 1) ** 2 - 1) ** 0.5)
        return x, sigma * (gamma + 1), gamma + 1


class _Noise:
    """The ``noise_sampler`` of a run, and the levels that it is asked about: the caller's own are given tensors where
    the sigmas are, those of this module tensors on the host, so that nobody waits for the device."""

    def __init__(self, run: _Run, sampler: NoiseSampler | None, s_noise: float, brownian: bool = False):
        ours = sampler is None or isinstance(sampler, BrownianTreeNoiseSampler)
        self.levels = run.host if ours else run.sigmas
        if sampler is None and brownian:
            positive = run.host[run.host > 0]
            sampler = BrownianTreeNoiseSampler(run.x, positive.min(), positive.max())
        if sampler is not None:
            function("noise_sampler", sampler, "a callable or None")
        self.sampler = default_noise_sampler(run.x) if sampler is None else sampler
        self.s_noise = real("s_noise", s_noise)
        self.brownian = isinstance(self.sampler, BrownianTreeNoiseSampler)

    def step(self, x: Tensor, denoised: Tensor, ratio: float, std: float, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``ratio x + (1 - ratio) denoised``, and noise for the interval between two levels."""
        std *= self.s_noise
        if isinstance(self.sampler, PhiloxNoiseSampler):
            return self.sampler.step(x, denoised, ratio, std)
        return torch.add(_mix(denoised, x, ratio), self.sampler(sigma, sigma_next), alpha=std)


def _mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``(1 - weight) a + weight b``; of two dtypes, as under autocast, in the wider."""
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return torch.lerp(a, b, weight)


# --- samplers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler steps of the probability-flow ODE, with churn (Karras et al. 2022, algorithm 2)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    churn = _Churn(run, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_s in run:
        x, sigma_t, growth = churn(i, x, sigma)
        _, x = run.toward(i, x, run.denoise(x, sigma_t), sigma_s / sigma_t, growth)
    return x


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun steps of the probability-flow ODE, with churn (Karras et al. 2022, algorithm 2)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    churn = _Churn(run, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_s in run:
        x, sigma_t, growth = churn(i, x, sigma)
        ratio = sigma_s / sigma_t
        x, x_s = run.toward(i, x, run.denoise(x, sigma_t), ratio, growth)
        x = _mix(x_s, _mix(run.denoise(x_s, sigma_s), x, ratio), 0.5 / ratio) if sigma_s > 0.0 else x_s
    return x


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Midpoint steps of the probability-flow ODE, the midpoint in ``log sigma``, with churn."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    churn = _Churn(run, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_s in run:
        x, sigma_t, growth = churn(i, x, sigma)
        middle = math.sqrt(sigma_s / sigma_t)
        x, x_m = run.toward(i, x, run.denoise(x, sigma_t), middle, growth)
        if sigma_s > 0.0:
            x = torch.add(x, _slope(run, x_m, sigma_t * middle), alpha=(1 - middle**2) / middle)
        else:
            x = x_m
    return x


def _slope(run: _Run, x_m: Tensor, sigma_m: float) -> Tensor:
    """``-sigma dx / dsigma`` at the geometric mean of a step's levels, where ``x_m`` is. What was denoised before is
    not read again: a model may have one output that it overwrites."""
    return run.denoise(x_m, sigma_m) - x_m


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler steps to below the next level, and noise back to it."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise), _not_negative("eta", eta)
    for i, sigma_t, sigma_s in run:
        denoised = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        x = run.widened(x)
        if sigma_s > 0.0:
            down, up = get_ancestral_step(sigma_t, sigma_s, eta)
            x = noise.step(x, denoised, down / sigma_t, up, noise.levels[i], noise.levels[i + 1])
        else:
            x = _mix(denoised, x, 0.0)
    return x


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Midpoint steps to below the next level, and noise back to it (none where that is down to 0)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise), _not_negative("eta", eta)
    for i, sigma_t, sigma_s in run:
        denoised = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        x = run.widened(x)
        down, up = get_ancestral_step(sigma_t, sigma_s, eta)
        if down > 0.0:
            middle = math.sqrt(down / sigma_t)
            denoised = torch.add(x, _slope(run, _mix(denoised, x, middle), sigma_t * middle), alpha=1 / middle)
            x = noise.step(x, denoised, down / sigma_t, up, noise.levels[i], noise.levels[i + 1])
        else:
            x = _mix(denoised, x, 0.0)
    return x


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2S), single-step and of second order, to below the next level, and noise back to it."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise), _not_negative("eta", eta)
    for i, sigma_t, sigma_s in run:
        denoised = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        down, up = get_ancestral_step(sigma_t, sigma_s, eta)
        ratio = down / sigma_t
        if ratio > 0.0:
            middle = math.sqrt(ratio)
            denoised = run.denoise(_mix(denoised, x, middle), sigma_t * middle)
        if sigma_s > 0.0:
            x = noise.step(x, denoised, ratio, up, noise.levels[i], noise.levels[i + 1])
        else:
            x = _mix(denoised, run.widened(x), ratio)
    return x


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """DPM-Solver++ for the diffusion SDE, single-step and of second order; ``r`` is where between the levels, in
    ``log sigma``, the second evaluation stands. ``noise_sampler``: by default a `BrownianTreeNoiseSampler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    eta, r = _not_negative("eta", eta), real("r", r)
    if not r > 0.0:
        raise ValueError(f"r: expected a number > 0, got {r:g}")
    noise = _Noise(run, noise_sampler, s_noise, brownian=True)
    if noise.brownian:
        run.expect_no_repeats(run.positive)
    for i, sigma_t, sigma_s in run:
        denoised = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        if sigma_s > 0.0:
            # A Brownian path is rough: a level that is asked about must be k-diffusion's to the last bit.
            t, t_s = (noise.levels[j].log().neg() for j in (i, i + 1))
            begin, middle, end = (time.neg().exp() for time in (t, t + (t_s - t) * r, t_s))
            sigma_r = sigma_t * (sigma_s / sigma_t) ** r
            down, up = get_ancestral_step(sigma_t, sigma_r, eta)
            x_r = noise.step(x, denoised, down / sigma_t, up, begin, middle)
            denoised = _mix(denoised, run.denoise(x_r, sigma_r), 1 / (2 * r))
            down, up = get_ancestral_step(sigma_t, sigma_s, eta)
            x = noise.step(x, denoised, down / sigma_t, up, begin, end)
        else:
            x = _mix(denoised, run.widened(x), 0.0)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M), multi-step and of second order: one evaluation for each step."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    run.expect_no_repeats(run.positive[:-1])
    before, h_before = None, 0.0
    for i, sigma_t, sigma_s in run:
        denoised = mixed = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        if sigma_s > 0.0:
            h = math.log(sigma_t / sigma_s)
            if before is not None:
                mixed = _mix(denoised, before, -h / (2 * h_before))
            h_before = h
        x = _mix(mixed, x, sigma_s / sigma_t)
        before = denoised
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the diffusion SDE, multi-step; ``solver_type`` is ``"midpoint"`` or ``"heun"``.
    ``noise_sampler``: by default a `BrownianTreeNoiseSampler`."""
    one_of("solver_type", solver_type, ("heun", "midpoint"))
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise, brownian=True), _not_negative("eta", eta)
    run.expect_no_repeats(run.positive if eta and noise.brownian else run.positive[:-1])
    if eta:
        run.expect_decreasing(eta)
    before, h_before = None, 0.0
    for i, sigma_t, sigma_s in run:
        denoised = mixed = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        if sigma_s > 0.0:
            h = math.log(sigma_t / sigma_s)
            decay = (1 + eta) * h  # of x, for the drift of the SDE is (1 + eta) times that of the ODE
            if before is not None:
                w = 0.5 if solver_type == "midpoint" else -1 / math.expm1(-decay) - 1 / decay
                mixed = _mix(denoised, before, -w * h / h_before)
            h_before = h
            if eta:
                std = sigma_s * math.sqrt(-math.expm1(-2 * eta * h))
                x = noise.step(x, mixed, math.exp(-decay), std, noise.levels[i], noise.levels[i + 1])
            else:
                x = _mix(mixed, x, math.exp(-decay))
        else:
            x = denoised
        before = denoised
    return x


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(3M) for the diffusion SDE, multi-step and of third order; the first two steps are of lower order.
    ``noise_sampler``: by default a `BrownianTreeNoiseSampler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise, brownian=True), _not_negative("eta", eta)
    run.expect_no_repeats(run.positive)
    run.expect_decreasing(eta)  # what it extrapolates from spans two steps
    before: list[tuple[Tensor, float]] = []  # of the last two steps, the latest first: denoised, and h
    for i, sigma_t, sigma_s in run:
        denoised = mixed = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        if sigma_s > 0.0:
            h = math.log(sigma_t / sigma_s)
            decay = (1 + eta) * h
            drop = -math.expm1(-decay)
            phi_2 = 1 - drop / decay  # times what the clean sample changes by over a step, and its curvature
            if len(before) == 1:
                (denoised_1, h_1) = before[0]
                mixed = _mix(denoised, denoised_1, -phi_2 / drop * h / h_1)
            elif before:
                (denoised_1, h_1), (denoised_2, h_2) = before
                phi_3 = phi_2 / decay - 0.5
                curved = (phi_2 * h_1 - phi_3 * h) / (h_1 + h_2)
                to_1, to_2 = (phi_2 + curved) * h / h_1 / drop, curved * h / h_2 / drop
                # mixed = (1 + to_1) denoised - (to_1 + to_2) denoised_1 + to_2 denoised_2
                mixed = _mix(denoised, _mix(denoised_1, denoised_2, -to_2 / to_1), -to_1)
            if eta:
                std = sigma_s * math.sqrt(-math.expm1(-2 * eta * h))
                x = noise.step(x, mixed, math.exp(-decay), std, noise.levels[i], noise.levels[i + 1])
            else:
                x = _mix(mixed, x, math.exp(-decay))
            before = [(denoised, h), *before[:1]]
        else:
            x = denoised
    return x
