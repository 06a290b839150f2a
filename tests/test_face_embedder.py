"""The face embedder of SER-FIQ: its dropout, its training, and what ships."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gap_diff_diffusers
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.data import to_tensor
from gap_diff_diffusers.metrics.quality import FACE_EMBEDDER, SerFiq
from gap_diff_diffusers.models.face_embedder import FACE_SIZE, FaceEmbedder
from gap_diff_diffusers.training.face_embedder import MARGIN, FaceEmbedderConfig, disturb, train_face_embedder

SCRIPTS = Path(__file__).parents[1] / "training_scripts"
ASTRONAUT = Path(gap_diff_diffusers.__file__).parent / "examples" / "astronaut.png"


@pytest.fixture(scope="module")
def metric():
    return SerFiq()


@pytest.fixture(scope="module")
def face(metric):
    photo = to_tensor(Image.open(ASTRONAUT))
    return metric.faces.align(photo, FACE_SIZE)[0]


@pytest.fixture
def photos(tmp_path):
    """Photos of one face, some without any: the first is held out."""
    image = Image.open(ASTRONAUT).convert("RGB").crop((60, 0, 380, 320))
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        image.resize((256 + 32 * index,) * 2).save(folder / f"{index}.png")
    Image.new("RGB", (256, 256)).save(folder / "4.png")
    return folder


def test_dropout_changes_embeddings_but_not_their_mean(face):
    torch.manual_seed(0)
    network = FaceEmbedder().eval()
    with torch.no_grad():
        drawn = network.draw_embeddings(face[None], 4000, torch.Generator().manual_seed(0))
        assert drawn.shape == (1, 4000, 128)
        spread = drawn.std(1) / 4000**0.5
        assert ((drawn.mean(1) - network(face[None])).abs() < 5 * spread).all() and (spread > 0).all()
        both = network.draw_embeddings(torch.stack([face.flip(2), face]), 5, torch.Generator().manual_seed(0))
        assert torch.allclose(both[1], drawn[0, :5], atol=1e-5)


def test_a_face_is_aligned_within_its_margin(metric, face):
    photo = to_tensor(Image.open(ASTRONAUT))
    wide, *_ = metric.faces.cut(metric.faces.locate(photo), FACE_SIZE, MARGIN)
    assert wide.shape == (3, FACE_SIZE + 2 * MARGIN, FACE_SIZE + 2 * MARGIN)
    assert (wide[:, MARGIN:-MARGIN, MARGIN:-MARGIN] - face).abs().mean() < 0.02
    assert metric.faces.align(torch.zeros(3, 200, 200), FACE_SIZE) == []


def test_ser_fiq_falls_as_a_face_is_hidden(metric, face):
    small = torch.nn.functional.interpolate(face[None], (10, 10), mode="area")
    blurred = torch.nn.functional.interpolate(small, (FACE_SIZE,) * 2, mode="bilinear")[0]
    covered = face.clone()
    covered[:, 20:70] = 0.5
    clear, *worse = metric.score(torch.stack([face, blurred, covered, face * 0.05])).tolist()
    assert 0 < max(worse) < clear < 1


def test_ser_fiq_is_what_the_paper_defines(metric, face):
    """2 sigmoid(-d), d the mean distance of all pairs of normalized embeddings (arXiv 2003.09373, equation 1)."""
    with torch.no_grad():
        drawn = metric.network.draw_embeddings(face[None], 100, torch.Generator().manual_seed(0))[0].double().numpy()
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    distances = [np.linalg.norm(drawn[i] - drawn[j]) for i in range(100) for j in range(i)]
    assert metric.score(face[None]).item() == pytest.approx(2 / (1 + np.exp(np.mean(distances))), abs=1e-5)


def test_a_picture_without_a_face_has_no_ser_fiq_or_0(metric):
    photo = to_tensor(Image.open(ASTRONAUT))
    some, every = metric([photo, torch.zeros_like(photo)])
    assert some.values[1] is None and every.values == [some.values[0], 0]
    with pytest.raises(ValueError, match="expected pictures"):
        metric([])


def test_disturbing_is_repeatable_and_keeps_the_range(face):
    for seed in range(20):
        one, other = (disturb(face, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(one, other) and one.shape == face.shape
        assert one.min() >= 0 and one.max() <= 1 and (one - face).abs().max() > 0.05


def test_training_learns_and_resumes_as_if_it_had_not_stopped(photos, tmp_path):
    settings = {
        "train_data_dir": (str(photos),),
        "max_train_steps": 8,
        "train_batch_size": 4,
        "lr_warmup_steps": 0,
        "checkpointing_steps": 4,
        "mixed_precision": "no",
        "disturbed": 0.0,
    }
    whole, record = train_face_embedder(FaceEmbedderConfig(output_dir=str(tmp_path / "whole"), **settings))
    assert record["photos"] == {"train": 3, "held_out": 1, "skipped": 1, "rule": record["photos"]["rule"]}
    assert "output_dir" not in record["config"] and str(tmp_path) not in json.dumps(record)
    config = FaceEmbedderConfig(output_dir=str(tmp_path / "part"), stop_after_steps=4, **settings)
    train_face_embedder(config)
    rest, _ = train_face_embedder(FaceEmbedderConfig(output_dir=config.output_dir, **settings), resume="latest")
    losses = [
        [json.loads(line)["loss"] for line in (Path(run.output_dir) / "training_log.jsonl").read_text().splitlines()]
        for run in (whole, rest)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 8
    assert losses[0][-1] < losses[0][0]


def test_photos_without_faces_are_an_error(photos, tmp_path):
    for path in photos.iterdir():
        Image.new("RGB", (256, 256)).save(path)
    with pytest.raises(ValueError, match="found none in 4"):
        config = {"output_dir": str(tmp_path / "run"), "train_data_dir": (str(photos),), "mixed_precision": "no"}
        train_face_embedder(FaceEmbedderConfig(**config))


def test_the_quality_benchmark_compares_each_face_with_itself(photos, tmp_path, capsys):
    command = ["benchmark", "quality", "--photos", str(photos), "--output", str(tmp_path / "figures.json")]
    assert main(command) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["photos"] == 5 and figures["faces"] == 4
    assert set(figures["lower"].values()) <= {0, 0.25, 0.5, 0.75, 1} and figures["set"] == "photos"
    assert figures["kinds"]["blurred"] == pytest.approx(
        np.mean([share for name, share in figures["lower"].items() if "blurred" in name])
    )
    assert "| left half covered | 100% |" in capsys.readouterr().out
    for path in photos.iterdir():
        Image.new("RGB", (256, 256)).save(path)
    assert main(command) == 2 and "found none in 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"disturbed": 1.5}, {"disturbed_length": -0.1}, {"photo_size": 64}, {"checkpointing_steps": 0}]
)
def test_settings_that_make_no_sense_are_named(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FaceEmbedderConfig(output_dir=str(tmp_path / "run"), train_data_dir=(str(tmp_path / "photos"),), **wrong)


def test_what_ships_fits_its_record_and_the_config():
    record = json.loads((FACE_EMBEDDER / "training_record.json").read_text())
    network = FaceEmbedder.from_pretrained(FACE_EMBEDDER)
    assert sum(p.numel() for p in network.parameters()) == record["parameters"]
    assert record["figures"]["held_out/cosine"] > 0.5
    config = json.loads((SCRIPTS / "configs" / "face_embedder.json").read_text())
    assert config == {name: record["config"][name] for name in config}


def test_the_script_trains_what_can_be_loaded(photos, tmp_path):
    """Two steps, as its user runs it."""
    command = [
        sys.executable,
        SCRIPTS / "train_face_embedder.py",
        "--config",
        SCRIPTS / "configs" / "face_embedder.json",
    ]
    command += ["--train_data_dir", photos, "--output_dir", tmp_path / "run", "--max_train_steps", 2]
    result = subprocess.run(
        [str(word) for word in [*command, "--train_batch_size", 2]], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert FaceEmbedder.from_pretrained(tmp_path / "run").config.embedding_size == 128
    assert json.loads((tmp_path / "run" / "training_record.json").read_text())["photos"]["train"] == 3
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert again.returncode != 0 and "expected an output folder without checkpoints" in again.stderr


def test_a_disturbed_face_teaches_a_shorter_embedding(photos, tmp_path):
    """Targets have a mean square of 1, and are nearly at right angles to what a new network says."""
    losses = []
    for length in (0.0, 1.0):
        config = {"train_data_dir": (str(photos),), "mixed_precision": "no", "train_batch_size": 8, "disturbed": 1.0}
        config |= {"output_dir": str(tmp_path / str(length)), "disturbed_length": length, "max_train_steps": 1}
        run, _ = train_face_embedder(FaceEmbedderConfig(**config))
        losses.append(json.loads((run.output_dir / "training_log.jsonl").read_text())["loss"])
    assert losses[1] - losses[0] == pytest.approx(1, abs=0.6)
