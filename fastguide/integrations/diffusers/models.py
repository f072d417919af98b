"""The models, schedulers and pipelines of diffusers as priors of `fastguide.sample`.

    prior, encode, decode = from_pipeline(pipe, prompt="a photograph of a lake", guidance_scale=7.5)
    z = fastguide.sample(prior, (1, 4, 64, 64), guidance=LatentPnP(likelihood, decode)).x

Nothing is downloaded, and no argument is changed.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler  # models and pipelines take seconds: imported in functions
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from ...arguments import got, integer, number, real_array
from ...arguments import tensor as check_tensor
from ...denoiser import Conditional, Denoiser, GuidanceScale, Net, checked_scale
from ...foreign import as_tensor
from ...schedules import Schedule, _Flow, _Table

__all__ = ["codec", "denoiser", "from_pipeline"]

_PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}

# The pipelines of these models rescale the scheduler's timestep, or use another output.
_OTHER_TIME = (
    "AuraFlow", "Bria", "Chroma", "Cosmos", "Flux", "GlmImage", "HiDream", "Ideogram", "Krea", "LongCat", "Lumina",
    "NucleusMoE", "Ovis", "PRX", "QwenImage", "ZImage",
)  # fmt: skip

Codec = Callable[[Tensor], Tensor]


def denoiser(
    model: Any,
    scheduler: Any,
    *,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    negative_class_labels: int | Sequence[int] | Tensor | None = None,
    guidance_scale: GuidanceScale = 1.0,
    vae_scale_factor: int | None = None,
    **model_kwargs: Any,
) -> Denoiser:
    """A diffusers model with the noise levels and the prediction type of its scheduler.

    - ``model``: a U-Net or transformer whose ``forward(sample, timestep=..., ...)`` takes the scheduler's timesteps. It
      must be in eval mode and on its device. States of another dtype are cast to the model's dtype and back. If the
      output has twice the channels (a learned variance, as in DiT), the first half is used.
    - ``scheduler``: one with a table ``alphas_cumprod`` (DDIM, DDPM, PNDM, Euler, Heun, LMS, DPM-Solver, UniPC and
      others), or FlowMatchEulerDiscreteScheduler (``t`` is its sigma). With a table the state is that of DDIM:
      ``alpha`` times that of Euler. Without a ``spacing``, ``fastguide.sample(steps=n)`` visits the levels that the
      scheduler sets for ``n`` steps (with a table, the nearest entries), and then the clean level. To clip, use
      ``fastguide.sample(clip=)``.
    - ``prompt_embeds`` ``[B, tokens, width]`` (the model's ``encoder_hidden_states``), ``class_labels``, and other
      arguments of the model in ``model_kwargs``: tensors with one row for each observation, or one row for all.
    - ``guidance_scale``: a number, or another form that `fastguide.Denoiser` takes. Unless it is 1, classifier-free
      guidance evaluates the model a second time, with ``negative_prompt_embeds``, ``negative_class_labels`` (None: the
      null class of a DiT) and, for each ``name`` in ``model_kwargs`` that holds tensors, ``negative_name`` in place of
      the others.
    - ``vae_scale_factor``: for SDXL's U-Net only: how many times larger the image is than the state. With it,
      ``added_cond_kwargs`` need no ``time_ids``: these are made for a whole image of that size, not cropped.
    """
    if not all(hasattr(model, attribute) for attribute in ("config", "device", "dtype", "training")):
        raise TypeError(f"model: expected a diffusers model, got {type(model).__name__}")
    name = _class_name(model)
    if name.startswith(_OTHER_TIME) or model.config.get("timestep_scale", 1) != 1:
        raise TypeError(
            f"model: expected one that takes its scheduler's timesteps, got {name}, whose pipeline rescales them; "
            "wrap it in a net(x, t) of fastguide.Denoiser"
        )
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; see model.eval()")
    if model.config.get("time_cond_proj_dim") is not None and "timestep_cond" not in model_kwargs:
        raise ValueError(f"timestep_cond: expected an embedding of the guidance, which {name} is given, got none")
    if guidance_scale is None:
        raise TypeError("guidance_scale: expected a number, a table, a function of the time or a tensor [B], got None")
    guidance_scale = checked_scale(guidance_scale)
    guided = not _is_one(guidance_scale)
    if negative_class_labels is None and class_labels is not None and guided:
        negative_class_labels = model.config.get("num_embeds_ada_norm")
    arguments = model_kwargs | {
        "encoder_hidden_states": prompt_embeds,
        "negative_encoder_hidden_states": negative_prompt_embeds,
        "class_labels": _labels("class_labels", class_labels),
        "negative_class_labels": _labels("negative_class_labels", negative_class_labels),
    }
    _check_names(model, arguments)
    given = {name: _moved(name, value, model) for name, value in arguments.items() if value is not None}
    conditions = {name: value for name, value in given.items() if not name.startswith("negative_")}
    negative = {name.removeprefix("negative_"): given[name] for name in given.keys() - conditions.keys()}
    schedule, prediction, time_scale = _schedule(scheduler)
    if vae_scale_factor is not None:
        vae_scale_factor = integer("vae_scale_factor", vae_scale_factor, 1)
        if model.config.get("addition_embed_type") != "text_time":
            raise ValueError(
                f"vae_scale_factor: expected None with {name}, which takes no sizes, got {vae_scale_factor}"
            )
    network = _Network(model, time_scale, vae_scale_factor)
    net: Net = Conditional(network, **conditions) if conditions else network
    if not guided:
        if negative:
            raise ValueError(f"guidance_scale: expected other than 1 with negatives of {sorted(negative)}, got 1")
        return Denoiser(net, schedule, prediction)
    expected = {name for name, value in conditions.items() if any(isinstance(v, Tensor) for v in tree_leaves(value))}
    if not expected or negative.keys() != expected:
        raise ValueError(
            f"guidance_scale: expected 1, or for every condition its negative, got {got(guidance_scale)} with "
            f"conditions {sorted(expected)} and negatives {sorted(negative)}"
        )
    unconditional = Conditional(network, **conditions | negative)
    return Denoiser(net, schedule, prediction, unconditional=unconditional, guidance_scale=guidance_scale)


def _check_names(model: Any, arguments: dict[str, Any]) -> None:
    """Raise for an argument that the model's ``forward`` does not have, with the name that the caller used."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name, value in arguments.items():
        taken = name.removeprefix("negative_")
        if value is not None and taken not in parameters:
            known = name.replace("encoder_hidden_states", "prompt_embeds")
            raise ValueError(f"{known}: expected None with {_class_name(model)}, whose forward takes no {taken}")


def _without_needless_graph(function: Codec) -> Codec:
    """``function`` without the autograd graph that the autoencoder's own parameters would keep."""

    def call(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and (x.requires_grad or _is_followed())):
            return function(x)

    return call


def _is_followed() -> bool:
    """Whether a function transform or a forward-mode derivative is active. ``requires_grad`` does not show these."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def codec(vae: Any) -> tuple[Codec, Codec]:
    """``encode`` and ``decode`` of an autoencoder. ``encode`` turns images ``[n, C, H, W]`` in ``[-1, 1]`` into the
    latents that a pipeline's model gets. ``decode`` turns latents into images, and does not clamp them. Both return the
    dtype of their argument. They keep an autograd graph only if their argument requires a gradient.

    ``vae``: AutoencoderKL (encodes to the mode of the posterior), AutoencoderTiny, AutoencoderDC or VQModel (decodes
    the nearest entries of its codebook, with a straight-through gradient). It must be on its device and in the dtype to
    compute in. SDXL's autoencoder overflows in float16.
    """
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

    kinds: Any = (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel)
    if not isinstance(vae, kinds):
        expected = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"vae: expected one of {expected}, got {type(vae).__name__}")
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        shift, std = (
            torch.tensor(vae.config[name], device=vae.device).reshape(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        scale = scale / std

    @_without_needless_graph
    def encode(images: Tensor) -> Tensor:
        encoded = vae.encode(images.to(vae.dtype))
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return ((z - shift) * scale).to(images.dtype)

    @_without_needless_graph
    def decode(latents: Tensor) -> Tensor:
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.to(latents.dtype)

    return encode, decode


def from_pipeline(
    pipe: Any,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    guidance_scale: GuidanceScale = 1.0,
    **conditions: Any,
) -> tuple[Denoiser, Codec, Codec]:
    """``(denoiser, encode, decode)`` of a pipeline's U-Net or transformer, scheduler and autoencoder. Without an
    autoencoder the state is the image, and `encode` and `decode` return what they are given.

    - ``pipe``: a pipeline, or the local folder of one (`DiffusionPipeline.save_pretrained`).
    - ``prompt``, ``negative_prompt``: one for each observation, or one for all. The pipeline's own ``encode_prompt``
      embeds them. This works for Stable Diffusion 1, 2, XL (for a whole image, not cropped) and 3. For other pipelines,
      pass the embeddings as ``conditions``.
    - ``guidance_scale``, ``conditions``: see `denoiser`. As in a pipeline, a scale below 1 counts as 1: no guidance.

    A pipeline with a ControlNet or an adapter raises, because these are not supported.
    """
    if isinstance(pipe, str | os.PathLike):
        if not os.path.isdir(pipe):
            raise ValueError(
                f"pipe: expected a pipeline or a local folder, got {os.fspath(pipe)!r}, which is no folder"
            )
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(pipe, local_files_only=True)
    if not hasattr(pipe, "components"):
        raise TypeError(f"pipe: expected a diffusers pipeline or a local folder, got {type(pipe).__name__}")
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    model = parts.get("unet", parts.get("transformer"))
    if model is None or "scheduler" not in parts:
        raise TypeError(f"pipe: expected one with a U-Net or transformer, and a scheduler, got {sorted(parts)}")
    others = sorted(name for name in parts if "controlnet" in name or "adapter" in name)
    if others or hasattr(pipe, "set_pag_applied_layers"):
        raise TypeError(f"pipe: expected one of a model alone, got {type(pipe).__name__} with {others or 'PAG'}")
    guidance_scale = _at_least_one(guidance_scale)
    guided = not _is_one(guidance_scale)
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts) or value == []:
            raise TypeError(f"{name}: expected a string, a list of them or None, got {got(value)}")
    if negative_prompt is not None and not (guided and prompt is not None):
        raise ValueError(f"negative_prompt: expected None without a prompt and guidance, got {negative_prompt!r}")
    embeds = {} if prompt is None else _embed(pipe, model, prompt, negative_prompt, guided)
    vae = parts.get("vae", parts.get("vqvae"))
    encode, decode = (_unchanged, _unchanged) if vae is None else codec(vae)
    return denoiser(model, parts["scheduler"], guidance_scale=guidance_scale, **embeds, **conditions), encode, decode


def _is_one(scale: Any) -> bool:
    """Whether a guidance scale from `checked_scale` is the number 1, which means no guidance."""
    return isinstance(scale, float) and scale == 1.0


def _at_least_one(scale: Any) -> Any:
    """A guidance scale in which each value below 1 becomes 1."""
    scale = checked_scale(scale)
    if isinstance(scale, float):
        return max(scale, 1.0)
    if isinstance(scale, tuple):
        return tuple(max(value, 1.0) for value in scale)
    if isinstance(scale, Tensor):
        return scale.clamp(min=1.0)
    return scale if scale is None else lambda t: max(number("guidance_scale", scale(t)), 1.0)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _embed(pipe: Any, model: Any, prompt: Any, negative_prompt: Any, guided: bool) -> dict[str, Any]:
    """The arguments of `denoiser` from the pipeline's ``encode_prompt``. The kind of model says what its values are."""
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"prompt: expected None with {type(pipe).__name__}, which has no encode_prompt, got {prompt!r}"
        )
    name = _class_name(model)
    kind = model.config.get("addition_embed_type") if name == "UNet2DConditionModel" else name
    pooling = kind in ("text_time", "SD3Transformer2DModel")
    if isinstance(prompt, list) and isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * len(prompt)
    elif isinstance(prompt, str) and isinstance(negative_prompt, list):
        prompt = [prompt] * len(negative_prompt)
    embeds: tuple[Any, ...] = ()
    if pooling or kind in (None, "text"):
        others = {"prompt_2": None, "prompt_3": None} if kind == "SD3Transformer2DModel" else {}
        with torch.no_grad():
            embeds = pipe.encode_prompt(
                prompt=prompt,
                device=model.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=negative_prompt,
                **others,
            )
    if len(embeds) != (4 if pooling else 2):
        raise ValueError(
            f"prompt: expected None with {type(pipe).__name__} of {name}, which is no Stable Diffusion: call its "
            "encode_prompt, and pass the values on under the names of the model's arguments"
        )
    arguments: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    for sign, pooled in zip(("", "negative_"), embeds[2:], strict=False):
        if pooled is not None and kind == "text_time":
            arguments[sign + "added_cond_kwargs"] = {"text_embeds": pooled}
        elif pooled is not None:
            arguments[sign + "pooled_projections"] = pooled
    if kind == "text_time":
        arguments["vae_scale_factor"] = pipe.vae_scale_factor
    return arguments


