"""Models, schedulers and pipelines of diffusers as priors: plain sampling equals the pipeline, and guidance works."""

import copy
import math
import socket

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import (  # noqa: E402
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers  # noqa: E402
from test_no_waiting import fake_tensors, watch  # noqa: E402

import fastguide as fg  # noqa: E402
from fastguide import digits  # noqa: E402
from fastguide.digits import train  # noqa: E402
from fastguide.integrations.diffusers import accelerate, codec, denoiser, from_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from diffusers with numpy

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2


def made(kind, seed=0, **config):
    """A model with random weights. No parameter is all zeros, and the output is of order one."""
    torch.manual_seed(seed)
    model = kind(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0.0, 0.05)
    return model


def unet(channels=2, **config):
    return made(
        UNet2DModel, sample_size=8, in_channels=channels, out_channels=channels, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, **config,
    )  # fmt: skip


def conditional_unet(**config):
    return made(
        UNet2DConditionModel, sample_size=8, in_channels=2, out_channels=2, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, cross_attention_dim=12, **config,
    )  # fmt: skip


def sized_unet():
    """As SDXL's."""
    return conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=3 + 6 * 4
    )


def autoencoder(kind=AutoencoderKL, **config):
    return made(
        kind, in_channels=1, out_channels=1, down_block_types=DOWN, up_block_types=UP, block_out_channels=(8, 8),
        latent_channels=2, norm_num_groups=4, **config,
    )  # fmt: skip


def dit():
    return made(
        DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


def sd3():
    return made(
        SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=2, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        out_channels=2, pos_embed_max_size=8,
    )  # fmt: skip


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def scheduler_loop(scheduler, net, x, steps, **options):
    """Sample with ``net(x, t)`` as a pipeline of diffusers does."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        output = net(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        if options:
            options["variance_noise"] = fg.ops.randn(x.shape, seed=7, step=i, dtype=x.dtype)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def assert_same(got, expected):
    """Equal up to rounding: the schedulers compute their coefficients in float32."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_plain_sampling_is_ddims(prediction_type, eta, spacing):
    model = unet().double()
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing=spacing)
    x_T = normals(3, 2, 8, 8, dtype=torch.float64)
    expected = scheduler_loop(scheduler, lambda x, t: model(x, t).sample, x_T, 10, eta=eta)
    got = fg.sample(denoiser(model, scheduler), x_T.shape, steps=10, eta=eta, seed=7, x_T=x_T, dtype=torch.float64)
    assert_same(got.x, expected)


