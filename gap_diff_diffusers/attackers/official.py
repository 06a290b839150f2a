"""The example scripts of diffusers as attackers, unmodified, each run by `accelerate launch`.

They are in no package. Either `diffusers_examples` is a checkout of diffusers, or `fetch_scripts` has downloaded the
few files of one of the `RELEASES`; a script needs a diffusers as new as itself or newer. They import torchvision.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from packaging.version import Version

from ..config import check_choices
from ..data import to_pil
from ..download import cache_folder, fetch_file
from ..finetuning import FACE_MODEL_SETTINGS, DreamBoothConfig, center_square, check_draws, draw_class_images
from ..surrogates.base import DiffusionSurrogate
from .base import Attacker, says_out_of_memory

logger = logging.getLogger(__name__)

URL = "https://raw.githubusercontent.com/huggingface/diffusers/{tag}/examples/{script}"
RELEASES = {  # tag: {script: sha256}
    "v0.40.0": {
        "custom_diffusion/train_custom_diffusion.py": (
            "6f50919e30bf68364eccce2c4018acaccf9fbfec906d0c994984fa9015bf0053"
        ),
        "dreambooth/train_dreambooth.py": "4474ee28643acdc3b5e6fa01c1b3d97df55b754b7cbd88f48e9253fb4ea82803",
        "dreambooth/train_dreambooth_lora.py": "97cf38b184cad2cc39e414f79b3f1a70cec3b97883350a4d2a3aa0e2533d7883",
        "dreambooth/train_dreambooth_lora_sdxl.py": (
            "88ffa83ccf7f45fb79fb7fc7fd23bf49ba87a5ba8b011ae295dd0b57fdd5ddfa"
        ),
        "textual_inversion/textual_inversion.py": "117c575fb59a1150dd0e95faab23d92eb9031b55e2e9f4f63413647fa1f14a99",
    }
}
"""The releases of diffusers whose scripts `fetch_scripts` takes, and what they must be."""


def scripts_folder(tag: str) -> Path:
    """Where the scripts of a release lie once they are fetched, as in a checkout."""
    return cache_folder(f"diffusers-{tag}")


def fetch_scripts(tag: str | None = None, *, url: str = URL) -> Path:
    """Download the scripts of a release, if they are not there, and return their folder.

    Args:
        tag: one of `RELEASES`; None for the newest that the installed diffusers can run.
        url: where from, with {tag} and {script}.

    Raises:
        ValueError: no such release, or none that fits.
        OSError: the network fails, or a file is not what it must be; then nothing of it is kept.
    """
    from diffusers import __version__

    if tag is None:
        fitting = [known for known in RELEASES if Version(known) <= Version(__version__)]
        if not fitting:
            raise ValueError(f"expected diffusers of at least {min(RELEASES)}, got {__version__}; upgrade it")
        tag = max(fitting, key=Version)
    if tag not in RELEASES:
        raise ValueError(f"expected a release {', '.join(RELEASES)}, got {tag!r}")
    folder = scripts_folder(tag)
    for script, digest in RELEASES[tag].items():
        address = url.format(tag=tag, script=script)
        fetch_file(address, folder / "examples" / script, digest, instead="use a checkout of diffusers")
    return folder


@dataclass(frozen=True, kw_only=True)
class OfficialConfig(DreamBoothConfig):
    """Settings of DreamBooth, and these. The scripts draw as many pictures of the class as photos in a batch.

    Attributes:
        diffusers_examples: a checkout of diffusers; None for what `fetch_scripts` downloaded.
        initializer_token: of textual inversion and Custom Diffusion, the word that the new one begins as.
        rank: of LoRA.
        extra_arguments: further flags for the script, as they stand.
    """

    diffusers_examples: str | None = None
    initializer_token: str = "person"
    rank: int = 4
    extra_arguments: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, train_text_encoder=("no", "yes"))
        if not isinstance(self.extra_arguments, tuple):
            raise ValueError(f"expected extra_arguments as a list of words, got {self.extra_arguments!r}")
        if self.text_learning_rate is not None:
            raise ValueError(f"expected no text_learning_rate, which the scripts lack, got {self.text_learning_rate}")


class OfficialAttacker(Attacker):
    """One script: what it is told, and how diffusers loads what it writes.

    Raises, besides what every attacker does, when called:
        MemoryError: the script said that memory ran out, or was killed, as systems do then.
        OSError: it failed otherwise.
        ImportError: it needs torchvision.
    """

    config_class = OfficialConfig
    script: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    with_prior: ClassVar[bool] = True

    def __call__(
        self,
        surrogate: DiffusionSurrogate,
        images: torch.Tensor,
        *,
        class_images: torch.Tensor | None = None,
        progress: bool = True,
    ) -> DiffusionPipeline:
        script = self.find_script()
        self.check_model(surrogate)
        config = self.config
        if config.prior_loss_weight and self.with_prior and class_images is None:
            class_images = draw_class_images(surrogate, config)
        with tempfile.TemporaryDirectory(prefix="gap-diff-") as name:
            workspace = Path(name)
            surrogate.pipeline.save_pretrained(workspace / "model")
            _save(images, config.resolution, workspace / "photos")
            if class_images is not None:
                _save(class_images, config.resolution, workspace / "class")
                config = replace(config, num_class_images=len(class_images))
            device = surrogate.denoiser.device
            cpu = device.type == "cpu"
            command = [sys.executable, "-m", "accelerate.commands.launch", *(["--cpu"] if cpu else [])]
            command += ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
            command += ["--mixed_precision", config.mixed_precision, str(script), *self.flags(workspace, config)]
            if surrogate.denoiser.is_gradient_checkpointing:
                command.append("--gradient_checkpointing")
            logger.info("running %s", script)
            environment = _environment(device)
            surrogate.to("cpu")  # the script needs the memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                code, said = _run(command, show=progress, cwd=workspace, env=environment)
            finally:
                surrogate.to(device)
            if code:
                # What the script said last stands before the launcher's own traceback.
                lines = said.rpartition("Traceback (most recent call last)")[0].strip().splitlines()
                if code == -9 or "Signals.SIGKILL" in said:  # the launcher, or what it launched
                    raise MemoryError(f"{script.name} was killed, as systems do when memory runs out")
                if telling := [line for line in lines if says_out_of_memory(line)]:
                    raise MemoryError(f"{script.name}: {telling[-1]}")
                raise OSError(f"{script.name} ended with exit code {code}: {(lines or ['it said nothing'])[-1]}")
            return self.load(surrogate, workspace / "result")

    @classmethod
    def script_digest(cls, config: OfficialConfig) -> str:
        attacker = cls(**vars(config))
        return hashlib.sha256(attacker.find_script().read_bytes()).hexdigest()[:16]

    def check_model(self, surrogate: DiffusionSurrogate) -> None:
        check_draws(surrogate)
        if not isinstance(surrogate.pipeline, self.pipeline_class):
            raise ValueError(
                f"{surrogate.name}: expected a {self.pipeline_class.__name__} for {self.script}, got a "
                f"{type(surrogate.pipeline).__name__}; use another script, or a method that is not official:..."
            )

    def find_script(self) -> Path:
        """The script; ValueError that says where it was looked for, ImportError if it needs what is missing."""
        given = self.config.diffusers_examples
        fetched = [scripts_folder(tag) for tag in sorted(RELEASES, key=Version, reverse=True)]
        places = [Path(given)] if given else fetched
        for folder in places:
            for path in (folder / "examples" / self.script, folder / self.script):
                if path.is_file():
                    if "torchvision" in path.read_text(encoding="utf-8") and not _has_torchvision():
                        raise ImportError(
                            f"{path.name} needs torchvision, which is not there; install the build of it that belongs "
                            f"to torch {torch.__version__}, or take a method that is not official:..."
                        )
                    return path.resolve()
        raise ValueError(
            f"expected {self.script} in {places[0]}, found none; run gap-diff fetch-attackers, or set "
            "diffusers_examples to a checkout of diffusers"
        )

    def flags(self, workspace: Path, config: OfficialConfig) -> list[str]:
        """The script's command line."""
        flags = {
            "pretrained_model_name_or_path": workspace / "model",
            "output_dir": workspace / "result",
            "resolution": config.resolution,
            "max_train_steps": config.max_train_steps,
            "train_batch_size": config.train_batch_size,
            "learning_rate": config.learning_rate,
            "lr_scheduler": config.lr_scheduler,
            "adam_weight_decay": config.adam_weight_decay,
            "seed": config.seed,
            "checkpointing_steps": config.max_train_steps + 1,
            "mixed_precision": config.mixed_precision,
        }
        flags |= self.method_flags(workspace, config)
        text = [part for name, value in flags.items() for part in _flag(name, value)]
        return [*text, *config.extra_arguments]

    def method_flags(self, workspace: Path, config: OfficialConfig) -> dict[str, Any]:
        """What DreamBooth-like scripts are told besides; True is a flag alone."""
        flags: dict[str, Any] = {
            "max_grad_norm": config.max_grad_norm,
            "instance_data_dir": workspace / "photos",
            "instance_prompt": config.instance_prompt,
            "center_crop": True,
        }
        if config.prior_loss_weight and self.with_prior:
            flags |= {
                "with_prior_preservation": True,
                "class_data_dir": workspace / "class",
                "class_prompt": config.class_prompt,
                "num_class_images": config.num_class_images,
                "prior_loss_weight": config.prior_loss_weight,
            }
        return flags

    @abstractmethod
    def load(self, surrogate: DiffusionSurrogate, folder: Path) -> DiffusionPipeline:
        """The surrogate's pipeline with what was learned in it."""


