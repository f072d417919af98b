"""The kernel of `log_prob_and_gradient`: its error against extended precision, its order of summation, its bits."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from fastguide.ops import _native
from fastguide.reference import FAMILIES, density_constant

# Rows of fewer than 16 elements have their own sums. Then 16 places and a rest; 512, the most for one logarithm of a
# product; one tile, two, three.
ELEMENTS = (1, 3, 15, 16, 17, 512, 513, 2048, 2049, 5000)
SOURCES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # dtypes of z
DF, BACKGROUND, MARGIN = 4.5, 0.25, 64


def kernel(
    family: str,
    z: Tensor,
    y: Tensor,
    *,
    scale: float = 0.7,
    df: float = DF,
    background: float = 0.0,
    extra_variance: Tensor | None = None,
    rows: Tensor | None = None,
    log_factorials: Tensor | None = None,
    gradient: bool = True,
    threads: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """The results, written into the middle of poisoned buffers. The margins must not change."""
    n, elements = z.shape
    assert y.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    log_prob = torch.full((n + 2 * MARGIN,), math.nan, dtype=torch.float64)
    out = torch.full((n * elements + 2 * MARGIN,), math.nan, dtype=z.dtype)
    inner = out[MARGIN : MARGIN + n * elements]
    bad = _native.module("cpu").log_prob_and_gradient(
        FAMILIES.index(family), scale, df, background, density_constant(family, scale, df, extra_variance is not None),
        _native.CPU_DTYPES[z.dtype], n, elements, z.data_ptr(), y.data_ptr(), y.shape[0],
        None if rows is None else rows.data_ptr(), None if extra_variance is None else extra_variance.data_ptr(),
        0 if extra_variance is None else extra_variance.shape[0],
        None if log_factorials is None else log_factorials.data_ptr(), log_prob[MARGIN:].data_ptr(),
        inner.data_ptr() if gradient else None, threads,
    )  # fmt: skip
    for buffer, size in ((log_prob, n), (out, n * elements)):
        assert buffer[:MARGIN].isnan().all() and buffer[MARGIN + size :].isnan().all()
    return log_prob[MARGIN : MARGIN + n].clone(), inner.clone().reshape(n, elements), bad


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def arguments(family: str, n: int, elements: int, source: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """``z`` and ``y`` with residuals around ``size``; for Poisson, counts and rates around ``5 + size``."""
    y_dtype = torch.float64 if source == torch.float64 else torch.float32
    z, y = numbers(n, elements, size=size), numbers(n, elements, seed=1, size=size)
    if family == "poisson":
        rate = y.abs() * (5 + size) / size
        z, y = rate * torch.exp(0.1 * z / size), rate.round()
        y[:, ::5] = 0.0
    if source == torch.float16:
        z, y = z.clamp(-6e4, 6e4), y.clamp(-6e4, 6e4)
    return z.to(source), y.to(y_dtype)


# --- the functions ------------------------------------------------------------------------------------------


def functions(x) -> list[np.ndarray]:
    x = np.ascontiguousarray(x, dtype=np.float64)
    out = [np.full(x.shape, np.nan) for _ in range(3)]
    _native.module("cpu").log_functions(x.ctypes.data, *(array.ctypes.data for array in out), x.size)
    return out


def ulps(values, exact) -> float:
    """The largest distance from mpmath's values, in units in their last place."""
    worst = 0.0
    for value, true in zip(values, exact, strict=True):
        unit = mpmath.ldexp(1, int(mpmath.floor(mpmath.log(abs(true), 2))) - 52) if true else mpmath.mpf(2) ** -1074
        worst = max(worst, float(abs(mpmath.mpf(float(value)) - true) / unit))
    return worst


@pytest.fixture
def arguments_of_log():
    rng = np.random.default_rng(0)
    near_one = 1.0 + rng.uniform(-1, 1, 400) * 10.0 ** -rng.integers(0, 15, 400)
    roots = np.nextafter(2.0 ** (np.arange(-20, 20) + 0.5)[:, None], [0.0, 1e300]).ravel()  # where intervals meet
    return np.concatenate([near_one, roots, np.exp(rng.uniform(-700, 700, 600)), rng.uniform(0, 1e-308, 100)])


def test_log_within_an_ulp(arguments_of_log):
    with mpmath.workprec(120):
        x = arguments_of_log
        assert ulps(functions(x)[0], [mpmath.log(mpmath.mpf(v)) for v in x]) <= 0.8


