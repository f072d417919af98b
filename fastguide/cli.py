"""``fastguide demo`` and ``fastguide doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """The ``fastguide`` command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="fastguide", description="Inference-time guidance of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what was built, what loaded, what did not and why")
    demo = commands.add_parser("demo", help="every algorithm on held-out handwritten digits; writes pictures")
    demo.add_argument("--task", default="all", help="half, pool2, pool4, blur, reward, mixture or all")
    demo.add_argument("--method", default="all", help="plain, dps, pnp, pigdm, latent-pnp, tds, fk or all")
    demo.add_argument("--out", type=Path, default=Path("fastguide-demo"), help="folder for the pictures")
    demo.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    if options.command == "doctor":
        from .doctor import report

        print(report())
        return 0
    try:
        from .demo import run
    except ImportError as error:
        print(f"fastguide demo needs {error.name}: pip install 'fastguide[demo]'", file=sys.stderr)
        return 1
    try:
        run(options.task, options.method, options.out, options.seed)
    except ValueError as error:
        parser.error(str(error))
    return 0
