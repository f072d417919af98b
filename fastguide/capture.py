"""`capture`: the whole loop of a sampler, network and backward pass included, as one CUDA graph that the user owns."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from . import arguments, foreign, sampling
from .arguments import flag, got
from .denoiser import Denoiser, checked_scale, scale_of_run
from .guidance.base import Run, Schedulable
from .guidance.plain import Plain
from .likelihoods import Likelihood
from .modules import modules_of
from .ops._arguments import Clip
from .samples import Samples

__all__ = ["Capture", "capture"]

_BETWEEN = "no Python runs between the steps of a CUDA graph; fastguide.sample takes it"
_REFUSED = dict.fromkeys(("progress", "callback", "checkpoint", "checkpoint_every", "run_id"), _BETWEEN)
_REFUSED |= dict.fromkeys(("seed", "x_T"), "it is an argument of each replay")
_SCALES = {float: "a number", dict: "a number, a table or a function of the time", Tensor: "a number or a tensor [B]"}

_recording = threading.Lock()  # torch can record only one graph at a time


def capture(
    prior: Denoiser,
    shape: Sequence[int],
    *,
    guidance: Any = None,
    steps: int | Sequence[float] = 50,
    spacing: str | None = None,
    eta: Schedulable | None = None,
    clip: Clip = None,
    first_sample: int = 0,
    samples_per_observation: int | None = None,
    start: str = "prior",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    keep_ancestors: bool = False,
    **others: Any,
) -> Capture:
    """Record the loop of `fastguide.sample` as one CUDA graph.

        run = fastguide.capture(prior, shape, guidance=fastguide.DPS(likelihood))
        out = run(seed=1, y=y)  # the samples of fastguide.sample, to the same bits

    - **Gain.** Python needs longer to launch a small kernel than a GPU to run it. A replay launches all kernels at
      once. A large network, or many samples, keep the GPU busy while Python goes ahead; a capture then gains nothing.
    - **Time.** A capture runs the loop once, as `sample` does, and once more to record it, which computes nothing. Each
      step is a part of the graph of its own, so time and graph grow with ``steps``.
    - **Memory.** ``run`` keeps what the loop needs at its peak, until the last reference to ``run`` goes: the
      activations of one backward pass, which every step uses again, a record of each launch, and copies of ``y``,
      ``x_T`` and the result.
    - **What a replay reads.** Weights of networks and tensors of a `Conditional`, at the addresses that they had. What
      is changed *in place* (``copy_``, an optimiser's step) counts at the next replay. Everything else needs a new
      capture: operators, numbers, levels and settings, branches that Python took, ``train`` or ``eval``, autocast,
      hooks, and tensors that were replaced (``module.weight = new``, ``.data = new``, ``.to(...)``). ``run`` keeps all
      memory that it reads.
    - **What can be captured.** Functions that never wait for the device: no ``.item()``, no ``if`` on a tensor, no copy
      from the host. Networks compiled by ``torch.compile`` in its default mode can be captured.

    Args:
        prior: As for `fastguide.sample`.
        shape: As for `fastguide.sample`.
        guidance: As for `fastguide.sample`.
        steps: As for `fastguide.sample`; 50 by default.
        spacing: As for `fastguide.sample`.
        eta: As for `fastguide.sample`; None is 1, DDPM.
        clip: As for `fastguide.sample`.
        first_sample: As for `fastguide.sample`.
        samples_per_observation: As for `fastguide.sample`.
        start: As for `fastguide.sample`. The moments are those of the capture: changed weights do not count.
        dtype: As for `fastguide.sample`.
        device: The CUDA device. None takes that of the networks' parameters, else the current one.
        chunk_size: As for `fastguide.sample`.
        keep_ancestors: As for `fastguide.sample`.
        **others: None. The arguments of `fastguide.sample` that a capture cannot take are refused by name:
            ``progress``, ``callback``, ``checkpoint``, ``checkpoint_every``, ``run_id``, and ``seed`` and ``x_T``,
            which each replay takes.

    Returns:
        A `Capture`, to be called as ``run(seed=None, y=None, x_T=None, guidance_scale=None)``.

    Raises:
        TypeError: An argument has the wrong type, or is not taken by a capture.
        ValueError: An argument is outside its range, or ``device`` is not a CUDA device.
        RuntimeError: The loop cannot be recorded. The message says what stopped it.
    """
    for name in others:
        reason = f": {_REFUSED[name]}" if name in _REFUSED else ""
        raise TypeError(f"capture() got an unexpected keyword argument {name!r}{reason}")
    guidance = Plain() if guidance is None else guidance
    if device is None:
        found = (p.device for _, module in modules_of(prior, guidance) for p in module.parameters())
        device = next(found, torch.device("cuda"))
    device = _cuda_device(arguments.torch_device("device", device))
    run = sampling.prepare_run(
        prior, shape, guidance, steps, spacing, eta, clip, 0, None, dtype, device, chunk_size, first_sample,
        samples_per_observation,
    )  # fmt: skip
    sampling.differentiable(run, guidance)
    with foreign.package_modes(device):
        run = sampling.started(run, start)
    loop = sampling.Loop(hasattr(guidance, "particles"), flag("keep_ancestors", keep_ancestors))
    return Capture(run, guidance, loop)


def _cuda_device(device: torch.device) -> torch.device:
    if device.type != "cuda" or not torch.cuda.is_available():
        none = ", and torch sees none" if device.type == "cuda" else ""
        raise ValueError(
            f"device: expected a CUDA device, where the graph runs and the network must be, got {device}{none}; "
            "fastguide.sample runs on any"
        )
    return device


class Capture:
    """A captured loop, as `capture` returns it. It owns its memory and its stream."""

    def __init__(self, run: Run, guidance: Any, loop: sampling.Loop):
        self._lock = threading.Lock()
        with _recording, _without_cache(run.device), foreign.package_modes(run.device):
            # The inputs of a replay: the bits of the seed, the start, the guidance scale and the observation.
            self._seed_there = torch.zeros(1, dtype=torch.int64, device=run.device)
            self._x_T_there = run.prior_noise()
            denoiser, self._scale = copy.copy(run.denoiser), run.denoiser.guidance_scale
            if self._scale is not None:
                denoiser.guidance_scale = self._scale_there = _numbers(self._scale).to(run.device, copy=True)
                if isinstance(self._scale, dict):
                    denoiser.guidance_scale = dict(zip(self._scale, self._scale_there.unbind(), strict=True))
            field = sampling.likelihood_field(guidance)
            likelihood = getattr(guidance, field, None)
            self._likelihood = likelihood if isinstance(likelihood, Likelihood) and likelihood.has_y else None
            if self._likelihood is not None:
                own = self._likelihood.to(run.device, run.compute_dtype)
                self._y, own.y = own.y.detach().clone(), own.y.detach().clone()
                self._y_there, guidance = own.y, copy.copy(guidance)
                object.__setattr__(guidance, field, own)
            self._run = run = replace(run, denoiser=denoiser, seed=self._seed_there, x_T=self._x_T_there)
            self._guidance = guidance = guidance.prepare(run)

            def whole() -> tuple[Tensor | None, ...]:
                run.watch.clear()
                return (*loop(run, guidance), run.watch.numbers())

            self._recorded = _record(whole, run.device)
        modules = modules_of(denoiser, guidance)  # no dispatch mode sees the kernels of compiled modules
        self._read = [t.untyped_storage() for _, m in modules for t in (*m.parameters(), *m.buffers())]

    def __call__(
        self, *, seed: int | None = None, y: Tensor | None = None, x_T: Tensor | None = None, guidance_scale: Any = None
    ) -> Samples:
        """Replay the graph with new inputs.

        The call waits for its result. Calls from several threads take turns. Shapes are those of the capture.

        Args:
            seed: An integer in ``[0, 2^64)``, for all observations. None draws one from torch's default generator.
            y: The observation. None takes the ``y`` of the guidance's likelihood.
            x_T: The start. None takes the prior's noise.
            guidance_scale: A scale of the form that it had in the capture (a number, ``[B]``, or one for each step), or
                a number. None takes that of the prior.

        Returns:
            The samples. Later calls do not change them.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has another shape than in the capture, requires a gradient or is outside its range.
            FloatingPointError: A value stopped being finite, or no particle is left.
        """
        run, own_seed = self._run, sampling.checked_seed(seed, self._run.observations)
        if isinstance(own_seed, tuple):
            raise ValueError(f"seed: expected an integer, since a captured loop has one seed for all, got {got(seed)}")
        for name, value in (("y", y), ("x_T", x_T), ("guidance_scale", guidance_scale)):
            if sampling.needs_gradient(name, value):
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient, since a captured loop has no derivative, got "
                    f"one that does; {name}.detach() or torch.no_grad() draws samples"
                )
        y, scale = self._checked_y(y), self._checked_scale(guidance_scale)
        x_T = None if x_T is None else sampling.checked_x_T(x_T, run.shape).reshape(-1, *run.event)
        with self._lock, foreign.package_modes(run.device):
            self._seed_there.fill_(own_seed - (1 << 64) if own_seed >> 63 else own_seed)
            self._x_T_there.copy_(run.prior_noise() if x_T is None else x_T)
            if y is not None:
                self._y_there.copy_(y)
            if scale is not None:
                self._scale_there.copy_(_numbers(scale))
            self._recorded.replay()
            *results, numbers = self._recorded.results
            results = [None if result is None else result.clone() for result in results]
            unknown = run.watch.report(numbers)
        return sampling.finished(run, own_seed, self._guidance, results, run.steps, unknown)

    def _checked_y(self, y: Any) -> Tensor | None:
        if self._likelihood is None:
            if y is not None:
                raise ValueError(f"y: expected None without a likelihood that has one, got {got(y)}")
            return None
        y = self._y if y is None else self._likelihood.checked_y(y)
        if y.shape != self._y.shape:
            raise ValueError(f"y: expected shape {list(self._y.shape)}, that of the capture, got {list(y.shape)}")
        return y

    def _checked_scale(self, scale: Any) -> Any:
        if scale is None:
            return self._scale
        if self._scale is None:
            raise ValueError(f"guidance_scale: expected None without an unconditional network, got {got(scale)}")
        found = scale_of_run(checked_scale(scale), self._run.levels, self._run.observations, self._run.device)
        if not isinstance(found, float | type(self._scale)):
            expected = _SCALES[type(self._scale)]
            raise ValueError(f"guidance_scale: expected {expected}, as in the capture, got {got(scale)}")
        return found


def _numbers(scale: Any) -> Tensor:
    return foreign.as_tensor(list(scale.values()) if isinstance(scale, dict) else scale, torch.float64)


def _without_cache(device: torch.device) -> torch.autocast:
    """The caller's autocast without its cache. The cache would keep casts of weights, which a replay must make anew."""
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Recorded(NamedTuple):
    results: tuple[Tensor | None, ...]  # in the graph's memory
    replay: Callable[[], None]  # computes the results again
    kept: Sequence[torch.UntypedStorage] = ()  # memory that the graph reads


def _record(function: Callable[[], tuple[Tensor | None, ...]], device: torch.device) -> _Recorded:
    """Record the work of ``function`` as a CUDA graph with memory and a stream of its own."""
    with torch.cuda.device(device):
        current, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()  # warm-up: lets compilers, tuners and caches do their work before the recording
        current.wait_stream(stream)
        reads, failure = _Reads(), None
        results: tuple[Tensor | None, ...] = ()
        torch._C._cuda_clearCublasWorkspaces()  # so that the graph makes workspaces in its own memory
        # thread_local: what other threads do meanwhile, such as pinning memory, does not break the capture.
        recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(current), recording:  # a broken capture would leave its own stream current
                try:
                    with reads:
                        results = function()
                except Exception as error:  # ending a broken capture raises too, with a less useful message
                    failure = error
        except Exception as error:
            failure = failure or error
        finally:
            torch._C._cuda_clearCublasWorkspaces()  # so that nothing else uses the graph's workspaces
    if failure is not None:
        words = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
        raise RuntimeError(f"capture: the loop cannot be recorded as a CUDA graph: {words}") from failure

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return _Recorded(results, replay, reads.alive())


class _Reads(TorchDispatchMode):
    """Notes the memory that operations read, by weak references.

    What is still alive after a recording is not the loop's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # without it a compiled network would run uncompiled

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor) and arguments.has_memory(value):
                storage = value.untyped_storage()
                self._found[storage._cdata] = weakref.ref(storage)
        return function(*args, **(kwargs or {}))

    def alive(self) -> list[torch.UntypedStorage]:
        return [storage for reference in self._found.values() if (storage := reference()) is not None]
