"""Custom Diffusion (CVPR 2023, arXiv 2212.04488): cross-attention of the UNet and the embedding of a new word learn.

Differences from diffusers' `train_custom_diffusion.py`: the weights learn in place, without attention processors of
their own, so that the result is an ordinary pipeline; pictures of the class are the model's own, not from the web; no
augmentation; the new word begins as "person", there as "ktn".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import check_choices
from ..finetuning import FACE_MODEL_SETTINGS, DreamBooth, DreamBoothConfig, add_token
from .base import TrainingAttacker

LAYERS = {"crossattn_kv": ("to_k", "to_v"), "crossattn": ("to_q", "to_k", "to_v", "to_out")}


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these.

    Attributes:
        freeze_model: "crossattn_kv" to learn keys and values of the cross-attention, "crossattn" for all of it, which
            the authors advise for faces.
        initializer_token: the word whose embedding the new one, `rare_token`, begins with.
    """

    instance_prompt: str = "a photo of <new1> person"
    rare_token: str = "<new1>"
    initializer_token: str = "person"
    freeze_model: str = "crossattn"
    train_text_encoder: str = "token"
    learning_rate: float = 2e-5
    max_train_steps: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, freeze_model=tuple(LAYERS), train_text_encoder=("token",))


class CustomDiffusion(DreamBooth):
    """One run."""

    config: CustomDiffusionConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        layers = LAYERS[self.config.freeze_model]
        weights = [
            parameter
            for name, parameter in self.surrogate.denoiser.named_parameters()
            if any(f".attn2.{layer}." in name for layer in layers)
        ]
        if not weights:
            raise ValueError(
                f"expected a UNet with cross-attention, got {type(self.surrogate.denoiser).__name__}; use lora"
            )
        add_token(self.surrogate.pipeline, self.config.rare_token, self.config.initializer_token)
        return [{"params": weights}, self.token_group(self.config.rare_token)]


class CustomDiffusionAttacker(TrainingAttacker):
    """Cross-attention and a new word."""

    config_class = CustomDiffusionConfig
    learning = CustomDiffusion
    presets: ClassVar = {
        # The README of diffusers' example, objects and people: 1e-5 and 5e-6 scaled by a batch of 2, doubled for the
        # prior.
        "weak": CustomDiffusionConfig(freeze_model="crossattn_kv", learning_rate=4e-5, max_train_steps=250),
        "strong": CustomDiffusionConfig(),
        "face-model": CustomDiffusionConfig(**FACE_MODEL_SETTINGS, learning_rate=1e-3, text_learning_rate=4e-3),
    }
