"""DAPS against closed forms: the draw given x_t and y, Langevin steps, the ODE, and whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gaussian import MATRIX, SCALE, GaussianPrior, Y, example, gaussian_likelihood, posterior

import fastguide as fg
from fastguide import likelihoods as L
from fastguide.guidance.base import Run, State
from fastguide.guidance.solvers import largest_curvature
from fastguide.operators import Blur, Function, Identity, Matrix

COUNT = 20_000


def make_run(count: int = COUNT, steps: int = 8, **changes) -> Run:
    """A run with ``count`` samples of one observation."""
    prior = example()
    levels = prior.schedule.levels(steps)
    taus = tuple(fg.sampling.noise(t, s, 1.0) for t, s in pairwise(levels))
    run = Run(prior.denoiser(), levels, taus, 1, count, (3,), 0, None, None, torch.float64, torch.device("cpu"))
    return replace(run, grouped=True, **changes)


def assert_normal(x: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, bias: float = 0.0) -> None:
    """The moments of ``x`` ``[n, D]`` are within 4.5 standard errors, and a share ``bias`` of the variances."""
    variances = covariance.diagonal()
    error = 4.5 * (variances / len(x)).sqrt() + 1e-9
    assert ((x.mean(0) - mean).abs() < error + bias * variances.sqrt()).all(), (x.mean(0), mean, error)
    square = variances[:, None] * variances
    error = 4.5 * ((square + covariance**2) / len(x)).sqrt() + 1e-9
    found = torch.cov(x.T)
    assert ((found - covariance).abs() < error + bias * square.sqrt()).all(), (found, covariance)


LINEAR = Function(lambda x: x @ MATRIX.T.to(x), linear=True, adjoint=lambda y: y @ MATRIX.to(y))
X0_HAT = torch.tensor([[0.4, -0.7, 1.1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("operator", "scale", "solver"),
    [
        (Matrix(MATRIX), SCALE, "closed"),
        (Matrix(MATRIX), torch.tensor([0.2, 0.9], dtype=torch.float64), "closed"),
        (LINEAR, SCALE, "cg"),
    ],
)
@pytest.mark.parametrize("r", [None, 0.3])
def test_the_exact_draw_has_the_moments_of_the_posterior(operator, scale, solver, r):
    run, i = make_run(), 4
    guidance = fg.DAPS(L.Gaussian(Y[:1], operator, scale), r=r).prepare(run)
    assert guidance.solver == solver
    x = guidance.draw(run, X0_HAT.expand(COUNT, 3), i)
    level = run.levels[i]
    variance = level.sigma**2 / (level.alpha**2 + level.sigma**2) if r is None else r**2
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(2)
    whitened = MATRIX / scales[:, None]
    mean, covariance, _ = posterior(
        X0_HAT[0], variance * torch.eye(3, dtype=torch.float64), whitened, Y[:1] / scales, 1.0
    )
    assert_normal(x, mean[0], covariance)


def test_an_exact_measurement_is_met_exactly_and_the_rest_is_free():
    run = make_run(1000)
    guidance = fg.DAPS(gaussian_likelihood(Y[:1], scale=0.0), r=0.5).prepare(run)
    x = guidance.draw(run, X0_HAT.expand(1000, 3), 3)
    assert torch.allclose(x @ MATRIX.T, Y[:1].expand(1000, 2), atol=1e-9)
    free = torch.linalg.svd(MATRIX)[2][2]  # the direction that is not measured
    assert abs((x @ free).std().item() - 0.5) < 4.5 * 0.5 / math.sqrt(2 * 1000)


def langevin_law(variance: float, step_size: float, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance after Langevin steps, by definition. They start at the peak for a perturbed x0_hat."""
    eye = torch.eye(3, dtype=torch.float64)
    hessian = MATRIX.T @ MATRIX / SCALE**2 + eye / variance
    eta = step_size / torch.linalg.eigvalsh(hessian)[-1]
    target, shrink = torch.linalg.solve(hessian, MATRIX.T @ Y[0] / SCALE**2 + X0_HAT[0] / variance), eye - eta * hessian
    share = torch.linalg.inv(hessian) / variance
    mean, covariance = target, variance * share @ share
    for _ in range(iterations):
        mean, covariance = target + shrink @ (mean - target), shrink @ covariance @ shrink.T + 2 * eta * eye
    return mean, covariance


