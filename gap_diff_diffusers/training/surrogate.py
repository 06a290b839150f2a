"""Training of a small face model from nothing: an autoencoder, then a text-conditional denoiser on its latents.

The result is a `StableDiffusionPipeline`, small enough to be personalized on two CPU cores: a surrogate to train the
perturbation generator against, and a victim to attack. Protection only means something on a model whose autoencoder
sees fine detail, as those of real models do. So the autoencoder is trained with a perceptual loss on the features of
real encoders, and its latents are asked to tell those of a real encoder (distillation).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..config import provenance
from ..data import FaceCrops, list_photos, load_faces, split_held_out
from ..surrogates.encoder import EncoderSurrogate, encoder_displacement
from .loop import LoopConfig, TrainingLoop

logger = logging.getLogger(__name__)

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}
"""Noise schedule of Stable Diffusion 1.x."""


@dataclass(frozen=True, kw_only=True)
class SurrogateTrainingConfig(LoopConfig):
    """Everything that the face model depends on, besides the versions: this and what `LoopConfig` has.

    The settings of `LoopConfig` are the denoiser's; the autoencoder has those that begin with `vae_` instead.

    Attributes:
        train_data_dir: folders of photos; a tenth is held out (`data.split_held_out`).
        resolution: side in pixels of the pictures that the model makes; a multiple of 8.
        captions: what is said of every photo, drawn anew each time; all words of theirs are tokens of their own.
        rare_tokens: further words that are tokens of their own, for personalization.
        caption_dropout: how often a caption is empty, for guidance.
        vae_channels: widths of the autoencoder, finest first; one fewer halvings than widths.
        vae_layers_per_block: residual blocks per width.
        latent_channels: of the latents.
        vae_crop_size: side of the crops that the autoencoder learns on, at most 0.8 x `resolution`.
        vae_max_train_steps, vae_train_batch_size, vae_learning_rate: of the autoencoder.
        kl_weight: of the posterior's divergence, per latent, from the normal distribution.
        gradient_weight: of the absolute error of neighboring pixels' differences; that of the pixels themselves, at
            three scales, is 1.
        feature_encoders: files, folders or Hub ids for `EncoderSurrogate.from_pretrained`.
        feature_weight: how much it costs that a reconstruction's latents under these encoders lie elsewhere than the
            photo's, in units of their variance.
        distillation_weight: how much it costs that these latents cannot be read off ours by one 1x1 convolution.
        unet_channels: widths of the denoiser; attention to the caption in all but the first.
        unet_layers_per_block: residual blocks per width.
        attention_heads: of the denoiser and of the text encoder.
        text_channels: width of the text encoder.
        text_layers: of the text encoder.
        prediction_type: "epsilon" or "v_prediction".
        snr_gamma: losses are weighted by min(SNR, this) / SNR (Min-SNR, arXiv 2303.09556); 0 for equal weights.
        num_validation_images: held-out faces to validate the autoencoder on, and samples to draw.
    """

    train_data_dir: tuple[str, ...]
    resolution: int = 256
    captions: tuple[str, ...] = (
        "a photo of a person",
        "a photo of person",
        "a dslr portrait of a person",
        "a portrait of a person",
        "a photo of a face",
    )
    rare_tokens: tuple[str, ...] = ("sks",)
    caption_dropout: float = 0.1
    vae_channels: tuple[int, ...] = (32, 64, 96, 128)
    vae_layers_per_block: int = 1
    latent_channels: int = 4
    vae_crop_size: int = 160
    vae_max_train_steps: int = 4000
    vae_train_batch_size: int = 16
    vae_learning_rate: float = 5e-4
    kl_weight: float = 1e-3
    gradient_weight: float = 1.0
    feature_encoders: tuple[str, ...] = ()
    feature_weight: float = 0.1
    distillation_weight: float = 0.0
    unet_channels: tuple[int, ...] = (64, 96, 128)
    unet_layers_per_block: int = 1
    attention_heads: int = 4
    text_channels: int = 128
    text_layers: int = 2
    prediction_type: str = "epsilon"
    snr_gamma: float = 5.0
    train_batch_size: int = 24
    learning_rate: float = 8e-4
    num_validation_images: int = 8

    def __post_init__(self):
        super().__post_init__()
        factor = 2 ** (len(self.vae_channels) - 1)
        for name in ("resolution", "vae_crop_size"):
            if getattr(self, name) % factor:
                raise ValueError(f"expected a {name} that is a multiple of {factor}, got {getattr(self, name)}")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected prediction_type 'epsilon' or 'v_prediction', got {self.prediction_type!r}")
        if self.distillation_weight and not self.feature_encoders:
            raise ValueError("expected feature_encoders to distill, got none; or set distillation_weight to 0")


class AutoencoderTrainer(TrainingLoop):
    """First stage: `vae` learns to reconstruct faces from few, detailed latents."""

    def __init__(self, config: SurrogateTrainingConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            levels = len(config.vae_channels)
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=config.vae_channels,
                layers_per_block=config.vae_layers_per_block,
                latent_channels=config.latent_channels,
                norm_num_groups=_group_count(config.vae_channels),
                sample_size=config.resolution,
            )
            encoders = [EncoderSurrogate.from_pretrained(encoder) for encoder in config.feature_encoders]
            widths = [encoder.encode_images(torch.zeros(1, 3, 64, 64)).shape[1] for encoder in encoders]
            heads = nn.ModuleList(nn.Conv2d(config.latent_channels, width, 1) for width in widths)
        stage = replace(
            config,
            output_dir=str(Path(config.output_dir) / "autoencoder"),
            max_train_steps=config.vae_max_train_steps,
            train_batch_size=config.vae_train_batch_size,
            learning_rate=config.vae_learning_rate,
        )
        network = nn.ModuleDict({"vae": self.vae, "heads": heads}).to(memory_format=torch.channels_last)
        super().__init__(stage, {"autoencoder": network})
        self.heads = heads
        self.device = self.accelerator.device
        self.encoders = [encoder.to(self.device) for encoder in encoders]
        train, held_out = split_held_out(list_photos(config.train_data_dir))
        self.crops = FaceCrops(train, crop_size=config.vae_crop_size, native_size=config.resolution)
        if not held_out:
            raise ValueError(f"expected photos to hold out, got {len(train)} photos in all")
        self.held_out = load_faces(held_out, config.resolution)

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        images = self.crops.sample(config.train_batch_size, generator).to(self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            posterior = self.vae.encode(images * 2 - 1).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
            latents = posterior.mean + posterior.std * noise
            reconstructed = self.vae.decode(latents).sample
        reconstructed = (reconstructed.float() + 1) / 2
        losses = {"pixels": _pixel_loss(reconstructed, images, config.gradient_weight)}
        losses["kl"] = config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        for encoder, head in zip(self.encoders, self.heads):
            with self.accelerator.autocast():
                with torch.no_grad():
                    features = encoder.encode_images(images)
                moved = encoder.encode_images(reconstructed)
                told = head(F.interpolate(latents, size=features.shape[-2:], mode="area"))
            losses[f"features/{encoder.name}"] = config.feature_weight * _mean_displacement(features, moved)
            losses[f"distillation/{encoder.name}"] = config.distillation_weight * _mean_displacement(features, told)
        loss = sum(losses.values())
        norm = self.update("autoencoder", loss)
        return {"loss": loss.item()} | {key: value.item() for key, value in losses.items()} | {"gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR of held-out faces, and a picture of some of them with their reconstructions."""
        decibels, shown = [], []
        for index, image in enumerate(self.held_out):
            image = image[None].to(self.device)
            latents = self.vae.encode(image * 2 - 1).latent_dist.mode()
            reconstructed = ((self.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
            decibels.append(-10 * (reconstructed - image).square().mean().log10().item())
            if index < self.config.num_validation_images:
                shown.append(torch.cat([image, reconstructed], dim=2))
        save_grid(torch.cat(shown), self.output_dir / "samples" / f"{self.step}.png")
        return {"held_out/psnr": sum(decibels) / len(decibels)}


class DenoiserTrainer(TrainingLoop):
    """Second stage: `pipeline`'s denoiser and text encoder learn to draw faces as the autoencoder's latents."""

    def __init__(self, config: SurrogateTrainingConfig, vae: AutoencoderKL):
        self.vae = vae.eval().requires_grad_(False)
        self.tokenizer = build_tokenizer((*config.captions, *config.rare_tokens))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.text_encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(self.tokenizer),
                    hidden_size=config.text_channels,
                    intermediate_size=4 * config.text_channels,
                    projection_dim=config.text_channels,
                    num_hidden_layers=config.text_layers,
                    num_attention_heads=config.attention_heads,
                    max_position_embeddings=self.tokenizer.model_max_length,
                    bos_token_id=self.tokenizer.bos_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            )
            with_attention = len(config.unet_channels) - 1
            self.unet = UNet2DConditionModel(
                sample_size=config.resolution // 2 ** (len(config.vae_channels) - 1),
                in_channels=config.latent_channels,
                out_channels=config.latent_channels,
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * with_attention),
                up_block_types=(*("CrossAttnUpBlock2D",) * with_attention, "UpBlock2D"),
                block_out_channels=config.unet_channels,
                layers_per_block=config.unet_layers_per_block,
                cross_attention_dim=config.text_channels,
                attention_head_dim=config.attention_heads,
                norm_num_groups=_group_count(config.unet_channels),
            )
        network = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        super().__init__(config, {"denoiser": network})
        self.device = self.accelerator.device
        self.vae.to(self.device)
        self.scheduler = DDPMScheduler(**SCHEDULE, prediction_type=config.prediction_type)
        train, held_out = split_held_out(list_photos(config.train_data_dir))
        self.latents = self._encode_all(load_faces(train, config.resolution))
        self.held_out = self._encode_all(load_faces(held_out, config.resolution))

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """The model as it is, with a deterministic sampler."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type=self.config.prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        which = torch.randint(0, len(self.latents), (config.train_batch_size,), generator=generator)
        captions = torch.randint(0, len(config.captions), (len(which),), generator=generator).tolist()
        dropped = (torch.rand(len(which), generator=generator) < config.caption_dropout).tolist()
        captions = ["" if drop else config.captions[i] for i, drop in zip(captions, dropped)]
        loss = self._loss(self.latents[which], captions, generator)
        norm = self.update("denoiser", loss)
        return {"loss": loss.item(), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on held-out faces, always with the same draws, and a picture of samples."""
        generator = torch.Generator().manual_seed(0)
        captions = [self.config.captions[i % len(self.config.captions)] for i in range(len(self.held_out))]
        loss = self._loss(self.held_out, captions, generator).item()
        samples = self.sample(self.config.num_validation_images)
        save_grid(samples, self.output_dir / "samples" / f"{self.step}.png")
        return {"held_out/loss": loss}

    def sample(self, count: int, steps: int = 25, guidance_scale: float = 2.5) -> torch.Tensor:
        """Draw `count` faces with fixed seeds: (N,3,H,W) in [0,1]."""
        images = self.pipeline(
            [self.config.captions[0]] * count,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
            output_type="pt",
        ).images
        return images.float().cpu()

    def _loss(self, posteriors: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
        mean, std = posteriors.chunk(2, dim=1)
        draws = torch.randn((2, *mean.shape), generator=generator)
        timesteps = torch.randint(0, SCHEDULE["num_train_timesteps"], (len(mean),), generator=generator)
        timesteps, noise = timesteps.to(self.device), draws[1].to(self.device)
        latents = (mean + std * draws[0]).to(self.device) * self.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with self.accelerator.autocast():
            predicted = self.unet(noisy, timesteps, self._encode_text(captions)).sample
        target = noise
        if self.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        losses = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if self.config.snr_gamma:
            snr = compute_snr(self.scheduler, timesteps)
            weights = snr.clamp(max=self.config.snr_gamma) / snr
            losses = losses * (weights * snr / (snr + 1) if target is not noise else weights)
        return losses.mean()

    def _encode_text(self, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def _encode_all(self, faces: torch.Tensor) -> torch.Tensor:
        """Posteriors of the faces and of their mirror images: mean and standard deviation, one after the other."""
        posteriors = []
        for image in faces:
            pair = torch.stack([image, image.flip(2)]).to(self.device)
            posterior = self.vae.encode(pair * 2 - 1).latent_dist
            posteriors.append(torch.cat([posterior.mean, posterior.std], dim=1).cpu())
        return torch.cat(posteriors)


def train_surrogate(
    config: SurrogateTrainingConfig, *, resume: bool = False
) -> tuple[DenoiserTrainer, dict[str, Any]]:
    """Train both stages; a finished autoencoder in the output folder is not trained again if `resume`.

    Returns:
        The second stage with its pipeline, and the training record.
    """
    folder = Path(config.output_dir) / "autoencoder" / "vae"
    figures_path = folder.with_name("figures.json")
    if resume and figures_path.is_file():
        vae, figures = AutoencoderKL.from_pretrained(folder), json.loads(figures_path.read_text())
    else:
        stage = AutoencoderTrainer(config)
        figures = stage.train(resume=resume and any(stage.output_dir.glob("checkpoint-*")))
        vae = stage.vae
        vae.register_to_config(scaling_factor=1 / _latent_deviation(vae, stage.held_out, stage.device))
        if stage.accelerator.is_main_process:
            vae.save_pretrained(folder)
            figures_path.write_text(json.dumps(figures))
    denoiser = DenoiserTrainer(config, vae)
    figures |= denoiser.train(resume=resume and any(denoiser.output_dir.glob("checkpoint-*")))
    settings = asdict(config)
    del settings["output_dir"]
    for key in ("train_data_dir", "feature_encoders"):  # names, for the folders are this machine's
        settings[key] = [Path(value).name for value in settings[key]]
    record = {
        "config": settings,
        "photos": {
            "train": len(denoiser.latents) // 2,
            "held_out": len(denoiser.held_out) // 2,
            "rule": "the first of every ten, by folder and name, is held out",
        },
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("vae", vae), ("unet", denoiser.unet), ("text_encoder", denoiser.text_encoder))
        },
        "figures": figures,
        "versions": provenance(),
    }
    return denoiser, record


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer, byte-level, in which every word of these texts is one token; any other text works, too."""
    alphabet = sorted(_byte_characters())
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    merges: list[tuple[str, str]] = []
    whole = CLIPTokenizer()  # knows how text is cut into words
    for word in dict.fromkeys(
        w for text in texts for w, _ in whole.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the left
            merge, parts = (parts[0], parts[1]), [parts[0] + parts[1], *parts[2:]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def save_grid(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Save (N,3,H,W) in [0,1] as one picture."""
    from PIL import Image

    rows = [torch.cat(list(images[i : i + columns]), dim=2) for i in range(0, len(images), columns)]
    width = max(row.shape[2] for row in rows)
    grid = torch.cat([F.pad(row, (0, width - row.shape[2])) for row in rows], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def _byte_characters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _group_count(channels: Sequence[int]) -> int:
    """The most groups, up to 32 and of 4 channels or more, that divide every width."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if all(c % n == 0 and c // n >= min(4, c) for c in channels))


def _pixel_loss(moved: torch.Tensor, images: torch.Tensor, gradient_weight: float) -> torch.Tensor:
    loss = sum(F.l1_loss(F.avg_pool2d(moved, s), F.avg_pool2d(images, s)) for s in (1, 2, 4))
    error = moved - images
    return loss + gradient_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def _mean_displacement(features: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return encoder_displacement(features, moved).mean()


@torch.no_grad()
def _latent_deviation(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> float:
    latents = [vae.encode(image[None].to(device) * 2 - 1).latent_dist.mode() for image in images]
    return torch.cat(latents).std().item()
