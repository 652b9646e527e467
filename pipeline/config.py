"""Settings of a loader: typed, frozen, checked on creation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option
from labeler.sources.decoding.pixels import ORIENTATIONS

BACKENDS = ("auto", "dali", "cpu", "pil")
INTERPOLATIONS = ("random", "bilinear", "bicubic")
CROP_MODES = ("center", "squash")
MIXES = ("none", "token", "image")
ERASE_MODES = ("pixel", "const")
CLASSES = ("teacher", "images", "auto", "none")
CACHES = ("none", "ram", "ram-compressed")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderConfig:
    """Settings of a loader: the images, their labels, and how they are cropped and augmented."""

    images: str = option(
        "folder of images, a list of them, .tar or .parquet files, or a URL of any of these", affects="recorded"
    )
    store: str | tuple[str, ...] | None = option(
        "folder or URL of the label store, or several that are read as one; None: plain classification",
        None,
        affects="recorded",
    )
    token_labels: bool = option(
        "False: make the targets from the true labels only; everything else is unchanged (for ablations)",
        True,
        affects="values",
    )
    image_list: str | None = option("use only the images that this file lists", None, affects="recorded")
    masks: str | None = option(
        "folder of masks, PNG files of class ids with the names of the images; None: no masks", None, affects="recorded"
    )
    ignore_index: int = option("id of a mask's pixels without a class", 255, affects="values", lowest=0, highest=255)
    num_classes: int | None = option(
        "number of classes of the network; the store, or the folders, must have as many",
        None,
        affects="values",
        lowest=1,
    )
    class_folders: Mapping[str, int] | None = option(
        "folder name -> class id; None: the store's, or the sorted folders of the root", None, affects="recorded"
    )
    classes: str = option(
        'classes of the labels: "teacher": those of the store, or of the folders without one; "images": the folders or '
        'the labels of the source, in sorted order; "auto": "images" where the store knows no true class and there are '
        'class folders, else "teacher"; "none": they are not known and not needed, every label is −1 (evaluation)',
        "teacher",
        affects="recorded",
        choices=CLASSES,
    )
    train: bool = option(
        "True: shuffle, random crops, augmentation, full batches only; False: in order, center crops, every image",
        True,
        affects="values",
    )
    batch_size: int = option("images per batch and rank", 128, affects="values", lowest=1)
    image_size: int = option("side of the square input in pixels", 224, affects="values", lowest=1)
    grid: tuple[int, int] = option(
        "height and width of the token grid: image_size / patch size", (14, 14), affects="values"
    )
    seed: int = option("seed of order and augmentation", 0, affects="values", lowest=0)
    rank: int = option("rank of this process in distributed training", 0, affects="recorded")
    world_size: int = option("number of processes in distributed training", 1, affects="values", lowest=1)
    scale: tuple[float, float] = option(
        "random resized crop: range of the share of the image area", (0.08, 1.0), affects="values"
    )
    ratio: tuple[float, float] = option(
        "random resized crop: range of the aspect ratio, width to height", (3 / 4, 4 / 3), affects="values"
    )
    hflip: float = option("probability of a horizontal flip", 0.5, affects="values", lowest=0, highest=1)
    interpolation: str = option(
        'interpolation of the resize; "random": bilinear or bicubic for each image (in training)',
        "random",
        affects="values",
        choices=INTERPOLATIONS,
    )
    auto_augment: str = option(
        'augmentation policy in timm\'s notation ("rand-m9-mstd0.5-inc1"), "3a", or "none"', "none", affects="values"
    )
    color_jitter: float = option(
        'strength of color jitter; used if auto_augment is "none" or "3a"', 0.0, affects="values", lowest=0
    )
    erase_prob: float = option("probability of random erasing", 0.0, affects="values", lowest=0, highest=1)
    erase_mode: str = option(
        'fill erased pixels with noise ("pixel") or the mean color ("const")',
        "pixel",
        affects="values",
        choices=ERASE_MODES,
    )
    mean: tuple[float, float, float] = option("mean of each color channel", IMAGENET_MEAN, affects="values")
    std: tuple[float, float, float] = option("standard deviation of each color channel", IMAGENET_STD, affects="values")
    mix: str = option(
        'mixing: "none"; "token": the model mixes its tokens in a box; "image": the loader mixes pixels in a box',
        "none",
        affects="values",
        choices=MIXES,
    )
    mix_alpha: float = option(
        "alpha of the Beta(alpha, alpha) distribution of the mix box's area", 1.0, affects="values"
    )
    mix_prob: float = option("probability of mixing a batch", 1.0, affects="values", lowest=0, highest=1)
    crop_pct: float = option(
        "evaluation: share of the shorter side that the center crop keeps", 0.875, affects="values"
    )
    crop_mode: str = option(
        'evaluation: crop the "center", or "squash" the image to a square first',
        "center",
        affects="values",
        choices=CROP_MODES,
    )
    orientation: str = option(
        'without a store: "exif" rotates images as their tag says, "ignore" does not; a store has its own setting',
        "exif",
        affects="values",
        choices=ORIENTATIONS,
    )
    shuffle_window: int = option("tar shards: window of the shuffle, in images", 10_000, affects="values", lowest=1)
    backend: str = option(
        '"dali", on a GPU or a CPU; "cpu": threads of this process; "pil": its readable twin; "auto": DALI for a GPU '
        'if it is installed, otherwise "cpu", which is faster there',
        "auto",
        affects="values",
        choices=BACKENDS,
    )
    device: str = option(
        'device of the batches: "cpu", "cuda:1"; "cuda": torch\'s current GPU; "auto": a GPU if there is one',
        "auto",
        affects="recorded",
    )
    threads: int | None = option(
        "CPU threads for reading and decoding; None: this rank's share of the cores",
        None,
        affects="nothing",
        lowest=1,
    )
    cache: str = option(
        'cache of label rows in each rank: "none": read the files; "ram": all codes, 3 kB per image at the default '
        'palette; "ram-compressed": the files',
        "none",
        affects="nothing",
        choices=CACHES,
    )
    prefetch: int = option("batches to read ahead, and as many to decode ahead", 2, affects="nothing", lowest=1)
    hw_decoder_load: float = option(
        "share of JPEGs that the GPU's hardware decoder decodes", 0.65, affects="values", lowest=0, highest=1
    )
    progress: bool = option("show a progress bar", True, affects="nothing")

    def __post_init__(self) -> None:
        if self.backend == "reference":  # as the readable twin of every fast path is called
            object.__setattr__(self, "backend", "pil")
        check_options(self)
        if not (type(self.rank) is int and 0 <= self.rank < self.world_size):
            raise InputError(
                "rank does not fit world_size", got=repr(self.rank), expected=f"0 to {self.world_size - 1}"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raises InputError if a setting is out of its range."""

        def refuse(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise InputError(f"{name} does not fit", got=repr(getattr(self, name)), expected=expected)

        grid, scale, ratio = self.grid, self.scale, self.ratio
        divides = _are_numbers(grid, 2) and all(type(n) is int and n > 0 and self.image_size % n == 0 for n in grid)
        refuse("grid", divides, f"two whole numbers that divide the {self.image_size} pixels of the image into patches")
        refuse("scale", _are_numbers(scale, 2) and 0 < scale[0] <= scale[1] <= 1, "two shares, 0 < low ≤ high ≤ 1")
        refuse("ratio", _are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1], "two numbers, 0 < low ≤ high")
        refuse("crop_pct", _is_number(self.crop_pct) and 0 < self.crop_pct <= 1, "a share, more than 0, at most 1")
        refuse("mean", _are_numbers(self.mean, 3), "one number per color")
        refuse("std", _are_numbers(self.std, 3) and min(self.std) > 0, "one positive number per color")
        known = self.classes != "none" or not self.train or self.masks is not None
        refuse("classes", known, "other than none if train is true and there are no masks")
        refuse("masks", self.masks is None or self.num_classes is not None, "none, or a number of classes beside it")
        refuse("mix", self.mix == "none" or self.masks is None, "none with masks")
        if self.mix != "none":
            refuse(
                "mix_alpha",
                _is_number(self.mix_alpha) and self.mix_alpha > 0,
                'more than 0; mix="none" turns mixing off',
            )
            refuse("mix", self.train, "none if train is false")

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.image_size // self.grid[0], self.image_size // self.grid[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, tuple | list) and len(values) == count and all(map(_is_number, values))
