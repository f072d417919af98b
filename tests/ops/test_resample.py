"""`resample` and `gather_particles_`: exact integers, the distributions of the four schemes, degenerate weights.

Integers are checked against Python's, which do not overflow. Real numbers are checked against `mpmath`.
"""

from __future__ import annotations

import bisect
import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastguide import ops, reference
from fastguide.ops.randn.reference import words as words_of
from fastguide.ops.resample import reference as formulas

SCHEMES = ("systematic", "stratified", "multinomial", "residual")
WEIGHT_DTYPES = (torch.float32, torch.float64)
fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random_weights(*shape: int, spread: float = 2.0, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def counts_of(ancestors: torch.Tensor, particles: int) -> torch.Tensor:
    """The numbers of offspring ``[..., K]`` from ancestors ``[..., N]``."""
    flat = ancestors.long().reshape(-1, ancestors.shape[-1])
    counts = torch.zeros(flat.shape[0], particles, dtype=torch.int64)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    return counts.reshape(*ancestors.shape[:-1], particles)


def exact_prefix_sums(log_weights: torch.Tensor) -> list[int]:
    """Inclusive prefix sums of one row's integer weights, in Python integers."""
    q, *_ = reference.integer_weights(log_weights[None])
    return list(itertools.accumulate(q[0].tolist()))


# --- integer weights ----------------------------------------------------------------------------------------


def polynomial_by_hand(coefficients: list[float], x: float) -> float:
    """The polynomial with even and odd powers apart, in single Python float operations (IEEE double, never fused)."""
    parts = [0.0, 0.0]
    for power in range(len(coefficients) - 1, -1, -1):
        coefficient = coefficients[len(coefficients) - 1 - power]
        parts[power % 2] = parts[power % 2] * (x * x) + coefficient
    return parts[1] * x + parts[0]


def integer_weight_by_hand(log_weight: float, top: float, scale: int) -> tuple[int, int]:
    """What the docstring of `integer_weights` says, in Python floats."""
    t = max(log_weight - top, -64.0) * 1.4426950408889634
    n = float(round(t))  # Python rounds half to even, as IEEE does
    e = polynomial_by_hand(formulas._EXP2, t - n)
    q = round(math.ldexp(e, int(n) + scale))
    v = round(math.ldexp(e * e, 2 * int(n) + scale))
    return q, v


@fast
@given(
    st.lists(st.one_of(st.floats(-60, 60), st.floats(-1e4, 1e4), st.just(-math.inf)), min_size=1, max_size=9),
    st.floats(-1e4, 1e4),
)
def test_integer_weights_to_the_last_bit(values, finite):
    row = torch.tensor([*values, finite], dtype=torch.float64)
    q, v, top, scale = reference.integer_weights(row[None])
    assert scale == 62 - math.ceil(math.log2(len(row)))
    assert float(top) == float(row.max())
    expected = [integer_weight_by_hand(value, float(top), scale) for value in row.tolist()]
    assert list(zip(q[0].tolist(), v[0].tolist(), strict=True)) == expected
    assert sum(q[0].tolist()) <= 2**62 and sum(v[0].tolist()) <= 2**62


def test_every_bit_of_the_exponential():
    """With rows of four the integers have more bits than float64, so every bit of the exponential counts."""
    rows = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * -3
    rows[:, 0] = 0.0
    q, v, top, scale = reference.integer_weights(rows)
    assert scale == 60 and (top == 0.0).all()
    expected = [[integer_weight_by_hand(value, 0.0, 60) for value in row] for row in rows.tolist()]
    assert torch.equal(torch.stack([q, v], dim=-1), torch.tensor(expected))


@fast
@given(st.lists(st.floats(-5, 0) | st.floats(-50, 0) | st.floats(-1e4, 0), min_size=1, max_size=6))
def test_integer_weights_are_the_exponentials(values):
    """Equal up to the rounding to integers, three roundings of float64, and one of the log-weight."""
    row = torch.tensor([0.0, *values], dtype=torch.float64)
    q, v, _, scale = reference.integer_weights(row[None])
    with mpmath.workdps(60):
        for power, integers in ((1, q), (2, v)):
            for value, integer in zip(row.tolist(), integers[0].tolist(), strict=True):
                exact = mpmath.exp(power * mpmath.mpf(value)) * 2**scale
                roundings = 3 - 1.2 * value
                assert abs(integer - exact) <= mpmath.mpf("0.5") + roundings * power * exact * mpmath.mpf(2) ** -53


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [
        ("_EXP2", lambda f: (lambda value: (value, value))(mpmath.mpf(2) ** f), 5e-18),
        ("_LOG", lambda f: (mpmath.log(f + mpmath.mpf("1.5")), 1), 7.1e-10),
    ],
)
def test_polynomials(name, function, bound):
    with mpmath.workdps(40):
        for i in range(-500, 501):
            f = mpmath.mpf(i) / 1000
            exact, size = function(f)
            assert abs(mpmath.polyval(getattr(formulas, name), f) - exact) <= bound * size


