"""The arguments that operations share: states, counters, coefficients and clips, each checked and parsed once.

The results have the forms that ``torch.library``'s schemas and every backend take. A counter is four numbers, and
perhaps tensors that replace the seed and the step. Coefficients are five floats, or a table ``[5, N]``. A clip is a
tuple of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import arguments
from ..arguments import as_float, got, has_memory, is_batched, is_wrapper, number, traced, transformed

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64)
PREDICTIONS = ("epsilon", "sample", "score", "v", "flow")

Scalar = float | Tensor
Coefficients = tuple[Scalar, Scalar, Scalar, Scalar, Scalar]
IntOrTensor = int | Tensor  # a seed or a step: a number, or an int64 tensor of one element with the number's bits


class DynamicThreshold(NamedTuple):
    """Dynamic thresholding: clips each predicted clean sample to a quantile of its absolute values.

        bound  = quantile(|x0|, ratio), held in [1, max_value]          one for each sample
        result = clip(x0, -bound, bound) / bound

    Attributes:
        ratio: The quantile, in ``[0, 1]``. Between two values it is interpolated linearly.
        max_value: The largest bound, at least 1.

    Source:
        Saharia et al. 2022 (Imagen).
    """

    ratio: float = 0.995
    max_value: float = 1.0


Clip = float | tuple[float, float] | DynamicThreshold | None

Counter = tuple[int, int, int, int, Tensor | None, Tensor | None]
COUNTER = "SymInt seed, SymInt step, SymInt stream, SymInt first_particle, Tensor? seed_tensor, Tensor? step_tensor"
SCALE = "float displacement_scale, Tensor? displacement_scale_tensor"
GUIDANCE = "Tensor? unconditional, float guidance_scale, Tensor? guidance_scale_tensor"
Scalars = tuple[Sequence[float], Tensor | None]  # five floats, or none and a float64 table [5, N]
SCALARS = "float[] coefficients, Tensor? table"


# --- tensors ------------------------------------------------------------------------------------------------


def own(name: str, value: Any, expected: str = "a tensor") -> Tensor:
    """A tensor argument as kernels read it: a plain tensor with memory. A negative view (`torch._neg_view`) is
    copied."""
    compiling = is_compiling()
    if compiling or type(value) is not Tensor or not has_memory(value) or value.is_nested:
        arguments.tensor(name, value, expected)
        if compiling:
            return value
        value = unwrapped(value)
    return value.resolve_neg() if value.is_neg() else value


def unwrapped(value: Tensor) -> Tensor:
    """A plain tensor with the same memory, for a subclass that only adds methods; any other value as it is."""
    if type(value) is Tensor or isinstance(value, torch.nn.Parameter) or is_wrapper(value):
        return value
    return value if is_compiling() else value.as_subclass(Tensor)  # torch.compile handles the subclass itself


def state(name: str, value: Any, like: Tensor | None = None, like_name: str = "x") -> Tensor:
    """A state ``[N, *event]``, of the shape and on the device of ``like``."""
    value = own(name, value)
    if value.dtype not in STATE_DTYPES:
        arguments.torch_dtype(name, value.dtype, STATE_DTYPES)
    if like is None:
        if value.ndim == 0:
            raise ValueError(f"{name}: expected shape [N, *event], got a scalar")
        return value
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, that of {like_name}, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, where {like_name} is, got {value.device}")
    return value


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout(x: Tensor) -> torch.memory_format:
    """The layout of the results of an element-wise operation: channels_last if ``x`` has it, else contiguous."""
    if x.ndim not in _CHANNELS_LAST or x.is_contiguous() or transformed():  # inside a transform torch does not know it
        return torch.contiguous_format
    form = _CHANNELS_LAST[x.ndim]
    return form if x.is_contiguous(memory_format=form) else torch.contiguous_format


def channels_moved(form: torch.memory_format, *tensors: Tensor | None, back: bool = False) -> tuple[Any, ...]:
    """The tensors with the channels as the last dimension, so that a channels_last tensor is contiguous. ``back``
    undoes it."""
    if form is torch.contiguous_format:
        return tensors
    where, to = (-1, 1) if back else (1, -1)
    return tuple(None if t is None else t.movedim(where, to) for t in tensors)


def span(x: Tensor) -> tuple[int, int]:
    """The address of the first byte, and the address after the last byte."""
    if x.numel() == 0:
        return 0, 0
    steps = sum((number - 1) * stride for number, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (steps + 1) * x.element_size()


def out(
    value: Any,
    expected: Sequence[tuple[Sequence[int], torch.dtype]],
    device: torch.device,
    inputs: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...] | None:
    """The argument ``out`` of an operation whose results have the shapes and dtypes ``expected``: a tensor for one
    result, a tuple or list of tensors for several. Kernels write into it while they read the ``inputs``."""
    if value is None:
        return None
    several = isinstance(value, tuple | list)
    tensors = tuple(value) if several else (value,)
    if len(tensors) != len(expected) or several != (len(expected) > 1):
        wanted = f"{len(expected)} tensors, one for each result" if len(expected) > 1 else "a tensor"
        raise TypeError(f"out: expected {wanted}, got {got(value)}")
    checked: list[Tensor] = []
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, expected, strict=True)):
        name = f"out[{i}]" if several else "out"
        arguments.tensor(name, tensor)
        tensor = unwrapped(tensor)
        right = tensor.shape == tuple(shape) and tensor.dtype == dtype and tensor.is_contiguous()
        elsewhere = tensor.device.type != device.type or device.index not in (None, tensor.device.index)
        if not right or elsewhere or tensor.requires_grad or (not is_compiling() and tensor.is_neg()):
            raise ValueError(
                f"{name}: expected a contiguous {dtype} tensor {list(shape)} on {device} that requires no gradient, "
                f"got {got(tensor)}{'' if tensor.is_contiguous() else ', not contiguous'}"
            )
        _expect_writable(name, tensor, (*inputs, *checked))
        checked.append(tensor)
    return tuple(checked)


def _expect_writable(name: str, tensor: Tensor, others: Sequence[Tensor | None]) -> None:
    """Raise where a kernel must not write into ``tensor``, or where it would write into one of ``others``."""
    if not is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: expected a tensor made outside of torch.inference_mode, or a call inside of it")
    if traced() or is_wrapper(tensor) or transformed():  # such tensors have no addresses
        return
    start, end = span(tensor)
    for other in others:
        if other is not None and not is_wrapper(other):
            other_start, other_end = span(other)
            if start < other_end and other_start < end:
                raise ValueError(f"{name}: expected memory of its own, got that of another argument or result")


def not_finite(value: Any, number: int, device: torch.device, others: Sequence[Tensor | None]) -> Tensor | None:
    """The argument ``not_finite`` of an operation: ``number`` flags, one for each input that is checked."""
    if value is None:
        return None
    arguments.tensor("not_finite", value)
    value = unwrapped(value)
    right = value.dtype == torch.int32 and value.shape == (number,) and value.is_contiguous()
    elsewhere = value.device.type != device.type or device.index not in (None, value.device.index)
    if not right or elsewhere or (not is_compiling() and value.is_neg()):
        raise ValueError(
            f"not_finite: expected a contiguous int32 tensor [{number}] on {device}, "
            f"got {got(value)}{'' if value.is_contiguous() else ', not contiguous'}"
        )
    _expect_writable("not_finite", value, others)
    return value


def readable(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device, and outside of tracing."""
    return value.device.type == "cpu" and not (traced() or is_wrapper(value) or is_batched(value))


