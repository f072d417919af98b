"""Small networks for 8x8 images: a classifier and an autoencoder.

Both are smooth (SiLU, no max-pooling), since guidance differentiates through them. They work in any floating dtype.
Images are [N, 1, 8, 8] in [-1, 1]; latents are [N, C, 4, 4] of about unit variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10


class Classifier(nn.Module):
    """A classifier of digits: `net(images)` maps images [N, 1, 8, 8] in [-1, 1] to logits [N, 10].

    Args:
        width: Channels of the first layers; a multiple of 4.
        dropout: Share of dropped features, in [0, 1); 0 by default.
    """

    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),  # 4 x 4
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),  # 2 x 2
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(8 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Autoencoder(nn.Module):
    """Maps images to latents and back.

    `shift` and `scale`, set after training, standardise the latents to mean 0 and variance 1 per channel. The decoder's
    output is not clamped: a clamp would have no gradient where most pixels of a digit lie, at -1.

    Args:
        latent_channels: Channels C of the latents.
        width: Channels of the hidden layers.
    """

    shift: Tensor  # [C, 1, 1], of the raw latents
    scale: Tensor  # [C, 1, 1]

    def __init__(self, latent_channels: int = 2, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 4 * width, 1),
            nn.PixelShuffle(2),  # 8 x 8
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        self.register_buffer("shift", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(latent_channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] in [-1, 1] to latents [N, C, 4, 4] of mean 0 and variance 1 per channel."""
        return (self.encoder(images) - self.shift) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, 4, 4] to images [N, 1, 8, 8], about in [-1, 1], not clamped.

        An approximate inverse of `encode`.
        """
        return self.decoder(latents * self.scale + self.shift)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction `decode(encode(images))`."""
        return self.decode(self.encode(images))
