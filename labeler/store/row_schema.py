"""The columns of a store's rows, in one table: the fields of `ShardRows`. All that handles rows follows from them.

Legend: n rows; C classes; P palette size; R tail size; H×W map grid.

The order of the fields is that of the data sets in a file and of the bytes in a row's checksum. To add a column, add a
field here, and to `StoredRows` if the loader needs it; then give its value where rows are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from labeler.store.encoder import EncodedMaps

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # data set name -> (type, shape of one row)
SCORE, CLASS = "score", "class"  # types that depend on the store's precision and number of classes


@dataclass(frozen=True)
class Column:
    """How a column is stored.

    Attributes:
        dtype: NumPy's name of the type, or `SCORE` or `CLASS`.
        axes: Shape of one row: numbers, and "P", "R", "H", "W" for the store's sizes. A column of R is absent if R = 0.
        absent_in: The kind of store that has no such column.
    """

    dtype: str
    axes: tuple[str | int, ...]
    absent_in: str | None = None

    @property
    def is_plane(self) -> bool:
        """Whether a row has a value for each cell; a chunk of the file is one row then."""
        return "H" in self.axes


def stored(dtype: str, *axes: str | int, absent_in: str | None = None) -> dict[str, Column]:
    """Returns the metadata of a field of `ShardRows`, see `Column`."""
    return {"column": Column(dtype, axes, absent_in)}


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """The rows of a shard as they are stored.

    Attributes:
        scores: uint8 codes or float16 [n, P, H, W].
        background: uint8 codes or float16 [n, H, W]; None in a `logit` store.
        classes: uint16 or uint32 [n, P]; the type's maximum where unused.
        tail_classes: uint16 or uint32 [n, R]; None in a store without a tail.
        tail_offsets: int8 [n, R], in quarter nats; None in a store without a tail.
        region: float32 [n, 4]: y0, x0, y1, x1 of the part that the map covers, as fractions of the image.
        image_size: uint32 [n, 2]: height and width.
        target: int32 [n]; −1 where unknown.
        image_digest: uint64 [n]: xxh3-64 of the image file's bytes.
        keys: n strings.
    """

    scores: np.ndarray = field(metadata=stored(SCORE, "P", "H", "W"))
    background: np.ndarray | None = field(default=None, metadata=stored(SCORE, "H", "W", absent_in="logit"))
    classes: np.ndarray = field(metadata=stored(CLASS, "P"))
    tail_classes: np.ndarray | None = field(default=None, metadata=stored(CLASS, "R"))
    tail_offsets: np.ndarray | None = field(default=None, metadata=stored("i1", "R"))
    region: np.ndarray = field(metadata=stored("<f4", 4))
    image_size: np.ndarray = field(metadata=stored("<u4", 2))
    target: np.ndarray = field(metadata=stored("<i4"))
    image_digest: np.ndarray = field(metadata=stored("<u8"))
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, parts: Sequence[ShardRows], layout: Layout) -> ShardRows:
        """Concatenates parts, of which there may be none."""
        arrays = {
            name: np.concatenate([np.zeros((0, *shape), dtype), *(getattr(part, name) for part in parts)])
            for name, (dtype, shape) in layout.items()
            if name in COLUMNS
        }
        return cls(**arrays, keys=tuple(key for part in parts for key in part.keys))

    def first(self, count: int) -> ShardRows:
        """Returns the first rows."""
        arrays = {name: array[:count] for name, array in self.arrays().items()}
        return ShardRows(**arrays, keys=self.keys[:count])

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns name -> array of the columns that the store has, in order."""
        return {name: array for name in COLUMNS if (array := getattr(self, name)) is not None}

    def checksums(self) -> np.ndarray:
        """Returns uint64 [n]: xxh3-64 over each row's little-endian bytes, column by column, then its key."""
        n = len(self)
        parts = [little_endian(a).reshape(n, -1).view(np.uint8) for a in self.arrays().values()] if n else []
        record = np.concatenate(parts, axis=1) if n else np.zeros((0, 0), np.uint8)
        digests = [
            xxhash.xxh3_64_intdigest(row.tobytes() + key.encode()) for row, key in zip(record, self.keys, strict=True)
        ]
        return np.array(digests, np.uint64)


COLUMNS: dict[str, Column] = {one.name: one.metadata["column"] for one in fields(ShardRows) if one.metadata}
PLANES = tuple(name for name, one in COLUMNS.items() if one.is_plane)


def row_layout(
    palette: int, grid: tuple[int, int], num_classes: int, kind: str, precision: str, key_bytes: int, tail: int = 0
) -> Layout:
    """Returns the data sets of a store with these settings, in the order of the file.

    Args:
        palette: P.
        grid: H, W.
        num_classes: C.
        kind: "logprob" or "logit".
        precision: "uint8" or "float16".
        key_bytes: Width of the key field.
        tail: R.

    Returns:
        Data set name -> (type, shape of one row); `code_values` has no rows.
    """
    sizes = {"P": palette, "R": tail, "H": grid[0], "W": grid[1]}
    types = {SCORE: np.dtype("u1" if precision == "uint8" else "<f2"), CLASS: class_dtype(num_classes)}
    columns = {}
    for name, one in COLUMNS.items():
        if one.absent_in != kind and (tail or "R" not in one.axes):
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in one.axes)
            columns[name] = types[one.dtype] if one.dtype in types else np.dtype(one.dtype), shape
    planes = {name: columns.pop(name) for name in PLANES if name in columns}
    codes = {"code_values": (np.dtype("<f4"), (256,))} if precision == "uint8" else {}
    key = {"key": (np.dtype(f"S{key_bytes}"), ()), "checksum": (np.dtype("<u8"), ())}
    return {**planes, **codes, **columns, **key}


def encoded_columns(maps: EncodedMaps, num_classes: int) -> dict[str, np.ndarray]:
    """Returns the columns of `ShardRows` that the encoder makes; `num_classes`: C."""
    columns = {name: getattr(maps, name) for name in COLUMNS if hasattr(maps, name)}
    if not maps.tail_classes.shape[1]:
        columns = {name: array for name, array in columns.items() if "R" not in COLUMNS[name].axes}
    return {
        name: store_classes(array, num_classes) if COLUMNS[name].dtype == CLASS else array
        for name, array in columns.items()
    }


def class_dtype(num_classes: int) -> np.dtype:
    """Returns the type of class ids: uint16, or uint32 if uint16's maximum, which means "unused", could be a class."""
    return np.dtype("<u2" if num_classes <= 65_535 else "<u4")


def store_classes(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Converts class ids, −1 where unused, to the type and the mark for unused slots that are stored."""
    dtype = class_dtype(num_classes)
    return np.where(classes < 0, np.iinfo(dtype).max, classes).astype(dtype)


def signed_classes(ids: np.ndarray) -> np.ndarray:
    """Converts stored class ids to int64, with −1 where unused."""
    return np.where(ids == np.iinfo(ids.dtype).max, -1, ids.astype(np.int64))


def little_endian(array: np.ndarray) -> np.ndarray:
    """Converts an array to contiguous little-endian numbers."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
