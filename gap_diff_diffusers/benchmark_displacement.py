"""`gap-diff benchmark displacement`: how far a protected photo moves the latents of real image encoders.

The displacement of y for x is ||E(y) - E(x)||^2 / (variance of E(x) x size), both published through the same JPEG.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import table

JPEG_QUALITY = 70
SIZE = 512
LEVELS = 8


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure on, and where to write; of this benchmark and of `scale`."""
    parser.add_argument("--photos", nargs="+", required=True, metavar="FOLDER", help="folders of portraits")
    parser.add_argument(
        "--encoders",
        nargs="+",
        required=True,
        metavar="ENCODER",
        help="tiny encoders (.safetensors), or folders or Hub ids of an AutoencoderKL or AutoencoderTiny",
    )
    parser.add_argument("--checkpoint", metavar="FOLDER|ID", help="pipeline to measure (default: the bundled one)")
    parser.add_argument("--count", type=int, default=16, help="held-out photos to measure on (default: %(default)s)")
    add_output_argument(parser)


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Where to write; of every benchmark that ends in `report`."""
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON, too")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="no",
        help="of PGD's gradients; what is reported is computed in float32 (default: no)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare the checkpoint with random signs and with PGD, on held-out faces of 512x512 at 8 levels."""
    import torch

    from .data import list_photos, load_faces, round_to_8_bits, split_held_out

    encoders, pipeline = load(arguments)
    train, held_out = split_held_out(list_photos(arguments.photos))
    images = load_faces(spread(held_out, arguments.count), SIZE)
    others = load_faces(spread(train, 100), SIZE)
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    moved = {"random signs": round_to_8_bits(images + LEVELS / 255 * signs)}
    for encoder in encoders:
        moved[f"PGD against {encoder.name}"] = pgd(encoder, images, bf16=arguments.mixed_precision == "bf16")
    moved["this checkpoint"] = pipeline(images, LEVELS / 255, output_type="pt").images
    perturbations = pipeline(others, LEVELS / 255, output_type="pt").perturbation
    mean = perturbations.mean(dim=0)
    common_power = (mean.square().mean() / perturbations.square().mean()).item()
    moved["this checkpoint, less the mean of 100 others"] = round_to_8_bits(moved["this checkpoint"] - mean)
    aligned = align(perturbations, pipeline.generator, others)
    aligned_mean = aligned.mean(dim=0)
    aligned_power = (aligned_mean.square().mean() / aligned.square().mean()).item()
    at_grids = align(aligned_mean.expand_as(images), pipeline.generator, images, back=True)
    moved["the same, aligned by each photo's grid"] = round_to_8_bits(moved["this checkpoint"] - at_grids)

    names = [encoder.name for encoder in encoders]
    rows = {
        label: {e.name: published_displacement(e, images, y) for e in encoders} | {"psnr": mean_psnr(images, y)}
        for label, y in moved.items()
    }
    ours = rows["this checkpoint"]
    ratios = {
        "over random signs": {n: ours[n] / rows["random signs"][n] for n in names},
        "over PGD against that encoder": {n: ours[n] / rows[f"PGD against {n}"][n] for n in names},
        "left without the mean of 100 others": {n: list(rows.values())[-2][n] / ours[n] for n in names},
        "left without their aligned mean": {n: list(rows.values())[-1][n] / ours[n] for n in names},
    }
    figures = {
        "displacement": rows,
        "ratios": ratios,
        "photos": len(images),
        "pgd": arguments.mixed_precision,
        "common_power": common_power,
        "aligned_power": aligned_power,
    }
    return report(arguments, figures, to_markdown)


def to_markdown(record: dict) -> str:
    """The record as a table."""
    names = list(next(iter(record["ratios"].values())))
    rows = [
        [label, *(f"{row[n]:.2f}" for n in names), f"{row['psnr']:.1f} dB"]
        for label, row in record["displacement"].items()
    ]
    rows += [[f"ratio: {label}", *(f"{row[n]:.2f}" for n in names), ""] for label, row in record["ratios"].items()]
    title = f"Displacement after JPEG 70: mean of {record['photos']} held-out faces of 512x512 at 8 levels"
    common = f"The mean of 100 perturbations holds {record['common_power']:.0%} of their power"
    common += f"; aligned by each photo's grid of blocks, {record['aligned_power']:.0%}."
    return table(title, ["", *names, "PSNR"], rows) + f"\n{common}\n"


