"""The parsers of all commands."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from labeler.base import command_line
from train.commands import COMMANDS, PROGRAM

# Command of `token-labeling` -> its package, and its name there.
PLACES = {name: (package, own) for group in COMMANDS.values() for name, (package, own, _) in group.items()}


def parser_of(package: str) -> argparse.ArgumentParser:
    """The parser of `python -m package`."""
    return importlib.import_module(f"{package}.__main__").command_parser()


def help_of_all() -> Iterator[tuple[str, str]]:
    """(command, help) of every command of `token-labeling` that has a parser of its own."""
    command_line.front_door = PROGRAM
    for name, (package, own) in PLACES.items():
        if package:
            yield name, importlib.import_module(f"{package}.__main__").parser_of(own).format_help()
