"""What ``fastguide doctor`` says of each backend."""

import torch

from fastguide import doctor
from fastguide.ops import _native
from fastguide.ops._operation import backends


def test_doctor_names_every_backend():
    text = doctor.report()
    for name, backend in backends().items():
        assert f"backend {name}: " in text
        assert not backend.reason or backend.reason in text
    assert text.count("self-check   passed") == sum(not b.reason for b in backends().values())
    assert torch.__version__ in text and "threads" in text


def test_doctor_shows_a_wrong_count(monkeypatch):
    monkeypatch.setitem(doctor._PHILOX, "cpu", lambda counter, key: (1, 2, 3, 4))
    assert "FAILED: Philox gives 00000001 00000002 00000003 00000004, expected 6627e8d5" in doctor.report()


def test_doctor_shows_what_a_compiler_raises(monkeypatch):
    def raises(counter, key):
        raise LookupError("no ptxas\nand more of it")  # no RuntimeError, as Triton's are none

    monkeypatch.setitem(doctor._PHILOX, "cpu", raises)
    text = doctor.report()
    assert "FAILED: LookupError: no ptxas\n" in text and "and more of it" not in text
    assert "backend reference: usable" in text


def test_doctor_shows_why_cuda_was_not_built(monkeypatch):
    cuda = {
        "status": "failed",
        "reason": "compilation failed",
        "nvcc": "13.0",
        "archs": ["90"],
        "error": ["x.cu: no"],
    }
    monkeypatch.setattr(_native, "build_record", lambda: {"compiler": "g++ 12", "cuda": cuda})
    text = doctor.report()
    assert "failed compilation failed" in text and "x.cu: no" in text and "13.0, for sm_90" in text
