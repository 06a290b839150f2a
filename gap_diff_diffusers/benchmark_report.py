"""`gap-diff benchmark report`: the cells of a benchmark as tables, with intervals over people."""

import argparse
import csv
import hashlib
import io
import json
import logging
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__
from . import benchmark_printed as printed
from .config import table
from .metrics.paper import FIGURES, paper_mean, without_backend

logger = logging.getLogger(__name__)

CELL_FORMAT = 1
"""Of the files of cells, which have it as `format` (1 where they lack it): raised when old and new ones no longer
compare, because a figure is computed otherwise or a key means something else."""
RESAMPLES = 2000
PROTECTION = ("protection", "protection_settings")
AFTER = ("publishing", "purification", "transform_weights")
CONDITION = ("protection", "levels", "protection_settings", *AFTER)
"""What of a cell says what was done to the photos."""
MODEL = ("model", "model_weights")
"""What of it says which model was attacked."""
OF_PERSON = ("own_photos", "person", "photos", "seed")
"""And what figures are averaged over."""
OF_DRAWING = ("count", "num_inference_steps", "guidance_scale")
"""And how pictures were drawn with what was learned."""


@dataclass(frozen=True)
class Number:
    """What is behind a figure of a table.

    Attributes:
        value: the mean over people, or as the table's title says; a share is from 0 to 1.
        interval: of the mean; None if there is none.
        people: how many the mean is over; None if it is no such mean.
        name: what follows the column's name, as ", s".
        printed: whether the paper says so.
    """

    value: float
    interval: tuple[float, float] | None = None
    people: int | None = None
    name: str = ""
    printed: bool = False


@dataclass(frozen=True)
class Entry:
    """What stands in a table's row and column, and its numbers."""

    text: str
    numbers: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: its rows are a name and, for each further column, an entry or mere text."""

    title: str
    header: list[str]
    rows: list[list[str | Entry]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="folder of cells that gap-diff benchmark run wrote")
    parser.add_argument(
        "--output", metavar="FOLDER", help="also write report.md, report.csv, tables.csv and plots there"
    )
    parser.add_argument(
        "--pictures", metavar="FOLDER", help="what benchmark run --pictures saved, to make grids of in --output"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, and write them and plots if asked for."""
    from .benchmark_plots import draw_grids, draw_plots
    from .images import write_atomically

    if arguments.pictures and not arguments.output:
        raise ValueError("expected --output, where to write the grids of --pictures, got none")
    records = load_cells(arguments.results)
    tables, papers = make_tables(records), make_papers_tables(records)
    text = tables_to_markdown([*tables, *papers])
    sys.stdout.write(text)
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.csv", to_csv(records).encode())
        write_atomically(folder / "tables.csv", tables_to_csv([*tables, *papers]).encode())
        write_atomically(folder / "report.md", text.encode())
        plots = draw_plots(records, folder)
        if arguments.pictures:
            plots += draw_grids(records, Path(arguments.pictures), folder)
        shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
        write_atomically(folder / "report.md", (text + shown).encode())
    return 0


