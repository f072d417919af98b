"""What an import loads: each in a process that has loaded torch alone, since this one has loaded everything."""

import json
import sys
from pathlib import Path

import pytest
from fresh import Python

ROOT = Path(__file__).parents[1]


def loaded(python: Python, before: str, imported: str, *path: Path) -> set[str]:
    """The modules that ``imported`` loads after ``before``, but for Python's own."""
    code = f"""
import json, sys
sys.path[:0] = {[str(ROOT), *map(str, path)]!r}
{before}
seen = set(sys.modules)
{imported}
print(json.dumps([name for name in sys.modules if name not in seen]))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.splitlines()[-1])
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def outside(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] != "fastguide"}


def test_fastguide_loads_only_torch_and_its_own_core(python):
    names = loaded(python, "import torch", "import fastguide")
    assert not outside(names)
    parts = {name.split(".")[1] for name in names if "." in name}
    assert "sampling" in parts
    assert not parts & {"cli", "demo", "digits", "doctor", "integrations"}
    assert "fastguide.ops._triton" not in names  # loaded by the first call that needs it


def test_the_diffusers_schedulers_load_no_models_and_survive_a_mismatched_torchvision(python, tmp_path):
    pytest.importorskip("diffusers")
    # diffusers' models import transformers, which imports torchvision if it is installed.
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.1.dist-info"
    package.mkdir(), metadata.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    before = """
import fastguide
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
"""
    imported = """
import torch
from fastguide.integrations.diffusers import DDIMScheduler, accelerate, codec, denoiser, from_pipeline
scheduler, x = DDIMScheduler(), torch.ones(1, 1, 2, 2)
scheduler.set_timesteps(4)
scheduler.step(x, scheduler.timesteps[0], x)
assert sum(scheduler.parent_calls.values()) == 0
"""
    names = loaded(python, before, imported, tmp_path)
    assert not outside(names), sorted(outside(names))[:9]
