"""The interface of attackers, and what all that train in this process share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from ..finetuning import DreamBooth, DreamBoothConfig, check_draws, generate_images
from ..surrogates.base import DiffusionSurrogate


class Attacker(ABC):
    """A personalization: photos of one person in, a pipeline out that draws them.

    Args:
        preset: one of `presets`.
        **changes: settings of `config_class` to have otherwise.

    Attributes:
        presets: named settings; where they come from stands beside them.
        config: the settings.

    Raises:
        ValueError: no such preset, or a setting that does not work.
        TypeError: no such setting.
    """

    config_class: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]

    def __init__(self, preset: str = "weak", **changes: Any):
        if preset not in self.presets:
            raise ValueError(f"expected a preset {', '.join(self.presets)}, got {preset!r}")
        self.config = self.config_class(**{**vars(self.presets[preset]), **changes})

    @abstractmethod
    def __call__(
        self,
        surrogate: DiffusionSurrogate,
        images: torch.Tensor,
        *,
        class_images: torch.Tensor | None = None,
        progress: bool = True,
    ) -> DiffusionPipeline:
        """Personalize the surrogate's pipeline, in place, and return it.

        Args:
            surrogate: the model to personalize. It stays changed: pass a `copy.deepcopy` to keep it.
            images: (N,3,H,W) in [0,1], the photos.
            class_images: (M,3,H,W) in [0,1], pictures of the class; None to have the model draw them.
            progress: show a bar.

        Raises:
            ValueError: the photos, the model or the prompt do not suit the method.
            FloatingPointError: the training diverges.
        """

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
        """What the attacker makes with what `__call__` returned: (count,3,H,W) in [0,1], with seeds from `seed` on.

        Here pictures that the prompt alone decides on. `images` are the photos (N,3,H,W), for attackers that edit.
        """
        return generate_images(
            pipeline,
            prompt,
            count,
            resolution=self.config.resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            progress=progress,
        )

    @classmethod
    def script_digest(cls, config: Any) -> str | None:
        """Of the program that attacks, if it is none of this package; ValueError if it is missing."""
        return None

    def check_model(self, surrogate: DiffusionSurrogate) -> None:  # noqa: B027 - most say so when called
        """ValueError if the method cannot personalize such a model, before anything is drawn with it."""

    def check_saving(self) -> None:  # noqa: B027 - most can always be saved
        """ValueError if what these settings make could not be saved."""

    def save(self, pipeline: DiffusionPipeline, folder: str | Path) -> None:
        """Write what was learned for diffusers to load; here the whole pipeline."""
        pipeline.save_pretrained(folder)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's text is how torch, on any device, says that memory ran out."""
    return any(words in text.lower() for words in ("out of memory", "allocate memory", "not enough memory"))


class TrainingAttacker(Attacker):
    """An attacker whose `learning` is a `DreamBooth`, or one that learns other weights."""

    config_class: ClassVar[type[DreamBoothConfig]] = DreamBoothConfig
    learning: ClassVar[type[DreamBooth]] = DreamBooth

    def __call__(
        self,
        surrogate: DiffusionSurrogate,
        images: torch.Tensor,
        *,
        class_images: torch.Tensor | None = None,
        progress: bool = True,
    ) -> DiffusionPipeline:
        check_draws(surrogate)
        run = self.learning(surrogate, images, self.config, class_images=class_images)
        run.train(progress)
        run.finish()
        return surrogate.pipeline
