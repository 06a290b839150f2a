"""`gap-diff benchmark speed`: how fast protecting a photo is on this machine, and how much memory it takes.

Times are medians of several runs; the networks take turns, so that whatever else the machine does hits them alike.
Peak memory is that of a fresh process per case, which does the case once: this module as a program.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

SIZES = (512, 1024, 4096)
PHOTO_SIZE = (6000, 4000)
LONG_RUN_SECONDS = 5
PAPER = {"config": {"architecture": "paper", "channels": [64], "scale_range": 1.0}}
KINDS = {
    "network": "network alone",
    "pipeline": "`pipe(photo)`, photo in memory",
    "file": "`pipe(photo)`, JPEG file",
    "command": "`gap-diff protect`, JPEG file to PNG, start-up included",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="PX", help="sides of the square photos")
    parser.add_argument("--runs", type=int, default=5, help="runs per case, of which the median counts (default: 5)")
    parser.add_argument("--checkpoint", help="folder or Hub name of the network to time; default: the bundled one")
    parser.add_argument(
        "--skip-paper", action="store_true", help="leave out the paper's network, which takes most time"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="write every run's seconds there")


def run(arguments: argparse.Namespace) -> int:
    from .config import write_json

    if arguments.runs < 1:
        raise ValueError(f"expected --runs of at least 1, got {arguments.runs}")
    for size in arguments.sizes:
        if size < 512 or size % 256:
            raise ValueError(
                f"expected --sizes that the paper's network takes (multiples of 256 from 512), got {size}"
            )
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ValueError(f"expected --output in a folder that exists, got {arguments.output}; make it first")
    networks = {"default": _default_network(arguments.checkpoint)}
    if not arguments.skip_paper:
        networks["paper"] = PAPER
    record = benchmark_speed(networks, sizes=arguments.sizes, runs=arguments.runs)
    if arguments.output is not None:
        write_json(arguments.output, record)
    sys.stdout.write(to_markdown(record))
    return 0


def _default_network(checkpoint: str | None) -> dict:
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    try:
        _load_pipeline({"bundled": True})
    except OSError as error:
        sys.stderr.write(f"Random weights, which are as fast: {error}\n")
        return {"config": {}}
    return {"bundled": True}


def benchmark_speed(
    networks: dict[str, dict],
    *,
    sizes: tuple[int, ...] = SIZES,
    runs: int = 5,
    photo_size: tuple[int, int] = PHOTO_SIZE,
    seed: int = 0,
    long_run_seconds: float = LONG_RUN_SECONDS,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> dict:
    """Time networks at every size, and the first of them on a JPEG file.

    Args:
        networks: by name, each `{"checkpoint": folder or Hub name}`, `{"bundled": True}`, or `{"config": {...}}` for
            a `GAPDiffGenerator` with random weights.
        sizes: sides of the square photos, in pixels.
        runs: how often each case is timed, after one run that is not.
        photo_size: width and height of the JPEG file.
        long_run_seconds: a case whose first run takes longer is not run again, and has no warm-up.
        kinds: which of `KINDS`.

    Returns:
        A JSON record; `to_markdown` shows it.
    """
    from tqdm import tqdm

    from .config import provenance

    first = next(iter(networks))
    rows = []
    with tempfile.TemporaryDirectory(prefix="gap-diff-benchmark-") as folder:
        # Everything that runs in another process reads its networks from here or from where they are.
        photo_path = Path(folder) / "photo.jpg"
        if {"file", "command"} & set(kinds):
            make_photo(photo_size, seed).save(photo_path, quality=92)
        if "command" in kinds and "config" in networks[first]:
            _load_pipeline(networks[first]).save_pretrained(Path(folder) / "checkpoint", include_remote_code=False)
        cases = [
            (kind, size, list(networks))
            for kind in ("network", "pipeline")
            for size in ((side, side) for side in sizes)
            if kind in kinds
        ]
        cases += [(kind, photo_size, [first]) for kind in ("file", "command") if kind in kinds]
        with tqdm(total=len(cases), desc="speed", disable=None) as progress_bar:
            for kind, size, names in cases:
                progress_bar.set_postfix_str(f"{kind} {size[0]}x{size[1]}")
                case = {"kind": kind, "size": size, "seed": seed, "photo": str(photo_path)}
                by_network = {name: case | {"network": networks[name]} for name in names}
                rows += measure(by_network, runs=runs, long_run_seconds=long_run_seconds)
                progress_bar.update()
    return {
        "benchmark": "speed",
        "networks": networks,
        "runs": runs,
        "long_run_seconds": long_run_seconds,
        "seed": seed,
        "machine": _machine(),
        "rows": rows,
        "provenance": provenance(),
    }


def measure(cases: dict[str, dict], *, runs: int, long_run_seconds: float) -> list[dict]:
    """Measure one thing on several networks.

    Args:
        cases: by the network's name: `kind`, `size`, `network`, `seed` and, for files, `photo`.
        runs: how often each is timed.
        long_run_seconds: see `benchmark_speed`.

    Returns:
        One row per network: `seconds` is the median of `all_seconds`; `cold` says that they are first runs;
        `peak_memory` is in bytes, of which `memory_before` was there before the run. A case that was killed has
        `error` in their place.
    """
    rows, calls = {}, {}
    for name, case in cases.items():
        row = {"kind": case["kind"], "size": list(case["size"]), "network": name, "cold": True}
        times = runs if case["kind"] == "command" else 1
        try:
            once = [_run_in_fresh_process(case) for _ in range(times)]
        except ChildProcessError as error:
            rows[name] = row | {"error": str(error)}
            continue
        rows[name] = row | {
            "all_seconds": [result["seconds"] for result in once],
            "peak_memory": max(result["peak_memory"] for result in once),
            "memory_before": once[0]["memory_before"],
        }
        if case["kind"] != "command" and once[0]["seconds"] <= long_run_seconds:
            calls[name] = _prepare(case)
    for name, seconds in take_turns(calls, runs).items():
        rows[name] |= {"cold": False, "all_seconds": seconds}
    for row in rows.values():
        if "error" not in row:
            row["seconds"] = statistics.median(row["all_seconds"])
    return list(rows.values())


def take_turns(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call, `runs` times, the calls in turn in every round, after a round that is not timed."""
    from torch.utils.benchmark import timer  # as timeit's own, but waits for what an accelerator still does

    timers = {name: timeit.Timer(call, timer=timer) for name, call in calls.items()}
    rounds = [{name: timers[name].timeit(number=1) for name in timers} for _ in range(runs + 1)]
    return {name: [seconds[name] for seconds in rounds[1:]] for name in timers}


