"""The common part of the operations: the choice of a backend, torch's own checks of the operators, and compiled loops,
which must give the bits of eager calls."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import shutil
import sys
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastguide import ops, reference
from fastguide.ops import DynamicThreshold, _arguments, _native, _operation
from fastguide.ops._operation import (
    OPERATIONS,
    ORDER,
    Backend,
    _gpu_reason,
    _warn_passed_over,
    backends,
    explain,
    select,
    why_not,
)

OPERATORS = torch.ops.fastguide
VP = (0.6, 0.8, 0.8, 0.6, 0.3)
CPU = torch.device("cpu")
CLIPS = (None, 0.7, (-1, 2), DynamicThreshold(0.9, 3.0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def normal(*shape: int, seed: int = 0, dtype=torch.float32, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another layout: the last axis is the first in memory."""
    return tensor.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_(tensor.requires_grad)


# --- backends -----------------------------------------------------------------------------------------------


def test_cpu_module_is_built_and_loaded():
    served = tuple(name for name in OPERATIONS if name != "solve_positive_part")  # on the CPU the reference serves it
    assert backends()["cpu"] == Backend("cpu", True, "", served, backends()["cpu"].details)
    assert backends()["cpu"].details["instruction_set"]
    flags = _native.build_record()["cxxflags"]
    assert "-ffp-contract=off" in flags and "fast-math" not in flags


def test_every_backend_says_why_it_cannot():
    found = backends()
    assert tuple(found) == ORDER
    assert found["reference"].operations == tuple(OPERATIONS)
    cuda = found["cuda"]
    if not torch.cuda.is_available():
        assert cuda.reason
    if not cuda.loaded:
        assert "was not built" in cuda.reason or "did not load" in cuda.reason


def test_select():
    assert select("randn", device=CPU, dtype=torch.float64) == "cpu"
    assert select("randn", device=CPU, dtype=torch.int32) == "reference"
    assert select("resample", device=CPU, dtype=torch.float32) == "cpu"
    assert select("reverse_step", device=CPU, dtype=torch.bfloat16) == "cpu"
    assert select("reverse_step", device=CPU, dtype=torch.bfloat16, obstacle="has no such thing") == "reference"
    assert select("randn", "reference", device=CPU, dtype=torch.float32) == "reference"
    assert select("randn", device=torch.device("meta"), dtype=torch.float32) == "reference"


def test_select_refuses_with_the_reason():
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', .*\), got 'cudnn'"):
        select("randn", "cudnn", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cuda has no kernel for reverse_step"):
        select("reverse_step", "cuda", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cuda serves tensors on cuda, and"):
        select("randn", "cuda", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"this is torch\.int64"):
        select("randn", "cpu", device=CPU, dtype=torch.int64)
    assert "float64" in why_not("cuda", "randn", device=torch.device("cuda"), dtype=torch.float64)


def test_explain_tells_what_was_passed_over():
    text = explain("reverse_step", "cpu", torch.float32)
    reason = "  not cuda: cuda has no kernel for reverse_step"
    assert text.splitlines() == ["reverse_step on cpu, torch.float32: cpu", reason]
    text = explain("reverse_step", "cpu", torch.float32, obstacle="has no such thing")
    assert text.splitlines()[0] == "reverse_step on cpu, torch.float32: reference"
    assert "  not cpu: cpu has no such thing" in text.splitlines()


def test_a_missing_module_warns_once_and_only_once(monkeypatch, recwarn):
    monkeypatch.setitem(_native._modules, "cpu", (None, "fastguide._cpu did not load: broken on purpose"))
    _warn_passed_over.cache_clear()
    for _ in range(3):
        assert select("randn", device=CPU, dtype=torch.float32) == "reference"
    assert [str(w.message) for w in recwarn if "broken on purpose" in str(w.message)] == [
        "fastguide runs on cpu tensors without its compiled kernels, slowly, in plain PyTorch: fastguide._cpu did not "
        "load: broken on purpose. `fastguide doctor` tells more."
    ]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        select("randn", "cpu", device=CPU, dtype=torch.float32)
    assert not backends()["cpu"].loaded and backends()["cpu"].reason.endswith("broken on purpose")
    _warn_passed_over.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """``a_gpu(capability, driver, archs)``: as if torch saw this GPU and the cuda module were built for ``archs``."""

    def pretend(capability: tuple[int, int], driver: int, archs: list[str]) -> None:
        record = {"cuda": {"status": "built", "reason": "", "nvcc": "13.0", "archs": archs, "error": []}}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(_native, "build_record", lambda: record)
        monkeypatch.setitem(_native._modules, "cuda", (types.SimpleNamespace(), ""))
        monkeypatch.setattr(_operation, "_INTERPRETED", False)
        _gpu_reason.cache_clear()
        _warn_passed_over.cache_clear()

    yield pretend
    _gpu_reason.cache_clear()
    _warn_passed_over.cache_clear()


@pytest.mark.parametrize(
    ("capability", "driver", "archs", "reason"),
    [
        ((8, 0), 13000, ["80", "90"], ""),
        ((8, 9), 13020, ["80", "90"], ""),  # code of the same major version
        ((12, 0), 13000, ["80", "90"], ""),  # PTX of the last architecture
        ((9, 0), 13000, ["80", "100"], "cuda was compiled for sm_80, sm_100, and this GPU is sm_90: build with"),
        ((8, 0), 13000, ["86", "90"], "this GPU is sm_80: build with FASTGUIDE_CUDA_ARCHS=80"),
        ((9, 0), 12080, ["90"], "cuda was compiled by nvcc 13.0, and this driver serves CUDA 12"),
    ],
)
def test_a_gpu_or_a_driver_that_cannot_run_the_build_is_named(capability, driver, archs, reason, a_gpu):
    a_gpu(capability, driver, archs)
    said = why_not("cuda", "randn", device=GPU, dtype=torch.float32)
    assert (reason in said) if reason else said == ""


def test_a_gpu_without_our_kernels_takes_the_next_backend_and_warns_once(a_gpu, recwarn):
    a_gpu((9, 0), 13000, ["80", "100"])
    for _ in range(3):
        assert select("randn", device=GPU, dtype=torch.float32) == "triton"
        assert select("resample", device=GPU, dtype=torch.float32) == "reference"
    said = [str(w.message) for w in recwarn if "fastguide runs" in str(w.message)]
    assert len(said) == 2 and all("sm_80, sm_100, and this GPU is sm_90" in words for words in said)
    assert "with those of triton" in said[0] and "slowly, in plain PyTorch" in said[1]
    a_gpu((7, 5), 13000, ["80"])
    assert "triton serves compute capability 8.0" in why_not("triton", "randn", device=GPU, dtype=torch.float32)


# --- the definition of an operation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "kernels", "message"),
    [
        ("twice(Tensor x)", {}, r"schema: expected 'name\(arguments\) -> results', got 'twice\(Tensor x\)'"),
        ("twice(Tensor x)-> Tensor", {}, "schema: expected"),
        ("twice(Tensor x) -> Tensor", {"gpu": torch.clone}, r"kernels: expected some of \(.*'cuda'.*\), got \['gpu'\]"),
    ],
)
def test_an_operation_that_would_be_misread_is_refused(schema, kernels, message):
    before = set(OPERATIONS)
    with pytest.raises(ValueError, match=message):
        _operation.Operation(schema, reference=torch.clone, fake=torch.empty_like, kernels=kernels)
    assert set(OPERATIONS) == before


def test_a_gradient_of_an_unknown_argument_is_refused(monkeypatch):
    monkeypatch.setattr(OPERATIONS["reverse_step"], "vjp", lambda *args: {"model_ouput": args[2][0]})
    x = normal(2, 3, grad=True)
    with pytest.raises(ValueError, match=r"vjp: expected .* arguments of reverse_step, got one of \['model_ouput'\]"):
        ops.reverse_step(x, x, VP).sum().backward()


def test_a_binding_says_which_argument_it_did_not_expect():
    module = _native.module("cpu")
    for kind, arguments in (("an integer", (0, 0.0)), ("a float", (0, 1))):
        function, count = (module.randn, 9) if kind == "an integer" else (module.log_prob_and_gradient, 18)
        with pytest.raises(TypeError, match=f"^argument 2: expected {kind}$"):
            function(*arguments, *(0,) * (count - 2))


# --- torch's own checks -------------------------------------------------------------------------------------


def check(operator, *arguments) -> None:
    """Torch's checks: the schema (writes and aliases are declared), autograd registration, fake against real shapes,
    dtypes and strides, and AOT dispatch with static and dynamic shapes against eager.

    Each option of an operator is checked once, and together with options that interact. Other tests check values."""
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    [
        *(((2, 3), dtype, "auto") for dtype in (torch.float32, torch.float16, torch.float64)),
        *((shape, torch.float32, "auto") for shape in ((5,), (0, 4), (3, 2, 5))),
        ((2, 3), torch.float16, "reference"),
    ],
)
def test_opcheck_randn(shape, dtype, backend):
    for tensors in ((None, None), (torch.tensor(-3), torch.tensor([2**32 - 1]))):
        check(OPERATORS.randn, shape, -1, 2, 3, 4, *tensors, dtype, torch.device("cpu"), backend)


