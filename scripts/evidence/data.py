"""CIFAR-10, a teacher fine-tuned on it, and its labels: made once, below one folder, by the project's own commands.

Labels are made without the mirrored pass and with one thread, like all else here: two of them can share a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import labeler.__main__
import train.__main__
from labeler.base.errors import InputError
from scripts.cifar10 import command, unpack
from train.record.fit_summary import read_summary

TEACHER = "tf_efficientnet_lite1"
SIDE = 96  # pixels that the teacher sees
PER_CLASS = 800  # images that are labeled and that students see, the first of each class
SETTINGS = (
    f"model.name={TEACHER}",
    "model.args.pretrained=none",
    f"model.img_size={SIDE}",
    "model.drop_path_rate=0",
    "augment.auto_augment=none",
    "augment.erase_prob=0",
    "optimizer.lr=1e-3",
    "optimizer.layer_decay=none",
    "schedule.steps=312",  # one epoch
    "schedule.warmup_epochs=0.2",
    "run.threads=1",
    "run.log_every=20",
    "run.save_every=60",
    "run.tensorboard=false",
)


@dataclass(frozen=True)
class Data:
    """Where images and labels lie.

    Attributes:
        images: folder of `train` and `test`.
        listed: file with the paths of those of `train` that students see.
        store: the label store of `train`.
        teacher: right answers of the teacher on `test`, a share; None: not asked for.
        agreement: share of the label maps that name their image's class; None: not asked for.
    """

    images: Path
    listed: Path
    store: Path
    teacher: float | None = None
    agreement: float | None = None


def prepare(archive: Path, out: Path, weights: Path | None = None, teacher: Path | None = None) -> Data:
    """Unpack the images; with a teacher or its weights also label. What is done already is kept.

    Args:
        archive: .zip file of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`.
        out: folder to write to.
        weights: ImageNet weights of EfficientNet-Lite1, which is then fine-tuned; None: no teacher is trained.
        teacher: folder of a finished run, to be the teacher in place of that one; None and no weights: no labels.

    Returns:
        Where it lies.

    Raises:
        InputError: the archive is not CIFAR-10, or the run is not finished.
    """
    data = Data(out / "images", out / "images.txt", out / "labels")
    unpack(archive, data.images)
    folders = sorted((data.images / "train").iterdir())
    chosen = [f"{folder.name}/{path.name}\n" for folder in folders for path in sorted(folder.iterdir())[:PER_CLASS]]
    data.listed.write_text("".join(chosen))
    if weights is None and teacher is None:
        return data
    accuracy = fine_tune(data, weights, out / "teacher") if weights is not None else accuracy_of(teacher)
    what = [str(data.images / "train"), "--image-list", str(data.listed), "--store", str(data.store)]
    how = ["--teacher", str(teacher or out / "teacher"), "--input-size", str(SIDE), "--tta", "none", "--threads", "1"]
    labels = command(labeler.__main__, ["label", *what, *how, "--json"])
    return replace(data, teacher=accuracy, agreement=labels["agreement"])


def fine_tune(data: Data, weights: Path, out: Path) -> float:
    """Fine-tune EfficientNet-Lite1 on the images. Returns its accuracy."""
    places = [f"data.images={data.images / 'train'}", f"data.validation={data.images / 'test'}", f"run.out={out}"]
    begin = f"model.weights={weights}"
    fitted = command(train.__main__, ["fit", "teacher", *places, begin, *SETTINGS, "--resume", "auto", "--json"])
    return float(fitted["top1"])


def accuracy_of(run: Path | None) -> float:
    """Accuracy of a finished run. Raises InputError if there is none."""
    summary = read_summary(run) if run is not None else None
    if summary is None:
        raise InputError(
            "this is not a finished run", got=str(run), expected="the folder of a teacher that was trained"
        )
    return summary.top1
