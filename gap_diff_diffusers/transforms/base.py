"""What every transform shares: one draw per call, drawn in training and pinned in evaluation, and replayable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Draw = dict[str, Any]
"""The random choices of one call, as plain JSON data: it can be replayed on other images and written to a record."""


class Transform(nn.Module):
    """Something that happens to a photo after it was protected: images in, images out.

    A strength is given as a number (always that number) or as a pair `(low, high)`: drawn uniformly in training mode;
    in evaluation mode pinned to the keyword `pinned`, by default the midpoint. Of alternatives (chroma subsamplings,
    the choices of `RandomChoice`) evaluation takes the first. A call draws once, for the whole batch.

    To apply ONE draw to two batches, such as the clean and the protected version of the same photos:

        draw = transform.draw(generator=generator)
        published_clean, published = transform.apply_draw(clean, draw), transform.apply_draw(protected, draw)

    A subclass defines `apply_draw`, and `draw` where something is random. `differentiable` says whether gradients
    reach the pixels; a straight-through gradient (the identity's, for an operation that has none) counts. `publishing`
    says whether it is what becomes of a whole photo that is posted; what an attacker does to it is done at the size
    that is learned, since shrinking afterwards would undo most of it.
    """

    differentiable: bool = True
    publishing: bool = False
    networks: Sequence[nn.Module] = ()
    """Models that it computes with, which decide on what comes out as its settings do."""

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        """The strengths of one call: drawn from `generator` (None: torch's default one), pinned in evaluation mode."""
        return {}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Transform (N, 3, H, W) float images in [0, 1] with the strengths in `draw`; the result is in [0, 1] too."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Transform `images` with a fresh draw.

        Args:
            images: (N, 3, H, W) floating-point RGB in [0, 1].
            generator: source of the random draws; None is torch's default generator.

        Returns:
            Images in the same format and range. Some transforms change height and width.

        Raises:
            ValueError: `images` has another shape or an integer type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"expected floating-point images of shape (N, 3, H, W) in [0, 1], got {images.dtype} of shape "
                f"{tuple(images.shape)}; add a batch dimension, or divide 8-bit values by 255"
            )
        return self.apply_draw(images, self.draw(generator=generator))


class Strength:
    """One number of a transform, checked once: fixed, or a range that is drawn in training and pinned in evaluation.

    Args:
        name: what error messages call it.
        value: a number, or a pair `(low, high)`; a list is a pair too, because JSON has no tuples.
        pinned: the value in evaluation mode; None is the midpoint (rounded, for integers).
        minimum, maximum: the limits that are allowed, both included.
        above_minimum: whether `minimum` itself is not allowed.
        integer: whether only whole numbers make sense; a draw then includes both ends.

    Raises:
        ValueError: something is no number or lies outside the limits.
    """

    def __init__(
        self,
        name: str,
        value: float | Sequence[float],
        *,
        pinned: float | None = None,
        minimum: float,
        maximum: float = math.inf,
        above_minimum: bool = False,
        integer: bool = False,
    ):
        bounds = tuple(value) if isinstance(value, list | tuple) else (value, value)
        kind = "a whole number" if integer else "a number"
        limits = f"{'above' if above_minimum else 'from'} {minimum}" + (f" to {maximum}" if maximum < math.inf else "")
        for number in (*bounds, *(() if pinned is None else (pinned,))):
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not math.isfinite(number)
                or not minimum <= number <= maximum
                or (above_minimum and number == minimum)
                or (integer and number != int(number))
            ):
                raise ValueError(f"{name}: expected {kind} {limits}, got {number!r}; give one, or a pair (low, high)")
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise ValueError(f"{name}: expected one number or a pair (low, high), got {value!r}; put the lower first")
        self.low, self.high = bounds
        self.integer = integer
        middle = (self.low + self.high) / 2
        self.pinned = self._cast(middle if pinned is None else pinned)

    def _cast(self, number: float) -> float:
        return round(number) if self.integer else float(number)

    def draw(self, training: bool, generator: torch.Generator | None) -> float:
        """The value for one call."""
        if not training:
            return self.pinned
        if self.low == self.high:
            return self._cast(self.low)
        if self.integer:
            return int(self.low) + draw_index(int(self.high - self.low) + 1, generator)
        return self.low + (self.high - self.low) * _uniform(generator)

    def __repr__(self) -> str:
        if self.low == self.high == self.pinned:
            return str(self._cast(self.low))
        return f"({self._cast(self.low)}, {self._cast(self.high)}), pinned {self.pinned}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def straight_through(images: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` to the bit, with the gradient as if it were `images`; both have the same shape."""
    # The usual images + (result - images).detach() rounds, and can leave [0, 1] by one unit in the last place.
    return _StraightThrough.apply(images, result.detach())


