"""Noise schedules: tables of ``(alpha, sigma)`` with ``x_t = alpha_t x_0 + sigma_t eps``.

Each schedule has its own time ``t``. A network is called with this time:

=========================  =========================  ==============================================
schedule                   ``t``                      ``alpha, sigma``
=========================  =========================  ==============================================
VP tables                  step index, ``0..n-1``     ``sqrt(abar_t), sqrt(1 - abar_t)``; -1 is clean
`ve`, `edm`                the noise level itself     ``1, t``; 0 is clean
`flow`                     ``[0, 1]``                 ``1 - t, t``; 0 is clean
=========================  =========================  ==============================================

`vp_linear`, `vp_scaled_linear`, `vp_cosine` and `from_alphas_cumprod` make VP (variance-preserving) tables.

Everything here is float64 on the host. A sampling loop reads only the floats of `Schedule.levels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import arguments
from .arguments import as_float, got, integer, number, one_of, real_array

__all__ = [
    "Level",
    "Schedule",
    "edm",
    "flow",
    "from_alphas_cumprod",
    "ve",
    "vp_cosine",
    "vp_linear",
    "vp_scaled_linear",
]

SPACINGS = ("uniform", "karras", "logsnr")
_KARRAS_RHO = 7.0
_MOST_LEVELS = 1 << 32  # a step's index has 32 bits in the noise's counter


Schedulable = float | Sequence[float] | np.ndarray | Tensor | Callable[[float], float]


class Level(NamedTuple):
    """One noise level, ``x_t = alpha x_0 + sigma eps``.

    Attributes:
        t: The schedule's own time; an int for a table.
        alpha: Scale of the signal, in ``[0, 1]``.
        sigma: Standard deviation of the noise, ``>= 0``.
    """

    t: float
    alpha: float
    sigma: float


class Schedule:
    """A family of noise levels.

    The functions of this module make one: `vp_linear`, `vp_scaled_linear`, `vp_cosine`, `from_alphas_cumprod`, `ve`,
    `edm` and `flow`.

    Attributes:
        discrete: True for a table. Its times are indices, and networks are called with int64.
        clean: The time with ``alpha = 1`` and ``sigma = 0``.
        t_max: The time of the noisiest level.
        t_min: The lowest time that a network is called with; for `flow` it is the clean time, which is not reached.
        default_spacing: The spacing that `levels` takes for None.
    """

    discrete: bool = False  # times are indices of a table, and networks are given int64
    clean: float = 0.0  # the time with alpha = 1 and sigma = 0
    t_max: float
    t_min: float  # the lowest time that a network is called with
    default_spacing: str

    def _alpha_sigma(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """Times with the given ``sigma / alpha``."""
        raise NotImplementedError

    def alpha(self, t: Any) -> Any:
        """Scale of the signal at the times ``t``.

        Args:
            t: A number, or times of any shape. A table takes integers only.

        Returns:
            A float for a number. For an array or a tensor, float64 of the same kind, shape and device.

        Raises:
            TypeError: ``t`` is not made of real numbers.
            ValueError: A time is outside the schedule.
        """
        return self._evaluate(t, 0)

    def sigma(self, t: Any) -> Any:
        """Standard deviation of the noise at the times ``t``.

        Args:
            t: As for `alpha`.

        Returns:
            As for `alpha`.

        Raises:
            TypeError: ``t`` is not made of real numbers.
            ValueError: A time is outside the schedule.
        """
        return self._evaluate(t, 1)

    def _evaluate(self, t: Any, which: int) -> Any:
        times = real_array("t", t, "times")
        lowest = min(self.clean, self.t_min)
        if not (np.all(times >= lowest) and np.all(times <= self.t_max)):
            raise ValueError(f"t: expected times in [{lowest:g}, {self.t_max:g}] of {self}, got {got(t)}")
        value = self._alpha_sigma(times)[which]
        if isinstance(t, Tensor):
            return torch.as_tensor(value, dtype=torch.float64, device=t.device)
        return float(value) if value.ndim == 0 else value

    def level(self, t: float) -> Level:
        """The level at one time.

        Args:
            t: A time of the schedule. A table takes an index, or -1 for the clean level.

        Returns:
            The `Level`.

        Raises:
            TypeError: ``t`` is not a number.
            ValueError: ``t`` is not a time of the schedule.
        """
        t = number("t", t)
        alpha, sigma = self.alpha(t), self.sigma(t)  # raise for a time outside the schedule
        return Level(int(t) if self.discrete else t, alpha, sigma)

    def levels(
        self, steps: int | Sequence[float] | np.ndarray | Tensor, spacing: str | None = None
    ) -> tuple[Level, ...]:
        """The levels that a sampler visits, from the noisiest to the clean one.

        Args:
            steps: The number of steps, at least 1 and, for a table, at most its size. Or the times themselves, strictly
                decreasing; the clean time is added where it is missing.
            spacing: How the levels are spread. ``"uniform"`` spreads the schedule's own time evenly, ``"karras"``
                spreads ``(sigma / alpha)^(1/7)``, and ``"logsnr"`` spreads ``log(alpha / sigma)``. A table takes its
                nearest distinct entries. None is ``"uniform"`` for tables and `flow`, ``"logsnr"`` for `ve`,
                ``"karras"`` for `edm`. It must be None where ``steps`` lists the times.

        Returns:
            ``steps + 1`` levels. The last one is clean.

        Raises:
            TypeError: The times are not real numbers.
            ValueError: ``steps`` or ``spacing`` is outside the ranges above, or a time is outside the schedule.

        Source:
            Karras et al. 2022, equation 5 (``"karras"``).
        """
        if spacing is not None and not isinstance(spacing, str):
            one_of("spacing", spacing, SPACINGS)
        table = isinstance(steps, Sequence | np.ndarray | Tensor) and not isinstance(steps, str | bytes)
        if table and getattr(steps, "ndim", 1) > 0:
            if spacing is not None:
                raise ValueError(f"spacing: expected None when steps lists the times, got {spacing!r}")
            times = real_array("steps", steps, "a number or strictly decreasing times")
            if times.ndim == 1 and times.size and times[-1] == self.clean:
                times = times[:-1]
            if times.ndim != 1 or not times.size or not np.all(np.diff(times) < 0):
                raise ValueError(f"steps: expected a number or strictly decreasing times, got {got(steps)}")
        else:
            times = self._times(
                _count(steps, " or a sequence of times"), self.default_spacing if spacing is None else spacing
            )
        return (*(self.level(t) for t in times), self.level(self.clean))

    def _times(self, steps: int, spacing: str) -> np.ndarray:
        one_of("spacing", spacing, SPACINGS)
        if spacing == "uniform":
            return self._distinct(np.linspace(self.t_max, self.t_min, steps))
        top = self.level(self.t_max)
        head = []
        if top.alpha == 0.0:  # the ratio is infinite there: visit it, then start from a finite one
            head, steps = [self.t_max], steps - 1
            if steps == 0:
                return np.asarray(head)
        largest, smallest = self._finite_ratios()
        u = np.linspace(0.0, 1.0, steps)
        if spacing == "karras":
            a, b = largest ** (1 / _KARRAS_RHO), smallest ** (1 / _KARRAS_RHO)
            ratio = (a + u * (b - a)) ** _KARRAS_RHO
        else:
            ratio = np.exp(math.log(largest) + u * (math.log(smallest) - math.log(largest)))
        ratio[-1], ratio[0] = smallest, largest  # exact ends: the prior's noise is that of the first level
        inner = np.clip(self._time_of_ratio(ratio), self.t_min, self.t_max)
        return self._distinct(np.concatenate([head, inner]))

    def _finite_ratios(self) -> tuple[float, float]:
        """Largest and smallest finite ``sigma / alpha``."""
        top, bottom = self.level(self.t_max), self.level(self.t_min)
        return top.sigma / top.alpha, bottom.sigma / bottom.alpha

    def _distinct(self, times: np.ndarray) -> np.ndarray:
        return times


def per_step(
    name: str, value: Schedulable, levels: Sequence[Level], high: float = math.inf, low: float = 0.0
) -> tuple[float, ...]:
    """The value of each step, each finite and in ``[low, high]``.

    ``value`` is a number, a table with one entry per step (a list, an array or a tensor), or a function of the
    schedule's
    time.
    """
    times = [level.t for level in levels[:-1]]
    values: list[Any]
    if callable(value):
        values = [as_float(value(t)) for t in times]  # read at once: the function may reuse the memory it returns
    elif not isinstance(value, Sequence | np.ndarray | Tensor) or getattr(value, "ndim", 1) == 0:
        values = [value] * len(times)
    else:
        if isinstance(value, Tensor):
            arguments.tensor(name, value, "a number, a table or a function of the time", readable=True)
        values = list(value)
    numbers = [as_float(v) for v in values]
    if isinstance(value, str | bytes) or None in numbers:
        raise TypeError(f"{name}: expected a number, a table or a function of the time, got {got(value)}")
    if len(numbers) != len(times):
        raise ValueError(f"{name}: expected a table of {len(times)} steps, got {len(numbers)} entries")
    for t, v in zip(times, numbers, strict=True):
        if v is None or not (low <= v <= high and math.isfinite(v)):
            raise ValueError(f"{name}: expected finite values in [{low:g}, {high:g}], got {v} at t = {t}")
    return tuple(v for v in numbers if v is not None)


class _Table(Schedule):
    """A discrete variance-preserving table."""

    discrete = True
    clean = -1
    t_min = 0
    default_spacing = "uniform"

    def __init__(self, alphas_cumprod: Any, name: str, argument: str = "alphas_cumprod"):
        table = real_array(argument, alphas_cumprod, "alphas_cumprod of shape [n]")
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"{argument}: expected alphas_cumprod of shape [n], got shape {list(table.shape)}")
        if not (np.all(table >= 0) and np.all(table < 1) and np.all(np.diff(table) < 0)):
            raise ValueError(f"{argument}: expected alphas_cumprod in [0, 1) that strictly decrease, got others")
        self.t_max = table.size - 1
        self._name = name
        padded = np.append(table, 1.0)  # index -1 is the clean level
        padded.setflags(write=False)  # alpha and sigma below are computed from it only once
        self.alphas_cumprod = padded[:-1]
        self._alpha, self._sigma = np.sqrt(padded), np.sqrt(1.0 - padded)

    def __repr__(self) -> str:
        return f"{self._name}({self.alphas_cumprod.size})"

    def _alpha_sigma(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = t.astype(np.int64)
        if not np.all(index == t):
            raise ValueError(f"t: expected step indices of {self}, got {got(t)}")
        return self._alpha[index], self._sigma[index]

    def _time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        table = np.log(self._sigma[:-1]) - np.log(np.maximum(self._alpha[:-1], 1e-300))
        return np.interp(np.log(ratio), table, np.arange(table.size))

    def _times(self, steps: int, spacing: str) -> np.ndarray:
        if steps > self.alphas_cumprod.size:
            raise ValueError(f"steps: expected at most {self.alphas_cumprod.size} for {self}, got {steps}")
        return super()._times(steps, spacing)

    def _finite_ratios(self) -> tuple[float, float]:
        top = self.alphas_cumprod.size - 1
        top -= int(self._alpha[top] == 0)
        return self._sigma[top] / self._alpha[top], self._sigma[0] / self._alpha[0]

    def _distinct(self, times: np.ndarray) -> np.ndarray:
        index = np.round(times).astype(np.int64)
        for i in range(index.size - 2, -1, -1):  # push equal entries up, then back below the top
            index[i] = max(index[i], index[i + 1] + 1)
        index[0] = min(index[0], self.t_max)
        for i in range(1, index.size):
            index[i] = min(index[i], index[i - 1] - 1)
        return index


def from_alphas_cumprod(table: Any) -> Schedule:
    """Variance-preserving schedule from a table ``alphas_cumprod``, as diffusers keeps it.

    Args:
        table: Shape ``[n]``, in ``[0, 1)`` and strictly decreasing. The last entry may be 0 (zero terminal
            signal-to-noise ratio).

    Returns:
        A discrete schedule with the times ``0..n-1``.

    Raises:
        TypeError: ``table`` is not made of real numbers.
        ValueError: ``table`` has another shape, leaves ``[0, 1)`` or does not decrease.
    """
    return _Table(table, "from_alphas_cumprod", "table")


def _from_betas(betas: np.ndarray, name: str, source: str) -> Schedule:
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise ValueError(f"{source}: expected betas in (0, 1), got {betas.min():g} to {betas.max():g}")
    return _Table(np.cumprod(1.0 - betas), name)


def vp_linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Variance-preserving schedule with linear betas.

    Args:
        steps: Number of entries of the table, at least 1.
        beta_start: Beta of the first entry, in ``(0, 1)``.
        beta_end: Beta of the last entry, in ``(0, 1)``.

    Returns:
        A discrete schedule with the times ``0..steps-1``.

    Raises:
        TypeError: A beta is not a number.
        ValueError: An argument is outside its range.

    Source:
        Ho et al. 2020.
    """
    low, high = _beta("beta_start", beta_start), _beta("beta_end", beta_end)
    return _from_betas(np.linspace(low, high, _count(steps)), "vp_linear", "beta_start, beta_end")


