"""Which checkpoints a run continues from, and which it refuses."""

import functools
import math

import pytest
import torch
from gaussian import Y, example, gaussian_likelihood

import fastguide as fg
from fastguide import checkpoints

STEPS = 8


def draw(path, *, guidance=None, prior=None, stop=None, **options):
    """A run with 2 observations. With ``stop`` it is killed after that step."""

    def kill(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    prior = example().denoiser() if prior is None else prior
    options = {"steps": STEPS, "seed": 3, "checkpoint": path, "checkpoint_every": 3, **options}
    return fg.sample(prior, (2, 3), guidance=guidance, callback=kill, **options)


def interrupt(path, **options):
    with pytest.raises(KeyboardInterrupt):
        draw(path, stop=5, **options)
    assert path.exists()


def is_refused(path, words, **options):
    with pytest.raises(ValueError, match=rf"checkpoint: expected a file of this very run, got \S*run.pt .*{words}"):
        draw(path, **options)
    return path.exists()  # and the file is kept


def reward(x0, s=1.0):
    return s * x0[:, 0]


def potential(s):
    return lambda new, old: s * (new if old is None else new - old)


def proposal(shift):
    def propose(x, x0_hat, coefficients, *, seed, step, **_):
        x_s = fg.ops.reverse_step(x, x0_hat + shift, coefficients, prediction="sample", seed=seed, step=step)
        return x_s, torch.zeros(len(x), dtype=torch.float64)

    return propose


def callable_likelihood(factor):
    return fg.likelihoods.Callable(lambda x0, y: -factor * (x0[:, :1] - y).square().sum(1), y=torch.zeros(2, 1))


def function_likelihood(factor, scale=0.5):
    operator = fg.operators.Function(lambda x: factor * x[:, :2])
    return fg.likelihoods.Gaussian(torch.zeros(2, 2), operator, scale)


def pseudo_inverse_likelihood(factor):
    def lift(y):
        return torch.nn.functional.pad(factor * y, (0, 1))

    operator = fg.operators.Function(lambda x: x[:, :2], pseudo_inverse=lift)
    return fg.likelihoods.Gaussian(torch.zeros(2, 2), operator, 0.0)


def latent(factor, **options):
    likelihood = fg.likelihoods.Gaussian(torch.zeros(2, 3), fg.operators.Identity(), 0.5)
    return fg.LatentPnP(likelihood, lambda z: factor * z, **options)


def network(factor):
    return fg.Denoiser(lambda x, t: factor * x, fg.schedules.vp_linear(100))


# For every function that a run takes, two runs that differ only in this function.
PAIRS = {
    "reward": (dict(guidance=fg.FK(lambda x: x[:, 0], 16)), dict(guidance=fg.FK(lambda x: -x[:, 0], 16))),
    "reward at some steps": (
        dict(guidance=fg.FK(lambda x: x[:, 0], 16, resample_steps=3)),
        dict(guidance=fg.FK(lambda x: -x[:, 0], 16, resample_steps=3)),
    ),
    "partial": (
        dict(guidance=fg.FK(functools.partial(reward, s=1), 16)),
        dict(guidance=fg.FK(functools.partial(reward, s=-1), 16)),
    ),
    "scale": (
        dict(guidance=fg.DPS(gaussian_likelihood(scale=lambda t: 0.2))),
        dict(guidance=fg.DPS(gaussian_likelihood(scale=lambda t: 2.0))),
    ),
    "scale, a little": (
        dict(guidance=fg.TDS(gaussian_likelihood(scale=lambda t: 0.2), 16)),
        dict(guidance=fg.TDS(gaussian_likelihood(scale=lambda t: 0.2 + (t < 1) * 1e-6), 16)),
    ),
    "operator": (
        dict(guidance=fg.DPS(function_likelihood(1.0), zeta=1e-6)),
        dict(guidance=fg.DPS(function_likelihood(2.0), zeta=1e-6)),
    ),
    "zeta": (
        dict(guidance=fg.DPS(gaussian_likelihood(), zeta=lambda t: 0.1)),
        dict(guidance=fg.DPS(gaussian_likelihood(), zeta=lambda t: 0.2)),
    ),
    "weights of rewards": (
        dict(guidance=fg.FK([(1.0, reward), (0.5, lambda x: x[:, 1])], 16)),
        dict(guidance=fg.FK([(1.0, reward), (0.6, lambda x: x[:, 1])], 16)),
    ),
    "one of several rewards": (
        dict(guidance=fg.FK([(1.0, reward), (0.5, lambda x: x[:, 1])], 16)),
        dict(guidance=fg.FK([(1.0, reward), (0.5, lambda x: x[:, 2])], 16)),
    ),
    "reward of the time": (
        dict(guidance=fg.FK(lambda x, t: x[:, 0] * t, 16)),
        dict(guidance=fg.FK(lambda x, t: x[:, 0] * (1 - t), 16)),
    ),
    "strength": (
        dict(guidance=fg.FK(reward, 16, strength=lambda t: 1.0 + t)),
        dict(guidance=fg.FK(reward, 16, strength=lambda t: 1.0 + 1.1 * t)),
    ),
    "potential at some steps": (
        dict(guidance=fg.FK(reward, 16, potential=potential(1.0), resample_steps=[3, 6])),
        dict(guidance=fg.FK(reward, 16, potential=potential(2.0), resample_steps=[3, 6])),
    ),
    "proposal at some steps": (
        dict(guidance=fg.FK(reward, 16, proposal=proposal(0.0), resample_steps=[3, 6])),
        dict(guidance=fg.FK(reward, 16, proposal=proposal(0.3), resample_steps=[3, 6])),
    ),
    "potential": (
        dict(guidance=fg.FK(reward, 16, potential=potential(1.0))),
        dict(guidance=fg.FK(reward, 16, potential=potential(2.0))),
    ),
    "proposal": (
        dict(guidance=fg.FK(reward, 16, proposal=proposal(0.0))),
        dict(guidance=fg.FK(reward, 16, proposal=proposal(0.3))),
    ),
    "likelihood": (
        dict(guidance=fg.DPS(callable_likelihood(1.0), normalize=False)),
        dict(guidance=fg.DPS(callable_likelihood(1.1), normalize=False)),
    ),
    "reward that is a likelihood": (
        dict(guidance=fg.FK(callable_likelihood(1.0), 16)),
        dict(guidance=fg.FK(callable_likelihood(1.1), 16)),
    ),
    "pseudo-inverse": (
        dict(guidance=fg.PiGDM(pseudo_inverse_likelihood(1.0))),
        dict(guidance=fg.PiGDM(pseudo_inverse_likelihood(0.9))),
    ),
    "decoder": (dict(guidance=latent(1.0)), dict(guidance=latent(1.5))),
    "encoder": (
        dict(guidance=latent(1.0, encoder=lambda x: x, space="pixel")),
        dict(guidance=latent(1.0, encoder=lambda x: 0.9 * x, space="pixel")),
    ),
    "guidance scale": tuple(
        dict(
            prior=fg.Denoiser(
                lambda x, t: 0.1 * x,
                fg.schedules.vp_linear(100),
                unconditional=lambda x, t: 0.2 * x,
                guidance_scale=scale,
            )
        )
        for scale in (lambda t: 1.0 + t / 1e3, lambda t: 1.0 + t / 2e3)
    ),
    "seeds": (dict(seed=[1, 2], guidance=fg.DPS(gaussian_likelihood())), dict(seed=[1, 3])),
    "reward with seeds": (
        dict(seed=[1, 2], guidance=fg.FK(lambda x: x[:, 0], 16)),
        dict(seed=[1, 2], guidance=fg.FK(lambda x: -x[:, 0], 16)),
    ),
    "samples per observation": (
        dict(samples_per_observation=4, guidance=fg.DPS(function_likelihood(1.0))),
        dict(samples_per_observation=4, guidance=fg.DPS(function_likelihood(1.2))),
    ),
    "network": (dict(prior=network(0.1)), dict(prior=network(0.2))),
    "network of a guided run": (
        dict(prior=network(0.1), guidance=fg.FK(reward, 16)),
        dict(prior=network(0.11), guidance=fg.FK(reward, 16)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_of_one_name_that_do_other_things_are_told_apart(name, tmp_path):
    path = tmp_path / "run.pt"
    options, other = PAIRS[name]
    interrupt(path, **options)
    words = "whose network gave other results" if "network" in name else ""
    assert is_refused(path, words, **other)
    whole, resumed = draw(tmp_path / "other.pt", **options), draw(path, **options)
    assert torch.equal(whole.x, resumed.x)


def test_views_of_conjugate_and_negative_tensors_are_read(tmp_path):
    """Their values count, not their memory."""
    path, mixed = tmp_path / "run.pt", torch.complex(torch.eye(3), 0.1 * torch.ones(3, 3))

    def guidance(matrix):
        operator = fg.operators.Matrix(matrix)
        return fg.PnP(fg.likelihoods.Gaussian(torch.ones(1, 3, dtype=matrix.dtype), operator, 0.5))

    interrupt(path, guidance=guidance(mixed.conj()))
    assert is_refused(path, "likelihood", guidance=guidance(mixed))
    whole = draw(tmp_path / "other.pt", guidance=guidance(mixed.conj()))
    assert torch.equal(whole.x, draw(path, guidance=guidance(mixed.conj().resolve_conj())).x)
    negative = mixed.conj().imag  # a negative view
    assert negative.is_neg()
    interrupt(path, guidance=guidance(negative - torch.eye(3)))
    assert is_refused(path, "likelihood", guidance=guidance(negative))


def test_the_samples_are_those_of_a_run_without_a_checkpoint(tmp_path):
    """The trial calls restore torch's generator, so a network that draws from it draws the same numbers."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    prior = fg.Denoiser(lambda x, t: net(x), fg.schedules.vp_linear(100))
    torch.manual_seed(0)
    expected = draw(None, prior=prior).x
    torch.manual_seed(0)
    assert torch.equal(draw(tmp_path / "run.pt", prior=prior).x, expected)


def test_a_random_network_goes_on_from_its_own_checkpoint(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    prior = fg.Denoiser(lambda x, t: net(x), fg.schedules.vp_linear(100))
    path = tmp_path / "run.pt"
    guidance = fg.FK(lambda x: x[:, 0] + torch.rand(len(x)), 16)
    interrupt(path, prior=prior, guidance=guidance)
    torch.manual_seed(5)
    assert torch.isfinite(draw(path, prior=prior, guidance=guidance).x).all()
    assert not path.exists()


def test_rounding_refuses_nothing(tmp_path):
    """Another number of threads changes the last digits of a network and of a reward."""

    def options(rounding):
        net = lambda x, t: 0.1 * x * (1 + rounding)  # noqa: E731
        prior = fg.Denoiser(net, fg.schedules.vp_linear(100))
        return dict(prior=prior, guidance=fg.FK(lambda x: x[:, 0] * (1 + rounding), 16))

    path = tmp_path / "run.pt"
    interrupt(path, **options(0.0))
    draw(path, **options(3e-6))


def test_a_function_that_fails_in_a_trial_goes_by_its_name(tmp_path):
    """A reward that needs all 16 particles at once fails in a trial. A function of the same name is accepted, and one
    of another name is not."""

    def make(factor):
        def reward_of_all(x0):
            return factor * x0.reshape(2, 16, 3)[:, :, 0].flatten()

        return fg.FK(reward_of_all, 16)

    path = tmp_path / "run.pt"
    interrupt(path, guidance=make(1.0))
    assert is_refused(path, "of another reward$", guidance=fg.FK(lambda x: x[:, 0], 16))
    draw(path, guidance=make(2.0))


def test_the_run_id_tells_the_rest_apart(tmp_path):
    path = tmp_path / "run.pt"

    def step(x0):  # the same on any small x0
        return (x0[:, 0] > 100).float()

    interrupt(path, guidance=fg.FK(step, 16), run_id="digits, 7")
    for other in ("digits, 8", None):
        assert is_refused(path, "of another run_id$", guidance=fg.FK(step, 16), run_id=other)
    draw(path, guidance=fg.FK(step, 16), run_id="digits, 7")
    with pytest.raises(TypeError, match="run_id: expected a string or None, got int"):
        draw(path, run_id=7)
    with pytest.raises(ValueError, match="run_id: expected None without a checkpoint, got 'a'"):
        draw(None, run_id="a")


def test_the_trials_are_run_once_for_a_run(tmp_path):
    """There are two calls of the network with one sample, and two small trials of the reward, however often the state
    is saved."""
    sizes = {"net": [], "reward": []}

    def net(x, t):
        sizes["net"].append(len(x))
        return 0.1 * x

    def counted(x0):
        sizes["reward"].append(len(x0))
        return x0[:, 0]

    prior = fg.Denoiser(net, fg.schedules.vp_linear(100))
    draw(tmp_path / "run.pt", prior=prior, guidance=fg.FK(counted, 16), checkpoint_every=1)
    assert [n for n in sizes["net"] if n != 32] == [1, 1]
    assert sum(n == 2 for n in sizes["reward"]) <= 6


@pytest.mark.parametrize("seed", [2**63 + 5, [2**64 - 1, 7]])
def test_the_seed_is_kept(seed, tmp_path):
    path = tmp_path / "run.pt"
    assert checkpoints.saved_seed(path) is None
    interrupt(path, seed=seed)
    assert checkpoints.saved_seed(path) == (seed if isinstance(seed, int) else tuple(seed))
    assert torch.equal(draw(path, seed=seed).x, draw(None, seed=seed).x)


def test_a_run_without_a_seed_goes_on_with_that_of_its_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    interrupt(path, seed=None)
    seed = checkpoints.saved_seed(path)
    torch.manual_seed(99)
    resumed = draw(path, seed=None)
    assert resumed.seed == seed and torch.equal(resumed.x, draw(None, seed=seed).x)


@pytest.mark.parametrize("values", [[0.0] * 6, [math.nan, 1.0, math.inf, -math.inf, -math.inf, 2.0]])
def test_trials_are_summed_up_with_what_is_not_finite(values):
    x = torch.tensor(values)
    numbers = checkpoints._sum_up(x)
    finite = x[x.isfinite()].double()
    counts = [6, x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum()]
    assert numbers[:4] == counts and all(map(math.isfinite, numbers))
    assert numbers[4] == pytest.approx(float((finite.square().sum() / 6).sqrt()))
    assert checkpoints._match(numbers, checkpoints._sum_up(x.clone()), 1e-9)
    x[1] += 0.01
    assert not checkpoints._match(numbers, checkpoints._sum_up(x), 1e-4)


def test_one_number_that_changes_among_many_is_seen():
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    numbers = checkpoints._sum_up(x)
    assert checkpoints._match(numbers, checkpoints._sum_up(x * (1 + 1e-5)), 1e-3)
    x[0, 5, 5] += 1.0
    assert not checkpoints._match(numbers, checkpoints._sum_up(x), 1e-3)


def test_y_of_another_observation_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    interrupt(path, guidance=fg.DPS(gaussian_likelihood(Y)))
    assert is_refused(path, "of another likelihood$", guidance=fg.DPS(gaussian_likelihood(Y + 1e-3)))


# Every method, and for FK each kind of potential and proposal, because each has another state.
@pytest.mark.parametrize(
    "guidance",
    [
        None,
        fg.DPS(gaussian_likelihood()),
        fg.PnP(gaussian_likelihood()),
        fg.PiGDM(gaussian_likelihood()),
        fg.DAPS(gaussian_likelihood()),
        fg.DAPS(gaussian_likelihood(), solver="langevin", iterations=2),
        latent(1.0),
        fg.TDS(gaussian_likelihood(), 16),
        fg.FK(reward, 16),
        fg.FK(gaussian_likelihood(), 16, proposal="guided", potential="max"),
        fg.FK(reward, 16, potential="sum", resample_steps=3, ess_threshold=None),
    ],
    ids=lambda guidance: type(guidance).__name__,
)
@pytest.mark.parametrize("seed", [3, [1, 2]], ids=["one seed", "seeds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trials_of_our_own_methods_give_numbers(guidance, seed, dtype, tmp_path):
    path = tmp_path / "run.pt"
    net = fg.Conditional(lambda x, t, label: 0.1 * label[:, None] * x, label=torch.tensor([1.0, 2.0]))
    prior = fg.Denoiser(net, fg.schedules.vp_linear(100))
    interrupt(path, guidance=guidance, seed=seed, dtype=dtype, prior=prior)
    trials = torch.load(path, weights_only=True)["trials"]
    values = [v for trial in trials.values() for v in trial.values()]
    assert len(values) >= (3 if guidance is None else 5) and not any(isinstance(v, str) for v in values)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("content", [{"state": torch.zeros(3)}, [1, 2], b"no file of torch", b""])
def test_a_file_of_something_else_is_refused(content, seed, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"checkpoint: expected a file of fastguide.sample, got \S*run.pt"):
        draw(path, seed=seed)
    assert path.exists()


@pytest.mark.parametrize(
    "words, other",
    [
        ("seed", dict(seed=4)),
        ("seed", dict(seed=[3, 4])),
        ("dtype", dict(dtype=torch.float64)),
        ("steps", dict(steps=7, guidance=fg.FK(reward, 16, strength=lambda t: 1.0 + t, resample_steps=2))),
        ("steps", dict(spacing="logsnr")),
        ("steps, seed", dict(seed=4, steps=9)),
        ("eta", dict(eta=0.5)),
        ("clip", dict(clip=1.0)),
        ("first_sample", dict(first_sample=5)),
        ("keep_ancestors", dict(keep_ancestors=True)),
        ("run_id", dict(run_id="a")),
        ("x_T", dict(x_T=torch.zeros(2, 16, 3))),
        ("particles", dict(guidance=fg.FK(reward, 8, strength=lambda t: 1.0 + t, resample_steps=2))),
        ("strength", dict(guidance=fg.FK(reward, 16, strength=lambda t: 2.0 + t, resample_steps=2))),
        ("guidance", dict(guidance=fg.TDS(gaussian_likelihood(), 16))),
        ("guidance, samples_per_observation", dict(guidance=None, samples_per_observation=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_the_arguments_that_differ_and_no_others(words, other, tmp_path):
    """With another ``steps``, a network that depends on the time and tables that depend on the steps are not named."""
    path = tmp_path / "run.pt"
    prior = fg.Denoiser(lambda x, t: 0.1 * x * (t[0] / 100 + 0.5), fg.schedules.vp_linear(100))
    guidance = fg.FK(reward, 16, strength=lambda t: 1.0 + t, resample_steps=2)
    interrupt(path, prior=prior, guidance=guidance)
    assert is_refused(path, f"of another {words}$", **{"prior": prior, "guidance": guidance, **other})


def test_a_refusal_names_the_fields_of_a_latent_method(tmp_path):
    path = tmp_path / "run.pt"
    interrupt(path, guidance=latent(1.0, rho=lambda t: 1.0 + t))
    assert is_refused(path, "of another rho$", guidance=latent(1.0, rho=lambda t: 2.0 + t))
    assert is_refused(path, "of another rho, zeta$", guidance=latent(1.0, rho=3.0, zeta=0.1))


@pytest.mark.parametrize(
    "guidance", [None, fg.FK(reward, 16), fg.TDS(gaussian_likelihood(), 16)], ids=("none", "FK", "TDS")
)
def test_a_run_goes_on_with_smaller_chunks(guidance, tmp_path):
    """For example after a run that was out of memory."""
    path = tmp_path / "run.pt"
    interrupt(path, guidance=guidance)
    resumed = draw(path, guidance=guidance, chunk_size=5)
    assert torch.allclose(resumed.x, draw(None, guidance=guidance).x, atol=1e-5)


@pytest.mark.parametrize("name", ["no folder/run.pt", "."])
def test_a_file_that_cannot_be_written_is_refused_before_the_first_step(name, tmp_path):
    calls = []
    prior = fg.Denoiser(lambda x, t: calls.append(t) or 0.1 * x, fg.schedules.vp_linear(100))
    with pytest.raises(ValueError, match=r"checkpoint: expected a file in a folder that can be written to, got \S"):
        draw(tmp_path / name, prior=prior)
    assert not calls
