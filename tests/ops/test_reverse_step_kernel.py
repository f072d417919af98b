"""The cpu kernel of `reverse_step`. It has the bits of the reference's formula with fused multiply-adds and the
kernel's own normals. Its error is bounded against the reference in float64. No result depends on threads, instruction
set or addresses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastguide import ops, reference
from fastguide.ops import DynamicThreshold, _arguments, _native
from fastguide.ops.reverse_step.reference import multipliers as multipliers_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VP = (0.6, 0.8, 0.8, 0.6, 0.35)
STILL = (0.6, 0.8, 0.8, 0.6, 0.0)
COUNTER = dict(seed=2**64 - 3, step=2**32 - 2, stream=7, first_particle=2**32 - 2)


def inputs(particles: int, elements: int, dtypes=(torch.float32,) * 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, particles, elements, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=False)]


def per_sample(particles: int, rows=(VP, STILL, (0.5, 0.7, 0.9, 0.3, 0.3))) -> tuple[torch.Tensor, ...]:
    """Coefficients for each particle, which repeat ``rows``. Every third particle gets no noise."""
    chosen = [rows[n % len(rows)] for n in range(particles)] or [VP][:0]
    return tuple(torch.tensor([row[i] for row in chosen], dtype=torch.float64) for i in range(5))


def kernel(x, output, coefficients, *, prediction="epsilon", unconditional=None, guidance_scale=1.0, clip=None,
           clip_noise=True, displacement=None, threads=1, offset=64,
           seed=0, step=0, stream=0, first_particle=0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x_s and x0, written into the middle of poisoned buffers. The margins must not change."""
    particles, elements = x.shape
    levels, table = _arguments.scalars(coefficients, x, "sample")
    bounds = _arguments.clip(clip)
    buffers, results = [], []
    for shift in (0, offset - 64):
        buffer = torch.full((x.numel() + 128 + shift,), 0x5A, dtype=torch.uint8).repeat_interleave(x.element_size())
        buffers.append(buffer)
        results.append(buffer.view(x.dtype)[64 + shift : 64 + shift + x.numel()])
    code = _native.CPU_DTYPES
    _native.module("cpu").reverse_step(
        x.data_ptr(), code[x.dtype], output.data_ptr(), code[output.dtype],
        None if displacement is None else displacement.data_ptr(),
        0 if displacement is None else code[displacement.dtype],
        results[0].data_ptr(), results[1].data_ptr(), True, None, reference.PREDICTIONS.index(prediction),
        None if unconditional is None else unconditional.data_ptr(),
        0 if unconditional is None else code[unconditional.dtype],
        guidance_scale if isinstance(guidance_scale, float) else guidance_scale.data_ptr(),
        len(bounds) and len(bounds) - 1, *(bounds[:2] or (0.0, 0.0)), clip_noise,
        table.data_ptr() if levels == () else levels,
        1.0,
        (particles, elements), seed, step, stream, first_particle, threads,
    )  # fmt: skip
    for buffer, result in zip(buffers, results, strict=True):
        before = result.data_ptr() - buffer.data_ptr()
        assert (buffer[:before] == 0x5A).all() and (buffer[before + result.numel() * x.element_size() :] == 0x5A).all()
    return results[0].clone().reshape(x.shape), results[1].clone().reshape(x.shape)


