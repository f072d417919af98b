"""Classifier-free guidance and the conversion to ``x0_hat``, and their backward pass.

The rivals are the passes that plain PyTorch makes: a difference, a product and a sum for the guidance, two products and
a sum for the conversion; and ``torch.compile`` of the same expression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguide import ops, reference

from ..cases import Case, Setting, case, close, compiled, rival

LEVEL, SCALE = (0.6, 0.8), 7.5
SHAPES = (64, 3, 256, 256), (4, 3, 8, 8), (1024, 4, 256, 256)  # on the CPU, quick, on a GPU


def unfused(x: Tensor, output: Tensor, base: Tensor) -> Tensor:
    alpha, sigma = LEVEL
    guided = base + SCALE * (output - base)
    return 1.0 / alpha * x + -sigma / alpha * guided


def forward(setting: Setting, dtype: torch.dtype) -> Case:
    shape = setting.pick(*SHAPES)
    x, output, base = (setting.randn(*shape, dtype=dtype, seed=seed) for seed in range(3))
    options = dict(prediction="epsilon", unconditional=base, guidance_scale=SCALE)

    def check() -> None:
        few = slice(0, 2)
        expected = reference.predict_x0(
            x[few].double(), output[few].double(), LEVEL, **(options | dict(unconditional=base[few].double()))
        )
        close(ops.predict_x0(x, output, LEVEL, **options)[few], expected, 20.0)

    return Case(
        f"guidance and conversion, {list(shape)} {dtype}",
        elements=x.numel(),
        bytes=4 * x.nbytes,  # x and two outputs in, x0_hat out
        ours=lambda: ops.predict_x0(x, output, LEVEL, **options),
        check=check,
        rivals=[
            rival("unfused", lambda: lambda: unfused(x, output, base)),
            rival("torch.compile", lambda: compiled(setting, unfused, x, output, base)),
        ],
        backend=setting.backend("predict_x0", dtype),
        triad_at_most=1.5,
    )


@case("predict_x0/guided")
def guided(setting: Setting) -> Case:
    return forward(setting, torch.float32)


@case("predict_x0/bfloat16")
def bfloat16(setting: Setting) -> Case:
    return forward(setting, torch.bfloat16)


@case("predict_x0_backward/guided")
def backward(setting: Setting) -> Case:
    """Gradients in the state and both outputs."""
    shape = setting.pick(*SHAPES)
    leaves = [setting.randn(*shape, seed=seed).requires_grad_() for seed in range(3)]
    grad = setting.randn(*shape, seed=3)
    x, output, base = leaves

    def gradients(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, leaves, grad, retain_graph=True)

    ours = ops.predict_x0(x, output, LEVEL, prediction="epsilon", unconditional=base, guidance_scale=SCALE)
    theirs = unfused(x, output, base)

    def check() -> None:
        for got, expected in zip(gradients(ours), gradients(theirs), strict=True):
            close(got, expected, 10.0)

    return Case(
        f"gradients of guidance and conversion, {list(shape)} torch.float32",
        elements=x.numel(),
        bytes=4 * x.nbytes,  # one gradient in, three out
        ours=lambda: gradients(ours),
        check=check,
        rivals=[rival("autograd of the unfused passes", lambda: lambda: gradients(theirs))],
        backend=setting.backend("predict_x0_backward"),
        triad_at_most=1.5,
    )
