"""Fixtures that several test files share."""

import os
from collections.abc import Callable

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the threads of processes side by side would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# --- Tiny generators and pipelines, in memory (test_pipeline.py, test_hub.py) ---------------------------------------
@pytest.fixture(scope="session")
def make_generator() -> Callable:
    """Makes a small random generator in evaluation mode whose perturbations fill the budget."""
    import torch

    from gap_diff_diffusers import GAPDiffGenerator

    def make(seed: int = 0, **config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = {"channels": (8, 8), "layers_per_block": (1, 1), **config}
            generator = GAPDiffGenerator(**config).eval()
        if generator.config.architecture == "compact":
            with torch.no_grad():  # as initialized, it returns nearly nothing
                generator.network.conv_out.weight.mul_(30)
        return generator.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_pipeline(make_generator) -> Callable:
    """Makes a pipeline around such a generator; without progress bars."""
    from gap_diff_diffusers import GAPDiffProtectionPipeline

    def make(seed: int = 0, noise_budget: float = 8 / 255, **config):
        pipeline = GAPDiffProtectionPipeline(make_generator(seed, **config), noise_budget=noise_budget)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def make_pixels() -> Callable:
    """Makes a photo: (H,W,3) uint8, soft shapes with a little noise, from black to white."""
    import numpy as np
    from PIL import Image

    def make(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        return np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).round().astype(np.uint8)

    return make


# --- A checkpoint in a folder (test_cli.py, test_budget.py) ----------------------------------------------------------
@pytest.fixture(scope="session")
def checkpoint(make_pipeline, tmp_path_factory) -> str:
    """The path of a saved pipeline, with a generator as above."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_pipeline().save_pretrained(folder)
    return str(folder)


# --- Photos to train on (test_training.py, test_surrogate_training.py) -----------------------------------------------
@pytest.fixture
def photos(tmp_path):
    """A folder with 12 portraits, half of them in a folder below, and files that are none."""
    return make_photos(tmp_path / "photos")


def make_photos(folder):
    import numpy as np
    from PIL import Image

    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(12):
        small = Image.fromarray(random.integers(0, 255, (8, 6, 3), dtype=np.uint8))
        path = folder / ("more" if index % 2 else ".") / f"{index}.png"
        small.resize((240, 320), Image.Resampling.BICUBIC).save(path)
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    return folder


# --- A face model in a folder (test_benchmark_surrogate.py, which hands out copies) ----------------------------------
@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a text-to-image model of 64x64 pixels with random weights."""
    from test_surrogate_training import make_config

    from gap_diff_diffusers.training.surrogate import AutoencoderTrainer, DenoiserTrainer

    folder = tmp_path_factory.mktemp("tiny_model")
    config = make_config(make_photos(folder / "photos"), folder)
    DenoiserTrainer(config, AutoencoderTrainer(config).vae).pipeline.save_pretrained(folder / "model")
    return folder / "model"


# --- A tiny face model and photos of its size (test_finetuning.py, test_protections.py) ------------------------------
@pytest.fixture
def surrogate(photos, tmp_path):
    import torch
    from test_surrogate_training import make_config

    from gap_diff_diffusers import StableDiffusionSurrogate
    from gap_diff_diffusers.training.surrogate import AutoencoderTrainer, DenoiserTrainer

    config = make_config(photos, tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = DenoiserTrainer(config, AutoencoderTrainer(config).vae).pipeline
    for parameter in pipeline.unet.parameters():  # what starts at 0 would hide what is before it
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return StableDiffusionSurrogate(pipeline, name="tiny")


@pytest.fixture
def images():
    import torch

    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
