"""Label rows: read as they are stored, ahead of time, and decoded and cropped on the device.

Legend: B rows; h×w token grid.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from labeler.store.label_store import LabelStore
from labeler.store.score_maps import ScoreMaps
from labeler.store.stored_rows import StoredRows
from pipeline.geometry import Views
from pipeline.targets.crop_stored_rows import crop_stored_rows
from pipeline.targets.token_targets import TokenTargets


class LabelRowReader:
    """Reads rows of a store in one thread and decodes them in another.

    Args:
        store: The store.
        device: Device of the decoded maps.
    """

    def __init__(self, store: LabelStore, device: torch.device) -> None:
        self.store, self.device = store, device

    def read(self, rows: np.ndarray) -> StoredRows:
        """Reads rows, without the slots that none of them uses, as tensors in (pinned) host memory.

        Raises IntegrityError for a damaged row.
        """
        return self.store.read_codes(rows, trim=True).to_torch(pin=self.device.type == "cuda")

    def decode(self, rows: StoredRows) -> ScoreMaps:
        """Decodes rows to maps of B images on the device."""
        return self._moved(rows).maps(self.store.code, self.store.meta.num_classes)

    def crop(self, rows: StoredRows, views: Views, grid: tuple[int, int]) -> TokenTargets:
        """Crops rows to the token grid h, w as the views of their images show them."""
        return crop_stored_rows(self._moved(rows), self.store.code, self.store.meta.num_classes, views, grid)

    def _moved(self, rows: StoredRows) -> StoredRows:
        """Moves rows to the device, except for their regions: the geometry of crops is computed on the host."""
        return replace(rows.to(self.device), region=rows.region)
