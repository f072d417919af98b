"""Replacing particles by their ancestors."""

from __future__ import annotations

import math
from functools import partial

import torch

from fastguide import ops

from .. import memory
from ..cases import Case, Figure, Setting, case, rival


def _case(setting: Setting, particles: int, elements: int, **target: float) -> Case:
    # log-weights of variance ln 2: ESS / K = exp(-variance) = 0.5
    log_weights = math.sqrt(math.log(2.0)) * setting.randn(particles)
    ancestors, _, _, ess = ops.resample(log_weights, seed=7, sorted=False)
    state = setting.randn(particles, elements, seed=1)
    second = torch.empty_like(state)
    dead = int((ancestors != torch.arange(particles, device=ancestors.device)).sum())

    def check() -> None:
        moved = state.clone()
        ops.gather_particles_(ancestors, moved)
        assert torch.equal(moved, state[ancestors.long()])

    def figures(_: float) -> list[Figure]:
        found = memory.measure("gather", setting.device, particles, elements)
        share = found["ours"] / found["index_select"]
        return [
            Figure("dead particles", dead / particles, "of all"),
            # a little above a half: the process does other things too
            Figure("state and peak, of index_select's", share, "", at_most=0.51),
        ]

    return Case(
        f"{particles} particles of {elements}, float32, ESS/K = {ess.item() / particles:.2f}",
        elements=state.numel(),
        bytes=2 * dead * elements * 4 + ancestors.nbytes,  # only the dead are read and written
        # repeated calls are alike, because survivors stay in place; check=False as in loops, which do not wait
        ours=partial(ops.gather_particles_, ancestors, state, check=False),
        check=check,
        rivals=[
            rival(
                "index_select into a second buffer",
                lambda: partial(torch.index_select, state, 0, ancestors, out=second),
                **target,
            ),
            rival("state[ancestors]", lambda: lambda: state[ancestors]),
        ],
        backend=setting.backend("gather_particles_", ancestors.dtype),
        figures=figures,
    )


@case("gather_particles_/images")
def images(setting: Setting) -> Case:
    shape = setting.pick((16384, 3072), (200, 30), (65536, 3072))  # 800 MB: many times what a GPU's caches hold
    return _case(setting, *shape, at_least=2.0 if setting.device.type == "cuda" else 1.5)


@case("gather_particles_/points")
def points(setting: Setting) -> Case:
    return _case(setting, *setting.pick((2_000_000, 2), (200, 2), (50_000_000, 2)))
