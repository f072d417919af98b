"""Checks that arguments share. An error names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, maybe_get_fake_mode
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = [
    "as_float",
    "expect_alike",
    "fake_mode",
    "flag",
    "function",
    "got",
    "has_memory",
    "integer",
    "is_batched",
    "is_integer",
    "is_wrapper",
    "number",
    "one_of",
    "path",
    "placement",
    "real",
    "real_array",
    "shape",
    "tensor",
    "torch_device",
    "torch_dtype",
    "traced",
    "transformed",
]


def got(value: Any) -> str:
    """What an error says about ``value``. Elements of a tensor are not read: they may be on a device, or not exist."""
    if isinstance(value, Tensor):
        kind = "" if type(value) is Tensor else f"{type(value).__name__} "
        layout = "nested " if value.is_nested else "" if value.layout is torch.strided else f"{value.layout} "
        size = "" if value.is_nested else f" {list(value.shape)}"
        grad = " that requires a gradient" if value.requires_grad else ""
        return f"{kind}{layout}{value.dtype}{size} on {value.device}{grad}"
    if type(value) in (list, tuple):
        values = [got(part) for part in value[:8]] + ["..."] * (len(value) > 8)
        return f"[{', '.join(values)}]" if type(value) is list else f"({', '.join(values)}{',' * (len(value) == 1)})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = zip(value._fields, map(got, value), strict=True)
        return f"{type(value).__name__}({', '.join(f'{name}={part}' for name, part in fields)})"
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biufc":
        return repr(value.item())
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {list(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # raised by the value's own repr, or for an integer too long to print
        return type(value).__name__
    return text if len(text) <= 120 else f"{text[:100]}..."


def as_float(value: Any) -> float | None:
    """A real number, or a tensor or array with one real number, as a float.

    None for anything else, and for an integer larger than every float.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        return float(value) if _is_one_number(value) else None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def real(name: str, value: Any) -> float:
    """``value`` as a float that is not NaN. Infinity is allowed."""
    found = as_float(value)
    if found is None or math.isnan(found):
        raise (TypeError if found is None else ValueError)(f"{name}: expected a number, got {got(value)}")
    return found


def is_integer(value: Tensor) -> bool:
    """Whether the tensor has an integer dtype."""
    return value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _is_one_number(value: Tensor) -> bool:
    """Whether a tensor is one real number that can be read without losing a derivative."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta and not transformed() and not fake_mode()
    return (
        plain
        and (value.is_floating_point() or is_integer(value))
        and value.layout is torch.strided
        and value.numel() == 1
        and not (value.requires_grad and torch.is_grad_enabled())
        and has_memory(value)
    )


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    what: str = "number",
    others: str = "",
) -> float:
    """``value`` as a finite float in ``[low, high]`` and in ``(above, below)``.

    ``others`` says what else the argument takes, for the error where ``value`` is not a number.
    """
    found = value if type(value) is float else as_float(value)
    if found is not None and low <= found <= high and above < found < below:
        return found
    least, most = max(low, above), min(high, below)
    if most < math.inf:
        expected = f"a {what} in {'(' if above >= low else '['}{least:g}, {most:g}{')' if below <= high else ']'}"
    elif least > -math.inf:
        expected = f"a finite {what} {'>' if above >= low else '>='} {least:g}"
    else:
        expected = f"a finite {what}"
    kind: type[Exception] = ValueError
    if found is None and not isinstance(value, Real):
        kind, expected = TypeError, expected + others
    raise kind(f"{name}: expected {expected}, got {got(value)}")


def integer(name: str, value: Any, low: int | None = None, high: int | None = None, others: str = "") -> int:
    """``value`` as an int in ``[low, high)``. ``others`` says what else the argument takes, for the error."""
    found = None
    if type(value) is int:
        found = value
    elif not isinstance(value, bool) and not (isinstance(value, Tensor) and not _is_one_number(value)):
        with contextlib.suppress(TypeError):
            found = operator.index(value)
    if found is None or (low is not None and found < low) or (high is not None and found >= high):
        expected = "an integer" if low is None else f"an integer >= {low}"
        expected = expected if high is None else f"an integer in [{low}, {high - 1}]"
        raise ValueError(f"{name}: expected {expected}{others}, got {got(value)}")
    return found


def flag(name: str, value: Any, others: str = "") -> bool:
    """``value`` as a bool; numpy's bool counts. ``others`` names what else the caller takes."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name}: expected a bool{others}, got {got(value)}")


def one_of(name: str, value: Any, options: Sequence[str], others: str = "") -> None:
    """Raise unless ``value`` is one of these words. ``others`` says what else the argument takes, for the error."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {tuple(options)}{others}, got {got(value)}")


def function(name: str, value: Any, expected: str = "a callable") -> None:
    """Raise unless ``value`` is callable."""
    if not callable(value):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def path(name: str, value: Any) -> str:
    """A path as a string."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {got(value)}")
    return os.fspath(value)


