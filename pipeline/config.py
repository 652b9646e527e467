"""Settings of a loader: typed, frozen, checked at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option
from labeler.sources.pixels import ORIENTATIONS

BACKENDS = ("auto", "dali", "reference")
INTERPOLATIONS = ("random", "bilinear", "bicubic")
CROP_MODES = ("center", "squash")
MIXES = ("none", "token", "image")
ERASE_MODES = ("pixel", "const")
CACHES = ("none", "ram", "ram-compressed")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderConfig:
    """Which images, with which labels, shown how."""

    images: str = option(
        "folder of images, or of tar shards in WebDataset layout, or one .tar file", affects="recorded"
    )
    store: str | None = option("label store; without it: plain classification", None, affects="recorded")
    token_labels: bool = option(
        "False: targets from the true labels alone, everything else unchanged (the ablation)", True, affects="values"
    )
    image_list: str | None = option("use only the keys of this file, one a line", None, affects="recorded")
    num_classes: int | None = option(
        "classes of the network; the store, or the folders, must fit", None, affects="values", lowest=1
    )
    class_folders: Mapping[str, int] | None = option(
        "folder name -> class id; None: the store's, or all folders of the root, sorted", None, affects="recorded"
    )
    train: bool = option(
        "True: shuffled, cropped, augmented, whole batches; False: in order, center crop, every image",
        True,
        affects="values",
    )
    batch_size: int = option("images per batch and rank", 128, affects="values", lowest=1)
    image_size: int = option("S, side of the square input in pixels", 224, affects="values", lowest=1)
    grid: tuple[int, int] = option("h, w of the token grid; image_size / patch", (14, 14), affects="values")
    seed: int = option("of order and augmentation", 0, affects="values", lowest=0)
    rank: int = option("this process among those that train together", 0, affects="recorded")
    world_size: int = option("how many train together", 1, affects="values", lowest=1)
    scale: tuple[float, float] = option(
        "random-resized-crop: smallest and largest share of the area", (0.08, 1.0), affects="values"
    )
    ratio: tuple[float, float] = option(
        "random-resized-crop: narrowest and widest, width to height", (3 / 4, 4 / 3), affects="values"
    )
    hflip: float = option("probability of a mirrored crop", 0.5, affects="values", lowest=0, highest=1)
    interpolation: str = option(
        'of the resize; "random": bilinear or bicubic, for each image (in training)',
        "random",
        affects="values",
        choices=INTERPOLATIONS,
    )
    auto_augment: str = option('timm\'s notation ("rand-m9-mstd0.5-inc1"), "3a", or "none"', "none", affects="values")
    color_jitter: float = option('strength; used where auto_augment is "none" or "3a"', 0.0, affects="values", lowest=0)
    erase_prob: float = option("probability of random erasing", 0.0, affects="values", lowest=0, highest=1)
    erase_mode: str = option(
        'what is erased becomes noise ("pixel") or the mean color ("const")',
        "pixel",
        affects="values",
        choices=ERASE_MODES,
    )
    mean: tuple[float, float, float] = option("mean of each color channel", IMAGENET_MEAN, affects="values")
    std: tuple[float, float, float] = option("standard deviation of each color channel", IMAGENET_STD, affects="values")
    mix: str = option(
        '"none"; "token": a box for the model, which mixes its tokens; "image": pixels of whole patches',
        "none",
        affects="values",
        choices=MIXES,
    )
    mix_alpha: float = option("the box's area is drawn from Beta(alpha, alpha)", 1.0, affects="values")
    mix_prob: float = option("share of batches that are mixed", 1.0, affects="values", lowest=0, highest=1)
    crop_pct: float = option("evaluation: share of the shorter side that is shown", 0.875, affects="values")
    crop_mode: str = option(
        'evaluation: crop the "center", or "squash" the image to a square first',
        "center",
        affects="values",
        choices=CROP_MODES,
    )
    orientation: str = option(
        'without a store: "exif" turns images as their tag says, "ignore" does not; a store says it itself',
        "exif",
        affects="values",
        choices=ORIENTATIONS,
    )
    shuffle_window: int = option(
        "tar shards: how far an image may leave the order of its shard", 10_000, affects="values", lowest=1
    )
    backend: str = option(
        '"dali", "reference" (PIL, readable), or "auto": DALI where it is installed',
        "auto",
        affects="values",
        choices=BACKENDS,
    )
    device: str = option(
        'where batches end: "cpu", "cuda:1"; "cuda": torch\'s current GPU; "auto": that, if there is one',
        "auto",
        affects="recorded",
    )
    threads: int | None = option(
        "CPU threads for reading and decoding; None: the cores shared among the ranks",
        None,
        affects="nothing",
        lowest=1,
    )
    cache: str = option(
        'label rows: "none" reads the files; each rank holds, from its first batch on, all codes ("ram": '
        '3 kB an image at the default palette), or the files ("ram-compressed")',
        "none",
        affects="nothing",
        choices=CACHES,
    )
    prefetch: int = option("batches read ahead, and as many decoded ahead", 2, affects="nothing", lowest=1)
    hw_decoder_load: float = option(
        "share of JPEGs for a GPU's hardware decoder", 0.65, affects="values", lowest=0, highest=1
    )
    progress: bool = option("show a progress bar", True, affects="nothing")

    def __post_init__(self) -> None:
        check_options(self)
        if not (type(self.rank) is int and 0 <= self.rank < self.world_size):
            raise InputError(
                "rank does not fit world_size", got=repr(self.rank), expected=f"0 to {self.world_size - 1}"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        def refuse(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise InputError(f"{name} does not fit", got=repr(getattr(self, name)), expected=expected)

        grid, scale, ratio = self.grid, self.scale, self.ratio
        divides = _are_numbers(grid, 2) and all(type(n) is int and n > 0 and self.image_size % n == 0 for n in grid)
        refuse("grid", divides, f"two whole numbers that divide the {self.image_size} pixels of the image into patches")
        refuse("scale", _are_numbers(scale, 2) and 0 < scale[0] <= scale[1] <= 1, "two shares, 0 < low ≤ high ≤ 1")
        refuse("ratio", _are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1], "two numbers, 0 < low ≤ high")
        refuse("crop_pct", _is_number(self.crop_pct) and 0 < self.crop_pct <= 1, "a share, more than 0, at most 1")
        refuse("color_jitter", _is_number(self.color_jitter) and self.color_jitter >= 0, "0 or more")
        refuse("mean", _are_numbers(self.mean, 3), "one number per colour")
        refuse("std", _are_numbers(self.std, 3) and min(self.std) > 0, "one positive number per colour")
        if self.mix != "none":
            refuse("mix_alpha", _is_number(self.mix_alpha) and self.mix_alpha > 0, 'more than 0; mix="none" is off')
            refuse("mix", self.train, "none without training")

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.image_size // self.grid[0], self.image_size // self.grid[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, tuple | list) and len(values) == count and all(map(_is_number, values))
