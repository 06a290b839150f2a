"""Upstream's weights as our folder: the numbers, and what is refused.

`ReferenceUNet` is the network of the paper's table, written for these tests with torch's own layers, so that they
need no code of upstream's. `gap-diff convert --verify CHECKOUT` compares with upstream's.
"""

import argparse
import json
import os
import pickle

import pytest
import torch
from torch import nn

from gap_diff_diffusers import GAPDiffProtectionPipeline
from gap_diff_diffusers.convert import add_arguments, convert, run

WIDTH = 4


class ReferenceBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)]
        other_half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(), *other_half)

    def forward(self, x):
        return x + self.conv_block(x)


class ReferenceUNet(nn.Module):
    """Eight levels; norms in train mode; skips taken after the activation; no dropout."""

    down_norms = (None, "norm2", "norm4", "norm8", "norm8", "norm8", "norm8", None)
    up_norms = ("norm8", "norm8", "norm8", "norm8", "norm4", "norm2", "norm", None)

    def __init__(self, width):
        super().__init__()
        for level, (i, o) in enumerate([(0, 1), (1, 2), (2, 4), (4, 8), (8, 8), (8, 8), (8, 8), (8, 8)], start=1):
            setattr(self, f"conv{level}", nn.Conv2d(i * width or 3, o * width, 4, 2, 1))
        for level, (i, o) in enumerate([(8, 8), (16, 8), (16, 8), (16, 8), (16, 4), (8, 2), (4, 1), (2, 0)], start=1):
            setattr(self, f"dconv{level}", nn.ConvTranspose2d(i * width, o * width or 3, 4, 2, 1))
        self.bottle_neck = nn.Sequential(*(ReferenceBlock(8 * width) for _ in range(4)))
        self.norm, self.norm2, self.norm4, self.norm8 = (nn.BatchNorm2d(m * width) for m in (1, 2, 4, 8))

    def forward(self, x):
        skips = []
        for level, norm in enumerate(self.down_norms, start=1):
            x = getattr(self, f"conv{level}")(x)
            if norm:
                x = getattr(self, norm)(x)
            if level < 8:
                x = nn.functional.leaky_relu(x, 0.2)
                skips.append(x)
        x = self.bottle_neck(x)
        for level, norm in enumerate(self.up_norms, start=1):
            x = getattr(self, f"dconv{level}")(nn.functional.selu(x))
            if norm:
                x = torch.cat([getattr(self, norm)(x), skips.pop()], dim=1)
        return torch.tanh(x)


@pytest.fixture
def reference():
    """A network with norms and biases unlike their initial values, so that mixing two of them up shows."""
    torch.manual_seed(0)
    network = ReferenceUNet(WIDTH).train()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
                layer.running_mean.uniform_(-9, 9)
    return network


@pytest.fixture
def upstream_weights(reference):
    return {f"generator.{name}": tensor for name, tensor in reference.state_dict().items()}


@pytest.fixture
def weights_path(upstream_weights, tmp_path):
    path = tmp_path / "G_per16.0.pth"
    torch.save(upstream_weights, path)
    return path


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_reproduces_the_network_at_any_size_that_it_takes(reference, weights_path, tmp_path):
    assert command(weights_path, tmp_path / "out") == 0
    pipe = GAPDiffProtectionPipeline.from_pretrained(tmp_path / "out")
    random = torch.Generator().manual_seed(1)
    for height, width in ((512, 512), (512, 768)):
        images = torch.rand(1, 3, height, width, generator=random)
        with torch.no_grad():
            expected, got = reference(images * 2 - 1), pipe.generator(images)
        assert expected.std() > 0.01  # otherwise agreeing would be no feat
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_no_image_depends_on_its_batch_mates(weights_path, tmp_path):
    convert(weights_path, tmp_path / "out")
    generator = GAPDiffProtectionPipeline.from_pretrained(tmp_path / "out").generator
    images = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(2))
    images[1] *= 0.2
    with torch.no_grad():
        torch.testing.assert_close(
            generator(images), torch.cat([generator(images[:1]), generator(images[1:])]), atol=1e-5, rtol=0
        )