def _class_name(model: Any) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__  # the model inside torch.compile's wrapper


# --- networks -----------------------------------------------------------------------------------------------


class _Network:
    """``net(x, t, **conditions)`` of a model."""

    def __init__(self, model: Any, time_scale: int, vae_scale_factor: int | None):
        self.model, self.time_scale, self.vae_scale_factor = model, time_scale, vae_scale_factor

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if self.vae_scale_factor is not None:
            height, width = (self.vae_scale_factor * size for size in x.shape[-2:])
            values = height, width, 0, 0, height, width  # original size, crop, target size
            columns = [torch.full((len(x), 1), v, device=x.device, dtype=self.model.dtype) for v in values]  # no wait
            added = {"time_ids": torch.cat(columns, dim=1)} | conditions.get("added_cond_kwargs", {})
            conditions = conditions | {"added_cond_kwargs": added}
        # By name: in some models the second argument is the embeddings.
        (output, *_) = self.model(x.to(self.model.dtype), timestep=t * self.time_scale, return_dict=False, **conditions)
        if output.shape[1] == 2 * x.shape[1]:  # a learned variance follows
            output = output[:, : x.shape[1]]
        return output


def _moved(name: str, value: Any, model: Any) -> Any:
    """``value`` with its tensors on the model's device and, if floating, in the model's dtype."""

    def moved(tensor: Tensor) -> Tensor:
        check_tensor(name.replace("encoder_hidden_states", "prompt_embeds"), tensor)
        return tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)

    return tree_map_only(Tensor, moved, value)


