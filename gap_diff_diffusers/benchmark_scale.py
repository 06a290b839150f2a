"""`gap-diff benchmark scale`: how much of the displacement is left where an attacker crops the face of a big photo.

A perturbation computed at 4000 px would average away when the crop is resized to the 512 px of a text-to-image model.
"""

import argparse

from .benchmark_displacement import (
    LEVELS,
    SIZE,
    add_common_arguments,
    load,
    published_displacement,
    report,
    spread,
)
from .config import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="sides of the photos")
    parser.add_argument(
        "--detect-faces", action="store_true", help="find the faces first, as gap-diff protect --detect-faces does"
    )
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.1, 0.2, 0.4, 0.67], help="face widths, of the photo's width"
    )


def run(arguments: argparse.Namespace) -> int:
    """How much displacement survives if a big photo is protected and an attacker then crops the face to 512x512.

    A square photo of each size is built around held-out portraits, so that the face fills the given share of its
    width.
    """
    import numpy as np

    from .data import face_square, list_photos, split_held_out
    from .faces import find_faces
    from .images import Photo, psnr, resize_pixels

    encoders, pipeline = load(arguments)
    _, held_out = split_held_out(list_photos(arguments.photos))
    squares = [np.array(face_square(path)) for path in spread(held_out, arguments.count)]
    names = [encoder.name for encoder in encoders]

    def protect(pixels: np.ndarray, detect_faces: bool = False) -> np.ndarray:
        faces = [find_faces(pixels)] if detect_faces else None
        return pipeline.protect_batch([Photo(pixels=pixels)], LEVELS / 255, faces=faces)[0].pixels

    rows = []
    for size in arguments.sizes:
        for share in arguments.shares:
            crop = min(size, round(2 * share * size))  # what is cut out is twice as wide as the face
            sums = {name: [0.0, 0.0] for name in names}
            decibels = []
            for square in squares:
                photo = surround(resize_pixels(square, crop, crop), size)
                start = (size - crop) // 2
                box = (slice(start, start + crop), slice(start, start + crop))
                clean = resize_pixels(np.ascontiguousarray(photo[box]), SIZE, SIZE)
                protected = protect(photo, arguments.detect_faces)
                decibels.append(psnr(protected, photo))
                seen = resize_pixels(np.ascontiguousarray(protected[box]), SIZE, SIZE)
                clean, seen, reference = (_to_tensor(pixels) for pixels in (clean, seen, protect(clean)))
                for encoder in encoders:
                    sums[encoder.name][0] += published_displacement(encoder, clean, seen)
                    sums[encoder.name][1] += published_displacement(encoder, clean, reference)
            kept = {name: seen / reference for name, (seen, reference) in sums.items()}
            displacement = {name: seen / len(squares) for name, (seen, _) in sums.items()}
            row = {"photo": size, "face_share": share, "crop": crop, "kept": kept, "displacement": displacement}
            rows.append(row | {"psnr": sum(decibels) / len(decibels)})
    figures = {"scale": rows, "photos": len(squares), "detect_faces": arguments.detect_faces}
    return report(arguments, figures, to_markdown)


def to_markdown(record: dict) -> str:
    """The record as a table."""
    names = list(record["scale"][0]["kept"])
    rows = [
        [
            f"{row['photo']} px",
            f"{row['face_share']:.2f}",
            f"{row['crop']} px",
            *(f"{row['kept'][n]:.0%} ({row['displacement'][n]:.2f})" for n in names),
            f"{row['psnr']:.1f} dB",
        ]
        for row in record["scale"]
    ]
    title = f"Displacement that is left, and its value, after JPEG 70: mean of {record['photos']} held-out faces"
    if record.get("detect_faces"):
        title += ", which a detector looks for"
    return table(title, ["photo", "face / width", "crop", *names, "PSNR"], rows)


def surround(square, size: int):
    """A size x size photo with the (h,h,3) square in its middle and its mirror images around it."""
    import numpy as np

    before = (size - len(square)) // 2
    after = size - len(square) - before
    return np.pad(square, ((before, after), (before, after), (0, 0)), mode="symmetric")


def _to_tensor(pixels):
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
