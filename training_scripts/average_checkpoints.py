"""Average the weights of two trained pipelines that have a run in common, and record it.

    python training_scripts/average_checkpoints.py first second --share 0.45 --output_gain 1.08 --output_dir averaged

`--share` is the second's; `--output_gain` is of `GAPDiffGenerator`, by default as the second has it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gap_diff_diffusers import GAPDiffGenerator, GAPDiffProtectionPipeline
from gap_diff_diffusers.config import provenance
from gap_diff_diffusers.training.loop import save_result


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--output_gain", type=float)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(input_args)


def main(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.share <= 1:
        raise ValueError(f"expected --share from 0 to 1, got {arguments.share}")
    gain = {} if arguments.output_gain is None else {"output_gain": arguments.output_gain}
    generator = GAPDiffGenerator.from_pretrained(arguments.second, subfolder="generator", **gain)
    averaged = GAPDiffProtectionPipeline.from_pretrained(arguments.second, generator=generator)
    other = GAPDiffProtectionPipeline.from_pretrained(arguments.first)
    budgets = [pipeline.config.noise_budget for pipeline in (other, averaged)]
    if budgets[0] != budgets[1]:
        raise ValueError(f"expected two pipelines of one noise_budget, got {budgets[0]} and {budgets[1]}")
    weights, others = (dict(pipeline.generator.named_parameters()) for pipeline in (averaged, other))
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in others.items()}:
        raise ValueError("expected two generators of one architecture, got weights of different names or shapes")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.lerp_(others[name], 1 - arguments.share)
    first, second = (
        json.loads((path / "training_record.json").read_text(encoding="utf-8"))
        for path in (arguments.first, arguments.second)
    )
    record = {
        "average": {"share_of_the_second": arguments.share, "output_gain": generator.config.output_gain},
        "second": second,
        "first": first if (keys := find_record(second, first)) is None else ", its ".join(["the second", *keys]),
        "versions": provenance(),
    }
    save_result(averaged, record, arguments.output_dir)


def find_record(record: dict[str, Any], wanted: dict[str, Any]) -> list[str] | None:
    """By which keys one comes from a training's record to the same record of an earlier one; None if it has none."""
    if record == wanted:
        return []
    for key in ("initial_weights", "first", "second"):
        earlier = record.get(key)
        if isinstance(earlier, dict) and (keys := find_record(earlier, wanted)) is not None:
            return [key, *keys]
    return None


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