def align(perturbations, generator, images, *, back: bool = False):
    """Perturbations (N,3,H,W) of images (N,3,H,W) in [0,1], moved so that their grids of blocks begin at one place.

    That is what an attacker does before averaging them: where a photo's grid begins is no secret. `back` moves them
    from there to the photos' grids.
    """
    import torch

    offsets = generator.grid_offsets(images) * (-1 if back else 1)
    return torch.stack([p.roll(tuple(offset), (1, 2)) for p, offset in zip(perturbations, offsets.tolist())])


def published_displacement(encoder, clean, moved) -> float:
    """Mean displacement of images (N,3,H,W) in [0,1], clean and moved both through JPEG 70 (4:2:0)."""
    from .transforms import RealJPEG

    publish = RealJPEG(JPEG_QUALITY).eval()
    return mean_displacement(encoder, publish(clean), publish(moved))


def mean_displacement(encoder, clean, moved) -> float:
    """Mean displacement of images (N,3,H,W) in [0,1], one after the other."""
    import torch

    from .surrogates.encoder import encoder_displacement

    with torch.no_grad():
        values = [
            encoder_displacement(encoder.encode_images(x[None]), encoder.encode_images(y[None]))
            for x, y in zip(clean, moved)
        ]
    return torch.cat(values).mean().item()


def pgd(encoder, images, *, steps: int = 60, step_size: float = 1 / 255, bf16: bool = False):
    """Projected gradient ascent on each photo's own displacement, without a JPEG in its loop; result on 8 bits.

    The step is 1/255 on [0,1], that is 2/255 on [-1,1]. Images (N,3,H,W) in [0,1].
    """
    import torch
    from tqdm import tqdm

    from .data import round_to_8_bits
    from .surrogates.encoder import encoder_displacement

    eps = LEVELS / 255
    results = []
    random_source = torch.Generator().manual_seed(0)
    for image in tqdm(images.split(1), desc=f"PGD against {encoder.name}", disable=not sys.stderr.isatty()):
        with torch.no_grad():
            clean = encoder.encode_images(image)
        # Where nothing moved the gradient is zero, so it starts a little off.
        delta = (torch.rand(image.shape, generator=random_source) * 2 - 1) * step_size
        for _ in range(steps):
            delta.requires_grad_(True)
            with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=bf16):
                moved = encoder.encode_images((image + delta).clamp(0, 1))
            (gradient,) = torch.autograd.grad(encoder_displacement(clean, moved).sum(), delta)
            delta = (delta.detach() + step_size * gradient.sign()).clamp(-eps, eps)
        results.append(round_to_8_bits(image + delta))
    return torch.cat(results)


def load(arguments: argparse.Namespace):
    """The encoders and the pipeline to measure."""
    from .protect import load_pipeline
    from .surrogates.encoder import EncoderSurrogate

    if arguments.count < 1:
        raise ValueError(f"expected --count of at least 1, got {arguments.count}")
    check_output(arguments)
    pipeline = load_pipeline(arguments.checkpoint, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return [EncoderSurrogate.from_pretrained(encoder) for encoder in arguments.encoders], pipeline


def check_output(arguments: argparse.Namespace) -> None:
    """ValueError if the figures could not be written at the end."""
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise ValueError(f"expected --output in a folder that exists, got {arguments.output}; make it first")


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def mean_psnr(clean, moved) -> float:
    """Mean PSNR in dB of images (N,3,H,W) in [0,1]."""
    return (-10 * (moved - clean).square().mean(dim=(1, 2, 3)).log10()).mean().item()


def report(
    arguments: argparse.Namespace, figures: dict, to_markdown: Callable[[dict], str], setting: dict | None = None
) -> int:
    """Print the figures as a table, and write them with their setting, if asked for: None for that of a protection."""
    from .config import portable_name, provenance, write_json

    sys.stdout.write(to_markdown(figures))
    if arguments.output:
        setting = {"jpeg_quality": JPEG_QUALITY, "levels": LEVELS} if setting is None else setting
        if "checkpoint" in arguments:
            setting["checkpoint"] = portable_name(arguments.checkpoint) or "bundled"
        write_json(arguments.output, figures | setting | {"versions": provenance()})
    return 0
