"""The gather kernel against plain indexing: every kind of ancestors, any number of bytes, and no needless memory."""

import itertools

import pytest
import torch
from ancestor_maps import MAPS, bytes_of, indexed, survivors, uniform

from fastguide import ops
from fastguide.ops import _native

MARGIN = 64
ASIDE = 4096  # bytes of a particle that the kernel moves at a time if the copies have an order


def gather(ancestors: torch.Tensor, *states: torch.Tensor, threads: int = 1) -> tuple[list[torch.Tensor], int, int]:
    """The moved uint8 states ``[B, K, bytes]``, and the kernel's two numbers. Each state is in the middle of a buffer,
    whose margins must not change."""
    rows, particles = ancestors.shape
    buffers = [torch.full((state.numel() + 2 * MARGIN,), 0xA5, dtype=torch.uint8) for state in states]
    views = [b[MARGIN : MARGIN + s.numel()].view(s.shape) for b, s in zip(buffers, states, strict=True)]
    for view, state in zip(views, states, strict=True):
        view.copy_(state)
    arrays = [(view.data_ptr(), view.shape[2]) for view in views]
    wide = ancestors.dtype == torch.int64
    before = ancestors.clone()
    bad, scratch = _native.module("cpu").gather_particles(ancestors.data_ptr(), wide, rows, particles, arrays, threads)
    for buffer in buffers:
        assert (buffer[:MARGIN] == 0xA5).all() and (buffer[buffer.numel() - MARGIN :] == 0xA5).all()
    assert torch.equal(ancestors, before)
    return views, bad, scratch


every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
both_indices = pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))


# --- values -------------------------------------------------------------------------------------------------


@both_indices
def test_every_map_of_five(index_dtype):
    """All 3,125 maps, one in each row. They have chains that lead into cycles, cycles of every length, and several
    cycles."""
    ancestors = torch.tensor(list(itertools.product(range(5), repeat=5)), dtype=index_dtype)
    states = [bytes_of(len(ancestors), 5, size, seed=size) for size in (1, 3, 8)]
    moved, bad, _ = gather(ancestors, *states)
    assert bad == -1
    for got, state in zip(moved, states, strict=True):
        assert torch.equal(got, indexed(ancestors, state))


# The nine sizes with their own code, then two that share the general code. One row for each map.
@both_indices
@pytest.mark.parametrize("size", (1, 2, 4, 8, 12, 16, 24, 32, 64, 3, 100))
def test_particles_of_every_size(index_dtype, size):
    ancestors = torch.stack([make(300) for make in MAPS.values()]).to(index_dtype)
    state = bytes_of(len(ancestors), 300, size)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


@pytest.mark.parametrize("size", (ASIDE - 1, ASIDE, ASIDE + 1, 3 * ASIDE + 5))
def test_large_particles_move_in_pieces(size):
    ancestors = torch.stack([make(20) for make in MAPS.values()]).int()
    state = bytes_of(len(ancestors), 20, size)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


# Sizes around a block, which is 1024 particles.
@pytest.mark.parametrize("particles", (1, 2, 3, 1023, 1024, 1025, 5000))
def test_numbers_of_particles(particles):
    ancestors = torch.stack([make(particles) for make in MAPS.values()] * 2).int()
    state = bytes_of(len(ancestors), particles, 6)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


def test_rows_of_every_kind_beside_each_other():
    ancestors = torch.stack([make(50) for make in MAPS.values()] * 2).int()
    states = [bytes_of(len(ancestors), 50, size) for size in (4, 40, ASIDE + 8)]
    moved, _, _ = gather(ancestors, *states)
    for got, state in zip(moved, states, strict=True):
        assert torch.equal(got, indexed(ancestors, state))


@pytest.mark.parametrize("shape", ((0, 3), (3, 0), (0, 0)))
def test_no_rows_or_no_particles(shape):
    assert gather(torch.zeros(shape, dtype=torch.int32), bytes_of(*shape, 4))[1:] == (-1, 0)
    assert gather(torch.zeros(2, 3, dtype=torch.int32))[1] == -1
    (moved,), _, _ = gather(torch.zeros(2, 3, dtype=torch.int32), bytes_of(2, 3, 0))
    assert moved.shape == (2, 3, 0)


