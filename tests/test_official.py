"""diffusers' own scripts as attackers: fetching them, running them, loading what they write.

Those that run the scripts themselves are slow, and fail without them: `gap-diff fetch-attackers`, or a checkout in
DIFFUSERS_CHECKOUT.
"""

import copy
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from test_attackers import draw
from test_benchmark_surrogate import model  # noqa: F401
from test_finetuning import changed, weights
from test_surrogates_diffusion import sdxl

from gap_diff_diffusers import StableDiffusionXLSurrogate, download
from gap_diff_diffusers.attack import memory_errors
from gap_diff_diffusers.attackers import ATTACKERS, official
from gap_diff_diffusers.cli import main
from gap_diff_diffusers.finetuning import DreamBooth, DreamBoothConfig
from gap_diff_diffusers.protect import load_pipeline

OFFICIAL = sorted(name for name in ATTACKERS if name.startswith("official:"))
SETTINGS = {"resolution": 64, "max_train_steps": 2, "num_class_images": 2, "train_batch_size": 1}
CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")

SCRIPT = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "output_dir", "learning_rate"):
    parser.add_argument("--" + name)
known, rest = parser.parse_known_args()
print("noise on standard output")
print("what it says", file=sys.stderr, flush=True)
if float(known.learning_rate) > 2:
    os.kill(os.getpid(), 9)
if float(known.learning_rate) > 1:
    sys.exit("the learning rate is too high")
