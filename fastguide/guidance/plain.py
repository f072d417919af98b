"""Sampling the prior itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..profiling import phase
from .base import Run, State


@dataclass(frozen=True)
class Plain:
    """The reverse step alone, without guidance: DDIM at ``eta = 0``, DDPM at ``eta = 1``.

    Source:
        Song, Meng, Ermon 2021.
    """

    def prepare(self, run: Run) -> Plain:
        return self

    def start(self, run: Run) -> State:
        return State(run.initial())

    def step(self, run: Run, state: State, i: int) -> State:
        with torch.set_grad_enabled(run.differentiable), phase("network"):
            output, unconditional, guidance_scale = run.outputs(state.x, i)
        with torch.set_grad_enabled(run.differentiable), phase("step"):
            result = run.reverse_step(
                state.x,
                output,
                i,
                prediction=run.denoiser.prediction,
                unconditional=unconditional,
                guidance_scale=guidance_scale,
                return_x0=run.keep_x0_hat,
                blamed=("net", "", "unconditional"),
            )
        return State(result[0], x0_hat=result[1]) if run.keep_x0_hat else State(result)
