"""Images inside uncompressed tar shards, in WebDataset layout.

The files of a sample are next to each other and have the same name up to the first dot of its last part: here
`NAME.jpg` (any image suffix), and optionally `NAME.cls` with the class id as text, or `NAME.json` with a `label`. Keys
are the member names, so a tar file of a labeled folder has the folder's keys.

Legend: N images.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labeler.base.errors import InputError
from labeler.sources.archive_file import ArchiveFile
from labeler.sources.archives import (
    AGAIN,
    Index,
    check_keys,
    keep_index,
    kept_index,
    pack_names,
    unpack_names,
    with_progress,
)
from labeler.sources.class_names import number_labels
from labeler.sources.folder_source import SUFFIXES
from labeler.sources.image_source import BadImage, ImageSource, Storage, chosen, read_at

CLASS_SUFFIX, JSON_SUFFIX = ".cls", ".json"
MOST_LABEL_BYTES = {CLASS_SUFFIX: 32, JSON_SUFFIX: 1 << 20}
REPEATED = "Rename one of them, or leave out the file that repeats it."
OUTSIDE = "Pack the images anew, from within their folder."
KEEP_INDEX_FROM = 1_000  # members


@dataclass(frozen=True)
class TarStorage:
    """Members of tar shards.

    Attributes:
        shards: The shards.
        keys: Keys of the images.
        shard_of: int64 [N]: the shard of each image.
        offsets: int64 [N]: where its bytes begin.
        sizes: int64 [N]: their number.
    """

    shards: tuple[ArchiveFile, ...]
    keys: tuple[str, ...]
    shard_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, position: int, most: int | None = None) -> bytes:
        """Reads the image at `position`; at most its first `most` bytes."""
        size = int(self.sizes[position]) if most is None else min(most, int(self.sizes[position]))
        offset = int(self.offsets[position])
        data = self.shards[self.shard_of[position]].read_copy(lambda path: read_at(path, offset, size))
        if len(data) != size:
            raise BadImage("its shard ends too early: it changed after it was listed")
        return data

    def path(self, position: int) -> str:
        """Returns the path of the shard followed by the image's name."""
        return f"{self.shards[self.shard_of[position]].where}/{self.keys[position]}"

    def part(self, positions: np.ndarray) -> Storage:
        """Returns the storage of some of the images."""
        return TarStorage(
            tuple(shard.absolute() for shard in self.shards),
            chosen(self.keys, positions),
            self.shard_of[positions],
            self.offsets[positions],
            self.sizes[positions],
        )

    def holds_files(self) -> bool:
        """Whether any of the shards is still there."""
        return any(shard.exists() for shard in self.shards)


def tar_source(shards: Sequence[ArchiveFile], name: str, progress: bool = True) -> ImageSource:
    """Opens tar shards.

    Args:
        shards: The tar files.
        name: What the user called them.
        progress: Show a progress bar.

    Returns:
        The images of all shards, sorted by key.

    Raises:
        InputError: There are no images, a shard is damaged, or names are repeated or not UTF-8.
    """
    indexes = [_index_of(shard) for shard in with_progress(shards, progress)]
    names = [key for index in indexes for key in unpack_names(index["keys"], len(index["offsets"]))]
    if not names:
        other = sum(int(index["other"]) for index in indexes)
        raise InputError(
            "no images in the tar shards",
            got=f"{len(shards)} shards, {other} files of other types",
            expected="files ending in " + " ".join(sorted(SUFFIXES)),
        )
    labels = [label for index in indexes for label in unpack_names(index["labels"], len(index["offsets"]))]
    order = sorted(range(len(names)), key=names.__getitem__)
    keys = tuple(names[i] for i in order)
    check_keys(keys, "tar shards", REPEATED, OUTSIDE)
    shard_of = np.repeat(np.arange(len(shards)), [len(index["offsets"]) for index in indexes])[order]
    offsets, sizes = (np.concatenate([index[column] for index in indexes])[order] for column in ("offsets", "sizes"))
    ids, class_names = number_labels([labels[i] for i in order]) if any(labels) else (None, ())
    return ImageSource(
        name,
        keys,
        sizes,
        TarStorage(tuple(shards), keys, shard_of, offsets, sizes),
        other=sum(int(index["other"]) for index in indexes),
        labels=ids,
        class_names=class_names,
        groups=shard_of,
    )