import shutil
from safetensors.numpy import load_file, save_file
steps = int(rest[rest.index("--max_train_steps") + 1])
sum(range(5_000_000 * steps))  # more steps take longer
shutil.copytree(known.pretrained_model_name_or_path, known.output_dir, dirs_exist_ok=True)
(unet,) = pathlib.Path(known.output_dir, "unet").glob("*.safetensors")
weights = load_file(unet)
weights["conv_in.bias"] += 1
save_file(weights, unet, {"format": "pt"})
photos = [sorted(os.listdir(folder)) for folder in (known.instance_data_dir, known.class_data_dir)]
pathlib.Path(r"{record}").write_text(json.dumps([photos, rest, os.environ["ACCELERATE_MIXED_PRECISION"]]))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder like a checkout of diffusers, with a script that does next to nothing, and says what it was told."""
    script = tmp_path / "checkout" / "examples" / "dreambooth" / "train_dreambooth.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.replace("{record}", str(tmp_path / "record.json")))
    return tmp_path / "checkout"


def test_a_script_gets_clean_photos_and_its_settings(surrogate, images, checkout, tmp_path):
    bias = surrogate.denoiser.conv_in.bias.clone()
    attacker = ATTACKERS.load("official:dreambooth")(diffusers_examples=str(checkout), **SETTINGS)
    surrogate.enable_gradient_checkpointing()
    pipeline = attacker(surrogate, images, class_images=images[:2], progress=False)
    torch.testing.assert_close(pipeline.unet.conv_in.bias, bias + 1)
    assert pipeline is surrogate.pipeline and not pipeline.unet.conv_in.bias.requires_grad
    (photos, class_photos), rest, precision = json.loads((tmp_path / "record.json").read_text())
    assert photos == ["0000.png", "0001.png", "0002.png", "0003.png"] and len(class_photos) == 2
    told = dict(zip(rest, [*rest[1:], None]))
    assert told["--instance_prompt"] == "a photo of sks person" and told["--max_train_steps"] == "2"
    assert told["--num_class_images"] == "2" and "--train_text_encoder" in rest and precision == "no"
    assert told["--adam_weight_decay"] == "0.01" and told["--max_grad_norm"] == "1.0"
    assert "--gradient_checkpointing" in rest


def test_what_a_script_cannot_do_is_said_before_anything_is_drawn(surrogate, checkout):
    with pytest.raises(ValueError, match="expected a StableDiffusionXLPipeline for dreambooth/"):
        ATTACKERS.load("official:lora-sdxl")().check_model(surrogate)
    attacker = ATTACKERS.load("official:dreambooth")(diffusers_examples=str(checkout))
    script = attacker.find_script()
    script.write_text("import torchvision")
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ImportError, match=r"train_dreambooth\.py needs torchvision"):
            attacker.find_script()


def test_what_a_script_says_before_it_fails_is_the_error(surrogate, images, checkout, capsys):
    attacker = ATTACKERS.load("official:dreambooth")(diffusers_examples=str(checkout), learning_rate=2.0, **SETTINGS)
    with pytest.raises(OSError, match="exit code 1: the learning rate is too high"):
        attacker(surrogate, images, class_images=images[:2], progress=False)
    assert "what it says" not in capsys.readouterr().err
    attacker = ATTACKERS.load("official:dreambooth")(diffusers_examples=str(checkout), learning_rate=3.0, **SETTINGS)
    with pytest.raises(OSError, match=r"out of memory \(train_dreambooth.py was killed.*lower it"), memory_errors():
        attacker(surrogate, images, class_images=images[:2])
    assert "what it says" in capsys.readouterr().err


@pytest.mark.parametrize("name", OFFICIAL)
def test_presets_and_a_missing_script(name, tmp_path):
    attacker = ATTACKERS.load(name)
    assert {"weak", "strong", "face-model"} == set(attacker.presets)
    with pytest.raises(ValueError, match="gap-diff fetch-attackers"):
        attacker(diffusers_examples=str(tmp_path)).find_script()
    assert {attacker.script for attacker in map(ATTACKERS.load, OFFICIAL)} == set(official.RELEASES["v0.40.0"])


def test_a_script_that_was_fetched_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "HF_HOME", str(tmp_path / "cache"))
    attacker = ATTACKERS.load("official:dreambooth")()
    with pytest.raises(ValueError, match="gap-diff fetch-attackers"):
        attacker.find_script()
    source = tmp_path / "source" / "v0.40.0" / "examples" / attacker.script
    source.parent.mkdir(parents=True)
    source.write_bytes(b"print()")
    digest = hashlib.sha256(b"print()").hexdigest()
    monkeypatch.setattr(official, "RELEASES", {"v0.40.0": {attacker.script: digest}})
    folder = official.fetch_scripts(url=f"file://{tmp_path}/source/{{tag}}/examples/{{script}}")
    assert attacker.find_script() == (folder / "examples" / attacker.script).resolve()
    assert attacker.script_digest(attacker.config) == digest[:16]


def test_scripts_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "HF_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source" / "v0.40.0" / "examples" / "a" / "train.py"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"print()")
    url = f"file://{tmp_path}/source/{{tag}}/examples/{{script}}"
    monkeypatch.setattr(official, "RELEASES", {"v0.40.0": {"a/train.py": "0" * 64}})
    with pytest.raises(OSError, match="expected a file with sha256 000"):
        official.fetch_scripts(url=url)
    assert not list((tmp_path / "cache").rglob("*.py"))
    digest = hashlib.sha256(b"print()").hexdigest()
    monkeypatch.setattr(official, "RELEASES", {"v0.40.0": {"a/train.py": digest}})
    folder = official.fetch_scripts(url=url)
    assert (folder / "examples" / "a" / "train.py").read_bytes() == b"print()"
    source.unlink()
    assert official.fetch_scripts(url=url) == folder  # nothing is left to fetch
    (folder / "examples" / "a" / "train.py").write_bytes(b"cut off")
    with pytest.raises(OSError, match="could not be fetched"):
        official.fetch_scripts(url=url)
    (folder / "examples" / "a" / "train.py").write_bytes(b"print()")
    assert main(["fetch-attackers"]) == 0 and capsys.readouterr().out.strip() == str(folder)
    assert main(["fetch-attackers", "--tag", "v0.1"]) == 2


@pytest.fixture
def examples(monkeypatch):
    """The folder of the scripts, that find torchvision's stand-in."""
    folder = Path(CHECKOUT) if CHECKOUT else official.scripts_folder("v0.40.0")
    if not (folder / "examples").is_dir():
        pytest.fail("run gap-diff fetch-attackers first, or set DIFFUSERS_CHECKOUT")  # skipped, a bar would look met
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "torchvision_stub"), prepend=os.pathsep)
    return str(folder)


