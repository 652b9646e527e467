"""Accuracy of any checkpoint on any folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labeler.errors import InputError
from model import load_reference_checkpoint
from model.errors import ModelError
from model.token_heads import TokenLabelHeads
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from train.checkpoint import find_checkpoint, read_weights
from train.distributed import joined_ranks
from train.evaluate import evaluate, read_real_labels
from train.loaders import evaluation_loader
from train.network import restore_network


@dataclass(frozen=True)
class Trained:
    """A model ready to answer, with what it needs to know of images and classes.

    transform      mean, std, crop_pct, crop_mode
    class_folders  folder name -> class id; empty: the sorted folders of the images in their order
    """

    net: TokenLabelHeads
    name: str
    transform: dict[str, Any]
    class_names: list[str]
    class_folders: dict[str, int]


@dataclass(frozen=True)
class Validation:
    top1: float
    top5: float
    images: int
    checkpoint: str

    def text(self) -> str:
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {self.images:,} images; {self.checkpoint}"


def load_trained(path: str | Path, ema: bool = False) -> Trained:
    """A run's folder, one of its checkpoints, or a published DeMansia, Vim or LV-ViT file.

    Raises InputError or IntegrityError where it is none of these, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        folder, info = find_checkpoint(path)
        net = restore_network(info, read_weights(folder, info, ema))
        return Trained(net, str(folder), info.transform, info.class_names, info.class_folders)
    try:
        net = load_reference_checkpoint(path, ema=ema)  # type: ignore[assignment]
    except ModelError as error:
        raise InputError("this checkpoint cannot be used", got=error) from None
    usual: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    transform = {
        "mean": usual.get("mean", IMAGENET_MEAN), "std": usual.get("std", IMAGENET_STD),
        "crop_pct": usual.get("crop_pct", 0.9), "crop_mode": usual.get("crop_mode", "center"),
    }  # fmt: skip
    return Trained(net, str(path), transform, [], {})


def validate(
    checkpoint: str | Path,
    images: str | Path,
    *,
    ema: bool = False,
    real: str | Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    progress: bool = True,
) -> Validation:
    """Top-1 and top-5 of a checkpoint on a folder of class folders; under torchrun exact over all ranks.

    real  ImageNet-ReaL's `real.json`, for the validation images of ImageNet
    """
    trained = load_trained(checkpoint, ema)
    classes = trained.net.num_classes
    labels = None if real is None else read_real_labels(Path(real), classes)
    with joined_ranks(device) as ranks:
        net: Any = trained.net.to(ranks.device)
        size = net.img_size
        if size[0] != size[1]:
            raise InputError("only square inputs can be validated", got=f"{size[0]}×{size[1]}")
        loader = evaluation_loader(
            str(images),
            image_size=size[0],
            grid=tuple(net.grid),
            num_classes=classes,
            class_folders=trained.class_folders or None,
            transform=trained.transform,
            ranks=ranks,
            batch_size=batch_size,
            progress=progress and ranks.first,
        )
        precision = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        found = evaluate({"": net}, loader, ranks, precision=precision, real=labels, progress=progress and ranks.first)[
            ""
        ]
    return Validation(found.top1, found.top5, found.images, trained.name)
