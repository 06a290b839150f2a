"""Training of the perturbation generator against image encoders.

GAP-Diff (NDSS 2025) trains the generator to spoil what a surrogate makes of the photo after preprocessing. This loop
holds the part of it that needs no diffusion model: the surrogates are image encoders, the preprocessing is a
differentiable mixture with the real JPEG codec, and the objective is the displacement of the latents.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import provenance
from ..data import FaceCrops, list_photos, load_faces, split_held_out
from ..models.gap_diff_generator import GAPDiffGenerator
from ..surrogates.encoder import EncoderSurrogate, encoder_displacement
from ..transforms import RealJPEG, Transform, build_transform
from .loop import LoopConfig, TrainingLoop
from .losses import coherence_loss, excess_power_loss, log_displacement_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GAPDiffTrainingConfig(LoopConfig):
    """Everything that a run depends on, besides the versions: this and what `LoopConfig` has.

    Attributes:
        train_data_dir: folders of photos; a tenth is held out (`data.split_held_out`).
        encoders: files, folders or Hub ids for `EncoderSurrogate.from_pretrained`.
        encoder_weights: how much each encoder counts in the loss.
        encoder_crop_sizes: side in pixels of the part of each crop that an encoder sees, 0 for all of it; a costly
            encoder sees less.
        init_from: folder of a pipeline to start from, or None for random weights.
        channels, layers_per_block, downscale: of `GAPDiffGenerator`, if there is no `init_from`.
        output_gain: of `GAPDiffGenerator`, also with `init_from`.
        eps: the budget on [0,1].
        rms: root mean square of the perturbation, in levels, above which it costs (6.4 is a PSNR of 32 dB).
        rms_weight, coherence_weight: weights of these losses; the displacement's is 1.
        transform: what happens to the photos before the encoders, for `build_transform`.
        scale_factors: the perturbation is computed on the photo scaled by these and resampled; each entry is a list of
            ranges [low, high], one per scale; a step draws an entry and, from its first range, one factor by which all
            others move along. [[1, 1]] is the size as it is.
        scale_weights: how often each entry is drawn.
        crop_size: side of the training crops.
        num_validation_images: held-out faces to validate on.
    """

    train_data_dir: tuple[str, ...]
    encoders: tuple[str, ...]
    encoder_weights: tuple[float, ...]
    encoder_crop_sizes: tuple[int, ...]
    init_from: str | None = None
    channels: tuple[int, ...] = (96, 160, 192)
    layers_per_block: tuple[int, ...] = (1, 1, 1)
    downscale: int = 2
    output_gain: float = 1.0
    eps: float = 8 / 255
    rms: float = 6.1
    rms_weight: float = 4.0
    coherence_weight: float = 2.5
    transform: Any = field(
        default_factory=lambda: {
            "name": "random_choice",
            "choices": [{"name": "jpeg", "quality": [55, 92], "subsampling": "4:2:0"}, "identity"],
            "weights": [0.85, 0.15],
        }
    )
    scale_factors: tuple = ([[1, 1]], [[0.3, 1.6]], [[0.7, 1.4], [1.57, 3.14]], [[0.7, 1.4], [0.31, 0.62]])
    scale_weights: tuple[float, ...] = (0.5, 0.2, 0.15, 0.15)
    crop_size: int = 192
    num_validation_images: int = 6

    def __post_init__(self):
        super().__post_init__()
        if not len(self.encoders) == len(self.encoder_weights) == len(self.encoder_crop_sizes):
            raise ValueError(
                "expected as many encoder_weights and encoder_crop_sizes as encoders, got "
                f"{len(self.encoder_weights)} and {len(self.encoder_crop_sizes)} for {len(self.encoders)}"
            )
        if len(self.scale_factors) != len(self.scale_weights):
            raise ValueError(
                f"expected as many scale_weights as scale_factors, got {len(self.scale_weights)} and "
                f"{len(self.scale_factors)}"
            )
        if self.train_batch_size < 2:
            raise ValueError(
                f"expected a train_batch_size of at least 2, got {self.train_batch_size}: photos are compared"
            )


class GAPDiffTrainer(TrainingLoop):
    """One run: `train()` to its end; `generator` then has the averaged weights.

    Raises:
        ValueError: no photos, an unknown transform, settings that do not fit together.
    """

    def __init__(self, config: GAPDiffTrainingConfig):
        if config.init_from:
            generator = GAPDiffGenerator.from_pretrained(
                config.init_from, subfolder="generator", output_gain=config.output_gain
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                generator = GAPDiffGenerator(
                    channels=config.channels,
                    layers_per_block=config.layers_per_block,
                    downscale=config.downscale,
                    output_gain=config.output_gain,
                )
        self.generator = generator.to(memory_format=torch.channels_last)
        super().__init__(config, {"generator": self.generator})
        self.device = self.accelerator.device
        self.train_photos, self.held_out = split_held_out(list_photos(config.train_data_dir))
        self.crops = FaceCrops(self.train_photos, crop_size=config.crop_size)
        logger.info("%d photos to train on, %d skipped", len(self.crops.squares), self.crops.skipped)
        count = max(1, config.num_validation_images)
        held_out = self.held_out[:: max(1, len(self.held_out) // count)][:count]
        self.validation_faces = load_faces(held_out, 512).to(self.device)
        precisions = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.encoder_dtype = precisions[config.mixed_precision]
        self.encoders = [
            EncoderSurrogate.from_pretrained(encoder).to(self.device, self.encoder_dtype)
            for encoder in config.encoders
        ]
        self.transform: Transform = build_transform(config.transform).train()

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        images = self.crops.sample(config.train_batch_size, generator).to(self.device)
        with self.accelerator.autocast():
            height, width = images.shape[-2:]
            sizes = [(round(height * factor), round(width * factor)) for factor in self._draw_factors(generator)]
            perturbation = self.generator.perturb_at_sizes(images, sizes)
        protected = (images + perturbation * config.eps).clamp(0, 1)
        draw = self.transform.draw(generator=generator)
        published_clean = self.transform.apply_draw(images, draw)
        published = self.transform.apply_draw(protected, draw)

        loss = torch.zeros((), device=self.device)
        figures = {}
        for encoder, weight, size in zip(self.encoders, config.encoder_weights, config.encoder_crop_sizes):
            crop = _random_crop(published.shape[-2:], size, generator)
            with torch.no_grad():
                clean = self._encode(encoder, published_clean[crop])
            displacement = encoder_displacement(clean, self._encode(encoder, published[crop]))
            loss = loss + weight * log_displacement_loss(displacement)
            figures[f"displacement/{encoder.name}"] = displacement.mean().item()
        offset = torch.randint(0, 4, (2,), generator=generator).mul(4).tolist()
        coherence = coherence_loss(perturbation, window=16, offset=tuple(offset), samples=768)
        excess = excess_power_loss(perturbation * config.eps * 255, config.rms)
        loss = loss + config.coherence_weight * coherence + config.rms_weight * excess

        norm = self.update("generator", loss)
        return figures | {"loss": loss.item(), "coherence": coherence.item(), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Displacement after JPEG 70 and coherence, on held-out faces of 512x512."""
        images = self.validation_faces
        perturbation = torch.cat([self.generator(image[None]) for image in images])
        protected = ((images + perturbation * self.config.eps).clamp(0, 1) * 255).round() / 255
        publish = RealJPEG(70).eval()
        published_clean, published = publish(images), publish(protected)
        figures = {}
        for encoder in self.encoders:
            moved = [
                encoder_displacement(self._encode(encoder, x[None]), self._encode(encoder, y[None])).item()
                for x, y in zip(published_clean, published)
            ]
            figures[f"held_out/{encoder.name}"] = sum(moved) / len(moved)
        figures["held_out/rms"] = (protected - images).square().mean().sqrt().item() * 255
        count = len(images)
        share = (perturbation.mean(0).square().mean() / perturbation.square().mean()).item()
        if count > 1:  # 0 in expectation if photos share nothing
            figures["held_out/mean_share"] = (share * count - 1) / (count - 1)
        return figures

    def record(self, figures: dict[str, Any]) -> dict[str, Any]:
        """What stands beside the weights: config, data, steps, versions, final figures."""
        config = asdict(self.config)
        del config["output_dir"]
        for key in ("train_data_dir", "encoders"):  # names, for the folders are this machine's
            config[key] = [Path(value).name for value in config[key]]
        architecture = self.generator.config
        config |= {key: architecture[key] for key in ("channels", "layers_per_block", "downscale")}
        config["init_from"] = self.config.init_from and Path(self.config.init_from).name
        earlier = Path(self.config.init_from, "training_record.json") if self.config.init_from else None
        return {
            "initial_weights": json.loads(earlier.read_text()) if earlier and earlier.is_file() else "random",
            "config": config,
            "photos": {
                "train": len(self.crops.squares),
                "held_out": len(self.held_out),
                "skipped": self.crops.skipped,
                "rule": "the first of every ten, by folder and name, is held out",
            },
            "encoders": [encoder.name for encoder in self.encoders],
            "steps": self.step,
            "figures": figures,
            "versions": provenance(),
        }

    def _draw_factors(self, generator: torch.Generator) -> list[float]:
        weights = torch.tensor(self.config.scale_weights, dtype=torch.float32)
        entry = self.config.scale_factors[int(torch.multinomial(weights, 1, generator=generator))]
        position = torch.rand((), generator=generator).item()
        return [low * (high / low) ** position for low, high in entry]

    def _encode(self, encoder: EncoderSurrogate, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.encoder_dtype).contiguous(memory_format=torch.channels_last)
        return encoder.encode_images(images).float()


def _random_crop(size: Sequence[int], side: int, generator: torch.Generator) -> tuple:
    """An index that cuts side x side out of (N,3,H,W), on a grid of 8 pixels; everything if side is 0."""
    if side == 0:
        return (Ellipsis,)
    slices = []
    for length in size:
        steps = max(0, length - side) // 8
        start = 8 * int(torch.randint(0, steps + 1, (), generator=generator))
        slices.append(slice(start, start + side))
    return (Ellipsis, *slices)
