"""FKD, which steers with particles, against the same algorithm in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastguide.integrations.fkd import FKD

from ..cases import Case, Setting, case, rival


class PlainFKD:
    """The FKD of the text-to-image pipelines of Singhal et al. 2025, in plain torch: what `FKD` does with ``strict`` at
    steps that weigh."""

    def __init__(
        self,
        potential: str,
        lmbda: float,
        reward_fn: Callable[[Tensor], Tensor],
        latents: Tensor,
        last_step: int,
        adaptive: bool = False,
    ):
        self.potential, self.lmbda, self.reward_fn, self.adaptive = potential, lmbda, reward_fn, adaptive
        self.last_step = last_step
        self.rewards = torch.zeros(len(latents), device=latents.device)
        self.product = torch.ones(len(latents), device=latents.device)

    def resample(self, *, sampling_idx: int, latents: Tensor, x0_preds: Tensor) -> tuple[Tensor, Tensor]:
        rewards, last = self.reward_fn(x0_preds), sampling_idx == self.last_step
        if self.potential == "diff":
            weights = torch.exp(self.lmbda * (rewards - self.rewards))
        else:
            if self.potential == "max":
                rewards = torch.maximum(rewards, self.rewards)
            elif self.potential == "add":
                rewards = rewards + self.rewards
            weights = torch.exp(self.lmbda * rewards)
            if last:
                weights = weights / self.product
        weights = torch.where(weights.isnan(), 0.0, weights.clamp(0.0, 1e10))
        self.rewards = rewards
        if self.adaptive or last:
            ess = 1.0 / (weights / weights.sum()).square().sum()
            if not ess < len(weights) / 2:
                return latents, x0_preds
        ancestors = torch.multinomial(weights, len(weights), replacement=True)
        self.rewards = rewards[ancestors]
        self.product = self.product[ancestors] * weights[ancestors]
        return latents[ancestors], x0_preds[ancestors]


def _fkd_case(shape: Sequence[int], setting: Setting) -> Case:
    latents = setting.randn(*setting.pick(shape, (shape[0], 4, 4, 4)))
    x0_preds = setting.randn(*latents.shape, seed=1)
    reward_fn = lambda images: images[:, 0, 0, 0]  # noqa: E731
    inputs = dict(sampling_idx=5, latents=latents, x0_preds=x0_preds)

    def steering(**options: Any) -> FKD:
        return FKD(
            potential_type="diff",
            lmbda=1.0,
            num_particles=len(latents),
            adaptive_resampling=False,
            resample_frequency=1,
            resampling_t_start=0,
            resampling_t_end=10,
            time_steps=20,
            reward_fn=reward_fn,
            device=latents.device,
            **options,
        )

    def check() -> None:
        strict, plain = steering(strict=True), PlainFKD("diff", 1.0, reward_fn, latents, 19)
        for seed in range(3):
            results = []
            for resampler in (strict, plain):
                torch.manual_seed(seed)
                results.append(resampler.resample(**inputs))
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected), "other particles than the plain version's"
        fkd = steering(seed=0)
        got, images = fkd.resample(**inputs)
        ancestors = (got[:, None] == latents[None]).flatten(2).all(-1).int().argmax(1)
        assert torch.equal(images, x0_preds[ancestors])
        shares = len(latents) * torch.softmax(reward_fn(x0_preds).double(), 0)
        copies = torch.bincount(ancestors, minlength=len(latents))
        assert (copies - shares).abs().max() < 1 + 1e-6  # systematic

    return Case(
        f"FKD.resample, latents {list(latents.shape)} float32, a reward that costs nothing",
        elements=latents.numel(),
        bytes=None,
        ours=partial(steering(seed=0).resample, **inputs),
        check=check,
        rivals=[
            rival(
                "plain torch",
                lambda: partial(PlainFKD("diff", 1.0, reward_fn, latents, 19).resample, **inputs),
                at_least=4.0,
            )
        ],
    )


for _number in (4, 16, 64):
    case(f"integrations/fkd-{_number}")(partial(_fkd_case, (_number, 4, 128, 128)))
case("integrations/fkd-small-256")(partial(_fkd_case, (256, 4, 8, 8)))
