"""`gap-diff attack`: do to photos what their owner fears, and see what comes out.

A copy of a text-to-image model learns the person on the photos, in this process and on this machine, and draws them.
"""

import argparse
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .attackers import ATTACKERS
from .config import ATTACK_RECORD, BUNDLED, PICTURES, choose_device

logger = logging.getLogger(__name__)


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
        "--prompts", nargs="+", metavar="PROMPT", help="what to draw (default: what it was trained on)"
    )
    parser.add_argument("--count", type=int, default=32, help="pictures to draw for each prompt (default: 32)")
    parser.add_argument(
        "--class-images", metavar="FOLDER", help="pictures of the class (default: the model draws its own)"
    )
    parser.add_argument("--save-model", action="store_true", help="also save what was learned, for diffusers")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda if there is one, else cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Train, draw, write: OUT/pictures/, OUT/contact_sheet.png, OUT/attack.json, and OUT/model/ if asked for."""
    from dataclasses import asdict

    from .config import portable_name, provenance, write_json
    from .data import read_images, save_grid, to_pil

    output = Path(arguments.output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, got {output}")
    if arguments.count < 1:
        raise ValueError(f"expected --count of at least 1, got {arguments.count}")
    small = arguments.model == BUNDLED and "face-model" in ATTACKERS.load(arguments.method).presets
    preset = arguments.preset or ("face-model" if small else "weak")
    attacker = make_attacker(arguments.method, preset, arguments.set)
    digest = attacker.script_digest(attacker.config)
    if arguments.save_model:
        attacker.check_saving()
    photos = read_images(arguments.photos)
    class_photos = read_images([arguments.class_images]) if arguments.class_images else None
    config = attacker.config
    squares = cut_squares(photos, config.resolution)
    class_images = None if class_photos is None else cut_squares(class_photos, config.resolution)
    surrogate = load_victim(arguments.model, arguments.device, revision=arguments.revision)
    if len(squares) < 3:
        logger.warning("%d photos: most attacks on people need at least three or four", len(squares))
    _look_for_people(photos)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name, memory_errors():
        folder = Path(name) / output.name
        (folder / PICTURES).mkdir(parents=True)
        started = time.perf_counter()
        pipeline = attacker(surrogate, squares, class_images=class_images)
        trained = time.perf_counter()
        prompts = arguments.prompts or [config.instance_prompt]
        rows = [squares]
        for index, prompt in enumerate(prompts):
            pictures = attacker.draw(
                pipeline,
                squares,
                prompt,
                arguments.count,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
            )
            for offset, picture in enumerate(pictures):
                to_pil(picture).save(folder / PICTURES / f"{index}-{config.seed + offset:04d}.png")
            rows.append(pictures[:16])
        finished = time.perf_counter()
        columns = min(8, max(map(len, rows)))
        save_grid(_fill_rows(rows, columns), folder / "contact_sheet.png", columns)
        if arguments.save_model:
            attacker.save(pipeline, folder / "model")
        record = {
            "method": arguments.method,
            "preset": preset,
            "config": asdict(config) | ({"diffusers_examples": digest} if digest else {}),
            "model": portable_name(arguments.model),
            "revision": arguments.revision,
            "photos": len(squares),
            "class_images": portable_name(arguments.class_images),
            "prompts": prompts,
            "count": arguments.count,
            "seconds": {"training": round(trained - started, 1), "drawing": round(finished - trained, 1)},
            "device": str(surrogate.denoiser.device),
            "versions": provenance(),
        }
        write_json(folder / ATTACK_RECORD, record)
        if output.is_dir():
            output.rmdir()  # it is empty
        folder.rename(output)
    logger.info("wrote %s", output)
    return 0


def load_victim(model: str, device: str | None = None, *, revision: str | None = None):
    """The surrogate of a text-to-image model, on a device (default: cuda if there is one, else cpu).

    Raises:
        ValueError: it is none, or the device cannot be used.
    """
    from .surrogates import load_surrogate
    from .surrogates.base import DiffusionSurrogate

    device = choose_device(device)
    surrogate = load_surrogate(model, revision=revision)
    if not isinstance(surrogate, DiffusionSurrogate) or not len(surrogate.text_encoders):
        raise ValueError(f"{model}: expected a text-to-image model with a text encoder, got none")
    with memory_errors():
        return surrogate.to(device)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, running out of memory, on any device, is an OSError that says what to lower."""
    import torch

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        telling = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in text.lower() for words in telling):
            raise
        raise OSError(
            f"out of memory ({text.splitlines()[0]}); lower it with --set mixed_precision=bf16 train_batch_size=1 "
            "prior_batch_size=1 or a smaller resolution, or use --method lora"
        ) from error


def make_attacker(method: str, preset: str, changes: list[str]):
    """The attacker with its settings, some of them given as NAME=VALUE; ValueError for one that is none."""
    attacker = ATTACKERS.load(method)
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in attacker.config_class.__dataclass_fields__:
            known = ", ".join(attacker.config_class.__dataclass_fields__)
            raise ValueError(f"expected --set NAME=VALUE with one of {known}, got {change!r}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
    return attacker(preset, **values)


def _look_for_people(photos: list) -> None:
    """Warn if the photos show no face, or those of several people; not without a detector."""
    from .recognition import DlibFaces

    try:
        DlibFaces().reference(photos)
    except ImportError:
        return
    except ValueError:
        logger.warning("no face was found in %d photos; what is drawn can then not be compared with them", len(photos))


def cut_squares(images: list, resolution: int):
    """The centers of photos of any sizes, at one side: (N,3,side,side)."""
    import torch

    from .finetuning import center_square

    return torch.cat([center_square(image[None], resolution) for image in images])


def _fill_rows(rows: list, columns: int):
    """Pictures one after the other, each of these rows filled up with white ones to the end of its last line."""
    import torch

    filled = [torch.cat([row, torch.ones(-len(row) % columns, *row.shape[1:])]) for row in rows]
    return torch.cat(filled)
