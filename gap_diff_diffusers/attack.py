"""`gap-diff attack`: do to photos what their owner fears, and see what comes out.

A copy of a text-to-image model learns the person on the photos, in this process and on this machine, and draws them.
"""

import argparse
import json
import logging
import time
from pathlib import Path

from .attackers import ATTACKERS
from .config import ATTACK_RECORD, PICTURES

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos of one person, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write to; new, or empty")
    parser.add_argument(
        "--method", choices=sorted(ATTACKERS), default="dreambooth", help="how the model learns (default: dreambooth)"
    )
    parser.add_argument("--model", required=True, metavar="FOLDER|ID", help="text-to-image model to personalize")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--preset", default="weak", help="named settings of the method (default: weak)")
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

    import torch

    from .config import portable_name, provenance, write_json
    from .data import read_images, save_grid, to_pil
    from .finetuning import generate_images
    from .surrogates import load_surrogate
    from .surrogates.base import DiffusionSurrogate

    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, got {output}")
    if arguments.count < 1:
        raise ValueError(f"expected --count of at least 1, got {arguments.count}")
    photos = read_images(arguments.photos)
    class_photos = read_images([arguments.class_images]) if arguments.class_images else None
    attacker = make_attacker(arguments.method, arguments.preset, arguments.set)
    config = attacker.config
    squares = _squares(photos, config.resolution)
    class_images = None if class_photos is None else _squares(class_photos, config.resolution)
    surrogate = load_surrogate(arguments.model, revision=arguments.revision)
    if not isinstance(surrogate, DiffusionSurrogate) or not len(surrogate.text_encoders):
        raise ValueError(f"{arguments.model}: expected a text-to-image model with a text encoder, got none")
    surrogate.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if len(squares) < 3:
        logger.warning("%d photos: most attacks on people need at least three or four", len(squares))
    _look_for_people(photos)
    started = time.perf_counter()
    try:
        pipeline = attacker(surrogate, squares, class_images=class_images)
        trained = time.perf_counter()
        prompts = arguments.prompts or [config.instance_prompt]
        drawn = [
            generate_images(
                pipeline,
                prompt,
                arguments.count,
                resolution=config.resolution,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
            )
            for prompt in prompts
        ]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory on {surrogate.denoiser.device} ({str(error).splitlines()[0]}); lower it with --set "
            "mixed_precision=bf16 train_batch_size=1 prior_batch_size=1 or a smaller resolution, or use --method lora"
        ) from error
    finished = time.perf_counter()
    (output / PICTURES).mkdir(parents=True)
    for index, pictures in enumerate(drawn):
        for offset, picture in enumerate(pictures):
            name = f"{index}-{config.seed + offset:04d}.png"
            to_pil(picture).save(output / PICTURES / name)
    rows = [squares, *(pictures[:16] for pictures in drawn)]
    columns = min(8, max(map(len, rows)))
    save_grid(torch.cat([_fill(row, columns) for row in rows]), output / "contact_sheet.png", columns)
    if arguments.save_model:
        attacker.save(pipeline, output / "model")
    record = {
        "method": arguments.method,
        "preset": arguments.preset,
        "config": asdict(config),
        "model": portable_name(arguments.model),
        "revision": arguments.revision,
        "photos": len(squares),
        "prompts": prompts,
        "count": arguments.count,
        "seconds": {"training": round(trained - started, 1), "drawing": round(finished - trained, 1)},
        "device": str(surrogate.denoiser.device),
        "versions": provenance(),
    }
    write_json(output / ATTACK_RECORD, record)  # last: it says that the folder is whole
    logger.info("wrote %s", output)
    return 0


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
    try:
        return attacker(preset, **values)
    except TypeError as error:
        raise ValueError(f"expected --set with values of the settings' types, got {' '.join(changes)}") from error


def _look_for_people(photos: list) -> None:
    """Warn if the photos show no face, or those of several people; not without a detector."""
    from .metrics.identity import DlibFaces

    try:
        DlibFaces().reference(photos)
    except ImportError:
        return
    except ValueError:
        logger.warning("no face was found in %d photos; what is drawn can then not be compared with them", len(photos))


def _squares(images: list, resolution: int):
    """The centers of photos of any sizes, at one side: (N,3,side,side)."""
    import torch

    from .finetuning import center_square

    return torch.cat([center_square(image[None], resolution) for image in images])


def _fill(images, columns: int):
    """White pictures after the last, to the end of its row."""
    import torch

    missing = -len(images) % columns
    return torch.cat([images, torch.ones(missing, *images.shape[1:])])
