"""README and model card: every table is what the records in the package say, and the records meet their bars."""

import json
from collections import Counter
from pathlib import Path

import pytest

from gap_diff_diffusers import (
    benchmark_attackers,
    benchmark_displacement,
    benchmark_identities,
    benchmark_quality,
    benchmark_report,
    benchmark_scale,
    benchmark_speed,
    benchmark_surrogate,
    benchmark_throughput,
    benchmark_training,
)
from gap_diff_diffusers.attackers import ATTACKERS

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "gap_diff_diffusers" / "checkpoints"
CELLS = ROOT / "gap_diff_diffusers" / "docs" / "benchmark" / "face-model"


def record(name):
    """The figures of that name, of whichever checkpoint has them."""
    (path,) = CHECKPOINTS.glob(f"*/figures/{name}.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "module", "documents"),
    [
        ("displacement", benchmark_displacement, ("README.md", "model_card.md")),
        ("scale", benchmark_scale, ("README.md", "model_card.md")),
        ("scale_faces", benchmark_scale, ("README.md", "model_card.md")),
        ("quality", benchmark_quality, ("README.md",)),
        ("speed", benchmark_speed, ("README.md",)),
        ("surrogate", benchmark_surrogate, ("README.md",)),
        ("throughput", benchmark_throughput, ("README.md",)),
        ("training", benchmark_training, ("README.md",)),
    ],
)
def test_tables_are_what_the_records_say(name, module, documents):
    table = module.to_markdown(record(name)).strip()
    for document in documents:
        assert table in (ROOT / document).read_text(), f"{document}: paste the table of figures/{name}.json again"


def test_the_attacks_in_the_documents_are_those_of_the_cells():
    text = benchmark_report.to_markdown(benchmark_report.load_cells(CELLS)).strip()
    for document in (ROOT / "README.md", ROOT / "model_card.md", CELLS.parent / "report.md"):
        assert text in document.read_text(), f"{document.name}: make the report of {CELLS.name} again"


def test_the_small_benchmark_in_the_documents_is_that_of_its_cells():
    folder = CELLS.with_name("mini")
    text = benchmark_report.to_markdown(benchmark_report.load_cells(folder)).strip()
    for document in (ROOT / "model_card.md", folder / "report.md"):
        assert text in document.read_text(), f"{document.name}: make the report of mini again"


def test_what_the_page_says_of_the_second_model_is_what_its_cells_say():
    cells = benchmark_report.load_cells(CELLS.with_name("face-model-second"))
    page = (ROOT / "gap_diff_diffusers" / "docs" / "training.md").read_text()
    assert benchmark_report.to_markdown(cells).strip() in page
    clean = mean_of_six(cells, protection="none")
    share = mean_of_six(cells, protection="gap-diff", publishing=JPEG) / clean
    assert share <= 0.75 and f"{share:.2f} of that" in " ".join(page.split())  # the aim is a half
    for folder, row in (("run-7", "the weights of run 7"), ("average", "the average of run c")):
        others = benchmark_report.load_cells(CELLS.with_name(f"face-model-second-{folder}"))
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {row}") and line.count("|") == 9)
        recognised = mean_of_six(others, protection="gap-diff", publishing=JPEG)
        assert line.endswith(f"| {100 * recognised:.0f} % | {recognised / clean:.2f} |")


def test_the_times_in_the_readme_are_those_of_the_cells():
    taken = [cell["seconds"] for cell in benchmark_report.load_cells(CELLS)]
    plain = [seconds["training"] + seconds["drawing"] for seconds in taken]
    whole = [sum(seconds[part] for part in ("class_images", "training", "drawing")) for seconds in taken]
    first = [total for total, seconds in zip(whole, taken, strict=True) if seconds["class_images"] > 0.05]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert len(first) == 7
    for seconds in (plain, first):
        assert f"{min(seconds):.0f} to {max(seconds):.0f} s" in readme


JPEG = {"name": "jpeg", "quality": 70}


def mean_of_six(cells, figure="recognised", **condition):
    chosen = [c for c in cells if all(c["cell"][key] == value for key, value in condition.items())]
    means = benchmark_report.person_means(chosen, figure)
    assert len(means) == 6 and len(set(Counter(c["cell"]["person"] for c in chosen).values())) == 1  # as many seeds
    return sum(means.values()) / 6


