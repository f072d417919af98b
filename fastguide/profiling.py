"""Ranges for the phases of a step, shown by Nsight Systems, Nsight Compute and torch.profiler.

| range | holds |
| --- | --- |
| ``fastguide.network`` | an evaluation of the denoiser |
| ``fastguide.gradient`` | the gradient of the likelihood or reward, pulled back through the network |
| ``fastguide.solve`` | the data step of PnP and the draw of DAPS; for LatentPnP decoder and encoder as well |
| ``fastguide.step`` | the reverse step; for a guided proposal also the ratio of densities |
| ``fastguide.weights`` | densities, rewards and potentials, and the change of the log-weights |
| ``fastguide.resample``, ``fastguide.gather`` | the ancestors; the copies of particles |

Where the network runs on one chunk after the other, its range and the next alternate. A range belongs to the thread
that opened it; autograd launches a backward pass on a GPU from another thread. A replay of `fastguide.capture` has no
ranges: they appear while it is captured.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch
from torch.autograd import profiler

__all__ = ["phase"]


class _Range:
    """Push and pop around a body. It has no state, so one object serves nested and concurrent uses."""

    def __init__(self, message: str, push: Callable[[str], object], pop: Callable[[], object]):
        self._message, self._push, self._pop = message, push, pop

    def __enter__(self) -> None:
        self._push(self._message)

    def __exit__(self, *exception: object) -> None:
        self._pop()


_NOTHING = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in the range ``fastguide.<name>``: of NVTX where a tool listens, else of `torch.profiler` while it
    records. Free when no profiler is attached, and inside ``torch.compile``.

    A profiler announces itself to NVTX by an environment variable. NVTX reads it once, so it is read here at the first
    use of a name.
    """
    if torch.compiler.is_compiling():
        return _NOTHING
    found = _range(name)
    if found is _NOTHING and profiler._is_profiler_enabled:
        return profiler.record_function(f"fastguide.{name}")
    return found


@functools.cache
def _range(name: str) -> contextlib.AbstractContextManager[None]:
    functions = _functions() if os.environ.get("NVTX_INJECTION64_PATH") else None
    return _NOTHING if functions is None else _Range(f"fastguide.{name}", *functions)


def _functions() -> tuple[Callable[[str], object], Callable[[], object]] | None:
    """Push and pop, from ``nvtx`` or else from torch; None where torch was built without CUDA."""
    try:
        import nvtx
    except ImportError:
        if not torch.backends.cuda.is_built():
            return None
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return nvtx.push_range, nvtx.pop_range
