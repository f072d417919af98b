"""fastguide.integrations.particles against particles itself: the same generator gives the same ancestors."""

import itertools
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("particles", reason="particles is not installed")

import particles
from numba import njit
from particles import distributions, state_space_models
from particles import resampling as theirs

from fastguide.integrations import particles as ours
from fastguide.ops import _native

SCHEMES = sorted(ours.SCHEMES)


@njit
def _seed_numba(seed):
    np.random.seed(seed)


def _seed(seed):
    np.random.seed(seed)
    _seed_numba(seed)


def _log_weights(n, spread, seed):
    return spread * np.random.default_rng(seed).standard_normal(n)


def _weights(n, spread, seed=0):
    return theirs.exp_and_normalise(_log_weights(n, spread, seed))


def _same(scheme, W, M, seeds=3):
    for seed in range(seeds):
        _seed(seed)
        expected = theirs.resampling(scheme, W, M=M)
        after = np.random.rand()
        _seed(seed)
        got = getattr(ours, scheme)(W, M)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
        assert np.random.rand() == after  # as many numbers drawn


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1001, 30_000])
def test_ancestors_equal_theirs(scheme, n, spread):
    _same(scheme, _weights(n, spread), None)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "killing"])
@pytest.mark.parametrize("M", [1, 3, 500, 1999, 20_000])
def test_any_number_of_ancestors(scheme, M):
    _same(scheme, _weights(2000, 1.5), M)
    _same(scheme, np.full(2 * M, 0.5 / M), M)  # halves: ssp's pairs tie


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_particles_and_equal_weights(scheme):
    W = _weights(4096, 1.0)
    W[::3] = 0.0
    W[-5:] = 0.0
    _same(scheme, W / W.sum(), None)
    _same(scheme, np.full(1024, 1.0 / 1024), None)  # sums and strata meet exactly
    one = np.zeros(50)
    one[17] = 1.0
    _same(scheme, one, None)


def test_ties_belong_to_the_particle_whose_sum_they_meet(monkeypatch):
    W = np.array([0.25, 0.0, 0.5, 0.25])
    for u in (0.0, 0.5, 0.25):
        monkeypatch.setattr(np.random, "rand", lambda n, u=u: np.full(n, u))
        monkeypatch.setattr(ours, "_uniforms", np.random.rand)
        for scheme in ("systematic", "stratified"):
            np.testing.assert_array_equal(getattr(ours, scheme)(W), theirs.resampling(scheme, W))
            even = np.full(64, 1 / 64)
            np.testing.assert_array_equal(getattr(ours, scheme)(even, 256), theirs.resampling(scheme, even, M=256))
    monkeypatch.setattr(np.random, "rand", np.zeros)
    np.testing.assert_array_equal(ours.systematic(W), [0, 0, 2, 2])


@pytest.mark.parametrize("share", [0.3, 0.85, 1.1, 1.9, 2.7])
def test_ssp_decides_by_the_quotient_to_the_last_bit(monkeypatch, share):
    W = np.array([share, 3.0 - share]) / 3.0
    x, y = np.modf(3 * W)[0]
    first, second = min(y, 1.0 - x), min(x, 1.0 - y)
    quotient = first / (first + second)
    for u in (quotient, np.nextafter(quotient, 0.0), np.nextafter(quotient, 1.0)):
        monkeypatch.setattr(np.random, "rand", lambda n, u=u: np.full(n, u))
        monkeypatch.setattr(ours, "_numba_uniforms", np.random.rand)
        np.testing.assert_array_equal(ours.ssp(W, 3), theirs.ssp.__wrapped__.py_func(W, 3))


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_a_sum_below_one_goes_to_the_last_live_particle(scheme):
    W = np.array([0.2, 0.3, 0.4, 0.0])  # the original reads past the end
    np.random.seed(0)
    A = getattr(ours, scheme)(W, 1000)
    assert set(A) == {0, 1, 2}
    # the CDF ends at 0.9: the missing 0.1 goes to the last live particle
    assert abs(np.mean(A == 2) - 0.5) < 0.06


def test_errors_are_theirs():
    W = _weights(10, 1.0)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="killing resampling defined only for M=N"):
            module.killing(W, 9)
        with pytest.raises(ValueError, match="ssp resampling: wrong size for output"):
            module.ssp(2.0 * W)
        with pytest.raises(ValueError):
            module.residual(3.0 * W)
        for scheme in (module.residual, module.ssp):
            with pytest.raises(ValueError):
                scheme(np.array([2.0, -1.0]), 10)
        with pytest.raises(ZeroDivisionError):
            module.log_mean_exp(W, W=np.zeros(10))


