"""`gap-diff benchmark run`: protect, publish, purify, attack, draw, measure; one JSON file for each cell.

A cell is a protection with its budget, what happens to photos after it, an attacker, a prompt, a person and a seed.
Its file is named after its settings, so only cells that are missing are run, an interrupted run goes on where it was,
and several machines can share a folder (`--shard`), or several GPUs (`accelerate launch`).

For every person a folder with `set_B`, the photos that are published and that the attacker learns, and `set_C`, clean
ones to compare with (the protocol of Anti-DreamBooth and GAP-Diff); for ASPL also `set_A`, the protector's own.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .attack import load_victim, make_attacker, memory_errors
from .attackers import ATTACKERS
from .benchmark_report import CELL_FORMAT, read_cell
from .config import check_at_least_one, check_types, config_from_arguments, finite, portable_name
from .metrics import METRICS, OFFLINE

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "benchmarks"
PROTECTIONS = ("none", "aspl", "gap-diff")
CONDITION = {"protection": "none", "levels": 8, "publishing": None, "purification": None}
"""What a condition is unless it says otherwise; `levels` mean nothing without a protection."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure: every condition with every attacker, prompt, person and seed.

    Attributes:
        model: folder or Hub id of the model to personalize, or "bundled".
        conditions: what is done to photos before the attack, as objects with `protection` (none, gap-diff, aspl),
            `levels` of its budget, and `publishing` and `purification`, each null or a transform as `build_transform`
            takes it. Where a value is a list, each of its entries is a condition.
        attackers: objects with `method`, `preset` and `set`, an object of further settings.
        checkpoint: of gap-diff; null for the one that ships.
        aspl: how aspl expects its attacker to learn: an object with `preset` and `set`, of the method dreambooth.
        prompts: what to draw, with {} for what the attacker calls the person, such as "sks person".
        seeds: of the attacker and of what it draws.
        count: pictures for each prompt.
        num_inference_steps, guidance_scale: of drawing them; null for those of the attacker's class pictures.
        metrics: names of `METRICS`.
        lpips: whether to measure LPIPS of protected photos, too, which needs torchvision; cells that are there already
            stay without it.
        resolution: side in pixels of the photos, as squares, that are published.
        people: how many of them, the first by name, unless the command line names some; null for all.
        gradient_checkpointing: less memory for more time while something learns. Figures stay the same but for
            rounding, so cells that are there already stay valid.
    """

    model: str
    conditions: tuple[dict, ...]
    attackers: tuple[dict, ...]
    checkpoint: str | None = None
    aspl: dict = field(default_factory=dict)
    prompts: tuple[str, ...] = ("a photo of {}",)
    seeds: tuple[int, ...] = (0,)
    count: int = 32
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    metrics: tuple[str, ...] = OFFLINE
    lpips: bool = False
    resolution: int = 512
    people: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self):
        check_types(self)
        check_at_least_one(self, "count", "resolution", *(["people"] if self.people is not None else []))
        for name, kind in (("conditions", dict), ("attackers", dict), ("prompts", str), ("seeds", int)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(isinstance(value, kind) for value in values):
                raise ValueError(f"expected {name} as a list of at least one {kind.__name__}, got {values!r}")
        for condition in self.conditions:
            if [] in condition.values():
                raise ValueError(f"expected conditions without empty lists, got {condition}")
            if unknown := sorted(set(condition) - set(CONDITION)):
                raise ValueError(
                    f"expected conditions with {', '.join(CONDITION)}, got {', '.join(unknown)} in {condition}"
                )
        of_cells: dict[str, Any] = {}
        for condition in expand(self.conditions):
            levels = condition["levels"]
            for spec in (condition["publishing"], condition["purification"]):
                if (other := of_cells.setdefault(json.dumps(_portable(spec)), spec)) != spec:
                    raise ValueError(
                        "expected transforms with models of different names, for a cell has the name alone, got "
                        f"{other} and {spec}; rename a folder"
                    )
            if condition["protection"] not in PROTECTIONS:
                raise ValueError(f"expected protections {', '.join(PROTECTIONS)}, got {condition['protection']!r}")
            if condition["protection"] != "none" and (type(levels) is not int or not 1 <= levels <= 255):
                raise ValueError(f"expected levels as a whole number from 1 to 255, got {levels!r}")
        if not isinstance(self.aspl, dict) or set(self.aspl) - {"preset", "set"}:
            raise ValueError(f"expected aspl as an object with preset and set, got {self.aspl!r}")
        for attacker in self.attackers:
            wrong = not isinstance(attacker.get("method"), str) or not isinstance(attacker.get("set", {}), dict)
            if wrong or set(attacker) - {"method", "preset", "set"}:
                raise ValueError(f"expected attackers with method, preset and set, got {attacker}")
        for prompt in self.prompts:
            if "{" in prompt.replace("{}", "") or "}" in prompt.replace("{}", ""):
                raise ValueError(f"expected no braces in prompts but {{}}, got {prompt!r}")
        if not self.metrics or not isinstance(self.metrics, tuple):
            raise ValueError(f"expected metrics as a list of at least one name, got {self.metrics!r}")
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"expected metrics {', '.join(sorted(METRICS))}, got {name!r}")
        if self.lpips and self.resolution < 64:
            raise ValueError(f"expected a resolution of at least 64 to measure LPIPS at, got {self.resolution}")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the figures depend on besides the config: hashes, that go into each cell.

    Attributes:
        model: of the weights to personalize.
        checkpoint: of the weights of gap-diff; None if it is not used.
        photos: of every person's set_B and set_C, by name.
        own_photos: of every person's set_A; empty if nobody protects with those.
        transforms: of the weights of transforms that compute with models, by their settings as JSON.
    """

    model: str
    checkpoint: str | None
    photos: dict[str, str]
    own_photos: dict[str, str] = field(default_factory=dict)
    transforms: dict[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
    parser.add_argument("config", metavar="CONFIG", help=f"what to measure: a JSON file, or one that ships: {shipped}")
    parser.add_argument("--people", required=True, metavar="FOLDER", help="a folder a person, with set_B and set_C")
    parser.add_argument("--output", required=True, metavar="RESULTS", help="folder of the cells; missing ones are run")
    parser.add_argument("--model", metavar="FOLDER|ID", help="another model than the config's")
    parser.add_argument("--checkpoint", metavar="FOLDER|ID", help="another checkpoint of gap-diff than the config's")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="people to measure (default: all)")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="the I-th of N parts of the cells, from 1/N to N/N (default: all); the processes of accelerate launch -m "
        "gap_diff_diffusers benchmark run ... share such a part among themselves, each on a GPU of its own",
    )
    parser.add_argument("--pictures", metavar="FOLDER", help="save what was drawn, a picture a cell; not for show")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda if there is one, else cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing; a cell that fails is named, and does not stop the others.

    Returns:
        1 if one failed; yet 0 of one of several processes that were launched together, for the launcher stops all when
        one of them fails.
    """
    config = load_config(arguments)
    found = find_people(arguments.people, arguments.only, needs_own=_has(config, "aspl"))
    people = {person.name: person for person in (found if arguments.only else found[: config.people])}
    results = Path(arguments.output)
    check_results(results)
    index, count = read_shard(arguments.shard)
    launched = count > int((arguments.shard or "1/1").partition("/")[2])
    runner = _Runner(config, people, results, arguments)
    groups = all_groups(config, runner.inputs)[index::count]
    if arguments.pictures:
        _warn_of_lacking_pictures(groups, results, Path(arguments.pictures))
    groups = missing(groups, results)
    results.mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm

    done = failed = 0
    for cells in tqdm(groups, desc="attacks", disable=not sys.stderr.isatty()):
        if not missing([cells], results):  # another process was faster
            continue
        try:
            with memory_errors():
                runner.run(cells)
            done += 1
        except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
            broken = "CUDA error" in str(error)  # after which nothing else works in this process
            if broken and not launched:
                raise
            failed += 1
            logger.error("%s, %s: %s", cells[0]["person"], cells[0]["method"], error)
            if broken:
                logger.error("process %d of %d stops; run the command again for what is missing", index + 1, count)
                break
    written = sum(1 for _ in results.glob("*.json"))
    text = f"{done} attacks run, {failed} failed, {written} cells in {results}"
    sys.stdout.write(f"{text}; gap-diff benchmark report {results}\n")
    return 1 if failed and not launched else 0


def load_config(arguments: argparse.Namespace) -> BenchmarkConfig:
    """The config of a file, or of one that ships, with the model and checkpoint that the command line names."""
    path = Path(arguments.config)
    if not path.is_file() and not path.suffix:
        path = CONFIGS / f"{path.name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        raise ValueError(f"expected a JSON file or one of {shipped}, got {arguments.config}")
    named = {name: getattr(arguments, name) for name in ("model", "checkpoint") if getattr(arguments, name)}
    return config_from_arguments(BenchmarkConfig, argparse.Namespace(**named), path)


def expand(conditions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every condition with all its settings, one for each entry where they are lists."""
    expanded = []
    for condition in conditions:
        settings = {key: value if isinstance(value, list) else [value] for key, value in condition.items()}
        settings = {key: settings.get(key, [default]) for key, default in CONDITION.items()}
        for values in itertools.product(*settings.values()):
            single = dict(zip(settings, values))
            if single["protection"] == "none":
                single["levels"] = 0
            expanded.append(single)
    return expanded


