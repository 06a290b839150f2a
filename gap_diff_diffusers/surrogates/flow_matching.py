"""Stable Diffusion 3.x and FLUX.1: a transformer that predicts the velocity from photo to noise (flow matching).

The loss is that of `train_dreambooth_sd3.py` and `train_dreambooth_flux.py` of diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SchedulerMixin, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from .base import DiffusionSurrogate, PromptEmbedding, squared_error

WEIGHTING_SCHEMES = ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none")
# The examples' --mode_scale, of the paper of SD3 (https://arxiv.org/abs/2403.03206).
_MODE_SCALE = 1.29


class FlowMatchingSurrogate(DiffusionSurrogate):
    """What SD3 and FLUX share. A photo at time t is (1 - sigma) * latents + sigma * noise, sigma = t / 1000.

    Timesteps are floats above 0 up to `num_train_timesteps` (1000). Drawn ones are of the scheduler's schedule, so
    that a model's shift applies; given ones are taken as they are.

    Args:
        pipeline, name: of `DiffusionSurrogate`.
        weighting_scheme: how timesteps are drawn and losses weighted, as in the examples: "logit_normal" (mean 0,
            standard deviation 1) and "mode" draw the middle more often; "none" draws uniformly; "sigma_sqrt" and
            "cosmap" draw uniformly and weight the loss.
        max_sequence_length: tokens of the T5 encoder. 77 as in the examples; the pipelines generate with more.
    """

    denoiser_name = "transformer"
    patch_size = 2

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str,
        weighting_scheme: str = "logit_normal",
        max_sequence_length: int = 77,
    ):
        super().__init__(pipeline, name=name)
        if weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(
                f"expected a weighting_scheme of {', '.join(WEIGHTING_SCHEMES)}, got {weighting_scheme!r}"
            )
        self.weighting_scheme = weighting_scheme
        self.max_sequence_length = max_sequence_length

    @property
    def size_multiple(self) -> int:
        """Height and width of the photos must be multiples of this."""
        return super().size_multiple * self.patch_size

    def _training_scheduler(self, scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"{self.name}: expected a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}; "
                "set the pipeline's scheduler to the one it was published with"
            )
        # Sampling replaces a scheduler's timesteps; a new one has those of training.
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def draw_timesteps(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        density = compute_density_for_timestep_sampling(
            self.weighting_scheme,
            count,
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=_MODE_SCALE,
            device="cpu" if generator is None else generator.device,
            generator=generator,
        )
        # A density of 1, to which float32 can round, is one past the last index.
        indices = (density * self.num_train_timesteps).long().clamp(0, self.num_train_timesteps - 1)
        return self.noise_scheduler.timesteps[indices.cpu()]

    def _check_timesteps(self, timesteps: torch.Tensor, count: int) -> None:
        super()._check_timesteps(timesteps, count)
        if timesteps.min() <= 0 or timesteps.max() > self.num_train_timesteps:
            raise ValueError(
                f"expected timesteps above 0 up to {self.num_train_timesteps}, got {timesteps.tolist()}; "
                "at 0 there is no noise to predict"
            )

    def _loss(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding
    ) -> torch.Tensor:
        sigmas = (timesteps / self.num_train_timesteps).to(latents.dtype)
        sigma = sigmas.view(-1, 1, 1, 1)
        velocity = self._denoise((1 - sigma) * latents + sigma * noise, timesteps, embedding)
        return self._weigh(sigmas) * squared_error(velocity, noise - latents)

    def _weigh(self, sigmas: torch.Tensor) -> torch.Tensor:
        """(N,) sigmas -> (N,) weights of the losses."""
        return compute_loss_weighting_for_sd3(self.weighting_scheme, sigmas)


class StableDiffusion3Surrogate(FlowMatchingSurrogate):
    """Stable Diffusion 3 and 3.5. Its T5 encoder may be missing; then zeros stand for it, as in the pipeline.

    Args:
        precondition_outputs: compare photos instead of velocities, as the example does unless told otherwise: the
            error of a photo reconstructed in one step is sigma times that of the velocity.
        **options: of `FlowMatchingSurrogate`.
    """

    pipeline_class = StableDiffusion3Pipeline

    def __init__(self, pipeline: StableDiffusion3Pipeline, *, precondition_outputs: bool = True, **options: Any):
        super().__init__(pipeline, **options)
        self.precondition_outputs = precondition_outputs
        self.patch_size = self.denoiser.config.patch_size

    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.denoiser.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbedding(embeds, pooled)

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        return self.denoiser(
            noisy,
            timestep=timesteps,
            encoder_hidden_states=embedding.prompt_embeds,
            pooled_projections=embedding.pooled_prompt_embeds,
            return_dict=False,
        )[0]

    def _weigh(self, sigmas: torch.Tensor) -> torch.Tensor:
        weights = super()._weigh(sigmas)
        return weights * sigmas**2 if self.precondition_outputs else weights


class FluxSurrogate(FlowMatchingSurrogate):
    """FLUX.1.

    Args:
        weighting_scheme: of `FlowMatchingSurrogate`; FLUX's example draws uniformly unless told otherwise.
        guidance_scale: what the distilled models (FLUX.1-dev) are told; 3.5 as in the example. Others ignore it.
        **options: of `FlowMatchingSurrogate`.
    """

    pipeline_class = FluxPipeline

    def __init__(
        self, pipeline: FluxPipeline, *, weighting_scheme: str = "none", guidance_scale: float = 3.5, **options: Any
    ):
        super().__init__(pipeline, weighting_scheme=weighting_scheme, **options)
        self.guidance_scale = guidance_scale

    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.denoiser.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbedding(embeds, pooled)

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        count, channels, height, width = noisy.shape
        factor = self.pipeline.vae_scale_factor
        text_length = embedding.prompt_embeds.shape[1]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.guidance_scale, device=noisy.device)
        prediction = self.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000,  # the transformer multiplies by that
            guidance=guidance,
            pooled_projections=embedding.pooled_prompt_embeds,
            encoder_hidden_states=embedding.prompt_embeds,
            txt_ids=torch.zeros(text_length, 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(prediction, height * factor, width * factor, factor)
