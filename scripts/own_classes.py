"""Class folders of your own: what each way to get token labels for them brings a small student.

    python -m scripts.own_classes --images photos/train --validation photos/val \\
        --teacher tf_efficientnet_lite1=lite1.safetensors --teacher tf_efficientnet_lite2=lite2.safetensors

Ways: image labels only; the first teacher's own classes on the token head; the first teacher fine-tuned on the folders;
a head for the folders fitted to each teacher's frozen features. All students have the same recipe, images and seeds;
only the targets differ. Run again, it keeps what is done and goes on. Everything it writes is below --out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeler.base.whole_files import replace_file

IMAGE_LABELS = "image labels only"


@dataclass(frozen=True)
class Way:
    """A way to teach: its name in the table, and how its labels are made; `label` is None where none are."""

    name: str
    label: tuple[str, ...] | None

    @property
    def folder(self) -> str:
        return re.sub("[^a-z0-9_]+", "-", self.name.lower())


def ways(options: argparse.Namespace) -> list[Way]:
    """Returns all ways: one of the first teacher's own classes and one of it fine-tuned, one of a head per teacher."""
    size = ("--input-size", str(options.input_size))
    teachers = [name.split("=", 1) for name in options.teacher]
    sources = [("--teacher", name, "--checkpoint", file, *size) for name, file in teachers]
    heads = [
        Way(f"fitted head, {name}", (*source, "--fit-head"))
        for (name, _), source in zip(teachers, sources, strict=True)
    ]
    return [
        Way(IMAGE_LABELS, None),
        Way("the teacher's classes", sources[0]),
        Way("teacher fine-tuned", ("--teacher", str(options.out / "teacher"), *size)),
        *heads,
    ]


def fine_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes the first teacher by the recipe `teacher`. Returns the summary of its run."""
    name, file = options.teacher[0].split("=", 1)
    network = [f"model.name={name}", "model.args.pretrained=none", f"model.weights={file}"]
    data = [f"data.images={options.images}", f"data.validation={options.validation}"]
    place = [f"model.img_size={options.input_size}", f"run.out={options.out / 'teacher'}"]
    return command("fit", "teacher", *network, *data, *place, *options.teacher_set, "--resume", "auto")


def train_student(options: argparse.Namespace, way: Way, seed: int) -> dict[str, Any]:
    """Trains one student with one thread, so that `--jobs` of them do not get in each other's way."""
    data = [f"data.images={options.images}", f"data.validation={options.validation}"]
    labels = "none" if way.label is None else options.out / f"labels-{way.folder}"
    place = [f"data.store={labels}", f"run.out={options.out / 'students' / f'{way.folder}-{seed}'}"]
    only = ["data.token_labels=false", "loss.dense_weight=0"] if way.label is None else []
    how = [f"run.seed={seed}", "run.threads=1", *only, *options.set]
    return command("fit", options.recipe, *data, *place, *how, "--resume", "auto")


def command(name: str, *arguments: object) -> dict[str, Any]:
    """Runs a command as a user would. Returns the JSON object that it prints; ends the script where it fails."""
    line = [name, *map(str, arguments)]
    print(f"$ token-labeling {shlex.join(line)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "train.commands", *line, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"stopped: `token-labeling {name}` failed with status {done.returncode}")
    return json.loads(done.stdout)


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the values' mean; NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(results: dict[str, Any]) -> str:
    """Returns a line per way: what made the labels, and the students' accuracy beside that of image labels only."""
    students = results["students"]
    plain = students[IMAGE_LABELS]
    lines = [f"{'taught by':<40}{'labels':>10}{'bytes':>8}{'students':>16}{'more than image labels':>25}"]
    for name, found in students.items():
        labels = results["labels"].get(name)
        cells = f"{labels['agreement']:.1%}" if labels and labels["agreement"] is not None else "–"
        size = f"{labels['bytes_per_image']:.0f}" if labels else "–"
        mean = f"{statistics.mean(found):.1%} ± {standard_error(found):.1%}"
        more = [ours - theirs for ours, theirs in zip(found, plain, strict=False)]
        gain = f"{statistics.mean(more):+.1%} ± {standard_error(more):.1%}" if name != IMAGE_LABELS else "–"
        lines.append(f"{name:<40}{cells:>10}{size:>8}{mean:>16}{gain:>25}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; what is known is written after each part."""
    options.out.mkdir(parents=True, exist_ok=True)
    students: dict[str, list[float]] = {}
    results: dict[str, Any] = {"teacher": fine_tune(options), "labels": {}, "students": students}
    written = options.out / "results.json"
    known = ways(options)
    for way in known:
        if way.label is not None:
            store = options.out / f"labels-{way.folder}"
            results["labels"][way.name] = command("label", options.images, "--store", store, *way.label)
            replace_file(written, json.dumps(results, indent=1).encode() + b"\n")
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:
            found = pool.map(lambda way, seed=seed: train_student(options, way, seed), known)
            for way, summary in zip(known, found, strict=True):
                students.setdefault(way.name, []).append(summary["top1"])
            replace_file(written, json.dumps(results, indent=1).encode() + b"\n")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.own_classes", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="training images in class folders")
    parser.add_argument("--validation", type=Path, required=True, help="test images in the same class folders")
    parser.add_argument(
        "--teacher", action="append", required=True, metavar="NAME=FILE",
        help="a network of timm's and its weights; may be given again, for one more fitted head",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/own-classes"), help="output folder (%(default)s)")
    parser.add_argument("--input-size", type=int, default=96, help="pixels that the teachers see (%(default)s)")
    parser.add_argument("--recipe", default="cifar10_nano", help="the students' recipe (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds of the students")
    parser.add_argument("--jobs", type=int, default=1, help="students that train at once (%(default)s)")
    settings = {"nargs": "+", "default": [], "metavar": "section.key=value"}
    parser.add_argument("--set", **settings, help="overrides of the students' recipe")
    parser.add_argument("--teacher-set", **settings, help="overrides of the recipe `teacher`")
    print(f"\n{table(run(parser.parse_args(arguments)))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
