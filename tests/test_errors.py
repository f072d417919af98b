"""Errors of `fastguide.sample` for wrong arguments: the name, what was expected and what was passed."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import fastguide
from fastguide import DAPS, DPS, FK, TDS, Denoiser, LatentPnP, PiGDM, PnP, schedules
from fastguide.likelihoods import Callable, Gaussian, Laplace, Poisson, StudentT
from fastguide.operators import AveragePool, Function, Identity, Matrix

SCHEDULE = schedules.vp_cosine(20)
STEPS = 4


def net(x, t):
    return 0.1 * x


PRIOR = Denoiser(net, SCHEDULE, "v")
Y = torch.zeros(1, 3)
LIKELIHOOD = Gaussian(Y, Identity(), 1.0)
EXP = Function(torch.exp)


def reward(x0):
    return x0.sum(1)


def sample(prior=PRIOR, shape=(2, 3), steps=STEPS, seed=0, **options):
    return fastguide.sample(prior, shape, steps=steps, seed=seed, **options)


def check(error, message, **options):
    with pytest.raises(error, match=message):
        sample(**options)


# --- arguments of sample ------------------------------------------------------------------------------------


# Each argument just outside its range, not finite or of another type; arguments that exclude each other.
@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "prior: expected a fastguide.Denoiser, got function", dict(prior=net)),
        (ValueError, r"shape: expected \(B, \*event\), got \(2,\)", dict(shape=(2,))),
        (ValueError, "shape: expected an integer >= 1, got 0", dict(shape=(0, 3))),
        (ValueError, "shape: .*got 3.0", dict(shape=(2, 3.0))),
        (ValueError, "shape: .*got True", dict(shape=(True, 3))),
        (TypeError, "dtype: expected one of float32, .*float64, got torch.int32", dict(dtype=torch.int32)),
        (TypeError, "dtype: .*got torch.complex64", dict(dtype=torch.complex64)),
        (TypeError, "dtype: .*got 'float32'", dict(dtype="float32")),
        (ValueError, r"seed: expected an integer in \[0, .*\], got -1", dict(seed=-1)),
        (ValueError, f"seed: .*got {1 << 64}", dict(seed=1 << 64)),
        (ValueError, "seed: .*got 1.5", dict(seed=1.5)),
        (ValueError, "seed: .*got True", dict(seed=True)),
        (ValueError, "chunk_size: expected an integer >= 1, got 0", dict(chunk_size=0)),
        (ValueError, "chunk_size: .*got True", dict(chunk_size=True)),
        (ValueError, "steps: expected an integer >= 1 or a sequence of times, got 0", dict(steps=0)),
        (ValueError, r"steps: expected at most 20 for vp_cosine\(20\), got 21", dict(steps=21)),
        (ValueError, "steps: .*strictly decreasing", dict(steps=[3, 10])),
        (ValueError, "spacing: expected one of .*'logsnr'.*got 'log'", dict(spacing="log")),
        (ValueError, r"eta: expected finite values in \[0, 1\], got 1.5 at t = 19", dict(eta=1.5)),
        (ValueError, r"eta: expected finite values in \[0, 1\], got -0.1", dict(eta=-0.1)),
        (ValueError, "eta: .*got nan", dict(eta=math.nan)),
        (ValueError, "eta: .*got 2.0 at t = 13", dict(eta=[0.0, 2.0, 0.0, 0.0])),
        (ValueError, "eta: expected a table of 4 steps, got 2 entries", dict(eta=[1.0, 0.5])),
        (ValueError, "eta: .*got 19.0 at t = 19", dict(eta=lambda t: t)),
        (ValueError, "clip: expected a number > 0, .*got -1.0", dict(clip=-1.0)),
        (ValueError, r"clip: .*low < high.*got \(1.0, -1.0\)", dict(clip=(1.0, -1.0))),
        (ValueError, "clip: .*got nan", dict(clip=math.nan)),
        (
            ValueError,
            "clip: expected 0 <= ratio <= 1 and max_value >= 1",
            dict(clip=fastguide.ops.DynamicThreshold(ratio=1.5)),
        ),
        (ValueError, r"x_T: expected shape \[2, 3\], got \[3, 2\]", dict(x_T=torch.zeros(3, 2))),
        (ValueError, "x_T: expected finite values", dict(x_T=torch.full((2, 3), math.nan))),
        (
            ValueError,
            r"x_T: expected shape \[2, 5, 3\], got \[2, 3\]",
            dict(x_T=torch.zeros(2, 3), guidance=TDS(LIKELIHOOD, 5)),
        ),
        (TypeError, "guidance: expected a DPS, .*or None, got Gaussian", dict(guidance=LIKELIHOOD)),
        (TypeError, "guidance: .*got str", dict(guidance="TDS")),
        (
            ValueError,
            r"keep_ancestors: expected False without particles \(TDS, FK\)",
            dict(keep_ancestors=True),
        ),
        (ValueError, "checkpoint_every: expected an integer >= 1, got 0", dict(checkpoint_every=0)),
        (
            ValueError,
            r"y: expected 1 row, since shape \(B, \*event\) says B = 1 and event \[2, 3\], got 2",
            dict(shape=(1, 2, 3), guidance=DPS(Gaussian(torch.zeros(2, 3), Identity(), 1.0))),
        ),
        (
            ValueError,
            r"samples_per_observation: expected None with TDS, .*, got 4; out.draw\(n\) gives n",
            dict(samples_per_observation=4, guidance=TDS(LIKELIHOOD, 5)),
        ),
        (
            ValueError,
            "proposal: a custom proposal cannot be used with a list of seeds or first_sample > 0, got first_sample=3",
            dict(first_sample=3, guidance=FK(reward, 2, proposal=lambda x, x0, c, *, seed, step: (x, x[:, 0]))),
        ),
    ],
)
def test_arguments_of_sample(error, message, options):
    check(error, message, **options)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"^device: expected a torch.device or the name of one, got 'bogus': "):
        sample(device="bogus")


def test_a_prediction_that_says_nothing_without_signal():
    check(
        ValueError,
        r"prediction: 'epsilon' does not determine x_0 where alpha = 0 \(t = 1.0 of flow.*expected 'sample'",
        prior=Denoiser(net, schedules.flow(), "epsilon"),
    )


def test_samples_without_weights():
    out = sample()
    for use in (out.mean, out.variance, lambda: out.weights, lambda: out.draw(3)):
        with pytest.raises(
            ValueError, match=r"expected several samples of each observation, got one.*samples_per_observation=n"
        ):
            use()
    with pytest.raises(ValueError, match=r"num: expected an integer in \[1, 2\^31\), got 0"):
        sample(guidance=TDS(LIKELIHOOD, 2)).draw(0)


# --- the network --------------------------------------------------------------------------------------------

GUIDANCES = {
    "none": None,
    "DPS": DPS(LIKELIHOOD),
    "PnP": PnP(LIKELIHOOD),
    "PiGDM": PiGDM(LIKELIHOOD),
    "DAPS": DAPS(LIKELIHOOD),
    "TDS": TDS(LIKELIHOOD, 2),
    "FK": FK(reward, 2),
}
every_guidance = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES.keys())


@every_guidance
@pytest.mark.parametrize(
    "network, error, message",
    [
        (
            lambda x, t: x[:, :2],
            ValueError,
            r"net: expected it to return .*\[\d, 3\] on cpu, got .*\[\d, 2\]",
        ),
        (lambda x, t: {"x": x}, TypeError, "net: expected it to return a tensor, an object with .sample.*got dict"),
        (lambda x, t: x > 0, ValueError, "net: expected it to return a floating tensor.*got torch.bool"),
    ],
)
def test_a_network_that_returns_something_else(guidance, network, error, message):
    check(error, message, prior=Denoiser(network, SCHEDULE, "v"), guidance=guidance)


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
@pytest.mark.parametrize(
    "guidance",
    [DPS(LIKELIHOOD), PiGDM(LIKELIHOOD), TDS(LIKELIHOOD, 2), FK(reward, 2, proposal="guided", covariance="point")],
    ids=lambda guidance: type(guidance).__name__,
)
def test_a_network_without_a_graph_under_guidance(guidance, prediction):
    prior = Denoiser(lambda x, t: net(x, t).detach(), SCHEDULE, prediction)
    check(ValueError, "net: expected a network that autograd can differentiate", prior=prior, guidance=guidance)


@pytest.mark.parametrize("guidance", [None, PnP(LIKELIHOOD), DAPS(LIKELIHOOD), FK(reward, 2)])
def test_a_network_without_a_graph_serves_what_needs_none(guidance):
    prior = Denoiser(lambda x, t: net(x, t).detach(), SCHEDULE, "v")
    assert torch.equal(sample(prior=prior, guidance=guidance).x, sample(guidance=guidance).x)


# --- likelihoods and operators in a run ---------------------------------------------------------------------

LIKELIHOOD_GUIDANCES = {
    "DPS": DPS,
    "PnP": PnP,
    "PiGDM": PiGDM,
    "DAPS": DAPS,
    "TDS": lambda likelihood: TDS(likelihood, 2),
    "FK": lambda likelihood: FK(likelihood, 2),
    "LatentPnP": lambda likelihood: LatentPnP(likelihood, decoder=lambda z: z),
}


# y, operator, scale and the error message.
UNFIT = [
    (
        torch.zeros(5, 3),
        Identity(),
        1.0,
        r"y: expected 1 row or 2, since shape \(B, \*event\) says B = 2 and event \[3\], got 5",
    ),
    (torch.zeros(2, 4), Identity(), 1.0, r"y: expected shape \[B, 3\], what .*\[3\], got \[2, 4\]"),
    (torch.zeros(2, 1, 3), Identity(), 1.0, r"y: expected shape \[B, 3\], .*got \[2, 1, 3\]"),
    (
        torch.zeros(2, 4),
        Matrix(torch.ones(4, 7)),
        1.0,
        r"matrix: expected events of shape \[7\], got \[3\]",
    ),
    (torch.zeros(2, 4), AveragePool(2), 1.0, r"factor: expected a divisor .*\[2, 3\], got 2"),
    (Y, Identity(), lambda t: -1.0, r"scale\(19\): expected a finite number >= 0, got -1.0"),
]


# All take their likelihood in the same way, except LatentPnP, which puts its decoder before the operator.
@pytest.mark.parametrize(
    ("name", "unfit"),
    [
        *itertools.product(("DPS", "LatentPnP"), UNFIT),
        *itertools.product(("PnP", "PiGDM", "DAPS", "TDS", "FK"), UNFIT[:1]),
    ],
)
def test_observations_and_operators(name, unfit):
    y, operator, scale, message = unfit
    check(ValueError, message, guidance=LIKELIHOOD_GUIDANCES[name](Gaussian(y, operator, scale)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_y(bad):
    y = torch.zeros(2, 3)
    y[1, 2] = bad
    for make in (Gaussian, Laplace):
        with pytest.raises(ValueError, match="y: expected finite values, got NaN or infinity in row 1"):
            make(y, Identity(), 1.0)


@pytest.mark.parametrize(
    "message, guidance",
    [
        ("scale: expected > 0 where a density is needed, got 0", DPS(Gaussian(Y, Identity(), 0.0))),
        ("scale: expected > 0", TDS(Gaussian(Y, Identity(), 0.0), 2)),
        ("scale: expected > 0", PnP(Gaussian(Y, Identity(), 0.0), solver="cg")),
        (
            r"operator: expected one that autograd can differentiate, got Function\(round_detached\)",
            DPS(Gaussian(Y, Function(lambda x: x.detach().round()), 1.0)),
        ),
        ("pseudo_inverse: expected Function.*got none", PiGDM(Gaussian(Y, EXP, 0.0))),
        (
            "likelihood: with scale > 0 expected a linear operator",
            PiGDM(Gaussian(Y, EXP, 1.0)),
        ),
        ("likelihood: expected a Gaussian for PiGDM, got Laplace", PiGDM(Laplace(Y, Identity(), 1.0))),
        (
            "covariance: .*'moment' needs a linear operator",
            DPS(Gaussian(Y, EXP, 1.0), covariance="moment"),
        ),
        (
            "covariance: Poisson supports only covariance='point'. Pass it explicitly; it can diverge where",
            TDS(Poisson(Y, Identity()), 2),
        ),
        ("covariance: Callable supports only covariance='point'", FK(Callable(reward), 2, proposal="guided")),
        ("covariance: Callable supports only", DPS(Callable(reward), "score", normalize=False)),
        ("covariance: .*not defined for Poisson", DPS(Poisson(Y, Identity()), covariance="moment")),
        ("covariance: .*not defined for a callable", TDS(Callable(reward), 2, covariance="isotropic")),
        (
            "covariance: .*up to 16 measurements, and there are 20",
            TDS(Gaussian(torch.zeros(1, 20), Matrix(torch.ones(20, 3)), 1.0), 2, covariance="moment"),
        ),
        (
            r"f: expected it to return log-densities of shape \[4\], got \[4, 3\]",
            TDS(Callable(lambda x: x), 2, covariance="point"),
        ),
        (
            "f: expected a function that autograd can differentiate",
            DPS(Callable(lambda x: x.detach().sum(1))),
        ),
    ],
)
def test_likelihoods_that_a_method_cannot_serve(message, guidance):
    operator = getattr(guidance, "likelihood", LIKELIHOOD).operator
    if isinstance(operator, Function) and operator is not EXP:
        operator.f.__name__ = "round_detached"
    with pytest.raises((ValueError, TypeError), match=message):
        sample(guidance=guidance)


def test_heavy_tails_around_a_nonlinear_operator_are_served():
    for guidance in (
        DPS(StudentT(Y, EXP, 1.0, 3.0)),
        TDS(Laplace(Y, EXP, 1.0), 2),
        PnP(StudentT(Y, EXP, 1.0, 3.0)),
        DAPS(StudentT(Y, EXP, 1.0, 3.0)),
    ):
        assert torch.isfinite(sample(guidance=guidance).x).all()


# --- guidance objects ---------------------------------------------------------------------------------------


# Each argument just outside its range, not finite or of another type; arguments that exclude each other.
@pytest.mark.parametrize(
    "message, guidance",
    [
        (r"zeta: expected finite values in \[0, inf\], got -1.0 at t = 19", DPS(LIKELIHOOD, zeta=-1.0)),
        (
            "zeta: expected a number, a table, a function or 'score', got 'paper'",
            DPS(LIKELIHOOD, zeta="paper"),
        ),
        ("zeta: expected a table of 4 steps, got 1 entries", DPS(LIKELIHOOD, zeta=[1.0])),
        ("normalize: expected False with zeta='score'", DPS(LIKELIHOOD, zeta="score")),
        ("covariance: expected one of .*'moment'.*got 'full'", DPS(LIKELIHOOD, covariance="full")),
        ("zeta: .*got -0.5", PiGDM(LIKELIHOOD, zeta=-0.5)),
        (r"zeta: expected finite values in \[0, 1\], got 1.5 at t = 19", PnP(LIKELIHOOD, zeta=1.5)),
        ("covariance: expected one of .*, got ''", TDS(LIKELIHOOD, 2, covariance="")),
        (r"rho: expected values > 0 .*, got 0", PnP(LIKELIHOOD, rho=0.0)),
        (r"rho: expected finite values in \[0, inf\], got -1.0", PnP(LIKELIHOOD, rho=-1.0)),
        ("solver: expected one of .*'cg'.*got 'newton'", PnP(LIKELIHOOD, solver="newton")),
        (
            "solver: 'closed' needs a Gaussian likelihood and a linear operator.*, got Laplace",
            PnP(Laplace(Y, Identity(), 1.0), solver="closed"),
        ),
        ("solver: 'cg' needs a Gaussian.*linear", PnP(Gaussian(Y, EXP, 1.0), solver="cg")),
        ("solver: 'gauss-newton' needs an error model", PnP(Callable(reward), solver="gauss-newton")),
        ("iterations: expected an integer >= 1, got 0", PnP(LIKELIHOOD, solver="cg", iterations=0)),
        ("iterations: expected None with the closed form, got 5", PnP(LIKELIHOOD, iterations=5)),
        ("space: expected one of .*'pixel'.*got 'image'", LatentPnP(LIKELIHOOD, abs, space="image")),
        (
            "encoder: expected an encoder with space='pixel', got None",
            LatentPnP(LIKELIHOOD, abs, space="pixel"),
        ),
        ("encoder: expected None with space='latent'", LatentPnP(LIKELIHOOD, abs, encoder=abs)),
        (
            r"encoder: expected latents of shape \[3\], got \[2\]",
            LatentPnP(LIKELIHOOD, abs, encoder=lambda x: x[:, :2], space="pixel"),
        ),
        ("gamma: expected a finite number > 0, got 0.0", LatentPnP(LIKELIHOOD, abs, gamma=0.0)),
        ("particles: expected an integer >= 1, got 0", TDS(LIKELIHOOD, 0)),
        ("particles: .*got 2.5", TDS(LIKELIHOOD, 2.5)),
        ("particles: .*got True", FK(reward, True)),
        ("covariance: expected one of .*got 'full'", TDS(LIKELIHOOD, 2, covariance="full")),
        ("resampler: expected one of .*'residual'.*got 'best'", TDS(LIKELIHOOD, 2, resampler="best")),
        (r"ess_threshold: .*in \[0, 1\], got -0.1", TDS(LIKELIHOOD, 2, ess_threshold=-0.1)),
        ("ess_threshold: .*got 1.5", FK(reward, 2, ess_threshold=1.5)),
        ("ess_threshold: .*got nan", FK(reward, 2, ess_threshold=math.nan)),
        ("resampler: .*got 'best'", FK(reward, 2, resampler="best")),
        ("potential: expected one of .*'max'.*or a callable, got 'min'", FK(reward, 2, potential="min")),
        ("proposal: expected one of .*'guided'.*or a callable, got 'best'", FK(reward, 2, proposal="best")),
        ("strength: expected a number > 0 at the last step.*got 0.0", FK(reward, 2, strength=0.0)),
        ("strength: expected a number > 0 at the last step.*got 0.0", FK(reward, 2, strength=[1.0, 1.0, 1.0, 0.0])),
        ("strength: .*got inf", FK(reward, 2, strength=math.inf)),
        (r"strength: expected finite values in \[0, inf\], got -1.0", FK(reward, 2, strength=-1.0)),
        ("strength: expected a table of 4 steps, got 2 entries", FK(reward, 2, strength=[1.0, 1.0])),
        ("resample_steps: expected an integer >= 1, got 0", FK(reward, 2, resample_steps=0)),
        (r"resample_steps: expected an integer in \[0, 3\], got 4", FK(reward, 2, resample_steps=[1, 4])),
        (r"reward: expected a callable, a likelihood or pairs \(weight, callable\), got None", FK(None, 2)),
        (r"reward: expected pairs \(weight, callable\), got \(<function", FK([(reward, 1.0)], 2)),
        ("reward: expected weights that are finite numbers other than 0, got nan", FK([(math.nan, reward)], 2)),
        ("reward: expected weights that are finite numbers other than 0, got 0.0", FK([(0.0, reward)], 2)),
        ("covariance: expected 'point' with a reward that is no likelihood", FK(reward, 2, covariance="moment")),
    ],
)
def test_guidance_objects(message, guidance):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(guidance=guidance)


@pytest.mark.parametrize("make", [PnP, lambda likelihood: LatentPnP(likelihood, decoder=abs)])
def test_eta_where_zeta_splits_the_noise(make):
    check(
        ValueError,
        r"eta: expected None with (Latent)?PnP, whose zeta splits the noise, got 0.5",
        guidance=make(LIKELIHOOD),
        eta=0.5,
    )


@pytest.mark.parametrize("guidance", [TDS(LIKELIHOOD, 2), FK(reward, 2, proposal="guided", covariance="point")])
@pytest.mark.parametrize("eta", [0.0, [0.0] * STEPS, lambda t: 0.0])
def test_the_guided_proposal_needs_noise(guidance, eta):
    check(
        ValueError,
        "eta: expected > 0, since the weight of a guided proposal needs noise; got 0",
        guidance=guidance,
        eta=eta,
    )


# --- rewards, potentials, proposals -------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["base", "guided"])
@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x0: x0, r"reward: expected it to return a tensor of shape \[4\], got \[4, 3\]"),
        (lambda x0: x0.sum(), r"reward: .*shape \[4\], got \[\]"),
        (lambda x0: 3.0, r"reward: .*shape \[4\], got float"),
    ],
)
def test_a_reward_of_another_shape(bad, message, proposal):
    check(ValueError, message, guidance=FK(bad, 2, proposal=proposal, covariance="point"))


def test_a_reward_without_a_graph():
    guidance = FK(lambda x0: x0.detach().sum(1), 2, proposal="guided", covariance="point")
    check(
        ValueError,
        "reward: expected one that autograd can differentiate for the guided proposal",
        guidance=guidance,
    )


def test_potentials_and_proposals_of_another_shape():
    check(
        ValueError,
        r"potential: expected it to return a tensor of shape \[4\], got \[\]",
        guidance=FK(reward, 2, potential=lambda new, old: new.sum()),
    )
    check(
        ValueError,
        r"proposal: expected it to return a tensor of shape \[4\], got \[4, 3\]",
        guidance=FK(reward, 2, proposal=lambda x, x0, c, *, seed, step: (x, x)),
    )


def reward_of_one_row(value, from_call):
    """A reward of zero; for observation 1 it is ``value`` from call ``from_call`` on. One call is made at the start,
    one in each step."""
    calls = []

    def f(x0):
        calls.append(None)
        out = torch.zeros(x0.shape[0])
        if len(calls) > from_call:
            out[x0.shape[0] // 2 :] = value
        return out

    return f


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "from_call, when", [(0, "before step 0"), (2, "before step 2"), (STEPS, "after the last step")]
)
@pytest.mark.filterwarnings("ignore:reward. returned NaN")
def test_weights_that_are_lost_name_observation_and_step(value, from_call, when):
    """``-inf`` before the last step kills no particle: ``x_0`` may still meet the constraint."""
    guidance = FK(reward_of_one_row(value, from_call), 3)
    when = "after the last step" if value == -math.inf else when
    message = "log_weights: expected a finite largest weight, got none for observation 1"
    check(FloatingPointError, rf"{message} {when}: no particle is alive \(all weights are 0\)", guidance=guidance)


@pytest.mark.filterwarnings("ignore:reward. returned NaN")
def test_a_reward_of_nan_is_not_said_to_need_more_particles():
    message = r"no particle is alive \(all weights are 0\). The reward returned NaN, see the warning; expected numbers"
    check(FloatingPointError, message, guidance=FK(lambda x0: x0[:, 0] * math.nan, 3))
    check(FloatingPointError, "0\\). More particles may help", guidance=FK(reward_of_one_row(-math.inf, 0), 3))


@pytest.mark.parametrize("proposal, threshold", [("base", 0.0), ("guided", -6.0)])
def test_nan_and_minus_infinity_are_the_same_reward_of_x_0(proposal, threshold):
    outs = []
    for value in (math.nan, -math.inf):

        def f(x0, t, value=value):
            return torch.where(x0[:, 0] > threshold, value, x0.sum(1)) if t == SCHEDULE.clean else x0.sum(1)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if value != value else "error")
            warnings.filterwarnings("ignore", "ancestors:")
            outs.append(sample(guidance=FK(f, 40, proposal=proposal, covariance="point")))
    assert torch.equal(outs[0].x, outs[1].x) and torch.equal(outs[0].log_weights, outs[1].log_weights)
    dead = outs[0].log_weights == -math.inf
    assert torch.equal(dead, outs[0].x[..., 0] > threshold) and dead.any() and not dead.all()


@pytest.mark.parametrize("proposal", ["base", "guided"])
def test_a_reward_of_infinity_is_an_error(proposal):
    guidance = FK(
        lambda x0: torch.where(x0[:, 0] > 0.0, math.inf, x0.sum(1)), 40, proposal=proposal, covariance="point"
    )
    message = "reward: expected finite values, got an infinite value at step 0"
    check(FloatingPointError, message, guidance=guidance)


@pytest.mark.filterwarnings("error")
def test_own_functions_of_fk_that_are_not_finite():
    check(
        FloatingPointError,
        "potential: expected finite values, got NaN at step 0",
        guidance=FK(reward, 4, potential=lambda new, old: new * math.nan),
    )
    check(
        FloatingPointError,
        "proposal: expected finite values, got NaN at step 0",
        guidance=FK(reward, 4, proposal=lambda x, x0, c, *, seed, step: (x * math.nan, torch.zeros(len(x)))),
    )


def test_a_decoder_that_is_not_finite_is_named():
    for space, named in (("latent", "decoder or operator"), ("pixel", "decoder")):
        encoder = None if space == "latent" else lambda x: x
        guidance = LatentPnP(LIKELIHOOD, decoder=lambda z: z * math.nan, encoder=encoder, space=space)
        check(FloatingPointError, f"{named}: expected finite values, got NaN at step 0", guidance=guidance)


@pytest.mark.parametrize("covariance", ["point", "isotropic", "moment"])
def test_a_network_that_diverges_is_reported_by_name(covariance):
    prior = Denoiser(lambda x, t: x * math.nan, SCHEDULE, "v")
    check(
        FloatingPointError,
        "net: expected finite values, got NaN or infinity at step 0",
        prior=prior,
        guidance=TDS(LIKELIHOOD, 2, covariance=covariance),
    )


OVERFLOWS = {
    "DPS": (DPS(LIKELIHOOD, zeta=[0.0, 0.0, 1e39, 0.0]), {}, 2),
    "PiGDM": (PiGDM(LIKELIHOOD, zeta=[0.0, 0.0, 1e39, 0.0]), {}, 2),
    "TDS": (TDS(Callable(lambda x0: 5e4 * x0.sum(1)), 4, covariance="point"), {"dtype": torch.float16}, 0),
    "FK": (FK(lambda x0: 5e4 * x0.sum(1), 4, proposal="guided", covariance="point"), {"dtype": torch.float16}, 0),
    "last step": (DPS(LIKELIHOOD, zeta=[0.0, 0.0, 0.0, 1e39]), {}, 3),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_step_that_overflows_blames_no_function(name):
    guidance, options, step = OVERFLOWS[name]
    check(
        FloatingPointError,
        f"x: expected finite values, got (NaN or infinity|an infinite value|NaN) at step {step}. It overflowed",
        guidance=guidance,
        **options,
    )


def test_a_start_that_overflows_blames_no_function():
    prior = Denoiser(lambda x, t: x, schedules.edm(sigma_max=1e6), "sample")
    message = "x: expected finite values, got NaN or infinity in the prior's noise. It overflowed"
    for guidance in (None, DPS(LIKELIHOOD), PnP(LIKELIHOOD), TDS(LIKELIHOOD, 4), FK(reward, 4)):
        check(FloatingPointError, message, prior=prior, guidance=guidance, dtype=torch.float16)


@pytest.mark.parametrize("name", ["net", "unconditional"])
@pytest.mark.parametrize("guidance", [DPS(LIKELIHOOD), PnP(LIKELIHOOD), TDS(LIKELIHOOD, 4), FK(reward, 4)])
def test_the_one_of_two_networks_that_diverges_is_named(name, guidance):
    nets = {"net": lambda x, t: x, "unconditional": lambda x, t: x}
    nets[name] = lambda x, t: x / (x * 0.0)
    prior = Denoiser(nets["net"], SCHEDULE, "v", unconditional=nets["unconditional"], guidance_scale=0.5)
    check(FloatingPointError, f"^{name}: expected finite values, got .* at step 0", prior=prior, guidance=guidance)


def test_a_gradient_that_is_not_finite_is_named():
    """The gradient of a square root at 0 is not finite."""

    def root(x0):
        return (x0 * 0.0).abs().sqrt().sum(1) + x0.sum(1)

    for guidance in (
        DPS(Callable(root), normalize=False, zeta=0.1),
        TDS(Callable(root), 4, covariance="point"),
        FK(root, 4, proposal="guided", covariance="point"),
    ):
        check(FloatingPointError, r"^gradient of the net or the (likelihood|reward): expected", guidance=guidance)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.3 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize("covariance", ["point", "isotropic", "moment"])
def test_a_networks_backward_pass_that_is_not_finite_is_named(covariance):
    prior = Denoiser(lambda x, t: _NoGradient.apply(x), SCHEDULE, "v")
    for guidance in (DPS(LIKELIHOOD, covariance=covariance), TDS(LIKELIHOOD, 4, covariance=covariance)):
        check(FloatingPointError, r"^gradient of the net or the operator: expected", prior=prior, guidance=guidance)


def test_a_network_whose_output_does_not_depend_on_x_is_refused_where_a_gradient_is_needed():
    weight = torch.ones((), requires_grad=True)
    prior = Denoiser(lambda x, t: weight * x.detach(), SCHEDULE, "v")
    message = "net: expected an output that depends on x, got one that autograd cannot follow to it"
    for guidance in (DPS(LIKELIHOOD), PiGDM(LIKELIHOOD), TDS(LIKELIHOOD, 4)):
        check(ValueError, message, prior=prior, guidance=guidance)


def test_one_dead_particle_is_no_error():
    def some_die(x0):
        out = torch.zeros(x0.shape[0])
        out[0] = -math.inf
        return out

    out = sample(guidance=FK(some_die, 4))
    assert torch.isfinite(out.x).all() and torch.isfinite(out.log_evidence).all()
    assert out.weights[0, 0] == 0.0


# --- checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run(tmp_path):
    path = tmp_path / "run.pt"

    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(checkpoint=path, checkpoint_every=1, callback=stop)
    assert path.exists()
    check(
        ValueError,
        "checkpoint: expected a file of this very run, got .*run.pt of another seed",
        checkpoint=path,
        seed=1,
    )
    assert torch.equal(sample(checkpoint=path).x, sample().x)
    assert list(tmp_path.iterdir()) == []


# --- wrong types --------------------------------------------------------------------------------------------


# Without a check, these values would fail in code that does not know the name of the argument.
@pytest.mark.parametrize(
    "name, options",
    [
        ("shape", dict(shape=5)),
        ("chunk_size", dict(chunk_size=2.5)),
        ("chunk_size", dict(chunk_size="2")),
        ("x_T", dict(x_T=[1.0, 2.0])),
        ("eta", dict(eta="four")),
        ("clip", dict(clip="x")),
        ("clip", dict(clip=(1.0, 2.0, 3.0))),
        ("checkpoint_every", dict(checkpoint_every=2.5)),
        ("guidance", dict(guidance=TDS)),
        ("likelihood", dict(guidance=DPS(5))),
        ("likelihood", dict(guidance=PnP(5))),
        ("likelihood", dict(guidance=TDS(reward, 2))),
        ("likelihood", dict(guidance=LatentPnP(5, decoder=abs))),
        ("decoder", dict(guidance=LatentPnP(LIKELIHOOD, decoder=5))),
        ("iterations", dict(guidance=PnP(LIKELIHOOD, solver="cg", iterations=2.5))),
        ("resample_steps", dict(guidance=FK(reward, 2, resample_steps=1.5))),
        ("strength", dict(guidance=FK(reward, 2, strength="1"))),
        ("potential", dict(guidance=FK(reward, 2, potential=lambda new, old: 3.0))),
        ("proposal", dict(guidance=FK(reward, 2, proposal=lambda x, *a, **k: x))),
        ("zeta", dict(guidance=DPS(LIKELIHOOD, zeta=math.inf))),
    ],
)
def test_wrong_types_name_the_argument(name, options):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*, got "):
        sample(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(shape=(np.int64(2), 3)),
        dict(seed=np.int64(3)),
        dict(eta=np.ones(STEPS)),
        dict(eta=torch.ones(STEPS)),
        dict(eta=torch.tensor(0.5)),
        dict(guidance=DPS(LIKELIHOOD, zeta=torch.tensor(0.5))),
        dict(guidance=PiGDM(LIKELIHOOD, zeta=np.array(0.5))),
        dict(guidance=PnP(LIKELIHOOD, zeta=torch.tensor(0.5), rho=torch.tensor(2.0))),
        dict(guidance=TDS(LIKELIHOOD, np.int64(2))),
    ],
)
def test_numbers_and_tables_of_numpy(options):
    assert torch.isfinite(sample(**options).x).all()


def test_a_sharp_reward_guides_only_where_that_is_asked_for():
    """The gradient of a sharp reward at ``x0_hat`` may have any size."""
    sharp = FK(lambda x0: -1e4 * x0.square().sum(1), 4, proposal="guided")
    check(ValueError, "covariance: expected 'point' with a reward that is no likelihood, got None", guidance=sharp)
    sample(guidance=FK(reward, 4, covariance="point"))


def test_a_checkpoint_of_a_start_that_requires_a_gradient_is_refused(tmp_path):
    x_T = torch.zeros(2, 3, requires_grad=True)
    check(ValueError, "checkpoint: expected None with an x_T that requires", x_T=x_T, checkpoint=tmp_path / "run")


def test_an_unconditional_network_that_is_not_finite_is_named():
    denoiser = Denoiser(lambda x, t: x, SCHEDULE, unconditional=lambda x, t: x * math.nan, guidance_scale=2.0)
    with pytest.raises(FloatingPointError, match=r"^unconditional: expected finite values, got .* at step 0"):
        sample(denoiser)
