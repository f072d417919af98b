"""The predicted clean sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import one_of
from .. import _arguments, _native
from .._arguments import GUIDANCE, PREDICTIONS, Scalar
from .._operation import UNUSUAL, Operation, plain, tell_autograd, writable
from . import reference

_NONE = type(None)


def predict_x0(
    x: Tensor,
    model_output: Tensor,
    levels: tuple[Scalar, Scalar],
    *,
    prediction: str,
    unconditional: Tensor | None = None,
    guidance_scale: Scalar | None = None,
    out: Tensor | None = None,
    not_finite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Predicts the clean sample ``x0_hat = E[x_0 | x_t]`` from a network's output, with classifier-free guidance.

        x_t    = alpha x_0 + sigma eps
        guided = unconditional + guidance_scale (model_output - unconditional)
        x0_hat = p x + q guided          p and q depend on the prediction type and the levels

    The forward pass and the backward pass each take one pass over memory. The arithmetic is in float32, or in float64
    where ``x`` is float64. Results are differentiable in all tensors.

    Args:
        x: The noisy state ``x_t``, ``[N, *event]``: float32, float16, bfloat16 or float64.
        model_output: The network's output, with the shape and device of ``x`` and any of these dtypes.
        levels: ``(alpha, sigma)``, each a finite number >= 0 or a floating tensor ``[N]``. Values on a GPU are not
            checked.
        prediction: What the network predicts: ``"epsilon"`` is ``eps``, ``"sample"`` is ``x_0``, ``"score"`` is
            ``-eps / sigma``, ``"v"`` is ``alpha eps - sigma x_0`` and ``"flow"`` is ``eps - x_0``. ``"epsilon"`` and
            ``"score"`` need ``alpha > 0``; ``"v"`` and ``"flow"`` need ``alpha + sigma > 0``.
        unconditional: The output without the condition, like ``model_output``. Needs ``guidance_scale``.
        guidance_scale: A finite number, or a floating tensor ``[]`` or ``[N]``. 1 gives ``model_output``, 0 gives
            ``unconditional``. Needs ``unconditional``.
        out: A tensor for the result, as in `randn`.
        not_finite: A contiguous int32 tensor ``[2]`` of flags for ``model_output`` and ``unconditional``, as in
            `reverse_step`.
        backend: As in `randn`.

    Returns:
        ``x0_hat`` ``[N, *event]`` in the dtype and layout (contiguous or channels_last) of ``x``. It shares no memory
            with the arguments.

    Raises:
        TypeError: A tensor has an unsupported dtype, or an argument is not a tensor or a number where one is expected.
        ValueError: Shapes or devices differ, a value is out of range, only one of ``unconditional`` and
            ``guidance_scale`` is given, or ``out`` is given for a result that has a gradient.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Tweedie's formula; Ho & Salimans 2021 for classifier-free guidance.
    """
    given = (x, model_output) if unconditional is None else (x, model_output, unconditional)
    results: Any = None if out is None else (out,)
    ordinary = type(backend) is str and backend == "auto" and type(levels) is tuple
    ordinary = ordinary and type(guidance_scale) is (_NONE if unconditional is None else float)
    ordinary = ordinary and plain(*given, *(results or ())) and writable(results, (x,), not_finite, 2, given)
    if ordinary and x.is_cpu:
        try:
            number = 1.0 if guidance_scale is None else guidance_scale
            x0 = _cpu(
                x, model_output, levels, None, prediction, unconditional, number, None,
                out=results, not_finite=not_finite,
            )  # fmt: skip
            tell_autograd(results, not_finite)
            return x0
        except UNUSUAL:
            pass
    ordinary = ordinary and not x.is_cpu
    if not ordinary:
        x = _arguments.state("x", x)
        model_output = _arguments.state("model_output", model_output, x)
    one_of("prediction", prediction, PREDICTIONS)
    unconditional, number, scale = _arguments.guidance(unconditional, guidance_scale, x)
    values = _arguments.scalars(levels, x, prediction, "levels", 2)
    form, ordinary = torch.contiguous_format, ordinary and values[1] is None
    if not ordinary:
        form = _arguments.layout(x) if out is None else form
        x, model_output, unconditional = _arguments.channels_moved(form, x, model_output, unconditional)
        inputs = x, model_output, values[1], unconditional, scale
        results = _arguments.out(out, ((x.shape, x.dtype),), x.device, inputs)
        not_finite = _arguments.not_finite(not_finite, 2, x.device, (*inputs, *(results or ())))
    x0 = _predict_x0(
        backend, x, model_output, *values, prediction, unconditional, number, scale,
        out=results, not_finite=not_finite, ordinary=ordinary,
    )  # fmt: skip
    return _arguments.channels_moved(form, x0, back=True)[0] if out is None else out


def _unpacked(levels, table, guidance_scale, guidance_scale_tensor):
    """Levels and scale as the references take them."""
    scale = guidance_scale if guidance_scale_tensor is None else guidance_scale_tensor
    return tuple(levels if table is None else table.unbind()), scale


