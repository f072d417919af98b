"""`fastguide.sample`: the loop itself, and the deterministic sampler's order of convergence."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood

import fastguide as fg


def guidances():
    def likelihood(rows=slice(None)):
        return gaussian_likelihood(Y[rows])

    return {
        "plain": lambda rows: None,
        "dps": lambda rows: fg.DPS(likelihood(rows)),
        "pnp": lambda rows: fg.PnP(likelihood(rows)),
        "pigdm": lambda rows: fg.PiGDM(likelihood(rows)),
        "daps": lambda rows: fg.DAPS(likelihood(rows)),
        "daps langevin": lambda rows: fg.DAPS(likelihood(rows), solver="langevin", iterations=3),
        "latent": lambda rows: fg.LatentPnP(likelihood(rows), lambda z: z, iterations=2),
        "tds": lambda rows: fg.TDS(likelihood(rows), 24),
        "tds ddpm": lambda rows: fg.TDS(likelihood(rows), 24, base_kernel="ddpm"),
        "tds conditional": lambda rows: fg.TDS(likelihood(rows), 24, covariance="isotropic"),
        "fk": lambda rows: fg.FK(likelihood(rows), 24, potential="max", covariance="isotropic"),
        "fk guided": lambda rows: fg.FK(
            lambda x: -x.square().sum(1), 24, potential="sum", proposal="guided", covariance="point"
        ),
    }


WITHOUT_ETA = ("pnp", "latent", "daps", "daps langevin")
WEIGHTED = ("tds", "tds ddpm", "tds conditional", "fk", "fk guided")
ALL = pytest.mark.parametrize("name", list(guidances()))


def run(name: str, rows=slice(None), **options) -> fg.Samples:
    batch = len(Y[rows])
    options = {"steps": 12, "seed": 3, "dtype": torch.float64, "guidance": guidances()[name](rows), **options}
    return fg.sample(example().denoiser(), (batch, 3), **options)


def assert_same(a: fg.Samples, b: fg.Samples) -> None:
    for name in ("x", "log_weights", "log_evidence", "log_evidence_error", "ess", "ancestors", "first_ancestors"):
        u, v = getattr(a, name), getattr(b, name)
        assert (u is None and v is None) or torch.equal(u, v), name


# Chunks of one sample, of some particles of one observation, and of all particles of two.
@ALL
@pytest.mark.parametrize("chunk_size", [1, 5, 48])
def test_chunks_change_nothing(name, chunk_size):
    """The bits of the operations do not depend on the chunk. Those of a network's matrix product may, in the last."""
    a, b, again = (run(name, chunk_size=size, steps=4) for size in (None, chunk_size, chunk_size))
    assert torch.allclose(a.x, b.x, atol=1e-11)
    assert_same(b, again)


@pytest.mark.parametrize("proposal", ["base", "guided"])
def test_nothing_of_the_users_sees_more_than_a_chunk(proposal):
    sizes = []

    def reward(x0):
        sizes.append(len(x0))
        return -x0.square().sum(1)

    prior = example()

    def net(x, t):
        sizes.append(len(x))
        return prior(x, t)

    denoiser = fg.Denoiser(net, prior.schedule, "sample")
    fg.sample(
        denoiser, (2, 3), guidance=fg.FK(reward, 10, proposal=proposal, covariance="point"), steps=3, chunk_size=7
    )
    assert set(sizes) == {7, 6}  # 20 samples in chunks of 7


@ALL
def test_a_sample_is_the_same_in_any_batch(name):
    both, first = run(name), run(name, slice(0, 1))
    assert torch.allclose(both.x[:1], first.x, atol=1e-11)


@ALL
def test_the_seed_alone_decides(name):
    assert_same(run(name), run(name))
    assert not torch.equal(run(name).x, run(name, seed=4).x)


@ALL
def test_threads_change_nothing(name):
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outs.append(run(name))
    finally:
        torch.set_num_threads(threads)
    assert_same(*outs)


