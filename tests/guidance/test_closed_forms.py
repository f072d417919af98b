"""DPS, PnP, PiGDM and LatentPnP, step by step against closed forms on a Gaussian prior."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood, posterior
from torch.utils.checkpoint import checkpoint

import fastguide as fg
from fastguide.guidance.base import Run
from fastguide.guidance.scores import PullBack
from fastguide.guidance.solvers import solve

KERNEL = torch.tensor([[0.05, 0.1, 0.05], [0.1, 0.4, 0.1], [0.05, 0.1, 0.05]], dtype=torch.float64)


def make_run(steps: int = 8, eta: float = 1.0, observations: int = 2, **changes) -> Run:
    prior = example()
    levels = prior.schedule.levels(steps)
    taus = tuple(fg.sampling.noise(t, s, eta) for t, s in pairwise(levels))
    return replace(
        Run(
            prior.denoiser(),
            levels,
            taus,
            observations,
            1,
            (3,),
            0,
            None,
            None,
            torch.float64,
            torch.device("cpu"),
        ),
        **changes,
    )


def step_by_hand(run: Run, x: torch.Tensor, i: int, x0_hat: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The guided mean of design section 1: x0_hat moves by ``shift``, eps_hat by ``-alpha/sigma`` of it."""
    t, s, tau = run.levels[i], run.levels[i + 1], run.taus[i]
    eps = (x - t.alpha * x0_hat) / t.sigma - t.alpha / t.sigma * shift
    z = fg.reference.randn(x.shape, seed=run.seed, step=i, dtype=x.dtype)
    return s.alpha * (x0_hat + shift) + math.sqrt(s.sigma**2 - tau**2) * eps + tau * z


@pytest.mark.parametrize("i", [1, 4, 7])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_pigdm_equals_its_closed_form(i, scale):
    run = make_run()
    guidance = fg.PiGDM(gaussian_likelihood(scale=scale)).prepare(run)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    got = guidance.step(run, fg.guidance.base.State(x), i).x

    t = run.levels[i]
    gain = example().gain(t.alpha, t.sigma)  # d x0_hat / d x_t
    x0_hat = run.denoiser.x0_hat(x, t)
    r2 = t.sigma**2 / (t.alpha**2 + t.sigma**2)
    gram = r2 * MATRIX @ MATRIX.T + scale**2 * torch.eye(2, dtype=torch.float64)
    score = (Y - x0_hat @ MATRIX.T) @ torch.linalg.inv(gram) @ MATRIX @ gain  # in the isotropic approximation
    wanted = step_by_hand(run, x, i, x0_hat, t.sigma**2 / t.alpha * score)
    assert torch.allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("covariance", ["point", "isotropic", "moment"])
def test_the_guided_step_equals_its_closed_form(covariance):
    """DPS with the score's own weight; "moment" is exact for a Gaussian prior: the gradient of the true
    ``log p(y | x_t)``."""
    run, i = make_run(), 4
    guidance = fg.DPS(gaussian_likelihood(), zeta="score", normalize=False, covariance=covariance).prepare(run)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = guidance.step(run, fg.guidance.base.State(x), i).x

    t, prior = run.levels[i], example()
    gain = prior.gain(t.alpha, t.sigma)
    x0_hat = run.denoiser.x0_hat(x, t)
    r2 = t.sigma**2 / (t.alpha**2 + t.sigma**2)
    exact = prior.covariance - t.alpha * gain @ prior.covariance  # Cov(x_0 | x_t)
    spread = {"point": 0 * exact, "isotropic": r2 * prior.eye, "moment": exact}[covariance]
    gram = MATRIX @ spread @ MATRIX.T + SCALE**2 * torch.eye(2, dtype=torch.float64)
    score = (Y - x0_hat @ MATRIX.T) @ torch.linalg.inv(gram) @ MATRIX @ gain
    assert torch.allclose(got, step_by_hand(run, x, i, x0_hat, t.sigma**2 / t.alpha * score), atol=1e-9)


