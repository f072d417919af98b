"""Against k-diffusion itself, with the same torch seed: every sampler with its options, callbacks and noise. In
float64, so that rounding does not hide a difference."""

from __future__ import annotations

import inspect
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from watched import watched

from benchmarks.cases import Absent
from benchmarks.integrations.k_diffusion import original_k_diffusion
from fastguide import ops
from fastguide.integrations import k_diffusion as ours

try:
    original = original_k_diffusion()
except (Absent, ImportError) as error:
    pytest.skip(f"k-diffusion: {error}", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # torchsde, about rounding at an end

SAMPLERS = [name for name in ours.__all__ if name.startswith("sample_")]
CHURNED = ("sample_euler", "sample_heun", "sample_dpm_2")
SDES = ("sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")
NOISY = [name for name in SAMPLERS if name in SDES or name.endswith("ancestral")]


def model(x, sigma, shift=0.0):
    """Nonlinear in both arguments, so that differences are visible."""
    sigma = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma**2) ** 0.5 + shift) - 0.1 * sigma.log1p() * torch.sin(3 * x)


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return 10 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(dtype)


def karras(dtype=torch.float64, n=7):
    return ours.get_sigmas_karras(n, 0.05, 10.0).to(dtype)


def both(name, *args, seed=5, **options):
    """The results of both modules. Checks that both leave the generator in the same state."""
    results = []
    for module in (ours, original):
        torch.manual_seed(seed)
        x = getattr(module, name)(model, *args, disable=True, **options)
        results.append((x, torch.rand([])))
    (x, after), (expected, expected_after) = results
    assert after == expected_after, "other draws than k-diffusion's"
    assert x.dtype == expected.dtype
    return x, expected


CASES = [(name, {}) for name in SAMPLERS]
CASES += [(name, dict(s_churn=churn, s_tmin=0.2, s_tmax=5.0, s_noise=1.1)) for name in CHURNED for churn in (2.0, 9.0)]
CASES += [(name, dict(eta=eta, s_noise=0.9)) for name in NOISY for eta in (0.0, 0.5, 1.5)]
CASES += [("sample_dpmpp_sde", dict(r=r)) for r in (0.3, 0.8)]
CASES += [("sample_dpmpp_2m_sde", dict(solver_type="heun", eta=eta)) for eta in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("ends_at_zero", (True, False))
def test_equals_the_original(name, options, ends_at_zero):
    x, expected = both(name, start(), karras() if ends_at_zero else karras()[:-1], **options)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("dtype", "of_sigmas", "tolerance"),
    (
        (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.float64, 2e-5),
        (torch.float16, torch.float32, 2e-2),
        (torch.float16, torch.float16, 5e-2),
    ),
)
def test_equals_the_original_in_other_dtypes(name, dtype, of_sigmas, tolerance):
    """Equal up to the rounding of the original, which rounds after every operation, also its sigmas."""
    x, expected = both(name, start(dtype), karras(of_sigmas))
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ("sample_euler", "sample_dpmpp_2m", "sample_euler_ancestral", "sample_dpmpp_2m_sde"))
def test_a_model_of_another_dtype(name):
    """The result has the wider dtype, as under autocast, also in a fused step."""
    for state, denoised in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        seen = []
        for module in (ours, original):
            x = start(state)
            options = dict(noise_sampler=ours.PhiloxNoiseSampler(x, seed=0)) if name in NOISY else {}
            torch.manual_seed(1)

            def cast(x, sigma, to=denoised):
                return model(x, sigma).to(to)

            seen.append(getattr(module, name)(cast, x, karras(torch.float32)[:-1], disable=True, **options))
        torch.testing.assert_close(*seen, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_may_change_the_state(name):
    """As in inpainting by a callback. It may also overwrite ``denoised``, if the original has already read it."""

    def paint(step):
        step["x"][..., :2] = 5.0
        if name in CHURNED:
            step["denoised"].zero_()

    results = []
    for module in (ours, original):
        torch.manual_seed(3)
        results.append(getattr(module, name)(model, start(), karras(), None, paint, True))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SDES and name != "sample_dpmpp_2m"])
