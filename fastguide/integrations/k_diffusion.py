"""The samplers of ``k_diffusion.sampling`` (0.1.1), from a loop that never waits for the device.

    from fastguide.integrations import k_diffusion as K         # was: import k_diffusion.sampling as K

Signatures, defaults and callbacks are those of k-diffusion. The same torch seed gives the same results, to rounding.
For this, noise is drawn in the same order, and also where it is not used. Two things differ:

- The sigmas are copied to the host once, before the first step. Steps then compute with floats. Sigmas must be above 0,
  except the last. A rising or repeated sigma that makes the result of k-diffusion NaN is an error before the first
  step.
- `PhiloxNoiseSampler`, passed as ``noise_sampler``, draws the noise inside the kernel that takes the step.

Names of ``k_diffusion.sampling`` that this module does not define (``sample_lms``, ``sample_dpm_fast``,
``log_likelihood``, ...) come from the installed k-diffusion. This module can therefore replace that one, also as
``sys.modules["k_diffusion.sampling"]``.

Every step is one formula, written for the predicted clean sample ``D``:

    x_s = ratio x + (1 - ratio) D + std z

A first-order method has ``D = denoised`` and ``ratio = sigma_s / sigma_t``. Ancestral and SDE steps go below
``sigma_s``, and the noise ``z`` brings the state back up to it. A second-order method has
``D = (1 - w) denoised + w other``, where ``other`` is an evaluation between the sigmas (Heun: at ``sigma_s``) or the
evaluation of the step before.

Source:
    Karras et al. 2022; Lu et al. 2022 (DPM-Solver++, solved for the clean sample).
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

_STREAM = 4  # PhiloxNoiseSampler's own stream: a start drawn by `ops.randn` with the same seed has other numbers


# --- the original -------------------------------------------------------------------------------------------


@functools.cache
def _original() -> ModuleType:
    """``k_diffusion.sampling`` as installed, even if ``sys.modules`` has this module in its place."""
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
    except Exception as error:  # any error of the packages that k-diffusion imports
        raise AttributeError(
            f"{name}: not defined in {__name__!r}, and k-diffusion, which may define it, cannot be imported: {error}"
        ) from error
    return getattr(original, name)


def __dir__() -> list[str]:
    names = set(globals())
    with contextlib.suppress(Exception):  # k-diffusion is not installed: only this module's names exist
        names.update(name for name in dir(_original()) if not name.startswith("_"))
    return sorted(names)


# --- sigmas -------------------------------------------------------------------------------------------------


def _count(n: Any) -> int:
    return integer("n", n, 0, 1 << 32)


def append_zero(x: Tensor) -> Tensor:
    """Appends a 0 to a row of sigmas.

    Args:
        x: ``[n]``.

    Returns:
        ``[n + 1]``.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: ``x`` is not a row.
    """
    arguments.tensor("x", x)
    if x.ndim != 1:
        raise ValueError(f"x: expected shape [n], got {list(x.shape)}")
    return torch.nn.functional.pad(x, (0, 1))


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """``n`` decreasing sigmas, evenly spaced in ``sigma ** (1 / rho)``, then 0.

    Args:
        n: An integer >= 0.
        sigma_min: The lowest sigma before 0, a number >= 0.
        sigma_max: The highest sigma, a number >= 0.
        rho: A number > 0. The larger it is, the more sigmas are low.
        device: Where the result is.

    Returns:
        ``[n + 1]``, the last 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.

    Source:
        Karras et al. 2022, eq. 5.
    """
    n, device = _count(n), torch_device("device", device)
    sigma_min, sigma_max = number("sigma_min", sigma_min, low=0.0), number("sigma_max", sigma_max, low=0.0)
    rho = number("rho", rho, above=0.0)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    roots = high + torch.linspace(0, 1, n, device="cpu") * (low - high)
    return append_zero(roots**rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """``n`` decreasing sigmas, evenly spaced in ``log sigma``, then 0.

    Args:
        n: An integer >= 0.
        sigma_min: The lowest sigma before 0, a number > 0.
        sigma_max: The highest sigma, a number > 0.
        device: Where the result is.

    Returns:
        ``[n + 1]``, the last 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """
    n, device = _count(n), torch_device("device", device)
    sigma_min, sigma_max = number("sigma_min", sigma_min, above=0.0), number("sigma_max", sigma_max, above=0.0)
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """``n`` decreasing sigmas whose ``log sigma`` is a power ``rho`` of the time, then 0.

    Args:
        n: An integer >= 0.
        sigma_min: The lowest sigma before 0, a number > 0.
        sigma_max: The highest sigma, a number > 0.
        rho: A number. 1 is `get_sigmas_exponential`.
        device: Where the result is.

    Returns:
        ``[n + 1]``, the last 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """
    n, device, rho = _count(n), torch_device("device", device), number("rho", rho)
    low, high = math.log(number("sigma_min", sigma_min, above=0.0)), math.log(number("sigma_max", sigma_max, above=0.0))
    return append_zero((low + torch.linspace(1, 0, n, device=device) ** rho * (high - low)).exp())


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Device = "cpu"
) -> Tensor:
    """``n`` decreasing sigmas of the continuous variance-preserving process with linear betas, then 0.

    Args:
        n: An integer >= 0.
        beta_d: The rise of beta over the time from 0 to 1.
        beta_min: Beta at time 0.
        eps_s: The time of the last sigma before 0. The first is at time 1.
        device: Where the result is.

    Returns:
        ``[n + 1]``, the last 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """
    n, device, eps_s = _count(n), torch_device("device", device), number("eps_s", eps_s)
    beta_d, beta_min = number("beta_d", beta_d), number("beta_min", beta_min)
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope ``dx / dsigma = (x - denoised) / sigma`` of the probability-flow ODE.

    Args:
        x: ``[N, *event]``.
        sigma: ``[]`` or ``[N]``.
        denoised: The predicted clean sample, ``[N, *event]``.

    Returns:
        ``[N, *event]``.
    """
    return (x - denoised) / sigma.reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """Splits ``sigma_to`` into the sigma of a deterministic step and noise to add.

        sigma_up^2 = eta^2 sigma_to^2 (1 - sigma_to^2 / sigma_from^2)        at most sigma_to^2
        sigma_to^2 = sigma_down^2 + sigma_up^2

    With ``eta = 1``, ``sigma_up^2`` is the variance of ``x_s`` given ``x_t`` and ``x_0``. If ``sigma_to`` is above
    ``sigma_from``, ``sigma_up`` is ``sigma_to``.

    Args:
        sigma_from: The sigma of the state, a number > 0 or a tensor ``[]``. A tensor on a GPU is waited for.
        sigma_to: The one to go to, a number or a tensor ``[]``.
        eta: The amount of noise; 0 adds none.

    Returns:
        sigma_down: The sigma that a deterministic step goes to.
        sigma_up: The standard deviation of the noise then added.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is NaN, or ``sigma_from`` is not above 0.
    """
    for name, value in (("sigma_from", sigma_from), ("sigma_to", sigma_to), ("eta", eta)):
        real(name, value)
    if not sigma_from > 0.0:
        raise ValueError(f"sigma_from: expected a number > 0, got {got(sigma_from)}")
    if not eta:
        return sigma_to, 0.0
    share = 1 - (sigma_to / sigma_from) ** 2
    sigma_up = min(sigma_to, eta * sigma_to * share**0.5) if share >= 0 else sigma_to  # a rising sigma: noise alone
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


