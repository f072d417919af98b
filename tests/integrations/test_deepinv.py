"""Against deepinv itself: operators, densities, denoisers, and samplers of the same name with the same noise."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from unittest import mock

import gaussian
import pytest
import torch

import fastguide as fg
from fastguide.guidance.base import STREAM_INITIAL
from fastguide.integrations import deepinv as ours
from fastguide.operators import LinearOperator


def _import_original() -> types.ModuleType:
    try:
        try:
            import deepinv
        except RuntimeError:  # a torchvision that does not fit this torch; it is not needed here
            name = "torchvision._meta_registrations"
            sys.modules[name] = types.ModuleType(name)
            import deepinv
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"deepinv cannot be imported: {error}", allow_module_level=True)
    return deepinv


dinv = _import_original()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(7)


def householder(v):
    return lambda x: x - 2 * v * (x * v).sum(-1, keepdim=True) / (v @ v)


def user_made():
    """A decomposable physics with orthonormal U and V. Each is its own adjoint."""
    u, v = householder(randn(6, seed=1)), householder(randn(6, seed=2))
    return dinv.physics.DecomposablePhysics(U=u, U_adjoint=u, V=v, V_adjoint=v, mask=torch.arange(6.0))


def matrix_physics(matrix, **kwargs):
    return dinv.physics.LinearPhysics(A=lambda x: x @ matrix.T, A_adjoint=lambda y: y @ matrix, **kwargs)


KERNEL = torch.tensor([[0.1, 0.3, 0.0], [0.2, 0.5, 0.1], [0.0, 0.2, 0.1]])[None, None]

# The shape of an event, and the physics
DECOMPOSABLE = {
    "Denoising": ((1, 4, 5), lambda: dinv.physics.Denoising()),
    "Inpainting": ((2, 4, 5), lambda: dinv.physics.Inpainting((2, 4, 5), mask=0.5, rng=generator())),
    "Demosaicing": ((3, 4, 4), lambda: dinv.physics.Demosaicing((4, 4))),
    "BlurFFT": ((2, 6, 8), lambda: dinv.physics.BlurFFT((2, 6, 8), filter=KERNEL)),
    "BlurFFT, odd": ((1, 5, 7), lambda: dinv.physics.BlurFFT((1, 5, 7), filter=KERNEL)),
    "MRI": ((2, 4, 6), lambda: dinv.physics.MRI(mask=(randn(4, 6) > 0).float(), img_size=(4, 6))),
    "SinglePixelCamera": ((1, 8, 8), lambda: dinv.physics.SinglePixelCamera(20, (1, 8, 8))),
    "SinglePixelCamera, random": (
        (1, 4, 4),
        lambda: dinv.physics.SinglePixelCamera(7, (1, 4, 4), fast=False, rng=generator()),
    ),
    "Decolorize": ((3, 3, 4), lambda: dinv.physics.Decolorize()),
    "user-made": ((6,), user_made),
}
LINEAR = DECOMPOSABLE | {
    "Blur": ((1, 6, 6), lambda: dinv.physics.Blur(KERNEL, padding="circular")),
    "Downsampling": ((1, 8, 8), lambda: dinv.physics.Downsampling((1, 8, 8), filter="gaussian", factor=2)),
    "CompressedSensing": ((1, 4, 4), lambda: dinv.physics.CompressedSensing(9, (1, 4, 4), rng=generator())),
    "LinearPhysics": ((5,), lambda: matrix_physics(randn(3, 5))),
    "DynamicMRI": (
        (2, 3, 4, 4),
        lambda: dinv.physics.DynamicMRI(mask=(randn(3, 4, 4) > 0).float(), img_size=(4, 4)),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_physics(name):
    event, make = LINEAR[name]
    physics = make()
    operator, x = ours.operator(physics), randn(3, *event)
    y = physics.A(x)
    assert isinstance(operator, LinearOperator)
    assert operator.spectral == (name in DECOMPOSABLE)
    torch.testing.assert_close(operator(x), y, rtol=0, atol=0)
    v = randn(*y.shape, seed=1)
    torch.testing.assert_close(operator.adjoint(v), physics.A_adjoint(v), rtol=0, atol=0)
    torch.testing.assert_close(operator.pseudo_inverse(v), physics.A_dagger(v), rtol=0, atol=0)
    torch.testing.assert_close((operator(x) * v).sum(), (x * operator.adjoint(v)).sum(), rtol=1e-4, atol=1e-4)

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(operator(leaf), leaf, v)
    torch.testing.assert_close(gradient, operator.adjoint(v), rtol=1e-5, atol=1e-5)

    wide = ours.operator(physics, torch.float32)(x.double())
    torch.testing.assert_close(wide, y.double(), rtol=0, atol=0)


@pytest.mark.parametrize("name", DECOMPOSABLE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_spectrum(name, dtype):
    event, make = DECOMPOSABLE[name]
    physics = make()
    operator = ours.operator(physics, torch.float32).to(dtype=dtype)
    matrix = operator.matrix(event)
    y = randn(2, *physics.A(randn(1, *event)).shape[1:]).to(dtype)
    gram = 0.7 * matrix @ matrix.T + 0.2 * torch.eye(len(matrix))
    solved = operator.solve_gram(y, 0.7, 0.2)
    assert solved.dtype == dtype
    expected = torch.linalg.solve(gram, y.flatten(1).double().T).T.reshape(y.shape)
    torch.testing.assert_close(solved.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(operator.gram_logdet(y, 0.7, 0.2), torch.logdet(gram), rtol=1e-5, atol=1e-4)


class Square(dinv.physics.Physics):
    def __init__(self):
        super().__init__(A=lambda x: x**2, noise_model=dinv.physics.GaussianNoise(0.1))

    def A_dagger(self, y, x_init=None):
        return y.clamp(min=0).sqrt()


def test_nonlinear_physics():
    operator, x = ours.operator(Square()), randn(2, 5)
    assert not isinstance(operator, LinearOperator)
    torch.testing.assert_close(operator(x), x**2, rtol=0, atol=0)
    torch.testing.assert_close(operator.pseudo_inverse(operator(x)), x.abs())


@pytest.mark.filterwarnings("error")
def test_complex_physics():
    """Real and imaginary parts count as separate measurements. ``A_dagger`` of real measurements must be real."""
    matrix, x = torch.complex(randn(3, 5), randn(3, 5, seed=1)), randn(2, 5, seed=2)
    physics = dinv.physics.LinearPhysics(
        A=lambda x: x.to(matrix.dtype) @ matrix.T,
        A_adjoint=lambda y: y @ matrix.conj(),
        noise_model=dinv.physics.GaussianNoise(0.1),
    )
    y = x.to(matrix.dtype) @ matrix.T + 0.1
    expected = fg.likelihoods.Gaussian(y, fg.operators.Matrix(matrix), 0.1)
    likelihood = ours.likelihood(y, physics)
    torch.testing.assert_close(likelihood.log_prob(x), expected.log_prob(x))
    prior, options = ours.prior(lambda x, sigma: 0.5 * x), dict(steps=3, seed=0)
    out, same = (fg.sample(prior, (2, 5), guidance=fg.PnP(v), **options) for v in (likelihood, expected))
    torch.testing.assert_close(out.x, same.x, rtol=1e-4, atol=1e-4)
    inverse = Square()
    inverse.A_dagger = lambda y, **kwargs: y * 1j
    with pytest.raises(TypeError, match=r"^pseudo_inverse: expected it to return real numbers, got torch\.complex64"):
        guidance = fg.PiGDM(fg.likelihoods.Gaussian(x, ours.operator(inverse), 0.0))
        fg.sample(prior, (2, 5), guidance=guidance, **options)


def test_operator_errors():
    with pytest.raises(TypeError, match=r"^physics: expected a deepinv\.physics object, got Identity"):
        ours.operator(fg.operators.Identity())
    with pytest.raises(ValueError, match=r"^physics: expected one whose mask or filter is set, got deepinv's Inpaint"):
        ours.operator(dinv.physics.Inpainting((1, 4, 4)))


# --- likelihoods --------------------------------------------------------------------------------------------

X = torch.rand(3, 1, 4, 5, generator=generator()) + 0.1


@pytest.mark.parametrize(
    "noise, density",
    (
        (lambda: dinv.physics.GaussianNoise(0.3), lambda y: torch.distributions.Normal(X, 0.3).log_prob(y)),
        (lambda: dinv.physics.LaplaceNoise(0.2), lambda y: torch.distributions.Laplace(X, 0.2).log_prob(y)),
        (
            lambda: dinv.physics.PoissonNoise(0.05),
            lambda y: torch.distributions.Poisson(X / 0.05).log_prob((y / 0.05).round()),
        ),
        (
            lambda: dinv.physics.PoissonNoise(0.05, normalize=False),
            lambda y: torch.distributions.Poisson(X / 0.05).log_prob(y),
        ),
        (
            lambda: dinv.physics.LogPoissonNoise(N0=100.0, mu=0.5),
            lambda y: torch.distributions.Poisson(100 * torch.exp(-0.5 * X)).log_prob(
                (100 * torch.exp(-0.5 * y)).round()
            ),
        ),
    ),
    ids=("gaussian", "laplace", "poisson", "counts", "log-poisson"),
)
def test_densities(noise, density):
    torch.manual_seed(0)
    physics = dinv.physics.Denoising(noise())
    y = physics(X)
    got = ours.likelihood(y, physics).log_prob(X)
    torch.testing.assert_close(got, density(y.double()).flatten(1).sum(1), rtol=1e-5, atol=1e-4)


def test_scale_in_place_of_the_noise_models():
    physics = dinv.physics.Denoising(dinv.physics.ZeroNoise())
    assert ours.likelihood(X, physics).scale_at(1.0) == 0.0
    assert ours.likelihood(X, physics, scale=0.2).scale_at(1.0) == 0.2
    physics.noise_model = dinv.physics.GaussianNoise(torch.full((3,), 0.25))  # the same number three times
    assert ours.likelihood(X, physics).scale_at(1.0) == 0.25
    assert ours.likelihood(X, physics, scale=lambda t: t).scale_at(7.0) == 7.0


def test_inpainting_counts_what_was_measured():
    mask = torch.tensor([[1.0, 0, 1, 1, 0]]).expand(4, 5)[None]
    physics = dinv.physics.Inpainting((1, 4, 5), mask=mask, noise_model=dinv.physics.GaussianNoise(0.3))
    y = physics(X)
    likelihood = ours.likelihood(y, physics)
    assert likelihood.y.shape == (3, 12)
    density = torch.distributions.Normal(X, 0.3).log_prob(y) * mask
    torch.testing.assert_close(likelihood.log_prob(X).float(), density.flatten(1).sum(1))

    each = torch.stack([mask[0].roll(b, -1) for b in range(3)])[:, None]
    physics.update(mask=each)
    y = physics(X)
    likelihood = ours.likelihood(y, physics)
    density = torch.distributions.Normal(X, 0.3).log_prob(y) * each
    assert likelihood.y.shape == (3, 12)
    torch.testing.assert_close(likelihood.log_prob(X).float(), density.flatten(1).sum(1))
    # Different numbers of measured elements, or other values in the mask, have no such operator
    fewer = torch.cat([mask, mask, torch.ones_like(mask)]).reshape(3, 1, 4, 5)
    for other in (fewer, 0.5 * mask):
        physics.update(mask=other)
        assert ours.likelihood(physics(X), physics).y.shape == X.shape


def test_noise_of_each_observation():
    levels = torch.tensor([0.1, 0.2, 0.4])
    rows = torch.tensor([2, 0, 1, 2])
    y = X + 0.1
    for noise, family in (
        (dinv.physics.GaussianNoise(levels), torch.distributions.Normal),
        (dinv.physics.LaplaceNoise(levels), torch.distributions.Laplace),
    ):
        likelihood = ours.likelihood(y, dinv.physics.Denoising(noise))
        expected = family(X[rows], levels[rows].reshape(-1, 1, 1, 1)).log_prob(y[rows]).flatten(1).sum(1)
        torch.testing.assert_close(likelihood.log_prob(X[rows], rows).float(), expected)
    tds = ours.Sampler(Small(), functools.partial(fg.TDS, particles=2), steps=3)
    assert tds.sample(y, dinv.physics.Denoising(dinv.physics.GaussianNoise(levels)), seed=0).x.shape == (3, 2, 1, 4, 5)


def test_likelihood_errors():
    physics = dinv.physics.Denoising(dinv.physics.UniformNoise(0.1))
    with pytest.raises(
        ValueError, match=r"^physics: expected a noise_model that is one of GaussianNoise.*UniformNoise$"
    ):
        ours.likelihood(X, physics)
    physics.noise_model = dinv.physics.PoissonNoise(gain=torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"^physics: expected a noise_model whose gain is one number.*got 3 of them"):
        ours.likelihood(X, physics)


# --- priors -------------------------------------------------------------------------------------------------


class Small(dinv.models.Denoiser):
    """A denoiser that is far from linear in both arguments."""

    def __init__(self, channels=1):
        super().__init__()
        torch.manual_seed(3)
        self.mix = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)

    def forward(self, x, sigma, **kwargs):
        sigma = self._handle_sigma(sigma, reference_tensor=x)
        return (x + 0.3 * sigma**2 * torch.tanh(self.mix(x))) / (1 + sigma**2) + 0.3 * sigma / (1 + sigma)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_prior(dtype):
    denoiser, x = Small(), (2 * randn(3, 1, 4, 5)).to(dtype)
    for clip in (None, (0.2, 0.9)):
        prior = ours.prior(denoiser, fg.schedules.ve(0.01, 10.0), clip=clip, dtype=torch.float32)
        x0 = prior.x0_hat(x, prior.schedule.level(2.0))
        expected = denoiser(x.float(), 2.0)
        assert x0.dtype == dtype
        torch.testing.assert_close(x0, (expected if clip is None else expected.clamp(*clip)).to(dtype))


def test_prior_of_a_network():
    """A denoiser of deepinv, in a run in float64."""
    denoiser = dinv.models.DRUNet(1, 1, nc=(4, 4, 4, 4), nb=1, pretrained=None)
    prior, x = (
        ours.prior(denoiser, dtype=torch.float32),
        torch.rand(2, 1, 8, 8, generator=generator(), dtype=torch.float64),
    )
    level = prior.schedule.level(0.3)
    torch.testing.assert_close(prior.x0_hat(x, level).float(), denoiser(x.float(), 0.3))


def test_prior_errors():
    with pytest.raises(TypeError, match=r"^denoiser: expected a callable f\(x, sigma\), got Tensor"):
        ours.prior(X)
    with pytest.raises(ValueError, match=r"^schedule: expected one with alpha = 1"):
        ours.prior(Small(), fg.schedules.flow())
    with pytest.raises(TypeError, match=r"^schedule: expected a fastguide.schedules schedule, got str"):
        ours.prior(Small(), "ve")


# --- samplers -----------------------------------------------------------------------------------------------


def test_posterior_of_a_gaussian_prior():
    """TDS is exact: mean, variance and evidence are those for the prior of 40 steps."""
    schedule, steps, particles = fg.schedules.edm(0.01, 40.0), 40, 4000
    prior = gaussian.example(schedule)
    sampler = ours.Sampler(
        lambda x, sigma: prior(x, sigma[None]),
        functools.partial(fg.TDS, particles=particles),
        schedule=schedule,
        steps=steps,
    )
    physics = matrix_physics(gaussian.MATRIX, noise_model=dinv.physics.GaussianNoise(gaussian.SCALE))
    samples = sampler.sample(gaussian.Y, physics, seed=1)
    chain = prior.chain(steps, rows=gaussian.MATRIX)  # the trace kernel's prior
    mean, covariance, evidence = gaussian.posterior(*chain, gaussian.MATRIX, gaussian.Y, gaussian.SCALE)
    error = (covariance.diagonal() / samples.ess[-1].min()).sqrt()
    assert samples.x.dtype == torch.float64
    assert ((samples.mean() - mean).abs() < 4 * error).all()
    torch.testing.assert_close(samples.variance(), covariance.diagonal().expand(2, 3), rtol=0.12, atol=0.0)
    torch.testing.assert_close(samples.log_evidence, evidence, rtol=0, atol=0.05)

    x = sampler(gaussian.Y, physics, seed=1)
    torch.testing.assert_close(x, samples.draw(1, seed=1)[:, 0], rtol=0, atol=0)
    both = sampler.sample(gaussian.Y[:1], physics, seed=1, shape=(2, 3))  # samples of one observation
    assert both.x.shape == (2, particles, 3)
    assert ((both.mean() - mean[:1]).abs() < 4 * error).all()


@pytest.mark.parametrize("name", ("Inpainting", "BlurFFT", "MRI"))
def test_sampler_is_fastguides_own(name):
    event, make = DECOMPOSABLE[name]
    physics, denoiser = make(), Small(event[0])
    physics.noise_model = dinv.physics.GaussianNoise(0.1)
    y = physics(torch.rand(2, *event, generator=generator()))
    got = ours.Sampler(denoiser, fg.PiGDM, steps=4, eta=0.5)(y, physics, seed=3)
    likelihood = fg.likelihoods.Gaussian(y, ours.operator(physics), 0.1)
    prior = fg.Denoiser(lambda x, t: denoiser(x, t), fg.schedules.edm(0.001, 40.0), "sample")
    expected = fg.sample(prior, (2, *event), guidance=fg.PiGDM(likelihood), steps=4, eta=0.5, seed=3).x
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_sampler_of_other_physics():
    """A physics without a spectrum, a nonlinear one, and an exact measurement. The default seed is from torch."""
    x = torch.rand(2, 1, 8, 8, generator=generator())
    blur = dinv.physics.Blur(KERNEL, padding="circular", noise_model=dinv.physics.GaussianNoise(0.05))
    exact = dinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=generator())
    for physics, guidance, miss in ((blur, fg.PnP, 0.1), (Square(), fg.PnP, 0.2), (exact, fg.PnP, 1e-5)):
        y, sampler = physics(x), ours.Sampler(Small(), guidance, steps=8)
        torch.manual_seed(0)
        found, again = sampler(y, physics), sampler(y, physics)
        assert found.shape == x.shape
        assert (physics.A(found) - y).square().mean().sqrt() < miss
        assert not torch.equal(found, again)
        torch.manual_seed(0)
        assert torch.equal(found, sampler(y, physics))
        assert torch.equal(sampler(y, physics, seed=4), sampler(y, physics, seed=4))


def test_sampler_with_a_likelihood():
    physics = dinv.physics.Denoising(dinv.physics.ZeroNoise())
    tds = functools.partial(fg.TDS, particles=8)
    with pytest.raises(ValueError, match=r"^scale: expected > 0"):
        ours.Sampler(Small(), tds, steps=3)(X, physics, seed=0)
    likelihood = functools.partial(ours.likelihood, scale=0.1)
    sampler = ours.Sampler(Small(), tds, likelihood=likelihood, steps=3, chunk_size=16)
    assert sampler(X, physics, seed=0).shape == X.shape


def philox(seed):
    """A ``randn_like`` that returns the noise of `fastguide.sample` for step 0, 1, ..."""
    steps = iter(range(1000))
    return lambda x, **_: fg.ops.randn(x.shape, seed=seed, step=next(steps), dtype=x.dtype)


DPS_OPTIONS = (
    {},
    dict(schedule="ve"),
    dict(guidance="annealed", weight=0.7),
    dict(solver="ddim", weight=3.0),
    dict(solver="ancestral", alpha=lambda t: 0.3 + 0.2 * t),
    dict(solver="ancestral", alpha=0.5, schedule="ve"),
    dict(minus_one_one=False),
    dict(solver="euler"),
    dict(solver="euler", schedule="ve", alpha=0.3, weight=0.5),
    dict(solver="euler", guidance="annealed", weight=0.7, alpha=lambda t: 1.2 * t),
    dict(solver="euler", minus_one_one=False, alpha=0.0),
)


@pytest.mark.parametrize("options", DPS_OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
@pytest.mark.parametrize("name", ("Inpainting", "Blur"))
def test_dps(name, options):
    event = (1, 8, 8)
    physics = {
        "Inpainting": lambda: dinv.physics.Inpainting(event, mask=0.5, rng=generator()),
        "Blur": lambda: dinv.physics.Blur(KERNEL, padding="circular"),
    }[name]()
    physics.noise_model = dinv.physics.GaussianNoise(0.1)
    y, denoiser = physics(torch.rand(3, *event, generator=generator())), Small()
    theirs = dinv.sampling.DPS(denoiser, num_steps=15, **options)
    theirs.solver.randn_like = philox(5)
    z = fg.ops.randn((3, *event), seed=5, stream=STREAM_INITIAL, dtype=torch.float64)
    x_init = z * theirs.sde.sigma_t(1.0) * theirs.sde.scale_t(1.0)
    expected = theirs(y, physics, x_init=x_init, get_trajectory=True)
    dps = ours.DPS(denoiser, num_steps=15, **options)
    found = dps(y, physics, seed=5, get_trajectory=True)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)
    for given in (x_init, (3, *event)):
        got = dps(y, physics, given, 5)
        torch.testing.assert_close(got, expected[0], rtol=1e-5, atol=5e-6)


def solvers():
    def times():
        return dict(timesteps=torch.linspace(1.0, 0.01, 12, dtype=torch.float64), rng=torch.Generator())

    class Halved(dinv.sampling.EulerSolver):
        """A user's own solver."""

        def step(self, sde, t0, t1, x0, *args, **kwargs):
            middle, _ = super().step(sde, t0, (t0 + t1) / 2, x0, *args, **kwargs)
            return super().step(sde, (t0 + t1) / 2, t1, middle, *args, **kwargs)[0], 2

    return {
        "Euler": dinv.sampling.EulerSolver(**times()),
        "Heun": dinv.sampling.HeunSolver(**times()),
        "large variance": dinv.sampling.DDPMSolver(**times(), variance="large"),
        "DDIM": dinv.sampling.DDIMSolver(**times(), eta=0.6),
        "Ancestral": dinv.sampling.AncestralSolver(**times()),
        "own": Halved(**times()),
    }


