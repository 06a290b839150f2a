"""Loading, saving and pushing the pipeline, against a Hub inside the test: with the package and without it."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fake_hub import FakeHub, Worker, WorkerError
from PIL import Image

from gap_diff_diffusers import GAPDiffGenerator, GAPDiffProtectionPipeline

REPO = "org/gap-diff"
PIPELINE_MODULE = "pipeline_gap_diff_protection"
GENERATOR_MODULE = "gap_diff_diffusers.models.gap_diff_generator"
STANDARD_LIBRARY = sys.stdlib_module_names


# --- Functions that run in a worker: each stands on its own --------------------------------------------------------
def protect(source: str, photo: str, out: str, arguments: dict) -> list[str]:
    """Load with our class, protect the photo into the file `out`; returns the remote modules that this imported."""
    import sys

    import torch
    from PIL import Image

    from gap_diff_diffusers import GAPDiffGenerator, GAPDiffProtectionPipeline

    before = set(sys.modules)
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if arguments.pop("pass_generator", False):
        arguments["generator"] = GAPDiffGenerator.from_pretrained(source, subfolder="generator")
    pipe = GAPDiffProtectionPipeline.from_pretrained(source, **arguments)
    assert pipe.config._name_or_path == source, pipe.config._name_or_path
    assert pipe.generator.dtype == arguments.get("dtype", torch.float32)
    assert not pipe.generator.training
    pipe(Image.open(photo)).images[0].save(out)
    return [name for name in set(sys.modules) - before if name.startswith("diffusers_modules")]


def protect_by_remote_code(source: str, photo: str, out: str, arguments: dict, save_to: str | None = None) -> list:
    """Load with diffusers alone, protect, save the pipeline; returns the modules of pipeline and generator."""
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    pipe = DiffusionPipeline.from_pretrained(source, **arguments)
    assert not pipe.generator.training
    pipe(Image.open(photo)).images[0].save(out)
    if save_to is not None:
        pipe.save_pretrained(save_to)
    return [type(pipe).__module__, type(pipe.generator).__module__]


def import_package() -> None:
    import gap_diff_diffusers  # noqa: F401


def load_generator_parameters(source: str) -> float:
    from gap_diff_diffusers import GAPDiffGenerator

    return sum(
        p.double().sum().item() for p in GAPDiffGenerator.from_pretrained(source, subfolder="generator").parameters()
    )


def save_and_push(source: str, folder: str, repo_id: str, token: str) -> None:
    from gap_diff_diffusers import GAPDiffProtectionPipeline

    pipe = GAPDiffProtectionPipeline.from_pretrained(source)
    pipe.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, token=token, commit_message="first")


def push(source: str, repo_id: str) -> None:
    from gap_diff_diffusers import GAPDiffProtectionPipeline

    GAPDiffProtectionPipeline.from_pretrained(source).push_to_hub(repo_id)


def publish_training_result(folder: str, repo_id: str) -> None:
    import argparse
    import json
    from pathlib import Path

    from gap_diff_diffusers import hub

    parser = argparse.ArgumentParser()
    hub.add_arguments(parser)
    arguments = parser.parse_args(["--push_to_hub", "--hub_model_id", repo_id, "--hub_token", "token"])
    hub.create_repository(arguments, folder)
    hub.publish(arguments, Path(folder), json.loads(Path(folder, "training_record.json").read_text()))


# --- Fixtures ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def workers(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    workers = [Worker(folder / "with", hub.url), Worker(folder / "without", hub.url, without_package=True)]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def installed(workers) -> Worker:
    return workers[0]


@pytest.fixture(scope="module")
def without_package(workers) -> Worker:
    return workers[1]


@pytest.fixture(scope="module")
def published(hub, workers, make_pipeline, tmp_path_factory) -> Path:
    """The folder that the Hub has as `main` of REPO, whose revision `v1` is another checkpoint."""
    folder = tmp_path_factory.mktemp("published")
    make_pipeline(seed=1).save_pretrained(folder / "v1")
    hub.add_folder(REPO, folder / "v1", revision="v1")
    make_pipeline(seed=0).save_pretrained(folder / "main")
    make_pipeline(seed=0).to(torch.float16).save_pretrained(folder / "main", variant="fp16")
    (folder / "main" / "README.md").write_text("# Ours\n")
    hub.add_folder(REPO, folder / "main")
    return folder / "main"


@pytest.fixture(scope="module")
def photo(make_pixels, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(make_pixels()).save(path)
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "protected.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected(published: Path, photo: Path, **arguments) -> np.ndarray:
    """What the pipeline of a folder makes of the photo, here in this process."""
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, **arguments)
    return np.asarray(pipe(Image.open(photo)).images[0])


# --- From a folder -------------------------------------------------------------------------------------------------
def test_a_saved_folder_loads_and_protects_as_the_pipeline_did(published, photo, make_pipeline):
    before = np.asarray(make_pipeline(seed=0)(photo).images[0])
    assert not np.array_equal(before, pixels(photo))
    for source in (published, str(published), f"{published}/"):
        np.testing.assert_array_equal(expected(source, photo), before)


def test_the_files_of_a_saved_folder(published):
    names = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "generator/config.json",
        "generator/diffusion_pytorch_model.fp16.safetensors",
        "generator/diffusion_pytorch_model.safetensors",
        f"generator/{GENERATOR_MODULE}.py",
        "model_index.json",
        f"{PIPELINE_MODULE}.py",
    }
    index = json.loads((published / "model_index.json").read_text())
    assert isinstance(index.pop("_diffusers_version"), str)
    assert index == {
        "_class_name": [PIPELINE_MODULE, "GAPDiffProtectionPipeline"],
        "generator": [GENERATOR_MODULE, "GAPDiffGenerator"],
        "noise_budget": 8 / 255,
    }


def test_a_folder_says_nothing_about_the_machine_it_was_saved_on(published, tmp_path):
    """diffusers records where a model was loaded from: a home folder, which would then be published."""
    GAPDiffProtectionPipeline.from_pretrained(published).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            for secret in (published.parent, tmp_path, Path.home()):
                assert str(secret).encode() not in path.read_bytes(), path
    assert "_name_or_path" not in json.loads((tmp_path / "again" / "generator" / "config.json").read_text())


def test_saving_twice_writes_the_same_bytes(published, tmp_path):
    GAPDiffProtectionPipeline.from_pretrained(published).save_pretrained(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (published / path.relative_to(tmp_path)).read_bytes(), path


def test_without_remote_code_a_folder_has_no_source_and_loads(make_pipeline, published, photo, tmp_path):
    make_pipeline(seed=0).save_pretrained(tmp_path, include_remote_code=False)
    assert not list(tmp_path.rglob("*.py"))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "GAPDiffProtectionPipeline"
    np.testing.assert_array_equal(expected(tmp_path, photo), expected(published, photo))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, {"generator": torch.bfloat16}], ids=str)
def test_dtype(published, photo, dtype):
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, dtype=dtype)
    wanted = dtype["generator"] if isinstance(dtype, dict) else dtype
    assert {p.dtype for p in pipe.generator.parameters()} == {wanted}
    assert pipe(photo).budget[0] <= 8


def test_device_map(published, photo):
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, device_map="cpu")
    np.testing.assert_array_equal(np.asarray(pipe(photo).images[0]), expected(published, photo))


def test_variant(published, photo, tmp_path):
    """The fp16 files are read, and are what is saved; a variant that is not there is an error."""
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, variant="fp16")
    half = make_state(published, "diffusion_pytorch_model.fp16.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for name, tensor in pipe.generator.state_dict().items():
        torch.testing.assert_close(tensor, half[name].to(tensor.dtype), rtol=0, atol=0)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    np.testing.assert_array_equal(expected(tmp_path, photo, variant="fp16"), np.asarray(pipe(photo).images[0]))
    with pytest.raises((OSError, ValueError), match="bf16"):
        GAPDiffProtectionPipeline.from_pretrained(published, variant="bf16")


def make_state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "generator" / name)


def test_shards(hub, installed, published, make_pipeline, photo, out, tmp_path):
    make_pipeline(seed=0).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list(tmp_path.rglob("*.safetensors"))) > 1
    hub.add_folder("org/shards", tmp_path / "shards")
    installed.run(protect, "org/shards", photo, out, {})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in torch itself
def test_a_compiled_generator_is_saved_as_itself(published, make_generator, tmp_path):
    compiled = torch.compile(make_generator(seed=0))  # nothing is compiled before the first call
    GAPDiffProtectionPipeline(compiled).save_pretrained(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert path.read_bytes() == (published / path.relative_to(tmp_path)).read_bytes(), path


def test_a_generator_can_be_passed(published, photo, make_generator, make_pipeline):
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, generator=make_generator(seed=1))
    assert pipe.config.generator[1] == "GAPDiffGenerator"
    np.testing.assert_array_equal(
        np.asarray(pipe(photo).images[0]), np.asarray(make_pipeline(seed=1)(photo).images[0])
    )


def test_the_budget_can_be_overridden_and_is_saved(published, photo, tmp_path):
    pipe = GAPDiffProtectionPipeline.from_pretrained(published, noise_budget=3 / 255)
    assert pipe(photo).budget == [3]
    pipe.save_pretrained(tmp_path)
    assert GAPDiffProtectionPipeline.from_pretrained(tmp_path)(photo).budget == [3]
    with pytest.raises(ValueError, match="noise budget"):
        GAPDiffProtectionPipeline.from_pretrained(published, noise_budget=8)


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    """diffusers fills in what a file lacks with random numbers: a network that protects nothing."""
    GAPDiffProtectionPipeline.from_pretrained(published).save_pretrained(tmp_path)
    path = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    first = sorted(state)[0]
    lacking = {name: tensor for name, tensor in state.items() if name != first}
    safetensors.torch.save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match=first):
        GAPDiffProtectionPipeline.from_pretrained(tmp_path)
    safetensors.torch.save_file({**state, "network.surplus": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match=r"network\.surplus"):
        GAPDiffProtectionPipeline.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((OSError, ValueError), match=r"safetensors|diffusion_pytorch_model"):
        GAPDiffProtectionPipeline.from_pretrained(tmp_path)


def test_pickled_weights_are_not_loaded(make_pipeline, tmp_path):
    make_pipeline().generator.save_pretrained(tmp_path / "generator", safe_serialization=False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "GAPDiffProtectionPipeline"}')
    assert list(tmp_path.rglob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        GAPDiffProtectionPipeline.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_or_has_no_pipeline(tmp_path):
    for missing in (tmp_path / "missing", Path("missing"), "./missing", "some/where/missing"):
        with pytest.raises(OSError, match=r"'org/name'.*no such folder"):
            GAPDiffProtectionPipeline.from_pretrained(missing)
    with pytest.raises(OSError, match="model_index"):
        GAPDiffProtectionPipeline.from_pretrained(tmp_path)


# --- From the Hub, with the package --------------------------------------------------------------------------------
def test_from_the_hub_no_code_is_requested_or_run(hub, installed, published, photo, out, tmp_path):
    hub.requests.clear()
    assert installed.run(protect, REPO, photo, out, {"cache_dir": str(tmp_path / "cache")}) == []
    np.testing.assert_array_equal(pixels(out), expected(published, photo))
    requested = hub.requested_files(REPO)
    assert {"model_index.json", "generator/config.json", "generator/diffusion_pytorch_model.safetensors"} <= requested
    assert not [name for name in requested if name.endswith(".py")]
    assert "generator/diffusion_pytorch_model.fp16.safetensors" not in requested  # nobody asked for the variant
    assert not list(tmp_path.rglob("*.py"))


def test_from_a_cache_without_the_hub(hub, installed, published, photo, out):
    installed.run(protect, REPO, photo, out, {})
    hub.requests.clear()
    installed.run(protect, REPO, photo, out, {"local_files_only": True})
    assert hub.requests == []
    np.testing.assert_array_equal(pixels(out), expected(published, photo))
    with pytest.raises(WorkerError, match=r"LocalEntryNotFoundError|OSError"):
        installed.run(protect, "org/never-loaded", photo, out, {"local_files_only": True})


def test_revision(installed, published, photo, out):
    installed.run(protect, REPO, photo, out, {"revision": "v1"})
    np.testing.assert_array_equal(pixels(out), expected(published.parent / "v1", photo))
    assert not np.array_equal(pixels(out), expected(published, photo))
    with pytest.raises(WorkerError, match=r"(?s)RevisionNotFoundError.*v9"):
        installed.run(protect, REPO, photo, out, {"revision": "v9"})


def test_variant_and_dtype_from_the_hub(hub, installed, published, photo, out, tmp_path):
    hub.requests.clear()
    arguments = {"variant": "fp16", "cache_dir": str(tmp_path / "cache")}
    installed.run(protect, REPO, photo, out, dict(arguments))
    np.testing.assert_array_equal(pixels(out), expected(published, photo, variant="fp16"))
    requested = hub.requested_files(REPO)
    assert "generator/diffusion_pytorch_model.fp16.safetensors" in requested
    assert "generator/diffusion_pytorch_model.safetensors" not in requested
    for dtype in ("bfloat16", "float16"):
        installed.run(protect, REPO, photo, out, {**arguments, "dtype": dtype})
        np.testing.assert_array_equal(
            pixels(out), expected(published, photo, variant="fp16", dtype=getattr(torch, dtype))
        )


def test_private_repositories(hub, installed, published, photo, out):
    hub.add_folder("org/private", published, token="hf_secret")
    with pytest.raises(WorkerError, match="RepositoryNotFoundError"):
        installed.run(protect, "org/private", photo, out, {})
    hub.requests.clear()
    installed.run(protect, "org/private", photo, out, {"token": "hf_secret"})
    assert {token for _, path, token in hub.requests if "org/private" in path} == {"hf_secret"}
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_a_repository_that_does_not_exist(installed, photo, out):
    with pytest.raises(WorkerError, match=r"(?s)RepositoryNotFoundError.*org/nothing"):
        installed.run(protect, "org/nothing", photo, out, {})


def test_other_arguments_from_the_hub(installed, published, photo, out):
    installed.run(protect, REPO, photo, out, {"noise_budget": 3 / 255})
    np.testing.assert_array_equal(pixels(out), expected(published, photo, noise_budget=3 / 255))
    assert installed.run(protect, REPO, photo, out, {"pass_generator": True}) == []
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_the_generator_alone(installed, published):
    here = sum(p.double().sum().item() for p in GAPDiffGenerator.from_pretrained(published / "generator").parameters())
    assert installed.run(load_generator_parameters, REPO) == here
    assert installed.run(load_generator_parameters, published) == here


# --- Without the package -------------------------------------------------------------------------------------------
def test_without_the_package_by_remote_code(hub, without_package, published, photo, out):
    with pytest.raises(WorkerError, match="ModuleNotFoundError"):
        without_package.run(import_package)
    hub.requests.clear()
    modules = without_package.run(protect_by_remote_code, REPO, photo, out, {"trust_remote_code": True})
    assert all(name.startswith("diffusers_modules.") for name in modules)
    np.testing.assert_array_equal(pixels(out), expected(published, photo))
    assert {f"{PIPELINE_MODULE}.py", f"generator/{GENERATOR_MODULE}.py"} <= hub.requested_files(REPO)
    without_package.run(protect_by_remote_code, published, photo, out, {"trust_remote_code": True})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_without_the_package_nothing_asks_for_it(without_package, published, photo, out):
    """diffusers warns about imports that it cannot follow, and tells people to install them."""
    without_package.run(protect_by_remote_code, published, photo, out, {"trust_remote_code": True})
    assert "gap_diff_diffusers" not in "".join(
        line for line in without_package.log.splitlines() if "pip install" in line or "require" in line
    )


@pytest.mark.parametrize("name", ["without_package", "installed"])
def test_remote_code_needs_trust(request, name, published, photo, out):
    worker = request.getfixturevalue(name)
    for source in (REPO, published):
        with pytest.raises(WorkerError, match="trust_remote_code=True"):
            worker.run(protect_by_remote_code, source, photo, out, {})
    assert not out.exists()


def test_remote_code_with_revision_variant_and_dtype(without_package, published, photo, out):
    trust = {"trust_remote_code": True}
    without_package.run(protect_by_remote_code, REPO, photo, out, {**trust, "revision": "v1"})
    np.testing.assert_array_equal(pixels(out), expected(published.parent / "v1", photo))
    without_package.run(protect_by_remote_code, REPO, photo, out, {**trust, "variant": "fp16", "dtype": "bfloat16"})
    np.testing.assert_array_equal(pixels(out), expected(published, photo, variant="fp16", dtype=torch.bfloat16))


def test_a_pipeline_from_remote_code_can_be_saved_again(without_package, published, photo, out, tmp_path):
    again, third = tmp_path / "again", tmp_path / "third"
    trust = {"trust_remote_code": True}
    without_package.run(protect_by_remote_code, REPO, photo, out, trust, again)
    for path in published.rglob("*"):
        relative = path.relative_to(published)
        if path.is_file() and relative.name not in ("README.md", "diffusion_pytorch_model.fp16.safetensors"):
            assert (again / relative).read_bytes() == path.read_bytes(), relative
    np.testing.assert_array_equal(expected(again, photo), expected(published, photo))
    without_package.run(protect_by_remote_code, again, photo, out, trust, third)
    np.testing.assert_array_equal(pixels(out), expected(published, photo))
    np.testing.assert_array_equal(expected(third, photo), expected(published, photo))


def test_remote_code_where_the_package_is_installed_too(installed, published, photo, out):
    installed.run(protect_by_remote_code, REPO, photo, out, {"trust_remote_code": True})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_the_remote_code_is_self_contained(published):
    """One file each, with absolute imports of what diffusers itself brings along."""
    allowed = {"diffusers", "huggingface_hub", "numpy", "PIL", "torch", "pillow_heif"}
    for path in published.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, ast.unparse(node)
                assert node.module.split(".")[0] in allowed | STANDARD_LIBRARY, ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed | STANDARD_LIBRARY


# --- To the Hub ----------------------------------------------------------------------------------------------------
def test_saving_to_the_hub(hub, installed, without_package, published, photo, out, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My own card\n")
    hub.requests.clear()
    installed.run(save_and_push, published, tmp_path / "mine", "org/pushed", "hf_mine")
    assert {token for method, _, token in hub.requests if method == "POST"} == {"hf_mine"}
    assert (tmp_path / "mine" / "README.md").read_text() == "# My own card\n"
    assert hub.files("org/pushed") == {
        str(path.relative_to(tmp_path / "mine")): path.read_bytes()
        for path in (tmp_path / "mine").rglob("*")
        if path.is_file()
    }
    installed.run(protect, "org/pushed", photo, out, {})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))
    without_package.run(protect_by_remote_code, "org/pushed", photo, out, {"trust_remote_code": True})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_push_to_hub(hub, installed, published, photo, out):
    installed.run(push, published, "org/pushed-too")
    installed.run(protect, "org/pushed-too", photo, out, {})
    np.testing.assert_array_equal(pixels(out), expected(published, photo))


def test_what_a_training_pushes_runs_without_the_package(
    hub, installed, without_package, make_pipeline, photo, out, tmp_path
):
    folder = tmp_path / "trained"
    make_pipeline(seed=2).save_pretrained(folder)
    record = {"config": {"data_description": ""}, "photos": {}, "figures": {}}
    (folder / "training_record.json").write_text(json.dumps(record))
    (folder / "private.py").write_text("")
    installed.run(publish_training_result, folder, "org/trained")
    files = set(hub.files("org/trained"))
    assert f"{PIPELINE_MODULE}.py" in files and "training_record.json" in files and "private.py" not in files
    without_package.run(protect_by_remote_code, "org/trained", photo, out, {"trust_remote_code": True})
    np.testing.assert_array_equal(pixels(out), expected(folder, photo))
