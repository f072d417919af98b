"""Standard normals."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from fastguide import ops, reference

from ..cases import NEW, Call, Case, Setting, case, close, compiled, cpu_only, ends, rival


def _numpy(setting: Setting, shape: tuple[int, ...], bits: type[np.random.BitGenerator]) -> Call:
    cpu_only(setting)
    generator, out = np.random.Generator(bits(0)), np.empty(shape, np.float32)
    return lambda: generator.standard_normal(out=out, dtype=np.float32)


def _case(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    device, buffer = setting.device, torch.empty(shape, dtype=dtype, device=setting.device)
    new = partial(ops.randn, shape, seed=7, step=3, dtype=dtype, device=device)
    ours = partial(new, out=torch.empty_like(buffer))

    def check() -> None:
        z = ours()
        for rows in ends(shape[0]):
            part = z[rows]
            expected = reference.randn(
                part.shape, seed=7, step=3, first_particle=rows.start, dtype=torch.float64, device=device
            )
            close(part, expected)
        assert abs(z.double().mean().item()) < 6 / z.numel() ** 0.5

    target = {"at_least": 10.0} if dtype == torch.float32 and device.type == "cpu" else {}
    rivals = [rival("torch normal_", lambda: buffer.normal_, **target), rival(NEW, lambda: new)]
    if dtype == torch.float32:
        rivals += [
            rival("numpy Philox Generator", lambda: _numpy(setting, shape, np.random.Philox), at_least=15.0),
            rival("numpy PCG64 Generator", lambda: _numpy(setting, shape, np.random.PCG64)),
            rival("torch.compile", lambda: compiled(setting, lambda z: z.copy_(torch.randn_like(z)), buffer)),
        ]
    return Case(
        f"standard normals {list(shape)}, {dtype}",
        elements=buffer.numel(),
        bytes=buffer.nbytes,
        ours=ours,
        check=check,
        rivals=rivals,
        backend=setting.backend("randn", dtype),
    )


@case("randn/float32")
def float32(setting: Setting) -> Case:
    return _case(setting, setting.pick((4096, 4096), (16, 96), (65536, 4096)), torch.float32)


@case("randn/float16")
def float16(setting: Setting) -> Case:
    return _case(setting, setting.pick((4096, 4096), (16, 96), (65536, 4096)), torch.float16)


@case("randn/bfloat16")
def bfloat16(setting: Setting) -> Case:
    return _case(setting, setting.pick((4096, 4096), (16, 96), (65536, 4096)), torch.bfloat16)