def test_a_model_may_have_one_output(name):
    """The model overwrites its output at each call, as a captured graph does. The samplers that are left out read an
    earlier output, in both projects."""
    results = []
    for reused in (False, True):
        output = torch.empty_like(start())

        def overwriting(x, sigma, reused=reused, output=output):
            return output.copy_(model(x, sigma)) if reused else model(x, sigma)

        torch.manual_seed(3)
        results.append(getattr(ours, name)(overwriting, start(), karras(), disable=True))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


RISING, REPEATED, REPEATED_LAST = [0.1, 0.5, 0.3, 0.0], [1.0, 0.5, 0.5, 0.2, 0.0], [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("noise", ("default", "caller's"))
@pytest.mark.parametrize("sigmas", (RISING, REPEATED, REPEATED_LAST))
def test_rising_and_repeated_levels(name, eta, noise, sigmas):
    """Equal to the original. If the original is NaN, ours raises an error with the levels before any evaluation."""
    options = {}
    if name in NOISY:
        options["eta"] = eta
        if noise == "caller's":
            options["noise_sampler"] = ours.default_noise_sampler(start())
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    torch.manual_seed(5)
    expected = getattr(original, name)(model, start(), sigmas, disable=True, **options)
    if expected.isfinite().all() and not (name == "sample_dpmpp_3m_sde" and sigmas.tolist() == RISING):
        torch.testing.assert_close(both(name, start(), sigmas, **options)[0], expected, rtol=1e-10, atol=1e-10)
        return
    evaluations = []
    wanted = "decreasing values" if sigmas.tolist() == RISING else "values that differ.* got 0.5 at 1 and 2"
    with pytest.raises(ValueError, match=f"^sigmas: expected {wanted}"):
        getattr(ours, name)(lambda x, sigma: evaluations.append(1), start(), sigmas, disable=True, **options)
    assert not evaluations


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", (np.float32, np.float64))
def test_sigmas_of_numpy(name, kind):
    """A numpy array works like a tensor of its dtype, also with negative strides."""
    array = karras().numpy().astype(kind)
    expected = both(name, start(), torch.from_numpy(array))[0]
    for sigmas in (array, array[::-1].copy()[::-1]):
        torch.manual_seed(5)
        x = getattr(ours, name)(model, start(), sigmas, disable=True)
        assert torch.equal(x, expected) and x.dtype == expected.dtype
    with pytest.raises(ValueError, match=r"sigmas: expected shape \[steps \+ 1\], got \[1, 8\]"):
        getattr(ours, name)(model, start(), array[None], disable=True)


@pytest.mark.parametrize("name", NOISY + list(CHURNED))
@pytest.mark.parametrize("noise", ("default", "philox"))
def test_options_may_be_tensors_without_dimensions(name, noise):
    options = dict(s_churn=2.0, s_tmin=0.2, s_tmax=5.0) if name in CHURNED else dict(eta=0.5)
    options |= dict(s_noise=0.75) | (dict(r=0.25) if name == "sample_dpmpp_sde" else {})
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in options.items()}
    results = []
    for given in (options, tensors):
        if noise == "philox" and name in NOISY:
            given = given | dict(noise_sampler=ours.PhiloxNoiseSampler(start(), seed=3))
        torch.manual_seed(1)
        results.append(getattr(ours, name)(model, start(), karras(), disable=True, **given))
    assert torch.equal(*results)
    for key in options:
        with pytest.raises(TypeError, match=rf"^{key}: expected a number, got torch.float32 \[2\]"):
            getattr(ours, name)(model, start(), karras(), disable=True, **{key: torch.ones(2)})


