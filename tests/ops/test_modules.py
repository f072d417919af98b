"""The stub of the compiled modules agrees with the modules."""

import ast
import re
from pathlib import Path

import pytest

from fastguide.ops import _native

STUB = ast.parse((Path(_native.__file__).parent / "_modules.pyi").read_text())


def described(protocol: str) -> dict[str, int]:
    """The functions of a protocol of the stub, and how many arguments each takes."""
    (body,) = (node.body for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == protocol)
    methods = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {node.name: len(node.args.posonlyargs + node.args.args) - 1 for node in methods}


def found(module) -> dict[str, int]:
    """The same for a module. The error of a function says how many arguments it expects."""
    arguments = {}
    for name, function in vars(module).items():
        if callable(function) and not name.startswith("_"):
            with pytest.raises(TypeError) as error:
                function(*[None] * 99)
            arguments[name] = int(re.fullmatch(r"expected (\d+) arguments, got 99", str(error.value))[1])
    return arguments


def test_the_stub_has_the_functions_of_a_cpu_module():
    assert described("Particles") | described("Cpu") == found(_native.module("cpu"))


def test_the_stub_has_the_functions_of_the_cuda_module(emulated_module):
    assert described("Cuda") == found(emulated_module)
