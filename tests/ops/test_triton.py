"""The Triton kernels against the cpu backend and the reference. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from fastguide import ops, reference
from fastguide.ops import DynamicThreshold

pytest.importorskip("triton")
from fastguide.ops import _triton as tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Every alignment; tiles of one row and of several, rows of one tile and of several, with and without a remainder.
SHAPES = ((5, 1), (7, 2), (3, 3), (4, 4), (33, 7), (5, 8), (9, 66), (3, 68), (40, 33), (2, 1000), (2, 2047), (1, 3072))
# The interpreter takes 50 ms for a tile of normals, so there are few cases. Tiles depend only on shapes: bfloat16 has
# shapes of every alignment. float16 differs only in its rounding: two shapes.
STATES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((shape, torch.bfloat16) for shape in ((5, 1), (7, 2), (4, 4), (5, 8), (9, 66), (2, 2047), (1, 3072))),
    *(((9, 66), torch.float16), ((2, 2047), torch.float16)),
]
VP = (0.6, 0.8, 0.8, 0.6, 0.35)
STILL = (*VP[:4], 0.0)
COUNTER = dict(seed=2**64 - 3, step=2**32 - 2, stream=7, first_particle=2**32 - 2)
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def inputs(shape, dtype=torch.float32, number: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(number, *shape, generator=generator).to(DEVICE, dtype))


def per_sample(particles: int) -> tuple[torch.Tensor, ...]:
    """Coefficients for each particle. Every second particle gets no noise."""
    rows = [(VP, STILL)[n % 2] for n in range(particles)]
    return tuple(torch.tensor([row[i] for row in rows], dtype=torch.float64, device=DEVICE) for i in range(5))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, in units of the dtype's rounding of values of order one."""
    assert got.shape == exact.shape and torch.equal(got.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double().nan_to_num(nan=0.5), exact[~finite].nan_to_num(nan=0.5))
    difference = (got.double() - exact)[finite].abs() / (exact[finite].abs() + 1.0)
    return float(difference.max()) / ROUNDING[got.dtype] if difference.numel() else 0.0


# --- randn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), STATES)
def test_randn(shape, dtype):
    z = ops.randn(shape, dtype=dtype, device=DEVICE, backend="triton", **COUNTER)
    exact = reference.randn(shape, dtype=torch.float64, device=DEVICE, **COUNTER)
    # 4 ulp, and one more in the interpreter, where multiply-adds round twice. 16-bit dtypes round the float32 value.
    relative = ((z.double() - exact).abs() / exact.abs()).max() / ROUNDING[dtype]
    assert relative <= (5.0 if dtype == torch.float32 else 1.01)


def test_randn_counts_as_the_others_do():
    """Every part of the counter is used, and a particle does not depend on the batch."""
    whole = ops.randn((300, 10), device=DEVICE, backend="triton", seed=5)
    assert torch.equal(whole[100:], ops.randn((200, 10), device=DEVICE, backend="triton", seed=5, first_particle=100))
    counters = [dict(seed=s, step=t, stream=u, first_particle=p)
                for s, t, u, p in ((0, 0, 0, 0), (1 << 40, 0, 0, 0), (1 << 63, 0, 0, 0), (0, 1 << 31, 0, 0),
                                   (0, 0, 65535, 0), (0, 0, 0, 1 << 32), (0, 0, 0, (1 << 48) - 2))]  # fmt: skip
    seen = []
    for counter in counters:
        z = ops.randn((2, 4), device=DEVICE, backend="triton", **counter)
        assert error(z, reference.randn((2, 4), dtype=torch.float64, device=DEVICE, **counter)) <= 5.0
        seen.append(z)
    assert all((a != b).all() for a, b in itertools.combinations(seen, 2))


def test_randn_reads_its_seed_and_step_from_the_device():
    on_device = dict(seed=torch.tensor(-3, device=DEVICE), step=torch.tensor(2**32 - 2, device=DEVICE))
    out = ops.randn((3, 10), device=DEVICE, backend="triton", **(COUNTER | on_device))
    assert torch.equal(out, ops.randn((3, 10), device=DEVICE, backend="triton", **COUNTER))


# --- reverse_step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), STATES)
def test_reverse_step(shape, dtype):
    x, output, displacement = inputs(shape, dtype)
    for coefficients, moved in ((VP, displacement), (STILL, None), (per_sample(shape[0]), displacement)):
        options = dict(clip=(-0.4, 0.9), displacement=moved, return_x0=True, **COUNTER)
        got = ops.reverse_step(x, output, coefficients, backend="triton", **options)
        wide = {**options, "displacement": None if moved is None else moved.double()}
        exact = reference.reverse_step(x.double(), output.double(), coefficients, **wide)
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == dtype and error(a, b) <= (8.0 if dtype == torch.float32 else 1.1)


