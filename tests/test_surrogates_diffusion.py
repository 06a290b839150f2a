"""Whole text-to-image models as surrogates: their loss against diffusers' training examples, and its gradient.

The reference losses are written down here from stock components, in the order of the examples' code.
"""

import copy
import json
import string

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from fake_hub import FakeHub, Worker, WorkerError
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from gap_diff_diffusers import (
    EncoderSurrogate,
    EnsembleSurrogate,
    FluxSurrogate,
    StableDiffusion3Surrogate,
    StableDiffusionSurrogate,
    load_surrogate,
)
from gap_diff_diffusers.surrogates import SURROGATES

PROMPTS = ["a photo of sks person", "a cat"]
HEIGHT, WIDTH = 16, 24
LATENTS = (2, 4, 8, 12)


# --- Tiny random pipelines -------------------------------------------------------------------------------------------
def clip_tokenizer():
    letters = string.ascii_lowercase
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=77)


def clip(hidden_size=8, projection=False):
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=hidden_size,
        intermediate_size=16,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=5.0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(d_model):
    return T5EncoderModel(
        T5Config(vocab_size=30, d_model=d_model, d_kv=8, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0)
    )


def vae(**options):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
        **options,
    )


def unet(**options):
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        sample_size=8,
        **options,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(**scheduler_options):
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=8),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, **scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**vae_options):
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, **vae_options),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS),
    )


def sd3():
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(24),
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance_embeds=True):
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=8,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )


