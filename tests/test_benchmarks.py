"""The code of the benchmarks, at sizes that take milliseconds. No test depends on a time."""

from __future__ import annotations

import contextlib
import json
import math
import types
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import against, cases, memory, profile, report, timing, traffic
from benchmarks.accuracy import calibration, exactness
from benchmarks.cases import CASES, Case, Figure, Rival, Setting
from benchmarks.samplers.digits import Digits
from benchmarks.samplers.meter import Meter
from fastguide import ops, reference

QUICK = Setting(torch.device("cpu"), quick=True)


@pytest.fixture(autouse=True)
def default_allocator(monkeypatch):
    monkeypatch.setattr(command, "keep_memory", lambda: "as it was")  # keep_memory would affect the other tests


@pytest.fixture
def register(monkeypatch):
    """``register(case)`` registers a case as ``samplers/probe``. There are no other cases."""

    def put(build):
        monkeypatch.setattr(cases, "CASES", {"samplers/probe": build})
        return "samplers/probe"

    return put


def probe(**changes) -> Case:
    options = dict(what="", elements=10, bytes=80, ours=lambda: None, check=lambda: None) | changes
    return Case(**options)


@pytest.mark.parametrize("name", CASES)
def test_every_case_builds_and_is_right(name):
    try:
        case = CASES[name](QUICK)
    except cases.Absent as absent:
        pytest.skip(str(absent))
    case.check()
    assert case.elements > 0 and case.what
    for rival in case.rivals:
        if rival.call is None:
            assert rival.absent
        else:
            rival.call()


@pytest.mark.parametrize("name", ["exactness/mixture-2", "calibration/half"])
def test_accuracy_has_figures_of_every_method(name):
    figures = CASES[name](QUICK).figures(0.0)
    methods = exactness.METHODS if name.startswith("exactness") else calibration.METHODS
    assert {figure.name.split(",")[0] for figure in figures} == set(methods)
    assert all(math.isfinite(figure.value) for figure in figures)


def test_the_distance_of_exact_draws_is_that_of_their_numbers():
    """For equal laws only chance is left. It falls with the fourth root of the number, since the modes' masses differ.
    Between two points it is their distance over the root of D."""
    problem = exactness.Problem(8, 2, 0)
    pairs = [(problem.draw(n, 1), problem.draw(n, 2)) for n in (200, 20_000)]
    few, many = (exactness.sliced_distance(*pair, directions=50) for pair in pairs)
    assert many < few / 2
    point = torch.zeros(1, 8, dtype=torch.float64)
    assert exactness.sliced_distance(point, point + 3.0) == pytest.approx(3.0, rel=0.05)


def test_every_operation_and_sampler_has_a_case():
    from fastguide import guidance
    from fastguide.ops._operation import OPERATIONS

    operations = {name.split("/")[0] for name in CASES}
    assert set(OPERATIONS) <= operations
    named = {
        name.split("/")[1].replace("digits-", "").replace("-", "") for name in CASES if name.startswith("samplers")
    }
    public = {"plain"} | {name.lower() for name in guidance.__all__ if name[0].isupper()}
    assert public <= named