# The multipliers of a prediction are computed before the kernel, and "sample" has none. So: every clip with and without
# multipliers, and each other prediction once, with clip_noise=False, which uses all multipliers.
@pytest.mark.parametrize(
    ("prediction", "clip", "clip_noise"),
    [
        *itertools.product(("sample", "v"), (None, 0.7, DynamicThreshold(0.9, 3.0)), [True]),
        *itertools.product(("sample", "v"), (0.7, DynamicThreshold(0.9, 3.0)), [False]),
        *((prediction, DynamicThreshold(0.9, 3.0), False) for prediction in ("epsilon", "score", "flow")),
    ],
)
def test_every_option_of_reverse_step(prediction, clip, clip_noise):
    x, output, displacement = inputs((6, 50))
    for coefficients in (VP, per_sample(6)):
        options = dict(prediction=prediction, clip=clip, clip_noise=clip_noise, **COUNTER)
        got = ops.reverse_step(x, output, coefficients, displacement=displacement, backend="triton", **options)
        exact = reference.reverse_step(
            x.double(), output.double(), coefficients, displacement=displacement.double(), **options
        )
        assert error(got, exact) <= 8.0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("clip", (None, DynamicThreshold(0.9, 3.0)))
def test_reverse_step_with_guidance(clip, dtype):
    x, output, base = inputs((6, 50), dtype)
    for scale in (2.5, torch.linspace(-1, 3, 6, device=DEVICE)):
        options = dict(guidance_scale=scale, clip=clip, prediction="v", **COUNTER)
        got = ops.reverse_step(x, output, VP, unconditional=base, backend="triton", **options)
        exact = reference.reverse_step(x.double(), output.double(), VP, unconditional=base.double(), **options)
        assert error(got, exact) <= (8.0 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize("dtypes", [(FLOATS[i], FLOATS[j], FLOATS[(i + j) % 3]) for i in range(3) for j in range(3)])
def test_every_mix_of_two_dtypes(dtypes):
    x, output, displacement = (t.to(d) for t, d in zip(inputs((5, 36)), dtypes, strict=True))
    got = ops.reverse_step(x, output, VP, displacement=displacement, backend="triton", **COUNTER)
    exact = reference.reverse_step(x.double(), output.double(), VP, displacement=displacement.double(), **COUNTER)
    assert got.dtype == dtypes[0] and error(got, exact) <= 8.0


@pytest.mark.parametrize("clip", (None, 0.7))
def test_not_finite_values_keep_to_themselves(clip):
    x, output, _ = inputs((4, 20))
    x[1, 3], output[2, 5], output[2, 6] = math.nan, math.inf, -math.inf
    got = ops.reverse_step(x, output, VP, clip=clip, backend="triton", **COUNTER)
    assert error(got, reference.reverse_step(x.double(), output.double(), VP, clip=clip, **COUNTER)) <= 8.0


def test_derivatives_of_reverse_step():
    x, output, displacement = (t.requires_grad_() for t in inputs((3, 12)))
    got, expected = (
        torch.autograd.grad(
            ops.reverse_step(x, output, VP, clip=0.8, displacement=displacement, seed=1, backend=backend).sin().sum(),
            (x, output, displacement),
        )
        for backend in ("triton", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- propose_and_weigh --------------------------------------------------------------------------------------


# Rows of one program, as long as possible, and rows of two and three programs.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *STATES,
        *((shape, torch.float32) for shape in ((1, 8192), (2, 8193), (1, 16_400))),
        ((2, 8193), torch.bfloat16),
    ],
)
def test_propose_and_weigh(shape, dtype):
    x, x0_hat, displacement = inputs(shape, dtype)
    displacement *= 0.1
    coarse_first = dtype == torch.float32
    for coefficients, coarse in ((VP, coarse_first), (per_sample(shape[0]), not coarse_first)):
        weights_dtype = torch.float32 if coarse else torch.float64
        log_weights = inputs(shape[:1], number=1)[0].to(weights_dtype)
        x_s, weights = ops.propose_and_weigh(
            x, x0_hat, displacement, log_weights, coefficients, backend="triton", **COUNTER
        )
        wide = (t.double() for t in (x, x0_hat, displacement, log_weights))
        exact, exact_weights = reference.propose_and_weigh(*wide, coefficients, **COUNTER)
        assert x_s.dtype == dtype and error(x_s, exact) <= (8.0 if dtype == torch.float32 else 1.1)
        z = reference.randn(shape, dtype=torch.float64, device=DEVICE, **COUNTER)
        delta = displacement.double().abs() / VP[4]
        size = (delta * (z.abs() + 0.5 * delta)).sum(1)
        allowed = 5 * 2**-24 * size + (2**-24 if weights_dtype == torch.float32 else 2**-52) * exact_weights.abs()
        assert weights.dtype == weights_dtype and ((weights.double() - exact_weights).abs() <= allowed).all()


@pytest.mark.parametrize("elements", (7, 9000))
def test_without_noise_the_base_step(elements):
    particles = 4 if elements < 1000 else 2
    x, x0_hat, displacement = inputs((particles, elements))
    log_weights = inputs((particles,), number=1)[0]
    displacement[1::2] = math.nan
    levels = per_sample(particles)
    x_s, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, levels, seed=1, backend="triton")
    base = ops.reverse_step(x, x0_hat, STILL, prediction="sample", backend="triton")
    assert torch.equal(x_s[1::2], base[1::2]) and torch.equal(weights[1::2], log_weights[1::2])
    assert x_s.isfinite().all() and (weights[::2] != log_weights[::2]).all()
    x_s, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, STILL, seed=1, backend="triton")
    assert torch.equal(x_s, base) and torch.equal(weights, log_weights)


