"""Attacks that learn nothing: a photo and a prompt go in, the photo as the prompt has it comes out.

Papers: SDEdit (ICLR 2022, arXiv 2108.01073), InstructPix2Pix (CVPR 2023, arXiv 2211.09800). All by the pipelines of
diffusers.

Strengths of SDEdit are those that protections are commonly tested with; guidance 7.5 and 50 steps are those of
PhotoGuard's demo.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from tqdm import tqdm

from ..config import check_at_least_one, check_types
from ..finetuning import center_square
from ..surrogates.base import DiffusionSurrogate
from ..transforms.diffusion_purification import size_arguments
from .base import Attacker

BATCH = 4


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """Settings of one edit.

    Attributes:
        instance_prompt: what the picture shall show, or for InstructPix2Pix what shall be done to it.
        resolution: side in pixels of the squares that the photos are resized to, or become by cutting their centers.
        num_inference_steps, guidance_scale: of drawing.
        seed: of the first picture; the next has the next one.
    """

    instance_prompt: str = "a photo of a person with sunglasses"
    resolution: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0

    subject: ClassVar[str] = "person"
    prior_loss_weight: ClassVar[float] = 0.0

    def __post_init__(self):
        check_types(self)
        check_at_least_one(self, "resolution", "num_inference_steps")

    def check_steps(self, num_inference_steps: int) -> None:
        """ValueError if so many steps draw nothing."""


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditingConfig):
    """`EditingConfig` with how far the photo is noised.

    Attributes:
        strength: as a share of the time scale, above 0 up to 1, which leaves nothing of the photo.
    """

    strength: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ValueError(f"expected a strength above 0 up to 1, got {self.strength}")
        self.check_steps(self.num_inference_steps)

    def check_steps(self, num_inference_steps: int) -> None:
        if int(num_inference_steps * self.strength) < 1:
            raise ValueError(
                f"expected num_inference_steps of at least {math.ceil(1 / self.strength)} for a strength of "
                f"{self.strength}, got {num_inference_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig(SDEditConfig):
    """`SDEditConfig` with what is kept.

    Attributes:
        kept: side of the square in the photo's middle that is not painted over, as a share of the photo's.
    """

    strength: float = 1.0
    kept: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.kept < 1:
            raise ValueError(f"expected kept from 0 to below 1, got {self.kept}")


@dataclass(frozen=True, kw_only=True)
class InstructPix2PixConfig(EditingConfig):
    """`EditingConfig` with how closely the photo is followed.

    Attributes:
        image_guidance_scale: from 1; higher stays nearer to the photo.
    """

    instance_prompt: str = "give the person sunglasses"
    image_guidance_scale: float = 1.5

    def __post_init__(self):
        super().__post_init__()
        if self.image_guidance_scale < 1:  # diffusers would leave the prompt's guidance out, too
            raise ValueError(f"expected an image_guidance_scale of at least 1, got {self.image_guidance_scale}")


FACE_MODEL_SETTINGS: dict[str, Any] = {"resolution": 256, "num_inference_steps": 40, "guidance_scale": 2.5}


class EditingAttacker(Attacker):
    """An attacker that trains nothing: what it returns is the pipeline as it was, and its pictures are edits.

    Picture i is an edit of photo i, and with more pictures than photos it starts again.
    """

    config_class: ClassVar[type[EditingConfig]]

    def __call__(
        self,
        surrogate: DiffusionSurrogate,
        images: torch.Tensor,
        *,
        class_images: torch.Tensor | None = None,
        progress: bool = True,
    ) -> DiffusionPipeline:
        self.make_editor(surrogate.pipeline)  # for its errors
        if self.config.resolution % surrogate.size_multiple:
            raise ValueError(
                f"expected a resolution that is a multiple of {surrogate.size_multiple}, got {self.config.resolution}"
            )
        return surrogate.pipeline

    def check_saving(self) -> None:
        raise ValueError("expected a method that learns something to save, got one that edits; leave it out")

    def save(self, pipeline: DiffusionPipeline, folder: str | Path) -> None:
        self.check_saving()

    @abstractmethod
    def make_editor(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline that edits, of the same networks; ValueError if they cannot."""

    def editor_arguments(self, images: torch.Tensor) -> dict[str, Any]:
        """What it takes besides prompt, image, steps, guidance and generator, for images (N,3,H,W)."""
        return {}

    @torch.no_grad()
    def draw(
        self,
        pipeline: DiffusionPipeline,
        images: torch.Tensor,
        prompt: str,
        count: int,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        progress: bool = True,
    ) -> torch.Tensor:
        self.config.check_steps(num_inference_steps)
        editor = self.make_editor(pipeline)
        editor.set_progress_bar_config(disable=True)
        squares = center_square(images, self.config.resolution).clamp(0, 1)  # resizing overshoots
        drawn = []
        for start in tqdm(range(0, count, BATCH), desc="editing", disable=not progress):
            indices = range(start, min(start + BATCH, count))
            photos = squares[[index % len(squares) for index in indices]]
            edited = editor(
                prompt=[prompt] * len(indices),
                image=photos,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + index) for index in indices],
                output_type="pt",
                **size_arguments(editor, *photos.shape[-2:]),
                **self.editor_arguments(photos),
            ).images
            drawn.append(edited.float().cpu())
        return torch.cat(drawn)


