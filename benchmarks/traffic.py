"""Bytes that a sampler reads and writes around its network, also for another checkout in a process of its own.

That process runs only this file, with the ``fastguide`` of the other checkout. So this file imports nothing from
`benchmarks`, and calls only what exists in both.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import fastguide as fg

# Kinds of operations. _NOTHING touches no element. _OVERWRITES writes the first argument and does not read it. For
# _SHAPES the first argument only gives a shape. _PICKS reads as many elements as it returns. _PUTS writes as many
# elements of the first argument as it is given.
_NOTHING = ("empty", "new_empty", "_lazy_clone", "set_", "resize_", "_unsafe_view", "lift_fresh")
_OVERWRITES = ("copy_", "fill_", "zero_")
_SHAPES = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
_PICKS = ("index", "index_select", "gather")
_PUTS = ("index_copy_", "index_put_", "_index_put_impl_")


def count(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What ``call`` returns, and the bytes that it reads and writes, by operation.

    A dispatch mode counts torch's operations: the argument tensors are read, the results are written. Views and
    allocations count nothing. An element that an expanded tensor repeats counts once. The mode is hidden from the
    package, because it would send the calls through the dispatcher; its kernels are counted where they are called. For
    `gather_particles_` the particles that move are counted. A lazy copy (copy on write) is not counted.
    """
    moved: Counter[str] = Counter()
    with _kernels(moved), _Mode(moved):
        result = call()
    return result, moved


class _Mode(TorchDispatchMode):
    def __init__(self, moved: Counter[str]):
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space != "fastguide" and not func.is_view and not name.startswith(_NOTHING):
            self.moved[name] += _of_torch(func._schema, name, args, kwargs or {}, results)
        return results


