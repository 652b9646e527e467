"""The columns of a store: one table, which FORMAT.md describes, and rows that are joined, selected and summed by it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from labeler.store.row_schema import COLUMNS, PLANES, ShardRows, row_layout, signed_classes, store_classes
from labeler.store.stored_rows import StoredRows

FORMAT = Path(__file__).parents[1] / "labeler" / "FORMAT.md"
P, R, GRID, C = 3, 2, (2, 4), 9


def layout_of(kind: str = "logprob", precision: str = "uint8", tail: int = R) -> dict:
    return dict(row_layout(P, GRID, C, kind, precision, 8, tail))


def rows_of(keys: tuple[str, ...], layout: dict, seed: int = 0) -> ShardRows:
    random, n = np.random.default_rng(seed), len(keys)
    columns = {
        name: random.integers(0, 9, (n, *shape)).astype(dtype)
        for name, (dtype, shape) in layout.items()
        if name in COLUMNS
    }
    return ShardRows(**columns, keys=keys)


@pytest.mark.parametrize(
    ("kind", "precision", "tail"), [("logprob", "uint8", R), ("logprob", "float16", 0), ("logit", "float16", 0)]
)
def test_the_data_sets_are_those_of_the_format_page(kind, precision, tail):
    """Each line of the page's table: `/name`, type, shape, meaning with where the data set is absent."""
    lines = re.findall(r"^\| `/(\w+)` \| (.+?) \| (.+?) \| (.+) \|$", FORMAT.read_text(), re.M)
    absent = {"absent in a `logit` store": kind == "logit", "absent where R = 0": not tail}
    absent["absent where scores are f2"] = precision == "float16"
    expected = [line for line in lines if not any(gone for words, gone in absent.items() if words in line[3])]
    layout = layout_of(kind, precision, tail)
    assert layout.keys() == {name for name, *_ in expected}
    sizes = {"P": P, "R": tail, "H": GRID[0], "W": GRID[1]}
    for name, types, shape, _ in expected:
        axes = [axis.strip() for axis in shape.strip("()").split(",") if axis.strip() != "n"]
        assert layout[name][1] == tuple(sizes[axis] if axis in sizes else int(axis) for axis in axes)
        if types != "fixed-length UTF-8" and not types.startswith("as "):
            assert layout[name][0].str.strip("<|") in types.replace(",", " ").split()


def test_a_checksum_covers_the_columns_in_the_order_of_the_format_page():
    order = re.search(r"the bytes of scores, (.+?) \(those that exist\), (.+?), then the key", FORMAT.read_text())
    names = ["scores", *", ".join(order.groups()).split(", ")]
    rows = rows_of(("a", "ä"), layout_of())
    for row, key in enumerate(rows.keys):
        data = b"".join(getattr(rows, name)[row].tobytes() for name in names)
        assert rows.checksums()[row] == xxhash.xxh3_64_intdigest(data + key.encode())


@pytest.mark.parametrize("tail", [R, 0])
def test_joined_rows_are_the_rows_of_all_parts_and_their_beginning_is_the_first_part(tail):
    layout = layout_of(tail=tail)
    parts = [rows_of(("a", "b"), layout), rows_of(("c",), layout, seed=1)]
    whole = ShardRows.joined(parts, layout)
    assert whole.keys == ("a", "b", "c")
    np.testing.assert_array_equal(whole.checksums(), np.concatenate([part.checksums() for part in parts]))
    np.testing.assert_array_equal(whole.first(2).checksums(), parts[0].checksums())
    none = ShardRows.joined([], layout)
    assert (len(none), none.scores.shape, none.classes.dtype) == (0, (0, P, *GRID), np.uint16)
    assert (none.tail_classes is None) == (not tail)
    assert none.checksums().shape == (0,)


def test_class_ids_come_back_signed():
    ids = np.array([[0, 8, -1]])
    for num_classes in (9, 70_000):
        np.testing.assert_array_equal(signed_classes(store_classes(ids, num_classes)), ids)


@pytest.mark.parametrize(("kind", "precision", "tail"), [("logprob", "uint8", R), ("logit", "float16", 0)])
def test_rows_are_gathered_from_several_shards_in_the_order_asked_for(kind, precision, tail):
    layout = layout_of(kind, precision, tail)
    first, second = rows_of(("a", "b"), layout), rows_of(("c",), layout, seed=1)
    found = StoredRows.gathered(3, layout, [(np.array([2, 0]), first), (np.array([1]), second)])
    whole = ShardRows.joined([first, second], layout)
    assert found.tail_classes.shape == found.tail_offsets.shape == (3, tail)
    for name in (name for name in vars(found) if name in layout):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[[1, 2, 0]])
    assert (found.background is None) == (kind == "logit")
    tensors = found.to_torch()
    assert isinstance(tensors.scores, torch.Tensor)
    assert (tensors.background is None) == (kind == "logit")


def test_planes_are_the_columns_with_a_value_for_each_cell():
    assert PLANES == ("scores", "background")
