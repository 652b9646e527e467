"""Class names, and the class ids of folder names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError

IMAGENET_CLASSES = 1000


def read_class_names(path: str | Path, num_classes: int) -> tuple[str, ...]:
    """Reads a file of class names, one per line. Raises InputError if there are not `num_classes` names."""
    try:
        names = tuple(Path(path).read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the class names {str(path)!r} cannot be read", got=str(error)) from None
    if len(names) != num_classes:
        raise InputError(
            f"{str(path)!r} does not name the teacher's classes", got=f"{len(names)} lines", expected=f"{num_classes}"
        )
    return names


def imagenet_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (WordNet ids, short descriptions) of the 1,000 ImageNet classes in their usual order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = tuple(info.label_names())
    return synsets, tuple(info.index_to_description(i).split(",")[0] for i in range(len(synsets)))


def name_classes(
    keys: tuple[str, ...], num_classes: int, names_file: str | None, known: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Finds class names, and the class ids of the images' first folders.

    The folders are matched with the names in `names_file`, or those that the teacher has; with ImageNet's ids if the
    teacher has 1,000 classes; or in sorted order if there are as many folders as classes.

    Args:
        keys: Keys of all images.
        num_classes: C.
        names_file: File of class names, one per line; None: there is none.
        known: Class names that the teacher has, used without a file; empty: none.

    Returns:
        (class names, folder name -> class id). The names are empty if they are not known, and the mapping is empty if
        none of the three ways fits.

    Raises:
        InputError: The names cannot be read or are not C.
    """
    names = read_class_names(names_file, num_classes) if names_file else known
    folders = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
    by_name = {name: i for i, name in enumerate(names)}
    if folders and all(folder in by_name for folder in folders):
        return names, {folder: by_name[folder] for folder in folders}
    if num_classes == IMAGENET_CLASSES:
        by_synset, descriptions = _synset_classes(), imagenet_names()[1]
        if folders and all(folder in by_synset for folder in folders):
            return names or descriptions, {folder: by_synset[folder] for folder in folders}
    if len(folders) == num_classes:
        return names or tuple(folders), {folder: i for i, folder in enumerate(folders)}
    return names, {}


def folder_classes(folders: Sequence[str], num_classes: int | None) -> dict[str, int]:
    """Returns folder name -> class id where only the names of the folders are known.

    ImageNet's folders have its ids, even if only some of the 1,000 exist; other folders are numbered in sorted order.
    """
    if num_classes == IMAGENET_CLASSES and len(folders) != num_classes:
        synsets = _synset_classes()
        if any(folder in synsets for folder in folders):
            return synsets
    return {folder: i for i, folder in enumerate(sorted(folders))}


def with_the_rest_of_imagenet(folders: Mapping[str, int], num_classes: int) -> Mapping[str, int]:
    """Extends `folders` (name -> class id) to all 1,000 of ImageNet if they are some of these, with the usual ids."""
    if num_classes == IMAGENET_CLASSES and folders and folders.items() <= _synset_classes().items():
        return _synset_classes()
    return folders


def _synset_classes() -> dict[str, int]:
    """Returns WordNet id -> class id of ImageNet."""
    return {synset: i for i, synset in enumerate(imagenet_names()[0])}


def targets_of(keys: tuple[str, ...], class_folders: Mapping[str, int]) -> np.ndarray:
    """Returns int32 [N]: the class id of each key's first folder, −1 if it is not known."""
    return np.array([class_folders.get(key.split("/", 1)[0], -1) if "/" in key else -1 for key in keys], np.int32)
