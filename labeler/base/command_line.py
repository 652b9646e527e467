"""What the command lines of all packages share: errors in one line, with their exit status."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from labeler.base.errors import InputError, TokenLabelError, told
from labeler.base.interrupt import INTERRUPTED

OURS = ("labeler", "pipeline", "model", "train")
front_door = ""  # the program that all commands were called through, for help texts; empty: `python -m PACKAGE`
# What the package alone does not install, by the names of imports; pyproject.toml has the extras.
IN_EXTRAS = {"torch", "torchvision", "timm", "safetensors", "ray", "matplotlib", "tensorboardX"}
BROKEN_PIPE = 141  # what shells give a program that SIGPIPE ended


class OneLineParser(argparse.ArgumentParser):
    """Errors of use in one line that names the help."""

    def error(self, message: str) -> NoReturn:
        self.exit(InputError.exit_status, f"error: {message}. See {self.prog} --help\n")


def program(package: str) -> str:
    """How the user called the commands of a package."""
    return front_door or f"python -m {package}"


def refuse_hidden_packages() -> None:
    """Raises InputError where a file of the user's hides one of our packages. Nothing of it is run."""
    root = Path(__file__).parents[2]
    for name in OURS:
        spec = getattr(sys.modules.get(name), "__spec__", None) or find_spec(name)
        if spec is not None and spec.origin is not None and not Path(spec.origin).is_relative_to(root):
            raise InputError(
                f"{spec.origin} hides the package {name!r} of token-labeling",
                remedy="Use `token-labeling COMMAND`, which does not look in this folder first.",
            )


def at_least(lowest: int) -> Callable[[str], int]:
    """A type of argument: a whole number from `lowest` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of {lowest} or more")
        return number

    return parse


def add_command(
    commands: Any, name: str, run: Any, text: str, json: str = "print the result as one JSON object"
) -> argparse.ArgumentParser:
    """A command of a parser's `add_subparsers()`, with the flags that commands share; json: help of its flag."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help=json)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def parser_of_command(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """The parser of one of its commands."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command]


def run_command(options: argparse.Namespace, extra: str = "all") -> int:
    """Call `options.run(options)`; the exit status, 1 for errors of the operating system, 130 at Ctrl-C.

    Args:
        options: Parsed arguments, with the command's function as `run`.
        extra: The extra that installs what these commands import, for who has the package alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        refuse_hidden_packages()
        status = options.run(options)
        sys.stdout.flush()
        return status
    except TokenLabelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        if error.name not in IN_EXTRAS:
            raise
        remedy = f"pip install 'token-labeling[{extra}]'"
        print(f"error: {InputError(f'{error.name} is needed here and not installed', remedy=remedy)}", file=sys.stderr)
        return InputError.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read the output has enough of it, as `head`
        with suppress(OSError, ValueError):  # Python flushes what is left when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