def _reference(
    x, model_output, levels, table, prediction, unconditional, guidance_scale, guidance_scale_tensor
):  # fmt: skip
    _arguments.expect_scalars(table, prediction, "levels")
    levels, scale = _unpacked(levels, table, guidance_scale, guidance_scale_tensor)
    return reference.predict_x0(
        x,
        model_output,
        levels,
        prediction=prediction,
        unconditional=unconditional,
        guidance_scale=scale,
    )


# The codes of csrc/common/step.h.
_PREDICTIONS = {name: code for code, name in enumerate(PREDICTIONS)}


def _conversion(x, levels, table, prediction, guidance_scale, guidance_scale_tensor):
    """The numbers of a call as both kernels take them, and the tensors that must outlive the kernel."""
    scale = None if guidance_scale_tensor is None else guidance_scale_tensor.contiguous()
    numbers = (
        _PREDICTIONS[prediction],
        tuple(levels) if table is None else table.data_ptr(),
        guidance_scale if scale is None else scale.data_ptr(),
        x.shape[0],
        x.numel() // max(1, x.shape[0]),
        torch.get_num_threads(),
    )
    return numbers, (table, scale)


def _tensor(tensor, like):
    """Address and dtype code of a tensor. For None the dtype has no meaning."""
    if tensor is None:
        return None, _native.CPU_DTYPES[like.dtype]
    return tensor.data_ptr(), _native.CPU_DTYPES[tensor.dtype]


def _cpu(
    x, model_output, levels, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    out=None, not_finite=None,
):  # fmt: skip
    _arguments.expect_scalars(table, prediction, "levels")
    x, model_output = x.contiguous(), model_output.contiguous()
    unconditional = None if unconditional is None else unconditional.contiguous()
    x0 = torch.empty_like(x) if out is None else out[0]
    numbers, _alive = _conversion(x, levels, table, prediction, guidance_scale, guidance_scale_tensor)
    tensors = (part for tensor in (x, model_output, unconditional, x0) for part in _tensor(tensor, x))
    flags = None if not_finite is None else not_finite.data_ptr()
    _native.module("cpu").predict_x0(*tensors, flags, *numbers)
    return x0


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _vjp(args, results, grads, needed):
    """The gradients by one pass of the backward kernel. The reference serves those in the levels and the scale."""
    x, model_output, levels, table, prediction, unconditional, *scale = args
    if grads[0] is None:
        return {}
    if "table" in needed or "guidance_scale_tensor" in needed:
        return None
    dtypes = (
        x.dtype if "x" in needed and prediction != "sample" else None,
        model_output.dtype if "model_output" in needed else None,
        unconditional.dtype if "unconditional" in needed else None,
    )
    found = _predict_x0_backward("auto", grads[0], levels, table, prediction, *scale, *dtypes)
    names = ("x", "model_output", "unconditional")
    return {name: grad for name, grad, dtype in zip(names, found, dtypes, strict=True) if dtype is not None}


_predict_x0 = Operation(
    f"predict_x0(Tensor x, Tensor model_output, float[] levels, Tensor? table, str prediction, {GUIDANCE}) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": "fastguide.ops.predict_x0.triton:call"},
    differentiable=True,
    vjp=_vjp,
    watched=("model_output", "unconditional"),
)


# --- the backward pass ----------------------------------------------------------------------------------------
# Gradients in x, model_output and unconditional, each in the dtype given. A dtype of None means no gradient.


def _backward_reference(
    grad, levels, table, prediction, guidance_scale, guidance_scale_tensor, x_dtype, output_dtype, unconditional_dtype
):
    levels, scale = _unpacked(levels, table, guidance_scale, guidance_scale_tensor)
    found = reference.predict_x0_vjp(grad, levels, prediction, scale)
    dtypes = (x_dtype, output_dtype, unconditional_dtype)
    return tuple(
        None if dtype is None else value.to(dtype).contiguous() for value, dtype in zip(found, dtypes, strict=True)
    )


def _empty_gradients(grad, *dtypes):
    return [None if d is None else torch.empty(grad.shape, dtype=d, device=grad.device) for d in dtypes]


def _backward_cpu(
    grad, levels, table, prediction, guidance_scale, guidance_scale_tensor, x_dtype, output_dtype, unconditional_dtype
):
    grad = grad.contiguous()
    found = _empty_gradients(grad, x_dtype, output_dtype, unconditional_dtype)
    numbers, _alive = _conversion(grad, levels, table, prediction, guidance_scale, guidance_scale_tensor)
    tensors = (part for tensor in (grad, *found) for part in _tensor(tensor, grad))
    _native.module("cpu").predict_x0_backward(*tensors, *numbers)
    return tuple(found)


def _backward_fake(
    grad, levels, table, prediction, guidance_scale, guidance_scale_tensor, x_dtype, output_dtype, unconditional_dtype
):
    found = _empty_gradients(grad, x_dtype, output_dtype, unconditional_dtype)
    return tuple(grad.new_empty(0) if value is None else value for value in found)


_predict_x0_backward = Operation(
    "predict_x0_backward(Tensor grad, float[] levels, Tensor? table, str prediction, float guidance_scale, "
    "Tensor? guidance_scale_tensor, ScalarType? x_dtype, ScalarType? output_dtype, ScalarType? unconditional_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    kernels={"cpu": _backward_cpu, "triton": "fastguide.ops.predict_x0.triton:backward"},
    differentiable=True,
)
