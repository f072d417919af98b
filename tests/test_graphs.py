"""`fastguide.graphs`: what a captured loop reads anew at every replay, when it is captured, and what else it is not.

Without a GPU, `torch.fx` stands in for the graph: a fixed list of operations on fixed memory, as a CUDA graph is. What
Python computed while it was recorded is a constant in it, too, so a seed or an observation that did not stand on the
device would show.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings

import pytest
import torch
from test_sampling import assert_same
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

import fastguide as fg
from fastguide import graphs
from fastguide.likelihoods import Callable, Gaussian, Laplace
from fastguide.operators import AveragePool, Blur, Inpainting

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


RECORDING = graphs.Recording


class Traced:
    """`graphs.Recording` on the CPU."""

    number = 0

    def __init__(self, device):
        pass

    def record(self, function):
        function()
        graph = make_fx(function)()
        Traced.number += 1
        results = graph()
        tensors, _ = tree_flatten(results)

        def replay():
            for tensor, new in zip(tensors, tree_flatten(graph())[0], strict=True):
                if tensor is not None:
                    tensor.copy_(new)

        return results, replay

    def turn(self):
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def recording(monkeypatch, request):
    graphs.clear()
    Traced.number = 0
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(graphs, "_DEVICE", "cpu")
        monkeypatch.setattr(graphs, "Recording", Traced)
    yield
    graphs.clear()


class Network(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x, t):
        return self.layers(x.to(self.layers[0].weight.dtype)) + 1e-3 * t.reshape(-1, 1, 1, 1)


def brightness(x):
    return x.flatten(1).sum(1)


def measurement(seed, *shape):
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(seed))


def pooled(seed, scale=0.1, kind=Gaussian):
    return kind(measurement(seed, 2, 2), AveragePool(4), scale)


def blurred(seed, width=3):
    return Gaussian(measurement(seed, 8, 8), Blur(torch.ones(width, width) / width**2, padding="zeros"), 0.1)


def masked(seed):
    return Gaussian(measurement(seed, 3, 3).flatten(1), Inpainting(MASK), 0.3)


GUIDANCES = {
    "plain": lambda seed: None,
    "DPS": lambda seed: fg.DPS(pooled(seed), zeta=0.1 + seed % 7),
    "DPS moment": lambda seed: fg.DPS(pooled(seed), "score", normalize=False, covariance="moment"),
    "DPS isotropic": lambda seed: fg.DPS(pooled(seed), covariance="isotropic"),
    "PiGDM": lambda seed: fg.PiGDM(pooled(seed), zeta=lambda t: 0.1 * (seed % 7)),
    "PnP": lambda seed: fg.PnP(blurred(seed)),
    "PnP Laplace": lambda seed: fg.PnP(pooled(seed, kind=Laplace), iterations=1),
    "LatentPnP": lambda seed: fg.LatentPnP(pooled(seed), DECODER, gamma=40.0, solver="gradient", iterations=2),
    "TDS": lambda seed: fg.TDS(pooled(seed, 0.3), 8),
    "TDS multinomial": lambda seed: fg.TDS(masked(seed), 8, covariance="point", resampler="multinomial"),
    "FK": lambda seed: fg.FK(brightness, 8, potential="max", strength=1 + seed % 7),
    "FK guided": lambda seed: fg.FK(brightness, 8, potential="sum", proposal="guided", strength=1.5 + seed % 7),
    "FK of y": lambda seed: fg.FK(Callable(nearness, y=measurement(seed, 8, 8)), 8, resample_steps=2),
}
MASK = torch.zeros(1, 8, 8, dtype=torch.bool)
MASK[:, :3, :3] = True
DECODER = torch.nn.Conv2d(1, 1, 1).requires_grad_(False)


def nearness(x0, y):
    return -(x0 - y).square().flatten(1).sum(1)


def run(name, seed, prior=None, device="cpu", **options):
    if prior is None:
        prior = denoiser(device)
    DECODER.to(device)
    options = {"steps": 3, "seed": seed, "device": device, "keep_ancestors": name.startswith(("TDS", "FK"))} | options
    return fg.sample(prior, (2, 1, 8, 8), guidance=GUIDANCES[name](seed), **options)


def denoiser(device="cpu", seed=0):
    return fg.Denoiser(Network(seed).to(device).requires_grad_(False), fg.schedules.vp_cosine(100), prediction="v")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_replay_is_the_eager_loop_of_another_seed_and_observation(name, device):
    prior = denoiser(device)
    for seed in (1, 2**64 - 3):
        eager = run(name, seed, prior, device, graph=False)
        assert_same(run(name, seed, prior, device, graph=True), eager)
        assert len(graphs._graphs) == 1
    assert torch.isfinite(eager.x).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_step_replayed_for_others_is_the_eager_loop(name, device, monkeypatch):
    monkeypatch.setattr(graphs, "UNROLLED", 0)
    prior = denoiser(device)
    for seed in (1, 2**64 - 3):
        eager = run(name, seed, prior, device, graph=False, steps=5)
        replayed = run(name, seed, prior, device, graph=True, steps=5)
        if "isotropic" in name:  # which adds its variances in float32
            torch.testing.assert_close(replayed.x, eager.x, rtol=1e-5, atol=1e-5)
        else:
            assert_same(replayed, eager)
    (captured,) = graphs._graphs.values()
    assert len(set(map(id, captured._replays))) < len(captured._replays) == 6  # the start and five steps


# --- when a loop is captured --------------------------------------------------------------------------------


class Rerun(Traced):
    """Runs what it recorded again: enough to see what is recorded when, and quick."""

    def record(self, function):
        Traced.number += 1
        results = function()

        def replay():
            for tensor, new in zip(tree_flatten(results)[0], tree_flatten(function())[0], strict=True):
                if tensor is not None:
                    tensor.copy_(new)

        return results, replay


@pytest.fixture
def rerun(monkeypatch, recording):
    monkeypatch.setattr(graphs, "Recording", Rerun)


def test_auto_runs_eagerly(rerun):
    prior = denoiser()
    for seed in (1, 2, 3):
        assert_same(run("TDS", seed, prior, graph="auto"), run("TDS", seed, prior, graph=False))
    assert Traced.number == 0


def test_a_replay_leaves_what_was_returned_before(rerun):
    prior = denoiser()
    outs = [run("TDS", seed, prior, graph=True) for seed in (1, 2, 3)]
    assert Traced.number == 1
    for seed, out in enumerate(outs, start=1):
        assert_same(out, run("TDS", seed, prior, graph=False))


def plain(prior, **options):
    options = {"steps": 3, "graph": True, "seed": 0} | options
    return fg.sample(prior, options.pop("shape", (2, 1, 8, 8)), **options)


def test_what_a_graph_depends_on(rerun):
    prior, y = denoiser(), measurement(0, 2, 2)

    def guided(pool=4, scale=0.1, **options):
        return plain(prior, guidance=fg.DPS(Gaussian(y, AveragePool(pool), scale), **options))

    other, half = denoiser(seed=1), denoiser()
    half.net.bfloat16()
    calls = [
        lambda: plain(prior),
        lambda: plain(prior, steps=4),
        lambda: plain(prior, eta=0.5),
        lambda: plain(prior, clip=1.0),
        lambda: plain(prior, chunk_size=1),
        lambda: plain(prior, shape=(3, 1, 8, 8)),
        lambda: plain(prior, dtype=torch.float64),
        lambda: plain(prior, x_T=torch.zeros(2, 1, 8, 8)),
        lambda: plain(other),
        lambda: plain(half),
        lambda: guided(),
        lambda: guided(scale=0.2),
        lambda: guided(normalize=False),
        lambda: guided(covariance="isotropic"),
        lambda: plain(prior, guidance=fg.PnP(blurred(0))),
        lambda: plain(prior, guidance=fg.PnP(blurred(0, width=5))),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert Traced.number == number
    for call in calls[-graphs.KEPT :]:  # the last are kept
        call()
        assert Traced.number == len(calls)
    calls[0]()
    assert Traced.number == len(calls) + 1


def test_networks_are_read_where_they_stand(rerun):
    prior = denoiser()
    before = plain(prior)
    with torch.no_grad():
        prior.net.layers[0].weight.mul_(2.0)
    after = plain(prior)
    assert Traced.number == 1 and not torch.equal(before.x, after.x)
    assert_same(after, plain(prior, graph=False))
    prior.net.layers[0].weight.data = prior.net.layers[0].weight.data.clone()
    plain(prior)
    assert Traced.number == 2
    prior.net.eval()
    plain(prior)
    assert Traced.number == 3


OFFSET = 0.0


class Shifted:
    def __init__(self, network):
        self.network, self.settings = network, {"offset": [0.0]}

    def __call__(self, x, t):
        return self.network(x, t) + self.settings["offset"][0]


def test_functions_are_compared_by_what_they_hold(rerun, monkeypatch):
    network, number = Network().requires_grad_(False), 0

    def captures(net, new: bool):
        nonlocal number
        prior = fg.Denoiser(net, fg.schedules.vp_cosine(100), prediction="v")
        assert_same(plain(prior), plain(prior, graph=False))
        number += new
        assert Traced.number == number

    def around(network, offset):
        return lambda x, t: network(x, t) + offset

    for offset, new in ((1.0, True), (1.0, False), (2.0, True)):  # a closure
        captures(around(network, offset), new)
    tensor = torch.ones(())
    captures(around(network, tensor), True)
    tensor.fill_(2.0)  # read where it stands
    captures(around(network, tensor), False)
    captures(around(network, tensor.clone()), True)
    captures(around(Network().requires_grad_(False), 1.0), True)

    def with_global(x, t):
        return network(x, t) + (lambda: OFFSET)()

    for offset, new in ((1.0, True), (1.0, False), (2.0, True)):
        monkeypatch.setitem(globals(), "OFFSET", offset)
        captures(with_global, new)
    shifted = Shifted(network)
    for offset, new in ((1.0, True), (1.0, False), (2.0, True)):  # of an object
        shifted.settings["offset"][0] = offset
        captures(shifted, new)
        captures(shifted.__call__, new)
    captures(functools.partial(around(network, 3.0)), True)
    network.scale = 2.0
    captures(network, True)
    captures(network, False)
    network.scale = 3.0
    captures(network, True)
    network.activation = around(network, 0.0)  # a module that holds a function
    captures(network, True)
    captures(network, False)


def test_scales_of_guidance_are_inputs(rerun):
    conditional, unconditional = (Network(seed).requires_grad_(False) for seed in (0, 1))
    for scale in (1.0, 4.0):
        prior = fg.Denoiser(
            conditional, fg.schedules.vp_cosine(100), prediction="v", unconditional=unconditional, guidance_scale=scale
        )
        assert_same(plain(prior), plain(prior, graph=False))
    assert Traced.number == 1
    for dtype in (torch.bfloat16, torch.float32):
        for zeta in (0.3, 0.7):
            guidance = fg.DPS(pooled(0), zeta=zeta)
            same = [plain(prior, guidance=guidance, dtype=dtype, graph=graph) for graph in (True, False)]
            assert_same(*same)
    for rho in (2.0, 5.0):
        guidance = fg.PnP(pooled(0), rho=rho)
        assert_same(*(plain(prior, guidance=guidance, graph=graph) for graph in (True, False)))
    assert Traced.number == 4


def test_memory_is_returned(rerun):
    prior = denoiser()
    plain(prior)
    assert len(graphs._graphs) == 1
    graphs.clear()
    assert not graphs._graphs
    plain(prior)
    assert Traced.number == 2


# --- what is not captured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_loop_that_asks_the_device_is_refused(device):
    network = Network().to(device).requires_grad_(False)

    def asks(x, t):
        return network(x, t) * (1.0 if x.sum().item() > 0 else 0.5)

    prior = fg.Denoiser(asks, fg.schedules.vp_cosine(100), prediction="v")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"graph=True: the loop cannot be captured: .*Error: "):
            plain(prior, device=device, graph=True)
    good = denoiser(device)  # a capture that broke leaves nothing behind
    assert_same(plain(good, device=device), plain(good, device=device, graph=False))


def test_a_watched_loop_is_refused(rerun, tmp_path):
    prior, seen = denoiser(), []
    for options in ({"callback": seen.append}, {"checkpoint": tmp_path / "run.pt"}):
        with pytest.raises(RuntimeError, match=r"graph=True: .*see the loop between its steps"):
            plain(prior, **options)
    assert not seen and Traced.number == 0


def test_a_step_of_the_users_is_not_replayed_for_others(rerun, monkeypatch):
    monkeypatch.setattr(graphs, "UNROLLED", 0)

    class Own(fg.guidance.plain.Plain):
        pass

    with pytest.raises(RuntimeError, match="guidance: Own takes more than 0 operations"):
        plain(denoiser(), guidance=Own())


def test_guidance_of_the_users_is_compared_by_its_attributes(rerun):
    class Shifted:
        def __init__(self, shift):
            self.shift = shift

        def prepare(self, run):
            return self

        def start(self, run):
            return fg.guidance.plain.Plain().start(run)

        def step(self, run, state, i):
            state = fg.guidance.plain.Plain().step(run, state, i)
            return dataclasses.replace(state, x=state.x + self.shift)

    prior, guidance = denoiser(), Shifted(0.0)
    before = plain(prior, guidance=guidance)
    guidance.shift = 1.0
    after = plain(prior, guidance=guidance)
    assert Traced.number == 2
    assert_same(before, plain(prior, graph=False))
    assert (after.x - before.x).abs().min() > 0.5


def test_graphs_need_a_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "_DEVICE", "cuda")
    with pytest.raises(RuntimeError, match="a CUDA graph runs on a GPU, and this run is on cpu"):
        plain(denoiser(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(denoiser(), device="cpu", graph="auto")
    with pytest.raises(ValueError, match="graph: expected 'auto', True or False, got 'always'"):
        plain(denoiser(), graph="always")


def test_within_a_capture_of_the_callers_the_loop_is_a_part_of_it(rerun, monkeypatch):
    prior = denoiser()
    monkeypatch.setattr(graphs, "_is_capturing", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outs = [plain(prior, graph=graph) for graph in ("auto", "auto", False)]
    assert_same(outs[1], outs[2])
    assert Traced.number == 0
    with pytest.raises(RuntimeError, match="this call is within a capture of the caller's"):
        plain(prior)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_compiled_network_is_captured(device):
    prior = denoiser(device)
    prior.net = torch.compile(prior.net)
    for name in ("plain", "DPS", "TDS"):
        for seed in (1, 2):
            assert_same(run(name, seed, prior, device, graph=True), run(name, seed, prior, device, graph=False))


def test_a_compiled_network_is_watched_as_it_was_written():
    network = Network().requires_grad_(False)
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    expected = graphs.count_operations(lambda: network(x, t))
    assert graphs.count_operations(lambda: compiled(x, t)) == expected >= 4


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
    with pytest.raises(RuntimeError, match=reason), graphs.watched():
        waits(x)


def test_what_waits_once_does_not_wait_in_a_replay():
    x, made = torch.zeros(4, device="meta"), []

    def cached():
        if not made:
            made.append(torch.tensor([0.5], device="meta"))
        return x + made[0]

    assert graphs.count_operations(cached) == 1


# --- what is asked of CUDA ----------------------------------------------------------------------------------


class Calls:
    """Stands in for ``torch.cuda``: notes what is asked of it. The end of a broken capture is an error of its own."""

    def __init__(self, monkeypatch):
        self.noted, self.stack, calls = [], ["main"], self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                calls.noted.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                calls.noted.append(f"{self.name} waits for the last user")

        class Event:
            def record(self, stream):
                calls.noted.append(f"done on {stream.name}")

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
        def graph(made, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            calls.stack.append(f"capture on {stream.name} in {pool}")
            yield
            if "broken" in calls.noted:  # torch leaves the stream of the capture the current one
                raise RuntimeError("the capture was invalidated")
            calls.stack.pop()

        stand_ins = dict(
            device=contextlib.nullcontext, Stream=Stream, Event=Event, CUDAGraph=CUDAGraph, stream=stream, graph=graph,
            graph_pool_handle=lambda: "the pool", current_stream=lambda: Stream("main"),
        )  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def loop(self):
        self.noted.append(f"run: {self.stack[-1]}")
        return "results"


def test_a_loop_is_warmed_up_and_captured_on_a_stream_of_its_own(monkeypatch):
    calls = Calls(monkeypatch)
    recording = RECORDING(torch.device("cuda"))
    results, replay = recording.record(calls.loop)
    assert results == "results"
    captured = "run: capture on side in the pool"
    assert calls.noted == ["side waits for main", "run: side", "main waits for side", captured]
    calls.noted.clear()
    with recording.turn():
        replay()
        calls.noted.append("copied")
    assert calls.noted == ["main waits for the last user", "replay", "copied", "done on main"]


def test_a_broken_capture_says_what_broke_it(monkeypatch):
    calls = Calls(monkeypatch)

    def breaks():
        if calls.stack[-1].startswith("capture"):
            calls.noted.append("broken")
            raise ValueError("this network asks the device")

    with pytest.raises(ValueError, match="this network asks the device"):
        RECORDING(torch.device("cuda")).record(breaks)
    assert calls.stack == ["main"]


def test_autocast_keeps_no_casts_of_weights_in_a_graph(monkeypatch):
    calls, seen = Calls(monkeypatch), []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(
        torch, "autocast", lambda *a, **k: contextlib.nullcontext(seen.append((a, k)))
    )  # on a CPU the real one disables itself
    RECORDING(torch.device("cuda")).record(calls.loop)
    assert seen == [(("cuda", torch.bfloat16), {"cache_enabled": False})]
