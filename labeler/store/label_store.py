"""`LabelStore`: read a label store by row or by key.

Legend: N requested rows; P palette size; R tail size; H×W map grid.

The reader uses the plan, the markers and shard arithmetic, and never follows links inside a file. It compares every
shard with its digest when it first opens it, and every row with its checksum when it reads it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError, MismatchError
from labeler.base.open_files import OpenFiles
from labeler.remote.remote_files import path_or_url
from labeler.store.check_store import Verification, check_images, check_store
from labeler.store.foreign_store import (
    CHECKED,
    WRITTEN,
    check_known,
    open_folder,
    refuse_hostile,
    refuse_hostile_shard,
)
from labeler.store.hdf5.read_shard import ShardReader
from labeler.store.plan import HEAD_FILE, Plan, StoreMeta, load_plan
from labeler.store.row_schema import ShardRows, signed_classes
from labeler.store.score_code import ScoreCode
from labeler.store.score_maps import ScoreMaps
from labeler.store.shard_markers import Marker, check_file, read_markers
from labeler.store.stored_rows import StoredRows

CACHES = (None, "ram", "ram-compressed")


class LabelStore:
    """A complete label store, open for reading.

    One behind a URL is read without being copied first: its plan and markers at once, each shard on first use, into a
    cache (see `labeler.remote.file_cache`), where its digest is checked; `keys` and `column` need all shards.

    It can be used from several threads; a pickled copy in another process opens its own files. At most 256 of the
    shards' files are open at a time, fewer if the process may open only few. `close()`, or the end of a
    `with LabelStore(path) as store:`, closes them and drops the cache.

    Args:
        path: The store's folder, or its URL: s3://…, hf://datasets/USER/NAME, https://…
        cache: None: read rows from the files; "ram-compressed": keep the files in memory; "ram": keep all codes in it.
        trusted: Skip the check of a store from elsewhere (see `labeler.store.foreign_store`), which takes 1.6 s for
            10,000 rows, once.

    Attributes:
        path: The folder or URL that was given.
        folder: The folder here that its files are in.

    Raises:
        InputError: There is no store, or a driver for its URL is missing.
        MismatchError: The store has a newer format.
        IntegrityError: Shards are missing or damaged.
        RemoteError: The service of its URL does not answer.
    """

    def __init__(self, path: str | Path, cache: str | None = None, trusted: bool = False) -> None:
        if cache not in CACHES:
            raise InputError("cache is not known", got=repr(cache), expected='None, "ram" or "ram-compressed"')
        self.path, self.cache = path_or_url(path), cache
        self.folder, self._remote = open_folder(path)
        known = check_known(self.folder) if self._remote else None
        if self._remote is None and not trusted:
            known = WRITTEN if refuse_hostile(self.folder) else CHECKED
        # Whether the teacher that the plan names may be run here.
        self.trusted = trusted or known == WRITTEN
        # Whether shards of a remote store can be opened as they are, and whether all of them are here.
        self._checked, self._all_here = trusted or known is not None, self._remote is None
        plan = load_plan(self.folder)
        if plan is None:
            raise InputError(
                f"{str(path)!r} is not a label store",
                got="no plan.json in it" if self._remote or self.folder.is_dir() else "no such folder",
                remedy="Label one with `python -m labeler label`.",
            )
        self.plan: Plan = plan
        self.markers: list[Marker] = read_markers(self.folder, plan, self.path)
        # First row of each shard; at the end, the number of rows.
        self._starts = np.cumsum([0, *(marker.rows for marker in self.markers)])
        self._readers: dict[int, ShardReader] = {}
        self._files = OpenFiles()
        self.closed = False

    def close(self) -> None:
        """Closes all files and drops the cache; reads that are under way in other threads still finish."""
        self.closed = True
        self._readers.clear()
        self._files.close()
        if self._remote is not None:
            self._remote.close()
        for held in ("_held", "keys"):
            self.__dict__.pop(held, None)

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        m = self.meta
        grid = "×".join(map(str, m.grid))
        return (
            f"LabelStore({str(self.path)!r}: {len(self):,} rows, {m.num_classes} classes, palette {m.palette}, {grid})"
        )

    def __getstate__(self) -> dict[str, Any]:
        checked = self._checked if self._remote else True
        return {"path": self.path, "cache": self.cache, "trusted": checked, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        wanted = state.pop("fingerprint")
        self.__init__(**state)  # type: ignore[misc]
        if self.fingerprint != wanted:
            raise MismatchError(
                f"the store {str(self.path)!r} has changed since it was opened", remedy="Start again with the new one."
            )

    @property
    def meta(self) -> StoreMeta:
        """The content of the store."""
        return self.plan.meta

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all shards: the same for equal stores only."""
        digest = hashlib.sha256(self.meta.dataset_fingerprint.encode())
        for marker in self.markers:
            digest.update(marker.sha256.encode())
        return digest.hexdigest()

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """{"key", "reason"} of each image that could not be labeled."""
        return [entry for marker in self.markers for entry in marker.quarantine]

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row, in order of rows, which are sorted by key."""
        self._fetch_all()
        return [key for shard in range(len(self.markers)) for key in self.reader(shard).keys]

    def head_file(self) -> Path:
        """Returns the file of the head that was fitted for the store, fetched if the store is behind a URL."""
        if self._remote is not None and self.plan.head is not None:
            self._remote.fetch(HEAD_FILE, *self.plan.head)
        return self.folder / HEAD_FILE

    @property
    def bytes(self) -> int:
        """Bytes of all files of the store; for one behind a URL, of its shards, plan and markers."""
        if self._remote is None:
            return sum(file.stat().st_size for file in self.folder.iterdir())
        records = sum(file.stat().st_size for file in self.folder.glob("*.json"))
        return records + sum(marker.size for marker in self.markers)

    @property
    def code(self) -> ScoreCode:
        """The meaning of stored scores."""
        return self.plan.code

    @property
    def code_values(self) -> np.ndarray | None:
        """float32 [256]: the score of each uint8 code; None if scores are float16."""
        return self.code.values

    def row_of(self, key: str) -> int:
        """Returns the row of an image.

        Args:
            key: The image's key.

        Returns:
            The row.

        Raises:
            KeyError: The image has no row. If it is in the quarantine, the message says why.
        """
        shard = bisect_right([marker.first_key for marker in self.markers], key) - 1
        if shard >= 0:
            row = self.reader(shard).row_of(key)
            if row is not None:
                return int(self._starts[shard]) + row
            for entry in self.markers[shard].quarantine:
                if entry["key"] == key:
                    raise KeyError(f"{key!r} has no labels: {entry['reason']}")
        raise KeyError(f"{key!r} is not in the store {str(self.path)!r}")

    def column(self, name: str) -> np.ndarray:
        """Reads a small data set for all rows.

        Args:
            name: classes, tail_classes, tail_offsets, region, image_size, target, image_digest or checksum.

        Returns:
            The data set, as it is stored.
        """
        self._fetch_all()
        return np.concatenate([self.reader(shard).small(name) for shard in range(len(self.markers))])

    def read(self, rows: Sequence[int] | np.ndarray) -> ScoreMaps:
        """Reads the maps of rows.

        Args:
            rows: Row numbers, in any order; they may repeat.

        Returns:
            The maps, in the order of `rows`.

        Raises:
            IndexError: A row is out of range.
            IntegrityError: A row is damaged.
            InputError: The store is closed.
        """
        return self.read_codes(rows).maps(self.code, self.meta.num_classes)

    def read_codes(self, rows: Sequence[int] | np.ndarray, trim: bool = False) -> StoredRows:
        """Reads rows like `read`, without decoding them: a quarter of the bytes to move to a GPU.

        Args:
            rows: Row numbers, in any order; they may repeat.
            trim: Drop the palette and tail slots that no row uses, except for one of the palette.

        Returns:
            The rows, in the order of `rows`.

        Raises:
            IndexError: A row is out of range.
            IntegrityError: A row is damaged.
            InputError: The store is closed.
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} requested of a store with {len(self)} rows")
        self._refuse_closed()
        if self.cache == "ram":
            return self._held.select(wanted, trim)
        stored = self._gather(wanted)
        return stored.select(slice(None), trim=True) if trim else stored

    @cached_property
    def _held(self) -> StoredRows:
        """All rows, for the cache "ram"."""
        return self._gather(np.arange(len(self)))

    def _gather(self, wanted: np.ndarray) -> StoredRows:
        """Reads rows from their shards."""
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        indices = {shard: np.nonzero(shard_of == shard)[0] for shard in np.unique(shard_of).tolist()}
        parts = (
            (index, self.read_shard(shard, wanted[index] - self._starts[shard])) for shard, index in indices.items()
        )
        return StoredRows.gathered(len(wanted), self.plan.layout, parts)

    def verify(self, images: str | Path | None = None) -> Verification:
        """Checks the whole store, bit by bit.

        Args:
            images: The image root that was labeled: check every image file as well. None: only the store.

        Returns:
            What was checked, and all problems.
        """
        result = check_store(self.path)
        if images is None or result.problems:
            return result
        checked, problems = self.check_images(images)
        return replace(result, images_checked=checked, problems=problems)

    def check_images(self, images: str | Path, progress: bool = False) -> tuple[int, tuple[str, ...]]:
        """Compares every image file with the one that was labeled.

        Args:
            images: The image root that was labeled.
            progress: Show a progress bar.

        Returns:
            (number of images compared, problems in one line each).
        """
        digests = self.column("image_digest").tolist()
        quarantined = [entry["key"] for entry in self.quarantine]
        return check_images(self.path, self.plan, self.keys, digests, quarantined, images, progress)

    def row_bytes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns int64 [N]: the compressed bytes of each row's score and background planes."""
        wanted = np.asarray(rows, np.int64)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        pairs = zip(shard_of.tolist(), (wanted - self._starts[shard_of]).tolist(), strict=True)
        return np.array([self.reader(shard).row_bytes(row) for shard, row in pairs], np.int64)

    def read_shard(self, shard: int, rows: np.ndarray | None = None) -> ShardRows:
        """Reads rows of one shard with everything that is stored about them; `rows` None: all of them."""
        reader = self.reader(shard)
        return reader.read(np.arange(reader.rows) if rows is None else rows)

    def reader(self, shard: int) -> ShardReader:
        """Opens a shard, after comparing its file with its digest."""
        self._refuse_closed()
        reader = self._readers.get(shard)
        if reader is None:
            path = self.folder / self.markers[shard].file
            reader = self._files.retried(lambda: self._open(self.markers[shard]), path)
            for name in ("classes", "tail_classes") if self.meta.tail else ("classes",):
                if signed_classes(reader.small(name)).max(initial=-1) >= self.meta.num_classes:
                    expected = f"ids below {self.meta.num_classes}"
                    raise IntegrityError(f"{str(path)!r} is damaged", got="a class id out of range", expected=expected)
            self._readers[shard] = reader
        return reader

    def _open(self, marker: Marker) -> ShardReader:
        """Opens a shard's file."""
        if not self._all_here and self._remote is not None:
            self._remote.fetch(marker.file, marker.size, marker.sha256)
            if not self._checked:
                refuse_hostile_shard(self.folder, marker.shard, self.plan.meta.shards)
        check_file(self.folder, marker)
        held = self.cache == "ram-compressed"
        return ShardReader(self.folder / marker.file, self.plan.layout, marker.rows, in_memory=held, files=self._files)

    def _fetch_all(self) -> None:
        """Fetches all shards of a remote store, several at a time, and checks them at once."""
        self._refuse_closed()
        if self._all_here or self._remote is None:
            return
        self._remote.fetch_all([(marker.file, marker.size, marker.sha256) for marker in self.markers])
        if not self._checked:
            refuse_hostile(self.folder)
        self._checked = self._all_here = True

    def _refuse_closed(self) -> None:
        """Raises InputError if the store is closed."""
        if self.closed:
            raise InputError(
                f"the label store {str(self.path)!r} is closed", got="a read after close()", expected="an open store",
                remedy="Read inside the `with` block, or open the store again with LabelStore(path).",
            )  # fmt: skip
