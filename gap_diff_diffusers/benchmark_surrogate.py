"""`gap-diff benchmark surrogate`: whether a face model is worth attacking and protecting against.

Its autoencoder must keep detail, and must be possible to mislead as those of real models are; its samples must be
faces.
"""

import argparse
import time

from .benchmark_displacement import (
    LEVELS,
    add_output_argument,
    check_output,
    mean_displacement,
    mean_psnr,
    pgd,
    report,
    spread,
)
from .config import BUNDLED, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", required=True, metavar="FOLDER", help="folders of portraits")
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER|ID",
        help="text-to-image model, or an AutoencoderKL alone (default: the face model that ships)",
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of its pictures (default: %(default)s)")
    parser.add_argument("--count", type=int, default=16, help="held-out photos for PGD (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--prompt", default="a photo of a person", help="of the samples (default: %(default)s)")
    parser.add_argument("--pictures", metavar="FILE", help="save the samples as one picture")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure the autoencoder on held-out faces, and count faces in samples."""
    import torch
    from diffusers import AutoencoderKL

    from .data import list_photos, load_faces, save_grid, split_held_out
    from .finetuning import generate_images
    from .recognition import DlibFaces
    from .surrogates import load_surrogate
    from .surrogates.encoder import EncoderSurrogate

    for name in ("count", "samples"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"expected --{name} of at least 1, got {getattr(arguments, name)}")
    check_output(arguments)
    surrogate = load_surrogate(arguments.model)
    autoencoder = surrogate.encoder if isinstance(surrogate, EncoderSurrogate) else surrogate.vae
    if not isinstance(autoencoder, AutoencoderKL):
        raise ValueError(
            f"{arguments.model}: expected a model with an AutoencoderKL, got {type(autoencoder).__name__}"
        )
    pipeline = getattr(surrogate, "pipeline", None)
    faces = DlibFaces() if pipeline else None
    _, held_out = split_held_out(list_photos(arguments.photos))
    images = load_faces(held_out, arguments.resolution)
    with torch.no_grad():
        decoded = [autoencoder.decode(surrogate.encode_images(image[None])).sample for image in images]
    decoded = ((torch.cat(decoded) + 1) / 2).clamp(0, 1)

    few = torch.stack(spread(list(images), arguments.count))
    moved = pgd(surrogate, few)
    displacement = mean_displacement(surrogate, few, moved)

    figures = {
        "held_out": len(images),
        "psnr": mean_psnr(images, decoded),
        "pgd_photos": len(few),
        "pgd_displacement": displacement,
        "model": surrogate.name,
    }
    if pipeline:
        started = time.perf_counter()
        samples = generate_images(pipeline, arguments.prompt, arguments.samples, resolution=arguments.resolution)
        figures["seconds"] = time.perf_counter() - started
        if arguments.pictures:
            save_grid(samples, arguments.pictures)
        counts = [len(faces.embeddings(sample)) for sample in samples]
        figures |= {"samples": len(samples), "prompt": arguments.prompt}
        figures |= {"one_face": counts.count(1) / len(counts), "no_face": counts.count(0) / len(counts)}
    return report(arguments, figures, to_markdown)


def to_markdown(record: dict) -> str:
    """The record as a table."""
    rows = [
        [f"PSNR of the autoencoder, {record['held_out']} held-out faces", f"{record['psnr']:.1f} dB"],
        [
            f"displacement by 60-step PGD at {LEVELS} levels, {record['pgd_photos']} of them",
            f"{record['pgd_displacement']:.2f} of the latents' variance",
        ],
    ]
    if "samples" in record:
        rows += [
            [f'"{record["prompt"]}": samples with one face', f"{record['one_face']:.0%} of {record['samples']}"],
            ["the same, without a face", f"{record['no_face']:.0%}"],
        ]
    return table(f"{record['model']}, on portraits", ["what", "figure"], rows)
