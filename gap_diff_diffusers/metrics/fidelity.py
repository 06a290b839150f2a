"""What protection costs in looks, beyond the PSNR and SSIM of `images`."""

from __future__ import annotations

import numpy as np
import torch


class Lpips:
    """LPIPS (CVPR 2018, arXiv 1801.03924), version 0.1 with AlexNet: from 0, for what looks alike, upwards.

    By the package `lpips`, which needs torchvision and downloads the weights of AlexNet when it is first made. So it
    is in no extra of ours that others depend on.

    Args:
        options: for `lpips.LPIPS`.

    Raises:
        ImportError: lpips or torchvision is not installed, or does not fit the installed torch.
        OSError: the weights cannot be downloaded.
    """

    def __init__(self, **options):
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # the latter of a torchvision made for another torch
            raise ImportError(
                f"expected lpips with torchvision, got none ({error}); pip install "
                "'gap_diff_diffusers[lpips]', or measure without"
            ) from error
        try:
            self._network = lpips.LPIPS(**{"net": "alex", "verbose": False, **options}).eval()
        except RuntimeError as error:  # of a download that was cut off
            raise OSError(f"the weights of AlexNet could not be loaded ({error}); fetch them anew") from error

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, reference: np.ndarray) -> float:
        """How unlike two images (H,W,3) uint8 of one size look, of at least 64 px a side."""
        if pixels.shape != reference.shape or min(pixels.shape[:2]) < 64:
            raise ValueError(f"expected two images of one size from 64 px, got {pixels.shape} and {reference.shape}")
        both = (torch.from_numpy(np.stack([pixels, reference])).permute(0, 3, 1, 2).float() / 127.5) - 1
        return self._network(both[:1], both[1:]).item()
