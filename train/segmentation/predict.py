"""`predict` and `validate` of a segmentation run: masks of images, pictures of them, and their mean IoU.

Legend: C classes; H, W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from labeler.sources.image_source import BadImage
from pipeline.targets.mask_files import MaskFolder
from train.evaluation.single_images import list_images, open_image, printable
from train.evaluation.token_map import picture_names, write_picture
from train.ranks.distributed import joined_ranks
from train.recipes.config import SegmentationConfig
from train.record.checkpoint import read_weights
from train.record.checkpoint_folders import checkpoint_of, find_checkpoint
from train.segmentation.evaluate import MaskedImages, Window, evaluate_segmentation, scores_of
from train.segmentation.network import SegmentationNetwork, is_segmentation, restore_segmentation, settings_of
from train.segmentation.overlay import draw_overlay, palette
from train.segmentation.score import SegmentationScore


@dataclass(frozen=True)
class Segmenter:
    """A trained network for masks.

    Attributes:
        net: the network, in evaluation mode.
        name: where it was loaded from.
        settings: the section `segmentation` of its run.
        transform: mean, std and orientation.
        names: of the classes.
    """

    net: SegmentationNetwork
    name: str
    settings: SegmentationConfig
    transform: dict[str, Any]
    names: tuple[str, ...]

    @property
    def window(self) -> Window:
        """How images are shown to it, as in its run's evaluation."""
        return Window(self.net.img_size[0], self.settings.evaluation == "sliding", self.settings.window_step)


@dataclass(frozen=True)
class MaskPrediction:
    """The mask of an image.

    Attributes:
        image: the image's path.
        shares: class -> share of the pixels, the largest first; empty if the image cannot be used.
        mask: file of the mask, a class id in each pixel.
        overlay: file of the picture.
        problem: why the image cannot be used; None: it can.
    """

    image: str
    shares: dict[str, float]
    mask: str | None = None
    overlay: str | None = None
    problem: str | None = None

    def text(self) -> str:
        """The prediction as lines of text."""
        if self.problem is not None:
            return f"{self.image}: left out, {self.problem}"
        lines = [self.image, *(f"  {share:7.2%}  {name}" for name, share in list(self.shares.items())[:5])]
        return "\n".join([*lines, f"  mask: {self.mask}", f"  overlay: {self.overlay}"])


@dataclass(frozen=True)
class MaskValidation:
    """Result of an evaluation.

    Attributes:
        score: mean IoU and pixel accuracy.
        checkpoint: what was evaluated.
        names: of the classes.
    """

    score: SegmentationScore
    checkpoint: str
    names: tuple[str, ...]

    def text(self, per_class: bool = False) -> str:
        """The result as lines of text."""
        score = self.score
        lines = [
            f"mean IoU {score.miou:.2%}, pixel accuracy {score.pixel_accuracy:.2%} of {score.images:,} images; "
            f"{self.checkpoint}"
        ]
        if per_class:
            lines.append("    IoU        pixels  class")
            ranked = sorted(
                zip(score.iou, score.pixels, self.names, strict=True), key=lambda row: (row[0] != row[0], row[0])
            )
            lines += [
                f"{'   none' if iou != iou else f'{iou:7.2%}'}  {pixels:12,}  {name}" for iou, pixels, name in ranked
            ]
        return "\n".join(lines)


def find_segmenter(path: str | Path, ema: bool | None = None) -> Segmenter | None:
    """Loads the network of a segmentation run; None: the checkpoint is not of such a run.

    Args:
        path: a run's folder, or one of its checkpoints.
        ema: load the averaged weights; None: if they had the better mean IoU.

    Raises:
        InputError: there is no checkpoint.
        IntegrityError: it is damaged.
    """
    path = Path(path)
    recorded = checkpoint_of(path)
    if not (path.is_dir() or recorded):
        return None
    folder, info, averaged = recorded or (*find_checkpoint(path), None)
    if not is_segmentation(info):
        return None
    if ema is None:
        better = info.accuracy.get("ema_miou", -1.0) > info.accuracy.get("miou", -1.0)
        ema = better if averaged is None else averaged
    net = restore_segmentation(info, read_weights(folder, info, ema))
    names = tuple(info.class_names) or tuple(f"class {number}" for number in range(info.num_classes))
    return Segmenter(net, f"{folder}{' (moving average)' if ema else ''}", settings_of(info), info.transform, names)


