"""Operators against their dense matrices, against scipy, and by the definitions of adjoint and pseudo-inverse."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import fastguide as fg
from fastguide.operators import (
    AveragePool,
    Blur,
    Function,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
    Operator,
    ParallelBeam,
    gram_over_diagonal,
    mean_gram_diagonal,
    measure_gram,
    solve_iteratively,
)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def stride_and_mix(x):
    """A linear function with more columns than rows: every second element plus three times the next one."""
    return x[:, ::2] + 3.0 * x.roll(-1, 1)[:, ::2]


def stride_and_mix_adjoint(y):
    x = y.new_zeros(y.shape[0], 2 * y.shape[1])
    x[:, ::2] = y
    return x + 3.0 * x.roll(1, 1)


ROWS = torch.tensor([0.2, 0.7, -0.3], dtype=torch.float64)
COLUMNS = torch.tensor([0.1, 0.5, 0.9, -0.2, 0.3], dtype=torch.float64)
RANK_TWO = normal(5, 2, seed=1) @ normal(2, 7, seed=2)

# name: (operator, event, measurement, rank). Each class is here with one channel, several or none, with more and with
# fewer measurements than elements, with full and lower rank, and with each way to compute its spectrum.
OPERATORS = {
    "identity": (Identity(), (2, 3), (2, 3), 6),
    "inpainting": (Inpainting(torch.arange(40).reshape(2, 4, 5) % 3 == 1), (2, 4, 5), (13,), 13),
    "inpainting, flat": (Inpainting(torch.arange(9) % 3 == 0), (9,), (3,), 3),
    "pool": (AveragePool(2), (3, 4, 6), (3, 2, 3), 18),
    "pool, one channel": (AveragePool(3), (6, 3), (2, 1), 2),
    "pool by 1": (AveragePool(1), (1, 2, 3), (1, 2, 3), 6),
    "circular": (Blur(normal(3, 5, seed=4)), (2, 6, 7), (2, 6, 7), 84),
    "circular, as large as the image": (Blur(normal(5, 3, seed=5)), (1, 5, 3), (1, 5, 3), 15),
    "circular, singular": (Blur(torch.tensor([[-1.0, 0.0, 1.0]])), (2, 4, 6), (2, 4, 6), 32),
    "circular, zero": (Blur(torch.zeros(3, 3)), (1, 4, 4), (1, 4, 4), 0),
    "zeros": (Blur(torch.outer(ROWS, COLUMNS), "zeros"), (2, 6, 7), (2, 6, 7), 84),
    "zeros, singular": (Blur(torch.tensor([[1.0, 0.0, 0.0]]), "zeros"), (2, 4, 5), (2, 4, 5), 32),
    "zeros, not separable": (Blur(normal(3, 5, seed=6), "zeros"), (2, 6, 7), (2, 6, 7), 84),
    "zeros, not separable, flat": (Blur(normal(3, 3, seed=7), "zeros"), (4, 5), (4, 5), 20),
    "wide": (Matrix(normal(4, 9, seed=8)), (9,), (4,), 4),
    "tall": (Matrix(normal(9, 4, seed=9), event=(2, 2)), (2, 2), (9,), 4),
    "square": (Matrix(normal(6, 6, seed=10)), (6,), (6,), 6),
    "rank 2": (Matrix(RANK_TWO), (7,), (5,), 2),
    "rank 2, tall": (Matrix(RANK_TWO.T.contiguous()), (5,), (7,), 2),
    "one row": (Matrix(normal(1, 8, seed=11)), (8,), (1,), 1),
    "parallel beam": (ParallelBeam([0.3, 1.3, 2.2], 7, 5), (1, 7, 7), (15,), 15),
    "parallel beam, bins that see nothing": (ParallelBeam([0.7], 4, 9), (1, 4, 4), (9,), 7),
    "function": (Function(stride_and_mix, linear=True, event=(8,)), (8,), (4,), 4),
    "function with adjoint": (
        Function(stride_and_mix, linear=True, event=(8,), adjoint=stride_and_mix_adjoint), (8,), (4,), 4,
    ),
}  # fmt: skip

SPECTRAL = [n for n, (operator, *_) in OPERATORS.items() if operator.spectral]
DIAGONAL = [n for n in OPERATORS if not n.startswith("function")]


def cases(names=OPERATORS):
    return pytest.mark.parametrize("operator, event, measurement, rank", [OPERATORS[n] for n in names], ids=names)


# float64 separates wrong formulas from rounding. float32 finds tensors that an operator does not convert.
precision = pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["float64", "float32"]
)


def dense_of(f, shape):
    """The matrix of a linear function on events of this shape."""
    size = math.prod(shape)
    return f(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T


def close(got, expected, rtol, scale=None):
    """Equal to ``rtol`` times the largest element, because terms cancel within elements."""
    scale = float(expected.abs().max()) if scale is None else scale
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=rtol * max(scale, 1e-300) + 1e-300)


# --- adjoint, matrix ----------------------------------------------------------------------------------------


@cases()
@precision
def test_adjoint(operator, event, measurement, rank, dtype, rtol):
    operator = operator.to(dtype=dtype)
    x, y = normal(4, *event, dtype=dtype), normal(4, *measurement, seed=1, dtype=dtype)
    z, back = operator(x), operator.adjoint(y)
    assert z.dtype == back.dtype == dtype
    assert z.shape == y.shape and back.shape == x.shape
    left, right = (z.double() * y).flatten(1).sum(1), (x.double() * back).flatten(1).sum(1)
    bound = (z.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)).max()
    close(left, right, rtol, float(bound))


def test_parallel_beam_sums_rows_at_angle_0_and_columns_at_a_right_angle():
    x = normal(3, 1, 6, 6)
    sinogram = ParallelBeam([0.0, math.pi / 2, math.pi], 6)(x).unflatten(1, (3, 6))
    expected = torch.stack([x.sum(2), x.sum(3), x.sum(2).flip(2)], dim=2)[:, 0]
    torch.testing.assert_close(sinogram, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("angle", [0.1, math.pi / 4, 1.2, 2.0, -0.7])
def test_parallel_beam_of_a_square_is_a_trapezoid(angle):
    """The chord lengths of a square of side 8, in closed form, averaged over each bin by many rays."""
    found = ParallelBeam([angle], 8, 12)(torch.ones(1, 1, 8, 8, dtype=torch.float64))[0]
    s = (torch.arange(12 * 4000, dtype=torch.float64) + 0.5) / 4000 - 6
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    chord = (((cos + sin) * 4 - s.abs()) / (cos * sin)).clamp(0, 8 / max(cos, sin))
    torch.testing.assert_close(found, chord.reshape(12, 4000).mean(1), rtol=0, atol=5e-5)
    assert found.sum() == pytest.approx(64, abs=1e-5)  # every view has the whole area


def test_parallel_beam_of_a_disc_is_its_chord():
    size, radius, x0, y0 = 128, 40.0, 9.0, -6.0
    fine = (torch.arange(8 * size, dtype=torch.float64) + 0.5) / 8 - size / 2
    inside = (fine[None, :] - x0) ** 2 + (fine[:, None] - y0) ** 2 < radius**2
    disc = F.avg_pool2d(inside.double()[None, None], 8)
    angles = torch.tensor([0.0, 0.3, 1.1, 2.9])
    found = ParallelBeam(angles, size)(disc).reshape(4, size)
    s = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    away = s - (x0 * angles.cos() + y0 * angles.sin())[:, None]  # distance of the ray from the centre of the disc
    expected = 2 * (radius**2 - away**2).clamp(min=0).sqrt()
    inner = away.abs() < 0.9 * radius  # where the chord changes little within a bin
    assert (found - expected)[inner].abs().max() < 0.35  # the disc is made of pixels; its chords are up to 80
    assert (found[away.abs() > radius + 1.5]).abs().max() < 1e-6


@cases()
@precision
def test_dense_matrix(operator, event, measurement, rank, dtype, rtol):
    a = operator.matrix(event, dtype)
    assert a.dtype == dtype and a.shape == (math.prod(measurement), math.prod(event))
    x, y = normal(3, *event), normal(3, *measurement, seed=1)
    close(x.flatten(1) @ a.double().T, operator(x).flatten(1), rtol)
    close(y.flatten(1) @ a.double(), operator.adjoint(y).flatten(1), rtol)
    assert torch.linalg.matrix_rank(a) == rank


def test_average_pool_is_a_mean_of_blocks():
    x = normal(2, 3, 6, 8)
    expected = x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-2, -1))
    close(AveragePool(2)(x), expected, 1e-15)
    close(AveragePool(2)(x), F.avg_pool2d(x, 2), 1e-15)


def test_inpainting_keeps_what_the_mask_shows():
    mask = normal(2, 3, seed=3) > 0
    x = normal(4, 2, 3)
    operator = Inpainting(mask)
    assert torch.equal(operator(x), torch.stack([row[mask] for row in x]))
    assert torch.equal(operator.adjoint(operator(x)), torch.where(mask, x, 0.0))
    assert torch.equal(operator.pseudo_inverse(operator(x)), torch.where(mask, x, 0.0))


@pytest.mark.parametrize("padding, mode", [("circular", "wrap"), ("zeros", "constant")])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 5), (7, 1), (1, 7), (7, 7)])
def test_blur_is_the_convolution_of_scipy(padding, mode, size):
    kernel = np.random.default_rng(0).standard_normal(size)
    operator = Blur(torch.as_tensor(kernel), padding)
    x = normal(2, 3, 7, 9)
    expected = [[ndimage.convolve(image, kernel, mode=mode) for image in sample] for sample in x.numpy()]
    close(operator(x), torch.as_tensor(np.array(expected)), 1e-13)
    expected = [[ndimage.correlate(image, kernel, mode=mode) for image in sample] for sample in x.numpy()]
    close(operator.adjoint(x), torch.as_tensor(np.array(expected)), 1e-13)


# --- spectrum -----------------------------------------------------------------------------------------------


@cases(SPECTRAL)
def test_eigenvalues_are_those_of_the_gram_matrix(operator, event, measurement, rank):
    a = operator.matrix(event)
    y = normal(2, *measurement)
    eigenvalues = torch.as_tensor(operator.eigenvalues(y), dtype=torch.float64)
    assert eigenvalues.min() >= 0
    got = eigenvalues.expand(measurement).flatten().sort().values
    close(got, torch.linalg.eigvalsh(a @ a.T), 1e-13)


@cases(SPECTRAL)
@precision
def test_transform_diagonalises_the_gram_matrix(operator, event, measurement, rank, dtype, rtol):
    operator = operator.to(dtype=dtype)
    y = normal(2, *measurement, dtype=dtype)
    c = operator.transform(y)
    torch.testing.assert_close(c.abs().square().flatten(1).sum(1), y.square().flatten(1).sum(1))  # orthonormal
    back = operator.inverse_transform(c)
    assert back.dtype == dtype
    close(back, y, rtol)
    gram = operator(operator.adjoint(y))
    close(operator.inverse_transform(c * operator.eigenvalues(y)), gram, rtol, float(gram.abs().max()) + 1e-12)


@cases(SPECTRAL)
@precision
def test_solve_gram(operator, event, measurement, rank, dtype, rtol):
    dense = operator.matrix(event)
    v = normal(3, *measurement)
    for a, b in ((0.3, 1e-3), (2.0, 50.0)):  # the operator dominates, and the noise dominates
        matrix = a * dense @ dense.T + b * torch.eye(dense.shape[0], dtype=torch.float64)
        expected = torch.linalg.solve(matrix, v.flatten(1).T).T.reshape(v.shape)
        got = operator.to(dtype=dtype).solve_gram(v.to(dtype), a, b)
        assert got.dtype == dtype
        close(got, expected, rtol)


@cases(SPECTRAL)
@precision
def test_solve_gram_without_noise_is_the_pseudo_inverse(operator, event, measurement, rank, dtype, rtol):
    dense = operator.matrix(event)
    v = normal(3, *measurement)
    expected = v.flatten(1) @ torch.linalg.pinv(0.3 * dense @ dense.T, rtol=1e-11, hermitian=True)
    got = operator.to(dtype=dtype).solve_gram(v.to(dtype), 0.3, 0.0)
    # The condition of the gram matrices here is below 1e4.
    close(got.flatten(1), expected, rtol if dtype == torch.float64 else 1e-3)


@cases(SPECTRAL)
def test_gram_logdet(operator, event, measurement, rank):
    dense = operator.matrix(event)
    gram = dense @ dense.T
    for a, b in [(1.0, 1.0), (0.2, 1e-4), (1.0, 0.0)]:
        expected = torch.linalg.slogdet(a * gram + b * torch.eye(len(gram), dtype=torch.float64)).logabsdet
        got = operator.gram_logdet(normal(2, *measurement), a, b)
        assert got.dtype == torch.float64 and got.shape == ()
        if b == 0.0 and rank < len(gram):
            assert got < -60 * (len(gram) - rank)  # -inf up to rounding of the eigenvalues that are 0
        else:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    single = operator.to(dtype=torch.float32).gram_logdet(normal(2, *measurement, dtype=torch.float32), 1.0, 1e-2)
    expected = torch.linalg.slogdet(gram + 1e-2 * torch.eye(len(gram), dtype=torch.float64)).logabsdet
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-5)


@cases(DIAGONAL)
@precision
def test_gram_diagonal(operator, event, measurement, rank, dtype, rtol):
    a = operator.matrix(event)
    y = normal(2, *measurement, dtype=dtype)
    diagonal = torch.as_tensor(operator.to(dtype=dtype).gram_diagonal(y), dtype=torch.float64)
    close(diagonal.expand(measurement).flatten(), (a * a).sum(1), rtol)


def test_unknown_spectrum_and_diagonal():
    function, blur = OPERATORS["function"][0], OPERATORS["zeros, not separable"][0]
    assert not function.spectral and not blur.spectral
    for operator, y in ((function, normal(1, 4)), (blur, normal(1, 2, 6, 7))):
        with pytest.raises(NotImplementedError, match=r"operator: the spectrum of .* is not known"):
            operator.gram_logdet(y, 1.0, 1.0)
        with pytest.raises(ValueError, match=r"operator: .* has no known spectrum; .*scale > 0"):
            operator.solve_gram(y, 1.0, 0.0)
    with pytest.raises(NotImplementedError, match=r"operator: the diagonal of A A.T of Function.* is not known"):
        function.gram_diagonal(normal(1, 4))


class Dense(LinearOperator):
    """An operator as a user may write it: only the two products."""

    def __init__(self, matrix):
        self.dense = matrix

    def __call__(self, x):
        return x.flatten(1) @ self.dense.to(x.dtype).T

    def adjoint(self, y):
        return (y @ self.dense.to(y.dtype)).reshape(-1, 2, 4)


class Spectral(Dense):
    def eigenvalues(self, y):
        return torch.linalg.eigh(self.dense @ self.dense.T)[0].to(y.dtype)

    def transform(self, y):
        return y @ torch.linalg.eigh(self.dense @ self.dense.T)[1].to(y.dtype)

    def inverse_transform(self, c):
        return c @ torch.linalg.eigh(self.dense @ self.dense.T)[1].to(c.dtype).T


def test_the_spectrum_is_known_where_a_class_states_it():
    matrix = normal(5, 8, seed=3)
    assert not Dense(matrix).spectral and Spectral(matrix).spectral
    gram, v = matrix @ matrix.T, normal(3, 5)
    for a, b in ((1.0, 1.0), (0.3, 0.01), (torch.tensor(0.3).double(), torch.tensor(0.01).double())):
        expected = torch.linalg.solve(float(a) * gram + float(b) * torch.eye(5).double(), v.T).T
        close(Dense(matrix).solve_gram(v, a, b), expected, 1e-10)
        close(Spectral(matrix).solve_gram(v, a, b), expected, 1e-10)
        close(Dense(matrix.float()).solve_gram(v.float(), a, b), expected, 1e-4)


def test_a_noise_variance_for_each_measurement():
    matrix, v = normal(5, 8, seed=3), normal(3, 5)
    b = torch.linspace(0.01, 2.0, 5, dtype=torch.float64)
    expected = torch.linalg.solve(0.4 * matrix @ matrix.T + torch.diag(b), v.T).T
    close(solve_iteratively(Dense(matrix), v, 0.4, b), expected, 1e-10)
    rows = torch.stack([b, b.flip(0), 3 * b])
    expected = torch.stack(
        [torch.linalg.solve(0.4 * matrix @ matrix.T + torch.diag(r), u) for r, u in zip(rows, v, strict=True)]
    )
    close(solve_iteratively(Dense(matrix), v, 0.4, rows), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_diagonal_is_estimated(dtype):
    matrix = normal(60, 8, seed=3)
    expected = float((matrix @ matrix.T).diagonal().mean())
    first, again = (
        mean_gram_diagonal(lambda x, index: x.flatten(1) @ matrix.to(x.dtype).T, (2, 4), dtype, torch.device("cpu"))
        for _ in range(2)
    )
    assert first == again and first == pytest.approx(expected, rel=0.25)  # 32 probes of 8 elements: 9 % each way
    assert mean_gram_diagonal(lambda x, index: 3.0 * x + 5.0, (4000,), dtype, torch.device("cpu")) == pytest.approx(
        9.0, rel=0.03
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_how_many_times_its_diagonal_the_gram_matrix_is(dtype):
    matrix = normal(12, 8, seed=3).abs() * torch.logspace(-2, 2, 12, dtype=torch.float64)[:, None]
    gram = matrix @ matrix.T
    event, like = (2, 4), torch.zeros(1, dtype=dtype)

    def f(x):
        return x.flatten(1) @ matrix.T.to(x.dtype)

    for diagonal in (gram.diagonal().to(dtype), float(gram.diagonal().mean())):
        root = torch.as_tensor(diagonal).double().expand(12).sqrt()
        expected = float(torch.linalg.eigvalsh(gram / root / root[:, None])[-1])
        for operator in (Matrix(matrix.to(dtype), event), Function(f), Function(f, linear=True, event=event)):
            found = gram_over_diagonal(operator, lambda *_, d=diagonal: d, event, like)
            assert found == pytest.approx(expected, rel=0.01) and expected > 3
    rounds = Function(lambda x: f(x).detach().round())
    assert gram_over_diagonal(rounds, lambda *_: 1.0, event, like) == 1.0
    square = Function(lambda x: 3.0 * x.abs() ** 2)  # its Jacobian is diagonal, 6 x
    x = fg.ops.randn((2, 2, 4), seed=0, stream=7, step=1, dtype=dtype)
    found = gram_over_diagonal(square, lambda *_: 1.0, event, like)
    assert found == pytest.approx(float(36 * x.square().max()), rel=0.02)


def test_the_gram_matrix_from_the_rows():
    matrix, event = normal(12, 8, seed=3), (2, 4)
    y, v = normal(5, 3, 4), normal(5, 3, 4, seed=1)

    def f(x):
        return (x.flatten(1) @ matrix.T).reshape(-1, 3, 4)

    gram = 0.4 * matrix @ matrix.T + 0.1 * torch.eye(12, dtype=torch.float64)
    for operator in (Function(f), Function(lambda x: f(x) + 2.0), Function(f, linear=True, event=event)):
        found = measure_gram(operator, event, y)
        torch.testing.assert_close(
            found.solve_gram(v, 0.4, 0.1).flatten(1), torch.linalg.solve(gram, v.flatten(1).T).T, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(found.gram_logdet(v, 0.4, 0.1), torch.logdet(gram), rtol=1e-12, atol=0)
        assert (found.rows is None) == operator.linear  # an operator that says that it is linear measures itself
        if found.rows is not None:
            x = normal(4, *event, seed=2)
            torch.testing.assert_close(found(x), f(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.adjoint(y).flatten(1), y.flatten(1) @ matrix, rtol=1e-12, atol=1e-12)


def test_the_gram_matrix_of_an_operator_that_returns_the_same_memory_at_every_call():
    matrix = normal(96, 8, seed=3)
    z = torch.empty(32, 96, dtype=torch.float64)
    same = Function(lambda x: torch.matmul(x, matrix.T, out=z), linear=True, adjoint=lambda y: y @ matrix)
    v = normal(2, 96)
    found = measure_gram(same, (8,), v).solve_gram(v, 1.0, 0.1)
    expected = torch.linalg.solve(matrix @ matrix.T + 0.1 * torch.eye(96, dtype=torch.float64), v.T).T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_gram_matrix_of_a_function_is_at_least_half_of_each():
    """The mean of ``J J^T`` over eight inputs, a diagonal here, times what makes it half of the largest.

    Where it is more, the variance of the measurements of 32 inputs.
    """
    y = torch.zeros(1, 5, dtype=torch.float64)
    found = measure_gram(Function(lambda x: 1.5 * x**2), (5,), y)
    variance = (1.5 * fg.ops.randn((32, 5), seed=0, stream=7, dtype=torch.float64) ** 2).var(0)
    x = fg.ops.randn((8, 5), seed=0, stream=7, step=3, dtype=torch.float64)
    squares = (3.0 * x) ** 2
    expected = squares.mean(0) * max(1.0, 0.5 * (squares / squares.mean(0)).max().item())
    expected = torch.maximum(expected, variance)
    assert found.rows is None
    torch.testing.assert_close(found.values.sort().values, expected.sort().values, rtol=1e-9, atol=0)


def test_the_gram_matrix_of_a_function_is_at_least_the_variance_of_what_it_measures():
    """A step that no Jacobian sees."""
    f, y = lambda x: torch.tanh(20.0 * x.sum(1, keepdim=True) - 20.0), torch.zeros(1, 1, dtype=torch.float64)
    found = measure_gram(Function(f), (2,), y)
    variance = f(fg.ops.randn((32, 2), seed=0, stream=7, dtype=torch.float64)).var()
    assert found.values.item() >= variance > 0.5


@pytest.mark.parametrize(
    ("operator", "event", "measurements"),
    [
        (Function(torch.round), (5,), 5),  # no derivative but 0
        (Function(lambda x: x.detach()), (5,), 5),
        (Function(lambda x: x), (257,), 257),
        (Function(lambda x: x[:, :200]), (2**19,), 200),
        (Inpainting(torch.tensor([[True, False, True], [True, True, False]]), per_observation=True), (3,), 2),
    ],
)
def test_a_gram_matrix_that_cannot_be_had(operator, event, measurements):
    assert measure_gram(operator, event, torch.zeros(2, measurements)) is None


# --- pseudo-inverse -----------------------------------------------------------------------------------------


@cases()
def test_pseudo_inverse(operator, event, measurement, rank):
    a = operator.matrix(event)
    p = dense_of(operator.pseudo_inverse, measurement)
    close(p, torch.linalg.pinv(a), 1e-9)
    scale = float(p.abs().max()) * float(a.abs().max()) + 1e-30
    close(a @ p @ a, a, 1e-9, scale * float(a.abs().max()) + 1e-30)  # Moore and Penrose
    close(p @ a @ p, p, 1e-9, scale * float(p.abs().max()) + 1e-30)
    close(a @ p, (a @ p).T, 1e-9, scale)
    close(p @ a, (p @ a).T, 1e-9, scale)


@cases()
def test_pseudo_inverse_in_float32(operator, event, measurement, rank):
    operator32 = operator.to(dtype=torch.float32)
    x = normal(3, *event)
    y = operator(x)
    back = operator32.pseudo_inverse(y.float())
    assert back.dtype == torch.float32 and back.shape == x.shape
    close(operator32(back), y, 1e-3)
    close(back, operator.pseudo_inverse(y), 1e-3)


@pytest.mark.parametrize("padding", ["circular", "zeros"])
@pytest.mark.parametrize("size", [16, 128])
def test_blur_pseudo_inverse_does_not_lose_modes_with_the_size(padding, size):
    """A Gaussian of 0.7 pixels has singular values down to 0.8 %, far above rounding. All modes are restored, in
    float32 and at any size."""
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / 0.7) ** 2)
    operator = Blur(torch.outer(taps / taps.sum(), taps / taps.sum()), padding)
    x = normal(1, 1, size, size, dtype=torch.float32)
    close(operator.pseudo_inverse(operator(x)), x, 2e-3)


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_blur_pseudo_inverse_stays_bounded_in_float32(padding):
    """The smallest singular values of a wide Gaussian, below 1e-16 of the largest, are rounding. They are left out, and
    the measurement is still reproduced."""
    taps = torch.exp(-0.5 * (torch.arange(-7, 8) / 2.0) ** 2)
    operator = Blur(torch.outer(taps / taps.sum(), taps / taps.sum()), padding)
    x = normal(1, 2, 64, 64, dtype=torch.float32)
    y = operator(x)
    back = operator.pseudo_inverse(y)
    assert back.norm() < 1.01 * x.norm()  # a projection of x
    close(operator(back), y, 2e-3)
    noise = 1e-3 * normal(1, 2, 64, 64, seed=1, dtype=torch.float32)
    # the amplification is at most 1 / the smallest singular value that is kept, sqrt(8 eps)
    assert operator.pseudo_inverse(noise).norm() < noise.norm() / math.sqrt(8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_low_rank_matrix_of_float32_keeps_its_rank_in_float64(shape):
    """Its smallest singular values come only from the rounding of its elements."""
    m, d = shape
    matrix = (normal(m, 3, seed=1) @ normal(3, d, seed=2)).float()
    operator = Matrix(matrix)
    y = operator(normal(2, d, seed=3))
    assert (operator.eigenvalues(y) > 0).sum() == 3
    back = operator.pseudo_inverse(y)
    close(operator(back), y, 1e-5)
    close(back, y @ torch.linalg.pinv(matrix.double(), rtol=1e-5).T, 1e-5)


def test_an_ill_conditioned_matrix():
    """Singular values over six decades. ``A A^T`` would have twelve, and lose the small ones, so it is not formed."""
    u, v = torch.linalg.qr(normal(6, 6, seed=1)).Q, torch.linalg.qr(normal(6, 6, seed=2)).Q
    s = torch.logspace(0, -6, 6, dtype=torch.float64)
    operator = Matrix(u @ torch.diag(s) @ v.T)
    eigenvalues = operator.eigenvalues(normal(1, 6)).sort(descending=True).values
    torch.testing.assert_close(eigenvalues, s**2, rtol=1e-8, atol=0)
    x = normal(2, 6, seed=3)
    close(operator.pseudo_inverse(operator(x)), x, 1e-3)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 6), d=st.integers(1, 6), rank=st.integers(1, 6), seed=st.integers(0, 1000))
def test_pseudo_inverse_of_any_matrix(m, d, rank, seed):
    rank = min(rank, m, d)
    u, v = (torch.linalg.qr(normal(n, rank, seed=seed + i)).Q for i, n in enumerate((m, d)))
    matrix = u @ torch.diag(torch.linspace(1.0, 0.1, rank, dtype=torch.float64)) @ v.T
    p = dense_of(Matrix(matrix).pseudo_inverse, (m,))
    close(p, torch.linalg.pinv(matrix, rtol=1e-10), 1e-11)


@pytest.mark.parametrize(
    "h, inverse",
    [
        (lambda x: torch.round(x * 4) / 4, lambda y: y),
        (lambda x: torch.sign(x), lambda y: 0.3 * y),
        (lambda x: torch.round(F.avg_pool2d(x, 2) * 8), lambda y: F.interpolate(y / 8, scale_factor=2)),
        (lambda x: x.abs(), lambda y: y),
    ],
    ids=["quantised", "sign", "pooled and quantised", "modulus"],
)  # fmt: skip
def test_pseudo_inverse_of_a_function(h, inverse):
    operator = Function(h, pseudo_inverse=inverse)
    x = normal(3, 2, 4, 4)
    z = operator(x)
    assert torch.equal(z, h(x))
    assert torch.equal(operator(operator.pseudo_inverse(z)), z)
    assert not torch.allclose(operator.pseudo_inverse(z), x)


def test_pseudo_inverse_given_to_a_linear_function():
    operator = Function(lambda x: 2 * x, linear=True, event=(3,), pseudo_inverse=lambda y: y / 2)
    x = normal(2, 3)
    assert torch.equal(operator.pseudo_inverse(operator(x)), x)


def test_a_linear_function_may_hold_float32_weights():
    weight = normal(2, 1, 3, 3, dtype=torch.float32)
    operator = Function(lambda x: F.conv2d(x, weight), linear=True, event=(1, 4, 5))
    x = normal(2, 1, 4, 5, dtype=torch.float32)
    y = operator(x)
    dense = operator.matrix((1, 4, 5), torch.float32).double()
    expected = y.flatten(1).double() @ torch.linalg.pinv(dense, rtol=1e-5).T
    close(operator.pseudo_inverse(y).flatten(1), expected, 1e-5)
    close(operator(operator.pseudo_inverse(y)), y, 1e-5)


# --- copies, gradients, caches ------------------------------------------------------------------------------


@cases()
def test_to_returns_a_copy_in_the_dtype(operator, event, measurement, rank):
    before = {name: value.dtype for name, value in vars(operator).items() if isinstance(value, torch.Tensor)}
    single = operator.to("cpu", torch.float32)
    assert type(single) is type(operator) and single is not operator
    for name, value in vars(single).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.float32 if value.is_floating_point() else torch.int64), name
    assert before == {n: v.dtype for n, v in vars(operator).items() if isinstance(v, torch.Tensor)}
    x = normal(2, *event)
    close(single(x.float()), operator(x), 2e-6)
    unchanged = operator.to()
    assert torch.equal(unchanged(x), operator(x))


def test_functions_can_be_copied():
    """`Likelihood.to`, which every run of a sampler calls, copies its operator."""
    nonlinear = Function(torch.exp, pseudo_inverse=torch.log)
    linear = OPERATORS["function with adjoint"][0]
    for operator, x in ((nonlinear, normal(2, 3)), (linear, normal(2, 8))):
        copied = operator.to("cpu", torch.float64)
        assert type(copied) is type(operator) and copied.linear == operator.linear
        assert torch.equal(copied(x), operator(x))
        close(copied.pseudo_inverse(copied(x)), operator.pseudo_inverse(operator(x)), 1e-15)
    assert isinstance(linear, LinearOperator) and not isinstance(nonlinear, LinearOperator)


@cases()
def test_gradient_is_the_adjoint(operator, event, measurement, rank):
    x, y = normal(3, *event).requires_grad_(), normal(3, *measurement, seed=1)
    (gradient,) = torch.autograd.grad(operator(x), x, y)
    close(gradient, operator.adjoint(y), 1e-12)


@pytest.mark.parametrize("name", ["circular", "zeros", "zeros, not separable"])
def test_one_blur_serves_every_size_and_dtype_in_turn(name):
    operator = OPERATORS[name][0]
    fresh = {}
    for event in ((2, 6, 7), (1, 7, 6), (6, 7)):
        for dtype in (torch.float64, torch.float32):
            y = normal(2, *event, dtype=dtype)
            alone = Blur(operator.kernel, operator.padding)
            fresh[event, dtype] = (y, alone(y), alone.adjoint(y), alone.pseudo_inverse(y))
    for _ in range(2):
        for y, z, back, inverse in fresh.values():
            assert torch.equal(operator(y), z) and torch.equal(operator.adjoint(y), back)
            assert torch.equal(operator.pseudo_inverse(y), inverse) and inverse.dtype == y.dtype
    moved = operator.to(dtype=torch.float32)
    y, z, *_ = fresh[(2, 6, 7), torch.float32]
    close(moved(y), z, 1e-6)


def changing(kind):
    """An operator, and the tensor that it is made from."""
    if kind == "matrix":
        matrix = normal(4, 6, seed=1)
        return Matrix(matrix), matrix, (6,), (4,)
    kernel = torch.outer(ROWS, ROWS)
    return Blur(kernel, kind), kernel, (1, 5, 4), (1, 5, 4)


@pytest.mark.parametrize("kind", ["matrix", "circular", "zeros"])
@pytest.mark.parametrize("moved", [False, True])
def test_what_is_written_to_after_construction_counts(kind, moved):
    operator, tensor, event, measurement = changing(kind)
    x, y = normal(2, *event, seed=2), normal(2, *measurement, seed=3)
    if moved:
        operator = operator.to()
    operator(x), operator.solve_gram(y, 0.3, 0.1), operator.pseudo_inverse(y)  # now the caches are filled
    with torch.no_grad():
        tensor.mul_(3.0)
        tensor[0].mul_(-1.0)
    fresh = type(operator)(tensor.clone(), **({} if kind == "matrix" else {"padding": kind}))
    for got, expected in (
        (operator(x), fresh(x)),
        (operator.adjoint(y), fresh.adjoint(y)),
        (operator.solve_gram(y, 0.3, 0.1), fresh.solve_gram(y, 0.3, 0.1)),
        (operator.gram_logdet(y, 0.3, 0.1), fresh.gram_logdet(y, 0.3, 0.1)),
        (operator.pseudo_inverse(y), fresh.pseudo_inverse(y)),
        (operator.to(dtype=torch.float32).solve_gram(y.float(), 0.3, 0.1), fresh.solve_gram(y, 0.3, 0.1).float()),
    ):
        close(got, expected, 1e-6 if got.dtype == torch.float32 else 1e-13)


def test_a_zero_padded_blur_that_is_no_longer_separable():
    operator, kernel, *_ = changing("zeros")
    assert operator.spectral
    kernel[0, 0] += 1.0
    assert not operator.spectral and not operator.to().spectral


def test_a_blur_learns_its_kernel():
    x, v = normal(2, 1, 5, 4, seed=2), normal(2, 1, 5, 4, seed=3)
    kernel = torch.outer(ROWS, ROWS).requires_grad_()
    circular, zeros = Blur(kernel), Blur(kernel, "zeros")
    for f in (
        lambda k: circular(x),
        lambda k: circular.adjoint(v),
        lambda k: circular.solve_gram(v, 0.3, 0.1),
        lambda k: circular.gram_logdet(v, 0.3, 0.1),
        lambda k: circular.pseudo_inverse(v),
        lambda k: circular.gram_diagonal(v),
        lambda k: zeros(x),
        lambda k: zeros.adjoint(v),
        lambda k: zeros.gram_diagonal(v),
    ):
        with torch.no_grad():
            f(kernel)  # cached without a graph; must not be used below
        for _ in range(2):  # each backward pass needs its own graph
            (got,) = torch.autograd.grad(f(kernel).square().sum(), kernel)
        step = 1e-6 * normal(3, 3, seed=4)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                kernel.add_(sign * step)
                values.append(f(kernel).square().sum())
                kernel.sub_(sign * step)
        torch.testing.assert_close((got * step).sum(), (values[0] - values[1]) / 2, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="kernel: the spectrum with padding='zeros' has no derivative"):
        zeros.solve_gram(v, 0.3, 0.1)
    with torch.no_grad():
        assert torch.isfinite(zeros.solve_gram(v, 0.3, 0.1)).all()
    matrix = Matrix(normal(3, 4).requires_grad_())
    with pytest.raises(ValueError, match="matrix: its spectrum has no derivative"):
        matrix.solve_gram(normal(1, 3), 0.3, 0.1)
    assert matrix.to(dtype=torch.float32)(normal(1, 4).float()).requires_grad


@pytest.mark.parametrize("built", [False, True])
def test_inference_mode_leaves_nothing_behind(built):
    makers = {
        "matrix": lambda: Matrix(normal(4, 20, seed=1), (1, 5, 4)),
        "circular": lambda: Blur(torch.outer(ROWS, ROWS)),
        "zeros": lambda: Blur(torch.outer(ROWS, ROWS), "zeros"),
        "inpainting": lambda: Inpainting(normal(1, 5, 4) > 0),
    }
    x = normal(2, 1, 5, 4)
    for make in makers.values():
        operator = None if built else make()
        with torch.inference_mode():
            operator = make() if operator is None else operator
            y = operator(x)
            operator.solve_gram(y, 0.3, 0.1)
            moved = operator.to(dtype=torch.float32)
        for one, dtype in ((operator, torch.float64), (moved, torch.float32)):
            leaf = x.to(dtype).requires_grad_()
            z = one(leaf)
            (gradient,) = torch.autograd.grad(one.solve_gram(z, 0.3, 0.1).sum(), leaf)
            back = one.adjoint(one.solve_gram(torch.ones_like(z), 0.3, 0.1))
            close(gradient, back, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@cases()
def test_on_a_gpu(operator, event, measurement, rank):
    moved = operator.to("cuda")
    x, y = normal(2, *event), normal(2, *measurement)
    for method, argument in (("__call__", x), ("adjoint", y), ("pseudo_inverse", y)):
        expected = getattr(operator, method)(argument)
        got = getattr(moved, method)(argument.cuda())
        assert got.device.type == "cuda"
        close(got.cpu(), expected, 1e-9)
    close(moved.to("cpu")(x), operator(x), 1e-12)


def test_numbers_of_numpy():
    assert AveragePool(np.int64(2)).factor == 2
    kernel = np.outer([1.0, 2.0, 1.0], [0.5, 0.0, -0.5])
    x = normal(1, 4, 4)
    assert torch.equal(Blur(kernel)(x), Blur(torch.as_tensor(kernel))(x))
    assert Blur(torch.tensor([[1, 2, 1]])).kernel.dtype == torch.float32
    assert Matrix(np.eye(3)).weight.dtype == torch.float64


@pytest.mark.parametrize("noise, separable", [(1e-8, True), (1e-3, False)])
def test_a_kernel_is_separable_to_rounding(noise, separable):
    kernel = torch.outer(ROWS, COLUMNS)
    assert Blur(kernel + noise * normal(3, 5), "zeros").spectral is separable
    assert Blur(kernel + noise * normal(3, 5), "circular").spectral


class Output:
    def __init__(self, sample):
        self.sample = sample


def test_functions_return_tensors_or_their_holders_and_may_write():
    x = normal(2, 4)
    before = x.clone()
    holder = Function(lambda x: Output(x.mul_(2.0)), linear=True, event=(4,))
    assert torch.equal(holder(x), 2 * before) and torch.equal(x, before)
    assert torch.equal(holder.adjoint(x), 2 * before) and torch.equal(x, before)
    both = Function(lambda x: x, linear=True, adjoint=lambda y: y.mul_(3.0), pseudo_inverse=lambda y: y.mul_(4.0))
    assert torch.equal(both.adjoint(x), 3 * before) and torch.equal(both.pseudo_inverse(x), 4 * before)
    assert torch.equal(x, before)
    for returned in ((x,), x.numpy(), Output(None)):
        with pytest.raises(TypeError, match="f: expected it to return a tensor or an object with a tensor sample, got"):
            Function(lambda x, returned=returned: returned)(x)


def test_masks_of_each_observation():
    masks = torch.stack([torch.arange(12).reshape(3, 4) % 3 == k for k in range(3)])
    each = Inpainting(masks, per_observation=True)
    rows = torch.tensor([2, 0, 1, 1, 2])
    x = normal(5, 3, 4)
    own = each.at(rows)
    y = own(x)
    assert torch.equal(y, torch.stack([v[masks[r]] for v, r in zip(x, rows, strict=True)]))
    assert torch.equal(own.adjoint(y), torch.where(masks[rows], x, 0.0))
    assert torch.equal(each(x[:3]), each.at(torch.arange(3))(x[:3]))
    alone = Inpainting(masks[0])
    assert alone.at(rows) is alone and each.observations == 3 and alone.observations is None


# --- errors -------------------------------------------------------------------------------------------------


# Each argument just outside its range, not finite or of another type or shape; what an operator cannot do.
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Inpainting(torch.ones(3)), TypeError, "mask: expected a bool tensor, got torch.float32"),
        (lambda: Inpainting([True]), TypeError, "mask: expected a bool tensor, got list"),
        (
            lambda: Inpainting(torch.zeros(3, dtype=torch.bool)),
            ValueError,
            "mask: expected at least one measured",
        ),
        (
            lambda: Inpainting(torch.ones(1, 3, dtype=torch.bool))(normal(2, 3, 1)),
            ValueError,
            r"mask: expected the shape of an event, \[3, 1\], got \[1, 3\]",
        ),
        (lambda: AveragePool(0), ValueError, "factor: expected an integer >= 1, got 0"),
        (lambda: AveragePool(2.0), ValueError, "factor: expected an integer >= 1, got 2.0"),
        (lambda: AveragePool(True), ValueError, "factor: .*got True"),
        (lambda: AveragePool(3)(normal(2, 6, 8)), ValueError, r"factor: .*divisor.*\[2, 6, 8\], got 3"),
        (lambda: AveragePool(1)(normal(2, 6)), ValueError, r"factor: .*\[2, 6\]"),
        (
            lambda: Blur(torch.ones(2, 3)),
            ValueError,
            r"kernel: expected two odd dimensions, got shape \[2, 3\]",
        ),
        (
            lambda: Blur(torch.ones(3, 3, dtype=torch.complex64)),
            TypeError,
            "kernel: expected real values, got torch.complex64",
        ),
        (lambda: Blur(torch.ones(2, 3, 3)), ValueError, r"kernel: expected one kernel \[h, w\].*got shape \[2, 3, 3\]"),
        (
            lambda: Blur(torch.ones(3, 3))(torch.ones(0, 1, 8, 8)),
            ValueError,
            r"x: expected at least one sample, got shape \[0, 1, 8, 8\]",
        ),
        (
            lambda: Matrix(torch.ones(2, 3, 3)),
            ValueError,
            r"matrix: expected one matrix \[m, d\].*got shape \[2, 3, 3\]",
        ),
        (
            lambda: Inpainting(torch.tensor([[True, False], [True, True]]), per_observation=True),
            ValueError,
            "mask: expected the same number of measured elements for each observation, got 1 to 2",
        ),
        (lambda: Inpainting(torch.tensor([True]), per_observation=True), ValueError, r"mask: .*\[B, \*event\]"),
        (
            lambda: Inpainting(torch.ones(2, 3, dtype=torch.bool), per_observation=True)(normal(4, 3)),
            ValueError,
            "mask: expected 4 masks, one for each sample, got 2",
        ),
        (lambda: Blur(torch.ones(3)), ValueError, r"kernel: expected two odd dimensions, got shape \[3\]"),
        (lambda: Blur(torch.full((3, 3), math.nan)), ValueError, "kernel: expected finite values"),
        (
            lambda: Blur(torch.ones(3, 3), "same"),
            ValueError,
            "padding: expected one of .*'circular', 'zeros'.*, got 'same'",
        ),
        (lambda: Blur(torch.ones(5, 3))(normal(1, 4, 4)), ValueError, r"kernel: .*\[1, 4, 4\], got 5 x 3"),
        (lambda: Blur(torch.ones(1, 1))(normal(4, 4)), ValueError, "kernel: expected at most"),
        (lambda: Matrix(torch.ones(3)), ValueError, r"matrix: .*shape \[m, d\], got torch.float32 \[3\]"),
        (
            lambda: Matrix(torch.ones(3, 3, dtype=torch.int64)),
            ValueError,
            "matrix: .*floating.*got torch.int64",
        ),
        (lambda: ParallelBeam("half a turn", 8), TypeError, "angles: expected finite angles"),
        (lambda: ParallelBeam([[0.1]], 8), ValueError, r"angles: expected .*shape \[V\], got .*\[1, 1\]"),
        (lambda: ParallelBeam([math.nan], 8), ValueError, "angles: expected finite angles"),
        (lambda: ParallelBeam([0.1], 0), ValueError, "size: expected an integer >= 1, got 0"),
        (lambda: ParallelBeam([0.1], 8, 2.5), ValueError, "detectors: expected an integer >= 1, got 2.5"),
        (lambda: Matrix(torch.full((2, 2), math.inf)), ValueError, "matrix: expected finite"),
        (lambda: Matrix(torch.ones(0, 3)), ValueError, r"matrix: .*got torch.float32 \[0, 3\]"),
        (
            lambda: Matrix(torch.ones(2, 6), event=(2, 2)),
            ValueError,
            r"event: expected 6 elements, got shape \[2, 2\]",
        ),
        (
            lambda: Matrix(torch.ones(2, 6))(normal(1, 2, 3)),
            ValueError,
            r"matrix: .*shape \[6\], got \[2, 3\]",
        ),
        (lambda: Function(3), TypeError, "f: expected a callable, got int"),
        (lambda: Function(abs, linear=True), ValueError, "event: .*or an adjoint.*got neither"),
        (lambda: Function(abs, event=(3,)), ValueError, "adjoint, event: expected linear=True"),
        (lambda: Function(abs, adjoint=abs), ValueError, "adjoint, event: expected linear=True"),
        (
            lambda: Function(abs).pseudo_inverse(normal(1)),
            ValueError,
            r"pseudo_inverse: expected Function\(f, pseudo",
        ),
        (
            lambda: Function(abs, linear=True, adjoint=abs).pseudo_inverse(normal(1)),
            ValueError,
            "pseudo_inverse: .*got none",
        ),
        (
            lambda: Operator().pseudo_inverse(normal(1)),
            ValueError,
            "operator: Operator has no pseudo-inverse",
        ),
        (lambda: Identity().matrix((5000,)), ValueError, "event: expected at most 4096 elements.*got 5000"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def by_matrix(a, back):
    """A user's operator ``x -> a x`` with the adjoint ``back``."""

    class Own(fg.operators.LinearOperator):
        def __call__(self, x):
            return x @ a.to(x).T

        def adjoint(self, y):
            return y @ back.to(y).T

    return Own()


A = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "operator",
    [
        by_matrix(A, 2 * A.T),
        by_matrix(A, -A.T),
        by_matrix(A, A.T.flip(0)),
        by_matrix(A, A.T + 0.3 * torch.eye(6, 4)),
        Function(lambda x: x[:, :4], linear=True, adjoint=lambda y: torch.nn.functional.pad(y, (2, 0))),
        Function(lambda x: x[:, :4].abs(), linear=True, event=(6,)),
    ],
    ids=["twice", "negative", "flipped", "off by a little", "function", "not linear"],
)
def test_a_wrong_adjoint_is_refused(operator):
    likelihood = fg.likelihoods.Gaussian(normal(1, 4), operator, 0.5)
    with pytest.raises(
        ValueError, match=r"operator: expected a linear one with <A x, z> = <x, A.T z>, got another from"
    ):
        fg.sample(pixels_prior()[0], (1, 6), guidance=fg.PnP(likelihood), steps=2)


class Halves(fg.operators.LinearOperator):
    """Computes in half precision; its adjoint is right only to that precision."""

    def __call__(self, x):
        return (x.bfloat16() @ A.T.bfloat16()).to(x.dtype)

    def adjoint(self, y):
        return (y.bfloat16() @ A.bfloat16()).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", [by_matrix(A, A.T), Halves()], ids=["float32", "bfloat16"])
def test_an_adjoint_that_is_right_to_rounding_serves(operator, dtype):
    likelihood = fg.likelihoods.Gaussian(normal(1, 4), operator, 0.5)
    out = fg.sample(pixels_prior()[0], (1, 6), guidance=fg.PnP(likelihood), steps=2, dtype=dtype)
    assert torch.isfinite(out.x).all()


@pytest.mark.parametrize("missing", ["__call__", "adjoint"])
def test_an_operator_without_its_methods_is_refused_by_name(missing):
    methods = {"__call__": lambda self, x: x, "adjoint": lambda self, y: y}
    methods.pop(missing)
    own = type("Mine", (fg.operators.LinearOperator,), methods)
    likelihood = fg.likelihoods.Gaussian(normal(1, 6), own(), 0.5)
    with pytest.raises(NotImplementedError, match=rf"operator: expected Mine to define {missing}\(self, .\), got none"):
        fg.sample(pixels_prior()[0], (1, 6), guidance=fg.PnP(likelihood), steps=2)


def test_the_signatures_that_help_shows_are_what_may_be_given():
    assert str(inspect.signature(Function)).startswith("(f: ") and "args" not in str(inspect.signature(Function))
    assert [name for name in inspect.signature(fg.LatentPnP).parameters if name.startswith("_")] == []
    function = Function(lambda x: 2 * x, linear=True, event=(3,))
    for same in (function, copy.copy(function), function.to(dtype=torch.float64)):
        assert isinstance(same, Function) and isinstance(same, fg.operators.LinearOperator)
    assert not isinstance(Function(torch.exp), fg.operators.LinearOperator)
    with pytest.raises(ValueError, match="linear: expected False for Own, which is no LinearOperator, got True"):
        type("Own", (Function,), {})(torch.exp, linear=True, event=(3,))