@pytest.mark.parametrize("zeta", [0.7, [0.1 * k for k in range(8)], lambda t: 2 * t])
def test_dps_step_of_the_paper(zeta):
    """Algorithm 1 of Chung et al. 2023: ``x_s - zeta' / norm(r) grad norm(r)^2``, by autograd in the test."""
    run, i = make_run(), 4
    guidance = fg.DPS(gaussian_likelihood(), zeta=zeta).prepare(run)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = guidance.step(run, fg.guidance.base.State(x), i).x
    leaf = x.clone().requires_grad_()
    norm2 = (Y - run.denoiser.x0_hat(leaf, run.levels[i]) @ MATRIX.T).square().sum(1)
    (gradient,) = torch.autograd.grad(norm2.sum(), leaf)
    x0_hat = run.denoiser.x0_hat(x, run.levels[i])
    plain = step_by_hand(run, x, i, x0_hat, torch.zeros_like(x))
    value = zeta(run.levels[i].t) if callable(zeta) else zeta[i] if isinstance(zeta, list) else zeta
    wanted = plain - value * gradient / norm2.detach().sqrt()[:, None]
    assert torch.allclose(got, wanted, atol=1e-9)


def test_dps_ascends_the_likelihood():
    run = make_run(eta=0.0)
    likelihood = gaussian_likelihood()
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in (2, 5):
        values = []
        for zeta in (0.0, 0.01):
            guidance = fg.DPS(likelihood, zeta=zeta).prepare(run)
            x_s = guidance.step(run, fg.guidance.base.State(x), i).x
            values.append(likelihood.log_prob(run.denoiser.x0_hat(x_s, run.levels[i + 1])))
        assert (values[1] > values[0]).all()


