"""The first ancestors of a run, and the standard error of its evidence."""

import itertools
import math
import warnings

import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood, posterior

import fastguide as fg
from fastguide import sampling
from fastguide.ancestry import Ancestry

CPU = torch.device("cpu")


def traced(ancestors):
    """The first ancestors ``[B, K]``, from those of every step."""
    first = torch.arange(ancestors.shape[2]).expand(ancestors.shape[1:])
    for step in ancestors.long():
        first = first.gather(1, step)
    return first


@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
def test_the_first_ancestors_are_those_of_all_steps(resampler):
    likelihood = gaussian_likelihood()
    guidance = fg.FK(likelihood, 32, resampler=resampler)
    out = fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=10, seed=0, keep_ancestors=True)
    assert torch.equal(out.first_ancestors.long(), traced(out.ancestors))
    for b in range(2):
        shares = torch.zeros(32, dtype=torch.float64)
        for first, weight in zip(out.first_ancestors[b].tolist(), out.weights[b], strict=True):
            shares[first] += weight
        assert out.effective_ancestors[b].item() == pytest.approx(1 / (shares**2).sum().item(), rel=1e-12)
    assert (out.effective_ancestors < 20).all()


def test_samples_without_particles_have_no_ancestors():
    out = fg.sample(example().denoiser(), (2, 3), steps=3, seed=0, samples_per_observation=4)
    assert out.first_ancestors is None and out.log_evidence_error is None
    with pytest.raises(ValueError, match=r"effective_ancestors: expected samples of TDS or FK, got .*first_ancestors"):
        out.effective_ancestors  # noqa: B018


@pytest.mark.filterwarnings("ignore:ancestors:RuntimeWarning")  # the run has few
def test_a_callback_gets_the_effective_number_of_each_step():
    states = []
    guidance = fg.FK(gaussian_likelihood(), 32)
    out = fg.sample(
        example().denoiser(), (2, 3), guidance=guidance, steps=10, seed=0, keep_ancestors=True, callback=states.append
    )
    for i, state in enumerate(states):
        first, weights = traced(out.ancestors[: i + 1]), torch.softmax(state.log_weights, 1)
        shares = torch.zeros_like(weights).scatter_add_(1, first, weights)
        torch.testing.assert_close(state.effective_ancestors, 1 / shares.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(states[-1].effective_ancestors, out.effective_ancestors, rtol=1e-12, atol=0)
    fg.sample(example().denoiser(), (2, 3), steps=2, seed=0, callback=states.append)
    assert states[-1].effective_ancestors is None


def test_a_bar_shows_them_once_a_second_and_at_the_end(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    looks, postfix, clock = [], sampling._postfix, itertools.count()
    monkeypatch.setattr(sampling, "_postfix", lambda *args: looks.append(postfix(*args)) or looks[-1])
    monkeypatch.setattr(sampling.time, "monotonic", lambda: 0.4 * next(clock))
    guidance = fg.FK(gaussian_likelihood(), 8)
    out = fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=8, seed=0, progress=True)
    assert len(looks) == 4  # after steps 0, 3, 6 and the last
    last = f"ESS {out.ess[-2].min():.1f} of 8, ancestors {out.effective_ancestors.min():.1f}"
    assert looks[-1] == last and last in capsys.readouterr().err
    fg.sample(example().denoiser(), (2, 3), steps=2, seed=0, progress=True)  # no particles, nothing to show
    assert len(looks) == 4


def families(particles, number):
    """Samples of equally weighted particles that descend from ``number`` first ones, as evenly as can be."""
    return fg.Samples(
        torch.zeros(1, particles, 1),
        torch.zeros(1, particles, dtype=torch.float64),
        first_ancestors=(torch.arange(particles) % number)[None].int(),
    )


@pytest.mark.parametrize(
    "particles, number, guidance, said",
    [
        (16, 4, fg.TDS(gaussian_likelihood(), 16), r"the 16 particles descend from 4 first ones .* particles; a lower"),
        (60, 1, fg.TDS(gaussian_likelihood(), 60, base_kernel="ddpm"), r"from 1 first .*; base_kernel=\"trace\"; a"),
        (60, 2, fg.TDS(gaussian_likelihood(), 60, covariance="point"), r"from 2 first .*; covariance=\"moment\" or"),
        (60, 3, fg.FK(gaussian_likelihood(), 60, base_kernel="ddpm"), r"from 3 first .* particles; a lower"),
        (16, 6, fg.TDS(gaussian_likelihood(), 16), None),
        (15, 3, fg.TDS(gaussian_likelihood(), 15), None),  # few particles have few ancestors
    ],
)
def test_few_first_ancestors_make_a_warning(particles, number, guidance, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampling._warn_of_few_ancestors(families(particles, number), guidance, stacklevel=1)
    assert len(caught) == (said is not None)
    if said is not None:
        with pytest.warns(RuntimeWarning, match=said):
            sampling._warn_of_few_ancestors(families(particles, number), guidance, stacklevel=1)


def test_a_run_warns_once_and_at_the_line_of_the_user():
    guidance = fg.FK(gaussian_likelihood(scale=0.03), 32)
    with pytest.warns(RuntimeWarning, match="^ancestors: the 32 particles descend") as caught:
        out = fg.sample(example().denoiser(), (2, 3), guidance=guidance, steps=10, seed=0)
    few = int((out.effective_ancestors < 5).sum())
    assert len(caught) == 1 and caught[0].filename == __file__
    said = f"from {out.effective_ancestors.min():.2g} first ones (effective number) for {few} of 2 observations"
    assert said in str(caught[0].message)


def test_without_resampling_it_is_the_error_of_a_mean_of_weights():
    log_weights = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 700.0
    ancestry = Ancestry(3, 40, CPU)
    ancestry.follow(torch.arange(40, dtype=torch.int32).repeat(3, 1), torch.tensor([40.0, 12.0, 3.0]).double())
    weights = (log_weights - 700.0).exp()
    expected = weights.std(1) / math.sqrt(40) / weights.mean(1)
    torch.testing.assert_close(ancestry.error(log_weights), expected, rtol=1e-9, atol=0)


def test_the_formula_by_hand():
    """Four particles with weights 1/2, 1/4, 1/8, 1/8; offspring 2, 1, 1, 0; then weights 0.4, 0.2, 0.1, 0.3."""
    ancestry = Ancestry(1, 4, CPU)
    before = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    ancestry.follow(torch.tensor([[0, 1, 2, 0]], dtype=torch.int32), 1 / before.square().sum(1))
    factor = (1 - (0.25 + 0.0625 + 2 * 0.015625)) / (1 - (4 + 1 + 1) / 16)
    pairs = 1 - (0.7**2 + 0.2**2 + 0.1**2)  # the first and the last have the same ancestor
    found = ancestry.error(torch.tensor([[0.4, 0.2, 0.1, 0.3]], dtype=torch.float64).log())
    assert found.item() == pytest.approx(math.sqrt(1 - pairs / (3 / 4) * factor), rel=1e-12)


def test_one_family_one_particle_and_a_negative_variance():
    ancestry = Ancestry(2, 4, CPU)
    ancestors = torch.tensor([[2, 2, 2, 2], [0, 0, 1, 2]], dtype=torch.int32)
    ancestry.follow(ancestors, torch.tensor([1.3, 3.99], dtype=torch.float64))
    found = ancestry.error(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]).double().log())
    assert found[0].item() == 1.0  # all of one family: the largest possible value
    variance = 1 - (1 - 6 / 16) / (3 / 4) * (1 - 1 / 3.99) / (1 - 6 / 16)
    assert found[1].item() == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert Ancestry(2, 1, CPU).error(torch.zeros(2, 1).double()).isnan().all()
    ancestry = Ancestry(1, 4, CPU)  # siblings, whose weights are lower than the others'
    ancestry.follow(torch.tensor([[0, 0, 1, 2]], dtype=torch.int32), torch.tensor([4.0]).double())
    assert ancestry.error(torch.tensor([[1.0, 1.0, 2.0, 2.0]]).double().log()).isnan()


