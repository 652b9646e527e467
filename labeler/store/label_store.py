"""`LabelStore`: read a label store by row or by key.

Legend: N rows asked for; P palette size; R tail size; H×W map grid.

The reader goes by the plan, the markers and shard arithmetic; it never follows links inside a file, and it compares
every shard with its digest when it first opens it and every row with its checksum when it reads it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError
from labeler.base.open_files import OpenFiles
from labeler.base.whole_files import Marker, check_file, read_marker
from labeler.store.check_store import Verification, check_images, check_store
from labeler.store.foreign_store import refuse_hostile
from labeler.store.plan import Plan, StoreMeta, load_plan
from labeler.store.score_code import OFFSET_STEP, ScoreCode
from labeler.store.score_maps import ScoreMaps
from labeler.store.shard_file import ShardReader, ShardRows

CACHES = (None, "ram", "ram-compressed")


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored, for decoding elsewhere; `LabelStore.code` says what uint8 codes mean.

    classes int64 [N, P] (−1 unused); scores uint8 or float16 [N, P, H, W]; background likewise [N, H, W], or None in a
    `logit` store, where it is 0; region float32 [N, 4]; tail_classes int64 [N, R] (−1 unused); tail_offsets int8
    [N, R], in quarter nats.
    """

    classes: np.ndarray
    scores: np.ndarray
    background: np.ndarray | None
    region: np.ndarray
    tail_classes: np.ndarray
    tail_offsets: np.ndarray

    def maps(self, code: ScoreCode, num_classes: int) -> ScoreMaps:
        """Decoded."""
        scores, background = code.decode(self.scores, self.background)
        offsets = self.tail_offsets.astype(np.float32) * np.float32(OFFSET_STEP)
        return ScoreMaps(self.classes, scores, background, self.region, num_classes, self.tail_classes, offsets)


