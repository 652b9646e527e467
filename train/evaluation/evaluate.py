"""Top-1 and top-5 accuracy and loss, exact over ranks.

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
from labeler.base.runtime import on_device
from pipeline.batch import Batch
from pipeline.loader import TokenLabelLoader
from train.errors import Stopped
from train.evaluation.tally import Tally
from train.ranks.distributed import Ranks

RealLabels = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a model.

    Attributes:
        top1: share of the images whose true class is the most probable one.
        top5: share of the images whose true class is among the five most probable ones.
        images: number of images.
        loss: mean cross-entropy with the true class; NaN with ReaL labels, where several classes may be right.
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
    """Evaluate several networks in one pass over the images; they stay in evaluation mode.

    Args:
        networks: name -> network.
        loader: the images.
        ranks: the ranks that share the images.
        precision: of the forward pass.
        channels_last: use channels-last memory format.
        real: file name -> right classes (ImageNet-ReaL); images without any do not count. None: the true classes.
        progress: show a progress bar.
        wanted: called before every batch; False raises Stopped.
        tally: collects every image's result, for a single network.

    Returns:
        Name -> accuracy over all ranks.

    Raises:
        Stopped: `wanted` returned False.
        InputError: no image has a known class.
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
                    "stopped during an evaluation", remedy="All steps are saved: `resume=auto` continues from there."
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
    """Count right answers.

    Args:
        logits: [B, C].
        right: bool [B, C]: the right classes.

    Returns:
        int64 [3]: images whose first class is right, those with a right class among the first five, and those that have
        a right class.
    """
    first = logits.topk(min(5, logits.shape[1])).indices
    hits = right.gather(1, first)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), right.any(1).sum()])


def _right_classes(batch: Batch, count: int, real: RealLabels | None) -> torch.Tensor:
    device = batch.images.device
    if real is None:  # −1 where not known: no class
        return batch.labels[:, None] == torch.arange(count, device=device)
    right = torch.zeros(len(batch), count, dtype=torch.bool)
    for i, key in enumerate(batch.keys):
        right[i, list(real.get(PurePosixPath(key).name, ()))] = True
    return on_device(right, device)


def read_real_labels(path: Path, num_classes: int, names: tuple[str, ...] | None = None) -> RealLabels:
    """Read ImageNet-ReaL's `real.json`: a list of right classes for each validation image, in the order of names.

    Args:
        path: the file.
        num_classes: number of classes.
        names: file names of the images; None: those of the ImageNet validation set.

    Returns:
        File name -> right classes.

    Raises:
        InputError: the file cannot be read, or is not such a file.
    """
    try:
        content: Any = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"the ReaL labels {str(path)!r} cannot be read", got=error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a file of ReaL labels", got=error) from None
    fits = isinstance(content, list) and all(
        isinstance(entry, list) and all(type(c) is int and 0 <= c < num_classes for c in entry) for entry in content
    )
    if not fits:
        raise InputError(
            f"{path} is not a file of ReaL labels", expected=f"a list of lists of classes below {num_classes}"
        )
    names = names or tuple(f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(len(content)))
    return {name: tuple(entry) for name, entry in zip(names, content, strict=True)}
