"""The reverse step.

Every rival computes ``x_s = a x + b clip(p x + q eps) + tau z`` from the same five numbers, with the fewest passes that
plain PyTorch can do it in, and writes where it did before (``out=``), as ours does but for the small step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastguide as fg
from fastguide import ops, reference
from fastguide.ops._arguments import Coefficients
from fastguide.sampling import noise

from ..cases import NEW, Absent, Call, Case, Figure, Setting, case, close, compiled, ends, rival

SEED, STEP = 7, 3
SHAPES = (64, 3, 256, 256), (4, 3, 8, 8), (1024, 4, 256, 256)  # on the CPU, quick, on a GPU


def coefficients(eta: float, index: int = 600) -> Coefficients:
    """The step from a table index of DDPM's linear betas to the index 20 below: one of 50 steps."""
    schedule = fg.schedules.vp_linear(1000)
    t, s = schedule.level(index), schedule.level(index - 20)
    return t.alpha, t.sigma, s.alpha, s.sigma, noise(t, s, eta)


def multipliers(values: Coefficients) -> tuple:
    """``p, q, a, b, tau`` for a network that predicts the noise."""
    alpha_t, sigma_t = values[:2]
    return 1.0 / alpha_t, -sigma_t / alpha_t, *reference.step_coefficients(values)


class Eager:
    """The step in eager PyTorch, in buffers that are reused. Coefficients are all numbers, or all ``[N, 1, ...]``."""

    def __init__(self, x: Tensor, eps: Tensor, numbers: tuple, clip: float | None):
        self.x, self.eps, self.numbers, self.clip = x, eps, numbers, clip
        self.x0, self.z, self.out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    def __call__(self) -> Tensor:
        if isinstance(self.numbers[4], Tensor) or self.numbers[4] > 0.0:
            torch.randn(self.z.shape, out=self.z)
        return self.step()

    def step(self) -> Tensor:
        p, q, a, b, tau = self.numbers
        torch.mul(self.x, p, out=self.x0)
        _add(self.x0, q, self.eps)
        if self.clip is not None:
            self.x0.clamp_(-self.clip, self.clip)
        torch.mul(self.x, a, out=self.out)
        _add(self.out, b, self.x0)
        if isinstance(tau, Tensor) or tau > 0.0:
            _add(self.out, tau, self.z)
        return self.out


def _add(to: Tensor, factor: float | Tensor, value: Tensor) -> None:
    if isinstance(factor, Tensor):
        to.addcmul_(value, factor)
    else:
        to.add_(value, alpha=factor)


def fused(numbers: tuple, clip: float | None, out: Tensor, x: Tensor, eps: Tensor, z: Tensor | None = None) -> None:
    """The step as one expression, for a compiler to fuse; draws the noise where none is given."""
    p, q, a, b, tau = numbers
    x0 = p * x + q * eps
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    x_s = a * x + b * x0
    if isinstance(tau, Tensor) or tau > 0.0:
        x_s = x_s + tau * (torch.randn_like(x) if z is None else z)
    out.copy_(x_s)


def _case(
    setting: Setting,
    what: str,
    values: Coefficients,
    *,
    shape: tuple[int, ...],
    clip: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    targets: dict[str, dict[str, float]] | None = None,
    keep: bool = True,
    **options,
) -> Case:
    x, eps = setting.randn(*shape, dtype=dtype), setting.randn(*shape, dtype=dtype, seed=1)
    columns = (-1,) + (1,) * (len(shape) - 1)
    numbers = tuple(v.to(dtype).reshape(columns) if isinstance(v, Tensor) else v for v in multipliers(values))
    eager = Eager(x, eps, numbers, clip)
    new = partial(ops.reverse_step, x, eps, values, clip=clip, seed=SEED, step=STEP)
    ours = partial(new, out=torch.empty_like(x)) if keep else new
    step = partial(fused, numbers, clip, eager.out)
    noisy = isinstance(numbers[4], Tensor) or numbers[4] > 0.0

    def check() -> None:
        got = ours()
        for rows in ends(shape[0]):
            part = tuple(v[rows] if isinstance(v, Tensor) else v for v in values)
            expected = reference.reverse_step(
                x[rows].double(), eps[rows].double(), part,
                clip=clip, seed=SEED, step=STEP, first_particle=rows.start,
            )  # fmt: skip
            close(got[rows], expected)
        # with our noise, the rivals must compute the same
        eager.z.copy_(ops.randn(shape, seed=SEED, step=STEP, dtype=dtype, device=setting.device))
        close(eager.step(), got, factor=4)
        step(x, eps, eager.z)
        close(eager.out, got, factor=4)

    targets = targets or {}
    rivals = [rival("eager, out=", lambda: eager, **targets.get("eager", {}))]
    if keep:
        rivals.append(rival(NEW, lambda: new))
    if noisy:
        rivals += [
            rival("torch.compile", lambda: compiled(setting, step, x, eps), **targets.get("compile", {})),
            rival(
                "torch.compile, fallback_random",
                lambda: compiled(setting, step, x, eps, fallback_random=True),
                **targets.get("fallback", {}),
            ),
            rival(
                "torch.compile, given the noise",
                lambda: compiled(setting, step, x, eps, eager.z),
                **targets.get("given", {}),
            ),
        ]
    else:
        rivals.append(rival("torch.compile", lambda: compiled(setting, step, x, eps)))
    return Case(
        f"{what}, {list(shape)} {dtype}",
        elements=x.numel(),
        bytes=3 * x.nbytes,  # x and the network's output in, x_s out
        ours=ours,
        check=check,
        rivals=rivals,
        backend=setting.backend("reverse_step", dtype),
        **options,
    )