def all_cells(config: BenchmarkConfig, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """The settings of every cell; those that share an attack, differing in the prompt alone, come together."""
    for condition in expand(config.conditions):
        steps_after = {name: _portable(condition[name]) for name in ("publishing", "purification")}
        used = [inputs.transforms.get(json.dumps(spec)) for spec in steps_after.values()]
        weights = {"transform_weights": used} if any(used) else {}
        protection = {}
        if condition["protection"] == "gap-diff":
            protection = {"name": portable_name(config.checkpoint) or "bundled", "weights": inputs.checkpoint}
        elif condition["protection"] == "aspl":
            protection = {"attack": asdict(_attack("dreambooth", config.aspl)), **_aspl_settings()}
        for attacker in config.attackers:
            attack = _attack(attacker["method"], attacker)
            steps, guidance = config.num_inference_steps, config.guidance_scale
            script = ATTACKERS.load(attacker["method"]).script_digest(attack)
            settings = asdict(attack) | ({"diffusers_examples": script} if script else {})
            for person, seed, prompt in itertools.product(inputs.photos, config.seeds, config.prompts):
                yield {
                    **condition,
                    **steps_after,
                    **weights,
                    "protection_settings": protection,
                    "own_photos": inputs.own_photos.get(person) if condition["protection"] == "aspl" else None,
                    "model": portable_name(config.model),
                    "model_weights": inputs.model,
                    "method": attacker["method"],
                    "preset": attacker.get("preset", "weak"),
                    "attack": settings | {"seed": seed},
                    "person": person,
                    "photos": inputs.photos[person],
                    "seed": seed,
                    "prompt": prompt.replace("{}", attack.subject),
                    "count": config.count,
                    "num_inference_steps": attack.num_inference_steps if steps is None else steps,
                    "guidance_scale": attack.guidance_scale if guidance is None else guidance,
                    "metrics": sorted(set(config.metrics)),
                    "resolution": config.resolution,
                }


def cell_path(results: Path, cell: Mapping[str, Any]) -> Path:
    """Where a cell's figures are, or will be."""
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]
    return results / f"{cell['person']}-{digest}.json"


