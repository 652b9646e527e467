"""CIFAR-10, a teacher fine-tuned on it, and its labels: made once, below one folder, by the project's own commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import labeler.__main__
import train.__main__
from scripts.cifar10 import command, unpack

TEACHER = "tf_efficientnet_lite1"
SIDE = 96  # pixels that the teacher sees
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
        store: the label store of `train`.
        teacher: right answers of the teacher on `test`, a share; None: not asked for.
        agreement: share of the label maps that name their image's class; None: not asked for.
    """

    images: Path
    store: Path
    teacher: float | None = None
    agreement: float | None = None


def prepare(archive: Path, weights: Path | None, out: Path) -> Data:
    """Unpack the images; with a teacher's weights also fine-tune it and label. What is done already is kept.

    Args:
        archive: .zip file of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`.
        weights: ImageNet weights of EfficientNet-Lite1; None: no labels.
        out: folder to write to.

    Returns:
        Where it lies.

    Raises:
        InputError: the archive is not CIFAR-10.
    """
    data = Data(out / "images", out / "labels")
    unpack(archive, data.images)
    if weights is None:
        return data
    teacher = out / "teacher"
    places = [f"data.images={data.images / 'train'}", f"data.validation={data.images / 'test'}", f"run.out={teacher}"]
    begin = f"model.weights={weights}"
    fitted = command(train.__main__, ["fit", "teacher", *places, begin, *SETTINGS, "--resume", "auto", "--json"])
    how = ["--teacher", str(teacher), "--input-size", str(SIDE), "--json"]
    labels = command(labeler.__main__, ["label", str(data.images / "train"), "--store", str(data.store), *how])
    return Data(data.images, data.store, fitted["top1"], labels["agreement"])
