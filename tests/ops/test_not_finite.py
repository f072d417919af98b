"""``not_finite=``: flags for inputs with a NaN or an infinite value. The results have the bits of a call without it."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastguide import ops
from fastguide.ops import DynamicThreshold, _native

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("cpu", "triton", "reference")
NOISY = (0.6, 0.8, 0.8, 0.6, 0.35)
STILL = (0.6, 0.8, 0.8, 0.6, 0.0)
BAD = (math.nan, math.inf, -math.inf)

# The input of each flag, in order.
WATCHED = {
    "reverse_step": ("x", "model_output", "displacement", "unconditional"),
    "propose_and_weigh": ("x", "x0_hat", "displacement"),
    "predict_x0": ("model_output", "unconditional"),
}


def given(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of a call, with finite values."""
    x, output, other = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind()
    if name == "predict_x0":
        number = dict(levels=NOISY[:2], prediction="v", guidance_scale=2.0)
        return dict(x=x, model_output=output, unconditional=other) | number
    if name == "reverse_step":
        guidance = dict(unconditional=output.flip(0), guidance_scale=2.0)
        return dict(x=x, model_output=output, displacement=other, coefficients=NOISY, clip=1.0, seed=1) | guidance
    weights = torch.zeros(shape[0])
    return dict(x=x, x0_hat=output, displacement=other, log_weights=weights, coefficients=NOISY, clip=1.0, seed=1)


def flags_of(name: str, value: int = 0) -> torch.Tensor:
    return torch.full((len(WATCHED[name]),), value, dtype=torch.int32)


def spoiled(value: torch.Tensor, place: int, bad: float = math.nan) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[place] = bad
    return value


def found(name: str, arguments: dict, **changes) -> list[int]:
    flags = flags_of(name)
    getattr(ops, name)(**arguments | changes, not_finite=flags)
    return flags.tolist()


def same(a, b) -> bool:
    a, b = (value if isinstance(value, tuple) else (value,) for value in (a, b))
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def only(name: str, which: str) -> list[int]:
    return [int(other == which) for other in WATCHED[name]]


# --- what is flagged ----------------------------------------------------------------------------------------


