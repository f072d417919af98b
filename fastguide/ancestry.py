"""The first ancestors of a run's particles, and the error of the evidence that follows from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Ancestry", "effective_number", "family_shares"]


class Ancestry:
    """Follows the first ancestors through a run, and estimates the variance of its evidence.

    Two particles of different families (of different first ancestors) behave as if they came from two runs. The share
    of such pairs therefore says how much the evidence would differ between runs (Lee & Whiteley 2018):

        variance of Z / Z^2 = 1 - (1 - sum_e S_e^2) / (1 - 1/K) * prod_r (1 - sum_k W_k^2) / (1 - sum_k (O_k / K)^2)

    ``S_e`` is the final weight of family ``e``. The product is over the resamplings: ``W_k`` are the weights before
    one, ``O_k`` the offspring after it. It takes back the pairs that a resampling makes siblings by chance. In the
    mean over multinomial resampling a factor is their ``K / (K - 1)``. Systematic, stratified and residual resampling
    make fewer siblings, so the factor is taken from what happened.

    Args:
        observations: B.
        particles: K.
        device: Where the run is.
    """

    def __init__(self, observations: int, particles: int, device: torch.device):
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self.first = torch.arange(particles, dtype=torch.int32, device=device).repeat(observations, 1)  # [B, K]
        # For each step, [B]: the effective sample size before it, and the sum of the squared offspring after it. The
        # logarithms of the product are taken once, at the end: on a GPU they would take seven launches in each step.
        self._ess: list[Tensor] = []
        self._squares: list[Tensor] = []

    def follow(self, ancestors: Tensor, ess: Tensor) -> None:
        """Go on over one step.

        Args:
            ancestors: ``[B, K]`` of the step. A row whose resampling kept each particle once looks like one that was
                not resampled. With a threshold of at most half the particles that does not happen, and above it little
                is missed.
            ess: ``[B]``, the effective sample size before it.
        """
        index = ancestors.long()
        counts = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
        counts.scatter_add_(1, index, self._one.expand_as(counts))  # whole numbers: exact in any order
        self._ess.append(ess)
        self._squares.append(counts.square_().sum(1, dtype=torch.float64))
        self.first = self.first.gather(1, index)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, for `load`."""
        return {"first": self.first, "ess": self._stacked(self._ess), "squares": self._stacked(self._squares)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        self.first = tensors["first"]
        self._ess, self._squares = list(tensors["ess"]), list(tensors["squares"])

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """``[steps, B]`` float64."""
        none = torch.zeros((0, len(self.first)), dtype=torch.float64, device=self.first.device)
        return torch.stack(rows) if rows else none

    def _log_factor(self) -> Tensor:
        """The logarithm of the product, ``[B]``."""
        ess, squares, particles = self._stacked(self._ess), self._stacked(self._squares), self.first.shape[1]
        factors = torch.log1p(-1.0 / ess) - torch.log1p(-squares / particles**2)
        return torch.where(squares == particles, 0.0, factors).sum(0)

    def error(self, log_weights: Tensor) -> Tensor:
        """The standard error of the log-evidence ``[B]``, given the final weights ``[B, K]``.

        NaN where the estimate of the variance is negative, and with one particle.
        """
        particles = log_weights.shape[1]
        if particles == 1:
            return torch.full(log_weights.shape[:1], math.nan, dtype=torch.float64, device=log_weights.device)
        shares = family_shares(self.first, torch.softmax(log_weights, 1))
        pairs = (1.0 - shares.square().sum(1)).clamp(min=0.0)  # of different families
        one_family = (self.first == self.first[:, :1]).all(1)
        kept = torch.exp(torch.log(pairs) + self._log_factor() - math.log1p(-1.0 / particles)).masked_fill(
            one_family, 0.0
        )
        variance = 1.0 - kept
        return variance.masked_fill(variance < -1e-9, math.nan).clamp(min=0.0).sqrt()


def effective_number(first: Tensor, weights: Tensor) -> Tensor:
    """The effective number of first ancestors ``[B]``; ``weights`` ``[B, K]`` add up to 1 in each row."""
    return 1.0 / family_shares(first, weights).square().sum(1)


def family_shares(first: Tensor, weights: Tensor) -> Tensor:
    """The total weight of the descendants of each first particle; all are ``[B, K]``."""
    return torch.zeros_like(weights).scatter_add_(1, first.long(), weights)
