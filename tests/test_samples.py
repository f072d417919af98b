"""What can be asked of samples: moments, quantiles, draws, a file, a line of text."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from gaussian import example, gaussian_likelihood
from hypothesis import given, settings
from hypothesis import strategies as st

import fastguide as fg
from fastguide import Samples


def weighted(weights, x, **options):
    """One observation, an event of one element; weights are shares."""
    log_weights = torch.tensor([weights], dtype=torch.float64).log() + 7.0
    return Samples(torch.tensor(x).reshape(1, -1, 1), log_weights, **options)


def equal(x):
    return Samples(x, grouped=True)


# --- moments ------------------------------------------------------------------------------------------------


def test_moments_of_equal_weights_are_numpys():
    x = torch.randn(3, 11, 2, 4, generator=torch.Generator().manual_seed(0))
    out = equal(x)
    assert out.mean().dtype == out.variance().dtype == torch.float64
    np.testing.assert_allclose(out.mean(), x.double().numpy().mean(1), rtol=1e-12)
    np.testing.assert_allclose(out.variance(), x.double().numpy().var(1), rtol=1e-12)
    assert torch.equal(out.weights, torch.full((3, 11), 1 / 11, dtype=torch.float64))


def test_moments_of_unequal_weights():
    out = weighted([0.5, 0.25, 0.25], [1.0, 2.0, 4.0])
    assert out.mean().item() == pytest.approx(2.0, abs=1e-12)
    assert out.variance().item() == pytest.approx(0.5 + 1.0, abs=1e-12)  # 0.5 * 1 + 0.25 * 0 + 0.25 * 4


@pytest.mark.parametrize("dead", [math.nan, math.inf, -math.inf, 100.0])
def test_dead_particles_count_nowhere(dead):
    out = weighted([0.0, 0.5, 0.5, 0.0], [dead, 1.0, 3.0, -dead])
    assert out.weights.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    assert (out.mean().item(), out.variance().item()) == (2.0, 1.0)
    assert out.quantile([0.0, 0.5, 0.51, 1.0]).flatten().tolist() == [1.0, 1.0, 3.0, 3.0]
    assert set(out.draw(8).flatten().tolist()) == {1.0, 3.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float64(dtype):
    x = torch.full((1, 4096, 1), 1.01, dtype=dtype)
    out = equal(x)
    assert out.mean().item() == x[0, 0].item() and out.variance().item() == 0.0
    assert out.quantile(0.5).dtype == out.draw(3).dtype == dtype
    assert out.quantile(0.5).item() == x[0, 0].item()


@pytest.mark.parametrize("value, got", [(-math.inf, "-inf"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_row_without_a_usable_weight_is_refused(value, got):
    out = Samples(torch.zeros(2, 3, 1), torch.tensor([[0.0, 0.0, 0.0], [value] * 3]))
    for ask in (out.mean, out.variance, lambda: out.quantile(0.5), lambda: out.weights):
        with pytest.raises(ValueError, match=f"log_weights: expected a finite largest one .*, got {got} for 1"):
            ask()


# --- quantiles ----------------------------------------------------------------------------------------------

SHARES = [0.0, 0.001, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.75, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_quantiles_of_equal_weights_are_numpys(count, dtype):
    x = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(count)).to(dtype)
    expected = np.quantile(x.numpy(), SHARES, axis=1, method="inverted_cdf")
    for out in (equal(x), Samples(x, torch.full((2, count), -1234.5, dtype=torch.float64))):
        found = out.quantile(SHARES)
        assert found.dtype == dtype and found.shape == (len(SHARES), 2, 3)
        assert np.array_equal(found.numpy(), expected)
        assert torch.equal(out.quantile(0.25), found[3])
        assert torch.equal(out.quantile(torch.tensor(SHARES, dtype=torch.float64)), found)


def test_quantiles_of_unequal_weights_by_hand():
    """Sorted: -1 with 0.1, 0 with 0.4, 2 with 0.2, 5 with 0.3; the shares reached are 0.1, 0.5, 0.7 and 1."""
    out = weighted([0.2, 0.1, 0.3, 0.4], [2.0, -1.0, 5.0, 0.0])
    expected = {0.0: -1, 0.1: -1, 0.11: 0, 0.5: 0, 0.5001: 2, 0.7: 2, 0.71: 5, 1.0: 5}
    for share, value in expected.items():
        assert out.quantile(share).item() == value, share
    assert out.quantile([]).shape == (0, 1, 1)


def test_each_element_has_its_own_order():
    x = torch.tensor([[[1.0, 30.0], [2.0, 20.0], [3.0, 10.0]]])
    out = Samples(x, torch.tensor([[0.6, 0.3, 0.1]]).double().log())
    assert out.quantile(0.5).tolist() == [[1.0, 30.0]]
    assert out.quantile(0.35).tolist() == [[1.0, 20.0]]  # 10 has 0.1 and 20 has 0.4 of the weight


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 20), st.randoms())
def test_a_weight_is_as_many_copies(counts, twentieths, random):
    values = [float(random.randint(-5, 5)) for _ in counts]
    share = twentieths / 20
    copies = sorted(v for v, n in zip(values, counts, strict=True) for _ in range(n))
    index = max(-(-twentieths * len(copies) // 20), 1) - 1  # the ceiling, of integers
    assert weighted([float(n) for n in counts], values).quantile(share).item() == copies[index]


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, [0.5, 2.0], [[0.5]]])
def test_other_shares_are_refused(q):
    with pytest.raises(ValueError, match=r"q: expected a number in \[0, 1\], or a row of them"):
        weighted([1.0], [1.0]).quantile(q)


# --- draws --------------------------------------------------------------------------------------------------


def test_draws_of_equal_weights_take_each_sample_once():
    x = torch.arange(24.0).reshape(2, 4, 3)
    drawn = equal(x).draw(4, seed=5)
    assert torch.equal(equal(x).draw(4, seed=np.int64(5)), drawn)
    assert torch.equal(drawn.sort(1).values, x)
    assert equal(x).draw(9).shape == (2, 9, 3)


def test_a_draw_does_not_share_numbers_with_the_run_of_its_seed():
    """Which particle is drawn says nothing about the noise of the steps."""
    rows, particles = 4000, 1000
    x = torch.arange(float(particles)).expand(rows, -1)[..., None]
    drawn = equal(x).draw(1, seed=3).flatten()
    noise = fg.ops.randn((rows, 4), seed=3, step=0)
    for values in (*noise.T, *noise.abs().T):
        assert abs(torch.corrcoef(torch.stack([drawn, values]))[0, 1]) < 0.08  # five standard errors


# --- one sample for each observation ------------------------------------------------------------------------


def test_one_sample_has_no_mean():
    out = fg.sample(example().denoiser(), (4, 3), steps=3, seed=0)
    words = r"expected several samples of each observation, got one \(x is \[4, 3\]\); .*samples_per_observation=n"
    for name, ask in {
        "mean": out.mean,
        "variance": out.variance,
        "quantile": lambda: out.quantile(0.5),
        "draw": lambda: out.draw(2),
        "weights": lambda: out.weights,
    }.items():
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            ask()


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"log_weights: expected shape \[2, 3\], .*, got \[3\]"):
        Samples(torch.zeros(2, 3, 1), torch.zeros(3))


@pytest.mark.parametrize("guidance", [None, fg.DPS(gaussian_likelihood()), fg.PnP(gaussian_likelihood())])
def test_samples_per_observation_have_moments(guidance):
    options = dict(guidance=guidance, steps=20, seed=0, samples_per_observation=500)
    out = fg.sample(example().denoiser(), (2, 3), **options)
    assert out.x.shape == (2, 500, 3) and out.grouped and out.log_weights is None
    assert torch.allclose(out.mean(), out.x.double().mean(1)) and out.draw(7).shape == (2, 7, 3)
    assert torch.allclose(out.variance(), out.x.double().var(1, correction=0))
    assert torch.equal(out.quantile(1.0), out.x.amax(1))


@pytest.mark.parametrize("guidance", [None, fg.TDS(gaussian_likelihood(), 16)], ids=["plain", "tds"])
def test_the_times_end_where_a_callback_ended_the_run(guidance):
    options = dict(guidance=guidance, steps=5, seed=0)
    whole = fg.sample(example().denoiser(), (2, 3), **options)
    part = fg.sample(example().denoiser(), (2, 3), **options, callback=lambda p: p.step == 1)
    levels = fg.schedules.flow().levels(5)
    assert whole.times == tuple(level.t for level in levels)
    assert part.times == whole.times[:3]  # the start, and after steps 0 and 1


# --- files --------------------------------------------------------------------------------------------------


def same(a: Samples, b: Samples) -> None:
    for field in dataclasses.fields(Samples):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        else:
            assert one == other and type(one) is type(other), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_file_keeps_every_field(dtype, tmp_path):
    guidance = fg.TDS(gaussian_likelihood(), 16)
    options = dict(guidance=guidance, steps=4, seed=2**64 - 1, dtype=dtype, keep_ancestors=True)
    out = fg.sample(example().denoiser(), (2, 3), **options)
    out.save(tmp_path / "a.safetensors")
    again = Samples.load(tmp_path / "a.safetensors")
    same(out, again)
    assert (again.method, again.seed, len(again.times)) == ("TDS", 2**64 - 1, 5)
    assert again.times[-1] == 0.0 and again.x.dtype == dtype and again.ancestors.dtype == torch.int32


def test_a_file_keeps_seeds_and_groups(tmp_path):
    x = torch.randn(2, 5, 3).transpose(1, 2)  # strides of its own
    for out in (Samples(x, grouped=True, seed=(3, 2**63)), Samples(x.requires_grad_()), Samples(x.detach()[:, 0])):
        out.save(tmp_path / "a.safetensors")
        same(out, Samples.load(tmp_path / "a.safetensors"))


def test_another_file_is_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file that Samples\.save wrote, got .*a\.safetensors"):
        Samples.load(tmp_path / "a.safetensors")


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"

    def refused():
        with pytest.raises(
            ValueError, match=r"^path: expected a file that Samples\.save wrote, got .*a\.safetensors: "
        ):
            Samples.load(path)

    for content in (b"", b"junk", bytes(4096)):
        path.write_bytes(content)
        refused()
    tensors = {"x": torch.zeros(2, 3)}
    for text in ("", "[]", '{"seed": 1, "colour": 2}'):
        safetensors.torch.save_file(tensors, path, {"fastguide.Samples": text})
        refused()
    safetensors.torch.save_file({"log_weights": torch.zeros(2)}, path, {"fastguide.Samples": "{}"})
    refused()
    with pytest.raises(FileNotFoundError):
        Samples.load(tmp_path / "nothing")


def test_fields_may_share_memory(tmp_path):
    x = torch.randn(2, 5, dtype=torch.float64)
    out = Samples(x[:, :, None], log_weights=x, ess=x.T, log_evidence=x[:, 0], grouped=True)
    out.save(tmp_path / "a.safetensors")
    same(out, Samples.load(tmp_path / "a.safetensors"))


def test_a_file_has_the_values_of_a_view_of_the_negative(tmp_path):
    out = Samples(torch._neg_view(torch.randn(2, 3)), log_evidence=torch._neg_view(torch.randn(2)))
    out.save(tmp_path / "a.safetensors")
    same(out, Samples.load(tmp_path / "a.safetensors"))


def test_without_safetensors_the_error_names_the_package():
    code = """
