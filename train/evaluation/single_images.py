"""Single images, outside of a data set: files named on a command line, and the network's input for them.

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
from labeler.sources.decoding.check_header import check_header
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.image_list import image_path
from labeler.sources.image_source import OF_THE_MACHINE, BadImage, ImageSource
from labeler.sources.open_source import holds_images, open_source
from pipeline.augment.crops import center_crops
from pipeline.prefetcher import Prefetcher
from train.errors import TrainError
from train.evaluation.validate import Trained

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class ClassShare:
    """A class and its probability.

    Attributes:
        id: class id.
        name: its name.
        probability: 0 to 1.
    """

    id: int
    name: str
    probability: float


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        folder: the folder or archive that was searched; "": the file was named itself.
        key: its path below that folder.
        problem: why it cannot be opened, if that is known already.
        archive: the archive that it is in, and its position there; None: it is a file.
    """

    folder: str
    key: str
    problem: str | None = None
    archive: tuple[ImageSource, int] | None = None

    @property
    def path(self) -> str:
        """The file's path."""
        if self.archive is not None:
            return f"{self.folder}/{self.key}"
        return str(image_path(Path(self.folder), self.key)) if self.folder else self.key

    def read(self) -> bytes:
        """Read the file. Raises BadImage or TrainError if that fails."""
        return read_file(self.path) if self.archive is None else self.archive[0].read(self.archive[1])


def list_images(paths: Iterable[str | Path], lines: Iterable[str] = ()) -> list[ImageFile]:
    """List image files as they are named, and all images of each folder, list or archive, in the labeler's order.

    Args:
        paths: files, and what `open_source` takes; "-" stands for the paths in `lines`.
        lines: paths, one per line.

    Returns:
        The files; only names are kept.

    Raises:
        InputError: a path does not exist, or a folder contains no images.
    """
    files: list[ImageFile] = []
    for path in paths:
        if str(path) == STANDARD_INPUT:
            named = [ImageFile("", line) for line in (line.rstrip("\r\n") for line in lines) if line]
            if not named:
                raise InputError("no image is named on standard input", expected="one path per line")
            files += named
        elif holds_images(path):
            images = open_source(path)
            folder, packed = images.folder, images.folder is None
            files += [
                ImageFile(folder or str(path), key, images.problems.get(i), (images, i) if packed else None)
                for i, key in enumerate(images.keys)
            ]
        else:
            try:
                os.stat(path)
            except OSError as error:
                raise InputError(f"the image {printable(path)!r} cannot be read", got=error.strerror) from None
            files.append(ImageFile("", str(path)))
    return files


def load_batches(
    images: Sequence[ImageFile], trained: Trained, batch_size: int, threads: int | None = None
) -> Iterator[list[np.ndarray | BadImage]]:
    """Load images with `load_image` in batches, each while the network works on the previous one.

    At most three batches of pixels are in memory at a time.

    Args:
        images: the files.
        trained: the model, for its preprocessing.
        batch_size: images per batch.
        threads: threads that decode; None: one per core.

    Yields:
        For each batch, pixels uint8 [S, S, 3] of each image, or why it cannot be used.

    Raises:
        TrainError: this machine cannot read an image.
    """

    def load(image: ImageFile) -> np.ndarray | BadImage:
        if image.problem is not None:
            return BadImage(image.problem)
        try:
            return load_image(image, trained)
        except BadImage as error:
            return error

    def batches() -> Iterator[list[np.ndarray | BadImage]]:
        with ThreadPoolExecutor(threads or usable_cores(), "decoder") as pool:
            for start in range(0, len(images), batch_size):
                yield list(pool.map(load, images[start : start + batch_size]))

    ahead = Prefetcher(batches(), depth=1)
    try:
        yield from ahead
    finally:
        ahead.close()


def load_image(image: str | Path | ImageFile, trained: Trained) -> np.ndarray:
    """Load an image file, resized and cropped as in the evaluation.

    Args:
        image: the file.
        trained: the model, for its preprocessing.

    Returns:
        uint8 [S, S, 3].

    Raises:
        BadImage: the file is not an image that can be decoded.
        TrainError: this machine cannot read the file.
    """
    pixels = open_image(image, trained.transform["orientation"])
    side, how = trained.side, trained.transform
    window = center_crops(np.array([[pixels.height, pixels.width]]), side, how["crop_pct"], how["crop_mode"])
    y0, x0, y1, x1 = window[0].tolist()
    return np.asarray(pixels.resize((side, side), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)))


def open_image(image: str | Path | ImageFile, orientation: str) -> Image.Image:
    """Open an image file in RGB, at its own size. Raises BadImage or TrainError as `load_image` does.

    Args:
        image: the file.
        orientation: "exif" or "ignore".
    """
    if isinstance(image, ImageFile) and image.problem is not None:
        raise BadImage(image.problem)
    data = image.read() if isinstance(image, ImageFile) else read_file(image)
    check_header(data, 1, LabelerConfig.max_pixels)
    try:
        return open_rgb(data, orientation)
    except Exception as error:  # PIL's decoders raise many types
        raise BadImage(f"cannot be decoded: {error_text(error)}") from None


def read_file(path: str | Path) -> bytes:
    """Read an image file. Raises BadImage if that fails, or TrainError if this machine is at fault."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # a name that no file can have
        raise BadImage(f"cannot be read: {error}") from None
    except OSError as error:
        reason = error_text(OSError(error.errno, error.strerror))
        if error.errno in OF_THE_MACHINE:
            raise TrainError(f"the image {printable(path)!r} cannot be read on this machine", got=reason) from None
        raise BadImage(f"cannot be read: {reason}") from None


def normalized(images: Sequence[np.ndarray], trained: Trained) -> torch.Tensor:
    """Images uint8 [S, S, 3] to the network's input, float32 [B, 3, S, S]."""
    mean, std = (torch.tensor(trained.transform[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std


def printable(path: str | Path) -> str:
    """A path as text that can be printed, even if its bytes are not valid UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()
