"""The transforms: range, size, pinned and drawn strengths, replay, gradients, and that each does what it says."""

import inspect
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gap_diff_diffusers import transforms
from gap_diff_diffusers.transforms import (
    PRESETS,
    PUBLISHING,
    TRANSFORMS,
    AdverseCleaner,
    Compose,
    DifferentiableJPEG,
    GaussianBlur,
    Identity,
    JPEGMask,
    Publish,
    Quantize,
    RandomChoice,
    RandomNoise,
    RealJPEG,
    RealWebP,
    Resize,
    ResizeDownUp,
    Transform,
    build_transform,
)

RANDOM_SPECS = [
    {"name": "differentiable_jpeg", "quality": [30, 90]},
    {"name": "gaussian_blur", "sigma": [0.5, 2.0]},
    {"name": "jpeg", "quality": [30, 90], "subsampling": ["4:2:0", "4:4:4"]},
    {"name": "quantize", "levels": [4, 64]},
    {"name": "random_noise", "std": [0.02, 0.1]},
    {"name": "resize", "scale": [0.3, 0.9]},
    {"name": "resize", "long_side": [8, 30]},
    {"name": "resize_down_up", "scale": [0.3, 0.9]},
    {"name": "webp", "quality": [30, 90]},
    {"name": "random_choice", "choices": ["jpeg_mask", "gaussian_blur", "identity"], "weights": [1, 1, 1]},
    [{"name": "resize", "scale": [0.3, 0.9]}, {"name": "random_noise", "std": [0.02, 0.1]}],
]
# Those that draw with the face model that ships, quickly; the one whose model does not is tested with another below.
QUICK = {
    "diffpure": {"name": "diffpure", "resolution": 32, "steps": 2},
    "gridpure": {"name": "gridpure", "resolution": 32, "steps": 1, "iterations": 2},
    "impress": {"name": "impress", "steps": 2},
}
every_name = pytest.mark.parametrize("name", [QUICK.get(name, name) for name in sorted({*TRANSFORMS} - {"upscale"})])
every_random_spec = pytest.mark.parametrize("spec", RANDOM_SPECS, ids=json.dumps)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photos(count: int = 2, height: int = 17, width: int = 33, *, seed: int = 0) -> torch.Tensor:
    """Soft shapes with a little texture, over the whole of [0, 1]: closer to a photo than white noise."""
    coarse = torch.rand(count, 3, 5, 6, generator=generator(seed))
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (soft + 0.05 * torch.randn(soft.shape, generator=generator(seed + 1))).clamp(0, 1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def assert_draws_differ(transform: Transform) -> None:
    draws = {json.dumps(transform.draw(generator=generator(seed))) for seed in range(20)}
    assert len(draws) > 1


@every_name
@pytest.mark.parametrize("training", [True, False])
def test_range_and_shape(name, training):
    transform = build_transform(name).train(training)
    images = photos()
    before = images.clone()
    result = transform(images, generator=generator())
    assert result.dtype == torch.float32
    assert result.shape == ((2, 3, 8, 16) if name == "resize" else images.shape)
    assert result.min() >= 0 and result.max() <= 1
    assert torch.equal(images, before)


@every_name
def test_extremes_stay_in_range(name):
    noise = (torch.rand(1, 3, 16, 24, generator=generator()) > 0.5).float()
    result = build_transform(name)(noise, generator=generator())
    assert result.min() >= 0 and result.max() <= 1


@every_name
def test_images_of_a_batch_do_not_mix(name):
    transform = build_transform(name).eval()
    first = photos(1)
    alone = transform(first)
    together = transform(torch.cat([first, photos(1, seed=7)]))[:1]
    assert torch.allclose(alone, together, atol=1e-6)


@every_name
def test_wrong_shapes_are_refused(name):
    for wrong in (torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected floating-point images of shape \(N, 3, H, W\)"):
            build_transform(name)(wrong)


@every_random_spec
def test_pinned_in_evaluation(spec):
    transform = build_transform(spec).eval()
    first = transform(photos(), generator=generator(1))
    assert torch.equal(first, transform(photos(), generator=generator(2)))
    used = generator(3)
    transform(photos(), generator=used)
    assert torch.equal(used.get_state(), generator(3).get_state())


@every_random_spec
def test_drawn_in_training(spec):
    transform = build_transform(spec).train()
    assert_draws_differ(transform)
    first = transform(photos(), generator=generator(1))
    assert torch.equal(first, transform(photos(), generator=generator(1)))
    results = [transform(photos(), generator=generator(seed)) for seed in range(20)]
    assert any(one.shape != first.shape or not torch.equal(one, first) for one in results)


@every_random_spec
def test_a_passed_generator_leaves_the_global_one_alone(spec):
    state = torch.get_rng_state()
    build_transform(spec).train()(photos(), generator=generator())
    assert torch.equal(state, torch.get_rng_state())


@every_random_spec
def test_one_draw_for_a_pair(spec):
    transform = build_transform(spec).train()
    clean = photos()
    draw = json.loads(json.dumps(transform.draw(generator=generator(5))))
    replayed = transform.apply_draw(clean, draw)
    assert torch.equal(replayed, transform(clean, generator=generator(5)))
    assert torch.equal(replayed, transform.apply_draw(clean.clone(), draw))


def test_a_pair_gets_the_same_noise():
    transform = Compose([Resize(0.5), RandomNoise((0.05, 0.1))]).train()
    clean, protected = torch.full((2, 3, 16, 16), 0.4), torch.full((2, 3, 16, 16), 0.6)
    draw = transform.draw(generator=generator())
    difference = transform.apply_draw(protected, draw) - transform.apply_draw(clean, draw)
    assert torch.allclose(difference, torch.full_like(difference, 0.2), atol=1e-5)


@every_name
def test_gradients_reach_the_pixels(name):
    transform = build_transform(name)
    images = photos().requires_grad_()
    result = transform(images, generator=generator())
    assert transform.differentiable == result.requires_grad
    if not transform.differentiable:
        return
    (gradient,) = torch.autograd.grad((result * torch.rand(result.shape, generator=generator(3))).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9


def test_combinations_are_as_differentiable_as_their_parts():
    class Blocked(Transform):
        differentiable = False

    for make in (Compose, RandomChoice):
        assert make([Identity(), RealJPEG()]).differentiable
        assert not make([Identity(), Blocked()]).differentiable


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [30, 70, 95])
def test_real_jpeg_is_pillow_to_the_bit(quality, subsampling):
    images = photos(1, 40, 56)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(images)[0]).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    result = RealJPEG((1, 100), pinned=quality, subsampling=subsampling).eval()(images)
    expected = np.array(Image.open(buffer))
    assert np.array_equal(to_uint8(result)[0], expected)
    assert torch.equal(result[0], torch.from_numpy(expected).permute(2, 0, 1) / 255)


def test_real_webp_is_pillow_to_the_bit():
    images = photos(1, 40, 56)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(images)[0]).save(buffer, "WEBP", quality=60)
    assert np.array_equal(to_uint8(RealWebP(60)(images))[0], np.array(Image.open(buffer).convert("RGB")))


