"""The functions of `particles`, which use one thread; ours use torch's (``OMP_NUM_THREADS``)."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from fastguide.integrations import particles

from ..cases import Absent, Case, Setting, case, cpu_only, rival

FUNCTIONS = (*particles.SCHEMES, "exp_and_normalise", "essl", "log_mean_exp")


def _their_resampling() -> Any:
    try:
        return importlib.import_module("particles.resampling")
    except ImportError as error:
        raise Absent(f"particles is not installed (0.4 needs numpy < 2): {error}") from error


def _check_particles(name: str, values: np.ndarray) -> None:
    ours = getattr(particles, name)
    np.random.seed(0)
    got = ours(values)
    try:
        theirs = getattr(_their_resampling(), name)
    except Absent:  # then check with numpy alone
        if name in particles.SCHEMES:
            copies, shares = np.bincount(got, minlength=len(values)), len(values) * values
            assert copies.sum() == len(values) == len(copies)
            if name in ("systematic", "ssp"):
                assert (np.abs(copies - shares) < 1 + 1e-6).all()
        else:
            w = np.exp(values - values.max())
            total = w.sum()
            expected = {
                "exp_and_normalise": w / total,
                "essl": total**2 / (w * w).sum(),
                "log_mean_exp": values.max() + np.log(w.mean()),
            }[name]
            np.testing.assert_allclose(got, expected, rtol=1e-12)
        return
    if name == "ssp":  # draws from numba's generator, which this does not seed
        return
    np.random.seed(0)
    if name in particles.SCHEMES:
        np.testing.assert_array_equal(got, theirs(values))
    else:
        np.testing.assert_allclose(got, theirs(values), rtol=1e-12)


def _particles_case(name: str, number: int, setting: Setting) -> Case:
    cpu_only(setting)
    log_weights = np.random.default_rng(0).standard_normal(setting.pick(number, 300))
    weights = np.exp(log_weights) / np.exp(log_weights).sum()
    values = weights if name in particles.SCHEMES else log_weights
    return Case(
        f"{name} of {len(values)} float64 {'weights' if values is weights else 'log-weights'}",
        elements=len(values),
        bytes=None,
        ours=partial(getattr(particles, name), values),
        check=partial(_check_particles, name, values),
        rivals=[rival("particles", lambda: partial(getattr(_their_resampling(), name), values), at_least=4.0)],
    )


for _name in FUNCTIONS:
    for _size, _number in (("1e6", 1_000_000), ("1e4", 10_000)):
        case(f"integrations/particles-{_name}-{_size}")(partial(_particles_case, _name, _number))
