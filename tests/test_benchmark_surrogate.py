"""`gap-diff benchmark surrogate` and `training`, end to end on a tiny model: they say what they found."""

import json
import shutil

import pytest
import torch
from PIL import Image

from gap_diff_diffusers import benchmark_displacement, load_surrogate
from gap_diff_diffusers.cli import main


@pytest.fixture
def model(tiny_model, tmp_path):
    return str(shutil.copytree(tiny_model, tmp_path / "model"))


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
    ours, same_work, theirs = record["seconds"].values()
    assert list(record["ratios"].values()) == pytest.approx([theirs / ours, theirs / same_work])
    assert f"| ratio: this package | {record['ratios']['this package']:.1f} |" in capsys.readouterr().out