@pytest.mark.parametrize("position", [0, 1, 311, 312, 623, 624])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 311, 312, 313, 5000])
def test_uniforms_are_numpys_and_so_is_the_generator_after_them(position, count):
    """From every kind of position in the generator's words: an odd number before the end, at the end, and past it."""
    np.random.seed(7)
    start = np.random.get_state(legacy=False)
    start["state"]["pos"] = position
    np.random.set_state(start)
    expected, after = np.random.rand(count), np.random.get_state(legacy=False)["state"]
    np.random.set_state(start)
    np.testing.assert_array_equal(ours._uniforms(count), expected)
    left = np.random.get_state(legacy=False)["state"]
    assert left["pos"] == after["pos"]
    np.testing.assert_array_equal(left["key"], after["key"])


def test_uniforms_of_another_generator_are_its_own():
    kept = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        expected = np.random.rand(10)
        np.random.set_bit_generator(np.random.PCG64(3))
        np.testing.assert_array_equal(ours._uniforms(10), expected)
    finally:
        np.random.set_bit_generator(kept)


@njit
def _numba_rand(count):
    return np.random.rand(count)


def test_uniforms_of_numba_are_its_own():
    for count in (1, 3, 623, 2000):
        _seed_numba(11)
        expected = _numba_rand(count), _numba_rand(5)
        _seed_numba(11)
        np.testing.assert_array_equal(ours._numba_uniforms(count), expected[0])
        np.testing.assert_array_equal(_numba_rand(5), expected[1])


