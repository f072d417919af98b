"""A small prior that ships with the package: a U-Net trained on handwritten digits, for demonstrations and tests.

    images, labels = digits.held_out()  # real digits that no training has seen
    samples = fastguide.sample(digits.prior(), (64, 1, 8, 8), steps=100)

The data are the 1,797 images of "Optical Recognition of Handwritten Digits" that scikit-learn distributes: E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository (1998), https://doi.org/10.24432/C50P49, licence CC BY 4.0. Each pixel
counts the ink in a 4x4 block of a 32x32 bitmap, 0..16, here mapped to [-1, 1].

297 images are held out, by a stratified and seeded split. `held_out.safetensors` has their images, labels and indices
in scikit-learn's order. The split is by image, so the writer of a held-out digit may have written training digits too.

`networks` has the networks. `python -m fastguide.digits.train` trained them; it overwrites the shipped weights unless
told otherwise. The files' metadata have the configuration and what was measured. This module needs safetensors: `pip
install fastguide[demo]`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import weights
from ..denoiser import Conditional, Denoiser
from ..schedules import vp_cosine
from ..unet import UNet
from .networks import CLASSES, Autoencoder, Classifier

__all__ = ["CLASSES", "classifier", "held_out", "latent_prior", "prior"]

_FOLDER = Path(__file__).parent
_Net = TypeVar("_Net", bound=nn.Module)


def held_out(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The real digits that no training has seen.

    Args:
        device: Where the tensors go; the CPU by default.
        dtype: The dtype of the images.

    Returns:
        Images [297, 1, 8, 8] in [-1, 1] with background -1, and labels [297] int64, 0..9.

    Raises:
        ImportError: safetensors is not installed.
    """
    tensors, _ = weights.read(_FOLDER / "held_out.safetensors")
    images = tensors["images"].to(device=device, dtype=dtype) / 8 - 1
    return images, tensors["labels"].to(device=device, dtype=torch.int64)


def prior(
    label: int | Tensor | None = None,
    guidance_scale: float | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """A denoiser of digits; it predicts `v` on `vp_cosine(1000)`. Images are [N, 1, 8, 8] in [-1, 1].

    Args:
        label: The digit to draw, 0..9: an int, or a tensor [B] with one for each observation. None draws any digit.
        guidance_scale: Scale of classifier-free guidance, `unconditional + scale * (conditional - unconditional)`. It
            costs a second evaluation of the network, and needs a label. None or 1 is the conditional prediction.
        device: Where the network goes; the CPU by default.
        dtype: The dtype of the network; float32 by default.

    Returns:
        The denoiser, with frozen weights.

    Raises:
        ValueError: `label` is not 0..9, or `guidance_scale` comes without a label.
        ImportError: safetensors is not installed.
    """
    if guidance_scale is not None and label is None:
        raise ValueError(f"guidance_scale: expected None without a label, got {guidance_scale!r}")
    net = _load(UNet, "prior", device, dtype)
    schedule = vp_cosine(1000)
    if label is None:
        return Denoiser(net, schedule, prediction="v")
    conditional = Conditional(net, label=_labels(label).to(device))
    if guidance_scale is None or guidance_scale == 1:
        return Denoiser(conditional, schedule, prediction="v")
    return Denoiser(conditional, schedule, prediction="v", unconditional=net, guidance_scale=guidance_scale)


def latent_prior(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A denoiser of latents, with the encoder and the decoder.

    Latents are [N, C, 4, 4] with mean 0 and variance 1 per channel. The denoiser predicts `v` on `vp_cosine(1000)`.

    Args:
        device: Where the networks go; the CPU by default.
        dtype: The dtype of the networks; float32 by default.

    Returns:
        The denoiser, `encode` and `decode`. `encode` takes images [N, 1, 8, 8] in [-1, 1]; `decode` is not clamped to
            [-1, 1]. Both are smooth.

    Raises:
        ImportError: safetensors is not installed.
    """
    autoencoder = _load(Autoencoder, "autoencoder", device, dtype)
    denoiser = Denoiser(_load(UNet, "latent_prior", device, dtype), vp_cosine(1000), prediction="v")
    return denoiser, autoencoder.encode, autoencoder.decode


def classifier(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Classifier:
    """A classifier of digits. It is smooth, so it can guide too.

    Args:
        device: Where the network goes; the CPU by default.
        dtype: The dtype of the network; float32 by default.

    Returns:
        A network from images [N, 1, 8, 8] in [-1, 1] to logits [N, 10].

    Raises:
        ImportError: safetensors is not installed.
    """
    return _load(Classifier, "classifier", device, dtype)


def _labels(label: int | Tensor) -> Tensor:
    labels = torch.as_tensor(label, device="cpu")
    if labels.dtype.is_floating_point or labels.ndim > 1 or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"label: expected integers 0..{CLASSES - 1}, one or one per observation, got {label}")
    return labels.to(torch.int64).reshape(-1)


def _load(kind: type[_Net], name: str, device: torch.device | str, dtype: torch.dtype) -> _Net:
    return weights.load(kind, _FOLDER / "weights.safetensors", name, device, dtype)
