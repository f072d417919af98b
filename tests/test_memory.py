"""A block of memory is reused only if nobody else can read it."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle

import pytest
import torch

import fastguide as fg
from fastguide import memory as memory_module
from fastguide import ops
from fastguide.memory import Memory

X = torch.arange(1024.0)


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def given_out(memory: Memory) -> torch.Tensor:
    return memory.like(X).copy_(X)


def test_what_nobody_holds_is_used_again():
    memory = Memory()
    first = given_out(memory)
    place = address(first)
    del first
    again = memory.like(X.view(64, -1).double()[:32])
    assert again.shape == (32, 16) and again.dtype == torch.float64 and address(again) == place
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
    given = given_out(memory)
    place = address(given)
    held = HOLDERS[name](given)
    del given
    others = [memory.like(X) for _ in range(8)]
    assert place not in map(address, others)
    del held, others


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", HOLDERS)
def test_what_was_held_is_used_once_it_is_let_go(name):
    memory = Memory()
    given = given_out(memory)
    place = address(given)
    held = HOLDERS[name](given)
    del given, held
    assert address(memory.like(X)) == place


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_somebody_else_holds_is_copied(name):
    memory, given = Memory(), X.clone()
    assert memory.own(given) is given
    held = HOLDERS[name](given)
    own = memory.own(given.detach())
    assert torch.equal(own, X) and address(own) != address(given)
    del held


def test_memory_that_torch_did_not_allocate_is_copied():
    """Its holders are unknown: they may be other views of the array, or another process."""
    array = X.numpy().copy()
    for given in (torch.from_numpy(array), torch.from_dlpack(array), X.clone().share_memory_()):
        assert address(Memory().own(given)) != address(given)


def test_references_that_the_interpreter_adds_do_not_count(monkeypatch):
    """Once torch's compiler was used in the process, every block has one more reference."""
    counted = memory_module._holders
    monkeypatch.setattr(memory_module, "_holders", lambda block: (counted(block)[0] + 1, counted(block)[1]))
    memory = Memory()
    place = address(given_out(memory))
    assert address(memory.like(X)) == place
    held = memory.like(X)
    assert address(memory.like(X)) != address(held)


def test_a_block_in_shared_memory_is_not_used_again():
    memory = Memory()
    given = given_out(memory).share_memory_()
    place = address(given)
    del given
    assert address(memory.like(X)) != place


def test_a_block_of_another_size_is_not_used():
    memory = Memory()
    given = given_out(memory)
    given.resize_(2 * len(X))
    del given
    assert memory.like(X).untyped_storage().nbytes() == X.nbytes


def test_few_blocks_are_kept():
    memory = Memory()
    held = [given_out(memory) for _ in range(9)]
    places = [address(x) for x in held]
    del held
    assert {address(x) for x in [memory.like(X) for _ in range(8)]} == set(places[-8:])
    assert len(memory._blocks) == 8


def test_a_new_tensor_has_no_history():
    memory = Memory()
    first = given_out(memory)
    first.requires_grad_()
    first.note = "the user's"
    del first
    again = memory.like(X)
    assert not again.requires_grad and not hasattr(again, "note")


@pytest.mark.parametrize(
    "x",
    [X[:-1], X.view(32, 32).T, X.clone().requires_grad_(), torch.nn.Parameter(X), X.to("meta")],
    ids=["small", "not contiguous", "with a gradient", "parameter", "meta"],
)
def test_torch_makes_the_others(x, monkeypatch):
    monkeypatch.setattr(fg.memory, "_LEAST", X.nbytes)
    memory = Memory()
    assert memory.like(x) is None and not memory._blocks
    made = memory.copy(x)
    assert made.shape == x.shape and made.stride() == x.stride() and made.requires_grad == x.requires_grad


def test_torch_makes_small_blocks_of_a_short_run(monkeypatch):
    monkeypatch.setattr(fg.memory, "_LEAST_OF_SHORT_RUNS", X.nbytes + 1)
    for memory in (Memory(short_run=True), copy.copy(Memory(short_run=True))):
        assert memory.like(X) is None and memory.like(torch.cat([X, X])) is not None