def test_pull_back_is_the_second_order_tweedie_covariance():
    """``(sigma^2 / alpha) d x0_hat / d x_t = Cov(x_0 | x_t)``."""
    run, prior = make_run(), example()
    t = run.levels[3]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = prior.covariance - t.alpha * prior.gain(t.alpha, t.sigma) @ prior.covariance
    v = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pull_back = PullBack(run, x, 3, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(run.shift_scale(3) * pull_back(v), v @ exact, atol=1e-10)


@pytest.mark.parametrize("method", ["dps", "pigdm", "tds"])
def test_a_level_without_signal_takes_the_limit(method):
    """Flow starts at ``alpha = 0``: there ``C_t`` is ``r_t^2 I = I``, and ``x0_hat`` moves by
    ``A^T (A A^T + s^2 I)^-1 (y - A x0_hat)``; ``eps_hat`` stays, as the gradient itself vanishes."""
    run, prior = make_run(), example()
    assert run.levels[0].alpha == 0.0
    likelihood = gaussian_likelihood()
    guidance = {
        "dps": fg.DPS(likelihood, zeta="score", normalize=False, covariance="isotropic"),
        "pigdm": fg.PiGDM(likelihood),
        "tds": fg.TDS(likelihood, particles=1, covariance="isotropic", base_kernel="ddpm"),
    }[method].prepare(run)
    state = guidance.start(run)
    x = state.x.clone()
    got = guidance.step(run, state, 0).x
    gram = MATRIX @ MATRIX.T + SCALE**2 * torch.eye(2, dtype=torch.float64)
    shift = (Y - prior.mean @ MATRIX.T) @ torch.linalg.inv(gram) @ MATRIX
    wanted = step_by_hand(run, x, 0, prior.mean.expand(2, -1), shift)
    assert torch.allclose(got, wanted, atol=1e-10)


# --- plug-and-play ------------------------------------------------------------------------------------------


def image_operators():
    mask = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    matrix = torch.randn(9, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 8
    return {
        "identity": fg.operators.Identity(),
        "inpainting": fg.operators.Inpainting(mask),
        "pool": fg.operators.AveragePool(2),
        "circular": fg.operators.Blur(KERNEL),
        "zeros": fg.operators.Blur(KERNEL, padding="zeros"),
        "zeros separable": fg.operators.Blur(torch.outer(KERNEL[1], KERNEL[1]), padding="zeros"),
        "matrix": fg.operators.Matrix(matrix, event=(2, 6, 6)),
        "function": fg.operators.Function(lambda x: x[..., ::2] * 2, linear=True, event=(2, 6, 6)),
    }


# Every solver with every kind of operator, for a weak and a strong prior.
CASES = [
    (name, solver)
    for name, operator in image_operators().items()
    for solver in ("closed", "cg", "gauss-newton", "gradient")
    if solver != "closed" or operator.spectral
]


@pytest.mark.parametrize("name, solver", CASES)
@pytest.mark.parametrize("rho", [0.5, 30.0])
def test_pnp_inner_solution_equals_the_closed_form(name, solver, rho):
    operator = image_operators()[name]
    scale = 0.5
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=generator)
    y = operator(torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=generator))
    dense = operator.matrix((2, 6, 6))
    normal = dense.T @ dense / scale**2 + rho * torch.eye(72, dtype=torch.float64)
    wanted = torch.linalg.solve(normal, (y.flatten(1) @ dense / scale**2 + rho * x0.flatten(1)).T).T
    likelihood = fg.likelihoods.Gaussian(y, operator, scale)
    iterations = {"closed": 1, "cg": 60, "gauss-newton": 4, "gradient": 150}[solver]
    got = solve(likelihood, x0, y, scale, rho, solver, iterations).flatten(1)
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_pnp_reweighted_least_squares_finds_the_minimum():
    """For Student-t and Poisson errors, the gradient of the objective is 0 at the solution."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 1, 6, 6, dtype=torch.float64, generator=generator) + 0.5
    operator = fg.operators.Blur(KERNEL, padding="zeros")
    y = operator(x0) + 0.2 * torch.randn(3, 1, 6, 6, dtype=torch.float64, generator=generator)
    for likelihood in (
        fg.likelihoods.StudentT(y, operator, 0.1, df=3.0),
        fg.likelihoods.Poisson(y.clamp(min=0) * 20, operator, 1.0),
    ):
        x = solve(likelihood, x0, likelihood.y, likelihood.scale_at(0), 20.0, "gauss-newton", 40)
        z = operator(x)
        pulled = operator.adjoint(likelihood.log_prob_and_gradient(z, likelihood.y, likelihood.scale_at(0))[1])
        slope = 20.0 * (x - x0) - pulled
        start = operator.adjoint(
            likelihood.log_prob_and_gradient(operator(x0), likelihood.y, likelihood.scale_at(0))[1]
        )
        assert slope.norm() < 1e-5 * start.norm()


def test_pnp_nonlinear_solvers_agree():
    """With a nonlinear operator, Gauss-Newton and plain gradient steps have the same result."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(4, 5, dtype=torch.float64, generator=generator)
    operator = fg.operators.Function(lambda x: torch.tanh(x[:, :3]) * (1 + 0.1 * x[:, 2:5]))
    y = operator(x0 + 0.3)
    likelihood = fg.likelihoods.Gaussian(y, operator, 0.3)
    a = solve(likelihood, x0, y, 0.3, 2.0, "gauss-newton", 12)
    b = solve(likelihood, x0, y, 0.3, 2.0, "gradient", 300)
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
def test_pnp_step_splits_the_noise_as_diffpir(zeta):
    run, i, rho = make_run(), 4, 3.0
    guidance = fg.PnP(gaussian_likelihood(), rho=rho, zeta=zeta).prepare(run)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = guidance.step(run, fg.guidance.base.State(x), i).x
    t, s = run.levels[i], run.levels[i + 1]
    x0_hat = run.denoiser.x0_hat(x, t)
    normal = MATRIX.T @ MATRIX / SCALE**2 + rho * torch.eye(3, dtype=torch.float64)
    x0 = torch.linalg.solve(normal, (Y @ MATRIX / SCALE**2 + rho * x0_hat).T).T
    eps = (x - t.alpha * x0) / t.sigma
    z = fg.reference.randn(x.shape, seed=0, step=i, dtype=x.dtype)
    wanted = s.alpha * x0 + s.sigma * (math.sqrt(1 - zeta) * eps + math.sqrt(zeta) * z)
    assert torch.allclose(got, wanted, atol=1e-10)