@pytest.mark.parametrize(
    ("elements", "dtype"), ((3, torch.float32), (100, torch.float32), (9000, torch.float32), (12, torch.bfloat16))
)
def test_chunks_give_the_same_bits(elements, dtype):
    """Also if a chunk starts at an address that is not a multiple of 16."""
    x, x0_hat, displacement = inputs((4, elements), dtype)
    log_weights = inputs((4,), number=1)[0]
    options = dict(seed=3, backend="triton")
    whole = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, VP, first_particle=100, **options)
    part = ops.propose_and_weigh(
        x[1:3], x0_hat[1:3], displacement[1:3], log_weights[1:3], VP, first_particle=101, **options
    )
    assert all(torch.equal(a, b[1:3]) for a, b in zip(part, whole, strict=True))
    density = dict(family="student_t", scale=0.7, df=3.0, backend="triton")
    whole = ops.log_prob_and_gradient(x, x0_hat, **density)
    for rows in (slice(1, 3), slice(3, 4)):  # one sample with one row of y takes the same kernel
        part = ops.log_prob_and_gradient(x[rows], x0_hat[rows], **density)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("shape", ((0, 3), (4, 0), (0,)))
def test_empty(shape):
    x, log_weights = torch.zeros(shape, device=DEVICE), torch.arange(shape[0], dtype=torch.float32, device=DEVICE)
    assert ops.randn(shape, seed=0, device=DEVICE, backend="triton").shape == shape
    assert ops.reverse_step(x, x, VP, clip=DynamicThreshold(), backend="triton").shape == shape
    x_s, weights = ops.propose_and_weigh(x, x, x, log_weights, VP, seed=0, backend="triton")
    assert x_s.shape == shape and torch.equal(weights, log_weights)


# --- log_prob_and_gradient ----------------------------------------------------------------------------------


def density(family: str, shape: tuple[int, ...], dtype: torch.dtype, y_of: str, spread: bool) -> tuple:
    """``z``, ``y`` and options. ``y`` has one row, a row for each sample, or rows that are chosen by ``rows``."""
    z, y, extra_variance = inputs(shape, number=3, seed=3)
    if family == "poisson":
        z, y = 5.0 * z.abs(), (4.0 * y.abs()).round()
        z[0, 0] = -1.0  # a rate below the floor
    y = {"one": y[:1], "each": y, "rows": torch.cat([y, y])[: shape[0] + 1]}[y_of]
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(len(y), shape[:1], generator=generator).to(DEVICE) if y_of == "rows" else None
    options = dict(
        family=family, scale=0.7, df=3.0 if family == "student_t" else None, rows=rows,
        background=0.1 if family == "poisson" else 0.0, extra_variance=extra_variance[:1].abs() if spread else None,
    )  # fmt: skip
    return z.to(dtype), y, options


# One element, rows at any address, many elements, and more than one program takes. 16-bit dtypes are only read and
# written differently, so they get the second and the last case.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in ((5, 1), (33, 7), (2, 1000), (2, 8193))),
        *((shape, torch.bfloat16) for shape in ((33, 7), (2, 8193))),
    ],
)
@pytest.mark.parametrize("family", reference.FAMILIES)
def test_log_prob_and_gradient(shape, dtype, family):
    few = () if shape[1] > 8192 else (("one", False), ("each", False), ("each", True))
    for y_of, spread in (*few, ("rows", False), ("rows", True)):
        if spread and family == "poisson":
            continue
        z, y, options = density(family, shape, dtype, y_of, spread)
        log_prob, gradient = ops.log_prob_and_gradient(z, y, backend="triton", **options)
        wide = options | dict(extra_variance=options["extra_variance"].double() if spread else None)
        exact, exact_gradient = reference.log_prob_and_gradient(z.double(), y.double(), **wide)
        assert log_prob.dtype == torch.float64 and gradient.dtype == dtype
        # The tolerance: terms of either sign, each rounded to float32 (float64 for Poisson).
        one = 2.0 + (z.double() - y[options["rows"]].double() if y_of == "rows" else z.double() - y.double()) ** 2
        size = one.sum(1) if family != "poisson" else 1e3 * exact.abs()
        rounding = 2**-24 if family != "poisson" else 2**-52
        assert ((log_prob - exact).abs() <= 2 * rounding * size).all()
        assert error(gradient, exact_gradient) <= (4.0 if dtype == torch.float32 else 1.01)
        if y_of == "rows":
            again, nothing = ops.log_prob_and_gradient(z, y, backend="triton", return_gradient=False, **options)
            assert torch.equal(again, log_prob) and nothing is None


