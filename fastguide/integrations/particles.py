"""Faster resampling for `particles` (Chopin & Papaspiliopoulos 2020), with the same ancestors.

    from fastguide.integrations import particles as rs          # was: from particles import resampling as rs

`patch` replaces the functions inside ``particles`` instead, so that every ``particles.SMC`` uses these.

A scheme draws the same numbers as the scheme of `particles`, in the same order and from the same generator. That is
numpy's global generator; for `ssp` it is numba's if ``particles.resampling`` is loaded (only a function compiled by
numba can seed that one). Weights are summed in the same order too. With the same seed, float64 weights therefore give
the same ancestors, ties included. There is one exception. Rounding can leave the sum of the weights below the last
uniforms. Then `particles` reads past the end of ``W``; here those uniforms choose the last particle whose weight is not
0.

`exp_and_normalise`, `essl` and `log_mean_exp` agree with `particles` to 1e-13: they have their own exponential, and the
order of summation differs. All functions compute in float64.

`fastguide.ops.resample` is faster still. It takes log-weights and GPU tensors, draws its uniforms from counters, and
sums exactly.

The loops are compiled C++ and use torch's threads. Importing this module raises an ImportError where the compiled
module did not load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arguments import integer, real_array
from ..ops import _native

if not _native.loaded("cpu"):
    raise ImportError(_native.load_error("cpu"))

__all__ = [
    "SCHEMES",
    "essl",
    "exp_and_normalise",
    "killing",
    "log_mean_exp",
    "multinomial",
    "patch",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]

_cpu = partial(_native.module, "cpu")
_cpu()  # raises if the module is missing
_ONE, _STRATA, _SPACINGS = range(3)  # the codes of Draws in csrc/integrations/particles/invert.cpp


def systematic(W: Floats, M: int | None = None) -> Indices:
    """Systematic resampling: one uniform ``u``, and position ``n`` is ``(u + n) / M``.

    Args:
        W: Normalised weights ``[N]``, N >= 1: numbers >= 0 that sum to one, which is not checked. Computed in float64.
        M: How many ancestors to draw, an integer >= 0; None is ``N``.

    Returns:
        Ancestors ``[M]`` in int64, ascending, in ``[0, N)``.

    Raises:
        TypeError: ``W`` are not real numbers.
        ValueError: ``W`` is empty or has another shape, or ``M`` is not an integer >= 0.
    """
    W, M = _weights(W, M)
    positions = np.empty(max(M, 1))
    positions[:1] = np.random.rand(1)
    return _invert(W, 1.0, _ONE, positions, np.empty(M, np.int64))


def stratified(W: Floats, M: int | None = None) -> Indices:
    """Stratified resampling: one uniform ``u_n`` for each stratum, and position ``n`` is ``(u_n + n) / M``.

    Args:
        W: As in `systematic`.
        M: As in `systematic`.

    Returns:
        As in `systematic`.
    """
    W, M = _weights(W, M)
    return _invert(W, 1.0, _STRATA, _uniforms(M), np.empty(M, np.int64))


def multinomial(W: Floats, M: int | None = None) -> Indices:
    """Multinomial resampling: ``M`` independent draws, sorted.

    Args:
        W: As in `systematic`.
        M: As in `systematic`.

    Returns:
        As in `systematic`.
    """
    W, M = _weights(W, M)
    return _draw(W, 1.0, np.empty(M, np.int64))


def residual(W: Floats, M: int | None = None) -> Indices:
    """Residual resampling: ``floor(M W[k])`` copies of each particle, then multinomial draws from what remains.

    Args:
        W: As in `systematic`.
        M: As in `systematic`.

    Returns:
        Ancestors ``[M]`` in int64. The copies ascend, and so do the draws after them.

    Raises:
        ValueError: The copies are more than ``M``, so that ``W`` is not normalised. Else as in `systematic`.
    """
    W, M = _weights(W, M)
    ancestors, remainders = np.empty(M, np.int64), np.empty_like(W)
    copies = _cpu().whole_copies(_at(W), len(W), M, _at(ancestors), _at(remainders), torch.get_num_threads())
    if copies < 0:
        raise ValueError("W: expected normalised weights (>= 0, sum one)")
    if copies < M:
        _draw(remainders, float(M - copies), ancestors[copies:])
    return ancestors


def killing(W: Floats, M: int | None = None) -> Indices:
    """Killing: particle ``k`` stays with probability ``W[k] / max(W)``; else a multinomial draw replaces it.

    Args:
        W: As in `systematic`.
        M: None or ``N``.

    Returns:
        Ancestors ``[N]`` in int64. The particles that stay keep their places.

    Raises:
        ValueError: ``M`` is not ``N``. Else as in `systematic`.
    """
    W, M = _weights(W, M)
    if len(W) != M:
        raise ValueError("killing resampling defined only for M=N")
    u = _uniforms(M)
    u *= W.max()
    killed = u >= W
    ancestors, drawn = np.empty(M, np.int64), np.empty(np.count_nonzero(killed) + 1, np.int64)
    _draw(W, 1.0, drawn[:-1])
    _cpu().replace_killed(_at(killed), _at(drawn), _at(ancestors), M)
    return ancestors


def ssp(W: Floats, M: int | None = None) -> Indices:
    """Srinivasan's sampling process: ``floor`` or ``ceil`` of ``M W[k]`` copies of each particle.

    The numbers of copies are negatively associated.

    Args:
        W: As in `systematic`.
        M: As in `systematic`.

    Returns:
        As in `systematic`.

    Raises:
        ValueError: The copies are not ``M`` in all, so that ``W`` is not normalised. Else as in `systematic`.

    Source:
        Gerber, Chopin & Whiteley 2019.
    """
    W, M = _weights(W, M)
    uniforms = (_numba_uniforms if "particles.resampling" in sys.modules else _uniforms)(len(W) - 1)
    ancestors = np.empty(M, np.int64)
    if not _cpu().round_in_pairs(_at(W), len(W), M, _at(ancestors), _at(uniforms), torch.get_num_threads()):
        raise ValueError("ssp resampling: wrong size for output")
    return ancestors


SCHEMES: dict[str, Callable[..., Indices]] = {
    scheme.__name__: scheme for scheme in (systematic, stratified, residual, multinomial, killing, ssp)
}
"""The schemes by name."""


def exp_and_normalise(lw: Floats) -> Floats:
    """Normalised weights ``exp(lw) / sum(exp(lw))``.

    Args:
        lw: Log-weights of any shape, at least one.

    Returns:
        Weights in the shape of ``lw`` and in its dtype; integers give float64.

    Raises:
        TypeError: ``lw`` are not real numbers.
        ValueError: ``lw`` is empty.
    """
    values = _doubles(lw, "lw")
    w = np.empty(values.shape)
    _exponentiate("lw", values, None, w)
    return w.astype(np.result_type(np.asarray(lw).dtype, np.float16), copy=False)


def essl(lw: Floats) -> float:
    """The effective sample size ``sum(w)^2 / sum(w^2)`` of log-weights ``lw = log w``.

    Args:
        lw: Log-weights of any shape, at least one.

    Returns:
        A number in ``[1, N]``.

    Raises:
        TypeError: ``lw`` are not real numbers.
        ValueError: ``lw`` is empty.
    """
    _, total, squares = _exponentiate("lw", lw)
    return np.float64(total**2 / squares)


def log_mean_exp(v: Floats, W: Floats | None = None) -> float:
    """The log of the mean of ``exp(v)``, weighted by ``W`` if given.

    Args:
        v: Real numbers of any shape, at least one.
        W: Weights in the shape of ``v``. They need not sum to one. None weighs all equally.

    Returns:
        A number.

    Raises:
        TypeError: ``v`` or ``W`` are not real numbers.
        ValueError: ``v`` or ``W`` is empty, or their shapes differ.
        ZeroDivisionError: The weights sum to 0.
    """
    if W is None:
        largest, total, _ = _exponentiate("v", v)
        return largest + np.log(total / np.size(v))
    largest, _, total = _exponentiate("v", v, W)
    weights = _doubles(W).sum()
    if weights == 0.0:
        raise ZeroDivisionError("W: expected weights that do not sum to 0")
    return largest + np.log(total / weights)


def patch() -> ExitStack:
    """Replaces the functions of ``particles.resampling`` that this module has, for every ``particles.SMC`` from now on.

    Returns:
        A context manager that restores the originals when it ends: ``with patch(): ...``. Without ``with`` the
            replacement stays.

    Raises:
        ImportError: `particles` is not installed.
    """
    try:
        from particles import resampling  # type: ignore
    except ImportError as error:
        raise ImportError(f"patch: expected particles to be installed (pip install particles), got: {error}") from error

    undo = ExitStack()
    undo.callback(resampling.rs_funcs.update, dict(resampling.rs_funcs))
    resampling.rs_funcs.update(SCHEMES)
    for function in (*SCHEMES.values(), exp_and_normalise, essl, log_mean_exp):
        undo.callback(setattr, resampling, function.__name__, getattr(resampling, function.__name__))
        setattr(resampling, function.__name__, function)
    return undo


def _weights(W: Floats, M: int | None) -> tuple[Doubles, int]:
    W = real_array("W", W, "weights [N]")
    if W.ndim != 1 or not W.size:
        raise ValueError(f"W: expected shape [N] with N >= 1, got {list(W.shape)}")
    return np.asarray(W, order="C"), len(W) if M is None else integer("M", M, 0, 1 << 48)


def _doubles(values: Floats, name: str = "W") -> Doubles:
    array = real_array(name, values, "real numbers")
    if not array.size:
        raise ValueError(f"{name}: expected at least one value, got shape {list(array.shape)}")
    return np.asarray(array, order="C")


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _uniforms(count: int) -> Doubles:
    """``np.random.rand(count)``. The generator is left as numpy would leave it."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in numpy's stubs
    if not isinstance(generator, np.random.MT19937):  # the user has set another generator
        return np.random.rand(count)
    uniforms = np.empty(count)
    key = generator.ctypes.state_address  # [624] words, and the position among them
    with generator.lock:
        _cpu().mersenne_doubles(key, key + 4 * 624, _at(uniforms), count)
    return uniforms


