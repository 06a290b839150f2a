"""`gap-diff benchmark run` and `report` on a tiny model: which cells there are and are run, what is said of them."""

import contextlib
import copy
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from test_benchmark_surrogate import model  # noqa: F401
from test_metrics import ASTRONAUT

from gap_diff_diffusers import __version__, benchmark_plots, benchmark_printed, benchmark_report, benchmark_run
from gap_diff_diffusers.benchmark_plots import draw_grids, draw_plots
from gap_diff_diffusers.benchmark_run import BenchmarkConfig, Inputs, all_cells, all_groups, expand, missing
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.config import BUNDLED_FACE_MODEL
from gap_diff_diffusers.metrics.paper import FIGURES
from gap_diff_diffusers.protections import anti_dreambooth
from gap_diff_diffusers.protections.anti_dreambooth import ASPLConfig
from gap_diff_diffusers.recognition import DlibFaces

JPEG = {"name": "jpeg", "quality": 70}
QUICK = {
    "max_train_steps": 1,
    "num_class_images": 2,
    "num_inference_steps": 2,
    "resolution": 64,
    "learning_rate": 0.01,
}
CONFIG = {
    "model": "tiny",
    "conditions": [{"protection": "none"}, {"protection": "gap-diff", "publishing": [None, JPEG]}],
    "attackers": [{"method": "dreambooth", "set": QUICK}],
    "prompts": ["a photo of {}", "a dslr portrait of {}"],
    "count": 2,
    "resolution": 64,
}


INPUTS = Inputs(model="m", checkpoint="c", photos={"a": "1", "b": "2"})


def make_config(**changes):
    settings = CONFIG | changes
    return BenchmarkConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


@pytest.fixture
def people(tmp_path):
    photo = Image.open(ASTRONAUT).convert("RGB").crop((100, 0, 356, 256))
    for person in ("first", "second"):
        for part in ("set_A", "set_B", "set_C"):
            (tmp_path / "people" / person / part).mkdir(parents=True)
            photo.save(tmp_path / "people" / person / part / "0.png")
    return tmp_path / "people"


@pytest.fixture
def command(model, people, checkpoint, tmp_path):  # noqa: F811
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    base = ["benchmark", "run", str(config), "--people", str(people), "--output", str(tmp_path / "results")]
    return [*base, "--model", model, "--checkpoint", checkpoint]


