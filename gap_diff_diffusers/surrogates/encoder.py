"""The image encoder of a text-to-image model on its own: what a perturbation has to move.

An `AutoencoderKL` or `AutoencoderTiny` of diffusers, or the encoder half of one of madebyollin's tiny autoencoders
(https://github.com/madebyollin/taesd, MIT) as a bare safetensors file.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import nn

from ..config import locate_model
from .base import Surrogate, check_images, encode_latents
from .files import find_file, read_class_name


class _Block(nn.Module):
    """conv-ReLU-conv-ReLU-conv plus the input, then ReLU; `pool` (a 1x1 bottleneck) is added to the input first."""

    def __init__(self, channels: int, pool_channels: int | None):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.pool = None
        if pool_channels is not None:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, pool_channels, 1, bias=False),
                nn.GroupNorm(4, pool_channels),
                nn.ReLU(),
                nn.Conv2d(pool_channels, channels, 1, bias=False),
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            hidden_states = hidden_states + self.pool(hidden_states)
        return torch.relu(self.conv(hidden_states) + hidden_states)


def build_tiny_encoder(state_dict: dict[str, torch.Tensor]) -> nn.Sequential:
    """Rebuild a tiny encoder from its keys (`<index>.weight`, `<index>.conv.<k>.weight`, `<index>.pool.<k>.weight`).

    A convolution halves the resolution if it has no bias, or if it is one of the two that open a network whose first
    block only comes at a quarter of the resolution (Sana's); indices without a key are ReLUs.
    """
    indices = {int(key.split(".")[0]) for key in state_dict}
    blocks = {int(m.group(1)) for key in state_dict if (m := re.match(r"(\d+)\.conv\.", key))}
    if not blocks:
        raise ValueError("expected the state dict of a tiny encoder (keys such as '1.conv.0.weight'), found none")
    strided_stem = min(blocks) > 1
    layers: list[nn.Module] = []
    for index in range(max(indices) + 1):
        if index in blocks:
            channels = state_dict[f"{index}.conv.0.weight"].shape[1]
            pool = state_dict.get(f"{index}.pool.0.weight")
            layers.append(_Block(channels, None if pool is None else pool.shape[0]))
        elif index in indices:
            out_channels, in_channels = state_dict[f"{index}.weight"].shape[:2]
            bias = f"{index}.bias" in state_dict
            stride = 2 if not bias or (strided_stem and index < min(blocks)) else 1
            layers.append(nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias))
        else:
            layers.append(nn.ReLU())
    encoder = nn.Sequential(*layers)
    encoder.load_state_dict({key: value.float() for key, value in state_dict.items()}, strict=True)
    return encoder


class EncoderSurrogate(Surrogate):
    """A frozen image encoder: `encode_images` with gradients to the pixels, never to the weights.

    It has no text encoder and no denoiser: `encode_prompt` and `denoising_loss` raise ValueError.

    Args:
        encoder: `AutoencoderKL`, `AutoencoderTiny` or a bare tiny encoder.
        name: what to call it in records and tables.
    """

    def __init__(self, encoder: nn.Module, name: str):
        super().__init__(name)
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> "EncoderSurrogate":
        """Load from a tiny encoder's `.safetensors` file, a folder, or a Hub id; of a pipeline, its autoencoder.

        "bundled" is the face model that ships.

        A bare tiny encoder has nothing to checkpoint.

        Raises:
            ValueError: there is no such model, or it is of another kind.
        """
        model = locate_model(model)
        if Path(model).is_file():
            return cls(build_tiny_encoder(safetensors.torch.load_file(model)).to(dtype), Path(model).stem)
        from diffusers import AutoencoderKL, AutoencoderTiny

        if subfolder is None:
            subfolder = "" if find_file(model, "config.json", None, revision, token) else "vae"
        class_name = read_class_name(model, subfolder, revision, token)
        classes = {c.__name__: c for c in (AutoencoderKL, AutoencoderTiny)}
        if class_name not in classes:
            raise ValueError(
                f"{model}: expected {' or '.join(classes)}, got {class_name!r}; "
                "give an image autoencoder, or a pipeline that has one"
            )
        autoencoder = classes[class_name].from_pretrained(
            str(model),
            subfolder=subfolder or None,
            revision=revision,
            variant=variant,
            token=token,
            dtype=dtype,
            use_safetensors=True,
        )
        surrogate = cls(autoencoder, Path(model).name)
        if gradient_checkpointing:
            surrogate.enable_gradient_checkpointing()
        return surrogate

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(N,3,H,W) in [0,1] -> latents (N,C,h,w), the posterior's mean where there is one, unscaled."""
        check_images(images)
        if isinstance(self.encoder, nn.Sequential):
            latents = self.encoder(images.to(next(self.encoder.parameters()).dtype))
            return latents.to(torch.promote_types(images.dtype, torch.float32))
        return encode_latents(self.encoder, images)

    def encode_prompt(self, prompt: str | Sequence[str]) -> NoReturn:
        raise self._incomplete("text encoder")

    def denoising_loss(self, images: torch.Tensor, prompt: Any, **options: Any) -> NoReturn:
        raise self._incomplete("denoiser")

    def _incomplete(self, part: str) -> ValueError:
        return ValueError(
            f"expected a surrogate with a {part}, got {self.name}, an image encoder alone; "
            "load_surrogate a whole pipeline, or use a method that needs the encoder only"
        )


def load_encoders(
    models: Sequence[str], revisions: Sequence[str] = (), *, gradient_checkpointing: bool = False
) -> list[EncoderSurrogate]:
    """The encoders of these names, each at its revision; without any, at the newest."""
    return [
        EncoderSurrogate.from_pretrained(model, revision=revision, gradient_checkpointing=gradient_checkpointing)
        for model, revision in zip(models, revisions or (None,) * len(models), strict=True)
    ]


def encoder_displacement(clean: torch.Tensor, moved: torch.Tensor, *, centered: bool = False) -> torch.Tensor:
    """How far latents moved, in units of the clean latents' variance.

    ||E(y) - E(x)||^2 / (var(E(x)) * size), the variance over all entries of one image's latents.

    Args:
        clean, moved: latents (N,C,h,w) of the clean and of the protected photos.
        centered: leave out what all places of a photo have in common, the mean of E(y) - E(x) over h and w: a
            denoiser learns to add a constant more easily than anything else.

    Returns:
        (N,), 0 for no displacement; about 2 for the latents of an unrelated picture.
    """
    clean, change = clean.float(), moved.float() - clean.float()
    if centered:
        change = change - change.mean((2, 3), keepdim=True)
    return change.flatten(1).square().mean(1) / clean.flatten(1).var(1, correction=0)
