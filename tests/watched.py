"""Finds, without a GPU, what would break the capture of a loop: operations that wait for the device, or that read
values of the host. Tensors on the ``meta`` device stand in for those on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten.is_nonzero.default, _aten._unique2.default, _aten.bincount.default, _aten.repeat_interleave.Tensor,
    _aten._linalg_eigh.default, _aten.linalg_eig.default, _aten._linalg_svd.default,
}  # fmt: skip
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _COPIES:
            source, target = args[1::-1] if function is _aten.copy_.default else (args[0], None)
            device = kwargs.get("device") or source.device if target is None else target.device
            if source.device != device:
                raise RuntimeError(f"{function} copies from {source.device} to {device}")
        elif function in _WAITS and args[0].device.type != "cpu":
            raise RuntimeError(f"{function} waits for the device")
        elif function in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise RuntimeError(f"{function} by a mask waits for the device")
        return function(*args, **kwargs)


class _Making(TorchFunctionMode):
    """Refuses to make a tensor on a device from numbers of the host, which a dispatch mode does not see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor):
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            if device.type != "cpu":
                raise RuntimeError(f"torch.{function.__name__} copies from the host to {device}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises for what a graph cannot hold. Compiled functions run eagerly."""
    with torch.compiler.set_stance("force_eager"), _Making(), _Operations():
        yield
