"""`log_prob_and_gradient` on all backends against the densities of scipy.stats and autograd, and its errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from fastguide import ops, reference
from fastguide.likelihoods import Gaussian, Laplace, Likelihood, Poisson, StudentT
from fastguide.operators import AveragePool, Blur, Identity, Inpainting, Matrix
from fastguide.ops._operation import OPERATIONS

DF, BACKGROUND = 4.5, 0.25
OPTIONS: dict[str, dict] = {
    "gaussian": {},
    "student_t": dict(df=DF),
    "laplace": {},
    "poisson": dict(background=BACKGROUND),
}
every_family = pytest.mark.parametrize("family", OPTIONS)
every_backend = pytest.mark.parametrize("backend", ("cpu", "reference"))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE, NARROW = DTYPES[:2], DTYPES[2:]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def measured(family: str, rows: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Measurements: counts around 5 with some zeros for Poisson, else any numbers."""
    values = normal(rows, *shape, seed=seed, dtype=dtype)
    return (5 * values.abs()).round() if family == "poisson" else values


def located(family: str, rows: int, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    values = normal(rows, *shape, seed=seed, dtype=dtype)
    return 5 * values.abs() + 0.5 if family == "poisson" else values


def poisson_log_prob(counts: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The density by scipy. Below half the counts it is the parabola with the value and slope there, and a Gaussian's
    curvature."""
    floor = np.maximum(counts, 0.2) / 2
    held, below = np.maximum(rate, floor), np.maximum(floor - rate, 0.0)
    exact = special.xlogy(counts, held) - held - special.gammaln(counts + 1)
    return exact - below * (counts / held - 1) - below**2 / (2 * np.maximum(counts, 1))


def expected_log_prob(family: str, z: Tensor, y: Tensor, scale: float, extra_variance: Tensor | None = None) -> Tensor:
    """The log-densities by scipy, in float64. ``y`` has a row for each sample."""
    y, z = y.double().numpy(), z.double().numpy()
    width = np.sqrt(scale**2 + (0.0 if extra_variance is None else extra_variance.double().numpy()))
    if family == "gaussian":
        density = stats.norm.logpdf(y, z, width)
    elif family == "student_t":
        density = stats.t.logpdf(y, DF, z, width)
    elif family == "laplace":
        density = stats.laplace.logpdf(y, z, width)
    else:
        density = poisson_log_prob(np.round(y / scale), (z + BACKGROUND) / scale)
    return torch.as_tensor(density).reshape(len(density), -1).sum(1)


def expected_gradient(family: str, z: Tensor, y: Tensor, scale: float, extra_variance: Tensor | None = None) -> Tensor:
    y, z = y.double(), z.double()
    variance = scale**2 + (0.0 if extra_variance is None else extra_variance.double())
    residual = y - z
    if family == "gaussian":
        return residual / variance
    if family == "student_t":
        return (DF + 1) * residual / (DF * variance + residual**2)
    if family == "laplace":
        return residual.sign() / variance**0.5 if extra_variance is not None else residual.sign() / scale
    counts, rate = y / scale, (z + BACKGROUND) / scale
    floor = counts.clamp(min=0.2) / 2
    return (counts / rate.maximum(floor) - 1 + (floor - rate).clamp(min=0) / counts.clamp(min=1)) / scale


# The reference computes in float32. Rounding of z and y to narrower types is the same on both sides.
RTOL = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-6,
    torch.bfloat16: 2e-6,
}
GRADIENT_RTOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def check(
    result: tuple[Tensor, Tensor | None], family: str, z: Tensor, y: Tensor, scale: float, extra_variance=None
) -> None:
    log_prob, gradient = result
    assert gradient is not None
    assert log_prob.dtype == torch.float64 and log_prob.shape == z.shape[:1]
    assert gradient.dtype == z.dtype and gradient.shape == z.shape and gradient.is_contiguous()
    rtol, terms = RTOL[z.dtype], math.prod(z.shape[1:])
    torch.testing.assert_close(
        log_prob, expected_log_prob(family, z, y, scale, extra_variance), rtol=rtol, atol=rtol * math.sqrt(terms)
    )
    want, rtol = expected_gradient(family, z, y, scale, extra_variance), GRADIENT_RTOL[z.dtype]
    torch.testing.assert_close(gradient.double(), want, rtol=rtol, atol=2 * rtol)


# --- values -------------------------------------------------------------------------------------------------


@every_family
@every_backend
# A scalar, fewer than 16 elements, 17, two tiles and a rest. 16-bit dtypes are only read and written differently.
@pytest.mark.parametrize(
    ("measurement", "dtype"),
    [
        *itertools.product(((), (3,), (1, 17), (3, 1000)), WIDE),
        *itertools.product(((3, 1000),), NARROW),
    ],
)
def test_log_densities_and_gradients(family, backend, dtype, measurement):
    scale = 0.5
    z, y = located(family, 4, *measurement, dtype=dtype), measured(family, 4, *measurement, dtype=dtype)
    y = y * scale if family == "poisson" else y
    options = dict(family=family, scale=scale, backend=backend, **OPTIONS[family])
    check(ops.log_prob_and_gradient(z, y, **options), family, z, y, scale)
    alone, none = ops.log_prob_and_gradient(z, y, return_gradient=False, **options)
    assert none is None and torch.equal(alone, ops.log_prob_and_gradient(z, y, **options)[0])


@every_family
@every_backend
@pytest.mark.parametrize("elements", (3, 16, 2500))  # short rows are gathered; long ones are read in parts
def test_rows_of_y(family, backend, elements):
    """One row for all, or any of many rows: the results are those for ``y[rows]``."""
    z, y = located(family, 9, elements), measured(family, 4, elements)
    options = dict(family=family, scale=1.0, backend=backend, **OPTIONS[family])
    check(ops.log_prob_and_gradient(z, y[:1], **options), family, z, y[:1].expand(9, -1), 1.0)
    for rows in ([0, 0, 0, 1, 1, 3, 3, 3, 3], [3, 1, 2, 0, 0, 2, 1, 3, 1], [2] * 9):
        rows = torch.tensor(rows)
        result = ops.log_prob_and_gradient(z, y, rows=rows, **options)
        check(result, family, z, y[rows], 1.0)
        for got, want in zip(result, ops.log_prob_and_gradient(z, y[rows], **options), strict=True):
            assert torch.equal(got, want)
    one = ops.log_prob_and_gradient(z, y[:1], rows=torch.zeros(9, dtype=torch.int64), **options)
    for got, want in zip(one, ops.log_prob_and_gradient(z, y[:1], **options), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ("gaussian", "student_t", "laplace"))
@every_backend
# The same sizes as above.
@pytest.mark.parametrize(
    ("measurement", "dtype"),
    [*itertools.product(((2, 3), (2500,)), WIDE), *itertools.product(((2500,),), NARROW)],
)
def test_extra_variance(family, backend, dtype, measurement):
    z, y = located(family, 5, *measurement, dtype=dtype), measured(family, 5, *measurement, dtype=dtype)
    for rows in (1, 5):
        extra_variance = normal(rows, *measurement, seed=2, dtype=dtype) ** 2
        options = dict(family=family, scale=0.6, extra_variance=extra_variance, backend=backend, **OPTIONS[family])
        check(ops.log_prob_and_gradient(z, y, **options), family, z, y, 0.6, extra_variance)


@every_family
@every_backend
def test_dtypes_mix(family, backend):
    """The arithmetic is in the wider dtype. The gradient has the dtype of ``z``."""
    for z_dtype, y_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16,) * 2):
        z, y = located(family, 3, 40, dtype=z_dtype), measured(family, 3, 40, dtype=y_dtype)
        options = dict(family=family, scale=1.0, backend=backend, **OPTIONS[family])
        log_prob, gradient = ops.log_prob_and_gradient(z, y, **options)
        check((log_prob, gradient), family, z, y, 1.0)
        if torch.float64 in (z_dtype, y_dtype):
            torch.testing.assert_close(log_prob, expected_log_prob(family, z, y, 1.0), rtol=1e-13, atol=1e-13)


@every_family
@every_backend
def test_strides(family, backend):
    z, y = located(family, 3, 4, 5).transpose(1, 2), measured(family, 4, 3, 5).transpose(0, 1).transpose(1, 2)
    assert not z.is_contiguous() and not y.is_contiguous()
    check(
        ops.log_prob_and_gradient(z, y, family=family, scale=1.0, backend=backend, **OPTIONS[family]), family, z, y, 1.0
    )


@every_backend
def test_channels_that_come_last_stay_there(backend):
    z, y = located("gaussian", 2, 3, 4, 5), measured("gaussian", 2, 3, 4, 5)
    options = dict(family="gaussian", scale=1.0, backend=backend)
    expected = ops.log_prob_and_gradient(z, y, **options)
    last = [v.contiguous(memory_format=torch.channels_last) for v in (z, y)]
    log_prob, gradient = ops.log_prob_and_gradient(*last, **options)
    assert torch.equal(log_prob, expected[0]) and torch.equal(gradient, expected[1])
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@every_family
@every_backend
def test_no_samples_or_no_elements(family, backend):
    options = dict(family=family, scale=0.7, backend=backend, **OPTIONS[family])
    for shape in ((0, 3), (0, 40), (3, 0), (2, 4, 0), (0,)):
        z = torch.zeros(shape)
        log_prob, gradient = ops.log_prob_and_gradient(z, z, **options)
        assert log_prob.shape == shape[:1] and (log_prob == 0.0).all()
        assert gradient is not None and gradient.shape == shape


@every_family
def test_the_backends_agree(family):
    for dtype in DTYPES:
        z, y = located(family, 6, 70, dtype=dtype), measured(family, 6, 70, dtype=dtype)
        options = dict(family=family, scale=1.5, **OPTIONS[family])
        fast = ops.log_prob_and_gradient(z, y, backend="cpu", **options)
        plain = ops.log_prob_and_gradient(z, y, backend="reference", **options)
        torch.testing.assert_close(fast[0], plain[0], rtol=RTOL[dtype], atol=10 * RTOL[dtype])
        rtol = GRADIENT_RTOL[dtype]
        torch.testing.assert_close(fast[1], plain[1], rtol=rtol, atol=rtol)


# --- what is not finite -------------------------------------------------------------------------------------


@every_family
@every_backend
@pytest.mark.parametrize("elements", (5, 40, 2500))  # a short row, a row with a rest, two tiles
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_nan_stays_in_its_sample(family, backend, elements, dtype):
    z, y = located(family, 4, elements, dtype=dtype), measured(family, 4, elements, dtype=dtype)
    options = dict(family=family, scale=1.0, backend=backend, **OPTIONS[family])
    clean = ops.log_prob_and_gradient(z, y, **options)
    z[2, elements // 2] = math.nan
    log_prob, gradient = ops.log_prob_and_gradient(z, y, **options)
    assert torch.isnan(log_prob).tolist() == [False, False, True, False]
    assert torch.isnan(gradient).nonzero().tolist() == [[2, elements // 2]]
    others = [0, 1, 3]
    assert torch.equal(log_prob[others], clean[0][others]) and torch.equal(gradient[others], clean[1][others])


# The kernel has separate loops for short rows, for rows of full vectors and for a rest. The reference has one loop.
@every_family
@pytest.mark.parametrize(("backend", "elements"), [("cpu", 1), ("cpu", 16), ("cpu", 40), ("reference", 16)])
def test_infinitely_far_is_infinitely_unlikely(family, backend, elements):
    z, y = located(family, 2, elements), measured(family, 2, elements)
    z[1, 0] = math.inf
    y[1, 0] = 0.0
    log_prob, _ = ops.log_prob_and_gradient(z, y, family=family, scale=1.0, backend=backend, **OPTIONS[family])
    assert torch.isfinite(log_prob[0]) and log_prob[1] == -math.inf


@pytest.mark.parametrize("elements", [1, 40, 5000])  # a short row, a row with a rest, three tiles
@pytest.mark.parametrize("dtype", DTYPES)
@every_family
def test_infinite_and_nan_locations_in_every_dtype(family, dtype, elements):
    """The kernel returns what the reference returns."""
    z, y = located(family, 4, elements, dtype=dtype), measured(family, 1, elements, dtype=dtype)
    z[0, -1], z[1, -1], z[2, -1] = math.inf, -math.inf, math.nan
    options = dict(family=family, scale=1.0, **OPTIONS[family])
    got, expected = (ops.log_prob_and_gradient(z, y, backend=b, **options)[0] for b in ("cpu", "reference"))
    assert got[2].isnan() and (family == "poisson" or got[0] == -math.inf)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@every_backend
def test_poisson_rates_below_the_floor(backend):
    """The density is a parabola: at half the counts the slope is 1, and its change is that of a Gaussian with the
    variance of the counts."""
    y, z = torch.tensor([[3.0, 0.0]]), torch.tensor([[-2.0, -1.0]])
    log_prob, gradient = ops.log_prob_and_gradient(z, y, family="poisson", scale=1.0, backend=backend)
    of_three = stats.poisson.logpmf(3, 1.5) - 3.5 - 3.5**2 / 6
    of_none = -0.1 + 1.1 - 1.1**2 / 2
    torch.testing.assert_close(log_prob, torch.as_tensor([of_three + of_none]), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.tensor([[1 + 3.5 / 3, -1 + 1.1]]))


@every_backend
def test_the_gradient_of_poisson_is_that_of_its_density(backend):
    """Also across the rate where the parabola begins, and at rates below 0."""
    if backend == "triton":
        pytest.skip("differences need float64, which the triton kernel does not serve")
    counts = torch.tensor([0.0, 0.05, 0.3, 1.0, 2.5, 30.0]).double()
    rates = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 0.099, 0.101, 0.499, 0.501, 1.24, 1.26, 14.9, 15.1, 40.0]).double()
    y, z = 0.5 * counts.repeat_interleave(len(rates))[:, None], 0.5 * rates.repeat(len(counts))[:, None]

    def density(z):
        return ops.log_prob_and_gradient(z, y, family="poisson", scale=0.5, backend=backend)

    h = 1e-6
    difference = (density(z + h)[0] - density(z - h)[0]) / (2 * h)
    torch.testing.assert_close(density(z)[1][:, 0], difference, rtol=1e-6, atol=1e-6)


def test_one_count_in_a_dark_pixel_pulls_as_a_gaussian_would():
    z, y = torch.tensor([[0.0]]), torch.tensor([[0.02]])
    _, gradient = ops.log_prob_and_gradient(z, y, family="poisson", scale=0.02)
    assert gradient.item() == pytest.approx(1.5 * 0.02 / (0.02 * 0.02))


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# No elements, some, and so many that torch divides the sum of one row among threads.
@pytest.mark.parametrize("elements", (0, 1, 2, 7, 33, 100_001))
def test_log_factorials(elements, two_threads):
    y = 0.7 * measured("poisson", 5, elements)
    got = reference.log_factorials(y.reshape(5, 1, elements), 0.7)
    expected = special.gammaln(y.numpy() / 0.7 + 1).sum(1)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-13, atol=1e-13)
    for row in range(5):  # a row alone has the same bits
        assert torch.equal(reference.log_factorials(y[row : row + 1], 0.7), got[row : row + 1])


@pytest.mark.parametrize("backend", ("cpu", "reference", "triton"))
@pytest.mark.parametrize("elements", (7, 40, 2500))  # a short row, a long one, and one of two tiles
@pytest.mark.parametrize("with_rows", (False, True))
def test_given_log_factorials_are_taken(backend, elements, with_rows):
    if backend == "triton":
        pytest.importorskip("triton")
    dtype = torch.float32 if backend == "triton" else torch.float64
    z, y = located("poisson", 3, elements, dtype=dtype), 0.7 * measured("poisson", 3, elements, dtype=dtype)
    rows = torch.tensor([2, 0, 2]) if with_rows else None
    options = dict(family="poisson", scale=0.7, rows=rows, backend=backend)
    known = reference.log_factorials(y, 0.7)
    made, gradient = ops.log_prob_and_gradient(z, y, **options)
    taken, same_gradient = ops.log_prob_and_gradient(z, y, log_factorials=known, **options)
    torch.testing.assert_close(taken, made, rtol=1e-12, atol=1e-12)
    assert torch.equal(same_gradient, gradient)
    shift = torch.tensor([0.0, 1e3, -1e6], dtype=torch.float64)
    moved = ops.log_prob_and_gradient(z, y, log_factorials=known + shift, **options)[0]
    torch.testing.assert_close(moved, taken - (shift if rows is None else shift[rows]))
    one = ops.log_prob_and_gradient(z, y[:1], log_factorials=known[:1], family="poisson", scale=0.7, backend=backend)
    torch.testing.assert_close(one[0], ops.log_prob_and_gradient(z, y[:1], **options | dict(rows=None))[0])


@every_backend
def test_derivatives_go_through_given_log_factorials(backend):
    z, y = located("poisson", 3, 4), (measured("poisson", 3, 4) + 0.5).requires_grad_()
    made = ops.log_prob_and_gradient(z, y, family="poisson", scale=1.0, backend=backend)[0]
    known = reference.log_factorials(y, 1.0)
    taken = ops.log_prob_and_gradient(z, y, family="poisson", scale=1.0, log_factorials=known, backend=backend)[0]
    want, got = (torch.autograd.grad(each.sum(), y)[0] for each in (made, taken))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_backend
def test_laplace_at_its_peak(backend):
    y = torch.tensor([[1.0, 2.0]])
    log_prob, gradient = ops.log_prob_and_gradient(y.clone(), y, family="laplace", scale=0.5, backend=backend)
    assert gradient.tolist() == [[0.0, 0.0]]
    assert log_prob.item() == pytest.approx(-2 * math.log(2 * 0.5), abs=1e-15)


# --- derivatives --------------------------------------------------------------------------------------------


@every_family
@every_backend
def test_autograd_gives_the_gradient(family, backend):
    z, y = located(family, 3, 20), measured(family, 3, 20)
    weights = normal(3, seed=5)
    options = dict(family=family, scale=1.0, backend=backend, **OPTIONS[family])
    leaf = z.clone().requires_grad_()
    log_prob, gradient = ops.log_prob_and_gradient(leaf, y, **options)
    (pulled,) = torch.autograd.grad((weights * log_prob).sum(), leaf)
    torch.testing.assert_close(pulled, weights[:, None] * gradient.detach(), rtol=1e-12, atol=1e-12)
    log_prob, none = ops.log_prob_and_gradient(leaf, y, return_gradient=False, **options)
    assert none is None and log_prob.requires_grad
    with torch.no_grad():
        assert not ops.log_prob_and_gradient(leaf, y, **options)[0].requires_grad


@every_family
def test_autograd_takes_the_kernels_bits(family):
    z, y = located(family, 3, 20), measured(family, 3, 20)
    options = dict(family=family, scale=1.0, **OPTIONS[family])
    plain = ops.log_prob_and_gradient(z, y, backend="cpu", **options)
    traced = ops.log_prob_and_gradient(z.requires_grad_(), y, backend="cpu", **options)
    for got, want in zip(traced, plain, strict=True):
        assert got.requires_grad and torch.equal(got, want)


@every_family
@pytest.mark.parametrize("with_rows", (False, True))
def test_further_derivatives(family, with_rows):
    """The second and third derivatives of the log-density, and the first derivative of the gradient."""
    z, y = located(family, 3, 4), measured(family, 3, 4)
    rows = torch.tensor([2, 0, 2]) if with_rows else None
    extra_variance = None if family == "poisson" else normal(1, 4, seed=3) ** 2
    options = dict(family=family, scale=1.0, extra_variance=extra_variance, rows=rows, **OPTIONS[family])

    def derivatives(function) -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        log_prob, gradient = function(leaf, y, **options)
        weights = normal(3, 4, seed=4)
        (first,) = torch.autograd.grad(log_prob.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((weights * first).sum(), leaf, create_graph=True)
        third = torch.zeros_like(z)
        if second.requires_grad:  # for a Gaussian it is constant
            (third,) = torch.autograd.grad((weights * second).sum(), leaf, retain_graph=True)
        (of_gradient,) = torch.autograd.grad((weights * gradient).sum(), leaf, retain_graph=True)
        (of_both,) = torch.autograd.grad((weights * gradient).sum() + log_prob.sum(), leaf)
        return [first, second, third, of_gradient, of_both]

    for got, want in zip(
        derivatives(ops.log_prob_and_gradient), derivatives(reference.log_prob_and_gradient), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ("y", "extra_variance"))
def test_other_derivatives_are_the_references(name):
    z, tensors = normal(2, 3), dict(y=normal(2, 3, seed=1), extra_variance=normal(2, 3, seed=2) ** 2)
    tensors[name].requires_grad_()
    options = dict(family="gaussian", scale=1.0)
    for order in (1, 2):
        values = []
        for backend in ("cpu", "reference"):
            value = ops.log_prob_and_gradient(z, **tensors, backend=backend, **options)[0].sum()
            for _ in range(order):
                (value,) = torch.autograd.grad(value.sum(), tensors[name], create_graph=True)
            values.append(value.detach())
        torch.testing.assert_close(*values)
        assert (values[0] != 0).all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))  # Triton's squares are float32: residuals up to 1e19
def test_student_t_of_residuals_whose_square_is_no_float32(backend):
    z = torch.tensor([[1e17], [3e18], [2e19], [-1e30], [3e38]])
    log_prob, gradient = ops.log_prob_and_gradient(
        z, torch.zeros(1, 1), family="student_t", scale=0.5, df=4.0, backend=backend
    )
    expected = stats.t.logpdf(z[:, 0].double().numpy(), 4.0, scale=0.5)
    torch.testing.assert_close(log_prob, torch.as_tensor(expected), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient, -5.0 / z, rtol=1e-5, atol=0.0)  # the gradient of log |z|^-(df + 1)


def test_transforms_of_torch_func():
    z, y = normal(4, 3), normal(4, 3, seed=1)

    def log_prob(z: Tensor, **options) -> Tensor:
        return ops.log_prob_and_gradient(z, y, family="student_t", scale=1.0, df=DF, **options)[0].sum()

    want = ops.log_prob_and_gradient(z, y, family="student_t", scale=1.0, df=DF)[1]
    torch.testing.assert_close(torch.func.grad(log_prob)(z), want)
    hessian = torch.func.jacrev(torch.func.jacrev(log_prob))(z)
    assert hessian.shape == (4, 3, 4, 3) and torch.isfinite(hessian).all()
    with pytest.raises(RuntimeError, match="cpu has no function transforms or forward-mode"):
        torch.func.grad(lambda z: log_prob(z, backend="cpu"))(z)


# --- likelihoods --------------------------------------------------------------------------------------------

ERRORS = {
    "gaussian": lambda y, operator: Gaussian(y, operator, 0.7),
    "student_t": lambda y, operator: StudentT(y, operator, 0.7, DF),
    "laplace": lambda y, operator: Laplace(y, operator, 0.7),
    "poisson": lambda y, operator: Poisson(y, operator, 0.7, BACKGROUND),
}


@every_family
@pytest.mark.parametrize("spread", (0.0, 0.3))
def test_rows_need_not_be_taken_out_of_y(family, spread):
    operator = Identity() if spread == 0.0 or family != "gaussian" else Blur(normal(3, 3, seed=8))
    if family == "poisson" and spread:
        spread = 0.0
    z, y, rows = located(family, 5, 1, 4, 4), measured(family, 3, 1, 4, 4), torch.tensor([2, 2, 0, 1, 0])
    likelihood = ERRORS[family](y, operator)
    got = likelihood.log_prob_and_gradient(z, y, 0.7, spread, rows=rows)
    for a, b in zip(got, likelihood.log_prob_and_gradient(z, y[rows], 0.7, spread), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("operator", "event", "fused"),
    (
        (Identity(), (2, 3), True),
        (Inpainting(torch.arange(8).reshape(2, 4) % 3 == 0), (2, 4), True),
        (AveragePool(2), (1, 4, 4), True),
        (Blur(normal(3, 3, seed=1)), (1, 3, 4), False),
        (Matrix(normal(3, 5, seed=4)), (5,), False),
    ),
    ids=lambda value: str(value),
)
def test_isotropic_gaussian_is_one_pass_where_the_gram_is_diagonal(operator, event, fused, monkeypatch):
    x = normal(4, *event)
    z = operator(x)
    likelihood = Gaussian(normal(4, *z.shape[1:], seed=1), operator, 0.7)
    residual = likelihood.y - z
    solved = operator.solve_gram(residual, 0.4, 0.49)
    logdet = operator.gram_logdet(residual, 0.4, 0.49)
    want = -0.5 * ((residual * solved).flatten(1).sum(1) + logdet + residual[0].numel() * math.log(2 * math.pi))
    seen = []
    operation = OPERATIONS["log_prob_and_gradient"]
    fast = operation.kernels["cpu"]
    monkeypatch.setattr(operation, "_chosen", {})
    monkeypatch.setitem(operation.kernels, "cpu", lambda *a, **k: seen.append(1) or fast(*a, **k))
    log_prob, gradient = likelihood.log_prob_and_gradient(z, likelihood.y, 0.7, 0.4)
    assert bool(seen) == fused and (operator.diagonal_gram(z) is not None) == fused
    torch.testing.assert_close(log_prob, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, solved, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(likelihood.value(x, None, 0.7, 0.4), want, rtol=1e-13, atol=1e-13)


class Weighing(Identity):
    """A diagonal operator that is not a multiple of the identity."""

    def __call__(self, x):
        return x * torch.arange(1.0, 4.0, dtype=x.dtype)

    def eigenvalues(self, y):
        return torch.arange(1.0, 4.0, dtype=y.dtype) ** 2

    gram_diagonal = eigenvalues


class Solving(Weighing):
    """An operator with its own solver, which must be called."""

    def solve_gram(self, v, a, b):
        return 2.0 * super().solve_gram(v, a, b)


def test_isotropic_gaussian_of_a_diagonal_operator():
    x, y = normal(4, 3), normal(4, 3, seed=1)
    z, variance = Weighing()(x), 0.49 + 0.4 * torch.arange(1.0, 4.0).double() ** 2
    log_prob, gradient = Gaussian(y, Weighing(), 0.7).log_prob_and_gradient(z, y, 0.7, 0.4)
    want = torch.as_tensor(stats.norm.logpdf(y.numpy(), z.numpy(), variance.sqrt().numpy())).sum(1)
    torch.testing.assert_close(log_prob, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, (y - z) / variance, rtol=1e-13, atol=1e-13)
    doubled = Gaussian(y, Solving(), 0.7).log_prob_and_gradient(z, y, 0.7, 0.4)[1]
    torch.testing.assert_close(doubled, 2 * gradient, rtol=1e-13, atol=1e-13)


def test_a_likelihood_of_the_users_own():
    """It does not use rows or the operation."""

    class Quartic(Likelihood):
        def log_prob_and_gradient(self, z, y, scale, spread=0.0):
            residual = (y - z) / scale
            return -(residual**4).sum(1), 4 * residual**3 / scale

    x, y, rows = normal(4, 3), normal(2, 3, seed=1), torch.tensor([1, 0, 0, 1])
    got = Quartic(y, Identity(), 0.5).log_prob(x, rows)
    torch.testing.assert_close(got, -(((y[rows] - x) / 0.5) ** 4).sum(1))


# --- errors -------------------------------------------------------------------------------------------------

Z = torch.zeros(3, 2)


# Each argument just outside its range, not finite or of another type or shape; arguments of another family.
@pytest.mark.parametrize(
    ("z", "y", "options", "error", "message"),
    (
        ([0.0], Z, {}, TypeError, "z: expected a tensor, got list"),
        (Z.int(), Z, {}, TypeError, "z: expected one of float32.*got torch.int32"),
        (torch.tensor(0.0), Z, {}, ValueError, r"z: expected shape \[N, \*event\], got a scalar"),
        (Z, None, {}, TypeError, "y: expected a tensor, got NoneType"),
        (Z, Z.long(), {}, TypeError, "y: expected one of float32.*got torch.int64"),
        (Z, Z[:2], {}, ValueError, r"y: expected 3 rows or 1, each of shape \[2\], got \[2, 2\]"),
        (Z, Z.T, {}, ValueError, r"y: expected 3 rows or 1, each of shape \[2\], got \[2, 3\]"),
        (Z, Z[0], {}, ValueError, r"y: .* got \[2\]"),
        (Z, Z.to("meta"), {}, ValueError, "y: expected a tensor on cpu, where z is, got meta"),
        (Z, Z, dict(extra_variance=Z[:2]), ValueError, "extra_variance: expected 3 rows or 1"),
        (Z, Z, dict(extra_variance=1.0), TypeError, "extra_variance: expected a tensor, got float"),
        (Z, Z, dict(extra_variance=Z, family="poisson"), ValueError, "extra_variance: expected None for 'poisson'"),
        (Z, Z, dict(rows=[0, 0, 0]), TypeError, r"rows: expected an int64 tensor \[3\] on cpu, got list"),
        (Z, Z, dict(rows=torch.zeros(3)), ValueError, "rows: .* got torch.float32"),
        (Z, Z, dict(rows=torch.zeros(2).long()), ValueError, r"rows: .*\[3\].* got torch.int64 \[2\]"),
        (Z, Z[:, :1], dict(rows=torch.zeros(3).long()), ValueError, r"y: expected any number of rows, .*\[3, 1\]"),
        (Z, Z, dict(family="cauchy"), ValueError, "family: expected one of .*'student_t'.*, got 'cauchy'"),
        (Z, Z, dict(scale=0.0), ValueError, "scale: expected a finite number > 0, got 0.0"),
        (Z, Z, dict(scale=math.nan), ValueError, "scale: .* got nan"),
        (Z, Z, dict(scale=math.inf), ValueError, "scale: .* got inf"),
        (Z, Z, dict(scale=1e300), ValueError, r"scale: expected a number whose square float64 can hold, got 1e\+300"),
        (Z, Z, dict(scale=1e-300), ValueError, "scale: expected a number whose square float64 can hold, got 1e-300"),
        (
            Z,
            Z,
            dict(scale=torch.ones((), requires_grad=True)),
            TypeError,
            r"scale: expected a finite number > 0, got torch.float32 \[\] on cpu that requires a gradient",
        ),
        (Z, Z, dict(family="student_t"), ValueError, "df: expected a number for 'student_t'.* got None"),
        (Z, Z, dict(family="student_t", df=0.0), ValueError, "df: expected a finite number > 0, got 0.0"),
        (Z, Z, dict(df=3.0), ValueError, "df: expected .* None for the others, got 3.0 for 'gaussian'"),
        (Z, Z, dict(background=1.0), ValueError, "background: expected 0 unless family is 'poisson', got 1.0"),
        (Z, Z, dict(family="poisson", background=-1.0), ValueError, "background: .*>= 0, got -1.0"),
        (
            Z,
            Z,
            dict(log_factorials=Z[:, 0]),
            ValueError,
            "log_factorials: expected None .*, got a tensor",
        ),
        (Z, Z, dict(family="poisson", log_factorials=1.0), TypeError, r"log_factorials: .*\[3\] on cpu, .* got float"),
        (Z, Z, dict(family="poisson", log_factorials=Z[:, 0]), ValueError, "log_factorials: .* got torch.float32"),
        (
            Z,
            Z[:1],
            dict(family="poisson", log_factorials=Z[:, 0].double()),
            ValueError,
            r"log_factorials: expected a float64 tensor \[1\] on cpu, one number for each row of y, got .*\[3\]",
        ),
        (Z, Z, dict(backend="cuda"), RuntimeError, "backend='cuda' cannot serve log_prob_and_gradient: cuda has no"),
    ),
)
def test_errors(z, y, options, error, message):
    with pytest.raises(error, match=message):
        ops.log_prob_and_gradient(z, y, **(dict(family="gaussian", scale=1.0) | options))


@every_backend
@pytest.mark.parametrize("bad", (-1, 2, 2**62))
def test_rows_out_of_range(backend, bad):
    rows = torch.tensor([0, bad, 5])
    with pytest.raises(ValueError, match=rf"rows: expected values in \[0, 2\), got {bad} at 1"):
        ops.log_prob_and_gradient(Z, Z[:2], family="gaussian", scale=1.0, rows=rows, backend=backend)


def test_no_gradient_of_the_results_is_a_gradient_of_zero():
    """If no result has a gradient, the input's gradient is zero, as for torch's own functions (see `gradcheck`)."""
    y = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    z = torch.tensor([[0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: ops.log_prob_and_gradient(z, y, family="gaussian", scale=0.5, return_gradient=False)[0], z
    )


def test_what_must_not_be_negative_is_refused():
    z, bad = torch.ones(1, 2), torch.tensor([[0.5, -0.2]])
    with pytest.raises(ValueError, match=r"y: expected values >= 0, got -0\.2"):
        ops.log_prob_and_gradient(z, bad, family="poisson", scale=0.5)
    with pytest.raises(ValueError, match=r"extra_variance: expected values >= 0, got -0\.2"):
        ops.log_prob_and_gradient(z, z, family="laplace", scale=0.5, extra_variance=bad)
