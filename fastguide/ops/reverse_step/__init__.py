"""One step from a noise level to a lower one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import flag, got, one_of
from .. import _arguments, _native
from .._arguments import COUNTER, GUIDANCE, PREDICTIONS, SCALARS, SCALE, Clip, Coefficients, IntOrTensor, Scalar
from .._operation import UNUSUAL, Operation, plain, tell_autograd, writable
from . import reference

_NONE = type(None)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    *,
    prediction: str = "epsilon",
    unconditional: Tensor | None = None,
    guidance_scale: Scalar | None = None,
    clip: Clip = None,
    clip_noise: bool = True,
    displacement: Tensor | None = None,
    displacement_scale: Scalar = 1.0,
    seed: IntOrTensor = 0,
    step: IntOrTensor = 0,
    stream: int = 0,
    first_particle: int = 0,
    return_x0: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    not_finite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Steps from noise level ``t`` to the lower level ``s``, in one pass over memory.

        guided  = unconditional + guidance_scale (model_output - unconditional)
        x0_hat  = clip(p x + q guided)               p and q as in `predict_x0`
        eps_hat = (x - alpha_t x0_hat) / sigma_t
        x_s     = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + displacement_scale displacement + tau z

    Without ``unconditional``, ``guided`` is ``model_output``. DDIM, DDPM, Euler and Euler-ancestral differ only in
    ``tau``; ``tau = 0`` is DDIM. The arithmetic is in float32, or in float64 where ``x`` is float64. Results are
    differentiable in all tensors.

    The noise ``z`` is `randn` of the seed, step, stream and first particle. Calls that leave these at their defaults
    all draw the same noise. Nothing is drawn where ``tau = 0``.

    Args:
        x: The state at level ``t``, ``[N, *event]``: float32, float16, bfloat16 or float64.
        model_output: The network's output at level ``t``, with the shape and device of ``x`` and any of these dtypes.
        coefficients: ``(alpha_t, sigma_t, alpha_s, sigma_s, tau)``, each a finite number >= 0 or a floating tensor
            ``[N]``, with ``sigma_t > 0`` and ``tau <= sigma_s``. Values on a GPU are not checked. ``torch.compile``
            compiles again for each new number, and only once for tensors.
        prediction: What the network predicts, as in `predict_x0`. ``"epsilon"`` and ``"score"`` need ``alpha_t > 0``.
        unconditional: The output without the condition, like ``model_output``. Needs ``guidance_scale``.
        guidance_scale: The scale of classifier-free guidance, as in `predict_x0`. Needs ``unconditional``.
        clip: The range of ``x0_hat``: a number ``c > 0`` for ``[-c, c]``, a tuple ``(low, high)``, a
            `DynamicThreshold`, or None for no clip.
        clip_noise: Whether ``eps_hat`` is computed from the clipped ``x0_hat``. False computes it from the unclipped
            one, as DDIM of diffusers does by default.
        displacement: What is added to the mean, like ``model_output``: usually a guidance gradient.
        displacement_scale: A finite number, or a floating tensor ``[]`` or ``[N]``. Must be 1 without a displacement.
        seed: Seed of the noise, as in `randn`.
        step: Sampling step of the noise, as in `randn`.
        stream: Stream of the noise, as in `randn`.
        first_particle: Global index of the first particle, as in `randn`.
        return_x0: Whether to return the clipped ``x0_hat`` too.
        out: A tensor for ``x_s``, or with ``return_x0`` a tuple of two tensors, as in `randn`.
        not_finite: A contiguous int32 tensor ``[4]`` of flags for ``x``, ``model_output``, ``displacement`` and
            ``unconditional``, in this order. A flag becomes 1 if its tensor has a NaN or an infinite value in the dtype
            of the arithmetic; otherwise it stays as it is. Nothing waits for the device. Kernels check the values that
            they read anyway. The reference, and calls with a gradient or under ``torch.compile``, need an extra pass
            over memory. The flags must share no memory with another argument or a result.
        backend: As in `randn`.

    Returns:
        ``x_s``, or ``(x_s, x0_hat)`` with ``return_x0``. Both are ``[N, *event]`` in the dtype and layout (contiguous
            or channels_last) of ``x``.

    Raises:
        TypeError: A tensor has an unsupported dtype, or an argument is not a tensor, number or bool where one is
            expected.
        ValueError: Shapes or devices differ, a value is out of range, only one of ``unconditional`` and
            ``guidance_scale`` is given, or ``out`` is given for a result that has a gradient.
        RuntimeError: The named backend cannot serve the call.

    Source:
        Song, Meng, Ermon 2021 (DDIM), eq. 12; Ho & Salimans 2021 for classifier-free guidance.
    """
    bounds = () if clip is None else _arguments.clip(clip)
    if not bounds and clip_noise is False:
        clip_noise = True  # without a clip both values mean the same
    ordinary = type(backend) is str and backend == "auto" and type(coefficients) is tuple
    ordinary = ordinary and type(displacement_scale) is float
    given = (x, model_output) if displacement is None else (x, model_output, displacement)
    results: Any = None
    if out is not_finite is unconditional is guidance_scale is None:  # the other branch takes a tenth of a small step
        ordinary = ordinary and plain(*given)
    elif ordinary and type(guidance_scale) is (_NONE if unconditional is None else float):
        given = given if unconditional is None else (*given, unconditional)
        results = out if out is None or (return_x0 is True and type(out) is tuple) else (out,)
        like = (x, x) if return_x0 is True else (x,)
        ordinary = plain(*given, *(results or ())) and writable(results, like, not_finite, 4, given)
    else:
        ordinary = False
    if ordinary and x.is_cpu and (displacement is not None or displacement_scale == 1.0):
        try:
            x_s, x0 = _launch(
                x, model_output, coefficients, prediction, unconditional,
                1.0 if guidance_scale is None else guidance_scale, bounds, clip_noise, displacement,
                displacement_scale, seed, step, stream, first_particle, return_x0, out=results, not_finite=not_finite,
            )  # fmt: skip
            if out is not not_finite:  # unless both are None
                tell_autograd(results, not_finite)
            return ((x_s, x0) if return_x0 else x_s) if out is None else out
        except UNUSUAL:
            pass
    ordinary = ordinary and not x.is_cpu
    if not ordinary:
        x = _arguments.state("x", x)
        model_output = _arguments.state("model_output", model_output, x)
        displacement = None if displacement is None else _arguments.state("displacement", displacement, x)
    scale = _arguments.per_sample("displacement_scale", displacement_scale, x)
    if displacement is None and scale != (1.0, None):
        raise ValueError(f"displacement_scale: expected 1 without a displacement, got {got(displacement_scale)}")
    one_of("prediction", prediction, PREDICTIONS)
    unconditional, number, guidance = _arguments.guidance(unconditional, guidance_scale, x)
    clip_noise, return_x0 = flag("clip_noise", clip_noise), flag("return_x0", return_x0)
    scalars = _arguments.scalars(coefficients, x, prediction)
    counter = _arguments.counter(seed, step, stream, first_particle, x.shape, x.device)
    ordinary = ordinary and scalars[1] is counter[4] is counter[5] is None  # numbers alone
    # Results keep a channels_last layout. Noise depends on the index of an element, so a noisy step needs contiguous
    # states and a copy back; a step without noise reads the layout as it is, in one pass.
    form = moved = torch.contiguous_format
    if not ordinary:
        form = _arguments.layout(x) if out is None else form
        noisy = scalars[1] is not None or scalars[0][-1] > 0.0
        moved = moved if noisy else form
        x, model_output, unconditional, displacement = _arguments.channels_moved(
            moved, x, model_output, unconditional, displacement
        )
        inputs = x, model_output, unconditional, guidance, displacement, scale[1], *counter[-2:]
        results = _arguments.out(out, ((x.shape, x.dtype),) * (1 + return_x0), x.device, inputs)
        not_finite = _arguments.not_finite(not_finite, 4, x.device, (*inputs, *(results or ())))
    x_s, x0 = _reverse_step(
        backend, x, model_output, *scalars, prediction, unconditional, number, guidance, bounds, clip_noise,
        displacement, *scale, *counter, return_x0,
        out=results, not_finite=not_finite, ordinary=ordinary,
    )  # fmt: skip
    if out is not None:
        return out
    if ordinary:
        return (x_s, x0) if return_x0 else x_s
    x_s, x0 = _arguments.channels_moved(moved, x_s, x0 if return_x0 else None, back=True)
    x_s = x_s.contiguous(memory_format=form)
    return (x_s, x0.contiguous(memory_format=form)) if return_x0 else x_s


