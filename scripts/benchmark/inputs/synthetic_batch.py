"""Synthetic batches for the suites that need no loader.

Legend: B images; C classes; P palette size; R tail size; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import torch

from labeler.store.score_code import Encoding
from labeler.store.score_maps import ScoreMaps
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from pipeline.targets.crop_score_maps import crop_score_maps
from scripts.benchmark.inputs.synthetic_maps import CLASSES, MAP

PLACES = Encoding().places(CLASSES)  # P and R of a store


class SyntheticLabels:
    """Random score maps of B images with a random crop of each."""

    def __init__(self, batch: int, palette: int, tail: int = 0, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(0)
        classes = torch.stack([torch.randperm(CLASSES, generator=random)[: palette + tail] for _ in range(batch)])
        scores = -6 + 2 * torch.randn(batch, palette, MAP, MAP, generator=random)
        offsets = torch.randint(-8, 9, (batch, tail), generator=random) / 4
        maps = ScoreMaps(
            classes[:, :palette], scores, torch.full((batch, MAP, MAP), -9.0), num_classes=CLASSES,
            tail_classes=classes[:, palette:], tail_offsets=offsets,
        )  # fmt: skip
        self.maps = maps.to_torch(device)
        corner, size = torch.rand(2, batch, 2, generator=random, dtype=torch.float64)
        self.boxes = torch.cat([corner / 2, corner / 2 + 0.3 + size / 5], 1)

    def batch(self, images: torch.Tensor, grid: tuple[int, int], mix: MixBox | None = None) -> Batch:
        """Builds a batch of `images` [B, 3, S, S] with the targets of its crops."""
        targets = crop_score_maps(self.maps, self.boxes, grid)
        return Batch(images, targets, torch.full((len(targets),), -1, device=images.device), mix)


def synthetic_batch(batch: int, side: int, patch: int = 16, device: str = "cpu") -> Batch:
    """Returns random images and labels, as from a loader with a store of the default encoding and token mixing."""
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    tokens = side // patch
    mix = MixBox(0, 0, tokens // 2, tokens // 2, 1 - (tokens // 2) ** 2 / tokens**2)
    return SyntheticLabels(batch, *PLACES, device).batch(images, (tokens, tokens), mix)
