"""What is done to published photos: a text-to-image model is made to learn the person on them, or edits them.

Every entry of `ATTACKERS` is an `attackers.base.Attacker`: a surrogate and photos in, a pipeline of diffusers out, and
what is drawn with it.
"""

from ..registry import Registry

ATTACKERS = Registry(
    "attacker",
    {
        "custom-diffusion": f"{__name__}.custom_diffusion:CustomDiffusionAttacker",
        "dreambooth": f"{__name__}.dreambooth:DreamBoothAttacker",
        "inpainting": f"{__name__}.editing:InpaintingAttacker",
        "instruct-pix2pix": f"{__name__}.editing:InstructPix2PixAttacker",
        "lora": f"{__name__}.lora:LoRAAttacker",
        "official:custom-diffusion": f"{__name__}.official:OfficialCustomDiffusion",
        "official:dreambooth": f"{__name__}.official:OfficialDreamBooth",
        "official:lora": f"{__name__}.official:OfficialLoRA",
        "official:lora-sdxl": f"{__name__}.official:OfficialLoRASDXL",
        "official:textual-inversion": f"{__name__}.official:OfficialTextualInversion",
        "sdedit": f"{__name__}.editing:SDEditAttacker",
        "svdiff": f"{__name__}.svdiff:SVDiffAttacker",
        "textual-inversion": f"{__name__}.textual_inversion:TextualInversionAttacker",
    },
)
