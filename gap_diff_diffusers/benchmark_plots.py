"""The plots and picture grids of `gap-diff benchmark report`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark_report import bootstrap_interval, describe, describe_transform, groups_of, named, person_means

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
        for name, of_cell, label in (
            ("jpeg", _jpeg_quality, "JPEG quality"),
            ("budget", _levels, "budget in levels"),
        ):
            curves = _curves(cells, of_cell)
            if curves:
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
    import numpy as np
    from PIL import Image, ImageDraw

    from .benchmark_run import cell_path

    written = []
    for number, (_, conditions) in enumerate(groups_of(records), start=1):
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
                caption = Image.new("RGB", (row.width, 20), "white")
                ImageDraw.Draw(caption).text((4, 4), label, fill="black")
                rows += [np.asarray(caption), np.asarray(row)]
            if rows:
                folder.mkdir(parents=True, exist_ok=True)
                written.append(folder / f"pictures-{number}-{person}.png")
                Image.fromarray(np.concatenate(rows)).save(written[-1])
    if not written:
        raise ValueError(
            f"{pictures}: expected pictures of these cells, found none; benchmark run --pictures saves them"
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
    title: str, curves: Mapping[str, dict[float, list]], figures: Sequence[str], label: str, path: Path
) -> Path:
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(1, len(figures), figsize=(3.6 * len(figures), 3.4), squeeze=False)
    for axis, figure in zip(axes[0], figures):
        for index, (name, points) in enumerate(curves.items()):
            values = {x: list(person_means(cells, figure).values()) for x, cells in sorted(points.items())}
            values = {x: entries for x, entries in values.items() if entries}
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


def _curves(cells: Sequence[Mapping[str, Any]], of_cell) -> dict[str, dict[float, list]]:
    """{name: {x: cells}} of those names that have several values of x."""
    curves: dict[str, dict[float, list]] = {}
    for record in cells:
        if (place := of_cell(record["cell"])) is not None:
            name, x = place
            curves.setdefault(name, {}).setdefault(x, []).append(record)
    return {name: points for name, points in curves.items() if len(points) > 1}


def _jpeg_quality(cell: Mapping[str, Any]) -> tuple[str, float] | None:
    """What was done besides, and the quality of a JPEG whose one argument that is."""
    spec = cell["publishing"]
    if not isinstance(spec, dict) or spec.get("name") != "jpeg" or set(spec) != {"name", "quality"}:
        return None
    if not isinstance(spec["quality"], int | float):  # a range
        return None
    return describe({**cell, "publishing": None}), spec["quality"]


def _levels(cell: Mapping[str, Any]) -> tuple[str, float] | None:
    """What was done besides, and the budget; clean photos have none."""
    if cell["protection"] == "none":
        return None
    name = re.sub(r", \d+ levels", "", describe({**cell, "publishing": None, "purification": None}))
    rest = [describe_transform(cell[key]) for key in ("publishing", "purification") if cell[key] is not None]
    return ", then ".join([name, *rest]), cell["levels"]
