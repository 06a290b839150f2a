"""`gap-diff benchmark report`: the cells of a benchmark as tables, with intervals over people."""

import argparse
import csv
import hashlib
import io
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import table

RESAMPLES = 2000
CONDITION = ("protection", "levels", "protection_settings", "publishing", "purification", "transform_weights")
"""What of a cell says what was done to the photos."""
OF_PERSON = ("own_photos", "person", "photos", "seed")
"""And what figures are averaged over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", help="folder of cells that gap-diff benchmark run wrote")
    parser.add_argument("--output", metavar="FOLDER", help="also write report.md, report.csv and plots there")
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
    text = "\n".join(filter(None, [to_markdown(records), papers_tables(records)]))
    sys.stdout.write(text)
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.csv", to_csv(records).encode())
        write_atomically(folder / "report.md", text.encode())
        plots = draw_plots(records, folder)
        if arguments.pictures:
            plots += draw_grids(records, Path(arguments.pictures), folder)
        shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
        write_atomically(folder / "report.md", (text + shown).encode())
    return 0


def load_cells(folder: str | Path) -> list[dict[str, Any]]:
    """All cells in a folder, by name; ValueError if there is none, or a file that is something else."""
    records = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known = {"cell", "figures", "seconds"} <= set(record)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path}: expected a cell of gap-diff benchmark run, got another file")
        records.append(record)
    if not records:
        raise ValueError(f"{folder}: expected a folder with cells of gap-diff benchmark run, found none")
    return records


def to_markdown(records: list[dict[str, Any]]) -> str:
    """A table for each model, attacker and prompt, a row for each condition: means over people, and their interval."""
    tables = []
    for title, conditions in groups_of(records):
        cells = [record for of_condition in conditions.values() for record in of_condition]
        figures = list(cells[0]["figures"])
        people = sorted({record["cell"]["person"] for record in cells})
        rows = []
        for condition, of_condition in conditions.items():
            count = len({record["cell"]["person"] for record in of_condition})
            rows.append([condition, str(count), *(_show(of_condition, figure) for figure in figures)])
        title += f": mean over people (95 % interval, bootstrap over {len(people)} people)"
        tables.append(table(title, ["photos", "people", *figures], rows))
        for figure in named(figures, "recognised"):
            each = [
                [condition, *(_of_person(of_condition, person, figure) for person in people)]
                for condition, of_condition in conditions.items()
            ]
            tables.append(table(f"{figure[0].upper()}{figure[1:]}, each person", ["photos", *people], each))
    return "\n".join([*tables, *_worst_attackers(records), _what_it_takes(records)])


def named(figures: Iterable[str], *names: str) -> list[str]:
    """Those of the figures that have these names, in their order, whichever backend measured them."""
    figures = list(figures)
    return [figure for name in names for figure in figures if figure.partition(" (")[0] == name]


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
    titles = [_title(cells[0]["cell"]) for cells in groups.values()]
    result = []
    for (setting, cells), title in zip(groups.items(), titles):
        if titles.count(title) > 1:
            title += f", settings {hashlib.sha256(setting.encode()).hexdigest()[:6]}"
        result.append((title, _label(_grouped(cells, _condition))))
    return result


def papers_tables(records: Sequence[dict[str, Any]]) -> str:
    """For each model and attacker the shape of the paper's tables, a row a method, with its printed rows; "" if no
    prompt is one of the paper's."""
    from . import benchmark_printed as printed

    letters_of = {}
    for record in records:
        cell = record["cell"]
        if (subject := _subject(cell)) and (name := printed.letter(cell["prompt"], subject)):
            letters_of[id(record)] = name
    records = [record for record in records if id(record) in letters_of]
    records = sorted(records, key=lambda record: _title(record["cell"]))
    tables = []
    for cells in _grouped(records, _attack).values():
        letters = sorted({letters_of[id(record)] for record in cells})
        rows = []
        for condition, of_condition in _label(_grouped(cells, _condition)).items():
            row = [f"ours: {condition}"]
            for name in letters:
                of_prompt = [r for r in of_condition if letters_of[id(r)] == name]
                row += [_as_printed(of_prompt, figure) for figure in printed.FIGURES]
            rows.append(row)
        for name, methods in printed.TABLES.items():
            for method, figures in methods.items():
                values = [
                    f"{value:.0f}%" if figure == "FDFR" else f"{value:.2f}"
                    for prompt in letters
                    for figure, value in zip(printed.FIGURES, figures[prompt])
                ]
                rows.append([f"printed, {name}: {method}", *values])
        cell = cells[0]["cell"]
        title = (
            f"{cell['method']} ({cell['preset']}) on {cell['model']}, beside what the paper prints of DreamBooth of "
            "Stable Diffusion 2.1 with other detectors and embeddings, its SER-FIQ stretched: not the levels, "
            "only the order of rows can be compared"
        )
        header = [f"{prompt}: {figure}" for prompt in letters for figure in printed.FIGURES]
        tables.append(table(title, ["method", *header], rows))
    return "\n".join(tables)


