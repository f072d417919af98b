"""The compiled modules, and a thin caller for each of their kernels.

A caller takes contiguous tensors whose device and dtype `fastguide.backends` has checked, and passes on
pointers, sizes and the stream: the modules know no PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the modules: the libgomp.so.1 that they ask for is then torch's, and so are the threads
from torch import Tensor

from .arguments import has_memory
from .reference import FAMILIES, PREDICTIONS, SCHEMES, Clip, Coefficients, Counted, DynamicThreshold, density_constant

__all__ = [
    "CPU_DTYPES",
    "CUDA_DTYPES",
    "Counter",
    "build_record",
    "gather_particles_cpu",
    "gather_particles_cuda",
    "instruction_set",
    "instruction_sets",
    "levels",
    "load_error",
    "loaded",
    "log_prob_and_gradient_cpu",
    "module",
    "propose_and_weigh_cpu",
    "randn_cpu",
    "randn_cuda",
    "resample_cpu",
    "resample_cuda",
    "reverse_step_cpu",
]

# The codes of csrc/common/dtype.h.
CPU_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
CUDA_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


# The codes of csrc/ops/log_prob_and_gradient/cpu.cpp and csrc/common/weights.h.
_FAMILY_CODES = {family: code for code, family in enumerate(FAMILIES)}
_SCHEME_CODES = {scheme: code for code, scheme in enumerate(SCHEMES)}


def build_record() -> dict[str, Any]:
    """What setup.py wrote of the build: compiler, flags, what became of CUDA. Empty without a build."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _installed_elsewhere(here: Path) -> Path | None:
    """Another copy of the package, that pip installed, where ``here`` shadows it."""
    for distribution in importlib.metadata.distributions(name="fastguide"):
        folder = Path(str(distribution.locate_file("fastguide"))).resolve()
        if (folder / "__init__.py").exists() and folder != here:
            return folder
    return None


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """Module ``name``, or why it is not there."""
    full, here, other, record = f"fastguide.{name}", Path(__file__).parent.resolve(), None, build_record()
    if (said := _build_of(name, record)) != "built":  # a file that is there is of an earlier build
        return None, f"{full} was not built: {said}"
    try:
        module = importlib.import_module(full)
        folder = Path(str(module.__file__)).parent.resolve()
        if folder == here:
            return module, ""
        other = folder  # an editable installation of other sources finds its own, for any package of this name
    except ModuleNotFoundError as error:
        if error.name != full:
            return None, f"{full} did not load: {error}"
    except ImportError as error:
        return None, f"{full} did not load: {error}"
    if not record:
        if other := other or _installed_elsewhere(here):
            return None, (
                f"{full} was not built: Python imported the sources in {here}, where no build has run, in place of the "
                f"copy that pip installed in {other}. `pip install -e {here.parent}` builds it here; from another "
                "folder Python finds the installed copy"
            )
        return None, f"{full} was not built: no build has run in {here} (`pip install -e {here.parent}` runs it)"
    return None, (
        f"{full} was built and is gone, or was built for another Python or from other sources "
        f"(`pip install -e {here.parent}` builds it)"
    )


def _build_of(name: str, record: dict[str, Any]) -> str:
    """What ``record`` says became of module ``name``: "built", unless it says otherwise."""
    if name != "_cuda":
        return record.get("cpu", {}).get(name.removeprefix("_cpu_"), "built")
    cuda = record.get("cuda", {"status": "built"})
    return cuda["status"] if cuda["status"] == "built" else f"{cuda['status']}, {cuda['reason']}"


def instruction_sets() -> list[str]:
    """Those for which this processor has a CPU module, the best first."""
    portable, error = _load("_cpu_portable")  # runs on every processor
    if portable is None:
        raise RuntimeError(error)
    return portable.instruction_sets()


def _load_cpu() -> tuple[ModuleType | None, str]:
    """The module of the best instruction set, or of the one that FASTGUIDE_ISA names; or why it is not there."""
    error = _load("_cpu_portable")[1]
    if error:
        return None, error
    found, wish = instruction_sets(), os.environ.get("FASTGUIDE_ISA")
    if wish and wish not in found:
        raise ValueError(
            f"FASTGUIDE_ISA: expected one of {', '.join(found)} (this processor has no others), got {wish!r}"
        )
    return _load(f"_cpu_{wish or found[0]}")


