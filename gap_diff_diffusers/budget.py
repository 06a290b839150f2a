"""The budget: how far a protected photo may differ from the original, in any subpixel.

eps is a float on the [0,1] scale, written `8/255`; people give levels, 0..255. Upstream's "16/255" on [-1,1] is 8
levels.
"""

import math

import numpy as np


def budget_levels(eps: float) -> int:
    """The whole 8-bit levels within eps: floor(255 * eps).

    Raises:
        ValueError: eps outside [1/255, 1]: not even one level, or more than there are.
    """
    levels = math.floor(255 * eps + 1e-6) if math.isfinite(eps) else 0  # 255 * (n / 255) may come out just under n
    if not 1 <= levels <= 255:
        raise ValueError(
            f"expected a noise budget from 1/255 to 1 on the [0,1] scale, got {eps:g}; 8 levels are written 8/255"
        )
    return levels


def check_whole_levels(eps: float) -> None:
    """ValueError if eps is no whole number of levels from 1 to 255: what is over would be learned and rounded away."""
    levels = budget_levels(eps)
    if abs(255 * eps - levels) > 1e-6:
        raise ValueError(
            f"expected a budget of whole levels, got {eps:g}, which is {255 * eps:.6g}; write {round(255 * eps)}/255"
        )


def add_perturbation(
    pixels: np.ndarray, perturbation: np.ndarray, *, amplitude: float, levels: int, gray: bool = False
) -> np.ndarray:
    """Add a perturbation to 8-bit pixels, round, and project onto the budget: the one place where both happen.

    Args:
        pixels: (H,W,3) uint8.
        perturbation: (H,W,3) uint8, where 128 stands for 0 and 128 +- 127 for +-1.
        amplitude: levels that a perturbation of 1 moves a subpixel by.
        levels: the budget; no subpixel moves further, whatever `amplitude` is.
        gray: move the three channels of a pixel by the same amount, so that a gray photo stays gray.

    Returns:
        (H,W,3) uint8.
    """
    import torch  # here: what else is in this file answers without waiting for it

    protected = np.empty_like(pixels)
    rows = max(1, 2**20 // pixels.shape[1])  # a megapixel at a time keeps the float copies small
    for start in range(0, len(pixels), rows):
        strip = slice(start, start + rows)
        shift = torch.from_numpy(perturbation[strip]).float().sub_(128).div_(127).clamp_(-1, 1)
        if gray:
            shift = shift.mean(dim=2, keepdim=True)
        steps = shift.mul_(amplitude).round_().clamp_(-levels, levels)
        moved = torch.from_numpy(pixels[strip]) + steps
        protected[strip] = moved.clamp_(0, 255).to(torch.uint8).numpy()
    return protected


def largest_change(pixels: np.ndarray, reference: np.ndarray) -> int:
    """The largest difference of two (H,W,3) uint8 images in any subpixel, in levels."""
    rows = max(1, 2**20 // pixels.shape[1])
    strips = [slice(start, start + rows) for start in range(0, len(pixels), rows)]
    return max(int((np.maximum(pixels[s], reference[s]) - np.minimum(pixels[s], reference[s])).max()) for s in strips)
