"""Models that stand in for the one an attacker will personalize: frozen, differentiable to the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import BUNDLED_FACE_MODEL, locate_model
from ..registry import Registry
from .base import PromptEmbedding, Surrogate
from .ensemble import EnsembleSurrogate
from .files import DEFAULT_MODEL, read_class_name

__all__ = [
    "BUNDLED_FACE_MODEL",
    "DEFAULT_MODEL",
    "SURROGATES",
    "EnsembleSurrogate",
    "PromptEmbedding",
    "Surrogate",
    "load_surrogate",
]

SURROGATES = Registry(
    "surrogate",
    {
        "AutoencoderKL": f"{__name__}.encoder:EncoderSurrogate",
        "AutoencoderTiny": f"{__name__}.encoder:EncoderSurrogate",
        "FluxPipeline": f"{__name__}.flow_matching:FluxSurrogate",
        "StableDiffusion3Pipeline": f"{__name__}.flow_matching:StableDiffusion3Surrogate",
        "StableDiffusionInpaintPipeline": f"{__name__}.stable_diffusion:InpaintingSurrogate",
        "StableDiffusionInstructPix2PixPipeline": f"{__name__}.stable_diffusion:InstructPix2PixSurrogate",
        "StableDiffusionPipeline": f"{__name__}.stable_diffusion:StableDiffusionSurrogate",
        "StableDiffusionXLPipeline": f"{__name__}.stable_diffusion:StableDiffusionXLSurrogate",
    },
)
"""The `_class_name` that a saved pipeline or autoencoder states, and what loads it."""


def load_surrogate(
    model: str | Path = DEFAULT_MODEL,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    **options: Any,
) -> Surrogate:
    """Load a text-to-image pipeline or an autoencoder, frozen, as the surrogate of its kind.

    Args:
        model: a folder, a Hub id, "bundled" for the face model that ships, or the `.safetensors` file of a bare tiny
            encoder. safetensors only.
        subfolder: of an autoencoder, such as "vae" in a pipeline.
        revision: branch, tag or commit of a Hub id; pin the commit where a result must be repeatable.
        variant: such as "fp16", for weights in files of that name.
        token: for private and gated models; None is the one you are logged in with.
        dtype: of the weights. Photos, losses and the photos' gradients stay float32.
        gradient_checkpointing: less memory for more time.
        **options: of the surrogate's class.

    Raises:
        ValueError: there is no such model, it is of an unknown kind, or an option's value is wrong.
        OSError: the Hub cannot be reached and the model is not in its cache.
        TypeError: an unknown option.
    """
    model = locate_model(model)
    is_file = Path(model).is_file()
    class_name = "AutoencoderTiny" if is_file else read_class_name(model, subfolder, revision, token)
    if class_name not in SURROGATES:
        raise ValueError(f"{model}: expected one of {', '.join(sorted(SURROGATES))}, got {class_name}")
    if subfolder is not None:
        options["subfolder"] = subfolder
    return SURROGATES.load(class_name).from_pretrained(
        model,
        revision=revision,
        variant=variant,
        token=token,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        **options,
    )