_modules = {"cpu": _load_cpu(), "cuda": _load("_cuda")}


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """``with instruction_set("avx2"):`` runs the CPU kernels of its body with that one; for tests, as the bits are the
    same."""
    if isa not in (found := instruction_sets()):
        raise ValueError(f"isa: expected one of {', '.join(found)} (this processor has no others), got {isa!r}")
    before, loaded = _modules["cpu"], _load(f"_cpu_{isa}")
    if loaded[0] is None:
        raise RuntimeError(loaded[1])
    _modules["cpu"] = loaded
    try:
        yield
    finally:
        _modules["cpu"] = before


def load_error(name: str) -> str:
    """Why the module of backend ``name`` is not there, or ``""``."""
    return _modules[name][1]


def loaded(name: str) -> bool:
    """Whether the module of backend ``name`` is there."""
    return _modules[name][0] is not None


def module(name: str) -> ModuleType:
    """The module of backend ``name``, "cpu" or "cuda"."""
    loaded, error = _modules[name]
    if loaded is None:
        raise RuntimeError(error)
    return loaded


def _rows(out: Tensor) -> tuple[int, int]:
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()} for shape {list(out.shape)}")
    particles = out.shape[0]
    return particles, out.numel() // particles if particles else 0


def randn_cpu(out: Tensor, seed: int, step: int, stream: int, first_particle: int) -> None:
    """Fill ``out [N, *event]``, on the CPU, with the standard normals of `fastguide.ops.randn`."""
    particles, elements = _rows(out)
    code, threads = CPU_DTYPES[out.dtype], torch.get_num_threads()
    module("cpu").randn(out.data_ptr(), code, particles, elements, seed, step, stream, first_particle, threads)


# The codes of csrc/common/step.h.
_PREDICTIONS = {name: code for code, name in enumerate(PREDICTIONS)}
_CLIP_NONE, _CLIP_RANGE, _CLIP_DYNAMIC = 0, 1, 2


def _clip_code(clip: float | tuple[float, float] | DynamicThreshold) -> tuple[int, float, float]:
    if isinstance(clip, DynamicThreshold):
        return _CLIP_DYNAMIC, float(clip.ratio), float(clip.max_value)
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    return _CLIP_RANGE, float(low), float(high)


Levels = Coefficients | tuple[float, ...] | Tensor  # five floats, or a float64 table [5, N]
Counter = tuple[Counted, Counted, int, int]  # seed, step, stream, first_particle; a tensor is refused or read


def levels(coefficients: Coefficients, particles: int) -> Levels:
    """Coefficients as the callers below take them."""
    if not any(isinstance(c, Tensor) for c in coefficients):
        return tuple(float(c) for c in coefficients)
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # torch's default device may be another
    return torch.stack([torch.as_tensor(c, **options).detach().expand(particles) for c in coefficients])


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy. Of freed storage torch would copy what stands at address 0."""
    if x.numel() and not has_memory(x):
        raise ValueError("the tensor has no memory")
    return x.contiguous()


def reverse_step_cpu(
    x: Tensor,
    model_output: Tensor,
    levels: Levels,
    prediction: str,
    clip: Clip,
    clip_noise: bool,
    displacement: Tensor | None,
    counter: Counter,
    return_x0: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastguide.ops.reverse_step` of CPU tensors. Levels and counters out of range, or of another kind than five
    floats and integers, are an error before anything is computed."""
    if not x.is_contiguous():
        x = _copied(x)
    if not model_output.is_contiguous():
        model_output = _copied(model_output)
    if not (displacement is None or displacement.is_contiguous()):
        displacement = _copied(displacement)
    x_s = torch.empty_like(x)
    x0 = torch.empty_like(x) if return_x0 else None
    kind, low, high = (_CLIP_NONE, 0.0, 0.0) if clip is None else _clip_code(clip)
    seed, step, stream, first_particle = counter
    module("cpu").reverse_step(
        x.data_ptr(),
        CPU_DTYPES[x.dtype],
        model_output.data_ptr(),
        CPU_DTYPES[model_output.dtype],
        None if displacement is None else displacement.data_ptr(),
        0 if displacement is None else CPU_DTYPES[displacement.dtype],
        x_s.data_ptr(),
        None if x0 is None else x0.data_ptr(),
        return_x0,
        _PREDICTIONS[prediction],
        kind,
        low,
        high,
        clip_noise,
        levels.data_ptr() if isinstance(levels, Tensor) else levels,
        x.shape,
        seed,
        step,
        stream,
        first_particle,
        torch.get_num_threads(),
    )
    return x_s if x0 is None else (x_s, x0)


