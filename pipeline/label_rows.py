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
    """`StoredRows` as tensors in (pinned) host memory: classes int64, scores and background still coded, region."""

    classes: torch.Tensor
    scores: torch.Tensor
    background: torch.Tensor | None
    region: torch.Tensor


class LabelRows:
    """Reads rows of a store in one thread and decodes them in another."""

    def __init__(self, store: LabelStore, device: torch.device) -> None:
        self.store, self.device = store, device
        table = store.code_values
        self._table = None if table is None else torch.from_numpy(table).to(device)

    def read(self, rows: np.ndarray) -> HostRows:
        """Raises IntegrityError for a damaged row."""
        stored = self.store.read_codes(rows)
        background = None if stored.background is None else self._host(stored.background)
        return HostRows(self._host(stored.classes), self._host(stored.scores), background, self._host(stored.region))

    def decode(self, rows: HostRows) -> ScoreMaps:
        """The maps as tensors on the device."""
        scores = self._decode(rows.scores)
        background = torch.zeros_like(scores[:, 0]) if rows.background is None else self._decode(rows.background)
        classes, region = (t.to(self.device, non_blocking=True) for t in (rows.classes, rows.region))
        return ScoreMaps(classes, scores, background, region, self.store.meta.num_classes)

    def _decode(self, coded: torch.Tensor) -> torch.Tensor:
        coded = coded.to(self.device, non_blocking=True)
        # A look-up by int32 moves half the bytes that one by int64 would.
        return coded.float() if self._table is None else self._table[coded.int()]

    def _host(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
