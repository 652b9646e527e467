"""Images in parquet files, in the layout of Hugging Face data sets. The only file that imports pyarrow.

A row has a column of images, a struct of `bytes` and `path` or only the bytes, and optionally a column of labels. Keys
are the paths, so a parquet file of a labeled folder has the folder's keys; rows without a path are numbered. A row
group is the smallest part that can be read. It is unpacked into the cache folder when one of its images is first
needed, since the images of a group are rarely needed together.

Legend: N images.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError
from labeler.sources.archive_file import ArchiveFile, cache
from labeler.sources.archives import AGAIN, check_keys, with_progress
from labeler.sources.class_names import number_labels
from labeler.sources.image_source import UNKNOWN_SIZE, BadImage, ImageSource, Storage, chosen, read_at

IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
REPEATED = "Write their paths with the folders, or no paths at all: then rows are numbered."
OUTSIDE = (
    "Write the images with their bytes and a relative path; with Hugging Face's data sets, embed_table_storage does it."
)
RANGE = np.dtype([("start", "<i8"), ("stop", "<i8")])  # of an image's bytes in an unpacked row group
NO_BYTES = 0
UNPACKED = "images"
_LOCKS = [threading.Lock() for _ in range(64)]  # so that the threads of a loader unpack each row group once


@dataclass(frozen=True)
class Columns:
    """The columns of a parquet file that matter.

    Attributes:
        data: The column of the images' bytes.
        path: The column of their paths; None: there is none.
        label: The column of labels; None: there is none.
        class_names: Names of the classes, if the file says them.
    """

    data: str
    path: str | None
    label: str | None
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ParquetStorage:
    """Rows of parquet files.

    Attributes:
        files: The files.
        columns: The column of images in each file.
        keys: Keys of the images.
        file_of: int32 [N]: the file of each image.
        group_of: int32 [N]: its row group.
        row_of: int32 [N]: its row in the group.
    """

    files: tuple[ArchiveFile, ...]
    columns: tuple[str, ...]
    keys: tuple[str, ...]
    file_of: np.ndarray
    group_of: np.ndarray
    row_of: np.ndarray

    def read(self, position: int, most: int | None = None) -> bytes:
        """Reads the image at `position`; at most its first `most` bytes."""
        number, group, row = (int(column[position]) for column in (self.file_of, self.group_of, self.row_of))
        file, column = self.files[number], self.columns[number]
        for _ in range(3):
            unpacked = _unpacked(file, column, group)
            try:
                start, stop = np.frombuffer(read_at(unpacked, row * RANGE.itemsize, RANGE.itemsize), RANGE)[0].tolist()
                if start == NO_BYTES:
                    raise BadImage("the row has no bytes")
                return read_at(unpacked, start, stop - start if most is None else min(most, stop - start))
            except FileNotFoundError:  # removed by another process that needed its room
                continue
        raise BadImage(f"its row group {group} was removed from the cache again and again: the cache is too small")

    def path(self, position: int) -> str:
        """Returns the path of the file followed by the image's key."""
        return f"{self.files[self.file_of[position]].where}/{self.keys[position]}"

    def part(self, positions: np.ndarray) -> Storage:
        """Returns the storage of some of the images."""
        return ParquetStorage(
            tuple(file.absolute() for file in self.files),
            self.columns,
            chosen(self.keys, positions),
            self.file_of[positions],
            self.group_of[positions],
            self.row_of[positions],
        )

    def holds_files(self) -> bool:
        """Whether any of the files is still there."""
        return any(file.exists() for file in self.files)


def parquet_source(files: Sequence[ArchiveFile], name: str, progress: bool = True) -> ImageSource:
    """Opens parquet files.

    Args:
        files: The files.
        name: What the user called them.
        progress: Show a progress bar.

    Returns:
        The images of all files, sorted by key; their sizes are not known before they are read.

    Raises:
        InputError: A file is damaged or has no column of images, there are no images, or keys are repeated.
    """
    parts = [_read_index(file) for file in with_progress(files, progress)]
    names = [key for _, keys, _, _ in parts for key in keys]
    if not names:
        raise InputError(f"no images in {name!r}", got=f"{len(files)} parquet files without rows")
    order = sorted(range(len(names)), key=names.__getitem__)
    keys = tuple(names[i] for i in order)
    check_keys(keys, "parquet files", REPEATED, OUTSIDE)
    counts = [len(part_keys) for _, part_keys, _, _ in parts]
    file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)[order]
    places = np.concatenate([place for *_, place in parts])[order]
    labels, class_names = _labels([columns for columns, *_ in parts], [texts for _, _, texts, _ in parts])
    groups = np.unique(file_of.astype(np.int64) << 32 | places[:, 0], return_inverse=True)[1].reshape(-1)
    return ImageSource(
        name,
        keys,
        np.full(len(keys), UNKNOWN_SIZE),
        ParquetStorage(
            tuple(files),
            tuple(columns.data for columns, *_ in parts),
            keys,
            file_of,
            places[:, 0].copy(),
            places[:, 1].copy(),
        ),
        labels=None if labels is None else labels[order],
        class_names=class_names,
        groups=groups,
    )


