"""How good a picture is without looking at whom it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data import to_pixels
from ..models.face_embedder import FACE_SIZE, FaceEmbedder
from ..recognition import DlibFaces
from .base import Metric, MetricResult

MINIMUM_SIDE = 32
FACE_EMBEDDER = Path(__file__).parents[1] / "checkpoints" / "face-embedder"
PASSES = 100


class Brisque(Metric):
    """BRISQUE (IEEE TIP 2012, doi 10.1109/TIP.2012.2214050) at the pictures' own resolution, about 0 to 100.

    By the package `brisque`, as in GAP-Diff's evaluation; rounded, as its last digits vary from run to run. A picture
    of one color, or with a side under 32 px, has none. It rewards artifacts, not privacy: read it beside an identity.
    """

    def __init__(self):
        try:
            from brisque import BRISQUE
        except ImportError as error:
            raise ImportError(
                "expected brisque with OpenCV, got none; pip install 'gap_diff_diffusers[metrics]'"
            ) from error

        class Flat(BRISQUE):
            """Its features are arrays of one entry here and there, which NumPy 2.4 makes no floats of."""

            def scale_features(self, features):
                return super().scale_features([np.asarray(feature).item() for feature in features])

        self._score = Flat(url=False).score

    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] = ()) -> list[MetricResult]:
        values = [self._measure(image) for image in images]
        return [MetricResult(name="BRISQUE", values=values, higher_means="worse picture", backend="brisque")]

    def _measure(self, image: torch.Tensor) -> float | None:
        pixels = to_pixels(image)
        if min(pixels.shape[:2]) < MINIMUM_SIDE or (pixels == pixels[0, 0]).all():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            score = float(self._score(pixels))
        return round(score, 4) if np.isfinite(score) else None


class SerFiq(Metric):
    """SER-FIQ (CVPR 2020, arXiv 2003.09373): how sure a network with dropout is of whose face it sees, 0 to 1.

    With d the mean distance between the normalized embeddings of 100 passes: 2 sigmoid(-d), as GAP-Diff's evaluation
    has it before it stretches the range of ArcFace's (`paper.stretch_quality`). The network is our `FaceEmbedder`, its
    faces are found and aligned by dlib: the figures are not comparable with those of ArcFace. A picture without a face
    has none; "SER-FIQ, all" counts it as 0, as the paper's does, and so counts FDFR once more.
    """

    def __init__(self):
        self.faces = DlibFaces()
        self.network = FaceEmbedder.from_pretrained(FACE_EMBEDDER, dtype=torch.float32).eval()

    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] = ()) -> list[MetricResult]:
        if not len(images):
            raise ValueError("expected pictures to measure, got none")
        aligned = [next(iter(self.faces.align(image, FACE_SIZE)), None) for image in images]
        values = [None if face is None else self.score(face[None]).item() for face in aligned]
        return [
            MetricResult(name=name, values=list(figures), higher_means="better picture", backend="dlib, FaceEmbedder")
            for name, figures in (("SER-FIQ", values), ("SER-FIQ, all", [value or 0.0 for value in values]))
        ]

    @torch.no_grad()
    def score(self, faces: torch.Tensor) -> torch.Tensor:
        """Of aligned faces (N,3,112,112) in [0,1]: (N,) in [0,1]. The same face always gets the same."""
        drawn = self.network.draw_embeddings(faces, PASSES, torch.Generator().manual_seed(0))
        distances = [F.pdist(face).mean() for face in F.normalize(drawn, dim=2)]
        return torch.stack([2 * torch.sigmoid(-distance) for distance in distances]).clamp(0, 1)
