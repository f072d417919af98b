"""Error models ``p(y | x_0)`` around a forward model, each with a scale that may follow the noise level.

Shapes: ``y`` is ``[B, *measurement]``, or one row for all; ``x0`` is ``[n, *event]``; ``z = A x0`` is ``[n,
*measurement]``. Log-densities are ``[n]`` in float64 and keep every normalising constant. ``rows`` ``[n]`` (int64) is
the observation of each sample; None where ``y`` has one row, or sample ``i`` has row ``i``.

``scale`` is one of these:

- a positive number; `Gaussian` also takes 0;
- a tensor ``[*measurement]``, one number for each detector, or ``[B or 1, *measurement]``; dimensions may be 1. Not for
  `Poisson` and `Callable`;
- a function of the schedule's own time ``t`` that returns one of these.

Every particle method takes the scale at the clean time for its last weight: that is the scale of the exact model. The
clean time of a table of betas is -1. It is passed as a float, so that a list in ``lambda t: scales[t]`` raises an error
there instead of returning its last entry.

Complex ``y`` are kept as pairs of real numbers ``[B, *measurement, 2]``, and so is what the operator returns. The scale
is that of the real part and of the imaginary part. A tensor may have the shape of the pairs, or the shape of the
complex measurement, ``[*measurement]`` or ``[B or 1, *measurement]``, and then counts for both parts. In that form no
dimension may be replaced by 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable as Fn
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, foreign, ops
from .arguments import as_float, function, got, number
from .foreign import returned, without_autocast
from .operators import (
    Gram,
    Identity,
    LinearOperator,
    Operator,
    Pairs,
    gram_over_diagonal,
    mean_gram_diagonal,
    measure_gram,
    moved,
)
from .ops._arguments import STATE_DTYPES, Scalar
from .ops.log_prob_and_gradient.reference import POISSON_LEAST, POISSON_SHARE, log_factorials

__all__ = ["Callable", "Gaussian", "Laplace", "Likelihood", "Poisson", "StudentT"]

Scale = float | Tensor | Fn[[float], float | Tensor]

MOMENT_LIMIT = 16  # most measurements for covariance="moment", which takes one backward pass for each


class Likelihood:
    """What the error models share: the observation, the operator and the scale.

    Attributes:
        y: The observation, ``[B, *measurement]``; complex ones as pairs ``[B, *measurement, 2]``.
        operator: The forward model.
        scale: A number, a tensor or a function of the time, see `scale_at`.
    """

    _least_dimensions = 2  # of y
    _takes_tensors = True  # whether scale may be a tensor
    _takes_zero = False  # whether scale may be 0
    _complex = False  # whether y came as complex numbers and is kept as pairs
    has_y = True  # False for a `Callable` without y
    _rows: Tensor | None = None  # the observation of each sample, set by `at`
    _mean_diagonal: float | None = None  # mean diagonal of A A^T, estimated by `measure_spread`

    def __init__(self, y: Tensor, operator: Operator, scale: Scale):
        if isinstance(y, Tensor) and y.is_complex():
            self._complex = True
            operator = Pairs(operator) if isinstance(operator, Operator) else operator
        y = self.checked_y(y)
        if not isinstance(operator, Operator):
            raise TypeError(f"operator: expected a fastguide.operators operator, got {type(operator).__name__}")
        self.y = y
        self._observations = y.shape[0]
        self.operator = operator
        self.scale = scale
        if not callable(scale):
            self.scale = self._number_or_rows(scale, "scale")

    def checked_y(self, y: Any) -> Tensor:
        """An observation in the form of the attribute ``y``.

        Args:
            y: ``[B, *measurement]`` with ``B >= 1``, floating or complex, finite. ``[B, 1]`` for one number each.

        Returns:
            ``y``; a complex one as pairs of real numbers ``[B, *measurement, 2]``.

        Raises:
            TypeError: ``y`` is not a floating or complex tensor.
            ValueError: ``y`` has another shape, or a value that is not finite.
        """
        expected = "a floating tensor [B, *measurement]"
        arguments.tensor("y", y, expected, readable=True)
        if y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
        if y.dtype not in STATE_DTYPES:
            raise TypeError(f"y: expected {expected}, got {y.dtype}")
        if y.ndim < self._least_dimensions or y.shape[0] < 1:
            raise ValueError(
                f"y: expected shape [B, *measurement] with B >= 1 ([B, 1] for one number each), got {list(y.shape)}"
            )
        if not torch.isfinite(y).all():
            bad = int((~torch.isfinite(y)).nonzero()[0, 0])
            raise ValueError(f"y: expected finite values, got NaN or infinity in row {bad}")
        return y

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator}, y={list(self.y.shape)})"

    def _number_or_rows(self, scale: float | Tensor, name: str) -> float | Tensor:
        """A number, or a tensor that broadcasts to ``y``, with one row per observation or one row for all."""
        if isinstance(scale, Tensor):
            arguments.tensor(name, scale, readable=not self.y.is_meta)
        if not isinstance(scale, Tensor) or scale.numel() == 1:
            others = " or a tensor of the measurement's shape" if self._takes_tensors else ""
            least = -math.inf if self._takes_zero else 0.0
            return number(name, scale, low=0.0, above=least, others=others)
        if scale.is_complex() or scale.dtype == torch.bool:
            raise TypeError(f"{name}: expected real numbers, got {got(scale)}")
        if not self._takes_tensors:
            raise ValueError(f"{name}: expected one number for {self}, got a tensor {list(scale.shape)}")
        given, scale = list(scale.shape), scale.to(self.y)
        if self._complex:
            scale = self._for_both_parts(name, scale)
        rows = scale[None] if scale.ndim == self.y.ndim - 1 else scale
        full = (self._observations, *self.y.shape[1:])
        fits = rows.ndim == len(full) and all(a in (1, b) for a, b in zip(rows.shape, full, strict=True))
        if not fits:
            measurement = list(self.y.shape[1:])
            own = f"; {measurement[:-1]} or {[self._observations, *measurement[:-1]]}, in full" if self._complex else ""
            raise ValueError(
                f"{name}: expected a number, or a tensor {measurement} or {[self._observations, *measurement]}, whose "
                f"dimensions may be 1{own}, got {given}"
            )
        if rows.is_cpu and not ((rows > 0) & (rows < math.inf)).all():  # reading from another device would wait
            raise ValueError(f"{name}: expected finite numbers > 0 for each measurement, got others")
        return rows

    def _for_both_parts(self, name: str, scale: Tensor) -> Tensor:
        """A scale with the shape of complex measurements, brought to that of their pairs; other shapes as they are."""
        pairs, shape = self.y.shape[1:], scale.shape
        if scale.ndim == len(pairs) and shape[0] in (1, self._observations) and shape[1:] == pairs[:-1]:
            if all(a in (1, b) for a, b in zip(shape, pairs, strict=True)):
                raise ValueError(
                    f"{name}: expected an unambiguous shape, got {list(shape)}, which may be that of the complex "
                    f"measurements or that of the pairs of one observation; use {[1, *pairs]} for the pairs"
                )
            return scale[..., None]
        return scale[..., None] if scale.ndim == len(pairs) - 1 else scale

    def scale_at(self, t: float) -> float | Tensor:
        """The scale at one time.

        Args:
            t: The schedule's own time.

        Returns:
            A number, or a tensor ``[B or 1, *measurement]`` in which dimensions may be 1.

        Raises:
            TypeError: ``t`` or the scale is not a number, or the scale is complex or bool.
            ValueError: The scale is outside its range or has another shape, or the function of the time fails at a
                clean time of -1.
        """
        scale = self._scale_at(t)
        return _of_rows(scale, self._rows)

    def _scale_at(self, t: float) -> float | Tensor:
        if not callable(self.scale):
            return self.scale
        if as_float(t) is None:
            raise TypeError(f"t: expected a time, got {got(t)}")
        if t < 0:
            t = float(t)
        try:
            value = self.scale(t)
        except (TypeError, IndexError) as error:
            if t >= 0:
                raise
            raise ValueError(
                f"scale: raised {type(error).__name__} at the clean time {t}, which is no index of a table; expected a "
                "function that gives the scale of the exact model there"
            ) from error
        return self._number_or_rows(value, f"scale({t})")

    @property
    def blamed(self) -> str:
        """The name that an error gives to the user's functions behind the density."""
        return self.operator.blamed

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Likelihood:
        """A copy on ``device`` that computes in ``dtype``.

        Args:
            device: The new device; None keeps it.
            dtype: The new floating dtype; None keeps it.

        Returns:
            The copy.

        Raises:
            TypeError: ``dtype`` is not a floating dtype.
            ValueError: ``device`` is not a device.
        """
        device, dtype = arguments.placement(device, dtype)
        there = copy.copy(self)
        there.y = self.y.to(device, dtype)
        there.operator = moved(self.operator, device, dtype)
        if isinstance(self.scale, Tensor):
            there.scale = self.scale.to(there.y)
        return there

    def for_run(self) -> Likelihood:
        """A likelihood that has cached what depends on ``y`` alone. It is valid while ``y`` is not written to."""
        return self

    def at(self, rows: Tensor) -> Likelihood:
        """The likelihood of ``n`` samples, with the ``y``, the operator and the scale of each.

        Args:
            rows: The observation of each sample, int64 ``[n]``.

        Returns:
            A copy whose ``y``, operator and scale have a row for each sample, or one row for all.
        """
        chosen = copy.copy(self)
        chosen.operator = self.operator.at(rows)
        chosen.y, chosen._rows = self.rows_of_y(rows), rows
        return chosen

    def rows_of_y(self, rows: Tensor | None) -> Tensor:
        """The rows of ``y`` that belong to the samples, or its one row for all."""
        return self.y if rows is None or self.y.shape[0] == 1 else self.y[rows]

    def log_prob(self, x0: Tensor, rows: Tensor | None = None, *, t: float | None = None) -> Tensor:
        """The log-density ``log p(y | x0)`` of each sample.

        The caller's autocast reaches neither the density nor the operator.

        Args:
            x0: Clean samples, ``[n, *event]``, floating.
            rows: The observation of each sample, int64 ``[n]``. None where ``y`` has one row, or sample ``i`` has row
                ``i``.
            t: The time whose scale to use. Required where the scale is a function of the time.

        Returns:
            float64 ``[n]``.

        Raises:
            TypeError: The operator returns complex measurements for a real ``y``.
            ValueError: ``t`` is missing, an argument has another shape or dtype, or the measurements do not have the
                shape of ``y``.
        """
        if t is None and callable(self.scale):
            raise ValueError("t: expected the time whose scale to use, since scale is a function; got None")
        arguments.tensor("x0", x0)
        if x0.ndim == 0 or x0.dtype not in STATE_DTYPES:
            raise ValueError(f"x0: expected floating values [n, *event], got {got(x0)}")
        if rows is not None:
            arguments.tensor("rows", rows)
            if rows.dtype != torch.int64 or rows.shape != x0.shape[:1]:
                raise ValueError(f"rows: expected an int64 tensor {list(x0.shape[:1])}, got {got(rows)}")
        with without_autocast(x0.device):
            return self.exact_value(x0, rows, self.scale_at(0.0 if t is None else t))

    def exact_value(self, x0: Tensor, rows: Tensor | None, scale: float | Tensor) -> Tensor:
        """`log_prob` with the scale given. The last weights of the particle methods use it."""
        return self.value(x0, rows, scale)

    def value(self, x0: Tensor, rows: Tensor | None, scale: float | Tensor, spread: Scalar = 0.0) -> Tensor:
        """`log_prob` with the scale given, and with the ``spread`` of `log_prob_and_gradient`."""
        own = self._with_operator_of(rows)
        z, rows, own_scale = own._measure(x0, rows, scale)
        return own._log_prob(z, own.y, own_scale, spread, rows)

    def _with_operator_of(self, rows: Tensor | None) -> Likelihood:
        """A likelihood with the operator of each sample. ``y`` and the scale stay those of the observations."""
        operator = self.operator if rows is None else self.operator.at(rows)
        if operator is self.operator:
            return self
        chosen = copy.copy(self)
        chosen.operator = operator
        return chosen

    def _measure(
        self, x0: Tensor, rows: Tensor | None, scale: float | Tensor
    ) -> tuple[Tensor, Tensor | None, float | Tensor]:
        """``A x0``, the row of ``y`` of each sample and its scale. The operator is already that of the samples.

        The row is None where ``y`` has one row, or sample ``i`` has row ``i``.
        """
        z, y = self.operator(x0), self.y
        if z.is_complex():
            raise TypeError(f"operator: expected real measurements, as y is, got {z.dtype} from {self.operator}")
        scale = _of_rows(scale, rows)
        if y.shape[0] == 1:
            rows = None
        count = y.shape[0] if rows is None else rows.shape[0]
        if z.shape[1:] != y.shape[1:] or count not in (1, z.shape[0]):
            raise ValueError(
                f"y: expected {z.shape[0]} rows or 1, each of shape {list(z.shape[1:])}, got {[count, *y.shape[1:]]} "
                f"for x0 {list(x0.shape)}"
            )
        return z, rows, scale

    def log_prob_and_gradient(
        self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar = 0.0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The log-density ``log p(y | z)`` of each sample, and its gradient in ``z``.

        Args:
            z: Measurements ``A x0``, ``[n, *measurement]``.
            y: The observation, with one row per sample or one for all; with ``rows``, one per observation.
            scale: The scale, as `scale_at` returns it.
            spread: The variance ``r^2 >= 0`` of ``x_0`` around its prediction, a number or a tensor ``[]``. The
                ``"isotropic"`` covariance adds ``r^2 A A^T`` to the covariance of the noise.
            rows: int64 ``[n]``; sample ``i`` has row ``rows[i]`` of ``y``.

        Returns:
            float64 ``[n]``, and a tensor like ``z``.
        """
        raise NotImplementedError

    def _log_prob(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar, rows: Tensor | None) -> Tensor:
        """The log-density alone, see `log_prob_and_gradient`."""
        return self.log_prob_and_gradient(z, y if rows is None else y[rows], scale, spread)[0]

    def curvature(self, z: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        """A positive weight for each measurement, for Gauss-Newton and reweighted least squares.

        Args:
            z: Measurements ``A x0``, ``[n, *measurement]``.
            y: The observation, with one row per sample or one for all.
            scale: The scale, as `scale_at` returns it.

        Returns:
            A tensor like ``z``.

        Raises:
            ValueError: The error model has no such weight.
        """
        raise ValueError(f"likelihood: {self} has no Gauss-Newton weight")

    def largest_curvature(self, y: Tensor, scale: float | Tensor) -> Tensor | float | None:
        """An upper bound of the curvature ``-d^2 log p(y | z) / dz^2``, for the length of Langevin steps.

        Args:
            y: The observation, with one row per sample or one for all.
            scale: The scale, as `scale_at` returns it.

        Returns:
            One number for all, or a tensor that broadcasts to ``y``; None where no bound is known.

        Raises:
            ValueError: ``scale`` is 0.
        """
        return None

    def supports(self, covariance: str, measurements: int | None = None) -> str:
        """Why ``log p(y | x_t)`` cannot be approximated with a covariance.

        Args:
            covariance: ``"point"``, ``"isotropic"`` or ``"moment"``.
            measurements: The number of measurements in a row; None where it is not known.

        Returns:
            The reason, or an empty string where it can be.
        """
        if covariance != "moment":
            return ""
        if not isinstance(self.operator, LinearOperator):
            return f"covariance={covariance!r} needs a linear operator, and {self.operator} is not"
        if measurements is not None and measurements > MOMENT_LIMIT:
            return f"covariance='moment' serves up to {MOMENT_LIMIT} measurements, and there are {measurements}"
        return ""

    def measure_spread(self, event: Sequence[int], guided: bool = True) -> Likelihood:
        """The likelihood that ``covariance="isotropic"`` works with.

        Where the operator knows neither the spectrum nor the diagonal of ``A A^T``, all measurements are widened alike,
        by ``r^2`` times the mean diagonal. 32 standard normal inputs, always the same, estimate it. For a nonlinear
        operator they give the variance of a measurement.

        Args:
            event: The shape of an event.
            guided: Whether the gradient guides the samples.

        Returns:
            The likelihood itself, or a copy that holds the estimate.

        Raises:
            ValueError: The operator's measurements of these inputs are not finite.
        """
        if self._knows_diagonal():
            return self
        y = self.y
        observations = self.operator.observations or 1
        value = mean_gram_diagonal(lambda x, pair: self.operator.at(pair % observations)(x), event, y.dtype, y.device)
        if not math.isfinite(value):
            raise ValueError(
                f"operator: expected finite measurements of standard normal inputs, from which covariance='isotropic' "
                f"takes its spread; those of {self.operator} are not finite. covariance='point' needs none"
            )
        measured = copy.copy(self)
        measured._mean_diagonal = value
        return measured

    def _knows_diagonal(self) -> bool:
        operator, unknown = self.operator, LinearOperator.gram_diagonal
        return isinstance(operator, LinearOperator) and type(operator).gram_diagonal is not unknown

    def _diagonal_of_gram(self, z: Tensor) -> Tensor | float:
        """The diagonal of ``A A^T``, or the mean that stands for all of it."""
        if self._knows_diagonal():
            return self.operator.gram_diagonal(z)  # type: ignore[attr-defined]
        if self._mean_diagonal is None:
            raise NotImplementedError(
                f"operator: the diagonal of A A^T of {self.operator} is not known; expected measure_spread(event) first"
            )
        return self._mean_diagonal


def _of_rows(scale: float | Tensor, rows: Tensor | None) -> float | Tensor:
    """The scale of each sample, where observations have scales of their own."""
    if rows is None or not isinstance(scale, Tensor) or scale.shape[0] == 1:
        return scale
    return scale[rows]


class _Density(Likelihood):
    """An error model that is a family of `fastguide.ops.log_prob_and_gradient`."""

    def _density(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar) -> dict[str, Any]:
        """The arguments of that operation: the family and its parameters."""
        raise NotImplementedError

    def log_prob_and_gradient(
        self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar = 0.0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        density = self._density(z, y, scale, spread)
        out = foreign.memory().like(z, y, *density.values())
        into = None if out is None else (torch.empty(len(z), dtype=torch.float64, device=z.device), out)
        log_prob, gradient = ops.log_prob_and_gradient(z, y, rows=rows, out=into, **density)
        assert gradient is not None
        return log_prob, gradient

    def _log_prob(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar, rows: Tensor | None) -> Tensor:
        density = self._density(z, y, scale, spread)
        return ops.log_prob_and_gradient(z, y, rows=rows, return_gradient=False, **density)[0]


def _widened(z: Tensor, scale: float | Tensor, spread: Scalar, diagonal: Scalar) -> dict[str, Any]:
    """``scale`` and ``extra_variance`` for `fastguide.ops.log_prob_and_gradient`: ``scale^2 + spread * diagonal``."""
    _check_scales(scale, z)
    variance = 0.0 if _is_none(spread) else spread * diagonal
    if isinstance(scale, Tensor):
        total = (scale**2 + variance).to(z.dtype)
        return dict(scale=_NOTHING, extra_variance=total.expand(total.shape[0], *z.shape[1:]))
    if isinstance(variance, Tensor):
        added = variance.to(z.dtype)
        added = added if added.ndim == z.ndim else added.expand(z.shape[1:])[None]
        return dict(scale=scale, extra_variance=added.expand(added.shape[0], *z.shape[1:]))
    return dict(scale=math.sqrt(scale**2 + variance) if variance else scale)


def _check_scales(scale: float | Tensor, z: Tensor) -> None:
    """Raise unless a tensor has the number of dimensions of ``z``, each of the same size or 1."""
    if not isinstance(scale, Tensor):
        return
    arguments.tensor("scale", scale)
    fits = scale.ndim == z.ndim and all(a in (1, b) for a, b in zip(scale.shape, z.shape, strict=True))
    if not fits or scale.dtype not in STATE_DTYPES or scale.device != z.device:
        raise ValueError(f"scale: expected a number or floating values {list(z.shape)} on {z.device}, got {got(scale)}")


_NOTHING = 1e-18  # a scale whose square does not change a variance


def _is_none(spread: Scalar) -> bool:
    if isinstance(spread, Tensor):
        arguments.tensor("spread", spread)
        if spread.ndim > 0 or spread.dtype not in STATE_DTYPES:
            raise ValueError(f"spread: expected a number or a floating tensor [], got {got(spread)}")
        return False
    return number("spread", spread, low=0.0) == 0.0


class Gaussian(_Density):
    """Gaussian noise:

        y = A x_0 + scale * noise

    Args:
        y: The observation, ``[B, *measurement]``, or ``[1, *measurement]`` for all. Floating or complex, finite.
        operator: The forward model ``A``.
        scale: Standard deviation of the noise, ``>= 0``. A number; a tensor ``[*measurement]`` or ``[B or 1,
            *measurement]``, whose dimensions may be 1, with a number for each detector; or a function of the schedule's
            time that returns one of these. ``scale=0``, an exact measurement, works with PiGDM and the closed forms
            of PnP and DAPS only. Numbers in a tensor are above 0.

    Raises:
        TypeError: ``y``, ``operator`` or ``scale`` has the wrong type.
        ValueError: ``y`` or ``scale`` has another shape, is not finite or is outside its range.
    """

    _takes_zero = True
    _times_diagonal = 1.0  # factor of the diagonal where it stands for all of A A^T: see `measure_spread`
    _gram: Gram | None = None  # A A^T of an operator that does not know it, found by `measure_spread`

    @property
    def _spectral(self) -> LinearOperator | None:
        """What knows the spectrum of ``A A^T``: the operator, or what `measure_spread` found; else None."""
        operator = self.operator
        return operator if isinstance(operator, LinearOperator) and operator.spectral else self._gram

    @property
    def closed_form(self) -> tuple[LinearOperator, LinearOperator] | None:
        """The operator, where it is linear, and what knows the eigenvalues and eigenvectors of its ``A A^T``.

        `measure_spread` finds the rows of a function that is linear but not said to be; they stand for it. None where
        the operator is not linear, or its eigenvalues are not known.
        """
        spectral = self._spectral
        if spectral is None or type(spectral).eigenvalues is LinearOperator.eigenvalues:
            return None
        if isinstance(self.operator, LinearOperator):
            return self.operator, spectral
        return (spectral, spectral) if isinstance(spectral, Gram) and spectral.rows is not None else None

    def _density(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar) -> dict[str, Any]:
        self._check_noise(scale)
        diagonal = self._diagonal(z, scale) if not _is_none(spread) else 0.0
        assert diagonal is not None
        return dict(family="gaussian", **_widened(z, scale, spread, diagonal))

    def _diagonal(self, z: Tensor, scale: float | Tensor) -> Scalar | None:
        """The diagonal that stands for ``A A^T``, or None where the spectrum says more.

        The spectrum cannot be used where the noise has another basis.
        """
        if (spectral := self._spectral) is not None:
            diagonal = spectral.diagonal_gram(z)
            if diagonal is not None or not isinstance(scale, Tensor):
                return diagonal
        return self._diagonal_of_gram(z) * self._times_diagonal

    def measure_spread(self, event: Sequence[int], guided: bool = True) -> Likelihood:
        """The likelihood that ``covariance="isotropic"`` works with, see `Likelihood.measure_spread`.

        With up to 256 measurements ``A A^T`` itself is found from the rows of ``A``, for a function from its Jacobians
        at eight standard normal inputs. Otherwise, or where measurements have scales of their own, the diagonal stands
        for it. Where the gradient guides, the diagonal is multiplied until it is at least half of ``A A^T``. With less,
        a long step overshoots by more than it corrects in the directions that many measurements see (the low
        frequencies of a blur), and the samples diverge. The other error models need no factor, since their gradient is
        bounded.

        Args:
            event: The shape of an event.
            guided: Whether the gradient guides the samples.

        Returns:
            The likelihood itself, or a copy that holds the estimates.

        Raises:
            ValueError: The operator's measurements of standard normal inputs are not finite.
        """
        one_scale = not callable(self.scale) and not isinstance(self.scale, Tensor)
        if self._spectral is not None and one_scale:
            return self
        measured = copy.copy(super().measure_spread(event, guided))
        assert isinstance(measured, Gaussian)
        if measured._spectral is None and not isinstance(self.scale, Tensor):
            measured._gram = measure_gram(self.operator, event, self.y)
            if measured._gram is not None and one_scale:
                return measured
        if guided:

            def diagonal(operator: Operator, z: Tensor) -> Scalar:
                own = copy.copy(measured)
                own.operator = operator
                return own._diagonal_of_gram(z)

            measured._times_diagonal = max(1.0, 0.5 * gram_over_diagonal(self.operator, diagonal, event, self.y))
        return measured

    def log_prob_and_gradient(
        self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar = 0.0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if _is_none(spread) or self._diagonal(z, scale) is not None:
            return super().log_prob_and_gradient(z, y, scale, spread, rows)
        spectral = self._spectral
        assert not isinstance(scale, Tensor) and spectral is not None
        self._check_noise(scale)
        residual = (y if rows is None else y[rows]) - z
        gradient = spectral.solve_gram(residual, spread, scale**2)
        logdet = spectral.gram_logdet(residual, spread, scale**2)
        square = (residual * gradient).flatten(1).sum(1, dtype=torch.float64)
        return -0.5 * (square + logdet + residual[0].numel() * math.log(2 * math.pi)), gradient

    def _log_prob(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar, rows: Tensor | None) -> Tensor:
        if _is_none(spread) or self._diagonal(z, scale) is not None:
            return super()._log_prob(z, y, scale, spread, rows)
        return self.log_prob_and_gradient(z, y, scale, spread, rows)[0]

    def moment(self, z: Tensor, y: Tensor, scale: float | Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob_and_gradient` with the covariance ``scale^2 I + gram``.

        Args:
            z: Measurements ``A x0``, ``[n, *measurement]``.
            y: The observation, with one row per sample or one for all.
            scale: The scale, as `scale_at` returns it.
            gram: ``A C_t A^T``, ``[n, m, m]``. Eigenvalues of the sum below ``scale^2`` are raised to it.

        Returns:
            float64 ``[n]`` and a tensor like ``z``, both NaN where ``gram`` is not finite.

        Raises:
            ValueError: ``scale`` is 0.
        """
        self._check_noise(scale)
        if isinstance(scale, Tensor):  # divide by the noise, so that it is 1 everywhere
            unit = scale.to(z.dtype).expand(z.shape)
            flat = unit.flatten(1)
            whitened = gram / (flat[:, :, None] * flat[:, None, :])
            in_units, slope = self.moment(z / unit, y / unit, 1.0, whitened)
            return in_units - torch.log(flat.double()).sum(1), slope / unit
        if gram.shape[1] == 1:  # one measurement: gram is its eigenvalue
            added = gram.clamp(min=0) + (gram - gram)  # NaN where it is not finite
            log_prob, gradient = ops.log_prob_and_gradient(
                z, y, family="gaussian", scale=scale, extra_variance=added.reshape(z.shape)
            )
            assert gradient is not None
            return log_prob, gradient
        residual = (y - z).flatten(1).double()
        gradient, log_prob = ops.solve_positive_part(gram.double(), residual, variance=scale**2)
        return log_prob, gradient.to(z.dtype).reshape(z.shape)

    @staticmethod
    def _check_noise(scale: float | Tensor) -> None:
        if not isinstance(scale, Tensor) and number("scale", scale, low=0.0) == 0.0:
            raise ValueError(
                "scale: expected > 0 where a density is needed, got 0 (PiGDM and the closed forms of PnP and DAPS take "
                "0)"
            )

    def curvature(self, z: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        self._check_noise(scale)
        return torch.ones_like(z) * scale**-2

    def largest_curvature(self, y: Tensor, scale: float | Tensor) -> Tensor | float:
        self._check_noise(scale)
        return scale**-2


class _Elementwise(_Density):
    """Independent heavy-tailed errors.

    The covariance of ``x_0`` widens the scale of each measurement: the variances add, the shape of the tails stays.
    """

    _share = 1.0  # how much of an added variance is added to the square of the scale

    def _family(self) -> dict[str, Any]:
        raise NotImplementedError

    def _density(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar) -> dict[str, Any]:
        diagonal = self._diagonal_of_gram(z) if not _is_none(spread) else 0.0
        return dict(**_widened(z, scale, self._share * spread, diagonal), **self._family())

    def moment(self, z: Tensor, y: Tensor, scale: float | Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob_and_gradient` with the diagonal of ``gram = A C_t A^T`` ``[n, m, m]`` as added variances."""
        added = self._share * gram.diagonal(dim1=1, dim2=2).clamp(min=0).reshape(z.shape)
        if isinstance(scale, Tensor):
            scale, added = _NOTHING, added + scale**2
        log_prob, gradient = ops.log_prob_and_gradient(z, y, scale=scale, extra_variance=added, **self._family())
        assert gradient is not None
        return log_prob, gradient


class StudentT(_Elementwise):
    """Student's t noise, with heavy tails:

        y = A x_0 + scale * t

    Args:
        y: The observation, ``[B, *measurement]``, or ``[1, *measurement]`` for all. Floating or complex, finite.
        operator: The forward model ``A``.
        scale: Scale of the noise, ``> 0``. A number; a tensor ``[*measurement]`` or ``[B or 1, *measurement]``, whose
            dimensions may be 1, with a number for each detector; or a function of the schedule's time that returns one
            of these.
        df: Degrees of freedom, ``> 0``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``y``, ``scale`` or ``df`` has another shape, is not finite or is outside its range.
    """

    def __init__(self, y: Tensor, operator: Operator, scale: Scale, df: float):
        super().__init__(y, operator, scale)
        self.df = number("df", df, above=0.0)

    def _family(self) -> dict[str, Any]:
        return dict(family="student_t", df=self.df)

    def curvature(self, z: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return (self.df + 1) / (self.df * scale**2 + (y - z) ** 2)

    def largest_curvature(self, y: Tensor, scale: float | Tensor) -> Tensor | float:
        return (1 + 1 / self.df) * scale**-2


class Laplace(_Elementwise):
    """Laplace noise:

        p(y | z) = exp(-|y - z| / scale) / (2 scale)

    Args:
        y: The observation, ``[B, *measurement]``, or ``[1, *measurement]`` for all. Floating or complex, finite.
        operator: The forward model ``A``.
        scale: Scale of the noise, ``> 0``; its variance is ``2 scale^2``. A number; a tensor ``[*measurement]`` or ``[B
            or 1, *measurement]``, whose dimensions may be 1, with a number for each detector; or a function of the
            schedule's time that returns one of these.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``y`` or ``scale`` has another shape, is not finite or is outside its range.
    """

    _share = 0.5

    def _family(self) -> dict[str, Any]:
        return dict(family="laplace")

    def curvature(self, z: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return 1.0 / (scale * (y - z).abs().clamp(min=1e-3 * scale))

    def largest_curvature(self, y: Tensor, scale: float | Tensor) -> Tensor | float:
        return scale**-2  # not that of the peak, which is infinite, but of a Gaussian that is as narrow


class Poisson(_Density):
    """Poisson counts with a gain:

        y / scale ~ Poisson((A x_0 + background) / scale)

    The mean of ``y`` is ``A x_0 + background``, and its variance is ``scale`` times that.

    Guidance follows a log-density with a bounded gradient: below a rate of half the counts (or of 0.1 counts) it goes
    on as a parabola, see `fastguide.reference.log_prob_and_gradient`. `log_prob` and the last weights of TDS and FK use
    Poisson's own density down to a rate of 0.001 counts, and its tangent below.

    The only covariance is ``"point"``.

    Args:
        y: The counts times the gain, ``>= 0``, ``[B, *measurement]``, or ``[1, *measurement]`` for all. Floating, or
            integers, which become float64.
        operator: The forward model ``A``.
        scale: The gain, ``> 0``: a number, or a function of the schedule's time. 1 by default.
        background: A number ``>= 0`` that is added to every rate; 0 by default.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``y``, ``scale`` or ``background`` is outside its range or has another shape.
    """

    _takes_tensors = False
    _least_rate = 1e-3  # counts
    _log_factorials: Tensor | None = None  # of y / scale, where the scale is fixed: see `for_run`

    def __init__(self, y: Tensor, operator: Operator, scale: Scale = 1.0, background: float = 0.0):
        super().__init__(y, operator, scale)
        self.background = number("background", background, low=0.0)

    def checked_y(self, y: Any) -> Tensor:
        arguments.tensor("y", y, readable=True)
        if not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
            y = y.double()
        y = super().checked_y(y)
        if (y < 0).any():
            raise ValueError(f"y: expected counts >= 0, got {y.min().item():g}")
        return y

    def supports(self, covariance: str, measurements: int | None = None) -> str:
        return "" if covariance == "point" else f"covariance={covariance!r} is not defined for Poisson counts"

    def for_run(self) -> Poisson:
        if not isinstance(self.scale, float):
            return self
        own = copy.copy(self)
        own._log_factorials = log_factorials(self.y, self.scale)
        return own

    def at(self, rows: Tensor) -> Likelihood:
        chosen = super().at(rows)
        assert isinstance(chosen, Poisson)
        if self._log_factorials is not None and chosen.y is not self.y:
            chosen._log_factorials = self._log_factorials[rows]
        return chosen

    def _density(self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar) -> dict[str, Any]:
        known = self._log_factorials if y is self.y and scale == self.scale else None
        return dict(family="poisson", scale=scale, background=self.background, log_factorials=known)

    def exact_value(self, x0: Tensor, rows: Tensor | None, scale: float | Tensor) -> Tensor:
        z, rows, scale = self._with_operator_of(rows)._measure(x0, rows, scale)
        counts = (self.y if rows is None else self.y[rows]).double() / scale
        rate = (z.double() + self.background) / scale
        missing = (self._least_rate - rate).clamp(min=0.0)
        log_rate = torch.log(rate.clamp(min=self._least_rate)) - missing / self._least_rate
        known = self._log_factorials if scale == self.scale else None
        if known is None:
            known = torch.lgamma(counts + 1.0).flatten(1).sum(1)
        elif rows is not None:
            known = known[rows]
        return (counts * log_rate - rate.clamp(min=0.0)).flatten(1).sum(1) - known

    def curvature(self, z: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        # At most the weight of one count, as for the parabola: 1 / rate would be ten times that at dark rates.
        return 1.0 / (scale * (z + self.background).clamp(min=scale))

    def largest_curvature(self, y: Tensor, scale: float | Tensor) -> Tensor | float:
        counts = y / scale  # the curvature counts / rate^2 is largest where the parabola begins
        begin = POISSON_SHARE * counts.clamp(min=POISSON_LEAST)
        return torch.maximum(counts / begin**2, 1.0 / counts.clamp(min=1.0)) / scale**2


class Callable(Likelihood):
    """Any log-density as a likelihood.

    The function gets copies, into which it may write. Where a gradient is needed it comes from autograd. The only
    covariance is ``"point"``.

    Args:
        f: ``f(x0 [n, *event]) -> log p(y | x_0) [n]``, real, each sample alone. Where ``y`` is given, ``f`` also gets
            ``y=``, with one row per sample or one row for all. Where ``scale`` is given, ``f`` also gets ``scale=``,
            the number at the level's time.
        y: An observation ``[B, *any]``, floating or complex, finite; or None. A complex ``y`` reaches ``f`` as complex
            numbers.
        scale: A number ``> 0``, a function of the schedule's time, or None.

    Raises:
        TypeError: ``f`` is not callable, or ``y`` or ``scale`` has the wrong type.
        ValueError: ``y`` or ``scale`` has another shape, is not finite or is outside its range.
    """

    _least_dimensions = 1
    _takes_tensors = False
    blamed = "likelihood"

    def __init__(self, f: Fn[..., Tensor], y: Tensor | None = None, scale: Scale | None = None):
        function("f", f)
        self.f, self.has_y, self._has_scale = f, y is not None, scale is not None
        self._complex = isinstance(y, Tensor) and y.is_complex()
        if self._complex:
            arguments.tensor("y", y, readable=True)
            y = torch.view_as_real(y.resolve_conj())  # type: ignore[union-attr]
        super().__init__(torch.zeros(1, device="cpu") if y is None else y, Identity(), 1.0 if scale is None else scale)

    def __repr__(self) -> str:
        return f"Callable({getattr(self.f, '__name__', type(self.f).__name__)})"

    def supports(self, covariance: str, measurements: int | None = None) -> str:
        return "" if covariance == "point" else f"covariance={covariance!r} is not defined for a callable"

    def value(self, x0: Tensor, rows: Tensor | None, scale: float | Tensor, spread: Scalar = 0.0) -> Tensor:
        return self._call(x0, self.rows_of_y(rows), scale).double()

    def _call(self, x0: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        y = torch.view_as_complex(y.contiguous()) if self._complex else y
        kwargs: dict = {"y": y.clone()} if self.has_y else {}
        if self._has_scale:
            kwargs["scale"] = scale
        value = self.f(x0.clone(), **kwargs)
        if not isinstance(value, Tensor) or value.shape != x0.shape[:1]:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"f: expected it to return log-densities of shape [{x0.shape[0]}], got {got}")
        return returned("f", value)

    def log_prob_and_gradient(
        self, z: Tensor, y: Tensor, scale: float | Tensor, spread: Scalar = 0.0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y = y if rows is None else y[rows]
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._call(z, y, scale)
            if not value.requires_grad:
                raise ValueError("f: expected a function that autograd can differentiate where a gradient is needed")
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach().double(), gradient
