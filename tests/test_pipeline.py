"""The pipeline's call, the generators and the discriminator."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from gap_diff_diffusers import (
    GAPDiffDiscriminator,
    GAPDiffGenerator,
    GAPDiffProtectionPipeline,
    GAPDiffProtectionPipelineOutput,
    PhotoError,
)
from gap_diff_diffusers.budget import budget_levels
from gap_diff_diffusers.images import Photo, resize_pixels
from gap_diff_diffusers.models.gap_diff_generator import photo_keys


@pytest.fixture(scope="module")
def pipe(make_pipeline) -> GAPDiffProtectionPipeline:
    return make_pipeline()


def differences(image, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(image, np.int16)[..., :3] - pixels


def as_levels(values: np.ndarray) -> np.ndarray:
    """Floats in [0,1] or [-1,1] that are whole levels, as those."""
    levels = np.asarray(values, np.float64) * 255
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    return np.rint(levels).astype(np.int16)


# --- What goes in --------------------------------------------------------------------------------------------------
def forms(pixels: np.ndarray, folder) -> dict:
    path = folder / "photo.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return {
        "PIL": Image.fromarray(pixels),
        "Path": path,
        "str": str(path),
        "Photo": Photo(pixels=pixels),
        "uint8 array": pixels,
        "read-only array": np.asarray(Image.fromarray(pixels)),
        "array of strides": np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1],
        "float32 array": pixels.astype(np.float32) / 255,
        "float64 array": pixels / 255,
        "float array off by less than half a level": np.clip(pixels / 255 + 0.4 / 255, 0, 1),
        "uint8 tensor": tensor,
        "float32 tensor": tensor / 255,
        "float16 tensor": (tensor / 255).half(),
        "tensor with gradient": (tensor / 255).requires_grad_(),
        "tuple": (pixels,),
        "(N,H,W,3) array": pixels[None],
        "(N,3,H,W) tensor": tensor[None] / 255,
    }


def test_the_form_of_a_photo_does_not_matter(pipe, make_pixels, tmp_path):
    pixels = make_pixels()
    wanted = np.asarray(pipe(pixels).images[0])
    assert not np.array_equal(wanted, pixels)
    for name, photo in forms(pixels, tmp_path).items():
        before = photo.copy() if isinstance(photo, np.ndarray) else None
        (image,) = pipe(photo).images
        np.testing.assert_array_equal(np.asarray(image), wanted, err_msg=name)
        if before is not None:
            np.testing.assert_array_equal(photo, before, err_msg=name)


def test_a_list_of_all_forms_and_sizes_keeps_its_order(pipe, make_pixels, tmp_path):
    photos, wanted = [], []
    for index, (height, width) in enumerate([(40, 56), (16, 16), (40, 56), (33, 17), (16, 200)]):
        pixels = make_pixels(height, width, seed=index)
        photos += (forms(pixels, tmp_path)["PIL" if index % 2 else "float32 array"],)
        wanted.append(pipe(pixels))
    for batch_size in (1, 4):
        output = pipe(photos, batch_size=batch_size)
        for index, alone in enumerate(wanted):
            np.testing.assert_array_equal(np.asarray(output.images[index]), np.asarray(alone.images[0]))
            np.testing.assert_array_equal(output.perturbation[index], alone.perturbation[0])
        assert output.budget == [alone.budget[0] for alone in wanted]
        assert output.psnr == [alone.psnr[0] for alone in wanted]
        assert output.ssim == [alone.ssim[0] for alone in wanted]


def test_gray_arrays_are_like_rgb_ones(pipe, make_pixels):
    gray = make_pixels()[..., 0]
    rgb = np.repeat(gray[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(pipe(gray).images[0]), np.asarray(pipe(rgb).images[0]))


def test_gray_photos_stay_gray(pipe, make_pixels):
    gray = Image.fromarray(make_pixels()).convert("L")
    output = pipe(gray)
    assert output.images[0].mode == "L"
    assert output.images[0].size == gray.size
    change = np.asarray(output.images[0], np.int16) - np.asarray(gray)
    assert 0 < np.abs(change).max() == output.budget[0] <= 8
    np.testing.assert_array_equal(output.perturbation[0], np.repeat(change[:, :, None], 3, axis=2))


def test_alpha_stays_as_it_is(pipe, make_pixels):
    alpha = make_pixels(seed=3)[..., 0]
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(make_pixels()).convert(mode[:-1])
        image.putalpha(Image.fromarray(alpha))
        protected = pipe(image).images[0]
        assert protected.mode == mode
        np.testing.assert_array_equal(np.asarray(protected.getchannel("A")), alpha)
        assert not np.array_equal(np.asarray(protected)[..., 0], np.asarray(image)[..., 0])


def test_the_color_profile_stays(pipe, make_pixels, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(make_pixels()).save(tmp_path / "photo.png", icc_profile=profile)
    assert pipe(tmp_path / "photo.png").images[0].info["icc_profile"] == profile


def test_a_turned_photo_comes_out_upright_at_its_size(pipe, make_pixels):
    image = Image.fromarray(make_pixels(40, 56))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise"
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = 6
    protected = pipe(image).images[0]
    assert protected.size == (40, 56)
    assert np.abs(differences(protected, np.rot90(np.asarray(image), -1))).max() <= 8


# --- What comes out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [[(40, 56)] * 2, [(40, 56), (33, 17)]], ids=["one size", "two sizes"])
def test_output_types_agree_to_the_bit(pipe, make_pixels, sizes):
    photos = [make_pixels(*size, seed=index) for index, size in enumerate(sizes)]
    pil, array, tensor = (pipe(photos, output_type=output_type) for output_type in ("pil", "np", "pt"))
    assert isinstance(array.images, np.ndarray) == isinstance(tensor.images, torch.Tensor) == (len({*sizes}) == 1)
    for index, pixels in enumerate(photos):
        assert isinstance(pil.images[index], Image.Image)
        assert pil.perturbation[index].dtype == np.int16
        assert array.images[index].dtype == array.perturbation[index].dtype == np.float32
        assert tensor.images[index].dtype == tensor.perturbation[index].dtype == torch.float32
        assert array.images[index].shape == pixels.shape
        assert tensor.images[index].shape == (3, *pixels.shape[:2])
        image, perturbation = np.asarray(pil.images[index]), pil.perturbation[index]
        np.testing.assert_array_equal(differences(image, pixels), perturbation)
        np.testing.assert_array_equal(as_levels(array.images[index]), image)
        np.testing.assert_array_equal(as_levels(array.perturbation[index]), perturbation)
        np.testing.assert_array_equal(tensor.images[index].permute(1, 2, 0), array.images[index])
        np.testing.assert_array_equal(tensor.perturbation[index].permute(1, 2, 0), array.perturbation[index])
    assert pil.budget == array.budget == tensor.budget
    assert pil.psnr == array.psnr == tensor.psnr
    assert pil.ssim == array.ssim == tensor.ssim


def test_protected_tensors_can_be_protected_and_saved_again(pipe, make_pixels):
    """Values of "np" and "pt" are whole levels: going through them loses nothing."""
    output = pipe(make_pixels(), output_type="pt")
    again = pipe(output.images, strength=1e-6)
    np.testing.assert_array_equal(np.asarray(again.images[0]), as_levels(output.images[0].permute(1, 2, 0)))


def test_return_dict(pipe, make_pixels):
    output = pipe(make_pixels())
    assert isinstance(output, GAPDiffProtectionPipelineOutput)
    images, perturbation, budget, psnr, ssim = pipe(make_pixels(), return_dict=False)
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(output.images[0]))
    np.testing.assert_array_equal(perturbation[0], output.perturbation[0])
    assert (budget, psnr, ssim) == (output.budget, output.psnr, output.ssim)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 on the luma, window by window."""
    luma = (0.299, 0.587, 0.114)
    x, y = (np.tensordot(z.astype(np.float64), luma, axes=1) for z in (x, y))
    gauss = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / gauss.sum() ** 2
    x, y = (np.lib.stride_tricks.sliding_window_view(z, (11, 11)) for z in (x, y))

    def mean(z):
        return (z * window).sum(axis=(2, 3))

    mx, my = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = mean(x * y) - mx * my
    variances = mean(x * x) - mx**2 + mean(y * y) - my**2
    return (((2 * mx * my + c1) * (2 * covariance + c2)) / ((mx**2 + my**2 + c1) * (variances + c2))).mean()


