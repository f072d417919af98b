"""`compare_steps`: the evidence at n and 2n steps."""

import math

import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood, posterior

import fastguide as fg

GUIDANCE = fg.TDS(gaussian_likelihood(), 64, base_kernel="ddpm")


def compare(**options):
    options = dict(guidance=GUIDANCE, steps=5, runs=3, seed=7) | options
    return fg.compare_steps(example().denoiser(), (2, 3), **options)


def test_the_numbers_are_those_of_single_runs():
    found = compare(doublings=2, eta=0.8)
    assert found.steps == (5, 10, 20) and found.log_evidence.shape == found.error.shape == (3, 2)
    larger = []
    for i, steps in enumerate(found.steps):
        outs = [
            fg.sample(example().denoiser(), (2, 3), guidance=GUIDANCE, steps=steps, seed=7 + 3 * i + run, eta=0.8)
            for run in range(3)
        ]
        rows = torch.stack([out.log_evidence for out in outs])
        own = torch.stack([out.log_evidence_error for out in outs]).square().mean(0).sqrt()
        larger += (rows.std(0) > own).tolist()
        torch.testing.assert_close(found.log_evidence[i], rows.exp().mean(0).log(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.error[i], rows.std(0).maximum(own) / math.sqrt(3), rtol=1e-12, atol=0)
    assert 0 < sum(larger) < len(larger)  # both cases occur
    assert torch.equal(found.difference, found.log_evidence.diff(dim=0))
    squares = found.error.square()
    torch.testing.assert_close(found.difference_error, (squares[1:] + squares[:-1]).sqrt(), rtol=1e-12, atol=0)


def test_the_error_of_one_run_is_its_own():
    found = compare(runs=1)
    out = fg.sample(example().denoiser(), (2, 3), guidance=GUIDANCE, steps=10, seed=8)
    assert torch.equal(found.error[1], out.log_evidence_error)
    assert torch.equal(found.log_evidence[1], out.log_evidence)


def test_it_tells_few_steps_from_enough():
    """At 4 steps the exact evidences of the discretised priors differ by 0.15 and 1.98; at 100 the first by 0.02."""
    guidance = fg.TDS(gaussian_likelihood(), 256, base_kernel="ddpm")
    few, enough = compare(guidance=guidance, steps=4), compare(guidance=guidance, steps=100)
    for found in (few, enough):
        exact = torch.stack([posterior(*example().chain(n), MATRIX, Y, SCALE)[2] for n in found.steps])
        assert ((found.log_evidence - exact).abs() < 4 * found.error).all(), (exact, found)
    assert not few.within_error.any() and enough.within_error[0, 0]


def test_the_text_is_a_table():
    evidence = torch.tensor([[-4.0, 1.0], [-3.0, 1.01]], dtype=torch.float64)
    error = torch.tensor([[0.03, 0.3], [0.04, 0.4]], dtype=torch.float64)
    assert str(fg.StepComparison((50, 100), evidence, error)).splitlines() == [
        "observation 0: steps, log-evidence, change from half the steps",
        "    50     -4.000 ± 0.030",
        "   100     -3.000 ± 0.040    +1.000 ± 0.050, beyond the error",
        "observation 1: steps, log-evidence, change from half the steps",
        "    50      1.000 ± 0.300",
        "   100      1.010 ± 0.400    +0.010 ± 0.500, within the error",
    ]


def test_an_unknown_error_is_beyond_nothing():
    evidence, error = torch.zeros(2, 1).double(), torch.tensor([[math.nan], [0.1]], dtype=torch.float64)
    assert not fg.StepComparison((1, 2), evidence, error).within_error.any()


def test_without_a_seed_torchs_generator_draws_one():
    pairs = []
    for _ in range(2):
        torch.manual_seed(5)
        pairs.append((compare(seed=None, runs=1), compare(seed=None, runs=1)))
    assert torch.equal(pairs[0][0].log_evidence, pairs[1][0].log_evidence)
    assert not torch.equal(pairs[0][0].log_evidence, pairs[0][1].log_evidence)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(guidance=fg.DPS(gaussian_likelihood())), "guidance: expected a TDS or FK object, .*, got DPS"),
        (dict(guidance=None), "guidance: expected a TDS or FK object, .*, got None"),
        (dict(steps=0), "steps: expected an integer >= 1, got 0"),
        (dict(steps=[3, 2]), r"steps: expected an integer >= 1, got \[3, 2\]"),
        (dict(doublings=0), r"doublings: expected an integer in \[1, 30\], got 0"),
        (dict(runs=0), r"runs: expected an integer in \[1, .*\], got 0"),
        (dict(seed=[1, 2]), r"seed: expected an integer in .*, got \[1, 2\]"),
    ],
)
def test_other_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(**options)