def reverse_step_arguments(
    x, *, output=None, coefficients=VP, prediction="epsilon", clip=None, clip_noise=True, moved=False, return_x0=False,
    displacement_scale=1.0, guidance_scale=None,
) -> tuple:  # fmt: skip
    values, table = _arguments.scalars(coefficients, x, prediction)
    output = normal(*x.shape, seed=1, dtype=x.dtype, grad=x.requires_grad) if output is None else output
    displacement = normal(*x.shape, seed=2, dtype=x.dtype, grad=x.requires_grad) if moved else None
    base = None if guidance_scale is None else normal(*x.shape, seed=3, dtype=x.dtype, grad=x.requires_grad)
    clip = _arguments.clip(clip)
    return (
        x,
        output,
        values,
        table,
        prediction,
        *_arguments.guidance(base, guidance_scale, x),
        clip,
        clip_noise,
        displacement,
        *_arguments.per_sample("displacement_scale", displacement_scale, x),
        5,
        1,
        0,
        7,
        None,
        torch.tensor(1),
        return_x0,
        "auto",
    )


SCALES = torch.tensor([0.5, -2.0, 1.0])
PER_SAMPLE = (torch.tensor([0.6, 0.0, 1.0]), 0.8, torch.ones(3), 0.6, torch.tensor([0.0, 0.3, 0.6]))


REVERSE_STEP_OPTIONS = [
    dict(),
    dict(clip=(-1, 2), moved=True),
    dict(prediction="sample", coefficients=(0.6, 0.8, 1.0, 0.0, 0.0)),
    dict(prediction="v", coefficients=PER_SAMPLE, clip=DynamicThreshold(0.9, 3.0), moved=True),
    dict(clip=0.5, clip_noise=False, moved=True, displacement_scale=-0.5),
    dict(moved=True, displacement_scale=SCALES),
    dict(moved=True, guidance_scale=2.0, clip=0.5),
    dict(guidance_scale=SCALES),
]


