"""Checks of a shard beyond its digest: attributes, counts and values must be such as the labeler writes."""

from __future__ import annotations

import numpy as np

from labeler.store.hdf5.read_shard import ShardReader
from labeler.store.plan import Plan, plain
from labeler.store.row_schema import ShardRows, signed_classes
from labeler.store.score_code import MAX_OFFSET


def shard_problems(plan: Plan, shard: int, reader: ShardReader, quarantine: list[dict[str, str]]) -> list[str]:
    """Returns the problems in a shard's attributes, order and counts."""
    meta = plan.meta
    problems = []
    expected = meta.attributes(shard)
    wrong = sorted(name for name in expected if plain(reader.attributes.get(name)) != plain(expected[name]))
    if wrong:
        problems.append(f"attributes differ from the plan: {', '.join(wrong)}")
    part = plan.slice_of(shard)
    if reader.rows + len(quarantine) != part.stop - part.start:
        problems.append(f"{reader.rows} rows and {len(quarantine)} quarantined of {part.stop - part.start} images")
    if (keys := reader.keys) != sorted(set(keys)):
        problems.append("the keys are not sorted and unique")
    return problems


def value_problems(plan: Plan, rows: ShardRows) -> list[str]:
    """Returns the problems in a shard's values: those that the labeler never writes."""
    meta, problems = plan.meta, []
    named = rows.classes if rows.tail_classes is None else np.concatenate([rows.classes, rows.tail_classes], 1)
    ordered = np.sort(signed_classes(named), axis=1)
    if (ordered >= meta.num_classes).any():
        problems.append(f"a class id beyond {meta.num_classes - 1}")
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        problems.append("a class twice in one palette or tail")
    if rows.tail_offsets is not None and (np.abs(rows.tail_offsets.astype(np.int16)) > MAX_OFFSET * 4).any():
        problems.append("a tail offset out of range")
    if not np.isfinite(rows.scores).all() or (rows.background is not None and not np.isfinite(rows.background).all()):
        problems.append("scores that are not finite")
    y0, x0, y1, x1 = rows.region.T
    if not ((y0 >= 0) & (y0 < y1) & (y1 <= 1) & (x0 >= 0) & (x0 < x1) & (x1 <= 1)).all():
        problems.append("a region outside its image")
    if (rows.target >= meta.num_classes).any() or (rows.target < -1).any():
        problems.append("a target that is not a class")
    return problems
