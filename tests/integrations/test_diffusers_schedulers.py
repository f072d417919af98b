"""The schedulers of `fastguide.integrations.diffusers` against diffusers' own: the same results with the same noise, in
every configuration. Also which steps the parent takes, and that no step waits for a device."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from fastguide import ops

diffusers = pytest.importorskip("diffusers")
from fastguide.integrations import diffusers as ours  # noqa: E402

NAMES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SHAPE = (3, 3, 5, 6)
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def both(name: str, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers': the older algorithms of DPM-Solver
        return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def trajectory(scheduler, steps: int = 10, *, dtypes=(F32, F32), outputs: int = 1, seed: int = 7, **options) -> list:
    """``(prev_sample, pred_original_sample)`` of every step, and the generator at the end."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    fixed = normal(SHAPE[0], outputs * SHAPE[1], *SHAPE[2:], seed=1)
    x = normal(*SHAPE, dtype=dtypes[0]) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    results = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = (0.3 * torch.cat([scaled.float()] * outputs, dim=1) + 0.5 * fixed).to(dtypes[1])
        out = scheduler.step(output, t, x, generator=generator, **options)
        results.append((out.prev_sample, getattr(out, "pred_original_sample", None)))
        x = out.prev_sample.to(dtypes[0])
    return [*results, generator.get_state()]


def assert_same(got: list, expected: list, tolerance: float = 3e-5) -> None:
    """Equal up to float32 rounding. Callers allow more where x0 is a small difference divided by a small alpha."""
    *got, got_state = got
    *expected, state = expected
    assert torch.equal(got_state, state)
    for step, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            error = (a.double() - b.double()).abs().max() / b.double().abs().max()
            assert error < tolerance, f"step {step}: {error:.1e}"


# --- the parent's results -----------------------------------------------------------------------------------

CLIPS = (
    dict(),
    dict(clip_sample=False),
    dict(clip_sample_range=0.7),
    dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0),
)
SPACINGS = (dict(timestep_spacing="trailing"), dict(timestep_spacing="linspace"), dict(steps_offset=1))
BETAS = (dict(beta_schedule="scaled_linear"), dict(trained_betas=[0.006] * 1000))
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
SIGMAS = (
    dict(),
    dict(use_karras_sigmas=True),
    dict(use_exponential_sigmas=True),
    dict(use_beta_sigmas=True),
    dict(final_sigmas_type="sigma_min"),
)
CHURN = dict(s_churn=3.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.1)


def cases():
    """Each option of a scheduler, together with options that act on the same arithmetic. Each table of levels is there
    only once, because the prediction type does not change how it is read."""
    for prediction, config in itertools.product(PREDICTIONS, CLIPS):
        config = dict(prediction_type=prediction, **config)
        yield "DDPMScheduler", config, {}
        for options in ({}, dict(eta=1.0), dict(eta=0.6, use_clipped_model_output=True)):
            yield "DDIMScheduler", config, options
    for config in (*SPACINGS, *BETAS):
        yield "DDPMScheduler", config, {}
        yield "DDIMScheduler", config, dict(eta=0.6)
    for kind in ("fixed_small_log", "fixed_large"):
        yield "DDPMScheduler", dict(variance_type=kind), {}
    yield "DDIMScheduler", dict(set_alpha_to_one=False), dict(eta=0.5)
    for prediction in PREDICTIONS[1:]:
        yield "DDPMScheduler", dict(prediction_type=prediction, **ZERO_SNR), {}
        yield "DDIMScheduler", dict(prediction_type=prediction, **ZERO_SNR), dict(eta=0.5)
    for prediction, options in itertools.product(PREDICTIONS, ({}, CHURN)):
        yield "EulerDiscreteScheduler", dict(prediction_type=prediction), options
    for config, options in itertools.product((*SIGMAS[1:], *SPACINGS, ZERO_SNR), ({}, CHURN)):
        yield "EulerDiscreteScheduler", dict(prediction_type="v_prediction", **config), options
    yield "EulerDiscreteScheduler", dict(prediction_type="v_prediction", timestep_type="continuous"), {}
    yield "EulerDiscreteScheduler", dict(interpolation_type="log_linear"), CHURN
    yield "EulerAncestralDiscreteScheduler", {}, {}
    for config in ({}, *SPACINGS, ZERO_SNR):
        yield "EulerAncestralDiscreteScheduler", dict(prediction_type="v_prediction", **config), {}
    for algorithm, (order, solver) in itertools.product(  # solver types differ from the second order on
        ("dpmsolver++", "sde-dpmsolver++"), ((1, "midpoint"), *itertools.product((2, 3), ("midpoint", "heun")))
    ):
        config = dict(algorithm_type=algorithm, solver_order=order, solver_type=solver)
        yield "DPMSolverMultistepScheduler", config, {}
        more = dict(prediction_type=PREDICTIONS[order - 1], thresholding=True, dynamic_thresholding_ratio=0.9)
        yield "DPMSolverMultistepScheduler", config | more | SIGMAS[min(order, 2)], {}
    for config in (
        dict(use_lu_lambdas=True),
        dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        dict(prediction_type="v_prediction", use_flow_sigmas=True),
        dict(prediction_type="v_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"),
        dict(euler_at_final=True, final_sigmas_type="sigma_min"),
        dict(lower_order_final=False, final_sigmas_type="sigma_min", solver_order=3),
        dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, variance_type="learned_range"),
        ZERO_SNR,
    ):
        yield "DPMSolverMultistepScheduler", config, {}
    for config in (
        *({}, dict(shift=3.0), dict(stochastic_sampling=True), dict(shift_terminal=0.1), dict(invert_sigmas=True)),
        *SIGMAS[1:4],
    ):
        yield "FlowMatchEulerDiscreteScheduler", config, {}