def assert_same(got, expected) -> None:
    """Equal values. Zeros may have either sign; NaN equals NaN."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def fused(a, b, c):
    """a * b + c as in the kernel. float32 is rounded once, as the product is exact in float64; float64 is rounded
    twice."""
    return (a.double() * b.double() + c.double()).to(c.dtype)


def expected_of(
    x, output, coefficients, *, prediction="epsilon", unconditional=None, guidance_scale=1.0, clip=None,
    clip_noise=True, displacement=None, **counter
):  # fmt: skip
    """x_s and x0 by the same operations as in the kernel."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state, out = x.to(dtype), output.to(dtype)
    if unconditional is not None:
        base = unconditional.to(dtype)
        out = fused(torch.as_tensor(guidance_scale, dtype=dtype).reshape(-1, 1), out - base, base)
    multipliers = multipliers_of(state, coefficients, prediction, clip_noise)
    p, q, a, b, tau, c = (torch.as_tensor(m, dtype=dtype) for m in multipliers)
    unclipped = out if prediction == "sample" else fused(q, out, p * state)
    x0 = reference.clip_x0(unclipped, clip)
    x_s = fused(b, x0, a * state)
    if not clip_noise:
        x_s = fused(c, unclipped, x_s)
    if displacement is not None:
        x_s = x_s + displacement.to(dtype)
    if (tau != 0).any():
        z = ops.randn(x.shape, dtype=dtype, backend="cpu", **{"seed": 0, **counter})
        x_s = torch.where(tau != 0, fused(tau, z, x_s), x_s)
    return x_s.to(x.dtype), x0.to(x.dtype)


# --- the formula's bits -----------------------------------------------------------------------------------


# Elements of a particle. 1 and 2 have their own loops. Then part of a group of four normals, one group, two, four (from
# here on each particle has its own loop), five groups. Then several particles in a tile, and around one tile.
@pytest.mark.parametrize("elements", (1, 2, 3, 4, 5, 16, 17, 1000, 2047, 2048, 2049))
def test_every_size(elements):
    for particles in (0, 1, 3, 257):  # 257 are several tiles from 16 elements on
        x, output, displacement = inputs(particles, elements)
        for coefficients in (VP, STILL, per_sample(particles)):
            options = dict(displacement=displacement, clip=1.5, **COUNTER)
            assert_same(kernel(x, output, coefficients, **options), expected_of(x, output, coefficients, **options))


# A prediction has two multipliers, or none ("sample"). A dtype decides the arithmetic and the buffers. So: every
# prediction in float32, and every dtype with and without multipliers.
@pytest.mark.parametrize(
    ("prediction", "dtype"),
    [
        *((p, torch.float32) for p in reference.PREDICTIONS),
        *itertools.product(("sample", "v"), FLOATS[1:]),
    ],
)
def test_every_option(prediction, dtype):
    # multipliers for each element; for each particle; a particle of several vectors; a particle of two tiles
    for particles, elements in ((3, 5), (70, 33), (5, 100), (2, 2500)):
        x, output, displacement = inputs(particles, elements, (dtype,) * 3)
        for coefficients, moved, clip, clip_noise in itertools.product(
            (VP, STILL, per_sample(particles)), (False, True), (None, (-0.4, 0.9)), (False, True)
        ):
            options = dict(prediction=prediction, clip=clip, displacement=displacement if moved else None, **COUNTER)
            options["clip_noise"] = clip_noise
            assert_same(kernel(x, output, coefficients, **options), expected_of(x, output, coefficients, **options))


