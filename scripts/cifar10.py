"""CIFAR-10 with and without token labels: a teacher, its labels, and a small DeMansia trained in three ways.

    python -m scripts.cifar10 --data cifar10-24k.zip --out runs/cifar10

The archive holds JPEG files of 32x32 pixels as `train/CLASS/NAME.jpg` and `test/CLASS/NAME.jpg`. About half an hour
on two CPU cores; run again, it keeps what is done and goes on. Everything it writes is below --out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import labeler.__main__
import train.__main__
from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from scripts.demo import students
from scripts.demo.teacher import (
    BATCH,
    TeacherReport,
    described,
    fit_teacher,
    load_split,
    store_teacher,
    stored_report,
    top1,
)
from train.recipes.recipe import load_recipe
from train.record.continuation import differences

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
NETWORK = 1  # increase with any change that affects the weights: stored teachers of another number are trained again
RECIPE = "cifar10_nano"
ARMS = {text.replace(" ", "-"): (text, overrides.split()) for text, overrides in students.ARMS.items()}


def teacher() -> nn.Module:
    """The untrained network, for images of 32x32 pixels: stride 4, so its map has 8x8 cells."""
    model = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 128, 128), output_stride=16, num_classes=10)
    # timm's stem would shrink such small images fourfold before the first block.
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return described(model, SIDE)


def unpack(archive: Path, out: Path) -> dict[str, Any]:
    """Unpack the archive's images to `out`, completely or not at all. Raises InputError if it is not CIFAR-10."""
    try:
        with zipfile.ZipFile(archive) as file:
            images = [info for info in file.infolist() if info.filename.endswith(".jpg")]
            folders = {tuple(info.filename.split("/")[:-1]) for info in images}
            if folders != {(split, name) for split in ("train", "test") for name in CLASSES}:
                raise InputError(
                    f"{archive} is not an archive of CIFAR-10", got=f"images in {len(folders)} folders",
                    expected="train/CLASS/*.jpg and test/CLASS/*.jpg of its ten classes",
                )  # fmt: skip
            source = {"images": len(images), "checksum": sum(info.CRC for info in images)}
            if not out.exists():
                unfinished = out.with_name(out.name + ".tmp")
                for info in images:
                    file.extract(info, unfinished)
                (unfinished / "source.json").write_text(json.dumps(source))
                os.replace(unfinished, out)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} cannot be unpacked", got=error, expected="a .zip file of images") from None
    if json.loads((out / "source.json").read_text()) != source:
        raise InputError(f"{out} contains other images", remedy="Choose another --out.")
    return source