CASES = [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(cases())]


# Every scheduler with each value of each setting that it reads, and with combinations of settings that interact.
@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_trajectories(name, config, options):
    theirs, mine = both(name, **config)
    for steps in (10, 16):  # DPM-Solver treats fewer than 15 steps differently
        assert_same(trajectory(mine, steps, **options), trajectory(theirs, steps, **options))
    assert not mine.parent_calls


def test_a_variance_that_the_network_predicts():
    theirs, mine = both("DDPMScheduler", variance_type="learned_range")
    assert_same(trajectory(mine, outputs=2), trajectory(theirs, outputs=2))
    theirs, mine = both("DDPMScheduler", variance_type="learned")
    theirs.set_timesteps(5), mine.set_timesteps(5)
    output, x = normal(2, 6, 4, 4).abs(), normal(2, 3, 4, 4)
    expected, got = (s.step(output, 400, x, generator=torch.manual_seed(1)).prev_sample for s in (theirs, mine))
    torch.testing.assert_close(got, expected)
    assert not mine.parent_calls


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_come_last_stay_there(name):
    results = []
    for scheduler in both(name):
        scheduler.set_timesteps(10)
        x, output = (normal(*SHAPE, seed=k).contiguous(memory_format=torch.channels_last) for k in (0, 1))
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, scheduler.timesteps[0])
        generator = torch.Generator().manual_seed(7)
        results.append(scheduler.step(output, scheduler.timesteps[0], x, generator=generator).prev_sample)
    torch.testing.assert_close(*results[::-1])
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results)


# The dtypes of the state and of the output: narrow, mixed in both ways, wide.
@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16), (F32, F16), (F16, F32), (F64, F64)])
@pytest.mark.parametrize(
    ("name", "prediction"), [*itertools.product(NAMES[:2], PREDICTIONS), *((n, "") for n in NAMES)]
)
def test_dtypes(name, prediction, dtypes):
    """The result has the parent's dtypes, and errors no larger than the parent's, which rounds in every operation."""
    theirs, mine = both(name, **(dict(prediction_type=prediction, clip_sample=False) if prediction else {}))
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    x, output = normal(*SHAPE, dtype=dtypes[0]), normal(*SHAPE, seed=1, dtype=dtypes[1])
    steps = {}
    for kind, scheduler, inputs in (
        ("exact", theirs, (output.double(), t, x.double())),
        ("theirs", theirs, (output, t, x)),
        ("mine", mine, (output, t, x)),
    ):
        for attribute in ("_step_index", "_begin_index"):
            setattr(scheduler, attribute, None)
        scheduler.is_scale_input_called, scheduler.model_outputs, scheduler.lower_order_nums = True, [None] * 2, 0
        torch.manual_seed(3)
        # noise is drawn in the dtype of the output, so only the rest is compared
        options = dict(generator=torch.Generator().manual_seed(1)) if kind != "exact" else {}
        steps[kind] = scheduler.step(*inputs, return_dict=False, **options)
    for mine_, theirs_, exact in list(zip(steps["mine"], steps["theirs"], steps["exact"], strict=True))[::-1]:
        assert mine_.dtype == theirs_.dtype
        if name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler") and mine_ is steps["mine"][0]:
            exact = theirs_.double()
            assert (mine_.double() - exact).abs().max() < 0.1
            continue
        errors = [(v.double() - exact).abs().max() for v in (mine_, theirs_)]
        assert errors[0] <= errors[1] + 1e-6 * exact.abs().max()
    assert not mine.parent_calls


