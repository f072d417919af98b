"""Solves with the positive part of many small matrices, against torch's eigenvalues."""

from __future__ import annotations

from functools import partial

import torch

from fastguide import ops
from fastguide.ops.solve_positive_part.reference import solve_by_products

from ..cases import Case, Setting, case, rival

VARIANCE = 0.01


@case("solve_positive_part/m=4")
def small(setting: Setting) -> Case:
    particles, m = setting.pick((4096, 4), (8, 4), (65536, 4))
    root, residual = setting.randn(particles, m, m).double(), setting.randn(particles, m, seed=1).double()
    gram = 0.5 * (root + root.mT)
    ours = partial(ops.solve_positive_part, gram, residual, variance=VARIANCE)

    def check() -> None:
        for got, expected in zip(ours(), solve_by_products(gram, residual, VARIANCE), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    return Case(
        f"{particles} matrices of {m} rows, float64",
        elements=particles,
        bytes=gram.nbytes + 2 * residual.nbytes,
        ours=ours,
        check=check,
        rivals=[rival("matrix products in torch", lambda: partial(solve_by_products, gram, residual, VARIANCE))],
        backend=setting.backend("solve_positive_part", torch.float64),
    )
