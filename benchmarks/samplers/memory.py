"""What a loop costs with a network that costs nothing: bytes, copies, checks and page faults."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import fastguide as fg
from fastguide import ops, sampling
from fastguide.guidance.base import STREAM_INITIAL

from .. import timing, traffic
from ..cases import Absent, Call, Case, Figure, Setting, case, cpu_only, rival


@case("samplers/memory")
def memory(setting: Setting) -> Case:
    """The loop with a network that costs nothing, against its kernel alone: copies, checks and page faults."""
    shape, steps = setting.pick((64, 3, 256, 256), (2, 3, 8, 8), (1024, 4, 256, 256)), 20
    eps = setting.randn(*shape)
    prior = fg.Denoiser(lambda x, t: eps, fg.schedules.vp_linear(1000))
    start = ops.randn(shape, seed=7, stream=STREAM_INITIAL, device=setting.device)
    levels = prior.schedule.levels(steps)
    coefficients = [
        (t.alpha, t.sigma, s.alpha, s.sigma, sampling.noise(t, s, 1.0)) for t, s in pairwise(levels)
    ]  # fmt: skip
    ours = partial(fg.sample, prior, shape, steps=steps, seed=7, device=setting.device)
    kept = torch.empty_like(eps), torch.empty_like(eps)

    def kernels() -> Tensor:
        x = start
        for i, values in enumerate(coefficients):
            x = ops.reverse_step(x, eps, values, seed=7, step=i, out=kept[i % 2])
        return x

    def check() -> None:
        torch.testing.assert_close(ours().x, kernels())  # the start is scaled by 1 to rounding

    return Case(
        f"{steps} plain steps of {list(shape)}, float32",
        elements=steps * eps.numel(),
        bytes=None,
        ours=ours,
        check=check,
        rivals=[rival("the kernel alone, into kept memory", lambda: kernels, at_most=1.2)],
        backend=setting.backend("reverse_step"),
    )


def _bytes(setting: Setting, method: str) -> Case:
    """Bytes and time with a network that costs nothing, against those of another checkout."""
    cpu_only(setting)
    shape, steps = setting.pick((64, 3, 256, 256), (4, 3, 8, 8)), setting.pick(20, 4)
    ours, elements = traffic.sampler(method, shape, steps), steps * math.prod(shape)
    label = "--against" if setting.against is None else f"{timing.commit(setting.against)}, in a process of its own"
    counts: list[Counter[str]] = []  # ours, ours if networks keep no output, and the other checkout's
    other: list[traffic.Elsewhere] = []

    def elsewhere() -> Call:
        if setting.against is None:
            raise Absent("expected --against DIR, another checkout that is built in place")
        other.append(traffic.Elsewhere(setting.against, method, shape, steps))
        return partial(other[0].ask, "run")

    def check() -> None:
        samples, moved = traffic.count(ours)
        assert torch.equal(ours().x, samples.x), "counted, the sampler gives other samples"
        assert torch.isfinite(samples.x).all()
        _, of_new_outputs = traffic.count(traffic.sampler(method, shape, steps, keeps=False))
        counts[:] = [moved, of_new_outputs]
        for process in other:
            answer = process.ask("count")
            counts.append(Counter(answer["moved"]))
            torch.testing.assert_close(answer["moments"], traffic.moments(samples), rtol=1e-2, atol=1e-3)

    def figures(_: float) -> list[Figure]:
        here, of_new_outputs, *there = (c.total() / elements for c in counts)
        found = [
            Figure("bytes per element and step", here, ""),
            Figure("where the network makes a new output", of_new_outputs, ""),
        ]
        for total, process in zip(there, other, strict=True):
            found += [Figure("there", total, ""), Figure("ours of theirs", here / total, "", at_most=1 / 3)]
            spent = [(process.ask("run"), traffic.processor_seconds(ours)) for _ in range(setting.pick(3, 1))]
            theirs, own = map(statistics.median, zip(*spent, strict=True))
            found.append(Figure("time of the processor, theirs over ours", theirs / own, "x"))
        for name, c in zip(("here", "there"), (counts[0], *counts[2:]), strict=False):
            parts = ((operation, moved / elements) for operation, moved in c.most_common())
            found += [Figure(f"{name}: {operation}", moved, "") for operation, moved in parts if moved >= 0.1]
        return found

    return Case(
        f"{method}, network that costs nothing, {list(shape)}, float32, {steps} steps",
        elements=elements,
        bytes=None,
        ours=ours,
        check=check,
        rivals=[rival(label, elsewhere, at_least=2.0)],
        figures=figures,
    )


for _name in traffic.METHODS:
    case(f"samplers/bytes-{_name}")(partial(_bytes, method=_name))
