"""Training of a small face model from nothing: an autoencoder, then a text-conditional denoiser on its latents.

The result is a `StableDiffusionPipeline`, small enough to be personalized on two CPU cores: a surrogate to train the
perturbation generator against, and a victim to attack. Protection only means something on a model whose autoencoder
sees fine detail, as those of real models do. So the autoencoder is trained with a perceptual loss on the features of
real encoders, and its latents are asked to tell those of a real encoder (distillation).
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..budget import budget_levels
from ..config import (
    check_at_least,
    check_at_least_one,
    check_choices,
    check_outside,
    initial_weights,
    locate_model,
    portable_settings,
    provenance,
    write_json,
)
from ..data import (
    FaceCrops,
    PhotosConfig,
    Source,
    digest_photos,
    is_readable,
    load_face,
    load_faces,
    pick,
    readable,
    split_record,
    split_usable,
)
from ..images import PhotoError
from ..surrogates.base import make_names_unique
from ..surrogates.encoder import EncoderSurrogate, encoder_displacement, load_encoders
from .loop import LoopConfig, TrainingLoop, checkpoints

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
MAX_VALIDATED = 512
"""How many held-out faces are measured at most, with mirror images where there are any."""


Captioned = tuple[Source, str | None]

AUTOENCODER_SETTINGS = (
    "train_data_dir",
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "dataset_split",
    "image_column",
    "minimum_side",
    "max_train_samples",
    "resolution",
    "vae_channels",
    "vae_layers_per_block",
    "latent_channels",
    "vae_crop_size",
    "vae_max_train_steps",
    "vae_train_batch_size",
    "vae_learning_rate",
    "vae_init_from",
    "kl_weight",
    "gradient_weight",
    "feature_encoders",
    "feature_encoder_revisions",
    "feature_weight",
    "distillation_weight",
    "response_weight",
    "response_eps",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "max_grad_norm",
    "ema_decay",
    "mixed_precision",
    "seed",
)
"""What the first stage depends on alone: with others a finished one is not used again, nor an interrupted resumed."""


@dataclass(frozen=True, kw_only=True)
class SurrogateTrainingConfig(PhotosConfig, LoopConfig):
    """Everything that the face model depends on, besides the versions: this and what `PhotosConfig`
    and `LoopConfig` have.

    The settings of `LoopConfig` are both stages', but for steps, batch and learning rate, which are the denoiser's:
    the autoencoder has those that begin with `vae_`.

    Attributes:
        resolution: side in pixels of the pictures that the model makes; a multiple of 8.
        caption_column: of the dataset, or in a file metadata.jsonl in the folders, which names photos as `file_name`;
            None for no captions.
        captions: what is said of a photo that has no caption, drawn anew each time, and of samples. All words of
            captions are tokens of their own, but for the rarest of many thousands.
        rare_tokens: further words that are tokens of their own, for personalization.
        caption_dropout: how often a caption is empty, for guidance.
        vae_channels: widths of the autoencoder, finest first; one fewer halvings than widths.
        vae_layers_per_block: residual blocks per width.
        latent_channels: of the latents.
        vae_crop_size: side of the crops that the autoencoder learns on, at most 0.8 x `resolution`.
        vae_max_train_steps, vae_train_batch_size, vae_learning_rate: of the autoencoder; with 0 steps `vae_init_from`
            is taken as it is.
        kl_weight: of the posterior's divergence, per latent, from the normal distribution.
        gradient_weight: of the absolute error of neighboring pixels' differences; that of the pixels themselves, at
            three scales, is 1.
        feature_encoders: files, folders or Hub ids for `EncoderSurrogate.from_pretrained`.
        feature_encoder_revisions: branch, tag or commit of each of them; none for the newest.
        feature_weight: how much it costs that a reconstruction's latents under these encoders lie elsewhere than the
            photo's, in units of their variance.
        response_weight: how much it costs, as the squared logarithm of the ratio, that latents move further, or less
            far, than these encoders' do when a photo is perturbed within `response_eps` by a step up their gradient.
        response_eps: that budget, on [0,1].
        vae_init_from: folder of an autoencoder of the same shape, or of a model with one, to start from, or None for
            random weights.
        distillation_weight: how much it costs that these latents cannot be read off ours by one linear map.
        unet_channels: widths of the denoiser; attention to the caption in all but the first.
        unet_layers_per_block: residual blocks per width.
        attention_heads: of the denoiser and of the text encoder.
        text_channels: width of the text encoder.
        text_layers: of the text encoder.
        face_scale: the denoiser learns squares around faces that a detector (the extra `metrics`) finds, so many times
            as wide as the box it draws, and leaves out photos without; None for the top middle of all photos.
        prediction_type: "epsilon" or "v_prediction".
        rescale_betas_zero_snr: whether the last timestep is noise alone, as sampling begins with (arXiv 2305.08891);
            needs "v_prediction".
        snr_gamma: losses are weighted by min(SNR, this) / SNR, or / (SNR + 1) for "v_prediction" (Min-SNR, arXiv
            2303.09556); 0 for equal weights.
        init_from: folder of a model of the same shape and words to start the denoiser and its text encoder from (its
            autoencoder is the matter of `vae_init_from`), or None for random weights.
        num_validation_images: held-out faces to validate the autoencoder on, and samples to draw.
    """

    resolution: int = 256
    caption_column: str | None = None
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
    feature_encoder_revisions: tuple[str, ...] = ()
    feature_weight: float = 0.1
    distillation_weight: float = 0.0
    response_weight: float = 0.0
    response_eps: float = 8 / 255
    vae_init_from: str | None = None
    unet_channels: tuple[int, ...] = (64, 96, 128)
    unet_layers_per_block: int = 1
    attention_heads: int = 4
    text_channels: int = 128
    text_layers: int = 2
    face_scale: float | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_gamma: float = 5.0
    init_from: str | None = None
    train_batch_size: int = 24
    learning_rate: float = 8e-4
    num_validation_images: int = 8

    def __post_init__(self):
        PhotosConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        check_outside(self.output_dir, self.folders)
        counts = ("vae_train_batch_size", "num_validation_images", "text_channels", "attention_heads")
        check_at_least_one(self, "resolution", "vae_crop_size", *counts)
        weights = ("kl_weight", "gradient_weight", "feature_weight", "distillation_weight", "response_weight")
        check_at_least(0, self, "vae_max_train_steps", "vae_learning_rate", "snr_gamma", *weights)
        budget_levels(self.response_eps)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"expected caption_dropout from 0 to 1, got {self.caption_dropout}")
        factor = 2 ** (len(self.vae_channels) - 1)
        for name in ("resolution", "vae_crop_size"):
            if getattr(self, name) % factor:
                raise ValueError(f"expected a {name} that is a multiple of {factor}, got {getattr(self, name)}")
        check_choices(self, prediction_type=("epsilon", "v_prediction"))
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("expected prediction_type 'v_prediction' with rescale_betas_zero_snr, got 'epsilon'")
        if self.face_scale is not None and not 1 <= self.face_scale <= 10:
            raise ValueError(f"expected a face_scale from 1 to 10, got {self.face_scale}")
        if (count := len(self.feature_encoder_revisions)) not in (0, len(self.feature_encoders)):
            raise ValueError(f"expected as many feature_encoder_revisions as feature_encoders, or none, got {count}")
        for name in ("distillation_weight", "response_weight"):
            if getattr(self, name) and not self.feature_encoders:
                raise ValueError(f"expected feature_encoders to distill, got none; or set {name} to 0")
        if self.text_channels % self.attention_heads:
            raise ValueError(
                f"expected text_channels that {self.attention_heads} attention_heads divide, got {self.text_channels}"
            )
        if not self.captions:
            raise ValueError("expected captions to draw from, got none")

    @property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule as diffusers' schedulers are told it."""
        return SCHEDULE | {
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
            "timestep_spacing": "trailing" if self.rescale_betas_zero_snr else "leading",
        }