def test_the_figures_are_what_anybody_would_measure(pipe, make_pixels):
    pixels = make_pixels()
    output = pipe(pixels)
    protected = np.asarray(output.images[0])
    assert output.budget == [np.abs(differences(protected, pixels)).max()]
    assert output.psnr == [
        pytest.approx(20 * math.log10(255 / np.sqrt((differences(protected, pixels) ** 2.0).mean())))
    ]
    assert output.ssim == [pytest.approx(reference_ssim(protected, pixels), abs=1e-4)]
    assert 0.3 < output.ssim[0] < 0.999
    unchanged = pipe(pixels, strength=1e-6)
    assert (unchanged.budget, unchanged.psnr) == ([0], [math.inf])
    assert unchanged.ssim == [pytest.approx(1)]


# --- The budget ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [1, 2, 8, 16, 100, 255])
def test_the_budget_is_kept_and_used(pipe, make_pixels, levels):
    pixels = make_pixels()
    for noise_budget in (levels / 255, (levels + 0.9) / 255 if levels < 255 else 1.0):
        assert budget_levels(noise_budget) == levels
        output = pipe(pixels, noise_budget=noise_budget)
        assert np.abs(differences(output.images[0], pixels)).max() == output.budget[0] <= levels
        assert output.budget[0] >= 0.9 * min(levels, 200)


