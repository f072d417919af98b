"""The shipped digits. The files have the expected contents. The models are as good as `digits.train` says."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from shipped_priors import assert_gradient_in_x

from fastguide import digits, weights
from fastguide.digits import train
from fastguide.digits.networks import CLASSES
from fastguide.unet import UNet

pytest.importorskip("safetensors")

FOLDER = Path(digits.__file__).parent


@pytest.fixture(scope="module")
def classify():
    return digits.classifier()


@pytest.fixture(scope="module")
def samples():
    """400 unconditional samples, unclipped."""
    return train.draw(digits.prior(), (400, 1, 8, 8), steps=25, seed=7)


# --------------------------------------------------------------------------------------------- files


def test_the_folder_stays_small():
    sizes = {f.name: f.stat().st_size for f in FOLDER.iterdir() if f.is_file()}
    assert {"weights.safetensors", "held_out.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) < 2_000_000, sizes


def test_held_out_images_are_digits():
    images, labels = digits.held_out()
    assert images.shape == (297, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (297,) and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())  # integers 0 to 16
    counts = torch.bincount(labels, minlength=CLASSES)
    assert counts.min() >= 28 and counts.max() <= 31  # stratified


def test_held_out_is_disjoint_from_training():
    pytest.importorskip("sklearn")
    images, labels, kept, held = train.load(seed=0)
    assert len(kept) == 1500 and len(held) == 297
    assert not set(kept) & set(held)
    shipped, shipped_labels = digits.held_out()
    assert torch.equal(shipped, train.scaled(images[held]))
    assert torch.equal(shipped_labels, torch.from_numpy(labels[held]).long())
    assert train.nearest(shipped, train.scaled(images[kept])).min() > 0.5  # no image is in both sets


def test_loading_is_deterministic_and_independent():
    def parameters():
        latent, encode, _ = digits.latent_prior()
        modules = (digits.prior().net, digits.classifier(), latent.net, encode.__self__)
        return [p for module in modules for p in (*module.parameters(), *module.buffers())]

    first, second = parameters(), parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(p.requires_grad for p in first)
    first[0].zero_()  # a user may edit a loaded network: others must not see it
    assert all(torch.equal(a, b) for a, b in zip(parameters(), second, strict=True))


def test_nothing_but_safetensors_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    weights.read.cache_clear()
    assert len(digits.held_out()[0]) == 297
    monkeypatch.setitem(sys.modules, "safetensors", None)
    weights.read.cache_clear()
    with pytest.raises(ImportError, match=r"fastguide\[demo\]"):
        digits.prior()


# ------------------------------------------------------------------------------------------- quality


def test_classifier_on_held_out_digits(classify):
    images, labels = digits.held_out()
    assert (classify(images).argmax(1) == labels).float().mean() >= 0.97


def test_samples_are_digits(classify, samples):
    share, counts = train.confident(classify, samples)
    assert share >= 0.9
    assert min(counts) >= 16 and max(counts) <= 80, counts  # 40 expected for each
    assert samples.min() > -1.6 and samples.max() < 1.6  # nothing was clipped


def test_samples_are_distributed_like_held_out_digits(samples):
    images, _ = digits.held_out()
    # Held-out digits without five of the classes are 0.06 away, white noise 3.6.
    assert train.energy_distance(samples, images) < 0.03


def test_samples_are_no_copies_of_training_digits(samples):
    pytest.importorskip("sklearn")
    images, _, kept, held = train.load(seed=0)
    known, new = (train.scaled(images[i]) for i in (kept, held))
    assert train.nearest(samples, known).median() > 0.85 * train.nearest(new, known).median()


@pytest.mark.parametrize("scale, share", [(None, 0.94), (2.0, 0.98)])
def test_conditional_samples_are_in_the_asked_class(classify, scale, share):
    asked = torch.arange(100) % CLASSES
    drawn = train.draw(digits.prior(asked, scale), (100, 1, 8, 8), steps=25)
    assert (classify(drawn).argmax(1) == asked).float().mean() >= share


def test_latent_model(classify):
    latent, encode, decode = digits.latent_prior()
    images, _ = digits.held_out()
    z = encode(images)
    assert z.shape[0] == 297 and z.shape[2:] == (4, 4) and z[0].numel() < images[0].numel()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(z.shape[1]), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(z.shape[1]), rtol=0, atol=0.1)
    assert train.psnr(images, decode(z)) > 29
    share, counts = train.confident(classify, decode(train.draw(latent, (400, *z.shape[1:]), steps=25, seed=7)))
    assert share >= 0.9
    assert min(counts) >= 16 and max(counts) <= 80, counts


def test_x0_hat_denoises():
    """A wrong prediction type, schedule or time would fail at one of these levels."""
    prior, images = digits.prior(), digits.held_out()[0]
    generator = torch.Generator().manual_seed(3)
    errors = {}
    for t in (10, 200, 500, 800, 999):
        level = prior.schedule.level(t)
        x = level.alpha * images + level.sigma * torch.randn(images.shape, generator=generator)
        errors[t] = (prior.x0_hat(x, level) - images).square().mean().item()
    spread = (images - images.mean(0)).square().mean().item()  # 0.29: error of the mean image, best at pure noise
    assert errors[10] < 0.001 and errors[200] < 0.03 and errors[500] < 0.12, errors
    assert errors[10] < errors[200] < errors[500] < errors[800] < errors[999] < 1.1 * spread, errors


# --------------------------------------------------------------------------------------------- calls


def test_a_label_changes_its_own_sample_alone():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net, level = digits.prior().net, digits.prior().schedule.level(500)
    t = torch.full((4,), 500)
    none = torch.full((4,), CLASSES)
    torch.testing.assert_close(net(x, t), net(x, t, none))
    of_three = digits.prior(3)(x, level)
    assert torch.equal(of_three, digits.prior(torch.full((4,), 3))(x, level))
    assert torch.equal(of_three, digits.prior(3, 1.0)(x, level))
    assert (of_three - net(x, t)).abs().max() > 1e-3
    guided = net(x, t) + 2.5 * (of_three - net(x, t))
    torch.testing.assert_close(digits.prior(3, 2.5)(x, level), guided)
    for bad in (10, -1, 2.0, torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="label"):
            digits.prior(bad)
    with pytest.raises(ValueError, match="guidance_scale"):
        digits.prior(guidance_scale=2.0)
    with pytest.raises(ValueError, match="a sample for each of the 3 conditions, got 4"):
        digits.prior(torch.tensor([1, 2, 3]))(x, level)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.15)])
def test_dtypes(dtype, tolerance):
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = digits.prior(5).net(x, torch.arange(8) * 140)
    got = digits.prior(5, dtype=dtype).net(x.to(dtype), torch.arange(8) * 140)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


def test_gradients_reach_the_state():
    """Guidance needs the gradient in x_t. In double precision it equals finite differences."""
    assert_gradient_in_x(digits.prior(dtype=torch.float64), (2, 1, 8, 8))


# ------------------------------------------------------------------------------------------ training


def test_training_learns_and_repeats():
    images, labels = digits.held_out()
    assert train.held_out_loss(digits.prior().net, images) < 0.28  # the same loss as in training

    def run():
        torch.manual_seed(0)
        net = UNet(1, (8, 16))
        start = copy.deepcopy(net)
        return start, train.train_denoiser(net, images, labels, steps=30, batch=64)

    (start, first), (_, second) = run(), run()
    assert train.held_out_loss(first, images) < 0.8 * train.held_out_loss(start, images)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_script_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(train, "SAMPLERS", ((3, 1.0), (2, 0.0)))
    try:
        train.main(["--scale", "0", "--samples", "10", "--threads", "1", "--out", str(tmp_path)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tmp_path / "held_out.safetensors").read_bytes() == (FOLDER / "held_out.safetensors").read_bytes()
    monkeypatch.setattr(digits, "_FOLDER", tmp_path)
    weights.read.cache_clear()
    try:
        trained = digits.prior().net.state_dict()
    finally:
        weights.read.cache_clear()
    shipped = UNet(**train.CONFIG["prior"]).state_dict()
    assert trained.keys() == shipped.keys()
