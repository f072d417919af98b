"""No loop waits for the device, and none reads values of the host. So every loop can be captured as a CUDA graph.

Every algorithm runs on fake tensors on the ``meta`` device, which have no values. Every operation's reference runs on
the ``meta`` device itself. Operations that need values (``item``, ``bool``, ``nonzero``, a shape that depends on data)
raise there. `watched` refuses copies between devices, and operations that are known to wait on a GPU. Except for
values, the states are those of a run on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch._functorch.config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from watched import watched

import fastguide as fg
from fastguide import ops, reference, sampling
from fastguide.ancestry import Ancestry
from fastguide.guidance.base import State
from fastguide.guidance.plain import Plain
from fastguide.likelihoods import Gaussian, Laplace, Poisson, StudentT
from fastguide.operators import AveragePool, Blur, Inpainting
from fastguide.ops._operation import Operation

VP = (0.6, 0.8, 0.8, 0.6, 0.3)


class NothingFed(TorchDispatchMode):
    """Refuses tensors made from values of the host, on any device, and functions that solver libraries compute on GPUs:
    these libraries do not say which of their calls a graph can hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name != "aten::lift_fresh", "a tensor of values that the host has"
        solves = any(word in name for word in ("linalg", "cholesky", "triangular_solve", "lu_solve"))
        assert not solves or name == "aten::linalg_vector_norm", f"{name} is a solver library's"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch():
    with watched(), NothingFed():
        yield


class Network(torch.nn.Module):
    def __init__(self, device: str):
        super().__init__()
        options = dict(padding=1, device=device)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, **options), torch.nn.Conv2d(4, 1, 3, **options))

    def forward(self, x, t):
        return self.layers(x) + t.reshape(-1, 1, 1, 1)


def brightness(x):
    return x.flatten(1).sum(1)


def guidances(device: str) -> dict[str, object]:
    """The guidance objects. They have few iterations, because all are alike. ``"moment"``, the slowest, is used only
    where it is named."""
    y, few = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 2, 2)
    pool, mask = AveragePool(4), Inpainting(torch.ones(1, 8, 8, dtype=torch.bool))
    blur = Blur(torch.ones(3, 3) / 9, padding="zeros")
    decoder = torch.nn.Conv2d(1, 1, 1, device=device)
    latent = fg.LatentPnP(Gaussian(few, pool, 0.1), decoder=decoder, iterations=2)
    found = {"plain": Plain(), "PnP closed form": fg.PnP(Gaussian(few, pool, 0.1)), "LatentPnP": latent}
    found |= {f"DPS {c}": fg.DPS(Gaussian(few, pool, 0.1), covariance=c) for c in ("point", "isotropic", "moment")}
    found |= {
        "DPS Student-t": fg.DPS(StudentT(few, pool, 0.1, df=3.0)),
        "DPS Poisson": fg.DPS(Poisson(few.abs(), pool, 0.1)),
        "PnP conjugate gradients": fg.PnP(Gaussian(y, blur, 0.1), solver="cg", iterations=2),
        "PnP Laplace": fg.PnP(Laplace(few, pool, 0.1), iterations=2),
        "PnP masked": fg.PnP(Gaussian(y.flatten(1), mask, 0.1)),
        "PiGDM": fg.PiGDM(Gaussian(few, pool, 0.1)),
        "DAPS": fg.DAPS(Gaussian(few, pool, 0.1), ode_steps=2),
        "DAPS Poisson": fg.DAPS(Poisson(few.abs(), pool, 0.1), iterations=2),
    }
    for resampler in reference.SCHEMES:
        found[f"TDS {resampler}"] = fg.TDS(Gaussian(few, pool, 0.1), 4, covariance="isotropic", resampler=resampler)
    found |= {f"TDS {c}": fg.TDS(Gaussian(few, pool, 0.1), 4, covariance=c) for c in ("point", "moment")}
    ddpm = dict(base_kernel="ddpm")
    found |= {f"TDS {c} ddpm": fg.TDS(Gaussian(few, pool, 0.1), 4, covariance=c, **ddpm) for c in ("point", "moment")}
    for potential in ("difference", "max", "sum"):
        for proposal in ("base", "guided"):
            steering = fg.FK(brightness, particles=4, potential=potential, proposal=proposal, covariance="point")
            found[f"FK {potential}, {proposal}"] = steering
    found["FK of a likelihood"] = fg.FK(
        Gaussian(few, pool, 0.1), particles=4, covariance="isotropic", resample_steps=2, ess_threshold=None
    )
    return found


