"""Anti-DreamBooth (ICCV 2023, arXiv 2303.15433): ASPL, alternating surrogate and perturbation learning.

Each round a copy of the model learns the person's clean photos for a few steps, the perturbation ascends that copy's
denoising loss, and the model itself learns the photos as they are protected by then.

Differences from upstream: the weights that learn are float32, where upstream's bfloat16 rounds nearly all of its steps
away; gradients are clipped, which upstream means to; photos are drawn in random order, where upstream never takes the
fourth.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from ..budget import budget_levels
from ..finetuning import DreamBooth, DreamBoothConfig, center_square
from ..surrogates.base import DiffusionSurrogate


@dataclass(frozen=True, kw_only=True)
class ASPLConfig:
    """Settings; the defaults are upstream's, but for the budget.

    Attributes:
        eps: the budget on [0,1]; upstream's is 0.025, that is 0.05 on [-1,1].
        step_size: of the perturbation, on [0,1].
        rounds: how often all three parts come.
        pgd_steps: of the perturbation, in each round.
        surrogate_steps: of the copy on clean photos, and of the model on protected ones, in each round.
        seed: of everything random.
    """

    eps: float = 8 / 255
    step_size: float = 0.0025
    rounds: int = 50
    pgd_steps: int = 6
    surrogate_steps: int = 3
    seed: int = 0


def aspl(
    surrogate: DiffusionSurrogate,
    images: torch.Tensor,
    clean_images: torch.Tensor,
    config: ASPLConfig,
    *,
    attack: DreamBoothConfig,
    class_images: torch.Tensor,
    progress: bool = True,
) -> torch.Tensor:
    """Protect all photos of one person.

    Args:
        surrogate: the model that an attacker is expected to personalize; it stays as it is.
        images: (N,3,H,W) in [0,1], to protect.
        clean_images: (M,3,H,W) in [0,1], others of the same person, which need not be protected.
        config: the settings.
        attack: how the model learns.
        class_images: (K,3,H,W) in [0,1], pictures of the class.

    Returns:
        (N,3,H,W) in [0,1], on 8 bits, within the budget.
    """
    model = copy.deepcopy(surrogate)
    generator = torch.Generator().manual_seed(config.seed)
    delta = torch.zeros_like(images)
    for index in tqdm(range(config.rounds), desc="ASPL", disable=not progress):
        learning = replace(attack, max_train_steps=config.surrogate_steps, seed=config.seed + index)
        ahead = copy.deepcopy(model)
        DreamBooth(ahead, clean_images, learning, class_images=class_images).train(progress=False)
        with torch.no_grad():
            embedding = ahead.encode_prompt(attack.instance_prompt)
        for _ in range(config.pgd_steps):
            delta.requires_grad_(True)
            squares = center_square((images + delta).clamp(0, 1), attack.resolution)
            loss = ahead.denoising_loss(squares.to(ahead.denoiser.device), embedding, generator=generator)
            (gradient,) = torch.autograd.grad(loss.mean(), delta)
            delta = (delta.detach() + config.step_size * gradient.sign()).clamp(-config.eps, config.eps)
        protected = (images + delta).clamp(0, 1)
        DreamBooth(model, protected, learning, class_images=class_images).train(progress=False)
    levels = budget_levels(config.eps)
    original, wanted = (images * 255).round(), ((images + delta).clamp(0, 1) * 255).round()
    return (original + (wanted - original).clamp(-levels, levels)) / 255
