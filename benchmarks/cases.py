"""What a case is, the register of all cases, and how one is run.

A case is built only when its turn comes, since some need gigabytes. Its check runs first: a wrong result is not timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastguide.ops._operation import select

from . import timing

T = TypeVar("T")
Call = Callable[[], Any]

CASES: dict[str, Callable[[Setting], Case]] = {}
ON_REQUEST = ("exactness/", "calibration/")  # they time nothing and take hours


class Absent(Exception):
    """Something is missing here; the message says what and why."""


@dataclass(frozen=True)
class Setting:
    """Where and how to run. ``quick`` asks for sizes that take milliseconds: these test the code, and their times mean
    nothing. ``against``: the folder of another checkout, built in place, for cases that compare with one."""

    device: torch.device
    quick: bool = False
    seconds: float = 20.0  # of timing for each case
    against: Path | None = None

    def pick(self, full: T, quick: T, gpu: T | None = None) -> T:
        """The size for this setting. ``gpu`` replaces ``full`` on a GPU, if ``full`` is too small to fill one."""
        if self.quick:
            return quick
        return gpu if gpu is not None and self.device.type == "cuda" else full

    def backend(self, operation: str, dtype: torch.dtype = torch.float32) -> str:
        """The backend that ``auto`` chooses."""
        return select(operation, device=self.device, dtype=dtype)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, dtype=dtype, device=self.device, generator=generator)


@dataclass(frozen=True)
class Rival:
    """Another implementation of the same thing. ``at_least``: our target, how many times faster we should be.
    ``at_most``: the largest ratio of our time to its time. ``absent``: why it cannot run here, or ``""``."""

    name: str
    call: Call | None
    at_least: float | None = None
    at_most: float | None = None
    absent: str = ""


def rival(name: str, build: Callable[[], Call], **target: float) -> Rival:
    """A rival whose call is returned by ``build``. If a package or a device is missing, the rival is absent."""
    try:
        return Rival(name, build(), **target)
    except (Absent, ImportError) as error:
        return Rival(name, None, absent=str(error), **target)


@dataclass(frozen=True)
class Figure:
    """A number that is not a time, such as bytes per particle."""

    name: str
    value: float
    unit: str
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.at_most is None else self.value <= self.at_most


@dataclass
class Case:
    """One comparison. ``check`` raises unless ``ours`` computes the right result. ``ours`` is None if the case has only
    figures. ``bytes``: the least number of bytes that must be read and written, or None if memory does not matter.
    ``figures`` gets our median in seconds."""

    what: str
    elements: int
    bytes: int | None
    ours: Call | None
    check: Callable[[], None]
    rivals: Sequence[Rival] = ()
    copy_at_most: float | None = None  # the largest ratio of our time to that of a copy
    triad_at_most: float | None = None  # the same for a triad
    backend: str = ""
    least_rounds: int = 5
    figures: Callable[[float], Sequence[Figure]] = lambda seconds: ()


def case(name: str):
    """Register a builder ``build(setting) -> Case`` as ``operation/variant``."""

    def register(build: Callable[[Setting], Case]) -> Callable[[Setting], Case]:
        assert name not in CASES, name
        CASES[name] = build
        return build

    return register


def chosen(names: Sequence[str]) -> list[str]:
    """The cases that ``names`` select. A name is an operation, a case, or the beginning of one. No name selects all
    but those `ON_REQUEST`. Cases are sorted by operation, and then in the order of registration. Raises
    ``ValueError`` for a name that selects nothing."""
    for name in names:
        if not any(known.startswith(name) for known in CASES):
            raise ValueError(f"expected the beginning of one of {', '.join(CASES)}; got {name!r}")
    if names:
        found = [known for known in CASES if known.startswith(tuple(names))]
    else:
        found = [known for known in CASES if not known.startswith(ON_REQUEST)]
    return sorted(found, key=lambda known: known.split("/")[0])


# --- running one --------------------------------------------------------------------------------------------

OURS, COPY, TRIAD = "fastguide", "copy", "triad"
NEW = "fastguide, into a new tensor"  # the rival of a call that writes into memory that is kept


@dataclass(frozen=True)
class Row:
    """The times of one contestant, per call. ``speed_up`` is its median divided by ours."""

    name: str
    absent: str = ""
    rounds: int = 0
    median_s: float | None = None
    q1_s: float | None = None
    q3_s: float | None = None
    ns_per_element: float | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None  # bandwidth as a share of that of a plain copy, measured in the same rounds
    of_triad: float | None = None
    speed_up: float | None = None
    target: str = ""
    met: bool | None = None


@dataclass
class Result:
    name: str
    status: str  # "ok", "failed", "absent"
    reason: str = ""
    what: str = ""
    elements: int = 0
    bytes: int | None = None
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def run(name: str, setting: Setting) -> Result:
    """Build, check and time a case."""
    try:
        case = CASES[name](setting)
        result = Result(name, "ok", "", case.what, case.elements, case.bytes)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # checks compare bits
            case.check()
        gc.collect()
        ours = 0.0 if case.ours is None else _time(case, case.ours, setting, result)
        result.figures.extend(case.figures(ours))
        return result
    except (Absent, ImportError) as error:
        return Result(name, "absent", str(error))
    except Exception as error:  # a case that fails must not stop the others
        return Result(name, "failed", f"{type(error).__name__}: {error}")
    finally:
        gc.collect()


def _time(case: Case, ours: Call, setting: Setting, result: Result) -> float:
    """Fill in the rows. Returns our median in seconds."""
    rivals = [*case.rivals, *_yardsticks(case, setting.device)]
    calls = {OURS: ours} | {r.name: r.call for r in rivals if r.call is not None}
    times, broken = timing.alternate(
        calls, setting.device, setting.pick(setting.seconds, 0.0), setting.pick(case.least_rounds, 1)
    )
    if OURS in broken:
        raise RuntimeError(broken[OURS])
    medians = {name: timing.quartiles(samples)[1] for name, samples in times.items()}
    label = f"{OURS} ({case.backend})" if case.backend else OURS
    result.rows.append(_row(case, label, times[OURS], medians))
    for r in rivals:
        target, met = _target(r, medians.get(r.name), medians[OURS])
        if r.name in times:
            row = _row(case, r.name, times[r.name], medians, target, met)
        else:
            row = Row(r.name, absent=r.absent or broken[r.name], target=target)
        result.rows.append(row)
    return medians[OURS]


def _yardsticks(case: Case, device: torch.device) -> list[Rival]:
    """A plain copy and a triad (``a = b + s c``) that move as many bytes."""
    if case.bytes is None:
        return []

    def buffers(number: int) -> list[Tensor]:
        return [torch.ones(max(1, case.bytes // (4 * number)), device=device) for _ in range(number)]

    (to, source), (a, b, c) = buffers(2), buffers(3)
    return [
        Rival(COPY, lambda: to.copy_(source), at_most=case.copy_at_most),
        Rival(TRIAD, lambda: torch.add(b, c, alpha=0.5, out=a), at_most=case.triad_at_most),
    ]


def _target(r: Rival, median: float | None, ours: float) -> tuple[str, bool | None]:
    if r.at_least is not None:
        return f">= {r.at_least:g}x", None if median is None else median >= r.at_least * ours
    if r.at_most is not None:
        text = f">= {1 / r.at_most:.2f}x (time <= {r.at_most:g}x)"
        return text, None if median is None else ours <= r.at_most * median
    return "", None


def _row(case: Case, name: str, samples: list[float], medians: dict[str, float], target="", met=None) -> Row:
    q1, median, q3 = timing.quartiles(samples)
    return Row(
        name,
        rounds=len(samples),
        median_s=median,
        q1_s=q1,
        q3_s=q3,
        ns_per_element=median / case.elements * 1e9,
        gb_per_s=case.bytes / median / 1e9 if case.bytes else None,
        of_copy=medians[COPY] / median if COPY in medians else None,
        of_triad=medians[TRIAD] / median if TRIAD in medians else None,
        speed_up=median / medians[OURS],
        target=target,
        met=met,
    )


# --- what several cases need --------------------------------------------------------------------------------

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Raise unless both are equal to a few roundings of ``got``'s dtype, for values of order one."""
    tolerance = factor * _TOLERANCES[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def ends(particles: int) -> list[slice]:
    """The first two and the last two particles. A kernel goes wrong there first, and a reference can compute them."""
    return [slice(0, min(2, particles)), slice(max(0, particles - 2), particles)]


def compiled(setting: Setting, f: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
    """``f(*arguments)`` by ``torch.compile``, for these shapes, with these options of inductor."""
    if setting.quick:
        raise Absent("--quick does not wait for a compiler")
    torch._dynamo.reset()  # nothing is compiled before its first call; so no limit on recompilations is reached
    g = torch.compile(f, fullgraph=True, dynamic=False, options=options or None)
    return lambda: g(*arguments)


def cpu_only(setting: Setting) -> None:
    if setting.device.type != "cpu":
        raise Absent("computes on the CPU only")