class AutoencoderTrainer(TrainingLoop):
    """First stage: `vae` learns to reconstruct faces from few, detailed latents."""

    @property
    def free_settings(self) -> tuple[str, ...]:
        own = {*AUTOENCODER_SETTINGS, "max_train_steps", "train_batch_size", "learning_rate"}  # the vae's, here
        return tuple(field.name for field in fields(self.config) if field.name not in own)

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
            if config.vae_init_from:
                model = locate_model(config.vae_init_from)
                _load_weights(self.vae, Path(model, "vae") if Path(model, "vae").is_dir() else Path(model))
            encoders = load_encoders(config.feature_encoders, config.feature_encoder_revisions)
            heads = nn.ModuleList()
            for encoder in encoders:  # one reads as many of our latents as lie in one of the encoder's
                _, width, side, _ = encoder.encode_images(torch.zeros(1, 3, 64, 64)).shape
                patch = max(1, 64 // 2 ** (levels - 1) // side)
                heads.append(nn.Conv2d(config.latent_channels, width, patch, stride=patch))
        stage = replace(
            config,
            output_dir=str(Path(config.output_dir) / "autoencoder"),
            max_train_steps=config.vae_max_train_steps,
            stop_after_steps=None,
            train_batch_size=config.vae_train_batch_size,
            learning_rate=config.vae_learning_rate,
        )
        network = nn.ModuleDict({"vae": self.vae, "heads": heads}).to(memory_format=torch.channels_last)
        super().__init__(stage, {"autoencoder": network})
        self.heads = heads
        self.device = self.accelerator.device
        self.encoders = [encoder.to(self.device) for encoder in encoders]
        make_names_unique(self.encoders)
        train, held_out = config.split_photos()
        self.crops = FaceCrops(
            train,
            crop_size=config.vae_crop_size,
            native_size=config.resolution,
            minimum_side=config.minimum_side,
        )
        self.data_digest = digest_photos([*train, *held_out])
        self.held_out_photos = readable(held_out)
        self.unreadable = len(held_out) - len(self.held_out_photos)
        self.held_out = load_faces(pick(self.held_out_photos, MAX_VALIDATED), config.resolution)

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        images = self.crops.sample(config.train_batch_size, generator).to(self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            posterior = self.vae.encode(images * 2 - 1).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
            latents = posterior.mean + posterior.std * noise
            reconstructed = self.vae.decode(latents).sample
        reconstructed = (reconstructed.float() + 1) / 2
        losses = {"pixels": _pixel_loss(reconstructed, images, config.gradient_weight)}
        losses["kl"] = config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        if config.response_weight:
            few = images[: max(1, len(images) // 2)]
            chosen = self.encoders[int(torch.randint(0, len(self.encoders), (), generator=generator))]
            perturbed = self._perturb(few, chosen, generator)
            with self.autocast():
                answered = self.vae.encode(perturbed * 2 - 1).latent_dist.mean
            ours = encoder_displacement(posterior.mean[: len(few)].detach(), answered)
        for encoder, head in zip(self.encoders, self.heads):
            with self.autocast():
                with torch.no_grad():
                    features = encoder.encode_images(images)
                moved = encoder.encode_images(reconstructed)
                distilled = _mean_displacement(features, _tell(head, latents, features))
                if config.response_weight and encoder is chosen:
                    with torch.no_grad():
                        answer = encoder.encode_images(perturbed)
                    theirs = encoder_displacement(features[: len(few)], answer)
                    ratio = (ours + 1e-3) / (theirs + 1e-3)
                    losses["response"] = config.response_weight * ratio.log().square().mean()
                    distilled = distilled + _mean_displacement(answer, _tell(head, answered, answer))
            losses[f"features/{encoder.name}"] = config.feature_weight * _mean_displacement(features, moved)
            losses[f"distillation/{encoder.name}"] = config.distillation_weight * distilled
        loss = sum(losses.values())
        norm = self.update("autoencoder", loss)
        return {"loss": loss.item()} | {key: value.item() for key, value in losses.items()} | {"gradient_norm": norm}

    def _perturb(self, images: torch.Tensor, encoder: EncoderSurrogate, generator: torch.Generator) -> torch.Tensor:
        """Images (N,3,H,W) after one step up the gradient of this encoder's displacement, from random blocks."""
        eps = self.config.response_eps
        block = 2 ** int(torch.randint(0, 3, (), generator=generator))
        count, _, height, width = images.shape
        signs = torch.randint(0, 2, (count, 3, -(-height // block), -(-width // block)), generator=generator) * 2.0 - 1
        start = F.interpolate(signs, scale_factor=block, mode="nearest")[..., :height, :width].to(images) * eps / 2
        start.requires_grad_(True)
        with self.autocast():
            with torch.no_grad():
                features = encoder.encode_images(images)
            displacement = encoder_displacement(features, encoder.encode_images((images + start).clamp(0, 1)))
        (gradient,) = torch.autograd.grad(displacement.sum(), start)
        delta = (start.detach() + eps * gradient.sign()).clamp(-eps, eps)
        return (images + delta).clamp(0, 1).contiguous(memory_format=torch.channels_last)

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
        self.show(torch.cat(shown))
        return {"held_out/psnr": sum(decibels) / len(decibels)}


class DenoiserTrainer(TrainingLoop):
    """Second stage: `pipeline`'s denoiser and text encoder learn to draw faces as the autoencoder's latents."""

    def __init__(self, config: SurrogateTrainingConfig, vae: AutoencoderKL):
        self.vae = vae.eval().requires_grad_(False)
        train, held_out = _split_photos(config)
        self.tokenizer, network = build_denoiser(config, [caption for _, caption in (*train, *held_out) if caption])
        self.unet, self.text_encoder = network["unet"], network["text_encoder"]
        super().__init__(config, {"denoiser": network})
        self.device = self.accelerator.device
        self.vae.to(self.device)
        self.scheduler = DDPMScheduler(**config.schedule)
        self.data_digest = digest_photos(*zip(*train, *held_out))
        self.latents, self.captions = self._encode_all(train)
        self.held_out, self.held_out_captions = self._encode_all(held_out)
        self.left_out = len(train) + len(held_out) - (len(self.latents) + len(self.held_out)) // 2

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """The model as it is, with a deterministic sampler."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler(**self.config.schedule, set_alpha_to_one=False),
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
        templates = torch.randint(0, len(config.captions), (len(which),), generator=generator).tolist()
        dropped = (torch.rand(len(which), generator=generator) < config.caption_dropout).tolist()
        captions = [self.captions[i] or config.captions[template] for i, template in zip(which, templates)]
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped)]
        loss = self._loss(self.latents[which], captions, generator)
        norm = self.update("denoiser", loss)
        return {"loss": loss.item(), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on held-out faces and mirror images, always with the same draws; a picture of samples."""
        generator = torch.Generator().manual_seed(0)
        templates = self.config.captions
        captions = [caption or templates[i % len(templates)] for i, caption in enumerate(self.held_out_captions)]
        losses = [
            self._loss(self.held_out[i : i + 32], captions[i : i + 32], generator).item()
            for i in range(0, min(len(captions), MAX_VALIDATED), 32)
        ]
        loss = sum(losses) / len(losses)
        self.show(self.sample(self.config.num_validation_images))
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
        with self.autocast():
            predicted = self.unet(noisy, timesteps, self._encode_text(captions)).sample
        target = noise
        if self.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        losses = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if self.config.snr_gamma:
            snr = compute_snr(self.scheduler, timesteps)
            losses = losses * snr.clamp(max=self.config.snr_gamma) / (snr if target is noise else snr + 1)
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
    def _encode_all(self, photos: list[Captioned]) -> tuple[torch.Tensor, list[str | None]]:
        """Posteriors of the faces and of their mirror images, mean and standard deviation one after the other.

        And their captions. Unreadable photos are left out, and those without a face if `face_scale` wants one.
        """
        posteriors, captions, left_out = [], [], Counter()
        for source, caption in tqdm(photos, desc="Encoding photos", disable=None):
            try:
                image = load_face(source, self.config.resolution, self.config.face_scale)
            except PhotoError as error:
                left_out[str(error)] += 1
                continue
            pair = torch.stack([image, image.flip(2)]).to(self.device)
            posterior = self.vae.encode(pair * 2 - 1).latent_dist
            posteriors.append(torch.cat([posterior.mean, posterior.std], dim=1).cpu())
            captions += [caption, caption]
        if left_out:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common(5))
            logger.warning("left out %d of %d photos: %s", left_out.total(), len(photos), reasons)
        return torch.cat(posteriors), captions


def train_surrogate(
    config: SurrogateTrainingConfig, *, resume: str | None = None
) -> tuple[DenoiserTrainer, dict[str, Any]]:
    """Train both stages; a finished autoencoder in the output folder is not trained again if `resume`.

    Args:
        config: the settings.
        resume: as `TrainingLoop.train` has it, of the stage that was not finished; None to begin.

    Returns:
        The second stage with its pipeline, and the training record.
    """
    named = resume not in (None, "latest")
    folder = Path(config.output_dir) / "autoencoder" / "vae"
    data_digest = digest_photos(config.load_photos()[0])
    record_path = folder / "training_record.json"  # written last: it says that the folder is whole
    if record_path.is_file():
        if not resume:
            raise ValueError(
                f"expected an output folder without an autoencoder, got {folder}; resume, or choose another"
            )
        vae, first = AutoencoderKL.from_pretrained(folder), json.loads(record_path.read_text(encoding="utf-8"))
        vae.register_to_config(_name_or_path="")  # a folder of this machine
        now = _settings(config, *AUTOENCODER_SETTINGS)
        changed = [key for key, value in now.items() if first["config"].get(key, value) != value]
        if first.get("data_digest", data_digest) != data_digest:
            changed.append("choice of photos")
        if changed:
            raise ValueError(
                f"{folder} was trained with another {', '.join(changed)}; resume with the settings it had"
            )
    else:
        if checkpoints(Path(config.output_dir)) and not checkpoints(Path(config.output_dir, "autoencoder")):
            raise ValueError(
                f"expected an output folder without checkpoints, got {config.output_dir}, which has some, but not the "
                "autoencoder that they are of; choose another folder"
            )
        _check_denoiser(config)
        vae, first = _train_autoencoder(config, resume, record_path, data_digest)
        named, resume = False, resume and "latest"  # a name was of a checkpoint of that stage
    denoiser = DenoiserTrainer(config, vae)
    figures = first["figures"] | denoiser.train(resume=resume if named or checkpoints(denoiser.output_dir) else None)
    record = {
        "initial_autoencoder": first["initial_weights"],
        "initial_denoiser": initial_weights(config.init_from),
        "config": _settings(config),
        "photos": split_record(len(denoiser.latents) // 2, len(denoiser.held_out) // 2, denoiser.left_out),
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("vae", vae), ("unet", denoiser.unet), ("text_encoder", denoiser.text_encoder))
        },
        "figures": figures,
        **denoiser.machine,
        "versions": provenance(),
    }
    return denoiser, record


def _train_autoencoder(
    config: SurrogateTrainingConfig, resume: str | None, record_path: Path, data_digest: str
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The first stage, saved beside its record; its photos and optimizer are gone when it returns."""
    stage = AutoencoderTrainer(config)
    figures = stage.train(resume=resume)
    vae = stage.vae
    vae.register_to_config(scaling_factor=1 / _latent_deviation(vae, stage.held_out, stage.device))
    record = {
        "initial_weights": initial_weights(config.vae_init_from),
        "config": _settings(config, *AUTOENCODER_SETTINGS),
        "photos": stage.crops.split_record(len(stage.held_out_photos), stage.unreadable),
        "data_digest": data_digest,
        "figures": figures,
        **stage.machine,
    }
    if stage.accelerator.is_main_process:
        vae.save_pretrained(record_path.parent)
        write_json(record_path, record)
    stage.accelerator.wait_for_everyone()
    return vae, record


def build_denoiser(config: SurrogateTrainingConfig, captions: Sequence[str]) -> tuple[CLIPTokenizer, nn.ModuleDict]:
    """The tokenizer, and `unet` and `text_encoder` as they are before the first step.

    Raises:
        ValueError: widths that do not fit each other; `init_from` is of others, of other words, or predicts otherwise.
    """
    tokenizer = build_tokenizer((*config.captions, *config.rare_tokens), captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_channels,
                intermediate_size=4 * config.text_channels,
                projection_dim=config.text_channels,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.attention_heads,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        with_attention = len(config.unet_channels) - 1
        unet = UNet2DConditionModel(
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
    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    if config.init_from:
        folder = Path(locate_model(config.init_from))
        for name, module in networks.items():
            _load_weights(module, folder / name)
        schedule = DDIMScheduler.load_config(folder / "scheduler")
        differs = [key for key, value in config.schedule.items() if schedule.get(key, value) != value]
        if CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab() != tokenizer.get_vocab():
            differs.append("captions")
        if differs:
            raise ValueError(f"expected init_from a model with the same {', '.join(differs)}, got {folder}")
    return tokenizer, networks


def _load_weights(module: nn.Module, folder: Path) -> None:
    """Start this network from the one in a folder; ValueError if none is there, or one of another shape."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a folder with a trained {type(module).__name__}, got {folder}, which has none")
    try:
        module.load_state_dict(type(module).from_pretrained(folder).state_dict())
    except RuntimeError as error:
        raise ValueError(f"expected {folder} of the same shape as the settings say: {error}") from error


def _split_photos(config: SurrogateTrainingConfig) -> tuple[list[Captioned], list[Captioned]]:
    """The denoiser's photos with their captions: to train on, and held out."""
    photos = list(zip(*config.load_photos()))
    wanted = "photos that can be read" if config.face_scale is None else "photos with a face"
    return split_usable(photos, lambda photo: is_readable(photo[0], config.face_scale), wanted)


def _check_denoiser(config: SurrogateTrainingConfig) -> None:
    """Find what would stop the second stage before the first one has taken its time.

    Raises:
        ImportError: faces shall be found, and there is no detector.
        ValueError: too few photos, or too few with a face, or settings that `build_denoiser` refuses.
    """
    train, held_out = _split_photos(config)
    build_denoiser(config, [caption for _, caption in (*train, *held_out) if caption])


def _settings(config: SurrogateTrainingConfig, *keys: str) -> dict[str, Any]:
    """The config, or these keys of it, as a record states it: without folders of this machine."""
    settings = portable_settings(config, "feature_encoders", "vae_init_from", "init_from")
    return {key: settings[key] for key in keys or settings}


def build_tokenizer(texts: Sequence[str], captions: Sequence[str] = (), words: int = 8000) -> CLIPTokenizer:
    """A CLIP tokenizer, byte-level; any text works.

    Every word of `texts` is one token, and so are the `words` most frequent of `captions`.
    """
    alphabet = sorted(_byte_characters())
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    ranks: dict[tuple[str, str], int] = {}  # of merges
    whole = CLIPTokenizer()  # knows how text is cut into words

    def split(text: str) -> list[str]:
        return [word for word, _ in whole.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text.lower())]

    frequent = Counter(word for caption in captions for word in split(caption)).most_common(words)
    for word in dict.fromkeys([*(w for text in texts for w in split(text)), *(w for w, _ in frequent)]):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # the earliest merge first, as the tokenizer will do it; where there is none, a new one
            pairs = list(zip(parts, parts[1:]))
            first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            ranks.setdefault(pairs[first], len(ranks))
            parts[first : first + 2] = ["".join(pairs[first])]
            tokens.append(parts[first])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=77)


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


def _tell(head: nn.Module, latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """What can be read off our latents about these features, at their resolution."""
    return F.interpolate(head(latents), size=features.shape[-2:], mode="nearest")


def _mean_displacement(features: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return encoder_displacement(features, moved).mean()


@torch.no_grad()
def _latent_deviation(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> float:
    latents = [vae.encode(image[None].to(device) * 2 - 1).latent_dist.mode() for image in images]
    return torch.cat(latents).std().item()
