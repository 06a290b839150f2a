"""Average the weights of two trained pipelines, the second trained on from the first, and record it.

    python training_scripts/average_checkpoints.py first second --share 0.45 --output_gain 1.08 --output_dir averaged

`--share` is the second's; `--output_gain` is of `GAPDiffGenerator`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gap_diff_diffusers import GAPDiffGenerator, GAPDiffProtectionPipeline
from gap_diff_diffusers.config import provenance, write_json


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--output_gain", type=float, default=1.0)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(input_args)


def main(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.share <= 1:
        raise ValueError(f"expected --share from 0 to 1, got {arguments.share}")
    first = GAPDiffGenerator.from_pretrained(arguments.first, subfolder="generator").state_dict()
    generator = GAPDiffGenerator.from_pretrained(
        arguments.second, subfolder="generator", output_gain=arguments.output_gain
    )
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.lerp_(first[name], 1 - arguments.share)
    pipeline = GAPDiffProtectionPipeline(generator.eval())
    pipeline.save_pretrained(arguments.output_dir)
    record = {
        "average": {"share_of_the_second": arguments.share, "output_gain": arguments.output_gain},
        "second": json.loads((arguments.second / "training_record.json").read_text()),
        "first": "the second's initial_weights",
        "versions": provenance(),
    }
    write_json(arguments.output_dir / "training_record.json", record)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
