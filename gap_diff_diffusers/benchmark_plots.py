"""The plots and picture grids of `gap-diff benchmark report`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark_report import (
    AFTER,
    CONDITION,
    PROTECTION,
    bootstrap_interval,
    describe,
    describe_after,
    describe_protection,
    groups_of,
    named,
    person_means,
    settings_of,
    told_apart,
)
from .transforms import PUBLISHING

FIGURES = ("recognised", "FDFR", "ISM", "BRISQUE", "SER-FIQ")
SHOWN = 4


def draw_plots(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write bars of every condition, and curves over JPEG quality and over the budget where there are several.

    One picture of each kind for every table of the report, as SVG, numbered as they come there.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "expected matplotlib to draw plots, got none; pip install 'gap_diff_diffusers[metrics]'"
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gap-diff"  # else the same plot is another file each time
    written = []
    for number, (title, conditions) in enumerate(groups_of(records), start=1):
        cells = [record for of_condition in conditions.values() for record in of_condition]
        figures = named(cells[0]["figures"], *FIGURES)
        written.append(_draw_bars(title, conditions, figures, folder / f"conditions-{number}.svg"))
        for name, places, label in (
            ("jpeg", _over_jpeg(cells), "JPEG quality (dashed: without)"),
            ("budget", _over_budget(cells), "budget in levels (0: clean)"),
        ):
            if curves := _curves(places):
                path = folder / f"{name}-{number}.svg"
                written.append(_draw_curves(title, curves, figures, label, path))
    return written


def draw_grids(records: Sequence[Mapping[str, Any]], pictures: Path, folder: Path) -> list[Path]:
    """Write a grid for every table and person: a row for each condition, of the first pictures that were drawn.

    Args:
        records: the cells.
        pictures: where `gap-diff benchmark run --pictures` put its pictures, one for each cell.
        folder: where to write.

    Raises:
        ValueError: there is no picture of any cell.
    """
    import torch
    from PIL import Image

    from .benchmark_run import cell_path
    from .data import save_sheet, to_tensor

    written = []
    for number, (title, conditions) in enumerate(groups_of(records), start=1):
        people = sorted({record["cell"]["person"] for cells in conditions.values() for record in cells})
        for person in people:
            rows = []
            for label, cells in conditions.items():
                cell = min((r["cell"] for r in cells if r["cell"]["person"] == person), key=_seed, default=None)
                path = None if cell is None else (pictures / cell_path(Path(), cell).name).with_suffix(".png")
                if path is None or not path.is_file():
                    continue
                with Image.open(path) as grid:
                    side = cell["attack"]["resolution"]
                    row = grid.convert("RGB").crop((0, 0, side * min(SHOWN, cell["count"]), side))
                rows.append((label, torch.stack(to_tensor(row).split(side, dim=2))))
            if rows:
                written.append(folder / f"pictures-{number}-{person}.png")
                save_sheet(rows, written[-1], SHOWN, title=f"{person}: {title}")
    if not written:
        raise ValueError(
            f"{pictures}: expected pictures of these cells, found none; benchmark run --pictures saves those of cells "
            "that it runs"
        )
    return written


def _seed(cell: Mapping[str, Any]) -> int:
    return cell["seed"]


def _draw_bars(title: str, conditions: Mapping[str, list], figures: Sequence[str], path: Path) -> Path:
    from matplotlib import pyplot

    size = (3.2 * len(figures) + 2.5, 0.4 * len(conditions) + 1.6)
    plot, axes = pyplot.subplots(1, len(figures), figsize=size, sharey=True, squeeze=False)
    for axis, figure in zip(axes[0], figures):
        for row, cells in enumerate(conditions.values()):
            values = list(person_means(cells, figure).values())
            if not values:
                continue
            mean = sum(values) / len(values)
            low, high = bootstrap_interval(values) or (mean, mean)
            errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axis.barh(row, mean, color=f"C{row}", xerr=errors, capsize=3)
        axis.set_title(figure)
        if _is_share(conditions, figure):
            axis.set_xlim(0, 1)
    axes[0][0].set_yticks(range(len(conditions)), list(conditions))
    axes[0][0].invert_yaxis()
    return _save(plot, title, path)


def _is_share(conditions: Mapping[str, list], figure: str) -> bool:
    """Whether a figure is a share."""
    return all(record["figures"][figure]["percent"] for cells in conditions.values() for record in cells)


def _draw_curves(
    title: str, curves: Mapping[str, dict[float | None, list]], figures: Sequence[str], label: str, path: Path
) -> Path:
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(1, len(figures), figsize=(3.6 * len(figures), 3.4), squeeze=False)
    for axis, figure in zip(axes[0], figures):
        for index, (name, points) in enumerate(curves.items()):
            values = {x: list(person_means(cells, figure).values()) for x, cells in points.items()}
            if without := values.pop(None, None):
                axis.axhline(sum(without) / len(without), color=f"C{index}", linestyle="--")
            values = {x: entries for x, entries in sorted(values.items()) if entries}
            means = [sum(entries) / len(entries) for entries in values.values()]
            intervals = [bootstrap_interval(e) or (m, m) for e, m in zip(values.values(), means)]
            axis.plot(list(values), means, marker="o", color=f"C{index}", label=name)
            low, high = zip(*intervals) if intervals else ((), ())
            axis.fill_between(list(values), low, high, color=f"C{index}", alpha=0.15)
        axis.set_title(figure)
        axis.set_xlabel(label)
    axes[0][0].legend(fontsize="small")
    return _save(plot, title, path)


def _save(plot, title: str, path: Path) -> Path:
    from matplotlib import pyplot

    plot.suptitle(title, fontsize=9)
    plot.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, metadata={"Date": None})
    pyplot.close(plot)
    return path


Place = tuple[str, str, float | None, Mapping[str, Any]]
"""Of a cell in a plot: the settings of its curve, what that is called, x, and the cell."""


def _curves(places: Iterable[Place]) -> dict[str, dict[float | None, list]]:
    """{name: {x: cells}} of those curves that have several values of x, besides 0 and None."""
    names: dict[str, str] = {}
    curves: dict[str, dict[float | None, list]] = {}
    for key, name, x, record in places:
        names[key] = name
        curves.setdefault(key, {}).setdefault(x, []).append(record)
    curves = {key: points for key, points in curves.items() if sum(bool(x) for x in points) > 1}
    return {name: curves[key] for key, name in told_apart({key: names[key] for key in curves}).items()}


def _over_jpeg(records: Iterable[Mapping[str, Any]]) -> Iterator[Place]:
    """The quality of cells whose photos were published as a JPEG or, None, as they are; a curve for what was done
    besides."""
    for record in records:
        cell = record["cell"]
        spec = cell["publishing"]
        preset = PUBLISHING.get(spec.get("preset")) if isinstance(spec, dict) else None
        if preset and preset.long_side is None:
            spec = None if preset.quality is None else {"name": "jpeg", "quality": preset.quality}
        is_jpeg = isinstance(spec, dict) and spec["name"] == "jpeg" and set(spec) == {"name", "quality"}
        if spec is None or (is_jpeg and not isinstance(spec["quality"], list)):  # which is a range
            besides = {**cell, "publishing": None}
            yield settings_of(besides, CONDITION), describe(besides), spec and spec["quality"], record


def _over_budget(records: Sequence[Mapping[str, Any]]) -> Iterator[Place]:
    """The levels, a curve for what was done; clean photos, with 0 levels, belong to every protection."""
    cells = [record["cell"] for record in records]
    protections = {settings_of(cell, PROTECTION): name for cell in cells if (name := _without_levels(cell))}
    for record, cell in zip(records, cells, strict=True):
        name = _without_levels(cell)
        for key, protection in {settings_of(cell, PROTECTION): name}.items() if name else sorted(protections.items()):
            label = ", then ".join([protection, *describe_after(cell)])
            yield key + settings_of(cell, AFTER), label, cell["levels"] if name else 0, record


def _without_levels(cell: Mapping[str, Any]) -> str | None:
    """Who protected the photos; None if nobody did."""
    return None if cell["protection"] == "none" else re.sub(r", \d+ levels", "", describe_protection(cell))
