"""The face model that ships: small, true to portraits, as easily misled as real models, and it draws faces."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_metrics import ASTRONAUT

from gap_diff_diffusers import encoder_displacement, load_surrogate
from gap_diff_diffusers.benchmark_displacement import pgd
from gap_diff_diffusers.data import load_face
from gap_diff_diffusers.finetuning import generate_images
from gap_diff_diffusers.recognition import DlibFaces
from gap_diff_diffusers.surrogates import BUNDLED_FACE_MODEL
from gap_diff_diffusers.training.surrogate import SurrogateTrainingConfig


@pytest.fixture(scope="module")
def bundled():
    return load_surrogate("bundled")


def test_it_is_small_and_says_what_it_was_made_of():
    files = [path for path in BUNDLED_FACE_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt", ".png"}
    assert "public domain" in (BUNDLED_FACE_MODEL / "README.md").read_text()
    texts = [path.read_text() for path in files if path.suffix in (".json", ".md", ".txt")]
    assert not [text for text in texts if "/tmp/" in text or "/work" in text]


def test_the_config_that_ships_is_that_of_the_record():
    settings = json.loads((Path(__file__).parents[1] / "training_scripts/configs/face_model.json").read_text())
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = SurrogateTrainingConfig(
        train_data_dir=("photos",), feature_encoders=("encoder",), output_dir="out", **settings
    )
    record = json.loads((BUNDLED_FACE_MODEL / "training_record.json").read_text())["config"]
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    different = {key for key in settings.keys() | record if ours[key] != record[key]}
    assert different == {
        *("train_data_dir", "data_description", "feature_encoders"),  # which are the user's
        *("vae_max_train_steps", "vae_init_from"),  # the autoencoder was trained before, in parts
        *("checkpointing_steps", "validation_steps"),  # which change nothing
    }


def test_its_autoencoder_keeps_a_photo_and_can_be_misled_as_real_ones(bundled):
    image = load_face(ASTRONAUT, 512)[None, :, :256, 100:356]  # a portrait, as it was trained on
    latents = bundled.encode_images(image)
    with torch.no_grad():
        decoded = ((bundled.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
    assert -10 * (decoded - image).square().mean().log10() > 24
    assert encoder_displacement(latents, bundled.encode_images(pgd(bundled, image, steps=10))).item() > 0.5


def test_stock_diffusers_loads_it_and_it_draws_faces():
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED_FACE_MODEL, dtype=torch.float32)
    pictures = generate_images(pipeline, "a photo of a person", 4, resolution=256, seed=100)
    faces = DlibFaces()
    assert [len(faces.embeddings(picture)) for picture in pictures].count(1) >= 3


def test_it_tells_a_rare_word_from_others(bundled):
    tokenizer = bundled.pipeline.tokenizer
    assert len(tokenizer("sks", add_special_tokens=False).input_ids) == 1
    plain, rare = bundled.encode_prompt(["a photo of person", "a photo of sks person"]).prompt_embeds
    assert (plain - rare).abs().max() > 0.01
