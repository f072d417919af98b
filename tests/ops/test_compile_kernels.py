"""The Triton kernels compiled for the GPUs that fastguide supports. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastguide.ops._operation import OPERATIONS

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # so that nothing comes from a cache
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_architecture(kernels):
    names, of_kernel = ({k[what] for k in kernels} for what in ("name", "kernel"))
    assert {o.name for o in OPERATIONS.values() if "triton" in o.kernels} <= {name.partition(",")[0] for name in names}
    for architecture in (80, 90, 100):
        assert {k["kernel"] for k in kernels if k["architecture"] == architecture} == of_kernel
    assert {k["name"] for k in kernels if k["architecture"] == 90} == names
    assert {k["state"] for k in kernels} == {"fp32", "bf16", None}
    assert all(k["cubin"] > 0 for k in kernels)


def test_no_register_spills(kernels):
    assert [k for k in kernels if k["spills"]] == []
    # at least 512 threads run on a multiprocessor, to keep the memory busy
    assert all(k["registers"] <= 128 for k in kernels if not k["name"].startswith("solve_positive_part"))


def test_another_batch_seed_or_step_is_the_same_code(kernels):
    assert all(k["recompiled_for"] == (["elements"] if k["state"] else []) for k in kernels)


def test_states_move_128_bits_at_a_time(kernels):
    """A thread has ``block / (32 warps)`` elements. It reads and writes each state in pieces of 16 bytes."""
    for kernel in kernels:
        if kernel["state"] is None:
            continue
        if kernel["moved"] is None:  # these read y too, and have different numbers of inputs
            half = kernel["name"].endswith("poisson") and kernel["state"] == "bf16"  # four elements: 64 bits of z
            assert kernel["wide_loads"] >= (1 if half else 2) and kernel["wide_stores"] >= (0 if half else 1)
            continue
        elements = kernel["block"] // (256 if kernel["block"] == 4096 else 128)
        pieces = elements * {"fp32": 4, "bf16": 2}[kernel["state"]] // 16
        reads, writes = kernel["moved"]
        assert (kernel["wide_loads"], kernel["wide_stores"]) == (reads * pieces, writes * pieces)
        assert kernel["shared"] <= 64  # bytes, for sums only: states do not go through shared memory
