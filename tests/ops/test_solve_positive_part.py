"""Solving with the positive part of small matrices: by eigenvalues, by matrix products, and by the Triton kernel."""

from __future__ import annotations

import math

import pytest
import torch

from fastguide import ops
from fastguide.ops.solve_positive_part.reference import solve_by_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(number: int, m: int, condition: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Symmetric matrices with eigenvalues of both signs, with their eigenvectors and eigenvalues."""
    basis = torch.linalg.qr(normal(number, m, m)).Q
    spectrum = normal(number, m, seed=1) * torch.logspace(0, -math.log10(condition), m, dtype=torch.float64)
    gram = basis @ torch.diag_embed(spectrum) @ basis.mT
    return 0.5 * (gram + gram.mT), basis, spectrum


def log_density(residual, solution, log_determinant):
    """``log N(residual; 0, S)``, with ``S^-1 residual`` and ``log det S``."""
    return -0.5 * ((residual * solution).sum(1) + log_determinant + residual.shape[1] * math.log(2 * math.pi))


def by_eigenvalues(gram, residual, variance):
    return ops.solve_positive_part(gram, residual, variance=variance, backend="reference")


def by_triton(gram, residual, variance):
    pytest.importorskip("triton")
    given = gram.to(DEVICE), residual.to(DEVICE)
    return [r.cpu() for r in ops.solve_positive_part(*given, variance=variance, backend="triton")]


@pytest.mark.parametrize("solve", (by_eigenvalues, solve_by_products, by_triton))
@pytest.mark.parametrize("m", (2, 7, 16))  # a power of two, a padded size, the largest
@pytest.mark.parametrize("condition", (1.0, 1e4, 1e9))
def test_negative_eigenvalues_count_as_zero(solve, m, condition):
    number = 5 if m < 16 else 2  # Triton's interpreter takes 0.15 s for one of 16
    gram, basis, spectrum = grams(number, m, condition)
    residual = normal(number, m, seed=2)
    for variance in (1e-2, 1e-5):
        held = spectrum.clamp(min=0.0) + variance
        expected = (basis @ ((basis.mT @ residual[..., None])[..., 0] / held)[..., None])[..., 0]
        density = log_density(residual, expected, torch.log(held).sum(1))
        solution, found = solve(gram, residual, variance)
        allowed = 1e-10 / variance  # an eigenvalue below 1e-10 of the largest may count as half of itself
        torch.testing.assert_close(solution, expected, rtol=allowed, atol=allowed * float(expected.abs().max()))
        torch.testing.assert_close(found, density, rtol=10 * allowed, atol=m * allowed)


@pytest.mark.parametrize("solve", (by_eigenvalues, solve_by_products, by_triton))
@pytest.mark.parametrize("m", (2, 7, 16))
def test_matrices_of_zeros(solve, m):
    residual = normal(2, m, seed=2)
    nothing, found = solve(torch.zeros(2, m, m, dtype=torch.float64), residual, 0.01)
    torch.testing.assert_close(nothing, 100.0 * residual)
    torch.testing.assert_close(found, log_density(residual, nothing, torch.full_like(found, m * math.log(0.01))))


@pytest.mark.parametrize("solve", (by_eigenvalues, solve_by_products, by_triton))
def test_a_matrix_that_is_not_finite_gives_nan_and_spoils_no_other(solve):
    gram, residual = grams(3, 4)[0], normal(3, 4, seed=2)
    expected = solve(gram, residual, 0.3)
    for bad in (math.nan, math.inf, -math.inf):
        gram[1, 0, 2] = bad
        for got, right in zip(solve(gram, residual, 0.3), expected, strict=True):
            assert got[1].isnan().all()
            torch.testing.assert_close(got[::2], right[::2])


@pytest.mark.parametrize(("number", "m"), ((0, 3), (1, 1), (33, 2), (70, 4), (9, 5)))  # none; some, many in a program
def test_the_kernel_solves_any_number_of_matrices(number, m):
    gram, residual = grams(number, m)[0], normal(number, m, seed=2)
    for got, expected in zip(by_triton(gram, residual, 0.3), by_eigenvalues(gram, residual, 0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_the_formula():
    # The eigenvalues are at least 0.1 away from 0, where the positive part has no derivative.
    root = normal(3, 4, 4)
    gram = (root @ root.mT + 0.1 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    residual = normal(3, 4, seed=2).requires_grad_()

    def solve(gram, residual):
        return ops.solve_positive_part(0.5 * (gram + gram.mT), residual, variance=0.3)

    assert torch.autograd.gradcheck(solve, (gram, residual))
    torch.library.opcheck(
        torch.ops.fastguide.solve_positive_part.default, (gram.detach(), residual.detach(), 0.3, "auto")
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(gram=torch.zeros(2, 3, 3)), ValueError, "gram: expected float64 values on cpu, got torch.float32 on cpu"),
        (dict(gram=normal(2, 3, 2)), ValueError, r"gram: expected shape \[n, m, m\] for .*, got \[2, 3, 2\]"),
        (dict(residual=normal(2)), ValueError, r"residual: expected shape \[n, m\], got \[2\]"),
        (dict(residual=[1.0]), TypeError, "residual: expected a tensor, got list"),
        (dict(variance=0.0), ValueError, "variance: expected a finite number > 0, got 0.0"),
        (dict(backend="cpu"), RuntimeError, "cpu has no kernel for solve_positive_part"),
    ],
)
def test_errors(changes, error, message):
    given = dict(gram=normal(2, 3, 3), residual=normal(2, 3), variance=1.0) | changes
    with pytest.raises(error, match=message):
        ops.solve_positive_part(given.pop("gram"), given.pop("residual"), **given)