def propose_and_weigh_cpu(
    x: Tensor,
    x0_hat: Tensor,
    displacement: Tensor,
    log_weights: Tensor,
    levels: Levels,
    counter: Counter,
) -> tuple[Tensor, Tensor]:
    """`fastguide.ops.propose_and_weigh` of CPU tensors; errors as in `reverse_step_cpu`."""
    if not x.is_contiguous():
        x = _copied(x)
    if not x0_hat.is_contiguous():
        x0_hat = _copied(x0_hat)
    if not displacement.is_contiguous():
        displacement = _copied(displacement)
    if not log_weights.is_contiguous():
        log_weights = _copied(log_weights)
    x_s, after = torch.empty_like(x), torch.empty_like(log_weights)
    seed, step, stream, first_particle = counter
    module("cpu").propose_and_weigh(
        x.data_ptr(),
        CPU_DTYPES[x.dtype],
        x0_hat.data_ptr(),
        CPU_DTYPES[x0_hat.dtype],
        displacement.data_ptr(),
        CPU_DTYPES[displacement.dtype],
        x_s.data_ptr(),
        log_weights.data_ptr(),
        after.data_ptr(),
        log_weights.dtype == torch.float64,
        levels.data_ptr() if isinstance(levels, Tensor) else levels,
        x.shape,
        seed,
        step,
        stream,
        first_particle,
        torch.get_num_threads(),
    )
    return x_s, after


@contextlib.contextmanager
def _cuda_stream(device: torch.device) -> Iterator[int]:
    """The current stream of ``device``, which is the current device meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _on_device(seed: Counted, step: Counted) -> tuple[tuple[int, int], tuple[int, int]]:
    """A seed and a step as numbers, and where on the device they stand instead, or 0."""
    values, places = zip(*((0, v.data_ptr()) if isinstance(v, Tensor) else (v, 0) for v in (seed, step)), strict=True)
    return values, places


def randn_cuda(out: Tensor, seed: Counted, step: Counted, stream: int, first_particle: int) -> None:
    """Fill ``out [N, *event]``, on a CUDA device, on the current stream; returns at once."""
    particles, elements = _rows(out)
    code = CUDA_DTYPES[out.dtype]
    numbers, places = _on_device(seed, step)
    with _cuda_stream(out.device) as queue:
        module("cuda").randn(
            out.data_ptr(), code, particles, elements, *numbers, stream, first_particle, *places, queue
        )


def resample_cpu(
    log_weights: Tensor,
    scheme: str,
    number: int,
    ess_threshold: float | None,
    seed: Counted,
    step: Counted,
    stream: int,
    first_row: int,
    sorted: bool,
) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The first row without a usable weight, or -1, and the results of `fastguide.ops.resample`. Counters out of range,
    or of another kind, are an error before anything is computed."""
    if not log_weights.is_contiguous():
        log_weights = _copied(log_weights)
    *rows, particles = log_weights.shape
    if number == particles:  # empty_like is the cheaper of the two
        ancestors = torch.empty_like(log_weights, dtype=torch.int32)
        after = torch.empty_like(log_weights)
    else:
        ancestors = torch.empty((*rows, number), dtype=torch.int32, device="cpu")
        after = torch.empty((*rows, number), dtype=log_weights.dtype, device="cpu")
    log_mean_weight = torch.empty(rows, dtype=torch.float64, device="cpu")
    ess = torch.empty_like(log_mean_weight)
    bad = module("cpu").resample(
        log_weights.data_ptr(),
        CPU_DTYPES[log_weights.dtype],
        rows[0] if rows else 1,
        particles,
        number,
        _SCHEME_CODES[scheme],
        sorted,
        math.inf if ess_threshold is None else float(ess_threshold * particles),
        seed,
        step,
        stream,
        first_row,
        ancestors.data_ptr(),
        after.data_ptr(),
        log_mean_weight.data_ptr(),
        ess.data_ptr(),
        torch.get_num_threads(),
    )
    return bad, (ancestors, after, log_mean_weight, ess)


