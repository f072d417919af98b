"""What `fastguide.sample` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops

__all__ = ["Samples"]


@dataclass(frozen=True)
class Samples:
    """What `sample` returns. For TDS and FK every particle carries a weight; nothing is resampled at the end."""

    x: Tensor  # [B, *event], or [B, K, *event]
    log_weights: Tensor | None = None  # [B, K] float64, unnormalised
    ess: Tensor | None = None  # [steps + 1, B] float64: before each step, and of the final weights
    log_evidence: Tensor | None = None  # [B] float64: log mean weight, the estimate of log p(y)
    ancestors: Tensor | None = None  # [steps, B, K] int32, with keep_ancestors=True
    seed: int | tuple[int, ...] | None = None  # that the noise was drawn with; one for each observation, or one

    @property
    def weights(self) -> Tensor:
        """``[B, K]``, each row adding to 1."""
        return torch.softmax(self._log_weights(), dim=1)

    def mean(self) -> Tensor:
        """Posterior mean ``[B, *event]``, float64."""
        return (self._column_weights() * self.x.double()).sum(1)

    def variance(self) -> Tensor:
        """Posterior variance of each element ``[B, *event]``, float64."""
        return (self._column_weights() * (self.x.double() - self.mean()[:, None]) ** 2).sum(1)

    def draw(self, num: int, seed: int = 0) -> Tensor:
        """``num`` equally weighted draws ``[B, num, *event]`` by systematic resampling."""
        ancestors = ops.resample(self._log_weights(), num=num, seed=seed)[0].long()  # [B, num]
        return self.x[torch.arange(self.x.shape[0], device=self.x.device)[:, None], ancestors]

    def _log_weights(self) -> Tensor:
        if self.log_weights is None:
            raise ValueError("samples: expected the weighted particles of TDS or FK, got samples without weights")
        return self.log_weights

    def _column_weights(self) -> Tensor:
        weights = self.weights
        return weights.reshape(*weights.shape, *(1,) * (self.x.ndim - 2))
