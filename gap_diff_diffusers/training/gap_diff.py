"""Training of the perturbation generator: the objective of GAP-Diff, against encoders and diffusion models.

Paper: GAP-Diff (NDSS 2025), section IV: L = alpha L_GAN + beta L_adv(protected) + gamma L_adv(preprocessed), generator
and discriminator updated in turn. L_adv is minus what a surrogate loses by the perturbation: its denoising loss, or,
of an encoder alone, the logarithm of the latents' displacement.

Differences from upstream (AIASLab/GAP-Diff), each with an option that brings upstream's back where it matters: the
noise that surrogates are asked for is Gaussian, not uniform in [0,1); the discriminator sees protected, not
preprocessed photos, so that it cannot judge by the preprocessing; preprocessing is by default the real JPEG codec.
And what the paper names and the released code lacks: timesteps can be weighted, and the surrogates can learn the
protected photos while the generator learns (L_ft on protected photos, L_ft' on preprocessed ones, each with a prior).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..budget import check_whole_levels
from ..config import (
    BUNDLED,
    BUNDLED_CHECKPOINT,
    check_at_least,
    check_at_least_one,
    check_choices,
    check_outside,
    initial_weights,
    portable_settings,
    provenance,
)
from ..data import FaceCrops, PhotosConfig, digest_photos, load_faces, pick, readable, round_to_8_bits
from ..finetuning import DreamBoothConfig, draw_class_images
from ..models.gap_diff_discriminator import GAPDiffDiscriminator
from ..models.gap_diff_generator import GAPDiffGenerator, resize
from ..surrogates import load_surrogate
from ..surrogates.base import DiffusionSurrogate, PromptEmbedding, encode_latents, make_names_unique
from ..surrogates.encoder import EncoderSurrogate, encoder_displacement, load_encoders
from ..surrogates.files import find_file
from ..transforms import RealJPEG, Transform, build_transform
from ..transforms.filters import interpolate
from .loop import LoopConfig, TrainingLoop
from .losses import coherence_loss, discriminator_loss, excess_power_loss, gan_loss, log_displacement_loss

STAGES = {
    "released": ((0.8, 0.0, 1.0), (1.0, 0.6, 0.4)),
    "preprocessed": ((1.0, 0.0, 1.0),),
}
"""Schedules of beta and gamma: the released code's, which has protected photos at the end, too, and one without."""
COHERENCE_WINDOW = 16
"""Side in pixels of the windows that the coherence loss compares; they begin up to 12 px from the top and the left."""