def _unpacked(file: ArchiveFile, column: str, group: int) -> Path:
    """Returns the file in the cache that has the images of a row group, after unpacking it if need be."""
    files = cache()
    folder = files.folder("row group", file.version, column, str(group))
    path = folder / UNPACKED
    if not path.exists():
        with _LOCKS[hash(folder) % len(_LOCKS)]:
            if not path.exists():
                images = unpack_group(file, column, group)
                files.make_room(len(images))
                files.write(folder, UNPACKED, images)
    return path


def unpack_group(file: ArchiveFile, column: str, group: int) -> bytes:
    """Reads the images of a row group.

    Args:
        file: The parquet file.
        column: The column of their bytes.
        group: The row group.

    Returns:
        Start and stop of each image in these bytes, then the images.

    Raises:
        BadImage: The row group is damaged.
    """
    parquet = _open(file, _metadata(file, file.version))
    import pyarrow

    try:
        values = parquet.read_row_group(group, columns=[column], use_threads=False).flatten().column(0)
        images = [b"" if value is None else value for value in values.cast(pyarrow.large_binary()).to_pylist()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadImage(f"its row group {group} cannot be read: {_first_line(error)}") from None
    ranges = np.zeros(len(images), RANGE)
    ends = RANGE.itemsize * len(images) + np.cumsum([len(image) for image in images])
    ranges["stop"] = ends
    ranges["start"] = ends - [len(image) for image in images]
    ranges["start"][[not image for image in images]] = NO_BYTES
    return ranges.tobytes() + b"".join(images)


@functools.lru_cache(maxsize=64)
def _metadata(file: ArchiveFile, version: str) -> Any:
    """Returns what a version of a file says of its row groups, so that its end is not read again for each of them."""
    return _open(file).metadata


def _open(file: ArchiveFile, metadata: Any = None) -> Any:
    """Opens a parquet file; metadata: what is known of its row groups."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError(
            f"{file.where!r} cannot be read", got="no pyarrow", remedy="pip install 'token-labeling[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(file.open(), metadata=metadata, pre_buffer=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"the parquet file {file.where!r} cannot be read",
            got=_first_line(error),
            expected="a complete parquet file",
            remedy=AGAIN,
        ) from None


def _read_index(file: ArchiveFile) -> tuple[Columns, list[str], list[str] | None, np.ndarray]:
    """Returns (columns, key of each row, text of its label, int32 [n, 2]: its row group and its row in it)."""
    parquet = _open(file)
    import pyarrow

    columns = _columns(file.where, parquet.schema_arrow)
    wanted = [column for column in (columns.path, columns.label) if column is not None]
    rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    try:
        table = parquet.read(columns=wanted).flatten() if wanted else {}
        paths = table[columns.path].to_pylist() if columns.path else [None] * sum(rows)
        labels = table[columns.label].to_pylist() if columns.label else None
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(
            f"the parquet file {file.where!r} cannot be read", got=_first_line(error), remedy=AGAIN
        ) from None
    stem = file.stem
    keys = [path or f"{stem}/{row:08d}" for row, path in enumerate(paths)]
    texts = None if labels is None else ["" if label is None else str(label) for label in labels]
    groups = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    in_group = np.concatenate([np.arange(count, dtype=np.int32) for count in [0, *rows]])
    return columns, keys, texts, np.stack([groups, in_group], 1)


def _columns(file: str, schema: Any) -> Columns:
    """Finds the columns of images and labels: as Hugging Face's record in the file says, or by their names."""
    import pyarrow

    features = _features(schema)
    typed = {name: feature.get("_type") for name, feature in features.items()}
    images = [name for name, kind in typed.items() if kind == "Image"] or [
        name for name in IMAGE_COLUMNS if name in schema.names
    ]
    if not images:
        raise InputError(
            f"the parquet file {file!r} has no column of images", got=f"the columns {', '.join(schema.names)[:200]}",
            expected=f"one named {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}",
        )  # fmt: skip
    image, kind = images[0], schema.field(images[0]).type
    fields = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
    if "bytes" not in fields and not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise InputError(
            f"the column {image!r} of {file!r} has no images",
            got=str(kind),
            expected="a struct of bytes and path, or bytes",
        )
    classes = [name for name, kind in typed.items() if kind == "ClassLabel"]
    label = next((name for name in (*LABEL_COLUMNS, *classes) if name in schema.names), None)
    names = tuple(features.get(label or "", {}).get("names") or ())
    return Columns(
        f"{image}.bytes" if fields else image,
        f"{image}.path" if "path" in fields else None,
        label,
        names if all(type(name) is str for name in names) else (),
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Returns Hugging Face's description of the columns; empty without one."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _labels(columns: list[Columns], texts: list[list[str] | None]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns (int64 [N]: class ids in order of the rows, class names); (None, ()) if no file has labels."""
    if all(some is None for some in texts):
        return None, ()
    given = [label for some in texts for label in some or ()]
    ids, names = number_labels(given)
    return ids, names or columns[0].class_names


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
