"""Label rows: read as they are stored, ahead of the device, and decoded there.

Legend: B rows; P palette size; H×W map grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from labeler.score_maps import ScoreMaps
from labeler.store import LabelStore


@dataclass(frozen=True)
class HostRows:
    """`StoredRows` as tensors in (pinned) host memory, scores and background still coded."""

    classes: torch.Tensor
    scores: torch.Tensor
    background: torch.Tensor | None
    region: torch.Tensor
    tail_classes: torch.Tensor
    tail_offsets: torch.Tensor


class LabelRows:
    """Reads rows of a store in one thread and decodes them in another."""

    def __init__(self, store: LabelStore, device: torch.device) -> None:
        self.store, self.device = store, device
        table = store.code_values
        self._table = None if table is None else torch.from_numpy(table).to(device)

    def read(self, rows: np.ndarray) -> HostRows:
        """Raises IntegrityError for a damaged row."""
        stored = self.store.read_codes(rows, trim=True)
        background = None if stored.background is None else self._host(stored.background)
        return HostRows(
            self._host(stored.classes),
            self._host(stored.scores),
            background,
            self._host(stored.region),
            self._host(stored.tail_classes),
            self._host(stored.tail_offsets),
        )

    def decode(self, rows: HostRows) -> ScoreMaps:
        """The maps as tensors on the device."""
        names = ("classes", "scores", "region", "tail_classes", "tail_offsets")
        classes, coded, region, tail_classes, offsets = (
            getattr(rows, name).to(self.device, non_blocking=True) for name in names
        )
        scores = self._decode(coded)
        if rows.background is None:
            background = torch.zeros_like(scores[:, 0])
        else:
            background = self._decode(rows.background.to(self.device, non_blocking=True))
        if self.store.code.as_background:
            scores = torch.where(coded == 0, background[:, None], scores)
        count = self.store.meta.num_classes
        return ScoreMaps(classes, scores, background, region, count, tail_classes, offsets.float() / 4)

    def _decode(self, coded: torch.Tensor) -> torch.Tensor:
        # A look-up by int32 moves half the bytes that one by int64 would.
        return coded.float() if self._table is None else self._table[coded.int()]

    def _host(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