def test_equal_weights_have_no_error():
    out = fg.sample(example().denoiser(), (2, 3), guidance=fg.FK(lambda x: 0 * x[:, 0], 64), steps=5, seed=0)
    assert torch.allclose(out.log_evidence_error, torch.zeros(2, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(out.effective_ancestors, torch.full((2,), 64.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "guidance, least",
    [
        (dict(resampler="systematic"), 5),
        (dict(resampler="multinomial"), 5),
        (dict(resampler="residual", covariance="isotropic"), 5),
        (dict(resampler="stratified", ess_threshold=None), 5),
        (dict(ess_threshold=0.0), 1),  # never resampled
        (dict(fk=True, resampler="systematic"), 5),
        (dict(fk=True, resampler="multinomial"), 5),
    ],
    ids=str,
)
def test_the_error_is_that_over_many_runs(guidance, least):
    """300 copies of one observation are 300 runs. The root mean square of their estimated errors is the standard
    deviation of their evidences around the exact evidence of the discretised prior."""
    options = dict(guidance)
    method = fg.FK if options.pop("fk", False) else fg.TDS
    options["base_kernel"] = "ddpm"  # its exact evidence is known for every covariance
    copies = 300
    likelihood = gaussian_likelihood(Y[:1].expand(copies, -1).clone())
    out = fg.sample(
        example().denoiser(), (copies, 3), guidance=method(likelihood, 128, **options), steps=10, seed=0,
        dtype=torch.float64,
    )  # fmt: skip
    exact = posterior(*example().chain(10), MATRIX, Y[:1], SCALE)[2]
    ratios = (out.log_evidence - exact).exp()  # unbiased: their mean is 1
    spread = ratios.std().item()
    assert abs(ratios.mean().item() - 1) < 4 * spread / math.sqrt(copies)
    assert (out.effective_ancestors > least).all()
    estimate = out.log_evidence_error.square().nanmean().sqrt().item()
    print(f"\n{guidance}: spread {spread:.4f}, log {out.log_evidence.std().item():.4f}, own {estimate:.4f}")
    assert estimate == pytest.approx(spread, rel=0.2)  # it is 10 % too low, because the weights are skewed
