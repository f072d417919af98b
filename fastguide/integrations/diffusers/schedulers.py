"""The schedulers of diffusers, with steps by `fastguide.ops.reverse_step`.

Use ``pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)``, or `accelerate`. Nothing else changes: each
class is a subclass of diffusers' class of the same name, and replaces `step` and methods that would wait for the
device. With the same noise the results are the parent's, to rounding. The noise is the parent's too: from
``generator``, or from torch's global one.

Every step of these schedulers is the following, with numbers that depend only on the level::

    x0  = p sample + q model_output, clipped or thresholded
    x_s = a sample + b x0 + std noise

The numbers are computed once for a schedule, in the parent's float32. They are kept as floats on the host, and as a
table that is copied to a device when it is needed there.

- No step waits for the device. A timestep that is an element of ``scheduler.timesteps`` is recognised by its address,
  and its numbers are floats on the host. The numbers of another timestep on a GPU are looked up on the GPU.
- `DDPMScheduler`, `DDIMScheduler`: ``timestep`` may be a tensor ``[N]``, one for each sample.
- ``fused_noise=True`` (in `accelerate` and ``from_config``, or as an attribute) draws the noise with
  `fastguide.ops.randn`, inside the kernel of the step. The noise of a sample depends on the run's seed, the step, how
  many steps of the run the sample took before, and the index of the sample. It does not depend on the batch, so a
  sample is the same in any batch, up to the rounding of the network. The attribute ``first_sample`` (default 0) is the
  index of the first sample of the batch. The seed is drawn from ``generator``, or from torch's global one, when a run
  begins. A run begins at the first step after ``set_timesteps``, with another generator, or when the first step of the
  run is taken again. With a timestep for each sample, only the first two begin a run. In a list of generators each
  sample has its own. ``fused_noise`` is not part of the configuration.
- ``save_pretrained`` of the scheduler or its pipeline saves diffusers' own class, which loads without fastguide.

If this path cannot serve a step, the parent's code takes it. ``parent_calls`` counts such steps by reason, and the
first of each reason warns. ``torch.compile`` traces the parent's code and fuses that itself.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import warnings
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # loading a pipeline needs both
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...arguments import flag, got, real
from ...foreign import as_tensor
from ...memory import Memory
from ...ops._arguments import STATE_DTYPES, Clip, Coefficients, DynamicThreshold

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "accelerate",
]

Generators = torch.Generator | list[torch.Generator] | None

PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}


# --- the numbers of a schedule ------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The steps of a schedule as coefficients of `fastguide.ops.reverse_step`."""

    prediction: str
    steps: list[tuple[Coefficients, Coefficients] | None]  # without noise and with it; None: not a reverse step
    clip: Clip
    clip_noise: bool
    # On each device that needs it a float64 table [6, steps + 1] with rows alpha_t, sigma_t, alpha_s, sigma_s without
    # noise, sigma_s with noise, std. The last column is NaN, for timesteps that the schedule does not have.
    tables: dict[torch.device, Tensor]

    def columns(self, place: Tensor) -> Tensor:
        device = place.device
        if device not in self.tables:
            self.tables[device] = self.tables[torch.device("cpu")].to(device, non_blocking=True)
        table = self.tables[device]
        return table[:, torch.where((place >= 0) & (place < table.shape[1] - 1), place, -1)]


def _plan(
    prediction: str,
    alpha: Tensor | float,
    sigma: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor | float = 0.0,
    clip: Clip = None,
    clip_noise: bool = True,
) -> _Plan:
    """The plan of steps ``x_s = a x + b x0 + std z``. ``prediction`` and (alpha, sigma) give ``x0``. Each step is a
    reverse step to some level (alpha_s, sigma_s), which is computed here."""
    numbers = (as_tensor(v).double() for v in (alpha, sigma, a, b, std))
    alpha_t, sigma_t, a, b, tau = torch.broadcast_tensors(*numbers)
    kept = a * sigma_t
    table = torch.stack([alpha_t, sigma_t, b + alpha_t * a, kept, kept.hypot(tau), tau])
    served = (table.isfinite() & (table >= 0.0)).all(dim=0) & (sigma_t > 0.0)
    if prediction == "epsilon":
        served &= alpha_t > 0.0
    steps = [
        ((*levels, still_s, 0.0), (*levels, noisy_s, std)) if good else None
        for good, (*levels, still_s, noisy_s, std) in zip(served.tolist(), table.T.tolist(), strict=True)
    ]
    table = torch.cat([table.where(served, torch.nan), table.new_full((6, 1), torch.nan)], dim=1)
    return _Plan(prediction, steps, clip, clip_noise, {table.device: table})