def _reference(
    x, model_output, coefficients, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    clip, clip_noise, displacement, displacement_scale, displacement_scale_tensor,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0,
):  # fmt: skip
    _arguments.expect_scalars(table, prediction)
    results = reference.reverse_step(
        x,
        model_output,
        _arguments.unpacked_scalars(coefficients, table),
        prediction=prediction,
        unconditional=unconditional,
        guidance_scale=_arguments.unpacked(guidance_scale, guidance_scale_tensor),
        clip=_arguments.unpacked_clip(clip),
        clip_noise=clip_noise,
        displacement=displacement,
        displacement_scale=_arguments.unpacked(displacement_scale, displacement_scale_tensor),
        seed=seed if seed_tensor is None else seed_tensor,
        step=step if step_tensor is None else step_tensor,
        stream=stream,
        first_particle=first_particle,
        return_x0=return_x0,
    )
    return results if return_x0 else (results, None)


# The codes of csrc/common/step.h.
_PREDICTIONS = {name: code for code, name in enumerate(PREDICTIONS)}


def _cpu(
    x, model_output, coefficients, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    clip, clip_noise, displacement, displacement_scale, displacement_scale_tensor,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0, out=None, not_finite=None,
):  # fmt: skip
    _arguments.expect_scalars(table, prediction)
    tensors = [
        None if tensor is None else tensor.contiguous()
        for tensor in (x, model_output, unconditional, displacement, guidance_scale_tensor, displacement_scale_tensor)
    ]
    return _launch(
        *tensors[:2],
        coefficients if table is None else table.data_ptr(),
        prediction,
        tensors[2],
        _arguments.address(guidance_scale, tensors[4]),
        clip,
        clip_noise,
        tensors[3],
        _arguments.address(displacement_scale, tensors[5]),
        *_arguments.read(seed, step, seed_tensor, step_tensor),
        stream,
        first_particle,
        return_x0,
        out=out,
        not_finite=not_finite,
    )


