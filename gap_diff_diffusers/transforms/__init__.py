"""What happens to a protected photo before somebody trains on it: compression, resizing, filters, publishing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..registry import Registry
from .base import Compose, Draw, Identity, RandomChoice, Transform
from .filters import GaussianBlur, Quantize, RandomNoise, Resize, ResizeDownUp
from .jpeg import DifferentiableJPEG, JPEGMask, RealJPEG, RealWebP
from .publishing import PUBLISHING, Publish, PublishingPreset
from .purification import AdverseCleaner

__all__ = [
    "PRESETS",
    "PUBLISHING",
    "TRANSFORMS",
    "AdverseCleaner",
    "Compose",
    "DifferentiableJPEG",
    "Draw",
    "GaussianBlur",
    "Identity",
    "JPEGMask",
    "Publish",
    "PublishingPreset",
    "Quantize",
    "RandomChoice",
    "RandomNoise",
    "RealJPEG",
    "RealWebP",
    "Resize",
    "ResizeDownUp",
    "Transform",
    "build_transform",
]

TRANSFORMS = Registry(
    "transform",
    {
        "adverse_cleaner": f"{__name__}.purification:AdverseCleaner",
        "diffpure": f"{__name__}.diffusion_purification:DiffPure",
        "differentiable_jpeg": f"{__name__}.jpeg:DifferentiableJPEG",
        "gaussian_blur": f"{__name__}.filters:GaussianBlur",
        "gridpure": f"{__name__}.diffusion_purification:GrIDPure",
        "identity": f"{__name__}.base:Identity",
        "impress": f"{__name__}.diffusion_purification:Impress",
        "jpeg": f"{__name__}.jpeg:RealJPEG",
        "jpeg_mask": f"{__name__}.jpeg:JPEGMask",
        "publish": f"{__name__}.publishing:Publish",
        "quantize": f"{__name__}.filters:Quantize",
        "random_noise": f"{__name__}.filters:RandomNoise",
        "resize": f"{__name__}.filters:Resize",
        "resize_down_up": f"{__name__}.filters:ResizeDownUp",
        "upscale": f"{__name__}.diffusion_purification:Upscale",
        "webp": f"{__name__}.jpeg:RealWebP",
    },
)

PRESETS: dict[str, Any] = {
    # GAP-Diff's training mixture, uniform over JpegMask(50), JpegMask(70), blur and identity. Its two
    # masks are one and the same operation, hence the weight of 2.
    "paper": {
        "name": "random_choice",
        "choices": [{"name": "jpeg_mask"}, {"name": "gaussian_blur", "sigma": 2.0, "kernel_size": 7}, "identity"],
        "weights": [2, 1, 1],
    },
    # Gaussian noising and noisy upscaling of robust style mimicry (arXiv 2406.12027).
    "gaussian_noising": {"name": "random_noise", "std": 0.05},
    "noisy_upscaling": [
        {"name": "random_noise", "std": 0.1},
        {"name": "upscale", "model": "stabilityai/stable-diffusion-x4-upscaler"},
    ],
}
"""Named mixtures, as data for `build_transform`."""


_CATCH_ALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def build_transform(spec: str | Mapping[str, Any] | list[Any]) -> Transform:
    """Build a transform from plain JSON data, the form in which configuration files hold it.

    Args:
        spec: one of
            - the name of an entry of `TRANSFORMS` (with its defaults) or of `PRESETS`;
            - `{"name": "jpeg", "quality": [50, 90]}`: an entry of `TRANSFORMS` and its arguments;
            - `{"name": "random_choice", "choices": [...], "weights": [...]}`: `RandomChoice`, `weights` optional;
            - a list of these: `Compose`.

    Raises:
        ValueError: an unknown name or argument (the message lists the available ones), or a value that the transform
            rejects.
    """
    if isinstance(spec, list):
        return Compose([build_transform(step) for step in spec])
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        # Not a TypeError: the content of somebody's configuration file is wrong, not the call.
        message = f"expected a name, a list, or an object with a name, got {spec!r}; see build_transform"
        raise ValueError(message)
    name = spec["name"]
    arguments = {key: value for key, value in spec.items() if key != "name"}
    if name in PRESETS:
        if arguments:
            raise ValueError(f"{name}: expected no arguments for a preset, got {', '.join(arguments)}; drop them")
        return build_transform(PRESETS[name])
    if name == "random_choice":
        transform_class: type[Transform] = RandomChoice
        if not isinstance(arguments.get("choices"), list):
            raise ValueError(f'random_choice: expected "choices" with a list of transforms, got {spec!r}')
    elif name in TRANSFORMS:
        transform_class = TRANSFORMS.load(name)
    else:
        available = sorted([*TRANSFORMS, *PRESETS, "random_choice"])
        raise ValueError(f"expected the name of a transform, got {name!r}; available: {', '.join(available)}")
    # A class without an __init__ of its own shows nn.Module's *args and **kwargs.
    parameters = inspect.signature(transform_class).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind not in _CATCH_ALL]
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if lacking := [p.name for p in required if p.kind not in _CATCH_ALL and p.name not in arguments]:
        raise ValueError(f"{name}: expected the argument {' and '.join(lacking)}, got none")
    for key in arguments:
        if key not in known:
            raise ValueError(f"{name}: unknown argument {key!r}; available: {', '.join(known) or 'none'}")
    if name == "random_choice":
        arguments["choices"] = [build_transform(choice) for choice in arguments["choices"]]
    return transform_class(**arguments)
