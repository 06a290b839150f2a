"""Protect photos against diffusion-based personalization: GAP-Diff and the literature's other methods, for diffusers.

Importing this package imports neither torch nor diffusers: names are loaded when they are first used.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "EncoderSurrogate": "surrogates.encoder",
    "EnsembleSurrogate": "surrogates.ensemble",
    "FluxSurrogate": "surrogates.flow_matching",
    "GAPDiffDiscriminator": "models.gap_diff_discriminator",
    "GAPDiffGenerator": "models.gap_diff_generator",
    "GAPDiffProtectionPipeline": "pipelines.pipeline_gap_diff",
    "GAPDiffProtectionPipelineOutput": "pipelines.pipeline_gap_diff",
    "PhotoError": "images",
    "PromptEmbedding": "surrogates.base",
    "StableDiffusion3Surrogate": "surrogates.flow_matching",
    "StableDiffusionSurrogate": "surrogates.stable_diffusion",
    "StableDiffusionXLSurrogate": "surrogates.stable_diffusion",
    "Surrogate": "surrogates.base",
    "encoder_displacement": "surrogates.encoder",
    "load_surrogate": "surrogates",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
