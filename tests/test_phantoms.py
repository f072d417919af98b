"""The phantoms and their prior. The phantoms never change. They look like heads. The prior is as good as trained."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shipped_priors import assert_gradient_in_x

import fastguide as fg
from fastguide import phantoms, training, weights
from fastguide.phantoms import generator, train
from fastguide.unet import UNet

FILE = Path(phantoms.__file__).parent / "weights.safetensors"


def test_a_phantom_depends_on_its_seed_and_index_alone():
    ten = phantoms.generate(10, seed=3)
    assert torch.equal(phantoms.generate(100, seed=3)[:10], ten)  # 100 take more than one block
    assert torch.equal(phantoms.generate(4, seed=3, first=6), ten[6:])
    far = phantoms.generate(2, seed=3, first=2**40)
    assert torch.equal(phantoms.generate(1, seed=3, first=2**40 + 1)[0], far[1])
    several = torch.cat([ten, phantoms.generate(10, seed=4), far]).flatten(1)
    assert torch.cdist(several, several).fill_diagonal_(torch.inf).min() > 5


def test_phantoms_never_change():
    """Equal to numbers from the first version, except for the last bits, which depend on the machine's sine."""
    x = phantoms.generate(64, seed=0)
    assert x.double().mean().item() == pytest.approx(-0.5759127, abs=1e-5)
    row = [-0.28895, -0.28895, -0.53616, -0.53616, -0.28895, -0.53616, -0.53567, -0.49142]
    assert x[5, 0, 32, 16:48:4].tolist() == pytest.approx(row, abs=2e-5)


def test_phantoms_are_heads():
    x = phantoms.generate(200, seed=1)
    assert x.shape == (200, 1, 64, 64) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() <= 1
    assert (x[:, :, [0, -1]] == -1).all() and (x[:, :, :, [0, -1]] == -1).all()  # nothing touches the border
    assert (x.amax((1, 2, 3)) > 0.25).all()  # the skull
    middle = x[:, 0, 28:36, 28:36].flatten(1)
    assert middle.mean() < 0.1 and middle.std(1).median() > 0.1  # the brain, which is not uniform
    spread = x.std(0)[0, 20:44, 20:44]
    assert spread.min() > 0.2  # no pixel inside has the same value in all phantoms


def test_edges_are_anti_aliased():
    """The grey above the background sums to the area of an ellipse, for any position on the grid."""
    for x0, a, b in ((0.0, 0.5, 0.5), (0.013, 0.31, 0.4), (-0.2, 0.11, 0.08)):
        brain = a / 2  # with the same grey as the skull
        halves = np.array([[a, brain]]), np.array([[b, brain]])
        image = generator._render(
            *np.full((2, 1, 2), x0), *halves, np.full((1, 2), 0.3), np.zeros((1, 2)), np.ones((1, 2), bool)
        )
        assert (image + 1).sum() * (2 / 64) ** 2 == pytest.approx(np.pi * a * b, rel=0.03)


