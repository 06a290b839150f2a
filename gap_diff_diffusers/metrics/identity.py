"""Faces found in pictures and recognised as a person's, with dlib: offline, on the CPU.

Metrics of GAP-Diff's evaluation (section V): the failure rate of face detection (FDFR). In place of its ISM, a cosine
of ArcFace embeddings, the share of pictures that dlib's network recognises as the person at the threshold it was made
for: a distance under 0.6 (http://dlib.net/face_recognition.py.html). Its models are in the package
`face_recognition_models`; they are read by path, for importing that package needs a long-gone setuptools.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..faces import import_dlib

THRESHOLD = 0.6


@dataclass(frozen=True, kw_only=True)
class IdentityResult:
    """What was found in some pictures of a person.

    Attributes:
        distances: per picture, of its largest face from the nearest face of the reference; None without a face.
        single: how many pictures have exactly one face.
    """

    distances: list[float | None]
    single: int

    @property
    def detection_failure_rate(self) -> float:
        """FDFR: the share of the pictures without a face."""
        return sum(distance is None for distance in self.distances) / len(self.distances)

    @property
    def match_rate(self) -> float:
        """The share of all pictures that are recognised as the person."""
        return sum(distance is not None and distance < THRESHOLD for distance in self.distances) / len(self.distances)

    @property
    def single_face_rate(self) -> float:
        """The share of the pictures with exactly one face."""
        return self.single / len(self.distances)


class DlibFaces:
    """dlib's frontal face detector, its five landmarks and its embedding of 128 numbers.

    Args:
        models: the folder of the two `.dat` files; None for that of `face_recognition_models`.

    Raises:
        ImportError: dlib or the models are not installed.
    """

    def __init__(self, models: Path | None = None):
        dlib = import_dlib()
        if models is None:
            found = importlib.util.find_spec("face_recognition_models")
            if found is None or found.origin is None:
                raise ImportError(
                    "expected the package face_recognition_models with dlib's weights, got none; "
                    "pip install 'gap_diff_diffusers[metrics]'"
                )
            models = Path(found.origin).parent / "models"
        self._detect = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def embeddings(self, image: torch.Tensor) -> list[np.ndarray]:
        """The faces in an image (3,H,W) in [0,1], the largest first: one array (128,) each.

        The image is scaled by two: faces from 40 px on are found, those of pictures of 256 px among them.
        """
        pixels = np.ascontiguousarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        boxes = sorted(self._detect(pixels, 1), key=lambda box: -box.area())
        return [np.array(self._network.compute_face_descriptor(pixels, self._landmarks(pixels, box))) for box in boxes]

    def reference(self, photos: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """The largest face of each photo (3,H,W) in [0,1] that has one; ValueError if none has."""
        known = [faces[0] for photo in photos if (faces := self.embeddings(photo))]
        if not known:
            raise ValueError(f"expected a face in the reference, found none in {len(photos)} photos")
        return known

    def compare(self, images: Sequence[torch.Tensor], known: Sequence[np.ndarray]) -> IdentityResult:
        """How near images (3,H,W) in [0,1] are to the person of `reference`; ValueError if there are none."""
        if not len(images):
            raise ValueError("expected pictures to compare, got none")
        distances: list[float | None] = []
        single = 0
        for image in images:
            faces = self.embeddings(image)
            single += len(faces) == 1
            nearest = min(float(np.linalg.norm(faces[0] - face)) for face in known) if faces else None
            distances.append(nearest)
        return IdentityResult(distances=distances, single=single)
