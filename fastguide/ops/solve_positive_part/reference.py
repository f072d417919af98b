"""Solves with the positive part of small symmetric matrices: by eigenvalues, or by matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["solve_by_products", "solve_positive_part"]


def solve_positive_part(gram: Tensor, residual: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Solves with ``S = variance I + gram_+``: ``S^-1 residual`` and ``log N(residual; 0, S)``. See
    `fastguide.ops.solve_positive_part`.

    CPU tensors are solved by eigenvalues, other tensors by matrix products.
    """
    gram = 0.5 * (gram + gram.mT)
    if not gram.is_cpu:  # on a GPU eigh waits for the device
        return solve_by_products(gram, residual, variance)
    finite = torch.isfinite(gram).flatten(1).all(1)
    eigenvalues, basis = torch.linalg.eigh(torch.where(finite[:, None, None], gram, 0.0))  # eigh raises for a NaN
    eigenvalues = eigenvalues.clamp(min=0) + variance
    c = (basis.mT @ residual[..., None])[..., 0]
    solution = (basis @ (c / eigenvalues)[..., None])[..., 0]
    log_density = _log_density(residual, solution, torch.log(eigenvalues).sum(1))
    return torch.where(finite[:, None], solution, math.nan), torch.where(finite, log_density, math.nan)


def _log_density(residual: Tensor, solution: Tensor, log_determinant: Tensor) -> Tensor:
    """``log N(residual; 0, S)``, ``[n]``, with ``solution = S^-1 residual``."""
    constant = residual.shape[1] * math.log(2 * math.pi)
    return -0.5 * ((residual * solution).sum(1) + log_determinant + constant)


# Iterated odd polynomials converge to the sign (Higham 2008, chapter 5). The quintics map [1e-10, 1], relative to the
# largest eigenvalue, into [0.68, 1.21] (3.44^19 = 1.6e10). Newton-Schulz steps then converge.
QUINTICS, NEWTON_STEPS = 19, 6
QUINTIC = (3.4445, -4.7750, 2.0315)


def solve_by_products(gram: Tensor, residual: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """`solve_positive_part` by a fixed number of matrix products: ``gram_+ = gram (I + sign(gram)) / 2``."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    sign = gram / torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(QUINTICS):
        square = sign @ sign
        sign = sign @ (QUINTIC[0] * identity + QUINTIC[1] * square + QUINTIC[2] * (square @ square))
    for _ in range(NEWTON_STEPS):
        sign = sign @ (1.5 * identity - 0.5 * (sign @ sign))
    held = 0.5 * (gram + gram @ sign)
    # Gauss-Jordan, without pivoting since S is positive definite. No solver library promises that its calls can be
    # captured in a CUDA graph, and before torch 2.12 a batched `torch.cholesky_solve` runs MAGMA on its own streams.
    rows = torch.cat([0.5 * (held + held.mT) + variance * identity, residual[..., None]], 2)
    pivots = []
    for j in range(gram.shape[1]):
        pivots.append(rows[:, j : j + 1, j])
        row = rows[:, j : j + 1] / pivots[j][..., None]
        rows = torch.addcmul(rows, rows[:, :, j : j + 1], row, value=-1.0)
        rows[:, j : j + 1] = row
    solution = rows[:, :, -1]
    return solution, _log_density(residual, solution, torch.log(torch.cat(pivots, 1)).sum(1))
