"""The true classes of a loader's images: those of the label store's teacher, or the images' own.

The images' own classes are the folders below their root, or the labels that the source has. Their ids are in sorted
order of the names. A teacher of other classes then still gives the targets of the tokens.

Legend: N samples; C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from labeler.base.errors import InputError, MismatchError
from labeler.sources.class_names import classes_of_keys, folder_classes, true_classes
from labeler.sources.image_source import ImageSource
from labeler.store.label_store import LabelStore
from pipeline.config import LoaderConfig

OTHER_FOLDERS = (
    "Make one folder per class, in sorted order of the classes, or `label --class-names FILE`, which lists the "
    "folders' names in order of the classes. If the folders are not the teacher's classes, use "
    'classes="images": then they are the classes of the class head. In Python, class_folders maps folders to classes.'
)


@dataclass(frozen=True)
class TrueClasses:
    """The true classes of the samples.

    Attributes:
        labels: int64 [N]: true classes, −1 where not known.
        count: C, the classes of the class head.
        kind: "teacher": those of the store's teacher; "images": the images' own; "none": not known.
        names: One for each class; empty if they are not known.
        folders: Folder or label -> class id; empty where only the store knows the classes, or they are numbers.
    """

    labels: np.ndarray
    count: int
    kind: str
    names: tuple[str, ...] = ()
    folders: Mapping[str, int] = field(default_factory=dict)


def find_classes(
    config: LoaderConfig, source: ImageSource, positions: np.ndarray, store: LabelStore | None, targets: np.ndarray
) -> TrueClasses:
    """Finds the true classes that `config.classes` asks for.

    Args:
        config: Settings of the loader.
        source: All images.
        positions: int64 [N]: position of each sample among them.
        store: The label store; None: there is none.
        targets: int64 [N]: the true classes that the store has, −1 where it has none.

    Returns:
        The classes.

    Raises:
        MismatchError: There are more or fewer classes than settings say, or a class is out of range.
        InputError: A class is needed and not known.
    """
    kind = config.classes
    if kind == "auto":
        kind = _choice(config, source, positions, store, targets)
    if kind == "none":
        count = config.num_classes or (store.meta.num_classes if store else 1)
        return TrueClasses(np.full(len(positions), -1), count, kind)
    if kind == "teacher" and store is not None:
        found = _of_teacher(config, source, positions, store, targets)
    else:
        found = _own(config, source, positions)
    _check(config, found, source, positions, store)
    return found


def _choice(
    config: LoaderConfig, source: ImageSource, positions: np.ndarray, store: LabelStore | None, targets: np.ndarray
) -> str:
    """Returns what "auto" is: the images' own classes where the store knows none of the teacher's for them."""
    if store is None:
        return "images"
    if store.plan.class_folders or (targets >= 0).any():
        return "teacher"
    try:
        own = _own(config, source, positions)
    except MismatchError:
        return "teacher"
    return "images" if own.count > 1 and (own.labels >= 0).all() else "teacher"


def _of_teacher(
    config: LoaderConfig, source: ImageSource, positions: np.ndarray, store: LabelStore, targets: np.ndarray
) -> TrueClasses:
    meta, labels = store.meta, targets
    if config.num_classes not in (None, meta.num_classes):
        raise MismatchError(
            "the label store has another number of classes than the network",
            got=f"{meta.num_classes} in {store.name!r}",
            expected=f"{config.num_classes}",
            remedy="Set num_classes to the store's, or label with a teacher of these classes.",
        )
    if config.class_folders is not None:
        labels = classes_of_keys(_keys(source, positions), config.class_folders).astype(np.int64)
    elif source.labels is not None:
        own = true_classes(source, store.plan.class_folders, meta.num_classes)[positions]
        labels = np.where(own >= 0, own, labels)
    folders = store.plan.class_folders if source.class_names else {}
    return TrueClasses(labels, meta.num_classes, "teacher", tuple(meta.class_names), folders)


def _own(config: LoaderConfig, source: ImageSource, positions: np.ndarray) -> TrueClasses:
    """Returns the classes that the source's labels or, without them, the first folders of its keys name."""
    count, folders = config.num_classes, config.class_folders
    if folders is None and source.labels is not None:
        names = source.class_names
        labels = source.labels[positions]
        found = count or len(names) or max(int(source.labels.max(initial=-1)) + 1, 1)
        return TrueClasses(labels, found, "images", names, {name: i for i, name in enumerate(names)})
    if folders is None:
        # All folders of the root, even those without a listed image: their order gives the class ids.
        folders = folder_classes(source.folders, count)
        if count is not None and count != len(folders):
            raise MismatchError(
                f"the folders below {source.name!r} do not name the classes",
                got=f"{len(folders)} folders",
                expected=f"{count}, one for each class",
                remedy=OTHER_FOLDERS,
            )
    count = count or max(folders.values(), default=-1) + 1
    if source.class_names and folders.keys() & set(source.class_names):
        labels = true_classes(source, folders, count)[positions].astype(np.int64)
    else:
        labels = classes_of_keys(_keys(source, positions), folders).astype(np.int64)
    by_id = {number: name for name, number in folders.items()}
    names = tuple(by_id[i] for i in range(count)) if by_id.keys() == set(range(count)) else ()
    return TrueClasses(labels, count, "images", names, folders)


def _keys(source: ImageSource, positions: np.ndarray) -> tuple[str, ...]:
    return tuple(source.keys[i] for i in positions.tolist())


def _check(
    config: LoaderConfig, found: TrueClasses, source: ImageSource, positions: np.ndarray, store: LabelStore | None
) -> None:
    """Raises an error if a class is out of range, or needed and not known."""
    labels = found.labels
    if len(labels) and labels.max() >= found.count:
        worst = int(labels.argmax())
        raise MismatchError(
            "a true class is out of range",
            got=f"class {labels[worst]} of {source.keys[positions[worst]]!r}",
            expected=f"less than {found.count}",
        )
    unknown = np.nonzero(labels < 0)[0]
    if len(unknown) and (found.kind == "images" or not config.token_labels):
        raise _unknown_classes(config, found, source, positions[unknown])


def _unknown_classes(config: LoaderConfig, found: TrueClasses, source: ImageSource, unknown: np.ndarray) -> InputError:
    """Returns the error for images whose class is needed and not known; unknown: their positions in the source."""
    keys = list(_keys(source, unknown))
    problem = f"the true class of {len(keys):,} images is not known"
    known = config.class_folders or found.folders
    kind, named = "folder", sorted({key.split("/", 1)[0] for key in keys if "/" in key})
    if source.labels is not None and source.class_names:
        kind, named = "label", sorted({source.class_names[i] for i in source.labels[unknown].tolist() if i >= 0})
    if named and known:
        return InputError(
            problem,
            got=f"{some(keys)} in {len(named)} {kind}(s) that are not among the classes: {some(named)}",
            expected=f"{kind}s with the names of the classes: {some(sorted(known))}",
            remedy=f"Rename the {kind}s, or leave these images out.",
        )
    if config.classes == "images":
        remedy = 'With classes="images" every image needs one. Leave these images out, or move them into class folders.'
    else:
        remedy = f"Without token labels every image needs a class. {OTHER_FOLDERS}"
    return InputError(problem, got=some(keys), expected="a folder for each class", remedy=remedy)


def some(keys: list[str]) -> str:
    """Returns the first few keys as text."""
    return ", ".join(map(repr, keys[:3])) + (" …" if len(keys) > 3 else "")
