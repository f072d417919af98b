"""The first ancestors of a run, and the standard error of its evidence."""

import math

import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood, posterior

import fastguide as fg
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