# --- noise --------------------------------------------------------------------------------------------------


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Noise from torch's generator.

    Args:
        x: The state, ``[N, *event]``.

    Returns:
        A function of two sigmas that returns standard normals like ``x``, whatever the sigmas are.
    """
    return lambda sigma, sigma_next: torch.randn_like(x)


class BrownianTreeNoiseSampler:
    """Noise that is the increments of one Brownian path, scaled to unit variance. Needs torchsde.

    The time of the path is ``transform(sigma)``. A run with another number of steps has the same path.

    Args:
        x: The state, ``[N, *event]``.
        sigma_min: The lowest sigma that is asked for, a number or a tensor ``[]``.
        sigma_max: The highest sigma that is asked for.
        seed: An integer, or one for each sample of ``x``. None draws one from torch's generator on the host.
        transform: A monotonic function of a tensor ``[]``.

    Raises:
        ImportError: torchsde is not installed.
        ValueError: The number of seeds is not that of the samples.
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
        t0, t1 = (self._transform(as_tensor(sigma)) for sigma in (sigma, sigma_next))
        return (t0, t1, 1) if t0 < t1 else (t1, t0, -1)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """The increment between two sigmas over the square root of its length, like ``x``.

        Args:
            sigma: A number or a tensor ``[]``.
            sigma_next: Another one.

        Returns:
            Standard normals ``[N, *event]``.

        Raises:
            ValueError: The sigmas are equal.
        """
        t0, t1, sign = self._interval(sigma, sigma_next)
        if t0 == t1:
            raise ValueError(f"sigma_next: expected a number other than sigma, got {float(sigma_next):g} for both")
        increments = [tree(t0, t1) for tree in self._trees]
        increment = torch.stack(increments) if self._batched else increments[0]
        return increment * (self._sign * sign / (t1 - t0).sqrt())


