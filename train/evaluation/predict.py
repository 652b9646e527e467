"""`predict`: the most probable classes of images, and where the network's own token head sees them.

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
from labeler.sources.images import BadImage
from train.evaluation.single_images import ClassShare, list_images, normalized, printable, seen_ahead
from train.evaluation.token_map import draw_map, picture_names, write_picture
from train.evaluation.validate import Trained, load_trained
from train.ranks.distributed import joined_ranks

log = logging.getLogger("train")


@dataclass(frozen=True)
class Prediction:
    """What the network says of an image.

    classes  the most probable ones, from the first on; none where the image cannot be used
    map      the picture, None where none was asked for
    problem  why the image cannot be used, else None
    """

    image: str
    classes: tuple[ClassShare, ...]
    map: str | None = None
    problem: str | None = None

    def text(self) -> str:
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
    """The classes of images, one after the other as they are found; of all that came before nothing is kept.

    images  files and folders; "-" stands for the paths in `lines`
    top     how many classes, from the most probable on
    img_size, crop_pct  as `load_trained`
    maps    folder for a picture of each image's tokens, tinted by the classes of the auxiliary head
    threads that decode images; None for one per core
    Raises InputError at the call where a path is not there, or where maps are wanted of a model without that head. An
    image that cannot be used is no error: its prediction says why.
    """
    if top < 1:
        raise InputError("--top must be 1 or more", got=top)
    if batch_size < 1:
        raise InputError("--batch-size must be 1 or more", got=batch_size)
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    if maps is not None:
        _refuse_without_head(trained)
    _ = trained.side  # refuses what is not square
    found = list_images(images, lines)
    pictures = itertools.repeat(None) if maps is None else picture_names(Path(maps), found)
    trained.tell_assumptions()

    def answered() -> Iterator[Prediction]:
        named = zip(found, pictures, strict=False)
        with joined_ranks(device) as ranks, _bar(len(found), progress and len(found) > batch_size) as bar:
            net = trained.net.to(ranks.device)
            for seen in seen_ahead(found, trained, batch_size, threads):
                shown = [one for one in seen if not isinstance(one, BadImage)]
                answers = iter(_answers(net, shown, trained, ranks.device, maps is not None))
                for one, (image, picture) in zip(seen, named, strict=False):
                    name = printable(image.path)
                    if isinstance(one, BadImage):
                        yield Prediction(name, (), problem=str(one))
                        continue
                    p, tokens = next(answers)
                    classes = _first(p, top, trained)
                    if picture is not None:
                        write_picture(picture, draw_map(one, tokens, classes, Path(image.key).name, trained))
                    yield Prediction(name, classes, None if picture is None else printable(picture))
                bar.update(len(seen))

    return answered()


def _bar(count: int, shown: bool) -> Any:
    return tqdm(desc="images", total=count, unit=" images", leave=False, disable=not shown)


def _answers(
    net: Any, shown: Sequence[np.ndarray], trained: Trained, device: torch.device, maps: bool
) -> Iterable[tuple[torch.Tensor, Any]]:
    """Of each image its probabilities [C] and those of its tokens [C, h, w], None unless wanted; float32 on the CPU."""
    if not shown:
        return []
    inputs, dtype = normalized(shown, trained).to(device), trained.dtype(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = net(inputs)
        tokens = net.score_maps(inputs).float().softmax(1).cpu() if maps else [None] * len(shown)
    return zip(logits.float().softmax(1).cpu(), tokens, strict=True)


def _first(probabilities: torch.Tensor, top: int, trained: Trained) -> tuple[ClassShare, ...]:
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    return tuple(
        ClassShare(number, trained.class_name(number), p)
        for number, p in zip(numbers.tolist(), values.tolist(), strict=True)
    )


def _refuse_without_head(trained: Trained) -> None:
    if trained.net.aux_head is None:
        raise InputError(f"{trained.name} has no auxiliary head, so no map of its tokens", remedy="Do without --map.")
    if not trained.dense_trained:
        log.warning(
            "%s was trained without its auxiliary head (loss.dense_weight=0): --map shows an untrained head",
            trained.name,
        )
