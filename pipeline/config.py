"""Settings of a loader: typed, frozen, checked at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labeler.errors import InputError

BACKENDS = ("auto", "dali", "reference")
INTERPOLATIONS = ("random", "bilinear", "bicubic")
CROP_MODES = ("center", "squash")
MIXES = ("none", "token", "image")
ERASE_MODES = ("pixel", "const")
CACHES = ("none", "ram", "ram-compressed")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderConfig:
    """Which images, with which labels, shown how.

    images         folder of images, or of tar shards in WebDataset layout, or one .tar file
    store          label store; None: plain classification
    token_labels   False: targets from the true labels alone, everything else unchanged (the ablation)
    image_list     use only these keys, one a line
    num_classes    classes of the network; the store, or the folders, must fit
    class_folders  folder name -> class id; None: the store's, or sorted folder names in order
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
    shuffle_window tar shards: how far an image may leave the order of its shard
    backend        "dali", "reference" (PIL, readable), or "auto": DALI where it is installed
    device         where batches end: "cpu", "cuda", "cuda:1"; "auto": a GPU if there is one
    threads        CPU threads for reading and decoding; None: the machine's cores shared among the ranks
    cache          label rows: "none" reads the files, "ram" holds the decoded codes, "ram-compressed" the files
    prefetch       batches prepared ahead
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
    shuffle_window: int = 10_000
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    cache: str = "none"
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backend", BACKENDS),
            ("interpolation", INTERPOLATIONS),
            ("crop_mode", CROP_MODES),
            ("mix", MIXES),
            ("erase_mode", ERASE_MODES),
            ("cache", CACHES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is not known", got=repr(getattr(self, name)), expected=" or ".join(allowed))
        for name in ("batch_size", "image_size", "world_size", "prefetch", "threads", "num_classes", "shuffle_window"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive whole number", got=repr(value))
        for name in ("hflip", "erase_prob", "mix_prob", "hw_decoder_load"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share", got=getattr(self, name), expected="0 to 1")
        if not 0 <= self.rank < self.world_size:
            raise InputError("rank does not fit world_size", got=self.rank, expected=f"0 to {self.world_size - 1}")
        if type(self.seed) is not int or self.seed < 0:
            raise InputError("seed must be a whole number, 0 or more", got=repr(self.seed))
        self._check_shapes()

    def _check_shapes(self) -> None:
        grid = self.grid
        if len(grid) != 2 or any(type(n) is not int or n < 1 or self.image_size % n for n in grid):
            raise InputError(
                "grid does not divide the image into patches",
                got=f"{grid} for {self.image_size} pixels",
                expected="two whole numbers that divide image_size",
            )
        if not (0 < self.scale[0] <= self.scale[1] <= 1):
            raise InputError("scale is not a range of shares", got=self.scale, expected="0 < low ≤ high ≤ 1")
        if not (0 < self.ratio[0] <= self.ratio[1]):
            raise InputError("ratio is not a range", got=self.ratio, expected="0 < low ≤ high")
        if not 0 < self.crop_pct <= 1:
            raise InputError("crop_pct is a share", got=self.crop_pct, expected="more than 0, at most 1")
        if self.mix != "none" and not self.mix_alpha > 0:
            raise InputError(
                "mix_alpha must be positive", got=self.mix_alpha, remedy='Use mix="none" to switch it off.'
            )
        if not (math.isfinite(self.color_jitter) and self.color_jitter >= 0):
            raise InputError("color_jitter must be 0 or more", got=self.color_jitter)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError("mean and std take one number per colour", got=f"{self.mean}, {self.std}")
        if self.mix != "none" and not self.train:
            raise InputError("mixing belongs to training", got=f'mix="{self.mix}" with train=False')

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.image_size // self.grid[0], self.image_size // self.grid[1]