@contextlib.contextmanager
def fake_tensors():
    """Fake tensors, also on the ``meta`` device. They also replace the tensors that a guidance object has."""
    with torch._functorch.config.patch(fake_tensor_allow_meta=True), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def loop(guidance, device: str, chunk_size: int | None = None, clip=None) -> list[State]:
    """The states of the loop in `fastguide.sample`, without its checks before the first and after the last step. On
    ``meta`` these are fake tensors."""
    nothing = contextlib.nullcontext()
    with fake_tensors() if device == "meta" else nothing:
        prior = fg.Denoiser(Network(device), fg.schedules.vp_cosine(100), prediction="v")
        shape, dtype = (2, 1, 8, 8), torch.float32
        run = sampling.prepare_run(prior, shape, guidance, 3, None, None, clip, 7, None, dtype, device, chunk_size)
        guidance = guidance.prepare(run)
        if isinstance(getattr(getattr(guidance, "likelihood", None), "operator", None), Blur):
            guidance.step(run, guidance.start(run), 0)  # warm-up, as in a capture: it makes its spectrum on the host
        states = [guidance.start(run)]
        with watch() if device == "meta" else nothing:
            for i in range(run.steps):
                states.append(guidance.step(run, states[-1], i))
    return states


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
    return found | state.particles


META, CPU = guidances("meta"), guidances("cpu")


@pytest.mark.parametrize("name", META)
def test_no_step_waits_or_is_fed(name):
    fake = loop(META[name], "meta", chunk_size=5, clip=1.0)
    real = loop(CPU[name], "cpu", chunk_size=5, clip=1.0)
    for got, expected in zip(map(tensors_of, fake), map(tensors_of, real), strict=True):
        assert got.keys() == expected.keys()
        for field, value in expected.items():
            assert isinstance(got[field], FakeTensor) and got[field].device.type == "meta", field
            assert (got[field].shape, got[field].dtype) == (value.shape, value.dtype), field


@pytest.mark.parametrize(
    "question",
    (
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + torch.as_tensor(1.0, device=x.device),
        lambda x: x.to("cpu"),
        lambda x: torch.linalg.eigh(x.reshape(-1, 8, 8)),
        lambda x: torch.linalg.cholesky_ex(x.reshape(-1, 8, 8)),
        lambda x: torch.cholesky_solve(x.reshape(-1, 8, 8), x.reshape(-1, 8, 8)),
        lambda x: bool((x > 0).all()),
    ),
)
def test_the_watch_sees(question):
    class Asks(Plain):
        def step(self, run, state, i):
            question(state.x)
            return super().step(run, state, i)

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        loop(Asks(), "meta")


def test_the_watch_lets_arithmetic_pass():
    class Computes(Plain):
        def step(self, run, state, i):
            (state.x.to(torch.float64) + 1.0).sum()
            return super().step(run, state, i)

    assert loop(Computes(), "meta")[-1].x.device.type == "meta"


