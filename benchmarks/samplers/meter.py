"""The time that networks take within a sampler.

It is taken where they run: the forward pass between two readings of the clock, the backward pass from the moment the
gradient in the output arrives to the moment the gradient in the input leaves. Beside that stand the bare passes alone,
on the inputs and gradients of a real run, in turn with the sampler.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import timing

Net = Callable[..., Tensor]


class Meter:
    """Adds up the ``seconds`` that networks take within a sampler, backward passes included; with ``record``, keeps
    their inputs and the gradients in their outputs, for `replay`. On a GPU every reading waits for the device."""

    def __init__(self, device: torch.device, record: bool = False):
        self.device, self.record = device, record
        self.seconds = 0.0
        self._since = 0.0
        self._passes: list[tuple[Net, Tensor, tuple[Tensor, ...], list[Tensor]]] = []

    def wrap(self, net: Net) -> Net:
        def metered(x: Tensor, *rest: Tensor) -> Tensor:
            differentiable = torch.is_grad_enabled() and x.requires_grad
            gradients: list[Tensor] = []
            if differentiable:
                x = x.view_as(x)  # so that the hook sees the gradient from the network alone
                x.register_hook(self._stop)
            if self.record:
                self._passes.append((net, x.detach().clone(), rest, gradients))
            self._start()
            output = net(x, *rest)
            self._stop()
            if differentiable and output.requires_grad:
                output.register_hook(partial(self._start, gradients))
            return output

        return metered

    def _start(self, gradients: list[Tensor] | None = None, gradient: Tensor | None = None) -> None:
        if self.record and gradients is not None:
            gradients.append(gradient.clone())
        self._since = timing.now(self.device)

    def _stop(self, gradient: Tensor | None = None) -> None:
        self.seconds += timing.now(self.device) - self._since

    def replay(self) -> None:
        """Runs the same passes again, and nothing else."""
        for net, x, rest, gradients in self._passes:
            with torch.set_grad_enabled(bool(gradients)):
                x = x.detach().requires_grad_(bool(gradients))
                output = net(x, *rest)
            for i, gradient in enumerate(gradients, start=1):
                torch.autograd.grad(output, x, gradient, retain_graph=i < len(gradients))


def time_outside(
    device: torch.device, run: Callable[[Callable[[Net], Net]], object], times: int
) -> tuple[float, float]:
    """The seconds of ``run`` outside of its networks, and their share. ``run`` wraps its networks in its argument."""
    outside = []
    for _ in range(times):
        meter = Meter(device)
        start = timing.now(device)
        run(meter.wrap)
        total = timing.now(device) - start
        outside.append((total - meter.seconds, 1.0 - meter.seconds / total))
    seconds, shares = zip(*outside, strict=True)
    return statistics.median(seconds), statistics.median(shares)


def unwrapped(net: Net) -> Net:
    return net
