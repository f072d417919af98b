"""A block is used again only when nobody else can read it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastguide as fg
from fastguide.memory import Memory

X = torch.arange(1024.0)


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_what_nobody_holds_is_used_again():
    memory = Memory()
    first = memory.copy(X)
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
    [X[:-1], X.view(32, 32).T, X.clone().requires_grad_(), torch.nn.Parameter(X), X.to("meta")],
    ids=["small", "not contiguous", "with a gradient", "parameter", "meta"],
)
def test_torch_makes_the_others(x, monkeypatch):
    monkeypatch.setattr(fg.memory, "_LEAST", X.nbytes)
    memory = Memory()
    assert memory.like(x) is None and not memory._blocks
    made = memory.copy(x)
    assert made.shape == x.shape and made.stride() == x.stride() and made.requires_grad == x.requires_grad


def test_a_copy_has_blocks_of_its_own():
    memory = Memory()
    memory.copy(X)
    for other in (copy.deepcopy(memory), copy.copy(memory), pickle.loads(pickle.dumps(memory))):
        assert not other._blocks


# --- loops ----------------------------------------------------------------------------------------------------

SCHEDULE = fg.schedules.vp_linear(100)
KEEPERS = {
    "nothing": lambda x: None,
    "all": lambda x: x,
    "an array": lambda x: x.detach().numpy(),
    "a view": lambda x: x[:, 1:],
}


def steps(name: str, net) -> torch.Tensor:
    """Five steps of a loop around ``net(x)``, which predicts ``x_0``."""
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
    guidance = {"plain": None, "DPS": fg.DPS, "PnP": fg.PnP, "PiGDM": fg.PiGDM}.get(name, fg.TDS)
    guidance = guidance and (guidance(likelihood, 3) if name == "TDS" else guidance(likelihood))
    prior = fg.Denoiser(lambda x, t: net(x), SCHEDULE, "sample")
    return fg.sample(prior, (2, 3, 4), guidance=guidance, steps=5, seed=1).x


@pytest.mark.parametrize("keep", KEEPERS)
@pytest.mark.parametrize("name", ["plain", "DPS", "PnP", "PiGDM", "TDS", "scheduler", "k-diffusion"])
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
    ("name", "blocks"), [("plain", 3), ("PnP", 3), ("TDS", 3), ("scheduler", 4), ("k-diffusion", 3)]
)
def test_a_loop_goes_back_and_forth(name, blocks, monkeypatch):
    """It makes as few blocks as it holds at once, whatever its number of steps."""
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
