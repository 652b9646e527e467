"""Whether two plans say the same of the values of labels, as those of one store must."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labeler.base.errors import MismatchError
from labeler.store.plan import Plan, plain, shortened

COMPARED = (
    "format_version",
    "num_classes",
    "class_names",
    "palette",
    "tail",
    "grid",
    "precision",
    "orientation",
    "score_kind",
)
# Of a teacher's record: equal weights may be stored elsewhere, and the rest is information for people.
NOT_COMPARED = frozenset({"checkpoint", "random_weights", "method", "self_test", "notes"})


def refuse_other_settings(store: Path, existing: Plan, wanted: Plan) -> None:
    """Compares the plans of a store and of a run that would resume or extend it.

    Args:
        store: The store's folder.
        existing: The store's plan.
        wanted: The plan of the run.

    Raises:
        MismatchError: They differ; it names each setting that does.
    """
    differences = other_settings(existing, wanted)
    if existing.shard_size != wanted.shard_size:
        differences.append(f"shard_size {wanted.shard_size}, the store has {existing.shard_size}")
    if differences:
        raise MismatchError(
            f"the store {str(store)!r} was begun with other settings",
            got="; ".join(differences),
            remedy="Use the settings that it was begun with, or another `store`.",
        )


def other_settings(existing: Plan, wanted: Plan, as_parts: bool = False) -> list[str]:
    """Compares what affects the values of labels in two plans.

    Args:
        existing: The plan of a store.
        wanted: Another plan.
        as_parts: Whether the labels are, or are to be, parts of one store: then the images may come from a list for one
            of them only, and class names may be known for one of them only.

    Returns:
        Each setting that differs, with both values.
    """
    pairs = [
        *((name, getattr(existing.meta, name), getattr(wanted.meta, name)) for name in COMPARED),
        ("code_values", existing.code_values, wanted.code_values),
        *_entries(existing.settings, wanted.settings),
        *_entries(existing.meta.teacher, wanted.meta.teacher),
    ]
    if as_parts:
        known = [bool(plan.meta.class_names) for plan in (existing, wanted)]
        pairs = [pair for pair in pairs if pair[0] != "from_list" and (pair[0] != "class_names" or all(known))]
    different = [(name, old, new) for name, old, new in pairs if plain(old) != plain(new)]
    return list(
        dict.fromkeys(f"{name} {shortened(new)}, the store has {shortened(old)}" for name, old, new in different)
    )


def _entries(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, existing value, wanted value) of each entry to compare."""
    names = sorted({*existing, *wanted} - NOT_COMPARED)
    return [(name, existing.get(name), wanted.get(name)) for name in names]