def test_the_folder_carries_its_record_and_upstreams_budget(weights_path, tmp_path, capsys):
    command(weights_path, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["file"] == "G_per16.0.pth" and len(record["source"]["sha256"]) == 64
    assert record["channels"] == WIDTH and record["provenance"]
    norms = 4 + 4 * 2
    assert record["tensors_ignored"] == {
        "num_batches_tracked": norms,
        "running_mean": norms,
        "running_var": norms,
    }
    assert "12 running_mean" in capsys.readouterr().out
    assert GAPDiffProtectionPipeline.from_pretrained(tmp_path / "out").config.noise_budget == 8 / 255
    assert sorted(path.name for path in tmp_path.iterdir()) == ["G_per16.0.pth", "out"]


def test_tensors_of_upstreams_preprocessing_layer_are_counted_and_left_out(upstream_weights, tmp_path):
    torch.save(upstream_weights | {"prelayer.functions.0.kernel": torch.ones(7)}, tmp_path / "G.pth")
    assert convert(tmp_path / "G.pth", tmp_path / "out")["tensors_ignored"]["of the preprocessing layer"] == 1


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_with_objects_is_refused_and_not_run(upstream_weights, tmp_path):
    torch.save(upstream_weights | {"bomb": Bomb(tmp_path / "ran")}, tmp_path / "G.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match=r"tensors alone, got one with other objects \(.*mkdir\)"):
        convert(tmp_path / "G.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="tensors alone"):
        convert(tmp_path / "plain.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(range(256)) * 8, b"PK\x03\x04" + bytes(99)])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "G.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"G\.pth: expected a PyTorch file"):
        convert(tmp_path / "G.pth", tmp_path / "out")


def test_half_a_checkpoint_is_refused(weights_path, tmp_path):
    weights_path.write_bytes(weights_path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="a part of one"):
        convert(weights_path, tmp_path / "out")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "G.pth", tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("generator.dconv3.bias"), r"1 missing \(generator\.dconv3\.bias\)"),
        (lambda weights: weights.update({"generator.extra": torch.ones(1)}), r"1 unknown \(generator\.extra\)"),
        (
            lambda weights: weights.update({"generator.conv1.running_mean": torch.ones(1)}),
            r"1 unknown \(generator\.conv1\.running_mean\)",
        ),
        (
            lambda weights: weights.update({"generator.norm8.weight": torch.ones(7)}),
            r"generator\.norm8\.weight of shape \[7\] where \[32\] belongs",
        ),
        (
            lambda weights: weights.pop("generator.conv1.weight"),
            r"expected upstream's generator, with generator\.conv1",
        ),
        (lambda weights: weights.update(epoch=3), "names and tensors"),
    ],
)
def test_other_tensors_than_upstreams_are_refused_by_name(change, message, upstream_weights, tmp_path):
    change(upstream_weights)
    torch.save(upstream_weights, tmp_path / "G.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "G.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_stays_as_it_is_unless_it_is_an_earlier_conversion(weights_path, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "mine.jpg").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            convert(weights_path, photos, overwrite=overwrite)
    assert (photos / "mine.jpg").read_bytes() == b"precious"
    with pytest.raises(FileExistsError, match="got a file"):
        convert(weights_path, photos / "mine.jpg")

    convert(weights_path, out)
    (out / "old").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(weights_path, out)
    assert (out / "old").exists()
    weights_path.write_bytes(weights_path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="a part of one"):
        convert(weights_path, out, overwrite=True)
    assert (out / "old").exists()


def test_overwriting_replaces_the_whole_folder(weights_path, tmp_path):
    out = tmp_path / "out"
    convert(weights_path, out)
    (out / "old").touch()
    convert(weights_path, out, overwrite=True)
    assert not (out / "old").exists() and (out / "model_index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["G_per16.0.pth", "out"]


def test_overwriting_does_not_delete_the_weights_that_it_reads(weights_path, tmp_path):
    out = tmp_path / "out"
    convert(weights_path, out)
    inside = weights_path.rename(out / weights_path.name)
    with pytest.raises(FileExistsError, match="move them"):
        convert(inside, out, overwrite=True)
    assert inside.exists()


UPSTREAM_CODE = """
import sys
sys.path.insert(0, {tests!r})
from torch import nn
from test_convert import ReferenceUNet
class Generator(ReferenceUNet):
    def __init__(self, input_channels, output_channels, ngf):
        super().__init__(ngf)
        self.dropout = nn.Dropout(0.5)
    def forward(self, x):
        return {gain} * self.dropout(super().forward(x))
"""


@pytest.mark.parametrize("gain, agrees", [(1.0, True), (0.9, False)])
def test_verify_runs_the_network_of_a_checkout_and_fails_where_it_differs(gain, agrees, weights_path, tmp_path):
    (tmp_path / "up" / "models").mkdir(parents=True)
    code = UPSTREAM_CODE.format(tests=os.path.dirname(__file__), gain=gain)
    (tmp_path / "up" / "models" / "Generator.py").write_text(code)
    if agrees:
        assert command(weights_path, tmp_path / "out", "--verify", tmp_path / "up") == 0
        record = json.loads((tmp_path / "out" / "conversion.json").read_text())
        assert record["largest_difference"] <= 1e-4
    else:
        with pytest.raises(ValueError, match="nothing was written"):
            command(weights_path, tmp_path / "out", "--verify", tmp_path / "up")
        assert not (tmp_path / "out").exists()
