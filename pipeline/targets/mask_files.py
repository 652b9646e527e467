"""Masks: for each image a file of the same name that has a class id in every pixel.

Legend: H, W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from labeler.base.errors import InputError, IntegrityError
from pipeline.classes import some

MODES = ("L", "P", "I", "I;16", "1")  # one number a pixel
MOST = 255  # ids are bytes


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

    def read(self, key: str, size: Sequence[int] | None = None) -> np.ndarray:
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
                remedy="Set segmentation.num_classes or segmentation.ignore_index to those of the masks.",
            )
        return ids.astype(np.uint8)
