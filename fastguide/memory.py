"""A cache of large memory blocks: a block that nothing uses any more is given out again.

A C library maps a large block on allocation and unmaps it when it is freed. The page faults of the next block then cost
more than most passes over it. A loop avoids them with a `Memory` of its own. A GPU needs none, since torch caches its
memory.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import traced, transformed

__all__ = ["Memory"]

_LEAST = 1 << 20  # bytes; the C library itself caches smaller blocks
_LEAST_OF_SHORT_RUNS = 4 << 20  # bytes; with blocks of 1 MiB, runs of 4 to 10 steps took 8 to 24 % longer
_BLOCKS = 8  # most blocks kept: the state, the next state, x0_hat, the measurement, and four for a gradient


def _holders(block: torch.UntypedStorage) -> tuple[int, int]:
    """The number of holders of a block: Python's references, then those of tensors, graphs, arrays and capsules."""
    return sys.getrefcount(block), torch._C._storage_Use_Count(block._cdata)


_NOBODYS = deque([torch.UntypedStorage(1)])  # a block without other holders, kept as a `Memory` keeps its blocks


def _large(x: Tensor, size: int | None = None) -> bool:
    """Whether a result should come from the cache: a large CPU block that neither autograd nor a tracer sees.

    ``size`` is in bytes; None takes the size of ``x``.
    """
    if not x.is_cpu or type(x) is not Tensor or (x.nbytes if size is None else size) < _LEAST or not x.is_contiguous():
        return False
    return not (traced() or transformed() or (x.requires_grad and torch.is_grad_enabled()))


class Memory:
    """The last large blocks that were given out. A block is given again only when nothing else holds it.

    A block is a storage. Everything that can read it later holds it: a tensor and its views, a graph, a numpy array, a
    DLPack capsule, the storage's own Python object. So what a user's function was handed and keeps does not change. A
    block in shared memory is not given again, since another process may hold it. A bare address holds nothing, as
    everywhere in torch.

    ``short_run``: the object lives for few steps. Only larger blocks are then cached, because blocks that are freed
    together go back to the system, and the next run pays for their page faults again.
    """

    def __init__(self, short_run: bool = False) -> None:
        self._short_run = short_run
        self._blocks: deque[torch.UntypedStorage] = deque(maxlen=_BLOCKS)
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Memory, (self._short_run,)  # a copy has blocks of its own

    def like(self, x: Tensor, *others: Any) -> Tensor | None:
        """Memory for a result like ``x``, computed from ``x`` and ``others``.

        None where torch's own memory is as good, or the result has a derivative. ``others`` need not be tensors.
        """
        least = _LEAST_OF_SHORT_RUNS if self._short_run else _LEAST
        return None if x.nbytes < least else self.shaped(x.shape, x, *others)

    def shaped(self, shape: Sequence[int], x: Tensor, *others: Any) -> Tensor | None:
        """Memory for a result of another shape and the dtype of ``x``, or None, see `like`."""
        size = math.prod(shape) * x.element_size()
        if not _large(x, size):
            return None
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others):
            return None
        with self._lock:
            alone = None
            for block in (*_NOBODYS, *self._blocks):
                holders = _holders(block)
                if alone is None:
                    alone = holders  # counted at run time: it depends on the Python version and torch's compiler
                elif holders == alone and block.nbytes() == size and not block.is_shared():
                    return torch.empty(0, dtype=x.dtype, device="cpu").set_(block, 0, shape)  # type: ignore[call-overload]
            result = torch.empty(shape, dtype=x.dtype, device="cpu")
            self._blocks.append(result.untyped_storage())
        return result

    def keep(self, x: Tensor) -> Tensor:
        """``x``, whose memory must be new, added to the cache."""
        if _large(x) and x.untyped_storage().nbytes() == x.nbytes:
            self._blocks.append(x.untyped_storage())
        return x

    def pair(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Memory for two results like ``x``, or None, see `like`."""
        first = self.like(x, *others)
        second = None if first is None else self.like(x, *others)
        return None if first is None or second is None else (first, second)

    def own(self, x: Tensor) -> Tensor:
        """``x`` itself where nobody can write into it, since nothing else holds its memory; else a copy.

        On a GPU always a copy: a network that replays a CUDA graph returns memory of the graph, which has no holder.
        """
        holders = []
        for tensor in (torch.empty(1, device="cpu"), x):
            alias = tensor.detach()  # without a graph, whose derivative looks at x
            storage = alias.untyped_storage()
            holders.append(_holders(storage))
        # Memory that torch did not allocate, such as an array's, cannot be resized; its holders are unknown.
        alone = _large(alias) and holders[0] == holders[1] and storage.resizable() and not storage.is_shared()
        return x if alone else self.copy(x)

    def copy(self, x: Tensor) -> Tensor:
        """``x.clone()``, with its derivative.

        The copy of a whole block shares the block's memory until one of the two is written to, or is asked for a
        writable address, as numpy does. Most networks only read.
        """
        if _large(x.detach()):
            storage = x.untyped_storage()
            if storage.nbytes() == x.nbytes and any(storage._cdata == block._cdata for block in self._blocks):
                return torch._lazy_clone(x)
        result = self.like(x)
        return x.clone() if result is None else result.copy_(x)
