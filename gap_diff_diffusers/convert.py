"""`gap-diff convert`: the weights that GAP-Diff's authors released, as a folder that the pipeline loads.

Paper: GAP-Diff: Protecting JPEG-Compressed Images from Diffusion-based Facial Customization (NDSS 2025).
Upstream (AIASLab/GAP-Diff) saves the state dict of its generator and preprocessing layer: keys `generator.*`, and
`prelayer.*` if that layer held any. docs/convert.md says what the conversion keeps.
"""

import argparse
import hashlib
import importlib.util
import os
import pickle
import shutil
import struct
import sys
import tempfile
from pathlib import Path

NOISE_BUDGET = 8 / 255  # upstream's default: 16/255 on its [-1,1] scale
TOLERANCE = 1e-4
RECORD_NAME = "conversion.json"
PREFIX = "generator."
# Upstream has one norm per channel count; its number is the multiple of the first width.
NORMS = {"norm": 1, "norm2": 2, "norm4": 4, "norm8": 8}
# A residual block upstream is a sequence: 0 padding, 1 convolution, 2 norm, 3 ReLU, 4 padding, 5 convolution, 6 norm.
BLOCK_LAYERS = {1: "conv1", 2: "norm1", 5: "conv2", 6: "norm2"}
# What torch.load raises for a file that is damaged or none of its own, found by feeding it such files.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=Path, metavar="G_per16.0.pth", help="upstream's generator, as it saves it")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write, for gap-diff protect --checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUT")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="UPSTREAM_CHECKOUT",
        help="compare with upstream's own network; runs the code in that checkout's models/Generator.py",
    )
    parser.add_argument("--photo", type=Path, help="photo to compare on, seen at 512x512; default: a random picture")


def run(arguments: argparse.Namespace) -> int:
    if arguments.photo is not None and arguments.verify is None:
        raise ValueError(
            "expected --verify UPSTREAM_CHECKOUT with --photo, got --photo alone; it is what --verify looks at"
        )
    if arguments.verify is not None:
        sys.stderr.write(f"Running upstream's code: {generator_source(arguments.verify)}\n")
    record = convert(
        arguments.weights,
        arguments.folder,
        overwrite=arguments.overwrite,
        upstream_checkout=arguments.verify,
        photo=arguments.photo,
    )
    lines = [f"{arguments.weights}: {record['tensors_converted']} tensors, width {record['channels']}"]
    if record["tensors_ignored"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in record["tensors_ignored"].items())
        lines.append(f"Not needed and left out: {kinds}")
    if "largest_difference" in record:
        lines.append(
            f"Largest difference from upstream's network: {record['largest_difference']:.1e} on its output in [-1,1] "
            f"(at most {TOLERANCE:g} passes)"
        )
    lines.append(f"Written: {arguments.folder}")
    lines.append(f"Use it: gap-diff protect --checkpoint {arguments.folder} photo.jpg -o protected/")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def convert(
    weights_path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    upstream_checkout: str | os.PathLike | None = None,
    photo: str | os.PathLike | None = None,
) -> dict:
    """Convert a state dict saved by upstream into a folder for `GAPDiffProtectionPipeline.from_pretrained`.

    Args:
        weights_path: upstream's file. It is read as tensors alone: nothing in it is run.
        folder: is written whole or not at all.
        overwrite: replace what an earlier call wrote there.
        upstream_checkout: a checkout of upstream, whose network is run and compared with what was written.
        photo: what to compare on; default: a random picture.

    Returns:
        The record that is written beside the weights.

    Raises:
        ValueError: not upstream's weights, or the networks differ by more than 1e-4.
        OSError: a file that is not there or a folder that may not be replaced.
    """
    from .config import provenance, write_json
    from .pipelines.pipeline_gap_diff import GAPDiffProtectionPipeline

    weights_path, folder = Path(weights_path), Path(folder).resolve()
    _check_destination(folder, weights_path, overwrite)
    weights = read_weights(weights_path)
    generator, ignored = build_generator(weights, name=str(weights_path))
    record = {
        "source": {"file": weights_path.name, "sha256": _sha256(weights_path)},
        "architecture": generator.config.architecture,
        "channels": generator.config.channels[0],
        "noise_budget": NOISE_BUDGET,
        "tensors_converted": len(weights) - sum(ignored.values()),
        "tensors_ignored": ignored,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}.", suffix=".part"))
    try:
        GAPDiffProtectionPipeline(generator, noise_budget=NOISE_BUDGET).save_pretrained(temporary)
        if upstream_checkout is not None:
            written = type(generator).from_pretrained(temporary, subfolder="generator")
            difference = largest_difference(written, weights, upstream_checkout, photo)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"expected upstream's network and ours to agree within {TOLERANCE:g}, got a difference of "
                    f"{difference:.2g}; nothing was written. Is the checkout the version that made the weights?"
                )
            record["largest_difference"] = difference
        write_json(temporary / RECORD_NAME, record | {"provenance": provenance()})
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def read_weights(path: Path) -> dict:
    """The state dict in a file of `torch.save`: names and tensors. Anything else in it is refused, never run."""
    import torch

    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected upstream's G_per16.0.pth, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; docs/convert.md says where upstream publishes it")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(
            f"{path}: expected a PyTorch file of tensors alone, got {_what_else(path)}; it was not run. "
            "Fetch upstream's G_per16.0.pth again"
        ) from error
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"{path}: expected a state dict (names and tensors), got {type(weights).__name__}; "
            "save the network with torch.save(network.state_dict(), path)"
        )
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path}: expected a state dict (names and tensors), got {type(tensor).__name__} under {name!r}; "
                "save the network with torch.save(network.state_dict(), path)"
            )
    return weights


