"""The training loop that all trainings share, and the face model, on tiny networks and pictures made here."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import tracking
from diffusers import StableDiffusionPipeline
from fake_hub import FakeHub, hub_environment
from PIL import Image
from test_surrogates import sana_like

from gap_diff_diffusers.config import BUNDLED_FACE_MODEL, config_from_arguments, initial_weights, training_parser
from gap_diff_diffusers.data import digest_photos
from gap_diff_diffusers.training.gap_diff import GAPDiffTrainingConfig
from gap_diff_diffusers.training.loop import LoopConfig, TrainingLoop, checkpoints, save_whole
from gap_diff_diffusers.training.surrogate import (
    AutoencoderTrainer,
    DenoiserTrainer,
    SurrogateTrainingConfig,
    build_denoiser,
    build_tokenizer,
    train_surrogate,
)

ROOT = Path(__file__).parents[1]
ASTRONAUT = ROOT / "gap_diff_diffusers" / "examples" / "astronaut.png"
TINY = {
    "resolution": 64,
    "vae_channels": (8, 8, 8, 8),
    "vae_crop_size": 48,
    "vae_max_train_steps": 2,
    "vae_train_batch_size": 2,
    "unet_channels": (8, 16),
    "text_channels": 16,
    "text_layers": 1,
    "attention_heads": 2,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "lr_warmup_steps": 1,
    "mixed_precision": "no",
    "checkpointing_steps": 2,
    "num_validation_images": 2,
}


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    safetensors.torch.save_file(sana_like(), tmp_path / "encoder.safetensors")
    return str(tmp_path / "encoder.safetensors")


def make_config(photos, output_dir, **changes):
    return SurrogateTrainingConfig(train_data_dir=(str(photos),), output_dir=str(output_dir), **TINY | changes)


class Line(TrainingLoop):
    """Fits y = 3 x with one weight, from noisy draws."""

    def __init__(self, config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.line = torch.nn.Linear(1, 1, bias=False)
        super().__init__(config, {"line": self.line})

    def training_step(self, generator):
        x = torch.randn(self.config.train_batch_size, 1, generator=generator)
        loss = (self.line(x) - 3 * x).square().mean()
        return {"loss": loss.item(), "gradient_norm": self.update("line", loss)}

    def validate(self):
        return {"held_out/weight": self.line.weight.item()}


def line_config(output_dir, **changes):
    settings = {"max_train_steps": 60, "learning_rate": 0.2, "lr_warmup_steps": 1, "mixed_precision": "no"}
    return LoopConfig(output_dir=str(output_dir), **settings | {"checkpointing_steps": 20, "ema_decay": 0.9} | changes)


def log_of(output_dir):
    return [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]


# --- The loop ------------------------------------------------------------------------------------------------------
def test_the_loop_learns_logs_and_keeps_the_last_checkpoints(tmp_path):
    loop = Line(line_config(tmp_path, validation_steps=30))
    figures = loop.train()
    assert figures["held_out/weight"] == pytest.approx(3, abs=0.1)
    assert not loop.line.training
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert [entry["step"] for entry in log if "held_out/weight" in entry] == [30, 60]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-40", "checkpoint-60"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-40", "checkpoint-60", "training_log.jsonl"]


def test_an_interrupted_loop_resumes_as_if_nothing_had_happened(tmp_path):
    Line(line_config(tmp_path / "whole")).train()

    class Interrupted(Line):
        def training_step(self, generator):
            if self.step == 45:
                raise KeyboardInterrupt
            return super().training_step(generator)

    with pytest.raises(KeyboardInterrupt):
        Interrupted(line_config(tmp_path / "parts")).train()
    assert [entry["step"] for entry in log_of(tmp_path / "parts")] == list(range(1, 46))
    Line(line_config(tmp_path / "parts")).train(resume="latest")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_without_averaging_and_clipping_a_step_is_that_of_plain_adam(tmp_path):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "lr_scheduler": "constant"}
    loop = Line(line_config(tmp_path, max_train_steps=3, max_grad_norm=0.0, ema_decay=0.0, **settings))
    weight = loop.line.weight.detach().clone().requires_grad_(True)
    adam = torch.optim.Adam([weight], lr=0.2, betas=(0.8, 0.999))
    for step in range(3):
        loop.step = step
        x = torch.randn(loop.config.train_batch_size, 1, generator=loop.step_generator())
        adam.zero_grad()
        (x @ weight - 3 * x).square().mean().backward()
        adam.step()
    loop.step = 0
    loop.train()
    torch.testing.assert_close(loop.line.weight, weight)


def test_a_step_can_accumulate_gradients(tmp_path):
    class Judged(Line):
        """With a second line, which learns otherwise, and which the first one's loss goes through."""

        def __init__(self, config):
            super().__init__(config)
            TrainingLoop.__init__(self, config, {"line": self.line, "other": torch.nn.Linear(1, 1, bias=False)})
            torch.nn.init.ones_(self.networks["other"].weight)

        def losses(self, generator):
            x = torch.randn(4, 1, generator=generator)
            yield "other", (self.networks["other"](x) - 2 * x).square().mean()
            through = self.networks["other"].weight.clone()  # which may move before this loss is taken back
            yield "line", (self.line(x) @ through - 3 * x).square().mean()

        def training_step(self, generator):
            norms = {name: self.update(name, loss) for name, loss in self.losses(generator)}
            return {"gradient_norm": norms["line"]}

    class Parts(Judged):
        """What accumulating shall come to: the other line moves before the last part of the first one."""

        def training_step(self, generator):
            (_, other), (_, line) = self.losses(generator)
            second = self.losses(generator)
            self.update("other", (other + next(second)[1]) / 2)
            return {"gradient_norm": self.update("line", (line + next(second)[1]) / 2)}

    settings = {"max_train_steps": 5, "learning_rate": 0.01}
    accumulated = Judged(line_config(tmp_path / "accumulated", gradient_accumulation_steps=2, **settings))
    accumulated.train()
    parts = Parts(line_config(tmp_path / "parts", **settings))
    parts.train()
    for name, network in parts.networks.items():
        torch.testing.assert_close(accumulated.networks[name].weight, network.weight, atol=1e-6, rtol=0)
    assert len(log_of(tmp_path / "accumulated")) == 5
    with pytest.raises(ValueError, match="another gradient_accumulation_steps"):
        Judged(line_config(tmp_path / "accumulated", **settings)).train(resume="latest")


