"""Faces and identities, with dlib and its real weights, on the example photo."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import face_networks
import numpy as np
import pytest
import torch
from PIL import Image

import gap_diff_diffusers
from gap_diff_diffusers.benchmark_identities import area_under_curve
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.data import face_square, load_face
from gap_diff_diffusers.download import fetch_file
from gap_diff_diffusers.faces import find_faces
from gap_diff_diffusers.images import PhotoError
from gap_diff_diffusers.metrics.fidelity import Lpips
from gap_diff_diffusers.metrics.identity import DlibIdentity, Identity
from gap_diff_diffusers.metrics.paper import paper_mean
from gap_diff_diffusers.recognition import DlibFaces, InsightFaces, OpenCVFaces

ASTRONAUT = Path(gap_diff_diffusers.__file__).parent / "examples" / "astronaut.png"


@pytest.fixture(scope="module")
def faces():
    return DlibFaces()


@pytest.fixture(scope="module")
def face():
    return load_face(ASTRONAUT, 512)[:, :256, 100:356]


def test_a_person_is_recognised_and_a_picture_without_a_face_is_not(faces, face):
    noisy = face + 0.05 * torch.randn(face.shape, generator=torch.Generator().manual_seed(0))
    nothing = torch.full_like(face, 0.5)
    distances, cosines = faces.compare([face, face.flip(2), noisy, nothing], faces.reference([face]))
    assert distances[0] == pytest.approx(0, abs=1e-6) and cosines[0] == pytest.approx(1, abs=1e-6)
    assert 0 < distances[1] < 0.6 and 0 < distances[2] < 0.6 and 0.8 < cosines[1] < 1
    assert distances[3] is None and cosines[3] is None


def test_the_largest_of_several_faces_counts(faces, face):
    small = torch.nn.functional.interpolate(face[None], scale_factor=0.5, mode="area")[0]
    both = torch.full((3, 256, 400), 0.5)
    both[:, :, :256], both[:, 64:192, 264:392] = face, 0.2 * small
    first, second = faces.embeddings(both)
    assert first.shape == second.shape == (128,)
    (large,), (dark,) = faces.embeddings(face), faces.embeddings(torch.nn.functional.pad(0.2 * small, (64,) * 4))
    assert np.linalg.norm(first - large) < np.linalg.norm(first - dark)
    assert np.linalg.norm(second - dark) < np.linalg.norm(second - large)


def test_a_reference_or_pictures_that_are_missing_are_errors(faces, face):
    with pytest.raises(ValueError, match="found none in 1 photos"):
        faces.reference([torch.zeros_like(face)])
    with pytest.raises(ValueError, match="expected pictures"):
        faces.compare([], faces.reference([face]))


def test_every_way_of_counting_what_is_undefined(face):
    results = {r.name: r for r in DlibIdentity()([face, torch.full_like(face, 0.5)], [face])}
    assert results["FDFR"].values == [0, 1] and results["FDFR"].mean == 0.5
    assert results["recognised"].values == [1, 0]
    assert results["ISM"].values[1] is None and results["ISM"].mean == pytest.approx(1, abs=1e-6)
    assert results["ISM, all"].mean == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "values", "mean"),
    [
        ("FDFR (SFace)", [0.0, 1.0], 0.5),
        ("ISM", [0.8, None], 0.8),
        ("ISM (ArcFace)", [None, None], 0.0),
        ("SER-FIQ", [0.88, None], 0.25),
        ("SER-FIQ", [0.9, 0.9], 1 / (1 + math.exp(-2.6))),
        ("BRISQUE", [10.0, None, 20.0], 15.0),
        ("BRISQUE", [None], None),
        ("ISM", [], None),
    ],
)
def test_the_papers_accounting_is_there_by_name(name, values, mean):
    assert paper_mean(name, values) == pytest.approx(mean)


def test_people_are_groups_of_faces_that_are_alike(faces):
    some = [np.array([x, 0.0]) for x in (0.0, 0.5, 1.0, 5.0, 5.5)]
    assert faces.count_people(some) == 2  # 0 and 1 are apart, but 0.5 is like both
    assert faces.count_people(some[:3]) == 1 and faces.count_people(some[::2]) == 3


@pytest.fixture
def two_blocks():
    """What the networks of `face_networks` take for a large face, reddish, and a small one, surer of that."""
    image = torch.full((3, 320, 320), 0.1)
    image[:, 96:128, 96:128] = torch.tensor([1.0, 0.95, 0.9])[:, None, None]
    image[:, 224:256, 224:256] = 1
    return image


def _check_backend(backend, image):
    """Faces come the largest first, with their colors, wherever they are; pictures without one are told apart."""
    large, small = backend.embeddings(image)
    red, green, blue = large.reshape(3, -1).mean(1)
    assert red > green > blue and np.ptp(small.reshape(3, -1).mean(1)) < 1e-3 * (red - blue)
    (alone,) = backend.embeddings(torch.where((image == 1).all(0), 0.1, image))
    np.testing.assert_allclose(alone, large, rtol=1e-4)
    assert backend.distance(large, small) > backend.distance(large, alone) == pytest.approx(0, abs=1e-6)
    assert backend.embeddings(torch.full((3, 320, 320), 0.1)) == []
    results = {r.name: r for r in Identity(backend, " (tiny)")([image, torch.zeros_like(image)], [image])}
    assert results["FDFR (tiny)"].values == [0, 1] and results["recognised (tiny)"].values == [1, 0]
    assert results["ISM (tiny)"].values == [pytest.approx(1), None]
    assert {r.backend for r in results.values()} == {backend.name}


def test_opencv_finds_the_largest_face_first(tmp_path, two_blocks):
    face_networks.save_yunet(tmp_path / "face_detection_yunet_2023mar.onnx")
    with pytest.raises(OSError, match=r"expected face_recognition_sface_2021dec.onnx in .*; leave the folder out"):
        OpenCVFaces(tmp_path)
    face_networks.save_embedder(tmp_path / "face_recognition_sface_2021dec.onnx")
    backend = OpenCVFaces(tmp_path)
    _check_backend(backend, two_blocks)
    twice = two_blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)  # too large for YuNet, were it not scaled
    for faces in zip(backend.embeddings(twice), backend.embeddings(two_blocks), strict=True):
        assert backend.distance(*faces) == pytest.approx(0, abs=0.05)
    (tmp_path / "face_recognition_sface_2021dec.onnx").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(OSError, match="expected networks of OpenCV Zoo"):
        OpenCVFaces(tmp_path)


def test_insightface_finds_the_largest_face_first(tmp_path, two_blocks):
    pytest.importorskip("insightface")
    face_networks.save_scrfd(tmp_path / "detector.onnx")
    face_networks.save_embedder(tmp_path / "embedder.onnx")
    _check_backend(InsightFaces(tmp_path), two_blocks)
    with pytest.raises(OSError, match="expected a folder with a model pack"):
        InsightFaces(tmp_path / "none")
    (tmp_path / "embedder.onnx").unlink()
    with pytest.raises(OSError, match="no network that embeds faces"):
        InsightFaces(tmp_path)


def test_lpips_is_0_for_what_is_alike():
    pytest.importorskip("lpips")
    measure = Lpips(pnet_rand=True)  # of an AlexNet without weights, which would be downloaded
    pixels = np.array(Image.open(ASTRONAUT).convert("RGB"))[:128, :160]
    noisy = np.clip(pixels.astype(int) + np.random.default_rng(0).integers(-8, 9, pixels.shape), 0, 255)
    assert measure(pixels, pixels) == 0 < measure(noisy.astype(np.uint8), pixels)
    with pytest.raises(ValueError, match="of one size from 64 px"):
        measure(pixels, pixels[:, :100])


def test_a_file_that_was_downloaded_is_checked_and_kept(tmp_path):
    (tmp_path / "there").write_bytes(b"model")
    address, path = (tmp_path / "there").as_uri(), tmp_path / "cache" / "kept"
    with pytest.raises(OSError, match=r"expected a file with sha256 0+, got 9372c470\w+; nothing was kept"):
        fetch_file(address, path, "0" * 64)
    assert not path.exists()
    digest = hashlib.sha256(b"model").hexdigest()
    assert fetch_file(address, path, digest).read_bytes() == b"model"
    (tmp_path / "there").unlink()
    assert fetch_file(address, path, digest) == path
    with pytest.raises(OSError, match=r"could not be fetched .*; ask a friend"):
        fetch_file(address, tmp_path / "other", digest, instead="ask a friend")


def test_faces_are_found_in_the_photos_own_pixels():
    small = np.array(Image.open(ASTRONAUT).convert("RGB"))
    for factor in (1, 3):
        pixels = np.array(Image.fromarray(small).resize((512 * factor, 512 * factor)))
        ((left, top, right, bottom),) = find_faces(pixels)
        assert left / factor == pytest.approx(170, abs=25) and right / factor == pytest.approx(270, abs=25)
        assert top / factor == pytest.approx(65, abs=25) and bottom / factor == pytest.approx(165, abs=25)
    assert find_faces(np.full((100, 300, 3), 128, np.uint8)) == []


def test_a_face_square_is_cut_around_the_face_within_the_photo(tmp_path):
    photo = np.array(Image.open(ASTRONAUT).convert("RGB"))[:320, 60:380]
    ((left, _, right, _),) = find_faces(photo)
    Image.fromarray(np.pad(photo, ((0, 0), (100, 0), (0, 0)))).save(tmp_path / "photo.png")
    square = face_square(tmp_path / "photo.png", 2.0)
    assert square.width == square.height == pytest.approx(2 * (right - left), rel=0.15)
    ((x0, y0, x1, y1),) = find_faces(np.array(square))
    assert (x0 + x1) / 2 / square.width == pytest.approx(0.5, abs=0.08)
    assert (y0 + y1) / 2 / square.width == pytest.approx(0.56, abs=0.08)
    whole = face_square(tmp_path / "photo.png", 9.0)
    assert whole.size == (320, 320) and np.array(whole)[:, :40].mean() > 10  # of the black padding little is left
    Image.new("RGB", (300, 300)).save(tmp_path / "nothing.png")
    with pytest.raises(PhotoError, match="no face"):
        face_square(tmp_path / "nothing.png", 2.0)


def test_a_missing_backend_names_the_extra(monkeypatch):
    for module in ("dlib", "cv2", "insightface", "insightface.app", "lpips"):
        monkeypatch.setitem(sys.modules, module, None)
    for needs_it, extra in ((OpenCVFaces, "metrics"), (InsightFaces, "arcface"), (Lpips, "lpips")):
        with pytest.raises(ImportError, match=rf"gap_diff_diffusers\[{extra}\]"):
            needs_it()
    for needs_it in (DlibFaces, lambda: find_faces(np.zeros((50, 50, 3), np.uint8))):
        with pytest.raises(ImportError, match=r"gap_diff_diffusers\[metrics\]"):
            needs_it()


def test_the_area_under_a_curve_counts_pairs():
    assert area_under_curve([3, 4], [1, 2]) == 1 and area_under_curve([1, 2], [3, 4]) == 0
    assert area_under_curve([1, 3], [2, 2]) == 0.5 and area_under_curve([2], [2]) == 0.5
    with pytest.raises(ValueError, match="at least two people"):
        area_under_curve([], [1])


def test_identities_are_told_apart_by_the_command(tmp_path, capsys):
    """Mirrored, a face is less like itself."""
    photo = Image.open(ASTRONAUT).convert("RGB").crop((100, 0, 356, 256))
    for name, image in (("one", photo), ("two", photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        for index, part in enumerate(("set_A", "set_B", "set_C")):
            (tmp_path / "people" / name / part).mkdir(parents=True)
            image.resize((256 + 8 * index, 256)).save(tmp_path / "people" / name / part / "0.png")
    command = ["benchmark", "identities", "--people", str(tmp_path / "people")]
    assert main([*command, "--output", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert set(figures) == {"ISM", "distance"}
    assert all(f["same"] == 4 and f["others"] == 4 and f["auc"] > 0.5 for f in figures.values())
    assert f"| ISM | {figures['ISM']['auc']:.4f} |" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "people" / "two")
    assert main(command) == 2 and "at least two people" in capsys.readouterr().err
