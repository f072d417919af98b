"""``python -m benchmarks [NAME ...] [--device cpu|cuda] [--json FILE] [--markdown FILE]``"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import torch

from . import accuracy, integrations, ops, samplers
from .cases import CASES, Setting, chosen, run
from .report import markdown, summary, text, write_json
from .timing import AS_USERS_HAVE_IT, keep_memory, machine

for _package in (ops, samplers, integrations, accuracy):  # each module registers its cases
    for _module in pkgutil.iter_modules(_package.__path__, _package.__name__ + "."):
        importlib.import_module(_module.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases asked for; the exit status is 1 if the check of one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="cases: " + ", ".join(CASES)
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="an operation, a case or the beginning of one; all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to a file")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each case (default 20)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: tests the code, times nothing")
    parser.add_argument(
        "--keep-memory", action="store_true", help="an allocator that keeps freed memory, for all alike"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout, built in place, that samplers/bytes run as well"
    )
    options = parser.parse_args(arguments)
    try:
        names = chosen(options.names)
    except ValueError as error:
        parser.error(f"NAME: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    if options.against and not (options.against / "fastguide" / "__init__.py").is_file():
        parser.error(f"--against: expected the folder of a checkout of fastguide, got {options.against}")
    if options.against and options.keep_memory:
        parser.error("--against: expected no --keep-memory, which the other checkout's process would not have")

    setting = Setting(torch.device(options.device), options.quick, options.seconds, options.against)
    about = machine(setting.device, keep_memory() if options.keep_memory else AS_USERS_HAVE_IT)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), "", sep="\n", flush=True)
    results = []
    for name in names:
        results.append(run(name, setting))
        print(text(results[-1]), flush=True)
        if options.json:  # after each case, so that an interrupted run leaves a file
            write_json(options.json, about, results)
        if options.markdown:
            options.markdown.write_text(markdown(about, results))
    print(summary(results))
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
