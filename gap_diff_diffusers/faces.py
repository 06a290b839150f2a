"""Where the faces are in a photo, with dlib (the extra `metrics`): offline, on the CPU."""

from __future__ import annotations

import numpy as np

from .images import resize_pixels


def find_faces(pixels: np.ndarray, side: int = 1600) -> list[tuple[float, float, float, float]]:
    """The boxes (left, top, right, bottom) of frontal faces in a photo (H,W,3) uint8, in its pixels.

    The photo is scaled to a long side of `side`; faces wider than about 80 px of those are found, a twentieth of the
    photo.

    Raises:
        ImportError: dlib is not installed.
    """
    scale = side / max(pixels.shape[:2])
    height, width = (round(length * scale) for length in pixels.shape[:2])
    boxes = import_dlib().get_frontal_face_detector()(resize_pixels(pixels, height, width), 0)
    return [(box.left() / scale, box.top() / scale, box.right() / scale, box.bottom() / scale) for box in boxes]


def import_dlib():
    """The module; ImportError that names the extra."""
    try:
        import dlib
    except ImportError as error:
        raise ImportError(
            "expected dlib to find faces, got none; pip install 'gap_diff_diffusers[metrics]'"
        ) from error
    return dlib
