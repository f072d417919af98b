"""Pictures of `Samples`: ``out.plot.ess()`` and others. Only a call needs matplotlib, not the import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from . import arguments
from .arguments import got

if TYPE_CHECKING:
    from .samples import Samples

__all__ = ["Plots"]

_GRID = 8  # elements in a pair plot; more are not legible


class Plots:
    """The pictures of a `Samples`, as ``out.plot`` gives them: ``out.plot.ess().figure.savefig("ess.png")``.

    Each method draws one observation into the ``ax`` that it gets, or into a new figure, and returns what it drew into.
    The methods copy what they draw to the CPU.

    Args:
        samples: The samples.
    """

    def __init__(self, samples: Samples):
        self._samples = samples

    def ess(self, observation: int = 0, *, ess_threshold: float | None = None, ax: Any = None) -> Any:
        """The effective sample size and the effective number of first ancestors over the steps, on a logarithmic axis.

        ``ess[i]`` is drawn at ``i``: before step ``i``, and of the final weights at the last. The ancestors are drawn
        as a line with ``keep_ancestors=True``. The line counts the descendants of each first particle after ``i`` steps
        and ignores the weights, which `Samples` has at the end only. `Samples.effective_ancestors`, which has the
        weights, is a point at the end.

        Args:
            observation: Which observation, from 0.
            ess_threshold: The ``ess_threshold`` of the guidance, in ``[0, 1]``, drawn as a line at that share of K.
                None draws no line.
            ax: The axes. None makes a figure.

        Returns:
            The ``matplotlib.axes.Axes``.

        Raises:
            ValueError: The samples are not those of a particle method, or an argument is outside its range.
            ImportError: matplotlib is not installed.
        """
        out, b = self._samples, self._observation(observation)
        if out.ess is None or out.first_ancestors is None:
            raise ValueError("ess: expected samples of TDS or FK, got some without ess and first_ancestors")
        if ess_threshold is not None:
            ess_threshold = arguments.number("ess_threshold", ess_threshold, low=0.0, high=1.0)
        particles, ess = out.x.shape[1], _array(out.ess[:, b])
        ax = _axes(ax)
        ax.plot(np.arange(len(ess)), ess, color="C0", label="effective sample size")
        if out.ancestors is not None:
            ax.plot(_ancestors_by_count(_array(out.ancestors[:, b])), color="C1", label="first ancestors, by count")
        final = out.effective_ancestors[b].item()
        ax.plot([len(ess) - 1], [final], "o", color="C1", label=f"first ancestors, weighted: {final:.3g}")
        if ess_threshold is not None:
            ax.axhline(ess_threshold * particles, color="gray", ls=":", label="resampled below")
        ax.set(title=f"{out.method or 'samples'}, {particles} particles", xlabel="step", ylabel="particles")
        ax.set(yscale="log", ylim=(0.9, 1.15 * particles))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize="small")
        return ax

    def genealogy(self, observation: int = 0, *, max_lines: int = 200, ax: Any = None) -> Any:
        """The lineages of the final particles, from their first ancestors on.

        Relatives are side by side, so that no two lines cross, and an ancestor is amid its descendants. A colour is a
        first ancestor; ten colours repeat. Particles that died have no line, nor has a final particle of weight 0.

        Args:
            observation: Which observation, from 0.
            max_lines: The most final particles that get a line, at least 1; 200 by default. Of more, every n-th in the
                order of the picture gets one, so that a family keeps its share of the lines;
                small families then show no branches.
            ax: The axes. None makes a figure.

        Returns:
            The ``matplotlib.axes.Axes``.

        Raises:
            ValueError: The samples have no ``ancestors``, or an argument is outside its range.
            ImportError: matplotlib is not installed.
        """
        out, b = self._samples, self._observation(observation)
        max_lines = arguments.integer("max_lines", max_lines, 1)
        if out.ancestors is None:
            raise ValueError(
                "genealogy: expected samples with ancestors, got some without; sample(..., keep_ancestors=True) of TDS "
                "or FK keeps them"
            )
        paths = _paths(_array(out.ancestors[:, b]))[:, _array(out.weights[b]) > 0]
        alive = paths.shape[1]
        paths = paths[:, np.lexsort(paths[::-1])]  # by the first ancestor, then by the next one, and so on
        chosen = np.linspace(0, alive - 1, min(alive, max_lines)).round().astype(int)
        families = len(np.unique(paths[0]))
        paths, rank = paths[:, chosen], chosen.astype(float)
        groups = [np.unique(level, return_inverse=True)[1] for level in paths]
        places = np.array([(np.bincount(g, rank) / np.bincount(g))[g] for g in groups])  # [steps + 1, lines]
        ax = _axes(ax)
        colours = np.unique(paths[0], return_inverse=True)[1] % 10
        ax.set_prop_cycle(color=_pyplot().cm.tab10(colours))
        ax.plot(places, lw=0.8)
        few = f"{len(chosen)} of " if len(chosen) < alive else ""
        kind = "first ancestor" if families == 1 else "first ancestors"
        ax.set(title=f"{few}{alive} final particles, {families} {kind}", xlabel="step", ylabel="final particle")
        ax.margins(x=0.02)
        ax.xaxis.get_major_locator().set_params(integer=True)
        return ax

    def marginals(
        self, elements: Sequence[Any] | None = None, observation: int = 0, *, truth: Tensor | None = None,
        bins: int = 40, ax: Any = None,
    ) -> Any:  # fmt: skip
        """Weighted histograms of some elements of ``x``: of each one alone, and of each pair.

        Args:
            elements: Indices of elements of the event, at most 8: integers for vectors, tuples for others. None takes
                all, where there are at most 8.
            observation: Which observation, from 0.
            truth: The true event, of the shape of the event, marked by a line. None marks nothing.
            bins: Number of bins, at least 1; 40 by default.
            ax: One axes for one element; an array ``[m, m]`` of them for m. None makes a figure.

        Returns:
            For one element the ``matplotlib.axes.Axes`` of its histogram, a density. For m of them an array ``[m, m]``:
                the histograms on the diagonal, and below it the weight in each cell of two elements. Above it is
                nothing.

        Raises:
            ValueError: There is one sample per observation, an element is not finite, an index is not that of an
                element, or an argument has another shape or is outside its range.
            ImportError: matplotlib is not installed.
        """
        out, b, bins = self._samples, self._observation(observation), arguments.integer("bins", bins, 1)
        weights = _array(out.weights[b])
        event = tuple(out.x.shape[2:])
        names: list[Any] = self._elements(elements, event)
        x = np.stack([_array(out.x[b][(slice(None), *index)]) for index in names])  # [m, K]
        marks = None if truth is None else [_array(self._event("truth", truth, event)[index]) for index in names]
        x = x[:, weights > 0]  # a dead particle may be anywhere
        if not np.isfinite(x).all():
            raise ValueError("marginals: expected finite samples, got NaN or infinite elements")
        weights = weights[weights > 0]
        number = len(names)
        axes = _grid(ax, number, number, 2.6, 2.4, sharex="col")
        for i, j in np.ndindex(number, number):
            cell = axes[i, j]
            if j > i:
                cell.set_axis_off()
                continue
            if i == j:
                cell.hist(x[i], bins, weights=weights, density=True, color="C0")
                cell.set_yticks([])
            else:
                cell.hist2d(x[j], x[i], bins, weights=weights, cmap="Blues", rasterized=True)
            if marks is not None:
                cell.axvline(marks[j], color="C3", lw=1)
                if i != j:
                    cell.axhline(marks[i], color="C3", lw=1)
            if i == number - 1:
                cell.set_xlabel(_name(names[j]))
            if j == 0:
                cell.set_ylabel(_name(names[i]) if i else "density")
        return axes[0, 0] if number == 1 else axes

    def pictures(
        self, observation: int = 0, *, y: Tensor | None = None, truth: Tensor | None = None, draws: int = 4,
        seed: int = 0, ax: Any = None,
    ) -> Any:  # fmt: skip
        """Images: the truth and the measurement where they are given, draws, the mean and the standard deviation.

        The truth, the draws and the mean share one scale, from their lowest to their highest value. The measurement has
        it too where its values lie within it or a quarter of its width beyond; else it has a scale of its own, and its
        title says so. The standard deviation has a colour bar; that of three channels is the root of their mean
        variance.

        Args:
            observation: Which observation, from 0.
            y: The measurement of the observation, ``[h, w]`` or ``[c, h, w]`` with 1 or 3 channels, of any size.
            truth: The true image, of the shape of the event.
            draws: Number of draws, at least 0; 4 by default. They are equally weighted, see `Samples.draw`.
            seed: The seed of the draws; 0 by default.
            ax: A row of axes, one for each image. None makes a figure.

        Returns:
            The array of ``matplotlib.axes.Axes``, one for each image, from left to right.

        Raises:
            ValueError: There is one sample per observation, ``x`` is not ``[B, K, c, h, w]`` with 1 or 3 channels or
                ``[B, K, h, w]``, or an argument has another shape or is outside its range.
            ImportError: matplotlib is not installed.
        """
        out, b = self._samples, self._observation(observation)
        draws = arguments.integer("draws", draws, 0)
        event = tuple(out.x.shape[2:])
        if not _is_image(event):
            raise ValueError(
                f"pictures: expected images [B, K, c, h, w] with 1 or 3 channels, or [B, K, h, w], got "
                f"{list(out.x.shape)}"
            )
        mean, variance = out.mean()[b], out.variance()[b]
        shown: list[tuple[str, np.ndarray]] = []
        if truth is not None:
            shown.append(("truth", _image(self._event("truth", truth, event))))
        measured = None
        if y is not None:
            arguments.tensor("y", y)
            if y.is_complex() or not _is_image(tuple(y.shape)):
                raise ValueError(
                    f"y: expected one real measurement [h, w] or [c, h, w] with 1 or 3 channels, got {got(y)}"
                )
            measured = _image(y)
        if draws:
            drawn = out.draw(draws, seed)[b]
            shown += [(f"draw {i + 1}", _image(drawn[i])) for i in range(draws)]
        shown.append(("mean", _image(mean)))
        deviation = _image((variance.mean(0) if variance.ndim == 3 else variance).sqrt())
        low = min(float(image.min()) for _, image in shown)
        high = max(float(image.max()) for _, image in shown)
        limits = {name: (low, high) for name, _ in shown}
        if measured is not None:
            spare, own = 0.25 * (high - low), (float(measured.min()), float(measured.max()))
            fits = low - spare <= own[0] and own[1] <= high + spare
            name = "measurement" if fits else "measurement\n(its own scale)"
            shown.insert(truth is not None, (name, measured))
            limits[name] = (low, high) if fits else own
        axes = _grid(ax, 1, len(shown) + 1, 1.6, 2.0)[0]
        for cell, (name, image) in zip(axes[:-1], shown, strict=True):
            lowest, highest = limits[name]
            if image.ndim == 3:
                image = ((image - lowest) / ((highest - lowest) or 1.0)).clip(0, 1)
            cell.imshow(image, vmin=lowest, vmax=highest, cmap="gray")
            cell.set_title(name, fontsize="medium")
        drawn_deviation = axes[-1].imshow(deviation, vmin=0, cmap="magma")
        axes[-1].set_title("standard\ndeviation", fontsize="medium")
        axes[-1].figure.colorbar(drawn_deviation, ax=axes[-1], shrink=0.7)
        for cell in axes:
            cell.set_xticks([])
            cell.set_yticks([])
        return axes

    def _observation(self, observation: int) -> int:
        return arguments.integer("observation", observation, 0, self._samples.x.shape[0])

    def _event(self, name: str, value: Any, event: tuple[int, ...]) -> Tensor:
        """``value`` if it has the shape of one event."""
        arguments.tensor(name, value)
        if tuple(value.shape) != event:
            raise ValueError(f"{name}: expected one event of shape {list(event)}, got {list(value.shape)}")
        return value

    def _elements(self, elements: Any, event: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The indices of the elements to draw."""
        if elements is None:
            if math.prod(event) > _GRID:
                raise ValueError(
                    f"elements: expected indices of at most {_GRID} elements for an event of shape {list(event)}, "
                    "got None"
                )
            return list(np.ndindex(*event))
        expected = f"at most {_GRID} indices of elements of an event of shape {list(event)}"
        if not isinstance(elements, Sequence) or isinstance(elements, str) or not 1 <= len(elements) <= _GRID:
            raise ValueError(f"elements: expected {expected}, got {got(elements)}")
        found = [index if isinstance(index, tuple) else (index,) for index in elements]
        for index in found:
            if len(index) != len(event) or not all(
                type(i) is int and 0 <= i < size for i, size in zip(index, event, strict=True)
            ):
                raise ValueError(f"elements: expected {expected}, got {got(elements)}")
        return found


