"""The messages of the logger "fastguide"."""

import logging

import pytest
import torch

from fastguide import ops
from fastguide.ops import _native, _operation


@pytest.fixture
def logged(caplog, monkeypatch):
    """The messages of a process that has not yet chosen a backend."""
    caplog.set_level(logging.DEBUG, logger="fastguide")
    _operation._log_choice.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "fastguide"]


def test_a_choice_and_its_reasons_are_logged_once(logged):
    for _ in range(3):
        ops.randn((2, 3), seed=0)
        ops.randn((2, 3), seed=0, backend="reference")
    chosen, named = logged()
    assert chosen == "randn on cpu, torch.float32: cpu; not cuda: cuda serves tensors on cuda, and these are on cpu"
    assert named == "randn on cpu, torch.float32: reference, which the call names"


def test_a_wrong_backend_is_an_error_and_no_choice(logged):
    with pytest.raises(ValueError, match="backend: expected one of"):
        ops.randn((2, 3), seed=0, backend="gpu")
    assert logged() == []


def test_a_module_is_logged_with_its_file_or_the_reason(logged):
    module, _ = _native._load.__wrapped__("_cpu_portable")
    _, reason = _native._load.__wrapped__("_nothing")
    assert logged() == [f"loaded fastguide._cpu_portable from {module.__file__}", reason]
    assert reason.startswith("fastguide._nothing was built and is gone")


def test_logging_does_not_break_a_compiled_graph(logged):
    compiled = torch.compile(lambda: ops.randn((2, 3), seed=0, backend="reference"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), ops.randn((2, 3), seed=0, backend="reference"))


def test_nothing_is_prepared_for_a_logger_that_is_off(monkeypatch):
    monkeypatch.setattr(_operation, "_log_choice", None)  # calling it would raise
    ops.randn((2, 3), seed=0, backend="reference")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fastguide").handlers)