import sys
sys.modules["safetensors"] = None
import torch, fastguide
for call in (fastguide.Samples(torch.zeros(2, 3)).save, fastguide.Samples.load):
    try:
        call("a")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "expected safetensors to be installed (pip install 'fastguide[demo]')"
    assert done.stdout.splitlines() == [f"save: {expected}", f"load: {expected}"]


# --- text ---------------------------------------------------------------------------------------------------


def test_the_text_is_one_short_line():
    out = fg.sample(example().denoiser(), (2, 3), guidance=fg.TDS(gaussian_likelihood(), 16), steps=4, seed=3)
    low, high = (f"{v:.4g}" for v in (out.log_evidence.min().item(), out.log_evidence.max().item()))
    text = repr(out)
    assert text.startswith("Samples(TDS, x=[2, 16, 3] float32, ess=") and " of 16, lowest " in text
    ess = torch.tensor([[64.0, 30.0], [1.284, 40.0], [64.0, 64.0]])
    text_of_ess = repr(Samples(torch.zeros(2, 64, 3), torch.zeros(2, 64), ess))
    assert text_of_ess == "Samples(x=[2, 64, 3] float32, ess=64 of 64, lowest 1.284)"
    assert text.endswith(f"log_evidence={low} to {high}, steps=4, seed=3)") and "tensor" not in text
    plain = fg.sample(example().denoiser(), (2, 3), steps=4, seed=3, dtype=torch.float64)
    assert repr(plain) == "Samples(Plain, x=[2, 3] float64, steps=4, seed=3)"
    assert repr(Samples(torch.zeros(2, 3), seed=(1, 2))) == "Samples(x=[2, 3] float32, seed=2 of them)"
