"""The order of an epoch and each rank's share of it.

Legend: N samples; W ranks; B images per batch and rank.

Batch b of an epoch is the next W·B samples of the order, B for each rank. In training all ranks have the same number of
batches, and the last N mod W·B samples of the epoch's own order are left out; another shuffle leaves out others. In
evaluation every sample comes exactly once: the last batch is smaller, and some ranks may have one batch fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER_STREAM = 1  # of random numbers; `draws` uses another


@dataclass(frozen=True)
class EpochOrder:
    """
    samples     N
    batch_size  B
    rank, world_size  of this process, and W
    seed        of all orders
    shuffle     a new order every epoch, from the seed; otherwise 0, 1, 2, …
    groups      int64 [N]: tar shard of each sample: shards are shuffled, and images within `window` of their place
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
        """Samples that all ranks take together in one batch."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.shuffle:
            return self.samples // self.step
        return max(0, -(-(self.samples - self.rank * self.batch_size) // self.step))

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 [N]: the order of all samples in an epoch, the same on every rank."""
        if not self.shuffle:
            return np.arange(self.samples)
        rng = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        if self.groups is None:
            return rng.permutation(self.samples)
        rank_of_group = rng.permutation(self.groups.max() + 1)
        by_shard = np.argsort(rank_of_group[self.groups], kind="stable")
        place = np.arange(self.samples) + rng.random(self.samples) * self.window
        return by_shard[np.argsort(place)]

    def batch(self, order: np.ndarray, batch: int) -> np.ndarray:
        """Samples of this rank's batch."""
        start = batch * self.step + self.rank * self.batch_size
        return order[start : start + self.batch_size]