def _array(values: Tensor) -> np.ndarray:
    """Float64, or the integers themselves."""
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def _image(values: Tensor) -> np.ndarray:
    """``[h, w]``, or ``[h, w, 3]`` for three channels."""
    array = _array(values)
    if array.ndim == 2:
        return array
    return array[0] if len(array) == 1 else array.transpose(1, 2, 0)


def _name(index: tuple[int, ...]) -> str:
    return f"x[{', '.join(map(str, index))}]" if index else "x"


def _paths(ancestors: np.ndarray) -> np.ndarray:
    """The particle that each final particle was before each step and at the end, ``[steps + 1, K]``."""
    lines = [np.arange(ancestors.shape[1])]
    for step in ancestors[::-1]:
        lines.append(step[lines[-1]])
    return np.array(lines[::-1])


def _ancestors_by_count(ancestors: np.ndarray) -> np.ndarray:
    """The effective number of first ancestors of equally weighted particles after 0, 1, ... steps, ``[steps + 1]``."""
    particles = ancestors.shape[1]
    first = np.arange(particles)
    found = [float(particles)]
    for step in ancestors:
        first = first[step]
        found.append(particles**2 / float((np.bincount(first).astype(float) ** 2).sum()))
    return np.array(found)


def _axes(ax: Any) -> Any:
    """``ax``, or the axes of a new figure."""
    return _pyplot().subplots(figsize=(6, 3.8), layout="constrained")[1] if ax is None else _checked(ax, 1, 1)[0, 0]


def _grid(ax: Any, rows: int, columns: int, width: float, height: float, **shared: Any) -> Any:
    """The axes of ``ax``, or of a new figure, ``[rows, columns]``. Width and height are those of a cell, in inches."""
    if ax is not None:
        return _checked(ax, rows, columns)
    size = (max(width * columns, 4.0), max(height * rows, 2.2))
    return _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)[1]


def _checked(ax: Any, rows: int, columns: int) -> Any:
    _pyplot()
    axes = np.asarray(ax, dtype=object)
    if axes.size != rows * columns or not all(hasattr(cell, "imshow") for cell in axes.flat):
        expected = "one matplotlib Axes" if rows * columns == 1 else f"{rows * columns} matplotlib Axes"
        raise ValueError(f"ax: expected None or {expected}, got {got(ax)}")
    return axes.reshape(rows, columns)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot: expected matplotlib to be installed (pip install 'fastguide[demo]')") from error
    return plt
