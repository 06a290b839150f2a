"""Train a small face model from nothing and save it as a `StableDiffusionPipeline`, with its training record.

    python training_scripts/train_surrogate.py --config training_scripts/configs/face_model.json \\
        --train_data_dir portraits synthetic --feature_encoders taef2_encoder.safetensors --output_dir face-model

First the autoencoder, then the denoiser; `--resume_from_checkpoint` goes on where an interrupted run stopped. Flags
override the config file; what is in neither has the default of `SurrogateTrainingConfig`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from gap_diff_diffusers import hub
from gap_diff_diffusers.config import config_from_arguments, training_parser
from gap_diff_diffusers.data import warn_without_faces
from gap_diff_diffusers.training.loop import save_result
from gap_diff_diffusers.training.surrogate import SurrogateTrainingConfig, train_surrogate


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, SurrogateTrainingConfig)
    hub.add_arguments(parser)
    return parser.parse_args(input_args)


def main(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_from_arguments(SurrogateTrainingConfig, arguments, arguments.config)
    hub.create_repository(arguments, config.output_dir, report_to=config.report_to)
    if config.face_scale is None:  # otherwise those without one are left out
        warn_without_faces(config.load_photos()[0])
    denoiser, record = train_surrogate(config, resume=arguments.resume_from_checkpoint)
    if denoiser.accelerator.is_main_process:
        save_result(denoiser.pipeline.to(dtype=torch.float16), record, config.output_dir)
        hub.publish(arguments, Path(config.output_dir), record)
    denoiser.accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, OSError, SafetensorError, FloatingPointError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
