"""GAPDiffProtectionPipeline: photos in, protected photos out.

A Hub repository carries a copy of this file for `trust_remote_code=True`, with the package's modules that it imports
written into it (`self_contained_source`). So it imports nothing but those, torch, diffusers, huggingface_hub, numpy
and PIL, and it names the former in one-line imports.
"""

import importlib
import inspect
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import get_device
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image

from ..budget import add_perturbation, budget_levels, largest_change
from ..images import MINIMUM_SIDE, Photo, PhotoError, psnr, read_photo, resize_pixels, ssim, with_pixels

Box = tuple[float, float, float, float]
PhotoInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | Photo

GENERATOR_MODULE = "gap_diff_diffusers.models.gap_diff_generator"  # part of the published format
REMOTE_MODULE = "pipeline_gap_diff_protection"  # unique: the modules of all repositories share one cache folder


@dataclass
class GAPDiffProtectionPipelineOutput(BaseOutput):
    """What `GAPDiffProtectionPipeline` returns.

    Attributes:
        images: protected photos. `"pil"`: a list, with size, mode, alpha and color profile of the originals. `"np"`:
            (N,H,W,3) float32 in [0,1]. `"pt"`: (N,3,H,W) float32 in [0,1]. Lists of the latter where sizes differ.
        perturbation: what was added, protected minus original. `"np"` and `"pt"`: as the images, in [-1,1]. `"pil"`:
            a list of (H,W,3) int16 arrays, in levels.
        budget: per photo, the largest change of any subpixel, in levels of 0..255.
        psnr: per photo, in dB; infinite if nothing changed.
        ssim: per photo, up to 1.
    """

    images: list[Image.Image] | list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor
    perturbation: list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor
    budget: list[int]
    psnr: list[float]
    ssim: list[float]