def index(name: str, indices: Tensor, size: int) -> None:
    """Raise if one of ``indices`` is not in ``[0, size)``. Reads the values."""
    outside = ((indices < 0) | (indices >= size)).flatten().nonzero()
    if len(outside):
        refuse_index(name, indices, size, int(outside[0]))


def refuse_index(name: str, indices: Tensor, size: int, at: int) -> None:
    raise ValueError(f"{name}: expected values in [0, {size}), got {int(indices.flatten()[at])} at {at}")


# --- counters -----------------------------------------------------------------------------------------------


def counter(
    seed: IntOrTensor,
    step: IntOrTensor,
    stream: int,
    first: int,
    shape: Sequence[int],
    device: torch.device,
    first_name: str = "first_particle",
) -> Counter:
    """``seed, step, stream, first_particle, seed_tensor, step_tensor`` for normals of ``shape`` ``[N, *event]``."""
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("stream", stream, 16), (first_name, first, 48)):
        if type(value) is int and 0 <= value < 1 << bits:  # nearly every call; isinstance is slow for a Tensor
            continue
        if isinstance(value, Tensor) and bits in (64, 32):  # its value is not read: that would wait for the device
            arguments.tensor(name, value)
            elsewhere = value.device.type != device.type or device.index not in (None, value.device.index)
            if value.dtype != torch.int64 or value.numel() != 1 or elsewhere:
                raise ValueError(
                    f"{name}: expected an integer, or an int64 tensor of one element on {device}, "
                    f"got {value.dtype} {list(value.shape)} on {value.device}"
                )
        elif not isinstance(value, int) or value is True or value is False or not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {got(value)}")
    particles, elements = shape[0], math.prod(shape[1:])
    if first + particles > 1 << 48 or elements > 1 << 34:
        raise ValueError(
            "shape: expected particles below 2^48 and at most 2^34 elements in each, "
            f"got particles up to {first + particles} of {elements}"
        )
    seed, seed_tensor = (seed, None) if isinstance(seed, int) else (0, seed)
    step, step_tensor = (step, None) if isinstance(step, int) else (0, step)
    return seed, step, stream, first, seed_tensor, step_tensor