def test_latent_pnp_in_a_linear_latent_space_is_pnp():
    """With an invertible linear decoder there are closed forms in both spaces."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(3, 3, dtype=torch.float64, generator=generator)
    inverse = torch.linalg.inv(mixing)
    run, i, rho = make_run(), 4, 2.0
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    t, s = run.levels[i], run.levels[i + 1]
    z_hat = run.denoiser.x0_hat(x, t)

    def argmin(matrix, start):
        normal = matrix.T @ matrix / SCALE**2 + rho * torch.eye(3, dtype=torch.float64)
        return torch.linalg.solve(normal, (Y @ matrix / SCALE**2 + rho * start).T).T

    likelihood = gaussian_likelihood()
    latent = fg.LatentPnP(likelihood, lambda z: z @ mixing.T, rho=rho, zeta=0.0)
    pixel = fg.LatentPnP(likelihood, lambda z: z @ mixing.T, lambda v: v @ inverse.T, space="pixel", rho=rho, zeta=0.0)
    for guidance, z0 in (
        (latent, argmin(MATRIX @ mixing, z_hat)),
        (pixel, argmin(MATRIX, z_hat @ mixing.T) @ inverse.T),
    ):
        got = guidance.prepare(run).step(run, fg.guidance.base.State(x), i).x
        wanted = s.alpha * z0 + s.sigma * (x - t.alpha * z0) / t.sigma
        assert torch.allclose(got, wanted, atol=1e-8)


def test_latent_pnp_resample_draws_from_the_product():
    """ReSample's proposition 1 in VP notation, by hand."""
    gamma, rho, i = 40.0, 2.0, 3
    schedule = fg.schedules.vp_cosine(100)
    prior = example(schedule)
    levels = schedule.levels(6)
    taus = tuple(fg.sampling.noise(t, s, 0.5) for t, s in pairwise(levels))
    run = make_run(denoiser=prior.denoiser(), levels=levels, taus=taus)
    guidance = fg.LatentPnP(gaussian_likelihood(), lambda z: z, rho=rho, gamma=gamma).prepare(run)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = guidance.step(run, fg.guidance.base.State(x), i).x

    t, s = levels[i], levels[i + 1]
    x0_hat = run.denoiser.x0_hat(x, t)
    normal = MATRIX.T @ MATRIX / SCALE**2 + rho * torch.eye(3, dtype=torch.float64)
    z0 = torch.linalg.solve(normal, (Y @ MATRIX / SCALE**2 + rho * x0_hat).T).T
    plain = step_by_hand(run, x, i, x0_hat, torch.zeros_like(x))
    bar_t, bar_s = t.alpha**2, s.alpha**2
    variance = gamma * (1 - bar_s) / bar_t * (1 - bar_t / bar_s)
    mean = (variance * math.sqrt(bar_s) * z0 + (1 - bar_s) * plain) / (variance + 1 - bar_s)
    sd = math.sqrt(variance * (1 - bar_s) / (variance + 1 - bar_s))
    z = fg.reference.randn(x.shape, seed=0, step=i, stream=fg.guidance.base.STREAM_RENOISE, dtype=x.dtype)
    assert torch.allclose(got, mean + sd * z, atol=1e-8)


# --- operators that autograd knows in part ------------------------------------------------------------------

MIXING = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LSTM = torch.nn.LSTM(2, 3, batch_first=True, dtype=torch.float64)
for parameter in LSTM.parameters():  # the same in every run
    values = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(parameter.ndim))
    parameter.data = 0.5 * values


class OldFunction(torch.autograd.Function):
    """A projector as in tomography packages: one static method for each direction, no jvp, no vmap."""

    @staticmethod
    def forward(ctx, x):
        return x @ MIXING.T

    @staticmethod
    def backward(ctx, v):
        return v @ MIXING


class NewFunction(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x @ MIXING.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, v):
        return v @ MIXING


class NumpyFunction(OldFunction):
    """Its backward pass uses numpy, so autograd cannot differentiate it again."""

    @staticmethod
    def backward(ctx, v):
        return torch.from_numpy(v.detach().numpy() @ MIXING.numpy())


def attention(x):
    q = x.reshape(-1, 1, 3, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)


def in_place(x):
    z = torch.zeros(len(x), 3, dtype=x.dtype)
    z[:] = x @ MIXING.T
    z += 1
    return z


def warped(x):
    grid = torch.linspace(-0.9, 0.9, 8, dtype=x.dtype).reshape(1, 2, 2, 2).expand(len(x), -1, -1, -1)
    return torch.nn.functional.grid_sample(x.reshape(-1, 1, 2, 3), grid, align_corners=False).flatten(1)


def recurrent(x):
    return LSTM(x.reshape(-1, 3, 2))[0][:, -1]


def checkpointed(x):
    return checkpoint(lambda z: torch.tanh(z @ MIXING.T), x, use_reentrant=False)


def distances(x):
    # Distances between different points: the distance of a point to itself has no derivative.
    return torch.cdist(x.reshape(-1, 2, 3)[:, :1], x.reshape(-1, 2, 3)[:, 1:]).flatten(1)


