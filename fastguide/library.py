"""The operations as ``torch.ops.fastguide.*``, so that ``torch.compile`` and fake tensors see one operator each.

Defined with ``torch.library``'s define and impl (``custom_op`` costs five times as much a call). The public functions
of `fastguide.ops` come here while a graph is traced; the implementations go back to them with real tensors.

Schemas know no unions, so coefficients travel as five floats and, where any of them is per sample, a float64 table
``[N, 5]`` in their place; the clip as ``[]``, ``[low, high]`` or ``[ratio, max_value, 0]`` (dynamic threshold).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .reference import Clip, Coefficients, Counted, DynamicThreshold

Counter = tuple[Counted, Counted, int, int]  # seed, step, stream, first_particle or first_row

_library = torch.library.Library("fastguide", "DEF")

_COUNTER = "SymInt seed, SymInt step, SymInt stream, SymInt first_particle, Tensor? seed_tensor, Tensor? step_tensor"
for schema in (
    f"randn(SymInt[] shape, {_COUNTER}, ScalarType dtype, Device device, str backend) -> Tensor",
    "reverse_step(Tensor x, Tensor model_output, float[] coefficients, Tensor? table, str prediction, float[] clip, "
    f"bool clip_noise, Tensor? displacement, {_COUNTER}, bool return_x0, str backend) -> (Tensor, Tensor)",
    "propose_and_weigh(Tensor x, Tensor x0_hat, Tensor displacement, Tensor log_weights, float[] coefficients, "
    f"Tensor? table, {_COUNTER}, str backend) -> (Tensor, Tensor)",
    "resample(Tensor log_weights, str scheme, SymInt num, float? ess_threshold, SymInt seed, SymInt step, "
    "SymInt stream, SymInt first_row, Tensor? seed_tensor, Tensor? step_tensor, bool sorted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "gather_particles_(Tensor ancestors, Tensor(a!)[] states, str backend) -> ()",
    "log_prob_and_gradient(Tensor z, Tensor y, str family, float scale, float? df, float background, Tensor? added, "
    "Tensor? rows, str backend) -> (Tensor, Tensor)",
):
    _library.define(schema)


def _pack(coefficients: Coefficients, x: Tensor) -> tuple[list[float], Tensor | None]:
    if not any(isinstance(c, Tensor) for c in coefficients):
        return [float(c) for c in coefficients], None
    columns = [
        c.double() if isinstance(c, Tensor) else torch.full((x.shape[0],), c, dtype=torch.float64, device=x.device)
        for c in coefficients
    ]
    return [], torch.stack(columns, dim=1)


def _unpack(coefficients: list[float], table: Tensor | None) -> Any:
    return tuple(coefficients) if table is None else tuple(table.unbind(1))


def _pack_clip(clip: Clip) -> list[float]:
    if clip is None:
        return []
    if isinstance(clip, DynamicThreshold):
        return [clip.ratio, clip.max_value, 0.0]
    return list(clip) if isinstance(clip, tuple) else [-clip, clip]


def _unpack_clip(clip: list[float]) -> Clip:
    if not clip:
        return None
    return DynamicThreshold(*clip[:2]) if len(clip) == 3 else (clip[0], clip[1])


def _pack_counter(seed: Counted, step: Counted, *rest: int) -> tuple[Any, ...]:
    """A seed or a step that is a tensor in a place of its own; a schema's int is signed."""
    numbers = [0 if isinstance(value, Tensor) else value for value in (seed, step)]
    tensors = [value if isinstance(value, Tensor) else None for value in (seed, step)]
    return numbers[0] - (1 << 64) if numbers[0] >= 1 << 63 else numbers[0], numbers[1], *rest, *tensors


def _unpack_counter(seed: int, step: int, seed_tensor: Tensor | None, step_tensor: Tensor | None) -> dict[str, Counted]:
    return dict(
        seed=seed & (1 << 64) - 1 if seed_tensor is None else seed_tensor,
        step=step if step_tensor is None else step_tensor,
    )


# --- randn --------------------------------------------------------------------------------------------------


