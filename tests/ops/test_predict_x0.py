"""`predict_x0` against the definition of each prediction, solved here in float64, on every backend."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastguide import ops
from fastguide.ops import _native, _operation

PREDICTIONS = ("epsilon", "sample", "score", "v", "flow")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "triton", "reference")
LEVEL = (0.6, 0.8)
OPERATORS = torch.ops.fastguide


def inputs(shape, dtype=torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def needs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    device = torch.device("cpu")
    if reason := _operation.why_not(backend, "predict_x0", device=device, dtype=dtype):
        pytest.skip(reason)


def by_solving(x, output, alpha: float, sigma: float, prediction: str) -> torch.Tensor:
    """``x_0`` from two linear equations for ``(x_0, eps)``: the definition of ``x_t``, and the network's output."""
    said = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "score": (0.0, -1.0 / sigma),
        "v": (-sigma, alpha),
        "flow": (-1.0, 1.0),
    }[prediction]
    right = np.stack([x.double().numpy().ravel(), output.double().numpy().ravel()])
    return torch.from_numpy(np.linalg.solve(np.array([[alpha, sigma], said]), right)[0]).reshape(x.shape)


def guided(output, base, scale) -> torch.Tensor:
    """The guided output as a weighted mean of the two outputs, in float64."""
    return (1.0 - scale) * base.double() + scale * output.double()


# 7: within a vector. 33: a vector and a rest. 2049: two tiles; for Triton, whose interpreter is slow, 67 are three.
# A prediction is two factors, made before the kernel: Triton has them all in one dtype, and in the others the one
# that leaves the state out, and one that does not.
@pytest.mark.parametrize(
    ("backend", "dtype", "shape"),
    [
        *itertools.product(("cpu", "reference"), FLOATS, [(5, 7), (4, 3, 11), (2, 2049)]),
        *itertools.product(["triton"], FLOATS[1:], [(5, 7), (4, 3, 11), (2, 67)]),
    ],
)
def test_against_the_definitions(backend, dtype, shape, assert_close):
    needs(backend, dtype)
    predictions = ("sample", "v") if backend == "triton" and dtype != torch.float32 else PREDICTIONS
    x, output, base = inputs(shape, dtype)
    n = shape[0]
    scales = torch.linspace(-1.5, 7.5, n, dtype=torch.float64)
    alphas = torch.linspace(0.3, 0.9, n, dtype=torch.float64)
    sigmas = (1.0 - alphas**2).sqrt()
    for prediction, per_level, scale in itertools.product(predictions, (False, True), (None, 7.5, scales)):
        levels = (alphas, sigmas) if per_level else LEVEL
        options = {} if scale is None else dict(unconditional=base, guidance_scale=scale)
        got = ops.predict_x0(x, output, levels, prediction=prediction, backend=backend, **options)
        assert got.dtype == dtype and got.shape == shape and got.is_contiguous()
        for i in range(n):
            w = scale if scale is None or isinstance(scale, float) else float(scale[i])
            level = (float(alphas[i]), float(sigmas[i])) if per_level else LEVEL
            said = output[i].double() if w is None else guided(output[i], base[i], w)
            assert_close(got[i], by_solving(x[i], said, *level, prediction), 40.0)  # the terms are that much larger


