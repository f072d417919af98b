"""``python -m benchmarks.against DIR [NAME ...]``: each case of this checkout and of another one, in turn.

DIR is another checkout of fastguide, built in place. Each checkout runs in its own process, with its own benchmarks.
Only the call ``ours`` of a case is built and timed, not its rivals. A line has the median times of both, and the
quotient: the time of this checkout over the other's. Below 1 this one is faster. The quotient of the processor times,
over all threads, follows. It depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FASTEST = 0.12  # seconds of calls in one go
_ROUNDS = 11


class Checkout:
    """The cases of a checkout, in a process that waits between the runs."""

    def __init__(self, folder: Path, quick: bool):
        command = [sys.executable, "-P", __file__, "--serve", *(["--quick"] if quick else [])]
        # Waiting threads must not spin: they would take time from the other process.
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.cases: list[str] = self.answer()

    def ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other process ended with status {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._process.communicate()


def _serve(quick: bool) -> None:
    """Run in the process of a checkout: ``benchmarks`` is imported from that checkout."""
    import torch

    from benchmarks import __main__, cases  # type: ignore[import-not-found]  # noqa: F401  registers the cases

    def absent(name: str, build: Any, **target: Any) -> Any:
        return cases.Rival(name, None, absent="not asked for", **target)

    for name, module in list(sys.modules.items()):
        if name.startswith("benchmarks.") and hasattr(module, "rival"):
            module.rival = absent
    print(json.dumps(list(cases.CASES)), flush=True)
    setting, ours = cases.Setting(torch.device("cpu"), quick, 0.1), None
    for line in sys.stdin:
        word, value = json.loads(line)
        try:
            if word == "build":
                ours = cases.CASES[value](setting).ours
                if ours is None:
                    raise cases.Absent("has figures and no time")
                ours(), ours()
                answer: Any = _seconds(ours, 1)
            else:
                answer = _seconds(ours, value)
        except (cases.Absent, ImportError) as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


def _seconds(call: Any, times: int) -> tuple[float, float]:
    """The time of one call, and its processor time, both in seconds."""
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times, (time.process_time() - processor) / times


def compare(other: Path, chosen: list[str], quick: bool, report: Callable[[str], None]) -> dict[str, float]:
    """For each case, the time of this checkout divided by that of the other."""
    found: dict[str, float] = {}
    checkouts = [Checkout(Path(__file__).parents[1], quick), Checkout(other, quick)]
    for name in checkouts[0].cases:
        if name not in checkouts[1].cases or (chosen and not name.startswith(tuple(chosen))):
            continue
        first = [checkout.ask("build", name) for checkout in checkouts]
        reasons = [answer for answer in first if isinstance(answer, str)]
        if reasons:
            report(f"{name:50s} absent: {reasons[0]}")
            continue
        slower = max(seconds for seconds, _ in first)
        times, rounds = (1, 1) if quick else (max(1, int(_FASTEST / slower)), _ROUNDS if slower < 1 else 5)
        runs: list[list[tuple[float, float]]] = [[], []]
        for i in range(rounds):
            for k in (0, 1) if i % 2 else (1, 0):
                runs[k].append(checkouts[k].ask("run", times))
        (ours, our_processor), (theirs, their_processor) = (
            [statistics.median(values) for values in zip(*run, strict=True)] for run in runs
        )
        found[name] = ours / theirs
        times_of_both = f"{1e3 * ours:10.4f} ms, there {1e3 * theirs:10.4f} ms"
        report(f"{name:50s}{times_of_both}  {ours / theirs:.3f}  processor {our_processor / their_processor:.3f}")
    for checkout in checkouts:
        checkout.end()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare the cases asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("other", type=Path, metavar="DIR", help="another checkout of fastguide, built in place")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case or the beginning of some; all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: tests the code, times nothing")
    options = parser.parse_args(arguments)
    if not (options.other / "fastguide" / "__init__.py").is_file():
        parser.error(f"DIR: expected the folder of a checkout of fastguide, got {options.other}")
    found = compare(options.other.resolve(), options.names, options.quick, lambda line: print(line, flush=True))
    if not found:
        parser.error(f"NAME: expected a case that both checkouts have, got {options.names}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve("--quick" in sys.argv)
    else:
        sys.exit(main())
