"""`gap-diff benchmark attackers`: steps a second of DreamBooth here, beside the unmodified script of diffusers.

Both learn the same photos with the same settings: the same model, batch, weights and precision. A script's time is
that of a run with more steps less that of one with few, so that starting, loading and saving do not count.
"""

import argparse
import copy
import time

from .benchmark_displacement import add_output_argument, check_output, report
from .config import BUNDLED, table

FEW = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", required=True, metavar="PHOTO", help="photos, or folders of them")
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER|ID",
        help="text-to-image model (default: the face model that ships)",
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of the photos (default: %(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=1, help="photos a step, and as many of the class")
    parser.add_argument("--steps", type=int, default=80, help="steps to time (default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--diffusers_examples", metavar="CHECKOUT", help="of diffusers (default: what was fetched)")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one, else cpu)")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Time both, one after the other."""
    from .attack import cut_squares, load_victim, memory_errors
    from .attackers import ATTACKERS
    from .data import read_images

    check_output(arguments)
    if arguments.steps < 1:
        raise ValueError(f"expected --steps of at least 1, got {arguments.steps}")
    photos = cut_squares(read_images(arguments.photos), arguments.resolution).clamp(0, 1)
    count = arguments.train_batch_size
    settings = {
        "resolution": arguments.resolution,
        "train_batch_size": count,
        "mixed_precision": arguments.mixed_precision,
        "train_text_encoder": "no",
        "num_class_images": len(photos),
    }
    surrogate = load_victim(arguments.model, arguments.device)
    methods = {
        "dreambooth": {"prior_batch_size": count},
        "official:dreambooth": {"diffusers_examples": arguments.diffusers_examples},
    }
    seconds = {}
    for method, special in methods.items():
        took = []
        # What happens once in a process comes before, with ours; each script has a process of its own.
        for steps in (*([FEW] if method == "dreambooth" else []), FEW, FEW + arguments.steps):
            attacker = ATTACKERS.load(method)(**settings, **special, max_train_steps=steps)
            victim = copy.deepcopy(surrogate)
            started = time.perf_counter()
            with memory_errors():
                attacker(victim, photos, class_images=photos.flip(3), progress=False)
            took.append(time.perf_counter() - started)
        if took[-1] <= took[-2]:
            raise ValueError(
                f"expected more steps to take longer, got {took[-2]:.2f} and {took[-1]:.2f} s; time more --steps"
            )
        seconds[method] = (took[-1] - took[-2]) / arguments.steps
    ours, theirs = seconds.values()
    figures = {
        "model": surrogate.name,
        "resolution": arguments.resolution,
        "batch": count,
        "mixed_precision": arguments.mixed_precision,
        "steps": arguments.steps,
        "seconds": seconds,
        "ratio": theirs / ours,
    }
    return report(arguments, figures, to_markdown, setting={})


def to_markdown(record: dict) -> str:
    """The record as a table."""
    rows = [[name, f"{seconds:.2f} s", f"{1 / seconds:.2f}"] for name, seconds in record["seconds"].items()]
    rows.append(["ratio", f"{record['ratio']:.2f}", ""])
    title = (
        f"A step of DreamBooth of {record['model']}: {record['batch']} photos and as many pictures of the class, "
        f"{record['resolution']}x{record['resolution']}"
    )
    return table(title, ["attacker", "a step", "steps a second"], rows)
