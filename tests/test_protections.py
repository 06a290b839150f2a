"""Methods that optimize a perturbation for each photo, on a tiny model."""

import copy

import pytest
import torch
from test_finetuning import SETTINGS

from gap_diff_diffusers.finetuning import DreamBooth, DreamBoothConfig
from gap_diff_diffusers.protections.anti_dreambooth import ASPLConfig, aspl

CONFIG = ASPLConfig(rounds=3, pgd_steps=4, surrogate_steps=2, step_size=2 / 255)


@pytest.fixture
def protect(surrogate, images):
    def run(config=CONFIG):
        attack = DreamBoothConfig(**SETTINGS)
        return aspl(surrogate, images, images.flip(3), config, attack=attack, class_images=images[:2], progress=False)

    return run


def test_aspl_stays_within_the_budget_and_leaves_the_model_alone(protect, surrogate, images):
    before = copy.deepcopy(surrogate.state_dict())
    protected = protect()
    levels = protected * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    change = (levels - (images * 255).round()).abs()
    assert 4 < change.max() <= 8.001
    assert all(torch.equal(value, before[name]) for name, value in surrogate.state_dict().items())
    assert torch.equal(protect(), protected)


def test_aspl_raises_the_loss_of_the_model_that_it_expects(protect, surrogate, images):
    attack = DreamBoothConfig(**SETTINGS)
    protected = protect(ASPLConfig(rounds=2, pgd_steps=20, surrogate_steps=1))

    def loss(photos):
        model = copy.deepcopy(surrogate)
        DreamBooth(model, images.flip(3), attack, class_images=images[:2]).step()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            draws = [model.denoising_loss(photos, attack.instance_prompt, generator=generator) for _ in range(20)]
        return torch.cat(draws).mean().item()

    assert loss(protected) > 1.001 * loss(images)
