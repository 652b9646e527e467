"""Accuracy of any checkpoint on any folder of images."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from labeler.base.errors import InputError, ModelError
from labeler.base.runtime import DTYPES, pick_precision
from labeler.sources.class_names import IMAGENET_CLASSES, imagenet_names
from model import load_reference_checkpoint
from model.token_heads import TokenLabelHeads
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from train.evaluation.evaluate import evaluate, read_real_labels
from train.evaluation.tally import SEVERAL, ClassAccuracy, Confusion, Tally, class_accuracies, confusions
from train.loaders import evaluation_loader
from train.network import restore_network
from train.ranks.distributed import joined_ranks
from train.record.checkpoint import read_weights
from train.record.checkpoint_folders import checkpoint_of, find_checkpoint
from train.segmentation.network import is_segmentation

log = logging.getLogger("train")


@dataclass(frozen=True)
class Trained:
    """A trained model with its preprocessing and classes.

    Attributes:
        net: the model, in evaluation mode.
        name: where it was loaded from.
        transform: mean, std, crop_pct, crop_mode, orientation.
        class_names: one for each class, or empty.
        class_folders: folder or label -> class id; empty: all folders of the images, sorted.
        dense_trained: whether the auxiliary head was trained.
        precision: of the forward pass on a GPU.
        recorded: whether all this was read from a checkpoint's record; otherwise it is assumed.
        aux_class_names: names of the auxiliary head's classes, if they are others than those of the class head.
    """

    net: TokenLabelHeads
    name: str
    transform: dict[str, Any]
    class_names: list[str]
    class_folders: dict[str, int]
    dense_trained: bool = True
    precision: str = "float32"
    recorded: bool = True
    aux_class_names: tuple[str, ...] = ()

    def log_assumptions(self) -> None:
        """Log the assumed preprocessing, which a file of weights does not record but its accuracy depends on."""
        if not self.recorded:
            crop = f"crop_pct {self.transform['crop_pct']:g} ({self.transform['crop_mode']})"
            mean = ", ".join(f"{value:g}" for value in self.transform["mean"])
            log.info(
                "%s has no record beside it; assumed: %d×%d pixels, %s, mean %s, weight of the auxiliary head %g; "
                "`img_size` and `crop_pct` change the first two",
                self.name, self.side, self.side, crop, mean, self.net.aux_weight,
            )  # fmt: skip

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of its forward pass: as in training on a GPU, float32 on a CPU."""
        return torch.float32 if device.type == "cpu" else DTYPES[pick_precision(self.precision, device)]

    @property
    def side(self) -> int:
        """Side of the square input in pixels. Raises InputError if it is not square."""
        height, width = cast(tuple[int, int], self.net.img_size)
        if height != width:
            raise InputError("only models with square inputs can be used", got=f"{height}×{width}")
        return height

    def class_name(self, number: int) -> str:
        """The name of class `number`; else that of its folder; else "class <number>"."""
        if number < len(self.class_names):
            return self.class_names[number]
        return next((folder for folder, c in self.class_folders.items() if c == number), f"class {number}")

    def aux_class_name(self, number: int) -> str:
        """The name of class `number` of the auxiliary head."""
        if self.net.aux_classes is None:
            return self.class_name(number)
        return self.aux_class_names[number] if number < len(self.aux_class_names) else f"class {number}"


