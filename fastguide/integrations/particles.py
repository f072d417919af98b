"""The resampling of `particles` (Chopin & Papaspiliopoulos 2020), faster, with the same ancestors.

``from fastguide.integrations import particles as rs`` in place of ``from particles import resampling as rs``, or
`patch` once, which makes every ``particles.SMC`` use it. A scheme takes ``W`` ``[N]``, normalised weights (>= 0, sum
one; float64 inside), and ``M`` (default ``N``), and returns ``M`` indices below ``N``, int64, ascending in
`systematic`, `stratified`, `multinomial` and `ssp`.

Every scheme draws what that of `particles` draws, in the same order, from the same generator: numpy's global one, and
in `ssp` numba's. It sums the weights in the same order too, so that with the same seed the ancestors are equal, ties
included. One case differs: where rounding leaves the sum of the weights below the last uniforms, `particles` reads past
the end of ``W``; here they belong to the last particle whose weight is not 0.

The loops are compiled by numba, which `particles` needs as well; the first call of each compiles it, once per machine.
`fastguide.ops.resample` (log-weights, its own counter-based uniforms, exact integer sums, GPUs) is faster still.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numba import njit  # type: ignore
from numpy.typing import NDArray

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
Indices = NDArray[np.int64]


def systematic(W: Floats, M: int | None = None) -> Indices:
    """One uniform ``u``; uniform ``n`` is ``(u + n) / M``."""
    W, M = _weights(W, M)
    return _invert_strata(np.random.rand(1), W, M)


def stratified(W: Floats, M: int | None = None) -> Indices:
    """A uniform ``u_n`` for each stratum; uniform ``n`` is ``(u_n + n) / M``."""
    W, M = _weights(W, M)
    return _invert_strata(np.random.rand(M), W, M)


def multinomial(W: Floats, M: int | None = None) -> Indices:
    """``M`` independent draws, sorted."""
    W, M = _weights(W, M)
    ancestors = np.empty(M, np.int64)
    _invert(_sorted_uniforms(M), W, 1, ancestors)
    return ancestors


def residual(W: Floats, M: int | None = None) -> Indices:
    """``floor(M W[k])`` copies of each particle, ascending, then multinomial draws from what remains."""
    W, M = _weights(W, M)
    ancestors = np.empty(M, np.int64)
    remainders = np.empty_like(W)
    copies = _copy_whole_shares(W, remainders, ancestors)
    if copies < 0:
        raise ValueError("W: expected normalised weights (>= 0, sum one)")
    if copies < M:
        _invert(_sorted_uniforms(M - copies), remainders, M - copies, ancestors[copies:])
    return ancestors


def killing(W: Floats, M: int | None = None) -> Indices:
    """Particle ``k`` stays where it is with probability ``W[k] / max(W)``; else a multinomial draw takes its place.
    Needs ``M == N``.
    """
    W, M = _weights(W, M)
    if len(W) != M:
        raise ValueError("killing resampling defined only for M=N")
    killed = np.random.rand(M) * W.max() >= W
    return _replace(killed, multinomial(W, int(np.count_nonzero(killed))))


def ssp(W: Floats, M: int | None = None) -> Indices:
    """Srinivasan's sampling process (Gerber, Chopin & Whiteley 2019): ``floor`` or ``ceil`` of ``M W[k]`` copies of
    each particle, ascending, with negatively associated numbers.
    """
    W, M = _weights(W, M)
    ancestors = np.empty(M, np.int64)
    if not _round_in_pairs(W, ancestors):
        raise ValueError("ssp resampling: wrong size for output")
    return ancestors


SCHEMES: dict[str, Callable[..., Indices]] = {
    scheme.__name__: scheme for scheme in (systematic, stratified, residual, multinomial, killing, ssp)
}


def exp_and_normalise(lw: Floats) -> Floats:
    """``exp(lw) / sum(exp(lw))``, of the shape of the log-weights ``lw``."""
    w = _exp(lw, lw.max())
    w /= w.sum()
    return w


def essl(lw: Floats) -> float:
    """The effective sample size ``sum(w)^2 / sum(w^2)``, in ``[1, N]``, of the log-weights ``lw = log w`` ``[N]``."""
    w = _exp(lw, lw.max())
    total = w.sum()
    w *= w
    return total**2 / w.sum()


def log_mean_exp(v: Floats, W: Floats | None = None) -> float:
    """The log of the mean of ``exp(v)``, weighted by ``W`` if given."""
    largest = v.max()
    w = _exp(v, largest)
    return largest + np.log(w.mean() if W is None else np.average(w, weights=W))


def patch() -> ExitStack:
    """Replace the functions of ``particles.resampling`` that this module has, for every ``particles.SMC`` from now on;
    or, as ``with patch():``, for those inside.
    """
    from particles import resampling  # type: ignore

    undo = ExitStack()
    undo.callback(resampling.rs_funcs.update, dict(resampling.rs_funcs))
    resampling.rs_funcs.update(SCHEMES)
    for function in (*SCHEMES.values(), exp_and_normalise, essl, log_mean_exp):
        undo.callback(setattr, resampling, function.__name__, getattr(resampling, function.__name__))
        setattr(resampling, function.__name__, function)
    return undo


def _weights(W: Floats, M: int | None) -> tuple[NDArray[np.float64], int]:
    return np.ascontiguousarray(W, dtype=np.float64), W.shape[0] if M is None else M


def _exp(lw: Floats, largest: float) -> Floats:
    w = lw - largest
    return np.exp(w, out=w)


def _sorted_uniforms(M: int) -> NDArray[np.float64]:
    """``M`` sorted uniforms: the first arrival times of a Poisson process over the one that follows."""
    times = np.random.rand(M + 1)
    np.log(times, out=times)
    _accumulate_negated(times)
    uniforms = times[:-1]
    uniforms /= times[-1]
    return uniforms


@njit(cache=True, nogil=True)
def _accumulate_negated(values):
    total = 0.0
    for n in range(len(values)):
        total -= values[n]
        values[n] = total


@njit(cache=True, nogil=True, inline="always")
def _fill(ancestors, start, stop, k):
    """``ancestors[start:stop] = k``: four are written whatever their number, which a branch could not foresee; later
    particles overwrite those beyond ``stop``.
    """
    if start + 4 <= len(ancestors):
        for n in range(4):
            ancestors[start + n] = k
        start += 4
    for n in range(start, stop):
        ancestors[n] = k


@njit(cache=True, nogil=True)
def _last_live(W):
    k = len(W) - 1
    while k > 0 and W[k] == 0.0:
        k -= 1
    return k


@njit(cache=True, nogil=True)
def _invert_strata(u, W, M):
    """``ancestors[n]``: the first ``k`` with ``(u[n] + n) / M <= W[0] + ... + W[k]``; one ``u`` may serve all ``n``.

    ``M`` times the sum says how many uniforms lie below it, but for rounding: where that could matter, the quotients
    themselves are compared.
    """
    ancestors = np.empty(M, np.int64)
    each = 0 if len(u) == 1 else 1
    slack = 1e-15 * M
    total, start = 0.0, 0
    for k in range(len(W)):
        total += W[k]
        expected = total * M
        stop = int(expected) if 0.0 <= expected < M else M  # M too where the sum is NaN
        beyond = expected - stop
        if slack < beyond < 1.0 - slack and abs(beyond - u[each * stop]) > slack:
            stop += beyond > u[each * stop]
        else:
            while stop > 0 and (u[each * (stop - 1)] + (stop - 1)) / M > total:
                stop -= 1
            while stop < M and (u[each * stop] + stop) / M <= total:
                stop += 1
        _fill(ancestors, start, stop, k)
        start = stop
    _fill(ancestors, start, M, _last_live(W))
    return ancestors


@njit(cache=True, nogil=True)
def _invert(uniforms, W, scale, ancestors):
    """``ancestors[n]``: the first ``k`` with ``uniforms[n] <= (W[0] + ... + W[k]) / scale``; ``uniforms`` is sorted.

    Four comparisons are counted at once: which of them holds, a branch could not foresee.
    """
    M = len(uniforms)
    total, start = 0.0, 0
    for k in range(len(W)):
        total += W[k] / scale
        stop = start
        while stop + 4 <= M:
            below = 0
            for n in range(4):
                below += not uniforms[stop + n] > total  # which a NaN is not, either
            stop += below
            if below < 4:
                break
        else:
            while stop < M and not uniforms[stop] > total:
                stop += 1
        _fill(ancestors, start, stop, k)
        start = stop
    _fill(ancestors, start, M, _last_live(W))


@njit(cache=True, nogil=True)
def _replace(killed, ancestors):
    """``arange``, with ``ancestors`` one after the other where a particle is killed."""
    replaced = np.empty(len(killed), np.int64)
    n = 0
    for k in range(len(killed)):
        replaced[k] = k
        if killed[k]:
            replaced[k] = ancestors[n]
            n += 1
    return replaced


@njit(cache=True, nogil=True)
def _copy_whole_shares(W, remainders, ancestors):
    """``floor(M W[k])`` copies of each ``k``, and what remains of the shares. Returns how many copies, or -1 if one is
    below 0 or all are more than ``M``.
    """
    M = len(ancestors)
    start = 0
    for k in range(len(W)):
        share = M * W[k]
        whole = np.floor(share)
        remainders[k] = share - whole
        if not 0.0 <= whole <= M - start:
            return -1
        stop = start + int(whole)
        _fill(ancestors, start, stop, k)
        start = stop
    return start


@njit(cache=True, nogil=True)
def _round_in_pairs(W, ancestors):
    """The fractions of the shares ``M W[k]``, two at a time: one gives to the other until it has none left or the other
    is whole, at random such that neither changes in the mean. Returns whether the copies were ``M`` in number.
    """
    N, M = len(W), len(ancestors)
    copies = np.empty(N, np.int64)
    missing = M
    for k in range(N):
        copies[k] = int(np.floor(M * W[k]))
        if copies[k] < 0:
            return False
        missing -= copies[k]
    i, x = 0, M * W[0] - copies[0]  # a particle and its fraction
    j, y = i, x
    if N > 1:
        j, y = 1, M * W[1] - copies[1]
    uniforms = np.random.rand(N - 1)
    for n in range(N - 1):
        i_gains, j_gains = min(y, 1.0 - x), min(x, 1.0 - y)
        either = i_gains + j_gains
        if either > 0.0 and uniforms[n] < i_gains / either:
            i, x, j, y = j, y, i, x
        fresh = n + 2
        fraction = M * W[fresh] - copies[fresh] if fresh < N else 0.0
        if y < 1.0 - x:
            x += y
            j, y = fresh, fraction
        else:
            y -= 1.0 - x
            copies[i] += 1
            missing -= 1
            i, x = fresh, fraction
    last, fraction = (i, x) if i < N else (j, y)
    if missing == 1 and fraction > 0.99:  # rounding kept it from being whole
        copies[last] += 1
        missing = 0
    if missing != 0:
        return False
    start = 0
    for k in range(N):
        _fill(ancestors, start, start + copies[k], k)
        start += copies[k]
    return True