def test_the_budget_is_the_checkpoints_unless_said(make_pipeline, make_pixels):
    pipe = make_pipeline(noise_budget=3 / 255)
    assert pipe(make_pixels()).budget == [3]
    assert pipe(make_pixels(), noise_budget=5 / 255).budget == [5]
    assert pipe(make_pixels()).budget == [3]


def test_black_and_white_photos_stay_in_range(pipe):
    for value in (0, 255):
        pixels = np.full((24, 24, 3), value, np.uint8)
        change = differences(pipe(pixels).images[0], pixels)
        assert (change.min() >= 0) if value == 0 else (change.max() <= 0)
        assert np.abs(change).max() <= 8


def test_strength_scales(pipe, make_pixels):
    pixels = make_pixels() // 2 + 64  # away from black and white, which clip
    full, half = (pipe(pixels, strength=strength).perturbation[0] for strength in (1.0, 0.5))
    assert np.abs(half - full / 2).max() <= 1  # both are rounded
    assert 3 <= np.abs(half).max() <= 4


# --- What a result depends on --------------------------------------------------------------------------------------
def test_calls_repeat_exactly_and_need_no_seed(pipe, make_pixels):
    state = torch.random.get_rng_state()
    first = np.asarray(pipe(make_pixels()).images[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    np.testing.assert_array_equal(np.asarray(pipe(make_pixels()).images[0]), first)


def test_a_photo_does_not_depend_on_its_batch_mates(pipe, make_pixels):
    photos = [make_pixels(seed=seed) for seed in range(4)]
    alone = [np.asarray(pipe(photo).images[0], np.int16) for photo in photos]
    assert len({image.tobytes() for image in alone}) == 4
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for batch_size, tolerance in ((1, 0), (3, 1)):
            output = pipe([photos[index] for index in order], batch_size=batch_size)
            for index, image in zip(order, output.images, strict=True):
                assert np.abs(np.asarray(image) - alone[index]).max() <= tolerance


def test_it_depends_on_the_photo(pipe, make_pixels):
    first, second = (pipe(make_pixels(seed=seed)).perturbation[0].astype(float).ravel() for seed in (0, 1))
    assert np.corrcoef(first, second)[0, 1] < 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(make_pipeline, make_pixels, dtype):
    pixels = make_pixels()
    exact = make_pipeline()(pixels)
    pipe = make_pipeline().to(dtype)
    assert pipe.generator.dtype == dtype
    output = pipe(pixels)
    assert 7 <= output.budget[0] <= 8
    assert np.abs(output.perturbation[0] - exact.perturbation[0]).mean() < 0.3
    assert pipe(pixels, output_type="pt").images.dtype == torch.float32


def test_components_make_another_pipeline(pipe, make_pixels):
    other = GAPDiffProtectionPipeline(**pipe.components, **pipe.parameters)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(
        np.asarray(other(make_pixels()).images[0]), np.asarray(pipe(make_pixels()).images[0])
    )


def test_the_progress_bar_counts_photos_and_can_be_off(make_pipeline, make_pixels, capfd):
    pipe = make_pipeline()
    photos = [make_pixels(), make_pixels(16, 16), make_pixels()]
    pipe(photos)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    pipe(photos)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


# --- What is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_budget": 0.0}, "noise budget"),
        ({"noise_budget": 0.5 / 255}, "8/255"),
        ({"noise_budget": 8}, "8/255"),
        ({"noise_budget": -8 / 255}, "noise budget"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"output_type": "jpeg"}, "'pil', 'np' or 'pt'"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
    ],
    ids=str,
)
def test_arguments_out_of_range(pipe, make_pixels, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(make_pixels(), **arguments)


def refused_photos() -> dict:
    good = np.full((20, 20, 3), 0.5, np.float32)
    with_nan = good.copy()
    with_nan[3, 4, 1] = np.nan
    tensor = torch.from_numpy(good).permute(2, 0, 1)
    return {
        "NaN": (with_nan, "[0,1]"),
        "infinite": (np.where(np.isnan(with_nan), np.inf, with_nan), "[0,1]"),
        "in [-1,1]": (good * 2 - 1.5, "got -0.5 to -0.5"),
        "just above 1": (good + 0.5000001, "1.0000001"),
        "floats of 0..255": (good * 255, "127.5"),
        "tensor in [-1,1]": (tensor - 1, "[0,1]"),
        "int64": (np.zeros((20, 20, 3), np.int64), "int64"),
        "int64 tensor": (torch.zeros(3, 20, 20, dtype=torch.int64), "int64"),
        "bool": (np.zeros((20, 20), bool), "bool"),
        "channels first array": (np.zeros((3, 20, 20), np.uint8), "(3, 20, 20)"),
        "channels last tensor": (torch.zeros(20, 20, 3), "(20, 20, 3)"),
        "RGBA array": (np.zeros((20, 20, 4), np.uint8), "(20, 20, 4)"),
        "one dimension": (np.zeros(20, np.uint8), "(20,)"),
        "gray tensor": (torch.zeros(20, 20), "(20, 20)"),
        "too small": (np.zeros((15, 20, 3), np.uint8), "20x15"),
        "too small tensor": (torch.zeros(3, 20, 1), "1x20"),
        "too small PIL": (Image.new("RGB", (20, 15)), "20x15"),
        "no pixels": (np.zeros((0, 20, 3), np.uint8), "20x0"),
        "missing": ("/missing/photo.png", "no such file"),
        "a number": (3, "int"),
        "None": (None, "NoneType"),
        "a list of lists": ([good], "list"),
    }


@pytest.mark.parametrize("name", refused_photos())
def test_photos_that_are_refused_are_named_by_position(pipe, make_pixels, name):
    photo, message = refused_photos()[name]
    with pytest.raises(PhotoError, match=rf"(?s)photo 1 of 3: .*{re.escape(message)}"):
        pipe([make_pixels(), photo, make_pixels()])
    if not isinstance(photo, list):
        with pytest.raises(PhotoError, match=re.escape(message)):
            pipe(photo)


def test_a_bad_photo_of_a_batch_is_named_too(pipe):
    batch = torch.full((3, 3, 20, 20), 0.5)
    batch[2, 0, 0, 0] = 1.5
    with pytest.raises(PhotoError, match="photo 2 of 3"):
        pipe(batch)
    with pytest.raises(PhotoError, match=r"photo 0 of 2: .*\(20, 20, 4\)"):
        pipe(np.zeros((2, 20, 20, 4), np.uint8))


def test_no_photos(pipe):
    for nothing in ([], (), np.zeros((0, 20, 20, 3), np.uint8), torch.zeros(0, 3, 20, 20)):
        with pytest.raises(ValueError, match="at least one photo"):
            pipe(nothing)


def test_a_generator_in_training_mode(make_pipeline, make_pixels):
    pipe = make_pipeline()
    pipe.generator.train()
    with pytest.raises(ValueError, match=r"generator\.eval\(\)"):
        pipe(make_pixels())


def test_a_pipeline_with_an_impossible_budget(make_generator):
    with pytest.raises(ValueError, match="noise budget"):
        GAPDiffProtectionPipeline(make_generator(), noise_budget=8)


# --- The generator -------------------------------------------------------------------------------------------------
def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (16, 500), (333, 18), (64, 48), (129, 127)], ids=str)
@pytest.mark.parametrize("downscale", [1, 2])
def test_generator_takes_any_size(make_generator, size, downscale):
    generator = make_generator(channels=(8, 16, 8), layers_per_block=(1, 2, 1), downscale=downscale)
    images = noise(2, *size)
    with torch.no_grad():
        perturbation = generator(images)
    assert perturbation.shape == images.shape
    assert perturbation.dtype == images.dtype
    assert 0.1 < perturbation.abs().max() <= 1


