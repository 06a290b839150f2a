"""SVDiff (ICCV 2023, arXiv 2303.11305): singular values of weights are shifted, W = U diag(relu(S + shift)) V^T.

As in GAP-Diff's kit, in the UNet and the text encoder: of linear layers, convolutions and embeddings, and of norms at
another rate. A kernel counts as the matrix of its output channels by all else, a norm's weight as one row; biases stay
as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ..finetuning import FACE_MODEL_SETTINGS, DreamBooth, DreamBoothConfig
from .base import TrainingAttacker


@dataclass(frozen=True, kw_only=True)
class SVDiffConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these.

    Attributes:
        vector_learning_rate: of norms.
    """

    vector_learning_rate: float = 1e-6
    learning_rate: float = 1e-3
    train_batch_size: int = 1
    prior_batch_size: int = 1
    max_train_steps: int = 500


class SingularValueShift(nn.Module):
    """A weight as its singular vectors, with values that can shift; starts at the weight itself."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        matrix = weight.detach().float()
        u, s, vh = torch.linalg.svd(matrix[None] if matrix.ndim == 1 else matrix.flatten(1), full_matrices=False)
        for name, value in (("u", u), ("s", s), ("vh", vh)):
            self.register_buffer(name, value, persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(s))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # half precision would round the weight itself
            return ((self.u * F.relu(self.s + self.shift)) @ self.vh).reshape(weight.shape)


class SVDiff(DreamBooth):
    """One run; `finish` leaves ordinary weights."""

    config: SVDiffConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        rates = [(self.surrogate.denoiser, config.learning_rate)]
        if config.train_text_encoder == "yes":
            rates += [(encoder, config.text_rate) for encoder in self.surrogate.text_encoders]
        groups = []
        for model, rate in rates:
            groups.append({"params": self._shift(model, (nn.Linear, nn.Conv2d, nn.Embedding)), "lr": rate})
            norms = self._shift(model, (nn.GroupNorm, nn.LayerNorm))
            groups.append({"params": norms, "lr": config.vector_learning_rate})
        if config.train_text_encoder == "token":
            groups.append(self.token_group(config.rare_token))
        return groups

    def _shift(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Parameter]:
        shifts = []
        for module in list(model.modules()):
            if isinstance(module, kinds) and module.weight is not None and not parametrize.is_parametrized(module):
                shift = SingularValueShift(module.weight)
                parametrize.register_parametrization(module, "weight", shift)
                shifts.append(shift.shift)
        return shifts

    def finish(self) -> None:
        for model in (self.surrogate.denoiser, *self.surrogate.text_encoders):
            for module in list(model.modules()):
                if parametrize.is_parametrized(module, "weight"):
                    parametrize.remove_parametrizations(module, "weight")
                    module.weight.requires_grad_(False)


class SVDiffAttacker(TrainingAttacker):
    """Singular values of the denoiser and of the text encoder."""

    config_class = SVDiffConfig
    learning = SVDiff
    presets: ClassVar = {
        # GAP-Diff's kit.
        "weak": SVDiffConfig(),
        "strong": SVDiffConfig(max_train_steps=1000),
        "face-model": SVDiffConfig(
            **FACE_MODEL_SETTINGS, learning_rate=1e-2, vector_learning_rate=4e-4, train_text_encoder="token"
        ),
    }
