"""PSNR, SSIM and coverage, against formulas and scikit-image."""

import math

import pytest
import torch

from fastguide import metrics


def images(batch: int = 1):
    """A true image and a poor copy of it, ``[batch, 24, 20]``, the same in every row."""
    i, j = torch.meshgrid(torch.arange(24.0).double(), torch.arange(20.0).double(), indexing="ij")
    truth = torch.sin(0.5 * i) * torch.cos(0.3 * j)
    x = 0.8 * truth + 0.1 * torch.cos(1.1 * i + 0.7 * j) + 0.05
    return x.repeat(batch, 1, 1), truth.repeat(batch, 1, 1)


def test_the_numbers_are_those_of_scikit_image():
    """The numbers of scikit-image 0.26.0 for the arrays of `images`, with ``o = dict(gaussian_weights=True,
    use_sample_covariance=False)``:

    structural_similarity(truth, x, data_range=2.0, sigma=1.5, **o)
    structural_similarity(truth, x, data_range=2.0, sigma=0.8, **o)  # its window is then of size 7
    structural_similarity(np.stack([truth, truth, truth**2]), np.stack([x, -x, x**2]), data_range=1.0, sigma=1.5,
                          channel_axis=0, **o)
    peak_signal_noise_ratio(truth, x, data_range=2.0)
    """
    x, truth = images()
    assert metrics.ssim(x, truth, data_range=2.0).item() == pytest.approx(0.7385951262975073, abs=1e-10)
    narrow = metrics.ssim(x, truth, data_range=2.0, window=7, sigma=0.8)
    assert narrow.item() == pytest.approx(0.7249570970697835, abs=1e-10)
    channels = torch.stack([x, -x, x**2], 1), torch.stack([truth, truth, truth**2], 1)  # [1, 3, 24, 20]
    assert metrics.ssim(*channels, data_range=1.0).item() == pytest.approx(0.7317257613577066, abs=1e-10)
    assert metrics.psnr(x, truth, data_range=2.0).item() == pytest.approx(23.556713576676614, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_row_has_its_own_number_in_float64(dtype):
    x, truth = (t.to(dtype) for t in images(3))
    x = x * torch.tensor([1.0, 0.5, 0.0], dtype=dtype)[:, None, None]
    for metric in (metrics.ssim, metrics.psnr):
        found = metric(x, truth, data_range=2.0)
        assert found.shape == (3,) and found.dtype == torch.float64
        for b in range(3):
            alone = metric(x[b : b + 1].double(), truth[b : b + 1].double(), data_range=2.0)
            torch.testing.assert_close(found[b : b + 1], alone, rtol=1e-12, atol=0)
        assert (found.diff() < 0).all()


def test_equal_images():
    _, truth = images()
    assert metrics.ssim(truth, truth, data_range=2.0).item() == pytest.approx(1.0, abs=1e-12)
    assert metrics.psnr(truth, truth, data_range=2.0).item() == math.inf


def test_psnr_of_a_known_error():
    """An error of 0.1 in a range of 1 gives 20 dB; in a range of 2 it gives 6.02 dB more."""
    truth = torch.zeros(2, 5, dtype=torch.float64)
    assert metrics.psnr(truth + 0.1, truth, data_range=1.0).tolist() == pytest.approx([20.0, 20.0])
    assert metrics.psnr(truth - 0.1, truth, data_range=2).tolist() == pytest.approx([20.0 + 20 * math.log10(2)] * 2)


def test_coverage_counts_the_ends():
    interval = torch.tensor([[[0.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]])
    assert metrics.coverage(interval, torch.tensor([[0.0, 1.0, 1.5, -0.1]])).tolist() == [0.5]
    assert metrics.coverage(interval[..., 0], torch.tensor([0.7])).tolist() == [1.0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: metrics.psnr(x, x[:1], data_range=1.0), r"truth: expected shape \[2, 9, 8\], that of x, got \[1,"),
        (lambda x: metrics.psnr(x, x, data_range=0.0), "data_range: expected a finite number > 0, got 0.0"),
        (lambda x: metrics.psnr(x[:, 0, 0], x[:, 0, 0], data_range=1.0), r"x: expected shape \[B, ...\], got \[2\]"),
        (lambda x: metrics.ssim(x[0], x[0], data_range=1.0), r"x: expected shape \[B, ..., H, W\], got \[9, 8\]"),
        (lambda x: metrics.ssim(x, x, data_range=1.0), "window: expected an odd size of at most 8, .* got 11"),
        (lambda x: metrics.ssim(x, x, data_range=1.0, window=4), "window: expected an odd size of at most 8, .* got 4"),
        (lambda x: metrics.ssim(x, x, data_range=1.0, window=7, sigma=0), "sigma: expected a finite number > 0, got 0"),
        (lambda x: metrics.coverage(x[:1], x[0]), r"interval: expected shape \[2, B, ...\], got torch.float32 \[1, 9,"),
        (lambda x: metrics.coverage(x, x), r"truth: expected shape \[9, 8\], that of interval\[0\], got \[2, 9, 8\]"),
    ],
)
def test_other_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 9, 8))