@pytest.mark.parametrize("dtype", [F16, BF16, F64])
def test_a_flow_draws_in_float32(dtype):
    theirs, mine = both("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True)
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(1)
        output, x = normal(2, 3, 5, dtype=dtype), normal(2, 3, 5, seed=1, dtype=dtype)
        x_s = scheduler.step(output, scheduler.timesteps[3], x, generator=generator).prev_sample
        results.append((x_s, torch.randn(3, generator=generator)))
    tolerance = {F16: 2e-3, BF16: 2e-2, F64: 1e-6}[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_dtypes_of_a_solver_that_predicts_the_sample():
    for dtypes in ((F16, F32), (F32, F16), (BF16, BF16)):
        found = []
        for scheduler in both("DPMSolverMultistepScheduler", prediction_type="sample"):
            scheduler.set_timesteps(5)
            for t in scheduler.timesteps[:2]:
                x_s = scheduler.step(normal(*SHAPE, dtype=dtypes[0]), t, normal(*SHAPE, dtype=dtypes[1])).prev_sample
            found.append((x_s.dtype, scheduler.model_outputs[-1].dtype))
        assert found[0] == found[1]


def test_noise_of_another_shape_or_dtype():
    for noise in (normal(1, 3, 1, 1), normal(*SHAPE, dtype=F64)):
        theirs, mine = both("DDIMScheduler")
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(10)
        x, output = normal(*SHAPE), normal(*SHAPE, seed=1)
        expected = theirs.step(output, 600, x, eta=1.0, variance_noise=noise).prev_sample
        with pytest.warns(RuntimeWarning, match="variance_noise has another shape than sample, or a wider dtype"):
            got = mine.step(output, 600, x, eta=1.0, variance_noise=noise).prev_sample
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_noise_that_is_given():
    for name, config, options in (
        ("DDIMScheduler", {}, dict(eta=0.8)),
        ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), {}),
    ):
        theirs, mine = both(name, **config)
        results = []
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(10)
            inputs = normal(*SHAPE), scheduler.timesteps[3], normal(*SHAPE, seed=1)
            results.append(scheduler.step(*inputs, variance_noise=normal(*SHAPE, seed=2), **options).prev_sample)
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES[:5])
def test_a_generator_for_each_sample(name):
    theirs, mine = both(name, **(dict(algorithm_type="sde-dpmsolver++") if name.startswith("DPM") else {}))
    options = dict(eta=1.0) if name == "DDIMScheduler" else dict(s_churn=2.0) if name == NAMES[2] else {}
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[2]
        x = scheduler.scale_model_input(normal(*SHAPE), t)
        generators = [torch.Generator().manual_seed(n) for n in range(SHAPE[0])]
        results.append(scheduler.step(normal(*SHAPE, seed=1), t, x, generator=generators, **options).prev_sample)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_outputs_are_the_parents(name):
    theirs, mine = both(name)
    for method in ("step", "set_timesteps", "scale_model_input", "index_for_timestep", "__init__"):
        if hasattr(theirs, method):
            a, b = (inspect.signature(getattr(type(s), method)).parameters for s in (mine, theirs))
            assert [(p.name, p.default, p.kind) for p in a.values() if p.name != "args"] == [
                (p.name, p.default, p.kind) for p in b.values() if p.name != "args"
            ]
    outputs = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
        scheduler.is_scale_input_called = True
        t = scheduler.timesteps[0]
        out = scheduler.step(normal(*SHAPE), t, normal(*SHAPE, seed=1), generator=torch.manual_seed(0))
        scheduler._step_index = None
        bare = scheduler.step(
            normal(*SHAPE), t, normal(*SHAPE, seed=1), generator=torch.manual_seed(0), return_dict=False
        )
        for a, b in zip(bare, out.to_tuple(), strict=True):
            torch.testing.assert_close(a, b)
        outputs.append(out)
    assert type(outputs[0]) is type(outputs[1]) and list(outputs[0]) == list(outputs[1])


# --- where a run begins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_run_may_begin_anywhere(name):
    theirs, mine = both(name)
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)

    def run(scheduler, begin):
        scheduler.set_timesteps(12)
        if begin is not None:
            scheduler.set_begin_index(begin)
        scheduler.is_scale_input_called = True
        first, second = (
            scheduler.step(output, t, x, generator=torch.manual_seed(0)).prev_sample for t in scheduler.timesteps[5:7]
        )
        assert scheduler.step_index == (5 if begin is None else begin) + 2
        return first, second

    for begin in (None, 5, 2):
        for a, b in zip(run(mine, begin), run(theirs, begin), strict=True):
            torch.testing.assert_close(a, b)


def test_the_index_of_a_timestep():
    theirs, mine = both("EulerDiscreteScheduler")
    theirs.set_timesteps(7), mine.set_timesteps(7)
    for t in (*theirs.timesteps, *theirs.timesteps.tolist()):
        assert mine.index_for_timestep(t) == theirs.index_for_timestep(t)
    with pytest.raises(IndexError):
        mine.index_for_timestep(0.5)
    theirs, mine = both("DPMSolverMultistepScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(timesteps=[900, 600, 600, 300])
    for t in (900, 600, 300, 17):  # one timestep occurs twice, and one is not in the schedule
        assert mine.index_for_timestep(t) == theirs.index_for_timestep(t)
        assert mine.index_for_timestep(torch.tensor(t)) == theirs.index_for_timestep(torch.tensor(t))


@pytest.mark.parametrize("name", NAMES[:2])
def test_without_a_schedule_or_with_timesteps_of_ones_own(name):
    theirs, mine = both(name)
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)

    def step(scheduler, t):
        return scheduler.step(output, t, x, generator=torch.manual_seed(0)).prev_sample

    if name == "DDPMScheduler":
        for t in (999, 1, 0):
            torch.testing.assert_close(step(mine, t), step(theirs, t))
        theirs.set_timesteps(timesteps=[800, 300, 20]), mine.set_timesteps(timesteps=[800, 300, 20])
        for t in (800, 300, 20):
            torch.testing.assert_close(step(mine, t), step(theirs, t))
    theirs.set_timesteps(10), mine.set_timesteps(10)
    for t in mine.timesteps.tolist():
        torch.testing.assert_close(step(mine, t), step(theirs, t))
    assert not mine.parent_calls


