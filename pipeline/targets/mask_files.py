"""Masks: for each image a file of the same name that has a class id in every pixel.

Legend: N images; H, W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError
from pipeline.classes import some

MODES = ("L", "P", "I", "I;16", "1")  # one number a pixel
MOST = 255  # ids are bytes
PROGRESS_FROM = 2_000  # masks


class MaskFolder:
    """The masks of a folder: `images/street/1.jpg` has the mask `masks/street/1.png`.

    Args:
        root: The folder.
        num_classes: Classes are 0 to num_classes − 1.
        ignore_index: The id of pixels without a class.

    Raises:
        InputError: The folder does not exist, or the numbers do not fit a byte.
    """

    def __init__(self, root: str | Path, num_classes: int, ignore_index: int) -> None:
        self.root, self.num_classes, self.ignore_index = Path(root), num_classes, ignore_index
        if not self.root.is_dir():
            raise InputError("the folder of masks does not exist", got=str(root))
        if not (1 <= num_classes <= MOST and 0 <= ignore_index <= MOST):
            got = f"{num_classes} classes, ignore_index {ignore_index}"
            raise InputError("masks hold a byte a pixel", got=got, expected=f"at most {MOST} of either")

    def path(self, key: str) -> Path:
        """Returns the path of an image's mask."""
        return (self.root / key).with_suffix(".png")

    def check_all_there(self, keys: Sequence[str]) -> None:
        """Raises InputError unless each of these images has a mask."""
        missing = [key for key in keys if not self.path(key).is_file()]
        if missing:
            raise InputError(
                f"{len(missing):,} of {len(keys):,} images have no mask in {str(self.root)!r}",
                got=some(missing),
                expected=f"{self.path(missing[0])} for {missing[0]!r}",
                remedy="Add the masks, or name the images to use in a list.",
            )

    def read(self, key: str, size: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Reads a mask.

        Args:
            key: The image's key.
            size: H, W of the image; None: any.

        Returns:
            uint8 [H, W]: class ids, or `ignore_index`.

        Raises:
            IntegrityError: It cannot be read, has another size than its image, or holds an unknown class.
        """
        path = self.path(key)
        try:
            with Image.open(path) as picture:
                mode, ids = picture.mode, np.asarray(picture)
        except Exception as error:  # PIL's decoders raise errors of many types
            raise IntegrityError(f"the mask {str(path)!r} cannot be read", got=error) from None
        if mode not in MODES or ids.ndim != 2:
            remedy = "Convert colors to class ids first."
            raise IntegrityError(f"the mask {str(path)!r} has no class ids", got=f"mode {mode}", remedy=remedy)
        if size is not None and ids.shape != tuple(int(side) for side in size):
            got = f"{ids.shape[0]}×{ids.shape[1]} pixels"
            raise IntegrityError(
                f"the mask {str(path)!r} does not fit its image", got=got, expected=f"{size[0]}×{size[1]}"
            )
        ids = ids.astype(np.int64)
        unknown = ids[(ids != self.ignore_index) & ((ids < 0) | (ids >= self.num_classes))]
        if len(unknown):
            raise IntegrityError(
                f"the mask {str(path)!r} names an unknown class",
                got=int(unknown[0]),
                expected=f"0 to {self.num_classes - 1}, or {self.ignore_index} where there is none",
                remedy="Set num_classes and ignore_index to those of the masks.",
            )
        return ids.astype(np.uint8)


@dataclass(frozen=True)
class MaskSurvey:
    """What all masks hold.

    Attributes:
        pixels: of each class, the labeled pixels.
        unlabeled: Keys of the images without any labeled pixel.
        fingerprint: Changes if any pixel of any mask does.
    """

    pixels: tuple[int, ...]
    unlabeled: tuple[str, ...]
    fingerprint: str


def survey_masks(
    folder: MaskFolder, keys: Sequence[str], sizes: np.ndarray, threads: int | None = None, progress: bool = False
) -> MaskSurvey:
    """Reads all masks, so that a bad one is told before any work.

    Args:
        folder: The masks.
        keys: Keys of the images.
        sizes: int64 [N, 2]: height and width of the images.
        threads: Threads to use; None: 4.
        progress: Show a progress bar.

    Returns:
        What they hold.

    Raises:
        IntegrityError: A mask cannot be read, has another size than its image, or holds an unknown class.
        InputError: No pixel of any mask is labeled.
    """

    def count(key: str, size: np.ndarray) -> tuple[np.ndarray, str]:
        ids = folder.read(key, size)
        return np.bincount(ids.ravel(), minlength=MOST + 1), xxhash.xxh3_128_hexdigest(ids.tobytes())

    total, unlabeled, digest = np.zeros(MOST + 1, np.int64), [], xxhash.xxh3_128()
    with ThreadPoolExecutor(threads or 4) as pool:
        bar = tqdm(pool.map(count, keys, sizes), "masks", len(keys), disable=not progress or len(keys) < PROGRESS_FROM)
        for key, (counts, own) in zip(keys, bar, strict=True):
            counts[folder.ignore_index] = 0
            total += counts
            digest.update(own.encode())
            if not counts.any():
                unlabeled.append(key)
    if not total.any():
        raise InputError(
            f"no pixel of the masks in {str(folder.root)!r} has a class", got=f"only {folder.ignore_index}",
            expected="class ids", remedy="Set segmentation.ignore_index to the id of pixels without a class.",
        )  # fmt: skip
    return MaskSurvey(tuple(total[: folder.num_classes].tolist()), tuple(unlabeled), digest.hexdigest())


def survey_warnings(survey: MaskSurvey, folder: MaskFolder, names: Sequence[str] = ()) -> list[str]:
    """Says which classes occur nowhere, and how many masks have no labeled pixel.

    Args:
        survey: What the masks hold.
        folder: The masks.
        names: Of the classes; empty: their numbers.

    Returns:
        Lines of text; empty if there is nothing to say.
    """
    lines = []
    if absent := [number for number, pixels in enumerate(survey.pixels) if not pixels]:
        text = ", ".join(names[number] if names else str(number) for number in absent)
        lines.append(f"no pixel of the masks in {folder.root} has class {text}")
    if survey.unlabeled:
        count = len(survey.unlabeled)
        lines.append(f"{count:,} of the masks in {folder.root} have no labeled pixel: {some(list(survey.unlabeled))}")
    return lines