def _load_pipeline(network: dict):
    """The pipeline of a network: see `benchmark_speed`."""
    import torch

    from .models.gap_diff_generator import GAPDiffGenerator
    from .pipelines.pipeline_gap_diff import GAPDiffProtectionPipeline

    if "checkpoint" in network:
        pipe = GAPDiffProtectionPipeline.from_pretrained(network["checkpoint"])
    elif "bundled" in network:
        pipe = GAPDiffProtectionPipeline.from_bundled()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = GAPDiffProtectionPipeline(GAPDiffGenerator(**network["config"]).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prepare(case: dict) -> Callable[[], object]:
    """What a case times, with all that it needs loaded. Not for the command, which loads it itself."""
    import torch
    from PIL import Image

    pipe = _load_pipeline(case["network"])
    if case["kind"] == "file":
        return lambda: pipe(Image.open(case["photo"]))
    photo = make_photo(case["size"], case["seed"])
    if case["kind"] == "pipeline":
        return lambda: pipe(photo)
    import numpy as np

    images = torch.from_numpy(np.asarray(photo) / np.float32(255)).permute(2, 0, 1)[None].contiguous()
    return torch.no_grad()(lambda: pipe.generator(images))


def make_photo(size: tuple[int, int], seed: int):
    """A picture of smooth gradients and a little noise, as PIL."""
    import numpy as np
    from PIL import Image

    width, height = size
    random = np.random.default_rng(seed)
    corners = Image.fromarray(random.integers(40, 216, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(corners.resize((width, height), Image.Resampling.BICUBIC))
    for row in pixels:
        row[:] = np.clip(row + random.integers(-6, 7, row.shape, dtype=np.int16), 0, 255)
    return Image.fromarray(pixels)


def _run_in_fresh_process(case: dict) -> dict:
    """Run this module as a program on a case.

    Raises:
        ChildProcessError: a signal ended it; most often the system was out of memory.
        OSError: it failed.
    """
    command = [sys.executable, "-m", __name__, json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode < 0:
        raise ChildProcessError(f"ended by signal {-result.returncode}; out of memory?")
    if result.returncode > 0:
        raise OSError(f"timing {KINDS[case['kind']]} failed: {(result.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(result.stdout)


def _run_case(case: dict) -> dict:
    """Run a case once, in this process, and measure it."""
    if case["kind"] == "command":
        return _run_command(case)
    call = _prepare(case)
    memory_before = _peak_memory()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_memory": _peak_memory(), "memory_before": memory_before}


def _run_command(case: dict) -> dict:
    import resource

    with tempfile.TemporaryDirectory(prefix="gap-diff-benchmark-") as folder:
        command = [sys.executable, "-m", __package__, "protect", case["photo"], "-o", folder]
        if "bundled" not in case["network"]:
            saved = str(Path(case["photo"]).with_name("checkpoint"))
            command += ["--checkpoint", case["network"].get("checkpoint", saved)]
        start = time.perf_counter()
        result = subprocess.run(command, stdout=sys.stderr)
        seconds = time.perf_counter() - start
    if result.returncode < 0:
        os.kill(os.getpid(), -result.returncode)
    if result.returncode > 0:
        raise SystemExit(1)
    # Linux carries the peak of the process that starts another over to it; this one is small, as it imports no torch.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "peak_memory": _in_bytes(peak), "memory_before": 0}


def _peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    try:
        # Not ru_maxrss, which starts at the peak of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _in_bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def _machine() -> dict:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def to_markdown(record: dict) -> str:
    """A record of `benchmark_speed` as a table and what is to be known about it."""
    names = list(record["networks"])
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        by_case.setdefault((row["kind"], *row["size"]), {})[row["network"]] = row
    header = ["what", "photo", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    header += [f"peak memory, {name}" for name in names]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (kind, width, height), rows in by_case.items():
        cells = [KINDS[kind], f"{width}x{height}", *(_seconds_cell(rows.get(name)) for name in names)]
        for name in names[1:]:
            both = [rows.get(name, {}).get("seconds"), rows[names[0]].get("seconds")]
            cells.append(f"{both[0] / both[1]:.1f}" if all(both) else "-")
        cells += [_memory_cell(rows.get(name)) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    machine = record["machine"]
    notes = [
        f"Medians of {record['runs']} runs after warm-up, the networks taking turns; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['threads']} threads, torch {record['provenance']['torch']}. Memory: peak "
        "of a fresh process that does it once, Python and its libraries included.",
        *(f"{name}: {_network_note(network)}." for name, network in record["networks"].items()),
    ]
    if "paper" in names:
        notes.append(
            "pipe(photo): the paper's network computes at its native 512 px whatever the photo's size; the default "
            "one at up to three scales of the photo, the finest 2560 px."
        )
    if any(row["cold"] and row["kind"] != "command" and "error" not in row for row in record["rows"]):
        notes.append(f"\\* one run without warm-up, as it takes over {record['long_run_seconds']} s.")
    notes += [f"{row['network']}, {row['kind']}: {row['error']}" for row in record["rows"] if "error" in row]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _seconds_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "failed"
    seconds = row["seconds"]
    text = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return text + (" \\*" if row["cold"] and row["kind"] != "command" else "")


def _memory_cell(row: dict | None) -> str:
    return "-" if row is None else "failed" if "error" in row else f"{row['peak_memory'] / 1e9:.2f} GB"


def _network_note(network: dict) -> str:
    if "checkpoint" in network:
        return f"the checkpoint {network['checkpoint']}"
    if "bundled" in network:
        return "the checkpoint that ships with the package"
    architecture = network["config"].get("architecture", "compact")
    return f"GAPDiffGenerator of architecture {architecture} with random weights, which are as fast as trained ones"


def main() -> None:
    json.dump(_run_case(json.loads(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
