"""A sampler's whole loop, network and backward pass included, as one CUDA graph that later calls replay.

What changes from call to call stands in memory of the graph's own, which a replay reads: the seed, ``x_T``, the
observation ``y``, and the scale of the guidance (`DPS.zeta`, `PiGDM.zeta`, `FK.strength`, and `Denoiser`'s
``guidance_scale``; `PnP.rho`). A call that differs in anything else is another graph: another network, shape, dtype,
device, levels, operator, error model or setting of the guidance.

A loop of more than `UNROLLED` operations is recorded as one graph for each kind of step (the last is one of its own;
others differ where a decision does), which reads the step's index on the device and is replayed for all of its kind.
Its bits are the eager loop's but under the isotropic covariance, whose variances it adds in float32.

Graphs are kept, the last `KEPT` of them, with the memory that their loops need; `clear` gives it back. Networks and
other functions are the same if they and what they hold are: weights and other tensors by where they stand, so that what
is changed in place counts at the next replay; numbers and flags in closures, attributes and globals by their values.
A replay runs no Python: what a function prints or counts it does at capture alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .guidance.base import Run, State, Step
from .guidance.watch import Watch as FiniteWatch
from .identity import describe, identify
from .likelihoods import Likelihood

__all__ = ["KEPT", "UNROLLED", "clear"]

KEPT = 8  # graphs, those least recently used go first
UNROLLED = 1 << 16  # operations

_DEVICE = "cuda"
_REMEMBERED = 64

Results = tuple[Tensor | None, ...]
Take = Callable[[str, Any], Any]  # an input's name and its value, a number, a table or a tensor, to what stands for it

_lock = threading.RLock()  # one capture at a time
_graphs: OrderedDict[Any, Captured] = OrderedDict()
_refused: OrderedDict[Any, tuple] = OrderedDict()  # calls that cannot be captured: why, and what their keys stand for


class Loop(Protocol):
    """What `fastguide.sampling` does with a run."""

    @property
    def keep_ancestors(self) -> bool: ...

    def __call__(self, run: Run, guidance: Any) -> Results: ...

    def finish(self, run: Run, state: State, ess: Sequence[Tensor], ancestors: Sequence[Tensor]) -> Results: ...


def clear() -> None:
    """Forget all graphs, and give their memory back."""
    with _lock:
        for entries in (_graphs, _refused):
            entries.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def call(loop: Loop, run: Run, guidance: Any, graph: bool | str, obstacle: str) -> Results:
    """``loop(run, guidance)``, by a graph where ``graph`` is True. ``obstacle``: why this call needs an eager loop, or
    ``""``."""
    if graph is not True:
        return loop(run, guidance)
    if run.device.type != _DEVICE:
        obstacle = f"a CUDA graph runs on a GPU, and this run is on {run.device}"
    elif isinstance(run.seed, tuple):
        obstacle = "there is a seed for each observation, and a graph has one"
    elif isinstance(run.denoiser.guidance_scale, dict):
        obstacle = "guidance_scale follows the time"
    elif _is_capturing():
        obstacle = "this call is within a capture of the caller's"
    cause = None
    if not obstacle:
        key = loop.keep_ancestors, _surroundings(), _describe_call(run, guidance)
        try:
            with _lock:
                captured = _find(key, loop, run, guidance)
            return captured(run, guidance)
        except _NotCapturable as error:
            cause, obstacle = error.__cause__, str(error)
    raise RuntimeError(f"graph=True: the loop cannot be captured: {obstacle}") from cause


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _NotCapturable(Exception):
    """Why."""


def _find(key: Any, loop: Loop, run: Run, guidance: Any) -> Captured:
    """The graph of a call, captured where there is none yet."""
    if key in _refused:
        raise _NotCapturable(_refused[key][0])
    if key not in _graphs:
        try:
            _graphs[key] = Captured(loop, run, guidance)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            _keep(_refused, key, (reason, run, guidance), _REMEMBERED)
            raise _NotCapturable(reason) from error
    _keep(_graphs, key, _graphs[key], KEPT)
    return _graphs[key]


def _keep(entries: OrderedDict, key: Any, value: Any, most: int) -> None:
    """As the most recent of ``most``."""
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)


# --- what a graph is ----------------------------------------------------------------------------------------


class Captured:
    """A loop and the memory of its inputs, recorded."""

    def __init__(self, loop: Loop, run: Run, guidance: Any):
        self._inputs: dict[str, Tensor] = {}

        def own(name: str, value: Any) -> Tensor:
            tensor = self._inputs[name] = _to_tensor(value, run.device)
            return tensor

        # Kept: nothing that the graph reads may go, and the identities in its key stay taken.
        self._arguments = run, guidance = _with_inputs(run, guidance, own)
        self._recording = Recording(run.device)
        if count_operations(lambda: loop(run, guidance)) <= UNROLLED:
            results, replay = self._recording.record(lambda: loop(run, guidance))
            replays = [replay]
        else:
            results, replays = _record_steps(self._recording, loop, run, guidance)
        self._results: Results = results
        self._replays: list[Callable[[], None]] = replays

    def __call__(self, run: Run, guidance: Any) -> Results:
        def fill(name: str, value: Any) -> Any:
            own = self._inputs[name]
            if isinstance(value, Tensor | tuple):
                own.copy_(value if isinstance(value, Tensor) else _from_host(value, own.device), non_blocking=True)
            else:
                own.fill_(_signed(value))
            return value

        with self._recording.turn():
            _with_inputs(run, guidance, fill)
            for replay in self._replays:
                replay()
            return tuple(None if r is None else r.clone() for r in self._results)


class Recording:
    """CUDA graphs that are replayed in the order in which they were recorded, and share their memory. Users, from any
    thread and on any stream, take turns at it."""

    def __init__(self, device: torch.device):
        self._lock, self._device = threading.Lock(), device
        with torch.cuda.device(device):
            self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``function`` returns, which stands in the graph's memory, and the replay that computes it anew."""
        with torch.cuda.device(self._device), _autocast_without_cache():
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()  # compilers, tuners and caches have their say here
            current.wait_stream(self._stream)
            graph, failure, results = torch.cuda.CUDAGraph(), None, None
            # What other threads do meanwhile, such as pinning memory, breaks no capture of this one.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.stream(current), capture:  # a broken capture leaves its stream the current one
                    try:
                        results = function()
                    except Exception as error:  # the end of a broken capture is an error that says less
                        failure = error
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return results, graph.replay

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)


