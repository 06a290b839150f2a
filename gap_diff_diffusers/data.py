"""Photos to train and to measure on: which ones, held out by a fixed rule, and what is cut out of them."""

import hashlib
import io
import json
import logging
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from .config import check_at_least_one, check_types
from .faces import find_faces
from .images import PHOTO_SUFFIXES, PhotoError, read_photo

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class DatasetPhoto:
    """A photo of a dataset, read from its file when it is needed: all of them may not fit into memory.

    Attributes:
        rows: a `datasets.Dataset` whose column of images is not decoded.
        column: its name.
        index: the photo's row.
    """

    rows: Any
    column: str
    index: int

    def read(self) -> str | bytes:
        """The photo's path, or the bytes of its file; none for an empty row."""
        image = self.rows[self.index][self.column]
        return (image["bytes"] or image["path"]) if image else b""


Source = str | os.PathLike | DatasetPhoto
"""A photo that was not read yet: its path, or where it is in a dataset."""


@dataclass(frozen=True, kw_only=True)
class PhotosConfig:
    """Which photos to train on: those of folders, or those of a dataset. A tenth is held out (`split_held_out`).

    Attributes:
        train_data_dir: folders of photos.
        dataset_name: id on the Hub, or folder, of a dataset for `datasets.load_dataset`, instead.
        dataset_config_name: which of its configurations, if it has several.
        dataset_revision: branch, tag or commit of the dataset.
        dataset_split: which part of it.
        image_column: of the dataset.
        minimum_side: photos with a shorter side in pixels, which have no detail to learn, are left out where crops are
            cut from them.
        max_train_samples: the first so many photos, or None for all.
        data_description: what the photos are and on which terms, for the record and the model card.
    """

    train_data_dir: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    image_column: str = "image"
    caption_column: ClassVar[str | None] = None  # a setting of what learns captions
    minimum_side: int = 200
    max_train_samples: int | None = None
    data_description: str = ""

    def __post_init__(self):
        check_types(self)
        check_at_least_one(self, "max_train_samples", "minimum_side")
        if bool(self.train_data_dir) == bool(self.dataset_name):
            raise ValueError(
                f"expected either train_data_dir or dataset_name, got {list(self.train_data_dir)} and "
                f"{self.dataset_name!r}"
            )

    @property
    def folders(self) -> tuple[str, ...]:
        """What is read on this machine, where nothing may be written."""
        return self.train_data_dir or tuple(filter(os.path.isdir, [self.dataset_name]))

    def load_photos(self) -> tuple[list[Source], list[str | None]]:
        """The photos, unread, and their captions, None for those without.

        Raises:
            ValueError: a folder without photos, or a column that is not there.
            ImportError: a dataset, without the package `datasets`.
        """
        photos, captions = self._load_dataset() if self.dataset_name else self._load_folders()
        wrong = [caption for caption in captions if not isinstance(caption, str | None)]
        if wrong:
            raise ValueError(f"expected captions as text in {self.caption_column!r}, got {wrong[0]!r}")
        return photos[: self.max_train_samples], captions[: self.max_train_samples]

    def split_photos(self) -> tuple[list[Source], list[Source]]:
        """The photos to train on, and those held out, as `split_usable` has it."""
        photos, _ = self.load_photos()
        return split_usable(photos, is_readable)

    def _load_folders(self) -> tuple[list[Source], list[str | None]]:
        photos = list_photos(self.train_data_dir)
        if self.caption_column is None:
            return photos, [None] * len(photos)
        captions = {}
        for folder in map(Path, self.train_data_dir):
            path = folder / "metadata.jsonl"
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}, line {number}: expected a JSON object with file_name, got {line[:80]!r}"
                    )
                captions[folder / str(row.get("file_name"))] = row.get(self.caption_column)
        if not any(captions.values()):
            raise ValueError(
                f"expected captions in metadata.jsonl, as {self.caption_column!r} beside file_name, found none in "
                f"{', '.join(self.train_data_dir)}; or leave out caption_column"
            )
        return photos, [captions.get(photo) for photo in photos]

    def _load_dataset(self) -> tuple[list[Source], list[str | None]]:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("expected datasets, got none; pip install 'gap_diff_diffusers[train]'") from error
        dataset = datasets.load_dataset(
            self.dataset_name, self.dataset_config_name, revision=self.dataset_revision, split=self.dataset_split
        )
        for column in filter(None, (self.image_column, self.caption_column)):
            if column not in dataset.column_names:
                raise ValueError(
                    f"expected a column {column!r} in {self.dataset_name}, got {', '.join(dataset.column_names)}"
                )
        if self.max_train_samples is not None:
            dataset = dataset.select(range(min(len(dataset), self.max_train_samples)))
        dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))  # bad ones are skipped later
        rows = dataset.select_columns([self.image_column])
        photos = [DatasetPhoto(rows, self.image_column, index) for index in range(len(rows))]
        captions = list(dataset[self.caption_column]) if self.caption_column else [None] * len(photos)
        return photos, captions


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


