"""`gap-diff benchmark throughput`: many photos at once against one at a time.

What the command saves on many photos: it starts once, and it reads the next photos and saves the previous ones while
the network works on one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=200, help="photos (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="their side in pixels (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="single starts to time (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="FOLDER|ID", help="pipeline to run (default: the bundled one)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON, too")


def run(arguments: argparse.Namespace) -> int:
    from .config import provenance, write_json

    if min(arguments.count, arguments.starts) < 1:
        raise ValueError(f"expected at least one photo and one start, got {arguments.count} and {arguments.starts}")
    record = benchmark_throughput(arguments.count, arguments.size, arguments.starts, arguments.checkpoint)
    record["versions"] = provenance()
    sys.stdout.write(to_markdown(record))
    if arguments.output:
        write_json(arguments.output, record)
    return 0


def benchmark_throughput(count: int, size: int, starts: int, checkpoint: str | None = None) -> dict:
    """Seconds for `count` photos: with the command, one start per photo, and both ways in one process."""
    from .benchmark_speed import make_photo
    from .protect import PhotoFile, Settings, load_pipeline, protect_files

    command = [sys.executable, "-m", "gap_diff_diffusers", "protect"]
    options = ["--checkpoint", checkpoint] if checkpoint else []

    def timed(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def start(path: Path, output: Path) -> None:
        subprocess.run([*command, str(path), "-o", str(output), *options], check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory(prefix="gap-diff-benchmark-") as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for index in range(count):
            make_photo((size, size), index).save(photos / f"{index:04}.jpg", quality=92)
        paths = sorted(photos.iterdir())
        seconds = {"command": timed(lambda: start(photos, Path(folder, "command")))}
        single = sorted(timed(lambda i=i: start(paths[i % count], Path(folder, f"single{i}"))) for i in range(starts))
        seconds["one start"] = single[len(single) // 2]

        pipeline = load_pipeline(checkpoint)
        settings = Settings()

        def files(name: str) -> list[PhotoFile]:
            return [PhotoFile(input=str(p), output=str(Path(folder, name, f"{p.stem}.png"))) for p in paths]

        def protect(batch: list[PhotoFile]) -> None:
            protect_files(batch, lambda: pipeline, settings, lambda file: None)

        protect(files("warm-up")[:2])
        seconds["overlapped"] = timed(lambda: protect(files("overlapped")))
        seconds["one at a time"] = timed(lambda: [protect([file]) for file in files("sequential")])
    return {"photos": count, "size": size, "seconds": seconds}


def to_markdown(record: dict) -> str:
    """The record as a table."""
    seconds, count = record["seconds"], record["photos"]
    rows = [
        ("the command, all of them", seconds["command"]),
        (f"a start for each: {seconds['one start']:.1f} s x {count}", seconds["one start"] * count),
        ("in one process, reading and saving beside the network", seconds["overlapped"]),
        ("in one process, one photo after the other", seconds["one at a time"]),
    ]
    lines = [f"{count} photos of {record['size']}x{record['size']}", "", "| | seconds | ms a photo |", "|---|---|---|"]
    lines += [f"| {label} | {value:.1f} | {1000 * value / count:.0f} |" for label, value in rows]
    return "\n".join(lines) + "\n"