def test_every_cell_is_run_once_and_reported(command, tmp_path, capsys, caplog):
    results = tmp_path / "results"
    assert main([*command, "--pictures", str(tmp_path / "pictures")]) == 0
    assert "6 attacks run, 0 failed, 12 cells" in capsys.readouterr().out
    cells = {path.name: path.read_bytes() for path in results.iterdir()}
    assert len(cells) == 12 == len(list((tmp_path / "pictures").iterdir()))
    record = json.loads(next(iter(cells.values())))
    assert record["format"] == 1 and "peak_memory_gb" not in (record["cost"] or {})  # which is of a GPU
    assert record["cell"]["attack"]["max_train_steps"] == 1 and record["cell"]["model"] == "model"
    assert record["figures"]["FDFR"]["values"] == [1.0, 1.0]  # noise has no face
    costs = [json.loads(content)["cost"] for content in cells.values()]
    assert costs.count(None) == 4 and all(30 < cost["psnr"] < 60 and cost["ssim"] < 1 for cost in costs if cost)
    assert record["seconds"]["training"] >= 0 and record["peak_memory_gb"] > 0
    assert str(tmp_path) not in json.dumps(record)
    drawn = {path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert len(drawn) == 6  # three conditions and two prompts; the two people's photos are the same

    assert main([*command, "--pictures", str(tmp_path / "elsewhere")]) == 0
    assert "0 attacks run, 0 failed, 12 cells" in capsys.readouterr().out
    assert "12 cells that are there have no picture in" in caplog.text
    assert {path.name: path.read_bytes() for path in results.iterdir()} == cells

    name = min(cells)
    (results / name).unlink()
    assert main(command) == 0
    assert "1 attacks run, 0 failed, 12 cells" in capsys.readouterr().out
    again = json.loads((results / name).read_text())
    assert again["figures"] == json.loads(cells[name])["figures"]

    report = ["benchmark", "report", str(results), "--output", str(tmp_path / "report")]
    assert main([*report, "--pictures", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    written = (tmp_path / "report" / "report.md").read_text()
    assert written.startswith(text)
    shown = re.findall(r"!\[\]?[^\]]*\]\(([^)]+)\)", written)
    assert len(shown) == 6 and all((tmp_path / "report" / name).is_file() for name in shown)
    grid = Image.open(tmp_path / "report" / "pictures-1-first.png")
    assert grid.width == 2 * 64 and 3 * (64 + 20) < grid.height < 4 * 64 + 9 * 20  # conditions, captions and a title
    assert (
        "| gap-diff, 8 levels (checkpoint0), then jpeg quality 70 | 2 |" in text
        and '"a dslr portrait of sks person"' in text
    )
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").open()))
    assert len(rows) == 12 * len(record["figures"])
    rows = list(csv.DictReader((tmp_path / "report" / "tables.csv").open()))
    assert {row["table"] for row in rows} < set(text.splitlines())
    assert "then, of a person's photos: jpeg quality 70" in {row["row"] for row in rows}


def test_aspl_is_a_protection_too(command, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(anti_dreambooth, "ASPLConfig", partial(ASPLConfig, rounds=1, pgd_steps=1, surrogate_steps=1))
    config = CONFIG | {"conditions": [{"protection": ["none", "aspl"]}], "aspl": {"set": QUICK}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([*command, "--only", "second", "--pictures", str(tmp_path / "pictures")]) == 0
    assert len({path.read_bytes() for path in (tmp_path / "pictures").iterdir()}) == 4
    assert "second/set_B: one photo" in caplog.text

    written = sorted((tmp_path / "results").iterdir())  # with less memory a cell has the same name, and figures
    first = json.loads(written[0].read_text())
    written[0].unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"gradient_checkpointing": True}))
    assert main([*command, "--only", "second"]) == 0
    again = json.loads(written[0].read_text())
    assert again["figures"]["FDFR"] == first["figures"]["FDFR"]
    assert again["gradient_checkpointing"] and not first["gradient_checkpointing"]


def test_shards_share_the_cells(command, tmp_path, capsys):
    for shard in ("1/4", "3/4", "2/4", "4/4"):
        assert main([*command, "--shard", shard]) == 0
    run = [line.split(" attacks")[0] for line in capsys.readouterr().out.splitlines()]
    assert run == ["2", "1", "2", "1"] and len(list((tmp_path / "results").iterdir())) == 12
    for shard in ("0/2", "3/2", "2", "a/b"):
        assert main([*command, "--shard", shard]) == 2
        assert "--shard I/N" in capsys.readouterr().err


def test_launched_processes_share_the_cells(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert benchmark_run.read_shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert benchmark_run.read_shard(None) == (2, 4)  # at once: it waits for no other process
    assert benchmark_run.read_shard("2/3") == (6, 12)  # the four share the second third
    monkeypatch.delenv("LOCAL_RANK")  # no launcher of ours
    assert benchmark_run.read_shard("2/3") == (1, 3)


def test_a_killed_run_leaves_whole_cells_and_goes_on(command, tmp_path):
    results = tmp_path / "results"
    process = subprocess.Popen([sys.executable, "-m", "gap_diff_diffusers", *command], env=os.environ)
    while process.poll() is None and len(list(results.glob("*.json"))) < 3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended
    before = {path: path.read_bytes() for path in results.glob("*.json")}
    assert 3 <= len(before) < 12 and all("cell" in json.loads(content) for content in before.values())
    assert main(command) == 0
    after = {path: path.read_bytes() for path in results.glob("*.json")}
    assert len(after) == 12 and all(after[path] == content for path, content in before.items())


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(command, tmp_path):
    results, whole = tmp_path / "results", tmp_path / "whole"
    run = [sys.executable, "-m", "gap_diff_diffusers", *command]
    started = time.perf_counter()
    subprocess.run([*run, "--output", str(whole)], check=True)
    duration = time.perf_counter() - started
    moments, seen, halves = random.Random(0), {}, 0
    for _ in range(20):
        process = subprocess.Popen(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.3, 1) * duration)
        process.kill()
        process.wait()
        files = {path.name: path.read_bytes() for path in results.glob("*.json")}
        assert all(files[name] == content for name, content in seen.items())
        assert all(json.loads(content)["figures"] for content in files.values())
        halves += len(seen) < len(files) < 12
        seen = files
        if len(files) == 12:
            shutil.rmtree(results)
            seen = {}
    assert halves > 2  # some were killed in the middle
    assert main(command) == 0
    assert {path.name for path in results.iterdir()} == {path.name for path in whole.iterdir()}  # nothing else is left
    for path in whole.iterdir():
        ours, theirs = (json.loads((folder / path.name).read_text()) for folder in (results, whole))
        assert ours["figures"] == theirs["figures"] and ours["cell"] == theirs["cell"]


def test_a_config_can_take_the_first_people_alone(command, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"people": 1, "prompts": ["a photo of {}"]}))
    assert main(command) == 0
    assert {path.name.split("-")[0] for path in (tmp_path / "results").iterdir()} == {"first"}
    shutil.rmtree(tmp_path / "results")
    assert main([*command, "--only", "second"]) == 0
    assert {path.name.split("-")[0] for path in (tmp_path / "results").iterdir()} == {"second"}
    config.write_text(json.dumps(CONFIG | {"people": 0}))
    assert main(command) == 2 and "people" in capsys.readouterr().err


def test_conditions_are_the_product_of_what_they_list():
    assert expand([{"protection": ["none", "gap-diff"], "levels": [4, 8], "publishing": [None, JPEG]}]) == [
        {"protection": protection, "levels": levels, "publishing": publishing, "purification": None}
        for protection, all_levels in (("none", (0, 0)), ("gap-diff", (4, 8)))
        for levels in all_levels
        for publishing in (None, JPEG)
    ]


