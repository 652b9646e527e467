"""Settings of a loader: typed, frozen, checked at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.sources.pixels import ORIENTATIONS

BACKENDS = ("auto", "dali", "reference")
INTERPOLATIONS = ("random", "bilinear", "bicubic")
CROP_MODES = ("center", "squash")
MIXES = ("none", "token", "image")
ERASE_MODES = ("pixel", "const")
CACHES = ("none", "ram", "ram-compressed")
CHOICES = {
    "backend": BACKENDS,
    "interpolation": INTERPOLATIONS,
    "crop_mode": CROP_MODES,
    "orientation": ORIENTATIONS,
    "mix": MIXES,
    "erase_mode": ERASE_MODES,
    "cache": CACHES,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderConfig:
    """Which images, with which labels, shown how.

    images         folder of images, or of tar shards in WebDataset layout, or one .tar file
    store          label store; None: plain classification
    token_labels   False: targets from the true labels alone, everything else unchanged (the ablation)
    image_list     use only these keys, one a line
    num_classes    classes of the network; the store, or the folders, must fit
    class_folders  folder name -> class id; None: the store's, or all folders of the root, sorted
    train          True: shuffled, cropped, augmented, whole batches only; False: in order, centre crop, every image
    batch_size     images per batch and rank
    image_size     S, side of the square input in pixels
    grid           h, w of the token grid; image_size / patch
    rank, world_size  this process among those that train together
    scale, ratio   random-resized-crop: share of the area, width to height
    hflip          probability of a mirrored crop
    interpolation  of the resize; "random": bilinear or bicubic, per image (in training)
    auto_augment   timm's notation ("rand-m9-mstd0.5-inc1"), "3a", or "none"
    color_jitter   amount; used where auto_augment is "none" or "3a"
    erase_prob     probability of random erasing; erase_mode "pixel" (noise) or "const"
    mix            "none"; "token": a box for the model, which mixes its tokens; "image": pixels of whole patches
    mix_alpha      of Beta(alpha, alpha); mix_prob: share of batches that are mixed
    crop_pct, crop_mode  evaluation: as timm's ("center" or "squash")
    orientation    without a store: "exif" turns images as their tag says, "ignore" does not; a store says it itself
    shuffle_window tar shards: how far an image may leave the order of its shard
    backend        "dali", "reference" (PIL, readable), or "auto": DALI where it is installed
    device         where batches end: "cpu", "cuda:1"; "cuda": torch's current GPU; "auto": that, if there is one
    threads        CPU threads for reading and decoding; None: the machine's cores shared among the ranks
    cache          label rows: "none" reads the files; each rank holds, from its first batch on, all codes ("ram"; 3 kB
                   an image at the default palette), or the files ("ram-compressed")
    prefetch       batches read ahead, and as many decoded ahead
    hw_decoder_load  share of JPEGs for a GPU's hardware decoder
    """

    images: str
    store: str | None = None
    token_labels: bool = True
    image_list: str | None = None
    num_classes: int | None = None
    class_folders: Mapping[str, int] | None = None
    train: bool = True
    batch_size: int = 128
    image_size: int = 224
    grid: tuple[int, int] = (14, 14)
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: str = "random"
    auto_augment: str = "none"
    color_jitter: float = 0.0
    erase_prob: float = 0.0
    erase_mode: str = "pixel"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mix: str = "none"
    mix_alpha: float = 1.0
    mix_prob: float = 1.0
    crop_pct: float = 0.875
    crop_mode: str = "center"
    orientation: str = "exif"
    shuffle_window: int = 10_000
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    cache: str = "none"
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is not known", got=repr(getattr(self, name)), expected=" or ".join(allowed))
        for name in ("batch_size", "image_size", "world_size", "prefetch", "threads", "num_classes", "shuffle_window"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive whole number", got=repr(value))
        for name in ("hflip", "erase_prob", "mix_prob", "hw_decoder_load"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise InputError(f"{name} is a share", got=repr(getattr(self, name)), expected="0 to 1")
        if not (type(self.rank) is int and 0 <= self.rank < self.world_size):
            raise InputError(
                "rank does not fit world_size", got=repr(self.rank), expected=f"0 to {self.world_size - 1}"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise InputError("seed must be a whole number, 0 or more", got=repr(self.seed))
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
