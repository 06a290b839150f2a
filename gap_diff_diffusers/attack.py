"""`gap-diff attack`: do to photos what their owner fears, and see what comes out.

A copy of a text-to-image model learns the person on the photos, in this process and on this machine, and draws them.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from .attackers import ATTACKERS
from .config import ATTACK_RECORD, BUNDLED, PICTURES, check_outside, choose_device

logger = logging.getLogger(__name__)

CLASS_RECORD = "class_images.json"
"""What says, beside pictures of the class that were kept, how they were drawn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos of one person, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write to; new, or empty")
    parser.add_argument(
        "--method", choices=sorted(ATTACKERS), default="dreambooth", help="how the model learns (default: dreambooth)"
    )
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER|ID",
        help="text-to-image model to personalize (default: the small face model that ships)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--preset", help="named settings of the method (default: face-model for the model that ships, else weak)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings to have otherwise, such as max_train_steps=400 mixed_precision=bf16; a name that is none is "
        "answered with all of them",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="PROMPT",
        help="what to draw; {} stands for what the person is called (default: what it was trained on)",
    )
    parser.add_argument("--count", type=int, default=32, help="pictures to draw for each prompt (default: 32)")
    parser.add_argument(
        "--steps", type=int, help="of drawing each of them (default: num_inference_steps of the settings)"
    )
    parser.add_argument(
        "--class-images",
        metavar="FOLDER",
        help="pictures of the class; in a folder without any, those that the model draws are kept for the next time "
        "(default: it draws its own)",
    )
    parser.add_argument(
        "--diffusers-examples",
        "--diffusers_examples",
        metavar="CHECKOUT",
        help="with --method official:...: a checkout of diffusers, whose scripts are run (default: what "
        "gap-diff fetch-attackers downloaded)",
    )
    parser.add_argument(
        "--protect",
        action="store_true",
        help="attack the photos twice, as they are and protected by the checkpoint that ships, and compare",
    )
    parser.add_argument(
        "--transforms",
        nargs="+",
        default=[],
        metavar="TRANSFORM",
        help="what becomes of the photos before the model learns them, in this order: names such as "
        'gaussian_noising, or JSON such as \'{"name": "jpeg", "quality": 70}\'; compression and resizing of whole '
        "photos, anything else, and what follows it, of the squares that are learned",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        metavar="CLEAN",
        help="with --protect: other clean photos of the person, to look for in what is drawn (default: PHOTO itself)",
    )
    parser.add_argument("--save-model", action="store_true", help="also save what was learned, for diffusers")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for more time while the model learns"
    )
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda if there is one, else cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Train, draw, write: OUT/pictures/, OUT/contact_sheet.png, OUT/attack.json, and OUT/model/ if asked for.

    With --protect the pictures and the model are in OUT/clean/ and OUT/protected/, and OUT/figures.json says what was
    found in them: of the person only if there is a face to look for.
    """
    from .config import portable_name, provenance, write_json
    from .data import read_images, save_sheet

    output = Path(arguments.output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, got {output}")
    read = [*arguments.photos, *(arguments.reference or [])]
    for path in filter(None, (output, arguments.class_images)):
        check_outside(path, filter(os.path.isdir, read), "the folder")
    if arguments.count < 1:
        raise ValueError(f"expected --count of at least 1, got {arguments.count}")
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"expected --steps of at least 1, got {arguments.steps}")
    if arguments.reference and not arguments.protect:
        raise ValueError("--reference is for --protect; without it, gap-diff evaluate OUT --reference CLEAN measures")
    small = arguments.model == BUNDLED and "face-model" in ATTACKERS.load(arguments.method).presets
    preset = arguments.preset or ("face-model" if small else "weak")
    changes = list(arguments.set)
    if arguments.diffusers_examples:
        if not arguments.method.startswith("official:"):
            raise ValueError(f"--diffusers-examples is for the methods official:..., got {arguments.method}")
        changes.append(f"diffusers_examples={json.dumps(arguments.diffusers_examples)}")
    attacker = make_attacker(arguments.method, preset, changes)
    digest = attacker.script_digest(attacker.config)
    if arguments.save_model:
        attacker.check_saving()
    transforms = _read_transforms(arguments.transforms)
    class_photos = _read_class_photos(arguments.class_images, output)
    photos = read_images(arguments.photos)
    if arguments.reference and not _look_for_people(read_images(arguments.reference)):  # before the work, not after it
        raise ValueError(f"expected a face to look for in --reference, found none in {', '.join(arguments.reference)}")
    config = attacker.config
    steps = arguments.steps or config.num_inference_steps
    with_class = bool(getattr(config, "prior_loss_weight", 0))
    class_settings = _class_settings(config, arguments) if with_class else {}
    if class_photos and with_class:
        _warn_of_other_pictures(arguments.class_images, class_settings)
    load = partial(
        load_victim,
        arguments.model,
        arguments.device,
        revision=arguments.revision,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    surrogate = load()
    attacker.check_model(surrogate)
    if (count := len(photos)) < 3:
        logger.warning("%d photos: most attacks on people need at least three or four", count)
    shows_face = _look_for_people(photos)
    if shows_face and not _show_face(cut_squares(photos, config.resolution)):
        logger.warning(
            "no face was found in what is learned, the middle of each photo at %d px a side; crop them to the face",
            config.resolution,
        )
    has_face = shows_face or bool(arguments.reference)
    prompts = [text.replace("{}", config.subject) for text in arguments.prompts or [config.instance_prompt]]
    word = getattr(config, "rare_token", None)
    for prompt in prompts:
        if word and word not in prompt:
            logger.warning("%r lacks %s, the word that is learned for the person; {} stands for it", prompt, word)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name, memory_errors():
        folder = Path(name) / output.name
        class_images = None if class_photos is None else cut_squares(class_photos, config.resolution)
        if class_images is None and with_class and (arguments.class_images or arguments.protect):
            class_images = _draw_class(surrogate, config, arguments.class_images, class_settings)
        given = {"clean": photos, "protected": _protect(photos)} if arguments.protect else {"": photos}
        device = surrogate.denoiser.device
        conditions = {
            name: _cut_transformed(each, transforms, config.resolution, device) for name, each in given.items()
        }
        del transforms, photos, given, class_photos  # and models, which would take memory while another one learns
        rows, seconds = [], {}
        for condition, squares in conditions.items():
            surrogate = surrogate or load()  # the one before has learned the clean photos
            started = time.perf_counter()
            pipeline = attacker(surrogate, squares, class_images=class_images)
            trained = time.perf_counter()
            rows.append((f"{condition} photos".strip(), squares))
            for index, prompt in enumerate(prompts):
                pictures = attacker.draw(
                    pipeline,
                    squares,
                    prompt,
                    arguments.count,
                    num_inference_steps=steps,
                    guidance_scale=config.guidance_scale,
                    seed=config.seed,
                )
                _save_pictures(pictures, folder / condition / PICTURES, f"{index}-", config.seed)
                rows.append((f"{condition}: {prompt}".removeprefix(": "), pictures[:16]))
            finished = time.perf_counter()
            seconds[condition] = {"training": round(trained - started, 1), "drawing": round(finished - trained, 1)}
            if arguments.save_model:
                attacker.save(pipeline, folder / condition / "model")
            surrogate = pipeline = None
        save_sheet(rows, folder / "contact_sheet.png")
        record = {
            "method": arguments.method,
            "preset": preset,
            "config": asdict(config) | ({"diffusers_examples": digest} if digest else {}),
            "model": portable_name(arguments.model),
            "revision": arguments.revision,
            "photos": count,
            "transforms": arguments.transforms,
            "class_images": portable_name(arguments.class_images),
            "prompts": prompts,
            "count": arguments.count,
            "num_inference_steps": steps,
            "seconds": seconds if arguments.protect else seconds[""],
            "device": str(device),
            "versions": provenance(),
        }
        write_json(folder / ATTACK_RECORD, record)
        if output.is_dir():
            output.rmdir()  # it is empty
        folder.rename(output)
    logger.info("wrote %s", output)
    if arguments.protect:
        with memory_errors():
            _compare(output, list(conditions), arguments.reference or arguments.photos, has_face=has_face)
    return 0


def _read_transforms(specs: list[str]) -> list:
    """What is to become of photos (N,3,H,W) before they are learned; ValueError for a name or JSON that is none."""
    from .transforms import build_transform

    try:
        return [build_transform(json.loads(s) if s.startswith(("{", "[")) else s).eval() for s in specs]
    except json.JSONDecodeError as error:
        raise ValueError(f"--transforms {' '.join(specs)}: expected names or JSON, got {error}") from error


def _cut_transformed(photos: list, transforms: list, resolution: int, device):
    """Photos (3,H,W) in [0,1] after all transforms, as squares (N,3,side,side) on the CPU.

    Whole photos are published, so they are compressed and resized at their own size. What is not `publishing`, and
    what follows it, gets the squares that the attacker learns, on the device: shrinking would undo most of it.
    """
    import torch

    whole = list(itertools.takewhile(lambda transform: transform.publishing, transforms))
    with torch.no_grad():
        for transform in whole:
            photos = [transform(photo[None])[0] for photo in photos]
        squares = cut_squares(photos, resolution)
        if rest := transforms[len(whole) :]:
            squares = squares.clamp(0, 1).to(device)  # cutting overshoots
            for transform in rest:
                squares = transform.to(device)(squares)
            squares = cut_squares(squares.cpu(), resolution)  # some enlarge
    return squares


def _protect(photos: list) -> list:
    """The photos (3,H,W) in [0,1], protected by the checkpoint that ships."""
    from .data import to_tensor
    from .protect import load_pipeline

    pipeline = load_pipeline(device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return [to_tensor(image) for image in pipeline(photos).images]


def _read_class_photos(folder: str | None, output: Path) -> list | None:
    """The pictures of the class (3,H,W) in [0,1] that a folder holds; None if it is empty, or not there yet."""
    from .data import read_images

    if folder is None:
        return None
    path = Path(folder).resolve()
    if path.is_relative_to(output):
        raise ValueError(f"--class-images {folder}: expected a folder outside of the output {output}")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--class-images {folder}: expected a folder of pictures, got something else")
    return read_images([path]) if path.is_dir() and any(path.iterdir()) else None


def _class_settings(config, arguments: argparse.Namespace) -> dict:
    """What decides on the pictures of the class that a model draws, as far as it is known without loading it."""
    from .config import portable_name

    names = ("class_prompt", "num_class_images", "resolution", "num_inference_steps", "guidance_scale")
    model = {"model": portable_name(arguments.model), "revision": arguments.revision}
    return model | {name: getattr(config, name) for name in names}


def _warn_of_other_pictures(folder: str, settings: dict) -> None:
    """Warn if the pictures that a folder keeps were drawn otherwise; those without a record are somebody's own."""
    path = Path(folder, CLASS_RECORD)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if other := [f"{name} {kept.get(name)!r}, now {now!r}" for name, now in settings.items() if kept.get(name) != now]:
        logger.warning(
            "%s: its pictures were drawn with %s; name a new folder to have them drawn anew", folder, "; ".join(other)
        )


