"""What a measurement says: a value per picture, or none where it is undefined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """One figure for each of some pictures.

    Attributes:
        name: of the figure, as tables call it.
        values: per picture; None where it is undefined, as an identity is without a face.
        higher_means: "less like the person", "more like the person", "worse picture" or "better picture".
        backend: what measured it; figures of different backends are not comparable.
        percent: whether tables show it as a percentage.
    """

    name: str
    values: list[float | None]
    higher_means: str
    backend: str
    percent: bool = False

    @property
    def defined(self) -> list[float]:
        """The values that are there."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Of the values that are there; None without any."""
        return sum(self.defined) / len(self.defined) if self.defined else None


class Metric(ABC):
    """A measurement of generated pictures; it may give several figures.

    Raises, when made:
        ImportError: what it needs is not installed; names the extra.
    """

    @abstractmethod
    def __call__(self, images: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[MetricResult]:
        """Measure pictures (3,H,W) in [0,1] of any sizes, given clean photos of the person.

        Raises:
            ValueError: there is nothing to measure, or nothing to compare it with.
        """
