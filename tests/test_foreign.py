"""What users pass to the package: networks, ambient modes, writes to memory, NaN, derivatives, guidance scales."""

from __future__ import annotations

import copy
import functools
import re
import types
import warnings

import numpy as np
import pytest
import torch
from gaussian import MATRIX, SCALE, Y, example, gaussian_likelihood
from test_sampling import ALL, WEIGHTED, assert_same, guidances, run
from torch.autograd import forward_ad

import fastguide as fg
from fastguide.modules import modules_of, warn_of_training
from fastguide.operators import Function, LinearOperator, Matrix, Operator

SCHEDULE = fg.schedules.vp_linear(100)
SIGMA = torch.as_tensor(SCHEDULE.sigma(torch.arange(100))).float()


def prior(net, **options) -> fg.Denoiser:
    return fg.Denoiser(net, SCHEDULE, **options)


def clean(x, t):
    """The score network of a standard normal prior, as epsilon."""
    return SIGMA.to(x.dtype)[t].reshape(-1, *(1,) * (x.ndim - 1)) * x


def draw(net, guidance=None, shape=(2, 3), **options) -> torch.Tensor:
    options = {"steps": 6, "seed": 5, **options}
    return fg.sample(prior(net), shape, guidance=guidance, **options).x


# --- networks as people have them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: (out, None),
        lambda out: [out],
        lambda out: {"sample": out},
        lambda out: types.SimpleNamespace(sample=out),
        lambda out: torch.cat([out, torch.full_like(out, torch.nan)], 1),  # a learned variance, which is ignored
        lambda out: out.numpy(),
        lambda out: out.double(),
    ],
)
def test_what_networks_return(wrap):
    shape = (2, 3, 4, 4)
    expected = draw(clean, shape=shape)
    assert torch.equal(draw(lambda x, t: wrap(clean(x, t)), shape=shape), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_is_called_in_its_own_dtype(dtype):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3, dtype=dtype))

        def forward(self, x, t):
            assert x.dtype == dtype
            return clean(x @ self.weight, t)

    for guidance in (None, fg.DPS(gaussian_likelihood().to(dtype=torch.float32))):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3
        out = draw(Net(), guidance)
        assert out.dtype == torch.float32
        assert torch.allclose(out, draw(clean, guidance), atol=tolerance)


def test_a_networks_error_says_what_it_was_called_with():
    net = torch.nn.Linear(3, 3).half()
    with pytest.raises(RuntimeError) as caught:
        draw(lambda x, t: net(x))
    (note,) = caught.value.__notes__
    assert "net: raised when called with x torch.float32 [2, 3]" in note and "sample(dtype=...)" in note


@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Dropout(0.5), lambda: torch.nn.BatchNorm1d(3)], ids=["dropout", "batch norm"]
)
def test_a_network_in_training_mode_warns(make, recwarn):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), make())
    with pytest.warns(RuntimeWarning, match=r"net: its \w+ is in training mode; the module's eval\(\)"):
        fg.sample(prior(Timeless(net)), (2, 3), steps=2)
    recwarn.clear()
    fg.sample(prior(Timeless(net).eval()), (2, 3), steps=2)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


