"""What the operations share: choose a backend and call it, eagerly or through torch's dispatcher.

`why_not` says why a backend cannot serve a call. ``backend="auto"`` takes the first of `ORDER` for which it returns no
reason. A named backend that cannot serve the call raises the reason. Importing this touches no GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..arguments import expect_alike, got, is_wrapper, one_of, traced, transformed
from . import _native
from ._native import log

__all__ = ["OPERATIONS", "ORDER", "Backend", "Operation", "backends", "choice", "explain", "why_not"]

ORDER = ("cuda", "cpu", "triton", "reference")  # the fastest first, on each device
OPERATIONS: dict[str, Operation] = {}

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"cuda": _FLOATS, "cpu": (*_FLOATS, torch.float64), "triton": _FLOATS}
# Whether Triton's kernels run in its interpreter, on CPU tensors. Read from the environment: no import of Triton.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_NO_TRANSFORMS = "has no function transforms or forward-mode derivatives, and the call is inside one"

_library = torch.library.Library("fastguide", "DEF")


class Operation:
    """One operation, registered as ``torch.ops.fastguide.<name>``.

    Its functions take the arguments of the schema one by one. The public function has checked and parsed them. A result
    that was not requested is None, or empty if the call went through the dispatcher. Eager, compiled and fake calls use
    the same functions. ``out``: tensors for the results, checked by `_arguments.out`. A kernel writes into them; the
    results of the reference or the dispatcher are copied into them. ``not_finite``: a flag for each ``watched`` tensor.
    It is set to 1 if the tensor has a NaN or an infinite value in the dtype of the arithmetic, and stays as it is
    otherwise. A kernel checks the values that it reads anyway.

    Args:
        schema: ``"name(arguments) -> results"`` as ``torch.library`` writes it; ``str backend`` is added as the last
            argument.
        reference: the operation in plain PyTorch. It must return new memory, as the dispatcher demands.
        fake: returns results with the right shapes, dtypes and strides, but without values.
        kernels: the kernel of each backend except the reference: a function, or ``"module:function"``, which is
            imported when it is first chosen.
        dtypes: the dtypes that the kernels serve, if these are not the floating states; None: any dtype.
        place: returns the device and the dtype of a call, which decide the backend; default: those of the first
            argument.
        obstacle: returns why no kernel can serve these arguments, or ``""``.
        differentiable: whether results have derivatives: those of ``vjp``, or else of the reference by autograd.
        vjp: ``vjp(arguments, results, grads, needed)``, a faster derivative. ``grads`` has a gradient or None for each
            result. ``needed`` has the names of the arguments that need one. Returns gradients by name, or None to use
            the reference. Gradients are enabled inside if the derivative will be differentiated again.
        keep_results: whether ``vjp`` reads the results. If not, they are not kept and ``vjp`` gets none.
        watched: the tensors that ``not_finite`` is about: names of arguments, or a function of all arguments that
            returns tensors, with None for one that is absent.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: dict[str, Callable[..., Any] | str],
        dtypes: Sequence[torch.dtype] | None = (),
        place: Callable[..., tuple[torch.device, torch.dtype]] | None = None,
        obstacle: Callable[..., str] | None = None,
        differentiable: bool = False,
        vjp: Callable[..., dict[str, Tensor | None] | None] | None = None,
        keep_results: bool = False,
        watched: Sequence[str] | Callable[..., Sequence[Tensor | None]] = (),
    ):
        if "(" not in schema or ") -> " not in schema:
            raise ValueError(f"schema: expected 'name(arguments) -> results', got {schema!r}")
        if unknown := kernels.keys() - _DTYPES.keys():
            raise ValueError(f"kernels: expected some of {tuple(_DTYPES)}, got {sorted(unknown)} for {schema!r}")
        self.name, _, rest = schema.partition("(")
        self.kernels = {**kernels, "reference": reference}
        self.reference, self.dtypes, self.place, self.obstacle = reference, dtypes, place, obstacle
        self.differentiable, self.vjp, self.keep_results = differentiable, vjp, keep_results
        parameters, _, results = rest.rpartition(") -> ")
        _library.define(f"{self.name}({parameters}, str backend) -> {results}")
        _library.impl(self.name, self._dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastguide::{self.name}", lambda *args: fake(*args[:-1]), lib=_library)
        if differentiable:
            torch.library.register_autograd(
                f"fastguide::{self.name}", self._backward, setup_context=self._save, lib=_library
            )
        self.overload = getattr(torch.ops.fastguide, self.name).default
        arguments = self.overload._schema.arguments[:-1]
        self.names = [argument.name for argument in arguments]
        places = () if callable(watched) else tuple(map(self.names.index, watched))
        self.watched = watched if callable(watched) else lambda *args: [args[i] for i in places]
        self.seed = self.names.index("seed") if "seed" in self.names else None
        self.tensors = [i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
        self.changed = [i for i in self.tensors if arguments[i].alias_info and arguments[i].alias_info.is_write]
        self._chosen: dict[Any, Callable[..., Any]] = {}  # cache of chosen kernels; a loaded kernel stays loaded
        OPERATIONS[self.name] = self

    # --- choose and call ---

    def __call__(
        self,
        backend: str,
        *args: Any,
        out: Sequence[Tensor] | None = None,
        not_finite: Tensor | None = None,
        ordinary: bool = False,
    ) -> Any:
        """Run the operation. The call goes through the dispatcher only if something must see it: tracing, a tensor
        without memory of its own, or autograd. An ``ordinary`` call has none of these: its tensors are `plain` and
        `writable`."""
        if ordinary:
            return self._run(backend, *args, out=out, not_finite=not_finite)
        if type(backend) is not str:
            one_of("backend", backend, ("auto", *ORDER))
        seen, differentiable = traced(), False
        for i in self.tensors:
            value = args[i]
            for tensor in value if type(value) is list else (value,):
                if tensor is not None:
                    differentiable = differentiable or tensor.requires_grad
                    seen = seen or (type(tensor) is not Tensor and is_wrapper(tensor))
        if not_finite is not None:
            seen = seen or is_wrapper(not_finite)
        if out is not None:
            seen = seen or any(map(is_wrapper, out))
            if differentiable and self.differentiable and torch.is_grad_enabled():
                raise ValueError(
                    f"out: expected None where a result has a gradient, got {', '.join(map(got, out))}; pass detached "
                    "tensors, or call inside torch.no_grad()"
                )
        if differentiable and not self.differentiable and torch.is_grad_enabled():
            given = self._named(args, self.tensors).items()
            needy = [name for name, value in given if value is not None and value.requires_grad]
            raise ValueError(
                f"{', '.join(needy)}: expected tensors that need no gradient, since {self.name} has no derivative; "
                "pass detached tensors, or call inside torch.no_grad()"
            )
        if seen:
            named = self._named(args, self.tensors) | {"not_finite": not_finite}
            expect_alike(named, changed=(*self._named(args, self.changed), "not_finite"))
            self._watch(not_finite, args)
            return _into(out, self._dispatch(backend, args))
        if differentiable and torch.is_grad_enabled() and backend != "reference" and not transformed():
            self._watch(not_finite, args)
            return self._dispatch(backend, args)
        return self._run(backend, *args, out=out, not_finite=not_finite)

    def _run(
        self, backend: str, *args: Any, out: Sequence[Tensor] | None = None, not_finite: Tensor | None = None
    ) -> Any:
        obstacle = self.obstacle(*args) if self.obstacle else ""
        if transformed() and any(args[i] is not None for i in self.tensors):
            obstacle = _NO_TRANSFORMS
        device, dtype = self.place(*args) if self.place else (args[0].device, args[0].dtype)
        kernel = None if obstacle else self._chosen.get((backend, device, dtype))
        if kernel is None:
            name = select(self.name, backend, device=device, dtype=dtype, obstacle=obstacle)
            if log.isEnabledFor(logging.DEBUG):
                _log_choice(self.name, backend, device, dtype, obstacle)
            kernel = self._kernel(name)
            if not obstacle and name != "reference":
                self._chosen[backend, device, dtype] = kernel
        if out is None and not_finite is None:
            return kernel(*args)
        if kernel is self.reference:
            self._watch(not_finite, args)
            return _into(out, kernel(*args))
        flags = {} if not_finite is None else {"not_finite": not_finite}
        results = kernel(*args, out=out, **flags)
        tell_autograd(out, not_finite)
        return results

    def _watch(self, not_finite: Tensor | None, args: Sequence[Any]) -> None:
        """Set the flags as a kernel would, in separate passes over the tensors."""
        if not_finite is None or args[0].numel() == 0:
            return
        dtype = torch.promote_types(args[0].dtype, torch.float32)
        absent = args[0].new_zeros((), dtype=dtype)
        tensors = [absent if value is None else value.detach().to(dtype) for value in self.watched(*args)]
        low, high = map(torch.stack, zip(*map(torch.aminmax, tensors), strict=True))
        not_finite.masked_fill_(~(low.isfinite() & high.isfinite()), 1)

    def _kernel(self, backend: str) -> Callable[..., Any]:
        kernel = self.kernels[backend]
        if isinstance(kernel, str):
            module, _, function = kernel.partition(":")
            kernel = self.kernels[backend] = getattr(importlib.import_module(module), function)
        return kernel

    def _dispatch(self, backend: str, args: tuple[Any, ...]) -> Any:
        """Call the operation through torch's dispatcher. Its integers are signed, so a large seed becomes negative."""
        signed = (v - (1 << 64) if i == self.seed and v >= 1 << 63 else v for i, v in enumerate(args))
        return self.overload(*signed, backend)

    def _dispatched(self, *args: Any) -> Any:
        """`_run` for torch's dispatcher, which turns tuples into lists and cannot return None."""
        given: list[Any] = [
            tuple(v) if type(v) is list and i not in self.tensors else v for i, v in enumerate(args[:-1])
        ]
        if self.seed is not None:
            given[self.seed] &= (1 << 64) - 1
        results = self._run(args[-1], *given)
        if isinstance(results, tuple):
            return tuple(args[0].new_empty(0) if result is None else result for result in results)
        return results

    def _named(self, args: Sequence[Any], places: Sequence[int]) -> dict[str, Any]:
        """The arguments at ``places``, by their names in the public function."""
        named: dict[str, Any] = {}
        for i in places:
            if isinstance(args[i], list):
                named |= {f"{self.names[i]}[{j}]": value for j, value in enumerate(args[i])}
            else:
                name = "coefficients" if "coefficients" in self.names else "levels"  # the public name of a table
                named[name if self.names[i] == "table" else self.names[i].removesuffix("_tensor")] = args[i]
        return named

    # --- derivatives ---

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = [None if i in self.tensors else value for i, value in enumerate(inputs[:-1])]
        results = (output if isinstance(output, tuple) else (output,)) if self.keep_results else ()
        ctx.save_for_backward(*(inputs[i] for i in self.tensors), *results)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args, saved = list(ctx.others), ctx.saved_tensors
        if self.seed is not None:
            args[self.seed] &= (1 << 64) - 1
        for i, tensor in zip(self.tensors, saved, strict=False):
            args[i] = tensor
        needed = [i for i in self.tensors if ctx.needs_input_grad[i]]
        names = [self.names[i] for i in needed]
        found = self.vjp(args, saved[len(self.tensors) :], grads, names) if self.vjp else None
        if found is None:
            again = torch.is_grad_enabled()  # whether the derivative may be differentiated again
            with torch.enable_grad():
                for i in needed:
                    args[i] = args[i] if again else args[i].detach().requires_grad_()
                results = self.reference(*args)
                results = results if isinstance(results, tuple) else (results,)
                given = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None and g is not None]
                known = [(r, g) for r, g in given if r.requires_grad]
                leaves = [args[i] for i in needed]
                outputs, known_grads = zip(*known, strict=True) if known else ((), ())
                values = torch.autograd.grad(outputs, leaves, known_grads, create_graph=again, allow_unused=True)
            found = dict(zip(names, values, strict=True))
        if unknown := found.keys() - set(self.names):
            raise ValueError(f"vjp: expected gradients of arguments of {self.name}, got one of {sorted(unknown)}")
        return *(found.get(name) for name in self.names), None


def plain(x: Tensor, *others: Tensor) -> bool:
    """Fast check for the common case: plain contiguous tensors of one shape on one device, no autograd, no mode, no
    transform. It saves 3 us, most of a small step. The cpu kernels check addresses, dtypes and numbers themselves; if
    they raise one of `UNUSUAL`, the caller falls back to the full checks. Kernels for GPUs check nothing. So for them
    ``plain`` checks addresses and dtypes too, and the caller makes the full checks of the numbers."""
    if type(x) is not Tensor or traced() or transformed():
        return False
    try:
        if not x.is_contiguous() or x.requires_grad or x.is_neg() or x.storage_offset():
            return False
        shape, on_cpu = x.shape, x.is_cpu
        for other in others:
            if type(other) is not Tensor or other.is_cpu is not on_cpu or other.shape != shape:
                return False
            if not other.is_contiguous() or other.requires_grad or other.is_neg() or other.storage_offset():
                return False
        return len(shape) > 0 and (on_cpu or _legible(x, *others))
    except RuntimeError:  # sparse, nested
        return False


def _legible(x: Tensor, *others: Tensor) -> bool:
    """Whether tensors are in memory of one device, and of the floating dtypes that some kernel serves."""
    device = x.device
    for tensor in (x, *others):
        if tensor.device != device or tensor.dtype not in _DTYPES["cpu"] or not tensor.data_ptr():
            return False
    return True


def writable(
    out: Sequence[Tensor] | None,
    like: Sequence[Tensor],
    not_finite: Tensor | None,
    number: int,
    inputs: Sequence[Tensor],
) -> bool:
    """The same check for what a kernel writes: ``out`` (plain tensors with the dtypes of ``like``, or None), and
    ``not_finite`` (``number`` flags, or None). The full checks would take 50 us more in every step of a loop."""
    if out is not_finite is None:
        return True
    if out is not None and [tensor.dtype for tensor in out] != [tensor.dtype for tensor in like]:
        return False
    written = [*(out or ())]
    if not_finite is not None:
        if type(not_finite) is not Tensor or not_finite.is_cpu is not like[0].is_cpu:
            return False
        if not_finite.dtype is not torch.int32 or not_finite.shape != (number,) or not not_finite.is_contiguous():
            return False
        if not_finite.is_neg() or not_finite.storage_offset():
            return False
        if not not_finite.is_cpu and not_finite.device != like[0].device:
            return False
        written.append(not_finite)
    try:
        spans = [(start := tensor.data_ptr(), start + tensor.nbytes) for tensor in inputs]
    except RuntimeError:  # another layout
        return False
    for tensor in written:
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        if not start or tensor.is_inference():
            return False
        for other_start, other_end in spans:
            if start < other_end and other_start < end:
                return False
        spans.append((start, end))
    return True


def tell_autograd(out: Sequence[Tensor] | None, not_finite: Tensor | None) -> None:
    """Tell autograd that a kernel has written into these tensors."""
    written = [*(out or ()), *(() if not_finite is None else (not_finite,))]
    torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])


