"""The command line: `python -m pipeline view`.

Exit status: 0 all done; 1 the picture could not be made; 2 bad input or usage; 4 stored data is damaged.
"""

from __future__ import annotations

try:
    from labeler.base.signals import end_at_interrupt
except ImportError:
    import sys

    import labeler

    print(
        f"error: {labeler.__file__} hides one of our packages. Use `token-labeling COMMAND` instead.", file=sys.stderr
    )
    raise SystemExit(2) from None

if __name__ == "__main__":
    end_at_interrupt()  # before the imports, which take seconds

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from labeler.base.command_line import OneLineParser, add_command, parser_of_command, program, run_command
from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.remote.urls import path_or_url
from pipeline.config import BACKENDS, MIXES, LoaderConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return run_command(command_parser().parse_args(arguments), extra="train")


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the parser of one command, for completion and documentation."""
    return parser_of_command(command_parser(), command)


def _view(options: argparse.Namespace) -> int:
    """Runs `view`."""
    from pipeline.batch_picture import draw_batch
    from pipeline.loader import create_loader

    if options.epoch < 0:
        raise InputError("epoch must be 0 or more", got=options.epoch)
    loader = create_loader(_config(options))
    loader.set_epoch(options.epoch)
    batch = next(iter(loader))
    picture = draw_batch(batch, loader, options.opacity)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, buffer.getvalue())
    except OSError as error:
        raise InputError(f"the picture {str(options.out)!r} cannot be written", got=error.strerror) from None
    if options.json:
        mix = None if batch.mix is None else asdict(batch.mix)
        size = {"width": picture.width, "height": picture.height}
        print(json.dumps({"picture": str(options.out), **size, "keys": batch.keys, "mix": mix}))
    else:
        print(options.out)
    return 0


def _config(options: argparse.Namespace) -> LoaderConfig:
    """Returns the settings that the flags give."""
    size, patch = options.image_size, options.patch
    if not 0 < patch <= size or size % patch:
        raise InputError("the patches do not fit the image", got=f"{size} pixels in patches of {patch}")
    return LoaderConfig(
        images=str(options.images),
        store=options.store,
        batch_size=options.count,
        image_size=size,
        grid=(size // patch, size // patch),
        seed=options.seed,
        auto_augment=options.auto_augment,
        erase_prob=options.erase_prob,
        mix=options.mix,
        backend=options.backend,
        prefetch=1,
        progress=not options.quiet,
    )


def command_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = OneLineParser(prog=program("pipeline"), description="Training batches of images with token labels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "draw one training batch as a picture, to check that images and token labels agree"
    view = add_command(commands, "view", _view, text)
    view.add_argument("images", type=path_or_url, help="the images that were labeled")
    view.add_argument("--store", required=True, help="folder or URL of the label store")
    view.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    view.add_argument("--count", type=int, default=8, metavar="B", help="images in the batch (%(default)s)")
    view.add_argument(
        "--image-size", type=int, default=224, metavar="S", help="side of the network input in pixels (%(default)s)"
    )
    view.add_argument("--patch", type=int, default=16, help="side of a token in pixels (%(default)s)")
    view.add_argument(
        "--auto-augment",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help='augmentation in timm\'s notation, "3a" or "none" (%(default)s)',
    )
    view.add_argument(
        "--mix", choices=MIXES, default="none", help="mix the tokens or the pixels of images in a box (%(default)s)"
    )
    view.add_argument(
        "--erase-prob", type=float, default=0.0, metavar="P", help="probability of random erasing (%(default)s)"
    )
    view.add_argument("--seed", type=int, default=0, help="seed of order and augmentation (%(default)s)")
    view.add_argument("--epoch", type=int, default=0, help="draw the first batch of this epoch (%(default)s)")
    view.add_argument("--backend", choices=BACKENDS, default="auto", help="backend of the loader (%(default)s)")
    view.add_argument(
        "--opacity", type=float, default=0.55, help="opacity of a class of probability 1 over the image (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