def test_real_codecs_pass_the_gradient_straight_through():
    images = photos().requires_grad_()
    weights = torch.rand(images.shape, generator=generator())
    for transform in (RealJPEG(20), RealWebP(20), Quantize(4)):
        (gradient,) = torch.autograd.grad((transform(images) * weights).sum(), images)
        assert torch.equal(gradient, weights)


def test_chroma_subsampling_matters_and_both_are_drawn():
    images = photos(1, 32, 32)
    results = [RealJPEG(90, subsampling=subsampling)(images) for subsampling in ("4:2:0", "4:4:4")]
    assert (results[0] - results[1]).abs().max() > 4 / 255
    both = RealJPEG(90, subsampling=("4:4:4", "4:2:0"))
    drawn = {both.draw(generator=generator(seed))["subsampling"] for seed in range(20)}
    assert drawn == {"4:2:0", "4:4:4"}
    assert both.eval().draw()["subsampling"] == "4:4:4"


def block_dct(channel: np.ndarray) -> np.ndarray:
    """The orthonormal DCT of every 8x8 block, from the definition: (rows, columns, 8, 8)."""
    basis = np.array(
        [
            [np.sqrt((1 if k == 0 else 2) / 8) * np.cos(np.pi * (2 * n + 1) * k / 16) for n in range(8)]
            for k in range(8)
        ]
    )
    rows, columns = channel.shape[0] // 8, channel.shape[1] // 8
    blocks = channel.reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3)
    return basis @ blocks @ basis.T