def test_a_check_sees_a_wrong_result(monkeypatch):
    right = ops.reverse_step
    monkeypatch.setattr(ops, "reverse_step", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    with pytest.raises(AssertionError):
        CASES["reverse_step/stochastic"](QUICK).check()


def test_a_case_whose_check_fails_is_not_timed(register, capsys, tmp_path):
    def never():
        raise KeyError("timed")

    def check():
        raise AssertionError("one is not two")

    name = register(lambda setting: probe(ours=never, check=check))
    path = tmp_path / "out.json"
    assert command.main([name, "--quick", "--json", str(path)]) == 1
    assert "FAILED: AssertionError: one is not two" in capsys.readouterr().out
    (entry,) = json.loads(path.read_text())["cases"]
    assert entry["status"] == "failed" and "one is not two" in entry["reason"] and entry["rows"] == []


def test_the_others_run_after_one_failed(monkeypatch, capsys):
    def broken(setting):
        raise ZeroDivisionError("as built")

    monkeypatch.setattr(cases, "CASES", {"randn/a": broken, "randn/b": lambda setting: probe()})
    assert command.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: ZeroDivisionError" in out and "randn/b" in out


def test_an_absent_rival_is_named_and_no_failure(register, capsys):
    def build(setting):
        return probe(rivals=[cases.rival("a rival", lambda: __import__("no_such_package"), at_least=2.0)])

    assert command.main([register(build), "--quick"]) == 0
    assert "a rival: absent: No module named 'no_such_package'" in capsys.readouterr().out


def test_a_rival_that_cannot_run_is_absent_too(register, capsys):
    def stumbles():
        raise RuntimeError("no compiler\nat all")

    assert command.main([register(lambda setting: probe(rivals=[Rival("a rival", stumbles)])), "--quick"]) == 0
    assert "a rival: absent: RuntimeError: no compiler" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["resample", "no-such-case"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'no-such-case'" in error and "resample/systematic-1e6" in error and "samplers/mixture-tds" in error


def test_names_select_by_their_beginning():
    assert cases.chosen(["resample/sys"]) == [f"resample/systematic-1e{n}" for n in (6, 7, 8)]
    assert cases.chosen(["resample/m", "randn"])[-2:] == ["resample/multinomial", "resample/memory-1e8"]
    assert set(CASES) - set(cases.chosen([])) == {name for name in CASES if name.startswith(cases.ON_REQUEST)}
    assert len(cases.chosen(["exactness"])) == len(cases.chosen(["calibration"])) == 4


@pytest.mark.parametrize("flags", [[], ["--keep-memory"]])
def test_the_allocator_is_the_users_unless_asked(flags, capsys):
    assert command.main(["randn/float32", "--quick", *flags]) == 0
    said = "as it was" if flags else "the process's own, as users have it"
    assert f"allocator: {said}\n" in capsys.readouterr().out


def test_json_holds_what_is_promised(tmp_path):
    path, table = tmp_path / "out.json", tmp_path / "out.md"
    assert command.main(["randn/float32", "--quick", "--json", str(path), "--markdown", str(table)]) == 0
    found = json.loads(path.read_text())
    for key in ("commit", "cpu", "cores", "threads", "torch", "allocator", "command"):
        assert found["machine"][key], key
    (entry,) = found["cases"]
    assert entry["status"] == "ok" and entry["elements"] == 16 * 96 and entry["bytes"] == 16 * 96 * 4
    rows = {row["name"]: row for row in entry["rows"]}
    ours = next(row for name, row in rows.items() if name.startswith("fastguide ("))
    assert {"numpy Philox Generator", "copy", "triad"} <= set(rows)
    normal = rows["torch normal_"]
    assert normal["target"] == ">= 10x" and isinstance(normal["met"], bool)
    assert math.isclose(normal["speed_up"], normal["median_s"] / ours["median_s"])
    for row in rows.values():
        if row["absent"]:
            continue
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"] and row["rounds"] >= 1
        assert math.isclose(row["ns_per_element"], row["median_s"] * 1e9 / entry["elements"])
        assert math.isclose(row["gb_per_s"], entry["bytes"] / row["median_s"] / 1e9)
        assert math.isclose(row["of_copy"], rows["copy"]["median_s"] / row["median_s"])
        assert math.isclose(row["of_triad"], rows["triad"]["median_s"] / row["median_s"])
    lines = table.read_text().splitlines()
    assert found["machine"]["command"] in lines[0]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_contestants_take_turns_in_changing_order():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    clock = iter(range(1000))  # each reading is a second later, so a sample is one call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
        times, broken = timing.alternate(calls, QUICK.device, seconds=30.0, least_rounds=1)
    assert "".join(order[:6]) == "aabbcc" and not broken  # first, how long each takes
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(rounds) == 5 and len(set(rounds)) > 1  # 7 readings a round: 2 for each call, 1 for the end
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert times == {name: [1.0] * 5 for name in "abc"}


@pytest.mark.parametrize(
    ("rival", "theirs", "met"),
    [
        (Rival("r", None, at_least=2.0), 2.0, True),
        (Rival("r", None, at_least=2.0), 1.9, False),
        (Rival("r", None, at_most=1.25), 0.8, True),
        (Rival("r", None, at_most=1.25), 0.79, False),
        (Rival("r", None), 1.0, None),
        (Rival("r", None, at_least=2.0), None, None),
    ],
)
def test_targets(rival, theirs, met):
    assert cases._target(rival, theirs, ours=1.0)[1] is met


def test_figures_have_targets_too():
    assert Figure("", 1.0, "us", at_most=1.0).met and not Figure("", 1.1, "us", at_most=1.0).met
    assert Figure("", 1.0, "us").met is None
    result = cases.Result("a", "ok", figures=[Figure("f", 2.0, "us", at_most=1.0)])
    assert "Missed: a / f." in report.summary([result])


@pytest.mark.parametrize("particles", [1000, 1024, 1025])
def test_integer_weights_in_chunks_are_the_reference(particles):
    log_weights = 5 * torch.randn(particles)
    log_weights[3] = -math.inf
    q, _, top, scale = reference.integer_weights(log_weights[None])
    parts = [memory._integer_weights(part, top[0], scale) for part in log_weights.split(100)]
    assert torch.equal(torch.cat(parts), q[0])


def test_wrong_offspring_are_counted(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 300)
    log_weights = torch.randn(1000)
    ancestors = ops.resample(log_weights, seed=1)[0]
    assert memory.wrong_offspring(log_weights, ancestors) == 0
    heaviest = log_weights.argmax().int()
    moved = torch.where(ancestors == heaviest, ancestors[0], ancestors).sort().values
    assert memory.wrong_offspring(log_weights, moved) == 2  # one particle has none, another too many


def test_peak_memory_is_what_is_allocated(python):
    """Measured in a new process: here the C library may have kept freed memory from other tests."""
    program = (
        "import torch; from benchmarks import memory\n"
        "peak, kept = memory.peak_of(lambda: torch.ones(1 << 24), torch.device('cpu'))\n"
        "print(peak / kept.nbytes)"
    )
    done = python(program, cwd=Path(__file__).parents[1])
    assert 1.0 <= float(done.stdout) < 1.2, done.stderr


_A, _B = torch.ones(8, 16), torch.ones(8, 16)  # 128 floats
_STATE = torch.ones(1, 8, 16)
_ROW = torch.ones(1, 16).expand(8, 16)
_SWAPPED = torch.tensor([[1, 0, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda: _A + _B, {"add": 12 * 128}),
        (lambda: _A + _ROW, {"add": 8 * 128 + 4 * 16}),  # repeated elements of an expanded tensor are read once
        (lambda: _A.clone(), {"clone": 8 * 128}),
        (lambda: torch.empty(8, 16).copy_(_A), {"copy_": 8 * 128}),
        (lambda: torch.empty(8, 16).zero_(), {"zero_": 4 * 128}),
        (lambda: _A.clone().mul_(2), {"clone": 8 * 128, "mul_": 8 * 128}),
        (lambda: torch.add(_A, _B, out=torch.empty(8, 16)), {"add": 12 * 128}),
        (lambda: _A.view(16, 8)[2:].T.detach(), {}),
        (lambda: (torch.empty_like(_A), torch._lazy_clone(_A)), {}),
        (lambda: _A.new_zeros(8, 16), {"new_zeros": 4 * 128}),
        (lambda: _A.sum(1), {"sum": 4 * 128 + 4 * 8}),
        (lambda: _A.index_select(0, torch.tensor([1, 3])), {"index_select": 2 * 4 * 32 + 8 * 2}),
        (
            lambda: torch.index_select(_A, 0, torch.tensor([1, 3]), out=torch.empty(2, 16)),
            {"index_select": 2 * 4 * 32 + 8 * 2},
        ),
        (lambda: torch.empty(8, 16).index_copy_(0, torch.tensor([1, 3]), _B[:2]), {"index_copy_": 2 * 4 * 32 + 8 * 2}),
        (lambda: ops.randn((8, 16), seed=0), {"randn": 4 * 128}),
        (lambda: ops.reverse_step(_A, _B, (0.5, 0.8, 0.7, 0.6, 0.0)), {"reverse_step": 12 * 128}),
        (
            lambda: ops.reverse_step(_A, _B, (0.5, 0.8, 0.7, 0.6, 0.3), out=torch.empty(8, 16)),
            {"reverse_step": 12 * 128},
        ),
        (lambda: ops.reverse_step(_A, _B, (0.5, 0.8, 0.7, 0.6, 0.0), return_x0=True), {"reverse_step": 16 * 128}),
        (lambda: ops.gather_particles_(_SWAPPED, _STATE), {"gather_particles_": 2 * 2 * 64 + 4 * 8}),
    ],
)
def test_bytes_are_those_read_and_written(call, moved):
    """One of each kind: read and written, in place, overwritten, picked, neither. And our own operations."""
    assert traffic.count(call)[1] == moved


def test_bytes_of_gradients_are_counted():
    x, output = (torch.ones(8, 16, requires_grad=True) for _ in range(2))

    def call():
        torch.autograd.grad(ops.predict_x0(x, output, (0.6, 0.8), prediction="v"), (x, output), torch.ones(8, 16))

    assert traffic.count(call)[1] == {"predict_x0": 12 * 128, "predict_x0_backward": 12 * 128, "ones": 4 * 128}


def test_another_checkout_is_counted_and_timed_in_its_own_process(capsys, tmp_path):
    """The other checkout is this one."""
    path, here = tmp_path / "out.json", Path(cases.__file__).parents[1]
    assert command.main(["samplers/bytes-tds", "--quick", "--against", str(here), "--json", str(path)]) == 0
    (entry,) = json.loads(path.read_text())["cases"]
    _, theirs = entry["rows"]
    assert theirs["rounds"] == 1 and theirs["target"] == ">= 2x" and not theirs["absent"]
    found = {figure["name"]: figure["value"] for figure in entry["figures"]}
    assert found["time of the processor, theirs over ours"] > 0
    assert found["ours of theirs"] == found["bytes per element and step"] / found["there"]
    for operation in ("propose_and_weigh", "predict_x0", "gather_particles_", "add"):
        assert found[f"here: {operation}"] == found[f"there: {operation}"] > 0


def test_another_checkout_must_be_one(capsys, tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 1"):  # its fastguide is not in that folder
        traffic.Elsewhere(tmp_path, "plain", (4, 3, 8, 8), 4).ask("run")
    for flags, said in (([], "expected the folder of a checkout"), (["--keep-memory"], "expected no --keep-memory")):
        folder = Path(cases.__file__).parents[1] if flags else tmp_path
        with pytest.raises(SystemExit):
            command.main(["samplers/bytes-tds", "--against", str(folder), *flags])
        assert f"--against: {said}" in capsys.readouterr().err


def test_a_profile_is_of_one_run_after_another(monkeypatch, capsys):
    events: list = []

    @contextlib.contextmanager
    def phase(name):
        events.append(name)
        yield
        events.append("end")

    right = Digits.run

    def run(self, **options):
        events.append((self.method, self.steps, self.samples, options))
        return right(self, **options)

    monkeypatch.setattr(profile, "phase", phase)
    monkeypatch.setattr(Digits, "run", run)
    assert profile.main(["--sampler", "tds", "--steps", "3", "--particles", "8"]) == 0
    one = ("tds", 3, 8, {})
    assert events == [one, "run", one, "end"]
    assert capsys.readouterr().out.startswith("tds, 3 steps, 8 samples on cpu: 0.")
    with pytest.raises(SystemExit):
        profile.main(["--sampler", "no-such"])


def test_the_meter_sees_forward_and_backward_and_nothing_else(monkeypatch):
    clock = [0.0]

    class Slow(torch.autograd.Function):
        """Takes three seconds forward and five seconds back, by the fake clock."""

        @staticmethod
        def forward(ctx, x):
            clock[0] += 3.0
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            clock[0] += 5.0
            return 2 * gradient

    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    meter = Meter(QUICK.device, record=True)
    net = meter.wrap(lambda x, t: Slow.apply(x))
    x = torch.ones(2, requires_grad=True)
    output = net(x, torch.zeros(2))
    outside = Slow.apply(output) + Slow.apply(x)
    assert meter.seconds == 3.0
    for _ in range(2):
        (gradient,) = torch.autograd.grad(outside.sum(), x, retain_graph=True)
        assert torch.equal(gradient, torch.full((2,), 6.0))
    assert meter.seconds == 3.0 + 2 * 5.0
    before = clock[0]
    meter.replay()
    assert clock[0] - before == 3.0 + 2 * 5.0
    with torch.no_grad():
        net(x, torch.zeros(2))
    assert meter.seconds == 16.0


def test_cases_are_compared_with_another_checkout(capsys):
    """The other checkout is this one."""
    here = Path(cases.__file__).parents[1]
    names = "reverse_step/small", "integrations/deepinv-dps-bare", "resample/memory-1e8"
    assert against.main([str(here), *names, "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith(tuple(f"{name} " for name in names)) for line in lines)
    assert any("absent: has figures and no time" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("reverse_step"))
    assert all(float(word) > 0 for word in (line.split()[1], line.split()[4], line.split()[6], line.split()[8]))


def test_the_other_checkout_and_its_cases_must_be_there(capsys, tmp_path, monkeypatch):
    checkout = types.SimpleNamespace(cases=["randn/float32"], end=lambda: None)
    monkeypatch.setattr(against, "Checkout", lambda folder, quick: checkout)
    here = str(Path(cases.__file__).parents[1])
    for arguments, said in (
        ([str(tmp_path)], "expected the folder of a checkout"),
        ([here, "nothing"], "NAME: expected"),
    ):
        with pytest.raises(SystemExit):
            against.main([*arguments, "--quick"])
        assert said in " ".join(capsys.readouterr().err.split())
