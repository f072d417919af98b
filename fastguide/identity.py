"""What tells one call of `fastguide.sample` from another: for checkpoints, and for captured loops."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .likelihoods import Likelihood
from .operators import Operator
from .schedules import Schedule

__all__ = ["describe", "identify"]


def describe(value: Any, function: Callable[[Any], Any]) -> Any:
    """A run's constants or a guidance object by content: of every call the tensors are others, moved to its device.
    ``function`` says what becomes of networks, functions and the objects of others."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()
    if isinstance(value, tuple | list):
        return tuple(describe(v, function) for v in value)
    if isinstance(value, dict):
        return tuple((str(name), describe(v, function)) for name, v in value.items() if name != "_cache")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
        return function(type(value)), describe(fields, function)
    if isinstance(value, Likelihood | Operator | Denoiser):
        return function(type(value)), describe(vars(value), function)
    return repr(value) if isinstance(value, _PLAIN) else function(value)


_PLAIN = bool | int | float | str | None | torch.dtype | torch.device | Schedule
_NUMBERS = bool | int | float | complex | str | bytes | None
_HELD = _NUMBERS | Tensor | torch.nn.Module | tuple | list | dict | types.FunctionType | types.MethodType


def identify(value: Any, depth: int = 6) -> Any:
    """A function and what it holds: objects by their identity and attributes, numbers by their values, tensors by where
    they stand, since that is where a graph reads them."""
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)
    if depth == 0 or isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return id(value)
    if isinstance(value, tuple | list):
        return tuple(identify(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return tuple((str(name), identify(v, depth - 1)) for name, v in value.items())
    if isinstance(value, Operator):  # within the one of a latent
        return describe(value, identify)
    if isinstance(value, torch.nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        settings = [identify(_settings(module), 2) for module in value.modules()]
        return id(value), tuple(t.data_ptr() for t in tensors), tuple(settings)
    if isinstance(value, types.FunctionType):  # made anew in every call, perhaps
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *used]
        return id(value.__code__), identify(held, max(depth - 1, 1))  # the list is new: its own id says nothing
    if isinstance(value, types.MethodType):
        return identify((value.__func__, value.__self__), depth)
    if isinstance(value, functools.partial):
        return identify((value.func, value.args, value.keywords), depth)
    attributes = {name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, _HELD)}
    return id(value), identify(attributes, max(depth - 1, 1))


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """What a module is set to beside its weights: its own attributes, and whether others listen in."""
    found = {name: part for name, part in vars(module).items() if not name.startswith("_") and isinstance(part, _HELD)}
    return found | {"hooks": len(module._forward_hooks) + len(module._forward_pre_hooks)}


def _names(code: types.CodeType) -> Iterator[str]:
    """What a function's code, and that of the functions within it, asks of its module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