def shape(name: str, value: Any, expected: str, least: int = 0) -> tuple[int, ...]:
    """``value`` as a tuple of sizes, each at least ``least``."""
    if type(value) is tuple:  # the common case
        for size in value:
            if type(size) is not int or size < least:
                break
        else:
            return value
    row = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not row and not (isinstance(value, np.ndarray) and value.ndim == 1):
        raise ValueError(f"{name}: expected {expected}, got {got(value)}")
    return tuple(integer(name, size, least) for size in value)


def torch_dtype(name: str, value: Any, options: Sequence[torch.dtype]) -> None:
    """Raise unless ``value`` is one of these dtypes."""
    if not isinstance(value, torch.dtype) or value not in options:
        words = ", ".join(str(option).removeprefix("torch.") for option in options)
        raise TypeError(f"{name}: expected one of {words}, got {got(value)}")


def placement(device: Any, dtype: Any) -> tuple[Any, Any]:
    """A device and a floating dtype to move tensors to. None stays None."""
    if device is not None:
        device = torch_device("device", device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating torch.dtype, got {got(dtype)}")
    return device, dtype


def torch_device(name: str, value: Any) -> torch.device:
    """``value`` as a device."""
    if isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f": {error}".partition("\n")[0] if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected a torch.device or the name of one, got {got(value)}{reason}") from error


def real_array(name: str, values: Any, expected: str) -> np.ndarray:
    """Real numbers of any nesting and shape, as float64 on the host."""
    if isinstance(values, Tensor):
        tensor(name, values, expected, readable=True)
        if not values.is_complex() and values.dtype != torch.bool:
            return values.detach().double().cpu().numpy()
    elif isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
        return np.array([number(name, value) for value in values])
    elif not isinstance(values, str | bytes):
        with contextlib.suppress(TypeError, ValueError):  # ragged lists, among others
            array = np.asarray(values)
            if array.dtype.kind in "iuf":
                return array.astype(np.float64, copy=False)
    raise TypeError(f"{name}: expected {expected}, got {got(values)}")


# --- tensors ------------------------------------------------------------------------------------------------


def transformed() -> bool:
    """Whether torch transforms every operation, for a derivative or a batch."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(value: Any) -> bool:
    """Whether it is batched by `torch.vmap`, so that its values cannot be read."""
    while isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
        if is_batchedtensor(value):
            return True
        value = get_unwrapped(value)
    return False


def fake_mode() -> FakeTensorMode | None:
    """The active mode that makes every result a fake tensor; None without one."""
    return _get_dispatch_mode(_TorchDispatchModeKey.FAKE) if _len_torch_dispatch_stack() else None


def traced() -> bool:
    """Whether operations are recorded or watched, by a compiler, a tracer or a mode."""
    return is_compiling() or _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


def has_memory(value: Tensor) -> bool:
    """Whether the elements are in memory.

    A view into freed storage still has a pointer of its own, so the storage's pointer is checked. A tensor of another
    layout has no storage, and torch warns when the pointer of a fake tensor is read.
    """
    try:
        return not isinstance(value, FakeTensor) and value.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def tensor(name: str, value: Any, expected: str = "a tensor", readable: bool = False) -> None:
    """Raise unless ``value`` is a dense tensor with memory.

    ``readable`` also needs values, which fake tensors and those on the meta device do not have.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if is_compiling() or (has_memory(value) and not value.is_nested and not value.is_quantized):
        return
    if readable and (value.is_meta or isinstance(value, FakeTensor)):
        raise ValueError(f"{name}: expected {expected} with values, got {got(value)}")
    if value.is_nested or value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name}: expected {expected} that is dense, got {got(value)}")
    elsewhere = is_wrapper(value) or value.device.type not in ("cpu", "cuda") or transformed()
    if value.numel() > 0 and not elsewhere:
        raise ValueError(f"{name}: expected {expected} whose elements are in memory, got {got(value)} without memory")


def is_wrapper(value: Tensor) -> bool:
    """Whether it has no memory of its own: it holds other tensors, as a sharded one does, or none, as a fake one."""
    return type(value).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def expect_alike(given: Mapping[str, Any], changed: Collection[str] = ()) -> FakeTensorMode | None:
    """The mode in which a call with these arguments gives fake tensors; None without one.

    Raises for a fake tensor of another mode, and for a tensor with values where the mode takes none, since torch's
    error would not name the argument. ``changed`` names what is changed in place, and so must be fake in every mode.
    """
    if is_compiling():
        return None
    modes = {name: maybe_get_fake_mode(value) for name, value in given.items() if isinstance(value, Tensor)}
    cause, mode = "tensors inside FakeTensorMode are", fake_mode()
    if mode is None:
        cause, mode = next(((f"{name} is", own) for name, own in modes.items() if own is not None), ("", None))
    if mode is None:
        return None
    for name, own in modes.items():
        if own is mode or (own is None and mode.allow_non_fake_inputs and name not in changed):
            continue
        what = "" if own is None else ", one of another mode"
        raise ValueError(f"{name}: expected a FakeTensor, as {cause}, got {got(given[name])}{what}")
    return mode
