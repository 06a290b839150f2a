"""`gap-diff evaluate`: look for a person in generated pictures, and at how good they are."""

import argparse
import csv
import io
import logging
from pathlib import Path

from .config import ATTACK_RECORD, PICTURES, table
from .metrics import METRICS, OFFLINE

logger = logging.getLogger(__name__)

OUTPUTS = (".json", ".csv")


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
        "--output", metavar="FILE", help="write the figures of every picture, too: FILE.json or FILE.csv"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table of means, a row for each folder; write every picture's figures if asked for."""
    import sys

    from .data import read_images

    output = Path(arguments.output) if arguments.output else None
    if output and (output.suffix not in OUTPUTS or not output.resolve().parent.is_dir()):
        raise ValueError(f"expected --output as FILE.json or FILE.csv in a folder that exists, got {output}")
    for folder in arguments.generated:
        if not Path(folder).is_dir():
            raise ValueError(f"expected folders of generated pictures, got {folder}")
    _warn_of_swapping(arguments.generated, arguments.reference)
    metrics = [METRICS.load(name)() for name in arguments.metrics]
    reference = read_images(arguments.reference)
    rows = []
    for folder in arguments.generated:
        images = read_images([_pictures(Path(folder))])
        results = [result for metric in metrics for result in metric(images, reference)]
        rows.append({"generated": folder, "pictures": len(images), "results": results})
    sys.stdout.write(to_markdown(rows))
    if output:
        _write(output, rows, len(reference))
    return 0


def to_markdown(rows: list[dict]) -> str:
    """Means as a table, a row for each folder."""
    first = rows[0]["results"]
    header = ["pictures of", "count", *(result.name for result in first)]
    body = [[row["generated"], str(row["pictures"]), *map(_show, row["results"])] for row in rows]
    notes = [f"- {result.name} ({result.backend}): higher means {result.higher_means}." for result in first]
    return table("Means over the pictures that have the figure", header, body) + "\n" + "\n".join(notes) + "\n"


def _show(result) -> str:
    if result.mean is None:
        return "none"
    return f"{result.mean:.0%}" if result.percent else f"{result.mean:.2f}"


def _warn_of_swapping(generated: list[str], reference: list[str]) -> None:
    made = [Path(path) for path in reference if Path(path).is_dir() and _has_record(Path(path))]
    if made and not any(_has_record(Path(path)) for path in generated):
        logger.warning("%s was written by gap-diff attack, yet stands as the reference: swapped?", made[0])


def _pictures(folder: Path) -> Path:
    """Where the pictures are in a folder that `gap-diff attack` wrote: other pictures are there, too."""
    return folder / PICTURES if (folder / PICTURES).is_dir() else folder


def _has_record(folder: Path) -> bool:
    return any((place / ATTACK_RECORD).is_file() for place in (folder, folder.resolve().parent))


def _write(path: Path, rows: list[dict], references: int) -> None:
    from dataclasses import asdict

    from .config import provenance, write_json
    from .images import write_atomically

    if path.suffix == ".json":
        record = [row | {"results": [asdict(r) | {"mean": r.mean} for r in row["results"]]} for row in rows]
        write_json(path, {"reference_photos": references, "rows": record, "versions": provenance()})
        return
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["generated", "picture", *(result.name for result in rows[0]["results"])])
    for row in rows:
        for index in range(row["pictures"]):
            values = [result.values[index] for result in row["results"]]
            writer.writerow([row["generated"], index, *("" if value is None else value for value in values)])
    write_atomically(path, lines.getvalue().encode())
