"""Memory of large results that nobody holds any more, for the next ones.

A C library maps a large block afresh and gives it back when it is freed. The page faults of the next block then cost
more than most passes over it. A loop avoids them with a `Memory` of its own. A GPU needs none: torch keeps its memory.
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

_LEAST = 1 << 20  # bytes: smaller blocks mostly come from memory that the C library has kept
_BLOCKS = 8  # kept at most: the state, the next, x0_hat, the measurement, and four of a gradient on its way to x_t


def _holders(block: torch.UntypedStorage) -> tuple[int, int]:
    """How many hold it: Python's references, then those of tensors, graphs, arrays and capsules."""
    return sys.getrefcount(block), torch._C._storage_Use_Count(block._cdata)


_NOBODYS = deque([torch.UntypedStorage(1)])  # in a row as a `Memory`'s blocks, and held by nobody else


def _large(x: Tensor, size: int | None = None) -> bool:
    """Whether it is worth a thought: a large block on the CPU, seen by neither autograd nor a tracer. ``size``: in
    bytes, if it is not that of ``x``."""
    if not x.is_cpu or type(x) is not Tensor or (x.nbytes if size is None else size) < _LEAST or not x.is_contiguous():
        return False
    return not (traced() or transformed() or (x.requires_grad and torch.is_grad_enabled()))


class Memory:
    """The last large blocks that it gave out. It gives one again only when nobody else holds it.

    A block is a storage, and whatever can read it later holds it: a tensor and its views, a graph, an array of numpy, a
    DLPack capsule, the storage's own Python object. What was handed to a user's function and kept there therefore stays
    what it was. A block in shared memory, which another process may hold, is not given again. An address alone holds
    nothing, as everywhere in torch.
    """

    def __init__(self) -> None:
        self._blocks: deque[torch.UntypedStorage] = deque(maxlen=_BLOCKS)
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Memory, ()  # a copy has blocks of its own

    def like(self, x: Tensor, *others: Any) -> Tensor | None:
        """Memory for a result like ``x`` that is made of it and of ``others``, tensors or not; None where torch's own
        is as good, or the result has a derivative."""
        return self.shaped(x.shape, x, *others)

    def shaped(self, shape: Sequence[int], x: Tensor, *others: Any) -> Tensor | None:
        """The same for a result of another shape and the dtype of ``x``."""
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
                    alone = holders  # counted here and now: Python's versions and torch's compiler add some
                elif holders == alone and block.nbytes() == size and not block.is_shared():
                    return torch.empty(0, dtype=x.dtype, device="cpu").set_(block, 0, shape)  # type: ignore[call-overload]
            result = torch.empty(shape, dtype=x.dtype, device="cpu")
            self._blocks.append(result.untyped_storage())
        return result

    def keep(self, x: Tensor) -> Tensor:
        """``x``, new memory of the loop's own, as if it were given out."""
        if _large(x) and x.untyped_storage().nbytes() == x.nbytes:
            self._blocks.append(x.untyped_storage())
        return x

    def pair(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The same for two results."""
        first = self.like(x, *others)
        second = None if first is None else self.like(x, *others)
        return None if first is None or second is None else (first, second)

    def copy(self, x: Tensor) -> Tensor:
        """``x.clone()``, with its derivative. The copy of a whole block has the block's memory until one of the two is
        written to, or asked for an address to write to, as by numpy: most networks only read."""
        if _large(x.detach()):
            storage = x.untyped_storage()
            if storage.nbytes() == x.nbytes and any(storage._cdata == block._cdata for block in self._blocks):
                return torch._lazy_clone(x)
        result = self.like(x)
        return x.clone() if result is None else result.copy_(x)