def _draw_class(surrogate, config, folder: str | None, settings: dict):
    """Pictures of the class (M,3,side,side) in [0,1], in 8 bits, that the model draws; a folder keeps all or none."""
    from .config import write_json
    from .data import round_to_8_bits
    from .finetuning import draw_class_images

    pictures = round_to_8_bits(draw_class_images(surrogate, config))
    if folder is not None:
        path = Path(folder).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as name:
            _save_pictures(pictures, Path(name, path.name), "class-", 0)
            write_json(Path(name, path.name, CLASS_RECORD), settings)
            if path.is_dir():
                path.rmdir()  # it is empty
            Path(name, path.name).rename(path)
    return pictures


def _save_pictures(pictures, folder: Path, prefix: str, seed: int) -> None:
    from .data import to_pil

    folder.mkdir(parents=True, exist_ok=True)
    for offset, picture in enumerate(pictures):
        to_pil(picture).save(folder / f"{prefix}{seed + offset:04d}.png")


def _compare(output: Path, conditions: list[str], reference: list[str], *, has_face: bool) -> None:
    """Measure what was drawn, and if there is a face to look for, look for it; or else say what to install."""
    from .evaluate import evaluate
    from .metrics import OFFLINE

    folders = [str(output / condition) for condition in conditions]
    metrics = [name for name in OFFLINE if has_face or name != "identity"]
    try:
        evaluate(folders, reference, metrics=metrics, output=output / "figures.json")
    except ImportError as error:
        logger.warning("the pictures are there, their figures are not: %s", error)


