"""Blur, resize, quantization and noise: what editors, sites and countermeasures do to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kornia.filters import gaussian_blur2d
from torch.nn import functional

from .base import Draw, Strength, Transform, clip, draw_index, straight_through


class GaussianBlur(Transform):
    """The same Gaussian blur in both directions; the border is reflected.

    Args:
        sigma: standard deviation in pixels, above 0, or a range of it.
        kernel_size: side of the kernel in pixels, odd; both sides of the image must exceed its half.
        pinned: sigma in evaluation mode; None is the midpoint.

    Source: the training mixture of GAP-Diff, sigma 2 and 7x7. Upstream's evaluation declares a blur but
    applies another: its 3x3 kernel blurs vertically only, which is not reproduced here.
    """

    def __init__(self, sigma: float | Sequence[float] = 2.0, *, kernel_size: int = 7, pinned: float | None = None):
        super().__init__()
        self.sigma = Strength("sigma", sigma, pinned=pinned, minimum=0, above_minimum=True)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd whole number from 1, got {kernel_size!r}; use 7")
        self.kernel_size = kernel_size

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"sigma": self.sigma.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        if min(images.shape[-2:]) <= self.kernel_size // 2:
            raise ValueError(
                f"expected images with sides above {self.kernel_size // 2} pixels for kernel_size "
                f"{self.kernel_size}, got {tuple(images.shape[-2:])}; use a smaller kernel_size"
            )
        return clip(gaussian_blur2d(images, self.kernel_size, (draw["sigma"], draw["sigma"])))

    def extra_repr(self) -> str:
        return f"{self.sigma}, kernel_size={self.kernel_size}"


def interpolate(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (N,3,H,W) in [0,1], bicubic with antialias; those of that size are returned as they are."""
    if (height, width) == tuple(images.shape[-2:]):
        return images
    # In float32, for torch has no other on the CPU; clipped, for bicubic overshoots at edges.
    resized = functional.interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
    return clip(resized.to(images.dtype))


def _scaled(images: torch.Tensor, scale: float) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return max(1, round(height * scale)), max(1, round(width * scale))


class Resize(Transform):
    """Resize with antialiased bicubic interpolation, keeping the aspect ratio.

    Args:
        scale: new size over old size, above 0, or a range of it; above 1 enlarges.
        long_side: instead of `scale`, the longest side in pixels or a range of it; smaller photos stay as they are.
        pinned: the value of whichever was given in evaluation mode; None is the midpoint.

    With neither, `scale` is 0.5: GAP-Diff's evaluation takes 512 to 256 pixels, there without antialiasing and to a
    square.

    Raises:
        ValueError: both `scale` and `long_side`, or a value out of range.
    """

    publishing = True

    def __init__(
        self,
        scale: float | Sequence[float] | None = None,
        *,
        long_side: int | Sequence[int] | None = None,
        pinned: float | None = None,
    ):
        super().__init__()
        if scale is not None and long_side is not None:
            raise ValueError(f"expected scale or long_side, got scale={scale!r} and long_side={long_side!r}; drop one")
        if long_side is not None:
            self.name = "long_side"
            self.strength = Strength("long_side", long_side, pinned=pinned, minimum=1, integer=True)
        else:
            self.name = "scale"
            scale = 0.5 if scale is None else scale
            self.strength = Strength("scale", scale, pinned=pinned, minimum=0, above_minimum=True)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {self.name: self.strength.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        longest = max(images.shape[-2:])
        scale = draw["scale"] if "scale" in draw else min(1.0, draw["long_side"] / longest)
        return interpolate(images, *_scaled(images, scale))

    def extra_repr(self) -> str:
        return f"{self.name}={self.strength}"


class ResizeDownUp(Transform):
    """Shrink by `scale` and enlarge to the old size again, both bicubic: the details are gone, the size is not.

    Args:
        scale: the size in between over the size of the photo, above 0 up to 1, or a range of it.
        pinned: the scale in evaluation mode; None is the midpoint.

    Source: GAP-Diff's evaluation resizes 512 to 256 pixels, and DreamBooth enlarges again.
    """

    def __init__(self, scale: float | Sequence[float] = 0.5, *, pinned: float | None = None):
        super().__init__()
        self.scale = _scale(scale, pinned)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"scale": self.scale.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return interpolate(interpolate(images, *_scaled(images, draw["scale"])), *images.shape[-2:])

    def extra_repr(self) -> str:
        return f"{self.scale}"


def _scale(value: float | Sequence[float], pinned: float | None) -> Strength:
    return Strength("scale", value, pinned=pinned, minimum=0, maximum=1, above_minimum=True)


class Quantize(Transform):
    """Round every channel to `levels` evenly spaced values from 0 to 1; straight-through gradient.

    Args:
        levels: how many values remain, 2 to 256, or a range of it.
        pinned: the levels in evaluation mode; None is the midpoint.

    Source: GAP-Diff's evaluation with 64 levels. Upstream takes the floor of 64 times the value, which
    leaves 65 values and darkens by 2 of 255 levels; here they are rounded.
    """

    publishing = True

    def __init__(self, levels: int | Sequence[int] = 64, *, pinned: int | None = None):
        super().__init__()
        self.levels = Strength("levels", levels, pinned=pinned, minimum=2, maximum=256, integer=True)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"levels": self.levels.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        steps = draw["levels"] - 1
        return straight_through(images, (images * steps).round() / steps)

    def extra_repr(self) -> str:
        return f"{self.levels}"


class RandomNoise(Transform):
    """Add Gaussian noise and clip to [0, 1].

    Args:
        std: standard deviation on [0, 1], from 0, or a range of it.
        pinned: the standard deviation in evaluation mode; None is the midpoint.

    The draw holds a seed, not the noise: replayed on images of the same shape it adds the same noise, on any device.
    In evaluation mode the seed is pinned to 0.

    Source: GAP-Diff's evaluation with 0.05, that is 12.75 of 255 levels. Upstream truncates to 8 bits
    afterwards; here saving rounds.
    """

    def __init__(self, std: float | Sequence[float] = 0.05, *, pinned: float | None = None):
        super().__init__()
        self.std = Strength("std", std, pinned=pinned, minimum=0)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        seed = draw_index(2**48, generator) if self.training else 0
        return {"std": self.std.draw(self.training, generator), "seed": seed}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        # On the CPU in float32, so that one seed means one noise everywhere; image by image, because `randn` of a
        # larger batch gives the same image other values.
        source = torch.Generator().manual_seed(draw["seed"])
        noise = torch.stack([torch.randn(images.shape[1:], generator=source) for _ in images])
        return clip(images + draw["std"] * noise.to(images))

    def extra_repr(self) -> str:
        return f"{self.std}"
