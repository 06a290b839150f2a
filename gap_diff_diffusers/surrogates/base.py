"""What every surrogate shares: the image contract, frozen weights, and the one denoising loss.

The loss is what the DreamBooth examples of diffusers minimize
(https://github.com/huggingface/diffusers/tree/main/examples/dreambooth), per photo instead of averaged over the batch:
a protection raises it, an attacker lowers it, and both must mean the same number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


@dataclass(frozen=True)
class PromptEmbedding:
    """What a model's text encoders make of one prompt for all photos, or of one per photo.

    Attributes:
        prompt_embeds: (1 or N, tokens, channels).
        pooled_prompt_embeds: (1 or N, channels); None where the model takes none.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None = None

    def expand(self, count: int) -> PromptEmbedding:
        """The same for `count` photos; ValueError if it is for another number of them."""
        given = len(self.prompt_embeds)
        if given not in (1, count):
            raise ValueError(f"expected one prompt, or one for each of the {count} photos, got {given}")
        pooled = self.pooled_prompt_embeds
        return PromptEmbedding(
            self.prompt_embeds.expand(count, -1, -1), None if pooled is None else pooled.expand(count, -1)
        )


Prompt = str | Sequence[str] | PromptEmbedding
"""One prompt for all photos, or one per photo, as text or as `encode_prompt` returned it."""


class Surrogate(nn.Module, ABC):
    """A model that stands in for the one an attacker will personalize: frozen, with gradients to the pixels.

    Photos are float32 RGB (N,3,H,W) in [0,1], whatever the type of the weights; float64 photos are computed with as
    float64 wherever the weights allow. `to` moves and casts the weights as in any module.

    Attributes:
        name: what to call it in records and tables.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def freeze(self) -> None:
        """No weight needs a gradient, and no layer behaves as in training."""
        self.eval().requires_grad_(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them, in every model that can.

        Not in an `AutoencoderTiny`: with gradients and checkpoints its encoder (diffusers 0.42) leaves out the step
        from [-1,1] to [0,1], and without gradients it does not. It is small as it is.
        """
        for model in self.children():
            if hasattr(model, "enable_gradient_checkpointing") and not isinstance(model, AutoencoderTiny):
                model.enable_gradient_checkpointing()

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(N,3,H,W) in [0,1] -> latents (N,C,h,w): the mean of the posterior where there is one, unscaled."""

    @abstractmethod
    def encode_prompt(self, prompt: str | Sequence[str]) -> PromptEmbedding:
        """Text to what `denoising_loss` takes instead of it: encode once, use in every step."""

    @abstractmethod
    def denoising_loss(
        self,
        images: torch.Tensor,
        prompt: Prompt,
        *,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
    ) -> torch.Tensor:
        """How badly the model denoises these photos: (N,), one value per photo, the mean over its latent entries."""


class DiffusionSurrogate(Surrogate):
    """A text-to-image pipeline of diffusers: autoencoder, text encoders and denoiser.

    Args:
        pipeline: an instance of `pipeline_class`. Its models are used as they are, not copied, and frozen.
        name: what to call it in records and tables.

    Attributes:
        vae: the autoencoder.
        denoiser: the UNet or transformer.
        text_encoders: the text encoders that the pipeline has.
        num_train_timesteps: the end of the time scale.

    Raises:
        ValueError: `pipeline` is of another class, or its scheduler is of another kind of diffusion.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    unused_components: Mapping[str, Any] = {"feature_extractor": None, "image_encoder": None}

    def __init__(self, pipeline: DiffusionPipeline, *, name: str):
        super().__init__(name)
        if not isinstance(pipeline, self.pipeline_class):
            raise ValueError(
                f"{name}: expected a {self.pipeline_class.__name__}, got a {type(pipeline).__name__}; "
                "load_surrogate chooses the class that fits"
            )
        self.pipeline = pipeline
        self.vae = pipeline.vae
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.text_encoders = nn.ModuleList(
            model for key, model in pipeline.components.items() if key.startswith("text_encoder") and model is not None
        )
        self.noise_scheduler = self._training_scheduler(pipeline.scheduler)
        self.num_train_timesteps: int = self.noise_scheduler.config.num_train_timesteps
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> DiffusionSurrogate:
        """Load a Hub id or a folder; safetensors only. `options` are those of the class.

        In float16 the autoencoder stays float32: those of Stable Diffusion overflow.
        """
        pipeline = DiffusionPipeline.from_pretrained(
            str(model),
            revision=revision,
            variant=variant,
            token=token,
            dtype=dtype,
            use_safetensors=True,
            **cls.unused_components,
        )
        if dtype == torch.float16:
            pipeline.vae.float()
        surrogate = cls(pipeline, name=Path(model).name, **options)
        if gradient_checkpointing:
            surrogate.enable_gradient_checkpointing()
        return surrogate

    @property
    def size_multiple(self) -> int:
        """Height and width of the photos must be multiples of this."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, images: torch.Tensor) -> tuple[int, int, int, int]:
        """The shape of these photos' latents, and so of the noise that is added to them."""
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return len(images), config.latent_channels, images.shape[2] // factor, images.shape[3] // factor

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images, self.size_multiple)
        return encode_latents(self.vae, images)

    def encode_prompt(self, prompt: str | Sequence[str]) -> PromptEmbedding:
        """(1, tokens, channels) for a string, (N, ...) for N strings; ValueError for anything else."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"expected a prompt or a list of prompts, got {prompt!r}; '' is the empty prompt")
        return self._encode_prompts(prompts)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of `encode_images` to the scale that the denoiser works on; same shape."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            return (latents - mean) * config.scaling_factor / std
        return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor

    def denoising_loss(
        self,
        images: torch.Tensor,
        prompt: Prompt,
        *,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
    ) -> torch.Tensor:
        """How badly the model denoises these photos; gradients reach `images`, never the weights.

        Drawn in this order, as in the examples: the posterior, the noise, the timesteps.

        Args:
            images: (N,3,H,W) in [0,1]; height and width multiples of `size_multiple`.
            prompt: one for all photos or one per photo.
            timesteps: (N,), instead of drawing them; on the scale of the denoiser, see the class.
            noise: of the latents' shape, instead of standard normal noise.
            generator: source of the draws, on any device; None is torch's default one.
            sample_posterior: draw the latents from the autoencoder's posterior, as the examples do; False takes its
                mode, which leaves noise and timesteps as the only randomness.

        Returns:
            (N,): per photo the mean over its latent entries, in float32 (float64 for float64 photos). Its mean over
            the batch is the loss of the examples.

        Raises:
            ValueError: a shape or a timestep does not fit.
        """
        check_images(images, self.size_multiple)
        latents = encode_latents(self.vae, images, sample=sample_posterior, generator=generator)
        return self.latent_denoising_loss(latents, prompt, timesteps=timesteps, noise=noise, generator=generator)

    def latent_denoising_loss(
        self,
        latents: torch.Tensor,
        prompt: Prompt,
        *,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """`denoising_loss` of photos whose unscaled latents (N,C,h,w) are known."""
        count = len(latents)
        embedding = prompt if isinstance(prompt, PromptEmbedding) else self.encode_prompt(prompt)
        embedding = embedding.expand(count)
        latents = self.scale_latents(latents)
        if noise is None:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        elif noise.shape != latents.shape:
            raise ValueError(
                f"expected noise of the latents' shape {tuple(latents.shape)}, got {tuple(noise.shape)}; "
                "leave it out to have it drawn"
            )
        if timesteps is None:
            timesteps = self.draw_timesteps(count, generator)
        else:
            self._check_timesteps(timesteps, count)
        timesteps = timesteps.to(latents.device)
        return self._loss(latents, noise.to(latents), timesteps, embedding)

    def _check_timesteps(self, timesteps: torch.Tensor, count: int) -> None:
        if timesteps.shape != (count,):
            raise ValueError(
                f"expected one timestep for each of the {count} photos, shape ({count},), got shape "
                f"{tuple(timesteps.shape)}; leave them out to have them drawn"
            )

    def _denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        """The denoiser's prediction, in the type of `noisy` whatever the type of the weights."""
        return self._predict(noisy.to(self.denoiser.dtype), timesteps, embedding).to(noisy)

    @abstractmethod
    def _training_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The scheduler to add noise with; ValueError if that of the pipeline is of another kind."""

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> PromptEmbedding:
        """The pipeline's own `encode_prompt`, without guidance."""

    @abstractmethod
    def draw_timesteps(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """(count,) random timesteps."""

    @abstractmethod
    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding) -> torch.Tensor:
        """Call the denoiser; latents in, latents out."""

    @abstractmethod
    def _loss(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, embedding: PromptEmbedding
    ) -> torch.Tensor:
        """Scaled latents, noise of their shape, (N,) timesteps -> (N,)."""


