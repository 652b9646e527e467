"""Several parts, or several stores, as one: they have the same settings, and no image twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from labeler.base.errors import MismatchError
from labeler.store.parts.compare_plans import other_settings
from labeler.store.parts.open_part import Part
from labeler.store.plan import Plan


def joined_plan(parts: Sequence[Part]) -> Plan:
    """Returns one plan for all parts.

    Args:
        parts: The parts.

    Returns:
        The plan of the first part, with the images and shards of all of them. Its `slice_of` is of no use.

    Raises:
        MismatchError: Two parts have other settings; it names them.
    """
    plans = [part.plan for part in parts]
    first = plans[0]
    if len(plans) == 1:
        return first
    for part in parts[1:]:
        refuse_other_part(parts[0].place, first, part.place, part.plan)
    fingerprints = "".join(plan.meta.dataset_fingerprint for plan in plans)
    meta = replace(
        first.meta,
        class_names=next((plan.meta.class_names for plan in plans if plan.meta.class_names), ()),
        dataset_fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
        num_images=sum(plan.meta.num_images for plan in plans),
        shards=sum(plan.meta.shards for plan in plans),
    )
    return replace(
        first,
        meta=meta,
        settings={**first.settings, "from_list": any(plan.settings.get("from_list") for plan in plans)},
        shard_size=max(plan.shard_size for plan in plans),
        key_bytes=max(plan.key_bytes for plan in plans),
        class_folders=_joined_folders(parts),
    )


def refuse_other_part(store: Path | str, plan: Plan, other: Path | str, wanted: Plan) -> None:
    """Checks that two parts can be read as one.

    Args:
        store: Folder or URL of the first.
        plan: Its plan.
        other: Folder or URL of the second.
        wanted: Its plan.

    Raises:
        MismatchError: They have other settings; it names each.
    """
    differences = other_settings(plan, wanted, as_parts=True)
    if differences:
        raise MismatchError(
            f"the labels of {str(other)!r} and of {str(store)!r} were made with other settings",
            got="; ".join(differences), expected="the same settings",
            remedy="Only labels of one teacher, with the same settings, can be one store.",
        )  # fmt: skip


def _joined_folders(parts: Sequence[Part]) -> Mapping[str, int]:
    """Returns the class folders of all parts. Raises MismatchError if one folder has two classes."""
    folders: dict[str, int] = {}
    for part in parts:
        for name, number in part.plan.class_folders.items():
            if folders.setdefault(name, number) != number:
                raise MismatchError(
                    f"the folder {name!r} is another class in {str(part.place)!r}", got=f"class {number}",
                    expected=f"class {folders[name]}", remedy="Label both with the same `label --class-names`.",
                )  # fmt: skip
    return folders


def refuse_shared_keys(parts: Sequence[Part], keys: Sequence[Sequence[str]]) -> None:
    """Checks that no image is in two parts, whether labeled or in the quarantine.

    Args:
        parts: The parts.
        keys: The keys of each part's rows.

    Raises:
        MismatchError: An image is in two parts; it names the first few.
    """
    seen: dict[str, Path | str] = {}
    for part, rows in zip(parts, keys, strict=True):
        own = [*rows, *(entry["key"] for entry in part.quarantine)]
        shared = [key for key in own if key in seen]
        if shared:
            raise MismatchError(
                f"{len(shared):,} images are both in {str(seen[shared[0]])!r} and in {str(part.place)!r}",
                got=", ".join(map(repr, shared[:3])) + " …" * (len(shared) > 3), expected="each image once",
                remedy="Use one of the two, or label one of them again without these images.",
            )  # fmt: skip
        seen.update(dict.fromkeys(own, part.place))