class GAPDiffProtectionPipeline(DiffusionPipeline):
    """Protect photos against diffusion-based personalization with a trained perturbation generator.

    Paper: GAP-Diff: Protecting JPEG-Compressed Images from Diffusion-based Facial Customization (NDSS 2025).

    Args:
        generator: the network that computes the perturbation.
        noise_budget: default budget on the [0,1] scale, 8/255 in the paper.
    """

    model_cpu_offload_seq = "generator"

    def __init__(self, generator: ModelMixin, noise_budget: float = 8 / 255):
        super().__init__()
        budget_levels(noise_budget)
        self.register_modules(generator=generator.to(memory_format=torch.channels_last))
        self.register_to_config(noise_budget=noise_budget)

    @torch.no_grad()
    def __call__(
        self,
        photos: PhotoInput | list[PhotoInput],
        noise_budget: float | None = None,
        strength: float = 1.0,
        output_type: str = "pil",
        batch_size: int = 1,
        return_dict: bool = True,
        faces: list[list[Box]] | None = None,
    ) -> GAPDiffProtectionPipelineOutput | tuple:
        """Protect photos.

        Nothing is random. Values are those of 8-bit photos whatever `output_type` is: floating-point input is rounded
        to 8 bits first, and max |protected - original| <= floor(255 * noise_budget) levels holds exactly.

        Args:
            photos: one photo or a list of them, of any sizes from 16x16 pixels up: paths, PIL images, numpy arrays
                ((H,W), (H,W,3) or (N,H,W,3); uint8, or floats in [0,1]), tensors ((3,H,W) or (N,3,H,W); likewise).
            noise_budget: the most that a subpixel may change, on the [0,1] scale (`8/255` is 8 levels of 255);
                default: the checkpoint's.
            strength: scales the perturbation within the budget, above 0 and up to 1.
            output_type: `"pil"`, `"np"` or `"pt"`. The latter two hold RGB only.
            batch_size: how many photos of one size the network takes at once. More than 1 helps on a GPU. By
                floating-point rounding, single values may then differ by a level.
            return_dict: `False` for a plain tuple.
            faces: per photo the boxes (left, top, right, bottom) of its faces, in pixels of the upright photo. Around
                each the perturbation is computed at the one scale at which an attacker will see that face. Without
                them, at several scales that share the budget (`perturbation_sizes`).

        Raises:
            PhotoError: a photo that cannot be protected; its position in the list is named.
            ValueError: an argument out of range.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"expected output_type 'pil', 'np' or 'pt', got {output_type!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size!r}")
        originals = _read_all(photos)
        if faces is not None and len(faces) != len(originals):
            raise ValueError(f"expected a list of faces for each of the {len(originals)} photos, got {len(faces)}")
        for box in (box for of_photo in faces or () for box in of_photo):
            _check_box(box)
        protected: list[Photo | None] = [None] * len(originals)
        with self.progress_bar(total=len(originals)) as progress_bar:
            for indices in _batches_of_one_size(originals, batch_size):
                of_batch = None if faces is None else [faces[i] for i in indices]
                batch = self.protect_batch([originals[i] for i in indices], noise_budget, strength, of_batch)
                for index, photo in zip(indices, batch, strict=True):
                    protected[index] = photo
                progress_bar.update(len(indices))
        self.maybe_free_model_hooks()

        pairs = [(p.pixels, o.pixels) for p, o in zip(protected, originals, strict=True)]
        output = GAPDiffProtectionPipelineOutput(
            images=_convert_images(protected, output_type),
            perturbation=_convert_perturbations(pairs, output_type),
            budget=[largest_change(*pair) for pair in pairs],
            psnr=[psnr(*pair) for pair in pairs],
            ssim=[ssim(*pair) for pair in pairs],
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def protect_batch(
        self,
        photos: list[Photo],
        noise_budget: float | None = None,
        strength: float = 1.0,
        faces: list[list[Box]] | None = None,
    ) -> list[Photo]:
        """Protect photos of one size; what `__call__` does between reading and measuring."""
        levels = budget_levels(self.config.noise_budget if noise_budget is None else noise_budget)
        if not 0 < strength <= 1:
            raise ValueError(f"expected a strength above 0 and up to 1, got {strength!r}; 1 uses the whole budget")
        if self.generator.training:
            raise ValueError("the generator is in training mode; call pipe.generator.eval() first")
        height, width = photos[0].pixels.shape[:2]
        sizes = self.perturbation_sizes(height, width)
        protected = []
        for index, (photo, perturbation) in enumerate(zip(photos, self._perturb(photos, sizes))):
            perturbation = resize_pixels(perturbation, height, width)
            boxes = faces[index] if faces else []
            for box in sorted(boxes, key=_width, reverse=True):  # the smallest has the last word
                perturbation = self._perturb_face(photo, perturbation, box)
            pixels = add_perturbation(
                photo.pixels, perturbation, amplitude=levels * strength, levels=levels, gray=photo.gray
            )
            protected.append(with_pixels(photo, pixels))
        return protected

    def perturbation_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """The sizes (height, width) at which the perturbation of a photo is computed, smallest first.

        An attacker crops the face, a fifth of the photo's long side (1 / `scale_range`) or more, and resizes the crop
        to the network's native size. What is finer than that averages away; what is much coarser moves little. So the
        perturbation is computed at the scale that suits the whole photo, at the one that suits the smallest crop, and
        at those between, about an octave apart; resampled to the photo they are added, and their sum is clipped. A
        photo has no finer scale than its own.
        """
        long_side, native = max(height, width), self.generator.config.native_size
        finest = min(long_side, self.generator.config.scale_range * native)
        octaves = max(0, math.ceil(math.log2(finest / native) - 0.5))
        sides = [native * (finest / native) ** (i / octaves) for i in range(octaves + 1)] if octaves else [finest]
        return [
            self.generator.nearest_size(round(height * side / long_side), round(width * side / long_side))
            for side in sides
        ]

    def _perturb_face(self, photo: Photo, perturbation: np.ndarray, box: Box) -> np.ndarray:
        """The photo's perturbation (H,W,3) uint8 with another one in the square that is twice as wide as the face.

        That one is computed with this square seen at the network's native size, as an attacker will who cuts it out.
        It fades into the other at the square's edges, outside of it.
        """
        left, top, right, bottom = box
        height, width = photo.pixels.shape[:2]
        side = 2 * _width(box)
        reach = 0.55 * side  # half the square, and a tenth of that to fade in
        x, y = (left + right) / 2, (top + bottom) / 2
        rows = slice(max(0, round(y - reach)), min(height, round(y + reach)))
        columns = slice(max(0, round(x - reach)), min(width, round(x + reach)))
        size = (rows.stop - rows.start, columns.stop - columns.start)
        if min(size) < MINIMUM_SIDE:
            return perturbation
        scale = self.generator.config.native_size / side
        seen = self.generator.nearest_size(*(round(length * scale) for length in size))
        cut = with_pixels(photo, np.ascontiguousarray(photo.pixels[rows, columns]))
        (drawn,) = self._perturb([cut], [seen])
        fine, coarse = drawn.astype(np.float32) - 128, resize_pixels(drawn, *size).astype(np.float32) - 128
        if scale > 1:
            # What is finer than the photo is lost; what is left gets its power, as far as the budget lets it.
            left_over, power = coarse, np.square(fine).mean()
            for _ in range(5):
                gain = np.sqrt(power / max(np.square(coarse).mean(), 1e-6))
                left_over = left_over * gain
                coarse = left_over.clip(-127, 127)
        across, down = (
            np.clip((reach - np.abs(np.arange(part.start, part.stop) + 0.5 - middle)) / (0.05 * side), 0, 1)
            for part, middle in ((columns, x), (rows, y))
        )
        weight = (down[:, None] * across[None, :])[:, :, None].astype(np.float32)
        result = perturbation.copy()
        mixed = (1 - weight) * (perturbation[rows, columns].astype(np.float32) - 128) + weight * coarse
        result[rows, columns] = np.clip(np.rint(mixed), -127, 127) + 128
        return result

    def _perturb(self, photos: list[Photo], sizes: list[tuple[int, int]]) -> list[np.ndarray]:
        """The perturbation of photos computed at `sizes`: (h,w,3) uint8 each, of the last size, 128 standing for 0."""
        device, dtype = self._execution_device, self.generator.dtype
        seen = np.stack([resize_pixels(photo.pixels, *sizes[-1]) for photo in photos])
        images = torch.from_numpy(seen).permute(0, 3, 1, 2).to(device=device, dtype=torch.float32).div(255).to(dtype)
        perturbation = self.generator.perturb_at_sizes(images, sizes)
        if not perturbation.isfinite().all():
            raise ValueError(
                f"expected numbers from the generator, got infinity or NaN in {dtype}; are its weights damaged? "
                "If it runs in float16, try bfloat16 or float32"
            )
        encoded = perturbation.mul_(127).round_().add_(128).to(torch.uint8)
        return list(encoded.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    @classmethod
    def from_bundled(cls, **kwargs) -> "GAPDiffProtectionPipeline":
        """Load the checkpoint that ships with the package. `kwargs` go to `from_pretrained`."""
        folder = Path(__file__).parents[1] / "checkpoints" / "gap-diff"
        if not folder.is_dir():
            raise OSError(f"expected a checkpoint in {folder}; it ships with the package: install gap_diff_diffusers")
        return cls.from_pretrained(str(folder), **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As in `ConfigMixin`, but a `_class_name` of [file, class] counts as the class.

        Published folders have the pair, for people without the package; on this class it must not ask for the file.
        """
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return loaded

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "GAPDiffProtectionPipeline":
        """Load from a folder or a Hub repository. No code of the repository is downloaded or run.

        Takes what `DiffusionPipeline.from_pretrained` takes. It is overridden because diffusers refuses, from the Hub,
        a component whose class lives in another package, even an installed one.
        """
        name = pretrained_model_name_or_path
        if isinstance(name, os.PathLike):
            name = os.path.abspath(name)  # which is never the name of a repository
        hub_arguments = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        model_arguments = ("torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage")
        hub_arguments = {key: kwargs.pop(key) for key in hub_arguments if key in kwargs}
        model_arguments = {key: kwargs.pop(key) for key in model_arguments if key in kwargs}
        device_map = kwargs.pop("device_map", None)
        folder = name
        if not os.path.isdir(name):
            wanted = ["model_index.json"]
            if "generator" not in kwargs:
                weights = ".".join(filter(None, ("generator/diffusion_pytorch_model", model_arguments.get("variant"))))
                wanted += ["generator/*.json", f"{weights}.safetensors", f"{weights}-*-of-*.safetensors"]
            try:
                folder = snapshot_download(name, allow_patterns=wanted, **hub_arguments)
            except HFValidationError as error:
                raise OSError(
                    f"expected a folder, or a Hub repository such as 'org/name', got {name!r}: no such folder"
                ) from error
        if not os.path.isfile(os.path.join(folder, cls.config_name)):
            raise OSError(f"expected a saved pipeline in {name}: it has no {cls.config_name}")
        if "generator" not in kwargs:
            kwargs["generator"] = _load_generator(folder, **model_arguments)
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=name)
        if device_map is not None:
            pipeline.to(get_device() if device_map == "balanced" else device_map)
        return pipeline

    def save_pretrained(
        self, save_directory: str | os.PathLike, include_remote_code: bool = True, push_to_hub: bool = False, **kwargs
    ):
        """Save as a folder that loads with this class, and through `DiffusionPipeline` without the package.

        Args:
            save_directory: the folder, made if need be.
            include_remote_code: also write the two source files that `DiffusionPipeline.from_pretrained(...,
                trust_remote_code=True)` runs where the package is not installed.
            push_to_hub: upload it afterwards. `repo_id`, `private`, `token`, `commit_message` and `create_pr` say how.
            kwargs: for `DiffusionPipeline.save_pretrained`, such as `variant`.
        """
        upload = {
            key: kwargs.pop(key)
            for key in ("repo_id", "private", "token", "commit_message", "create_pr")
            if key in kwargs
        }
        super().save_pretrained(str(save_directory), **kwargs)
        folder = Path(save_directory).resolve()
        generator_class = type(getattr(self.generator, "_orig_mod", self.generator))  # without torch.compile's wrapper
        index = {"generator": [GENERATOR_MODULE, generator_class.__name__]}
        if include_remote_code:
            index["_class_name"] = [REMOTE_MODULE, type(self).__name__]
            (folder / f"{REMOTE_MODULE}.py").write_text(self_contained_source(), encoding="utf-8")
            source = inspect.getsourcefile(generator_class)
            shutil.copyfile(source, folder / "generator" / f"{GENERATOR_MODULE}.py")
        _amend_json(folder / "model_index.json", index)
        _amend_json(folder / "generator" / "config.json", {})
        if push_to_hub:
            from huggingface_hub import create_repo, upload_folder

            repo_id = upload.pop("repo_id", folder.name)
            private, token = upload.pop("private", None), upload.get("token")
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            upload_folder(repo_id=repo_id, folder_path=folder, **upload)


