"""A block is used again only when nobody else can read it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastguide.memory import Memory

X = torch.arange(1 << 18, dtype=torch.float32)  # 1 MiB, the least that is kept


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_what_nobody_holds_is_used_again():
    memory = Memory()
    first = memory.copy(X)
    place = address(first)
    del first
    again = memory.like(X.view(64, -1).double()[:32])
    assert again.shape == (32, 4096) and again.dtype == torch.float64 and address(again) == place
    assert again.is_contiguous() and again.untyped_storage().nbytes() == X.nbytes


HOLDERS = {
    "tensor": lambda x: x,
    "alias": lambda x: x.detach(),
    "view": lambda x: x[5:7],
    "parameter": torch.nn.Parameter,
    "array": lambda x: x.numpy(),
    "slice of an array": lambda x: x.numpy()[3:4],
    "memoryview": lambda x: memoryview(x.numpy()),
    "capsule": lambda x: x.__dlpack__(),
    "storage": lambda x: x.untyped_storage(),
    "typed storage": lambda x: x.storage(),
    "graph": lambda x: x * torch.ones((), requires_grad=True),
    "graph of a leaf": lambda x: x.requires_grad_().sin(),
    "closure": lambda x: lambda: x,
    "split": lambda x: x.split(4)[-1],
    "tensor of another dtype": lambda x: x.view(torch.int32),
    "set": lambda x: torch.empty(0).set_(x),
    "data": lambda x: x.data,
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", HOLDERS)
def test_what_somebody_holds_is_not(name):
    memory = Memory()
    given = memory.copy(X)
    place = address(given)
    held = HOLDERS[name](given)
    del given
    others = [memory.like(X) for _ in range(8)]
    assert place not in map(address, others)
    del held, others
    assert address(memory.copy(X)) is not None


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", HOLDERS)
def test_what_was_held_is_used_once_it_is_let_go(name):
    memory = Memory()
    given = memory.copy(X)
    place = address(given)
    held = HOLDERS[name](given)
    del given, held
    assert address(memory.like(X)) == place


def test_a_block_in_shared_memory_is_not_used_again():
    memory = Memory()
    given = memory.copy(X).share_memory_()
    place = address(given)
    del given
    assert address(memory.like(X)) != place


def test_a_block_of_another_size_is_not_used():
    memory = Memory()
    given = memory.copy(X)
    given.resize_(2 * len(X))
    del given
    assert memory.like(X).untyped_storage().nbytes() == X.nbytes


def test_few_blocks_are_kept():
    memory = Memory()
    held = [memory.copy(X) for _ in range(9)]
    places = [address(x) for x in held]
    del held
    assert {address(x) for x in [memory.like(X) for _ in range(4)]} == set(places[-4:])
    assert len(memory._blocks) == 4


def test_a_new_tensor_has_no_history():
    memory = Memory()
    first = memory.copy(X)
    first.requires_grad_()
    first.note = "the user's"
    del first
    again = memory.like(X)
    assert not again.requires_grad and not hasattr(again, "note")


@pytest.mark.parametrize(
    "x",
    [X[:-1], X.view(512, 512).T, X.clone().requires_grad_(), torch.nn.Parameter(X), X.to("meta")],
    ids=["small", "not contiguous", "with a gradient", "parameter", "meta"],
)
def test_torch_makes_the_others(x):
    memory = Memory()
    assert memory.like(x) is None and not memory._blocks
    made = memory.copy(x)
    assert made.shape == x.shape and made.stride() == x.stride() and made.requires_grad == x.requires_grad


def test_a_copy_has_blocks_of_its_own():
    memory = Memory()
    memory.copy(X)
    for other in (copy.deepcopy(memory), copy.copy(memory), pickle.loads(pickle.dumps(memory))):
        assert not other._blocks
