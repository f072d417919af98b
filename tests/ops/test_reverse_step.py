"""`reverse_step` against Bayes' rule, derived here in float64, and against diffusers.

Expectations use nothing from the package except `randn`, which has its own tests.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguide import ops, reference
from fastguide.ops import DynamicThreshold
from fastguide.ops.reverse_step.reference import neighbours

PREDICTIONS = ("epsilon", "sample", "score", "v", "flow")
CLIPS = (None, 0.7, (-0.4, 0.9), DynamicThreshold(0.9, 3.0), DynamicThreshold())
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# (alpha_t, sigma_t), (alpha_s, sigma_s) for each kind of schedule
LEVELS = {
    "vp": ((0.6, 0.8), (0.8, 0.6)),
    "ve": ((1.0, 3.0), (1.0, 1.25)),
    "flow": ((0.25, 0.75), (0.5, 0.5)),
    "last": ((0.8, 0.6), (1.0, 0.0)),
    "flow from noise": ((0.0, 1.0), (0.125, 0.875)),
    "vp from noise": ((0.0, 1.0), (0.28, 0.96)),
}

STEP = (0.6, 0.8, 0.8, 0.6, 0.35)


# --- the expectation ----------------------------------------------------------------------------------------


def x0_by_solving(x, output, alpha: float, sigma: float, prediction: str) -> np.ndarray:
    """``x_0`` from two linear equations for ``(x_0, eps)``: the definition of ``x_t``, and the network's output."""
    said = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "score": (0.0, -1.0 / sigma),
        "v": (-sigma, alpha),
        "flow": (-1.0, 1.0),
    }[prediction]
    system = np.array([[alpha, sigma], said])
    return np.linalg.solve(system, np.stack([x.ravel(), output.ravel()]))[0].reshape(x.shape)


def clip_by_hand(x0: np.ndarray, clip) -> np.ndarray:
    if clip is None:
        return x0
    if isinstance(clip, DynamicThreshold):
        rows = x0.reshape(x0.shape[0], -1)
        bound = np.quantile(np.abs(rows), clip.ratio, axis=1, keepdims=True)
        bound = np.minimum(np.maximum(bound, 1.0), clip.max_value)
        return (np.clip(rows, -bound, bound) / bound).reshape(x0.shape)
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    return np.clip(x0, low, high)