def vp_scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Variance-preserving schedule with betas that are linear in their square root, as latent diffusion has them.

    Args:
        steps: Number of entries of the table, at least 1.
        beta_start: Beta of the first entry, in ``(0, 1)``.
        beta_end: Beta of the last entry, in ``(0, 1)``.

    Returns:
        A discrete schedule with the times ``0..steps-1``.

    Raises:
        TypeError: A beta is not a number.
        ValueError: An argument is outside its range.
    """
    low, high = _beta("beta_start", beta_start), _beta("beta_end", beta_end)
    root = np.linspace(low**0.5, high**0.5, _count(steps))
    return _from_betas(root**2, "vp_scaled_linear", "beta_start, beta_end")


def vp_cosine(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """Variance-preserving cosine schedule.

    Args:
        steps: Number of entries of the table, at least 1.
        offset: The ``s`` of the paper, ``>= 0``.
        beta_max: Largest beta, in ``(0, 1)``.

    Returns:
        A discrete schedule with the times ``0..steps-1``.

    Raises:
        TypeError: ``offset`` or ``beta_max`` is not a number.
        ValueError: An argument is outside its range.

    Source:
        Nichol & Dhariwal 2021, equation 17.
    """
    size, offset, beta_max = _count(steps), number("offset", offset, low=0.0), _beta("beta_max", beta_max)
    u = np.arange(size + 1) / size
    bar = np.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return _from_betas(np.minimum(1.0 - bar[1:] / bar[:-1], beta_max), "vp_cosine", "offset, beta_max")


def _count(steps: Any, others: str = "") -> int:
    count = integer("steps", steps, 1, others=others)
    if count > _MOST_LEVELS:
        raise ValueError(f"steps: expected at most {_MOST_LEVELS}, got {got(steps)}")
    return count


def _beta(name: str, value: float) -> float:
    return number(name, value, above=0.0, below=1.0)


class _VarianceExploding(Schedule):
    """``alpha = 1``, ``sigma = t``."""

    def __init__(self, sigma_min: float, sigma_max: float, spacing: str, name: str):
        sigma_min, sigma_max = number("sigma_min", sigma_min, above=0.0), number("sigma_max", sigma_max, above=0.0)
        if not sigma_min < sigma_max:
            raise ValueError(f"sigma_min, sigma_max: expected 0 < min < max, got {sigma_min}, {sigma_max}")
        self.t_min, self.t_max, self.default_spacing, self._name = sigma_min, sigma_max, spacing, name

    def __repr__(self) -> str:
        return f"{self._name}(sigma_min={self.t_min:g}, sigma_max={self.t_max:g})"

    def _alpha_sigma(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(t), t.copy()

    def _time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        return ratio


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Variance-exploding schedule, ``alpha = 1`` and ``sigma = t``, with geometric levels by default.

    Args:
        sigma_min: Noise level of the last network call, ``> 0``.
        sigma_max: Noise level of the start, above ``sigma_min``.

    Returns:
        A schedule whose time is the noise level.

    Raises:
        TypeError: An argument is not a number.
        ValueError: Not ``0 < sigma_min < sigma_max``.

    Source:
        Song et al. 2021.
    """
    return _VarianceExploding(sigma_min, sigma_max, "logsnr", "ve")


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """EDM schedule: as `ve`, with the spacing of Karras et al. by default.

    Args:
        sigma_min: Noise level of the last network call, ``> 0``.
        sigma_max: Noise level of the start, above ``sigma_min``.

    Returns:
        A schedule whose time is the noise level.

    Raises:
        TypeError: An argument is not a number.
        ValueError: Not ``0 < sigma_min < sigma_max``.

    Source:
        Karras et al. 2022.
    """
    return _VarianceExploding(sigma_min, sigma_max, "karras", "edm")


class _Flow(Schedule):
    """``alpha = 1 - t``, ``sigma = t``."""

    t_min, t_max = 0.0, 1.0
    default_spacing = "uniform"
    _edge = 1e-3  # the spacings in sigma / alpha need finite ends: they run from t = 1 - edge to t = edge

    def __repr__(self) -> str:
        return "flow()"

    def _alpha_sigma(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 - t, t.copy()

    def _time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        return ratio / (1.0 + ratio)

    def _finite_ratios(self) -> tuple[float, float]:
        return (1.0 - self._edge) / self._edge, self._edge / (1.0 - self._edge)

    def _times(self, steps: int, spacing: str) -> np.ndarray:
        if spacing == "uniform":
            return np.linspace(1.0, 0.0, steps + 1)[:-1]
        return super()._times(steps, spacing)


def flow() -> Schedule:
    """Flow matching with straight paths, ``alpha = 1 - t`` and ``sigma = t``.

    ``alpha`` is 0 at ``t = 1``. A network that predicts ``"epsilon"`` or ``"score"`` cannot be used there.

    Returns:
        A schedule with times in ``[0, 1]``.

    Source:
        Lipman et al. 2023; Liu et al. 2023.
    """
    return _Flow()
