"""Every Python block of the README and of docs/ runs unchanged. The blocks of a page share one namespace.

A comment before a block may say more:

- ``<!-- needs: NAME -->`` skips the block if a module, or ``a GPU``, is missing.
- ``<!-- file: PATH -->`` writes the block to a file in a copy of the repository. ``<!-- file: PATH, after: TEXT -->``
  inserts it into a file, after the line that has the text. See `test_the_operation_that_is_added`.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastguide as fg

ROOT = Path(__file__).parents[1]
PAGES = {"README": ROOT / "README.md"} | {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}

_BLOCK = re.compile(r"^(?:<!-- (needs|file): ([^\n]+) -->\n+)?```(?:python|cpp)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    kind: str | None  # "needs", "file" or None
    value: str | None
    code: str
    line: int  # the line of the page before the code


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    found = [Block(m[1], m[2], m[3], text[: m.start(3)].count("\n")) for m in _BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^ *```(?:python|cpp)", text, re.MULTILINE)), "a block that no test sees"
    return found


def missing(name: str | None) -> bool:
    if name is None or name == "a GPU":
        return name is not None and not torch.cuda.is_available()
    try:
        try:
            importlib.import_module(name)
        except RuntimeError:  # a torchvision that does not fit this torch; deepinv does not need it here
            sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
            importlib.import_module(name)
    except ImportError:
        return True
    return False


def run(page: str, block: Block, names: dict) -> None:
    code = "\n" * block.line + block.code  # so that an error has the line of the page
    exec(compile(code, str(PAGES[page]), "exec"), names)


def readme(names: dict) -> None:
    out, truth = names["out"], names["truth"]
    assert out.x.shape == (2, 64, 1, 8, 8) and out.ess.shape == (51, 2)
    assert torch.isfinite(out.log_evidence).all()
    assert torch.equal(fg.Samples.load("digits.safetensors").x, out.x)
    error = (out.mean() - truth).square().mean()
    assert error < 0.5 * (truth - truth.mean()).square().mean()


def deepinv(names: dict) -> None:
    assert names["x"].shape == names["y"].shape
    assert (names["physics"].A(names["x"]) - names["y"]).square().mean().sqrt() < 0.2


def fkd(names: dict) -> None:
    reward = names["reward"]
    assert torch.equal(names["images"], names["latents"])
    assert reward(names["images"]).mean() > reward(names["x0_preds"]).mean()


def k_diffusion(names: dict) -> None:
    assert torch.allclose(names["x"], torch.full((2, 1, 4, 4), 0.5))  # down to sigma = 0: the model's prediction


def particles_blackjax(names: dict) -> None:
    assert names["A"].tolist() == list(range(8))


def diffusers_pipelines(names: dict) -> None:
    pool, y, decode = names["pool"], names["y"], names["decode"]
    unguided = decode(names["z"])  # from the same noise
    assert (pool(names["images"]) - y).norm() < 0.95 * (pool(unguided) - y).norm()
    assert names["best"].shape == names["shape"]
    assert names["reward"](decode(names["best"])) > names["reward"](unguided)


CHECKS = {
    "README": readme,
    "deepinv": deepinv,
    "diffusers-pipelines": diffusers_pipelines,
    "fkd": fkd,
    "k_diffusion": k_diffusion,
    "particles-blackjax": particles_blackjax,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from diffusers with numpy
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind != "file" for block in blocks(page))])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    found = [block for block in blocks(page) if block.kind != "file"]
    absent = [block.value for block in found if block.kind == "needs" and missing(block.value)]
    ran = [block for block in found if block.kind != "needs" or not missing(block.value)]
    for block in ran:
        run(page, block, names)
    if page in CHECKS and ran:
        CHECKS[page](names)
    if absent:
        pytest.skip(f"{len(ran)} of {len(found)} blocks ran; missing: {', '.join(sorted(set(absent)))}")


def test_the_links_of_the_readme_lead_somewhere():
    """The links of the other pages are checked by ``mkdocs build --strict``."""
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", PAGES["README"].read_text())
    assert len(links) > 20
    for target, anchor in links:
        path = ROOT / target
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{target}#{anchor}"


def test_the_readme_is_short():
    assert len(PAGES["README"].read_text().splitlines()) <= 130


def write(block: Block, folder: Path) -> None:
    name, _, after = block.value.partition(", after: ")
    path = folder / name
    if not after:
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.code)
        return
    lines = path.read_text().splitlines(keepends=True)
    (place,) = (i for i, line in enumerate(lines) if after in line)
    path.write_text("".join([*lines[: place + 1], block.code, *lines[place + 1 :]]))


# A path below one of the repository's folders, but for that of a page's own example and of a file that a command makes.
_PATH = re.compile(r"(?<![\w./-])(?:benchmarks|csrc|docs|examples|fastguide|tests)(?:/\w+)+\.(?:cpp|cu|h|md|py|sh)\b")
_TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    path
    for folder in ("benchmarks", "csrc", "docs", "fastguide", "tests")
    for path in sorted((ROOT / folder).rglob("*.*"))
    if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".md", ".py", ".pyi", ".sh")
]


def test_files_that_are_named_are_there():
    gone = [
        f"{text.relative_to(ROOT)}: {name}"
        for text in _TEXTS
        for name in _PATH.findall(text.read_text())
        if "scale_and_shift" not in name and not (ROOT / name).exists()
    ]
    assert not gone, gone


COMPILE_FOR_A_GPU = """
import compile_kernels, triton
triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
((_, kernel, pointers, constants, _),) = (c for c in compile_kernels.cases("fp32") if c[0] == "scale_and_shift")
found = compile_kernels.compiled(kernel, pointers, constants | dict(BLOCK=1024, ROWS=1, GROUPS=256), 90, 4)
assert found["cubin"] and not found["spills"], found
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_operation_that_is_added(tmp_path, python):
    """Run in a copy of the repository whose only compiled module has only that operation."""
    pytest.importorskip("triton")
    for name in ("fastguide", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "ops" / "compile_kernels.py", tmp_path / "tests" / "ops")
    found = blocks("adding-an-operation")
    assert all(block.kind == "file" for block in found)
    for block in found:
        write(block, tmp_path)

    sources = ("common/module.cpp", "cpu/processor.cpp", "ops/scale_and_shift/cpu.cpp")
    module = f"fastguide/_cpu_portable{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fPIC", "-shared"]
    flags += ["-DFG_MODULE=_cpu_portable", "-isystem", sysconfig.get_paths()["include"]]
    command = ["g++", *flags, *(f"csrc/{source}" for source in sources), "-lgomp", "-o", module]
    build = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{tmp_path}/tests/ops", "FASTGUIDE_ISA": "portable"}
    as_a_command = "import runpy, torch; torch.set_num_threads(1); runpy.run_module({!r}, run_name='__main__')".format
    pytest_of_its_own = ("-q", "-c", os.devnull, "--rootdir=.", "tests/ops/test_scale_and_shift.py")
    interpreted = environment | {"TRITON_INTERPRET": "1"}
    tests = python(as_a_command("pytest"), *pytest_of_its_own, cwd=tmp_path, env=interpreted)
    assert tests.returncode == 0 and "11 passed" in tests.stdout, tests.stdout + tests.stderr
    bench = python(as_a_command("benchmarks"), "scale_and_shift", "--quick", cwd=tmp_path, env=environment)
    assert bench.returncode == 0 and "scale_and_shift/images" in bench.stdout, bench.stdout + bench.stderr
    for_a_gpu = python(COMPILE_FOR_A_GPU, cwd=tmp_path, env=environment)
    assert for_a_gpu.returncode == 0, for_a_gpu.stderr
