"""One shard as an HDF5 file (see FORMAT.md): the only file that imports h5py.

Legend: n rows of the shard; P palette size; R tail size; H×W map grid.

A shard is built in memory, because libhdf5 ends the process when a disk fills up under it. A shard is read through
HDF5 once, to check its layout and to learn where each chunk lies; rows are then read from the file directly, outside
h5py's global lock.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A file can name filter plug-ins of its own choice; "::" tells libhdf5 to load none. It is read when HDF5 starts.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py
import numpy as np
import xxhash

from labeler.base.errors import IntegrityError
from labeler.base.open_files import OpenFiles

VIEW_FILE = "labels.h5"
LEVEL = 9
MOSTLY = 0.6  # share of zeros
META_ROWS = 1024  # rows in a chunk of the small data sets
_LIBRARY = ctypes.CDLL(h5py.h5p.__file__)  # its dependencies, and so libhdf5, are searched as well
MOST_IN_4_BYTES = 1 << 30  # bytes of data before compression, in a file whose places take four bytes
MAX_LINKS = 32
MAX_ATTRIBUTES, MAX_ATTRIBUTE_BYTES = 100, 64 << 20  # of which class names need most
Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # data set name -> (type, shape of one row)
# Where a row's chunk lies. All rows of all open shards are held, so it is kept small.
CHUNK = np.dtype([("offset", "<i8"), ("size", "<u4"), ("mask", "u1")])
ALLOWED_FILTERS = frozenset({h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32})


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard as they are stored.

    scores        uint8 codes or float16 [n, P, H, W]
    background    likewise [n, H, W]; None in a `logit` store
    classes       uint16 or uint32 [n, P]; the type's maximum where unused
    tail_classes  likewise [n, R]; None in a store without a tail
    tail_offsets  int8 [n, R], in quarter nats; likewise
    region        float32 [n, 4]; image_size uint32 [n, 2]; target int32 [n] (−1 unknown)
    image_digest  uint64 [n]: xxh3-64 of the image file's bytes
    keys          n strings
    """

    scores: np.ndarray
    background: np.ndarray | None
    classes: np.ndarray
    region: np.ndarray
    image_size: np.ndarray
    target: np.ndarray
    image_digest: np.ndarray
    keys: tuple[str, ...]
    tail_classes: np.ndarray | None = None
    tail_offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def checksums(self) -> np.ndarray:
        """uint64 [n]: xxh3-64 over each row's little-endian bytes in the order of the docstring above, the key last."""
        fields = [self.scores, self.background, self.classes, self.tail_classes, self.tail_offsets]
        fields += [self.region, self.image_size, self.target, self.image_digest]
        n = len(self)
        parts = [little_endian(f).reshape(n, -1).view(np.uint8) for f in fields if f is not None] if n else []
        record = np.concatenate(parts, axis=1) if n else np.zeros((0, 0), np.uint8)
        digests = [
            xxhash.xxh3_64_intdigest(row.tobytes() + key.encode()) for row, key in zip(record, self.keys, strict=True)
        ]
        return np.array(digests, np.uint64)