def test_a_copy_has_blocks_of_its_own():
    memory = Memory()
    given_out(memory)
    assert memory._blocks
    for other in (copy.deepcopy(memory), copy.copy(memory), pickle.loads(pickle.dumps(memory))):
        assert not other._blocks


WRITERS = {
    "in place": lambda x: x.mul_(0),
    "a part": lambda x: x.view(32, 32)[3].zero_(),
    "out=": lambda x: torch.zeros(1024, out=x),
    "foreach": lambda x: torch._foreach_zero_([x]),
    "array": lambda x: x.numpy().fill(3),
    "array of an alias": lambda x: x.detach().numpy().fill(3),
    "buffer": lambda x: memoryview(x.numpy()).cast("B").__setitem__(0, 9),
    "dlpack": lambda x: torch.from_dlpack(x).zero_(),
    "address": lambda x: ctypes.memset(x.data_ptr(), 1, 64),
    "address of the storage": lambda x: ctypes.memset(x.untyped_storage().data_ptr(), 1, 64),
    "storage": lambda x: x.untyped_storage().fill_(1),
    "shared": lambda x: x.share_memory_().zero_(),
    "inference mode": torch.inference_mode()(lambda x: x.zero_()),
    "data": lambda x: x.data.zero_(),
    "another dtype": lambda x: x.view(torch.int32).zero_(),
    "kernel": lambda x: ops.randn((1024,), seed=1, out=x),
    "compiled": lambda x: torch.compile(lambda x: x.mul_(0) + 1, backend="aot_eager")(x),
}


