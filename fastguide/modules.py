"""The torch modules behind the functions that a run calls."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .denoiser import Conditional
from .likelihoods import Likelihood
from .operators import Operator

__all__ = ["modules_of", "warn_of_training"]


def modules_of(prior: Any, guidance: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of a run, each with the name of its argument: ``net``, ``decoder``, ``operator.f``.

    A module is found where it is the function itself, or is bound to it: by a method, by `functools.partial`, or by
    `functools.wraps`.
    """
    seen: list[Any] = []
    for name in ("net", "unconditional"):
        yield from _modules(name, getattr(prior, name, None), seen)
    for name, value in getattr(guidance, "__dict__", {}).items():
        yield from _modules(name, value, seen)


def _modules(name: str, value: Any, seen: list[Any]) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(value, torch.nn.Module):
        yield name, value
    elif isinstance(value, Likelihood | Operator):
        if not any(value is other for other in seen):  # it may hold itself
            seen.append(value)
            for attribute, part in vars(value).items():
                attribute = attribute.lstrip("_")
                yield from _modules(attribute if attribute == "operator" else f"{name}.{attribute}", part, seen)
    else:
        for part in _behind(value):
            yield from _modules(name, part, seen)


def _behind(value: Any) -> tuple[Any, ...]:
    """The parts of a function, or the functions in a sequence."""
    if isinstance(value, tuple | list):
        return tuple(value)
    if isinstance(value, Conditional):
        return (value.net,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, types.FunctionType):
        return (vars(value).get("__wrapped__"),)
    return ()


def warn_of_training(prior: Any, guidance: Any, stacklevel: int) -> None:
    """Warn where dropout or batch statistics are in training mode: the samples then depend on more than the seed."""
    warned = set()
    for name, module in modules_of(prior, guidance):
        for part in module.modules():
            kind = isinstance(part, _DropoutNd | _BatchNorm)
            if part.training and kind and getattr(part, "p", 1.0) > 0 and name not in warned:
                warned.add(name)
                warnings.warn(
                    f"{name}: its {type(part).__name__} is in training mode; the module's eval() turns that off",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )
