"""The command line: `python -m model summary NAME` and `python -m model list`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from model import NAMES, ModelError
from model.summary import summarize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        print(json.dumps(NAMES) if options.json else "\n".join(NAMES))
        return 0
    try:
        found = summarize(options.name, tuple(options.resolution), options.num_classes)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)) if options.json else found.text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model", description="Backbones with a class and a token head.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summary = commands.add_parser("summary", help="parameters, multiply-adds by part, activation memory")
    summary.add_argument("name", help="demansia_tiny, vim_small, lvvit_s …, or any timm model")
    summary.add_argument(
        "--resolution", type=int, nargs="+", default=[], metavar="S", help="image sides (default: the model's own)"
    )
    summary.add_argument("--num-classes", type=int, default=1000)
    names = commands.add_parser("list", help="the names that this package registers with timm")
    for command in (summary, names):
        command.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
