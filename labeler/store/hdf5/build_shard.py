"""Builds a shard's HDF5 file, and the view over all shards.

Both are built in memory, because libhdf5 crashes the process when the disk is full.
"""

from __future__ import annotations

import ctypes
import math
import secrets
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from labeler.store.hdf5.check_shard import MAX_ATTRIBUTES, META_ROWS
from labeler.store.row_schema import PLANES, Layout, ShardRows, little_endian

LEVEL = 9
MOSTLY = 0.6  # share of zeros
_LIBRARY = ctypes.CDLL(h5py.h5p.__file__)  # its dependencies, such as libhdf5, are searched as well
MOST_IN_4_BYTES = 1 << 30  # bytes of data before compression, in a file with offsets of four bytes
MAX_LINKS = 32


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
        shards: (file name, rows) of each shard; names are relative to the folder of the view.
        layout: The data sets of a shard, with the longest keys of any. Each becomes a virtual data set; `code_values`
            is that of the first shard.
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
