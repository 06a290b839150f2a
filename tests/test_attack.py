"""`gap-diff attack` and `gap-diff evaluate`, end to end: a tiny model, real face recognition."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_attackers import IN_PROCESS
from test_benchmark_surrogate import model  # noqa: F401
from test_metrics import ASTRONAUT

from gap_diff_diffusers.attack import cut_squares, memory_errors
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.config import BUNDLED_FACE_MODEL
from gap_diff_diffusers.data import read_images, to_pixels
from gap_diff_diffusers.metrics import METRICS, OFFLINE
from gap_diff_diffusers.metrics.base import Metric, MetricResult
from gap_diff_diffusers.transforms import build_transform

QUICK = ["resolution=64", "max_train_steps=1", "num_class_images=2", "num_inference_steps=2"]


@pytest.fixture
def person(tmp_path):
    folder = tmp_path / "person"
    folder.mkdir()
    photo = Image.open(ASTRONAUT).convert("RGB").crop((100, 0, 356, 256))
    for index in range(3):
        photo.resize((256 + 20 * index, 256)).save(folder / f"{index}.png")
    return folder


def test_attack_writes_pictures_a_sheet_and_how_they_were_made(model, person, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ["attack", str(person), "-o", str(out), "--model", model, "--count", "2", "--set", *QUICK]
    assert main([*command, "--prompts", "a photo of sks person", "a dslr portrait of sks person", "--save-model"]) == 0
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names == ["0-0000.png", "0-0001.png", "1-0000.png", "1-0001.png"]
    assert all(Image.open(out / "pictures" / name).size == (64, 64) for name in names)
    # The photos, and a row for each prompt, each under its caption.
    assert Image.open(out / "contact_sheet.png").size == (3 * 64, 3 * (64 + 20))
    record = json.loads((out / "attack.json").read_text())
    assert record["config"]["max_train_steps"] == 1 and record["photos"] == 3 and record["model"] == "model"
    assert str(tmp_path) not in (out / "attack.json").read_text()
    assert StableDiffusionPipeline.from_pretrained(out / "model")


def test_attack_is_repeatable_and_other_photos_give_other_pictures(model, person, photos, tmp_path):  # noqa: F811
    pictures = []
    for index, (folder, *steps) in enumerate(((person,), (person,), (photos,), (person, "--steps", "3"))):
        out = tmp_path / f"out{index}"
        options = ["--count", "1", "--set", *QUICK, "learning_rate=0.01", *steps]
        assert main(["attack", str(folder), "-o", str(out), "--model", model, *options]) == 0
        pictures.append(np.asarray(Image.open(out / "pictures" / "0-0000.png")))
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()
    assert (pictures[0] != pictures[3]).any()
    record = json.loads((out / "attack.json").read_text())  # of learning they change nothing
    assert record["num_inference_steps"] == 3 and record["config"]["num_inference_steps"] == 2


def test_attack_compares_clean_and_protected_photos(model, person, tmp_path, capsys, caplog):  # noqa: F811
    out, drawn = tmp_path / "out", tmp_path / "class"
    command = ["attack", str(person), "--model", model, "--count", "2", "--set", *QUICK, "learning_rate=0.01"]
    command += ["--class-images", str(drawn)]
    drawn.mkdir()
    assert main([*command, "-o", str(out), "--protect", "--save-model"]) == 0
    rows = json.loads((out / "figures.json").read_text())["rows"]
    assert [row["generated"].rsplit("/")[-1] for row in rows] == ["clean", "protected"]
    printed = capsys.readouterr().out
    assert "| FDFR |" in printed and f"| {out / 'protected'} | 2 |" in printed
    names = ("clean", "protected")
    clean, protected = (np.asarray(Image.open(out / name / "pictures" / "0-0001.png")).astype(int) for name in names)
    assert (clean != protected).any()
    assert StableDiffusionPipeline.from_pretrained(out / "protected" / "model")
    assert Image.open(out / "contact_sheet.png").size == (3 * 64, 4 * (64 + 20))
    assert len(list(drawn.glob("*.png"))) == 2  # for the next time:
    assert main([*command, "-o", str(tmp_path / "alone")]) == 0
    alone = np.asarray(Image.open(tmp_path / "alone" / "pictures" / "0-0001.png")).astype(int)
    assert (alone == clean).all()  # the clean half is what the attack alone does
    assert "pictures were drawn with" not in caplog.text
    other = ["--set", *QUICK, "num_class_images=3", "--device", "abacus", "-o", str(tmp_path / "other")]
    assert main([*command, *other]) == 2
    assert f"{drawn}: its pictures were drawn with num_class_images 2, now 3;" in caplog.text
    main(["evaluate", str(person), "--reference", str(out / "clean" / "pictures"), "--metrics", "brisque"])
    assert "swapped" in caplog.text
    assert main(["evaluate", str(out), "--reference", str(person)]) == 2
    assert f"name {out / 'clean'}, {out / 'protected'}" in capsys.readouterr().err


def test_attack_learns_what_the_transforms_leave(model, person, tmp_path):  # noqa: F811
    command = ["attack", str(person), "--model", model, "--count", "1", "--method", "sdedit"]
    command += ["--set", "resolution=64", "num_inference_steps=4"]
    pictures = []
    for index, transforms in enumerate(([], ["gaussian_blur"], ["gaussian_blur", '{"name": "jpeg", "quality": 30}'])):
        out = tmp_path / str(index)
        assert main([*command, "-o", str(out), *(["--transforms", *transforms] if transforms else [])]) == 0
        pictures.append(np.asarray(Image.open(out / "contact_sheet.png"))[20:84, :64])
        assert json.loads((out / "attack.json").read_text())["transforms"] == transforms
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()


@pytest.mark.parametrize("purifier", ["diffpure", "adverse_cleaner"])
def test_photos_are_compressed_whole_and_purified_at_the_size_that_is_learned(model, person, tmp_path, purifier):  # noqa: F811
    jpeg = {"name": "jpeg", "quality": 30}
    model_spec = {"name": "diffpure", "model": model, "steps": 1} if purifier == "diffpure" else {"name": purifier}
    command = ["attack", str(person), "-o", str(tmp_path / "out"), "--model", model, "--count", "1"]
    command += ["--method", "sdedit", "--set", "resolution=64", "num_inference_steps=4"]
    assert main([*command, "--transforms", json.dumps([jpeg]), json.dumps(model_spec)]) == 0
    compressed = [build_transform(jpeg).eval()(photo[None])[0] for photo in read_images([person])]
    purified = build_transform(model_spec).eval()(cut_squares(compressed, 64).clamp(0, 1))
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))[20:84]
    assert np.abs(sheet - np.concatenate([to_pixels(square) for square in purified], axis=1).astype(int)).max() <= 1


def test_attack_measures_what_it_can_without_a_face(model, photos, person, tmp_path, caplog, capsys):  # noqa: F811
    command = ["attack", "--model", model, "--method", "sdedit", "--count", "1", "--protect"]
    command += ["--set", "resolution=64", "num_inference_steps=4", "-o", str(tmp_path / "out")]
    faceless = [str(photos / "0.png"), str(photos / "2.png")]
    assert main([*command, str(person), "--reference", *faceless]) == 2
    assert "expected a face to look for in --reference" in capsys.readouterr().err
    assert main([*command, *faceless]) == 0
    assert "2 photos: most attacks" in caplog.text and "no face was found in 2 photos" in caplog.text
    table = capsys.readouterr().out
    assert "BRISQUE" in table and "SER-FIQ" in table and "FDFR" not in table


def test_attack_warns_of_two_people(model, person, tmp_path, caplog):  # noqa: F811
    command = ["attack", str(person), "-o", str(tmp_path / "out"), "--model", model, "--method", "instruct-pix2pix"]
    assert main(command) == 2 and "people" not in caplog.text  # the model is none for that, which is found out later
    Image.open(BUNDLED_FACE_MODEL / "figures" / "samples.png").crop((0, 0, 256, 256)).save(person / "3.png")
    assert main(command) == 2 and "the faces of 4 photos may be of 2 people" in caplog.text


@pytest.mark.parametrize("method", IN_PROCESS)
def test_attack_offers_every_method(model, person, tmp_path, method):  # noqa: F811
    command = ["attack", str(person), "-o", str(tmp_path / "out"), "--model", model, "--method", method]
    assert main([*command, "--count", "1", "--set", *QUICK, "--save-model"]) == 0
    assert (tmp_path / "out" / "attack.json").is_file() and any((tmp_path / "out" / "model").iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CPU: can't allocate memory\nsomewhere")])
def test_running_out_of_memory_says_what_to_lower(error):
    message = r"out of memory \((no more of it|CPU: can't allocate memory)\); lower it with"
    with pytest.raises(OSError, match=message), memory_errors():
        raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes do not fit")


def test_what_attack_refuses(model, person, photos, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    base = ["attack", str(person), "--model", model, "-o", str(tmp_path / "out")]
    for command, message in (
        ([*base, "--set", "steps=3"], "max_train_steps"),
        ([*base, "--set", "max_train_steps=many"], "max_train_steps of type int, got 'many'"),
        ([*base, "--set", "max_train_steps=2.5"], "max_train_steps of type int, got 2.5"),
        ([*base, "--set", "learning_rate=NaN"], "learning_rate of type float, got nan"),
        ([*base, "--set", *QUICK, "resolution=60"], "multiple of 8, got 60"),
        ([*base, "--device", "abacus"], "abacus cannot be used"),
        (
            [*base, "--method", "lora", "--save-model", "--set", "train_text_encoder=token"],
            "yes or no to save adapters",
        ),
        ([*base, "--set", "max_train_steps=0"], "max_train_steps of at least 1"),
        ([*base, "--preset", "medium"], "weak, strong"),
        ([*base, "--count", "0"], "--count"),
        ([*base, "--steps", "0"], "--steps"),
        ([*base, "--diffusers-examples", str(tmp_path)], "for the methods official:..., got dreambooth"),
        (
            [*base, "--method", "official:lora", "--diffusers_examples", str(tmp_path / "empty")],
            f"train_dreambooth_lora.py in {tmp_path / 'empty'}, found none",
        ),
        ([*base, "--class-images", str(tmp_path / "out" / "class")], "outside of the output"),
        ([*base, "--class-images", str(photos / "0.png")], "expected a folder of pictures"),
        ([*base, "--method", "sdedit", "--set", "prior_loss_weight=1"], "with one of"),
        ([*base, "--transforms", "sepia"], "expected the name of a transform, got 'sepia'"),
        ([*base, "--transforms", '{"name": '], "expected names or JSON, got"),
        ([*base, "--reference", str(photos)], "--reference is for --protect"),
        ([*base[:-1], str(person / "out")], "lies in the input folder"),
        ([*base, "--class-images", str(person)], "is the input folder"),
        (["attack", str(tmp_path / "empty"), *base[2:]], "found none"),
        (["attack", str(tmp_path / "missing.png"), *base[2:]], "got none in"),
        ([*base[:-1], str(photos)], "new or empty folder"),
        ([*base[:3], str(tmp_path / "nowhere"), *base[4:]], "nowhere"),
        ([*base[:3], str(tmp_path / "model" / "vae"), *base[4:]], "text-to-image model"),
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    assert main(base) == 2 and "expected a text-to-image model with a text encoder" in capsys.readouterr().err
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert main(base) == 2 and "expected a text-to-image model with a text encoder" in capsys.readouterr().err


def test_evaluate_tells_the_person_from_others(person, tmp_path, capsys):
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    random = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(random.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(nobody / f"{index}.png")
    command = ["evaluate", str(person), str(nobody), "--reference", str(person)]
    assert main([*command, "--output", str(tmp_path / "figures.json")]) == 0
    lines = [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("| person | 3 |") and "| 0% | 100% | 1.00 | 1.00 | 0.00 |" in line for line in lines)
    assert any(line.startswith("| nobody | 2 |") and "| 100% | 0% | none | 0.00 | none |" in line for line in lines)
    (person / "drawn").mkdir()
    assert main(["evaluate", str(person / "drawn"), "--reference", str(person)]) == 2
    assert main(["evaluate", str(person), "--reference", str(person / "drawn")]) == 2
    error = capsys.readouterr().err
    assert "lies in the reference" in error and "lies in the pictures of" in error
    (person / "drawn").rmdir()
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["reference_photos"] == 3 and [row["pictures"] for row in record["rows"]] == [3, 2]
    assert main([*command, "--output", str(tmp_path / "figures.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert [row["generated"] for row in rows] == [str(person)] * 3 + [str(nobody)] * 2
    assert rows[0]["picture"] == "0.png" and rows[0]["FDFR"] == "0.0" and rows[4]["distance"] == ""


def test_evaluate_names_the_pictures_that_it_read(person, tmp_path, capsys):
    (person / "1.png").write_bytes(b"no picture")
    (person / "more").mkdir()
    (person / "2.png").rename(person / "more" / "2.png")
    command = ["evaluate", str(person), "--reference", str(person), "--metrics", "brisque", "--output"]
    assert main([*command, str(tmp_path / "figures.csv")]) == main([*command, str(tmp_path / "figures.json")]) == 0
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert [row["picture"] for row in rows] == ["0.png", "more/2.png"]
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["names"] == ["0.png", "more/2.png"] and row["pictures"] == 2


def test_evaluate_counts_as_the_paper_does_if_asked(person, tmp_path, capsys):
    Image.new("RGB", (64, 64), "gray").save(person / "nothing.png")
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    Image.new("RGB", (64, 64), "gray").save(nobody / "0.png")
    command = ["evaluate", str(person), str(nobody), "--reference", str(person), "--accounting", "gap-diff"]
    assert main([*command, "--output", str(tmp_path / "figures.json")]) == 0
    lines = [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == "| pictures of | count | BRISQUE | FDFR | ISM | SER-FIQ |"
    assert any(line.startswith("| person | 4 |") and line.endswith("| 25% | 1.00 | 0.00 |") for line in lines)
    assert any(line.startswith("| nobody | 1 | none | 100% | 0.00 | 0.00 |") for line in lines)
    record = json.loads((tmp_path / "figures.json").read_text())
    means = {result["name"]: result["mean"] for result in record["rows"][1]["results"]}
    assert record["accounting"] == "gap-diff" and means["ISM"] == 0


def test_evaluate_reads_what_attack_drew_and_warns_if_swapped(model, person, tmp_path, caplog):  # noqa: F811
    out = tmp_path / "out"
    assert main(["attack", str(person), "-o", str(out), "--model", model, "--count", "2", "--set", *QUICK]) == 0
    output = tmp_path / "figures.json"
    command = ["evaluate", str(out), "--reference", str(person), "--metrics", "identity", "--output", str(output)]
    assert main(command) == 0
    assert json.loads(output.read_text())["rows"][0]["pictures"] == 2  # neither the sheet nor the photos on it
    assert "swapped" not in caplog.text
    for reference in (out, out / "pictures" / "0-0000.png"):
        main(["evaluate", str(person), "--reference", str(reference), "--metrics", "brisque"])
        assert f"{reference} was written by gap-diff attack, yet stands as the reference: swapped?" in caplog.text


def test_what_evaluate_refuses(person, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for command, message in (
        (["evaluate", str(tmp_path / "none"), "--reference", str(person)], "folders of generated pictures"),
        (["evaluate", str(tmp_path / "empty"), "--reference", str(person)], "found none"),
        (["evaluate", str(person), "--reference", str(person), "--output", "figures.txt"], "FILE.csv"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", OFFLINE)
def test_metrics_depend_on_each_picture_alone(name, person):
    metric = METRICS.load(name)()
    assert isinstance(metric, Metric)
    photo = torch.from_numpy(np.array(Image.open(person / "0.png"))).permute(2, 0, 1) / 255
    images = [photo, photo.flip(2), torch.full((3, 64, 64), 0.5), photo * 0.5]
    results = metric(images, [photo])
    backwards = metric(images[::-1], [photo])
    for result, other in zip(results, backwards):
        assert isinstance(result, MetricResult) and len(result.values) == 4
        assert result.values == other.values[::-1]
        assert result.values == next(r for r in metric(images, [photo]) if r.name == result.name).values


def test_brisque_rises_with_noise_and_is_undefined_without_texture(person):
    brisque = METRICS.load("brisque")()
    photo = torch.from_numpy(np.array(Image.open(person / "0.png"))).permute(2, 0, 1) / 255
    noisy = photo + 0.1 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    (result,) = brisque([photo, noisy, torch.zeros(3, 64, 64), photo[:, :16, :16]])
    assert result.values[1] > result.values[0] + 10
    assert result.values[2:] == [None, None]