def little_endian(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def class_dtype(num_classes: int) -> np.dtype:
    """The class id type: uint16, or uint32 where its maximum, which means "unused", could be a class."""
    return np.dtype("<u2" if num_classes <= 65_535 else "<u4")


def score_dtype(precision: str) -> np.dtype:
    return np.dtype("u1" if precision == "uint8" else "<f2")


def build_shard(
    rows: ShardRows, layout: Layout, attributes: Mapping[str, Any], code_values: np.ndarray | None = None
) -> bytes:
    """The whole HDF5 file; equal arguments give equal bytes. Raises ValueError where rows do not fit `layout`."""
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
            per_image = name in ("scores", "background")
            _add(file, name, array, (1 if per_image else min(META_ROWS, max(1, shape[0])), *shape[1:]))
        _write_attributes(file, attributes)  # last: they fill space that the links left behind
        file.flush()
        return file.id.get_file_image()


def build_view(shards: Sequence[tuple[str, int]], layout: Layout, attributes: Mapping[str, Any]) -> bytes:
    """`labels.h5` as bytes: one virtual data set over all shards, given as (file name, rows), per entry of `layout`.

    layout: data set name -> (dtype, shape of one row); `code_values` is taken from the first shard.
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


def row_layout(
    palette: int, grid: tuple[int, int], num_classes: int, kind: str, precision: str, key_bytes: int, tail: int = 0
) -> Layout:
    """Data set name -> (dtype, shape of one row) of every store with these settings."""
    scores = score_dtype(precision)
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "scores": (scores, (palette, *grid)),
        "background": (scores, grid),
        "code_values": (np.dtype("<f4"), (256,)),
        "classes": (class_dtype(num_classes), (palette,)),
        "tail_classes": (class_dtype(num_classes), (tail,)),
        "tail_offsets": (np.dtype("i1"), (tail,)),
        "region": (np.dtype("<f4"), (4,)),
        "image_size": (np.dtype("<u4"), (2,)),
        "target": (np.dtype("<i4"), ()),
        "image_digest": (np.dtype("<u8"), ()),
        "key": (np.dtype(f"S{key_bytes}"), ()),
        "checksum": (np.dtype("<u8"), ()),
    }
    if kind == "logit":
        del layout["background"]
    if not tail:
        del layout["tail_classes"], layout["tail_offsets"]
    if precision != "uint8":
        del layout["code_values"]
    return layout


class ShardReader:
    """Reads rows of one shard file; safe to use from several threads.

    `layout` and `rows` are what the store's plan and the shard's marker say; a file that differs is refused with
    IntegrityError before any of its data is read. With `in_memory` the file is held, compressed, in RAM; otherwise it
    is among the open `files`, which readers share.
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
                self._small = {name: file[name][()] for name in layout if name not in ("scores", "background") and rows}
                # Held as the bytes they are, a third of what strings take; they must only be such as can be decoded.
                b"\n".join(self.small("key").tolist()).decode()
                self._chunks = {
                    name: _chunk_table(file[name], path) for name in ("scores", "background") if name in layout
                }
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
        """The keys of all rows, decoded anew at each call."""
        return [key.decode() for key in self.small("key").tolist()]

    def row_of(self, key: str) -> int | None:
        """The row of a key; None where the shard has none."""
        # UTF-8 sorts as code points do; what it cannot express is no key.
        keys, wanted = self.small("key"), key.encode(errors="surrogatepass")
        row = bisect_left(keys, wanted)
        return row if row < len(keys) and keys[row] == wanted else None

    def read(self, rows: np.ndarray) -> ShardRows:
        """The rows [K] in the order asked for, each compared with its checksum. Raises IntegrityError with the key."""
        arrays = {name: self._planes(name, rows) for name in self._chunks}
        names = ("classes", "tail_classes", "tail_offsets", "region", "image_size", "target", "image_digest")
        small = {name: self.small(name)[rows] for name in names if name in self._layout}
        found = ShardRows(
            arrays["scores"],
            arrays.get("background"),
            **small,
            keys=tuple(key.decode() for key in self.small("key")[rows].tolist()),
        )
        wrong = np.nonzero(found.checksums() != self.small("checksum")[rows])[0]
        if len(wrong):
            raise _damaged(self.path, f"row {rows[wrong[0]]} ({found.keys[wrong[0]]!r}) does not match its checksum")
        return found

    def row_bytes(self, row: int) -> int:
        """Compressed bytes of one row's planes."""
        return sum(int(table["size"][row]) for _, table in self._chunks.values())

    @property
    def code_values(self) -> np.ndarray | None:
        return self._small.get("code_values")

    def small(self, name: str) -> np.ndarray:
        """A small data set, whole: classes, tail_…, region, image_size, target, image_digest, key or checksum."""
        return self._small[name] if self.rows else np.zeros((0, *self._layout[name][1]), self._layout[name][0])

    def _planes(self, name: str, rows: np.ndarray) -> np.ndarray:
        dtype, shape = self._layout[name]
        planes = np.empty((len(rows), *shape), dtype)
        if not len(rows):
            return planes
        flat = planes.reshape(len(rows), -1).view(np.uint8)
        shuffle, table = self._chunks[name]
        stored = self._bytes()
        for i, row in enumerate(rows.tolist()):
            offset, size, mask = table[row].tolist()
            # The last four bytes are HDF5's own fletcher32, which the row's checksum makes superfluous here.
            packed = stored(offset, size)[:-4]
            try:
                # One byte more than a row has shows that there is too much; a chunk could hold a thousandfold.
                limit = flat.shape[1] + 1
                plain = np.frombuffer(packed if mask else zlib.decompressobj().decompress(packed, limit), np.uint8)
                if len(plain) != flat.shape[1]:
                    raise ValueError(f"a chunk of {len(plain):,} bytes, expected {flat.shape[1]:,}")
                flat[i] = plain.reshape(dtype.itemsize, -1).T.ravel() if shuffle else plain
            except (zlib.error, ValueError) as error:
                raise _damaged(self.path, f"row {row} of /{name}: {error}") from None
        return planes

    def _bytes(self) -> Callable[[int, int], bytes]:
        """What gives so many bytes of the file from an offset on."""
        image = self._image
        if image is not None:
            return lambda offset, size: image[offset : offset + size]
        try:
            return self._files.get(self.path).read
        except FileNotFoundError:
            raise _damaged(self.path, "no such file any more") from None


def file_rows(store: Path, name: str) -> int:
    """The rows that one data set of a store's view shows."""
    with h5py.File(store / VIEW_FILE, "r") as file:
        return int(file[name].shape[0])


def check_layout(file: h5py.File, layout: Layout, rows: int, path: Path) -> None:
    """Refuse what a shard of this store never has: links, virtual or external data, other shapes, types, filters."""
    if set(file) != set(layout):
        raise _damaged(path, f"data sets {sorted(file)}, expected {sorted(layout)}")
    for name, (dtype, row_shape) in layout.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _damaged(path, f"/{name} is a link to another place")
        data = file[name]
        shape = row_shape if name == "code_values" else (rows, *row_shape)
        if not isinstance(data, h5py.Dataset) or data.shape != shape or data.dtype != dtype:
            found = (data.shape, str(data.dtype)) if isinstance(data, h5py.Dataset) else "a group"
            raise _damaged(path, f"/{name} is {found}, expected {(shape, str(dtype))}")
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
    """Refuse attributes of unlimited number or length."""
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
    """(bytes are shuffled, CHUNK [n]: file offset, size, filter mask of each row's chunk)."""
    table = np.zeros(data.shape[0], CHUNK)
    table["offset"] = -1
    if not data.shape[0]:
        return False, table
    if data.chunks != (1, *data.shape[1:]):
        raise _damaged(path, f"{data.name} has chunks {data.chunks}, expected one image each")
    deflate_bit = 2 if data.shuffle else 1

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.filter_mask & ~deflate_bit:  # only what gzip would make larger may be left as it is
            raise _damaged(path, f"{data.name} has a chunk without its filters")
        table[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size, chunk.filter_mask

    data.id.chunk_iter(note)
    offset, last = table["offset"], path.stat().st_size - table["size"].astype(np.int64)
    if (offset < 0).any() or (offset > last).any():
        raise _damaged(path, f"{data.name} lacks chunks")
    return bool(data.shuffle), table


def _memory_file(payload: int) -> h5py.File:
    """A new file in memory for about `payload` bytes of data."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # A shard of few rows should not be mostly empty space: no blocks set aside, attributes and links in the header,
    # and four bytes for a place in the file where that is enough.
    access.set_meta_block_size(0)
    _set_property("H5Pset_small_data_block_size", access, 0)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_sizes(*((4, 4) if payload < MOST_IN_4_BYTES else (8, 8)))
    creation.set_obj_track_times(False)
    creation.set_attr_phase_change(MAX_ATTRIBUTES, MAX_ATTRIBUTES - 1)
    _set_property("H5Pset_link_phase_change", creation, MAX_LINKS, MAX_LINKS - 1)
    # The name is never a file: it only has to differ from that of every other open memory file.
    name = f"memory-{secrets.token_hex(8)}".encode()
    return h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))


def _add(file: h5py.File, name: str, array: np.ndarray, chunks: tuple[int, ...]) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    _set_property("H5Pset_dset_no_attrs_hint", properties, 1)
    data = little_endian(array)
    if not array.size:
        file.create_dataset(name, data=data, dcpl=properties, track_times=False)
        return
    planes = name in ("scores", "background") and array.dtype == np.uint8
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
    """A chunk as HDF5's gzip and fletcher32 filters read it.

    Where most codes are 0, only runs are looked for: 10 to 40 times faster than any repetition, and 5 to 8 % smaller.
    """
    used = planes.rstrip(b"\0")  # unused places stand last
    sparse = used.count(0) > MOSTLY * len(used)
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 15, 9, zlib.Z_RLE if sparse else zlib.Z_DEFAULT_STRATEGY)
    packed = packer.compress(planes) + packer.flush()
    return packed + fletcher32(packed).to_bytes(4, "little")


def fletcher32(data: bytes) -> int:
    """HDF5's checksum: sums of big-endian words, and of these sums, modulo 65,535, where only nothing sums up to 0."""
    words = np.frombuffer(data + bytes(len(data) % 2), ">u2").astype(np.int64)
    sums = int(words.sum()), int((words * np.arange(len(words), 0, -1)).sum())
    first, second = ((value - 1) % 65_535 + 1 if value else 0 for value in sums)
    return second << 16 | first


def _set_property(function: str, properties: Any, *values: int) -> None:
    """Call a setter of libhdf5 that h5py does not wrap. Where it cannot be found, files only get some kB larger."""
    setter = getattr(_LIBRARY, function, None)
    if setter is not None:
        with h5py._objects.phil:
            setter(ctypes.c_int64(properties.id), *(ctypes.c_uint64(value) for value in values))


def _write_attributes(file: h5py.File, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, str):
            data = value.encode()
            file.attrs.create(
                name, np.array(data, f"S{max(1, len(data))}"), dtype=h5py.string_dtype("utf-8", max(1, len(data)))
            )
        else:
            file.attrs[name] = value


def _read_attributes(file: h5py.File) -> dict[str, Any]:
    found = {}
    for name, value in file.attrs.items():
        if isinstance(value, bytes | np.bytes_):
            value = value.decode()
        found[name] = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return found


def _damaged(path: Path, problem: str) -> IntegrityError:
    return IntegrityError(
        f"{str(path)!r} is damaged or not a shard of this store",
        got=problem,
        remedy="Run the same labeling command again: it labels this shard anew.",
    )
