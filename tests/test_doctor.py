"""What ``fastguide doctor`` says about each backend."""

import json

import torch

import fastguide
from fastguide import cli, doctor
from fastguide.ops import _native
from fastguide.ops._operation import OPERATIONS, backends


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
        raise LookupError("no ptxas\nand more of it")  # not a RuntimeError, as in Triton

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


def test_doctor_json_has_the_facts_of_the_report(capsys, monkeypatch):
    monkeypatch.setitem(doctor._PHILOX, "cpu", lambda counter, key: (1, 2, 3, 4))
    cli.main(["doctor", "--json"])
    found, text = json.loads(capsys.readouterr().out), doctor.report()
    assert found["fastguide"]["version"] == fastguide.__version__
    assert found["torch"]["version"] in text and found["cpu"]["name"] in text
    assert found["build"] == _native.build_record()
    assert list(found["backends"]) == list(backends())
    for name, backend in backends().items():
        said = found["backends"][name]
        assert (said["loaded"], said["why_not"]) == (backend.loaded, backend.reason)
        assert said["operations"] == list(backend.operations) and said["details"] == backend.details
        assert (said["self_check"] is None) == bool(backend.reason)
    assert found["backends"]["reference"]["self_check"] == {"passed": True, "error": ""}
    assert f"FAILED: {found['backends']['cpu']['self_check']['error']}" in text
    for call in found["auto"]:
        assert f"  {call['operation']} on {call['device']}, torch.{call['dtype']}: {call['backend']}\n" in text + "\n"
        for name, reason in call["why_not"].items():
            assert f"    not {name}: {reason}" in text
    assert {call["operation"] for call in found["auto"]} == set(OPERATIONS)
