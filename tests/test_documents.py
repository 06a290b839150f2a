"""README and model card: every table is what the records in the package say, and the bars they stand for are met."""

import json
from pathlib import Path

import pytest

from gap_diff_diffusers import benchmark_displacement, benchmark_scale, benchmark_speed, benchmark_throughput

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "gap_diff_diffusers" / "checkpoints" / "gap-diff" / "figures"


def record(name):
    return json.loads((FIGURES / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "module", "documents"),
    [
        ("displacement", benchmark_displacement, ("README.md", "model_card.md")),
        ("scale", benchmark_scale, ("README.md", "model_card.md")),
        ("speed", benchmark_speed, ("README.md",)),
        ("throughput", benchmark_throughput, ("README.md",)),
    ],
)
def test_tables_are_what_the_records_say(name, module, documents):
    table = module.to_markdown(record(name)).strip()
    for document in documents:
        assert table in (ROOT / document).read_text(), f"{document}: paste the table of figures/{name}.json again"


def test_nothing_is_left_to_fill_in():
    for document in ("README.md", "model_card.md"):
        assert "{{" not in (ROOT / document).read_text()
