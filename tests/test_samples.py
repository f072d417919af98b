"""The methods of samples: moments, quantiles, draws, files, text."""

import dataclasses
import math
import sys
import types
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood, posterior
from hypothesis import given, settings
from hypothesis import strategies as st

import fastguide as fg
from fastguide import Samples


def weighted(weights, x, **options):
    """One observation with an event of one element. ``weights`` are shares."""
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
    """Sorted values and weights: -1 with 0.1, 0 with 0.4, 2 with 0.2, 5 with 0.3. Running sums: 0.1, 0.5, 0.7, 1."""
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


# --- intervals ----------------------------------------------------------------------------------------------


def test_intervals_by_hand():
    """Sorted values and weights: -1 with 0.1, 0 with 0.4, 2 with 0.2, 5 with 0.3."""
    out = weighted([0.2, 0.1, 0.3, 0.4], [2.0, -1.0, 5.0, 0.0])
    equal_tailed = {0.9: (-1, 5), 0.7: (0, 5), 0.3: (0, 2), 0.2: (0, 2), 0.1: (0, 2)}
    narrowest = {0.9: (0, 5), 0.8: (0, 5), 0.7: (-1, 2), 0.6: (0, 2), 0.5: (-1, 0), 0.4: (0, 0), 0.2: (2, 2)}
    narrowest[0.2] = (0, 0)  # the first interval of width 0
    for level, expected in equal_tailed.items():
        assert tuple(out.interval(level).flatten().tolist()) == expected, level
    for level, expected in narrowest.items():
        assert tuple(out.interval(level, narrowest=True).flatten().tolist()) == expected, level


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=1, max_size=9), st.integers(1, 19))
def test_an_interval_has_its_share_and_none_is_narrower(pairs, twentieths):
    values, counts = [v for v, _ in pairs], [n for _, n in pairs]
    if not any(counts):
        counts[0] = 1
    copies = sorted(v for v, n in zip(values, counts, strict=True) for _ in range(n))
    needed = -(-twentieths * len(copies) // 20)  # the ceiling, of integers
    widths = [copies[i + needed - 1] - copies[i] for i in range(len(copies) - needed + 1)]
    out = weighted([float(n) for n in counts], [float(v) for v in values])
    for narrowest in (False, True):
        low, high = out.interval(twentieths / 20, narrowest=narrowest).flatten().tolist()
        assert sum(low <= v <= high for v in copies) >= needed
        assert high - low == min(widths) if narrowest else high - low >= min(widths)


def test_intervals_of_a_gaussian_posterior():
    mean, covariance = example().chain(20, rows=MATRIX)
    means, covariance, _ = posterior(mean, covariance, MATRIX, Y, SCALE)
    guidance = fg.TDS(gaussian_likelihood(), 20_000)
    out = fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=20, seed=0, dtype=torch.float64)
    half = 1.6448536 * covariance.diagonal().sqrt()  # the 0.95 quantile of the normal
    for narrowest, tolerance in ((False, 0.05), (True, 0.15)):  # the narrowest is hard to locate
        low, high = out.interval(0.9, narrowest=narrowest)
        assert low.shape == (2, 3)
        assert ((low - (means - half)).abs() < tolerance * half).all()
        assert ((high - (means + half)).abs() < tolerance * half).all()
        assert ((high - low) / (2 * half) - 1).abs().max() < 0.03


def test_the_narrowest_interval_of_a_skew_density_begins_at_its_peak():
    """For the exponential density it is [0, -log(1 - level)]. Tested with equal weights on its quantiles, and with
    weights on a grid."""
    share = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    grid = torch.linspace(0, 12, 4001, dtype=torch.float64)
    for out in (equal(-torch.log1p(-share)[None, :, None]), Samples(grid[None, :, None], -grid[None])):
        low, high = out.interval(0.8, narrowest=True).flatten().tolist()
        assert low < 1e-3 and high == pytest.approx(-math.log(0.2), abs=5e-3)
        low, high = out.interval(0.8).flatten().tolist()
        assert (low, high) == pytest.approx((-math.log(0.9), -math.log(0.1)), abs=5e-3)


def test_dead_particles_end_no_interval():
    out = weighted([0.0, 0.5, 0.5, 0.0], [math.nan, 3.0, 1.0, -100.0])
    for narrowest in (False, True):
        assert out.interval(0.9, narrowest=narrowest).flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize("level", [0.0, 1.0, math.nan, -0.5, 90])
def test_other_levels_are_refused(level):
    with pytest.raises(ValueError, match=r"level: expected a number in \(0, 1\), got"):
        weighted([1.0], [1.0]).interval(level)


# --- draws --------------------------------------------------------------------------------------------------


def test_draws_of_equal_weights_take_each_sample_once():
    x = torch.arange(24.0).reshape(2, 4, 3)
    drawn = equal(x).draw(4, seed=5)
    assert torch.equal(equal(x).draw(4, seed=np.int64(5)), drawn)
    assert torch.equal(drawn.sort(1).values, x)
    assert equal(x).draw(9).shape == (2, 9, 3)


