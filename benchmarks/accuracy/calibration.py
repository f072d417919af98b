"""Whether the spread of the samples is honest: simulation-based calibration on the digits prior (Talts et al. 2018).

Truths are the sampler's own samples of the prior, so that the prior of each method is the right one. Intervals of 50
% and 90 % of the pixels that are uncertain should hold the truth as often. The spread (the root of the mean variance)
should be the root mean square error of the mean. CRPS is the continuous ranked probability score: lower is better.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastguide as fg
from fastguide import demo, digits

from ..cases import Case, Figure, Setting, case

Guidance = Callable[[fg.likelihoods.Likelihood, int], Any]


def _particles(make: Callable[..., Any], **options: Any) -> Guidance:
    def guidance(likelihood: fg.likelihoods.Likelihood, samples: int) -> Any:
        return make(likelihood, samples, covariance="isotropic", **options)

    return guidance


METHODS: dict[str, Guidance] = {
    "DPS": lambda likelihood, k: fg.DPS(likelihood, zeta=0.25),
    "PnP": lambda likelihood, k: fg.PnP(likelihood, zeta=1.0),
    "PiGDM": lambda likelihood, k: fg.PiGDM(likelihood),
    "DAPS": lambda likelihood, k: fg.DAPS(likelihood),
    "FK": _particles(fg.FK),
    "TDS": _particles(fg.TDS),
    "TDS with DDPM's kernel": _particles(fg.TDS, base_kernel="ddpm"),
}


def ranked_score(out: fg.Samples, truth: Tensor) -> Tensor:
    """The CRPS of each element from weighted samples: ``E|x - truth| - E|x - x'| / 2``."""
    x, order = out.x.double().sort(dim=1)
    weights = out.weights if out.log_weights is not None else torch.full(out.x.shape[:2], 1.0 / out.x.shape[1])
    weights = weights.double().reshape(*weights.shape, *(1,) * (x.ndim - 2)).expand_as(x).gather(1, order)
    # Half of E|x - x'|, from the sorted samples: each gap between neighbours counts with the weights on its two sides.
    below = weights.cumsum(1)[:, :-1]
    apart = (below * (1 - below) * x.diff(dim=1)).sum(1)
    return (weights * (x - truth[:, None]).abs()).sum(1) - apart


def _calibration(setting: Setting, task: str) -> Case:
    observations, steps, counts = setting.pick((32, 50, (16, 64, 256)), (2, 4, (8,)))
    prior, given = digits.prior(), demo.tasks()[task]

    def check() -> None:
        """The score of a standard normal is known: ``(1 / sqrt(pi)) (sqrt(2) - 1)`` at its mean."""
        out = fg.Samples(torch.randn(1, 100_000, 1, generator=torch.Generator().manual_seed(0)), grouped=True)
        exact = torch.tensor([[(2**0.5 - 1) / torch.pi**0.5]], dtype=torch.float64)
        torch.testing.assert_close(ranked_score(out, torch.zeros(1, 1)), exact, rtol=0, atol=0.01)

    def figures(_: float) -> list[Figure]:
        found = []
        truth = fg.sample(prior, (observations, 1, 8, 8), steps=steps, seed=1).x
        z = given.operator(truth)
        y = z + given.draw(torch.Generator().manual_seed(0), z.shape)
        uncertain = torch.ones(1, 8, 8, dtype=torch.bool)
        if task == "half":
            uncertain[:, :4] = False
        for samples in counts:
            for method, guidance in METHODS.items():
                if method == "PiGDM" and task == "blur":
                    continue  # Student-t noise is not its model
                made = guidance(given.error(y), samples)
                weighted, start = hasattr(made, "particles"), time.perf_counter()
                out = fg.sample(
                    prior,
                    (observations, 1, 8, 8),
                    guidance=made,
                    steps=steps,
                    seed=2,
                    samples_per_observation=None if weighted else samples,
                )
                seconds = time.perf_counter() - start
                inside = [
                    ((low <= truth) & (truth <= high))[:, uncertain].double().mean().item()
                    for low, high in map(out.interval, (0.5, 0.9))
                ]
                error = (out.mean() - truth)[:, uncertain].square().mean().sqrt()
                spread = out.variance()[:, uncertain].mean().sqrt()
                drawn = out.draw(1)[:, 0] if weighted else out.x[:, 0]
                residual = (given.operator(drawn) - y).square().mean().sqrt() / given.spread
                values = {
                    "50 % intervals hold": inside[0],
                    "90 % intervals hold": inside[1],
                    "spread / RMSE": (spread / error).item(),
                    "CRPS": ranked_score(out, truth)[:, uncertain].mean().item(),
                    "residual / noise": residual.item(),
                    "seconds": seconds,
                }
                if weighted:
                    values["first ancestors"] = out.effective_ancestors.median().item()
                found += [Figure(f"{method}, {samples} samples: {name}", value, "") for name, value in values.items()]
        return found

    what = f"{task}: {given.title}, {observations} truths of the prior, {steps} steps"
    return Case(what, observations, None, None, check, figures=figures)


for _task in demo.tasks():
    case(f"calibration/{_task}")(partial(_calibration, task=_task))
