"""The layout of the package: where the files of an operation are, and which module may import which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fastguide.ops._operation import OPERATIONS

ROOT = Path(__file__).parents[1]

# A layer may import itself and the layers before it, and no others.
LAYERS = (
    ("arguments",),
    ("memory", "ancestry", "metrics"),
    ("ops",),
    ("reference", "schedules", "denoiser", "operators", "likelihoods", "samples", "plots", "profiling", "foreign"),
    ("guidance",),
    ("checkpoints", "modules"),
    ("sampling", "capture"),
    ("evidence",),
    ("integrations",),
    ("fastguide",),  # its __init__.py: the names that users have
    ("unet", "weights", "training", "digits", "phantoms", "demo", "doctor", "cli", "__main__"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


# --- an operation's files -----------------------------------------------------------------------------------


def folder_of(operation: str) -> str:
    return OPERATIONS[operation].reference.__module__.split(".")[2]


def has(operation: str, *backends: str) -> bool:
    return not set(backends).isdisjoint(OPERATIONS[operation].kernels)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_its_folders_its_test_and_its_benchmark(operation):
    name = folder_of(operation)
    assert operation.removesuffix("_").startswith(name)
    files = [
        f"fastguide/ops/{name}/__init__.py",
        f"fastguide/ops/{name}/reference.py",
        f"tests/ops/test_{name}*.py",
        f"benchmarks/ops/{name}.py",
    ]
    if has(operation, "cpu"):
        files.append(f"csrc/ops/{name}/cpu.cpp")
    if has(operation, "cuda"):
        files.append(f"csrc/ops/{name}/cuda.cu")
    if has(operation, "triton"):
        files.append(f"fastguide/ops/{name}/triton.py")
    for file in files:
        assert list(ROOT.glob(file)), f"{operation} has no {file}"


def test_every_folder_is_an_operation():
    for parent, operations in (
        ("fastguide/ops", OPERATIONS),
        ("csrc/ops", [operation for operation in OPERATIONS if has(operation, "cpu", "cuda")]),
    ):
        names = {path.name for path in (ROOT / parent).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert names == {folder_of(operation) for operation in operations}


# --- what csrc includes -------------------------------------------------------------------------------------

# Each folder may include those before it and its own. An operation is a folder of its own, as is a drop-in's.
INCLUDED = {"common": ("common",), "cpu": ("common", "cpu"), "cuda": ("common", "cuda")}
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))


def test_includes_point_one_way():
    assert len(CSRC) > 30
    for path in CSRC:
        folder = path.parent.relative_to(ROOT / "csrc")
        allowed = INCLUDED.get(folder.parts[0], ("common", "cpu", "cuda", str(folder)))
        for included in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            target = (path.parent / included).resolve().parent.relative_to(ROOT.resolve() / "csrc")
            assert str(target) in allowed, f"{path.relative_to(ROOT)} includes {included}"


# --- imports ------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the package by its name; a package is its ``__init__``."""
    found = {}
    for path in (ROOT / "fastguide").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, except imports for type checkers only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                yield from {target if target in MODULES else source} & set(MODULES)


GRAPH = {name: set(imports(name, path)) - {name} for name, path in MODULES.items()}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_module_has_a_layer():
    assert {part(module) for module in MODULES} == set(LAYER_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    above = [target for target in GRAPH[module] if LAYER_OF[part(target)] > LAYER_OF[part(module)]]
    assert not above, f"{module} imports {', '.join(above)}"


def test_no_import_goes_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
