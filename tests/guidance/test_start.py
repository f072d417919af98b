"""``start="matched"``: the moments of ``x_T`` against closed forms."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from gaussian import GaussianPrior, gaussian_likelihood

import fastguide as fg
from fastguide.guidance.start import match_start
from fastguide.sampling import Plain, prepare_run

LEVELS = [300, 100, 0]  # of vp_linear: alpha is 0.65 at the first
SCHEDULE = fg.schedules.vp_linear()
MEAN = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
ROOT = torch.tensor([[2.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
PRIOR = GaussianPrior(MEAN, ROOT @ ROOT.T, SCHEDULE)
LEVEL = SCHEDULE.level(LEVELS[0])


def moments_of(net, shape, prediction: str = "sample", schedule=SCHEDULE, steps=LEVELS, **options):
    """The mean ``[rows, D]`` and the covariance ``[rows, D, D]`` that `match_start` finds."""
    prior = fg.Denoiser(net, schedule, prediction)
    options = dict(dtype=torch.float64, device=None, chunk_size=None) | options
    run = prepare_run(
        prior, shape, Plain(), steps, None, None, None, 0, None, options["dtype"], options["device"],
        options["chunk_size"],
    )  # fmt: skip
    found = match_start(run)
    size = math.prod(shape[1:])
    columns = found.draw(torch.eye(size, dtype=torch.float64).expand(len(found.mean), size, size)) - found.mean
    return found.mean[:, 0], columns.mT @ columns


def test_the_moments_of_a_gaussian():
    mean, covariance = moments_of(PRIOR, (2, 3))
    exact = LEVEL.alpha**2 * PRIOR.covariance + LEVEL.sigma**2 * torch.eye(3)
    torch.testing.assert_close(mean, LEVEL.alpha * MEAN[None], rtol=0, atol=1e-9)
    # 64 independent draws give the covariance of x0_hat: five of its standard errors, 0.18 of each variance, times its
    # share in that of x_T.
    deviations = exact.diagonal().sqrt()
    assert ((covariance[0] - exact).abs() / (deviations[:, None] * deviations)).max() < 0.4
    # The rest comes from the derivative, without an error: without that share the variance would be 0.4 too small.
    assert (covariance[0].logdet() - exact.logdet()).abs() < 0.5


def test_many_directions_share_one_variance():
    """Forty dimensions, two with a large variance: the others have one variance, and the two are found."""
    variances = torch.full((40,), 0.25, dtype=torch.float64)
    variances[:2] = torch.tensor([30.0, 9.0])
    prior = GaussianPrior(torch.zeros(40), torch.diag(variances), SCHEDULE)
    _, covariance = moments_of(prior, (1, 40))
    exact = LEVEL.alpha**2 * variances + LEVEL.sigma**2
    ratio = covariance[0].diagonal() / exact
    assert (ratio[:2] - 1).abs().max() < 0.4 and (ratio[2:] - 1).abs().max() < 0.1, ratio


def test_a_flow_starts_from_its_noise():
    prior = GaussianPrior(MEAN, PRIOR.covariance, fg.schedules.flow())
    mean, covariance = moments_of(prior, (1, 3), schedule=fg.schedules.flow(), steps=4)
    assert not mean.any() and torch.allclose(covariance[0], torch.eye(3, dtype=torch.float64))


def test_observations_with_conditions_have_moments_of_their_own():
    shifts = torch.tensor([[0.0], [2.0]], dtype=torch.float64)

    def net(x, t, shift):
        return PRIOR(x - LEVEL.alpha * shift, t) + shift

    mean, covariance = moments_of(fg.Conditional(net, shift=shifts), (2, 3), chunk_size=7)
    torch.testing.assert_close(mean, LEVEL.alpha * (MEAN + shifts), rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance[0], covariance[1], rtol=1e-9, atol=1e-9)


def test_the_prior_of_few_steps_has_the_right_moments():
    """1,000 samples from two steps. From the prior's noise the mean is off by 60 standard errors."""
    options = dict(steps=LEVELS[:-1], seed=1, dtype=torch.float64)
    matched = fg.sample(PRIOR.denoiser(), (1000, 3), start="matched", **options).x
    given = fg.sample(PRIOR.denoiser(), (1000, 3), **options).x
    errors = [((x.mean(0) - MEAN) / x.std(0) * 1000**0.5).abs().max().item() for x in (matched, given)]
    assert errors[0] < 4 < 40 < errors[1], errors


def test_the_start_does_not_depend_on_the_batch():
    options = dict(start="matched", steps=LEVELS, seed=3, dtype=torch.float64)
    prior = PRIOR.denoiser()
    whole = fg.sample(prior, (4, 3), **options).x
    part = fg.sample(prior, (1, 3), first_sample=2, chunk_size=5, **options).x
    torch.testing.assert_close(part, whole[2:3], rtol=1e-12, atol=1e-12)
    of_seeds = fg.sample(prior, (2, 3), **options | dict(seed=[3, 3])).x
    torch.testing.assert_close(of_seeds, whole[:1].expand(2, 3), rtol=1e-12, atol=1e-12)


def test_bad_starts_are_named():
    with pytest.raises(ValueError, match=re.escape("start: expected one of ('prior', 'matched'), got 'data'")):
        fg.sample(PRIOR.denoiser(), (1, 3), start="data")
    with pytest.raises(ValueError, match="start: expected 'prior' with an x_T"):
        fg.sample(PRIOR.denoiser(), (1, 3), start="matched", x_T=torch.zeros(1, 3))
    nan = fg.Denoiser(lambda x, t: x * math.nan, SCHEDULE, "sample")
    with pytest.raises(FloatingPointError, match="net: expected finite values, got NaN or infinity at step 0"):
        fg.sample(nan, (1, 3), start="matched")


def test_a_checkpoint_tells_the_start(tmp_path):
    options = dict(steps=[500, 400, 300, 200, 100], seed=0, checkpoint=tmp_path / "file", checkpoint_every=1)
    fg.sample(PRIOR.denoiser(), (1, 3), callback=lambda p: p.step == 1, start="matched", **options)
    with pytest.raises(ValueError, match="of another start"):
        fg.sample(PRIOR.denoiser(), (1, 3), **options)
    whole = fg.sample(PRIOR.denoiser(), (1, 3), start="matched", steps=options["steps"], seed=0).x
    assert torch.equal(fg.sample(PRIOR.denoiser(), (1, 3), start="matched", **options).x, whole)


def test_particles_warn_of_a_start_that_does_not_match():
    guidance = fg.TDS(gaussian_likelihood(), 32)
    options = dict(guidance=guidance, steps=LEVELS, seed=0)
    with pytest.warns(RuntimeWarning, match="start: the data shift x_T by .* standard deviations"):
        fg.sample(PRIOR.denoiser(), (2, 3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "ancestors:")
        fg.sample(PRIOR.denoiser(), (2, 3), start="matched", **options)
        fg.sample(PRIOR.denoiser(), (2, 3), **options | dict(steps=[999, 300, 100]))  # more noise at the start
