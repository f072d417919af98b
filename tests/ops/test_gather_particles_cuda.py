"""The CUDA kernels of gather_particles_ against plain indexing, by emulation or on a GPU."""

import itertools

import pytest
import torch
from ancestor_maps import MAPS, bytes_of, indexed, survivors, uniform

from fastguide import ops
from fastguide.ops import _native

MARGIN = 64
MOVES, ENTANGLED = 1, 2  # the flags of a row
both_indices = pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))


def gather(ancestors, *states, device, offset=0, workspace_bytes=None):
    """The moved uint8 states ``[B, K, bytes]``, and the flags. Each state is in a buffer, ``offset`` bytes from an
    aligned address. The margins of the buffer must not change."""
    rows, particles = ancestors.shape
    ancestors = ancestors.to(device)
    begin = MARGIN + offset
    buffers = [torch.full((begin + s.numel() + MARGIN,), 0xA5, dtype=torch.uint8, device=device) for s in states]
    views = [b[begin : begin + s.numel()].view(s.shape) for b, s in zip(buffers, states, strict=True)]
    for view, state in zip(views, states, strict=True):
        view.copy_(state)
    arrays = [(view.data_ptr(), view.shape[2]) for view in views]
    cuda = _native.module("cuda")
    if workspace_bytes is None:
        workspace_bytes = cuda.gather_workspace(rows, particles, arrays)
    workspace = torch.full((workspace_bytes + MARGIN,), 0xA5, dtype=torch.uint8, device=device)
    flags = torch.full((rows + 3,), -1, dtype=torch.int32, device=device)
    wide = ancestors.dtype == torch.int64
    before = ancestors.clone()
    with _native.cuda_stream(device) as queue:
        cuda.gather_particles(
            ancestors.data_ptr(), wide, rows, particles, arrays, flags.data_ptr(), workspace.data_ptr(),
            workspace_bytes, queue,
        )  # fmt: skip
    assert flags[-1] == -1 and (workspace[workspace_bytes:] == 0xA5).all()
    for buffer in buffers:
        assert (buffer[:begin] == 0xA5).all() and (buffer[buffer.numel() - MARGIN :] == 0xA5).all()
    assert torch.equal(ancestors, before)
    return [view.cpu() for view in views], flags[:-1].tolist()


def check(ancestors, *states, **how):
    moved, flags = gather(ancestors, *states, **how)
    for got, state in zip(moved, states, strict=True):
        assert torch.equal(got, indexed(ancestors, state))
    return flags


# --- values -------------------------------------------------------------------------------------------------


@both_indices
def test_every_map_of_five(index_dtype, cuda_device):
    ancestors = torch.tensor(list(itertools.product(range(5), repeat=5)), dtype=index_dtype)
    check(ancestors, *(bytes_of(len(ancestors), 5, size, seed=size) for size in (1, 3, 8)), device=cuda_device)


# The size decides the unit, 1 to 16 bytes. Each with one unit in a particle, with few, and with more than 32 threads.
@pytest.mark.parametrize("size", (1, 3, 513, 2, 6, 514, 4, 12, 516, 8, 24, 520, 16, 48, 528, 4096))
def test_particles_of_every_size(size, cuda_device):
    ancestors = torch.stack([make(70) for make in MAPS.values()]).int()
    check(ancestors, bytes_of(len(ancestors), 70, size), device=cuda_device)


# The address decides the unit too: units of 1, 2, 4 and 8 bytes, in particles of one, few and many units.
@pytest.mark.parametrize("offset", (1, 2, 4, 8))
@pytest.mark.parametrize("size", (16, 48, 1024))
def test_addresses_that_are_not_aligned(offset, size, cuda_device):
    ancestors = torch.stack([make(50) for make in MAPS.values()]).int()
    check(ancestors, bytes_of(len(ancestors), 50, size), offset=offset, device=cuda_device)


# Sizes around a warp, a block, and all elements that a block takes in one round.
@pytest.mark.parametrize("particles", (1, 2, 3, 31, 129, 1023, 1024, 1025, 5000))
def test_numbers_of_particles(particles, cuda_device):
    ancestors = torch.stack([make(particles) for make in MAPS.values()] * 2).int()
    check(ancestors, bytes_of(len(ancestors), particles, 6), device=cuda_device)


