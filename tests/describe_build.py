"""Prints as JSON how the kernels built in the working directory run: their threads, and a hash of their results."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())

import torch

from fastguide import ops
from fastguide.ops import _native
from fastguide.ops._arguments import STATE_DTYPES
from fastguide.reference import FAMILIES, SCHEMES


def seconds() -> dict[str, float]:
    """The processor time of each thread of this process, in seconds."""
    tasks = Path("/proc/self/task").iterdir()
    return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


def digest() -> str:
    """A hash of the results of each operation for fixed inputs."""
    made = []
    for dtype in STATE_DTYPES:
        x = ops.randn((300, 17), seed=1, dtype=dtype)
        made.append(ops.reverse_step(x, x.flip(0), (0.5, 0.8, 0.9, 0.4, 0.2), clip=1.5, seed=2))
        made.append(
            ops.predict_x0(x, x.flip(0), (0.5, 0.8), prediction="v", unconditional=x.flip(1), guidance_scale=3.0)
        )
        y = x.flip(1).abs() if dtype == torch.float64 else x.flip(1).abs().float()
        for family in FAMILIES:
            df = 4.0 if family == "student_t" else None
            made.extend(ops.log_prob_and_gradient(x.abs(), y, family=family, scale=0.3, df=df))
    weights = ops.randn((3, 5000), seed=3)
    for scheme in SCHEMES:
        made.extend(ops.resample(weights, scheme=scheme, seed=4)[:2])
    made.append(
        ops.propose_and_weigh(weights, weights, 0.1 * weights, weights[:, 0], (0.5, 0.8, 0.9, 0.4, 0.2), seed=5)[1]
    )
    hashed = hashlib.sha256()
    for tensor in made:
        hashed.update(tensor.contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # torch starts its threads
before, shape, calls = seconds(), (64, 100_000), 0
busy = 1
while busy < 2 and calls < 1000:  # on a busy machine a thread may start too late to work
    ops.randn(shape, seed=0)
    calls += 1
    after = seconds()
    busy = sum(after[thread] > before.get(thread, 0.0) + 0.001 for thread in after)

bits = {}
for name in _native.instruction_sets():
    with _native.instruction_set(name):
        bits[name] = digest()
libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
found = dict(
    module=_native.module("cpu").__file__,
    torch=torch.__file__,
    openmp=[library for library in sorted(libraries) if re.search(r"/lib(gomp|i?omp)[^/]*$", library)],
    busy_threads=busy,
    new_threads=len(after.keys() - before.keys()),
    bits=bits,
)
print(json.dumps(found))