def _v_level(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The (alpha, sigma) for which the prediction type "v" gives ``x0 = p x - q output``."""
    p, q = p.double(), q.double()
    return p / (p**2 + q**2), q / (p**2 + q**2)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one made in inference mode, where torch does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _NotServed(Exception):
    """Why the parent's code must take a step. The reason is empty if the parent should raise its own error."""


_NO_STEP = "the numbers of this step are those of no reverse step"


class _NoiseRun:
    """A run with fused noise: its seed, the place of its first step, and how many steps each sample took."""

    def __init__(self, generator: torch.Generator, start: int | None):
        self.start = start
        # On a GPU the seed stays there, because reading it would wait.
        device = generator.device
        seed = torch.randint((1 << 63) - 1, (1,), generator=generator, device=device)
        self.seed: int | Tensor = int(seed) if device.type == "cpu" else seed
        self._firsts, self._taken = [0], [0]  # samples from _firsts[i] to _firsts[i + 1] took _taken[i] steps

    def count(self, low: int, high: int) -> int:
        """The most steps that any of the samples ``low`` to ``high - 1`` took. Then counts one more for all of them."""
        for edge in (low, high):
            i = bisect_left(self._firsts, edge)
            if edge not in self._firsts[i : i + 1]:
                self._firsts.insert(i, edge)
                self._taken.insert(i, self._taken[i - 1])
        part = slice(bisect_left(self._firsts, low), bisect_left(self._firsts, high))
        taken = max(self._taken[part], default=0)
        if low < high:
            self._firsts[part], self._taken[part] = [low], [taken + 1]
        return taken


class _NoiseRuns(weakref.WeakKeyDictionary):
    """The runs of each generator, while the generator lives. A generator has one run for each of its places in a
    list."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoiseRuns, ()  # a pickle is loaded without runs: its generators are other objects


_MOST_STEPS = 1 << 16  # the most steps of a run: the number of steps taken is the stream of the noise

# --- common to all schedulers -------------------------------------------------------------------------------


class _Fused:
    """Mix-in for a scheduler of diffusers, whose attributes it uses."""

    fused_noise = False
    first_sample = 0
    timesteps: Tensor
    config: Any
    _internal_dict: Any
    _calls: Counter[str] | None = None
    _known: tuple[Tensor, int, list[float]] | None = None  # timesteps on a device, and their values
    _planned: tuple[tuple[Any, ...], Any, Any] | None = None  # the numbers and objects that a plan depends on, the plan
    _noise_runs: _NoiseRuns | None = None
    _memory: Memory | None = None  # reused for results of the run that nobody holds any more; until `set_timesteps`
    _step: Callable[..., tuple[Tensor, ...]]  # takes the parent's arguments, except the last
    _make_plan: Callable[..., Any]  # takes the numbers given to `_cached`

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__new__(cls)
        scheduler._save_as_parent()
        return scheduler

    def _save_as_parent(self) -> None:
        """Make a pipeline save this scheduler as diffusers' class. It saves the name in ``__module__``."""
        self.__module__ = next(kind.__module__ for kind in type(self).__mro__ if kind.__module__ != __name__)

    @property
    def parent_calls(self) -> Counter[str]:
        """How many steps the parent's code took, by reason."""
        if self._calls is None:
            self._calls = Counter()
        return self._calls

    @classmethod
    def from_config(cls, config: Any = None, *, fused_noise: bool | None = None, **kwargs: Any) -> Any:
        result = super().from_config(config, **kwargs)  # type: ignore[misc]
        if fused_noise is not None:
            (result[0] if isinstance(result, tuple) else result).fused_noise = fused_noise
        return result

    def _fuse_or_leave(self, output: Any, return_dict: bool, *arguments: Any) -> Any:
        """The result of `_step`, or of the parent if `_step` cannot serve the arguments."""
        if torch.compiler.is_compiling():  # torch.compile fuses the parent's operations itself
            return super().step(*arguments, return_dict)  # type: ignore[misc]
        try:
            result = self._step(*arguments)
        except _NotServed as reason:
            left = super().step(*arguments, return_dict)  # type: ignore[misc]
            self._count_parent_call(str(reason) or "the arguments are unusual")
            return left
        return output(*result) if return_dict else result

    def _count_parent_call(self, text: str) -> None:
        if text not in self.parent_calls:
            message = f"{type(self).__name__}: {text}; such steps are diffusers' own (counted in parent_calls)"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        self.parent_calls[text] += 1

    # --- timesteps ---

    def _keep_timesteps(self, device: torch.device | str | None) -> None:
        """Move the timesteps from the host to the device that the caller wants."""
        values = self.timesteps.tolist()
        if device is not None:
            self.timesteps = self.timesteps.to(device, non_blocking=True)
        self._known = self.timesteps, _version(self.timesteps), values
        self._noise_runs = self._memory = None

    def _values(self) -> list[float]:
        """The values of `timesteps`. Waits for the device only if the caller has set other timesteps there."""
        timesteps = self.timesteps
        if self._known is None or self._known[0] is not timesteps or self._known[1] != _version(timesteps):
            self._known = timesteps, _version(timesteps), timesteps.tolist()
        return self._known[2]

    def _value(self, timestep: Any) -> Any:
        """A timestep on the host, or None if it is only on a device or there is one for each sample."""
        if not isinstance(timestep, Tensor):
            return timestep
        if timestep.numel() != 1:
            return None
        if timestep.is_cpu:
            return timestep.item()
        known, ours = self._known, self.timesteps
        if known is None or known[0] is not ours or known[1] != _version(ours):
            return None
        if timestep.dtype != ours.dtype or timestep.device != ours.device:
            return None
        if timestep.untyped_storage().data_ptr() != ours.untyped_storage().data_ptr() or not ours.is_contiguous():
            return None
        place = timestep.storage_offset() - ours.storage_offset()
        return known[2][place] if 0 <= place < len(known[2]) else None

    # --- steps ---

    def _cached(self, parts: tuple[Any, ...], *numbers: Any) -> Any:
        """The plan of `_make_plan`, cached. It depends on ``parts`` (a tensor, then other objects) and ``numbers``."""
        key, planned = (_version(parts[0]), *numbers), self._planned
        if planned is None or planned[0] != key or not all(map(operator.is_, planned[1], parts)):
            self._planned = planned = key, parts, self._make_plan(*numbers)
        return planned[2]

    def _advance(
        self,
        plan: _Plan,
        place: int | Tensor,
        x: Tensor,
        output: Tensor,
        *,
        displacement: Tensor | None = None,
        std: Tensor | float | None = None,
        noise: Tensor | None = None,
        noise_dtype: torch.dtype | None = None,
        generator: Generators = None,
        noisy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``(x_s, x0)`` of the step at ``place``: one place for all samples, or one for each. ``noise`` is drawn if
        none is given. ``std`` replaces the plan's."""
        counter: dict[str, Any] = {"seed": 0}
        coefficients: Coefficients
        if isinstance(place, Tensor):
            alpha_t, sigma_t, alpha_s, sigma_s, _, tau = columns = plan.columns(place.to(x.device))
            if columns.is_cpu and (unknown := columns.isnan().any(0)).any():  # the parent takes only one timestep
                bad = place[unknown].tolist()
                raise ValueError(f"timestep: expected those of the schedule, with a reverse step each, got {bad}")
            coefficients = alpha_t, sigma_t, alpha_s, sigma_s, 0.0
            tau = tau.reshape(-1, *(1,) * (x.ndim - 1)).to(output.dtype)
        else:
            if not 0 <= place < len(plan.steps):
                raise _NotServed("")
            found = plan.steps[place]
            if found is None:
                raise _NotServed(_NO_STEP)
            coefficients, moving = found
            tau = moving[4]
            if noisy and noise is None and std is None and self.fused_noise and not isinstance(generator, list):
                coefficients, noisy = moving, False
                counter = self._counter(generator, place, self.first_sample, len(x))
        if noisy:
            if noise is not None and (noise.shape != x.shape or torch.promote_types(noise.dtype, x.dtype) != x.dtype):
                raise _NotServed("variance_noise has another shape than sample, or a wider dtype")
            scale = tau if std is None else std
            noise = self._draw(output, generator, place, noise_dtype).mul_(scale) if noise is None else noise * scale
            displacement = noise if displacement is None else displacement.add_(noise)
        if self._memory is None:
            self._memory = Memory(short_run=True)
        x_s, x0 = ops.reverse_step(
            x, output, coefficients, prediction=plan.prediction, clip=plan.clip, clip_noise=plan.clip_noise,
            displacement=displacement, return_x0=True, out=self._memory.pair(x, output, displacement), **counter,
        )  # fmt: skip
        return x_s, _in(output.dtype, x0) if plan.prediction == "sample" else x0

    def _counter(
        self, generator: torch.Generator | None, place: int | Tensor, first: int, number: int = 1, entry: int = 0
    ) -> dict[str, Any]:
        """Seed, step, stream and first particle of the noise of ``number`` samples from ``first`` on, for the step at
        ``place``. ``entry``: how often the generator occurs earlier in a list of generators."""
        generator = torch.default_generator if generator is None else generator
        step = None if isinstance(place, Tensor) else place
        if self._noise_runs is None:
            self._noise_runs = _NoiseRuns()
        runs = self._noise_runs.setdefault(generator, {})
        run = runs.get(entry)
        taken = _MOST_STEPS if run is None else run.count(first, first + number)
        if taken >= (1 if run is not None and step is not None and step == run.start else _MOST_STEPS):
            run = runs[entry] = _NoiseRun(generator, step)
            taken = run.count(first, first + number)
        return {"seed": run.seed, "step": step or 0, "stream": taken, "first_particle": first}

    def _draw(
        self, like: Tensor, generator: Generators, place: int | Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or like.dtype
        if not self.fused_noise:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
        number = like.shape[0]
        if isinstance(generator, list) and len(generator) != number:
            raise ValueError(f"generator: expected one, or {number}, one for each sample, got {len(generator)}")
        options: dict[str, Any] = {"dtype": dtype, "device": like.device}
        if isinstance(generator, list):
            counters, seen = [], Counter[torch.Generator]()
            for own in generator:
                counters.append(self._counter(own, place, 0, entry=seen[own]))
                seen[own] += 1
        elif not isinstance(place, Tensor):
            return ops.randn(like.shape, **self._counter(generator, place, self.first_sample, number), **options)
        else:
            counters = [self._counter(generator, place, self.first_sample + n) for n in range(number)]
        if isinstance(place, Tensor):
            counters = [c | {"step": place[n : n + 1].to(like.device)} for n, c in enumerate(counters)]
        return torch.cat([ops.randn((1, *like.shape[1:]), **c, **options) for c in counters])


def _checked(sample: Tensor, output: Tensor, least: torch.dtype | None = None) -> Tensor:
    """The sample in the dtype of the step: the wider of the output's dtype and ``least`` (default: the sample's)."""
    if output.shape != sample.shape or not sample.ndim:
        raise _NotServed("model_output has not the shape of sample")
    dtype, other = output.dtype, least or sample.dtype
    if dtype not in STATE_DTYPES or sample.dtype not in STATE_DTYPES:
        raise _NotServed(f"the dtypes are {dtype} and {sample.dtype}")
    if dtype is not other:
        dtype = torch.promote_types(dtype, other)
    return _in(dtype, sample)


def _clip_of(config: Any, clips: bool = True) -> Clip:
    """The clip of x0 that a configuration asks for. ``clips``: whether its ``clip_sample`` has a meaning."""
    if config.thresholding:
        if not (0.0 <= config.dynamic_thresholding_ratio <= 1.0 <= config.sample_max_value):
            raise _NotServed("the dynamic threshold is below 1")
        return DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    if not (clips and config.clip_sample):
        return None
    if not config.clip_sample_range > 0:
        raise _NotServed("clip_sample_range is not above 0")
    return float(config.clip_sample_range)


# --- variance-preserving: a timestep is an index into alphas_cumprod ----------------------------------------


_INTEGERS = (int, np.integer)


class _Indexed(_Fused):
    """DDPM and DDIM. Their steps depend only on ``timestep``."""

    alphas_cumprod: Tensor
    num_inference_steps: int | None

    def _place(self, timestep: Any, sample: Tensor) -> int | Tensor:
        """The place of the timestep in a plan: one for all samples, or one for each."""
        value = self._value(timestep)
        if value is None:
            if timestep.is_floating_point() or timestep.numel() not in (1, sample.shape[0]):
                if timestep.numel() == 1:
                    raise _NotServed("")
                expected = f"an integer, or {sample.shape[0]}, one for each sample"
                raise ValueError(f"timestep: expected {expected}, got {got(timestep)}")
            return timestep.reshape(-1).long().expand(sample.shape[0])
        if not isinstance(value, _INTEGERS):
            raise _NotServed("")
        return int(value)

    def _prediction(self) -> str:
        if self.config.prediction_type not in PREDICTIONS:
            raise _NotServed("")
        return PREDICTIONS[self.config.prediction_type]


class DDPMScheduler(_Indexed, diffusers.DDPMScheduler):
    """diffusers' ``DDPMScheduler`` with fused steps; see the module."""

    @functools.wraps(diffusers.DDPMScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None):
        super().set_timesteps(num_inference_steps, "cpu", timesteps)
        self._keep_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """As the parent's; ``timestep`` may be a tensor ``[N]``."""
        return self._fuse_or_leave(DDPMSchedulerOutput, return_dict, model_output, timestep, sample, generator)

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        place = self._place(timestep, sample)
        parts = self.alphas_cumprod, self.timesteps, self._internal_dict
        scheduled = bool(self.custom_timesteps or self.num_inference_steps)
        plan, log_variances = self._cached(parts, _version(self.timesteps), scheduled, self.variance_type)
        std = None
        if log_variances is not None:
            if isinstance(place, Tensor) or output.shape[1] != 2 * sample.shape[1]:
                raise _NotServed("")
            output, predicted = output.split(sample.shape[1], dim=1)
            std = _std_of(predicted, log_variances, place)
        x = _checked(sample, output)
        if isinstance(place, int) and place == 0:
            return self._advance(plan, place, x, output)
        return self._advance(plan, place, x, output, generator=generator, noisy=True, std=std)

    def _make_plan(self, _: int, scheduled: bool, variance_type: str) -> Any:
        if variance_type != self.config.variance_type:
            raise _NotServed("variance_type is not that of the configuration")
        alpha_bar = self.alphas_cumprod.cpu()
        before = torch.arange(len(alpha_bar), device="cpu") - 1
        if scheduled:
            timesteps = [int(t) for t in self._values()]
            before = torch.full_like(before, len(alpha_bar))  # means: no such step
            for t, s in reversed([*zip(timesteps, [*timesteps[1:], -1], strict=True)]):  # the first of equal ones wins
                if t < len(before):
                    before[t] = s
        alpha_bar_s = torch.cat([alpha_bar, alpha_bar.new_tensor([torch.nan, 1.0])])[before]
        beta_bar, beta_bar_s = 1 - alpha_bar, 1 - alpha_bar_s
        alpha = alpha_bar / alpha_bar_s
        beta = 1 - alpha
        b = alpha_bar_s**0.5 * beta / beta_bar
        a = alpha**0.5 * beta_bar_s / beta_bar
        variance = (beta_bar_s / beta_bar * beta).clamp(min=1e-20)
        log_variances, std = None, torch.zeros_like(beta)
        if variance_type in ("learned", "learned_range"):
            log_variances = variance_type, variance.log().tolist(), beta.log().tolist()
        elif variance_type in ("fixed_small", "fixed_small_log"):
            std = variance**0.5
        elif variance_type == "fixed_large":
            std = beta**0.5
        else:
            raise _NotServed(f"variance_type is {variance_type}")
        std[0] = 0.0
        plan = _plan(self._prediction(), alpha_bar**0.5, beta_bar**0.5, a, b, std, _clip_of(self.config))
        return plan, log_variances


def _std_of(predicted: Tensor, log_variances: tuple[str, list[float], list[float]], place: int) -> Tensor:
    """The learned standard deviation. "learned_range" interpolates between the least and the largest variance in the
    logarithm (Nichol, Dhariwal 2021, eq. 15)."""
    kind, least, largest = log_variances
    if kind == "learned":
        return predicted**0.5
    low, high = least[place], largest[place]
    return predicted.mul((high - low) / 4).add_((high + low) / 4).exp_()


class DDIMScheduler(_Indexed, diffusers.DDIMScheduler):
    """diffusers' ``DDIMScheduler`` with fused steps; see the module."""

    @functools.wraps(diffusers.DDIMScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, "cpu")
        self._keep_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """As the parent's; ``timestep`` may be a tensor ``[N]``."""
        arguments = model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise
        return self._fuse_or_leave(DDIMSchedulerOutput, return_dict, *arguments)

    def _step(
        self,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        clipped: bool,
        generator: Generators,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        eta = real("eta", eta)
        if self.num_inference_steps is None or (eta > 0 and noise is not None and generator is not None):
            raise _NotServed("")
        place = self._place(timestep, sample)
        parts = self.alphas_cumprod, self.final_alpha_cumprod, self._internal_dict
        plan = self._cached(parts, self.num_inference_steps, eta, bool(clipped))
        x = _checked(sample, output)
        return self._advance(plan, place, x, output, noise=noise, generator=generator, noisy=eta > 0)

    def _make_plan(self, num_inference_steps: int, eta: float, clipped: bool) -> _Plan:
        config = self.config
        alpha_bar = self.alphas_cumprod.cpu()
        before = torch.arange(len(alpha_bar), device="cpu") - config.num_train_timesteps // num_inference_steps
        alpha_bar_s = torch.where(before >= 0, alpha_bar[before.clamp(min=0)], self.final_alpha_cumprod.cpu())
        beta_bar, beta_bar_s = 1 - alpha_bar, 1 - alpha_bar_s
        alpha_t, sigma_t, alpha_s = alpha_bar**0.5, beta_bar**0.5, alpha_bar_s**0.5
        std = eta * (beta_bar_s / beta_bar * (1 - alpha_bar / alpha_bar_s)) ** 0.5
        a = (beta_bar_s - std**2) ** 0.5 / sigma_t
        return _plan(
            self._prediction(), alpha_t, sigma_t, a, alpha_s - alpha_t * a, std, _clip_of(config), clip_noise=clipped
        )


# --- schedulers with sigmas, which count their steps --------------------------------------------------------


class _Ordered(_Fused):
    """The schedulers that count their steps."""

    sigmas: Tensor
    _step_index: int | None
    _begin_index: int | None

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """As the parent's, but does not wait for the device if the timestep is one of `timesteps`."""
        value = self._value(timestep) if schedule_timesteps is None else None
        places = []
        if value is not None:
            if self.timesteps.is_floating_point():
                value = torch.tensor(value, dtype=self.timesteps.dtype, device="cpu").item()
            places = [i for i, t in enumerate(self._values()) if t == value]
        if not places:
            return super().index_for_timestep(timestep, schedule_timesteps)  # type: ignore[misc]
        return places[1] if len(places) > 1 else places[0]  # as in diffusers: the second of equal timesteps

    def _init_step_index(self, timestep: Any) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _count(self, timestep: Any) -> int:
        """The number of this step."""
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep: expected one for all samples, got {got(timestep)}")
        if self._step_index is None:
            self._init_step_index(timestep)
        return self._step_index  # type: ignore[return-value]


class _Scaled(_Ordered):
    """The two Euler schedulers. They are variance exploding and scale the input of the model."""

    is_scale_input_called: bool

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """As the parent's."""
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        return sample / math.sqrt(self._host_sigmas()[self._step_index] ** 2 + 1)  # type: ignore[index]

    def _host_sigmas(self) -> list[float]:
        sigmas = self.sigmas
        if self._listed is None or self._listed[0] is not sigmas or self._listed[1] != _version(sigmas):
            self._listed = sigmas, _version(sigmas), sigmas.tolist()
        return self._listed[2]

    _listed: tuple[Tensor, int, list[float]] | None = None

    def _check(self, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise _NotServed("")
        if not self.is_scale_input_called:
            raise _NotServed("scale_model_input was not called")

    def _euler(self, hat: Tensor, sigma: Tensor, ratio: Tensor, std: Tensor | float = 0.0) -> _Plan:
        """``x_s = ratio x + (1 - ratio) x0 + std z``. x has noise level ``hat``; the network was given ``sigma``."""
        prediction = {"original_sample": "sample"}.get(self.config.prediction_type, self.config.prediction_type)
        if prediction not in PREDICTIONS:
            raise _NotServed("")
        if prediction != "v_prediction":
            return _plan(PREDICTIONS[prediction], 1.0, hat, ratio, 1 - ratio, std)
        level = _v_level(1 / (sigma**2 + 1), sigma / (sigma**2 + 1) ** 0.5)
        return _plan("v", *level, ratio, 1 - ratio, std)


class EulerDiscreteScheduler(_Scaled, diffusers.EulerDiscreteScheduler):
    """diffusers' ``EulerDiscreteScheduler`` with fused steps; see the module."""

    @functools.wraps(diffusers.EulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None):
        super().set_timesteps(num_inference_steps, "cpu", timesteps, sigmas)
        self._keep_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """As the parent's."""
        arguments = model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator
        return self._fuse_or_leave(EulerDiscreteSchedulerOutput, return_dict, *arguments)

    def _step(
        self,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        s_churn: float,
        s_tmin: float,
        s_tmax: float,
        s_noise: float,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        self._check(timestep)
        step = self._count(timestep)
        churn = real("s_churn", s_churn), real("s_tmin", s_tmin), real("s_tmax", s_tmax)
        plan, churns = self._cached((self.sigmas, self._internal_dict), *churn)
        x = _checked(sample, output, torch.float32)
        if step < len(churns) and churns[step] > 0 and plan.steps[step] is not None:
            x = torch.add(x, self._draw(output, generator, step), alpha=real("s_noise", s_noise) * churns[step])
        x_s, x0 = self._advance(plan, step, x, output)
        self._step_index = step + 1
        return _in(output.dtype, x_s), x0

    def _make_plan(self, s_churn: float, s_tmin: float, s_tmax: float) -> Any:
        sigmas = self.sigmas.cpu()
        sigma, sigma_s = sigmas[:-1], sigmas[1:]
        gamma = torch.where((s_tmin <= sigma) & (sigma <= s_tmax), min(s_churn / len(sigma), 2**0.5 - 1), 0.0)
        hat = sigma * (gamma + 1)
        churns = (hat**2 - sigma**2) ** 0.5
        return self._euler(hat, sigma, sigma_s.double() / hat), churns.where(gamma > 0, 0.0).tolist()


class EulerAncestralDiscreteScheduler(_Scaled, diffusers.EulerAncestralDiscreteScheduler):
    """diffusers' ``EulerAncestralDiscreteScheduler`` with fused steps; see the module."""

    @functools.wraps(diffusers.EulerAncestralDiscreteScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, "cpu")
        self._keep_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """As the parent's."""
        arguments = model_output, timestep, sample, generator
        return self._fuse_or_leave(EulerAncestralDiscreteSchedulerOutput, return_dict, *arguments)

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        self._check(timestep)
        step = self._count(timestep)
        plan = self._cached((self.sigmas, self._internal_dict))
        x = _checked(sample, output, torch.float32)
        x_s, x0 = self._advance(plan, step, x, output, generator=generator, noisy=True)
        self._step_index = step + 1
        return _in(output.dtype, x_s), x0

    def _make_plan(self) -> _Plan:
        if self.config.prediction_type not in ("epsilon", "v_prediction"):
            raise _NotServed("")
        sigmas = self.sigmas.cpu()
        sigma, sigma_s = sigmas[:-1], sigmas[1:]
        up = (sigma_s**2 * (sigma**2 - sigma_s**2) / sigma**2) ** 0.5
        down = (sigma_s**2 - up**2) ** 0.5
        return self._euler(sigma, sigma, down.double() / sigma, up)


class FlowMatchEulerDiscreteScheduler(_Ordered, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' ``FlowMatchEulerDiscreteScheduler`` with fused steps; see the module."""

    @functools.wraps(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        self._keep_timesteps(device)
        host = self.sigmas
        if device is not None:
            self.sigmas = host.to(device, non_blocking=True)
        self._host_sigmas = self.sigmas, _version(self.sigmas), host

    _host_sigmas: tuple[Tensor, int, Tensor] | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """As the parent's. It ignores ``s_churn``, ``s_tmin``, ``s_tmax`` and ``s_noise`` too."""
        churn = s_churn, s_tmin, s_tmax, s_noise
        arguments = model_output, timestep, sample, *churn, generator, per_token_timesteps
        return self._fuse_or_leave(FlowMatchEulerDiscreteSchedulerOutput, return_dict, *arguments)

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, *others: Any) -> tuple[Tensor]:
        *_, generator, tokens = others
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise _NotServed("")
        if tokens is not None:
            raise _NotServed("per_token_timesteps were given")
        step = self._count(timestep)
        plan, increments = self._cached((self.sigmas, self._internal_dict))
        if plan is None:
            if not 0 <= step < len(increments):
                raise _NotServed("")
            x_s = torch.add(_checked(sample, output), output, alpha=increments[step])
        else:
            x = _checked(sample, output, torch.float32)
            x_s, _ = self._advance(plan, step, x, output, generator=generator, noisy=True, noise_dtype=torch.float32)
        self._step_index = step + 1
        return (_in(output.dtype, x_s),)

    def _make_plan(self) -> Any:
        sigmas, known = self.sigmas, self._host_sigmas
        unchanged = known is not None and known[0] is sigmas and known[1] == _version(sigmas)
        sigmas = known[2] if known is not None and unchanged else sigmas.cpu()
        sigma, sigma_s = sigmas[:-1], sigmas[1:]
        if not self.config.stochastic_sampling:
            return None, (sigma_s - sigma).tolist()
        return _plan("epsilon", 1.0, sigma, torch.zeros_like(sigma), 1 - sigma_s, sigma_s), None


class DPMSolverMultistepScheduler(_Ordered, diffusers.DPMSolverMultistepScheduler):
    """diffusers' ``DPMSolverMultistepScheduler`` with fused steps, for DPM-Solver++ only (Lu et al. 2022); see the
    module."""

    model_outputs: list[Tensor | None]
    lower_order_nums: int
    num_inference_steps: int | None

    @functools.wraps(diffusers.DPMSolverMultistepScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps=None, device=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, "cpu", mu, timesteps)
        self._keep_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """As the parent's."""
        arguments = model_output, timestep, sample, generator, variance_noise
        return self._fuse_or_leave(SchedulerOutput, return_dict, *arguments)

    def _step(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Generators, noise: Tensor | None
    ) -> tuple[Tensor]:
        if self.num_inference_steps is None:
            raise _NotServed("")
        step = self._count(timestep)
        plans, learned, orders, noisy = self._cached((self.sigmas, self.timesteps, self._internal_dict))
        if learned:
            output = output[:, :3]
        x = _checked(sample, output)
        if not 0 <= step < len(orders):
            raise _NotServed("")
        plan, *shares = plans[min(orders[step], self.lower_order_nums + 1) - 1]  # the first steps have no history
        displacement = None
        for share, earlier in zip(shares, reversed(self.model_outputs), strict=False):
            if displacement is None:
                displacement = earlier * share[step]
            else:
                displacement = displacement.add_(earlier, alpha=share[step])
        if noisy and noise is not None:
            noise = noise.to(device=x.device, dtype=torch.float32)
        x_s, x0 = self._advance(
            plan, step, x, output, displacement=displacement, noise=noise, noise_dtype=torch.float32,
            generator=generator, noisy=noisy,
        )  # fmt: skip
        self.model_outputs = [*self.model_outputs[1:], x0]
        self.lower_order_nums = min(self.lower_order_nums + 1, len(self.model_outputs))
        self._step_index = step + 1
        return (_in(x0.dtype, x_s),)

    def _make_plan(self) -> Any:
        config = self.config
        if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
            raise _NotServed(f"algorithm_type is {config.algorithm_type}")
        sigmas = self.sigmas.cpu()
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        log_snr = alpha.log() - sigma.log()
        h, alpha_s = log_snr[1:] - log_snr[:-1], alpha[1:]
        a = sigma[1:] / sigma[:-1]
        std: Tensor | float = 0.0
        noisy = config.algorithm_type == "sde-dpmsolver++"
        if noisy:
            a = a * torch.exp(-h)
            std = sigma[1:] * torch.sqrt(1.0 - torch.exp(-2 * h))
            h = 2.0 * h  # the integrals are those of the ODE over twice the step
        # phi_1, phi_2, phi_3: the integrals of the constant, linear and quadratic part of the clean sample
        zeroth = alpha_s * (1.0 - torch.exp(-h))
        first = alpha_s * ((torch.exp(-h) - 1.0) / h + 1.0)
        second = alpha_s * ((1.0 - torch.exp(-h) - h) / h**2 + (-0.5 if noisy else 0.5))  # the sign as in diffusers
        gone = h.new_full((2,), torch.nan)
        h_1 = torch.cat([gone[:1], h])[: len(h)]
        h_2 = torch.cat([gone, h])[: len(h)]
        r_0, r_1 = h_1 / h, h_2 / h
        kind, level = self._kind(alpha, sigma, sigmas)
        plans = []
        slope = 0.5 * zeroth if config.solver_type == "midpoint" else first
        w = (first * r_0 + second) / (r_0 + r_1)
        for shares in (
            (),
            (-slope / r_0,),
            (-(first + w) / r_0 - w / r_1, w / r_1),
        ):
            mine = zeroth - sum(shares, h.new_zeros(()))
            plan = _plan(kind, *level, a, mine, std, _clip_of(config, clips=False))
            plans.append((plan, *(share.tolist() for share in shares)))
        learned = config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range")
        steps = len(self.timesteps)
        few = config.lower_order_final and steps < 15
        orders = [min(config.solver_order, 3)] * steps
        if few:
            orders[-2:] = [min(order, 2) for order in orders[-2:]]
        if few or config.euler_at_final or config.final_sigmas_type == "zero":
            orders[-1] = 1
        return plans, learned, orders, noisy

    def _kind(self, alpha: Tensor, sigma: Tensor, sigmas: Tensor) -> tuple[str, tuple[Tensor | float, Tensor]]:
        kind = self.config.prediction_type
        if kind == "flow_prediction":
            return "epsilon", (1.0, sigmas[:-1])  # x0 = x - sigma output
        if kind not in PREDICTIONS:
            raise _NotServed("")
        level = alpha[:-1], sigma[:-1]
        return PREDICTIONS[kind], _v_level(*level) if kind == "v_prediction" else level  # for a flow, alpha + sigma = 1


# --- one line for a pipeline --------------------------------------------------------------------------------

SCHEDULERS = {
    scheduler.__bases__[1]: scheduler
    for scheduler in (
        DDPMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}


def accelerate(pipe: Any, *, fused_noise: bool = False) -> Any:
    """Replaces a pipeline's schedulers by fused ones with the same settings; returns ``pipe``.

    ``pipe`` is an object with an attribute ``scheduler``, or a ``DiffusionPipeline``, in which each scheduler among the
    components is replaced. For a scheduler alone use ``from_config``. ``fused_noise`` is described in
    `fastguide.integrations.diffusers.schedulers`. Raises ``TypeError`` if no scheduler has a class that is supported
    here.
    """
    fused_noise = flag("fused_noise", fused_noise)
    parts = dict(getattr(pipe, "components", {}))
    if hasattr(pipe, "scheduler"):
        parts.setdefault("scheduler", pipe.scheduler)
    schedulers = {name: part for name, part in parts.items() if isinstance(part, SchedulerMixin)}
    served = {name: part for name, part in schedulers.items() if isinstance(part, _Fused) or type(part) in SCHEDULERS}
    others = sorted({type(part).__name__ for name, part in schedulers.items() if name not in served})
    if not served:
        names = ", ".join(parent.__name__ for parent in SCHEDULERS)
        got = ", ".join(others) or f"{type(pipe).__name__}, which has none"
        raise TypeError(f"pipe: expected an object with a .scheduler that is one of {names}, got {got}")
    if others:
        warnings.warn(f"accelerate leaves {', '.join(others)} as it is", RuntimeWarning, stacklevel=2)
    for name, part in served.items():
        scheduler = copy.copy(part)
        scheduler.__class__ = SCHEDULERS.get(type(part), type(part))
        scheduler.fused_noise, scheduler._calls, scheduler._noise_runs = fused_noise, None, None
        scheduler._save_as_parent()
        setattr(pipe, name, scheduler)
    return pipe