def _of_torch(schema: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> int:
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    new = [value for value, of in zip(_tuple(results), schema.returns, strict=False) if of.alias_info is None]
    moved, result = _bytes(new), _bytes(_tuple(results))
    for i, argument in enumerate(schema.arguments):
        size = _bytes(given.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed and name not in _OVERWRITES and not argument.is_out:
            size *= 2
        if i == 0 and name in _PICKS:
            size = min(size, result)
        if i == 0 and name in _PUTS:
            size = min(size // 2, _bytes(given.get("source", given.get("values"))))
        if i == 0 and name in _SHAPES:
            size = 0
        moved += size
    return moved


def _tuple(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple | list) else (results,)


def _bytes(values: Any) -> int:
    """The bytes of the tensors among ``values``."""
    total = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            sizes = (n for n, stride in zip(value.shape, value.stride(), strict=True) if stride or not n)
            total += functools.reduce(int.__mul__, sizes, value.element_size())
    return total


@contextlib.contextmanager
def _kernels(moved: Counter[str]) -> Iterator[None]:
    """Count the package's own operations: at the kernels, or in an older checkout at the public functions."""
    with contextlib.ExitStack() as patches:
        try:
            from fastguide.ops._operation import OPERATIONS
        except ImportError:  # an older checkout, in which a mode does not change the path of a call
            for name in fg.ops.__all__:
                if not isinstance(getattr(fg.ops, name), type):
                    counted = _counted(name, getattr(fg.ops, name), moved)
                    patches.enter_context(mock.patch.object(fg.ops, name, counted))
        else:
            patches.enter_context(mock.patch("fastguide.arguments._len_torch_dispatch_stack", lambda: 0))
            for operation in OPERATIONS.values():
                kernel = operation.kernels.get("cpu")
                if kernel is None:
                    continue
                module = sys.modules[kernel.__module__]
                launch = getattr(module, "_launch", None)  # small calls call this directly
                counted = _counted(operation.name, launch or kernel, moved)
                patches.enter_context(mock.patch.object(module, counted.__name__, counted))
                if launch is None:
                    patches.enter_context(mock.patch.dict(operation.kernels, cpu=counted))
                    patches.enter_context(mock.patch.dict(operation._chosen, clear=True))
        yield


def _counted(name: str, kernel: Callable[..., Any], moved: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        if name == "gather_particles_":
            moved[name] += _gathered(*(value for value in tree_leaves(args) if isinstance(value, Tensor)))
            return kernel(*args, **kwargs)
        results = kernel(*args, **kwargs) if out is None else kernel(*args, out=out, **kwargs)
        moved[name] += _bytes((args, kwargs, results))
        return results

    return call


def _gathered(ancestors: Tensor, *states: Tensor) -> int:
    found = ancestors.numpy()
    displaced = int((found != range(found.shape[-1])).sum())
    return _bytes(ancestors) + sum(2 * state.nbytes // max(1, found.size) * displaced for state in states)


# --- samplers with a network that costs nothing -------------------------------------------------------------


class _Network(torch.autograd.Function):
    """Returns an output that exists already; the backward pass returns the gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


METHODS = ("plain", "dps", "tds")


def sampler(method: str, shape: Sequence[int], steps: int, keeps: bool = True) -> Callable[[], Any]:
    """``fastguide.sample`` by ``method``: plain with a guidance scale, or DPS or TDS with half of an event measured.
    The noise of the measurement is so broad that few particles die. ``keeps``: whether the network returns the same
    tensor at every call. Otherwise it makes a new one, which is not counted."""

    def network(seed: int) -> Callable[..., Tensor]:
        output = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

        def new() -> Tensor:
            with _disable_current_modes():
                return output.clone()

        return lambda x, t: _Network.apply(x, output if keeps else new())

    free = {} if method != "plain" else dict(unconditional=network(1), guidance_scale=2.0)
    prior = fg.Denoiser(network(0), fg.schedules.vp_linear(1000), "v", **free)
    event = tuple(shape[1:])
    mask = torch.zeros(event, dtype=torch.bool)
    mask[..., : event[-1] // 2] = True
    noise = 0.5 * mask.sum().item() ** 0.5
    likelihood = fg.likelihoods.Gaussian(torch.zeros(1, int(mask.sum())), fg.operators.Inpainting(mask), noise)
    # DDPM's kernel in both checkouts: those before ``base_kernel`` know no other.
    ddpm = dict(base_kernel="ddpm") if "base_kernel" in inspect.signature(fg.TDS).parameters else {}
    guidance = {
        "plain": lambda: None,
        "dps": lambda: fg.DPS(likelihood, zeta=0.25),
        "tds": lambda: fg.TDS(likelihood, shape[0], covariance="isotropic", **ddpm),
    }[method]()
    batch = (1, *event) if method == "tds" else tuple(shape)
    return functools.partial(fg.sample, prior, batch, guidance=guidance, steps=steps, seed=7)


# --- another checkout ---------------------------------------------------------------------------------------


class Elsewhere:
    """The same sampler of another checkout, built in place, in a process that waits between the runs."""

    def __init__(self, checkout: Path, method: str, shape: Sequence[int], steps: int):
        self.checkout = checkout
        command = [sys.executable, "-P", __file__, str(checkout), method, str(steps), *map(str, shape)]
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(checkout)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._end = weakref.finalize(self, self._process.communicate)  # the process ends when its input ends

    def ask(self, word: str) -> Any:
        """``"run"`` returns the processor time in seconds. ``"count"`` returns the bytes by operation, and the mean and
        standard deviation of the samples."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer is reported below
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.checkout}: its process ended with status {self._process.wait()}")
        return json.loads(answer)


def processor_seconds(call: Callable[[], Any]) -> float:
    """The processor time of all threads, with the system's work for them. Other programs disturb it less than the
    elapsed time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def moments(samples: Any) -> list[float]:
    return [samples.x.double().mean().item(), samples.x.double().std().item()]


def _serve(checkout: str, method: str, steps: str, *shape: str) -> None:
    found = Path(fg.__file__).resolve().parents[1]
    if found != Path(checkout).resolve():
        raise ImportError(f"expected the fastguide of {checkout}, got that of {found}")
    run = sampler(method, tuple(map(int, shape)), int(steps))
    for line in sys.stdin:
        if line.strip() == "count":
            samples, moved = count(run)
            answer: Any = dict(moved=moved, moments=moments(samples))
        else:
            answer = processor_seconds(run)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