def posterior(t, s) -> tuple[float, float, float]:
    """``a, b, variance`` of ``q(x_s | x_t, x_0) = N(a x_t + b x_0, variance)``, by Bayes' rule from ``x_s | x_0 ~
    N(alpha_s x_0, sigma_s^2)`` and the Markov kernel ``x_t | x_s ~ N(k x_s, v)``."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = t, s
    k = alpha_t / alpha_s
    v = sigma_t**2 - k**2 * sigma_s**2
    if sigma_s == 0.0:  # x_s is alpha_s x_0
        return 0.0, alpha_s, 0.0
    precision = 1.0 / sigma_s**2 + k**2 / v
    return (k / v) / precision, (alpha_s / sigma_s**2) / precision, 1.0 / precision


def coefficients_of(t, s, eta: float) -> tuple[float, float, float, float, float]:
    return (*t, *s, eta * math.sqrt(posterior(t, s)[2]))


def mean_by_hand(x: np.ndarray, x0: np.ndarray, t, s, eta: float) -> np.ndarray:
    """Bayes' rule for ``eta = 1``. For less noise, the mean ``a x_t + b x_0`` that keeps the marginals (Song, Meng,
    Ermon 2021): ``x_t = alpha_t x_0 + sigma_t eps`` must lead to ``N(alpha_s x_0, sigma_s^2)``, so
    ``a alpha_t + b = alpha_s`` and ``(a sigma_t)^2 + tau^2 = sigma_s^2``."""
    a, b, variance = posterior(t, s)
    if eta != 1.0:
        a = math.sqrt(s[1] ** 2 - eta**2 * variance) / t[1]
        b = s[0] - a * t[0]
    return a * x + b * x0


def inputs(shape, dtype=torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, output, displacement = torch.randn(3, *shape, generator=generator, dtype=torch.float64).unbind(0)
    return x.to(dtype), output.to(dtype), (0.3 * displacement).to(dtype)


# --- the formula --------------------------------------------------------------------------------------------


DETERMINED = [
    (prediction, levels)
    for prediction, levels in itertools.product(PREDICTIONS, LEVELS)
    if LEVELS[levels][0][0] > 0.0 or prediction not in ("epsilon", "score")
]


# In the dtypes of the arithmetic. test_reverse_step_kernel.py tests narrower states, which add a rounding.
@pytest.mark.parametrize(("prediction", "levels"), DETERMINED)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_against_bayes_rule(prediction, levels, dtype, assert_close):
    t, s = LEVELS[levels]
    x, output, displacement = inputs((3, 2, 5), dtype)
    z = ops.randn(x.shape, seed=9, step=4, stream=2, first_particle=6, dtype=torch.float64).numpy()
    x64, output64 = x.double().numpy(), output.double().numpy()
    # at noisy levels x0_hat is several times as large as x, and so is the error of a step
    x0_raw = x0_by_solving(x64, output64, *t, prediction)
    scale = max(1.0, float(np.abs(x0_raw).max()))
    for clip, moved, eta in itertools.product(CLIPS, (False, True), (0.0, 0.5, 1.0)):
        coefficients = coefficients_of(t, s, eta)
        x_s, x0 = ops.reverse_step(
            x,
            output,
            coefficients,
            prediction=prediction,
            clip=clip,
            displacement=displacement if moved else None,
            seed=9,
            step=4,
            stream=2,
            first_particle=6,
            return_x0=True,
        )
        expected_x0 = clip_by_hand(x0_raw, clip)
        expected = mean_by_hand(x64, expected_x0, t, s, eta) + coefficients[4] * z
        if moved:
            expected = expected + displacement.double().numpy()
        assert x_s.dtype == x0.dtype == dtype
        assert_close(x0, torch.from_numpy(expected_x0), scale)
        assert_close(x_s, torch.from_numpy(expected), scale)


# The prediction changes the multipliers, and the clip changes the loop. In the two dtypes of the arithmetic.
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", (None, (-0.4, 0.9), DynamicThreshold(0.9, 3.0)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_per_sample_levels_equal_the_loop_over_samples(prediction, clip, dtype, assert_close):
    x, output, displacement = inputs((4, 3, 7), dtype)
    etas = {"vp": 1.0, "ve": 0.5, "flow": 0.0, "last": 1.0}
    rows = [coefficients_of(*LEVELS[name], eta) for name, eta in etas.items()]
    counter = dict(seed=5, step=1, stream=3)
    options = dict(prediction=prediction, clip=clip, return_x0=True, **counter)
    columns = tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    x_s, x0 = ops.reverse_step(x, output, columns, displacement=displacement, first_particle=8, **options)
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        expected = ops.reverse_step(
            x[one], output[one], row, displacement=displacement[one], first_particle=8 + i, **options
        )
        assert_close(x_s[one], expected[0])
        assert_close(x0[one], expected[1])


@pytest.mark.parametrize("kinds", [(1, 0, 0, 0, 0), (0, 0, 0, 0, 1), (1, 1, 0, 0, 1), (0, 1, 1, 1, 0)])
@pytest.mark.parametrize("coefficient_dtype", (torch.float32, torch.float64))
def test_floats_and_tensors_may_be_mixed(kinds, coefficient_dtype, assert_close):
    x, output, _ = inputs((3, 5), torch.float32)
    floats = coefficients_of(*LEVELS["vp"], 0.7)
    mixed = tuple(torch.full((3,), c, dtype=coefficient_dtype) if k else c for k, c in zip(kinds, floats, strict=True))
    assert_close(ops.reverse_step(x, output, mixed, seed=1), ops.reverse_step(x, output, floats, seed=1))


# --- classifier-free guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_guidance_against_the_step_from_the_guided_output(prediction, backend):
    """The guided output by its formula, in float64. Scale 1 is the conditional step, 0 the unconditional one."""
    x, output, displacement = inputs((4, 30))
    base = inputs((4, 30), seed=1)[0]
    coefficients = coefficients_of(*LEVELS["vp"], 0.5)
    options = dict(prediction=prediction, clip=0.7, displacement=displacement, seed=3, return_x0=True, backend=backend)
    each = torch.tensor([-1.0, 0.0, 1.0, 7.5], dtype=torch.float64)
    for scale in (0.0, 1.0, 7.5, -2, torch.tensor(3.0), each):
        column = scale[:, None] if scale is each else float(scale)
        got = ops.reverse_step(x, output, coefficients, unconditional=base, guidance_scale=scale, **options)
        expected = ops.reverse_step(x, base + column * (output - base), coefficients, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("clip", (None, (-0.4, 0.9), DynamicThreshold(0.8, 3.0)))
@pytest.mark.parametrize("each", (False, True))
def test_gradients_with_guidance(clip, each):
    tensors = [v.requires_grad_() for v in (*inputs((2, 5), seed=3), inputs((2, 5), seed=4)[0])]
    scale = torch.tensor([2.5, -1.0], dtype=torch.float64, requires_grad=True) if each else 2.5

    def step(x, output, displacement, base, scale=2.5):
        options = dict(prediction="v", unconditional=base, guidance_scale=scale, clip=clip, displacement=displacement)
        return ops.reverse_step(x, output, STEP, **options, clip_noise=clip is None, seed=1, return_x0=True)

    assert torch.autograd.gradcheck(step, (*tensors, scale) if each else tensors)
    if not each:
        assert torch.autograd.gradgradcheck(step, tensors)


# --- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ("sample", "v", "flow"))
@pytest.mark.parametrize("eta", (0.0, 1.0))
def test_levels_of_pure_noise(prediction, eta):
    """With ``alpha_t = 0`` and ``sigma_t = 1``, x_t says nothing about x_0. Only the network does."""
    x, output, _ = inputs((2, 9))
    t, s = (0.0, 1.0), (0.28, 0.96)
    x_s, x0 = ops.reverse_step(x, output, coefficients_of(t, s, eta), prediction=prediction, seed=2, return_x0=True)
    expected_x0 = {"sample": output, "v": -output, "flow": x - output}[prediction]
    torch.testing.assert_close(x0, expected_x0, rtol=1e-14, atol=1e-14)
    # the posterior does not depend on x_t: x_s is the prediction plus noise of its level
    noise = ops.randn(x.shape, seed=2, dtype=torch.float64) if eta == 1.0 else x
    torch.testing.assert_close(x_s, s[0] * expected_x0 + s[1] * noise, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("prediction", ("epsilon", "score"))
def test_pure_noise_is_an_error_where_the_prediction_does_not_determine_x0(prediction):
    x, output, _ = inputs((2, 9))
    for alpha in (0.0, torch.tensor([0.5, 0.0])):
        with pytest.raises(ValueError, match=f"prediction: '{prediction}' does not determine x_0"):
            ops.reverse_step(x, output, (alpha, 1.0, 0.5, 0.5, 0.0), prediction=prediction)


# x0 depends on the prediction. Rounding to a dtype does not, so the dtypes need only one prediction.
@pytest.mark.parametrize(
    ("prediction", "dtype"),
    [*((p, torch.float32) for p in PREDICTIONS), *(("v", d) for d in FLOATS if d != torch.float32)],
)
def test_the_last_step_returns_x0(prediction, dtype, assert_close):
    x, output, displacement = inputs((2, 9), dtype)
    coefficients = (0.8, 0.6, 1.0, 0.0, 0.0)
    x_s, x0 = ops.reverse_step(x, output, coefficients, prediction=prediction, clip=0.5, return_x0=True)
    assert torch.equal(x_s, x0)
    moved = ops.reverse_step(x, output, coefficients, prediction=prediction, clip=0.5, displacement=displacement)
    assert_close(moved, x0.double() + displacement.double())


def test_large_noise_keeps_its_accuracy(assert_close):
    """From sigma 80 to 79.9 with eta = 1, where nearly all of x_t stays."""
    x, output, _ = inputs((2, 50), torch.float32)
    x = 80 * x
    t, s = (1.0, 80.0), (1.0, 79.9)
    x0 = x0_by_solving(x.double().numpy(), output.double().numpy(), *t, "sample")
    expected = mean_by_hand(x.double().numpy(), x0, t, s, 1.0)
    expected = expected + coefficients_of(t, s, 1.0)[4] * ops.randn(x.shape, seed=3).double().numpy()
    got = ops.reverse_step(x, output, coefficients_of(t, s, 1.0), prediction="sample", seed=3)
    assert_close(got, torch.from_numpy(expected), 2.0)


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_the_noise_is_tau_times_randn(dtype, assert_close):
    x, output, _ = inputs((4, 6, 3), dtype)
    *levels, tau = coefficients_of(*LEVELS["ve"], 0.8)
    shifted = (*levels[:3], math.sqrt(levels[3] ** 2 - tau**2), 0.0)  # the same mean, without noise
    counter = dict(seed=2**64 - 1, step=2**32 - 1, stream=7, first_particle=1000)
    noise = ops.reverse_step(x, output, (*levels, tau), **counter) - ops.reverse_step(x, output, shifted)
    z = ops.randn(x.shape, dtype=dtype, **counter)
    assert_close(noise, tau * z, 4.0)


def test_no_noise_is_drawn_where_tau_is_zero(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("drew noise")

    x, output, displacement = inputs((3, 4))
    monkeypatch.setattr(sys.modules["fastguide.ops.reverse_step.reference"], "randn", refuse)
    for coefficients in (coefficients_of(*LEVELS["vp"], 0.0), coefficients_of(*LEVELS["last"], 1.0)):
        ops.reverse_step(x, output, coefficients, displacement=displacement, backend="reference")
    with pytest.raises(AssertionError, match="drew noise"):
        ops.reverse_step(x, output, coefficients_of(*LEVELS["vp"], 1.0), backend="reference")


def test_rows_with_tau_zero_get_no_noise():
    x, output, _ = inputs((3, 4))
    tau = torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64)
    got = ops.reverse_step(x, output, (0.6, 0.8, 0.8, 0.6, tau), seed=1)
    quiet = ops.reverse_step(x, output, (0.6, 0.8, 0.8, 0.6, 0.0))
    torch.testing.assert_close(got[0::2], quiet[0::2], rtol=1e-14, atol=1e-14)
    assert (got[1] - quiet[1]).abs().min() > 1e-4


# --- shapes and memory --------------------------------------------------------------------------------------


# At either end, in the upper half and the lower one, between two values and at one; of one value, two, few and many.
@pytest.mark.parametrize("ratio", (0.0, 0.2, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("elements", (1, 2, 7, 1001))
def test_neighbours_of_a_quantile_are_those_of_a_sort(ratio, elements):
    values = torch.randn(3, elements, generator=torch.Generator().manual_seed(0)).abs()
    values[1, elements // 2] = math.nan  # above all others
    values[2] = values[2].round()  # ties
    found, places, between = neighbours(values, ratio)
    rank = ratio * (elements - 1)
    expected = values.sort(dim=1).values[:, [int(rank), min(int(rank) + 1, elements - 1)]]
    for ours in (found, values.gather(1, places)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert between == rank - int(rank)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_dynamic_threshold_sorts_its_state():
    """A GPU sorts in many passes, and selects in few. Its kthvalue has no deterministic form."""
    x, output = torch.randn(2, 2, 99, generator=torch.Generator().manual_seed(0))
    clip = DynamicThreshold(0.9, 3.0)
    with Names() as forward:
        reference.reverse_step(x, output, STEP, clip=clip)
    with Names() as backward:
        reference.reverse_step_vjp(x, None, x, output, STEP, "epsilon", clip)
    for names in (forward.found, backward.found):
        assert "topk" in names and not names & {"sort", "argsort", "kthvalue"}


@pytest.mark.parametrize("clip", (None, DynamicThreshold(0.9, 3.0)))  # the threshold needs a whole particle
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (5,), (1, 1), (3, 1009), (2, 3, 5, 7)])
@pytest.mark.parametrize("per_sample", (False, True))
def test_odd_shapes(shape, clip, per_sample, assert_close):
    x, output, displacement = inputs(shape, torch.float32)
    t, s = LEVELS["vp"]
    coefficients = coefficients_of(t, s, 1.0)
    if per_sample:
        coefficients = tuple(torch.full(shape[:1], c) for c in coefficients)
    options = dict(clip=clip, displacement=displacement, seed=3, return_x0=True)
    x_s, x0 = ops.reverse_step(x, output, coefficients, **options)
    assert x_s.shape == x0.shape == shape
    if x.numel() == 0:
        return
    rows = (shape[0], -1)
    x64, output64 = (v.double().numpy().reshape(rows) for v in (x, output))
    expected_x0 = clip_by_hand(x0_by_solving(x64, output64, *t, "epsilon"), clip)
    z = ops.randn(shape, seed=3, dtype=torch.float64).reshape(rows).numpy()
    expected = mean_by_hand(x64, expected_x0, t, s, 1.0) + coefficients_of(t, s, 1.0)[4] * z
    assert_close(x0.reshape(rows), torch.from_numpy(expected_x0), 3.0)
    assert_close(x_s.reshape(rows), torch.from_numpy(expected) + displacement.double().reshape(rows), 3.0)


def strided(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another layout; ``tensor`` ``[N, C, H, W]``."""
    if name == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if name == "transposed":
        return tensor.transpose(0, 3).contiguous().transpose(0, 3)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("layout", ("channels last", "transposed", "every other"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))  # read in place, and converted
