"""Solves with the positive part of small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import number
from .. import _arguments
from .._operation import Operation
from . import reference

LIMIT = 16  # the kernel serves matrices with at most so many rows


def solve_positive_part(
    gram: Tensor,
    residual: Tensor,
    *,
    variance: float,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Solves with ``S = variance I + gram_+``, where ``gram_+`` is ``gram`` with negative eigenvalues set to 0.

        S^-1 residual   and   log N(residual; 0, S)

    The Gaussian likelihood of second moments needs both: a gradient and a density. Its estimate of ``A C_t A^T`` may
    have negative eigenvalues. Results are differentiable in ``gram`` and ``residual``.

    On the CPU, eigenvalues are computed. On a GPU that would wait for the device, so a fixed number of matrix products
    is used instead. Both agree to 1e-9, except for eigenvalues below 1e-10 of the largest: the products count between
    half and all of such an eigenvalue. The GPU kernel serves ``m <= 16``; larger matrices fall back to the reference,
    with a warning.

    Args:
        gram: ``[n, m, m]`` in float64. Its symmetric part ``(gram + gram^T) / 2`` counts.
        residual: ``[n, m]`` in float64, on the device of ``gram``.
        variance: The variance of the measurement's noise, a number > 0.
        out: A tuple of tensors for both results, as in `randn`.
        backend: As in `randn`.

    Returns:
        solution: ``S^-1 residual``, ``[n, m]`` in float64; NaN where ``gram`` is not finite.
        log_density: ``log N(residual; 0, S)``, ``[n]`` in float64; NaN where ``gram`` is not finite.

    Raises:
        TypeError: ``gram`` or ``residual`` is not a tensor, or ``variance`` is not a number.
        ValueError: Shapes, dtypes or devices do not match, ``variance`` is out of range, or ``out`` is given for a
            result that has a gradient.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Boys et al. 2023 (TMPD) for the Gaussian of second moments.
    """
    gram = _arguments.own("gram", gram)
    residual = _arguments.own("residual", residual)
    for name, value in (("gram", gram), ("residual", residual)):
        if value.dtype != torch.float64 or value.device != gram.device:
            raise ValueError(f"{name}: expected float64 values on {gram.device}, got {value.dtype} on {value.device}")
    if residual.ndim != 2:
        raise ValueError(f"residual: expected shape [n, m], got {list(residual.shape)}")
    if gram.shape != (*residual.shape, residual.shape[1]):
        raise ValueError(f"gram: expected shape [n, m, m] for residual [n, m], got {list(gram.shape)}")
    expected = (residual.shape, residual.dtype), (residual.shape[:1], residual.dtype)
    into = _arguments.out(out, expected, gram.device, (gram, residual))
    results = _solve_positive_part(backend, gram, residual, number("variance", variance, above=0.0), out=into)
    return results if out is None else out


def _fake(gram, residual, variance):
    return torch.empty_like(residual, memory_format=torch.contiguous_format), residual.new_empty(residual.shape[0])


def _obstacle(gram, residual, variance):
    rows = gram.shape[-1]
    return f"serves matrices of at most {LIMIT} rows, and these have {rows}" if rows > LIMIT and gram.is_cuda else ""


_solve_positive_part = Operation(
    "solve_positive_part(Tensor gram, Tensor residual, float variance) -> (Tensor, Tensor)",
    reference=reference.solve_positive_part,
    fake=_fake,
    kernels={"triton": "fastguide.ops.solve_positive_part.triton:call"},
    dtypes=(torch.float64,),
    obstacle=_obstacle,
    differentiable=True,
)