def test_a_table_that_ends_in_pure_noise():
    model = unet().double()
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    x_T = normals(2, 2, 8, 8, dtype=torch.float64)
    prior = denoiser(model, scheduler)
    assert prior.schedule.levels(5)[0].alpha == 0.0
    expected = scheduler_loop(scheduler, lambda x, t: model(x, t).sample, x_T, 5)
    assert_same(fg.sample(prior, x_T.shape, steps=5, eta=0.0, x_T=x_T, dtype=torch.float64).x, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_eulers_states_are_larger_by_alpha(prediction_type):
    model = unet().double()
    scheduler = EulerDiscreteScheduler(prediction_type=prediction_type, timestep_spacing="trailing")
    x_T = normals(2, 2, 8, 8, dtype=torch.float64)
    prior = denoiser(model, scheduler)
    top = prior.schedule.levels(8)[0]
    expected = scheduler_loop(scheduler, lambda x, t: model(x, t).sample, x_T / top.alpha, 8)
    assert_same(fg.sample(prior, x_T.shape, steps=8, eta=0.0, x_T=x_T, dtype=torch.float64).x, expected)


def test_pixel_pipeline_with_clipping(tmp_path, monkeypatch):
    pipe = DDIMPipeline(unet(channels=3), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        batch_size=2, num_inference_steps=10, use_clipped_model_output=True, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("the network was asked"))
    prior, encode, decode = from_pipeline(tmp_path)
    x_T = normals(2, 3, 8, 8)
    x = fg.sample(prior, x_T.shape, steps=10, eta=0.0, clip=1.0, x_T=x_T).x
    assert encode(x) is x and decode(x) is x  # the state is the image
    np.testing.assert_allclose(_images(x), expected, atol=1e-4)


def _images(x):
    """Images in the form that pipelines return."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_dit_pipeline_and_its_null_class(tmp_path):
    pipe = DiTPipeline(dit(), autoencoder(sample_size=16), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [207, 207], guidance_scale=4.0, num_inference_steps=6, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    pipe.save_pretrained(tmp_path)
    prior, _, decode = from_pipeline(str(tmp_path), class_labels=207, guidance_scale=4.0)
    x_T = normals(2, 2, 8, 8)
    with torch.no_grad():
        images = decode(fg.sample(prior, x_T.shape, steps=6, eta=0.0, x_T=x_T).x)
    np.testing.assert_allclose(_images(images), expected, atol=1e-4)
    plain = from_pipeline(pipe, class_labels=207)[0]
    level = prior.schedule.level(500)
    assert (plain(x_T, level) - prior(x_T, level)).abs().max() > 0.01  # guidance has an effect here


def test_unconditional_latent_pipeline(tmp_path):
    pipe = LDMPipeline(autoencoder(VQModel, num_vq_embeddings=16), unet(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(2, generator=torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    pipe.save_pretrained(tmp_path)
    prior, _, decode = from_pipeline(tmp_path)
    x_T = normals(2, 2, 8, 8)
    with torch.no_grad():
        images = decode(fg.sample(prior, x_T.shape, steps=6, eta=0.0, x_T=x_T).x)
    np.testing.assert_allclose(_images(images), expected, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_prompt_embeddings_and_guidance(guidance_scale):
    model = conditional_unet().double()
    scheduler = DDIMScheduler(clip_sample=False)
    embeds, negative = (normals(1, tokens, 12, seed=tokens, dtype=torch.float64) for tokens in (5, 3))
    x_T = normals(3, 2, 8, 8, dtype=torch.float64)

    def net(x, t):
        outputs = (model(x, t, e.expand(3, -1, -1)).sample for e in (negative, embeds))
        return torch.lerp(*outputs, guidance_scale)

    expected = scheduler_loop(scheduler, net, x_T, 6)
    conditions = dict(prompt_embeds=embeds, cross_attention_kwargs={})  # needs no negative, as it holds no tensor
    if guidance_scale != 1:
        conditions |= dict(negative_prompt_embeds=negative, guidance_scale=guidance_scale)
    prior = denoiser(model, scheduler, **conditions)
    got = [
        fg.sample(prior, x_T.shape, steps=6, eta=0.0, x_T=x_T, dtype=torch.float64, chunk_size=n).x for n in (None, 1)
    ]
    assert_same(got[0], expected)
    assert_same(got[1], expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_transformer(shift, guidance_scale):
    model = sd3().double()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    embeds, negative = (dict(e=normals(1, 4, 12, seed=s).double(), p=normals(1, 6, seed=s).double()) for s in (1, 2))
    x_T = normals(2, 2, 8, 8, dtype=torch.float64)

    def net(x, t):
        outputs = (
            model(x, c["e"].expand(2, -1, -1), c["p"].expand(2, -1), t.expand(2)).sample for c in (negative, embeds)
        )
        return torch.lerp(*outputs, guidance_scale)

    expected = scheduler_loop(scheduler, net, x_T, 6)
    conditions = dict(prompt_embeds=embeds["e"], pooled_projections=embeds["p"])
    if guidance_scale != 1:
        conditions |= dict(negative_prompt_embeds=negative["e"], negative_pooled_projections=negative["p"])
    prior = denoiser(model, scheduler, guidance_scale=guidance_scale, **conditions)
    got = fg.sample(prior, x_T.shape, steps=6, eta=0.0, x_T=x_T, dtype=torch.float64)
    assert_same(got.x, expected)


def test_arguments_within_a_dictionary():
    """As SDXL's."""
    model = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30
    )
    embeds, added = normals(1, 5, 12), dict(text_embeds=normals(1, 6), time_ids=torch.tensor([[8, 8, 0, 0, 8, 8]]))
    prior = denoiser(model, DDIMScheduler(), prompt_embeds=embeds, added_cond_kwargs=added)
    x = normals(2, 2, 8, 8)
    both = {name: torch.cat([part, part]) for name, part in added.items()}
    expected = model(x, 300, torch.cat([embeds, embeds]), added_cond_kwargs=both).sample
    torch.testing.assert_close(prior(x, prior.schedule.level(300)), expected)