def test_errors_name_the_argument():
    for wrong in (dict(number=-1), dict(seed=-1), dict(seed=2**64), dict(seed=0.5), dict(first=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected an integer"):
            phantoms.generate(**(dict(number=1, seed=0) | wrong))
    assert phantoms.generate(0, seed=0).shape == (0, 1, 64, 64)
    assert phantoms.generate(1, seed=2**64 - 1, dtype=torch.float64).dtype == torch.float64


# --- the prior ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior():
    pytest.importorskip("safetensors")
    return phantoms.prior()


def test_the_weights_are_small_and_load_as_they_were_rounded(prior):
    assert FILE.stat().st_size < 3_000_000
    tensors, metadata = weights.read(FILE)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    state = prior.net.state_dict()
    assert {"prior." + name for name in state} == tensors.keys()
    assert all(torch.equal(tensors["prior." + name], value.half()) for name, value in state.items())
    assert not any(p.requires_grad for p in prior.net.parameters())
    assert {"config", "steps", "seed", "torch", "measured"} <= metadata.keys()


def test_x0_hat_denoises(prior):
    """The bounds are tight: after 5,748 of the 9,000 training steps the error was above each of them."""
    errors = train.denoising_errors(prior, phantoms.generate(32, seed=5))
    assert errors.keys() == BOUNDS.keys()
    assert all(errors[t] < bound for t, bound in BOUNDS.items()), errors


BOUNDS = {50: 0.0007, 200: 0.0038, 400: 0.0088, 600: 0.0174, 800: 0.0458}


def test_samples_are_heads(prior):
    x = training.draw(prior, (24, 1, 64, 64), steps=20, seed=2)
    assert (x[:, :, [0, -1]] + 1).abs().max() < 0.1 and (x[:, :, :, [0, -1]] + 1).abs().max() < 0.1
    assert x.amax((1, 2, 3)).min() > 0.2 and x.max() < 1.3  # the skull
    # The distance is 0.3 to 0.4 for these and 0.1 for 24 new phantoms, 2.3 if they have a fifth less contrast, 3.1 if
    # blurred over 5 x 5 pixels.
    assert training.energy_distance(x, phantoms.generate(200, seed=5)) < 0.8


def test_a_posterior_from_few_views(prior):
    truth = phantoms.generate(2, seed=6)
    operator = fg.operators.ParallelBeam(torch.arange(12) * (math.pi / 12), 64)
    y = operator(truth) + torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    guidance = fg.PnP(fg.likelihoods.Gaussian(y, operator, 1.0))
    out = fg.sample(prior, truth.shape, guidance=guidance, steps=20, seed=0, samples_per_observation=4)
    assert training.psnr(truth, out.mean()) > 31
    ridge = operator.adjoint(operator.solve_gram(y, 1.0, 1.0))
    assert training.psnr(truth, out.mean()) > training.psnr(truth, ridge) + 9
    residual = operator(out.x.flatten(0, 1)) - y.repeat_interleave(4, 0)
    assert 0.7 < residual.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
def test_dtypes(prior, dtype, tolerance):
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300, 900])
    got = phantoms.prior(dtype=dtype).net(x.to(dtype), t)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), prior.net(x, t), rtol=0, atol=tolerance)


def test_gradients_reach_the_state():
    """Guidance needs the gradient in x_t. In double precision it equals finite differences."""
    pytest.importorskip("safetensors")
    assert_gradient_in_x(phantoms.prior(dtype=torch.float64), (1, 1, 64, 64))


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A network and batches that are small enough to train quickly."""
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | {"widths": [8, 16]})
    monkeypatch.setattr(train, "BATCH", 4)


def small_net():
    torch.manual_seed(0)
    return UNet(**train.CONFIG)


def test_training_learns(small):
    net = train.train_prior(small_net(), steps=60)
    images = phantoms.generate(16, seed=5)
    assert training.held_out_loss(net, images, repeats=2) < 0.8 * training.held_out_loss(small_net(), images, repeats=2)


def test_every_step_has_new_phantoms_of_a_seed_that_is_left_to_the_training(small, monkeypatch):
    calls = []

    def watched(number, *, seed, first):
        calls.append((number, seed, first))
        return phantoms.generate(number, seed=seed, first=first)

    monkeypatch.setattr(train, "generate", watched)
    train.train_prior(small_net(), steps=3, seed=7)
    assert calls == [(4, 2**63 + 7, 0), (4, 2**63 + 7, 4), (4, 2**63 + 7, 8)]


def test_training_continues_to_the_same_bits(small, tmp_path):
    whole = train.train_prior(small_net(), steps=9)

    class Stop(Exception):
        pass

    def stop(step, loss, average):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train.train_prior(small_net(), steps=9, report=stop, checkpoint=tmp_path / "run", interval=0.0)
    parts = train.train_prior(small_net(), steps=9, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_the_flat_learning_rate_does_not_depend_on_the_number_of_steps():
    assert [train.rate(i, 600) for i in (0, 99, 399)] == [train.rate(i, 6000) for i in (0, 99, 399)] == [0.01, 1, 1]
    assert train.rate(500, 600) == pytest.approx(0.5) and train.rate(600, 600) == 0


def test_the_script_runs(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    threads = torch.get_num_threads()
    try:
        train.main(["--steps", "2", "--samples", "3", "--out", str(tmp_path)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert '"v loss"' in capsys.readouterr().out
    monkeypatch.setattr(phantoms, "_FILE", tmp_path / "weights.safetensors")
    assert phantoms.prior().net.stem.weight.shape == (8, 4, 3, 3)