def test_a_blur_is_a_convolution_whose_kernel_conv2d_has_flipped():
    kernel, x = normal(3, 5), normal(2, 1, 8, 8)
    expected = torch.nn.functional.conv2d(x, kernel.flip(0, 1)[None, None], padding=(1, 2))
    assert torch.allclose(Blur(kernel, "zeros")(x), expected, atol=1e-5)


def test_repr():
    assert repr(Blur(torch.ones(3, 5), "zeros")) == "Blur(3x5, 'zeros')"
    assert repr(AveragePool(4)) == "AveragePool(4)"
    assert repr(Matrix(torch.ones(2, 3))) == "Matrix([2, 3])"
    assert repr(Function(torch.exp)) == "Function(exp)"
    assert repr(Function(stride_and_mix, linear=True, event=(8,))) == "Function(stride_and_mix)"


# --- operators of the user's own in a run -------------------------------------------------------------------


def unit_normal(event):
    """The denoiser of a standard normal prior."""
    schedule = fg.schedules.vp_linear(100)
    sigma = torch.tensor((1 - schedule.alphas_cumprod) ** 0.5)
    return fg.Denoiser(lambda x, t: sigma[t].to(x.dtype).reshape(-1, *(1,) * len(event)) * x, schedule)


@pytest.mark.parametrize("method", ["PnP", "PiGDM"])
def test_a_class_without_a_spectrum_gives_what_its_spectrum_gives(method):
    matrix = normal(20, 8, seed=3)
    y = normal(1, 20, seed=4)
    x = [
        fg.sample(
            unit_normal((2, 4)),
            (3, 2, 4),
            guidance=getattr(fg, method)(fg.likelihoods.Gaussian(y, operator, 0.3)),
            steps=10,
            seed=0,
            dtype=torch.float64,
        ).x
        for operator in (Dense(matrix), Matrix(matrix, (2, 4)))
    ]
    close(x[0], x[1], 1e-6)


