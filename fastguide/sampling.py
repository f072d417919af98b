"""`sample`: one loop for every algorithm."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import arguments, foreign, ops
from .ancestry import Ancestry, effective_number
from .arguments import flag, function, got, integer, one_of
from .checkpoints import Checkpoint, saved_seed
from .denoiser import Denoiser
from .guidance.base import Run, Schedulable, State, noise, per_step
from .guidance.plain import Plain
from .guidance.start import STARTS, match_start
from .guidance.watch import STATE
from .likelihoods import Likelihood
from .modules import warn_of_training
from .ops._arguments import STATE_DTYPES, Clip, unpacked_clip
from .ops._arguments import clip as checked_clip
from .samples import Samples
from .schedules import Level

__all__ = ["Progress", "Samples", "sample"]


class Progress(NamedTuple):
    """The state after a step, as a callback gets it. All tensors are copies.

    K is the number of particles, or n with ``samples_per_observation=n``. Without either, the dimension K is missing.

    Attributes:
        step: Index of the step, from 0.
        level: The level that ``x`` is at, with ``t``, ``alpha`` and ``sigma``.
        x: The state, ``[B, K, *event]``.
        log_weights: ``[B, K]`` float64; None without particles.
        ess: ``[B]`` float64, the effective sample size before the step. The step decided from it whether to resample.
            None without particles.
        x0_hat: The latest prediction of ``x_0``, like ``x``. TDS and FK predict it at ``x``. The others predicted it
            before the step, at the level above.
        reward: ``[B, K]``, the reward that FK evaluated last. NaN before the first evaluation; None without FK.
        ancestors: ``[B, K]`` int32, the particle that each one continues; ``0, 1, ..., K - 1`` where the step did not
            resample. None without particles.
        effective_ancestors: ``[B]`` float64, the effective number of first ancestors of the weighted particles, see
            `Samples.effective_ancestors`. None without particles.
    """

    step: int
    level: Level
    x: Tensor
    log_weights: Tensor | None
    ess: Tensor | None
    x0_hat: Tensor
    reward: Tensor | None = None
    ancestors: Tensor | None = None
    effective_ancestors: Tensor | None = None


_BAR_EVERY = 1.0  # seconds between two looks of a progress bar at the particles
_FEW_ANCESTORS = 5.0  # fewer make a warning ...
_WARNED_FROM = 16  # ... from this many particles on; fewer particles are a choice, and have few ancestors


def sample(
    prior: Denoiser,
    shape: Sequence[int],
    *,
    guidance: Any = None,
    steps: int | Sequence[float] = 50,
    spacing: str | None = None,
    eta: Schedulable | None = None,
    clip: Clip = None,
    seed: int | Sequence[int] | None = None,
    first_sample: int = 0,
    samples_per_observation: int | None = None,
    x_T: Tensor | None = None,
    start: str = "prior",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    keep_ancestors: bool = False,
    progress: bool = False,
    callback: Callable[[Progress], Any] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 10,
    run_id: str | None = None,
) -> Samples:
    """Draw samples of the prior, or of ``x | y`` with a guidance object.

    The network, decoders and rewards run under the caller's autocast. All other arithmetic runs without it.

    Without guidance the result can be differentiated in ``x_T``. There is no other derivative. With guidance, an
    ``x_T``, ``y``, scale or operator that requires a gradient is an error while gradients are enabled.

    Args:
        prior: The network with its schedule.
        shape: ``(B, *event)``: B samples, or B observations. ``y`` has B rows, or one for all.
        guidance: None, or a `DPS`, `PnP`, `PiGDM`, `DAPS`, `LatentPnP`, `TDS` or `FK` object. None samples the prior.
        steps: Number of steps, at least 1 and, for a table, at most its size; 50 by default. Or the decreasing times
            themselves, see `Schedule.levels`.
        spacing: How the levels are spread, see `Schedule.levels`; None takes the default of the schedule.
        eta: Amount of fresh noise in each step, in ``[0, 1]``. 0 is DDIM, which adds none; 1 is DDPM. A number, a table
            with one entry per step, or a function of the schedule's time. None is 1. PnP, LatentPnP and
            DAPS take None only: the ``zeta`` of PnP splits the noise, and that of DAPS is all fresh. TDS and guided FK
            need a value above 0 in some step.
        clip: Clips ``x0_hat`` in the reverse step. A number ``c > 0`` for ``[-c, c]``, a tuple ``(low, high)`` with
            ``low < high``, or a `fastguide.ops.DynamicThreshold`. None does not clip.
        seed: An integer in ``[0, 2^64)``, or a list of B of them. None draws one from torch's default generator, or
            takes that of the checkpoint. The result carries it. The noise depends on the seed, the step and the index
            of the sample, not on the batch. Batches differ only by the network's rounding, about 1e-6 in float32. With
            a list, each observation is drawn as if it ran alone with its seed.
        first_sample: Index of the first sample (observation), ``>= 0``. A run of ``shape = (1, *event)`` with
            ``first_sample=k`` draws sample ``k`` of a larger run. Must be 0 with a list of seeds.
        samples_per_observation: Draw n samples of each observation; ``x`` is then ``[B, n, *event]``. Sample ``j`` of
            observation ``b`` has the index ``b * n + j``. So another n changes the samples of every observation but the
            first, unless each has a seed of its own. None draws one; must be None for TDS and FK.
        x_T: The start, in place of the prior's noise: ``[B, *event]``, or ``[B, K, *event]`` for K particles or samples
            per observation. Floating and finite.
        start: The distribution of ``x_T`` where no ``x_T`` is given. ``"prior"``, the default, is ``N(0, (alpha_T^2 +
            sigma_T^2) I)``, the marginal of data with mean 0 and variance 1. ``"matched"`` is a normal distribution
            with the mean and the covariance that the denoiser predicts at the first level. It takes 512 evaluations
            of the network, or 512 for each observation with conditions of its own. It matters where ``alpha_T`` times
            the norm of the data is not small beside ``sigma_T``.
        dtype: Dtype of the state: float32, float16, bfloat16 or float64. A network runs in the dtype of its parameters.
        device: Where the run is. None takes the device of ``x_T``, else the CPU. ``y`` and the operator are copied
            there; the network must be there already.
        chunk_size: The most samples that the network, a likelihood or a reward sees at once, at least 1. None means
            all.
        keep_ancestors: Return the ancestors of every step, ``[steps, B, K]``. For TDS and FK only.
        progress: Show a tqdm bar (needs tqdm). For TDS and FK it also shows the effective sample size before the step
            and the effective number of first ancestors after it, the lowest over the observations. It reads them once
            a second at most, and after the last step. On a GPU each reading waits for the steps that are under way.
        callback: A function that gets a `Progress` after each step. The run ends early where it returns True (a bool,
            numpy's bool, or a tensor of one bool). The result is then the state at that noise level, with the weights
            and the evidence of that level, and a checkpoint stays, so that a later call can go on.
        checkpoint: A file that the state is written to. A run that finds the file goes on from it, and removes it at
            the end. The result has the same bits with the same ``chunk_size``, and agrees to rounding with another. The
            file of a run with other arguments is an error that names them. The network, rewards and operators are
            called a few times more, to compare their results with those in the file, see
            `fastguide.checkpoints.Checkpoint`.
        checkpoint_every: Number of steps between two writes of the checkpoint, at least 1; 10 by default.
        run_id: Any string, for a run with a checkpoint. It tells runs apart whose functions give the same results in
            those calls. A file with another ``run_id`` is an error.

    Returns:
        The samples, with weights and evidence for TDS and FK.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, does not fit the others, or the checkpoint is of another run.
        FloatingPointError: A value stops being finite, or no particle is left. The message names the function and the
            step.
        ImportError: ``progress=True`` without tqdm.

    Warns:
        RuntimeWarning: Dropout or batch statistics are in training mode, or a reward returns NaN. Or the samples of TDS
            or FK with 16 particles or more descend from fewer than 5 first ancestors (their effective number).
    """
    guidance = Plain() if guidance is None else guidance
    keep_ancestors, progress = flag("keep_ancestors", keep_ancestors), flag("progress", progress)
    if callback is not None:
        function("callback", callback, "a callable or None")
    if checkpoint is not None:
        checkpoint = arguments.path("checkpoint", checkpoint)
    checkpoint_every = integer("checkpoint_every", checkpoint_every, 1)
    if seed is None and checkpoint is not None:
        seed = saved_seed(checkpoint)
    run = prepare_run(
        prior, shape, guidance, steps, spacing, eta, clip, seed, x_T, dtype, device, chunk_size, first_sample,
        samples_per_observation,
    )  # fmt: skip
    run = replace(run, keep_x0_hat=callback is not None, differentiable=differentiable(run, guidance))
    if run_id is not None and (checkpoint is None or not isinstance(run_id, str | int)):
        expected = "a string, an integer or None" if checkpoint is not None else "None without a checkpoint"
        raise ValueError(f"run_id: expected {expected}, got {got(run_id)}")
    if checkpoint is not None and run.differentiable:
        raise ValueError(
            "checkpoint: expected None with an x_T that requires a gradient, since a file holds no graph; "
            "x_T.detach() or torch.no_grad() draws samples"
        )
    loop = Loop(
        hasattr(guidance, "particles"), keep_ancestors, progress, callback, checkpoint, checkpoint_every, run_id
    )
    with foreign.package_modes(run.device):
        run = started(run, start)
        guidance = guidance.prepare(run)
        results = loop(run, guidance)
        unknown = run.watch.report()
    done = min([run.steps, *loop.ended])
    if checkpoint is not None and os.path.exists(checkpoint) and done == run.steps:
        os.remove(checkpoint)
    return finished(run, run.seed, guidance, results, done, unknown)


def finished(run: Run, seed: Any, guidance: Any, results: Sequence[Tensor | None], done: int, unknown: bool) -> Samples:
    """The `Samples` of a loop after ``done`` steps. ``unknown``: whether a reward was NaN."""
    x, log_weights, ess, log_evidence, error, ancestors, first_ancestors = results
    assert x is not None
    times = tuple(level.t for level in run.levels[: done + 1])
    samples = Samples(
        x, log_weights, ess, log_evidence, error, ancestors, first_ancestors, seed=seed, grouped=run.grouped,
        method=type(guidance).__name__, times=times,
    )  # fmt: skip
    if ess is not None and log_weights is not None:
        _check_particles(ess, log_weights, unknown)
        _warn_of_few_ancestors(samples, guidance, stacklevel=4)
    return samples


@dataclass(frozen=True)
class Loop:
    """The steps of a run, one after the other. It returns the tensors of `Samples`, in their order."""

    weighted: bool
    keep_ancestors: bool
    progress: bool = False
    callback: Callable[[Progress], Any] | None = None
    checkpoint: str | os.PathLike | None = None
    checkpoint_every: int = 1
    run_id: str | None = None
    ended: list[int] = field(default_factory=list, compare=False)  # steps after which a callback ended it

    def __post_init__(self) -> None:
        if self.keep_ancestors and not self.weighted:
            raise ValueError("keep_ancestors: expected False without particles (TDS, FK), got True")

    def __call__(self, run: Run, guidance: Any) -> tuple[Tensor | None, ...]:
        file = None
        if self.checkpoint is not None:
            file = Checkpoint(self.checkpoint, run, guidance, self.keep_ancestors, self.run_id)
        guidance = _for_run(guidance)  # inside the loop, since each replay of a capture has another y
        saved = None if file is None else file.load()
        ancestry = Ancestry(run.observations, run.particles, run.device) if self.weighted else None
        state, first, ess, ancestors, tensors = (guidance.start(run), 0, [], [], {}) if saved is None else saved
        if self.weighted and saved is None and run.x_T is None and run.start is None:
            run.watch.start(run.levels[0], state.particles["x0_hat"])
        if ancestry is not None and saved is not None:
            ancestry.load(tensors)
        bar = _progress_bar(range(first, run.steps), run.steps, first, self.progress)
        looked = -math.inf
        for i in bar:
            state = guidance.step(run, state, i)
            if ancestry is not None:
                assert state.ancestors is not None and state.ess is not None
                ess.append(state.ess)
                ancestry.follow(state.ancestors, state.ess)
            if self.keep_ancestors:
                ancestors.append(state.ancestors)
            ends = self.callback is not None and _is_true(self.callback(_progress(run, state, i, ancestry)))
            if self.progress and ancestry is not None:
                now = time.monotonic()
                if ends or i + 1 == run.steps or now - looked >= _BAR_EVERY:
                    looked = now
                    bar.set_postfix_str(_postfix(state, ancestry), refresh=False)
            state.x0_hat = None
            due = ends or (i + 1) % self.checkpoint_every == 0
            if file is not None and due and i + 1 < run.steps:
                file.save(state, i + 1, ess, ancestors, {} if ancestry is None else ancestry.tensors())
            if ends:
                self.ended.append(i + 1)
                break
        with torch.set_grad_enabled(run.differentiable):
            x = state.x.view(run.shape)
        run.watch.finite(run.steps, STATE, x)
        if ancestry is None:
            return x, *(None,) * 6
        log_weights = state.log_weights
        assert log_weights is not None
        _, _, log_evidence, last_ess = ops.resample(log_weights, ess_threshold=0.0, check=False)
        history = torch.stack([*ess, last_ess])
        kept = torch.stack(ancestors) if ancestors else None
        return x, log_weights, history, log_evidence, ancestry.error(log_weights), kept, ancestry.first


def prepare_run(
    prior, shape, guidance, steps, spacing, eta, clip, seed, x_T, dtype, device, chunk_size, first_sample=0,
    samples_per_observation=None,
) -> Run:  # fmt: skip
    """The constants of a run, from the arguments of `sample`."""
    if not isinstance(prior, Denoiser):
        raise TypeError(f"prior: expected a fastguide.Denoiser, got {type(prior).__name__}")
    shape = arguments.shape("shape", shape, "(B, *event)", 1)
    if len(shape) < 2:
        raise ValueError(f"shape: expected (B, *event), got {shape}")
    if isinstance(guidance, type) or not all(hasattr(guidance, name) for name in ("prepare", "start", "step")):
        came = guidance if isinstance(guidance, type) else type(guidance).__name__
        raise TypeError(f"guidance: expected a DPS, PnP, PiGDM, DAPS, LatentPnP, TDS or FK object, or None, got {came}")
    arguments.torch_dtype("dtype", dtype, STATE_DTYPES)
    seed = checked_seed(seed, shape[0])
    first_sample = integer("first_sample", first_sample, 0)
    if first_sample and isinstance(seed, tuple):
        raise ValueError(f"first_sample: expected 0 with a seed for each observation, got {first_sample}")
    chunk_size = None if chunk_size is None else integer("chunk_size", chunk_size, 1)
    clip = unpacked_clip(checked_clip(clip))
    particles, grouped = 1, samples_per_observation is not None
    if hasattr(guidance, "particles"):
        if grouped:
            raise ValueError(
                f"samples_per_observation: expected None with {type(guidance).__name__}, whose particles are the "
                f"samples, got {got(samples_per_observation)}; out.draw(n) gives n"
            )
        particles, grouped = integer("particles", guidance.particles, 1), True
    elif grouped:
        particles = integer("samples_per_observation", samples_per_observation, 1)
    if (first_sample + shape[0]) * particles > 1 << 48:
        name = "particles" if hasattr(guidance, "particles") else "samples_per_observation"
        raise ValueError(
            f"first_sample, shape, {name}: expected (first_sample + B) K at most 2^48, as the noise counts, got "
            f"{got(first_sample)}, B = {got(shape[0])} and K = {got(particles)}"
        )
    if x_T is not None:
        x_T = checked_x_T(x_T, (shape[0], particles, *shape[1:]) if grouped else shape).reshape(-1, *shape[1:])
    if device is None:
        device = torch.device("cpu") if x_T is None else x_T.device
    device = arguments.torch_device("device", device)
    levels = prior.schedule.levels(steps, spacing)
    for level in levels[:-1]:
        prior.check_level(level)
    prior = prior.prepared(levels, shape[0], device)
    warn_of_training(prior, guidance, stacklevel=4)
    if eta is not None and not getattr(guidance, "takes_eta", True):
        why = "whose zeta splits the noise" if hasattr(guidance, "zeta") else "whose noise is all fresh"
        raise ValueError(f"eta: expected None with {type(guidance).__name__}, {why}, got {got(eta)}")
    etas = per_step("eta", 1.0 if eta is None else eta, levels, high=1.0)
    taus = tuple(noise(t, s, e) for t, s, e in zip(levels, levels[1:], etas, strict=False))
    return Run(
        prior, levels, taus, shape[0], particles, shape[1:], seed, clip, chunk_size, dtype, device, x_T, grouped,
        first_sample,
    )  # fmt: skip


def started(run: Run, start: Any) -> Run:
    """The run with the ``start`` of `sample`."""
    one_of("start", start, STARTS)
    if start == "prior":
        return run
    if run.x_T is not None:
        raise ValueError("start: expected 'prior' with an x_T, which is the start, got 'matched'")
    return replace(run, start=match_start(run))


def checked_x_T(x_T: Any, expected: tuple[int, ...]) -> Tensor:
    """``x_T`` if it is floating, finite and of the expected shape."""
    arguments.tensor("x_T", x_T, readable=True)
    if x_T.dtype not in STATE_DTYPES:
        raise TypeError(f"x_T: expected floating values, got {got(x_T)}")
    if tuple(x_T.shape) != expected:
        raise ValueError(f"x_T: expected shape {list(expected)}, got {list(x_T.shape)}")
    if not (torch.isfinite(x_T.detach().sum()) or torch.isfinite(x_T).all()):  # the sum is a hundred times faster
        raise ValueError("x_T: expected finite values, got NaN or infinity")
    return x_T


def checked_seed(seed: Any, observations: int) -> int | tuple[int, ...]:
    """One seed, or a tuple with one for each observation."""
    if seed is None:
        return int(torch.randint((1 << 63) - 1, (), device="cpu"))
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != observations:
            raise ValueError(f"seed: expected an integer, or {observations} of them, got {len(seed)}")
        return tuple(integer("seed", s, 0, 1 << 64) for s in seed)
    return integer("seed", seed, 0, 1 << 64)


def differentiable(run: Run, guidance: Any) -> bool:
    """Whether the result keeps its graph to ``x_T``. Raises where only a part of the derivative could be computed."""
    tensors = {"x_T": run.x_T, "guidance_scale": run.denoiser.guidance_scale}
    likelihood = getattr(guidance, likelihood_field(guidance), None)
    if isinstance(likelihood, Likelihood):
        tensors |= {"y": likelihood.y, "scale": likelihood.scale}
        tensors |= {f"operator.{name}": value for name, value in vars(likelihood.operator).items()}
    found = False
    for name, value in tensors.items():
        if needs_gradient(name, value):
            if name != "x_T" or not isinstance(guidance, Plain):
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient with {type(guidance).__name__}: the only "
                    f"derivative is that without guidance, in x_T; {name}.detach() or torch.no_grad() draws samples"
                )
            found = True
    return found


def likelihood_field(guidance: Any) -> str:
    """The name of the field in which a guidance object may have a likelihood."""
    return "likelihood" if hasattr(guidance, "likelihood") else "reward"


def _for_run(guidance: Any) -> Any:
    """The guidance with `Likelihood.for_run` applied to its likelihood."""
    name = likelihood_field(guidance)
    likelihood = getattr(guidance, name, None)
    own = likelihood.for_run() if isinstance(likelihood, Likelihood) else likelihood
    if own is not likelihood:
        guidance = copy.copy(guidance)
        object.__setattr__(guidance, name, own)
    return guidance


def needs_gradient(name: str, value: Any) -> bool:
    """Whether ``value`` is a tensor that requires a gradient while gradients are enabled."""
    if not isinstance(value, Tensor):
        return False
    if forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(
            f"{name}: expected a tensor without a forward-mode tangent, since fastguide.sample has no forward-mode "
            "derivative; without guidance x_T has one in reverse mode"
        )
    return value.requires_grad and torch.is_grad_enabled()


def _is_true(answer: Any) -> bool:
    """Whether a callback's answer is a true bool: Python's, numpy's, or a tensor of one."""
    if isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.numel() == 1:
        return bool(answer)
    return isinstance(answer, bool | np.bool_) and bool(answer)


def _progress(run: Run, state: State, i: int, ancestry: Ancestry | None) -> Progress:
    def copy(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().clone()

    x = copy(state.x.view(run.shape))
    assert x is not None
    x0_hat = state.x0_hat if ancestry is None else state.particles.get("x0_hat", state.x)
    x0_hat = x if x0_hat is None else copy(x0_hat.view(run.shape))
    assert x0_hat is not None
    reward = state.particles.get("reward")
    reward = None if reward is None else copy(reward.view(run.observations, run.particles))
    level = run.levels[i + 1]
    return Progress(
        i, level, x, copy(state.log_weights), copy(state.ess), x0_hat, reward, copy(state.ancestors),
        None if ancestry is None else _effective_ancestors(state, ancestry),
    )  # fmt: skip


def _effective_ancestors(state: State, ancestry: Ancestry) -> Tensor:
    """The effective number of first ancestors ``[B]``, on the device."""
    assert state.log_weights is not None
    return effective_number(ancestry.first, torch.softmax(state.log_weights.detach(), 1))


def _postfix(state: State, ancestry: Ancestry) -> str:
    """What the bar says of the particles, the lowest over the observations. It waits for the device."""
    assert state.ess is not None
    ess, ancestors = torch.stack([state.ess.min(), _effective_ancestors(state, ancestry).min()]).tolist()
    return f"ESS {ess:.1f} of {ancestry.first.shape[1]}, ancestors {ancestors:.1f}"


def _check_particles(ess: Tensor, log_weights: Tensor, unknown: bool) -> None:
    """Raise where a row lost its weights. Looks once, after the loop. ``unknown``: whether a reward was NaN."""
    bad = torch.isnan(ess)
    if not bad.any():
        return
    step, row = (int(v) for v in bad.nonzero()[0])
    when = "after the last step" if step == ess.shape[0] - 1 else f"before step {step}"
    weights = log_weights[row]
    what = "no particle is alive (all weights are 0)"
    if not (weights == -math.inf).all():
        what = "a weight is NaN or infinite"
    advice = "More particles may help, or a likelihood or reward that is less sharp at high noise"
    if unknown:
        advice = "The reward returned NaN, see the warning; expected numbers or -inf"
    raise FloatingPointError(
        f"log_weights: expected a finite largest weight, got none for observation {row} {when}: {what}. {advice}"
    )


def _warn_of_few_ancestors(samples: Samples, guidance: Any, stacklevel: int) -> None:
    """Warn once where the result descends from few first particles. Looks once, after the loop."""
    particles = samples.x.shape[1]
    if particles < _WARNED_FROM:
        return
    found = samples.effective_ancestors
    few = found < _FEW_ANCESTORS
    number, lowest = torch.stack([few.sum().double(), found.min()]).tolist()
    if not number:
        return
    advice = ["more particles"]
    if getattr(guidance, "covariance", None) == "point":
        advice.append('covariance="moment" or "isotropic" where the likelihood has it')
    if getattr(guidance, "base_kernel", "trace") == "ddpm" and getattr(guidance, "proposal", "guided") == "guided":
        advice.append('base_kernel="trace"')
    advice.append("a lower ess_threshold, or with many measurements a filter for each sample")
    where = "" if len(found) == 1 else f" for {int(number)} of {len(found)} observations"
    warnings.warn(
        f"ancestors: the {particles} particles descend from {lowest:.2g} first ones (effective number){where}. "
        f"They are nearly copies of each other: their variance is too small. What helps: {'; '.join(advice)}. "
        "See Samples.effective_ancestors",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def _progress_bar(steps: range, total: int, first: int, show: bool):
    if not show:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed (pip install 'fastguide[demo]')") from error
    return tqdm(steps, total=total, initial=first, desc="sampling", unit="step")
