"""A trained network with its schedule. Samplers ask it for ``x0_hat = E[x_0 | x_t]``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import arguments, foreign, ops, reference
from .arguments import as_float, function, got, number, one_of
from .ops._arguments import STATE_DTYPES
from .schedules import Level, Schedule, per_step

__all__ = ["Conditional", "Denoiser", "checked_scale"]

Net = Callable[[Tensor, Tensor], Any]
GuidanceScale = float | Sequence[float] | np.ndarray | Callable[[float], float] | Tensor


class Conditional:
    """A network with further inputs: ``net(x, t, **conditions)``.

    Each sample gets the rows of its observation, for any number of particles and any chunk size.

    Args:
        net: A function ``net(x, t, **conditions)``, see `Denoiser`. It gets copies of the conditions.
        **conditions: Tensors, or nested tuples, lists and dicts of tensors. Each tensor has one row per observation, or
            one row for all. Other values are passed on as they are.

    Attributes:
        observations: The number of observations that have rows of their own; 1 where all share one row.

    Raises:
        TypeError: ``net`` is not callable, or a tensor is sparse or quantized.
        ValueError: A tensor has no rows, or two tensors have different numbers of rows.
    """

    def __init__(self, net: Callable[..., Tensor], **conditions: Any):
        function("net", net, "a callable net(x, t, ...)")
        self.net, self.conditions = net, conditions
        self.observations = 1  # grows to the number of rows of the conditions
        for name, value in conditions.items():
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor):
                    continue
                arguments.tensor(name, leaf)
                rows = len(leaf) if leaf.ndim else 0
                if rows not in (1, self.observations) and (rows == 0 or self.observations != 1):
                    raise ValueError(
                        f"{name}: expected one row, or one row per observation like the other conditions, "
                        f"got shape {list(leaf.shape)}"
                    )
                self.observations = max(rows, self.observations)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The network's output for ``x`` ``[N, *event]`` and ``t`` ``[N]``.

        Args:
            x: Noisy states, ``[N, *event]``.
            t: The time of each sample, ``[N]``.
            rows: The observation of each sample, int64 ``[N]``. None means that sample ``i`` has row ``i``.

        Returns:
            What ``net`` returned.

        Raises:
            ValueError: ``rows`` is None and the number of samples is not that of the conditions.
        """
        if rows is None and self.observations not in (1, len(x)):
            raise ValueError(f"x: expected a sample for each of the {self.observations} conditions, got {len(x)}")

        def of_samples(value: Tensor) -> Tensor:
            if len(value) == 1:
                return value.expand(len(x), *value.shape[1:]).clone(memory_format=torch.contiguous_format)
            return value.clone() if rows is None else value[rows]

        return self.net(x, t, **tree_map_only(Tensor, of_samples, self.conditions))


