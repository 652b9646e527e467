"""The parsers of all commands, by the command's name."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

PACKAGES = ("labeler", "pipeline", "model", "train")


def parser_of(package: str) -> argparse.ArgumentParser:
    """The parser of `python -m package`."""
    return importlib.import_module(f"{package}.__main__")._parser()


def commands_of(package: str) -> dict[str, argparse.ArgumentParser]:
    """Command name -> its parser."""
    (choice,) = (a for a in parser_of(package)._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choice.choices)


def package_of(command: str) -> str | None:
    """The package that has a command of `token-labeling`, if one has."""
    return next((package for package in PACKAGES if command in commands_of(package)), None)


def help_of_all() -> Iterator[tuple[str, str]]:
    """(command, help) of every command of every package."""
    for package in PACKAGES:
        for name, parser in commands_of(package).items():
            yield name, parser.format_help()
