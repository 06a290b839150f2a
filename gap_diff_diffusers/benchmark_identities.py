"""`gap-diff benchmark identities`: whether the figures that recognise people tell clean photos of one from another's.

A figure that cannot do that says nothing of pictures that a model drew. Every clean photo of every person (`set_A` and
`set_B`) is compared with every person's reference (`set_C`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .benchmark_displacement import add_output_argument, check_output, report
from .config import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--people", required=True, metavar="FOLDER", help="a folder a person, with set_A, set_B, set_C"
    )
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the area under the ROC curve of ISM and of the distance."""
    from .benchmark_run import find_people
    from .data import read_images
    from .metrics import METRICS

    check_output(arguments)
    people = find_people(arguments.people, needs_own=True)
    if len(people) < 2:
        raise ValueError(f"{arguments.people}: expected at least two people to tell apart, got {len(people)}")
    identity = METRICS.load("identity")()
    photos = {person: read_images([person / "set_A", person / "set_B"]) for person in people}
    references = {person: read_images([person / "set_C"]) for person in people}
    pairs: dict[str, dict[bool, list[float]]] = {}
    means = {}
    for of_photos, images in photos.items():
        for of_reference, reference in references.items():
            for result in identity(images, reference):
                if not result.percent and result.name in ("ISM", "distance"):
                    means[result.name] = result.higher_means
                    same = pairs.setdefault(result.name, {True: [], False: []})
                    same[of_photos == of_reference] += result.defined
    sign = {name: 1 if "more like" in meaning else -1 for name, meaning in means.items()}
    figures = {
        "people": len(people),
        "photos": sum(map(len, photos.values())),
        "figures": {
            name: {
                "auc": area_under_curve([sign[name] * v for v in same[True]], [sign[name] * v for v in same[False]]),
                "same": len(same[True]),
                "others": len(same[False]),
                "mean_same": sum(same[True]) / len(same[True]),
                "mean_others": sum(same[False]) / len(same[False]),
            }
            for name, same in pairs.items()
        },
        "set": Path(arguments.people).name,
    }
    return report(arguments, figures, to_markdown, setting={})


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The share of pairs of a positive and a negative in which the positive is higher, ties counting half.

    Raises:
        ValueError: one of them is empty.
    """
    if not positive or not negative:
        raise ValueError("expected faces in photos of at least two people, found too few to compare")
    higher = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return higher / (len(positive) * len(negative))


def to_markdown(record: dict) -> str:
    """The record as a table."""
    rows = [
        [name, f"{f['auc']:.4f}", f"{f['mean_same']:.2f} of {f['same']}", f"{f['mean_others']:.2f} of {f['others']}"]
        for name, f in record["figures"].items()
    ]
    title = f"Clean photos of {record['people']} people told apart, by dlib"
    return table(title, ["figure", "AUC", "same person", "other people"], rows)