# One row that threads share, few rows, few large particles, and hundreds of rows. One call for each map.
@every_map
@pytest.mark.parametrize(
    "rows, particles, size", ((1, 600_000, 4), (3, 200_000, 5), (2, 300, ASIDE + 100), (999, 700, 8))
)
def test_threads_move_the_same(make, rows, particles, size):
    ancestors = torch.stack([make(particles)] * rows).int()
    state = bytes_of(rows, particles, size)
    expected = indexed(ancestors, state)
    for threads in (1, 2, 3):
        (moved,), _, _ = gather(ancestors, state, threads=threads)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("name", _native.instruction_sets())
@both_indices
def test_every_instruction_set(name, index_dtype, instruction_set):
    ancestors = torch.stack([make(1500) for make in MAPS.values()]).to(index_dtype)
    state = bytes_of(len(ancestors), 1500, 8)
    with instruction_set(name):
        (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("survivors in place", "identity", "the first", "the last"))
def test_survivors_in_place_need_no_memory(name):
    ancestors = torch.stack([MAPS[name](1000)] * 3).int()
    assert gather(ancestors, bytes_of(3, 1000, 100))[2] == 0


def test_resamples_own_order_needs_no_memory():
    log_weights = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    ancestors = ops.resample(log_weights, seed=1, sorted=False)[0]
    _, _, scratch = gather(ancestors, bytes_of(4, 1000, 100))
    assert scratch == 0 and (ancestors != torch.arange(1000)).float().mean() > 0.3


def test_memory_is_of_indices_never_of_particles():
    ascending, tangled = (MAPS[name](1000)[None].int() for name in ("ascending", "uniform"))
    for size in (1, 5000):
        state = bytes_of(1, 1000, size)
        assert 0 < gather(ascending, state)[2] < 100
        assert 8000 <= gather(tangled, state)[2] < 8100  # two indices for each particle
    beside = torch.cat([MAPS["survivors in place"](1000)[None].int()] * 9 + [tangled])
    assert gather(beside, bytes_of(10, 1000, 5))[2] < 8100


# --- ancestors out of range ---------------------------------------------------------------------------------


