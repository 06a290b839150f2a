"""Data, losses and the training loop, on tiny networks and pictures made here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from test_surrogates import sana_like
from test_surrogates_diffusion import FAMILIES

from gap_diff_diffusers import GAPDiffGenerator, GAPDiffProtectionPipeline
from gap_diff_diffusers.config import BUNDLED_CHECKPOINT, training_parser
from gap_diff_diffusers.data import FaceCrops, face_square, list_photos, readable, split_held_out, split_usable
from gap_diff_diffusers.images import Photo
from gap_diff_diffusers.models.gap_diff_generator import resize
from gap_diff_diffusers.training.gap_diff import GAPDiffTrainer, GAPDiffTrainingConfig
from gap_diff_diffusers.training.loop import checkpoints, find_checkpoint
from gap_diff_diffusers.training.losses import coherence_loss, excess_power_loss, log_displacement_loss
from gap_diff_diffusers.transforms import build_transform

ROOT = Path(__file__).parents[1]


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    safetensors.torch.save_file(sana_like(), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def make_config(photos, encoder, output_dir, **changes):
    settings = {
        "train_data_dir": (str(photos),),
        "encoders": (str(encoder),),
        "encoder_weights": (1.0,),
        "encoder_crop_sizes": (0,),
        "output_dir": str(output_dir),
        "channels": (8, 8),
        "layers_per_block": (1, 1),
        "crop_size": 64,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "mixed_precision": "no",
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_images": 2,
    }
    return GAPDiffTrainingConfig(**settings | changes)


def test_photos_are_listed_by_name_and_one_in_ten_is_held_out(photos):
    found = list_photos([photos])
    assert found == sorted(found)
    assert len(found) == 13  # 12 and the broken one; no hidden file, no text
    train, held_out = split_held_out(found)
    assert held_out == [found[0], found[10]]
    assert sorted(train + held_out) == sorted(found)
    with pytest.raises(ValueError, match="found none"):
        list_photos([photos / "nowhere"])


def test_face_square_is_the_top_middle(tmp_path):
    pixels = np.zeros((20, 16, 3), dtype=np.uint8)
    pixels[:16] = 255
    Image.fromarray(np.pad(pixels, ((0, 0), (10, 10), (0, 0)))).save(tmp_path / "tall.png")
    Image.fromarray(pixels).save(tmp_path / "portrait.png")
    assert np.asarray(face_square(tmp_path / "portrait.png")).min() == 255
    assert face_square(tmp_path / "tall.png").size == (20, 20)


def test_face_crops_skip_what_is_unreadable_and_depend_on_the_generator_alone(photos):
    crops = FaceCrops(list_photos([photos]), crop_size=64)
    assert (len(crops.squares), crops.unreadable, crops.too_small) == (12, 1, 0)
    first, again, other = (crops.sample(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 64, 64)
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    bounded = FaceCrops(list_photos([photos]), crop_size=64, memory=3 * 240**2 * 5)
    assert sum(isinstance(square, Image.Image) for square in bounded.squares) == 5
    assert torch.equal(bounded.sample(3, torch.Generator().manual_seed(1)), first)
    with pytest.raises(ValueError, match=r"at least 1000 px .* among 7: 1 unreadable, 6 under 1000 px"):
        FaceCrops([*list_photos([photos / "more"]), photos / "broken.jpg"], crop_size=64, minimum_side=1000)


def test_photos_that_cannot_be_read_are_not_among_those_held_out(photos, encoder, tmp_path):
    (photos / "0.png").write_bytes(b"no photo")  # the first of all, which is held out
    small = Image.open(photos / "2.png").resize((120, 160))
    small.save(photos / "2.png")
    trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "run"))
    counts = {"train": 9, "held_out": 1, "skipped": 3, "unreadable": 2, "too_small": 1}
    assert trainer.record({})["photos"] == trainer.record({})["photos"] | counts
    (photos / "8.png").write_bytes(b"")
    with pytest.raises(ValueError, match="photos that can be read, got none among 1"):
        readable([photos / "8.png"])


def test_if_none_of_the_photos_held_out_is_usable_another_one_is():
    photos = list(range(12))
    assert split_usable(photos, lambda photo: photo != 0) == split_held_out(photos)
    train, held_out = split_usable(photos, lambda photo: photo not in (0, 1, 10))
    assert held_out == [0, 10, 2] and train == [1, 3, 4, 5, 6, 7, 8, 9, 11]
    for usable, count in ([], 0), ([3], 1), ([0, 10], 2):
        with pytest.raises(ValueError, match=f"expected photos that can be read to train on, .* got {count} among 12"):
            split_usable(photos, usable.__contains__)


def test_coherence_is_one_for_a_tile_of_any_sign_and_small_for_noise():
    generator = torch.Generator().manual_seed(0)
    options = {"window": 16, "offset": (0, 4), "samples": 100}
    tile = torch.randn(1, 3, 4, 4, generator=generator).repeat(4, 1, 24, 24)
    signed = tile * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1)
    noise = torch.randn(4, 3, 96, 96, generator=generator)
    assert coherence_loss(tile, **options).item() == pytest.approx(1, abs=0.01)
    assert coherence_loss(signed, **options).item() == pytest.approx(1, abs=0.01)
    assert coherence_loss(noise, **options).item() < 0.02
    # A pattern that varies over the photo but is the same for every photo counts, at the same place.
    assert coherence_loss(noise[:1].repeat(4, 1, 1, 1), **options).item() == pytest.approx(0.5, abs=0.05)


def test_losses_point_the_right_way():
    assert log_displacement_loss(torch.tensor([0.5, 0.5])) > log_displacement_loss(torch.tensor([1.0, 1.0]))
    assert log_displacement_loss(torch.zeros(2)).isfinite()
    quiet, loud = torch.full((1, 3, 8, 8), 6.0), torch.full((1, 3, 8, 8), 8.0)
    assert excess_power_loss(quiet, rms=6.4) == 0
    assert excess_power_loss(loud, rms=6.4).item() == pytest.approx((8 / 6.4) ** 2 - 1)


def test_what_training_composes_is_what_the_pipeline_adds():
    torch.manual_seed(0)
    generator = GAPDiffGenerator(channels=(8, 8), layers_per_block=(1, 1), native_size=32).eval()
    with torch.no_grad():
        generator.network.conv_out.weight.mul_(40)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pipeline = GAPDiffProtectionPipeline(generator)
    assert pipeline.perturbation_sizes(64, 64) == [(32, 32), (64, 64)]
    protected = pipeline.protect_batch([Photo(pixels=pixels)], 8 / 255)[0].pixels
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = (images * 255 + 8 * generator.perturb_at_sizes(images, [(32, 32), (64, 64)])).clamp(0, 255)
    difference = torch.from_numpy(protected).permute(2, 0, 1) - expected[0]
    assert difference.abs().max() <= 1  # 8-bit rounding of photo, perturbation and result
    assert np.abs(protected.astype(int) - pixels).max() == 8


def test_several_scales_cost_no_more_psnr_than_promised():
    torch.manual_seed(0)
    generator = GAPDiffGenerator(channels=(8, 8), layers_per_block=(1, 1), native_size=32, output_gain=6.0).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        generator.network.conv_out.weight.mul_(400)  # nearly all at the budget's ends
        assert generator.perturb_at_sizes(images, [(64, 64)]).square().mean() > 0.8
        power = generator.perturb_at_sizes(images, [(32, 32), (64, 64)]).square().mean(dim=(1, 2, 3))
    assert (power <= 1.02 * generator.most_power).all() and (power > 0.5).all()


def test_training_reduces_the_loss_and_leaves_the_encoder_alone(photos, encoder, tmp_path):
    trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "run", learning_rate=5e-3, coherence_weight=0.0))
    before = {k: v.clone() for k, v in trainer.encoders[0].state_dict().items()}
    source = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    first = trainer.training_step(source())["loss"]
    for _ in range(12):
        last = trainer.training_step(source())["loss"]
    assert last < first
    assert all(torch.equal(v, before[k]) for k, v in trainer.encoders[0].state_dict().items())


def test_an_encoder_sees_photos_at_its_resolution(photos, encoder, tmp_path):
    config = make_config(photos, encoder, tmp_path / "run", crop_size=128, encoder_resolutions=(256,))
    trainer = GAPDiffTrainer(config)
    images = torch.rand(2, 3, 128, 128, generator=seeded())
    seen = trainer._encode(trainer.encoders[0], images, 256)
    assert torch.equal(seen, trainer.encoders[0].encode_images(resize(images, (64, 64))))
    same = make_config(photos, encoder, tmp_path / "run", crop_size=128)
    name = "displacement/encoder"
    assert trainer.training_step(seeded())[name] != GAPDiffTrainer(same).training_step(seeded())[name]
    with pytest.raises(ValueError, match="as many encoder_resolutions as encoders"):
        make_config(photos, encoder, tmp_path, encoder_resolutions=(256, 512))


def test_an_encoder_counts_without_what_all_places_share(photos, encoder, tmp_path):
    changes = {"crop_size": 128, "rms_weight": 0.0, "coherence_weight": 0.0}
    figures, validated = [], []
    for centered in ((), (False,), (True,)):
        trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "run", encoder_centered=centered, **changes))
        source = seeded()
        for weight in trainer.generator.parameters():  # what is new adds next to nothing
            weight.data += 0.05 * torch.randn(weight.shape, generator=source)
        validated.append(trainer.validate())
        figures.append(trainer.training_step(seeded()))
    assert figures[0] == figures[1] and validated[0] == validated[1]
    assert figures[2]["displacement/encoder"] < figures[0]["displacement/encoder"]
    assert figures[2]["loss"] > figures[0]["loss"]
    assert validated[2]["held_out/centered/encoder"] < validated[2]["held_out/encoder"]
    assert "held_out/centered/encoder" not in validated[0]
    with pytest.raises(ValueError, match="as many encoder_centered as encoders"):
        make_config(photos, encoder, tmp_path, encoder_centered=(True, False))
    flags = training_parser(None, GAPDiffTrainingConfig).parse_args(["--encoder_centered", "false", "true"])
    assert flags.encoder_centered == [False, True]


def test_encoders_save_memory_where_they_can(photos, model, tmp_path):
    def gradient(checkpointing):
        trainer = GAPDiffTrainer(
            make_config(photos, model, tmp_path / "run", gradient_checkpointing=checkpointing, max_grad_norm=0.0)
        )
        assert trainer.encoders[0].encoder.is_gradient_checkpointing is checkpointing
        return trainer.training_step(seeded())["gradient_norm"]

    assert gradient(True) == pytest.approx(gradient(False), rel=1e-4)


@torch.no_grad()
def clean_latents(surrogate, images):
    return surrogate.encode_images(images)


def test_a_tiny_autoencoder_that_is_to_save_memory_encodes_what_it_did_before(photos, tmp_path):
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks).save_pretrained(tmp_path / "vae")
    trainer = GAPDiffTrainer(make_config(photos, tmp_path / "vae", tmp_path / "run", gradient_checkpointing=True))
    images = torch.rand(1, 3, 32, 32, generator=seeded(), requires_grad=True)
    latents = trainer.encoders[0].encode_images(images)
    assert latents.requires_grad and torch.equal(latents, clean_latents(trainer.encoders[0], images))


def test_what_a_transform_shrinks_is_learned_at_its_size(photos, encoder, model, tmp_path):
    transform = {"name": "resize", "scale": 0.5}
    for config, network in (
        (
            make_config(photos, encoder, tmp_path, transform=transform, scale_factors=([[1, 1]],), scale_weights=(1,)),
            0,
        ),
        (diffusion_config(photos, model, tmp_path, transform=transform, surrogate_resolutions=(256,)), 1),
    ):
        trainer = GAPDiffTrainer(config)
        seen, part = [], trainer.surrogates[0].vae.encoder if network else trainer.encoders[0].encoder
        part.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[-1]))
        trainer.training_step(seeded())
        assert set(seen) == {32 if network else 64}


def test_a_run_goes_on_with_the_photos_it_began_with(photos, encoder, tmp_path):
    config = make_config(photos, encoder, tmp_path / "run", max_train_steps=2)
    GAPDiffTrainer(config).train()
    Image.open(photos / "2.png").save(photos / "20.png")
    with pytest.raises(ValueError, match=r"checkpoint-2 is of a run on other photos; resume with those it had"):
        GAPDiffTrainer(config).train(resume="latest")


def test_runs_of_different_precision_in_one_process(photos, encoder, tmp_path):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path, mixed_precision=precision))
        seen = []
        trainer.generator.network.conv_out.register_forward_hook(lambda *data, seen=seen: seen.append(data[2].dtype))
        assert trainer.training_step(seeded())["gradient_norm"] > 0
        assert set(seen) == {dtype}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    FAMILIES["sd-epsilon"]().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def diffusion_config(photos, model, output_dir, **changes):
    settings = {"encoders": (), "encoder_weights": (), "encoder_crop_sizes": (), "surrogates": (model,)}
    settings |= {"surrogate_weights": (1.0,), "surrogate_resolutions": (512,), "surrogate_learning_rates": (0.0,)}
    settings |= {"coherence_weight": 0.0, "rms_weight": 0.0, "transform": "identity", "scale_factors": ([[1, 1]],)}
    settings |= {"surrogate_prior_weight": 0.0, "num_class_images": 2, "num_inference_steps": 2}
    return make_config(photos, None, output_dir, **settings | {"scale_weights": (1.0,)} | changes)


def seeded():
    return torch.Generator().manual_seed(7)


def test_against_a_diffusion_model_the_loss_is_minus_its_own(photos, model, tmp_path):
    trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", learning_rate=3e-3))
    weights = [parameter.clone() for parameter in trainer.surrogates[0].parameters()]
    first = trainer.training_step(seeded())
    assert first["loss"] == pytest.approx(-first["denoising/model"])
    for _ in range(15):
        last = trainer.training_step(seeded())
    assert last["denoising/model"] > first["denoising/model"]
    for before, after in zip(weights, trainer.surrogates[0].parameters(), strict=True):
        assert torch.equal(before, after) and not after.requires_grad


def test_stages_weigh_protected_and_preprocessed_photos(photos, model, tmp_path):
    config = diffusion_config(photos, model, tmp_path, stages=([0.5, 0.0, 1.0], [1.0, 0.6, 0.4]), max_train_steps=4)
    trainer = GAPDiffTrainer(config)
    for step in range(4):
        trainer.step = step
        figures = trainer.training_step(seeded())
        expected = -figures["denoising/model"]
        if step >= 2:
            expected = 0.4 * expected - 0.6 * figures["protected/denoising/model"]
        assert figures["loss"] == pytest.approx(expected)
        assert ("protected/denoising/model" in figures) is (step >= 2)


def test_noise_timesteps_and_resolution_are_as_asked_for(photos, model, tmp_path):
    def loss(**changes):
        trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path, **changes))
        seen = trainer._as_seen_by(0, torch.full((2, 3, 64, 64), 0.5))
        return trainer._denoising_loss(0, seen, trainer.prompts[0], seeded())

    plain = loss()
    assert loss() == plain
    for changes in ({"noise": "uniform"}, {"timestep_weighting": "linear"}, {"surrogate_resolutions": (256,)}):
        assert abs(loss(**changes) - plain) > 1e-3, changes
    # Uniform noise has a mean square of 1/3, Gaussian of 1; an untrained denoiser predicts nearly nothing.
    assert loss(noise="uniform") < 0.6 * plain


@pytest.mark.parametrize("judged", ["protected", "preprocessed"])
def test_the_discriminator_learns_to_tell_and_the_generator_hears_of_it(photos, model, tmp_path, judged):
    settings = {"gan_weight": 0.5, "discriminator_input": judged, "learning_rate": 2e-3}
    trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", **settings))
    figures = [trainer.training_step(seeded()) for _ in range(15)]
    assert figures[0]["loss"] == pytest.approx(0.5 * figures[0]["loss/gan"] - figures[0]["denoising/model"])
    assert figures[-1]["loss/discriminator"] < figures[0]["loss/discriminator"]


def test_the_discriminator_sees_what_it_is_told_to(photos, model, tmp_path):
    def judged(discriminator_input, transform):
        settings = {"gan_weight": 0.5, "discriminator_input": discriminator_input, "transform": transform}
        trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", **settings))
        return trainer.training_step(seeded())["loss/discriminator"]

    plain = judged("protected", "identity")
    assert judged("protected", "gaussian_blur") == pytest.approx(plain, abs=1e-6)
    assert abs(judged("preprocessed", "gaussian_blur") - plain) > 1e-5


def test_an_autoencoder_alone_is_no_surrogate_to_learn(photos, model, tmp_path):
    config = diffusion_config(photos, model + "/vae", tmp_path / "run", surrogate_learning_rates=(1e-3,))
    with pytest.raises(ValueError, match="name it among the encoders"):
        GAPDiffTrainer(config)


def test_a_surrogate_learns_as_an_attacker_would(photos, model, tmp_path):
    def learned(**changes):
        changes |= {"surrogate_learning_rates": (1e-3,)}
        trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", **changes))
        return trainer.training_step(seeded())

    plain, other = learned(), learned(noise="uniform", timestep_weighting="linear")
    assert other["learned/model"] > 2 * other["denoising/model"]  # of Gaussian noise again
    assert plain["learned/model"] == pytest.approx(plain["denoising/model"], rel=0.5)
    assert "prior/model" not in plain


def test_a_surrogate_learns_protected_and_preprocessed_photos_as_they_count(photos, model, tmp_path):
    def learned(stage, transform):
        changes = {"surrogate_learning_rates": (1e-3,)}
        config = diffusion_config(photos, model, tmp_path / "run", stages=(stage,), transform=transform, **changes)
        return GAPDiffTrainer(config).training_step(seeded())["learned/model"]

    protected, blur = learned([1, 1, 0], "identity"), {"name": "gaussian_blur", "kernel_size": 21, "sigma": 8.0}
    assert learned([1, 1, 0], blur) == pytest.approx(protected, abs=1e-6)
    assert learned([1, 0, 1], "identity") == pytest.approx(protected, abs=1e-6)
    assert abs(learned([1, 0, 1], blur) - protected) > 1e-5


def test_a_surrogate_that_learns_pays_for_what_becomes_of_its_class(photos, model, tmp_path):
    def learner(name, weight):
        changes = {"surrogate_learning_rates": (1e-3,), "surrogate_resolutions": (64,)}
        config = diffusion_config(photos, model, tmp_path / name, surrogate_prior_weight=weight, **changes)
        return GAPDiffTrainer(config)

    with_prior, without = learner("with", 1.0), learner("without", 0.0)
    pictures = with_prior.class_images[0]
    assert pictures.shape == (2, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    assert not without.class_images
    figures = with_prior.training_step(seeded())
    assert figures["prior/model"] > 0
    assert figures["learned/model"] == without.training_step(seeded())["learned/model"]
    pairs = zip(with_prior.surrogates[0].denoiser.parameters(), without.surrogates[0].denoiser.parameters())
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_in_bf16_a_surrogate_that_learns_keeps_its_weights_in_float32(photos, model, tmp_path):
    changes = {"surrogate_learning_rates": (1e-3,), "mixed_precision": "bf16"}
    trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", **changes))
    surrogate = trainer.surrogates[0]
    assert (surrogate.denoiser.dtype, surrogate.vae.dtype) == (torch.float32, torch.bfloat16)
    seen = []
    surrogate.denoiser.conv_out.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    figures = trainer.training_step(seeded())
    assert seen and set(seen) == {torch.bfloat16}
    assert all(math.isfinite(value) for value in figures.values())


def test_a_surrogate_that_may_learn_learns_the_protected_photos_and_survives_a_checkpoint(photos, model, tmp_path):
    changes = {"surrogate_learning_rates": (1e-3,), "surrogate_learning_steps": 2, "checkpointing_steps": 3}
    trainer = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", max_train_steps=3, **changes))
    before = [parameter.clone() for parameter in trainer.surrogates[0].denoiser.parameters()]
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert ["learned/model" in entry for entry in log] == [True, False, True]
    learned = list(trainer.surrogates[0].denoiser.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, learned, strict=True))
    assert not any(parameter.requires_grad for parameter in trainer.surrogates[0].parameters())
    again = GAPDiffTrainer(diffusion_config(photos, model, tmp_path / "run", max_train_steps=3, **changes))
    again.load_checkpoint(find_checkpoint(tmp_path / "run"))
    for old, new in zip(learned, again.surrogates[0].denoiser.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("path", sorted((ROOT / "training_scripts" / "configs").glob("gap_diff*.json")), ids=str)
def test_the_configs_that_ship_are_valid(path):
    settings = json.loads(path.read_text())
    names = {"encoders": ("a", "b", "c")[: len(settings["encoder_weights"])]} if "encoder_weights" in settings else {}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = GAPDiffTrainingConfig(train_data_dir=("photos",), output_dir="out", **names | settings)
    assert build_transform(config.transform).train().differentiable
    assert all(isinstance(name, str) for name in config.surrogates)


def test_the_defaults_are_those_of_a_run_that_was_measured():
    first = json.loads((ROOT / "training_scripts" / "configs" / "gap_diff_encoders_first.json").read_text())
    names = ("rms", "rms_weight", "coherence_weight", "transform", "scale_factors", "scale_weights", "crop_size")
    config = GAPDiffTrainingConfig(
        train_data_dir=("photos",),
        output_dir="out",
        encoders=("a",),
        encoder_weights=(1.0,),
        encoder_crop_sizes=(0,),
    )
    for name in names:
        assert json.loads(json.dumps(getattr(config, name))) == first[name]


def test_the_papers_configs_differ_in_what_they_are_named_after():
    def settings(name):
        return json.loads((ROOT / "training_scripts" / "configs" / f"gap_diff_{name}.json").read_text())

    paper = settings("paper")
    for name in ("gaussian_blur", "jpeg_mask", "without_preprocessing"):
        assert settings(f"paper_{name}") == paper | {"transform": settings(f"paper_{name}")["transform"]}
    assert settings("paper_time_weighting") == paper | {"timestep_weighting": "linear"}
    assert settings("paper_learning_surrogate") == paper | {"surrogate_learning_rates": [5e-7]}
    assert settings("released") == paper | {"noise": "uniform", "discriminator_input": "preprocessed"}


def test_a_resumed_run_equals_an_uninterrupted_one(photos, encoder, model, tmp_path):
    class Noting(GAPDiffTrainer):
        """Keeps what each part of a step measured; ends like one who is interrupted before a step."""

        end = None

        def training_step(self, generator):
            if self.step == self.end:
                raise KeyboardInterrupt
            figures = super().training_step(generator)
            self.__dict__.setdefault("noted", []).append((self.step, figures))
            return figures

    def run(name):
        changes = {"surrogates": (model,), "surrogate_weights": (0.5,), "surrogate_resolutions": (64,)}
        changes |= {"surrogate_learning_rates": (1e-3,), "surrogate_learning_steps": 2, "gan_weight": 0.1}
        changes |= {"gradient_accumulation_steps": 2, "stages": ([0.5, 0, 1], [1, 0.6, 0.4])}
        changes |= {"scale_factors": ([[0.5, 1]],), "scale_weights": (1.0,), "num_validation_images": 1}
        changes |= {"num_class_images": 2, "num_inference_steps": 2}
        return Noting(make_config(photos, encoder, tmp_path / name, **changes))

    whole, interrupted = run("whole"), run("parts")
    whole.train()
    interrupted.end = 3
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    torch.manual_seed(99)  # which nothing may depend on
    resumed = run("parts")
    resumed.train(resume="latest")
    assert [step for step, _ in resumed.noted] == [2, 2, 3, 3]
    losses = [resumed.validate()[f"held_out/denoising/model{kind}"] for kind in ("", " clean", "")]
    assert losses[0] == losses[2] != losses[1]  # equal draws, other photos
    of_checkpoint = GAPDiffGenerator.from_pretrained(checkpoints(tmp_path / "parts")[-1], subfolder="generator")
    for parameter, again in zip(resumed.generator.parameters(), of_checkpoint.parameters(), strict=True):
        assert torch.equal(parameter, again)  # the averaged weights, which the run ends with
    for (_, expected), (_, actual) in zip(whole.noted[4:], resumed.noted, strict=True):
        assert actual == pytest.approx(expected, abs=1e-6, rel=0)
        assert {"loss/gan", "loss/discriminator", "protected/denoising/model"} <= set(actual)
    assert list(whole.networks) == ["generator", "discriminator", "denoiser 0"]
    for name, network in whole.networks.items():
        for parameter, again in zip(network.parameters(), resumed.networks[name].parameters(), strict=True):
            torch.testing.assert_close(again, parameter, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["sd-v", "sdxl", "sd3", "flux-dev"])
def test_every_family_of_models_is_trained_against_and_learns(photos, family, tmp_path):
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    changes = {"surrogate_learning_rates": (1e-3,), "timestep_weighting": "linear", "rms_weight": 0.0}
    trainer = GAPDiffTrainer(diffusion_config(photos, str(tmp_path / "model"), tmp_path / "run", **changes))
    before = [parameter.clone() for parameter in trainer.surrogates[0].denoiser.parameters()]
    figures = trainer.training_step(seeded())
    assert figures["loss"] == pytest.approx(-figures["denoising/model"])
    assert figures["gradient_norm"] > 0 and figures["learned/model"] > 0
    learned = trainer.surrogates[0].denoiser.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, learned, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_weights": (1.0, 2.0)}, "as many encoder_weights"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"transform": "jpgg"}, "jpgg"),
        ({"train_data_dir": ("nowhere",)}, "nowhere"),
        ({"surrogates": ("model",)}, "as many surrogate_weights as surrogates"),
        ({"encoders": (), "encoder_weights": (), "encoder_crop_sizes": ()}, "got neither"),
        ({"noise": "pink"}, "gaussian, uniform"),
        ({"stages": ([0.5, 0, 1],)}, "the last at 1"),
        ({"stages": ()}, "beta, gamma"),
        ({"stages": "released code"}, "released, preprocessed"),
        ({"stages": [0.5, 0, 1]}, r"list of \[end, beta, gamma\], got \[0.5, 0, 1\]"),
        ({"stages": [[1, None, 1]]}, r"list of \[end, beta, gamma\]"),
        ({"scale_factors": ([1, 1],), "scale_weights": (1.0,)}, r"as \[\[\[1, 1\]\]\], got \(\[1, 1\],\)"),
        ({"scale_factors": ([[1, 0.5]],), "scale_weights": (1.0,)}, r"scale_factors .* ranges \[low, high\]"),
        ({"scale_factors": ([[0, 1]],), "scale_weights": (1.0,)}, "above 0"),
        ({"scale_factors": "1"}, "scale_factors as a list"),
        ({"scale_weights": (0.0,) * 5}, "scale_weights of at least 0, not all 0"),
        ({"scale_weights": (1.0, 1.0, 1.0, 1.0, -1.0)}, "scale_weights of at least 0"),
        ({"crop_size": 50}, r"got \[0.3, 1.6\], which makes of a crop_size of 50 also 15 px; .* takes is 16 px"),
        ({"architecture": "paper", "channels": (4,), "layers_per_block": ()}, "the paper network .* is 512 px"),
        ({"crop_scales": (1.2, 0.8)}, "crop_scales as a range"),
        ({"train_batch_size": 1}, "at least 2, got 1: .* or set coherence_weight to 0"),
        ({"eps": 0.0313}, "whole levels, got 0.0313, which is 7.9815; write 8/255"),
        ({"crop_size": 500}, "at most"),
        ({"encoder_revisions": ("a", "b")}, "as many encoder_revisions as encoders"),
        ({"init_from": str(ROOT)}, "has no generator"),
        ({"crop_size": 64.5}, "crop_size of type int"),
        ({"gan_weight": -1.0}, "gan_weight of at least 0"),
        ({"encoder_weights": (-1.0,)}, "encoder_weights of at least 0"),
        ({"encoder_crop_sizes": (-8,)}, "encoder_crop_sizes of at least 0"),
        ({"encoder_resolutions": (0,)}, "encoder_resolutions of at least 1"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler one of constant, .*, got 'piecewise_constant'"),
        ({"eps": 8.0}, "8 levels are written 8/255"),
        ({"rms": 0.0}, "rms above 0"),
        ({"crop_size": 24, "scale_factors": ([[1, 1]],), "scale_weights": (1.0,)}, "crop_size of at least 28, got 24"),
        (
            {"minimum_side": 1000},
            "at least 1000 px a side, got none among 11: .*; add larger ones, or lower minimum_side",
        ),
    ],
)
def test_settings_that_do_not_work_are_named(photos, encoder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GAPDiffTrainer(make_config(photos, encoder, tmp_path, **changes))


def test_nothing_is_written_among_the_photos(photos, encoder):
    for folder in (photos, photos / "run"):
        with pytest.raises(ValueError, match=r"the output .* the input folder .* choose a folder outside of it"):
            make_config(photos, encoder, folder)


def test_a_transform_that_gradients_do_not_pass_is_refused(photos, encoder, model, tmp_path):
    purification = {"name": "diffpure", "model": model, "steps": 1}
    for transform in (purification, {"name": "random_choice", "choices": ["jpeg", ["identity", purification]]}):
        with pytest.raises(ValueError, match=r"expected a transform that gradients pass, got .* DiffPure stops them"):
            GAPDiffTrainer(make_config(photos, encoder, tmp_path, transform=transform))


def test_one_photo_a_step_is_enough_where_none_are_compared(photos, encoder, tmp_path):
    trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path, train_batch_size=1, coherence_weight=0.0))
    assert trainer.training_step(seeded())["gradient_norm"] > 0


def test_the_script_trains_saves_and_records(photos, encoder, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"encoder_weights": [1.0], "encoder_crop_sizes": [32], "channels": [8, 8]}))
    command = [sys.executable, str(ROOT / "training_scripts" / "train_gap_diff.py"), "--config", str(config)]
    command += ["--train_data_dir", str(photos), "--encoders", str(encoder), "--output_dir", str(tmp_path / "out")]
    command += ["--layers_per_block", "1", "1", "--crop_size", "64", "--train_batch_size", "2"]
    command += ["--max_train_steps", "2", "--num_validation_images", "2", "--mixed_precision", "no"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "found no face in any of 11 of the 11 photos" in done.stderr
    assert (tmp_path / "out" / "pipeline_gap_diff_protection.py").is_file()  # for those without the package
    pipeline = GAPDiffProtectionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.generator.config.channels == [8, 8]
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert record["steps"] == 2
    assert record["photos"] == record["photos"] | {"train": 10, "held_out": 2, "skipped": 1}
    assert "held_out/encoder" in record["figures"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'GAPDiffProtectionPipeline.from_pretrained("out")' in card and "samples/2.png" not in card
    assert Image.open(tmp_path / "out" / "samples" / "2.png").size == (3 * 512, 2 * 512)
    assert str(tmp_path) not in json.dumps(record) + card
    assert record["config"]["crop_size"] == 64 and "torch" in record["versions"]
    assert record["num_processes"] == 1 and record["device"] in ("cpu", "cuda")

    config.write_text(json.dumps({"learning_rat": 1}))
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "learning_rat" in refused.stderr and "learning_rate" in refused.stderr


def test_average_checkpoints_mixes_the_weights_and_records_both(make_pipeline, tmp_path):
    for seed, name in enumerate(("first", "second")):
        make_pipeline(seed).save_pretrained(tmp_path / name)
        (tmp_path / name / "training_record.json").write_text(json.dumps({"seed": seed}))
    command = [sys.executable, str(ROOT / "training_scripts" / "average_checkpoints.py"), "first", "second"]
    command += ["--share", "0.25", "--output_gain", "1.5", "--output_dir", "averaged"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, averaged = (
        GAPDiffGenerator.from_pretrained(tmp_path / name, subfolder="generator")
        for name in ("first", "second", "averaged")
    )
    assert averaged.config.output_gain == 1.5
    for name, parameter in averaged.named_parameters():
        expected = 0.75 * first.get_parameter(name) + 0.25 * second.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    record = json.loads((tmp_path / "averaged" / "training_record.json").read_text())
    assert record["second"] == {"seed": 1} and record["average"]["share_of_the_second"] == 0.25
    assert record["first"] == {"seed": 0}
    trained_on = {"seed": 1, "initial_weights": {"average": {}, "second": {"seed": 2, "initial_weights": {"seed": 0}}}}
    (tmp_path / "second" / "training_record.json").write_text(json.dumps(trained_on))
    done = subprocess.run([*command, "--output_dir", "again"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "again" / "training_record.json").read_text())
    assert record["first"] == "the second, its initial_weights, its second, its initial_weights"
    (tmp_path / "first" / "training_record.json").unlink()
    refused = subprocess.run([*command, "--output_dir", "other"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0 and "training_record.json" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()
    refused = subprocess.run([*command, "--share", "2"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0 and "from 0 to 1, got 2" in refused.stderr


def test_weights_without_a_keyed_grid_can_get_one(photos, encoder, tmp_path):
    first = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "first"))
    GAPDiffProtectionPipeline(first.generator).save_pretrained(tmp_path / "plain", include_remote_code=False)
    config = make_config(photos, encoder, tmp_path / "second", init_from=str(tmp_path / "plain"), keyed_grid=True)
    trainer = GAPDiffTrainer(config)
    assert trainer.generator.network.keyed_grid and trainer.generator.config.keyed_grid
    for name, value in first.generator.state_dict().items():
        assert torch.equal(trainer.generator.state_dict()[name], value)
    assert trainer.record({})["config"]["keyed_grid"] is True


def test_the_weights_that_ship_can_be_trained_on_by_name(photos, encoder, tmp_path):
    trainer = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "more", init_from="bundled"))
    shipped = GAPDiffProtectionPipeline.from_bundled()
    for name, value in shipped.generator.state_dict().items():
        assert torch.equal(trainer.generator.state_dict()[name], value)
    record = trainer.record({})
    assert record["config"]["init_from"] == "bundled"
    assert record["initial_weights"] == json.loads((BUNDLED_CHECKPOINT / "training_record.json").read_text())


def test_weights_keep_their_gain_and_grid_where_nothing_else_is_asked_for(photos, encoder, tmp_path):
    first = GAPDiffTrainer(make_config(photos, encoder, tmp_path / "first", keyed_grid=True, output_gain=1.09))
    GAPDiffProtectionPipeline(first.generator).save_pretrained(tmp_path / "keyed", include_remote_code=False)

    def trained_on(**changes):
        changes["init_from"] = str(tmp_path / "keyed")
        return GAPDiffTrainer(make_config(photos, encoder, tmp_path / "second", **changes))

    for changes, gain, keyed in (({}, 1.09, True), ({"output_gain": 1.0, "keyed_grid": False}, 1.0, False)):
        trainer = trained_on(**changes)
        assert (trainer.generator.network.output_gain, trainer.generator.network.keyed_grid) == (gain, keyed)
        config = trainer.record({})["config"]
        assert (config["output_gain"], config["keyed_grid"]) == (gain, keyed)