def _labels(name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_tensor(name, value)
    else:
        real_array(name, value, "a label, several of them, or a tensor")
    return as_tensor(value).reshape(-1)


# --- schedules ----------------------------------------------------------------------------------------------


class _SchedulerTable(_Table):
    """The levels of a scheduler with a table. The default spacing is the scheduler's own."""

    default_spacing = "scheduler"

    def __init__(self, scheduler: Any):
        super().__init__(scheduler.alphas_cumprod, type(scheduler).__name__)
        if scheduler.config.get("skip_prk_steps") is False:  # PNDM's first steps visit more levels
            scheduler = type(scheduler).from_config(scheduler.config, skip_prk_steps=True)
        self._scheduler = copy.copy(scheduler)

    def _times(self, steps: int, spacing: str) -> np.ndarray:
        if spacing != self.default_spacing:
            return super()._times(steps, spacing)
        scheduler = copy.copy(self._scheduler)  # threads share this one
        scheduler.set_timesteps(steps)
        stepped = scheduler.timesteps[:: scheduler.order]  # without the stages of second-order steps
        times = np.unique(stepped.numpy())[::-1]  # PNDM repeats some
        if times.size > self.alphas_cumprod.size:
            raise ValueError(f"steps: expected at most {self.alphas_cumprod.size} for {self}, got {steps}")
        return self._distinct(times)


class _SchedulerFlow(_Flow):
    """The levels of a flow scheduler: sigmas in ``[0, 1]``. The default spacing is the scheduler's own, with its
    shift."""

    default_spacing = "scheduler"

    def __init__(self, scheduler: Any):
        self._scheduler = copy.copy(scheduler)

    def _times(self, steps: int, spacing: str) -> np.ndarray:
        if spacing != self.default_spacing:
            return super()._times(steps, spacing)
        if self._scheduler.config.use_dynamic_shifting:
            raise ValueError(
                "steps: expected the times themselves, or a spacing, since the scheduler's own (use_dynamic_shifting) "
                f"depends on the resolution, got {steps}"
            )
        scheduler = copy.copy(self._scheduler)  # threads share this one
        scheduler.set_timesteps(steps)
        return scheduler.sigmas[:-1].double().numpy()


def _schedule(scheduler: Any) -> tuple[Schedule, str, int]:
    """The schedule, the prediction type of its networks, and the ratio of their timestep to the schedule's time."""
    config: Any = getattr(scheduler, "config", {})
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not config.invert_sigmas:
        return _SchedulerFlow(scheduler), "flow", config.num_train_timesteps
    prediction = _PREDICTIONS.get(config.get("prediction_type"))
    other_levels = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if prediction is None or other_levels or not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(
            f"scheduler: expected one with a table alphas_cumprod that predicts one of {tuple(_PREDICTIONS)} at its "
            "timesteps, or a FlowMatchEulerDiscreteScheduler without invert_sigmas, got "
            f"{type(scheduler).__name__} {dict(config)}"
        )
    return _SchedulerTable(scheduler), prediction, 1
