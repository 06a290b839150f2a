"""DreamBooth on a tiny model: its loss, what learns and what does not, the pictures that it draws."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from test_surrogates_diffusion import clip, sdxl
from transformers import CLIPTextModelWithProjection

from gap_diff_diffusers.finetuning import DreamBooth, DreamBoothConfig, add_token, center_square, generate_images

SETTINGS = {
    "resolution": 64,
    "max_train_steps": 3,
    "train_batch_size": 2,
    "prior_batch_size": 1,
    "num_class_images": 2,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "learning_rate": 1e-3,
    "train_text_encoder": "no",
}


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def test_the_loss_is_that_of_the_dreambooth_example(surrogate, images):
    config = DreamBoothConfig(**SETTINGS, prior_loss_weight=0.5)
    class_images = images.flip(3)
    run = DreamBooth(copy.deepcopy(surrogate), images, config, class_images=class_images)
    loss = run.step()

    # By hand: the same draws in the same order, the formula of train_dreambooth.py.
    draws = torch.Generator().manual_seed(config.seed)
    latents = []
    for photos, count in ((images, 2), (class_images, 1)):
        which = torch.randperm(len(photos), generator=draws)[:count]
        noise = torch.randn((count, 4, 8, 8), generator=draws)
        posterior = surrogate.vae.encode(photos[which] * 2 - 1).latent_dist
        latents.append(posterior.mean + posterior.std * noise)
    latents = torch.cat(latents) * surrogate.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=draws)
    timesteps = torch.randint(0, 1000, (3,), generator=draws)
    scheduler = DDPMScheduler.from_config(surrogate.pipeline.scheduler.config)
    prompts = [config.instance_prompt] * 2 + [config.class_prompt]
    ids = surrogate.pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    embeds = surrogate.pipeline.text_encoder(ids)[0]
    predicted = surrogate.denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
    instance, prior = (predicted - noise).square().split([2, 1])
    assert loss == pytest.approx((instance.mean() + 0.5 * prior.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("train_text_encoder", ["no", "token", "yes"])
def test_what_learns_and_what_does_not(surrogate, images, train_text_encoder):
    parts = {"vae": surrogate.vae, "unet": surrogate.denoiser, "text": surrogate.pipeline.text_encoder}
    before = {name: weights(part) for name, part in parts.items()}
    settings = SETTINGS | {"train_text_encoder": train_text_encoder, "text_learning_rate": 1e-2}
    losses = DreamBooth(surrogate, images, DreamBoothConfig(**settings)).train(progress=False)
    assert len(losses) == 3
    assert not changed(parts["vae"], before["vae"])
    assert len(changed(parts["unet"], before["unet"])) > 0.9 * len(before["unet"])
    learned = changed(parts["text"], before["text"])
    if train_text_encoder == "yes":
        assert len(learned) > 0.9 * len(before["text"])
    else:
        assert len(learned) == (train_text_encoder == "token")
    if train_text_encoder == "token":
        embedding = surrogate.pipeline.text_encoder.get_input_embeddings().weight
        rows = (embedding != before["text"][learned.pop()]).any(dim=1).nonzero().flatten().tolist()
        assert rows == surrogate.pipeline.tokenizer("sks", add_special_tokens=False).input_ids
    assert not any(parameter.requires_grad for parameter in surrogate.parameters())


def test_a_new_word_is_not_taken_for_the_end_of_the_text(tmp_path):
    pipeline = sdxl()
    config = clip(projection=True).config
    config.eos_token_id = 2  # as in the files of SDXL
    pipeline.register_modules(text_encoder_2=CLIPTextModelWithProjection(config))
    add_token(pipeline, "<new>", "a")
    pipeline.text_encoder_2.save_pretrained(tmp_path)
    ids = pipeline.tokenizer_2("a <new> b", padding="max_length", return_tensors="pt").input_ids
    end = ids[0].tolist().index(pipeline.tokenizer_2.eos_token_id)
    assert ids.max() == pipeline.tokenizer_2.convert_tokens_to_ids("<new>") and ids.argmax() != end
    for encoder in (pipeline.text_encoder_2.eval(), CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()):
        output = encoder(ids)
        torch.testing.assert_close(output.text_embeds, encoder.text_projection(output.last_hidden_state[:, end]))


def test_it_learns_the_photos(surrogate, images):
    config = DreamBoothConfig(**SETTINGS | {"max_train_steps": 60, "prior_loss_weight": 0.0})
    losses = DreamBooth(surrogate, images, config).train(progress=False)
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


def test_the_learning_rate_ends_as_its_schedule_says(surrogate, images):
    for lr_scheduler, end in (("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)):
        run = DreamBooth(copy.deepcopy(surrogate), images, DreamBoothConfig(**SETTINGS, lr_scheduler=lr_scheduler))
        run.train(progress=False)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(end * SETTINGS["learning_rate"], abs=1e-9)


def test_a_seed_decides_on_everything(surrogate, images):
    runs = []
    for seed in (0, 0, 1):
        config = DreamBoothConfig(**SETTINGS, seed=seed)
        runs.append(DreamBooth(copy.deepcopy(surrogate), images, config).train(progress=False))
    assert runs[0] == runs[1] != runs[2]


def test_weights_stay_float32_under_bf16(surrogate, images):
    surrogate.to(torch.bfloat16)
    config = DreamBoothConfig(**SETTINGS | {"mixed_precision": "bf16", "learning_rate": 1e-6})
    run = DreamBooth(surrogate, images, config)
    before = weights(surrogate.denoiser)
    run.train(progress=False)
    assert surrogate.denoiser.dtype == torch.float32
    assert len(changed(surrogate.denoiser, before)) > 0.9 * len(before)  # bfloat16 would round such steps away
    generate_images(surrogate.pipeline, "a photo of sks person", 1, resolution=64, num_inference_steps=2)


def test_a_picture_depends_on_its_own_seed_alone(surrogate):
    options = {"resolution": 64, "num_inference_steps": 2, "progress": False}
    pictures = generate_images(surrogate.pipeline, "a photo of a person", 3, batch_size=2, **options)
    assert pictures.shape == (3, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    again = generate_images(surrogate.pipeline, "a photo of a person", 1, seed=2, batch_size=8, **options)
    torch.testing.assert_close(again[0], pictures[2], atol=1e-4, rtol=0)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


def test_photos_of_any_shape_become_squares():
    wide = torch.zeros(1, 3, 40, 100)
    wide[..., 30:70] = 1
    assert center_square(wide, 40).min() == 1
    assert center_square(wide, 20).shape == (1, 3, 20, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": "some"}, "train_text_encoder"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"lr_scheduler": "step"}, "lr_scheduler"),
        ({"learning_rate": "high"}, "learning_rate of type float"),
        ({"max_train_steps": 2.0}, "max_train_steps of type int"),
        ({"instance_prompt": "a photo of a person"}, "'sks'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm above 0"),
    ],
)
def test_settings_that_do_not_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DreamBoothConfig(**SETTINGS | changes)


def test_no_photos_and_a_diverging_run_are_errors(surrogate, images):
    with pytest.raises(ValueError, match="expected photos"):
        DreamBooth(surrogate, images[:0], DreamBoothConfig(**SETTINGS))
    with pytest.raises(ValueError, match="'xyzzy', which is 5"):
        settings = {"rare_token": "xyzzy", "instance_prompt": "xyzzy", "train_text_encoder": "token"}
        DreamBooth(surrogate, images, DreamBoothConfig(**SETTINGS | settings))
    run = DreamBooth(surrogate, images, DreamBoothConfig(**SETTINGS))
    run.step()
    run.posteriors = tuple(part * float("nan") for part in run.posteriors)
    before = [parameter.clone() for parameter in run.parameters]
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 1; lower the learning rate"):
        run.step()
    assert all(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))