def make_names_unique(surrogates: Sequence[Surrogate]) -> None:
    """Number the names of surrogates that share one, in place: figures are told apart by name."""
    names = [surrogate.name for surrogate in surrogates]
    for index, surrogate in enumerate(surrogates):
        if names.count(names[index]) > 1:
            surrogate.name = f"{names[index]} {names[: index + 1].count(names[index])}"


def check_images(images: torch.Tensor, multiple: int = 1) -> None:
    """ValueError unless `images` are floating-point (N,3,H,W) with height and width multiples of `multiple`."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected floating-point images of shape (N, 3, H, W) in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}; add a batch dimension, or divide 8-bit values by 255"
        )
    height, width = images.shape[-2:]
    if not height or not width or height % multiple or width % multiple:
        raise ValueError(
            f"expected height and width that are multiples of {multiple}, got {height}x{width}; pad or crop the images"
        )


def encode_latents(
    autoencoder: nn.Module, images: torch.Tensor, *, sample: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """(N,3,H,W) in [0,1] -> unscaled latents, in float32 or wider, of an autoencoder of diffusers.

    Args:
        sample: draw from the posterior, where there is one, instead of taking its mode.
    """
    encoded = autoencoder.encode((images * 2 - 1).to(autoencoder.dtype))
    if not hasattr(encoded, "latent_dist"):
        latents = encoded.latents
    elif sample:
        latents = encoded.latent_dist.sample(generator)
    else:
        latents = encoded.latent_dist.mode()
    return latents.to(torch.promote_types(images.dtype, torch.float32))


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(N,C,h,w) twice -> (N,): the mean square of each photo's difference."""
    return (prediction - target).square().flatten(1).mean(1)