ON_CPU = {
    "eager": {"at_least": 12.0},
    "compile": {"at_least": 40.0},
    "fallback": {"at_least": 8.0},
    "given": {"at_least": 1.0},
}
ON_GPU = {"eager": {"at_least": 5.0}, "compile": {"at_least": 1.2}}


@case("reverse_step/stochastic")
def stochastic(setting: Setting) -> Case:
    return _case(
        setting,
        "DDIM, eta = 1, clipped, noise made inside",
        coefficients(1.0),
        shape=setting.pick(*SHAPES),
        targets=ON_GPU if setting.device.type == "cuda" else ON_CPU,
        copy_at_most=1 / 0.85 if setting.device.type == "cuda" else None,
    )


@case("reverse_step/deterministic")
def deterministic(setting: Setting) -> Case:
    shape = setting.pick(*SHAPES)
    return _case(setting, "DDIM, eta = 0, clipped", coefficients(0.0), shape=shape, triad_at_most=1.2)


@case("reverse_step/float16")
def float16(setting: Setting) -> Case:
    shape = setting.pick(*SHAPES)
    return _case(setting, "eta = 1, clipped", coefficients(1.0), shape=shape, dtype=torch.float16)


@case("reverse_step/bfloat16")
def bfloat16(setting: Setting) -> Case:
    return _case(
        setting,
        "eta = 1, clipped",
        coefficients(1.0),
        shape=setting.pick(*SHAPES),
        dtype=torch.bfloat16,
        copy_at_most=1 / 0.7 if setting.device.type == "cuda" else None,
    )


@case("reverse_step/per-sample-levels")
def per_sample(setting: Setting) -> Case:
    shape = setting.pick(*SHAPES)
    levels = [coefficients(1.0, 40 + 14 * i) for i in range(shape[0])]
    values = tuple(torch.tensor(column, device=setting.device) for column in zip(*levels, strict=True))
    return _case(setting, "eta = 1, clipped, a level of its own for each sample", values, shape=shape)


@case("reverse_step/small")
def small(setting: Setting) -> Case:
    """A chunk of actions, which is small: the time is overhead. No clip: it costs diffusers a pass and us nothing."""
    shape, values = (1, 16, 7), coefficients(1.0)
    found = _case(
        setting,
        "eta = 1, noise made inside",
        values,
        shape=shape,
        clip=None,
        keep=False,
        figures=lambda seconds: [Figure("ours, one step", seconds * 1e6, "us", at_most=5.0)],
    )
    x, eps = setting.randn(*shape), setting.randn(*shape, seed=1)
    schedulers = [
        rival(f"diffusers {build.__name__}", partial(build, x, eps, values), at_least=12.0) for build in (DDIM, DDPM)
    ]
    found.rivals = [*schedulers, *found.rivals]
    return found


def _scheduler(kind: str):
    try:
        import diffusers
    except ImportError as error:
        raise Absent(f"diffusers is not installed: {error}") from error
    scheduler = getattr(diffusers, kind)(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(50)
    return scheduler


def DDIM(x: Tensor, eps: Tensor, values: Coefficients) -> Call:
    """``DDIMScheduler.step`` for the same step as ours."""
    step = partial(_scheduler("DDIMScheduler").step, eps, 600, x, eta=1.0, return_dict=False)
    z = ops.randn(x.shape, seed=SEED, step=STEP, device=x.device)
    close(step(variance_noise=z)[0], ops.reverse_step(x, eps, values, seed=SEED, step=STEP))
    return step


def DDPM(x: Tensor, eps: Tensor, values: Coefficients) -> Call:
    """``DDPMScheduler.step`` for the same step as ours."""
    step = partial(_scheduler("DDPMScheduler").step, eps, 600, x, return_dict=False)
    theirs = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(0))
    ours = ops.randn(x.shape, seed=SEED, step=STEP, device=x.device)
    expected = ops.reverse_step(x, eps, values, seed=SEED, step=STEP) + values[4] * (theirs - ours)
    close(step(generator=torch.Generator(x.device).manual_seed(0))[0], expected)
    return step
