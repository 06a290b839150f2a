"""DreamBooth: what an attacker does with a few photos of a person, and what alternating protections do in between.

Paper: DreamBooth (CVPR 2023, arXiv 2208.12242). The loss is that of `train_dreambooth.py` of diffusers: the mean over
the photos plus `prior_loss_weight` times the mean over pictures of the class that the model itself drew before.

Differences from that script: latents are encoded once; all weights are float32 in every precision, for steps as small
as these vanish in bfloat16, and mixed precision is autocast's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from .config import autocast, check_at_least_one, check_choices, check_types
from .models.gap_diff_generator import resize
from .surrogates.base import DiffusionSurrogate, PromptEmbedding

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig:
    """Settings of one personalization; the defaults are those of GAP-Diff's attacker (paper, section V), in float32.

    Attributes:
        instance_prompt: what the model is told of every photo; has the rare token.
        rare_token: the word that shall come to mean the person.
        class_prompt: what the model is told of pictures of the class.
        resolution: side in pixels of the squares that the photos are resized to, or become by cutting their centers.
        max_train_steps: optimizer steps.
        train_batch_size: photos per step; with a number that the photos do not divide, some come more often.
        prior_batch_size: pictures of the class per step.
        prior_loss_weight: of their loss; 0 leaves them out.
        num_class_images: pictures of the class to draw, if none are given.
        train_text_encoder: "no"; "token" for the rare token's embedding alone; "yes" for all its weights.
        learning_rate: of the denoiser, of Adam with decoupled weight decay.
        lr_scheduler: what becomes of it and of the others by the last step: "constant", or "linear" or "cosine" to 0.
        text_learning_rate: of what is trained in the text encoder; None for `learning_rate`.
        adam_weight_decay: of all weights but a token's embedding.
        max_grad_norm: gradients are scaled down to this norm, which is above 0; a large one leaves them.
        mixed_precision: of the forward pass, "no", "bf16" (which GAP-Diff's attacker has; best on a GPU) or "fp16".
        num_inference_steps, guidance_scale: of drawing the class pictures.
        seed: of everything random.
    """

    instance_prompt: str = "a photo of sks person"
    rare_token: str = "sks"
    class_prompt: str = "a photo of person"
    resolution: int = 512
    max_train_steps: int = 1000
    train_batch_size: int = 2
    prior_batch_size: int = 2
    prior_loss_weight: float = 1.0
    num_class_images: int = 200
    train_text_encoder: str = "yes"
    learning_rate: float = 5e-7
    lr_scheduler: str = "constant"
    text_learning_rate: float | None = None
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0

    @property
    def subject(self) -> str:
        """What the model is taught to call the person, such as "sks person"."""
        before, _, after = self.instance_prompt.rpartition(self.rare_token)
        return self.rare_token + after if before else self.instance_prompt

    @property
    def text_rate(self) -> float:
        """The learning rate of what is trained in the text encoder."""
        return self.learning_rate if self.text_learning_rate is None else self.text_learning_rate

    def __post_init__(self):
        check_types(self)
        check_choices(
            self,
            train_text_encoder=("no", "token", "yes"),
            lr_scheduler=SCHEDULES,
            mixed_precision=("no", "bf16", "fp16"),
        )
        counts = ("resolution", "max_train_steps", "train_batch_size", "prior_batch_size", "num_class_images")
        check_at_least_one(self, *counts)
        if self.max_grad_norm <= 0:  # with which nothing would learn
            raise ValueError(
                f"expected max_grad_norm above 0, got {self.max_grad_norm}; a large one leaves gradients as they are"
            )
        if self.rare_token not in self.instance_prompt.split():
            raise ValueError(
                f"expected an instance_prompt with the word {self.rare_token!r}, got {self.instance_prompt!r}"
            )


CLASS_SEED = 10_000
FACE_MODEL_SETTINGS: dict[str, Any] = {
    "resolution": 256,
    "max_train_steps": 560,
    "train_batch_size": 2,
    "prior_batch_size": 1,
    "num_class_images": 24,
    "adam_weight_decay": 1e-4,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
}
"""Of any personalization of a small face model such as the one that ships, on two CPU cores in minutes."""
FACE_MODEL_ATTACK = DreamBoothConfig(
    **FACE_MODEL_SETTINGS, train_text_encoder="token", learning_rate=5e-4, text_learning_rate=4e-3
)
"""DreamBooth of such a model."""


class DreamBooth:
    """One personalization of a surrogate, in place: its denoiser, and as configured its text encoders.

    Personalizations that learn less, or other weights, override `parameter_groups`.

    Args:
        surrogate: its weights change, and stay changed. All are made float32.
        images: (N,3,H,W) in [0,1], the photos of one person.
        config: the settings.
        class_images: (M,3,H,W) in [0,1], pictures of the class; None to let the model draw them, if it needs any.

    Raises:
        ValueError: no photos, or a rare token that the tokenizer cannot tell from others.
    """

    def __init__(
        self,
        surrogate: DiffusionSurrogate,
        images: torch.Tensor,
        config: DreamBoothConfig,
        *,
        class_images: torch.Tensor | None = None,
    ):
        if images.ndim != 4 or not len(images):
            raise ValueError(f"expected photos of shape (N, 3, H, W), got {tuple(images.shape)}")
        if config.resolution % surrogate.size_multiple:
            raise ValueError(
                f"expected a resolution that is a multiple of {surrogate.size_multiple}, got {config.resolution}"
            )
        self.surrogate, self.config = surrogate.float(), config
        self.device = surrogate.denoiser.device
        if config.prior_loss_weight and class_images is None:
            class_images = draw_class_images(surrogate, config)
        self.posteriors = self._encode(images)
        self.class_posteriors = self._encode(class_images) if config.prior_loss_weight else None
        self.prompts = [config.instance_prompt] + [config.class_prompt] * bool(config.prior_loss_weight)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.token_rows: list[tuple[nn.Parameter, list[int]]] = []
        groups = self.parameter_groups()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        text = {id(parameter) for encoder in surrogate.text_encoders for parameter in encoder.parameters()}
        self.learns_text = any(id(parameter) in text for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.adam_weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            config.lr_scheduler, self.optimizer, num_warmup_steps=0, num_training_steps=config.max_train_steps
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        with torch.no_grad():
            self.embedding = surrogate.encode_prompt(self.prompts)

    def step(self) -> float:
        """One optimizer step; returns its loss.

        Raises:
            FloatingPointError: the loss or its gradient is not a number; the weights are as before.
        """
        config = self.config
        latents, noise, timesteps = self.draw_batch()
        counts = [config.train_batch_size, len(latents) - config.train_batch_size][: len(self.prompts)]
        with self._learning():
            with autocast(self.device, config.mixed_precision):
                embedding = self.embedding
                if self.learns_text:
                    embedding = self.surrogate.encode_prompt(self.draw_prompts())
                losses = self.surrogate.latent_denoising_loss(
                    latents.to(self.device),
                    _repeat(embedding, counts),
                    timesteps=timesteps.to(self.device),
                    noise=noise.to(self.device),
                )
            instance, *prior = losses.float().split(counts)
            loss = instance.mean() + sum(config.prior_loss_weight * part.mean() for part in prior)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for weight, rows in self.token_rows:
            rest = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            rest[rows] = False
            weight.grad[rest] = 0
        norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        # In float16 gradients overflow now and then; the scaler then skips the step and halves its scale.
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not math.isfinite(value := loss.item()) or not (norm.isfinite() or may_overflow):
            raise FloatingPointError(
                f"the loss is {value} and its gradient {norm.item()} at step {self.schedule.last_epoch}; lower the "
                f"learning rate of {config.learning_rate}, or use mixed_precision no"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return value

    def draw_batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step's unscaled latents (N,C,h,w), of photos and then of the class, their noise and timesteps."""
        latents = [_draw(self.posteriors, self.config.train_batch_size, self.generator)]
        if self.class_posteriors is not None:
            latents.append(_draw(self.class_posteriors, self.config.prior_batch_size, self.generator))
        latents = torch.cat(latents)
        noise = torch.randn(latents.shape, generator=self.generator)
        return latents, noise, self.surrogate.draw_timesteps(len(latents), self.generator)

    def train(self, progress: bool = True) -> list[float]:
        """All steps; returns the losses."""
        steps = tqdm(range(self.config.max_train_steps), desc="DreamBooth", disable=not progress)
        return [self.step() for _ in steps]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as optimizers take it. Of the embeddings in `token_rows` only those rows learn."""
        config = self.config
        groups: list[dict[str, Any]] = [{"params": list(self.surrogate.denoiser.parameters())}]
        if config.train_text_encoder == "yes":
            encoders = self.surrogate.text_encoders
            weights = [parameter for encoder in encoders for parameter in encoder.parameters()]
            groups.append({"params": weights, "lr": config.text_rate})
        elif config.train_text_encoder == "token":
            groups.append(self.token_group(config.rare_token))
        return groups

    def draw_prompts(self) -> list[str]:
        """What the model is told in one step: of the photos, then of pictures of the class if there are any."""
        return self.prompts

    def finish(self) -> None:
        """What is left to do after the last step; nothing here."""

    def token_group(self, token: str) -> dict[str, Any]:
        """A word's embedding in every text encoder, as a group of parameters; without decay, as others' rows stay.

        Raises:
            ValueError: the word is several tokens.
        """
        components = self.surrogate.pipeline.components
        for suffix in ("", "_2", "_3"):
            tokenizer, encoder = components.get("tokenizer" + suffix), components.get("text_encoder" + suffix)
            if encoder is not None:
                rows = tokenizer(token, add_special_tokens=False).input_ids
                if len(rows) != 1 and "CLIP" in type(tokenizer).__name__:
                    raise ValueError(
                        f"expected a rare_token that is one token, got {token!r}, which is {len(rows)}; choose "
                        "another word, or train_text_encoder yes"
                    )
                self.token_rows.append((encoder.get_input_embeddings().weight, rows))
        weights = [weight for weight, _ in self.token_rows]
        return {"params": weights, "lr": self.config.text_rate, "weight_decay": 0.0}

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        """Weights take gradients inside; outside they are as frozen as those of any surrogate."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and standard deviations (N,C,h,w) of the photos' posteriors."""
        means, deviations = [], []
        for image in images:
            square = center_square(image[None], self.config.resolution).to(self.device)
            encoded = self.surrogate.vae.encode(square * 2 - 1)
            if hasattr(encoded, "latent_dist"):
                mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std
            else:
                mean, deviation = encoded.latents, torch.zeros_like(encoded.latents)
            means.append(mean.cpu())
            deviations.append(deviation.cpu())
        return torch.cat(means), torch.cat(deviations)


def check_draws(surrogate: DiffusionSurrogate) -> None:
    """ValueError if the model cannot draw without a photo, so that nothing that it learns would be seen."""
    editors = {
        StableDiffusionInpaintPipeline: "inpainting",
        StableDiffusionInstructPix2PixPipeline: "instruct-pix2pix",
    }
    for kind, method in editors.items():
        if isinstance(surrogate.pipeline, kind):
            raise ValueError(
                f"{surrogate.name}: expected a model that draws by a prompt alone, got one that edits photos; use the "
                f"method {method}"
            )


def draw_class_images(surrogate: DiffusionSurrogate, config: DreamBoothConfig) -> torch.Tensor:
    """Pictures of the class by the model as it is: (num_class_images,3,resolution,resolution) in [0,1].

    Their seeds begin at `CLASS_SEED`, so that they share no noise with what is drawn afterwards. ValueError as of
    `check_draws`.
    """
    check_draws(surrogate)
    return generate_images(
        surrogate.pipeline,
        config.class_prompt,
        config.num_class_images,
        resolution=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=CLASS_SEED,
    )


@torch.no_grad()
def add_token(pipeline: DiffusionPipeline, token: str, initializer_token: str) -> None:
    """Give the pipeline's CLIP tokenizers and text encoders a new word that begins with another word's embedding.

    Raises:
        ValueError: the word is known already, or the other one is not one token.
    """
    for suffix in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if encoder is None or "CLIP" not in type(tokenizer).__name__:
            continue
        first = tokenizer(initializer_token, add_special_tokens=False).input_ids
        if len(first) != 1:
            raise ValueError(
                f"expected an initializer_token that is one token, got {initializer_token!r}, which is {len(first)}"
            )
        if len(tokenizer(token, add_special_tokens=False).input_ids) == 1 or not tokenizer.add_tokens(token):
            raise ValueError(f"expected a rare_token that is new to the tokenizer, got {token!r}; choose another")
        rows = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
        encoder.resize_token_embeddings(rows, mean_resizing=False)
        weight = encoder.get_input_embeddings().weight
        weight.requires_grad_(False)
        weight[tokenizer.convert_tokens_to_ids(token)] = weight[first[0]]
        # Old configs, SDXL's too, have 2 here; transformers then pools where the largest id is: at the new word.
        encoder.config.eos_token_id = tokenizer.eos_token_id
        for module in encoder.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = tokenizer.eos_token_id


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    prompt: str,
    count: int,
    *,
    resolution: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.5,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> torch.Tensor:
    """Draw `count` pictures with the seeds `seed`, `seed` + 1 and so on: (count,3,H,W) float32 in [0,1], on the CPU.

    A picture depends on its own seed, not on how many are drawn.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, count, batch_size), desc="generating", disable=not progress):
        size = min(batch_size, count - start)
        drawn = pipeline(
            [prompt] * size,
            height=resolution,
            width=resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(size)],
            output_type="pt",
        ).images
        images.append(drawn.float().cpu())
    return torch.cat(images)


def center_square(images: torch.Tensor, side: int) -> torch.Tensor:
    """The centers of images (N,3,H,W), at this side: (N,3,side,side)."""
    height, width = images.shape[-2:]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    square = images[..., top : top + length, left : left + length]
    return square if length == side else resize(square, (side, side))


def _draw(posteriors: tuple[torch.Tensor, torch.Tensor], count: int, generator: torch.Generator) -> torch.Tensor:
    """Latents of photos that are drawn so that each comes as often as the others, as nearly as can be."""
    mean, deviation = posteriors
    rounds = [torch.randperm(len(mean), generator=generator) for _ in range(math.ceil(count / len(mean)))]
    which = torch.cat(rounds)[:count]
    noise = torch.randn((count, *mean.shape[1:]), generator=generator)
    return mean[which] + deviation[which] * noise


def _repeat(embedding: PromptEmbedding, counts: list[int]) -> PromptEmbedding:
    """The first prompt's embedding for the first count of latents, and so on."""
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(embedding.prompt_embeds.device)
    pooled = embedding.pooled_prompt_embeds
    return PromptEmbedding(embedding.prompt_embeds[rows], None if pooled is None else pooled[rows])
