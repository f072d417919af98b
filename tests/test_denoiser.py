"""The denoiser on a Gaussian prior, whose ``E[x_0 | x_t]`` is known in closed form."""

import pytest
import torch

from fastguide import Denoiser, reference, schedules
from fastguide.reference import PREDICTIONS

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.7, -0.4], [0.2, 0.0, 0.5]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
EYE = torch.eye(3, dtype=torch.float64)

LEVELS = {
    "vp": (schedules.vp_cosine(100), 60),
    "vp, nearly clean": (schedules.vp_linear(1000), 0),
    "vp, nearly noise": (schedules.vp_linear(1000), 999),
    "edm": (schedules.edm(), 7.0),
    "ve, small": (schedules.ve(), 0.01),
    "flow": (schedules.flow(), 0.4),
    "flow, nearly noise": (schedules.flow(), 0.999),
}
# Each prediction at each kind of level: in the middle of the schedule, and where alpha or sigma is nearly 0.
every_level = pytest.mark.parametrize("schedule, t", LEVELS.values(), ids=LEVELS.keys())
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)

NO_SIGNAL = {
    "flow": (schedules.flow(), 1.0),
    "zero terminal SNR": (schedules.from_alphas_cumprod([0.9, 0.4, 0.0]), 2),
}
no_signal = pytest.mark.parametrize("schedule, t", NO_SIGNAL.values(), ids=NO_SIGNAL.keys())


def exact_x0(x, level):
    """``m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m)``."""
    marginal = level.alpha**2 * COVARIANCE + level.sigma**2 * EYE
    return MEAN + (x - level.alpha * MEAN) @ torch.linalg.solve(marginal, level.alpha * COVARIANCE)


def network(prediction, level):
    """The output of a perfect network, only from the score of the marginal of ``x_t`` by autograd."""
    marginal = torch.distributions.MultivariateNormal(
        level.alpha * MEAN, level.alpha**2 * COVARIANCE + level.sigma**2 * EYE
    )

    def net(x, t):
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            (score,) = torch.autograd.grad(marginal.log_prob(leaf).sum(), leaf, create_graph=True)
        eps = -level.sigma * score
        if level.alpha > 0:
            x0 = (x + level.sigma**2 * score) / level.alpha  # Tweedie
        else:
            x0 = MEAN.expand_as(x)
        return {
            "epsilon": eps,
            "sample": x0,
            "score": score,
            "v": level.alpha * eps - level.sigma * x0,
            "flow": eps - x0,
        }[prediction]

    return net


def states(level, n=5):
    generator = torch.Generator().manual_seed(3)
    x0 = MEAN + torch.randn(n, 3, generator=generator, dtype=torch.float64) @ FACTOR.T
    return level.alpha * x0 + level.sigma * torch.randn(n, 3, generator=generator, dtype=torch.float64)


# --- prediction types ---------------------------------------------------------------------------------------


@every_prediction
@every_level
def test_x0_hat_is_the_posterior_mean(prediction, schedule, t):
    level = schedule.level(t)
    x = states(level)
    x0_hat = Denoiser(network(prediction, level), schedule, prediction).x0_hat(x, level)
    torch.testing.assert_close(x0_hat.detach(), exact_x0(x, level), rtol=1e-9, atol=1e-9)


@every_prediction
@every_level
def test_jacobian_of_x0_hat_is_the_posterior_covariance(prediction, schedule, t):
    """Second-order Tweedie: ``(sigma^2 / alpha) d x0_hat / d x_t = (S^-1 + (alpha / sigma)^2 I)^-1``."""
    level = schedule.level(t)
    denoiser = Denoiser(network(prediction, level), schedule, prediction)
    jacobian = torch.autograd.functional.jacobian(lambda x: denoiser.x0_hat(x[None], level)[0], states(level, 1)[0])
    expected = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + (level.alpha / level.sigma) ** 2 * EYE)
    torch.testing.assert_close(level.sigma**2 / level.alpha * jacobian, expected, rtol=1e-7, atol=1e-9)


@every_prediction
@every_level
def test_round_trip(prediction, schedule, t):
    level = schedule.level(t)
    x, output = states(level), states(schedule.level(schedule.t_max))
    x0 = reference.x0_from_output(x, output, level.alpha, level.sigma, prediction)
    back = reference.output_from_x0(x, x0, level.alpha, level.sigma, prediction)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)
    x0 = exact_x0(x, level)
    output = reference.output_from_x0(x, x0, level.alpha, level.sigma, prediction)
    torch.testing.assert_close(output, network(prediction, level)(x, None).detach(), rtol=1e-8, atol=1e-8)
    again = reference.x0_from_output(x, output, level.alpha, level.sigma, prediction)
    torch.testing.assert_close(again, x0, rtol=1e-11, atol=1e-11)


