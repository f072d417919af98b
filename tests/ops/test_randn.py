"""`randn`: known answers, what a value depends on, agreement of the backends, the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastguide import ops, reference
from fastguide.ops._operation import backends
from fastguide.ops.randn.reference import _box_muller

pytestmark = pytest.mark.filterwarnings("error")

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(bool(backends()[name].reason), reason=backends()[name].reason),
    )
    for name in ("reference", "cpu")
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASK = 0xFFFFFFFF


def test_memory_is_poisoned():
    """The fixture of conftest.py works. Without it, other tests would not see an element that nobody wrote."""
    for dtype in FLOATS:
        like = torch.zeros(3, dtype=dtype)
        for memory in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)):
            assert torch.isnan(memory).all()
    for dtype in (torch.int32, torch.int64):
        like = torch.zeros(3, dtype=dtype)
        for memory in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)):
            assert (memory == torch.iinfo(dtype).max).all()


# --- the integers -------------------------------------------------------------------------------------------


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


KNOWN = [  # Random123's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    got = reference.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words
    assert philox_by_hand(counter, key) == words


def normals_by_hand(particles, elements, *, seed=0, step=0, stream=0, first_particle=0) -> np.ndarray:
    """float64 normals from the contract: counters in Python integers, Box-Muller as in textbooks."""
    out = np.empty((particles, (elements + 3) // 4 * 4))
    for row in range(particles):
        particle = first_particle + row
        for group in range((elements + 3) // 4):
            counter = (group, particle & MASK, (particle >> 32) | stream << 16, step)
            w = philox_by_hand(counter, (seed & MASK, seed >> 32))
            for pair in (0, 2):
                radius = math.sqrt(-2.0 * math.log((w[pair] + 1) / 2**32))
                angle = 2.0 * math.pi * w[pair + 1] / 2**32
                out[row, 4 * group + pair] = radius * math.cos(angle)
                out[row, 4 * group + pair + 1] = radius * math.sin(angle)
    return out[:, :elements]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "counter",
    [
        dict(),
        dict(seed=1, step=2, stream=3, first_particle=4),
        dict(seed=2**64 - 1, step=2**32 - 1, stream=2**16 - 1, first_particle=2**48 - 3),
        dict(seed=2**63, step=2**31, stream=2**15, first_particle=2**32 - 1),  # the particle passes 2^32
        dict(seed=0xDEADBEEF << 32 | 0x12345678, first_particle=2**31 - 1),
    ],
)
def test_values_from_the_contract(backend, counter):
    expected = normals_by_hand(3, 7, **counter)
    counter = {"seed": 0, **counter}
    double = ops.randn((3, 7), dtype=torch.float64, backend=backend, **counter)
    np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-14)
    single = ops.randn((3, 7), backend=backend, **counter)
    np.testing.assert_allclose(single.numpy(), expected, rtol=4 * 2**-23, atol=1e-14)


# --- what a value depends on --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_depends_on_its_own_place_alone(backend, dtype):
    counter = dict(seed=11, step=5, stream=2, dtype=dtype, backend=backend)
    whole = ops.randn((37, 53), **counter)
    assert torch.isfinite(whole).all()
    for first, count in ((0, 1), (1, 3), (5, 32), (36, 1)):
        assert torch.equal(ops.randn((count, 53), first_particle=first, **counter), whole[first : first + count])
    for elements in (1, 2, 3, 4, 5, 8, 52):
        assert torch.equal(ops.randn((37, elements), **counter), whole[:, :elements])
    assert torch.equal(ops.randn((37, 1, 53, 1), **counter).reshape(37, 53), whole)
    assert torch.equal(ops.randn((37,), **counter), whole[:, 0])
    halves = [ops.randn((n, 53), first_particle=f, **counter) for f, n in ((0, 20), (20, 17))]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_index_changes_every_value(backend):
    base = dict(seed=1, step=1, stream=1, first_particle=1, backend=backend)
    z = ops.randn((8, 64), **base)
    for name, values in (
        ("seed", (0, 2, 1 + 2**32, 2**64 - 1)),
        ("step", (0, 2, 1 + 2**16, 2**32 - 1)),
        ("stream", (0, 2, 2**16 - 1)),
        ("first_particle", (9, 1 + 2**16, 1 + 2**32, 2**48 - 8)),
    ):
        for value in values:
            assert not (ops.randn((8, 64), **{**base, name: value}) == z).any(), (name, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4), (1,), (1, 1), (2, 3, 5, 7), (5, 1001)])
def test_odd_shapes_are_filled(backend, shape):
    expected = reference.randn((shape[0], max(math.prod(shape[1:]), 1)), seed=3, dtype=torch.float64)
    expected = expected[:, : math.prod(shape[1:])].reshape(shape)
    for dtype in FLOATS:
        z = ops.randn(shape, seed=3, dtype=dtype, backend=backend)
        assert z.shape == shape and z.dtype == dtype and z.is_contiguous()
        torch.testing.assert_close(z.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bits_do_not_depend_on_the_threads(backend, dtype, threads):
    # enough elements for a second thread, and not a multiple of a group
    with threads(1):
        one = ops.randn((3, 30_003), seed=4, dtype=dtype, backend=backend)
    with threads(2):
        two = ops.randn((3, 30_003), seed=4, dtype=dtype, backend=backend)
    assert torch.equal(one, two)


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_between_the_dtypes(backend):
    double, single, half, bfloat = (
        ops.randn((200, 501), seed=6, dtype=dtype, backend=backend)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    )
    assert torch.equal(half, single.half()) and torch.equal(bfloat, single.bfloat16())
    torch.testing.assert_close(single.double(), double, rtol=4 * 2**-23, atol=0)
    if backend == "reference":
        assert torch.equal(single, double.float())
    assert not torch.equal(double, single.double())  # float64 is more than widened float32


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance between elements of two tensors, counted in float32 values."""
    ordered = [torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (t.view(torch.int32).long() for t in (a, b))]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree_within_four_ulps(backend):
    """Two times 300,000 values. The largest distance found was 3."""
    shape = (150, 2003)
    for seed in (0, 2**64 - 1):
        expected = ops.randn(shape, seed=seed, backend="reference")
        assert ulps(ops.randn(shape, seed=seed, backend=backend), expected) <= 4