def read_cell(path: Path) -> dict[str, Any]:
    """What `gap-diff benchmark run` wrote of a cell; ValueError for another file, or a cell of another format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["versions"]["gap_diff_diffusers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a cell of gap-diff benchmark run, got another file") from error
    if (found := record.get("format", 1)) != CELL_FORMAT:
        raise ValueError(
            f"{path}: expected a cell of format {CELL_FORMAT}, got one of {found}, by version {version}; report it "
            "with that version, or run the benchmark anew into another folder"
        )
    return record


def load_cells(folder: str | Path) -> list[dict[str, Any]]:
    """All cells in a folder, by name. It warns if another version of the package wrote them.

    Raises:
        ValueError: there is none, a file is something else, or they are of several versions of the package, or of
            another format than this one's.
    """
    records, first_of = [], {}
    for path in sorted(Path(folder).glob("*.json")):
        record = read_cell(path)
        version = record["versions"]["gap_diff_diffusers"]
        if not {"cell", "figures", "seconds", "peak_memory_gb"} <= set(record):
            raise ValueError(
                f"{path}: expected a cell as version {__version__} writes it, got one of {version}; report it with "
                "that version, or run the benchmark anew into another folder"
            )
        first_of.setdefault(version, path.name)
        records.append(record)
    if not records:
        raise ValueError(f"{folder}: expected a folder with cells of gap-diff benchmark run, found none")
    if len(first_of) > 1:
        found = " and ".join(f"{version} ({name})" for version, name in first_of.items())
        raise ValueError(
            f"{folder}: expected cells of one version, which alone compare, got {found}; put those of each into a "
            "folder of their own"
        )
    if version != __version__:
        logger.warning("%s: cells of version %s, reported by version %s", folder, version, __version__)
    return records


def to_markdown(records: list[dict[str, Any]]) -> str:
    """The tables of the cells alone, without what the paper prints."""
    return tables_to_markdown(make_tables(records))


def make_tables(records: list[dict[str, Any]]) -> list[Table]:
    """A table for each model, attacker and prompt, a row for each condition: means over people, and their interval."""
    tables = []
    for title, conditions in groups_of(records):
        cells = [record for of_condition in conditions.values() for record in of_condition]
        figures = _figures(cells)
        people = sorted({record["cell"]["person"] for record in cells})
        rows = []
        for condition, of_condition in conditions.items():
            count = len({record["cell"]["person"] for record in of_condition})
            rows.append([condition, str(count), *(_show(of_condition, figure) for figure in figures)])
        whole = f"{title}: mean over people (95 % interval, bootstrap over {len(people)} people)"
        tables.append(Table(whole, ["photos", "people", *figures], rows))
        for figure in named(figures, "recognised"):
            each = [
                [condition, *(_of_person(of_condition, person, figure) for person in people)]
                for condition, of_condition in conditions.items()
            ]
            tables.append(Table(f"{figure[0].upper()}{figure[1:]}, each person: {title}", ["photos", *people], each))
    return [*tables, *_worst_attackers(records), _what_it_takes(records)]


def named(figures: Iterable[str], *names: str) -> list[str]:
    """Those of the figures that have these names, in their order, whichever backend measured them."""
    figures = list(figures)
    return [figure for name in names for figure in figures if without_backend(figure) == name]


def _figures(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all figures that the cells have."""
    return list(dict.fromkeys(name for record in records for name in record["figures"]))


