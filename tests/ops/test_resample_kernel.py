"""The resampling kernel against the reference, bit for bit, and against the distributions of the schemes."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from fastguide import ops, reference
from fastguide.ops import _native
from fastguide.ops._operation import explain
from fastguide.reference import SCHEMES

DTYPES = (torch.float32, torch.float64)
MARGIN = 64
# Sizes around a vector, a group of 16, a block of 1024, and 4096, up to which integer weights are kept.
SIZES = (1, 2, 3, 7, 16, 17, 1023, 1024, 1025, 2048, 2049, 4096, 4097)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
others = pytest.mark.parametrize("name", _native.instruction_sets()[1:])

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def kernel(
    log_weights: torch.Tensor,
    scheme: str = "systematic",
    *,
    num: int | None = None,
    ess_threshold: float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    first_row: int = 0,
    sorted: bool = True,
    threads: int = 1,
) -> Results:
    """The results. Every output is in the middle of a poisoned buffer, whose margins must not change."""
    rows, particles = log_weights.shape
    number = particles if num is None else num
    keep_from = math.inf if ess_threshold is None else float(ess_threshold * particles)
    before = log_weights.clone()
    buffers, outs = [], []
    for shape, dtype, poison in (
        ((rows, number), torch.int32, -7),
        ((rows, number), log_weights.dtype, -7.0),
        ((rows,), torch.float64, -7.0),
        ((rows,), torch.float64, -7.0),
    ):
        buffers.append(torch.full((math.prod(shape) + 2 * MARGIN,), poison, dtype=dtype))
        outs.append(buffers[-1][MARGIN:-MARGIN].view(shape))
    bad = _native.module("cpu").resample(
        log_weights.data_ptr(), _native.CPU_DTYPES[log_weights.dtype], rows, particles, number,
        SCHEMES.index(scheme), sorted, keep_from, seed, step, stream, first_row,
        *(out.data_ptr() for out in outs), threads,
    )  # fmt: skip
    for buffer in buffers:
        assert (buffer[:MARGIN] == -7).all() and (buffer[-MARGIN:] == -7).all()
    assert torch.equal(log_weights.nan_to_num(0.5), before.nan_to_num(0.5))
    unusable = outs[3].isnan().nonzero()
    assert bad == (int(unusable[0]) if len(unusable) else -1)
    return outs[0], outs[1], outs[2], outs[3]


def assert_same(got: Results, expected: Results) -> None:
    """Ancestors and effective sample sizes are equal to the last bit. The log of the mean weight may differ by an ulp
    of 21, its largest size."""
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[3].nan_to_num(-1.0), expected[3].nan_to_num(-1.0))
    torch.testing.assert_close(got[2], expected[2], rtol=2**-52, atol=2**-48, equal_nan=True)
    resolution = max(torch.finfo(got[1].dtype).eps, 2**-48)
    torch.testing.assert_close(got[1], expected[1], rtol=resolution, atol=resolution, equal_nan=True)


def assert_identical(got: Results, expected: Results) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def normal_weights(rows: int, particles: int, spread: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * particles + rows)
    return (spread * torch.randn(rows, particles, generator=generator, dtype=torch.float64)).to(dtype)


def half_dead(rows: int, particles: int, dtype: torch.dtype) -> torch.Tensor:
    """The first and the last quarter are dead, and about half of the rest, at random."""
    weights = normal_weights(rows, particles, 1.0, dtype)
    place = torch.arange(particles)
    dead = (place < particles // 4) | (place >= particles - particles // 4)
    dead = dead | (normal_weights(rows, particles, 1.0, dtype, seed=9) > 0)
    dead[:, particles // 2] = False
    return weights.masked_fill(dead, -math.inf)


def one_heavy(rows: int, particles: int, dtype: torch.dtype) -> torch.Tensor:
    """One particle, in a different place in each row, weighs as much as all others together."""
    weights = normal_weights(rows, particles, 0.1, dtype)
    place = (torch.arange(rows) * 37 + particles // 3) % particles
    weights[torch.arange(rows), place] = math.log(max(particles - 1, 1))
    return weights


KINDS = {
    "spread 1": lambda *shape: normal_weights(*shape[:2], 1.0, shape[2]),
    "spread 5": lambda *shape: normal_weights(*shape[:2], 5.0, shape[2]),
    "spread 10,000": lambda *shape: normal_weights(*shape[:2], 1e4, shape[2]),  # one particle has all the weight
    "equal": lambda rows, particles, dtype: torch.full((rows, particles), -3.0, dtype=dtype),
    "half dead": half_dead,
    "one heavy": one_heavy,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


# --- the reference's bits -----------------------------------------------------------------------------------


# Every kind of weights that may make a scheme fail: nearly equal, unequal, all on one, equal, many dead, half on one.
@every_scheme
@both_dtypes
@every_kind
def test_ancestors_are_the_references(scheme, dtype, kind):
    counter = dict(seed=0xFEDCBA9876543210, step=0xFFFFFFFE, stream=0xABCD)
    # Each size meets all six pairs of one row or several and three other numbers of slots: one pair for each kind.
    for turn, particles in enumerate(SIZES, start=list(KINDS).index(kind)):
        rows = (3 if particles > 100 else 64) if turn % 2 else 1
        weights = KINDS[kind](rows, particles, dtype)
        for num in (None, (1, particles // 3 + 1, 2 * particles + 5)[turn // 2 % 3]):
            expected = reference.resample(weights, scheme=scheme, num=num, **counter)
            assert_same(kernel(weights, scheme, num=num, **counter), expected)
        expected = reference.resample(weights, scheme=scheme, sorted=False, **counter)
        assert_same(kernel(weights, scheme, sorted=False, **counter), expected)


@every_scheme
@pytest.mark.parametrize(("rows", "particles"), ((3, 70_000), (1, 300_000)))
def test_long_rows_on_any_number_of_threads(scheme, rows, particles):
    for kind, dtype in (("spread 1", torch.float32), ("one heavy", torch.float64), ("half dead", torch.float32)):
        weights = KINDS[kind](rows, particles, dtype)
        for sorted in (True, False):
            one = kernel(weights, scheme, seed=4, sorted=sorted)
            assert_same(one, reference.resample(weights, scheme=scheme, seed=4, sorted=sorted))
            for threads in (2, 3):
                assert_identical(kernel(weights, scheme, seed=4, sorted=sorted, threads=threads), one)


@every_scheme
@pytest.mark.parametrize(("particles", "number"), ((3, 300_000), (300_000, 3), (1500, 100_000)))
def test_other_numbers_on_any_number_of_threads(scheme, particles, number):
    """Many slots for each particle, and many particles for each slot: the window of uniforms moves in both cases."""
    for kind in ("spread 1", "one heavy"):
        weights = KINDS[kind](2, particles, torch.float64)
        expected = reference.resample(weights, scheme=scheme, num=number, seed=5)
        for threads in (1, 2):
            assert_same(kernel(weights, scheme, num=number, seed=5, threads=threads), expected)


@every_scheme
@pytest.mark.parametrize("sorted", (True, False))
def test_many_rows_on_any_number_of_threads(scheme, sorted):
    weights = KINDS["spread 1"](64, 3000, torch.float64)
    options = dict(ess_threshold=0.4, seed=6, sorted=sorted)
    one = kernel(weights, scheme, **options)
    assert_same(one, reference.resample(weights, scheme=scheme, **options))
    assert 0 < int((one[3] < 0.4 * 3000).sum()) < 64
    for threads in (2, 3):
        assert_identical(kernel(weights, scheme, threads=threads, **options), one)


@others
@every_scheme
def test_every_instruction_set_gives_the_same_bits(name, scheme, instruction_set):
    for kind, make in KINDS.items():
        for rows, particles, num in ((2, 1, None), (33, 77, 80), (2, 1030, None), (1, 40_000, None), (2, 5, 9000)):
            for dtype in DTYPES:
                weights = make(rows, particles, dtype)
                for sorted in (True, False) if num is None else (True,):
                    best = kernel(weights, scheme, num=num, seed=8, sorted=sorted)
                    with instruction_set(name):
                        assert_identical(kernel(weights, scheme, num=num, seed=8, sorted=sorted), best), kind


@every_scheme
@both_dtypes
def test_thresholds_and_bad_rows(scheme, dtype):
    spreads = torch.tensor([0.0, 0.3, 1.0, 1.5, 3.0, 8.0]).repeat(2)[:, None]
    for particles in (1, 5, 50, 1030):
        weights = normal_weights(12, particles, 1.0, dtype) * spreads.to(dtype)
        weights[7, particles // 2] = math.nan
        weights[8, particles - 1] = math.inf
        weights[9] = -math.inf
        weights[10, 0], weights[10, -1] = math.nan, math.inf
        for threshold in (None, 0.0, 0.3, 0.7, 1.0):
            for sorted in (True, False):
                options = dict(ess_threshold=threshold, seed=1, sorted=sorted)
                got = kernel(weights, scheme, **options)
                assert_same(got, reference.resample(weights, scheme=scheme, **options))
                assert got[3].isnan().tolist() == [row in (7, 8, 9, 10) for row in range(12)]
        got = kernel(weights, scheme, num=particles + 1)
        assert_same(got, reference.resample(weights, scheme=scheme, num=particles + 1))
        assert (got[0][7:11] == 0).all() and got[1][7:11].isnan().all()


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_long_row_with_something_bad_anywhere(bad):
    for place in (0, 1, 15, 1023, 1024, 40_000, 69_999):
        weights = torch.full((1, 70_000), -math.inf)
        weights[0, 35_000] = 0.0
        weights[0, place] = bad
        _, after, mean, ess = kernel(weights, threads=2)
        if bad == -math.inf:
            assert float(ess) == 1.0 and float(mean) == math.log(1 / 70_000)
        else:
            assert ess.isnan() and mean.isnan() and torch.equal(after.nan_to_num(0.5), weights.nan_to_num(0.5))


def test_rows_are_counted_beyond_a_word_of_the_counter():
    """The uniforms of a row come from its own index, so rows with equal weights differ."""
    weights = torch.zeros(1, 100).expand(40, -1).contiguous()
    ancestors = kernel(weights, "multinomial")[0]
    assert len({tuple(row) for row in ancestors.tolist()}) == 40


# --- exact offspring ----------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("kind", ("spread 1", "spread 5", "half dead", "one heavy"))
def test_offspring_in_exact_integers(dtype, kind):
    """Offspring against N w_k. Systematic: floor or ceil. Residual: at least floor. Stratified: between floor - 1 and
    floor + 2, as for the strata of an interval."""
    for particles, number in ((2049, 2049), (2049, 100), (50, 30_000)):
        weights = KINDS[kind](1, particles, dtype)
        integers = reference.integer_weights(weights)[0][0].tolist()
        total = sum(integers)
        floors, rests = zip(*(divmod(number * q, total) for q in integers), strict=True)
        floors, rests = np.array(floors), np.array([rest > 0 for rest in rests])
        for scheme in SCHEMES:
            ancestors = kernel(weights, scheme, num=number, seed=2)[0][0].numpy()
            assert (np.diff(ancestors) >= 0).all()
            counts = np.bincount(ancestors, minlength=particles)
            assert counts.sum() == number and (counts[np.array(integers) == 0] == 0).all()
            if scheme == "systematic":
                assert ((counts >= floors) & (counts <= floors + rests)).all()
            elif scheme == "stratified":
                assert ((counts >= floors - 1) & (counts <= floors + 2)).all()
            elif scheme == "residual":
                assert (counts >= floors).all()


def test_survivors_stay_and_spares_fill_the_dead_slots():
    for particles in (3, 16, 1000, 5000, 70_000):
        weights = KINDS["spread 1"](1, particles, torch.float32)
        for scheme in SCHEMES:
            ordered = kernel(weights, scheme, seed=3)[0][0]
            placed = kernel(weights, scheme, seed=3, sorted=False)[0][0]
            assert torch.equal(placed.sort().values, ordered)
            alive = torch.bincount(ordered, minlength=particles) > 0
            assert torch.equal(placed[alive], torch.arange(particles).int()[alive])
            assert (placed[~alive].diff() >= 0).all()


# --- laws ---------------------------------------------------------------------------------------------------

SHARES = np.array([0.02, 0.3, 0.0, 0.11, 0.05, 0.27, 0.15, 0.1])


def offspring(scheme: str, number: int, rows: int = 40_000) -> np.ndarray:
    """The numbers of offspring of particles with the weights SHARES, ``[rows, 8]``."""
    weights = torch.log(torch.from_numpy(SHARES)).expand(rows, -1).contiguous()
    ancestors = kernel(weights, scheme, num=number, seed=17)[0].long()
    return torch.zeros(rows, 8, dtype=torch.int64).scatter_add_(1, ancestors, torch.ones_like(ancestors)).numpy()


@pytest.mark.parametrize("number", (1, 2, 9, 41))
def test_multinomial_offspring_are_binomial(number):
    counts = offspring("multinomial", number)
    rows = len(counts)
    for k, share in enumerate(SHARES):
        law = scipy.stats.binom(number, share)
        values = np.arange(number + 1)
        expected = law.pmf(values) * rows
        kept = expected >= 5  # the chi-squared test takes the rest together
        observed = np.bincount(counts[:, k], minlength=number + 1)
        pairs = [(observed[kept], expected[kept])]
        if (rest := expected[~kept].sum()) > 1:
            pairs.append((observed[~kept].sum(keepdims=True), np.array([rest])))
        else:
            assert observed[~kept].sum() <= 10
        o, e = (np.concatenate(part) for part in zip(*pairs, strict=True))
        statistic = ((o - e) ** 2 / e).sum()
        assert scipy.stats.chi2.sf(statistic, max(len(e) - 1, 1)) > 1e-4, (k, statistic)
    covariance = np.cov(counts.T)
    exact = number * (np.diag(SHARES) - np.outer(SHARES, SHARES))
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact))) + 1e-9
    assert (np.abs(covariance - exact) / scale).max() < 6 / math.sqrt(rows) * (1 + 1 / math.sqrt(number * 0.02))


@pytest.mark.parametrize("number", (1, 2, 9, 41))
def test_residual_offspring_are_multinomial_in_the_remainders(number):
    counts = offspring("residual", number)
    rows = len(counts)
    copies = np.floor(number * SHARES + 1e-12)
    remainders = number * SHARES - copies
    left = number - copies.sum()
    rest = counts - copies
    assert rest.min() >= 0 and (rest.sum(1) == left).all()
    shares = remainders / left
    variance = left * shares * (1 - shares)
    np.testing.assert_allclose(rest.mean(0), remainders, atol=5 * math.sqrt(variance.max() / rows))
    np.testing.assert_allclose(rest.var(0), variance, atol=0.03 * left)
    covariance = np.cov(rest.T)
    exact = left * (np.diag(shares) - np.outer(shares, shares))
    np.testing.assert_allclose(covariance, exact, atol=0.03 * left)


@pytest.mark.parametrize("number", (1, 2, 9, 41))
def test_stratified_offspring_have_a_bernoulli_for_each_stratum(number):
    """A count is a sum of independent Bernoulli variables, one for each stratum. The probability is the overlap of the
    stratum with the particle."""
    counts = offspring("stratified", number)
    ends = np.minimum(np.cumsum(SHARES), 1.0) * number
    strata = np.arange(number)[:, None]
    starts = np.concatenate([[0.0], ends[:-1]])
    overlap = np.clip(np.minimum(ends, strata + 1) - np.maximum(starts, strata), 0.0, 1.0)  # [number, 8]
    variance = (overlap * (1 - overlap)).sum(0)
    rows = len(counts)
    np.testing.assert_allclose(counts.mean(0), overlap.sum(0), atol=5 * math.sqrt(variance.max() / rows))
    np.testing.assert_allclose(counts.var(0), variance, atol=0.02)


@pytest.mark.parametrize("number", (1, 2, 9, 41))
def test_systematic_offspring_share_one_uniform(number):
    counts = offspring("systematic", number)
    floors = np.floor(number * SHARES + 1e-12)
    more = counts - floors
    assert ((more == 0) | (more == 1)).all()
    chance = number * SHARES - floors
    np.testing.assert_allclose(more.mean(0), chance, atol=5 * 0.5 / math.sqrt(len(counts)))


@pytest.mark.parametrize("number", (3, 1000))
def test_multinomial_slots_are_order_statistics(number):
    """With 10^5 equal particles the ancestor of slot i of N shows the i-th of N sorted uniforms: Beta(i, N + 1 - i)."""
    particles, rows = 100_000, 300
    slots = [kernel(torch.zeros(1, particles), "multinomial", num=number, seed=seed)[0][0] for seed in range(rows)]
    u = (torch.stack(slots).double().numpy() + 0.5) / particles
    for i in (1, (number + 1) // 2, number):
        assert scipy.stats.kstest(u[:, i - 1], scipy.stats.beta(i, number + 1 - i).cdf).pvalue > 1e-3


# --- mean weight and effective sample size ------------------------------------------------------------------

# Errors against mpmath, 20 rows each, in units of 2^-53: relative errors of the ESS, and errors of the log of the mean
# weight divided by max(1, its size). For large sets they come from the rounding to integers, about sqrt(K) 2^-S of a
# sum that is at least 1.
#
#              spread 0.1     1          5            50           10,000
#   K = 7      2.4, 1.0       2.7, 1.8   2.3, 1.2     1.9, 0.8     0.0, 0.8
#   K = 1000   2.6, 1.3       6.7, 2.6   61, 2.4      8.3, 0.8     0.2, 0.1
#   K = 20000  1.6, 0.9       100, 9.6   14000, 44    195, 0.7     0.0, 0.8


@both_dtypes
@pytest.mark.parametrize("spread", (0.1, 1.0, 5.0, 50.0, 1e4))
def test_ess_and_mean_weight_are_the_exact_ones(dtype, spread):
    for particles in (1, 7, 1500):  # 1500 is two blocks
        weights = normal_weights(2, particles, spread, dtype)
        _, _, means, sizes = kernel(weights)
        rounding = particles * 2.0 ** -(62 - max(particles - 1, 0).bit_length())
        for row, mean, size in zip(weights.double().tolist(), means.tolist(), sizes.tolist(), strict=True):
            with mpmath.workdps(40):
                top = max(row)
                w = mpmath.fsum(mpmath.exp(mpmath.mpf(value) - top) for value in row)
                v = mpmath.fsum(mpmath.exp(2 * (mpmath.mpf(value) - top)) for value in row)
                exact = top + mpmath.log(w / particles)
                assert abs(mean - exact) <= 4 * 2**-53 * max(1, abs(exact)) + rounding
                assert abs(size - w * w / v) <= (10 * 2**-53 + 4 * rounding) * w * w / v


# --- through the public function ----------------------------------------------------------------------------


@every_scheme
@both_dtypes
def test_the_public_function_takes_it(scheme, dtype):
    weights = normal_weights(5, 300, 1.0, dtype)
    for options in ({}, dict(num=7), dict(ess_threshold=0.37), dict(sorted=False, step=3, stream=2, seed=2**64 - 1)):
        expected = ops.resample(weights, scheme=scheme, backend="reference", **options)
        for got in (
            ops.resample(weights, scheme=scheme, **options),
            ops.resample(weights, scheme=scheme, backend="cpu", **options),
            ops.resample(weights.T.contiguous().T, scheme=scheme, **options),
            ops.resample(torch.nn.Parameter(weights, requires_grad=False), scheme=scheme, **options),
        ):
            assert_same(got, expected)
            assert all(out.is_contiguous() and not out.requires_grad for out in got)
        alone = ops.resample(weights[0], scheme=scheme, **options)
        assert [out.shape for out in alone] == [out[0].shape for out in expected]
        assert_same(tuple(out[None] for out in alone), tuple(out[:1] for out in expected))


def test_no_rows():
    for num in (None, 5):
        got = ops.resample(torch.empty(0, 3), num=num, backend="cpu")
        assert [tuple(out.shape) for out in got] == [(0, num or 3), (0, num or 3), (0,), (0,)]


def test_auto_takes_the_kernel_and_2_to_the_31_particles_the_reference():
    assert explain("resample", "cpu", torch.float64).splitlines()[0].endswith(": cpu")
    many = torch.zeros(1).expand(1 << 31)
    with pytest.raises(RuntimeError, match="cpu counts particles in 31 bits, and there are 2147483648"):
        ops.resample(many, backend="cpu")


@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
def test_bad_rows_are_named_by_every_backend(backend):
    weights = torch.zeros(3, 4)
    for value, what in ((math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no live particle")):
        weights[1] = value
        for num in (None, 6):
            with pytest.raises(ValueError, match=f"log_weights: .*got {what}.* in row 1"):
                ops.resample(weights, num=num, backend=backend)
        assert ops.resample(weights, check=False, backend=backend)[3].isnan().tolist() == [False, True, False]


def test_what_the_binding_refuses():
    valid = [0, 3, 0, 4, 4, 0, True, math.inf, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    for place, value, error in (
        (1, 1, ValueError),  # float16
        (1, 4, ValueError),
        (2, 1, ValueError),  # one row, but null pointers
        (3, 0, ValueError),
        (3, (1 << 31) + 1, ValueError),
        (4, 0, ValueError),
        (5, 4, ValueError),
        (6, 1, TypeError),
        (7, 1, TypeError),
        (8, True, TypeError),
        (8, 1 << 64, OverflowError),
        (9, 1 << 32, ValueError),
        (10, 1 << 16, ValueError),
        (10, 1.0, TypeError),
        (11, (1 << 48) + 1, ValueError),
    ):
        with pytest.raises(error):
            _native.module("cpu").resample(*valid[:place], value, *valid[place + 1 :])
    with pytest.raises(TypeError, match="expected 17 arguments, got 16"):
        _native.module("cpu").resample(*valid[1:])
