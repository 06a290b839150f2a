"""`gap-diff` and `gap-diff protect`, from files to files; bad input, full disks and Ctrl-C included."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from gap_diff_diffusers import __version__, protect
from gap_diff_diffusers.budget import largest_change
from gap_diff_diffusers.cli import COMMANDS, main
from gap_diff_diffusers.config import provenance, write_json
from gap_diff_diffusers.images import psnr, read_photo, ssim
from gap_diff_diffusers.protect import PhotoFile, Settings, plan, protect_files


@pytest.fixture
def save_photo(make_pixels):
    """Saves a small photo, with folders as needed, and returns its path."""

    def save(path: Path, height: int = 32, width: int = 40, seed: int = 0, mode: str = "RGB", **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_pixels(height, width, seed)).convert(mode).save(path, **options)
        return path

    return save


@pytest.fixture
def run_protect(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs `gap-diff protect ARGUMENTS` in a folder of its own; returns exit code, output and messages."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["protect", *map(str, arguments), "--checkpoint", checkpoint])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


# --- the command


def test_help_imports_no_torch():
    code = """
import sys
from gap_diff_diffusers.cli import COMMANDS, build_parser
build_parser().format_help()
assert not {"torch", "numpy", "PIL"} & sys.modules.keys(), "gap-diff --help"
for command in COMMANDS:
    build_parser(command).format_help()
    assert not {"torch", "diffusers"} & sys.modules.keys(), command
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert f"usage: gap-diff {arguments[0] if len(arguments) > 1 else ''}".strip() in capsys.readouterr().out


def test_version_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "gap_diff_diffusers", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"gap-diff {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["protect"], ["protect", "a.jpg"]])
def test_incomplete_commands_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


# --- photos to photos


def test_a_folder_of_photos(run_protect, save_photo, make_pipeline, tmp_path):
    for index, suffix in enumerate((".jpg", ".png", ".webp", ".bmp")):
        save_photo(tmp_path / "in" / f"photo{index}{suffix}", height=30 + index, seed=index)
    before = contents(tmp_path / "in")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "in").iterdir()}
    code, output, messages = run_protect("in", "-o", "out")
    assert code == 0 and messages == ""
    assert "Protected 4 photos" in output and "PSNR" in output and "no guarantee" in output
    assert contents(tmp_path / "in") == before, "an original was touched"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "in").iterdir()} == times
    assert sorted(os.listdir("out")) == [f"photo{index}.png" for index in range(4)]
    pipeline = make_pipeline()
    for path in sorted((tmp_path / "in").iterdir()):
        original, saved = read_photo(path), read_photo(f"out/{path.stem}.png")
        assert 0 < largest_change(saved.pixels, original.pixels) <= 8
        assert (saved.pixels == np.asarray(pipeline(path).images[0])).all()


def test_budget_and_strength(run_protect, save_photo, tmp_path):
    original = read_photo(save_photo(tmp_path / "photo.png"))
    changes = {}
    for name, arguments in {
        "default": (),
        "small": ("--budget", 3),
        "large": ("--budget", 20),
        "weak": ("--budget", 20, "--strength", 0.25),
    }.items():
        assert run_protect("photo.png", "-o", f"{name}.png", *arguments)[0] == 0
        changes[name] = largest_change(read_photo(f"{name}.png").pixels, original.pixels)
    assert changes["small"] == 3 and changes["default"] == 8
    assert 8 < changes["large"] <= 20 and 3 <= changes["weak"] <= 5


def test_what_is_done_is_skipped(run_protect, save_photo, tmp_path):
    for index in range(3):
        save_photo(tmp_path / "in" / f"{index}.png", seed=index)
    assert run_protect("in", "-o", "out")[0] == 0
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "2.png").unlink()
    code, output, _ = run_protect("in", "-o", "out")
    assert code == 0 and "Protected 1 photo " in output and "Skipped 2 photos" in output and "--overwrite" in output
    assert contents(tmp_path / "out") == first


