"""Several surrogates at once: a perturbation that moves all of them is likelier to move a model nobody tried."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .base import PromptEmbedding, Surrogate


class EnsembleSurrogate(Surrogate):
    """A weighted mean of the members' losses. What has one tensor per surrogate elsewhere has one per member here.

    Args:
        surrogates: at least one.
        weights: how much each counts, not negative, not all 0; they are divided by their sum. None is alike.
        name: what to call it; None joins the members' names.

    Raises:
        ValueError: no surrogates, or weights that do not fit them.
    """

    def __init__(
        self,
        surrogates: Sequence[Surrogate],
        *,
        weights: Sequence[float] | None = None,
        name: str | None = None,
    ):
        if not surrogates:
            raise ValueError("expected at least one surrogate, got none; load_surrogate makes one")
        weights = [1.0] * len(surrogates) if weights is None else list(weights)
        if (
            len(weights) != len(surrogates)
            or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
            or sum(weights) <= 0
        ):
            raise ValueError(
                f"weights: expected one number from 0 for each of the {len(surrogates)} surrogates, not all 0, "
                f"got {weights}; leave them out to have all count alike"
            )
        super().__init__(name or "+".join(surrogate.name for surrogate in surrogates))
        self.surrogates = nn.ModuleList(surrogates)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def enable_gradient_checkpointing(self) -> None:
        for surrogate in self.surrogates:
            surrogate.enable_gradient_checkpointing()

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N,3,H,W) in [0,1] -> each member's latents: their shapes differ."""
        return tuple(surrogate.encode_images(images) for surrogate in self.surrogates)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[PromptEmbedding, ...]:
        """Each member's embedding; `denoising_loss` takes them all as its prompt."""
        return tuple(surrogate.encode_prompt(prompt) for surrogate in self.surrogates)

    def denoising_loss(
        self,
        images: torch.Tensor,
        prompt: str | Sequence[str] | Sequence[PromptEmbedding],
        *,
        timesteps: Sequence[torch.Tensor | None] | None = None,
        noise: Sequence[torch.Tensor | None] | None = None,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
    ) -> torch.Tensor:
        """The weighted mean of the members' losses, (N,); they draw from `generator` one after the other.

        Args:
            images, generator, sample_posterior: as for each member.
            prompt: text, or what `encode_prompt` returned.
            timesteps, noise: one tensor, or None to draw it, per member: their time scales and latents differ.

        Raises:
            ValueError: not one entry per member, or what a member raises.
        """
        count = len(self.surrogates)
        prompts = [prompt] if isinstance(prompt, PromptEmbedding) else prompt
        if all(isinstance(entry, str) for entry in prompts):
            prompts = self.encode_prompt(prompt)
        timesteps = [None] * count if timesteps is None else timesteps
        noise = [None] * count if noise is None else noise
        for what, entries in (("embedding", prompts), ("timesteps", timesteps), ("noise", noise)):
            if isinstance(entries, torch.Tensor) or len(entries) != count:
                raise ValueError(
                    f"{what}: expected a list with one entry for each of the {count} members, got "
                    f"{'one tensor' if isinstance(entries, torch.Tensor) else len(entries)}"
                )
        losses = [
            weight
            * surrogate.denoising_loss(
                images,
                prompts[index],
                timesteps=timesteps[index],
                noise=noise[index],
                generator=generator,
                sample_posterior=sample_posterior,
            )
            for index, (weight, surrogate) in enumerate(zip(self.weights, self.surrogates))
        ]
        return torch.stack(losses).sum(0)
