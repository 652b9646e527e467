"""`token-labeling COMMAND`: the commands of all four packages in one program.

This file only lists them: a command's code is in its package's `__main__.py`, its options there or in `arguments.py`
beside it.

It does not search the working folder for packages first, so a user's own `model.py` or `train.py` there does no harm.
"""

from __future__ import annotations

from labeler.base.signals import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

import importlib
import os
import sys
from collections.abc import Sequence

from labeler.base import command_line
from labeler.base.errors import InputError, did_you_mean
from labeler.base.version import __version__

PROGRAM = "token-labeling"
# Group -> command -> its package, the command's name there, and its help.
COMMANDS: dict[str, dict[str, tuple[str, str, str]]] = {
    "label images": {
        "label": ("labeler", "label", "run a teacher over images and store its class-score maps; again: resume"),
        "verify": ("labeler", "verify", "check that a store is undamaged and fits its images"),
        "report": ("labeler", "report", "write an HTML page about a store"),
        "merge": ("labeler", "merge", "make one store of several, without labeling again"),
        "push": ("labeler", "push", "send a store to a URL, such as hf://datasets/USER/NAME or s3://BUCKET/PATH"),
        "pull": ("labeler", "pull", "fetch a store from a URL, with every digest checked"),
        "import-token-labels": ("labeler", "import-token-labels", "convert TokenLabeling and ReLabel files to a store"),
        "view": ("pipeline", "view", "draw a training batch, to see whether images and labels agree"),
    },
    "train": {
        "fit": ("train", "fit", "train a model by a recipe"),
        "recipes": ("train", "recipes", "list the recipes, or all settings of one"),
        "validate": ("train", "validate", "measure top-1 and top-5 accuracy on a folder of images"),
        "predict": ("train", "predict", "classify images, and with --map their tokens"),
        "export": ("train", "export", "write a network for ONNX, torch.export or ExecuTorch, checked on images"),
        "explain": ("train", "explain", "show what a network does inside with images, layer by layer"),
    },
    "look around": {
        "models": ("model", "list", "list the models that this package adds to timm"),
        "summary": ("model", "summary", "show parameters, operations and memory of a model"),
        "doctor": ("train", "doctor", "show which parts of this machine can be used, and why others cannot"),
        "completion": ("", "", "print the completion script for a shell: bash, zsh or tcsh"),
    },
}
EXAMPLES = """examples:
  token-labeling label photos --store labels --teacher convnext_tiny.in12k_ft_in1k
  token-labeling verify labels --images photos
  token-labeling fit demansia_tiny data.images=photos data.store=labels
  token-labeling predict runs/demansia_tiny photo.jpg --map
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    end_at_interrupt()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if given else InputError.exit_status
    if given[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    known = {name: entry for group in COMMANDS.values() for name, entry in group.items()}
    if given[0] not in known:
        remedy = did_you_mean(given[0], list(known)) or f"See {PROGRAM} --help."
        print(f"error: there is no command {given[0]!r}. {remedy}", file=sys.stderr)
        return InputError.exit_status
    command_line.front_door = PROGRAM
    if os.getcwd() not in sys.path:  # last: for teachers that are the user's own functions
        sys.path.append(os.getcwd())
    package, command, _ = known[given[0]]
    if not package:
        return _completion(given[1:])
    return importlib.import_module(f"{package}.__main__").main([command, *given[1:]])


def help_text() -> str:
    """The help text: all commands by group, with examples."""
    width = max(len(name) for group in COMMANDS.values() for name in group)
    lines = [
        f"usage: {PROGRAM} COMMAND …",
        "",
        "Token labeling for vision: label with a teacher, train with its maps.",
        "",
    ]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:{width}}  {text}" for name, (_, _, text) in commands.items()), ""]
    lines += [EXAMPLES, f"`{PROGRAM} COMMAND --help` lists a command's options; `{PROGRAM} --version` the version."]
    return "\n".join(lines)


def _completion(arguments: Sequence[str]) -> int:
    """Print a shell's completion script, made by shtab from the parsers of all commands."""
    try:
        import shtab
    except ImportError:
        print("error: completion needs shtab. pip install shtab", file=sys.stderr)
        return InputError.exit_status
    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        print(f"error: which shell? One of {', '.join(shtab.SUPPORTED_SHELLS)}", file=sys.stderr)
        return InputError.exit_status
    parser = command_line.OneLineParser(prog=PROGRAM)
    commands = parser.add_subparsers()
    for group in COMMANDS.values():
        for name, (package, command, text) in group.items():
            if package:
                own = importlib.import_module(f"{package}.__main__").parser_of(command)
                commands.add_parser(name, help=text, parents=[own], add_help=False)
    print(shtab.complete(parser, arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
