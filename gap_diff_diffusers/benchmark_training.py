"""`gap-diff benchmark training`: steps a second of GAP-Diff training, beside a loop like that of the released code.

Same surrogate, batch and pictures, taking turns. The loop to compare with is that of the released code: the paper's
U-Net, a discriminator that learns in turn, the prompt encoded in every step, everything in float32, and gradients for
the surrogate's weights, too, which it computes and never uses. Ours is timed twice: with the default network, which is
what people train, and with the same U-Net, discriminator and preprocessing, which is the same work.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from .benchmark_displacement import add_output_argument, check_output, report
from .config import BUNDLED, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", required=True, metavar="FOLDER", help="folders of portraits")
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER|ID",
        help="text-to-image model (default: the face model that ships)",
    )
    parser.add_argument("--train_batch_size", type=int, default=2, help="photos a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps to time, after one (default: %(default)s)")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Time both loops at 512x512."""
    import tempfile

    import torch

    from .surrogates import load_surrogate
    from .training.gap_diff import GAPDiffTrainer, GAPDiffTrainingConfig

    check_output(arguments)
    if arguments.steps < 1:
        raise ValueError(f"expected --steps of at least 1, got {arguments.steps}")
    model = arguments.model
    with tempfile.TemporaryDirectory() as folder:
        common = GAPDiffTrainingConfig(
            train_data_dir=tuple(arguments.photos),
            output_dir=folder,
            surrogates=(model,),
            surrogate_weights=(1.0,),
            surrogate_resolutions=(512,),
            surrogate_learning_rates=(0.0,),
            stages="preprocessed",
            scale_factors=([[1, 1]],),
            scale_weights=(1.0,),
            crop_size=512,
            crop_scales=(1.0, 1.0),
            train_batch_size=arguments.train_batch_size,
            mixed_precision="no",
            num_validation_images=1,
        )
        trainer = GAPDiffTrainer(common)
        same = replace(
            common,
            architecture="paper",
            channels=(64,),
            layers_per_block=(),
            gan_weight=0.001,
            discriminator_input="preprocessed",
            coherence_weight=0.0,
            rms_weight=0.0,
            transform="paper",
        )
        same_trainer = GAPDiffTrainer(replace(same, output_dir=str(Path(folder, "same"))))
        surrogate = load_surrogate(model).to(trainer.device)
        upstream = upstream_step(surrogate, trainer.device)
        images = trainer.crops.sample(common.train_batch_size, torch.Generator().manual_seed(0)).to(trainer.device)
        loops = {
            "this package": lambda: trainer.training_step(torch.Generator().manual_seed(0)),
            "this package, the same work": lambda: same_trainer.training_step(torch.Generator().manual_seed(0)),
            "a loop like upstream's": lambda: upstream(images),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(arguments.steps + 1):
            for name, step in loops.items():
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    theirs = medians["a loop like upstream's"]
    figures = {
        "model": surrogate.name,
        "batch": arguments.train_batch_size,
        "seconds": medians,
        "ratios": {name: theirs / value for name, value in medians.items() if value != theirs},
        "steps": arguments.steps,
    }
    return report(arguments, figures, to_markdown)


def upstream_step(surrogate, device):
    """A training step like upstream's: a function of images (N,3,512,512) in [0,1]."""
    import torch

    from .models.gap_diff_discriminator import GAPDiffDiscriminator
    from .models.gap_diff_generator import GAPDiffGenerator
    from .training.losses import discriminator_loss, gan_loss
    from .transforms import build_transform

    generator = GAPDiffGenerator(architecture="paper", channels=(64,), layers_per_block=(), scale_range=1.0).train()
    discriminator = GAPDiffDiscriminator().train()
    generator, discriminator = generator.to(device), discriminator.to(device)
    surrogate.requires_grad_(True)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in (generator, discriminator)]
    preprocess = build_transform("paper").train()

    def step(images):
        protected = (images + generator(images) * 8 / 255).clamp(0, 1)
        preprocessed = preprocess(protected)
        optimizers[1].zero_grad()
        discriminator_loss(discriminator(images), discriminator(preprocessed.detach())).backward()
        optimizers[1].step()
        loss = 0.001 * gan_loss(discriminator(preprocessed))
        loss = loss - surrogate.denoising_loss(preprocessed, "a photo of sks person").mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

    return step


def to_markdown(record: dict) -> str:
    """The record as a table."""
    rows = [[name, f"{seconds:.2f} s", f"{1 / seconds:.2f}"] for name, seconds in record["seconds"].items()]
    rows += [[f"ratio: {name}", f"{ratio:.1f}", ""] for name, ratio in record["ratios"].items()]
    title = f"A training step against {record['model']}: batches of {record['batch']} photos of 512x512"
    return table(title, ["loop", "a step", "steps a second"], rows)