FAMILIES = {
    "sd-epsilon": stable_diffusion,
    "sd-v": lambda: stable_diffusion(prediction_type="v_prediction"),
    "sdxl": sdxl,
    "sdxl-normalized-latents": lambda: sdxl(latents_mean=[-1.0, 0.5, 0, 2], latents_std=[1.0, 2, 3, 4]),
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
}
EACH_ARCHITECTURE = ["sd-epsilon", "sd-v", "sdxl", "sd3", "flux-dev"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors as small as these take longer to share among threads than to compute, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> the folder of its saved pipeline."""
    folders = {}

    def save(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pipeline = FAMILIES[family]()
                for key in ("unet", "transformer"):
                    if model := pipeline.components.get(key):
                        # Biases start at 0 and outputs near it, where a condition that is ignored makes no difference.
                        for parameter in model.parameters():
                            parameter.data += 0.1 * torch.randn_like(parameter)
                pipeline.save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture
def images():
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# --- The losses of the training examples -----------------------------------------------------------------------------
def hidden_states(folder, number, prompts, encoder_class=CLIPTextModelWithProjection):
    suffix = f"_{number}" if number > 1 else ""
    tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return encoder_class.from_pretrained(folder / f"text_encoder{suffix}")(ids, output_hidden_states=True)


def t5_embeds(folder, number, prompts):
    tokenizer = T5TokenizerFast.from_pretrained(folder / f"tokenizer_{number}")
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return T5EncoderModel.from_pretrained(folder / f"text_encoder_{number}")(ids)[0]


def reference_latents(folder, images, generator):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    return vae.encode(images * 2 - 1).latent_dist.sample(generator), vae.config


def unet_inputs(folder, model_input, generator):
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    noise = torch.randn(model_input.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(noise),), generator=generator)
    is_epsilon = scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else scheduler.get_velocity(model_input, noise, timesteps)
    return scheduler.add_noise(model_input, noise, timesteps), timesteps, target


def reference_sd(folder, images, prompts, generator):
    latents, config = reference_latents(folder, images, generator)
    noisy, timesteps, target = unet_inputs(folder, latents * config.scaling_factor, generator)
    embeds = hidden_states(folder, 1, prompts, CLIPTextModel)[0]
    prediction = UNet2DConditionModel.from_pretrained(folder / "unet")(noisy, timesteps, embeds).sample
    return torch.nn.functional.mse_loss(prediction, target)


def reference_sdxl(folder, images, prompts, generator):
    latents, config = reference_latents(folder, images, generator)
    if config.latents_mean is None:
        latents = latents * config.scaling_factor
    else:
        mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (config.latents_mean, config.latents_std))
        latents = (latents - mean) * config.scaling_factor / std
    noisy, timesteps, target = unet_inputs(folder, latents, generator)
    one = hidden_states(folder, 1, prompts, CLIPTextModel)
    two = hidden_states(folder, 2, prompts)
    # original size, top left corner of the crop, target size
    time_ids = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * len(images))
    prediction = UNet2DConditionModel.from_pretrained(folder / "unet")(
        noisy,
        timesteps,
        torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1),
        added_cond_kwargs={"time_ids": time_ids, "text_embeds": two[0]},
    ).sample
    return torch.nn.functional.mse_loss(prediction, target)


def flow_inputs(folder, model_input, generator, scheme):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    noise = torch.randn(model_input.shape, generator=generator)
    u = compute_density_for_timestep_sampling(scheme, len(noise), 0.0, 1.0, 1.29, generator=generator)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas[steps].view(-1, 1, 1, 1)
    return (1.0 - sigmas) * model_input + sigmas * noise, noise - model_input, timesteps, sigmas


def weighted_error(scheme, sigmas, prediction, target):
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    return (weighting * (prediction - target) ** 2).reshape(len(target), -1).mean(1).mean()


def reference_sd3(folder, images, prompts, generator, scheme="logit_normal", precondition=True, has_t5=True):
    latents, config = reference_latents(folder, images, generator)
    latents = (latents - config.shift_factor) * config.scaling_factor
    noisy, target, timesteps, sigmas = flow_inputs(folder, latents, generator, scheme)
    one, two = (hidden_states(folder, number, prompts) for number in (1, 2))
    clip_embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    t5_part = t5_embeds(folder, 3, prompts) if has_t5 else torch.zeros(len(prompts), 77, 24)
    clip_embeds = torch.nn.functional.pad(clip_embeds, (0, t5_part.shape[-1] - clip_embeds.shape[-1]))
    prediction = SD3Transformer2DModel.from_pretrained(folder / "transformer")(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=torch.cat([clip_embeds, t5_part], dim=-2),
        pooled_projections=torch.cat([one[0], two[0]], dim=-1),
    ).sample
    if precondition:
        prediction, target = prediction * -sigmas + noisy, latents
    return weighted_error(scheme, sigmas, prediction, target)


def reference_flux(folder, images, prompts, generator, scheme="none"):
    latents, config = reference_latents(folder, images, generator)
    latents = (latents - config.shift_factor) * config.scaling_factor
    noisy, target, timesteps, sigmas = flow_inputs(folder, latents, generator, scheme)
    n, c, h, w = latents.shape
    # Patches of 2x2 become channels: (n, h/2 * w/2, 4c), and positions (0, row, column).
    packed = noisy.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2)).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    embeds = t5_embeds(folder, 2, prompts)
    prediction = transformer(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.full((n,), 3.5) if transformer.config.guidance_embeds else None,
        pooled_projections=hidden_states(folder, 1, prompts, CLIPTextModel).pooler_output,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        img_ids=positions,
    ).sample
    prediction = prediction.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
    return weighted_error(scheme, sigmas, prediction, target)


REFERENCES = {"sd": reference_sd, "sdxl": reference_sdxl, "sd3": reference_sd3, "flux": reference_flux}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_loss_is_that_of_the_training_examples(family, folder, images):
    loss = load_surrogate(folder(family)).denoising_loss(images, PROMPTS, generator=seeded())
    expected = REFERENCES[family.split("-")[0]](folder(family), images, PROMPTS, seeded())
    assert loss.shape == (2,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.mean(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["mode", "sigma_sqrt", "cosmap", "none"])
@torch.no_grad()
def test_other_weighting_schemes_of_the_examples(scheme, folder, images):
    surrogate = load_surrogate(folder("sd3"), weighting_scheme=scheme, precondition_outputs=False)
    loss = surrogate.denoising_loss(images, PROMPTS, generator=seeded())
    expected = reference_sd3(folder("sd3"), images, PROMPTS, seeded(), scheme, precondition=False)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_stable_diffusion_3_may_lack_its_largest_text_encoder(folder, images):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder("sd3"), text_encoder_3=None, tokenizer_3=None)
    surrogate = StableDiffusion3Surrogate(pipeline, name="sd3")
    loss = surrogate.denoising_loss(images, PROMPTS, generator=seeded())
    expected = reference_sd3(folder("sd3"), images, PROMPTS, seeded(), has_t5=False)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-6, rtol=1e-5)


# --- Gradients -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", EACH_ARCHITECTURE)
def test_the_gradient_is_that_of_finite_differences(family, folder, images):
    surrogate = load_surrogate(folder(family), dtype=torch.float64)
    pixels = images.double().requires_grad_(True)

    def loss(x):
        return surrogate.denoising_loss(x, PROMPTS, generator=seeded()).sum()

    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    # Along the gradient the loss moves most, and with a random part no wrong component goes unseen.
    random = torch.randn(pixels.shape, generator=seeded(), dtype=torch.float64)
    step = 1e-3 * (gradient / gradient.norm() + random / random.norm())
    with torch.no_grad():
        difference = (loss(pixels + step) - loss(pixels - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), difference, atol=0, rtol=1e-4)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in surrogate.parameters())


@pytest.mark.parametrize("family", EACH_ARCHITECTURE)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(family, folder, images):
    gradients, kept = [], []
    for gradient_checkpointing in (False, True):
        surrogate = load_surrogate(folder(family), gradient_checkpointing=gradient_checkpointing)
        embedding = surrogate.encode_prompt(PROMPTS)
        pixels = images.clone().requires_grad_(True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = surrogate.denoising_loss(pixels, embedding, generator=seeded()).sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("family", EACH_ARCHITECTURE)
def test_bfloat16_weights_give_float32_losses_and_gradients(family, folder, images):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        surrogate = load_surrogate(folder(family), dtype=dtype)
        assert {parameter.dtype for parameter in surrogate.parameters()} == {dtype}
        pixels = images.clone().requires_grad_(True)
        noise = torch.randn(LATENTS, generator=seeded())
        timesteps = torch.tensor([300, 700])
        losses.append(
            surrogate.denoising_loss(pixels, PROMPTS, noise=noise, timesteps=timesteps, sample_posterior=False)
        )
        losses[-1].sum().backward()
        assert pixels.grad.dtype == torch.float32
        assert pixels.grad.isfinite().all() and pixels.grad.abs().max() > 0
        assert surrogate.encode_images(images).dtype == torch.float32
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=0.05)


def test_float16_leaves_the_autoencoder_in_float32(folder):
    surrogate = load_surrogate(folder("sd-epsilon"), dtype=torch.float16)
    assert (surrogate.vae.dtype, surrogate.denoiser.dtype) == (torch.float32, torch.float16)


# --- What is drawn, and what may be given ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["sd-epsilon", "sd3"])
@torch.no_grad()
def test_noise_and_timesteps_may_be_given(family, folder, images):
    surrogate = load_surrogate(folder(family))
    timesteps, noise = torch.tensor([100, 800]), torch.randn(LATENTS, generator=seeded())

    def loss(**options):
        options = {"timesteps": timesteps, "noise": noise, "sample_posterior": False} | options
        return surrogate.denoising_loss(images, PROMPTS[0], **options)

    together = loss(generator=seeded(1))
    assert torch.equal(together, loss(generator=seeded(2)))  # nothing is left to draw
    for changed in ({"timesteps": timesteps + 100}, {"noise": -noise}, {"sample_posterior": True}):
        assert not torch.isclose(loss(generator=seeded(), **changed), together).any(), changed
    alone = [
        surrogate.denoising_loss(
            images[i : i + 1],
            PROMPTS[0],
            timesteps=timesteps[i : i + 1],
            noise=noise[i : i + 1],
            sample_posterior=False,
        )
        for i in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_equal_generators_draw_alike_and_the_global_one_stays(folder, images):
    surrogate = load_surrogate(folder("sd-epsilon"))
    state = torch.random.get_rng_state()
    losses = [surrogate.denoising_loss(images, PROMPTS[0], generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(*(surrogate.denoising_loss(images, PROMPTS[0]) for _ in range(2)))


@torch.no_grad()
def test_a_pipeline_that_has_generated_has_the_same_loss(folder, images):
    losses = []
    for steps in (None, 3):
        pipeline = FluxPipeline.from_pretrained(folder("flux-dev"))
        if steps:
            pipeline.scheduler.set_timesteps(steps, mu=1.0)
        losses.append(FluxSurrogate(pipeline, name="flux").denoising_loss(images, PROMPTS, generator=seeded()))
    assert torch.equal(*losses)


@pytest.mark.parametrize("family", EACH_ARCHITECTURE)
@torch.no_grad()
def test_prompts_are_encoded_once_for_one_or_for_all_photos(family, folder, images):
    surrogate = load_surrogate(folder(family))

    def loss(prompt):
        return surrogate.denoising_loss(images, prompt, generator=seeded())

    one, each = loss(PROMPTS[0]), loss(PROMPTS)
    torch.testing.assert_close(loss(surrogate.encode_prompt(PROMPTS[0])), one)
    torch.testing.assert_close(loss([PROMPTS[0]] * 2), one)
    torch.testing.assert_close(each[0], one[0])
    assert not torch.isclose(each[1], one[1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"each of the 2 photos, got 3"):
        loss([*PROMPTS, ""])
    for nonsense in ([], [3]):
        with pytest.raises(ValueError, match="list of prompts"):
            loss(nonsense)


@torch.no_grad()
def test_images_are_encoded_to_unscaled_means(folder, images):
    autoencoder = AutoencoderKL.from_pretrained(folder("sd3"), subfolder="vae")
    expected = autoencoder.encode(images * 2 - 1).latent_dist.mean
    surrogate = load_surrogate(folder("sd3"))
    torch.testing.assert_close(surrogate.encode_images(images), expected)
    torch.testing.assert_close(load_surrogate(folder("sd3"), subfolder="vae").encode_images(images), expected)
    torch.testing.assert_close(surrogate.scale_latents(expected), (expected - 0.0609) * 1.5305)


def test_a_copy_is_independent(folder, images):
    surrogate = load_surrogate(folder("sd-epsilon"))
    other = copy.deepcopy(surrogate)
    with torch.no_grad():
        before = surrogate.denoising_loss(images, PROMPTS[0], generator=seeded())
        other.denoiser.conv_out.weight.add_(1)
        other.text_encoders[0].get_input_embeddings().weight.zero_()
        assert torch.equal(surrogate.denoising_loss(images, PROMPTS[0], generator=seeded()), before)
        embeddings = [s.encode_prompt(PROMPTS[0]).prompt_embeds for s in (surrogate, other)]
    assert not torch.equal(*embeddings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(3, 16, 24)}, r"\(N, 3, H, W\).*\(3, 16, 24\)"),
        ({"images": torch.rand(2, 1, 16, 24)}, r"\(N, 3, H, W\)"),
        ({"images": torch.zeros(2, 3, 16, 24, dtype=torch.uint8)}, "uint8.*255"),
        ({"images": torch.rand(2, 3, 16, 18)}, "multiples of 4, got 16x18"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 12\), got \(2, 4, 8, 8\)"),
        ({"timesteps": torch.tensor(3)}, r"shape \(2,\)"),
        ({"timesteps": torch.tensor([0.0, 3.0])}, "above 0 up to 1000"),
        ({"timesteps": torch.tensor([3.0, 1000.5])}, "above 0 up to 1000"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, folder, images):
    surrogate = load_surrogate(folder("sd3"))
    with pytest.raises(ValueError, match=message):
        surrogate.denoising_loss(**{"images": images, "prompt": ""} | changes)


@pytest.mark.parametrize("timesteps", [[0, 1000], [-1, 3], [1.0, 2.0]])
def test_timesteps_of_stable_diffusion_are_integers_of_its_schedule(timesteps, folder, images):
    with pytest.raises(ValueError, match="integer timesteps from 0 to 999"):
        load_surrogate(folder("sd-epsilon")).denoising_loss(images, "", timesteps=torch.tensor(timesteps))


# --- Loading ---------------------------------------------------------------------------------------------------------
def test_every_registered_class_loads(folder, tmp_path):
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folder("sd-epsilon")).components
    instructed = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    instructed.save_pretrained(tmp_path / "instructed")
    inpainting = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpainting.save_pretrained(tmp_path / "inpainting")
    folders = [*(folder(family) for family in EACH_ARCHITECTURE), folder("sd3") / "vae", tmp_path]
    folders += [tmp_path / "instructed", tmp_path / "inpainting"]
    loaded = set()
    for path in folders:
        surrogate = load_surrogate(path)
        assert surrogate.name == path.name
        index = path / "model_index.json"
        class_name = json.loads((index if index.exists() else path / "config.json").read_text())["_class_name"]
        assert type(surrogate) is SURROGATES.load(class_name)
        assert hasattr(diffusers, class_name)
        loaded.add(class_name)
    assert loaded == set(SURROGATES)


def test_a_bare_encoder_file_loads(tmp_path):
    weights = {"0.weight": torch.zeros(4, 3, 3, 3), "0.bias": torch.zeros(4)}
    weights |= {
        f"1.conv.{k}.{p}": torch.zeros((4, 4, 3, 3)[: 4 if p == "weight" else 1])
        for k in (0, 2, 4)
        for p in ("weight", "bias")
    }
    safetensors.torch.save_file(weights, tmp_path / "bare.safetensors")
    surrogate = load_surrogate(tmp_path / "bare.safetensors", dtype=torch.bfloat16)
    assert surrogate.encode_images(torch.rand(1, 3, 16, 16)).dtype == torch.float32


def test_an_encoder_alone_has_no_denoising_loss(folder, images):
    surrogate = load_surrogate(folder("sd3") / "vae", gradient_checkpointing=True)
    assert isinstance(surrogate, EncoderSurrogate)
    with pytest.raises(ValueError, match=r"denoiser.*vae.*whole pipeline"):
        surrogate.denoising_loss(images, "a cat", generator=seeded())
    with pytest.raises(ValueError, match="text encoder"):
        surrogate.encode_prompt("a cat")
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        surrogate.encode_images(images[0])


def test_folders_that_are_no_surrogate_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model_index.json or config.json.*pipeline"):
        load_surrogate(tmp_path / "empty")
    UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline.*got UNet2DModel"):
        load_surrogate(tmp_path / "unet")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model of diffusers"):
        load_surrogate(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"got no config.json"):
        load_surrogate(folder("sd3"), subfolder="decoder")
    with pytest.raises(TypeError, match="strength"):
        load_surrogate(folder("sd-epsilon"), strength=2)
    with pytest.raises(TypeError, match="strength"):
        load_surrogate(folder("sd3") / "vae", strength=2)
    with pytest.raises(ValueError, match=r"weighting_scheme.*cosmap.*'uniform'"):
        load_surrogate(folder("sd3"), weighting_scheme="uniform")


def test_pickled_weights_are_refused(tmp_path):
    vae().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_surrogate(tmp_path)


def test_pipelines_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match="StableDiffusionPipeline, got a StableDiffusionXLPipeline"):
        StableDiffusionSurrogate.from_pretrained(folder("sdxl"))
    pipeline = stable_diffusion()
    for scheduler in (EDMEulerScheduler(), DDPMScheduler(prediction_type="sample")):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match="epsilon or v_prediction"):
            StableDiffusionSurrogate(pipeline, name="edm")
    pipeline = flux()
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, got DDPMScheduler"):
        FluxSurrogate(pipeline, name="flux")


def loss_from_hub(model, revision):
    import torch

    from gap_diff_diffusers import load_surrogate

    surrogate = load_surrogate(model, revision=revision)
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    return surrogate.denoising_loss(images, "a cat", generator=torch.Generator().manual_seed(3)).item()


def go_offline():
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def latents_from_hub(model, revision):
    import torch

    from gap_diff_diffusers import EncoderSurrogate

    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    return EncoderSurrogate.from_pretrained(model, revision=revision).encode_images(images).tolist()


def test_models_on_the_hub_load_by_revision_and_what_is_gone_names_what_lives(folder, images, tmp_path):
    with FakeHub() as hub:
        hub.add_folder("org/model", folder("sd-epsilon"), revision="v1")
        hub.add_folder("org/model", folder("sd-v"))
        hub.add_folder("org/no-model", folder("sd3") / "scheduler")
        hub.add_folder("org/gated", folder("sd-v"))
        hub.repositories["org/gated"].gated = True
        worker = Worker(tmp_path / "worker", hub.url)
        for family, revision in (("sd-epsilon", "v1"), ("sd-v", None)):
            with torch.no_grad():
                expected = load_surrogate(folder(family)).denoising_loss(images[:1], "a cat", generator=seeded())
            assert worker.run(loss_from_hub, "org/model", revision) == pytest.approx(expected.item(), rel=1e-5)
        hub.add_folder("org/vae", folder("sd-v") / "vae")
        for model, family, revision in (
            ("org/model", "sd-epsilon", "v1"),
            ("org/model", "sd-v", None),
            ("org/vae", "sd-v", None),
        ):
            expected = load_surrogate(folder(family)).encode_images(images[:1])
            latents = torch.tensor(worker.run(latents_from_hub, model, revision))
            torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
        refused = [
            ("stabilityai/stable-diffusion-2-1-base", None, "gone.*stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ("no/such/folder", None, "folder.*stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ("org/gated", None, "accept its terms.*stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ("org/model", "v2", "revision 'v2'"),
            ("org/no-model", None, "no model_index.json or config.json"),
        ]
        for model, revision, message in refused:
            with pytest.raises(WorkerError, match=f"ValueError: .*{message}"):
                worker.run(loss_from_hub, model, revision)
        for model, revision, message in (*refused[:4], ("enc/none.safetensors", None, "no such file")):
            with pytest.raises(WorkerError, match=f"ValueError: .*{message}"):
                worker.run(latents_from_hub, model, revision)
        online = worker.run(latents_from_hub, "org/model", None), worker.run(loss_from_hub, "org/model", None)
        worker.run(go_offline)  # what was loaded stays, and which files it does not have
        assert worker.run(latents_from_hub, "org/model", None) == online[0]
        assert worker.run(loss_from_hub, "org/model", None) == online[1]
        with pytest.raises(WorkerError, match="LocalEntryNotFoundError"):
            worker.run(latents_from_hub, "org/never-loaded", None)
        worker.close()


# --- Ensembles -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_an_ensemble_is_the_weighted_mean_of_its_members(folder, images):
    members = [load_surrogate(folder(family)) for family in ("sd-epsilon", "flux-dev")]
    ensemble = EnsembleSurrogate(members, weights=[3, 1])
    assert ensemble.name == f"{members[0].name}+{members[1].name}"
    generator = seeded()
    first, second = (member.denoising_loss(images, PROMPTS, generator=generator) for member in members)
    expected = 0.75 * first + 0.25 * second
    torch.testing.assert_close(ensemble.denoising_loss(images, PROMPTS, generator=seeded()), expected)
    embedding = ensemble.encode_prompt(PROMPTS)
    torch.testing.assert_close(ensemble.denoising_loss(images, embedding, generator=seeded()), expected)
    alike = EnsembleSurrogate(members, name="both")
    torch.testing.assert_close(alike.denoising_loss(images, PROMPTS, generator=seeded()), (first + second) / 2)
    for latents, member in zip(ensemble.encode_images(images), members, strict=True):
        torch.testing.assert_close(latents, member.encode_images(images))

    noise, timesteps = torch.randn(LATENTS, generator=seeded()), torch.tensor([10, 500])
    given = {"noise": [noise, -noise], "timesteps": [timesteps, timesteps + 100], "sample_posterior": False}
    expected = 0.75 * members[0].denoising_loss(
        images, "", noise=noise, timesteps=timesteps, sample_posterior=False
    ) + 0.25 * members[1].denoising_loss(images, "", noise=-noise, timesteps=timesteps + 100, sample_posterior=False)
    torch.testing.assert_close(ensemble.denoising_loss(images, "", **given), expected)
    for wrong in ({"noise": noise}, {"timesteps": [timesteps]}, {"prompt": embedding[0]}):
        with pytest.raises(ValueError, match="one entry for each of the 2 members"):
            ensemble.denoising_loss(images, **({"prompt": ""} | wrong))


def test_gradients_reach_the_pixels_through_every_member(folder, images):
    members = [load_surrogate(folder(family)) for family in ("sd-epsilon", "sd3")]
    ensemble = EnsembleSurrogate(members)
    ensemble.enable_gradient_checkpointing()
    assert all(member.denoiser.is_gradient_checkpointing for member in members)
    embedding = ensemble.encode_prompt("a cat")
    pixels = images.clone().requires_grad_(True)
    ensemble.denoising_loss(pixels, embedding, generator=seeded()).sum().backward()
    others = images.clone().requires_grad_(True)
    generator = seeded()
    for member, embedded in zip(members, embedding):
        (member.denoising_loss(others, embedded, generator=generator).sum() / 2).backward()
    torch.testing.assert_close(pixels.grad, others.grad)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")]])
def test_weights_that_do_not_fit_are_refused(weights, folder):
    member = load_surrogate(folder("sd3") / "vae")
    with pytest.raises(ValueError, match="each of the 2 surrogates"):
        EnsembleSurrogate([member, member], weights=weights)


def test_an_ensemble_has_members_and_their_abilities(folder, images):
    with pytest.raises(ValueError, match="at least one surrogate"):
        EnsembleSurrogate([])
    ensemble = EnsembleSurrogate([load_surrogate(folder("sd3") / "vae"), load_surrogate(folder("sd3"))])
    assert len(ensemble.encode_images(images)) == 2
    with pytest.raises(ValueError, match=r"text encoder.*vae"):
        ensemble.denoising_loss(images, "a cat")
