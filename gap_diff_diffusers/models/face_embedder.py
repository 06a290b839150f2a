"""A small network that recognizes faces with dropout, so that one can ask how sure it is: for SER-FIQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

FACE_SIZE = 112
"""The side of an aligned face in pixels, as that of ArcFace and SER-FIQ."""


class _Stage(nn.Module):
    """Halves the resolution and looks again."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.down = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.silu(self.norm1(self.down(hidden_states)))
        return hidden_states + F.silu(self.norm2(self.conv(hidden_states)))


class FaceEmbedder(ModelMixin, ConfigMixin):
    """Aligned faces to embeddings, by convolutions, dropout and one linear layer.

    It is trained to say what dlib's network says of the undisturbed face, less what that says of faces in the mean,
    and to say it with a shorter embedding where the face is blurred, dark or covered (`training.face_embedder`). The
    shorter the embedding, the further dropout turns it: SER-FIQ (CVPR 2020, arXiv 2003.09373) measures that. The
    dropout is before the last layer, so that a hundred passes cost little more than one (section 3.2 there).

    Args:
        channels: of the four stages, each at half the resolution of the one before.
        last_channels: of the features at 7x7 that the dropout falls on.
        embedding_size: of the result.
        dropout: the share of features that are left out.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64, 128),
        last_channels: int = 64,
        embedding_size: int = 128,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.stages = nn.Sequential(*(_Stage(a, b) for a, b in zip((3, *channels), channels)))
        self.last = nn.Sequential(nn.Conv2d(channels[-1], last_channels, 1), nn.GroupNorm(1, last_channels))
        side = -(-FACE_SIZE // 2 ** len(channels))
        self.embed = nn.Linear(last_channels * side**2, embedding_size)
        nn.init.normal_(self.embed.weight, std=0.1 * self.embed.in_features**-0.5)
        nn.init.zeros_(self.embed.bias)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Of aligned faces (N,3,112,112) in [0,1]: (N,F), what the dropout falls on."""
        return self.last(self.stages(images * 2 - 1)).flatten(1)

    def forward(self, images: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Embeddings (N,E) of aligned faces (N,3,112,112) in [0,1]; in training mode with dropout, as drawn."""
        features = self.features(images)
        return self.embed(self._drop(features, features.shape, generator) if self.training else features)

    def draw_embeddings(self, images: torch.Tensor, passes: int, generator: torch.Generator) -> torch.Tensor:
        """Embeddings (N,passes,E) of aligned faces (N,3,112,112) in [0,1], each pass with a dropout of its own.

        The passes of all faces drop the same features, so that a figure depends on no neighbour.
        """
        features = self.features(images)
        return self.embed(self._drop(features[:, None], (passes, features.shape[1]), generator))

    def _drop(self, features: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        keep = 1 - self.config.dropout
        return features * (torch.rand(shape, generator=generator) < keep).to(features) / keep