def load_victim(
    model: str, device: str | None = None, *, revision: str | None = None, gradient_checkpointing: bool = False
):
    """The surrogate of a text-to-image model, on a device (default: cuda if there is one, else cpu).

    Raises:
        ValueError: it is none, or the device cannot be used.
    """
    from .surrogates import load_surrogate
    from .surrogates.base import DiffusionSurrogate

    device = choose_device(device)
    try:
        with memory_errors():
            surrogate = load_surrogate(model, revision=revision, gradient_checkpointing=gradient_checkpointing)
    except (ValueError, OSError) as error:
        lacks_folder = Path(model).is_dir() and not Path(model, "text_encoder").is_dir()
        if "text_encoder" not in str(error) and not lacks_folder:
            raise
        raise ValueError(
            f"{model}: expected a text-to-image model with a text encoder, got one whose components cannot be loaded "
            f"({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(surrogate, DiffusionSurrogate) or not len(surrogate.text_encoders):
        raise ValueError(f"{model}: expected a text-to-image model with a text encoder, got none")
    with memory_errors():
        return surrogate.to(device)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, running out of memory, on any device, is an OSError that says what to lower."""
    import torch

    from .attackers.base import says_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error) or "no more of it"
        if not says_out_of_memory(text) and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        raise OSError(
            f"out of memory ({text.splitlines()[0]}); lower it with gradient checkpointing, a smaller resolution, "
            "where something learns also mixed_precision bf16, train_batch_size 1 and prior_batch_size 1, "
            "or the method lora"
        ) from error


def make_attacker(method: str, preset: str, changes: list[str]):
    """The attacker with its settings, some of them given as NAME=VALUE; ValueError for one that is none."""
    attacker = ATTACKERS.load(method)
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        known = [setting.name for setting in fields(attacker.config_class)]
        if not equals or name not in known:
            raise ValueError(f"expected --set NAME=VALUE with one of {', '.join(known)}, got {change!r}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
    return attacker(preset, **values)


def _look_for_people(photos: list) -> bool:
    """Whether the photos show a face, or there is no detector to say so; warns of none, and of several people."""
    from .recognition import DlibFaces

    try:
        DlibFaces().reference(photos)
    except ImportError:
        return True
    except ValueError:
        logger.warning("no face was found in %d photos; what is drawn can then not be compared with them", len(photos))
        return False
    return True


def _show_face(photos) -> bool:
    """Whether one of the photos (N,3,H,W) in [0,1] shows a face, or there is no detector to say so."""
    from .recognition import DlibFaces

    try:
        return bool(DlibFaces().largest_faces(photos.clamp(0, 1)))
    except ImportError:
        return True


def cut_squares(images: list, resolution: int):
    """The centers of photos of any sizes, at one side: (N,3,side,side)."""
    import torch

    from .finetuning import center_square

    return torch.cat([center_square(image[None], resolution) for image in images])