class Forgetful(Dense):
    """Has eigenvalues, but does not say in which basis."""

    def eigenvalues(self, y):
        return torch.linalg.eigvalsh(self.dense @ self.dense.T).to(y.dtype)


class Writing(Dense):
    def __call__(self, x):
        return super().__call__(x.clamp_(-0.5, 0.5))


class WritingBack(Dense):
    def adjoint(self, y):
        return super().adjoint(y.mul_(1.0))


class Flat(Dense):
    def adjoint(self, y):
        return super().adjoint(y).flatten(1)


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            Forgetful,
            "operator: expected eigenvalues, transform and inverse_transform that give A A.T, got .* Forgetful",
        ),
        (Writing, "operator: expected one that leaves its input as it is, got Writing whose __call__ writes"),
        (WritingBack, "operator: .*got WritingBack whose adjoint writes"),
        (Flat, r"operator: expected an adjoint that returns \[1, 2, 4\], got \[1, 8\] from Flat"),
    ],
)
def test_operators_that_are_not_what_they_say(kind, message):
    likelihood = fg.likelihoods.Gaussian(normal(1, 5), kind(normal(5, 8, seed=3)), 0.3)
    for guidance in (fg.DPS(likelihood), fg.PnP(likelihood), fg.PiGDM(likelihood), fg.TDS(likelihood, 4)):
        with pytest.raises(ValueError, match=message):
            fg.sample(unit_normal((2, 4)), (2, 2, 4), guidance=guidance, steps=3)