@pytest.mark.parametrize(("step_size", "iterations"), [(0.5, 20), (1.0, 7)])
@pytest.mark.parametrize("operator", [Matrix(MATRIX), Function(lambda x: x @ MATRIX.T.to(x))])
def test_langevin_steps_follow_their_law(step_size, iterations, operator):
    run = make_run()
    likelihood = L.Gaussian(Y[:1], operator, SCALE)
    options = dict(r=0.7, solver="langevin", step_size=step_size, iterations=iterations)
    x = fg.DAPS(likelihood, **options).prepare(run).draw(run, X0_HAT.expand(COUNT, 3), 4)
    assert_normal(x, *langevin_law(0.49, step_size, iterations), bias=0.01)  # the curvature is an estimate


def test_short_langevin_steps_approach_the_exact_draw():
    run = make_run(5000)
    likelihood = gaussian_likelihood(Y[:1])
    guidance = fg.DAPS(likelihood, r=0.5, solver="langevin", step_size=0.1, iterations=500).prepare(run)
    x = guidance.draw(run, X0_HAT.expand(5000, 3), 4)
    mean, covariance, _ = posterior(X0_HAT[0], 0.25 * torch.eye(3, dtype=torch.float64), MATRIX, Y[:1], SCALE)
    assert_normal(x, mean[0], covariance, bias=0.06)  # a step of 0.1 makes the stiffest variance 5 % too large