def _index_of(shard: ArchiveFile) -> Index:
    """Returns the index of a shard, which is kept for later runs if it is long.

    Returns:
        keys and labels, packed, in order of the shard; offsets and sizes, int64; other, the number of other files.
    """
    try:
        index = kept_index(shard, "tar")
        if index is None:
            index = shard.read_copy(lambda path: _read_index(path, shard.where))
            if len(index["offsets"]) >= KEEP_INDEX_FROM:
                keep_index(shard, "tar", index)
    except OSError as error:
        raise _unreadable(shard.where, error) from None
    return index


def _read_index(path: str, shown: str) -> Index:
    """Reads the headers of a shard; `shown`: what messages call it."""
    keys: list[str] = []
    places: list[tuple[int, int]] = []
    label_of: dict[str, str] = {}
    other = 0
    for name, offset, size in _members(path, shown):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            keys.append(name)
            places.append((offset, size))
        elif suffix in MOST_LABEL_BYTES:
            label = _read_label(shown, name, suffix, read_at(path, offset, min(size, MOST_LABEL_BYTES[suffix])))
            if label is not None:
                label_of[_sample(name)] = label
        else:
            other += 1
    return {
        "keys": pack_names(keys),
        "labels": pack_names([label_of.get(_sample(key), "") for key in keys]),
        "offsets": np.array([offset for offset, _ in places], np.int64),
        "sizes": np.array([size for _, size in places], np.int64),
        "other": np.array(other),
    }


def _read_label(shown: str, name: str, suffix: str, text: bytes) -> str | None:
    """Returns a sample's label: the number of a .cls file, or the label of a .json file if it has one."""
    try:
        if suffix == CLASS_SUFFIX:
            return str(int(text))
        label = json.loads(text)["label"]
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError):
        expected = "a whole number" if suffix == CLASS_SUFFIX else 'an object such as {"label": 3}'
        raise InputError(f"{name!r} in {shown!r} is not a class", got=text[:80], expected=expected) from None
    if type(label) not in (int, str) or "\0" in str(label):
        raise InputError(
            f"{name!r} in {shown!r} has no usable label", got=repr(label)[:80], expected="a class id or name"
        )
    return str(label)


def _members(path: str, shown: str) -> list[tuple[str, int, int]]:
    """Returns (name, offset, bytes) of the regular files in a tar file."""
    try:
        with tarfile.open(path, "r:") as archive:
            entries = list(archive)
            # The bytes of a hard link are those of the file that it names.
            files = [(m, archive.getmember(m.linkname) if m.islnk() else m) for m in entries if m.isreg() or m.islnk()]
            members = [(m.name.removeprefix("./"), data.offset_data, data.size) for m, data in files]
            for name, _, _ in members:
                name.encode()
        # tarfile accepts any end; a complete archive has an empty block after its last file.
        last = max((offset + size for _, offset, size in members), default=0)
        if os.path.getsize(path) < -(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
    except UnicodeEncodeError:
        raise InputError(f"a file name in {shown!r} is not valid UTF-8", got=ascii(name)) from None
    except FileNotFoundError:
        raise
    except (OSError, KeyError, tarfile.TarError) as error:
        raise _unreadable(shown, error) from None
    return members


def _unreadable(shown: str, error: Exception) -> InputError:
    return InputError(
        f"the tar shard {shown!r} cannot be read", got=str(error), expected="a complete, uncompressed tar file",
        remedy=AGAIN,
    )  # fmt: skip


def _sample(name: str) -> str:
    """Returns the sample of a member: its path up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"
