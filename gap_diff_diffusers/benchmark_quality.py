"""`gap-diff benchmark quality`: whether SER-FIQ is lower for faces that are blurred, darkened or covered.

A quality that says otherwise says nothing of pictures that a model drew. Each face is found and aligned once, and then
disturbed, so that the figure does not depend on whether the detector still finds it.
"""

import argparse
from pathlib import Path

from .benchmark_displacement import add_output_argument, check_output, report
from .config import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", required=True, metavar="PATH", help="clean photos, or folders of them")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the share of pairs in which the disturbed face has the lower SER-FIQ, for each disturbance."""
    import torch

    from .data import read_images, round_to_8_bits
    from .metrics.quality import SerFiq
    from .models.face_embedder import FACE_SIZE
    from .transforms import GaussianBlur

    check_output(arguments)
    metric = SerFiq()
    found = [metric.faces.align(image, FACE_SIZE)[:1] for image in read_images(arguments.photos)]
    faces = torch.cat([torch.stack(face) for face in found if face] or [torch.empty(0, 3, FACE_SIZE, FACE_SIZE)])
    if not len(faces):
        raise ValueError(f"expected photos with faces, found none in {len(found)}")

    def cover(left: float, top: float, right: float, bottom: float) -> torch.Tensor:
        covered = faces.clone()
        x0, y0, x1, y1 = (round(FACE_SIZE * edge) for edge in (left, top, right, bottom))
        covered[:, :, y0:y1, x0:x1] = 0.5
        return covered

    disturbed = {
        f"blurred, sigma {sigma} px": GaussianBlur(sigma, kernel_size=25).eval()(faces) for sigma in (2.0, 4.0)
    }
    disturbed |= {f"darkened to {share:.0%}": round_to_8_bits(faces * share) for share in (0.25, 0.1)}
    disturbed |= {"eyes covered": cover(0, 0.25, 1, 0.55), "mouth covered": cover(0.2, 0.6, 0.8, 1)}
    disturbed |= {"left half covered": cover(0, 0, 0.5, 1)}
    scores = metric.score(faces)
    lower = {name: (metric.score(images) < scores).float().mean().item() for name, images in disturbed.items()}
    kinds = {
        kind: [share for name, share in lower.items() if kind in name] for kind in ("blurred", "darkened", "covered")
    }
    figures = {
        "set": ", ".join(Path(path).name for path in arguments.photos[:3]),
        "photos": len(found),
        "faces": len(faces),
        "lower": lower,
        "kinds": {kind: sum(shares) / len(shares) for kind, shares in kinds.items()},
    }
    return report(arguments, figures, to_markdown, setting={})


def to_markdown(record: dict) -> str:
    """The record as a table."""
    means = [(f"all {kind}", share) for kind, share in record["kinds"].items()]
    rows = [[name, f"{share:.0%}"] for name, share in [*record["lower"].items(), *means]]
    title = f"{record['faces']} faces of {record['photos']} photos: pairs in which the disturbed one has less SER-FIQ"
    return table(title, ["disturbed", "share of pairs"], rows)