def test_box_muller_at_the_edges():
    words = torch.tensor([0, 0, 0, 0, MASK, 0], dtype=torch.int64)
    turns = torch.tensor([0, 1 << 30, 2 << 30, 3 << 30, 5, 1], dtype=torch.int64)
    z0, z1 = _box_muller(words, turns)
    largest = math.sqrt(64 * math.log(2))  # 6.66
    expected0 = torch.tensor([largest, 0, -largest, 0, 0, largest], dtype=torch.float64)
    expected1 = torch.tensor([0, largest, 0, -largest, 0, largest * 2 * math.pi / 2**32], dtype=torch.float64)
    torch.testing.assert_close(z0, expected0, rtol=1e-15, atol=0)
    torch.testing.assert_close(z1, expected1, rtol=1e-15, atol=0)


# --- the distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_and_kolmogorov_smirnov(backend):
    z = ops.randn((500, 1000), seed=2026, dtype=torch.float64, backend=backend).flatten()
    n = z.numel()
    # power: the moment, and the variance of one sample of it
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0), 6: (15.0, 10170.0)}
    for power, (value, variance) in moments.items():
        error = float((z**power).mean()) - value
        assert abs(error) < 4 * math.sqrt(variance / n), power
    assert scipy.stats.kstest(z[:200_000].numpy(), "norm").pvalue > 0.01
    radius2 = (z[0::2] ** 2 + z[1::2] ** 2)[:100_000]  # for a pair it is exponential with mean 2; the angle is uniform
    assert scipy.stats.kstest(radius2.numpy(), "expon", args=(0, 2)).pvalue > 0.01
    turn = torch.atan2(z[1::2], z[0::2])[:100_000] / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(turn.numpy(), "uniform").pvalue > 0.01


def test_tails():
    z = ops.randn((2000, 4000), seed=9).abs()
    n = z.numel()
    for threshold in (3.0, 4.0, 4.5, 5.0):
        p = math.erfc(threshold / math.sqrt(2))
        count = int((z > threshold).sum())
        assert abs(count - n * p) < 4 * math.sqrt(n * p) + 1, threshold
    assert 4.9 < float(z.max()) < 6.67


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_are_uncorrelated(backend):
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float((a * b).mean())) * math.sqrt(a.numel())  # in standard errors

    base = dict(seed=1, step=7, stream=3, first_particle=100, dtype=torch.float64, backend=backend)
    others = (("step", 8), ("stream", 4), ("seed", 2), ("seed", 1 + 2**32), ("first_particle", 500))
    shape = (200, 500)
    z = ops.randn(shape, **base)
    checked = {f"element + {lag}": (z[:, :-lag], z[:, lag:]) for lag in (1, 2, 3, 4, 5, 8)}
    checked |= {f"particle + {lag}": (z[:-lag], z[lag:]) for lag in (1, 2, 3, 4)}
    checked |= {f"{name} {value}": (z, ops.randn(shape, **{**base, name: value})) for name, value in others}
    checked["step against stream"] = z, ops.randn(shape, **{**base, "step": 3, "stream": 7})
    for name, (a, b) in checked.items():
        assert correlation(a, b) < 4, name
        assert correlation(a**2 - 1, b**2 - 1) < 2 * 4, name  # each has variance 2


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(shape=()), ValueError, r"shape: expected \[N, \*event\], got \[\]"),
        (dict(shape=(2, -1)), ValueError, r"shape: expected"),
        (dict(seed=-1), ValueError, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        (dict(seed=2**64), ValueError, r"seed: expected"),
        (dict(seed=1.0), ValueError, r"seed: expected an integer .* got 1\.0"),
        (dict(step=2**32), ValueError, r"step: expected"),
        (dict(step=-1), ValueError, r"step: expected"),
        (dict(stream=2**16), ValueError, r"stream: expected"),
        (dict(first_particle=2**48), ValueError, r"first_particle: expected"),
        (dict(first_particle=2**48 - 1), ValueError, r"shape: expected particles below 2\^48"),
        (dict(shape=(1, 2**34 + 1)), ValueError, r"shape: .* at most 2\^34 elements"),
        (dict(dtype=torch.int32), TypeError, r"dtype: expected one of float32"),
        (dict(backend="fast"), ValueError, r"backend: expected one of"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.randn(**{"shape": (2, 3), "seed": 0, **changes})
