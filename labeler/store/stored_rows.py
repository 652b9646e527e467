"""Rows of a store on their way to the loader: gathered from shards, trimmed, moved to a device, decoded at last.

Legend: N rows; P palette size; R tail size; H×W map grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.store.row_schema import CLASS, COLUMNS, Layout, ShardRows, signed_classes
from labeler.store.score_code import ScoreCode
from labeler.store.score_maps import ScoreMaps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored, as numpy arrays or (after `to_torch`) as tensors, to be decoded elsewhere.

    The fields are columns of `ShardRows`. `LabelStore.code` has the meaning of uint8 codes.

    Attributes:
        classes: int64 [N, P], −1 where unused.
        scores: uint8 or float16 [N, P, H, W].
        background: uint8 or float16 [N, H, W]; None in a `logit` store, where it is 0.
        region: float32 [N, 4].
        tail_classes: int64 [N, R], −1 where unused.
        tail_offsets: int8 [N, R], in quarter nats.
    """

    classes: Any
    scores: Any
    background: Any
    region: Any
    tail_classes: Any
    tail_offsets: Any

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def gathered(cls, count: int, layout: Layout, parts: Iterable[tuple[np.ndarray, ShardRows]]) -> StoredRows:
        """Gathers rows from several shards.

        Args:
            count: N.
            layout: The data sets of the store.
            parts: (positions among the N, rows) of each shard; together they have every position once.

        Returns:
            The rows.
        """
        rows = cls(*(_empty(one.name, count, layout) for one in fields(cls)))
        for index, part in parts:
            for name, array in part.arrays().items():
                if hasattr(rows, name):
                    getattr(rows, name)[index] = signed_classes(array) if COLUMNS[name].dtype == CLASS else array
        return rows

    def select(self, rows: np.ndarray | slice, trim: bool = False) -> StoredRows:
        """Selects rows of arrays.

        Args:
            rows: Which.
            trim: Drop the palette and tail slots that none of them uses, except for one of the palette.

        Returns:
            The rows.
        """
        kept: dict[str | int, int] = {}
        if trim:
            used_palette, used_tail = used_slots(self.classes[rows]), used_slots(self.tail_classes[rows])
            kept = {"P": max(1, used_palette), "R": used_tail}

        def part(name: str) -> Any:
            array, axes = getattr(self, name), COLUMNS[name].axes
            # Rows and slots at once: one copy of what is needed.
            return None if array is None else array[rows, : kept[axes[0]]] if axes[0] in kept else array[rows]

        return StoredRows(*(part(one.name) for one in fields(self)))

    def to_torch(self, pin: bool = False) -> StoredRows:
        """Returns the rows as tensors in host memory; `pin`: in pinned memory, from where a GPU copies faster."""
        import torch

        def tensor(array: np.ndarray) -> torch.Tensor:
            made = torch.from_numpy(np.ascontiguousarray(array))
            return made.pin_memory() if pin else made

        return self._each(tensor)

    def to(self, device: torch.device | str) -> StoredRows:
        """Returns tensors on `device`, without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def maps(self, code: ScoreCode, num_classes: int) -> ScoreMaps:
        """Decodes the rows with their store's code and number of classes."""
        scores, background = code.decode(self.scores, self.background)
        offsets = code.decode_offsets(self.tail_offsets)
        return ScoreMaps(self.classes, scores, background, self.region, num_classes, self.tail_classes, offsets)

    def _each(self, change: Callable[[Any], Any]) -> StoredRows:
        """Applies a function to all columns."""
        return StoredRows(*(None if array is None else change(array) for array in vars(self).values()))


def _empty(name: str, count: int, layout: Layout) -> np.ndarray | None:
    """Returns an array for N rows of a column; without slots if the store has no tail; None if it has no such plane."""
    one = COLUMNS[name]
    if name not in layout and one.is_plane:
        return None
    dtype, shape = layout.get(name, (np.dtype("i1"), (0,)))
    return np.empty((count, *shape), np.int64 if one.dtype == CLASS else dtype)


def used_slots(classes: np.ndarray) -> int:
    """Returns the number of slots up to the last that any row uses; unused ones come last."""
    used = np.flatnonzero((classes >= 0).any(0))
    return int(used[-1]) + 1 if len(used) else 0
