"""The cpu kernels of `fastguide.integrations.particles` against numpy, which also adds weights one after the other. For
tests against `particles` itself see test_particles.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastguide.integrations import particles
from fastguide.ops import _native

SIZES = (1, 2, 5, 1025, 70_000)  # the last is divided among threads


# The division among threads does not depend on the instruction set: one thread with the best, several with each.
@pytest.fixture(
    params=[(_native.instruction_sets()[0], 1), *((name, 3) for name in _native.instruction_sets())],
    ids=str,
    autouse=True,
)
def everywhere(request, instruction_set, threads):
    name, number = request.param
    with instruction_set(name), threads(number):
        yield


def weights(number: int, spread: float = 1.0, dead: bool = False) -> np.ndarray:
    w = np.exp(spread * np.random.default_rng(number).standard_normal(number))
    if dead and number > 2:
        w[:: max(number // 7, 2)] = w[-1] = 0.0
    return w / w.sum()


def inverted(W: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The first k whose sum reaches a position. For a position above all sums, the last k with a weight."""
    return np.minimum(np.searchsorted(np.cumsum(W), positions), np.flatnonzero(W)[-1])


def spacings(number: int) -> np.ndarray:
    times = np.cumsum(-np.log(np.random.rand(number + 1)))
    return times[:-1] / times[-1]


def systematic(W, M):
    return inverted(W, (np.random.rand(1) + np.arange(M)) / M)


def stratified(W, M):
    return inverted(W, (np.random.rand(M) + np.arange(M)) / M)


def multinomial(W, M):
    return inverted(W, spacings(M))


def residual(W, M):
    shares = M * W
    whole = np.floor(shares)
    certain = np.repeat(np.arange(len(W)), whole.astype(np.int64))
    left = M - len(certain)
    drawn = inverted((shares - whole) / left, spacings(left)) if left else certain[:0]
    return np.concatenate([certain, drawn])


def killing(W, M):
    ancestors = np.arange(M)
    killed = np.random.rand(M) * W.max() >= W
    ancestors[killed] = multinomial(W, np.count_nonzero(killed))
    return ancestors


@pytest.mark.parametrize("scheme", (systematic, stratified, multinomial, residual, killing))
def test_ancestors(scheme):
    for number, spread, dead in itertools.product(SIZES, (0.0, 1.0, 20.0), (False, True)):
        W = weights(number, spread, dead)
        for M in (number,) if scheme is killing else (number, 3, 2 * number + 1):
            np.random.seed(number)
            expected = scheme(W, M)
            after = np.random.rand()
            np.random.seed(number)
            np.testing.assert_array_equal(getattr(particles, scheme.__name__)(W, M), expected)
            assert np.random.rand() == after


@pytest.mark.parametrize("number", SIZES)
def test_ssp_copies_the_floor_or_the_ceiling_of_each_share(number):
    for M in (number, 3, 2 * number + 1):
        W = weights(number)
        ancestors = particles.ssp(W, M)
        copies = np.bincount(ancestors, minlength=number)
        assert len(ancestors) == M and (np.diff(ancestors) >= 0).all() and (np.abs(copies - M * W) < 1 + 1e-9).all()


def test_ssp_copies_each_share_in_the_mean():
    W, M, runs = weights(6), 9, 4000
    np.random.seed(0)
    counts = np.zeros(6)
    for _ in range(runs):
        counts += np.bincount(particles.ssp(W, M), minlength=6)
    fraction = M * W % 1
    error = np.abs(counts / runs - M * W) / np.sqrt(fraction * (1 - fraction) / runs)
    assert error.max() < 4.0


@pytest.mark.parametrize("number", SIZES)
def test_functions_of_log_weights(number):
    lw, W = 5 * np.random.default_rng(1).standard_normal(number) + 300, weights(number)
    w = np.exp(lw - lw.max())
    np.testing.assert_allclose(particles.exp_and_normalise(lw), w / w.sum(), rtol=1e-13)
    np.testing.assert_allclose(particles.essl(lw), w.sum() ** 2 / (w * w).sum(), rtol=1e-13)
    np.testing.assert_allclose(particles.log_mean_exp(lw), lw.max() + np.log(w.mean()), rtol=1e-13)
    expected = lw.max() + np.log(np.average(w, weights=W))
    np.testing.assert_allclose(particles.log_mean_exp(lw, W), expected, rtol=1e-13)


# A number takes two words; the generator makes 624 words at a time. Counts up to their end, just past it, and far past.
@pytest.mark.parametrize("count", (1, 311, 312, 625, 5000))
def test_uniforms_are_numpys(count):
    for skipped in (0, 1, 623):
        np.random.seed(5)
        np.random.randint(0, 1 << 32, skipped, dtype=np.uint32)
        expected = np.random.rand(count), np.random.rand()
        np.random.seed(5)
        np.random.randint(0, 1 << 32, skipped, dtype=np.uint32)
        got = particles._uniforms(count), np.random.rand()
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1] == expected[1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, list])
def test_log_mean_exp_of_narrow_weights(dtype):
    """Sums are in float64, as in numpy.average."""
    v = np.random.default_rng(0).standard_normal(70_000)
    W = np.random.default_rng(1).random(70_000).astype(np.float16)
    W = W.tolist() if dtype is list else W.astype(dtype)
    expected = v.max() + np.log(np.average(np.exp(v - v.max()), weights=W))
    np.testing.assert_allclose(particles.log_mean_exp(v, W), expected, rtol=1e-12)