def test_ssp_draws_from_numpy_where_particles_is_not_loaded(monkeypatch):
    W = _weights(500, 1.0)
    monkeypatch.delitem(sys.modules, "particles.resampling")
    drawn = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        drawn.append(ours.ssp(W))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_long_rows_on_every_instruction_set_and_number_of_threads(scheme):
    """Rows are long enough for several threads. They have a range of dead particles, and one with a tenth of the
    weight."""
    W = _weights(150_000, 1.0)
    W[40_000:90_000] = 0.0
    W[100_000] = W.sum() / 9
    W /= W.sum()
    _seed(5)
    expected = theirs.resampling(scheme, W)
    threads = torch.get_num_threads()
    try:
        for name, number in itertools.product(_native.instruction_sets(), (1, 3)):
            torch.set_num_threads(number)
            _seed(5)
            with _native.instruction_set(name):
                np.testing.assert_array_equal(getattr(ours, scheme)(W), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_weights_are_errors_or_indices(scheme, bad):
    W = _weights(3000, 1.0)
    W[[7, 2000]] = bad
    try:
        with np.errstate(invalid="ignore"):
            A = getattr(ours, scheme)(W)
    except ValueError:
        assert scheme in ("residual", "ssp")
    else:
        assert A.min() >= 0 and A.max() < 3000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_one_row_are_named(scheme):
    f = getattr(ours, scheme)
    column = np.full((3, 1), 1 / 3)
    for W, shape in (
        (np.empty(0), [0]),
        (column, [3, 1]),
        (np.full((2, 3), 1 / 6), [2, 3]),
        (np.asfortranarray(np.full((2, 3), 1 / 6)), [2, 3]),
        (np.array(1.0), []),
    ):
        with pytest.raises(ValueError, match=rf"^W: expected shape \[N\] with N >= 1, got {re.escape(str(shape))}"):
            f(W)
    for M in (-1, 2.5):
        with pytest.raises(ValueError, match=r"^M: expected an integer in \[0, "):
            f(column[:, 0], M)
    _seed(1)
    expected = f(column[:, 0])
    for same in (np.asfortranarray(column)[:, 0], column[:, 0].tolist()):
        _seed(1)
        np.testing.assert_array_equal(f(same), expected)


@pytest.mark.parametrize("n", [1, 7, 4096, 50_001])
def test_functions_of_log_weights(n):
    lw = _log_weights(n, 3.0, seed=1) + 1000.0
    lw[1::5] = -np.inf
    lw[2::5] -= 600.0
    kept = lw.copy()
    near = partial(np.testing.assert_allclose, rtol=1e-12)
    near(ours.exp_and_normalise(lw), theirs.exp_and_normalise(lw))
    near(ours.essl(lw), theirs.essl(lw), rtol=1e-13)
    near(ours.log_mean_exp(lw), theirs.log_mean_exp(lw), rtol=1e-15)
    W = _weights(n, 1.0, seed=2)
    near(ours.log_mean_exp(lw, W=W), theirs.log_mean_exp(lw, W=W), rtol=1e-15)
    np.testing.assert_array_equal(lw, kept)
    assert ours.essl(np.zeros(n)) == n
    np.testing.assert_array_equal(ours.exp_and_normalise(np.zeros(n)), np.full(n, 1.0 / n))
    narrow = ours.exp_and_normalise(lw[::2].astype(np.float32))
    assert narrow.dtype == np.float32
    near(narrow, theirs.exp_and_normalise(lw[::2].astype(np.float32)), rtol=1e-5)


def test_subnormal_and_vanishing_weights():
    lw = np.array([0.0, -700.0, -708.5, -740.0, -744.0, -746.0, -800.0, -np.inf])
    np.testing.assert_allclose(ours.exp_and_normalise(lw), np.exp(lw), rtol=1e-13, atol=5e-324)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_weights_that_are_not_finite_give_nan(bad):
    lw = np.zeros(2000)
    for broken in (np.where(np.arange(2000) == 1500, bad, lw), np.full(9, -np.inf)):
        assert np.isnan(ours.exp_and_normalise(broken)).all()
        assert np.isnan(ours.essl(broken)) and np.isnan(ours.log_mean_exp(broken))


def test_log_weights_of_any_layout_and_none():
    lw = np.arange(6.0).reshape(2, 3)
    for array in (lw, np.asfortranarray(lw), lw.tolist()):
        np.testing.assert_allclose(ours.exp_and_normalise(array), theirs.exp_and_normalise(lw), rtol=1e-13)
        assert ours.essl(array) == pytest.approx(theirs.essl(lw), rel=1e-13)
        assert ours.log_mean_exp(array) == pytest.approx(theirs.log_mean_exp(lw), rel=1e-13)
    for f, name in ((ours.exp_and_normalise, "lw"), (ours.essl, "lw"), (ours.log_mean_exp, "v")):
        with pytest.raises(ValueError, match=rf"^{name}: expected at least one value, got shape \[0\]"):
            f(np.empty(0))


class _RandomWalk(state_space_models.StateSpaceModel):
    """A random walk with noisy observations. The Kalman filter gives its likelihood."""

    def PX0(self):
        return distributions.Normal(loc=0.0, scale=1.0)

    def PX(self, t, xp):
        return distributions.Normal(loc=xp, scale=0.5)

    def PY(self, t, xp, x):
        return distributions.Normal(loc=x, scale=0.4)


def _observations(steps):
    rng = np.random.default_rng(5)
    x = rng.standard_normal() + np.concatenate(([0.0], np.cumsum(0.5 * rng.standard_normal(steps - 1))))
    return x + 0.4 * rng.standard_normal(steps)


def _kalman_log_likelihood(y):
    mean, variance, total = 0.0, 1.0, 0.0
    for t, value in enumerate(y):
        variance += 0.25 if t else 0.0
        s = variance + 0.16
        total -= 0.5 * (np.log(2 * np.pi * s) + (value - mean) ** 2 / s)
        gain = variance / s
        mean, variance = mean + gain * (value - mean), variance * (1 - gain)
    return total


def _run(y, scheme, seed, N):
    _seed(seed)
    fk = state_space_models.Bootstrap(ssm=_RandomWalk(), data=y)
    pf = particles.SMC(fk=fk, N=N, resampling=scheme, ESSrmin=0.7, store_history=True)
    pf.run()
    return pf


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_patched_bootstrap_filter_is_the_same_run(scheme, monkeypatch):
    y = _observations(25)
    plain = _run(y, scheme, seed=3, N=300)
    called = []
    counted = lambda W, M=None: called.append(M) or getattr(ours, scheme)(W, M)  # noqa: E731
    monkeypatch.setitem(ours.SCHEMES, scheme, counted)
    counted.__name__ = scheme
    original = getattr(theirs, scheme), theirs.rs_funcs[scheme], theirs.essl
    with ours.patch():
        assert theirs.essl is ours.essl
        patched = _run(y, scheme, seed=3, N=300)
    assert (getattr(theirs, scheme), theirs.rs_funcs[scheme], theirs.essl) == original
    assert called and set(called) == {300}
    assert patched.summaries.logLts == plain.summaries.logLts
    assert patched.summaries.ESSs == plain.summaries.ESSs
    for a, b in zip(patched.hist.A[1:], plain.hist.A[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_patch_stays_until_it_is_closed():
    original = theirs.systematic
    undo = ours.patch()
    try:
        assert theirs.rs_funcs["systematic"] is ours.systematic is theirs.systematic
    finally:
        undo.close()
    assert theirs.systematic is original


def test_log_likelihood_of_a_patched_filter_is_right():
    y = _observations(25)
    with ours.patch():
        estimates = [_run(y, "systematic", seed=seed, N=2000).logLt for seed in range(10)]
    error = np.mean(estimates) - _kalman_log_likelihood(y)
    assert 0 < np.std(estimates) < 0.2
    assert abs(error) < 4 * np.std(estimates) / np.sqrt(10) + np.var(estimates)