def read(seed: int, step: int, seed_tensor: Tensor | None, step_tensor: Tensor | None) -> tuple[int, int]:
    """The seed and the step as numbers. Reads the tensors, if there are any."""
    if seed_tensor is not None:
        seed = int(seed_tensor) & (1 << 64) - 1
    if step_tensor is not None:
        step = int(step_tensor) & (1 << 32) - 1
    return seed, step


# --- coefficients -------------------------------------------------------------------------------------------

_NAMES = {5: ("alpha_t", "sigma_t", "alpha_s", "sigma_s", "tau"), 2: ("alpha", "sigma")}


def scalars(coefficients: Any, x: Tensor, prediction: str, argument: str = "coefficients", count: int = 5) -> Scalars:
    """``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``, or ``(alpha, sigma)``, each a float or a tensor ``[N]``. Values of
    tensors are not checked here: `expect_scalars` checks them when the operation runs."""
    names = _NAMES[count]
    row = type(coefficients) is tuple or isinstance(coefficients, Sequence | np.ndarray)  # the first is quick to tell
    if not row or isinstance(coefficients, str | bytes):
        raise ValueError(f"{argument}: expected {', '.join(names)}, got {got(coefficients)}")
    if len(coefficients) != count:
        raise ValueError(f"{argument}: expected {', '.join(names)}, got {len(coefficients)} values")
    checked: list[Any] = []
    table = False
    for name, value in zip(names, coefficients, strict=True):
        if type(value) is float and 0.0 <= value < math.inf:  # nearly every call; isinstance is slow for a Tensor
            checked.append(value)
            continue
        if not isinstance(value, Tensor):
            checked.append(number(argument, value, low=0.0, what=name))
            continue
        value = own(argument, value)
        checked.append(value)
        table = True
        if value.shape != x.shape[:1] or value.dtype not in STATE_DTYPES or value.device != x.device:
            raise ValueError(
                f"{argument}: expected {name} a float or a floating tensor [{x.shape[0]}] on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if not table:
        _expect_scalars(checked, prediction, argument)
        return tuple(checked), None
    arguments.expect_alike({"x": x} | {f"{argument}[{i}]": c for i, c in enumerate(checked)})
    columns = [
        c.double() if isinstance(c, Tensor) else torch.full(x.shape[:1], c, dtype=torch.float64, device=x.device)
        for c in checked
    ]
    return (), torch.stack(columns)


def expect_scalars(table: Tensor | None, prediction: str, argument: str = "coefficients") -> None:
    """Raise if the values of a table on the CPU are not valid. On a GPU the check would wait for the device."""
    if table is None or not readable(table):
        return
    for name, row in zip(_NAMES[len(table)], table, strict=True):
        if not ((row >= 0.0) & (row < math.inf)).all():
            raise ValueError(f"{argument}: expected a finite {name} >= 0, got {row}")
    _expect_scalars(table.unbind(), prediction, argument)


def _expect_scalars(values: Sequence[Scalar], prediction: str, argument: str) -> None:
    if len(values) == 5:
        alpha, sigma, _, sigma_s, tau = values
        if _any(sigma <= 0.0):
            raise ValueError(f"{argument}: expected sigma_t > 0, got {sigma}")
        if _any(tau > sigma_s * (1 + 1e-6)):
            raise ValueError(f"{argument}: expected tau <= sigma_s = {sigma_s}, got {tau}")
    else:
        alpha, sigma = values
        if prediction in ("v", "flow") and _any(alpha + sigma == 0.0):
            raise ValueError(f"{argument}: expected alpha + sigma > 0, got both 0")
    if prediction in ("epsilon", "score") and _any(alpha == 0.0):
        raise ValueError(f"prediction: {prediction!r} does not determine x_0 where {_NAMES[len(values)][0]} = 0")


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else condition


def unpacked_scalars(coefficients: Sequence[float], table: Tensor | None) -> Coefficients:
    """The coefficients as the references take them."""
    alpha_t, sigma_t, alpha_s, sigma_s, tau = coefficients if table is None else table.unbind()
    return alpha_t, sigma_t, alpha_s, sigma_s, tau


def per_sample(name: str, value: Any, x: Tensor) -> tuple[float, Tensor | None]:
    """A finite number and None, or 1 and a float64 tensor ``[N]``. Values of tensors are checked on the CPU only."""
    if type(value) is float and -math.inf < value < math.inf:  # nearly every call; isinstance is slow for a Tensor
        return value, None
    if not isinstance(value, Tensor):
        return number(name, value, others=f" or a tensor [{x.shape[0]}]"), None
    value = own(name, value)
    fits = value.ndim == 0 or value.shape == x.shape[:1]  # not with `in`: it compares symbolic sizes by identity
    if not fits or not value.is_floating_point() or value.device != x.device:
        raise ValueError(
            f"{name}: expected a number or a floating tensor [{x.shape[0]}] on {x.device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )
    arguments.expect_alike({"x": x, name: value})
    if readable(value) and not transformed() and not torch.isfinite(value).all():
        raise ValueError(f"{name}: expected finite values, got {value}")
    return 1.0, value.double().expand(x.shape[0])


def guidance(unconditional: Any, scale: Any, x: Tensor) -> tuple[Tensor | None, float, Tensor | None]:
    """The unconditional output and the guidance scale in the form of `GUIDANCE`: both, or None and the scale 1."""
    if (unconditional is None) != (scale is None):
        given, missing = ("unconditional", "guidance_scale")[:: 1 if scale is None else -1]
        raise ValueError(f"{missing}: expected a value together with {given}, got None")
    if unconditional is None:
        return None, 1.0, None
    return state("unconditional", unconditional, x), *per_sample("guidance_scale", scale, x)


def unpacked(number: float, tensor: Tensor | None) -> Scalar:
    """The number or the tensor that `per_sample` got: the inverse of `per_sample`."""
    return number if tensor is None else tensor


def address(number: float, tensor: Tensor | None) -> float | int:
    """The same in the form that the cpu kernels take. ``tensor`` must be contiguous."""
    return number if tensor is None else tensor.data_ptr()


# --- clips --------------------------------------------------------------------------------------------------


def clip(value: Any) -> tuple[float, ...]:
    """``()``, ``(low, high)``, or ``(ratio, max_value, 0)`` of a `DynamicThreshold`."""
    if value is None:
        return ()
    if type(value) is float and value > 0.0:
        return (-value, value)
    if isinstance(value, DynamicThreshold):
        ratio, most = map(as_float, value)
        if ratio is None or most is None or not (0.0 <= ratio <= 1.0 and most >= 1.0):
            raise ValueError(f"clip: expected 0 <= ratio <= 1 and max_value >= 1, got {got(value)}")
        return (ratio, most, 0.0)
    bounds = tuple(map(as_float, value if isinstance(value, tuple) else (0.0, value)))  # 0: a number must be above it
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or not bounds[0] < bounds[1]:
        raise ValueError(
            f"clip: expected a number > 0, (low, high) with low < high, or a DynamicThreshold, got {got(value)}"
        )
    return (bounds[0], bounds[1]) if isinstance(value, tuple) else (-bounds[1], bounds[1])


def unpacked_clip(value: Sequence[float]) -> Clip:
    """The clip as the references take it."""
    if not value:
        return None
    return DynamicThreshold(*value[:2]) if len(value) == 3 else (value[0], value[1])


def codes(value: Sequence[float]) -> tuple[int, float, float]:
    """The clip as the cpu kernels take it: its code and two numbers."""
    return len(value) and len(value) - 1, value[0] if value else 0.0, value[1] if value else 0.0
