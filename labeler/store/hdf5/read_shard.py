"""Reads rows of a shard.

HDF5 reads a shard once, to check its layout and to locate each chunk; rows are then read from the file directly,
outside of h5py's global lock.
"""

from __future__ import annotations

import errno
import zlib
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from labeler.base.errors import IntegrityError
from labeler.base.open_files import OpenFiles
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.hdf5.check_shard import check_attributes, check_layout, damaged_shard
from labeler.store.row_schema import COLUMNS, PLANES, Layout, ShardRows

# Location of a row's chunk. It is small because it is in memory for all rows of all open shards.
CHUNK = np.dtype([("offset", "<i8"), ("size", "<u4"), ("mask", "u1")])


class ShardReader:
    """Reads rows of one shard file; safe to use from several threads.

    Args:
        path: The shard's file.
        layout: Its data sets, as the store's plan says.
        rows: Its number of rows, as its marker says.
        in_memory: Keep the compressed file in memory.
        files: The pool of open files, which readers share; None: a pool of its own.

    Raises:
        IntegrityError: The file is damaged, or differs from `layout` and `rows`; no data has been read then.
    """

    def __init__(
        self, path: Path, layout: Layout, rows: int, *, in_memory: bool = False, files: OpenFiles | None = None
    ) -> None:
        self.path, self.rows = path, rows
        self._layout, self._files = layout, OpenFiles(1) if files is None else files
        try:
            with h5py.File(path, "r", libver="v110") as file:
                check_layout(file, layout, rows, path)
                check_attributes(file, path)
                self.attributes = _read_attributes(file)
                self._small = {name: file[name][()] for name in layout if name not in PLANES and rows}
                # Kept as bytes, a third of the size of strings, after checking that they can be decoded.
                b"\n".join(self.small("key").tolist()).decode()
                self._chunks = {name: _chunk_table(file[name], path) for name in PLANES if name in layout}
        except IntegrityError:
            raise
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            raise damaged_shard(path, (str(error).splitlines() or ["OSError"])[0]) from None
        except (RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise damaged_shard(path, (str(error).splitlines() or [type(error).__name__])[0]) from None
        self._image = path.read_bytes() if in_memory else None

    @property
    def keys(self) -> list[str]:
        """The keys of all rows, decoded at each access."""
        return [key.decode() for key in self.small("key").tolist()]

    def row_of(self, key: str) -> int | None:
        """Returns the row of a key; None if the shard has none."""
        # UTF-8 sorts in the order of code points; a text that it cannot express is not a key.
        keys, wanted = self.small("key"), key.encode(errors="surrogatepass")
        row = bisect_left(keys, wanted)
        return row if row < len(keys) and keys[row] == wanted else None

    def read(self, rows: np.ndarray) -> ShardRows:
        """Reads rows and compares each with its checksum.

        Args:
            rows: int [K]: row numbers, in any order.

        Returns:
            The rows, in that order.

        Raises:
            IntegrityError: A row is damaged; it names the key.
        """
        names = [name for name in self._layout if name in COLUMNS]
        arrays = {name: self._planes(name, rows) if name in PLANES else self.small(name)[rows] for name in names}
        result = ShardRows(**arrays, keys=tuple(key.decode() for key in self.small("key")[rows].tolist()))
        wrong = np.nonzero(result.checksums() != self.small("checksum")[rows])[0]
        if len(wrong):
            raise damaged_shard(
                self.path, f"row {rows[wrong[0]]} ({result.keys[wrong[0]]!r}) does not match its checksum"
            )
        return result

    def row_bytes(self, row: int) -> int:
        """Returns the compressed bytes of one row's planes."""
        return sum(int(table["size"][row]) for _, table in self._chunks.values())

    @property
    def code_values(self) -> np.ndarray | None:
        """float32 [256]: the score of each uint8 code; None if scores are float16."""
        return self._small.get("code_values")

    def small(self, name: str) -> np.ndarray:
        """Returns a small data set: classes, tail_…, region, image_size, target, image_digest, key or checksum."""
        return self._small[name] if self.rows else np.zeros((0, *self._layout[name][1]), self._layout[name][0])

    def _planes(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Reads the planes of rows from /scores or /background."""
        dtype, shape = self._layout[name]
        planes = np.empty((len(rows), *shape), dtype)
        if not len(rows):
            return planes
        flat = planes.reshape(len(rows), -1).view(np.uint8)
        shuffle, table = self._chunks[name]
        stored = self._bytes()
        for i, row in enumerate(rows.tolist()):
            offset, size, mask = table[row].tolist()
            # The last four bytes are HDF5's own fletcher32, not needed since the row has a checksum.
            packed = stored(offset, size)[:-4]
            try:
                # One byte more than expected is enough to detect a chunk that expands too much.
                limit = flat.shape[1] + 1
                plain = np.frombuffer(packed if mask else zlib.decompressobj().decompress(packed, limit), np.uint8)
                if len(plain) != flat.shape[1]:
                    raise ValueError(f"a chunk of {len(plain):,} bytes, expected {flat.shape[1]:,}")
                flat[i] = plain.reshape(dtype.itemsize, -1).T.ravel() if shuffle else plain
            except (zlib.error, ValueError) as error:
                raise damaged_shard(self.path, f"row {row} of /{name}: {error}") from None
        return planes

    def _bytes(self) -> Callable[[int, int], bytes]:
        """Returns the function that reads the file: (offset, size) -> bytes."""
        image = self._image
        if image is not None:
            return lambda offset, size: image[offset : offset + size]
        try:
            return self._files.get(self.path).read
        except FileNotFoundError:
            raise damaged_shard(self.path, "the file no longer exists") from None


def file_rows(store: Path, name: str) -> int:
    """Returns the number of rows of a data set in a store's view."""
    with h5py.File(store / VIEW_FILE, "r") as file:
        return int(file[name].shape[0])


def _chunk_table(data: h5py.Dataset, path: Path) -> tuple[bool, np.ndarray]:
    """Returns (whether bytes are shuffled, CHUNK [n]: file offset, size and filter mask of each row's chunk)."""
    table = np.zeros(data.shape[0], CHUNK)
    table["offset"] = -1
    if not data.shape[0]:
        return False, table
    if data.chunks != (1, *data.shape[1:]):
        raise damaged_shard(path, f"{data.name} has chunks {data.chunks}, expected one image each")
    deflate_bit = 2 if data.shuffle else 1

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.filter_mask & ~deflate_bit:  # only gzip may be left out, where it would make a chunk larger
            raise damaged_shard(path, f"{data.name} has a chunk without its filters")
        table[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size, chunk.filter_mask

    data.id.chunk_iter(note)
    offset, last = table["offset"], path.stat().st_size - table["size"].astype(np.int64)
    if (offset < 0).any() or (offset > last).any():
        raise damaged_shard(path, f"{data.name} lacks chunks")
    return bool(data.shuffle), table


def _read_attributes(file: h5py.File) -> dict[str, Any]:
    """Reads attributes as plain Python values."""
    attributes = {}
    for name, value in file.attrs.items():
        if isinstance(value, bytes | np.bytes_):
            value = value.decode()
        attributes[name] = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return attributes