class PhiloxNoiseSampler:
    """Noise from `fastguide.ops.randn`: a sample gets the same noise in any batch.

    The noise depends on the seed, the number of earlier draws, and the sample's index ``first_particle + n``. A second
    run with the same object continues the count, and so gets other noise.

    The samplers of this module draw it inside the kernel that takes the step, in one pass over memory. Those of
    k-diffusion call it like any noise sampler. Draws are independent: if a sampler asks twice about one interval
    (`sample_dpmpp_sde`), they are not increments of one Brownian path.

    Args:
        x: The state, ``[N, *event]``, floating.
        seed: An integer in ``[0, 2^64)``. None draws one from torch's generator.
        first_particle: The global index of the first sample, an integer in ``[0, 2^48)``.

    Attributes:
        seed (int): The seed.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: ``x`` is not floating, or an integer is out of range.
    """

    def __init__(self, x: Tensor, seed: int | None = None, first_particle: int = 0):
        _check_state(x)
        self.seed = int(torch.randint(1 << 62, (), device="cpu")) if seed is None else integer("seed", seed, 0, 1 << 64)
        first_particle = integer("first_particle", first_particle, 0, 1 << 48)
        self._x, self._first_particle, self._draws, self._memory = x, first_particle, 0, Memory(short_run=True)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """The next noise. The sigmas do not matter.

        Args:
            sigma: Not used.
            sigma_next: Not used.

        Returns:
            Standard normals ``[N, *event]`` in the dtype of ``x``.
        """
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
        """``ratio x + (1 - ratio) denoised + std z`` with the next noise ``z``, in one pass.

        Args:
            x: The state, ``[N, *event]``.
            denoised: The predicted clean sample, ``[N, *event]``.
            ratio: A number.
            std: A number >= 0.

        Returns:
            The new state, in the wider of the dtypes of ``x`` and ``denoised``.
        """
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
    """What every sampler does at each step. Iterating yields ``(i, sigma_t, sigma_s)``, these as floats."""

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
        expected = "finite numbers above 0, the last perhaps 0"
        if isinstance(sigmas, Tensor):
            arguments.tensor("sigmas", sigmas, expected)
            if not (sigmas.dtype in STATE_DTYPES or arguments.is_integer(sigmas)):
                raise TypeError(f"sigmas: expected {expected}, got {got(sigmas)}")
        else:
            arguments.real_array("sigmas", sigmas, expected)
            sigmas = np.array(sigmas)  # a copy, since torch takes no negative strides
        if sigmas.ndim != 1:
            raise ValueError(f"sigmas: expected shape [steps + 1], got {list(sigmas.shape)}")
        sigmas = torch.as_tensor(sigmas, device=sigmas.device if isinstance(sigmas, Tensor) else x.device)
        try:
            self.host = _to_host(sigmas)
            self.sigmas: list[float] = self.host.tolist()
        except RuntimeError as error:  # a fake tensor, or one on the meta device, has no values
            raise ValueError(f"sigmas: expected {expected}, got {got(sigmas)}") from error
        finite = all(0.0 < sigma < math.inf for sigma in self.sigmas[:-1])
        if not (finite and all(0.0 <= sigma < math.inf for sigma in self.sigmas[-1:])):
            raise ValueError(f"sigmas: expected {expected}, got {self.sigmas}")
        self.model, self.x, self.given = model, x, sigmas
        self.extra_args, self.callback, self.disable = extra_args or {}, callback, disable

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        steps: Any = range(len(self.sigmas) - 1)
        if not self.disable:
            try:
                from tqdm.auto import tqdm

                steps = tqdm(steps, disable=self.disable)
            except ImportError:
                pass  # only the bar is missing
        for i in steps:
            yield i, self.sigmas[i], self.sigmas[i + 1]

    @property
    def positive(self) -> list[float]:
        """The sigmas without a final 0."""
        return self.sigmas[:-1] if self.sigmas[-1:] == [0.0] else self.sigmas

    def expect_no_repeats(self, sigmas: list[float]) -> None:
        """Raise if two sigmas in a row are equal: the method divides by the step between them."""
        for i, (sigma_t, sigma_s) in enumerate(pairwise(sigmas)):
            if sigma_t == sigma_s:
                raise ValueError(
                    f"sigmas: expected values that differ from step to step for this sampler, got {sigma_t:g} at "
                    f"{i} and {i + 1}"
                )

    def expect_decreasing(self, eta: float) -> None:
        """Raise if a sigma rises: the noise of the SDE would have a negative variance."""
        for i, (sigma_t, sigma_s) in enumerate(pairwise(self.sigmas)):
            if sigma_s > sigma_t:
                raise ValueError(
                    f"sigmas: expected decreasing values for this sampler with eta = {eta:g}, got {sigma_t:g} and "
                    f"{sigma_s:g} at {i} and {i + 1}"
                )

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        return self.model(x, self.x.new_full(x.shape[:1], sigma), **self.extra_args)

    def widened(self, x: Tensor) -> Tensor:
        """``x`` in the wider of its dtype and that of the sigmas. The Euler steps of k-diffusion widen like this; its
        other steps do not.
        """
        return x.to(torch.promote_types(x.dtype, self.given.dtype))

    def toward(self, i: int, x: Tensor, denoised: Tensor, ratio: float, growth: float) -> tuple[Tensor, Tensor]:
        """``x`` and the next state ``ratio x + (1 - ratio) denoised``, after the callback was called.

        If the callback changes ``x``, the next state stays as it was.
        """
        if self.callback is None:
            x = self.widened(x)
            return x, _mix(denoised, x, ratio)
        apart = denoised - x
        self.report(i, x, denoised, growth)
        x = self.widened(x)
        return x, torch.add(x, apart, alpha=1 - ratio)

    def report(self, i: int, x: Tensor, denoised: Tensor, growth: float = 1.0) -> None:
        if self.callback is not None:
            sigma = self.given[i]
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
    """The sigmas on the host. This is the only wait for the device."""
    return sigmas.detach().cpu()