def test_a_cells_name_is_its_settings_alone(tmp_path):
    cells = list(all_cells(make_config(), INPUTS))
    names = {benchmark_run.cell_path(tmp_path, cell).name for cell in cells}
    assert len(names) == len(cells) == 12
    reordered = [dict(reversed(cell.items())) for cell in cells]
    assert {benchmark_run.cell_path(tmp_path, cell).name for cell in reordered} == names
    assert [len(group) for group in missing(all_groups(make_config(), INPUTS), tmp_path)] == [2] * 6
    assert {cell["prompt"] for cell in cells} == {"a photo of sks person", "a dslr portrait of sks person"}


def test_a_cell_that_is_listed_twice_is_one():
    config = make_config(conditions=[{"protection": ["none", "gap-diff"], "levels": [4, 8]}], seeds=[0, 0])
    assert len(all_groups(config, INPUTS)) == 6  # clean photos have no levels


@pytest.mark.parametrize(
    ("inputs", "changes"),
    [
        (replace(INPUTS, model="other"), {}),
        (replace(INPUTS, photos={"a": "other", "b": "2"}), {}),
        (replace(INPUTS, checkpoint="other"), {}),
        (INPUTS, {"attackers": [{"method": "dreambooth", "set": QUICK | {"learning_rate": 0.02}}]}),
        (INPUTS, {"num_inference_steps": 3}),
        (INPUTS, {"metrics": ["identity"]}),
        (INPUTS, {"seeds": [1]}),
    ],
)
def test_whatever_changes_the_figures_changes_the_name(inputs, changes, tmp_path):
    before = {benchmark_run.cell_path(tmp_path, cell) for cell in all_cells(make_config(), INPUTS)}
    after = {benchmark_run.cell_path(tmp_path, cell) for cell in all_cells(make_config(**changes), inputs)}
    assert after - before


def test_aspl_expects_a_dreambooth_of_its_own(tmp_path):
    conditions, attackers = [{"protection": "aspl"}], [{"method": "textual-inversion"}, {"method": "lora"}]
    names = []
    for preset in ("weak", "strong"):
        cells = list(
            all_cells(make_config(conditions=conditions, attackers=attackers, aspl={"preset": preset}), INPUTS)
        )
        assert all(cell["protection_settings"]["attack"]["rare_token"] == "sks" for cell in cells)
        names += [benchmark_run.cell_path(tmp_path, cell) for cell in cells]
    assert len(set(names)) == len(names)


def test_a_cell_that_fails_does_not_stop_the_others(command, tmp_path, capsys, caplog, monkeypatch):
    attackers = [{"method": "dreambooth", "set": QUICK | {"learning_rate": rate}} for rate in (1e30, 1e-3)]
    conditions = [{"protection": "none"}]
    attackers[0]["set"] = attackers[0]["set"] | {"max_train_steps": 4}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"attackers": attackers, "conditions": conditions}))
    assert main(command) == 1
    assert "2 attacks run, 2 failed, 4 cells" in capsys.readouterr().out
    assert "lower the learning rate" in caplog.text
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--only", "first"]) == 0  # of one of several processes 1 would make the launcher stop all
    assert "0 attacks run, 1 failed, 4 cells" in capsys.readouterr().out


def test_weights_are_told_apart_wherever_they_are():
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert benchmark_run.hash_weights(layer) == benchmark_run.hash_weights(copy.deepcopy(layer))
    assert benchmark_run.hash_weights(layer) != benchmark_run.hash_weights(other)


