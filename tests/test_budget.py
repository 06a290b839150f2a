"""The budget holds: in numbers, and in 500 random photos from file to file."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from gap_diff_diffusers import GAPDiffProtectionPipeline
from gap_diff_diffusers.budget import add_perturbation, budget_levels, largest_change
from gap_diff_diffusers.images import encode_photo, read_photo


@pytest.mark.parametrize("levels", range(1, 256))
def test_levels_survive_the_way_to_floats_and_back(levels):
    assert budget_levels(levels / 255) == levels
    assert budget_levels(np.float32(levels / 255)) == levels


def test_levels_are_rounded_down():
    assert budget_levels(0.05) == 12
    assert budget_levels(8.99 / 255) == 8


@pytest.mark.parametrize("eps", [0, -1, 0.9 / 255, 1.01, 8, math.inf, math.nan])
def test_a_budget_of_no_level_or_too_many_is_refused(eps):
    with pytest.raises(ValueError, match="8 levels are written 8/255"):
        budget_levels(eps)


def test_a_perturbation_is_scaled_rounded_and_clipped():
    pixels = np.full((1, 5, 3), 100, np.uint8)
    perturbation = np.empty_like(pixels)
    perturbation[0, :, :] = np.array([1, 128, 255, 192, 0])[:, None]
    protected = add_perturbation(pixels, perturbation, amplitude=8, levels=8)
    assert (protected[0, :, 0] - 100.0).tolist() == [-8, 0, 8, 4, -8]
    halved = add_perturbation(pixels, perturbation, amplitude=4, levels=8)
    assert (halved[0, :, 0] - 100.0).tolist() == [-4, 0, 4, 2, -4]
    bounded = add_perturbation(pixels, perturbation, amplitude=200, levels=3)
    assert largest_change(bounded, pixels) == 3


def test_black_stays_at_or_above_black_and_white_at_or_below_white():
    for value, toward in ((0, 0), (255, 255)):
        pixels = np.full((4, 4, 3), value, np.uint8)
        assert (add_perturbation(pixels, np.full_like(pixels, toward), amplitude=32, levels=32) == value).all()


def test_a_gray_photo_moves_all_channels_alike():
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (20, 20, 1), dtype=np.uint8), 3, axis=2)
    perturbation = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    protected = add_perturbation(pixels, perturbation, amplitude=8, levels=8, gray=True)
    assert (protected == protected[:, :, :1]).all()
    assert 0 < largest_change(protected, pixels) <= 8


def test_largest_change_does_not_wrap_around():
    assert largest_change(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)) == 255


def _random_photo(rng: np.random.Generator, mode: str, largest: int, make_pixels) -> Image.Image:
    height, width = (int(side) for side in rng.integers(16, largest + 1, 2))
    pixels = make_pixels(height, width, seed=int(rng.integers(2**31)))
    if rng.random() < 0.3:  # black and white areas, where clipping works
        pixels = np.where(pixels > 128, 255, 0).astype(np.uint8)
    alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "P+transparency":
        image = image.quantize(32)
        image.info["transparency"] = int(rng.integers(32))
        return image
    if mode in ("LA", "RGBA"):
        image = image.convert(mode[:-1])
        image.putalpha(alpha)
        return image
    return image.quantize(32) if mode == "P" else image.convert(mode)


def test_500_random_photos_stay_within_their_budget(make_pixels, tmp_path):
    """The checkpoint that ships; sizes, modes, budgets, strengths and lossless formats at random; file to file."""
    pipeline = GAPDiffProtectionPipeline.from_bundled()
    rng = np.random.default_rng(0)
    modes = ("L", "LA", "RGB", "RGBA", "P", "P+transparency", "CMYK", "I;16", "1")
    violations, idle, alpha_changes = [], 0, 0
    for case in range(500):
        mode = modes[case % len(modes)]
        path = tmp_path / f"photo.{'tif' if mode == 'CMYK' else 'png'}"
        image = _random_photo(rng, mode, 1200 if case % 50 == 0 else 96, make_pixels)  # big ones have several scales
        image.save(path, **({"transparency": image.info["transparency"]} if mode == "P+transparency" else {}))
        levels, strength = int(rng.integers(1, 256 if case % 5 == 0 else 33)), float(rng.uniform(0.2, 1))
        original = read_photo(path)
        [protected] = pipeline.protect_batch([original], levels / 255, strength)
        saved = read_photo(Image.open(io.BytesIO(encode_photo(protected, format=("png", "webp")[case % 2]))))
        change = largest_change(saved.pixels, original.pixels)
        if change > levels:
            violations.append(f"case {case}: {mode} {image.size}, {levels} levels, strength {strength:.2f}: {change}")
        idle += change == 0 and levels * strength >= 4
        if original.alpha is not None:  # WebP leaves out an alpha that is opaque everywhere
            alpha = np.full_like(original.alpha, 255) if saved.alpha is None else saved.alpha
            alpha_changes += not np.array_equal(alpha, original.alpha)
        assert original.gray == (mode in ("L", "LA", "I;16", "1"))
    assert not violations, f"{len(violations)} violations of the budget in 500 cases: {violations}"
    assert alpha_changes == 0, f"alpha changed in {alpha_changes} of 500 cases"
    assert idle < 5, f"nothing was added to {idle} of 500 photos, so that they show little"