# With a gradient opcheck looks at all that it does without one, and more. It checks no value, so that both numbers of
# results need not be there with each option.
@pytest.mark.parametrize(
    ("options", "grad", "return_x0"),
    [
        *((options, True, i % 2 == 0) for i, options in enumerate(REVERSE_STEP_OPTIONS)),
        *itertools.product(REVERSE_STEP_OPTIONS[:1], [False], (False, True)),
    ],
)
def test_opcheck_reverse_step(options, grad, return_x0):
    check(
        OPERATORS.reverse_step,
        *reverse_step_arguments(normal(3, 4, grad=grad), return_x0=return_x0, **options),
    )


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float64, "turned"), (torch.float16, "rows"), (torch.bfloat16, "turned")]
)
def test_opcheck_reverse_step_dtypes_and_layouts(dtype, layout):
    x, output = normal(3, 2, 4, dtype=dtype, grad=True), normal(3, 2, 4, seed=1, dtype=dtype, grad=True)
    if layout == "turned":
        x, output = turned(x), turned(output)
    check(OPERATORS.reverse_step, *reverse_step_arguments(x, output=output, return_x0=True, moved=True))
    check(OPERATORS.reverse_step, *reverse_step_arguments(x, output=output, prediction="sample", return_x0=True))


# Numbers and a table of coefficients, each with both layouts; a last step of zeros is one more list of numbers.
@pytest.mark.parametrize(
    ("weights_shape", "dtype", "layout", "coefficients"),
    [
        ((3,), torch.float32, "rows", VP),
        ((1, 3), torch.bfloat16, "turned", PER_SAMPLE),
        ((1, 3), torch.float64, "rows", PER_SAMPLE),
        ((1, 3), torch.float64, "turned", (0.6, 0.8, 1.0, 0.0, 0.0)),
    ],
)
def test_opcheck_propose_and_weigh(weights_shape, dtype, coefficients, layout):
    states = [normal(3, 2, 4, seed=i, dtype=dtype) for i in range(3)]
    if layout == "turned":
        states = [turned(state) for state in states]
    values, table = _arguments.scalars(coefficients, states[0], "sample")
    weights = normal(*weights_shape, dtype=torch.float64)
    scale = _arguments.per_sample("displacement_scale", SCALES if layout == "turned" else 0.5, states[0])
    bounds, wider = ((-1.0, 2.0), torch.tensor([0.1, 0.0, 0.4])) if layout == "turned" else ((), None)
    counter = (-1, 0, 0, 3, torch.tensor([9]), None)
    check(OPERATORS.propose_and_weigh, *states, weights, values, table, bounds, *scale, wider, 0.5, *counter, "auto")


# A scheme changes only values. So each scheme gets one case: several rows, one row, fewer ancestors, one particle.
@pytest.mark.parametrize(
    ("scheme", "shape", "num", "threshold", "keep_sorted", "dtype"),  # float64 in another layout
    [
        ("systematic", (2, 5), 5, None, True, torch.float32),
        ("systematic", (2, 5), 5, None, True, torch.float64),
        ("stratified", (5,), 5, 0.5, False, torch.float32),
        ("multinomial", (2, 5), 3, None, True, torch.float64),
        ("residual", (1, 1), 1, 1.0, True, torch.float32),
    ],
)
def test_opcheck_resample(scheme, shape, num, threshold, keep_sorted, dtype):
    rows = normal(*shape, dtype=dtype)
    rows = turned(rows) if dtype == torch.float64 else rows
    check(
        OPERATORS.resample, rows, scheme, num, threshold, -1, 2, 3, 4, torch.tensor(5), None, keep_sorted, False, "auto"
    )


# Numbers of states, and both index dtypes with and without rows.
@pytest.mark.parametrize(
    ("index_dtype", "rows", "number"),
    [(torch.int32, (), 0), (torch.int64, (), 1), (torch.int32, (2,), 3), (torch.int64, (2,), 3)],
)
def test_opcheck_gather_particles_(index_dtype, rows, number):
    ancestors = torch.tensor([3, 0, 0, 2], dtype=index_dtype).expand(*rows, 4).contiguous()
    states = [
        normal(*rows, 4, 3),
        torch.arange(4).expand(*rows, 4).contiguous(),
        turned(normal(*rows, 4, 2, 5)),
    ]
    check(OPERATORS.gather_particles_, ancestors, states[:number], True, "auto")


def density_arguments(family, dtype=torch.float32, grad=False, extra_variance=None, rows=None, y=None) -> tuple:
    y = (3.0 * normal(3, 2, 4, seed=1).abs()).round().to(dtype) if y is None else y
    extra_variance = None if extra_variance is None else normal(extra_variance, 2, 4, seed=2, dtype=dtype) ** 2
    rows = None if rows is None else torch.tensor(rows)
    z = normal(3, 2, 4, dtype=dtype).abs() + 0.5
    df, background = (4.5 if family == "student_t" else None), (0.25 if family == "poisson" else 0.0)
    known = None if rows is None or family != "poisson" else reference.log_factorials(y, 0.7)
    return z.requires_grad_(grad), y, family, 0.7, df, background, extra_variance, rows, known, True, "auto"


# With a gradient opcheck looks at all that it does without one, and more. Families differ in values, but for Poisson's,
# which has logarithms of factorials for each row.
@pytest.mark.parametrize(
    ("family", "grad", "rows"),
    [
        *((family, True, None) for family in reference.FAMILIES),
        ("gaussian", False, None),
        ("poisson", False, None),
        ("laplace", False, [2, 0, 2]),
        ("student_t", True, [2, 0, 2]),
        ("poisson", True, [2, 0, 2]),
    ],
)
def test_opcheck_log_prob_and_gradient(family, grad, rows):
    check(OPERATORS.log_prob_and_gradient, *density_arguments(family, grad=grad, rows=rows))


@pytest.mark.parametrize(("family", "dtype"), [("gaussian", torch.bfloat16), ("poisson", torch.float64)])
def test_opcheck_log_prob_and_gradient_dtypes(family, dtype):
    check(OPERATORS.log_prob_and_gradient, *density_arguments(family, dtype, grad=True))


@pytest.mark.parametrize("extra_variance", (1, 3))
@pytest.mark.parametrize("layout", ["rows", "turned"])
def test_opcheck_log_prob_and_gradient_layouts(extra_variance, layout):
    z, y, *rest = density_arguments("laplace", grad=True, extra_variance=extra_variance)
    if layout == "turned":
        z, y, rest[4] = turned(z), turned(y), turned(rest[4])
    check(OPERATORS.log_prob_and_gradient, z, y, *rest)


