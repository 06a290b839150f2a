"""Textual inversion (ICLR 2023, arXiv 2208.01618): nothing but the embedding of a new word learns.

Differences from diffusers' `textual_inversion.py`: one sentence per step for all photos, drawn from six instead of 27;
photos are not mirrored; gradients are clipped; the word does not decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from diffusers import DiffusionPipeline

from ..finetuning import FACE_MODEL_SETTINGS, DreamBooth, DreamBoothConfig, add_token
from .base import TrainingAttacker


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these. The denoiser never learns, and there is no prior loss.

    Attributes:
        initializer_token: the word whose embedding the new one, `rare_token`, begins with.
        templates: sentences with {} in the new word's place; each step has one of them.
    """

    instance_prompt: str = "a photo of <person>"
    rare_token: str = "<person>"
    initializer_token: str = "person"
    templates: tuple[str, ...] = (
        "a photo of {}",
        "a close-up photo of {}",
        "a good photo of {}",
        "a cropped photo of {}",
        "a bright photo of {}",
        "a photo of the nice {}",
    )
    prior_loss_weight: float = 0.0
    train_text_encoder: str = "token"
    train_batch_size: int = 4
    learning_rate: float = 2e-3
    max_train_steps: int = 3000

    def __post_init__(self):
        super().__post_init__()
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ValueError(f"expected templates with {{}} in the word's place, got {list(self.templates)}")
        if self.prior_loss_weight or self.train_text_encoder != "token":
            raise ValueError(
                f"expected prior_loss_weight 0 and train_text_encoder 'token', got {self.prior_loss_weight} and "
                f"{self.train_text_encoder!r}: textual inversion learns a word and nothing else"
            )


class TextualInversion(DreamBooth):
    """One run."""

    config: TextualInversionConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        others = [type(e).__name__ for e in self.surrogate.text_encoders if "CLIP" not in type(e).__name__]
        if others:
            raise ValueError(f"expected CLIP's text encoders alone, got {', '.join(others)} too; use lora")
        add_token(self.surrogate.pipeline, self.config.rare_token, self.config.initializer_token)
        return [self.token_group(self.config.rare_token)]

    def draw_prompts(self) -> list[str]:
        which = torch.randint(0, len(self.config.templates), (1,), generator=self.generator).item()
        return [self.config.templates[which].replace("{}", self.config.rare_token)]


class TextualInversionAttacker(TrainingAttacker):
    """A new word; what is saved is what `load_textual_inversion` takes, for models with one text encoder."""

    config_class = TextualInversionConfig
    learning = TextualInversion
    presets: ClassVar = {
        # The README of diffusers' example: 5e-4, scaled by a batch of 1 and 4 steps of accumulation.
        "weak": TextualInversionConfig(),
        "strong": TextualInversionConfig(max_train_steps=5000),
        "face-model": TextualInversionConfig(**FACE_MODEL_SETTINGS | {"learning_rate": 1e-2}),
    }

    def save(self, pipeline: DiffusionPipeline, folder: str | Path) -> None:
        """Write `learned_embeds.safetensors`, and `learned_embeds_2.safetensors` of a second text encoder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        token = self.config.rare_token
        for suffix in ("", "_2"):
            encoder = getattr(pipeline, f"text_encoder{suffix}", None)
            if encoder is not None:
                row = getattr(pipeline, f"tokenizer{suffix}").convert_tokens_to_ids(token)
                embedding = encoder.get_input_embeddings().weight.detach()[[row]].cpu().contiguous()
                safetensors.torch.save_file({token: embedding}, Path(folder) / f"learned_embeds{suffix}.safetensors")