@pytest.mark.parametrize(
    "make, conditions",
    [
        (unet, {}),
        (conditional_unet, {"prompt_embeds": normals(1, 5, 12)}),
        (
            sized_unet,
            {
                "prompt_embeds": normals(1, 5, 12),
                "added_cond_kwargs": {"text_embeds": normals(1, 3)},
                "vae_scale_factor": 2,
            },
        ),
        (dit, {"class_labels": 3, "guidance_scale": 2.0}),
        (sd3, {"prompt_embeds": normals(1, 4, 12), "pooled_projections": normals(1, 6)}),
    ],
)
def test_no_call_of_a_model_waits_for_the_device(make, conditions):
    """A CUDA graph needs this, also in the backward pass and the decoder."""
    scheduler = FlowMatchEulerDiscreteScheduler() if make is sd3 else DDIMScheduler()
    prior = denoiser(make().to("meta"), scheduler, **conditions)
    decode = codec(autoencoder().to("meta"))[1] if make is unet else torch.sin  # one decoder, after one of the models
    level = prior.schedule.levels(3)[1]
    with fake_tensors():
        x = torch.zeros(2, 2, 8, 8, device="meta", requires_grad=True)
        with watch():
            (gradient,) = torch.autograd.grad(decode(prior.x0_hat(x, level)).sum(), x)
    assert gradient.shape == x.shape


def test_class_labels_of_a_unet():
    model = unet(num_class_embeds=4)
    prior = denoiser(model, DDIMScheduler(), class_labels=1, negative_class_labels=3, guidance_scale=2.0)
    x = normals(2, 2, 8, 8)
    listed = denoiser(
        model, DDIMScheduler(), class_labels=[1, np.int64(1)], negative_class_labels=3, guidance_scale=2.0
    )
    assert torch.equal(listed(x, prior.schedule.level(300)), prior(x, prior.schedule.level(300)))
    one, three = (model(x, 300, torch.tensor([label, label])).sample for label in (1, 3))
    torch.testing.assert_close(prior(x, prior.schedule.level(300)), 2 * one - three)


# -------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("kind", [kind.name for kind in KarrasDiffusionSchedulers if kind.name != "EDMEulerScheduler"])
def test_levels_are_the_schedulers(kind):
    if kind == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' DPMSolverSDEScheduler needs torchsde")
    scheduler = getattr(diffusers, kind)(1000)
    schedule = denoiser(unet(), scheduler).schedule
    times = [level.t for level in schedule.levels(10)]
    scheduler.set_timesteps(10)
    expected = scheduler.timesteps.double()
    assert len(times) == 11 and times[-1] == -1
    assert abs(times[0] - expected[0]) <= 0.5 and abs(times[-2] - expected[-1]) <= 0.5
    assert all((t - expected).abs().min() <= 0.5 for t in times[:-1])
    assert schedule.level(300).alpha == float(scheduler.alphas_cumprod[300].double().sqrt())
    assert [level.t for level in schedule.levels(4, "uniform")] == [999, 666, 333, 0, -1]


def test_levels_of_a_flow():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = denoiser(unet(), scheduler).schedule
    levels = schedule.levels(4)
    scheduler.set_timesteps(4)
    assert np.array_equal([level.sigma for level in levels], scheduler.sigmas)
    assert levels[0] == (1.0, 0.0, 1.0) and 0.85 < levels[1].sigma < 0.87  # shifted up from about 2/3
    assert [level.t for level in schedule.levels(4, "uniform")] == [1.0, 0.75, 0.5, 0.25, 0.0]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="steps: expected the times themselves"):
        denoiser(unet(), scheduler).schedule.levels(4)


def test_the_scheduler_stays_as_it_is():
    scheduler = DDIMScheduler(clip_sample=False)
    before = scheduler.timesteps.clone()
    prior = denoiser(unet(), scheduler)
    prior.schedule.levels(7)
    assert scheduler.num_inference_steps is None and torch.equal(scheduler.timesteps, before)
    scheduler.set_timesteps(3)
    assert len(prior.schedule.levels(7)) == 8


def test_more_steps_than_levels():
    schedule = denoiser(unet(), EulerDiscreteScheduler(num_train_timesteps=10)).schedule
    assert [level.t for level in schedule.levels(10)] == [*range(9, -2, -1)]
    with pytest.raises(ValueError, match="steps: expected at most 10 "):
        schedule.levels(11)


# ---------------------------------------------------------------------------------------- components


def test_a_half_model_of_float32_states():
    model = unet().to(torch.bfloat16)
    prior = denoiser(model, DDIMScheduler())
    x = normals(2, 2, 8, 8)
    got = prior(x, prior.schedule.level(300))
    assert got.dtype == torch.float32
    assert torch.equal(got, model(x.bfloat16(), 300).sample.float())
    encode, decode = codec(autoencoder().to(torch.bfloat16))
    assert encode(normals(1, 1, 8, 8)).dtype == torch.float32 and decode(normals(1, 2, 4, 4)).dtype == torch.float32