def test_log1p_within_1_2_ulp(arguments_of_log):
    with mpmath.workprec(1200):
        x = np.concatenate([arguments_of_log, [0.0, 1e-300, 1.0, 2.0**53, 2.0**60]])
        assert ulps(functions(x)[1], [mpmath.log1p(mpmath.mpf(v)) for v in x]) <= 1.2


def test_log_gamma():
    rng = np.random.default_rng(1)
    low, high = np.concatenate([rng.uniform(1, 8, 500), np.arange(1.0, 8.0)]), np.exp(rng.uniform(2.1, 30, 500))
    with mpmath.workprec(120):
        exact = [mpmath.loggamma(mpmath.mpf(v)) for v in low]
        error = [abs(mpmath.mpf(float(a)) - b) for a, b in zip(functions(low)[2], exact, strict=True)]
        assert 2.0**-48 < float(max(error)) < 2.0**-46
        assert ulps(functions(high)[2], [mpmath.loggamma(mpmath.mpf(v)) for v in high]) <= 2.0
    assert functions([1.0, 2.0])[2].tolist() == [0.0, 0.0]  # ln Gamma(1) and ln Gamma(2) are exactly 0


def test_logs_of_everything_else():
    x = [0.0, -0.0, -1.0, -math.inf, math.inf, math.nan, 1.0, 5e-324]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(functions(x)[0], np.log(x))
        positive = [0.0, math.inf, math.nan, 1.7e308]
        np.testing.assert_array_equal(functions(positive)[1], np.log1p(positive))


# --- errors -------------------------------------------------------------------------------------------------

Long = np.longdouble
TWO_PI = Long(2 * math.pi) + Long(2.4492935982947064e-16)


def exact(family: str, z: Tensor, y: Tensor, scale: float, df: float = DF, extra_variance: Tensor | None = None):
    """Log-densities, sums of their terms' absolute values, gradients and the scale of these, to 64 bits of mantissa."""
    z, y = z.double().numpy().astype(Long), y.double().numpy().astype(Long)
    variance = Long(scale) ** 2 + (Long(0) if extra_variance is None else extra_variance.double().numpy().astype(Long))
    r, nothing = y - z, np.zeros_like(z)
    if family == "gaussian":
        terms, gradient = [-r * r / (2 * variance), -np.log(TWO_PI * variance) / 2 + nothing], r / variance
    elif family == "student_t":
        d = Long(df)
        constant = Long(special.gammaln((df + 1) / 2) - special.gammaln(df / 2)) - np.log(d * TWO_PI / 2) / 2
        terms = [-(d + 1) / 2 * np.log1p(r * r / (d * variance)), constant - np.log(variance) / 2 + nothing]
        gradient = (d + 1) * r / (d * variance + r * r)
    elif family == "laplace":
        width = np.sqrt(variance)
        terms, gradient = [-abs(r) / width, -np.log(2 * width) + nothing], np.sign(r) / width
    else:
        counts = y / Long(scale)
        floor = np.maximum(counts, Long(0.2)) / 2
        below, rate = np.maximum(floor - z / Long(scale), 0), np.maximum(z / Long(scale), floor)
        slope, curvature = counts / rate - 1, 1 / np.maximum(counts, 1)
        factorials = special.gammaln((counts + 1).astype(np.float64)).astype(Long)
        terms = [np.where(counts > 0, counts * np.log(rate), 0), -rate, -factorials]
        terms += [-below * slope, -below * below * curvature / 2]
        gradient, size = (slope + curvature * below) / Long(scale), counts / rate + 1 + curvature * below
        return sum(t.sum(1) for t in terms), sum(abs(t).sum(1) for t in terms), gradient, size
    return sum(t.sum(1) for t in terms), sum(abs(t).sum(1) for t in terms), gradient, abs(gradient)


# Bounds of errors. The log-density: in 2^-53 of the sum of its terms' absolute values. The gradient: in units in the
# last place in z's dtype; 0.5 is the final rounding alone. Each bound is at most twice what was measured on five
# samples of each number of elements.
BOUNDS = {
    # family, extra_variance: (log-density, gradient in float64, in the others)
    ("gaussian", False): (8.0, 3.0, 0.501),
    ("gaussian", True): (6.0, 3.0, 0.501),
    ("student_t", False): (8.0, 4.5, 0.501),
    ("student_t", True): (8.0, 5.0, 0.501),
    ("laplace", False): (5.0, 0.501, 0.501),
    ("laplace", True): (6.0, 3.0, 0.501),
    ("poisson", False): (7.0, 2.5, 0.501),
}
SIZES = {torch.float32: (1e-8, 1e-3, 1.0, 1e3, 1e8), torch.float64: (1e-8, 1.0, 1e8), torch.bfloat16: (1e-8, 1.0, 1e8)}