@pytest.mark.parametrize("eta, clip", ((1.0, None), (0.0, None), (0.0, DynamicThreshold(0.9, 3.0))))
def test_non_contiguous_inputs(layout, dtype, eta, clip):
    x, output, displacement = inputs((3, 4, 5, 6), dtype)
    options = dict(prediction="v", clip=clip, seed=1, return_x0=True)
    coefficients = coefficients_of(*LEVELS["vp"], eta)
    expected = ops.reverse_step(x, output, coefficients, displacement=displacement, **options)
    got = ops.reverse_step(
        strided(layout, x),
        strided(layout, output),
        coefficients,
        displacement=strided(layout, displacement),
        **options,
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous(
            memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_stay_as_they_are_and_share_nothing_with_the_results(dtype):
    tensors = inputs((2, 6), dtype)
    before = [v.clone() for v in tensors]
    x, output, _ = tensors
    for clip in (None, 0.5):
        results = ops.reverse_step(x, output, (0.6, 0.8, 1.0, 0.0, 0.0), prediction="sample", clip=clip, return_x0=True)
        for result in results:
            result.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_other_dtypes_beside_x(assert_close):
    x, output, displacement = inputs((2, 30))
    coefficients = coefficients_of(*LEVELS["vp"], 0.5)
    expected = ops.reverse_step(x, output.half().double(), coefficients, displacement=displacement, seed=1)
    got = ops.reverse_step(x.float(), output.half(), coefficients, displacement=displacement, seed=1)
    assert got.dtype == torch.float32
    assert_close(got, expected, 2.0)


# --- gradients ----------------------------------------------------------------------------------------------


# Each prediction has two factors. Each kind of clip has its own derivative, for both values of clip_noise.
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("clip", "clip_noise"),
    [(None, True), *itertools.product(((-0.4, 0.9), DynamicThreshold(0.8, 3.0)), (True, False))],
)
@pytest.mark.parametrize("per_sample", (False, True))
def test_gradients(prediction, clip, clip_noise, per_sample):
    tensors = tuple(v.requires_grad_() for v in inputs((2, 5), seed=3))
    coefficients = coefficients_of(*LEVELS["vp"], 0.5)
    if per_sample:
        rows = (coefficients, coefficients_of(*LEVELS["flow"], 1.0))
        coefficients = tuple(torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))

    def step(x, output, displacement):
        return ops.reverse_step(
            x,
            output,
            coefficients,
            prediction=prediction,
            clip=clip,
            clip_noise=clip_noise,
            displacement=displacement,
            seed=1,
            return_x0=True,
        )

    assert torch.autograd.gradcheck(step, tensors)