@pytest.mark.parametrize("prediction", ("sample", "v", "flow"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_pure_noise(backend, prediction):
    """With ``alpha = 0``, ``x_0`` comes from the network alone."""
    needs(backend)
    x, output, base = inputs((2, 9), torch.float32)
    got = ops.predict_x0(
        x, output, (0.0, 1.0), prediction=prediction, unconditional=base, guidance_scale=2.0, backend=backend
    )
    said = 2.0 * output - base
    expected = {"sample": said, "v": -said, "flow": x - said}[prediction]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_copied_and_the_state_not_read(backend):
    needs(backend)
    x, output, _ = inputs((2, 5), torch.float32)
    got = ops.predict_x0(torch.full_like(x, math.nan), output, LEVEL, prediction="sample", backend=backend)
    assert torch.equal(got, output) and got.data_ptr() != output.data_ptr()


@pytest.mark.parametrize("form", [torch.channels_last, torch.channels_last_3d])
def test_channels_that_come_last_stay_there(form):
    shape = (2, 3, 4, 5) if form is torch.channels_last else (2, 3, 4, 5, 2)
    options, found = dict(prediction="v", guidance_scale=3.0), []
    for layout in (torch.contiguous_format, form):
        x, output, base = (
            v.contiguous(memory_format=layout).requires_grad_() for v in inputs(shape, torch.float32)
        )  # fmt: skip
        x0_hat = ops.predict_x0(x, output, LEVEL, unconditional=base, **options)
        with torch.no_grad():  # the other path to the kernel
            assert torch.equal(ops.predict_x0(x, output, LEVEL, unconditional=base, **options), x0_hat)
        assert x0_hat.is_contiguous(memory_format=layout)
        x0_hat.square().sum().backward()
        found.append((x0_hat, x.grad, output.grad, base.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts_and_dtypes(backend, assert_close):
    needs(backend)
    x, output, base = inputs((3, 4, 5, 6), torch.float32)
    expected = ops.predict_x0(x, output, LEVEL, prediction="v", unconditional=base, guidance_scale=3.0, backend=backend)
    turned = [v.transpose(0, 3).contiguous().transpose(0, 3) for v in (x, output, base)]
    options = dict(prediction="v", guidance_scale=3.0, backend=backend)
    got = ops.predict_x0(turned[0], turned[1], LEVEL, unconditional=turned[2], **options)
    assert torch.equal(got, expected) and got.is_contiguous()
    got = ops.predict_x0(x, output.half(), LEVEL, unconditional=base.bfloat16(), **options)
    narrow = guided(output.half(), base.bfloat16(), 3.0)
    assert got.dtype == torch.float32
    assert_close(got, by_solving(x, narrow, *LEVEL, "v"), 10.0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_states(backend, shape):
    needs(backend)
    x = torch.empty(shape, requires_grad=True)
    options = dict(prediction="epsilon", unconditional=x, guidance_scale=torch.ones(shape[0]), backend=backend)
    got = ops.predict_x0(x, x, (torch.full(shape[:1], 0.6), 0.8), **options)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert got.shape == gradient.shape == shape


# --- the cpu kernel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_bit_depends_on_the_instruction_set_the_batch_or_the_threads(dtype, threads, instruction_set):
    # 2.1e6 float32 elements are written past the caches; rows start at addresses that are not aligned
    for shape in ((7, 13), (3, 5000), (3, 700_001) if dtype == torch.float32 else (2, 3)):
        x, output, base = inputs(shape, dtype)
        grad = inputs(shape, dtype, seed=1)[0]
        scales = torch.linspace(1.0, 4.0, shape[0], dtype=torch.float64)
        results = {}
        for isa, count in itertools.product(_native.instruction_sets(), (1, 3)):
            with instruction_set(isa), threads(count):
                for scale in (2.5, scales):
                    leaves = [v.clone().requires_grad_() for v in (x, output, base)]
                    got = ops.predict_x0(
                        *leaves[:2], LEVEL, prediction="v", unconditional=leaves[2], guidance_scale=scale, backend="cpu"
                    )
                    gradients = torch.autograd.grad(got, leaves, grad)
                    bits = [got.detach(), *gradients]
                    first = results.setdefault(isinstance(scale, float), bits)
                    assert all(torch.equal(a, b) for a, b in zip(bits, first, strict=True))
        options = dict(prediction="v", backend="cpu")
        one = ops.predict_x0(x[1:2], output[1:2], LEVEL, unconditional=base[1:2], guidance_scale=2.5, **options)
        assert torch.equal(results[True][0][1:2], one)


def test_fused_multiply_adds_of_float32():
    """The results have the bits of the formula with one rounding for each multiply-add."""
    x, output, base = inputs((5, 301), torch.float32)
    scale = torch.tensor(2.3, dtype=torch.float32).double()
    p, q = (torch.tensor(v, dtype=torch.float32).double() for v in (1.0 / 0.6, -0.8 / 0.6))
    said = (scale * (output - base).double() + base.double()).float()
    expected = (q * said.double() + (p * x.double()).float().double()).float()
    for backend in ("cpu", "triton"):
        needs(backend)
        got = ops.predict_x0(
            x, output, LEVEL, prediction="epsilon", unconditional=base, guidance_scale=2.3, backend=backend
        )
        assert torch.equal(got, expected), backend


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("per_sample", (False, True))
def test_gradcheck(prediction, per_sample):
    x, output, base = (v.requires_grad_() for v in inputs((2, 3)))
    alpha, sigma, scale = LEVEL[0], LEVEL[1], 2.5
    if per_sample:
        alpha, sigma, scale = (torch.tensor(v, dtype=torch.float64) for v in ((0.6, 0.3), (0.8, 0.95), (2.5, -1.0)))

    def f(x, output, base):
        return ops.predict_x0(
            x, output, (alpha, sigma), prediction=prediction, unconditional=base, guidance_scale=scale
        ).sin()

    assert torch.autograd.gradcheck(f, (x, output, base))
    assert torch.autograd.gradgradcheck(f, (x, output, base))

    def g(x, output):
        return ops.predict_x0(x, output, (alpha, sigma), prediction=prediction)

    assert torch.autograd.gradcheck(g, (x, output))


def test_gradcheck_in_levels_and_scale():
    x, output, base = (v.requires_grad_() for v in inputs((2, 3)))
    alpha, sigma, scale = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ((0.6, 0.3), (0.8, 0.95), (2.5, -1.0))
    )

    def f(x, output, base, alpha, sigma, scale):
        return ops.predict_x0(x, output, (alpha, sigma), prediction="v", unconditional=base, guidance_scale=scale)

    assert torch.autograd.gradcheck(f, (x, output, base, alpha, sigma, scale))
    one = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)  # one for all samples
    assert torch.autograd.gradcheck(lambda s: f(x, output, base, alpha, sigma, s), (one,))


# The prediction type only changes two factors, which are the same for all backends: one backend tests all types.
@pytest.mark.parametrize(
    ("backend", "prediction"), [*(("cpu", p) for p in PREDICTIONS), *((b, "v") for b in BACKENDS if b != "cpu")]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_multiples_of_the_one_that_comes_in(backend, dtype, prediction, assert_close):
    needs(backend, dtype)
    grad, *_ = inputs((3, 70), dtype, seed=1)
    scales = torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64)
    tables = (torch.full((3,), 0.6, dtype=torch.float64), 0.8)
    alpha, sigma = LEVEL
    p, q = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (0.0, 1.0),
        "score": (1 / alpha, sigma**2 / alpha),
        "v": (alpha, -sigma),
        "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    }[prediction]
    for levels, scale in itertools.product((LEVEL, tables), (6.0, scales)):
        values, table = ops._arguments.scalars(levels, grad, prediction, "levels", 2)
        number, tensor = ops._arguments.per_sample("guidance_scale", scale, grad)
        dtypes = (dtype, torch.float32, torch.float16)
        found = OPERATORS.predict_x0_backward(grad, values, table, prediction, number, tensor, *dtypes, backend)
        w = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1)
        factors = (p, q * w, q * (1.0 - w))
        for got, factor, expected_dtype in zip(found, factors, dtypes, strict=True):
            assert got.dtype == expected_dtype
            assert_close(got, factor * grad.double(), 4.0)


def test_no_gradient_is_computed_that_nobody_asked_for():
    grad = torch.ones(2, 3)
    found = OPERATORS.predict_x0_backward(grad, LEVEL, None, "v", 2.0, None, None, torch.float32, None, "cpu")
    assert [len(v) for v in found] == [0, 2, 0]


# --- torch.library -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("per_sample", (False, True))
def test_opcheck(grad, per_sample):
    x, output, base = (v.float().requires_grad_(grad) for v in inputs((3, 4)))
    levels = (torch.tensor([0.6, 0.3, 1.0]), 0.8) if per_sample else LEVEL
    values, table = ops._arguments.scalars(levels, x, "v", "levels", 2)
    scale = (1.0, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) if per_sample else (2.0, None)
    check = torch.library.opcheck
    check(OPERATORS.predict_x0.default, (x, output, values, table, "v", base, *scale, "auto"))
    check(OPERATORS.predict_x0.default, (x, output.detach().half(), values, table, "v", None, 1.0, None, "auto"))
    dtypes = (None, torch.float32, torch.float16)
    check(OPERATORS.predict_x0_backward.default, (x, values, table, "v", *scale, *dtypes, "auto"))


def test_a_compiled_call_gives_the_eager_bits():
    def loss(x, base, scale):
        output = torch.tanh(x)
        return ops.predict_x0(x, output, LEVEL, prediction="epsilon", unconditional=base, guidance_scale=scale)

    def results(f):
        x, _, base = (v.float().requires_grad_() for v in inputs((3, 4)))
        value = f(x, base, torch.tensor([1.0, 2.0, 3.0]))
        return [value.detach(), *torch.autograd.grad(value, (x, base), torch.ones_like(value))]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled), results(loss), strict=True):
        assert torch.equal(got, expected)


