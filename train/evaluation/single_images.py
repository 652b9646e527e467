"""Images that belong to no data set: what a command line names, and what the network sees of them.

Legend: B images; S input side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError, error_text
from labeler.config import LabelerConfig
from labeler.sources.images import OF_THE_MACHINE, BadImage, check_header, find_images, image_path
from labeler.sources.pixels import open_rgb
from pipeline.augment.crops import center_crops
from pipeline.prefetcher import Prefetcher
from train.errors import TrainError
from train.evaluation.validate import Trained

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class ClassShare:
    """A class of an answer, and its probability."""

    id: int
    name: str
    probability: float


class ImageFile(NamedTuple):
    """An image to look at.

    folder   the folder that it was found in; "" where it was named itself
    key      its path below that folder
    problem  why it cannot be opened, where that is known already
    """

    folder: str
    key: str
    problem: str | None = None

    @property
    def path(self) -> str:
        return str(image_path(Path(self.folder), self.key)) if self.folder else self.key


def list_images(paths: Iterable[str | Path], lines: Iterable[str] = ()) -> list[ImageFile]:
    """Image files as they are named, and all below each folder, in the labeler's order. No more than names are kept.

    lines  stand for the path "-": a path in each
    Raises InputError for a path that is not there, and for a folder without images.
    """
    found: list[ImageFile] = []
    for path in paths:
        if str(path) == STANDARD_INPUT:
            named = [ImageFile("", line) for line in (line.rstrip("\r\n") for line in lines) if line]
            if not named:
                raise InputError("no image is named on standard input", expected="a path in each line")
            found += named
        elif os.path.isdir(path):
            images = find_images(path)
            found += [ImageFile(str(path), key, images.problems.get(i)) for i, key in enumerate(images.keys)]
        else:
            try:
                os.stat(path)
            except OSError as error:
                raise InputError(f"the image {printable(path)!r} cannot be read", got=error.strerror) from None
            found.append(ImageFile("", str(path)))
    return found


def seen_ahead(
    images: Sequence[ImageFile], trained: Trained, batch_size: int, threads: int | None = None
) -> Iterator[list[np.ndarray | BadImage]]:
    """For each batch of images what `see` says of them, decoded while the network is at work on the one before.

    At most three batches of pixels exist at a time. threads: None for one per core.
    """

    def look(image: ImageFile) -> np.ndarray | BadImage:
        if image.problem is not None:
            return BadImage(image.problem)
        try:
            return see(image.path, trained)
        except BadImage as error:
            return error

    def batches() -> Iterator[list[np.ndarray | BadImage]]:
        with ThreadPoolExecutor(threads or usable_cores(), "decoder") as pool:
            for start in range(0, len(images), batch_size):
                yield list(pool.map(look, images[start : start + batch_size]))

    ahead = Prefetcher(batches(), depth=1)
    try:
        yield from ahead
    finally:
        ahead.close()


def see(path: str | Path, trained: Trained) -> np.ndarray:
    """uint8 [S, S, 3]: what the network sees of an image file, resized and cropped as in the evaluation.

    Raises BadImage where it is no image that can be decoded, TrainError where this machine is to blame.
    """
    try:
        data = Path(path).read_bytes()
    except ValueError as error:  # a name that no file can have
        raise BadImage(f"cannot be read: {error}") from None
    except OSError as error:
        why = error_text(OSError(error.errno, error.strerror))
        if error.errno in OF_THE_MACHINE:
            raise TrainError(f"the image {printable(path)!r} cannot be read on this machine", got=why) from None
        raise BadImage(f"cannot be read: {why}") from None
    check_header(data, 1, LabelerConfig.max_pixels)
    try:
        image = open_rgb(data, trained.transform["orientation"])
    except Exception as error:  # PIL's decoders raise many types
        raise BadImage(f"cannot be decoded: {error_text(error)}") from None
    side, how = trained.side, trained.transform
    window = center_crops(np.array([[image.height, image.width]]), side, how["crop_pct"], how["crop_mode"])
    y0, x0, y1, x1 = window[0].tolist()
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)))


def normalized(shown: Sequence[np.ndarray], trained: Trained) -> torch.Tensor:
    """float32 [B, 3, S, S]: the network's input."""
    mean, std = (torch.tensor(trained.transform[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255 - mean) / std


def printable(path: str | Path) -> str:
    """A name that can be printed, also where its bytes are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()