def all_groups(config: BenchmarkConfig, inputs: Inputs) -> list[list[dict[str, Any]]]:
    """All cells, each once, those of one attack together."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in all_cells(config, inputs):
        attack = {key: value for key, value in cell.items() if key != "prompt"}
        groups.setdefault(json.dumps(attack, sort_keys=True), {})[cell["prompt"]] = cell
    return [list(cells.values()) for cells in groups.values()]


def missing(groups: list[list[dict[str, Any]]], results: Path) -> list[list[dict[str, Any]]]:
    """The cells without a file."""
    groups = [[cell for cell in cells if not cell_path(results, cell).is_file()] for cells in groups]
    return [cells for cells in groups if cells]


def _warn_of_lacking_pictures(groups: list[list[dict[str, Any]]], results: Path, pictures: Path) -> None:
    done = [path for cells in groups for cell in cells if (path := cell_path(results, cell)).is_file()]
    if lacking := [path for path in done if not (pictures / f"{path.stem}.png").is_file()]:
        logger.warning(
            "%d cells that are there have no picture in %s, such as %s; delete them to have them run again",
            len(lacking),
            pictures,
            lacking[0],
        )


def read_shard(shard: str | None) -> tuple[int, int]:
    """Which of how many parts of the cells, from 0: of the part that `--shard I/N` names, or of all, that of this
    process of those that `accelerate launch` started.

    It also gives each process a GPU of its own, so it comes before any model is loaded. The processes do not speak to
    each other, so none waits for another's, and a slow one is given up by nobody.
    """
    import torch
    from accelerate.utils import get_cpu_distributed_information

    index, _, count = (shard or "1/1").partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"expected --shard I/N from 1/N to N/N, got {shard}")
    if shard and "LOCAL_RANK" not in os.environ:  # mpirun and the like may have been told each its own part
        return int(index) - 1, int(count)
    launched = get_cpu_distributed_information()  # what the launcher says, of GPUs as well
    if launched.world_size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(launched.local_rank % torch.cuda.device_count())
    return (int(index) - 1) * launched.world_size + launched.rank, int(count) * launched.world_size


def check_results(results: Path) -> None:
    """ValueError if the folder is none, or holds results of another version of the package: these do not compare."""
    from . import __version__

    if results.exists() and not results.is_dir():
        raise ValueError(f"expected a folder as --output, got {results}")
    for path in sorted(results.glob("*.json")):
        version = read_cell(path)["versions"]["gap_diff_diffusers"]
        if version != __version__:
            raise ValueError(
                f"{path}: expected results of version {__version__}, got {version}; give a new folder as --output"
            )


def find_people(folder: str, only: list[str] | None = None, *, needs_own: bool = False) -> list[Path]:
    """The folders of the people to measure.

    Raises:
        ValueError: there is none, one of `only` is missing, or one lacks a set that is needed.
    """
    parts = ["set_B", "set_C"] + ["set_A"] * needs_own
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/set_*"))}
    missing = sorted(set(only or ()) - set(found))
    if not found or missing:
        raise ValueError(
            f"{folder}: expected a folder a person with set_B and set_C in it, found none"
            + (f" for {', '.join(missing)}" if missing else "")
        )
    people = [path for name, path in found.items() if only is None or name in only]
    for person in people:
        for part in parts:
            if not (person / part).is_dir():
                raise ValueError(f"{person}: expected a folder {part}, found none")
    return people


def _portable(spec: Any) -> Any:
    """A transform's settings without this machine's paths to models."""
    if isinstance(spec, list):
        return [_portable(step) for step in spec]
    if isinstance(spec, dict):
        changes = {"model": portable_name(spec["model"])} if isinstance(spec.get("model"), str) else {}
        return {**spec, **changes} | ({"choices": _portable(spec["choices"])} if "choices" in spec else {})
    return spec


def _has(config: BenchmarkConfig, protection: str) -> bool:
    return any(condition["protection"] == protection for condition in expand(config.conditions))


def hash_weights(*parts) -> str:
    """Of the configs and weights of networks and schedulers; the same wherever they were loaded from."""
    digest = hashlib.sha256()
    for part in parts:
        config = getattr(part, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(part.state_dict().items() if hasattr(part, "state_dict") else ()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_photos(folders: Sequence[Path]) -> str:
    """Of the files of photos, by name."""
    from .data import list_photos

    digest = hashlib.sha256()
    for path in list_photos(folders):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _attack(method: str, settings: Mapping[str, Any]):
    """The attacker's config."""
    changes = [f"{name}={json.dumps(value)}" for name, value in settings.get("set", {}).items()]
    return make_attacker(method, settings.get("preset", "weak"), changes).config