def groups_of(records: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """For each model, attacker and prompt what they are called, and the cells of each condition, clean ones first.

    Raises:
        ValueError: photos of a person changed between cells.
    """
    photos = {(record["cell"]["person"], record["cell"]["photos"]) for record in records}
    if len(photos) > len({person for person, _ in photos}):
        counts = Counter(person for person, _ in photos)
        people = ", ".join(sorted(person for person, count in counts.items() if count > 1))
        raise ValueError(f"expected one set of photos a person, got several of {people}; delete the old cells")
    records = sorted(records, key=lambda record: _title(record["cell"]))
    groups = _grouped(records, lambda record: _without(record["cell"], *CONDITION, *OF_PERSON))
    titles = told_apart({key: _title(cells[0]["cell"]) for key, cells in groups.items()}, "{}, settings {}")
    return [(title, _label(_grouped(groups[key], _condition))) for key, title in titles.items()]


def make_papers_tables(records: Sequence[dict[str, Any]]) -> list[Table]:
    """For each model and attacker the shape of the paper's tables, a row a method, with its printed rows, and what
    protecting took; none if no prompt is one of the paper's."""
    letters_of = {}
    for record in records:
        cell = record["cell"]
        if (subject := _subject(cell)) and (name := printed.letter(cell["prompt"], subject)):
            letters_of[id(record)] = name
    records = [record for record in records if id(record) in letters_of]
    records = sorted(records, key=lambda record: _title(record["cell"]))
    tables = []
    groups = _grouped(records, _drawing)
    names = {key: _attackers_model(cells[0]["cell"]) for key, cells in groups.items()}
    for key, attack in told_apart(names, "{}, settings {}").items():
        cells = groups[key]
        letters = sorted({letters_of[id(record)] for record in cells})
        ours = {figure: _nearest(cells, figure) for figure in FIGURES}
        rows = []
        for condition, of_condition in _label(_grouped(cells, _condition)).items():
            row = [f"ours: {condition}"]
            for name in letters:
                of_prompt = [r for r in of_condition if letters_of[id(r)] == name]
                row += [_as_printed(of_prompt, ours[figure]) for figure in FIGURES]
            rows.append(row)
        for name, methods in printed.TABLES.items():
            for method, figures in methods.items():
                values = [
                    _printed(f"{value:.2f}%", value / 100) if figure == "FDFR" else _printed(f"{value:.2f}", value)
                    for prompt in letters
                    for figure, value in zip(FIGURES, figures[prompt])
                ]
                rows.append([f"printed, {name}: {method}", *values])
        title = (
            f"{attack}{_measured_by(cells, ours.values())}: mean over "
            "people (95 % interval, bootstrap over people), beside what the paper prints of DreamBooth of Stable "
            "Diffusion 2.1 with other detectors and embeddings: not the levels, only the order of rows can be "
            "compared."
        )
        if ours["SER-FIQ"]:
            title += (
                " Its SER-FIQ is stretched by constants that suit ArcFace, so ours stands there without and with it."
            )
        header = [f"{prompt}: {figure}" for prompt in letters for figure in FIGURES]
        tables.append(Table(title, ["method", *header], rows))
    if protections := _protections(records):
        rows = [
            [f"ours: {name}", _time(cells, "protection"), _memory_of_protecting(cells)]
            for name, cells in protections.items()
        ]
        for name, seconds, memory in printed.COSTS:
            time, space = float(seconds), float(memory)
            rows.append(
                [f"printed: {name}", _printed(f"{seconds} s", time, ", s"), _printed(f"{memory} GB", space, ", GB")]
            )
        title = (
            "Protecting: ours, the median for all photos that a person publishes, beside what the paper prints, of a "
            "photo or of a person, which it does not say; its GAP-Diff without the training"
        )
        tables.append(Table(title, ["method", "time", "memory"], rows))
    return tables


def _printed(text: str, value: float, name: str = "") -> Entry:
    return Entry(text, (Number(value, name=name, printed=True),))


def _nearest(records: Sequence[Mapping[str, Any]], figure: str) -> str | None:
    """What the cells call a figure of the paper's: by ArcFace, as the paper's, if that was asked, or else by dlib."""
    return min(named(_figures(records), figure), key=lambda name: ("(ArcFace)" not in name, name), default=None)


def _measured_by(records: Sequence[Mapping[str, Any]], figures: Iterable[str | None]) -> str:
    """Which backends measured them, in brackets."""
    backends = {name: figure.get("backend") for record in records for name, figure in record["figures"].items()}
    known = [f"{without_backend(name)} by {backends[name]}" for name in figures if name and backends[name]]
    return f" ({'; '.join(known)})" if known else ""


def _as_printed(records: Sequence[dict[str, Any]], figure: str | None) -> str | Entry:
    """The mean over people, and its interval, with the paper's accounting; "" if it was not measured."""
    pictures: dict[str, list[float | None]] = {}
    for record in _measured(records, figure):
        pictures.setdefault(record["cell"]["person"], []).extend(record["figures"][figure]["values"])
    means = {person: paper_mean(figure, values) for person, values in pictures.items()}
    means = {person: mean for person, mean in means.items() if mean is not None}
    if not means:
        return ""
    counted = _summary(list(means.values()), len(pictures), percent=_is_percent(records, figure))
    if without_backend(figure) != "SER-FIQ":
        return counted
    stretched = tuple(replace(number, name=", stretched") for number in counted.numbers)
    if (all_pictures := f"{figure}, all") not in _figures(records):
        return Entry(counted.text, stretched)
    plain = _show(records, all_pictures)
    return Entry(f"{plain.text}, stretched {counted.text}", (*plain.numbers, *stretched))


def _worst_attackers(records: Sequence[dict[str, Any]]) -> list[Table]:
    """For each model that was attacked in several ways, what the best attack on each person got."""
    tables = []
    models = _grouped(records, lambda record: settings_of(record["cell"], MODEL))
    for key, model in told_apart({key: cells[0]["cell"]["model"] for key, cells in models.items()}).items():
        cells = models[key]
        if len(_grouped(cells, _attack)) < 2:
            continue
        figures = named(_figures(cells), "recognised", "ISM")
        rows = []
        for condition, of_condition in _label(_grouped(cells, _condition)).items():
            by_drawing = _grouped(of_condition, _drawing)
            people = {record["cell"]["person"] for record in of_condition}
            row = [condition, str(len(_grouped(of_condition, _attack)))]
            for figure in figures:
                most: dict[str, float] = {}
                for of_drawing in by_drawing.values():
                    for person, value in person_means(of_drawing, figure).items():
                        most[person] = max(value, most.get(person, value))
                row.append(_summary(list(most.values()), len(people), percent=_is_percent(cells, figure)))
            rows.append(row)
        title = (
            f"The worst of the attackers on {model} for each person: mean over people (95 % interval, "
            "bootstrap over people)"
        )
        tables.append(Table(title, ["photos", "attackers", *figures], rows))
    return tables


def _what_it_takes(records: Sequence[dict[str, Any]]) -> Table:
    """Seconds and memory of protecting, of what comes after it and of attacking, and what protecting does to the looks
    of photos."""
    rows = []
    looks = [("psnr", "{:.1f} dB"), ("ssim", "{:.3f}")]
    if any("lpips" in (record.get("cost") or {}) for record in records):
        looks.append(("lpips", "{:.3f}"))
    for name, cells in _protections(records).items():
        costs = [record["cost"] for record in cells if record.get("cost")]
        shown = []
        for look, form in looks:
            values = [cost[look] for cost in costs if cost.get(look) is not None]
            mean = statistics.mean(values) if values else 0
            shown.append(Entry(form.format(mean) + _share(values, costs), (Number(mean),)) if values else "")
        time, memory = _time(cells, "protection"), _memory_of_protecting(cells)
        rows.append([f"protecting a person's photos: {name}", time, "", memory, *shown])
    after = [record for record in records if describe_after(record["cell"])]
    steps = _grouped(after, lambda record: settings_of(record["cell"], AFTER))
    for name, cells in _label(steps, lambda cell: ", then ".join(describe_after(cell))).items():
        rows.append([f"then, of a person's photos: {name}", _time(cells, "purification"), "", "", *[""] * len(looks)])
    attacks = _grouped(sorted(records, key=lambda record: _title(record["cell"])), _drawing)
    names = {key: f"attacking: {_attackers_name(cells[0]['cell'])}" for key, cells in attacks.items()}
    for key, name in told_apart(names).items():
        cells = attacks[key]
        training, drawing = _seconds(cells, "training"), _seconds(cells, "drawing")
        numbers = (Number(training, name=" of training, s"), Number(drawing, name=" of drawing, s"))
        drawn = [record for record in cells if record["seconds"].get("class_images", 0) > 0.05]
        first = ""
        if drawn:
            seconds = _seconds(drawn, "class_images")
            first = Entry(f"{seconds:.0f} s{_share(drawn, cells)}", (Number(seconds, name=", s"),))
        time = Entry(f"{training:.0f} s, and {drawing:.0f} s to draw", numbers)
        rows.append([name, time, first, _memory(cells), *[""] * len(looks)])
    title = "What it takes: median times and the most memory; and how far protected photos are from clean ones"
    header = ["", "time", "first, pictures of the class", "memory", *(name.upper() for name, _ in looks)]
    return Table(title, header, rows)


def _protections(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each protection with its budget and settings, by what it is called."""
    protected = [record for record in records if record["cell"]["protection"] != "none"]
    settings = ("protection", "levels", "protection_settings")
    groups = _grouped(protected, lambda record: settings_of(record["cell"], settings))
    return _label(groups, describe_protection)


def _seconds(records: Sequence[Mapping[str, Any]], part: str) -> float:
    return statistics.median(record["seconds"].get(part, 0) for record in records)


def _time(records: Sequence[Mapping[str, Any]], part: str) -> Entry:
    seconds = _seconds(records, part)
    return Entry(f"{seconds:.1f} s", (Number(seconds, name=", s"),))


def _share(some: Sequence, cells: Sequence) -> str:
    """How many cells these are of, if not of all."""
    return f" ({len(some)} of {len(cells)} cells)" if len(some) < len(cells) else ""


def _memory(records: Sequence[Mapping[str, Any]]) -> Entry:
    """The most that was used: on a GPU by the attack, elsewhere by the process since it began."""
    peaks: dict[str, list[float]] = {}
    for record in records:
        if record["peak_memory_gb"] is not None:
            whose = "" if str(record.get("device")).startswith("cuda") else " of the process"
            whose += " with gradient checkpointing" if record.get("gradient_checkpointing") else ""
            peaks.setdefault(whose, []).append(record["peak_memory_gb"])
    most = {whose: max(values) for whose, values in sorted(peaks.items())}
    text = ", ".join(f"{value:.1f} GB{whose}" for whose, value in most.items())
    return Entry(text, tuple(Number(value, name=f"{whose}, GB") for whose, value in most.items()))


def _memory_of_protecting(records: Iterable[Mapping[str, Any]]) -> str | Entry:
    """The most that was used of a GPU; "" if protecting used none, or nobody looked."""
    peaks = [peak for record in records if (peak := (record.get("cost") or {}).get("peak_memory_gb")) is not None]
    return Entry(f"{max(peaks):.1f} GB", (Number(max(peaks), name=", GB"),)) if peaks else ""


def settings_of(cell: Mapping[str, Any], names: Sequence[str]) -> str:
    """These settings of a cell, as a key: equal for cells that have the same ones."""
    return json.dumps([cell.get(name) for name in names])


def _condition(record: Mapping[str, Any]) -> str:
    return settings_of(record["cell"], CONDITION)


def _drawing(record: Mapping[str, Any]) -> str:
    """What learned and how it drew, whatever was drawn and measured."""
    return _without(record["cell"], *CONDITION, *OF_PERSON, "prompt", "metrics")


def _attack(record: Mapping[str, Any]) -> str:
    """What learned, however it then drew."""
    return _without(record["cell"], *CONDITION, *OF_PERSON, "prompt", "metrics", *OF_DRAWING)


def _subject(cell: Mapping[str, Any]) -> str | None:
    """What the attacker called the person; None if it learned no word."""
    word, prompt = cell["attack"].get("rare_token"), cell["attack"].get("instance_prompt", "")
    return None if word is None else word + prompt.rpartition(word)[2]


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each cell and figure."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    names = sorted({name for record in records for name in record["cell"]})
    writer.writerow([*names, "figure", "mean", "pictures", "undefined"])
    for record in records:
        cell = record["cell"]
        settings = [cell.get(name) for name in names]
        settings = [json.dumps(value) if isinstance(value, dict | list) else value for value in settings]
        for name, figure in record["figures"].items():
            values = figure["values"]
            mean = "" if figure["mean"] is None else figure["mean"]
            writer.writerow([*settings, name, mean, len(values), values.count(None)])
    return lines.getvalue()


def tables_to_markdown(tables: Iterable[Table]) -> str:
    """Their texts."""
    shown = []
    for each in tables:
        rows = [[entry.text if isinstance(entry, Entry) else entry for entry in row] for row in each.rows]
        shown.append(table(each.title, each.header, rows))
    return "\n".join(shown)


def tables_to_csv(tables: Iterable[Table]) -> str:
    """A line for each number of the tables; what the paper prints is in a column of its own."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["table", "row", "figure", "value", "low", "high", "people", "printed"])
    for each in tables:
        for name, *entries in each.rows:
            for column, entry in zip(each.header[1:], entries, strict=True):
                for number in entry.numbers if isinstance(entry, Entry) else ():
                    value = ["", "", "", "", number.value]
                    if not number.printed:
                        value = [number.value, *(number.interval or ("", "")), number.people or "", ""]
                    writer.writerow([each.title, name, column + number.name, *value])
    return lines.getvalue()


def describe(cell: Mapping[str, Any]) -> str:
    """What was done to the photos, in words."""
    return ", then ".join([describe_protection(cell), *describe_after(cell)])


def describe_after(cell: Mapping[str, Any]) -> list[str]:
    """What was done to the photos after they were protected, or not, each in words."""
    return [describe_transform(cell[name]) for name in ("publishing", "purification") if cell[name] is not None]


def describe_protection(cell: Mapping[str, Any]) -> str:
    """Who protected the photos, in words."""
    name = cell["protection_settings"].get("name", "bundled")
    text = "clean" if cell["protection"] == "none" else f"{cell['protection']}, {cell['levels']} levels"
    return text if name == "bundled" else f"{text} ({name})"


def describe_transform(spec: Any) -> str:
    """A transform as data, in words."""
    if isinstance(spec, list):
        return ", then ".join(map(describe_transform, spec))
    if isinstance(spec, str):
        return spec
    arguments = " ".join(f"{key} {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} {arguments}".strip()


def bootstrap_interval(values: list[float], *, seed: int = 0) -> tuple[float, float] | None:
    """The middle 95 % of the mean of values drawn anew from these; None for fewer than two."""
    import numpy as np

    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def person_means(records: Iterable[Mapping[str, Any]], figure: str) -> dict[str, float]:
    """The figure's mean over the seeds of every person that has it."""
    means: dict[str, list[float]] = {}
    for record in _measured(records, figure):
        if (mean := record["figures"][figure]["mean"]) is not None:
            means.setdefault(record["cell"]["person"], []).append(mean)
    return {person: sum(values) / len(values) for person, values in means.items()}


def _measured(records: Iterable[Mapping[str, Any]], figure: str | None) -> list[Mapping[str, Any]]:
    """The cells that have the figure; of those of one person, seed and prompt the one with the most pictures."""
    of_drawing = {}
    for record in sorted(records, key=lambda record: record["cell"]["count"]):
        if figure in record["figures"]:
            of_drawing[tuple(record["cell"][name] for name in ("person", "seed", "prompt"))] = record
    return list(of_drawing.values())


def _is_percent(records: Iterable[Mapping[str, Any]], figure: str) -> bool:
    return any(record["figures"][figure]["percent"] for record in records if figure in record["figures"])


def _show(records: Sequence[Mapping[str, Any]], figure: str) -> Entry:
    people = {record["cell"]["person"] for record in records}
    values = list(person_means(records, figure).values())
    return _summary(values, len(people), percent=_is_percent(records, figure))


def _summary(values: list[float], people: int, *, percent: bool) -> Entry:
    """The mean over people and its interval, and how many they are if not all."""
    if not values:
        return Entry("none")
    style, mean = ".0%" if percent else ".2f", sum(values) / len(values)
    text = f"{mean:{style}}"
    if interval := bootstrap_interval(values):
        text += f" ({interval[0]:{style}} to {interval[1]:{style}})"
    text = text if len(values) == people else f"{text}, {len(values)} of {people} people"
    return Entry(text, (Number(mean, interval, len(values)),))


def _of_person(records: list[dict[str, Any]], person: str, figure: str) -> str | Entry:
    mean = person_means(records, figure).get(person)
    return "" if mean is None else Entry(f"{mean:.0%}", (Number(mean, people=1),))


def _attackers_name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']} ({cell['preset']})"


def _attackers_model(cell: Mapping[str, Any]) -> str:
    return f"{_attackers_name(cell)} on {cell['model']}"


def _title(cell: Mapping[str, Any]) -> str:
    return f'{_attackers_model(cell)}, {cell["count"]} pictures of "{cell["prompt"]}" a person and seed'


def _without(cell: Mapping[str, Any], *names: str) -> str:
    """A cell's settings but these, and but the attacker's seed."""
    settings = {key: value for key, value in cell.items() if key not in names}
    settings["attack"] = {key: value for key, value in cell["attack"].items() if key != "seed"}
    return json.dumps(settings, sort_keys=True)


def _label(conditions: dict[str, list[dict[str, Any]]], describe=describe) -> dict[str, list[dict[str, Any]]]:
    """Conditions by what they are called, clean ones first, and numbers in their order."""
    names = told_apart({key: describe(records[0]["cell"]) for key, records in conditions.items()})
    order = sorted(conditions, key=lambda key: (not names[key].startswith("clean"), _with_numbers(names[key])))
    return {names[key]: conditions[key] for key in order}


def told_apart(names: dict[str, str], form: str = "{} [{}]") -> dict[str, str]:
    """Names by settings; those that several have get the beginning of their settings' hash."""
    called = Counter(names.values())
    return {
        key: form.format(name, hashlib.sha256(key.encode()).hexdigest()[:6]) if called[name] > 1 else name
        for key, name in names.items()
    }


def _with_numbers(name: str) -> list[str | float]:
    """What to sort a name by, so that 16 comes after 4: words and numbers in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def _grouped(records: Iterable[dict[str, Any]], key) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups
