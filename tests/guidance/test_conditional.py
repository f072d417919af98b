"""The proposal with the covariance of a step given the measurement."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gaussian import MATRIX, SCALE, GaussianPrior, Y, example, gaussian_likelihood, posterior

import fastguide as fg
from fastguide import sampling
from fastguide.guidance.particles import propose_guided
from fastguide.likelihoods import Callable, Gaussian, Laplace
from fastguide.operators import Blur, Function, Inpainting, Matrix


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = normal(40, 64, seed=3) / 8
FORMS = {
    "matrix": Matrix(A),
    "function": Function(lambda x: x @ A.T),
    "linear function": Function(lambda x: x @ A.T, linear=True, event=(64,)),
    "with adjoint": Function(lambda x: x @ A.T, linear=True, adjoint=lambda y: y @ A),
}


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("form", FORMS)
def test_for_unit_variance_every_particle_has_the_same_weight(form, steps):
    """64 particles are enough for 40 measurements, since each is drawn from the posterior."""
    truth = normal(1, 64, seed=1)
    y = truth @ A.T + 0.1 * normal(1, 40, seed=2)
    one = torch.eye(64, dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(64), one, fg.schedules.vp_linear(1000))
    mean, _, evidence = posterior(torch.zeros(64, dtype=torch.float64), one, A, y, 0.1)
    guidance = fg.TDS(Gaussian(y, FORMS[form], 0.1), 64)
    out = fg.sample(prior.denoiser(), (1, 64), guidance=guidance, steps=steps, seed=0, dtype=torch.float64)
    assert abs(out.log_evidence.item() - evidence.item()) < 0.02
    assert out.ess.min() > 63.5 and out.x.abs().max() < 5
    plain = dataclasses.replace(guidance, conditional=False)
    wide = fg.sample(prior.denoiser(), (1, 64), guidance=plain, steps=steps, seed=0, dtype=torch.float64)
    assert abs(wide.log_evidence.item() - evidence.item()) > 1.0  # 4.0 with 30 steps
    # The largest of 64 errors of a mean of 64: four standard deviations.
    assert ((out.mean() - mean).abs().max() < 4 / 64**0.5) and (out.x[0] @ A.T - y).std() == pytest.approx(0.1, rel=0.1)


MASKS = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
MASKS[0, :, 0], MASKS[1, :, 2] = True, True
OPERATORS = {
    "matrix": Matrix(normal(3, 12, seed=4), (1, 3, 4)),
    "circular blur": Blur(normal(3, 3, seed=5)),  # its coefficients are complex
    "mask of each": Inpainting(MASKS, per_observation=True),
    "unknown": Function(lambda x: x.flatten(1)[:, :5] * 2.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("step", [0, 3])  # the last has no noise but that of x_0
def test_a_step_against_dense_matrices(name, step, dtype):
    """The draws have the covariance of the formula, and the weight is the quotient of both densities."""
    operator = OPERATORS[name]
    observations, k, event, s = 2, 4000, (1, 3, 4), 0.4
    prior = fg.Denoiser(lambda x, t: 0.5 * x, fg.schedules.vp_cosine(100), "sample")
    x = normal(1, *event).to(dtype).expand(observations * k, *event).clone()
    guidance = fg.TDS(Gaussian(0 * operator.at(torch.arange(2))(x[:2]), operator, s), k, covariance="isotropic")
    run = sampling.prepare_run(prior, (observations, *event), guidance, 4, None, None, None, 7, None, dtype, "cpu", 900)
    guidance = guidance.prepare(run)
    assert guidance.conditional
    gradient = (0.3 * normal(1, *event, seed=8)).to(dtype).expand_as(x).clone()
    variance = torch.linspace(0.2, 0.6, observations, dtype=torch.float64).repeat_interleave(k) / run.shift_scale(step)
    variance[0], variance[1] = -1.0, math.nan  # count as 0
    state = sampling.State(x.clone(), None, dict(x0_hat=0.5 * x, gradient=gradient, variance=variance.clone()))
    zero = torch.zeros(observations, k, dtype=torch.float64)
    found, log_weights = propose_guided(run, state, zero, step, "", likelihood=guidance.likelihood)
    a, b = fg.reference.step_coefficients(run.coefficients(step))[:2]
    mean = (a * x + b * 0.5 * x).double()
    shift = b * run.shift_scale(step) * gradient[0].double().flatten()
    units = torch.eye(12, dtype=torch.float64).reshape(12, *event)
    for row, own in enumerate(found.reshape(observations, k, 12).double()):
        matrix = operator.at(torch.full((12,), row))(units.to(dtype)).double().flatten(1).T
        v, m = torch.linspace(0.2, 0.6, observations, dtype=torch.float64)[row].item(), len(matrix)
        wide = (run.taus[step] ** 2 + b**2 * v) * torch.eye(12, dtype=torch.float64)
        inverse = torch.linalg.inv(v * matrix @ matrix.T + s**2 * torch.eye(m, dtype=torch.float64))
        narrow = wide - b**2 * v**2 * matrix.T @ inverse @ matrix
        center = mean.reshape(observations, k, 12)[row, 5]
        before = torch.distributions.MultivariateNormal(center, wide)
        after = torch.distributions.MultivariateNormal(center + shift, narrow)
        first = 5 if row == 0 else 0  # without the two of no variance
        expected = (before.log_prob(own) - after.log_prob(own))[first:]
        tolerance = dict(rtol=1e-6, atol=1e-8) if dtype == torch.float64 else dict(rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(log_weights[row, first:], expected, **tolerance)
        whitened = torch.linalg.solve_triangular(
            torch.linalg.cholesky(narrow), (own[first:] - center - shift).T, upper=False
        )
        assert (torch.cov(whitened) - torch.eye(12, dtype=torch.float64)).abs().max() < 5 * (2 / k) ** 0.5
        assert whitened.mean(1).abs().max() < 4.5 / k**0.5
    # Without a variance the base kernel draws; without any noise at all, its mean.
    tau = run.taus[step]
    own = tau * run.randn(step, 0, dtype=torch.float64).flatten(1) + shift if tau > 0 else torch.zeros(2, 12)
    torch.testing.assert_close((found.double() - mean).flatten(1)[:2], own[:2], rtol=0, atol=1e-5, check_dtype=False)
    assert tau > 0 or not log_weights[0, :2].any()


@pytest.mark.parametrize("method", ["tds", "fk"])
def test_it_keeps_the_target(method):
    likelihood, options = gaussian_likelihood(), dict(covariance="moment", conditional=True)
    tds, fk = fg.TDS(likelihood, 16384, **options), fg.FK(likelihood, 16384, proposal="guided", **options)
    guidance = tds if method == "tds" else fk
    means, variance, evidence = posterior(*example().chain(20, rows=MATRIX), MATRIX, Y, SCALE)
    out = fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=20, seed=0, dtype=torch.float64)
    assert torch.allclose(out.mean(), means, atol=0.03)
    assert torch.allclose(out.variance(), variance.diagonal().expand_as(means), atol=0.03)
    assert torch.allclose(out.log_evidence, evidence, atol=0.02)
    plain = dataclasses.replace(guidance, conditional=False)
    less = fg.sample(example().denoiser(), (2, 3), guidance=plain, steps=20, seed=0, dtype=torch.float64)
    assert (out.log_evidence_error < 0.8 * less.log_evidence_error).all()  # its weights vary less


def test_the_default():
    """With ``"isotropic"`` and ``eta = 1``, where it can be had, and in FK where the measurement is weighted as its
    noise says."""
    run = sampling.prepare_run(
        example().denoiser(), (2, 3), fg.TDS(gaussian_likelihood(), 8), 4, None, None, None, 0, None, torch.float64,
        "cpu", None,
    )  # fmt: skip

    def default(guidance):
        return guidance.prepare(run).conditional

    tensor = Gaussian(Y, Matrix(MATRIX), torch.tensor([0.3, 0.4]))
    curved = Gaussian(torch.zeros(2, 3), Function(lambda x: x**3), 0.3)
    assert default(fg.TDS(gaussian_likelihood(), 8, covariance="isotropic"))
    less_noise = dataclasses.replace(run, taus=(*run.taus[:-2], 0.9 * run.taus[-2], run.taus[-1]))
    assert not fg.TDS(gaussian_likelihood(), 8, covariance="isotropic").prepare(less_noise).conditional
    assert not default(fg.TDS(gaussian_likelihood(), 8))
    assert not default(fg.TDS(gaussian_likelihood(), 8, covariance="isotropic", base_kernel="ddpm"))
    assert not default(fg.TDS(tensor, 8, covariance="isotropic"))
    assert not default(fg.TDS(curved, 8))
    assert not default(fg.TDS(Laplace(Y, Matrix(MATRIX), 0.3), 8, covariance="isotropic"))
    for strength, proposal, expected in ((1.0, "guided", True), (2.0, "guided", False), (1.0, "base", False)):
        options = dict(covariance="isotropic", strength=strength, proposal=proposal)
        assert default(fg.FK(gaussian_likelihood(), 8, **options)) == expected


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        (fg.TDS(gaussian_likelihood(), 8, base_kernel="ddpm", conditional=True), "base_kernel='trace', got 'ddpm'"),
        (fg.TDS(Laplace(Y, Matrix(MATRIX), 0.3), 8, conditional=True), "a Gaussian likelihood, got Laplace"),
        (
            fg.FK(lambda x: x.sum(1), 8, proposal="guided", covariance="point", conditional=True),
            "a Gaussian likelihood, got a reward",
        ),
        (
            fg.TDS(Gaussian(Y, Matrix(MATRIX), torch.tensor([0.3, 0.4])), 8, conditional=True),
            "one scale for all measurements, got a tensor",
        ),
        (
            fg.TDS(Gaussian(torch.zeros(2, 3), Function(torch.sin), 0.3), 8, conditional=True),
            r"a linear operator whose spectrum is known .* 256 rows, got Function\(sin\)",
        ),
        (fg.FK(Callable(lambda x: x.sum(1)), 8, conditional=True), "base_kernel='trace', got 'ddpm'"),
    ],
)
def test_what_it_needs(guidance, words):
    with pytest.raises(ValueError, match=f"^conditional: expected {words}"):
        fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=4)


def test_it_is_a_flag():
    with pytest.raises(TypeError, match=r"^conditional: expected a bool or None, got 'yes'"):
        fg.sample(example().denoiser(), (2, 3), guidance=fg.TDS(gaussian_likelihood(), 8, conditional="yes"), steps=4)