def call_randn(
    shape: Sequence[int],
    counter: Counter,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    return torch.ops.fastguide.randn(shape, *_pack_counter(*counter), dtype, device, backend)


def _randn(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device, backend):
    return ops.randn(
        shape,
        **_unpack_counter(seed, step, seed_tensor, step_tensor),
        stream=stream,
        first_particle=first_particle,
        dtype=dtype,
        device=device,
        backend=backend,
    )


def _randn_fake(shape, seed, step, stream, first_particle, seed_tensor, step_tensor, dtype, device, backend):
    return torch.empty(shape, dtype=dtype, device=device)


# --- reverse_step -------------------------------------------------------------------------------------------


def call_reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    prediction: str,
    clip: Clip,
    clip_noise: bool,
    displacement: Tensor | None,
    counter: Counter,
    return_x0: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    values, table = _pack(coefficients, x)
    return torch.ops.fastguide.reverse_step(
        x, model_output, values, table, prediction, _pack_clip(clip), clip_noise, displacement,
        *_pack_counter(*counter), return_x0, backend,
    )  # fmt: skip


def _reverse_step(
    x, model_output, coefficients, table, prediction, clip, clip_noise, displacement,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0, backend,
):  # fmt: skip
    out = ops.reverse_step(
        x,
        model_output,
        _unpack(coefficients, table),
        prediction=prediction,
        clip=_unpack_clip(clip),
        clip_noise=clip_noise,
        displacement=displacement,
        **_unpack_counter(seed, step, seed_tensor, step_tensor),
        stream=stream,
        first_particle=first_particle,
        return_x0=return_x0,
        backend=backend,
    )
    return out if return_x0 else (out, x.new_empty(0))


def _reverse_step_fake(
    x, model_output, coefficients, table, prediction, clip, clip_noise, displacement,
    seed, step, stream, first_particle, seed_tensor, step_tensor, return_x0, backend,
):  # fmt: skip
    x_s = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_s, torch.empty_like(x_s) if return_x0 else x.new_empty(0)


def _reverse_step_setup(ctx, inputs, output):
    x, model_output, coefficients, table, prediction, clip, clip_noise, displacement = inputs[:8]
    ctx.save_for_backward(x, model_output, table)
    ctx.coefficients, ctx.prediction, ctx.clip, ctx.clip_noise = coefficients, prediction, clip, clip_noise
    ctx.displacement_dtype = None if displacement is None else displacement.dtype
    ctx.return_x0 = inputs[14]


def _reverse_step_backward(ctx, grad_x_s, grad_x0):
    x, model_output, table = ctx.saved_tensors
    # The operator has no derivative of its own: where one is asked for, torch follows the formula.
    vjp = _reverse_step_vjp if torch.is_grad_enabled() else torch.ops.fastguide.reverse_step_backward
    grad_x, grad_output = vjp(
        grad_x_s,
        grad_x0 if ctx.return_x0 else None,
        x,
        model_output,
        ctx.coefficients,
        table,
        ctx.prediction,
        ctx.clip,
        ctx.clip_noise,
    )
    grad_displacement = None if ctx.displacement_dtype is None else grad_x_s.to(ctx.displacement_dtype)
    return grad_x, grad_output, *(None,) * 5, grad_displacement, *(None,) * 8


_library.define(
    "reverse_step_backward(Tensor grad_x_s, Tensor? grad_x0, Tensor x, Tensor model_output, float[] coefficients, "
    "Tensor? table, str prediction, float[] clip, bool clip_noise) -> (Tensor, Tensor)"
)


def _reverse_step_vjp(grad_x_s, grad_x0, x, model_output, coefficients, table, prediction, clip, clip_noise):
    return reference.reverse_step_vjp(
        grad_x_s, grad_x0, x, model_output, _unpack(coefficients, table), prediction, _unpack_clip(clip), clip_noise
    )


def _reverse_step_vjp_fake(grad_x_s, grad_x0, x, model_output, coefficients, table, prediction, clip, clip_noise):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(model_output, memory_format=contiguous)


# --- propose_and_weigh --------------------------------------------------------------------------------------


def call_propose_and_weigh(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    coefficients: Coefficients,
    counter: Counter,
    backend: str,
) -> tuple[Tensor, Tensor]:
    values, table = _pack(coefficients, x)
    return torch.ops.fastguide.propose_and_weigh(
        x, x0_hat, displacement, log_weights, values, table, *_pack_counter(*counter), backend
    )


def _propose_and_weigh(
    x,
    x0_hat,
    displacement,
    log_weights,
    coefficients,
    table,
    seed,
    step,
    stream,
    first_particle,
    seed_tensor,
    step_tensor,
    backend,
):
    return ops.propose_and_weigh(
        x,
        x0_hat,
        displacement,
        log_weights,
        _unpack(coefficients, table),
        **_unpack_counter(seed, step, seed_tensor, step_tensor),
        stream=stream,
        first_particle=first_particle,
        backend=backend,
    )


def _propose_and_weigh_fake(x, x0_hat, displacement, log_weights, *_):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(log_weights, memory_format=contiguous)


# --- resample -----------------------------------------------------------------------------------------------


def call_resample(
    log_weights: Tensor,
    scheme: str,
    num: int | None,
    ess_threshold: float | None,
    counter: Counter,
    sorted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    number = log_weights.shape[-1] if num is None else num
    return torch.ops.fastguide.resample(
        log_weights, scheme, number, ess_threshold, *_pack_counter(*counter), sorted, backend
    )


def _resample(
    log_weights, scheme, num, ess_threshold, seed, step, stream, first_row, seed_tensor, step_tensor, sorted, backend
):
    return ops.resample(
        log_weights,
        scheme=scheme,
        num=num,
        ess_threshold=ess_threshold,
        **_unpack_counter(seed, step, seed_tensor, step_tensor),
        stream=stream,
        first_row=first_row,
        sorted=sorted,
        check=False,
        backend=backend,
    )


def _resample_fake(
    log_weights, scheme, num, ess_threshold, seed, step, stream, first_row, seed_tensor, step_tensor, sorted, backend
):
    rows = log_weights.shape[:-1]
    index_dtype = torch.int32 if log_weights.shape[-1] < 2**31 else torch.int64
    return (
        log_weights.new_empty((*rows, num), dtype=index_dtype),
        log_weights.new_empty((*rows, num)),
        log_weights.new_empty(rows, dtype=torch.float64),
        log_weights.new_empty(rows, dtype=torch.float64),
    )


# --- gather_particles_ --------------------------------------------------------------------------------------


def call_gather_particles_(ancestors: Tensor, states: tuple[Tensor, ...], backend: str) -> None:
    torch.ops.fastguide.gather_particles_(ancestors, list(states), backend)


def _gather_particles_(ancestors, states, backend):
    ops.gather_particles_(ancestors, *states, check=False, backend=backend)


def _gather_particles_fake_(ancestors, states, backend):
    return None


# --- log_prob_and_gradient ----------------------------------------------------------------------------------


def call_log_prob_and_gradient(
    z: Tensor,
    y: Tensor,
    family: str,
    scale: float,
    df: float | None,
    background: float,
    added: Tensor | None,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.ops.fastguide.log_prob_and_gradient(z, y, family, scale, df, background, added, rows, backend)


def _log_prob_and_gradient(z, y, family, scale, df, background, added, rows, backend):
    with torch.no_grad():
        return ops.log_prob_and_gradient(
            z,
            y,
            family=family,
            scale=scale,
            df=df,
            background=background,
            added=added,
            rows=rows,
            backend=backend,
        )


def _log_prob_and_gradient_fake(z, y, family, scale, df, background, added, rows, backend):
    log_prob = z.new_empty(z.shape[0], dtype=torch.float64)
    return log_prob, torch.empty_like(z, memory_format=torch.contiguous_format)


def _log_prob_and_gradient_setup(ctx, inputs, output):
    z, y, family, scale, df, background, added, rows, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, y, added, rows, output[1])
    ctx.density = dict(family=family, scale=scale, df=df, background=background)


def _log_prob_and_gradient_backward(ctx, grad_log_prob, grad_gradient):
    z, y, added, rows, gradient = ctx.saved_tensors
    again = torch.is_grad_enabled()
    if grad_gradient is None and not again:
        by_row = grad_log_prob.to(gradient.dtype).reshape(-1, *(1,) * (z.ndim - 1))
        return by_row * gradient, *(None,) * 8
    with torch.enable_grad():  # derivatives of the gradient are the reference's
        leaf = z if again else z.detach().requires_grad_()
        results = reference.log_prob_and_gradient(leaf, y, added=added, rows=rows, **ctx.density)
        pairs = [(r, g) for r, g in zip(results, (grad_log_prob, grad_gradient), strict=True) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        (grad_z,) = torch.autograd.grad(outputs, leaf, grads, create_graph=again)
    return grad_z, *(None,) * 8


for name, implementation, fake in (
    ("randn", _randn, _randn_fake),
    ("reverse_step", _reverse_step, _reverse_step_fake),
    ("reverse_step_backward", _reverse_step_vjp, _reverse_step_vjp_fake),
    ("propose_and_weigh", _propose_and_weigh, _propose_and_weigh_fake),
    ("resample", _resample, _resample_fake),
    ("gather_particles_", _gather_particles_, _gather_particles_fake_),
    ("log_prob_and_gradient", _log_prob_and_gradient, _log_prob_and_gradient_fake),
):
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastguide::{name}", fake, lib=_library)

torch.library.register_autograd(
    "fastguide::reverse_step", _reverse_step_backward, setup_context=_reverse_step_setup, lib=_library
)
torch.library.register_autograd(
    "fastguide::log_prob_and_gradient",
    _log_prob_and_gradient_backward,
    setup_context=_log_prob_and_gradient_setup,
    lib=_library,
)