def _into(out: Sequence[Tensor] | None, results: Any) -> Any:
    """The results, copied into ``out`` if it is given."""
    if out is not None:
        for tensor, result in zip(out, results if isinstance(results, tuple) else (results,), strict=False):
            tensor.copy_(result)
    return results


UNUSUAL = (KeyError, OverflowError, RuntimeError, TypeError, ValueError)


# --- backends -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What is known about one backend. ``loaded``: whether its code is in this process. ``reason``: why it can serve
    nothing, or ``""`` if it can serve its ``operations``. ``details``: how it was built, and how it runs."""

    name: str
    loaded: bool
    reason: str
    operations: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


def backends() -> dict[str, Backend]:
    """Every backend by name, in the order in which ``auto`` tries them."""
    record = _native.build_record()
    cuda_details = dict(record.get("cuda", {}))
    kept = ("compiler", "cxxflags")
    cpu_details: dict[str, Any] = {key: record[key] for key in kept if key in record}
    if not _native.load_error("cpu"):
        cpu_details["instruction_set"] = _native.module("cpu").instruction_set()
    details = {"cuda": cuda_details, "cpu": cpu_details, "triton": {}, "reference": {"torch": torch.__version__}}
    if not load_error("triton"):
        details["triton"] = {"triton": importlib.metadata.version("triton"), "interpreted": _INTERPRETED}
    found = {}
    for name in ORDER:
        error = load_error(name)
        reason = error or _device_reason(name, torch.device("cuda"))
        operations = tuple(operation.name for operation in OPERATIONS.values() if name in operation.kernels)
        found[name] = Backend(name, not error, reason, operations, details[name])
    return found


def load_error(name: str) -> str:
    """Why the code of backend ``name`` did not load, or ``""``."""
    if name == "reference":
        return ""
    return _triton_error() if name == "triton" else _native.load_error(name)


@functools.cache
def _triton_error() -> str:
    try:
        from . import _triton  # noqa: F401  torch.compile can trace this, but not importlib
    except ImportError as error:
        return f"triton did not load: {error}"
    return ""


def _device_reason(name: str, device: torch.device) -> str:
    """Why backend ``name`` runs nothing on ``device``, or ``""``."""
    if name in ("cpu", "reference") or (name == "triton" and _INTERPRETED):
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _gpu_reason(name, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_reason(name: str, index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    if name == "triton":
        return "" if major >= 8 else f"triton serves compute capability 8.0 or higher, and this GPU has {major}.{minor}"
    record = _native.build_record()["cuda"]
    known = torch._C._cuda_getDriverVersion() // 1000  # type: ignore[attr-defined]  # only builds with CUDA have it
    if known < int(record["nvcc"].partition(".")[0]):
        return f"cuda was compiled by nvcc {record['nvcc']}, and this driver serves CUDA {known}: it needs a newer one"
    # Code for an architecture runs on the same major version with the same or a higher minor version. The last
    # architecture has PTX too, which runs on all later ones.
    archs = [divmod(int(arch), 10) for arch in record["archs"]]
    if archs[-1] <= (major, minor) or any(arch[0] == major and arch[1] <= minor for arch in archs):
        return ""
    compiled = ", ".join(f"sm_{arch}" for arch in record["archs"])
    this = f"{major}{minor}"
    return f"cuda was compiled for {compiled}, and this GPU is sm_{this}: build with FASTGUIDE_CUDA_ARCHS={this}"


def why_not(backend: str, operation: str, *, device: torch.device, dtype: torch.dtype, obstacle: str = "") -> str:
    """Why ``backend`` cannot serve this call, or ``""`` if it can. ``obstacle``: why no kernel can serve these
    arguments, or ``""``."""
    if backend not in OPERATIONS[operation].kernels:
        return f"{backend} has no kernel for {operation}"
    if backend == "reference":
        return ""
    own = _device_of(backend)
    if device.type != own:
        return f"{backend} serves tensors on {own}, and these are on {device}"
    dtypes = OPERATIONS[operation].dtypes
    if dtypes is not None and dtype not in (dtypes or _DTYPES[backend]):
        return f"{backend} serves {', '.join(map(str, dtypes or _DTYPES[backend]))}, and this is {dtype}"
    return f"{backend} {obstacle}" if obstacle else load_error(backend) or _device_reason(backend, device)


def _why_not_auto(backend: str, operation: str, **call: Any) -> str:
    if backend == "triton" and _INTERPRETED:
        return "triton's interpreter serves only calls that name it"
    return why_not(backend, operation, **call)


def _device_of(backend: str) -> str:
    if backend != "triton":
        return backend
    return "cpu" if _INTERPRETED else "cuda"


def select(
    operation: str, backend: str = "auto", *, device: torch.device, dtype: torch.dtype, obstacle: str = ""
) -> str:
    """The name of the backend that serves the call: ``backend``, or for ``"auto"`` the fastest one that can. Warns,
    once for each reason, if ``"auto"`` must pass over a compiled kernel."""
    call: dict[str, Any] = dict(device=device, dtype=dtype, obstacle=obstacle)
    if not isinstance(backend, str) or backend != "auto":
        one_of("backend", backend, ("auto", *ORDER))
        if reason := why_not(backend, operation, **call):
            raise RuntimeError(f"backend={backend!r} cannot serve {operation}: {reason}")
        return backend
    own = device.type  # compiled backends are named after their devices
    if own in _DTYPES and not why_not(own, operation, **call):
        return own
    missing = ""
    for name in ORDER:
        if not _why_not_auto(name, operation, **call):
            if missing:
                _warn_passed_over(device.type, missing, name)
            elif name == "reference" and obstacle and not is_compiling():
                _warn_reference(operation, obstacle)
            return name
        if _device_of(name) == device.type and name in OPERATIONS[operation].kernels:
            missing = missing or load_error(name) or _device_reason(name, device)
    raise RuntimeError(explain(operation, device, dtype, obstacle=obstacle))


@functools.cache
def _warn_passed_over(device: str, reason: str, chosen: str) -> None:
    # Once: what is missing stays missing until the process ends.
    instead = "slowly, in plain PyTorch" if chosen == "reference" else f"with those of {chosen}"
    warnings.warn(
        f"fastguide runs on {device} tensors without its compiled kernels, {instead}: {reason}. "
        "`fastguide doctor` tells more.",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _warn_reference(operation: str, obstacle: str) -> None:
    # Once: a loop would warn at every step.
    warnings.warn(
        f"{operation} runs in plain PyTorch, which is slower than its kernel: the kernel {obstacle}. "
        'backend="reference" chooses this without a warning.',
        RuntimeWarning,
        stacklevel=4,
    )


def choice(
    operation: str, device: torch.device | str, dtype: torch.dtype, *, obstacle: str = ""
) -> tuple[str | None, dict[str, str]]:
    """The backend that ``auto`` chooses for a call, or None, and why each faster backend was not chosen."""
    passed_over: dict[str, str] = {}
    for name in ORDER:
        reason = _why_not_auto(name, operation, device=torch.device(device), dtype=dtype, obstacle=obstacle)
        if not reason:
            return name, passed_over
        passed_over[name] = reason
    return None, passed_over


def explain(operation: str, device: torch.device | str, dtype: torch.dtype, *, obstacle: str = "") -> str:
    """`choice` in words."""
    name, passed_over = choice(operation, device, dtype, obstacle=obstacle)
    lines = [f"{operation} on {torch.device(device)}, {dtype}: {name or 'no backend'}"]
    return "\n".join([*lines, *(f"  not {other}: {reason}" for other, reason in passed_over.items())])


@functools.cache
def _log_choice(operation: str, backend: str, device: torch.device, dtype: torch.dtype, obstacle: str) -> None:
    # Once for each kind of call: a loop would log it at every step.
    if backend == "auto":
        words = explain(operation, device, dtype, obstacle=obstacle).replace("\n ", ";")
    else:
        words = f"{operation} on {device}, {dtype}: {backend}, which the call names"
    log.debug("%s", words)
