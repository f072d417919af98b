"""Error models against the densities of scipy.stats, with all constants. Their gradients against autograd."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

import fastguide as fg
from fastguide import likelihoods, ops, reference
from fastguide.likelihoods import (
    MOMENT_LIMIT,
    Callable,
    Gaussian,
    Laplace,
    Likelihood,
    Poisson,
    StudentT,
)
from fastguide.operators import AveragePool, Blur, Function, Identity, Inpainting, Matrix

RANDOM = np.random.default_rng(5)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# name: (operator, event, measurement)
OPERATORS = {
    "identity": (Identity(), (2, 3), (2, 3)),
    "inpainting": (Inpainting(torch.arange(8).reshape(2, 4) % 3 == 0), (2, 4), (3,)),
    "pool": (AveragePool(2), (1, 4, 4), (1, 2, 2)),
    "circular blur": (Blur(normal(3, 3, seed=1)), (1, 3, 4), (1, 3, 4)),
    "zeros blur": (
        Blur(torch.outer(normal(3, seed=2), normal(3, seed=3)), "zeros"),
        (2, 3, 3),
        (2, 3, 3),
    ),
    "wide": (Matrix(normal(3, 5, seed=4)), (5,), (3,)),
    "tall, rank 2": (Matrix(normal(5, 2, seed=5) @ normal(2, 4, seed=6)), (4,), (5,)),
}
every_operator = pytest.mark.parametrize("operator, event, measurement", OPERATORS.values(), ids=OPERATORS.keys())

SCALE = 0.7
# name: (likelihood of (y, operator), log-density of y with location z elementwise)
MODELS = {
    "gaussian": (
        lambda y, operator, scale=SCALE: Gaussian(y, operator, scale),
        lambda y, z, s: stats.norm.logpdf(y, z, s),
    ),
    "student 1": (
        lambda y, operator, scale=SCALE: StudentT(y, operator, scale, df=1.0),
        lambda y, z, s: stats.cauchy.logpdf(y, z, s),
    ),
    "student 4.5": (
        lambda y, operator, scale=SCALE: StudentT(y, operator, scale, df=4.5),
        lambda y, z, s: stats.t.logpdf(y, 4.5, z, s),
    ),
    "laplace": (
        lambda y, operator, scale=SCALE: Laplace(y, operator, scale),
        lambda y, z, s: stats.laplace.logpdf(y, z, s),
    ),
}
every_model = pytest.mark.parametrize("make, density", MODELS.values(), ids=MODELS.keys())


def per_row(values):
    return torch.as_tensor(values).flatten(1).sum(1)


def check(got, expected, rtol=1e-11):
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol)


def check_gradient(f, z, rtol=1e-10):
    """Check that ``f(z) -> (log_prob, gradient)`` returns the gradient of its log-density."""
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf)[0].sum(), leaf)
    gradient = f(z)[1]
    assert gradient.shape == z.shape and gradient.dtype == z.dtype
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol)


# --- densities ----------------------------------------------------------------------------------------------


# A density depends only on the operator's output: so test every model with one operator, every operator with one model.
@pytest.mark.parametrize(
    ("model", "of"), [*(("gaussian", o) for o in OPERATORS), *((m, "pool") for m in MODELS if m != "gaussian")]
)
def test_log_density(model, of):
    (make, density), (operator, event, measurement) = MODELS[model], OPERATORS[of]
    x, y = normal(4, *event), normal(4, *measurement, seed=1)
    z = operator(x)
    check(make(y, operator).log_prob(x), per_row(density(y.numpy(), z.numpy(), SCALE)))
    one = make(y[:1], operator)  # one observation for all
    check(one.log_prob(x), per_row(density(y[:1].numpy(), z.numpy(), SCALE)))
    rows = torch.tensor([3, 0, 0, 2])
    check(make(y, operator).log_prob(x, rows), per_row(density(y[rows].numpy(), z.numpy(), SCALE)))
    check(one.log_prob(x, torch.zeros(4, dtype=torch.int64)), one.log_prob(x))


@every_model
def test_gradient(make, density):
    y, z = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    likelihood = make(y, Identity())
    check_gradient(lambda z: likelihood.log_prob_and_gradient(z, y, SCALE), z)
    step = 1e-6 * normal(3, 2, 4, seed=2)
    difference = likelihood.value(z + step, None, SCALE) - likelihood.value(z - step, None, SCALE)
    slope = 2 * per_row(likelihood.log_prob_and_gradient(z, y, SCALE)[1] * step)
    torch.testing.assert_close(difference, slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("background", [0.0, 0.5])
def test_poisson(scale, background):
    rate = torch.as_tensor(RANDOM.uniform(0.2, 30.0, (5, 2, 3)))
    rate[0, 0, 1] = 15.0
    counts = torch.as_tensor(RANDOM.poisson(rate.numpy())).double()
    counts[0, 0, 0], counts[0, 0, 1] = 0.0, 40.0
    z, y = scale * rate - background, scale * counts
    likelihood = Poisson(y, Identity(), scale, background)
    expected = per_row(stats.poisson.logpmf(counts.numpy(), rate.numpy()))
    check(likelihood.log_prob(z), expected)
    check_gradient(lambda z: likelihood.log_prob_and_gradient(z, y, scale), z)
    exact = (rate > counts.clamp(min=0.2) / 2).flatten(1).all(1)  # where guidance follows the exact density
    assert 0 < exact.sum() < 5
    check(likelihood.log_prob_and_gradient(z, y, scale)[0][exact], expected[exact])


@pytest.mark.parametrize("observations", [1, 3])
@pytest.mark.parametrize(("method", "particles"), [("DPS", 1), ("TDS", 1), ("TDS", 4), ("FK", 4)])
def test_log_factorials_are_worked_out_once_in_a_run(method, particles, observations, monkeypatch):
    """If the scale depends on the time, the operation computes them in each call, with the same result."""
    made, given = [], []
    worked_out, operation = reference.log_factorials, ops.log_prob_and_gradient
    monkeypatch.setattr(likelihoods, "log_factorials", lambda y, scale: made.append(len(y)) or worked_out(y, scale))
    lgammas, lgamma = [], torch.lgamma
    monkeypatch.setattr(torch, "lgamma", lambda x: lgammas.append(len(x)) or lgamma(x))

    def noted(z, y, **options):
        given.append(options["log_factorials"])
        if given[-1] is not None:
            torch.testing.assert_close(given[-1], lgamma(y.double() / 0.7 + 1.0).sum(1))
        return operation(z, y, **options)

    monkeypatch.setattr(ops, "log_prob_and_gradient", noted)
    y = 0.7 * torch.as_tensor(RANDOM.poisson(5.0, (observations, 6))).double()
    prior = fg.Denoiser(lambda x, t: 0.5 * x, fg.schedules.vp_linear(100), "sample")

    def run(scale) -> torch.Tensor:
        likelihood = Poisson(y, Identity(), scale, 0.5)
        guidance = {
            "DPS": lambda: fg.DPS(likelihood, 1e-3),
            "TDS": lambda: fg.TDS(likelihood, particles, covariance="point"),
            "FK": lambda: fg.FK(likelihood, particles, proposal="guided", covariance="point"),
        }[method]()
        samples = fg.sample(prior, (observations, 6), guidance=guidance, steps=3, seed=1, chunk_size=2)
        return samples.x if method == "DPS" else samples.log_weights

    fixed = run(0.7)
    assert made == lgammas == [observations] and len(given) >= 3 and all(known is not None for known in given)
    given.clear()
    torch.testing.assert_close(run(lambda t: 0.7), fixed, rtol=1e-5, atol=1e-5)
    assert made == [observations] and len(given) >= 3 and not any(known is not None for known in given)


def test_log_factorials_are_those_of_the_y_and_the_scale_that_are_asked_for():
    y, z = normal(3, 4).abs().round() * 9, normal(3, 4, seed=1).abs()
    likelihood = Poisson(y, Identity(), 1.0, 0.5).for_run()
    for other, scale in ((y, 1.0), (y + 1, 1.0), (y, 2.0), (y[:1], 1.0)):
        expected = Poisson(other, Identity(), scale, 0.5).log_prob_and_gradient(z, other, scale)
        for a, b in zip(likelihood.log_prob_and_gradient(z, other, scale), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert Poisson(y, Identity(), 1.0)._log_factorials is None  # no cache: the caller may write to y between calls


def test_poisson_adds_to_one_over_the_counts_at_any_rate():
    counts = torch.arange(80.0)[:, None]
    for rate in (0.001, 0.05, 0.2, 1.0, 9.0):
        log_prob = Poisson(counts, Identity()).log_prob(torch.full((80, 1), rate, dtype=torch.float64))
        check(log_prob.exp().sum(), 1.0)


def test_poisson_goes_on_along_its_tangent_below_a_thousandth_of_a_count():
    y = torch.tensor([[3.0, 0.0]]).double()
    z = torch.tensor([[1e-3, 0.5], [0.0, 0.5], [-0.5, -0.5]], dtype=torch.float64)
    logarithm = math.log(1e-3) - torch.tensor([0.0, 1.0, 501.0], dtype=torch.float64)
    check(Poisson(y, Identity()).log_prob(z), 3 * logarithm - z.clamp(min=0).sum(1) - math.log(6.0))


def test_poisson_of_counts_between_integers():
    y, z = torch.tensor([[2.5, 0.0]]).double(), torch.tensor([[1.7, 0.4]]).double()
    expected = special.xlogy(y.numpy(), z.numpy()) - z.numpy() - special.gammaln(y.numpy() + 1)
    check(Poisson(y, Identity()).log_prob(z), per_row(expected))


def test_poisson_of_large_counts_keeps_its_precision_in_float32():
    """Terms of 1e6 cancel, and about ten is left."""
    counts = torch.as_tensor(RANDOM.poisson(1e5, (3, 1000))).float()
    rate = torch.as_tensor(RANDOM.normal(1e5, 300, (3, 1000))).float()
    expected = per_row(stats.poisson.logpmf(counts.double().numpy(), rate.double().numpy()))
    check(Poisson(counts, Identity()).log_prob(rate), expected, rtol=1e-9)
    gradient = Poisson(counts, Identity()).log_prob_and_gradient(rate, counts, 1.0)[1]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, (counts.double() / rate.double() - 1).float())


def test_poisson_rates_below_the_floor_are_finite_and_pushed_back():
    y, z = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[-2.0, -1.0]]).double()
    likelihood = Poisson(y, Identity())
    log_prob, gradient = likelihood.log_prob_and_gradient(z, y, 1.0)
    check(log_prob, [float(stats.poisson.logpmf(3, 1.5)) - 3.5 - 3.5**2 / 6 - 0.1 + 1.1 - 1.1**2 / 2])
    check(gradient, [[1 + 3.5 / 3, -1 + 1.1]])
    assert torch.isfinite(likelihood.curvature(z, y, 1.0)).all()


@pytest.mark.parametrize("df", [1e5, 1e6 * (1 - 1e-9), 1e6, 1e10, 1e16, 1e300])
def test_student_with_many_degrees_of_freedom(df):
    y, z = normal(2, 6), normal(2, 6, seed=1)
    got = StudentT(y, Identity(), SCALE, df).log_prob(z)
    r = ((y - z) / SCALE).numpy()
    # the expansion of log t in 1 / df, to the second order
    correction = (r**4 - 2 * r**2 - 1) / (4 * df) - (2 * r**6 - 3 * r**4) / (12 * df) / df
    check(got, per_row(stats.norm.logpdf(r) - math.log(SCALE) + correction), rtol=2e-9)


@every_model
def test_float32_computes_to_float32(make, density):
    y, z = normal(3, 1000, dtype=torch.float32), normal(3, 1000, seed=1, dtype=torch.float32)
    expected = per_row(density(y.double().numpy(), z.double().numpy(), SCALE))
    check(make(y, Identity()).log_prob(z), expected, rtol=1e-6)


# --- covariances of x_0 given x_t ---------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("scale, spread", [(0.7, 0.3), (0.05, 0.9), (2.0, 1e-3)])
def test_isotropic_gaussian(operator, event, measurement, scale, spread):
    """Equal to a dense normal density with covariance ``s^2 I + r^2 A A^T``."""
    x, y = normal(4, *event), normal(4, *measurement, seed=1)
    likelihood = Gaussian(y, operator, scale)
    a = operator.matrix(event).numpy()
    covariance = scale**2 * np.eye(len(a)) + spread * a @ a.T
    z = operator(x)
    expected = [
        stats.multivariate_normal.logpdf(v.numpy(), m.numpy(), covariance)
        for v, m in zip(y.flatten(1), z.flatten(1), strict=True)
    ]
    log_prob, gradient = likelihood.log_prob_and_gradient(z, y, scale, spread)
    check(log_prob, expected, rtol=1e-9)
    check(likelihood.value(x, None, scale, spread), expected, rtol=1e-9)
    expected = np.linalg.solve(covariance, (y - z).flatten(1).numpy().T).T
    torch.testing.assert_close(gradient.flatten(1), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
    check_gradient(lambda z: likelihood.log_prob_and_gradient(z, y, scale, spread), z, rtol=1e-8)


# A model adds its share of the diagonal of A A^T, which the operator gives.
@pytest.mark.parametrize(
    ("name", "of"), [("student 1", "wide"), ("laplace", "wide"), *(("student 4.5", o) for o in OPERATORS)]
)
def test_isotropic_variances_add(name, of):
    (make, density), (operator, event, measurement) = MODELS[name], OPERATORS[of]
    spread = 0.4
    x, y = normal(4, *event), normal(4, *measurement, seed=1)
    likelihood = make(y, operator)
    a = operator.matrix(event)
    share = 0.5 if name == "laplace" else 1.0  # a Laplace variable's variance is twice its squared scale
    widened = (SCALE**2 + share * spread * (a * a).sum(1)).sqrt().reshape(measurement).numpy()
    z = operator(x)
    log_prob, _ = likelihood.log_prob_and_gradient(z, y, SCALE, spread)
    check(log_prob, per_row(density(y.numpy(), z.numpy(), widened)), rtol=1e-10)
    check_gradient(lambda z: likelihood.log_prob_and_gradient(z, y, SCALE, spread), z)


def grams(n, m, seed=7):
    root = normal(n, m, m, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("measurement", [(1,), (4,), (2, 2)])
def test_moment_gaussian(measurement):
    m = math.prod(measurement)
    y, z, gram = normal(5, *measurement), normal(5, *measurement, seed=1), grams(5, m)
    likelihood = Gaussian(y, Identity(), SCALE)
    log_prob, gradient = likelihood.moment(z, y, SCALE, gram)
    covariance = SCALE**2 * np.eye(m) + gram.numpy()
    triples = zip(y.flatten(1).numpy(), z.flatten(1).numpy(), covariance, strict=True)
    check(log_prob, [stats.multivariate_normal.logpdf(v, u, c) for v, u, c in triples])
    expected = np.linalg.solve(covariance, (y - z).flatten(1).numpy()[..., None])[..., 0]
    torch.testing.assert_close(gradient.flatten(1), torch.as_tensor(expected), rtol=1e-11, atol=1e-11)
    check_gradient(lambda z: likelihood.moment(z, y, SCALE, gram), z)
    # only the symmetric part counts
    skew = normal(5, m, m, seed=9)
    check(likelihood.moment(z, y, SCALE, gram + skew - skew.mT)[0], log_prob)


def test_moment_holds_the_eigenvalues_of_an_indefinite_gram():
    basis = torch.linalg.qr(normal(4, 4)).Q
    gram = (basis @ torch.diag(torch.tensor([2.0, 0.3, -0.1, -50.0]).double()) @ basis.T)[None]
    held = (basis @ torch.diag(torch.tensor([2.0, 0.3, 0.0, 0.0]).double()) @ basis.T).numpy()
    y, z = normal(1, 4, seed=1), normal(1, 4, seed=2)
    log_prob, gradient = Gaussian(y, Identity(), SCALE).moment(z, y, SCALE, gram)
    covariance = SCALE**2 * np.eye(4) + held
    check(log_prob, [stats.multivariate_normal.logpdf(y[0].numpy(), z[0].numpy(), covariance)])
    expected = np.linalg.solve(covariance, (y - z)[0].numpy())
    torch.testing.assert_close(gradient[0], torch.as_tensor(expected), rtol=1e-11, atol=1e-11)


def test_moment_of_one_measurement_holds_its_variance():
    y, z = normal(2, 1, seed=1), normal(2, 1, seed=2)
    likelihood = Gaussian(y, Identity(), SCALE)
    got = likelihood.moment(z, y, SCALE, torch.tensor([[[-50.0]], [[0.0]]], dtype=torch.float64))
    for value, expected in zip(got, likelihood.log_prob_and_gradient(z, y, SCALE), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [1, 4])
def test_moment_of_a_gram_that_is_not_finite(m, bad):
    """The density of that row is NaN, which a particle filter reports. The other rows do not change."""
    y, z, gram = normal(3, m), normal(3, m, seed=1), grams(3, m)
    likelihood = Gaussian(y, Identity(), SCALE)
    log_prob, gradient = likelihood.moment(z, y, SCALE, gram)
    gram[1, 0, m // 2] = bad
    got, slope = likelihood.moment(z, y, SCALE, gram)
    assert torch.isnan(got).tolist() == [False, True, False]
    torch.testing.assert_close(got[::2], log_prob[::2])
    torch.testing.assert_close(slope[::2], gradient[::2])


def test_moment_is_isotropic_for_that_gram():
    operator, event, measurement = OPERATORS["wide"]
    x, y = normal(3, *event), normal(3, *measurement, seed=1)
    a, spread = operator.matrix(event), 0.6
    likelihood = Gaussian(y, operator, SCALE)
    z, gram = operator(x), (spread * a @ a.T).expand(3, -1, -1)
    for got, expected in zip(
        likelihood.moment(z, y, SCALE, gram),
        likelihood.log_prob_and_gradient(z, y, SCALE, spread),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["student 4.5", "laplace"])
def test_moment_adds_the_diagonal(name):
    make, density = MODELS[name]
    y, z, gram = normal(4, 2, 2), normal(4, 2, 2, seed=1), grams(4, 4)
    gram[0, 0, 0] = -3.0  # a negative variance adds nothing
    share = 0.5 if name == "laplace" else 1.0
    added = share * gram.diagonal(dim1=1, dim2=2).clamp(min=0).reshape(4, 2, 2)
    likelihood = make(y, Identity())
    log_prob, _ = likelihood.moment(z, y, SCALE, gram)
    check(log_prob, per_row(density(y.numpy(), z.numpy(), (SCALE**2 + added).sqrt().numpy())))
    check_gradient(lambda z: likelihood.moment(z, y, SCALE, gram), z)


@pytest.mark.parametrize("m", [1, 4])
def test_moment_in_float32_returns_float32_gradients(m):
    y, z, gram = (v.float() for v in (normal(3, m), normal(3, m, seed=1), grams(3, m)))
    for make, _ in MODELS.values():
        likelihood = make(y, Identity())
        log_prob, gradient = likelihood.moment(z, y, SCALE, gram)
        exact = likelihood.moment(z.double(), y.double(), SCALE, gram.double())
        assert log_prob.dtype == torch.float64 and gradient.dtype == torch.float32
        torch.testing.assert_close(log_prob, exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-5)


LINEAR_UNKNOWN = Function(lambda x: 2 * x, linear=True, event=(3,))
NONLINEAR = Function(torch.exp)


@pytest.mark.parametrize(
    "operator",
    [Identity(), LINEAR_UNKNOWN, NONLINEAR, Blur(normal(3, 3, seed=4), "zeros")],
    ids=["identity", "linear function", "function", "blur"],
)
def test_which_covariances_are_supported(operator):
    y = torch.ones(1, 3)
    for name in ("gaussian", "student 4.5"):
        likelihood = MODELS[name][0](y, operator)
        assert likelihood.supports("point") == likelihood.supports("isotropic") == ""
        linear = operator.linear
        assert (likelihood.supports("moment", MOMENT_LIMIT) == "") is linear
        if linear:
            assert f"up to {MOMENT_LIMIT} measurements, and there are {MOMENT_LIMIT + 1}" in likelihood.supports(
                "moment", MOMENT_LIMIT + 1
            )
    for likelihood in (Poisson(y, operator), Callable(lambda x: x.sum(1))):
        assert likelihood.supports("point") == ""
        assert "is not defined for" in likelihood.supports("isotropic")
        assert "is not defined for" in likelihood.supports("moment", 1)


@pytest.mark.parametrize("name", ["gaussian", "student 4.5", "laplace"])
def test_isotropic_variances_of_an_operator_that_knows_nothing(name):
    """Each measurement is widened by the mean diagonal of ``A A^T``, 4 here, estimated to some 10 %. A Gaussian one is
    widened by ``A A^T`` itself, found from the rows."""
    make, density = MODELS[name]
    share = 0.5 if name == "laplace" else 1.0
    x, y = normal(4, 3), normal(4, 3, seed=1)
    likelihood = make(y, LINEAR_UNKNOWN)
    with pytest.raises(NotImplementedError, match=r"the diagonal of A A\^T of Function.*measure_spread"):
        likelihood.log_prob_and_gradient(2 * x, y, SCALE, 0.4)
    likelihood = likelihood.measure_spread((3,))
    assert likelihood._mean_diagonal == pytest.approx(4.0, rel=0.3)
    variance = 4.0 if name == "gaussian" else likelihood._mean_diagonal
    widened = math.sqrt(SCALE**2 + share * 0.4 * variance)
    log_prob, gradient = likelihood.log_prob_and_gradient(2 * x, y, SCALE, 0.4)
    check(log_prob, per_row(density(y.numpy(), 2 * x.numpy(), widened)))
    check(likelihood.value(x, None, SCALE, 0.4), log_prob)
    on_device = likelihood.log_prob_and_gradient(2 * x, y, SCALE, torch.tensor(0.4, dtype=torch.float64))
    check(on_device[0], log_prob)
    torch.testing.assert_close(on_device[1], gradient)


def test_isotropic_variances_by_the_diagonal_alone():
    """A blur without a spectrum gives the diagonal of ``A A^T``."""
    operator = Blur(normal(3, 3, seed=4), "zeros")
    x, y = normal(2, 1, 4, 5), normal(2, 1, 4, 5, seed=1)
    a, z = operator.matrix((1, 4, 5)), operator(x)
    widened = (SCALE**2 + 0.4 * (a * a).sum(1)).sqrt().reshape(1, 4, 5).numpy()
    likelihood = Gaussian(y, operator, SCALE)
    check(likelihood.log_prob_and_gradient(z, y, SCALE, 0.4)[0], per_row(stats.norm.logpdf(y, z, widened)))
    one_each = Gaussian(y, operator, torch.full((1, 4, 5), SCALE, dtype=torch.float64)).measure_spread(
        (1, 4, 5), guided=False
    )
    found = one_each.log_prob_and_gradient(z, y, one_each.scale_at(0.0), 0.4)[0]
    check(found, per_row(stats.norm.logpdf(y, z, widened)))
    # With one scale for all measurements, all of A A^T counts.
    covariance = SCALE**2 * torch.eye(20, dtype=torch.float64) + 0.4 * a @ a.T
    exact = torch.distributions.MultivariateNormal(z.flatten(1), covariance).log_prob(y.flatten(1))
    check(likelihood.measure_spread((1, 4, 5)).log_prob_and_gradient(z, y, SCALE, 0.4)[0], exact)


@pytest.mark.parametrize("scale", [0.1, torch.linspace(0.1, 0.3, 20).reshape(1, 4, 5)])
@pytest.mark.parametrize(
    "operator", [Blur(torch.full((3, 3), 1 / 9), "circular"), Blur(normal(3, 3, seed=4).abs(), "zeros")]
)
def test_isotropic_variances_that_guide_are_no_less_than_half_the_covariance(operator, scale):
    """With only the diagonal of ``A A^T``, a step in a direction that all measurements see would be far too long."""
    operators = (operator, Function(operator), Function(operator, linear=True, event=(1, 4, 5)))
    gram = (a := operator.matrix((1, 4, 5))) @ a.T
    for known in operators:
        likelihood = Gaussian(torch.zeros(1, 1, 4, 5, dtype=torch.float64), known, scale).measure_spread((1, 4, 5))
        units = torch.eye(20, dtype=torch.float64).reshape(20, 1, 4, 5)
        used = likelihood.scale_at(0.0)
        inverse = -likelihood.log_prob_and_gradient(units, 0 * units, used, 1.0)[1].flatten(1)
        noise = torch.as_tensor(used, dtype=torch.float64).expand(1, 1, 4, 5).flatten() ** 2
        whitened = torch.linalg.eigvals((gram + torch.diag(noise)) @ inverse).real
        assert 1.0 < whitened.max() < 2.05


def test_spread_that_cannot_be_measured():
    likelihood = Gaussian(torch.ones(1, 3), Function(torch.log), SCALE)
    with pytest.raises(
        ValueError, match=r"operator: expected finite measurements.*Function\(log\).*'point' needs none"
    ):
        likelihood.measure_spread((3,))


# --- curvature ----------------------------------------------------------------------------------------------


def test_curvature_of_a_gaussian_is_its_hessian():
    y, z = normal(1, 3), normal(1, 3, seed=1)
    likelihood = Gaussian(y, Identity(), SCALE)
    hessian = torch.autograd.functional.hessian(lambda z: likelihood.value(z[None], None, SCALE)[0], z[0])
    torch.testing.assert_close(torch.diag(likelihood.curvature(z, y, SCALE)[0]), -hessian)


@every_model
def test_gradient_is_curvature_times_residual(make, density):
    """The gradient is curvature times residual. This makes reweighted least squares a descent method."""
    y, z = normal(4, 6), normal(4, 6, seed=1)
    likelihood = make(y, Identity())
    weight = likelihood.curvature(z, y, SCALE)
    assert (weight > 0).all() and (y - z).abs().min() > 1e-3 * SCALE
    gradient = likelihood.log_prob_and_gradient(z, y, SCALE)[1]
    torch.testing.assert_close(gradient, weight * (y - z), rtol=1e-12, atol=1e-12)


def test_curvature_of_laplace_is_held_where_the_residual_vanishes():
    y = torch.zeros(1, 1)
    weight = Laplace(y, Identity(), SCALE).curvature(y, y, SCALE)
    assert weight.item() == pytest.approx(1e3 / SCALE**2)


@pytest.mark.parametrize("scale, background", [(1.0, 0.0), (0.5, 2.0)])
def test_curvature_of_poisson_is_its_information(scale, background):
    """The curvature is the Fisher information ``E[(d log p / dz)^2]`` over the counts."""
    z = torch.tensor([[1.3, 4.0, 20.0]]).double()
    rate = (z + background) / scale
    counts = torch.arange(200.0).double()[:, None]
    likelihood = Poisson(scale * counts, Identity(), scale, background)
    every = z.expand(200, 3), scale * counts.expand(200, 3)
    slope = likelihood.log_prob_and_gradient(*every, scale)[1]
    exact = (counts / rate - 1) / scale
    torch.testing.assert_close(slope[counts[:, 0] < 0.6], exact[counts[:, 0] < 0.6])
    slope = exact  # without the parabola at counts far above the rate
    information = (torch.as_tensor(stats.poisson.pmf(counts.numpy(), rate.numpy())) * slope**2).sum(0)
    torch.testing.assert_close(likelihood.curvature(z, scale * counts, scale)[0], information)


@pytest.mark.parametrize("scale, background", [(1.0, 0.0), (0.02, 0.01)])
def test_curvature_of_poisson_at_dark_rates_is_the_parabolas(scale, background):
    """For no count and for one count, the curvature is minus the derivative of the gradient."""
    counts, rate = (
        torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]).double(),
        torch.tensor([[-2.0, 0.0, 0.05, 0.0, 0.4]]).double(),
    )
    y, z, h = scale * counts, scale * rate - background, 1e-3 * scale
    likelihood = Poisson(y, Identity(), scale, background)
    up, down = (likelihood.log_prob_and_gradient(z + step, y, scale)[1] for step in (h, -h))
    torch.testing.assert_close(likelihood.curvature(z, y, scale), (down - up) / (2 * h))


# --- schedules of the scale, callables, copies --------------------------------------------------------------


def test_scale_may_follow_the_time():
    y, x = normal(2, 3), normal(2, 3, seed=1)
    likelihood = Gaussian(y, Identity(), lambda t: 0.5 + t)
    assert likelihood.scale_at(0.25) == 0.75
    for t in (0.0, 1.5):
        check(likelihood.log_prob(x, t=t), Gaussian(y, Identity(), 0.5 + t).log_prob(x))
    with pytest.raises(ValueError, match="t: expected the time whose scale to use"):
        likelihood.log_prob(x)
    check(Gaussian(y, Identity(), 0.5).log_prob(x, t=7.0), Gaussian(y, Identity(), 0.5).log_prob(x))


@pytest.mark.parametrize("table", [[0.5, 1.0], np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])])
def test_a_table_is_not_read_backwards_at_the_clean_time(table):
    likelihood = Gaussian(normal(2, 3), Identity(), lambda t: table[t])
    assert [likelihood.scale_at(t) for t in (0, 1)] == [0.5, 1.0]
    with pytest.raises(ValueError, match=r"scale: raised (Type|Index)Error at the clean time -1.0, which is no index"):
        likelihood.scale_at(-1)
    told = Gaussian(normal(2, 3), Identity(), lambda t: 0.25 if t < 0 else table[t])
    assert [told.scale_at(t) for t in (-1, 0)] == [0.25, 0.5]


@pytest.mark.parametrize("scale", [SCALE, np.float32(SCALE), torch.tensor(SCALE), lambda t: np.float64(SCALE)])
def test_scale_may_be_any_number(scale):
    y, x = normal(2, 3), normal(2, 3, seed=1)
    got = Gaussian(y, Identity(), scale).log_prob(x, t=0.0)
    check(got, Gaussian(y, Identity(), SCALE).log_prob(x), rtol=1e-6)


def scales(measurement, kind):
    s = 0.5 + normal(4, *measurement, seed=11).abs()
    return {"detector": s[0], "both": s, "observation": s[:, :1], "one row": s[:1]}[kind]


@pytest.mark.parametrize("kind", ["detector", "both", "observation", "one row"])
@every_model
def test_a_scale_for_each_detector_or_observation(make, density, kind):
    x, y = normal(6, 3), normal(4, 3, seed=1)
    rows = torch.tensor([3, 0, 0, 2, 1, 3])
    s = scales((3,), kind)
    full = (s if s.ndim == 2 else s[None]).expand(4, 3)
    expected = per_row(density(y[rows].numpy(), x.numpy(), full[rows].numpy()))
    for scale in (s, lambda t: s * (1 + t)):
        likelihood = make(y, Identity(), scale)
        check(likelihood.log_prob(x, rows, t=0.0), expected)
        check(likelihood.to(dtype=torch.float32).log_prob(x.float(), rows, t=0.0), expected, rtol=1e-5)
        own = likelihood.at(rows)
        check_gradient(lambda z, own=own: own.log_prob_and_gradient(z, own.y, own.scale_at(0.0)), x)
        weight = own.curvature(x, own.y, own.scale_at(0.0))
        assert weight.shape == x.shape
        torch.testing.assert_close(
            weight * (own.y - x), own.log_prob_and_gradient(x, own.y, own.scale_at(0.0))[1], rtol=1e-11, atol=1e-11
        )
    check(make(y, Identity(), lambda t: s * (1 + t)).log_prob(x, rows, t=1.0),
          per_row(density(y[rows].numpy(), x.numpy(), 2 * full[rows].numpy())))  # fmt: skip


@pytest.mark.parametrize("name", ["gaussian", "student 4.5", "laplace"])
def test_isotropic_variances_with_a_scale_for_each_detector(name):
    """The variances of ``A x_0`` are added. With different scales only the diagonal of ``A A^T`` is used."""
    make, density = MODELS[name]
    operator, event, measurement = OPERATORS["wide"]
    x, y, s = normal(4, *event), normal(4, *measurement, seed=1), scales(measurement, "detector")
    share = 0.5 if name == "laplace" else 1.0
    a, z = operator.matrix(event), operator(x)
    widened = (s**2 + share * 0.4 * (a * a).sum(1)).sqrt().numpy()
    likelihood = make(y, operator, s).measure_spread(event, guided=False)
    log_prob, _ = likelihood.log_prob_and_gradient(z, y, likelihood.scale_at(0.0), 0.4)
    check(log_prob, per_row(density(y.numpy(), z.numpy(), widened)), rtol=1e-10)
    check_gradient(lambda z: likelihood.log_prob_and_gradient(z, y, likelihood.scale_at(0.0), 0.4), z)


@pytest.mark.parametrize("m", [1, 4])
def test_moment_with_a_scale_for_each_detector(m):
    y, z, gram = normal(3, m), normal(3, m, seed=1), grams(3, m)
    s = scales((m,), "detector")
    likelihood = Gaussian(y, Identity(), s if m > 1 else s[None].expand(3, m) * torch.tensor([[1.0], [2.0], [3.0]]))
    scale = likelihood.scale_at(0.0)
    log_prob, gradient = likelihood.moment(z, y, scale, gram)
    for i in range(3):
        covariance = gram[i].numpy() + np.diag(scale.expand(3, m)[i].numpy() ** 2)
        check(log_prob[i], stats.multivariate_normal.logpdf(y[i].numpy(), z[i].numpy(), covariance))
        expected = np.linalg.solve(covariance, (y - z)[i].numpy())
        torch.testing.assert_close(gradient[i], torch.as_tensor(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gaussian(Y, Identity(), torch.ones(2)), r"scale: .* tensor \[3\] or \[2, 3\].*got \[2\]"),
        (lambda: Gaussian(Y, Identity(), torch.ones(3, 3)), r"scale: .*got \[3, 3\]"),
        (lambda: Gaussian(Y, Identity(), torch.tensor([1.0, 0.0, 1.0])), "scale: expected finite numbers > 0 for each"),
        (lambda: Gaussian(Y, Identity(), lambda t: torch.ones(2)).scale_at(0.5), r"scale\(0.5\): .*got \[2\]"),
        (lambda: Poisson(Y, Identity(), torch.ones(3)), r"scale: expected one number for Poisson.*got a tensor \[3\]"),
        (lambda: Callable(abs, scale=torch.ones(3)), "scale: expected one number for Callable"),
        (
            lambda: Gaussian(torch.complex(Y, Y), Identity(), torch.ones(2)),
            r"scale: .* tensor \[3, 2\] or \[2, 3, 2\], .*; \[3\] or \[2, 3\], in full, got \[2\]",
        ),
        (lambda: Gaussian(torch.complex(Y, Y), Identity(), torch.ones(2, 1)), r"in full, got \[2, 1\]"),
        (
            lambda: Gaussian(torch.ones(2, 2) * 1j, Identity(), torch.ones(2, 2)),
            r"scale: expected an unambiguous shape, got \[2, 2\], .*; use \[1, 2, 2\] for the pairs",
        ),
    ],
)
def test_scales_of_another_shape(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def fourier(x):
    """Some complex Fourier coefficients of a real signal."""
    return torch.fft.fft(x)[:, 1:4]


@pytest.mark.parametrize("adjoint", [False, True])
def test_complex_measurements(adjoint):
    """Real and imaginary parts count as separate measurements."""
    x, y = normal(4, 8), torch.complex(normal(2, 3, seed=1), normal(2, 3, seed=2))
    rows, c = torch.tensor([0, 1, 1, 0]), fourier(torch.eye(8).double()).T
    if adjoint:
        operator = Function(fourier, linear=True, adjoint=lambda y: y @ c.conj())
    else:
        operator = Function(fourier, linear=True, event=(8,))
    z = fourier(x)
    expected = per_row(stats.norm.logpdf(torch.view_as_real(y)[rows], torch.view_as_real(z), SCALE))
    likelihood = Gaussian(y, operator, SCALE)
    check(likelihood.log_prob(x, rows), expected)
    single = likelihood.to(dtype=torch.float32)
    assert single.y.dtype == torch.float32
    check(single.log_prob(x.float(), rows), expected, rtol=1e-5)
    a = torch.view_as_real(c.T).permute(1, 2, 0).reshape(6, 8)  # [Re, Im of each coefficient, x]
    v = normal(4, 3, 2, seed=3)
    torch.testing.assert_close(likelihood.operator(x).flatten(1), x @ a.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likelihood.operator.adjoint(v), v.flatten(1) @ a, rtol=1e-12, atol=1e-12)
    solved = torch.linalg.solve(0.3 * a @ a.T + 0.1 * torch.eye(6), v.flatten(1).T).T
    torch.testing.assert_close(likelihood.operator.solve_gram(v, 0.3, 0.1).flatten(1), solved, rtol=1e-9, atol=1e-9)
    if not adjoint:
        inverse = likelihood.operator.pseudo_inverse(v)
        torch.testing.assert_close(inverse, v.flatten(1) @ torch.linalg.pinv(a).T, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match=r"operator: expected complex measurements, as y is, got torch\.float64"):
        Gaussian(y, Identity(), SCALE).log_prob(x)


def test_a_complex_matrix():
    """The real and imaginary parts of its rows count as separate measurements. There are no closed forms."""
    c = torch.complex(normal(3, 8, seed=4), normal(3, 8, seed=5))
    x, v, y = normal(4, 2, 4), normal(4, 3, 2, seed=3), torch.complex(normal(2, 3, seed=1), normal(2, 3, seed=2))
    operator = Matrix(c, (2, 4))
    a = torch.view_as_real(c.T).permute(1, 2, 0).reshape(6, 8)
    likelihood = Gaussian(y, operator, SCALE)
    torch.testing.assert_close(likelihood.operator(x).flatten(1), x.flatten(1) @ a.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likelihood.operator.adjoint(v).flatten(1), v.flatten(1) @ a, rtol=1e-12, atol=1e-12)
    single = likelihood.to(dtype=torch.float32).operator(x.float())
    torch.testing.assert_close(single.double().flatten(1), x.flatten(1) @ a.T, rtol=1e-5, atol=1e-5)
    prior = fg.Denoiser(lambda x, t: x / (1 + t.view(-1, 1, 1) ** 2), fg.schedules.edm(0.01, 10.0), "sample")
    out = fg.sample(prior, (2, 2, 4), guidance=fg.PnP(likelihood, zeta=0.0), steps=4, seed=0, dtype=torch.float64)
    pairs = Gaussian(torch.view_as_real(y).flatten(1), Matrix(a, (2, 4)), SCALE)
    real = fg.sample(prior, (2, 2, 4), guidance=fg.PnP(pairs, zeta=0.0), steps=4, seed=0, dtype=torch.float64)
    torch.testing.assert_close(out.x, real.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operator.gram_diagonal(y), c.abs().square().sum(1))
    with pytest.raises(NotImplementedError, match=r"spectrum .* is not known, as its matrix is complex"):
        operator.eigenvalues(y)
    with pytest.raises(TypeError, match=r"y: expected complex values, as Matrix.* returns torch\.complex128"):
        fg.sample(prior, (2, 2, 4), guidance=fg.PnP(Gaussian(y.real, operator, SCALE)), steps=2, dtype=torch.float64)


@pytest.mark.parametrize("m", [(3,), (3, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "student 4.5", "laplace"])
def test_scales_of_complex_measurements(name, m):
    """A scale in the shape of the measurement is for both parts. In the shape of the pairs, each part has its own."""
    make, density = MODELS[name]
    x, y = (torch.complex(normal(4, *m, seed=i), normal(4, *m, seed=i + 1)) for i in (0, 2))
    operator = Function(lambda x: torch.complex(x[..., 0], x[..., 1]))
    x, pairs = torch.view_as_real(x), torch.view_as_real(y)
    s = normal(4, *m, 2, seed=5).abs() + 0.1
    given = (  # a scale, and the same scale for each real number
        (s[0, ..., 0], s[:1, ..., :1]),
        (s[:1, ..., 0], s[:1, ..., :1]),
        (s[..., 0], s[..., :1]),
        (s[0], s[:1]),
        (s, s),
        (s[0, ..., :1], s[:1, ..., :1]),
    )
    for scale, full in given:
        expected = per_row(density(pairs.numpy(), x.numpy(), full.numpy()))
        check(make(y, operator, scale).log_prob(x), expected)
        rows = torch.tensor([2, 0])
        likelihood = make(y, operator, lambda t, scale=scale: scale * (1 + t))
        picked = full[rows] if len(full) > 1 else full
        expected = per_row(density(pairs[rows].numpy(), x[:2].numpy(), 1.5 * picked.numpy()))
        check(likelihood.log_prob(x[:2], rows, t=0.5), expected)


def test_a_scale_of_complex_measurements_behind_a_decoder():
    y, s = torch.complex(normal(1, 6, 6, seed=1), normal(1, 6, 6, seed=2)), normal(6, 6, seed=3).abs() + 0.5
    operator = Function(lambda x: torch.complex(x, 2 * x), linear=True, event=(6, 6))
    prior = fg.Denoiser(lambda x, t: 0.5 * x, fg.schedules.flow(), "sample")

    def samples(y, operator, scale):
        guidance = fg.LatentPnP(Gaussian(y, operator, scale), lambda z: 2 * z, iterations=2)
        return fg.sample(prior, (2, 6, 6), guidance=guidance, steps=3, seed=0, dtype=torch.float64).x

    real = Function(lambda x: torch.stack([x, 2 * x], -1))
    expected = samples(torch.view_as_real(y), real, s[..., None])
    for scale in (s, s[None], lambda t: s, lambda t: s[None]):
        torch.testing.assert_close(samples(y, operator, scale), expected, rtol=1e-9, atol=1e-9)


def test_a_callable_of_complex_measurements():
    y = torch.complex(normal(2, 3, seed=1), normal(2, 3, seed=2))
    x, rows = normal(4, 8), torch.tensor([0, 1, 1, 0])
    for given in (y, y.conj()):  # a view
        likelihood = Callable(lambda x, y: -(fourier(x) - y).abs().square().sum(1), given)
        expected = -(fourier(x) - given[rows]).abs().square().sum(1)
        torch.testing.assert_close(likelihood.log_prob(x, rows), expected)
        _, gradient = likelihood.log_prob_and_gradient(x, likelihood.y, 1.0, rows=rows)
        other = x.clone().requires_grad_()
        (-(fourier(other) - given[rows]).abs().square().sum()).backward()
        torch.testing.assert_close(gradient, other.grad)


@pytest.mark.parametrize("linear", [False, True])
def test_complex_measurements_may_be_views_of_the_conjugate(linear):
    y = torch.complex(normal(2, 3, seed=1), normal(2, 3, seed=2))
    options = {"linear": True, "event": (8,)} if linear else {"pseudo_inverse": lambda y: torch.fft.irfft(y, 8)}
    made = []
    for conj in (torch.conj, torch.conj_physical):
        likelihood = Gaussian(conj(y), Function(lambda x, conj=conj: conj(fourier(x)), **options), SCALE)
        x = normal(2, 8)
        z = likelihood.operator(x)
        made.append([likelihood.log_prob(x), z, likelihood.operator.pseudo_inverse(likelihood.y)])
        made[-1] += [likelihood.operator.adjoint(z)] if linear else []
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for guidance in (fg.DPS, fg.PnP):
        samples = fg.sample(
            fg.Denoiser(lambda x, t: 0.3 * x, fg.schedules.flow(), "sample"), (2, 8), guidance=guidance(likelihood),
            steps=3, seed=1,
        )  # fmt: skip
        assert samples.x.isfinite().all()


def test_functions_may_write_into_what_they_get():
    def f(x0, y):
        x0.mul_(2.0)
        return -(y.sub_(x0) ** 2).sum(1)

    x, y = normal(2, 3), normal(2, 3, seed=1)
    before = x.clone(), y.clone()
    likelihood = Callable(f, y=y)
    for _ in range(2):
        check(likelihood.log_prob(x), -((before[1] - 2 * before[0]) ** 2).sum(1))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_callable():
    def f(x0, **given):
        seen.append(given)
        weight = given["y"] if "y" in given else torch.ones(1, 3)
        return -(weight * x0**4).sum(1) / given.get("scale", 1.0)

    x, y = normal(3, 3), normal(3, 3, seed=1)
    rows = torch.tensor([2, 2, 0])
    for likelihood, weight, scale in (
        (Callable(f), torch.ones(3, 3), 1.0),
        (Callable(f, y=y), y[rows], 1.0),
        (Callable(f, y=y[:1]), y[:1], 1.0),
        (Callable(f, scale=lambda t: 2 + t), torch.ones(3, 3), 2.5),
        (Callable(f, y=y, scale=3.0), y[rows], 3.0),
    ):
        seen = []
        check(likelihood.log_prob(x, rows, t=0.5), -(weight * x**4).sum(1) / scale)
        (given,) = seen
        assert ("scale" in given) == likelihood._has_scale and ("y" in given) == likelihood.has_y
        log_prob, gradient = likelihood.log_prob_and_gradient(x, likelihood.rows_of_y(rows), scale)
        check(log_prob, -(weight * x**4).sum(1) / scale)
        assert not log_prob.requires_grad
        torch.testing.assert_close(gradient, -4 * weight * x**3 / scale)


def test_callable_is_differentiated_without_grad_mode():
    likelihood = Callable(lambda x0: -(x0**2).sum(1))
    with torch.no_grad():
        gradient = likelihood.log_prob_and_gradient(torch.ones(2, 3), likelihood.rows_of_y(None), 1.0)[1]
    assert torch.equal(gradient, torch.full((2, 3), -2.0))


@pytest.mark.parametrize("name", OPERATORS)
def test_to_returns_a_copy(name):
    operator, event, measurement = OPERATORS[name]
    x, y = normal(3, *event), normal(3, *measurement, seed=1)
    for make, _ in MODELS.values():
        likelihood = make(y, operator)
        single = likelihood.to("cpu", torch.float32)
        assert single.y.dtype == torch.float32 and likelihood.y.dtype == torch.float64
        torch.testing.assert_close(single.log_prob(x.float()), likelihood.log_prob(x), rtol=1e-5, atol=1e-4)


# --- errors -------------------------------------------------------------------------------------------------

Y = torch.ones(2, 3)
WITH_NAN = torch.tensor([[1.0, 2.0], [3.0, math.nan]])


# Each argument just outside its range, not finite or of another type or shape; what a model cannot do.
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: Gaussian(WITH_NAN, Identity(), 1.0),
            ValueError,
            "y: expected finite values, got NaN.*in row 1",
        ),
        (lambda: Poisson(Y / 0, Identity()), ValueError, "y: expected finite.*row 0"),
        (lambda: Callable(abs, y=WITH_NAN[:, 1]), ValueError, "y: expected finite.*row 1"),
        (
            lambda: Gaussian(Y.long(), Identity(), 1.0),
            TypeError,
            "y: expected a floating tensor.*torch.int64",
        ),
        (
            lambda: Gaussian(Y.numpy(), Identity(), 1.0),
            TypeError,
            "y: expected a floating tensor.*got ndarray",
        ),
        (
            lambda: Gaussian(torch.tensor(1.0), Identity(), 1.0),
            ValueError,
            r"y: .*\[B, \*measurement\].*got \[\]",
        ),
        (
            lambda: Gaussian(torch.ones(4), Identity(), 1.0),
            ValueError,
            r"y: .*\[B, 1\] for one number.*got \[4\]",
        ),
        (lambda: Gaussian(torch.ones(0, 3), Identity(), 1.0), ValueError, r"y: .*B >= 1.*got \[0, 3\]"),
        (
            lambda: Gaussian(Y, torch.eye(3), 1.0),
            TypeError,
            "operator: expected a fastguide.operators.*got Tensor",
        ),
        (lambda: Gaussian(Y, Identity(), -1.0), ValueError, "scale: expected a finite number >= 0, got -1.0"),
        (lambda: Gaussian(Y, Identity(), math.nan), ValueError, "scale: .*got nan"),
        (
            lambda: Gaussian(Y, Identity(), Y[0].numpy()),
            TypeError,
            r"scale: expected a finite number >= 0 or a tensor of the measurement's shape, got array float32 \[3\]",
        ),
        (lambda: Poisson(Y, Identity(), [1.0]), TypeError, r"scale: expected a finite number > 0, got \[1.0\]"),
        (lambda: Gaussian(Y, Identity(), math.inf), ValueError, "scale: .*got inf"),
        (lambda: Laplace(Y, Identity(), 0.0), ValueError, "scale: expected a finite number > 0, got 0.0"),
        (lambda: StudentT(Y, Identity(), 0.0, df=3), ValueError, "scale: expected a finite number > 0"),
        (lambda: StudentT(Y, Identity(), 1.0, df=0), ValueError, "df: expected a finite number > 0, got 0"),
        (lambda: StudentT(Y, Identity(), 1.0, df=math.inf), ValueError, "df: .*got inf"),
        (lambda: StudentT(Y, Identity(), 1.0, df=math.nan), ValueError, "df: .*got nan"),
        (lambda: Poisson(-Y, Identity()), ValueError, "y: expected counts >= 0, got -1"),
        (lambda: Poisson(Y, Identity(), 0.0), ValueError, "scale: expected a finite number > 0"),
        (lambda: Poisson(Y, Identity(), 1.0, -0.1), ValueError, "background: .*>= 0, got -0.1"),
        (
            lambda: Poisson(Y, Identity(), 1.0, torch.ones(3)),
            TypeError,
            r"background: expected a finite number >= 0, got torch.float32 \[3\]",
        ),
        (lambda: Poisson(Y > 0, Identity()), TypeError, "y: expected a floating tensor .*, got torch.bool"),
        (lambda: Callable(3), TypeError, "f: expected a callable, got int"),
        (lambda: Gaussian(Y, Identity(), 0.0).log_prob(Y), ValueError, "scale: expected > 0 where a density"),
        (lambda: Gaussian(Y, Identity(), 0.0).curvature(Y, Y, 0.0), ValueError, "scale: expected > 0"),
        (
            lambda: Gaussian(Y, Identity(), 0.0).moment(Y, Y, 0.0, torch.zeros(2, 3, 3)),
            ValueError,
            "scale: expected > 0",
        ),
        (
            lambda: Laplace(Y, Identity(), lambda t: t - 1).log_prob(Y, t=0.5),
            ValueError,
            r"scale\(0.5\): expected a finite number > 0, got -0.5",
        ),
        (
            lambda: Gaussian(Y, Identity(), 1.0).log_prob(torch.ones(2, 1, 3)),
            ValueError,
            r"y: expected 2 rows or 1, each of shape \[1, 3\], got \[2, 3\]",
        ),
        (
            lambda: Gaussian(Y, Identity(), 1.0).log_prob(torch.ones(5, 3)),
            ValueError,
            r"y: expected 5 rows or 1, each of shape \[3\], got \[2, 3\]",
        ),
        (
            lambda: Callable(lambda x: x).log_prob(Y),
            ValueError,
            r"f: expected it to return log-densities of shape \[2\], got \[2, 3\]",
        ),
        (lambda: Callable(lambda x: 3.0).log_prob(Y), ValueError, r"f: .*shape \[2\], got float"),
        (
            lambda: Callable(lambda x: x.detach().sum(1)).log_prob_and_gradient(Y, Y, 1.0),
            ValueError,
            "f: expected a function that autograd can differentiate",
        ),
        (
            lambda: Callable(lambda x: x.sum(1)).curvature(Y, Y, 1.0),
            ValueError,
            "likelihood: Callable.* has no Gauss-Newton weight",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counts_may_be_integers(dtype):
    counts = torch.tensor([[0, 3, 200]])
    x = torch.tensor([[0.5, 2.0, 190.0]])
    log_prob = Poisson(counts.to(dtype), Identity()).log_prob(x)
    assert torch.equal(log_prob, Poisson(counts.double(), Identity()).log_prob(x))
    prior = fg.Denoiser(lambda x, t: 0 * x, fg.schedules.vp_linear(20))
    guidance = fg.TDS(Poisson(counts.to(dtype), Identity(), background=1.0), 4, covariance="point")
    assert torch.isfinite(fg.sample(prior, (1, 3), guidance=guidance, steps=3, seed=0).log_evidence).all()


def test_the_text_of_a_callable_names_its_function():
    assert repr(Callable(torch.sum)) == "Callable(sum)"


def test_repr_and_base_class():
    assert repr(Gaussian(Y, AveragePool(2), 1.0)) == "Gaussian(AveragePool(2), y=[2, 3])"
    with pytest.raises(NotImplementedError):
        Likelihood(Y, Identity(), 1.0).log_prob(Y)