class _Churn:
    """The noise that an ODE sampler may add before a step (Karras et al. 2022, algorithm 2)."""

    def __init__(self, run: _Run, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float):
        most = min(_not_negative("s_churn", s_churn) / max(len(run.sigmas) - 1, 1), 2**0.5 - 1)
        within = (real("s_tmin", s_tmin) <= run.host) & (run.host <= real("s_tmax", s_tmax))
        self.gammas = [most if inside else 0.0 for inside in within.tolist()]
        self.s_noise = real("s_noise", s_noise)

    def __call__(self, i: int, x: Tensor, sigma: float) -> tuple[Tensor, float, float]:
        """``x`` with the noise, its sigma then, and the factor by which that grew."""
        z = torch.randn_like(x)  # drawn even if unused, as in k-diffusion, so that later draws agree
        gamma = self.gammas[i]
        if gamma > 0.0:
            x = torch.add(x, z, alpha=self.s_noise * sigma * ((gamma + 1) ** 2 - 1) ** 0.5)
        return x, sigma * (gamma + 1), gamma + 1


class _Noise:
    """The ``noise_sampler`` of a run, and the sigmas that it is given.

    The caller's own sampler gets tensors on the device of the sigmas. Those of this module get tensors on the host, so
    that nothing waits for the device.
    """

    def __init__(self, run: _Run, sampler: NoiseSampler | None, s_noise: float, brownian: bool = False):
        ours = sampler is None or isinstance(sampler, BrownianTreeNoiseSampler)
        self.sigmas = run.host if ours else run.given
        if sampler is None and brownian:
            positive = run.host[run.host > 0]
            sampler = BrownianTreeNoiseSampler(run.x, positive.min(), positive.max())
        if sampler is not None:
            function("noise_sampler", sampler, "a callable or None")
        self.sampler = default_noise_sampler(run.x) if sampler is None else sampler
        self.s_noise = real("s_noise", s_noise)
        self.brownian = isinstance(self.sampler, BrownianTreeNoiseSampler)

    def step(self, x: Tensor, denoised: Tensor, ratio: float, std: float, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``ratio x + (1 - ratio) denoised + std z``, with the noise of the interval between two sigmas."""
        std *= self.s_noise
        if isinstance(self.sampler, PhiloxNoiseSampler):
            return self.sampler.step(x, denoised, ratio, std)
        return torch.add(_mix(denoised, x, ratio), self.sampler(sigma, sigma_next), alpha=std)


def _mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``(1 - weight) a + weight b``, in the wider dtype if they differ, as under autocast."""
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
    """Euler steps of the probability-flow ODE, with churn.

    The options are numbers, or tensors ``[]`` that are read before the first step.

    Args:
        model: ``model(x, sigma, **extra_args)`` predicts the clean sample. ``sigma`` is ``[N]`` in the dtype of ``x``.
        x: The state at ``sigmas[0]``, ``[N, *event]``: float32, float16, bfloat16 or float64.
        sigmas: ``[steps + 1]``, a tensor or a numpy array, decreasing, finite and above 0. The last may be
            0.
        extra_args: Keyword arguments of the model, or None.
        callback: Called at each step with a dict of the tensors ``x``, ``sigma``, ``sigma_hat`` and ``denoised`` and
            the index ``i``.
        disable: As in tqdm: True hides the progress bar, and None hides it where the output is not a terminal. There is
            none without tqdm.
        s_churn: How much noise to add in total, a number >= 0. A step raises its sigma by the factor
            ``1 + min(s_churn / steps, sqrt(2) - 1)``.
        s_tmin: The lowest sigma with churn, a number.
        s_tmax: The highest sigma with churn, a number.
        s_noise: A factor of the noise that churn adds, a number.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: ``model`` or ``callback`` is not callable, or an argument is not a tensor or number where one is
            expected.
        ValueError: The sigmas, the state or an option is out of range.

    Source:
        Karras et al. 2022, algorithm 2.
    """
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
    """Heun steps of the probability-flow ODE, with churn. Two evaluations for each step; one if it ends at 0.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        s_churn: As in `sample_euler`.
        s_tmin: As in `sample_euler`.
        s_tmax: As in `sample_euler`.
        s_noise: As in `sample_euler`.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.

    Source:
        Karras et al. 2022, algorithm 2.
    """
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
    """Midpoint steps of the probability-flow ODE, with churn. The midpoint is halfway in ``log sigma``.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        s_churn: As in `sample_euler`.
        s_tmin: As in `sample_euler`.
        s_tmax: As in `sample_euler`.
        s_noise: As in `sample_euler`.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
    """``-sigma dx / dsigma`` at the midpoint ``x_m`` of a step, whose sigma is the geometric mean of the step's two.

    No earlier output of the model is read: a model may overwrite its one output.
    """
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
    """Euler steps to below the next sigma, then noise up to it.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: A number >= 0, the amount of noise, as in `get_ancestral_step`; 0 adds none.
        s_noise: A factor of the noise, a number.
        noise_sampler: ``noise_sampler(sigma, sigma_next)`` returns standard normals like ``x``; None draws from torch's
            generator. The sigmas are tensors ``[]``: on the device of ``sigmas`` for your own function, on the host for
            the noise samplers of this module.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise), _not_negative("eta", eta)
    for i, sigma_t, sigma_s in run:
        denoised = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        x = run.widened(x)
        if sigma_s > 0.0:
            down, up = get_ancestral_step(sigma_t, sigma_s, eta)
            x = noise.step(x, denoised, down / sigma_t, up, noise.sigmas[i], noise.sigmas[i + 1])
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
    """Midpoint steps to below the next sigma, then noise up to it. No noise follows a step down to 0.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: As in `sample_euler_ancestral`.
        s_noise: As in `sample_euler_ancestral`.
        noise_sampler: As in `sample_euler_ancestral`.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
            x = noise.step(x, denoised, down / sigma_t, up, noise.sigmas[i], noise.sigmas[i + 1])
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
    """DPM-Solver++(2S) steps to below the next sigma, then noise up to it. Single-step, second order.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: As in `sample_euler_ancestral`.
        s_noise: As in `sample_euler_ancestral`.
        noise_sampler: As in `sample_euler_ancestral`.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
            x = noise.step(x, denoised, ratio, up, noise.sigmas[i], noise.sigmas[i + 1])
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
    """DPM-Solver++ for the diffusion SDE. Single-step, second order.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`; no two sigmas in a row may be equal with a `BrownianTreeNoiseSampler`.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: A number >= 0, the amount of noise; 0 solves the probability-flow ODE instead.
        s_noise: A factor of the noise, a number.
        noise_sampler: As in `sample_euler_ancestral`; None is a `BrownianTreeNoiseSampler`, which needs torchsde.
        r: Where between the sigmas the second evaluation is, in ``log sigma``: a number > 0.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        ImportError: ``noise_sampler`` is None and torchsde is not installed.
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
            # A Brownian path is rough, so the sigmas asked for must equal those of k-diffusion to the last bit.
            t, t_s = (noise.sigmas[j].log().neg() for j in (i, i + 1))
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
    """DPM-Solver++(2M). Multi-step, second order: one evaluation for each step.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`; no two sigmas in a row may be equal.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
    """DPM-Solver++(2M) for the diffusion SDE. Multi-step, second order.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`; no two sigmas in a row may be equal, and none may rise unless ``eta`` is 0.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: A number >= 0, the amount of noise; 0 solves the probability-flow ODE instead.
        s_noise: A factor of the noise, a number.
        noise_sampler: As in `sample_euler_ancestral`; None is a `BrownianTreeNoiseSampler`, which needs torchsde.
        solver_type: ``"midpoint"`` or ``"heun"``.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        ImportError: ``noise_sampler`` is None and torchsde is not installed.
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
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
            decay = (1 + eta) * h  # x decays by this: the SDE's drift is (1 + eta) times the ODE's
            if before is not None:
                w = 0.5 if solver_type == "midpoint" else -1 / math.expm1(-decay) - 1 / decay
                mixed = _mix(denoised, before, -w * h / h_before)
            h_before = h
            if eta:
                std = sigma_s * math.sqrt(-math.expm1(-2 * eta * h))
                x = noise.step(x, mixed, math.exp(-decay), std, noise.sigmas[i], noise.sigmas[i + 1])
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
    """DPM-Solver++(3M) for the diffusion SDE. Multi-step, third order. The first two steps are of lower order.

    Args:
        model: As in `sample_euler`.
        x: As in `sample_euler`.
        sigmas: As in `sample_euler`; no two sigmas in a row may be equal, and none may rise.
        extra_args: As in `sample_euler`.
        callback: As in `sample_euler`.
        disable: As in `sample_euler`.
        eta: A number >= 0, the amount of noise; 0 solves the probability-flow ODE instead.
        s_noise: A factor of the noise, a number.
        noise_sampler: As in `sample_euler_ancestral`; None is a `BrownianTreeNoiseSampler`, which needs torchsde.

    Returns:
        The state at the last sigma, ``[N, *event]``.

    Raises:
        ImportError: ``noise_sampler`` is None and torchsde is not installed.
        TypeError: As in `sample_euler`.
        ValueError: As in `sample_euler`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise, eta = _Noise(run, noise_sampler, s_noise, brownian=True), _not_negative("eta", eta)
    run.expect_no_repeats(run.positive)
    run.expect_decreasing(eta)  # the extrapolation spans two steps
    before: list[tuple[Tensor, float]] = []  # denoised and h of the last two steps, the latest first
    for i, sigma_t, sigma_s in run:
        denoised = mixed = run.denoise(x, sigma_t)
        run.report(i, x, denoised)
        if sigma_s > 0.0:
            h = math.log(sigma_t / sigma_s)
            decay = (1 + eta) * h
            drop = -math.expm1(-decay)
            phi_2 = 1 - drop / decay  # multiplies the clean sample's change over a step, and its curvature
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
                x = noise.step(x, mixed, math.exp(-decay), std, noise.sigmas[i], noise.sigmas[i + 1])
            else:
                x = _mix(mixed, x, math.exp(-decay))
            before = [(denoised, h), *before[:1]]
        else:
            x = denoised
    return x