def test_what_changes_under_way_is_noticed():
    """Betas, sigmas and options may be changed after some steps."""
    for name, config, change in (
        ("DDIMScheduler", {}, lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2)),
        ("DDIMScheduler", {}, lambda s: s.alphas_cumprod.mul_(0.9)),
        ("DDIMScheduler", {}, lambda s: s.register_to_config(prediction_type="v_prediction")),
        ("DDIMScheduler", {}, lambda s: s.set_timesteps(20)),
        ("DDPMScheduler", {}, lambda s: setattr(s, "timesteps", s.timesteps - 10)),
        ("DDPMScheduler", {}, lambda s: s.timesteps.sub_(10)),
        ("DDPMScheduler", {}, lambda s: s.register_to_config(variance_type="fixed_large")),
        ("DDPMScheduler", {}, lambda s: setattr(s, "variance_type", "fixed_large")),
        ("EulerDiscreteScheduler", {}, lambda s: setattr(s, "sigmas", 2 * s.sigmas)),
        ("EulerDiscreteScheduler", {}, lambda s: s.sigmas.mul_(0.5)),
        ("FlowMatchEulerDiscreteScheduler", {}, lambda s: s.sigmas.mul_(0.5)),
        ("FlowMatchEulerDiscreteScheduler", {}, lambda s: (s.set_shift(5.0), s.set_timesteps(10))),
        ("DPMSolverMultistepScheduler", {}, lambda s: s.register_to_config(solver_type="heun")),
    ):
        results = []
        for scheduler in both(name, **config):
            scheduler.set_timesteps(10)
            first, second = scheduler.timesteps[4], scheduler.timesteps[5]
            x = normal(*SHAPE)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, first)
            before = scheduler.step(normal(*SHAPE, seed=1), first, x, generator=torch.manual_seed(0)).prev_sample
            change(scheduler)
            if name == "DDPMScheduler" and second not in scheduler.timesteps:
                second = scheduler.timesteps[5]
            if scheduler.num_inference_steps == 20 or getattr(scheduler, "step_index", 0) is None:
                second = scheduler.timesteps[5]
            after = scheduler.step(normal(*SHAPE, seed=2), second, x, generator=torch.manual_seed(0)).prev_sample
            results.append((before, after))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_copies_are_schedulers_of_their_own():
    _, mine = both("EulerDiscreteScheduler")
    expected = trajectory(mine, 5)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.copy(mine)):
        other.sigmas = 3 * other.sigmas
        assert_same(trajectory(mine, 5), expected, tolerance=0.0001)
        assert_same(trajectory(other, 5), expected, tolerance=0.0001)


