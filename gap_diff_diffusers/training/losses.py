"""What the generator is trained for: move the latents, within the budget, and differently for every photo."""

import math

import torch
import torch.nn.functional as F


def log_displacement_loss(displacements: torch.Tensor) -> torch.Tensor:
    """Minus the mean logarithm of encoder displacements (N,): photos that hardly move count as much as others."""
    return -(displacements + 1e-3).log().mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the discriminator learns: logits (N,) high for clean photos, low for protected ones."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def gan_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """L_GAN, the released code's: protected photos are to pass as clean; the slides' log(1 - D) saturates early."""
    return F.softplus(-fake_logits).mean()


def excess_power_loss(perturbation: torch.Tensor, rms: float) -> torch.Tensor:
    """How far each photo's mean squared perturbation exceeds rms^2, relative to it; 0 below.

    Args:
        perturbation: (N,3,H,W) in levels.
        rms: in levels; 6.4 is 32 dB of PSNR.
    """
    return (perturbation.square().mean(dim=(1, 2, 3)) / rms**2 - 1).relu().mean()


def coherence_loss(perturbation: torch.Tensor, *, window: int, offset: tuple[int, int], samples: int) -> torch.Tensor:
    """How alike the perturbation is across photos and across places: the mean squared cosine between windows of it.

    1 for one tile that fills every photo, whatever its sign; near 0 where no window tells about another. Without this
    loss a generator falls into such a tile, and whoever has a few protected photos estimates and subtracts it. Half
    of it compares photos at the same place (a tile that varies across the photo repeats there), half any two windows.

    Args:
        perturbation: (N,3,H,W), N at least 2.
        window: side of the windows in pixels.
        offset: rows and columns to leave out at the top and left, so that windows do not always start on one grid.
        samples: at most this many windows are compared with each other.
    """
    top, left = offset
    windows = F.unfold(perturbation[:, :, top:, left:], window, stride=window).transpose(1, 2)
    windows = windows / (windows.norm(dim=2, keepdim=True) + 1e-3)
    count = len(windows)
    same_place = torch.einsum("nld,mld->lnm", windows, windows).square()
    off_diagonal = same_place.sum() - same_place.diagonal(dim1=1, dim2=2).sum()
    same_place = off_diagonal / (windows.shape[1] * count * (count - 1))
    windows = windows.flatten(0, 1)
    windows = windows[:: math.ceil(len(windows) / samples)]
    anywhere = (windows @ windows.T).square()
    anywhere = (anywhere.sum() - anywhere.diagonal().sum()) / (len(windows) * (len(windows) - 1))
    return (same_place + anywhere) / 2