def _launch(
    x, model_output, coefficients, prediction, unconditional, guidance_scale, clip, clip_noise, displacement,
    displacement_scale, seed, step, stream, first_particle, return_x0, out=None, not_finite=None,
):  # fmt: skip
    """Call the kernel. Tensors must be contiguous; coefficients and scales are numbers or addresses of columns."""
    x_s = torch.empty_like(x) if out is None else out[0]
    x0 = (torch.empty_like(x) if out is None else out[1]) if return_x0 else None
    kind, low, high = _arguments.codes(clip) if clip else (0, 0.0, 0.0)
    _native.module("cpu").reverse_step(
        x.data_ptr(),
        _native.CPU_DTYPES[x.dtype],
        model_output.data_ptr(),
        _native.CPU_DTYPES[model_output.dtype],
        None if displacement is None else displacement.data_ptr(),
        0 if displacement is None else _native.CPU_DTYPES[displacement.dtype],
        x_s.data_ptr(),
        None if x0 is None else x0.data_ptr(),
        return_x0,
        None if not_finite is None else not_finite.data_ptr(),
        _PREDICTIONS[prediction],
        None if unconditional is None else unconditional.data_ptr(),
        0 if unconditional is None else _native.CPU_DTYPES[unconditional.dtype],
        guidance_scale,
        kind,
        low,
        high,
        clip_noise,
        coefficients,
        displacement_scale,
        x.shape,
        seed,
        step,
        stream,
        first_particle,
        torch.get_num_threads(),
    )
    return x_s, x0


def _fake(
    x, model_output, coefficients, table, prediction, unconditional, guidance_scale, guidance_scale_tensor,
    clip, clip_noise, displacement, displacement_scale, displacement_scale_tensor,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0,
):  # fmt: skip
    x_s = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_s, torch.empty_like(x_s) if return_x0 else x.new_empty(0)


def _vjp(args, results, grads, needed):
    """The derivative by its formula, which needs no noise."""
    if {"table", "guidance_scale_tensor", "displacement_scale_tensor"} & set(needed):
        return None
    x, model_output, coefficients, table, prediction, unconditional, *guidance = args[:8]
    clip, clip_noise, displacement, *scale = args[8:13]
    grad_x_s, grad_x0 = grads
    if grad_x_s is None:
        grad_x_s = torch.zeros_like(x)
    grad_x, grad_output, grad_unconditional = reference.reverse_step_vjp(
        grad_x_s,
        grad_x0 if args[-1] else None,
        x,
        model_output,
        _arguments.unpacked_scalars(coefficients, table),
        prediction,
        _arguments.unpacked_clip(clip),
        clip_noise,
        unconditional,
        _arguments.unpacked(*guidance),
    )
    found = {"x": grad_x, "model_output": grad_output, "unconditional": grad_unconditional}
    if "displacement" in needed:
        found["displacement"] = reference.displaced(grad_x_s, _arguments.unpacked(*scale)).to(displacement.dtype)
    return found


_reverse_step = Operation(
    f"reverse_step(Tensor x, Tensor model_output, {SCALARS}, str prediction, {GUIDANCE}, float[] clip, "
    f"bool clip_noise, Tensor? displacement, {SCALE}, {COUNTER}, bool return_x0) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": "fastguide.ops.reverse_step.triton:call"},
    differentiable=True,
    vjp=_vjp,
    watched=("x", "model_output", "displacement", "unconditional"),
)