def test_gradients_are_the_parents():
    for name, options in (("DDIMScheduler", dict(eta=0.5)), ("DDPMScheduler", {}), ("EulerDiscreteScheduler", {})):
        gradients = []
        for scheduler in both(name):
            scheduler.set_timesteps(10)
            scheduler.is_scale_input_called = True
            x, output = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1).requires_grad_()
            out = scheduler.step(output, scheduler.timesteps[3], x, generator=torch.manual_seed(0), **options)
            loss = out.prev_sample.sin().sum() + out.pred_original_sample.cos().sum()
            gradients.append(torch.autograd.grad(loss, (x, output)))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- steps that the parent takes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), "dpmsolver"),
        ("DDPMScheduler", dict(variance_type="fixed_large_log"), "fixed_large_log"),
        ("DDIMScheduler", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "no reverse step"),
        ("DDPMScheduler", dict(thresholding=True, sample_max_value=0.5), "below 1"),
    ],
)
def test_steps_that_are_left_to_the_parent_are_counted(name, config, reason):
    theirs, mine = both(name, **config)
    with pytest.warns(RuntimeWarning, match=rf"{name}: .*{reason}.*parent_calls") as warned:
        got = trajectory(mine, 6)
    assert sum(w.category is RuntimeWarning for w in warned) == 1
    ((text, count),) = mine.parent_calls.items()
    assert reason in text and count == (1 if "no reverse" in reason else 6)
    for (a, _), (b, _) in zip(got[:-1], trajectory(theirs, 6)[:-1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_other_calls_that_are_left_to_the_parent():
    theirs, mine = both("FlowMatchEulerDiscreteScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
    tokens = dict(per_token_timesteps=torch.full((2, 3), 600.0))
    x, output = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    with pytest.warns(RuntimeWarning, match="per_token_timesteps"):
        got = mine.step(output, mine.timesteps[0], x, **tokens).prev_sample
    assert torch.equal(got, theirs.step(output, theirs.timesteps[0], x, **tokens).prev_sample)
    theirs, mine = both("DDIMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
    with pytest.warns(RuntimeWarning, match="shape"):
        got = mine.step(output[:1], 750, x).prev_sample
    assert torch.equal(got, theirs.step(output[:1], 750, x).prev_sample)
    _, mine = both("EulerDiscreteScheduler")
    mine.set_timesteps(4)
    with pytest.warns(RuntimeWarning, match="scale_model_input was not called"):
        mine.step(output, mine.timesteps[0], x)


@pytest.mark.parametrize(
    ("name", "timestep"), [("DDIMScheduler", -5), ("EulerDiscreteScheduler", torch.tensor(999, dtype=torch.int16))]
)
def test_unusual_arguments_are_counted_where_the_parent_takes_them(name, timestep):
    theirs, mine = both(name)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
        scheduler.is_scale_input_called, scheduler._step_index = True, 1
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)
    expected = theirs.step(output, timestep, x).prev_sample
    with pytest.warns(RuntimeWarning, match="the arguments are unusual"):
        assert torch.equal(mine.step(output, timestep, x).prev_sample, expected)
    assert sum(mine.parent_calls.values()) == 1


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_compiled_step(name):
    results = []
    for scheduler in both(name):
        scheduler.set_timesteps(5)
        t = int(scheduler.timesteps[0]) if name == "DDIMScheduler" else scheduler.timesteps[0]
        scheduler.is_scale_input_called, scheduler._step_index = True, 0

        def step(output, x, scheduler=scheduler, t=t):
            return scheduler.step(output, t, x, return_dict=False)[0]

        torch._dynamo.reset()
        torch.manual_seed(0)
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        results.append(compiled(normal(*SHAPE), normal(*SHAPE, seed=1)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "config", "call"),
    [
        ("DDIMScheduler", {}, lambda s, x: s.step(x, 3, x)),  # no set_timesteps
        ("DPMSolverMultistepScheduler", {}, lambda s, x: s.step(x, 3, x)),
        ("DDIMScheduler", {}, lambda s, x: (s.set_timesteps(5), s.step(x, 1000, x))),
        ("DDIMScheduler", {}, lambda s, x: (s.set_timesteps(5), s.step(x, 3.5, x))),
        ("DDPMScheduler", {}, lambda s, x: (s.set_timesteps(5), s.step(x, 3, x))),
        ("DDPMScheduler", {}, lambda s, x: s.set_timesteps(2000)),
        (
            "DDIMScheduler",
            {},
            lambda s, x: (
                s.set_timesteps(5),
                s.step(x, 200, x, eta=1.0, generator=torch.Generator(), variance_noise=x),
            ),
        ),
        ("DDIMScheduler", dict(prediction_type="score"), lambda s, x: (s.set_timesteps(5), s.step(x, 200, x))),
        ("DDPMScheduler", dict(variance_type="learned"), lambda s, x: s.step(x, 200, x)),
        ("EulerDiscreteScheduler", {}, lambda s, x: s.step(x, 3, x)),
        ("EulerDiscreteScheduler", {}, lambda s, x: s.step(x, torch.tensor(3), x)),
        ("EulerDiscreteScheduler", dict(prediction_type="score"), lambda s, x: s.step(x, s.timesteps[0], x)),
        ("EulerAncestralDiscreteScheduler", dict(prediction_type="sample"), lambda s, x: s.step(x, s.timesteps[0], x)),
        ("FlowMatchEulerDiscreteScheduler", {}, lambda s, x: s.step(x, 3, x)),
        ("FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), lambda s, x: s.set_timesteps(5)),
        ("EulerDiscreteScheduler", dict(use_karras_sigmas=True, use_beta_sigmas=True), None),
    ],
)
def test_errors_are_the_parents(name, config, call):
    errors = []
    for module in (diffusers, ours):
        with pytest.raises(Exception) as caught:
            scheduler = getattr(module, name)(**config)
            scheduler.is_scale_input_called = True
            call(scheduler, normal(2, 3, 4, 4))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


# --- no wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused_noise", (False, True))
def test_no_step_asks_the_device(name, fused_noise):
    """Tensors on ``meta`` have no values, so reading one is an error. The parent reads, unless it counts its steps."""
    theirs, mine = both(name)
    mine.fused_noise = fused_noise
    options = dict(eta=0.5) if name == "DDIMScheduler" else {}

    def run(scheduler):
        scheduler.set_timesteps(5, device="meta")
        assert scheduler.timesteps.device.type == "meta"
        x = torch.empty(SHAPE, device="meta")
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                x = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.empty_like(x), t, x, **options).prev_sample
        return x

    assert run(mine).shape == SHAPE and not mine.parent_calls
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(theirs)


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_timestep_that_only_the_device_knows(name):
    _, mine = both(name)
    mine.set_timesteps(5, device="meta")
    x = torch.empty(SHAPE, device="meta")
    out = mine.step(x, torch.empty((), dtype=torch.int64, device="meta"), x)
    assert out.prev_sample.shape == SHAPE and not mine.parent_calls


# --- a timestep for each sample -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "options"), [("DDPMScheduler", {}), ("DDIMScheduler", {}), ("DDIMScheduler", dict(eta=0.7))]
)
@pytest.mark.parametrize("fused_noise", (False, True))
def test_timesteps_of_their_own(name, options, prediction, fused_noise):
    theirs, mine = both(name, prediction_type=prediction)
    theirs.set_timesteps(10), mine.set_timesteps(10)
    mine.fused_noise = fused_noise
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)
    timesteps = torch.tensor([900, 0, 300])
    got = mine.step(output, timesteps, x, generator=torch.Generator().manual_seed(5), **options)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    for n, t in enumerate(timesteps.tolist()):
        one = slice(n, n + 1)
        scheduler, generator = theirs, Replay(noise[one])
        if fused_noise:
            scheduler, generator = mine, torch.Generator().manual_seed(5)
            mine.first_sample = n
        with generator if isinstance(generator, Replay) else warnings.catch_warnings():
            drawn = None if isinstance(generator, Replay) else generator
            alone = scheduler.step(output[one], t, x[one], generator=drawn, **options)
        torch.testing.assert_close(got.prev_sample[one], alone.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.pred_original_sample[one], alone.pred_original_sample, rtol=1e-5, atol=1e-5)
    assert not mine.parent_calls


class Replay:
    """A context manager in which torch.randn returns the given noise."""

    def __init__(self, noise):
        self.noise = noise

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "randn", lambda *shape, **options: self.noise.clone())

    def __exit__(self, *_):
        self.patch.undo()


@pytest.mark.parametrize("timestep", (torch.tensor([100, 200]), torch.tensor([100.0, 200.0, 300.0])))
def test_timesteps_of_a_wrong_number(timestep):
    for name in ("DDIMScheduler", "DDPMScheduler"):
        _, mine = both(name)
        mine.set_timesteps(10)
        with pytest.raises(ValueError, match=r"^timestep: expected an integer, or 3, one for each sample, got torch"):
            mine.step(normal(*SHAPE), timestep, normal(*SHAPE))


