"""SVDiff (ICCV 2023, arXiv 2303.11305): singular values of all weights are shifted, W = U diag(relu(S + shift)) V^T.

As in GAP-Diff's kit, in the UNet and the text encoder, with vectors (biases, norms) learning at a thousandth of the
rate. A kernel counts as the matrix of its output channels by all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ..finetuning import DreamBooth, DreamBoothConfig
from .base import TrainingAttacker


@dataclass(frozen=True, kw_only=True)
class SVDiffConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these.

    Attributes:
        vector_learning_rate: of biases and norms.
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
        u, s, vh = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
        for name, value in (("u", u), ("s", s), ("vh", vh)):
            self.register_buffer(name, value, persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(s))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return ((self.u * F.relu(self.s + self.shift)) @ self.vh).reshape(weight.shape)


class SVDiff(DreamBooth):
    """One run; `finish` leaves ordinary weights."""

    config: SVDiffConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        shifts, vectors = self._shift(self.surrogate.denoiser)
        groups = [{"params": shifts}, {"params": vectors, "lr": self.config.vector_learning_rate}]
        if self.config.train_text_encoder == "token":
            groups.append(self.token_group(self.config.rare_token))
        elif self.config.train_text_encoder == "yes":
            for encoder in self.surrogate.text_encoders:
                shifts, vectors = self._shift(encoder)
                groups.append({"params": shifts, "lr": self.config.text_rate})
                groups.append({"params": vectors, "lr": self.config.vector_learning_rate})
        return groups

    def _shift(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        shifts = []
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                shift = SingularValueShift(module.weight)
                parametrize.register_parametrization(module, "weight", shift)
                shifts.append(shift.shift)
        return shifts, vectors

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
    }
