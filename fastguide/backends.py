"""Which backend serves a call: what was built, what loaded, what did not and why.

`why_not` is the one predicate. ``backend="auto"`` takes the first of `ORDER` for which it says nothing; a
named backend that cannot serve raises what it says. Importing this touches no GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from . import compiled
from .arguments import one_of

__all__ = ["OPERATIONS", "ORDER", "Backend", "backends", "explain", "select", "why_not"]

OPERATIONS = (
    "randn",
    "reverse_step",
    "propose_and_weigh",
    "resample",
    "gather_particles_",
    "log_prob_and_gradient",
)
ORDER = ("cuda", "cpu", "triton", "reference")  # on each device the fastest first

_SERVES = {
    "cuda": ("randn", "resample", "gather_particles_"),
    "cpu": OPERATIONS,
    "triton": ("randn", "reverse_step", "propose_and_weigh", "log_prob_and_gradient"),
    "reference": OPERATIONS,
}
# Whether Triton's kernels run in its interpreter, on CPU tensors: asked of the environment, without an import.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_ANY_DTYPE = ("gather_particles_",)  # moves bytes
_DTYPES = {"cuda": compiled.CUDA_DTYPES, "cpu": compiled.CPU_DTYPES, "triton": compiled.CUDA_DTYPES}
_WEIGHT_DTYPES = (torch.float32, torch.float64)  # of resample, whatever a backend's states are


@dataclass(frozen=True)
class Backend:
    """What is known of one backend. ``loaded``: its code is in this process. ``reason``: why it can serve
    nothing, or ``""`` when it can serve its ``operations``. ``details``: how it was built, and runs."""

    name: str
    loaded: bool
    reason: str
    operations: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


def backends() -> dict[str, Backend]:
    """Every backend by name, in the order in which ``auto`` asks them."""
    record = compiled.build_record()
    cuda_details = dict(record.get("cuda", {}))
    kept = ("compiler", "cxxflags")
    cpu_details: dict[str, Any] = {key: record[key] for key in kept if key in record}
    if not compiled.load_error("cpu"):
        cpu_details["instruction_set"] = compiled.module("cpu").instruction_set()
    details = {"cuda": cuda_details, "cpu": cpu_details, "triton": {}, "reference": {"torch": torch.__version__}}
    if not load_error("triton"):
        details["triton"] = {"triton": importlib.metadata.version("triton"), "interpreted": _INTERPRETED}
    found = {}
    for name in ORDER:
        error = load_error(name)
        reason = error or _no_device(name)
        found[name] = Backend(name, not error, reason, _SERVES[name], details[name])
    return found


def load_error(name: str) -> str:
    """Why the code of backend ``name`` is not there, or ``""``."""
    if name == "reference":
        return ""
    return _triton_error() if name == "triton" else compiled.load_error(name)


@functools.cache
def _triton_error() -> str:
    try:
        from .kernels import tiles  # noqa: F401  torch.compile follows this, and no importlib
    except ImportError as error:
        return f"triton did not load: {error}"
    return ""


def _no_device(name: str) -> str:
    if name in ("cpu", "reference") or (name == "triton" and _INTERPRETED) or torch.cuda.is_available():
        return ""
    return "torch sees no CUDA device"


def why_not(backend: str, operation: str, *, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
    """Why ``backend`` cannot serve this call, or ``""`` when it can. ``facts`` are what else the operation
    knows of the call: ``obstacle``, what it is about these tensors that no kernel can serve, or ``""``."""
    if operation not in _SERVES[backend]:
        return f"{backend} has no kernel for {operation}"
    if backend == "reference":
        return ""
    own = _device_of(backend)
    if device.type != own:
        return f"{backend} serves tensors on {own}, and these are on {device}"
    dtypes = _WEIGHT_DTYPES if operation == "resample" else _DTYPES[backend]
    if operation not in _ANY_DTYPE and dtype not in dtypes:
        return f"{backend} serves {', '.join(str(d) for d in dtypes)}, and this is {dtype}"
    if facts.get("obstacle"):
        return f"{backend} {facts['obstacle']}"
    return load_error(backend) or _no_device(backend)


def _why_not_auto(backend: str, operation: str, **call: Any) -> str:
    if backend == "triton" and _INTERPRETED:
        return "triton's interpreter serves calls that name it, and no others"
    return why_not(backend, operation, **call)


def _device_of(backend: str) -> str:
    if backend != "triton":
        return backend
    return "cpu" if _INTERPRETED else "cuda"


def select(operation: str, backend: str = "auto", *, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
    """The name of the backend that serves the call: ``backend``, or for ``"auto"`` the fastest that can. Warns, once
    for each reason, where that is the reference."""
    if not isinstance(backend, str) or backend != "auto":
        one_of("backend", backend, ("auto", *ORDER))
        reason = why_not(backend, operation, device=device, dtype=dtype, **facts)
        if reason:
            raise RuntimeError(f"backend={backend!r} cannot serve {operation}: {reason}")
        return backend
    own = device.type  # a compiled backend has the name of the devices that it serves
    if own in _DTYPES and not why_not(own, operation, device=device, dtype=dtype, **facts):
        return own
    missing = ""
    for name in ORDER:
        if not _why_not_auto(name, operation, device=device, dtype=dtype, **facts):
            if name == "reference" and missing:
                _warn_slow(device.type, missing)
            elif name == "reference" and facts.get("obstacle") and not torch.compiler.is_compiling():
                _warn_reference(operation, facts["obstacle"])
            return name
        if _device_of(name) == device.type and operation in _SERVES[name]:
            missing = missing or load_error(name)
    raise RuntimeError(explain(operation, device, dtype, **facts))


@functools.cache
def _warn_slow(device: str, reason: str) -> None:
    # Once: what is missing stays missing for as long as the process lives.
    warnings.warn(
        f"fastguide runs on {device} tensors without its compiled kernels, slowly: {reason}. "
        "`fastguide doctor` tells more.",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _warn_reference(operation: str, obstacle: str) -> None:
    # Once: a loop would say it at every step.
    warnings.warn(
        f"{operation} runs in plain PyTorch, which is slower than its kernel: the kernel {obstacle}. "
        'backend="reference" chooses this without a warning.',
        RuntimeWarning,
        stacklevel=4,
    )


def explain(operation: str, device: torch.device | str, dtype: torch.dtype, **facts: Any) -> str:
    """What ``auto`` chooses for a call, and why it passes over each faster backend."""
    device = torch.device(device)
    call = f"{operation} on {device}, {dtype}"
    lines: list[str] = []
    for name in ORDER:
        reason = _why_not_auto(name, operation, device=device, dtype=dtype, **facts)
        if not reason:
            return "\n".join([f"{call}: {name}", *lines])
        lines.append(f"  not {name}: {reason}")
    return "\n".join([f"{call}: no backend", *lines])
