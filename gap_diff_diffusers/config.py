"""Configs as dataclasses, from flags and JSON; what every record that we write says about its making."""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import __version__

BUNDLED = "bundled"
"""The name of the small face model that ships with the package, wherever a diffusion model or an encoder is asked for.

Where the generator itself is, as `init_from` of its training, it names `BUNDLED_CHECKPOINT`.
"""
BUNDLED_FACE_MODEL = Path(__file__).parent / "checkpoints" / "face-model"
"""Where it is: a `StableDiffusionPipeline` whose autoencoder can be misled as those of real models."""
BUNDLED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "gap-diff"
"""The weights of the generator that ship: a `GAPDiffProtectionPipeline`."""
ATTACK_RECORD = "attack.json"
"""What `gap-diff attack` writes last: it says that the folder is whole."""
PICTURES = "pictures"
"""Where it writes what was drawn, below its folder."""

LIBRARIES = ("torch", "diffusers", "kornia", "numpy", "pillow", "safetensors")


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add a flag per field of a config dataclass: lists take several values, other structures JSON or a word.

    A flag that takes a number takes a fraction, too, such as 8/255.
    """
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        options: dict = {"default": argparse.SUPPRESS}
        optional = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        if type(None) in typing.get_args(hint):
            hint = optional[0]
        if typing.get_origin(hint) is tuple:
            kind = typing.get_args(hint)[0]
            options |= {"type": json.loads if kind is bool else kind, "nargs": "+"}
        elif hint is bool:
            options |= {"type": json.loads, "nargs": "?", "const": True}
        else:
            options["type"] = number if hint is float else hint if hint in (str, int) else _json_or_word
        parser.add_argument(f"--{field.name}", **options)


def training_parser(description: str | None, config_class: type) -> argparse.ArgumentParser:
    """The flags that every training script has: a config file, resuming, and a flag per setting."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="JSON file with any of the settings below")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="latest",
        help="continue the run in --output_dir, from its last checkpoint or from that of this name (checkpoint-400)",
    )
    add_config_arguments(parser, config_class)
    return parser


