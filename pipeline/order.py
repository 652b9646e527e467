"""The order of images in an epoch, and each rank's share of it.

Legend: N samples; W ranks; B images per batch and rank.

Each batch is the next W·B samples of the order, B for each rank. In training all ranks have the same number of batches,
and the last N mod W·B samples of the epoch's order are dropped; other epochs drop other samples. In evaluation every
sample comes exactly once: the last batch can be smaller, and some ranks can have one batch less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER_STREAM = 1  # stream of random numbers; `draws` uses another


@dataclass(frozen=True)
class EpochOrder:
    """The order of every epoch, for one rank.

    Attributes:
        samples: N.
        batch_size: B.
        rank: Rank of this process.
        world_size: W.
        shuffle: Use a new order every epoch; otherwise 0, 1, 2, …
        seed: Seed of all orders.
        groups: int64 [N]: the tar shard of each sample; None: no tar shards. Shards are shuffled, and images within
            `window`.
        window: How far images move from their position, in images.
    """

    samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    seed: int = 0
    groups: np.ndarray | None = None
    window: int = 10_000

    @property
    def step(self) -> int:
        """Samples of all ranks in one step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Returns the number of batches of this rank in an epoch."""
        if self.shuffle:
            return self.samples // self.step
        return max(0, -(-(self.samples - self.rank * self.batch_size) // self.step))

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns int64 [N]: the order of all samples in an epoch, the same on every rank."""
        if not self.shuffle:
            return np.arange(self.samples)
        rng = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        if self.groups is None:
            return rng.permutation(self.samples)
        rank_of_group = rng.permutation(self.groups.max() + 1)
        by_shard = np.argsort(rank_of_group[self.groups], kind="stable")
        position = np.arange(self.samples) + rng.random(self.samples) * self.window
        return by_shard[np.argsort(position)]

    def batch(self, order: np.ndarray, batch: int) -> np.ndarray:
        """Returns the samples of this rank's batch; `order`: what `epoch` returned."""
        start = batch * self.step + self.rank * self.batch_size
        return order[start : start + self.batch_size]