@pytest.mark.parametrize("name", solvers())
@pytest.mark.parametrize(
    "options", (dict(alpha=0.6), dict(schedule="ve", guidance="annealed", alpha=lambda t: t, minus_one_one=False))
)
def test_dps_with_a_solver_object(name, options):
    """With the same generator, the result is deepinv's, with the solver's times and all that the solver draws."""
    physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=generator())
    physics.noise_model = dinv.physics.GaussianNoise(0.1)
    y, denoiser = physics(torch.rand(3, 1, 8, 8, generator=generator())), Small()
    found = []
    for module in (ours, dinv.sampling):
        dps = module.DPS(denoiser, solver=solvers()[name], num_steps=3, **options)
        found.append(dps(y, physics, seed=4, get_trajectory=True))
        found[-1] += (dps(y, physics, seed=None, x_init=(3, 1, 8, 8), denoise_output=False),)
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(found[0][0], found[0][2], atol=1e-3)


def test_dps_by_euler_draws_other_noise_in_each_call():
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    dps = ours.DPS(Small(), solver="euler", num_steps=4)
    torch.manual_seed(1)
    first, second = dps(X, physics), dps(X, physics)
    torch.manual_seed(1)
    assert torch.equal(first, dps(X, physics)) and not torch.allclose(first, second)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)))