@dataclass(frozen=True, kw_only=True)
class GAPDiffTrainingConfig(PhotosConfig, LoopConfig):
    """Everything that a run depends on, besides the versions: this and what `PhotosConfig` and `LoopConfig` have.

    Attributes:
        encoders: files, folders or Hub ids for `EncoderSurrogate.from_pretrained`.
        encoder_revisions: branch, tag or commit of each encoder; none of them for the newest.
        encoder_weights: how much each encoder counts in L_adv.
        encoder_crop_sizes: side in pixels of the part of each crop that an encoder sees, 0 for all of it; a costly
            encoder sees less.
        encoder_resolutions: side in pixels at which each encoder sees a photo, as `surrogate_resolutions`; () is 512.
        encoder_centered: of which encoders only what is left of the displacement without its mean over each crop
            counts, as of `encoder_displacement`; () is none of them.
        surrogates: folders or Hub ids of text-to-image models, for `load_surrogate`.
        surrogate_revisions: branch, tag or commit of each surrogate; none of them for the newest.
        surrogate_weights: how much each surrogate counts in L_adv.
        surrogate_resolutions: side in pixels at which each surrogate is personalized; 512 leaves crops as they are.
        surrogate_learning_rates: above 0, a surrogate's denoiser learns what the generator is trained on at this rate:
            protected and preprocessed photos, as beta and gamma weigh them.
        surrogate_learning_steps: that happens every so many steps.
        surrogate_prior_weight: lambda of L_ft: what a surrogate that learns has to pay, too, on `num_class_images`
            pictures of `class_prompt`, which it draws before the training; 0 for none.
        class_prompt, num_class_images, num_inference_steps, guidance_scale: of these pictures.
        gradient_checkpointing: of the surrogates and encoders: less memory for more time.
        prompt: what the surrogates are told of every photo.
        timestep_weighting: alpha(t): "none", or "linear" from 2 without noise to 0 in pure noise. The paper's slides
            name such a weight and do not give it; the released code has none.
        noise: that surrogates are asked for, "gaussian", or upstream's "uniform".
        stages: a name of `STAGES`, or a list of [end, beta, gamma], `end` as a share of all steps: [[0.5, 0, 1],
            [1, 0.6, 0.4]].
        gan_weight: alpha; above 0 a discriminator learns, too.
        discriminator_input: "protected", or upstream's "preprocessed".
        init_from: folder of a pipeline to start from, "bundled" for the one that ships, or None for random weights.
        architecture, channels, layers_per_block, downscale: of `GAPDiffGenerator`, if there is no `init_from`.
        output_gain: of `GAPDiffGenerator`; None for that of `init_from`, or 1.
        keyed_grid: of `GAPDiffGenerator`; None for that of `init_from`, or no keyed grid.
        eps: the budget on [0,1], whole levels, which flags and JSON have as "8/255".
        rms: root mean square of the perturbation, in levels, above which it costs (6.4 is a PSNR of 32 dB).
        rms_weight, coherence_weight: weights of these losses; the displacement's is 1.
        transform: what happens to the photos before the encoders, for `build_transform`; gradients have to pass it.
        scale_factors: the perturbation is computed on the photo scaled by these and resampled; each entry is a list of
            ranges [low, high], one per scale; a step draws an entry and, from its first range, one factor by which all
            others move along. [[[1, 1]]] is one entry, of the size as it is.
        scale_weights: how often each entry is drawn.
        crop_size: side of the training crops, cut from face squares of 512 px times a factor from the range
            `crop_scales`.
        num_validation_images: held-out faces to validate on.
    """

    encoders: tuple[str, ...] = ()
    encoder_revisions: tuple[str, ...] = ()
    encoder_weights: tuple[float, ...] = ()
    encoder_crop_sizes: tuple[int, ...] = ()
    encoder_resolutions: tuple[int, ...] = ()
    encoder_centered: tuple[bool, ...] = ()
    surrogates: tuple[str, ...] = ()
    surrogate_revisions: tuple[str, ...] = ()
    surrogate_weights: tuple[float, ...] = ()
    surrogate_resolutions: tuple[int, ...] = ()
    surrogate_learning_rates: tuple[float, ...] = ()
    surrogate_learning_steps: int = 1
    surrogate_prior_weight: float = 1.0
    class_prompt: str = DreamBoothConfig.class_prompt
    num_class_images: int = DreamBoothConfig.num_class_images
    num_inference_steps: int = DreamBoothConfig.num_inference_steps
    guidance_scale: float = DreamBoothConfig.guidance_scale
    gradient_checkpointing: bool = False
    prompt: str = "a photo of sks person"
    timestep_weighting: str = "none"
    noise: str = "gaussian"
    stages: Any = "released"
    gan_weight: float = 0.0
    discriminator_input: str = "protected"
    init_from: str | None = None
    architecture: str = "compact"
    channels: tuple[int, ...] = (96, 160, 192)
    layers_per_block: tuple[int, ...] = (1, 1, 1)
    downscale: int = 2
    output_gain: float | None = None
    keyed_grid: bool | None = None
    eps: float = 8 / 255
    rms: float = 6.2
    rms_weight: float = 4.0
    coherence_weight: float = 1.2
    transform: Any = field(
        default_factory=lambda: {
            "name": "random_choice",
            "choices": [{"name": "jpeg", "quality": [55, 88], "subsampling": "4:2:0"}, "identity"],
            "weights": [0.9, 0.1],
        }
    )
    scale_factors: tuple = (
        [[1, 1]],
        [[0.3, 1.6]],
        [[0.7, 1.4], [1.57, 3.14]],
        [[0.7, 1.4], [0.31, 0.62]],
        [[0.7, 1.4], [1.57, 3.14], [0.31, 0.62]],
    )
    scale_weights: tuple[float, ...] = (0.7, 0.12, 0.04, 0.1, 0.04)
    crop_size: int = 192
    crop_scales: tuple[float, ...] = (0.8, 1.2)
    num_validation_images: int = 6

    def __post_init__(self):
        PhotosConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        check_outside(self.output_dir, self.folders)
        for kind, names in (
            ("encoders", ("encoder_weights", "encoder_crop_sizes")),
            ("surrogates", ("surrogate_weights", "surrogate_resolutions", "surrogate_learning_rates")),
        ):
            count = len(getattr(self, kind))
            for name in names:
                if len(getattr(self, name)) != count:
                    raise ValueError(
                        f"expected as many {name} as {kind}, got {len(getattr(self, name))} for {count} {kind}"
                    )
        if not self.encoders and not self.surrogates:
            raise ValueError("expected encoders or surrogates to train against, got neither")
        check_choices(
            self,
            timestep_weighting=("none", "linear"),
            noise=("gaussian", "uniform"),
            discriminator_input=("protected", "preprocessed"),
        )
        check_at_least_one(self, "surrogate_learning_steps", "num_class_images", "downscale", "crop_size")
        check_at_least_one(self, "num_inference_steps", "encoder_resolutions", "surrogate_resolutions")
        weights = ("encoder_weights", "surrogate_weights", "surrogate_prior_weight", "gan_weight", "rms_weight")
        check_at_least(0, self, *weights, "coherence_weight", "encoder_crop_sizes", "surrogate_learning_rates")
        check_whole_levels(self.eps)
        if self.rms <= 0:
            raise ValueError(f"expected an rms above 0, got {self.rms}")
        if isinstance(self.stages, str) and self.stages not in STAGES:
            raise ValueError(f"expected stages {', '.join(STAGES)} or a list, got {self.stages!r}")
        stages = self.schedule
        if not isinstance(stages, list | tuple) or not stages or not all(_are_numbers(s, 3) for s in stages):
            raise ValueError(f"expected stages as a list of [end, beta, gamma], got {self.stages!r}")
        ends = [stage[0] for stage in stages]
        if sorted(ends) != ends or ends[-1] != 1:
            raise ValueError(f"expected stages that end one after the other, the last at 1, got {self.stages!r}")
        for name, kind in (
            ("surrogate_revisions", "surrogates"),
            ("encoder_revisions", "encoders"),
            ("encoder_resolutions", "encoders"),
            ("encoder_centered", "encoders"),
        ):
            if (count := len(getattr(self, name))) not in (0, len(getattr(self, kind))):
                raise ValueError(f"expected as many {name} as {kind}, or none, got {count}")
        entries = self.scale_factors if isinstance(self.scale_factors, list | tuple) else [None]
        if not all(isinstance(entry, list | tuple) and entry and all(map(_is_range, entry)) for entry in entries):
            raise ValueError(
                "expected scale_factors as a list of lists of ranges [low, high] above 0, as [[[1, 1]]], got "
                f"{self.scale_factors!r}"
            )
        if len(self.scale_factors) != len(self.scale_weights):
            raise ValueError(
                f"expected as many scale_weights as scale_factors, got {len(self.scale_weights)} and "
                f"{len(self.scale_factors)}"
            )
        if min(self.scale_weights, default=0) < 0 or not any(self.scale_weights):
            raise ValueError(f"expected scale_weights of at least 0, not all 0, got {list(self.scale_weights)}")
        if not _is_range(self.crop_scales):
            raise ValueError(f"expected crop_scales as a range of two numbers above 0, got {list(self.crop_scales)}")
        if self.coherence_weight and self.train_batch_size < 2:
            raise ValueError(
                f"expected a train_batch_size of at least 2, got {self.train_batch_size}: photos are compared; or set "
                "coherence_weight to 0"
            )
        if self.coherence_weight and self.crop_size < COHERENCE_WINDOW + 12:
            raise ValueError(
                f"expected a crop_size of at least {COHERENCE_WINDOW + 12}, got {self.crop_size}: windows of "
                f"{COHERENCE_WINDOW} px are compared; or set coherence_weight to 0"
            )

    @property
    def schedule(self) -> Sequence[Sequence[float]]:
        """[end, beta, gamma] of each stage."""
        return STAGES[self.stages] if isinstance(self.stages, str) else self.stages