def test_what_only_looks_done_is_not_skipped(run_protect, save_photo, tmp_path):
    for index in range(3):
        save_photo(tmp_path / "in" / f"{index}.png", seed=index)
    assert run_protect("in", "-o", "out")[0] == 0
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "0.png").write_bytes(b"mine")
    shutil.copy(tmp_path / "in" / "1.png", tmp_path / "out" / "1.png")
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "out" / "2.png")
    before = contents(tmp_path / "out")
    code, output, _ = run_protect("in", "-o", "out")
    assert code == 1 and "Failed: 3" in output
    assert "an unprotected copy of it" in output and "another picture" in output
    assert contents(tmp_path / "out") == before
    assert run_protect("in", "-o", "out", "--overwrite")[0] == 0
    assert contents(tmp_path / "out") == first


def test_what_is_done_is_skipped_at_any_budget(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "photo.png")
    for levels in (4, 255):
        assert run_protect("photo.png", "-o", "out", "--budget", levels, "--overwrite")[0] == 0
        assert "Skipped 1 photo" in run_protect("photo.png", "-o", "out", "--budget", levels)[1]
    code, output, _ = run_protect("photo.png", "-o", "out", "--budget", 4)
    assert code == 1 and ("levels, and 4 are asked for" in output or "another picture" in output)


def test_a_compressed_copy_is_not_taken_for_a_protected_photo(save_photo, tmp_path, monkeypatch, capsys):
    smooth = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 64, 3)))
    monkeypatch.chdir(tmp_path)
    smooth.save("photo.png")
    (tmp_path / "out").mkdir()
    smooth.save("out/photo.jpg", quality=80)
    assert main(["protect", "photo.png", "-o", "out", "--format", "jpeg"]) == 1
    assert "differs less from it than a protected photo does" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_what_is_in_a_folder_and_no_photo(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "in" / "a.png")
    save_photo(tmp_path / "elsewhere" / "b.png")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "linked").symlink_to("../elsewhere")
    code, output, _ = run_protect("in", "-o", "out", "--recursive")
    assert code == 1 and list(contents(tmp_path / "out")) == ["a.png"]
    assert "pipe.jpg: expected a photo, got something else" in output
    assert "Not searched: 1 linked folder" in output


def test_a_photo_that_nothing_is_added_to_is_not_called_protected(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "photo.png")
    code, output, _ = run_protect("photo.png", "-o", "out", "--budget", 1, "--strength", 0.01)
    assert code == 1 and "raise --strength or --budget" in output
    assert not list((tmp_path / "out").glob("*"))


def nudge(source, target):
    """A protected version, as far as can be told without the network: 4 levels more or less everywhere."""
    Image.fromarray(np.asarray(Image.open(source)) ^ 4).save(target)


@pytest.mark.parametrize("case", ["done", "unreadable"])
def test_nothing_to_do_costs_no_start(case, save_photo, tmp_path):
    save_photo(tmp_path / "in" / "photo.png")
    (tmp_path / "out").mkdir()
    if case == "done":
        nudge(tmp_path / "in" / "photo.png", tmp_path / "out" / "photo.png")
    else:
        (tmp_path / "in" / "photo.png").write_bytes(b"no photo")
    code = """
import sys
from gap_diff_diffusers.cli import main
code = main(["protect", "in", "-o", "out", "--report", "report.json"])
assert not {"torch", "diffusers"} & sys.modules.keys()
sys.exit(code)
"""
    result = python(code, cwd=tmp_path)
    assert result.returncode == (0 if case == "done" else 1), result.stderr
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert summary["skipped" if case == "done" else "failed"] == 1


