"""DreamBooth (CVPR 2023, arXiv 2208.12242): the denoiser and the text encoder learn the photos, with a prior loss."""

from typing import ClassVar

from ..finetuning import FACE_MODEL_ATTACK, DreamBoothConfig
from .base import TrainingAttacker


class DreamBoothAttacker(TrainingAttacker):
    """All weights of the denoiser, and of the text encoder as configured."""

    presets: ClassVar = {
        # GAP-Diff's attacker (section V), as Anti-DreamBooth's and SimAC's.
        "weak": DreamBoothConfig(),
        # The rate, steps and weights of APDM's attacker, with the batches of the weak one.
        "strong": DreamBoothConfig(learning_rate=5e-6, max_train_steps=800, train_text_encoder="no"),
        "face-model": FACE_MODEL_ATTACK,
    }