def _what_else(path: Path) -> str:
    import torch

    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except DAMAGED:
        unsafe = []
    return f"one with other objects ({_some(unsafe)})" if unsafe else "something else, or a part of one"


def build_generator(weights: dict, *, name: str = "the state dict"):
    """Our network with upstream's weights.

    Returns:
        `GAPDiffGenerator` in eval mode, and how many tensors of each kind it has no use for.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape; every one of them is checked.
    """
    import torch

    from .models.gap_diff_generator import GAPDiffGenerator, ImageBatchNorm2d

    first = weights.get(f"{PREFIX}conv1.weight")
    if first is None or first.ndim != 4 or first.shape[0] == 0:
        got = ", ".join(sorted(weights)[:3]) if first is None else f"{PREFIX}conv1.weight of shape {list(first.shape)}"
        raise ValueError(
            f"{name}: expected upstream's generator, with {PREFIX}conv1.weight of shape [width, 3, 4, 4], got {got}; "
            "pass G_per16.0.pth (D_per16.0.pth is its discriminator, which protecting a photo does not need)"
        )
    with torch.device("meta"):
        generator = GAPDiffGenerator(architecture="paper", channels=(first.shape[0],), scale_range=1.0)
    names = upstream_names(generator)
    expected = {names[ours]: list(tensor.shape) for ours, tensor in generator.state_dict().items()}
    ignored, unknown = {}, []
    norms = {
        names[f"{module}.weight"].rpartition(".")[0]
        for module, layer in generator.named_modules()
        if isinstance(layer, ImageBatchNorm2d)
    }
    for key in weights.keys() - expected.keys():
        module, _, leaf = key.rpartition(".")
        if key.startswith("prelayer."):
            kind = "of the preprocessing layer"
        elif module in norms and leaf in RUNNING_STATISTICS:
            kind = leaf
        else:
            unknown.append(key)
            continue
        ignored[kind] = ignored.get(kind, 0) + 1
    missing = expected.keys() - weights.keys()
    misshapen = [
        f"{key} of shape {list(weights[key].shape)} where {shape} belongs"
        for key, shape in sorted(expected.items())
        if key in weights and (list(weights[key].shape) != shape or not weights[key].is_floating_point())
    ]
    problems = [
        *([f"{len(missing)} missing ({_some(missing)})"] if missing else []),
        *([f"{len(unknown)} unknown ({_some(unknown)})"] if unknown else []),
        *([f"{len(misshapen)} of another shape or type ({_some(misshapen)})"] if misshapen else []),
    ]
    if problems:
        raise ValueError(
            f"{name}: expected the {len(expected)} tensors of upstream's generator of width {first.shape[0]}, got "
            f"{'; '.join(problems)}; only weights that upstream's train_generator.py saved can be converted"
        )
    # Copies, so that no two share memory, which safetensors refuses.
    state = {ours: weights[theirs].detach().float().clone() for ours, theirs in names.items()}
    generator.load_state_dict(state, strict=True, assign=True)
    return generator.eval(), dict(sorted(ignored.items()))