class OfficialDreamBooth(OfficialAttacker):
    """`train_dreambooth.py`."""

    script = "dreambooth/train_dreambooth.py"
    presets: ClassVar = {
        "weak": OfficialConfig(),
        "strong": OfficialConfig(learning_rate=5e-6, max_train_steps=800, train_text_encoder="no"),
        "face-model": OfficialConfig(**FACE_MODEL_SETTINGS, learning_rate=4e-4, train_text_encoder="no"),
    }

    def method_flags(self, workspace: Path, config: OfficialConfig) -> dict[str, Any]:
        return super().method_flags(workspace, config) | {"train_text_encoder": config.train_text_encoder == "yes"}

    def load(self, surrogate: DiffusionSurrogate, folder: Path) -> DiffusionPipeline:
        learned = type(surrogate.pipeline).from_pretrained(folder, dtype=torch.float32)
        for name in ("unet", "text_encoder"):
            getattr(surrogate.pipeline, name).load_state_dict(getattr(learned, name).state_dict())
        return surrogate.pipeline


class OfficialLoRA(OfficialAttacker):
    """`train_dreambooth_lora.py`."""

    script = "dreambooth/train_dreambooth_lora.py"
    presets: ClassVar = {
        "weak": OfficialConfig(learning_rate=1e-4, max_train_steps=500, train_text_encoder="no"),
        "strong": OfficialConfig(learning_rate=1e-4, max_train_steps=1000, train_text_encoder="yes"),
        "face-model": OfficialConfig(**FACE_MODEL_SETTINGS, rank=16, learning_rate=2e-3, train_text_encoder="no"),
    }

    def method_flags(self, workspace: Path, config: OfficialConfig) -> dict[str, Any]:
        learns_text = config.train_text_encoder == "yes"
        return super().method_flags(workspace, config) | {"rank": config.rank, "train_text_encoder": learns_text}

    def load(self, surrogate: DiffusionSurrogate, folder: Path) -> DiffusionPipeline:
        surrogate.pipeline.load_lora_weights(folder)
        surrogate.pipeline.fuse_lora()
        surrogate.pipeline.unload_lora_weights()
        return surrogate.pipeline


