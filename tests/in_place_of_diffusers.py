"""diffusers' own scheduler tests with fastguide's schedulers in place of their parents: a plugin of pytest.

With a checkout of diffusers at the installed version::

    PYTHONPATH=.:tests pytest -p in_place_of_diffusers CHECKOUT/tests/schedulers/test_scheduler_ddim.py ...

Tests that pass without ``-p`` must pass with it. They would pass too if diffusers' code took every step. So the end of
the output says how many steps of each scheduler were fused, how many were not, and why.
"""

from __future__ import annotations

import functools
from collections import Counter

import diffusers

from fastguide.integrations.diffusers import schedulers

steps: Counter[tuple[str, str]] = Counter()


def _counted(step):
    @functools.wraps(step)
    def counted(self, *args, **kwargs):
        try:
            result = step(self, *args, **kwargs)
        except schedulers._NotServed as reason:
            steps[type(self).__name__, f"diffusers' own: {reason or 'whatever it says'}"] += 1
            raise
        steps[type(self).__name__, "fused"] += 1
        return result

    return counted


for _parent, _ours in schedulers.SCHEDULERS.items():
    _ours._step = _counted(_ours._step)
    for _module in (diffusers, diffusers.schedulers):
        setattr(_module, _parent.__name__, _ours)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("fastguide's steps")
    for (scheduler, way), number in sorted(steps.items()):
        terminalreporter.line(f"{number:8,} {scheduler}: {way}")