def test_a_run_can_end_early_and_go_on(tmp_path):
    Line(line_config(tmp_path / "whole")).train()
    part = Line(line_config(tmp_path / "parts", stop_after_steps=33))
    assert "held_out/weight" in part.train() and not part.line.training
    assert [folder.name for folder in checkpoints(tmp_path / "parts")] == ["checkpoint-20", "checkpoint-33"]
    Line(line_config(tmp_path / "parts")).train(resume="latest")
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"one of the checkpoints checkpoint-40, checkpoint-60 .* got checkpoint-33"):
        Line(line_config(tmp_path / "parts")).train(resume="checkpoint-33")
    Line(line_config(tmp_path / "parts")).train(resume="checkpoint-40")
    assert [entry["loss"] for entry in log_of(tmp_path / "parts")] == losses[1]


def test_only_what_learns_captions_takes_a_column_of_them():
    for config_class, takes in ((GAPDiffTrainingConfig, False), (SurrogateTrainingConfig, True)):
        flags = training_parser(None, config_class).format_help()
        assert ("--caption_column" in flags) is takes


def test_resuming_is_asked_for_as_in_diffusers():
    parser = training_parser(None, LoopConfig)
    for flags, resume in (([], None), ([""], "latest"), (["latest"], "latest"), (["checkpoint-4"], "checkpoint-4")):
        arguments = ["--resume_from_checkpoint", *filter(None, flags)] if flags else []
        assert parser.parse_args(arguments).resume_from_checkpoint == resume


def test_a_fraction_is_a_number_in_flags_and_in_the_config_file(tmp_path):
    file, parser = tmp_path / "config.json", training_parser(None, SurrogateTrainingConfig)
    flags = ["--train_data_dir", "photos", "--output_dir", "out"]
    for written, flag, eps in (("8/255", [], 8 / 255), (0.1, ["12/255"], 12 / 255), ("8/255", ["0.05"], 0.05)):
        file.write_text(json.dumps({"response_eps": written, "face_scale": "3/2"}))
        arguments = parser.parse_args([*flags, *(["--response_eps", *flag] if flag else [])])
        config = config_from_arguments(SurrogateTrainingConfig, arguments, file)
        assert (config.response_eps, config.face_scale) == (eps, 1.5)
    for wrong in ("8/0", "8/255/2", "/"):
        file.write_text(json.dumps({"response_eps": wrong}))
        with pytest.raises(ValueError, match=f"response_eps as a number or a fraction such as 8/255, got '{wrong}'"):
            config_from_arguments(SurrogateTrainingConfig, parser.parse_args(flags), file)
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--response_eps", wrong])