class LabelStore:
    """A complete label store.

    path    the store's folder
    cache   None: read rows from the files; "ram-compressed": hold the files in memory; "ram": hold the decoded codes
    trusted  skip the check of a store from elsewhere (see `labeler.store.foreign_store`): 1.6 s for 10,000 rows, once

    Raises InputError where there is no store, MismatchError for a newer format, IntegrityError where shards are missing
    or damaged. Safe to use from several threads; a copy sent to another process opens its own files. Of the shards'
    files at most 256 are open at a time, fewer where the process may open few; `close()`, or the end of a
    `with LabelStore(path) as store:`, closes them and forgets what is cached.
    """

    def __init__(self, path: str | Path, cache: str | None = None, trusted: bool = False) -> None:
        if cache not in CACHES:
            raise InputError("cache is not known", got=repr(cache), expected='None, "ram" or "ram-compressed"')
        self.path, self.cache = Path(path), cache
        # Whether its teacher, which the plan names, may be run here.
        self.trusted = trusted or refuse_hostile(self.path)
        plan = load_plan(self.path)
        if plan is None:
            raise InputError(
                f"{str(path)!r} is not a label store",
                got="no plan.json in it" if self.path.is_dir() else "no such folder",
                remedy="Label one with `python -m labeler label`.",
            )
        self.plan: Plan = plan
        self.markers: list[Marker] = self._read_markers()
        # First row of each shard, and of the one after the last.
        self._starts = np.cumsum([0, *(marker.rows for marker in self.markers)])
        self._readers: dict[int, ShardReader] = {}
        self._files = OpenFiles()
        self.closed = False

    def _read_markers(self) -> list[Marker]:
        shards = self.plan.meta.shards
        markers = [read_marker(self.path, shard, shards) for shard in range(shards)]
        missing = [shard for shard, marker in enumerate(markers) if marker is None]
        if missing:
            raise IntegrityError(
                f"the store {str(self.path)!r} is not complete",
                got=f"{shards - len(missing)} of {shards} shards, without shard {missing[0]}",
                remedy="Run the labeling command again: it goes on where it stopped.",
            )
        whole = [marker for marker in markers if marker is not None]
        for marker in whole:
            part = self.plan.slice_of(marker.shard)
            if marker.rows > part.stop - part.start:
                raise IntegrityError(
                    f"the marker of shard {marker.shard} of {str(self.path)!r} cannot be",
                    got=f"{marker.rows:,} rows", expected=f"at most {part.stop - part.start:,}",
                )  # fmt: skip
        return whole

    def close(self) -> None:
        """Close all files and forget what is cached; what is being read in other threads is still read to its end."""
        self.closed = True
        self._readers.clear()
        self._files.close()
        for held in ("_decoded", "keys"):
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
        return {"path": self.path, "cache": self.cache, "trusted": True}  # checked here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def meta(self) -> StoreMeta:
        return self.plan.meta

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of every shard: equal for equal stores only."""
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
        """The key of every row, in row order, which is sorted."""
        return [key for shard in range(len(self.markers)) for key in self.reader(shard).keys]

    @property
    def code(self) -> ScoreCode:
        """What stored scores mean."""
        return self.plan.code

    @property
    def code_values(self) -> np.ndarray | None:
        """float32 [256]: the score of each uint8 code; None where scores are float16."""
        return self.code.values

    def row_of(self, key: str) -> int:
        """The row of an image. Raises KeyError, with the reason where the image is in the quarantine."""
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
        """A small data set over all rows: classes, tail_…, region, image_size, target, image_digest or checksum."""
        return np.concatenate([self.reader(shard).small(name) for shard in range(len(self.markers))])

    def read(self, rows: Sequence[int] | np.ndarray) -> ScoreMaps:
        """The maps of `rows`, in the order given; rows may repeat. Raises IndexError, IntegrityError."""
        return self.read_codes(rows).maps(self.code, self.meta.num_classes)

    def read_codes(self, rows: Sequence[int] | np.ndarray, trim: bool = False) -> StoredRows:
        """As `read`, before decoding: a quarter of the bytes to move to a GPU.

        trim  as few palette and tail places as the rows use, at least one and none
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} asked of a store with {len(self)} rows")
        self._refuse_closed()
        if self.cache == "ram":
            return _rows_of(self._decoded, wanted, trim)
        found = self._gather(wanted)
        return _rows_of(found, slice(None), trim) if trim else found

    @cached_property
    def _decoded(self) -> StoredRows:
        return self._gather(np.arange(len(self)))

    def _gather(self, wanted: np.ndarray) -> StoredRows:
        n, layout = len(wanted), self.plan.layout

        def empty(name: str) -> np.ndarray:
            dtype, shape = layout[name]
            return np.empty((n, *shape), dtype)

        scores, region = empty("scores"), empty("region")
        background = empty("background") if "background" in layout else None
        classes = np.empty((n, self.meta.palette), np.int64)
        tail_classes = np.empty((n, self.meta.tail), np.int64)
        tail_offsets = np.empty((n, self.meta.tail), np.int8)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            places = np.nonzero(shard_of == shard)[0]
            found = self.read_shard(shard, wanted[places] - self._starts[shard])
            scores[places], region[places] = found.scores, found.region
            if background is not None:
                background[places] = found.background
            classes[places] = _signed(found.classes)
            if found.tail_classes is not None and found.tail_offsets is not None:
                tail_classes[places], tail_offsets[places] = _signed(found.tail_classes), found.tail_offsets
        return StoredRows(classes, scores, background, region, tail_classes, tail_offsets)

    def verify(self, images: str | Path | None = None) -> Verification:
        """Check every bit of the store, and with `images` every image file."""
        found = check_store(self.path)
        if images is None or found.problems:
            return found
        checked, problems = self.check_images(images)
        return replace(found, images_checked=checked, problems=problems)

    def check_images(self, images: str | Path, progress: bool = False) -> tuple[int, tuple[str, ...]]:
        """Compare every image file with what was labeled: images compared, and problems."""
        digests = self.column("image_digest").tolist()
        quarantined = [entry["key"] for entry in self.quarantine]
        return check_images(self.path, self.plan, self.keys, digests, quarantined, images, progress)

    def row_bytes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [N]: the compressed bytes of the rows' score and background planes."""
        wanted = np.asarray(rows, np.int64)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        places = zip(shard_of.tolist(), (wanted - self._starts[shard_of]).tolist(), strict=True)
        return np.array([self.reader(shard).row_bytes(row) for shard, row in places], np.int64)

    def read_shard(self, shard: int, rows: np.ndarray | None = None) -> ShardRows:
        """Rows of one shard with everything stored about them; all of them where `rows` is None."""
        reader = self.reader(shard)
        return reader.read(np.arange(reader.rows) if rows is None else rows)

    def reader(self, shard: int) -> ShardReader:
        """The open shard; its file is compared with its digest first."""
        self._refuse_closed()
        reader = self._readers.get(shard)
        if reader is None:
            path = self.path / self.markers[shard].file
            reader = self._files.retried(lambda: self._open(self.markers[shard]), path)
            for name in ("classes", "tail_classes") if self.meta.tail else ("classes",):
                if _signed(reader.small(name)).max(initial=-1) >= self.meta.num_classes:
                    expected = f"ids below {self.meta.num_classes}"
                    raise IntegrityError(f"{str(path)!r} is damaged", got="a class id out of range", expected=expected)
            self._readers[shard] = reader
        return reader

    def _open(self, marker: Marker) -> ShardReader:
        check_file(self.path, marker)
        held = self.cache == "ram-compressed"
        return ShardReader(self.path / marker.file, self.plan.layout, marker.rows, in_memory=held, files=self._files)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise InputError(
                f"the label store {str(self.path)!r} is closed", got="a read after close()", expected="an open store",
                remedy="Read inside the `with`, or open it again with LabelStore(path).",
            )  # fmt: skip


def _rows_of(rows: StoredRows, wanted: np.ndarray | slice, trim: bool) -> StoredRows:
    """Some rows; with `trim` without the places that none of them uses."""
    classes, tail_classes = rows.classes[wanted], rows.tail_classes[wanted]
    places, tail = classes.shape[1], tail_classes.shape[1]
    if trim:
        places, tail = max(1, _most_used(classes)), _most_used(tail_classes)
    return StoredRows(
        classes[:, :places],
        rows.scores[wanted, :places],
        None if rows.background is None else rows.background[wanted],
        rows.region[wanted],
        tail_classes[:, :tail],
        rows.tail_offsets[wanted, :tail],
    )


def _most_used(classes: np.ndarray) -> int:
    """Places up to the last that any row uses; unused ones stand behind."""
    used = np.flatnonzero((classes >= 0).any(0))
    return int(used[-1]) + 1 if len(used) else 0


def _signed(classes: np.ndarray) -> np.ndarray:
    """int64, with −1 for the type's maximum, which marks an unused place."""
    return np.where(classes == np.iinfo(classes.dtype).max, -1, classes.astype(np.int64))
