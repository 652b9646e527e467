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
from labeler.remote.urls import path_or_url
from labeler.store.check_store import Verification, check_images, check_store, joined
from labeler.store.hdf5.read_shard import ShardReader
from labeler.store.parts.join_parts import joined_plan, refuse_shared_keys
from labeler.store.parts.open_part import Part, open_parts
from labeler.store.parts.same_images import LabeledImages
from labeler.store.plan import Plan, StoreMeta
from labeler.store.row_schema import ShardRows, signed_classes
from labeler.store.score_code import ScoreCode
from labeler.store.score_maps import ScoreMaps
from labeler.store.shard_markers import Marker
from labeler.store.stored_rows import StoredRows

CACHES = (None, "ram", "ram-compressed")


class LabelStore:
    """A complete label store, open for reading. A store with parts, and a list of stores, are read as one.

    One behind a URL is read without being copied first: its plan and markers at once, each shard on first use, into a
    cache (see `labeler.remote.file_cache`), where its digest is checked; `keys` and `column` need all shards.

    It can be used from several threads; a pickled copy in another process opens its own files. At most 256 of the
    shards' files are open at a time, fewer if the process may open only few. `close()`, or the end of a
    `with LabelStore(path) as store:`, closes them and drops the cache.

    Args:
        path: The store's folder, or its URL: s3://…, hf://datasets/USER/NAME, https://… Or several of them, with the
            same settings and no image twice: rows of the first, of its parts, of the second …
        cache: None: read rows from the files; "ram-compressed": keep the files in memory; "ram": keep all codes in it.
        trusted: Skip the check of a store from elsewhere (see `labeler.store.foreign_store`), which takes 1.6 s for
            10,000 rows, once; and compare the images of several stores only when `keys` is read.

    Attributes:
        paths: The folders or URLs that were given.
        parts: Each folder with labels.

    Raises:
        InputError: There is no store, or a driver for its URL is missing.
        MismatchError: The store has a newer format; or parts or stores have other settings, or share an image.
        IntegrityError: Shards are missing or damaged.
        RemoteError: The service of its URL does not answer.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], cache: str | None = None, trusted: bool = False
    ) -> None:
        if cache not in CACHES:
            raise InputError("cache is not known", got=repr(cache), expected='None, "ram" or "ram-compressed"')
        self.paths = [path_or_url(one) for one in ([path] if isinstance(path, str | Path) else path)]
        if not self.paths:
            raise InputError("there is no label store", got="an empty list", expected="a store's folder, or several")
        self.cache = cache
        self.parts: list[Part] = [part for one in self.paths for part in open_parts(one, trusted)]
        # Whether the teacher that the plan names may be run here.
        self.trusted = trusted or all(part.written for part in self.parts)
        self.plan: Plan = joined_plan(self.parts)
        self.markers: list[Marker] = [marker for part in self.parts for marker in part.markers]
        # First shard of each part, and first row of each shard; at the end, the number of shards and of rows.
        self._first_shards = np.cumsum([0, *(len(part.markers) for part in self.parts)]).tolist()
        self._starts = np.cumsum([0, *(marker.rows for marker in self.markers)])
        self._readers: dict[int, ShardReader] = {}
        self._files = OpenFiles()
        self.closed = False
        if len(self.paths) > 1 and not trusted:  # nobody has compared them before
            _ = self.keys

    def close(self) -> None:
        """Closes all files and drops the cache; reads that are under way in other threads still finish."""
        self.closed = True
        self._readers.clear()
        self._files.close()
        for part in self.parts:
            part.close()
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
        return f"LabelStore({self.name!r}: {len(self):,} rows, {m.num_classes} classes, palette {m.palette}, {grid})"

    def __getstate__(self) -> dict[str, Any]:
        checked = all(part.checked for part in self.parts)
        return {"path": self.paths, "cache": self.cache, "trusted": checked, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        wanted = state.pop("fingerprint")
        self.__init__(**state)  # type: ignore[misc]
        if self.fingerprint != wanted:
            raise MismatchError(
                f"the store {self.name!r} has changed since it was opened", remedy="Start again with the new one."
            )

    @property
    def path(self) -> Path | str:
        """The folder or URL of the store; of several stores, of the first."""
        return self.paths[0]

    @property
    def folder(self) -> Path:
        """The folder here that the files of its first part are in."""
        return self.parts[0].folder

    @property
    def name(self) -> str:
        """The folders or URLs of the stores, for messages."""
        return " + ".join(map(str, self.paths))

    @property
    def meta(self) -> StoreMeta:
        """The content of the store: images and shards of all parts, all else as in the first."""
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
        return [entry for part in self.parts for entry in part.quarantine]

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row, in order of rows; within each part they are sorted."""
        self._fetch_all()
        readers = map(self.reader, range(len(self.markers)))
        keys = [[key for _ in part.markers for key in next(readers).keys] for part in self.parts]
        if len(keys) > 1:
            refuse_shared_keys(self.parts, keys)
        return [key for own in keys for key in own]

    def labeled_images(self, digests: bool = False) -> list[LabeledImages]:
        """Returns the images of each part, to compare others with them; reads the keys of all shards.

        Args:
            digests: Also read the digests of the image files.

        Returns:
            The images of each part.
        """
        column = self.column("image_digest").tolist() if digests else []
        found, start = [], 0
        for part in self.parts:
            keys = self.keys[start : start + part.rows]
            known = dict(zip(keys, column[start : start + part.rows], strict=True)) if digests else None
            everything = tuple(sorted([*keys, *(entry["key"] for entry in part.quarantine)]))
            found.append(LabeledImages(part.place, part.plan.meta.dataset_fingerprint, everything, known))
            start += part.rows
        return found

    def head_file(self) -> Path:
        """Returns the file of the head that was fitted for the store, fetched if the store is behind a URL."""
        return self.parts[0].head_file()

    @property
    def bytes(self) -> int:
        """Bytes of all files of the store; for one behind a URL, of its shards, plan and markers."""
        return sum(part.bytes for part in self.parts)

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
        for first, part in zip(self._first_shards, self.parts, strict=False):
            own = bisect_right([marker.first_key for marker in part.markers], key) - 1
            if own < 0:
                continue
            row = self.reader(first + own).row_of(key)
            if row is not None:
                return int(self._starts[first + own]) + row
            for entry in part.markers[own].quarantine:
                if entry["key"] == key:
                    raise KeyError(f"{key!r} has no labels: {entry['reason']}")
        raise KeyError(f"{key!r} is not in the store {self.name!r}")

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
        result = joined([check_store(path) for path in self.paths])
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
        from_list = bool(self.plan.settings.get("from_list"))
        return check_images(self.path, self.labeled_images(digests=True), images, from_list, progress)

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
            part, marker = self.parts[bisect_right(self._first_shards, shard) - 1], self.markers[shard]
            path, held = part.path_of(marker), self.cache == "ram-compressed"
            reader = self._files.retried(lambda: part.open_shard(marker, self._files, held), path)
            for name in ("classes", "tail_classes") if self.meta.tail else ("classes",):
                if signed_classes(reader.small(name)).max(initial=-1) >= self.meta.num_classes:
                    expected = f"ids below {self.meta.num_classes}"
                    raise IntegrityError(f"{str(path)!r} is damaged", got="a class id out of range", expected=expected)
            self._readers[shard] = reader
        return reader

    def _fetch_all(self) -> None:
        """Fetches all shards that are behind a URL."""
        self._refuse_closed()
        for part in self.parts:
            part.fetch_all()

    def _refuse_closed(self) -> None:
        """Raises InputError if the store is closed."""
        if self.closed:
            raise InputError(
                f"the label store {self.name!r} is closed", got="a read after close()", expected="an open store",
                remedy="Read inside the `with` block, or open the store again with LabelStore(path).",
            )  # fmt: skip
