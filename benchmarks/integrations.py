"""The drop-ins against the projects whose calls they take over: the functions of `particles`, the samplers of
k-diffusion per step, FKD.

The threads of each are torch's (``OMP_NUM_THREADS``); `particles`, numba and numpy use one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fastguide.integrations import k_diffusion, particles
from fastguide.integrations.fkd import FKD

from .cases import Absent, Case, Figure, Setting, case, cpu_only, rival

# --- particles ----------------------------------------------------------------------------------------------

FUNCTIONS = (*particles.SCHEMES, "exp_and_normalise", "essl", "log_mean_exp")


def _their_resampling() -> Any:
    try:
        return importlib.import_module("particles.resampling")
    except ImportError as error:
        raise Absent(f"particles is not installed (0.4 needs numpy < 2): {error}") from error


def _check_particles(name: str, values: np.ndarray) -> None:
    ours = getattr(particles, name)
    np.random.seed(0)
    got = ours(values)
    try:
        theirs = getattr(_their_resampling(), name)
    except Absent:  # then numpy says what it can
        if name in particles.SCHEMES:
            copies, shares = np.bincount(got, minlength=len(values)), len(values) * values
            assert copies.sum() == len(values) == len(copies)
            if name in ("systematic", "ssp"):
                assert (np.abs(copies - shares) < 1 + 1e-6).all()
        else:
            w = np.exp(values - values.max())
            total = w.sum()
            expected = {
                "exp_and_normalise": w / total,
                "essl": total**2 / (w * w).sum(),
                "log_mean_exp": values.max() + np.log(w.mean()),
            }[name]
            np.testing.assert_allclose(got, expected, rtol=1e-12)
        return
    if name == "ssp":  # draws from numba's generator, which this does not seed
        return
    np.random.seed(0)
    if name in particles.SCHEMES:
        np.testing.assert_array_equal(got, theirs(values))
    else:
        np.testing.assert_allclose(got, theirs(values), rtol=1e-12)


def _particles_case(name: str, number: int, setting: Setting) -> Case:
    cpu_only(setting)
    log_weights = np.random.default_rng(0).standard_normal(setting.pick(number, 300))
    weights = np.exp(log_weights) / np.exp(log_weights).sum()
    values = weights if name in particles.SCHEMES else log_weights
    return Case(
        f"{name} of {len(values)} float64 {'weights' if values is weights else 'log-weights'}",
        elements=len(values),
        bytes=None,
        ours=partial(getattr(particles, name), values),
        check=partial(_check_particles, name, values),
        rivals=[rival("particles", lambda: partial(getattr(_their_resampling(), name), values), at_least=4.0)],
    )


# Other projects' cases stand in sections of their own below, registered in the same way.
def _register(name: str, build: Callable[..., Case], *arguments: Any) -> None:
    case(f"integrations/{name}")(partial(build, *arguments))


for _name in FUNCTIONS:
    for _size, _number in (("1e6", 1_000_000), ("1e4", 10_000)):
        _register(f"particles-{_name}-{_size}", _particles_case, _name, _number)


# --- k-diffusion --------------------------------------------------------------------------------------------

SAMPLERS = [name.removeprefix("sample_") for name in k_diffusion.__all__ if name.startswith("sample_")]
NOISY = [name for name in SAMPLERS if name.endswith(("ancestral", "sde"))]


@functools.cache
def original_k_diffusion() -> types.ModuleType:
    """`k_diffusion.sampling` alone: what the package imports besides, for training, may be absent, or a torchvision
    wheel that does not fit this torch."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise Absent("k-diffusion is not installed")
    for name in ("scipy.integrate", "torchdiffeq", "torchsde", "PIL.Image", "safetensors", "tqdm.auto"):
        importlib.import_module(name)  # what it needs stays, whereas mock forgets what is imported below
    package, transforms = types.ModuleType("k_diffusion"), types.ModuleType("torchvision.transforms")
    package.__path__ = list(spec.submodule_search_locations or ())
    transforms.functional = None  # type: ignore[attr-defined]  # of images; no sampler calls it
    stubs = {"k_diffusion": package, "torchvision": types.ModuleType("torchvision"), transforms.__name__: transforms}
    with mock.patch.dict(sys.modules, stubs):
        sampling = importlib.import_module("k_diffusion.sampling")
        for name in ("k_diffusion.sampling", "k_diffusion.utils"):
            del sys.modules[name]
    return sampling


