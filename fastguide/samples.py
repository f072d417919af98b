"""`Samples`, the result of `fastguide.sample`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import arguments, ops
from .arguments import flag, got

__all__ = ["Samples"]

_TENSORS = ("x", "log_weights", "ess", "log_evidence", "ancestors")
_STREAM_DRAW = 5  # a stream of its own, since draw may be given the seed of the run
_ROUNDING = 1e-12  # relative error of a sum of weights; a quantile's share that is missed by less counts as reached


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """The result of `sample`.

    - TDS and FK: ``x`` is ``[B, K, *event]``, and each particle has a weight. Nothing is resampled at the end.
    - The other methods with ``samples_per_observation=n``: ``x`` is ``[B, n, *event]``, with equal weights.
    - The other methods without it: ``x`` is ``[B, *event]``, one sample per observation. One sample has no mean of its
      own, so `mean`, `variance`, `quantile`, `draw` and `weights` raise ValueError.

    Particles of weight 0 (``-inf``) count nowhere, whatever their ``x``.

    Args:
        x: The samples.
        log_weights: ``[B, K]`` float64, unnormalised. None without particles, as are the next three.
        ess: ``[steps + 1, B]`` float64, the effective sample size before each step and of the final weights.
        log_evidence: ``[B]`` float64, the log of the mean weight. For TDS, and FK with a likelihood, it estimates ``log
            p(y)``. For FK with a reward it estimates ``log E[exp(strength * r(x_0))]`` under the prior.
        ancestors: ``[steps, B, K]`` int32, the particle that each one continues; only with ``keep_ancestors=True``.
        seed: The seed of the noise, one for all or one for each observation.
        grouped: Whether ``x`` has several samples of each observation.
        method: The class name of the guidance.
        times: The times of the levels visited, in the schedule's own time. ``x`` is at the last.

    Raises:
        TypeError: A field is not a tensor, or ``grouped`` is not a bool.
        ValueError: ``x`` or ``log_weights`` has the wrong shape.
    """

    x: Tensor
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    log_evidence: Tensor | None = None
    ancestors: Tensor | None = None
    seed: int | tuple[int, ...] | None = None
    grouped: bool = False
    method: str = ""
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in _TENSORS:
            if name == "x" or getattr(self, name) is not None:
                arguments.tensor(name, getattr(self, name))
        if self.x.ndim < 1 + flag("grouped", self.grouped):
            raise ValueError(f"x: expected shape [B, *event], or [B, K, *event] if grouped, got {list(self.x.shape)}")
        if self.log_weights is not None:
            if self.log_weights.shape != self.x.shape[:2]:
                raise ValueError(
                    f"log_weights: expected shape {list(self.x.shape[:2])}, one for each particle of x, "
                    f"got {list(self.log_weights.shape)}"
                )
            object.__setattr__(self, "grouped", True)

    def __repr__(self) -> str:
        parts = [self.method] if self.method else []
        parts.append(f"x={list(self.x.shape)} {str(self.x.dtype).removeprefix('torch.')}")
        if self.ess is not None:
            lowest = f"{self.ess.min().item():.4g}"
            parts.append(f"ess={_range(self.ess[-1])} of {self.x.shape[1]}, lowest {lowest}")
        if self.log_evidence is not None:
            parts.append(f"log_evidence={_range(self.log_evidence)}")
        if self.times is not None:
            parts.append(f"steps={len(self.times) - 1}")
        if self.seed is not None:
            parts.append(f"seed={self.seed}" if isinstance(self.seed, int) else f"seed={len(self.seed)} of them")
        return f"Samples({', '.join(parts)})"

    @property
    def weights(self) -> Tensor:
        """The normalised weights, ``[B, K]`` float64. Each row adds up to 1.

        Raises:
            ValueError: There is one sample per observation, or a row has no finite largest weight.
        """
        weights = self._relative_weights("weights")
        return weights / weights.sum(1, keepdim=True)

    def mean(self) -> Tensor:
        """The posterior mean.

        Returns:
            ``[B, *event]`` float64.

        Raises:
            ValueError: There is one sample per observation, or a row has no finite largest weight.
        """
        return self._average("mean", self.x)

    def variance(self) -> Tensor:
        """The posterior variance of each element: the weighted mean of ``(x - mean)^2``.

        It is not corrected for the number of samples.

        Returns:
            ``[B, *event]`` float64.

        Raises:
            ValueError: There is one sample per observation, or a row has no finite largest weight.
        """
        mean = self._average("variance", self.x)
        return self._average("variance", (self.x.double() - mean[:, None]) ** 2)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles of each element alone.

        The quantile is the smallest sample ``v`` of positive weight such that the samples ``<= v`` have at least the
        share ``q`` of all weight. This inverts the weighted empirical distribution function. With equal weights it is
        numpy's ``quantile(..., method="inverted_cdf")``. A share that misses ``q`` by at most 1e-12, as rounded sums
        may, counts as reached.

        Args:
            q: A number in ``[0, 1]``, or m of them.

        Returns:
            ``[B, *event]`` for a number, ``[m, B, *event]`` for m of them, in the dtype of ``x``.

        Raises:
            TypeError: ``q`` is not made of real numbers.
            ValueError: ``q`` is outside ``[0, 1]``, there is one sample per observation, or a row has no finite largest
                weight.
        """
        shares = arguments.real_array("q", q, "a number in [0, 1], or a row of them")
        if shares.ndim > 1 or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"q: expected a number in [0, 1], or a row of them, got {got(q)}")
        weights = self._columns(self._relative_weights("quantile"))
        x, order = self.x.masked_fill(weights == 0, math.inf).sort(1)  # dead particles last, so that q = 0 finds none
        sums = weights.expand_as(x).gather(1, order).cumsum(1)
        total, found = sums[:, -1:], []
        for share in shares.flatten().tolist():
            index = (sums < total * (share - _ROUNDING)).sum(1, keepdim=True)
            found.append(x.gather(1, index)[:, 0])
        if shares.ndim == 0:
            return found[0]
        return torch.stack(found) if found else x.new_empty((0, *total[:, 0].shape))

    def draw(self, num: int, seed: int = 0) -> Tensor:
        """Equally weighted draws, by systematic resampling.

        Args:
            num: Number of draws, at least 1.
            seed: An integer in ``[0, 2^64)``. Two calls with one seed return the same draws; 0 by default.

        Returns:
            ``[B, num, *event]``.

        Raises:
            ValueError: ``num`` or ``seed`` is outside its range, or there is one sample per observation.
        """
        log_weights = self.log_weights
        if log_weights is None:
            self._check_grouped("draw")
            log_weights = self.x.new_zeros(self.x.shape[:2], dtype=torch.float64)
        ancestors = ops.resample(
            log_weights, num=num, seed=arguments.integer("seed", seed, 0, 1 << 64), stream=_STREAM_DRAW
        )[0].long()  # [B, num]
        return self.x[torch.arange(self.x.shape[0], device=self.x.device)[:, None], ancestors]

    def save(self, path: str | os.PathLike) -> None:
        """Write all fields to a safetensors file, which `load` reads.

        Args:
            path: The file. An existing file is overwritten.

        Raises:
            TypeError: ``path`` is not a path.
            ImportError: safetensors is not installed.
        """
        path = arguments.path("path", path)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        # safetensors refuses tensors that share memory. So all are copied but x, which is usually the largest.
        tensors = {
            name: t.detach().contiguous().resolve_neg() if name == "x" else t.detach().clone().contiguous()
            for name, t in tensors.items()
            if t is not None
        }
        facts = {"seed": self.seed, "grouped": self.grouped, "method": self.method, "times": self.times}
        metadata = {"fastguide.Samples": json.dumps(facts)}
        _safetensors("save").torch.save_file(tensors, path, metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> Samples:
        """Read the samples that `save` wrote.

        Args:
            path: The file.
            device: Where the tensors go; the CPU by default.

        Returns:
            The samples.

        Raises:
            TypeError: ``path`` is not a path.
            ValueError: The file was not written by `save`, or ``device`` is not a device.
            ImportError: safetensors is not installed.
        """
        safetensors = _safetensors("load")
        path, place = arguments.path("path", path), str(arguments.torch_device("device", device))
        try:
            with safetensors.safe_open(path, framework="pt", device=place) as file:
                facts = json.loads((file.metadata() or {})["fastguide.Samples"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
            return Samples(**tensors, **found)
        except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path: expected a file that Samples.save wrote, got {path}: {type(error).__name__}: {error}"
            ) from error

    def _check_grouped(self, name: str) -> None:
        if not self.grouped:
            raise ValueError(
                f"{name}: expected several samples of each observation, got one (x is {list(self.x.shape)}); "
                "sample(..., samples_per_observation=n) draws n"
            )

    def _relative_weights(self, name: str) -> Tensor:
        """The weights ``[B, K]`` float64, scaled so that the largest of each row is 1."""
        self._check_grouped(name)
        if self.log_weights is None:
            return self.x.new_ones(self.x.shape[:2], dtype=torch.float64)
        log_weights = self.log_weights.double()
        largest = log_weights.amax(1, keepdim=True)
        bad = ~largest.isfinite()
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"log_weights: expected a finite largest one for each observation, got {largest[row].item()} for {row}"
            )
        return torch.exp(log_weights - largest)

    def _columns(self, weights: Tensor) -> Tensor:
        """``[B, K]`` reshaped to multiply ``x``."""
        return weights.reshape(*weights.shape, *(1,) * (self.x.ndim - 2))

    def _average(self, name: str, values: Tensor) -> Tensor:
        """The weighted mean of ``values`` ``[B, K, *event]``."""
        weights = self._columns(self._relative_weights(name))
        return (weights * values.double().masked_fill(weights == 0, 0.0)).sum(1) / weights.sum(1)


def _range(values: Tensor) -> str:
    low, high = f"{values.min().item():.4g}", f"{values.max().item():.4g}"
    return low if low == high else f"{low} to {high}"


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{name}: expected safetensors to be installed (pip install 'fastguide[demo]')") from error
    return safetensors
