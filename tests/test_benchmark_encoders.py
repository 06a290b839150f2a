"""`gap-diff benchmark displacement` and `scale`: the figures are what they say, on a tiny encoder and checkpoint."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_surrogates import sana_like

from gap_diff_diffusers import EncoderSurrogate
from gap_diff_diffusers.benchmark_displacement import align, pgd, published_displacement, spread
from gap_diff_diffusers.benchmark_scale import surround
from gap_diff_diffusers.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pixels):
    folder = tmp_path_factory.mktemp("faces")
    for index in range(12):
        Image.fromarray(make_pixels(260, 220, seed=index)).save(folder / f"{index:02}.png")
    torch.manual_seed(0)
    safetensors.torch.save_file(sana_like(), folder / "encoder.safetensors")
    return folder


@pytest.fixture
def arguments(folder, checkpoint):
    encoder = str(folder / "encoder.safetensors")
    return ["--photos", str(folder), "--encoders", encoder, "--checkpoint", checkpoint]


@pytest.fixture
def encoder(folder):
    return EncoderSurrogate.from_pretrained(folder / "encoder.safetensors")


def test_displacement_compares_what_it_says(arguments, tmp_path, capsys):
    assert main(["benchmark", "displacement", *arguments, "--count", "1", "--output", str(tmp_path / "d.json")]) == 0
    record = json.loads((tmp_path / "d.json").read_text())
    rows, ratios = record["displacement"], record["ratios"]
    assert rows["random signs"]["psnr"] == pytest.approx(30.07, abs=0.5)  # 8 levels everywhere, but for what clips
    for row in rows.values():
        assert row["psnr"] > 29.9 and row["encoder"] > 0
    ours = rows["this checkpoint"]["encoder"]
    assert ratios["over random signs"]["encoder"] == pytest.approx(ours / rows["random signs"]["encoder"])
    assert ratios["over PGD against that encoder"]["encoder"] == pytest.approx(
        ours / rows["PGD against encoder"]["encoder"]
    )
    printed = capsys.readouterr().out
    assert f"| this checkpoint | {ours:.2f} |" in printed


def test_aligned_perturbations_begin_at_one_place(make_generator):
    generator = make_generator(keyed_grid=True)
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    offsets = generator.grid_offsets(images)
    assert len(offsets.unique(dim=0)) > 1
    marks = torch.zeros(6, 3, 64, 64)  # one where each grid begins, and not at the edge
    for mark, (top, left) in zip(marks, offsets.tolist()):
        mark[:, 32 - top, 32 - left] = 1
    aligned = align(marks, generator, images)
    assert (aligned == aligned[:1]).all()
    assert (align(aligned, generator, images, back=True) == marks).all()


def test_pgd_moves_the_latents_further_than_random_signs_within_the_budget(encoder, make_pixels):
    images = torch.from_numpy(make_pixels(64, 64)).permute(2, 0, 1)[None] / 255
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    random = ((images + 8 / 255 * signs).clamp(0, 1) * 255).round() / 255
    moved = pgd(encoder, images, steps=20)
    assert ((moved - images) * 255).abs().max().round() <= 8
    from gap_diff_diffusers import encoder_displacement

    clean = encoder.encode_images(images)
    assert encoder_displacement(clean, encoder.encode_images(moved)) > 1.5 * encoder_displacement(
        clean, encoder.encode_images(random)
    )


def test_published_displacement_compresses_both(encoder, make_pixels):
    images = torch.from_numpy(make_pixels(64, 64)).permute(2, 0, 1)[None] / 255
    assert published_displacement(encoder, images, images) == 0  # 0 only if the clean one is compressed, too


def test_scale_is_the_whole_where_the_crop_is_the_photo(arguments, tmp_path):
    arguments += ["--count", "1", "--sizes", "512", "1024", "--shares", "0.2", "0.67"]
    assert main(["benchmark", "scale", *arguments, "--output", str(tmp_path / "s.json")]) == 0
    rows = {(r["photo"], r["face_share"]): r for r in json.loads((tmp_path / "s.json").read_text())["scale"]}
    assert rows[512, 0.67]["crop"] == 512
    assert rows[512, 0.67]["kept"]["encoder"] == 1
    assert rows[512, 0.2]["crop"] == 205
    assert rows[1024, 0.67]["kept"]["encoder"] != 1


def test_surround_keeps_the_square_in_the_middle_of_a_continuous_photo():
    square = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    photo = surround(square, 101)
    assert photo.shape == (101, 101, 3)
    assert (photo[40:60, 40:60] == square).all()
    assert (photo[39, 40:60] == square[0]).all()  # its mirror image begins with the same row


def test_spread_takes_from_everywhere():
    assert spread(range(74), 16)[0] == 0 and spread(range(74), 16)[-1] >= 69
    assert spread([1, 2], 5) == [1, 2]