def test_dps_by_euler_under_ambient_modes(mode):
    """Ambient modes affect only the denoiser, and this denoiser does not depend on them."""
    physics = matrix_physics(randn(9, 20))
    y, denoiser = physics.A(X.flatten(1)), lambda x, sigma: 0.9 * x
    dps = ours.DPS(denoiser, solver="euler", num_steps=6)
    expected = dps(y, physics, seed=1)
    with mode():
        got = dps(y, physics, seed=1)
    assert torch.equal(got, expected)


def test_diffpir_under_autocast():
    """The physics is a matrix product, which autocast would round."""
    physics = matrix_physics(randn(9, 20), noise_model=dinv.physics.GaussianNoise(0.1))
    y, fidelity = physics.A(X.flatten(1)), dinv.optim.data_fidelity.L2()
    diffpir = ours.DiffPIR(lambda x, sigma: 0.9 * x, fidelity, max_iter=4)
    expected = diffpir(y, physics, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = diffpir(y, physics, seed=1)
    assert torch.equal(got, expected) and got.dtype == torch.float32


def test_dps_by_euler_names_what_is_not_finite():
    dps = ours.DPS(lambda x, sigma: x * (1.0 if sigma > 3.0 else torch.nan), solver="euler", num_steps=6)
    with pytest.raises(FloatingPointError, match=r"^denoiser: expected finite values, got NaN at step 3"):
        dps(X, dinv.physics.Denoising(), seed=1)


def test_measurements_of_another_dtype_and_kernels_of_each_sample():
    kernels = torch.rand(2, 1, 3, 3, generator=generator())
    physics = dinv.physics.Blur(kernels / 9.0, padding="circular", noise_model=dinv.physics.GaussianNoise(0.1))
    x = torch.rand(2, 1, 8, 8, generator=generator())
    y = physics(x)
    for sampler in (ours.DPS(Small(), num_steps=4), ours.DiffPIR(Small(), dinv.optim.data_fidelity.L2(), max_iter=4)):
        got = sampler(y.requires_grad_(), physics, seed=1)
        assert got.shape == x.shape and got.isfinite().all() and not got.requires_grad
    one = dinv.physics.Blur(KERNEL, padding="circular", noise_model=dinv.physics.GaussianNoise(0.1))
    y = one(x)
    expected = ours.DPS(Small(), num_steps=4)(y, one, seed=1)
    assert torch.equal(ours.DPS(Small(), num_steps=4)(y.double(), one, seed=1), expected)


def masks(counts):
    mask = torch.zeros(len(counts), 64)
    order = torch.rand(len(counts), 64, generator=generator()).argsort(1)
    for row, count in enumerate(counts):
        mask[row, order[row, :count]] = 1.0
    return mask.reshape(-1, 1, 8, 8)


KERNELS = torch.rand(2, 1, 3, 3, generator=generator()) / 5

# A physics for two observations, or for the chosen ones of them.
OF_EACH = {
    "Inpainting": lambda rows, **kw: dinv.physics.Inpainting((1, 8, 8), mask=masks((30, 30))[rows], **kw),
    "Inpainting, of other numbers": lambda rows, **kw: dinv.physics.Inpainting(
        (1, 8, 8), mask=masks((20, 40))[rows], **kw
    ),
    "Blur": lambda rows, **kw: dinv.physics.Blur(KERNELS[rows], padding="circular", **kw),
    "BlurFFT": lambda rows, **kw: dinv.physics.BlurFFT((1, 8, 8), filter=KERNELS[rows], **kw),
    "Downsampling": lambda rows, **kw: dinv.physics.Downsampling((1, 8, 8), filter=KERNELS[rows], factor=2, **kw),
    "stack": lambda rows, **kw: dinv.physics.stack(
        dinv.physics.Blur(KERNELS[rows], padding="circular", **kw),
        dinv.physics.Inpainting((1, 8, 8), mask=masks((30, 30))[rows], **kw),
    ),
    "MRI": lambda rows, **kw: dinv.physics.MRI(mask=masks((30, 30))[rows], img_size=(8, 8), **kw),
}


def rows_of(y, b):
    return type(y)([part[b : b + 1] for part in y]) if isinstance(y, (list, tuple)) or hasattr(y, "x") else y[b : b + 1]


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.parametrize("chunk_size", (None, 2, 3))
def test_particles_of_a_physics_of_each_observation(name, chunk_size):
    """Log-weights and gradients equal those of each observation alone."""
    noise = dict(noise_model=dinv.physics.GaussianNoise(0.1))
    physics = OF_EACH[name](slice(None), **noise)
    channels = 2 if name == "MRI" else 1
    y = physics(torch.rand(2, channels, 8, 8, generator=generator()))
    together = ours.likelihood(y, physics)
    x = randn(6, channels, 8, 8, seed=4)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    parts = x.split(6 if chunk_size is None else chunk_size), rows.split(6 if chunk_size is None else chunk_size)
    got = torch.cat([together.log_prob(*part) for part in zip(*parts, strict=True)])
    alone = [OF_EACH[name](slice(b, b + 1), **noise) for b in range(2)]
    expected = torch.cat([ours.likelihood(rows_of(y, b), alone[b]).log_prob(x[3 * b : 3 * b + 3]) for b in range(2)])
    if name == "Inpainting, of other numbers":
        got, expected = got - got[0], expected - expected[0]
        got[3:], expected[3:] = got[3:] - got[3], expected[3:] - expected[3]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    for covariance in ("point", "isotropic"):
        guidance = functools.partial(fg.TDS, particles=3, covariance=covariance)
        x = ours.Sampler(lambda x, sigma: x / (1 + sigma**2), guidance, steps=3, chunk_size=chunk_size)
        samples = x.sample(y, physics, seed=1)
        assert samples.x.shape == (2, 3, channels, 8, 8)


def test_log_determinants_of_each_observation():
    """Log-determinants of A A^T + I from the spectrum of each observation equal those of dense matrices."""
    physics = OF_EACH["BlurFFT"](slice(None))
    operator = ours.operator(physics, torch.float64)
    rows = torch.tensor([1, 0, 1])
    got = operator.at(rows).gram_logdet(torch.zeros(3, 1, 8, 8, dtype=torch.float64), 2.0, 0.5)
    for value, row in zip(got, rows.tolist(), strict=True):
        alone = ours.operator(OF_EACH["BlurFFT"](slice(row, row + 1)))
        a = torch.stack([alone(e.reshape(1, 1, 8, 8)).flatten() for e in torch.eye(64)], 1).double()
        expected = torch.logdet(2.0 * a @ a.T + 0.5 * torch.eye(64, dtype=torch.float64))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def stack(second=0.1):
    """A stack of two measurements: a blurred image, and half of the pixels."""
    parts = (
        dinv.physics.Blur(KERNEL, padding="circular", noise_model=dinv.physics.GaussianNoise(0.1)),
        dinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=generator(), noise_model=dinv.physics.GaussianNoise(second)),
    )
    return dinv.physics.stack(*parts), parts


