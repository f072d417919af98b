"""``fastguide demo`` and ``fastguide doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer in [{low}, {high}], got {text!r}")
        return value

    return parse


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except Exception as error:  # what torch raises for a device that is not there differs with the device
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device that torch can use here, got {text!r}: {reason}") from None
    return device


def main(arguments: list[str] | None = None) -> int:
    """The ``fastguide`` command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="fastguide", description="Inference-time guidance of diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastguide {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what was built, what loaded, what did not and why")
    doctor.add_argument("--json", action="store_true", help="the same facts for programs")
    demo = commands.add_parser("demo", help="every algorithm on held-out handwritten digits; writes pictures")
    demo.add_argument("--task", default="all", help="half, pool4, blur, reward, mixture; all of these; or pool2")
    demo.add_argument(
        "--method",
        default="all",
        help="plain, dps, pnp, pigdm, latent-pnp, tds, fk or all; the reward takes fk, and the mixture neither plain "
        "nor latent-pnp",
    )
    demo.add_argument("--out", type=Path, default=Path("fastguide-demo"), help="folder for the pictures")
    demo.add_argument("--seed", type=_integer(0, 2**64 - 1), default=0)
    demo.add_argument("--steps", type=_integer(1, 500), help="of every sampler; without it 70, and 100 for the mixture")
    demo.add_argument(
        "--particles",
        type=_integer(1, 2**20),
        help="of tds and fk, for each digit; without it 128 and 256, 16 for the reward and 4000 for the mixture",
    )
    demo.add_argument("--device", type=_device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)

    if options.command == "doctor":
        from .doctor import facts, report

        print(json.dumps(facts(), indent=2) if options.json else report())
        return 0
    try:
        from .demo import Settings, run
    except ImportError as error:
        print(f"fastguide demo needs {error.name}: pip install 'fastguide[demo]'", file=sys.stderr)
        return 1
    settings = Settings(options.seed, options.steps, options.particles, options.device)
    try:
        run(options.task, options.method, options.out, settings)
    except ValueError as error:
        demo.error(str(error))
    return 0