def upstream_names(generator) -> dict[str, str]:
    """For each tensor of our network, the name that upstream has for it."""
    width = generator.config.channels[0]
    modules = {f"norms.{width * multiple}": name for name, multiple in NORMS.items()}
    for index in range(8):
        modules |= {f"encoder.{index}": f"conv{index + 1}", f"decoder.{index}": f"dconv{index + 1}"}
    for index in range(4):
        for position, layer in BLOCK_LAYERS.items():
            modules[f"blocks.{index}.{layer}"] = f"bottle_neck.{index}.conv_block.{position}"
    names = {}
    for key in generator.state_dict():
        module, _, leaf = key.removeprefix("network.").rpartition(".")
        names[key] = f"{PREFIX}{modules[module]}.{leaf}"
    return names


def _some(items) -> str:
    items = sorted(items)
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def generator_source(checkout: str | os.PathLike) -> Path:
    path = Path(checkout) / "models" / "Generator.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; --verify takes a checkout of https://github.com/AIASLab/GAP-Diff"
        )
    return path


def largest_difference(
    generator, weights: dict, upstream_checkout: str | os.PathLike, photo: str | os.PathLike | None = None
) -> float:
    """The largest difference between our network's output, in [-1,1], and that of upstream's, whose code is run.

    Upstream's network runs as its generate.py runs it, on a batch of one with its norms in train mode, but without
    dropout, which would be noise.

    Args:
        photo: seen at 512x512; default: a random picture.
    """
    import numpy as np
    import torch

    from .images import read_photo, resize_pixels

    path = generator_source(upstream_checkout)
    spec = importlib.util.spec_from_file_location("gap_diff_upstream_generator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if photo is None:
        pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    else:
        pixels = resize_pixels(read_photo(photo).pixels, 512, 512)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    upstream = module.Generator(3, 3, ngf=generator.config.channels[0])
    own = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items() if key.startswith(PREFIX)}
    try:
        incompatible = upstream.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected the network that the weights are of, got another ({error})") from error
    lacking = [key for key in incompatible.missing_keys if key.rpartition(".")[2] not in RUNNING_STATISTICS]
    if lacking or incompatible.unexpected_keys:
        got = _some([*lacking, *incompatible.unexpected_keys])
        raise ValueError(f"{path}: expected the network that the weights are of, got one that differs in {got}")
    upstream.train()
    for layer in upstream.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    with torch.no_grad():
        return (upstream(images * 2 - 1) - generator(images)).abs().max().item()


def _check_destination(folder: Path, weights_path: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder to write, got a file; choose another name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder}: is not empty; choose another folder, or --overwrite an earlier conversion")
    if not (folder / RECORD_NAME).is_file():
        raise FileExistsError(f"{folder}: holds something else than an earlier conversion; choose another folder")
    if weights_path.resolve().is_relative_to(folder):
        raise FileExistsError(f"{folder}: holds the weights to convert, which --overwrite would delete; move them")


def _move_into_place(temporary: Path, folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are private; this one is like any other
    if not folder.exists():
        temporary.rename(folder)
        return
    former = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}.", suffix=".old")) / "folder"
    try:
        folder.rename(former)
        try:
            temporary.rename(folder)
        except BaseException:
            former.rename(folder)
            raise
    finally:
        if folder.exists():  # where even the way back failed, what was there stays beside it
            shutil.rmtree(former.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