def test_protection_is_more_than_what_jpeg_alone_does():
    alone = mean_of_six(benchmark_report.load_cells(CELLS.with_name("face-model-clean-jpeg")), publishing=JPEG)
    cells = benchmark_report.load_cells(CELLS)
    clean = mean_of_six(cells, protection="none", seed=0)
    protected = mean_of_six(cells, protection="gap-diff", publishing=JPEG, seed=0)
    assert protected <= 0.5 * alone
    shares = f"{100 * alone:.0f} % are recognised, of clean ones as they are {100 * clean:.0f} %, of protected ones"
    for document in ("README.md", "model_card.md"):
        assert f"{shares} after JPEG {100 * protected:.0f} %" in " ".join((ROOT / document).read_text().split())


def test_the_attacks_meet_their_bars():
    cells = benchmark_report.load_cells(CELLS)
    clean = mean_of_six(cells, protection="none")
    assert clean >= 0.6 and mean_of_six(cells, "FDFR", protection="none") < 0.1
    assert mean_of_six(cells, protection="gap-diff", publishing=JPEG) <= clean / 3
    assert mean_of_six(cells, protection="gap-diff", publishing=None) <= clean / 4
    assert all(c["peak_memory_gb"] <= 3 for c in cells)
    # Of all cells; the aim is 240 s in each.
    assert sorted(c["seconds"]["training"] + c["seconds"]["drawing"] for c in cells)[len(cells) // 2] <= 270


@pytest.mark.parametrize(
    ("name", "module"), [("attackers", benchmark_attackers), ("identities", benchmark_identities)]
)
def test_what_says_whether_the_measuring_is_sound(name, module):
    figures = json.loads((CELLS.parent / f"{name}.json").read_text())
    assert module.to_markdown(figures).strip() in (ROOT / "README.md").read_text()
    if name == "attackers":
        assert figures["ratio"] >= 1.5
    else:
        assert all(figure["auc"] >= 0.99 for figure in figures["figures"].values())


def test_the_readme_names_every_attacker():
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in ATTACKERS if f"`{name}`" not in readme]


def test_nothing_is_left_to_fill_in():
    for document in ("README.md", "model_card.md"):
        assert "{{" not in (ROOT / document).read_text()


def test_the_records_meet_their_bars():
    """In the order of the tables; a record that misses one is a regression of the checkpoint or of the code."""
    displacement = record("displacement")
    ratios, names = displacement["ratios"], list(displacement["ratios"]["over random signs"])
    assert len(names) == 2
    for name, over_random in zip(names, (2.5, 4.75), strict=True):  # the aim for the second is 5
        assert ratios["over random signs"][name] >= over_random
        assert ratios["over PGD against that encoder"][name] > 1
        assert ratios["left without the mean of 100 others"][name] >= 0.7
        assert ratios["left without their aligned mean"][name] >= 0.55  # the aim is 0.7
    assert displacement["displacement"]["this checkpoint"]["psnr"] >= 32

    kinds = record("quality")["kinds"]
    assert (
        kinds["blurred"] >= 0.95 and kinds["darkened"] >= 0.95 and kinds["covered"] >= 0.9
    )  # the aim is 0.95 for all

    surrogate = record("surrogate")
    assert surrogate["psnr"] >= 29 and surrogate["pgd_displacement"] >= 0.5 and surrogate["one_face"] >= 0.9
    assert record("training")["ratios"]["this package"] >= 2
    speed = {(row["kind"], row["network"], *row["size"]): row for row in record("speed")["rows"]}
    default, paper = (speed["network", network, 512, 512]["seconds"] for network in ("default", "paper"))
    assert paper / default >= 10
    photo = speed["file", "default", 6000, 4000]
    assert photo["seconds"] <= 3 and photo["peak_memory"] <= 2e9
    assert all(row["psnr"] >= 32 for name in ("scale", "scale_faces") for row in record(name)["scale"])
    for row in record("scale_faces")["scale"]:
        if row["crop"] >= 400:  # a smaller one holds no detail once it is enlarged
            assert min(row["kept"].values()) >= 0.7
