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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..faces import import_dlib
from .base import Metric, MetricResult

logger = logging.getLogger(__name__)

THRESHOLD = 0.6
LESS, MORE = "less like the person", "more like the person"


@dataclass(frozen=True, kw_only=True)
class IdentityResult:
    """What was found in some pictures of a person.

    Attributes:
        distances: per picture, of its largest face from the nearest face of the reference; None without a face.
        cosines: per picture, of its largest face and the mean of the reference's faces; None without a face.
        single: how many pictures have exactly one face.
    """

    distances: list[float | None]
    cosines: list[float | None]
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
        """The largest face of each photo (3,H,W) in [0,1] that has one; ValueError if none has.

        It warns if a face is like none of the others: these may be several people.
        """
        known = [faces[0] for photo in photos if (faces := self.embeddings(photo))]
        if not known:
            raise ValueError(f"expected a face in the reference, found none in {len(photos)} photos")
        others = [
            min(float(np.linalg.norm(face - other)) for other in known if other is not face)
            for face in known
            if len(known) > 1
        ]
        if strangers := sum(distance >= THRESHOLD for distance in others):
            logger.warning("%d of %d faces are like none of the others: several people?", strangers, len(known))
        return known

    def compare(self, images: Sequence[torch.Tensor], known: Sequence[np.ndarray]) -> IdentityResult:
        """How near images (3,H,W) in [0,1] are to the person of `reference`; ValueError if there are none."""
        if not len(images):
            raise ValueError("expected pictures to compare, got none")
        distances: list[float | None] = []
        cosines: list[float | None] = []
        mean, single = np.mean(known, axis=0), 0
        for image in images:
            faces = self.embeddings(image)
            single += len(faces) == 1
            nearest = min(float(np.linalg.norm(faces[0] - face)) for face in known) if faces else None
            distances.append(nearest)
            lengths = np.linalg.norm(faces[0]) * np.linalg.norm(mean) if faces else 1.0
            cosines.append(float(faces[0] @ mean / lengths) if faces else None)
        return IdentityResult(distances=distances, cosines=cosines, single=single)


class DlibIdentity(Metric):
    """FDFR, ISM, and the share that is recognised, by `DlibFaces`.

    FDFR and ISM as GAP-Diff's evaluation has them (section V), with other networks: ISM is the cosine of
    a picture's embedding and the mean of the reference's. A picture without a face counts for FDFR, is not recognised,
    and has no ISM; "ISM, none as 0" is the released code's way, in which a picture without a face counts as one of
    somebody else.
    """

    def __init__(self):
        self.faces = DlibFaces()

    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[MetricResult]:
        known = self.faces.reference(reference)
        found = self.faces.compare(images, known)
        missing = [distance is None for distance in found.distances]
        figures = (
            ("FDFR", [float(value) for value in missing], LESS, True),
            ("recognised", [float(d is not None and d < THRESHOLD) for d in found.distances], MORE, True),
            ("ISM", found.cosines, MORE, False),
            ("ISM, none as 0", [cosine or 0.0 for cosine in found.cosines], MORE, False),
            ("distance", found.distances, LESS, False),
        )
        return [
            MetricResult(name=name, values=list(values), higher_means=means, backend="dlib", percent=percent)
            for name, values, means, percent in figures
        ]