def _record_steps(recording: Recording, loop: Loop, run: Run, guidance: Any) -> tuple[Results, list]:
    """The start, and one step of each kind, which moves the index on; the replays, in the order of the loop."""
    if not type(guidance).__module__.startswith("fastguide."):
        raise ValueError(
            f"guidance: {type(guidance).__name__} takes more than {UNROLLED} operations, and of steps that stand for "
            "each other fastguide knows its own alone"
        )
    index = torch.zeros(1, dtype=torch.int64, device=run.device)
    levels, taus = (torch.tensor(t, dtype=torch.float64, device=run.device) for t in (run.levels, run.taus))
    run = dataclasses.replace(run, tables=(levels, taus))

    def on_device(name: str, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else _to_tensor(value, run.device)

    guidance = _replaced(guidance, "guidance", "step_tables", on_device)
    # Outside of the graphs' memory, of which each may use all.
    state = _map_state(guidance.start(run), Tensor.clone)
    history: dict[str, Tensor] = {}

    def carry(new: State) -> None:
        _copy_state(new, state)

    def start() -> None:
        index.zero_()
        carry(guidance.start(run))

    def step(i: int) -> State:
        new = guidance.step(run, _map_state(state, lambda t: t), Step(i, index))
        for name in ("ess", "ancestors") if loop.keep_ancestors else ("ess",):
            value = getattr(new, name)
            if value is not None:
                if name not in history:
                    history[name] = value.new_empty((run.steps, *value.shape))
                history[name].index_copy_(0, index, value[None])
        return new

    def between(i: int) -> None:
        carry(step(i))
        index.add_(1)

    def last() -> Results:
        new = step(run.steps - 1)
        return loop.finish(run, new, *(list(history[name]) if name in history else [] for name in ("ess", "ancestors")))

    replays, kinds = [recording.record(start)[1]], {}
    for i in range(run.steps - 1):
        kind = _kind(run, guidance, i)
        if kind not in kinds:
            index.fill_(i)
            kinds[kind] = recording.record(functools.partial(between, i))[1]
        replays.append(kinds[kind])
    index.fill_(run.steps - 1)
    results, replay = recording.record(last)
    return results, [*replays, replay]


def _kind(run: Run, guidance: Any, i: int) -> tuple:
    """What step ``i`` decides: steps of one kind differ in numbers alone."""
    likelihoods: list[Likelihood] = []
    _find_likelihoods(guidance, likelihoods)
    ends = []
    for level, j in ((run.levels[i], i), (run.levels[i + 1], i + 1)):
        scales = tuple(likelihood.scale_at(level.t) for likelihood in likelihoods)
        ends.append((run.vanishing(j), level.alpha == 0.0, level.sigma == 0.0, scales))
    return *ends, run.taus[i] > 0.0, guidance.decides(i) if hasattr(guidance, "decides") else None


def _find_likelihoods(value: Any, found: list[Likelihood]) -> None:
    if isinstance(value, Likelihood):
        found.append(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _find_likelihoods(getattr(value, field.name), found)


def _map_state(state: State, f: Callable[[Tensor], Tensor]) -> State:
    """What a state carries on, the tensors of which are replaced."""
    log_weights = None if state.log_weights is None else f(state.log_weights)
    return State(f(state.x), log_weights, {name: f(value) for name, value in state.particles.items()})


def _copy_state(source: State, target: State) -> None:
    if source.particles.keys() != target.particles.keys():
        raise ValueError(f"state: expected {sorted(target.particles)} in every step, got {sorted(source.particles)}")
    target.x.copy_(source.x)
    if target.log_weights is not None and source.log_weights is not None:
        target.log_weights.copy_(source.log_weights)
    for name, value in source.particles.items():
        target.particles[name].copy_(value)


def _autocast_without_cache() -> contextlib.AbstractContextManager:
    """The caller's autocast; its cache would hold casts of weights that a replay does not make again."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


# --- what no graph holds ------------------------------------------------------------------------------------

_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten.is_nonzero.default, _aten._unique2.default, _aten.bincount.default, _aten.repeat_interleave.Tensor,
    _aten._linalg_eigh.default, _aten.linalg_eig.default, _aten._linalg_svd.default,
}  # fmt: skip
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class Watch(TorchDispatchMode):
    """Counts ``operations``, and raises for one that waits for the device or copies between it and another. A capture
    would break at it, and until torch 2.12 a broken capture cost the allocator its bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        if function in _COPIES:
            source, target = args[1::-1] if function is _aten.copy_.default else (args[0], None)
            device = kwargs.get("device") or source.device if target is None else target.device
            if source.device != device:
                raise RuntimeError(f"{function} copies from {source.device} to {device}")
        elif function in _WAITS and args[0].device.type != "cpu":
            raise RuntimeError(f"{function} waits for the device")
        elif function in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise RuntimeError(f"{function} by a mask waits for the device")
        return function(*args, **kwargs)


class _WatchMaking(TorchFunctionMode):
    """Raises where a tensor on a device is made of the host's numbers, which no operation shows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            if device.type != "cpu":
                raise RuntimeError(f"torch.{function.__name__} copies from the host to {device}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Raises for what no graph holds. What is compiled runs as it was written."""
    with torch.compiler.set_stance("force_eager"), _WatchMaking(), Watch() as watch:
        yield watch


def count_operations(function: Callable[[], Any]) -> int:
    """The operations of ``function``; raises where a graph cannot hold one of them."""
    try:
        with watched() as watch:
            function()
    except Exception:
        function()  # fills caches from the host, perhaps, and will not do so again
        with watched() as watch:
            function()
    return watch.operations


# --- inputs -------------------------------------------------------------------------------------------------


def _with_inputs(run: Run, guidance: Any, take: Take) -> tuple[Run, Any]:
    """Both, with what ``take`` puts in the place of every input."""
    denoiser = run.denoiser
    if denoiser.guidance_scale is not None:
        denoiser = copy.copy(denoiser)
        denoiser.guidance_scale = take("guidance_scale", _as_float(denoiser.guidance_scale))
    x_T = None if run.x_T is None else take("x_T", run.x_T)
    run = dataclasses.replace(run, denoiser=denoiser, seed=take("seed", run.seed), x_T=x_T, watch=FiniteWatch())
    return run, _replaced(guidance, "guidance", "device_inputs", take)


def _replaced(value: Any, name: str, kind: str, take: Take) -> Any:
    """``value`` with something else for its observation and for the numbers and tables that its class's ``kind``
    names."""
    if isinstance(value, Likelihood):
        value = copy.copy(value)
        value.y = take(f"{name}.y", value.y)
        return value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    there = copy.copy(value)
    for field in dataclasses.fields(value):
        part, part_name = getattr(value, field.name), f"{name}.{field.name}"
        if field.name in getattr(value, kind, ()) and isinstance(part, Real | tuple):
            other = take(part_name, _as_float(part))
        else:
            other = _replaced(part, part_name, kind, take)
        object.__setattr__(there, field.name, other)
    return there


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, Real) else value


def _to_tensor(value: Any, device: torch.device) -> Tensor:
    """New: of a tensor a copy, a number or a table in float64, a seed's 64 bits as an int64 of one element."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, int):
        return torch.tensor([_signed(value)], device=device)
    return torch.tensor(value, dtype=torch.float64, device=device)


def _signed(value: float) -> float:
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def _from_host(table: tuple[float, ...], device: torch.device) -> Tensor:
    """From where a GPU copies while the host goes on."""
    return torch.tensor(table, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")


# --- what a graph depends on --------------------------------------------------------------------------------


class _Slot(NamedTuple):
    """An input as a key has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def _describe_call(run: Run, guidance: Any) -> Any:
    def slot(name: str, value: Any) -> _Slot:
        if isinstance(value, Tensor):
            return _Slot(name, tuple(value.shape), str(value.dtype))
        return _Slot(name, (len(value),) if isinstance(value, tuple) else (), type(value).__name__)

    return describe(_with_inputs(run, guidance, slot), identify)


def _surroundings() -> tuple:
    """The settings that decide which kernels torch takes."""
    return (
        torch.is_autocast_enabled("cuda") and str(torch.get_autocast_dtype("cuda")),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