# --- compiled loops -----------------------------------------------------------------------------------------

LEVELS = [(0.1, 0.995), (0.5, 0.866), (1.0, 0.0)]


def twisted_loop(x, weights, y, seed):
    """A small particle filter: every operation, with some user arithmetic in between."""
    rows, particles = weights.shape
    history = []
    for i in range(len(LEVELS) - 1):
        t, s = LEVELS[i], LEVELS[i + 1]
        tau = 0.8 * s[1] * (1.0 - (t[0] * s[1] / (s[0] * t[1])) ** 2) ** 0.5
        ancestors, weights, mean_weight, ess = ops.resample(
            weights, ess_threshold=0.7, seed=seed, step=i, sorted=False, check=False
        )
        ops.gather_particles_(ancestors, x)
        state = x.flatten(0, 1)
        x0_hat = torch.clamp(state * t[0], -1.0, 1.0)
        displacement = 0.1 * (y - x0_hat)
        state, weights = ops.propose_and_weigh(
            state, x0_hat, displacement, weights, (*t, *s, tau), seed=seed, step=i, stream=1
        )
        weights = weights - (state - y).flatten(1).square().sum(1).reshape(rows, particles)
        state = (
            ops.reverse_step(state, x0_hat, (*s, *s, 0.0), prediction="sample", clip=1.5)
            if s[1] > 0
            else state + 0.01 * ops.randn(state.shape, seed=seed, step=i, stream=2)
        )
        x = state.reshape(rows, particles, -1)
        history += [ancestors, mean_weight, ess]
    return x, weights, *history


def assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def run_loop(loop, seed: int = 2**64 - 3):
    x = normal(2, 8, 5)
    return loop(x, torch.zeros(2, 8, dtype=torch.float64), 0.3 * normal(5, seed=1), seed), x


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_compiled_loop_gives_the_eager_bits(dynamic):
    expected, moved = run_loop(twisted_loop)
    compiled = torch.compile(twisted_loop, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, moved_too = run_loop(compiled)
    assert_same_bits(got, expected)
    assert torch.equal(moved, moved_too)  # gather_particles_ wrote into the caller's tensor
    below = torch.stack(expected[4::3]) < 0.7 * 8
    assert below.any() and not below.all()  # some rows were resampled


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_eager_operations():
    """There is no user arithmetic between the operations, because inductor may fuse multiply-adds in it."""

    def operations(x, weights):
        ancestors, weights, _, ess = ops.resample(weights, seed=1, sorted=False, check=False)
        ops.gather_particles_(ancestors, x)
        x, weights = ops.propose_and_weigh(x, x, x, weights, VP, seed=3)
        z = ops.randn(x.shape, seed=4)
        return (*ops.reverse_step(x, z, VP, clip=1.0, seed=5, return_x0=True), weights, ess, ancestors)

    weights = normal(8, seed=1)
    expected = operations(normal(8, 5), weights)
    got = torch.compile(operations, fullgraph=True, backend="inductor")(normal(8, 5), weights)
    assert_same_bits(got, expected)


def test_every_operation_is_one_operator_of_the_graph():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    run_loop(torch.compile(twisted_loop, fullgraph=True, backend=backend))
    for name in ("randn", "reverse_step", "propose_and_weigh", "resample", "gather_particles_"):
        assert any(f"fastguide.{name}" in target for target in seen), name


# --- gradients ----------------------------------------------------------------------------------------------


# In float32. test_reverse_step.py tests the values of the derivatives, in float64.
@pytest.mark.parametrize("prediction", reference.PREDICTIONS)
@pytest.mark.parametrize("clip", (None, (-1, 2), DynamicThreshold(0.9, 3.0)))
@pytest.mark.parametrize("return_x0", (False, True))
def test_gradients_are_those_of_the_reference(prediction, clip, return_x0):
    def gradients(step) -> list[torch.Tensor]:
        tensors = [normal(3, 4, seed=i, grad=True) for i in range(3)]
        x_s, *rest = step(*tensors)
        loss = (x_s * x_s.detach().sin()).sum() + sum(2.0 * (x0**2).sum() for x0 in rest if return_x0)
        return [*torch.autograd.grad(loss, tensors), x_s.detach()]

    clip_noise = clip is None or prediction != "v"
    options = dict(prediction=prediction, clip=clip, clip_noise=clip_noise, return_x0=return_x0)

    def eager(x, output, displacement):
        result = ops.reverse_step(x, output, VP, displacement=displacement, seed=5, **options)
        return result if return_x0 else (result,)

    def formula(x, output, displacement):
        result = reference.reverse_step(x, output, VP, displacement=displacement, seed=5, **options)
        return result if return_x0 else (result,)

    for a, b in zip(gradients(eager), gradients(formula), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("return_x0", (False, True))
def test_gradients_through_a_compiled_step(per_sample, return_x0):
    coefficients = tuple(torch.full((3,), c, dtype=torch.float64) for c in VP) if per_sample else VP

    def loss(x, scale, displacement):
        output = torch.tanh(scale * x)
        result = ops.reverse_step(
            x, output, coefficients, prediction="v", clip=0.8, displacement=displacement, return_x0=return_x0
        )
        x_s, x0 = result if return_x0 else (result, output)
        return (x_s**2).sum() + (x0**3).sum()

    def gradients(function) -> tuple[torch.Tensor, ...]:
        tensors = (
            normal(3, 4, grad=True),
            torch.tensor(0.7, requires_grad=True),
            normal(3, 4, seed=2, grad=True),
        )
        return torch.autograd.grad(function(*tensors), tensors)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_compiled_function_of_any_size_takes_a_scale_for_each_sample():
    def f(x, scale):
        step = ops.reverse_step(x, x, VP, unconditional=2 * x, guidance_scale=scale, prediction="v")
        return step + ops.predict_x0(x, x, VP[:2], prediction="v", unconditional=2 * x, guidance_scale=scale)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for number in (3, 5):
        x, scale = normal(number, 4), torch.linspace(-1, 2, number)
        torch.testing.assert_close(compiled(x, scale), f(x, scale))


def test_a_recorded_graph_holds_the_operators():
    """A recorder does not see what a kernel writes. A record of a kernel's memory would never be filled."""

    def loop(x):
        z = ops.randn(x.shape, seed=3)
        return ops.propose_and_weigh(ops.reverse_step(x, z, VP, seed=1), z, z, z[:, 0], VP, seed=2)

    graph = make_fx(loop)(normal(3, 4))
    names = [str(node.target) for node in graph.graph.nodes if "fastguide" in str(node.target)]
    assert [name.split(".")[1] for name in names] == ["randn", "reverse_step", "propose_and_weigh"]
    x = normal(3, 4, seed=1)
    assert_same_bits(graph(x), loop(x))


@pytest.mark.parametrize(
    ("family", "backend"), [*((family, "aot_eager") for family in reference.FAMILIES), ("student_t", "inductor")]
)
def test_log_densities_in_a_compiled_function(family, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        backend = "aot_eager"
    z, y, _, scale, df, background, *_ = density_arguments(family)

    def loss(x):
        options = dict(family=family, scale=scale, df=df, background=background)
        log_prob, gradient = ops.log_prob_and_gradient(2.0 * x, y, **options)
        alone, _ = ops.log_prob_and_gradient(0.5 * x, y, return_gradient=False, **options)
        return (log_prob + alone).sum(), log_prob.detach(), gradient.detach()

    def results(function):
        x = z.clone().requires_grad_()
        total, *values = function(x)
        return [*torch.autograd.grad(total, x), *values]

    options = {"cpp.vec_isa_ok": False} if backend == "inductor" else None  # inductor's test for AVX takes 10 s
    compiled = torch.compile(loss, fullgraph=True, backend=backend, options=options)
    for a, b in zip(results(compiled), results(loss), strict=True):
        assert torch.equal(a, b)


def test_derivatives_in_y_in_a_compiled_function():
    z, y = normal(3, 4), normal(3, 4, seed=1)

    def log_prob(y):
        return ops.log_prob_and_gradient(z, y, family="student_t", scale=0.7, df=3.0)[0].sum()

    def slope(function):
        leaf = y.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    got = slope(torch.compile(log_prob, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, slope(log_prob))
    assert (got != 0).all()


# --- fake tensors -------------------------------------------------------------------------------------------


def test_fake_tensors_give_shapes_and_dtypes():
    with FakeTensorMode() as mode:
        x = torch.empty(6, 3, 5, dtype=torch.float16)
        z = ops.randn((6, 3, 5), seed=1, dtype=torch.bfloat16)
        x_s, x0 = ops.reverse_step(x, x, VP, displacement=x, return_x0=True)
        columns = tuple(torch.empty(6, dtype=torch.float64) for _ in VP)
        by_row = ops.reverse_step(x, x, columns)
        weights = torch.empty(2, 3, dtype=torch.float64)
        proposed, weighed = ops.propose_and_weigh(x, x, x, weights, VP, seed=1)
        ancestors, after, mean_weight, ess = ops.resample(torch.empty(2, 3), num=7, check=False)
        alone = ops.resample(torch.empty(9), check=False)
        ops.gather_particles_(torch.empty(2, 3, dtype=torch.int32), weights)
        log_prob, gradient = ops.log_prob_and_gradient(x, x, family="gaussian", scale=1.0)
    expected = {
        "z": (z, (6, 3, 5), torch.bfloat16),
        "x_s": (x_s, (6, 3, 5), torch.float16),
        "x0": (x0, (6, 3, 5), torch.float16),
        "by_row": (by_row, (6, 3, 5), torch.float16),
        "proposed": (proposed, (6, 3, 5), torch.float16),
        "weighed": (weighed, (2, 3), torch.float64),
        "ancestors": (ancestors, (2, 7), torch.int32),
        "after": (after, (2, 7), torch.float32),
        "mean_weight": (mean_weight, (2,), torch.float64),
        "ess": (ess, (2,), torch.float64),
        "ancestors alone": (alone[0], (9,), torch.int32),
        "mean_weight alone": (alone[2], (), torch.float64),
        "log_prob": (log_prob, (6,), torch.float64),
        "gradient": (gradient, (6, 3, 5), torch.float16),
    }
    for name, (tensor, shape, dtype) in expected.items():
        assert mode.is_our_fake(tensor), name
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(), name


def test_checks_hold_while_compiling():
    with pytest.raises(Exception, match=r"check: expected False inside torch\.compile"):
        torch.compile(lambda w: ops.resample(w), fullgraph=True, backend="eager")(torch.zeros(3))
    with pytest.raises(Exception, match="coefficients: expected tau <= sigma_s"):
        step = torch.compile(lambda x: ops.reverse_step(x, x, (0.6, 0.8, 0.8, 0.6, 0.9)), backend="eager")
        step(torch.zeros(2, 3))


# --- eager calls --------------------------------------------------------------------------------------------


def test_eager_calls_skip_the_dispatcher():
    def dispatched(call) -> list[str]:
        with torch.autograd.profiler.profile() as profile:
            call()
        return [event.name for event in profile.function_events if "fastguide" in event.name]

    def eager():
        run_loop(twisted_loop)
        ops.log_prob_and_gradient(torch.ones(2, 3), torch.ones(1, 3), family="laplace", scale=1.0)
        with torch.no_grad():
            ops.reverse_step(parameter, parameter, VP)
        ops.reverse_step(parameter, parameter, VP, backend="reference")

    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert dispatched(eager) == []
    assert "fastguide::reverse_step" in dispatched(lambda: ops.reverse_step(parameter, parameter, VP))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function).removeprefix("fastguide.").removesuffix(".default"))
        return function(*arguments, **(options or {}))


def test_a_mode_that_watches_sees_the_operators():
    with Recorder() as recorder:
        run_loop(twisted_loop)
    assert {"randn", "reverse_step", "propose_and_weigh", "resample", "gather_particles_"} <= set(recorder.names)


X, MEASURED = normal(3, 4), normal(1, 4, seed=1)
WITHOUT_KERNELS = {
    "forward mode": (
        lambda backend: torch.func.jvp(lambda x: ops.reverse_step(x, X, VP, seed=1, backend=backend), (X,), (X,))[1],
        "reverse_step runs in plain PyTorch.*: the kernel has no function transforms or forward-mode derivatives",
    ),
}


@pytest.mark.parametrize(("call", "reason"), WITHOUT_KERNELS.values(), ids=WITHOUT_KERNELS.keys())
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_call_that_no_kernel_serves_says_so_once(call, reason):
    backends = sys.modules["fastguide.ops._operation"]  # the package's attribute of that name is its function
    backends._warn_reference.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain PyTorch")
        expected = call("reference")  # chosen by name: no warning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(call("auto"), expected)
    said = [str(warning.message) for warning in caught if "plain PyTorch" in str(warning.message)]
    assert len(said) == 1 and re.match(reason, said[0])
    backends._warn_reference.cache_clear()


def test_seeds_pass_through_the_signed_schema():
    device = torch.device("cpu")
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        expected = ops.randn((2, 5), seed=seed, step=1, stream=2, first_particle=3)
        signed = seed - 2**64 if seed >= 2**63 else seed
        assert torch.equal(
            OPERATORS.randn((2, 5), signed, 1, 2, 3, None, None, torch.float32, device, "auto"), expected
        )
        with Recorder() as recorder:
            got = ops.randn((2, 5), seed=seed, step=1, stream=2, first_particle=3)
        assert recorder.names == ["randn"] and torch.equal(got, expected)


@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
def test_seeds_and_steps_are_numbers_or_tensors(backend):
    """Both give the same bits, eager and compiled. A compiled loop also works with another seed."""
    x, weights = normal(3, 5), normal(3, seed=1)

    def draws(x, weights, seed, step):
        counter = dict(seed=seed, step=step, stream=3, backend=backend)
        z = ops.randn(x.shape, **counter)
        proposed = ops.propose_and_weigh(x, z, 0.1 * x, weights, VP, **counter)
        schemes = [ops.resample(weights, scheme=s, check=False, **counter)[0] for s in reference.SCHEMES]
        return [z, ops.reverse_step(x, z, VP, **counter), *proposed, *schemes]

    compiled_draws = torch.compile(draws, fullgraph=True, backend="aot_eager")
    for seed, step in ((2**64 - 3, 2**32 - 2), (7, 0)):
        expected = draws(x, weights, seed, step)
        tensors = torch.tensor(seed - (1 << 64) if seed >= 1 << 63 else seed), torch.tensor([step])
        for got in (draws(x, weights, *tensors), compiled_draws(x, weights, *tensors)):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for name, bad in (
        ("seed", torch.tensor(1.0)),
        ("step", torch.tensor([1, 2])),
        ("seed", torch.tensor(1).to("meta")),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected an integer, or an int64 tensor of one element on cpu"):
            ops.randn((2, 3), **{"seed": 1, name: bad})


@pytest.mark.parametrize("first", (3, 2**64 - 3))
def test_a_compiled_function_takes_any_integer_seed(first):
    """torch compiles once for the first seed, once for any seed on one side of 2^63, and once for the other side."""
    x, weights, graphs = normal(3, 5), normal(3, seed=1), 0

    def draws(x, weights, seed, step):
        counter = dict(seed=seed, step=step, stream=3)
        z = ops.randn(x.shape, **counter)
        proposed = ops.propose_and_weigh(x, z, 0.1 * x, weights, VP, **counter)
        ancestors = ops.resample(weights, check=False, first_row=step, **counter)[0]
        return z, ops.reverse_step(x, z, VP, first_particle=seed % 97, **counter), *proposed, ancestors

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled_draws = torch.compile(draws, fullgraph=True, backend=counting)
    seeds = (first, 11, 0, 1, 17, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1, 12)
    for i, seed in enumerate(seeds):
        assert_same_bits(compiled_draws(x, weights, seed, i + 2), draws(x, weights, seed, i + 2))
    assert graphs <= 3


def test_clips_and_coefficients_pass_through_the_schema():
    for clip in CLIPS:
        unpacked = _arguments.unpacked_clip(_arguments.clip(clip))
        assert unpacked == ((-0.7, 0.7) if clip == 0.7 else clip) and type(unpacked) is not list
    x = torch.zeros(3, 2)
    assert _arguments.unpacked_scalars(*_arguments.scalars(VP, x, "v")) == VP
    unpacked = _arguments.unpacked_scalars(*_arguments.scalars(PER_SAMPLE, x, "v"))
    for a, b in zip(unpacked, PER_SAMPLE, strict=True):
        assert torch.equal(a, torch.as_tensor(b, dtype=torch.float32).double().expand(3)) or math.isclose(a[0], b)


# --- tensors that are not plain memory ------------------------------------------------------------------------


def calls():
    """Each operation with one of its tensors replaced: name, argument, call."""
    x, w, y = normal(4, 3), normal(4), normal(1, 3)
    table = (0.6, 0.8, 0.8, torch.full((4,), 0.6), 0.1)

    def step(t, at):
        tensors = {"x": x, "model_output": x + 1, "displacement": x - 1} | {at: t}
        return ops.reverse_step(coefficients=(0.6, 0.8, 0.8, 0.6, 0.1), seed=1, **tensors)

    def propose(t, at):
        tensors = {"x": x, "x0_hat": x + 1, "displacement": x - 1, "log_weights": w} | {at: t}
        return ops.propose_and_weigh(coefficients=(0.6, 0.8, 0.8, 0.6, 0.1), seed=1, **tensors)[1]

    def density(t, at):
        tensors = {"z": x, "y": y, "extra_variance": y.square()} | {at: t}
        return ops.log_prob_and_gradient(family="gaussian", scale=0.5, **tensors)[0]

    for at, value in (("x", x), ("model_output", x + 1), ("displacement", x - 1)):
        yield f"reverse_step, {at}", value, lambda t, at=at: step(t, at)
    yield "reverse_step, sigma_s", table[3], lambda t: ops.reverse_step(x, x, (*table[:3], t, 0.1), seed=1)
    for at, value in (("x", x), ("x0_hat", x + 1), ("displacement", x - 1), ("log_weights", w)):
        yield f"propose_and_weigh, {at}", value, lambda t, at=at: propose(t, at)
    yield "resample", w, lambda t: ops.resample(t, seed=1)[0]
    for at, value in (("z", x), ("y", y), ("extra_variance", y.square())):
        yield f"log_prob_and_gradient, {at}", value, lambda t, at=at: density(t, at)


CALLS = {name: (value, call) for name, value, call in calls()}


class Labelled(torch.Tensor):
    """A subclass that only adds a name."""


def labelled(value):
    return value.clone().as_subclass(Labelled)


def negative_view(value):
    return torch._neg_view(-value)


@pytest.mark.parametrize("make", [labelled, negative_view])
@pytest.mark.parametrize("name", CALLS)
def test_subclasses_and_views_of_the_negative_are_read_right(name, make):
    value, call = CALLS[name]
    torch.testing.assert_close(call(make(value)).as_subclass(torch.Tensor), call(value), rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "resample"])
def test_a_tensor_without_memory_is_seen_in_every_argument(name):
    """The pointer of a TwoTensor is 0, which a kernel would take for no tensor."""
    value, call = CALLS[name]
    both = call(TwoTensor(value.clone(), value.clone()))
    assert isinstance(both, TwoTensor)
    for part in (both.a, both.b):
        torch.testing.assert_close(part, call(value), rtol=0, atol=0)


def test_states_without_memory_are_seen():
    ancestors, state = torch.tensor([2, 0, 1]), normal(3, 2)
    wrapped = TwoTensor(state.clone(), state.clone())
    ops.gather_particles_(ancestors, wrapped, check=False)
    assert torch.equal(wrapped.a, state[ancestors]) and torch.equal(wrapped.b, state[ancestors])
    negative = torch._neg_view(-state)
    ops.gather_particles_(ancestors, negative)
    assert torch.equal(negative.resolve_neg(), state[ancestors])


def freed(value):
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def freed_view(value):
    second = torch.stack([value, value])[1]
    second.untyped_storage().resize_(0)
    return second


def freed_strided(value):
    every_second = torch.stack([value, value], dim=-1)[..., 0]
    every_second.untyped_storage().resize_(0)
    return every_second


def zero_tensor(value):
    return torch._efficientzerotensor(value.shape, dtype=value.dtype)


GONE = (freed, freed_view, freed_strided, zero_tensor, torch._to_functional_tensor)


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_whose_memory_is_gone_is_refused_by_name(name):
    value, call = CALLS[name]
    argument = {"resample": "log_weights", "reverse_step, sigma_s": "coefficients"}.get(name, name.split(", ")[-1])
    for make in GONE:
        with pytest.raises(ValueError, match=f"^{argument}: expected a .*in memory, got torch.float.* without memory$"):
            call(make(value))


@pytest.mark.parametrize("make", GONE)
def test_states_and_counters_whose_memory_is_gone_are_refused_by_name(make):
    ancestors, state, counter = torch.tensor([2, 0, 1]), normal(3, 2), torch.tensor([4])
    with pytest.raises(ValueError, match=r"^states\[1\]: expected .* without memory"):
        ops.gather_particles_(ancestors, state, make(state))
    with pytest.raises(ValueError, match=r"^ancestors: expected .* without memory"):
        ops.gather_particles_(make(ancestors), state)
    with pytest.raises(ValueError, match=r"^rows: expected .* without memory"):
        ops.log_prob_and_gradient(state, state, family="laplace", scale=1.0, rows=make(ancestors))
    for name in ("seed", "step"):
        with pytest.raises(ValueError, match=f"^{name}: expected .* without memory"):
            ops.randn((3, 2), **{"seed": 1, name: make(counter)})


LAYOUTS = {
    "COO": lambda t: t.to_sparse(),
    "CSR": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "CSC": lambda t: t.reshape(len(t), -1).to_sparse_csc(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t.reshape(len(t), -1))),
    "jagged": lambda t: torch.nested.nested_tensor(list(t.reshape(len(t), -1)), layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_of_another_layout_is_refused_by_name(name, backend, monkeypatch):
    value, call = CALLS[name]
    if backend == "reference":
        monkeypatch.setitem(_native._modules, "cpu", (None, "not here"))
    argument = {"resample": "log_weights", "reverse_step, sigma_s": "coefficients"}.get(name, name.split(", ")[-1])
    for laid_out in LAYOUTS.values():
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*, got "):
            call(laid_out(value))
        if name == "resample":
            with pytest.raises((TypeError, ValueError), match=r"^states\[0\]: expected .*, got "):
                ops.gather_particles_(torch.tensor([0]), laid_out(normal(1, 2)))


def fake_calls():
    """For every operation: its tensor arguments, and a call with all of them. Arguments that it changes come last."""
    x, w = normal(6, 2), normal(3, 5, seed=2)
    counter = {"seed": torch.tensor([1]), "step": torch.tensor([2])}
    table = {f"coefficients[{i}]": torch.full((6,), c) for i, c in enumerate(VP)}
    step = {"x": x, "model_output": x + 1, "displacement": x - 1, **counter, **table}
    proposal = {"x": x, "x0_hat": x + 1, "displacement": x - 1, "log_weights": x[:, 0], **counter, **table}
    density = {"z": x, "y": normal(2, 2), "extra_variance": x.square(), "rows": torch.tensor([0, 1, 1, 0, 1, 0])}
    moved = {"ancestors": torch.tensor([[4, 0, 0, 1, 1]] * 3), "states[0]": normal(3, 5, 2), "states[1]": w}

    def split(given):
        return {n: v for n, v in given.items() if "[" not in n}, tuple(v for n, v in given.items() if "[" in n)

    def reverse_step(given):
        tensors, coefficients = split(given)
        return ops.reverse_step(coefficients=coefficients, return_x0=True, **tensors)

    def propose_and_weigh(given):
        tensors, coefficients = split(given)
        return ops.propose_and_weigh(coefficients=coefficients, **tensors)

    def gather(given):
        tensors, states = split(given)
        ops.gather_particles_(tensors["ancestors"], *states)
        return states

    yield "randn", counter, lambda given: (ops.randn((4, 3), **given),)
    yield "reverse_step", step, reverse_step
    yield "propose_and_weigh", proposal, propose_and_weigh
    yield "resample", {"log_weights": w, **counter}, lambda given: ops.resample(check=False, **given)
    yield "gather_particles_", moved, gather
    yield (
        "log_prob_and_gradient",
        density,
        lambda given: ops.log_prob_and_gradient(family="gaussian", scale=0.5, **given),
    )


FAKE_CALLS = {name: rest for name, *rest in fake_calls()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("allow", (False, True))
@pytest.mark.parametrize("name", FAKE_CALLS)
def test_fake_and_real_arguments_give_fake_results_or_an_error_that_names_one(name, allow, inside):
    real, call = FAKE_CALLS[name]
    expected = call({n: v.clone() for n, v in real.items()})
    mode = FakeTensorMode(allow_non_fake_inputs=allow)
    fake = {n: mode.from_tensor(v) for n, v in real.items()}
    mixed = [real | {n: fake[n]} for n in real] + [fake | {n: real[n]} for n in real] + [real] * inside
    with mode if inside else contextlib.nullcontext():
        for given in (fake, *mixed):
            changed = [n for n, v in given.items() if n.startswith("states") and not isinstance(v, FakeTensor)]
            if given is fake or (allow and not changed):
                for got, value in zip(call(given), expected, strict=True):
                    assert isinstance(got, FakeTensor)
                    assert (got.shape, got.dtype, got.device) == (value.shape, value.dtype, value.device)
                continue
            with pytest.raises(ValueError, match=r"^\S+: expected a FakeTensor, as .*, got torch\.\w+ \[") as raised:
                call(given)
            named = str(raised.value).partition(":")[0]
            assert named in (changed if allow else given) and not isinstance(given[named], FakeTensor)


@pytest.mark.parametrize("name", FAKE_CALLS)
def test_a_fake_tensor_of_another_mode_is_refused_by_name(name):
    real, call = FAKE_CALLS[name]
    modes = FakeTensorMode(), FakeTensorMode()
    first, other = ({n: mode.from_tensor(v) for n, v in real.items()} for mode in modes)
    for argument in list(real)[1:]:
        with pytest.raises(ValueError, match=f"^{re.escape(argument)}: expected .*, got FakeTensor .*of another mode$"):
            call({n: (other if n == argument else first)[n] for n in real})


@pytest.mark.parametrize("argument", ("log_weights", "seed", "step"))
def test_resample_checks_no_weights_of_which_the_results_are_fake(argument):
    given = {"log_weights": normal(3, 5), "seed": torch.tensor([1]), "step": torch.tensor([2])}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given[argument] = mode.from_tensor(given[argument])
    with pytest.raises(
        ValueError, match=r"^check: expected False for results without values, got True with .*FakeTensor"
    ):
        ops.resample(**given)
    with mode, pytest.raises(ValueError, match=r"^check: expected False for results without values, got True with "):
        ops.resample(normal(3, 5))


# --- torch.vmap ---------------------------------------------------------------------------------------------

X, TABLE = normal(6, 2), torch.tensor([[0.1], [0.3], [0.5]]).expand(3, 6).contiguous()
BATCHED = {
    "coefficients": (TABLE, lambda c: ops.reverse_step(X, X, (*VP[:4], c), seed=1)),
    "coefficients within a derivative": (
        TABLE,
        torch.func.grad(lambda c: ops.reverse_step(X, X, (*VP[:4], c), seed=1).sum()),
    ),
    "rows": (
        torch.tensor([[0, 1] * 3, [5, 4] * 3]),
        lambda rows: ops.log_prob_and_gradient(X, X, family="laplace", scale=0.5, rows=rows)[1],
    ),
    "seed": (torch.tensor([1, 5]), lambda seed: ops.randn((6, 2), seed=seed)),
    "step": (torch.tensor([1, 5]), lambda step: ops.randn((6, 2), seed=0, step=step)),
}


@pytest.mark.filterwarnings("ignore:.* runs in plain PyTorch:RuntimeWarning")
@pytest.mark.parametrize("name", BATCHED)
def test_arguments_that_vmap_makes_many_of(name):
    many, call = BATCHED[name]
    expected = torch.stack([call(one) for one in many])
    torch.testing.assert_close(torch.vmap(call)(many), expected, rtol=1e-5, atol=1e-6)
    assert (expected[0] != expected[1]).any()


def test_vmap_looks_at_no_value():
    weights, ancestors = normal(2, 5), torch.tensor([[4, 0, 0, 1, 1]] * 2)
    for call in (lambda w: ops.resample(w), lambda w: ops.resample(X, seed=w.sum().long())):
        with pytest.raises(ValueError, match=r"^check: expected False .*, got True with torch\.float32"):
            torch.vmap(call)(weights)
    with pytest.raises(ValueError, match=r"^check: expected False inside torch.vmap, .* got True with torch.int64"):
        torch.vmap(ops.gather_particles_, out_dims=None)(ancestors, weights)