def predict_masks(
    segmenter: Segmenter,
    images: Sequence[str | Path],
    out: Path,
    *,
    device: str = "auto",
    lines: Iterable[str] = (),
    progress: bool = True,
) -> Iterator[MaskPrediction]:
    """Segments images, one after another, and writes a mask and a picture of each.

    An image that cannot be used is no error: its prediction says why.

    Args:
        segmenter: the network.
        images: files and folders; "-" stands for the paths in `lines`.
        out: folder for masks and pictures.
        device: "auto", "cpu" or "cuda".
        lines: paths, one per line.
        progress: show a progress bar.

    Returns:
        An iterator over predictions, in the order of the images.

    Raises:
        InputError: raised at the call: a path does not exist, or `out` is among the images.
    """
    files = list_images(images, lines)
    masks, overlays = picture_names(out, files, ".mask.png"), picture_names(out, files, ".overlay.png")
    colors = palette(len(segmenter.names))

    def predictions() -> Iterator[MaskPrediction]:
        named = zip(files, masks, overlays, strict=True)
        with joined_ranks(device) as ranks:
            net = segmenter.net.to(ranks.device)
            for file, mask, overlay in tqdm(named, "images", len(files), leave=False, disable=not progress):
                name = printable(file.path)
                try:
                    pixels = np.asarray(open_image(file, segmenter.transform["orientation"]))
                except BadImage as error:
                    yield MaskPrediction(name, {}, problem=str(error))
                    continue
                ids = scores_of(net, pixels, segmenter.transform, segmenter.window, ranks.device).argmax(0).cpu()
                write_picture(mask, _mask_picture(ids, colors))
                write_picture(overlay, draw_overlay(pixels, ids.numpy(), colors, segmenter.names))
                yield MaskPrediction(name, _shares(ids, segmenter.names), printable(mask), printable(overlay))

    return predictions()


def validate_masks(
    segmenter: Segmenter, images: str, masks: str, *, device: str = "auto", progress: bool = True
) -> MaskValidation:
    """Scores a network on images with masks; under torchrun the images are shared by all ranks.

    Args:
        segmenter: the network.
        images: folder of images.
        masks: folder of their masks.
        device: "auto", "cpu" or "cuda".
        progress: show a progress bar.

    Returns:
        Mean IoU, pixel accuracy and the IoU of each class.

    Raises:
        InputError: an image has no mask, or no pixel is labeled.
        IntegrityError: an image or a mask cannot be read.
    """
    folder = MaskFolder(masks, len(segmenter.names), segmenter.settings.ignore_index)
    data = MaskedImages(images, folder, segmenter.transform, segmenter.window)
    with joined_ranks(device) as ranks:
        net = {"": segmenter.net.to(ranks.device)}
        score = evaluate_segmentation(net, data, ranks, progress=progress and ranks.first)[""]
    return MaskValidation(score, segmenter.name, segmenter.names)


def _mask_picture(ids: torch.Tensor, colors: np.ndarray) -> Image.Image:
    """A PNG file of class ids, which viewers show in the classes' colors."""
    picture = Image.fromarray(ids.numpy().astype(np.uint8), "P")
    picture.putpalette(colors.astype(np.uint8).tobytes())
    return picture


def _shares(ids: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    counts = torch.bincount(ids.flatten(), minlength=len(names)) / ids.numel()
    return {
        names[number]: counts[number].item() for number in counts.argsort(descending=True).tolist() if counts[number]
    }
