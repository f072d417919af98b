"""Every method on the digits prior, compared with the passes of the network alone."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastguide as fg
from fastguide import digits

from ..cases import Absent, Call, Case, Figure, Setting, case, rival
from .meter import Meter, Net, time_outside, unwrapped

NOISE = 0.1
PRIOR_MISS = 0.73  # how far the prior's own samples are from y, root mean square


def _guidances(decode: Net) -> dict[str, Callable]:
    """The methods by name: functions of the likelihood and the number of particles."""
    return {
        "plain": lambda likelihood, particles: None,
        "dps": lambda likelihood, particles: fg.DPS(likelihood, zeta=0.25),
        "pnp": lambda likelihood, particles: fg.PnP(likelihood, zeta=1.0),
        "pigdm": lambda likelihood, particles: fg.PiGDM(likelihood),
        "daps": lambda likelihood, particles: fg.DAPS(likelihood),
        "latent-pnp": lambda likelihood, particles: fg.LatentPnP(
            likelihood, decode, zeta=1.0, solver="gradient", iterations=8
        ),
        "tds": lambda likelihood, particles: fg.TDS(likelihood, particles),
        "fk": lambda likelihood, particles: fg.FK(likelihood, particles),
    }


METHODS = tuple(_guidances(unwrapped))


class Digits:
    """Three held-out digits whose lower half is missing: 128 samples each, or as many particles; 50 steps."""

    def __init__(self, setting: Setting, method: str, observations: int = 3, samples: int = 128):
        self.setting, self.method = setting, method
        self.device = setting.device
        self.observations, self.samples, self.steps = setting.pick((observations, samples, 50), (1, 8, 12))
        mask = torch.zeros(1, 8, 8, dtype=torch.bool, device=self.device)
        mask[:, :4] = True
        self.mask = mask
        self.operator = fg.operators.Inpainting(mask)
        truth = digits.held_out(device=self.device)[0][: self.observations]
        self.y = self.operator(truth)
        self.y = self.y + NOISE * setting.randn(*self.y.shape)
        self.weighted = method in ("tds", "fk")
        self.latent = method == "latent-pnp"
        if self.latent:
            self.prior, _, self.decode = digits.latent_prior(device=self.device)
        else:
            self.prior, self.decode = digits.prior(device=self.device), unwrapped
        count = f"{self.observations} x {self.samples} {'particles' if self.weighted else 'samples'}"
        parameters = sum(p.numel() for p in self.prior.net.parameters())
        self.what = f"{method}, digits prior ({parameters:,} parameters), {count}, {self.steps} steps"

    def run(self, wrap: Callable[[Net], Net] = unwrapped) -> fg.Samples:
        return fg.sample(**self.arguments(wrap), seed=1)

    def capture(self) -> Call:
        return partial(fg.capture(**self.arguments()), seed=1)

    def arguments(self, wrap: Callable[[Net], Net] = unwrapped) -> dict[str, Any]:
        prior = fg.Denoiser(wrap(self.prior.net), self.prior.schedule, self.prior.prediction)
        y = self.y if self.weighted else self.repeated_y()
        likelihood = fg.likelihoods.Gaussian(y, self.operator, NOISE)
        decode = wrap(self.decode) if self.latent else self.decode
        guidance = _guidances(decode)[self.method](likelihood, self.samples)
        event = (2, 4, 4) if self.latent else (1, 8, 8)
        shape = (self.observations if self.weighted else len(y), *event)
        return dict(prior=prior, shape=shape, guidance=guidance, steps=self.steps, device=self.device)

    def repeated_y(self) -> Tensor:
        return self.y.repeat_interleave(self.samples, 0)

    def miss(self, x: Tensor) -> float:
        """The root mean square distance of ``x`` from ``y``. All observations have equally many samples."""
        y = self.y.repeat_interleave(len(x) // self.observations, 0)
        return (self.operator(x) - y).square().mean().sqrt().item()

    def check(self, meter: Meter) -> None:
        out, metered = self.run(), self.run(meter.wrap)
        assert torch.equal(out.x, metered.x), "metered, the sampler gives other samples"
        x = self.decode(out.draw(8).flatten(0, 1) if self.weighted else out.x)
        assert torch.isfinite(x).all()
        assert x.abs().max() < 3, f"images in [-1, 1] reach {x.abs().max()}"
        miss = self.miss(x)
        assert self.method == "plain" or miss < PRIOR_MISS / 2, f"samples are {miss} from y; the prior's {PRIOR_MISS}"


def _digits(setting: Setting, method: str) -> Case:
    task = Digits(setting, method)
    meter = Meter(setting.device, record=True)
    rivals = [rival("the network's passes alone, same inputs", lambda: meter.replay)]
    if method == "plain":
        rivals.append(rival("the same loop with diffusers' DDPMScheduler", lambda: _diffusers(task)))
    if method == "dps":
        rivals.append(rival("deepinv.sampling.DPS", lambda: _deepinv(task)))
    aim = 0.05 if method in ("dps", "tds") else None

    def figures(_: float) -> list[Figure]:
        _, share = time_outside(setting.device, task.run, setting.pick(3, 1))
        return [Figure("time outside the network's passes", share, "of all", at_most=aim)]

    return Case(
        task.what,
        elements=task.observations * task.samples * task.steps,  # network evaluations of one sample
        bytes=None,
        ours=task.run,
        check=partial(task.check, meter),
        rivals=rivals,
        least_rounds=3,
        figures=figures,
    )


def _diffusers(task: Digits) -> Call:
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise Absent(f"diffusers is not installed: {error}") from error
    scheduler = DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    scheduler.set_timesteps(task.steps)
    count = task.observations * task.samples

    def call() -> Tensor:
        x = torch.randn(count, 1, 8, 8, device=task.device)
        with torch.no_grad():
            for t in scheduler.timesteps.tolist():
                times = torch.full((count,), t, device=task.device)
                x = scheduler.step(task.prior.net(x, times), t, x, return_dict=False)[0]
        return x

    return call


def _deepinv(task: Digits) -> Call:
    """deepinv's DPS with the same network, task and number of evaluations, but its own levels (VP, linear betas)."""
    deepinv = import_deepinv()
    schedule = task.prior.schedule
    times = torch.arange(1000)
    table = [v.to(task.device, torch.float32) for v in (schedule.alpha(times), schedule.sigma(times))]
    ratio = table[1] / table[0]
    evaluations = []

    class Denoiser(deepinv.models.Denoiser):
        """``E[x_0 | x_0 + sigma eps]`` by our network, at the nearest of its levels."""

        def forward(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
            t = (ratio - sigma).abs().argmin()
            alpha, sigma_t = table[0][t], table[1][t]
            evaluations.append(len(x))
            return alpha * (alpha * x) - sigma_t * task.prior.net(alpha * x, t.expand(len(x)))

    physics = deepinv.physics.Inpainting((1, 8, 8), mask=task.mask.float(), device=task.device)
    y = torch.zeros(task.observations * task.samples, 1, 8, 8, device=task.device)
    y[:, task.mask] = task.repeated_y()
    dps = deepinv.sampling.DPS(
        Denoiser().to(task.device),
        num_steps=task.steps + 1,  # deepinv counts the clean end too
        weight=20.0,  # of the weights 1 to 40, one that fits y as well as a sampler should
        minus_one_one=False,
        dtype=torch.float32,
        device=task.device,
    )

    def call() -> Tensor:
        return dps(y, physics)

    x = call()
    assert sum(evaluations) == len(y) * task.steps, f"{sum(evaluations)} evaluations, expected {len(y) * task.steps}"
    assert task.miss(x) < PRIOR_MISS / 2, f"deepinv's samples are {task.miss(x)} from y; the prior's {PRIOR_MISS}"
    return call


def import_deepinv() -> types.ModuleType:
    try:
        try:
            import deepinv
        except RuntimeError:
            # A torchvision wheel whose compiled operators do not fit this torch stumbles over registering them. deepinv
            # uses none of them here.
            sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
            import deepinv
    except (ImportError, RuntimeError) as error:
        raise Absent(f"deepinv is not installed: {error}") from error
    return deepinv


for _name in METHODS:
    case(f"samplers/digits-{_name}")(partial(_digits, method=_name))
