"""`gap-diff benchmark identity`: what DreamBooth learns of a person from photos, clean and protected.

For every person a folder with `set_B`, the photos that are published and that the attacker learns, and `set_C`, clean
ones to compare with (the protocol of Anti-DreamBooth and GAP-Diff); for ASPL also `set_A`, the protector's own.
"""

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from .benchmark_displacement import JPEG_QUALITY, LEVELS, SIZE, add_output_argument, check_output, report
from .config import table

logger = logging.getLogger(__name__)

JPEG = "JPEG 70"
VARIANTS = ("clean", "protected", f"protected, then {JPEG}", f"ASPL, then {JPEG}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--people", required=True, metavar="FOLDER", help="a folder a person, with set_B and set_C")
    parser.add_argument("--model", required=True, metavar="FOLDER|ID", help="text-to-image model")
    parser.add_argument("--checkpoint", metavar="FOLDER|ID", help="protection to measure (default: the bundled one)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="people to measure (default: all)")
    parser.add_argument("--count", type=int, default=32, help="pictures to draw a person (default: %(default)s)")
    parser.add_argument("--pictures", metavar="FOLDER", help="save each person's pictures there")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Personalize the model on each person's photos, draw pictures and look for the person in them."""
    from dataclasses import asdict

    from .config import write_json
    from .data import list_photos, load_faces, save_grid
    from .finetuning import FACE_MODEL_ATTACK, DreamBooth, generate_images
    from .metrics.identity import DlibFaces
    from .protect import load_pipeline
    from .protections.anti_dreambooth import ASPLConfig, aspl
    from .surrogates import load_surrogate
    from .transforms import RealJPEG

    check_output(arguments)
    if arguments.count < 1:
        raise ValueError(f"expected --count of at least 1, got {arguments.count}")
    people = find_people(arguments.people, arguments.only, arguments.variants)
    faces = DlibFaces()
    surrogate = load_surrogate(arguments.model)
    protection = load_pipeline(arguments.checkpoint, "cpu")
    protection.set_progress_bar_config(disable=True)
    attack = FACE_MODEL_ATTACK
    references = {}
    for person in people:
        try:
            references[person] = faces.reference(load_faces(list_photos([person / "set_C"]), SIZE))
        except ValueError as error:
            raise ValueError(f"{person / 'set_C'}: {error}") from error
    started = time.perf_counter()
    class_images = generate_images(
        surrogate.pipeline, attack.class_prompt, attack.num_class_images, resolution=attack.resolution, seed=10_000
    )
    class_seconds = time.perf_counter() - started
    publish = RealJPEG(JPEG_QUALITY).eval()
    results: list[dict] = []
    figures = {
        "model": surrogate.name,
        "pictures": arguments.count,
        "attack": asdict(attack),
        "class_images_seconds": class_seconds,
        "results": results,
    }
    for person in people:
        photos = load_faces(list_photos([person / "set_B"]), SIZE)
        for variant in arguments.variants:
            published = photos
            if variant.startswith("protected"):
                published = protection(photos, LEVELS / 255, output_type="pt").images
            elif variant.startswith("ASPL"):
                own = load_faces(list_photos([person / "set_A"]), SIZE)
                settings = ASPLConfig(eps=LEVELS / 255)
                published = aspl(surrogate, photos, own, settings, attack=attack, class_images=class_images)
            if variant.endswith(JPEG):
                published = publish(published)
            started = time.perf_counter()
            victim = copy.deepcopy(surrogate)
            DreamBooth(victim, published, attack, class_images=class_images).train()
            pictures = generate_images(
                victim.pipeline, attack.instance_prompt, arguments.count, resolution=attack.resolution
            )
            seconds = time.perf_counter() - started + class_seconds
            found = faces.compare(pictures, references[person])
            results.append(
                {
                    "person": person.name,
                    "variant": variant,
                    "recognised": found.match_rate,
                    "fdfr": found.detection_failure_rate,
                    "seconds": seconds,
                }
            )
            logger.info("%s, %s: %.0f %% recognised", person.name, variant, 100 * found.match_rate)
            if arguments.output:  # what is done stays, should it stop
                write_json(arguments.output, figures)
            if arguments.pictures:
                save_grid(pictures, Path(arguments.pictures) / f"{person.name} {variant}.png")
    return report(arguments, figures, to_markdown)


def find_people(folder: str, only: list[str] | None = None, variants: Sequence[str] = ()) -> list[Path]:
    """The folders of the people to measure.

    Raises:
        ValueError: there is none, one of `only` is missing, or one lacks a set that the variants need.
    """
    parts = ["set_B", "set_C"] + ["set_A"] * any(variant.startswith("ASPL") for variant in variants)
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/set_*"))}
    missing = sorted(set(only or ()) - set(found))
    if not found or missing:
        raise ValueError(
            f"{folder}: expected a folder a person with set_B and set_C in it, found none"
            + (f" for {', '.join(missing)}" if missing else "")
        )
    people = [path for name, path in found.items() if only is None or name in only]
    for person in people:
        for part in parts:
            if not (person / part).is_dir():
                raise ValueError(f"{person}: expected a folder {part}, found none")
    return people


def to_markdown(record: dict) -> str:
    """The record as a table: the mean over people, and every person's share of recognised pictures."""
    results = record["results"]
    people = list(dict.fromkeys(result["person"] for result in results))
    rows = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        of_variant = [result for result in results if result["variant"] == variant]
        single = {result["person"]: f"{result['recognised']:.0%}" for result in of_variant}
        recognised = sum(result["recognised"] for result in of_variant) / len(of_variant)
        fdfr = sum(result["fdfr"] for result in of_variant) / len(of_variant)
        longest = max(result["seconds"] for result in of_variant)
        each = [single.get(person, "") for person in people]
        rows.append([variant, f"{recognised:.0%}", f"{fdfr:.0%}", *each, f"{longest:.0f} s"])
    title = (
        f"DreamBooth on {record['model']}: pictures recognised as the person, of {record['pictures']} each; without a "
        "face (FDFR); seconds of the slowest"
    )
    return table(title, ["photos", "recognised", "FDFR", *people, "time"], rows)