def pixels_prior():
    """A Gaussian prior of 6 elements with a mean, and the exact posterior of each observation."""
    schedule = fg.schedules.flow()
    mean = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)

    def net(x, t):
        level = schedule.level(t[0].item())
        return mean.to(x.dtype) + level.alpha / (level.alpha**2 + level.sigma**2) * (x - level.alpha * mean.to(x.dtype))

    return fg.Denoiser(net, schedule, "sample"), mean


MASKS = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()


# Each scale with each covariance and each size of the chunks, and each covariance with each size.
@pytest.mark.parametrize(
    ("scale", "covariance", "chunk_size"),
    [
        *(("number", "moment", 700), ("number", "isotropic", None)),
        *(("detector", "moment", None), ("detector", "isotropic", 700)),
        *(("both", "moment", 700), ("both", "isotropic", None)),
        *(("function", "moment", None), ("function", "isotropic", 700)),
    ],
)
def test_particles_of_observations_with_masks_and_scales_of_their_own(chunk_size, covariance, scale):
    prior, mean = pixels_prior()
    y = normal(3, 3, seed=5)
    s = 0.3 + 0.5 * torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"number": 0.5, "detector": s[0], "both": s, "function": lambda t: s * (1 + t)}[scale]
    noise = {"number": torch.full((3, 3), 0.5), "detector": s[:1].expand(3, 3), "both": s, "function": s}[scale]
    likelihood = fg.likelihoods.Gaussian(y, Inpainting(MASKS, per_observation=True), given)
    guidance = fg.TDS(likelihood, 2000, covariance=covariance)
    out = fg.sample(prior, (3, 6), guidance=guidance, steps=30, seed=0, dtype=torch.float64, chunk_size=chunk_size)
    expected = mean.repeat(3, 1)
    for b in range(3):
        gain = 1.0 / (1.0 + noise[b] ** 2)
        expected[b, MASKS[b]] += gain * (y[b] - mean[MASKS[b]])
    torch.testing.assert_close(out.mean(), expected, rtol=0, atol=0.12)


