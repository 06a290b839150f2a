"""Attacks that edit, on a tiny model: each picture is of its own photo, and as far from it as asked for."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from test_attack import person  # noqa: F401
from test_benchmark_surrogate import model  # noqa: F401
from test_surrogates_diffusion import sdxl

from gap_diff_diffusers import StableDiffusionXLSurrogate, load_surrogate
from gap_diff_diffusers.attackers import ATTACKERS, editing
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.finetuning import DreamBoothConfig, draw_class_images

SMALL = {"resolution": 64, "num_inference_steps": 10, "guidance_scale": 1.5}
EDITING = sorted(name for name in ATTACKERS if editing.__name__ in ATTACKERS[name])


def load_editor(kind, channels, surrogate, folder):
    """The tiny model as one that edits, whose UNet sees more channels, loaded from a folder."""
    pipeline = surrogate.pipeline
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": channels})
    with torch.no_grad():
        unet.load_state_dict(
            {key: value for key, value in pipeline.unet.state_dict().items() if key != "conv_in.weight"}, strict=False
        )
        unet.conv_in.weight.copy_(pipeline.unet.conv_in.weight.repeat(1, 3, 1, 1)[:, :channels])
    components = {name: pipeline.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    components |= {"unet": unet, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
    kind(**components, requires_safety_checker=False).save_pretrained(folder)
    return load_surrogate(folder)


@pytest.fixture
def instructed(surrogate, tmp_path):
    return load_editor(StableDiffusionInstructPix2PixPipeline, 8, surrogate, tmp_path / "ip2p")


@pytest.fixture
def inpainter(surrogate, tmp_path):
    return load_editor(StableDiffusionInpaintPipeline, 9, surrogate, tmp_path / "inpainter")


@pytest.fixture(params=EDITING)
def edit(request, surrogate, instructed, images):
    """A function that draws edits of photos with this method."""
    victim = instructed if request.param == "instruct-pix2pix" else surrogate

    def run(count=4, photos=images, prompt="a photo of a person", seed=0, **changes):
        attacker = ATTACKERS.load(request.param)(**SMALL | changes)
        pipeline = attacker(victim, photos, progress=False)
        settings = {"num_inference_steps": attacker.config.num_inference_steps, "guidance_scale": 1.5, "seed": seed}
        return attacker.draw(pipeline, photos, prompt, count, **settings, progress=False)

    return run


def test_a_picture_is_an_edit_of_its_own_photo(edit, images):
    pictures = edit(count=6)
    assert pictures.shape == (6, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    torch.testing.assert_close(edit(count=2), pictures[:2], atol=1e-4, rtol=0)
    other = images.clone()
    other[1] = 1 - other[1]
    changed = edit(photos=other, count=6) - pictures
    assert changed[[1, 5]].abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert changed[[0, 2, 3, 4]].abs().max() < 1e-4
    assert (edit(count=6, seed=1) - pictures).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(edit(count=1, seed=1)[0], edit(photos=images.roll(1, 0), count=2)[1], atol=1e-4, rtol=0)


def test_prompts_matter(edit):
    assert (edit(count=1) - edit(count=1, prompt="a dslr portrait")).abs().max() > 1e-4


def test_the_stronger_the_less_is_left_of_the_photo(surrogate, images):
    left = []
    for strength in (0.1, 0.5, 1.0):
        attacker = ATTACKERS.load("sdedit")(**SMALL | {"strength": strength})
        settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "seed": 0, "progress": False}
        edits = [
            attacker.draw(surrogate.pipeline, photos, "a photo", 4, **settings) for photos in (images, 1 - images)
        ]
        left.append((edits[0] - edits[1]).square().mean().item())
    assert left == sorted(left, reverse=True) and left[-1] < 0.5 * left[0]


def test_inpainting_keeps_what_it_is_told_to():
    mask = ATTACKERS.load("inpainting")(**SMALL | {"kept": 0.5}).editor_arguments(torch.zeros(4, 3, 64, 64))[
        "mask_image"
    ]
    assert mask.shape == (4, 1, 64, 64) and mask.mean() == 0.75
    assert mask[:, :, 16:48, 16:48].max() == 0 and mask[:, :, :16].min() == 1


@pytest.mark.parametrize("victim", ["surrogate", "inpainter"])
def test_where_nothing_is_kept_the_photo_does_not_matter(victim, images, request):
    settings = {"num_inference_steps": 10, "guidance_scale": 1.5, "seed": 0, "progress": False}
    victim, moved = request.getfixturevalue(victim), []
    for kept in (0.0, 0.5):
        attacker = ATTACKERS.load("inpainting")(**SMALL | {"kept": kept})
        drawn = [
            attacker.draw(attacker(victim, photos), photos, "a photo", 4, **settings)
            for photos in (images, 1 - images)
        ]
        moved.append((drawn[0] - drawn[1]).abs().max().item())
    assert moved[0] < 1e-5 and moved[1] > 1e-3


def test_a_model_that_inpaints_does_nothing_else(inpainter, images):
    for method in ("sdedit", "dreambooth", "lora"):
        with pytest.raises(ValueError, match=r"draws by a prompt alone, got one that .*; use .*inpainting"):
            ATTACKERS.load(method)(resolution=64)(inpainter, images)
    with pytest.raises(ValueError, match="draws by a prompt alone, got one that inpaints, which has no loss"):
        inpainter.denoising_loss(images, "a photo")


@pytest.mark.parametrize("method", ["inpainting", "sdedit"])
def test_sdxl_edits_too(method, images):
    attacker = ATTACKERS.load(method)(**SMALL)
    pipeline = attacker(StableDiffusionXLSurrogate(sdxl(), name="tiny"), images)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.5, "seed": 0, "progress": False}
    first, other = (attacker.draw(pipeline, photos, "a photo", 1, **settings) for photos in (images, 1 - images))
    assert first.shape == (1, 3, 64, 64) and (first - other).abs().max() > 1e-3


def test_inpainting_wants_latents_of_four_channels(model, person, tmp_path, capsys):  # noqa: F811
    command = ["attack", str(person), "-o", str(tmp_path / "out"), "--method", "inpainting"]
    assert main(command) == 2  # of the model that ships, which has 8
    assert "4 or 9 input channels to inpaint with, got 8; use sdedit" in capsys.readouterr().err


def test_the_loss_of_an_instructed_model_is_that_of_its_example(instructed, images):
    noise = torch.randn(instructed.latent_shape(images), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 300, 600, 999])
    loss = instructed.denoising_loss(images, "a photo", timesteps=timesteps, noise=noise, sample_posterior=False)
    pipeline, scheduler = instructed.pipeline, instructed.noise_scheduler
    condition = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    latents = condition * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer("a photo", padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = pipeline.text_encoder(tokens[:, : pipeline.tokenizer.model_max_length])[0].expand(4, -1, -1)
    seen = torch.cat([scheduler.add_noise(latents, noise, timesteps), condition], dim=1)
    predicted = pipeline.unet(seen, timesteps, text).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    torch.testing.assert_close(loss, (predicted - target).square().mean(dim=(1, 2, 3)), atol=1e-5, rtol=1e-5)


def test_the_command_edits(model, person, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ["attack", str(person), "-o", str(out), "--model", model, "--method", "sdedit", "--count", "4"]
    assert main([*command, "--set", "resolution=64", "num_inference_steps=4", "strength=0.5"]) == 0
    assert len(list((out / "pictures").iterdir())) == 4
    record = json.loads((out / "attack.json").read_text())
    assert record["method"] == "sdedit" and record["config"]["strength"] == 0.5


def test_what_editing_refuses(surrogate, instructed, images, model, person, tmp_path, capsys):  # noqa: F811
    with pytest.raises(ValueError, match="such as timbrooks/instruct-pix2pix, got a StableDiffusionPipeline"):
        ATTACKERS.load("instruct-pix2pix")(**SMALL)(copy.copy(surrogate), images)
    with pytest.raises(ValueError, match="image to image in diffusers, got a StableDiffusionInstructPix2PixPipeline"):
        ATTACKERS.load("sdedit")(**SMALL)(instructed, images)
    with pytest.raises(ValueError, match="draws by a prompt alone, got one that edits photos; use the method instr"):
        ATTACKERS.load("dreambooth")(resolution=64)(instructed, images)
    with pytest.raises(ValueError, match="use the method instruct-pix2pix"):
        draw_class_images(instructed, DreamBoothConfig(resolution=64))
    with pytest.raises(ValueError, match=r"at least 2 for a strength of 0\.5, got 1"):
        ATTACKERS.load("sdedit")(**SMALL, strength=0.5).draw(
            surrogate.pipeline, images, "a", 1, num_inference_steps=1, guidance_scale=1.0, seed=0
        )
    command = ["attack", str(person), "-o", str(tmp_path / "out"), "--model", model, "--method", "sdedit"]
    for options, message in (
        (["--save-model"], "learns something to save"),
        (["--set", "strength=0"], "strength above 0"),
        (["--set", "strength=0.1", "num_inference_steps=4"], "num_inference_steps of at least 10"),
        (["--set", "strength=0.3", "num_inference_steps=3"], "num_inference_steps of at least 4"),
        (["--set", "resolution=100"], "multiple of 8, got 100"),
        (["--method", "instruct-pix2pix", "--set", "image_guidance_scale=0.5"], "image_guidance_scale of at least 1"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_presets_of_editing():
    for name in EDITING:
        attacker = ATTACKERS.load(name)
        assert {"weak", "strong"} <= set(attacker.presets)
        assert all(type(preset) is attacker.config_class for preset in attacker.presets.values())
    strengths = [ATTACKERS.load("sdedit")(preset).config.strength for preset in ("weak", "middle", "strong")]
    assert strengths == [0.3, 0.5, 0.7]