def test_gradients_go_through_model_and_decoder():
    model, vae = unet().double(), autoencoder().double()
    prior, decode = denoiser(model, DDIMScheduler(prediction_type="sample")), codec(vae)[1]
    level, direction = prior.schedule.level(300), normals(1, 2, 8, 8, seed=1, dtype=torch.float64)

    def value(x):
        return decode(prior.x0_hat(x, level)).square().sum()

    x = normals(1, 2, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    with torch.no_grad():
        slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)


@torch.no_grad()
def test_latents_are_those_of_the_pipelines():
    images, z = normals(2, 1, 8, 8), normals(2, 2, 4, 4)
    vae = autoencoder(scaling_factor=0.5, shift_factor=0.3)  # as in Stable Diffusion 3
    encode, decode = codec(vae)
    torch.testing.assert_close(encode(images), (vae.encode(images).latent_dist.mean - 0.3) * 0.5)
    torch.testing.assert_close(decode(z), vae.decode(z / 0.5 + 0.3).sample)

    vae = autoencoder(scaling_factor=0.5, latents_mean=[1.0, -1.0], latents_std=[2.0, 3.0])  # as in some of SDXL
    encode, decode = codec(vae)
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in ([1.0, -1.0], [2.0, 3.0]))
    torch.testing.assert_close(encode(images), (vae.encode(images).latent_dist.mean - mean) * 0.5 / std)
    torch.testing.assert_close(decode(z), vae.decode(z * std / 0.5 + mean).sample)

    blocks = dict(
        in_channels=1, latent_channels=2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8)
    )
    tiny = made(
        AutoencoderTiny, out_channels=1, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=2.0,
        **blocks,
    )  # fmt: skip
    encode, decode = codec(tiny)
    torch.testing.assert_close(encode(images), 2 * tiny.encode(images).latents)
    torch.testing.assert_close(decode(z), tiny.decode(z / 2).sample)

    deep = made(
        AutoencoderDC, encoder_block_types="ResBlock", decoder_block_types="ResBlock", scaling_factor=2.0,
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), **blocks,
    )  # fmt: skip
    encode, decode = codec(deep)
    torch.testing.assert_close(encode(images), 2 * deep.encode(images).latent)
    torch.testing.assert_close(decode(z), deep.decode(z / 2).sample)


def test_a_codebook_has_a_straight_through_gradient():
    vae = autoencoder(VQModel, num_vq_embeddings=16, scaling_factor=0.5)
    encode, decode = codec(vae)
    images, z = normals(2, 1, 8, 8), normals(2, 2, 4, 4).requires_grad_()
    torch.testing.assert_close(encode(images), 0.5 * vae.encode(images).latents)
    (gradient,) = torch.autograd.grad(decode(z).sum(), z)
    entries = vae.quantize(z / 0.5)[0].detach().requires_grad_()
    (expected,) = torch.autograd.grad(vae.decoder(vae.post_quant_conv(entries)).sum(), entries)
    torch.testing.assert_close(gradient, expected / 0.5)


# -------------------------------------------------------------------------------------------- prompts


def tokenizer():
    transformers = pytest.importorskip("transformers", reason="transformers, which reads the prompts, is not installed")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=9)


def text_encoder(width, pooled=True):
    transformers = pytest.importorskip("transformers", reason="transformers, which reads the prompts, is not installed")
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, projection_dim=3, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    torch.manual_seed(width)
    return kind(config).eval().requires_grad_(False)


def stable_diffusion(**config):
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, **config)
    parts = dict(tokenizer=tokenizer(), text_encoder=text_encoder(12, pooled=False), vae=autoencoder())
    return diffusers.StableDiffusionPipeline(
        unet=conditional_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip


def stable_diffusion_xl():
    return diffusers.StableDiffusionXLPipeline(
        unet=sized_unet(), scheduler=DDIMScheduler(clip_sample=False), vae=autoencoder(), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), text_encoder=text_encoder(4), text_encoder_2=text_encoder(8),
    )  # fmt: skip


def stable_diffusion_3():
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd3(), vae=autoencoder(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), text_encoder=text_encoder(4), text_encoder_2=text_encoder(8),
        tokenizer_3=None, text_encoder_3=None,
    )  # fmt: skip


