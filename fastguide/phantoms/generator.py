"""Head-like phantoms of random ellipses, as many as wanted, each the same forever."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arguments import integer

SIZE = 64  # pixels on each side
_SLOTS = 18  # ellipses of a phantom: skull, brain, two ventricles, eight inner ones, six lesions
_DRAWS = 128  # uniform numbers reserved for a phantom: seven an ellipse, and two more


def generate(
    number: int,
    *,
    seed: int,
    first: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw phantoms in the manner of Shepp and Logan: a bright skull, a grey brain, two dark ventricles, and inner
    ellipses and small lesions of other greys. Edges are anti-aliased.

    Phantom ``i`` of a seed depends on nothing else: ``generate(5, seed=0, first=2)`` are the last five of
    ``generate(7, seed=0)``. Its numbers are those of Philox4x64 at a counter that belongs to ``i``.

    Args:
        number: How many, at least 0.
        seed: Any integer in [0, 2^64).
        first: Index of the first phantom, at least 0.
        device: Where the phantoms go; the CPU by default.
        dtype: The dtype of the phantoms.

    Returns:
        Images [number, 1, 64, 64] in [-1, 1]; the background is -1.

    Raises:
        ValueError: `number`, `seed` or `first` is not an integer in its range.

    Source:
        Shepp & Logan 1974, The Fourier reconstruction of a head section; Salmon et al. 2011 (Philox).
    """
    number = integer("number", number, low=0)
    first = integer("first", first, low=0)
    seed = integer("seed", seed, low=0, high=2**64)
    images = np.empty((number, SIZE, SIZE), np.float32)
    for begin in range(0, number, 64):  # so that the temporaries stay in the cache
        rows = slice(begin, min(begin + 64, number))
        images[rows] = _render(*_ellipses(_uniform(rows.stop - begin, seed, first + begin)))
    return torch.from_numpy(images)[:, None].to(device=device, dtype=dtype)


