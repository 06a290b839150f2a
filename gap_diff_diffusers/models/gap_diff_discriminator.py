"""The discriminator of GAP-Diff: whether a photo looks unprotected.

Paper: GAP-Diff (NDSS 2025), section IV-B.

Differences from upstream, where it is broken: upstream applies ONE convolution
and ONE batch norm in every block, and real and fake batches get separate batch statistics, by which alone they can be
told apart. Here every block has its own weights, and the norm is over each image's own channels.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class GAPDiffDiscriminator(ModelMixin, ConfigMixin):
    """Photos in, one logit each out: above 0 for "unprotected".

    Args:
        channels: width of every block, 64 in the paper.
        num_blocks: 3x3 convolutions, each with norm and ReLU; 4 in the released code.
    """

    @register_to_config
    def __init__(self, channels: int = 64, num_blocks: int = 4):
        super().__init__()
        if num_blocks < 1 or channels % 8:
            raise ValueError(f"expected num_blocks >= 1 and channels in eights, got {num_blocks} and {channels}")
        layers: list[nn.Module] = []
        for index in range(num_blocks):
            layers += [
                nn.Conv2d(3 if index == 0 else channels, channels, 3, padding=1),
                nn.GroupNorm(8, channels),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Judge photos.

        Args:
            images: (N,3,H,W) in [0,1], any size.

        Returns:
            (N,) logits, before the sigmoid.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (N,3,H,W), got {tuple(images.shape)}")
        return self.linear(self.blocks(images * 2 - 1).mean(dim=(2, 3))).squeeze(1)
