"""A file with the state of a run. The run goes on from it and ends in the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .denoiser import Conditional, Denoiser
from .guidance.base import Run, State
from .guidance.watch import Watch
from .likelihoods import Likelihood
from .operators import Operator
from .schedules import Level, Schedule

__all__ = ["Checkpoint", "saved_seed"]

# Results of a trial: a few numbers that summarise each tensor, or a word if it has none.
Trial = dict[str, list[float] | str]
_RANDOM, _FAILED = "random", "failed"

_STREAM_TRIAL = 0x7472  # the random numbers of the trials' input; no run draws from this stream


class Checkpoint:
    """The file of one run of `fastguide.sample`, and the check that a file belongs to the run.

    A run goes on from a file that matches in these ways:

    - Numbers, schedules (evaluated at the run's levels), tensors (by content), kinds of objects, names of functions and
      ``run_id`` are the same. ``chunk_size`` may differ, since noise does not depend on it.
    - Functions give the same results in a small trial. The network is called on one sample at the middle level.
      Operators, likelihoods, rewards, potentials, proposals and decoders are called in a few steps of the guidance with
      two particles, where a stand-in replaces the network. Results are compared to three digits, since another number
      of threads rounds differently.

    Each trial runs twice. Where the two differ (dropout), or a function raises on such an input, only the function's
    name counts. Two functions that agree in the trial cannot be told apart; give them another ``run_id``.

    Args:
        path: The file, in a folder that can be written to.
        run: The constants of the run.
        guidance: The guidance object.
        keep_ancestors: Whether the run keeps the ancestors of every step.
        run_id: A string that tells runs apart, or None.

    Raises:
        TypeError: ``run_id`` is not a string.
        ValueError: ``path`` is a folder, or its folder cannot be written to.
    """

    def __init__(
        self, path: str | os.PathLike, run: Run, guidance: Any, keep_ancestors: bool, run_id: str | None = None
    ):
        if run_id is not None and not isinstance(run_id, str):
            raise TypeError(f"run_id: expected a string or None, got {type(run_id).__name__}")
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"checkpoint: expected a file in a folder that can be written to, got {os.fspath(path)}")
        self.path, self._run = path, run
        self._arguments: dict[str, str] = {}
        for name, value in _arguments(run, guidance):
            self._arguments[name] = self._arguments.get(name, "") + repr(_describe(value))
        self._arguments |= {"keep_ancestors": repr(keep_ancestors), "run_id": repr(run_id)}
        self._trials = {
            "network": _twice(run, lambda: _try_network(run)),
            "guidance": _twice(run, lambda: _try_guidance(run, guidance)),
        }

    def load(self) -> tuple[State, int, list, list, dict[str, Tensor]] | None:
        """What was saved.

        Returns:
            The state, the number of steps done, the ESS and the ancestors of each step, and the tensors of the first
                ancestors. None where there is no file.

        Raises:
            ValueError: The file is of another run, or is not a checkpoint.
        """
        if not os.path.exists(self.path):
            return None
        saved = _read(self.path, self._run.device)
        words = ""
        if others := self._others(saved["arguments"]):
            words = f"of another {', '.join(others)}"
        else:
            tolerance, trials = _tolerance(self._run), saved["trials"]
            differ = [part for part, trial in self._trials.items() if not _agree(trial, trials[part], tolerance)]
            if differ:
                words = f"whose {' and '.join(differ)} gave other results on a small trial"
        if words:
            raise ValueError(f"checkpoint: expected a file of this very run, got {os.fspath(self.path)} {words}")
        return State(**saved["state"]), saved["done"], saved["ess"], saved["ancestors"], saved["ancestry"]

    def _others(self, saved: dict[str, str]) -> list[str]:
        """The names of the arguments that differ from those of the file's run."""
        ours = self._arguments
        others = [name for name in {**ours, **saved} if ours.get(name) != saved.get(name)]
        # Other levels change the tables, and another class of guidance has other fields: name the cause alone.
        for cause, known in (("guidance", _OWN), ("steps", _OWN - {"guidance"})):
            if cause in others:
                others = [name for name in others if name in known]
        return others

    def save(self, state: State, done: int, ess: list, ancestors: list, ancestry: dict[str, Tensor]) -> None:
        """Write the state beside the file, then rename it. A run that is killed leaves the last complete file."""
        content = {
            "arguments": self._arguments,
            "trials": self._trials,
            "seed": self._run.seed,
            "done": done,
            "state": vars(state),
            "ess": ess,
            "ancestors": ancestors,
            "ancestry": ancestry,
        }
        folder = os.path.dirname(os.path.abspath(self.path))
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".fastguide-")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def saved_seed(path: str | os.PathLike) -> Any:
    """The seed in a checkpoint, for a run that was started without one. None where there is no file."""
    return _read(path, torch.device("cpu"))["seed"] if os.path.exists(path) else None