class Denoiser:
    """A network with its schedule and what it predicts.

    The network is a function ``net(x, t)``. ``x`` is ``[N, *event]``, a copy that ``net`` may write into. ``t`` is
    ``[N]`` in the schedule's own time: int64 indices for a table, else float32, or float64 where ``x`` is. ``t.view(-1,
    *(1,) * (x.ndim - 1))`` has the shape that multiplies ``x``. The network returns one of these:

    - a tensor like ``x``, or a numpy array;
    - an object with ``.sample``, a dict with ``"sample"``, or a tuple whose first entry is the prediction;
    - any of these with twice the channels of ``x``; the first half is the prediction (networks with a learned
      variance).

    A module whose parameters all have one floating dtype is called in that dtype. Samplers differentiate through
    ``net``: its output must depend on ``x`` in a way that autograd can follow. The parameters get no gradient, so
    freeze them to save memory.

    With an ``unconditional`` network the prediction is classifier-free guidance:

        unconditional + guidance_scale * (net - unconditional)

    Args:
        net: The network, see above. A `Conditional` gives each observation its label or prompt.
        schedule: The noise levels that the network was trained on, from `fastguide.schedules`.
        prediction: What the network predicts, with ``x_t = alpha x_0 + sigma eps``. ``"epsilon"`` is ``eps``,
            ``"sample"`` is ``x_0``, ``"score"`` is ``-eps / sigma``, ``"v"`` is ``alpha eps - sigma x_0`` and
            ``"flow"`` is ``eps - x_0``.
        unconditional: A second network of the same kind, for classifier-free guidance. It may be a `Conditional` too.
        guidance_scale: The scale of classifier-free guidance, finite. A number, a table with one entry per step (list,
            tuple or numpy array), a function of the schedule's time, or a tensor ``[B]`` with a number for each
            observation. Must come together with ``unconditional``.

    Raises:
        TypeError: ``net``, ``unconditional``, ``schedule`` or ``guidance_scale`` has the wrong type.
        ValueError: ``prediction`` is unknown, ``guidance_scale`` is not finite, or only one of ``unconditional`` and
            ``guidance_scale`` is given.

    Source:
        Ho & Salimans 2021 (classifier-free guidance); Nichol & Dhariwal 2021 (learned variance).
    """

    def __init__(
        self,
        net: Net,
        schedule: Schedule,
        prediction: str = "epsilon",
        *,
        unconditional: Net | None = None,
        guidance_scale: GuidanceScale | None = None,
    ):
        function("net", net, "a callable net(x, t)")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a fastguide.schedules schedule, got {type(schedule).__name__}")
        one_of("prediction", prediction, reference.PREDICTIONS)
        if unconditional is not None:
            function("unconditional", unconditional, "a callable net(x, t)")
        if (unconditional is None) != (guidance_scale is None):
            raise ValueError(
                "unconditional, guidance_scale: expected both or neither, "
                f"got unconditional={got(unconditional)}, guidance_scale={got(guidance_scale)}"
            )
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.unconditional = unconditional
        self.guidance_scale: Any = checked_scale(guidance_scale)
        self._dtypes: dict[str, torch.dtype | None] = {}  # dtype of each network, looked up once per run

    def __repr__(self) -> str:
        return f"Denoiser({type(self.net).__name__}, {self.schedule}, {self.prediction!r})"

    def __call__(self, x: Tensor, level: Level, rows: Tensor | None = None) -> Tensor:
        """The prediction at one level, classifier-free guidance included.

        Args:
            x: Noisy states, ``[N, *event]``, floating.
            level: A level of the schedule, see `Schedule.level`.
            rows: The observation of each sample, int64 ``[N]``, for a `Conditional`. None means that sample ``i`` has
                row ``i``.

        Returns:
            A tensor of the shape and dtype of ``x``.

        Raises:
            TypeError: ``level`` is not a `Level`, or a network returned something that is not a tensor.
            ValueError: An argument has another shape or dtype, a network returned another shape or device, or
                ``prediction`` is ``"epsilon"`` or ``"score"`` at a level with ``alpha = 0``.
        """
        output, base, scale = self.outputs(x, level, rows)
        if base is None:
            return output.to(x.dtype)
        levels = (level.alpha, level.sigma)
        return ops.predict_x0(x, output, levels, prediction="sample", unconditional=base, guidance_scale=scale)

    def outputs(self, x: Tensor, level: Level, rows: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        """What both networks return, and the guidance scale: the parts of a call and of `x0_hat`.

        Args:
            x: Noisy states, ``[N, *event]``.
            level: A level of the schedule.
            rows: The observation of each sample, int64 ``[N]``, or None.

        Returns:
            The output of ``net``, the output of ``unconditional`` and the scale, a float or ``[N]``. The last two are
                None without classifier-free guidance.
        """
        _check_call(x, level, rows)
        self.check_level(level)
        output = self._evaluate("net", self.net, x, level, rows)
        if self.unconditional is None or self.guidance_scale is None:
            return output, None, None
        output = foreign.memory().own(output)  # both networks may return the same memory
        base = self._evaluate("unconditional", self.unconditional, x, level, rows)
        return output, base, self.scale_at(level, x, rows)

    def scale_at(self, level: Level, x: Tensor, rows: Tensor | None) -> Any:
        """The guidance scale at one level.

        Args:
            level: A level of the schedule.
            x: Noisy states, ``[N, *event]``.
            rows: The observation of each sample, int64 ``[N]``, or None.

        Returns:
            A float, or a tensor with one number per sample.

        Raises:
            ValueError: The scale is a table, or has another number of entries than ``x``.
        """
        scale = self.guidance_scale
        if isinstance(scale, dict):
            return scale[level.t]
        if callable(scale):
            return number("guidance_scale", scale(level.t))
        if isinstance(scale, tuple):
            raise ValueError(
                "guidance_scale: a table has an entry for each step of fastguide.sample, got a single call"
            )
        if isinstance(scale, Tensor) and scale.ndim == 1:
            if rows is None and len(scale) != len(x):
                raise ValueError(f"guidance_scale: expected a number or {len(x)} of them, got {len(scale)}")
            return scale.to(x.device, torch.float64)[slice(None) if rows is None else rows]
        return scale

    def prepared(self, levels: Sequence[Level], observations: int, device: torch.device) -> Denoiser:
        """A copy for one run, with the guidance scale of each step and on ``device``.

        Args:
            levels: The levels of the run.
            observations: The number of observations.
            device: The device of the run.

        Returns:
            The copy.

        Raises:
            ValueError: ``guidance_scale`` or the conditions do not fit the steps or the observations.
        """
        self.check_observations(observations)
        prepared = copy.copy(self)
        prepared._dtypes = {}
        for name, net in (("net", self.net), ("unconditional", self.unconditional)):
            prepared._dtypes[name] = _dtype_of(net.net if isinstance(net, Conditional) else net)
        prepared.guidance_scale = scale_of_run(self.guidance_scale, levels, observations, device)
        return prepared

    def x0_hat(self, x: Tensor, level: Level, rows: Tensor | None = None) -> Tensor:
        """The predicted clean sample ``E[x_0 | x_t]``, by Tweedie's formula.

        Args:
            x: Noisy states, ``[N, *event]``, floating.
            level: A level of the schedule, see `Schedule.level`.
            rows: The observation of each sample, as in a call.

        Returns:
            A tensor of the shape and dtype of ``x``.

        Raises:
            TypeError: As in a call.
            ValueError: As in a call.
        """
        return self.convert(x, level, *self.outputs(x, level, rows))

    def convert(
        self, x: Tensor, level: Level, output: Tensor, base: Tensor | None, scale: Any, not_finite: Tensor | None = None
    ) -> Tensor:
        """``x0_hat`` from what `outputs` returned.

        Args:
            x: Noisy states, ``[N, *event]``.
            level: The level of ``x``.
            output: The output of ``net``.
            base: The output of ``unconditional``, or None.
            scale: The guidance scale, a float or ``[N]``, or None.
            not_finite: Flags that the operation sets, see `fastguide.ops.predict_x0`.

        Returns:
            A tensor of the shape and dtype of ``x``.
        """
        return ops.predict_x0(
            x,
            output,
            (level.alpha, level.sigma),
            prediction=self.prediction,
            unconditional=base,
            guidance_scale=scale,
            out=foreign.memory().like(x, output, base, scale),
            not_finite=not_finite,
        )

    def check_level(self, level: Level) -> None:
        """Raise where the prediction does not determine ``x_0``: ``"epsilon"`` and ``"score"`` at ``alpha = 0``.

        Raises:
            ValueError: The level has ``alpha = 0``, and ``prediction`` is ``"epsilon"`` or ``"score"``.
        """
        if level.alpha == 0.0 and self.prediction in ("epsilon", "score"):
            raise ValueError(
                f"prediction: {self.prediction!r} does not determine x_0 where alpha = 0 (t = {level.t} of "
                f"{self.schedule}): expected 'sample', 'v' or 'flow' there, or levels that start below it"
            )

    def check_observations(self, number: int) -> None:
        """Raise unless the conditions have ``number`` rows, or one row for all.

        Raises:
            ValueError: They have another number of rows.
        """
        for name, net in (("net", self.net), ("unconditional", self.unconditional)):
            if isinstance(net, Conditional) and net.observations not in (1, number):
                raise ValueError(
                    f"shape: expected {net.observations} observations, for which {name} has conditions, got {number}"
                )

    def _evaluate(self, name: str, net: Net, x: Tensor, level: Level, rows: Tensor | None) -> Tensor:
        dtype = self._dtypes[name] if self._dtypes else _dtype_of(net.net if isinstance(net, Conditional) else net)
        given = x if dtype is None else x.to(dtype)
        # Never half precision: bfloat16 keeps only eight bits of a time. A new one for each network, which owns it.
        kind = torch.int64 if self.schedule.discrete else torch.promote_types(x.dtype, torch.float32)
        t = torch.full((x.shape[0],), level.t, dtype=kind, device=x.device)
        more = {"rows": rows} if isinstance(net, Conditional) else {}
        try:
            output = foreign.call(lambda x: net(x, t, **more), given)
        except Exception as error:
            error.add_note(
                f"{name}: raised when called with x {given.dtype} {list(x.shape)}{_grad_words(x)} and t {t.dtype} "
                f"{list(t.shape)}. sample(dtype=...) sets the dtype of x"
            )
            if "Inference tensor" in str(error):
                error.add_note(
                    f"{name}: holds tensors made in torch.inference_mode, which autograd cannot use; expected a "
                    "network made outside that mode, or a copy.deepcopy made outside it"
                )
            raise
        output = _prediction(name, output, x)
        if output.shape != x.shape or output.device != x.device or not output.is_floating_point():
            raise ValueError(
                f"{name}: expected it to return a floating tensor of shape {list(x.shape)} on {x.device}, "
                f"got {output.dtype} of shape {list(output.shape)} on {output.device}"
            )
        if not (x.requires_grad and torch.is_grad_enabled()):
            return output.detach()
        if not output.requires_grad:
            # x0_hat would keep a graph through x alone, and its gradient would miss the network's part.
            raise ValueError(
                f"{name}: expected a network that autograd can differentiate, got an output without a graph "
                "(numpy, no_grad or inference_mode inside the network); PnP, DAPS and FK need no derivative of it"
            )
        return output


def _check_call(x: Any, level: Any, rows: Any) -> None:
    arguments.tensor("x", x)
    if x.ndim == 0 or x.dtype not in STATE_DTYPES:
        raise ValueError(f"x: expected floating values of shape [N, *event], got {got(x)}")
    if not isinstance(level, Level):
        raise TypeError(f"level: expected a fastguide.schedules.Level, as Schedule.level gives, got {got(level)}")
    if rows is not None:
        arguments.tensor("rows", rows)
        if rows.dtype != torch.int64 or rows.shape != x.shape[:1]:
            raise ValueError(f"rows: expected an int64 tensor [{len(x)}], got {got(rows)}")


def checked_scale(scale: Any) -> Any:
    """The guidance scale as `Denoiser` keeps it: None, a float, a tuple, a function, or a tensor ``[]`` or ``[B]``."""
    if scale is None or (callable(scale) and not isinstance(scale, Tensor)):
        return scale
    expected = "a number, a table, a function of the time or a tensor [B]"
    values: Any
    if isinstance(scale, Tensor):
        arguments.tensor("guidance_scale", scale, expected, readable=True)
    if isinstance(scale, Tensor) and scale.ndim > 0:
        if scale.numel() != len(scale):
            raise ValueError(f"guidance_scale: expected a number for each observation, got shape {list(scale.shape)}")
        if scale.is_complex() or scale.dtype == torch.bool:
            raise TypeError(f"guidance_scale: expected {expected}, got {got(scale)}")
        scale = scale.flatten()
        finite = bool(torch.isfinite(scale.to(torch.float64)).all())
    elif isinstance(scale, list | tuple) or (isinstance(scale, np.ndarray) and scale.ndim > 0):
        values = tuple(map(as_float, scale))
        if None in values:
            raise TypeError(f"guidance_scale: expected {expected}, got {got(scale)}")
        scale, finite = values, all(map(math.isfinite, values))
    else:
        value = as_float(scale)
        if value is None:
            kind = ValueError if isinstance(scale, int) and not isinstance(scale, bool) else TypeError
            raise kind(f"guidance_scale: expected {expected}, got {got(scale)}")
        scale, finite = value, math.isfinite(value)
    if not finite:
        raise ValueError(f"guidance_scale: expected finite values, got {scale}")
    return scale


def scale_of_run(scale: Any, levels: Sequence[Level], observations: int, device: torch.device) -> Any:
    """A checked guidance scale for one run: None, a number, ``[B]`` on ``device``, or a dict of one number per time."""
    if isinstance(scale, Tensor) and scale.ndim == 1:
        if len(scale) not in (1, observations):
            raise ValueError(
                f"guidance_scale: expected a number, or one for each of {observations} observations, got {len(scale)}"
            )
        return scale.to(device).expand(observations)
    if isinstance(scale, tuple) or callable(scale):
        values = per_step("guidance_scale", scale, levels, low=-math.inf)
        return {level.t: v for level, v in zip(levels, values, strict=False)}
    return scale


def _prediction(name: str, output: Any, x: Tensor) -> Tensor:
    """The prediction in what a network returned, see `Denoiser`."""
    if isinstance(output, dict) and "sample" in output:
        output = output["sample"]
    elif isinstance(output, tuple | list) and len(output):
        output = output[0]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "sample", None), Tensor):
        output = output.sample
    if isinstance(output, np.ndarray):
        output = torch.as_tensor(output, device=x.device)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: expected it to return a tensor, an object with .sample, a dict with 'sample' or a tuple, "
            f"got {type(output).__name__}; a function lambda x, t: net(x, t)... can pick the tensor"
        )
    channels = x.shape[1] if x.ndim > 1 else 0
    if x.ndim > 1 and output.shape == (x.shape[0], 2 * channels, *x.shape[2:]):
        return output[:, :channels]  # the rest is a learned variance (Nichol & Dhariwal 2021)
    return output


def _dtype_of(net: Any) -> torch.dtype | None:
    """The dtype in which a module computes, if its floating parameters all have it; else None."""
    if not isinstance(net, torch.nn.Module):
        return None
    found = {p.dtype for p in net.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _grad_words(x: Tensor) -> str:
    return ", which requires a gradient," if x.requires_grad else ""