class GAPDiffTrainer(TrainingLoop):
    """One run: `train()` to its end; `generator` then has the averaged weights.

    Raises:
        ValueError: no photos, a transform that is unknown or lets no gradients through, settings that do not fit
            together.
    """

    def __init__(self, config: GAPDiffTrainingConfig):
        own = {name: value for name in ("output_gain", "keyed_grid") if (value := getattr(config, name)) is not None}
        self.init_from = str(BUNDLED_CHECKPOINT) if config.init_from == BUNDLED else config.init_from
        if self.init_from:
            if not find_file(self.init_from, "generator/config.json", None, None, None):
                raise ValueError(
                    f"expected a protection pipeline as init_from, got {config.init_from}, which has no generator; "
                    "leave it out to begin with random weights"
                )
            generator = GAPDiffGenerator.from_pretrained(self.init_from, subfolder="generator", **own)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                generator = GAPDiffGenerator(
                    architecture=config.architecture,
                    channels=config.channels,
                    layers_per_block=config.layers_per_block,
                    downscale=config.downscale,
                    **own,
                    **({"scale_range": 1.0} if config.architecture == "paper" else {}),
                )
        self.generator = generator.to(memory_format=torch.channels_last)
        _check_sizes(generator, config)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
        self.surrogates: list[DiffusionSurrogate] = []
        networks: dict[str, nn.Module] = {"generator": self.generator}
        if config.gan_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                networks["discriminator"] = GAPDiffDiscriminator()
        learning_rates = {}
        for index, (model, rate) in enumerate(zip(config.surrogates, config.surrogate_learning_rates)):
            # What learns is kept in float32: steps as small as these vanish in the others.
            surrogate = load_surrogate(
                model,
                revision=config.surrogate_revisions[index] if config.surrogate_revisions else None,
                dtype=torch.float32 if rate else dtype,
                gradient_checkpointing=config.gradient_checkpointing,
            )
            if not isinstance(surrogate, DiffusionSurrogate):
                raise ValueError(
                    f"expected text-to-image models as surrogates, got {model}, an image encoder alone; name it among "
                    "the encoders"
                )
            self.surrogates.append(surrogate)
            if rate:
                networks[f"denoiser {index}"] = surrogate.denoiser
                learning_rates[f"denoiser {index}"] = rate
        super().__init__(config, networks, learning_rates)
        self.device = self.accelerator.device
        self.prompts: list[PromptEmbedding] = []
        self.class_prompts: dict[int, PromptEmbedding] = {}
        self.class_images: dict[int, torch.Tensor] = {}
        # Autoencoders of Stable Diffusion overflow in float16.
        self.encoder_dtype = torch.float32 if dtype == torch.float16 else dtype
        for index, surrogate in enumerate(self.surrogates):
            surrogate.to(self.device).freeze()
            with torch.no_grad():
                self.prompts.append(surrogate.encode_prompt(config.prompt))
                if f"denoiser {index}" in networks and config.surrogate_prior_weight:
                    self.class_prompts[index] = surrogate.encode_prompt(config.class_prompt)
                    self.class_images[index] = self._draw_class_images(index)
            if surrogate.vae.dtype != self.encoder_dtype:  # as of one that learns
                surrogate.vae.to(self.encoder_dtype)
            surrogate.text_encoders.cpu()  # they have said what they are asked
        self.train_photos, held_out = config.split_photos()
        self.data_digest = digest_photos([*self.train_photos, *held_out])
        self.crops = FaceCrops(
            self.train_photos,
            crop_size=config.crop_size,
            scales=config.crop_scales,
            minimum_side=config.minimum_side,
        )
        self.held_out = readable(held_out)
        self.unreadable = len(held_out) - len(self.held_out)
        shown = pick(self.held_out, max(1, config.num_validation_images))
        self.validation_faces = load_faces(shown, 512).to(self.device)
        self.encoders = [
            encoder.to(self.device, self.encoder_dtype)
            for encoder in load_encoders(
                config.encoders, config.encoder_revisions, gradient_checkpointing=config.gradient_checkpointing
            )
        ]
        make_names_unique([*self.surrogates, *self.encoders])
        self.transform: Transform = build_transform(config.transform).train()
        if not self.transform.differentiable:
            kinds = {type(part) for part in self.transform.modules() if isinstance(part, Transform)}
            names = sorted(kind.__name__ for kind in kinds if kind.differentiable is False)
            raise ValueError(
                f"expected a transform that gradients pass, got {config.transform!r}, in which {', '.join(names)} "
                "stops them; leave that out, and measure with it afterwards"
            )

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        images = self.crops.sample(config.train_batch_size, generator).to(self.device)
        with self.autocast():
            height, width = images.shape[-2:]
            sizes = [(round(height * factor), round(width * factor)) for factor in self._draw_factors(generator)]
            perturbation = self.generator.perturb_at_sizes(images, sizes)
        protected = (images + perturbation * config.eps).clamp(0, 1)
        draw = self.transform.draw(generator=generator)
        # What comes out smaller or larger is brought back to the size that it is learned at, as an attacker does.
        published_clean, published = (
            interpolate(self.transform.apply_draw(photos, draw), *images.shape[-2:]) for photos in (images, protected)
        )

        loss = torch.zeros((), device=self.device)
        figures = {}
        beta, gamma = self._stage()
        for prefix, weight, clean, moved in (
            ("protected/", beta, images, protected),
            ("", gamma, published_clean, published),
        ):
            if weight:
                adversarial, measured = self._adversarial_loss(clean, moved, generator)
                loss = loss + weight * adversarial
                figures |= {prefix + name: value for name, value in measured.items()}
        offset = torch.randint(0, 4, (2,), generator=generator).mul(4).tolist()
        if config.coherence_weight:
            coherence = coherence_loss(perturbation, window=COHERENCE_WINDOW, offset=tuple(offset), samples=768)
            loss = loss + config.coherence_weight * coherence
            figures["coherence"] = coherence.item()
        loss = loss + config.rms_weight * excess_power_loss(perturbation * config.eps * 255, config.rms)
        if config.gan_weight:
            discriminator = self.networks["discriminator"]
            pair = (images, protected) if config.discriminator_input == "protected" else (images, published)
            with self.autocast():
                judged = discriminator_loss(discriminator(pair[0]), discriminator(pair[1].detach()))
            figures["loss/discriminator"] = judged.item()
            self.update("discriminator", judged)
            with self.autocast():
                looks = gan_loss(discriminator(pair[1]))
            figures["loss/gan"] = looks.item()
            loss = loss + config.gan_weight * looks

        norm = self.update("generator", loss)
        if beta + gamma and self.step % config.surrogate_learning_steps == 0:
            moved = [(weight, photos.detach()) for weight, photos in ((beta, protected), (gamma, published)) if weight]
            figures |= self._let_surrogates_learn(moved, generator)
        return figures | {"loss": loss.item(), "gradient_norm": norm}

    def _stage(self) -> tuple[float, float]:
        """beta and gamma of the current step."""
        share = self.step / self.config.max_train_steps
        return next((beta, gamma) for end, beta, gamma in self.config.schedule if share < end)

    def _adversarial_loss(
        self, clean: torch.Tensor, moved: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """L_adv of photos that were moved (N,3,H,W), and figures to log."""
        config = self.config
        loss, figures = torch.zeros((), device=self.device), {}
        resolutions, centered = self._encoder_settings()
        for encoder, weight, size, resolution, center in zip(
            self.encoders, config.encoder_weights, config.encoder_crop_sizes, resolutions, centered
        ):
            crop = _random_crop(moved.shape[-2:], (size, size), generator) if size else (Ellipsis,)
            with torch.no_grad():
                latents = self._encode(encoder, clean[crop], resolution)
            answer = self._encode(encoder, moved[crop], resolution)
            displacement = encoder_displacement(latents, answer, centered=center)
            loss = loss + weight * log_displacement_loss(displacement)
            figures[f"displacement/{encoder.name}"] = displacement.mean().item()
        for index, (surrogate, weight) in enumerate(zip(self.surrogates, config.surrogate_weights)):
            denoising = self._denoising_loss(index, self._as_seen_by(index, moved), self.prompts[index], generator)
            loss = loss - weight * denoising
            figures[f"denoising/{surrogate.name}"] = denoising.item()
        return loss, figures

    def _denoising_loss(
        self,
        index: int,
        images: torch.Tensor,
        prompt: PromptEmbedding,
        generator: torch.Generator,
        *,
        as_attacker: bool = False,
    ) -> torch.Tensor:
        """What a surrogate loses on photos as it sees them: weighted by alpha(t), of the noise that is asked for.

        Or, `as_attacker`, what someone who personalizes it minimizes: neither weighted nor of other noise.
        """
        config, surrogate = self.config, self.surrogates[index]
        # Drawn on the CPU, so that a run does not depend on the device.
        timesteps = surrogate.draw_timesteps(len(images), generator).to(self.device)
        draw = torch.rand if config.noise == "uniform" and not as_attacker else torch.randn
        noise = draw(surrogate.latent_shape(images), generator=generator).to(self.device)
        posterior = torch.Generator(self.device).manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
        latents = encode_latents(surrogate.vae, images, sample=True, generator=posterior)
        with self.autocast():  # without the autoencoder, which has the type that it can compute in
            losses = surrogate.latent_denoising_loss(latents, prompt, timesteps=timesteps, noise=noise)
        if config.timestep_weighting == "linear" and not as_attacker:
            losses = losses * 2 * (1 - timesteps / surrogate.num_train_timesteps)
        return losses.mean()

    def _as_seen_by(self, index: int, images: torch.Tensor) -> torch.Tensor:
        """Crops of photos of 512 px at the resolution of this surrogate."""
        resolution, multiple = self.config.surrogate_resolutions[index], self.surrogates[index].size_multiple
        return _at_resolution(images, resolution, multiple)

    def _draw_class_images(self, index: int) -> torch.Tensor:
        """Pictures of the class (M,3,S,S) in [0,1] by a surrogate that has learned nothing, at its resolution."""
        config = self.config
        settings = DreamBoothConfig(
            class_prompt=config.class_prompt,
            num_class_images=config.num_class_images,
            resolution=_nearest(config.surrogate_resolutions[index], self.surrogates[index].size_multiple),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        return draw_class_images(self.surrogates[index], settings)

    def _let_surrogates_learn(
        self, weighted: Sequence[tuple[float, torch.Tensor]], generator: torch.Generator
    ) -> dict[str, float]:
        """One step of every surrogate that may learn, as someone who personalizes it takes them: on these photos
        (N,3,H,W), each with its share of their weights, and on pictures of the class, as many and as large.
        """
        figures, total = {}, sum(weight for weight, _ in weighted)
        for index, surrogate in enumerate(self.surrogates):
            name = f"denoiser {index}"
            if name in self.networks:
                surrogate.denoiser.requires_grad_(True)
                loss = torch.zeros((), device=self.device)
                for weight, images in weighted:
                    seen = self._as_seen_by(index, images)
                    learned = self._denoising_loss(index, seen, self.prompts[index], generator, as_attacker=True)
                    loss = loss + weight / total * learned
                figures[f"learned/{surrogate.name}"] = loss.item()
                if index in self.class_images:
                    chosen = torch.randint(len(self.class_images[index]), (len(seen),), generator=generator)
                    crop = _random_crop(self.class_images[index].shape[-2:], seen.shape[-2:], generator)
                    images, prompt = self.class_images[index][chosen][crop].to(seen), self.class_prompts[index]
                    prior = self._denoising_loss(index, images, prompt, generator, as_attacker=True)
                    loss = loss + self.config.surrogate_prior_weight * prior
                    figures[f"prior/{surrogate.name}"] = prior.item()
                self.update(name, loss)
                surrogate.denoiser.requires_grad_(False)
        return figures

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out faces of 512x512, after JPEG 70: how far encoders' latents move, and what surrogates lose on
        protected and on clean ones, always with the same draws; and how strong the perturbation is and how much of it
        the photos share.

        And pictures of them: clean, protected, and the perturbation, eight times as strong, on gray.
        """
        images = self.validation_faces
        perturbation = torch.cat([self.generator(image[None]) for image in images])
        protected = round_to_8_bits(images + perturbation * self.config.eps)
        self.show(torch.stack([images, protected, (0.5 + 8 * (protected - images))], dim=1).flatten(0, 1), columns=3)
        publish = RealJPEG(70).eval()
        published_clean, published = publish(images), publish(protected)
        figures = {}
        for encoder, side, center in zip(self.encoders, *self._encoder_settings()):
            latents = torch.cat([self._encode(encoder, x[None], side) for x in published_clean])
            answers = torch.cat([self._encode(encoder, y[None], side) for y in published])
            figures[f"held_out/{encoder.name}"] = encoder_displacement(latents, answers).mean().item()
            if center:
                displacement = encoder_displacement(latents, answers, centered=True)
                figures[f"held_out/centered/{encoder.name}"] = displacement.mean().item()
        side = min(self.config.crop_size, images.shape[-1])  # surrogates see as much as in training, from the middle
        middle = slice((images.shape[-1] - side) // 2, (images.shape[-1] + side) // 2)
        for index, surrogate in enumerate(self.surrogates):
            for name, photos in (("", published), (" clean", published_clean)):
                generator = torch.Generator().manual_seed(0)
                crops, prompt = self._as_seen_by(index, photos[..., middle, middle]), self.prompts[index]
                losses = [self._denoising_loss(index, crop[None], prompt, generator).item() for crop in crops]
                figures[f"held_out/denoising/{surrogate.name}{name}"] = sum(losses) / len(losses)
        figures["held_out/rms"] = (protected - images).square().mean().sqrt().item() * 255
        count = len(images)
        share = (perturbation.mean(0).square().mean() / perturbation.square().mean()).item()
        if count > 1:  # 0 in expectation if photos share nothing
            figures["held_out/mean_share"] = (share * count - 1) / (count - 1)
        return figures

    def record(self, figures: dict[str, Any]) -> dict[str, Any]:
        """What stands beside the weights: config, data, steps, versions, final figures."""
        config = portable_settings(self.config, "encoders", "surrogates", "init_from")
        architecture = self.generator.config
        config |= {
            key: architecture[key]
            for key in ("architecture", "channels", "layers_per_block", "downscale", "output_gain", "keyed_grid")
        }
        return {
            "initial_weights": initial_weights(self.init_from),
            "config": config,
            "photos": self.crops.split_record(len(self.held_out), self.unreadable),
            "encoders": [encoder.name for encoder in self.encoders],
            "steps": self.step,
            "figures": figures,
            **self.machine,
            "versions": provenance(),
        }

    def _encoder_settings(self) -> tuple[Sequence[int], Sequence[bool]]:
        """Resolution of each encoder, and whether its displacement is centered."""
        count = len(self.encoders)
        return self.config.encoder_resolutions or (512,) * count, self.config.encoder_centered or (False,) * count

    def _draw_factors(self, generator: torch.Generator) -> list[float]:
        weights = torch.tensor(self.config.scale_weights, dtype=torch.float32)
        entry = self.config.scale_factors[int(torch.multinomial(weights, 1, generator=generator))]
        position = torch.rand((), generator=generator).item()
        return [low * (high / low) ** position for low, high in entry]

    def _encode(self, encoder: EncoderSurrogate, images: torch.Tensor, resolution: int = 512) -> torch.Tensor:
        images = (
            _at_resolution(images, resolution, 1 if resolution == 512 else 8)
            .to(self.encoder_dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        return encoder.encode_images(images).float()


def _are_numbers(value: Any, count: int) -> bool:
    """Whether this is a list of so many finite numbers."""
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    return numbers and len(value) == count


def _is_range(value: Any) -> bool:
    return _are_numbers(value, 2) and 0 < value[0] <= value[1]


def _check_sizes(generator: GAPDiffGenerator, config: GAPDiffTrainingConfig) -> None:
    """ValueError if the factors that are drawn can scale crops to sizes that the network does not take."""
    drawn = [e for e, weight in zip(config.scale_factors, config.scale_weights, strict=True) if weight]
    for low, high in (pair for entry in drawn for pair in entry):
        for side in range(round(config.crop_size * low), round(config.crop_size * high) + 1):
            if (nearest := generator.nearest_size(side, side)[0]) != side:
                raise ValueError(
                    f"expected scale_factors that scale crops to sizes that the {generator.config.architecture} "
                    f"network takes, got [{low}, {high}], which makes of a crop_size of {config.crop_size} also "
                    f"{side} px; the nearest that it takes is {nearest} px"
                )


def _at_resolution(images: torch.Tensor, resolution: int, multiple: int) -> torch.Tensor:
    """Crops (N,3,H,W) of photos of 512 px as they are where photos have `resolution`, in sides of this multiple."""
    size = [_nearest(side * resolution / 512, multiple) for side in images.shape[-2:]]
    return resize(images, (size[0], size[1]))


def _nearest(side: float, multiple: int) -> int:
    """The multiple that is nearest to this side, from the first on."""
    return max(1, round(side / multiple)) * multiple


def _random_crop(size: Sequence[int], sides: Sequence[int], generator: torch.Generator) -> tuple:
    """An index that cuts these sides out of (N,3,H,W), on a grid of 8 pixels; sides that are longer stay whole."""
    slices = []
    for length, side in zip(size, sides, strict=True):
        steps = max(0, length - side) // 8
        start = 8 * int(torch.randint(0, steps + 1, (), generator=generator))
        slices.append(slice(start, start + side))
    return (Ellipsis, *slices)
