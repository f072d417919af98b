"""A second prior that ships with the package: a U-Net trained on phantoms of random ellipses, 64 x 64 pixels.

    truth = phantoms.generate(2, seed=0)
    samples = fastguide.sample(phantoms.prior(), (4, 1, 64, 64), steps=50)

`generate` makes as many phantoms as wanted, each the same forever. Those of a seed below 2^63 are new to the prior:
`python -m fastguide.phantoms.train` trained it on others. The file's metadata have the configuration and what was
measured. `prior` needs safetensors: `pip install fastguide[demo]`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import weights
from ..denoiser import Denoiser
from ..schedules import vp_cosine
from ..unet import UNet
from .generator import generate

__all__ = ["generate", "prior"]

_FILE = Path(__file__).parent / "weights.safetensors"


def prior(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Denoiser:
    """A denoiser of phantoms; it predicts `v` on `vp_cosine(1000)`. Images are [N, 1, 64, 64] in [-1, 1].

    Args:
        device: Where the network goes; the CPU by default.
        dtype: The dtype of the network; float32 by default.

    Returns:
        The denoiser, with frozen weights.

    Raises:
        ImportError: safetensors is not installed.
    """
    net = weights.load(UNet, _FILE, "prior", device, dtype)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on the CPU
    return Denoiser(net, vp_cosine(1000), prediction="v")