def clip(images: torch.Tensor) -> torch.Tensor:
    """Clip to [0, 1]; pixels that were clipped keep their gradient, so that an overshoot does not freeze them."""
    return straight_through(images, images.clamp(0, 1))


def draw_index(count: int, generator: torch.Generator | None, weights: Sequence[float] | None = None) -> int:
    """A random index below `count`, uniform or in proportion to `weights`."""
    if weights is None:
        return min(int(_uniform(generator) * count), count - 1)
    threshold = _uniform(generator) * math.fsum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def _uniform(generator: torch.Generator | None) -> float:
    # float64: with float32, a product with `count` can round up to `count` itself.
    device = "cpu" if generator is None else generator.device
    return torch.rand((), generator=generator, dtype=torch.float64, device=device).item()


def check_whole_numbers(minimum: int, **values: Any) -> None:
    """ValueError for the first of these settings that is no whole number from `minimum` on."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}: expected a whole number from {minimum}, got {value!r}")


class Identity(Transform):
    """The photo as it is: the control of a mixture and of an evaluation."""

    publishing = True

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return images


class Compose(Transform):
    """Apply `transforms` one after the other; an empty sequence changes nothing."""

    def __init__(self, transforms: Sequence[Transform]):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through every step."""
        return all(transform.differentiable for transform in self.transforms)

    @property
    def publishing(self) -> bool:
        """Whether every step belongs to it."""
        return all(transform.publishing for transform in self.transforms)

    @property
    def networks(self) -> list[nn.Module]:
        """Those of every step."""
        return [network for transform in self.transforms for network in transform.networks]

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"draws": [transform.draw(generator=generator) for transform in self.transforms]}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        for transform, step in zip(self.transforms, draw["draws"], strict=True):
            images = transform.apply_draw(images, step)
        return images


class RandomChoice(Transform):
    """Apply one of `choices`: drawn for each call in training, the first one in evaluation.

    Args:
        choices: at least one transform.
        weights: their relative frequencies, not negative; None is uniform.

    Raises:
        ValueError: no choices, or weights that do not fit them.
    """

    def __init__(self, choices: Sequence[Transform], *, weights: Sequence[float] | None = None):
        super().__init__()
        if not choices:
            raise ValueError("expected at least one choice, got none; use Identity to change nothing")
        if weights is not None and (
            len(weights) != len(choices)
            or not all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights)
            or sum(weights) <= 0
        ):
            raise ValueError(
                f"weights: expected one number from 0 for each of the {len(choices)} choices, not all 0, "
                f"got {weights!r}; leave them out for equal chances"
            )
        self.choices = nn.ModuleList(choices)
        self.weights = weights

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through every choice."""
        return all(transform.differentiable for transform in self.choices)

    @property
    def publishing(self) -> bool:
        """Whether every choice belongs to it."""
        return all(transform.publishing for transform in self.choices)

    @property
    def networks(self) -> list[nn.Module]:
        """Those of every choice."""
        return [network for choice in self.choices for network in choice.networks]

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        index = draw_index(len(self.choices), generator, self.weights) if self.training else 0
        return {"index": index, "draw": self.choices[index].draw(generator=generator)}

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.choices[draw["index"]].apply_draw(images, draw["draw"])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
