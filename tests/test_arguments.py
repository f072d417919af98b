"""Values of a wrong kind, in every argument of the public functions. Each raises one error that names the argument."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch

import fastguide as fg
from fastguide import arguments, likelihoods, metrics, operators, ops, schedules
from fastguide.integrations import deepinv, k_diffusion
from fastguide.integrations.fkd import FKD


def freed(*shape):
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


FIT_NOWHERE = {
    "an object": object(),
    "a complex number": 1j,
    "bytes": b"a",
    "a set": {0.5},
    "a word": "no such word",
    "an integer beyond all floats": 10**400,
    "an integer too long to print": 10**5000,
    "NaN": math.nan,
    "True": True,
    "an array of words": np.array(["a", "b"]),
    "an array of objects": np.array([object(), None]),
    "a COO tensor": torch.ones(2, 3).to_sparse(),
    "a CSR tensor": torch.ones(2, 3).to_sparse_csr(),
    "an mkldnn tensor": torch.ones(2, 3).to_mkldnn(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "a quantized tensor": quantized(),
    "a freed tensor": freed(2, 3),
    "a list of tensors": [freed(2), freed(2)],
}

COUNTS = (  # these have no upper limit
    "checkpoint_every", "chunk_size", "factor", "max_elements", "resample_frequency", "resample_steps", "sampling_idx",
    "time_steps",
)  # fmt: skip

X = torch.arange(6.0).reshape(2, 3) / 7
IMAGES = torch.ones(2, 1, 4, 4)
LEVELS = (0.8, 0.6, 0.9, 0.4, 0.1)
TABLE = schedules.vp_cosine(20)
NET = lambda x, t, **_: 0.1 * x  # noqa: E731
PRIOR = fg.Denoiser(NET, TABLE, "v")
GAUSSIAN = likelihoods.Gaussian(torch.zeros(1, 3), operators.Identity(), 1.0)
COUNTER = dict(seed=0, step=0, stream=0, first_particle=0)
SAMPLE = dict(
    prior=PRIOR, shape=(2, 3), guidance=None, steps=3, spacing=None, eta=None, clip=None, seed=0, first_sample=0,
    samples_per_observation=None, x_T=None, dtype=torch.float32, device=None, chunk_size=None, keep_ancestors=False,
    progress=False, callback=None, checkpoint_every=10,
)  # fmt: skip


def guided(make):
    return lambda **given: fg.sample(PRIOR, (2, 3), steps=3, seed=0, guidance=make(**given))


def steered(**given):
    weighed = dict(sampling_idx=given.pop("sampling_idx"), latents=given.pop("latents"), x0_preds=given.pop("x0_preds"))
    return FKD(**given).resample(**weighed)


# Functions, and valid arguments for them.
CALLS = {
    "randn": (ops.randn, dict(shape=(2, 3), dtype=torch.float32, device="cpu", backend="auto", **COUNTER)),
    "reverse_step": (
        ops.reverse_step,
        dict(x=X, model_output=X, coefficients=LEVELS, prediction="epsilon", unconditional=X, guidance_scale=2.0,
             clip=None, clip_noise=True, displacement=X, displacement_scale=2.0, return_x0=False, backend="auto",
             **COUNTER),
    ),
    "predict_x0": (
        ops.predict_x0,
        dict(x=X, model_output=X, levels=(0.8, 0.6), prediction="v", unconditional=X, guidance_scale=2.0,
             backend="auto"),
    ),
    "propose_and_weigh": (
        ops.propose_and_weigh,
        dict(x=X, x0_hat=X, displacement=X, log_weights=torch.zeros(2), coefficients=LEVELS, clip=None,
             displacement_scale=2.0, backend="auto", **COUNTER),
    ),
    "resample": (
        ops.resample,
        dict(log_weights=torch.zeros(2, 3), scheme="systematic", num=None, ess_threshold=None, seed=0, step=0, stream=0,
             first_row=0, sorted=True, check=True, backend="auto"),
    ),
    "gather_particles_": (
        lambda states, ancestors, **given: ops.gather_particles_(ancestors, states, **given),
        dict(ancestors=torch.zeros(2, 3).long(), states=torch.ones(2, 3), check=True, backend="auto"),
    ),
    "log_prob_and_gradient": (
        ops.log_prob_and_gradient,
        dict(z=X, y=X, family="gaussian", scale=1.0, df=None, background=0.0, extra_variance=None, rows=None,
             return_gradient=True, backend="auto"),
    ),
    "vp_linear": (schedules.vp_linear, dict(steps=10, beta_start=1e-4, beta_end=0.02)),
    "vp_scaled_linear": (schedules.vp_scaled_linear, dict(steps=10, beta_start=1e-4, beta_end=0.02)),
    "vp_cosine": (schedules.vp_cosine, dict(steps=10, offset=0.008, beta_max=0.999)),
    "from_alphas_cumprod": (schedules.from_alphas_cumprod, dict(table=[0.9, 0.5])),
    "ve": (schedules.ve, dict(sigma_min=0.01, sigma_max=50.0)),
    "edm": (schedules.edm, dict(sigma_min=0.01, sigma_max=50.0)),
    "Schedule.levels": (schedules.edm().levels, dict(steps=4, spacing=None)),
    "Schedule.level": (TABLE.level, dict(t=3)),
    "Schedule.alpha": (TABLE.alpha, dict(t=3)),
    "Denoiser": (fg.Denoiser, dict(net=NET, schedule=TABLE, prediction="v", unconditional=NET, guidance_scale=1.0)),
    "Denoiser of a level": (PRIOR, dict(x=X, level=TABLE.level(3), rows=None)),
    "Conditional": (fg.Conditional, dict(net=NET)),
    "Inpainting": (operators.Inpainting, dict(mask=torch.ones(2, 3) > 0, per_observation=False)),
    "AveragePool": (operators.AveragePool, dict(factor=2)),
    "Blur": (operators.Blur, dict(kernel=torch.ones(3, 3), padding="zeros")),
    "Matrix": (operators.Matrix, dict(matrix=torch.ones(2, 3), event=None)),
    "Function": (
        operators.Function, dict(f=torch.exp, linear=True, event=(3,), adjoint=torch.exp, pseudo_inverse=None)
    ),
    "Gaussian": (likelihoods.Gaussian, dict(y=X, operator=operators.Identity(), scale=1.0)),
    "Laplace": (likelihoods.Laplace, dict(y=X, operator=operators.Identity(), scale=1.0)),
    "StudentT": (likelihoods.StudentT, dict(y=X, operator=operators.Identity(), scale=1.0, df=2.0)),
    "Poisson": (likelihoods.Poisson, dict(y=X, operator=operators.Identity(), scale=1.0, background=0.0)),
    "Callable": (likelihoods.Callable, dict(f=lambda x0: x0.sum(1), y=None, scale=None)),
    "log_prob": (GAUSSIAN.log_prob, dict(x0=X, rows=None)),
    "sample": (fg.sample, SAMPLE),
    "sample of particles": (fg.sample, SAMPLE | dict(guidance=fg.TDS(GAUSSIAN, 2), keep_ancestors=True)),
    "DPS": (guided(fg.DPS), dict(likelihood=GAUSSIAN, zeta=1.0, normalize=True, covariance=None)),
    "PnP": (guided(fg.PnP), dict(likelihood=GAUSSIAN, rho=None, zeta=0.5, solver="cg")),
    "PiGDM": (guided(fg.PiGDM), dict(likelihood=GAUSSIAN, zeta=1.0)),
    "DAPS": (
        guided(fg.DAPS),
        dict(likelihood=GAUSSIAN, r=0.5, ode_steps=2, solver="langevin", iterations=2, step_size=0.5),
    ),
    "LatentPnP": (
        guided(fg.LatentPnP),
        dict(likelihood=GAUSSIAN, decoder=lambda z: z, encoder=None, space="latent", rho=None, zeta=0.5, gamma=None,
             solver="auto"),
    ),
    "TDS": (
        guided(fg.TDS),
        dict(likelihood=GAUSSIAN, particles=4, covariance=None, resampler="systematic", ess_threshold=0.5),
    ),
    "FK": (
        guided(fg.FK),
        dict(reward=lambda x0: x0.sum(1), particles=4, potential="difference", strength=1.0, proposal="base",
             covariance=None, resampler="systematic", ess_threshold=0.5, resample_steps=None),
    ),
    "quantile": (fg.Samples(torch.rand(2, 4, 3), torch.zeros(2, 4).double()).quantile, dict(q=0.5)),
    "draw": (fg.Samples(torch.rand(2, 4, 3), torch.zeros(2, 4).double()).draw, dict(num=2, seed=0)),
    "interval": (fg.Samples(torch.rand(2, 4, 3), grouped=True).interval, dict(level=0.5, narrowest=True)),
    "to_pandas": (fg.Samples(torch.rand(2, 4, 3), grouped=True).to_pandas, dict(max_elements=8)),
    "to_arviz": (fg.Samples(torch.rand(2, 4, 3), grouped=True).to_arviz, dict(num=2, seed=0)),
    "psnr": (metrics.psnr, dict(x=X, truth=X, data_range=1.0)),
    "ssim": (metrics.ssim, dict(x=IMAGES, truth=IMAGES, data_range=1.0, window=3, sigma=1.0)),
    "coverage": (metrics.coverage, dict(interval=torch.stack([X, X]), truth=X)),
    "compare_steps": (
        fg.compare_steps,
        dict(prior=PRIOR, shape=(2, 3), guidance=fg.TDS(GAUSSIAN, 2), steps=3, doublings=1, runs=2, seed=0, eta=None),
    ),
    "FKD": (
        steered,
        dict(potential_type="diff", lmbda=1.0, num_particles=4, adaptive_resampling=True, resample_frequency=1,
             resampling_t_start=0, resampling_t_end=3, time_steps=4, reward_fn=lambda x: x.sum(1), reward_min_value=0.0,
             latent_to_decode_fn=lambda x: x, device="cpu", scheme="systematic", seed=0, strict=False, sampling_idx=2,
             latents=torch.ones(4, 3), x0_preds=torch.ones(4, 3)),
    ),
    "sample_euler": (
        k_diffusion.sample_euler,
        dict(model=NET, x=X, sigmas=k_diffusion.get_sigmas_karras(3, 0.1, 10.0), extra_args=None, callback=None,
             disable=True, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0),
    ),
    "sample_euler_ancestral": (
        k_diffusion.sample_euler_ancestral,
        dict(model=NET, x=X, sigmas=k_diffusion.get_sigmas_karras(3, 0.1, 10.0), disable=True, eta=1.0, s_noise=1.0,
             noise_sampler=None),
    ),
    "get_sigmas_karras": (
        k_diffusion.get_sigmas_karras, dict(n=3, sigma_min=0.1, sigma_max=10.0, rho=7.0, device="cpu")
    ),
    "deepinv.DPS": (
        deepinv.DPS,
        dict(denoiser=NET, schedule="vp", solver="ddpm", alpha=1.0, num_steps=3, weight=1.0, guidance="norm",
             verbose=False, device="cpu", dtype=torch.float64, rng=None, minus_one_one=True),
    ),
    "deepinv.prior": (deepinv.prior, dict(denoiser=NET, schedule=None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_fits_nowhere_is_an_error_that_names_the_argument(name):
    call, given = CALLS[name]
    call(**given)
    wrong = []
    for argument, taken in given.items():
        for what, value in FIT_NOWHERE.items():
            if (value is True and isinstance(taken, bool)) or (type(value) is int and argument in COUNTS):
                continue
            try:
                call(**{**given, argument: value})
                wrong.append(f"{argument} took {what}")
            except (TypeError, ValueError) as error:
                if not re.match(rf"[\w, ]*\b{argument}\b[\w, ]*(\[0\])?: expected .*got ", str(error), re.DOTALL):
                    wrong.append(f"{argument}, given {what}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


OPERATORS = {
    "Identity": (operators.Identity(), X, X),
    "Inpainting": (operators.Inpainting(torch.ones(3) > 0), X, X),
    "AveragePool": (operators.AveragePool(2), IMAGES, IMAGES[..., ::2, ::2]),
    "Blur": (operators.Blur(torch.ones(3, 3)), IMAGES, IMAGES),
    "Blur, zeros": (operators.Blur(torch.ones(3, 3), "zeros"), IMAGES, IMAGES),
    "Matrix": (operators.Matrix(torch.ones(2, 3)), X, X[:, :2]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_what_fits_no_operator_is_named(name):
    operator, x, y = OPERATORS[name]
    calls = {
        "x": (operator, x),
        "y": (operator.adjoint, y),
        "y of the pseudo-inverse": (operator.pseudo_inverse, y),
        "v": (lambda v: operator.solve_gram(v, 1.0, 1.0), y),
        "a": (lambda a: operator.solve_gram(y, a, 1.0), 1.0),
        "b": (lambda b: operator.gram_logdet(y, 1.0, b), 1.0),
        "event": (operator.matrix, x.shape[1:]),
        "dtype": (lambda dtype: operator.to(dtype=dtype), torch.float64),
        "device": (lambda device: operator.to(device), "cpu"),
    }
    for argument, (call, valid) in calls.items():
        call(valid)
        for what, value in FIT_NOWHERE.items():
            with pytest.raises((TypeError, ValueError), match=rf"^{argument.split()[0]}: expected .*got "):
                call(value)
                pytest.fail(f"{argument} took {what}")
    if name.startswith("Blur"):
        for call in (operator, operator.adjoint, operator.pseudo_inverse):
            with pytest.raises(ValueError, match=r"^\w: expected at least one sample, got shape \[0, 1, 4, 4\]"):
                call(IMAGES[:0])
            with pytest.raises(TypeError, match=r"^\w: expected floating values, got torch.complex64"):
                call(IMAGES + 0j)


def test_counts_beyond_what_can_be_counted():
    for call in (schedules.edm().levels, TABLE.levels, schedules.vp_linear, schedules.vp_cosine):
        with pytest.raises(ValueError, match=r"^steps: expected at most \d+.*, got 18446744073709551616$"):
            call(2**64)
    for name, value in (("particles", 2**48), ("particles", 10**400)):
        with pytest.raises(ValueError, match=rf"{name}: expected .* at most 2\^48.*, got 0, B = 2 and K = \d"):
            fg.sample(PRIOR, (2, 3), steps=3, guidance=fg.TDS(GAUSSIAN, value))
    with pytest.raises(ValueError, match=r"^first_sample, .* at most 2\^48.*, got 281474976710656, B = 2 and K = 1"):
        fg.sample(PRIOR, (2, 3), steps=3, first_sample=2**48)


def test_a_clip_of_large_integers_is_that_of_floats():
    for backend in ("auto", "reference"):
        for clip, same in ((2**64, 2.0**64), ((-(2**64), 2**63), (-(2.0**64), 2.0**63)), (np.float32(0.5), 0.5)):
            steps = [ops.reverse_step(X, X, LEVELS, clip=c, backend=backend) for c in (clip, same)]
            assert torch.equal(*steps)


@pytest.mark.parametrize(
    "value", [2.0, 2, np.float32(2.0), np.int64(2), np.array(2.0), torch.tensor(2), torch.ones(1, 1) * 2]
)
def test_what_is_taken_for_a_number(value):
    found = arguments.number("n", value, low=0.0)
    assert found == 2.0 and type(found) is float


@pytest.mark.parametrize(
    "bounds, expected",
    [
        (dict(above=2.0), "a finite number > 2"),
        (dict(low=3.0), "a finite number >= 3"),
        (dict(low=0.0, high=1.0), r"a number in \[0, 1\]"),
        (dict(above=0.0, below=2.0), r"a number in \(0, 2\)"),
        (dict(above=2.0, high=3.0), r"a number in \(2, 3\]"),
    ],
)
def test_the_bounds_of_a_number_are_told(bounds, expected):
    with pytest.raises(ValueError, match=rf"^n: expected {expected}, got 2$"):
        arguments.number("n", 2, **bounds)
    with pytest.raises(TypeError, match=rf"^n: expected {expected}, got '2'$"):
        arguments.number("n", "2", **bounds)


def test_what_is_taken_for_an_integer():
    for value in (3, np.int32(3), np.array(3), torch.tensor(3), torch.tensor([3])):
        found = arguments.integer("n", value, 0, 4)
        assert found == 3 and type(found) is int
    for value in (4, -1, 3.0, True, torch.tensor(3.0), torch.tensor(True), np.bool_(True), "3", None):
        with pytest.raises(ValueError, match=r"^n: expected an integer in \[0, 3\], got "):
            arguments.integer("n", value, 0, 4)


def test_what_an_error_says_of_a_value():
    assert arguments.got(freed(2)) == "torch.float32 [2] on cpu"
    assert arguments.got((freed(2), 1)) == "(torch.float32 [2] on cpu, 1)"
    assert arguments.got([1.5]) == "[1.5]" and arguments.got((1,)) == "(1,)"
    assert arguments.got(ops.DynamicThreshold(0.5, 2.0)) == "DynamicThreshold(ratio=0.5, max_value=2.0)"
    assert arguments.got(torch.ones(2).to_sparse()) == "torch.sparse_coo torch.float32 [2] on cpu"
    assert arguments.got(np.ones((2, 3))) == "array float64 [2, 3]"
    assert arguments.got(10**5000) == "int" and len(arguments.got(10**400)) < 120
