"""`gap-diff benchmark identity`, `surrogate` and `training`, end to end on a tiny model: they say what they found."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_metrics import ASTRONAUT
from test_surrogate_training import make_config

from gap_diff_diffusers import benchmark_displacement, benchmark_identity, finetuning, load_surrogate
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.finetuning import DreamBoothConfig
from gap_diff_diffusers.protections import anti_dreambooth
from gap_diff_diffusers.protections.anti_dreambooth import ASPLConfig
from gap_diff_diffusers.training.surrogate import AutoencoderTrainer, DenoiserTrainer


@pytest.fixture
def model(photos, tmp_path):
    config = make_config(photos, tmp_path)
    DenoiserTrainer(config, AutoencoderTrainer(config).vae).pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def people(tmp_path):
    photo = Image.open(ASTRONAUT).convert("RGB").crop((100, 0, 356, 256))
    for person in ("first", "second"):
        for part in ("set_A", "set_B", "set_C"):
            (tmp_path / "people" / person / part).mkdir(parents=True)
            photo.save(tmp_path / "people" / person / part / "0.png")
    return tmp_path / "people"


def test_identity_attacks_every_variant_of_every_person(model, people, checkpoint, tmp_path, monkeypatch, capsys):
    settings = {"max_train_steps": 1, "num_class_images": 2, "num_inference_steps": 2, "learning_rate": 1e-2}
    attack = DreamBoothConfig(resolution=64, **settings)
    monkeypatch.setattr(finetuning, "FACE_MODEL_ATTACK", attack)
    monkeypatch.setattr(anti_dreambooth, "ASPLConfig", partial(ASPLConfig, rounds=1, pgd_steps=1, surrogate_steps=1))
    output = tmp_path / "identity.json"
    command = ["benchmark", "identity", "--people", str(people), "--model", model, "--checkpoint", checkpoint]
    command += ["--count", "2", "--output", str(output), "--pictures", str(tmp_path / "pictures")]
    assert main(command) == 0
    record = json.loads(output.read_text())
    assert [(r["person"], r["variant"]) for r in record["results"]] == [
        (person, variant) for person in ("first", "second") for variant in benchmark_identity.VARIANTS
    ]
    assert all(r["fdfr"] == 1 and r["recognised"] == 0 for r in record["results"])  # noise has no face
    assert record["attack"]["max_train_steps"] == 1 and record["checkpoint"] == Path(checkpoint).name
    assert "| clean | 0% | 100% | 0% | 0% |" in capsys.readouterr().out
    pictures = [
        (tmp_path / "pictures" / f"first {variant}.png").read_bytes() for variant in benchmark_identity.VARIANTS
    ]
    assert len(set(pictures)) == 4  # each learned other photos
    assert (tmp_path / "pictures" / "second clean.png").read_bytes() == pictures[0]  # or, these two, the same


def test_the_table_has_means_over_people():
    results = [
        {"person": person, "variant": "clean", "recognised": recognised, "fdfr": fdfr, "seconds": seconds}
        for person, recognised, fdfr, seconds in (("a", 1.0, 0.0, 100.0), ("b", 0.5, 0.25, 200.0))
    ]
    table = benchmark_identity.to_markdown({"model": "m", "pictures": 32, "results": results})
    assert "| clean | 75% | 12% | 100% | 50% | 200 s |" in table


def test_people_that_are_not_there_are_named(people):
    assert [path.name for path in benchmark_identity.find_people(people, ["second"])] == ["second"]
    with pytest.raises(ValueError, match="found none for third"):
        benchmark_identity.find_people(people, ["third"])
    with pytest.raises(ValueError, match=r"found none$"):
        benchmark_identity.find_people(people / "first" / "set_B")
    (people / "second" / "set_A" / "0.png").unlink()
    (people / "second" / "set_A").rmdir()
    assert len(benchmark_identity.find_people(people, variants=["clean"])) == 2
    with pytest.raises(ValueError, match="expected a folder set_A"):
        benchmark_identity.find_people(people, variants=["ASPL, then JPEG 70"])
    (people / "first" / "set_C" / "0.png").unlink()
    (people / "first" / "set_C").rmdir()
    with pytest.raises(ValueError, match="expected a folder set_C"):
        benchmark_identity.find_people(people)


def test_surrogate_measures_the_autoencoder_and_counts_faces(model, photos, tmp_path, capsys):
    output = tmp_path / "surrogate.json"
    command = ["benchmark", "surrogate", "--photos", str(photos), "--model", model, "--resolution", "64"]
    command += ["--count", "1", "--samples", "2", "--output", str(output), "--pictures", str(tmp_path / "s.png")]
    assert main(command) == 0
    record = json.loads(output.read_text())
    assert record["held_out"] == 2 and record["samples"] == 2 and record["no_face"] == 1
    assert record["pgd_displacement"] > 0 and 0 < record["psnr"] < 30
    assert f"| {record['psnr']:.1f} dB |" in capsys.readouterr().out
    assert Image.open(tmp_path / "s.png").size == (128, 64)
    assert "jpeg_quality" in record and "checkpoint" not in record

    command[command.index(model)] = f"{model}/vae"
    assert main(command) == 0
    assert json.loads(output.read_text())["psnr"] == pytest.approx(record["psnr"])
    assert "samples" not in json.loads(output.read_text()) and "samples" not in capsys.readouterr().out


def test_displacement_without_a_change_is_zero(model):
    surrogate = load_surrogate(model)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert benchmark_displacement.mean_displacement(surrogate, images, images) == 0
    assert benchmark_displacement.mean_displacement(surrogate, images, 1 - images) > 0


@pytest.mark.slow
def test_training_times_both_loops(model, photos, tmp_path, capsys):
    output = tmp_path / "training.json"
    command = ["benchmark", "training", "--photos", str(photos), "--model", model, "--steps", "1"]
    assert main([*command, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    ours, theirs = record["seconds"].values()
    assert record["ratio"] == pytest.approx(theirs / ours)
    assert f"| ratio | {record['ratio']:.1f} |" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["identity", "surrogate", "training"])
def test_there_is_no_model_unless_one_is_named(benchmark, photos, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", benchmark, "--people" if benchmark == "identity" else "--photos", str(photos)])
    assert "--model" in capsys.readouterr().err