def to_yuv(image: torch.Tensor) -> np.ndarray:
    red, green, blue = image.double().numpy()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 0.492 * (blue - luma), 0.877 * (red - luma)])


def test_jpeg_mask_zeroes_exactly_the_high_coefficients():
    images = photos(1, 24, 40) * 0.2 + 0.4  # far from 0 and 1, where clipping would add coefficients
    before, after = (to_yuv(batch[0]) for batch in (images, JPEGMask()(images)))
    for channel, size in enumerate((5, 3, 3)):
        original, masked = block_dct(before[channel]), block_dct(after[channel])
        kept = np.zeros((8, 8), dtype=bool)
        kept[:size, :size] = True
        assert np.abs(masked[..., ~kept]).max() < 1e-3 < np.abs(original[..., ~kept]).max()
        assert np.abs(masked - original)[..., kept].max() < 1e-3


def test_jpeg_mask_is_idempotent_up_to_clipping():
    images = photos(1, 24, 40) * 0.2 + 0.4
    once = JPEGMask()(images)
    assert torch.allclose(JPEGMask()(once), once, atol=1e-5)
    assert not torch.allclose(once, images, atol=1e-2)
    assert torch.allclose(JPEGMask(8, chroma=8)(images), images, atol=1e-5)


def test_jpeg_mask_pads_by_replicating_the_edge():
    images = photos(1, 17, 33)
    padded = torch.nn.functional.pad(images, (0, 7, 0, 7), mode="replicate")
    assert torch.allclose(JPEGMask()(images), JPEGMask()(padded)[..., :17, :33], atol=1e-6)


@pytest.mark.parametrize("quality", [50, 90])
def test_differentiable_jpeg_is_close_to_the_real_one(quality):
    images = photos(2, 64, 96)
    real, approximation = RealJPEG(quality)(images), DifferentiableJPEG(quality)(images)
    error = (approximation - real).square().mean().sqrt()
    assert error < 0.5 * (images - real).square().mean().sqrt()


def test_quality_orders_the_error():
    images = photos(1, 64, 64)
    for make in (DifferentiableJPEG, RealJPEG, RealWebP):
        low, high = ((make(quality)(images) - images).square().mean() for quality in (20, 95))
        assert low > 1.5 * high


def test_gaussian_blur_is_the_convolution_it_says():
    impulse = torch.zeros(1, 3, 15, 15)
    impulse[..., 7, 7] = 1
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 2.0**2))
    expected = np.outer(weights, weights) / weights.sum() ** 2
    assert np.allclose(GaussianBlur()(impulse)[0, 1, 4:11, 4:11].numpy(), expected, atol=1e-6)


def test_resize_sizes():
    images = photos(1, 20, 50)
    assert Resize(0.5)(images).shape[-2:] == (10, 25)
    assert Resize(long_side=25)(images).shape[-2:] == (10, 25)
    assert Resize(long_side=25)(images.transpose(2, 3)).shape[-2:] == (25, 10)
    assert Resize(long_side=1)(images).shape[-2:] == (1, 1)
    assert torch.equal(Resize(long_side=60)(images), images)
    assert torch.equal(Resize(1.0)(images), images)
    assert ResizeDownUp(0.3)(images).shape == images.shape
    assert (ResizeDownUp(0.3)(images) - images).abs().max() > 0.02


def test_resize_is_antialiased():
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 1
    assert torch.allclose(Resize(0.25)(stripes)[..., 2:-2], torch.tensor(0.5), atol=0.05)


@pytest.mark.parametrize("levels", [2, 64, 256])
def test_quantize_levels(levels):
    ramp = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    result = Quantize(levels)(ramp)
    assert len(result.unique()) == levels
    assert result.min() == 0 and result.max() == 1
    assert (result - ramp).abs().max() <= 0.5 / (levels - 1) + 1e-6
    assert abs((result - ramp).mean()) < 1e-3