@pytest.mark.parametrize(
    ("name", "timesteps", "bad"),
    [
        ("DDPMScheduler", [900, 33, 0], "33"),
        ("DDPMScheduler", [1500, 0, -1], "1500, -1"),
        ("DDIMScheduler", [1000, 0, -1], "1000, -1"),
    ],
)
def test_timesteps_that_are_not_on_the_schedule(name, timesteps, bad):
    _, mine = both(name)
    mine.set_timesteps(10)
    with pytest.raises(ValueError, match=rf"^timestep: expected those of the schedule, .*, got \[{bad}\]"):
        mine.step(normal(*SHAPE), torch.tensor(timesteps), normal(*SHAPE))
    assert not mine.parent_calls


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DDPMScheduler", "DDIMScheduler")])
def test_schedulers_that_count_their_steps_take_one_timestep(name):
    _, mine = both(name)
    mine.set_timesteps(3)
    mine.is_scale_input_called = True
    with pytest.raises(ValueError, match=r"^timestep: expected one for all samples, got torch"):
        mine.step(normal(*SHAPE), mine.timesteps.clone(), normal(*SHAPE))


@pytest.mark.parametrize("eta", (torch.tensor(0.5), np.float32(0.5), np.array(0.5), torch.tensor([0.5])))
def test_eta_may_be_a_tensor_or_an_array_of_one_number(eta):
    def draw(eta):
        _, mine = both("DDIMScheduler")
        mine.set_timesteps(10)
        generator = torch.Generator().manual_seed(2)
        return mine.step(normal(*SHAPE, seed=1), 500, normal(*SHAPE), eta=eta, generator=generator).prev_sample

    assert torch.equal(draw(eta), draw(0.5)) and not torch.equal(draw(eta), draw(0.0))


@pytest.mark.parametrize("eta", (torch.tensor([0.5, 0.5]), "0.5", None, math.nan, 10**400, True))
def test_an_eta_that_is_no_number_is_named(eta):
    _, mine = both("DDIMScheduler")
    mine.set_timesteps(10)
    with pytest.raises((TypeError, ValueError), match=r"^eta: expected a number, got "):
        mine.step(normal(*SHAPE), 500, normal(*SHAPE), eta=eta)


# --- fused noise --------------------------------------------------------------------------------------------


def stochastic(name: str, **config):
    if name == "DPMSolverMultistepScheduler":
        config["algorithm_type"] = "sde-dpmsolver++"
    if name == "FlowMatchEulerDiscreteScheduler":
        config["stochastic_sampling"] = True
    scheduler = both(name, **config)[1]
    scheduler.fused_noise = True
    return scheduler


OPTIONS = {"DDIMScheduler": dict(eta=1.0), "EulerDiscreteScheduler": dict(s_churn=4.0)}