@pytest.mark.parametrize("particles", [1, 2, 3, 4, 5, 1000, 1024, 1025, 100_000])
def test_integer_weights_use_the_room_there_is(particles):
    q, v, _, scale = reference.integer_weights(torch.zeros(1, particles))
    assert (q == 2**scale).all() and (v == 2**scale).all()
    total = particles * 2**scale
    assert 2**61 < total <= 2**62 and int(q.sum()) == total


def test_integer_weights_of_unusable_rows_are_equal_ones():
    rows = torch.tensor([[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3, [0.0, math.nan, -math.inf]])
    q, v, top, scale = reference.integer_weights(rows)
    assert (q == 2**scale).all() and (v == 2**scale).all()
    assert not torch.isfinite(top).any()


# --- exact positions ----------------------------------------------------------------------------------------

words = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
totals = st.integers(0, 2**62) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**62 - 1, 2**62])


@settings(fast, max_examples=400)
@given(totals, words, words)
def test_uniform_below_is_exact(q, w0, w1):
    got = formulas._uniform_below(torch.tensor([[q]]), torch.tensor([[w0]]), torch.tensor([[w1]]))
    assert int(got) == ((w1 << 32 | w0) * q) >> 64


@settings(fast, max_examples=200)
@given(totals.filter(bool), st.integers(1, 100), st.data())
def test_stratum_positions_are_exact(total, number, data):
    r = data.draw(st.integers(0, total - 1))
    got = formulas._stratum_positions(torch.tensor([[total]]), number, torch.tensor([[r]]))[0]
    assert got.tolist() == [(i * total + r) // number for i in range(number)]


@pytest.mark.parametrize("number", [10**6, 2**18 - 1])
def test_stratum_positions_of_many(number):
    for total, r in ((2**62, 2**62 - 1), (2**42 + 7, 2**42)):
        got = formulas._stratum_positions(torch.tensor([[total]]), number, torch.tensor([[r]]))[0]
        assert got.tolist() == [(i * total + r) // number for i in range(number)]


def exponential_by_hand(word: int) -> int:
    m, exponent = math.frexp(word + 1)
    ln = polynomial_by_hand(formulas._LOG, 2.0 * m - 1.5)
    return round(((33 - exponent) * 0.6931471805599453 - ln) * 2.0**26)


def sorted_uniforms_by_hand(exponentials: list[int], total: float) -> list[float]:
    """One uniform fewer than there are exponentials, below ``total``. Each operation is one of IEEE float64."""
    ratio = total / float(max(sum(exponentials), 1))
    sums = itertools.accumulate(exponentials[:-1])
    return [min(float(s) * ratio, math.nextafter(total, 0.0)) for s in sums]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 1001])