def partly_numpy(x):
    return torch.cat([x @ MIXING.T, 2 * NumpyFunction.apply(x)], 1)


def interpolated(x):
    images = x.reshape(-1, 1, 2, 3)
    return torch.nn.functional.interpolate(images, size=(4, 5), mode="bicubic", antialias=True).flatten(1)


def histogram(x):
    bins = torch.tensor([[0, 0, 1, 1, 2, 2]]).expand(len(x), -1)
    return torch.zeros(len(x), 3, dtype=x.dtype).scatter_add(1, bins, x)


OPERATORS = {  # the function, and its matrix if it is linear
    "tanh": (lambda x: torch.tanh(x @ MIXING.T), None),
    "an old autograd.Function": (OldFunction.apply, MIXING),
    "a new autograd.Function": (NewFunction.apply, MIXING),
    "a backward pass in numpy": (NumpyFunction.apply, MIXING),
    "a backward pass half in numpy": (partly_numpy, torch.cat([MIXING, 2 * MIXING])),
    "a checkpoint": (checkpointed, None),
    "attention": (attention, None),
    "in place on a fresh tensor": (in_place, MIXING),
    "item": (lambda x: x @ MIXING.T * (1.0 if x.abs().max().item() > 0 else 2.0), MIXING),
    "compiled": (torch.compile(lambda x: torch.tanh(x @ MIXING.T), backend="aot_eager"), None),
    "LSTM": (recurrent, None),
    "grid_sample": (warped, None),
    "sort": (lambda x: x.sort(1)[0][:, :3], None),
    "cummax": (lambda x: x.cummax(1)[0], None),
    "svdvals": (lambda x: torch.linalg.svdvals(x.reshape(-1, 2, 3)), None),
    "cdist": (distances, None),
    "norm": (lambda x: x.reshape(-1, 2, 3).norm(dim=2), None),
    "fft abs": (lambda x: torch.fft.fft(x).abs(), None),
    "interpolate": (interpolated, None),
    "max_pool": (lambda x: torch.nn.functional.max_pool1d(x[:, None], 2).flatten(1), None),
    "softmax": (lambda x: x.softmax(1), None),
    "histogram": (histogram, torch.eye(3, dtype=torch.float64).repeat_interleave(2, 1)),
}
SOLVERS = {  # for the others the solver depends on torch's version
    "tanh": "gauss-newton",
    "an old autograd.Function": "gauss-newton",
    "a new autograd.Function": "gauss-newton",
    "a backward pass in numpy": "gradient",
    "a backward pass half in numpy": "gradient",
    "compiled": "gradient",
}


def data_term(name):
    """A data step with an operator: the function, ``x0``, ``y``, and the guidance with scale 0.3 and rho 4."""
    function, _ = OPERATORS[name]
    generator = torch.Generator().manual_seed(1)
    x0, moved = torch.randn(2, 2, 6, dtype=torch.float64, generator=generator)
    y = function(x0 + 0.3 * moved).detach()
    return function, x0, y, fg.PnP(fg.likelihoods.Gaussian(y, fg.operators.Function(function), 0.3), rho=4.0)


@pytest.mark.parametrize("name", OPERATORS)
def test_pnp_serves_every_operator_with_a_backward_pass(name):
    """``auto`` takes Gauss-Newton if the backward pass can be differentiated, else gradient steps. Both end in the
    minimum, which has a closed form if the operator is linear."""
    function, x0, y, guidance = data_term(name)
    run = make_run(event=(6,))
    slow = name == "attention"  # every other has converged after 30
    guidance = replace(guidance, iterations=60 if slow else 30).prepare(run)
    assert guidance.solver == SOLVERS.get(name, guidance.solver)
    x = guidance.data_step(run, x0, 4)

    def objective(x):
        return 0.5 * (y - function(x)).square().sum() / 0.3**2 + 0.5 * 4.0 * (x - x0).square().sum()

    start, end = x0.clone().requires_grad_(), x.clone().requires_grad_()
    before, after = objective(start), objective(end)
    assert after < 0.95 * before
    if name not in ("sort", "max_pool"):  # their minima may be at kinks
        (a,), (b,) = torch.autograd.grad(before, start), torch.autograd.grad(after, end)
        assert b.norm() < 1e-6 * a.norm()
    matrix = OPERATORS[name][1]
    if matrix is not None:
        normal = matrix.T @ matrix / 0.3**2 + 4.0 * torch.eye(6, dtype=torch.float64)
        offset = function(torch.zeros(1, 6, dtype=torch.float64))
        wanted = torch.linalg.solve(normal, ((y - offset) @ matrix / 0.3**2 + 4.0 * x0).T).T
        assert torch.allclose(x, wanted, atol=1e-8)