# Triton has one loop for all sizes, and widens every narrow dtype as it loads: three tiles in a row, the last not full,
# and one narrow dtype. Its interpreter is slow: each input has one bad value in a dtype, and another in the other.
@pytest.mark.parametrize(
    ("backend", "dtype", "elements"),
    [
        *itertools.product(("cpu", "reference"), FLOATS, [2100]),
        ("triton", torch.float32, 67),
        ("triton", torch.bfloat16, 40),
    ],
)
@pytest.mark.parametrize("name", WATCHED)
def test_each_flag_is_of_its_input(name, backend, dtype, elements):
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = given(name, (2, elements), dtype)
    call, flags = partial(getattr(ops, name), backend=backend), flags_of(name)
    assert same(call(**arguments, not_finite=flags), call(**arguments)) and not flags.any()
    if backend == "cpu":  # the ends of vectors and tiles, and the rests
        bad_places = itertools.product(BAD, (0, 63, 64, 2047, 2048, 2099, 2100, 4199))
        cases = itertools.product(WATCHED[name], bad_places)
    else:
        bad_places = [*zip(BAD, (0, 40, 2 * elements - 1), strict=True)]
        cases = itertools.product(WATCHED[name], bad_places)
        if backend == "triton":
            turn = FLOATS.index(dtype)
            cases = ((which, bad_places[(i + turn) % 3]) for i, which in enumerate(WATCHED[name]))
    for which, (bad, place) in cases:
        one = arguments | {which: spoiled(arguments[which], place, bad)}
        before = flags.zero_()._version
        assert same(call(**one, not_finite=flags), call(**one))
        assert flags.tolist() == only(name, which) and flags._version > before
    before = flags.fill_(1).clone()
    call(**arguments, not_finite=flags)
    assert torch.equal(flags, before)  # flags are never cleared


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_input_its_flag_is_left_alone(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    flags = torch.tensor([0, 0, 5, 6], dtype=torch.int32)
    x = torch.full((2, 3), math.nan)
    ops.reverse_step(x, x, NOISY, not_finite=flags, backend=backend)
    assert flags.tolist() == [1, 1, 5, 6]
    flags = torch.tensor([0, 0, 5, 0], dtype=torch.int32)
    ops.reverse_step(x, x, NOISY, unconditional=x, guidance_scale=2.0, not_finite=flags, backend=backend)
    assert flags.tolist() == [1, 1, 5, 1]
    flags = torch.tensor([0, 5], dtype=torch.int32)
    ops.predict_x0(x, x, NOISY[:2], prediction="v", not_finite=flags, backend=backend)
    assert flags.tolist() == [1, 5]


def table(particles: int) -> tuple[torch.Tensor, ...]:
    """Coefficients for each particle. Every second particle gets no noise."""
    return tuple(torch.tensor([(NOISY, STILL)[n % 2][i] for n in range(particles)]) for i in range(5))


OPTIONS = {
    "still": dict(coefficients=STILL),
    "of each particle": dict(coefficients="table"),
    "nothing else": dict(clip=None),
    "two results": dict(return_x0=True),
    "noise of the unclipped": dict(clip_noise=False),
    "dynamic": dict(clip=DynamicThreshold(0.9, 3.0)),
    "dynamic, noise of the unclipped": dict(clip=DynamicThreshold(0.9, 3.0), clip_noise=False),
    "dynamic, of each particle": dict(clip=DynamicThreshold(0.9, 3.0), coefficients="table"),
}


# Multipliers for each element; for each of several particles in a tile; for a particle of two tiles.
@pytest.mark.parametrize("shape", [(5, 3), (6, 40), (2, 2100)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_loop_of_the_cpu_kernel_looks_at_what_it_reads(dtype, options, shape, instruction_set):
    changes = dict(OPTIONS[options])
    if changes.get("coefficients") == "table":
        changes["coefficients"] = table(shape[0])
    whole = given("reverse_step", shape, dtype) | changes
    scales = (None, 2.0, torch.linspace(-1, 3, shape[0]))  # none, in one pass over a tile, and row by row
    for isa, moved, scale in itertools.product(_native.instruction_sets(), (False, True), scales):
        arguments = dict(whole, guidance_scale=scale)
        arguments |= {} if moved else dict(displacement=None)
        arguments |= {} if scale is not None else dict(unconditional=None)
        with instruction_set(isa):
            assert found("reverse_step", arguments, backend="cpu") == [0, 0, 0, 0]
            for which in (which for which in WATCHED["reverse_step"] if arguments[which] is not None):
                for place in (0, arguments["x"].numel() - 1):
                    one = {which: spoiled(arguments[which], place)}
                    assert found("reverse_step", arguments, **one, backend="cpu") == only("reverse_step", which)


@pytest.mark.parametrize("name", WATCHED)
def test_results_written_past_the_caches(name):
    arguments = given(name, (3, 700_001))
    assert not any(found(name, arguments, backend="cpu"))
    for which, place in itertools.product(WATCHED[name], (0, 5, 700_001, 2_100_002)):
        one = {which: spoiled(arguments[which], place)}
        assert found(name, arguments, **one, backend="cpu") == only(name, which)


# The clip and the size choose a loop of the cpu kernel. The other backends have one loop, after the clip.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize(
    ("backend", "clip", "elements"),
    [
        *itertools.product(["cpu"], (None, DynamicThreshold(0.9, 3.0)), (3, 40, 2100)),
        ("triton", DynamicThreshold(0.9, 3.0), 40),
        ("reference", DynamicThreshold(0.9, 3.0), 40),
    ],
)
def test_a_displacement_of_weighted_particles_counts_where_it_is_used(backend, clip, elements):
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = given("propose_and_weigh", (4, elements)) | dict(clip=clip, backend=backend)
    for row in range(4):
        moved = spoiled(arguments["displacement"], row * elements)
        for coefficients, used in ((NOISY, True), (STILL, False), (table(4), row % 2 == 0)):
            one = dict(displacement=moved, coefficients=coefficients)
            assert found("propose_and_weigh", arguments, **one) == [0, 0, int(used)]
            one |= dict(x=spoiled(arguments["x"], row * elements))  # x counts in any case
            assert found("propose_and_weigh", arguments, **one) == [1, 0, int(used)]
    # a finite displacement is not flagged, even if its product with the scale is infinite
    large = dict(displacement=torch.full((4, elements), 3e38), displacement_scale=10.0)
    assert found("propose_and_weigh", arguments, **large) == [0, 0, 0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", WATCHED)
def test_values_count_in_the_type_of_the_arithmetic(name, backend):
    for which in WATCHED[name]:
        arguments = given(name, (2, 3))
        if which != "x":
            arguments[which] = spoiled(arguments[which].double(), 4, 1e300)
            assert found(name, arguments, backend=backend) == only(name, which)
        arguments = given(name, (2, 3), torch.float64)
        arguments[which][1, 1] = 1e300
        assert not any(found(name, arguments, backend=backend))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WATCHED)
def test_nothing_is_finite(name, backend, shape):
    if backend == "triton":
        pytest.importorskip("triton")
    assert not any(found(name, given(name, shape), backend=backend))


# --- tracing, autograd and wrappers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reverse_step", "predict_x0"])
def test_derivatives_are_kept(name):
    arguments, gradients = given(name, (2, 3)), []
    arguments["model_output"][0, 0] = math.inf
    for flags in (None, flags_of(name)):
        leaves = {which: arguments[which].clone().requires_grad_() for which in ("x", *WATCHED[name])}
        result = getattr(ops, name)(**arguments | leaves, not_finite=flags)
        gradients.append(torch.autograd.grad(result.sum(), list(leaves.values())))
    assert flags.tolist() == only(name, "model_output")
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("name", WATCHED)
def test_in_a_function_that_is_compiled_whole(name, needs):
    if needs and name == "propose_and_weigh":
        pytest.skip("no derivative")
    arguments, flags = given(name, (2, 3)), flags_of(name)
    call = getattr(ops, name)

    def f(x, other, flags):
        one = {"x": x, WATCHED[name][-1]: other}
        result = call(**arguments | one, not_finite=flags)
        return (result[0] if isinstance(result, tuple) else result) * 1

    last = WATCHED[name][-1]
    x, other = arguments["x"].requires_grad_(needs), spoiled(arguments[last], 4)
    expected = f(x, other, flags)
    assert flags.tolist() == only(name, last)
    flags.zero_()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert same(compiled(x, other, flags), expected)
    assert flags.tolist() == only(name, last)


@pytest.mark.parametrize("name", WATCHED)
def test_fake_flags(name):
    arguments, call = given(name, (2, 3)), getattr(ops, name)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    result = call(**fake, not_finite=mode.from_tensor(flags_of(name)))
    assert (result[0] if isinstance(result, tuple) else result).shape == (2, 3)
    with pytest.raises(ValueError, match=r"^not_finite: expected a FakeTensor, as .*, got torch\.int32"):
        call(**fake, not_finite=flags_of(name))
    call(**arguments, not_finite=mode.from_tensor(flags_of(name)))
    with pytest.raises(ValueError, match=r"^x: expected a FakeTensor, as not_finite is, got torch\.float32"):
        call(**arguments, not_finite=FakeTensorMode().from_tensor(flags_of(name)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WATCHED)
def test_inference_tensors_are_written_to_in_inference_mode_alone(name, backend):
    with torch.inference_mode():
        flags = flags_of(name)
    call, arguments = partial(getattr(ops, name), backend=backend), given(name, (2, 3))
    with pytest.raises(ValueError, match=r"not_finite: expected a tensor made outside of torch\.inference_mode"):
        call(**arguments, not_finite=flags)
    with torch.inference_mode():
        call(**arguments | dict(x=arguments["x"] * math.nan), not_finite=flags)
        assert flags.tolist() == only(name, "x")


@pytest.mark.parametrize("name", WATCHED)
def test_memory_of_another_argument_or_result_is_refused(name):
    arguments = given(name, (2, 3))
    results = torch.empty(2, 3)
    out = (results, torch.empty(2)) if name == "propose_and_weigh" else results
    for other in (*(v for v in arguments.values() if isinstance(v, torch.Tensor) and v.numel() >= 3), results):
        flags = other.view(-1)[: len(WATCHED[name])].view(torch.int32)
        with pytest.raises(ValueError, match="not_finite: expected memory of its own"):
            getattr(ops, name)(**arguments, out=out, not_finite=flags)


@pytest.mark.parametrize("name", WATCHED)
def test_other_flags_are_refused_by_name(name):
    number, arguments = len(WATCHED[name]), given(name, (2, 3))
    whole = torch.zeros(2 * number, dtype=torch.int32)
    others = (
        (True, "a tensor, got bool"),
        (whole[:number].float(), r"got torch.float32 \[{number}\] on cpu"),
        (whole[:number].long(), r"got torch.int64"),
        (whole[0], r"got torch.int32 \[\] on cpu"),
        (whole[: number - 1], r"got torch.int32 \[{less}\] on cpu"),
        (whole[:number, None], r"got torch.int32 \[{number}, 1\] on cpu"),
        (whole[::2], r"got torch.int32 \[{number}\] on cpu, not contiguous"),
        (whole[:1].expand(number), "not contiguous"),
        (torch._neg_view(whole[:number]), "got torch.int32"),
        (torch.zeros(number, dtype=torch.int32, device="meta"), "on cpu, got .* on meta"),
    )
    for flags, words in others:
        kind = "" if flags is True else rf"a contiguous int32 tensor \[{number}\] .*"
        match = "not_finite: expected " + kind + words.format(number=number, less=number - 1)
        with pytest.raises((TypeError, ValueError), match=match):
            getattr(ops, name)(**arguments, not_finite=flags)