def test_a_tracker_gets_the_settings_and_the_figures(tmp_path, monkeypatch):
    class Noted(tracking.GeneralTracker):
        name, requires_logging_directory = "noted", False
        settings, figures, pictures = {}, {}, {}

        def __init__(self, run_name, **kwargs):
            super().__init__()

        tracker, finished = None, False

        def finish(self):
            self.finished = True

        def store_init_configuration(self, values):
            self.settings.update(values)

        def log(self, values, step, **kwargs):
            self.figures[step] = values

        def log_images(self, values, step, **kwargs):
            assert not self.finished
            self.pictures[step] = values["validation"], kwargs

    class Showing(Line):
        def validate(self):
            self.show(torch.rand(10, 3, 8, 8))
            return super().validate()

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noted", Noted)
    Showing(line_config(tmp_path / "noted", max_train_steps=3, report_to="noted")).train()
    assert Noted.settings["learning_rate"] == 0.2 and Noted.settings["stop_after_steps"] == "null"
    assert sorted(Noted.figures) == [1, 2, 3] and "held_out/weight" in Noted.figures[3]
    (pictures, options) = Noted.pictures[3]
    assert [picture.shape for picture in pictures] == [(16, 64, 3)] and not options
    # As these trackers of accelerate hand it on: a batch with its layout, one picture.
    for name, shape, told in (("tensorboard", (1, 16, 64, 3), {"dataformats": "NHWC"}), ("aim", (16, 64, 3), {})):
        monkeypatch.setattr(Noted, "name", name)
        Showing(line_config(tmp_path / name, max_train_steps=3, report_to="noted")).train()
        assert (Noted.pictures[3][0].shape, Noted.pictures[3][1]) == (shape, told)
    Showing(line_config(tmp_path / "no steps", max_train_steps=0, report_to="noted")).train()
    assert 0 in Noted.pictures


def test_a_tracker_that_is_not_there_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ImportError, match="tracker tensorboard, which is not installed"):
        Line(line_config(tmp_path / "out", report_to="tensorboard"))
    with pytest.raises(ValueError, match="wandbb"):
        Line(line_config(tmp_path / "out", report_to="wandbb"))
    assert not (tmp_path / "out").exists()


def test_what_a_loop_refuses(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        Line(line_config(tmp_path)).train(resume="latest")
    Line(line_config(tmp_path)).train()
    with pytest.raises(ValueError, match="resume that, or choose another"):
        Line(line_config(tmp_path)).train()
    with pytest.raises(ValueError, match="another learning_rate, seed"):
        Line(line_config(tmp_path, learning_rate=1.0, seed=1)).train(resume="latest")
    for name, wrong in (
        ("mixed_precision", "fp8"),
        ("train_batch_size", 0),
        ("train_batch_size", "6"),
        ("learning_rate", "1e-4"),
        ("max_train_steps", -3),
        ("stop_after_steps", 0),
        ("max_grad_norm", -1.0),
        ("adam_beta2", 1.0),
        ("gradient_accumulation_steps", [2]),
    ):
        with pytest.raises(ValueError, match=f"expected {name}"):
            line_config(tmp_path, **{name: wrong})


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path):
    class Diverging(Line):
        def training_step(self, generator):
            if self.step == 25:
                with torch.no_grad():
                    self.line.weight.mul_(float("inf"))
            return super().training_step(generator)

    with pytest.raises(FloatingPointError, match=r"the loss of line is (nan|inf) .* at step 25"):
        Diverging(line_config(tmp_path)).train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-20"]


def test_a_loss_that_is_no_number_in_a_part_of_a_step_stops_the_run_at_its_last_part(tmp_path):
    loop = Line(line_config(tmp_path, gradient_accumulation_steps=2))
    before = loop.line.weight.item()
    loss = loop.line.weight.sum()
    assert loop.update("line", loss + float("nan")) == 0  # whose gradient is a number
    loop.accumulated = 1
    with pytest.raises(FloatingPointError, match=r"the loss of line is nan and its gradient 1\.0 at step 0"):
        loop.update("line", loss)
    assert loop.line.weight.item() == before


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path):
    loop = Line(line_config(tmp_path))
    before = loop.line.weight.item()
    loss = (loop.line.weight - loop.line.weight.detach()).square().sum().sqrt()  # 0, with a gradient of 0 / 0
    with pytest.raises(FloatingPointError, match=r"gradient nan at step 0.*lower learning rate than 0\.2,"):
        loop.update("line", loss)
    assert loop.line.weight.item() == before


def test_what_an_interruption_left_does_not_stop_a_run_from_resuming(tmp_path):
    Line(line_config(tmp_path, max_train_steps=20)).train()
    (tmp_path / "checkpoint-40.part").mkdir()
    with open(tmp_path / "training_log.jsonl", "a") as log:
        log.write('{"step": 2')
    (tmp_path / "checkpoint-20-best").mkdir()  # somebody's copy, which no limit removes
    assert len(checkpoints(tmp_path)) == 1
    Line(line_config(tmp_path, max_train_steps=20)).train(resume="latest")
    assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, 21))


