"""No loop waits for the host, and none is fed by it: that is what makes it capturable as a CUDA graph.

Every algorithm runs on the ``meta`` device, whose tensors have no values. Whatever would ask the device a question
(``item``, ``bool``, ``nonzero``, a shape that depends on data) has no answer there and raises; `Watch` refuses what
moves between devices, and what is known to wait on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastguide as fg
from fastguide import ops, sampling
from fastguide.guidance.plain import Plain
from fastguide.likelihoods import Gaussian, Laplace, Poisson, StudentT
from fastguide.operators import AveragePool, Blur, Inpainting

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten._unique2.default, aten._linalg_eigh.default, aten.linalg_eig.default,
    aten._linalg_svd.default, aten.bincount.default,
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Refuses what waits for a device, a tensor of the host's values, and a copy from one device to another."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function not in WAITS, f"{function} waits for the device"
        assert function is not aten.lift_fresh.default, "a tensor of values that the host has"
        if function in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if function is aten.copy_.default else args[0]
            target = args[0].device if function is aten.copy_.default else kwargs.get("device") or source.device
            assert source.device == target, f"{function} from {source.device} to {target}"
        if function in (aten.index.Tensor, aten.index_put_.default):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "an index that depends on data"
        return function(*args, **kwargs)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x, t):
        return self.layers(x) + t.reshape(-1, 1, 1, 1)


def brightness(x):
    return x.flatten(1).sum(1)


def guidances() -> dict[str, object]:
    y, few = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 2, 2)
    pool, mask = AveragePool(4), Inpainting(torch.ones(1, 8, 8, dtype=torch.bool))
    blur = Blur(torch.ones(3, 3) / 9, padding="zeros")
    decoder = torch.nn.Conv2d(1, 1, 1).to("meta")
    latent = fg.LatentPnP(Gaussian(few, pool, 0.1), decoder=decoder)
    found = {"plain": Plain(), "PnP closed form": fg.PnP(Gaussian(few, pool, 0.1)), "LatentPnP": latent}
    found |= {f"DPS {c}": fg.DPS(Gaussian(few, pool, 0.1), covariance=c) for c in ("point", "isotropic", "moment")}
    found |= {
        "DPS Student-t": fg.DPS(StudentT(few, pool, 0.1, df=3.0)),
        "DPS Poisson": fg.DPS(Poisson(few.abs(), pool, 0.1)),
        "PnP conjugate gradients": fg.PnP(Gaussian(y, blur, 0.1)),
        "PnP Laplace": fg.PnP(Laplace(few, pool, 0.1)),
        "PnP masked": fg.PnP(Gaussian(y.flatten(1), mask, 0.1)),
        "PiGDM": fg.PiGDM(Gaussian(few, pool, 0.1)),
    }
    for resampler in ("systematic", "stratified", "multinomial", "residual"):
        found[f"TDS {resampler}"] = fg.TDS(Gaussian(few, pool, 0.1), particles=4, resampler=resampler)
    found |= {f"TDS {c}": fg.TDS(Gaussian(few, pool, 0.1), particles=4, covariance=c) for c in ("point", "isotropic")}
    for potential in ("difference", "max", "sum"):
        for proposal in ("base", "guided"):
            steering = fg.FK(brightness, particles=4, potential=potential, proposal=proposal)
            found[f"FK {potential}, {proposal}"] = steering
    found["FK of a likelihood"] = fg.FK(Gaussian(few, pool, 0.1), particles=4, resample_steps=2, ess_threshold=None)
    return found


GUIDANCES = guidances()


def loop(guidance, device: str, chunk_size: int | None = None, clip=None) -> torch.Tensor:
    """`fastguide.sample` between what it checks before the first step and after the last."""
    prior = fg.Denoiser(Network().to(device), fg.schedules.vp_cosine(100), prediction="v")
    shape, dtype = (2, 1, 8, 8), torch.float32
    run = sampling._prepare_run(prior, shape, guidance, 4, None, None, clip, 7, None, dtype, device, chunk_size)
    guidance = guidance.prepare(run)
    state = guidance.start(run)
    guidance.step(run, state, 0)  # an operator's spectrum is made on the host, once; a capture is warmed up as well
    state = guidance.start(run)
    with Watch():
        for i in range(run.steps):
            state = guidance.step(run, state, i)
    return state.x


@pytest.mark.parametrize("name", GUIDANCES)
def test_no_step_waits_or_is_fed(name):
    x = loop(GUIDANCES[name], "meta", chunk_size=3, clip=1.0)
    assert x.device.type == "meta" and x.shape[0] == 2 * getattr(GUIDANCES[name], "particles", 1)


@pytest.mark.parametrize(
    "question",
    (
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x.to("cpu"),
        lambda x: torch.linalg.eigh(x.reshape(-1, 8, 8)),
        lambda x: bool((x > 0).all()),
    ),
)
def test_the_watch_sees(question):
    class Asks(Plain):
        def step(self, run, state, i):
            question(state.x)
            return super().step(run, state, i)

    for device in ("meta", "cpu"):
        if device == "cpu" and question.__code__.co_consts == (None, "cpu"):
            continue  # that is no copy from the device it is on
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            loop(Asks(), device)


def test_the_watch_lets_arithmetic_pass():
    class Computes(Plain):
        def step(self, run, state, i):
            (state.x.to(torch.float64) + 1.0).sum()
            return super().step(run, state, i)

    for device in ("meta", "cpu"):
        assert loop(Computes(), device).device.type == device


def test_operations_ask_nothing():
    x, log_weights = torch.zeros(6, 5, device="meta"), torch.zeros(2, 3, device="meta")
    levels = tuple(torch.full((6,), c, device="meta") for c in (0.6, 0.8, 0.8, 0.6, 0.3))
    with Watch():
        ops.randn((6, 5), seed=1, device="meta")
        ops.reverse_step(x, x, levels, clip=ops.DynamicThreshold(), displacement=x, return_x0=True)
        ops.propose_and_weigh(x, x, x, log_weights, levels, seed=1)
        ancestors = ops.resample(log_weights, ess_threshold=0.5, sorted=False, check=False)[0]
        ops.gather_particles_(ancestors, x.view(2, 3, 5), check=False)
        for family in ("gaussian", "laplace", "poisson"):
            ops.log_prob_and_gradient(x, x[:1], family=family, scale=1.0)