def test_generator_samples_are_independent(make_generator):
    generator, images = make_generator(), noise(3, 40, 56)
    with torch.no_grad():
        together = generator(images)
        for index in range(3):
            torch.testing.assert_close(generator(images[index : index + 1])[0], together[index], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_paper_architecture(make_generator, make_pipeline, make_pixels):
    generator = make_generator(architecture="paper", channels=(4,), layers_per_block=())
    images = noise(2, 512, 512)
    with torch.no_grad():
        together = generator(images)
        alone = generator(images[1:])
    assert together.shape == images.shape
    assert together.abs().max() <= 1
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)
    for height, width in ((256, 512), (512, 500), (511, 512)):
        with pytest.raises(ValueError, match=rf"multiples of 256 from 512 up, got {height}x{width}"):
            generator(noise(1, height, width))
    pipe = make_pipeline(architecture="paper", channels=(4,), layers_per_block=())
    output = pipe(make_pixels(40, 56))  # the pipeline resizes where the network cannot
    assert output.images[0].size == (56, 40)
    assert output.budget[0] <= 8


@pytest.mark.parametrize(
    "shape", [(1, 3, 15, 40), (1, 3, 40, 15), (3, 40, 40), (1, 1, 40, 40), (1, 4, 40, 40)], ids=str
)
def test_generator_refuses_shapes(make_generator, shape):
    with pytest.raises(ValueError, match=re.escape("15" if 15 in shape else str(shape))):
        make_generator()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "unet"}, "'unet'"),
        ({"channels": (8, 8), "layers_per_block": (1,)}, "as many channels"),
        ({"architecture": "paper", "channels": (8, 8)}, "one number"),
        ({"architecture": "paper"}, "one number"),
        ({"architecture": "paper", "channels": (8,), "keyed_grid": True}, "keyed_grid"),
    ],
    ids=str,
)
def test_generator_refuses_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        GAPDiffGenerator(**config)


