"""Top-1 and top-5 accuracy, exact over ranks, and the loss.

Legend: B images; C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from labeler.base.errors import InputError
from pipeline.batch import Batch
from pipeline.loader import TokenLabelLoader
from train.errors import Stopped
from train.evaluation.tally import Tally
from train.ranks.distributed import Ranks

RealLabels = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Accuracy:
    """Shares of `images` whose class is the first, or among the first five, of the model's answer.

    loss  mean cross-entropy with the true class; NaN with ReaL labels, where several are right
    """

    top1: float
    top5: float
    images: int
    loss: float


def evaluate(
    networks: Mapping[str, nn.Module],
    loader: TokenLabelLoader,
    ranks: Ranks,
    *,
    precision: torch.dtype = torch.float32,
    channels_last: bool = False,
    real: RealLabels | None = None,
    progress: bool = False,
    wanted: Callable[[], bool] = lambda: True,
    tally: Tally | None = None,
) -> dict[str, Accuracy]:
    """Accuracy of several networks in one pass over the images; they are left in evaluation mode.

    real    file name -> classes that are right (ImageNet-ReaL); images with none do not count
    wanted  asked before every batch; False raises Stopped
    tally   is told of every image, for a single network
    """
    for net in networks.values():
        ranks.share_buffers(net)
        net.eval()
    counts = torch.zeros(len(networks), 3, dtype=torch.int64, device=ranks.device)
    losses = torch.zeros(len(networks), dtype=torch.float64, device=ranks.device)
    bar = tqdm(loader, "evaluation", leave=False, disable=not progress)
    with torch.inference_mode():
        for batch in bar:
            if not wanted():
                raise Stopped(
                    "stopped in an evaluation", remedy="What is trained is saved: --resume auto continues from there."
                )
            right = _right_classes(batch, loader.num_classes, real)
            images = batch.images.contiguous(memory_format=torch.channels_last) if channels_last else batch.images
            for i, net in enumerate(networks.values()):
                with torch.autocast(ranks.device.type, precision, enabled=precision != torch.float32):
                    logits = net(images)
                counts[i] += count_right(logits, right)
                if tally is not None:
                    tally.add(logits, right)
                losses[i] += nn.functional.cross_entropy(
                    logits.float(), batch.labels.long(), ignore_index=-1, reduction="sum"
                )
    totals, sums = ranks.sum(counts).tolist(), ranks.sum(losses).tolist()
    if totals and totals[0][2] == 0:
        raise InputError("there is no image to evaluate", got=f"none with a known class of {len(loader.samples)}")
    return {
        name: Accuracy(first / images, five / images, images, loss / images if real is None else math.nan)
        for name, (first, five, images), loss in zip(networks, totals, sums, strict=True)
    }


def count_right(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int64 [3]: images right at first, right within five, and that count; `right` bool [B, C]: which classes are."""
    first = logits.topk(min(5, logits.shape[1])).indices
    hits = right.gather(1, first)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), right.any(1).sum()])


def _right_classes(batch: Batch, count: int, real: RealLabels | None) -> torch.Tensor:
    right = torch.zeros(len(batch), count, dtype=torch.bool, device=batch.images.device)
    if real is None:
        known = batch.labels >= 0
        right[known, batch.labels[known]] = True
        return right
    for i, key in enumerate(batch.keys):
        right[i, list(real.get(PurePosixPath(key).name, ()))] = True
    return right


def read_real_labels(path: Path, num_classes: int, names: tuple[str, ...] | None = None) -> RealLabels:
    """ImageNet-ReaL's `real.json`: for each validation image a list of right classes, in the order of their names."""
    try:
        content: Any = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"the ReaL labels {str(path)!r} cannot be read", got=error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no file of ReaL labels", got=error) from None
    fits = isinstance(content, list) and all(
        isinstance(entry, list) and all(type(c) is int and 0 <= c < num_classes for c in entry) for entry in content
    )
    if not fits:
        raise InputError(
            f"{path} is no file of ReaL labels", expected=f"a list of lists of classes below {num_classes}"
        )
    names = names or tuple(f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(len(content)))
    return {name: tuple(entry) for name, entry in zip(names, content, strict=True)}
