"""Evaluation of segmentation networks at the images' own size: whole images, or a window that slides over them.

Legend: B images; C classes; H, W height and width of an image; S the window's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from labeler.base.errors import IntegrityError, error_text
from labeler.base.runtime import on_device
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.open_source import open_source
from pipeline.samples import scan_sizes, unreadable
from pipeline.targets.mask_files import MaskFolder, MaskSurvey, survey_masks
from train.errors import Stopped
from train.ranks.distributed import Ranks
from train.segmentation.network import MULTIPLE
from train.segmentation.score import SegmentationScore, count_pixels, score_of


@dataclass(frozen=True)
class MaskedImages:
    """The images of an evaluation, with their masks.

    Attributes:
        images: folder of images, or what `open_source` takes.
        masks: their masks.
        transform: mean, std and orientation.
        window: how images are shown to the network; see `Window`.

    Raises:
        InputError: an image has no mask.
        IntegrityError: an image or a mask cannot be used.
    """

    images: str
    masks: MaskFolder
    transform: Mapping[str, Any]
    window: Window

    def __post_init__(self) -> None:
        self.masks.check_all_there(self.source.keys)
        _ = self.survey  # refuses a bad mask before any work

    @cached_property
    def survey(self) -> MaskSurvey:
        """What the masks hold; all of them are read."""
        sizes = scan_sizes(self.source, self.transform["orientation"], None, False)
        return survey_masks(self.masks, self.samples, sizes)

    @cached_property
    def source(self) -> Any:
        return open_source(self.images)

    @property
    def samples(self) -> Sequence[str]:
        """The images' keys."""
        return self.source.keys

    def pixels(self, position: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises IntegrityError if the image cannot be read."""
        try:
            return np.asarray(open_rgb(self.source.read(position), self.transform["orientation"]))
        except IntegrityError:
            raise
        except Exception as error:  # PIL's decoders raise errors of many types
            raise unreadable(self.source.path(position), error_text(error)) from None


@dataclass(frozen=True)
class Window:
    """How an image is shown to the network.

    Attributes:
        side: S, the side of the network's input in training.
        sliding: a window of S×S pixels slides over the image, and scores are averaged; else the whole image is one
            input, its sides rounded to multiples of 32.
        step: of the sliding window, in sides.
    """

    side: int
    sliding: bool = False
    step: float = field(default=2 / 3)


def evaluate_segmentation(
    networks: Mapping[str, nn.Module],
    images: MaskedImages,
    ranks: Ranks,
    *,
    precision: torch.dtype = torch.float32,
    progress: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> dict[str, SegmentationScore]:
    """Scores several networks in one pass over the images; they stay in evaluation mode.

    Args:
        networks: name -> network.
        images: images and masks.
        ranks: the ranks that share the images.
        precision: of the forward pass.
        progress: show a progress bar.
        wanted: called before every image; False raises Stopped.

    Returns:
        Name -> score over all ranks.

    Raises:
        Stopped: `wanted` returned False.
        InputError: no pixel is labeled.
        IntegrityError: an image or a mask cannot be read.
    """
    masks = images.masks
    tables = torch.zeros(len(networks), masks.num_classes, masks.num_classes, dtype=torch.int64)
    for net in networks.values():
        ranks.share_buffers(net)
        net.eval()
    own = range(ranks.rank, len(images.samples), ranks.world_size)
    for position, pixels in tqdm(_ahead(images, own), "evaluation", len(own), leave=False, disable=not progress):
        if not wanted():
            raise Stopped(
                "stopped during an evaluation", remedy="All steps are saved: `resume=auto` continues from there."
            )
        mask = torch.from_numpy(masks.read(images.samples[position], pixels.shape[:2]))
        for table, net in zip(tables, networks.values(), strict=True):
            scores = scores_of(net, pixels, images.transform, images.window, ranks.device, precision)
            table += count_pixels(scores.argmax(0).cpu(), mask, masks.num_classes, masks.ignore_index)
    total = np.sum(ranks.gather(tables.numpy()), axis=0)
    return {name: score_of(table, len(images.samples)) for name, table in zip(networks, total, strict=True)}


def scores_of(
    net: nn.Module,
    pixels: np.ndarray,
    transform: Mapping[str, Any],
    window: Window,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Class scores of an image's pixels.

    Args:
        net: the network, in evaluation mode.
        pixels: uint8 [H, W, 3].
        transform: mean and std.
        window: how the image is shown to the network.
        device: of the network.
        precision: of the forward pass.

    Returns:
        float32 [C, H, W].
    """
    mean, std = (torch.tensor(transform[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    image = (on_device(pixels.transpose(2, 0, 1).copy(), device).float() / 255 - mean) / std
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return _slide(net, image, window) if window.sliding else _whole(net, image)


def _whole(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """One pass over an image [3, H, W], resized to sides that the network takes."""
    sides = [max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in image.shape[1:]]
    return _resized(net(_resized(image[None], sides)).float(), image.shape[1:])[0]


def _slide(net: nn.Module, image: torch.Tensor, window: Window) -> torch.Tensor:
    """The mean of all windows over each pixel of an image [3, H, W]; a smaller image is enlarged first."""
    size, side = image.shape[1:], window.side
    scale = max(1.0, side / min(size))
    if scale > 1:
        image = _resized(image[None], [math.ceil(length * scale) for length in size])[0]
    total, count = None, torch.zeros(image.shape[1:], device=image.device)
    for top in _starts(image.shape[1], side, window.step):
        for left in _starts(image.shape[2], side, window.step):
            place = (..., slice(top, top + side), slice(left, left + side))
            scores = net(image[place][None]).float()[0]
            if total is None:
                total = torch.zeros(len(scores), *image.shape[1:], device=image.device)
            total[place] += scores
            count[place] += 1
    assert total is not None
    return _resized((total / count)[None], size)[0]


def _starts(length: int, side: int, step: float) -> list[int]:
    """Where windows begin, equally spaced, the last one at the end; at most `step` sides apart."""
    count = math.ceil((length - side) / (side * step)) + 1
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _resized(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False)


def _ahead(images: MaskedImages, positions: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes each image while the network works on the one before it."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for position in positions:
            decoding = position, pool.submit(images.pixels, position)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = decoding
        if waiting is not None:
            yield waiting[0], waiting[1].result()
