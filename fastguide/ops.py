"""The six operations: check the arguments, choose a backend, call it.

`fastguide.reference` says in plain PyTorch what each must compute; `fastguide.backends` says who can serve a call.
``backend="auto"`` takes the fastest that can, a named one that cannot raises its reason.

While ``torch.compile`` traces, and for fake tensors, a call goes through the operator registered in
`fastguide.library`; otherwise it skips the dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import arguments, compiled, reference
from .arguments import as_float, fake_mode, flag, got, has_memory, is_batched, is_wrapper, number, one_of, transformed
from .backends import select
from .reference import FAMILIES, SCHEMES, Clip, Coefficients, Counted, DynamicThreshold

__all__ = [
    "DynamicThreshold",
    "gather_particles_",
    "log_prob_and_gradient",
    "propose_and_weigh",
    "randn",
    "resample",
    "reverse_step",
]

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64)


# --- checks -------------------------------------------------------------------------------------------------


def _plain(x: Tensor, *others: Tensor) -> bool:
    """In one look, what the tensors of nearly every call are: torch's own, of one shape, of a dtype and on a device
    that the cpu kernels serve, and watched by nothing. Beside a small state the checks one by one, and the choice of a
    backend, would cost more than the kernel."""
    if type(x) is not Tensor or not x.is_cpu or x.dtype not in STATE_DTYPES or _traced() or transformed():
        return False
    if x.is_neg() or (x.storage_offset() and not has_memory(x)):  # without an offset the kernel sees that
        return False
    shape, differentiable = x.shape, x.requires_grad
    for other in others:
        if type(other) is not Tensor or not other.is_cpu or other.dtype not in STATE_DTYPES or other.shape != shape:
            return False
        if other.is_neg() or (other.storage_offset() and not has_memory(other)):
            return False
        differentiable = differentiable or other.requires_grad
    if differentiable and torch.is_grad_enabled():
        return False
    return len(shape) > 0


def _traced() -> bool:
    """Whether a mode records operations, or gives their results as fake tensors: it should see the operator of
    `fastguide.library`."""
    if torch.compiler.is_compiling():
        return True
    if _get_tracing_state() is not None:
        return True
    return _len_torch_dispatch_stack() > 0 and (get_proxy_mode() is not None or fake_mode() is not None)


def _readable(value: Tensor) -> bool:
    """Whether its values can be looked at, without waiting for a device."""
    return value.device.type == "cpu" and not _traced() and not is_wrapper(value) and not is_batched(value)


# The errors of the short way to a kernel. The checks one by one then find the argument that is to blame.
_UNUSUAL = (KeyError, OverflowError, RuntimeError, TypeError, ValueError)
_NO_TRANSFORMS = "has no function transforms or forward-mode derivatives, and the call is inside one"
_NO_COEFFICIENTS = "has no derivatives in coefficients"


def _needs_grad(*values: Any) -> bool:
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def _choose(operation: str, tensors: dict[str, Any], coefficients: Coefficients, backend: str) -> str:
    """The backend of a step, or "dispatcher"."""
    x = tensors["x"]
    if _through_dispatcher(*tensors.values(), *coefficients):
        arguments.expect_alike(tensors | {f"coefficients[{i}]": c for i, c in enumerate(coefficients)})
        return "dispatcher"
    obstacle = _NO_TRANSFORMS if transformed() else _NO_COEFFICIENTS if _needs_grad(*coefficients) else ""
    return select(operation, backend, device=x.device, dtype=x.dtype, obstacle=obstacle)


def _kernels(operation: str) -> Any:
    """The Triton kernels of an operation; whoever has no GPU does without the import."""
    return importlib.import_module(f"fastguide.kernels.{operation}")


def _state(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """A state, as `_own` has it."""
    value = _own(name, value)
    if value.dtype not in STATE_DTYPES:
        arguments.torch_dtype(name, value.dtype, STATE_DTYPES)
    if like is None:
        if value.ndim == 0:
            raise ValueError(f"{name}: expected shape [N, *event], got a scalar")
    elif value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, that of x, got {list(value.shape)}")
    elif value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, where x is, got {value.device}")
    return value


def _check_counter(
    seed: Counted,
    step: Counted,
    stream: int,
    first_particle: int,
    particles: int,
    elements: int,
    device: torch.device,
    first: str = "first_particle",
) -> None:
    for name, value, bits in (
        ("seed", seed, 64),
        ("step", step, 32),
        ("stream", stream, 16),
        (first, first_particle, 48),
    ):
        if isinstance(value, Tensor) and bits in (64, 32):  # its value is not looked at: that would wait for the device
            arguments.tensor(name, value)
            elsewhere = value.device.type != device.type or device.index not in (None, value.device.index)
            if value.dtype != torch.int64 or value.numel() != 1 or elsewhere:
                raise ValueError(
                    f"{name}: expected an integer, or an int64 tensor of one element on {device}, "
                    f"got {value.dtype} {list(value.shape)} on {value.device}"
                )
        elif not isinstance(value, int) or value is True or value is False or not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {got(value)}")
    if first_particle + particles > 1 << 48 or elements > 1 << 34:
        raise ValueError(
            "shape: expected particles below 2^48 and at most 2^34 elements in each, "
            f"got particles up to {first_particle + particles} of {elements}"
        )


def _numbers(seed: Counted, step: Counted, stream: int, first: int) -> tuple[int, int, int, int]:
    """A counter that stands in the host's memory, for a kernel that takes numbers."""
    return int(seed) & (1 << 64) - 1, int(step) & (1 << 32) - 1, int(stream), int(first)


