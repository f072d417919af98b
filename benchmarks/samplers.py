"""Whole samplers: what of their time is not the network's own, and the same loops elsewhere.

The network's time is taken where it runs: its forward pass between two readings of the clock, its backward pass from
the moment the gradient in its output arrives to the moment the gradient in its input leaves. Beside that stand its bare
passes alone, on the inputs and gradients of a real run, in turn with the sampler.
"""

from __future__ import annotations

import math
import statistics
import sys
import types
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastguide as fg
from fastguide import digits, ops, sampling
from fastguide.guidance.base import STREAM_INITIAL
from fastguide.reference import step_coefficients

from . import timing, traffic
from .cases import Absent, Call, Case, Figure, Setting, case, cpu_only, rival

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
        """The same passes again, and nothing else."""
        for net, x, rest, gradients in self._passes:
            with torch.set_grad_enabled(bool(gradients)):
                x = x.detach().requires_grad_(bool(gradients))
                output = net(x, *rest)
            for i, gradient in enumerate(gradients, start=1):
                torch.autograd.grad(output, x, gradient, retain_graph=i < len(gradients))


def time_outside(
    device: torch.device, run: Callable[[Callable[[Net], Net]], object], times: int
) -> tuple[float, float]:
    """Seconds of ``run`` that are not its networks's, and their share; ``run`` wraps them in what it is given."""
    outside = []
    for _ in range(times):
        meter = Meter(device)
        start = timing.now(device)
        run(meter.wrap)
        total = timing.now(device) - start
        outside.append((total - meter.seconds, 1.0 - meter.seconds / total))
    seconds, shares = zip(*outside, strict=True)
    return statistics.median(seconds), statistics.median(shares)


def _unwrapped(net: Net) -> Net:
    return net


# --- the digits prior ---------------------------------------------------------------------------------------

NOISE = 0.1
PRIOR_MISS = 0.73  # how far the prior's own samples are from y, root mean square


def _guidances(decode: Net) -> dict[str, Callable]:
    """By name: from the likelihood of one row per observation, and the number of particles."""
    return {
        "plain": lambda likelihood, particles: None,
        "dps": lambda likelihood, particles: fg.DPS(likelihood, zeta=0.25),
        "pnp": lambda likelihood, particles: fg.PnP(likelihood, zeta=1.0),
        "pigdm": lambda likelihood, particles: fg.PiGDM(likelihood),
        "latent-pnp": lambda likelihood, particles: fg.LatentPnP(
            likelihood, decode, zeta=1.0, solver="gradient", iterations=8
        ),
        "tds": lambda likelihood, particles: fg.TDS(likelihood, particles),
        "fk": lambda likelihood, particles: fg.FK(likelihood, particles),
    }


METHODS = tuple(_guidances(_unwrapped))


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
            self.prior, self.decode = digits.prior(device=self.device), _unwrapped
        count = f"{self.observations} x {self.samples} {'particles' if self.weighted else 'samples'}"
        parameters = sum(p.numel() for p in self.prior.net.parameters())
        self.what = f"{method}, digits prior ({parameters:,} parameters), {count}, {self.steps} steps"

    def run(self, wrap: Callable[[Net], Net] = _unwrapped) -> fg.Samples:
        return fg.sample(**self.arguments(wrap), seed=1)

    def capture(self) -> Call:
        return partial(fg.capture(**self.arguments()), seed=1)

    def arguments(self, wrap: Callable[[Net], Net] = _unwrapped) -> dict[str, Any]:
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
        """Root mean square distance from ``y`` of ``x``, as many samples for each observation."""
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
    """deepinv's DPS of the same network, task and number of evaluations; its own noise levels (VP, linear betas)."""
    deepinv = _import_deepinv()
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
        num_steps=task.steps + 1,  # it counts the clean end
        weight=20.0,  # of 1 to 40, one that fits y as well as a sampler should
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


def _import_deepinv() -> types.ModuleType:
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


# --- a mixture in two dimensions ----------------------------------------------------------------------------