# Every way to write into one of two tensors that may share their memory.
@pytest.mark.parametrize("order", ["the copy", "the original"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_copy_is_one_once_somebody_writes(name, order):
    memory = Memory()
    original = given_out(memory)
    pair = [original, memory.copy(original)]
    assert all(map(torch._C._is_cow_tensor, pair))  # nothing is copied before a write
    written, other = pair[::-1] if order == "the copy" else pair
    WRITERS[name](written)
    assert torch.equal(other, X) and not torch.equal(written, X)


def test_memory_of_others_is_copied_at_once():
    """Somebody may have its address and write there."""
    memory, others = Memory(), X.clone()
    array = others.numpy()
    copied = memory.copy(others)
    array.fill(0)
    assert torch.equal(copied, X) and not torch._C._is_cow_tensor(others)
    assert torch._C._is_cow_tensor(memory.copy(memory.keep(X.clone())))


def test_a_part_is_copied_alone():
    memory = Memory()
    part = given_out(memory)[:100]
    copied = memory.copy(part)
    assert torch.equal(copied, part) and copied.untyped_storage().nbytes() == part.nbytes


def test_a_block_whose_copy_is_held_is_not_written():
    memory = Memory()
    first = given_out(memory)
    held = memory.copy(first)
    del first
    for _ in range(5):
        ops.randn((1024,), seed=1, out=memory.like(X))
    assert torch.equal(held, X)


# --- loops ----------------------------------------------------------------------------------------------------

SCHEDULE = fg.schedules.vp_linear(100)
KEEPERS = {
    "nothing": lambda x: None,
    "all": lambda x: x,
    "an array": lambda x: x.detach().numpy(),
    "a view": lambda x: x[:, 1:],
}


def steps(name: str, net) -> torch.Tensor:
    """Five steps of a loop with the network ``net(x)``, which predicts ``x_0``."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    if name == "scheduler":
        diffusers = pytest.importorskip("diffusers")
        from fastguide.integrations.diffusers import DDPMScheduler as Scheduler

        scheduler = Scheduler(prediction_type="sample", clip_sample=False)
        assert isinstance(scheduler, diffusers.DDPMScheduler)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x), t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
        scheduler.set_timesteps(5)
        assert scheduler._memory is None
        return x
    if name == "k-diffusion":
        from fastguide.integrations import k_diffusion

        sigmas = k_diffusion.get_sigmas_karras(5, 0.1, 10.0)
        noise = k_diffusion.PhiloxNoiseSampler(x, seed=1)
        return k_diffusion.sample_euler_ancestral(lambda x, sigma: net(x), x, sigmas, noise_sampler=noise, disable=True)
    likelihood = fg.likelihoods.Gaussian(torch.ones(1, 8), fg.operators.Matrix(torch.eye(8, 12), (3, 4)), 0.5)
    guidance = {"plain": None, "DPS": fg.DPS, "PnP": fg.PnP, "PiGDM": fg.PiGDM, "DAPS": fg.DAPS}.get(name, fg.TDS)
    guidance = guidance and (guidance(likelihood, 3) if name == "TDS" else guidance(likelihood))
    prior = fg.Denoiser(lambda x, t: net(x), SCHEDULE, "sample")
    return fg.sample(prior, (2, 3, 4), guidance=guidance, steps=5, seed=1).x


# Each loop decides which memory it reuses. All loops check in the same way whether somebody holds it.
LOOPS = ("plain", "DPS", "PnP", "PiGDM", "DAPS", "TDS", "scheduler", "k-diffusion")


@pytest.mark.parametrize(
    ("name", "keep"), [*itertools.product(LOOPS, ("nothing", "all")), ("plain", "an array"), ("plain", "a view")]
)
def test_a_loop_uses_no_memory_that_the_network_keeps(name, keep, monkeypatch):
    kept, copies = [], []

    def net(x):
        kept.append(KEEPERS[keep](x))
        copies.append(None if kept[-1] is None else torch.as_tensor(kept[-1]).detach().clone())
        return 0.9 * x + 0.1

    out = steps(name, net)
    assert all(a is None or torch.equal(torch.as_tensor(a), b) for a, b in zip(kept, copies, strict=True))
    monkeypatch.setattr(fg.memory.Memory, "like", lambda self, x, *others: None)
    assert torch.equal(out, steps(name, lambda x: 0.9 * x + 0.1))


@pytest.mark.parametrize(
    ("name", "blocks"), [("plain", 3), ("PnP", 3), ("TDS", 5), ("scheduler", 4), ("k-diffusion", 3)]
)
def test_a_loop_goes_back_and_forth(name, blocks, monkeypatch):
    """It makes only as many blocks as it holds at once, for any number of steps."""
    made = []
    like = fg.memory.Memory.like

    def noted(self, x, *others):
        before = [block._cdata for block in self._blocks]
        result = like(self, x, *others)
        if result is not None:
            made.append([block._cdata for block in self._blocks] != before)
        return result

    monkeypatch.setattr(fg.memory.Memory, "like", noted)
    steps(name, lambda x: 0.9 * x + 0.1)
    assert sum(made) <= blocks < len(made)


@pytest.mark.parametrize("name", ["DPS", "TDS"])
def test_a_loop_uses_the_gradients_memory_again(name, monkeypatch):
    places, density = [], ops.log_prob_and_gradient
    monkeypatch.setattr(fg.memory, "_LEAST", 50)  # bytes; excludes the times for the network

    def noted(z, y, **options):
        results = density(z, y, **options)
        if results[1] is not None:  # the last weights need no gradient
            places.append(address(results[1]))
            assert options["out"][1] is results[1]
        return results

    monkeypatch.setattr(ops, "log_prob_and_gradient", noted)
    likelihood = fg.likelihoods.StudentT(torch.ones(1, 8), fg.operators.Matrix(torch.eye(8, 12), (3, 4)), 0.5, 3.0)
    guidance = fg.DPS(likelihood) if name == "DPS" else fg.TDS(likelihood, 3, covariance="point")
    prior = fg.Denoiser(lambda x, t: 0.9 * x + 0.1, SCHEDULE, "sample")
    fg.sample(prior, (2, 3, 4), guidance=guidance, steps=5, seed=1)
    assert len(places) == 5 and len(set(places)) == 1