def _load_generator(folder: str, **kwargs) -> ModelMixin:
    """Load the generator of a pipeline's folder with the package's class. Weights must be safetensors and fit it."""
    if not __name__.startswith("gap_diff_diffusers."):  # in a copy of this file, which runs without the package
        raise OSError("install gap_diff_diffusers, or load through DiffusionPipeline.from_pretrained")
    dtype = kwargs.get("dtype")
    if isinstance(dtype, dict):  # of all components
        kwargs["dtype"] = dtype.get("generator", dtype.get("default", torch.float32))
    # Not an import statement: diffusers would tell those who run a copy of this file to install what it names.
    generator_class = importlib.import_module(GENERATOR_MODULE).GAPDiffGenerator
    generator, info = generator_class.from_pretrained(
        folder, subfolder="generator", output_loading_info=True, **{"use_safetensors": True, **kwargs}
    )
    # diffusers fills in what is missing with random numbers, which protect nothing.
    wrong = [
        f"{kind}: {', '.join(map(str, info[kind]))}" for kind in ("missing_keys", "unexpected_keys") if info[kind]
    ]
    if wrong:
        raise OSError(
            f"the weights in {folder} do not fit their config.json ({'; '.join(wrong)}); download them again"
        )
    return generator


def _amend_json(path: Path, changes: dict) -> None:
    """Change entries of a config, and drop where it was loaded from: that names folders of this machine."""
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def self_contained_source() -> str:
    """This file's source, with the modules of the package that it imports written in place of their imports."""
    source = Path(__file__).read_text(encoding="utf-8")
    package = Path(__file__).parents[1]

    def inline(match: re.Match) -> str:
        text = (package / f"{match.group(1)}.py").read_text(encoding="utf-8")
        return f"# --- gap_diff_diffusers/{match.group(1)}.py\n" + text.split('"""', 2)[2].strip() + "\n\n"

    return re.sub(r"^from \.\.(\w+) import .*\n", inline, source, flags=re.MULTILINE)


def _check_box(box: Box) -> None:
    sides = tuple(box) if isinstance(box, (list, tuple, np.ndarray)) else ()
    if len(sides) != 4 or not (sides[2] > sides[0] and sides[3] > sides[1]):
        raise ValueError(
            f"expected faces as a list for each photo of boxes (left, top, right, bottom), got {box!r} as a box"
        )


def _width(box: Box) -> float:
    """The longer side of a face's box."""
    return max(box[2] - box[0], box[3] - box[1])


def _read_all(photos: PhotoInput | list[PhotoInput]) -> list[Photo]:
    if isinstance(photos, (np.ndarray, torch.Tensor)) and photos.ndim == 4:
        photos = list(photos)
    if not isinstance(photos, (list, tuple)):
        return [_read(photos)]
    if not photos:
        raise ValueError("expected at least one photo, got an empty list")
    originals = []
    for index, photo in enumerate(photos):
        try:
            originals.append(_read(photo))
        except PhotoError as error:
            raise PhotoError(f"photo {index} of {len(photos)}: {error}") from error
    return originals


def _read(photo: PhotoInput) -> Photo:
    if isinstance(photo, Photo):
        return photo
    if isinstance(photo, (str, os.PathLike, Image.Image)):
        return read_photo(photo)
    if isinstance(photo, torch.Tensor):
        if photo.ndim != 3 or photo.shape[0] != 3:
            raise PhotoError(f"expected a tensor of shape (3,H,W) or (N,3,H,W), got {tuple(photo.shape)}")
        photo = photo.detach().permute(1, 2, 0).cpu()
        photo = (photo.float() if photo.is_floating_point() else photo).numpy()
    if not isinstance(photo, np.ndarray):
        raise PhotoError(f"expected a path, PIL image, numpy array or tensor, got {type(photo).__name__}")
    if photo.ndim == 2:
        photo = np.repeat(photo[:, :, None], 3, axis=2)
    if photo.ndim != 3 or photo.shape[2] != 3:
        raise PhotoError(f"expected an array of shape (H,W), (H,W,3) or (N,H,W,3), got {photo.shape}")
    if min(photo.shape[:2]) < MINIMUM_SIDE:
        raise PhotoError(
            f"expected at least {MINIMUM_SIDE}x{MINIMUM_SIDE} pixels, got {photo.shape[1]}x{photo.shape[0]}"
        )
    if photo.dtype != np.uint8:
        if not np.issubdtype(photo.dtype, np.floating):
            raise PhotoError(f"expected uint8 or floats in [0,1], got {photo.dtype}")
        low, high = float(photo.min()), float(photo.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise PhotoError(f"expected floats in [0,1], got {low:.9g} to {high:.9g}; rescale or clip them")
        photo = np.rint(photo * 255).astype(np.uint8)
    return Photo(pixels=np.require(photo, requirements="CW"))  # torch warns of arrays that cannot be written to


def _batches_of_one_size(photos: list[Photo], batch_size: int) -> list[list[int]]:
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, photo in enumerate(photos):
        by_size.setdefault(photo.pixels.shape, []).append(index)
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


def _convert_images(photos: list[Photo], output_type: str):
    if output_type == "pil":
        return [photo.to_pil() for photo in photos]
    return _stack([photo.pixels.astype(np.float32) / 255 for photo in photos], output_type)


def _convert_perturbations(pairs: list[tuple[np.ndarray, np.ndarray]], output_type: str):
    if output_type == "pil":
        return [np.subtract(protected, original, dtype=np.int16) for protected, original in pairs]
    return _stack([(p.astype(np.float32) - o) / 255 for p, o in pairs], output_type)


def _stack(arrays: list[np.ndarray], output_type: str):
    one_size = len({array.shape for array in arrays}) == 1
    if output_type == "np":
        return np.stack(arrays) if one_size else arrays
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return torch.stack(tensors) if one_size else tensors
