"""Training of the perturbation generator against image encoders.

GAP-Diff (NDSS 2025) trains the generator to spoil what a surrogate makes of the photo after preprocessing. This loop
holds the part of it that needs no diffusion model: the surrogates are image encoders, the preprocessing is a
differentiable mixture with the real JPEG codec, and the objective is the displacement of the latents.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..config import provenance
from ..data import FaceCrops, list_photos, load_faces, split_held_out
from ..models.gap_diff_generator import GAPDiffGenerator
from ..surrogates.encoder import EncoderSurrogate, encoder_displacement
from ..transforms import RealJPEG, Transform, build_transform
from .losses import coherence_loss, excess_power_loss, log_displacement_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GAPDiffTrainingConfig:
    """Everything that a run depends on, besides the versions.

    Attributes:
        train_data_dir: folders of photos; a tenth is held out (`data.split_held_out`).
        encoders: files, folders or Hub ids for `EncoderSurrogate.from_pretrained`.
        encoder_weights: how much each encoder counts in the loss.
        encoder_crop_sizes: side in pixels of the part of each crop that an encoder sees, 0 for all of it; a costly
            encoder sees less.
        output_dir: gets the pipeline, the training record, the log and the checkpoints.
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
        mixed_precision: "bf16" or "no".
        seed: of everything random; a step's draws depend on it and on the step alone.
    """

    train_data_dir: tuple[str, ...]
    encoders: tuple[str, ...]
    encoder_weights: tuple[float, ...]
    encoder_crop_sizes: tuple[int, ...]
    output_dir: str
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
    train_batch_size: int = 8
    max_train_steps: int = 8000
    learning_rate: float = 8e-4
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    mixed_precision: str = "bf16"
    checkpointing_steps: int = 500
    validation_steps: int = 500
    num_validation_images: int = 6
    seed: int = 0

    def __post_init__(self):
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
        if self.mixed_precision not in ("bf16", "no"):
            raise ValueError(f"expected mixed_precision 'bf16' or 'no', got {self.mixed_precision!r}")


class GAPDiffTrainer:
    """One run: `train()` to its end, from the last checkpoint if `resume`.

    Raises:
        ValueError: no photos, an unknown transform, settings that do not fit together.
    """

    def __init__(self, config: GAPDiffTrainingConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.train_photos, self.held_out = split_held_out(list_photos(config.train_data_dir))
        self.crops = FaceCrops(self.train_photos, crop_size=config.crop_size)
        logger.info("%d photos to train on, %d skipped", len(self.crops.squares), self.crops.skipped)
        count = max(1, config.num_validation_images)
        self.validation_faces = load_faces(self.held_out[:: max(1, len(self.held_out) // count)][:count], 512)
        self.encoder_dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.encoders = [EncoderSurrogate.from_pretrained(e).to(self.encoder_dtype) for e in config.encoders]
        self.transform: Transform = build_transform(config.transform).train()
        if config.init_from:
            self.generator = GAPDiffGenerator.from_pretrained(
                config.init_from, subfolder="generator", output_gain=config.output_gain
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.generator = GAPDiffGenerator(
                    channels=config.channels,
                    layers_per_block=config.layers_per_block,
                    downscale=config.downscale,
                    output_gain=config.output_gain,
                )
        self.generator = self.generator.train().to(memory_format=torch.channels_last)
        self.ema = EMAModel(self.generator.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.optimizer = torch.optim.AdamW(
            self.generator.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.adam_weight_decay,
        )
        self.scheduler = get_scheduler(
            "cosine",
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.step = 0

    def train(self, *, resume: bool = False) -> GAPDiffGenerator:
        """Train, write checkpoints and the log, and return the generator with averaged weights, in evaluation mode."""
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = self.output_dir / "checkpoint.pt"
        if resume:
            if not checkpoint.is_file():
                raise ValueError(f"expected a checkpoint to resume from in {self.output_dir}, found none")
            self._load(checkpoint)
        log_path = self.output_dir / "training_log.jsonl"
        earlier = log_path.read_text().splitlines() if resume and log_path.is_file() else []
        log_path.write_text("".join(line + "\n" for line in earlier if json.loads(line)["step"] <= self.step))
        progress = tqdm(total=config.max_train_steps, initial=self.step, disable=None, desc="training")
        with open(log_path, "a") as log:
            while self.step < config.max_train_steps:
                figures = self.training_step(self._step_generator())
                if not math.isfinite(figures["loss"]):
                    raise FloatingPointError(f"the loss is {figures['loss']} at step {self.step}; lower learning_rate")
                self.step += 1
                progress.update()
                progress.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
                if self.step % config.validation_steps == 0 or self.step == config.max_train_steps:
                    figures |= self.validate()
                log.write(json.dumps({"step": self.step} | {k: round(v, 5) for k, v in figures.items()}) + "\n")
                log.flush()
                if self.step % config.checkpointing_steps == 0:
                    self._save(checkpoint)
        progress.close()
        self.ema.copy_to(self.generator.parameters())
        return self.generator.eval()

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step with this source of randomness; returns the figures to log."""
        config = self.config
        images = self.crops.sample(config.train_batch_size, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            height, width = images.shape[-2:]
            sizes = [(round(height * factor), round(width * factor)) for factor in self._draw_factors(generator)]
            perturbation = self.generator.perturb_at_sizes(images, sizes)
        protected = (images + perturbation * config.eps).clamp(0, 1)
        draw = self.transform.draw(generator=generator)
        published_clean = self.transform.apply_draw(images, draw)
        published = self.transform.apply_draw(protected, draw)

        loss = torch.zeros(())
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

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.step(self.generator.parameters())
        return figures | {"loss": loss.item(), "coherence": coherence.item(), "gradient_norm": norm.item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Displacement after JPEG 70 and coherence of the averaged weights, on held-out faces of 512x512."""
        images = self.validation_faces
        self.ema.store(self.generator.parameters())
        self.ema.copy_to(self.generator.parameters())
        was_training = self.generator.training
        self.generator.eval()
        perturbation = torch.cat([self.generator(image[None]) for image in images])
        self.generator.train(was_training)
        self.ema.restore(self.generator.parameters())
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

    def _step_generator(self) -> torch.Generator:
        # One seed per step: a resumed run draws what an uninterrupted one does.
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)

    def _draw_factors(self, generator: torch.Generator) -> list[float]:
        weights = torch.tensor(self.config.scale_weights, dtype=torch.float32)
        entry = self.config.scale_factors[int(torch.multinomial(weights, 1, generator=generator))]
        position = torch.rand((), generator=generator).item()
        return [low * (high / low) ** position for low, high in entry]

    def _encode(self, encoder: EncoderSurrogate, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.encoder_dtype).contiguous(memory_format=torch.channels_last)
        return encoder.encode_images(images).float()

    def _save(self, path: Path) -> None:
        temporary = path.with_suffix(".part")
        torch.save(
            {
                "step": self.step,
                "config": json.dumps(asdict(self.config)),
                "generator": self.generator.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            },
            temporary,
        )
        temporary.replace(path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        settings, saved = json.loads(json.dumps(asdict(self.config))), json.loads(state["config"])
        changed = [key for key in settings if settings[key] != saved.get(key) and key != "output_dir"]
        if changed:
            raise ValueError(f"{path} is of a run with another {', '.join(changed)}; resume with the settings it had")
        self.generator.load_state_dict(state["generator"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]


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
