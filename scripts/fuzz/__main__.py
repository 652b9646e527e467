"""Random damage to what users may be given: `python -m scripts.fuzz TARGET [--minutes 5] [--seed 0]`.

    store       a label store: its shard, plan and marker mutated, digests repaired; opened, read whole, verified
    recipe      the text of a recipe
    image-list  the text of a list of images
    checkpoint  a training checkpoint, digests repaired, and a published file with code in it, which must not run

Only the project's own errors may come out, and each try must end within its limit. What comes out otherwise is kept,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scripts.fuzz.checkpoint_target import CheckpointTarget
from scripts.fuzz.store_target import StoreTarget
from scripts.fuzz.text_targets import ImageListTarget, RecipeTarget

TESTS = Path(__file__).parents[2] / "tests"
LIMIT = 60.0  # seconds for one try


class Target(Protocol):
    """Something that reads files. `run_one` returns what came of one mutation, and raises what should never come."""

    last: tuple[str, bytes]  # name and content of the file that was tried

    def run_one(self) -> str: ...


def make_target(name: str, folder: Path, rng: np.random.Generator) -> Target:
    """The target with its seeds, made in `folder`."""
    sys.path.insert(0, str(TESTS))
    if name == "store":
        from tiny import make_images

        from labeler import LabelerConfig, TeacherConfig, label_images

        settings = LabelerConfig(
            TeacherConfig("tiny:colour_teacher"), shard_size=4, decoder="pil", threads=1, progress=False
        )
        label_images(make_images(folder / "images", 8), folder / "store", settings)
        os.environ["XDG_STATE_HOME"] = os.devnull  # nothing is remembered: every try goes through the child
        return StoreTarget(folder / "store", rng)
    kinds: dict[str, Any] = {"recipe": RecipeTarget, "image-list": ImageListTarget, "checkpoint": CheckpointTarget}
    return kinds[name](folder, rng)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"a try of more than {LIMIT:.0f} s")


def fuzz(name: str, minutes: float, seed: int, kept: Path) -> int:
    """Fuzz for some time. Returns how many inputs caused unexpected errors; these are written to `kept`."""
    wrong, tries, seen = 0, 0, Counter[str]()
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        target = make_target(name, Path(folder), np.random.default_rng(seed))
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            try:
                seen[target.run_one()] += 1
            except Exception as error:  # anything that is not the project's own
                wrong += 1
                place = kept / f"{name}-{seed}-{tries}"
                place.mkdir(parents=True, exist_ok=True)
                (place / target.last[0]).write_bytes(target.last[1])
                (place / "trace.txt").write_text(traceback.format_exc(), errors="backslashreplace")
                print(f"{place}: {ascii(error)[:200]}", file=sys.stderr)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            tries += 1
        rate = tries / (time.monotonic() - began)
    counts = ", ".join(f"{count:,} {what}" for what, count in sorted(seen.items()))
    print(f"{name}: {tries:,} tries, {rate:,.1f} a second; {counts}; {wrong} went wrong")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", choices=("store", "recipe", "image-list", "checkpoint"))
    parser.add_argument("--minutes", type=float, default=5, help="how long to run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/fuzz"), help="folder for inputs that cause unexpected errors"
    )
    options = parser.parse_args(arguments)
    return int(fuzz(options.target, options.minutes, options.seed, options.kept) > 0)


if __name__ == "__main__":
    sys.exit(main())