def _aspl_settings() -> dict[str, Any]:
    """Those that are not the cell's own."""
    from .protections.anti_dreambooth import ASPLConfig

    return {key: value for key, value in asdict(ASPLConfig()).items() if key not in ("eps", "seed")}


def make_cells_attacker(config: BenchmarkConfig, cell: Mapping[str, Any]):
    """The attacker of a cell, which says what a script is; where that is says the config."""
    attacker_class, settings = ATTACKERS.load(cell["method"]), dict(cell["attack"])
    if digest := settings.get("diffusers_examples"):
        known = [_attack(cell["method"], given) for given in config.attackers if given["method"] == cell["method"]]
        places = [attack.diffusers_examples for attack in known if attacker_class.script_digest(attack) == digest]
        if not places:
            raise ValueError(f"{cell['method']}: the script changed since this run began; start it again")
        settings["diffusers_examples"] = places[0]
    return attacker_class(cell["preset"], **settings)


def warn_of_people(folder: Path, faces) -> None:
    """Warn if the photos in a folder show no face, or those of several people, as a `FaceRecognizer` sees them."""
    from .data import read_images

    known = faces.largest_faces(read_images([folder]))
    if not known:
        logger.warning("%s: no face was found", folder)
    elif (people := faces.count_people(known)) > 1:
        logger.warning("%s: the faces of %d photos may be of %d people", folder, len(known), people)


