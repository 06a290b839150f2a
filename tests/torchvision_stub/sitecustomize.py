"""Put on PYTHONPATH, this stands in for torchvision, which has no build that works beside torch's for the CPU.

It offers what the example scripts of diffusers use. diffusers and transformers are asked first whether torchvision is
there, so that they go on without.
"""

import atexit
import enum
import importlib.machinery
import os
import random
import sys
import types

import diffusers.utils
import numpy as np
import torch
import transformers.utils
from PIL import Image

transformers.utils.is_torchvision_available()
diffusers.utils.is_torchvision_available()


class InterpolationMode(enum.Enum):
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


def _size(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def Compose(steps):
    def apply(image):
        for step in steps:
            image = step(image)
        return image

    return apply


def Resize(size, interpolation=InterpolationMode.BILINEAR):
    def apply(image):
        scale = size / min(image.size)
        return image.resize([round(side * scale) for side in image.size], interpolation.value)

    return apply


def crop(image, top, left, height, width):
    return image.crop((left, top, left + width, top + height))


class CenterCrop:
    def __init__(self, size):
        self.size = _size(size)

    def __call__(self, image):
        height, width = self.size
        return crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image, size):
        top, left = random.randint(0, image.height - size[0]), random.randint(0, image.width - size[1])
        return top, left, *size

    def __call__(self, image):
        return crop(image, *self.get_params(image, self.size))


def ToTensor():
    return lambda image: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def Normalize(mean, std):
    return lambda image: (image - mean[0]) / std[0]


def RandomHorizontalFlip(p=0.5):
    return lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < p else image


def Lambda(function):
    return function


def _module(name, **names):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(module).update(names)
    sys.modules[name] = module
    return module


_names = {name: value for name, value in globals().items() if name[0].isupper()}
_functional = _module("torchvision.transforms.functional", crop=crop)
_transforms = _module("torchvision.transforms", functional=_functional, **_names)
_module("torchvision", transforms=_transforms, __version__="0")


def record_training(path):
    """At the end, write what a training script drew, and what it logged: tensors by name, one for each step."""
    from accelerate import Accelerator
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    recorded = {"latents": [], "noise": [], "timesteps": [], "loss": []}

    def recording(function, name):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            recorded[name].append(result.clone())
            return result

        return call

    def log(self, values, **options):
        recorded["loss"].append(torch.tensor(values["loss"]))

    DiagonalGaussianDistribution.sample = recording(DiagonalGaussianDistribution.sample, "latents")
    torch.randn_like = recording(torch.randn_like, "noise")
    torch.randint = recording(torch.randint, "timesteps")
    Accelerator.log = log
    atexit.register(lambda: recorded["loss"] and torch.save(recorded, path))


if os.environ.get("RECORD_TRAINING"):
    record_training(os.environ["RECORD_TRAINING"])
