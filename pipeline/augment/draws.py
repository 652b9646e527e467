"""All random numbers of a batch, drawn at once on the host before any pixel is read.

Legend: B images; K augmentation operations; S input side.

Both backends use the same draws. These depend only on seed, epoch, batch and rank, so a run that is resumed in the
middle of an epoch draws the same as without the interruption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment.crops import center_crops, random_resized_crops
from pipeline.augment.erasing import draw_erased
from pipeline.augment.mix import MixBox, sample_mix_box
from pipeline.augment.policy import Policy, draw_augmentation
from pipeline.config import LoaderConfig
from pipeline.geometry import Views, compose, flips, identity

DRAWS_VERSION = 1  # changes with what is drawn, or its order: a state of another version cannot be resumed
DRAWS_STREAM = 2  # stream of random numbers; `order` uses another


@dataclass(frozen=True)
class Draws:
    """The draws of a batch.

    Attributes:
        windows: [B, 4]: windows in pixels of the decoded images; whole numbers in training.
        hflip: bool [B]: which windows are flipped.
        bicubic: bool [B]: which windows are resized with bicubic interpolation; the others are bilinear.
        kernels: int64 [B, K]: see `pipeline.augment.policy.DrawnKernels`.
        amounts: float64 [B, K]: see `pipeline.augment.policy.DrawnKernels`.
        affine: float64 [B, 2, 3]: the geometric operations, as maps from input to flipped window.
        views: The same geometry as boxes and affine maps of the unflipped windows, for the labels.
        erased: int64 [B, 4]: boxes to erase, in pixels of the input.
        mix: The box in which images are mixed; None: no mixing.
        noise_seed: Seed of the noise in erased boxes.
    """

    windows: np.ndarray
    hflip: np.ndarray
    bicubic: np.ndarray
    kernels: np.ndarray
    amounts: np.ndarray
    affine: np.ndarray
    views: Views
    erased: np.ndarray
    mix: MixBox | None
    noise_seed: int

    def __len__(self) -> int:
        return len(self.windows)


def draw_batch(config: LoaderConfig, policies: tuple[Policy, ...], sizes: np.ndarray, epoch: int, batch: int) -> Draws:
    """Draws everything that is random about a batch; see DRAWS_VERSION.

    Args:
        config: Settings of the loader.
        policies: Augmentation policies.
        sizes: int64 [B, 2]: height and width of the images.
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.

    Returns:
        The draws.
    """
    n = len(sizes)
    rng = np.random.default_rng([DRAWS_STREAM, config.seed, epoch, batch, config.rank])
    if config.train:
        windows = random_resized_crops(sizes, config.scale, config.ratio, rng)
        hflip = rng.random(n) < config.hflip
        augmentation = draw_augmentation(policies, n, rng)
    else:
        windows = center_crops(sizes, config.image_size, config.crop_pct, config.crop_mode)
        hflip = np.zeros(n, bool)
        augmentation = draw_augmentation((), n, rng)
    choice = config.interpolation if config.train or config.interpolation != "random" else "bicubic"
    bicubic = rng.random(n) < 0.5 if choice == "random" else np.full(n, choice == "bicubic")
    erased = draw_erased(n, config.image_size, config.erase_prob if config.train else 0.0, rng)
    noise_seed, mix_seed = rng.integers(0, 2**62, 2).tolist()
    mix = None
    if config.mix != "none" and rng.random() < config.mix_prob:
        mix = sample_mix_box(config.grid, config.mix_alpha, torch.Generator().manual_seed(mix_seed))
    views = _views(windows, sizes, hflip, augmentation.affine)
    return Draws(
        windows, hflip, bicubic, augmentation.kernels, augmentation.amounts, augmentation.affine, views, erased, mix,
        noise_seed,
    )  # fmt: skip


def _views(windows: np.ndarray, sizes: np.ndarray, hflip: np.ndarray, affine: np.ndarray) -> Views:
    """Returns the geometry of a batch for its labels."""
    boxes = torch.from_numpy(windows / np.tile(sizes, (1, 2)))
    unflip = flips(torch.from_numpy(hflip)) if hflip.any() else identity(len(hflip))
    return Views(boxes, compose(unflip, torch.from_numpy(affine)))
