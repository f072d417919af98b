"""How many steps are enough: the evidence at n, 2n, 4n, ... steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import got, integer
from .denoiser import Denoiser
from .sampling import sample

__all__ = ["StepComparison", "compare_steps"]


@dataclass(frozen=True, eq=False)
class StepComparison:
    """The evidence at several numbers of steps, as `compare_steps` returns it. ``print`` shows it as a table.

    Attributes:
        steps: The n numbers of steps, each twice the one before.
        log_evidence: ``[n, B]`` float64, the log of the mean evidence over the runs.
        error: ``[n, B]`` float64, its standard error.
        difference: ``[n - 1, B]`` float64, the log-evidence at ``steps[i + 1]`` minus that at ``steps[i]``.
        difference_error: ``[n - 1, B]`` float64, its standard error.
        within_error: ``[n - 1, B]`` bool, whether the difference is at most twice its standard error. Only a small
            error makes this a reason to stop: a large one hides any difference. False where an error is NaN.
    """

    steps: tuple[int, ...]
    log_evidence: Tensor
    error: Tensor

    @property
    def difference(self) -> Tensor:
        return self.log_evidence[1:] - self.log_evidence[:-1]

    @property
    def difference_error(self) -> Tensor:
        return torch.hypot(self.error[1:], self.error[:-1])

    @property
    def within_error(self) -> Tensor:
        return self.difference.abs() <= 2.0 * self.difference_error

    def __str__(self) -> str:
        lines = []
        for b in range(self.error.shape[1]):
            lines.append(f"observation {b}: steps, log-evidence, change from half the steps")
            for i, steps in enumerate(self.steps):
                line = f"{steps:6d} {self.log_evidence[i, b].item():10.3f} ± {self.error[i, b].item():.3f}"
                if i > 0:
                    change, error = self.difference[i - 1, b].item(), self.difference_error[i - 1, b].item()
                    verdict = "within" if self.within_error[i - 1, b] else "beyond"
                    line += f" {change:+9.3f} ± {error:.3f}, {verdict} the error"
                lines.append(line)
        return "\n".join(lines)


def compare_steps(
    prior: Denoiser,
    shape: Sequence[int],
    *,
    guidance: Any,
    steps: int = 50,
    doublings: int = 1,
    runs: int = 4,
    seed: int | None = None,
    **options: Any,
) -> StepComparison:
    """Estimate the evidence at ``steps``, ``2 steps``, ... steps, to see whether more steps would change it.

    Few steps make another prior of the network's, and more particles do not help. Where the evidence at ``2n`` steps is
    that at ``n``, ``n`` steps were enough.

    Args:
        prior: As for `fastguide.sample`.
        shape: As for `fastguide.sample`.
        guidance: A `TDS` or `FK` object.
        steps: The smallest number of steps, at least 1; 50 by default.
        doublings: How often it is doubled, 1 to 30; 1 by default.
        runs: Runs at each number of steps, each with a seed of its own, 1 to a million; 4 by default. The error is that
            of one run over ``sqrt(runs)``. That of one run is the larger of the standard deviation of their
            log-evidences, which a few runs may make too small by chance, and the root mean square of
            ``Samples.log_evidence_error``, which is too small where few first ancestors are left. With ``runs=1`` there
            is only the second.
        seed: The seed of the first run, an integer in ``[0, 2^64)``; the others count on from it. None draws one from
            torch's default generator.
        **options: Other arguments of `fastguide.sample`, such as ``eta``, ``spacing``, ``dtype`` or ``chunk_size``.

    Returns:
        The comparison.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, ``seed`` is a list, or ``guidance`` has no particles.
        FloatingPointError: As for `fastguide.sample`.
    """
    if not hasattr(guidance, "particles"):
        raise ValueError(f"guidance: expected a TDS or FK object, which estimates the evidence, got {got(guidance)}")
    steps, doublings = integer("steps", steps, 1), integer("doublings", doublings, 1, 31)
    runs = integer("runs", runs, 1, 1 << 20)
    first = int(torch.randint((1 << 63) - 1, (), device="cpu")) if seed is None else integer("seed", seed, 0, 1 << 64)
    numbers = tuple(steps << i for i in range(doublings + 1))
    estimates: list[Tensor] = []
    errors: list[Tensor] = []
    for i, number in enumerate(numbers):
        found: list[tuple[Tensor, Tensor]] = []
        for run in range(runs):
            own = (first + i * runs + run) % (1 << 64)
            out = sample(prior, shape, guidance=guidance, steps=number, seed=own, **options)
            assert out.log_evidence is not None and out.log_evidence_error is not None
            found.append((out.log_evidence, out.log_evidence_error))
        evidence, error = (torch.stack(rows) for rows in zip(*found, strict=True))  # [runs, B]
        estimates.append(torch.logsumexp(evidence, 0) - math.log(runs))
        error = error.square().mean(0).sqrt()
        if runs > 1:  # fmax: where one of the two is NaN, the other
            error = torch.fmax(error, evidence.std(0))
        errors.append(error / math.sqrt(runs))
    return StepComparison(numbers, torch.stack(estimates), torch.stack(errors))
