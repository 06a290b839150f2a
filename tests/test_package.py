"""The package's rules: what importing it costs, who imports whom, frozen names."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gap_diff_diffusers

PACKAGE = Path(gap_diff_diffusers.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports go to lower layers, or stay inside one folder. What shares a layer never imports each other; the letters
# divide layers where one uses another.
LAYERS = (
    ("images", "budget", "registry"),  # 0
    ("config", "download", "faces"),  # 0b: write records and other files, and look, as images does
    ("data", "models", "surrogates", "transforms"),  # 1
    ("recognition", "finetuning"),  # 2
    ("protections", "attackers", "metrics", "training"),  # 3
    ("pipelines",),  # 4
    ("convert", "evaluate", "fetch", "hub", "protect", "report"),  # 4b: subcommands, which use the pipelines
    ("attack",),  # 4b too: protects first, evaluates afterwards
    ("benchmark",),  # 4c: measures them
    ("cli",),  # 5
    ("__main__",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# Data that lies in the package, and the package itself: its names are lazy strings, its imports none.
OUTSIDE = {"benchmarks", "checkpoints", "docs", "examples", "__init__"}


def unit(module: str) -> str:
    """The part of the package that a module's dotted path, below the package, belongs to.

    A folder with all that is in it, or a file with those that share its first word: `benchmark.py`, `benchmark_x.py`.
    """
    first = module.split(".")[0]
    return first if first.startswith("_") else first.split("_")[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """The absolute names of all modules that a file imports, also inside functions."""
    below = ["gap_diff_diffusers", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(below[: len(below) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_units(path: Path) -> set[str]:
    prefix = "gap_diff_diffusers."
    names = {n.removeprefix(prefix).split(".")[0] for n in imported_modules(path) if n.startswith(prefix)}
    names |= {gap_diff_diffusers._HOMES[n].split(".")[0] for n in names & gap_diff_diffusers._HOMES.keys()}
    return {unit(name) for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_imports_go_strictly_downward(path):
    here = unit(dotted(path))
    if here in OUTSIDE:
        assert not imported_units(path)
        return
    assert here in LAYER_OF, f"{here} has no layer yet: add it to LAYERS"
    for other in imported_units(path) - {here}:
        assert LAYER_OF[other] < LAYER_OF[here], f"{here} may not import {other}"


def test_the_layers_rule_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "pipelines").mkdir()
    for name in ("cli", "images", "budget", "hub"):
        (tmp_path / f"{name}.py").touch()
    path = tmp_path / "models" / "network.py"
    path.write_text(
        "import gap_diff_diffusers.cli\nfrom .. import images\ndef f():\n    from ..budget import x\n"
        "from gap_diff_diffusers.hub import y\nfrom .other import z\nfrom .. import GAPDiffProtectionPipeline\n"
    )
    assert imported_units(path) == {"cli", "images", "budget", "hub", "models", "pipelines"}


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_no_torchvision_and_no_print(path):
    assert not [name for name in imported_modules(path) if name.split(".")[0] == "torchvision"]
    if unit(dotted(path)) != "cli" and path.name != "__main__.py":
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_importing_the_package_is_cheap():
    """Neither torch nor diffusers; nor do the modules that a command needs to answer --help."""
    code = (
        "import sys, json, gap_diff_diffusers, gap_diff_diffusers.registry\n"
        "print(json.dumps(sorted({'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_public_names():
    assert gap_diff_diffusers.__all__ == sorted(set(gap_diff_diffusers.__all__))
    assert dir(gap_diff_diffusers) == gap_diff_diffusers.__all__
    for name in gap_diff_diffusers.__all__:
        assert getattr(gap_diff_diffusers, name) is not None
    with pytest.raises(AttributeError, match=r"'Missing'.*GAPDiffGenerator"):
        gap_diff_diffusers.Missing  # noqa: B018


def test_the_published_format_names_modules_that_exist():
    """Saved folders name the generator by its module's path, so it never moves; diffusers needs ModelMixin there."""
    module = importlib.import_module("gap_diff_diffusers.models.gap_diff_generator")
    assert module.GAPDiffGenerator is gap_diff_diffusers.GAPDiffGenerator
    assert gap_diff_diffusers.GAPDiffGenerator.__module__ == module.__name__
    assert issubclass(module.GAPDiffGenerator, module.ModelMixin)
    assert module.ModelMixin.__module__.startswith("diffusers.")
    pipeline = importlib.import_module("gap_diff_diffusers.pipelines.pipeline_gap_diff")
    assert module.__name__ == pipeline.GENERATOR_MODULE
    assert pipeline.REMOTE_MODULE == "pipeline_gap_diff_protection"
