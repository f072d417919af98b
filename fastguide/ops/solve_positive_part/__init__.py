"""Solves with the positive part of small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import number
from .. import _arguments
from .._operation import Operation
from . import reference

LIMIT = 16  # rows of a matrix that the kernel serves


def solve_positive_part(
    gram: Tensor, residual: Tensor, *, variance: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``S^-1 residual`` and ``log det S`` of ``S = variance I + (gram)_+``: negative eigenvalues count as 0.

    The Gaussian of an estimated second moment needs both (Boys et al. 2023): its ``A C_t A^T`` is not always positive.

    Args:
        gram: ``[n, m, m]``, float64, symmetric and finite.
        residual: ``[n, m]``, float64.
        variance: above 0, of the measurement's noise.

    Returns ``[n, m]`` and ``[n]`` in float64. The CPU takes eigenvalues; a GPU, where those would wait for the device,
    a fixed number of matrix products, which agree to 1e-9 but for eigenvalues below 1e-10 of the largest: they come in
    as something between half and all of themselves. There one kernel serves ``m <= 16``. Differentiable.
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
    return _solve_positive_part(backend, gram, residual, number("variance", variance, above=0.0))


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