@dataclass(frozen=True)
class Validation:
    """Result of an evaluation.

    Attributes:
        top1: share of the images whose true class is the most probable one.
        top5: share of the images whose true class is among the five most probable ones.
        images: number of images.
        checkpoint: what was evaluated.
        per_class: each class that has images, the worst first.
        confusions: each pair of true class and wrong prediction that occurs, the most frequent first.
        several: number of images with several right classes (ImageNet-ReaL), which count in neither of these two.
    """

    top1: float
    top5: float
    images: int
    checkpoint: str
    per_class: tuple[ClassAccuracy, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    several: int = 0

    def text(self, per_class: bool = False, most: int = 0) -> str:
        """The result as lines of text.

        Args:
            per_class: include each class's accuracy.
            most: how many of the confusions to include.

        Returns:
            The text.
        """
        lines = [f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {self.images:,} images; {self.checkpoint}"]
        if self.several and (per_class or most):
            lines.append(f"{self.several:,} images have several right classes and are not included below")
        if per_class:
            lines += [" top-1    top-5   images  class"]
            lines += [f"{one.top1:7.2%}  {one.top5:7.2%}  {one.images:7,}  {one.name}" for one in self.per_class]
        if most:
            lines += [" images  is  ->  taken for"]
            lines += [f"{one.images:7,}  {one.name}  ->  {one.taken_for}" for one in self.confusions[:most]]
        return "\n".join(lines)


def load_trained(
    path: str | Path, ema: bool | None = None, img_size: int | None = None, crop_pct: float | None = None
) -> Trained:
    """Load a trained model.

    Args:
        path: a run's folder, one of its checkpoints, a file of weights in one, or a published DeMansia, Vim or LV-ViT
            file.
        ema: load the averaged weights; None: if the file is theirs, or if they had the better accuracy.
        img_size: side of the input in pixels; None: as in training.
        crop_pct: share of the image's shorter side that the evaluation's crop keeps, above 0, up to 1; None: as in
            training.

    Returns:
        The model with its preprocessing.

    Raises:
        InputError: it is none of these, or does not fit the arguments.
        IntegrityError: the checkpoint is damaged.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise InputError("crop_pct is out of range", got=crop_pct, expected="more than 0, up to 1")
    trained = _load(Path(path), ema)
    if img_size is not None and img_size != trained.side:
        try:
            trained.net.set_input_size(img_size)  # type: ignore[operator]
        except (ModelError, AssertionError, RuntimeError, ValueError) as error:
            raise InputError(f"{trained.name} cannot take {img_size}×{img_size} pixels", got=error) from None
    return trained if crop_pct is None else replace(trained, transform={**trained.transform, "crop_pct": crop_pct})


def _load(path: Path, ema: bool | None) -> Trained:
    recorded = checkpoint_of(path)
    if path.is_dir() or recorded:
        folder, info, averaged = recorded or (*find_checkpoint(path), None)
        if is_segmentation(info):
            raise InputError(
                "this command is for classifiers", got=f"{folder}, of a segmentation run",
                remedy="`predict` and `validate --masks` take it.",
            )  # fmt: skip
        if ema is None:
            ema = averaged
        if ema is None:
            ema = info.accuracy.get("ema_top1", -1.0) > info.accuracy.get("top1", -1.0)
        net = restore_network(info, read_weights(folder, info, ema))
        dense = info.config["loss"]["dense_weight"] > 0
        name = f"{folder} (moving average)" if ema else str(folder)
        transform = {"orientation": "exif", **info.transform}
        precision = info.config["run"]["precision"]
        names, aux_names = info.class_names, tuple(info.aux_class_names)
        folders = info.class_folders
        return Trained(net, name, transform, names, folders, dense, precision, aux_class_names=aux_names)
    try:
        net = load_reference_checkpoint(path, ema=bool(ema))  # type: ignore[assignment]
    except ModelError as error:
        raise InputError("this checkpoint cannot be used", got=error) from None
    usual: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    transform = {
        "mean": usual.get("mean", IMAGENET_MEAN), "std": usual.get("std", IMAGENET_STD),
        "crop_pct": usual.get("crop_pct", 0.9), "crop_mode": usual.get("crop_mode", "center"),
        "orientation": "exif",
    }  # fmt: skip
    # Published models with 1,000 classes have ImageNet's, in their usual order.
    names = list(imagenet_names()[1]) if net.num_classes == IMAGENET_CLASSES else []
    return Trained(net, str(path), transform, names, {}, recorded=False)


def validate(
    checkpoint: str | Path,
    images: str | Path,
    *,
    ema: bool | None = None,
    real: str | Path | None = None,
    batch_size: int = 64,
    backend: str = "auto",
    device: str = "auto",
    img_size: int | None = None,
    crop_pct: float | None = None,
    progress: bool = True,
) -> Validation:
    """Evaluate a checkpoint on images of known classes; under torchrun the images are shared by all ranks.

    Args:
        checkpoint: as for `load_trained`.
        images: as for `labeler.open_source`, in class folders or with labels.
        ema: as for `load_trained`.
        real: ImageNet-ReaL's `real.json`, for the validation images of ImageNet, with or without class folders; None:
            the class folders are the true classes.
        batch_size: images of one rank at a time.
        backend: as in `pipeline.LoaderConfig`.
        device: "auto", "cpu" or "cuda".
        img_size: as for `load_trained`.
        crop_pct: as for `load_trained`.
        progress: show a progress bar.

    Returns:
        Accuracy over all ranks, in total and by class.

    Raises:
        InputError: the checkpoint or the images cannot be used.
        IntegrityError: the checkpoint is damaged.
    """
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    labels = None if real is None else read_real_labels(Path(real), trained.net.num_classes)
    with joined_ranks(device) as ranks:
        net: Any = trained.net.to(ranks.device)
        show_progress = progress and ranks.first
        settings: dict[str, Any] = {
            "image_size": trained.side,
            "grid": tuple(net.grid),
            "num_classes": net.num_classes,
            "transform": trained.transform,
            "ranks": ranks,
            "batch_size": batch_size,
            "backend": backend,
            "progress": show_progress,
        }
        classes = "teacher" if labels is None else "none"
        loader = evaluation_loader(
            str(images), class_folders=trained.class_folders or None, classes=classes, **settings
        )
        if ranks.first:
            trained.log_assumptions()
        precision = trained.dtype(ranks.device)
        tally = Tally()
        accuracy = evaluate(
            {"": net}, loader, ranks, precision=precision, real=labels, progress=show_progress, tally=tally
        )[""]
        rows = tally.merged(ranks)
    return Validation(
        accuracy.top1,
        accuracy.top5,
        accuracy.images,
        trained.name,
        class_accuracies(rows, trained.class_name),
        confusions(rows, trained.class_name),
        int((rows[:, 0] == SEVERAL).sum()),
    )