class OfficialLoRASDXL(OfficialLoRA):
    """`train_dreambooth_lora_sdxl.py`."""

    script = "dreambooth/train_dreambooth_lora_sdxl.py"
    pipeline_class = StableDiffusionXLPipeline


class OfficialTextualInversion(OfficialAttacker):
    """`textual_inversion.py`."""

    script = "textual_inversion/textual_inversion.py"
    with_prior = False
    presets: ClassVar = {
        name: OfficialConfig(
            instance_prompt="a photo of <person>",
            rare_token="<person>",
            prior_loss_weight=0.0,
            train_batch_size=4,
            learning_rate=2e-3,
            max_train_steps=steps,
        )
        for name, steps in (("weak", 3000), ("strong", 5000))
    }
    presets["face-model"] = replace(presets["weak"], **FACE_MODEL_SETTINGS, learning_rate=1e-2)

    def method_flags(self, workspace: Path, config: OfficialConfig) -> dict[str, Any]:
        return {
            "train_data_dir": workspace / "photos",
            "placeholder_token": config.rare_token,
            "initializer_token": config.initializer_token,
            "learnable_property": "object",
            "center_crop": True,
            "save_steps": config.max_train_steps + 1,
        }

    def load(self, surrogate: DiffusionSurrogate, folder: Path) -> DiffusionPipeline:
        surrogate.pipeline.load_textual_inversion(folder / "learned_embeds.safetensors")
        return surrogate.pipeline