@pytest.mark.parametrize("method", ["PnP", "PiGDM", "DPS"])
@pytest.mark.parametrize("kind", ["masks", "dense"])
def test_guided_samples_of_observations_with_operators_and_scales_of_their_own(method, kind):
    """The samples equal those of one call for each observation."""
    prior, _ = pixels_prior()
    y, s = normal(3, 3, seed=5), 0.2 + torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).double()
    make = {"PnP": fg.PnP, "PiGDM": fg.PiGDM, "DPS": lambda lik: fg.DPS(lik, "score", normalize=False)}[method]
    dense = Matrix(normal(3, 6, seed=2))
    together, alone = (Inpainting(MASKS, per_observation=True), Inpainting) if kind == "masks" else (dense, None)
    options = dict(steps=8, dtype=torch.float64, eta=None if method == "PnP" else 0.0)
    x_T = normal(3, 6, seed=6)
    if method == "PnP":
        make = lambda lik: fg.PnP(lik, zeta=0.0)  # noqa: E731
    for chunk_size in (None, 2):
        out = fg.sample(
            prior,
            (3, 6),
            guidance=make(fg.likelihoods.Gaussian(y, together, s)),
            x_T=x_T,
            chunk_size=chunk_size,
            **options,
        ).x
        for b in range(3):
            operator = alone(MASKS[b]) if alone else dense
            likelihood = fg.likelihoods.Gaussian(y[b : b + 1], operator, s[b])
            one = fg.sample(prior, (1, 6), guidance=make(likelihood), x_T=x_T[b : b + 1], **options).x
            close(out[b : b + 1], one, 1e-7)


class InNumpy(LinearOperator):
    """An operator that autograd cannot differentiate, like the projectors of other packages."""

    def __init__(self, matrix):
        self.array = matrix.numpy()

    def __call__(self, x):
        return torch.from_numpy(x.numpy() @ self.array.T)

    def adjoint(self, y):
        return torch.from_numpy(y.numpy() @ self.array)


