"""Feynman-Kac steering (Singhal et al. 2025), as the authors' SDXL and SD pipelines call it: `FKD`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["FKD"]

POTENTIALS = ("diff", "max", "add", "rt")


class FKD:
    """``num_particles`` images that follow a reward: a pipeline calls `resample` after every step.

    - ``potential_type``, the log-potential of a step: ``"diff"`` ``lmbda * (r - r of the step before)``; ``"max"`` and
      ``"add"`` ``lmbda *`` the largest reward, or their sum, so far; ``"rt"`` ``lmbda * r``. ``reward_min_value`` comes
      before the first. The last potential makes the product ``exp(lmbda * r(x_0))``, for ``"diff"`` divided by
      ``exp(lmbda * reward_min_value)``.
    - Every ``resample_frequency``-th step of ``resampling_t_start`` to ``resampling_t_end``, both included, weighs and
      resamples, and so does the last, ``time_steps - 1``. With ``adaptive_resampling`` those before the last resample
      only where the effective sample size is below half of the particles; weights are kept until then.
    - ``latent_to_decode_fn(x0_preds) -> images``, a tensor or a sequence, and ``reward_fn(images) -> [num_particles]``
      rewards, a tensor or a sequence. A NaN is a particle of weight 0; where all have weight 0, all are kept.
    - ``device``: where rewards and weights are kept, in float64.
    - ``scheme``: a resampler of `fastguide.ops.resample`; ``seed``: its seed, None for one of torch's global generator.
    - ``strict=True``: what the original does instead. Weights of each step alone, in float32 and no larger than 1e10;
      multinomial resampling by torch's global generator; the last step, too, only below half. A weight that was not
      resampled is then forgotten, so that the images no longer follow ``p(x_0) exp(lmbda * r(x_0))``.

    Other keywords are taken and ignored: pipelines pass on all of their ``fkd_args``.

    ``log_weights`` ``[num_particles]`` are the weights now; after the last step (``strict`` apart) they are equal: all
    the estimate of the log of the mean product of potentials.
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
        device: torch.device | str = "cuda",
        scheme: str = "systematic",
        seed: int | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        if potential_type not in POTENTIALS:
            raise ValueError(f"potential_type: expected one of {POTENTIALS}, got {potential_type!r}")
        if scheme not in ops.SCHEMES:
            raise ValueError(f"scheme: expected one of {ops.SCHEMES}, got {scheme!r}")
        if strict and (scheme != "systematic" or seed is not None):
            raise ValueError("strict: expected neither scheme nor seed with it: torch's generator draws")
        self.potential_type = potential_type
        self.lmbda = lmbda
        self.num_particles = num_particles
        self.adaptive_resampling = adaptive_resampling
        self.last_step = time_steps - 1
        self.steps = {*range(resampling_t_start, resampling_t_end + 1, resample_frequency), self.last_step}
        self.reward_fn = reward_fn
        self.latent_to_decode_fn = latent_to_decode_fn
        self.scheme = scheme
        self.seed = int(torch.randint(1 << 62, ())) if seed is None and not strict else seed
        self.strict = strict
        self.log_weights = torch.zeros(num_particles, dtype=torch.float64, device=device)
        self._so_far = torch.full_like(self.log_weights, reward_min_value)
        self._log_product = torch.zeros_like(self.log_weights)

    def resample(self, *, sampling_idx: int, latents: Tensor, x0_preds: Tensor) -> tuple[Tensor, Any]:
        """``latents`` ``[num_particles, ...]`` of step ``sampling_idx``, resampled by the rewards of what ``x0_preds``
        ``[num_particles, ...]`` decode to, and those images, resampled likewise; at a step that does not weigh, the
        same latents and None. Images that are no tensor wait for the device; nothing else does, but ``strict``.
        """
        if sampling_idx not in self.steps:
            return latents, None
        for name, value in (("latents", latents), ("x0_preds", x0_preds)):
            if value.shape[0] != self.num_particles:
                raise ValueError(f"{name}: expected {self.num_particles} particles, got shape {list(value.shape)}")
        images = self.latent_to_decode_fn(x0_preds)
        rewards = torch.as_tensor(self.reward_fn(images), dtype=torch.float64, device=self.log_weights.device)
        if rewards.shape != self.log_weights.shape:
            raise ValueError(f"reward_fn: expected {self.num_particles} rewards, got shape {list(rewards.shape)}")
        last = sampling_idx == self.last_step
        log_potential = self._log_potential(rewards, last)
        self._log_product = self._log_product + log_potential
        choose = self._choose_as_the_original if self.strict else self._choose
        ancestors = choose(log_potential, sampling_idx, last)
        if ancestors is None:
            return latents, images
        self._so_far, self._log_product = self._so_far[ancestors], self._log_product[ancestors]
        if isinstance(images, Tensor):
            images = images.index_select(0, ancestors.to(images.device))
        else:
            images = [images[k] for k in ancestors.tolist()]
        return latents.index_select(0, ancestors.to(latents.device)), images

    def _log_potential(self, rewards: Tensor, last: bool) -> Tensor:
        if self.potential_type == "diff":
            log_potential = self.lmbda * (rewards - self._so_far)
            self._so_far = rewards
            return log_potential
        if last:
            return self.lmbda * rewards - self._log_product
        if self.potential_type == "rt":
            return self.lmbda * rewards
        combine = torch.maximum if self.potential_type == "max" else torch.add
        self._so_far = combine(rewards, self._so_far)
        return self.lmbda * self._so_far

    def _choose(self, log_potential: Tensor, step: int, last: bool) -> Tensor:
        log_weights = self.log_weights + log_potential
        log_weights = log_weights.masked_fill(log_weights.isnan(), -torch.inf)
        assert self.seed is not None
        ancestors, self.log_weights, _, _ = ops.resample(
            log_weights,
            scheme=self.scheme,
            ess_threshold=0.5 if self.adaptive_resampling and not last else None,
            seed=self.seed,
            step=step,
            check=False,
        )
        return ancestors.long()

    def _choose_as_the_original(self, log_potential: Tensor, step: int, last: bool) -> Tensor | None:
        weights = log_potential.float().exp().nan_to_num(nan=0.0).clamp(max=1e10)
        self.log_weights = weights.double().log()
        if self.adaptive_resampling or last:
            ess = weights.sum() ** 2 / (weights**2).sum()
            if not ess < 0.5 * self.num_particles:
                return None
        self.log_weights = torch.zeros_like(self.log_weights)
        return torch.multinomial(weights, self.num_particles, replacement=True)