class OfficialCustomDiffusion(OfficialAttacker):
    """`train_custom_diffusion.py`."""

    script = "custom_diffusion/train_custom_diffusion.py"
    presets: ClassVar = {
        name: OfficialConfig(
            instance_prompt="a photo of <new1> person",
            rare_token="<new1>",
            learning_rate=learning_rate,
            max_train_steps=steps,
            extra_arguments=arguments,
        )
        for name, learning_rate, steps, arguments in (
            ("weak", 4e-5, 250, ()),
            ("strong", 2e-5, 1000, ("--freeze_model", "crossattn", "--noaug")),
        )
    }
    presets["face-model"] = replace(presets["strong"], **FACE_MODEL_SETTINGS, learning_rate=1e-3)

    def method_flags(self, workspace: Path, config: OfficialConfig) -> dict[str, Any]:
        tokens = {"modifier_token": config.rare_token, "initializer_token": config.initializer_token}
        return super().method_flags(workspace, config) | tokens

    def load(self, surrogate: DiffusionSurrogate, folder: Path) -> DiffusionPipeline:
        # Its attention processors are of a kind that `load_attn_procs` no longer loads, so the weights are put where
        # they belong in an ordinary UNet.
        learned = safetensors.torch.load_file(folder / "pytorch_custom_diffusion_weights.safetensors")
        weights = dict(surrogate.denoiser.named_parameters())
        for name, value in learned.items():
            place = name.replace(".processor.", ".").replace("_custom_diffusion", "")
            if place not in weights:
                raise OSError(f"{self.script} wrote {name}, for which there is no place in the UNet")
            weights[place].data.copy_(value)
        surrogate.pipeline.load_textual_inversion(folder / f"{self.config.rare_token}.safetensors")
        return surrogate.pipeline


@functools.cache
def _has_torchvision() -> bool:
    """Whether the interpreter that runs the scripts finds it."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is None)"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def _run(command: list[str], *, show: bool, **options: Any) -> tuple[int, str]:
    """Run a command to its end: its exit code, and the last of its standard error, which can be shown as it comes."""
    said, decode = "", codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options) as process:
        try:
            while part := process.stderr.read1():
                text = decode(part)
                said = (said + text)[-50_000:]
                if show:
                    sys.stderr.write(text)
                    sys.stderr.flush()
        except BaseException:
            process.kill()
            raise
    return process.returncode, said


def _environment(device: torch.device) -> dict[str, str]:
    """This process's, without its place among others launched with it, and with the surrogate's GPU alone."""
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
    hidden = (*place, "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    if device.type == "cuda":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return environment


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] * value
    return [f"--{name}", str(value)]


def _save(images: torch.Tensor, resolution: int, folder: Path) -> None:
    """As PNGs, for the scripts trip over any other file in their folder."""
    folder.mkdir()
    for index, image in enumerate(images):
        to_pil(center_square(image[None], resolution)[0]).save(folder / f"{index:04d}.png")
