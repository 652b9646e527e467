"""Shared by the command lines of all packages: one-line errors and their exit statuses."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from labeler.base.errors import InputError, TokenLabelError, error_text
from labeler.base.signals import INTERRUPTED

Run = Callable[[argparse.Namespace], int]
OURS = ("labeler", "pipeline", "model", "train")
front_door = ""  # the program name in help texts; empty: `python -m PACKAGE`
# Import names that a plain install lacks; pyproject.toml has the extras that add them.
IN_EXTRAS = {"torch", "torchvision", "timm", "safetensors", "ray", "matplotlib", "tensorboardX", "numba", "simplejpeg"}
BROKEN_PIPE = 141  # the exit status that shells report after SIGPIPE


class OneLineParser(argparse.ArgumentParser):
    """Reports usage errors in one line that points to the help."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with the status of an InputError."""
        self.exit(InputError.exit_status, f"error: {message}. See {self.prog} --help\n")


def program(package: str) -> str:
    """Returns how the user calls the commands of a package, such as `python -m labeler`."""
    return front_door or f"python -m {package}"


def refuse_hidden_packages() -> None:
    """Checks that no file of the user hides one of our packages, without running that file.

    Raises:
        InputError: A file outside of this installation would be imported under one of our package names.
    """
    root = Path(__file__).parents[2]
    for name in OURS:
        spec = getattr(sys.modules.get(name), "__spec__", None) or find_spec(name)
        if spec is not None and spec.origin is not None and not Path(spec.origin).is_relative_to(root):
            raise InputError(
                f"{spec.origin} hides the package {name!r} of token-labeling",
                remedy="Use `token-labeling COMMAND`, which does not look in this folder first.",
            )


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns an argparse type that accepts whole numbers of `lowest` or more."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of {lowest} or more")
        return number

    return parse


def parser_of_commands(
    package: str, description: str, added: Mapping[str, Callable[[Any, Run], None]], runs: Mapping[str, Run]
) -> argparse.ArgumentParser:
    """Returns the parser of a package with all of its commands.

    Args:
        package: Its name.
        description: What its commands are for.
        added: Each command's function that adds it: (what `add_subparsers()` returned, function that runs it) -> None.
        runs: Each command's function that runs it: parsed arguments -> exit status.
    """
    parser = OneLineParser(prog=program(package), description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, add in added.items():
        add(commands, runs[command])
    return parser


def add_command(
    commands: Any, name: str, run: Any, text: str, json: str = "print the result as one JSON object"
) -> argparse.ArgumentParser:
    """Adds a command with the flags that all commands share, `--json` and `--quiet`.

    Args:
        commands: What the parser's `add_subparsers()` returned.
        name: The command's name.
        run: The function that runs it: parsed arguments -> exit status.
        text: Its help and description.
        json: Help text of `--json`.

    Returns:
        The command's own parser.
    """
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, own_parser=parser)
    parser.add_argument("--json", action="store_true", help=json)
    parser.add_argument("--quiet", action="store_true", help="hide the progress bar")
    return parser


def parser_of_command(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """Returns the parser of one command of `parser`."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command]


def with_flags(text: str, parser: argparse.ArgumentParser) -> str:
    """Returns a library's message with a command's flags in place of the settings' names.

    Args:
        text: Settings stand between backticks, alone or with a value: `input_size`, `decoder=cpu`.
        parser: The command's own parser, which knows their flags: --input-size, --decoder cpu. Others stay as they are.
    """
    long = {action.dest: [flag for flag in action.option_strings if flag[:2] == "--"] for action in parser._actions}
    flags = {name: options[0] for name, options in long.items() if options}

    def flag(match: re.Match[str]) -> str:
        name, _, value = match[1].partition("=")
        return f"{flags[name]} {value}".rstrip() if name in flags else match[0]

    return re.sub(r"`(\w+(?:=[^`]*)?)`", flag, text)


def shown(error: TokenLabelError, options: argparse.Namespace) -> str:
    """Returns the text of an error as the command that has these options shows it."""
    parser = getattr(options, "own_parser", None)
    return str(error) if parser is None else with_flags(str(error), parser)


def run_command(options: argparse.Namespace, extra: str = "all") -> int:
    """Calls `options.run(options)` and prints its errors in one line.

    Args:
        options: Parsed arguments, with the command's function as `run`.
        extra: The extra to suggest when a library that these commands import is not installed.

    Returns:
        The exit status: the command's own, the error's, 1 for errors of the operating system, 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not text
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        refuse_hidden_packages()
        status = options.run(options)
        sys.stdout.flush()
        return status
    except TokenLabelError as error:
        print(f"error: {shown(error, options)}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        if error.name not in IN_EXTRAS:
            raise
        remedy = f"pip install 'token-labeling[{extra}]'"
        print(f"error: {InputError(f'{error.name} is required but not installed', remedy=remedy)}", file=sys.stderr)
        return InputError.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        with suppress(OSError, ValueError):  # Python flushes what is left when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 1
