"""What an attacker does to published photos to be rid of a perturbation: by models that know what photos look like."""

from __future__ import annotations

import inspect
import math

import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DModel,
)
from kornia.metrics import ssim
from torch import nn

from ..config import BUNDLED, locate_model
from .base import Draw, Transform, check_whole_numbers, draw_index
from .filters import interpolate


class _ModelTransform(Transform):
    """A transform by a model that draws at random: the draw holds a seed, pinned to 0 in evaluation mode."""

    differentiable = False

    def draw(self, *, generator: torch.Generator | None = None) -> Draw:
        return {"seed": draw_index(2**48, generator) if self.training else 0}


class DiffPure(_ModelTransform):
    """Noise a photo a little, and let a diffusion model take the noise away, and the perturbation with it.

    Args:
        model: folder or Hub id of an unconditional pixel model (a `UNet2DModel` with its scheduler, such as a
            `DDPMPipeline`), or of a text-to-image pipeline, which purifies by image to image; "bundled" for the small
            face model that ships, of which not much may be expected.
        timestep: how far to noise, of the model's 1000 steps.
        steps: how many steps the way back takes.
        prompt: what a text-to-image model is told.
        resolution: side in pixels at which the model works; None for its own. Photos are resized to it, and back.

    The draw holds a seed, pinned to 0 in evaluation mode.

    Source: DiffPure (arXiv 2205.07460) as robust mimicry and GrIDPure run it: 100 of 1000 steps, 512 to 256 to 512
    pixels. Upstream's model is guided-diffusion's of ImageNet, which diffusers has no pipeline for.
    """

    def __init__(
        self,
        model: str = BUNDLED,
        *,
        timestep: int = 100,
        steps: int = 100,
        prompt: str = "a photo of a person",
        resolution: int | None = None,
    ):
        super().__init__()
        check_whole_numbers(1, timestep=timestep, steps=steps, resolution=resolution or 8)
        # There are no more steps back than there are timesteps.
        self.timestep, self.steps, self.prompt = timestep, min(steps, timestep), prompt
        pipeline = _load_pipeline(model)
        unet, vae = pipeline.components.get("unet"), pipeline.components.get("vae")
        self.unconditional = isinstance(unet, UNet2DModel) and vae is None
        if self.unconditional:
            self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
            native, multiple = unet.config.sample_size, 2 ** (len(unet.config.block_out_channels) - 1)
        else:
            try:
                pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
            except ValueError as error:
                kind = type(pipeline).__name__
                raise ValueError(f"{model}: expected a model that diffusers edits photos with, got {kind}") from error
            if "beta_schedule" in pipeline.scheduler.config:  # one that begins at the very timestep
                config = pipeline.scheduler.config
                pipeline.scheduler = DDPMScheduler.from_config(config, timestep_spacing="trailing")
            multiple = pipeline.vae_scale_factor
            denoiser = unet or pipeline.components.get("transformer")
            native = (denoiser.config.get("sample_size") or pipeline.default_sample_size) * multiple
        self.pipeline = pipeline
        self.networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self.resolution = resolution or native
        if self.resolution % multiple:
            raise ValueError(f"resolution: expected a multiple of {multiple}, got {self.resolution}")
        self.end = end = pipeline.scheduler.config.num_train_timesteps
        if timestep > end:
            raise ValueError(f"timestep: expected one up to the model's {end}, got {timestep}")
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        small = interpolate(images, self.resolution, self.resolution)
        purified = torch.cat([self._purify(image[None], draw["seed"]) for image in small])
        return interpolate(purified, *images.shape[-2:]).to(images.dtype)

    def _purify(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """One photo (1,3,side,side) in [0,1]."""
        self.pipeline.to(image.device)
        source = torch.Generator().manual_seed(seed)
        if not self.unconditional:
            return self.pipeline(
                prompt=self.prompt,
                image=image,
                strength=self.timestep / self.end,
                num_inference_steps=math.ceil(self.steps * self.end / self.timestep),
                guidance_scale=1.0,
                generator=source,
                output_type="pt",
                **size_arguments(self.pipeline, *image.shape[-2:]),
            ).images.to(image)
        times = torch.linspace(self.timestep - 1, 0, self.steps).round().long().unique().flip(0)
        self.scheduler.set_timesteps(timesteps=times.tolist(), device=image.device)
        noise = torch.randn(image.shape, generator=source).to(image.device)
        noisy = self.scheduler.add_noise(image * 2 - 1, noise, self.scheduler.timesteps[:1])
        for time in self.scheduler.timesteps:
            predicted = self.pipeline.unet(noisy.to(self.pipeline.unet.dtype), time).sample.float()
            noisy = self.scheduler.step(predicted, time, noisy, generator=source).prev_sample
        return (noisy / 2 + 0.5).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"timestep={self.timestep}, steps={self.steps}, resolution={self.resolution}"


class GrIDPure(DiffPure):
    """`DiffPure` by little steps, many times, on overlapping squares of a photo at its own resolution.

    Args:
        model, timestep, steps, prompt, resolution: as for `DiffPure`, but that `resolution` is the squares' side.
        iterations: how often.
        gamma: how much of the photo before each iteration is mixed into what comes out, from 0 to below 1.

    Source: GrIDPure (arXiv 2404.06319): squares of 256 px, 128 apart, 10 steps, 20 iterations, gamma 0.1. Where
    squares overlap they are averaged. Upstream puts a square of the four corners together; here squares reach the
    edges.
    """

    def __init__(
        self,
        model: str = BUNDLED,
        *,
        timestep: int = 10,
        steps: int = 10,
        prompt: str = "a photo of a person",
        resolution: int | None = None,
        iterations: int = 20,
        gamma: float = 0.1,
    ):
        super().__init__(model, timestep=timestep, steps=steps, prompt=prompt, resolution=resolution)
        check_whole_numbers(1, iterations=iterations)
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma: expected a number from 0 to below 1, got {gamma!r}")
        self.iterations, self.gamma = iterations, gamma

    @torch.no_grad()
    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        side = self.resolution
        height, width = images.shape[-2:]
        scale = max(1, side / min(height, width))  # smaller photos are enlarged to one square
        work = interpolate(images, max(side, round(height * scale)), max(side, round(width * scale)))
        tops, lefts = (_starts(length, side) for length in work.shape[-2:])
        for iteration in range(self.iterations):
            total, count = torch.zeros_like(work), torch.zeros_like(work[:1, :1])
            for place, (top, left) in enumerate((top, left) for top in tops for left in lefts):
                square = (Ellipsis, slice(top, top + side), slice(left, left + side))
                seed = draw["seed"] + iteration * len(tops) * len(lefts) + place
                total[square] += torch.cat([self._purify(image[None], seed) for image in work[square]])
                count[square] += 1
            work = (1 - self.gamma) * total / count + self.gamma * work
        return interpolate(work, height, width).to(images.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}, gamma={self.gamma}"


class Impress(_ModelTransform):
    """Look near a photo for one that an autoencoder reproduces, as it does unprotected photos.

    Args:
        model: folder or Hub id of an `AutoencoderKL`, or of a pipeline that has one as `vae`; "bundled" for that of
            the face model that ships.
        steps: of Adam, whose rate falls from `learning_rate` to 1e-5 by a cosine.
        learning_rate: on images in [-1,1].
        noise: standard deviation, on [-1,1], of what the search starts with on top of the photo.
        distance: how unlike the photo the result may be for free, as 1 - SSIM.
        distance_weight: of what exceeds that.

    The draw holds a seed, pinned to 0 in evaluation mode.

    Source: IMPRESS (arXiv 2310.19248): 3000 steps, 0.01, noise 0.1, weight 0.1. Upstream keeps LPIPS of VGG under
    0.1; packages with LPIPS need torchvision, so here SSIM is kept above 0.9.
    """

    def __init__(
        self,
        model: str = BUNDLED,
        *,
        steps: int = 3000,
        learning_rate: float = 0.01,
        noise: float = 0.1,
        distance: float = 0.1,
        distance_weight: float = 0.1,
    ):
        super().__init__()
        check_whole_numbers(1, steps=steps)
        numbers = {"noise": noise, "distance": distance, "distance_weight": distance_weight}
        for name, value in (numbers | {"learning_rate": learning_rate}).items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number from 0, got {value!r}")
        self.steps, self.learning_rate, self.noise = steps, learning_rate, noise
        self.distance, self.distance_weight = distance, distance_weight
        self.vae = _load_autoencoder(model).eval().requires_grad_(False)
        self.networks = [self.vae]

    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        self.vae.to(images.device)
        multiple = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = images.shape[-2:]
        size = tuple(max(11, math.ceil(side / multiple) * multiple) for side in (height, width))
        size = tuple(math.ceil(side / multiple) * multiple for side in size)  # SSIM needs 11 px
        enlarged = interpolate(images.detach(), *size)
        found = torch.cat([self._search(image[None], draw["seed"]) for image in enlarged])
        return interpolate(found, height, width).to(images.dtype)

    @torch.enable_grad()
    def _search(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image.device)
        pixels = (image * 2 - 1 + self.noise * noise).requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=1e-5)
        for _ in range(self.steps):
            reproduced = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample
            unlike = 1 - ssim(pixels / 2 + 0.5, image, 11).mean()
            loss = (reproduced - pixels).square().mean() + self.distance_weight * (unlike - self.distance).relu()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return (pixels.detach() / 2 + 0.5).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, learning_rate={self.learning_rate}, noise={self.noise}"


class Upscale(_ModelTransform):
    """Enlarge by four with a diffusion model that also removes noise; `RandomNoise` comes before it.

    Args:
        model: folder or Hub id of a `StableDiffusionUpscalePipeline`: stabilityai/stable-diffusion-x4-upscaler.
        noise_level: how much noise the model adds to the photo before, on its own scale.
        steps: of drawing.
        guidance_scale: of drawing.
        prompt: what the photo shows.

    The draw holds a seed, pinned to 0 in evaluation mode.

    Source: robust style mimicry (arXiv 2406.12027), noisy upscaling: noise 0.1, noise level 320, 75 steps, guidance 9.
    """

    def __init__(
        self,
        model: str,
        *,
        noise_level: int = 320,
        steps: int = 75,
        guidance_scale: float = 9.0,
        prompt: str = "a photo of a person",
    ):
        super().__init__()
        check_whole_numbers(0, noise_level=noise_level)
        check_whole_numbers(1, steps=steps)
        self.pipeline = _load_pipeline(model)
        if not isinstance(self.pipeline, StableDiffusionUpscalePipeline):
            kind = type(self.pipeline).__name__
            raise ValueError(f"{model}: expected a StableDiffusionUpscalePipeline, got a {kind}")
        if noise_level > (most := self.pipeline.config.max_noise_level):
            raise ValueError(f"noise_level: expected one up to the model's {most}, got {noise_level}")
        self.pipeline.set_progress_bar_config(disable=True)
        self.networks = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        self.noise_level, self.steps = noise_level, steps
        self.guidance_scale, self.prompt = guidance_scale, prompt

    @torch.no_grad()
    def apply_draw(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        self.pipeline.to(images.device)
        upscaled = [
            self.pipeline(
                prompt=self.prompt,
                image=image[None].clamp(0, 1),
                noise_level=self.noise_level,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator().manual_seed(draw["seed"]),
                output_type="pt",
            ).images
            for image in images
        ]
        return torch.cat(upscaled).clamp(0, 1).to(images)

    def extra_repr(self) -> str:
        return f"noise_level={self.noise_level}, steps={self.steps}"


def size_arguments(pipeline: DiffusionPipeline, height: int, width: int) -> dict[str, int]:
    """Height and width, for pipelines that would else take a size of their own and not the photo's."""
    known = inspect.signature(pipeline.__call__).parameters
    return {name: side for name, side in {"height": height, "width": width}.items() if name in known}


def _starts(length: int, side: int) -> list[int]:
    """Where squares of this side start, half a side apart, the last at the end."""
    return sorted({*range(0, length - side + 1, max(1, side // 2)), length - side})


def _load_pipeline(model: str) -> DiffusionPipeline:
    """ValueError if it is none."""
    folder = str(locate_model(model))
    try:
        unused = {}
        if "safety_checker" in DiffusionPipeline.load_config(folder):  # which would turn photos black
            unused = {"safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **unused)
    except OSError as error:
        raise ValueError(f"expected the folder or Hub id of a pipeline, got {model!r}: {error}") from error


def _load_autoencoder(model: str) -> AutoencoderKL:
    """ValueError if it is none."""
    folder = str(locate_model(model))
    try:
        is_pipeline = "_class_name" in DiffusionPipeline.load_config(folder)
    except (OSError, ValueError):
        is_pipeline = False
    try:
        subfolder = "vae" if is_pipeline else None
        return AutoencoderKL.from_pretrained(folder, subfolder=subfolder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected the folder or Hub id of an AutoencoderKL, got {model!r}: {error}") from error