def test_random_noise_has_its_standard_deviation():
    gray = torch.full((2, 3, 64, 64), 0.5)
    noise = RandomNoise(0.05)(gray, generator=generator()) - gray
    assert abs(noise.std() - 0.05) < 0.002 and abs(noise.mean()) < 0.002
    assert torch.equal(RandomNoise(0.0)(gray), gray)


def test_choices_follow_their_weights():
    mixture = RandomChoice([Quantize(2), Identity(), Quantize(3)], weights=[3, 1, 0]).train()
    used = generator()
    drawn = [mixture.draw(generator=used)["index"] for _ in range(400)]
    assert drawn.count(2) == 0
    assert 250 < drawn.count(0) < 350
    assert mixture.eval().draw()["index"] == 0


def test_draws_stay_in_their_range_and_reach_the_ends():
    used = generator()
    quality = {RealJPEG((50, 53)).draw(generator=used)["quality"] for _ in range(100)}
    assert quality == {50, 51, 52, 53}
    sigmas = [GaussianBlur((0.5, 2.0)).draw(generator=used)["sigma"] for _ in range(100)]
    assert min(sigmas) >= 0.5 and max(sigmas) <= 2.0 and max(sigmas) - min(sigmas) > 1


def test_pinned_values():
    assert RealJPEG((50, 90)).eval().draw()["quality"] == 70
    assert RealJPEG((50, 90), pinned=95).eval().draw()["quality"] == 95
    assert GaussianBlur((1.0, 2.0)).eval().draw()["sigma"] == 1.5
    assert Compose([RealJPEG((50, 90))]).eval().draw() == {"draws": [{"quality": 70, "subsampling": "4:2:0"}]}


@pytest.mark.parametrize("make", [RealJPEG, RealWebP, DifferentiableJPEG])
@pytest.mark.parametrize("quality", [0, 101, -5, (0, 50), (50, 101), (90, 50), (1, 2, 3), "70", float("nan"), True])
def test_bad_quality_is_refused(make, quality):
    with pytest.raises(ValueError, match=r"quality: expected .* got .*; "):
        make(quality)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RealJPEG(70.5), "whole number"),
        (lambda: RealJPEG(subsampling="4:1:1"), "4:2:0, 4:4:4"),
        (lambda: RealJPEG(subsampling=()), "4:2:0, 4:4:4"),
        (lambda: JPEGMask(9), "luma"),
        (lambda: GaussianBlur(0), "sigma"),
        (lambda: GaussianBlur(kernel_size=4), "odd"),
        (lambda: GaussianBlur()(photos(1, 3, 3)), "smaller kernel_size"),
        (lambda: Resize(0), "scale"),
        (lambda: Resize(0.5, long_side=8), "drop one"),
        (lambda: Quantize(1), "levels"),
        (lambda: RandomNoise(-0.1), "std"),
        (lambda: RandomChoice([]), "at least one choice"),
        (lambda: RandomChoice([Identity()], weights=[1, 2]), "weights"),
        (lambda: RandomChoice([Identity()], weights=[0]), "weights"),
        (lambda: Publish("friendster"), "telegram"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(PUBLISHING))
def test_publishing_presets(name):
    preset = PUBLISHING[name]
    assert len(preset.source) > 40
    assert preset.quality is None or "assumed" in preset.source or "4:2:0" in preset.source
    transform = Publish(name)
    small = photos(1, 24, 40)
    assert transform.train().draw() == transform.eval().draw()
    expected = small if preset.quality is None else RealJPEG(preset.quality, subsampling=preset.subsampling)(small)
    assert torch.equal(transform(small), expected)
    if preset.long_side is not None:
        large = torch.rand(1, 3, 8, preset.long_side + 100, generator=generator())
        height = round(8 * preset.long_side / (preset.long_side + 100))
        assert transform(large).shape[-2:] == (height, preset.long_side)


