"""The autoencoder that ships: small, true to portraits, and as easily misled as those of real models."""

import json
from pathlib import Path

import pytest
import torch
from test_metrics import ASTRONAUT

from gap_diff_diffusers import encoder_displacement, load_surrogate
from gap_diff_diffusers.benchmark_displacement import pgd
from gap_diff_diffusers.data import load_face
from gap_diff_diffusers.surrogates import BUNDLED_AUTOENCODER
from gap_diff_diffusers.training.surrogate import SurrogateTrainingConfig


@pytest.fixture(scope="module")
def bundled():
    return load_surrogate(BUNDLED_AUTOENCODER)


def test_it_is_small_and_says_what_it_was_made_of():
    files = [path for path in BUNDLED_AUTOENCODER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert "public domain" in (BUNDLED_AUTOENCODER / "README.md").read_text()
    assert not [path for path in files if path.suffix in (".json", ".md") and "/tmp/" in path.read_text()]


def test_its_config_is_valid_and_that_of_the_record():
    settings = json.loads((Path(__file__).parents[1] / "training_scripts/configs/face_model.json").read_text())
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = SurrogateTrainingConfig(
        train_data_dir=("photos",), feature_encoders=("encoder",), output_dir="out", **settings
    )
    record = json.loads((BUNDLED_AUTOENCODER / "training_record.json").read_text())["config"]
    for key in ("resolution", "vae_channels", "latent_channels", "feature_weight", "response_weight", "kl_weight"):
        assert json.loads(json.dumps(getattr(config, key))) == record[key]


def test_it_keeps_a_photo_and_can_be_misled_as_real_ones(bundled):
    image = load_face(ASTRONAUT, 512)[None, :, :256, 100:356]  # a portrait, as it was trained on
    latents = bundled.encode_images(image)
    with torch.no_grad():
        decoded = ((bundled.encoder.decode(latents).sample + 1) / 2).clamp(0, 1)
    assert -10 * (decoded - image).square().mean().log10() > 24
    assert encoder_displacement(latents, bundled.encode_images(pgd(bundled, image, steps=10))).item() > 0.5