@pytest.mark.parametrize("made_pipe", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3])
@pytest.mark.parametrize("guidance_scale, negative_prompt", [(1.0, None), (3.0, None), (3.0, "a bad lake")])
def test_prompts(made_pipe, guidance_scale, negative_prompt):
    """Plain sampling equals the pipeline, with the same noise."""
    pipe = made_pipe().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    x_T, prompts = normals(2, 2, 8, 4, dtype=torch.float64), ["a lake", "two men in a boat"]
    options = dict(prompt=prompts, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    both = options | {"negative_prompt": negative_prompt and [negative_prompt] * 2}
    expected = pipe(**both, num_inference_steps=4, latents=x_T, height=16, width=8, output_type="latent").images

    def draw(**changed):
        prior, _, _ = from_pipeline(pipe, **options | changed)
        return fg.sample(prior, x_T.shape, steps=4, eta=0.0, x_T=x_T, dtype=torch.float64).x

    assert_same(draw(), expected)
    other = draw(prompt="a lake", negative_prompt=negative_prompt and [negative_prompt] * 2)  # for both
    assert_same(other[0], expected[0])
    assert (other[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "made_pipe, scheduler, options",
    [
        (stable_diffusion, diffusers.DDPMScheduler, {}),
        (stable_diffusion, DDIMScheduler, {"eta": 0.7}),
        (stable_diffusion, diffusers.DPMSolverMultistepScheduler, {"timesteps": [900, 500, 200, 30]}),
        (stable_diffusion_xl, EulerDiscreteScheduler, {"sigmas": [9.0, 3.0, 0.5]}),
        (stable_diffusion_xl, diffusers.EulerAncestralDiscreteScheduler, {}),
        (stable_diffusion_3, FlowMatchEulerDiscreteScheduler, {}),
    ],
)
def test_an_accelerated_pipeline_draws_the_same(made_pipe, scheduler, options):
    pipe = made_pipe()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

    def draw():
        generator = torch.Generator().manual_seed(3)
        return pipe("a lake", num_inference_steps=6, generator=generator, output_type="np", **options).images

    expected = draw()
    accelerate(pipe)
    got = draw()
    assert type(pipe.scheduler) is not scheduler and not pipe.scheduler.parent_calls
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_no_guidance_as_in_a_pipeline():
    pipe, x = stable_diffusion(), normals(1, 2, 8, 8)
    got, expected = (from_pipeline(pipe, prompt="a lake", guidance_scale=scale)[0] for scale in (0.0, 1.0))
    assert torch.equal(got(x, got.schedule.level(300)), expected(x, expected.schedule.level(300)))


def guided_draw(scale, shape=(2, 2, 8, 8)):
    prior = from_pipeline(stable_diffusion(), prompt="a lake", negative_prompt="a boat", guidance_scale=scale)[0]
    return fg.sample(prior, shape, steps=3, eta=0.0, seed=1).x


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(3.0), np.array(3.0), [3.0, 3.0, 3.0], np.full(3, 3.0), lambda t: 3.0, torch.tensor([3.0, 3.0])],
)
def test_a_guidance_scale_of_every_form(scale):
    torch.testing.assert_close(guided_draw(scale), guided_draw(3.0), rtol=1e-5, atol=1e-6)


