"""Label rows: read as they are stored, ahead of time, and decoded on the device.

Legend: B rows; P palette size; R tail size; H×W map grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from labeler.store.label_store import LabelStore
from labeler.store.score_code import OFFSET_STEP
from labeler.store.score_maps import ScoreMaps

IMAGES_AT_A_TIME = 8


@dataclass(frozen=True)
class HostRows:
    """`StoredRows` as tensors in (pinned) host memory, not yet decoded.

    Attributes:
        classes: int64 [B, P], −1 where unused.
        scores: uint8 or float16 [B, P, H, W].
        background: uint8 or float16 [B, H, W]; None: 0.
        region: float32 [B, 4].
        tail_classes: int64 [B, R], −1 where unused.
        tail_offsets: int8 [B, R], in quarter nats.
    """

    classes: torch.Tensor
    scores: torch.Tensor
    background: torch.Tensor | None
    region: torch.Tensor
    tail_classes: torch.Tensor
    tail_offsets: torch.Tensor


class LabelRows:
    """Reads rows of a store in one thread and decodes them in another.

    Args:
        store: The store.
        device: Device of the decoded maps.
    """

    def __init__(self, store: LabelStore, device: torch.device) -> None:
        self.store, self.device = store, device
        table = store.code_values
        self._table = None if table is None else torch.from_numpy(table).to(device)

    def read(self, rows: np.ndarray) -> HostRows:
        """Reads rows, without the slots that none of them uses. Raises IntegrityError for a damaged row."""
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
        """Decodes rows to maps on the device."""
        names = ("classes", "scores", "region", "tail_classes", "tail_offsets")
        classes, coded, region, tail_classes, offsets = (
            getattr(rows, name).to(self.device, non_blocking=True) for name in names
        )
        if rows.background is None:
            background = coded.new_zeros((len(coded), *coded.shape[2:]), dtype=torch.float32)
        else:
            background = self._decode(rows.background.to(self.device, non_blocking=True))
        scores = self._decode_planes(coded, background)
        count = self.store.meta.num_classes
        return ScoreMaps(classes, scores, background, region, count, tail_classes, offsets.float() * OFFSET_STEP)

    def _decode_planes(self, coded: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Decodes palette planes [B, P, H, W], with the background [B, H, W] where code 0 stands for it."""
        if not self.store.code.as_background or self._table is None:
            return self._decode(coded)
        scores = torch.empty(coded.shape, dtype=background.dtype, device=coded.device)
        # A few images at a time on a CPU, so that they stay in its cache between the operations.
        step = len(coded) if coded.is_cuda else IMAGES_AT_A_TIME
        for start in range(0, len(coded), max(1, step)):
            part = slice(start, start + step)
            torch.index_select(self._table, 0, coded[part].reshape(-1).int(), out=scores[part].view(-1))
            torch.where(coded[part] == 0, background[part, None], scores[part], out=scores[part])
        return scores

    def _decode(self, coded: torch.Tensor) -> torch.Tensor:
        """Converts stored numbers to scores."""
        # An int32 index takes half the bytes of an int64 index.
        return coded.float() if self._table is None else self._table[coded.int()]

    def _host(self, array: np.ndarray) -> torch.Tensor:
        """Copies an array to (pinned) host memory."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
