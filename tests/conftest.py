"""What all tests share: memory that is poisoned before it is written, thread counts, tolerances."""

from __future__ import annotations

import contextlib
import os
import shutil

import emulated_cuda
import fresh
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before fastguide is imported

from fastguide import memory
from fastguide.ops import _native, _operation

# Relative and absolute, for one pass over states of order one: the arithmetic is in float32 and rounded once
# to the state's dtype (in float64 throughout for float64).
TOLERANCES = {
    torch.float64: dict(rtol=1e-14, atol=1e-14),
    torch.float32: dict(rtol=5e-7, atol=5e-7),
    torch.float16: dict(rtol=2**-11, atol=2**-11),
    torch.bfloat16: dict(rtol=2**-8, atol=2**-8),
}


ONCE = ("cuda_device", "emulated_module", "cuda_objects", "described_here", "kernels", "trained", "samples")
ONCE += ("errors", "launch")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the groups
def pytest_collection_modifyitems(items):
    """Tests that share something slow to make all run in one worker process."""
    for item in items:
        if made := [name for name in ONCE if name in item.fixturenames]:
            item.add_marker(pytest.mark.xdist_group(made[0].replace("emulated_module", "cuda_device")))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors here are small: threads that wait for each other on a busy machine cost far more than they gain.
    Tests of threads ask for them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seeds():
    """What a test draws from torch's generator, a run's seed too, is the same in every run of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` and kin return NaN, or the largest integer, so that an element nobody wrote is seen."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # what the filling hangs on
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def reused_memory(monkeypatch):
    """Loops use small blocks again as well, and find NaN in them."""
    like = memory.Memory.like

    def poisoned(self: memory.Memory, x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor | None:
        result = like(self, x, *others)
        return None if result is None else result.fill_(torch.nan if result.is_floating_point() else -1)

    monkeypatch.setattr(memory, "_LEAST", 1)
    monkeypatch.setattr(memory.Memory, "like", poisoned)


@pytest.fixture(autouse=True)
def no_kernel_is_remembered():
    """A test may exchange the compiled modules."""
    for operation in _operation.OPERATIONS.values():
        operation._chosen.clear()


@pytest.fixture
def threads():
    """``with threads(n):`` runs its body on ``n`` threads."""

    @contextlib.contextmanager
    def using(number: int):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return using


@pytest.fixture
def assert_close():
    """``assert_close(got, expected)``: equal to the tolerance of ``got``'s dtype, ``expected`` in float64."""

    def check(got: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
        tolerance = {name: factor * value for name, value in TOLERANCES[got.dtype].items()}
        torch.testing.assert_close(got.double(), expected.double(), **tolerance)

    return check


@pytest.fixture
def instruction_set():
    """``with instruction_set(name):`` runs the CPU kernels of its body with that one."""
    return _native.instruction_set


@pytest.fixture(scope="session")
def python():
    """See `fresh.Python`."""
    with fresh.Python() as python:
        yield python


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """``fastguide._cuda`` for pointers on the host."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    return emulated_cuda.build_module(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(params=("emulated", "cuda"))
def cuda_device(request, monkeypatch) -> torch.device:
    """Where ``backend="cuda"`` computes: the CPU, emulated, or a GPU where there is one."""
    if request.param == "cuda":
        if reason := _operation.backends()["cuda"].reason:
            pytest.skip(f"cuda: {reason}")
        return torch.device("cuda")
    emulated_cuda.serve(request.getfixturevalue("emulated_module"), monkeypatch)
    return torch.device("cpu")
