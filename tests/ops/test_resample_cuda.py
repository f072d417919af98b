"""resample's CUDA kernels, by emulation or on a GPU, have the bits of the CPU kernel (see test_resample_kernel.py)."""

from __future__ import annotations

import math

import pytest
import torch

from fastguide import ops
from fastguide.ops import _native
from fastguide.ops._operation import explain, why_not
from fastguide.reference import SCHEMES

MARGIN = 256  # bytes
# csrc/ops/resample/cuda.cu: beyond, a tile's slots are filled by other blocks too
TILE, SLOTS_OF_A_TILE = 2048, 8 * 2048
COUNTER = dict(seed=0xFEDCBA9876543210, step=0xFFFFFFFE, stream=0xABCD)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
both_orders = pytest.mark.parametrize("sorted", (True, False))
both_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float64))

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def kernel(
    log_weights: torch.Tensor,
    scheme: str = "systematic",
    *,
    num: int | None = None,
    ess_threshold: float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    first_row: int = 0,
    sorted: bool = True,
    garbage: int = 0xA5,
) -> Results:
    """Results on the device of ``log_weights``. Every output and the workspace is in the middle of a buffer of garbage.
    The margins must not change."""
    cuda, device = _native.module("cuda"), log_weights.device
    rows, particles = log_weights.shape
    number = particles if num is None else num
    keep_from = math.inf if ess_threshold is None else float(ess_threshold * particles)
    shape = rows, particles, number, SCHEMES.index(scheme), sorted
    with _native.cuda_stream(device) as queue:
        places = ((rows, number), torch.int32), ((rows, number), log_weights.dtype), *2 * [((rows,), torch.float64)]
        sizes = [math.prod(size) * dtype.itemsize for size, dtype in places] + [cuda.resample_workspace(*shape)]
        buffers = [torch.full((size + 2 * MARGIN,), garbage, dtype=torch.uint8, device=device) for size in sizes]
        outs = [b[MARGIN:-MARGIN].view(dtype).view(size) for b, (size, dtype) in zip(buffers, places, strict=False)]
        before = log_weights.clone()
        cuda.resample(
            log_weights.data_ptr(), log_weights.dtype == torch.float64, *shape, keep_from, seed, step, stream,
            first_row, 0, 0,
            *(buffer[MARGIN:].data_ptr() for buffer in buffers), queue,
        )  # fmt: skip
    for buffer in buffers:
        assert (buffer[:MARGIN] == garbage).all() and (buffer[-MARGIN:] == garbage).all()
    assert torch.equal(log_weights.nan_to_num(0.5), before.nan_to_num(0.5))
    return outs[0], outs[1], outs[2], outs[3]


def assert_same(got: Results, expected: Results) -> None:
    """Equal to the last bit."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0.0, atol=0.0, equal_nan=True)


def check(log_weights: torch.Tensor, device: torch.device, scheme: str, **options) -> Results:
    """The kernel's results. They must equal those of the CPU backend."""
    expected = ops.resample(log_weights, scheme=scheme, check=False, backend="cpu", **options)
    assert_same(kernel(log_weights.to(device), scheme, **options), expected)
    return expected


def normal_weights(rows: int, particles: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * particles + rows)
    return (spread * torch.randn(rows, particles, generator=generator, dtype=torch.float64)).to(dtype)


