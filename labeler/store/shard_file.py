"""One shard as an HDF5 file (see FORMAT.md): the only file that imports h5py.

Legend: n rows of the shard; P palette size; R tail size; H×W map grid.

A shard is built in memory, because libhdf5 crashes the process when the disk is full. HDF5 reads a shard once, to check
its layout and to locate each chunk; rows are then read from the file directly, outside of h5py's global lock.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import secrets
import zlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A file can name any filter plug-in; "::" makes libhdf5 load none. The variable is read when HDF5 starts.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py
import numpy as np

from labeler.base.errors import IntegrityError
from labeler.base.open_files import OpenFiles
from labeler.store.row_schema import COLUMNS, PLANES, Layout, ShardRows, little_endian

VIEW_FILE = "labels.h5"
LEVEL = 9
MOSTLY = 0.6  # share of zeros
META_ROWS = 1024  # rows in a chunk of the small data sets
_LIBRARY = ctypes.CDLL(h5py.h5p.__file__)  # its dependencies, such as libhdf5, are searched as well
MOST_IN_4_BYTES = 1 << 30  # bytes of data before compression, in a file with offsets of four bytes
MAX_LINKS = 32
MAX_ATTRIBUTES, MAX_ATTRIBUTE_BYTES = 100, 64 << 20  # of which class names need most
# Location of a row's chunk. It is small because it is in memory for all rows of all open shards.
CHUNK = np.dtype([("offset", "<i8"), ("size", "<u4"), ("mask", "u1")])
ALLOWED_FILTERS = frozenset({h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32})


def build_shard(
    rows: ShardRows, layout: Layout, attributes: Mapping[str, Any], code_values: np.ndarray | None = None
) -> bytes:
    """Builds a shard's HDF5 file in memory. Equal arguments give equal bytes.

    Args:
        rows: The rows of the shard.
        layout: Its data sets.
        attributes: Its attributes.
        code_values: float32 [256]: the score of each uint8 code; None for float16.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: The rows do not fit the layout.
    """
    keys = [key.encode() for key in rows.keys]
    if max(map(len, keys), default=0) > layout["key"][0].itemsize:
        raise ValueError(f"a key is longer than the {layout['key'][0].itemsize} bytes of the layout")
    special: dict[str, Any] = {
        "code_values": code_values,
        "key": np.array(keys, layout["key"][0]),
        "checksum": rows.checksums(),
    }
    payload = sum(len(rows) * dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    with _memory_file(payload) as file:
        for name, (dtype, row_shape) in layout.items():
            array: np.ndarray = special[name] if name in special else getattr(rows, name)
            shape = row_shape if name == "code_values" else (len(rows), *row_shape)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, the layout has {dtype} {shape}")
            _add(file, name, array, (1 if name in PLANES else min(META_ROWS, max(1, shape[0])), *shape[1:]))
        _write_attributes(file, attributes)  # last: they fill space that the links left free
        file.flush()
        return file.id.get_file_image()


def build_view(shards: Sequence[tuple[str, int]], layout: Layout, attributes: Mapping[str, Any]) -> bytes:
    """Builds `labels.h5`, the view over all shards, in memory.

    Args:
        shards: (file name, rows) of each shard.
        layout: The data sets of a shard. Each becomes a virtual data set; `code_values` is that of the first shard.
        attributes: Attributes of the view.

    Returns:
        The bytes of the file.
    """
    total = sum(rows for _, rows in shards)
    with _memory_file(0) as file:
        _write_attributes(file, attributes)
        for name, (dtype, row_shape) in layout.items():
            if name == "code_values":
                virtual = h5py.VirtualLayout(row_shape, dtype)
                virtual[...] = h5py.VirtualSource(shards[0][0], name, row_shape, dtype)
            else:
                virtual, start = h5py.VirtualLayout((total, *row_shape), dtype), 0
                for file_name, rows in shards:
                    if rows:
                        virtual[start : start + rows] = h5py.VirtualSource(file_name, name, (rows, *row_shape), dtype)
                    start += rows
            virtual.dcpl.set_obj_track_times(False)
            file.create_virtual_dataset(name, virtual)
        file.flush()
        return file.id.get_file_image()


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
            raise _damaged(path, (str(error).splitlines() or ["OSError"])[0]) from None
        except (RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from None
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
            raise _damaged(self.path, f"row {rows[wrong[0]]} ({result.keys[wrong[0]]!r}) does not match its checksum")
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
                raise _damaged(self.path, f"row {row} of /{name}: {error}") from None
        return planes

    def _bytes(self) -> Callable[[int, int], bytes]:
        """Returns the function that reads the file: (offset, size) -> bytes."""
        image = self._image
        if image is not None:
            return lambda offset, size: image[offset : offset + size]
        try:
            return self._files.get(self.path).read
        except FileNotFoundError:
            raise _damaged(self.path, "the file no longer exists") from None


def file_rows(store: Path, name: str) -> int:
    """Returns the number of rows of a data set in a store's view."""
    with h5py.File(store / VIEW_FILE, "r") as file:
        return int(file[name].shape[0])