@pytest.mark.parametrize("solver", ["gauss-newton", "gradient"])
@pytest.mark.parametrize(
    ("f", "noise", "mean"),
    [(torch.tanh, 0.05, 60.0), (torch.sigmoid, 0.1, 4.5), (torch.square, 0.3, 6.0), (torch.exp, 0.3, 1e6)],
    ids=["tanh", "sigmoid", "square", "exp"],
)
def test_no_solver_ends_above_its_start(f, noise, mean, solver):
    """A full Gauss-Newton step goes up here: with full steps the means were 554, 8.1, 1671 and infinite."""
    generator = torch.Generator().manual_seed(0)
    matrix, x0, truth = (torch.randn(n, 6, generator=generator) for n in (3, 500, 500))

    def h(x):
        return f(x @ matrix.T)

    y = h(truth)
    likelihood = fg.likelihoods.Gaussian(y, fg.operators.Function(h), noise)

    def objective(x):
        return (y - h(x)).double().square().sum(1) / (2 * noise**2) + 0.5 * (x - x0).double().square().sum(1)

    found = objective(solve(likelihood, x0, y, noise, 1.0, solver, {"gauss-newton": 4, "gradient": 32}[solver]))
    assert (found <= objective(x0) * (1 + 1e-6)).all()
    assert found.mean() < mean and found.median() < 20.0


@pytest.mark.parametrize("name", ["a backward pass in numpy", "a backward pass half in numpy"])
def test_gauss_newton_by_name_says_why_it_cannot_serve(name):
    guidance = replace(data_term(name)[-1], solver="gauss-newton")
    with pytest.raises(ValueError, match="solver: 'gauss-newton' needs an operator whose backward pass autograd can"):
        guidance.prepare(make_run(event=(6,)))


def test_pnp_of_an_operator_without_a_derivative():
    operator = fg.operators.Function(lambda x: x.detach().round())
    for solver in ("auto", "gradient"):
        with pytest.raises(ValueError, match="operator: expected one that autograd can differentiate"):
            guidance = fg.PnP(fg.likelihoods.Gaussian(Y[:, :1].expand(2, 3), operator, 0.3), solver=solver)
            fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=2)


def test_gradient_steps_never_end_above_their_start():
    """Also if the objective is far from concave: the operator oscillates within the noise."""
    x0 = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]
    y = torch.zeros(64, 1, dtype=torch.float64)
    likelihood = fg.likelihoods.Gaussian(y, fg.operators.Function(lambda x: torch.sin(40 * x) + x), 0.05)

    def objective(x):
        return 0.25 * (x - x0).square().sum(1) - likelihood.log_prob(x)

    for iterations in (1, 2, 5, 32):
        x = solve(likelihood, x0, y, 0.05, 0.5, "gradient", iterations)
        assert (objective(x) <= objective(x0) + 1e-9).all()


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_decoder_and_encoder_may_write_into_what_they_get(space):
    def decode(z, write=False):
        out = torch.tanh(z) + 0.1 * z
        if write:
            z.fill_(5.0)
        return out

    def encode(x, write=False):
        out = 0.9 * x
        if write:
            x.fill_(5.0)
        return out

    def outcome(write):
        encoder = None if space == "latent" else lambda x: encode(x, write)
        guidance = fg.LatentPnP(gaussian_likelihood(), lambda z: decode(z, write), encoder, space)
        return fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=4, seed=0, dtype=torch.float64).x

    assert torch.equal(outcome(True), outcome(False))


def test_a_decoder_that_returns_no_tensor():
    guidance = fg.LatentPnP(gaussian_likelihood(), lambda z: {"sample": z})
    with pytest.raises(TypeError, match=r"decoder: expected it to return a tensor \[1, \.\.\.\] .*codec\), got dict"):
        fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=2)


# --- whole runs ---------------------------------------------------------------------------------------------


