"""Calls of the user's functions: networks, decoders, rewards, potentials and proposals.

Such a function gets copies of its tensors, so that it may write into them, and runs under the autocast of whoever
called `fastguide.sample`. The package's own arithmetic runs without autocast, inference mode and gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .memory import Memory

__all__ = ["as_tensor", "call", "memory", "package_modes", "returned", "without_autocast"]

# The autocast of the caller of `fastguide.sample`: arguments of torch.autocast, for each device type where it is on.
_autocast: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("fastguide_autocast", default=())
# The cache of large blocks of the running `fastguide.sample`.
_memory: ContextVar[Memory | None] = ContextVar("fastguide_memory", default=None)


@contextlib.contextmanager
def package_modes(device: torch.device) -> Iterator[None]:
    """The modes of the package's own arithmetic: no autocast, no inference mode, no gradients, and one `memory`."""
    found = []
    with contextlib.ExitStack() as modes:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                dtype, cache = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
                found.append(dict(device_type=kind, dtype=dtype, cache_enabled=cache))
                modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        token = _autocast.set(tuple(found))
        modes.callback(_autocast.reset, token)
        kept = _memory.set(Memory())
        modes.callback(_memory.reset, kept)
        yield


def autocast_dtypes() -> list[torch.dtype]:
    """The dtypes that the caller's autocast computes in."""
    return [mode["dtype"] for mode in _autocast.get()]


def memory() -> Memory:
    """The cache of large blocks of the present run; a new one outside a run."""
    return _memory.get() or Memory()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast on this device."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def call(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``f(*args, **kwargs)`` with copies of the tensors among ``args``, under the caller's autocast."""
    own = memory()
    copies = [own.copy(a) if isinstance(a, Tensor) else a for a in args]
    modes = _autocast.get()
    if not modes:
        return f(*copies, **kwargs)
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(torch.autocast(**mode))
        return f(*copies, **kwargs)


def returned(
    name: str, value: Any, expected: str = "a tensor or an object with a tensor sample", *, real: bool = True
) -> Tensor:
    """The tensor in what a user's function returned: itself, or the tensor ``sample`` of an output object.

    ``real`` refuses a complex tensor, since the package would drop its imaginary part.
    """
    found = value if isinstance(value, Tensor) else getattr(value, "sample", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: expected it to return {expected}, got {type(value).__name__}")
    if real and found.is_complex():
        raise TypeError(f"{name}: expected it to return real numbers, got {found.dtype} {list(found.shape)}")
    return found


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` as a tensor.

    A tensor stays where it is. Anything else goes to the CPU, whatever torch's default device is.
    """
    return torch.as_tensor(value, dtype=dtype, device=value.device if isinstance(value, Tensor) else "cpu")
