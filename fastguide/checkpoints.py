"""A run's state in a file, from which the run goes on to the same bits."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

from .denoiser import Conditional
from .guidance.base import Run, State
from .identity import describe

__all__ = ["load", "save"]


def _fingerprint(run: Run, guidance: Any, keep_ancestors: bool) -> str:
    """What must be the same for a checkpoint to be this run's: everything but the code and weights of the network and
    of other functions, which go by their names, and by the conditions that they are given."""
    return repr(describe((run, guidance, keep_ancestors), _name))


def _name(function: Any) -> Any:
    if isinstance(function, Conditional):
        return _name(function.net), describe(function.conditions, _name)
    return getattr(function, "__qualname__", type(function).__name__)


def save(path, run: Run, guidance: Any, keep_ancestors: bool, content: tuple[State, int, list, list]) -> None:
    """Written beside the file and renamed, so that a run that is killed leaves the last whole one."""
    state, done, ess, ancestors = content
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".fastguide-")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(
                {
                    "fingerprint": _fingerprint(run, guidance, keep_ancestors),
                    "done": done,
                    "state": vars(state),
                    "ess": ess,
                    "ancestors": ancestors,
                },
                file,
            )
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path, run: Run, guidance: Any, keep_ancestors: bool) -> tuple[State, int, list, list]:
    saved = torch.load(path, map_location=run.device, weights_only=True)
    if saved["fingerprint"] != _fingerprint(run, guidance, keep_ancestors):
        raise ValueError(f"checkpoint: expected a file of this very run, got {os.fspath(path)} of another one")
    return State(**saved["state"]), saved["done"], saved["ess"], saved["ancestors"]
