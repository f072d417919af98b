"""NVTX ranges: the phases of a step of each algorithm, and that there are none without a profiler."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from gaussian import Y, example, gaussian_likelihood

import fastguide as fg
from fastguide import profiling, sampling
from fastguide.guidance.plain import Plain


class Recorder:
    """Stands in for ``nvtx`` and records the ranges in order. A range inside another is named ``outer/inner``."""

    def __init__(self):
        self.found, self.open = [], []

    def push_range(self, message):
        self.open.append(message.removeprefix("fastguide."))
        self.found.append("/".join(self.open))

    def pop_range(self):
        self.open.pop()


@pytest.fixture
def recorder(monkeypatch):
    """A recorder, and an environment as in a process that a profiler has started."""
    found = Recorder()
    monkeypatch.setitem(sys.modules, "nvtx", found)
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/a/tool.so")
    profiling._range.cache_clear()
    yield found
    profiling._range.cache_clear()


def phases(recorder, guidance, steps: int = 3, chunk_size: int | None = None) -> list[list[str]]:
    """The recorded ranges of the start and of each step."""
    run = sampling.prepare_run(
        example().denoiser(), (2, 3), guidance, steps, None, None, None, 0, None, torch.float64, "cpu", chunk_size
    )
    guidance = guidance.prepare(run)
    recorder.found.clear()
    state, parts = guidance.start(run), []
    for i in range(steps):
        parts.append(recorder.found[:])
        recorder.found.clear()
        state = guidance.step(run, state, i)
    assert recorder.open == []
    return [*parts, recorder.found[:]]


def reward(x):
    return -x.square().sum(1)


def same(z):
    return z


GUIDED = ["network", "gradient", "step"]
SOLVED = ["network", "solve", "step"]
MOVED = ["resample", "gather", "step"]
# The ranges of the start, of a step, and of the last step.
PHASES = {
    "plain": (Plain(), [], ["network", "step"], ["network", "step"]),
    "DPS": (fg.DPS(gaussian_likelihood()), [], GUIDED, GUIDED),
    "DPS moment": (fg.DPS(gaussian_likelihood(), covariance="moment"), [], GUIDED, GUIDED),
    "PiGDM": (fg.PiGDM(gaussian_likelihood()), [], GUIDED, GUIDED),
    "PnP": (fg.PnP(gaussian_likelihood()), [], SOLVED, SOLVED),
    "DAPS": (fg.DAPS(gaussian_likelihood()), [], SOLVED, SOLVED),
    "LatentPnP": (fg.LatentPnP(gaussian_likelihood(), same, iterations=1), [], SOLVED, SOLVED),
    "LatentPnP in pixels": (fg.LatentPnP(gaussian_likelihood(), same, same, "pixel", gamma=40.0), [], SOLVED, SOLVED),
    "TDS": (
        fg.TDS(gaussian_likelihood(), 4),
        ["network", "gradient"],
        [*MOVED, "network", "gradient", "weights"],
        [*MOVED, "weights", "weights"],
    ),
    "FK of a reward": (
        fg.FK(reward, 4),
        ["network", "weights", "weights"],
        [*MOVED, "network", "weights", "weights"],
        [*MOVED, "weights", "weights"],
    ),
    "FK of a reward, guided": (
        fg.FK(reward, 4, proposal="guided", covariance="point"),
        ["network", "gradient", "weights"],
        [*MOVED, "network", "gradient", "weights"],
        [*MOVED, "weights", "weights"],
    ),
    "FK of a likelihood": (
        fg.FK(gaussian_likelihood(), 4, covariance="isotropic"),
        ["network", "weights", "weights"],
        [*MOVED, "network", "weights", "weights"],
        [*MOVED, "weights", "weights"],
    ),
}


@pytest.mark.parametrize("name", PHASES)
def test_every_phase_of_a_step_has_its_range(name, recorder):
    guidance, start, step, last = PHASES[name]
    assert phases(recorder, guidance) == [start, step, step, last]


def test_chunks_have_their_own(recorder):
    _, _, _, last = phases(recorder, fg.DPS(gaussian_likelihood()), chunk_size=1)
    assert last == ["network", "gradient", "network", "gradient", "step"]


def test_a_range_is_closed_when_its_body_raises(recorder):
    def net(x, t):
        raise ArithmeticError("halfway")

    prior = fg.Denoiser(net, example().schedule, "sample")
    with pytest.raises(ArithmeticError):
        fg.sample(prior, (2, 3), guidance=fg.DPS(gaussian_likelihood(Y)), steps=3)
    assert recorder.found == ["network"] and recorder.open == []


def test_ranges_nest(recorder):
    with profiling.phase("step"), profiling.phase("weights"), profiling.phase("step"):
        pass
    assert recorder.found == ["step", "step/weights", "step/weights/step"] and recorder.open == []


def test_nothing_is_called_where_nothing_listens(recorder, monkeypatch):
    monkeypatch.delenv("NVTX_INJECTION64_PATH")
    profiling._range.cache_clear()
    assert phases(recorder, fg.TDS(gaussian_likelihood(), 4)) == [[]] * 4
    assert profiling.phase("step") is profiling.phase("network")


def test_torchs_own_ranges_stand_in_for_nvtx(monkeypatch, recorder):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    torchs = types.SimpleNamespace(range_push=recorder.push_range, range_pop=recorder.pop_range)
    monkeypatch.setattr(torch.cuda, "nvtx", torchs)
    with profiling.phase("step"):
        assert recorder.open == ["step"]
    assert recorder.open == []
    profiling._range.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with profiling.phase("step"):
        assert recorder.open == []


def test_torch_profiler_has_them_where_no_tool_listens(recorder, monkeypatch):
    monkeypatch.delenv("NVTX_INJECTION64_PATH")
    profiling._range.cache_clear()
    record = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with record as profiler, profiling.phase("step"), profiling.phase("weights"):
        torch.ones(3)
    events = {event.key: event for event in profiler.events()}
    assert events["fastguide.weights"].cpu_parent is events["fastguide.step"]
    assert profiling.phase("step") is profiling._NOTHING and recorder.found == []


def test_compiled_code_has_none(recorder):
    def doubled(x):
        with profiling.phase("step"):
            return 2.0 * x

    assert torch.equal(torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(3)), torch.full((3,), 2.0))
    assert recorder.found == []
    doubled(torch.ones(3))
    assert recorder.found == ["step"]


def test_the_real_nvtx_takes_them(recorder, monkeypatch):
    """The profiler's file does not exist, so nvtx's functions do nothing. The test checks that they are called."""
    monkeypatch.delitem(sys.modules, "nvtx")
    nvtx = pytest.importorskip("nvtx")
    with profiling.phase("step"), profiling.phase("network"):
        assert profiling._functions() == (nvtx.push_range, nvtx.pop_range)
    assert isinstance(profiling.phase("step"), profiling._Range) and recorder.found == []
