"""`propose_and_weigh` against float64 normal densities of ``torch.distributions``, the sum of a million terms
against ``math.fsum``, and the identity that makes it a weight: its mean under the proposal is 1."""

from __future__ import annotations

import importlib.util
import itertools
import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal

from fastguide import ops, reference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LEVELS = {
    "vp": (0.6, 0.8, 0.8, 0.6, 0.35),
    "ve": (1.0, 3.0, 1.0, 1.25, 1.1),
    "flow from noise": (0.0, 1.0, 0.125, 0.875, 0.875),
    "small tau": (0.8, 0.6, 0.81, 0.586, 1e-3),
}
BACKENDS = ("reference", "cpu", *(("triton",) if importlib.util.find_spec("triton") else ()))
COUNTER = dict(seed=2**64 - 2, step=3, stream=1, first_particle=10)


def inputs(shape, dtype=torch.float64, push: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, x0_hat, displacement = torch.randn(3, *shape, generator=generator, dtype=torch.float64).unbind(0)
    log_weights = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return x.to(dtype), x0_hat.to(dtype), (push * displacement).to(dtype), log_weights


def expectation(x, x0_hat, displacement, log_weights, coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected result in float64, with densities of torch.distributions. Coefficients are floats, ``tau > 0``."""
    alpha_t, sigma_t, alpha_s, sigma_s, tau = coefficients
    x, x0_hat, displacement = (v.double().flatten(1) for v in (x, x0_hat, displacement))
    eps_hat = (x - alpha_t * x0_hat) / sigma_t
    mean = alpha_s * x0_hat + math.sqrt(sigma_s**2 - tau**2) * eps_hat
    x_s = mean + displacement + tau * ops.randn(x.shape, dtype=torch.float64, **COUNTER)
    ratio = Normal(mean, tau).log_prob(x_s) - Normal(mean + displacement, tau).log_prob(x_s)
    return x_s, log_weights.double().flatten() + ratio.sum(1)


# --- the formula --------------------------------------------------------------------------------------------


# In the dtypes of the arithmetic. test_propose_and_weigh_kernel.py tests all dtypes.
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(7,), (4, 3, 2, 7), (2, 1009)])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_against_normal_densities(levels, shape, dtype, assert_close):
    coefficients = LEVELS[levels]
    tau = coefficients[4]
    x, x0_hat, displacement, log_weights = inputs(shape, dtype, push=0.5 * tau)
    x_s, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, coefficients, **COUNTER)
    columns = (v.reshape(shape[0], -1) for v in (x, x0_hat, displacement))
    expected_x, expected_weights = expectation(*columns, log_weights, coefficients)
    assert x_s.dtype == dtype and x_s.shape == shape
    assert_close(x_s.reshape(shape[0], -1), expected_x, 2.0)
    # delta and z are float32, or float64, for any dtype of the state
    eps = 2e-15 if dtype == torch.float64 else 3e-7
    if dtype == torch.float64 and levels == "small tau":
        eps = 1e-12  # the error of the expectation, which subtracts two quadratics
    torch.testing.assert_close(weights, expected_weights, rtol=eps, atol=eps * math.sqrt(math.prod(shape[1:])))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_per_sample_coefficients_and_rows_without_noise(dtype, assert_close):
    rows = [*LEVELS.values(), (0.8, 0.6, 1.0, 0.0, 0.0), (0.6, 0.8, 0.8, 0.6, 0.0)]
    columns = tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    x, x0_hat, displacement, log_weights = inputs((len(rows), 11), dtype)
    displacement = displacement * columns[4].clamp(max=1.0)[:, None].to(dtype)
    displacement[4:] = 0.5  # ignored where tau = 0
    x_s, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, columns, **COUNTER)
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        counter = {**COUNTER, "first_particle": COUNTER["first_particle"] + i}
        expected_x, expected_weights = ops.propose_and_weigh(
            x[one], x0_hat[one], displacement[one], log_weights[one], row, **counter
        )
        assert_close(x_s[one], expected_x)
        assert_close(weights[one], expected_weights, 10.0)
    assert torch.equal(weights[4:], log_weights[4:])
    assert_close(x_s[4], x0_hat[4])  # the last step, to alpha = 1 and sigma = 0
    assert torch.isfinite(x_s).all()


# A tile of several rows, and a row of several programs. Triton's interpreter is slow.
@pytest.mark.parametrize("shape", [(6, 7), (6, 9000)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_extra_variance_widens_the_noise_and_leaves_the_mean(shape, per_sample, backend):
    """Four variances by hand; those that are negative or NaN are none."""
    x, x0_hat, displacement, log_weights = inputs(shape, torch.float32, push=0.1)
    alpha_t, sigma_t, alpha_s, sigma_s, tau = coefficients = LEVELS["vp"]
    if per_sample:
        coefficients = tuple(torch.full((6,), value, dtype=torch.float64) for value in coefficients)
    variance = torch.tensor([-0.5, 0.0, 0.4, math.nan, -2.0, 1.0])
    x_s, weights = ops.propose_and_weigh(
        x, x0_hat, displacement, log_weights, coefficients, extra_variance=variance, extra_variance_scale=-0.3,
        backend=backend, **COUNTER,
    )  # fmt: skip
    wide = torch.tensor([tau**2 + v for v in (0.15, 0.0, 0.0, 0.0, 0.6, 0.0)], dtype=torch.float64).sqrt()[:, None]
    ahead = math.sqrt(sigma_s**2 - tau**2) / sigma_t
    mean = alpha_s * x0_hat.double() + ahead * (x.double() - alpha_t * x0_hat.double())
    z = ops.randn(shape, dtype=torch.float64, **COUNTER)
    torch.testing.assert_close(x_s.double(), mean + displacement.double() + wide * z, rtol=1e-6, atol=2e-6)
    delta = displacement.double() / wide
    torch.testing.assert_close(weights, log_weights - (delta * (z + delta / 2)).sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_extra_variance_makes_noise_where_there_was_none(backend):
    x, x0_hat, displacement, log_weights = inputs((2, 9), torch.float32)
    last = (0.8, 0.6, 1.0, 0.0, 0.0)
    flags = torch.zeros(3, dtype=torch.int32)
    displacement[1] = math.inf
    x_s, weights = ops.propose_and_weigh(
        x, x0_hat, displacement, log_weights, last, extra_variance=torch.tensor([4.0, 0.0]), not_finite=flags,
        backend=backend, **COUNTER,
    )  # fmt: skip
    z = ops.randn((2, 9), **COUNTER)
    torch.testing.assert_close(x_s[0], x0_hat[0] + displacement[0] + 2 * z[0])
    torch.testing.assert_close(x_s[1], x0_hat[1])  # its displacement is left out
    assert weights[1] == log_weights[1] and weights[0] != log_weights[0] and flags.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(extra_variance=torch.ones(3)), r"extra_variance: expected a floating tensor \[2\] on cpu, got .* \[3\]"),
        (dict(extra_variance=torch.ones(2, dtype=torch.int64)), "extra_variance: expected a floating tensor"),
        (dict(extra_variance=0.5), "extra_variance: expected a floating tensor"),
        (
            dict(extra_variance=torch.ones(2, requires_grad=True)),
            "extra_variance: expected a tensor that needs no grad",
        ),
        (dict(extra_variance_scale=math.inf), "extra_variance_scale: expected a finite number, got inf"),
    ],
)
def test_a_bad_extra_variance_is_named(bad, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.propose_and_weigh(*inputs((2, 3)), LEVELS["vp"], seed=0, **bad)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_noise_it_is_the_base_step(dtype, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("drew noise")

    monkeypatch.setattr(reference, "randn", refuse)
    x, x0_hat, displacement, log_weights = inputs((3, 5), dtype)
    for coefficients in ((0.8, 0.6, 1.0, 0.0, 0.0), (0.6, 0.8, 0.8, 0.6, 0.0)):
        x_s, weights = ops.propose_and_weigh(
            x, x0_hat, displacement, log_weights, coefficients, seed=1, backend="reference"
        )
        assert torch.equal(x_s, ops.reverse_step(x, x0_hat, coefficients, prediction="sample", backend="reference"))
        assert torch.equal(weights, log_weights) and weights.data_ptr() != log_weights.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_state_is_that_of_reverse_step(dtype, assert_close):
    x, x0_hat, displacement, log_weights = inputs((3, 50), dtype)
    x_s, _ = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, LEVELS["vp"], **COUNTER)
    expected = ops.reverse_step(x, x0_hat, LEVELS["vp"], prediction="sample", displacement=displacement, **COUNTER)
    assert_close(x_s, expected)


def test_no_displacement_no_weight():
    x, x0_hat, displacement, log_weights = inputs((3, 50), torch.float32)
    _, weights = ops.propose_and_weigh(x, x0_hat, 0 * displacement, log_weights, LEVELS["vp"], **COUNTER)
    assert torch.equal(weights, log_weights)


# --- the reduction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 10, 1003, 1_000_000])
def test_large_states_lose_nothing(elements):
    """Against ``math.fsum``. A float32 running sum of a million terms would be wrong by 1e-2 here. The tolerance allows
    the rounding of float32 terms and of a tree of float32 sums."""
    x, x0_hat, displacement, log_weights = inputs((2, elements), torch.float32, push=0.01)
    tau = 0.25  # a power of two, so that delta is exact
    _, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, (0.6, 0.8, 0.8, 0.6, tau), **COUNTER)
    z = ops.randn(x.shape, **COUNTER).double().numpy()
    delta = (displacement / tau).double().numpy()
    for i in range(2):
        ratio = -math.fsum(delta[i] * z[i] + 0.5 * delta[i] ** 2)
        magnitude = math.fsum(abs(delta[i] * z[i]))
        allowed = 2e-7 * math.sqrt(magnitude) + 2**-23 * abs(ratio) + 1e-8
        assert abs(float(weights[i]) - float(log_weights[i]) - ratio) < allowed


def test_no_cancellation_of_large_quadratics():
    """With 300,000 elements and tau = 1e-3 each log-density is about 2e6, and their difference is about 1."""
    x, x0_hat, displacement, log_weights = inputs((1, 300_000), torch.float32, push=1e-6)
    coefficients = LEVELS["small tau"]
    _, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, coefficients, **COUNTER)
    z = ops.randn(x.shape, **COUNTER).double()
    delta = displacement.double() / coefficients[4]
    expected = float(log_weights[0]) - math.fsum((delta * (z + 0.5 * delta)).flatten().tolist())
    assert abs(float(weights[0]) - expected) < 1e-6


# --- shapes and memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6), (6, 1), (1, 2, 3)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_log_weights_of_any_shape(shape, dtype):
    x, x0_hat, displacement, log_weights = inputs((6, 9), torch.float32)
    flat = ops.propose_and_weigh(x, x0_hat, displacement, log_weights.to(dtype), LEVELS["vp"], **COUNTER)
    shaped = log_weights.to(dtype).reshape(shape)
    got = ops.propose_and_weigh(x, x0_hat, displacement, shaped, LEVELS["vp"], **COUNTER)
    assert got[1].shape == shape and got[1].dtype == dtype
    assert torch.equal(got[0], flat[0]) and torch.equal(got[1].flatten(), flat[1])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,), (1, 1)])
def test_empty_and_smallest(shape):
    x, x0_hat, displacement, log_weights = inputs(shape, torch.float32)
    x_s, weights = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, LEVELS["vp"], **COUNTER)
    assert x_s.shape == shape
    if x.numel() == 0:
        assert torch.equal(weights, log_weights)  # nothing was displaced
    else:
        _, expected = expectation(x, x0_hat, displacement, log_weights, LEVELS["vp"])
        torch.testing.assert_close(weights, expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_non_contiguous_inputs_that_stay_as_they_are(dtype):
    x, x0_hat, displacement, log_weights = inputs((6, 4, 5), dtype)
    log_weights = log_weights.reshape(2, 3)
    expected = ops.propose_and_weigh(x, x0_hat, displacement, log_weights, LEVELS["ve"], **COUNTER)
    turned = [v.transpose(0, 2).contiguous().transpose(0, 2) for v in (x, x0_hat, displacement)]
    turned.append(log_weights.T.contiguous().T)
    before = [v.clone() for v in turned]
    got = ops.propose_and_weigh(*turned, LEVELS["ve"], **COUNTER)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
        a.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(turned, before, strict=True))


def test_channels_that_come_last_stay_there():
    *states, log_weights = inputs((6, 4, 5, 3), torch.float32)
    expected = ops.propose_and_weigh(*states, log_weights, LEVELS["ve"], **COUNTER)
    last = [v.contiguous(memory_format=torch.channels_last) for v in states]
    x_s, weights = ops.propose_and_weigh(*last, log_weights, LEVELS["ve"], **COUNTER)
    assert torch.equal(x_s, expected[0]) and torch.equal(weights, expected[1])
    assert x_s.is_contiguous(memory_format=torch.channels_last)


def test_the_bits_do_not_depend_on_threads_or_chunks(threads):
    x, x0_hat, displacement, log_weights = inputs((5, 10_001), torch.float32)
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(ops.propose_and_weigh(x, x0_hat, displacement, log_weights, LEVELS["vp"], **COUNTER))
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        counter = {**COUNTER, "first_particle": COUNTER["first_particle"] + rows.start}
        parts.append(
            ops.propose_and_weigh(x[rows], x0_hat[rows], displacement[rows], log_weights[rows], LEVELS["vp"], **counter)
        )
    results.append(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    for x_s, weights in results[1:]:
        assert torch.equal(x_s, results[0][0])
        assert torch.equal(weights, results[0][1])


# --- what makes it a weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ("vp", "ve", "flow from noise"))
@pytest.mark.parametrize("push", (0.05, 0.2))
def test_mean_of_the_ratio_under_the_proposal_is_one(levels, push):
    """``E_q[p / q] = 1`` for any displacement, with 200,000 proposals from one state. The importance-weighted mean of
    x_s is that of the base kernel."""
    number, elements = 200_000, 6
    x, x0_hat, displacement, _ = inputs((1, elements), torch.float32, push=push * LEVELS[levels][4] / 0.35)
    many = [v.expand(number, elements) for v in (x, x0_hat, displacement)]
    x_s, log_ratio = ops.propose_and_weigh(*many, torch.zeros(number, dtype=torch.float64), LEVELS[levels], seed=5)
    ratio = log_ratio.exp()
    error = float(ratio.std()) / math.sqrt(number)
    assert error < 0.01
    assert abs(float(ratio.mean()) - 1.0) < 4 * error
    base = ops.reverse_step(x, x0_hat, LEVELS[levels], prediction="sample", seed=5)
    base = base - LEVELS[levels][4] * ops.randn((1, elements), seed=5)  # the mean of the base kernel
    weighted = ratio[:, None] * (x_s - base).double()
    errors = weighted.std(0) / math.sqrt(number)
    assert (weighted.mean(0).abs() < 4 * errors).all()


# --- errors -------------------------------------------------------------------------------------------------

X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=X.int()), TypeError, "x: expected one of float32"),
        (dict(x0_hat=X[:2]), ValueError, r"x0_hat: expected shape \[4, 3\]"),
        (dict(displacement=None), TypeError, "displacement: expected a tensor, got NoneType"),
        (dict(log_weights=torch.zeros(3)), ValueError, r"log_weights: expected 4 .* values, got .* \[3\]"),
        (dict(log_weights=torch.zeros(4).half()), ValueError, "log_weights: .* got torch.float16"),
        (
            dict(log_weights=torch.zeros(4, device="meta")),
            ValueError,
            "log_weights: expected a tensor on cpu",
        ),
        (dict(coefficients=(0.6, 0.8, 0.8, 0.6, 0.7)), ValueError, "coefficients: expected tau <= sigma_s"),
        (dict(seed=2**64), ValueError, "seed: expected an integer"),
        (dict(backend="cpu!"), ValueError, "backend: expected one of"),
    ],
)
def test_errors(changes, error, message):
    arguments = dict(x=X, x0_hat=X, displacement=X, log_weights=torch.zeros(4), coefficients=LEVELS["vp"], seed=0)
    with pytest.raises(error, match=message):
        ops.propose_and_weigh(**{**arguments, **changes})


def test_there_is_no_derivative():
    x, needy = torch.ones(4, 3), torch.ones(4, 3, requires_grad=True)
    weights = torch.zeros(4, requires_grad=True)
    call = partial(ops.propose_and_weigh, coefficients=(0.5, 0.8, 0.9, 0.4, 0.3), seed=0)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="x0_hat, log_weights: expected tensors that need no gradient"):
            call(x, needy, x, weights, backend=backend)
    with pytest.raises(ValueError, match="coefficients: expected tensors that need no gradient"):
        call(x, x, x, weights.detach(), coefficients=(torch.full((4,), 0.5, requires_grad=True), 0.8, 0.9, 0.4, 0.3))
    with torch.no_grad():
        x_s, after = call(x, needy, x, weights)
    assert not x_s.requires_grad and not after.requires_grad


# --- the clip and the displacement's scale ------------------------------------------------------------------


SCALED = {
    "reverse_step": lambda x, x0, d, w, levels, **options: (
        ops.reverse_step(x, x0, levels, prediction="sample", displacement=d, seed=3, **options),
    ),
    "propose_and_weigh": lambda x, x0, d, w, levels, **options: ops.propose_and_weigh(
        x, x0, d, w, levels, seed=3, **options
    ),
}
CLIPS = (None, 0.7, (-0.4, 0.9), ops.DynamicThreshold(0.9, 3.0))


# 5: multipliers of each element. 40: of each row. 2500: two tiles. bfloat16 is converted as every dtype but x's own.
# Triton's tiles are as wide as a row is long, up to a power of two: 67 elements are three tiles of 32, and one dtype is
# enough of them, since its interpreter is slow.
@pytest.mark.parametrize(
    ("backend", "dtype", "elements"),
    [
        *itertools.product(("cpu", "reference"), (torch.float64, torch.float32, torch.bfloat16), (5, 40, 2500)),
        *(("triton", dtype, elements) for dtype in (torch.float32, torch.bfloat16) for elements in (5, 40)),
        ("triton", torch.float32, 67),
    ],
)
@pytest.mark.parametrize("name", SCALED)
def test_clip_and_scale_are_those_made_before(name, backend, dtype, elements, assert_close):
    """Equal to the step with a prediction and a displacement that were clipped and scaled before, in float64."""
    if reason := ops._operation.why_not(backend, name, device=torch.device("cpu"), dtype=dtype):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    x, x0, d = torch.randn(3, 4, elements, generator=generator, dtype=torch.float64).to(dtype).unbind()
    d, w = 0.1 * d, torch.randn(4, generator=generator, dtype=torch.float64)
    call, scales = SCALED[name], torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
    noise = torch.tensor([0.35, 0.0, 0.2, 0.35], dtype=torch.float64)
    one, each = (0.6, 0.8, 0.8, 0.6, 0.35), (0.6, 0.8, 0.8, 0.6, noise)
    for clip, scale, levels in zip(CLIPS, (-1.5, scales, scales, -1.5), (one, each, one, each), strict=True):
        got = call(x, x0, d, w, levels, clip=clip, displacement_scale=scale, backend=backend)
        moved = d.double() * torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1)
        clipped = reference.clip_x0(x0.double(), clip)
        expected = call(x.double(), clipped, moved, w, levels, backend="reference")
        assert got[0].dtype == dtype
        assert_close(got[0], expected[0], 8.0)
        if len(got) == 2:
            torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5 * elements**0.5)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_scale_of_a_displacement_that_the_noise_of_a_dynamic_threshold_shares(backend, assert_close):
    """With ``clip_noise=False`` the kernel adds the displacement to the part that is not clipped."""
    generator = torch.Generator().manual_seed(0)
    x, x0, d = torch.randn(3, 4, 33, generator=generator).unbind()
    levels, clip = (0.6, 0.8, 0.8, 0.6, 0.35), ops.DynamicThreshold(0.8, 3.0)
    options = dict(clip=clip, clip_noise=False, prediction="v", seed=1)
    got = ops.reverse_step(x, x0, levels, displacement=d, displacement_scale=-1.5, backend=backend, **options)
    wide = dict(displacement=-1.5 * d.double(), backend="reference")
    assert_close(got, ops.reverse_step(x.double(), x0.double(), levels, **wide, **options), 8.0)


@pytest.mark.parametrize("per_sample", (False, True))
def test_gradcheck_with_a_scale(per_sample):
    generator = torch.Generator().manual_seed(0)
    x, x0, d = (v.requires_grad_() for v in torch.randn(3, 2, 3, generator=generator, dtype=torch.float64).unbind())
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    levels = (0.6, 0.8, 0.8, 0.6, 0.35)

    def f(x, x0, d, *scales):
        scale = scales[0] if scales else -1.5
        return ops.reverse_step(x, x0, levels, displacement=d, displacement_scale=scale, clip=0.9)

    assert torch.autograd.gradcheck(f, (x, x0, d, scale) if per_sample else (x, x0, d))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(displacement_scale=math.nan), ValueError, "displacement_scale: expected a finite number, got nan"),
        (
            dict(displacement_scale=torch.tensor([1.0, math.inf])),
            ValueError,
            "displacement_scale: expected finite values",
        ),
        (dict(displacement_scale=torch.ones(3)), ValueError, "displacement_scale: expected a number or a floating"),
        (dict(clip=-1.0), ValueError, "clip: expected a number > 0"),
    ],
)
def test_errors_of_clip_and_scale(name, options, error, words):
    x = torch.zeros(2, 3)
    with pytest.raises(error, match=words):
        SCALED[name](x, x, x, torch.zeros(2), (0.6, 0.8, 0.8, 0.6, 0.35), **options)


def test_a_scale_without_a_displacement_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"displacement_scale: expected 1 without a displacement, got 2\.0"):
        ops.reverse_step(x, x, (0.6, 0.8, 0.8, 0.6, 0.35), displacement_scale=2.0)