def test_generator_saves_and_loads(make_generator, tmp_path):
    generator, images = make_generator(native_size=300), noise(1, 24, 24)
    generator.save_pretrained(tmp_path)
    loaded, info = GAPDiffGenerator.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.native_size == 300
    assert list(loaded.config.channels) == [8, 8]
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), generator(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["compact", "paper"])
def test_generator_gradients(make_generator, architecture):
    paper = {"architecture": "paper", "channels": (4,), "layers_per_block": ()}
    generator = make_generator(**(paper if architecture == "paper" else {})).requires_grad_(True)
    images = noise(1, *((512, 512) if architecture == "paper" else (21, 34))).requires_grad_()
    generator(images).square().sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().sum() > 0
    without = [n for n, p in generator.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    zero = [n for n, p in generator.named_parameters() if p.grad.abs().sum() == 0]
    assert zero == [] if architecture == "compact" else True


def test_the_border_is_like_the_interior(make_generator):
    """A seam shows, and can be cropped off: seen with zero padding, whose border is another pattern."""
    generator = make_generator(channels=(8, 16, 16), layers_per_block=(1, 1, 1))
    images = 0.9 + 0.05 * (noise(8, 96, 96) - 0.5)  # far from what zero padding stands for, which is 0.5
    with torch.no_grad():
        strength = generator(images).abs().mean(dim=(0, 1))
    interior = strength[16:-16, 16:-16].mean()
    for band in (strength[:2], strength[-2:], strength[:, :2], strength[:, -2:]):
        assert 0.8 * interior < band.mean() < 1.25 * interior


# --- The discriminator ---------------------------------------------------------------------------------------------
def test_keys_are_the_photos_own():
    """As balanced as dice, the same at any resolution and beside any other photo."""
    photos = torch.rand(90, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(photos, (32, 32), mode="bilinear")
    large = torch.nn.functional.interpolate(small, (64, 64), mode="nearest")
    keys = photo_keys(small, 3)
    assert keys.shape == (90, 2) and len({tuple(key) for key in keys.tolist()}) == 9
    assert all(15 < count < 45 for column in keys.T for count in torch.bincount(column).tolist())
    assert torch.equal(photo_keys(large, 3), keys) and torch.equal(photo_keys(small[5:6], 3), keys[5:6])
    assert (photo_keys((small * 255).round() / 255, 3) == keys).float().mean() > 0.95


def test_a_keyed_grid_begins_where_the_photo_says(make_generator):
    """One block of 8 px earlier or later: as without a key on the photo that begins there, but for its edges."""
    plain, keyed = make_generator(), make_generator(keyed_grid=True)
    for generator in (plain, keyed):  # what the whole photo adds is of another photo there
        generator.network.summary[-1].weight.data.zero_()
    photos = (torch.nn.functional.interpolate(noise(12, 8, 8), (320, 320)) + noise(12, 320, 320)) / 2
    keys = photo_keys(photos, 3).tolist()
    assert len({tuple(key) for key in keys}) > 4
    with torch.no_grad():
        drawn = keyed(photos)
        for photo, (top, left), perturbation in zip(photos, keys, drawn):
            torch.testing.assert_close(keyed(photo[None])[0], perturbation, atol=1e-5, rtol=0)
            # This network's blocks are of 16 px, so a grid that begins 8 px earlier is one that begins 8 px later.
            rows, columns = (8 * (1 - key) % 16 for key in (top, left))
            elsewhere = plain(photo[None, :, rows:, columns:])[0]
            inside = slice(136, 184)
            shifted = elsewhere[:, 136 - rows : 184 - rows, 136 - columns : 184 - columns]
            torch.testing.assert_close(perturbation[:, inside, inside], shifted, atol=1e-4, rtol=0)


def test_discriminator():
    torch.manual_seed(0)
    discriminator = GAPDiffDiscriminator(channels=16, num_blocks=2)
    for size in ((16, 16), (17, 33), (1, 1), (5, 200)):
        assert discriminator(noise(3, *size)).shape == (3,)
    images = noise(3, 24, 24).requires_grad_()
    logits = discriminator(images)
    for index in range(3):  # in training mode too
        torch.testing.assert_close(discriminator(images[index : index + 1])[0], logits[index], rtol=0, atol=1e-5)
    assert logits.unique().numel() == 3
    logits[1].backward()
    assert images.grad[1].abs().sum() > 0
    assert images.grad[[0, 2]].abs().sum() == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in discriminator.parameters())


def test_discriminator_learns_to_tell_perturbed_photos(make_pixels):
    torch.manual_seed(0)
    discriminator = GAPDiffDiscriminator(channels=16, num_blocks=2)
    photos = torch.stack([torch.from_numpy(make_pixels(24, 24, seed=s)).permute(2, 0, 1) / 255 for s in range(6)])
    protected = (photos + 32 / 255 * noise(6, 24, 24).sub(0.5).sign()).clamp(0, 1)
    both, labels = torch.cat([photos, protected]), torch.tensor([1.0] * 6 + [0.0] * 6)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(discriminator(both), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((discriminator(both) > 0) == (labels > 0)).all()


def test_discriminator_saves_loads_and_refuses(tmp_path):
    discriminator = GAPDiffDiscriminator(channels=8, num_blocks=1)
    discriminator.save_pretrained(tmp_path)
    assert torch.equal(GAPDiffDiscriminator.from_pretrained(tmp_path)(noise(1, 9, 9)), discriminator(noise(1, 9, 9)))
    for config in ({"channels": 12}, {"num_blocks": 0}):
        with pytest.raises(ValueError, match="channels in eights"):
            GAPDiffDiscriminator(**config)
    with pytest.raises(ValueError, match=r"\(1, 1, 9, 9\)"):
        discriminator(torch.zeros(1, 1, 9, 9))


# --- Faces -----------------------------------------------------------------------------------------------------------
def test_a_face_is_protected_as_the_crop_that_an_attacker_makes_of_it(make_pipeline, make_pixels):
    """In the square twice as wide as the face: what protecting that square at the native size adds to it."""
    pipe = make_pipeline(native_size=64)
    pixels = make_pixels(400, 500)
    box = (250, 150, 350, 250)  # so the square is 200 px, at (200, 100)
    with_face = pipe.protect_batch([Photo(pixels=pixels)], faces=[[box]])[0].pixels.astype(int) - pixels
    without = pipe.protect_batch([Photo(pixels=pixels)])[0].pixels.astype(int) - pixels
    far = np.ones((400, 500), bool)
    far[85:315, 185:415] = False
    assert np.array_equal(with_face[far], without[far])
    assert np.abs(with_face).max() <= 8

    square = Photo(pixels=resize_pixels(np.ascontiguousarray(pixels[90:310, 190:410]), 70, 70))
    alone = pipe.protect_batch([square])[0].pixels.astype(float) - square.pixels
    expected = np.asarray(
        [Image.fromarray(alone[..., c].astype(np.float32)).resize((220, 220), 3) for c in range(3)]
    ).transpose(1, 2, 0)[10:-10, 10:-10]
    drawn = with_face[100:300, 200:400]
    inside = (pixels[100:300, 200:400] > 8) & (pixels[100:300, 200:400] < 247)
    assert np.corrcoef(expected[inside], drawn[inside])[0, 1] > 0.95
    assert np.corrcoef(expected[inside], without[100:300, 200:400][inside])[0, 1] < 0.7


def test_a_face_that_an_attacker_has_to_enlarge_gets_as_much(make_pipeline, make_pixels):
    pipe = make_pipeline(native_size=64)
    pixels = make_pixels(200, 200).clip(20, 235)
    small, large = (
        pipe.protect_batch([Photo(pixels=pixels)], faces=[[box]])[0].pixels.astype(float) - pixels
        for box in ((92, 92, 108, 108), (68, 68, 132, 132))
    )
    power = [
        np.square(change[slice(*part), slice(*part)]).mean()
        for change, part in ((small, (84, 116)), (large, (36, 164)))
    ]
    assert power[0] == pytest.approx(power[1], rel=0.25)


def test_faces_at_the_edge_and_tiny_ones_are_no_trouble(make_pipeline, make_pixels):
    pipe = make_pipeline()
    pixels = make_pixels(120, 90)
    boxes = [(-20, -10, 40, 50), (70, 100, 110, 140), (50, 50, 52, 52)]
    output = pipe([pixels, pixels], faces=[boxes, []], output_type="np")
    assert max(output.budget) <= 8
    assert np.array_equal(output.images[1], pipe(pixels, output_type="np").images[0])
    assert not np.array_equal(output.images[0], output.images[1])


@pytest.mark.parametrize(
    ("faces", "message"),
    [
        ([[], []], "each of the 1 photos"),
        ([[(5, 5, 5, 9)]], "left, top, right, bottom"),
        ([(5, 5, 9, 9)], "got 5 as a box"),
    ],
)
def test_boxes_that_are_none_are_refused(make_pipeline, make_pixels, faces, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_pixels(), faces=faces)