def number(text: str) -> float:
    """A number as people write it: 0.5, 1e-4, or a fraction such as 8/255; ValueError for another text."""
    numerator, slash, denominator = text.partition("/")
    divisor = float(denominator) if slash else 1.0
    if divisor == 0:
        raise ValueError(f"expected a number, got {text}, a division by 0")
    return float(numerator) / divisor


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def config_from_arguments(config_class: type, arguments: argparse.Namespace, path: str | os.PathLike | None = None):
    """Build a config dataclass from a JSON file and from flags, which win.

    Raises:
        ValueError: an unknown key in the file (the known ones are named), a fraction that is none, or a field that
            neither gives.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except ValueError as error:  # of JSON, or of its encoding
        raise ValueError(f"{path}: expected settings as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of settings, got {type(values).__name__}")
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}")
    values |= {name: value for name, value in vars(arguments).items() if name in fields}
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"expected {', '.join('--' + name for name in missing)}, or the key in the config file")
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        if isinstance(value, list) and (hints[name] is tuple or typing.get_origin(hints[name]) is tuple):
            values[name] = tuple(value)
        elif isinstance(value, str) and "/" in value and hints[name] in (float, float | None):
            try:
                values[name] = number(value)
            except ValueError as error:
                raise ValueError(f"expected {name} as a number or a fraction such as 8/255, got {value!r}") from error
    return config_class(**values)


def check_choices(config: object, **choices: tuple[str, ...]) -> None:
    """ValueError if a setting is none of its choices."""
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"expected {name} one of {', '.join(known)}, got {value!r}")


def check_at_least(least: float, config: object, *names: str) -> None:
    """ValueError if one of these settings, or one in such a list, is under `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple | list) else [value]
        if any(v is not None and v < least for v in values):
            raise ValueError(f"expected {name} of at least {least}, got {value}")


def check_at_least_one(config: object, *names: str) -> None:
    """ValueError if one of these settings is under 1; None passes."""
    check_at_least(1, config, *names)


def check_types(config: object) -> None:
    """ValueError if a number, a word or a flag among the settings is something else, or not a list where one belongs.

    Whole numbers are floats, too.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        known = tuple(kind for kind in typing.get_args(hint) or (hint,) if kind in (str, int, float, bool, type(None)))
        if not known:
            continue
        many = typing.get_origin(hint) is tuple
        values = value if many and isinstance(value, tuple | list) else [value]
        fit = all(type(v) in known or (type(v) is int and float in known) for v in values)
        finite = all(math.isfinite(v) for v in values if isinstance(v, float))
        if not fit or not finite or (many and values is not value):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in known)
            raise ValueError(
                f"expected {field.name} {'as a list of' if many else 'of type'} {expected}, got {value!r}"
            )


def check_outside(
    path: str | os.PathLike,
    folders: Iterable[str | os.PathLike],
    what: str = "the output",
    of: str = "the input folder",
) -> None:
    """ValueError if a path is one of the folders to read, or lies in one: what is there would be taken for a photo."""
    place = Path(path).resolve()
    for folder in folders:
        if place.is_relative_to(known := Path(folder).resolve()):
            where = "is" if place == known else "lies in"
            raise ValueError(f"{what} {path} {where} {of} {folder}; choose a folder outside of it")


def portable_name(value: str | None) -> str | None:
    """What a record says of a file, folder or Hub id: the last part of a path on this machine, an id as it is."""
    if value is None or not (Path(value).is_absolute() or Path(value).exists()):
        return value
    return Path(value).resolve().name


def locate_model(model: str | Path) -> str | Path:
    """Where a model that somebody names is: the face model that ships for "bundled", or else as it is named."""
    return BUNDLED_FACE_MODEL if model == BUNDLED else model


def initial_weights(path: str | None) -> dict[str, Any] | str:
    """What a record says of the weights that a training began with: their own record, or their name, or "random"."""
    path = str(locate_model(path)) if path else None
    earlier = Path(path, "training_record.json") if path else None
    if earlier and earlier.is_file():
        return json.loads(earlier.read_text(encoding="utf-8"))
    return portable_name(path) or "random"


def portable_settings(config: Any, *paths: str) -> dict[str, Any]:
    """The config of a training as its record states it: as JSON has it, and without folders of this machine.

    `paths` names its settings that are a path or several, besides those that say which photos it takes.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    del settings["output_dir"]
    for key in ("train_data_dir", "dataset_name", *paths):
        value = settings[key]
        settings[key] = [portable_name(v) for v in value] if isinstance(value, list) else portable_name(value)
    return settings


def choose_device(device: str | None = None) -> str:
    """This device, or cuda if there is one, else cpu; ValueError for one that cannot be used here."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} cannot be used here ({reason}); leave --device out to use what there is"
        ) from error
    return device


def autocast(device, mixed_precision: str):
    """The context in which torch computes in this precision on this `torch.device`; "no" leaves all as it is."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def provenance() -> dict:
    """Versions of this package, Python and the libraries that decide a result, the platform, and the git commit.

    `commit` is there only if the package runs from its git checkout; a `+` after it stands for changes since.
    """
    record = {"gap_diff_diffusers": __version__, "python": platform.python_version()}
    record |= {library: _version(library) for library in LIBRARIES}
    record["platform"] = platform.platform()
    commit = _git_commit()
    return record | ({"commit": commit} if commit else {})


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)  # from its metadata: the library itself need not be imported
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def finite(value: float) -> float | None:
    """A figure as JSON can have it: None for NaN or infinity, such as the PSNR of a photo that did not change."""
    return value if math.isfinite(value) else None


def write_json(path: str | os.PathLike, data: object) -> None:
    """Write `data` as indented JSON, through a temporary file and a rename.

    Raises:
        ValueError: NaN or infinity, which JSON does not have; write None.
    """
    from .images import write_atomically

    write_atomically(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A titled markdown table."""
    lines = [title, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