class SDEditAttacker(EditingAttacker):
    """The photo is noised and denoised towards the prompt (image to image)."""

    config_class = SDEditConfig
    presets: ClassVar = {
        "weak": SDEditConfig(strength=0.3),
        "middle": SDEditConfig(strength=0.5),
        "strong": SDEditConfig(strength=0.7),
        "face-model": SDEditConfig(**FACE_MODEL_SETTINGS, strength=0.5),
    }

    def make_editor(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        if isinstance(pipeline, StableDiffusionInpaintPipeline):
            raise ValueError("expected a model that draws by a prompt alone, got one that inpaints; use inpainting")
        return _make(AutoPipelineForImage2Image, pipeline, "image to image")

    def editor_arguments(self, images: torch.Tensor) -> dict[str, Any]:
        return {"strength": self.config.strength}


class InpaintingAttacker(EditingAttacker):
    """All but the middle of the photo, where the face is, is painted anew.

    For models whose latents have 4 channels, as diffusers' pipelines want it, so not for the one that ships; and for
    those of them that were trained to inpaint, which are saved as a `StableDiffusionInpaintPipeline`.
    """

    config_class = InpaintingConfig
    presets: ClassVar = {
        "weak": InpaintingConfig(kept=0.6),
        "strong": InpaintingConfig(kept=0.4),
    }

    def make_editor(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        unet = pipeline.components.get("unet")
        if unet is not None and (channels := unet.config.in_channels) not in (4, 9):
            raise ValueError(
                f"expected a model whose UNet has 4 or 9 input channels to inpaint with, got {channels}; use sdedit"
            )
        return _make(AutoPipelineForInpainting, pipeline, "inpainting")

    def editor_arguments(self, images: torch.Tensor) -> dict[str, Any]:
        count, _, height, width = images.shape
        mask = torch.ones(count, 1, height, width)
        rows, columns = (round(side * (1 - self.config.kept) / 2) for side in (height, width))
        mask[:, :, rows : height - rows, columns : width - columns] = 0
        return {"strength": self.config.strength, "mask_image": mask}


class InstructPix2PixAttacker(EditingAttacker):
    """The photo is changed as it is told, by a model that was trained for that, such as timbrooks/instruct-pix2pix."""

    config_class = InstructPix2PixConfig
    presets: ClassVar = {
        "weak": InstructPix2PixConfig(image_guidance_scale=1.5),
        "strong": InstructPix2PixConfig(image_guidance_scale=1.2),
    }
    presets["face-model"] = replace(presets["weak"], **FACE_MODEL_SETTINGS)

    def make_editor(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        if not isinstance(pipeline, StableDiffusionInstructPix2PixPipeline):
            raise ValueError(
                f"expected a model that edits by instructions, such as timbrooks/instruct-pix2pix, got a "
                f"{type(pipeline).__name__}; choose it with --model, or use sdedit"
            )
        return pipeline

    def editor_arguments(self, images: torch.Tensor) -> dict[str, Any]:
        return {"image_guidance_scale": self.config.image_guidance_scale}


def _make(kind: type, pipeline: DiffusionPipeline, task: str) -> DiffusionPipeline:
    try:
        return kind.from_pipe(pipeline)
    except ValueError as error:
        raise ValueError(
            f"expected a model with a pipeline for {task} in diffusers, got a {type(pipeline).__name__}"
        ) from error
