"""The command line: `python -m model summary NAME` and `python -m model list`.

Exit status: 0, or 2 for bad usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from labeler.base.command_line import OneLineParser, parser_of_command, program, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(command_parser().parse_args(arguments), extra="train")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, for completion and documentation."""
    return parser_of_command(command_parser(), command)


def _list(options: argparse.Namespace) -> int:
    from model import NAMES

    print(json.dumps(NAMES) if options.json else "\n".join(NAMES))
    return 0


def _summary(options: argparse.Namespace) -> int:
    from model.summary import summarize

    summary = summarize(options.name, tuple(options.resolution), options.num_classes)
    print(json.dumps(asdict(summary)) if options.json else summary.text())
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = OneLineParser(prog=program("model"), description="Backbones with a class and a token head.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summary = commands.add_parser("summary", help="show parameters, multiply-adds by part and activation memory")
    summary.set_defaults(run=_summary)
    summary.add_argument("name", help="demansia_tiny, vim_small, lvvit_s …, or any timm model")
    summary.add_argument(
        "--resolution", type=int, nargs="+", default=[], metavar="S", help="image sides (default: the model's own)"
    )
    summary.add_argument("--num-classes", type=int, default=1000, help="classes of both heads (%(default)s)")
    names = commands.add_parser("list", help="list the names that this package registers with timm")
    names.set_defaults(run=_list)
    for command in (summary, names):
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