def check_layout(file: h5py.File, layout: Layout, rows: int, path: Path) -> None:
    """Raises IntegrityError for links, virtual or external data, and unexpected shapes, types or filters."""
    if set(file) != set(layout):
        raise _damaged(path, f"data sets {sorted(file)}, expected {sorted(layout)}")
    for name, (dtype, row_shape) in layout.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _damaged(path, f"/{name} is a link")
        data = file[name]
        shape = row_shape if name == "code_values" else (rows, *row_shape)
        if not isinstance(data, h5py.Dataset) or data.shape != shape or data.dtype != dtype:
            got = (data.shape, str(data.dtype)) if isinstance(data, h5py.Dataset) else "a group"
            raise _damaged(path, f"/{name} is {got}, expected {(shape, str(dtype))}")
        stored = data.id.get_type()
        if stored.committed() or not stored.equal(h5py.h5t.py_create(dtype)) or len(data.attrs):
            raise _damaged(path, f"/{name} has a type or attributes that the labeler does not write")
        if 0 in shape:
            continue  # nothing is stored
        if data.is_virtual or data.external or data.chunks is None or data.maxshape != data.shape:
            raise _damaged(path, f"/{name} is not stored in chunks in the file itself")
        if any(chunk > max(side, META_ROWS) for chunk, side in zip(data.chunks, shape, strict=True)):
            raise _damaged(path, f"/{name} has chunks {data.chunks} for {shape}")
        if data.id.get_num_chunks() != math.prod(-(-s // c) for s, c in zip(shape, data.chunks, strict=True)):
            raise _damaged(path, f"/{name} lacks chunks")
        creation = data.id.get_create_plist()
        filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
        if not filters <= ALLOWED_FILTERS or h5py.h5z.FILTER_FLETCHER32 not in filters:
            raise _damaged(path, f"/{name} has filters {sorted(filters)}, or no checksum")


def check_attributes(file: h5py.File, path: Path) -> None:
    """Raises IntegrityError for attributes of other types, or too many or too long ones."""
    count, total = h5py.h5a.get_num_attrs(file.id), 0
    for i in range(min(count, MAX_ATTRIBUTES)):
        attribute = h5py.h5a.open(file.id, index=i)
        kind = attribute.get_type()
        plain = kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING)
        if not plain or kind.committed() or (isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()):
            raise _damaged(path, f"attribute {i} has a type that the labeler does not write")
        total += attribute.get_storage_size()
    if count > MAX_ATTRIBUTES or total > MAX_ATTRIBUTE_BYTES:
        raise _damaged(path, f"{count} attributes of {total:,} bytes")


def _chunk_table(data: h5py.Dataset, path: Path) -> tuple[bool, np.ndarray]:
    """Returns (whether bytes are shuffled, CHUNK [n]: file offset, size and filter mask of each row's chunk)."""
    table = np.zeros(data.shape[0], CHUNK)
    table["offset"] = -1
    if not data.shape[0]:
        return False, table
    if data.chunks != (1, *data.shape[1:]):
        raise _damaged(path, f"{data.name} has chunks {data.chunks}, expected one image each")
    deflate_bit = 2 if data.shuffle else 1

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.filter_mask & ~deflate_bit:  # only gzip may be left out, where it would make a chunk larger
            raise _damaged(path, f"{data.name} has a chunk without its filters")
        table[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size, chunk.filter_mask

    data.id.chunk_iter(note)
    offset, last = table["offset"], path.stat().st_size - table["size"].astype(np.int64)
    if (offset < 0).any() or (offset > last).any():
        raise _damaged(path, f"{data.name} lacks chunks")
    return bool(data.shuffle), table


def _memory_file(payload: int) -> h5py.File:
    """Creates an HDF5 file in memory for about `payload` bytes of data."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # A shard of few rows should not be mostly empty space: no reserved blocks, attributes and links in the header, and
    # file offsets of four bytes if that is enough.
    access.set_meta_block_size(0)
    _set_property("H5Pset_small_data_block_size", access, 0)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_sizes(*((4, 4) if payload < MOST_IN_4_BYTES else (8, 8)))
    creation.set_obj_track_times(False)
    creation.set_attr_phase_change(MAX_ATTRIBUTES, MAX_ATTRIBUTES - 1)
    _set_property("H5Pset_link_phase_change", creation, MAX_LINKS, MAX_LINKS - 1)
    # There is no file of this name: it only has to differ from those of other open memory files.
    name = f"memory-{secrets.token_hex(8)}".encode()
    return h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))


def _add(file: h5py.File, name: str, array: np.ndarray, chunks: tuple[int, ...]) -> None:
    """Adds a data set to a file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    _set_property("H5Pset_dset_no_attrs_hint", properties, 1)
    data = little_endian(array)
    if not array.size:
        file.create_dataset(name, data=data, dcpl=properties, track_times=False)
        return
    planes = name in PLANES and array.dtype == np.uint8
    stored = file.create_dataset(
        name,
        shape=array.shape,
        dtype=data.dtype,
        data=None if planes else data,
        dcpl=properties,
        chunks=chunks,
        compression="gzip",
        compression_opts=LEVEL,
        shuffle=array.dtype.itemsize > 1 and array.dtype.kind != "S",
        fletcher32=True,
        track_times=False,
    )
    for row in range(len(array) if planes else 0):
        stored.id.write_direct_chunk((row, *[0] * (array.ndim - 1)), packed_planes(data[row].tobytes()))


def packed_planes(planes: bytes) -> bytes:
    """Compresses planes to a chunk that HDF5's gzip and fletcher32 filters can read.

    If most codes are 0, zlib only looks for runs: 10 to 40 times faster than its usual search, and 5 to 8 % smaller.
    """
    used = planes.rstrip(b"\0")  # unused slots come last
    sparse = used.count(0) > MOSTLY * len(used)
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 15, 9, zlib.Z_RLE if sparse else zlib.Z_DEFAULT_STRATEGY)
    packed = packer.compress(planes) + packer.flush()
    return packed + fletcher32(packed).to_bytes(4, "little")


def fletcher32(data: bytes) -> int:
    """Returns HDF5's checksum: sums of big-endian words, and of these sums, modulo 65,535; only zeros sum up to 0."""
    words = np.frombuffer(data + bytes(len(data) % 2), ">u2").astype(np.int64)
    sums = int(words.sum()), int((words * np.arange(len(words), 0, -1)).sum())
    first, second = ((value - 1) % 65_535 + 1 if value else 0 for value in sums)
    return second << 16 | first


def _set_property(function: str, properties: Any, *values: int) -> None:
    """Calls a setter of libhdf5 that h5py does not wrap. If it is not found, files just get some kB larger."""
    setter = getattr(_LIBRARY, function, None)
    if setter is not None:
        with h5py._objects.phil:
            setter(ctypes.c_int64(properties.id), *(ctypes.c_uint64(value) for value in values))


def _write_attributes(file: h5py.File, attributes: Mapping[str, Any]) -> None:
    """Writes attributes, texts as fixed-length UTF-8."""
    for name, value in attributes.items():
        if isinstance(value, str):
            data = value.encode()
            file.attrs.create(
                name, np.array(data, f"S{max(1, len(data))}"), dtype=h5py.string_dtype("utf-8", max(1, len(data)))
            )
        else:
            file.attrs[name] = value


def _read_attributes(file: h5py.File) -> dict[str, Any]:
    """Reads attributes as plain Python values."""
    attributes = {}
    for name, value in file.attrs.items():
        if isinstance(value, bytes | np.bytes_):
            value = value.decode()
        attributes[name] = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return attributes


def _damaged(path: Path, problem: str) -> IntegrityError:
    """Returns the error for a damaged shard."""
    return IntegrityError(
        f"{str(path)!r} is damaged or not a shard of this store",
        got=problem,
        remedy="Run the same labeling command again: it labels this shard again.",
    )