@every_prediction
def test_conversion_with_a_level_per_sample(prediction):
    levels = [schedules.flow().level(t) for t in (0.1, 0.5, 0.9)]
    alpha, sigma = (torch.tensor([level[i] for level in levels], dtype=torch.float64) for i in (1, 2))
    x, output = states(levels[0], 3), states(levels[2], 3)
    together = reference.x0_from_output(x, output, alpha, sigma, prediction)
    back = reference.output_from_x0(x, together, alpha, sigma, prediction)
    torch.testing.assert_close(back, output, rtol=1e-12, atol=1e-12)
    for i, level in enumerate(levels):
        alone = reference.x0_from_output(x[i : i + 1], output[i : i + 1], level.alpha, level.sigma, prediction)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-14, atol=1e-14)


# --- levels without signal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["sample", "v", "flow"])
@no_signal
def test_without_signal_x0_hat_is_the_prior_mean(prediction, schedule, t):
    level = schedule.level(t)
    assert (level.alpha, level.sigma) == (0.0, 1.0)
    x = states(level)
    x0_hat = Denoiser(network(prediction, level), schedule, prediction).x0_hat(x, level)
    torch.testing.assert_close(x0_hat.detach(), MEAN.expand_as(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("prediction", ["sample", "v", "flow"])
def test_the_level_without_signal_is_the_limit(prediction):
    schedule = schedules.flow()
    x = states(schedule.level(1.0))
    values = []
    for t in (1.0, 1.0 - 1e-7):
        level = schedule.level(t)
        values.append(Denoiser(network(prediction, level), schedule, prediction).x0_hat(x, level).detach())
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
@no_signal
def test_without_signal_epsilon_and_score_say_so(prediction, schedule, t):
    level = schedule.level(t)
    denoiser = Denoiser(network(prediction, level), schedule, prediction)
    with pytest.raises(ValueError, match=f"prediction: '{prediction}' does not determine x_0 where alpha = 0"):
        denoiser.x0_hat(states(level), level)
    with pytest.raises(ValueError, match="expected 'sample', 'v' or 'flow' there, or levels that start below it"):
        denoiser(states(level), level)
    below = schedule.levels(2)[1]
    assert torch.isfinite(Denoiser(network(prediction, below), schedule, prediction).x0_hat(states(below), below)).all()


# --- the call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, t, value",
    [(schedules.vp_linear(1000), 417, 417), (schedules.edm(), 2.5, 2.5), (schedules.flow(), 0.3, 0.3)],
    ids=["table", "edm", "flow"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_network_is_called_with_its_own_time(schedule, t, value, dtype):
    calls = []

    def net(x, t):
        calls.append((x, t))
        return 2 * x

    x = torch.randn(4, 2, 3, dtype=dtype)
    output = Denoiser(net, schedule)(x, schedule.level(t))
    ((seen, time),) = calls
    assert torch.equal(seen, x) and torch.equal(output, 2 * x)
    expected = torch.float32 if dtype == torch.bfloat16 else dtype  # half precision would round the time
    assert time.shape == (4,) and time.dtype == (torch.int64 if schedule.discrete else expected)
    assert torch.equal(time, torch.full((4,), value, dtype=time.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_output_takes_the_dtype_of_the_state(dtype):
    schedule = schedules.flow()
    level = schedule.level(0.25)
    x = torch.randn(3, 5).to(dtype)
    net_output = torch.randn(3, 5, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: net_output, schedule, "flow")
    assert torch.equal(denoiser(x, level), net_output.to(dtype))
    x0_hat = denoiser.x0_hat(x, level)
    assert x0_hat.dtype == dtype
    expected = x.double() - 0.25 * net_output  # the output is not rounded first
    torch.testing.assert_close(x0_hat.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_survives_a_small_alpha():
    """At the first level of the cosine table, ``x / alpha`` is out of float16's range, but ``x0_hat`` is not."""
    schedule = schedules.vp_cosine(1000)
    level = schedule.level(999)
    x = torch.tensor([[4.0, -3.0]], dtype=torch.float16)
    assert 4.0 / level.alpha > torch.finfo(torch.float16).max
    x0_hat = Denoiser(lambda x, t: x, schedule, "epsilon").x0_hat(x, level)  # (1 - sigma) x / alpha
    assert torch.isfinite(x0_hat).all() and x0_hat.abs().max() < 1.0


def test_classifier_free_guidance():
    schedule = schedules.vp_linear(10)
    level = schedule.level(6)
    x = torch.randn(4, 3, dtype=torch.float64)
    times = []

    def conditional(x, t):
        times.append(t)
        return torch.sin(x)

    def unconditional(x, t):
        times.append(t)
        return x**2

    for scale in (0.0, 1.0, 7.5, -1.0):
        denoiser = Denoiser(conditional, schedule, unconditional=unconditional, guidance_scale=scale)
        output = (1 - scale) * x**2 + scale * torch.sin(x)
        torch.testing.assert_close(denoiser(x, level), output, rtol=1e-13, atol=1e-13)
        x0 = (x - level.sigma * output) / level.alpha
        torch.testing.assert_close(denoiser.x0_hat(x, level), x0, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, torch.full((4,), 6)) for t in times) and len(times) == 16


def test_guidance_of_each_prediction_type_agrees():
    """Mixing two outputs mixes their ``x0_hat`` with the same weights, for every prediction type."""
    schedule = schedules.vp_cosine(100)
    level = schedule.level(30)
    x, other = states(level), states(level).flip(1)
    expected = exact_x0(x, level) + 3.0 * (other - exact_x0(x, level))
    for prediction in PREDICTIONS:
        target = reference.output_from_x0(x, other, level.alpha, level.sigma, prediction)
        denoiser = Denoiser(
            lambda x, t, target=target: target,
            schedule,
            prediction,
            unconditional=network(prediction, level),
            guidance_scale=3.0,
        )
        torch.testing.assert_close(denoiser.x0_hat(x, level).detach(), expected, rtol=1e-10, atol=1e-10)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net, error, message",
    [
        (
            lambda x, t: x[:, :2],
            ValueError,
            r"net: .*floating tensor of shape \[4, 3\] on cpu.*shape \[4, 2\]",
        ),
        (lambda x, t: x[0], ValueError, r"net: .*shape \[4, 3\].*got torch.float32 of shape \[3\]"),
        (lambda x, t: x.long(), ValueError, "net: .*got torch.int64"),
        (lambda x, t: (), TypeError, "net: expected it to return a tensor, .* got tuple"),
        (lambda x, t: {"out": x}, TypeError, "net: .* got dict; .* can pick the tensor"),
        (lambda x, t: None, TypeError, "net: expected it to return a tensor, .* got NoneType"),
    ],
)
@pytest.mark.parametrize("place", ["net", "unconditional"])
def test_a_network_that_returns_something_else(net, error, message, place):
    schedule = schedules.edm()
    if place == "net":
        denoiser = Denoiser(net, schedule)
    else:
        denoiser = Denoiser(lambda x, t: x, schedule, unconditional=net, guidance_scale=2.0)
    with pytest.raises(error, match=message.replace("net:", f"^{place}:")):
        denoiser(torch.zeros(4, 3), schedule.level(1.0))


@pytest.mark.parametrize("cut", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
@every_prediction
def test_a_network_without_a_graph_is_no_silent_gradient(cut, prediction):
    """``x0_hat`` depends on ``x`` without the network too, so it would have a graph even if the network has none."""
    schedule = schedules.flow()
    level = schedule.level(0.5)
    denoiser = Denoiser(cut(lambda x, t: 2 * x), schedule, prediction)
    mixed = Denoiser(lambda x, t: x, schedule, prediction, unconditional=cut(torch.mul), guidance_scale=2.0)
    x = torch.ones(2, 3)
    assert torch.isfinite(denoiser.x0_hat(x, level)).all()  # no gradient is needed here
    with pytest.raises(ValueError, match="net: expected a network that autograd can differentiate, got an output"):
        denoiser.x0_hat(x.requires_grad_(), level)
    with pytest.raises(ValueError, match="unconditional: expected a network that autograd can differentiate"):
        mixed.x0_hat(x[:1].expand(3, 3), level)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda net, s: Denoiser(3, s), TypeError, r"net: expected a callable net\(x, t\), got int"),
        (lambda net, s: Denoiser(net, "edm"), TypeError, "schedule: expected a fastguide.schedules.*got str"),
        (
            lambda net, s: Denoiser(net, s, "noise"),
            ValueError,
            "prediction: expected one of .*'v'.*got 'noise'",
        ),
        (
            lambda net, s: Denoiser(net, s, unconditional=net),
            ValueError,
            "unconditional, guidance_scale: .*None",
        ),
        (
            lambda net, s: Denoiser(net, s, guidance_scale=2.0),
            ValueError,
            "unconditional, guidance_scale: .*2.0",
        ),
        (
            lambda net, s: Denoiser(net, s, unconditional=0, guidance_scale=2.0),
            TypeError,
            "unconditional: expected a callable.*got int",
        ),
    ],
)
def test_building_errors(build, error, message):
    with pytest.raises(error, match=message):
        build(lambda x, t: x, schedules.edm())


def test_repr_names_schedule_and_prediction():
    net = torch.nn.Identity()
    assert repr(Denoiser(net, schedules.vp_linear(12), "v")) == "Denoiser(Identity, vp_linear(12), 'v')"


def test_conversion_refuses_alpha_zero():
    for prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match="does not determine x_0 where alpha_t = 0"):
            reference.x0_from_output(torch.ones(1, 1), torch.ones(1, 1), 0.0, 1.0, prediction)