def test_exponentials_and_sorted_uniforms_to_the_last_bit(number):
    exponentials = formulas._exponentials(3, number + 1, 7, 8, 9, torch.device("cpu"))
    words = words_of(3, (number + 4) // 4, 7, 8, 9, 0, torch.device("cpu"))
    rows = torch.stack(words, dim=-1).flatten(1)[:, : number + 1].tolist()
    assert exponentials.tolist() == [[exponential_by_hand(word) for word in row] for row in rows]
    for total in (2.0**62, float(2**62 // 3), 5.0, 0.0):
        for few in {number, number // 2, 0}:
            column = torch.full((3, 1), total, dtype=torch.float64)
            u = formulas._sorted_uniforms(exponentials, torch.full((3, 1), few), column)
            assert u.shape == (3, number) and (u[:, few:] == math.inf).all()
            by_hand = [sorted_uniforms_by_hand(row[: few + 1], total) for row in exponentials.tolist()]
            assert u[:, :few].tolist() == by_hand


def test_exponentials_at_the_ends():
    """The largest word gives 0, and the smallest gives 32 ln 2. If all exponentials are 0, the divisor is 1."""
    assert exponential_by_hand(2**32 - 1) == 0 and exponential_by_hand(0) == round(32 * math.log(2) * 2**26)
    zeros = torch.zeros(1, 3, dtype=torch.int64)
    u = formulas._sorted_uniforms(zeros, torch.tensor([[2]]), torch.tensor([[8.0]]).double())
    assert u.tolist() == [[0.0, 0.0]]
    last = torch.tensor([[5, 3, 0]])  # without the bound, u would be total
    u = formulas._sorted_uniforms(last, torch.tensor([[2]]), torch.tensor([[8.0]]).double())
    assert u.tolist() == [[5.0, math.nextafter(8.0, 0.0)]]


def test_exponentials_are_exponential():
    e = formulas._exponentials(1, 1_000_000, 3, 0, 0, torch.device("cpu"))[0].double().numpy() * 2.0**-26
    assert scipy.stats.kstest(e, "expon").pvalue > 1e-3
    assert abs(e.mean() - 1) < 4e-3 and abs(e.var() - 1) < 0.015
    assert abs(np.corrcoef(e[1:], e[:-1])[0, 1]) < 4e-3


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_sorted_uniforms_are_order_statistics(number):
    """The i-th of N has the distribution Beta(i, N + 1 - i), and the gaps have the right covariance."""
    rows = 20_000
    exponentials = formulas._exponentials(rows, number + 1, 11, 0, 0, torch.device("cpu"))
    one = torch.ones(rows, 1, dtype=torch.float64)
    u = formulas._sorted_uniforms(exponentials, torch.full((rows, 1), number), one).numpy()
    for i in {1, (number + 1) // 2, number}:
        assert scipy.stats.kstest(u[:, i - 1], scipy.stats.beta(i, number + 1 - i).cdf).pvalue > 1e-3
    if number > 1:
        expected = 1 / ((number + 1) ** 2 * (number + 2))
        assert abs(np.cov(u[:, 0], u[:, -1])[0, 1] / expected - 1) < 0.2


shares_of_one = st.lists(st.integers(0, 2**58) | st.sampled_from([0, 1, 2**57, 2**58]), min_size=1, max_size=12)


@settings(fast, max_examples=100)
@example([2**62 // 3, 2**61, 2**62 - 2**62 // 3 - 2**61], 3)  # N q = Q - 1: in floating point N (q / Q) = 1
@example([2**56, 47 * 2**55, 49 * 2**55], 49)  # N q = Q: in floating point N (q / Q) < 1
@given(shares_of_one, st.integers(1, 40) | st.sampled_from([4093, 4096]))
def test_residual_is_exact(weights, number):
    weights[0] = max(weights[0], 1)
    q = torch.tensor([weights])
    total = q.sum(1, keepdim=True)
    quotient, rest = formulas._shares(q, total, number)
    assert list(zip(quotient[0].tolist(), rest[0].tolist(), strict=True)) == [
        divmod(number * weight, sum(weights)) for weight in weights
    ]
    exponentials = formulas._exponentials(1, number + 1, 5, 0, 0, q.device)
    got = formulas._residual(q, total, number, exponentials)[0].tolist()
    assert got == residual_by_hand(weights, number, exponentials[0].tolist())


def residual_by_hand(weights: list[int], number: int, exponentials: list[int]) -> list[int]:
    """``floor(N w)`` copies of each. Sorted uniforms draw the remaining slots from the remainders."""
    total = sum(weights)
    copies, remainders = zip(*(divmod(number * weight, total) for weight in weights), strict=True)
    sure = [k for k, count in enumerate(copies) for _ in range(count)]
    left = number - len(sure)
    prefix = []
    for exact in itertools.accumulate(remainders):
        whole, rest = divmod(exact, total)
        prefix.append(float(whole) + min(float(rest) * (1.0 / float(total)), 1.0))
    assert prefix[-1] == left
    uniforms = sorted_uniforms_by_hand(exponentials[: left + 1], float(left))
    return sorted(sure + [bisect.bisect_right(prefix, u) for u in uniforms])


def test_residual_keeps_small_remainders():
    """One draw from 10^6 particles. The first has nearly all of the weight; the others have 2^-23 each, a tenth in
    all."""
    log_weights = torch.full((1, 10**6), math.log(0.1 / 10**6), dtype=torch.float64)
    log_weights[0, 0] = 0.0
    q, *_ = reference.integer_weights(log_weights)
    total = q.sum(1, keepdim=True)
    for share in (0.0, 0.5, 0.90, 0.92, 1.0):
        before = round(share * 2**30)
        position = before / 2**30 * int(total)
        expected = max(0, int((position - int(q[0, 0])) // int(q[0, 1])) + 1)
        got = int(formulas._residual(q, total, 1, torch.tensor([[before, 2**30 - before]])))
        assert abs(got - min(expected, 10**6 - 1)) <= (0 < got < 10**6 - 1), share


# --- the laws of the schemes --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 7, 16, 100])  # one, fewer than particles, as many, more
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])  # nearly equal weights, unequal ones, nearly all on one
def test_offspring_bounds(number, spread):
    """Offspring against N w_k in exact integers. Systematic: floor or ceil. Stratified: at most 2 above ceil or 1 below
    floor. Residual: at least floor."""
    particles = 16
    rows = random_weights(10, particles, spread=spread, seed=number)
    q, *_ = reference.integer_weights(rows)
    for scheme in SCHEMES:
        ancestors = ops.resample(rows, scheme=scheme, num=number, seed=3)[0]
        assert (ancestors.diff(dim=1) >= 0).all()
        counts = counts_of(ancestors, particles)
        for row, row_counts in zip(q.tolist(), counts.tolist(), strict=True):
            total = sum(row)
            assert sum(row_counts) == number
            for weight, count in zip(row, row_counts, strict=True):
                floor, rest = divmod(number * weight, total)
                if scheme == "systematic":
                    assert floor <= count <= floor + (rest > 0)
                elif scheme == "stratified":
                    # an interval of length N w meets floor(N w) - 1 whole strata at least, and two more at most
                    assert floor - 1 <= count <= floor + 2
                elif scheme == "residual":
                    assert count >= floor


@pytest.mark.parametrize("number", [5, 8, 13])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_have_the_weights_as_their_mean(scheme, number):
    """One slot of each draw, chosen independently of the draw, is distributed like the weights (20,000 draws,
    chi-squared test). The mean counts equal N w (Hotelling's test, with the covariance of the draws)."""
    weights = np.array([0.02, 0.3, 0.0, 0.11, 0.05, 0.27, 0.15, 0.1])
    rows, seeds = 500, 40
    log_weights = torch.log(torch.from_numpy(weights)).expand(rows, -1)
    slot = torch.from_numpy(np.random.default_rng(4).integers(number, size=(seeds, rows, 1)))
    ancestors = torch.stack(
        [ops.resample(log_weights, scheme=scheme, num=number, seed=seed)[0].long() for seed in range(seeds)]
    )
    chosen = torch.bincount(ancestors.gather(2, slot).flatten(), minlength=8).numpy()
    alive = weights > 0
    assert chosen[~alive].sum() == 0
    p = scipy.stats.chisquare(chosen[alive], weights[alive] * rows * seeds).pvalue
    assert p > 1e-3, p

    counts = counts_of(ancestors, 8).reshape(-1, 8)[:, torch.from_numpy(alive)].numpy()
    excess = counts.mean(0) - number * weights[alive]
    covariance = np.cov(counts.T) / len(counts)
    rank = np.linalg.matrix_rank(covariance, tol=1e-12)
    statistic = excess @ np.linalg.pinv(covariance, rcond=1e-9) @ excess
    p = scipy.stats.chi2.sf(statistic, rank)
    assert p > 1e-3, p


def test_the_schemes_differ_in_variance_as_they_should():
    weights = torch.log(torch.tensor([0.02, 0.3, 0.11, 0.05, 0.27, 0.15, 0.1], dtype=torch.float64))
    variance = {}
    for scheme in SCHEMES:
        ancestors = ops.resample(weights.expand(2000, -1), scheme=scheme, num=20, seed=1)[0]
        variance[scheme] = float(counts_of(ancestors, 7).double().var(0).sum())
    assert variance["systematic"] < variance["stratified"] < variance["multinomial"]
    assert variance["residual"] < variance["multinomial"]
    w = torch.softmax(weights, 0)
    assert abs(variance["multinomial"] / float((20 * w * (1 - w)).sum()) - 1) < 0.1


@pytest.mark.parametrize("number", [1, 3, 10, 10_000])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_number_of_ancestors(scheme, number):
    rows = random_weights(3, 10)
    ancestors, after, log_mean_weight, ess = ops.resample(rows, scheme=scheme, num=number, seed=8)
    assert ancestors.shape == after.shape == (3, number) and ancestors.dtype == torch.int32
    same = ops.resample(rows, scheme=scheme, seed=8)
    assert torch.equal(log_mean_weight, same[2]) and torch.equal(ess, same[3])
    assert torch.equal(after, log_mean_weight[:, None].expand(3, number))
    share = counts_of(ancestors, 10).double() / number
    tolerance = 1 if number < 100 else 5 / math.sqrt(number)
    assert (share - torch.softmax(rows, 1)).abs().max() <= tolerance


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_draws_alone_as_in_a_larger_call(scheme, backend):
    for particles, rows in ((7, 4), (70_000, 2)):
        weights = random_weights(rows, particles)
        options = dict(scheme=scheme, seed=3, step=2, stream=1, sorted=False, backend=backend)
        whole = ops.resample(weights, first_row=10, **options)
        for b in range(rows):
            for got, expected in zip(ops.resample(weights[b : b + 1], first_row=10 + b, **options), whole, strict=True):
                assert torch.equal(got[0], expected[b])
        assert not torch.equal(whole[0], ops.resample(weights, **options)[0])


def test_first_rows_that_are_refused():
    for first_row in (-1, 1 << 48, 1.0, None):
        with pytest.raises(ValueError, match="first_row: expected an integer in"):
            ops.resample(torch.zeros(2, 4), first_row=first_row)


# --- the numbers beside the ancestors -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (50,), (1, 300_000)])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])  # exp of these overflows, or is 0
def test_ess_and_mean_weight(shape, dtype, offset):
    rows = (random_weights(*shape, dtype=torch.float64) + offset).to(dtype)
    _, after, log_mean_weight, ess = ops.resample(rows)
    lw = rows.double()
    expected = torch.logsumexp(lw, -1) - math.log(shape[-1])
    torch.testing.assert_close(log_mean_weight, expected, rtol=1e-14, atol=1e-13)
    expected_ess = torch.exp(2 * torch.logsumexp(lw, -1) - torch.logsumexp(2 * lw, -1))
    # at offsets of 1e4 the expectation itself has an error of exp(2e4 * 1e-16)
    torch.testing.assert_close(ess, expected_ess, rtol=1e-9 if offset == 0.0 else 3e-11 * abs(offset), atol=0)
    assert log_mean_weight.dtype == ess.dtype == torch.float64 and after.dtype == dtype
    assert ((ess >= 1 - 1e-12) & (ess <= shape[-1] * (1 + 1e-12))).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_the_mean_weight_is_kept(scheme, dtype):
    rows = random_weights(20, 30, spread=1.2, dtype=dtype)
    for options in ({}, dict(ess_threshold=0.4), dict(num=5), dict(sorted=False)):
        _, after, log_mean_weight, _ = ops.resample(rows, scheme=scheme, seed=2, **options)
        mean = torch.logsumexp(after.double(), 1) - math.log(after.shape[1])
        resolution = 1e-13 if dtype == torch.float64 else 2e-7
        torch.testing.assert_close(mean, log_mean_weight, rtol=resolution, atol=resolution)


# --- the threshold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep_sorted", (True, False))
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_each_row_decides_for_itself(scheme, keep_sorted, dtype):
    rows = torch.cat([random_weights(4, 50, spread=s, seed=1, dtype=dtype) for s in (0.1, 3.0, 0.5, 5.0)])
    options = dict(scheme=scheme, seed=6, sorted=keep_sorted)
    always = ops.resample(rows, **options)
    ancestors, after, log_mean_weight, ess = ops.resample(rows, ess_threshold=0.5, **options)
    stays = ess >= 25
    assert 4 <= int(stays.sum()) <= 12
    assert torch.equal(ancestors[stays], torch.arange(50).int().expand(int(stays.sum()), -1))
    assert torch.equal(after[stays], rows[stays])
    assert torch.equal(ancestors[~stays], always[0][~stays]) and torch.equal(after[~stays], always[1][~stays])
    assert torch.equal(log_mean_weight, always[2]) and torch.equal(ess, always[3])


def test_the_edge_of_the_threshold():
    """The ESS is exactly 2 of 4. With a threshold of 1/2 the row keeps its particles; just above, it is resampled."""
    row = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    identity, pairs = torch.arange(4).int(), torch.tensor([0, 0, 2, 2]).int()
    assert float(ops.resample(row)[3]) == 2.0
    assert torch.equal(ops.resample(row, ess_threshold=0.5)[0], identity)
    assert torch.equal(ops.resample(row, ess_threshold=math.nextafter(0.5, 1.0))[0], pairs)
    assert torch.equal(ops.resample(row, ess_threshold=0.0)[0], identity)
    assert torch.equal(ops.resample(torch.zeros(4), ess_threshold=1.0, scheme="multinomial")[0], identity)


# --- survivors in place -------------------------------------------------------------------------------------


# 1: one. 33: two of the groups of 16 and a rest. 1000: many groups of one block.
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("particles", [1, 33, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])  # all, some, or few survive
def test_unsorted_ancestors_keep_survivors_in_place(scheme, particles, spread):
    rows = random_weights(6, particles, spread=spread)
    ordered = ops.resample(rows, scheme=scheme, seed=4)
    placed = ops.resample(rows, scheme=scheme, seed=4, sorted=False)
    assert torch.equal(placed[0].sort(dim=1).values, ordered[0])
    for a, b in zip(placed[1:], ordered[1:], strict=True):
        assert torch.equal(a, b)
    alive = counts_of(ordered[0], particles) > 0
    assert torch.equal(placed[0][alive], torch.arange(particles).int().expand(6, -1)[alive])


# --- degenerate weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
class TestDegenerate:
    def test_one_particle(self, scheme, dtype):
        ancestors, after, log_mean_weight, ess = ops.resample(torch.tensor([[-3.0]], dtype=dtype), scheme=scheme)
        assert ancestors.tolist() == [[0]] and after.tolist() == [[-3.0]]
        assert float(log_mean_weight) == -3.0 and float(ess) == 1.0

    def test_one_live_particle(self, scheme, dtype):
        for place, number in itertools.product((0, 3, 9), (None, 1, 25)):
            row = torch.full((10,), -math.inf, dtype=dtype)
            row[place] = -2.0
            ancestors, after, log_mean_weight, ess = ops.resample(row, scheme=scheme, num=number, seed=1)
            assert (ancestors == place).all()
            assert float(ess) == 1.0 and float(log_mean_weight) == -2.0 + math.log(0.1)
            torch.testing.assert_close(after, torch.full_like(after, -2.0 - math.log(10.0)))

    def test_equal_weights(self, scheme, dtype):
        row = torch.full((64,), 5.0, dtype=dtype)
        ancestors, after, log_mean_weight, ess = ops.resample(row, scheme=scheme, seed=1)
        assert float(ess) == 64.0 and float(log_mean_weight) == 5.0 and (after == 5.0).all()
        if scheme in ("systematic", "residual", "stratified"):
            assert torch.equal(ancestors, torch.arange(64).int())  # each N w_k is exactly 1

    def test_dead_particles_are_never_chosen(self, scheme, dtype):
        rows = random_weights(50, 40, dtype=dtype)
        dead = random_weights(50, 40, seed=9) > 0.3
        dead[:, 0] = dead[:, -1] = True  # also the ends, where a search might go too far
        dead[:, 7] = False
        rows[dead] = -math.inf
        for number in (None, 1000):
            ancestors = ops.resample(rows, scheme=scheme, num=number, seed=5)[0]
            assert not dead.gather(1, ancestors.long()).any()
        placed = ops.resample(rows, scheme=scheme, seed=5, sorted=False)[0]
        assert not dead.gather(1, placed.long()).any()

    # exp(1e4) overflows and exp(-1e4) is 0. At 3e38, float32 rounds the differences away.
    @pytest.mark.parametrize("offset", [1e4, -1e4, 3e38, -3e38])
    def test_weights_far_from_zero(self, scheme, dtype, offset):
        row = torch.tensor([0.0, 1024.0, -1024.0, 1024.0], dtype=dtype)  # exact at 1e4; all equal at 3e38
        ancestors, _, log_mean_weight, ess = ops.resample(row + offset, scheme=scheme, num=1000, seed=2)
        if abs(offset) == 1e4:
            assert set(ancestors.tolist()) == {1, 3} and float(ess) == 2.0
            assert abs(float(log_mean_weight) - (1024.0 + offset - math.log(2.0))) < 1e-10
        else:
            assert set(ancestors.tolist()) == {0, 1, 2, 3} and float(ess) == 4.0
            assert float(log_mean_weight) == float((row + offset)[0])

    # Each kind is detected in a different way, and every scheme must skip such a row.
    @pytest.mark.parametrize(
        ("bad", "what"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no live particle")]
    )
    def test_unusable_rows(self, scheme, dtype, bad, what):
        rows = random_weights(5, 6, dtype=dtype)
        good = ops.resample(rows, scheme=scheme, seed=3)
        rows[3, 2] = bad
        rows[3, 4] = -math.inf
        if bad == -math.inf:
            rows[3] = bad
        with pytest.raises(ValueError, match=f"log_weights: .* got {what}.* in row 3"):
            ops.resample(rows, scheme=scheme, seed=3)
        for options in ({}, dict(ess_threshold=0.999), dict(sorted=False)):
            got = ops.resample(rows, scheme=scheme, seed=3, check=False, **options)
            assert got[0][3].tolist() == [0, 1, 2, 3, 4, 5]
            assert torch.equal(got[1][3].nan_to_num(7.0), rows[3].nan_to_num(7.0))
            assert math.isnan(got[2][3]) and math.isnan(got[3][3])
        others = [0, 1, 2, 4]
        got = ops.resample(rows, scheme=scheme, seed=3, check=False)
        for a, b in zip(got, good, strict=True):
            assert torch.equal(a[others], b[others])

    def test_an_unusable_single_row(self, scheme, dtype):
        with pytest.raises(ValueError, match="row 0"):
            ops.resample(torch.full((4,), -math.inf, dtype=dtype), scheme=scheme)
        flags = ops.resample(torch.full((4,), -math.inf, dtype=dtype), scheme=scheme, num=2, check=False)
        assert math.isnan(flags[2]) and math.isnan(flags[3]) and torch.isnan(flags[1]).all()


# --- what a row depends on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep_sorted", (True, False))
def test_rows_depend_on_themselves_and_their_index(scheme, keep_sorted):
    rows = random_weights(6, 40)
    options = dict(scheme=scheme, sorted=keep_sorted, seed=2**64 - 1, step=2**32 - 1, stream=5)
    batch = ops.resample(rows, **options)
    alone = ops.resample(rows[0], **options)  # [K] is row 0 of [1, K]
    for a, b in zip(batch, alone, strict=True):
        assert torch.equal(a[0], b)
    prefix = ops.resample(rows[:4], **options)
    other = rows.clone()
    other[[0, 2, 3, 4, 5]] = random_weights(5, 40, seed=8)
    changed = ops.resample(other, **options)
    for a, b, c in zip(batch, prefix, changed, strict=True):
        assert torch.equal(a[:4], b) and torch.equal(a[1], c[1])
    # the same weights in another row get other uniforms
    repeated = ops.resample(rows[:1].expand(64, -1), **options)[0]
    assert len({tuple(r) for r in repeated.sort(dim=1).values.tolist()}) > 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_counter_changes_the_draw(scheme):
    row = random_weights(1000)
    base = dict(seed=1, step=2, stream=3)
    draws = [
        ops.resample(row, scheme=scheme, **{**base, **c})[0] for c in ({}, {"seed": 2}, {"step": 3}, {"stream": 4})
    ]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)
    assert torch.equal(draws[0], ops.resample(row, scheme=scheme, **base)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 100_000), (64, 1000)])
def test_the_bits_do_not_depend_on_the_threads(scheme, shape, threads):
    rows = random_weights(*shape, dtype=torch.float32)
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(ops.resample(rows, scheme=scheme, seed=1, sorted=False))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_order_of_the_weights_changes_only_names():
    """Sums of integers do not depend on the order, so ESS and mean weight are equal to the last bit."""
    row = random_weights(100_001, spread=10.0)
    shuffled = row[torch.from_numpy(np.random.default_rng(0).permutation(100_001))]
    a, b = ops.resample(row), ops.resample(shuffled)
    assert torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])


def test_non_contiguous_weights_that_stay_as_they_are(recwarn):
    rows = random_weights(7, 5)
    turned = rows.T.contiguous().T
    for scheme in SCHEMES:
        for options in ({}, dict(ess_threshold=0.6, sorted=False)):
            expected = ops.resample(rows, scheme=scheme, seed=1, **options)
            got = ops.resample(turned, scheme=scheme, seed=1, **options)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b) and a.is_contiguous()
                a.fill_(3)
    assert torch.equal(turned, random_weights(7, 5))
    assert not recwarn.list


# --- a million particles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_million_ancestors_of_a_million_particles(scheme):
    number = 1_000_000
    row = random_weights(number, spread=1.0)
    ancestors, _, _, ess = ops.resample(row, scheme=scheme, seed=12)
    assert ((ancestors >= 0) & (ancestors < number)).all() and (ancestors.diff() >= 0).all()
    counts = counts_of(ancestors, number).double()
    expected = number * torch.softmax(row, 0)
    if scheme == "systematic":
        assert (counts - expected).abs().max() < 1 + 1e-6
    if scheme == "residual":
        assert (counts - expected.floor()).min() >= -1e-9
    # the mean of a function after resampling is the weighted mean before
    f = torch.sin(row) + row
    exact = float((torch.softmax(row, 0) * f).sum())
    assert abs(float(f[ancestors.long()].mean()) - exact) < 4 * float(f.std()) * math.sqrt(2 / float(ess))


def test_float32_prefix_sums_are_wrong_and_integers_are_not():
    """Systematic resampling with K = N = 10^6. Every ancestor is the one from exact prefix sums. A float32 CDF gives
    another one in most slots, and some past the end."""
    number = 1_000_000
    row = random_weights(number, spread=2.0, dtype=torch.float32)
    ancestors = ops.resample(row, seed=21)[0].numpy()

    prefix = exact_prefix_sums(row)
    total = prefix[-1]
    w0, w1 = formulas._uniforms(1, 1, 21, 0, 0, row.device)
    r = ((int(w1) << 32 | int(w0)) * total) >> 64
    positions = np.array([(i * total + r) // number for i in range(number)], dtype=np.int64)
    exact = np.searchsorted(np.array(prefix, dtype=np.int64), positions, side="right")
    assert np.array_equal(ancestors, exact)

    cdf = np.cumsum(torch.softmax(row, 0).numpy(), dtype=np.float32)
    u = ((np.arange(number) + r / total) / number).astype(np.float32)
    wrong = np.searchsorted(cdf, u, side="right")
    assert (wrong != exact).mean() > 0.5  # 82 %
    assert (wrong == number).sum() > 100  # 866


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_from_few_and_few_from_many(scheme):
    few, many = random_weights(3, spread=1.0), random_weights(300_000, spread=1.0)
    ancestors = ops.resample(many, scheme=scheme, num=3, seed=1)[0]
    assert ancestors.shape == (3,) and ((ancestors >= 0) & (ancestors < 300_000)).all()
    ancestors = ops.resample(few, scheme=scheme, num=300_000, seed=1)[0]
    share = counts_of(ancestors, 3).double() / 300_000
    assert (share - torch.softmax(few, 0)).abs().max() < (1e-5 if scheme != "multinomial" else 4e-3)


# --- gather -------------------------------------------------------------------------------------------------

STATE_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
)


@pytest.mark.parametrize("keep_sorted", (True, False))
@pytest.mark.parametrize("event", [(), (1,), (3, 5), (1009,), (2, 0)])
def test_gather_is_index_select(keep_sorted, event):
    ancestors = ops.resample(random_weights(3, 20, spread=3.0), seed=1, sorted=keep_sorted)[0]
    states = [(100 * random_weights(3, 20, *event, seed=i)).to(dtype) for i, dtype in enumerate(STATE_DTYPES)]
    expected = [
        torch.stack([torch.index_select(row, 0, chosen) for row, chosen in zip(state, ancestors, strict=True)])
        for state in states
    ]
    addresses = [state.data_ptr() for state in states]
    assert ops.gather_particles_(ancestors, *states) is None
    for state, want, address in zip(states, expected, addresses, strict=True):
        assert torch.equal(state, want) and state.data_ptr() == address


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
def test_gather_any_map_and_one_row(index_dtype):
    generator = torch.Generator().manual_seed(0)
    for ancestors in (
        torch.randint(9, (9,), generator=generator),
        torch.arange(9).flip(0),  # all move, so no order of plain copies works
        torch.arange(9).roll(1),
        torch.zeros(9).long(),
        torch.arange(9),
    ):
        state = random_weights(9, 4, seed=2)
        before = state.clone()
        ops.gather_particles_(ancestors.to(index_dtype), state)
        assert torch.equal(state, before[ancestors])


def test_gather_views_in_place():
    ancestors = torch.tensor([[2, 2, 0], [1, 1, 1]])
    base = random_weights(2, 4, 3, seed=1)
    view = base.transpose(1, 2)  # [2, 3, 4], not contiguous
    expected = torch.stack([view[b][ancestors[b]] for b in range(2)])
    ops.gather_particles_(ancestors, view)
    assert torch.equal(view, expected) and torch.equal(base.transpose(1, 2), expected)
    wide = random_weights(2, 3, 8, seed=2)
    untouched = wide[..., 1::2].clone()
    expected = torch.stack([wide[b, ancestors[b], ::2] for b in range(2)])
    ops.gather_particles_(ancestors, wide[..., ::2])
    assert torch.equal(wide[..., ::2], expected) and torch.equal(wide[..., 1::2], untouched)


def test_gather_nothing():
    ops.gather_particles_(torch.zeros(2, 3).int())
    for shape in ((0, 3), (2, 0), (0,)):
        state = torch.zeros(*shape, 4)
        ops.gather_particles_(torch.zeros(shape).int(), state)


# --- errors -------------------------------------------------------------------------------------------------

ROWS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("log_weights", "options", "error", "message"),
    [
        ([0.0], {}, TypeError, "log_weights: expected a float32 or float64 tensor, got list"),
        (ROWS.half(), {}, TypeError, "log_weights: .* got torch.float16"),
        (ROWS[None], {}, ValueError, r"log_weights: expected shape \[B, K\] or \[K\]"),
        (ROWS[:, :0], {}, ValueError, r"with K >= 1, got \[2, 0\]"),
        (ROWS, dict(scheme="best"), ValueError, "scheme: expected one of .* got 'best'"),
        (ROWS, dict(num=0), ValueError, r"num: expected an integer in \[1, 2\^31\), got 0"),
        (ROWS, dict(num=2**31), ValueError, "num: expected an integer"),
        (ROWS, dict(num=2.0), ValueError, "num: expected an integer"),
        (ROWS, dict(num=4, ess_threshold=0.5), ValueError, "num: expected 3 with ess_threshold"),
        (ROWS, dict(num=4, sorted=False), ValueError, "num: expected 3 with ess_threshold or sorted=False"),
        (
            ROWS,
            dict(ess_threshold=1.5),
            ValueError,
            r"ess_threshold: expected a share .* in \[0, 1\], got 1.5",
        ),
        (ROWS, dict(ess_threshold=math.nan), ValueError, "ess_threshold: expected"),
        (ROWS, dict(seed=-1), ValueError, "seed: expected an integer"),
        (ROWS, dict(step=2**32), ValueError, "step: expected an integer"),
        (ROWS, dict(stream=2**16), ValueError, "stream: expected an integer"),
        (ROWS.clone().requires_grad_(), {}, ValueError, "log_weights: expected tensors that need no gradient"),
        (ROWS.clone().requires_grad_(), dict(backend="reference"), ValueError, "log_weights: .* no gradient"),
        (ROWS, dict(backend="metal"), ValueError, "backend: expected one of"),
        (ROWS, dict(backend="triton"), RuntimeError, "triton has no kernel for resample"),
    ],
)
def test_resample_errors(log_weights, options, error, message):
    with pytest.raises(error, match=message):
        ops.resample(log_weights, **options)


def test_weights_that_require_a_gradient_are_drawn_from_without_one():
    weights = random_weights(2, 30)
    expected = ops.resample(weights, seed=1)
    with torch.no_grad():
        got = ops.resample(weights.clone().requires_grad_(), seed=1)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ancestors", "states", "error", "message"),
    [
        ([0], (), TypeError, "ancestors: expected an int32 or int64 tensor, got list"),
        (torch.zeros(2, 3), (), TypeError, "ancestors: .* got torch.float32"),
        (torch.zeros(1, 2, 3).int(), (), ValueError, r"ancestors: expected shape \[B, K\] or \[K\]"),
        (torch.zeros(2, 3).int(), (ROWS, [1]), TypeError, r"states\[1\]: expected a tensor, got list"),
        (
            torch.zeros(2, 3).int(),
            (ROWS, ROWS.T),
            ValueError,
            r"states\[1\]: expected shape \[2, 3\] \+ event",
        ),
        (torch.zeros(2, 3).int(), (ROWS.to("meta"),), ValueError, r"states\[0\]: .* on meta"),
        (torch.zeros(2, 3).int(), (ROWS.clone().requires_grad_(),), ValueError, "needs no gradient"),
        (torch.tensor([[0, 1, 3], [0, 0, 0]]), (ROWS,), ValueError, r"ancestors: .* \[0, 3\), got 3 at 2"),
        (torch.tensor([[0, 1, 2], [0, -1, 0]]), (ROWS,), ValueError, "ancestors: .* got -1 at 4"),
    ],
)
def test_gather_errors(ancestors, states, error, message):
    with pytest.raises(error, match=message):
        ops.gather_particles_(ancestors, *states)
