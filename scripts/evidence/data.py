"""Pictures, teachers and label stores: made once, below one folder, by the project's own commands.

Labels are made without the mirrored pass. Students have one thread each: two of them can share a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import labeler.__main__
import train.__main__
from labeler.base.errors import InputError
from scripts.cifar10 import command, unpack
from scripts.evidence.mosaics import draw_all
from scripts.evidence.tables import Labels
from scripts.evidence.teachers import NETWORK
from scripts.evidence.true_maps import true_store
from train.recipes.recipe import load_recipe
from train.record.continuation import differences
from train.record.fit_summary import read_summary

PER_CLASS = 800  # images that are labeled and that students see, the first of each class
EPOCH = 312  # steps of 64 images in an epoch of the 20,000
STEPS = 624  # two epochs of 20,000 images
FURTHER = 250  # steps on a table's own pictures
WARMUP = 0.2  # epochs, or a fifth of all steps
TEACHER_SIDE = 96  # pixels of the pictures that the teacher is fine-tuned on
SIDES = {"cifar10": TEACHER_SIDE, "mosaics": 256}  # pixels that the teacher sees
SETTINGS = (
    f"model.name={NETWORK}",
    "model.args.pretrained=none",
    "model.drop_path_rate=0",
    "augment.auto_augment=none",
    "augment.erase_prob=0",
    "optimizer.lr=1e-3",
    "optimizer.layer_decay=none",
    "run.threads=2",
    "run.log_every=20",
    "run.save_every=60",
    "run.tensorboard=false",
)


@dataclass(frozen=True)
class Pictures:
    """Where a table's images and its labels lie.

    Attributes:
        name: "cifar10" or "mosaics".
        train: folder of classes.
        test: folder of classes.
        listed: file with the paths of those of `train` that are labeled and that students see.
        stores: folder of the label stores.
    """

    name: str
    train: Path
    test: Path
    listed: Path
    stores: Path


@dataclass(frozen=True)
class Teachers:
    """Where teachers come from: either field, not both; neither where no labels are made.

    Attributes:
        weights: ImageNet weights of EfficientNet-Lite1, to fine-tune.
        run: folder of a finished run.
    """

    weights: Path | None = None
    run: Path | None = None


def unpack_pictures(archive: Path, out: Path, name: str) -> Pictures:
    """Unpacks CIFAR-10, and draws the mosaics if they are asked for. What is there is kept.

    Args:
        archive: .zip file of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`.
        out: folder to write to.
        name: "cifar10" or "mosaics".

    Returns:
        Where they lie.

    Raises:
        InputError: the archive is not CIFAR-10.
    """
    cifar, listed = out / "images", out / f"{name}.txt"
    unpack(archive, cifar)
    images = cifar if name == "cifar10" else draw_all(cifar, out / "mosaics")
    folders = sorted((images / "train").iterdir())
    chosen = [f"{folder.name}/{path.name}\n" for folder in folders for path in sorted(folder.iterdir())[:PER_CLASS]]
    listed.write_text("".join(chosen))
    return Pictures(name, images / "train", images / "test", listed, out / "labels" / name)


def label_all(pictures: Pictures, stores: Sequence[Labels], teachers: Teachers, out: Path) -> dict[str, dict[str, Any]]:
    """Makes label stores.

    Args:
        pictures: what is labeled.
        stores: which stores.
        teachers: where they come from.
        out: folder of CIFAR-10 and of the teachers that are trained.

    Returns:
        Of each store by its name: `teacher`, the share of CIFAR-10's test images that its teacher gets right, if it has
        one; `agreement`, the share of its maps that name their image's class; and `bytes` a row.

    Raises:
        InputError: there is no such teacher.
    """
    return {labels.name: label(pictures, labels, teachers, out) for labels in stores}


def label(pictures: Pictures, labels: Labels, teachers: Teachers, out: Path) -> dict[str, Any]:
    """Makes one store, see `label_all`."""
    store = pictures.stores / labels.name
    if labels.true_cells is not None:
        truth = pictures.train.parent / "truth" / "train"
        return true_store(pictures.train, truth, store, labels.true_cells)
    run = teachers.run
    if labels.steps is not None or run is None:
        if teachers.weights is None:
            remedy = "Give --teacher-weights: this table has teachers of its own."
            raise InputError("no teacher to fine-tune", got="--teacher", remedy=remedy)
        run = out / ("teacher" if labels.steps is None else f"teacher-{labels.steps}")
        fine_tune(out / "images", teachers.weights, run, labels.steps or STEPS)
    if labels.own_pictures:
        first, run = run, out / f"teacher-{pictures.name}"
        fine_tune(pictures.train.parent, first / "timm" / "model.safetensors", run, FURTHER, labels.side)
    what = [str(pictures.train), "--image-list", str(pictures.listed), "--store", str(store)]
    side = str(labels.side or SIDES[pictures.name])
    how = ["--teacher", str(run), "--input-size", side, "--tta", "none", "--threads", "2", *labels.options]
    if labels.teacher:
        names = pictures.stores.parent / "classes.txt"
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text("".join(f"{folder.name}\n" for folder in sorted(pictures.train.iterdir())))
        weights = ["--checkpoint", str(run / "timm" / "model.safetensors"), "--class-names", str(names)]
        how[1:2] = [f"scripts.evidence.teachers:{labels.teacher}", *weights]
    made = command(labeler.__main__, ["label", *what, *how, "--json"])
    return {"teacher": accuracy_of(run), "agreement": made["agreement"], "bytes": made["bytes_per_image"]}


def fine_tune(images: Path, weights: Path, out: Path, steps: int, side: int | None = None) -> None:
    """Fine-tunes EfficientNet-Lite1, unless that is done with these settings; arguments as of `teacher_settings`."""
    settings = teacher_settings(images, weights, out, steps, side)
    if read_summary(out) is not None and not differences(
        load_recipe(out / "config.toml"), load_recipe("teacher", settings)
    ):
        return
    command(train.__main__, ["fit", "teacher", *settings, "--resume", "auto", "--json"])


def teacher_settings(images: Path, weights: Path, out: Path, steps: int, side: int | None = None) -> list[str]:
    """The overrides of the recipe `teacher`.

    Args:
        images: folder of `train/` and `test/`.
        weights: what it begins with.
        out: folder of the run.
        steps: how long.
        side: pixels that it sees; None: `TEACHER_SIDE`.

    Returns:
        Texts, `section.key=value`.
    """
    places = [f"data.images={images / 'train'}", f"data.validation={images / 'test'}", f"run.out={out}"]
    warmup = min(WARMUP, steps / 5 / EPOCH)
    length = [f"schedule.steps={steps}", f"schedule.warmup_epochs={warmup}"]
    return [*places, f"model.weights={weights}", f"model.img_size={side or TEACHER_SIDE}", *length, *SETTINGS]


def accuracy_of(run: Path) -> float:
    """Accuracy of a finished run. Raises InputError if there is none."""
    summary = read_summary(run)
    if summary is None:
        raise InputError(
            "this is not a finished run", got=str(run), expected="the folder of a teacher that was trained"
        )
    return summary.top1
