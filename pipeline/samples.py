"""The samples of a loader: images joined with their label rows, sizes and true classes, checked before any work.

Legend: N samples.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError, LabelingError, MismatchError, error_text
from labeler.sources.decoding.check_header import FORMATS
from labeler.sources.decoding.pixels import decoded_size
from labeler.sources.image_source import BadImage, ImageSource, difference, image_digest
from labeler.sources.open_source import open_source
from labeler.store.label_store import LabelStore
from labeler.store.parts.same_images import are_the_images
from pipeline.classes import TrueClasses, find_classes, some
from pipeline.config import LoaderConfig

log = logging.getLogger("pipeline")

PROGRESS_FROM = 5_000  # images
MOST_NAMED = 20  # bad images in an error


@dataclass(frozen=True)
class Samples:
    """The samples of a loader.

    Attributes:
        source: The source of the image files.
        positions: int64 [N]: position of each sample in the source.
        store: The label store; None: no labels.
        rows: int64 [N]: row of each sample in the store; −1 without a store.
        sizes: int64 [N, 2]: height and width of the decoded images.
        classes: Their true classes, and the number and names of all.
        digests: uint64 [N]: xxh3-64 of the files that were labeled; None without a store.
        orientation: "exif" or "ignore".
    """

    source: ImageSource
    positions: np.ndarray
    store: LabelStore | None
    rows: np.ndarray
    sizes: np.ndarray
    classes: TrueClasses
    digests: np.ndarray | None
    orientation: str

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]: true classes, −1 where not known."""
        return self.classes.labels

    def key(self, sample: int) -> str:
        """Returns the key of a sample."""
        return self.source.keys[self.positions[sample]]

    def read(self, sample: int) -> bytes:
        """Reads an image file. Raises IntegrityError if that fails, or if it is not the file that was labeled."""
        position = int(self.positions[sample])
        try:
            data = self.source.read(position)
        except BadImage as error:
            raise unreadable(self.source.path(position), str(error)) from None
        if self.digests is not None and image_digest(data) != self.digests[sample]:
            remedy = "Restore it or label again; `python -m labeler verify STORE --images DIR` lists all such images."
            raise unreadable(self.source.path(position), "its bytes have changed since it was labeled", remedy)
        return data

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over keys, file sizes, true classes and the store, to check that a saved state belongs to them."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(self.positions.tobytes() + self.labels.tobytes())
        digest.update((self.store.fingerprint if self.store else "").encode())
        return digest.hexdigest()


def open_samples(config: LoaderConfig) -> Samples:
    """Joins images with their labels and checks them. No image is opened.

    Args:
        config: Settings of the loader.

    Returns:
        The samples. Without a store their `sizes` are zero, see `scan_sizes`.

    Raises:
        MismatchError: Images and labels do not belong together.
        InputError: There are no images, or a class is not known.
        IntegrityError: The store is damaged.
    """
    source = open_source(config.images, config.image_list, config.progress)
    if config.store is not None:
        cache = None if config.cache == "none" or not config.token_labels else config.cache
        return _with_store(config, source, LabelStore(config.store, cache))
    every, nothing = np.arange(len(source)), np.full(len(source), -1)
    classes = find_classes(config, source, every, None, nothing)
    unmeasured = np.zeros((len(source), 2), np.int64)
    return Samples(source, every, None, nothing, unmeasured, classes, None, config.orientation)


def _with_store(config: LoaderConfig, source: ImageSource, store: LabelStore) -> Samples:
    """Joins images with the rows of a store."""
    row_of = {key: row for row, key in enumerate(store.keys)}
    quarantined = {entry["key"] for entry in store.quarantine}
    keys = source.keys
    choose = "name the images to use in image_list" if source.groups is None else "make archives of the images to use"
    positions = np.array([i for i, key in enumerate(keys) if key in row_of], np.int64)
    unlabeled = [key for key in keys if key not in row_of and key not in quarantined]
    name = store.name
    if unlabeled:
        raise MismatchError(
            f"{len(unlabeled):,} of {len(keys):,} images have no labels in {name!r}",
            got=some(unlabeled),
            expected="a row, or an entry in the quarantine, for every image",
            remedy=f"Label these images too, or {choose}.",
        )
    rows = np.array([row_of[keys[i]] for i in positions.tolist()], np.int64)
    if config.image_list is None:
        _check_same_images(source, store, rows, choose)
    if len(positions) < len(keys):
        log.warning("%d images are in the quarantine of %s and are skipped", len(keys) - len(positions), name)
    if not len(positions):
        raise InputError(f"all {len(keys)} images are in the quarantine of {name!r}")
    columns = {name: store.column(name)[rows] for name in ("image_size", "target", "image_digest")}
    classes = find_classes(config, source, positions, store, columns["target"].astype(np.int64))
    meta = store.meta
    if config.token_labels and (meta.grid[0] < config.grid[0] or meta.grid[1] < config.grid[1]):
        log.warning(
            "the label maps of %s have %d×%d cells for %d×%d tokens: targets are interpolated between them",
            name, *meta.grid, *config.grid,
        )  # fmt: skip
    return Samples(
        source,
        positions,
        store,
        rows,
        columns["image_size"].astype(np.int64),
        classes,
        columns["image_digest"],
        meta.orientation,
    )


