"""fastguide.integrations.particles against particles itself: the same generator, the same ancestors, bit for bit."""

import numpy as np
import pytest

pytest.importorskip("particles", reason="particles is not installed")

import particles
from numba import njit
from particles import distributions, state_space_models
from particles import resampling as theirs

from fastguide.integrations import particles as ours

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
        for scheme in ("systematic", "stratified"):
            np.testing.assert_array_equal(getattr(ours, scheme)(W), theirs.resampling(scheme, W))
    monkeypatch.setattr(np.random, "rand", lambda n: np.zeros(n))
    np.testing.assert_array_equal(ours.systematic(W), [0, 0, 2, 2])


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_a_sum_below_one_goes_to_the_last_live_particle(scheme):
    W = np.array([0.2, 0.3, 0.4, 0.0])  # theirs reads past the end
    np.random.seed(0)
    A = getattr(ours, scheme)(W, 1000)
    assert set(A) == {0, 1, 2}
    # both draw from a CDF that ends at 0.9: the 0.1 that is missing is the last's
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


@pytest.mark.parametrize("n", [1, 7, 4096])
def test_functions_of_log_weights(n):
    lw = _log_weights(n, 3.0, seed=1) + 1000.0
    lw[1::5] = -np.inf
    kept = lw.copy()
    np.testing.assert_array_equal(ours.exp_and_normalise(lw), theirs.exp_and_normalise(lw))
    assert ours.essl(lw) == theirs.essl(lw)
    assert ours.log_mean_exp(lw) == theirs.log_mean_exp(lw)
    W = _weights(n, 1.0, seed=2)
    assert ours.log_mean_exp(lw, W=W) == theirs.log_mean_exp(lw, W=W)
    np.testing.assert_array_equal(lw, kept)
    ones = np.zeros(n)
    assert ours.essl(ones) == n


class _RandomWalk(state_space_models.StateSpaceModel):
    """A random walk seen through noise: the Kalman filter knows its likelihood."""

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
