"""TDS and FK against closed forms: Gaussian prior x linear-Gaussian likelihood, and a mixture."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from gaussian import MATRIX, SCALE, GaussianPrior, Y, example, gaussian_likelihood, posterior

import fastguide as fg
from fastguide.demo import Mixture

STEPS = 20


def run(guidance, seed: int = 0, prior: GaussianPrior | None = None, **options) -> fg.Samples:
    prior = prior or example()
    return fg.sample(
        prior.denoiser(), (2, 3), guidance=guidance, steps=STEPS, seed=seed, dtype=torch.float64, **options
    )


@pytest.fixture(scope="module")
def closed_form():
    """The limit with the base kernel of DDPM."""
    return posterior(*example().chain(STEPS), MATRIX, Y, SCALE)


@pytest.fixture(scope="module")
def closed_form_of_trace():
    """The limit with the trace kernel of ``covariance="moment"``, the default."""
    return posterior(*example().chain(STEPS, rows=MATRIX), MATRIX, Y, SCALE)


def errors(guidance_of, particles: int, seeds: range, closed_form) -> tuple[float, float, float]:
    """Root mean square errors of posterior mean, variance and log-evidence over seeds and observations."""
    means, covariance, evidence = closed_form
    squares = []
    for seed in seeds:
        out = run(guidance_of(particles), seed)
        squares.append(
            (
                (out.mean() - means).square().mean(),
                (out.variance() - covariance.diagonal()).square().mean(),
                (out.log_evidence - evidence).square().mean(),
            )
        )
    return tuple(math.sqrt(sum(s[i].item() for s in squares) / len(squares)) for i in range(3))


@pytest.mark.parametrize("method", ["tds", "fk"])
def test_reaches_the_closed_form_like_one_over_root_k(method, closed_form_of_trace):
    def guidance_of(particles):
        likelihood = gaussian_likelihood()
        if method == "tds":
            return fg.TDS(likelihood, particles)
        return fg.FK(likelihood, particles, proposal="guided", potential="difference", resample_steps=3)

    sizes = (64, 256, 1024)  # of 4096 particles alone TDS takes as long as of all these
    table = torch.tensor([errors(guidance_of, k, range(10), closed_form_of_trace) for k in sizes])
    print(
        f"\n{method}: K, rms error of mean, variance, log-evidence\n",
        torch.cat([torch.tensor(sizes)[:, None], table], 1),
    )
    logs = torch.log(torch.tensor(sizes, dtype=torch.float64))
    centred = logs - logs.mean()
    slopes = (centred[:, None] * table.double().log()).sum(0) / centred.square().sum()
    assert ((slopes > -0.7) & (slopes < -0.3)).all(), slopes  # 1/sqrt(K) is -0.5
    assert (table[-1] < math.sqrt(4096 / sizes[-1]) * torch.tensor([0.05, 0.05, 0.06])).all(), table[-1]


@pytest.mark.parametrize("covariance", ["point", "isotropic", "moment"])
@pytest.mark.parametrize("resampler", ["systematic", "stratified", "multinomial", "residual"])
def test_every_covariance_and_resampler_has_the_same_limit(covariance, resampler):
    # A wide likelihood, so that "point" works too. The covariance changes the variance, not the limit. The trace kernel
    # has a limit for each covariance, since its variance comes from other directions.
    prior, scale = example(), 1.5
    means, variance, evidence = posterior(*prior.chain(STEPS), MATRIX, Y, scale)
    likelihood = gaussian_likelihood(scale=scale)
    out = run(fg.TDS(likelihood, 4096, covariance=covariance, resampler=resampler, base_kernel="ddpm"))
    assert torch.allclose(out.mean(), means, atol=0.08)
    assert torch.allclose(out.variance(), variance.diagonal().expand_as(means), atol=0.1)
    assert torch.allclose(out.log_evidence, evidence, atol=0.08)


@pytest.mark.parametrize("base_kernel, eta", [("trace", 1.0), ("trace", 0.5), ("ddpm", 1.0)])
def test_a_base_kernel_reaches_its_closed_form(base_kernel, eta):
    chain = example().chain(STEPS, eta, rows=MATRIX if base_kernel == "trace" else None)
    means, variance, evidence = posterior(*chain, MATRIX, Y, SCALE)
    out = run(fg.TDS(gaussian_likelihood(), 16384, base_kernel=base_kernel), eta=eta)
    assert torch.allclose(out.mean(), means, atol=0.03)
    assert torch.allclose(out.variance(), variance.diagonal().expand_as(means), atol=0.03)
    assert torch.allclose(out.log_evidence, evidence, atol=0.03)


@pytest.mark.parametrize("covariance", ["isotropic", "moment"])
@pytest.mark.parametrize("steps", [2, 5])
def test_the_trace_kernel_is_exact_for_unit_variance_at_any_number_of_steps(covariance, steps):
    """``x_0`` given ``x_t`` has one variance in all directions, so the kernel is that of the prior. DDPM's leaves the
    variance out."""
    one = torch.eye(3, dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(3), one, fg.schedules.vp_cosine(1000))
    means, variance, evidence = posterior(torch.zeros(3, dtype=torch.float64), one, MATRIX, Y, SCALE)
    found = {}
    for kernel in ("ddpm", "trace"):
        guidance = fg.TDS(gaussian_likelihood(), 16384, covariance=covariance, base_kernel=kernel)
        out = fg.sample(prior.denoiser(), (2, 3), guidance=guidance, steps=steps, seed=0, dtype=torch.float64)
        found[kernel] = (out.log_evidence - evidence).abs().max().item()
        if kernel == "trace":
            # Some 1,800 first ancestors are left: five standard errors are 0.1 for the mean of unit variance.
            assert torch.allclose(out.mean(), means, atol=0.06)
            assert torch.allclose(out.variance(), variance.diagonal().expand_as(means), atol=0.06)
    assert found["trace"] < 0.06 < 0.1 < found["ddpm"], found


def test_the_trace_kernel_needs_a_gradient():
    with pytest.raises(ValueError, match="base_kernel: expected 'ddpm' without the guided proposal"):
        run(fg.FK(gaussian_likelihood(), 8, base_kernel="trace"))
    with pytest.raises(ValueError, match="base_kernel: expected one of"):
        run(fg.TDS(gaussian_likelihood(), 8, base_kernel="moment"))


def test_default_covariance_is_moment_for_few_measurements():
    prior = example()
    few = run(fg.TDS(gaussian_likelihood(), 64), prior=prior)
    assert torch.equal(few.x, run(fg.TDS(gaussian_likelihood(), 64, covariance="moment")).x)
    count = torch.ones(17, dtype=torch.float64)
    wide = GaussianPrior(0 * count, torch.diag(count), prior.schedule).denoiser()
    likelihood = fg.likelihoods.Gaussian(torch.zeros(1, 17), fg.operators.Identity(), 0.5)
    outs = [
        fg.sample(wide, (1, 17), guidance=fg.TDS(likelihood, 32, covariance=c), steps=5, seed=0).x
        for c in (None, "isotropic")
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("base_kernel", ["ddpm", "trace"])
@pytest.mark.parametrize("covariance", ["point", "isotropic", "moment"])
def test_fk_with_the_guided_proposal_and_difference_is_tds(covariance, base_kernel):
    likelihood, options = gaussian_likelihood(), dict(covariance=covariance, base_kernel=base_kernel)
    tds = run(fg.TDS(likelihood, 50, **options), keep_ancestors=True)
    fk = run(fg.FK(likelihood, 50, proposal="guided", **options), keep_ancestors=True)
    for name in ("x", "log_weights", "log_evidence", "log_evidence_error", "ess", "ancestors", "first_ancestors"):
        assert torch.equal(getattr(tds, name), getattr(fk, name)), name


@pytest.mark.parametrize("proposal", ["base", "guided"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum", "callable"])
def test_every_potential_and_proposal_reaches_the_same_target(potential, proposal):
    """The target ``N(m, V) exp(r)`` with a quadratic reward is Gaussian again. The reward is mild for "sum", which adds
    it up some two hundred times during the run."""
    m, v = example().chain(STEPS)
    centre = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
    curvature = 0.02 if potential == "sum" else 0.25
    inverse = torch.linalg.inv(v)
    precision = inverse + curvature * torch.eye(3, dtype=torch.float64)
    mean = torch.linalg.solve(precision, inverse @ m + curvature * centre)

    def reward(x0):
        return -0.5 * curvature * (x0 - centre.to(x0)).square().sum(1) / 2.0  # strength doubles it

    f = partial_difference if potential == "callable" else potential
    outs = [
        run(
            fg.FK(reward, 8000, potential=f, proposal=proposal, covariance="point", strength=2.0, base_kernel="ddpm"),
            seed,
        )
        for seed in range(2)
    ]
    tolerance = 0.05
    got = torch.cat([out.mean() for out in outs]).mean(0)
    assert torch.allclose(got, mean, atol=tolerance), (got, mean)
    got = torch.cat([out.variance() for out in outs]).mean(0)
    assert torch.allclose(got, torch.linalg.inv(precision).diagonal(), atol=2 * tolerance)
    # The normalising constant: integral of N(x; m, V) exp(-curvature/2 |x - centre|^2).
    wide = torch.distributions.MultivariateNormal(m, v + torch.eye(3, dtype=torch.float64) / curvature)
    constant = wide.log_prob(centre) + 1.5 * math.log(2 * math.pi / curvature)
    got = torch.stack([out.log_evidence for out in outs]).mean()
    assert abs(got.item() - constant.item()) < tolerance


def test_own_proposal_with_its_density_ratio(closed_form):
    """A proposal that is shifted by a constant and weighed by its density ratio has the same limit."""
    shift = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)

    def proposal(x, x0_hat, coefficients, *, seed, step):
        a, b, tau = fg.reference.step_coefficients(coefficients)
        mean = a * x + b * x0_hat
        if tau == 0.0:
            return mean, torch.zeros(len(x), dtype=torch.float64)
        z = fg.ops.randn(x.shape, seed=seed, step=step, dtype=x.dtype)
        moved = mean + 0.3 * tau * shift + tau * z
        density = torch.distributions.Normal
        ratio = density(mean, tau).log_prob(moved) - density(mean + 0.3 * tau * shift, tau).log_prob(moved)
        return moved, ratio.sum(1)

    means, _, evidence = closed_form
    out = run(fg.FK(gaussian_likelihood(), 20000, proposal=proposal, covariance="isotropic"))
    assert torch.allclose(out.mean(), means, atol=0.06)
    assert torch.allclose(out.log_evidence, evidence, atol=0.08)


def test_strength_tempers_the_likelihood():
    """``exp(strength log p(y | x))`` is a Gaussian likelihood of variance ``s^2 / strength``, up to a constant."""
    strength = 0.25
    prior = example()
    means, _, _ = posterior(*prior.chain(STEPS), MATRIX, Y, SCALE / strength**0.5)
    options = dict(proposal="guided", covariance="isotropic", base_kernel="ddpm")
    out = run(fg.FK(gaussian_likelihood(), 8000, strength=strength, **options))
    assert torch.allclose(out.mean(), means, atol=0.05)


@pytest.mark.parametrize("resample_steps", [None, 4, [2, 5, 11]])
def test_resampling_happens_at_the_steps_asked_for(resample_steps):
    out = run(
        fg.FK(
            gaussian_likelihood(),
            40,
            ess_threshold=None,
            resample_steps=resample_steps,
            covariance="isotropic",
        ),
        keep_ancestors=True,
    )
    identity = torch.arange(40, dtype=torch.int32)
    moved = [i for i in range(STEPS) if not torch.equal(out.ancestors[i], identity.expand(2, -1))]
    if resample_steps is None:  # at t = 1 all weights are equal, and resampling moves no particle
        assert moved == list(range(1, STEPS))
    else:
        assert moved == ([4, 8, 12, 16] if resample_steps == 4 else resample_steps)


def test_a_row_above_the_threshold_keeps_its_particles():
    out = run(fg.TDS(gaussian_likelihood(), 100, ess_threshold=0.9), keep_ancestors=True)
    identity = torch.arange(100, dtype=torch.int32)
    kept = (out.ancestors == identity).all(2)  # [steps, B]
    assert torch.equal(kept, out.ess[:-1] >= 90)
    assert kept.any() and not kept.all()


def test_observations_are_independent_of_each_other():
    """Observation 0 has the same particles, alone or together with another."""
    both = run(fg.TDS(gaussian_likelihood(), 30))
    alone = fg.sample(
        example().denoiser(),
        (1, 3),
        guidance=fg.TDS(gaussian_likelihood(Y[:1]), 30),
        steps=STEPS,
        seed=0,
        dtype=torch.float64,
    )
    assert torch.allclose(both.x[:1], alone.x, atol=1e-12)
    assert torch.allclose(both.log_weights[:1], alone.log_weights, atol=1e-9)


def test_zero_reward_probability_kills_particles_and_no_more():
    """A hard constraint on ``x0_hat`` at every step: a particle that was once outside has weight 0 forever. The
    evidence is the share of paths that stay inside, which is at most the share of paths that end inside."""

    def reward(x0):
        return torch.where(x0[:, 0] > 0.3, 0.0, -math.inf)

    out = run(fg.FK(reward, 4000, ess_threshold=0.5))
    alive = out.log_weights > -math.inf
    assert (out.x[..., 0][alive] > 0.3).all() and alive.any()
    m, v = example().chain(STEPS)
    sd = v[0, 0].sqrt()
    beta = (0.3 - m[0]) / sd
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    upper = 1 - normal.cdf(beta)
    assert (out.log_evidence <= torch.log(upper) + 0.05).all()


def partial_difference(new, old):
    return 0.7 * (new if old is None else new - old)


@pytest.mark.parametrize("proposal", ["base", "guided"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum", partial_difference])
def test_a_reward_of_nan_is_a_particle_of_weight_0(potential, proposal):
    """A warning says how many there are. The gradient of such a reward guides no particle."""

    def reward(x0):
        return 0.1 * torch.sqrt(2.0 - x0[:, 0])  # its gradient is NaN as well

    with pytest.warns(RuntimeWarning, match=r"reward: returned NaN for \d+ particles, first at step \d"):
        out = run(fg.FK(reward, 200, potential=potential, proposal=proposal, covariance="point"))
    dead = out.x[..., 0] > 2.0
    assert (out.weights[dead] == 0).all() and (out.weights[~dead] > 0).any()
    assert torch.isfinite(out.log_evidence).all() and torch.isfinite(out.x).all()


# --- potentials at some steps alone -------------------------------------------------------------------------


# Each potential with each proposal, and steps as a number or a list. Some cases without a threshold or without steps.
@pytest.mark.parametrize("proposal", ["base", "guided"])
@pytest.mark.parametrize(
    "potential, resample_steps, ess_threshold, levels",
    [
        *((potential, 10, 0.5, 5) for potential in ("difference", "max", "sum", partial_difference)),
        *((potential, [0, 30], None, 3) for potential in ("difference", "max", "sum", partial_difference)),
        *(("difference", 10, None, 5), ("difference", [], 0.5, 1), ("sum", [], 0.5, 1)),
    ],
)
def test_a_potential_stands_at_the_resampling_steps_and_at_the_end(
    resample_steps, ess_threshold, levels, potential, proposal
):
    """A unit Gaussian and ``r = -(x_1 - 1)^2 / 2``: the target is a Gaussian with mean 0.5 and log Z = -0.597, up to
    the error of 50 steps. The reward is called only where a potential or a gradient needs it."""
    one = torch.ones(1, dtype=torch.float64)
    prior = GaussianPrior(0.0 * one, torch.diag(one), fg.schedules.flow())
    variance = prior.chain(50)[1].item()
    exact_mean, exact_log_z = variance / (1 + variance), -0.5 * (math.log(1 + variance) + 1 / (1 + variance))
    assert abs(exact_mean - 0.5) < 0.03 and abs(exact_log_z + 0.597) < 0.02
    calls = []

    def reward(x0):
        calls.append(len(x0))
        return -0.5 * (x0[:, 0] - 1.0).square()

    guidance = fg.FK(
        reward,
        particles=4096,
        potential=potential,
        proposal=proposal,
        covariance="point",
        ess_threshold=ess_threshold,
        resample_steps=resample_steps,
        base_kernel="ddpm",
    )
    out = fg.sample(prior.denoiser(), (4, 1), guidance=guidance, steps=50, seed=0, dtype=torch.float64)
    assert len(calls) == (levels if proposal == "base" else 51)
    # The last potential of "sum" undoes several others: its weights are far from even.
    tolerance = 0.1 if potential == "sum" else 0.02
    assert abs(out.mean().mean().item() - exact_mean) < tolerance
    assert abs(out.log_evidence.mean().item() - exact_log_z) < tolerance


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_strength_may_follow_the_time(potential):
    """The target has the strength of the last step; the other strengths do not matter."""
    one = torch.ones(1, dtype=torch.float64)
    prior = GaussianPrior(0.0 * one, torch.diag(one), fg.schedules.flow())
    variance = prior.chain(20)[1].item()

    def run_with(strength):
        guidance = fg.FK(
            lambda x0: -0.5 * (x0[:, 0] - 1.0).square(), 8192, potential, strength, "guided", "point", resample_steps=5,
            base_kernel="ddpm",
        )  # fmt: skip
        return fg.sample(prior.denoiser(), (4, 1), guidance=guidance, steps=20, seed=0, dtype=torch.float64)

    table = [0.0] * 8 + [0.5] * 11 + [2.0]
    times = [level.t for level in prior.schedule.levels(20)]
    out, other = run_with(table), run_with(lambda t: table[times.index(t)])
    assert torch.equal(out.x, other.x) and torch.equal(out.log_weights, other.log_weights)
    tolerance = 0.1 if potential == "sum" else 0.02
    assert abs(out.mean().mean().item() - 2.0 * variance / (1 + 2.0 * variance)) < tolerance
    exact = -0.5 * (math.log(1 + 2.0 * variance) + 1 / (0.5 + variance))
    assert abs(out.log_evidence.mean().item() - exact) < tolerance


def test_strength_0_takes_a_hard_constraint_away():
    """``exp(0 * r)`` is 1 also for ``r = -inf``, so no particle dies."""

    def inside(x0):
        return torch.where(x0[:, 0] > 0.3, 0.0, -math.inf)

    out = run(fg.FK(inside, 500, strength=[0.0] * (STEPS - 1) + [1.0], resample_steps=range(STEPS - 1)))
    assert (out.ess[:-1] == 500).all()
    assert torch.equal(out.weights > 0, out.x[..., 0] > 0.3)


# --- what a reward may be -----------------------------------------------------------------------------------


def quadratic(x0):
    return -0.5 * (x0 - 0.2).square().sum(1)


FORMS = {
    "in float32": lambda x0: quadratic(x0).float().double(),
    "an array": lambda x0: quadratic(x0.detach()).numpy(),
    "a list": lambda x0: quadratic(x0.detach()).tolist(),
    "a tuple of tensors": lambda x0: tuple(quadratic(x0.detach())),
    "one of a sum": [(1.0, quadratic)],
    "a sum": [(3.0, quadratic), (-2.0, lambda x0: quadratic(x0).tolist())],
    "of the time": lambda x0, t: quadratic(x0) * (0.0 <= t <= 1.0),
    "of the time, by keyword": lambda x0, *, t=None: quadratic(x0) * (0.0 <= t <= 1.0),
    "of a time of its own": functools.partial(lambda x0, t: quadratic(x0) * (t == 7.0), t=7.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_may_be(form):
    wanted, got = (run(fg.FK(reward, 50), seed=3) for reward in (quadratic, FORMS[form]))
    tolerance = 1e-5 if form == "in float32" else 1e-12
    torch.testing.assert_close(got.x, wanted.x, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.log_weights, wanted.log_weights, atol=tolerance, rtol=0)


def test_a_module_as_a_reward_takes_the_time():
    class Reward(torch.nn.Module):
        def forward(self, x0, t):
            times.append(t)
            return quadratic(x0)

    times = []
    run(fg.FK(Reward(), 5, resample_steps=5))
    levels = example().schedule.levels(STEPS)
    assert times == [levels[i].t for i in (5, 10, 15, STEPS)]


def test_the_guided_proposal_follows_those_of_a_sum_that_have_a_gradient():
    """Half of the reward has no gradient. The target and the evidence are the same."""
    likelihood = gaussian_likelihood(Y[:1])

    def hard(x0):
        return likelihood.log_prob(x0.detach()).numpy()

    means, _, evidence = posterior(*example().chain(STEPS), MATRIX, Y[:1], SCALE)
    for reward in ([(1.0, likelihood.log_prob)], [(0.5, likelihood.log_prob), (0.5, hard)]):
        guidance = fg.FK(
            reward,
            20000,
            proposal="guided",
            covariance="point",
            strength=[0.05] * (STEPS - 5) + [0.2, 0.4, 0.6, 0.8, 1.0],
            base_kernel="ddpm",
        )
        out = fg.sample(example().denoiser(), (1, 3), guidance=guidance, steps=STEPS, seed=0, dtype=torch.float64)
        assert torch.allclose(out.mean(), means, atol=0.06)
        assert torch.allclose(out.log_evidence, evidence, atol=0.1)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x0: [0.0] * (len(x0) - 1), r"reward: expected it to return a tensor of shape \[8\], got \[7\]"),
        (
            lambda x0: quadratic(x0)[:, None].numpy(),
            r"reward: expected it to return a tensor of shape \[8\], got \[8, 1\]",
        ),
        (lambda x0: ["good"] * len(x0), "reward: expected it to return 8 numbers, got"),
        (lambda x0: quadratic(x0) + 0j, "reward: expected it to return real numbers, got torch.complex128"),
        (lambda x0: quadratic(x0).numpy() + 0j, "reward: expected it to return real numbers, got torch.complex128"),
    ],
)
def test_a_reward_that_returns_something_else(bad, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(fg.FK(bad, 4))


def writing(f):
    """``f``, but it overwrites all its arguments afterwards."""

    def g(*args, **kwargs):
        returned = f(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
        for a in args:
            if isinstance(a, torch.Tensor):
                with torch.no_grad():
                    a.fill_(7.0)
        return returned

    return g


@pytest.mark.parametrize("proposal", ["base", "guided", "own"])
@pytest.mark.parametrize("potential", ["difference", partial_difference])
def test_functions_may_write_into_what_they_get(potential, proposal):
    def own(x, x0_hat, coefficients, *, seed, step):
        a, b, tau = fg.reference.step_coefficients(coefficients)
        z = fg.ops.randn(x.shape, seed=seed, step=step, dtype=x.dtype)
        return a * x + b * x0_hat + tau * z, torch.zeros(len(x))

    def outcome(wrap):
        return run(
            fg.FK(
                wrap(quadratic),
                50,
                potential=wrap(potential) if callable(potential) else potential,
                proposal=wrap(own) if proposal == "own" else proposal,
                covariance="point",
            )
        )

    clean, dirty = outcome(lambda f: f), outcome(writing)
    assert torch.equal(clean.x, dirty.x) and torch.equal(clean.log_weights, dirty.log_weights)


@pytest.mark.parametrize("proposal", ["base", "guided"])
def test_a_reward_keeps_what_it_returned(proposal):
    kept = []

    def reward(x0):
        value = quadratic(x0)
        kept.append((value, value.detach().clone()))
        return value

    run(fg.FK(reward, 50, ess_threshold=None, proposal=proposal, covariance="point"))
    assert all(torch.equal(value, copy) for value, copy in kept)


def test_fk_of_a_likelihood_with_the_base_proposal_needs_no_derivative():
    """Also with default options. The network here has no derivative."""

    class Detached(GaussianPrior):
        def __call__(self, x, t):
            return super().__call__(x, t).detach()

    prior = example()
    detached = Detached(prior.mean, prior.covariance, prior.schedule)
    for operator in (fg.operators.Matrix(MATRIX), fg.operators.Function(lambda x: (x @ MATRIX.to(x).T).detach())):
        likelihood = fg.likelihoods.Gaussian(Y, operator, SCALE)
        out = run(fg.FK(likelihood, 2000), prior=detached)
        assert torch.isfinite(out.x).all() and torch.isfinite(out.log_evidence).all()


def test_tds_finds_both_modes_with_their_mass_and_dps_does_not(capsys):
    """Two separated modes have unequal masses after the measurement, which are known exactly."""
    model = Mixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.25, fg.schedules.flow())
    prior = fg.Denoiser(model, model.schedule, "sample")
    matrix, y, scale = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.15]]), 1.0
    weights, means, _, evidence = model.posterior(matrix, y[0], scale)
    exact_mass, exact_mean = weights[1].item(), (weights[:, None] * means).sum(0)
    likelihood = fg.likelihoods.Gaussian(y, fg.operators.Matrix(matrix), scale)
    options = {"steps": 100, "seed": 1, "dtype": torch.float64}

    out = fg.sample(prior, (1, 2), guidance=fg.TDS(likelihood, 4096), **options)
    mass = (out.weights * (out.x[..., 0] > 0)).sum().item()
    dps = fg.sample(prior, (4096, 2), guidance=fg.DPS(likelihood, zeta=1.0, normalize=False), **options).x
    dps_mass = (dps[:, 0] > 0).double().mean().item()
    with capsys.disabled():  # print the numbers also if the test passes
        print(f"\nmass of the right mode: exact {exact_mass:.3f}, TDS {mass:.3f}, DPS {dps_mass:.3f} (not exact)")
        print(f"log p(y): exact {evidence:.3f}, TDS {out.log_evidence.item():.3f}")
        rounded = [[round(v, 3) for v in m.tolist()] for m in (exact_mean, out.mean()[0], dps.mean(0))]
        print("mean: exact {}, TDS {}, DPS {}".format(*rounded))
    assert abs(mass - exact_mass) < 0.03
    assert abs(out.log_evidence.item() - evidence) < 0.05
    assert torch.allclose(out.mean()[0], exact_mean, atol=0.12)
    # DPS as published ignores the covariance of x_0 given x_t, so its result is wrong by many standard errors.
    assert abs(dps_mass - exact_mass) > 0.05 or (dps.mean(0) - exact_mean).abs().max() > 0.25


@pytest.mark.parametrize("seed", [0, 3])
def test_moment_covariance_on_separated_modes(seed):
    """25 modes at distances of 8 in 8 dimensions, one measurement: the benchmark of Cardoso et al. 2024. The evidence
    depends on every level, also the first, where ``alpha`` is 0.006 and Cov(x_0) is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    dimensions, particles = 8, 2000
    grid = 8 * torch.arange(-2.0, 3.0, dtype=torch.float64)
    means = torch.cartesian_prod(grid, grid).repeat(1, dimensions // 2)
    model = Mixture(means, 1.0, fg.schedules.vp_linear())
    matrix = torch.randn(1, dimensions, generator=generator, dtype=torch.float64)
    matrix /= 2 * matrix.norm()
    x_0 = means[torch.randint(25, (1,), generator=generator)]
    y, scale = x_0 @ matrix.T, 0.3
    weights, conditional, covariance, evidence = model.posterior(matrix, y[0], scale)
    out = fg.sample(
        fg.Denoiser(model, model.schedule, "sample"),
        (1, dimensions),
        guidance=fg.TDS(fg.likelihoods.Gaussian(y, fg.operators.Matrix(matrix), scale), particles),
        steps=100,
        seed=0,
        dtype=torch.float64,
    )
    assert abs(out.log_evidence.item() - evidence) < 0.1

    def exact() -> torch.Tensor:
        modes = torch.multinomial(weights, particles, replacement=True, generator=generator)
        noise = torch.randn(particles, dimensions, dtype=torch.float64, generator=generator)
        return conditional[modes] + noise @ torch.linalg.cholesky(covariance).T

    directions = torch.randn(dimensions, 100, dtype=torch.float64, generator=generator)
    directions /= directions.norm(dim=0)
    a, b, ours = ((cloud @ directions).sort(0).values for cloud in (exact(), exact(), out.draw(particles)[0]))
    distance, floor = (ours - a).abs().mean().item(), (b - a).abs().mean().item()
    assert distance < 2.5 * floor, (distance, floor)


# --- operators that know nothing of A A^T -----------------------------------------------------------------------


class _Dense(fg.operators.LinearOperator):
    def __init__(self, matrix):
        self.matrix_ = matrix

    def __call__(self, x):
        return x @ self.matrix_.to(x.dtype).T

    def adjoint(self, y):
        return y @ self.matrix_.to(y.dtype)


@pytest.mark.parametrize("kind", ["function", "linear function", "class", "matrix"])
@pytest.mark.parametrize("method", ["TDS", "FK", "DPS"])
def test_a_sharp_likelihood_does_not_explode_by_default(kind, method):
    """40 measurements of 64 elements, noise 0.1."""
    matrix = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) / 8
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    y = x @ matrix.T + 0.1 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    operator = {
        "function": lambda: fg.operators.Function(lambda v: v @ matrix.T),
        "linear function": lambda: fg.operators.Function(lambda v: v @ matrix.T, linear=True, event=(64,)),
        "class": lambda: _Dense(matrix),
        "matrix": lambda: fg.operators.Matrix(matrix),
    }[kind]()
    likelihood = fg.likelihoods.Gaussian(y, operator, 0.1)
    guidance = {
        "TDS": lambda: fg.TDS(likelihood, 64),
        "FK": lambda: fg.FK(likelihood, 64, proposal="guided"),
        "DPS": lambda: fg.DPS(likelihood, "score", normalize=False),
    }[method]()
    schedule = fg.schedules.vp_linear(1000)
    sigma = torch.tensor((1 - schedule.alphas_cumprod) ** 0.5).float()
    prior = fg.Denoiser(lambda x, t: sigma[t].reshape(-1, 1) * x, schedule)
    out = fg.sample(prior, (1, 64), guidance=guidance, steps=120, seed=1)
    assert out.x.abs().max() < 5
    means, _, evidence = posterior(torch.zeros(64).double(), torch.eye(64).double(), matrix.double(), y.double(), 0.1)
    measured = (out.x.reshape(-1, 64).mean(0).double() - means[0]) @ matrix.double().T
    assert measured.square().mean().sqrt() < 0.5  # the prior is at 1
    if method != "DPS":
        assert abs(float(out.log_evidence) - float(evidence)) < 60  # -46.67; "point" gave -3.6e38


