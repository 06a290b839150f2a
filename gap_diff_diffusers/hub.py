"""What a training leaves for the Hub: a model card made of its record, and the upload."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, create_repo, upload_folder

logger = logging.getLogger(__name__)

NOT_UPLOADED = ["checkpoint-*/**", "autoencoder/**", "*.part/**", "training/**", "*.jsonl"]
"""What a training needs to go on, and nobody to use what it made."""

_PROTECTION = """# {name}

A generator of protective perturbations, trained with `gap_diff_diffusers` after GAP-Diff (NDSS 2025). It makes photos
of people harder to personalize text-to-image models on. That is no guarantee: who knows the method can weaken it, and
copies that are already public stay as they are.

```python
from gap_diff_diffusers import GAPDiffProtectionPipeline

pipe = GAPDiffProtectionPipeline.from_pretrained("{repo_id}")
protected = pipe("photo.png").images[0]
```
"""
_FACE_MODEL = """# {name}

A small text-to-image model of faces, trained from nothing with `gap_diff_diffusers`: something to personalize on a
processor, to see what a protection does. It draws nobody in particular, and nothing but portraits.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{repo_id}")
image = pipe("a photo of a person", height={resolution}, width={resolution}, guidance_scale=2.5).images[0]
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the diffusers examples, for the training scripts."""
    parser.add_argument("--push_to_hub", action="store_true", help="upload the result, with a model card")
    parser.add_argument("--hub_model_id", help="repository to upload to (default: the output folder's name)")
    parser.add_argument("--hub_token", help="token to upload with (default: the one you are logged in with)")
    parser.add_argument("--hub_private_repo", action="store_true", help="if the repository is made, make it private")


def publish(arguments: argparse.Namespace, folder: Path, record: dict[str, Any]) -> None:
    """Write the model card, and upload the folder if the flags of `add_arguments` say so."""
    write_model_card(folder, record, repo_id=arguments.hub_model_id)
    if arguments.push_to_hub:
        address = push_folder(
            folder, arguments.hub_model_id, token=arguments.hub_token, private=arguments.hub_private_repo
        )
        logger.info("uploaded: %s", address)


def write_model_card(folder: Path, record: dict[str, Any], *, repo_id: str | None = None) -> None:
    """Write `README.md` beside a trained pipeline: what it is, how to use it, its figures and settings.

    Args:
        folder: a saved pipeline; its `model_index.json` tells a protection from a face model.
        record: the training record.
        repo_id: the name that it will have on the Hub; None for the folder's.
    """
    folder = Path(folder).resolve()
    class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    face_model = class_name == "StableDiffusionPipeline"
    repo_id = repo_id or folder.name
    config = record["config"]
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="text-to-image" if face_model else "image-to-image",
        tags=["gap-diff", "face-model" if face_model else "image-protection"],
    )
    text = (_FACE_MODEL if face_model else _PROTECTION).format(
        name=repo_id.split("/")[-1], repo_id=repo_id, resolution=config.get("resolution")
    )
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in record["figures"].items())
    if rows:
        text += f"\n## Figures\nOn held-out photos of the training data.\n\n| what | figure |\n|---|---|\n{rows}"
    pictures = sorted((folder / "samples").glob("*.png"), key=lambda path: int(path.stem))
    if pictures:
        text += f"\n![Validation pictures](samples/{pictures[-1].name})\n"
    settings = json.dumps(config, indent=2)
    text += f"\n## Training\n{json.dumps(record['photos'])}\n\n```json\n{settings}\n```\n"
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")


def push_folder(folder: Path, repo_id: str | None = None, *, token: str | None = None, private: bool = False) -> str:
    """Upload a trained pipeline; returns the address of the commit. Checkpoints stay here.

    Args:
        folder: what to upload.
        repo_id: where to; None for a repository of the folder's name under the account of the token.
        token: None for the one you are logged in with.
        private: of a repository that is made by this.
    """
    folder = Path(folder).resolve()
    repo_id = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token).repo_id
    commit = upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="End of training",
        token=token,
        ignore_patterns=NOT_UPLOADED,
    )
    return str(commit)