@pytest.mark.parametrize(("family", "with_added"), BOUNDS)
@pytest.mark.parametrize("source", SOURCES)
def test_error_bounds(family, with_added, source):
    worst_log_prob = worst_gradient = 0.0
    info = torch.finfo(source)
    for elements in ELEMENTS:
        for size in SIZES.get(source, (1e-3, 1.0, 1e3)):
            size = min(size, 1e6) if family == "poisson" else size
            z, y = arguments(family, 5, elements, source, size)
            extra_variance = numbers(5, elements, seed=2, dtype=y.dtype) ** 2 if with_added else None
            log_prob, gradient, bad = kernel(family, z, y, extra_variance=extra_variance)
            want, magnitude, slope, slope_size = exact(family, z, y, 0.7, extra_variance=extra_variance)
            assert bad == -1
            worst_log_prob = max(worst_log_prob, float((abs(log_prob.numpy() - want) / magnitude).max()) * 2**53)
            slope_size = np.maximum(slope_size, Long(info.tiny))
            representable = slope_size < info.max
            unit = np.exp2(np.floor(np.log2(slope_size))) * info.eps
            error = abs(gradient.double().numpy() - slope) / unit
            worst_gradient = max(worst_gradient, float(error[representable].max(initial=0.0)))
    bound, in_double, narrow = BOUNDS[family, with_added]
    assert worst_log_prob <= bound
    assert worst_gradient <= (in_double if source == torch.float64 else narrow)


@pytest.mark.parametrize("elements", (1, 16, 2500))
def test_many_degrees_of_freedom(elements):
    """``ln(1 + r^2 / (df v))`` is multiplied by ``(df + 1) / 2``, so it must be right to its own last place."""
    for df in (9e3, 1.1e4, 1e8, 1e12):
        z, y = arguments("student_t", 3, elements, torch.float64)
        r = (y - z).numpy().astype(Long) / Long(0.7)
        # Only the kernel's part of the density, without the constant.
        part = -(Long(df) + 1) / 2 * np.log1p(r * r / Long(df))
        constant = density_constant("student_t", 0.7, df, False)
        got = kernel("student_t", z, y, df=df)[0].numpy() - elements * constant
        np.testing.assert_allclose(got, part.sum(1).astype(np.float64), rtol=2e-12)


@pytest.mark.parametrize("elements", (16, 512, 513, 2048))
@pytest.mark.parametrize("size", (1e-150, 1e150, 1e153))
def test_the_product_of_student_t_does_not_overflow(elements, size):
    z, y = arguments("student_t", 2, elements, torch.float64, size)
    want, magnitude, *_ = exact("student_t", z, y, 0.7)
    assert (abs(kernel("student_t", z, y)[0].numpy() - want) <= 10 * 2.0**-53 * magnitude).all()


# --- the order of summation ---------------------------------------------------------------------------------


def tree(terms: np.ndarray) -> float:
    """The kernel's order: 16 places for each 2,048 terms, combined in halves; then tile after tile."""
    total = None
    for begin in range(0, len(terms), 2048):
        lanes = np.zeros(16)
        tile = terms[begin : begin + 2048]
        for i in range(0, len(tile), 16):
            lanes[: len(tile) - i] += tile[i : i + 16]
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total = lanes[0] if total is None else total + lanes[0]
    return float(total)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("source", (torch.float32, torch.float64))
def test_terms_are_added_in_that_order(elements, source):
    z, y = arguments("gaussian", 6, elements, source)
    residual = y.double().numpy() - z.double().numpy()
    constant = density_constant("gaussian", 1.0, None, False) * elements
    want = [-0.5 * tree(row) + constant for row in residual * residual]
    assert kernel("gaussian", z, y, scale=1.0)[0].tolist() == want


# --- bits ---------------------------------------------------------------------------------------------------


def variants(family: str, elements: int, source: torch.dtype) -> list[dict]:
    """Every way to give ``y`` and ``extra_variance`` for 9 samples."""
    _, y = arguments(family, 9, elements, source)
    cases: list[dict] = [dict(y=y), dict(y=y[:1].clone()), dict(y=y, rows=torch.tensor([8, 8, 8, 0, 0, 5, 4, 5, 4]))]
    if family != "poisson":
        extra_variance = numbers(9, elements, seed=2, dtype=y.dtype) ** 2
        cases += [dict(y=y, extra_variance=extra_variance), dict(y=y, extra_variance=extra_variance[:1].clone())]
    return [case | dict(background=BACKGROUND if family == "poisson" else 0.0) for case in cases]


