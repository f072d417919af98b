"""``log p(y | z)`` and its gradient, against the same expression in plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch

from fastguide import ops, reference

from ..cases import Case, Setting, case, close, compiled, rival

OBSERVATIONS = 4


def _case(setting: Setting, family: str, **options: float) -> Case:
    """Residuals of order one; four observations with equally many particles."""
    particles, measurements = setting.pick((4096, 3072), (8, 33), (65536, 3072))
    z, y = setting.randn(particles, measurements), setting.randn(OBSERVATIONS, measurements, seed=1)
    if family == "poisson":
        z, y = z.abs(), (10 * y.abs()).round()
    rows = torch.arange(particles, device=setting.device) // (particles // OBSERVATIONS)
    options = {"family": family, "rows": rows, **options}
    ours = partial(ops.log_prob_and_gradient, z, y, **options)
    expression = partial(reference.log_prob_and_gradient, **options)

    def check() -> None:
        log_prob, gradient = ours()
        expected = expression(z.double(), y.double())
        torch.testing.assert_close(log_prob, expected[0], rtol=1e-5, atol=1e-3)
        close(gradient, expected[1], factor=4)

    return Case(
        f"{family}, {particles} particles of {measurements} measurements, float32",
        elements=z.numel(),
        bytes=2 * z.nbytes + y.nbytes,  # z in, the gradient out
        ours=ours,
        check=check,
        rivals=[
            rival("eager expression", lambda: partial(expression, z, y)),
            rival("torch.compile of it", lambda: compiled(setting, expression, z, y)),
        ],
        backend=setting.backend("log_prob_and_gradient"),
    )


@case("log_prob_and_gradient/gaussian")
def gaussian(setting: Setting) -> Case:
    return _case(setting, "gaussian", scale=0.5)


@case("log_prob_and_gradient/student_t")
def student_t(setting: Setting) -> Case:
    return _case(setting, "student_t", scale=0.5, df=3.0)


@case("log_prob_and_gradient/laplace")
def laplace(setting: Setting) -> Case:
    return _case(setting, "laplace", scale=0.5)


@case("log_prob_and_gradient/poisson")
def poisson(setting: Setting) -> Case:
    return _case(setting, "poisson", scale=0.5, background=0.1)
