"""Scheduler steps against diffusers' own: loops over a schedule, with outputs that cost nothing."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from ..cases import Absent, Case, Figure, Setting, case, rival

NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
NOISY = ("ddpm", "euler_ancestral")


def _scheduler(module: str, name: str, steps: int, device: torch.device) -> Any:
    try:
        scheduler = getattr(importlib.import_module(module), NAMES[name])()
    except ImportError as error:
        raise Absent(f"diffusers is not installed: {error}") from error
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _build(name: str, shape: tuple[int, ...], fused_noise: bool, at_least: float, setting: Setting) -> Case:
    steps = setting.pick(20, 3)
    x = setting.randn(*setting.pick(shape, (1, 4, 8, 8)))
    output = setting.randn(*x.shape, seed=1)

    def run(scheduler: Any, follow: bool = False, seed: int = 0, steps: int = steps) -> torch.Tensor:
        """Takes each step from the same state, or with ``follow`` from the last one."""
        scheduler.is_scale_input_called, scheduler._step_index, scheduler.lower_order_nums = True, None, 0
        generator = torch.Generator(x.device).manual_seed(seed)
        options = {"generator": generator} if name in NOISY else {}
        state = x
        for t in scheduler.timesteps[:steps]:
            x_s = scheduler.step(output, t, state, return_dict=False, **options)[0]
            state = x_s if follow else x
        return x_s

    ours = _scheduler("fastguide.integrations.diffusers", name, steps, x.device)

    def check() -> None:
        theirs = _scheduler("diffusers", name, steps, x.device)
        torch.testing.assert_close(run(ours, follow=True), run(theirs, follow=True), rtol=1e-3, atol=1e-3)
        ours.fused_noise = fused_noise
        if fused_noise:  # noise of the same size, and none in the last step
            torch.testing.assert_close(run(ours), run(theirs), rtol=1e-3, atol=1e-3)
            first = run(theirs, steps=1)
            apart, expected = ((run(s, seed=1, steps=1) - first).std() for s in (ours, theirs))
            assert abs(apart / expected - 1.0) < (0.01 if x.numel() > 1e6 else 0.2)
        assert not ours.parent_calls

    return Case(
        f"{NAMES[name]}{', fused noise' if fused_noise else ''}, {steps} steps of {list(x.shape)} float32",
        elements=x.numel() * steps,
        bytes=None,
        ours=partial(run, ours),
        check=check,
        rivals=[
            rival(
                "diffusers",
                lambda: partial(run, _scheduler("diffusers", name, steps, x.device)),
                at_least=at_least,
            )
        ],
        figures=lambda seconds: [Figure("ours, one step", seconds / steps * 1e6, "us")],
    )


for _name in NAMES:
    for _size, _shape, _target in (("small", (1, 4, 8, 8), 12.0), ("large", (16, 3, 256, 256), 8.0)):
        for _fused in (False, True) if _name in NOISY else (False,):
            _kind = f"{_name}{'-fused_noise' if _fused else ''}-{_size}"
            case(f"integrations/diffusers-{_kind}")(partial(_build, _name, _shape, _fused, _target))
