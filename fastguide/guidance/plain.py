"""Sampling the prior itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from ..ranges import phase
from .base import Run, State


@dataclass(frozen=True)
class Plain:
    """The reverse step alone: DDIM at ``eta = 0``, DDPM at ``eta = 1`` (Song, Meng, Ermon 2021)."""

    def prepare(self, run: Run) -> Plain:
        return self

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        denoiser, level = run.denoiser, run.level(i)
        with torch.no_grad(), phase("network"):
            (output,) = run.in_chunks(lambda rows, x: (denoiser(x, level, rows),), state.x)
        with phase("step"):
            x = ops.reverse_step(
                state.x,
                output,
                run.coefficients(i),
                prediction=denoiser.prediction,
                clip=run.clip,
                **run.counter(i),
            )
        assert isinstance(x, torch.Tensor)  # no x0_hat was asked for
        return State(x)