@ALL
@pytest.mark.parametrize("stop", [4, 8])
def test_a_checkpoint_resumes_to_the_same_bits(name, stop, tmp_path):
    file = tmp_path / "run.pt"
    keep = name in ("tds", "fk")

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == stop:
            raise Killed

    options = {"checkpoint": file, "checkpoint_every": 3, "keep_ancestors": keep}
    with pytest.raises(Killed):
        run(name, callback=kill, **options)
    assert file.exists() and len(list(tmp_path.iterdir())) == 1
    steps = []
    resumed = run(name, callback=lambda p: steps.append(p.step), **options)
    assert steps[0] == 3 * ((stop) // 3) and steps[-1] == 11
    assert_same(resumed, run(name, keep_ancestors=keep))
    assert not file.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"

    def kill(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("tds", callback=kill, checkpoint=file, checkpoint_every=2)
    prior = example().denoiser()
    y = Y + torch.tensor([[0.0, 0.0], [0.0, 1e-12]])

    def again(likelihood, **options):
        options = {"steps": 12, "seed": 3, "dtype": torch.float64, "checkpoint": file, **options}
        guidance = fg.TDS(likelihood, 24, ess_threshold=options.pop("ess_threshold", 0.5))
        return fg.sample(prior, (2, 3), guidance=guidance, **options)

    for likelihood, options in (
        (gaussian_likelihood(), {"seed": 9}),
        (gaussian_likelihood(), {"keep_ancestors": True}),
        (gaussian_likelihood(), {"ess_threshold": 0.4}),
        (gaussian_likelihood(y), {}),
        (gaussian_likelihood(scale=0.31), {}),
        (fg.likelihoods.Gaussian(Y, fg.operators.Matrix(MATRIX + 1e-9), SCALE), {}),
    ):
        with pytest.raises(ValueError, match="checkpoint: expected a file of this very run"):
            again(likelihood, **options)
    again(gaussian_likelihood())  # the same run continues
    assert not file.exists()


def test_a_checkpoint_of_other_conditions_is_refused(tmp_path):
    file = tmp_path / "run.pt"

    def draw(labels, **options):
        net = fg.Conditional(lambda x, t, label: label[:, None] * x, label=torch.tensor(labels))
        prior = fg.Denoiser(net, fg.schedules.vp_linear(100))
        return fg.sample(prior, (2, 3), steps=4, seed=0, checkpoint=file, checkpoint_every=2, **options)

    def kill(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw([0.1, 0.2], callback=kill)
    with pytest.raises(ValueError, match="checkpoint: expected a file of this very run"):
        draw([0.1, 0.3])
    draw([0.1, 0.2])


def test_the_callback_sees_every_step():
    seen = []
    out = run("tds", callback=lambda p: seen.append((p.step, p.level, p.x.clone(), p.log_weights.clone(), p.ess)))
    assert [s[0] for s in seen] == list(range(12))
    assert seen[-1][1].sigma == 0.0 and seen[-1][1].alpha == 1.0
    assert torch.equal(seen[-1][2], out.x) and torch.equal(seen[-1][3], out.log_weights)
    assert torch.equal(torch.stack([s[4] for s in seen]), out.ess[:-1])


def test_weights_evidence_and_draws_agree():
    out = run("tds")
    assert torch.allclose(out.weights.sum(1), torch.ones(2, dtype=torch.float64))
    expected = torch.logsumexp(out.log_weights, 1) - math.log(24)
    assert torch.allclose(out.log_evidence, expected, atol=1e-12)
    assert torch.allclose(out.ess[-1], 1 / out.weights.square().sum(1), rtol=1e-9)
    many = out.draw(20000)
    assert torch.allclose(many.mean(1), out.mean(), atol=2e-3)
    assert torch.allclose(many.var(1, correction=0), out.variance(), atol=2e-3)


def test_x_T_starts_the_run():
    x_T = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = run("plain", x_T=x_T, eta=0.0)
    assert_same(a, run("plain", x_T=x_T, eta=0.0, seed=99))  # no randomness is left
    assert torch.equal(x_T, torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("eta", [0.5, [0.5] * 12, lambda t: 0.5], ids=["number", "table", "function"])
def test_eta_forms_agree(eta):
    assert_same(run("plain", eta=eta), run("plain", eta=0.5))


@pytest.mark.parametrize(
    "schedule",
    [
        fg.schedules.vp_linear(),
        fg.schedules.vp_cosine(),
        fg.schedules.ve(),
        fg.schedules.edm(),
        fg.schedules.flow(),
    ],
    ids=str,
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_prior_is_sampled(schedule, eta):
    """Means and covariances of many plain samples, for every schedule, equal those of the exact chain. These are close
    to the prior's."""
    prior = example(schedule)
    x = fg.sample(prior.denoiser(), (20000, 3), steps=100, eta=eta, dtype=torch.float64).x
    mean, covariance = prior.chain(100, eta)
    assert torch.allclose(x.mean(0), mean, atol=0.03)
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.04)
    assert torch.allclose(covariance, prior.covariance, atol=0.13) and torch.allclose(mean, prior.mean, atol=0.02)


@pytest.mark.parametrize("name, start", [("flow", 0.9), ("edm", 5.0)])
def test_order_of_convergence_of_the_deterministic_sampler(name, start):
    """At ``eta = 0`` the step is a first-order integrator of the probability-flow ODE, whose solution for a Gaussian
    prior is known: in the eigenbasis, ``x_0 - mean`` is ``(x_t - alpha mean) sqrt(lambda / (alpha^2 lambda +
    sigma^2))``."""
    schedule = getattr(fg.schedules, name)()
    prior = example(schedule)
    level = schedule.level(start)
    x_t = 2 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, basis = torch.linalg.eigh(prior.covariance)
    factor = (values / (level.alpha**2 * values + level.sigma**2)).sqrt()
    exact = prior.mean + ((x_t - level.alpha * prior.mean) @ basis * factor) @ basis.T
    errors = []
    for steps in (40, 80, 160, 320):
        times = (start * torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]).tolist()
        x = fg.sample(prior.denoiser(), (5, 3), steps=times, eta=0.0, x_T=x_t, dtype=torch.float64).x
        errors.append((x - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"\n{name}: errors {errors}, observed orders {orders}")
    assert all(0.85 < order < 1.15 for order in orders)


def test_half_precision_states():
    prior = example()
    options = dict(guidance=fg.TDS(gaussian_likelihood(), 512), steps=20, seed=0)
    for dtype in (torch.float16, torch.bfloat16):
        out = fg.sample(prior.denoiser(), (2, 3), dtype=dtype, **options)
        full = fg.sample(prior.denoiser(), (2, 3), **options)
        assert out.x.dtype == dtype and out.log_weights.dtype == torch.float64
        assert torch.allclose(out.mean(), full.mean(), atol=0.15)


def test_nothing_of_the_users_is_changed():
    y, prior = Y.clone(), example()
    likelihood = gaussian_likelihood(y)
    guidance = fg.TDS(likelihood, 16)
    fg.sample(prior.denoiser(), (2, 3), guidance=guidance, steps=4)
    assert guidance.likelihood is likelihood and likelihood.y is y and torch.equal(y, Y)
    assert y.dtype == torch.float64 and guidance.covariance is None


# --- seeds ----------------------------------------------------------------------------------------------------


def test_without_a_seed_each_call_draws_another_from_torchs_generator():
    prior = example().denoiser()
    torch.manual_seed(11)
    first, second = (fg.sample(prior, (2, 3), steps=3) for _ in range(2))
    assert first.seed != second.seed and not torch.equal(first.x, second.x)
    torch.manual_seed(11)
    assert_same(first, fg.sample(prior, (2, 3), steps=3))
    assert_same(first, fg.sample(prior, (2, 3), steps=3, seed=first.seed))


def test_a_run_without_a_seed_goes_on_from_its_checkpoint(tmp_path):
    file = tmp_path / "run.pt"

    def kill(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    options = dict(seed=None, checkpoint=file, checkpoint_every=2)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run("tds", callback=kill, **options)
    torch.manual_seed(2)
    resumed = run("tds", **options)
    assert_same(resumed, run("tds", seed=resumed.seed))


@ALL
def test_a_list_of_seeds_gives_each_observation_its_own(name):
    seeds = [5, (1 << 64) - 2]
    both = run(name, seed=seeds, steps=6, eta=None if name in WITHOUT_ETA else 0.8)
    assert both.seed == tuple(seeds)
    for b, seed in enumerate(seeds):
        options = dict(seed=seed, steps=6, eta=None if name in WITHOUT_ETA else 0.8)
        alone = run(name, slice(b, b + 1), **options)
        assert torch.allclose(both.x[b : b + 1], alone.x, atol=1e-12)
        if both.log_weights is not None:
            assert torch.allclose(both.log_weights[b : b + 1], alone.log_weights, atol=1e-9)


@ALL
def test_first_sample_draws_one_of_many_alone(name):
    both = run(name, steps=6)
    alone = run(name, slice(1, 2), steps=6, first_sample=1)
    assert torch.allclose(both.x[1:], alone.x, atol=1e-12)
    if both.log_weights is not None:
        assert torch.allclose(both.log_weights[1:], alone.log_weights, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "dps", "pnp", "pigdm", "daps", "latent"])
def test_samples_per_observation_are_those_of_repeated_observations(name):
    out = run(name, samples_per_observation=4, steps=5)
    assert out.x.shape == (2, 4, 3)
    prior = example().denoiser()
    repeated = Y.repeat_interleave(4, 0)
    guidance = {
        "plain": lambda v: None,
        "dps": fg.DPS,
        "pnp": fg.PnP,
        "pigdm": fg.PiGDM,
        "daps": fg.DAPS,
        "latent": lambda v: fg.LatentPnP(v, lambda z: z, iterations=2),
    }[name](gaussian_likelihood(repeated))
    flat = fg.sample(prior, (8, 3), guidance=guidance, steps=5, seed=3, dtype=torch.float64)
    assert torch.allclose(out.x.flatten(0, 1), flat.x, atol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seed=[1]), "seed: expected an integer, or 2 of them, got 1"),
        (dict(seed=[1, -1]), "seed: expected an integer in"),
        (dict(seed=1 << 64), "seed: expected an integer in"),
        (dict(seed=[1, 2], first_sample=1), "first_sample: expected 0 with a seed for each observation"),
        (dict(first_sample=-1), "first_sample: expected an integer >= 0"),
        (dict(samples_per_observation=0), "samples_per_observation: expected an integer >= 1"),
    ],
)
def test_seeds_and_counts_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run("plain", **options)


def test_particles_are_the_samples_of_a_particle_method():
    with pytest.raises(ValueError, match="samples_per_observation: expected None with TDS, whose particles"):
        run("tds", samples_per_observation=4)


# --- callbacks ------------------------------------------------------------------------------------------------


@ALL
def test_a_callback_that_returns_true_ends_the_run(name):
    states = []
    full = run(name, callback=states.append)
    assert len(states) == 12
    cut = run(name, callback=lambda progress: progress.step == 4)
    assert torch.equal(cut.x, states[4].x)
    if cut.log_weights is not None:
        assert torch.equal(cut.log_weights, states[4].log_weights) and len(cut.ess) == 6
    assert torch.equal(full.x, states[-1].x)


@pytest.mark.parametrize("true", [True, np.True_, torch.tensor(True), torch.tensor([True])])
def test_what_ends_a_run_is_a_true_bool(true):
    answers = [None, False, np.False_, torch.tensor(False), 1, "yes", torch.ones(3).bool(), true]
    out = run("plain", callback=lambda progress: answers[progress.step])
    assert len(out.times) == len(answers) + 1


def test_a_run_that_a_callback_ends_can_go_on(tmp_path):
    file = tmp_path / "run"
    full = run("tds")
    cut = run("tds", callback=lambda progress: progress.step == 4, checkpoint=file)
    assert file.exists() and len(cut.times) == 6
    steps = []
    resumed = run("tds", callback=lambda progress: steps.append(progress.step), checkpoint=file)
    assert steps == list(range(5, 12)) and not file.exists()
    assert_same(resumed, full)


@ALL
def test_a_callback_sees_predictions_rewards_and_ancestors(name):
    states = []
    run(name, callback=states.append, keep_ancestors=name in WEIGHTED)
    truth = example()
    for before, after in pairwise(states):
        assert after.x0_hat.shape == after.x.shape
        # TDS and FK predict at the state itself, the others before the step
        seen = after if name in WEIGHTED else before
        if seen.level.sigma > 0:
            x = seen.x.reshape(-1, 3)
            expected = truth(x, torch.full((len(x),), seen.level.t, dtype=torch.float64))
            torch.testing.assert_close(after.x0_hat.reshape(-1, 3), expected, rtol=1e-9, atol=1e-9)
    if name.startswith("fk"):
        assert states[3].reward.shape == states[3].log_weights.shape
    if name in WEIGHTED:
        assert states[3].ancestors.shape == states[3].log_weights.shape


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("eta", lambda v: run("plain", eta=v)),
        ("zeta", lambda v: run("plain", guidance=fg.DPS(gaussian_likelihood(), zeta=v))),
        ("zeta", lambda v: run("plain", guidance=fg.PiGDM(gaussian_likelihood(), zeta=v))),
        ("zeta", lambda v: run("plain", guidance=fg.PnP(gaussian_likelihood(), zeta=v), eta=None)),
        ("rho", lambda v: run("plain", guidance=fg.PnP(gaussian_likelihood(), rho=v), eta=None)),
        (
            "rho",
            lambda v: run("plain", guidance=fg.LatentPnP(gaussian_likelihood(), lambda z: z, rho=v, zeta=v), eta=None),
        ),
        ("strength", lambda v: run("plain", guidance=fg.FK(gaussian_likelihood(), 8, strength=v))),
        ("guidance_scale", lambda v: guided_by_two_networks(v)),
    ],
)
def test_a_schedule_may_be_a_table_of_any_kind(name, draw):
    table = [0.2 + 0.05 * i for i in range(12)]
    expected = draw(table)
    tensors = [] if name == "guidance_scale" else [torch.tensor(table, dtype=torch.float64)]  # there it means [B]
    for same in (tuple(table), np.array(table), *tensors):
        assert_same(draw(same), expected)
    expected = draw(0.5)
    for same in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        assert_same(draw(same), expected)
    assert_same(draw(np.full(12, 0.5)), expected)
    if name != "guidance_scale":
        with pytest.raises(ValueError, match=f"^{name}: expected a table of 12 steps, got 3 entries"):
            draw(np.full(3, 0.5))
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
        draw(np.array("score?"))


def guided_by_two_networks(scale) -> fg.Samples:
    prior = example()
    denoiser = fg.Denoiser(
        prior, prior.schedule, "sample", unconditional=lambda x, t: 0.5 * prior(x, t), guidance_scale=scale
    )
    return fg.sample(denoiser, (2, 3), steps=12, seed=3, dtype=torch.float64)
