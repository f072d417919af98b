"""Results as text, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Figure, Result, Row

_COLUMNS = ("", "median", "quartiles", "ns/element", "GB/s", "of copy", "of triad", "speed-up", "target", "met?")


def seconds(value: float) -> str:
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}" if value * factor < 100 else f"{value * factor:.0f} {unit}"
    return f"{value:.3g} s"


def _met(met: bool | None) -> str:
    return "" if met is None else ("yes" if met else "NO")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _cells(row: Row) -> list[str]:
    if row.absent:
        return [row.name, f"absent: {row.absent}", *[""] * 6, row.target, ""]
    return [
        row.name,
        seconds(row.median_s),
        f"{seconds(row.q1_s)} - {seconds(row.q3_s)}",
        f"{row.ns_per_element:.3g}",
        "" if row.gb_per_s is None else f"{row.gb_per_s:.3g}",
        _share(row.of_copy),
        _share(row.of_triad),
        f"{row.speed_up:.3g}x",
        row.target,
        _met(row.met),
    ]


def _figure(figure: Figure) -> tuple[str, str, str, str]:
    target = "" if figure.at_most is None else f"<= {figure.at_most:g} {figure.unit}".strip()
    return figure.name, f"{figure.value:.4g} {figure.unit}".strip(), target, _met(figure.met)


def _traffic(result: Result) -> str:
    moved = "" if result.bytes is None else f", {result.bytes / 1e6:,.3g} MB moved at least"
    return f"{result.elements:,} elements{moved}"


def text(result: Result) -> str:
    """One case, for a terminal."""
    lines = [f"{result.name}: {result.what}" if result.what else result.name]
    if result.status != "ok":
        return "\n".join([*lines, f"  {result.status.upper()}: {result.reason}", ""])
    lines.append(f"  {_traffic(result)}")
    table = [list(_COLUMNS), *(_cells(row) for row in result.rows if not row.absent)] if result.rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {first.strip().ljust(widths[0])}  {'  '.join(rest)}".rstrip())
    lines += [f"  {row.name}: absent: {row.absent}" for row in result.rows if row.absent]
    for name, value, target, met in map(_figure, result.figures):
        lines.append(f"  {name}: {value}" + (f"   target {target}: {met}" if target else ""))
    return "\n".join([*lines, ""])


def markdown(machine: dict[str, Any], results: Iterable[Result]) -> str:
    """Every case, for a README."""
    about = "; ".join(f"{key}: {value}" for key, value in machine.items() if key != "command")
    lines = [f"`{machine['command']}`", "", f"{about}.", ""]
    for result in results:
        title = f"**{result.name}**" + (f": {result.what}" if result.what else "")
        if result.status != "ok":
            lines += [f"{title}: {result.status}, {_escape(result.reason)}", ""]
            continue
        lines += [f"{title}; {_traffic(result)}", ""]
        if result.rows:
            lines += [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
            lines += [*(_line(map(_escape, _cells(row))) for row in result.rows), ""]
        for name, value, target, met in map(_figure, result.figures):
            lines.append(f"- {name}: {value}" + (f" (target {target}: {met})" if target else ""))
        if result.figures:
            lines.append("")
    return "\n".join([*lines, summary(results), ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def summary(results: Iterable[Result]) -> str:
    """How many targets were met, which were missed, and what did not run."""
    results = list(results)
    judged = [(f"{r.name} / {item.name}", item.met) for r in results for item in (*r.rows, *r.figures)]
    missed = [name for name, met in judged if met is False]
    lines = [f"Targets met: {sum(met is True for _, met in judged)}; missed: {len(missed)}."]
    lines += [f"Missed: {name}." for name in missed]
    absent = [f"{r.name} / {row.name}" for r in results for row in r.rows if row.absent and row.target]
    lines += [f"Not judged, since absent: {name}." for name in absent]
    lines += [f"{r.status.capitalize()}: {r.name}: {r.reason}" for r in results if r.status != "ok"]
    return "\n".join(lines)


def write_json(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """``{"machine": {...}, "cases": [...]}``: the fields of `Result`, `Row` and `Figure`."""
    cases = []
    for result in results:
        entry = dataclasses.asdict(result)
        entry["figures"] = [dataclasses.asdict(figure) | {"met": figure.met} for figure in result.figures]
        cases.append(entry)
    path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
