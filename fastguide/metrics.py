"""How far samples are from a truth that is known: PSNR, SSIM, and the coverage of intervals.

Each takes ``[B, ...]`` and returns ``[B]`` in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import got, integer, number, tensor

__all__ = ["coverage", "psnr", "ssim"]


def psnr(x: Tensor, truth: Tensor, *, data_range: float) -> Tensor:
    """The peak signal-to-noise ratio, ``10 log10(data_range^2 / mean((x - truth)^2))``, in dB.

    Args:
        x: ``[B, ...]``, for example the posterior mean.
        truth: As ``x``.
        data_range: The largest value that an image can have minus the smallest, > 0: 2 for images in ``[-1, 1]``, 1 for
            ``[0, 1]``, 255 for bytes.

    Returns:
        ``[B]`` float64. Infinity where the two are equal.

    Raises:
        TypeError: ``x`` or ``truth`` is not a tensor, or ``data_range`` is not a number.
        ValueError: Shapes differ, there is no dimension but B, or ``data_range`` is not above 0.
    """
    x, truth = _pair(x, truth, 2, "[B, ...]")
    peak = number("data_range", data_range, above=0.0)
    return 10.0 * torch.log10(peak**2 / (x - truth).square().flatten(1).mean(1))


def ssim(x: Tensor, truth: Tensor, *, data_range: float, window: int = 11, sigma: float = 1.5) -> Tensor:
    """The mean structural similarity, 1 for equal images.

    At each place where the window fits into the image, with its weighted means, variances and covariance,

        (2 m_x m_t + c1) (2 v_xt + c2) / ((m_x^2 + m_t^2 + c1) (v_x + v_t + c2))

    where ``c1 = (0.01 data_range)^2`` and ``c2 = (0.03 data_range)^2``. The result is the mean over places and
    channels. The default window is that of scikit-image's ``structural_similarity(..., gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False)``.

    Args:
        x: ``[B, ..., H, W]``.
        truth: As ``x``.
        data_range: The largest value that an image can have minus the smallest, > 0: 2 for images in ``[-1, 1]``, 1 for
            ``[0, 1]``, 255 for bytes.
        window: Size of the Gaussian window, odd, at least 3 and at most H and W; 11 by default, as published.
        sigma: Standard deviation of the window in pixels, > 0; 1.5 by default, as published.

    Returns:
        ``[B]`` float64.

    Raises:
        TypeError: ``x`` or ``truth`` is not a tensor, or ``data_range`` or ``sigma`` is not a number.
        ValueError: Shapes differ or are not ``[B, ..., H, W]``, ``window`` is even or larger than the image, or another
            argument is outside its range.

    Source:
        Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural
        similarity".
    """
    x, truth = _pair(x, truth, 3, "[B, ..., H, W]")
    peak, sigma = number("data_range", data_range, above=0.0), number("sigma", sigma, above=0.0)
    window, smallest = integer("window", window, 3), min(x.shape[-2:])
    if window % 2 == 0 or window > smallest:
        raise ValueError(f"window: expected an odd size of at most {smallest}, that of the image, got {got(window)}")
    offsets = torch.arange(window, dtype=torch.float64, device=x.device) - window // 2
    weights = torch.softmax(-0.5 * (offsets / sigma).square(), 0)

    def average(values: Tensor) -> Tensor:
        rows = F.conv2d(values.flatten(0, -3)[:, None], weights.reshape(1, 1, -1, 1))
        return F.conv2d(rows, weights.reshape(1, 1, 1, -1)).reshape(len(x), -1)

    mean_x, mean_t = average(x), average(truth)
    var_x, var_t = average(x * x) - mean_x**2, average(truth * truth) - mean_t**2
    covariance = average(x * truth) - mean_x * mean_t
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    likeness = (2.0 * mean_x * mean_t + c1) * (2.0 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_t**2 + c1) * (var_x + var_t + c2))).mean(1)


def coverage(interval: Tensor, truth: Tensor) -> Tensor:
    """The share of the elements of ``truth`` that lie in their intervals, ends included.

    Over many observations, intervals of level 0.9 from the true posterior hold the truth nine times out of ten. Fewer
    mean that the samples spread too little.

    Args:
        interval: ``[2, B, ...]``, the lower and upper ends, from `Samples.interval`.
        truth: ``[B, ...]``.

    Returns:
        ``[B]`` float64, in ``[0, 1]``.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Shapes do not fit.
    """
    tensor("interval", interval)
    if interval.ndim < 1 or len(interval) != 2:
        raise ValueError(f"interval: expected shape [2, B, ...], got {got(interval)}")
    low, truth = _pair(interval[0], truth, 1, "[B, ...]", "interval[0]")
    return ((low <= truth) & (truth <= interval[1].double())).double().reshape(len(truth), -1).mean(1)


def _pair(x: Any, truth: Any, least: int, expected: str, name: str = "x") -> tuple[Tensor, Tensor]:
    """Both in float64, if they have one shape of at least ``least`` dimensions."""
    tensor(name, x)
    tensor("truth", truth)
    if x.ndim < least or x.numel() == 0:
        raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")
    if x.shape != truth.shape:
        raise ValueError(f"truth: expected shape {list(x.shape)}, that of {name}, got {list(truth.shape)}")
    return x.double(), truth.to(x.device).double()