def fused_run(name, x, output, generator, first_sample=0, steps=4):
    scheduler = stochastic(name)
    scheduler.set_timesteps(steps)
    scheduler.first_sample = first_sample
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, generator=generator, **OPTIONS.get(name, {})).prev_sample
    assert not scheduler.parent_calls
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_same_in_whatever_batch(name):
    x, output = normal(4, 3, 5, 6), normal(4, 3, 5, 6, seed=1)

    def seeded(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generators if len(seeds) > 1 else generators[0]

    whole = fused_run(name, x, output, seeded(11))
    for n in range(4):
        one = slice(n, n + 1)
        assert torch.equal(fused_run(name, x[one], output[one], seeded(11), first_sample=n), whole[one])
    listed = fused_run(name, x, output, seeded(5, 6, 7, 8))
    for n in range(4):
        one = slice(n, n + 1)
        assert torch.equal(fused_run(name, x[one], output[one], [seeded(5 + n)]), listed[one])
    torch.manual_seed(0)
    free = [fused_run(name, x, output, None) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(fused_run(name, x, output, None), free[0]) and (free[0] - free[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="generator: expected one, or 4"):
        fused_run(name, x, output, seeded(5, 6))


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_schedule_are_independent(name):
    """The mean over 64 batches from one generator varies as for independent noise."""
    scheduler, generator = stochastic(name), torch.Generator().manual_seed(0)
    x, output, means = normal(1, 1, 16, 16), normal(1, 1, 16, 16, seed=1), {True: [], False: []}
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    for fused in means:
        scheduler.fused_noise = fused
        for _ in range(64):
            scheduler._step_index = None
            if hasattr(scheduler, "lower_order_nums"):
                scheduler.lower_order_nums, scheduler.model_outputs = 0, [None, None]
            scheduler.is_scale_input_called = True
            options = OPTIONS.get(name, {})
            means[fused].append(scheduler.step(output, t, x, generator=generator, **options).prev_sample)
    spread = {fused: torch.stack(runs).mean(0).std().item() for fused, runs in means.items()}
    each = {fused: torch.stack(runs).std(0).mean().item() for fused, runs in means.items()}
    assert each[True] == pytest.approx(each[False], rel=0.05)
    difference = torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)
    assert difference.std().item() == pytest.approx(each[False] * (2 / 64) ** 0.5, rel=0.2), spread


@pytest.mark.parametrize("name", NAMES)
def test_fused_noise_follows_the_generators_state(name):
    x, output = normal(2, 3, 5, 6), normal(2, 3, 5, 6, seed=1)
    generator = torch.Generator().manual_seed(1)
    first, second = (fused_run(name, x, output, generator) for _ in range(2))
    assert (first - second).abs().max() > 0.01
    generator.manual_seed(1)
    assert torch.equal(fused_run(name, x, output, generator), first)
    assert torch.equal(fused_run(name, x, output, generator), second)


def test_visits_to_a_step_draw_anew_and_chunks_of_a_batch_do_not():
    scheduler, x = ours.DDPMScheduler(), normal(4, 3, 5, 6)
    scheduler.fused_noise = True
    scheduler.set_timesteps(10)

    def visit(t, low=0, high=4):
        scheduler.first_sample = low
        return scheduler.step(0 * x[low:high], t, x[low:high], generator=generator).prev_sample

    start, later = scheduler.timesteps[2], scheduler.timesteps[5]
    generator = torch.Generator().manual_seed(3)
    whole = [visit(t) for t in (start, later, later, start)]  # a step, a step taken twice, and a new run
    assert all((a - b).abs().max() > 0.01 for a, b in [(whole[1], whole[2]), (whole[0], whole[3])])
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(10)
    for t, expected in zip((start, later, later), whole, strict=False):
        assert torch.equal(torch.cat([visit(t, 0, 1), visit(t, 1, 4)]), expected)


@pytest.mark.parametrize("number", (1, 256, 257, 600))
def test_any_number_of_generators(number):
    def run(seeds):
        x = torch.zeros(len(seeds), 4)
        return fused_run("DDPMScheduler", x, 0.3 * x, [torch.Generator().manual_seed(seed) for seed in seeds])

    whole = run(range(number))
    for n in {0, number // 2, number - 1}:
        assert torch.equal(whole[n : n + 1], run([n]))


def test_generators_are_not_kept():
    scheduler = stochastic("DDPMScheduler")
    scheduler.set_timesteps(4)
    x, t = torch.zeros(3, 4), scheduler.timesteps[0]
    for _ in range(3):
        scheduler.step(x, t, x, generator=[torch.Generator() for _ in x])
    kept = torch.Generator()
    scheduler.step(x, t, x, generator=kept)
    assert list(scheduler._noise_runs) == [kept]


def test_a_list_of_generators_may_be_cut_anew_at_every_step():
    def run(*cuts):
        scheduler = stochastic("DDPMScheduler")
        scheduler.set_timesteps(4)
        generators, x = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)], normal(3, 4)
        for t, cut in zip(scheduler.timesteps, cuts, strict=True):
            parts = (slice(0, cut), slice(cut, 3))
            x = torch.cat(
                [scheduler.step(x[c], t, x[c], generator=generators[c]).prev_sample for c in parts if x[c].numel()]
            )
        return x

    assert torch.equal(run(3, 3, 3, 3), run(3, 1, 2, 3))


STOCHASTIC = [("DDPMScheduler", {}), ("DDIMScheduler", dict(eta=1.0))]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_no_noise_comes_twice(name, options):
    """For every form of the timestep, and every way to split the batch."""
    scheduler, generator, x = stochastic(name), torch.Generator().manual_seed(3), torch.zeros(2, 500)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps
    visits = [
        (0, torch.stack([t[2], t[5]])), (0, t[2]), (0, t[5]), (0, torch.stack([t[5], t[2]])),
        (0, torch.stack([t[2], t[5]])), (1, t[2]), (1, torch.stack([t[5], t[2]])), (0, t[2]),
    ]  # fmt: skip
    noise: dict[int, list] = {}  # for each sample
    for first, timestep in visits:
        scheduler.first_sample = first
        drawn = scheduler.step(x, timestep, x, generator=generator, **options).prev_sample
        for n in range(2):
            noise.setdefault(first + n, []).append(drawn[n])
    for drawn in noise.values():
        correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0.0)
        assert correlation.abs().max() < 0.25  # five standard deviations


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_a_sample_of_its_own_timesteps_is_the_same_alone(name, options):
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)

    def run(rows, *, as_number=False):
        scheduler, state = stochastic(name), x[rows]
        scheduler.set_timesteps(10)
        scheduler.first_sample, generator = rows.start, torch.Generator().manual_seed(5)
        for i in range(3):
            timestep = scheduler.timesteps[[i, 2 * i, 3 * i + 1]][rows]
            timestep = int(timestep) if as_number else timestep
            state = scheduler.step(output[rows], timestep, state, generator=generator, **options).prev_sample
        return state

    whole = run(slice(0, 3))
    for n in range(3):
        torch.testing.assert_close(run(slice(n, n + 1), as_number=True), whole[n : n + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(run(slice(1, 3)), whole[1:])


def test_a_scheduler_in_the_middle_of_a_run_can_be_copied():
    scheduler, generator, x = stochastic("DDPMScheduler"), torch.Generator().manual_seed(3), normal(2, 4)
    scheduler.set_timesteps(4)

    def step(scheduler, i):
        return scheduler.step(0 * x, scheduler.timesteps[i], x, generator=generator).prev_sample

    step(scheduler, 0)
    other, loaded = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(step(other, 1), step(scheduler, 1))
    assert (step(loaded, 2) - step(scheduler, 2)).abs().max() > 0.01  # it starts its own run


@pytest.mark.parametrize("name", NAMES)
def test_fused_noise_is_that_of_randn(name):
    """A step adds to its mean the standard deviation times the normals of seed, step and sample."""
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)
    results = []
    for fused in (True, False):
        scheduler = stochastic(name)
        scheduler.fused_noise = fused
        scheduler.set_timesteps(10)
        scheduler.is_scale_input_called = True
        t = scheduler.timesteps[3]
        step = int(t) if name in NAMES[:2] else 3
        seed = int(torch.randint((1 << 63) - 1, (1,), generator=torch.Generator().manual_seed(9)))
        z = ops.randn(SHAPE, seed=seed, step=step)
        with Replay(z):
            generator = torch.Generator().manual_seed(9) if fused else None
            results.append(scheduler.step(output, t, x, generator=generator, **OPTIONS.get(name, {})).prev_sample)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


# --- configurations and pipelines ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading(name, tmp_path):
    theirs, mine = both(name)
    mine.save_pretrained(tmp_path)
    for parent in (getattr(diffusers, name), getattr(ours, name)):
        loaded = parent.from_pretrained(tmp_path)
        assert type(loaded) is parent
        assert all(loaded.config[key] == value for key, value in theirs.config.items() if key != "_use_default_values")
    assert mine.compatibles == theirs.compatibles or set(mine.compatibles) == set(theirs.compatibles)
    cls = getattr(ours, name)
    assert not cls.from_config(theirs.config).fused_noise
    assert cls.from_config(theirs.config, fused_noise=True).fused_noise
    scheduler, unused = cls.from_config(theirs.config, return_unused_kwargs=True, fused_noise=True, more=1)
    assert scheduler.fused_noise and unused["more"] == 1


def pipeline(cls, scheduler):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return cls(net, scheduler)


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(2, generator, num_inference_steps=5, output_type="np", **options).images)


