"""A trained network and its schedule, as what every sampler asks for: ``x0_hat = E[x_0 | x_t]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import reference
from .schedules import Level, Schedule

__all__ = ["Conditional", "Denoiser"]

Net = Callable[[Tensor, Tensor], Tensor]


class Conditional:
    """A network with what it takes beside ``x`` and ``t``: ``net(x, t, **conditions)``, each sample with the rows of
    its observation, whatever particles and chunks there are.

    ``conditions``: tensors, or nested tuples, lists and dicts of them, with a row for each observation or one for all;
    what is no tensor is passed on as it is.
    """

    def __init__(self, net: Callable[..., Tensor], **conditions: Any):
        if not callable(net):
            raise TypeError(f"net: expected a callable net(x, t, ...), got {type(net).__name__}")
        self.net, self.conditions = net, conditions
        self.observations = 1  # or those that have rows of their own
        for name, value in conditions.items():
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor):
                    continue
                rows = len(leaf) if leaf.ndim else 0
                if rows not in (1, self.observations) and (rows == 0 or self.observations != 1):
                    raise ValueError(
                        f"{name}: expected one row, or one for each of as many observations as the other conditions "
                        f"have, got shape {list(leaf.shape)}"
                    )
                self.observations = max(rows, self.observations)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """``rows`` ``[N]``: the observation of each sample; None is one sample for each."""
        if rows is None and self.observations not in (1, len(x)):
            raise ValueError(f"x: expected a sample for each of the {self.observations} conditions, got {len(x)}")

        def of_samples(value: Tensor) -> Tensor:
            if len(value) == 1:
                return value.expand(len(x), *value.shape[1:])
            return value if rows is None else value[rows]

        return self.net(x, t, **tree_map_only(Tensor, of_samples, self.conditions))


class Denoiser:
    """A network with its schedule and what it predicts.

    ``net(x, t)``: ``x`` is ``[N, *event]``, ``t`` is ``[N]`` in the schedule's own time (int64 step index of
    a table, else float32 or, with ``x``, float64: sigma for VE/EDM, [0, 1] for flow); returns a tensor like ``x``.

    ``prediction``, with ``x_t = alpha x_0 + sigma eps``: ``"epsilon"`` eps; ``"sample"`` x_0; ``"score"``
    ``-eps / sigma``; ``"v"`` ``alpha eps - sigma x_0``; ``"flow"`` ``eps - x_0``.

    ``unconditional``: a second network of the same kind; then the prediction is
    ``unconditional + guidance_scale * (net - unconditional)``, classifier-free guidance (Ho & Salimans 2021). Either
    may be a `Conditional`, with labels or prompts for each observation.

    Samplers differentiate through ``net``; its parameters take no part, so freeze them to save memory.
    """

    def __init__(
        self,
        net: Net,
        schedule: Schedule,
        prediction: str = "epsilon",
        *,
        unconditional: Net | None = None,
        guidance_scale: float | None = None,
    ):
        if not callable(net):
            raise TypeError(f"net: expected a callable net(x, t), got {type(net).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a fastguide.schedules schedule, got {type(schedule).__name__}")
        if prediction not in reference.PREDICTIONS:
            raise ValueError(f"prediction: expected one of {reference.PREDICTIONS}, got {prediction!r}")
        if unconditional is not None and not callable(unconditional):
            raise TypeError(f"unconditional: expected a callable net(x, t), got {type(unconditional).__name__}")
        if (unconditional is None) != (guidance_scale is None):
            raise ValueError(
                "unconditional, guidance_scale: expected both or neither, "
                f"got unconditional={unconditional!r}, guidance_scale={guidance_scale!r}"
            )
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.unconditional = unconditional
        self.guidance_scale = guidance_scale

    def __repr__(self) -> str:
        return f"Denoiser({type(self.net).__name__}, {self.schedule}, {self.prediction!r})"

    def __call__(self, x: Tensor, level: Level, rows: Tensor | None = None) -> Tensor:
        """The network's prediction at one level for ``x`` ``[N, *event]``; shape and dtype of ``x``. ``rows`` ``[N]``:
        the observation of each sample, for a `Conditional`."""
        self.check_level(level)
        # Not in a half of x: bfloat16 would leave eight bits of a time.
        dtype = torch.int64 if self.schedule.discrete else torch.promote_types(x.dtype, torch.float32)
        if isinstance(level.t, Tensor):
            t = level.t.to(dtype).expand(x.shape[0]).contiguous()
        else:
            t = torch.full((x.shape[0],), level.t, dtype=dtype, device=x.device)
        output = self._evaluate("net", self.net, x, t, rows)
        if self.unconditional is not None and self.guidance_scale is not None:
            base = self._evaluate("unconditional", self.unconditional, x, t, rows)
            output = base + reference.scaled(output - base, self.guidance_scale)
        return output

    def x0_hat(self, x: Tensor, level: Level, rows: Tensor | None = None) -> Tensor:
        """``E[x_0 | x_t]`` (Tweedie's formula) for ``x`` ``[N, *event]`` at one level; ``rows`` as in a call."""
        output = self(x, level, rows)
        # In float32 also for halves: x / alpha alone leaves float16 where alpha is small.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x0 = reference.x0_from_output(x.to(dtype), output.to(dtype), level.alpha, level.sigma, self.prediction)
        return x0.to(x.dtype)

    def check_level(self, level: Level) -> None:
        """Raise if ``x0_hat`` cannot be had from this prediction type at a level."""
        if not isinstance(level.alpha, Tensor) and level.alpha == 0.0 and self.prediction in ("epsilon", "score"):
            raise ValueError(
                f"prediction: {self.prediction!r} does not determine x_0 where alpha = 0 (t = {level.t} of "
                f"{self.schedule}): expected 'sample', 'v' or 'flow' there, or levels that start below it"
            )

    def check_observations(self, number: int) -> None:
        """Raise unless there are conditions for as many observations, or one for all."""
        for name, net in (("net", self.net), ("unconditional", self.unconditional)):
            if isinstance(net, Conditional) and net.observations not in (1, number):
                raise ValueError(
                    f"shape: expected {net.observations} observations, for which {name} has conditions, got {number}"
                )

    @staticmethod
    def _evaluate(name: str, net: Net, x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
        output = net(x, t, rows) if isinstance(net, Conditional) else net(x, t)
        if not isinstance(output, Tensor):
            raise TypeError(f"{name}: expected it to return a tensor, got {type(output).__name__}")
        if output.shape != x.shape or output.device != x.device or not output.is_floating_point():
            raise ValueError(
                f"{name}: expected it to return a floating tensor of shape {list(x.shape)} on {x.device}, "
                f"got {output.dtype} of shape {list(output.shape)} on {output.device}"
            )
        if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            # x0_hat would keep a graph through x alone, and a gradient without the network's part
            raise ValueError(
                f"{name}: expected a network that autograd can differentiate, got an output without a graph"
            )
        return output.to(x.dtype)