@pytest.mark.slow
def test_dreambooth_loses_what_the_script_loses(surrogate, images, examples, tmp_path, monkeypatch):
    """At every step, given the script's own draws; and in the end the weights are the same."""
    settings = {"max_train_steps": 30, "learning_rate": 2e-3, "train_batch_size": 2, "num_class_images": 4}
    settings |= {"resolution": 64, "train_text_encoder": "yes"}
    monkeypatch.setenv("RECORD_TRAINING", str(tmp_path / "recorded.pt"))
    theirs = copy.deepcopy(surrogate)
    script = ATTACKERS.load("official:dreambooth")(diffusers_examples=examples, **settings)
    script(theirs, images, class_images=images.flip(3), progress=False)
    recorded = torch.load(tmp_path / "recorded.pt", weights_only=True)

    class Replayed(DreamBooth):
        drawn = zip(recorded["latents"], recorded["noise"], recorded["timesteps"], strict=True)

        def draw_batch(self):
            return next(self.drawn)

    config = DreamBoothConfig(**settings | {"prior_batch_size": 2})
    losses = Replayed(surrogate, images, config, class_images=images.flip(3)).train(progress=False)
    expected = torch.stack(recorded["loss"])
    assert len(expected) == 30 and expected.std() > 0.01
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=0.02, atol=0)
    for ours, their in zip(surrogate.denoiser.parameters(), theirs.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, their, atol=1e-3, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_unmodified_script_runs_end_to_end_on_protected_photos(name, surrogate, images, tmp_path, examples):
    settings = SETTINGS | {"learning_rate": 0.05}
    if name == "official:custom-diffusion":
        settings["extra_arguments"] = ("--noaug",)  # it shrinks 64 px until no mask is left
    attacker = ATTACKERS.load(name)(diffusers_examples=examples, **settings)
    script = attacker.find_script().read_bytes()
    assert hashlib.sha256(script).hexdigest() == official.RELEASES["v0.40.0"][attacker.script]
    if name == "official:lora-sdxl":
        surrogate = StableDiffusionXLSurrogate(sdxl(), name="tiny")
    before = copy.deepcopy(surrogate)
    protected = load_pipeline(device="cpu")(images, 8 / 255, output_type="pt").images
    assert not torch.equal(protected, images)
    pipeline = attacker(surrogate, protected, class_images=images[:2], progress=False)
    assert draw(pipeline, attacker.config.instance_prompt).isfinite().all()
    assert changed(pipeline.unet, weights(before.denoiser)) if "inversion" not in name else True
    if name in ("official:custom-diffusion", "official:textual-inversion"):
        embedding = pipeline.text_encoder.get_input_embeddings().weight
        word, first = (pipeline.tokenizer.convert_tokens_to_ids(t) for t in (attacker.config.rare_token, "person</w>"))
        assert not torch.equal(embedding[word], embedding[first])
    attacker.save(pipeline, tmp_path / "saved")
    loaded = type(pipeline).from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_attackers_are_timed_against_the_script(model, photos, checkout, tmp_path, capsys):  # noqa: F811
    command = ["benchmark", "attackers", "--photos", str(photos), "--model", model, "--resolution", "64"]
    command += ["--steps", "30", "--diffusers_examples", str(checkout), "--output", str(tmp_path / "figures.json")]
    assert main(command) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] == pytest.approx(
        figures["seconds"]["official:dreambooth"] / figures["seconds"]["dreambooth"]
    )
    assert "| official:dreambooth |" in capsys.readouterr().out
    assert main([*command, "--steps", "0"]) == 2