def _numba_uniforms(count: int) -> Doubles:
    """Uniforms of numba's generator, from which compiled functions draw. Its state is the position of this thread, then
    the words.
    """
    from numba import _helperlib  # type: ignore

    uniforms, position = np.empty(count), _helperlib.rnd_get_np_state_ptr()
    _cpu().mersenne_doubles(position + 4, position, _at(uniforms), count)
    return uniforms


def _invert(W: Doubles, scale: float, draws: int, positions: Doubles, ancestors: Indices) -> Indices:
    """``ancestors[n]`` becomes the first ``k`` with position ``n`` ``<= (W[0] + ... + W[k]) / scale``."""
    number, threads = len(ancestors), torch.get_num_threads()
    _cpu().invert(_at(W), len(W), scale, draws, _at(positions), number, _at(ancestors), threads)
    return ancestors


def _draw(W: Doubles, scale: float, ancestors: Indices) -> Indices:
    """Multinomial draws. Sorted uniforms are the first arrival times of a Poisson process, divided by the next one."""
    positions = _uniforms(len(ancestors) + 1)
    return _invert(W, scale, _SPACINGS, np.log(positions, out=positions), ancestors)


def _exponentiate(
    name: str, values: Floats, W: Floats | None = None, out: Doubles | None = None
) -> tuple[float, float, float]:
    """The largest of ``values``, the sum of ``w = exp(values - largest)``, and the sum of ``w * w``, or of ``w * W`` if
    ``W`` is given. ``out`` receives ``w``, normalised.
    """
    lw, W = _doubles(values, name), W if W is None else _doubles(W)
    if W is not None and W.shape != lw.shape:
        raise ValueError(f"W: expected shape {list(lw.shape)}, that of {name}, got {list(W.shape)}")
    return _cpu().exponentiate(
        _at(lw), lw.size, 0 if W is None else _at(W), 0 if out is None else _at(out), torch.get_num_threads()
    )
