"""The randn kernels against float64 arithmetic that is written here from the contract in csrc/common/philox.h."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastguide.doctor import KNOWN_ANSWERS
from fastguide.ops import _native

# Elements of a particle: 1 and 2 have their own loops; part of a group of four, one group, two, four, five groups;
# particles that are made one by one.
ELEMENTS = (1, 2, 3, 4, 5, 16, 17, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# --- the contract, in numpy ---------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 on uint64 arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k0), p1 & mask, (p0 >> shift) ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def normals(words):
    """Float64 normals from words [..., 2] (radius, angle). Near pi/2 numpy's cosine has only absolute accuracy, so the
    quadrant is subtracted first, in integers."""
    words = np.asarray(words, dtype=np.int64)
    r = np.sqrt(-2.0 * np.log((words[..., 0] + 1) * 2.0**-32))
    quadrant = (words[..., 1] + 2**29) // 2**30
    angle = (words[..., 1] - quadrant * 2**30) * (math.pi / 2**31)
    c, s = np.cos(angle), np.sin(angle)
    cos = np.choose(quadrant % 4, [c, -s, -c, s])
    sin = np.choose(quadrant % 4, [s, c, -s, -c])
    return np.stack([r * cos, r * sin], axis=-1)


def exact(particles, elements, seed, step, stream, first_particle):
    groups = (elements + 3) // 4
    p = np.arange(first_particle, first_particle + particles, dtype=np.uint64)[:, None]
    g = np.arange(groups, dtype=np.uint64)[None, :]
    zero = np.zeros((particles, groups), dtype=np.uint64)
    high = (p >> np.uint64(32)) | np.uint64(stream << 16)
    words = philox(
        (g + zero, (p & np.uint64(0xFFFFFFFF)) + zero, high + zero, zero + np.uint64(step)),
        (seed % 2**32, seed >> 32),
    )
    pairs = np.stack(words, axis=-1).reshape(particles, groups, 2, 2)
    return normals(pairs).reshape(particles, 4 * groups)[:, :elements]


def ulps(value, true):
    """The distance in float32 units in the last place of ``true``."""
    true = np.asarray(true, dtype=np.float64)
    unit = np.exp2(np.floor(np.log2(np.where(true == 0.0, 1.0, np.abs(true)))) - 23)
    return np.where(true == 0.0, np.where(np.asarray(value) == 0.0, 0.0, np.inf), np.abs(value - true) / unit)


def cpu(particles, elements, dtype=torch.float32, *, seed=0, step=0, stream=0, first_particle=0, threads=2):
    """randn, written into the middle of a poisoned buffer. The margins must not change."""
    margin = 64
    size = particles * elements
    buffer = torch.full((size + 2 * margin,), math.nan, dtype=dtype)
    out = buffer[margin : margin + size]
    code = _native.CPU_DTYPES[dtype]
    _native.module("cpu").randn(out.data_ptr(), code, particles, elements, seed, step, stream, first_particle, threads)
    assert buffer[:margin].isnan().all() and buffer[margin + size :].isnan().all()
    assert not out.isnan().any()
    return out.clone().reshape(particles, elements)


# --- integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert _native.module("cpu").philox(counter, key) == expected
    assert tuple(int(word) for word in philox(counter, key)) == expected


# --- values -------------------------------------------------------------------------------------------------

COUNTERS = dict(seed=0xFEDCBA9876543210, step=0xFFFFFFFE, stream=0xABCD, first_particle=2**32 - 2)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_float32_within_4_ulp(elements):
    for particles in (0, 1, 3, 257):
        z = cpu(particles, elements, **COUNTERS).double().numpy()
        assert ulps(z, exact(particles, elements, **COUNTERS)).max(initial=0.0) <= 4.0


@pytest.mark.parametrize("elements", ELEMENTS)
def test_float64_is_the_exact_value(elements):
    z = cpu(257, elements, torch.float64, **COUNTERS).numpy()
    np.testing.assert_allclose(z, exact(257, elements, **COUNTERS), rtol=4e-15, atol=0.0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("elements", ELEMENTS)
def test_narrow_dtypes_are_the_rounded_float32(dtype, elements):
    particles = 4 + 200_000 // elements
    narrow = cpu(particles, elements, dtype, **COUNTERS)
    assert torch.equal(narrow.view(torch.int16), cpu(particles, elements, **COUNTERS).to(dtype).view(torch.int16))


def edge_words():
    """Radius words at both ends, and around each power of two; angle words around every eighth of a turn."""
    powers = [2**k + d for k in range(33) for d in (-2, -1, 0, 1)]
    near_one = [2**32 - w for w in range(1, 5000)]
    radii = sorted({w for w in [*powers, *range(5000), *near_one] if 0 <= w < 2**32})
    offsets = [s * d for d in [*range(300), *(2**k + e for k in range(8, 30) for e in (-1, 0, 1))] for s in (-1, 1)]
    angles = sorted({(eighth * 2**29 + d) % 2**32 for eighth in range(8) for d in offsets})
    return np.array(radii, dtype=np.uint32), np.array(angles, dtype=np.uint32)


def kernel_normals(words):
    words = np.ascontiguousarray(words, dtype=np.uint32)
    out = np.full(words.shape, np.nan, dtype=np.float32)
    _native.module("cpu").normals(words.ctypes.data, out.ctypes.data, words.size // 2)
    return out


def test_tails_and_zeros_within_4_ulp():
    radii, angles = edge_words()
    rng = np.random.default_rng(0)
    # Every edge radius with random and edge angles, and every edge angle with random and edge radii.
    words = np.concatenate(
        [
            np.stack(pair, axis=-1)
            for pair in (
                (radii, rng.choice(angles, radii.size)),
                (rng.choice(radii, angles.size), angles),
                (radii, rng.integers(0, 2**32, radii.size, dtype=np.uint32)),
                (rng.integers(0, 2**32, angles.size, dtype=np.uint32), angles),
                (rng.choice(radii, 1_000_000), rng.choice(angles, 1_000_000)),
                tuple(rng.integers(0, 2**32, (2, 1_000_000), dtype=np.uint32)),
            )
        ]
    )
    assert ulps(kernel_normals(words).astype(np.float64), normals(words)).max() <= 4.0


def test_extreme_words():
    z = kernel_normals([[0, 0], [0xFFFFFFFF, 12345], [0, 2**30], [2**31 - 1, 2**29]])
    assert ulps(float(z[0, 0]), math.sqrt(64 * math.log(2))) <= 4 and z[0, 1] == 0.0  # the largest value is 6.66
    assert (z[1] == 0.0).all()  # u = 1
    assert z[2, 0] == 0.0 and z[2, 1] == z[0, 0]  # the cosine of a quarter turn is 0
    np.testing.assert_allclose(z[3], math.sqrt(math.log(2)), rtol=2e-7)  # u = 1/2 at an eighth


# --- layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", ELEMENTS)
def test_a_slice_of_the_particles_is_that_slice(elements):
    for dtype, (first, count) in itertools.product(DTYPES, ((0, 1), (1, 3), (100, 157), (256, 1))):
        whole = cpu(257, elements, dtype, seed=3, step=1, stream=2, first_particle=100)
        part = cpu(count, elements, dtype, seed=3, step=1, stream=2, first_particle=100 + first)
        assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("elements", (4, 17))
def test_every_counter_matters(elements):
    base = dict(seed=5, step=6, stream=7, first_particle=8)
    draws = [cpu(1, elements, **base)]
    for name, change in (("seed", 1 << 40), ("step", 1), ("stream", 1), ("first_particle", 1 << 32)):
        draws.append(cpu(1, elements, **(base | {name: base[name] + change})))
    assert len({tuple(z.flatten().tolist()) for z in draws}) == len(draws)


@pytest.mark.parametrize(
    ("particles", "elements"),
    ((1, 1_000_001), (200_003, 1), (200_000, 4), (1001, 1000), (997, 1003), (3, 100_003)),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads_give_the_same_bits(particles, elements, dtype):
    one, *others = (cpu(particles, elements, dtype, seed=9, threads=threads) for threads in (1, 2, 3))
    assert all(torch.equal(one, other) for other in others)


def test_last_particles_and_bounds():
    top = 2**48
    z = cpu(2, 5, first_particle=top - 2).double().numpy()
    assert ulps(z, exact(2, 5, 0, 0, 0, top - 2)).max() <= 4.0
    valid = dict(out=0, dtype=0, particles=1, elements=1, seed=0, step=0, stream=0, first_particle=0, threads=1)
    for name, value in (
        ("first_particle", top),
        ("particles", top + 1),
        ("elements", 2**34 + 1),
        ("step", 2**32),
        ("stream", 2**16),
        ("dtype", 4),
    ):
        with pytest.raises(ValueError, match=name):
            _native.module("cpu").randn(*(valid | {name: value}).values())


# --- distribution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ((1, 1_000_000), (1_000_000, 1)))
def test_a_million_normals_are_normal(layout):
    z = cpu(*layout, seed=2024).double().flatten().numpy()
    n = z.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    stats = pytest.importorskip("scipy.stats")  # missing where benchmarks/gpu.sh runs
    assert abs(stats.skew(z)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for lag in (1, 2, 3, 4, 1000):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)


# --- instruction sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _native.instruction_sets()[1:])
@pytest.mark.parametrize("elements", (*ELEMENTS, 2048, 5000))  # also a tile, and more than two tiles
def test_every_instruction_set_gives_the_same_bits(name, elements, instruction_set):
    best = {dtype: cpu(67, elements, dtype, **COUNTERS) for dtype in DTYPES}
    with instruction_set(name):
        for dtype, z in best.items():
            assert torch.equal(cpu(67, elements, dtype, **COUNTERS).view(torch.uint8), z.view(torch.uint8))


def test_an_instruction_set_that_is_not_there():
    words = f"isa: expected one of {', '.join(_native.instruction_sets())}.*, got 'mmx'"
    with pytest.raises(ValueError, match=words), _native.instruction_set("mmx"):
        pass