# --- diffusers ----------------------------------------------------------------------------------------------

STEPS, SEED = 10, 77
KINDS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}  # diffusers' names, and ours
TO_ROUNDING = {torch.float64: 1e-14, torch.float32: 5e-6}  # relative to the largest value, over a whole trajectory


def supplied(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A start, and outputs of a network for every step. They are images, since diffusers thresholds over three axes."""
    x, *outputs = torch.randn(
        STEPS + 1, 3, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    return x, outputs


def noise_of_step(i: int, x: torch.Tensor) -> torch.Tensor:
    return ops.randn(x.shape, seed=SEED, step=i, dtype=x.dtype)


def assert_same_trajectories(ours: list, theirs: list) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < TO_ROUNDING[a.dtype], f"step {i}: {error:.1e}"


def table_levels(scheduler, timesteps, previous) -> list:
    """The levels ``(t, s)`` of each step, each as ``(alpha, sigma)``, from diffusers' ``alphas_cumprod``."""

    def level(index: int) -> tuple[float, float]:
        bar = float(scheduler.alphas_cumprod[index]) if index >= 0 else 1.0
        return math.sqrt(bar), math.sqrt(1.0 - bar)

    return [(level(t), level(previous(t))) for t in timesteps]


def ours_over(levels, x, outputs, *, etas, **options) -> list:
    states = []
    for i, ((t, s), output, eta) in enumerate(zip(levels, outputs, etas, strict=True)):
        x = ops.reverse_step(x, output, coefficients_of(t, s, eta), seed=SEED, step=i, **options)
        states.append(x)
    return states


DDIM_SETTINGS = {
    "plain": (dict(clip_sample=False), None),
    "clip": (dict(clip_sample=True, clip_sample_range=0.8), 0.8),
    "threshold": (
        dict(clip_sample=False, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0),
        DynamicThreshold(0.9, 3.0),
    ),
    "zero terminal snr": (
        dict(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        None,
    ),
}


# Left out: clip_noise without a clip has no effect; "epsilon" does not determine x_0 where the terminal SNR is zero.
DDIM_CASES = [
    (setting, kind, eta, clip_noise)
    for setting, kind, eta, clip_noise in itertools.product(DDIM_SETTINGS, KINDS, (0.0, 0.9), (True, False))
    if (clip_noise or DDIM_SETTINGS[setting][1]) and (setting != "zero terminal snr" or kind != "epsilon")
]


# For float32 see the test of DDPM below.
@pytest.mark.parametrize(("setting", "kind", "eta", "clip_noise"), DDIM_CASES)
def test_diffusers_ddim(setting, kind, eta, clip_noise):
    diffusers = pytest.importorskip("diffusers")
    options, clip = DDIM_SETTINGS[setting]
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    x, outputs = supplied(torch.float64)
    levels = table_levels(scheduler, timesteps, lambda t: t - 1000 // STEPS)
    options = dict(prediction=KINDS[kind], clip=clip, clip_noise=clip_noise)
    ours = ours_over(levels, x, outputs, etas=[eta] * STEPS, **options)
    theirs = []
    for i, (t, output) in enumerate(zip(timesteps, outputs, strict=True)):
        x = scheduler.step(
            output, t, x, eta=eta, use_clipped_model_output=clip_noise, variance_noise=noise_of_step(i, x)
        ).prev_sample
        theirs.append(x)
    assert_same_trajectories(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", (None, 0.8))
@pytest.mark.parametrize("dtype", TO_ROUNDING)
def test_diffusers_ddpm(kind, clip, dtype, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        prediction_type=kind,
        variance_type="fixed_small",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    if dtype == torch.float64:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    x, outputs = supplied(dtype)
    levels = table_levels(scheduler, timesteps, lambda t: t - 1000 // STEPS)
    ours = ours_over(levels, x, outputs, etas=[1.0] * STEPS, prediction=KINDS[kind], clip=clip)
    assert_same_trajectories(ours, theirs_over(scheduler, timesteps, x, outputs, monkeypatch))


def theirs_over(scheduler, timesteps, x, outputs, monkeypatch) -> list:
    """diffusers' own loop, but with our noise instead of its generator's."""
    states = []
    for i, (t, output) in enumerate(zip(timesteps, outputs, strict=True)):
        noise = noise_of_step(i, x)
        module = type(scheduler).__module__
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, noise=noise, **kwargs: noise)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)  # only to avoid a warning
        x = scheduler.step(output, t, x).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("name", ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"))
@pytest.mark.parametrize("kind", ("epsilon", "v_prediction"))
@pytest.mark.parametrize("scaling", ("vp", "ve"))
def test_diffusers_euler(name, kind, scaling, monkeypatch):
    """For every table, diffusers' state is ``x / alpha_t`` at ``sigma = sigma_t / alpha_t``. It starts at
    ``init_noise_sigma``, not at 1. Our run has the VP levels ``alpha = (1 + sigma^2)^-1/2``, and its result is divided
    by ``alpha_s``; or it has diffusers' levels, with ``alpha = 1``. In the second case v, which is defined for VP, is
    first turned into ``eps``. The ancestral scheduler has eta = 1, the other one eta = 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(prediction_type=kind, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double().tolist()
    x, outputs = supplied(torch.float32)
    x = scheduler.init_noise_sigma * x
    alphas = [1.0 if scaling == "ve" else (1.0 + sigma**2) ** -0.5 for sigma in sigmas]
    levels = [(alpha, alpha * sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)]
    eta = 1.0 if "Ancestral" in name else 0.0
    theirs = theirs_over(scheduler, scheduler.timesteps, x, outputs, monkeypatch)

    ours, state = [], alphas[0] * x
    for i, output in enumerate(outputs):
        prediction = KINDS[kind]
        if scaling == "ve" and prediction == "v":  # v = alpha eps - sigma x_0 at the VP level
            vp = (1.0 + sigmas[i] ** 2) ** -0.5
            output, prediction = vp * (output + sigmas[i] * vp * state), "epsilon"
        coefficients = coefficients_of(levels[i], levels[i + 1], eta)
        state = ops.reverse_step(state, output, coefficients, prediction=prediction, seed=SEED, step=i)
        ours.append(state / alphas[i + 1])
    assert_same_trajectories(ours, theirs)


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_diffusers_flow_match_euler(stochastic, shift, monkeypatch):
    """The levels have ``alpha = 1 - sigma`` and start at ``alpha = 0``. diffusers' stochastic sampling draws all noise
    anew at each step: ``tau = sigma_s``."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double().tolist()
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    x, outputs = supplied(torch.float32)
    theirs = theirs_over(scheduler, scheduler.timesteps, x, outputs, monkeypatch)
    ours, state = [], x
    for i, output in enumerate(outputs):
        t, s = sigmas[i], sigmas[i + 1]
        coefficients = (1.0 - t, t, 1.0 - s, s, s if stochastic else 0.0)
        state = ops.reverse_step(state, output, coefficients, prediction="flow", seed=SEED, step=i)
        ours.append(state)
    assert_same_trajectories(ours, theirs)


# --- errors -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)
GOOD = dict(alpha_t=0.6, sigma_t=0.8, alpha_s=0.8, sigma_s=0.6, tau=0.1)


def bad(**changes) -> dict:
    return dict(coefficients=tuple({**GOOD, **changes}.values()))


# Each argument just outside its range, not finite or of another type or shape.
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (dict(x=X.long()), TypeError, "x: expected one of float32, .* got torch.int64"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x: expected shape \[N, \*event\], got a scalar"),
        (dict(model_output=X[:1]), ValueError, r"model_output: expected shape \[2, 3\], .* got \[1, 3\]"),
        (dict(model_output=X.to("meta")), ValueError, "model_output: expected a tensor on cpu"),
        (dict(displacement=X[:, :2]), ValueError, r"displacement: expected shape \[2, 3\]"),
        (dict(unconditional=X), ValueError, "guidance_scale: expected a value together with unconditional, got None"),
        (
            dict(guidance_scale=2.0),
            ValueError,
            "unconditional: expected a value together with guidance_scale, got None",
        ),
        (dict(unconditional=X[:1], guidance_scale=2.0), ValueError, r"unconditional: expected shape \[2, 3\]"),
        (dict(unconditional=X, guidance_scale=math.nan), ValueError, "guidance_scale: expected a finite number"),
        (dict(unconditional=X, guidance_scale=torch.ones(3)), ValueError, r"guidance_scale: .* tensor \[2\]"),
        (dict(prediction="eps"), ValueError, "prediction: expected one of .* got 'eps'"),
        (
            dict(coefficients=(0.6, 0.8, 0.8, 0.6)),
            ValueError,
            "coefficients: expected alpha_t, .* got 4 values",
        ),
        (dict(coefficients=b"abcde"), ValueError, "coefficients: expected alpha_t, .* got b'abcde'"),
        (bad(alpha_t=math.nan), ValueError, "coefficients: expected a finite alpha_t"),
        (bad(sigma_s=math.inf), ValueError, "coefficients: expected a finite sigma_s"),
        (bad(sigma_t=-0.8), ValueError, "coefficients: expected a finite sigma_t >= 0"),
        (bad(sigma_t=0.0), ValueError, "coefficients: expected sigma_t > 0"),
        (bad(sigma_t=torch.tensor([1.0, 0.0])), ValueError, "coefficients: expected sigma_t > 0"),
        (bad(tau=0.61), ValueError, "coefficients: expected tau <= sigma_s"),
        (bad(tau=torch.tensor([0.1, 0.7])), ValueError, "coefficients: expected tau <= sigma_s"),
        (bad(alpha_t=torch.ones(3)), ValueError, r"alpha_t a float or a floating tensor \[2\]"),
        (bad(alpha_t=torch.ones(2).long()), ValueError, "got torch.int64"),
        (dict(clip=-1.0), ValueError, "clip: expected a number > 0"),
        (dict(clip=(1.0, 1.0)), ValueError, "clip: expected a number > 0"),
        (dict(clip=(1.0,)), ValueError, "clip: expected a number > 0"),
        (dict(clip=[-1.0, 1.0]), ValueError, "clip: expected a number > 0"),
        (dict(clip=math.nan), ValueError, "clip: expected a number > 0"),
        (dict(clip=1.0, clip_noise=None), TypeError, "clip_noise: expected a bool, got None"),
        (dict(clip=DynamicThreshold(1.5)), ValueError, "clip: expected 0 <= ratio <= 1"),
        (
            dict(clip=DynamicThreshold(0.9, 0.5)),
            ValueError,
            "clip: expected .* and max_value >= 1",
        ),
        (dict(seed=-1), ValueError, "seed: expected an integer"),
        (dict(step=2**32), ValueError, "step: expected an integer"),
        (dict(backend="cuda"), RuntimeError, "backend='cuda' cannot serve reverse_step"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"x": X, "model_output": X, **bad(), **changes}
    with pytest.raises(error, match=message):
        ops.reverse_step(**arguments)


# Each number has its own check of sign and finiteness.
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", GOOD)
def test_coefficients_of_each_sample_are_checked_as_numbers_are(name, value):
    coefficients = bad(**{name: torch.tensor([GOOD[name], value])})["coefficients"]
    message = f"coefficients: expected a finite {name} >= 0"
    with pytest.raises(ValueError, match=message):
        ops.reverse_step(X, X, coefficients)
    with pytest.raises(ValueError, match=message):
        ops.propose_and_weigh(X, X, X, torch.zeros(2), coefficients, seed=0)
