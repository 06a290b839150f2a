"""Image encoders: rebuilt from their keys, loaded from diffusers folders, frozen, and how far latents move."""

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from gap_diff_diffusers.surrogates.encoder import EncoderSurrogate, build_tiny_encoder, encoder_displacement

CHANNELS = 8


def convolution(prefix, out_channels, in_channels, size=3, bias=True):
    weights = {f"{prefix}.weight": torch.randn(out_channels, in_channels, size, size) / (in_channels * size)}
    return weights | ({f"{prefix}.bias": torch.randn(out_channels) / 10} if bias else {})


def block(index, pool=False):
    weights = {}
    for k in (0, 2, 4):
        weights |= convolution(f"{index}.conv.{k}", CHANNELS, CHANNELS)
    if pool:
        weights |= convolution(f"{index}.pool.0", 4 * CHANNELS, CHANNELS, size=1, bias=False)
        weights[f"{index}.pool.1.weight"] = torch.ones(4 * CHANNELS)
        weights[f"{index}.pool.1.bias"] = torch.zeros(4 * CHANNELS)
        weights |= convolution(f"{index}.pool.3", CHANNELS, 4 * CHANNELS, size=1, bias=False)
    return weights


def flux_like():
    """conv, block, strided conv, block with pool, conv: halves the resolution once."""
    return (
        convolution(0, CHANNELS, 3)
        | block(1)
        | convolution(2, CHANNELS, CHANNELS, bias=False)
        | block(3, pool=True)
        | convolution(4, 4, CHANNELS)
    )


def sana_like():
    """Two strided convs with bias and ReLUs before the first block, then a third strided conv: an eighth."""
    return (
        convolution(0, CHANNELS, 3)
        | convolution(2, CHANNELS, CHANNELS)
        | block(4)
        | convolution(5, CHANNELS, CHANNELS, bias=False)
        | block(6)
        | convolution(7, 4, CHANNELS)
    )


@pytest.mark.parametrize(("weights", "factor"), [(flux_like, 2), (sana_like, 8)])
def test_tiny_encoder_has_the_resolution_and_every_weight(weights, factor):
    state_dict = weights()
    encoder = build_tiny_encoder(state_dict)
    assert encoder(torch.rand(2, 3, 64, 96)).shape == (2, 4, 64 // factor, 96 // factor)
    assert set(encoder.state_dict()) == set(state_dict)


def test_tiny_encoder_computes_what_its_description_says():
    state_dict = flux_like()
    images = torch.rand(1, 3, 16, 16)

    def conv(hidden_states, prefix, **options):
        return nn.functional.conv2d(
            hidden_states, state_dict[f"{prefix}.weight"], state_dict.get(f"{prefix}.bias"), **options
        )

    def residual(hidden_states, index):
        x = hidden_states
        for k in (0, 2, 4):
            x = conv(x if k == 0 else torch.relu(x), f"{index}.conv.{k}", padding=1)
        return torch.relu(x + hidden_states)

    hidden_states = residual(conv(images, 0, padding=1), 1)
    hidden_states = conv(hidden_states, 2, padding=1, stride=2)
    pooled = torch.relu(nn.functional.group_norm(conv(hidden_states, "3.pool.0"), 4))
    hidden_states = residual(hidden_states + conv(pooled, "3.pool.3"), 3)
    expected = conv(hidden_states, 4, padding=1)
    torch.testing.assert_close(build_tiny_encoder(state_dict)(images), expected, atol=1e-5, rtol=1e-5)


def test_a_state_dict_that_is_no_tiny_encoder_is_refused():
    with pytest.raises(ValueError, match="tiny encoder"):
        build_tiny_encoder({"0.weight": torch.zeros(1, 3, 3, 3)})


def test_from_pretrained_reads_files_and_diffusers_folders(tmp_path):
    safetensors.torch.save_file({k: v.half() for k, v in flux_like().items()}, tmp_path / "taeflux.safetensors")
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    ).save_pretrained(tmp_path / "pipe" / "vae")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    images = torch.rand(1, 3, 32, 32)
    for source, subfolder in (("taeflux.safetensors", None), ("pipe", "vae"), ("tiny", None)):
        surrogate = EncoderSurrogate.from_pretrained(tmp_path / source, subfolder=subfolder)
        pixels = images.clone().requires_grad_(True)
        surrogate.encode_images(pixels).square().sum().backward()
        assert pixels.grad.abs().max() > 0, source
        assert all(parameter.grad is None for parameter in surrogate.parameters()), source

    vae = AutoencoderKL.from_pretrained(tmp_path / "pipe", subfolder="vae")
    for subfolder in ("vae", None):  # a pipeline stands for its autoencoder
        surrogate = EncoderSurrogate.from_pretrained(tmp_path / "pipe", subfolder=subfolder)
        torch.testing.assert_close(surrogate.encode_images(images), vae.encode(images * 2 - 1).latent_dist.mean)
        assert surrogate.name == "pipe"
    assert EncoderSurrogate.from_pretrained("bundled").name == "face-model"


def test_from_pretrained_names_what_it_expected(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="AutoencoderKL or AutoencoderTiny"):
        EncoderSurrogate.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"none.safetensors.*no such file"):
        EncoderSurrogate.from_pretrained(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"got no config.json"):
        EncoderSurrogate.from_pretrained(tmp_path.parent)


def test_displacement_is_in_units_of_the_clean_variance():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, 4, 32, 32, generator=generator) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1) + 3
    other = torch.randn(2, 4, 32, 32, generator=generator) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1) + 3
    assert encoder_displacement(clean, clean).tolist() == [0, 0]
    torch.testing.assert_close(encoder_displacement(clean, other), torch.full((2,), 2.0), atol=0.1, rtol=0)
    shifted = clean + torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(encoder_displacement(clean, shifted), torch.ones(2), atol=0.05, rtol=0)
    assert encoder_displacement(clean, shifted, centered=True).max() < 1e-9  # the same everywhere
    part = clean.clone()
    part[..., :16] += shifted[..., :16] - clean[..., :16]  # half of all places: the mean is half of it, too
    torch.testing.assert_close(encoder_displacement(clean, part), torch.full((2,), 0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(
        encoder_displacement(clean, part, centered=True), torch.full((2,), 0.25), atol=0.05, rtol=0
    )