def test_a_published_photo_is_the_file_of_the_site():
    images = torch.rand(1, 3, 20, 1400, generator=generator())
    resized = Resize(long_side=1280)(images)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(resized)[0]).save(buffer, "JPEG", quality=87, subsampling="4:2:0")
    file = Image.open(buffer)
    assert file.size == (1280, 18)
    assert np.array_equal(to_uint8(Publish("telegram")(images))[0], np.array(file))


def test_build_transform():
    built = build_transform([{"name": "resize", "long_side": 16}, {"name": "jpeg", "quality": [50, 90]}, "identity"])
    assert [type(step) for step in built.transforms] == [Resize, RealJPEG, Identity]
    assert built(photos()).shape == (2, 3, 8, 16)
    assert torch.equal(build_transform([])(photos()), photos())
    assert isinstance(build_transform([{"name": "paper"}]).transforms[0], RandomChoice)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_json_and_build(name):
    assert json.loads(json.dumps(PRESETS[name])) == PRESETS[name]
    if "stabilityai/" not in json.dumps(PRESETS[name]):  # that is not here
        assert isinstance(build_transform(name), Transform)


def test_the_paper_mixture():
    mixture = build_transform("paper").train()
    assert [type(choice) for choice in mixture.choices] == [JPEGMask, GaussianBlur, Identity]
    used = generator()
    drawn = [mixture.draw(generator=used)["index"] for _ in range(1000)]
    assert 440 < drawn.count(0) < 560 and 190 < drawn.count(1) < 310


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpg", "'jpg'; available: adverse_cleaner, differentiable_jpeg, diffpure, gaussian_blur, gaussian_noising"),
        ({"name": "jpg"}, "available: .*random_choice"),
        ({"name": "jpeg", "Quality": 50}, "unknown argument 'Quality'; available: quality, subsampling, pinned"),
        ({"name": "identity", "quality": 50}, "available: none"),
        ({"name": "paper", "weights": [1]}, "no arguments for a preset"),
        ({"quality": 50}, "expected a name"),
        ({"name": "random_choice"}, "choices"),
        ({"name": "random_choice", "choices": ["jpg"]}, "'jpg'"),
        ({"name": "random_choice", "choices": ["jpeg"], "p": [1]}, "available: choices, weights"),
        (["jpeg", 5], "expected a name"),
        ({"name": "jpeg", "quality": 0}, "quality"),
        ("upscale", "upscale: expected the argument model, got none"),
    ],
    ids=str,
)
def test_build_transform_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        build_transform(spec)


def test_every_public_transform_is_in_the_registry_and_the_reverse():
    combinations = {Transform, Compose, RandomChoice}
    public = {
        value
        for value in (getattr(transforms, name) for name in transforms.__all__)
        if inspect.isclass(value) and issubclass(value, Transform)
    }
    ours = {TRANSFORMS.load(name) for name in TRANSFORMS if not TRANSFORMS[name].endswith("Purification")}
    assert public - combinations <= ours <= {TRANSFORMS.load(name) for name in TRANSFORMS}
    assert all(issubclass(entry, Transform) for entry in ours)


def test_registry_names_what_there_is():
    with pytest.raises(ValueError, match=r"expected the name of a transform, got 'jpg'; available: adverse_cleaner"):
        TRANSFORMS.load("jpg")


def test_registry_does_not_import_torch():
    check = "import sys, gap_diff_diffusers.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_cleaning_takes_a_perturbation_away_and_leaves_edges():
    clean = torch.full((1, 3, 40, 40), 0.3)
    clean[..., 20:] = 0.8
    signs = torch.randint(0, 2, clean.shape, generator=generator()) * 2 - 1
    moved = clean + 8 / 255 * signs
    cleaned = AdverseCleaner()(moved)
    assert (cleaned - clean).square().mean() < 0.3 * (moved - clean).square().mean()
    edge = cleaned[..., 22].mean() - cleaned[..., 17].mean()
    assert edge == pytest.approx(0.5, abs=0.05)
    assert torch.equal(AdverseCleaner(0, 0)(moved), moved)
    with pytest.raises(ValueError, match="bilateral_steps"):
        AdverseCleaner(-1)
    with pytest.raises(ValueError, match="sides above 4"):
        AdverseCleaner()(moved[..., :4])
