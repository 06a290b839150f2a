"""Distil dlib's face recognition into the small network with dropout that SER-FIQ is measured with.

    python training_scripts/train_face_embedder.py --config training_scripts/configs/face_embedder.json \\
        --train_data_dir portraits synthetic --output_dir face-embedder

`--resume_from_checkpoint` goes on where an interrupted run stopped. Flags override the config file; what is in neither
has the default of `FaceEmbedderConfig`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from gap_diff_diffusers.config import config_from_arguments, training_parser
from gap_diff_diffusers.training.face_embedder import FaceEmbedderConfig, train_face_embedder
from gap_diff_diffusers.training.loop import save_result


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    return training_parser(__doc__, FaceEmbedderConfig).parse_args(input_args)


def main(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_from_arguments(FaceEmbedderConfig, arguments, arguments.config)
    trainer, record = train_face_embedder(config, resume=arguments.resume_from_checkpoint)
    if trainer.accelerator.is_main_process:
        save_result(trainer.network.to(torch.float16), record, config.output_dir)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, OSError, SafetensorError, FloatingPointError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
