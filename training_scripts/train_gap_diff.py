"""Train the perturbation generator of GAP-Diff and save it as a pipeline, with its training record.

    python training_scripts/train_gap_diff.py --config training_scripts/configs/gap_diff_encoders_first.json \\
        --train_data_dir portraits synthetic --encoders taef2_encoder.safetensors taesana_encoder.safetensors \\
        --output_dir gap-diff

The encoders can be Hub ids or folders of any `AutoencoderKL` or `AutoencoderTiny`, or of pipelines with one. Flags
override the config file; what is in neither has the default of `GAPDiffTrainingConfig`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from gap_diff_diffusers import GAPDiffProtectionPipeline, hub
from gap_diff_diffusers.config import config_from_arguments, training_parser
from gap_diff_diffusers.data import warn_without_faces
from gap_diff_diffusers.training.gap_diff import GAPDiffTrainer, GAPDiffTrainingConfig
from gap_diff_diffusers.training.loop import save_result


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, GAPDiffTrainingConfig)
    hub.add_arguments(parser)
    return parser.parse_args(input_args)


def main(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_from_arguments(GAPDiffTrainingConfig, arguments, arguments.config)
    hub.create_repository(arguments, config.output_dir, report_to=config.report_to)
    trainer = GAPDiffTrainer(config)
    warn_without_faces(trainer.train_photos)
    figures = trainer.train(resume=arguments.resume_from_checkpoint)
    if trainer.accelerator.is_main_process:
        pipeline = GAPDiffProtectionPipeline(trainer.generator, trainer.config.eps)
        record = trainer.record(figures)
        save_result(pipeline, record, trainer.output_dir)
        hub.publish(arguments, trainer.output_dir, record)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, OSError, SafetensorError, FloatingPointError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