def digest_photos(photos: Sequence[Source], captions: Sequence[str | None] = ()) -> str:
    """A short text that changes with which photos these are, by path, or by row of the dataset; not by content.

    And with their captions, if there are any.
    """
    names = [str(photo.index if isinstance(photo, DatasetPhoto) else photo) for photo in photos]
    return hashlib.sha256(json.dumps([names, list(captions)]).encode()).hexdigest()[:16]


def read_images(paths: Sequence[str | os.PathLike]) -> list[torch.Tensor]:
    """Photos, and all that folders hold, whole: (3,H,W) float32 in [0,1] each. Unreadable ones are left out.

    Raises:
        ValueError: a folder without photos, or none that can be read.
    """
    return [image for _, image in read_named_images(paths)]


def read_named_images(paths: Sequence[str | os.PathLike]) -> list[tuple[Path, torch.Tensor]]:
    """The photos of `read_images`, each with the path that it was read from."""
    given = [p for path in map(Path, paths) for p in (list_photos([path]) if path.is_dir() else [path])]
    images = _load_each(given, lambda path: (path, to_tensor(Image.fromarray(read_photo(path).pixels))))
    if not images:
        raise ValueError(f"expected photos that can be read, got none in {', '.join(map(str, paths))}")
    return images


def is_readable(source: Source, face_scale: float | None = None) -> bool:
    """Whether a photo has a `face_square`."""
    try:
        face_square(source, face_scale)
    except PhotoError:
        return False
    return True


def readable(photos: Sequence[Source]) -> list[Source]:
    """Those of the photos that can be read; ValueError if none can."""

    def read(source: Source) -> Source:
        face_square(source)
        return source

    found = _load_each(photos, read)
    if not found:
        raise ValueError(f"expected photos that can be read, got none among {len(photos)}")
    return found


def _load_each(sources: Sequence[Source], load: Callable[[Source], T]) -> list[T]:
    """What `load` makes of each photo; unreadable ones are left out, with a warning."""
    loaded = []
    for source in sources:
        try:
            loaded.append(load(source))
        except PhotoError as error:
            logger.warning("left out: %s", error)
    return loaded


def split_held_out(photos: Sequence[T], every: int = 10) -> tuple[list[T], list[T]]:
    """Split into photos to train on and photos held out: the first of every ten, in the order given.

    So the order of the folders matters: whoever measures on held-out photos names them as for training.
    """
    return [p for i, p in enumerate(photos) if i % every], [p for i, p in enumerate(photos) if i % every == 0]


def split_usable(
    photos: Sequence[T], usable: Callable[[T], bool], wanted: str = "photos that can be read"
) -> tuple[list[T], list[T]]:
    """`split_held_out`; but if none of those held out is usable, the first other photo that is takes their place.

    Raises:
        ValueError: none that is usable, of what is `wanted`, to train on or to hold out.
    """
    train, held_out = split_held_out(photos)
    found = filter(usable, list(train))  # as far as they are asked for, which can take a while
    if not any(map(usable, held_out)) and (spare := next(found, None)) is not None:
        train.remove(spare)
        held_out.append(spare)
    if next(found, None) is None:
        count = sum(map(usable, held_out))
        raise ValueError(
            f"expected {wanted} to train on, and of every ten the first to hold out, got {count} among {len(photos)}; "
            "add more"
        )
    return train, held_out