def resample_cuda(
    log_weights: Tensor,
    scheme: str,
    number: int,
    ess_threshold: float | None,
    seed: Counted,
    step: Counted,
    stream: int,
    first_row: int,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `fastguide.ops.resample` for CUDA tensors, on the current stream; returns at once."""
    log_weights = log_weights.contiguous()
    *rows, particles = log_weights.shape
    ancestors = log_weights.new_empty((*rows, number), dtype=torch.int32)
    after = log_weights.new_empty((*rows, number))
    log_mean_weight = log_weights.new_empty(rows, dtype=torch.float64)
    ess = torch.empty_like(log_mean_weight)
    shape = rows[0] if rows else 1, particles, number, _SCHEME_CODES[scheme], sorted
    numbers, places = _on_device(seed, step)
    with _cuda_stream(log_weights.device) as queue:
        workspace = log_weights.new_empty(module("cuda").resample_workspace(*shape), dtype=torch.uint8)
        module("cuda").resample(
            log_weights.data_ptr(),
            log_weights.dtype == torch.float64,
            *shape,
            math.inf if ess_threshold is None else float(ess_threshold * particles),
            *numbers,
            stream,
            first_row,
            *places,
            ancestors.data_ptr(),
            after.data_ptr(),
            log_mean_weight.data_ptr(),
            ess.data_ptr(),
            workspace.data_ptr(),
            queue,
        )
    return ancestors, after, log_mean_weight, ess


def gather_particles_cpu(ancestors: Tensor, states: Sequence[Tensor]) -> int:
    """Move the particles of contiguous ``states`` to where ``ancestors`` ``[B, K]`` or ``[K]``, contiguous, say. The
    place of the first ancestor out of range, flat, and then nothing is moved; or -1."""
    particles = ancestors.shape[-1]
    rows = ancestors.numel() // particles if particles else 0
    wide = ancestors.dtype == torch.int64
    arrays = [(state.data_ptr(), state.nbytes // ancestors.numel()) for state in states] if rows else []
    threads = torch.get_num_threads()
    bad, _ = module("cpu").gather_particles(ancestors.data_ptr(), wide, rows, particles, arrays, threads)
    if bad < 0:  # written past autograd's eyes
        torch.autograd.graph.increment_version([state for state in states if not state.is_inference()])
    return bad


def gather_particles_cuda(ancestors: Tensor, states: Sequence[Tensor]) -> Tensor:
    """As `gather_particles_cpu`, on a CUDA device, on the current stream; returns at once, an int32 on the device: 0,
    or else an ancestor is out of range and nothing is moved."""
    particles = ancestors.shape[-1]
    rows = ancestors.numel() // particles if particles else 0
    flags = torch.empty(rows + 2, dtype=torch.int32, device=ancestors.device)
    arrays = [(state.data_ptr(), state.nbytes // ancestors.numel()) for state in states] if rows else []
    cuda = module("cuda")
    workspace = flags.new_empty(cuda.gather_workspace(rows, particles, arrays), dtype=torch.uint8)
    with _cuda_stream(ancestors.device) as queue:
        cuda.gather_particles(
            ancestors.data_ptr(), ancestors.dtype == torch.int64, rows, particles, arrays, flags.data_ptr(),
            workspace.data_ptr(), workspace.nbytes, queue,
        )  # fmt: skip
    torch.autograd.graph.increment_version([state for state in states if not state.is_inference()])
    return flags[-1]


def log_prob_and_gradient_cpu(
    z: Tensor,
    y: Tensor,
    family: str,
    scale: float,
    df: float | None,
    background: float,
    added: Tensor | None,
    rows: Tensor | None,
    return_gradient: bool,
) -> tuple[int, Tensor, Tensor | None]:
    """The results of `fastguide.ops.log_prob_and_gradient`, after the place of the first of ``rows`` out of range (then
    they mean nothing) or -1. float16 and bfloat16 are read and written in ``z`` alone."""
    wide = torch.float64 in (z.dtype, y.dtype)
    dtype = torch.float64 if wide else torch.float32
    state = (z.double() if wide else z).contiguous()
    y = y.to(dtype).contiguous()
    added = None if added is None else added.to(dtype).contiguous()
    rows = None if rows is None else rows.contiguous()
    samples, elements = z.shape[0], math.prod(z.shape[1:])
    log_prob = torch.empty(samples, dtype=torch.float64, device="cpu")
    gradient = torch.empty_like(state, memory_format=torch.contiguous_format) if return_gradient else None

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    bad = module("cpu").log_prob_and_gradient(
        _FAMILY_CODES[family], scale, df or 0.0, background, density_constant(family, scale, df, added is not None),
        CPU_DTYPES[state.dtype], samples, elements, state.data_ptr(), y.data_ptr(), y.shape[0], pointer(rows),
        pointer(added), 0 if added is None else added.shape[0], log_prob.data_ptr(), pointer(gradient),
        torch.get_num_threads(),
    )  # fmt: skip
    return bad, log_prob, gradient if gradient is None else gradient.to(z.dtype)