def test_stacked_physics():
    physics, parts = stack()
    x = torch.rand(3, 1, 8, 8, generator=generator())
    y = physics(x)
    forward = ours.operator(physics, y=y)
    assert isinstance(forward, LinearOperator)
    measured = forward(x)
    expected = torch.cat([part.A(x).flatten(1) for part in parts], dim=1)
    assert torch.equal(measured, expected) and measured.shape == (3, 128)
    v = randn(3, 128)
    torch.testing.assert_close((forward.adjoint(v) * x).sum(), (v * measured).sum())
    torch.testing.assert_close(forward.pseudo_inverse(measured), physics.A_dagger(physics.A(x)))
    separate = [
        fg.likelihoods.Gaussian(part_y, ours.operator(part), 0.1).log_prob(x)
        for part, part_y in zip(parts, y, strict=True)
    ]
    torch.testing.assert_close(ours.likelihood(y, physics).log_prob(x), sum(separate))
    for sampler in (
        ours.DPS(Small(), num_steps=6),
        ours.DiffPIR(Small(), dinv.optim.data_fidelity.L2(), max_iter=6),
        ours.Sampler(Small(), fg.DPS, steps=4),
    ):
        got = sampler(y, physics, seed=1)
        assert got.shape == x.shape and got.isfinite().all()
    with pytest.raises(ValueError, match="y: expected the measurements of a StackedLinearPhysics, got None"):
        ours.operator(physics)
    physics, _ = stack(0.2)
    with pytest.raises(ValueError, match="physics: expected one noise_model for all measurements, got"):
        ours.likelihood(y, physics)
    assert ours.DPS(Small(), num_steps=4)(y, physics, seed=1).isfinite().all()  # DPS needs no scale