def test_a_pipeline_in_one_line(tmp_path):
    pipe = pipeline(diffusers.DDPMPipeline, diffusers.DDPMScheduler())
    expected = images(pipe)
    assert ours.accelerate(pipe) is pipe and type(pipe.scheduler) is ours.DDPMScheduler
    torch.testing.assert_close(images(pipe), expected, rtol=1e-4, atol=1e-4)
    assert not pipe.scheduler.parent_calls
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDPMScheduler  # it may be loaded without fastguide
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    torch.testing.assert_close(images(loaded), expected, rtol=1e-4, atol=1e-4)
    ours.accelerate(loaded, fused_noise=True)
    assert loaded.scheduler.fused_noise and (images(loaded) - expected).abs().max() > 0.01


def test_the_line_of_the_pipeline_with_ddim():
    """The DDIM pipeline passes ``use_clipped_model_output=None``, and converts its scheduler to diffusers' class."""
    pipe = pipeline(diffusers.DDIMPipeline, diffusers.DDIMScheduler())
    expected = images(pipe, eta=0.5)
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(images(pipe, eta=0.5), expected, rtol=1e-4, atol=1e-4)
    assert not pipe.scheduler.parent_calls


def test_accelerate_keeps_what_a_scheduler_is_set_to():
    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = old = diffusers.FlowMatchEulerDiscreteScheduler()
    old.set_shift(3.0)
    old.set_timesteps(6)
    ours.accelerate(pipe)
    assert pipe.scheduler is not old and type(old) is diffusers.FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler.shift == 3.0 and torch.equal(pipe.scheduler.timesteps, old.timesteps)
    x, output = normal(*SHAPE), normal(*SHAPE, seed=1)
    for t in old.timesteps:
        torch.testing.assert_close(pipe.scheduler.step(output, t, x)[0], old.step(output, t, x)[0])


def test_accelerate_counts_anew():
    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = diffusers.DDIMScheduler()
    first = ours.accelerate(pipe).scheduler
    first.set_timesteps(4)
    with pytest.warns(RuntimeWarning, match="shape"):
        first.step(normal(1, 3), 750, normal(2, 3))
    second = ours.accelerate(pipe).scheduler
    assert first.parent_calls and not second.parent_calls


def test_timesteps_that_stand_elsewhere():
    """The timesteps may be a slice of a tensor on a device. Here it is on ``meta``, so reading one is an error."""
    _, mine = both("DDPMScheduler")
    mine.set_timesteps(10)
    values, full = mine.timesteps.tolist(), mine.timesteps.to("meta")
    for part in (slice(0, None, 2), slice(5, None)):
        mine.timesteps = full[part]
        mine._known = mine.timesteps, 0, values[part]
        for t, value in zip(full, values, strict=True):
            assert mine._value(t) in (value if value in values[part] else None, None)


def test_accelerate_refuses_what_it_has_not():
    class Pipe:
        pass

    pipe = Pipe()
    message = r"pipe: expected an object with a \.scheduler that is one of DDPMScheduler, .*, got {}, which has none"
    with pytest.raises(TypeError, match=message.format("Pipe")):
        ours.accelerate(pipe)
    with pytest.raises(TypeError, match=message.format("DDIMScheduler")):
        ours.accelerate(diffusers.DDIMScheduler())
    pipe.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(TypeError, match="got PNDMScheduler"):
        ours.accelerate(pipe)
    pipe.components = {"scheduler": diffusers.PNDMScheduler(), "low_res_scheduler": diffusers.DDPMScheduler()}
    with pytest.warns(RuntimeWarning, match="leaves PNDMScheduler as it is"):
        ours.accelerate(pipe)
    assert type(pipe.low_res_scheduler) is ours.DDPMScheduler


def test_scaling_of_inputs():
    for name in NAMES[2:4]:
        theirs, mine = both(name)
        theirs.set_timesteps(9), mine.set_timesteps(9)
        for dtype in (F32, F16, F64):
            x = normal(*SHAPE, dtype=dtype)
            a, b = (s.scale_model_input(x, s.timesteps[4]) for s in (mine, theirs))
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == F64 else None, atol=0.0 if dtype == F64 else None)
        assert math.isclose(float(mine.init_noise_sigma), float(theirs.init_noise_sigma))