class Mixture:
    """25 equal modes on a grid: their exact denoiser ``net(x [N, 2], t [N])``, and ``log p(y)``. As on every such grid
    the coordinates are independent, so that five modes for each coordinate are all there is to compute."""

    def __init__(self, device: torch.device):
        self.grid, self.width = torch.arange(-2.0, 3.0, device=device), 0.15
        self.schedule = fg.schedules.vp_linear(1000)
        times = torch.arange(1000)
        levels = torch.stack([self.schedule.alpha(times), self.schedule.sigma(times)])
        self.levels = levels.to(device, torch.float32)  # looked up there: a graph waits for nobody
        self.matrix, self.scale = torch.tensor([[1.0, 0.6]], device=device), 0.25
        self.y = torch.tensor([[0.9]], device=device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels[:, t[:1].long()]  # one level for all
        variance = (alpha * self.width) ** 2 + sigma**2
        residual = x[..., None] - alpha * self.grid  # [N, 2, 5]
        share = torch.softmax(-0.5 * residual.square() / variance, dim=-1)
        return (share * (self.grid + alpha * self.width**2 / variance * residual)).sum(-1)

    def evidence(self) -> float:
        variance = (self.width**2 * self.matrix.square().sum() + self.scale**2).item()
        means = torch.cartesian_prod(self.grid, self.grid)
        residual = (self.y - means @ self.matrix.T).double()  # [25, 1]
        terms = -0.5 * (residual.square() / variance + math.log(2 * math.pi * variance))
        return torch.logsumexp(terms, 0).item() - math.log(len(means))


def eager_tds(model: Mixture, net: Net, particles: int, steps: int, resample: Callable[[Tensor], Tensor]) -> float:
    """Twisted diffusion sampling with the ``"moment"`` covariance of one measurement, as one writes it in PyTorch;
    ``resample(weights [K]) -> ancestors [K]``. Returns ``log p(y)``."""
    levels = model.schedule.levels(steps)
    matrix, y, scale = model.matrix, model.y, model.scale

    def log_density(residual: Tensor, variance: Tensor | float) -> Tensor:
        return -0.5 * (residual.square() / variance + torch.log(2 * math.pi * torch.as_tensor(variance)))[:, 0].double()

    def twist(x: Tensor, level: fg.schedules.Level) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        x0 = net(x, torch.full((particles,), level.t, device=x.device))
        z = x0 @ matrix.T  # [K, 1]
        (gradient,) = torch.autograd.grad(z.sum(), x)
        with torch.no_grad():
            column = level.sigma**2 / level.alpha * gradient  # C_t A^T, [K, 2]
            variance = (column @ matrix.T).clamp(min=0) + scale**2
            residual = y - z
            return x0.detach(), column * (residual / variance), log_density(residual, variance)

    top = levels[0]
    x = torch.randn(particles, 2, device=y.device) * math.hypot(top.alpha, top.sigma)
    x0, shift, log_prob = twist(x, top)
    log_weights = log_prob.clone()
    for i, (t, s) in enumerate(pairwise(levels), start=1):
        weights = torch.softmax(log_weights, 0)
        if 1.0 / weights.square().sum() < 0.5 * particles:
            ancestors = resample(weights)
            x, x0, shift, log_prob = (v[ancestors] for v in (x, x0, shift, log_prob))
            log_weights = (torch.logsumexp(log_weights, 0) - math.log(particles)).expand(particles)
        a, b, tau = step_coefficients((t.alpha, t.sigma, s.alpha, s.sigma, sampling.noise(t, s, 1.0)))
        x = a * x + b * x0
        if tau > 0:
            delta, z = b / tau * shift, torch.randn_like(x)
            x = x + tau * (delta + z)
            log_weights = log_weights - (delta * z + 0.5 * delta.square()).sum(1).double()
        if i < steps:
            x0, shift, new = twist(x, s)
        else:
            new = log_density(y - x @ matrix.T, scale**2)
        log_weights, log_prob = log_weights + new - log_prob, new
    return (torch.logsumexp(log_weights, 0) - math.log(particles)).item()


def _resample_particles(weights: Tensor) -> Tensor:
    from particles import resampling

    return torch.from_numpy(resampling.systematic(weights.numpy(), len(weights)))


def _resample_numpy(weights: Tensor) -> Tensor:
    positions = (np.arange(len(weights)) + np.random.random()) / len(weights)
    found = np.searchsorted(np.cumsum(weights.numpy()), positions)
    return torch.from_numpy(found).clamp_(max=len(weights) - 1)  # the sum may end below 1


def _resample_torch(weights: Tensor) -> Tensor:
    grid = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    positions = (grid + torch.rand((), device=weights.device)) / len(weights)
    return torch.searchsorted(weights.cumsum(0), positions).clamp_(max=len(weights) - 1)


class Points:
    """Twisted diffusion sampling of the mixture, of which one measurement is known."""

    def __init__(self, setting: Setting, particles: int, steps: int):
        self.device, self.samples, self.steps = setting.device, particles, steps
        self.model = model = Mixture(setting.device)
        self.likelihood = fg.likelihoods.Gaussian(model.y, fg.operators.Matrix(model.matrix), model.scale)
        self.what = f"TDS, mixture of 25 modes in two dimensions, K = {particles}, {steps} steps"

    def run(self, wrap: Callable[[Net], Net] = _unwrapped) -> fg.Samples:
        return fg.sample(**self.arguments(wrap), seed=0)

    def capture(self) -> Call:
        return partial(fg.capture(**self.arguments()), seed=0)

    def arguments(self, wrap: Callable[[Net], Net] = _unwrapped) -> dict[str, Any]:
        prior = fg.Denoiser(wrap(self.model), self.model.schedule, "sample")
        guidance = fg.TDS(self.likelihood, self.samples, covariance="moment")
        return dict(prior=prior, shape=(1, 2), guidance=guidance, steps=self.steps, device=self.device)

    def check(self, meter: Meter) -> None:
        found, exact = self.run(meter.wrap).log_evidence.item(), self.model.evidence()
        allowed = max(0.05, 20.0 * self.samples**-0.5)  # some four standard deviations, and the steps' share
        assert abs(found - exact) < allowed, f"log p(y) = {found}, expected {exact}"


@case("samplers/memory")
def memory(setting: Setting) -> Case:
    """The loop around a network that costs nothing, beside its kernel alone: copies, checks and page faults."""
    shape, steps = setting.pick((64, 3, 256, 256), (2, 3, 8, 8), (1024, 4, 256, 256)), 20
    eps = setting.randn(*shape)
    prior = fg.Denoiser(lambda x, t: eps, fg.schedules.vp_linear(1000))
    start = ops.randn(shape, seed=7, stream=STREAM_INITIAL, device=setting.device)
    levels = prior.schedule.levels(steps)
    coefficients = [
        (t.alpha, t.sigma, s.alpha, s.sigma, sampling.noise(t, s, 1.0)) for t, s in pairwise(levels)
    ]  # fmt: skip
    ours = partial(fg.sample, prior, shape, steps=steps, seed=7, device=setting.device)
    kept = torch.empty_like(eps), torch.empty_like(eps)

    def kernels() -> Tensor:
        x = start
        for i, values in enumerate(coefficients):
            x = ops.reverse_step(x, eps, values, seed=7, step=i, out=kept[i % 2])
        return x

    def check() -> None:
        torch.testing.assert_close(ours().x, kernels())  # the start is scaled by 1 to rounding

    return Case(
        f"{steps} plain steps of {list(shape)}, float32",
        elements=steps * eps.numel(),
        bytes=None,
        ours=ours,
        check=check,
        rivals=[rival("the kernel alone, into kept memory", lambda: kernels, at_most=1.2)],
        backend=setting.backend("reverse_step"),
    )


def _bytes(setting: Setting, method: str) -> Case:
    """Bytes and time around a network that costs nothing, beside those of another checkout."""
    cpu_only(setting)
    shape, steps = setting.pick((64, 3, 256, 256), (4, 3, 8, 8)), setting.pick(20, 4)
    ours, elements = traffic.sampler(method, shape, steps), steps * math.prod(shape)
    label = "--against" if setting.against is None else f"{timing.commit(setting.against)}, in a process of its own"
    counts: list[Counter[str]] = []  # ours, the same where networks keep no output, and the other checkout's
    other: list[traffic.Elsewhere] = []

    def elsewhere() -> Call:
        if setting.against is None:
            raise Absent("expected --against DIR, another checkout that is built in place")
        other.append(traffic.Elsewhere(setting.against, method, shape, steps))
        return partial(other[0].ask, "run")

    def check() -> None:
        samples, moved = traffic.count(ours)
        assert torch.equal(ours().x, samples.x), "counted, the sampler gives other samples"
        assert torch.isfinite(samples.x).all()
        _, of_new_outputs = traffic.count(traffic.sampler(method, shape, steps, keeps=False))
        counts[:] = [moved, of_new_outputs]
        for process in other:
            answer = process.ask("count")
            counts.append(Counter(answer["moved"]))
            torch.testing.assert_close(answer["moments"], traffic.moments(samples), rtol=1e-2, atol=1e-3)

    def figures(_: float) -> list[Figure]:
        here, of_new_outputs, *there = (c.total() / elements for c in counts)
        found = [
            Figure("bytes per element and step", here, ""),
            Figure("where the network makes a new output", of_new_outputs, ""),
        ]
        for total, process in zip(there, other, strict=True):
            found += [Figure("there", total, ""), Figure("ours of theirs", here / total, "", at_most=1 / 3)]
            spent = [(process.ask("run"), traffic.processor_seconds(ours)) for _ in range(setting.pick(3, 1))]
            theirs, own = map(statistics.median, zip(*spent, strict=True))
            found.append(Figure("time of the processor, theirs over ours", theirs / own, "x"))
        for name, c in zip(("here", "there"), (counts[0], *counts[2:]), strict=False):
            parts = ((operation, moved / elements) for operation, moved in c.most_common())
            found += [Figure(f"{name}: {operation}", moved, "") for operation, moved in parts if moved >= 0.1]
        return found

    return Case(
        f"{method}, network that costs nothing, {list(shape)}, float32, {steps} steps",
        elements=elements,
        bytes=None,
        ours=ours,
        check=check,
        rivals=[rival(label, elsewhere, at_least=2.0)],
        figures=figures,
    )


for _name in traffic.METHODS:
    case(f"samplers/bytes-{_name}")(partial(_bytes, method=_name))


@case("samplers/mixture-tds")
def mixture_tds(setting: Setting) -> Case:
    task = Points(setting, *setting.pick((100_000, 100), (4000, 60)))
    model, particles, steps, run = task.model, task.samples, task.steps, task.run
    exact = model.evidence()
    meter = Meter(setting.device, record=True)

    def eager(resample: Callable[[Tensor], Tensor]) -> Call:
        # Fewer particles tell as well whether it is the same algorithm.
        torch.manual_seed(0)
        found = eager_tds(model, model, setting.pick(10_000, particles), steps, resample)
        assert abs(found - exact) < 0.3, f"the eager loop finds log p(y) = {found}, expected {exact}"
        return partial(eager_tds, model, model, particles, steps, resample)

    def figures(_: float) -> list[Figure]:
        def eagerly(wrap: Callable[[Net], Net]) -> float:
            return eager_tds(model, wrap(model), particles, steps, resample)

        resample, times = _resample_particles if rivals[0].call else stand_in, setting.pick(3, 1)
        ours, share = time_outside(setting.device, run, times)
        theirs, their_share = time_outside(setting.device, eagerly, times)
        return [
            Figure("time outside the denoiser's passes", share, "of all"),
            Figure("of the eager loop", their_share, "of all"),
            Figure("seconds outside, the eager loop's over ours", theirs / ours, "x"),
        ]

    def with_particles() -> Call:
        cpu_only(setting)
        try:
            import particles as _  # noqa: F401
        except ImportError as error:
            raise Absent(f"particles is not installed (0.4 needs numpy < 2): {error}") from error
        return eager(_resample_particles)

    rivals = [rival("eager loop, resampling of particles", with_particles)]
    stand_in = _resample_numpy if setting.device.type == "cpu" else _resample_torch
    if rivals[0].absent:
        name = "numpy's" if stand_in is _resample_numpy else "torch's"
        rivals.append(rival(f"eager loop, resampling by {name} searchsorted", lambda: eager(stand_in)))
    rivals.append(rival("the denoiser's passes alone, same inputs", lambda: meter.replay))
    return Case(
        task.what,
        elements=particles * steps,
        bytes=None,
        ours=run,
        check=partial(task.check, meter),
        rivals=rivals,
        least_rounds=3,
        figures=figures,
    )


# --- captured -----------------------------------------------------------------------------------------------


def _captured(
    setting: Setting, build: Callable[[Setting], Digits | Points], eager: float, reduced: float | None
) -> Case:
    """A whole loop as one CUDA graph, against the same loop launched from Python."""
    if setting.device.type != "cuda":
        raise Absent("CUDA graphs run on a GPU")
    task = build(setting)
    ours = task.capture()

    def check() -> None:
        task.check(Meter(setting.device))
        found, expected = ours(), task.run()
        assert torch.equal(found.x, expected.x), "the graph gives other samples than the loop"

    def reduce_overhead() -> Call:
        @cache
        def compiled(net: Net) -> Net:
            net = torch.compile(net, mode="reduce-overhead")

            def begun(x: Tensor, t: Tensor) -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                return net(x, t)

            return begun

        return partial(task.run, compiled)

    return Case(
        f"{task.what}, one CUDA graph",
        elements=task.samples * task.steps,
        bytes=None,
        ours=ours,
        check=check,
        rivals=[
            rival("the same loop, eager", lambda: task.run, at_least=eager),
            rival(
                "the same, its network by torch.compile(mode='reduce-overhead')",
                reduce_overhead,
                **({} if reduced is None else {"at_least": reduced}),
            ),
        ],
        least_rounds=3,
    )


def _register(name: str, build: Callable[[Setting], Digits | Points], eager: float, reduced: float | None) -> None:
    case(name)(partial(_captured, build=build, eager=eager, reduced=reduced))


_register("samplers/graph-tds-mixture", lambda setting: Points(setting, 1024, 50), 10.0, 2.0)
_register("samplers/graph-tds", lambda setting: Digits(setting, "tds", 1, 1024), 10.0, 2.0)
_register("samplers/graph-dps", lambda setting: Digits(setting, "dps", 1, 1024), 3.0, None)
