"""`sample`: one loop for every algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import graphs, ops
from .checkpoints import Checkpoint
from .denoiser import Denoiser
from .guidance.base import Run, Schedulable, State, integer, per_step
from .guidance.plain import Plain
from .reference import Clip
from .samples import Samples
from .schedules import Level

__all__ = ["Progress", "Samples", "sample"]


class Progress(NamedTuple):
    """What a callback is given after each step. ``x`` ``[B, *event]`` or ``[B, K, *event]`` is the loop's own
    memory."""

    step: int
    level: Level  # the one x is at
    x: Tensor
    log_weights: Tensor | None  # [B, K]
    ess: Tensor | None  # [B], when the step decided whether to resample


def sample(
    prior: Denoiser,
    shape: Sequence[int],
    *,
    guidance: Any = None,
    steps: int | Sequence[float] = 50,
    spacing: str | None = None,
    eta: Schedulable | None = None,
    clip: Clip = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    keep_ancestors: bool = False,
    graph: bool | str = "auto",
    progress: bool = False,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 10,
    run_id: str | None = None,
) -> Samples:
    """Draw samples of the prior, or of ``x | y`` with a guidance object.

    - ``shape = (B, *event)``: B samples, or B observations with the particles of TDS and FK. ``y`` has B rows, or one
      for all.
    - ``guidance``: None, `DPS`, `PnP`, `PiGDM`, `LatentPnP`, `TDS` or `FK`.
    - ``steps``, ``spacing``: see `Schedule.levels`; or the times themselves.
    - ``eta`` in ``[0, 1]``: a number, a table with one entry per step, or a function of the schedule's time; 0 is DDIM,
      1 (the default) DDPM. PnP and LatentPnP split their noise by ``zeta`` instead.
    - ``clip``: of ``x0_hat`` in the reverse step, see `fastguide.ops.reverse_step`.
    - ``seed`` below 2^64. Noise depends on the seed, the step and the sample's index alone: a sample is the same in
      whatever batch (up to the network's own rounding).
    - ``x_T``: the start, ``[B, *event]`` (``[B, K, *event]`` for particles), in place of the prior's noise.
    - ``chunk_size``: the most samples that the network, a likelihood or a reward sees at once.
    - ``keep_ancestors``: return the ancestors of every step, ``[steps, B, K]``.
    - ``graph``: True runs the whole loop as one CUDA graph, which the first call captures and others with the same
      network, shapes and method replay, whatever their seed, observation and guidance scale (see `fastguide.graphs`);
      a loop that cannot be captured is an error that says why. ``"auto"`` does so on a GPU from the second such call
      on, and runs eagerly, saying why once, what cannot be captured; False runs eagerly.
    - ``progress``: a tqdm bar (needs tqdm). ``callback``: called with a `Progress` after each step.
    - ``checkpoint``: a file to write the state to, atomically, every ``checkpoint_every`` steps; where it exists the
      run goes on from it, to the same bits; removed at the end. A file of other arguments is refused, and of functions
      that give other results on a small trial, for which the network, rewards and operators are called a few times more
      (see `fastguide.checkpoints`). ``run_id``: any string; a file of another one is refused.

    ``device``: that of ``x_T``, else the CPU.
    """
    guidance = Plain() if guidance is None else guidance
    run = _prepare_run(prior, shape, guidance, steps, spacing, eta, clip, seed, x_T, dtype, device, chunk_size)
    checkpoint_every = integer("checkpoint_every", checkpoint_every, 1)
    guidance = guidance.prepare(run)
    weighted = hasattr(guidance, "particles")
    if keep_ancestors and not weighted:
        raise ValueError("keep_ancestors: expected False without particles (TDS, FK), got True")

    if graph not in ("auto", True, False):
        raise ValueError(f"graph: expected 'auto', True or False, got {graph!r}")

    watched = progress or callback is not None or checkpoint is not None
    obstacle = "progress, callback and checkpoint see the loop between its steps" if watched else ""
    if run_id is not None and checkpoint is None:
        raise ValueError(f"run_id: expected None without a checkpoint, got {run_id!r}")
    loop = Loop(weighted, keep_ancestors, progress, callback, checkpoint, checkpoint_every, run_id)
    samples = Samples(*graphs.call(loop, run, guidance, graph, obstacle))  # type: ignore[arg-type]
    if checkpoint is not None and os.path.exists(checkpoint):
        os.remove(checkpoint)
    if samples.ess is not None and samples.log_weights is not None:
        _check_particles(samples.ess, samples.log_weights)
    return samples


@dataclass(frozen=True)
class Loop:
    """The steps of a run, one after the other, and what becomes of them: the fields of `Samples`."""

    weighted: bool
    keep_ancestors: bool
    progress: bool = False
    callback: Callable[[Progress], None] | None = None
    checkpoint: str | os.PathLike | None = None
    checkpoint_every: int = 1
    run_id: str | None = None

    def __call__(self, run: Run, guidance: Any) -> tuple[Tensor | None, ...]:
        file = None
        if self.checkpoint is not None:
            file = Checkpoint(self.checkpoint, run, guidance, self.keep_ancestors, self.run_id)
        saved = None if file is None else file.load()
        state, first, ess, ancestors = (guidance.start(run), 0, [], []) if saved is None else saved
        for i in _progress_bar(range(first, run.steps), run.steps, first, self.progress):
            state = guidance.step(run, state, i)
            if self.weighted:
                ess.append(state.ess)
            if self.keep_ancestors:
                ancestors.append(state.ancestors)
            if self.callback is not None:
                x = _shaped(state.x, run, self.weighted)
                self.callback(Progress(i, run.levels[i + 1], x, state.log_weights, state.ess))
            if file is not None and (i + 1) % self.checkpoint_every == 0 and i + 1 < run.steps:
                file.save(state, i + 1, ess, ancestors)
        return self.finish(run, state, ess, ancestors)

    def finish(
        self, run: Run, state: State, ess: Sequence[Tensor], ancestors: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """From the last state, and the ESS and ancestors of each step."""
        x = _shaped(state.x, run, self.weighted)
        if not self.weighted:
            return (x,)
        assert state.log_weights is not None
        _, _, log_evidence, last_ess = ops.resample(state.log_weights, ess_threshold=0.0, check=False)
        history = torch.stack([*ess, last_ess])
        return x, state.log_weights, history, log_evidence, torch.stack(list(ancestors)) if ancestors else None


def _prepare_run(prior, shape, guidance, steps, spacing, eta, clip, seed, x_T, dtype, device, chunk_size) -> Run:
    if not isinstance(prior, Denoiser):
        raise TypeError(f"prior: expected a fastguide.Denoiser, got {type(prior).__name__}")
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise ValueError(f"shape: expected (B, *event), got {shape!r}")
    shape = tuple(integer("shape", n, 1) for n in shape)
    if isinstance(guidance, type) or not all(hasattr(guidance, name) for name in ("prepare", "start", "step")):
        got = guidance if isinstance(guidance, type) else type(guidance).__name__
        raise TypeError(f"guidance: expected a DPS, PnP, PiGDM, LatentPnP, TDS or FK object, or None, got {got}")
    if dtype not in ops.STATE_DTYPES:
        raise TypeError(f"dtype: expected one of float32, float16, bfloat16, float64, got {dtype}")
    if integer("seed", seed, 0) >= 1 << 64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), got {seed!r}")
    chunk_size = None if chunk_size is None else integer("chunk_size", chunk_size, 1)
    ops.check_clip(clip)
    weighted = hasattr(guidance, "particles")
    particles = integer("particles", guidance.particles, 1) if weighted else 1
    if x_T is not None and not isinstance(x_T, Tensor):
        raise TypeError(f"x_T: expected a tensor, got {type(x_T).__name__}")
    device = torch.device(device) if device is not None else (x_T.device if x_T is not None else torch.device("cpu"))
    if x_T is not None:
        expected = (shape[0], particles, *shape[1:]) if weighted else shape
        if tuple(x_T.shape) != expected:
            raise ValueError(f"x_T: expected shape {list(expected)}, got {list(x_T.shape)}")
        if not torch.isfinite(x_T).all():
            raise ValueError("x_T: expected finite values, got NaN or infinity")
        x_T = x_T.reshape(-1, *shape[1:])
    levels = prior.schedule.levels(steps, spacing)
    for level in levels[:-1]:
        prior.check_level(level)
    prior.check_observations(shape[0])
    if eta is not None and not getattr(guidance, "takes_eta", True):
        raise ValueError(f"eta: expected None with {type(guidance).__name__}, whose zeta splits the noise, got {eta!r}")
    etas = per_step("eta", 1.0 if eta is None else eta, levels, high=1.0)
    taus = tuple(noise(t, s, e) for t, s, e in zip(levels, levels[1:], etas, strict=False))
    return Run(prior, levels, taus, shape[0], particles, shape[1:], int(seed), clip, chunk_size, dtype, device, x_T)


def noise(t: Level, s: Level, eta: float) -> float:
    """``tau = eta sqrt(Var(x_s | x_t, x_0))`` of the step from level ``t`` to ``s``."""
    given = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2  # variance of x_t given x_s
    return min(eta * math.sqrt(max(given, 0.0)) * s.sigma / t.sigma, s.sigma)


def _shaped(x: Tensor, run: Run, weighted: bool) -> Tensor:
    return x.view(run.observations, run.particles, *run.event) if weighted else x


def _check_particles(ess: Tensor, log_weights: Tensor) -> None:
    """The flag of a row that lost its weights, looked at once and after the loop."""
    bad = torch.isnan(ess)
    if not bad.any():
        return
    step, row = (int(v) for v in bad.nonzero()[0])
    when = "after the last step" if step == ess.shape[0] - 1 else f"before step {step}"
    weights = log_weights[row]
    what = "no particle is alive (all weights are 0)"
    if not (weights == -math.inf).all():
        what = "a weight is NaN or infinite"
    raise FloatingPointError(
        f"log_weights: expected a finite largest weight, got none for observation {row} {when}: {what}. "
        "More particles, another covariance or a likelihood with a wider scale at high noise may help"
    )


def _progress_bar(steps: range, total: int, first: int, show: bool):
    if not show:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed (pip install 'fastguide[demo]')") from error
    return tqdm(steps, total=total, initial=first, desc="sampling", unit="step")
