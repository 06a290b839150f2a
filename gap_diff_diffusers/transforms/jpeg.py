"""Lossy codecs: the paper's JPEG mask, a differentiable JPEG, and the real JPEG and WebP that publishing applies."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from kornia.enhance import jpeg_codec_differentiable
from PIL import Image
from torch.nn import functional

from .base import Draw, Strength, Transform, clip, draw_index, straight_through

SUBSAMPLINGS = ("4:2:0", "4:4:4")
"""Chroma subsamplings of `RealJPEG`: colors at half of the height and width, or at full size."""


def _quality(value: float | Sequence[float], pinned: float | None, *, integer: bool) -> Strength:
    return Strength("quality", value, pinned=pinned, minimum=1, maximum=100, integer=integer)


class JPEGMask(Transform):
    """GAP-Diff's stand-in for JPEG: keep the low frequencies of every 8x8 block, drop the others.

    In YUV (BT.601), an orthonormal 8x8 DCT keeps the top-left `luma` x `luma` coefficients of Y and `chroma` x
    `chroma` of U and V. There is no quantization table, no rounding and no chroma subsampling. Images of any size: the
    right and bottom edge is replicated up to a multiple of 8 and cut off again.

    Source: GAP-Diff (NDSS'25), section IV-B. Upstream stores a quality of 50 or 70 and never uses it, so there
    is none here; upstream's version fails on photos that are not square. Clipped pixels keep their gradient here.
    """

    publishing = True

    def __init__(self, luma: int = 5, *, chroma: int = 3):
        super().__init__()
        self.luma, self.chroma = (
            Strength(name, size, minimum=1, maximum=8, integer=True).pinned
            for name, size in (("luma", luma), ("chroma", chroma))
        )
        # The scales of U, V and the pixels (upstream: 0 to 255) cancel, because every step before the clip is linear.
        to_yuv = torch.tensor(
            [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]], dtype=torch.float64
        )
        position = torch.arange(8, dtype=torch.float64)
        dct = torch.cos(math.pi / 8 * (position + 0.5) * position[:, None]) / 2
        dct[0] /= math.sqrt(2)
        mask = torch.zeros(3, 8, 8)
        for channel, size in enumerate((self.luma, self.chroma, self.chroma)):
            mask[channel, :size, :size] = 1
        for name, value in {"to_yuv": to_yuv, "to_rgb": torch.linalg.inv(to_yuv), "dct": dct, "mask": mask}.items():
            self.register_buffer(name, value.float(), persistent=False)

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        count, _, height, width = images.shape
        # Buffers follow the images: a transform without weights should work wherever its input is.
        to_yuv, to_rgb, dct, mask = (b.to(images) for b in (self.to_yuv, self.to_rgb, self.dct, self.mask))
        padded = functional.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
        yuv = torch.einsum("yc,nchw->nyhw", to_yuv, padded)
        blocks = yuv.reshape(count, 3, padded.shape[2] // 8, 8, padded.shape[3] // 8, 8).transpose(3, 4)
        coefficients = dct @ blocks @ dct.T * mask[:, None, None]
        yuv = (dct.T @ coefficients @ dct).transpose(3, 4).reshape(padded.shape)
        return clip(torch.einsum("cy,nyhw->nchw", to_rgb, yuv)[..., :height, :width])

    def extra_repr(self) -> str:
        return f"{self.luma}, chroma={self.chroma}"


class DifferentiableJPEG(Transform):
    """kornia's JPEG with a smooth stand-in for rounding: real quantization tables, always 4:2:0, any image size.

    Args:
        quality: 1 to 100, or a range of it; fractions are allowed.
        pinned: the quality in evaluation mode; None is the midpoint.

    Source: `kornia.enhance.jpeg_codec_differentiable` (Reich et al., "Differentiable JPEG: The Devil is in the
    Details", 2024). The default range follows the qualities 50, 70 and 90 of GAP-Diff's evaluation.
    """

    publishing = True

    def __init__(self, quality: float | Sequence[float] = (50, 90), *, pinned: float | None = None):
        super().__init__()
        self.quality = _quality(quality, pinned, integer=False)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"quality": self.quality.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        quality = torch.tensor([draw["quality"]], dtype=images.dtype, device=images.device)
        return clip(jpeg_codec_differentiable(images, quality))

    def extra_repr(self) -> str:
        return f"{self.quality}"


def code(images: torch.Tensor, file_format: str, **options: object) -> torch.Tensor:
    """Save every image with Pillow and read it back; straight-through gradient.

    Args:
        images: (N, 3, H, W) float RGB in [0, 1]; rounded to 8 bits first.
        file_format: Pillow's name of a format without alpha, such as "JPEG".
        options: passed to `PIL.Image.Image.save`.
    """
    arrays = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(array)).save(buffer, format=file_format, **options)
        with Image.open(buffer) as image:
            decoded.append(np.array(image.convert("RGB")))
    result = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images) / 255
    return straight_through(images, result)


class RealJPEG(Transform):
    """The JPEG codec itself (Pillow, libjpeg-turbo) in the forward pass; straight-through gradient.

    Args:
        quality: 1 to 100, whole, or a range of it.
        subsampling: one of `SUBSAMPLINGS`, or several: drawn in training, the first in evaluation.
        pinned: the quality in evaluation mode; None is the midpoint.

    Source: the evaluation of GAP-Diff compresses with Pillow at quality 70 (50 and 90 suggested) and its default
    4:2:0.
    """

    publishing = True

    def __init__(
        self,
        quality: int | Sequence[int] = 70,
        *,
        subsampling: str | Sequence[str] = "4:2:0",
        pinned: int | None = None,
    ):
        super().__init__()
        self.quality = _quality(quality, pinned, integer=True)
        self.subsamplings = (subsampling,) if isinstance(subsampling, str) else tuple(subsampling)
        if not self.subsamplings or not set(self.subsamplings) <= set(SUBSAMPLINGS):
            raise ValueError(
                f"subsampling: expected one or several of {', '.join(SUBSAMPLINGS)}, got {subsampling!r}; "
                "leave it out for 4:2:0, which most programs and sites use"
            )

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        several = self.training and len(self.subsamplings) > 1
        index = draw_index(len(self.subsamplings), generator) if several else 0
        return {"quality": self.quality.draw(self.training, generator), "subsampling": self.subsamplings[index]}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return code(images, "JPEG", quality=draw["quality"], subsampling=draw["subsampling"])

    def extra_repr(self) -> str:
        return f"{self.quality}, subsampling={self.subsamplings}"


class RealWebP(Transform):
    """The lossy WebP codec itself (Pillow, libwebp; always 4:2:0) in the forward pass; straight-through gradient.

    Args:
        quality: 1 to 100, whole, or a range of it. The scale is WebP's own: 75 is not JPEG's 75.
        pinned: the quality in evaluation mode; None is the midpoint.

    Sites serve WebP beside JPEG. 80 is Pillow's default.
    """

    publishing = True

    def __init__(self, quality: int | Sequence[int] = 80, *, pinned: int | None = None):
        super().__init__()
        self.quality = _quality(quality, pinned, integer=True)

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"quality": self.quality.draw(self.training, generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return code(images, "WEBP", quality=draw["quality"])

    def extra_repr(self) -> str:
        return f"{self.quality}"
