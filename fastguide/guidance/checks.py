"""What is asked of a likelihood and its operator before a run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import foreign, ops
from ..arguments import one_of
from ..likelihoods import Callable as CallableLikelihood
from ..likelihoods import Likelihood
from ..operators import STREAM_PROBES, Function, LinearOperator, Operator, Pairs
from .base import Run

COVARIANCES = ("point", "isotropic", "moment")


def default_covariance(likelihood: Likelihood, measurements: int) -> str:
    """``"moment"`` where the likelihood supports it, else ``"isotropic"``.

    Never ``"point"``: it diverges where the measurement's noise is small beside the uncertainty of ``x_0``.
    """
    for covariance in ("moment", "isotropic"):
        if not likelihood.supports(covariance, measurements):
            return covariance
    raise ValueError(
        f"covariance: {type(likelihood).__name__} supports only covariance='point'. Pass it explicitly; it can diverge "
        "where the likelihood is sharp"
    )


def check_covariance(
    run: Run, likelihood: Likelihood, covariance: str, measurements: int, guided: bool = True
) -> Likelihood:
    """The likelihood, with what the covariance needs to know about the operator.

    ``guided``: whether the gradient guides the samples.
    """
    one_of("covariance", covariance, COVARIANCES)
    reason = likelihood.supports(covariance, measurements)
    if reason:
        raise ValueError(f"covariance: {reason}")
    return likelihood.measure_spread(run.event, guided) if covariance == "isotropic" else likelihood


def prepare_likelihood(run: Run, likelihood: Likelihood) -> tuple[Likelihood, int]:
    """The likelihood on the run's device, and the number of its measurements.

    Raises unless ``y`` has the shape of a measurement, and one row or one per observation.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood: expected a fastguide.likelihoods likelihood, got {type(likelihood).__name__}")
    likelihood = likelihood.to(run.device, run.compute_dtype)
    rows = likelihood.y.shape[0]
    if rows not in (1, run.observations):
        raise ValueError(f"y: expected {_rows(run)}, got {rows}")
    for level in run.levels:
        likelihood.scale_at(level.t)
    if isinstance(likelihood, CallableLikelihood):
        return likelihood, 0
    own = likelihood.operator.observations
    if own not in (None, run.observations):
        raise ValueError(f"operator: expected {_rows(run)}, got {own} from {likelihood.operator}")
    rows = rows if own is None else own
    probe = torch.zeros(rows, *run.event, dtype=run.compute_dtype, device=run.device)
    with torch.no_grad():
        z = likelihood.operator(probe)
    if z.is_complex():
        raise TypeError(
            f"y: expected complex values, as {likelihood.operator} returns {z.dtype}, got {likelihood.y.dtype}; pairs "
            "of reals need torch.view_as_real in the operator too"
        )
    apart = run.particles == 1 and (run.chunk_size is None or run.chunk_size >= run.observations)
    if own is None and run.observations > 1 and not apart and not z.is_meta:
        with torch.no_grad():
            count = len(likelihood.operator(probe[:1]))
        if count != 1:
            raise ValueError(
                f"operator: expected one that takes each sample alone, got {count} rows for one from "
                f"{likelihood.operator}; an operator for each observation defines observations and at(rows)"
            )
    if isinstance(likelihood.operator, LinearOperator) and not z.is_meta and (z != 0).any():
        raise ValueError(
            f"operator: expected a linear one, which maps 0 to 0, got {z.abs().max().item():g} from "
            f"{likelihood.operator}; subtract a constant from y, or do not declare the operator linear"
        )
    with torch.no_grad():
        _try_operator(likelihood.operator, probe)
    if z.shape[1:] != likelihood.y.shape[1:]:
        raise ValueError(
            f"y: expected shape [B, {', '.join(map(str, z.shape[1:]))}], what {likelihood.operator} makes of an event "
            f"{list(run.event)}, got {list(likelihood.y.shape)}"
        )
    return likelihood, z[0].numel()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The real part of the inner product, in double precision."""
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b.real).sum()


def _rows(run: Run) -> str:
    """The numbers of rows that ``y`` may have, and why, for an error."""
    number = "1 row" if run.observations == 1 else f"1 row or {run.observations}"
    return f"{number}, since shape (B, *event) says B = {run.observations} and event {list(run.event)}"


def _try_operator(operator: Operator, like: Tensor) -> None:
    """Raise where a user's operator writes into its input, or its methods contradict each other."""
    if isinstance(operator, Pairs):
        operator = operator.operator
    known = type(operator).__module__.startswith("fastguide.") and not (
        isinstance(operator, Function) and operator.linear
    )
    if known or like.is_meta:
        return

    def call(name: str, *tensors: Tensor) -> Tensor:
        copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        result = getattr(operator, name)(*tensors)
        for tensor, copy, version in zip(tensors, copies, versions, strict=True):
            if tensor._version != version or not torch.equal(tensor, copy):
                raise ValueError(
                    f"operator: expected one that leaves its input as it is, got {operator} whose {name} writes into it"
                )
        return result.clone()  # the next call may return the same memory

    def draw(like: Tensor, step: int) -> Tensor:
        return ops.randn(like.shape, seed=0, step=step, stream=STREAM_PROBES, dtype=like.dtype, device=like.device)

    x = draw(like, 0)
    z = call("__call__", x)
    if not isinstance(operator, LinearOperator):
        return
    back = foreign.returned("adjoint", call("adjoint", z), real=not z.is_complex())
    if back.shape != x.shape:
        raise ValueError(
            f"operator: expected an adjoint that returns {list(x.shape)}, got {list(back.shape)} from {operator}"
        )
    errors = []
    for step in (1, 2, 3):
        w = torch.view_as_complex(draw(torch.view_as_real(z), step)) if z.is_complex() else draw(z, step)
        errors.append(_dot(z, w) - _dot(x, call("adjoint", w)))
    # Both products are about as large as the norm of z. The tolerance admits half precision inside the operator.
    if torch.stack(errors).abs().max() > 0.05 * _dot(z, z).sqrt():
        raise ValueError(f"operator: expected a linear one with <A x, z> = <x, A^T z>, got another from {operator}")
    if type(operator).eigenvalues is not LinearOperator.eigenvalues:
        gram = operator(back)
        spectrum = operator.inverse_transform(operator.transform(z) * operator.eigenvalues(z))
        if not (spectrum - gram).norm() <= 1e-2 * gram.norm() + 1e-6 * z.norm():
            raise ValueError(
                "operator: expected eigenvalues, transform and inverse_transform that give A A^T, "
                f"got others from {operator}, a {type(operator).__name__}; a class that inherits them from another "
                "operator and changes what it does can derive from LinearOperator instead, which needs none"
            )
