"""What a training leaves for the Hub: a model card made of its record, and the upload."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, create_repo, upload_folder

from .images import write_atomically

logger = logging.getLogger(__name__)

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
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{repo_id}", dtype=torch.float32)
image = pipe("a photo of a person", height={resolution}, width={resolution}, guidance_scale=2.5).images[0]
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the diffusers examples, for the training scripts."""
    parser.add_argument("--push_to_hub", action="store_true", help="upload the result, with a model card")
    parser.add_argument("--hub_model_id", help="repository to upload to (default: the output folder's name)")
    parser.add_argument("--hub_token", help="token to upload with (default: the one you are logged in with)")
    parser.add_argument(
        "--hub_push_samples",
        action="store_true",
        help="upload the last validation pictures, too; those of a protection show photos of the training data",
    )
    parser.add_argument("--hub_private_repo", action="store_true", help="if the repository is made, make it private")


def create_repository(arguments: argparse.Namespace, folder: str | Path, *, report_to: str = "none") -> None:
    """Create the repository if the flags of `add_arguments` say so, and put its whole name among them.

    Before a training, so that a missing login or a name that may not be used stops it before it has taken its time. Of
    several processes the main one does it.

    Args:
        arguments: the flags; `hub_model_id` is set.
        folder: its name is the repository's, unless a flag names that.
        report_to: the tracker of the run.

    Raises:
        OSError: no login, or the Hub refuses.
        ValueError: a name that no repository can have, or a token on a command line that a tracker may publish.
    """
    if arguments.hub_token and report_to not in ("none", "tensorboard"):
        raise ValueError(
            f"expected no --hub_token beside the tracker {report_to}: some upload the command line, and so the token; "
            "log in with hf auth login instead"
        )
    from accelerate.utils import get_cpu_distributed_information  # what the launcher says, of GPUs as well

    if arguments.push_to_hub and get_cpu_distributed_information().rank == 0:
        name = arguments.hub_model_id or Path(folder).resolve().name
        token = arguments.hub_token or True  # True wants a login, also where the repository exists
        private = arguments.hub_private_repo or None
        arguments.hub_model_id = create_repo(name, token=token, private=private, exist_ok=True).repo_id


def publish(arguments: argparse.Namespace, folder: Path, record: dict[str, Any]) -> None:
    """Write the model card, and upload the folder, after `create_repository`, if the flags say so."""
    folder, repo_id = Path(folder).resolve(), arguments.hub_model_id
    write_model_card(folder, record, repo_id=repo_id, show_samples=arguments.hub_push_samples)
    if arguments.push_to_hub:
        commit = push_folder(folder, repo_id, token=arguments.hub_token, push_samples=arguments.hub_push_samples)
        logger.info("uploaded: %s", commit)


def write_model_card(
    folder: Path, record: dict[str, Any], *, repo_id: str | None = None, show_samples: bool = False
) -> None:
    """Write `README.md` beside a trained pipeline: what it is, how to use it, its figures and settings.

    Args:
        folder: a saved pipeline; its `model_index.json` tells a protection from a face model.
        record: the training record.
        repo_id: the name that it will have on the Hub; None for the folder's.
        show_samples: whether the last of its validation pictures will be beside it.
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
    if show_samples and (picture := _last_samples(folder)):
        text += f"\n![Validation pictures]({picture})\n"
    settings = json.dumps(config, indent=2)
    photos = ", ".join(f"{key}: {value}" for key, value in record["photos"].items())
    text += f"\n## Training\n{config['data_description'] or 'Photos'} ({photos}).\n\n```json\n{settings}\n```\n"
    write_atomically(folder / "README.md", f"---\n{data.to_yaml()}\n---\n{text}".encode())


def push_folder(folder: Path, repo_id: str, *, token: str | None = None, push_samples: bool = False) -> str:
    """Upload a trained pipeline to a repository that exists; returns the address of the commit.

    What goes there is the pipeline, with the code that runs it without this package, its record and its card, and
    nothing else that lies in the folder.

    Args:
        folder: what to upload.
        repo_id: where to.
        token: None for the one you are logged in with.
        push_samples: upload the last validation pictures, too.
    """
    folder = Path(folder).resolve()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = [name for name in index if not name.startswith("_") and (folder / name).is_dir()]
    allowed = ["README.md", "model_index.json", "training_record.json", *(f"{name}/*" for name in components)]
    if isinstance(index["_class_name"], list):  # of a module in the folder
        allowed.append(f"{index['_class_name'][0]}.py")
    if push_samples and (picture := _last_samples(folder)):
        allowed.append(picture)
    return str(
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            token=token,
            allow_patterns=allowed,
        )
    )


def _last_samples(folder: Path) -> str | None:
    """The last validation pictures, as a path in the folder."""
    steps = [int(path.stem) for path in (folder / "samples").glob("*.png") if path.stem.isdigit()]
    return f"samples/{max(steps)}.png" if steps else None