def train_teacher(images: Path, out: Path, source: dict[str, Any], steps: int, bfloat16: bool) -> TeacherReport:
    """Train on `images`/train, test on `images`/test and write the weights to `out`, unless they exist already."""
    settings = {"network": NETWORK, "source": source, "steps": steps, "bfloat16": bfloat16}
    if (report := stored_report(out, settings)) is not None:
        return report
    pixels, labels = load_split(images / "train", "loading images", True, SIDE, CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = teacher().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    fit_teacher(model, pixels, labels, steps, torch.Generator().manual_seed(0), True, SIDE, bfloat16)
    seconds = time.perf_counter() - started
    accuracy = top1(model, *load_split(images / "test", "testing", True, SIDE, CLASSES))
    report = TeacherReport(str(out), accuracy, seconds, steps * BATCH / seconds)
    store_teacher(model, out, settings, report)
    return report


def label(images: Path, checkpoint: str, store: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Label and verify. Returns the labeling's summary, or `before` if nothing was left to do."""
    names = store.with_name("classes.txt")
    names.write_text("\n".join(CLASSES) + "\n")
    who = ["--teacher", "scripts.cifar10:teacher", "--checkpoint", checkpoint, "--class-names", str(names)]
    how = ["--input-size", str(SIDE), "--tta", "flip", "--json"]
    summary = command(labeler.__main__, ["label", str(images), "--store", str(store), *who, *how])
    command(labeler.__main__, ["verify", str(store), "--images", str(images), "--relabel", "50", "--trusted", "--json"])
    return before if before and not summary["labeled_now"] else summary


def train_arm(arm: str, seed: int, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train one student. Returns the summary of its run, read from its folder if it is finished."""
    folder = out / f"{arm}-{seed}"
    settings = [
        f"data.images={out / 'images' / 'train'}",
        f"data.validation={out / 'images' / 'test'}",
        f"data.store={out / 'labels'}",
        f"run.out={folder}",
        f"run.seed={seed}",
        *ARMS[arm][1],
        *overrides,
    ]
    finished = folder / "summary.json"
    if finished.exists() and not differences(load_recipe(folder / "config.toml"), load_recipe(RECIPE, settings)):
        return json.loads(finished.read_text())
    return command(train.__main__, ["fit", RECIPE, *settings, "--resume", "auto", "--json"])


def command(package: ModuleType, arguments: list[str]) -> dict[str, Any]:
    """Run a package's command line. Returns the JSON object that it prints; exits the script if it fails."""
    run: Callable[[list[str]], int] = package.main
    name = package.__name__.removesuffix(".__main__")
    print(f"$ python -m {name} {shlex.join(arguments)}", flush=True)
    with redirect_stdout(io.StringIO()) as printed:
        status = run(arguments)
    if status:
        raise SystemExit(status)
    return json.loads(printed.getvalue())


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    taught, labels = results["teacher"], results["labels"]
    lines = [
        f"teacher: {taught['test_accuracy']:.2%} of the test images right, {taught['seconds']:.0f} s of training",
        f"labels:  {labels['rows']:,} images at {labels['images_per_s']:.0f} images/s, {labels['bytes_per_image']:.0f} "
        f"bytes each; {labels['agreement']:.1%} of the maps name the image's class",
        "",
        f"{'student trained with':<28}{'seed':>5}{'steps':>7}{'top-1':>9}{'images/s':>10}{'seconds':>9}",
    ]
    for run in results["runs"]:
        lines.append(
            f"{ARMS[run['arm']][0]:<28}{run['seed']:>5}{run['steps']:>7,}{run['top1']:>9.2%}"
            f"{run['images_per_s']:>10.0f}{run['seconds']:>9.0f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; results are written after each part."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    written = out / "results.json"
    before = json.loads(written.read_text()) if written.exists() else {}
    source = unpack(options.data, out / "images")
    taught = train_teacher(out / "images", out / "teacher.safetensors", source, options.teacher_steps, options.bfloat16)
    labels = label(out / "images" / "train", taught.checkpoint, out / "labels", before.get("labels", {}))
    runs: list[dict[str, Any]] = []
    results = {"teacher": asdict(taught), "labels": labels, "runs": runs}
    replace_file(written, json.dumps(results, indent=1).encode() + b"\n")
    steps = [] if options.steps is None else [f"schedule.steps={options.steps}"]
    for seed in options.seeds:
        for arm in options.arms:
            runs.append({"arm": arm, "seed": seed, **train_arm(arm, seed, out, [*steps, *options.overrides])})
            replace_file(written, json.dumps(results, indent=1).encode() + b"\n")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.cifar10", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".zip file of train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="output folder (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each student (default: the recipe's)")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="training steps of the teacher (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds of the students")
    parser.add_argument(
        "--arms", choices=ARMS, nargs="*", default=list(ARMS), help="students to train; none: only teacher and labels"
    )
    parser.add_argument("--bfloat16", action="store_true", help="train the teacher in bfloat16: fast on CPUs with AMX")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="overrides of the recipe"
    )
    options = parser.parse_args(arguments)
    try:
        results = run(options)
    except InputError as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    print(f"\n{table(results)}\n\n{options.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
