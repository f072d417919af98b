"""Finds the step and the function at which a run stopped being finite, without asking the device during the loop."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..ops._arguments import readable

__all__ = ["Watch"]


def _extremes(value: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value. On the CPU a finite sum says as much, in a quarter of the time: no value is NaN
    or infinite."""
    if readable(value):
        total = value.sum()
        if math.isfinite(total):
            return total, total
    return torch.aminmax(value)


class Watch:
    """Notes of what functions returned in each step. `report` reads them, once, after the loop."""

    def __init__(self) -> None:
        self._labels: list[tuple[int, str, str]] = []  # step, function, kind of note
        self._pairs: list[tuple[Tensor, Tensor]] = []  # lowest and highest value; twice a flag, or the number dropped
        self._order: list[int] = []  # of `numbers`, which are sorted by dtype

    def finite(self, i: int, function: str, value: Tensor) -> None:
        """Note that ``value`` came from ``function`` in step ``i`` and must be finite."""
        self._labels.append((i, function, "finite"))
        self._pairs.append(_extremes(value.detach()))

    def flag(self, i: int, function: str, device: torch.device) -> Tensor:
        """The same of the ``model_output`` of `reverse_step`, whose ``not_finite`` this is: no pass over the value."""
        flags = torch.zeros(3, dtype=torch.int32, device=device)
        self._labels.append((i, function, "flag"))
        self._pairs.append((flags[1],) * 2)
        return flags

    def log_prob(self, i: int, function: str, value: Tensor) -> None:
        """The same for log-densities, where ``-inf`` (a dead particle) is allowed."""
        self._labels.append((i, function, "log_prob"))
        self._pairs.append(_extremes(value.detach()))

    def dropped(self, i: int, function: str, mask: Tensor) -> None:
        """Note the particles that get weight 0 since ``function`` returned NaN for them in step ``i``."""
        self._labels.append((i, function, "dropped"))
        self._pairs.append((mask.sum(),) * 2)

    def clear(self) -> None:
        self._labels.clear()
        self._pairs.clear()

    def numbers(self) -> Tensor:
        """All that has been noted, as one tensor on the device. The labels stay, for `report`."""
        values = [value for pair in self._pairs for value in pair]
        self._pairs.clear()
        dtypes = dict.fromkeys(value.dtype for value in values)  # each is one kernel, where each value would be one
        places = [[i for i, value in enumerate(values) if value.dtype == dtype] for dtype in dtypes]
        self._order = [i for group in places for i in group]
        return torch.cat([torch.stack([values[i] for i in group]).double() for group in places])

    def report(self, numbers: Tensor | None = None, stacklevel: int = 3) -> bool:
        """Raise for the first value that was not finite; warn of dropped particles, and say whether there are any.
        ``numbers``: what `numbers` returned, which a captured loop makes anew in every replay."""
        if not self._labels:
            return False
        numbers = self.numbers() if numbers is None else numbers
        values = [value for _, value in sorted(zip(self._order, numbers.tolist(), strict=True))]
        dropped = []
        for (i, function, kind), pair in zip(self._labels, zip(values[::2], values[1::2], strict=True), strict=True):
            if kind == "dropped":
                dropped.append((i, function, int(pair[0])))
                continue
            if kind == "flag":
                if pair[0]:
                    raise FloatingPointError(f"{function}: expected finite values, got NaN or infinity at step {i}")
                continue
            bad = [v for v in pair if not math.isfinite(v) and not (kind == "log_prob" and v == -math.inf)]
            if bad:
                what = "NaN" if any(map(math.isnan, bad)) else "an infinite value"
                raise FloatingPointError(f"{function}: expected finite values, got {what} at step {i}")
        found = [note for note in dropped if note[2]]
        if not found:
            return False
        i, function, _ = found[0]
        warnings.warn(
            f"{function}: returned NaN for {sum(n for *_, n in found)} particles, first at step {i}. They got weight 0",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
        return True
