"""DreamBooth by low-rank adapters (LoRA, arXiv 2106.09685) of the attention, as `train_dreambooth_lora.py` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers

from ..config import check_at_least_one
from ..finetuning import FACE_MODEL_SETTINGS, DreamBooth, DreamBoothConfig
from .base import TrainingAttacker

DENOISER_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these.

    Attributes:
        rank: of the adapters; their scale is 1.
    """

    rank: int = 4
    learning_rate: float = 1e-4
    text_learning_rate: float | None = 5e-6
    train_text_encoder: str = "no"
    max_train_steps: int = 500

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "rank")


class LoRA(DreamBooth):
    """One run: adapters of the denoiser, and of CLIP's text encoders if they learn."""

    config: LoRAConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": self._add_adapter(self.surrogate.denoiser, DENOISER_LAYERS)}]
        if self.config.train_text_encoder == "yes":
            encoders = [encoder for encoder in self.surrogate.text_encoders if "CLIP" in type(encoder).__name__]
            weights = [weight for encoder in encoders for weight in self._add_adapter(encoder, TEXT_LAYERS)]
            groups.append({"params": weights, "lr": self.config.text_rate})
        elif self.config.train_text_encoder == "token":
            groups.append(self.token_group(self.config.rare_token))
        return groups

    def _add_adapter(self, model: torch.nn.Module, layers: tuple[str, ...]) -> list[torch.nn.Parameter]:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("expected peft for LoRA, got none; pip install 'gap_diff_diffusers[train]'") from error
        names = [name for name, _ in model.named_modules()]
        layers = tuple(layer for layer in layers if any(name.endswith(f".{layer}") for name in names))
        if not layers:
            raise ValueError(f"expected a model with attention layers, got {type(model).__name__}")
        rank = self.config.rank
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            model.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers))
            )
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


class LoRAAttacker(TrainingAttacker):
    """Adapters of the attention; what is saved is what `load_lora_weights` takes."""

    config_class = LoRAConfig
    learning = LoRA
    presets: ClassVar = {
        # What papers on protection attack with: rank 4, 1e-4, 500 to 1,000 steps; the batches of DreamBooth above.
        "weak": LoRAConfig(),
        "strong": LoRAConfig(max_train_steps=1000, train_text_encoder="yes"),
        "face-model": LoRAConfig(**FACE_MODEL_SETTINGS, rank=16, learning_rate=2e-3),
    }

    def check_saving(self) -> None:
        if self.config.train_text_encoder == "token":
            raise ValueError("expected train_text_encoder yes or no to save adapters, got 'token'")

    def save(self, pipeline: DiffusionPipeline, folder: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors`."""
        from peft.utils import get_peft_model_state_dict

        self.check_saving()
        layers = {}
        for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            model = getattr(pipeline, name, None)
            if getattr(model, "peft_config", None):
                state = get_peft_model_state_dict(model)
                # As the examples do: the loader of transformers' pipelines takes peft's own names.
                layers[f"{name}_lora_layers"] = (
                    convert_state_dict_to_diffusers(state) if hasattr(pipeline, "unet") else state
                )
        type(pipeline).save_lora_weights(folder, **layers)