def test_dps_from_and_to_other_times():
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    theirs, dps = dinv.sampling.DPS(Small()), ours.DPS(Small())
    timesteps, x_init = torch.linspace(0.6, 0.05, 10, dtype=torch.float64), randn(*X.shape).double()
    for denoise in (True, False):
        theirs.solver.randn_like = philox(2)
        with mock.patch.object(theirs.solver, "timesteps", timesteps):
            expected = theirs(X, physics, x_init, timesteps=timesteps, denoise_output=denoise)
        got = dps(X, physics, x_init, 2, timesteps, denoise)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_dps_draws_its_seed_from_the_rng():
    rng, physics = torch.Generator(), dinv.physics.Denoising()
    dps = ours.DPS(Small(), num_steps=4, rng=rng)
    rng.manual_seed(3)
    first, second = dps(X, physics), dps(X, physics)
    rng.manual_seed(3)
    assert torch.equal(first, dps(X, physics))
    assert not torch.equal(first, second)


def test_dps_of_what_is_not_linear():
    physics = Square()
    theirs, dps = dinv.sampling.DPS(Small(), num_steps=10), ours.DPS(Small(), num_steps=10, dtype=torch.float32)
    theirs.solver.randn_like = philox(2)
    z = fg.ops.randn(X.shape, seed=2, stream=STREAM_INITIAL, dtype=torch.float64)
    expected = theirs(X**2, physics, x_init=z * theirs.sde.sigma_t(1.0) * theirs.sde.scale_t(1.0))
    got = dps(X**2, physics, seed=2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ("Inpainting", "one mask each", "BlurFFT", "Downsampling", "no noise model", "another fidelity")
)
def test_diffpir(name):
    event = (1, 8, 8)
    noise = dinv.physics.ZeroNoise() if name == "no noise model" else dinv.physics.GaussianNoise(0.1)
    if name == "BlurFFT":
        physics = dinv.physics.BlurFFT(event, filter=KERNEL, noise_model=noise)
    elif name == "Downsampling":
        physics = dinv.physics.Downsampling(event, filter="gaussian", factor=2, noise_model=noise)
    else:
        mask = (randn(3, *event) > 0).float() if name == "one mask each" else 0.5
        physics = dinv.physics.Inpainting(event, mask=mask, rng=generator(), noise_model=noise)
    x = torch.rand(3, *event, generator=generator())
    y, denoiser = physics(x), Small()
    fidelity = dinv.optim.data_fidelity.L2(sigma=0.8)
    if name == "another fidelity":
        fidelity = types.SimpleNamespace(prox=lambda x, y, physics, gamma: torch.lerp(x, y, gamma / (3.0 + gamma)))
    for options in (dict(), dict(max_iter=20, zeta=0.6, lambda_=3.0, sigma=40.0)):
        theirs = dinv.sampling.DiffPIR(denoiser, fidelity, **options)
        diffpir = ours.DiffPIR(denoiser, fidelity, **options)
        for x_init in (None, 0.5 * x):
            noises = philox(5)
            first = fg.ops.randn(x.shape, seed=5, stream=STREAM_INITIAL)
            draws = iter([lambda x, first=first: first])
            with mock.patch.object(torch, "randn_like", lambda x, d=draws, n=noises: next(d, n)(x)):
                expected = theirs(y, physics, x_init=x_init)
            got = diffpir(y, physics, 5, x_init)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_diffpir_makes_one_evaluation_less():
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma.item())
        return x / (1 + sigma**2)

    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    fidelity = dinv.optim.data_fidelity.L2()
    dinv.sampling.DiffPIR(denoiser, fidelity, max_iter=10)(X, physics)
    theirs = calls.copy()
    calls.clear()
    ours.DiffPIR(denoiser, fidelity, max_iter=10)(X, physics)
    assert len(theirs) == 10
    assert calls == pytest.approx(theirs[:-1], rel=1e-5)