def same_bits(got: tuple, want: tuple) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got[:2], want[:2], strict=True))


@pytest.mark.parametrize("name", _native.instruction_sets()[1:])
@pytest.mark.parametrize("elements", ELEMENTS)
def test_every_instruction_set_gives_the_same_bits(name, elements, instruction_set):
    for family, source in itertools.product(FAMILIES, SOURCES):
        z, _ = arguments(family, 9, elements, source)
        for case in variants(family, elements, source):
            best = kernel(family, z, **case)
            with instruction_set(name):
                assert same_bits(kernel(family, z, **case), best)


@pytest.mark.parametrize("name", _native.instruction_sets()[1:])
def test_the_functions_have_the_same_bits(name, arguments_of_log, instruction_set):
    best = functions(arguments_of_log)
    with instruction_set(name):
        for got, want in zip(functions(arguments_of_log), best, strict=True):
            np.testing.assert_array_equal(got, want)


# Every division among threads: parts of one row and of several, tiles of short rows and of longer ones. Laplace's terms
# are added like the Gaussian's. Student's t has products, and Poisson also has sums over y.
@pytest.mark.parametrize("family", ("gaussian", "student_t", "poisson"))
@pytest.mark.parametrize(("n", "elements"), ((1, 200_001), (3, 50_000), (30_000, 3), (5000, 20)))
def test_threads_give_the_same_bits(family, n, elements):
    z, y = arguments(family, n, elements, torch.float32)
    rows = torch.arange(n) // 3
    one, *others = (kernel(family, z, y, rows=rows, threads=threads) for threads in (1, 2, 3))
    assert all(same_bits(other, one) for other in others)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("elements", (3, 17, 513, 5000))
def test_a_sample_alone_has_the_bits_it_has_among_others(family, elements):
    z, _ = arguments(family, 9, elements, torch.float32)
    for case in variants(family, elements, torch.float32):
        log_prob, gradient, _ = kernel(family, z, **case)
        for i in (0, 4, 8):
            own = dict(case)
            row = own.pop("rows")[i] if "rows" in own else 0 if len(own["y"]) == 1 else i
            own["y"] = own["y"][row][None].clone()
            if "extra_variance" in own:
                own["extra_variance"] = own["extra_variance"][0 if len(own["extra_variance"]) == 1 else i][None].clone()
            alone = kernel(family, z[i : i + 1].clone(), **own)
            assert torch.equal(alone[0], log_prob[i : i + 1]) and torch.equal(alone[1], gradient[i : i + 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("elements", (1, 5, 16, 2049))
def test_without_the_gradient(family, elements):
    for source in SOURCES:
        z, _ = arguments(family, 9, elements, source)
        for case in variants(family, elements, source):
            log_prob, untouched, _ = kernel(family, z, gradient=False, **case)
            assert torch.equal(log_prob, kernel(family, z, **case)[0]) and untouched.isnan().all()


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("elements", (3, 40))
def test_rows_that_nobody_has_do_not_matter(family, elements):
    z, y = arguments(family, 4, elements, torch.float32)
    rows = torch.tensor([2, 0, 0, 2])
    want = kernel(family, z, y[rows])
    y[1] = y[3] = math.nan
    assert same_bits(kernel(family, z, y, rows=rows), want)


@pytest.mark.parametrize("bad", (-1, 4, -(2**63), 2**63 - 1))
def test_nothing_is_written_where_a_row_is_out_of_range(bad):
    z, y = arguments("gaussian", 4, 40, torch.float32)
    log_prob, gradient, place = kernel("gaussian", z, y, rows=torch.tensor([0, 1, bad, 9]))
    assert place == 2 and log_prob.isnan().all() and gradient.isnan().all()


def test_codes_are_checked():
    z, y = arguments("gaussian", 1, 3, torch.float32)
    rest = (z.data_ptr(), y.data_ptr(), 1, None, None, 0, None, z.data_ptr(), None, 1)
    for family, dtype, message in ((4, 0, "family must be below 4"), (0, 4, "dtype must be below 4")):
        with pytest.raises(ValueError, match=message):
            _native.module("cpu").log_prob_and_gradient(family, 1.0, 1.0, 0.0, 0.0, dtype, 1, 3, *rest)