def test_a_draw_does_not_share_numbers_with_the_run_of_its_seed():
    """The choice of the particle is independent of the noise of the steps."""
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
        "interval": lambda: out.interval(0.5, narrowest=True),
        "to_arviz": out.to_arviz,
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


def test_without_safetensors_the_error_names_the_package(python):
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
    done = python(code)
    expected = "expected safetensors to be installed (pip install 'fastguide[demo]')"
    assert done.stdout.splitlines() == [f"save: {expected}", f"load: {expected}"]


# --- numpy, pandas, ArviZ -----------------------------------------------------------------------------------


def run_of_particles(**options):
    options = dict(guidance=fg.TDS(gaussian_likelihood(), 16), steps=4, seed=3) | options
    return fg.sample(example().denoiser(), (2, 3), **options)


def test_numpy_has_every_tensor_by_its_name(tmp_path):
    out = run_of_particles(keep_ancestors=True)
    found = out.numpy()
    names = {"x", "log_weights", "ess", "log_evidence", "log_evidence_error", "ancestors", "first_ancestors", "weights"}
    assert set(found) == names
    for name, array in found.items():
        assert type(array) is np.ndarray and np.array_equal(array, getattr(out, name).numpy()), name
        assert array.dtype == getattr(out, name).numpy().dtype
    for b in range(2):
        np.testing.assert_allclose(np.average(found["x"][b], axis=0, weights=found["weights"][b]), out.mean()[b], 1e-6)
    np.savez(tmp_path / "a.npz", **found)
    with np.load(tmp_path / "a.npz") as file:
        assert all(np.array_equal(file[name], array) for name, array in found.items())
    found["x"][0, 0, 0] = 7.0
    assert out.x[0, 0, 0] == 7.0  # the memory is shared
    assert list(Samples(torch.zeros(2, 3)).numpy()) == ["x"]


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.bfloat16, "float32"), (torch.float16, "float16"), (torch.float32, "float32"), (torch.float64, "float64")],
)
def test_dtypes_of_numpy(dtype, expected):
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = equal(x).numpy()
    assert found["x"].dtype == expected and np.array_equal(found["x"], x.detach().double().numpy())
    assert np.array_equal(found["weights"], np.full((2, 5), 0.2))
    assert np.array_equal(Samples(torch._neg_view(x.detach())).numpy()["x"], -x.detach().double().numpy())


def test_a_frame_has_a_row_for_each_sample():
    pytest.importorskip("pandas")
    log_weights = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]], dtype=torch.float64).log()
    x = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 2, 2)
    frame = Samples(x, log_weights).to_pandas()
    elements = ["x[0, 0]", "x[0, 1]", "x[1, 0]", "x[1, 1]"]
    assert list(frame.columns) == ["observation", "sample", "weight", *elements]
    assert frame.observation.tolist() == [0, 0, 0, 1, 1, 1] and frame["sample"].tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(frame.weight, [0.5, 0.25, 0.25, 0.1, 0.9, 0.0], rtol=1e-12)
    assert np.array_equal(frame[elements].to_numpy(), np.arange(24.0).reshape(6, 4))
    assert (frame.dtypes[elements] == "float32").all()
    assert list(equal(x[..., 0, 0]).to_pandas().columns[3:]) == ["x"]


