"""Forward models ``A``: what a measurement does to a clean sample.

An operator maps ``x`` ``[n, *event]`` to ``[n, *measurement]``. A linear one also states its adjoint, its
pseudo-inverse and, where ``A A^T`` has a known eigenbasis, its spectrum. PnP, PiGDM, DAPS and the isotropic covariance
need one function of the spectrum: ``solve_gram(v, a, b) = (a A A^T + b I)^-1 v``.

`Blur` and `Matrix` cache what they computed from their tensor. A write to the tensor empties the cache, but torch does
not count a write through ``.data`` or through a numpy array that shares the memory, and such a write is not seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, ops
from .arguments import flag, function, got, integer, number, one_of
from .foreign import as_tensor, memory, returned
from .ops._arguments import STATE_DTYPES, Scalar

__all__ = [
    "AveragePool",
    "Blur",
    "Function",
    "Identity",
    "Inpainting",
    "LinearOperator",
    "Matrix",
    "Operator",
    "ParallelBeam",
]

_ITERATIONS = 100  # conjugate gradients where the spectrum is unknown
_PROBE_PAIRS = 16
_NORM_PROBES, _NORM_ITERATIONS = 2, 16
_GRAM_PROBES = 8
_GRAM_LIMIT = 256  # most measurements for which A A^T is made from the rows of A
_GRAM_ELEMENTS = 2**26  # most elements of these rows, 256 MiB in float32
STREAM_PROBES = 7  # a stream of random numbers that no sampler draws from
_DENSE_LIMIT = 4096  # the largest event (in elements) for which a dense matrix is made


class Operator:
    """Any forward model. A subclass defines ``__call__``.

    Attributes:
        linear: Whether the operator is linear.
        observations: None where one operator serves all observations. Else the number of observations that have
            operators of their own, see `at`.
    """

    linear = False
    observations: int | None = None
    blamed = "operator"  # the name that an error gives to the user's functions behind it

    def __call__(self, x: Tensor) -> Tensor:
        """The measurement ``A(x)``, without noise.

        Args:
            x: Clean samples, ``[n, *event]``.

        Returns:
            ``[n, *measurement]``, each row made from one sample.
        """
        raise NotImplementedError(f"operator: expected {type(self).__name__} to define __call__(self, x), got none")

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A pseudo-inverse ``h^+`` with ``h(h^+(h(x))) = h(x)``.

        Args:
            y: Measurements, ``[n, *measurement]``.

        Returns:
            ``[n, *event]``.

        Raises:
            ValueError: The operator has none.
        """
        raise ValueError(f"operator: {self} has no pseudo-inverse")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Operator:
        """A copy with its tensors on ``device`` and in ``dtype``, those in lists and dicts too.

        Nothing is moved in place.

        Args:
            device: The new device; None keeps it.
            dtype: The new dtype of floating tensors; complex ones get its complex counterpart. None keeps it.

        Returns:
            The copy.

        Raises:
            TypeError: ``dtype`` is not a floating dtype.
            ValueError: ``device`` is not a device.
        """
        device, dtype = arguments.placement(device, dtype)
        there = copy.copy(self)
        for name, value in vars(self).items():
            object.__setattr__(there, name, _moved(value, device, dtype))
        return there

    def at(self, rows: Tensor) -> Operator:
        """The operator for ``n`` samples, where sample ``i`` belongs to observation ``rows[i]``.

        One operator serves all observations by default, so this is the operator itself. A class with another operator
        for each observation overrides this method and sets ``observations`` to their number.

        Args:
            rows: int64 ``[n]``.

        Returns:
            The operator of these samples.
        """
        return self

    def __repr__(self) -> str:
        return type(self).__name__


def moved(operator: Operator, device: torch.device | str | None, dtype: torch.dtype | None) -> Operator:
    """``operator.to(device, dtype)``; for a torch module a copy, since its own ``to`` would move it in place."""
    if not isinstance(operator, torch.nn.Module):
        return operator.to(device, dtype)
    held = [*operator.parameters(), *operator.buffers()]
    if all(_moved(t, device, dtype) is t for t in held):
        return operator
    return torch.nn.Module.to(copy.deepcopy(operator), device, dtype)


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """The value with its tensors elsewhere: floating ones in ``dtype``, complex ones in its complex counterpart."""
    if isinstance(value, Tensor):
        if dtype is not None and value.is_complex():
            dtype = dtype.to_complex()
        elif not value.is_floating_point():
            dtype = None
        return _normal(value.to(device, dtype))
    if type(value) in (list, tuple):
        return type(value)(_moved(v, device, dtype) for v in value)
    if type(value) is dict:
        return {name: _moved(v, device, dtype) for name, v in value.items()}
    return value


def _samples(name: str, x: Any, own: tuple[str, Tensor] | None = None, real: bool = False) -> Tensor:
    """``x`` if it has a sample dimension and floating or complex values, and fits the operator's ``own`` tensor."""
    arguments.tensor(name, x)
    if x.dtype not in STATE_DTYPES and (real or not x.is_complex()):
        raise TypeError(f"{name}: expected floating{'' if real else ' or complex'} values, got {got(x)}")
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, that of the samples, got a scalar")
    if own is not None:
        if type(x) is not Tensor:
            arguments.expect_alike({name: x, own[0]: own[1]})
        if x.device != own[1].device:
            raise ValueError(f"{name}: expected a tensor on {own[1].device}, where {own[0]} is, got {x.device}")
    return x


def _constant(name: str, value: Any, expected: str) -> Tensor:
    """A tensor with readable values, made from a tensor, an array or nested lists."""
    if not isinstance(value, Tensor | np.ndarray | list | tuple):
        raise TypeError(f"{name}: expected {expected}, got {got(value)}")
    try:
        value = as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {expected}, got {got(value)}") from error
    arguments.tensor(name, value, expected, readable=True)
    return value


def _number_or_scalar(name: str, value: Any, **bounds: float) -> Scalar:
    """A number, or a tensor ``[]``. The tensor may be on a device; its value is not read."""
    if not isinstance(value, Tensor):
        return number(name, value, **bounds)  # type: ignore[arg-type]
    arguments.tensor(name, value)
    if value.ndim > 0 or value.dtype not in STATE_DTYPES:
        raise ValueError(f"{name}: expected a number or a floating tensor [], got {got(value)}")
    return value


