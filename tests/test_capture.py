"""`fastguide.capture`: what a replay reads again, what it keeps, what it refuses, and the calls of CUDA.

Without a GPU, a `Tape` stands in for the graph. Like a CUDA graph, it is a fixed list of operations on fixed memory.
Numbers that Python computed while recording are constants in it. So a test fails if a seed or an observation is not
read from the device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import sys
import threading
import traceback
import types
import weakref

import pytest
import torch
from test_arguments import FIT_NOWHERE
from test_docs import blocks
from test_sampling import assert_same
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from watched import watched

import fastguide as fg
from fastguide.likelihoods import Callable, Gaussian, Laplace, Poisson
from fastguide.operators import AveragePool, Blur, Inpainting

capturing = sys.modules["fastguide.capture"]  # fastguide.capture is the function

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", GPU]
RECORD, CUDA_DEVICE = capturing._record, capturing._cuda_device


def copied(results, new):
    for tensor, value in zip(tree_flatten(results)[0], tree_flatten(new)[0], strict=True):
        if tensor is not None:
            tensor.copy_(value)


class Tape(TorchDispatchMode):
    """Records the operations, and repeats them: each reads and writes the memory that it did when it was recorded."""

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        if isinstance(results, bool | int | float | complex):
            assert not any(isinstance(a, torch.Tensor) for a in args), f"{function} gives a number to the host"
        elif not function.is_view:  # a view is of the same memory still
            self.recorded.append((function, args, kwargs, results))
        return results

    def repeat(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.recorded:
                copied(results, function(*args, **kwargs))


def traced(function, device):
    """Stands in for `capture._record` on the CPU, with a `Tape`."""
    function()
    with Tape() as tape:
        results = function()
    return capturing._Recorded(results, tape.repeat)


def rerun(function, device):
    """Stands in for `capture._record` by calling the function again. Fast, for tests that are not about graphs."""
    results = function()
    return capturing._Recorded(results, lambda: copied(results, function()))


@pytest.fixture(autouse=True)
def recording(monkeypatch, request):
    """On the CPU, record with `rerun`, or with `traced` in tests that use the fixture ``trace``."""
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(capturing, "_cuda_device", lambda device: device)
        monkeypatch.setattr(capturing, "_record", traced if "trace" in request.fixturenames else rerun)


@pytest.fixture
def trace(recording):
    """See `recording`."""


class Network(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return self.layers(x.to(self.layers[0].weight.dtype)) + 1e-3 * t.reshape(-1, 1, 1, 1)


def brightness(x):
    return x.flatten(1).sum(1)


def measurement(seed, *shape):
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(seed % 1000))


def pooled(seed, scale=0.1, kind=Gaussian):
    return kind(measurement(seed, 2, 2), AveragePool(4), scale)


def nearness(x0, y):
    return -(x0 - y).square().flatten(1).sum(1)


MASK = torch.zeros(1, 8, 8, dtype=torch.bool)
MASK[:, :3, :3] = True
DECODER = torch.nn.Conv2d(1, 1, 1).requires_grad_(False)
BLUR = Blur(torch.ones(3, 3) / 9, padding="zeros")

LIKELIHOODS = {
    "pooled": pooled,
    "wide": lambda seed: pooled(seed, 0.3),
    "blurred": lambda seed: Gaussian(measurement(seed, 8, 8), BLUR, 0.1),
    "masked": lambda seed: Gaussian(measurement(seed, 3, 3).flatten(1), Inpainting(MASK), 0.3),
    "Laplace": lambda seed: pooled(seed, kind=Laplace),
    "Poisson": lambda seed: Poisson(measurement(seed, 2, 2).abs(), AveragePool(4), 0.3),
    "callable": lambda seed: Callable(nearness, y=measurement(seed, 8, 8)),
}
# Every method, with each covariance, proposal, potential and way to draw y that changes the loop.
GUIDANCES = {
    "plain": (None, lambda _: None),
    "DPS": ("pooled", lambda p: fg.DPS(p, zeta=lambda t: 0.2 + 0.01 * t)),
    "DPS moment": ("pooled", lambda p: fg.DPS(p, "score", normalize=False, covariance="moment")),
    "DPS isotropic": ("pooled", lambda p: fg.DPS(p, covariance="isotropic")),
    "PiGDM": ("pooled", lambda p: fg.PiGDM(p, zeta=lambda t: 0.1 + 0.01 * t)),
    "PnP": ("blurred", lambda p: fg.PnP(p, rho=2.0)),
    "PnP Laplace": ("Laplace", lambda p: fg.PnP(p, iterations=1)),
    "DAPS": ("pooled", lambda p: fg.DAPS(p, ode_steps=2)),
    "DAPS Poisson": ("Poisson", lambda p: fg.DAPS(p, r=0.5, iterations=2)),
    "LatentPnP": ("pooled", lambda p: fg.LatentPnP(p, DECODER, gamma=40.0, solver="gradient", iterations=2)),
    "TDS": ("wide", lambda p: fg.TDS(p, 8)),
    "TDS ddpm": ("wide", lambda p: fg.TDS(p, 8, base_kernel="ddpm")),
    "TDS multinomial": ("masked", lambda p: fg.TDS(p, 8, covariance="point", resampler="multinomial")),
    "TDS Poisson": ("Poisson", lambda p: fg.TDS(p, 8, covariance="point")),
    "FK": (None, lambda _: fg.FK(brightness, 8, potential="max", strength=2.0)),
    "FK guided": (
        None,
        lambda _: fg.FK(brightness, 8, potential="sum", proposal="guided", covariance="point", strength=1.5),
    ),
    "FK of y": ("callable", lambda p: fg.FK(p, 8, resample_steps=2)),
}


def guidance(name, seed):
    likelihood, make = GUIDANCES[name]
    return make(None if likelihood is None else LIKELIHOODS[likelihood](seed))


def arguments(name, device="cpu", prior=None, **options):
    """Arguments for both `capture` and `sample`."""
    DECODER.to(device)
    particles = name.startswith(("TDS", "FK"))
    options = {"steps": 3, "device": device, "keep_ancestors": particles} | options
    return (denoiser(device) if prior is None else prior, (2, 1, 8, 8)), options


def denoiser(device="cpu", seed=0, **options):
    network = Network(seed).to(device).requires_grad_(False)
    return fg.Denoiser(network, fg.schedules.vp_cosine(100), prediction="v", **options)


def guided(scale, device="cpu"):
    return denoiser(device, unconditional=Network(1).to(device).requires_grad_(False), guidance_scale=scale)


SEEDS = (1, 2**64 - 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_replay_is_the_eager_loop_of_its_seed_and_observation(name, device, trace):
    given, options = arguments(name, device)
    run = fg.capture(*given, guidance=guidance(name, 0), **options)
    likelihood = GUIDANCES[name][0]
    outs = []
    for seed in SEEDS:
        y = {} if likelihood is None else {"y": LIKELIHOODS[likelihood](seed).y}
        outs.append(run(seed=seed, **y))
    for seed, out in zip(SEEDS, outs, strict=True):  # earlier results do not change
        expected = fg.sample(*given, guidance=guidance(name, seed), seed=seed, **options)
        assert_same(out, expected)
        assert (out.seed, out.times, out.method) == (expected.seed, expected.times, expected.method)
    assert torch.isfinite(out.x).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_a_start_and_the_forms_of_a_guidance_scale_are_read_anew(device, dtype, trace):
    x_T = measurement(3, 8, 8)[:, None].repeat(1, 3, 1, 1, 1)
    scales = ((2.0, 0.5), ([2.0, 3.0, 4.0], lambda t: 0.01 * t), (torch.tensor([1.0, 3.0]), torch.tensor([2, 0.5])))
    for first, other in scales:
        given, options = arguments("plain", device, guided(first, device), dtype=dtype, samples_per_observation=3)
        run = fg.capture(*given, **options)
        again = arguments("plain", device, guided(other, device))[0], arguments("plain", device, guided(1.5, device))[0]
        assert_same(run(seed=5, x_T=x_T, guidance_scale=other), fg.sample(*again[0], seed=5, x_T=x_T, **options))
        assert_same(run(seed=6, guidance_scale=1.5), fg.sample(*again[1], seed=6, **options))
        assert_same(run(seed=7), fg.sample(*given, seed=7, **options))  # the inputs of the capture


def test_what_is_not_given_is_that_of_the_capture():
    y, other = measurement(1, 2, 2), measurement(2, 2, 2)
    given, options = arguments("DPS")
    likelihood = Gaussian(y, AveragePool(4), 0.1)
    run = fg.capture(*given, guidance=fg.DPS(likelihood), **options)
    first = run(seed=1)
    assert not torch.equal(run(seed=1, y=other, x_T=measurement(0, 8, 8)).x, first.x)
    assert torch.equal(likelihood.y, measurement(1, 2, 2))  # the caller's own tensor is unchanged
    assert_same(run(seed=1), first)
    assert_same(first, fg.sample(*given, guidance=fg.DPS(likelihood), seed=1, **options))
    y.zero_()
    assert_same(run(seed=1), first)


def test_a_seed_is_drawn_where_none_is_given():
    given, options = arguments("plain")
    run = fg.capture(*given, **options)
    torch.manual_seed(3)
    outs = [run(), run()]
    torch.manual_seed(3)
    for out in outs:
        assert_same(out, fg.sample(*given, **options))
    assert outs[0].seed != outs[1].seed


def distance(x0, y):
    return -(x0 - y).abs().square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "guided_by",
    (
        lambda y: fg.DPS(Gaussian(y, fg.operators.Function(lambda x: x * (1 + 1j)), 0.1)),
        lambda y: fg.FK(Callable(distance, y=y), 4),
    ),
)
def test_complex_observations(guided_by, trace):
    y = torch.complex(measurement(0, 8, 8), measurement(1, 8, 8))
    given, options = arguments("plain")
    run = fg.capture(*given, guidance=guided_by(y), **options)
    assert_same(run(seed=1, y=1j * y), fg.sample(*given, guidance=guided_by(1j * y), seed=1, **options))
    with pytest.raises(ValueError, match=r"^y: expected shape \[2, 1, 8, 8, 2\], that of the capture, got "):
        run(seed=1, y=y.real.contiguous())


def test_the_arguments_of_capture_are_those_of_sample():
    ours, theirs = (inspect.signature(f).parameters for f in (fg.capture, fg.sample))
    named = {name: p for name, p in ours.items() if p.kind is not p.VAR_KEYWORD}
    assert named.keys() | capturing._REFUSED.keys() == theirs.keys()
    assert not named.keys() & capturing._REFUSED.keys()
    assert all(p.default == theirs[name].default and p.kind == theirs[name].kind for name, p in named.items())


def test_the_example_of_the_docs_runs():
    """With a small network and without a GPU. `test_docs` runs it unchanged."""
    (block,) = (block for block in blocks("cuda-graphs") if "fg.capture" in block.code)
    names = dict(fg=fg, prior=denoiser(), likelihood=pooled(0), y=pooled(1).y)
    exec(block.code[block.code.index("run = ") :], names)
    likelihood = pooled(1)
    likelihood.y = likelihood.y + 0.1
    expected = fg.sample(names["prior"], (2, 1, 8, 8), guidance=fg.DPS(likelihood, zeta=0.5), seed=2)
    assert_same(names["out"], expected)


# --- weights and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", (False, True))
def test_weights_changed_in_place_count(device, autocast, trace):
    """Also under autocast, which caches casts of weights that need gradients."""
    given, options = arguments("plain", device)
    given[0].net.requires_grad_(True)
    modes = functools.partial(torch.autocast, device, torch.bfloat16, enabled=autocast)
    with modes():
        run = fg.capture(*given, **options)
    with torch.no_grad():
        given[0].net.layers[0].weight.mul_(2.0)
    with modes():
        expected = fg.sample(*given, seed=1, **options)
    assert_same(run(seed=1), expected)


def test_a_replay_has_the_modes_of_the_capture(trace):
    given, options = arguments("DPS")
    with torch.autocast("cpu", torch.bfloat16):
        run = fg.capture(*given, guidance=guidance("DPS", 0), **options)
        expected = fg.sample(*given, guidance=guidance("DPS", 1), seed=1, **options)
    with torch.inference_mode():
        out = run(seed=1, y=measurement(1, 2, 2))
    assert_same(out, expected)
    assert not out.x.is_inference() and not out.x.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_in_inference_mode_serves_outside_of_it(device, trace):
    given, options = arguments("DPS", device, guided(2.0, device))
    with torch.inference_mode():
        run = fg.capture(*given, guidance=guidance("DPS", 0), **options)
    expected = fg.sample(*given, guidance=guidance("DPS", 1), seed=1, **options)
    assert_same(run(seed=1, y=pooled(1).y, guidance_scale=2.0), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_conditions_changed_in_place_count(device, trace):
    """Another prompt is written into the tensor of the first one."""
    network = Network().to(device).requires_grad_(False)
    condition = torch.zeros(2, 1, 1, 1, device=device)
    conditional = fg.Conditional(lambda x, t, shift: network(x, t) + shift, shift=condition)
    prior = fg.Denoiser(conditional, fg.schedules.vp_cosine(100), prediction="v")
    given, options = arguments("plain", device, prior)
    run = fg.capture(*given, **options)
    before = run(seed=1)
    condition.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
    after = run(seed=1)
    assert_same(after, fg.sample(*given, seed=1, **options))
    assert torch.equal(after.x[0], before.x[0]) and not torch.equal(after.x[1], before.x[1])


def test_the_network_runs_once_and_is_recorded_once(trace):
    given, options = arguments("plain")
    run = fg.capture(*given, **options)
    assert given[0].net.calls == 2 * options["steps"]
    run(seed=1)
    assert given[0].net.calls == 2 * options["steps"]  # a replay calls no Python


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ("plain", "DPS", "TDS"))
def test_a_replay_launches_little_beside_the_graph(name, monkeypatch):
    """The number of launches does not depend on the steps: the host copies inputs and results, and reads the flags."""
    found = []
    for steps in (3, 9):
        given, options = arguments(name, steps=steps)
        run = fg.capture(*given, guidance=guidance(name, 0), **options)
        run._recorded = run._recorded._replace(replay=lambda: None)
        x_T = torch.zeros(run._run.shape)  # with kernels, noise is one launch
        with Count() as count:
            run(seed=1, x_T=x_T)
        found.append(count.operations)
    assert found[0] == found[1] < 25


# --- errors -------------------------------------------------------------------------------------------------


def test_what_cannot_be_in_a_capture_is_refused_by_name():
    given, options = arguments("plain")
    for name in ("progress", "callback", "checkpoint", "checkpoint_every", "run_id"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': no Python runs between"):
            fg.capture(*given, **options, **{name: None})
    for name in ("seed", "x_T"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': it is an argument of each replay"):
            fg.capture(*given, **options, **{name: None})
    for call in (fg.capture, fg.sample):
        with pytest.raises(TypeError, match="unexpected keyword argument 'graph'"):
            call(*given, **options, graph=True)


def test_a_capture_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(capturing, "_cuda_device", CUDA_DEVICE)
    (prior, shape), _ = arguments("plain")
    conditional = fg.Denoiser(fg.Conditional(prior.net), prior.schedule, "v")
    expected = r"^device: expected a CUDA device, where the graph runs and the network must be, got "
    for options in (dict(), dict(device="cpu"), dict(device="meta")):
        for net in (prior, conditional):
            with pytest.raises(ValueError, match=expected + rf"{options.get('device', 'cpu')}; fastguide.sample runs"):
                fg.capture(net, shape, **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = fg.Denoiser(lambda x, t: x, prior.schedule, "v")
    for net, options in ((prior, dict(device="cuda:1")), (without, {})):  # for a function, None means a GPU
        with pytest.raises(ValueError, match=expected + r"cuda(:1)?, and torch sees none; fastguide.sample"):
            fg.capture(net, shape, **options)


def test_the_checks_of_sample_are_those_of_capture():
    given, options = arguments("plain")
    bad = dict(steps=0, eta=2.0, clip=-1.0, first_sample=-1, samples_per_observation=0, dtype=torch.int32, chunk_size=0,
               keep_ancestors=True, guidance=fg.DPS)  # fmt: skip
    for name, value in bad.items():
        found = []
        for call in (fg.capture, fg.sample):
            with pytest.raises((TypeError, ValueError), match=name) as caught:
                call(*given, **options | {name: value})
            found.append(str(caught.value))
        assert found[0] == found[1]
    likelihood = Gaussian(measurement(0, 2, 2).requires_grad_(), AveragePool(4), 0.1)
    with pytest.raises(ValueError, match=r"^y: expected a tensor that needs no gradient with DPS"):
        fg.capture(*given, **options, guidance=fg.DPS(likelihood))


def test_what_fits_no_call_is_named():
    given, options = arguments("DPS", prior=guided(2.0))
    run = fg.capture(*given, guidance=guidance("DPS", 0), **options)
    before = run(seed=1)
    for name in ("seed", "y", "x_T", "guidance_scale"):
        for value in FIT_NOWHERE.values():
            if name == "guidance_scale" and value is True:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got "):
                run(**{name: value})
    y, x_T = measurement(1, 2, 2), measurement(1, 8, 8)
    wrong = {
        "seed: expected an integer, since a captured loop has one seed for all": dict(seed=[1, 2]),
        r"seed: expected an integer in \[0, 18446744073709551615\], got -1": dict(seed=-1),
        r"y: expected shape \[2, 1, 2, 2\], that of the capture, got \[1, 1, 2, 2\]": dict(y=y[:1]),
        r"y: expected finite values, got NaN or infinity in row 0": dict(y=y / 0),
        r"y: expected shape .*, got \[2, 1, 2, 2, 2\]": dict(y=y * 1j),
        r"x_T: expected shape \[2, 1, 8, 8\], got \[2, 64\]": dict(x_T=x_T.flatten(1)),
        r"x_T: expected floating values, got .*int64": dict(x_T=x_T.long()),
        r"guidance_scale: expected a number, as in the capture, got \[1.0, 1.0, 1.0\]": dict(guidance_scale=[1.0] * 3),
        r"guidance_scale: expected a number, as in the capture, got ": dict(guidance_scale=torch.ones(2)),
        r"guidance_scale: expected a number, or one for each of 2": dict(guidance_scale=torch.ones(3)),
        "y: expected a tensor that needs no gradient, since a captured loop": dict(y=y.clone().requires_grad_()),
        "x_T: expected a tensor that needs no gradient, since a captured": dict(x_T=x_T.clone().requires_grad_()),
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            run(**call)
    assert_same(run(seed=1), before)
    of_each = fg.capture(guided(torch.ones(2)), (2, 1, 8, 8), steps=3)
    with pytest.raises(ValueError, match=r"^guidance_scale: expected a number or a tensor \[B\], as in the capture"):
        of_each(guidance_scale=lambda t: 1.0)
    unguided = fg.capture(*arguments("plain")[0], steps=3)
    for name, value in (("y", y), ("guidance_scale", 2.0)):
        with pytest.raises(ValueError, match=f"^{name}: expected None without "):
            unguided(**{name: value})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["plain", "DPS"])
def test_a_replay_says_where_values_stopped_being_finite(name, device, trace):
    given, options = arguments(name, device)
    run = fg.capture(*given, guidance=guidance(name, 0), **options)
    bias = given[0].net.layers[0].bias
    before = bias.clone()
    bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^net: expected finite values, got NaN( or infinity)? at step 0"):
        run(seed=1)
    bias.copy_(before)
    assert_same(run(seed=1), fg.sample(*given, guidance=guidance(name, 0), seed=1, **options))


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_names_the_observation_that_lost_its_particles(device, trace):
    limit = torch.full((2, 1), 1e9, device=device)

    def below(x0, y):
        return torch.where(x0.flatten(1).sum(1) < y[:, 0], 0.0, -torch.inf)

    given, options = arguments("FK", device)
    run = fg.capture(*given, guidance=fg.FK(Callable(below, y=limit), 8), **options)
    run(seed=1)
    limit[1] = -1e9
    message = r"^log_weights: .* got none for observation 1 after the last step: no particle is alive"
    with pytest.raises(FloatingPointError, match=message):
        run(seed=1, y=limit)


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_warns_of_particles_without_a_reward(device, trace):
    threshold = torch.full((), torch.inf, device=device)

    def reward(x, t):  # NaN only at the last level; 0 before it
        return (
            torch.where(x.flatten(1).sum(1) > threshold, torch.nan, 0.0) if t < 0 else torch.zeros_like(x[:, 0, 0, 0])
        )

    given, options = arguments("FK", device)
    run = fg.capture(*given, guidance=fg.FK(reward, 8), **options)
    threshold.copy_(run(seed=1).x.flatten(2).sum(2).median())  # the graph reads it from its memory
    message = "^reward: returned NaN for .* They got weight 0"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        out = run(seed=1)
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match=message) as expected:
        assert_same(out, fg.sample(*given, guidance=fg.FK(reward, 8), seed=1, **options))
    assert str(caught[0].message) == str(expected[0].message)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_loop_that_asks_the_device_is_refused(device):
    network = Network().to(device).requires_grad_(False)

    def asks(x, t):
        return network(x, t) * (1.0 if x.sum().item() > 0 else 0.5)

    prior = fg.Denoiser(asks, fg.schedules.vp_cosine(100), prediction="v")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^capture: the loop cannot be recorded as a CUDA graph: ") as caught:
            fg.capture(prior, (2, 1, 8, 8), steps=3)
        assert "asks" in [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    given, options = arguments("plain", device)  # a capture that failed has no effect on the next
    assert_same(fg.capture(*given, **options)(seed=1), fg.sample(*given, seed=1, **options))


# --- what a graph reads -------------------------------------------------------------------------------------


class Cuda:
    """Stands in for ``torch.cuda`` and records the calls. Ending a broken capture raises another error."""

    def __init__(self, monkeypatch):
        self.noted, self.stack, calls = [], ["main"], self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                calls.noted.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def replay(self):
                calls.noted.append("replay")

        @contextlib.contextmanager
        def stream(on):
            before = list(calls.stack)
            calls.stack.append(on.name)
            try:
                yield
            finally:
                calls.stack[:] = before

        @contextlib.contextmanager
        def graph(made, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            calls.stack.append(f"capture on {stream.name}")
            yield
            if "broken" in calls.noted:  # then torch keeps the capture's stream as the current one
                raise RuntimeError("the capture was invalidated")
            calls.stack.pop()

        stand_ins = dict(
            device=contextlib.nullcontext, Stream=Stream, CUDAGraph=CUDAGraph, stream=stream, graph=graph,
            current_stream=lambda: Stream("main"),
        )  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        cleared = lambda: calls.noted.append("cuBLAS cleared")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cleared, raising=False)
        monkeypatch.setattr(capturing, "_record", RECORD)

    def loop(self):
        self.noted.append(f"run: {self.stack[-1]}")
        return ("results",)


@pytest.fixture
def cuda(monkeypatch, recording):
    return Cuda(monkeypatch)


def test_a_loop_is_warmed_up_and_recorded_on_a_stream_of_its_own(cuda):
    recorded = RECORD(cuda.loop, torch.device("cuda"))
    assert recorded.results == ("results",)
    begun = ["side waits for main", "run: side", "main waits for side"]
    assert cuda.noted == [*begun, "cuBLAS cleared", "run: capture on side", "cuBLAS cleared"]
    cuda.noted.clear()
    recorded.replay()
    assert cuda.noted == ["replay"] and cuda.stack == ["main"]


def test_a_broken_capture_says_what_broke_it(cuda):
    def breaks():
        if cuda.stack[-1].startswith("capture"):
            cuda.noted.append("broken")
            raise ValueError("this network asks the device\nfor long")

    message = "^capture: the loop cannot be recorded as a CUDA graph: ValueError: this network asks the device$"
    with pytest.raises(RuntimeError, match=message) as caught:
        RECORD(breaks, torch.device("cuda"))
    assert isinstance(caught.value.__cause__, ValueError)
    assert cuda.stack == ["main"] and cuda.noted[-1] == "cuBLAS cleared"


class Held:
    """A network that reads all kinds of tensors: parameters, buffers, and tensors in plain objects and closures."""

    def __init__(self):
        self.module = Network().requires_grad_(False)
        self.module.register_buffer("shift", torch.zeros(1))
        self.settings = types.SimpleNamespace(scale=torch.ones(1))
        self.sparse = torch.eye(8).to_sparse()  # its memory is not recorded
        inner = torch.ones(1)
        self.closure = lambda x: x * inner

    def __call__(self, x, t):
        x = torch.sparse.mm(self.sparse, x.transpose(0, 2).reshape(8, -1)).view(8, 1, -1, 8).transpose(0, 2)
        return self.closure(self.module(x, t) * self.settings.scale + self.module.shift)

    def tensors(self):
        found = [*self.module.parameters(), self.module.shift, self.settings.scale]
        return [*found, self.closure.__closure__[0].cell_contents]

    def replace(self):
        """Replaces the tensors by others, which a replay does not read."""
        for layer in self.module.layers:
            layer.weight.data = torch.zeros_like(layer.weight)
            layer.bias = torch.nn.Parameter(torch.zeros_like(layer.bias))
        self.module.shift, self.settings.scale, self.closure = torch.zeros(1), torch.zeros(1), lambda x: x


@pytest.mark.parametrize("name", ("plain", "DPS", "PnP", "TDS"))
def test_all_that_a_graph_reads_is_kept_and_freed_with_it(name, cuda):
    network = Held()
    prior = fg.Denoiser(network, fg.schedules.vp_cosine(100), prediction="v")
    guided_by = guidance(name, 0)
    gc.collect()
    run = fg.capture(prior, (2, 1, 8, 8), guidance=guided_by, steps=3, device="cpu")
    read = [weakref.ref(t.untyped_storage()) for t in network.tensors()]
    places = [t.data_ptr() for t in network.tensors()]
    own = [run._seed_there, run._x_T_there, *run._recorded.results]
    own += [] if guided_by is None else [run._y_there]
    own = [weakref.ref(t.untyped_storage()) for t in own if t is not None]
    holders = [weakref.ref(o) for o in (network.module, run)]
    network.replace()
    gc.collect()
    assert [r() and r().data_ptr() for r in read] == places and all(r() is not None for r in own)
    run(seed=1)
    gc.collect()
    gc.disable()
    try:
        del run  # freed without the garbage collector
        assert all(r() is None for r in (*read, *own, holders[-1]))
        assert holders[0]() is not None
    finally:
        gc.enable()


def test_a_capture_keeps_its_objects(cuda):
    network, operator = Held(), AveragePool(4)
    prior = fg.Denoiser(network, fg.schedules.vp_cosine(100), prediction="v")
    holders = [weakref.ref(o) for o in (network, network.module, operator)]
    guided_by = fg.DPS(Gaussian(measurement(0, 2, 2), operator, 0.1))
    run = fg.capture(prior, (2, 1, 8, 8), guidance=guided_by, steps=3, device="cpu")
    del guided_by, network, prior, operator
    gc.collect()
    assert all(r() is not None for r in holders[:2])
    del run
    gc.collect()
    assert not any(r() is not None for r in holders)


def test_no_memory_of_the_loops_own_is_kept(cuda):
    """The graph keeps none of the loop's reusable blocks: they would add to the graph's own memory."""
    given, options = arguments("DPS", steps=6)
    run = fg.capture(*given, guidance=guidance("DPS", 0), **options)
    kept = {s.data_ptr(): s.nbytes() for s in run._recorded.kept}
    network = sum(p.untyped_storage().nbytes() for p in given[0].net.parameters())
    state = 2 * 64 * 4
    assert sum(kept.values()) < network + 4 * state


@pytest.mark.parametrize("wrap", [lambda net: net, functools.partial], ids=["itself", "partial"])
def test_a_compiled_network_is_recorded_as_compiled(wrap, cuda):
    """Recording which tensors are read does not change compiled code."""
    torch.compiler.reset()  # forget what earlier tests compiled
    ran = []

    def backend(graph, inputs):
        def compiled(*args):
            ran.append(cuda.stack[-1])
            with _disable_current_modes():  # hide the operations, as a fused kernel does
                return graph(*args)

        return compiled

    network = Network().requires_grad_(False)
    compiled = torch.compile(network, backend=backend)
    parameters = [weakref.ref(p.untyped_storage()) for p in network.parameters()]
    prior = fg.Denoiser(wrap(compiled), fg.schedules.vp_cosine(100), prediction="v")
    run = fg.capture(prior, (2, 1, 8, 8), steps=3)
    assert ran == ["side"] * 3 + ["capture on side"] * 3
    for p in network.parameters():
        p.data = torch.zeros_like(p)
    assert all(r() is not None for r in parameters)
    run(seed=1)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("name", GUIDANCES)
def test_torch_finds_nothing_that_a_graph_reads_freed(name, device, monkeypatch):
    checked = functools.partial(torch.cuda.graph, check_input_liveness=True)
    try:
        checked(torch.cuda.CUDAGraph())
    except TypeError:
        pytest.skip("torch.cuda.graph has no check_input_liveness before torch 2.13")
    given, options = arguments(name, device)
    monkeypatch.setattr(torch.cuda, "graph", checked)
    run = fg.capture(*given, guidance=guidance(name, 0), **options)
    gc.collect()
    torch.cuda.empty_cache()
    out = run(seed=1)
    assert_same(out, fg.sample(*given, guidance=guidance(name, 0), seed=1, **options))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_memory_is_returned(device):
    given, options = arguments("TDS", device)
    fg.capture(*given, guidance=guidance("TDS", 0), **options)(seed=1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run = fg.capture(*given, guidance=guidance("TDS", 0), **options)
    assert torch.cuda.memory_reserved() > before
    del run
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_compiled_network_is_captured(device):
    for name in ("plain", "DPS", "TDS"):
        given, options = arguments(name, device)
        given[0].net = torch.compile(given[0].net)
        run = fg.capture(*given, guidance=guidance(name, 0), **options)
        for seed in SEEDS:
            assert_same(run(seed=seed), fg.sample(*given, guidance=guidance(name, 0), seed=seed, **options))


@pytest.mark.parametrize("device", DEVICES)
def test_calls_of_several_threads_take_turns(device):
    given, options = arguments("TDS", device)
    run = fg.capture(*given, guidance=guidance("TDS", 0), **options)
    outs = {}

    def call(seed):
        outs[seed] = run(seed=seed, y=pooled(seed).y)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        expected = fg.sample(*given, guidance=GUIDANCES["TDS"][1](pooled(seed, 0.3)), seed=seed, **options)
        assert_same(outs[seed], expected)


@pytest.mark.parametrize(
    ("waits", "reason"),
    (
        (lambda x: x.nonzero(), "nonzero.* waits"),
        (lambda x: x[x > 0], "by a mask waits"),
        (lambda x: x.to("cpu"), "copies from meta to cpu"),
        (lambda x: torch.as_tensor(0.5, device=x.device), "as_tensor copies from the host to meta"),
        (lambda x: torch.tensor([0.5], device=x.device), "tensor copies from the host to meta"),
    ),
)
def test_what_no_graph_holds_is_found(waits, reason):
    x = torch.zeros(4, device="meta")
    with pytest.raises(RuntimeError, match=reason), watched():
        waits(x)