@pytest.mark.parametrize(("rows", "particles", "size"), ((2, 300_000, 24), (3, 15_000, 528), (600, 4, 16_384)))
def test_more_than_a_round_of_the_grid(rows, particles, size, cuda_device):
    ancestors = torch.stack([survivors(particles, b) for b in range(rows)]).int()
    check(ancestors, bytes_of(rows, particles, size), device=cuda_device)


# --- kinds of rows ------------------------------------------------------------------------------------------


def test_rows_are_told_apart(cuda_device):
    ancestors = torch.stack([make(2000) for make in MAPS.values()]).int()
    *flags, of_all, outside = check(ancestors, bytes_of(len(ancestors), 2000, 4), device=cuda_device)
    plain = ("survivors in place", "the first", "the last")
    kinds = {name: MOVES if name in plain else MOVES | ENTANGLED for name in MAPS} | {"identity": 0}
    assert dict(zip(MAPS, flags, strict=True)) == kinds
    assert (of_all, outside) == (MOVES | ENTANGLED, 0)


def test_resamples_own_order_moves_without_the_workspace(cuda_device):
    log_weights = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    ancestors = ops.resample(log_weights, seed=1, sorted=False, ess_threshold=0.3)[0]
    *flags, of_all, outside = check(ancestors, bytes_of(4, 1000, 100), device=cuda_device)
    identity = (ancestors == torch.arange(1000)).all(1)
    assert flags == [0 if same else MOVES for same in identity] and (of_all, outside) == (max(flags), 0)


# --- the workspace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", (1, 2, 3, 7, 25, 26, 60))  # 100 bytes are 25 columns of 4-byte units
def test_a_workspace_smaller_than_the_state(columns, cuda_device):
    ancestors = torch.stack([make(40) for make in reversed(MAPS.values())]).int()  # the first rows need no workspace
    states = [bytes_of(len(ancestors), 40, size) for size in (4, 100, 25)]
    check(ancestors, *states, device=cuda_device, workspace_bytes=columns * 40 * 4 + 3)


def test_a_workspace_without_room(cuda_device):
    ancestors = MAPS["uniform"](40)[None].int()
    with pytest.raises(ValueError, match="workspace must hold 640 bytes, got 639"):
        gather(ancestors, bytes_of(1, 40, 32), device=cuda_device, workspace_bytes=639)


