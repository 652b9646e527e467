"""Everything random about a batch, drawn at once on the host before any pixel is read.

Legend: B images; K augmentation operations; S input side.

Both backends carry out the same draws, and a batch's draws depend on nothing but the seed, the epoch, the batch and the
rank: a run that is resumed in the middle of an epoch draws what it would have drawn.
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

DRAWS_VERSION = 1  # counts changes of what is drawn, or in which order: a state of another version cannot be resumed
DRAWS_STREAM = 2  # of random numbers; `order` uses another


@dataclass(frozen=True)
class Draws:
    """
    windows  [B, 4]: pixels of the decoded image that are shown; whole numbers in training
    hflip    bool [B]; bicubic bool [B]: how the window is resized
    kernels, amounts  [B, K]: see `augment_policy.Draws`
    affine   float64 [B, 2, 3]: input -> flipped window, of the geometric operations
    views    the same geometry as boxes and affine maps of the unflipped window, for the labels
    erased   int64 [B, 4]: pixels of the input
    mix      None where nothing is mixed
    noise_seed  for the pixels that are erased
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
    """Draws for images of `sizes` int64 [B, 2]; see DRAWS_VERSION."""
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
    boxes = torch.from_numpy(windows / np.tile(sizes, (1, 2)))
    unflip = flips(torch.from_numpy(hflip)) if hflip.any() else identity(len(hflip))
    return Views(boxes, compose(unflip, torch.from_numpy(affine)))
