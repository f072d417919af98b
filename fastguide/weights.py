"""The files of weights that ship with the package: safetensors, in float16."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

_Net = TypeVar("_Net", bound=nn.Module)


@functools.cache
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file. The tensors are shared, so they must not be written to.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("the shipped networks need safetensors: pip install fastguide[demo]") from error
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def load(kind: type[_Net], path: Path, name: str, device: torch.device | str, dtype: torch.dtype) -> _Net:
    """A new network of a kind, with the weights that a file has under a name; frozen, in eval mode."""
    tensors, metadata = read(path)
    prefix = name + "."
    with torch.device("cpu"):  # whatever torch's default device is
        net = kind(**json.loads(metadata["config"])[name])
    net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return net.to(device=device, dtype=dtype).eval().requires_grad_(False)


def pack(nets: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All weights as float16. The networks are rounded in place too, so that what is measured is what ships."""
    tensors: dict[str, Tensor] = {}
    for name, net in nets.items():
        net.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
        tensors |= {f"{name}.{k}": v.half().contiguous() for k, v in net.state_dict().items()}
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that `read` reads, and its folder where there is none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner can read
