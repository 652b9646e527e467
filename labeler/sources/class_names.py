"""Class names, and the class ids of folders and of the labels that a source has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.base.errors import InputError

if TYPE_CHECKING:
    from labeler.sources.image_source import ImageSource

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
    images: ImageSource, num_classes: int, names_file: str | None, known: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Finds class names, and the class ids of the images' own classes: their first folders, or the source's labels.

    The folders are matched with the names in `names_file`, or those that the teacher has; with ImageNet's ids if the
    teacher has 1,000 classes; or in sorted order if there are as many folders as classes. Names of labels likewise, but
    in the source's order.

    Args:
        images: The images.
        num_classes: C.
        names_file: File of class names, one per line; None: there is none.
        known: Class names that the teacher has, used without a file; empty: none.

    Returns:
        (class names, folder or label -> class id). The names are empty if they are not known, and the mapping is empty
        if none of the three ways fits, or if the labels are ids.

    Raises:
        InputError: The names cannot be read or are not C.
    """
    names = read_class_names(names_file, num_classes) if names_file else known
    folders = own_names(images)
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


def classes_as_before(
    images: ImageSource,
    names: tuple[str, ...],
    folders: Mapping[str, int],
    num_classes: int,
    names_file: str | None,
) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Does the same as `name_classes` where labels are to become part of a store.

    Args:
        images: The images, old and new.
        names: Class names of the store; empty: not known.
        folders: Its folder or label -> class id.
        num_classes: C.
        names_file: File of class names, which replaces `names`; None: there is none.

    Returns:
        (class names, folder or label -> class id): the store's, and new folders by the class names or ImageNet's ids.
    """
    names = read_class_names(names_file, num_classes) if names_file else names
    by_name = {name: i for i, name in enumerate(names)}
    known = {**by_name, **with_the_rest_of_imagenet(folders, num_classes), **folders}
    return names, {folder: known[folder] for folder in own_names(images) if folder in known}


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


def own_names(images: ImageSource) -> list[str]:
    """Returns the names of the images' own classes: their folders or labels; empty if the labels are numbers."""
    return images.folders if images.labels is None else list(images.class_names)


def true_classes(images: ImageSource, class_folders: Mapping[str, int], num_classes: int) -> np.ndarray:
    """Finds the true class of each image.

    Args:
        images: The images.
        class_folders: Folder or label -> class id, from `name_classes`.
        num_classes: C.

    Returns:
        int32 [N]: class ids, −1 where they are not known. Labels that are numbers are the ids, if all are below C.
    """
    if images.labels is None:
        return classes_of_keys(images.keys, class_folders)
    if images.class_names:
        ids = np.array([*(class_folders.get(name, -1) for name in images.class_names), -1])
        return ids[images.labels].astype(np.int32)
    fits = images.labels.max(initial=-1) < num_classes
    return images.labels.astype(np.int32) if fits else np.full(len(images), -1, np.int32)


def classes_of_keys(keys: tuple[str, ...], class_folders: Mapping[str, int]) -> np.ndarray:
    """Returns int32 [N]: the class id of each key's first folder, −1 if it is not known."""
    return np.array([class_folders.get(key.split("/", 1)[0], -1) if "/" in key else -1 for key in keys], np.int32)


def number_labels(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts labels as a list or an archive has them to class ids.

    Args:
        labels: N texts: all of them class ids, or else names; "" or "-1" where an image has none.

    Returns:
        (int64 [N]: class ids, −1 where there is none; the sorted names, empty if the labels are ids).
    """
    texts = ["" if label == "-1" else label for label in labels]
    given = sorted({label for label in texts if label})
    if all(label.isdecimal() for label in given):
        return np.array([int(label) if label else -1 for label in texts], np.int64), ()
    ids = {name: i for i, name in enumerate(given)}
    return np.array([ids.get(label, -1) for label in texts], np.int64), tuple(given)
