"""The guided step of a particle filter and the change of the weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastguide import ops, reference

from ..cases import NEW, Case, Setting, case, close, compiled, ends, rival
from .reverse_step import SEED, STEP, coefficients

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, x0_hat, displacement, log_weights


class Eager:
    """The same in eager PyTorch, in buffers that are reused."""

    def __init__(self, inputs: Inputs, numbers: tuple[float, float, float]):
        self.inputs, self.numbers = inputs, numbers
        self.z, self.out, self.products = (torch.empty_like(inputs[0]) for _ in range(3))

    def __call__(self) -> tuple[Tensor, Tensor]:
        torch.randn(self.z.shape, out=self.z)
        return self.step()

    def step(self) -> tuple[Tensor, Tensor]:
        x, x0, displacement, log_weights = self.inputs
        a, b, tau = self.numbers
        torch.mul(x, a, out=self.out).add_(x0, alpha=b).add_(displacement).add_(self.z, alpha=tau)
        # sum(delta z) + sum(delta^2) / 2 with delta = displacement / tau
        torch.mul(self.z, tau, out=self.products).add_(displacement, alpha=0.5).mul_(displacement)
        return self.out, log_weights - self.products.sum(1) / tau**2


def fused(inputs: Inputs, numbers: tuple[float, float, float], out: Tensor) -> Tensor:
    """The same as one expression, for a compiler to fuse."""
    x, x0, displacement, log_weights = inputs
    a, b, tau = numbers
    z = torch.randn_like(x)
    out.copy_(a * x + b * x0 + displacement + tau * z)
    return log_weights - (displacement * (tau * z + 0.5 * displacement)).sum(1) / tau**2


@case("propose_and_weigh/float32")
def float32(setting: Setting) -> Case:
    shape = setting.pick((4096, 3072), (16, 96), (65536, 4096))
    values = coefficients(1.0)
    x, x0 = setting.randn(*shape), setting.randn(*shape, seed=1)
    displacement, log_weights = 0.01 * setting.randn(*shape, seed=2), setting.randn(shape[0], seed=3)
    inputs, numbers = (x, x0, displacement, log_weights), reference.step_coefficients(values)
    eager = Eager(inputs, numbers)
    new = partial(ops.propose_and_weigh, *inputs, values, seed=SEED, step=STEP)
    ours = partial(new, out=(torch.empty_like(x), torch.empty_like(log_weights)))
    alone = partial(
        ops.reverse_step, x, x0, values, prediction="sample", displacement=displacement, seed=SEED, step=STEP,
        out=torch.empty_like(x),
    )  # fmt: skip

    def check() -> None:
        x_s, weights = ours()
        for rows in ends(shape[0]):
            parts = (tensor[rows].double() for tensor in inputs)
            expected = reference.propose_and_weigh(*parts, values, seed=SEED, step=STEP, first_particle=rows.start)
            close(x_s[rows], expected[0])
            close(weights[rows], expected[1])
        close(alone(), x_s)
        eager.z.copy_(ops.randn(shape, seed=SEED, step=STEP, device=setting.device))
        out, eager_weights = eager.step()
        close(out, x_s)
        close(eager_weights, weights, factor=10)

    return Case(
        f"guided step and weight of {shape[0]} particles of {shape[1]}, float32",
        elements=x.numel(),
        bytes=4 * x.nbytes,  # x, x0_hat and the displacement in, x_s out
        ours=ours,
        check=check,
        rivals=[
            rival("reverse_step, same noise", lambda: alone, at_most=1.15),
            rival("eager, out=", lambda: eager),
            rival(NEW, lambda: new),
            rival("torch.compile", lambda: compiled(setting, fused, inputs, numbers, eager.out)),
            rival(
                "torch.compile, fallback_random",
                lambda: compiled(setting, fused, inputs, numbers, eager.out, fallback_random=True),
            ),
        ],
        backend=setting.backend("propose_and_weigh"),
    )