# The guided output is written into a buffer: a whole tile with one scale, row by row with a scale for each particle. It
# is read in place, or from a conversion buffer. A dynamic threshold computes it once more.
@pytest.mark.parametrize(("dtype", "given"), [*zip(FLOATS, FLOATS, strict=True), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("each", (False, True))
def test_classifier_free_guidance(dtype, given, each):
    rank = DynamicThreshold(1.0, 100.0)  # the largest value: no interpolation
    for particles, elements in ((3, 5), (70, 33), (5, 100), (2, 2500)):
        x, output, displacement = inputs(particles, elements, (dtype, given, dtype))
        base = inputs(particles, elements, (given,), seed=1)[0]
        scale = torch.linspace(-1, 3, particles, dtype=torch.float64) if each else 2.5
        for coefficients, moved, clip, clip_noise in itertools.product(
            (VP, per_sample(particles)), (False, True), (None, (-0.4, 0.9), rank), (False, True)
        ):
            options = dict(unconditional=base, guidance_scale=scale, clip=clip, clip_noise=clip_noise, **COUNTER)
            options |= dict(displacement=displacement if moved else None, prediction="v")
            got, expected = (f(x, output, coefficients, **options) for f in (kernel, expected_of))
            if clip == rank and not clip_noise:  # the kernel adds it to the displacement first
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=16 * ROUNDING[dtype], atol=16 * ROUNDING[dtype])
            else:
                assert_same(got, expected)


# Each tensor is converted on its own: every dtype of one tensor with every dtype of each other tensor.
@pytest.mark.parametrize("dtypes", [(FLOATS[i], FLOATS[k], FLOATS[(i + k) % 4]) for i in range(4) for k in range(4)])
def test_every_mix_of_dtypes(dtypes):
    for particles, elements in ((300, 9), (1, 2500)):
        x, output, displacement = inputs(particles, elements, dtypes)
        options = dict(displacement=displacement, **COUNTER)
        assert_same(kernel(x, output, VP, **options), expected_of(x, output, VP, **options))


# x0_hat computed and given, and each kind of clip: a NaN takes a way of its own through each.
@pytest.mark.parametrize("prediction", ("epsilon", "sample"))
@pytest.mark.parametrize("clip", (None, (-0.4, 0.9), DynamicThreshold(0.9, 3.0), DynamicThreshold(0.2, math.inf)))
@pytest.mark.parametrize("dtype", FLOATS)
def test_not_finite_inputs(prediction, clip, dtype):
    """A NaN stays NaN in every clip. A threshold treats NaN as the largest value, as a sort does."""
    for elements in (1, 70, 3000):  # part of a vector, several vectors and a part, two tiles
        x, output, displacement = inputs(40, elements, (dtype,) * 3)
        specials = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for tensor in (x[8:], output[16:], displacement[24:]):
            where = torch.rand(tensor.shape, generator=generator) < 0.2
            chosen = torch.randint(4, tensor.shape, generator=generator)
            tensor[where] = specials[chosen[where]]
        options = dict(prediction=prediction, clip=clip, displacement=displacement)
        got, expected = kernel(x, output, VP, **options), expected_of(x, output, VP, **options)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            torch.testing.assert_close(a, b, equal_nan=True)


# --- dynamic threshold --------------------------------------------------------------------------------------


# Small numbers, the last number with digits of 5 bits, the first with digits of 11 bits, and two tiles.
@pytest.mark.parametrize("elements", (1, 2, 101, 1023, 1024, 2049))
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_threshold_is_an_exact_order_statistic(elements, dtype):
    """If the rank of a ratio is an integer, there is no interpolation, and the bits are the reference's."""
    x, output, displacement = inputs(5, elements, (dtype,) * 3)
    for tenth in range(11):
        rank = (elements - 1) * tenth // 10
        ratio = rank / (elements - 1) if elements > 1 else tenth / 10
        if ratio * (elements - 1) != rank and elements > 1:
            continue  # the product is not exactly an integer
        for coefficients in (VP, per_sample(5)):
            options = dict(clip=DynamicThreshold(ratio, 100.0), displacement=displacement, **COUNTER)
            got, expected = (f(3 * x, output, coefficients, **options) for f in (kernel, expected_of))
            assert_same(got, expected)


# Both ends, and quantiles nearer to the lower of two values, in the middle, and nearer to the upper one.
@pytest.mark.parametrize("ratio", (0.0, 0.003, 0.5, 0.7, 0.995, 1.0))
@pytest.mark.parametrize("elements", (2, 7, 3000))
def test_a_threshold_between_two_order_statistics(ratio, elements):
    x, output, _ = inputs(3, elements)
    for scale, most in ((1.0, 1.0), (4.0, 2.0), (4.0, math.inf)):
        clip = DynamicThreshold(ratio, most)
        _, got = kernel(scale * x, output, STILL, clip=clip)
        exact = reference.x0_from_output((scale * x).double(), output.double(), *STILL[:2], "epsilon")
        torch.testing.assert_close(got.double(), reference.clip_x0(exact, clip), rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_threshold_among_equal_values(dtype):
    for values in ([0.0] * 50, [2.0] * 30 + [3.0] * 30, [5.0] + [2.0] * 2000, [1e-40, 2.0, 1e30] * 9):
        x0 = torch.tensor([values], dtype=dtype)
        for ratio in (0.0, 0.25, 0.5, 1.0):
            options = dict(prediction="sample", clip=DynamicThreshold(ratio, 1e35))
            got, expected = (f(torch.zeros_like(x0), x0, STILL, **options) for f in (kernel, expected_of))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=4e-7, atol=0.0)


@pytest.mark.parametrize("prediction", ("epsilon", "sample"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_threshold_of_x0_alone(prediction, dtype):
    for particles, elements in ((70, 33), (2, 5000)):
        x, output, displacement = inputs(particles, elements, (dtype,) * 3)
        for coefficients, moved in itertools.product((VP, per_sample(particles)), (None, displacement)):
            options = dict(clip=DynamicThreshold(0.9, 3.0), prediction=prediction, displacement=moved, **COUNTER)
            got, expected = (f(2 * x, output, coefficients, clip_noise=False, **options) for f in (kernel, expected_of))
            tolerance = 16 * ROUNDING[dtype if dtype != torch.float64 else torch.float32]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            whole, _ = kernel(2 * x, output, coefficients, **options)
            assert (whole.double() - got[0].double()).abs().max() > 0.1


# --- accuracy -----------------------------------------------------------------------------------------------

LEVELS = (VP, (1.0, 3.0, 1.0, 1.25, 1.1), (0.25, 0.75, 0.5, 0.5, 0.2), (0.04, 0.9992, 0.11, 0.9939, 0.8))
ROUNDING = {torch.float32: 2**-24, torch.float64: 2**-53, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def errors(dtype: torch.dtype, prediction: str, elements: int, seed: int = 0) -> tuple[float, float]:
    """The largest errors of x_s and x0 against the reference in float64 with its own normals. The unit is the dtype's
    rounding error times the sum of the magnitudes of the terms."""
    x, output, displacement = inputs(4, elements, (dtype,) * 3, seed=seed)
    x64, output64, displacement64 = x.double(), output.double(), displacement.double()
    worst = [0.0, 0.0]
    for coefficients in LEVELS:
        options = dict(prediction=prediction, seed=seed)
        got = kernel(x, output, coefficients, displacement=displacement, **options)
        exact = reference.reverse_step(
            x64, output64, coefficients, displacement=displacement64, return_x0=True, **options
        )
        p, q, a, b, tau, _ = multipliers_of(x64, coefficients, prediction)
        size0 = (p * x64).abs() + (q * output64).abs()
        z = reference.randn(x.shape, seed=seed, dtype=torch.float64)
        size = (a * x64).abs() + abs(b) * size0 + displacement64.abs() + (tau * z).abs()
        for i, (value, truth, magnitude) in enumerate(zip(got, exact, (size, size0), strict=True)):
            ratio = (value.double() - truth).abs() / (ROUNDING[dtype] * magnitude)
            worst[i] = max(worst[i], float(ratio.max()))
    return worst[0], worst[1]


# Bounds for x_s and x0. Measured with `errors` over six seeds of 240,000 elements, at every level above. float32: 3.8,
# 3.3, 3.6, 3.3, 3.3 for x_s and 2.3, 0, 2.2, 2.5, 2.2 for x0, with the predictions in this order. float16 and bfloat16:
# 1.0, only the rounding of the result. float64: up to 4.0 for x_s, because two libraries' cosines differ; x0 is equal.
ALLOWED = {
    torch.float32: dict(epsilon=(4.6, 2.8), sample=(4.2, 0.0), score=(4.5, 2.8), v=(4.2, 3.2), flow=(4.2, 2.8)),
    torch.float16: dict.fromkeys(reference.PREDICTIONS, (1.01, 1.01)),
    torch.bfloat16: dict.fromkeys(reference.PREDICTIONS, (1.01, 1.01)),
    torch.float64: dict.fromkeys(reference.PREDICTIONS, (6.0, 0.0)),
}


@pytest.mark.parametrize("prediction", reference.PREDICTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_against_float64(dtype, prediction):
    x_s, x0 = errors(dtype, prediction, 2500)
    allowed = ALLOWED[dtype][prediction]
    assert x_s <= allowed[0] and x0 <= allowed[1]
    assert x_s >= 0.25 * allowed[0]  # the bound is not too loose


# --- what no result depends on ------------------------------------------------------------------------------


def settings():
    """Calls that together take every path through the kernel: (x, output, coefficients, options)."""
    for particles, elements in ((67, 1), (67, 2), (67, 7), (41, 100), (5, 2049), (2, 5000)):
        for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.float32), (torch.float64,) * 3):
            x, output, displacement = inputs(particles, elements, dtypes)
            for coefficients in (VP, per_sample(particles)):
                for clip in (0.7, DynamicThreshold(0.9, 3.0)):
                    options = dict(prediction="v", clip=clip, displacement=displacement)
                    yield x, output, coefficients, options
            yield x, output, VP, dict(unconditional=displacement, guidance_scale=2.5, displacement=displacement)


@pytest.mark.parametrize("name", _native.instruction_sets()[1:])
def test_every_instruction_set_gives_the_same_bits(name, instruction_set):
    for x, output, coefficients, options in settings():
        best = kernel(x, output, coefficients, **options, **COUNTER)
        with instruction_set(name):
            other = kernel(x, output, coefficients, **options, **COUNTER)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(best, other, strict=True))


def test_chunks_give_the_same_bits():
    for x, output, coefficients, options in settings():
        whole = kernel(x, output, coefficients, **options, seed=3, first_particle=100)
        for low, high in ((0, 1), (1, 5), (len(x) // 2, len(x))):
            rows = slice(low, high)
            levels = tuple(c[rows] if isinstance(c, torch.Tensor) else c for c in coefficients)
            moved = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            part = kernel(x[rows], output[rows], levels, **moved, seed=3, first_particle=100 + low)
            assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize(("particles", "elements"), ((1, 200_001), (60_001, 3), (70, 3001)))
@pytest.mark.parametrize("clip", (None, DynamicThreshold(0.9, 3.0)))
def test_threads_give_the_same_bits(particles, elements, clip):
    x, output, displacement = inputs(particles, elements)
    clip = clip if elements > 3 else None  # slow with three elements, and nothing new
    options = dict(clip=clip, displacement=displacement, seed=9)
    one, *others = (kernel(x, output, VP, **options, threads=threads) for threads in (1, 2, 3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_large_results_have_the_same_bits(instruction_set):
    """From 8 MiB on, results are written past the caches, also if rows start at addresses that are not aligned."""
    x, output, _ = inputs(701, 3001)
    expected = expected_of(x, output, STILL, clip=1.0)
    offsets = (64, 65, 80)  # x0 aligned like x_s, differently, and like x_s again
    for name, offset, threads in itertools.product(_native.instruction_sets(), offsets, (1, 2)):
        with instruction_set(name):
            assert_same(kernel(x, output, STILL, clip=1.0, offset=offset, threads=threads), expected)


# A prediction only changes two factors: test_every_option has all combinations.
@pytest.mark.parametrize(("prediction", "moved"), (("epsilon", True), ("sample", False)))
def test_large_noisy_steps_have_the_same_bits(prediction, moved, instruction_set):
    """From 8 MiB on, each normal is used as soon as it is made, if rows start at aligned addresses. Rows end within a
    group of normals."""
    x, output, displacement = inputs(701, 3024)
    for coefficients, clip in ((VP, None), (per_sample(701), (-0.4, 0.9))):
        options = dict(prediction=prediction, clip=clip, displacement=displacement if moved else None, **COUNTER)
        expected = expected_of(x, output, coefficients, **options)
        for name in _native.instruction_sets():
            with instruction_set(name):
                for threads, offset in ((1, 64), (2, 64), (1, 80)):  # at 80 x0 is aligned differently from x_s
                    assert_same(kernel(x, output, coefficients, offset=offset, threads=threads, **options), expected)
                x_s = ops.reverse_step(x, output, coefficients, backend="cpu", **options)  # without x0
            assert_same([x_s], expected[:1])


def test_particles_without_noise_get_none():
    for particles, elements in ((64, 5), (9, 100), (3, 3000)):
        x, output, displacement = inputs(particles, elements)
        mixed = per_sample(particles)
        got = kernel(x, output, mixed, displacement=displacement, **COUNTER)
        quiet = kernel(x, output, STILL, displacement=displacement)
        assert_same((v[1::3] for v in got), (v[1::3] for v in quiet))
        assert ((got[0] - quiet[0])[0::3] != 0).all()


def test_tau_may_pass_sigma_s_by_a_rounding():
    x, output, _ = inputs(3, 5)
    for tau in (0.6 * (1 + 9e-7), torch.full((3,), 0.6 * (1 + 9e-7), dtype=torch.float64)):
        got = kernel(x, output, (*VP[:4], tau))
        assert got[0].isfinite().all()
        assert_same(got, expected_of(x, output, (*VP[:4], tau)))


def test_the_last_particles():
    top = 2**48
    x, output, _ = inputs(2, 5)
    x_s, _ = kernel(x, output, VP, first_particle=top - 2)
    z = ops.randn((2, 5), seed=0, first_particle=top - 2)
    quiet, _ = kernel(x, output, STILL)
    a = reference.step_coefficients(VP)[0] - reference.step_coefficients(STILL)[0]
    b = reference.step_coefficients(VP)[1] - reference.step_coefficients(STILL)[1]
    x0 = reference.x0_from_output(x, output, *VP[:2], "epsilon")
    torch.testing.assert_close(x_s, quiet + a * x + b * x0 + VP[4] * z, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="first_particle"):
        kernel(x, output, VP, first_particle=top - 1)


# --- from Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((0, 3), (4, 0), (0,), (0, 0, 2)))
@pytest.mark.parametrize("clip", (None, DynamicThreshold()))
def test_empty(shape, clip):
    x = torch.zeros(shape)
    for coefficients in (VP, per_sample(shape[0])):
        x_s, x0 = ops.reverse_step(x, x, coefficients, clip=clip, return_x0=True, backend="cpu")
        assert x_s.shape == x0.shape == shape


def test_numbers_of_any_kind_are_coefficients():
    x, output, _ = inputs(3, 5)
    expected = ops.reverse_step(x, output, (1.0, 2.0, 1.0, 1.0, 0.5), seed=1)
    numpy = pytest.importorskip("numpy")
    for coefficients in (
        (1, 2, 1, 1, 0.5),
        [1.0, 2.0, 1.0, 1.0, 0.5],
        tuple(numpy.float32(c) for c in (1.0, 2.0, 1.0, 1.0, 0.5)),
        (torch.ones(3), 2.0, 1, torch.ones(3, dtype=torch.float16), 0.5),
    ):
        assert torch.equal(ops.reverse_step(x, output, coefficients, seed=1), expected)
    with pytest.raises(ValueError, match="coefficients: "):
        ops.reverse_step(x, output, torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    ("change", "error"),
    (
        (dict(count=25), TypeError),
        (dict(guidance_scale=math.inf), ValueError),
        (dict(displacement_scale=math.nan), ValueError),
        (dict(displacement_scale="1"), TypeError),
        (dict(dtype=4), ValueError),
        (dict(dtype=1.0), TypeError),
        (dict(return_x0=0), TypeError),
        (dict(clip_noise=1), TypeError),
        (dict(prediction=5), ValueError),
        (dict(clip=3), ValueError),
        (dict(low=1), TypeError),
        (dict(levels=VP[:4]), ValueError),
        (dict(levels=(*VP[:4], "0")), TypeError),
        (dict(levels=(*VP[:4], 0.7)), ValueError),
        (dict(levels=(0.0, *VP[1:])), ValueError),
        (dict(levels=(*VP[:3], math.inf, 0.1)), ValueError),
        (dict(shape=()), TypeError),
        (dict(shape=(2, 1.0)), TypeError),
        (dict(shape=(0, 2**33, 4)), ValueError),
        (dict(shape=(1, 4)), ValueError),  # its pointers are null
        (dict(seed=True), TypeError),
        (dict(seed=-1), OverflowError),
        (dict(seed=2**64), OverflowError),
        (dict(step=2**32), ValueError),
    ),
)
def test_the_module_takes_no_wrong_call(change, error):
    arguments = dict(x=0, dtype=0, output=0, output_dtype=0, displacement=None, displacement_dtype=0, x_s=0,
                     x0=None, return_x0=False, not_finite=None, prediction=0, unconditional=None,
                     unconditional_dtype=0, guidance_scale=1.0, clip=0, low=0.0, high=0.0,
                     clip_noise=True, levels=VP, displacement_scale=1.0, shape=(0, 4), seed=0, step=0,
                     stream=0, first_particle=0, threads=1)  # fmt: skip
    _native.module("cpu").reverse_step(*arguments.values())  # no particles: reads nothing
    with pytest.raises(error):
        _native.module("cpu").reverse_step(*list((arguments | change).values())[: change.get("count", 26)])


# --- derivatives outside of the operator --------------------------------------------------------------------


def test_function_transforms_and_forward_mode_go_through_the_reference():
    x, output, tangent = inputs(3, 4, (torch.float64,) * 3)

    def step(x):
        return ops.reverse_step(x, output, VP, prediction="v", clip=0.8, seed=1)

    expected = step(x)
    derivative = torch.autograd.functional.jvp(step, x, tangent)[1]
    torch.testing.assert_close(torch.func.vmap(step)(x[None])[0], expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(torch.func.jvp(step, (x,), (tangent,))[1], derivative, rtol=1e-14, atol=1e-14)
    with torch.autograd.forward_ad.dual_level():
        dual = step(torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, derivative, rtol=1e-14, atol=1e-14)
    with pytest.raises(RuntimeError, match="cpu has no function transforms"):
        torch.func.vmap(lambda x: ops.reverse_step(x, output, VP, backend="cpu"))(x[None])


def test_derivatives_in_coefficients_go_through_the_reference():
    x, output, _ = inputs(3, 4, (torch.float64,) * 3)
    tau = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    step = ops.reverse_step(x, output, (*VP[:4], tau), seed=1)
    expected = torch.autograd.grad(reference.reverse_step(x, output, (*VP[:4], tau), seed=1).sum(), tau)[0]
    torch.testing.assert_close(torch.autograd.grad(step.sum(), tau)[0], expected)
    with torch.no_grad():  # no derivative: the kernel runs
        got = ops.reverse_step(x, output, (*VP[:4], tau), seed=1, backend="cpu")
    torch.testing.assert_close(got, step, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("prediction", reference.PREDICTIONS)
@pytest.mark.parametrize("clip", (None, 0.7, DynamicThreshold(0.8, 3.0)))
def test_second_derivatives(prediction, clip):
    tensors = tuple(v.requires_grad_() for v in inputs(2, 5, (torch.float64,) * 3, seed=3))

    def step(x, output, displacement):
        options = dict(prediction=prediction, clip=clip, displacement=displacement, seed=1, return_x0=True)
        return tuple(v.sin() for v in ops.reverse_step(x, output, VP, **options))

    assert torch.autograd.gradgradcheck(step, tensors)


def test_a_gradient_takes_the_operator_and_the_kernel():
    x, output, displacement = inputs(3, 40)
    plain = ops.reverse_step(x, output, VP, displacement=displacement, seed=1)
    for i in range(3):
        tensors = [v.clone().requires_grad_(i == k) for k, v in enumerate((x, output, displacement))]
        step = ops.reverse_step(*tensors[:2], VP, displacement=tensors[2], seed=1)
        assert torch.equal(step, plain) and "fastguide" in type(step.grad_fn).__name__
        assert torch.autograd.grad(step.sum(), tensors[i])[0].abs().min() > 0
        with torch.no_grad():
            assert not ops.reverse_step(*tensors[:2], VP, displacement=tensors[2], seed=1).requires_grad
