"""Whether the person is found in pictures.

Metrics of GAP-Diff's evaluation (section V): the failure rate of face detection (FDFR) and the identity score matching
(ISM), and beside them the share of pictures that the backend takes for the person.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..recognition import DlibFaces, FaceRecognizer, InsightFaces, OpenCVFaces
from .base import Metric, MetricResult

LESS, MORE = "less like the person", "more like the person"


class Identity(Metric):
    """FDFR, ISM, and the share that is recognised.

    FDFR and ISM are those of GAP-Diff's evaluation (section V), with the backend's detector and embedding: ISM is
    the cosine of a picture's embedding and the mean of the reference's. A picture without a face counts for FDFR, is
    not recognised, and has no ISM; "ISM, all" counts it as 0. The paper's own ISM is the mean over pictures with a
    face, and 0 for a person without any: `paper.paper_mean`.

    Args:
        faces: the backend.
        suffix: after the figures' names, so that those of several backends can stand in one table.
    """

    def __init__(self, faces: FaceRecognizer, suffix: str = ""):
        self.faces, self.suffix = faces, suffix

    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[MetricResult]:
        distances, cosines = self.faces.compare(images, self.faces.reference(reference))
        threshold = self.faces.threshold
        figures = (
            ("FDFR", [float(distance is None) for distance in distances], LESS, True),
            ("recognised", [float(d is not None and d < threshold) for d in distances], MORE, True),
            ("ISM", cosines, MORE, False),
            ("ISM, all", [cosine or 0.0 for cosine in cosines], MORE, False),
            ("distance", distances, LESS, False),
        )
        return [
            MetricResult(
                name=name + self.suffix,
                values=list(values),
                higher_means=means,
                backend=self.faces.name,
                percent=percent,
            )
            for name, values, means, percent in figures
        ]


class DlibIdentity(Identity):
    """By `DlibFaces`."""

    def __init__(self):
        super().__init__(DlibFaces())


class OpenCVIdentity(Identity):
    """By `OpenCVFaces`: YuNet and SFace."""

    def __init__(self):
        super().__init__(OpenCVFaces(), " (SFace)")


class ArcFaceIdentity(Identity):
    """By `InsightFaces`: SCRFD and ArcFace."""

    def __init__(self):
        super().__init__(InsightFaces(), " (ArcFace)")
