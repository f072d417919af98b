"""`Samples`, the result of `fastguide.sample`."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import arguments, ops
from .ancestry import effective_number
from .arguments import flag, got
from .plots import Plots

__all__ = ["Samples"]

_TENSORS = ("x", "log_weights", "ess", "log_evidence", "log_evidence_error", "ancestors", "first_ancestors")
_STREAM_DRAW = 5  # a stream of its own, since draw may be given the seed of the run
_ROUNDING = 1e-12  # relative error of a sum of weights; a quantile's share that is missed by less counts as reached


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """The result of `sample`.

    - TDS and FK: ``x`` is ``[B, K, *event]``, and each particle has a weight. Nothing is resampled at the end.
    - The other methods with ``samples_per_observation=n``: ``x`` is ``[B, n, *event]``, with equal weights.
    - The other methods without it: ``x`` is ``[B, *event]``, one sample per observation. One sample has no mean of its
      own, so `mean`, `variance`, `quantile`, `interval`, `draw`, `weights` and `to_arviz` raise ValueError.

    Particles of weight 0 (``-inf``) count nowhere, whatever their ``x``.

    Args:
        x: The samples.
        log_weights: ``[B, K]`` float64, unnormalised. None without particles, as are the next five.
        ess: ``[steps + 1, B]`` float64, the effective sample size before each step and of the final weights.
        log_evidence: ``[B]`` float64, the log of the mean weight. For TDS, and FK with a likelihood, it estimates ``log
            p(y)``. For FK with a reward it estimates ``log E[exp(strength * r(x_0))]`` under the prior.
        log_evidence_error: ``[B]`` float64, an estimate of the standard error of ``log_evidence`` from the ancestry of
            this one run. It says nothing of the error that comes from few steps, see `fastguide.compare_steps`. It is
            good where 20 or more of the first ancestors count, see `effective_ancestors`. **It is too small where fewer
            than 10 do**: it never exceeds 1, and sees no region that the run has missed. There, compare runs with other
            seeds. NaN where the estimate of the variance is negative, and with one particle.
        ancestors: ``[steps, B, K]`` int32, the particle that each one continues; only with ``keep_ancestors=True``.
        first_ancestors: ``[B, K]`` int32, the particle at the start that each one descends from.
        seed: The seed of the noise, one for all or one for each observation.
        grouped: Whether ``x`` has several samples of each observation.
        method: The class name of the guidance.
        times: The times of the levels visited, in the schedule's own time. ``x`` is at the last.

    Raises:
        TypeError: A field is not a tensor, or ``grouped`` is not a bool.
        ValueError: ``x`` or ``log_weights`` has the wrong shape.

    Source:
        Lee and Whiteley 2018 for ``log_evidence_error``, which extends their estimate to resampling that is not
        multinomial.
    """

    x: Tensor
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    log_evidence: Tensor | None = None
    log_evidence_error: Tensor | None = None
    ancestors: Tensor | None = None
    first_ancestors: Tensor | None = None
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
        if self.first_ancestors is not None:
            parts.append(f"ancestors={_range(self.effective_ancestors)}")
        if self.log_evidence is not None:
            parts.append(f"log_evidence={_range(self.log_evidence)}")
        if self.log_evidence_error is not None:
            parts.append(f"error={_range(self.log_evidence_error)}")
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

    @property
    def effective_ancestors(self) -> Tensor:
        """How many of the first particles the result descends from, ``[B]`` float64, between 1 and K.

        It is ``1 / sum_e S_e^2``, where ``S_e`` is the total weight of the descendants of first particle ``e``. The
        samples of a run with a handful are nearly copies in everything that early steps decide: their variance is too
        small, and so is ``log_evidence_error``.

        Raises:
            ValueError: The samples are not those of a particle method, or a row has no finite largest weight.
        """
        if self.first_ancestors is None:
            raise ValueError("effective_ancestors: expected samples of TDS or FK, got some without first_ancestors")
        return effective_number(self.first_ancestors, self.weights)

    @property
    def plot(self) -> Plots:
        """Pictures of the run and of the samples, see `fastguide.plots.Plots`: ``out.plot.ess()``. Needs matplotlib."""
        return Plots(self)

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
        x, _, sums = self._sorted("quantile")
        total, found = sums[:, -1:], []
        for share in shares.flatten().tolist():
            index = (sums < total * (share - _ROUNDING)).sum(1, keepdim=True)
            found.append(x.gather(1, index)[:, 0])
        if shares.ndim == 0:
            return found[0]
        return torch.stack(found) if found else x.new_empty((0, *total[:, 0].shape))

    def interval(self, level: float = 0.9, *, narrowest: bool = False) -> Tensor:
        """Credible intervals of each element alone: ``low, high = out.interval(0.9)``.

        An interval includes its ends. It has at least the share ``level`` of all weight, if rounding errors of 1e-12
        are left out. With few samples it has more than that.

        Args:
            level: The share of the weight, in ``(0, 1)``; 0.9 by default.
            narrowest: False takes equal tails: the quantiles ``(1 - level) / 2`` and ``(1 + level) / 2``. True takes
                the narrowest interval between two samples. That is the interval of highest density where the density
                has one peak. With several peaks, the set of highest density may be several intervals, and this is one.

        Returns:
            ``[2, B, *event]``, the lower and the upper ends, in the dtype of ``x``.

        Raises:
            TypeError: ``level`` is not a number, or ``narrowest`` is not a bool.
            ValueError: ``level`` is outside ``(0, 1)``, there is one sample per observation, or a row has no finite
                largest weight.
        """
        level = arguments.number("level", level, above=0.0, below=1.0)
        if not flag("narrowest", narrowest):
            return self.quantile([0.5 - 0.5 * level, 0.5 + 0.5 * level])
        x, weights, sums = self._sorted("interval")
        needed = sums - weights + sums[:, -1:] * (level - _ROUNDING)  # the sum at the end of an interval from each
        last = torch.searchsorted(sums.movedim(1, -1).contiguous(), needed.movedim(1, -1).contiguous()).movedim(-1, 1)
        ends = x.gather(1, last.clamp(max=x.shape[1] - 1))
        widths = (ends.double() - x.double()).masked_fill(last == x.shape[1], math.inf)
        best = widths.argmin(1, keepdim=True)
        return torch.stack([x.gather(1, best)[:, 0], ends.gather(1, best)[:, 0]])

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

    def numpy(self) -> dict[str, np.ndarray]:
        """The tensors as numpy arrays: ``np.savez("run.npz", **out.numpy())`` writes them to a file.

        An array has the dtype of its tensor, but numpy has no bfloat16: such an ``x`` becomes float32, which holds the
        same values. As with ``Tensor.numpy``, arrays share the memory of tensors on the CPU. Those on a GPU are copied.

        Returns:
            ``x``, and each tensor among the fields that is not None, by its name. Where there are several samples of
                each observation, also the normalised ``weights`` ``[B, K]``, for
                ``np.average(x[b], axis=0, weights=weights[b])``.

        Raises:
            ValueError: A row has no finite largest weight.
        """
        found = {name: _array(t) for name in _TENSORS if (t := getattr(self, name)) is not None}
        if self.grouped:
            found["weights"] = _array(self.weights)
        return found

    def to_pandas(self, max_elements: int = 1024) -> Any:
        """A data frame with one row for each observation and sample, and one column for each element of the event.

        Args:
            max_elements: The most columns of elements, at least 1; 1024 by default. A larger event is an error, since a
                frame of so many columns is slow.

        Returns:
            A ``pandas.DataFrame``. Its columns are ``observation``, ``sample`` (both from 0), ``weight`` (those of an
                observation add up to 1) and the elements: ``x[0]``, ``x[1]``, ... for vectors, ``x[0, 0]``, ``x[0,
                1]``, ... for matrices. Elements have the dtype that `numpy` gives them.

        Raises:
            ValueError: The event has more than ``max_elements`` elements, or a row has no finite largest weight.
            ImportError: pandas is not installed.
        """
        max_elements = arguments.integer("max_elements", max_elements, 1)
        rows = self.x.shape[:2] if self.grouped else (self.x.shape[0], 1)
        event = self.x.shape[2:] if self.grouped else self.x.shape[1:]
        if math.prod(event) > max_elements:
            raise ValueError(
                f"max_elements: expected at least {math.prod(event)}, one for each element of an event of shape "
                f"{list(event)}, got {max_elements}; a frame suits small events, and numpy() takes any"
            )
        pandas = _imported("pandas", "to_pandas")
        names = [f"x[{', '.join(map(str, index))}]" if index else "x" for index in np.ndindex(*event)]
        frame = pandas.DataFrame(_array(self.x).reshape(math.prod(rows), math.prod(event)), columns=names)
        frame.insert(0, "observation", np.repeat(np.arange(rows[0]), rows[1]))
        frame.insert(1, "sample", np.tile(np.arange(rows[1]), rows[0]))
        frame.insert(2, "weight", _array(self.weights).reshape(-1) if self.grouped else 1.0)
        return frame

    def to_arviz(self, num: int | None = None, seed: int = 0) -> Any:
        """The samples for ArviZ, which knows no weights: weighted particles become equally weighted draws by `draw`.

        A run is one chain, since its particles are not independent. To compare runs with other seeds, join them:
        ``arviz.concat(a.to_arviz(), b.to_arviz(), dim="chain")`` with ArviZ before version 1, and
        ``xarray.concat([a.to_arviz(), b.to_arviz()], dim="chain")`` from then on. Draws of one particle stand side by
        side, so ArviZ counts them as correlated, as it should.

        Args:
            num: Number of draws, at least 1. None takes K, or without weights the samples as they are.
            seed: The seed of `draw`; 0 by default.

        Returns:
            With ArviZ before version 1 an ``arviz.InferenceData``, else an ``xarray.DataTree``. The group ``posterior``
                has ``x`` ``[chain, draw, observation, x_dim_0, x_dim_1, ...]``. With particles, ``sample_stats`` has
                ``ess`` ``[chain, step, observation]``, and ``log_evidence``, ``log_evidence_error`` and
                ``effective_ancestors`` ``[chain, observation]``. Dtypes are those of `numpy`.

        Raises:
            ValueError: ``num`` or ``seed`` is outside its range, there is one sample per observation, or a row has no
                finite largest weight.
            ImportError: ArviZ is not installed.
        """
        self._check_grouped("to_arviz")
        if num is None and self.log_weights is None:
            x = self.x
        else:
            x = self.draw(self.x.shape[1] if num is None else num, seed)
        arviz, xarray = _imported("arviz", "to_arviz"), _imported("xarray", "to_arviz")
        dims = ("chain", "draw", "observation", *(f"x_dim_{i}" for i in range(x.ndim - 2)))
        groups: dict[str, dict[str, Any]] = {"posterior": {"x": (dims, _array(x.transpose(0, 1))[None])}}
        stats = {"log_evidence": self.log_evidence, "log_evidence_error": self.log_evidence_error, "ess": self.ess}
        if self.first_ancestors is not None:
            stats["effective_ancestors"] = self.effective_ancestors
        for name, values in stats.items():
            if values is not None:
                dims = ("chain", "observation") if values.ndim == 1 else ("chain", "step", "observation")
                groups.setdefault("sample_stats", {})[name] = (dims, _array(values)[None])
        facts = {"inference_library": "fastguide", "method": self.method, "seed": str(self.seed)}
        sets = {}
        for group, variables in groups.items():
            data = xarray.Dataset(variables, attrs=facts)
            sets[group] = data.assign_coords({dim: np.arange(size) for dim, size in data.sizes.items()})
        before_1 = arviz.__version__.startswith("0.")  # from 1 on, arviz.InferenceData is another class
        return arviz.InferenceData(**sets) if before_1 else xarray.DataTree.from_dict(sets)

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

    def _sorted(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Each element's samples in order, their weights and the sums of these, all ``[B, K, *event]``."""
        weights = self._columns(self._relative_weights(name))
        x, order = self.x.masked_fill(weights == 0, math.inf).sort(1)  # dead particles last, so that q = 0 finds none
        weights = weights.expand_as(x).gather(1, order)
        return x, weights, weights.cumsum(1)

    def _average(self, name: str, values: Tensor) -> Tensor:
        """The weighted mean of ``values`` ``[B, K, *event]``."""
        weights = self._columns(self._relative_weights(name))
        return (weights * values.double().masked_fill(weights == 0, 0.0)).sum(1) / weights.sum(1)


def _range(values: Tensor) -> str:
    low, high = f"{values.min().item():.4g}", f"{values.max().item():.4g}"
    return low if low == high else f"{low} to {high}"


def _array(values: Tensor) -> np.ndarray:
    """As an array of numpy, which has no bfloat16."""
    values = values.detach().cpu().resolve_neg()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _imported(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{name}: expected {package} to be installed (pip install {package})") from error


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{name}: expected safetensors to be installed (pip install 'fastguide[demo]')") from error
    return safetensors