@pytest.mark.parametrize("kind", ["class", "function"])
@pytest.mark.parametrize(
    "guidance",
    [
        fg.DPS,
        lambda lik: fg.DPS(lik, "score", normalize=False, covariance="isotropic"),
        lambda lik: fg.DPS(lik, "score", normalize=False, covariance="moment"),
        fg.PiGDM,
        fg.PnP,
        lambda lik: fg.PnP(lik, solver="gauss-newton"),
        lambda lik: fg.PnP(lik, solver="gradient"),
        fg.DAPS,
        lambda lik: fg.DAPS(lik, solver="langevin", iterations=2),
        lambda lik: fg.TDS(lik, 4, covariance="isotropic"),
    ],
)
def test_a_linear_operator_with_an_adjoint_needs_no_derivative(guidance, kind):
    matrix, y = normal(3, 6, seed=1), normal(2, 3, seed=2)
    numpy = InNumpy(matrix)
    numpy = numpy if kind == "class" else Function(numpy, linear=True, adjoint=numpy.adjoint)
    plain = Function(lambda x: x @ matrix.T, linear=True, event=(6,))
    outs = []
    for operator in (plain, numpy):
        g = guidance(fg.likelihoods.Gaussian(y, operator, 0.3))
        outs.append(fg.sample(pixels_prior()[0], (2, 6), guidance=g, steps=4, seed=0, dtype=torch.float64).x)
    close(outs[1], outs[0], 1e-9)


class Weighted(LinearOperator):
    """``w * x`` with weights ``w`` for each observation."""

    def __init__(self, weights):
        self.weights, self.observations = weights, len(weights)

    def __call__(self, x):
        return self.weights * x

    adjoint = __call__

    def eigenvalues(self, y):
        return self.weights**2

    def gram_diagonal(self, y):
        return self.weights**2

    def at(self, rows):
        return type(self)(self.weights[rows])


class WeightedReversed(Weighted):
    """The same, but with reversed eigenvalues: the package does not know that the standard basis is the eigenbasis."""

    def eigenvalues(self, y):
        return self.weights.flip(1) ** 2

    def transform(self, y):
        return y.flip(1)

    inverse_transform = transform


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("kind", [Weighted, WeightedReversed])
@pytest.mark.parametrize("method", ["TDS", "FK"])
def test_particles_of_observations_with_spectra_of_their_own(method, kind, chunk_size):
    """Equal to one call for each observation, also with chunks of as many particles as there are observations."""
    prior, _ = pixels_prior()
    weights, y = 0.5 + torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).double(), normal(3, 6, seed=5)
    options = dict(steps=5, seed=0, dtype=torch.float64, chunk_size=chunk_size)

    def guidance(rows):
        likelihood = fg.likelihoods.Gaussian(y[rows], kind(weights[rows]), 0.3)
        return {"TDS": fg.TDS, "FK": fg.FK}[method](likelihood, 8, covariance="isotropic")

    out = fg.sample(prior, (3, 6), guidance=guidance([0, 1, 2]), **options)
    for b in range(3):
        one = fg.sample(prior, (1, 6), guidance=guidance([b]), first_sample=b, **options)
        close(out.log_evidence[b : b + 1], one.log_evidence, 1e-9)
        close(out.x[b : b + 1], one.x, 1e-9)


@pytest.mark.parametrize(
    "options",
    [dict(samples_per_observation=3), dict(chunk_size=2), dict(guidance=fg.TDS), dict(guidance=fg.FK)],
)
def test_a_function_with_a_row_for_each_observation_is_refused_where_others_come(options):
    """Otherwise three samples of one observation would be taken for one sample of each of three observations."""
    weights, y = normal(3, 6, seed=1), normal(3, 6, seed=5)
    likelihood = fg.likelihoods.Gaussian(y, Function(lambda x: weights * x), 0.3)
    guidance = options.get("guidance", fg.PnP)
    guidance = guidance(likelihood) if guidance is fg.PnP else guidance(likelihood, 3)
    with pytest.raises(ValueError, match=r"operator: expected one that takes each sample alone, got 3 rows for one"):
        fg.sample(
            pixels_prior()[0],
            (3, 6),
            steps=2,
            dtype=torch.float64,
            **{"chunk_size": 3, **options, "guidance": guidance},
        )
    fg.sample(pixels_prior()[0], (3, 6), steps=2, dtype=torch.float64, guidance=fg.PnP(likelihood))


def test_masks_that_are_not_one_for_each_observation():
    likelihood = fg.likelihoods.Gaussian(normal(1, 3), Inpainting(MASKS, per_observation=True), 0.5)
    with pytest.raises(
        ValueError, match=r"operator: expected 1 row or 2, since shape .* B = 2 .*, got 3 from Inpainting"
    ):
        fg.sample(pixels_prior()[0], (2, 6), guidance=fg.PnP(likelihood), steps=2)


class ModuleFirst(torch.nn.Module, Operator):
    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("dense", matrix)

    def forward(self, x):
        return x.flatten(1) @ self.dense.T


class ModuleSecond(Operator, torch.nn.Module):
    def __init__(self, matrix):
        torch.nn.Module.__init__(self)
        self.register_buffer("dense", matrix)

    def __call__(self, x):
        return x.flatten(1) @ self.dense.T


class Held(Operator):
    def __init__(self, matrix):
        self.held = {"list": [matrix], "name": "held"}

    def __call__(self, x):
        return x.flatten(1) @ self.held["list"][0].T


@pytest.mark.parametrize("kind", [ModuleFirst, ModuleSecond, Held])
def test_tensors_in_modules_and_containers_are_moved_in_a_copy(kind):
    matrix, y = normal(3, 8, seed=1), normal(1, 3)
    operator = kind(matrix.float())
    likelihood = fg.likelihoods.Gaussian(y, operator, 0.3)
    for guidance in (fg.DPS(likelihood), fg.PnP(likelihood), fg.TDS(likelihood, 2)):
        out = fg.sample(unit_normal((2, 4)), (2, 2, 4), guidance=guidance, steps=3, dtype=torch.float64)
        assert torch.isfinite(out.x).all() and out.x.dtype == torch.float64
    assert operator(normal(1, 2, 4).float()).dtype == torch.float32  # where it was
    assert likelihood.to(dtype=torch.float32).operator(normal(1, 2, 4).float()).dtype == torch.float32


@pytest.mark.parametrize("solver", ["gauss-newton", "gradient"])
def test_latents_of_observations_with_masks_of_their_own(solver):
    prior, _ = pixels_prior()
    y, x_T = normal(3, 3, seed=5), normal(3, 6, seed=6)
    options = dict(steps=4, dtype=torch.float64)

    def guidance(y, operator):
        return fg.LatentPnP(fg.likelihoods.Gaussian(y, operator, 0.3), decoder=torch.tanh, solver=solver, zeta=0.0)

    for chunk_size in (None, 2):
        each = guidance(y, Inpainting(MASKS, per_observation=True))
        out = fg.sample(prior, (3, 6), guidance=each, x_T=x_T, chunk_size=chunk_size, **options).x
        for b in range(3):
            alone = guidance(y[b : b + 1], Inpainting(MASKS[b]))
            one = fg.sample(prior, (1, 6), guidance=alone, x_T=x_T[b : b + 1], **options).x
            close(out[b : b + 1], one, 1e-7)


@pytest.mark.parametrize("write", ["in place", "numpy", "data"])
def test_what_was_computed_of_a_matrix_or_a_kernel_follows_every_write(write):
    """Writes by numpy and ``.data`` do not change the tensor's version."""

    def triple(tensor):
        if write == "in place":
            tensor.mul_(3.0)
        elif write == "numpy":
            tensor.numpy()[:] *= 3.0
        else:
            tensor.data.mul_(3.0)

    generator = torch.Generator().manual_seed(0)
    y, image = torch.ones(1, 4), torch.ones(1, 1, 6, 6)
    kernel = torch.outer(torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.25, 0.5, 0.25]))
    for make, tensor, measured in (
        (Matrix, torch.randn(4, 6, generator=generator), y),
        (Blur, kernel.clone(), image),
        (lambda k: Blur(k, "zeros"), kernel.clone(), image),
    ):
        operator = make(tensor)
        operator.to("cpu", torch.float32).eigenvalues(measured)
        triple(tensor)
        found = operator.to("cpu", torch.float32)  # as in each run
        torch.testing.assert_close(
            found.eigenvalues(measured), make(tensor.clone()).eigenvalues(measured), rtol=1e-4, atol=1e-5
        )
