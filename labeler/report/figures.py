"""The figures of a report: a random sample of a store as probabilities, and its comparison with true maps.

Legend: n sampled rows; C classes; P palette size; R tail size; H×W map grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError
from labeler.store.label_store import LabelStore
from labeler.store.score_maps import ClassShares, ScoreMaps, class_shares


@dataclass(frozen=True, kw_only=True)
class Sample(ClassShares):
    """Random rows of a store as probabilities, n in place of N.

    Attributes:
        rows: int64 [n]: row numbers, ascending.
        keys: Their keys.
        maps: Their maps.
        target: int32 [n]: true classes, −1 where unknown.
        image_size: int64 [n, 2]: height and width of the images.
    """

    rows: np.ndarray
    keys: list[str]
    maps: ScoreMaps
    target: np.ndarray
    image_size: np.ndarray

    @cached_property
    def top1(self) -> np.ndarray:
        """int64 [n, H, W]: the class of each cell."""
        return self.maps.top1()

    @cached_property
    def named(self) -> tuple[np.ndarray, np.ndarray]:
        """Class ids int64 [n, P + R] of palette and tail, −1 unused, and their shares of the whole map [n, P + R]."""
        used = self.maps.tail_classes >= 0
        in_tail = np.where(used, np.exp(self.maps.tail_offsets), 0) * self.shared.mean((1, 2))[:, None]
        as_background = np.where((self.maps.classes >= 0)[:, :, None, None] & (self.p == 0), self.shared[:, None], 0)
        in_palette = (self.p + as_background).mean((2, 3))
        return np.concatenate([self.maps.classes, self.maps.tail_classes], 1), np.concatenate([in_palette, in_tail], 1)

    @cached_property
    def image_class(self) -> np.ndarray:
        """int64 [n]: the class with the largest share of the whole map."""
        classes, share = self.named
        return classes[np.arange(len(self.rows)), share.argmax(1)]


@dataclass(frozen=True)
class TruthCheck:
    """How often the stored map has the true class of a cell, over cells that are mostly covered by one object.

    Attributes:
        cells: Number of cells that were judged.
        images: Number of images with true maps.
        right: Share of cells with the true class.
        mirrored: The same with mirrored maps, to compare with.
        transposed: The same with transposed maps; None if the grid is not square.
        by_cell: float64 [H, W]: share of cells with the true class at each position; NaN where none was judged.
    """

    cells: int
    images: int
    right: float
    mirrored: float
    transposed: float | None
    by_cell: np.ndarray


def draw_sample(store: LabelStore, count: int, seed: int) -> Sample:
    """Decodes up to `count` random rows of a store; `seed`: seed of the choice."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:count])
    maps = store.read(rows)
    named = None
    if store.code.as_background or store.meta.score_kind == "logit":
        named = (maps.classes >= 0)[:, :, None, None] & (maps.scores != maps.background[:, None])
    return Sample(
        **vars(class_shares(maps, named)),
        rows=rows,
        keys=[store.keys[row] for row in rows],
        maps=maps,
        target=store.column("target")[rows],
        image_size=store.column("image_size")[rows].astype(np.int64),
    )


def check_truth(sample: Sample, folder: Path) -> TruthCheck:
    """Compares the sample's maps with images of true class ids.

    Args:
        sample: Rows of a store.
        folder: Folder of PNGs of class ids, named by key with `.png` in place of the extension; see `cell_classes`.

    Returns:
        The comparison.

    Raises:
        InputError: No image has a PNG, or one is not an image of class ids.
    """
    from PIL import Image

    height, width = sample.top1.shape[1:]
    right, judged = np.zeros((height, width)), np.zeros((height, width))
    mirrored = transposed = images = 0
    for key, top1, region in zip(sample.keys, sample.top1, sample.maps.region, strict=True):
        path = folder / f"{key.rpartition('.')[0]}.png"
        if not path.is_file():
            continue
        try:
            picture = np.asarray(Image.open(path))
        except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
            raise InputError(f"{str(path)!r} cannot be read", got=str(error), expected="a PNG of class ids") from None
        if picture.ndim != 2 or picture.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"{str(path)!r} is not an image of class ids", got=f"{picture.dtype} {picture.shape}",
                expected="one channel of 8 or 16 bits",
            )  # fmt: skip
        true = cell_classes(picture, region, (height, width))
        known = true >= 0
        images += 1
        judged += known
        right += known & (top1 == true)
        mirrored += int((known & (top1[:, ::-1] == true)).sum())
        transposed += int((known & (true == top1.T)).sum()) if height == width else 0
    if not images or not judged.any():
        raise InputError(f"no truth for the images below {str(folder)!r}", expected="<key>.png with class ids")
    cells = int(judged.sum())
    with np.errstate(invalid="ignore"):
        by_cell = right / judged
    return TruthCheck(
        cells,
        images,
        float(right.sum() / cells),
        mirrored / cells,
        transposed / cells if height == width else None,
        by_cell,
    )


def cell_classes(truth: np.ndarray, region: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Finds the class that covers more than half of each cell.

    Args:
        truth: uint8 or uint16 [h, w]: the class of each pixel; the largest number (255 or 65,535) for none.
        region: y0, x0, y1, x1 of the part that the cells cover, as fractions.
        grid: H, W.

    Returns:
        int64 [H, W]: class ids, −1 where no class covers more than half.
    """
    (h, w), (height, width) = truth.shape, grid
    none = np.iinfo(truth.dtype).max
    y = np.floor(((np.arange(h) + 0.5) / h - region[0]) / (region[2] - region[0]) * height).astype(int)
    x = np.floor(((np.arange(w) + 0.5) / w - region[1]) / (region[3] - region[1]) * width).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None]
    cell = (y[:, None] * width + x[None])[inside]
    classes = truth[inside]
    total = np.bincount(cell, minlength=height * width)
    cell, classes = cell[classes != none], classes[classes != none]
    counts = np.zeros((height * width, int(classes.max(initial=0)) + 1), np.int64)
    np.add.at(counts, (cell, classes), 1)
    best = counts.argmax(1)
    majority = np.where(2 * counts[np.arange(len(best)), best] > total, best, -1)
    return majority.reshape(grid)