def mostly_dead(rows: int, particles: int, dtype: torch.dtype) -> torch.Tensor:
    """Few living particles, side by side except for one."""
    weights = normal_weights(rows, particles, 1.0, dtype)
    place = torch.arange(particles)
    alive = (place >= particles // 2) & (place < particles // 2 + particles // 20 + 1) | (place == particles // 7)
    return weights.masked_fill(~alive, -math.inf)


KINDS = {
    "spread 1": lambda *shape: normal_weights(*shape, 1.0, torch.float32),
    "spread 4": lambda *shape: normal_weights(*shape, 4.0, torch.float64),
    "spread 10,000": lambda *shape: normal_weights(*shape, 1e4, torch.float32),  # one particle has all the weight
    "equal": lambda *shape: torch.full(shape, -3.0),
    "mostly dead": lambda *shape: mostly_dead(*shape, torch.float64),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


# --- the bits of the CPU ------------------------------------------------------------------------------------


# Each scheme with each kind of weights that may make it fail. Sizes above a limit take another kernel.
@every_scheme
@every_kind
def test_rows_of_one_launch(scheme, kind, cuda_device):
    longest = 2048 if scheme == "residual" else 4096
    for particles in (1, 3, 31, 1024, 1025, longest):  # around the size of the smaller block, and the longest short row
        for rows in (2,) if particles > 100 else (1, 5):
            weights = KINDS[kind](rows, particles)
            for num in (None, 1, particles // 3 + 1, min(2 * particles + 5, longest)):
                check(weights, cuda_device, scheme, num=num, **COUNTER)
            check(weights, cuda_device, scheme, sorted=False, **COUNTER)
            shape = rows, particles, particles, SCHEMES.index(scheme), True
            assert _native.module("cuda").resample_workspace(*shape) == 0


# The same for longer rows, where tables pass sums from tile to tile.
@every_scheme
@every_kind
def test_rows_of_many_tiles(scheme, kind, cuda_device):
    for rows, particles in ((3, 4097), (2, 20_001)):  # the first with one particle in its last tile
        weights = KINDS[kind](rows, particles)
        for num in (None, 1, particles // 3 + 1, 2 * particles + 5):
            check(weights, cuda_device, scheme, num=num, **COUNTER)
        check(weights, cuda_device, scheme, sorted=False, **COUNTER)


@every_scheme
@both_orders
def test_more_slots_than_a_block_fills(scheme, sorted, cuda_device):
    particles = 3 * SLOTS_OF_A_TILE + 777
    weights = torch.full((4, particles), -40.0)
    weights[0, particles // 2] = 0.0  # one particle gets all slots
    weights[1, 5 * TILE - 2 : 5 * TILE + 3] = 0.0  # neighbours in two tiles get them
    weights[2, ::TILE] = torch.linspace(0.0, 3.0, particles // TILE + 1)  # one particle in each tile gets them
    weights[3] = -1.0  # all alike, except that the last one gets as many as all others
    weights[3, -1] = math.log(particles) - 1.0
    ancestors = check(weights, cuda_device, scheme, sorted=sorted, seed=5)[0]
    assert (ancestors[0] == particles // 2).all()
    if sorted:
        for rows, other, number in ((2, 5, 50_000), (1, 3, SLOTS_OF_A_TILE + 1), (1, 7000, 60_001)):
            check(normal_weights(rows, other), cuda_device, scheme, num=number, seed=6)


def test_more_tiles_than_the_scan_takes_at_once(cuda_device):
    weights = normal_weights(1, 4100 * TILE + 5, 1.0, torch.float32)
    check(weights, cuda_device, "residual", sorted=False, seed=7)  # uses all four tables


@every_scheme
def test_thresholds_and_bad_rows(scheme, cuda_device):
    spreads = torch.tensor([0.0, 0.3, 1.0, 1.5, 3.0, 8.0]).repeat(2)[:, None]
    for particles, dtype in ((1, torch.float64), (5, torch.float32), (1030, torch.float64), (5000, torch.float32)):
        weights = normal_weights(12, particles, 1.0, dtype) * spreads.to(dtype)
        weights[7, particles // 2] = math.copysign(math.nan, -1.0)
        weights[8, particles - 1] = math.inf
        weights[9] = -math.inf
        weights[10, 0], weights[10, -1] = math.nan, math.inf
        kept = set()
        for threshold in (None, 0.0, 0.3, 0.7, 1.0):
            for sorted in (True, False):
                got = check(weights, cuda_device, scheme, ess_threshold=threshold, sorted=sorted, seed=1)
                assert got[3].isnan().tolist() == [row in (7, 8, 9, 10) for row in range(12)]
                kept.add(int((got[0] == torch.arange(particles)).all(1).sum()))
        assert len(kept) > 2 or particles < 1000  # some rows keep their particles, some do not
        got = check(weights, cuda_device, scheme, num=particles + 1)
        assert (got[0][7:11] == 0).all() and got[1][7:11].isnan().all()


@every_scheme
@both_orders
def test_the_workspace_may_hold_anything(scheme, sorted, cuda_device):
    weights = mostly_dead(2, 9000, torch.float32).to(cuda_device)
    first, *others = (kernel(weights, scheme, sorted=sorted, garbage=garbage) for garbage in (0, 0x7F, 0xFF))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@both_dtypes
def test_log_weights_at_any_address(dtype, cuda_device):
    memory = normal_weights(1, 3 * 5001 + 3, 1.0, dtype)
    for offset in (1, 2, 3):
        here, there = (values[0, offset : offset + 3 * 5001].view(3, -1) for values in (memory, memory.to(cuda_device)))
        assert_same(ops.resample(there, backend="cuda", seed=2), ops.resample(here, backend="cpu", seed=2))


# --- seeds and steps ----------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("particles", (50, 5000))
def test_a_seed_and_a_step_on_the_device(scheme, particles, cuda_device):
    weights = normal_weights(2, particles)
    there = weights.to(cuda_device)
    for seed, step in ((3, 4), (2**63 + 5, 2**32 - 1)):
        seed_there = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=cuda_device)
        step_there = torch.tensor(step, device=cuda_device)
        expected = ops.resample(weights, scheme=scheme, seed=seed, step=step, backend="cpu")
        for given in ((seed_there, step_there), (seed_there, step), (seed, step_there)):
            got = ops.resample(there, scheme=scheme, seed=given[0], step=given[1], backend="cuda")
            assert_same(got, expected)


def test_randn_takes_a_seed_and_a_step_on_the_device(cuda_device):
    seed, step = torch.tensor([-1], device=cuda_device), torch.tensor([7], device=cuda_device)
    z = ops.randn((50, 9), seed=seed, step=step, device=cuda_device, backend="cuda")
    assert torch.equal(z.cpu(), ops.randn((50, 9), seed=2**64 - 1, step=7, backend="cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@every_scheme
@both_orders
@pytest.mark.parametrize("particles", (1000, 100_000))
def test_a_replayed_graph_decides_anew_and_draws_from_the_seed_that_stands_there(scheme, sorted, particles):
    """A replay decides again whether to resample, and reads the seed again from the device."""
    spreads = torch.tensor([0.1, 2.0])[:, None].double()
    weights, seed = torch.empty(2, particles, dtype=torch.float64, device="cuda"), torch.tensor([0], device="cuda")
    options = dict(scheme=scheme, sorted=sorted, ess_threshold=0.5, check=False)
    weights.copy_(normal_weights(2, particles))
    ops.resample(weights, seed=seed, backend="cuda", **options)  # the first launch loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.resample(weights, seed=seed, backend="cuda", **options)
    for number, scale in ((5, spreads), (2**40, spreads.flip(0))):
        now = normal_weights(2, particles) * scale
        weights.copy_(now)
        seed.fill_(number)
        graph.replay()
        assert_same(results, ops.resample(now, seed=number, backend="cpu", **options))


# --- the operation ------------------------------------------------------------------------------------------


@every_scheme
def test_the_operation(scheme, cuda_device):
    weights = normal_weights(5, 300, dtype=torch.float32)
    there = weights.to(cuda_device)
    for options in (dict(), dict(num=7, seed=3), dict(ess_threshold=0.5, sorted=False, step=2, stream=1)):
        expected = ops.resample(weights, scheme=scheme, backend="cpu", **options)
        got = ops.resample(there.T.contiguous().T, scheme=scheme, backend="cuda", **options)
        assert_same(got, expected)
        assert all(out.is_contiguous() and out.device == there.device for out in got)
        alone = ops.resample(there[0], scheme=scheme, backend="cuda", **options)
        assert_same(tuple(out[None] for out in alone), tuple(out[:1] for out in expected))
    for num in (None, 5):
        empty = ops.resample(there[:0, :3], num=num, scheme=scheme, backend="cuda")
        assert [tuple(out.shape) for out in empty] == [(0, num or 3), (0, num or 3), (0,), (0,)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_draws_alone_as_in_a_larger_call(cuda_device, scheme):
    for particles in (7, 5000):  # a short row in one launch, a long one in tiles
        check(normal_weights(2, particles), cuda_device, scheme, seed=3, step=1, first_row=5)


def test_bad_rows_are_named(cuda_device):
    weights = torch.zeros(3, 4, device=cuda_device)
    for value, what in ((math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no live particle")):
        weights[1] = value
        for num in (None, 6):
            with pytest.raises(ValueError, match=f"log_weights: .*got {what}.* in row 1"):
                ops.resample(weights, num=num, backend="cuda")
        assert ops.resample(weights, check=False, backend="cuda")[3].isnan().tolist() == [False, True, False]


def test_auto_takes_the_kernel_and_2_to_the_31_particles_the_reference(cuda_device):
    for dtype in (torch.float32, torch.float64):
        assert explain("resample", cuda_device, dtype).splitlines()[0].endswith(": cuda")
    assert "this is torch.float16" in why_not("cuda", "resample", device=cuda_device, dtype=torch.float16)
    many = torch.zeros(1, device=cuda_device).expand(1 << 31)
    with pytest.raises(RuntimeError, match="cuda counts particles in 31 bits, and there are 2147483648"):
        ops.resample(many, backend="cuda")


def test_what_the_binding_refuses(cuda_device):
    module = _native.module("cuda")
    valid = [0, False, 0, 3, 3, 0, True, math.inf, *12 * [0]]
    module.resample(*valid)
    for place, value in (
        (2, 1 << 31),  # rows
        (3, 0),
        (3, (1 << 31) + 1),
        (4, 0),
        (5, 4),
        (9, 1 << 32),
        (10, 1 << 16),
        (11, (1 << 48) + 1),
    ):
        with pytest.raises(ValueError, match="must be below"):
            module.resample(*valid[:place], value, *valid[place + 1 :])