def _worst_attackers(records: Sequence[dict[str, Any]]) -> list[str]:
    """For each model that was attacked in several ways, what the best attack on each person got."""
    tables = []
    for model, cells in _grouped(records, lambda record: json.dumps(record["cell"]["model"])).items():
        if len(_grouped(cells, _attack)) < 2:
            continue
        figures = named(cells[0]["figures"], "recognised", "ISM")
        rows = []
        for condition, of_condition in _label(_grouped(cells, _condition)).items():
            by_attack = _grouped(of_condition, _attack)
            row = [condition, str(len(by_attack))]
            for figure in figures:
                most: dict[str, float] = {}
                for of_attack in by_attack.values():
                    for person, value in person_means(of_attack, figure).items():
                        most[person] = max(value, most.get(person, value))
                style = ".0%" if figure.startswith("recognised") else ".2f"
                row.append(f"{sum(most.values()) / len(most):{style}}" if most else "none")
            rows.append(row)
        title = f"The worst of the attackers on {json.loads(model)} for each person: mean over people"
        tables.append(table(title, ["photos", "attackers", *figures], rows))
    return tables


def _what_it_takes(records: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of protecting and of attacking, and what protecting does to the looks of photos."""
    rows = []
    looks = [("psnr", "{:.1f} dB"), ("ssim", "{:.3f}")]
    if any("lpips" in (record.get("cost") or {}) for record in records):
        looks.append(("lpips", "{:.3f}"))
    protections = _grouped(records, lambda record: (record["cell"]["protection"], record["cell"]["levels"]))
    for (protection, levels), cells in sorted(protections.items()):
        if protection != "none":
            took = statistics.median(record["seconds"].get("protection", 0) for record in cells)
            costs = [record["cost"] for record in cells if record.get("cost")]
            shown = []
            for name, form in looks:
                values = [cost[name] for cost in costs if name in cost]
                few = f" ({len(values)} of {len(costs)} cells)" if 0 < len(values) < len(costs) else ""
                shown.append(form.format(statistics.mean(values)) + few if values else "")
            rows.append([f"protecting a person's photos: {protection}, {levels} levels", f"{took:.1f} s", "", *shown])
    attacks = sorted(_grouped(records, _attack).values(), key=lambda cells: _title(cells[0]["cell"]))
    for cells in attacks:
        method, preset = (cells[0]["cell"][name] for name in ("method", "preset"))
        training, drawing = (
            statistics.median(record["seconds"].get(part, 0) for record in cells) for part in ("training", "drawing")
        )
        memory = [record["peak_memory_gb"] for record in cells if record["peak_memory_gb"] is not None]
        rows.append(
            [
                f"attacking: {method} ({preset})",
                f"{training:.0f} s, and {drawing:.0f} s to draw",
                f"{max(memory):.1f} GB" if memory else "",
                *[""] * len(looks),
            ]
        )
    title = "What it takes: median times and the most memory; and how far protected photos are from clean ones"
    return table(title, ["", "time", "memory", *(name.upper() for name, _ in looks)], rows)


def _condition(record: Mapping[str, Any]) -> str:
    return json.dumps([record["cell"].get(key) for key in CONDITION])


def _attack(record: Mapping[str, Any]) -> str:
    return _without(record["cell"], *CONDITION, *OF_PERSON, "prompt")


def _subject(cell: Mapping[str, Any]) -> str | None:
    """What the attacker called the person; None if it learned no word."""
    word, prompt = cell["attack"].get("rare_token"), cell["attack"].get("instance_prompt", "")
    return None if word is None else word + prompt.rpartition(word)[2]


def _as_printed(records: Sequence[dict[str, Any]], figure: str) -> str:
    """The mean over people with the paper's accounting: a person without any face has an ISM of 0, a picture without
    one a SER-FIQ of 0."""
    figure = {"SER-FIQ": "SER-FIQ, all"}.get(figure, figure)
    values = list(person_means(records, figure).values())
    if not records or figure not in records[0]["figures"]:
        return ""
    if figure == "ISM":
        values += [0.0] * (len({record["cell"]["person"] for record in records}) - len(values))
    if not values:
        return ""
    style = ".0%" if records[0]["figures"][figure]["percent"] else ".2f"
    return f"{sum(values) / len(values):{style}}"


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


def describe(cell: Mapping[str, Any]) -> str:
    """What was done to the photos, in words."""
    parts = ["clean"] if cell["protection"] == "none" else [f"{cell['protection']}, {cell['levels']} levels"]
    name = cell["protection_settings"].get("name", "bundled")
    if name != "bundled":
        parts[0] += f" ({name})"
    parts += [describe_transform(cell[name]) for name in ("publishing", "purification") if cell[name] is not None]
    return ", then ".join(parts)


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
    for record in records:
        mean = record["figures"].get(figure, {}).get("mean")
        if mean is not None:
            means.setdefault(record["cell"]["person"], []).append(mean)
    return {person: sum(values) / len(values) for person, values in means.items()}


def _show(records: list[dict[str, Any]], figure: str) -> str:
    values = list(person_means(records, figure).values())
    if not values:
        return "none"
    style = ".0%" if records[0]["figures"][figure]["percent"] else ".2f"
    text = f"{sum(values) / len(values):{style}}"
    if interval := bootstrap_interval(values):
        text += f" ({interval[0]:{style}} to {interval[1]:{style}})"
    people = {record["cell"]["person"] for record in records}
    return text if len(values) == len(people) else f"{text}, {len(values)} of {len(people)} people"


def _of_person(records: list[dict[str, Any]], person: str, figure: str) -> str:
    mean = person_means(records, figure).get(person)
    return "" if mean is None else f"{mean:.0%}"


def _title(cell: Mapping[str, Any]) -> str:
    attacker = f"{cell['method']} ({cell['preset']}) on {cell['model']}"
    return f'{attacker}, {cell["count"]} pictures of "{cell["prompt"]}" a person and seed'


def _without(cell: Mapping[str, Any], *names: str) -> str:
    """A cell's settings but these, and but the attacker's seed."""
    settings = {key: value for key, value in cell.items() if key not in names}
    settings["attack"] = {key: value for key, value in cell["attack"].items() if key != "seed"}
    return json.dumps(settings, sort_keys=True)


def _label(conditions: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Conditions by what they are called; those of one name get the beginning of their settings' hash."""
    names = {key: describe(records[0]["cell"]) for key, records in conditions.items()}
    called = list(names.values())
    for key, name in names.items():
        if called.count(name) > 1:
            names[key] = f"{name} [{hashlib.sha256(key.encode()).hexdigest()[:6]}]"
    clean_first = sorted(conditions, key=lambda key: (not names[key].startswith("clean"), names[key]))
    return {names[key]: conditions[key] for key in clean_first}


def _grouped(records: Iterable[dict[str, Any]], key) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups
