"""Training of the small face embedder that SER-FIQ is measured with: dlib's network, distilled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..config import check_outside, portable_settings, provenance
from ..data import PhotosConfig, Source, digest_photos, face_square, round_to_8_bits, split_record, to_tensor
from ..images import PhotoError
from ..models.face_embedder import FACE_SIZE, FaceEmbedder
from ..recognition import DlibFaces
from .loop import LoopConfig, TrainingLoop

MARGIN = 4
"""How far faces are moved about in training, in pixels."""


@dataclass(frozen=True, kw_only=True)
class FaceEmbedderConfig(PhotosConfig, LoopConfig):
    """Settings of the training, besides those of every run and of its photos.

    Attributes:
        photo_size: photos are scaled to this side before faces are looked for.
        disturbed: the share of faces that are blurred, darkened, covered or made noisy.
        disturbed_length: how long an embedding they shall have, of that of the undisturbed face: below 1, so that
            dropout turns it further. With 1 the network learns to see through what disturbs, and SER-FIQ hardly falls.
    """

    photo_size: int = 512
    disturbed: float = 0.5
    disturbed_length: float = 0.1

    def __post_init__(self):
        PhotosConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        check_outside(self.output_dir, self.folders)
        for name in ("disturbed", "disturbed_length"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
        if self.photo_size < FACE_SIZE:
            raise ValueError(f"expected photo_size of at least {FACE_SIZE}, got {self.photo_size}")


class FaceEmbedderTrainer(TrainingLoop):
    """One network learns what dlib's says of the undisturbed face, less its mean; shorter from a disturbed one."""

    def __init__(self, config: FaceEmbedderConfig):
        torch.manual_seed(config.seed)
        self.network = FaceEmbedder()
        super().__init__(config, {"embedder": self.network})
        backend = DlibFaces()
        train, held_out = config.split_photos()
        self.data_digest = digest_photos([*train, *held_out])
        self.faces, targets, self.left_out = _find(backend, train, config.photo_size)
        self.held_out, held_out_targets, left_out = _find(backend, held_out, config.photo_size)
        self.left_out += left_out
        mean = targets.mean(0)
        scale = (targets - mean).pow(2).sum(1).mean().sqrt()
        self.targets, self.held_out_targets = (targets - mean) / scale, (held_out_targets - mean) / scale

    def training_step(self, generator: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(len(self.faces), (self.config.train_batch_size,), generator=generator)
        images = torch.stack([_move(self.faces[i], generator) for i in chosen])
        targets = self.targets[chosen].clone()
        for index in range(len(chosen)):
            if torch.rand((), generator=generator) < self.config.disturbed:
                images[index] = disturb(images[index], generator)
                targets[index] *= self.config.disturbed_length
        device = self.accelerator.device
        with self.autocast():
            embeddings = self.network(images.to(device), generator=generator)
        loss = (embeddings.float() - targets.to(device)).pow(2).sum(1).mean()
        norm = self.update("embedder", loss)
        return {"loss": loss.item(), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """How much of the held-out faces' variance is left, and the cosine with dlib's, both undisturbed."""
        middle = torch.stack([face[:, MARGIN:-MARGIN, MARGIN:-MARGIN] for face in self.held_out])
        embeddings = self.network(middle.to(self.accelerator.device)).float().cpu()
        error = (embeddings - self.held_out_targets).pow(2).sum(1).mean()
        cosine = F.cosine_similarity(embeddings, self.held_out_targets).mean()
        return {"held_out/error": error.item(), "held_out/cosine": cosine.item()}


def disturb(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A face (3,H,W) in [0,1], blurred, darkened, partly covered or noisy, as drawn."""
    kind, *draws = torch.rand(6, generator=generator).tolist()
    size = image.shape[-1]
    if kind < 0.2:  # by going down to 8 to 40 px and back
        low = round(8 + 32 * draws[0])
        small = F.interpolate(image[None], (low, low), mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, (size, size), mode="bilinear", align_corners=False)[0].clamp(0, 1)
    if kind < 0.4:  # with the noise and the rounding that a dark photo has
        dark = image * (0.03 + 0.37 * draws[0]) + 0.01 * torch.randn(image.shape, generator=generator)
        return round_to_8_bits(dark)
    if kind < 0.85:
        area, share = 0.08 + 0.3 * draws[0], 0.3 + 0.7 * draws[1]
        width, height = round(size * share), round(size * min(area / share, 1))
        top, left = round((size - height) * draws[2]), round((size - width) * draws[3])
        covered = image.clone()
        covered[:, top : top + height, left : left + width] = torch.rand(3, 1, 1, generator=generator)
        return covered
    return (image + (0.05 + 0.25 * draws[0]) * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def train_face_embedder(config: FaceEmbedderConfig, *, resume: str | None = None) -> tuple[FaceEmbedderTrainer, dict]:
    """Train it, from the beginning or as `TrainingLoop.train` resumes.

    Returns:
        The run with its network, and the training record.

    Raises:
        ImportError: dlib is not installed.
        ValueError: no photo with a face.
    """
    trainer = FaceEmbedderTrainer(config)
    figures = trainer.train(resume=resume)
    return trainer, {
        "config": portable_settings(config),
        "teacher": "dlib_face_recognition_resnet_model_v1 of face_recognition_models",
        "photos": split_record(len(trainer.faces) // 2, len(trainer.held_out) // 2, trainer.left_out),
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "figures": figures,
        **trainer.machine,
        "versions": provenance(),
    }


def _find(backend: DlibFaces, photos: list[Source], size: int) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Aligned faces (3,S,S) with `MARGIN` around them, what dlib's network says of each (N,128), both as they are and
    mirrored; and how many photos were left out."""
    faces, targets, left_out = [], [], 0
    for source in tqdm(photos, desc="looking for faces", disable=None):
        try:
            square = face_square(source)
        except PhotoError:
            left_out += 1
            continue
        image = to_tensor(square.resize((size, size)))
        views = [backend.locate(view, upsample=0) for view in (image, image.flip(2))]
        if not all(found for _, found in views):
            left_out += 1
            continue
        faces += [backend.cut(view, FACE_SIZE, MARGIN)[0] for view in views]
        targets += [torch.from_numpy(backend.embed(view)[0]).float() for view in views]
    if not faces:
        raise ValueError(
            f"expected photos with a face, to train on and held out, found none in {len(photos)} of these"
        )
    return faces, torch.stack(targets), left_out


def _move(face: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    top, left = torch.randint(2 * MARGIN + 1, (2,), generator=generator).tolist()
    return face[:, top : top + FACE_SIZE, left : left + FACE_SIZE]