def _faces(metrics: Sequence):
    """The backend of the first metric of identity; without one dlib, and None if that is not installed."""
    from .metrics.identity import Identity
    from .recognition import DlibFaces

    for metric in metrics:
        if isinstance(metric, Identity):
            return metric.faces
    with contextlib.suppress(ImportError):
        return DlibFaces()
    return None


class _Runner:
    """What all cells share, loaded and checked once."""

    def __init__(self, config: BenchmarkConfig, people: dict[str, Path], results: Path, arguments: argparse.Namespace):
        from .data import list_photos, read_images
        from .images import psnr, ssim
        from .metrics.fidelity import Lpips
        from .protect import load_pipeline
        from .transforms import build_transform

        self.looks = {"psnr": psnr, "ssim": ssim} | ({"lpips": Lpips()} if config.lpips else {})
        self.config, self.people, self.results = config, people, results
        self.pictures = Path(arguments.pictures) if arguments.pictures else None
        self.metrics = [METRICS.load(name)() for name in sorted(set(config.metrics))]
        self.transforms = {}
        for condition in expand(config.conditions):
            for spec in (condition["publishing"], condition["purification"]):
                if spec is not None and (key := json.dumps(_portable(spec))) not in self.transforms:
                    self.transforms[key] = build_transform(spec).eval()
        faces = _faces(self.metrics)
        self.references = {}
        for name, person in people.items():
            self.references[name] = read_images([person / "set_C"])
            for metric in self.metrics:
                try:
                    metric(self.references[name][:1], self.references[name])
                except ValueError as error:
                    raise ValueError(f"{person / 'set_C'}: {error}") from error
            if len(list_photos([person / "set_B"])) == 1:
                logger.warning("%s: one photo; most attacks on people need at least three or four", person / "set_B")
            for part in ("set_B", "set_C") if faces else ():
                warn_of_people(person / part, faces)
        checkpointing = config.gradient_checkpointing
        self.surrogate = load_victim(config.model, arguments.device, gradient_checkpointing=checkpointing)
        self.protection = None
        if _has(config, "gap-diff"):
            self.protection = load_pipeline(config.checkpoint, arguments.device)
            self.protection.set_progress_bar_config(disable=True)
        networks = (self.surrogate.vae, self.surrogate.denoiser, *self.surrogate.text_encoders)
        own = people if _has(config, "aspl") else {}
        self.inputs = Inputs(
            model=hash_weights(*networks, self.surrogate.pipeline.scheduler),
            checkpoint=hash_weights(self.protection.generator) if self.protection else None,
            photos={name: hash_photos([person / "set_B", person / "set_C"]) for name, person in people.items()},
            own_photos={name: hash_photos([person / "set_A"]) for name, person in own.items()},
            transforms={
                key: hash_weights(*built.networks) for key, built in self.transforms.items() if built.networks
            },
        )
        self.class_images: dict[str, Any] = {}

    def run(self, cells: list[dict[str, Any]]) -> None:
        """One attack, and all its prompts."""
        from .config import provenance, write_json
        from .data import save_grid

        cell, person = cells[0], self.people[cells[0]["person"]]
        device = self.surrogate.denoiser.device
        attacker = make_cells_attacker(self.config, cell)
        attacker.check_model(self.surrogate)
        started = time.perf_counter()
        forget_peak_memory(device)
        photos, cost, protected = self._prepare(cell, person)
        forget_peak_memory(device)
        prepared = time.perf_counter()
        class_images = self._draw_class(attacker.config)
        drawn = time.perf_counter()
        pipeline = attacker(copy.deepcopy(self.surrogate), photos, class_images=class_images)
        trained = time.perf_counter()
        for cell in cells:
            before = time.perf_counter()
            pictures = attacker.draw(
                pipeline,
                photos,
                cell["prompt"],
                cell["count"],
                num_inference_steps=cell["num_inference_steps"],
                guidance_scale=cell["guidance_scale"],
                seed=cell["seed"],
            )
            after = time.perf_counter()
            reference = self.references[cell["person"]]
            results = [result for metric in self.metrics for result in metric(pictures, reference)]
            seconds = {
                "protection": protected - started,
                "purification": prepared - protected,
                "class_images": drawn - prepared,
                "training": trained - drawn,
                "drawing": after - before,
            }
            path = cell_path(self.results, cell)
            if self.pictures:
                save_grid(pictures, self.pictures / f"{path.stem}.png")
            record = {
                "format": CELL_FORMAT,
                "cell": cell,
                "figures": {result.name: {"mean": result.mean} | asdict(result) for result in results},
                "cost": cost,
                "seconds": {name: round(value, 1) for name, value in seconds.items()},
                "peak_memory_gb": peak_memory_gb(device, of_script="diffusers_examples" in cell["attack"]),
                "gradient_checkpointing": self.config.gradient_checkpointing,
                "device": str(device),
                "versions": provenance(),
            }
            write_json(path, record)

    def _draw_class(self, attack):
        """Pictures of the class, drawn once for all cells with the same settings."""
        from .finetuning import draw_class_images

        if not attack.prior_loss_weight:
            return None
        key = json.dumps(
            [
                attack.class_prompt,
                attack.num_class_images,
                attack.resolution,
                attack.num_inference_steps,
                attack.guidance_scale,
            ]
        )
        if key not in self.class_images:
            self.class_images[key] = draw_class_images(self.surrogate, attack)
        return self.class_images[key]

    def _prepare(self, cell: Mapping[str, Any], person: Path):
        """The photos as the attacker has them, protected, published, purified; how far protected ones are from clean
        ones, and on a GPU what memory that took, None if they are not protected; and the time when they were."""
        import torch

        from .data import list_photos, load_faces, to_pixels
        from .protections.anti_dreambooth import ASPLConfig, aspl

        clean = photos = load_faces(list_photos([person / "set_B"]), cell["resolution"])
        eps, device = cell["levels"] / 255, self.surrogate.denoiser.device
        if cell["protection"] == "gap-diff":
            photos = self.protection(photos, eps, output_type="pt").images.cpu()
        elif cell["protection"] == "aspl":
            own = load_faces(list_photos([person / "set_A"]), cell["resolution"])
            attack, settings = _attack("dreambooth", self.config.aspl), ASPLConfig(eps=eps, seed=cell["seed"])
            class_images = self._draw_class(attack)
            photos = aspl(self.surrogate, photos, own, settings, attack=attack, class_images=class_images)
        protected, cost = time.perf_counter(), None
        if cell["protection"] != "none":
            pairs = [(to_pixels(moved), to_pixels(photo)) for moved, photo in zip(photos, clean, strict=True)]
            cost = {name: finite(sum(measure(*p) for p in pairs) / len(pairs)) for name, measure in self.looks.items()}
            if device.type == "cuda":  # elsewhere the process's peak is that of attacks before
                cost["peak_memory_gb"] = peak_memory_gb(device)
        for spec in (cell["publishing"], cell["purification"]):
            if spec is not None:
                transform = self.transforms[json.dumps(spec)]
                try:
                    with torch.no_grad():
                        photos = transform.to(device)(photos.to(device)).cpu()
                finally:
                    for network in transform.networks:  # which the attack after it needs the memory of
                        network.to("cpu")
        return photos, cost, protected


def forget_peak_memory(device) -> None:
    """Let `peak_memory_gb` begin anew, where it can: on a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device, *, of_script: bool = False) -> float | None:
    """The most memory of a GPU that was in use since it was last asked to forget, or else the most that this process
    has used since it began, or if that was more, with `of_script`, one that it started; None where nobody says.

    A benchmark leaves on the GPU, besides what is at work, the model to attack as it came, for an attacker learns on a
    copy, and gap-diff's network. So these count too: what an attack takes alone is less by that model's weights.
    """
    import torch

    if device.type == "cuda":
        return None if of_script else round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:
        import resource
    except ImportError:
        return None
    processes = [resource.RUSAGE_SELF, *[resource.RUSAGE_CHILDREN] * of_script]
    peak = max(resource.getrusage(which).ru_maxrss for which in processes)
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)
