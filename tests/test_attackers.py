"""Every attacker on a tiny model: what learns and what does not, and that diffusers loads what it saves."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_finetuning import changed, weights
from test_surrogates_diffusion import flux, sd3, sdxl
from torch import nn
from torch.nn.utils import parametrize

from gap_diff_diffusers import StableDiffusionXLSurrogate, load_surrogate
from gap_diff_diffusers.attackers import ATTACKERS
from gap_diff_diffusers.attackers.base import Attacker
from gap_diff_diffusers.attackers.svdiff import SingularValueShift
from gap_diff_diffusers.finetuning import DreamBoothConfig, generate_images

SETTINGS = {
    "resolution": 64,
    "max_train_steps": 3,
    "num_class_images": 2,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "learning_rate": 0.05,
}
IN_PROCESS = sorted(n for n in ATTACKERS if not n.startswith("official:") and "editing" not in ATTACKERS[n])
LEARNS = {  # what of the denoiser's names, and of the text encoder's, may change; nothing else does
    "custom-diffusion": ((".attn2.to_",), ("token_embedding",)),
    "dreambooth": (("",), ("",)),
    "lora": (("lora_",), ()),
    "svdiff": ((".weight",), (".weight",)),
    "textual-inversion": ((), ("token_embedding",)),
}


@pytest.fixture(params=IN_PROCESS)
def attacker(request) -> Attacker:
    return ATTACKERS.load(request.param)(**SETTINGS)


def learned_names(model, before):
    """The parameters that are new or other than before; those that LoRA moved below a layer keep their names."""
    return {
        name
        for name, value in model.named_parameters()
        if not torch.equal(value, before.get(name.replace(".base_layer", ""), value.new_empty(0)))
    }


def prompt_of(attacker):
    return attacker.config.instance_prompt


def draw(pipeline, prompt):
    return generate_images(pipeline, prompt, 1, resolution=64, num_inference_steps=2, progress=False)


def attack(attacker, surrogate, images):
    return attacker(surrogate, images, class_images=images.flip(3), progress=False)


def test_the_table_names_every_attacker():
    assert set(LEARNS) == set(IN_PROCESS)


def test_only_what_the_method_names_learns(attacker, surrogate, images):
    (name,) = [name for name in IN_PROCESS if ATTACKERS.load(name) is type(attacker)]
    original = copy.deepcopy(surrogate)
    pipeline = attack(attacker, surrogate, images)
    assert not changed(pipeline.vae, weights(original.vae))
    for ours, before, allowed in (
        (pipeline.unet, original.denoiser, LEARNS[name][0]),
        (pipeline.text_encoder, original.pipeline.text_encoder, LEARNS[name][1]),
    ):
        learned = learned_names(ours, weights(before))
        assert bool(learned) == bool(allowed)
        assert all(any(part in key for part in allowed) for key in learned), learned
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(parametrize.is_parametrized(module) for module in pipeline.unet.modules())


@pytest.mark.parametrize("name", IN_PROCESS)
def test_sdxl_is_attacked_by_every_method(name, images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        surrogate = StableDiffusionXLSurrogate(sdxl(), name="tiny")
    before = {key: weights(part) for key, part in surrogate.pipeline.components.items() if isinstance(part, nn.Module)}
    word = {"initializer_token": "a"} if "token_embedding" in LEARNS[name][1] else {}  # its tokenizer knows letters
    attacker = ATTACKERS.load(name)(**SETTINGS | {"resolution": 32, "learning_rate": 1e-3} | word)
    pipeline = attack(attacker, surrogate, images)
    for part, allowed in zip(("unet", "text_encoder", "text_encoder_2", "vae"), (*LEARNS[name], LEARNS[name][1], ())):
        learned = learned_names(getattr(pipeline, part), before[part])
        assert bool(learned) == bool(allowed)
        assert all(any(piece in key for piece in allowed) for key in learned), learned
    for suffix in ("", "_2") if word else ():  # the new word began as "a", and moved
        embedding = getattr(pipeline, f"text_encoder{suffix}").get_input_embeddings().weight
        ids = getattr(pipeline, f"tokenizer{suffix}").convert_tokens_to_ids([attacker.config.rare_token, "a</w>"])
        assert not torch.equal(*embedding[ids])
    assert draw(pipeline, prompt_of(attacker)).isfinite().all()


def test_a_new_word_is_all_that_changes_in_the_embedding(surrogate, images):
    for name in ("textual-inversion", "custom-diffusion"):
        model = copy.deepcopy(surrogate)
        before = model.pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
        attacker = ATTACKERS.load(name)(**SETTINGS)
        pipeline = attack(attacker, model, images)
        after = pipeline.text_encoder.get_input_embeddings().weight
        row = pipeline.tokenizer.convert_tokens_to_ids(attacker.config.rare_token)
        first = pipeline.tokenizer.convert_tokens_to_ids("person</w>")
        assert torch.equal(after[: len(before)], before) and row >= len(before)
        assert (after[row] - before[first]).abs().max() > 0.01


def test_a_seed_decides_on_everything(attacker, surrogate, images):
    first, again = (attack(attacker, copy.deepcopy(surrogate), images) for _ in range(2))
    assert torch.equal(draw(first, prompt_of(attacker)), draw(again, prompt_of(attacker)))


def test_diffusers_loads_what_is_saved(attacker, surrogate, images, tmp_path):
    surrogate.pipeline.save_pretrained(tmp_path / "model")
    prompt = prompt_of(attacker)
    clean = draw(surrogate.pipeline, "a photo of a person")
    drawn = draw(attack(attacker, surrogate, images), prompt)
    attacker.save(surrogate.pipeline, tmp_path / "saved")
    if (tmp_path / "saved" / "model_index.json").is_file():
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    else:
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(draw(loaded, "a photo of a person"), clean, atol=1e-4, rtol=0)
        if (tmp_path / "saved" / "pytorch_lora_weights.safetensors").is_file():
            loaded.load_lora_weights(tmp_path / "saved")
        else:
            loaded.load_textual_inversion(tmp_path / "saved" / "learned_embeds.safetensors")
    torch.testing.assert_close(draw(loaded, prompt), drawn, atol=1e-4, rtol=0)


def test_lora_learns_the_text_encoder_too(surrogate, images, tmp_path):
    surrogate.pipeline.save_pretrained(tmp_path / "model")
    attacker = ATTACKERS.load("lora")(**SETTINGS | {"train_text_encoder": "yes", "text_learning_rate": 0.05})
    drawn = draw(attack(attacker, surrogate, images), prompt_of(attacker))
    attacker.save(surrogate.pipeline, tmp_path / "saved")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(draw(loaded, prompt_of(attacker)), drawn, atol=1e-4, rtol=0)
    assert any("lora_" in name for name, _ in loaded.text_encoder.named_parameters())


@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize("name", ["svdiff", "dreambooth"])
def test_transformers_are_attacked_too(make, name, images, tmp_path):
    make().save_pretrained(tmp_path / "model")
    surrogate = load_surrogate(tmp_path / "model")
    before = weights(surrogate.denoiser)
    attack(ATTACKERS.load(name)(**SETTINGS | {"resolution": 32, "learning_rate": 0.01}), surrogate, images)
    assert changed(surrogate.denoiser, before)


def test_the_subject_is_what_follows_the_rare_word():
    for prompt, subject in (("a photo of sks person", "sks person"), ("portrait of sks man", "sks man")):
        assert DreamBoothConfig(instance_prompt=prompt).subject == subject


@pytest.mark.parametrize("make", [sdxl, sd3, flux])
def test_what_lora_saves_of_larger_models_loads_whole(make, images, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    surrogate = load_surrogate(tmp_path / "model")
    settings = SETTINGS | {"resolution": 32, "train_text_encoder": "yes", "text_learning_rate": 0.05}
    attacker = ATTACKERS.load("lora")(**settings)
    attacked = attack(attacker, surrogate, images)
    attacker.save(attacked, tmp_path / "saved")
    loaded = type(attacked).from_pretrained(tmp_path / "model")
    loaded.load_lora_weights(tmp_path / "saved")
    for name, model in attacked.components.items():
        if isinstance(model, nn.Module):
            adapters, others = adapters_of(model), adapters_of(getattr(loaded, name))
            assert bool(adapters) == (name != "vae" and "T5" not in type(model).__name__), name
            assert set(adapters) == set(others)
            assert all(torch.allclose(value, others[key]) for key, value in adapters.items())


def adapters_of(model):
    """The weights of LoRA, by layer and side, whatever their adapter is called."""
    found = {}
    for key, value in model.named_parameters():
        layer, lora, rest = key.partition(".lora_")
        if lora:
            found[layer, rest[0]] = value
    return found


def test_textual_inversion_is_for_clip(images, tmp_path):
    sd3().save_pretrained(tmp_path / "model")
    attacker = ATTACKERS.load("textual-inversion")(**SETTINGS | {"resolution": 32})
    with pytest.raises(ValueError, match="T5EncoderModel too; use lora"):
        attack(attacker, load_surrogate(tmp_path / "model"), images)


def test_svdiff_shifts_every_kind_of_weight(surrogate, images):
    before = {name: value.detach().clone() for name, value in surrogate.named_parameters()}
    attack(ATTACKERS.load("svdiff")(**SETTINGS | {"vector_learning_rate": 0.05}), surrogate, images)
    learned = learned_names(surrogate, before)
    for part in ("conv_in.weight", "attn2.to_k.weight", "conv_norm_out.weight", "token_embedding.weight"):
        assert any(part in name for name in learned), part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_leaves_the_shifted_weight_exact(dtype):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    shift = SingularValueShift(weight)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        torch.testing.assert_close(shift(weight), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), nn.Conv2d(4, 6, 3)])
def test_singular_values_start_at_the_weight_and_never_turn_negative(layer):
    shift = SingularValueShift(layer.weight)
    torch.testing.assert_close(shift(layer.weight), layer.weight, atol=1e-5, rtol=0)
    shift.shift.data[:] = -1e3
    assert shift(layer.weight).abs().max() == 0
    shift.shift.data[:] = 1.0
    values = torch.linalg.svdvals(shift(layer.weight).flatten(1))
    torch.testing.assert_close(values, torch.linalg.svdvals(layer.weight.flatten(1)) + 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_presets_are_named_and_settings_change_them(name):
    attacker = ATTACKERS.load(name)
    assert set(attacker.presets) == {"weak", "strong", "face-model"}
    assert all(isinstance(preset, attacker.config_class) for preset in attacker.presets.values())
    assert attacker("strong", seed=7).config.seed == 7
    assert attacker("strong").config.max_train_steps == attacker.presets["strong"].max_train_steps
    with pytest.raises(ValueError, match="weak, strong"):
        attacker("medium")
    with pytest.raises(TypeError, match="steps"):
        attacker(steps=3)


def test_the_papers_attacker_is_the_weak_dreambooth():
    config = ATTACKERS.load("dreambooth")().config
    assert config == DreamBoothConfig() and config.learning_rate == 5e-7 and config.max_train_steps == 1000


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {"rank": 0}, "rank"),
        ("textual-inversion", {"templates": ("a photo",)}, "templates"),
        ("textual-inversion", {"prior_loss_weight": 1.0}, "prior_loss_weight 0"),
        ("custom-diffusion", {"freeze_model": "none"}, "freeze_model"),
        ("custom-diffusion", {"train_text_encoder": "no"}, "train_text_encoder"),
    ],
)
def test_settings_that_do_not_work_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        ATTACKERS.load(name)(**changes)


def test_words_that_do_not_work_are_named(surrogate, images):
    for changes, message in (
        ({"rare_token": "sks", "instance_prompt": "a photo of sks"}, "new to the tokenizer, got 'sks'"),
        ({"initializer_token": "xyzzy"}, "initializer_token that is one token, got 'xyzzy'"),
    ):
        attacker = ATTACKERS.load("textual-inversion")(**SETTINGS | changes)
        with pytest.raises(ValueError, match=message):
            attack(attacker, copy.deepcopy(surrogate), images)
