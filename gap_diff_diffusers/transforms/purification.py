"""What an attacker does to published photos to be rid of a perturbation before training on them: filters."""

from __future__ import annotations

import torch
from kornia.filters import bilateral_blur, guided_blur

from .base import Draw, Transform, check_whole_numbers, clip


class AdverseCleaner(Transform):
    """Bilateral filtering, many times, then guided filtering by the photo as it came: fine textures go, edges stay.

    Args:
        bilateral_steps: how often the bilateral filter is applied (5x5, deviations of 8 levels and 8 pixels).
        guided_steps: how often the guided filter is (radius 4, regularization 16 on levels squared).

    Source: AdverseCleaner (github.com/lllyasviel/AdverseCleaner), its parameters by OpenCV's names; here with kornia's
    filters. Its author notes that the guidance can bring some of the perturbation back.
    """

    def __init__(self, bilateral_steps: int = 64, guided_steps: int = 4):
        super().__init__()
        check_whole_numbers(0, bilateral_steps=bilateral_steps, guided_steps=guided_steps)
        self.bilateral_steps, self.guided_steps = bilateral_steps, guided_steps

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        if min(images.shape[-2:]) <= 4:
            raise ValueError(f"expected images with sides above 4 pixels, got {tuple(images.shape[-2:])}")
        guide = images.float()
        cleaned = guide
        for _ in range(self.bilateral_steps):
            cleaned = bilateral_blur(cleaned, (5, 5), 8 / 255, (8.0, 8.0))
        for _ in range(self.guided_steps):
            cleaned = guided_blur(guide, cleaned, 9, 16 / 255**2)
        return clip(cleaned.to(images.dtype))

    def extra_repr(self) -> str:
        return f"bilateral_steps={self.bilateral_steps}, guided_steps={self.guided_steps}"