@pytest.mark.parametrize("schedule", [fg.schedules.flow(), fg.schedules.vp_cosine(1000), fg.schedules.ve(0.01, 50.0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_whole_run_is_exact_where_the_isotropic_variance_is(schedule, steps):
    """For a prior of independent standard normals every step keeps ``p(x_t | y)``, whatever the number of steps."""
    prior = GaussianPrior(torch.zeros(3), torch.eye(3), schedule)
    out = fg.sample(
        prior.denoiser(),
        (2, 3),
        guidance=fg.DAPS(gaussian_likelihood(), ode_steps=1),
        steps=steps,
        seed=1,
        samples_per_observation=COUNT,
        dtype=torch.float64,
    )
    means, covariance, _ = posterior(prior.mean, prior.covariance, MATRIX, Y, SCALE)
    for x, mean in zip(out.x, means, strict=True):
        assert_normal(x, mean, covariance, bias=1e-3)  # x_T of a table knows 5e-5 of x_0


def test_the_noise_is_decoupled():
    run, i = make_run(4), 2
    guidance = fg.DAPS(gaussian_likelihood(Y[:1])).prepare(run)
    x = torch.randn(4, 3, dtype=torch.float64)
    state = guidance.step(run, State(x), i)
    x0 = guidance.draw(run, run.x0_hat(x, i), i)
    z = fg.reference.randn((4, 3), seed=0, step=i, dtype=torch.float64)
    level = run.levels[i + 1]
    torch.testing.assert_close(state.x, level.alpha * x0 + level.sigma * z, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.x0_hat, run.x0_hat(x, i))


def test_the_ode_is_that_of_ddim():
    """With as many Euler steps as levels are left, x0_hat is the sample of DDIM from there."""
    run = make_run(4, steps=8)
    x = torch.randn(4, 3, dtype=torch.float64)
    guidance = fg.DAPS(gaussian_likelihood(Y[:1]), ode_steps=20).prepare(run)
    prior = example()
    for i in (0, 5, 7):
        ddim = fg.sample(prior.denoiser(), (4, 3), steps=[v.t for v in run.levels[i:]], eta=0.0, x_T=x, dtype=x.dtype).x
        torch.testing.assert_close(guidance.x0_hat(run, x, i), ddim)
    calls = []
    counted = replace(run, denoiser=fg.Denoiser(lambda x, t: calls.append(t[0].item()) or x, prior.schedule, "sample"))
    replace(guidance, ode_steps=3).x0_hat(counted, x, 1)
    assert calls == [run.levels[k].t for k in (1, 3, 5)]  # seven steps are left, of 2, 2 and 3


def normal_prior() -> fg.Denoiser:
    """Independent standard normals."""
    schedule = fg.schedules.vp_cosine(100)
    return fg.Denoiser(lambda x, t: schedule.level(t[0].item()).alpha * x, schedule, "sample")


def square(x0, y):
    return -50.0 * ((x0**2 - y.abs()) ** 2).flatten(1).sum(1)


IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BLUR = Blur(torch.ones(3, 3) / 9)
# Sharp likelihoods of every kind: noise of 0.01, dark counts, peaks, and operators steeper away from where they start.
SHARP = {
    "Gaussian": L.Gaussian(BLUR(IMAGES), BLUR, 0.01),
    "Student-t": L.StudentT(BLUR(IMAGES), BLUR, 0.01, df=3.0),
    "Laplace": L.Laplace(IMAGES, Identity(), 0.01),
    "Poisson": L.Poisson((IMAGES * 4).round() * 0.1, BLUR, 0.1),
    "a scale for each pixel": L.Gaussian(IMAGES, Function(torch.tanh), 0.01 + IMAGES),
    "cubic": L.Gaussian(IMAGES, Function(lambda x: x**3), 0.01),
    "exponential": L.Gaussian(IMAGES, Function(torch.exp), 0.01),
    "callable": L.Callable(square, y=IMAGES),
}


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_langevin_does_not_diverge(name, dtype):
    prior = normal_prior()
    guidance = fg.DAPS(SHARP[name], solver="langevin", iterations=40)
    out = fg.sample(prior, (2, 1, 8, 8), guidance=guidance, steps=3, seed=0, dtype=dtype)
    assert out.x.dtype == dtype and out.x.abs().max() < 6


def test_the_measurement_is_met():
    prior = normal_prior()
    for operator in (fg.operators.AveragePool(2), Function(lambda x: x**3)):
        y = operator(IMAGES)
        for likelihood in (
            L.Gaussian(y, operator, 0.01),
            L.StudentT(y, operator, 0.01, 3.0),
            L.Laplace(y, operator, 0.01),
        ):
            x = fg.sample(prior, (2, 1, 8, 8), guidance=fg.DAPS(likelihood, solver="langevin"), steps=10, seed=0).x
            assert (operator(x) - y).abs().median() < 0.03, likelihood


@pytest.mark.parametrize("kind", ["linear", "adjoint by autograd", "nonlinear", "callable"])
def test_the_largest_curvature_is_that_of_the_hessian(kind):
    x, scale = X0_HAT.repeat(2, 1) + torch.arange(2.0, dtype=torch.float64)[:, None], 0.3

    def f(x):
        return torch.sin(x) @ MATRIX.T

    def log_density(x):
        return -0.5 * ((f(x) - Y) / scale).square().sum(1)

    likelihood = {
        "linear": L.Gaussian(Y, Matrix(MATRIX), scale),
        "adjoint by autograd": L.Gaussian(Y, Function(lambda x: x @ MATRIX.T, linear=True, event=(3,)), scale),
        "nonlinear": L.Gaussian(Y, Function(f), scale),
        "callable": L.Callable(log_density),
    }[kind]
    own = likelihood.at(torch.arange(2))
    with torch.no_grad():
        found = largest_curvature(own, x, own.y, scale)
    for k in range(2):
        if kind == "callable":
            hessian = torch.autograd.functional.hessian(lambda v, k=k: -log_density(v[None])[k], x[k])
        else:
            jacobian = torch.autograd.functional.jacobian(lambda v: likelihood.operator(v[None])[0], x[k])
            hessian = jacobian.T @ jacobian / scale**2
        exact = torch.linalg.eigvalsh(hessian).abs().max()
        assert found.shape == (2, 1) and 0.9 * exact < found[k] < 1.001 * exact


@pytest.mark.parametrize(
    "likelihood",
    [
        L.Gaussian(Y, Identity(), 0.3),
        L.StudentT(Y, Identity(), 0.3, df=2.5),
        L.Poisson(torch.tensor([[0.0, 0.06], [0.3, 4.5]], dtype=torch.float64), Identity(), 0.3, background=0.2),
    ],
    ids=repr,
)
def test_the_bound_of_the_curvature_is_met(likelihood):
    """Second differences of the log-density along z never exceed the bound, and somewhere come near it."""
    z = torch.linspace(-3, 8, 40_001, dtype=torch.float64)
    y = likelihood.y.reshape(1, -1)
    own = type(likelihood).__new__(type(likelihood))
    own.__dict__.update(likelihood.__dict__)
    gradient = own.log_prob_and_gradient(z[:, None].expand(-1, 4).contiguous(), y.expand(len(z), 4).contiguous(), 0.3)[
        1
    ]
    curvature = -(gradient[1:] - gradient[:-1]) / (z[1] - z[0])
    bound = torch.as_tensor(likelihood.largest_curvature(y, 0.3), dtype=torch.float64).expand(1, 4)[0]
    largest = curvature.amax(0)
    assert (largest < bound * 1.001).all() and (largest > bound * 0.9).all(), (largest, bound)


@pytest.mark.parametrize("solver", ["closed", "cg", "langevin"])
def test_the_noise_of_a_sample_depends_on_its_seed_and_index_alone(solver):
    options = {"iterations": 5} if solver != "closed" else {}
    prior = example().denoiser()

    def run(rows=slice(None), **more):
        guidance = fg.DAPS(gaussian_likelihood(Y[rows]), solver=solver, **options)
        return fg.sample(
            prior, (len(Y[rows]), 3), guidance=guidance, steps=4, dtype=torch.float64, **{"seed": 3, **more}
        ).x

    both = run(samples_per_observation=3)
    assert torch.allclose(run(samples_per_observation=3, chunk_size=2), both, atol=1e-11)
    assert torch.allclose(run([1], first_sample=1, samples_per_observation=3)[0], both[1], atol=1e-11)
    seeds = run(seed=[5, 6], samples_per_observation=3)
    for b, seed in enumerate((5, 6)):
        assert torch.allclose(run([b], seed=seed, samples_per_observation=3)[0], seeds[b], atol=1e-11)
    assert (both[0, 0] - both[0, 1]).abs().min() > 1e-3
    few = run([0], samples_per_observation=2)
    assert torch.allclose(few[0], both[0, :2], atol=1e-11)


@pytest.mark.parametrize("solver", ["closed", "langevin"])
def test_observations_with_operators_and_scales_of_their_own(solver):
    """The samples equal those of one call for each observation."""
    masks = torch.tensor([[True, False, True], [False, True, True]])
    scale = torch.tensor([[0.2, 0.5], [1.0, 0.3]], dtype=torch.float64)
    options = dict(steps=4, dtype=torch.float64)

    def guidance(operator, rows):
        return fg.DAPS(L.Gaussian(Y[rows], operator, scale[rows]), ode_steps=2, solver=solver)

    together = guidance(fg.operators.Inpainting(masks, per_observation=True), slice(None))
    prior = example().denoiser()
    out = fg.sample(prior, (2, 3), guidance=together, seed=[3, 4], chunk_size=1, **options).x
    for b in range(2):
        alone = guidance(fg.operators.Inpainting(masks[b]), [b])
        one = fg.sample(prior, (1, 3), guidance=alone, seed=3 + b, **options).x
        torch.testing.assert_close(out[b : b + 1], one, rtol=1e-7, atol=1e-7)


def test_the_network_is_never_differentiated():
    prior = example()
    denoiser = fg.Denoiser(lambda x, t: prior(x.detach(), t).detach().numpy(), prior.schedule, "sample")
    for solver in ("closed", "langevin"):
        guidance = fg.DAPS(gaussian_likelihood(), solver=solver, ode_steps=2)
        assert fg.sample(denoiser, (2, 3), guidance=guidance, steps=3, seed=0).x.isfinite().all()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("solver: expected one of .*'langevin'.*got 'gradient'", dict(solver="gradient")),
        (
            "solver: 'cg' needs a Gaussian likelihood and a linear",
            dict(solver="cg", likelihood=L.Laplace(Y, Matrix(MATRIX), 1.0)),
        ),
        ("iterations: expected None with the closed form, got 5", dict(iterations=5)),
        ("iterations: expected an integer in .*, got 0", dict(solver="langevin", iterations=0)),
        ("step_size: expected None with solver='closed', got 0.1", dict(step_size=0.1)),
        (r"step_size: expected a number in \(0, 1\], got 1.5", dict(solver="langevin", step_size=1.5)),
        ("ode_steps: expected an integer in .*, got 0", dict(ode_steps=0)),
        ("r: expected values > 0, got 0", dict(r=0.0)),
        (r"r: expected finite values in \[0, inf\], got -1.0", dict(r=-1.0)),
        (
            "scale: expected > 0 where a density is needed",
            dict(solver="langevin", likelihood=gaussian_likelihood(scale=0.0)),
        ),
        ("likelihood: expected a fastguide.likelihoods likelihood, got int", dict(likelihood=3)),
    ],
)
def test_errors(message, options):
    guidance = fg.DAPS(**{"likelihood": gaussian_likelihood(), **options})
    with pytest.raises((TypeError, ValueError), match=message):
        fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=3)


def test_eta_is_refused():
    with pytest.raises(ValueError, match=r"eta: expected None with DAPS, whose noise is all fresh, got 0.5"):
        fg.sample(example().denoiser(), (2, 3), guidance=fg.DAPS(gaussian_likelihood()), steps=3, eta=0.5)
