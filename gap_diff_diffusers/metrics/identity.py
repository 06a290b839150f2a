"""Faces found in pictures and recognised as a person's, with dlib: offline, on the CPU.

Metrics of GAP-Diff's evaluation (section V): the failure rate of face detection (FDFR). In place of its ISM, a cosine
of ArcFace embeddings, the share of pictures that dlib's network recognises as the person at the threshold it was made
for: a distance under 0.6 (http://dlib.net/face_recognition.py.html). Its models are in the package
`face_recognition_models`; they are read by path, for importing that package needs a long-gone setuptools.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import to_pixels
from ..faces import import_dlib
from ..images import resize_pixels
from .base import Metric, MetricResult

logger = logging.getLogger(__name__)

THRESHOLD = 0.6
LARGEST_SIDE = 1024
LESS, MORE = "less like the person", "more like the person"


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

        The image is scaled by two, after a bigger one was scaled down to `LARGEST_SIDE`: faces from 40 px on are
        found, those of pictures of 256 px among them.
        """
        pixels = to_pixels(image)
        if (scale := LARGEST_SIDE / max(pixels.shape[:2])) < 1:
            pixels = resize_pixels(pixels, *(round(side * scale) for side in pixels.shape[:2]))
        boxes = sorted(self._detect(pixels, 1), key=lambda box: -box.area())
        return [np.array(self._network.compute_face_descriptor(pixels, self._landmarks(pixels, box))) for box in boxes]

    def reference(self, photos: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """The largest face of each photo (3,H,W) in [0,1] that has one; ValueError if none has.

        It warns if the faces fall into groups that are not alike: these may be several people.
        """
        known = [faces[0] for photo in photos if (faces := self.embeddings(photo))]
        if not known:
            raise ValueError(f"expected a face in the reference, found none in {len(photos)} photos")
        if (people := _count_people(known)) > 1:
            logger.warning("the faces of %d photos may be of %d people", len(known), people)
        return known

    def compare(
        self, images: Sequence[torch.Tensor], known: Sequence[np.ndarray]
    ) -> tuple[list[float | None], list[float | None]]:
        """How near the largest face of each image (3,H,W) in [0,1] is to the person of `reference`.

        Returns:
            Distances from the nearest of the known faces, and cosines with their mean; None for images without a face.

        Raises:
            ValueError: no images.
        """
        if not len(images):
            raise ValueError("expected pictures to compare, got none")
        distances: list[float | None] = []
        cosines: list[float | None] = []
        mean = np.mean(known, axis=0)
        for image in images:
            face = next(iter(self.embeddings(image)), None)
            if face is None:
                distances.append(None)
                cosines.append(None)
            else:
                distances.append(min(float(np.linalg.norm(face - other)) for other in known))
                cosines.append(float(face @ mean / (np.linalg.norm(face) * np.linalg.norm(mean))))
        return distances, cosines


def _count_people(faces: Sequence[np.ndarray]) -> int:
    """How many groups there are, if faces nearer than the threshold belong together, and those between them, too."""
    left, groups = list(range(len(faces))), 0
    while left:
        reached = [left.pop()]
        groups += 1
        while reached:
            face = faces[reached.pop()]
            near = [other for other in left if np.linalg.norm(face - faces[other]) < THRESHOLD]
            left = [other for other in left if other not in near]
            reached += near
    return groups


class DlibIdentity(Metric):
    """FDFR, ISM, and the share that is recognised, by `DlibFaces`.

    FDFR and ISM are those of GAP-Diff's evaluation (section V), with another detector and another embedding: ISM is
    the cosine of a picture's embedding and the mean of the reference's. A picture without a face counts for FDFR, is
    not recognised, and has no ISM; "ISM, all" counts it as 0.
    """

    def __init__(self):
        self.faces = DlibFaces()

    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[MetricResult]:
        distances, cosines = self.faces.compare(images, self.faces.reference(reference))
        figures = (
            ("FDFR", [float(distance is None) for distance in distances], LESS, True),
            ("recognised", [float(d is not None and d < THRESHOLD) for d in distances], MORE, True),
            ("ISM", cosines, MORE, False),
            ("ISM, all", [cosine or 0.0 for cosine in cosines], MORE, False),
            ("distance", distances, LESS, False),
        )
        return [
            MetricResult(name=name, values=list(values), higher_means=means, backend="dlib", percent=percent)
            for name, values, means, percent in figures
        ]