@pytest.mark.parametrize("name", SAMPLERS)
def test_signature_and_callback(name):
    signatures = [inspect.signature(getattr(module, name)).parameters for module in (ours, original)]
    assert [(p.name, p.kind, p.default) for p in signatures[0].values()] == [
        (p.name, p.kind, p.default) for p in signatures[1].values()
    ]
    seen = {}
    for module in (ours, original):
        calls = seen[module] = []
        options = dict(s_churn=2.0) if name in CHURNED else {}
        torch.manual_seed(5)
        function = getattr(module, name)
        x = start()
        function(model, x, karras(), {"shift": 0.2}, calls.append, True, **options)
        assert torch.equal(x, start()), "x was written to"
    assert len(seen[ours]) == len(seen[original]) == 7
    for got, expected in zip(seen[ours], seen[original], strict=True):
        assert list(got) == list(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10)
            else:
                assert got[key] == value


@pytest.mark.parametrize("name", NOISY)
def test_a_noise_sampler_is_asked_the_same(name):
    asked = {}
    for module in (ours, original):
        generator, calls = torch.Generator().manual_seed(2), asked.setdefault(module, [])

        def noise(sigma, sigma_next, generator=generator, calls=calls):
            calls.append((sigma, sigma_next))
            return torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)

        x = getattr(module, name)(model, start(), karras(), disable=True, noise_sampler=noise)
        calls.append(x)
    for got, expected in zip(asked[ours][:-1], asked[original][:-1], strict=True):
        assert torch.equal(torch.stack(got), torch.stack(expected))
    torch.testing.assert_close(asked[ours][-1], asked[original][-1], rtol=1e-10, atol=1e-10)


# --- levels and noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    (
        ("get_sigmas_karras", (9, 0.03, 14.6)),
        ("get_sigmas_karras", (4, 0.1, 80.0, 5.0)),
        ("get_sigmas_exponential", (9, 0.03, 14.6)),
        ("get_sigmas_polyexponential", (9, 0.03, 14.6, 2.0)),
        ("get_sigmas_vp", (9,)),
        ("get_sigmas_vp", (5, 18.0, 0.2, 1e-2)),
    ),
)
def test_levels(name, args):
    assert torch.equal(getattr(ours, name)(*args), getattr(original, name)(*args))  # exact: a Brownian path is rough
    signatures = [inspect.signature(getattr(module, name)).parameters for module in (ours, original)]
    assert [(p.name, p.default) for p in signatures[0].values()] == [
        (p.name, p.default) for p in signatures[1].values()
    ]


def test_derivative_and_ancestral_step():
    x, denoised, sigma = start(), start().cos(), torch.tensor([0.5, 2.0], dtype=torch.float64)
    for level in (sigma, sigma[0]):
        assert torch.equal(ours.to_d(x, level, denoised), original.to_d(x, level, denoised))
    for pair in ((2.0, 0.5), (0.5, 0.4), (1.0, 0.0)):
        for eta in (0.0, 0.3, 1.0, 4.0):
            expected = torch.tensor(original.get_ancestral_step(*pair, eta))
            torch.testing.assert_close(torch.tensor(ours.get_ancestral_step(*pair, eta)), expected)
            tensors = ours.get_ancestral_step(*(torch.tensor(level) for level in pair), eta)
            torch.testing.assert_close(torch.stack([torch.as_tensor(t) for t in tensors]), expected)


@pytest.mark.parametrize("seed", (None, 11, [3, 4]))
@pytest.mark.parametrize("ends", ((0.05, 10.0), (10.0, 0.05)))
def test_brownian_tree(seed, ends):
    x, got, transform = start(torch.float32), {}, lambda sigma: sigma.log()
    for module in (ours, original):
        torch.manual_seed(8)
        tree = module.BrownianTreeNoiseSampler(x, *ends, seed=seed, transform=transform)
        got[module] = torch.stack([tree(10.0, 4.0), tree(0.5, 0.1), tree(0.1, 0.5)])
    torch.testing.assert_close(got[ours], got[original])
    torch.testing.assert_close(got[ours][1], -got[ours][2])