class Timeless(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


# --- what functions return ------------------------------------------------------------------------------------

L = fg.likelihoods
ROWS = torch.tensor([[0.7, -0.4], [-0.6, 0.9]])


class ComplexAdjoint(LinearOperator):
    def __call__(self, x):
        return x[:, :2]

    def adjoint(self, y):
        return complex_adjoint(y)


class ComplexInverse(Operator):
    def __call__(self, x):
        return x[:, :2]

    def pseudo_inverse(self, y):
        return complex_adjoint(y)


def complex_adjoint(y):
    return torch.cat([y, torch.zeros_like(y[:, :1])], 1) * (1 + 1j)


def linear(adjoint):
    return Function(lambda x: x[:, :2], linear=True, adjoint=adjoint)


COMPLEX = {
    "decoder": ("decoder", fg.LatentPnP(L.Gaussian(ROWS, ComplexInverse(), 0.3), lambda z: z * (1 + 5j))),
    "decoder of pixels": (
        "decoder",
        fg.LatentPnP(L.Gaussian(ROWS, ComplexInverse(), 0.3), lambda z: z + 0j, lambda x: x, "pixel"),
    ),
    "decoder before a callable": (
        "decoder",
        fg.LatentPnP(L.Callable(lambda x: -x.abs().square().sum(1)), lambda z: z + 0j),
    ),
    "encoder": (
        "encoder",
        fg.LatentPnP(L.Gaussian(ROWS, ComplexInverse(), 0.3), lambda z: z, lambda x: x * (1 + 5j), "pixel"),
    ),
    "callable of DPS": ("f", fg.DPS(L.Callable(lambda x: x[:, 0] * 1j))),
    "callable of PnP": ("f", fg.PnP(L.Callable(lambda x: x[:, 0] * 1j))),
    "callable of FK": ("f", fg.FK(L.Callable(lambda x: x[:, 0] * 1j), 2)),
    "adjoint of DPS": ("adjoint", fg.DPS(L.Gaussian(ROWS, linear(complex_adjoint), 0.3))),
    "adjoint of PnP": ("adjoint", fg.PnP(L.Gaussian(ROWS, linear(complex_adjoint), 0.3))),
    "adjoint of a class": ("adjoint", fg.PnP(L.Gaussian(ROWS, ComplexAdjoint(), 0.3))),
    "pseudo-inverse": (
        "pseudo_inverse",
        fg.PiGDM(L.Gaussian(ROWS, Function(lambda x: x[:, :2], pseudo_inverse=complex_adjoint), 0.0)),
    ),
    "pseudo-inverse of a class": ("pseudo_inverse", fg.PiGDM(L.Gaussian(ROWS, ComplexInverse(), 0.0))),
    "proposal": (
        "proposal",
        fg.FK(lambda x: x[:, 0], 2, proposal=lambda x, x0, c, *, seed, step: (x * (1 + 1j), x[:, 0] * 0)),
    ),
    "ratio of a proposal": (
        "proposal",
        fg.FK(lambda x: x[:, 0], 2, proposal=lambda x, x0, c, *, seed, step: (x, x[:, 0] * 0j)),
    ),
}


@pytest.mark.parametrize("case", COMPLEX)
@pytest.mark.filterwarnings("error")
def test_complex_results_are_refused_by_name(case):
    name, guidance = COMPLEX[case]
    with pytest.raises(TypeError, match=rf"^{name}: expected it to return real numbers, got torch\.complex64"):
        draw(clean, guidance, steps=3)


def test_a_complex_operator_of_real_measurements_is_refused():
    for kind, y in ((L.Gaussian, ROWS), (L.Poisson, ROWS.abs())):
        likelihood = kind(y, Function(lambda x: x[:, :2] + 0j), 0.3)
        with pytest.raises(TypeError, match=r"^operator: expected real measurements, as y is, got torch\.complex64"):
            likelihood.log_prob(torch.zeros(2, 3))


def test_complex_functions_of_complex_measurements():
    """The adjoint of complex measurements may return complex numbers. Its real part is used."""
    y = torch.complex(ROWS, ROWS.flip(1))
    matrix = torch.complex(MATRIX, MATRIX.flip(1)).to(torch.complex64)
    function = Function(
        lambda x: x.to(matrix.dtype) @ matrix.T,
        linear=True,
        adjoint=lambda y: y @ matrix.conj(),
        pseudo_inverse=lambda y: y @ torch.linalg.pinv(matrix).T,
    )
    for method in (fg.DPS, fg.PnP):
        expected = draw(clean, method(L.Gaussian(y, Matrix(matrix), 0.3)))
        torch.testing.assert_close(draw(clean, method(L.Gaussian(y, function, 0.3))), expected, rtol=1e-4, atol=1e-5)
    assert draw(clean, fg.PiGDM(L.Gaussian(y, function, 0.0))).isfinite().all()


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_decoders_return_what_functions_do(space):
    """A decoder returns a tensor, or an object with one, as diffusers' autoencoders do."""

    def outcome(wrap):
        likelihood = L.Gaussian(ROWS, Function(lambda x: wrap(x[:, :2])), 0.3)
        encoder = (lambda x: wrap(x / 2)) if space == "pixel" else None
        return draw(clean, fg.LatentPnP(likelihood, lambda z: wrap(2 * z), encoder, space, iterations=2))

    assert torch.equal(outcome(lambda out: types.SimpleNamespace(sample=out)), outcome(lambda out: out))


# --- modules in training mode ---------------------------------------------------------------------------------


class Code(torch.nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(p))

    def forward(self, x, t=None):
        return self.layers(x)

    def reward(self, x):
        return self.layers(x).sum(1)


class CodeOperator(LinearOperator, Code):
    pass


class Holding(LinearOperator):
    """Also holds a reference to itself."""

    def __init__(self, module):
        self.module, self.operator = module, self


def of(operator, y=ROWS):
    return L.Gaussian(y, operator, 0.3)


def functions(m):
    return Function(lambda x: x, linear=True, adjoint=m.forward, pseudo_inverse=m)


IDENTITY = fg.operators.Identity()
# A network or a guidance that has a module with dropout, and the arguments that the message names.
TRAINING = [
    ("net", lambda m: m),
    ("net unconditional", lambda m: fg.Denoiser(m, SCHEDULE, unconditional=m, guidance_scale=2.0)),
    ("net", lambda m: fg.Conditional(m)),
    ("net", lambda m: functools.partial(m)),
    ("net", lambda m: functools.partial(lambda f, x, t: f(x), m)),
    ("net", lambda m: m.forward),
    ("net", lambda m: torch.no_grad()(m.forward)),
    ("net", lambda m: torch.compile(m, backend="eager")),
    ("net", lambda m: torch.compile(m.forward, backend="eager")),
    ("decoder", lambda m: fg.LatentPnP(of(IDENTITY), m)),
    ("decoder encoder", lambda m: fg.LatentPnP(of(IDENTITY), m.forward, functools.partial(m), "pixel")),
    ("operator.f decoder", lambda m: fg.LatentPnP(of(Function(m)), m)),
    ("operator.f", lambda m: fg.PnP(of(Function(m), torch.complex(ROWS, ROWS)))),
    ("operator.adjoint operator.pseudo_inverse", lambda m: fg.PiGDM(of(functions(m)))),
    ("operator", lambda m: fg.DPS(of(CodeOperator(m.layers[1].p)))),
    ("operator.module", lambda m: fg.DPS(of(Holding(m)))),
    ("likelihood.f", lambda m: fg.DPS(L.Callable(m.reward))),
    ("reward", lambda m: fg.FK(m.reward, 2)),
    ("reward", lambda m: fg.FK([(1.0, len), (2.0, m), (3.0, m)], 2)),
    ("reward.f", lambda m: fg.FK(L.Callable(m.reward), 2)),
    ("reward.f", lambda m: fg.FK(L.Callable(m.reward).log_prob, 2)),
    ("potential", lambda m: fg.FK(len, 2, potential=m)),
    ("proposal", lambda m: fg.FK(len, 2, proposal=functools.partial(len, model=m))),
]


@pytest.mark.parametrize("names, make", TRAINING)
def test_modules_in_training_mode_are_named(names, make):
    """Each argument is named once."""

    def named(training, p=0.5):
        module = Code(p)
        given = make(module)
        for part in (module, *(m for _, m in modules_of(None, given))):
            part.train(training)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guided = hasattr(given, "prepare")
            own = given if isinstance(given, fg.Denoiser) else prior(clean if guided else given)
            warn_of_training(own, given if guided else None, stacklevel=2)
        pattern = r"(\S+): its Dropout is in training mode; the module's eval"
        return [re.match(pattern, str(w.message))[1] for w in caught]

    assert named(True) == names.split()
    assert named(False) == named(True, p=0.0) == []


def test_a_run_warns_once_of_training_where_it_is_called():
    module = Code()
    guidance = fg.LatentPnP(of(IDENTITY, torch.zeros(1, 3)), module.forward, iterations=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(clean, guidance, steps=3)
        fg.sample(prior(module), (2, 3), steps=2)
    assert [str(w.message).split(":")[0] for w in caught] == ["decoder", "net"]
    assert {w.filename for w in caught} == {__file__}


# --- ambient modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPS", "PnP", "PiGDM", "DAPS", "TDS"])
@pytest.mark.parametrize("operator", ["matrix", "blur"])
def test_autocast_reaches_the_network_alone(name, operator):
    """A network without a matrix product gives the same bits: the package itself rounds nothing to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    if operator == "matrix":
        operator, shape = fg.operators.Matrix(torch.randn(10, 12, generator=generator), (3, 2, 2)), (2, 3, 2, 2)
    else:
        operator, shape = fg.operators.Blur(torch.ones(3, 3) / 9, "zeros"), (2, 1, 6, 6)
    y = operator(torch.randn(1, *shape[1:], generator=generator))
    likelihood = fg.likelihoods.Gaussian(y, operator, 0.1)
    guidance = {"TDS": lambda v: fg.TDS(v, 8)}.get(name, getattr(fg, name))(likelihood)
    seen = []

    def net(x, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.3 * x

    without = fg.sample(prior(net), shape, guidance=guidance, steps=5, seed=1)
    assert not any(seen)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        within = fg.sample(prior(net), shape, guidance=guidance, steps=5, seed=1)
        assert torch.is_autocast_enabled("cpu")
    assert all(seen) and seen
    assert_same(without, within)


def test_autocast_does_not_reach_a_likelihood_that_is_called():
    """For example in a reward, which runs under the caller's autocast."""
    generator = torch.Generator().manual_seed(0)
    matrix, x0 = torch.randn(10, 12, generator=generator), torch.randn(2, 12, generator=generator)
    likelihood = fg.likelihoods.Gaussian(torch.zeros(1, 10), fg.operators.Matrix(matrix), 0.1)
    expected = likelihood.log_prob(x0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x0 @ matrix.T).dtype is torch.bfloat16
        assert torch.equal(likelihood.log_prob(x0), expected)


def test_the_network_computes_in_the_callers_autocast():
    layer = torch.nn.Linear(3, 3)
    dtypes = []

    def net(x, t):
        out = layer(x)
        dtypes.append(out.dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16):
        draw(net, fg.FK(lambda x: dtypes.append(layer(x).dtype) or x[:, 0], 4))
    assert set(dtypes) == {torch.bfloat16}


@ALL
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_grad_modes_around_sample_change_nothing(name, mode):
    expected = run(name, steps=4)
    with mode():
        again = run(name, steps=4)  # the likelihood is also made in this mode
    assert_same(expected, again)
    assert not expected.x.requires_grad and not again.x.requires_grad and not again.x.is_inference()


def test_a_network_made_in_inference_mode_is_named():
    with torch.inference_mode():
        net = torch.nn.Linear(3, 3).double()
    denoiser = prior(lambda x, t: net(x).sin())
    guidance = fg.DPS(fg.likelihoods.Gaussian(torch.zeros(1, 3), fg.operators.Identity(), 0.5))
    options = dict(steps=2, seed=0, dtype=torch.float64)
    with pytest.raises(RuntimeError) as caught:
        fg.sample(denoiser, (2, 3), guidance=guidance, **options)
    assert "net: holds tensors made in torch.inference_mode" in caught.value.__notes__[1]
    fg.sample(denoiser, (2, 3), **options)
    net = copy.deepcopy(net)  # as the message advises
    assert fg.sample(denoiser, (2, 3), guidance=guidance, **options).x.isfinite().all()


# --- memory ---------------------------------------------------------------------------------------------------


def writes(x, t):
    x[:, 0] = 0.0
    return clean(x, t)


def copies(x, t):
    x = x.clone()
    x[:, 0] = 0.0
    return clean(x, t)


@ALL
def test_a_network_may_write_into_what_it_gets(name):
    outs = [
        fg.sample(prior(net), (2, 3), guidance=guidances()[name](slice(None)), steps=5, seed=2, dtype=torch.float64)
        for net in (writes, copies)
    ]
    assert_same(*outs)


@pytest.mark.parametrize("name", ["tds", "fk"])
def test_a_network_may_reuse_the_memory_of_its_output(name):
    """The next call of a network may overwrite its last output, as a user's CUDA graph does."""
    kept: dict[torch.Size, torch.Tensor] = {}
    truth = example()

    def net(x, t):
        out = truth(x, t)
        if x.requires_grad:
            return out
        buffer = kept.setdefault(x.shape, torch.empty_like(out))
        return buffer.copy_(out)

    options = dict(steps=5, seed=2, dtype=torch.float64)
    guidance = guidances()[name](slice(None))
    outs = [
        fg.sample(fg.Denoiser(f, truth.schedule, "sample"), (2, 3), guidance=guidance, **options) for f in (net, truth)
    ]
    assert_same(*outs)


def test_an_energy_network_may_ask_for_the_gradient_of_its_input():
    def energy(x, t):
        with torch.enable_grad():
            x.requires_grad_(True)
            value = 0.5 * (SIGMA[t][:, None] * x.square()).sum()
            return torch.autograd.grad(value, x, create_graph=True)[0]

    likelihood = gaussian_likelihood().to(dtype=torch.float32)
    for guidance in (None, fg.DPS(likelihood), fg.PnP(likelihood), fg.TDS(likelihood, 4)):
        out = draw(energy, guidance)
        assert not out.requires_grad
        torch.testing.assert_close(out, draw(clean, guidance))


@ALL
def test_what_a_callback_keeps_stays_what_it_was(name):
    kept, copied = [], []

    def callback(progress):
        tensors = [v for v in progress if isinstance(v, torch.Tensor)]
        kept.extend(tensors)
        copied.extend(v.clone() for v in tensors)

    out = run(name, callback=callback)
    assert all(torch.equal(a, b) for a, b in zip(kept, copied, strict=True))

    def scribble(progress):
        for v in progress:
            if isinstance(v, torch.Tensor):
                v.zero_()

    assert_same(out, run(name, callback=scribble))


# --- values that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_gradient_neither_overflows_nor_vanishes_in_float16(dtypes, scale, prediction):
    """DPS is normalised here, so the step must not depend on the scale of the noise, though the gradient does."""

    class Net(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=dtype))

        def forward(self, x, t):
            return 0.9 * x + 0.1 * torch.tanh(x * self.weight)

    def run(net_dtype, dtype, scale):
        prior = fg.Denoiser(Net(net_dtype), fg.schedules.vp_linear(100), prediction)
        likelihood = fg.likelihoods.Gaussian(torch.ones(1, 4), fg.operators.Identity(), scale)
        return fg.sample(prior, (2, 4), guidance=fg.DPS(likelihood, zeta=0.3), steps=10, seed=0, dtype=dtype).x.double()

    expected = run(torch.float64, torch.float64, 1.0)
    assert (run(*dtypes, scale) - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("schedule", [fg.schedules.vp_cosine(1000), fg.schedules.flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("name", ["DPS", "PiGDM", "TDS"])
def test_a_network_that_differentiates_its_input_serves_at_every_level(name, schedule):
    """At the first level guidance takes no derivative, because x_t says nothing about x_0."""

    def energy(x, t):
        with torch.enable_grad():
            return torch.autograd.grad(torch.log(torch.cosh(x)).sum(), x, create_graph=True)[0]

    likelihood = fg.likelihoods.Gaussian(torch.zeros(1, 4), fg.operators.Identity(), 0.5)
    guidance = fg.TDS(likelihood, 2) if name == "TDS" else getattr(fg, name)(likelihood)
    out = [
        fg.sample(fg.Denoiser(net, schedule, "v"), (1, 4), guidance=guidance, steps=5, seed=0).x
        for net in (energy, lambda x, t: torch.tanh(x))
    ]
    assert torch.allclose(*out, atol=1e-5)


@ALL
def test_a_network_that_returns_nan_once_is_named_with_its_step(name):
    truth = example()
    third = truth.schedule.levels(8)[3].t

    def net(x, t):
        broken = (t == third)[:, None] & (torch.arange(len(x)) == 1)[:, None]
        return torch.where(broken, torch.nan, truth(x, t))

    with pytest.raises(FloatingPointError, match=r"^net: expected finite values, got NaN( or infinity)? at step 3"):
        fg.sample(
            fg.Denoiser(net, truth.schedule, "sample"),
            (2, 3),
            guidance=guidances()[name](slice(None)),
            steps=8,
            seed=0,
            dtype=torch.float64,
        )


@pytest.mark.parametrize(
    "guidance",
    [
        fg.DPS,
        fg.PnP,
        lambda v: fg.PnP(v, solver="gradient"),
        fg.DAPS,
        lambda v: fg.LatentPnP(v, lambda z: z),
        lambda v: fg.TDS(v, 8, covariance="point"),
        lambda v: fg.FK(v, 8, covariance="point"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_operator_that_is_not_finite_is_named(guidance, value):
    operator = fg.operators.Function(lambda x: torch.where(x[:, :1] > -9.0, value, 1.0) * (x @ MATRIX.T))
    likelihood = fg.likelihoods.Gaussian(Y, operator, SCALE)
    with pytest.raises(FloatingPointError, match=r"operator: expected finite values, got .* at step 0"):
        fg.sample(example().denoiser(), (2, 3), guidance=guidance(likelihood), steps=4, dtype=torch.float64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("guidance", [fg.DPS, fg.PnP, fg.DAPS, lambda v: fg.PnP(v, solver="gradient")])
def test_one_measurement_that_is_not_finite_is_named(guidance, value):
    """Without a check, the others could hide it in a norm, a conjugate gradient or a comparison."""

    def operator(x):
        z = x @ MATRIX.T
        z[:, 0] = torch.where(x[:, 0] > 0.0, value, z[:, 0])
        return z

    likelihood = fg.likelihoods.Gaussian(Y, fg.operators.Function(operator), SCALE)
    with pytest.raises(FloatingPointError, match=r"operator: expected finite values, got .* at step \d"):
        fg.sample(example().denoiser(), (2, 3), guidance=guidance(likelihood), steps=6, seed=2, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
@pytest.mark.parametrize("array", [False, True])
def test_networks_may_return_the_same_memory_every_time(prediction, array):
    memory = torch.empty(8, 3)

    def shared(f):
        def net(x, t):
            with torch.no_grad():
                out = memory[: len(x)].copy_(f(x, t))
            return out.numpy() if array else out

        return net

    def samples(wrap, **options):
        denoiser = prior(
            wrap(lambda x, t: 0.4 * x + 0.1),
            prediction=prediction,
            unconditional=wrap(lambda x, t: 0.2 * x - 0.1),
            guidance_scale=2.5,
        )
        return [
            fg.sample(denoiser, (4, 3), guidance=guidance, steps=4, seed=1, chunk_size=chunk_size).x
            for chunk_size in (None, 1, 3)
            for guidance in (None, fg.FK(lambda x0: -x0.square().sum(1), 2))
        ]

    for got, expected in zip(samples(shared), samples(lambda net: net), strict=True):
        assert torch.equal(got, expected)


class _InOneBuffer(torch.autograd.Function):
    """``k x`` with an autograd graph, in memory that all calls share, as callables that replay CUDA graphs return."""

    memory = torch.empty(8, 3, dtype=torch.float64)

    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return torch.mul(x, k, out=_InOneBuffer.memory[: len(x)]).detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.k, None


@pytest.mark.parametrize("guidance", [fg.DPS, fg.PiGDM, lambda v: fg.TDS(v, 2)])
def test_networks_with_a_graph_may_return_the_same_memory_every_time(guidance):
    def samples(times):
        free = dict(unconditional=lambda x, t: times(x, -0.4), guidance_scale=2.5)
        denoiser = prior(lambda x, t: times(x, 0.3), prediction="v", **free)
        likelihood = fg.likelihoods.Gaussian(Y, fg.operators.Matrix(MATRIX), SCALE)
        return fg.sample(denoiser, (len(Y), 3), guidance=guidance(likelihood), steps=4, seed=1, dtype=torch.float64).x

    assert torch.equal(samples(_InOneBuffer.apply), samples(torch.mul))


class _Remembers(fg.operators.LinearOperator):
    """With ``reuse``, returns the same memory at every call without a derivative."""

    def __init__(self, reuse):
        self.reuse, self.memory = reuse, {}

    def _out(self, name, value):
        if not self.reuse or value.requires_grad:
            return value
        return self.memory.setdefault((name, value.shape), torch.empty_like(value)).copy_(value)

    def __call__(self, x):
        return self._out("measured", x @ MATRIX.T)

    def adjoint(self, y):
        return self._out("adjoint", y @ MATRIX)


@pytest.mark.parametrize("name", ["DPS", "PnP", "PiGDM", "DAPS", "TDS", "TDS isotropic", "FK"])
def test_operators_may_return_the_same_memory_every_time(name):
    def samples(reuse):
        likelihood = fg.likelihoods.Gaussian(Y, _Remembers(reuse), SCALE)
        if name in ("DPS", "PnP", "PiGDM", "DAPS"):
            guidance = getattr(fg, name)(likelihood)
        elif name == "FK":
            guidance = fg.FK(likelihood, 8)
        else:
            guidance = fg.TDS(likelihood, 8, covariance=name[4:] or "moment")
        return fg.sample(example().denoiser(), (len(Y), 3), guidance=guidance, steps=6, seed=2, dtype=torch.float64)

    assert_same(samples(True), samples(False))


def test_functions_of_the_time_may_return_the_same_memory_every_time():
    memory = torch.empty(())
    shared, anew = (
        fg.sample(prior(clean), (2, 3), eta=eta, steps=4, seed=1).x
        for eta in (lambda t: memory.fill_(t / 100), lambda t: torch.tensor(t / 100))
    )
    assert torch.equal(shared, anew)


def test_the_clean_time_is_no_index_of_a_rewards_table():
    """The clean time is -1, and ``weights[-1]`` would be the weight of the noisiest level."""
    weights = [1.0] * 100
    with pytest.raises(TypeError, match="indices must be integers"):
        draw(clean, fg.FK(lambda x0, t: weights[t] * x0.sum(1), 4))


@pytest.mark.parametrize("linear", [lambda x: x + 1.0, lambda x: x - x.mean() + 1e-3])
def test_a_function_that_is_not_linear_at_zero_is_not_taken_for_linear(linear):
    likelihood = fg.likelihoods.Gaussian(Y[:, :1], fg.operators.Function(linear, linear=True, event=(1,)), SCALE)
    with pytest.raises(ValueError, match="operator: expected a linear one, which maps 0 to 0, got "):
        fg.sample(prior(clean), (2, 1), guidance=fg.PiGDM(likelihood), steps=2)


# --- derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_derivative_of_plain_sampling_is_the_true_one(eta):
    layer = torch.nn.Linear(3, 3).double()
    x_T, direction = (torch.randn(1, 3, dtype=torch.float64) for _ in range(2))

    def total(x):
        net = lambda x, t: torch.tanh(layer(x))  # noqa: E731
        return fg.sample(prior(net), (1, 3), steps=5, eta=eta, seed=4, x_T=x, dtype=torch.float64).x.square().sum()

    leaf = x_T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    h = 1e-6
    difference = (total(x_T + h * direction) - total(x_T - h * direction)).item() / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-7)
    with torch.no_grad():
        assert not total(leaf).requires_grad


def test_the_derivative_with_several_samples_per_observation():
    x_T = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    options = dict(steps=5, eta=0.5, seed=4, dtype=torch.float64)
    grouped = fg.sample(prior(lambda x, t: x.sin()), (2, 3), x_T=x_T, samples_per_observation=2, **options).x
    (gradient,) = torch.autograd.grad(grouped.square().sum(), x_T)
    flat = x_T.detach().reshape(4, 3).requires_grad_()
    alone = fg.sample(prior(lambda x, t: x.sin()), (4, 3), x_T=flat, **options).x
    (expected,) = torch.autograd.grad(alone.square().sum(), flat)
    assert torch.equal(grouped.reshape(4, 3), alone) and torch.equal(gradient.reshape(4, 3), expected)


@ALL
def test_a_forward_mode_derivative_is_refused(name):
    shape = (2, 24, 3) if name in WEIGHTED else (2, 3)
    x_T = torch.zeros(shape, dtype=torch.float64)

    def draw(x_T):
        return run(name, x_T=x_T, steps=2).x

    with pytest.raises(ValueError, match="x_T: expected a tensor without a forward-mode tangent"):
        torch.func.jvp(draw, (x_T,), (x_T,))
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match="x_T: expected a tensor without a forward-mode tangent"):
            draw(forward_ad.make_dual(x_T, x_T))
        with pytest.raises(ValueError, match="y: expected a tensor without a forward-mode tangent"):
            y = forward_ad.make_dual(Y, Y)
            fg.sample(example().denoiser(), (2, 3), guidance=fg.PnP(gaussian_likelihood(y)), steps=2)
        draw(x_T)


def test_a_guidance_scale_or_noise_scale_that_needs_a_gradient_is_refused():
    scale = torch.tensor([1.0, 2.0], requires_grad=True)
    denoiser = prior(clean, unconditional=clean, guidance_scale=scale)
    with pytest.raises(ValueError, match="guidance_scale: expected a tensor that needs no gradient"):
        fg.sample(denoiser, (2, 3), steps=2)
    likelihood = fg.likelihoods.Gaussian(Y, fg.operators.Matrix(MATRIX, (3,)), scale.new_ones(2).requires_grad_())
    with pytest.raises(ValueError, match="scale: expected a tensor that needs no gradient"):
        fg.sample(prior(clean), (2, 3), guidance=fg.DPS(likelihood), steps=2)
    with torch.no_grad():
        fg.sample(denoiser, (2, 3), steps=2)


@ALL
def test_a_derivative_through_guidance_is_refused(name):
    guidance = guidances()[name](slice(None))
    if guidance is None:
        return
    shape = (2, getattr(guidance, "particles", 1), 3) if hasattr(guidance, "particles") else (2, 3)
    x_T = torch.zeros(shape, requires_grad=True)
    with pytest.raises(ValueError, match=r"x_T: expected a tensor that needs no gradient with \w+"):
        run(name, x_T=x_T)
    with torch.no_grad():
        run(name, x_T=x_T, steps=2)


@pytest.mark.parametrize("make", [fg.DPS, fg.PnP, fg.PiGDM, fg.DAPS, lambda v: fg.TDS(v, 4), lambda v: fg.FK(v, 4)])
def test_an_observation_or_operator_that_needs_a_gradient_is_refused(make):
    y = Y.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"y: expected a tensor that needs no gradient"):
        fg.sample(example().denoiser(), (2, 3), guidance=make(gaussian_likelihood(y)), steps=2)
    operator = fg.operators.Blur(torch.ones(1, 1).requires_grad_())
    likelihood = fg.likelihoods.Gaussian(torch.zeros(1, 1, 2, 2), operator, 0.5)
    with pytest.raises(ValueError, match=r"operator.kernel: expected a tensor that needs no gradient"):
        fg.sample(prior(clean), (1, 1, 2, 2), guidance=make(likelihood), steps=2)


# --- classifier-free guidance ---------------------------------------------------------------------------------


def guided(scale, shape=(4, 3, 4, 4), guidance=None, **options) -> torch.Tensor:
    denoiser = prior(clean, unconditional=lambda x, t: 0.5 * clean(x, t), guidance_scale=scale)
    return fg.sample(denoiser, shape, guidance=guidance, steps=5, seed=1, eta=0.0, **options).x


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("trailing", [(), (1, 1, 1)])
def test_a_guidance_scale_for_each_observation(chunk_size, trailing):
    scales = torch.tensor([7.0, 5.0, 3.0, 1.0])
    both = guided(scales.reshape(-1, *trailing), chunk_size=chunk_size)
    for b, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(both[b], guided(scale)[b])


def test_a_guidance_scale_for_each_observation_with_particles():
    scales, reward = torch.tensor([4.0, 1.5]), lambda x: -x.square().flatten(1).sum(1)
    both = guided(scales, (2, 3, 4, 4), fg.FK(reward, 3))
    for b, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(both[b], guided(scale, (2, 3, 4, 4), fg.FK(reward, 3))[b])


def test_a_guidance_scale_that_follows_the_time():
    levels = SCHEDULE.levels(5)[:-1]
    table = [1.0, 2.0, 3.0, 2.0, 1.0]
    by_time = dict(zip([level.t for level in levels], table, strict=True))
    used = []

    def half(x, t):
        used.append(int(t[0]))
        return 0.5 * clean(x, t)

    def expected():
        x = fg.ops.randn((1, 3), seed=1, stream=1)
        x = x * (levels[0].alpha ** 2 + levels[0].sigma ** 2) ** 0.5
        for t, s, scale in zip(levels, [*levels[1:], SCHEDULE.levels(5)[-1]], table, strict=True):
            output = (0.5 + 0.5 * scale) * t.sigma * x
            x = fg.reference.reverse_step(x, output, (t.alpha, t.sigma, s.alpha, s.sigma, 0.0), seed=1)
        return x

    for scale in (table, tuple(table), np.array(table), by_time.__getitem__):
        torch.testing.assert_close(guided(scale, (1, 3)), expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scale, error, message",
    [
        (float("nan"), ValueError, "guidance_scale: expected finite values"),
        (float("inf"), ValueError, "guidance_scale: expected finite values"),
        (torch.tensor([1.0, torch.inf]), ValueError, "guidance_scale: expected finite values"),
        (torch.ones(4, 4), ValueError, r"guidance_scale: expected a number for each observation, got shape \[4, 4\]"),
        (torch.ones(3), ValueError, "guidance_scale: expected a number, or one for each of 4 observations, got 3"),
        ([1.0, 2.0], ValueError, "guidance_scale: expected a table of 5 steps, got 2 entries"),
        (lambda t: float("nan"), ValueError, "guidance_scale: expected finite values"),
        ("7.5", TypeError, "guidance_scale: expected a number, a table"),
        (True, TypeError, "guidance_scale: expected a number, a table"),
    ],
)
def test_guidance_scales_that_are_refused(scale, error, message):
    with pytest.raises(error, match=message):
        guided(scale)