def _normal(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it was made in inference mode: gradients cannot use such a tensor."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


class _Cache:
    """What was computed from a tensor, valid until the tensor is replaced or written to."""

    def __init__(self, source: Tensor):
        self.source, self.version = source, source._version
        self.copy: Tensor | None = None  # the source as it was when the first value was computed
        self.values: dict[Any, Any] = {}

    def serves(self, source: Tensor, by_value: bool = False) -> bool:
        """Whether the cache is valid for ``source``.

        ``by_value`` also compares the elements, since a write through numpy or ``.data`` does not change the version.
        That may wait for the device, so it is done once per run.
        """
        same = self.source is source and self.version == source._version
        if not (same and by_value) or self.copy is None or arguments.traced():
            return same
        return torch.equal(self.copy, source)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if self.copy is None:
            self.copy = self.source.detach().clone()
        if key not in self.values:
            with torch.inference_mode(False), torch.no_grad():
                self.values[key] = make()
        return self.values[key]


class LinearOperator(Operator):
    """A linear forward model. A subclass defines ``__call__`` and `adjoint`:

        class EverySecond(LinearOperator):
            def __call__(self, x):  # [n, d] -> [n, d / 2], for an even d
                return x[:, ::2]

            def adjoint(self, y):
                x = y.new_zeros(len(y), 2 * y.shape[1])
                x[:, ::2] = y
                return x

    A run compares both on random inputs and raises where they are not adjoint. Both get tensors on the run's device, in
    float32, or float64 with ``dtype=torch.float64``, and return the same. They need no derivative, since the adjoint
    takes its place; both may compute in numpy. Tensors that are attributes are moved to the run's device, see
    `Operator.to`.

    A subclass with `eigenvalues` gets closed forms. Where ``A A^T`` is not diagonal it also needs `transform` and
    `inverse_transform`. Without a spectrum, conjugate gradients solve the same equations.
    """

    linear = True

    @property
    def spectral(self) -> bool:
        """Whether the spectrum of ``A A^T`` is known.

        True where the class defines `eigenvalues`, or both `solve_gram` and `gram_logdet`.
        """
        mine, known = type(self), LinearOperator
        solves = mine.solve_gram is not known.solve_gram and mine.gram_logdet is not known.gram_logdet
        return solves or mine.eigenvalues is not known.eigenvalues

    def adjoint(self, y: Tensor) -> Tensor:
        """The product ``A^T y``.

        Args:
            y: Measurements, ``[n, *measurement]``.

        Returns:
            ``[n, *event]``.
        """
        raise NotImplementedError(f"operator: expected {type(self).__name__} to define adjoint(self, y), got none")

    def _measured(self, name: str, y: Any) -> Tensor:
        """``y``, or an error where it cannot be a measurement."""
        return _samples(name, y)

    def eigenvalues(self, y: Tensor) -> Tensor | float:
        """The eigenvalues of ``A A^T``.

        Args:
            y: Measurements, ``[n, *measurement]``; only the shape, dtype and device count.

        Returns:
            One number for all, or a tensor that broadcasts to ``transform(y)[0]``, in its order. A class with another
                operator for each observation (see `at`) may return those of each sample, which broadcast to
                ``transform(y)``.

        Raises:
            NotImplementedError: The spectrum is not known.
        """
        raise NotImplementedError(f"operator: the spectrum of {self} is not known")

    def transform(self, y: Tensor) -> Tensor:
        """Orthonormal change to the eigenbasis of ``A A^T``; the identity by default.

        Args:
            y: Measurements, ``[n, *measurement]``.

        Returns:
            The coefficients, one row per sample.
        """
        return y

    def inverse_transform(self, c: Tensor) -> Tensor:
        """The inverse of `transform`; the identity by default.

        Args:
            c: Coefficients, as `transform` returns them.

        Returns:
            ``[n, *measurement]``.
        """
        return c

    def gram_diagonal(self, y: Tensor) -> Tensor | float:
        """The diagonal of ``A A^T``.

        Args:
            y: Measurements, ``[n, *measurement]``; only the shape, dtype and device count.

        Returns:
            One number for all, or a tensor that broadcasts to one row of ``y``.

        Raises:
            NotImplementedError: The diagonal is not known.
        """
        raise NotImplementedError(f"operator: the diagonal of A A^T of {self} is not known")

    def diagonal_gram(self, y: Tensor) -> Tensor | float | None:
        """``A A^T`` as a diagonal, where the spectrum shows that it is diagonal; else None.

        Args:
            y: Measurements, ``[n, *measurement]``; only the shape, dtype and device count.

        Returns:
            The diagonal, as `eigenvalues` returns it, or None.
        """
        known = LinearOperator
        if type(self).solve_gram is not known.solve_gram or type(self).gram_logdet is not known.gram_logdet:
            return None
        eigenvalues = self.eigenvalues(y)
        if not isinstance(eigenvalues, Tensor):
            return eigenvalues  # c I, in any basis
        standard = type(self).transform is known.transform and type(self).inverse_transform is known.inverse_transform
        return eigenvalues if standard else None

    def solve_gram(self, v: Tensor, a: Scalar, b: Scalar) -> Tensor:
        """Solve with ``a A A^T + b I``:

            (a A A^T + b I)^-1 v

        At ``b = 0`` this is the pseudo-inverse of ``a A A^T``. Eigenvalues below 8 units of rounding of the largest one
        then count as 0. Without a known spectrum the result comes from 100 conjugate gradients, with two products with
        ``A`` or ``A^T`` each, and needs ``b > 0``.

        Args:
            v: Measurements, ``[n, *measurement]``.
            a: A number ``> 0``, or a tensor ``[]``.
            b: A number ``>= 0``, or a tensor ``[]`` whose value is above 0.

        Returns:
            A tensor like ``v``.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: ``a`` or ``b`` is outside its range, or ``b`` is 0 and the spectrum is not known.
        """
        v, a, b = self._measured("v", v), _number_or_scalar("a", a, above=0.0), _number_or_scalar("b", b, low=0.0)
        if not self.spectral:
            return solve_iteratively(self, v, a, b)
        denominator = _filled(a * self.eigenvalues(v) + b, v.real.dtype, v)
        if isinstance(b, Tensor) or b > 0.0:
            inverse = 1.0 / denominator
        else:
            # The factor does not grow with the size, as it does for a dense matrix: at 256 x 256 in float32 that
            # would drop a blur's singular values below a tenth of the largest. The spectra are accurate to a few units.
            floor = denominator.amax() * (8.0 * torch.finfo(v.dtype).eps)
            inverse = torch.where(denominator > floor, 1.0 / denominator, 0.0)
        return self.inverse_transform(self.transform(v) * inverse)

    def gram_logdet(self, v: Tensor, a: Scalar, b: Scalar) -> Tensor:
        """The log-determinant ``log det(a A A^T + b I)`` over the measurements of one row.

        Args:
            v: Measurements, ``[n, *measurement]``; only the shape, dtype and device count.
            a: As for `solve_gram`.
            b: As for `solve_gram`.

        Returns:
            float64 ``[]``, or ``[n]`` where samples have eigenvalues of their own.

        Raises:
            NotImplementedError: The spectrum is not known.
            TypeError: An argument has the wrong type.
            ValueError: ``a`` or ``b`` is outside its range.
        """
        v, a, b = self._measured("v", v), _number_or_scalar("a", a, above=0.0), _number_or_scalar("b", b, low=0.0)
        eigenvalues = _filled(self.eigenvalues(v), torch.float64, v)
        logs = torch.log(a * eigenvalues + b)
        if logs.ndim == v.ndim:
            return logs.expand(v.shape).flatten(1).sum(1)
        return logs.expand(v.shape[1:]).sum()

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The pseudo-inverse ``A^+ y = A^T (A A^T)^+ y``.

        Args:
            y: Measurements, ``[n, *measurement]``.

        Returns:
            ``[n, *event]``.

        Raises:
            ValueError: The spectrum is not known.
        """
        return self.adjoint(self.solve_gram(self._measured("y", y), 1.0, 0.0))

    def matrix(
        self,
        event: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The dense matrix of the operator.

        Args:
            event: The shape of an event, with ``d`` elements, at most 4096.
            dtype: The dtype in which the operator computes the columns.
            device: Where it computes them.

        Returns:
            ``[m, d]`` for ``m`` measurements.

        Raises:
            ValueError: ``event`` is not a shape, is empty or has more than 4096 elements.
        """
        event = arguments.shape("event", event, "the shape of an event")
        device, dtype = arguments.placement(device, dtype)
        size = int(torch.Size(event).numel())
        if size > _DENSE_LIMIT:
            raise ValueError(f"event: expected at most {_DENSE_LIMIT} elements for a dense matrix, got {size}")
        if not event:
            raise ValueError("event: expected at least one dimension, got ()")
        basis = torch.eye(size, dtype=dtype, device=device).reshape(size, *event)
        with torch.no_grad():
            return self.to(device, dtype)(basis).flatten(1).T


def solve_iteratively(operator: LinearOperator, v: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """``(a A A^T + diag(b))^-1 v`` by a fixed number of conjugate gradients.

    ``b > 0`` is a number, or a tensor that broadcasts to ``v``.
    """
    if not isinstance(b, Tensor) and b <= 0.0:
        raise ValueError(
            f"operator: {operator} has no known spectrum; expected eigenvalues or a pseudo_inverse of its own where "
            "the measurement is exact, or noise (scale > 0)"
        )
    return conjugate_gradients(lambda p: a * operator(operator.adjoint(p)) + b * p, v, _ITERATIONS)


def solve_with_noise(operator: LinearOperator, v: Tensor, a: Scalar, b: Tensor | Scalar) -> Tensor:
    """``(a A A^T + diag(b))^-1 v``, in closed form where there is one, else by conjugate gradients.

    ``b`` is a number, or a tensor of the dimensions of ``v`` with the variance of each measurement. A tensor has a
    closed form where ``A A^T`` is diagonal.
    """
    if not isinstance(b, Tensor) or b.ndim == 0:
        return operator.solve_gram(v, a, b)
    diagonal = operator.diagonal_gram(v) if operator.spectral else None
    return solve_iteratively(operator, v, a, b) if diagonal is None else v / (a * diagonal + b)


def conjugate_gradients(a: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """``a^-1 b`` for a positive definite ``a``, for each row of ``b`` ``[n, *event]``, from zero.

    The number of iterations is fixed: a stopping rule would make the host wait. A row that has converged stays as it
    is.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *(1,) * (u.ndim - 1))

    x, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    floor = rr * torch.finfo(b.dtype).eps ** 2  # a smaller residual is only rounding
    for _ in range(iterations):
        ap = a(p)
        active = rr > floor
        length = torch.where(active, rr / dot(p, ap), 0.0)
        x = x + length * p
        r = r - length * ap
        new = dot(r, r)
        p = r + torch.where(active, new / rr, 0.0) * p
        rr = new
    return x


def mean_gram_diagonal(
    operator: Callable[[Tensor, Tensor], Tensor], event: Sequence[int], dtype: torch.dtype, device: torch.device
) -> float:
    """An estimate of the mean of the diagonal of ``A A^T``.

    It is the variance of the measurements of standard normal inputs, which for a linear ``A`` has that mean.
    ``operator(x, pair)`` measures the probes ``x`` of these pairs.
    """
    number = 2 * _PROBE_PAIRS
    x = ops.randn((number, *event), seed=0, stream=STREAM_PROBES, dtype=dtype, device=device)
    with torch.no_grad():
        z = operator(x, torch.arange(number, device=device) % _PROBE_PAIRS)
    square = (z[:_PROBE_PAIRS] - z[_PROBE_PAIRS:]).double() ** 2
    return float(square.mean()) / 2


def gram_over_diagonal(
    operator: Operator, diagonal: Callable[[Operator, Tensor], Scalar], event: Sequence[int], like: Tensor
) -> float:
    """The smallest ``c`` with ``A A^T <= c D``, for a diagonal ``D > 0``.

    It is the largest eigenvalue of ``D^(-1/2) A A^T D^(-1/2)``. Power iterations estimate it from slightly below. For a
    function ``A`` is its Jacobian at standard normal inputs. A function without a derivative guides nothing and gets 1.
    """
    observations = operator.observations or 1
    number = max(_NORM_PROBES, observations)
    own = operator.at(torch.arange(number, device=like.device) % observations)
    options: dict[str, Any] = dict(seed=0, stream=STREAM_PROBES, dtype=like.dtype, device=like.device)
    x, u = (ops.randn((number, *event), step=step, **options) for step in (1, 2))
    small = torch.finfo(x.dtype).eps ** (1 / 3)
    linear = isinstance(own, LinearOperator)  # uses its adjoint, so it need not be differentiable
    with torch.set_grad_enabled(not linear):
        z = own(leaf := x.clone().requires_grad_(not linear))
    if not (linear or z.requires_grad):
        return 1.0
    known = torch.as_tensor(diagonal(own, z.detach()), dtype=z.dtype, device=z.device)
    weight = torch.where(known > 0, 1 / known, 0.0)
    ratio = _lengths(u)
    with torch.no_grad():
        for _ in range(_NORM_ITERATIONS):
            u = u / ratio.clamp(min=torch.finfo(u.dtype).tiny)
            if isinstance(own, LinearOperator):
                u = own.adjoint(weight * own(u)).clone()
            else:
                v = (own(x + small * u).clone() - own(x - small * u)) / (2 * small)
                (u,) = torch.autograd.grad(z, leaf, weight * v, retain_graph=True)
            ratio = _lengths(u)
    return float(ratio.max())


class Gram(LinearOperator):
    """The closed forms of ``A A^T``, given as a matrix.

    Args:
        gram: ``[m, m]``, symmetric. Negative eigenvalues, from rounding, count as 0.
        like: A measurement, ``[n, *measurement]``, whose dtype the results have.
        rows: The rows of ``A``, ``[m, *event]``. Without them it measures nothing.
    """

    def __init__(self, gram: Tensor, like: Tensor, rows: Tensor | None = None):
        values, vectors = torch.linalg.eigh(gram.double())
        self.measurement = like.shape[1:]
        self.values = values.clamp(min=0.0).to(like.dtype).reshape(self.measurement)
        self.vectors = vectors.to(like.dtype)
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        assert self.rows is not None
        return (x.flatten(1) @ self.rows.flatten(1).T).reshape(-1, *self.measurement)

    def adjoint(self, y: Tensor) -> Tensor:
        assert self.rows is not None
        return (y.flatten(1) @ self.rows.flatten(1)).reshape(-1, *self.rows.shape[1:])

    def eigenvalues(self, y: Tensor) -> Tensor:
        return self.values

    def transform(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.vectors).reshape(y.shape)

    def inverse_transform(self, c: Tensor) -> Tensor:
        return (c.flatten(1) @ self.vectors.T).reshape(c.shape)


def measure_gram(operator: Operator, event: Sequence[int], y: Tensor) -> Gram | None:
    """``A A^T`` from the rows of ``A``, where these are few.

    It is exact for a linear ``A``, also for one that is not said to be; the rows are then kept. For another function it
    is the mean of ``J J^T`` over Jacobians ``J`` at standard normal inputs, which is at least the covariance of the
    measurements there (Poincare's inequality). It is multiplied until twice of it is at least each of these ``J J^T``.
    Its diagonal is at least the variance of the measurements of 32 such inputs.

    Returns:
        None where the rows have too many elements, observations have operators of their own, or a function has no
            derivative or none but 0.
    """
    m = y[0].numel()
    held = 0 if isinstance(operator, LinearOperator) else _GRAM_PROBES * m * math.prod(event)
    if operator.observations is not None or m > _GRAM_LIMIT or held > _GRAM_ELEMENTS:
        return None
    if isinstance(operator, LinearOperator):
        units = torch.eye(m, dtype=y.dtype, device=y.device).reshape(m, *y.shape[1:])
        with torch.no_grad():  # in parts, so that few rows are held at once
            parts = [operator(operator.adjoint(part)).flatten(1).clone() for part in units.split(2 * _PROBE_PAIRS)]
        gram = torch.cat(parts).double()
        return Gram(0.5 * (gram + gram.mT), y) if gram.isfinite().all() else None
    x = ops.randn((_GRAM_PROBES, *event), seed=0, step=3, stream=STREAM_PROBES, dtype=y.dtype, device=y.device)
    with torch.enable_grad():
        z = operator(x.requires_grad_())
        each = z.flatten(1).sum(0).unbind()  # each sample is measured alone
    if not z.requires_grad:
        return None
    rows = torch.stack([torch.autograd.grad(of_all, x, retain_graph=True)[0].flatten(1) for of_all in each], 1)
    grams = (rows @ rows.mT).double()  # [probes, m, m]
    gram = grams.mean(0)
    if not gram.isfinite().all() or not gram.any():
        return None
    # No ratio is above the number of probes. What is added only keeps the root from failing.
    least = torch.finfo(y.dtype).eps * m * gram.diagonal().amax()
    root = torch.linalg.cholesky(gram + least * torch.eye(m, dtype=gram.dtype, device=gram.device))
    half = torch.linalg.solve_triangular(root, grams, upper=False)
    ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.mT, upper=False))
    gram = gram * max(1.0, 0.5 * float(ratios.amax()))
    # The same Jacobian everywhere: linear, but for a constant.
    if bool((rows - rows[0]).abs().amax() <= 1e-4 * rows[0].abs().amax()):
        return Gram(gram, y, rows[0].reshape(m, *event).clone())
    # A saturating function may be flat at all eight inputs, and still differ between them.
    with torch.no_grad():
        more = ops.randn((2 * _PROBE_PAIRS, *event), seed=0, stream=STREAM_PROBES, dtype=y.dtype, device=y.device)
        missing = (operator(more).flatten(1).double().var(0) - gram.diagonal()).clamp(min=0.0)
    return Gram(gram + torch.diag(missing), y)


def _lengths(u: Tensor) -> Tensor:
    """The norm of each sample, ``[n, 1, ...]``."""
    return u.flatten(1).norm(dim=1).reshape(-1, *(1,) * (u.ndim - 1))


def _filled(value: Scalar, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor in ``dtype``; a number becomes a tensor ``[]`` made where ``like`` is, since a copy would wait."""
    return value.to(dtype) if isinstance(value, Tensor) else like.new_full((), value, dtype=dtype)


class Identity(LinearOperator):
    """The identity, ``A x = x``."""

    def __call__(self, x: Tensor) -> Tensor:
        return _samples("x", x)

    def adjoint(self, y: Tensor) -> Tensor:
        return _samples("y", y)

    def eigenvalues(self, y: Tensor) -> float:
        return 1.0

    def gram_diagonal(self, y: Tensor) -> float:
        return 1.0


class Inpainting(LinearOperator):
    """The measured elements of ``x``, as ``[n, m]``.

    The elements that were not measured are left out, so that densities do not count them.

    Args:
        mask: Bool, true where an element is measured. The shape of an event, or ``[B, *event]`` with
            ``per_observation``. At least one element must be true.
        per_observation: Whether each observation has a mask of its own. All masks must then have the same number of
            measured elements.

    Raises:
        TypeError: ``mask`` is not a bool tensor, or ``per_observation`` is not a bool.
        ValueError: No element is measured, or the masks have different numbers of measured elements.
    """

    def __init__(self, mask: Tensor, *, per_observation: bool = False):
        arguments.tensor("mask", mask, "a bool tensor", readable=True)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        if not mask.any():
            raise ValueError("mask: expected at least one measured element, got none")
        self.per_observation = per_observation = flag("per_observation", per_observation)
        mask = _normal(mask)
        with torch.inference_mode(False), torch.no_grad():
            if not per_observation:
                self.event = tuple(mask.shape)
                self.index = mask.flatten().nonzero()[:, 0]  # [m]
                return
            if mask.ndim < 2:
                raise ValueError(f"mask: expected shape [B, *event] with per_observation, got {list(mask.shape)}")
            self.event, self.observations = tuple(mask.shape[1:]), len(mask)
            counts = mask.flatten(1).sum(1)
            if not (counts == counts[0]).all():
                low, high = int(counts.min()), int(counts.max())
                raise ValueError(
                    f"mask: expected the same number of measured elements for each observation, got {low} to {high}; "
                    "make one call for each observation instead"
                )
            self.index = mask.flatten(1).nonzero()[:, 1].reshape(len(mask), -1)  # [B, m]

    def at(self, rows: Tensor) -> Inpainting:
        if not self.per_observation:
            return self
        chosen = copy.copy(self)
        chosen.index = self.index[rows]
        return chosen

    def _check(self, samples: int) -> None:
        if self.per_observation and samples != len(self.index):
            raise ValueError(f"mask: expected {samples} masks, one for each sample, got {len(self.index)}")

    def _measured(self, name: str, y: Any) -> Tensor:
        if _samples(name, y, ("mask", self.index)).ndim != 2 or y.shape[1] != self.index.shape[-1]:
            raise ValueError(f"{name}: expected measurements [n, {self.index.shape[-1]}], got shape {list(y.shape)}")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(_samples("x", x, ("mask", self.index)).shape[1:]) != self.event:
            raise ValueError(
                f"mask: expected the shape of an event, {list(x.shape[1:])}, got {list(self.event)} for x "
                f"{list(x.shape)}"
            )
        self._check(x.shape[0])
        flat, out = x.flatten(1), memory().shaped((len(x), self.index.shape[-1]), x)
        if self.per_observation:
            return torch.gather(flat, 1, self.index, out=out)
        return torch.index_select(flat, 1, self.index, out=out)

    def adjoint(self, y: Tensor) -> Tensor:
        y = self._measured("y", y)
        shape = len(y), math.prod(self.event)
        flat = memory().shaped(shape, y)
        flat = y.new_zeros(shape) if flat is None else flat.zero_()
        if self.per_observation and y.shape[0] == len(self.index):
            return flat.scatter_(1, self.index, y).reshape(-1, *self.event)
        self._check(y.shape[0])
        return flat.index_copy_(1, self.index, y).reshape(-1, *self.event)

    def eigenvalues(self, y: Tensor) -> float:
        return 1.0

    def gram_diagonal(self, y: Tensor) -> float:
        return 1.0


class AveragePool(LinearOperator):
    """The means of ``factor x factor`` blocks of the last two dimensions.

    Args:
        factor: Side of a block, at least 1. It must divide the last two dimensions of ``x``.

    Raises:
        ValueError: ``factor`` is not a positive integer.
    """

    factor: int

    def __init__(self, factor: int):
        self.factor = integer("factor", factor, 1)

    def __repr__(self) -> str:
        return f"AveragePool({self.factor})"

    def _measured(self, name: str, y: Any) -> Tensor:
        if _samples(name, y).ndim < 3:
            raise ValueError(f"{name}: expected measurements [n, ..., H, W], got shape {list(y.shape)}")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        f = self.factor
        if _samples("x", x).ndim < 3 or x.shape[-1] % f or x.shape[-2] % f:
            raise ValueError(f"factor: expected a divisor of the last two dimensions of x, {list(x.shape)}, got {f}")
        blocks = x.reshape(*x.shape[:-2], x.shape[-2] // f, f, x.shape[-1] // f, f)
        return blocks.mean(dim=(-3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        y, f = self._measured("y", y), self.factor
        return y.repeat_interleave(f, -2).repeat_interleave(f, -1) / (f * f)

    def eigenvalues(self, y: Tensor) -> float:
        return self.factor**-2.0

    def gram_diagonal(self, y: Tensor) -> float:
        return self.factor**-2.0


class Blur(LinearOperator):
    """Convolution of the last two dimensions with one kernel. The output has the size of the input.

    It is a true convolution: ``torch.nn.functional.conv2d`` gives the same with the flipped kernel. The kernel may be
    written to later. The products with ``A`` and ``A^T`` have derivatives in the kernel. With ``"circular"`` the
    spectrum has them too.

    Args:
        kernel: ``[h, w]``, real and finite, with odd sizes, not larger than the image.
        padding: ``"circular"`` wraps around; the spectrum comes from the Fourier transform. ``"zeros"`` continues the
            image by 0; the spectrum is known where the kernel is an outer product, as a Gaussian or a box is.

    Raises:
        TypeError: ``kernel`` is not made of real numbers, or has a float of less than 16 bits.
        ValueError: ``kernel`` has another shape or is not finite, or ``padding`` is unknown.
    """

    def __init__(self, kernel: Tensor, padding: str = "circular"):
        kernel = _constant("kernel", kernel, "real values [h, w]")
        if kernel.is_complex():
            raise TypeError(f"kernel: expected real values, got {kernel.dtype}")
        if kernel.ndim == 3:
            raise ValueError(
                f"kernel: expected one kernel [h, w] for all observations, got shape {list(kernel.shape)}; "
                "make one call for each observation instead"
            )
        if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"kernel: expected two odd dimensions, got shape {list(kernel.shape)}")
        if kernel.is_floating_point() and kernel.dtype not in STATE_DTYPES:
            raise TypeError(f"kernel: expected a float of 16 bits or more, got {kernel.dtype}")
        if not torch.isfinite(kernel).all():
            raise ValueError("kernel: expected finite values, got NaN or infinity")
        one_of("padding", padding, ("circular", "zeros"))
        self.kernel = _normal(kernel if kernel.is_floating_point() else kernel.float())
        self.padding = padding
        self._cache = _Cache(self.kernel)
        self._factors()

    @property
    def spectral(self) -> bool:
        return self.padding == "circular" or self._factors() is not None

    def _factors(self) -> tuple[Tensor, Tensor] | None:
        """The kernels along both axes, on the host, where the kernel is their outer product; else None."""

        def make() -> tuple[Tensor, Tensor] | None:
            u, s, vh = torch.linalg.svd(self.kernel.double().cpu())
            return (u[:, 0] * s[0], vh[0]) if (s[1:] <= 1e-6 * s[0]).all() else None

        return self._current().get("factors", make) if self.padding == "zeros" else None

    def _current(self, by_value: bool = False) -> _Cache:
        if not self._cache.serves(self.kernel, by_value):
            self._cache = _Cache(self.kernel)
        return self._cache

    def __repr__(self) -> str:
        return f"Blur({'x'.join(map(str, self.kernel.shape))}, {self.padding!r})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Operator:
        there = super().to(device, dtype)
        assert isinstance(there, Blur)
        self._current(by_value=True)
        factors = (
            self._factors()
        )  # computed from this kernel: that of the copy may be on a device, and reading it waits
        there._cache = _Cache(there.kernel)
        there._cache.get("factors", lambda: factors)
        return there

    def _measured(self, name: str, y: Any) -> Tensor:
        """``y`` if it has the size of an image and the kernel fits into it."""
        _samples(name, y, real=True)
        if type(y) is not Tensor:
            arguments.expect_alike({name: y, "kernel": self.kernel})
        h, w = self.kernel.shape
        if y.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one sample, got shape {list(y.shape)}")
        if y.ndim < 3 or y.shape[-2] < h or y.shape[-1] < w:
            raise ValueError(
                f"kernel: expected at most the last two dimensions of {name}, {list(y.shape)}, got {h} x {w}"
            )
        return y

    def __call__(self, x: Tensor) -> Tensor:
        self._measured("x", x)
        if self.padding == "circular":
            return torch.fft.ifft2(torch.fft.fft2(x) * self._transfer(x)).real
        return self._convolve(x, self.kernel.flip(0, 1))

    def adjoint(self, y: Tensor) -> Tensor:
        self._measured("y", y)
        if self.padding == "circular":
            return torch.fft.ifft2(torch.fft.fft2(y) * self._transfer(y).conj()).real
        return self._convolve(y, self.kernel)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        h, w = weight.shape
        weight = weight.to(x.dtype)[None, None]
        return F.conv2d(flat, weight, padding=(h // 2, w // 2)).reshape(x.shape)

    def _transfer(self, x: Tensor) -> Tensor:
        """The kernel's Fourier transform on the grid of ``x``, ``[H, W]``."""

        def make() -> Tensor:
            h, w = self.kernel.shape
            rows, columns = x.shape[-2:]
            grid = F.pad(self.kernel.double().cpu(), (0, columns - w, 0, rows - h))
            return torch.fft.fft2(grid.roll((-(h // 2), -(w // 2)), (0, 1)))

        return self._cached("transfer", x, make, complex_=True)

    def _cached(self, name: str, x: Tensor, make: Callable[[], Tensor], complex_: bool = False) -> Tensor:
        """What ``make`` makes, on the device and in the dtype of ``x``; with its graph where the kernel is learned."""

        def moved() -> Tensor:
            return make().to(x.device, x.dtype.to_complex() if complex_ else x.dtype)

        if self.kernel.requires_grad and torch.is_grad_enabled():
            return moved()
        return self._current().get((name, x.shape[-2:], x.dtype, x.device), moved)

    def _axis(self, axis: int, size: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``T T^T``, where ``T`` is the zero-padded convolution along one axis."""
        factors = self._factors()
        assert factors is not None
        taps = factors[axis]

        def make() -> tuple[Tensor, Tensor]:
            place = torch.arange(size, device=taps.device)
            offset = place[:, None] - place[None, :] + len(taps) // 2
            inside = (offset >= 0) & (offset < len(taps))
            toeplitz = torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0.0)
            u, s, _ = torch.linalg.svd(toeplitz)  # an SVD of T T^T would lose the small singular values
            return s * s, u

        if self.kernel.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "kernel: the spectrum with padding='zeros' has no derivative in the kernel; expected "
                "padding='circular', or a kernel that requires no gradient"
            )
        return self._current().get((axis, size), make)

    def eigenvalues(self, y: Tensor) -> Tensor:
        if self.padding == "circular":
            return self._cached("eigenvalues", y, lambda: _square(self._transfer(y.double())))
        if not self.spectral:
            return super().eigenvalues(y)  # type: ignore[return-value]

        def make() -> Tensor:
            rows, columns = (self._axis(i, y.shape[-2 + i])[0] for i in (0, 1))
            return rows[:, None] * columns[None, :]

        return self._cached("eigenvalues", y, make)

    def _basis(self, y: Tensor, axis: int) -> Tensor:
        return self._cached(f"basis{axis}", y, lambda: self._axis(axis, y.shape[-2 + axis])[1])

    def transform(self, y: Tensor) -> Tensor:
        if self.padding == "circular":
            return torch.fft.fft2(y, norm="ortho")
        return self._basis(y, 0).T @ y @ self._basis(y, 1)

    def inverse_transform(self, c: Tensor) -> Tensor:
        if self.padding == "circular":
            return torch.fft.ifft2(c, norm="ortho").real
        return self._basis(c, 0) @ c @ self._basis(c, 1).T

    def gram_diagonal(self, y: Tensor) -> Tensor | float:
        if self.padding == "circular":
            return (self.kernel.double() ** 2).sum()
        ones = torch.ones_like(y[:1, ...])
        return self._convolve(ones, self.kernel.flip(0, 1) ** 2)[0]

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The pseudo-inverse ``A^+ y``.

        It uses the spectrum where that is known. Otherwise (zero padding, a kernel that is no outer product) it makes
        the dense matrix of one channel and inverts that once for each image size.

        Args:
            y: Blurred images, ``[n, ..., H, W]``.

        Returns:
            A tensor like ``y``.

        Raises:
            TypeError: ``y`` is not a real floating tensor.
            ValueError: ``y`` is smaller than the kernel. Without a spectrum also where ``H * W`` is above 4096, or the
                kernel requires a gradient while gradients are enabled.
        """
        if self.spectral:
            return super().pseudo_inverse(y)
        self._measured("y", y)
        event = tuple(y.shape[-2:])  # each channel is inverted alone

        def make() -> Tensor:
            leading = (1,) * (y.ndim - 3)
            if self.kernel.requires_grad and torch.is_grad_enabled():
                raise ValueError("kernel: the pseudo-inverse has no derivative in a kernel that is no outer product")
            return torch.linalg.pinv(self.matrix((*leading, *event)))

        return (y.flatten(-2) @ self._cached("pseudo_inverse", y, make).T).reshape(y.shape)


def _square(c: Tensor) -> Tensor:
    """``abs(c)^2``, written so that it has a derivative at 0."""
    return c.real**2 + c.imag**2


class Matrix(LinearOperator):
    """The product ``A x`` with a matrix.

    The matrix may be written to later. Its singular vectors are computed at the first use of a closed form, and cached.
    A complex matrix makes complex measurements of a real ``x``, and has no closed forms.

    Args:
        matrix: ``[m, d]``, floating or complex, finite.
        event: The shape of ``d`` elements; ``(d,)`` by default.

    Raises:
        TypeError: ``matrix`` is not a tensor, an array or nested lists.
        ValueError: ``matrix`` has another shape or dtype or is not finite, or ``event`` has another number of elements.
    """

    def __init__(self, matrix: Tensor, event: Sequence[int] | None = None):
        matrix = _constant("matrix", matrix, "finite floating or complex values of shape [m, d]")
        if matrix.ndim == 3:
            raise ValueError(
                f"matrix: expected one matrix [m, d] for all observations, got shape {list(matrix.shape)}; "
                "make one call for each observation instead"
            )
        numbers = matrix.ndim == 2 and (matrix.dtype in STATE_DTYPES or matrix.is_complex())
        if not numbers or not len(matrix) or not torch.isfinite(matrix).all():
            raise ValueError(
                "matrix: expected finite floating or complex values of shape [m, d], "
                f"got {matrix.dtype} {list(matrix.shape)}"
            )
        self.event = (matrix.shape[1],) if event is None else arguments.shape("event", event, "the shape of an event")
        if torch.Size(self.event).numel() != matrix.shape[1]:
            raise ValueError(f"event: expected {matrix.shape[1]} elements, got shape {list(self.event)}")
        self.weight = _normal(matrix)
        self._cache = _Cache(self.weight)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Operator:
        there = super().to(device, dtype)
        assert isinstance(there, Matrix)
        if self.weight.is_complex():
            there._cache = _Cache(there.weight)
            return there
        # Decompose before the cast: the rounding of the original dtype decides which singular values are 0.
        if not self._cache.serves(self.weight, by_value=True):
            self._cache = _Cache(self.weight)
        with torch.no_grad():
            pair = tuple(_normal(t.to(device, dtype)) for t in self._decomposition())
        there._cache = _Cache(there.weight)
        there._cache.get("svd", lambda: pair)
        return there

    @property
    def spectral(self) -> bool:
        return super().spectral and not self.weight.is_complex()

    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors ``[m, k]``, ``k <= m``, and the eigenvalues of ``A A^T`` ``[m]``."""
        if self.weight.is_complex():
            raise NotImplementedError(f"operator: the spectrum of {self} is not known, as its matrix is complex")
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "matrix: its spectrum has no derivative; expected one that requires no gradient, or torch.no_grad()"
            )

        def make() -> tuple[Tensor, Tensor]:
            m, d = self.weight.shape
            u, s, _ = torch.linalg.svd(self.weight.double(), full_matrices=m > d)
            # Singular values at the rounding of the matrix's dtype count as 0: the rank is lower.
            rounding = 16.0 * torch.finfo(self.weight.dtype).eps * s.amax()
            return u, F.pad(torch.where(s > rounding, s * s, 0.0), (0, m - len(s)))

        if not self._cache.serves(self.weight):
            self._cache = _Cache(self.weight)
        return self._cache.get("svd", make)

    def __repr__(self) -> str:
        return f"Matrix({list(self.weight.shape)})"

    def _measured(self, name: str, y: Any) -> Tensor:
        if _samples(name, y, ("matrix", self.weight)).ndim != 2 or y.shape[1] != len(self.weight):
            raise ValueError(f"{name}: expected measurements [n, {len(self.weight)}], got shape {list(y.shape)}")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(_samples("x", x, ("matrix", self.weight)).shape[1:]) != self.event:
            raise ValueError(f"matrix: expected events of shape {list(self.event)}, got {list(x.shape[1:])} of x")
        dtype = x.dtype.to_complex() if self.weight.is_complex() else x.dtype
        return x.flatten(1).to(dtype) @ self.weight.to(dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        y = self._measured("y", y)
        if self.weight.is_complex():
            dtype = y.dtype.to_complex()
            return (y.to(dtype) @ self.weight.to(dtype).conj()).real.reshape(-1, *self.event)
        return (y @ self.weight.to(y.dtype)).reshape(-1, *self.event)

    def eigenvalues(self, y: Tensor) -> Tensor:
        return self._decomposition()[1].to(y.real.dtype)

    def transform(self, y: Tensor) -> Tensor:
        return y @ self._decomposition()[0].to(y.dtype)

    def inverse_transform(self, c: Tensor) -> Tensor:
        return c @ self._decomposition()[0].to(c.dtype).T

    def gram_diagonal(self, y: Tensor) -> Tensor:
        if self.weight.is_complex():
            return _square(self.weight).to(y.real.dtype).sum(1)
        return (self.weight.to(y.dtype) ** 2).sum(1)


class ParallelBeam(Matrix):
    """Tomography with parallel rays: each view sums an image along the rays of one direction.

        operator = ParallelBeam(torch.arange(12) * (math.pi / 12), size=64)  # 12 views over half a turn
        sinogram = operator(x).unflatten(1, (12, 64))

    At angle 0 a view sums over the rows, at pi / 2 over the columns. In between, its detector lies along ``(cos, sin)``
    in columns and rows, with its middle in line with the image's. A bin measures the mean of the line integrals over
    its width, in pixels. That is the area that its strip shares with each pixel, so nothing is interpolated.

    The matrix is dense: 12 views of 64 by 64 pixels take 12.6 MB.

    Args:
        angles: ``[V]``, in radians, finite.
        size: Rows and columns of the image, whose event is ``(1, size, size)``.
        detectors: Bins of a view, each as wide as a pixel; ``size`` by default. ``1.42 * size`` reach the corners.

    Attributes:
        weight: The matrix, ``[V * detectors, size * size]`` in float32.

    Raises:
        TypeError: ``angles`` is not a tensor, an array or a list.
        ValueError: ``angles`` has another shape or is not finite, or ``size`` or ``detectors`` is no integer above 0.
    """

    def __init__(self, angles: Tensor | Sequence[float], size: int, detectors: int | None = None):
        expected = "finite angles of shape [V]"
        angles = _constant("angles", angles, expected).double().cpu()
        if angles.ndim != 1 or not len(angles) or not torch.isfinite(angles).all():
            raise ValueError(f"angles: expected {expected}, got {got(angles)}")
        size = integer("size", size, low=1)
        detectors = size if detectors is None else integer("detectors", detectors, low=1)
        place = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
        edges = torch.arange(detectors + 1, dtype=torch.float64, device="cpu") - detectors / 2
        views = []
        for cos, sin in torch.stack([angles.cos(), angles.sin()], 1).tolist():
            along = (place[None, :] * cos + place[:, None] * sin).flatten()  # of each pixel's centre
            views.append(_area_before(edges[:, None] - along, abs(cos), abs(sin)).diff(dim=0))
        super().__init__(torch.cat(views).float(), (1, size, size))
        self.angles, self.detectors = angles, detectors

    def __repr__(self) -> str:
        return f"ParallelBeam({len(self.angles)} views, size={self.event[1]}, detectors={self.detectors})"


def _area_before(t: Tensor, cos: float, sin: float) -> Tensor:
    """The share of a unit square that lies less than ``t`` along a direction, counted from its centre.

    The square casts a trapezoid; this is its integral, from second differences of parabolas.
    """
    sin, cos = max(min(cos, sin), 1e-6), max(cos, sin)  # the floor of a ray along an axis costs less than float32 has
    t = t.clamp(-1, 1)  # beyond it all is 0 or 1; large squares would cancel

    def parabola(v: Tensor) -> Tensor:
        return v.clamp(min=0) ** 2

    outer, inner = (cos + sin) / 2, (cos - sin) / 2
    second = parabola(t + outer) - parabola(t + inner) - parabola(t - inner) + parabola(t - outer)
    return second / (2 * cos * sin)


class Function(Operator):
    """Any function as an operator. A linear one becomes a `LinearOperator`, solved by conjugate gradients.

    The functions get copies, into which they may write. Where one returns an output object, as a decoder does, its
    tensor ``sample`` counts. ``f`` may be complex, for a complex ``y``; ``adjoint`` and ``pseudo_inverse`` return real
    tensors for real measurements.

    Args:
        f: ``f(x [n, *event]) -> [n, *measurement]``, each sample alone.
        linear: Whether ``f`` is linear. It then needs ``adjoint`` or ``event``.
        event: The shape of an event, for a linear ``f``. Without ``adjoint`` autograd then gives the adjoint.
        adjoint: ``A^T``, ``[n, *measurement] -> [n, *event]``, for a linear ``f``.
        pseudo_inverse: ``h^+``, ``[n, *measurement] -> [n, *event]``. With it PiGDM also takes an ``f`` without a
            derivative.

    Raises:
        TypeError: ``f``, ``adjoint`` or ``pseudo_inverse`` is not callable, or ``linear`` is not a bool.
        ValueError: ``linear=True`` comes without ``adjoint`` and ``event``, or one of these comes without
            ``linear=True``.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        *,
        linear: bool = False,
        event: Sequence[int] | None = None,
        adjoint: Callable[[Tensor], Tensor] | None = None,
        pseudo_inverse: Callable[[Tensor], Tensor] | None = None,
    ):
        function("f", f)
        linear = flag("linear", linear)
        for name, given in (("adjoint", adjoint), ("pseudo_inverse", pseudo_inverse)):
            if given is not None:
                function(name, given, "a callable or None")
        if linear and adjoint is None and event is None:
            raise ValueError("event: expected the shape of an event, or an adjoint, for a linear function; got neither")
        if not linear and (adjoint is not None or event is not None):
            raise ValueError("adjoint, event: expected linear=True with them")
        if linear and not isinstance(self, LinearOperator):
            if type(self) is not Function:
                raise ValueError(
                    f"linear: expected False for {type(self).__name__}, which is no LinearOperator, got True"
                )
            self.__class__ = _LinearFunction
        self.f = f
        self.event = None if event is None else arguments.shape("event", event, "the shape of an event")
        self._adjoint = adjoint
        self._pseudo_inverse = pseudo_inverse

    def __repr__(self) -> str:
        return f"Function({getattr(self.f, '__name__', type(self.f).__name__)})"

    @property
    def has_adjoint(self) -> bool:
        """Whether ``adjoint`` was given."""
        return self._adjoint is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The measurement ``f(x)``.

        Args:
            x: Clean samples, ``[n, *event]``.

        Returns:
            ``[n, *measurement]``.

        Raises:
            TypeError: ``f`` returned neither a tensor nor an object with a tensor ``sample``.
        """
        arguments.tensor("x", x)
        return returned("f", self.f(x.clone()), real=False)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The pseudo-inverse that was given.

        A linear function without one computes it from its dense matrix, where ``event`` was given and has at most 4096
        elements.

        Args:
            y: Measurements, ``[n, *measurement]``.

        Returns:
            ``[n, *event]``.

        Raises:
            TypeError: The function returned no tensor, or a complex one for a real ``y``.
            ValueError: There is no pseudo-inverse.
        """
        if self._pseudo_inverse is None:
            raise ValueError("pseudo_inverse: expected Function(f, pseudo_inverse=...), got none")
        arguments.tensor("y", y)
        return returned("pseudo_inverse", self._pseudo_inverse(y.clone()), real=not y.is_complex())


class _LinearFunction(Function, LinearOperator):
    linear = True

    def adjoint(self, y: Tensor) -> Tensor:
        arguments.tensor("y", y)
        if self._adjoint is not None:
            return returned("adjoint", self._adjoint(y.clone()), real=not y.is_complex())
        assert self.event is not None
        _samples("y", y)
        with torch.enable_grad():
            x = y.real.new_zeros(y.shape[0], *self.event, requires_grad=True)
            z = self(x)
            if z.shape != y.shape or z.dtype != y.dtype:
                raise ValueError(f"y: expected {z.dtype} {list(z.shape)}, as f returns, got {got(y)}")
            (gradient,) = torch.autograd.grad(z, x, y)
        return gradient

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        if self._pseudo_inverse is not None or self.event is None:
            return super().pseudo_inverse(y)
        _samples("y", y)
        # The matrix is made on the device and in the dtype of y: f may hold tensors that cannot be moved.
        flat, dtype = y.flatten(1), y.real.dtype
        matrix = self.matrix(self.event, dtype, y.device)
        if y.is_complex():  # x is real: real and imaginary parts are measurements alike
            matrix, flat = torch.cat([matrix.real, matrix.imag]), torch.cat([flat.real, flat.imag], 1)
        inverse = torch.linalg.pinv(matrix.double(), rtol=max(matrix.shape) * torch.finfo(dtype).eps)
        return (flat @ inverse.to(dtype).T).reshape(-1, *self.event)


class Pairs(Operator):
    """The complex measurements of ``operator`` as pairs of real numbers, ``[n, *measurement, 2]``."""

    def __new__(cls, operator: Operator):
        return super().__new__(_LinearPairs if isinstance(operator, LinearOperator) else cls)

    def __init__(self, operator: Operator):
        self.operator, self.observations = operator, operator.observations

    def __getnewargs__(self):
        return (self.operator,)

    def __repr__(self) -> str:
        return repr(self.operator)

    def __call__(self, x: Tensor) -> Tensor:
        z = self.operator(x)
        if not z.is_complex():
            raise TypeError(f"operator: expected complex measurements, as y is, got {z.dtype} from {self.operator}")
        return torch.view_as_real(z.resolve_conj())

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return _real(self.operator.pseudo_inverse(torch.view_as_complex(y.contiguous())))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Operator:
        return Pairs(moved(self.operator, device, dtype))

    def at(self, rows: Tensor) -> Operator:
        return Pairs(self.operator.at(rows))


class _LinearPairs(Pairs, LinearOperator):
    linear = True

    def adjoint(self, y: Tensor) -> Tensor:
        """``Re(A^H y)``: the transpose of the map from a real ``x`` to the pairs."""
        return _real(self.operator.adjoint(torch.view_as_complex(y.contiguous())))  # type: ignore[attr-defined]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