def test_vmap_goes_through_the_reference():
    x, output, base = inputs((4, 2, 3))

    def f(x, output, base):
        return ops.predict_x0(x, output, LEVEL, prediction="v", unconditional=base, guidance_scale=2.0)

    _operation._warn_reference.cache_clear()  # another test may have had the warning
    with pytest.warns(RuntimeWarning, match="predict_x0 runs in plain PyTorch"):
        got = torch.vmap(f)(x, output, base)
    torch.testing.assert_close(got, torch.stack([f(*row) for row in zip(x, output, base, strict=True)]))


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(x=[1.0]), TypeError, "x: "),
        (dict(model_output=torch.zeros(2, 4)), ValueError, r"model_output: expected shape \[2, 3\]"),
        (dict(unconditional=torch.zeros(3, 3)), ValueError, r"unconditional: expected shape \[2, 3\]"),
        (dict(unconditional=None), ValueError, "unconditional: expected a value together with guidance_scale"),
        (dict(guidance_scale=None), ValueError, "guidance_scale: expected a value together with unconditional"),
        (dict(guidance_scale=math.nan), ValueError, "guidance_scale: expected a finite number, got nan"),
        (dict(guidance_scale="7"), TypeError, r"guidance_scale: expected a finite number or a tensor \[2\]"),
        (dict(guidance_scale=torch.ones(3)), ValueError, r"guidance_scale: expected a number or a float"),
        (dict(guidance_scale=torch.ones(2, dtype=torch.int64)), ValueError, "guidance_scale: expected a number or a f"),
        (dict(prediction="noise"), ValueError, "prediction: expected one of"),
        (dict(levels=(0.6, 0.8, 0.6)), ValueError, "levels: expected alpha, sigma, got 3 values"),
        (dict(levels=(0.6, -0.8)), ValueError, "levels: expected a finite sigma >= 0, got -0.8"),
        (dict(levels=(torch.tensor([0.6, math.inf]), 0.8)), ValueError, "levels: expected a finite alpha >= 0"),
        (dict(levels=(0.0, 1.0)), ValueError, "prediction: 'epsilon' does not determine x_0 where alpha = 0"),
        (dict(levels=(torch.zeros(2), 1.0)), ValueError, "prediction: 'epsilon' does not determine x_0 where"),
        (dict(levels=(0.0, 0.0), prediction="v"), ValueError, r"levels: expected alpha \+ sigma > 0"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    arguments = dict(
        x=torch.zeros(2, 3), model_output=torch.zeros(2, 3), levels=LEVEL, prediction="epsilon",
        unconditional=torch.zeros(2, 3), guidance_scale=2.0,
    )  # fmt: skip
    with pytest.raises(error, match=words):
        ops.predict_x0(**(arguments | changes))