def test_brownian_tree_errors(monkeypatch):
    with pytest.raises(ValueError, match="seed: expected one, or 2"):
        ours.BrownianTreeNoiseSampler(start(), 0.05, 10.0, seed=[1, 2, 3])
    monkeypatch.setitem(sys.modules, "torchsde", None)
    for name in SDES:
        with pytest.raises(ImportError, match="torchsde"):
            getattr(ours, name)(model, start(), karras(), disable=True)
        noise = ours.default_noise_sampler(start())
        assert getattr(ours, name)(model, start(), karras(), disable=True, noise_sampler=noise).isfinite().all()


@pytest.mark.parametrize("name", NOISY)
def test_philox_noise(name):
    """The noise is the same if it is fused into the step, if k-diffusion calls it, and for a part of a batch."""
    x, sigmas = start(), karras()
    fused = getattr(ours, name)(
        model, x, sigmas, disable=True, s_noise=1.2, noise_sampler=ours.PhiloxNoiseSampler(x, seed=7)
    )
    called = getattr(original, name)(
        model, x, sigmas, disable=True, s_noise=1.2, noise_sampler=ours.PhiloxNoiseSampler(x, seed=7)
    )
    torch.testing.assert_close(fused, called, rtol=1e-10, atol=1e-10)
    part = ours.PhiloxNoiseSampler(x[1:], seed=7, first_particle=1)
    torch.testing.assert_close(
        getattr(ours, name)(model, x[1:], sigmas, disable=True, s_noise=1.2, noise_sampler=part), fused[1:]
    )
    other = ours.PhiloxNoiseSampler(x, seed=8)
    assert not torch.allclose(getattr(ours, name)(model, x, sigmas, disable=True, noise_sampler=other), fused)


