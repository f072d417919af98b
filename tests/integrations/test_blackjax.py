"""fastguide.integrations.blackjax against blackjax's own resampling."""

import pytest

pytest.importorskip("blackjax", reason="blackjax, or JAX, is not installed")

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import resampling as theirs

from fastguide.integrations import blackjax as ours

SCHEMES = ["multinomial", "residual", "stratified", "systematic"]


def _weights(n, spread=1.5):
    w = np.exp(spread * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    return jnp.asarray(w / w.sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num", [1, 50, 200])
def test_mean_numbers_of_offspring(scheme, num):
    weights = _weights(50)
    resample = jax.jit(getattr(ours, scheme), static_argnums=2)
    keys = jax.random.split(jax.random.key(1), 400)
    indices = np.stack([resample(key, weights, num) for key in keys])
    expected = getattr(theirs, scheme)(keys[0], weights, num)
    assert indices.dtype == expected.dtype and indices.shape[1:] == expected.shape
    counts = np.apply_along_axis(np.bincount, 1, indices, minlength=50)
    share = num * np.asarray(weights, np.float64)
    error = (counts.mean(0) - share) / np.sqrt(np.maximum(share, 1e-2) / 400)
    assert np.abs(error).max() < 4.5  # multinomial counts vary most: their variance is their mean
    if scheme == "systematic":
        assert np.abs(counts - share).max() < 1 + 1e-5 * num
    assert len({row.tobytes() for row in indices}) > 1  # the indices depend on the key
    np.testing.assert_array_equal(resample(keys[0], weights, num), indices[0])


def test_old_keys_vmap_and_unnormalised_weights():
    weights = jnp.stack([_weights(64), 7.0 * _weights(64)])
    keys = jax.random.split(jax.random.PRNGKey(2), 2)
    batch = jax.vmap(lambda key, w: ours.systematic(key, w, 64))(keys, weights)
    for row, key in zip(batch, keys, strict=True):
        np.testing.assert_array_equal(row, ours.systematic(key, weights[0], 64))


def test_derivatives_pass_by():
    x, key = jnp.linspace(-1.0, 2.0, 6), jax.random.key(3)

    def value(theta, of=ours):
        return (x[of.systematic(key, jax.nn.softmax(theta * x), 6)] * theta).sum()

    indices = ours.systematic(key, jax.nn.softmax(0.3 * x), 6)
    np.testing.assert_allclose(jax.grad(value)(0.3), x[indices].sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(value, (0.3,), (1.0,))[1], x[indices].sum(), rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_weights_of_zero_and_of_half():
    weights = np.array([0.0, 0.25, 0.0, 0.75])
    expected = ours.systematic(jax.random.key(0), jnp.asarray(weights), 8)
    assert set(np.asarray(expected)) == {1, 3}
    for dtype in (jnp.float16, jnp.bfloat16):
        got = ours.systematic(jax.random.key(0), jnp.asarray(weights, dtype), np.int64(8))
        np.testing.assert_array_equal(got, expected)


BAD = {
    "NaN": [0.25, 0.25, np.nan, 0.25, 0.25],
    "infinite": [0.25, 0.25, np.inf, 0.25, 0.25],
    "negative": [0.5, -0.25, 0.5, 0.25, 0.0],
    "zero": [0.0] * 5,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", BAD)
def test_unusable_weights_are_theirs(scheme, bad):
    """With unusable weights the indices are blackjax's own. In a batch, only such rows are."""
    key, good, weights = jax.random.key(4), jnp.array([0.1, 0.2, 0.3, 0.2, 0.2]), jnp.array(BAD[bad])
    f = getattr(ours, scheme)
    expected = getattr(theirs, scheme)(key, weights, 8)
    for call in (f, jax.jit(f, static_argnums=2)):
        got = call(key, weights, 8)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    rows = jax.vmap(lambda w: f(key, w, 8))(jnp.stack([good, weights, good]))
    np.testing.assert_array_equal(rows[1], expected)
    for row in (rows[0], rows[2]):
        np.testing.assert_array_equal(row, f(key, good, 8))
    if scheme in ("systematic", "stratified"):  # what blackjax returns then
        known = {"NaN": [0, 0, 1, 1, 2, 2, 2, 2], "infinite": [0, 0, 1, 1, 2, 2, 2, 2], "zero": [4] * 8}
        np.testing.assert_array_equal(expected, known.get(bad, expected))


def test_tempered_smc_finds_the_posterior():
    """With the prior ``N(0, 1)`` and an observation ``1.5 ~ N(x, 0.5^2)``, the posterior is ``N(1.2, 0.2)``."""
    parameters = {"step_size": 0.4, "inverse_mass_matrix": jnp.ones(1), "num_integration_steps": 4}
    smc = blackjax.tempered_smc(
        lambda x: -0.5 * jnp.sum(x**2),
        lambda x: -2.0 * jnp.sum((1.5 - x) ** 2),
        blackjax.hmc.build_kernel(),
        blackjax.hmc.init,
        blackjax.smc.extend_params(parameters),
        resampling_fn=ours.systematic,
        num_mcmc_steps=2,
    )
    state = smc.init(jax.random.normal(jax.random.key(0), (4000, 1)))
    step = jax.jit(smc.step)
    for i, temperature in enumerate((0.1, 0.4, 1.0)):
        state, _ = step(jax.random.key(i + 1), state, temperature)
    x, weights = np.asarray(state.particles)[:, 0], np.asarray(state.weights)
    mean = np.average(x, weights=weights)
    assert abs(mean - 1.2) < 0.04
    assert abs(np.average((x - mean) ** 2, weights=weights) - 0.2) < 0.03


@pytest.mark.parametrize(
    "name, weights, num_samples",
    [
        ("weights", "half", 2),
        ("weights", jnp.ones((2, 3)), 2),
        ("weights", jnp.ones(0), 2),
        ("num_samples", jnp.ones(3), 2.5),
        ("num_samples", jnp.ones(3), 0),
    ],
)
def test_errors_name_the_argument(name, weights, num_samples):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got "):
        ours.systematic(jax.random.PRNGKey(0), weights, num_samples)
