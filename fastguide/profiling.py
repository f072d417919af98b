"""NVTX ranges for the phases of a sampler's step, which Nsight Systems and Nsight Compute show.

| range | holds |
| --- | --- |
| ``fastguide.network`` | an evaluation of the denoiser |
| ``fastguide.gradient`` | the likelihood's or the reward's gradient, pulled back through the network |
| ``fastguide.solve`` | the data step of PnP; of LatentPnP decoder and encoder as well |
| ``fastguide.step`` | the reverse step, and for a guided proposal the ratio of densities that comes with it |
| ``fastguide.weights`` | densities, rewards and potentials, and the log-weights that they change |
| ``fastguide.resample``, ``fastguide.gather`` | the ancestors, and the particles that move |

Where the network and what follows see one chunk after the other, their ranges take turns. A range is of the thread that
opened it, and autograd launches a backward pass on a GPU from another. A replay of `fastguide.capture` has none: they
appear where it is captured.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch

__all__ = ["phase"]


class _Range:
    """Push and pop around a body; of no state, so that one serves nested and concurrent uses."""

    def __init__(self, message: str, push: Callable[[str], object], pop: Callable[[], object]):
        self._message, self._push, self._pop = message, push, pop

    def __enter__(self) -> None:
        self._push(self._message)

    def __exit__(self, *exception: object) -> None:
        self._pop()


_NOTHING = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """``with phase(name):`` runs its body in the range ``fastguide.<name>``; as it is where no tool listens, and while
    ``torch.compile`` traces.

    A tool makes itself known to NVTX by an environment variable, which NVTX reads once as well; so whether one listens
    is looked up at the first use of a name.
    """
    return _NOTHING if torch.compiler.is_compiling() else _range(name)


@functools.cache
def _range(name: str) -> contextlib.AbstractContextManager[None]:
    functions = _functions() if os.environ.get("NVTX_INJECTION64_PATH") else None
    return _NOTHING if functions is None else _Range(f"fastguide.{name}", *functions)


def _functions() -> tuple[Callable[[str], object], Callable[[], object]] | None:
    """Push and pop: of ``nvtx``, of torch where that is absent, or None where torch was built without CUDA."""
    try:
        import nvtx
    except ImportError:
        if not torch.backends.cuda.is_built():
            return None
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return nvtx.push_range, nvtx.pop_range
