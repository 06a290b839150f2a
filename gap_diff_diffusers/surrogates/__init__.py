"""Models that stand in for the one an attacker will personalize: frozen, differentiable to the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..config import BUNDLED, BUNDLED_FACE_MODEL
from ..registry import Registry
from .base import PromptEmbedding, Surrogate
from .ensemble import EnsembleSurrogate

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
        "StableDiffusionInstructPix2PixPipeline": f"{__name__}.stable_diffusion:InstructPix2PixSurrogate",
        "StableDiffusionPipeline": f"{__name__}.stable_diffusion:StableDiffusionSurrogate",
        "StableDiffusionXLPipeline": f"{__name__}.stable_diffusion:StableDiffusionXLSurrogate",
    },
)
"""The `_class_name` that a saved pipeline or autoencoder states, and what loads it."""

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_LIVING_MODELS = (
    f"{DEFAULT_MODEL} (the default), CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-xl-base-1.0, "
    "stabilityai/stable-diffusion-3.5-medium, black-forest-labs/FLUX.1-dev"
)


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
    if model == BUNDLED:
        model = BUNDLED_FACE_MODEL
    is_file = Path(model).is_file()
    class_name = "AutoencoderTiny" if is_file else _read_class_name(model, subfolder, revision, token)
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


def _read_class_name(model: str | Path, subfolder: str | None, revision: str | None, token: str | bool | None) -> str:
    # A pipeline states its class in one of these files, a single model in the other.
    names = ["config.json"] if subfolder else ["model_index.json", "config.json"]
    for name in names:
        if path := _find_file(model, name, subfolder, revision, token):
            try:
                return str(json.loads(path.read_text())["_class_name"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{model}: expected a {name} that names its _class_name, got another; is it a model of diffusers?"
                ) from error
    raise ValueError(
        f"{model}: expected a model of diffusers, got no {' or '.join(names)}; "
        "give the folder or id of a pipeline, or of an autoencoder with subfolder='vae'"
    )


def _find_file(
    model: str | Path, name: str, subfolder: str | None, revision: str | None, token: str | bool | None
) -> Path | None:
    """The path of a file of the model, downloaded if need be; None if the model has no such file."""
    if Path(model).is_dir():
        path = Path(model, subfolder or "", name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model), name, subfolder=subfolder, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{model}: expected one of its branches, tags or commits, got revision {revision!r}; leave it out for the "
            "newest"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{model}: expected access to it, got refused; accept its terms on its page and log in (hf auth login), "
            f"or use one of {_LIVING_MODELS}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"expected a folder or a model on the Hub, got {str(model)!r}, which is neither, or private; all of "
            f"Stable Diffusion 2.x is gone from the Hub; use one of {_LIVING_MODELS}"
        ) from error