def test_a_frame_of_one_sample_for_each_observation():
    pytest.importorskip("pandas")
    frame = Samples(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_pandas()
    assert frame.to_numpy().tolist() == [[0, 0, 1, 1, 2], [1, 0, 1, 3, 4]]
    assert list(frame.columns[3:]) == ["x[0]", "x[1]"]


def test_a_frame_of_too_many_elements_is_refused():
    with pytest.raises(ValueError, match=r"max_elements: expected at least 1056, .* shape \[33, 32\], got 1024"):
        Samples(torch.zeros(2, 33, 32)).to_pandas()
    with pytest.raises(ValueError, match=r"max_elements: expected at least 3, .*, got 2"):
        Samples(torch.zeros(2, 3)).to_pandas(max_elements=2)
    pytest.importorskip("pandas")
    assert Samples(torch.zeros(2, 33, 32)).to_pandas(max_elements=1056).shape == (2, 1059)


@pytest.fixture(params=["InferenceData", "DataTree"])
def arviz(request, monkeypatch):
    """The installed ArviZ, and a stand-in for version 1, which needs Python 3.12. `to_arviz` then needs only xarray.
    Version 1 still has the name ``InferenceData``, for another class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the changes in version 1
        found = pytest.importorskip("arviz")
    before_1 = found.__version__.startswith("0.")
    if before_1 and request.param == "DataTree":
        stand_in = types.ModuleType("arviz")
        stand_in.__version__, stand_in.InferenceData = "1.3.0", pytest.importorskip("xarray").DataTree
        monkeypatch.setitem(sys.modules, "arviz", stand_in)
    elif not before_1 and request.param == "InferenceData":
        pytest.skip("ArviZ is of version 1 or later")
    return found


def test_arviz_gets_draws_of_equal_weight(arviz):
    out = run_of_particles(guidance=fg.TDS(gaussian_likelihood(), 512), dtype=torch.float64)
    data = out.to_arviz()
    x = data["posterior"]["x"]
    assert x.dims == ("chain", "draw", "observation", "x_dim_0") and x.shape == (1, 512, 2, 3)
    assert x.coords["observation"].values.tolist() == [0, 1]
    assert np.array_equal(x.values[0], out.draw(512).transpose(0, 1).numpy())
    assert np.abs(x.values.mean((0, 1)) - out.mean().numpy()).max() < 0.02
    stats = data["sample_stats"]
    assert stats["ess"].dims == ("chain", "step", "observation")
    assert np.array_equal(stats["ess"].values[0], out.ess.numpy())
    for name in ("log_evidence", "log_evidence_error", "effective_ancestors"):
        assert stats[name].dims == ("chain", "observation")
        assert np.array_equal(stats[name].values[0], getattr(out, name).numpy())
    assert data["posterior"].attrs == {"inference_library": "fastguide", "method": "TDS", "seed": "3"}
    few = out.to_arviz(num=5, seed=1)["posterior"]["x"]
    assert np.array_equal(few.values[0], out.draw(5, seed=1).transpose(0, 1).numpy())


def test_arviz_gets_samples_without_weights_as_they_are(arviz):
    x = torch.randn(2, 7, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = equal(x).to_arviz()
    assert np.array_equal(data["posterior"]["x"].values[0], x.float().transpose(0, 1).numpy())
    assert data["posterior"]["x"].dims[2:] == ("observation", "x_dim_0", "x_dim_1")
    assert not hasattr(data, "sample_stats")
    with pytest.raises(ValueError, match=r"num: expected an integer in .*, got 0"):
        equal(x).to_arviz(num=0)


def test_runs_with_other_seeds_are_chains_of_arviz(arviz):
    guidance = fg.TDS(gaussian_likelihood(), 512)
    found = [run_of_particles(guidance=guidance, steps=20, seed=seed).to_arviz() for seed in range(3)]
    if type(found[0]).__name__ == "DataTree":
        joined = pytest.importorskip("xarray").concat(found, dim="chain")
    else:
        joined = arviz.concat(*found, dim="chain")
    if type(found[0]).__name__ != "DataTree" or not arviz.__version__.startswith("0."):
        summary = arviz.summary(joined)
        means = posterior(*example().chain(20), MATRIX, Y, SCALE)[0]
        assert np.abs(summary["mean"].to_numpy() - means.flatten().numpy()).max() < 0.12
        assert summary["r_hat"].max() < 1.1
    assert joined["posterior"]["x"].shape == (3, 512, 2, 3) and joined["sample_stats"]["log_evidence"].shape == (3, 2)


def test_without_a_package_the_error_names_it(python):
    code = """
import sys
sys.modules["arviz"] = sys.modules["pandas"] = None
import torch, fastguide
out = fastguide.Samples(torch.zeros(2, 3, 1), grouped=True)
for call in (out.to_pandas, out.to_arviz):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = python(code)
    assert done.stdout.splitlines() == [
        "to_pandas: expected pandas to be installed (pip install pandas)",
        "to_arviz: expected arviz to be installed (pip install arviz)",
    ]


# --- text ---------------------------------------------------------------------------------------------------


def test_the_text_is_one_short_line():
    out = fg.sample(example().denoiser(), (2, 3), guidance=fg.TDS(gaussian_likelihood(), 16), steps=4, seed=3)
    low, high = (f"{v:.4g}" for v in (out.log_evidence.min().item(), out.log_evidence.max().item()))
    text = repr(out)
    assert text.startswith("Samples(TDS, x=[2, 16, 3] float32, ess=") and " of 16, lowest " in text
    ess = torch.tensor([[64.0, 30.0], [1.284, 40.0], [64.0, 64.0]])
    text_of_ess = repr(Samples(torch.zeros(2, 64, 3), torch.zeros(2, 64), ess))
    assert text_of_ess == "Samples(x=[2, 64, 3] float32, ess=64 of 64, lowest 1.284)"
    assert f", log_evidence={low} to {high}, error=" in text and ", ancestors=" in text
    assert text.endswith(", steps=4, seed=3)") and "tensor" not in text
    plain = fg.sample(example().denoiser(), (2, 3), steps=4, seed=3, dtype=torch.float64)
    assert repr(plain) == "Samples(Plain, x=[2, 3] float64, steps=4, seed=3)"
    assert repr(Samples(torch.zeros(2, 3), seed=(1, 2))) == "Samples(x=[2, 3] float32, seed=2 of them)"