def _k_diffusion_case(name: str, philox: bool, shape: tuple[int, ...], at_least: float, setting: Setting) -> Case:
    """A model that costs nothing and says what it is handed. With ``philox`` the rival keeps its own noise, but in the
    check, where it takes ours."""
    if name.endswith("sde") and not philox and importlib.util.find_spec("torchsde") is None:
        raise Absent("torchsde, which makes the noise, is not installed")
    steps = setting.pick(10, 3)
    x = 10 * setting.randn(*setting.pick(shape, (1, 4, 8, 8)))
    x0_hat = setting.randn(*x.shape, seed=1)
    sigmas = k_diffusion.get_sigmas_karras(steps, 0.03, 14.6, device=x.device)

    def run(module: Any, ours: bool = True, model: Any = lambda x, sigma: x0_hat, sigmas: Tensor = sigmas) -> Tensor:
        noise = {"noise_sampler": k_diffusion.PhiloxNoiseSampler(x)} if philox and ours else {}
        return getattr(module, f"sample_{name}")(model, x, sigmas, disable=True, **noise)

    def check() -> None:
        torch.testing.assert_close(run(k_diffusion), x0_hat, rtol=1e-5, atol=1e-5)  # at 0, what the model says
        try:
            modules = k_diffusion, original_k_diffusion()
        except (Absent, ImportError):
            return
        results = []
        for module in modules:
            torch.manual_seed(0)
            results.append(run(module, model=lambda x, sigma: torch.tanh(x), sigmas=sigmas[:-1]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    return Case(
        f"sample_{name}{', PhiloxNoiseSampler' if philox else ''}, {steps} steps of {list(x.shape)} float32",
        elements=x.numel() * steps,
        bytes=None,
        ours=partial(run, k_diffusion),
        check=check,
        rivals=[rival("k-diffusion", lambda: partial(run, original_k_diffusion(), False), at_least=at_least)],
        figures=lambda seconds: [Figure("ours, one step", seconds / steps * 1e6, "us")],
    )


for _name in SAMPLERS:
    for _size, _shape, _target in (("small", (1, 4, 8, 8), 12.0), ("large", (4, 4, 128, 128), 8.0)):
        for _philox in (False, True) if _name in NOISY else (False,):
            _kind = f"{_name}{'-philox' if _philox else ''}-{_size}"
            _register(f"k_diffusion-{_kind}", _k_diffusion_case, _name, _philox, _shape, _target)


# --- FK steering --------------------------------------------------------------------------------------------


class PlainFKD:
    """The FKD of the text-to-image pipelines of Singhal et al. 2025, in plain torch: what `FKD` does under ``strict``,
    at steps that weigh."""

    def __init__(
        self,
        potential: str,
        lmbda: float,
        reward_fn: Callable[[Tensor], Tensor],
        latents: Tensor,
        last_step: int,
        adaptive: bool = False,
    ):
        self.potential, self.lmbda, self.reward_fn, self.adaptive = potential, lmbda, reward_fn, adaptive
        self.last_step = last_step
        self.rewards = torch.zeros(len(latents), device=latents.device)
        self.product = torch.ones(len(latents), device=latents.device)

    def resample(self, *, sampling_idx: int, latents: Tensor, x0_preds: Tensor) -> tuple[Tensor, Tensor]:
        rewards, last = self.reward_fn(x0_preds), sampling_idx == self.last_step
        if self.potential == "diff":
            weights = torch.exp(self.lmbda * (rewards - self.rewards))
        else:
            if self.potential == "max":
                rewards = torch.maximum(rewards, self.rewards)
            elif self.potential == "add":
                rewards = rewards + self.rewards
            weights = torch.exp(self.lmbda * rewards)
            if last:
                weights = weights / self.product
        weights = torch.where(weights.isnan(), 0.0, weights.clamp(0.0, 1e10))
        self.rewards = rewards
        if self.adaptive or last:
            ess = 1.0 / (weights / weights.sum()).square().sum()
            if not ess < len(weights) / 2:
                return latents, x0_preds
        ancestors = torch.multinomial(weights, len(weights), replacement=True)
        self.rewards = rewards[ancestors]
        self.product = self.product[ancestors] * weights[ancestors]
        return latents[ancestors], x0_preds[ancestors]


def _fkd_case(shape: Sequence[int], setting: Setting) -> Case:
    latents = setting.randn(*setting.pick(shape, (shape[0], 4, 4, 4)))
    x0_preds = setting.randn(*latents.shape, seed=1)
    reward_fn = lambda images: images[:, 0, 0, 0]  # noqa: E731
    inputs = dict(sampling_idx=5, latents=latents, x0_preds=x0_preds)

    def steering(**options: Any) -> FKD:
        return FKD(
            potential_type="diff",
            lmbda=1.0,
            num_particles=len(latents),
            adaptive_resampling=False,
            resample_frequency=1,
            resampling_t_start=0,
            resampling_t_end=10,
            time_steps=20,
            reward_fn=reward_fn,
            device=latents.device,
            **options,
        )

    def check() -> None:
        strict, plain = steering(strict=True), PlainFKD("diff", 1.0, reward_fn, latents, 19)
        for seed in range(3):
            results = []
            for resampler in (strict, plain):
                torch.manual_seed(seed)
                results.append(resampler.resample(**inputs))
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected), "other particles than the plain version's"
        fkd = steering(seed=0)
        got, images = fkd.resample(**inputs)
        ancestors = (got[:, None] == latents[None]).flatten(2).all(-1).int().argmax(1)
        assert torch.equal(images, x0_preds[ancestors])
        shares = len(latents) * torch.softmax(reward_fn(x0_preds).double(), 0)
        copies = torch.bincount(ancestors, minlength=len(latents))
        assert (copies - shares).abs().max() < 1 + 1e-6  # systematic

    return Case(
        f"FKD.resample, latents {list(latents.shape)} float32, a reward that costs nothing",
        elements=latents.numel(),
        bytes=None,
        ours=partial(steering(seed=0).resample, **inputs),
        check=check,
        rivals=[
            rival(
                "plain torch",
                lambda: partial(PlainFKD("diff", 1.0, reward_fn, latents, 19).resample, **inputs),
                at_least=4.0,
            )
        ],
    )


for _number in (4, 16, 64):
    _register(f"fkd-{_number}", _fkd_case, (_number, 4, 128, 128))
_register("fkd-small-256", _fkd_case, (256, 4, 8, 8))