@pytest.mark.parametrize("kind", ["function", "class", "uneven", "square", "detectors"])
@pytest.mark.parametrize("method", ["TDS", "FK", "DPS"])
def test_measurements_that_see_the_same_do_not_explode(kind, method):
    """With positive rows, as in a blur or a projector, the largest eigenvalue of ``A A^T`` is many times its
    diagonal."""
    matrix = torch.rand(40, 64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    scale = torch.linspace(0.1, 0.3, 40) if kind == "detectors" else 0.1
    if kind == "uneven":
        matrix = matrix * torch.logspace(-2, 1, 40)[:, None]
    operator = {
        "class": _Dense(matrix),
        "square": fg.operators.Function(lambda v: (v @ matrix.T / 8) ** 2),
        "detectors": fg.operators.Matrix(matrix),
    }.get(kind, fg.operators.Function(lambda v: v @ matrix.T))
    likelihood = fg.likelihoods.Gaussian(operator(x), operator, scale)
    guidance = {
        "TDS": lambda: fg.TDS(likelihood, 8),
        "FK": lambda: fg.FK(likelihood, 8, proposal="guided"),
        "DPS": lambda: fg.DPS(likelihood, "score", normalize=False),
    }[method]()
    schedule = fg.schedules.edm()
    prior = fg.Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, "sample")
    out = fg.sample(prior, (1, 64), guidance=guidance, steps=30, seed=1)
    assert out.x.abs().max() < 5


