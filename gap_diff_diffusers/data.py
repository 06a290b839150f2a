"""Photos to train and to measure on: which ones, held out by a fixed rule, and what is cut out of them."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .images import PHOTO_SUFFIXES, PhotoError, read_photo


def list_photos(folders: Sequence[str | os.PathLike]) -> list[Path]:
    """All photos in the folders and below, by folder and then by name; hidden files are left out.

    Raises:
        ValueError: a folder that is missing or holds no photo.
    """
    photos: list[Path] = []
    for folder in map(Path, folders):
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in PHOTO_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not found:
            raise ValueError(
                f"{folder}: expected a folder with photos ({', '.join(sorted(PHOTO_SUFFIXES))}), found none"
            )
        photos += found
    return photos


def split_held_out(photos: Sequence[Path], every: int = 10) -> tuple[list[Path], list[Path]]:
    """Split into photos to train on and photos held out: the first of every ten, in the order given.

    So the order of the folders matters: whoever measures on held-out photos names them as for training.
    """
    return [p for i, p in enumerate(photos) if i % every], [p for i, p in enumerate(photos) if i % every == 0]


def face_square(path: str | os.PathLike) -> Image.Image:
    """The largest square of a portrait: centered across, and from the top, where the face is.

    Raises:
        PhotoError: an unreadable photo.
    """
    image = Image.fromarray(read_photo(path).pixels)
    side = min(image.size)
    left = (image.width - side) // 2
    return image.crop((left, 0, left + side, side))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image as (3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def load_faces(photos: Sequence[Path], size: int) -> torch.Tensor:
    """Face squares of photos at one size: (N,3,size,size) float32 in [0,1]. Unreadable photos are left out.

    Raises:
        ValueError: none can be read.
    """
    faces = []
    for path in photos:
        with contextlib.suppress(PhotoError):
            faces.append(to_tensor(face_square(path).resize((size, size), Image.Resampling.LANCZOS)))
    if not faces:
        raise ValueError(f"expected photos that can be read, got none among {len(photos)}")
    return torch.stack(faces)


class FaceCrops:
    """Random crops of face squares, as an attacker would see them at about `native_size`.

    The square is scaled to `native_size` times a factor from `scales`, and `crop_size` pixels are cut from it, half of
    them mirrored. Photos stay decoded in memory; unreadable ones and those with a side under `minimum_side` are left
    out, and counted in `skipped`.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        *,
        crop_size: int,
        native_size: int = 512,
        scales: tuple[float, float] = (0.8, 1.2),
        minimum_side: int = 200,
    ):
        if not 0 < crop_size <= scales[0] * native_size:
            raise ValueError(
                f"expected crops of at most {scales[0]} x {native_size} px, got {crop_size}; cut smaller ones, or "
                "scale the photos less"
            )
        self.crop_size, self.native_size, self.scales = crop_size, native_size, scales
        self.squares: list[Image.Image] = []
        self.skipped = 0
        for path in photos:
            try:
                square = face_square(path)
            except PhotoError:
                self.skipped += 1
                continue
            if square.width < minimum_side:
                self.skipped += 1
            else:
                self.squares.append(square)
        if not self.squares:
            raise ValueError(
                f"expected photos of at least {minimum_side} px a side, got none among {len(photos)} photos"
            )

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """(N,3,crop_size,crop_size) float32 in [0,1]."""
        return torch.stack([self._crop(torch.rand(5, generator=generator).tolist()) for _ in range(batch_size)])

    def _crop(self, draws: list[float]) -> torch.Tensor:
        which, scale, left, top, mirrored = draws
        square = self.squares[int(which * len(self.squares))]
        low, high = self.scales
        side = square.width * self.crop_size / (self.native_size * (low + (high - low) * scale))
        x, y = left * (square.width - side), top * (square.width - side)
        box = (x, y, x + side, y + side)
        crop = square.resize((self.crop_size, self.crop_size), Image.Resampling.BICUBIC, box=box)
        if mirrored < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)
