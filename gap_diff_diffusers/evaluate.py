"""`gap-diff evaluate`: look for a person in generated pictures, and at how good they are."""

import argparse
import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from .config import ATTACK_RECORD, PICTURES, check_outside, table
from .metrics import METRICS, OFFLINE
from .metrics.paper import FIGURES, paper_mean, without_backend

logger = logging.getLogger(__name__)

OUTPUTS = (".json", ".csv")
ACCOUNTINGS = ("honest", "gap-diff")
"""How means are made: over the pictures that have the figure, or as GAP-Diff's evaluation does (`paper_mean`)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generated", nargs="+", metavar="GENERATED", help="folders of generated pictures, a row each")
    parser.add_argument(
        "--reference", nargs="+", required=True, metavar="CLEAN", help="clean photos of the person, or folders of them"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=sorted(METRICS),
        default=OFFLINE,
        metavar="METRIC",
        help=f"what to measure: {', '.join(sorted(METRICS))} (default: {', '.join(OFFLINE)})",
    )
    parser.add_argument(
        "--accounting",
        choices=ACCOUNTINGS,
        default=ACCOUNTINGS[0],
        help="honest: means over the pictures that have the figure; gap-diff: as the paper's evaluation counts those "
        "without a face, and of its four figures alone (default: honest)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the figures of every picture, too: FILE.json or FILE.csv"
    )


def run(arguments: argparse.Namespace) -> int:
    evaluate(
        arguments.generated,
        arguments.reference,
        metrics=arguments.metrics,
        accounting=arguments.accounting,
        output=Path(arguments.output) if arguments.output else None,
    )
    return 0


def evaluate(
    generated: Sequence[str],
    reference: Sequence[str],
    *,
    metrics: Sequence[str] = OFFLINE,
    accounting: str = ACCOUNTINGS[0],
    output: Path | None = None,
) -> None:
    """Print a table of means, a row for each folder; write every picture's figures if asked for."""
    import sys

    from .data import read_images, read_named_images

    if output and (output.suffix not in OUTPUTS or not output.resolve().parent.is_dir()):
        raise ValueError(f"expected --output as FILE.json or FILE.csv in a folder that exists, got {output}")
    for folder in generated:
        if not Path(folder).is_dir():
            raise ValueError(f"expected folders of generated pictures, got {folder}")
    _warn_of_swapping(generated, reference)
    places = [_pictures(Path(folder)) for folder in generated]
    for folder, place in zip(generated, places, strict=True):
        for other in filter(os.path.isdir, reference):
            if not os.path.samefile(folder, other):  # or it is to be compared with itself
                check_outside(folder, [other], "the folder", "the reference")
                check_outside(other, [place], "the reference", "the pictures of")
    measures = [METRICS.load(name)() for name in metrics]
    photos = read_images(reference)
    rows = []
    for folder, place in zip(generated, places, strict=True):
        paths, images = zip(*read_named_images([place]))
        results = [result for measure in measures for result in measure(images, photos)]
        if accounting == "gap-diff":
            results = [result for result in results if without_backend(result.name) in FIGURES]
        names = [path.relative_to(place).as_posix() for path in paths]
        rows.append({"generated": folder, "pictures": len(images), "names": names, "results": results})
    sys.stdout.write(to_markdown(rows, accounting))
    if output:
        _write(output, rows, len(photos), accounting)


def to_markdown(rows: list[dict], accounting: str = "honest") -> str:
    """Means as a table, a row for each folder, by one of the `ACCOUNTINGS`."""
    first = rows[0]["results"]
    header = ["pictures of", "count", *(result.name for result in first)]
    body = [
        [row["generated"], str(row["pictures"]), *(_show(result, accounting) for result in row["results"])]
        for row in rows
    ]
    notes = [f"- {result.name} ({result.backend}): higher means {result.higher_means}." for result in first]
    title = "Means over the pictures that have the figure"
    if accounting == "gap-diff":
        title = (
            "Means as GAP-Diff's evaluation makes them: without any face ISM is 0; SER-FIQ, stretched for ArcFace, 0"
        )
    return table(title, header, body) + "\n" + "\n".join(notes) + "\n"


def _mean(result, accounting: str) -> float | None:
    return paper_mean(result.name, result.values) if accounting == "gap-diff" else result.mean


def _show(result, accounting: str) -> str:
    if (mean := _mean(result, accounting)) is None:
        return "none"
    return f"{mean:.0%}" if result.percent else f"{mean:.2f}"


def _warn_of_swapping(generated: Sequence[str], reference: Sequence[str]) -> None:
    made = [Path(path) for path in reference if _has_record(Path(path))]
    if made and not any(_has_record(Path(path)) for path in generated):
        logger.warning("%s was written by gap-diff attack, yet stands as the reference: swapped?", made[0])


def _pictures(folder: Path) -> Path:
    """Where the pictures are in a folder that `gap-diff attack` wrote: other pictures are there, too."""
    if (folder / PICTURES).is_dir():
        return folder / PICTURES
    if (folder / ATTACK_RECORD).is_file():
        parts = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{PICTURES}")))
        raise ValueError(f"{folder}: expected pictures of one attack, got those of a comparison; name {parts}")
    return folder


def _has_record(path: Path) -> bool:
    """Whether this is in what `gap-diff attack` wrote; of a comparison, pictures lie three levels below its record."""
    return any((place / ATTACK_RECORD).is_file() for place in (path, *path.resolve().parents[:3]))


def _write(path: Path, rows: list[dict], references: int, accounting: str) -> None:
    from dataclasses import asdict

    from .config import provenance, write_json
    from .images import write_atomically

    if path.suffix == ".json":
        record = [
            row | {"results": [asdict(r) | {"mean": _mean(r, accounting)} for r in row["results"]]} for row in rows
        ]
        figures = {"reference_photos": references, "accounting": accounting, "rows": record}
        write_json(path, figures | {"versions": provenance()})
        return
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["generated", "picture", *(result.name for result in rows[0]["results"])])
    for row in rows:
        for name, *values in zip(row["names"], *(result.values for result in row["results"]), strict=True):
            writer.writerow([row["generated"], name, *("" if value is None else value for value in values)])
    write_atomically(path, lines.getvalue().encode())
