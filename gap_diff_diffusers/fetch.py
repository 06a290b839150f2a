"""`gap-diff fetch-attackers`: download the example scripts of diffusers that the attackers `official:...` run."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tag", help="release of diffusers (default: the newest known that the installed one runs)")


def run(arguments: argparse.Namespace) -> int:
    """Download what is missing, check it, and say where it is."""
    from .attackers.official import fetch_scripts

    sys.stdout.write(f"{fetch_scripts(arguments.tag)}\n")
    return 0