def test_float16_gives_up_where_every_gradient_overflows(tmp_path):
    loop = Line(line_config(tmp_path))
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = loop.line.weight.item()

    def overflow():
        loss = (loop.line.weight - loop.line.weight.detach()).square().sum().sqrt()
        return loop.update("line", loss)

    for _ in range(2):
        overflow()
        loop.scaler.update()  # to a lower scale, as at the end of every step
    with pytest.raises(FloatingPointError, match="mixed precision"):
        overflow()
    assert loop.line.weight.item() == before
    assert loop.schedulers["line"].last_epoch == 0


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    out = tmp_path / "out"
    Line(line_config(out, max_train_steps=20)).train()
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_surrogate_training import Line, line_config\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "loop = Line(line_config(sys.argv[1], max_train_steps=20))\n"
        "loop.step = 40\n"
        "loop.networks['line'] = torch.nn.Linear(1000, 100)\n"
        "try:\n"
        "    loop.save_checkpoint()\n"
        "except OSError as error:\n"
        "    sys.exit(f'error: {error}')\n"
    )
    done = subprocess.run([sys.executable, str(script), str(out)], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*File too large: '.*checkpoint-40'", done.stderr.splitlines()[-1])
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-20"]


def test_a_result_replaces_the_one_before_as_a_whole_or_not_at_all(tmp_path):
    def save(content, name, failing=False):
        with save_whole(tmp_path / "out") as folder:
            (folder / "weights").mkdir()
            (folder / "weights" / name).write_text(content)
            (folder / "record.json").write_text(content)
            if failing:
                raise OSError("the disk is full")

    def there():
        return {
            str(p.relative_to(tmp_path / "out")): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()
        }

    save("old", "a")
    (tmp_path / "out" / "training_log.jsonl").write_text("log")
    before = there()
    with pytest.raises(OSError, match="full"):
        save("new", "b", failing=True)
    assert there() == before == {"weights/a": "old", "record.json": "old", "training_log.jsonl": "log"}
    save("new", "b")
    assert there() == {"weights/b": "new", "record.json": "new", "training_log.jsonl": "log"}
    assert not (tmp_path / "out" / "result.part").exists()


def test_two_processes_share_their_gradients_and_what_is_no_number(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from accelerate.utils import gather_object\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_surrogate_training import Line, line_config\n"
        "loop = Line(line_config(sys.argv[1], max_train_steps=3))\n"
        "loop.train()\n"
        "weights = loop.accelerator.gather(loop.line.weight.detach().flatten()).tolist()\n"
        "class Broken(Line):\n"
        "    def training_step(self, generator):\n"
        "        part = 10 * self.accelerator.process_index + self.accumulated\n"
        "        loss = self.line.weight.sum() + float('nan' if part == 10 else 0)\n"
        "        return {'gradient_norm': self.update('line', loss)}\n"
        "try:\n"
        "    Broken(line_config(sys.argv[2], gradient_accumulation_steps=2)).train()\n"
        "except FloatingPointError as error:\n"
        "    errors = gather_object([str(error)])\n"
        "if loop.accelerator.is_main_process:\n"
        "    print(json.dumps([weights, errors, loop.machine]))\n"
        "loop.accelerator.end_training()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / "out"), str(tmp_path / "broken")]
    done = subprocess.run([*launch, *folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (first, second), errors, machine = json.loads(done.stdout.splitlines()[-1])
    assert first == second and machine == {"num_processes": 2, "device": "cpu"}
    assert len(errors) == 2 and all("the loss of line is nan" in error for error in errors)

    class Both(Line):
        """One process that learns from what each of two draws."""

        def training_step(self, generator):
            other = torch.Generator().manual_seed(generator.initial_seed() + 1)
            size = self.config.train_batch_size
            x = torch.cat([torch.randn(size, 1, generator=source) for source in (generator, other)])
            loss = (self.line(x) - 3 * x).square().mean()
            return {"gradient_norm": self.update("line", loss)}

    alone = Both(line_config(tmp_path / "alone", max_train_steps=3))
    alone.train()
    assert first == pytest.approx(alone.line.weight.item(), abs=1e-6)
    norms = [[entry["gradient_norm"] for entry in log_of(tmp_path / name)] for name in ("out", "alone")]
    assert norms[0] == pytest.approx(norms[1], abs=1e-4) and len(norms[0]) == 3


# --- The face model ------------------------------------------------------------------------------------------------
def test_the_tokenizer_has_one_token_for_each_word_it_was_made_for():
    tokenizer = build_tokenizer(["a photo of a person", "a dslr portrait", "sks"])
    tokens = tokenizer("A photo of sks  person").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == [
        "<|startoftext|>", "a</w>", "photo</w>", "of</w>", "sks</w>", "person</w>", "<|endoftext|>",
    ]  # fmt: skip
    captions = ["a man and a woman", "the human", "a woman, an ox"]  # whose parts overlap
    tokenizer = build_tokenizer(["a photo of a person", "a dslr portrait", "sks"], captions)
    for word in ("man", "woman", "human", "an", "and", "ox", "sks", "person"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    other = "in front of eiffel tower, é!"
    assert tokenizer.unk_token_id not in tokenizer(other).input_ids[1:-1]
    assert tokenizer.decode(tokenizer(other).input_ids, skip_special_tokens=True).replace(" ", "") == other.replace(
        " ", ""
    )


def test_every_part_of_the_autoencoders_loss_is_learned(photos, encoder, tmp_path):
    config = make_config(
        photos, tmp_path, feature_encoders=(encoder,), distillation_weight=1.0, vae_learning_rate=3e-3
    )
    trainer = AutoencoderTrainer(config)
    first = trainer.training_step(torch.Generator().manual_seed(7))
    for _ in range(25):
        last = trainer.training_step(torch.Generator().manual_seed(7))
    assert last["loss"] < 0.8 * first["loss"]
    for name in ("pixels", "distillation/encoder", "features/encoder"):
        assert last[name] < first[name], name


def test_latents_learn_to_answer_perturbations_as_the_encoder_does(photos, encoder, tmp_path):
    config = make_config(photos, tmp_path, feature_encoders=(encoder,), response_weight=1.0, vae_learning_rate=3e-3)
    trainer = AutoencoderTrainer(config)
    images = trainer.crops.sample(2, torch.Generator().manual_seed(0))
    perturbed = trainer._perturb(images, trainer.encoders[0], torch.Generator().manual_seed(0))
    assert 6 < (perturbed - images).abs().max() * 255 <= 8.001
    first = trainer.training_step(torch.Generator().manual_seed(7))
    for _ in range(25):
        last = trainer.training_step(torch.Generator().manual_seed(7))
    assert last["response"] < 0.5 * first["response"]


def test_an_autoencoder_can_start_from_another(photos, tmp_path):
    vae = AutoencoderTrainer(make_config(photos, tmp_path, seed=1)).vae
    vae.save_pretrained(tmp_path / "vae")
    config = make_config(photos, tmp_path / "run", vae_init_from=str(tmp_path / "vae"), vae_max_train_steps=0)
    again = AutoencoderTrainer(config)
    assert again.train()["held_out/psnr"] > 0
    for ours, theirs in zip(again.vae.parameters(), vae.parameters()):
        assert torch.equal(ours, theirs)


def test_both_can_start_from_the_model_that_ships(photos, tmp_path):
    settings = json.loads((ROOT / "training_scripts" / "configs" / "face_model.json").read_text())
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = SurrogateTrainingConfig(
        train_data_dir=(str(photos),),
        output_dir=str(tmp_path / "run"),
        **settings
        | {"vae_init_from": "bundled", "init_from": "bundled", "distillation_weight": 0.0}
        | {"feature_encoders": (), "response_weight": 0.0, "face_scale": None},
    )
    shipped = StableDiffusionPipeline.from_pretrained(BUNDLED_FACE_MODEL, dtype=torch.float32)
    assert initial_weights("bundled") == json.loads((BUNDLED_FACE_MODEL / "training_record.json").read_text())
    _, networks = build_denoiser(config, [])
    for ours, theirs in ((AutoencoderTrainer(config).vae, shipped.vae), (networks["unet"], shipped.unet)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_denoiser_can_start_from_another(photos, tmp_path):
    vae = AutoencoderTrainer(make_config(photos, tmp_path)).vae
    first = DenoiserTrainer(make_config(photos, tmp_path, seed=1), vae)
    first.pipeline.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    again = DenoiserTrainer(make_config(photos, tmp_path / "run", init_from=model), vae)
    for name in ("unet", "text_encoder"):
        for ours, theirs in zip(getattr(again, name).parameters(), getattr(first, name).parameters(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="same shape"):
        DenoiserTrainer(make_config(photos, tmp_path / "wider", init_from=model, unet_channels=(8, 24)), vae)
    with pytest.raises(ValueError, match="which has none"):
        DenoiserTrainer(make_config(photos, tmp_path / "absent", init_from=str(tmp_path / "no_model")), vae)
    for changes, named in (
        ({"rare_tokens": ("skt",)}, "captions"),
        ({"prediction_type": "v_prediction"}, "prediction"),
    ):
        with pytest.raises(ValueError, match=f"the same {named}"):
            DenoiserTrainer(make_config(photos, tmp_path / "other", init_from=model, **changes), vae)


def test_the_denoiser_learns_both_predictions(photos, tmp_path):
    for prediction_type in ("epsilon", "v_prediction"):
        config = make_config(photos, tmp_path, prediction_type=prediction_type, learning_rate=5e-3)
        trainer = DenoiserTrainer(config, AutoencoderTrainer(config).vae)
        losses = [trainer.training_step(torch.Generator().manual_seed(seed % 4))["loss"] for seed in range(40)]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
        assert trainer.pipeline.scheduler.config.prediction_type == prediction_type


def test_the_last_timestep_can_be_noise_alone(photos, tmp_path):
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_gamma": 5.0}
    trainer = DenoiserTrainer(
        make_config(photos, tmp_path, **changes), AutoencoderTrainer(make_config(photos, tmp_path)).vae
    )
    assert trainer.scheduler.alphas_cumprod[-1] < 1e-6
    trainer.pipeline.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, trainer.scheduler.alphas_cumprod, atol=1e-6)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps[0] == 999
    losses = [trainer.training_step(torch.Generator().manual_seed(seed))["loss"] for seed in range(30)]
    assert np.isfinite(losses).all()
    assert trainer.sample(1).isfinite().all()


def keep_few(photos):
    """Looking for faces takes a while."""
    for index in range(6, 12):
        (photos / ("more" if index % 2 else ".") / f"{index}.png").unlink()


def test_a_denoiser_of_faces_leaves_out_photos_without(photos, tmp_path):
    keep_few(photos)
    with pytest.raises(ValueError, match=r"expected photos with a face to train on.*got 0 among 7"):
        DenoiserTrainer(
            make_config(photos, tmp_path, face_scale=2.0), AutoencoderTrainer(make_config(photos, tmp_path)).vae
        )
    with_face = [photos / f"{index}.png" for index in (0, 2, 4)]  # the first of all photos is held out
    for path in with_face:
        Image.open(ASTRONAUT).crop((60, 0, 380, 320)).save(path)
    config = make_config(photos, tmp_path, face_scale=2.0)
    trainer = DenoiserTrainer(config, AutoencoderTrainer(config).vae)
    assert len(trainer.latents) + len(trainer.held_out) == 2 * len(with_face)  # and their mirror images
    assert trainer.left_out == 7 - len(with_face)


def test_what_would_stop_the_denoiser_stops_before_the_autoencoder(photos, tmp_path):
    keep_few(photos)
    for changes, message in (
        ({"face_scale": 2.0}, "expected photos with a face to train on"),
        ({"init_from": str(tmp_path / "no_model")}, "which has none"),
    ):
        with pytest.raises(ValueError, match=message):
            train_surrogate(make_config(photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"expected a checkpoint to resume from in .*run.autoencoder, found none"):
        train_surrogate(make_config(photos, tmp_path / "run"), resume="latest")
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)  # of another run, or of one that lost its first stage
    with pytest.raises(ValueError, match="not the autoencoder that they are of"):
        train_surrogate(make_config(photos, tmp_path / "run"))
    with pytest.raises(ValueError, match="choose a folder outside"):
        make_config(photos, photos / "run")


def test_both_stages_go_on_where_they_were_interrupted(photos, encoder, tmp_path):
    changes = {"feature_encoders": (encoder,), "distillation_weight": 0.1, "checkpointing_steps": 2}
    changes |= {"max_train_steps": 4, "vae_max_train_steps": 4}

    def run(name, resume=None):
        return train_surrogate(make_config(photos, tmp_path / name, **changes), resume=resume)[0]

    whole = run("whole")
    lost = {"first": ("autoencoder/checkpoint-4", "autoencoder/vae", "checkpoint-2", "checkpoint-4")}
    lost["second"] = ("checkpoint-4",)
    lost["named"] = ("autoencoder/checkpoint-4", "autoencoder/vae")  # the second stage's are not what is named
    for name, folders in lost.items():  # what an interruption of this stage would have left
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for folder in folders:
            shutil.rmtree(tmp_path / name / folder)
        resumed = run(name, "checkpoint-2" if name == "named" else "latest")
        assert resumed.step == 4
        for part in ("vae", "unet", "text_encoder"):
            ours, theirs = (getattr(trainer, part).state_dict() for trainer in (resumed, whole))
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_an_interrupted_autoencoder_goes_on_whatever_the_denoiser_is_to_be(photos, tmp_path):
    AutoencoderTrainer(make_config(photos, tmp_path / "run")).train()
    other = {"unet_channels": (16, 16), "prediction_type": "v_prediction", "num_validation_images": 1}
    resumed = AutoencoderTrainer(make_config(photos, tmp_path / "run", max_train_steps=3, **other))
    resumed.train(resume="latest")
    assert resumed.step == 2
    for changes in ({"vae_learning_rate": 1e-3}, {"kl_weight": 1.0}):
        with pytest.raises(ValueError, match="is of a run with another"):
            AutoencoderTrainer(make_config(photos, tmp_path / "run", **changes)).train(resume="latest")


def test_the_script_writes_a_stock_pipeline_and_can_resume(photos, encoder, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "training_scripts" / "train_surrogate.py"), "--config", str(config)]
    command += ["--train_data_dir", str(photos), "--output_dir", str(out), "--feature_encoders", encoder]
    command += ["--push_to_hub", "--hub_model_id", "org/face-model", "--hub_token", "token", "--hub_push_samples"]
    out.mkdir()
    (out / "private.png").write_bytes(b"a photo")
    with FakeHub() as hub:
        done = subprocess.run(command, capture_output=True, text=True, env=hub_environment(hub.url, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "found no face in any of 13 of the 13 photos" in done.stderr
    uploaded = hub.files("org/face-model")
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md"} <= set(uploaded)
    components = {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}
    rest = {name for name in uploaded if name.split("/")[0] not in components}
    assert rest - {".gitattributes"} == {"README.md", "model_index.json", "training_record.json", "samples/2.png"}
    assert not [name for name, content in uploaded.items() if str(tmp_path).encode() in content]
    card = uploaded["README.md"].decode()
    assert (
        'from_pretrained("org/face-model", dtype=torch.float32)' in card
        and "held_out/psnr" in card
        and "samples/2.png" in card
    )
    assert "license: apache-2.0" in card.split("---")[1] and str(tmp_path) not in card
    pipeline = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks person", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    record = json.loads((out / "training_record.json").read_text())
    assert record["photos"]["train"] == 10 and record["photos"]["held_out"] == 2
    assert {"held_out/psnr", "held_out/loss"} <= set(record["figures"])
    first = json.loads((out / "autoencoder" / "vae" / "training_record.json").read_text())["photos"]
    assert first == first | {"train": 10, "held_out": 2, "unreadable": 1, "too_small": 0}
    assert record["config"]["feature_encoders"] == ["encoder.safetensors"]
    assert Image.open(out / "samples" / "2.png").size == (128, 64)
    assert Image.open(out / "autoencoder" / "samples" / "2.png").size == (128, 128)

    without_pushing = command[: command.index("--push_to_hub")]
    again = subprocess.run([*without_pushing, "--resume_from_checkpoint"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "training_record.json").read_text())["figures"] == record["figures"]
    assert str(tmp_path) not in (out / "vae" / "config.json").read_text()

    with pytest.raises(ValueError, match="an output folder without"):
        train_surrogate(make_config(photos, out, feature_encoders=(encoder,)))
    environment = hub_environment(hub.url, tmp_path)  # without a login, and before the folder is looked at
    published = [*command, "--report_to", "wandb"]  # which would publish the token
    refused = subprocess.run(published, capture_output=True, text=True, env=environment)
    assert refused.returncode != 0 and "log in with hf auth login instead" in refused.stderr
    refused = subprocess.run([*without_pushing, "--push_to_hub"], capture_output=True, text=True, env=environment)
    assert refused.returncode != 0 and "no token found" in refused.stderr
    assert "Traceback" not in refused.stderr
    changed = make_config(photos, out, feature_encoders=(encoder,), kl_weight=1.0, ema_decay=0.5)
    with pytest.raises(ValueError, match="another kl_weight, ema_decay"):
        train_surrogate(changed, resume="latest")
    assert str(tmp_path) not in (out / "autoencoder" / "vae" / "training_record.json").read_text()
    Image.open(photos / "2.png").save(photos / "20.png")
    with pytest.raises(ValueError, match="another minimum_side, choice of photos"):
        train_surrogate(make_config(photos, out, feature_encoders=(encoder,), minimum_side=100), resume="latest")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("face_model", BUNDLED_FACE_MODEL / "training_record.json"),
        ("face_model_second", ROOT / "gap_diff_diffusers" / "docs" / "face-model-second" / "training_record.json"),
    ],
)
def test_the_configs_that_ship_make_the_models_that_are_recorded(name, record):
    settings = json.loads((ROOT / "training_scripts" / "configs" / f"{name}.json").read_text())
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    settings = {"train_data_dir": ("photos",), "output_dir": "out", "feature_encoders": ("encoder",)} | settings
    _, network = build_denoiser(SurrogateTrainingConfig(**settings), [])
    count = sum(parameter.numel() for parameter in network["unet"].parameters())
    assert count == json.loads(record.read_text())["parameters"]["unet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, "multiple of 8"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "v_prediction"),
        ({"face_scale": 0.5}, "face_scale"),
        ({"resolution": "64"}, "resolution of type int"),
        ({"vae_max_train_steps": -1}, "vae_max_train_steps of at least 0"),
        ({"response_eps": 8.0}, "8 levels are written 8/255"),
        ({"caption_dropout": 2.0}, "caption_dropout"),
        ({"max_train_samples": -1}, "max_train_samples of at least 1"),
        ({"distillation_weight": 1.0}, "feature_encoders"),
        ({"response_weight": 1.0}, "feature_encoders"),
        ({"captions": "a photo"}, "captions as a list of str"),
        ({"captions": ()}, "expected captions"),
        ({"attention_heads": 3}, "3 attention_heads divide, got 16"),
        ({"vae_channels": (8, 8.5)}, "vae_channels as a list of int"),
    ],
)
def test_settings_that_do_not_work_are_named(photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(photos, tmp_path, **changes)


# --- Where photos and captions come from -----------------------------------------------------------------------------
def test_a_folders_captions_stand_in_its_metadata(photos, tmp_path):
    rows = [{"file_name": "0.png", "text": "a man"}, {"file_name": "more/1.png", "text": "a woman"}]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(photos, tmp_path, caption_column="text")
    found, captions = config.load_photos()
    captions = {path.name: caption for path, caption in zip(found, captions) if caption}
    assert captions == {"0.png": "a man", "1.png": "a woman"}
    trainer = DenoiserTrainer(config, AutoencoderTrainer(config).vae)
    assert len(trainer.tokenizer("a woman", add_special_tokens=False).input_ids) == 2
    assert trainer.captions.count("a woman") == 2  # mirrored, too; and of the unreadable photo there is none
    assert len(trainer.captions) == len(trainer.latents) == 20
    with pytest.raises(ValueError, match=r"'other' beside file_name"):
        make_config(photos, tmp_path, caption_column="other").load_photos()
    assert digest_photos(found, captions.values()) != digest_photos(found, ["a cat"])
    for line in ("{oops", "[1]"):
        (photos / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n\n" + line + "\n")
        with pytest.raises(ValueError, match=r"metadata.jsonl, line 3: expected a JSON object with file_name"):
            config.load_photos()


def test_a_dataset_instead_of_folders(photos, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sources = sorted(path.read_bytes() for path in photos.rglob("[0-9]*.png"))
    rows = {"picture": [*sources, b"no photo"], "text": ["a man"] * 13}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "dataset").mkdir()
    encoded = [{"bytes": source, "path": None} for source in rows["picture"]]
    dataset = datasets.Dataset.from_dict(rows | {"picture": encoded}, features=features)
    dataset.to_parquet(tmp_path / "dataset" / "train.parquet")
    settings = TINY | {"image_column": "picture", "caption_column": "text"}

    def config(**changes):
        return SurrogateTrainingConfig(
            dataset_name=str(tmp_path / "dataset"), output_dir=str(tmp_path), **settings | changes
        )

    found, captions = config().load_photos()
    assert [photo.read() for photo in found] == rows["picture"] and captions == rows["text"]
    trainer = AutoencoderTrainer(config())
    assert len(trainer.crops.squares) == 10 and trainer.crops.unreadable == 1
    assert len(config(max_train_samples=5).load_photos()[0]) == 5
    with pytest.raises(ValueError, match=r"expected a column 'image' in .*, got picture, text"):
        config(image_column="image").load_photos()
    with pytest.raises(ValueError, match="either train_data_dir or dataset_name"):
        config(train_data_dir=(str(photos),))


def test_one_photo_is_too_few(photos, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (photos / "2.png").rename(folder / "2.png")
    with pytest.raises(ValueError, match=r"expected photos that can be read to train on.* got 1 among 1"):
        AutoencoderTrainer(make_config(folder, tmp_path))
    (folder / "1.png").write_bytes(b"no photo")  # the one that would be held out
    with pytest.raises(ValueError, match=r"expected photos that can be read to train on.* got 1 among 2"):
        train_surrogate(make_config(folder, tmp_path))


def test_a_missing_datasets_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"gap_diff_diffusers\[train\]"):
        SurrogateTrainingConfig(dataset_name="x", output_dir=str(tmp_path)).load_photos()
