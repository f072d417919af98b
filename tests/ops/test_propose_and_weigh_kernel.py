"""The cpu kernel of `propose_and_weigh`. The state has the bits of `reverse_step`. The weights agree with exact sums
over the kernel's own normals. No result depends on threads, instruction set or addresses."""

from __future__ import annotations

import math

import pytest
import torch

from fastguide import ops
from fastguide.ops import _arguments, _native

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VP = (0.6, 0.8, 0.8, 0.6, 0.35)
STILL = (0.6, 0.8, 0.8, 0.6, 0.0)
COUNTER = dict(seed=2**64 - 3, step=2**32 - 2, stream=7, first_particle=2**32 - 2)


def inputs(particles: int, elements: int, dtypes=(torch.float32,) * 3, weights_dtype=torch.float64, seed: int = 0):
    """x, x0_hat, a displacement of about tau / 3, log-weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, particles, elements, generator=generator, dtype=torch.float64)
    log_weights = torch.randn(particles, generator=generator, dtype=torch.float64)
    tensors = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    return tensors[0], tensors[1], 0.1 * tensors[2], log_weights.to(weights_dtype)


def per_sample(particles: int) -> tuple[torch.Tensor, ...]:
    """Coefficients for each particle. Every third particle gets no noise."""
    rows = [(VP, STILL, (0.5, 0.7, 0.9, 0.3, 0.3))[n % 3] for n in range(particles)]
    return tuple(torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(5))


def levels_of(coefficients, x):
    """Coefficients as the kernel takes them, without checks."""
    if isinstance(coefficients[0], float):
        return tuple(coefficients), None
    return _arguments.scalars(coefficients, x, "sample")


def kernel(
    x, x0_hat, displacement, log_weights, coefficients, *, threads=1, seed=0, step=0, stream=0, first_particle=0
):
    """x_s and the log-weights, written into the middle of poisoned buffers. The margins must not change."""
    particles, elements = x.shape
    levels, table = levels_of(coefficients, x)
    buffers, results = [], []
    for like in (x, log_weights):
        buffer = torch.full(((like.numel() + 128) * like.element_size(),), 0x5A, dtype=torch.uint8)
        buffers.append(buffer)
        results.append(buffer.view(like.dtype)[64 : 64 + like.numel()])
    code = _native.CPU_DTYPES
    _native.module("cpu").propose_and_weigh(
        x.data_ptr(), code[x.dtype], x0_hat.data_ptr(), code[x0_hat.dtype], displacement.data_ptr(),
        code[displacement.dtype], results[0].data_ptr(), log_weights.data_ptr(), results[1].data_ptr(),
        log_weights.dtype == torch.float64, None, 0, 0.0, 0.0, table.data_ptr() if levels == () else levels, 1.0,
        (particles, elements), seed, step, stream, first_particle, threads,
    )  # fmt: skip
    for buffer, result in zip(buffers, results, strict=True):
        margin = 64 * result.element_size()
        assert (buffer[:margin] == 0x5A).all() and (buffer[-margin:] == 0x5A).all()
    return results[0].clone().reshape(x.shape), results[1].clone()


def assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def state_of(x, x0_hat, displacement, coefficients, **counter) -> torch.Tensor:
    """The state by `reverse_step`. Particles without noise get no displacement."""
    tau = coefficients[4]
    if isinstance(tau, torch.Tensor):
        displacement = torch.where(tau[:, None] > 0, displacement, 0.0)
    elif tau == 0.0:
        displacement = None
    return ops.reverse_step(
        x, x0_hat, coefficients, prediction="sample", displacement=displacement, backend="cpu", **counter
    )


def ratios(x, displacement, coefficients, **counter) -> tuple[torch.Tensor, torch.Tensor]:
    """``-(sum(delta z) + sum(delta^2) / 2)`` ``[N]`` in float64, by ``math.fsum``, from the kernel's displacement and
    normals. Also the sum of ``|delta| (|z| + |delta| / 2)``."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tau = torch.as_tensor(coefficients[4], dtype=compute).double().expand(x.shape[0])[:, None]
    z = ops.randn(x.shape, dtype=compute, backend="cpu", **counter).double()
    delta = torch.where(tau > 0, displacement.to(compute).double() / tau, 0.0)
    sums = [-math.fsum(row) for row in (delta * (z + 0.5 * delta)).tolist()]
    return torch.tensor(sums, dtype=torch.float64), (delta.abs() * (z.abs() + 0.5 * delta.abs())).sum(1)


