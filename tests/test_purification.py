"""Purification by models: what a model draws is what comes out, square by square, and what it is looked for nearby."""

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from kornia.metrics import ssim
from test_surrogates_diffusion import flux, sd3

from gap_diff_diffusers.transforms import build_transform
from gap_diff_diffusers.transforms.diffusion_purification import DiffPure, GrIDPure, Impress, Upscale


@pytest.fixture
def gray(tmp_path):
    """An unconditional model that takes every noisy photo for a gray one."""
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    DDPMPipeline(unet, DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path / "gray")
    return str(tmp_path / "gray")


@pytest.fixture
def drawing(surrogate, tmp_path):
    """The tiny text-to-image model in a folder."""
    surrogate.pipeline.save_pretrained(tmp_path / "drawing")
    return str(tmp_path / "drawing")


@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_what_the_model_takes_a_photo_for_comes_out(gray, images, steps):
    purified = DiffPure(gray, timestep=20, steps=steps).eval()(images)
    assert purified.shape == images.shape
    torch.testing.assert_close(purified, torch.full_like(images, 0.5), atol=1e-5, rtol=0)


def test_little_steps_on_overlapping_squares_reach_every_pixel(gray):
    photo = torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    purified = GrIDPure(gray, timestep=5, steps=5, iterations=2, gamma=0.3).eval()(photo)
    torch.testing.assert_close(purified, 0.91 * 0.5 + 0.09 * photo, atol=1e-5, rtol=0)


def test_any_scheduler_will_do(gray, images, tmp_path):
    DDIMPipeline.from_pretrained(gray).save_pretrained(tmp_path / "ddim")
    purified = DiffPure(str(tmp_path / "ddim"), timestep=20, steps=2).eval()(images)
    torch.testing.assert_close(purified, torch.full_like(images, 0.5), atol=1e-5, rtol=0)


def test_the_further_the_noise_the_less_is_left_of_the_photo(drawing, images):
    left = []
    for timestep in (50, 72, 500, 1000):
        transform = DiffPure(drawing, timestep=timestep, steps=3, resolution=64).eval()
        left.append((transform(images) - transform(1 - images)).square().mean().item())
    assert left == sorted(left, reverse=True) and left[-1] < 0.5 * left[0]


@pytest.mark.parametrize("family", [sd3, flux])
def test_models_with_a_size_of_their_own_take_the_photos(family, tmp_path):
    family().save_pretrained(tmp_path / "model")
    photos = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    transform = DiffPure(str(tmp_path / "model"), timestep=500, steps=2, resolution=32).eval()
    assert transform(photos).shape == photos.shape and len(transform.networks) > 2


def test_there_are_no_more_steps_than_timesteps(drawing, images):
    transform = DiffPure(drawing, timestep=3, steps=100, resolution=64).eval()
    assert transform.steps == 3 and (transform(images) - transform(1 - images)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["diffpure", "gridpure", "impress"])
def test_a_seed_decides_and_each_photo_is_purified_alone(drawing, images, name):
    quick = {"steps": 2} if name == "impress" else {"steps": 2, "resolution": 64}
    transform = build_transform(
        {"name": name, "model": drawing, **quick, **({"iterations": 1} if "grid" in name else {})}
    )
    draws = [transform.train().draw(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    first, again, other = (transform.apply_draw(images[:2], draw) for draw in draws)
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-3
    torch.testing.assert_close(transform.apply_draw(images[1:2], draws[0]), first[1:], atol=1e-5, rtol=0)


def test_impress_finds_what_the_autoencoder_reproduces_and_stays_near(surrogate, drawing, images):
    def distance(photos):
        latents = surrogate.vae.encode(photos * 2 - 1).latent_dist.mean
        return (surrogate.vae.decode(latents).sample - (photos * 2 - 1)).square().mean().item()

    settings = {"steps": 40, "learning_rate": 0.05, "noise": 0.0}
    free = Impress(drawing, **settings, distance_weight=0.0).eval()(images)
    near = Impress(drawing, **settings, distance_weight=10.0).eval()(images)
    assert distance(free) < 0.8 * distance(images) and distance(near) < distance(images)
    likeness = [ssim(found, images, 11).mean().item() for found in (near, free)]
    assert likeness[0] > 0.85 and likeness[0] > likeness[1] + 0.05


def test_upscaling_enlarges_by_four(surrogate, images, tmp_path):
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=surrogate.vae.config.latent_channels + 3,
        out_channels=surrogate.vae.config.latent_channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=surrogate.denoiser.config.cross_attention_dim,
        num_class_embeds=1000,
    )
    parts = surrogate.pipeline.components
    StableDiffusionUpscalePipeline(
        vae=_halving(parts["vae"]),
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=unet,
        low_res_scheduler=DDPMScheduler(),
        scheduler=parts["scheduler"],
    ).save_pretrained(tmp_path / "upscaler")
    spec = {"name": "upscale", "model": str(tmp_path / "upscaler"), "steps": 2, "noise_level": 20}
    transform = build_transform([{"name": "random_noise", "std": 0.1}, spec]).eval()
    small = images[:2, :, :32, :32]
    upscaled = transform(small)
    assert upscaled.shape == (2, 3, 128, 128) and upscaled.min() >= 0 and upscaled.max() <= 1
    assert (transform(1 - small) - upscaled).abs().max() > 1e-3
    with pytest.raises(ValueError, match="noise_level: expected one up to the model's 350, got 900"):
        Upscale(str(tmp_path / "upscaler"), noise_level=900)


def _halving(vae):
    """An autoencoder of two halvings, as the upscaler's."""
    return type(vae)(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=vae.config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.08333,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda drawing: DiffPure("no/such/model"), "folder or Hub id of a pipeline, got 'no/such/model'"),
        (lambda drawing: Impress("no/such/model"), "folder or Hub id of an AutoencoderKL, got 'no/such/model'"),
        (lambda drawing: Upscale(drawing), "expected a StableDiffusionUpscalePipeline, got a StableDiffusionPipeline"),
        (lambda drawing: DiffPure(drawing, timestep=1001), "up to the model's 1000"),
        (lambda drawing: DiffPure(drawing, resolution=100), "resolution: expected a multiple of 8, got 100"),
        (lambda drawing: DiffPure(drawing, steps=0), "steps: expected a whole number from 1"),
        (lambda drawing: GrIDPure(drawing, gamma=1), "gamma"),
        (lambda drawing: GrIDPure(drawing, iterations=0), "iterations"),
        (lambda drawing: Impress(drawing, noise=-1), "noise"),
        (lambda drawing: Impress(drawing, steps=0), "steps"),
    ],
)
def test_what_purification_refuses(drawing, make, message):
    with pytest.raises(ValueError, match=message):
        make(drawing)