def test_philox_noise_does_not_repeat():
    """Noise differs between objects without a seed, between two runs of one object, and from a start with that seed."""
    x = start()
    torch.manual_seed(3)
    first, second = (ours.PhiloxNoiseSampler(x) for _ in range(2))
    torch.manual_seed(3)
    again = ours.PhiloxNoiseSampler(x)
    assert again.seed == first.seed != second.seed
    runs = [
        ours.sample_euler_ancestral(model, x, karras(), disable=True, noise_sampler=noise)
        for noise in (first, first, second, again)
    ]
    assert torch.equal(runs[0], runs[3])
    assert not torch.allclose(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    noise = ours.PhiloxNoiseSampler(x, seed=7)
    assert not torch.allclose(noise(1.0, 0.5), ops.randn(x.shape, seed=7, dtype=x.dtype))


# --- the original's names -----------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """k-diffusion as if it were installed, even if its other modules cannot be imported here."""
    ours._original.cache_clear()
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", original)
    yield
    ours._original.cache_clear()


def test_names_of_the_original(installed):
    for name in dir(original):
        if not name.startswith("_"):
            assert name in dir(ours)
            assert (getattr(ours, name) is getattr(original, name)) == (name not in ours.__all__)
    x = ours.sample_lms(model, start(), karras(), disable=True)
    assert torch.equal(x, original.sample_lms(model, start(), karras(), disable=True))
    with pytest.raises(AttributeError, match="sample_nothing"):
        ours.sample_nothing  # noqa: B018


def test_in_place_of_the_original(monkeypatch):
    """If our module replaces the original in ``sys.modules``, it still finds the original."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(original.__file__).parent)]
    utils = types.ModuleType("k_diffusion.utils")
    for name, module in (("k_diffusion", package), ("k_diffusion.sampling", ours), ("k_diffusion.utils", utils)):
        monkeypatch.setitem(sys.modules, name, module)
    package.utils = utils
    ours._original.cache_clear()
    try:
        assert ours.linear_multistep_coeff(1, [1.0, 0.25], 0, 0) == pytest.approx(-0.75)
        assert ours.PIDStepSizeController is ours.PIDStepSizeController
    finally:
        ours._original.cache_clear()


def test_names_without_the_original(monkeypatch):
    ours._original.cache_clear()
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", None)
    assert not hasattr(ours, "sample_lms") and "sample_lms" not in dir(ours) and "sample_heun" in dir(ours)
    with pytest.raises(AttributeError, match=r"^sample_lms: not defined in .* and k-diffusion.* cannot be imported"):
        ours.sample_lms  # noqa: B018


# --- errors, progress, waiting ------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"solver_type: expected one of .*'heun', 'midpoint'.*, got"):
        ours.sample_dpmpp_2m_sde(model, start(), karras(), solver_type="euler")
    for bad in ([1.0, 0.0, 0.0], [0.0, 1.0], [1.0, -0.5], [math.nan, 0.0], [math.inf, 1.0, 0.0]):
        for sampler in (ours.sample_euler, ours.sample_heun, ours.sample_dpmpp_sde):
            with pytest.raises(ValueError, match="sigmas: expected finite numbers above 0"):
                sampler(model, start(), torch.tensor(bad))
    assert torch.equal(ours.sample_euler(model, start(), karras()[:1]), start())  # no step
    for name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        with pytest.raises(ValueError, match="eta: expected a number >= 0, got -1"):
            getattr(ours, name)(model, start(), karras(), eta=-1.0)
    with pytest.raises(ValueError, match="r: expected a number > 0, got 0"):
        ours.sample_dpmpp_sde(model, start(), karras(), r=0.0)
    with pytest.raises(ValueError, match=r"sigma_next: expected a number other than sigma, got 0\.5 for both"):
        ours.BrownianTreeNoiseSampler(start(), 0.05, 10.0)(0.5, 0.5)


def test_progress(monkeypatch, capsys):
    ours.sample_euler(model, start(), karras(), disable=True)
    assert not capsys.readouterr().err
    ours.sample_euler(model, start(), karras(), disable=False)
    assert "7/7" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    expected = both("sample_euler", start(), karras())[1]
    torch.manual_seed(5)
    torch.testing.assert_close(ours.sample_euler(model, start(), karras()), expected)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "noise"),
    [(name, "default") for name in SAMPLERS if name not in SDES]
    + [(name, noise) for name in NOISY for noise in ("caller's", "philox")],
)
def test_no_step_waits(name, noise, monkeypatch):
    """States and sigmas on the ``meta`` device have no values. Only the one read before the loop is allowed."""
    reads, asked = [], []
    monkeypatch.setattr(ours, "_to_host", lambda sigmas: reads.append(sigmas) or karras(torch.float32))
    x, sigmas = start(torch.float32).to("meta"), karras(torch.float32).to("meta")
    options = dict(s_churn=2.0, s_tmin=0.2, s_tmax=5.0) if name in CHURNED else {}
    if noise == "philox":
        options["noise_sampler"] = ours.PhiloxNoiseSampler(x)
    elif noise == "caller's":
        options["noise_sampler"] = lambda *ends: asked.extend(ends) or torch.randn_like(x)
    with watched():
        out = getattr(ours, name)(model, x, sigmas, callback=lambda _: None, disable=True, **options)
    assert out.device.type == "meta" and out.shape == x.shape
    assert len(reads) == 1 and reads[0] is sigmas
    assert all(sigma.device.type == "meta" for sigma in asked)  # on the device of the sigmas, as in k-diffusion


def test_sigmas_are_read_from_the_device():
    with FakeTensorMode():
        assert ours._to_host(torch.empty(3, device="cuda")).device.type == "cpu"


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("given", (False, True))
def test_a_brownian_tree_is_asked_on_the_host(name, given, monkeypatch):
    """It compares sigmas, which would wait for a device."""
    expected = both(name, start(), karras())[1]
    monkeypatch.setattr(ours, "_to_host", lambda sigmas: karras())
    torch.manual_seed(5)
    options = dict(noise_sampler=ours.BrownianTreeNoiseSampler(start(), *karras()[[-2, 0]])) if given else {}
    x = getattr(ours, name)(model, start(), karras().to("meta"), disable=True, **options)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