def pick(photos: Sequence[T], count: int) -> list[T]:
    """Up to `count` of the photos, at equal distances."""
    return list(photos[:: max(1, len(photos) // count)][:count])


def split_record(train: int, held_out: int, skipped: int, **reasons: int) -> dict[str, int | str]:
    """What a training record says of its photos: how many there are, and how `split_held_out` divides them.

    `reasons` says for what how many of those skipped were.
    """
    rule = "the first of every ten, by folder and name, is held out"
    return {"train": train, "held_out": held_out, "skipped": skipped, **reasons, "rule": rule}


def face_square(source: Source, face_scale: float | None = None) -> Image.Image:
    """The largest square of a portrait: centered across, and from the top, where the face is.

    With `face_scale` the square around its largest face, so many times as wide as the box that a detector draws from
    brow to chin; the box's middle lies a little below the square's, unless the photo ends there.

    Raises:
        ImportError: there is no detector.
        PhotoError: an unreadable photo, or one without a face of a fifth of its long side or more.
    """
    if isinstance(source, DatasetPhoto):
        source = source.read()
    if isinstance(source, bytes):
        try:
            source = Image.open(io.BytesIO(source))
        except (OSError, Image.DecompressionBombError) as error:
            raise PhotoError(f"cannot be read, is it an image? ({error})") from error
    image = Image.fromarray(read_photo(source).pixels).convert("RGB")
    side, left, top = min(image.size), (image.width - min(image.size)) // 2, 0
    if face_scale is not None:
        faces = find_faces(np.array(image), side=400)
        if not faces:
            raise PhotoError("no face was found")
        x0, y0, x1, y1 = max(faces, key=lambda box: box[2] - box[0])
        side = min(round(face_scale * (x1 - x0)), *image.size)
        left = min(max(round((x0 + x1) / 2 - side / 2), 0), image.width - side)
        top = min(max(round((y0 + y1) / 2 - 0.56 * side), 0), image.height - side)
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image as (3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """An image (3,H,W) in [0,1] as (H,W,3) uint8."""
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image (3,H,W) in [0,1] as a PIL image."""
    return Image.fromarray(to_pixels(image))


def load_face(source: Source, size: int, face_scale: float | None = None) -> torch.Tensor:
    """The `face_square` of a photo at one size: (3,size,size) float32 in [0,1]."""
    return to_tensor(face_square(source, face_scale).resize((size, size), Image.Resampling.LANCZOS))


def load_faces(photos: Sequence[Source], size: int) -> torch.Tensor:
    """Face squares of photos at one size: (N,3,size,size) float32 in [0,1]. Unreadable photos are left out.

    Raises:
        ValueError: none can be read.
    """
    faces = _load_each(photos, lambda source: load_face(source, size))
    if not faces:
        raise ValueError(f"expected photos that can be read, got none among {len(photos)}")
    return torch.stack(faces)


def round_to_8_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in [0,1] with the values that an 8-bit file can hold, those beyond clipped."""
    return (images.clamp(0, 1) * 255).round() / 255


def save_grid(images: torch.Tensor, path: str | os.PathLike, columns: int = 8) -> np.ndarray:
    """Save images (N,3,H,W) in [0,1] as one picture, row by row, and return it (H,W,3) uint8; its folder is made."""
    rows = [torch.cat(list(images[i : i + columns]), dim=2) for i in range(0, len(images), columns)]
    width = max(row.shape[2] for row in rows)
    grid = torch.cat([F.pad(row, (0, width - row.shape[2])) for row in rows], dim=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil(grid).save(path)
    return to_pixels(grid)


def save_sheet(
    rows: Sequence[tuple[str, torch.Tensor]], path: str | os.PathLike, columns: int = 8, *, title: str = ""
) -> None:
    """Save captions and their images (N,3,H,W) in [0,1], all of one size, as one picture, under a title if given."""
    columns = min(columns, max(len(images) for _, images in rows))
    width = columns * rows[0][1].shape[3]
    parts = [to_tensor(_caption(line, width)) for line in textwrap.wrap(title, max(1, width // 6))]
    for caption, images in rows:
        white = torch.ones(-len(images) % columns, *images.shape[1:])
        lines = torch.cat([images, white]).split(columns)
        grid = torch.cat([torch.cat(list(line), dim=2) for line in lines], dim=1)
        parts += [to_tensor(_caption(caption, width)), grid]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil(torch.cat(parts, dim=1)).save(path)


def warn_without_faces(photos: Sequence[Source], count: int = 16) -> None:
    """Warn if there is no face in any of up to `count` of the photos; without a detector nobody can tell."""
    looked_at = pick(photos, count)
    try:
        if any(is_readable(photo, face_scale=1.0) for photo in looked_at):
            return
    except ImportError:
        return
    logger.warning("found no face in any of %d of the %d photos; are these portraits?", len(looked_at), len(photos))


def _caption(text: str, width: int) -> Image.Image:
    line = Image.new("RGB", (width, 20), "white")
    ImageDraw.Draw(line).text((4, 4), text, fill="black")
    return line


class FaceCrops:
    """Random crops of face squares, as an attacker would see them at about `native_size`.

    The square is scaled to `native_size` times a factor from `scales`, and `crop_size` pixels are cut from it, half of
    them mirrored. Unreadable photos and those with a side under `minimum_side` are left out, and counted in
    `unreadable` and `too_small`. Photos stay decoded up to `memory` bytes; the rest is decoded for every crop.
    """

    def __init__(
        self,
        photos: Sequence[Source],
        *,
        crop_size: int,
        native_size: int = 512,
        scales: tuple[float, float] = (0.8, 1.2),
        minimum_side: int = 200,
        memory: int = 4 * 2**30,
    ):
        if not 0 < crop_size <= scales[0] * native_size:
            raise ValueError(
                f"expected crops of at most {scales[0]} x {native_size} px, got {crop_size}; cut smaller ones, or "
                "scale the photos less"
            )
        self.crop_size, self.native_size, self.scales = crop_size, native_size, scales
        self.squares: list[Image.Image | Source] = []
        self.unreadable = self.too_small = 0
        for source in tqdm(photos, desc="Reading photos", disable=None):
            try:
                square = face_square(source)
            except PhotoError:
                self.unreadable += 1
                continue
            if square.width < minimum_side:
                self.too_small += 1
            else:
                memory -= 3 * square.width**2
                self.squares.append(square if memory >= 0 else source)
        left_out = f"{self.unreadable} unreadable, {self.too_small} under {minimum_side} px a side"
        if not self.squares:
            raise ValueError(
                f"expected photos that can be read, of at least {minimum_side} px a side, got none among "
                f"{len(photos)}: {left_out}; add larger ones, or lower minimum_side"
            )
        logger.info("%d photos to train on; left out: %s", len(self.squares), left_out)

    def split_record(self, held_out: int, unreadable: int) -> dict[str, int | str]:
        """What a record says of these photos, and of those held out with them, of which some were unreadable."""
        reasons = {"unreadable": self.unreadable + unreadable, "too_small": self.too_small}
        return split_record(len(self.squares), held_out, sum(reasons.values()), **reasons)

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """(N,3,crop_size,crop_size) float32 in [0,1]."""
        return torch.stack([self._crop(torch.rand(5, generator=generator).tolist()) for _ in range(batch_size)])

    def _crop(self, draws: list[float]) -> torch.Tensor:
        which, scale, left, top, mirrored = draws
        square = self.squares[int(which * len(self.squares))]
        if not isinstance(square, Image.Image):
            square = face_square(square)
        low, high = self.scales
        side = square.width * self.crop_size / (self.native_size * (low + (high - low) * scale))
        x, y = left * (square.width - side), top * (square.width - side)
        box = (x, y, x + side, y + side)
        crop = square.resize((self.crop_size, self.crop_size), Image.Resampling.BICUBIC, box=box)
        if mirrored < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)
