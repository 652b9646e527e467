"""Checks that a shard's file has only what the labeler writes, before any of its data is read."""

from __future__ import annotations

import math
from pathlib import Path

import h5py

from labeler.base.errors import IntegrityError
from labeler.store.row_schema import Layout

META_ROWS = 1024  # rows in a chunk of the small data sets
MAX_ATTRIBUTES, MAX_ATTRIBUTE_BYTES = 100, 64 << 20  # of which class names need most
ALLOWED_FILTERS = frozenset({h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32})


def check_layout(file: h5py.File, layout: Layout, rows: int, path: Path) -> None:
    """Raises IntegrityError for links, virtual or external data, and unexpected shapes, types or filters."""
    if set(file) != set(layout):
        raise damaged_shard(path, f"data sets {sorted(file)}, expected {sorted(layout)}")
    for name, (dtype, row_shape) in layout.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise damaged_shard(path, f"/{name} is a link")
        data = file[name]
        shape = row_shape if name == "code_values" else (rows, *row_shape)
        if not isinstance(data, h5py.Dataset) or data.shape != shape or data.dtype != dtype:
            got = (data.shape, str(data.dtype)) if isinstance(data, h5py.Dataset) else "a group"
            raise damaged_shard(path, f"/{name} is {got}, expected {(shape, str(dtype))}")
        stored = data.id.get_type()
        if stored.committed() or not stored.equal(h5py.h5t.py_create(dtype)) or len(data.attrs):
            raise damaged_shard(path, f"/{name} has a type or attributes that the labeler does not write")
        if 0 in shape:
            continue  # nothing is stored
        if data.is_virtual or data.external or data.chunks is None or data.maxshape != data.shape:
            raise damaged_shard(path, f"/{name} is not stored in chunks in the file itself")
        if any(chunk > max(side, META_ROWS) for chunk, side in zip(data.chunks, shape, strict=True)):
            raise damaged_shard(path, f"/{name} has chunks {data.chunks} for {shape}")
        if data.id.get_num_chunks() != math.prod(-(-s // c) for s, c in zip(shape, data.chunks, strict=True)):
            raise damaged_shard(path, f"/{name} lacks chunks")
        creation = data.id.get_create_plist()
        filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
        if not filters <= ALLOWED_FILTERS or h5py.h5z.FILTER_FLETCHER32 not in filters:
            raise damaged_shard(path, f"/{name} has filters {sorted(filters)}, or no checksum")


def check_attributes(file: h5py.File, path: Path) -> None:
    """Raises IntegrityError for attributes of other types, or too many or too long ones."""
    count, total = h5py.h5a.get_num_attrs(file.id), 0
    for i in range(min(count, MAX_ATTRIBUTES)):
        attribute = h5py.h5a.open(file.id, index=i)
        kind = attribute.get_type()
        plain = kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING)
        if not plain or kind.committed() or (isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()):
            raise damaged_shard(path, f"attribute {i} has a type that the labeler does not write")
        total += attribute.get_storage_size()
    if count > MAX_ATTRIBUTES or total > MAX_ATTRIBUTE_BYTES:
        raise damaged_shard(path, f"{count} attributes of {total:,} bytes")


def damaged_shard(path: Path, problem: str) -> IntegrityError:
    """Returns the error for a damaged shard."""
    return IntegrityError(
        f"{str(path)!r} is damaged or not a shard of this store",
        got=problem,
        remedy="Run the same labeling command again: it labels this shard again.",
    )
