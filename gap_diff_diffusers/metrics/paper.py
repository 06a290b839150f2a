"""How GAP-Diff's evaluation counts, where we count otherwise: what it prints can only be compared with the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIGURES = ("FDFR", "ISM", "BRISQUE", "SER-FIQ")
"""Those that it prints."""


def without_backend(name: str) -> str:
    """What a figure is called whichever backend measured it."""
    return name.partition(" (")[0]


def paper_mean(name: str, values: Sequence[float | None]) -> float | None:
    """The mean that the evaluation gives one of its `FIGURES` for the pictures of one person; None if there is none.

    ISM is the mean over the pictures with a face, and 0 without any; SER-FIQ the mean of `stretch_quality` over all
    pictures, 0 for those without a face; others are plain means.
    """
    figure = without_backend(name)
    if figure == "SER-FIQ":
        values = [0.0 if value is None else stretch_quality(value) for value in values]
    defined = [value for value in values if value is not None]
    if figure == "ISM" and values and not defined:
        return 0.0
    return sum(defined) / len(defined) if defined else None


def stretch_quality(value: float) -> float:
    """SER-FIQ as the evaluation has it, 0 to 1: its constants suit ArcFace, of other embeddings all may be 0."""
    return 1 / (1 + math.exp(-130 * (value - 0.88)))
