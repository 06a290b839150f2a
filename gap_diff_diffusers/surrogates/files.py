"""Where a model's files are, in a folder or on the Hub, and what it says it is."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_LIVING_MODELS = (
    f"{DEFAULT_MODEL} (the default), CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-xl-base-1.0, "
    "stabilityai/stable-diffusion-3.5-medium, black-forest-labs/FLUX.1-dev"
)


def read_class_name(model: str | Path, subfolder: str | None, revision: str | None, token: str | bool | None) -> str:
    """The `_class_name` that a pipeline or a model states; ValueError if it is no model of diffusers, or none."""
    # A pipeline states its class in one of these files, a single model in the other.
    names = ["model_index.json", "config.json"] if subfolder is None else ["config.json"]
    for name in names:
        if path := find_file(model, name, subfolder, revision, token):
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


def find_file(
    model: str | Path, name: str, subfolder: str | None, revision: str | None, token: str | bool | None
) -> Path | None:
    """The path of a file of the model, downloaded if need be; None if the model has no such file."""
    if Path(model).is_dir():
        path = Path(model, subfolder or "", name)
        return path if path.is_file() else None
    if Path(model).suffix == ".safetensors":
        raise ValueError(
            f"expected the file of a tiny encoder, or a model, got {str(model)!r}, and there is no such file"
        )
    try:
        return Path(hf_hub_download(str(model), name, subfolder=subfolder, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:  # without a network, of a file that is not there; the cache knows if there is none
        path = "/".join(filter(None, (subfolder, name)))
        if isinstance(try_to_load_from_cache(str(model), path, revision=revision), str | None):
            raise
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