def test_tmpd_on_a_gaussian_prior_draws_from_the_posterior():
    """With the exact covariance the guided step is the exact conditional one, up to the step's own error."""
    prior, count = example(), 4000
    means, covariance, _ = posterior(prior.mean, prior.covariance, MATRIX, Y, SCALE)
    guidance = fg.DPS(gaussian_likelihood(Y[:1]), zeta="score", normalize=False, covariance="moment")
    x = fg.sample(prior.denoiser(), (count, 3), guidance=guidance, steps=200, dtype=torch.float64).x
    assert torch.allclose(x.mean(0), means[0], atol=0.03)
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.04)


# --- conditions ---------------------------------------------------------------------------------------------


GUIDANCES = {
    "plain": lambda likelihood: None,
    "DPS": fg.DPS,
    "DPS moment": lambda likelihood: fg.DPS(likelihood, "score", normalize=False, covariance="moment"),
    "PnP": fg.PnP,
    "PiGDM": fg.PiGDM,
    "DAPS": fg.DAPS,
    "DAPS Langevin": lambda likelihood: fg.DAPS(likelihood, ode_steps=2, solver="langevin", iterations=2),
    "LatentPnP": lambda likelihood: fg.LatentPnP(likelihood, lambda z: z, iterations=2),
    "TDS": lambda likelihood: fg.TDS(likelihood, particles=3),
    "TDS point": lambda likelihood: fg.TDS(likelihood, particles=3, covariance="point"),
    "FK": lambda likelihood: fg.FK(lambda x: x.flatten(1).sum(1), particles=3),
    "FK guided": lambda likelihood: fg.FK(
        lambda x: x.flatten(1).sum(1), particles=3, proposal="guided", covariance="point"
    ),
    "FK of y": lambda likelihood: fg.FK(likelihood, particles=3, covariance="isotropic"),
}


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("chunk_size", (None, 2))
def test_each_observation_has_its_conditions(name, chunk_size):
    """Observation ``b`` of a batch is the same as in a run where all have its condition (the mean of the prior)."""
    means = torch.tensor([[-1.0, 0.0], [0.5, 2.0]])

    def net(x, t, mean):
        return x / 2 + mean

    def run(rows):
        prior = fg.Denoiser(fg.Conditional(net, mean=means[rows]), fg.schedules.vp_linear(100), "sample")
        likelihood = fg.likelihoods.Gaussian(torch.tensor([[0.3, 0.1]]), fg.operators.Identity(), 0.5)
        options = dict(guidance=GUIDANCES[name](likelihood), steps=4, chunk_size=chunk_size, seed=0)
        return fg.sample(prior, (2, 2), **options).x

    both = run([0, 1])
    for b in range(2):
        torch.testing.assert_close(both[b], run([b, b])[b])
        torch.testing.assert_close(both[b], run([b])[b])
    assert (run([0])[1] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("guidance", ["plain", "TDS"])
def test_a_network_may_write_into_its_conditions(rows, guidance):
    mean = torch.tensor([[-1.0, 0.0], [0.5, 2.0]])[:rows]

    def run(net):
        prior = fg.Denoiser(fg.Conditional(net, mean={"a": [mean]}), fg.schedules.vp_linear(100), "sample")
        options = {
            "guidance": GUIDANCES[guidance](fg.likelihoods.Gaussian(torch.zeros(1, 2), fg.operators.Identity(), 0.5))
        }
        return fg.sample(prior, (2, 2), steps=4, seed=0, **options).x

    def writes(x, t, mean):
        return x / 2 + mean["a"][0].mul_(3.0)

    assert torch.equal(run(writes), run(lambda x, t, mean: x / 2 + mean["a"][0] * 3.0))
    assert torch.equal(mean, torch.tensor([[-1.0, 0.0], [0.5, 2.0]])[:rows])
    # also with one sample
    net = fg.Conditional(writes, mean={"a": [mean]})
    net(torch.zeros(rows, 2), torch.zeros(rows))
    assert torch.equal(mean, torch.tensor([[-1.0, 0.0], [0.5, 2.0]])[:rows])


def test_conditions_of_a_wrong_kind():
    with pytest.raises(TypeError, match="net: expected a callable"):
        fg.Conditional(None)
    for shape in ((), (0, 2), (3, 2)):
        with pytest.raises(ValueError, match="b: expected one row, or one row per observation"):
            fg.Conditional(torch.add, a=torch.zeros(2), b={"c": torch.zeros(shape)})