@pytest.mark.parametrize(
    ("rows", "particles", "sizes", "expected"),
    (
        (2, 100, (8, 4), 1600),  # the size of the state
        (1, 16384, (12288,), 16384 * 12288 // 64),
        (1, 16384, (12288, 4 * 12288, 1), 16384 * 12288 // 16),  # 1/64 of the largest state
        (1, 2_000_000, (8,), 16_000_000),
        (5, 100_000, (160,), 2**21),
        (5, 200_000, (160,), 200_000 * 16),
        (3, 0, (8,), 0),
        (2, 5, (), 0),
    ),
)
def test_what_a_call_asks_for(rows, particles, sizes, expected, cuda_device):
    assert _native.module("cuda").gather_workspace(rows, particles, [(0, size) for size in sizes]) == expected


# --- ancestors out of range ---------------------------------------------------------------------------------


@both_indices
@pytest.mark.parametrize("particles", (1, 2, 1025))
def test_nothing_moves_if_one_is_out_of_range(index_dtype, particles, cuda_device):
    good = torch.stack([MAPS["the first"](particles), MAPS["uniform"](particles)]).to(index_dtype)
    state, info = bytes_of(2, particles, 20), torch.iinfo(index_dtype)
    for value, place in itertools.product((-1, particles, info.min, info.max), (0, particles, 2 * particles - 1)):
        ancestors = good.clone()
        ancestors.view(-1)[place] = value
        (moved,), flags = gather(ancestors, state, device=cuda_device)
        assert flags[-1] == 1
        assert torch.equal(moved, state)


def test_the_operation_refuses_them(cuda_device):
    ancestors = torch.tensor([[0, 0, 2], [1, 7, -1]], device=cuda_device)
    state = torch.rand(2, 3, 4, device=cuda_device)
    before = state.clone()
    with pytest.raises(ValueError, match=r"ancestors: expected values in \[0, 3\), got 7 at 4"):
        ops.gather_particles_(ancestors, state, backend="cuda")
    ops.gather_particles_(ancestors, state, check=False, backend="cuda")  # raises nothing, and moves nothing
    assert torch.equal(state, before)


def test_bounds(cuda_device):
    for rows, particles, message in (
        (1, 2**31, "particles must be below 2147483648"),
        (2**32, 1, "rows must be below"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.module("cuda").gather_particles(0, False, rows, particles, [], 0, 0, 0, 0)


# --- the operation ------------------------------------------------------------------------------------------

DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.complex128)


# Particles of 1 to 480 bytes, and of no bytes. More than 8 states take several launches.
@pytest.mark.parametrize("event", ((), (3,), (2, 3, 5), (7, 0)))
@pytest.mark.parametrize("number", (0, 1, 20))
def test_many_states_of_any_dtype(event, number, cuda_device):
    ancestors = torch.stack([survivors(40), uniform(40), torch.arange(40)]).int()
    states = [(100 * torch.randn(3, 40, *event)).to(DTYPES[i % len(DTYPES)]) for i in range(number)]
    got = [state.to(cuda_device, copy=True) for state in states]
    assert ops.gather_particles_(ancestors.to(cuda_device), *got, backend="cuda") is None
    ops.gather_particles_(ancestors, *states, backend="reference")
    for moved, expected in zip(got, states, strict=True):
        assert torch.equal(moved.cpu(), expected)


def test_one_row_without_observations_and_strided_ancestors(cuda_device):
    ancestors, state = torch.stack([uniform(30), survivors(30)], 1).to(cuda_device)[:, 0], torch.randn(30, 5)
    moved = state.to(cuda_device, copy=True)
    assert not ancestors.is_contiguous()
    ops.gather_particles_(ancestors, moved, backend="cuda")
    assert torch.equal(moved.cpu(), state[ancestors.cpu()])


@pytest.mark.parametrize("shape", ((0, 3), (3, 0), (0, 0)))
def test_no_rows_or_no_particles(shape, cuda_device):
    ancestors, state = (torch.zeros(shape, dtype=d, device=cuda_device) for d in (torch.int32, torch.float32))
    ops.gather_particles_(ancestors, state, backend="cuda")


def test_states_that_share_memory_are_refused(cuda_device):
    memory = torch.arange(33.0, device=cuda_device)
    with pytest.raises(ValueError, match=r"states\[1\]: expected memory of its own, .* overlaps states\[0\]"):
        ops.gather_particles_(uniform(30).to(cuda_device), memory[:30], memory[1:31], backend="cuda")
    assert torch.equal(memory.cpu(), torch.arange(33.0))


@pytest.mark.parametrize("order", ((0, 2, 1), (1, 2, 0)))  # one is moved in place, the other through a copy
def test_views(order, cuda_device):
    ancestors, state = uniform(30), torch.randn(30, 30, 30)
    moved = state.to(cuda_device, copy=True).permute(order)
    ops.gather_particles_(ancestors.to(cuda_device), moved, backend="cuda")
    assert torch.equal(moved.cpu(), state.permute(order)[ancestors])


def test_autograd_learns_of_the_change(cuda_device):
    x, ancestors = torch.ones(3, 2, device=cuda_device, requires_grad=True), torch.tensor([1, 1, 2], device=cuda_device)
    y = x * 2.0
    loss = (y * y).sum()
    with torch.no_grad():
        ops.gather_particles_(ancestors, y, backend="cuda")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # its tensors have no version counter
        state = torch.arange(3.0, device=cuda_device)
        ops.gather_particles_(ancestors, state, backend="cuda")
        assert state.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", (3, 16, 3072))
def test_one_graph_serves_every_kind_of_row(size):
    ancestors = torch.zeros(5, 300, dtype=torch.int32, device="cuda")
    state = torch.zeros(5, 300, size, dtype=torch.uint8, device="cuda")
    ops.gather_particles_(ancestors, state, check=False, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather_particles_(ancestors, state, check=False, backend="cuda")
    torch.cuda.synchronize()
    for seed, maps in enumerate((["identity"] * 5, ["survivors in place"] * 5, list(MAPS)[:5], list(MAPS)[5:10])):
        here = torch.stack([MAPS[name](300) for name in maps]).int()
        before = bytes_of(5, 300, size, seed=seed)
        ancestors.copy_(here)
        state.copy_(before)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(state.cpu(), indexed(here, before))
