"""The gather kernel against plain indexing: every map, any bytes, and no memory that it need not take."""

import itertools

import pytest
import torch
from maps import MAPS, bytes_of, indexed, survivors, uniform

from fastguide import compiled, ops

_cpu = compiled.module("cpu")
MARGIN = 64
ASIDE = 4096  # bytes of a particle that the kernel moves at a time where there is an order


def gather(ancestors: torch.Tensor, *states: torch.Tensor, threads: int = 1) -> tuple[list[torch.Tensor], int, int]:
    """What becomes of uint8 states ``[B, K, bytes]``, each in the middle of a buffer whose margins must stay as they
    were; the kernel's two numbers."""
    rows, particles = ancestors.shape
    buffers = [torch.full((state.numel() + 2 * MARGIN,), 0xA5, dtype=torch.uint8) for state in states]
    views = [b[MARGIN : MARGIN + s.numel()].view(s.shape) for b, s in zip(buffers, states, strict=True)]
    for view, state in zip(views, states, strict=True):
        view.copy_(state)
    arrays = [(view.data_ptr(), view.shape[2]) for view in views]
    wide = ancestors.dtype == torch.int64
    before = ancestors.clone()
    bad, scratch = _cpu.gather_particles(ancestors.data_ptr(), wide, rows, particles, arrays, threads)
    for buffer in buffers:
        assert (buffer[:MARGIN] == 0xA5).all() and (buffer[buffer.numel() - MARGIN :] == 0xA5).all()
    assert torch.equal(ancestors, before)
    return views, bad, scratch


every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
both_indices = pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))


# --- values -------------------------------------------------------------------------------------------------


@both_indices
def test_every_map_of_five(index_dtype):
    """All 3,125, each a row: ends that lead into cycles, cycles of every length, several of them."""
    ancestors = torch.tensor(list(itertools.product(range(5), repeat=5)), dtype=index_dtype)
    states = [bytes_of(len(ancestors), 5, size, seed=size) for size in (1, 3, 8)]
    moved, bad, _ = gather(ancestors, *states)
    assert bad == -1
    for got, state in zip(moved, states, strict=True):
        assert torch.equal(got, indexed(ancestors, state))


@every_map
@both_indices
@pytest.mark.parametrize("size", (*range(1, 18), 24, 31, 32, 33, 64, 100))
def test_sizes(make, index_dtype, size):
    ancestors = make(300)[None].to(index_dtype)
    state = bytes_of(1, 300, size)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


@every_map
@pytest.mark.parametrize("size", (ASIDE - 1, ASIDE, ASIDE + 1, 3 * ASIDE + 5))
def test_large_particles_move_in_pieces(make, size):
    ancestors = make(20)[None].int()
    state = bytes_of(1, 20, size)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


@every_map
@pytest.mark.parametrize("particles", (1, 2, 3, 1023, 1024, 1025, 5000))
def test_numbers_of_particles(make, particles):
    ancestors = torch.stack([make(particles)] * 2).int()
    state = bytes_of(2, particles, 6)
    (moved,), _, _ = gather(ancestors, state)
    assert torch.equal(moved, indexed(ancestors, state))


def test_rows_of_every_kind_beside_each_other():
    ancestors = torch.stack([make(50) for make in MAPS.values()] * 2).int()
    states = [bytes_of(len(ancestors), 50, size) for size in (4, 40, ASIDE + 8)]
    moved, _, _ = gather(ancestors, *states)
    for got, state in zip(moved, states, strict=True):
        assert torch.equal(got, indexed(ancestors, state))


@pytest.mark.parametrize("shape", ((0, 3), (3, 0), (0, 0)))
def test_nothing(shape):
    assert gather(torch.zeros(shape, dtype=torch.int32), bytes_of(*shape, 4))[1:] == (-1, 0)
    assert gather(torch.zeros(2, 3, dtype=torch.int32))[1] == -1
    (moved,), _, _ = gather(torch.zeros(2, 3, dtype=torch.int32), bytes_of(2, 3, 0))
    assert moved.shape == (2, 3, 0)


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


@pytest.mark.parametrize("name", _cpu.instruction_sets())
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
        _cpu.gather_particles(0, False, 1, 2**31, [], 1)


# check=False spares a GPU the wait; here looking costs nothing.
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


@pytest.mark.parametrize("make", (survivors, uniform))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_state_given_twice_is_moved_twice(make, backend):
    ancestors, state = make(30), torch.randn(30, 5)
    expected = state[ancestors][ancestors]
    ops.gather_particles_(ancestors, state, state, backend=backend)
    assert torch.equal(state, expected)


def test_views_are_not_for_the_kernel_and_it_says_so():
    base = torch.randn(2, 5, 30)
    view, ancestors = base.transpose(1, 2), torch.stack([uniform(30), survivors(30)])
    expected = indexed(ancestors, view)
    with pytest.raises(RuntimeError, match=r"cpu moves plain bytes, and states\[1\] is not contiguous"):
        ops.gather_particles_(ancestors, torch.zeros(2, 30), view, backend="cpu")
    ops.gather_particles_(ancestors, torch.zeros(2, 30), view)
    assert torch.equal(base.transpose(1, 2), expected)


@both_indices
def test_ancestors_among_the_states(index_dtype):
    ancestors, state = uniform(30).to(index_dtype), torch.randn(30, 2)
    expected, moved = ancestors[ancestors.long()], state[ancestors.long()]
    with pytest.raises(RuntimeError, match=r"states\[0\] shares memory with ancestors"):
        ops.gather_particles_(ancestors, ancestors, backend="cpu")
    ops.gather_particles_(ancestors, ancestors, state)  # they say what moves as they were when called
    assert torch.equal(ancestors, expected) and torch.equal(state, moved)


def test_autograd_learns_of_the_change():
    x, ancestors = torch.ones(3, 2, requires_grad=True), torch.tensor([1, 1, 2])
    y = x * 2.0
    loss = (y * y).sum()
    with torch.no_grad():
        ops.gather_particles_(ancestors, y, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # whose tensors count no versions
        state = torch.arange(3.0)
        ops.gather_particles_(ancestors, state, backend="cpu")
        assert state.tolist() == [1.0, 1.0, 2.0]
