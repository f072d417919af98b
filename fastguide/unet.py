"""The U-Net of the shipped priors.

It is smooth (SiLU, no max-pooling), since guidance differentiates through it, and works in any floating dtype.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Set the weights to zero, so that a residual block ending in `conv` starts as the identity."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class _ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual. The embedding scales and shifts the second normalisation."""

    def __init__(self, width_in: int, width: int, width_embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.film = nn.Linear(width_embedding, 2 * width)
        self.norm2 = nn.GroupNorm(8, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention over the pixels, written out so that derivatives of every order exist."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, height * width).unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // self.heads), dim=-1)  # [N, H, P, P]
        h = v @ weights.transpose(-1, -2)  # [N, H, C/H, P]
        return x + self.out(h.reshape(n, c, height, width))


class UNet(nn.Module):
    """A denoiser with one resolution per entry of `widths`, each half of the one before.

    `net(x, t, label=None)` returns the prediction, shaped like `x`. The shipped weights predict `v = alpha * eps -
    sigma * x0`. Its inputs:

    - `x` [N, channels, H, W]: the noisy state; H and W are divisible by `patch * 2 ** (len(widths) - 1)`.
    - `t` [N] int64: index of the noise table, from 0 (almost clean) to `steps - 1` (noise).
    - `label` [N] int64: 0 to `classes - 1`, or `classes` for "no class". None is "no class" for all, the unconditional
      prediction.

    Args:
        channels: Channels of the image.
        widths: Channels at each resolution, from fine to coarse; multiples of 8.
        embedding: Size of the embedding of time and label, even.
        heads: Heads of the attention; a divisor of the last width.
        steps: Size of the noise table.
        classes: Number of labels; may be 0.
        patch: The finest resolution has one pixel for each square of `patch` by `patch` pixels of the image.
        dropout: Share of dropped activations, in [0, 1); 0 by default.
    """

    time_table: Tensor  # [T, E]

    def __init__(
        self,
        channels: int = 1,
        widths: tuple[int, ...] = (32, 56),
        *,
        embedding: int = 64,
        heads: int = 2,
        steps: int = 1000,
        classes: int = 10,
        patch: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.classes, self.patch = classes, patch
        half = embedding // 2
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(half, dtype=torch.float64) / (half - 1))
        angles = torch.arange(steps, dtype=torch.float64)[:, None] * (1000.0 / steps) * frequencies  # [T, E/2]
        # A table of sines, not angles: a cast to half precision then only rounds them.
        table = torch.cat([angles.sin(), angles.cos()], dim=1).float()
        self.register_buffer("time_table", table, persistent=False)  # [T, E]
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)

        def block(width_in: int, width: int) -> _ResBlock:
            return _ResBlock(width_in, width, embedding, dropout)

        last = widths[-1]
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(block(w, w) for w in widths[:-1])
        self.shrink = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in itertools.pairwise(widths)
        )
        self.middle = nn.ModuleList([block(last, last), block(last, last)])
        self.attention = _Attention(last, heads)
        self.grow = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in itertools.pairwise(widths))
        self.up = nn.ModuleList(block(2 * w, w) for w in widths[:-1])
        self.norm = nn.GroupNorm(8, widths[0])
        self.out = _zero(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        # A host constant picks the row of "no class": a tensor made here would break CUDA graphs.
        of_label = self.label.weight[self.classes] if label is None else self.label(label)
        embedding = F.silu(self.time(self.time_table[t]) + of_label)  # [N, E]

        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, embedding)
            skips.append(h)
            h = shrink(h)
        h = self.middle[0](h, embedding)
        h = self.middle[1](self.attention(h), embedding)
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            # Convolve before enlarging: a quarter of the cost.
            h = F.interpolate(grow(h), scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)
