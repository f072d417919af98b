"""Calls with plain tensors of a GPU: only the numbers are checked, and results, errors and what a kernel is given are
those of the full checks. Tensors of the CPU stand for a GPU's, and Triton's interpreter or the emulated CUDA for its
kernels."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguide import ops
from fastguide.ops import DynamicThreshold, _operation

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
VP = (0.6, 0.8, 0.8, 0.6, 0.35)
X, OUTPUT, MOVED, BASE = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
X, OUTPUT, MOVED, BASE = (value.to(DEVICE, copy=True) for value in (X, OUTPUT, MOVED, BASE))
WEIGHTS = torch.tensor([0.0, -1.0, 0.5], device=DEVICE)
COUNTER = dict(seed=2**64 - 3, step=2**32 - 2, stream=7, first_particle=2**32 - 2)

STEP = partial(ops.reverse_step, X, OUTPUT, VP, **COUNTER)
PROPOSE = partial(ops.propose_and_weigh, X, OUTPUT, MOVED, WEIGHTS, VP, **COUNTER)
PREDICT = partial(ops.predict_x0, X, OUTPUT, VP[:2], prediction="v")
RESAMPLE = partial(ops.resample, WEIGHTS, seed=3)


@pytest.fixture
def elsewhere(monkeypatch):
    """``"auto"`` serves tensors of the CPU as it serves those of a GPU. The value: for each call, whether it was
    ordinary."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    monkeypatch.setattr(_operation, "_why_not_auto", _operation.why_not)  # the interpreter too
    for operation in _operation.OPERATIONS.values():
        monkeypatch.delitem(operation.kernels, "cpu", raising=False)
    called, seen = _operation.Operation.__call__, []

    def call(self, *args: Any, **options: Any) -> Any:
        seen.append(options.get("ordinary", False))
        return called(self, *args, **options)

    monkeypatch.setattr(_operation.Operation, "__call__", call)
    return seen