def _uniform(number: int, seed: int, first: int) -> np.ndarray:
    """Numbers [number, _DRAWS] in [0, 1). numpy keeps the raw stream of a bit generator the same in every version."""
    counter = first * (_DRAWS // 4)  # a step of the counter makes four numbers
    raw = np.random.Philox(key=seed, counter=counter).random_raw(number * _DRAWS)
    return (raw >> np.uint64(11)).reshape(number, _DRAWS) * 2.0**-53


def _ellipses(u: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centres x and y, half axes a and b, angles, greys and whether painted, each [number, _SLOTS].

    Lengths are in half sides of the image, so that the image is [-1, 1] x [-1, 1]. The grey of the skull and the brain
    is theirs; those of the others are added to the brain's.
    """

    def between(k: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * u[:, k]

    def inner(slots: slice, size: tuple[float, float], reach: float, grey: tuple[float, float], share: float) -> None:
        """Ellipses anywhere in the brain; grey is the least and greatest contrast, of either sign."""
        v = np.moveaxis(u[:, 7 * slots.start : 7 * slots.stop].reshape(len(u), -1, 7), 2, 0)
        radius, turn = reach * np.sqrt(v[0]), 2 * np.pi * v[1]
        across, along = radius * np.cos(turn) * a[:, 1:2], radius * np.sin(turn) * b[:, 1:2]
        cos, sin = np.cos(angle[:, 1:2]), np.sin(angle[:, 1:2])
        x[:, slots] = x[:, 1:2] + cos * across - sin * along
        y[:, slots] = y[:, 1:2] + sin * across + cos * along
        a[:, slots] = size[0] * (size[1] / size[0]) ** v[2]
        b[:, slots] = a[:, slots] * (0.45 + 0.55 * v[3])
        angle[:, slots] = np.pi * v[4]
        contrast = grey[0] + (grey[1] - grey[0]) * np.abs(2 * v[5] - 1)
        value[:, slots] = np.sign(v[5] - 0.5) * contrast
        painted[:, slots] = v[6] < share

    x, y, a, b, angle, value = np.zeros((6, len(u), _SLOTS))
    painted = np.ones((len(u), _SLOTS), bool)
    # The skull and, inside it, the brain.
    x[:, 0], y[:, 0] = between(0, -0.06, 0.06), between(1, -0.05, 0.05)
    a[:, 0], b[:, 0] = between(2, 0.6, 0.82), between(3, 0.76, 0.92)
    angle[:, :2] = between(4, -0.4, 0.4)[:, None]
    value[:, 0] = between(5, 0.3, 1.0)
    rim = between(6, 0.05, 0.13)
    x[:, 1], y[:, 1] = x[:, 0] + between(7, -0.015, 0.015), y[:, 0] + between(8, -0.03, 0.03)
    a[:, 1], b[:, 1] = a[:, 0] - rim, b[:, 0] - rim * between(9, 1.0, 1.3)
    value[:, 1] = between(10, -0.6, 0.05)
    # Two ventricles, mirror images but for a little.
    gap, down, tilt = between(14, 0.12, 0.26), between(15, -0.15, 0.15), between(16, 0.1, 0.5)
    width, height, dark = between(17, 0.05, 0.13), between(18, 0.18, 0.4), between(19, -0.5, -0.2)
    cos, sin = np.cos(angle[:, 1]), np.sin(angle[:, 1])
    for slot, side in ((2, -1.0), (3, 1.0)):
        across, along = side * gap + between(18 + slot, -0.03, 0.03), down + between(20 + slot, -0.03, 0.03)
        x[:, slot], y[:, slot] = x[:, 1] + cos * across - sin * along, y[:, 1] + sin * across + cos * along
        a[:, slot], b[:, slot] = width * between(22 + slot, 0.75, 1.25), height * between(24 + slot, 0.75, 1.25)
        angle[:, slot], value[:, slot] = angle[:, 1] + side * tilt, dark
        painted[:, slot] = u[:, 126] < 0.8
    inner(slice(4, 12), (0.1, 0.38), 0.8, (0.12, 0.5), 0.55)
    inner(slice(12, 18), (0.035, 0.075), 0.9, (0.35, 0.8), 0.5)
    return x, y, a, b, angle, value, painted


def _render(x, y, a, b, angle, value, painted) -> np.ndarray:
    """Images [number, 64, 64] of the ellipses, float32."""
    axis = ((np.arange(SIZE) + 0.5) * (2 / SIZE) - 1).astype(np.float32)
    column, row = axis[None, None, :], axis[None, :, None]

    def cover(k: int, who: np.ndarray) -> np.ndarray:
        """The share of each pixel inside ellipse k: one half minus the distance to its edge, in pixels."""

        def of(values: np.ndarray) -> np.ndarray:
            return values[who, k].astype(np.float32)[:, None, None]

        cos, sin = np.cos(of(angle)), np.sin(of(angle))
        dx, dy = column - of(x), row - of(y)
        u, v = (cos * dx + sin * dy) / of(a), (cos * dy - sin * dx) / of(b)  # the ellipse is the unit circle
        slope = np.sqrt((u / of(a)) ** 2 + (v / of(b)) ** 2)
        distance = (u * u + v * v - 1) / (2 * slope + 1e-6)  # to first order, exact at the edge
        return np.clip(0.5 - distance * (SIZE / 2), 0, 1)

    everyone = np.arange(len(x))
    skull, brain = cover(0, everyone), cover(1, everyone)
    inside = np.broadcast_to(value[:, 1, None, None].astype(np.float32), skull.shape).copy()
    for k in range(2, x.shape[1]):
        who = np.flatnonzero(painted[:, k])
        inside[who] += cover(k, who) * value[who, k, None, None].astype(np.float32)
    np.clip(inside, -0.9, 1, out=inside)
    outside = value[:, 0, None, None].astype(np.float32) * skull - (1 - skull)
    return np.clip(outside + brain * (inside - outside), -1, 1)
