"""`gap-diff protect`: photo files in, protected photo files out.

`plan` says which file becomes which, before anything is read. `protect_files` does it: the network runs in the calling
thread, while other threads read the next photos, and save and check the previous ones.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .budget import budget_levels, largest_change
from .config import BUNDLED_CHECKPOINT, check_outside, choose_device, finite, provenance, write_json
from .images import (
    JPEG_QUALITY,
    PHOTO_SUFFIXES,
    Photo,
    PhotoError,
    encode_photo,
    photo_size,
    psnr,
    read_photo,
    ssim,
    write_atomically,
)

SUFFIXES = {"png": (".png",), "jpeg": (".jpg", ".jpeg"), "webp": (".webp",)}  # of a format; the first is what we write
# By how many levels, in the mean, a finished output may differ from its input; another picture differs by more. The
# bundled network's differs by at least this share of the budget, a copy that was only compressed mostly by less.
DONE_AT_MOST = 24
DONE_AT_LEAST = 0.2
PIXELS_IN_FLIGHT = 75_000_000  # three photos of 24 megapixels; one photo may have more
LIMITS = (
    "Protected photos are made to mislead the image encoders of generative models. That is no guarantee: who knows "
    "the method can weaken it, and copies of the originals that are already public stay as they are."
)


@dataclass(kw_only=True)
class PhotoFile:
    """One photo of a run: where from, where to, and what became of it; a line of the report.

    Attributes:
        input, output: paths, as the user's command spells them.
        status: "waiting", then "protected", "skipped" (its output exists) or "failed"; one that is still "waiting" at
            the end was not attempted.
        budget: levels that were allowed.
        largest_change: of any subpixel, in levels, the saved file against the original.
        psnr, ssim: of the saved file against the original; psnr in dB, None if nothing changed or nothing was saved.
        encoding_change, encoding_psnr: the saved file against the protected photo; None if it is lossless.
        faces: how many were found, if they were looked for.
        seconds: of reading, protecting and saving together.
    """

    input: str
    output: str | None = None
    status: str = "waiting"
    width: int | None = None
    height: int | None = None
    budget: int | None = None
    largest_change: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    encoding_change: int | None = None
    encoding_psnr: float | None = None
    faces: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    def fail(self, reason: str) -> None:
        self.status = "failed"
        self.error = reason if reason.startswith(self.input) else f"{self.input}: {reason}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line asks for: its files in order, and how much of its folders is left out.

    That is files which are no photos, subfolders that are not asked for, and links to folders, which nothing follows.
    """

    files: list[PhotoFile]
    ignored_files: int = 0
    unsearched_folders: int = 0
    linked_folders: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How photos are protected and saved.

    Attributes:
        budget: in levels; None for the checkpoint's.
        quality: of a lossy format; None is lossless.
        measure_ssim: SSIM takes as long as saving; False leaves it None.
    """

    budget: int | None = None
    strength: float = 1.0
    format: str = "png"
    quality: int | None = None
    keep_metadata: bool = False
    batch_size: int = 1
    detect_faces: bool = False
    measure_ssim: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="photos, and folders of photos")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="folder to write to; for one photo, also a file to write"
    )
    parser.add_argument("--recursive", action="store_true", help="search the subfolders of folders too, and keep them")
    parser.add_argument(
        "--budget",
        type=_whole_number(1, 255),
        metavar="LEVELS",
        help="most that a subpixel may change, in levels of 255 (default: the checkpoint's; 8 in the one that ships)",
    )
    parser.add_argument(
        "--strength", type=_strength, default=1.0, help="weaken it within the budget: above 0, up to 1 (default: 1)"
    )
    parser.add_argument(
        "--format", choices=tuple(SUFFIXES), help="of the files written (default: png, or what OUT's suffix says)"
    )
    parser.add_argument(
        "--quality",
        type=_whole_number(1, 100),
        help=f"of JPEG (default: {JPEG_QUALITY}) or WebP (default: lossless); both cost protection, and the summary "
        "says how much",
    )
    parser.add_argument(
        "--keep-metadata", action="store_true", help="keep EXIF, the place where it was taken included"
    )
    parser.add_argument(
        "--detect-faces",
        action="store_true",
        help="find faces, and protect each at the scale at which a crop of it will be seen; for photos with small "
        "faces (needs the extra metrics)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write photos again whose output exists")
    parser.add_argument(
        "--checkpoint", help="folder, or repository on the Hub, to load (default: the one that ships with the package)"
    )
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--batch-size",
        type=_whole_number(1, 1024),
        default=1,
        help="photos of one size that the network takes at once; more helps on a GPU (default: 1)",
    )
    parser.add_argument("--report", metavar="REPORT.json", help="also write what was done to each photo, as JSON")


def run(arguments: argparse.Namespace) -> int:
    format = _output_format(arguments)
    _check_checkpoint(arguments.checkpoint)
    if arguments.detect_faces:
        from .faces import import_dlib

        import_dlib()  # before any photo is read
    work = plan(
        arguments.paths,
        arguments.output,
        recursive=arguments.recursive,
        format=format,
        overwrite=arguments.overwrite,
        report=arguments.report,
    )
    settings = Settings(
        budget=arguments.budget,
        strength=arguments.strength,
        format=format,
        quality=JPEG_QUALITY if format == "jpeg" and arguments.quality is None else arguments.quality,
        keep_metadata=arguments.keep_metadata,
        batch_size=arguments.batch_size,
        detect_faces=arguments.detect_faces,
        measure_ssim=arguments.report is not None,
    )
    bundled = arguments.checkpoint is None
    if skipped := [file for file in work.files if file.status == "skipped"]:
        levels = settings.budget or _checkpoint_levels(arguments.checkpoint)
        for file in skipped:
            _check_done(file, settings, levels, bundled)
    loaded = {}

    def load():
        loaded["pipeline"] = load_pipeline(arguments.checkpoint, arguments.device)
        return loaded["pipeline"]

    started, interrupted = time.perf_counter(), False
    waiting = [file for file in work.files if file.status == "waiting"]
    try:
        if waiting:
            from tqdm import tqdm

            with tqdm(total=len(waiting), unit="photo", disable=not sys.stderr.isatty()) as progress_bar:
                protect_files(waiting, load, settings, lambda _: progress_bar.update())
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - started

    with _ignoring_interrupts() if interrupted else contextlib.nullcontext():
        sys.stdout.write(summarize(work, settings, arguments.output, seconds, interrupted=interrupted))
        if arguments.report is not None:
            device = str(loaded["pipeline"].device) if loaded else None
            report = make_report(work, settings, arguments, device, seconds, interrupted=interrupted)
            Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.report, report)
    if interrupted:
        return 130
    return 0 if all(file.status in ("protected", "skipped") for file in work.files) else 1


def load_pipeline(checkpoint: str | None = None, device: str | None = None):
    """Load a checkpoint (default: the bundled one) onto a device (default: cuda if there is one, else cpu).

    Raises:
        ValueError: a device that is not there, or a checkpoint that cannot be loaded.
    """
    from diffusers.utils import logging

    from .pipelines.pipeline_gap_diff import GAPDiffProtectionPipeline

    logging.disable_progress_bar()  # a network of some megabytes is there at once
    device = choose_device(device)
    try:
        if checkpoint is None:
            pipeline = GAPDiffProtectionPipeline.from_bundled()
        else:
            pipeline = GAPDiffProtectionPipeline.from_pretrained(checkpoint)
    except Exception as error:  # a damaged folder can make every layer below fail in its own way
        raise ValueError(
            f"the checkpoint {checkpoint or 'that ships with the package'} cannot be loaded ({_first_line(error)}); "
            "expected a folder, or a repository on the Hub, that GAPDiffProtectionPipeline.save_pretrained wrote"
        ) from error
    return pipeline.to(device)


# --- which file becomes which


def plan(
    paths: list[str],
    output: str,
    *,
    recursive: bool = False,
    format: str = "png",
    overwrite: bool = False,
    report: str | None = None,
) -> Plan:
    """Say which files a command line asks for, and where each goes. Reads folders, and no photo.

    What is wrong with one path alone fails that path; what puts originals at risk fails the whole.

    Raises:
        ValueError: an output that is, or lies in, an input; that cannot be written; or a file for several photos.
    """
    found: list[tuple[PhotoFile, Path | None]] = []  # with the path within the output folder; None: nothing to protect
    folders, left_out = [], Counter()
    for path in paths:
        if os.path.isdir(path):
            folders.append(path)
            names, failures, beside = _photos_in(path, recursive)
            left_out += beside
            found += [(failure, None) for failure in failures]
            found += [(PhotoFile(input=str(Path(path, name))), name) for name in names]
            if not names and not failures:
                unsearched = beside["unsearched_folders"]
                remedy = f"; --recursive searches its {_count(unsearched, 'subfolder')}" if unsearched else ""
                empty = PhotoFile(input=path)
                empty.fail(f"no photo in this folder, expected files such as .jpg, .png or .webp{remedy}")
                found.append((empty, None))
        else:
            file = PhotoFile(input=str(Path(path)))
            if not os.path.lexists(path):
                file.fail("there is no such file or folder")
            elif not os.path.isfile(path):
                file.fail("expected a photo or a folder of photos, got something else")
            found.append((file, Path(Path(path).name) if file.status == "waiting" else None))
    unique: dict[str, tuple[PhotoFile, Path | None]] = {}
    for file, name in found:
        unique.setdefault(os.path.abspath(file.input), (file, name))
    found = list(unique.values())

    _check_output(output, paths, folders)
    photos = [(file, name) for file, name in found if name is not None]
    if _is_one_file(output):
        targets = [Path(output)] * len(photos)
    else:
        targets = [Path(output, name) for name in _output_names([name for _, name in photos], SUFFIXES[format][0])]
    originals = {_identity(file.input): file.input for file, _ in photos if os.path.exists(file.input)}
    for (file, _), target in zip(photos, targets, strict=True):
        file.output = str(target)
        if os.path.lexists(target):
            _check_is_not_original(target, originals)
            if os.path.isdir(target):
                file.fail(f"{target} is a folder, expected a file or nothing; move it away")
            elif not overwrite:
                file.status = "skipped"
    if report is not None:
        _check_report(report, originals, targets)
    return Plan(files=[file for file, _ in found], **left_out)


def _photos_in(folder: str, recursive: bool) -> tuple[list[Path], list[PhotoFile], Counter[str]]:
    """A folder's photos (paths within it), what of it cannot be read, and how much is left out, by `Plan`'s names."""
    names, failures, left_out = [], [], Counter()

    def fail(path: str, reason: str) -> None:
        failures.append(PhotoFile(input=path))
        failures[-1].fail(reason)

    def fail_folder(error: OSError) -> None:
        fail(str(error.filename), f"the folder cannot be read ({error.strerror}); check its permissions")

    for root, folders, files in os.walk(folder, onerror=fail_folder):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = visible if recursive else []
        links = [name for name in visible if os.path.islink(os.path.join(root, name))]
        left_out["linked_folders"] += len(links)
        left_out["unsearched_folders"] += 0 if recursive else len(visible) - len(links)
        for name in sorted(files):
            if name.startswith(".") or Path(name).suffix.lower() not in PHOTO_SUFFIXES:
                left_out["ignored_files"] += 1
            elif os.path.exists(path := os.path.join(root, name)) and not os.path.isfile(path):
                fail(path, "expected a photo, got something else")
            else:
                names.append(Path(root, name).relative_to(folder))
    return names, failures, left_out


def _output_names(names: list[Path], suffix: str) -> list[Path]:
    """The name of each output: a.jpg -> a.png; a.jpg and a.webp -> a_jpg.png and a_webp.png.

    Names that differ by case alone count as one, for the file systems on which they are.
    """

    def renamed(name: Path, addition: str = "") -> Path:
        stem = name.stem if name.suffix.lower() in PHOTO_SUFFIXES else name.name
        return name.with_name(stem + addition + suffix)

    def key(name: Path) -> str:
        return str(name).casefold()

    counts = Counter(key(renamed(name)) for name in names)
    taken = {name for name, count in counts.items() if count == 1}
    outputs = []
    for name in names:
        output = renamed(name)
        if counts[key(output)] > 1:
            addition = f"_{name.suffix[1:].lower()}" if name.suffix else ""
            output, number = renamed(name, addition), 2
            while key(output) in taken:
                output, number = renamed(name, f"{addition}_{number}"), number + 1
            taken.add(key(output))
        outputs.append(output)
    return outputs


def _format_of_suffix(path: str) -> str | None:
    return next((format for format, suffixes in SUFFIXES.items() if Path(path).suffix.lower() in suffixes), None)


def _is_one_file(output: str) -> bool:
    return Path(output).suffix.lower() in PHOTO_SUFFIXES and not os.path.isdir(output)


def _output_format(arguments: argparse.Namespace) -> str:
    format = arguments.format
    if _is_one_file(arguments.output):
        suffix, by_suffix = Path(arguments.output).suffix, _format_of_suffix(arguments.output)
        if by_suffix is None:
            writable = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
            raise ValueError(f"-o {arguments.output}: expected a folder or a file that ends in {writable}")
        if format not in (None, by_suffix):
            raise ValueError(
                f"-o {arguments.output} with --format {format}: the suffix {suffix} says {by_suffix}; leave one out"
            )
        format = by_suffix
    format = format or "png"
    if format == "png" and arguments.quality is not None:
        raise ValueError("--quality is for --format jpeg or webp; PNG is lossless, leave --quality out")
    return format


def _check_output(output: str, paths: list[str], folders: list[str]) -> None:
    resolved = Path(output).resolve()
    check_outside(output, folders)
    if _is_one_file(output):
        if folders or len(paths) > 1:
            raise ValueError(f"-o {output} is one file, and there may be several photos; give a folder")
    elif os.path.lexists(output) and not os.path.isdir(output):
        raise ValueError(f"-o {output} is a file; expected a folder, or a file that ends in .png, .jpg or .webp")
    existing = resolved.parent if _is_one_file(output) else resolved
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"-o {output} cannot be made: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"-o {output} cannot be written: {existing} is read-only; choose another folder")


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino  # the same for a link, and for another spelling of the name


def _check_is_not_original(target: Path, originals: dict[tuple[int, int], str]) -> None:
    with contextlib.suppress(FileNotFoundError):  # a link to nothing
        original = originals.get(_identity(target))
        if original is not None:
            raise ValueError(
                f"the output {target} is the original {original}, which must not be overwritten; choose another folder"
            )


def _check_done(file: PhotoFile, settings: Settings, levels: int | None, bundled: bool) -> None:
    """Fail a photo that would be skipped, if what lies at its output does not look like a protected version of it.

    A protected photo has its size, and differs a little, within the budget if it is lossless. Whoever posts an
    unprotected photo because a file of that name was there is worse off than without the command.
    """
    try:
        original, existing = read_photo(file.input).pixels, read_photo(file.output).pixels
    except PhotoError as error:
        file.fail(str(error))
        return
    same_size = existing.shape == original.shape
    change = np.abs(existing.astype(np.int16) - original).mean() if same_size else math.inf
    if change > max(DONE_AT_MOST, levels or 0):
        what = "is another picture"
    elif change == 0:
        what = "is an unprotected copy of it"
    elif bundled and change < DONE_AT_LEAST * (levels or 0) * settings.strength:
        what = "differs less from it than a protected photo does"
    elif levels and settings.quality is None and (largest := largest_change(existing, original)) > levels:
        what = f"differs from it by up to {largest} levels, and {levels} are asked for"
    else:
        return
    file.fail(f"{file.output} exists and {what}; move it away, or write it again with --overwrite")


def _checkpoint_levels(checkpoint: str | None) -> int | None:
    """The default budget of a checkpoint that is a folder, or of the bundled one; None if it is not known yet."""
    folder = BUNDLED_CHECKPOINT if checkpoint is None else Path(checkpoint)
    try:
        return budget_levels(json.loads((folder / "model_index.json").read_bytes())["noise_budget"])
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _check_report(report: str, originals: dict[tuple[int, int], str], targets: list[Path]) -> None:
    folder = Path(report).resolve().parent
    made = {parent for target in targets for parent in target.resolve().parents}
    if not (folder.is_dir() or folder in made):
        raise ValueError(f"--report {report}: expected a file to write in a folder that exists")
    if os.path.lexists(report):
        _check_is_not_original(Path(report), originals)
        if not os.path.isfile(report) or Path(report).suffix.lower() in PHOTO_SUFFIXES:
            raise ValueError(f"--report {report}: expected a report to replace or nothing there, got something else")
    if Path(report).resolve() in {target.resolve() for target in targets}:
        raise ValueError(f"--report {report} is where a protected photo goes; choose another name")


def _check_checkpoint(checkpoint: str | None) -> None:
    """A folder that is not there costs a look-up on the Hub, and reads as a problem of the network."""
    if checkpoint is None or os.path.isdir(checkpoint):
        return
    if os.path.exists(checkpoint) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", checkpoint):
        raise ValueError(f"--checkpoint {checkpoint}: expected a folder or organization/name on the Hub, got neither")


# --- the work


@dataclass(kw_only=True, eq=False)
class _Task:
    file: PhotoFile
    pixels: int
    size: tuple[int, int] | None  # as the file's header says; None if it says nothing
    future: Future  # of reading, later of saving


def protect_files(
    files: list[PhotoFile], load_pipeline: Callable, settings: Settings, on_done: Callable[[PhotoFile], object]
) -> None:
    """Protect files, and write in each what became of it.

    Args:
        files: what to protect. Their outputs are overwritten.
        load_pipeline: called once, when the first photo has been read; never, if none can be.
        settings: how.
        on_done: called in this thread with each file that is done, in any order.

    Raises:
        KeyboardInterrupt: once what is being written is whole; what has not begun stays "waiting".
        ValueError: what `load_pipeline` raises.
    """
    waiting = deque(files)
    reading: deque[_Task] = deque()
    saving: list[_Task] = []
    workers = max(2, min(4, os.cpu_count() or 1))
    most_photos = 2 * settings.batch_size + workers
    pipeline, levels = None, settings.budget
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gap-diff")

    def read_ahead() -> None:
        while waiting and len(reading) + len(saving) < most_photos:
            size = photo_size(waiting[0].input)
            pixels = size[0] * size[1] if size else PIXELS_IN_FLIGHT // 3
            in_flight = sum(task.pixels for task in (*reading, *saving))
            if in_flight and in_flight + pixels > PIXELS_IN_FLIGHT:
                break
            file = waiting.popleft()
            reading.append(_Task(file=file, pixels=pixels, size=size, future=pool.submit(_read, file)))

    def protect_next() -> None:
        nonlocal pipeline, levels
        batch = [task for task in reading if task.size == reading[0].size][: settings.batch_size]
        by_shape: dict[tuple[int, ...], list[tuple[_Task, Photo]]] = {}  # what is turned upright may differ after all
        for task in batch:
            reading.remove(task)
            photo = task.future.result()
            if photo is None:
                on_done(task.file)
            else:
                by_shape.setdefault(photo.pixels.shape, []).append((task, photo))
        for group in by_shape.values():
            if pipeline is None:
                pipeline = load_pipeline()
                levels = levels or budget_levels(pipeline.config.noise_budget)
            for (task, photo), protected in zip(group, _protect(pipeline, group, levels, settings), strict=True):
                if protected is None:
                    on_done(task.file)
                else:
                    task.file.budget = levels
                    task.future = pool.submit(_save, task.file, photo, protected, settings)
                    saving.append(task)

    def collect() -> bool:
        """Take what has been saved off the list; whether the disk is full."""
        full = False
        for task in [task for task in saving if task.future.done()]:
            saving.remove(task)
            if not task.future.cancelled():
                full |= task.future.result()
                on_done(task.file)
        return full

    try:
        while waiting or reading or saving:
            read_ahead()
            if reading:
                protect_next()
            else:
                wait([task.future for task in saving], return_when=FIRST_COMPLETED)
            if collect():
                waiting.clear()  # they would fail as well, after all of the work
    except KeyboardInterrupt:
        with _ignoring_interrupts():
            pool.shutdown(wait=True, cancel_futures=True)
            collect()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(file: PhotoFile) -> Photo | None:
    started = time.perf_counter()
    try:
        photo = read_photo(file.input)
    except PhotoError as error:
        file.fail(str(error))
        return None
    except Exception as error:  # noqa: BLE001  a decoder that fails as none should is no reason to stop the others
        file.fail(f"cannot be read ({type(error).__name__}: {_first_line(error)})")
        return None
    file.height, file.width = photo.pixels.shape[:2]
    file.notes += photo.notes
    file.seconds += time.perf_counter() - started
    return photo


def _protect(pipeline, group: list[tuple[_Task, Photo]], levels: int, settings: Settings) -> list[Photo | None]:
    started = time.perf_counter()
    try:
        photos = [photo for _, photo in group]
        faces = None
        if settings.detect_faces:
            from .faces import find_faces

            faces = [find_faces(photo.pixels) for photo in photos]
            for (task, _), found in zip(group, faces):
                task.file.faces = len(found)
                if not found:
                    task.file.notes.append("no face was found: small ones and profiles are not")
        protected = pipeline.protect_batch(photos, levels / 255, settings.strength, faces)
    except Exception as error:  # noqa: BLE001  as in _read; too little memory above all
        remedy = "; a smaller --batch-size needs less memory" if len(group) > 1 else ""
        for task, _ in group:
            task.file.fail(f"cannot be protected ({_first_line(error)}){remedy}")
        return [None] * len(group)
    for task, _ in group:
        task.file.seconds += (time.perf_counter() - started) / len(group)
    return protected


def _save(file: PhotoFile, original: Photo, protected: Photo, settings: Settings) -> bool:
    """Encode, write, read again and measure a photo, then give it its name; whether the disk is full."""
    started = time.perf_counter()
    try:
        data = encode_photo(
            protected, format=settings.format, quality=settings.quality, keep_metadata=settings.keep_metadata
        )
        Path(file.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            file.output, data, lambda path: _measure(file, read_photo(path), original, protected, settings)
        )
        file.status = "protected"
    except PhotoError as error:
        file.fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            file.fail(f"{file.output} cannot be written, the disk is full; make room and run the same command again")
            return True
        file.fail(f"{file.output} cannot be written ({error.strerror or error})")
    except Exception as error:  # noqa: BLE001  as in _read
        file.fail(f"cannot be saved ({type(error).__name__}: {_first_line(error)})")
    finally:
        file.seconds += time.perf_counter() - started
    return False


def _measure(file: PhotoFile, saved: Photo, original: Photo, protected: Photo, settings: Settings) -> None:
    """Measure what was saved, and refuse it where a lossless file breaks the promise."""
    change = largest_change(saved.pixels, original.pixels)
    if settings.quality is None:
        if change == 0:
            raise PhotoError("nothing changes at this budget and strength; raise --strength or --budget; not saved")
        if change > file.budget:
            raise PhotoError(f"the saved file differs by {change} levels, expected at most {file.budget}; not saved")
        if not np.array_equal(_opacity(saved), _opacity(original)):
            raise PhotoError("the saved file's transparency differs from the original's; not saved")
    else:
        file.encoding_change = largest_change(saved.pixels, protected.pixels)
        file.encoding_psnr = finite(psnr(saved.pixels, protected.pixels))
    file.largest_change = change
    file.psnr = finite(psnr(saved.pixels, original.pixels))
    if settings.measure_ssim:
        file.ssim = ssim(saved.pixels, original.pixels)


def _opacity(photo: Photo) -> np.ndarray | None:
    return None if photo.alpha is None or photo.alpha.min() == 255 else photo.alpha


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not leave half of what the first one lets finish."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# --- what it says afterwards


def summarize(work: Plan, settings: Settings, output: str, seconds: float, *, interrupted: bool = False) -> str:
    """The lines that a run ends with."""
    by_status = {status: [f for f in work.files if f.status == status] for status in _STATUSES}
    protected, failed = by_status["protected"], by_status["failed"]
    lines = ["Interrupted."] if interrupted else []
    if protected:
        lines.append(f"Protected {_count(len(protected), 'photo')} in {seconds:.1f} s: {output}")
        change = max(file.largest_change for file in protected)
        lines.append(f"  PSNR {_range([f.psnr for f in protected])}; largest change {_count(change, 'level')} of 255")
        if settings.quality is not None:
            lines.append(
                f"  {settings.format.upper()} of quality {settings.quality} is lossy: saving moved the protected "
                f"pixels by up to {_count(max(f.encoding_change for f in protected), 'level')} "
                f"(PSNR {_range([f.encoding_psnr for f in protected])}), so the budget of {protected[0].budget} "
                "holds only before it, and some protection is lost; --format png loses none"
            )
    else:
        lines.append("Protected no photo.")
    if by_status["skipped"]:
        lines.append(
            f"Skipped {_count(len(by_status['skipped']), 'photo')}: the output exists and differs from "
            "the original as a protected photo does; --overwrite replaces it"
        )
    if failed:
        lines.append(f"Failed: {len(failed)}")
        lines += [f"  {file.error}" for file in failed]
    if by_status["waiting"]:
        lines.append(f"Not attempted: {_count(len(by_status['waiting']), 'photo')}; run the same command to go on")
    if work.ignored_files:
        lines.append(f"Ignored {_count(work.ignored_files, 'file')} without the suffix of a photo, or hidden")
    if work.unsearched_folders:
        lines.append(f"Not searched: {_count(work.unsearched_folders, 'subfolder')}; --recursive does")
    if work.linked_folders:
        lines.append(f"Not searched: {_count(work.linked_folders, 'linked folder')}; name it to protect what is there")
    for note, number in sorted(Counter(note for file in protected for note in file.notes).items()):
        lines.append(f"Note: in {_count(number, 'photo')}, {note}")
    if protected:
        lines.append(LIMITS)
    return "\n".join(lines) + "\n"


_STATUSES = ("protected", "skipped", "failed", "waiting")


def make_report(
    work: Plan,
    settings: Settings,
    arguments: argparse.Namespace,
    device: str | None,
    seconds: float,
    *,
    interrupted: bool = False,
) -> dict:
    """What was done, with what, to which photos: the content of --report."""
    counts = Counter(file.status for file in work.files)
    config = asdict(settings) | {
        "output": arguments.output,
        "recursive": arguments.recursive,
        "overwrite": arguments.overwrite,
        "checkpoint": arguments.checkpoint or "bundled",
        "device": device,
    }
    del config["measure_ssim"]
    config["budget"] = next((file.budget for file in work.files if file.budget is not None), settings.budget)
    summary = {status: counts[status] for status in _STATUSES}
    summary |= {
        "ignored_files": work.ignored_files,
        "unsearched_folders": work.unsearched_folders,
        "linked_folders": work.linked_folders,
    }
    summary |= {"interrupted": interrupted, "seconds": round(seconds, 3)}
    photos = [asdict(file) | {"seconds": round(file.seconds, 4)} for file in work.files]
    return {"provenance": provenance(), "config": config, "summary": summary, "photos": photos}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _range(values: list[float | None]) -> str:
    """Of decibels; None stands for infinity."""
    low, high = (f"{end:.1f}" for f in (min, max) for end in [f(math.inf if v is None else v for v in values)])
    return f"{low} dB" if low == high else f"{low} to {high} dB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def _strength(text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not 0 < strength <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return strength