def _check_same_images(source: ImageSource, store: LabelStore, rows: np.ndarray, choose: str) -> None:
    """Checks that a source has every labeled image, with the same file sizes. Raises MismatchError."""
    parts = store.labeled_images()
    if are_the_images(source, parts):
        return
    left_out = np.ones(len(store), bool)
    left_out[rows] = False
    missing = [store.keys[row] for row in np.nonzero(left_out)[0]]
    if missing:
        raise MismatchError(
            f"{len(missing):,} labeled images are missing in {source.name!r}",
            got=f"no {some(missing)}",
            expected=f"the {len(store):,} images of {store.name!r}",
            remedy=f"Restore them, or {choose}.",
        )
    # Without the quarantined files, or in shards of many folders, the fingerprint of sizes cannot be compared.
    everything = tuple(sorted(key for part in parts for key in part.keys))
    if source.groups is None and len(source) == len(everything):
        raise MismatchError(
            f"images of {source.name!r} changed after they were labeled",
            got=difference(source, everything),
            remedy=f"`python -m labeler verify {store.path} --images {source.name}` lists them; restore "
            "them or label them again.",
        )


def scan_sizes(source: ImageSource, orientation: str, threads: int | None, progress: bool) -> np.ndarray:
    """Reads the size of every image from its header.

    Args:
        source: The images.
        orientation: "exif" or "ignore".
        threads: Threads to use; None: 4.
        progress: Show a progress bar.

    Returns:
        int64 [N, 2]: height and width, after rotation.

    Raises:
        IntegrityError: Files cannot be used as images; it names them.
    """
    from PIL import Image, UnidentifiedImageError

    def parse(data: bytes) -> tuple[int, int]:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS:
                raise BadImage(f"{image.format} is not a format that both loaders decode")
            return decoded_size(image, orientation)

    bad = dict(source.problems)

    def size(position: int) -> tuple[int, int]:
        if position in bad:
            return 0, 0
        with suppress(Exception):  # PIL's parsers raise errors of many types; a long header may need the whole file
            return parse(source.head(position))
        try:
            return parse(source.read(position))
        except LabelingError:
            raise
        except BadImage as error:
            bad[position] = str(error)
        except UnidentifiedImageError:
            bad[position] = "not an image, or of an unknown format"
        except Exception as error:
            bad[position] = f"cannot be read as an image: {error_text(error)}"
        return 0, 0

    n = len(source)
    with ThreadPoolExecutor(threads or 4) as pool:
        results = tqdm(pool.map(size, range(n)), "image headers", n, disable=not progress or n < PROGRESS_FROM)
        sizes = np.array(list(results), np.int64).reshape(-1, 2)
    if bad:
        raise _all_unreadable({source.path(position): bad[position] for position in sorted(bad)}, n)
    return sizes


def unreadable(path: str, reason: str, remedy: str = "Restore the file, or leave it out.") -> IntegrityError:
    """Returns the error for an image that cannot be used."""
    return IntegrityError(f"the image {path!r} cannot be used", got=reason, remedy=remedy)


def _all_unreadable(bad: Mapping[str, str], count: int) -> IntegrityError:
    """Returns the error for unusable images; bad: path -> reason; count: number of all images."""
    if len(bad) == 1:
        return unreadable(*next(iter(bad.items())))
    named = [f"{path!r} ({reason})" for path, reason in islice(bad.items(), MOST_NAMED)]
    more = f" and {len(bad) - len(named):,} more" if len(bad) > len(named) else ""
    return IntegrityError(
        f"{len(bad):,} of {count:,} images cannot be used", got="; ".join(named) + more,
        remedy="Restore the files, or leave them out.",
    )  # fmt: skip