@both_indices
@pytest.mark.parametrize("particles", (1, 2, 1025, 700_000))
@pytest.mark.parametrize("threads", (1, 2))
def test_the_first_bad_ancestor_is_told_and_nothing_moves(index_dtype, particles, threads):
    good = torch.stack([MAPS["the first"](particles)] * 2).to(index_dtype)
    state = bytes_of(2, particles, 2)
    info = torch.iinfo(index_dtype)
    for value in (-1, particles, info.min, info.max):
        for places in ([0], [2 * particles - 1], [particles - 1, particles], [particles // 2, 2 * particles - 1]):
            ancestors = good.clone()
            ancestors.view(-1)[places] = value
            (moved,), bad, _ = gather(ancestors, state, threads=threads)
            assert bad == places[0]
            assert torch.equal(moved, state)


def test_int32_does_not_count_further():
    with pytest.raises(ValueError, match="particles must be below 2147483648"):
        _native.module("cpu").gather_particles(0, False, 1, 2**31, [], 1)


# check=False avoids a wait for a GPU. On the CPU ancestors are always checked.
@pytest.mark.parametrize(("check", "backend"), ((True, "cpu"), (False, "cpu"), (True, "reference")))
def test_the_operation_refuses_them(check, backend):
    ancestors, state = torch.tensor([[0, 1, 2], [1, 7, -1]]), torch.rand(2, 3, 4)
    before = state.clone()
    with pytest.raises(ValueError, match=r"ancestors: expected values in \[0, 3\), got 7 at 4"):
        ops.gather_particles_(ancestors, state, check=check, backend=backend)
    assert torch.equal(state, before)


# --- the operation ------------------------------------------------------------------------------------------

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


@pytest.mark.parametrize("event", ((), (1,), (3,), (2, 3, 5), (7, 0)))
@pytest.mark.parametrize("number", (0, 1, 3))
def test_many_states_of_any_dtype(event, number):
    ancestors = torch.stack([survivors(40), uniform(40), torch.arange(40)]).int()
    for first in range(0, len(DTYPES), number or len(DTYPES)):
        states = [(100 * torch.randn(3, 40, *event)).to(dtype) for dtype in DTYPES[first : first + number]]
        expected = [state.clone() for state in states]
        assert ops.gather_particles_(ancestors, *states, backend="cpu") is None
        ops.gather_particles_(ancestors, *expected, backend="reference")
        for got, want in zip(states, expected, strict=True):
            assert torch.equal(got, want)


def test_one_row_without_observations():
    ancestors, state = uniform(30), torch.randn(30, 5)
    expected = state[ancestors]
    ops.gather_particles_(ancestors, state, backend="cpu")
    assert torch.equal(state, expected)


def test_strided_ancestors():
    ancestors, state = torch.stack([uniform(30)] * 2, dim=1).T, torch.randn(2, 30, 5)
    assert not ancestors.is_contiguous()
    expected = indexed(ancestors, state)
    ops.gather_particles_(ancestors, state, backend="cpu")
    assert torch.equal(state, expected)


def test_torchs_threads_are_used(threads):
    ancestors, state = torch.stack([uniform(300)] * 3), torch.randn(3, 300, 2000)
    expected = indexed(ancestors, state)
    with threads(2):
        ops.gather_particles_(ancestors, state, backend="cpu")
    assert torch.equal(state, expected)


# States [K, *event] with K = 5, as views of 120 numbers in memory.
VIEWS = {
    "channels last": lambda m: m.view(5, 4, 3, 2).permute(0, 3, 1, 2),  # in place
    "particles last": lambda m: m.view(24, 5).T,
    "particles in the middle": lambda m: m.view(4, 5, 6).permute(1, 2, 0),
    "every second": lambda m: m.view(5, 24)[:, ::2],
    "turned and cut": lambda m: m.view(5, 4, 6).transpose(1, 2)[:, 1:4],
    "interleaved, without an order of strides": lambda m: m.as_strided((5, 2), (2, 3)),
    "one element": lambda m: m.as_strided((5, 1, 3), (24, 0, 2)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
@pytest.mark.filterwarnings("error")
def test_views_move_in_place_and_nothing_beside_them(view, backend):
    ancestors, memory = torch.tensor([1, 2, 0, 0, 3]), torch.randn(120)
    expected, beside = memory.clone(), torch.arange(5)
    view(expected).copy_(view(memory)[ancestors])
    ops.gather_particles_(ancestors, beside, view(memory), backend=backend)
    assert torch.equal(memory, expected) and torch.equal(beside, ancestors)


def test_only_views_that_are_not_dense_are_copied(monkeypatch):
    given, cpu = [], _native.module("cpu")

    class Recorder:
        def gather_particles(self, ancestors, wide, rows, particles, states, threads):
            given.extend(address for address, _ in states)
            return cpu.gather_particles(ancestors, wide, rows, particles, states, threads)

    monkeypatch.setitem(_native._modules, "cpu", (Recorder(), ""))
    for name, in_place in (("channels last", True), ("particles last", False)):
        view = VIEWS[name](torch.randn(120))
        ops.gather_particles_(torch.arange(5).flip(0), view)
        assert (given.pop() == view.data_ptr()) == in_place


@pytest.mark.parametrize("turn", (lambda x: x, lambda x: x.view(3, 4).T))
@pytest.mark.filterwarnings("error")
def test_views_of_the_negative(turn):
    """The kernel moves the bytes of a negative view. A copy has the sign applied, and copying back removes it."""
    memory = torch.arange(12.0)
    state = turn(torch._neg_view(memory))
    ancestors = torch.arange(len(state)).flip(0)
    expected = turn(-memory)[ancestors]
    ops.gather_particles_(ancestors, state)
    assert torch.equal(state, expected) and (memory.sort().values == torch.arange(12.0)).all()


def test_views_made_in_inference_mode():
    with torch.inference_mode():
        state = torch.arange(12.0).view(3, 4).T
    ops.gather_particles_(torch.tensor([3, 1, 1, 0]), state)
    assert state[:, 0].tolist() == [3.0, 1.0, 1.0, 0.0]
    with pytest.raises(RuntimeError, match=r"states\[1\]: torch changes a tensor made in inference_mode only inside"):
        ops.gather_particles_(torch.tensor([3, 1, 1, 0]), torch.zeros(4), state, backend="reference")


def test_a_derivative_in_forward_mode_moves_with_the_state():
    ancestors, x = torch.tensor([1, 1, 2]), torch.tensor([1.0, 2.0, 3.0])

    def moved(x):
        x = 2.0 * x
        ops.gather_particles_(ancestors, x)
        return x

    value, slope = torch.func.jvp(moved, (x,), (torch.tensor([5.0, 6.0, 7.0]),))
    assert value.tolist() == [4.0, 4.0, 6.0] and slope.tolist() == [12.0, 12.0, 14.0]


# --- memory that is shared ----------------------------------------------------------------------------------

OVERLAPS = {
    "twice the same": (lambda m: (m[:4], m[:4]), r"states\[2\]: expected memory of its own, .* overlaps states\[1\]"),
    "shifted": (lambda m: (m[:4], m[3:7]), r"states\[2\]: .* overlaps states\[1\]"),
    "other bytes of the same": (lambda m: (m[:4], m.view(torch.uint8)[13:17]), r"states\[2\]: .* overlaps states\[1\]"),
    "columns": (lambda m: (m.view(4, 5)[:, :3], m.view(4, 5)[:, 2:]), r"states\[2\]: .* overlaps states\[1\]"),
    "expanded": (lambda m: (m[:1].expand(4),), r"states\[1\]: expected elements that share no memory, got shape \[4\]"),
    "windows": (lambda m: (m.as_strided((4, 3), (1, 1)),), r"states\[1\]: .* share no memory, .* strides \[1, 1\]"),
    "windows that skip": (lambda m: (m.as_strided((4, 2), (2, 4)),), r"states\[1\]: .* strides \[2, 4\]"),
}


@pytest.mark.parametrize(("make", "message"), OVERLAPS.values(), ids=OVERLAPS.keys())
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_states_that_share_memory_are_refused_and_nothing_moves(make, message, backend):
    first, memory = torch.arange(4.0), torch.arange(20.0)
    with pytest.raises(ValueError, match=message):
        ops.gather_particles_(torch.tensor([1, 1, 0, 2]), first, *make(memory), backend=backend)
    assert torch.equal(first, torch.arange(4.0)) and torch.equal(memory, torch.arange(20.0))


@pytest.mark.parametrize(
    "parts",
    [
        lambda m: (m[:, :3], m[:, 3:]),
        lambda m: (m[:, ::2], m[:, 1::2]),
        lambda m: (m[:, 5:], m[:, :0], m[:, :5].view(torch.uint8)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_parts_of_one_buffer_move_as_the_whole(parts):
    ancestors, memory = torch.tensor([1, 2, 0, 2]), torch.randn(4, 6)
    expected = memory[ancestors]
    ops.gather_particles_(ancestors, *parts(memory))
    assert torch.equal(memory, expected)


@both_indices
def test_ancestors_among_the_states(index_dtype):
    ancestors, state = uniform(30).to(index_dtype), torch.randn(30, 2)
    expected, moved = ancestors[ancestors.long()], state[ancestors.long()]
    ops.gather_particles_(ancestors, ancestors, state, backend="cpu")  # the ancestors at the time of the call count
    assert torch.equal(ancestors, expected) and torch.equal(state, moved)


def test_autograd_learns_of_the_change():
    x, ancestors = torch.ones(3, 2, requires_grad=True), torch.tensor([1, 1, 2])
    y = x * 2.0
    loss = (y * y).sum()
    with torch.no_grad():
        ops.gather_particles_(ancestors, y, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # its tensors have no version counter
        state = torch.arange(3.0)
        ops.gather_particles_(ancestors, state, backend="cpu")
        assert state.tolist() == [1.0, 1.0, 2.0]