@pytest.mark.parametrize("name", ("DPS", "DiffPIR"))
@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signatures(name, method):
    """The arguments have deepinv's order and defaults; minus_one_one is one of its keyword arguments."""

    def arguments(owner):
        parameters = inspect.signature(getattr(getattr(owner, name), method)).parameters.values()
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return [(p.name, p.default) for p in named if p.name != "minus_one_one"]

    assert arguments(ours) == arguments(dinv.sampling)


def test_errors():
    fidelity = dinv.optim.data_fidelity.L2()
    for name, value in (("schedule", "cosine"), ("solver", "heun"), ("guidance", "l1"), ("num_steps", 1)):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value!r}"):
            ours.DPS(Small(), **{name: value})
    with pytest.raises(ValueError, match=r"^alpha: expected values in \[0, 1\], got 2 to 2"):
        ours.DPS(Small(), solver="ancestral", alpha=2.0, num_steps=3)(X, dinv.physics.Denoising())
    with pytest.raises(ValueError, match=r"^alpha: expected .*>= 0, got -1"):
        ours.DPS(Small(), solver="euler", alpha=-1.0, num_steps=3)(X, dinv.physics.Denoising())
    for name, value in (
        ("y", torch.zeros(0, 3, 4, 4)), ("y", 3.0), ("x_init", torch.zeros(3)), ("x_init", (1, 0)), ("seed", -1),
        ("timesteps", [0.5]), ("timesteps", [0.1, 0.5]), ("timesteps", [2.0, 0.5]), ("get_trajectory", 1),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
            ours.DPS(Small(), num_steps=3)(**{"y": X, "physics": dinv.physics.Denoising(), name: value})
    with pytest.raises(ValueError, match=r"^sigma: expected a number below .*, got 100"):
        physics = dinv.physics.Denoising(dinv.physics.UniformNoise(0.1))
        ours.DiffPIR(Small(), fidelity, sigma=100.0, max_iter=3)(X, physics)
    for iterations in (1, 501):
        with pytest.raises(ValueError, match=r"^max_iter: expected an integer in \[2, 500\]"):
            ours.DiffPIR(Small(), fidelity, max_iter=iterations)
    with pytest.raises(ValueError, match=r"^sigma: expected a number > 0 as the argument or in the physics, got 0.0"):
        ours.DiffPIR(Small(), fidelity)(X, dinv.physics.Denoising(dinv.physics.GaussianNoise(0.0)))


def test_within_deepinv():
    """deepinv's DiffusionSampler works with our samplers."""
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    for sampler in (
        ours.DPS(Small(), num_steps=4, dtype=torch.float32),
        ours.DiffPIR(Small(), dinv.optim.data_fidelity.L2(), max_iter=4),
        ours.Sampler(Small(), fg.PiGDM, steps=4),
    ):
        torch.manual_seed(0)
        many = torch.stack([X, *(sampler(X, physics) for _ in range(6))])  # deepinv counts the start as a sample
        torch.manual_seed(0)
        statistics = dinv.sampling.DiffusionSampler(sampler, max_iter=6, clip=None, verbose=False)
        mean, variance = statistics(X, physics)
        torch.testing.assert_close(mean, many.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, many.var(0), rtol=1e-4, atol=1e-5)


def test_needs_neither_deepinv_nor_torchvision():
    spec = importlib.util.find_spec("fastguide.integrations.deepinv")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"deepinv": None, "torchvision": None}):
        spec.loader.exec_module(module)
    assert module.operator(dinv.physics.Denoising())(X) is not None