# --- values -------------------------------------------------------------------------------------------------

# Bounds of the error of a particle's log-density ratio, divided by the sum of |delta| (|z| + |delta| / 2), from so many
# elements on. Terms are float or double, with the roundings of 1 / (2 tau) and two more. Four terms at a time are added
# in that type, the rest in double. Measured with 40,000 particles of one element to 10 of a million, at five tau: float
# 1.2e-7, 7.3e-8, 5.8e-8, 2.5e-8, 1.1e-8, 5.5e-9 and 4.8e-9 (at a million); double 6.5e-16, 4.6e-16, 2.9e-16, 1.5e-16,
# 6e-17, 5e-17, 3.4e-16.
ALLOWED = {
    torch.float32: {1: 1.7e-7, 7: 1.1e-7, 17: 8e-8, 100: 4e-8, 1000: 1.6e-8, 10_000: 8e-9, 1_000_000: 8e-9},
    torch.float64: {1: 9e-16, 7: 7e-16, 17: 5e-16, 100: 3e-16, 1000: 2e-16, 10_000: 2e-16, 1_000_000: 5e-16},
}


def allowed(dtype: torch.dtype, elements: int) -> float:
    return [error for least, error in ALLOWED[dtype].items() if elements >= least][-1]


@pytest.mark.parametrize("elements", ALLOWED[torch.float32])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_error_of_the_ratio(dtype, elements):
    x, x0_hat, displacement, log_weights = inputs(max(1, 4000 // elements), elements, (dtype,) * 3)
    worst = 0.0
    for tau in (0.35, 0.001, 1.1):
        coefficients = (0.6, 0.8, 0.8, 1.2, tau)
        push = 3.0 * tau * displacement
        _, weights = kernel(x, x0_hat, push, 0 * log_weights, coefficients, seed=elements)
        ratio, size = ratios(x, push, coefficients, seed=elements)
        worst = max(worst, float(((weights - ratio).abs() / size).max()))
    assert 0.05 * allowed(dtype, elements) < worst <= allowed(dtype, elements)


# Up to 15 terms have their own sum; more terms are added 64 at a time. So: fewer than 64, 64, several times 64 and a
# rest, a tile, and one element more.
@pytest.mark.parametrize("elements", (1, 2, 3, 4, 5, 15, 16, 64, 1000, 2048, 2049))
def test_every_size(elements):
    for particles in (0, 1, 3, 257):
        x, x0_hat, displacement, log_weights = inputs(particles, elements)
        for coefficients in (VP, STILL, per_sample(particles)):
            x_s, weights = kernel(x, x0_hat, displacement, log_weights, coefficients, **COUNTER)
            assert_same_bits([x_s], [state_of(x, x0_hat, displacement, coefficients, **COUNTER)])
            ratio, size = ratios(x, displacement, coefficients, **COUNTER)
            error = allowed(torch.float32, elements) * size + 2**-52 * log_weights.abs()
            assert ((weights - log_weights - ratio).abs() <= error).all()


# Each tensor is converted on its own: every dtype of one tensor with every dtype of each other tensor.
@pytest.mark.parametrize("dtypes", [(FLOATS[i], FLOATS[k], FLOATS[(i + k) % 4]) for i in range(4) for k in range(4)])
def test_every_mix_of_dtypes(dtypes):
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    for particles, elements in ((150, 9), (1, 2500)):
        x, x0_hat, displacement, log_weights = inputs(particles, elements, dtypes)
        x_s, weights = kernel(x, x0_hat, displacement, log_weights, VP, **COUNTER)
        assert_same_bits([x_s], [state_of(x, x0_hat, displacement, VP, **COUNTER)])
        ratio, size = ratios(x, displacement, VP, **COUNTER)
        error = allowed(compute, elements) * size + 2**-52 * log_weights.abs()
        assert ((weights - log_weights - ratio).abs() <= error).all()


@pytest.mark.parametrize("elements", (1, 2, 5, 40, 3000))
def test_float32_log_weights_are_rounded_once(elements):
    x, x0_hat, displacement, log_weights = inputs(50, elements, weights_dtype=torch.float32)
    _, single = kernel(x, x0_hat, displacement, log_weights, VP, seed=1)
    _, double = kernel(x, x0_hat, displacement, log_weights.double(), VP, seed=1)
    assert single.dtype == torch.float32 and torch.equal(single, double.float())


@pytest.mark.parametrize("elements", (1, 3, 70, 3000))
@pytest.mark.parametrize("weights_dtype", (torch.float32, torch.float64))
def test_without_noise_the_bits_of_the_base_kernel(elements, weights_dtype):
    """Not even a NaN in the displacement has an effect, and the weights keep their bits."""
    x, x0_hat, displacement, log_weights = inputs(6, elements, weights_dtype=weights_dtype)
    displacement[1::3] = math.nan
    log_weights[1] = -0.0
    x_s, weights = kernel(x, x0_hat, displacement, log_weights, per_sample(6), seed=1)
    base = ops.reverse_step(x, x0_hat, STILL, prediction="sample")
    assert_same_bits((x_s[1::3], weights[1::3]), (base[1::3], log_weights[1::3]))
    assert x_s.isfinite().all() and weights.isfinite().all()
    assert (weights[0::3] != log_weights[0::3]).all()
    assert_same_bits(kernel(x, x0_hat, displacement, log_weights, STILL), (base, log_weights))


@pytest.mark.parametrize("elements", (1, 2, 40, 3000))
def test_not_finite_particles_keep_to_themselves(elements):
    x, x0_hat, displacement, log_weights = inputs(6, elements)
    expected = kernel(x, x0_hat, displacement, log_weights, VP, seed=1)
    log_weights[0], displacement[1], displacement[2, -1], x[3, 0] = -math.inf, math.nan, math.inf, math.nan
    x_s, weights = kernel(x, x0_hat, displacement, log_weights, VP, seed=1)
    assert_same_bits((x_s[4:], weights[4:]), (expected[0][4:], expected[1][4:]))
    assert torch.equal(x_s[0], expected[0][0]) and weights[0] == -math.inf
    assert x_s[1].isnan().all() and weights[1].isnan()
    assert x_s[2, -1] == math.inf and weights[2] == -math.inf
    assert x_s[3, 0].isnan() and weights[3] == expected[1][3]


def test_the_smallest_tau():
    """1 / tau overflows float. A displacement of 0 must still not change the weight."""
    x, x0_hat, displacement, log_weights = inputs(3, 5)
    for tau in (1e-39, 1e-44, 1e-60):
        x_s, weights = kernel(x, x0_hat, 0 * displacement, log_weights, (*VP[:4], tau), seed=1)
        assert torch.equal(weights, log_weights) and x_s.isfinite().all()


# --- what no result depends on ------------------------------------------------------------------------------


def settings():
    """Calls that together take every path through the kernel."""
    for particles, elements in ((67, 1), (67, 2), (67, 3), (67, 7), (41, 33), (41, 100), (5, 2049), (2, 5000)):
        for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.float32), (torch.float64,) * 3):
            for coefficients in (VP, per_sample(particles)):
                yield *inputs(particles, elements, dtypes), coefficients


