"""Feynman-Kac steering as the authors' SDXL and SD pipelines call it: `FKD`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..arguments import flag, function, integer, number, one_of, real, tensor, torch_device
from ..foreign import as_tensor
from ..guidance.base import STREAM_RESAMPLE
from ..reference import SCHEMES

__all__ = ["FKD"]

POTENTIALS = ("diff", "max", "add", "rt")
_MOST_STEPS = 1 << 20
_COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "add": torch.add}


class FKD:
    """Steers ``num_particles`` images towards a high reward. A pipeline calls `resample` after every step.

    Every ``resample_frequency``-th step from ``resampling_t_start`` to ``resampling_t_end`` (both included) weighs and
    resamples, and so does the last step, ``time_steps - 1``. The last potential makes the product of a particle's
    potentials ``exp(lmbda * r(x_0))``. With ``"diff"`` this is divided by ``exp(lmbda * reward_min_value)``.

    A particle whose reward is NaN gets weight 0. If all weights are 0 or one is infinite, the step does not count: all
    particles are kept, with the weights and rewards that they had. Both cases give a RuntimeWarning that names the
    step. It comes at once for rewards on the CPU, and after the last step for rewards on a GPU.

    With ``strict`` everything is as in the authors' class, and the images no longer follow
    ``p(x_0) exp(lmbda * r(x_0))``:

    - Each step weighs on its own, in float32 and with weights of at most 1e10. A weight that does not lead to
      resampling is forgotten, and the product of potentials leaves it out.
    - Ancestors are multinomial draws from torch's global generator. If no weight is above 0, torch raises.
    - The last step resamples only where the effective sample size is below half of the particles.
    - The last potential of ``"max"`` and ``"add"`` has the largest reward or the sum of rewards, not the last reward.

    Args:
        potential_type: The log-potential of a step: ``"diff"`` is ``lmbda * (r - r of the step before)``, ``"max"`` is
            ``lmbda`` times the largest reward so far, ``"add"`` is ``lmbda`` times the sum of rewards so far, ``"rt"``
            is ``lmbda * r``. An Enum with such a value is accepted.
        lmbda: The strength of the reward, a finite number.
        num_particles: An integer in ``[1, 2^31)``.
        adaptive_resampling: Whether steps before the last resample only where the effective sample size is below half
            of the particles. Weights are kept until then.
        resample_frequency: Steps from one resampling to the next, an integer >= 1.
        resampling_t_start: The first step that resamples, an integer in ``[-2^20, 2^20)``.
        resampling_t_end: No step after this one resamples, except the last. An integer in ``[-2^20, 2^20)``.
        time_steps: The number of steps of the pipeline, an integer >= 1.
        reward_fn: ``reward_fn(images)`` returns ``num_particles`` real rewards: a tensor, a numpy array or a sequence
            of numbers.
        reward_min_value: The reward before the first step.
        latent_to_decode_fn: ``latent_to_decode_fn(x0_preds)`` returns images: a tensor or a sequence. Neither function
            may write into ``x0_preds``.
        device: Where rewards and weights are kept, in float64 (rewards in float32 with ``strict``). None is CUDA if it
            is available, as in the authors' class, else the CPU.
        scheme: A resampling scheme of `fastguide.ops.resample`. Not with ``strict``.
        seed: An integer in ``[0, 2^64)``. None draws one from torch's global generator. A step that is taken again
            draws other numbers. Not with ``strict``.
        strict: Whether to do what the authors' class does, see above.
        **kwargs: Ignored: pipelines pass all of their ``fkd_args``.

    Attributes:
        population_rs: ``[num_particles]``: the rewards; for ``"max"`` and ``"add"`` the largest or the sum so far.
        log_weights: ``[num_particles]`` in float64: the weights now. After the last step all are equal (not with
            ``strict``), and each is the estimate of the log of the mean product of potentials.
        ancestors: ``[num_particles]`` in int64 on ``device``, or None before the first step that weighs. After the last
            such step, particle ``k`` continues particle ``ancestors[k]``; ``0, 1, 2, ...`` if all were kept.
            ``value[fkd.ancestors]`` moves other data of the particles.

    Raises:
        TypeError: A function is not callable, or an argument is not a number or a bool where one is expected.
        ValueError: An argument is out of range, a name is unknown, or ``scheme`` or ``seed`` is given with ``strict``.

    Source:
        Singhal et al. 2025.
    """

    def __init__(
        self,
        *,
        potential_type: str,
        lmbda: float,
        num_particles: int,
        adaptive_resampling: bool,
        resample_frequency: int,
        resampling_t_start: int,
        resampling_t_end: int,
        time_steps: int,
        reward_fn: Callable[[Any], Any],
        reward_min_value: float = 0.0,
        latent_to_decode_fn: Callable[[Tensor], Any] = lambda x: x,
        device: torch.device | str | None = None,
        scheme: str = "systematic",
        seed: int | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        potential_type = getattr(potential_type, "value", potential_type)  # the original's is an Enum
        one_of("potential_type", potential_type, POTENTIALS)
        one_of("scheme", scheme, SCHEMES)
        strict = flag("strict", strict)
        if strict and (scheme != "systematic" or seed is not None):
            raise ValueError("strict: expected neither scheme nor seed with it: torch's generator draws")
        least = real("reward_min_value", reward_min_value)
        function("reward_fn", reward_fn)
        function("latent_to_decode_fn", latent_to_decode_fn)
        self.potential_type = potential_type
        self.lmbda = number("lmbda", lmbda)
        self.num_particles = num_particles = integer("num_particles", num_particles, 1, 1 << 31)
        self.adaptive_resampling = flag("adaptive_resampling", adaptive_resampling)
        self.last_step = integer("time_steps", time_steps, 1) - 1
        frequency = integer("resample_frequency", resample_frequency, 1)
        start = integer("resampling_t_start", resampling_t_start, -_MOST_STEPS, _MOST_STEPS)
        end = integer("resampling_t_end", resampling_t_end, -_MOST_STEPS, _MOST_STEPS)
        self.steps = {*range(start, end + 1, frequency), self.last_step}
        self.reward_fn = reward_fn
        self.latent_to_decode_fn = latent_to_decode_fn
        self.scheme = scheme
        if seed is not None:
            seed = integer("seed", seed, 0, 1 << 64)
        self.seed = int(torch.randint(1 << 62, (), device="cpu")) if seed is None and not strict else seed
        self.strict = strict
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch_device("device", device)
        self.log_weights = torch.zeros(num_particles, dtype=torch.float64, device=device)
        dtype = torch.float32 if strict else torch.float64
        self.population_rs = torch.full_like(self.log_weights, least, dtype=dtype)
        self._product = torch.full_like(self.population_rs, float(strict))  # product of potentials; a log unless strict
        self.ancestors: Tensor | None = None
        self._visits: Counter[int] = Counter()  # how often each step was taken
        self._unread: list[tuple[int, Tensor, Tensor]] = []  # step, rewards that are NaN, whether any weight was usable

    def resample(self, *, sampling_idx: int, latents: Tensor, x0_preds: Tensor) -> tuple[Tensor, Any]:
        """Weighs and resamples the particles after step ``sampling_idx``.

        A step that does not weigh returns the latents as they are. The call waits for the device if images are not a
        tensor, with ``strict``, and at the last step to warn of unusable rewards.

        Args:
            sampling_idx: The step, an integer >= 0. 0 is the first.
            latents: ``[num_particles, ...]``.
            x0_preds: The predicted clean latents, ``[num_particles, ...]``.

        Returns:
            latents: The latents, resampled.
            images: What ``latent_to_decode_fn`` returned, resampled likewise; None at a step that does not weigh.

        Raises:
            TypeError: ``latents`` or ``x0_preds`` is not a tensor, or rewards are not real numbers.
            ValueError: There are not ``num_particles`` latents, predictions or rewards, or a function wrote into
                ``x0_preds``.
        """
        step = integer("sampling_idx", sampling_idx, 0)
        for name, value in (("latents", latents), ("x0_preds", x0_preds)):
            tensor(name, value)
        if step not in self.steps:
            return latents, None
        for name, value in (("latents", latents), ("x0_preds", x0_preds)):
            if value.shape[:1] != self.log_weights.shape:
                raise ValueError(f"{name}: expected {self.num_particles} particles, got shape {list(value.shape)}")
        version = None if x0_preds.is_inference() else x0_preds._version
        images = self.latent_to_decode_fn(x0_preds)
        rewards = self._as_tensor(self.reward_fn(images))
        if version is not None and x0_preds._version != version:  # comparing copies would cost too much
            raise ValueError(
                "latent_to_decode_fn, reward_fn: expected functions that leave x0_preds as they are, got one that "
                "writes into them; it can write into a clone"
            )
        if rewards.is_complex():
            raise TypeError(f"reward_fn: expected real rewards, got {rewards.dtype}")
        if rewards.shape != self.log_weights.shape:
            raise ValueError(f"reward_fn: expected {self.num_particles} rewards, got shape {list(rewards.shape)}")
        waits = rewards.device.type != "cpu"
        nan = rewards.isnan().sum()
        dtype = rewards.dtype if self.strict and rewards.is_floating_point() else self.population_rs.dtype
        rewards = rewards.to(self.population_rs.device, dtype, copy=True)  # the caller may overwrite its own
        so_far = self.population_rs
        combine = _COMBINATIONS.get(self.potential_type)
        self.population_rs = combine(rewards, so_far) if combine else rewards
        choose = self._choose_as_the_original if self.strict else self._choose
        ancestors, usable = choose(rewards, so_far, step)
        self._visits[step] += 1
        self._unread.append((step, nan, usable))
        if step == self.last_step or not (waits or usable.device.type != "cpu"):
            self._warn()
        if ancestors is None:
            self.ancestors = torch.arange(self.num_particles, device=self.log_weights.device)
            return latents, images
        self.ancestors = ancestors
        self.population_rs = self.population_rs.index_select(0, ancestors)
        if isinstance(images, Tensor):
            images = images.index_select(0, ancestors.to(images.device))
        else:
            images = [images[k] for k in ancestors.tolist()]
        return latents.index_select(0, ancestors.to(latents.device)), images

    def _as_tensor(self, rewards: Any) -> Tensor:
        if isinstance(rewards, Tensor):
            return rewards.detach()
        try:
            if isinstance(rewards, np.ndarray):
                return torch.tensor(np.ascontiguousarray(rewards), device="cpu")
            dtype = None if self.strict else torch.float64
            if any(isinstance(reward, Tensor) for reward in rewards):
                return torch.stack([as_tensor(reward, dtype).detach() for reward in rewards])
            return torch.tensor(rewards, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "reward_fn: expected rewards that are a tensor, a numpy array or a sequence of numbers, got "
                f"{type(rewards).__name__}: {error}"
            ) from error

    def _warn(self) -> None:
        """Warn of the unusable rewards of all steps since the last warning. Reads values that may be on a GPU."""
        for step, nan, usable in self._unread:
            number = int(nan)
            message = f"reward_fn: returned NaN for {number} of {self.num_particles} particles at step {step}"
            if not usable:
                message = (
                    f"reward_fn: expected rewards whose largest weight is finite at step {step}, got none ({number} of "
                    f"{self.num_particles} rewards are NaN). The step does not count: all particles were kept"
                )
            elif number:
                message += ". They got weight 0"
            else:
                continue
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        self._unread.clear()

    def _choose(self, rewards: Tensor, so_far: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The ancestors, and whether any weight is usable."""
        last = step == self.last_step
        if self.potential_type == "diff":
            log_potential = self.lmbda * (rewards - so_far)
        elif last:
            log_potential = self.lmbda * rewards - self._product
        else:
            log_potential = self.lmbda * self.population_rs
        log_weights = (self.log_weights + log_potential).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        assert self.seed is not None
        ancestors, after, _, ess = ops.resample(
            log_weights,
            scheme=self.scheme,
            ess_threshold=0.5 if self.adaptive_resampling and not last else None,
            seed=self.seed,
            step=step + (max(self.steps) + 1) * self._visits[step],
            stream=STREAM_RESAMPLE,
            check=False,
        )
        chosen = ancestors.long()
        usable = ess == ess  # the ESS is NaN if no weight is usable
        self.log_weights = torch.where(usable, after, self.log_weights)
        self.population_rs = torch.where(usable, self.population_rs, so_far)
        if self.potential_type != "diff":  # the product of "diff" needs no correction at the last step
            product = (self._product + log_potential).index_select(0, chosen)
            self._product = torch.where(usable, product, self._product)
        return chosen, usable

    def _choose_as_the_original(self, rewards: Tensor, so_far: Tensor, step: int) -> tuple[Tensor | None, Tensor]:
        last = step == self.last_step
        weights = torch.exp(self.lmbda * (rewards - so_far if self.potential_type == "diff" else self.population_rs))
        if last and self.potential_type != "diff":
            weights = weights / self._product
        weights = weights.clamp(max=1e10).nan_to_num(nan=0.0)
        self.log_weights = weights.double().log()
        usable = torch.ones((), dtype=torch.bool, device="cpu")  # torch.multinomial raises for unusable weights
        if self.adaptive_resampling or last:
            shares = weights / weights.sum()
            if not 1.0 / (shares**2).sum() < 0.5 * self.num_particles:
                return None, usable
        self.log_weights = torch.zeros_like(self.log_weights)
        chosen = torch.multinomial(weights, self.num_particles, replacement=True)
        self._product = self._product[chosen] * weights[chosen]
        return chosen, usable
