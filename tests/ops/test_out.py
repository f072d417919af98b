"""``out=``: results are written into the caller's memory, with the bits of a call without it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastguide import ops

LEVELS = (0.6, 0.8, 0.8, 0.6, 0.35)
TABLE = tuple(torch.full((3,), value, dtype=torch.float64) for value in LEVELS)
# A particle is 35 elements: not a multiple of any vector.
X, OUTPUT, MOVED = (x.clone() for x in torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)))
WEIGHTS = torch.tensor([0.0, -1.0, 0.5])

# Each operation; reverse_step also with a table and with two results. Calls with plain numbers take a shorter path.
CALLS = {
    "randn": partial(ops.randn, (3, 5, 7), seed=1),
    "predict_x0": partial(
        ops.predict_x0, X, OUTPUT, LEVELS[:2], prediction="v", unconditional=MOVED, guidance_scale=torch.ones(3)
    ),
    "reverse_step": partial(ops.reverse_step, X, OUTPUT, LEVELS, displacement=MOVED, seed=1),
    "reverse_step of a table": partial(ops.reverse_step, X, OUTPUT, TABLE, clip=1.0, seed=1),
    "reverse_step with x0": partial(ops.reverse_step, X, OUTPUT, LEVELS, return_x0=True),
    "propose_and_weigh": partial(ops.propose_and_weigh, X, OUTPUT, MOVED, WEIGHTS, LEVELS, seed=1),
    "predict_x0 with a number": partial(
        ops.predict_x0, X, OUTPUT, LEVELS[:2], prediction="v", unconditional=MOVED, guidance_scale=2.0
    ),
    "solve_positive_part": partial(ops.solve_positive_part, X[:, :, :5].double(), X[:, 0, :5].double(), variance=0.3),
    "resample": partial(ops.resample, WEIGHTS, num=5, seed=1),
    "log_prob_and_gradient": partial(ops.log_prob_and_gradient, X, OUTPUT, family="student_t", scale=0.5, df=3.0),
}


def several(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def empty(results):
    made = tuple(map(torch.empty_like, several(results)))
    return made if isinstance(results, tuple) else made[0]


def same(a, b) -> bool:
    return all(map(torch.equal, several(a), several(b)))


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_in_the_callers_memory(name, backend):
    if backend == "triton" and ("triton" not in ops._operation.OPERATIONS[name.split()[0]].kernels):
        pytest.skip("no Triton kernel")
    if backend == "triton":
        pytest.importorskip("triton")
    call = partial(CALLS[name], backend=backend)
    expected = call()
    out = empty(expected)
    pointers = [tensor.data_ptr() for tensor in several(out)]
    versions = [tensor._version for tensor in several(out)]
    assert call(out=out) is out and same(out, expected)
    assert [tensor.data_ptr() for tensor in several(out)] == pointers
    assert all(t._version > before for t, before in zip(several(out), versions, strict=True))


@pytest.mark.parametrize("name", ["propose_and_weigh", "log_prob_and_gradient"])
def test_triton_sums_a_long_particle_into_the_callers_memory(name):
    pytest.importorskip("triton")
    x, x0, d = torch.randn(3, 2, 9000, generator=torch.Generator().manual_seed(1)).unbind()
    call = {
        "propose_and_weigh": partial(ops.propose_and_weigh, x, x0, d, WEIGHTS[:2], LEVELS, seed=1, backend="triton"),
        "log_prob_and_gradient": partial(
            ops.log_prob_and_gradient, x, d, family="gaussian", scale=0.5, backend="triton"
        ),
    }[name]
    expected = call()
    out = empty(expected)
    assert call(out=out) is out and same(out, expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("elements", [0, 7])
def test_log_densities_alone(backend, elements):
    if backend == "triton":
        pytest.importorskip("triton")
    z = X.flatten(1)[:, :elements]
    call = partial(
        ops.log_prob_and_gradient, z, -z, family="gaussian", scale=0.5, return_gradient=False, backend=backend
    )
    out = torch.full((3,), math.nan, dtype=torch.float64)
    assert call(out=out) == (out, None) and torch.equal(out, call()[0])
    both = (torch.full((3,), math.nan, dtype=torch.float64), torch.empty_like(z))
    assert call(return_gradient=True, out=both) is both and torch.equal(both[0], out)
    with pytest.raises(TypeError, match="out: expected a tensor, got"):
        call(out=both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    z = torch.empty(3, 5, dtype=dtype)
    assert torch.equal(ops.randn((3, 5), seed=1, dtype=dtype, out=z), ops.randn((3, 5), seed=1, dtype=dtype))
    x = X.to(dtype)
    out = torch.empty_like(x)
    assert torch.equal(ops.reverse_step(x, OUTPUT, LEVELS, out=out), ops.reverse_step(x, OUTPUT, LEVELS))
    for y in (OUTPUT, OUTPUT.double()):  # with a float64 y the gradient is computed in float64
        call = partial(ops.log_prob_and_gradient, x, y, family="laplace", scale=0.5)
        assert same(call(out=empty(call())), call())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 5, 8), r"out: expected a contiguous torch.float32 tensor \[3, 5, 7\] on cpu"),
        (torch.empty(3, 5, 7, dtype=torch.float64), "got torch.float64"),
        (torch.empty(3, 5, 7, device="meta"), "on cpu .*got .* on meta"),
        (torch.empty(3, 7, 5).mT, "not contiguous"),
        (torch.empty(3, 5, 7, requires_grad=True), "requires no gradient"),
        ((torch.empty(3, 5, 7),), "out: expected a tensor, got"),
        ("x", "out: expected a tensor, got str"),
    ],
)
def test_another_tensor_is_refused_by_name(out, message):
    for call in (CALLS["randn"], CALLS["reverse_step"]):
        with pytest.raises((TypeError, ValueError), match=message):
            call(out=out)


def test_of_several_results_the_wrong_one_is_named():
    with pytest.raises(TypeError, match="out: expected 2 tensors, one for each result"):
        CALLS["propose_and_weigh"](out=torch.empty(3, 5, 7))
    with pytest.raises(ValueError, match=r"out\[1\]: expected a contiguous torch.float32 tensor \[3\]"):
        CALLS["propose_and_weigh"](out=(torch.empty(3, 5, 7), torch.empty(3, dtype=torch.float64)))


@pytest.mark.parametrize("place", ["x", "model_output", "displacement"])
def test_memory_of_an_input_is_refused(place):
    given = {"x": X.clone(), "model_output": OUTPUT.clone(), "displacement": MOVED.clone(), "coefficients": LEVELS}
    shared = torch.empty(4, 5, 7)
    given[place] = shared[1:].copy_(given[place])
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        ops.reverse_step(**given, out=shared[:3])
    given[place] = shared[3:].expand(3, 5, 7)
    assert torch.equal(ops.reverse_step(**given, out=shared[:3]), ops.reverse_step(**given))


@pytest.mark.parametrize("place", ["z", "y", "log_factorials"])
def test_memory_of_what_a_density_reads_is_refused(place):
    given = {"z": X.double().exp(), "y": X.double().abs(), "log_factorials": torch.zeros(3, dtype=torch.float64)}
    if place == "log_factorials":
        results = (given[place], torch.empty_like(given["z"]))
    else:
        results = (torch.empty(3, dtype=torch.float64), given[place])
    with pytest.raises(ValueError, match="expected memory of its own"):
        ops.log_prob_and_gradient(**given, family="poisson", scale=1.0, out=results)


def test_results_share_no_memory():
    out = torch.empty(3, 5, 7)
    with pytest.raises(ValueError, match=r"out\[1\]: expected memory of its own"):
        ops.reverse_step(X, OUTPUT, LEVELS, return_x0=True, out=(out, out))


def test_a_derivative_is_refused_and_no_grad_serves():
    x, out = X.clone().requires_grad_(), torch.empty(3, 5, 7)
    with pytest.raises(ValueError, match="out: expected None where a result has a gradient"):
        ops.reverse_step(x, OUTPUT, LEVELS, out=out)
    with torch.no_grad():
        assert torch.equal(ops.reverse_step(x, OUTPUT, LEVELS, out=out), ops.reverse_step(X, OUTPUT, LEVELS))


def test_autograd_sees_the_write():
    out = torch.ones(3, 5, 7)
    w = torch.ones(3, 5, 7, requires_grad=True)
    y = (w * out).sum()
    ops.reverse_step(X, OUTPUT, LEVELS, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", ["randn", "reverse_step", "propose_and_weigh", "log_prob_and_gradient"])
def test_compiled_and_fake_calls(name):
    expected = CALLS[name]()
    out = empty(expected)
    compiled = torch.compile(lambda *out: CALLS[name](out=out if len(out) > 1 else out[0]), backend="aot_eager")
    compiled(*several(out))
    assert same(out, expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = empty(expected)
        assert CALLS[name](out=fake) is fake


def test_a_row_that_is_refused_is_refused_with_out():
    call = partial(ops.resample, torch.tensor([math.nan, 0.0]))
    out = (torch.empty(2, dtype=torch.int32), torch.empty(2), *torch.empty(2, dtype=torch.float64).unbind())
    with pytest.raises(ValueError, match="got NaN in row 0"):
        call(out=out)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_inference_tensor_is_written_to_in_inference_mode_alone(backend):
    """torch's own functions behave the same."""
    call = partial(CALLS["reverse_step"], backend=backend)
    with torch.inference_mode():
        out = torch.empty_like(X)
    with pytest.raises(ValueError, match=r"out: expected a tensor made outside of torch\.inference_mode"):
        call(out=out)
    with torch.inference_mode():
        assert same(call(out=out), call())


@pytest.mark.parametrize("name", ["randn", "predict_x0", "reverse_step"])
def test_in_a_function_that_is_compiled_whole(name):
    compiled = torch.compile(lambda out: CALLS[name](out=out) * 1, backend="aot_eager", fullgraph=True)
    assert same(compiled(torch.empty_like(X)), CALLS[name]())