def _coefficients(coefficients: Any, x: Tensor, prediction: str) -> Coefficients:
    """Floats, and tensors as `_own` has them."""
    names = ("alpha_t", "sigma_t", "alpha_s", "sigma_s", "tau")
    if not isinstance(coefficients, Sequence | np.ndarray):
        raise ValueError(f"coefficients: expected {', '.join(names)}, got {got(coefficients)}")
    if len(coefficients) != 5:
        raise ValueError(f"coefficients: expected {', '.join(names)}, got {len(coefficients)} values")
    checked: list[Any] = []
    readable = True  # values on a device are not looked at: that would wait for it
    for name, value in zip(names, coefficients, strict=True):
        if not isinstance(value, Tensor):
            checked.append(number("coefficients", value, low=0.0, what=name))
            continue
        value = _own("coefficients", value)
        checked.append(value)
        if value.shape != x.shape[:1] or value.dtype not in STATE_DTYPES or value.device != x.device:
            raise ValueError(
                f"coefficients: expected {name} a float or a floating tensor [{x.shape[0]}] on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        on_host = _readable(value)
        if on_host and not ((value >= 0.0) & (value < math.inf)).all():
            raise ValueError(f"coefficients: expected a finite {name} >= 0, got {value}")
        readable = readable and on_host
    alpha_t, sigma_t, alpha_s, sigma_s, tau = checked
    if not readable:
        return alpha_t, sigma_t, alpha_s, sigma_s, tau
    if _any(sigma_t <= 0.0):
        raise ValueError(f"coefficients: expected sigma_t > 0, got {sigma_t}")
    if _any(tau > sigma_s * (1 + 1e-6)):
        raise ValueError(f"coefficients: expected tau <= sigma_s = {sigma_s}, got {tau}")
    if prediction in ("epsilon", "score") and _any(alpha_t == 0.0):
        raise ValueError(f"prediction: {prediction!r} does not determine x_0 where alpha_t = 0")
    return alpha_t, sigma_t, alpha_s, sigma_s, tau


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else condition


def checked_clip(clip: Any) -> Clip:
    """A clip that `reverse_step` takes, of floats; or an error."""
    if clip is None or (type(clip) is float and clip > 0.0):
        return clip
    if isinstance(clip, DynamicThreshold):
        ratio, most = map(as_float, clip)
        if ratio is None or most is None or not (0.0 <= ratio <= 1.0 and most >= 1.0):
            raise ValueError(f"clip: expected 0 <= ratio <= 1 and max_value >= 1, got {got(clip)}")
        return DynamicThreshold(ratio, most)
    bounds = tuple(map(as_float, clip if isinstance(clip, tuple) else (0.0, clip)))  # a number must be above 0
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or not bounds[0] < bounds[1]:
        raise ValueError(
            f"clip: expected a number > 0, (low, high) with low < high, or a DynamicThreshold, got {got(clip)}"
        )
    return (bounds[0], bounds[1]) if isinstance(clip, tuple) else bounds[1]


def _measurements(z: Any, y: Any, added: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four as `_own` has them."""
    z, y = _state("z", z), _state("y", y)
    samples, measurement = z.shape[0], z.shape[1:]
    added = None if added is None else _state("added", added)
    for name, value in (("y", y), ("added", added)):
        if value is None:
            continue
        any_rows = name == "y" and rows is not None
        if value.shape[1:] != measurement or not (any_rows or value.shape[0] in (1, samples)):
            expected = "any number of rows" if any_rows else f"{samples} rows or 1"
            raise ValueError(
                f"{name}: expected {expected}, each of shape {list(measurement)}, got {list(value.shape)} "
                f"beside z {list(z.shape)}"
            )
        if value.device != z.device:
            raise ValueError(f"{name}: expected a tensor on {z.device}, where z is, got {value.device}")
    if rows is not None:
        expected = f"an int64 tensor [{samples}] on {z.device}"
        rows = _own("rows", rows, expected)
        if rows.dtype != torch.int64 or rows.shape != z.shape[:1] or rows.device != z.device:
            raise ValueError(f"rows: expected {expected}, got {got(rows)}")
    return z, y, added, rows


def _density(
    family: str, scale: Any, df: Any, background: Any, added: Tensor | None
) -> tuple[float, float | None, float]:
    """The scale, the degrees of freedom and the background."""
    one_of("family", family, FAMILIES)
    scale = number("scale", scale, above=0.0)
    if not 0.0 < scale * scale < math.inf:
        raise ValueError(f"scale: expected a number whose square float64 can hold, got {scale}")
    if (df is not None) != (family == "student_t"):
        raise ValueError(f"df: expected a number for 'student_t' and None for the others, got {got(df)} for {family!r}")
    df = None if df is None else number("df", df, above=0.0)
    background = number("background", background, low=0.0)
    if background and family != "poisson":
        raise ValueError(f"background: expected 0 but for 'poisson', got {background} for {family!r}")
    if added is not None and family == "poisson":
        raise ValueError("added: expected None for 'poisson', got a tensor")
    return scale, df, background


# --- operations ---------------------------------------------------------------------------------------------


def randn(
    shape: Sequence[int],
    *,
    seed: Counted,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Standard normals ``shape = [N, *event]`` from counters: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.

    The value of particle ``first_particle + n`` at an element depends on ``seed`` (below 2^64), ``step`` (2^32),
    ``stream`` (2^16), that global index and the element's place in the event, and on nothing else: not on ``N``, the
    backend (to 4 ulp of float32), the thread count or what was drawn before. ``|z|`` reaches 6.66. float16 and bfloat16
    are the float32 values rounded.

    ``seed`` and ``step`` are integers, or int64 tensors of one element on ``device`` with their bits: a CUDA graph then
    draws from what stands there when it is replayed. So in all operations.
    """
    sizes = arguments.shape("shape", shape, "[N, *event]")
    if not sizes:
        raise ValueError("shape: expected [N, *event], got []")
    shape = sizes
    if not isinstance(dtype, torch.dtype) or dtype not in STATE_DTYPES:
        arguments.torch_dtype("dtype", dtype, STATE_DTYPES)
    device = arguments.torch_device("device", device)
    _check_counter(seed, step, stream, first_particle, shape[0], math.prod(shape[1:]), device)
    if _through_dispatcher(seed, step):
        from . import library

        arguments.expect_alike({"seed": seed, "step": step})
        return library.call_randn(shape, (seed, step, stream, first_particle), dtype, device, backend)
    obstacle = _NO_TRANSFORMS if is_batched(seed) or is_batched(step) else ""
    chosen = select("randn", backend, device=device, dtype=dtype, obstacle=obstacle)
    if chosen == "reference":
        return reference.randn(
            shape,
            seed=seed,
            step=step,
            stream=stream,
            first_particle=first_particle,
            dtype=dtype,
            device=device,
        )
    out = torch.empty(*shape, dtype=dtype, device=device)
    if chosen == "triton":
        _kernels("randn").randn(out, seed, step, stream, first_particle)
        return out
    if chosen == "cuda":
        compiled.randn_cuda(out, seed, step, stream, first_particle)
        return out
    compiled.randn_cpu(out, *_numbers(seed, step, stream, first_particle))
    return out


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    clip_noise: bool = True,
    displacement: Tensor | None = None,
    seed: Counted = 0,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
    return_x0: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One step from level ``t`` to the lower level ``s``; DDIM, DDPM, Euler and Euler-ancestral are this formula with
    their ``tau`` (Song, Meng, Ermon 2021, eq. 12)::

        x0_hat  from model_output and prediction, then clipped
        eps_hat = (x - alpha_t x0_hat) / sigma_t
        x_s     = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + displacement + tau z

    - ``x`` ``[N, *event]``; ``model_output`` and ``displacement`` of the same shape, any of the four dtypes.
    - ``coefficients = (alpha_t, sigma_t, alpha_s, sigma_s, tau)``, each a float or a tensor ``[N]``, with
      ``sigma_t > 0`` and ``0 <= tau <= sigma_s``. Values on a GPU are not checked. ``"epsilon"`` and ``"score"`` need
      ``alpha_t > 0``.
    - ``clip``: None, a number ``c`` for ``[-c, c]``, ``(low, high)``, or a `DynamicThreshold`. ``clip_noise=False``
      leaves ``eps_hat`` what it is of the unclipped ``x0_hat`` (diffusers' DDIM).
    - ``z``: `randn` of ``seed, step, stream, first_particle``; none is drawn where ``tau = 0``.

    Returns ``x_s`` in the dtype of ``x``, and the clipped ``x0_hat`` if ``return_x0``. Differentiable in the three
    tensors.
    """
    counter = seed, step, stream, first_particle
    tensors = (x, model_output) if displacement is None else (x, model_output, displacement)
    if clip is not None:
        clip = checked_clip(clip)
    elif clip_noise is False:
        clip_noise = True  # which it is
    try:
        if backend == "auto" and type(coefficients) is tuple and _plain(*tensors):
            return compiled.reverse_step_cpu(
                x, model_output, coefficients, prediction, clip, clip_noise, displacement, counter, return_x0
            )
    except _UNUSUAL:
        pass  # what follows says what is wrong, or serves coefficients that are not five floats
    x = _state("x", x)
    model_output = _state("model_output", model_output, x)
    displacement = None if displacement is None else _state("displacement", displacement, x)
    clip_noise, return_x0 = flag("clip_noise", clip_noise) or clip is None, flag("return_x0", return_x0)
    one_of("prediction", prediction, reference.PREDICTIONS)
    coefficients = _coefficients(coefficients, x, prediction)
    _check_counter(*counter, x.shape[0], math.prod(x.shape[1:]), x.device)
    given = {"x": x, "model_output": model_output, "displacement": displacement, "seed": seed, "step": step}
    chosen = _choose("reverse_step", given, coefficients, backend)
    if chosen == "reference":
        return reference.reverse_step(
            x,
            model_output,
            coefficients,
            prediction=prediction,
            clip=clip,
            clip_noise=clip_noise,
            displacement=displacement,
            seed=seed,
            step=step,
            stream=stream,
            first_particle=first_particle,
            return_x0=return_x0,
        )
    if chosen == "dispatcher" or _needs_grad(x, model_output, displacement):
        from . import library

        x_s, x0 = library.call_reverse_step(
            x, model_output, coefficients, prediction, clip, clip_noise, displacement, counter, return_x0, backend
        )
        return (x_s, x0) if return_x0 else x_s
    if chosen == "triton":
        return _kernels("reverse_step").reverse_step(
            x, model_output, coefficients, prediction, clip, clip_noise, displacement, counter, return_x0
        )
    levels, counter = compiled.levels(coefficients, x.shape[0]), _numbers(*counter)
    return compiled.reverse_step_cpu(
        x, model_output, levels, prediction, clip, clip_noise, displacement, counter, return_x0
    )


def propose_and_weigh(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    coefficients: Coefficients,
    *,
    seed: Counted,
    step: Counted = 0,
    stream: int = 0,
    first_particle: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The guided step of twisted diffusion sampling and its part of the weight (Wu et al. 2023, algorithm 1)::

        m           = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat
        x_s         = m + displacement + tau z
        log_weights + log N(x_s; m, tau^2) - log N(x_s; m + displacement, tau^2)

    ``x``, ``x0_hat``, ``displacement``: ``[N, *event]``; ``log_weights``: ``N`` values of any shape, float32 or
    float64; ``coefficients`` and counters as in `reverse_step`. Where ``tau = 0`` the step is the base kernel's,
    without the displacement, and the ratio is 1. Returns new tensors, without gradients.
    """
    counter = seed, step, stream, first_particle
    try:
        plain = backend == "auto" and type(coefficients) is tuple and _plain(x, x0_hat, displacement)
        weighted = plain and _plain(log_weights) and log_weights.dtype in WEIGHT_DTYPES
        if weighted and log_weights.numel() == x.shape[0]:
            return compiled.propose_and_weigh_cpu(x, x0_hat, displacement, log_weights, coefficients, counter)
    except _UNUSUAL:
        pass  # as in reverse_step
    x = _state("x", x)
    x0_hat, displacement = _state("x0_hat", x0_hat, x), _state("displacement", displacement, x)
    log_weights = _own("log_weights", log_weights, "a float32 or float64 tensor")
    if log_weights.numel() != x.shape[0] or log_weights.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"log_weights: expected {x.shape[0]} float32 or float64 values, "
            f"got {log_weights.dtype} {list(log_weights.shape)}"
        )
    if log_weights.device != x.device:
        raise ValueError(f"log_weights: expected a tensor on {x.device}, where x is, got {log_weights.device}")
    coefficients = _coefficients(coefficients, x, "sample")
    _check_counter(*counter, x.shape[0], math.prod(x.shape[1:]), x.device)
    given = {
        "x": x, "x0_hat": x0_hat, "displacement": displacement, "log_weights": log_weights, "seed": seed, "step": step,
    }  # fmt: skip
    chosen = _choose("propose_and_weigh", given, coefficients, backend)
    if chosen == "cpu":
        levels, counter = compiled.levels(coefficients, x.shape[0]), _numbers(*counter)
        return compiled.propose_and_weigh_cpu(x, x0_hat, displacement, log_weights, levels, counter)
    if chosen == "triton":
        return _kernels("propose_and_weigh").propose_and_weigh(
            x, x0_hat, displacement, log_weights, coefficients, counter
        )
    with torch.no_grad():
        if chosen == "dispatcher":
            from . import library

            return library.call_propose_and_weigh(x, x0_hat, displacement, log_weights, coefficients, counter, backend)
        return reference.propose_and_weigh(
            x,
            x0_hat,
            displacement,
            log_weights,
            coefficients,
            seed=seed,
            step=step,
            stream=stream,
            first_particle=first_particle,
        )


def resample(
    log_weights: Tensor,
    *,
    scheme: str = "systematic",
    num: int | None = None,
    ess_threshold: float | None = None,
    seed: Counted = 0,
    step: Counted = 0,
    stream: int = 0,
    first_row: int = 0,
    sorted: bool = True,
    check: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw ``num`` (default ``K``) ancestors for each row of ``log_weights`` ``[B, K]`` or ``[K]``, float32 or float64,
    unnormalised (Chopin & Papaspiliopoulos 2020, chapter 9).

    - ``scheme``: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"`` (multinomial remainders).
    - ``ess_threshold`` in ``[0, 1]``: rows whose effective sample size is at least that share of ``K`` keep their
      particles (identity) and weights; None resamples all. Decided on the device; needs ``num == K``.
    - ``sorted``: ascending ancestors; False permutes them so that every survivor stays in its place (needs ``num ==
      K``), which is what `gather_particles_` moves least for.
    - ``check``: raise for a row without a usable weight: a NaN, ``+inf``, or all ``-inf`` (which waits for a GPU). With
      False such a row keeps its particles (where ``num == K``; else its ancestors are zeros), and its mean weight and
      ESS are NaN.
    - ``first_row``: row ``b`` draws as row ``first_row + b`` of a larger call.

    Returns ``ancestors`` ``[B, num]`` (int32 below 2^31), ``log_weights`` ``[B, num]`` (of a resampled row, all the log
    of its mean weight, so that the mean weight never changes), ``log_mean_weight`` ``[B]`` and ``ess`` ``[B]`` in
    float64.

    Weights are integers inside (`reference.integer_weights`), so the result does not depend on how sums are split.
    """
    log_weights = _own("log_weights", log_weights, "a float32 or float64 tensor")
    if log_weights.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"log_weights: expected a float32 or float64 tensor, got {log_weights.dtype}")
    if log_weights.ndim not in (1, 2) or log_weights.shape[-1] == 0:
        raise ValueError(f"log_weights: expected shape [B, K] or [K] with K >= 1, got {list(log_weights.shape)}")
    particles = log_weights.shape[-1]
    one_of("scheme", scheme, SCHEMES)
    sorted, check = flag("sorted", sorted), flag("check", check)
    if ess_threshold is not None:
        ess_threshold = number("ess_threshold", ess_threshold, low=0.0, high=1.0, what="share of the particles")
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or not 1 <= num < 1 << 31):
        raise ValueError(f"num: expected an integer in [1, 2^31), got {got(num)}")
    if num is not None and num != particles and (ess_threshold is not None or not sorted):
        raise ValueError(f"num: expected {particles} with ess_threshold or sorted=False, got {num}")
    count = particles if num is None else num
    options = scheme, count, ess_threshold, seed, step, stream, first_row, sorted
    if type(backend) is str and backend == "auto" and particles < 1 << 31 and _plain(log_weights):
        try:
            bad, results = compiled.resample_cpu(log_weights, *options)
        except _UNUSUAL:
            pass  # as in reverse_step
        else:
            if check and bad >= 0:
                _refuse_weights(log_weights, bad)
            return results
    if _needs_grad(log_weights):
        raise ValueError(
            "log_weights: expected a tensor that needs no gradient, since draws have none, got one that requires it; "
            "pass log_weights.detach(), or call inside torch.no_grad()"
        )
    rows = math.prod(log_weights.shape[:-1])
    _check_counter(seed, step, stream, first_row, rows, 4 * count, log_weights.device, first="first_row")
    if check and torch.compiler.is_compiling():
        raise ValueError("check: expected False inside torch.compile, since it looks at values, got True")
    through_dispatcher = _through_dispatcher(log_weights, seed, step)
    given = {"log_weights": log_weights, "seed": seed, "step": step}
    fake = through_dispatcher and arguments.expect_alike(given) is not None
    if check and (log_weights.is_meta or fake or any(map(is_batched, given.values()))):
        values = ", ".join(got(value) for value in given.values() if isinstance(value, Tensor))
        raise ValueError(f"check: expected False for results without values, got True with {values}")
    if through_dispatcher:
        from . import library

        with torch.no_grad():
            counter = seed, step, stream, first_row
            results = library.call_resample(log_weights, scheme, num, ess_threshold, counter, sorted, backend)
    elif (chosen := _choose_resampler(log_weights, backend)) == "cuda":
        results = compiled.resample_cuda(log_weights, *options)
    elif chosen == "cpu":
        counter = _numbers(seed, step, stream, first_row)
        results = compiled.resample_cpu(log_weights, scheme, count, ess_threshold, *counter, sorted)[1]
    else:
        with torch.no_grad():
            results = reference.resample(
                log_weights,
                scheme=scheme,
                num=num,
                ess_threshold=ess_threshold,
                seed=seed,
                step=step,
                stream=stream,
                first_row=first_row,
                sorted=sorted,
            )
    if check:
        bad_rows = results[2].isnan().reshape(-1)
        if bad_rows.any():
            _refuse_weights(log_weights, int(bad_rows.nonzero()[0]))
    return results


def _choose_resampler(log_weights: Tensor, backend: str) -> str:
    obstacle = _NO_TRANSFORMS if transformed() else ""
    if log_weights.shape[-1] >= 1 << 31:
        obstacle = f"counts particles in 31 bits, and there are {log_weights.shape[-1]}"
    return select("resample", backend, device=log_weights.device, dtype=log_weights.dtype, obstacle=obstacle)


def _refuse_weights(log_weights: Tensor, row: int) -> None:
    value = log_weights.reshape(-1, log_weights.shape[-1])[row].amax().item()
    what = "NaN" if math.isnan(value) else "+inf" if value > 0 else "no live particle (all are -inf)"
    raise ValueError(f"log_weights: expected a finite largest weight in every row, got {what} in row {row}")


def gather_particles_(ancestors: Tensor, *states: Tensor, check: bool = True, backend: str = "auto") -> None:
    """``state[b, k] = state[b, ancestors[b, k]]``, in place, for every state.

    ``ancestors``: ``[B, K]`` or ``[K]``, int32 or int64 in ``[0, K)``, which ``check`` makes sure of (that waits for a
    GPU; the CPU always looks); each state ``[B, K, *event]`` or ``[K, *event]``, of any dtype. Only particles whose
    ancestor is another are copied; with ancestors of `resample` with ``sorted=False`` they are the fewest. The compiled
    kernels move nothing where an ancestor is out of range, checked or not.

    A state whose particles are dense in any order of the event's dimensions (``channels_last``) moves in place; any
    other view moves through a contiguous copy. Elements of the states must not share memory with each other. An error
    leaves every state as it was.
    """
    ancestors = _own("ancestors", ancestors, "an int32 or int64 tensor")
    if ancestors.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ancestors: expected an int32 or int64 tensor, got {ancestors.dtype}")
    if ancestors.ndim not in (1, 2):
        raise ValueError(f"ancestors: expected shape [B, K] or [K], got {list(ancestors.shape)}")
    check = flag("check", check)
    for i, state in enumerate(states):
        arguments.tensor(f"states[{i}]", state)
        if state.shape[: ancestors.ndim] != ancestors.shape or state.device != ancestors.device:
            raise ValueError(
                f"states[{i}]: expected shape {list(ancestors.shape)} + event on {ancestors.device}, as ancestors are, "
                f"got {list(state.shape)} on {state.device}"
            )
        if state.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"states[{i}]: expected a tensor that needs no gradient, since it is changed in place")
    states = tuple(map(_unwrapped, states))
    if _through_dispatcher(ancestors, *states):
        from . import library

        named = {f"states[{i}]": state for i, state in enumerate(states)}
        arguments.expect_alike({"ancestors": ancestors} | named, changed=named)
        return library.call_gather_particles_(ancestors, states, backend)
    obstacle = _NO_TRANSFORMS if transformed() else ""
    if obstacle and check and any(map(is_batched, (ancestors, *states))):
        raise ValueError(
            f"check: expected False inside torch.vmap, since it looks at values, got True with {got(ancestors)}"
        )
    apart = not obstacle and _lie_apart(ancestors, states)
    if not obstacle and not apart:  # inside a transform, tensors have no addresses
        _check_overlaps(states)
    chosen = select("gather_particles_", backend, device=ancestors.device, dtype=ancestors.dtype, obstacle=obstacle)
    if chosen == "reference":
        for i, state in enumerate(states):
            if state.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(f"states[{i}]: torch changes a tensor made in inference_mode only inside that mode")
        if check:
            _check_indices("ancestors", ancestors, ancestors.shape[-1])
        return reference.gather_particles_(ancestors, *states)
    dense: Sequence[Tensor] = states
    if not apart:
        ancestors = ancestors.clone()  # a state may share their memory
        dense = [_dense(state, ancestors.ndim) for state in states]
    if chosen == "cpu":
        bad = compiled.gather_particles_cpu(ancestors.contiguous(), dense)
        if bad >= 0:
            _refuse_index("ancestors", ancestors, ancestors.shape[-1], bad)
    else:
        outside = compiled.gather_particles_cuda(ancestors.contiguous(), dense)
        if check and outside.item():
            _check_indices("ancestors", ancestors, ancestors.shape[-1])
    if not apart:
        for state, moved in zip(states, dense, strict=True):
            if moved.data_ptr() != state.data_ptr():
                with torch.inference_mode() if state.is_inference() else contextlib.nullcontext():
                    state.copy_(moved)


def _lie_apart(ancestors: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether the states are contiguous and no memory is in two of the tensors, as in nearly every call."""
    start = ancestors.data_ptr()
    spans = [(start, start + ancestors.nbytes)]
    for state in states:
        if not state.is_contiguous():
            return False
        start, end = state.data_ptr(), state.data_ptr() + state.nbytes
        for other_start, other_end in spans:
            if start < other_end and other_start < end:
                return False
        spans.append((start, end))
    return True


def _dense(state: Tensor, leading: int) -> Tensor:
    """The state with its event's dimensions in the order of memory, or else a contiguous copy."""
    if state.is_contiguous():
        return state
    event = sorted(range(leading, state.ndim), key=state.stride, reverse=True)
    turned = state.permute(*range(leading), *event)
    return turned if turned.is_contiguous() else state.contiguous()


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of that after the last."""
    if x.numel() == 0:
        return 0, 0
    steps = sum((number - 1) * stride for number, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (steps + 1) * x.element_size()


def _check_overlaps(states: Sequence[Tensor]) -> None:
    """Raise where an element of the states would be written twice."""
    spans = [_span(state) for state in states]
    for i, state in enumerate(states):
        if not state.is_contiguous() and _share_bytes(_layout(state, spans[i][0])):
            raise ValueError(
                f"states[{i}]: expected elements that share no memory, got shape {list(state.shape)} "
                f"with strides {list(state.stride())}"
            )
        for j in range(i):
            first = min(spans[i][0], spans[j][0])
            meet = spans[i][0] < spans[j][1] and spans[j][0] < spans[i][1]
            if meet and _share_bytes(_layout(states[j], first), _layout(state, first)):
                raise ValueError(f"states[{i}]: expected memory of its own, got a tensor that overlaps states[{j}]")


def _layout(x: Tensor, first: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes and strides in bytes, and the place of its first byte after the address ``first``. Dimensions that lie one
    in another are one."""
    sizes, strides = [x.element_size()], [1]
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride * x.element_size() == strides[-1] * sizes[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride * x.element_size())
    return tuple(sizes), tuple(strides), x.data_ptr() - first


@functools.lru_cache(maxsize=64)
def _share_bytes(*layouts: tuple[tuple[int, ...], tuple[int, ...], int]) -> bool:
    """Whether a byte belongs to two of the layouts' elements. A loop asks of the same layouts at every step."""
    nested = all(
        step >= size * stride
        for sizes, strides, _ in layouts
        for size, stride, step in zip(sizes, strides, strides[1:], strict=False)
    )
    if nested and len(layouts) == 1:
        return False
    if any(0 in strides for _, strides, _ in layouts):
        return True
    ends = [at + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1 for sizes, strides, at in layouts]
    taken, bytes_of_all = torch.zeros(max(ends), dtype=torch.bool, device="cpu"), 0
    for sizes, strides, at in layouts:
        taken.as_strided(sizes, strides, at).fill_(True)
        bytes_of_all += math.prod(sizes)
    return int(taken.count_nonzero()) < bytes_of_all


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    outside = ((indices < 0) | (indices >= size)).flatten().nonzero()
    if len(outside):
        _refuse_index(name, indices, size, int(outside[0]))


def _refuse_index(name: str, indices: Tensor, size: int, at: int) -> None:
    raise ValueError(f"{name}: expected values in [0, {size}), got {int(indices.flatten()[at])} at {at}")


def log_prob_and_gradient(
    z: Tensor,
    y: Tensor,
    *,
    family: str,
    scale: float,
    df: float | None = None,
    background: float = 0.0,
    added: Tensor | None = None,
    rows: Tensor | None = None,
    return_gradient: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``log p(y | z)``, every normalising constant kept, and its gradient in ``z``, in one pass over both.

    - ``z`` ``[n, *measurement]``; ``y`` of one row, or of ``n``, or of any number where ``rows`` ``[n]`` (int64) says
      which row each sample has; any of the four dtypes.
    - ``family``: ``"gaussian"``; ``"student_t"`` with ``df`` degrees of freedom; ``"laplace"``; ``"poisson"``, where
      ``y >= 0`` and ``y / scale`` has the mean ``(z + background) / scale``. Formulas in
      `fastguide.reference.log_prob_and_gradient`.
    - ``scale > 0``; ``added`` ``[n or 1, *measurement]`` is added to its square (not for Poisson).

    Returns the log-densities ``[n]`` in float64, and the gradient in the shape and dtype of ``z``, or None without
    ``return_gradient``. Differentiable in ``z``, any number of times; the reference also in ``y`` and ``added``.
    """
    z, y, added, rows = _measurements(z, y, added, rows)
    scale, df, background = _density(family, scale, df, background, added)
    return_gradient = flag("return_gradient", return_gradient)
    differentiate = torch.is_grad_enabled()
    obstacle = _density_obstacle(y, added) if differentiate else ""
    if not _traced() and transformed():
        obstacle = _NO_TRANSFORMS
    if not obstacle and (_through_dispatcher(z, y, added, rows) or (differentiate and z.requires_grad)):
        from . import library

        arguments.expect_alike({"z": z, "y": y, "added": added, "rows": rows})
        results = library.call_log_prob_and_gradient(z, y, family, scale, df, background, added, rows, backend)
        return results if return_gradient else (results[0], None)
    dtype = torch.float64 if y.dtype == torch.float64 else z.dtype
    chosen = select("log_prob_and_gradient", backend, device=z.device, dtype=dtype, obstacle=obstacle)
    if chosen == "triton":
        density = family, scale, df, background, added, rows
        return _kernels("log_prob_and_gradient").log_prob_and_gradient(z, y, *density, return_gradient)
    if chosen == "cpu":
        bad, log_prob, gradient = compiled.log_prob_and_gradient_cpu(
            z, y, family, scale, df, background, added, rows, return_gradient
        )
        if bad >= 0:
            assert rows is not None
            _refuse_index("rows", rows, y.shape[0], bad)
        return log_prob, gradient
    if rows is not None and _readable(rows):
        _check_indices("rows", rows, y.shape[0])
    results = reference.log_prob_and_gradient(
        z, y, family=family, scale=scale, df=df, background=background, added=added, rows=rows
    )
    return results if return_gradient else (results[0], None)


def _density_obstacle(y: Tensor, added: Tensor | None) -> str:
    for name, value in (("y", y), ("added", added)):
        if value is not None and value.requires_grad:
            return f"differentiates in z alone, and {name} requires a gradient"
    return ""


def _through_dispatcher(*values: Any) -> bool:
    """Whether a call is recorded, or a value is a tensor that has no memory of its own, as a fake or a sharded one."""
    if _traced():
        return True
    return any(isinstance(v, Tensor) and type(v) is not Tensor and is_wrapper(v) for v in values)


def _unwrapped(value: Tensor) -> Tensor:
    """A subclass that only adds methods as torch's own tensor of the same memory; anything else as it is."""
    if type(value) is Tensor or isinstance(value, torch.nn.Parameter) or is_wrapper(value):
        return value
    return value if torch.compiler.is_compiling() else value.as_subclass(Tensor)  # compile knows what it traces


def _own(name: str, value: Any, expected: str = "a tensor") -> Tensor:
    """A tensor argument as kernels read it: of plain memory, and what is a view of the negative (`torch._neg_view`)
    written out."""
    compiling = torch.compiler.is_compiling()
    if compiling or type(value) is not Tensor or not has_memory(value) or value.is_nested:
        arguments.tensor(name, value, expected)
        if compiling:
            return value
        value = _unwrapped(value)
    return value.resolve_neg() if value.is_neg() else value
