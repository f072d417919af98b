"""Whole loops as one CUDA graph, against the same loops launched from Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ..cases import Absent, Call, Case, Setting, case, rival
from .digits import Digits
from .meter import Meter, Net
from .mixture import Points


def _captured(
    setting: Setting, build: Callable[[Setting], Digits | Points], eager: float, reduced: float | None
) -> Case:
    """A whole loop as one CUDA graph, against the same loop launched from Python."""
    if setting.device.type != "cuda":
        raise Absent("CUDA graphs run on a GPU")
    task = build(setting)
    ours = task.capture()

    def check() -> None:
        task.check(Meter(setting.device))
        found, expected = ours(), task.run()
        assert torch.equal(found.x, expected.x), "the graph gives other samples than the loop"

    def reduce_overhead() -> Call:
        @cache
        def compiled(net: Net) -> Net:
            net = torch.compile(net, mode="reduce-overhead")

            def begun(x: Tensor, t: Tensor) -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                return net(x, t)

            return begun

        return partial(task.run, compiled)

    return Case(
        f"{task.what}, one CUDA graph",
        elements=task.samples * task.steps,
        bytes=None,
        ours=ours,
        check=check,
        rivals=[
            rival("the same loop, eager", lambda: task.run, at_least=eager),
            rival(
                "the same, its network by torch.compile(mode='reduce-overhead')",
                reduce_overhead,
                **({} if reduced is None else {"at_least": reduced}),
            ),
        ],
        least_rounds=3,
    )


def _register(name: str, build: Callable[[Setting], Digits | Points], eager: float, reduced: float | None) -> None:
    case(name)(partial(_captured, build=build, eager=eager, reduced=reduced))


_register("samplers/graph-tds-mixture", lambda setting: Points(setting, 1024, 50), 10.0, 2.0)
_register("samplers/graph-tds", lambda setting: Digits(setting, "tds", 1, 1024), 10.0, 2.0)
_register("samplers/graph-dps", lambda setting: Digits(setting, "dps", 1, 1024), 3.0, None)
