"""deepinv (0.5): its physics and denoisers for our samplers, and samplers with its interface.

    sampler = DPS(denoiser, num_steps=100)      # DPS or DiffPIR as in deepinv, or Sampler with any fastguide guidance
    x = sampler(y, physics, seed=0)

`operator`, `likelihood` and `prior` convert a ``deepinv.physics`` object, a measurement with its noise model, and a
denoiser ``f(x, sigma)`` into what `fastguide.sample` takes. Images are in the range of the physics and the denoiser,
usually [0, 1]. A state is ``x_t = x_0 + sigma eps`` in that range.

A physics may have one mask or kernel for each sample of a batch. All particles of an observation then share its mask.
All measurements of a ``StackedPhysics`` must have the same noise model.

This module does not import deepinv: it recognises objects by the names of their classes. Objects stay on their device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import guidance, likelihoods, operators, ops, schedules
from ..arguments import flag, function, got, integer, number, real_array, tensor, torch_device, torch_dtype
from ..arguments import shape as shape_of
from ..denoiser import Denoiser
from ..foreign import as_tensor, call, package_modes
from ..guidance import PnP
from ..guidance.base import STREAM_INITIAL, Run, entry
from ..guidance.watch import Watch
from ..ops._arguments import STATE_DTYPES
from ..sampling import Samples, _progress_bar, sample

__all__ = ["DPS", "DiffPIR", "Sampler", "likelihood", "operator", "prior"]

Shape = Sequence[int]


def _is(value: Any, name: str) -> bool:
    """Whether the class of ``value`` or one of its bases is called ``name``."""
    return any(base.__name__ == name for base in type(value).__mro__)


# --- operators ----------------------------------------------------------------------------------------------


# Attributes of a physics that may have a row for each sample of a batch, and those that deepinv computes from them
_OF_EACH_SAMPLE = ("mask", "filter", "filters", "multipliers", "coil_maps")
_DERIVED = ("angle", "Fh", "Fhc", "Fh2")


def _rows_of(physics: Any) -> int | None:
    """How many samples have their own mask or kernel in the physics; None if all share one."""
    for part in getattr(physics, "physics_list", [physics]):
        least = 1 if _is(part, "Inpainting") else 4  # dimensions of a value with rows: mostly those of images
        for name in _OF_EACH_SAMPLE:
            value = getattr(part, name, None)
            if isinstance(value, Tensor) and value.ndim >= least and len(value) > 1:
                return len(value)
    return None


def _with_rows(physics: Any, rows: Tensor, number: int) -> Any:
    """A copy of a physics that has ``number`` masks or kernels. The copy keeps only those of the samples ``rows``."""
    chosen = copy.copy(physics)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(chosen, registry, dict(getattr(physics, registry)))
    if hasattr(physics, "physics_list"):
        chosen.physics_list = nn.ModuleList([_with_rows(part, rows, number) for part in physics.physics_list])
    for name in (*_OF_EACH_SAMPLE, *_DERIVED):
        value = getattr(physics, name, None)
        if isinstance(value, Tensor) and value.ndim and len(value) == number:
            chosen._parameters.pop(name, None)
            setattr(chosen, name, value.detach()[rows.to(value.device)])
    return chosen


class _Physics(operators.Operator):
    """The operator ``A`` of a physics; ``A_dagger`` is its pseudo-inverse."""

    def __init__(self, physics: Any, compute_dtype: torch.dtype | None):
        self.physics, self.compute_dtype = physics, compute_dtype
        self.observations = _rows_of(physics)

    def at(self, rows: Tensor) -> operators.Operator:
        if self.observations is None:
            return self
        chosen = copy.copy(self)
        chosen.physics = _with_rows(self.physics, rows, self.observations)
        chosen.observations = len(rows)
        return chosen

    def __repr__(self) -> str:
        return f"deepinv's {type(self.physics).__name__}"

    def _call(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value = f(x.to(dtype=self.compute_dtype))
        return value.to(x.dtype.to_complex() if value.is_complex() else x.dtype)

    def _check_rows(self, x: Tensor) -> None:
        """Raise if the physics has another number of samples: broadcasting would give a sample the mask of another."""
        if self.observations not in (None, len(x)):
            raise ValueError(
                f"physics: expected one {self} for all samples, or one for each of {len(x)}, got {self.observations}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        self._check_rows(x)
        return self._call(self.physics.A, x)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self._call(self.physics.A_dagger, y)


class _LinearPhysics(_Physics, operators.LinearOperator):
    def adjoint(self, y: Tensor) -> Tensor:
        return self._call(self.physics.A_adjoint, y)


class _DecomposablePhysics(_LinearPhysics):
    """``A = U diag(s) V^T``: ``U`` is the eigenbasis of ``A A^T``, ``s^2`` the eigenvalues."""

    def __init__(self, physics: Any, compute_dtype: torch.dtype | None):
        super().__init__(physics, compute_dtype)
        if physics.mask is None:
            raise ValueError(f"physics: expected one whose mask or filter is set, got {self} without one")
        values = (physics.mask.conj() * physics.mask).real
        while values.ndim and len(values) == 1:
            values = values[0]
        self._eigenvalues = values

    def at(self, rows: Tensor) -> operators.Operator:
        chosen = super().at(rows)
        if chosen is not self and len(self._eigenvalues) == self.observations:
            assert isinstance(chosen, _DecomposablePhysics)
            chosen._eigenvalues = self._eigenvalues[rows.to(self._eigenvalues.device)]
        return chosen

    def eigenvalues(self, y: Tensor) -> Tensor:
        return self._eigenvalues.to(y.dtype)

    def transform(self, y: Tensor) -> Tensor:
        return self._call(self.physics.U_adjoint, y)

    def inverse_transform(self, c: Tensor) -> Tensor:
        return self._call(self.physics.U, c)


class _BlurFFT(_DecomposablePhysics):
    """A blur with the whole spectrum. deepinv keeps only half of it, in real and imaginary parts. These are not an
    orthonormal basis.
    """

    def __init__(self, physics: Any, compute_dtype: torch.dtype | None):
        super().__init__(physics, compute_dtype)
        half, width = self._eigenvalues[..., 0], physics.img_size[-1]
        mirrored = half[..., 1 : (width + 1) // 2].flip(-2, -1).roll(1, -2)
        self._eigenvalues = torch.cat([half, mirrored], -1)

    def transform(self, y: Tensor) -> Tensor:
        return torch.fft.fft2(y, norm="ortho")

    def inverse_transform(self, c: Tensor) -> Tensor:
        return torch.fft.ifft2(c, norm="ortho").real


class _Stack(_Physics):
    """Several measurements as one tensor ``[B, m]``: they are flattened and concatenated. ``y`` gives their shapes."""

    def __init__(self, physics: Any, compute_dtype: torch.dtype | None, y: Any):
        super().__init__(physics, compute_dtype)
        if y is None:
            raise ValueError(f"y: expected the measurements of a {type(physics).__name__}, got None")
        self._kind, self._shapes = type(y), [part.shape[1:] for part in y]

    def flattened(self, parts: Any) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def parts(self, y: Tensor) -> Any:
        pieces = y.split([shape.numel() for shape in self._shapes], dim=1)
        return self._kind([p.reshape(len(y), *shape) for p, shape in zip(pieces, self._shapes, strict=True)])

    def __call__(self, x: Tensor) -> Tensor:
        self._check_rows(x)
        return self._call(lambda x: self.flattened(self.physics.A(x)), x)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self._call(lambda y: self.physics.A_dagger(self.parts(y)), y)


class _LinearStack(_Stack, operators.LinearOperator):
    def adjoint(self, y: Tensor) -> Tensor:
        return self._call(lambda y: self.physics.A_adjoint(self.parts(y)), y)


class _Rates(operators.Operator):
    """``photons exp(-mu A(x))``."""

    def __init__(self, forward: operators.Operator, mu: float, photons: float):
        self.forward, self.mu, self.photons = forward, mu, photons
        self.observations = getattr(forward, "observations", None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.photons * torch.exp(-self.mu * self.forward(x))

    def at(self, rows: Tensor) -> operators.Operator:
        return _Rates(self.forward.at(rows), self.mu, self.photons)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> operators.Operator:
        return _Rates(self.forward.to(device, dtype), self.mu, self.photons)


def operator(physics: Any, dtype: torch.dtype | None = None, y: Any = None) -> _Physics:
    """Wraps a deepinv physics as an operator with its own ``A``, ``A_adjoint`` and ``A_dagger``.

    A ``DecomposablePhysics`` has a spectrum, which gives closed forms to PnP, PiGDM and the isotropic covariance. Other
    linear physics have no spectrum. Nonlinear physics have ``A`` and ``A_dagger`` only.

    Args:
        physics: A ``deepinv.physics`` object.
        dtype: What the physics computes in, whatever the dtype of the state. None is the dtype of the state.
        y: Measurements, which give a ``StackedPhysics`` its shapes. It needs them; other physics ignore them. The
            measurements stand as one tensor ``[B, m]``.

    Returns:
        An operator for `fastguide.likelihoods` and `fastguide.PiGDM`.

    Raises:
        TypeError: ``physics`` is not a deepinv physics.
        ValueError: ``y`` is missing for a ``StackedPhysics``, or a decomposable physics has no mask or filter yet.
    """
    if not _is(physics, "Physics"):
        raise TypeError(f"physics: expected a deepinv.physics object, got {type(physics).__name__}")
    if _is(physics, "StackedPhysics"):
        return (_LinearStack if _is(physics, "LinearPhysics") else _Stack)(physics, dtype, y)
    if not _is(physics, "LinearPhysics"):
        return _Physics(physics, dtype)
    defines_A = next(base.__name__ for base in type(physics).__mro__ if "A" in vars(base))
    if defines_A == "BlurFFT":
        return _BlurFFT(physics, dtype)
    # A subclass with its own A may have another spectrum (DynamicMRI)
    return (_DecomposablePhysics if defines_A == "DecomposablePhysics" else _LinearPhysics)(physics, dtype)


# --- likelihoods --------------------------------------------------------------------------------------------


def likelihood(y: Tensor, physics: Any, scale: likelihoods.Scale | None = None) -> likelihoods.Likelihood:
    """The likelihood ``p(y | x_0)`` of a measurement, with the noise model of its physics.

    - ``GaussianNoise``: Gaussian with scale ``sigma``.
    - ``ZeroNoise``: Gaussian with scale 0, an exact measurement. Only PiGDM and PnP can use it.
    - ``LaplaceNoise``: Laplace with scale ``b``.
    - ``PoissonNoise``: Poisson with scale ``gain``, whether ``normalize`` has multiplied ``y`` by it or not.
    - ``LogPoissonNoise``: Poisson with scale 1, for counts ``N0 exp(-mu y)`` with rates ``N0 exp(-mu A(x))``.

    ``sigma`` and ``b`` may differ between observations. The other parameters must be one number for all of ``y``.

    With an ``Inpainting`` physics whose mask is zeros and ones, the observation holds the measured elements only,
    ``[B, m]``, so that densities count nothing else. This needs equally many in every observation. Otherwise missing
    elements count as measured zeros, which adds a constant to the density.

    A ``sensor_model`` is ignored, as in the samplers of deepinv. The physics computes in the dtype of ``y``.

    Args:
        y: The measurement ``[B, *measurement]``, or a list of them for a ``StackedPhysics``.
        physics: A ``deepinv.physics`` object with a ``noise_model``.
        scale: Replaces the scale named above: a number, a tensor or a function of ``sigma_t``.

    Returns:
        A `fastguide.likelihoods` object for ``y`` and the operator of ``physics``.

    Raises:
        TypeError: ``y`` is not a tensor, or ``physics`` is not a deepinv physics.
        ValueError: The shape of ``y`` is wrong, the noise model has another class, or its parameter differs between
            samples where it must not.
    """
    forward: operators.Operator
    y = _checked(y, physics)
    forward, y = _measured(y, physics, y[0].dtype)
    noise = _noise_of(physics)
    if _is(physics, "Inpainting") and isinstance(forward, _DecomposablePhysics):
        mask = physics.mask
        counts = mask.expand(len(mask), *y.shape[1:]).flatten(1).sum(1)
        if ((mask == 0) | (mask == 1)).all() and (counts == counts[0]).all():
            shared, mask = len(mask) == 1, mask.bool().expand(len(mask), *y.shape[1:])
            forward = operators.Inpainting(mask[0]) if shared else operators.Inpainting(mask, per_observation=True)
            y = forward(y)

    def scale_or(default: float | Tensor) -> likelihoods.Scale:
        return default if scale is None else scale

    if _is(noise, "GaussianNoise"):
        return likelihoods.Gaussian(y, forward, scale_or(_number_or_rows(noise, "sigma", y)))
    if _is(noise, "ZeroNoise"):
        return likelihoods.Gaussian(y, forward, scale_or(0.0))
    if _is(noise, "LaplaceNoise"):
        return likelihoods.Laplace(y, forward, scale_or(_number_or_rows(noise, "b", y)))
    if _is(noise, "PoissonNoise"):
        gain = _number(noise, "gain")
        return likelihoods.Poisson(y if noise.normalize else y * gain, forward, scale_or(gain))
    if _is(noise, "LogPoissonNoise"):
        mu, photons = _number(noise, "mu"), _number(noise, "N0")
        return likelihoods.Poisson(photons * torch.exp(-mu * y), _Rates(forward, mu, photons), scale_or(1.0))
    raise ValueError(
        "physics: expected a noise_model that is one of GaussianNoise, ZeroNoise, LaplaceNoise, PoissonNoise and "
        f"LogPoissonNoise, got {type(noise).__name__}"
    )


def _checked(y: Any, physics: Any) -> Any:
    """``y`` after checks: a measurement, or the measurements of a stack."""
    for part in y if _is(physics, "StackedPhysics") else [y]:
        tensor("y", part, readable=True)
        if part.ndim < 2 or not part.numel():
            raise ValueError(f"y: expected shape [B, *measurement] with B >= 1, got {list(part.shape)}")
    return y


def _start(x_init: Any, shape_too: bool) -> Any:
    if not isinstance(x_init, Tensor) and shape_too:
        return shape_of("x_init", x_init, "a state or its shape", 1)
    tensor("x_init", x_init, readable=True)
    if x_init.dtype not in STATE_DTYPES or x_init.ndim < 2 or not x_init.numel():
        raise ValueError(f"x_init: expected floating values of shape [B, *event], got {got(x_init)}")
    return x_init


def _measured(y: Any, physics: Any, dtype: torch.dtype | None = None) -> tuple[_Physics, Tensor]:
    """The operator, and the measurements as one tensor."""
    forward = operator(physics, dtype, y)
    return forward, forward.flattened(y) if isinstance(forward, _Stack) else y


def _noise_of(physics: Any) -> Any:
    """The noise model. All parts of a stack must have the same one."""
    if not _is(physics, "StackedPhysics"):
        return physics.noise_model
    noises, kinds = [part.noise_model for part in physics.physics_list], set()
    for noise in noises:
        numbers = {name: value.tolist() for name, value in noise.state_dict().items() if name != "initial_random_state"}
        kinds.add(f"{type(noise).__name__} {numbers}")
    if len(kinds) > 1:
        raise ValueError(f"physics: expected one noise_model for all measurements, got {sorted(kinds)}")
    return noises[0]


def _gaussian_scale(physics: Any) -> float:
    """The scale of Gaussian measurement noise. It is 0 where the noise is not Gaussian, as in deepinv."""
    noise = _noise_of(physics)
    return _number(noise, "sigma") if _is(noise, "GaussianNoise") else 0.0


def _number_or_rows(noise: Any, name: str, y: Tensor) -> float | Tensor:
    """One number, or a tensor ``[B, 1, ...]`` with as many dimensions as ``y`` if observations have different ones."""
    values = as_tensor(getattr(noise, name))
    if values.numel() != len(y) or len(y) == 1 or (values == values.flatten()[0]).all():
        return _number(noise, name)
    return values.detach().to(y).reshape(-1, *(1,) * (y.ndim - 1))


def _number(noise: Any, name: str) -> float:
    values = as_tensor(getattr(noise, name)).flatten()
    if not (values == values[0]).all():
        raise ValueError(
            f"physics: expected a noise_model whose {name} is one number for all samples, got {len(values)} of them"
        )
    return values[0].item()


# --- priors -------------------------------------------------------------------------------------------------


class _Sigmas(schedules.Schedule):
    """Given noise levels, decreasing. The last may be above 0."""

    def __init__(self, sigmas: Sequence[float]):
        self.t_max, self.t_min, self.clean = sigmas[0], sigmas[-2], sigmas[-1]

    def __repr__(self) -> str:
        return f"sigmas({self.t_max:g}, ..., {self.clean:g})"

    def _alpha_sigma(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(t), t.copy()


def prior(
    denoiser: Callable[..., Tensor],
    schedule: schedules.Schedule | None = None,
    *,
    clip: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Wraps a denoiser ``f(x, sigma) -> E[x_0 | x_0 + sigma eps = x]`` as a prior.

    Args:
        denoiser: ``denoiser(x, sigma)`` of ``[N, *event]`` and ``[]``. It is called once for all samples, which are at
            one level.
        schedule: A schedule with ``alpha = 1`` (``ve`` or ``edm``). The default is ``edm(0.001, 40)``, the schedule of
            Karras et al. 2022 for images in [0, 1]. Variance-preserving processes have the same steps, in
            ``x_t / alpha_t``.
        clip: The range ``(low, high)`` that the output is clipped to. Gradients are those of the clipped output.
        dtype: What the denoiser computes in, whatever the dtype of the state. None is the dtype of the state.

    Returns:
        A `fastguide.Denoiser`.

    Raises:
        TypeError: ``denoiser`` is not callable.
        ValueError: ``schedule`` has another alpha than 1.
    """
    function("denoiser", denoiser, "a callable f(x, sigma)")
    schedule = schedules.edm(0.001, 40.0) if schedule is None else schedule
    if isinstance(schedule, schedules.Schedule) and schedule.alpha(schedule.t_max) != 1.0:
        raise ValueError(f"schedule: expected one with alpha = 1 (ve, edm), got {schedule}")

    def net(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoiser(x.to(dtype=dtype), t[0].to(dtype=dtype))  # all samples are at one level
        return x0 if clip is None else x0.clamp(*clip)

    return Denoiser(net, schedule, "sample")


# --- samplers -----------------------------------------------------------------------------------------------


def _shape(y: Tensor, forward: operators.Operator) -> Shape:
    """The shape of the images that ``y`` measures."""
    with torch.no_grad():
        x = forward.adjoint(y) if isinstance(forward, operators.LinearOperator) else forward.pseudo_inverse(y)
    return tuple(x.shape)


def _seed(seed: int | None, rng: torch.Generator | None = None) -> int:
    if seed is not None:
        return integer("seed", seed, 0, 1 << 64)
    return int(torch.randint(1 << 62, (), generator=rng, device="cpu" if rng is None else rng.device))


class Sampler(nn.Module):
    """A fastguide sampler that is called as a deepinv sampler.

    Args:
        denoiser: A denoiser ``f(x, sigma)``, as in `prior`.
        guidance: A function of the likelihood that returns a guidance object, such as ``fastguide.PiGDM`` or
            ``functools.partial(fastguide.TDS, particles=64)``.
        schedule: As in `prior`.
        likelihood: A function of ``(y, physics)`` that returns the likelihood, such as
            ``functools.partial(likelihood, scale=0.01)``.
        **options: Options of `fastguide.sample`. ``dtype`` and ``device`` are by default those of ``y``. The denoiser
            and the physics compute in the dtype of ``y`` in any case.

    Raises:
        TypeError: ``denoiser``, ``guidance`` or ``likelihood`` is not callable.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        guidance: Callable[[Any], Any],
        *,
        schedule: schedules.Schedule | None = None,
        likelihood: Callable[[Tensor, Any], likelihoods.Likelihood] = likelihood,
        **options: Any,
    ):
        super().__init__()
        function("denoiser", denoiser, "a callable f(x, sigma)")
        function("guidance", guidance, "a function of the likelihood")
        function("likelihood", likelihood, "a function of (y, physics)")
        self.denoiser, self.guidance, self.likelihood = denoiser, guidance, likelihood
        self.schedule, self.options = schedule, options

    def forward(self, y: Tensor, physics: Any, seed: int | None = None, shape: Shape | None = None) -> Tensor:
        """Draws one sample for each observation. Particle methods draw one particle by its weight.

        Args:
            y: The measurement, as in `likelihood`.
            physics: A ``deepinv.physics`` object.
            seed: The seed of the noise, an integer in ``[0, 2^64)``. None draws one from torch's generator.
            shape: ``(B, *event)``. By default it is the shape of ``A_adjoint(y)``, or of ``A_dagger(y)`` where ``A`` is
                not linear.

        Returns:
            Samples ``[B, *event]``.

        Raises:
            TypeError: As in `likelihood` and `fastguide.sample`.
            ValueError: As in `likelihood` and `fastguide.sample`.
        """
        seed = _seed(seed)
        samples = self.sample(y, physics, seed, shape)
        return samples.x if samples.log_weights is None else samples.draw(1, seed)[:, 0]

    def sample(self, y: Tensor, physics: Any, seed: int | None = None, shape: Shape | None = None) -> Samples:
        """Draws as `forward` does, and returns everything that `fastguide.sample` returns.

        Args:
            y: As in `forward`.
            physics: As in `forward`.
            seed: As in `forward`.
            shape: As in `forward`.

        Returns:
            The samples. With TDS and FK they are weighted particles, and the evidence is there too.
        """
        if shape is not None:
            shape = shape_of("shape", shape, "(B, *event)", 1)
        guidance = self.guidance(self.likelihood(_checked(y, physics), physics))
        forward, measured = _measured(y, physics)
        options: dict[str, Any] = {"dtype": measured.dtype, "device": measured.device} | self.options
        denoiser = prior(self.denoiser, self.schedule, dtype=measured.dtype)
        return sample(denoiser, shape or _shape(measured, forward), guidance=guidance, seed=_seed(seed), **options)


class DPS(nn.Module):
    """Diffusion posterior sampling with the arguments of ``deepinv.sampling.DPS``.

    Given the same noise, results are those of deepinv, to rounding.

    Args:
        denoiser: A denoiser ``f(x, sigma)``, as in `prior`.
        schedule: ``"vp"`` or ``"ve"``.
        solver: ``"ddpm"``, ``"ddim"``, ``"ancestral"`` or ``"euler"``, or a deepinv solver object. A solver object runs
            as it is, on our score, with its own times, noise and ``rng``; ``num_steps`` and the ``rng`` here are
            ignored. A ``seed`` sets its ``rng``.
        alpha: How much noise ``"ancestral"`` (in [0, 1]) and ``"euler"`` (>= 0) add: a number, or a function of the
            time in [0, 1].
        num_steps: One more than the number of evaluations of the denoiser, an integer >= 2.
        weight: A factor of the guidance, a number >= 0.
        guidance: ``"norm"`` takes the gradient of the residual's norm. ``"annealed"`` takes that of its square over
            ``2 (sigma_y^2 + sigma_t^2)``.
        verbose: Whether to show a progress bar.
        device: Where the run is.
        dtype: The dtype of the state and the result. The denoiser and the physics compute in float32, as in deepinv.
            The GPU kernels do not serve the default, float64.
        rng: The generator that draws a seed in calls without one. None is torch's own.
        minus_one_one: Whether noise levels are for images in [-1, 1]. They are then twice those that the denoiser gets.

    Raises:
        TypeError: ``denoiser`` is not callable, ``rng`` is not a generator, ``dtype`` is not a dtype of states, or an
            argument is not a number or a bool where one is expected.
        ValueError: A name is unknown, or an argument is out of range.

    Source:
        Chung et al. 2023 (DPS).
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: str = "vp",
        solver: Any = "ddpm",
        alpha: Callable[[Any], Any] | float = 1.0,
        num_steps: int = 1000,
        weight: float = 1.0,
        guidance: str = "norm",
        verbose: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        rng: torch.Generator | None = None,
        minus_one_one: bool = True,
    ):
        super().__init__()
        for name, value, known in (
            ("schedule", schedule, ("vp", "ve")),
            ("solver", solver, ("ddpm", "ddim", "ancestral", "euler")),
            ("guidance", guidance, ("norm", "annealed")),
        ):
            if name == "solver" and _is(value, "BaseSDESolver"):
                continue
            if not isinstance(value, str) or value.lower() not in known:
                other = " or a deepinv solver" if name == "solver" else ""
                raise ValueError(f"{name}: expected one of {known}{other}, got {got(value)}")
        function("denoiser", denoiser, "a callable f(x, sigma)")
        num_steps = integer("num_steps", num_steps, 2, 1 << 32)
        alpha = alpha if callable(alpha) else number("alpha", alpha, low=0.0)
        if rng is not None and not isinstance(rng, torch.Generator):
            raise TypeError(f"rng: expected a torch.Generator or None, got {got(rng)}")
        torch_dtype("dtype", dtype, STATE_DTYPES)
        self.denoiser = denoiser
        self.schedule, self.alpha = schedule.lower(), alpha
        self.solver: Any = solver.lower() if isinstance(solver, str) else solver
        # at time 0 an Euler step would divide by sigma = 0
        self.timesteps = torch.linspace(
            1, 0.001 if self.solver == "euler" else 0, num_steps, dtype=torch.float64, device="cpu"
        )
        self.weight, self.guidance, self.verbose = number("weight", weight, low=0.0), guidance, flag("verbose", verbose)
        self.device, self.dtype, self.rng = torch_device("device", device), dtype, rng
        self.minus_one_one = flag("minus_one_one", minus_one_one)

    def forward(
        self,
        y: Tensor,
        physics: Any,
        x_init: Tensor | Shape | None = None,
        seed: int | None = None,
        timesteps: Any = None,
        denoise_output: bool = True,
        get_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draws a sample for the measurement ``y``.

        Args:
            y: The measurement ``[B, *measurement]``, or a list of them for a ``StackedPhysics``.
            physics: A ``deepinv.physics`` object.
            x_init: The state ``[B, *event]`` at the first time, scaled as in deepinv, or its shape. None starts from
                noise in the shape of ``A_adjoint(y)``, or of ``A_dagger(y)`` where ``A`` is not linear.
            seed: The seed of the noise, an integer in ``[0, 2^64)``. It is used whether there is an ``rng`` or not.
                None draws one.
            timesteps: Decreasing times in [0, 1], at least two, in place of ``num_steps`` or the times of a solver
                object.
            denoise_output: Whether to denoise once more where the last level is not clean.
            get_trajectory: Whether to return all states too.

        Returns:
            ``x``, or ``(x, trajectory)`` with ``get_trajectory``. The sample ``x`` is ``[B, *event]``; the trajectory
                is ``[num_steps, B, *event]``.

        Raises:
            TypeError: ``y`` or ``x_init`` has the wrong type, or a flag is not a bool.
            ValueError: A shape is wrong, or ``timesteps``, ``seed`` or a value of ``alpha`` is out of range.
        """
        y = _checked(y, physics).detach()
        denoise_output, get_trajectory = flag("denoise_output", denoise_output), flag("get_trajectory", get_trajectory)
        if timesteps is not None:
            timesteps = torch.from_numpy(real_array("timesteps", timesteps, "a row of two times or more"))
            if timesteps.ndim != 1 or len(timesteps) < 2:
                raise ValueError(f"timesteps: expected a row of two times or more, got shape {list(timesteps.shape)}")
            inside = (timesteps >= 0.0) & (timesteps <= 1.0)
            if isinstance(self.solver, str) and not (inside.all() and (timesteps.diff() < 0.0).all()):
                raise ValueError("timesteps: expected decreasing times in [0, 1], got others")
        x_init = None if x_init is None else _start(x_init, shape_too=True)
        if self.solver not in ("ddpm", "ddim", "ancestral"):
            with package_modes(torch.device(self.device)):
                return self._solve(y, physics, x_init, seed, timesteps, denoise_output, get_trajectory)
        forward, y = _measured(y, physics, torch.float32)
        t = self.timesteps if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        scale, sigma = self._level(t)
        # deepinv's state is scale (x_t - shift) / unit
        unit, shift = self._range
        sigma = unit * sigma
        ratio = sigma[1:] / sigma[:-1]
        eta = self._eta(t[:-1], ratio)
        kept = ratio * (1 - eta**2 * (1 - ratio**2)).clamp(min=0).sqrt()  # the weight of x_t in the mean of x_s
        zeta = self.weight * sigma[:-1] ** 2 * (1 - kept)  # the weight of the score in that mean
        seed = _seed(seed, self.rng)
        if isinstance(x_init, Tensor):
            x = unit * x_init.detach().to(self.device, self.dtype) / scale[0].item() + shift
        else:
            shape = x_init or _shape(y, forward)
            z = ops.randn(shape, seed=seed, stream=STREAM_INITIAL, dtype=self.dtype, device=self.device)
            x = sigma[0].item() * z + shift
        states = [x]
        normalize = self.guidance == "norm"
        if normalize:
            error = likelihoods.Gaussian(y, forward, 1.0)  # any scale: the norm's gradient does not depend on it
        else:
            sigma_y = _gaussian_scale(physics)
            error = likelihoods.Gaussian(y, forward, lambda sigma_t: math.hypot(sigma_y, sigma_t))
        x = sample(
            prior(self.denoiser, _Sigmas(sigma.tolist()), clip=(-1.0, 1.0), dtype=torch.float32),
            tuple(x.shape),
            guidance=guidance.DPS(error, (0.5 * zeta if normalize else zeta).tolist(), normalize),
            steps=sigma.tolist(),
            eta=eta.tolist(),
            seed=seed,
            x_T=x,
            dtype=self.dtype,
            device=self.device,
            progress=self.verbose,
            callback=(lambda progress: states.append(progress.x.clone())) if get_trajectory else None,
        ).x
        if denoise_output and sigma[-1] > 0:
            with torch.no_grad():
                x = self.denoiser(x.float(), sigma[-1].to(self.device, torch.float32)).to(x.dtype)

        def rescaled(x: Tensor, scale: float) -> Tensor:
            return scale * (x - shift) + shift

        output = rescaled(x, scale[-1].item())
        if not get_trajectory:
            return output
        return output, torch.stack([rescaled(*pair) for pair in zip(states, scale.tolist(), strict=True)])

    @property
    def _range(self) -> tuple[float, float]:
        """``unit, shift``: an image is ``unit u + shift`` where ``u`` is deepinv's state."""
        return (0.5, 0.5) if self.minus_one_one else (1.0, 0.0)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ``scale`` and ``sigma`` of deepinv at the times ``t``."""
        if self.schedule == "ve":
            return torch.ones_like(t), 0.001 * 80000.0**t
        scale = torch.exp(-0.5 * (0.1 * t + 0.5 * 19.9 * t**2))
        return scale, (scale**-2 - 1).sqrt()

    def _solve(
        self,
        y: Tensor,
        physics: Any,
        x_init: Tensor | Shape | None,
        seed: int | None,
        timesteps: Any,
        denoise_output: bool,
        get_trajectory: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Solve with ``"euler"`` or a solver object."""
        posterior = _Posterior(self, y, physics)
        euler = self.solver == "euler"
        t = (self if euler else self.solver).timesteps if timesteps is None else timesteps
        t = as_tensor(t).to(self.device, self.dtype)
        own_seed = _seed(seed, self.rng) if euler else 0
        if not euler:
            self.solver.rng_manual_seed(seed)
        if isinstance(x_init, Tensor):
            x = x_init.detach().to(self.device, self.dtype, copy=True)
        else:
            shape = tuple(x_init or _shape(posterior.y, posterior.operator))
            if euler:
                z = ops.randn(shape, seed=own_seed, stream=STREAM_INITIAL, dtype=self.dtype, device=self.device)
            else:
                z = torch.randn(shape, generator=self.solver.rng, dtype=self.dtype, device=self.device)
            x = z * posterior.sigma_t(t[0]) * posterior.scale_t(t[0])
        if euler:
            states = [x] if get_trajectory else None
            x = posterior.by_euler(x, t.tolist(), own_seed, self.verbose, states)
            trajectory = x if states is None else torch.stack(states)
        else:
            solution = self.solver.sample(
                posterior, x, y=y, physics=physics, timesteps=t, get_trajectory=get_trajectory, verbose=self.verbose
            )
            x, trajectory = solution.sample, solution.trajectory
        posterior.watch.report()
        unit, shift = self._range
        if denoise_output:
            if _is(self.solver, "AncestralSolver"):
                scale, sigma = posterior.scale_t(t[-1]), posterior.sigma_t(t[-1])
            else:  # the last step has already added this noise
                scale = posterior.scale_t(t[-2])
                sigma = posterior.diffusion(t[-2]) * (t[1] - t[0]).abs().sqrt() / scale
            if sigma > 0 and scale > 0:
                image = posterior.denoise(unit * x / scale + shift, unit * sigma)
                x = scale * (image.to(x.dtype) - shift) / unit
        output = unit * x + shift
        return (output, unit * trajectory + shift) if get_trajectory else output

    def _eta(self, t: Tensor, ratio: Tensor) -> Tensor:
        """The ``eta`` of DDIM for each step from level ``t``. ``ratio`` is ``sigma_s / sigma_t``."""
        if self.solver != "ancestral":
            return torch.full_like(t, self.solver == "ddpm")
        alpha = as_tensor([float(self.alpha(v) if callable(self.alpha) else self.alpha) for v in t]).double()
        if not ((alpha >= 0) & (alpha <= 1)).all():
            raise ValueError(f"alpha: expected values in [0, 1], got {alpha.min():g} to {alpha.max():g}")
        return ((1 - ratio ** (2 * alpha)) / (1 - ratio**2)).clamp(max=1.0).sqrt()


class _Posterior:
    """The reverse SDE of a `DPS`, with the drift, diffusion, schedule and score that the solvers of deepinv ask for."""

    def __init__(self, dps: DPS, y: Any, physics: Any):
        self._dps, self.device, self.dtype = dps, torch.device(dps.device), dps.dtype
        self.operator, self.y = _measured(y, physics, torch.float32)
        self.y = self.y.to(self.device, torch.float32, copy=True)
        self._sigma_y = _gaussian_scale(physics) if dps.guidance == "annealed" else 0.0
        self.watch, self._evaluations = Watch(), 0

    def _time(self, t: Any) -> Tensor:
        """The time as a tensor. A number stays on the host, so that nothing waits for the device."""
        return t.to(self.dtype) if isinstance(t, Tensor) else torch.tensor(t, dtype=self.dtype, device="cpu")

    def scale_t(self, t: Any) -> Tensor:
        return self._dps._level(self._time(t))[0]

    def sigma_t(self, t: Any) -> Tensor:
        return self._dps._level(self._time(t))[1]

    def alpha(self, t: Any) -> Any:
        alpha = self._dps.alpha
        return alpha(t) if callable(alpha) else alpha

    def _forward(self, t: Any) -> tuple[Any, Tensor]:
        """``f`` and ``g`` of the forward SDE ``dx = f x dt + g dw``."""
        t = self._time(t)
        if self._dps.schedule == "ve":
            return 0.0, math.sqrt(2.0 * math.log(80000.0)) * self.sigma_t(t)
        beta = 0.1 + 19.9 * t
        return -0.5 * beta, beta.sqrt()

    def diffusion(self, t: Any) -> Tensor:
        return self.alpha(t) ** 0.5 * self._forward(t)[1]

    def drift(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        f, g = self._forward(t)
        return (1 + self.alpha(t)) / 2 * g**2 * self.score(x, t) - f * x

    def discretize(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.drift(x, t), self.diffusion(t)

    def denoise(self, image: Tensor, sigma: Tensor) -> Tensor:
        return call(self._dps.denoiser, image.float(), sigma.to(self.device, torch.float32))

    def score(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        """``grad log p_t(x | y)``, as DPS approximates it."""
        scale, sigma = self.scale_t(t), self.sigma_t(t)
        unit, shift = self._dps._range
        with torch.enable_grad():
            image = (unit * x.detach() / scale + shift).requires_grad_()
            x0_hat = self.denoise(image, unit * sigma).clamp(-1.0, 1.0)
            norm = torch.linalg.vector_norm((self.operator(x0_hat) - self.y).flatten(1), dim=1)
            if self._dps.guidance == "annealed":
                norm = norm**2 / (2.0 * (self._sigma_y**2 + (unit * sigma) ** 2))
            (gradient,) = torch.autograd.grad(self._dps.weight * norm.sum(), image)
        self.watch.finite(self._evaluations, "denoiser", x0_hat)
        self.watch.finite(self._evaluations, "gradient of the denoiser or the physics", gradient)
        self._evaluations += 1
        denoised = (x0_hat.detach().to(self.dtype) - shift) / unit
        weight = 1.0 / (scale * sigma) ** 2
        return (scale * weight) * denoised - weight * x - (unit / scale) * gradient

    def by_euler(self, x: Tensor, times: list[float], seed: int, verbose: bool, states: list[Tensor] | None) -> Tensor:
        """``x`` at the last time, by Euler-Maruyama steps. ``states``, unless None, receives all states."""
        alpha = min(float(self.alpha(time)) for time in times[:-1])
        if not alpha >= 0:
            raise ValueError(f"alpha: expected values >= 0, got {alpha:g}")
        for i in _progress_bar(range(len(times) - 1), len(times) - 1, 0, verbose):
            step = abs(times[i + 1] - times[i])
            drift, diffusion = self.discretize(x, times[i])
            x = torch.add(x, drift, alpha=step)
            if diffusion > 0:
                z = ops.randn(x.shape, seed=seed, step=i, dtype=x.dtype, device=x.device)
                x.add_(z, alpha=step**0.5 * float(diffusion))
            if states is not None:
                states.append(x)
        return x


@dataclass(frozen=True)
class _ProximalPnP(PnP):
    """PnP whose data step is the proximal operator of a deepinv data fidelity, with the step size ``1 / rho``."""

    data_fidelity: Any = None
    physics: Any = None

    @torch.no_grad()
    def data_step(self, run: Run, x0_hat: Tensor, i: int) -> Tensor:
        y, gamma = self.likelihood.rows_of_y(run.rows), 1.0 / entry(self.rho, i)
        forward = self.likelihood.operator
        if isinstance(forward, _Stack):
            y = forward.parts(y)
        return self.data_fidelity.prox(x0_hat, y, self.physics, gamma=gamma)


class DiffPIR(nn.Module):
    """DiffPIR with the arguments of ``deepinv.sampling.DiffPIR``.

    Given the same noise, results are those of deepinv, to rounding. deepinv evaluates the model once more at the end
    and does not use the result; that evaluation is left out.

    Args:
        model: A denoiser ``f(x, sigma)`` for images in [0, 1].
        data_fidelity: A data fidelity of deepinv with a ``prox``.
        sigma: The standard deviation of the measurement's noise where the physics does not say it, and the noise that
            ``A_adjoint(y)`` is taken to have. A number >= 0.
        max_iter: How many of the 1000 levels of deepinv to visit, an integer in ``[2, 500]``.
        zeta: How much of the noise of a step is fresh, a number in [0, 1].
        lambda_: The weight of the prior against the data, a number > 0.
        verbose: Whether to show a progress bar.
        device: Where the run is.

    Raises:
        TypeError: ``model`` is not callable, ``data_fidelity`` has no ``prox``, or an argument is not a number or a
            bool where one is expected.
        ValueError: An argument is out of range.

    Source:
        Zhu et al. 2023 (DiffPIR).
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        data_fidelity: Any,
        sigma: float = 0.05,
        max_iter: int = 100,
        zeta: float = 0.1,
        lambda_: float = 7.0,
        verbose: bool = False,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        function("model", model, "a callable f(x, sigma)")
        if not callable(getattr(data_fidelity, "prox", None)):
            raise TypeError(f"data_fidelity: expected one of deepinv's that has a prox, got {got(data_fidelity)}")
        max_iter, sigma = integer("max_iter", max_iter, 2, 501), number("sigma", sigma, low=0.0)
        zeta, lambda_ = number("zeta", zeta, low=0.0, high=1.0), number("lambda_", lambda_, above=0.0)
        verbose, device = flag("verbose", verbose), torch_device("device", device)
        self.model, self.data_fidelity = model, data_fidelity
        self.sigma, self.max_iter, self.zeta, self.lambda_ = sigma, max_iter, zeta, lambda_
        self.verbose, self.device = verbose, device

    def forward(self, y: Tensor, physics: Any, seed: int | None = None, x_init: Tensor | None = None) -> Tensor:
        """Draws a sample for the measurement ``y``.

        Args:
            y: The measurement ``[B, *measurement]``, or a list of them for a ``StackedPhysics``.
            physics: A ``deepinv.physics`` object. The ``sigma`` of its noise model, where there is one, counts instead
                of the argument.
            seed: The seed of the noise, an integer in ``[0, 2^64)``. None draws one from torch's generator.
            x_init: An image ``[B, *event]`` to start from. None is ``A_adjoint(y)``.

        Returns:
            The state at the lowest level, ``[B, *event]``, as in deepinv: its noise has a standard deviation of 0.005.

        Raises:
            TypeError: ``y`` or ``x_init`` is not a tensor.
            ValueError: A shape is wrong, or the noise of the measurement or ``sigma`` is out of range.
        """
        y = _checked(y, physics).detach()
        x_init = None if x_init is None else _start(x_init, shape_too=False)
        forward, measured = _measured(y, physics)
        noise = _noise_of(physics)
        sigma_y = _number(noise, "sigma") if hasattr(noise, "sigma") else self.sigma
        if not sigma_y > 0:
            raise ValueError(f"sigma: expected a number > 0 as the argument or in the physics, got {sigma_y}")
        table = schedules.vp_linear(1000)
        index = torch.linspace(0, 1000**2, self.max_iter, device="cpu").sqrt().int()
        index[-1] = 999
        times = 999 - index.numpy()
        ratio = table.sigma(times) / table.alpha(times)  # for images in [-1, 1]; half of it for images in [0, 1]
        seed = _seed(seed)
        with package_modes(y.device):  # an autocast would set the dtype of the whole run
            x = physics.A_adjoint(y) if x_init is None else x_init.detach()
        z = ops.randn(x.shape, seed=seed, stream=STREAM_INITIAL, dtype=x.dtype, device=x.device)
        if not 2.0 * self.sigma < ratio[0]:
            raise ValueError(f"sigma: expected a number below {0.5 * ratio[0]:g}, the first level, got {self.sigma}")
        x = x + 0.5 * math.sqrt(ratio[0] ** 2 - 4.0 * self.sigma**2) * z
        x = sample(
            prior(self.model, _Sigmas((0.5 * ratio).tolist()), clip=(0.0, 1.0)),
            tuple(x.shape),
            guidance=_ProximalPnP(
                likelihoods.Gaussian(measured, forward, sigma_y),
                rho=(2.0 * self.lambda_ * sigma_y**2 / ratio[:-1] ** 2).tolist(),
                zeta=self.zeta,
                data_fidelity=self.data_fidelity,
                physics=physics,
            ),
            steps=0.5 * ratio,
            seed=seed,
            x_T=x,
            dtype=x.dtype,
            device=self.device,
            progress=self.verbose,
        ).x
        alpha = table.alpha(0)
        return alpha * (x - 0.5) + 0.5
