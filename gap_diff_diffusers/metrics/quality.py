"""How good a picture is without looking at whom it shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data import to_pixels
from .base import Metric, MetricResult

MINIMUM_SIDE = 32


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
