"""Fixtures of all tests: memory filled with NaN before it is written, thread counts, tolerances."""

from __future__ import annotations

import contextlib
import os
import shutil

import emulated_cuda
import fresh
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before fastguide is imported

from fastguide import memory
from fastguide.ops import _native, _operation

# Relative and absolute tolerances for one pass over states of order one. The arithmetic is in float32 and rounded once
# to the state's dtype; for float64 it is all in float64.
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
    """Run tests that share a slow fixture in one worker process."""
    for item in items:
        if made := [name for name in ONCE if name in item.fixturenames]:
            item.add_marker(pytest.mark.xdist_group(made[0].replace("emulated_module", "cuda_device")))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """One thread by default: tensors are small, and on a busy machine threads that wait for each other cost far more
    than they gain. Tests of threads set their number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seeds():
    """Seed torch's generators, so that every run of the tests draws the same numbers, also as seeds of runs. Not by
    ``torch.manual_seed``, which formats a stack trace for each kind of device that is not there."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Make ``torch.empty`` and its kin return NaN, or the largest integer, so that an element nobody wrote is seen."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # the filling needs this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def reused_memory(monkeypatch):
    """Make loops reuse small blocks too, and fill reused blocks with NaN."""
    like = memory.Memory.like

    def poisoned(self: memory.Memory, x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor | None:
        result = like(self, x, *others)
        return None if result is None else result.fill_(torch.nan if result.is_floating_point() else -1)

    monkeypatch.setattr(memory, "_LEAST", 1)
    monkeypatch.setattr(memory, "_LEAST_OF_SHORT_RUNS", 1)
    monkeypatch.setattr(memory.Memory, "like", poisoned)


@pytest.fixture(autouse=True)
def no_kernel_is_remembered():
    """Clear the cache of chosen kernels, because a test may replace the compiled modules."""
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
    """``assert_close(got, expected)``: equal to the tolerance of ``got``'s dtype. ``expected`` is float64."""

    def check(got: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
        tolerance = {name: factor * value for name, value in TOLERANCES[got.dtype].items()}
        torch.testing.assert_close(got.double(), expected.double(), **tolerance)

    return check


@pytest.fixture
def instruction_set():
    """``with instruction_set(name):`` runs the CPU kernels of its body with that instruction set."""
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
    """Where ``backend="cuda"`` computes: the CPU by emulation, or a GPU if there is one."""
    if request.param == "cuda":
        if reason := _operation.backends()["cuda"].reason:
            pytest.skip(f"cuda: {reason}")
        return torch.device("cuda")
    emulated_cuda.serve(request.getfixturevalue("emulated_module"), monkeypatch)
    return torch.device("cpu")