@pytest.mark.parametrize("name", _native.instruction_sets()[1:])
def test_every_instruction_set_gives_the_same_bits(name, instruction_set):
    for arguments in settings():
        best = kernel(*arguments, **COUNTER)
        with instruction_set(name):
            assert_same_bits(kernel(*arguments, **COUNTER), best)


def test_chunks_give_the_same_bits():
    for *tensors, coefficients in settings():
        x_s, weights = kernel(*tensors, coefficients, seed=3, first_particle=100)
        for low, high in ((0, 1), (1, 5), (len(x_s) // 2, len(x_s))):
            rows = slice(low, high)
            levels = tuple(c[rows] if isinstance(c, torch.Tensor) else c for c in coefficients)
            part = kernel(*(t[rows] for t in tensors), levels, seed=3, first_particle=100 + low)
            assert_same_bits(part, (x_s[rows], weights[rows]))


@pytest.mark.parametrize(("particles", "elements"), ((1, 200_001), (3, 70_001), (60_001, 3), (100_001, 1), (70, 3001)))
@pytest.mark.parametrize("mixed", (False, True))
def test_threads_give_the_same_bits(particles, elements, mixed):
    arguments = *inputs(particles, elements), per_sample(particles) if mixed else VP
    one, *others = (kernel(*arguments, seed=9, threads=threads) for threads in (1, 2, 3))
    for other in others:
        assert_same_bits(other, one)


@pytest.mark.parametrize("name", _native.instruction_sets())
@pytest.mark.parametrize("elements", (3001, 3024))  # with 3024, rows start at aligned addresses
@pytest.mark.parametrize("mixed", (False, True))
def test_large_results_have_the_same_bits(name, elements, mixed, instruction_set):
    """From 8 MiB on, results are written past the caches, and each normal is used as soon as it is made."""
    particles, rows = 701, (0, 1, 2, 350, 700)
    tensors = inputs(particles, elements)
    coefficients = per_sample(particles) if mixed else VP
    expected = [
        kernel(*(t[n : n + 1] for t in tensors), [c[n : n + 1] if mixed else c for c in coefficients], first_particle=n)
        for n in rows
    ]
    with instruction_set(name):
        for threads in (1, 2):
            x_s, weights = kernel(*tensors, coefficients, threads=threads)
            for n, part in zip(rows, expected, strict=True):
                assert_same_bits(part, (x_s[n : n + 1], weights[n : n + 1]))


# --- from Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((0, 3), (4, 0), (0,), (0, 0, 2)))
def test_empty(shape):
    x, log_weights = torch.zeros(shape), torch.arange(shape[0], dtype=torch.float32)
    for coefficients in (VP, STILL, per_sample(shape[0])):
        x_s, weights = ops.propose_and_weigh(x, x, x, log_weights, coefficients, seed=0, backend="cpu")
        assert x_s.shape == shape and torch.equal(weights, log_weights)
        assert weights.numel() == 0 or weights.data_ptr() != log_weights.data_ptr()


def test_function_transforms_go_through_the_reference():
    x, x0_hat, displacement, log_weights = inputs(3, 4, (torch.float64,) * 3)

    def step(x):
        return ops.propose_and_weigh(x, x0_hat, displacement, log_weights, VP, seed=1)

    for got, expected in zip(torch.func.vmap(step)(x[None]), step(x), strict=True):
        torch.testing.assert_close(got[0], expected, rtol=1e-14, atol=1e-14)


def test_the_module_takes_no_wrong_call():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="expected 22 arguments, got 1"):
        _native.module("cpu").propose_and_weigh(x.data_ptr())
    with pytest.raises(ValueError, match="coefficients"):
        kernel(x, x, x, torch.zeros(2), (*VP[:4], 0.7))
    with pytest.raises(ValueError, match="step"):
        kernel(x, x, x, torch.zeros(2), VP, step=2**32)
