"""The package computes where its arguments are and in their dtype, whatever torch's default device and dtype are."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian import SCALE, example, gaussian_likelihood
from test_sampling import guidances
from torch.utils._device import _device_constructors

import fastguide as fg
from fastguide import digits, ops
from fastguide.integrations import fkd, k_diffusion

PACKAGE = Path(fg.__file__).parent
ELSEWHERE = {
    "digits/networks.py",  # torch makes the parameters of a module on the default device, so constants are there too
    "unet.py",  # the same
    "digits/train.py",  # a program with its own process
    "phantoms/train.py",  # another program
    "training.py",  # used by both programs
    "demo.py",  # a third program
}


def test_nothing_is_made_on_the_default_device():
    """Every call of a function that would use torch's default device gets a device."""
    names = {f.__name__.removeprefix("fft_") for f in _device_constructors()}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for call in ast.walk(ast.parse(path.read_text())) if file not in ELSEWHERE else ():
            if not isinstance(call, ast.Call):
                continue
            module, _, name = ast.unparse(call.func).rpartition(".")
            told = any(keyword.arg in ("device", None) for keyword in call.keywords)
            if module in ("torch", "torch.fft") and name in names and not told:
                found.append(f"{file}:{call.lineno}: {ast.unparse(call)}")
    assert not found


def equal(f, any_dtype: bool = True) -> None:
    """``f()`` returns the same with another default device, and with another default dtype. Its result may be nested.

    Some projects follow the default dtype, and so do their drop-ins: these set ``any_dtype`` to False."""
    expected = f()
    with torch.device("meta"):
        got = f()
    _compare(got, expected)
    if any_dtype:
        torch.set_default_dtype(torch.float64)
        try:
            got = f()
        finally:
            torch.set_default_dtype(torch.float32)
        _compare(got, expected)


def _compare(got, expected) -> None:
    if isinstance(expected, fg.Samples):
        got, expected = vars(got), vars(expected)
    if isinstance(expected, torch.Tensor):
        assert got.device == expected.device and torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            _compare(got[name], value)
    elif isinstance(expected, tuple | list):
        for a, b in zip(got, expected, strict=True):
            _compare(a, b)
    else:
        assert got == expected


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, OUTPUT, WEIGHTS = normal(4, 3, 5), normal(4, 3, 5, seed=1), normal(2, 9, seed=2).double()
SCALES = torch.tensor([2.0, 3.0, 0.5, 1.0])
LEVELS = (0.6, torch.tensor([0.8, 0.7, 0.6, 0.8]), 0.8, torch.tensor([0.6] * 4), 0.3)
PRIOR, PLACES = example().denoiser(), torch.tensor([[0, 0, 2, 3, 2]])


# --- operations -----------------------------------------------------------------------------------------------


# Each operation, with each scheme and family, because these have their own code.
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda **o: ops.randn((4, 3, 5), seed=1, **o),
        lambda **o: ops.reverse_step(X, OUTPUT, (0.6, 0.8, 0.8, 0.6, 0.3), return_x0=True, **o),
        lambda **o: ops.reverse_step(X, OUTPUT, LEVELS, clip=ops.DynamicThreshold(), **o),
        lambda **o: ops.predict_x0(X, OUTPUT, LEVELS[:2], prediction="v", unconditional=X, guidance_scale=SCALES, **o),
        lambda **o: ops.propose_and_weigh(X, OUTPUT, 0.1 * X, WEIGHTS[0, :4], LEVELS, seed=1, **o),
        *(
            lambda scheme=scheme, **o: ops.resample(WEIGHTS, num=5, scheme=scheme, seed=3, **o)
            for scheme in fg.reference.SCHEMES
        ),
        lambda **o: ops.resample(WEIGHTS[0], sorted=False, ess_threshold=0.5, **o),
        lambda **o: (state := X[None].repeat(1, 2, 1, 1)[:, :5], ops.gather_particles_(PLACES, state, **o))[0],
        *(
            lambda family=family, **o: ops.log_prob_and_gradient(
                X.abs(), OUTPUT[:1].abs(), family=family, scale=0.5, df=3.0 if family == "student_t" else None, **o
            )
            for family in fg.reference.FAMILIES
        ),
        lambda **o: ops.log_prob_and_gradient(
            X, OUTPUT[:2], family="gaussian", scale=0.5, extra_variance=X[:1] ** 2, rows=PLACES[0, 1:] % 2, **o
        ),
    ],
)
def test_operations(operation, backend):
    equal(lambda: operation(backend=backend))


# --- samplers -------------------------------------------------------------------------------------------------


# Every method draws noise with one seed, and with one for each observation. torch's seed is drawn before the method.
@pytest.mark.parametrize(
    ("name", "options"), [*itertools.product(guidances(), ({"seed": 3}, {"seed": [3, 4]})), ("plain", {})], ids=str
)
def test_guidance(name, options):
    def draw():
        torch.manual_seed(5)
        return fg.sample(PRIOR, (2, 3), guidance=guidances()[name](slice(None)), steps=4, device="cpu", **options)

    equal(draw)


