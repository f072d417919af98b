"""Resampling from log-weights.

Rivals that start from normalised weights get them. So they need no softmax, which is to their advantage. torch's
float32 prefix sums are wrong from about 1e5 particles on; a rival in float64 is there too.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastguide import ops, reference

from .. import memory
from ..cases import Absent, Call, Case, Figure, Rival, Setting, case, cpu_only, rival

SEED, STEP = 7, 3


class Torch:
    """softmax, cumsum, searchsorted ``[..., K] -> [..., K]``, in buffers that are reused."""

    def __init__(self, log_weights: Tensor, scheme: str, dtype: torch.dtype):
        self.log_weights, self.scheme = log_weights.to(dtype), scheme
        self.shares, self.sums, self.positions = (torch.empty_like(self.log_weights) for _ in range(3))
        self.ancestors = torch.empty(log_weights.shape, dtype=torch.int32, device=log_weights.device)
        self.grid = torch.arange(log_weights.shape[-1], dtype=dtype, device=log_weights.device)
        offsets = log_weights.shape if scheme == "stratified" else (*log_weights.shape[:-1], 1)
        self.offset = torch.empty(offsets, dtype=dtype, device=log_weights.device)

    def __call__(self) -> Tensor:
        torch.softmax(self.log_weights, -1, out=self.shares)
        torch.cumsum(self.shares, -1, out=self.sums)
        torch.add(self.grid, self.offset.uniform_(), out=self.positions).div_(self.grid.shape[0])
        torch.searchsorted(self.sums, self.positions, out_int32=True, out=self.ancestors)
        return self.ancestors


def torch_multinomial(log_weights: Tensor) -> Call:
    shares = torch.empty_like(log_weights)
    ancestors = torch.empty(log_weights.shape, dtype=torch.int64, device=log_weights.device)

    def call() -> Tensor:
        torch.softmax(log_weights, -1, out=shares)
        return torch.multinomial(shares, shares.shape[0], replacement=True, out=ancestors)

    return call


def torch_residual(log_weights: Tensor) -> Call:
    particles = log_weights.shape[0]
    index = torch.arange(particles, device=log_weights.device)
    shares = torch.empty_like(log_weights)

    def call() -> Tensor:
        torch.softmax(log_weights, -1, out=shares)
        shares.mul_(particles)
        copies = shares.floor()
        sure = torch.repeat_interleave(index, copies.int())
        rest = shares.sub_(copies)
        return torch.cat([sure, torch.multinomial(rest, particles - len(sure), replacement=True)])

    return call


def _particles(setting: Setting, scheme: str, log_weights: Tensor) -> Call:
    cpu_only(setting)
    try:
        from particles import resampling
    except ImportError as error:
        raise Absent(f"particles is not installed (0.4 needs numpy < 2): {error}") from error
    shares = torch.softmax(log_weights.double(), -1).numpy()
    return partial(getattr(resampling, scheme), shares, len(shares))


def _numpy(setting: Setting, log_weights: Tensor) -> Call:
    cpu_only(setting)
    shares = torch.softmax(log_weights.double(), -1).numpy()
    generator, grid = np.random.default_rng(0), np.arange(len(shares), dtype=np.float64)
    sums, positions = np.empty_like(shares), np.empty_like(shares)

    def call() -> np.ndarray:
        np.cumsum(shares, out=sums)
        np.add(grid, generator.random(), out=positions)
        np.divide(positions, len(shares), out=positions)
        return np.searchsorted(sums, positions)

    return call


def _case(setting: Setting, scheme: str, shape: tuple[int, ...], rivals, copy_at_most: float | None = None) -> Case:
    """``rivals(log_weights)``: log-weights ``shape`` of standard deviation 1, so that the ESS is about 0.37 K."""
    log_weights = setting.randn(*shape)
    # check=False as in loops, which do not wait for a GPU
    ours = partial(ops.resample, log_weights, scheme=scheme, seed=SEED, step=STEP, check=False)

    def check() -> None:
        got = ours()
        expected = reference.resample(log_weights, scheme=scheme, seed=SEED, step=STEP)
        assert torch.equal(got[0], expected[0]), "ancestors differ from the reference's"
        for value, wanted in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(value, wanted)

    return Case(
        f"{scheme}, log-weights {list(shape)} float32",
        elements=log_weights.numel(),
        bytes=3 * log_weights.nbytes,  # log-weights in; ancestors (int32) and new log-weights out
        ours=ours,
        check=check,
        rivals=rivals(log_weights),
        copy_at_most=copy_at_most,
        backend=setting.backend("resample"),
    )


def _torch_rivals(log_weights: Tensor, scheme: str, **target: float) -> list[Rival]:
    return [
        rival("torch softmax + cumsum + searchsorted", lambda: Torch(log_weights, scheme, torch.float32), **target),
        rival("the same in float64", lambda: Torch(log_weights, scheme, torch.float64)),
    ]


@case("resample/systematic-1e6")
def systematic_1e6(setting: Setting) -> Case:
    def rivals(log_weights: Tensor) -> list[Rival]:
        return [
            *_torch_rivals(log_weights, "systematic", at_least=12.0),
            rival(
                "particles, normalised weights",
                lambda: _particles(setting, "systematic", log_weights),
                at_least=4.0,
            ),
            rival("numpy, normalised weights", lambda: _numpy(setting, log_weights)),
        ]

    return _case(setting, "systematic", (setting.pick(1_000_000, 1000),), rivals)


@case("resample/systematic-1e7")
def systematic_1e7(setting: Setting) -> Case:
    def rivals(log_weights: Tensor) -> list[Rival]:
        return [
            *_torch_rivals(log_weights, "systematic", at_least=8.0),
            rival("particles, normalised weights", lambda: _particles(setting, "systematic", log_weights)),
            rival("numpy, normalised weights", lambda: _numpy(setting, log_weights)),
        ]

    return _case(setting, "systematic", (setting.pick(10_000_000, 3000),), rivals)


@case("resample/systematic-1e8")
def systematic_1e8(setting: Setting) -> Case:
    if setting.device.type == "cpu" and not setting.quick:
        raise Absent("timed on a GPU; on a CPU resample/memory-1e8 is of that size")
    particles = setting.pick(100_000_000, 9000)
    target = 1 / 0.65  # at least 0.65 of the bandwidth of a copy, for log-weights and results

    def rivals(log_weights: Tensor) -> list[Rival]:
        return _torch_rivals(log_weights, "systematic", at_least=20.0)

    return _case(setting, "systematic", (particles,), rivals, copy_at_most=target)


@case("resample/stratified")
def stratified(setting: Setting) -> Case:
    def rivals(log_weights: Tensor) -> list[Rival]:
        return [
            *_torch_rivals(log_weights, "stratified"),
            rival("particles, normalised weights", lambda: _particles(setting, "stratified", log_weights)),
        ]

    return _case(setting, "stratified", (setting.pick(1_000_000, 1000),), rivals)


@case("resample/multinomial")
def multinomial(setting: Setting) -> Case:
    def rivals(log_weights: Tensor) -> list[Rival]:
        return [
            rival("torch softmax + multinomial", lambda: torch_multinomial(log_weights), at_least=30.0),
            rival(
                "particles, normalised weights",
                lambda: _particles(setting, "multinomial", log_weights),
                at_least=30.0,
            ),
        ]

    return _case(setting, "multinomial", (setting.pick(1_000_000, 1000),), rivals)


@case("resample/residual")
def residual(setting: Setting) -> Case:
    def rivals(log_weights: Tensor) -> list[Rival]:
        return [
            rival("torch floor + multinomial", lambda: torch_residual(log_weights)),
            rival("particles, normalised weights", lambda: _particles(setting, "residual", log_weights)),
        ]

    return _case(setting, "residual", (setting.pick(1_000_000, 1000),), rivals)


@case("resample/batched")
def batched(setting: Setting) -> Case:
    shape = setting.pick((64, 100_000), (4, 300))
    target = {"at_least": 10.0} if setting.device.type == "cuda" else {}
    return _case(setting, "systematic", shape, lambda log_weights: _torch_rivals(log_weights, "systematic", **target))


@case("resample/memory-1e8")
def huge(setting: Setting) -> Case:
    """Run in a new process, which measures its peak memory and checks every offspring count."""
    particles = setting.pick(100_000_000, 20_000)
    found: dict[str, float] = {}

    def check() -> None:
        found.update(memory.measure("resample", setting.device, particles))
        assert found["wrong"] == 0, f"{found['wrong']} offspring counts are neither floor nor ceil of N w"

    def figures(_: float) -> list[Figure]:
        return [
            Figure("peak beyond the input", found["bytes"] / particles, "bytes a particle", at_most=16.0),
            Figure("offspring counts other than floor or ceil of N w, in integers", found["wrong"], "", at_most=0.0),
            Figure("time", found["seconds"], "s"),
            Figure("time a particle", found["seconds"] / particles * 1e9, "ns"),
        ]

    return Case(
        f"systematic, log-weights [{particles}] float32, in a process of its own",
        elements=particles,
        bytes=None,
        ours=None,
        check=check,
        figures=figures,
        backend=setting.backend("resample"),
    )