def test_a_guidance_scale_for_each_observation_or_step():
    both = guided_draw(torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(both[0], guided_draw(3.0)[0], rtol=1e-5, atol=1e-6)
    no_guidance = from_pipeline(stable_diffusion(), prompt="a lake")[0]
    expected = fg.sample(no_guidance, (2, 2, 8, 8), steps=3, eta=0.0, seed=1).x
    torch.testing.assert_close(both[1], expected[1], rtol=1e-5, atol=1e-6)  # a scale below 1 is no guidance
    for table in ([0.5, 0.0, 1.0], lambda t: 0.5):
        torch.testing.assert_close(guided_draw(table), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "scale",
    [math.nan, math.inf, "7.5", None, True, 10**400, [3.0, math.nan], torch.tensor([1.0, math.inf]), lambda t: "3"],
)
def test_guidance_scales_that_are_refused_by_name(scale):
    with pytest.raises((TypeError, ValueError), match=r"^guidance_scale: expected .*, got "):
        guided_draw(scale)
    if not callable(scale):
        with pytest.raises((TypeError, ValueError), match=r"^guidance_scale: expected .*, got "):
            denoiser(conditional_unet(), DDIMScheduler(), prompt_embeds=normals(1, 5, 12), guidance_scale=scale)


@pytest.mark.parametrize("prompt", [3, ["a lake", 3], [], b"a lake"])
def test_prompts_that_are_no_text_are_refused_by_name(prompt):
    with pytest.raises(TypeError, match=r"^prompt: expected a string, a list of them or None, got "):
        from_pipeline(stable_diffusion(), prompt=prompt)


def test_a_saved_pipeline_reads_prompts(tmp_path):
    pipe = stable_diffusion_xl()
    pipe.save_pretrained(tmp_path)
    x, options = normals(1, 2, 8, 8), dict(prompt="a lake", guidance_scale=3.0)
    got, expected = (from_pipeline(source, **options)[0] for source in (tmp_path, pipe))
    torch.testing.assert_close(got(x, got.schedule.level(300)), expected(x, expected.schedule.level(300)))


def test_prompts_that_are_not_read():
    class Prompted(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def encode_prompt(self, **kwargs):
            return normals(1, 5, 12), normals(1, 5), normals(1, 5, 12), normals(1, 5)  # with masks, as in PixArt

    for model in (conditional_unet(), dit()):
        with pytest.raises(ValueError, match="prompt: expected None with Prompted of "):
            from_pipeline(Prompted(model, DDIMScheduler()), prompt="cat")
    with pytest.raises(ValueError, match="negative_prompt: expected None"):
        from_pipeline(Prompted(conditional_unet(), DDIMScheduler()), prompt="cat", negative_prompt="a dog")
    with pytest.raises(ValueError, match="which has no encode_prompt"):
        from_pipeline(DDIMPipeline(unet(), DDIMScheduler()), prompt="cat")
    with pytest.raises(ValueError, match="vae_scale_factor: expected None with UNet2DConditionModel"):
        denoiser(conditional_unet(), DDIMScheduler(), vae_scale_factor=8)


@pytest.mark.parametrize("chunk_size", (None, 2, 3))
def test_prompts_for_each_observation(chunk_size):
    """With two observations, two particles and chunks of two samples, the two rows of embeddings would fit a chunk
    unchanged, and be wrong."""
    model, embeds, none = conditional_unet(), normals(2, 5, 12), normals(1, 5, 12, seed=1)

    def run(rows):
        prior = denoiser(
            model, DDIMScheduler(), prompt_embeds=embeds[rows], negative_prompt_embeds=none, guidance_scale=3.0
        )
        guidance = fg.FK(lambda z: -z.square().flatten(1).sum(1), particles=2)
        return fg.sample(prior, (2, 2, 8, 8), guidance=guidance, steps=3, chunk_size=chunk_size, seed=0).x

    both = run([0, 1])
    for n in range(2):
        torch.testing.assert_close(both[n], run([n, n])[n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[n], run([n])[n], rtol=1e-4, atol=1e-5)
    assert (run([0])[1] - both[1]).abs().max() > 1e-3


def test_conditions_of_a_wrong_number():
    model, embeds = conditional_unet(), normals(2, 5, 12)
    prior = denoiser(model, DDIMScheduler(), prompt_embeds=embeds)
    with pytest.raises(ValueError, match="shape: expected 2 observations, for which net has conditions, got 3"):
        fg.sample(prior, (3, 2, 8, 8), steps=2)
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected one row, .* got shape \[2, 5, 12\]"):
        denoiser(model, DDIMScheduler(), prompt_embeds=embeds, encoder_attention_mask=torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected one row, .* got shape \[\]"):
        denoiser(model, DDIMScheduler(), prompt_embeds=embeds.sum())


@pytest.mark.parametrize(
    "conditions, words",
    [
        (dict(guidance_scale=2.0), "for every condition its negative"),
        (dict(prompt_embeds=torch.zeros(1, 5, 12), guidance_scale=2.0), "for every condition its negative"),
        (
            dict(
                prompt_embeds=torch.zeros(1, 5, 12),
                negative_prompt_embeds=torch.zeros(1, 5, 12),
                encoder_attention_mask=torch.zeros(1, 5),
                guidance_scale=2.0,
            ),
            "for every condition its negative",
        ),
        (
            dict(prompt_embeds=torch.zeros(1, 5, 12), negative_prompt_embeds=torch.zeros(1, 5, 12)),
            "other than 1 with negatives of",
        ),
    ],
)
def test_halves_of_a_guidance_are_refused(conditions, words):
    with pytest.raises(ValueError, match=words):
        denoiser(conditional_unet(), DDIMScheduler(), **conditions)


@pytest.mark.parametrize(
    "name, taken",
    [
        ("prompt_embeds", "encoder_hidden_states"),
        ("negative_prompt_embeds", "encoder_hidden_states"),
        ("added_cond_kwargs", "added_cond_kwargs"),
        ("negative_pooled_projections", "pooled_projections"),
    ],
)
def test_a_condition_that_the_model_does_not_take_is_refused_when_it_is_built(name, taken):
    message = f"^{name}: expected None with UNet2DModel, whose forward takes no {taken}"
    with pytest.raises(ValueError, match=message):
        denoiser(unet(), DDIMScheduler(), **{name: torch.zeros(1, 5, 12)})
    assert denoiser(unet(num_class_embeds=3), DDIMScheduler(), class_labels=1)


def test_what_is_refused(tmp_path):
    model, scheduler = unet(), DDIMScheduler()
    with pytest.raises(TypeError, match="model: expected a diffusers model, got Linear"):
        denoiser(torch.nn.Linear(1, 1), scheduler)
    with pytest.raises(ValueError, match="model: expected eval mode"):
        denoiser(copy.deepcopy(model).train(), scheduler)
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=4,
        pooled_projection_dim=4, in_channels=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    for rescaled in (flux, torch.compile(flux)):
        with pytest.raises(TypeError, match="got FluxTransformer2DModel, whose pipeline rescales them"):
            denoiser(rescaled, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="timestep_cond: expected an embedding of the guidance"):
        denoiser(conditional_unet(time_cond_proj_dim=4), scheduler)
    scaled = unet()
    scaled.register_to_config(timestep_scale=0.001)
    with pytest.raises(TypeError, match="got UNet2DModel, whose pipeline rescales them"):
        denoiser(scaled, scheduler)

    class Controlled(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler, controlnet):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler, controlnet=controlnet)

    with pytest.raises(TypeError, match=r"expected one of a model alone, got Controlled with \['controlnet'\]"):
        from_pipeline(Controlled(model, scheduler, unet()))
    for bad in (
        diffusers.EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        object(),
    ):
        with pytest.raises(TypeError, match=f"scheduler: expected one with a table.* got {type(bad).__name__}"):
            denoiser(model, bad)
    with pytest.raises(TypeError, match=r"vae: expected one of AutoencoderKL, .* got UNet2DModel"):
        codec(model)
    with pytest.raises(ValueError, match="which is no folder"):
        from_pipeline("google/ddpm-cat-256")
    with pytest.raises(TypeError, match="got UNet2DModel"):
        from_pipeline(model)


# ---------------------------------------------------------------------------------- a model of digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a latent pipeline: an autoencoder and a U-Net of diffusers, trained here on the digits."""
    pytest.importorskip("sklearn")
    images, _, known, _ = train.load(seed=0)
    images = train.scaled(images[known])
    generator = torch.Generator().manual_seed(0)

    def batch(data, size):
        return data[torch.randint(len(data), (size,), generator=generator)]

    def reconstruction(step):
        x = batch(images, 32)
        z = vae.encode(x).latent_dist.mean
        noisy = z + 0.05 * z.detach().std() * torch.randn(z.shape, generator=generator)  # for a smooth decoder
        return (vae.decode(noisy).sample - x).square().mean() + 1e-4 * z.square().mean()

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=DOWN, up_block_types=UP, block_out_channels=(16, 16),
        latent_channels=2, norm_num_groups=8, mid_block_add_attention=False, sample_size=8, scaling_factor=1.0,
    )  # fmt: skip
    vae = train.optimise(vae, reconstruction, steps=200, learning_rate=5e-3, ema=0.98)
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
    vae.register_to_config(latents_mean=z.mean((0, 2, 3)).tolist(), latents_std=z.std((0, 2, 3)).tolist())
    with torch.no_grad():
        latents = codec(vae)[0](images)

    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    table = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    net = UNet2DModel(
        sample_size=4, in_channels=2, out_channels=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip

    def denoising(step):
        return train.v_loss(lambda x, t, label: net(x, t).sample, batch(latents, 32), None, generator, table)

    net = train.optimise(net, denoising, steps=100, learning_rate=5e-3, ema=0.98)
    folder = tmp_path_factory.mktemp("digits")
    LDMPipeline(vae, net, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latent_model(trained):
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained)
    for model in (pipe.unet, pipe.vqvae):
        model.requires_grad_(False)
    return from_pipeline(pipe)


def decoded(decode, out):
    """The images of samples; for weighted particles, their mean."""
    with torch.no_grad():
        if out.log_weights is None:
            return decode(out.x)
        images = decode(out.x.flatten(0, 1)).unflatten(0, out.x.shape[:2])
        return (images * out.weights[..., None, None, None].float()).sum(1)


@torch.no_grad()
def test_the_trained_model(latent_model):
    prior, encode, decode = latent_model
    images, _ = digits.held_out()
    z = encode(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.1)
    assert train.psnr(images, decode(z)) > 19
    share, counts = train.confident(digits.classifier(), decode(fg.sample(prior, (200, 2, 4, 4), steps=25, seed=1).x))
    assert share > 0.6 and min(counts) > 1


def test_guidance_of_latents_by_their_images(latent_model):
    prior, encode, decode = latent_model
    truth, pool = digits.held_out()[0][:4], fg.operators.AveragePool(2)
    y = pool(truth) + 0.1 * normals(4, 1, 4, 4)
    of_image = fg.likelihoods.Gaussian(y, pool, scale=0.1)
    of_latent = fg.likelihoods.Gaussian(y, fg.operators.Function(lambda z: pool(decode(z))), scale=0.1)

    def residual_and_psnr(guidance, steps):
        """The distance from ``y`` in standard deviations of its noise, and the PSNR."""
        images = decoded(decode, fg.sample(prior, (4, 2, 4, 4), guidance=guidance, steps=steps, seed=1))
        return (pool(images) - y).square().mean().sqrt() / 0.1, train.psnr(truth, images)

    unguided, at_random = residual_and_psnr(None, 20)
    assert unguided > 3.5
    for guidance, steps, most, gain in (
        (fg.DPS(of_latent), 20, 1.5, 3.0),
        (fg.LatentPnP(of_image, decode, iterations=1), 5, 1.8, 2.5),
        (fg.LatentPnP(of_image, decode, encode, space="pixel"), 10, 2.8, 2.5),
        (fg.TDS(of_latent, particles=32), 10, 1.5, 3.5),
        (fg.FK(of_latent, particles=64), 15, 1.5, 3.5),
    ):
        residual, psnr = residual_and_psnr(guidance, steps)
        assert residual < most and psnr > at_random + gain, guidance


def test_latents_of_an_autoencoder_with_attention():
    """Autoencoders of Stable Diffusion have attention in the middle block. It has no forward-mode derivative."""
    vae = made(
        AutoencoderKL, in_channels=3, out_channels=3, down_block_types=DOWN, up_block_types=UP,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=1.0,
    )  # fmt: skip
    assert vae.decoder.mid_block.attentions[0] is not None
    decode, pool = codec(vae)[1], fg.operators.AveragePool(2)
    truth, start = normals(2, 2, 4, 8, 8)
    with torch.no_grad():
        y = pool(decode(truth))

    def objective(z):
        with torch.no_grad():
            residual = (pool(decode(z)) - y).square().flatten(1).sum(1) / 0.05**2
        return 0.5 * residual + 0.5 * (z - start).square().flatten(1).sum(1)

    table = fg.schedules.vp_scaled_linear()
    prior = fg.Denoiser(lambda x, t: start, table, "sample")
    guidance = fg.LatentPnP(fg.likelihoods.Gaussian(y, pool, 0.05), decode, rho=1.0)
    states = []
    fg.sample(prior, (2, 4, 8, 8), guidance=guidance, steps=1, callback=lambda p: states.append(p.x))
    assert (objective(states[0]) < 0.2 * objective(start)).all()  # one step ends at the solution of the data term


def test_steering_by_a_reward_of_the_images(latent_model):
    """The evidence and the mean reward of ``p(x) exp(3 r(x))`` agree with a thousand samples of the prior."""
    prior, _, decode = latent_model
    classify = digits.classifier()

    @torch.no_grad()
    def three(z):
        return classify(decode(z)).softmax(1)[:, 3]

    out = fg.sample(prior, (1, 2, 4, 4), guidance=fg.FK(three, particles=400, strength=3.0), steps=10)
    unguided = three(fg.sample(prior, (1000, 2, 4, 4), steps=10, seed=5).x)
    tilt = (3 * unguided).exp()
    expected = (tilt * unguided).mean() / tilt.mean()
    assert unguided.mean() < 0.3 and expected > 0.5
    assert abs((out.weights[0] * three(out.x[0])).sum() - expected) < 0.15
    assert abs(out.log_evidence - tilt.mean().log()) < 0.4