def test_folders_are_searched_as_asked(run_protect, save_photo, tmp_path):
    for name in ("a.jpg", "sub/b.JPEG", "sub/deeper/c.png", ".hidden.jpg", ".hidden/d.jpg"):
        save_photo(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    (tmp_path / "in" / "sub" / "Thumbs.db").write_text("no photo")
    code, output, _ = run_protect("in", "-o", "flat")
    assert code == 0 and list(contents(tmp_path / "flat")) == ["a.png"]
    assert "Ignored 2 files" in output and "Not searched: 1 subfolder; --recursive" in output
    code, output, _ = run_protect("in", "-o", "deep", "--recursive")
    assert code == 0 and list(contents(tmp_path / "deep")) == ["a.png", "sub/b.png", "sub/deeper/c.png"]
    assert "Ignored 3 files" in output and "Not searched" not in output


def test_a_file_given_by_name_may_have_any_suffix(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "IMG_1.v2", format="PNG")
    save_photo(tmp_path / ".profile.jpg")
    assert run_protect("IMG_1.v2", ".profile.jpg", "IMG_1.v2", "./.profile.jpg", "-o", "out")[0] == 0
    assert sorted(os.listdir("out")) == [".profile.png", "IMG_1.v2.png"]


def test_equal_names_do_not_meet(run_protect, save_photo, tmp_path):
    names = ("in/a.jpg", "in/a.png", "in/A.PNG", "in/b.webp", "in/a_jpg.webp", "other/a.jpg", "other/b.webp")
    for seed, name in enumerate(names):
        save_photo(tmp_path / name, seed=seed)
    report = tmp_path / "report.json"
    assert run_protect("in", "other", "-o", "out", "--report", report)[0] == 0
    outputs = {photo["input"]: photo["output"] for photo in json.loads(report.read_text())["photos"]}
    assert outputs == {
        "in/A.PNG": "out/A_png.png",
        "in/a.jpg": "out/a_jpg_2.png",
        "in/a.png": "out/a_png_2.png",
        "in/a_jpg.webp": "out/a_jpg.png",
        "in/b.webp": "out/b_webp.png",
        "other/a.jpg": "out/a_jpg_3.png",
        "other/b.webp": "out/b_webp_2.png",
    }
    for source, target in outputs.items():
        assert largest_change(read_photo(target).pixels, read_photo(source).pixels) <= 8
    assert run_protect("in", "other", "-o", "out")[1].startswith("Protected no photo.\nSkipped 7 photos")


@pytest.mark.parametrize(("name", "format"), [("new/x.png", "PNG"), ("x.JPG", "JPEG"), ("x.webp", "WEBP")])
def test_one_photo_to_one_file(run_protect, save_photo, name, format, tmp_path):
    save_photo(tmp_path / "photo.bmp")
    assert run_protect("photo.bmp", "-o", name)[0] == 0
    assert Image.open(name).format == format
    assert run_protect("photo.bmp", "-o", name)[1].startswith("Protected no photo.\nSkipped 1 photo:")


def test_a_folder_may_be_called_like_a_photo(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "photo.bmp")
    (tmp_path / "out.png").mkdir()
    assert run_protect("photo.bmp", "-o", "out.png")[0] == 0
    assert os.listdir("out.png") == ["photo.png"]


def test_batches_give_the_same_photos(run_protect, save_photo, tmp_path):
    for index in range(11):
        save_photo(tmp_path / "in" / f"{index:02}.png", width=(40, 48)[index % 3 == 0], seed=index)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save_photo(tmp_path / "in" / "03-turned.png", seed=20, exif=exif)
    assert run_protect("in", "-o", "one")[0] == 0
    assert run_protect("in", "-o", "four", "--batch-size", 4)[0] == 0
    assert len(contents(tmp_path / "one")) == 12
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "four").keys()
    for name in contents(tmp_path / "one"):  # floating-point rounding depends on the batch on some machines
        one, four = (np.asarray(Image.open(tmp_path / out / name), np.int16) for out in ("one", "four"))
        assert np.abs(one - four).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_photos_of_every_mode(run_protect, save_photo, mode, tmp_path):
    save_photo(tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png"), mode=mode)
    code, output, _ = run_protect(*tmp_path.glob("photo.*"), "-o", "out")
    assert code == 0
    assert Image.open("out/photo.png").mode == {"P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    assert ("Note: in 1 photo, CMYK became sRGB" in output) is (mode == "CMYK")


def test_metadata_is_dropped_unless_asked_for(run_protect, save_photo, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    save_photo(tmp_path / "photo.jpg", exif=exif, icc_profile=b"a profile" * 20)
    assert run_protect("photo.jpg", "-o", "bare.png")[0] == 0
    assert run_protect("photo.jpg", "-o", "kept.png", "--keep-metadata")[0] == 0
    for name in ("bare.png", "kept.png"):
        assert Image.open(name).info["icc_profile"] == b"a profile" * 20
        assert Image.open(name).size == (32, 40)
    assert not Image.open("bare.png").getexif()
    kept = Image.open("kept.png").getexif()
    assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert ExifTags.Base.Orientation not in kept


# --- what it says


@pytest.mark.parametrize(
    ("arguments", "lossy"),
    [
        (["--format", "webp"], False),
        (["--format", "webp", "--quality", "80"], True),
        (["--format", "jpeg"], True),
        (["--format", "jpeg", "--quality", "60"], True),
    ],
)
def test_a_lossy_format_says_what_it_costs(run_protect, save_photo, arguments, lossy, make_pipeline, tmp_path):
    original = read_photo(save_photo(tmp_path / "photo.png", height=64, width=64))
    code, output, _ = run_protect("photo.png", "-o", "out", "--report", "report.json", *arguments)
    assert code == 0
    [record] = json.loads((tmp_path / "report.json").read_text())["photos"]
    saved = read_photo(record["output"]).pixels
    assert record["largest_change"] == largest_change(saved, original.pixels)
    assert record["psnr"] == pytest.approx(psnr(saved, original.pixels))
    assert ("is lossy" in output) is lossy
    if lossy:
        protected = make_pipeline().protect_batch([original])[0].pixels
        assert record["encoding_change"] == largest_change(saved, protected) > 0
        assert record["encoding_psnr"] == pytest.approx(psnr(saved, protected))
        assert f"by up to {record['encoding_change']} levels" in output
    else:
        assert record["encoding_change"] is record["encoding_psnr"] is None


def test_the_report(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "in" / "a.png", mode="CMYK", format="TIFF")
    save_photo(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"")
    (tmp_path / "out").mkdir()
    nudge(tmp_path / "in" / "b.png", tmp_path / "out" / "b.png")
    (tmp_path / "in" / "d.txt").write_text("no photo")
    assert run_protect("in", "-o", "out", "--report", "report.json", "--budget", 5)[0] == 1
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert report["provenance"]["gap_diff_diffusers"] == __version__
    assert report["provenance"]["torch"] and report["provenance"]["pillow"]
    config = report["config"]
    assert (config["budget"], config["strength"], config["format"], config["device"]) == (5, 1.0, "png", "cpu")
    summary = report["summary"]
    assert [summary[key] for key in ("protected", "skipped", "failed", "waiting", "ignored_files")] == [1, 1, 1, 0, 1]
    assert summary["interrupted"] is False
    a, b, c = report["photos"]
    assert (a["status"], a["input"], a["output"], a["width"], a["height"]) == (
        "protected",
        "in/a.png",
        "out/a.png",
        40,
        32,
    )
    original, saved = read_photo("in/a.png").pixels, read_photo("out/a.png").pixels
    assert a["budget"] == 5 and a["largest_change"] == largest_change(saved, original) == 5
    assert a["psnr"] == pytest.approx(psnr(saved, original)) and a["ssim"] == pytest.approx(ssim(saved, original))
    assert a["notes"] == ["CMYK became sRGB"] and a["error"] is None and a["seconds"] > 0
    assert b["status"] == "skipped" and b["psnr"] is None
    assert c["status"] == "failed" and c["error"] == "in/c.png: the file is empty (0 bytes)"
    assert str(tmp_path) not in text.replace(config["checkpoint"], "")


def test_provenance_imports_nothing_and_json_has_no_nan(tmp_path):
    code = """
import sys
from gap_diff_diffusers.config import provenance
assert provenance()["torch"] and "torch" not in sys.modules
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert json.loads(json.dumps(provenance())) == provenance()
    write_json(tmp_path / "record.json", {"a": [1, None]})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "record.json", {"a": math.nan})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": [1, None]}
    assert os.listdir(tmp_path) == ["record.json"]


# --- bad input


def test_one_bad_photo_costs_only_itself(run_protect, save_photo, tmp_path):
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(photo, "PNG")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green")]
    save_photo(tmp_path / "in" / "first.png")
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    (tmp_path / "in" / "text.jpg").write_text("no photo")
    (tmp_path / "in" / "half.png").write_bytes(photo.getvalue()[:2000])
    (tmp_path / "in" / "link.png").symlink_to("nowhere.png")
    for suffix in ("gif", "png", "webp"):
        frames[0].save(tmp_path / "in" / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "in" / "pixel.png")
    save_photo(tmp_path / "in" / "last.png")
    (tmp_path / "nothing").mkdir()
    save_photo(tmp_path / "nested" / "sub" / "photo.jpg")
    code, output, messages = run_protect("absent.jpg", "in", "nothing", "nested", os.devnull, "-o", "out")
    assert code == 1 and messages == ""
    assert sorted(os.listdir("out")) == ["first.png", "last.png"]
    assert "Protected 2 photos" in output and "Failed: 12" in output
    for line in (
        "absent.jpg: there is no such file or folder",
        "in/empty.jpg: the file is empty",
        "in/text.jpg: expected an image",
        "in/half.png: cannot be read, is it truncated or damaged?",
        "in/link.png: there is no such file",
        "in/moving.gif: expected one picture",
        "in/moving.png: expected one picture",
        "in/moving.webp: expected one picture",
        "in/pixel.png: expected at least 16x16 pixels, got 1x1",
        "nothing: no photo in this folder",
        "nested: no photo in this folder, expected files such as .jpg, .png or .webp; --recursive searches its 1 sub",
        f"{os.devnull}: expected a photo or a folder of photos",
    ):
        assert f"  {line}" in output


def test_a_photo_that_the_format_cannot_hold(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "in" / "glass.png", mode="RGBA")
    save_photo(tmp_path / "in" / "wall.png")
    code, output, _ = run_protect("in", "-o", "out", "--format", "jpeg")
    assert code == 1 and os.listdir("out") == ["wall.jpg"]
    assert "in/glass.png: JPEG has no transparency; save it as PNG or WebP" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "-o", "in"], "the output in is the input folder in"),
        (["in", "-o", "./in/../in/"], "is the input folder in"),
        (["in", "-o", "in/sub/out"], "lies in the input folder in"),
        (["in", "-o", "link/out"], "lies in the input folder in"),
        (["in/a.png", "-o", "in"], "the output in/a.png is the original in/a.png, which must not be overwritten"),
        (["in/a.png", "-o", "in/a.png"], "is the original in/a.png"),
        (["in/a.png", "-o", "hard.png"], "is the original in/a.png"),
        (["in/b.jpg", "b/a.png", "-o", "b", "--overwrite"], "is the original b/a.png"),
        (["in", "-o", "out.png"], "is one file, and there may be several photos; give a folder"),
        (["in/a.png", "in/b.jpg", "-o", "out.png"], "give a folder"),
        (["in/a.png", "-o", "out.gif"], "expected a folder or a file that ends in .png, .jpg, .jpeg, .webp"),
        (["in/a.png", "-o", "out.png", "--format", "jpeg"], "the suffix .png says png; leave one out"),
        (["in", "-o", "file"], "-o file is a file; expected a folder"),
        (["in", "-o", "file/out"], "file is a file; choose another folder"),
        (["in", "-o", "out", "--quality", "90"], "PNG is lossless, leave --quality out"),
        (["in", "-o", "out", "--report", "absent/report.json"], "expected a file to write in a folder that exists"),
        (["in", "-o", "out", "--report", "in/a.png"], "is the original"),
        (["in", "-o", ".", "--report", "a.png"], "where a protected photo goes"),
        (["in", "-o", "out", "--report", "b/a.png"], "expected a report to replace or nothing there"),
        (["in", "-o", "out", "--budget", "0"], "expected a whole number from 1 to 255, got '0'"),
        (["in", "-o", "out", "--budget", "8/255"], "expected a whole number from 1 to 255, got '8/255'"),
        (["in", "-o", "out", "--strength", "0"], "expected a number above 0 and up to 1, got '0'"),
        (["in", "-o", "out", "--strength", "nan"], "expected a number above 0 and up to 1"),
        (["in", "-o", "out", "--batch-size", "0"], "expected a whole number"),
        (["in", "-o", "out", "--device", "warp"], "--device warp cannot be used here"),
        (["in", "-o", "out", "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
    ],
)
def test_wrong_usage_does_nothing(run_protect, save_photo, arguments, message, tmp_path):
    save_photo(tmp_path / "in" / "a.png")
    save_photo(tmp_path / "in" / "b.jpg")
    save_photo(tmp_path / "b" / "a.png", seed=1)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "in" / "a.png")
    before = contents(tmp_path)
    code, output, messages = run_protect(*arguments)
    assert code == 2 and output == "" and message in messages
    assert "Traceback" not in messages
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("./absent", "expected a folder or organization/name on the Hub, got neither"),
        ("a/b/c", "expected a folder or organization/name on the Hub, got neither"),
        ("photo.png", "expected a folder or organization/name on the Hub, got neither"),
        ("folder", "the checkpoint folder cannot be loaded"),
        ("damaged", "the checkpoint damaged cannot be loaded"),
    ],
)
def test_a_checkpoint_that_is_none(given, message, checkpoint, save_photo, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.png")
    (tmp_path / "folder").mkdir()
    shutil.copytree(checkpoint, tmp_path / "damaged")
    [weights] = (tmp_path / "damaged" / "generator").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["protect", "photo.png", "-o", "out", "--checkpoint", given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_where_a_photo_should_go(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "in" / "a.png")
    save_photo(tmp_path / "in" / "b.png")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    code, output, _ = run_protect("in", "-o", "out")
    assert code == 1 and "in/a.png: out/a.png is a folder, expected a file or nothing; move it away" in output
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_that_are_no_text(run_protect, save_photo, tmp_path):
    save_photo(tmp_path / "in" / os.fsdecode(b"na\xefve.png"))
    (tmp_path / "in" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    code, output, _ = run_protect("in", "-o", "out", "--report", "report.json")
    assert code == 1 and "in/\\udcff.png: the file is empty" in output
    assert os.listdir(b"out") == [b"na\xefve.png"]
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["protected"] == 1


# --- full disks, Ctrl-C, threads


FULL_DISK = """
import json, os, sys
from pathlib import Path
from PIL import Image
from gap_diff_diffusers.cli import main
if "limit" in sys.argv:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
code = main(["protect", "in", "-o", "out", "--checkpoint", sys.argv[1]])
names = sorted(os.listdir("out"))
for name in names:
    Image.open(Path("out", name)).load()
print(json.dumps([code, names]))
"""


def _noise(path: Path, count: int, side: int) -> None:
    path.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index:02}.png")


def test_a_full_disk(checkpoint, tmp_path):
    """A disk of 300 KB for twelve photos of 50 KB each, in a mount namespace of its own."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=300k none out && exec "$@"', "sh"]
    (tmp_path / "out").mkdir()
    try:
        subprocess.run([*mount, "true"], cwd=tmp_path, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    _noise(tmp_path / "in", count=12, side=128)
    command = [*mount, sys.executable, "-c", FULL_DISK, checkpoint]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    code, names = json.loads(result.stdout.splitlines()[-1])
    assert code == 1 and 3 <= len(names) < 12
    assert names == [f"{index:02}.png" for index in range(len(names))]
    assert "cannot be written, the disk is full; make room and run the same command again" in result.stdout
    assert f"Protected {len(names)} photos" in result.stdout and "Not attempted" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_files_that_may_not_grow(checkpoint, tmp_path):
    """A limit of 30 KB per file: the small photos fit, the big ones do not."""
    _noise(tmp_path / "in", count=3, side=128)
    for path in list((tmp_path / "in").iterdir())[:2]:
        Image.open(path).resize((64, 64)).save(path)
    result = python(FULL_DISK, checkpoint, "limit", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    code, names = json.loads(result.stdout.splitlines()[-1])
    assert code == 1 and len(names) == 2
    assert "cannot be written (File too large)" in result.stdout


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background turns it off
from gap_diff_diffusers.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_leaves_whole_files(checkpoint, save_photo, tmp_path):
    count = 400
    first = save_photo(tmp_path / "in" / "000.png", height=256, width=256)
    for index in range(1, count):
        (tmp_path / "in" / f"{index:03}.png").hardlink_to(first)
    arguments = ["protect", "in", "-o", "out", "--checkpoint", checkpoint, "--report", "report.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # people press it twice
        output, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, messages
    assert "Traceback" not in messages
    names = sorted(os.listdir(tmp_path / "out"))
    assert 0 < len(names) < count
    for name in names:
        assert name.endswith(".png") and not name.startswith("."), name
        assert largest_change(read_photo(tmp_path / "out" / name).pixels, read_photo(first).pixels) <= 8
    assert output.startswith(f"Interrupted.\nProtected {len(names)} photo")
    assert f"Not attempted: {count - len(names)} photos" in output
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert (summary["interrupted"], summary["protected"]) == (True, len(names))


def test_reading_and_saving_overlap_the_network(make_pipeline, save_photo, tmp_path):
    """While the network has photo n, photo n+1 gets read and photo n-1 gets saved, in other threads."""
    files = [
        PhotoFile(input=str(save_photo(tmp_path / f"{index}.png")), output=str(tmp_path / "out" / f"{index}.png"))
        for index in range(5)
    ]
    pipeline, seen = make_pipeline(), []

    class Slow:
        config = pipeline.config

        def protect_batch(self, photos, *arguments):
            assert threading.current_thread() is threading.main_thread()
            index = len(seen)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                read_ahead = index == len(files) - 1 or files[index + 1].width is not None
                saved_behind = index == 0 or files[index - 1].status == "protected"
                if read_ahead and saved_behind:
                    break
                time.sleep(0.001)
            seen.append((read_ahead, saved_behind))
            return pipeline.protect_batch(photos, *arguments)

    done = []
    protect_files(files, Slow, Settings(), done.append)
    assert seen == [(True, True)] * 5
    assert {id(file) for file in done} == {id(file) for file in files}


@pytest.mark.parametrize(("pixels", "batch_size", "most"), [(32 * 40 * 3, 1, 3), (32 * 40 * 3, 4, 3), (10**9, 2, 8)])
def test_few_photos_are_in_memory_at_once(pixels, batch_size, most, make_pipeline, save_photo, monkeypatch, tmp_path):
    monkeypatch.setattr(protect, "PIXELS_IN_FLIGHT", pixels)
    source = save_photo(tmp_path / "photo.png")
    files = [PhotoFile(input=str(source), output=str(tmp_path / "out" / f"{index}.png")) for index in range(40)]
    pipeline, counts = make_pipeline(), []

    class Counting:
        config = pipeline.config

        def protect_batch(self, photos, *arguments):
            time.sleep(0.005)  # time to read too many
            counts.append(sum(file.width is not None and file.status == "waiting" for file in files))
            return pipeline.protect_batch(photos, *arguments)

    protect_files(files, Counting, Settings(batch_size=batch_size), lambda _: None)
    assert all(file.status == "protected" for file in files)
    assert max(counts) <= most


def test_a_photo_of_more_pixels_than_the_limit_goes_alone(make_pipeline, save_photo, monkeypatch, tmp_path):
    monkeypatch.setattr(protect, "PIXELS_IN_FLIGHT", 100)
    files = plan([str(save_photo(tmp_path / "in" / "photo.png").parent)], str(tmp_path / "out")).files
    protect_files(files, make_pipeline, Settings(), lambda _: None)
    assert files[0].status == "protected"


def test_a_network_that_fails_costs_only_its_photos(make_pipeline, save_photo, tmp_path):
    """Photos that do not fit the memory: a real one for a network that wants the impossible."""
    pipeline = make_pipeline()

    class Small:
        config = pipeline.config

        def protect_batch(self, photos, *arguments):
            if photos[0].pixels.shape[0] > 40:
                raise MemoryError("not enough memory")
            return pipeline.protect_batch(photos, *arguments)

    for height in (32, 64, 40):
        save_photo(tmp_path / "in" / f"{height}.png", height=height)
    files = plan([str(tmp_path / "in")], str(tmp_path / "out")).files
    protect_files(files, Small, Settings(), lambda _: None)
    assert [file.status for file in files] == ["protected", "protected", "failed"]
    assert "cannot be protected (not enough memory)" in files[2].error


def test_faces_are_detected_on_request(run_protect, tmp_path, monkeypatch):
    photo = Path(protect.__file__).parent / "examples" / "astronaut.png"
    assert run_protect(photo, "-o", "without.png")[0] == 0
    code, _, _ = run_protect(photo, "-o", "with.png", "--detect-faces", "--report", "report.json")
    assert code == 0
    without, with_faces, original = (
        np.asarray(Image.open(path).convert("RGB"), np.int16) for path in ("without.png", "with.png", photo)
    )
    changed = np.argwhere((without != with_faces).any(axis=2))  # about the face, from (65, 170) to (165, 270)
    assert len(changed) > 1000 and changed.max(axis=0)[0] < 250 and changed.min(axis=0)[1] > 80
    assert np.abs(with_faces - original).max() <= 8
    report = json.loads(Path("report.json").read_text())
    assert report["config"]["detect_faces"] is True and report["photos"][0]["faces"] == 1

    monkeypatch.setitem(sys.modules, "dlib", None)
    code, _, message = run_protect(photo, "-o", "other.png", "--detect-faces")
    assert code == 1 and "gap_diff_diffusers[metrics]" in message


def test_a_saved_file_that_breaks_the_budget_is_refused(make_pipeline, save_photo, tmp_path):
    """The last check is on what was saved, whatever the network did."""
    pipeline = make_pipeline()

    class Unbounded:
        config = pipeline.config

        def protect_batch(self, photos, noise_budget, strength, faces=None):
            return pipeline.protect_batch(photos, noise_budget * 2, strength)

    save_photo(tmp_path / "in" / "photo.png")
    files = plan([str(tmp_path / "in")], str(tmp_path / "out")).files
    protect_files(files, Unbounded, Settings(), lambda _: None)
    assert files[0].status == "failed" and "differs by 16 levels, expected at most 8; not saved" in files[0].error
    assert list((tmp_path / "out").iterdir()) == []