# --- rewards of minus infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        lambda r: fg.FK(r, 4000),
        lambda r: fg.FK(r, 4000, potential="sum", resample_steps=[10, 40]),
        lambda r: fg.FK(r, 4000, potential="max", resample_steps=[10, 40]),
        lambda r: fg.FK(r, 4000, proposal="guided", covariance="point", base_kernel="ddpm"),
        lambda r: fg.TDS(fg.likelihoods.Callable(r), 4000, covariance="point", base_kernel="ddpm"),
    ],
)
def test_a_constraint_that_predictions_break_on_the_way(method):
    """The target is N(0, 1) times exp(x / 2) for x > 0.5. At first the prediction of every particle breaks the
    constraint."""
    schedule = fg.schedules.flow()

    def net(x, t):
        t = t[:, None]
        return (1 - t) * x / ((1 - t) ** 2 + t**2)

    def reward(x0):
        return torch.where(x0[:, 0] > 0.5, 0.5 * x0[:, 0], -math.inf)

    denoiser = fg.Denoiser(net, schedule, "sample")
    options = dict(steps=50, seed=1)
    x = fg.sample(denoiser, (200_000, 1), **options).x.double()  # the sampler's own prior
    weights = reward(x).exp()
    out = fg.sample(denoiser, (8, 1), guidance=method(reward), **options)
    assert out.log_evidence.exp().mean().item() == pytest.approx(weights.mean().item(), rel=0.02)
    assert out.mean().mean().item() == pytest.approx((weights @ x / weights.sum()).item(), rel=0.01)
    assert (out.x[out.log_weights > -math.inf] > 0.5).all()