@pytest.mark.parametrize("name", [path.stem for path in benchmark_run.CONFIGS.glob("*.json")])
def test_the_configs_that_ship_are_valid(name, people, tmp_path):
    arguments = ["benchmark", "run", name, "--people", str(people), "--output", str(tmp_path)]
    from gap_diff_diffusers.cli import build_parser

    config = benchmark_run.load_config(build_parser("benchmark").parse_args(arguments))
    cells = list(all_cells(config, INPUTS))
    assert cells and len({benchmark_run.cell_path(tmp_path, cell) for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": [{"protection": "glaze"}]}, "none, aspl, gap-diff, got 'glaze'"),
        ({"conditions": [{"protect": "none"}]}, "got protect in"),
        ({"conditions": []}, "conditions as a list of at least one dict"),
        ({"attackers": [{"preset": "weak"}]}, "method, preset and set, got"),
        ({"attackers": [{"method": "lora", "set": {"ranks": 3}}]}, "ranks=3"),
        ({"metrics": ["fid"]}, "ser_fiq, got 'fid'"),
        ({"count": 0}, "count of at least 1"),
        ({"count": "32"}, "count of type int"),
        ({"seeds": 3}, "seeds as a list"),
        ({"metrics": None}, "metrics as a list"),
        ({"aspl": None}, "aspl as an object"),
        ({"attackers": [{"method": "lora", "set": None}]}, "method, preset and set"),
        ({"conditions": [{"publishing": []}]}, "without empty lists"),
        ({"prompts": "a photo of {}"}, "prompts as a list"),
        ({"prompts": ["a {style} of {}"]}, "no braces"),
        ({"conditions": [{"protection": "gap-diff", "levels": 0}]}, "levels as a whole number"),
        ({"conditions": [{"publishing": {"name": "jpg"}}]}, "got 'jpg'"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"prompt": "a photo"}, "unknown key prompt"),
    ],
)
def test_configs_that_do_not_work_are_named(command, tmp_path, capsys, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    if "model" in changes:
        command = [*command, "--model", changes["model"]]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_person_without_a_face_is_named_before_any_attack(command, people, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(people / "second" / "set_C" / "0.png")
    assert main(command) == 2
    assert "second/set_C: expected a face" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_protection_that_changes_nothing_has_no_psnr(command, make_pipeline, tmp_path):
    config = CONFIG | {
        "conditions": [{"protection": "gap-diff"}],
        "prompts": ["a photo of {}"],
        "metrics": ["brisque"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    idle = make_pipeline()
    for weight in idle.generator.parameters():
        weight.data.zero_()
    idle.save_pretrained(tmp_path / "idle")
    assert main([*command, "--only", "first", "--checkpoint", str(tmp_path / "idle")]) == 0
    (cell,) = (tmp_path / "results").iterdir()
    cost = json.loads(cell.read_text())["cost"]
    assert cost["psnr"] is None and cost["ssim"] == pytest.approx(1)
    assert "| 1.000 |" in benchmark_report.to_markdown([json.loads(cell.read_text())])


def test_two_people_in_one_folder_are_warned_of(people, caplog):
    faces = DlibFaces()
    benchmark_run.warn_of_people(people / "first" / "set_B", faces)
    assert not caplog.text
    other = Image.open(BUNDLED_FACE_MODEL / "figures" / "samples.png").crop((0, 0, 256, 256))
    other.save(people / "first" / "set_B" / "1.png")
    benchmark_run.warn_of_people(people / "first" / "set_B", faces)
    assert "first/set_B: the faces of 2 photos may be of 2 people" in caplog.text
    Image.new("RGB", (64, 64)).save(people / "second" / "set_B" / "0.png")
    benchmark_run.warn_of_people(people / "second" / "set_B", faces)
    assert "second/set_B: no face" in caplog.text


def test_each_of_two_checkouts_is_run_under_its_own_digest(tmp_path):
    attackers = []
    for name in ("old", "new"):
        script = tmp_path / name / "dreambooth" / "train_dreambooth.py"
        script.parent.mkdir(parents=True)
        script.write_text(f"# {name}")
        attackers.append({"method": "official:dreambooth", "set": {"diffusers_examples": str(tmp_path / name)}})
    config = make_config(attackers=attackers)
    cells = list(all_cells(config, INPUTS))
    assert str(tmp_path) not in json.dumps(cells)
    digests = {name: hashlib.sha256(f"# {name}".encode()).hexdigest()[:16] for name in ("old", "new")}
    for cell in cells:
        found = benchmark_run.make_cells_attacker(config, cell).find_script().read_text()
        assert cell["attack"]["diffusers_examples"] == digests[found.removeprefix("# ")]
    assert {cell["attack"]["diffusers_examples"] for cell in cells} == set(digests.values())


def test_the_memory_of_a_script_is_that_of_its_process():
    code = """
import json, subprocess, sys, torch
from gap_diff_diffusers.benchmark_run import peak_memory_gb
device = torch.device("cpu")
before = peak_memory_gb(device)
subprocess.run([sys.executable, "-c", f"b'x' * {int((before + 0.3) * 2**30)}"], check=True)
print(json.dumps([before, peak_memory_gb(device), peak_memory_gb(device, of_script=True)]))
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    before, own, of_script = json.loads(printed.splitlines()[-1])  # of a fresh process, which began no other
    assert own < before + 0.3 <= of_script


def test_results_of_another_version_are_refused(command, tmp_path, capsys, caplog):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps({"versions": {"gap_diff_diffusers": "0.0.1"}}))
    assert main(command) == 2
    assert "got 0.0.1; give a new folder" in capsys.readouterr().err
    assert main(["benchmark", "report", str(tmp_path / "results")]) == 2
    assert f"a.json: expected a cell as version {__version__} writes it, got one of 0.0.1" in capsys.readouterr().err
    for name, version in (("a", "0.0.1"), ("b", "0.0.2")):
        cell = record(name, 1.0) | {"versions": {"gap_diff_diffusers": version}}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(cell))
    assert main(["benchmark", "report", str(tmp_path / "results")]) == 2
    assert "of one version, which alone compare, got 0.0.1 (a.json) and 0.0.2 (b.json)" in capsys.readouterr().err
    (tmp_path / "results" / "a.json").write_text("[]")
    assert main(["benchmark", "report", str(tmp_path / "results")]) == 2
    assert "got another file" in capsys.readouterr().err
    assert main(["benchmark", "report", str(tmp_path / "config.json")]) == 2
    assert "found none" in capsys.readouterr().err
    (tmp_path / "results" / "a.json").unlink()
    assert len(benchmark_report.load_cells(tmp_path / "results")) == 1
    assert f"cells of version 0.0.2, reported by version {__version__}" in caplog.text
    cell = record("b", 1.0) | {"format": 2, "versions": {"gap_diff_diffusers": __version__}}
    (tmp_path / "results" / "b.json").write_text(json.dumps(cell))
    for arguments in (command, ["benchmark", "report", str(tmp_path / "results")]):
        assert main(arguments) == 2
        assert "b.json: expected a cell of format 1, got one of 2" in capsys.readouterr().err


def test_people_that_are_not_there_are_named(people):
    assert [path.name for path in benchmark_run.find_people(people, ["second"])] == ["second"]
    with pytest.raises(ValueError, match="found none for third"):
        benchmark_run.find_people(people, ["third"])
    with pytest.raises(ValueError, match=r"found none$"):
        benchmark_run.find_people(people / "first" / "set_B")
    (people / "second" / "set_A" / "0.png").unlink()
    (people / "second" / "set_A").rmdir()
    assert len(benchmark_run.find_people(people)) == 2
    with pytest.raises(ValueError, match="expected a folder set_A"):
        benchmark_run.find_people(people, needs_own=True)
    (people / "first" / "set_C" / "0.png").unlink()
    (people / "first" / "set_C").rmdir()
    with pytest.raises(ValueError, match="expected a folder set_C"):
        benchmark_run.find_people(people)


def record(person, recognised, *, seed=0, protection="none", fdfr=0.0, **changes):
    cell = {"protection": protection, "levels": 8, "publishing": None, "purification": None, "model": "m"}
    cell |= {"protection_settings": {}, "photos": person, "attack": {"seed": seed, "max_train_steps": 1}}
    cell |= {"method": "dreambooth", "preset": "weak", "prompt": "p", "person": person, "seed": seed, "count": 4}
    cell |= changes
    figures = {
        "recognised": figure([recognised], percent=True),
        "ISM": figure([None if fdfr == 1 else 0.5]),
    }
    return {"cell": cell, "figures": figures, "seconds": {"training": 100.0}, "peak_memory_gb": 1.5}


def figure(values, *, percent=False, backend="tiny"):
    defined = [value for value in values if value is not None]
    mean = sum(defined) / len(defined) if defined else None
    return {"mean": mean, "values": values, "percent": percent, "backend": backend}


def test_a_report_has_means_over_people_not_over_cells():
    records = [record("a", 1.0), record("a", 1.0, seed=1), record("a", 1.0, seed=2), record("b", 0.0)]
    records += [record("a", 0.25, protection="gap-diff", fdfr=1)]
    text = benchmark_report.to_markdown(records)
    assert "| clean | 2 | 50% (0% to 100%) | 0.50 (0.50 to 0.50) |" in text
    assert "| gap-diff, 8 levels | 1 | 25% | none |" in text
    assert "| clean | 100% | 0% |" in text and "| gap-diff, 8 levels | 25% |  |" in text
    assert "| attacking: dreambooth (weak) | 100 s, and 0 s to draw |  | 1.5 GB of the process |  |  |" in text
    assert "worst" not in text
    rows = list(csv.DictReader(io.StringIO(benchmark_report.to_csv(records))))
    assert len(rows) == 10 and rows[-1]["mean"] == "" and rows[-1]["undefined"] == "1"

    tables = {(row["row"], row["figure"]): row for row in numbers_of(benchmark_report.make_tables(records))}
    assert list(tables["clean", "recognised"].values())[3:] == ["0.5", "0.0", "1.0", "2", ""]
    assert list(tables["gap-diff, 8 levels", "recognised"].values())[3:] == ["0.25", "", "", "1", ""]
    assert ("gap-diff, 8 levels", "ISM") not in tables  # nobody has it
    assert tables["attacking: dreambooth (weak)", "time of training, s"]["value"] == "100.0"
    assert tables["attacking: dreambooth (weak)", "memory of the process, GB"]["value"] == "1.5"


def numbers_of(tables):
    return list(csv.DictReader(io.StringIO(benchmark_report.tables_to_csv(tables))))


def test_a_report_keeps_apart_what_was_set_otherwise():
    records = [record("a", 1.0), record("a", 0.0, attack={"seed": 0, "max_train_steps": 2})]
    text = benchmark_report.to_markdown(records)
    assert text.count(", settings ") == 4 and "| clean | 1 | 100% |" in text and "| clean | 1 | 0% |" in text
    records = [record("a", x, protection="gap-diff", protection_settings={"weights": str(x)}) for x in (0.0, 1.0)]
    assert benchmark_report.to_markdown(records).count("| gap-diff, 8 levels [") == 4
    named = [record("a", 1.0, protection="gap-diff", protection_settings={"name": "mine", "weights": "1"})]
    assert "| gap-diff, 8 levels (mine) |" in benchmark_report.to_markdown(named)


def test_a_report_refuses_two_sets_of_photos_of_one_person():
    with pytest.raises(ValueError, match="several of a; delete"):
        benchmark_report.to_markdown([record("a", 1.0), record("a", 0.0, photos="others"), record("b", 1.0)])


def test_asking_for_aspl_leaves_other_cells_as_they_are(tmp_path):
    without = {benchmark_run.cell_path(tmp_path, cell) for cell in all_cells(make_config(), INPUTS)}
    conditions = [*CONFIG["conditions"], {"protection": "aspl"}]
    inputs = replace(INPUTS, own_photos={"a": "3", "b": "4"})
    cells = all_cells(make_config(conditions=conditions), inputs)
    assert without < {benchmark_run.cell_path(tmp_path, cell) for cell in cells}


def test_a_mean_says_how_many_people_have_it():
    records = [record("a", 1.0), record("b", 0.0, fdfr=1)]
    assert "| 0.50, 1 of 2 people |" in benchmark_report.to_markdown(records)


def test_the_interval_holds_the_mean_and_narrows_with_people():
    few, many = [0.0, 0.5, 1.0], [0.0, 0.5, 1.0] * 20
    assert benchmark_report.bootstrap_interval([0.5]) is None
    low, high = benchmark_report.bootstrap_interval(few)
    assert 0 <= low < 0.5 < high <= 1
    narrow = benchmark_report.bootstrap_interval(many)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)
    assert benchmark_report.bootstrap_interval(few) == (low, high)


def test_the_worst_attacker_is_each_persons_own():
    others = [record("a", 0.1), record("a", 0.9, attack={"seed": 0, "max_train_steps": 2})]
    assert "| clean | 2 | 90% | 0.50 |" in benchmark_report.to_markdown(others)
    assert "for each person: mean over people (95 % interval" in benchmark_report.to_markdown(others)
    records = [record("a", 0.8), record("b", 0.2), record("a", 0.1, method="lora"), record("b", 0.6, method="lora")]
    records += [record("a", 0.3, protection="gap-diff")]
    text = benchmark_report.to_markdown(records)
    assert "| clean | 2 | 70% (60% to 80%) | 0.50 (0.50 to 0.50) |" in text
    assert "| gap-diff, 8 levels | 1 | 30% | 0.50 |" in text
    twins = [record("a", 0.1, model_weights="1"), record("a", 0.9, model_weights="2")]
    assert "worst" not in benchmark_report.to_markdown(twins)  # one attack on each of two models of one name


def test_what_was_measured_twice_is_one_attack_and_counts_once():
    again = [record("a", 0.9, metrics=["identity_sface"]), record("a", 0.5, count=8, num_inference_steps=9)]
    for each in again[:1]:
        each["figures"] = {f"{name} (SFace)": figure for name, figure in each["figures"].items()}
    records = [record("a", 1.0, seed=0), record("a", 0.1, seed=1), *again]
    assert "worst" not in benchmark_report.to_markdown(records)
    text = benchmark_report.to_markdown([*records, record("a", 0.0, method="lora")])
    assert "| photos | attackers | recognised | recognised (SFace) | ISM | ISM (SFace) |" in text
    assert "| clean | 2 | 55% | 90% | 0.50 | 0.50 |" in text  # two seeds, drawn in one way: more than the other's 50 %


def test_what_it_takes_has_the_pictures_of_the_class_and_a_row_for_each_checkpoint():
    records = [
        record("a", 0.1, protection="gap-diff", protection_settings={"weights": str(x % 2)}, seed=x) for x in range(4)
    ]
    for each, seconds in zip(records, (0.0, 30.0, 34.0, 0.0)):
        each["seconds"] |= {"class_images": seconds, "protection": 1.0 + each["cell"]["seed"] % 2}
        each["device"] = "cuda:0"
    text = benchmark_report.to_markdown(records)
    assert "| attacking: dreambooth (weak) | 100 s, and 0 s to draw | 32 s (2 of 4 cells) | 1.5 GB |  |  |" in text
    rows = [line for line in text.splitlines() if "protecting a person's photos: gap-diff, 8 levels [" in line]
    assert sorted(line.split(" | ")[1] for line in rows) == ["1.0 s", "2.0 s"]


def test_conditions_come_by_their_numbers():
    records = [record("a", 0.1, protection="gap-diff", levels=levels) for levels in (16, 4, 8)]
    records += [record("a", 0.1, purification={"name": "random_noise", "std": std}) for std in (0.1, 0.05)]
    ((_, conditions),) = benchmark_report.groups_of([*records, record("a", 0.1)])
    noise = [f"clean, then random_noise std {std}" for std in (0.05, 0.1)]
    assert list(conditions) == ["clean", *noise, *(f"gap-diff, {levels} levels" for levels in (4, 8, 16))]


def test_figures_of_other_backends_are_reported_as_well(tmp_path):
    records = [record("a", 0.8), record("a", 0.2, method="lora")]
    for each in records:
        each["figures"] = {f"{name} (SFace)": figure for name, figure in each["figures"].items()}
    text = benchmark_report.to_markdown(records)
    assert "Recognised (SFace), each person" in text and "| clean | 2 | 80% | 0.50 |" in text
    assert [path.stem for path in draw_plots(records, tmp_path)] == ["conditions-1", "conditions-2"]


def test_lpips_has_a_column_where_it_was_measured():
    records = [record("a", 0.1, protection="gap-diff"), record("b", 0.1, protection="gap-diff")]
    for each, cost in zip(records, ({"psnr": 32.0, "ssim": 0.8}, {"psnr": 34.0, "ssim": 0.9, "lpips": 0.25})):
        each["cost"] = cost
    assert "| 33.0 dB | 0.850 | 0.250 (1 of 2 cells) |" in benchmark_report.to_markdown(records)
    assert "LPIPS" not in benchmark_report.to_markdown(records[:1])


def papers_tables(records):
    return benchmark_report.tables_to_markdown(benchmark_report.make_papers_tables(records))


def test_what_the_paper_prints_stands_beside_prompts_of_the_paper():
    assert papers_tables([record("a", 1.0)]) == ""
    prompts = ["a photo of sks person", "a photo of sks person in front of eiffel tower"]
    learned = {"seed": 0, "rare_token": "sks", "instance_prompt": "a photo of sks person"}
    assert papers_tables([record("a", 1.0, prompt=prompts[0])]) == ""  # it learned no word
    text = papers_tables([record("a", 1.0, prompt=prompt, attack=learned) for prompt in prompts])
    header = text.splitlines()[2]
    columns = [part.strip() for part in header.strip("|").split("|")]
    assert columns[1:5] == [f"A: {name}" for name in FIGURES]
    assert "D: FDFR" in header and "B: FDFR" not in header
    assert "| ours: clean |  | 0.50 |  |  |  | 0.50 |  |  |" in text
    assert "| printed, first table: GAP-Diff | 77.56% | 0.25 | 42.04 | 0.23 | 72.78% | 0.08 | 41.69 | 0.08 |" in text
    table = benchmark_report.make_papers_tables([record("a", 1.0, prompt=prompts[0], attack=learned)])
    printed = {(row["row"], row["figure"]): row["printed"] for row in numbers_of(table) if not row["value"]}
    assert float(printed["printed, first table: GAP-Diff", "A: FDFR"]) == pytest.approx(0.7756)
    nobody = [record("b", 0.0, fdfr=1, prompt=prompts[0], attack=learned)]
    both = [record("a", 1.0, prompt=prompts[0], attack=learned), *nobody]
    for each, every in zip(both, (0.9, 0.1)):  # the paper counts pictures, and people, without a face as 0
        each["figures"] |= {"SER-FIQ": figure([0.88, None]), "SER-FIQ, all": figure([every])}
    assert (
        "| ours: clean |  | 0.25 (0.00 to 0.50) |  | 0.50 (0.10 to 0.90), stretched 0.25 (0.25 to 0.25) |"
        in papers_tables(both)
    )
    figures = {row["figure"]: row["value"] for row in numbers_of(benchmark_report.make_papers_tables(both))[:3]}
    assert figures == {"A: ISM": "0.25", "A: SER-FIQ": "0.5", "A: SER-FIQ, stretched": "0.25"}
    others = [record("a", 1.0, prompt=prompts[0], attack=learned | {"max_train_steps": 2}), *both[:1]]
    titles = [table.title for table in benchmark_report.make_papers_tables(others)]
    assert len(titles) == len(set(titles)) == 2  # one attacker with two settings
    assert "| ours: clean |  | 0.00 |  | 0.10, stretched 0.25 |" in papers_tables(nobody)
    for methods in benchmark_printed.TABLES.values():
        for figures in methods.values():
            assert list(figures) == list("ABCD")
            assert all(len(values) == 4 and values[0] > 1 > values[1] for values in figures.values())


def test_the_backend_nearest_to_the_papers_stands_beside_it():
    learned = {"seed": 0, "rare_token": "sks", "instance_prompt": "a photo of sks person"}
    one = record("a", 1.0, prompt="a photo of sks person", attack=learned, protection="gap-diff")
    for suffix, ism in ((" (SFace)", 0.3), ("", 0.5), (" (ArcFace)", 0.4)):
        one["figures"] |= {f"FDFR{suffix}": figure([1.0, 0.0], percent=True), f"ISM{suffix}": figure([ism, None])}
        if suffix == " (SFace)":
            del one["figures"]["ISM"]
        best = 0.3 if suffix == " (SFace)" else ism
        assert f"| ours: gap-diff, 8 levels | 50% | {best:.2f} |  |  |" in papers_tables([one])
    text = papers_tables([one])
    assert "(FDFR by tiny; ISM by tiny): mean over people" in text
    assert "| ours: gap-diff, 8 levels | 0.0 s |  |" in text and "| printed: GAP-Diff | .04 s | 2 GB |" in text
    one["cost"] = {"psnr": 32.0, "ssim": 0.8, "peak_memory_gb": 2.5}
    assert "| ours: gap-diff, 8 levels | 0.0 s | 2.5 GB |" in papers_tables([one])


@pytest.mark.parametrize(
    ("prompt", "subject", "letter"),
    [
        ("a photo of sks person", "sks person", "A"),
        ("a dslr portrait of sks person", "sks person", "B"),
        ("a photo of <new1> person looking at the mirror", "<new1> person", "C"),
        ("a photo of <person> in front of eiffel tower", "<person>", "D"),
        ("a painting of sks person", "sks person", None),
        ("a photo of <person> smiling", "<person>", None),
    ],
)
def test_prompts_of_the_paper_are_known_by_their_words(prompt, subject, letter):
    assert benchmark_printed.letter(prompt, subject) == letter


def test_the_weights_of_a_purifier_are_part_of_the_cell_and_paths_are_not(tmp_path):
    spec = {"name": "diffpure", "model": str(tmp_path / "model")}
    config = make_config(conditions=[{"protection": "none", "purification": ["adverse_cleaner", spec]}])
    key = json.dumps({"name": "diffpure", "model": "model"})
    names = []
    for weights in ("1", "2"):
        cells = list(all_cells(config, replace(INPUTS, transforms={key: weights})))
        names.append({benchmark_run.cell_path(tmp_path, cell).name for cell in cells})
        assert str(tmp_path) not in json.dumps(cells)
    assert len(names[0] & names[1]) == len(names[0]) / 2  # those of the cleaner, which has none


def test_models_of_one_name_are_not_taken_for_each_other(tmp_path):
    specs = [{"name": "diffpure", "model": str(tmp_path / place / "model")} for place in ("a", "b")]
    choices = [{"name": "random_choice", "choices": [spec]} for spec in specs]
    for one, other in (specs, choices, ([specs[0]], [specs[1]])):
        with pytest.raises(ValueError, match="models of different names"):
            make_config(conditions=[{"publishing": one}, {"purification": other}])
    (cell, *_) = all_cells(make_config(conditions=[{"purification": choices[:1]}]), INPUTS)
    assert cell["purification"] == {"name": "random_choice", "choices": [{"name": "diffpure", "model": "model"}]}


def test_curves_are_drawn_where_there_are_several_points(tmp_path):
    def kinds(records):
        return sorted({path.stem.split("-")[0] for path in draw_plots(records, tmp_path)})

    assert kinds([record("a", 1.0), record("b", 0.5)]) == ["conditions"]
    jpegs = [record("a", 0.5, publishing={"name": "jpeg", "quality": quality}) for quality in (50, 90)]
    assert kinds(jpegs) == ["conditions", "jpeg"]
    assert kinds([*jpegs, record("a", 0.5, publishing={"name": "jpeg", "quality": [50, 90]})])[-1] == "jpeg"
    assert kinds([record(str(person), 0.1) for person in range(8)]) == ["conditions"]  # all alike, but for rounding
    assert kinds([*jpegs[:1], record("a", 1.0, publishing={"name": "webp", "quality": 50})]) == ["conditions"]
    published = [record("a", 0.5, publishing={"name": "publish", "preset": f"jpeg{quality}"}) for quality in (50, 90)]
    assert kinds([jpegs[0], published[1], record("a", 0.5)]) == ["conditions", "jpeg"]
    assert "stroke-dasharray" in (tmp_path / "jpeg-1.svg").read_text()  # no JPEG
    assert kinds([jpegs[0], published[0]]) == ["conditions"]
    assert kinds([*jpegs, record("a", 0.5, publishing={"name": "publish", "preset": "facebook"})])[-1] == "jpeg"
    budgets = [record("a", 0.5, protection="gap-diff", levels=levels, fdfr=1) for levels in (4, 8, 16)]
    assert kinds([budgets[0], record("a", 1.0)]) == ["conditions"]  # one budget is no curve
    assert kinds([*budgets, record("a", 1.0)]) == ["budget", "conditions"]
    with_clean = (tmp_path / "budget-1.svg").read_bytes()
    assert kinds(budgets) == ["budget", "conditions"]
    assert (tmp_path / "budget-1.svg").read_bytes() != with_clean
    first = (tmp_path / "budget-1.svg").read_bytes()
    other = [copy.deepcopy(each) for each in budgets]
    for each in other:
        each["cell"]["protection_settings"] = {"weights": "other"}
    clean = record("a", 1.0)
    curves = benchmark_plots._curves(benchmark_plots._over_budget([*budgets, *other, clean]))
    assert len(curves) == 2  # of two checkpoints of one name
    for points in curves.values():
        assert {x: len(cells) for x, cells in points.items()} == {4: 1, 8: 1, 16: 1, 0: 1}
    kinds(budgets)
    assert (tmp_path / "budget-1.svg").read_bytes() == first


def test_grids_need_pictures(tmp_path):
    with pytest.raises(ValueError, match="expected pictures of these cells"):
        draw_grids([record("a", 1.0)], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