@pytest.mark.parametrize(
    "guidance",
    [
        lambda y: fg.TDS(fg.likelihoods.StudentT(y, fg.operators.Blur(np.full((1, 3), 0.3), "zeros"), SCALE, 3.0), 8),
        lambda y: fg.DPS(fg.likelihoods.Gaussian(y, fg.operators.Blur([[0.1, 0.5, 0.2]]), SCALE), zeta=[0.5] * 4),
        lambda y: fg.PnP(fg.likelihoods.Gaussian(y, fg.operators.Blur([[0.1, 0.5, 0.2]], "zeros"), SCALE)),
        lambda y: fg.PnP(fg.likelihoods.Gaussian(y, fg.operators.Function(torch.sin), SCALE)),
        lambda y: fg.PiGDM(fg.likelihoods.Gaussian(y, fg.operators.Matrix(np.eye(5).reshape(5, 5), (1, 5)), SCALE)),
        lambda y: fg.FK(lambda x: (-x.square().sum((1, 2))).tolist(), 8),
        lambda y: fg.FK(fg.likelihoods.Callable(lambda x: -x.square().sum((1, 2))), 8),
        lambda y: fg.LatentPnP(
            fg.likelihoods.Gaussian(y, fg.operators.Function(lambda x: x), SCALE), torch.tanh, torch.atanh, "pixel"
        ),
    ],
)
def test_operators_and_rewards(guidance):
    y = 0.1 * normal(1, 5) if "Matrix" in guidance.__code__.co_names else 0.1 * normal(1, 1, 5)
    prior = fg.Denoiser(lambda x, t: 0.3 * x, fg.schedules.vp_linear(50), "sample")
    equal(lambda: fg.sample(prior, (1, 1, 5), guidance=guidance(y), steps=4, seed=1))


def test_a_checkpoint(tmp_path):
    def resumed():
        options = dict(guidance=fg.TDS(gaussian_likelihood(), 8), steps=6, seed=1, checkpoint=tmp_path / "run.pt")

        def kill(progress):
            if progress.step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fg.sample(PRIOR, (2, 3), checkpoint_every=2, callback=kill, **options)
        return fg.sample(PRIOR, (2, 3), **options)

    equal(resumed)


def test_samples(tmp_path):
    samples = fg.sample(PRIOR, (2, 3), guidance=fg.TDS(gaussian_likelihood(), 8), steps=4, seed=1)

    def ask():
        samples.save(tmp_path / "samples.safetensors")
        loaded = fg.Samples.load(tmp_path / "samples.safetensors")
        numbers = [loaded.mean(), loaded.variance(), loaded.draw(5), loaded.weights, repr(loaded)]
        return [loaded, *numbers, *(loaded.quantile(q) for q in (0.5, [0.1, 0.9], []))]

    equal(ask)


def test_the_digits():
    def draw():
        prior, encode, decode = digits.latent_prior()
        images, labels = digits.held_out()
        x = fg.sample(digits.prior(label=3, guidance_scale=2.0), (2, 1, 8, 8), steps=2, seed=1).x
        z = fg.sample(prior, (2, 2, 4, 4), steps=2, seed=1).x
        return images, labels, x, decode(z), encode(images[:2]), digits.classifier()(x)

    equal(draw)


# --- drop-ins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("DDPMScheduler", {}, {}),
        ("DDIMScheduler", {}, {"eta": 0.5}),
        ("EulerDiscreteScheduler", {}, {"s_churn": 4.0}),
        ("EulerAncestralDiscreteScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ],
)
def test_schedulers(name, config, options, fused_noise):
    pytest.importorskip("diffusers")
    from fastguide.integrations import diffusers as schedulers

    scheduler = getattr(schedulers, name)(**config)
    scheduler.fused_noise = fused_noise

    def run():
        scheduler.set_timesteps(4)
        x, generator = X, torch.Generator().manual_seed(2)
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(0.3 * given, t, x, generator=generator, **options).prev_sample
        return x

    scheduler.set_timesteps(4)
    equal(run, any_dtype=False)
    assert not scheduler.parent_calls


def test_k_diffusion():
    def run():
        torch.manual_seed(1)
        sigmas = [
            k_diffusion.get_sigmas_karras(4, 0.1, 10.0),
            k_diffusion.get_sigmas_exponential(4, 0.1, 10.0),
            k_diffusion.get_sigmas_polyexponential(4, 0.1, 10.0),
            k_diffusion.get_sigmas_vp(4),
        ]
        x = X
        for noise in (None, k_diffusion.PhiloxNoiseSampler(X)):
            x = k_diffusion.sample_euler_ancestral(
                lambda x, sigma: 0.3 * x, x, sigmas[0], disable=True, noise_sampler=noise
            )
        return x, sigmas

    equal(run, any_dtype=False)


@pytest.mark.parametrize("strict", [False, True])
def test_fkd(strict):
    rewards = [torch.tensor(0.5), -1.0, 2.0, 0.1]

    def run(reward):
        torch.manual_seed(1)
        steering = fkd.FKD(
            potential_type="max", lmbda=2.0, num_particles=4, adaptive_resampling=False, resample_frequency=1,
            resampling_t_start=0, resampling_t_end=3, time_steps=4, reward_fn=lambda x: reward, device="cpu",
            strict=strict,
        )  # fmt: skip
        x = X
        for i in range(4):
            x, _ = steering.resample(sampling_idx=i, latents=x, x0_preds=x)
        return x, steering.log_weights, steering.ancestors

    for reward in (rewards, [float(r) for r in rewards], np.array([float(r) for r in rewards])):
        equal(lambda reward=reward: run(reward), any_dtype=False)
