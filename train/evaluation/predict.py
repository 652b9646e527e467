"""`predict`: the most probable classes of images, and maps of the token head's classes.

Legend: B images; C classes; S input side; h×w token grid.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from labeler.base.errors import InputError
from labeler.sources.image_source import BadImage
from train.evaluation.single_images import ClassShare, list_images, load_batches, normalized, printable
from train.evaluation.token_map import draw_map, picture_names, write_picture
from train.evaluation.validate import Trained, load_trained
from train.ranks.distributed import joined_ranks

log = logging.getLogger("train")


@dataclass(frozen=True)
class Prediction:
    """Prediction for an image.

    Attributes:
        image: the image's path.
        classes: the most probable classes, in descending order; empty if the image cannot be used.
        map: path of the picture of its tokens; None: not requested.
        problem: why the image cannot be used; None: it can.
    """

    image: str
    classes: tuple[ClassShare, ...]
    map: str | None = None
    problem: str | None = None

    def text(self) -> str:
        """The prediction as lines of text."""
        if self.problem is not None:
            return f"{self.image}: left out, {self.problem}"
        lines = [self.image, *(f"  {share.probability:7.2%}  {share.name}" for share in self.classes)]
        return "\n".join([*lines, *([f"  map: {self.map}"] if self.map else [])])


def predict(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    ema: bool | None = None,
    maps: str | Path | None = None,
    device: str = "auto",
    img_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 32,
    threads: int | None = None,
    lines: Iterable[str] = (),
    progress: bool = True,
) -> Iterator[Prediction]:
    """Classify images, one after another; results are not kept in memory.

    An image that cannot be used is no error: its prediction says why.

    Args:
        checkpoint: as for `load_trained`.
        images: files, and what `labeler.open_source` takes; "-" stands for the paths in `lines`.
        top: how many classes to return, 1 or more.
        ema: as for `load_trained`.
        maps: folder for a picture of each image's tokens, tinted by the classes of the auxiliary head; None: no
            pictures.
        device: "auto", "cpu" or "cuda".
        img_size: as for `load_trained`.
        crop_pct: as for `load_trained`.
        batch_size: images at a time.
        threads: threads that decode images; None: one per core.
        lines: paths, one per line.
        progress: show a progress bar if there is more than one batch.

    Returns:
        An iterator over predictions, in the order of the images.

    Raises:
        InputError: raised at the call: a path does not exist, or maps are requested from a model without an auxiliary
            head.
    """
    if top < 1:
        raise InputError("`top` must be 1 or more", got=top)
    if batch_size < 1:
        raise InputError("`batch_size` must be 1 or more", got=batch_size)
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    if maps is not None:
        _refuse_without_head(trained)
    _ = trained.side  # refuses what is not square
    files = list_images(images, lines)
    pictures = itertools.repeat(None) if maps is None else picture_names(Path(maps), files)
    trained.log_assumptions()

    def predictions() -> Iterator[Prediction]:
        named = zip(files, pictures, strict=False)
        with joined_ranks(device) as ranks, _bar(len(files), progress and len(files) > batch_size) as bar:
            net = trained.net.to(ranks.device)
            for loaded in load_batches(files, trained, batch_size, threads):
                usable = [one for one in loaded if not isinstance(one, BadImage)]
                outputs = iter(_run(net, usable, trained, ranks.device, maps is not None))
                for one, (image, picture) in zip(loaded, named, strict=False):
                    name = printable(image.path)
                    if isinstance(one, BadImage):
                        yield Prediction(name, (), problem=str(one))
                        continue
                    p, tokens = next(outputs)
                    classes = _first(p, top, trained)
                    if picture is not None:
                        write_picture(picture, draw_map(one, tokens, classes, Path(image.key).name, trained))
                    yield Prediction(name, classes, None if picture is None else printable(picture))
                bar.update(len(loaded))

    return predictions()


def _bar(count: int, show_progress: bool) -> Any:
    return tqdm(desc="images", total=count, unit=" images", leave=False, disable=not show_progress)


def _run(
    net: Any, images: Sequence[np.ndarray], trained: Trained, device: torch.device, maps: bool
) -> Iterable[tuple[torch.Tensor, Any]]:
    """For each image its probabilities [C] and, with `maps`, those of its tokens [C, h, w]; float32 on the CPU."""
    if not images:
        return []
    inputs, dtype = normalized(images, trained).to(device), trained.dtype(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = net(inputs)
        tokens = net.score_maps(inputs).float().softmax(1).cpu() if maps else [None] * len(images)
    return zip(logits.float().softmax(1).cpu(), tokens, strict=True)


def _first(probabilities: torch.Tensor, top: int, trained: Trained) -> tuple[ClassShare, ...]:
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    return tuple(
        ClassShare(number, trained.class_name(number), p)
        for number, p in zip(numbers.tolist(), values.tolist(), strict=True)
    )


def _refuse_without_head(trained: Trained) -> None:
    if trained.net.aux_head is None:
        raise InputError(f"{trained.name} has no auxiliary head, so no map of its tokens", remedy="Leave out the maps.")
    if not trained.dense_trained:
        log.warning(
            "%s was trained without its auxiliary head (loss.dense_weight=0): its maps are an untrained head's",
            trained.name,
        )
