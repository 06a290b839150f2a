"""The shape of what the benchmark reports, and that it measures what it says; no absolute times."""

import argparse
import json

import pytest
from PIL import Image

from gap_diff_diffusers.benchmark import BENCHMARKS, add_arguments, run
from gap_diff_diffusers.benchmark_speed import benchmark_speed, measure, take_turns, to_markdown
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.config import write_json

TINY = {"config": {"channels": [4], "layers_per_block": [1]}}
TINY_PAPER = {"config": {"architecture": "paper", "channels": [2]}}


@pytest.fixture
def ballast():
    """Memory of the process that measures, which must not count."""
    return b"x" * 1_200_000_000


def test_speed_times_every_case_and_reports_it(tmp_path, ballast):
    networks = {"default": TINY, "paper": TINY_PAPER}
    record = benchmark_speed(networks, sizes=(512,), runs=2, long_run_seconds=600, kinds=("network",))
    write_json(tmp_path / "speed.json", record)
    assert json.loads((tmp_path / "speed.json").read_text())["provenance"]["torch"]
    assert [(row["kind"], row["size"], row["network"]) for row in record["rows"]] == [
        ("network", [512, 512], "default"),
        ("network", [512, 512], "paper"),
    ]
    for row in record["rows"]:
        assert len(row["all_seconds"]) == 2 and not row["cold"]
        assert min(row["all_seconds"]) <= row["seconds"] <= max(row["all_seconds"])
        assert row["seconds"] > 0
        assert len(ballast) > row["peak_memory"] >= row["memory_before"] > 0
    header, _, line = to_markdown(record).splitlines()[:3]
    assert header.count("|") == line.count("|") and "512x512" in line


def test_a_case_that_takes_long_is_not_run_again(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 48)).save(path)
    case = {"kind": "file", "size": (64, 48), "network": TINY, "seed": 0, "photo": str(path)}
    (row,) = measure({"default": case}, runs=3, long_run_seconds=0)
    assert row["cold"] and row["all_seconds"] == [row["seconds"]]


def test_the_whole_command_is_timed_as_people_run_it(ballast):
    record = benchmark_speed({"default": TINY}, runs=1, photo_size=(64, 48), kinds=("command",))
    (row,) = record["rows"]
    assert row["seconds"] > 0 and 0 < row["peak_memory"] < len(ballast)


def test_a_failing_case_says_what_failed(tmp_path):
    case = {"kind": "command", "size": (64, 48), "network": {"bundled": True}, "photo": str(tmp_path / "none.jpg")}
    with pytest.raises(OSError, match=r"timing `gap-diff protect`.* failed: .*none\.jpg"):
        measure({"default": case}, runs=1, long_run_seconds=600)


def test_the_networks_take_turns_after_a_round_of_warm_up():
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, runs=3)
    assert calls == ["a", "b"] * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_a_case_that_was_killed_shows_as_failed():
    row = {"kind": "network", "size": [512, 512], "network": "paper", "cold": True, "error": "ended by signal 9"}
    done = row | {"network": "default", "cold": False, "seconds": 2.0, "all_seconds": [2.0], "peak_memory": 10**9}
    del done["error"]
    record = {
        "networks": {"default": TINY, "paper": TINY_PAPER},
        "runs": 1,
        "long_run_seconds": 5,
        "machine": {"processor": "some", "cores": 2, "threads": 2},
        "provenance": {"torch": "2"},
        "rows": [done, row],
    }
    text = to_markdown(record)
    assert "| 2.00 s | failed | - | 1.00 GB | failed |" in text and "ended by signal 9" in text


@pytest.mark.parametrize(
    "arguments, message", [(["--sizes", "500"], "multiples of 256"), (["--runs", "0"], "--runs of at least 1")]
)
def test_arguments_out_of_range_are_refused(arguments, message):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert set(BENCHMARKS) >= {"speed"}
    with pytest.raises(ValueError, match=message):
        run(parser.parse_args(["speed", *arguments]))


def test_throughput_counts_every_way_of_doing_it(checkpoint, tmp_path, capsys):
    arguments = ["--count", "2", "--size", "32", "--starts", "1", "--checkpoint", checkpoint]
    assert main(["benchmark", "throughput", *arguments, "--output", str(tmp_path / "t.json")]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert set(record["seconds"]) == {"command", "one start", "overlapped", "one at a time"}
    assert all(seconds > 0 for seconds in record["seconds"].values())
    assert "2 photos of 32x32" in capsys.readouterr().out
