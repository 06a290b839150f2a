"""The command `gap-diff`: a table of subcommands, each in a module of its own that is imported when it is asked for.

A subcommand's module offers `add_arguments(parser)` and `run(arguments) -> int`, the exit code. Importing it imports
no torch, so that `--help` answers at once. A ValueError that `run` raises is wrong usage.

Exit codes: 0 all went well; 1 something failed; 2 wrong usage; 130 interrupted.
"""

import argparse
import importlib
import sys

from . import __version__

COMMANDS = {  # name: (module, what it does)
    "protect": ("protect", "protect photos: files in, protected files out"),
    "attack": ("attack", "personalize a model on photos of a person, and draw what it has learned"),
    "evaluate": ("evaluate", "look for a person in generated pictures, and at how good they are"),
    "fetch-attackers": ("fetch", "download diffusers' example scripts, for gap-diff attack --method official:..."),
    "convert": ("convert", "turn the weights released with the paper into a checkpoint of this package"),
    "benchmark": ("benchmark", "measure on this machine what the README states"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands by name and summary, and of `command` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="gap-diff", description="Protect photos against diffusion-based personalization."
    )
    parser.add_argument("--version", action="version", version=f"gap-diff {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            _load(module).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        arguments = build_parser(argv[0] if argv else None).parse_args(argv)
        return _load(COMMANDS[arguments.command][0]).run(arguments)
    except ValueError as error:
        sys.stderr.write(f"gap-diff {argv[0]}: error: {error}\n")
        return 2
    except (OSError, ImportError, FloatingPointError) as error:
        sys.stderr.write(f"gap-diff {argv[0]}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130


def _load(module: str):
    return importlib.import_module(f".{module}", __package__)