def _fields(guidance: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(guidance) if dataclasses.is_dataclass(guidance) else ():
        value = getattr(guidance, field.name)
        if not field.init:  # the PnP inside LatentPnP: its tables come from the fields of LatentPnP
            yield from _fields(value)
        elif field.compare:
            yield field.name, value


def _read(path: str | os.PathLike, device: torch.device) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds of error for other files
        raise ValueError(
            f"checkpoint: expected a file of fastguide.sample, got {os.fspath(path)}: {type(error).__name__}"
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("arguments"), dict):
        raise ValueError(f"checkpoint: expected a file of fastguide.sample, got {os.fspath(path)} of something else")
    return saved


# Arguments that do not depend on others.
_OWN = {
    "guidance", "shape", "steps", "seed", "clip", "dtype", "device", "x_T", "start", "samples_per_observation",
    "first_sample",
    "keep_ancestors", "run_id",
}  # fmt: skip


def _arguments(run: Run, guidance: Any) -> Iterator[tuple[str, Any]]:
    """What tells the run from others, under the names of the caller's arguments."""
    yield "guidance", type(guidance).__qualname__
    yield "shape", (run.observations, run.event)
    yield "steps", run.levels
    yield "eta", run.taus
    yield "prior", run.denoiser
    yield "x_T", (run.x_T, run.differentiable)
    yield "start", run.start is not None  # its moments come from the network
    for name in ("seed", "clip", "dtype", "device", "first_sample"):
        yield name, getattr(run, name)
    if not hasattr(guidance, "particles"):
        yield "samples_per_observation", (run.grouped, run.particles)
    yield from _fields(guidance)
    yield "scale", [likelihood.scale_at(level.t) for likelihood in _likelihoods(guidance) for level in run.levels]


def _describe(value: Any) -> Any:
    """The content of a run's constants or of a guidance object.

    Tensors are described by their elements, since each call moves them to its device anew. Networks, functions and
    unknown objects are described by their names.
    """
    if isinstance(value, Tensor):
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = plain.flatten().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()
    if isinstance(value, tuple | list):
        return tuple(_describe(v) for v in value)
    if isinstance(value, dict):
        return tuple((str(name), _describe(v)) for name, v in value.items() if name != "_cache")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
        return _name(type(value)), _describe(fields)
    if isinstance(value, Likelihood | Operator | Denoiser):
        return _name(type(value)), _describe(vars(value))
    return repr(value) if isinstance(value, _PLAIN) else _name(value)


_PLAIN = bool | int | float | str | None | torch.dtype | torch.device | Schedule


def _name(function: Any) -> Any:
    if isinstance(function, Conditional):
        return _name(function.net), _describe(function.conditions)
    return getattr(function, "__qualname__", type(function).__name__)


def _likelihoods(value: Any) -> Iterator[Likelihood]:
    """The likelihoods that a guidance object holds, at any depth."""
    if isinstance(value, Likelihood):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _likelihoods(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _likelihoods(getattr(value, field.name))


# --- trials -------------------------------------------------------------------------------------------------


class _StandIn(Denoiser):
    """A stand-in for the network that costs nothing: ``x_0`` is ``x_t``, scaled to the size of the data."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(_nothing, denoiser.schedule, "sample")

    def outputs(self, x: Tensor, level: Level, rows: Tensor | None = None) -> tuple[Tensor, None, None]:
        return x / math.hypot(level.alpha, level.sigma), None, None


def _nothing(x: Tensor, t: Tensor) -> Tensor:
    raise NotImplementedError


def _twice(run: Run, trial: Callable[[], Trial]) -> Trial:
    """The results of two runs of a trial. Torch's generators are left as they were."""
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        first, second = trial(), trial()
    tolerance = _tolerance(run)
    return {
        name: value if name in second and _match(value, second[name], tolerance) else _RANDOM
        for name, value in first.items()
    }


def _try_network(run: Run) -> Trial:
    level = run.levels[run.steps // 2]
    try:
        x = _input(run, (1, *run.event)) * math.hypot(level.alpha, level.sigma)
        with torch.no_grad():
            return {"net": _sum_up(run.denoiser(x, level, run.rows[:1]))}
    except Exception:
        return {"net": _FAILED}


def _try_guidance(run: Run, guidance: Any) -> Trial:
    """A trial of the operators and densities of the likelihoods, then of the guidance's first steps and last step."""
    trial: Trial = {}
    small = dataclasses.replace(
        run, denoiser=_StandIn(run.denoiser), observations=1, particles=min(run.particles, 2), seed=0, x_T=None,
        start=None, chunk_size=None, watch=Watch(),
    )  # fmt: skip
    for number, likelihood in enumerate(_likelihoods(guidance)):
        try:
            x0 = _input(run, (2, *run.event)).to(run.compute_dtype)
            with torch.no_grad():
                rows = run.rows[:1].expand(2)
                trial[f"operator {number}"] = _sum_up(likelihood.operator.at(rows)(x0))
                log_prob = likelihood.value(x0, rows, likelihood.scale_at(run.levels[0].t))
                trial[f"likelihood {number}"] = _sum_up(log_prob)
        except Exception:
            trial[f"likelihood {number}"] = _FAILED
    try:
        steps = sorted(_deciding_steps(run, guidance)) if hasattr(guidance, "particles") else [run.steps // 2]
        state = guidance.start(small)
        _record(trial, "start", state)
        for i in steps:
            state = guidance.step(small, state, i)
            _record(trial, f"step {i}", state)
    except Exception:
        trial["steps"] = _FAILED
    return trial


def _deciding_steps(run: Run, guidance: Any) -> set[int]:
    """The first step of each kind of decision, see ``FK.decides``, and the last step."""
    decides = getattr(guidance, "decides", lambda i: (i == 0,))
    kinds = {decides(i): i for i in reversed(range(run.steps))}
    return {run.steps - 1, *(i for kind, i in kinds.items() if any(kind))}


def _input(run: Run, shape: tuple[int, ...]) -> Tensor:
    return ops.randn(shape, seed=0, stream=_STREAM_TRIAL, dtype=run.dtype, device=run.device)


def _record(trial: Trial, when: str, state: State) -> None:
    for name, value in {"x": state.x, "log_weights": state.log_weights, **state.particles}.items():
        if value is not None:
            trial[f"{when}, {name}"] = _sum_up(value)


def _sum_up(value: Tensor) -> list[float]:
    """Numbers that sum up a tensor.

    These are its size, the counts of NaN and of both infinities, the root mean square, and eight random projections as
    large as that root.
    """
    value = value.detach().to("cpu", torch.float64).flatten()
    counts = [value.numel(), *(int(mask.sum()) for mask in (value.isnan(), value == math.inf, value == -math.inf))]
    value = value.nan_to_num(0.0, 0.0, 0.0)
    root = value.square().mean().sqrt()
    projections = []
    for j in range(8):
        direction = ops.randn((1, value.numel()), seed=0, step=j, stream=_STREAM_TRIAL, dtype=torch.float64)[0]
        projections.append(direction.dot(value).item() / math.sqrt(value.numel()))
    return [*counts, root.item(), *projections]


def _tolerance(run: Run) -> float:
    return 1e-3 if run.dtype in (torch.float32, torch.float64) else 5e-2


def _agree(ours: Trial, theirs: Trial, tolerance: float) -> bool:
    if ours.keys() != theirs.keys():
        return _RANDOM in (*ours.values(), *theirs.values())  # after a random value a trial may fail or succeed
    return all(_match(value, theirs[name], tolerance) for name, value in ours.items())


def _match(a: list[float] | str, b: list[float] | str, tolerance: float) -> bool:
    if _RANDOM in (a, b):
        return True
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    largest = tolerance * max(a[4], b[4])
    return a[:4] == b[:4] and all(abs(u - v) <= largest for u, v in zip(a[4:], b[4:], strict=True))
