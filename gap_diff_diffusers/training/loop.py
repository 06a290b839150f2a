"""The loop that every training of this package runs in: steps, checkpoints, log, averaged weights, resuming.

Conventions are those of the diffusers examples: accelerate decides on device, processes and trackers;
checkpoints are folders `checkpoint-<step>`, of which the last few are kept.
"""

import json
import logging
import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from ..config import autocast, check_at_least, check_at_least_one, check_choices, check_types, write_json
from ..data import save_grid
from ..images import write_atomically

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.jsonl"
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Those of diffusers that need no settings besides."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every run has.

    Attributes:
        output_dir: gets the result, the training record, the log and the checkpoints.
        max_train_steps: optimizer steps, over which the learning rate runs its course.
        stop_after_steps: end earlier, as if these were all, but for the learning rate and for stages, which run their
            course over `max_train_steps`; None for not.
        train_batch_size: photos per process that a gradient is taken of.
        gradient_accumulation_steps: a step's gradient is the mean of so many.
        learning_rate: of Adam with decoupled weight decay, at its peak.
        lr_scheduler: one of `LR_SCHEDULERS`, for `diffusers.optimization.get_scheduler`.
        lr_warmup_steps: linear from 0.
        adam_beta1, adam_beta2: of Adam's averages.
        adam_weight_decay: of all parameters.
        max_grad_norm: gradients are scaled down to this norm; 0 to leave them.
        ema_decay: of the averaged weights, which are validated and returned; 0 for the last weights themselves.
        mixed_precision: "no", "bf16" or "fp16".
        allow_tf32: GPUs may round the factors of float32 products to 10 bits; faster.
        checkpointing_steps: a checkpoint every so many steps, and at the end.
        checkpoints_total_limit: how many checkpoints are kept, the last ones.
        validation_steps: held-out photos are measured every so many steps, and at the end.
        report_to: trackers of accelerate, such as "tensorboard", or "none". The log is written in any case.
        seed: of everything random; a step's draws depend on it, on the step and on the process alone.
    """

    output_dir: str
    max_train_steps: int = 8000
    stop_after_steps: int | None = None
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    mixed_precision: str = "bf16"
    allow_tf32: bool = False
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 500
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_choices(self, mixed_precision=("no", "bf16", "fp16"), lr_scheduler=LR_SCHEDULERS)
        counts = (
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
        )
        check_at_least_one(self, *counts, "stop_after_steps")
        rates = ("learning_rate", "adam_weight_decay", "max_grad_norm")
        check_at_least(0, self, "max_train_steps", "lr_warmup_steps", *rates)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} from 0 to under 1, got {getattr(self, name)}")


class TrainingLoop(ABC):
    """One run. A subclass gives the networks, what a step does and what is validated.

    Several networks can learn in turn; each has an optimizer and a schedule of its own. The first one is what the run
    is for: its weights are averaged.

    Networks are not wrapped for several processes: all start from the same weights, and `update` averages the
    gradients. So a step may call any of their methods, not `forward` alone.

    Args:
        config: the settings.
        networks: by name; moved to the device and set to training mode.
        learning_rates: by name, of networks that learn at a constant rate of their own.

    Raises:
        ImportError: the tracker of `report_to` is not installed.
        ValueError: accelerate does not know it.
    """

    def __init__(
        self,
        config: LoopConfig,
        networks: dict[str, nn.Module],
        learning_rates: dict[str, float] | None = None,
    ):
        self.config = config
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision="no",  # of which a Python process has but one; `autocast` has the run's
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
        )
        if config.report_to != "none" and not self.accelerator.log_with:
            raise ImportError(
                f"expected the package of the tracker {config.report_to}, which is not installed; install it, or set "
                "report_to to none"
            )
        self.networks = {name: network.train().to(self.accelerator.device) for name, network in networks.items()}
        first = next(iter(networks))
        self.emas = {
            first: EMAModel(networks[first].parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        }
        self.optimizers, self.schedulers = {}, {}
        for name, network in self.networks.items():
            self.optimizers[name] = torch.optim.AdamW(
                network.parameters(),
                lr=(learning_rates or {}).get(name, config.learning_rate),
                betas=(config.adam_beta1, config.adam_beta2),
                weight_decay=config.adam_weight_decay,
            )
            self.schedulers[name] = get_scheduler(
                "constant" if name in (learning_rates or {}) else config.lr_scheduler,
                self.optimizers[name],
                num_warmup_steps=config.lr_warmup_steps,
                num_training_steps=config.max_train_steps,
            )
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=config.mixed_precision == "fp16")
        self.step = 0
        self.data_digest = ""  # of what it learns, if a subclass says it: a resumed run has to have the same
        self.accumulated = 0
        self.mean_losses: dict[str, torch.Tensor] = {}  # of the step's parts, as far as they went

    free_settings: tuple[str, ...] = ()
    """That may differ when a run is resumed, for nothing in it depends on them, besides those that always may."""

    @property
    def machine(self) -> dict[str, int | str]:
        """What a record says of what computed the run: with the batch of a process, how many photos a step takes."""
        return {"num_processes": self.accelerator.num_processes, "device": self.accelerator.device.type}

    @abstractmethod
    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        """One step with this source of randomness (on the CPU), ending in `update`s; returns the figures to log.

        With `gradient_accumulation_steps` it is called so often, and the last call's `update`s move the networks.
        """

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures on held-out photos, of the weights as they are: the loop puts the averaged ones in place."""

    def train(self, *, resume: str | None = None) -> dict[str, float]:
        """Train to the end and leave the averaged weights in evaluation mode.

        Args:
            resume: the checkpoint to go on from, "latest" or its name, after which later ones are removed; None to
                begin.

        Returns:
            The last validation's figures.

        Raises:
            ValueError: nothing to resume from, a checkpoint of other settings, or one where a run shall begin.
            FloatingPointError: a loss or a gradient that is not a number; the network that it moves is as it was.
            OSError: the disk is full; the last whole checkpoint is still there.
        """
        config, main = self.config, self.accelerator.is_main_process
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if resume:
            self.load_checkpoint(find_checkpoint(self.output_dir, resume))
            later = [folder for folder in checkpoints(self.output_dir) if _step_of(folder) > self.step]
            self.accelerator.wait_for_everyone()
            for folder in later if main else []:  # of a way that this run does not go
                logger.info("removed %s", folder.name)
                shutil.rmtree(folder)
        elif checkpoints(self.output_dir):
            raise ValueError(
                f"expected an output folder without checkpoints, got {self.output_dir} of an earlier run; resume "
                "that, or choose another folder"
            )
        self.accelerator.wait_for_everyone()  # before one of them writes there
        log_path = self.output_dir / LOG_NAME
        if main:
            earlier = log_path.read_text(encoding="utf-8").splitlines() if resume and log_path.is_file() else []
            earlier = [line for line in earlier if line.endswith("}") and json.loads(line)["step"] <= self.step]
            write_atomically(log_path, "".join(line + "\n" for line in earlier).encode())
        self.accelerator.wait_for_everyone()
        if config.report_to != "none":
            settings = asdict(config).items()
            plain = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in settings}
            self.accelerator.init_trackers("training", config=plain)
        description = type(self).__name__
        progress = tqdm(
            total=config.max_train_steps, initial=self.step, disable=None if main else True, desc=description
        )
        validated: dict[str, float] = {}
        last = min(config.max_train_steps, config.stop_after_steps or config.max_train_steps)
        while self.step < last:
            figures = self._accumulate(self.step_generator())
            self.step += 1
            progress.update()
            progress.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
            if self.step % config.validation_steps == 0 or self.step == last:
                with self.averaged_weights():
                    validated = self.validate()
                figures |= validated
            if main:
                rounded = {key: round(value, 5) for key, value in figures.items()}
                with open(log_path, "a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": self.step} | rounded) + "\n")
            self.accelerator.log(figures, step=self.step)
            if self.step % config.checkpointing_steps == 0 or self.step == last:
                self.save_checkpoint()
        progress.close()
        for name, ema in self.emas.items():
            ema.copy_to(self.networks[name].parameters())
        for network in self.networks.values():
            network.eval()
        figures = validated or self.validate()
        for tracker in self.accelerator.trackers:  # not end_training, after which processes no longer talk
            tracker.finish()
        return figures

    def _accumulate(self, generator: torch.Generator) -> dict[str, float]:
        """One optimizer step: the mean figures of its parts, but for the norm, which is that of their sum."""
        count = self.config.gradient_accumulation_steps
        parts = []
        for index in range(count):
            self.accumulated = index
            parts.append(self.training_step(generator))
        self.scaler.update()  # once: what all networks have accumulated is of one scale
        means = {name: sum(part[name] for part in parts) / count for name in parts[0]}
        return means | {name: value for name, value in parts[-1].items() if name == "gradient_norm"}

    def update(self, name: str, loss: torch.Tensor) -> float:
        """Step one network down its loss; returns the gradient's norm before it is clipped.

        Where gradients are accumulated, all calls of a step but the last only add to them, and return 0.

        Raises:
            FloatingPointError: the step's loss or gradient is not a number, of whichever part and process.
        """
        network, optimizer = self.networks[name], self.optimizers[name]
        count = self.config.gradient_accumulation_steps
        if self.accumulated == 0:
            optimizer.zero_grad(set_to_none=True)
            self.mean_losses[name] = torch.zeros((), device=loss.device)
        self.mean_losses[name] += loss.detach() / count
        # Into this network alone: others that a loss goes through keep the gradient of their own.
        self.scaler.scale(loss / count).backward(inputs=list(network.parameters()))
        if self.accumulated < count - 1:  # also of a loss that is no number: other processes wait for the last part
            return 0.0
        mean = self.mean_losses[name]
        if self.accelerator.num_processes > 1:  # before unscale_, so that all see the same overflow
            mean = self.accelerator.reduce(mean, reduction="mean")
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm or math.inf)
        # In float16 gradients overflow now and then; the scaler then skips the step and halves its scale.
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not mean.isfinite() or not (norm.isfinite() or may_overflow):
            rate = optimizer.param_groups[0]["initial_lr"]
            raise FloatingPointError(
                f"the loss of {name} is {mean.item()} and its gradient {norm.item()} at step {self.step}; start anew "
                f"with a lower learning rate than {rate:.3g}, or without mixed precision"
            )
        self.scaler.step(optimizer)
        if not norm.isfinite():
            return norm.item()
        self.schedulers[name].step()
        if name in self.emas:
            self.emas[name].step(network.parameters())
        return norm.item()

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return autocast(self.accelerator.device, self.config.mixed_precision)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights in place for a while, in evaluation mode."""
        for name, ema in self.emas.items():
            ema.store(self.networks[name].parameters())
            ema.copy_to(self.networks[name].parameters())
            self.networks[name].eval()
        try:
            yield
        finally:
            for name, ema in self.emas.items():
                ema.restore(self.networks[name].parameters())
                self.networks[name].train()

    def show(self, images: torch.Tensor, columns: int = 8) -> None:
        """Save validation pictures (N,3,H,W) in [0,1] as `samples/<step>.png`, and send them to the trackers."""
        if not self.accelerator.is_main_process:
            return
        picture = save_grid(images, self.output_dir / "samples" / f"{self.step}.png", columns)
        for tracker in self.accelerator.trackers:  # each of them wants its pictures in another way
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": picture[None]}, step=self.step, dataformats="NHWC")
            elif tracker.name in ("aim", "clearml"):
                tracker.log_images({"validation": picture}, step=self.step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [picture]}, step=self.step)

    def step_generator(self) -> torch.Generator:
        """The randomness of the current step: one seed per step, so that a resumed run draws what a whole one does."""
        process = self.accelerator.process_index
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 1009 + process)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`, as a whole or not at all, and then drop those over the limit.

        It holds `state.pt` to go on from, and under its name what `from_pretrained` loads: the averaged network, if it
        is a model of diffusers.
        """
        if not self.accelerator.is_main_process:
            return
        folder = self.output_dir / f"checkpoint-{self.step}"
        temporary = folder.with_name(folder.name + ".part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        state = {
            "step": self.step,
            "config": json.dumps(asdict(self.config)),
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "emas": {name: ema.state_dict() for name, ema in self.emas.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "scaler": self.scaler.state_dict(),
            "num_processes": self.accelerator.num_processes,
            "data": self.data_digest,
        }
        try:
            with open(temporary / "state.pt", "wb") as file:
                torch.save(state, file)
            with self.averaged_weights():
                for name in self.emas:
                    if isinstance(self.networks[name], ModelMixin):
                        self.networks[name].save_pretrained(temporary / name)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # torch goes on where writing failed, and says something about positions.
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(folder)) from error
            if isinstance(error, SafetensorError):  # which is what a full disk is to it
                raise OSError(f"{folder}: {error}") from error
            raise
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        for old in checkpoints(self.output_dir)[: -self.config.checkpoints_total_limit]:
            shutil.rmtree(old)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a checkpoint. `max_train_steps` is part of the schedule, so it has to be the same, too."""
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        settings, saved = json.loads(json.dumps(asdict(self.config))), json.loads(state["config"])
        free = (
            "output_dir",
            "report_to",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
            "stop_after_steps",
            "data_description",
            "gradient_checkpointing",
            "num_validation_images",
            *self.free_settings,
        )
        changed = [key for key in sorted(settings.keys() & saved) if settings[key] != saved[key] and key not in free]
        if changed:
            changed, had = ", ".join(changed), ", ".join(f"{key} {json.dumps(saved[key])}" for key in changed)
            raise ValueError(f"{folder} is of a run with another {changed}; resume with the settings it had: {had}")
        if state.get("data", self.data_digest) != self.data_digest:
            raise ValueError(
                f"{folder} is of a run on other photos; resume with those it had, or begin in another folder"
            )
        if (count := state.get("num_processes", self.accelerator.num_processes)) != self.accelerator.num_processes:
            logger.warning(
                "%s is of %d processes, this run has %d: it will take another way",
                folder.name,
                count,
                self.accelerator.num_processes,
            )
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        for name, ema in self.emas.items():
            ema.load_state_dict(state["emas"][name])
            ema.to(self.accelerator.device)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        logger.info("resumed from %s", folder.name)


@contextmanager
def save_whole(output_dir: str | Path) -> Iterator[Path]:
    """A folder to write a result into; once all is written, it replaces what has its names in `output_dir`.

    If writing fails, nothing is replaced. Checkpoints, log and pictures stay.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "result.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for part in sorted(temporary.iterdir()):
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    temporary.rmdir()


def save_result(result: Any, record: dict[str, Any], output_dir: str | Path) -> None:
    """Write what a training made, which has `save_pretrained`, and its record beside it, as `save_whole` has it."""
    with save_whole(output_dir) as folder:
        result.save_pretrained(folder)
        write_json(folder / "training_record.json", record)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find_checkpoint(output_dir: Path, name: str = "latest") -> Path:
    """The checkpoint of a run that has this name, or its newest.

    Raises:
        ValueError: it has none, or none of this name.
    """
    found = {folder.name: folder for folder in checkpoints(output_dir)}
    if not found:
        raise ValueError(f"expected a checkpoint to resume from in {output_dir}, found none; start without resuming")
    if name == "latest":
        return list(found.values())[-1]
    if (folder := found.get(Path(name).name)) is None:
        raise ValueError(f"expected one of the checkpoints {', '.join(found)} in {output_dir}, or latest, got {name}")
    return folder
