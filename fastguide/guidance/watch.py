"""Finds the step and the function at which a run stopped being finite, without asking the device during the loop."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

__all__ = ["Watch"]


class Watch:
    """Notes of what functions returned in each step. `report` reads them, once, after the loop."""

    def __init__(self) -> None:
        self._labels: list[tuple[int, str, bool]] = []  # step, function, whether -inf is allowed
        self._ranges: list[tuple[Tensor, Tensor]] = []
        self._dropped: list[tuple[int, str, Tensor]] = []

    def finite(self, i: int, function: str, value: Tensor) -> None:
        """Note that ``value`` came from ``function`` in step ``i`` and must be finite."""
        self._labels.append((i, function, False))
        self._ranges.append(torch.aminmax(value.detach()))

    def log_prob(self, i: int, function: str, value: Tensor) -> None:
        """The same for log-densities, where ``-inf`` (a dead particle) is allowed."""
        self._labels.append((i, function, True))
        self._ranges.append(torch.aminmax(value.detach()))

    def dropped(self, i: int, function: str, mask: Tensor) -> None:
        """Note the particles that get weight 0 since ``function`` returned NaN for them in step ``i``."""
        self._dropped.append((i, function, mask.sum()))

    def report(self) -> bool:
        """Raise for the first value that was not finite; warn of dropped particles, and say whether there are any."""
        if self._ranges:
            lows, highs = (torch.stack([r[k].double() for r in self._ranges]).tolist() for k in (0, 1))
            self._check(lows, highs)
        if self._dropped:
            counts = torch.stack([count for _, _, count in self._dropped]).tolist()
            found = [(i, f, n) for (i, f, _), n in zip(self._dropped, counts, strict=True) if n]
            if found:
                i, function, _ = found[0]
                warnings.warn(
                    f"{function}: returned NaN for {sum(n for *_, n in found)} particles, first at step {i}. "
                    "They got weight 0",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return True
        return False

    def _check(self, lows: list[float], highs: list[float]) -> None:
        for (i, function, dead_allowed), low, high in zip(self._labels, lows, highs, strict=True):
            bad = [v for v in (low, high) if not math.isfinite(v) and not (dead_allowed and v == -math.inf)]
            if bad:
                what = "NaN" if any(map(math.isnan, bad)) else "an infinite value"
                raise FloatingPointError(f"{function}: expected finite values, got {what} at step {i}")
