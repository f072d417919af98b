"""Finds the step and the function at which a run stopped being finite, without waiting for the device in the loop."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._arguments import readable
from ..schedules import Level

__all__ = ["STATE", "Watch"]

_FLAGS = 512  # made at a time
_LARGE_START = 0.5  # standard deviations of the noise at the first level
STATE = "state"  # blamed where a step overflowed: its inputs were finite

# The order of computation within a step: the earliest function is blamed, since later values follow from it.
_ORDER = (STATE, "net", "unconditional", "x0_hat")


class _Note(NamedTuple):
    step: int
    functions: tuple[str, ...]  # one name for all values, or one for each
    kind: str
    values: tuple[Tensor, ...]  # on the device

    def report(self, numbers: list[float]) -> tuple[str, str] | None:
        """The first function whose value was not finite, and what the value was; None where all is well."""
        if self.kind == "flags":
            found = [function for function, number in zip(self.functions, numbers, strict=True) if number]
            return (found[0], "NaN or infinity") if found else None
        allowed = -math.inf if self.kind == "log_prob" else 0.0
        bad = [number for number in numbers if not math.isfinite(number) and number != allowed]
        if not bad:
            return None
        return self.functions[0], "NaN" if any(map(math.isnan, bad)) else "an infinite value"


def _extremes(value: Tensor) -> tuple[Tensor, ...]:
    """The lowest and the highest value.

    On the CPU a finite sum says the same in a quarter of the time: no value is NaN or infinite.
    """
    if readable(value):
        total = value.sum()
        if math.isfinite(total):
            return (total,)
    return torch.aminmax(value)


class Watch:
    """Notes on what functions returned in each step. `report` reads them once, after the loop."""

    def __init__(self) -> None:
        self._notes: list[_Note] = []
        self._cleared: Tensor | None = None  # flags that nobody has yet
        self._order: list[int] = []  # the order of the values in `numbers`, which groups them by dtype

    def finite(self, i: int, function: str, value: Tensor) -> None:
        """Note that ``value`` came from ``function`` in step ``i`` and must be finite."""
        self._notes.append(_Note(i, (function,), "finite", _extremes(value.detach())))

    def flags(self, i: int, device: torch.device, *functions: str) -> Tensor:
        """As `finite`, without a pass over the values: flags for the ``not_finite`` of the operation that reads them.

        ``functions`` names the source of each input, in order.
        """
        number = len(functions)
        if device.type == "cpu":
            flags = torch.zeros(number, dtype=torch.int32, device=device)
        else:  # some of many, which one launch has cleared
            if self._cleared is None or len(self._cleared) < number:
                self._cleared = torch.zeros(_FLAGS, dtype=torch.int32, device=device)
            flags, self._cleared = self._cleared[:number], self._cleared[number:]
        self._notes.append(_Note(i, functions, "flags", (flags,)))
        return flags

    def log_prob(self, i: int, function: str, value: Tensor) -> None:
        """As `finite`, for log-densities, where ``-inf`` (a dead particle) is allowed."""
        self._notes.append(_Note(i, (function,), "log_prob", _extremes(value.detach())))

    def dropped(self, i: int, function: str, mask: Tensor) -> None:
        """Note the particles that get weight 0 because ``function`` returned NaN for them in step ``i``."""
        self._notes.append(_Note(i, (function,), "dropped", (mask.sum(),)))

    def start(self, level: Level, x0_hat: Tensor) -> None:
        """Note the norm of the predicted data ``[n, *event]`` at the first level, against the noise there.

        `report` warns where it is not small: a start from the prior's noise has another mean then.
        """
        square = x0_hat.detach().flatten(1).square().sum(1, dtype=torch.float64).mean()
        self._notes.append(_Note(0, ("start",), "start", (square.sqrt() * (level.alpha / level.sigma),)))

    def clear(self) -> None:
        self._notes.clear()
        self._cleared = None  # a graph must clear its own

    def numbers(self) -> Tensor:
        """All notes as one tensor on the device. Their names stay here, for `report`."""
        values = [value for note in self._notes for value in note.values]
        dtypes = dict.fromkeys(value.dtype for value in values)  # one kernel per dtype, not one per value
        places = [[i for i, value in enumerate(values) if value.dtype == dtype] for dtype in dtypes]
        self._order = [i for group in places for i in group]
        return torch.cat([torch.cat([values[i].reshape(-1) for i in group]).double() for group in places])

    def report(self, numbers: Tensor | None = None, stacklevel: int = 3) -> bool:
        """Raise for the first value that was not finite, and warn of the others. Return whether particles were dropped.

        ``numbers`` is what `numbers` returned; a captured loop computes it anew in every replay.
        """
        if not self._notes:
            return False
        numbers = self.numbers() if numbers is None else numbers
        sizes = [value.numel() for note in self._notes for value in note.values]
        parts = numbers.cpu().split([sizes[i] for i in self._order])
        values = iter(part.tolist() for _, part in sorted(zip(self._order, parts, strict=True), key=lambda p: p[0]))
        failures, dropped, size = [], [], 0.0
        for note in self._notes:
            found = [number for _ in note.values for number in next(values)]
            if note.kind == "dropped":
                dropped.append((note, int(found[0])))
            elif note.kind == "start":
                size = found[0]
            elif failure := note.report(found):
                failures.append((note.step, *failure))
        if failures:
            rank = {function: k for k, function in enumerate(_ORDER)}
            step, function, what = min(failures, key=lambda f: (f[0], rank.get(f[1], len(rank))))
            if function == STATE:  # the step before made it
                where = f"at step {step - 1}" if step else "in the prior's noise"
                raise FloatingPointError(
                    f"x: expected finite values, got {what} {where}. It overflowed: its inputs were "
                    "finite. Less guidance may help, or a wider dtype"
                )
            raise FloatingPointError(f"{function}: expected finite values, got {what} at step {step}")
        if size > _LARGE_START:
            warnings.warn(
                f"start: the data shift x_T by {size:.2g} standard deviations of its noise at the first level, and the "
                "prior's noise has mean 0. Weights and evidence are then those of another prior. start='matched' or a "
                "schedule with more noise at the start helps",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
        if not any(number for _, number in dropped):
            return False
        note = next(note for note, number in dropped if number)
        warnings.warn(
            f"{note.functions[0]}: returned NaN for {sum(number for _, number in dropped)} particles, first at step "
            f"{note.step}. They got weight 0",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
        return True
