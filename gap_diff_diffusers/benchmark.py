"""`gap-diff benchmark`: a table of measurements, each in a module of its own that is imported when it is asked for.

Such a module offers what a subcommand's does: `add_arguments(parser)` and `run(arguments) -> int`, without importing
torch at its top.
"""

import argparse
import importlib

BENCHMARKS = {  # name: (module, what it measures)
    "attackers": ("benchmark_attackers", "steps a second of DreamBooth, beside the script of diffusers"),
    "displacement": ("benchmark_displacement", "how far the checkpoint moves real encoders' latents, beside PGD"),
    "identities": ("benchmark_identities", "whether the figures tell clean photos of one person from another's"),
    "quality": ("benchmark_quality", "whether SER-FIQ is lower for faces that are blurred, darkened or covered"),
    "run": ("benchmark_run", "protect, publish, attack, draw and look for the person, cell by cell"),
    "report": ("benchmark_report", "the cells of such a run as tables"),
    "scale": ("benchmark_scale", "how much of that is left where a face is cropped from a bigger photo"),
    "surrogate": ("benchmark_surrogate", "whether a face model draws faces, and can be misled as real ones can"),
    "training": ("benchmark_training", "steps a second of training, beside a loop like the released code's"),
    "throughput": ("benchmark_throughput", "many photos through the command, beside one photo at a time"),
    "speed": ("benchmark_speed", "seconds and peak memory: the default network beside the paper's"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _load(module).add_arguments(subparser)


def run(arguments: argparse.Namespace) -> int:
    return _load(BENCHMARKS[arguments.benchmark][0]).run(arguments)


def _load(module: str):
    return importlib.import_module(f".{module}", __package__)
