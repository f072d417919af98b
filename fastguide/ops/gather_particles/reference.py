"""Replaces particles by their ancestors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather_particles_"]


def gather_particles_(ancestors: Tensor, *states: Tensor) -> None:
    """Replaces every particle by its ancestor, in place. See `fastguide.ops.gather_particles_`.

        state[b, k] = state[b, ancestors[b, k]]

    Args:
        ancestors: ``[B, K]`` or ``[K]``, integers in ``[0, K)``.
        *states: Tensors ``[B, K, *event]``, or ``[K, *event]`` for ancestors ``[K]``.
    """
    ancestors = ancestors.to(torch.int64, copy=True)  # a state may share their memory
    for state in states:
        if state.is_floating_point() and state.element_size() == 1:
            state = state.view(torch.uint8)  # torch.gather does not support float8
        dim = ancestors.ndim - 1
        index = ancestors.reshape(ancestors.shape + (1,) * (state.ndim - ancestors.ndim))
        state.copy_(torch.gather(state, dim, index.expand(state.shape)))