def test_operations_ask_nothing():
    """The references, which serve GPUs without kernels. The loops above call only a fake version of each operation."""
    x, log_weights = torch.zeros(6, 5, device="meta"), torch.zeros(2, 3, device="meta")
    levels = tuple(torch.full((6,), c, device="meta") for c in VP)
    rows = torch.zeros(6, dtype=torch.int64, device="meta")
    with watch():
        ops.randn((6, 5), seed=1, device="meta")
        for clip, coefficients in itertools.product((None, 1.0, ops.DynamicThreshold()), (levels, VP)):
            ops.reverse_step(x, x, coefficients, clip=clip, displacement=x, return_x0=True)
        for two, scale in itertools.product((levels[:2], VP[:2]), (levels[0], 2.0)):
            ops.predict_x0(x, x, two, prediction="epsilon", unconditional=x, guidance_scale=scale)
        for coefficients in (levels, VP):
            ops.propose_and_weigh(x, x, x, log_weights, coefficients, seed=1)
        for scheme, threshold, keep_sorted in itertools.product(reference.SCHEMES, (None, 0.5), (False, True)):
            options = dict(scheme=scheme, ess_threshold=threshold, sorted=keep_sorted)
            ancestors = ops.resample(log_weights, check=False, **options)[0]
        ops.gather_particles_(ancestors, x.view(2, 3, 5), check=False)
        for family, extra_variance in itertools.product(reference.FAMILIES, (None, x[:1])):
            if family != "poisson" or extra_variance is None:
                options = dict(family=family, df=3.0 if family == "student_t" else None, extra_variance=extra_variance)
                ops.log_prob_and_gradient(x, x[:2], scale=1.0, rows=rows, **options)


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel: no views, no allocations, no passes that only this device needs."""

    def __init__(self):
        super().__init__()
        self.number, self.paused = 0, 0
        self.free = {"detach", "expand", "unsqueeze", "slice", "select", "permute", "t", "view", "_unsafe_view"}
        self.free |= {"alias", "unbind", "reshape", "empty", "empty_like", "new_empty", "empty_strided"}
        self.free |= {"device", "promote_types", "diagonal"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not self.paused and function.overloadpacket.__name__ not in self.free
        return function(*args, **(kwargs or {}))


class Costless(torch.autograd.Function):
    """A network whose passes launch nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


# On a GPU `resample` counts here as one operation, and is one kernel if an observation has at most 4,096 particles.
# `gather_particles_` is two or three kernels and a memset. Following the first ancestors takes six. So with second
# moments a step of the loop launches at most 40.
# The trace kernel makes the variance of each particle besides. The conditional proposal, the default with "isotropic",
# measures twice more.
@pytest.mark.parametrize(
    ("covariance", "base_kernel", "conditional", "most"),
    [
        ("moment", "ddpm", None, 31),
        ("isotropic", "ddpm", None, 32),
        ("moment", "trace", None, 33),
        ("isotropic", "trace", False, 35),
        ("isotropic", "trace", None, 82),
    ],
)
@pytest.mark.parametrize("operator", [AveragePool(4), fg.operators.Matrix(torch.ones(4, 64), (1, 8, 8))])
def test_launches_of_a_step_with_four_measurements(operator, covariance, base_kernel, conditional, most, monkeypatch):
    likelihood = Gaussian(torch.zeros_like(operator(torch.zeros(2, 1, 8, 8))), operator, 0.1)
    guidance = fg.TDS(likelihood, 64, covariance=covariance, base_kernel=base_kernel, conditional=conditional)
    counted, watch_flags = Launches(), Operation._watch

    def paused(self, not_finite, args):
        counted.paused += 1
        watch_flags(self, not_finite, args)
        counted.paused -= 1

    monkeypatch.setattr(Operation, "_watch", paused)
    with fake_tensors():
        prior = fg.Denoiser(lambda x, t: Costless.apply(x), fg.schedules.vp_cosine(100), prediction="v")
        run = sampling.prepare_run(
            prior, (2, 1, 8, 8), guidance, 4, None, None, None, 7, None, torch.float32, "meta", None
        )
        prepared = guidance.prepare(run)
        state = prepared.step(run, prepared.start(run), 0)
        with counted:
            prepared.step(run, state, 1)
        step = counted.number
        ancestry = Ancestry(2, 64, run.device)
        with counted:
            ancestry.follow(state.ancestors, state.ess)
    assert step <= most and counted.number - step <= 6
