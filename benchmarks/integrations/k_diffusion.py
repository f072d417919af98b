"""The samplers of k-diffusion, per step."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastguide.integrations import k_diffusion

from ..cases import Absent, Case, Figure, Setting, case, rival

SAMPLERS = [name.removeprefix("sample_") for name in k_diffusion.__all__ if name.startswith("sample_")]
NOISY = [name for name in SAMPLERS if name.endswith(("ancestral", "sde"))]


@functools.cache
def original_k_diffusion() -> types.ModuleType:
    """`k_diffusion.sampling` without the rest of the package. The rest imports packages for training that may be
    missing, or a torchvision that does not fit this torch."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise Absent("k-diffusion is not installed")
    for name in ("scipy.integrate", "torchdiffeq", "torchsde", "PIL.Image", "safetensors", "tqdm.auto"):
        importlib.import_module(name)  # loaded here, because mock unloads what is imported below
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
    """A model that costs nothing and returns what it is given. With ``philox`` the rival uses its own noise, except in
    the check, where it uses ours."""
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
        torch.testing.assert_close(run(k_diffusion), x0_hat, rtol=1e-5, atol=1e-5)  # at level 0: the model's output
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
            case(f"integrations/k_diffusion-{_kind}")(partial(_k_diffusion_case, _name, _philox, _shape, _target))
