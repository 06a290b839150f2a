"""Stable Diffusion 1.x, 2.x and SDXL: a UNet that predicts the noise (epsilon) or the velocity (v).

The loss is that of `train_dreambooth.py` and `train_dreambooth_lora_sdxl.py` of diffusers without its options (offset
noise, SNR weights, EDM).
"""

from __future__ import annotations

import torch
from diffusers import (
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from .base import DiffusionSurrogate, PromptEmbedding, squared_error


class StableDiffusionSurrogate(DiffusionSurrogate):
    """Stable Diffusion 1.x or 2.x.

    Timesteps are integers from 0 to `num_train_timesteps - 1`, drawn uniformly.
    """

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    unused_components = DiffusionSurrogate.unused_components | {
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    def _training_scheduler(self, scheduler: SchedulerMixin) -> DDPMScheduler:
        # A sampler's own timesteps are few; what it shares with training are its betas and its prediction type.
        config = scheduler.config
        if "beta_schedule" not in config or config.get("prediction_type") not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{self.name}: expected a scheduler with betas that predicts epsilon or v_prediction, got "
                f"{type(scheduler).__name__} with {config.get('prediction_type')!r}; models trained as EDM or by flow "
                "matching have another loss"
            )
        return DDPMScheduler.from_config(config)

    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.denoiser.device, 1, False)
        return PromptEmbedding(embeds)

    def draw_timesteps(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        device = self.denoiser.device if generator is None else generator.device
        return torch.randint(0, self.num_train_timesteps, (count,), generator=generator, device=device)

    def _check_timesteps(self, timesteps: torch.Tensor, count: int) -> None:
        super()._check_timesteps(timesteps, count)
        end = self.num_train_timesteps
        if timesteps.is_floating_point() or timesteps.min() < 0 or timesteps.max() >= end:
            raise ValueError(f"expected integer timesteps from 0 to {end - 1}, got {timesteps.tolist()}")

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        return self.denoiser(noisy, timesteps, embedding.prompt_embeds, return_dict=False)[0]

    def _loss(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding
    ) -> torch.Tensor:
        scheduler = self.noise_scheduler
        noisy = self._denoiser_input(scheduler.add_noise(latents, noise, timesteps), latents)
        prediction = self._denoise(noisy, timesteps, embedding)
        velocity = scheduler.config.prediction_type == "v_prediction"
        return squared_error(prediction, scheduler.get_velocity(latents, noise, timesteps) if velocity else noise)

    def _denoiser_input(self, noisy: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the UNet sees, of the noisy latents and the clean ones, both scaled."""
        return noisy


class InstructPix2PixSurrogate(StableDiffusionSurrogate):
    """InstructPix2Pix, whose UNet also sees the latents of the photo to be changed.

    Its loss is that of `train_instruct_pix2pix.py` of diffusers for an instruction that changes nothing: the photo
    itself is the condition, by its unscaled latents. With `sample_posterior` these are drawn, where the script takes
    the posterior's mode.
    """

    pipeline_class = StableDiffusionInstructPix2PixPipeline

    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        return PromptEmbedding(self.pipeline._encode_prompt(prompts, self.denoiser.device, 1, False))

    def _denoiser_input(self, noisy: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([noisy, latents / self.vae.config.scaling_factor], dim=1)


class InpaintingSurrogate(StableDiffusionSurrogate):
    """Stable Diffusion trained to inpaint, whose UNet also sees a mask and what that leaves of the photo.

    For drawing alone: it has no `denoising_loss` (ValueError), as that depends on masks.
    """

    pipeline_class = StableDiffusionInpaintPipeline

    def _denoiser_input(self, noisy: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        raise ValueError(
            f"{self.name}: expected a model that draws by a prompt alone, got one that inpaints, which has no loss "
            "here; use the model that it was trained from"
        )


class StableDiffusionXLSurrogate(StableDiffusionSurrogate):
    """SDXL: two text encoders, and the sizes of the photo among the UNet's conditions.

    The photo counts as uncropped, and its original and its target size as the size that it has. Timesteps as for
    `StableDiffusionSurrogate`.
    """

    pipeline_class = StableDiffusionXLPipeline
    unused_components = DiffusionSurrogate.unused_components

    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.denoiser.device, do_classifier_free_guidance=False
        )
        return PromptEmbedding(embeds, pooled)

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        height, width = (length * self.size_multiple for length in noisy.shape[-2:])
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device, dtype=noisy.dtype)
        conditions = {"text_embeds": embedding.pooled_prompt_embeds, "time_ids": time_ids.expand(len(noisy), -1)}
        return self.denoiser(
            noisy, timesteps, embedding.prompt_embeds, added_cond_kwargs=conditions, return_dict=False
        )[0]
