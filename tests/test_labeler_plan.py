"""Plan and markers as files: what is written is what is read, and what they may not say is named."""

from __future__ import annotations

import json

import pytest
from hostile import edit_plan, repair

from labeler import IntegrityError, LabelStore
from labeler.base.whole_files import sealed
from labeler.store.plan import load_plan
from labeler.store.shard_markers import read_marker, shard_stem


def test_a_plan_is_read_as_it_was_written(store, tmp_path):
    plan = load_plan(store)
    assert plan.save(tmp_path)
    assert load_plan(tmp_path) == plan
    assert (tmp_path / "plan.json").read_bytes() == (store / "plan.json").read_bytes()
    assert isinstance(plan.meta.grid, tuple)
    assert isinstance(plan.meta.class_names, tuple)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("palette", 1 << 40, "meta.palette 1099511627776"),
        ("palette", 4.0, "meta.palette 4.0"),
        ("tail", "1", "meta.tail '1'"),
        ("grid", [4, 5000], "meta.grid.1 5000"),
        ("orientation", "up", "impossible orientation"),
        ("shards", 7, "impossible number of shards"),
        ("num_classes", None, "meta.num_classes None"),
    ],
)
def test_an_entry_of_a_plan_that_cannot_be_is_named(store, entry, value, text):
    edit_plan(store, lambda plan: plan["meta"].update({entry: value}))
    with pytest.raises(IntegrityError, match="is not a plan") as refusal:
        load_plan(store)
    assert refusal.value.got == text


def test_entries_that_later_versions_may_add_are_passed_over(store):
    before = load_plan(store)
    edit_plan(store, lambda plan: plan["meta"].update({"more": [1]}))
    assert load_plan(store) == before
    repair(store, more="x")
    assert len(LabelStore(store, trusted=True)) == 12


def test_a_missing_entry_is_named(store):
    edit_plan(store, lambda plan: plan["meta"].pop("palette"))
    with pytest.raises(IntegrityError, match=r"got no meta\.palette"):
        load_plan(store)
    path = store / f"{shard_stem(1, 3)}.json"
    record = json.loads(path.read_bytes())
    del record["xxh3"], record["size"]
    path.write_bytes(sealed(record))
    with pytest.raises(IntegrityError, match="got no size: that no marker has"):
        read_marker(store, 1, 3)


def test_a_quarantined_image_without_a_reason_is_refused(store):
    repair(store, quarantine=[{"key": "a"}])
    with pytest.raises(IntegrityError, match="a quarantine that no marker has"):
        read_marker(store, 0, 3)