def test_student_t_of_small_residuals():
    """log(1 + u) is right even if 1 + u is 1 in float32."""
    z = torch.zeros(1, 1000, device=DEVICE)
    y = torch.full_like(z, 1e-4)
    options = dict(family="student_t", scale=1.0, df=3.0)
    zero, _ = ops.log_prob_and_gradient(z, z, backend="triton", **options)
    got, _ = ops.log_prob_and_gradient(z, y, backend="triton", **options)
    torch.testing.assert_close(got - zero, torch.full_like(got, -2.0 * 1000 * 1e-8 / 3.0), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize("elements", (7, 9000))
def test_bad_measurements_are_nan_and_keep_to_themselves(family, elements):
    z, y, options = density(family, (4, elements), torch.float32, "rows", False)
    expected = ops.log_prob_and_gradient(z, y, backend="triton", **options)
    options["rows"] = options["rows"].clone()
    options["rows"][1], z[2, 3] = len(y), math.nan
    log_prob, gradient = ops.log_prob_and_gradient(z, y, backend="triton", **options)
    assert log_prob[1:3].isnan().all() and gradient[1].isnan().all() and gradient[2].isnan().sum() == 1
    for a, b in zip((log_prob, gradient), expected, strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])


@pytest.mark.parametrize("splits", (2, 64, 71, 200))  # fewer and more parts than are added at a time
def test_sums_of_parts_do_not_depend_on_the_batch(splits):
    """torch adds 64 parts and more in an order that depends on the number of rows."""
    density = importlib.import_module("fastguide.ops.log_prob_and_gradient.triton")
    proposal = importlib.import_module("fastguide.ops.propose_and_weigh.triton")
    sums = torch.randn(9, splits, dtype=torch.float64, device=DEVICE)
    table = torch.rand(6, 9, device=DEVICE)
    table[4, ::3] = 0.0  # no noise: the weight stays

    def weighed(rows: slice) -> torch.Tensor:
        part, columns = sums[rows], table[:, rows].contiguous()
        before, after = torch.ones(2, len(part), device=DEVICE)
        proposal.weigh_kernel[(len(part),)](
            part.contiguous(), before, after, len(part), splits, 0.0, columns, None, 0.0, BLOCK=tiles.SUM_BLOCK
        )
        return after

    total, after = density.totals(sums, tiles.SUM_BLOCK), weighed(slice(9))
    torch.testing.assert_close(total, sums.sum(1), rtol=1e-13, atol=1e-13)
    tau = table[4].double()
    expected = torch.where(tau > 0, 1.0 - total / tau, 1.0).float()
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    for rows in (slice(1), slice(3, 5), slice(4, 9)):
        assert torch.equal(density.totals(sums[rows].contiguous(), tiles.SUM_BLOCK), total[rows])
        assert torch.equal(weighed(rows), after[rows])


# --- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", (1024, 2048, 4096))
def test_tiles_waste_little(block):
    """Past the end of a row stands an eighth of its tiles, and less than half of them where it is short."""
    for elements in (*range(1, 3000), 3072, 65536, 100_001, 196_608, 10**6):
        groups, width = (elements + 3) // 4, tiles.groups_of_tile(elements, block)
        assert width & (width - 1) == 0 and 4 * width <= block
        assert -groups % width <= 0.125 * groups if groups >= 57 else -groups % width < groups


def test_a_backend_says_what_it_cannot_do():
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"triton serves torch\.float32, .*and this is torch\.float64"):
        ops.reverse_step(x, x, VP, backend="triton")
    with pytest.raises(RuntimeError, match=r"and this is torch\.float64"):
        ops.log_prob_and_gradient(x.float(), x, family="gaussian", scale=1.0, backend="triton")
    with pytest.raises(RuntimeError, match="triton has no kernel for resample"):
        ops.resample(torch.zeros(3, device=DEVICE), backend="triton")