def several(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(got, expected) -> None:
    for a, b in zip(several(got), several(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


CALLS = {
    "reverse_step": STEP,
    "reverse_step, clipped": partial(STEP, clip=(-0.5, 0.7), clip_noise=False, return_x0=True),
    "reverse_step, dynamic": partial(STEP, clip=DynamicThreshold(0.9, 2.0), prediction="sample"),
    "reverse_step, moved": partial(STEP, displacement=MOVED, displacement_scale=-0.5),
    "reverse_step, guided": partial(STEP, unconditional=BASE, guidance_scale=2.5, prediction="flow"),
    "reverse_step, without noise": partial(ops.reverse_step, X, OUTPUT.bfloat16(), (0.6, 0.8, 1, 0, 0)),
    "reverse_step, half": partial(ops.reverse_step, X.half(), OUTPUT, VP, displacement=MOVED.double()),
    "propose_and_weigh": PROPOSE,
    "propose_and_weigh, clipped": partial(PROPOSE, clip=0.7, displacement_scale=2.0),
    "propose_and_weigh, double": partial(
        ops.propose_and_weigh,
        X.bfloat16(),
        OUTPUT,
        MOVED,
        WEIGHTS.double(),
        VP,
        clip=DynamicThreshold(0.9, 2.0),
        seed=1,
    ),
    "predict_x0": PREDICT,
    "predict_x0, guided": partial(PREDICT, unconditional=BASE, guidance_scale=2.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_bits_of_the_full_checks(name, elsewhere):
    pytest.importorskip("triton")
    call = CALLS[name]
    got = [call() for _ in range(2)]  # the second finds the kernel that the first chose
    assert elsewhere == [True, True]
    expected = call(backend="triton")
    assert elsewhere.pop() is False
    for results in got:
        assert_same(results, expected)


@pytest.mark.parametrize("name", CALLS)
def test_memory_and_flags_of_the_callers(name, elsewhere):
    pytest.importorskip("triton")
    call = CALLS[name]
    expected = call(backend="triton")
    count = {"reverse_step": 4, "propose_and_weigh": 3, "predict_x0": 2}[call.func.__name__]
    flags = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    for options in (dict(), dict(not_finite=flags)):
        out = tuple(map(torch.empty_like, several(expected)))
        out = out if isinstance(expected, tuple) else out[0]
        versions = [tensor._version for tensor in several(out)]
        assert call(out=out, **options) is out
        assert elsewhere[-1] is True
        assert_same(out, expected)
        assert all(tensor._version > before for tensor, before in zip(several(out), versions, strict=True))
    assert not flags.any()
    bad = call.args[1].clone()
    bad[1, 2, 3] = float("nan")
    partial(call.func, call.args[0], bad, *call.args[2:], **call.keywords)(not_finite=flags)
    place = 0 if call.func is ops.predict_x0 else 1
    assert elsewhere[-1] is True and flags.tolist() == [int(i == place) for i in range(count)]


@pytest.mark.parametrize("options", [dict(), dict(num=7), dict(ess_threshold=0.5, sorted=False), dict(check=False)])
@pytest.mark.parametrize("rows", [WEIGHTS, WEIGHTS.double().repeat(4, 1)])
def test_resample(rows, options, elsewhere, cuda_device):
    rows = rows.to(cuda_device)
    got = ops.resample(rows, seed=3, **options)
    assert elsewhere == [True]
    assert_same(got, ops.resample(rows, seed=3, backend="cuda", **options))
    with pytest.raises(
        ValueError, match=r"^log_weights: expected a finite largest weight in every row, got NaN in row 0"
    ):
        ops.resample(rows.clone().fill_(float("nan")))


def test_without_a_kernel_the_reference_serves(elsewhere):
    x, output = X.double(), OUTPUT.double()
    out, flags = torch.empty_like(x), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    expected = ops.reverse_step(x, output, VP, backend="reference")
    assert torch.equal(ops.reverse_step(x, output, VP), expected)
    assert ops.reverse_step(x / 0, output, VP, out=out, not_finite=flags) is out and flags.tolist() == [1, 0, 0, 0]
    assert elsewhere == [False, True, True]


# --- what a kernel is given, and what it raises -------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, "resample"])
def test_a_kernel_is_given_the_same(name, elsewhere, monkeypatch):
    call = CALLS.get(name, RESAMPLE)
    module, given = sys.modules[f"fastguide.ops.{call.func.__name__}"], []
    operation = _operation.OPERATIONS[call.func.__name__]
    dtype, results = call.args[0].dtype, {"reverse_step": (X, X), "predict_x0": X}.get(call.func.__name__, (X,) * 4)
    operation._chosen["auto", DEVICE, dtype] = lambda *args, **options: given.append((args, options)) or results
    call()
    monkeypatch.setattr(module, "plain", lambda *tensors: False)
    call()
    assert elsewhere == [True, False]
    (got, options), (expected, others) = given
    assert options == others == {} and len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


@pytest.mark.parametrize("call", [STEP, PROPOSE, PREDICT, RESAMPLE])
def test_a_kernel_that_fails_is_called_once(call, elsewhere):
    """In a capture a second call would fail for another reason, which says less."""
    calls = []

    def fail(*args, **options):
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    _operation.OPERATIONS[call.func.__name__]._chosen["auto", DEVICE, torch.float32] = fail
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        call()
    assert elsewhere == [True] and len(calls) == 1


# --- errors -------------------------------------------------------------------------------------------------


def freed(value):
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


COUNTERS = [
    *(dict(seed=seed) for seed in (-1, 2**64, True, 1.5, None, "1", torch.tensor(1.5, device=DEVICE))),
    *(dict(step=step) for step in (-1, 2**32, False, 0.0, torch.tensor([1, 2], device=DEVICE))),
    *(dict(stream=stream) for stream in (-1, 2**16, True, 1.0)),
]
PARTICLES = [dict(first_particle=value) for value in (-1, 2**48, 2**48 - 1, True, 0.5)]
CLIPS = [dict(clip=clip) for clip in (0.0, -1.0, (1.0, 1.0), (0.0, float("nan")), "1", DynamicThreshold(2.0, 1.0))]
SCALES = [dict(displacement_scale=scale) for scale in (float("nan"), float("inf"), "1", None, True)]
FLAGS = [
    torch.zeros(9, dtype=torch.int32, device=DEVICE),
    torch.zeros(4, device=DEVICE),
    torch.zeros(8, dtype=torch.int32, device=DEVICE)[::2],
    1,
]
FLAGS += [freed(torch.zeros(count, dtype=torch.int32, device=DEVICE)) for count in (2, 3, 4)]
BAD_STEPS = [
    *COUNTERS, *PARTICLES, *CLIPS, *SCALES,
    *(dict(coefficients=(*VP[:i], bad, *VP[i + 1 :])) for i in range(5) for bad in (-1.0, float("nan"), "1", 2**1100)),
    *(dict(coefficients=bad) for bad in (VP[:4], (0.6, 0.0, 0.8, 0.6, 0.3), (0.6, 0.8, 0.8, 0.1, 0.3), 1.0, "12345")),
    dict(coefficients=(0.0, *VP[1:])), dict(prediction="noise"), dict(prediction=None), dict(displacement_scale=2.0),
    dict(clip_noise=1), dict(clip=1.0, clip_noise="no"), dict(return_x0=1), dict(unconditional=BASE),
    dict(guidance_scale=1.0), *(dict(unconditional=BASE, guidance_scale=scale) for scale in (float("inf"), "1")),
    *(dict(x=value) for value in (X.int(), X[0, 0, 0], X[:2], freed(X), X.to_sparse(), None, X.to(torch.complex64))),
    *(dict(model_output=value) for value in (OUTPUT.long(), OUTPUT[:2], OUTPUT.to("meta"), freed(OUTPUT), 1.0)),
    dict(displacement=MOVED[..., :3]), dict(displacement=freed(MOVED)), dict(unconditional=BASE[0], guidance_scale=2.0),
    *(dict(out=value) for value in (X, OUTPUT, X.double(), BASE[:2], (BASE,), freed(BASE), BASE.mT, 1)),
    dict(return_x0=True, out=BASE), dict(return_x0=True, out=(BASE, BASE)), dict(return_x0=True, out=(BASE,)),
    *(dict(not_finite=value) for value in FLAGS), dict(backend="cudnn"), dict(backend="cuda"),
]  # fmt: skip
BAD_PROPOSALS = [
    *COUNTERS, *PARTICLES, *CLIPS, *SCALES,
    *(dict(coefficients=value) for value in (VP[:4], (-0.6, *VP[1:]), (*VP[:4], 0.7), [1.0] * 4)),
    *(dict(log_weights=value) for value in (WEIGHTS.half(), WEIGHTS[:2], freed(WEIGHTS), WEIGHTS.to("meta"), None)),
    dict(x0_hat=OUTPUT[:2]), dict(displacement=MOVED.int()), dict(out=(BASE,)), dict(out=[BASE, WEIGHTS]),
    dict(out=(BASE, WEIGHTS)), dict(out=(BASE, WEIGHTS.double())), *(dict(not_finite=value) for value in FLAGS),
]  # fmt: skip
BAD_PREDICTIONS = [
    *(dict(levels=value) for value in ((0.6,), (-0.6, 0.8), (0.0, 0.0), (0.6, float("inf")), ("1", 0.8), 1.0)),
    dict(prediction="epsilon", levels=(0.0, 1.0)), dict(prediction="noise"), dict(unconditional=BASE),
    dict(guidance_scale=2.0), dict(unconditional=BASE, guidance_scale=float("nan")), dict(x=X.int()),
    dict(model_output=freed(OUTPUT)), dict(out=X), dict(out=BASE.half()), *(dict(not_finite=value) for value in FLAGS),
]  # fmt: skip
BAD_RESAMPLINGS = [
    *COUNTERS, *(dict(first_row=value) for value in (-1, 2**48, True)), dict(scheme="best"), dict(num=0), dict(num=2.0),
    dict(ess_threshold=2.0), dict(sorted=1), dict(check=None), dict(num=2, sorted=False),
    *(dict(log_weights=bad) for bad in (freed(WEIGHTS), WEIGHTS.half(), WEIGHTS - torch.inf, X)),
]  # fmt: skip
BAD = {
    "reverse_step": (BAD_STEPS, dict(x=X, model_output=OUTPUT, coefficients=VP)),
    "propose_and_weigh": (
        BAD_PROPOSALS,
        dict(x=X, x0_hat=OUTPUT, displacement=MOVED, log_weights=WEIGHTS, coefficients=VP, seed=0),
    ),
    "predict_x0": (BAD_PREDICTIONS, dict(x=X, model_output=OUTPUT, levels=VP[:2], prediction="v")),
    "resample": (BAD_RESAMPLINGS, dict(log_weights=WEIGHTS)),
}


def outcome(call) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("name", BAD)
def test_errors_of_the_full_checks(name, elsewhere, monkeypatch):
    cases, good = BAD[name]
    calls = [partial(getattr(ops, name), **good | options) for options in cases]
    with monkeypatch.context() as full:
        full.setattr(sys.modules[f"fastguide.ops.{name}"], "plain", lambda *tensors: False)
        expected = [outcome(call) for call in calls]  # first: a kernel that writes to freed memory makes it again
    assert not any(elsewhere)
    got = [outcome(call) for call in calls]
    for options, a, b in zip(cases, got, expected, strict=True):
        assert a == b, options
    assert sum(error is None for error in expected) <= 3  # what only looks bad


# --- calls that take the full checks ------------------------------------------------------------------------

TABLE = tuple(torch.full((3,), value, device=DEVICE) for value in VP)
FLAG = torch.zeros(4, dtype=torch.int32, device=DEVICE)


def in_inference_mode(call):
    with torch.inference_mode():
        return call()


UNUSUAL = {
    "not contiguous": lambda: ops.reverse_step(X.mT, OUTPUT.mT, VP),
    "another of another layout": lambda: ops.reverse_step(X, OUTPUT.mT.contiguous().mT, VP),
    "a view of the middle": lambda: ops.reverse_step(X[1:], OUTPUT[1:], VP),
    "negative": lambda: ops.predict_x0(torch._neg_view(X), OUTPUT, VP[:2], prediction="v"),
    "no elements": lambda: ops.reverse_step(X[:0], OUTPUT[:0], VP),
    "a gradient": lambda: ops.reverse_step(X, OUTPUT.clone().requires_grad_(), VP),
    "a parameter": lambda: ops.predict_x0(torch.nn.Parameter(X), OUTPUT, VP[:2], prediction="v").detach(),
    "a seed on the device": lambda: ops.reverse_step(X, OUTPUT, VP, seed=torch.tensor(3, device=DEVICE)),
    "a step on the device": lambda: PROPOSE(step=torch.tensor(3, device=DEVICE)),
    "coefficients on the device": lambda: ops.reverse_step(X, OUTPUT, TABLE),
    "levels on the device": lambda: ops.predict_x0(X, OUTPUT, TABLE[:2], prediction="v"),
    "coefficients with a gradient": lambda: ops.reverse_step(X, OUTPUT, (*VP[:4], TABLE[4].clone().requires_grad_())),
    "a list": lambda: ops.reverse_step(X, OUTPUT, list(VP)),
    "a scale on the device": lambda: STEP(displacement=MOVED, displacement_scale=torch.tensor(2.0, device=DEVICE)),
    "a guidance scale on the device": lambda: PREDICT(unconditional=BASE, guidance_scale=torch.ones(3, device=DEVICE)),
    "a backend by name": lambda: STEP(backend="triton"),
    "out with an offset": lambda: STEP(out=torch.empty(4, 5, 7, device=DEVICE)[1:]),
    "flags with an offset": lambda: STEP(not_finite=torch.zeros(8, dtype=torch.int32, device=DEVICE)[4:]),
    "out of inference mode": lambda: in_inference_mode(lambda: STEP(out=torch.empty_like(X))),
    "flags of inference mode": lambda: in_inference_mode(lambda: STEP(not_finite=FLAG.clone())),
    "a derivative": lambda: torch.func.grad(lambda x: ops.predict_x0(x, OUTPUT, VP[:2], prediction="v").sum())(X),
    "a batch": lambda: torch.vmap(lambda x: ops.reverse_step(x, OUTPUT, VP))(X[None]),
}


@pytest.mark.filterwarnings("ignore:.* runs in plain PyTorch:RuntimeWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_anything_else_takes_the_full_checks(name, elsewhere, monkeypatch):
    pytest.importorskip("triton")
    got = UNUSUAL[name]()
    assert elsewhere and not any(elsewhere)
    for module in ("reverse_step", "propose_and_weigh", "predict_x0"):
        monkeypatch.setattr(sys.modules[f"fastguide.ops.{module}"], "plain", lambda *tensors: False)
    assert_same(got, UNUSUAL[name]())


def test_a_mode_and_a_compiler_see_the_operator(elsewhere):
    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watcher():
        STEP()
    assert "fastguide.reverse_step.default" in seen and elsewhere == [False]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: ops.predict_x0(x, OUTPUT, VP[:2], prediction="v"), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(X), PREDICT(backend="triton"))


pretended = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of the CPU stand for those of two devices")


@pytest.fixture
def second_gpu(elsewhere, monkeypatch):
    """``second_gpu(tensor)``: the tensor is on ``cuda:1``, and all others on ``cuda:0``."""
    there: list[torch.Tensor] = []

    def device(self) -> torch.device:
        return torch.device("cuda", int(any(self is other for other in there)))

    monkeypatch.setattr(torch.Tensor, "device", property(device))

    def move(tensor: torch.Tensor) -> torch.Tensor:
        there[:] = [tensor]
        return tensor

    return move


@pretended
def test_tensors_on_two_gpus_are_refused(second_gpu):
    for name, call in {
        "model_output": lambda value: ops.reverse_step(X, value, VP),
        "unconditional": lambda value: PREDICT(unconditional=value, guidance_scale=2.0),
        "displacement": lambda value: ops.propose_and_weigh(X, OUTPUT, value, WEIGHTS, VP, seed=0),
        "out": lambda value: ops.reverse_step(X, OUTPUT, VP, out=value),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected .* on cuda:0.* got .*cuda:1"):
            call(second_gpu(BASE.clone()))
    with pytest.raises(ValueError, match=r"^log_weights: expected a tensor on cuda:0, where x is, got cuda:1"):
        ops.propose_and_weigh(X, OUTPUT, MOVED, second_gpu(WEIGHTS.clone()), VP, seed=0)
    with pytest.raises(
        ValueError, match=r"^not_finite: expected a contiguous int32 tensor \[4\] on cuda:0, got .*cuda:1"
    ):
        ops.reverse_step(X, OUTPUT, VP, not_finite=second_gpu(FLAG.clone()))


@pretended
@pytest.mark.parametrize(
    ("there", "call"),
    [
        ((X, WEIGHTS), PROPOSE),
        ((X,), STEP),
        ((OUTPUT,), STEP),
        ((OUTPUT,), PREDICT),
        ((WEIGHTS,), PROPOSE),
        ((FLAG,), partial(STEP, not_finite=FLAG)),
        ((X, OUTPUT), partial(STEP, not_finite=FLAG)),
        ((BASE,), partial(STEP, out=BASE)),
    ],
)
def test_the_cpu_beside_a_gpu_is_refused(there, call, monkeypatch):
    """A kernel would read or write the addresses of the other."""
    on_cpu, on_gpu = torch._C.TensorBase.is_cpu.__get__, set(map(id, there))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: id(self) not in on_gpu and on_cpu(self)))
    device = property(lambda self: torch.device("cuda", 0) if id(self) in on_gpu else CPU)
    monkeypatch.setattr(torch.Tensor, "device", device)
    with pytest.raises(ValueError, match=r"^\w+: expected .* on (cpu|cuda:0).*, got .*(cpu|cuda:0)$"):
        call()
