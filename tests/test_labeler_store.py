"""The store: what is written is what is read, in any order, by any way, and nothing damaged gets through."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny import CLASSES, GRID, colour_teacher, make_images

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, MismatchError, label_images
from labeler.checks.verify import verify_store
from labeler.sources.decoding.decode_reference import ReferenceDecoder
from labeler.sources.decoding.decoder import DecodeSettings
from labeler.store.hdf5.build_shard import build_shard, fletcher32, packed_planes
from labeler.store.hdf5.read_shard import ShardReader
from labeler.store.row_checks import value_problems
from labeler.store.row_schema import ShardRows, class_dtype, row_layout
from labeler.store.shard_markers import publish_shard, read_marker, shard_stem
from labeler.store.stored_rows import used_slots


def shard_of(store: Path, number: int = 0) -> Path:
    return sorted(store.glob("shard-*.h5"))[number]


def truth(images: Path, key: str) -> np.ndarray:
    """[C, H, W] probabilities of the tiny teacher, straight from the file."""
    teacher = colour_teacher()
    pixels = ReferenceDecoder(DecodeSettings(32))([(images / key).read_bytes()]).pixels
    normalised = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return teacher.score_maps(normalised).softmax(1)[0].numpy()


def test_every_row_is_the_teachers_map_of_its_own_image(store, images):
    labels = LabelStore(store)
    assert len(labels) == 12
    dense = labels.read(range(12)).dense()
    for row, key in enumerate(labels.keys):
        np.testing.assert_allclose(dense[row], truth(images, key), atol=0.02)


def test_maps_have_the_promised_types_and_shapes(store):
    maps = LabelStore(store).read([3, 1])
    assert (maps.classes.dtype, maps.scores.dtype, maps.background.dtype) == (np.int64, np.float32, np.float32)
    assert maps.classes.shape == (2, CLASSES)  # no more places than there are classes
    assert maps.scores.shape == (2, CLASSES, GRID, GRID)
    assert (maps.tail_classes.dtype, maps.tail_offsets.dtype) == (np.int64, np.float32)
    assert maps.tail_classes.shape == maps.tail_offsets.shape == (2, CLASSES - 1)
    assert maps.background.shape == (2, GRID, GRID)
    assert maps.num_classes == CLASSES


@pytest.mark.parametrize("cache", [None, "ram", "ram-compressed"])
def test_rows_come_in_the_order_asked_for_and_may_repeat(store, cache):
    everything = LabelStore(store).read(range(12))
    rows = [11, 0, 5, 5, 4, 11, 3]
    some = LabelStore(store, cache=cache).read(rows)
    for name in ("classes", "scores", "background", "region"):
        np.testing.assert_array_equal(getattr(some, name), getattr(everything, name)[rows])
    assert len(LabelStore(store, cache=cache).read([])) == 0


@pytest.mark.parametrize("cache", [None, "ram"])
def test_trimmed_rows_lose_the_places_that_none_of_them_uses(store, cache):
    labels = LabelStore(store, cache)
    for rows in ([0], [3, 5], list(range(12))):
        whole, trimmed = labels.read_codes(rows), labels.read_codes(rows, trim=True)
        places = max(1, int((whole.classes >= 0).sum(1).max()))
        tail = int((whole.tail_classes >= 0).sum(1).max())
        np.testing.assert_array_equal(trimmed.classes, whole.classes[:, :places])
        np.testing.assert_array_equal(trimmed.scores, whole.scores[:, :places])
        np.testing.assert_array_equal(trimmed.tail_offsets, whole.tail_offsets[:, :tail])


@pytest.mark.parametrize(("classes", "used"), [([[0], [-1]], 1), ([[5, 0, -1], [1, -1, -1]], 2), ([[-1, -1]], 0)])
def test_class_0_uses_its_place(classes, used):
    assert used_slots(np.array(classes)) == used


def test_rows_beyond_the_store_are_an_index_error(store):
    for rows in ([12], [-1], [0, 12], [-1, 3]):
        with pytest.raises(IndexError, match="requested of a store with 12 rows"):
            LabelStore(store).read(rows)


def test_keys_are_sorted_and_found_again(store):
    labels = LabelStore(store)
    assert labels.keys == sorted(labels.keys)
    assert [labels.row_of(key) for key in labels.keys] == list(range(12))
    for absent in ("class1/nothing.jpg", "a", "zzz"):
        with pytest.raises(KeyError):
            labels.row_of(absent)


def test_a_quarantined_image_is_told_from_one_that_is_not_there(images, tmp_path, config):
    (images / "class0" / "00.jpg").write_bytes(b"no image")
    (images / "class0" / "01.jpg").write_bytes(b"")
    label_images(images, tmp_path / "labels", config)
    labels = LabelStore(tmp_path / "labels")
    reasons = {entry["key"]: entry["reason"] for entry in labels.quarantine}
    assert len(set(reasons.values())) == 2
    for key, reason in reasons.items():
        with pytest.raises(KeyError, match="has no labels: ") as told:
            labels.row_of(key)
        assert reason in str(told.value)
    with pytest.raises(KeyError, match="is not in the store"):
        labels.row_of(sorted(reasons)[0] + "x")


def test_keys_sort_and_are_found_as_text_however_many_bytes_they_take(tmp_path):
    """Keys are held as UTF-8, whose order must be that of the text; nothing near a key is taken for it."""
    keys = tuple(sorted(["a", "a b", "a.jpg", "aé.jpg", "z.jpg", "ä/ü.jpg", "日本.png", "😀.jpg"]))
    path = tmp_path / "shard.h5"
    path.write_bytes(build_shard(rows_of(keys), layout := row_layout(1, (1, 1), 3, "logprob", "uint8", 16), {}, TABLE))
    reader = ShardReader(path, layout, len(keys))
    assert reader.keys == list(keys)
    assert [reader.row_of(key) for key in keys] == list(range(len(keys)))
    for absent in ("", "A", "a\0", "a b ", "aé", "b", "zz.jpg", "日", "😀.jpg\0", "\ud800", "x" * 40):
        assert reader.row_of(absent) is None


TABLE = np.linspace(0, -20, 256, dtype=np.float32)


def rows_of(keys: tuple[str, ...]) -> ShardRows:
    n = len(keys)
    return ShardRows(
        scores=np.zeros((n, 1, 1, 1), np.uint8),
        background=np.zeros((n, 1, 1), np.uint8),
        classes=np.zeros((n, 1), np.uint16),
        region=np.zeros((n, 4), np.float32),
        image_size=np.ones((n, 2), np.uint32),
        target=np.zeros(n, np.int32),
        image_digest=np.zeros(n, np.uint64),
        keys=keys,
    )


def test_targets_come_from_the_folders_where_they_name_the_classes(tmp_path, config):
    images = make_images(tmp_path / "six", 12, classes=CLASSES)
    label_images(images, tmp_path / "labels", config)
    labels = LabelStore(tmp_path / "labels")
    assert labels.column("target").tolist() == [int(key[5]) for key in labels.keys]
    assert labels.meta.class_names == tuple(f"class{i}" for i in range(CLASSES))


def test_targets_are_unknown_where_the_folders_do_not_fit(store):
    assert LabelStore(store).column("target").tolist() == [-1] * 12


def test_the_view_shows_the_same_to_plain_h5py(store):
    labels = LabelStore(store)
    with h5py.File(store / "labels.h5") as view:
        assert [key.decode() for key in view["key"]] == labels.keys
        codes, values, background = view["scores"][:], view["code_values"][:], view["background"][:]
        scores = np.where(codes == 0, values[background][:, None], values[codes])
        np.testing.assert_array_equal(scores, labels.read(range(12)).scores)
        assert json.loads(view.attrs["teacher"])["name"] == "tiny:colour_teacher"
        assert view.attrs["num_classes"] == CLASSES


def test_equal_content_gives_equal_bytes_at_any_time(images, tmp_path, config):
    for name in ("a", "b"):
        label_images(images, tmp_path / name, config)
        time.sleep(1.1)  # a time stamp in the files would differ
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_float16_precision(images, tmp_path, config):
    label_images(images, tmp_path / "half", dataclasses.replace(config, precision="float16"))
    labels = LabelStore(tmp_path / "half")
    dense = labels.read(range(12)).dense()
    for row, key in enumerate(labels.keys):
        np.testing.assert_allclose(dense[row], truth(images, key), atol=2e-3)
    assert labels.code_values is None
    assert verify_store(tmp_path / "half").problems == ()


def test_class_ids_take_two_bytes_while_their_highest_value_is_no_class():
    assert [class_dtype(count).itemsize for count in (1, 65_535, 65_536)] == [2, 2, 4]


def test_class_ids_above_65535_are_stored_whole():
    layout = row_layout(2, (1, 1), 70_000, "logprob", "float16", 1)
    rows = ShardRows(
        scores=np.zeros((1, 2, 1, 1), np.float16),
        background=np.zeros((1, 1, 1), np.float16),
        classes=np.array([[69_999, 65_536]], np.uint32),
        region=np.array([[0, 0, 1, 1]], np.float32),
        image_size=np.array([[8, 8]], np.uint32),
        target=np.array([-1], np.int32),
        image_digest=np.array([1], np.uint64),
        keys=("k",),
    )
    assert layout["classes"][0] == np.uint32
    assert row_layout(2, (1, 1), 65_535, "logprob", "float16", 1)["classes"][0] == np.uint16
    assert len(build_shard(rows, layout, {})) > 0


def test_a_store_sent_to_another_process_still_reads(store):
    labels = LabelStore(store)
    copy = pickle.loads(pickle.dumps(labels))
    np.testing.assert_array_equal(copy.read([7]).scores, labels.read([7]).scores)


def test_a_copy_of_a_checked_store_is_not_checked_again(store, monkeypatch):
    sent = pickle.dumps(LabelStore(store))
    monkeypatch.setattr("labeler.store.parts.open_part.refuse_hostile_part", lambda path: pytest.fail("checked again"))
    assert len(pickle.loads(sent)) == 12


def test_of_two_writers_of_a_shard_the_first_wins_and_the_second_sweeps_its_file_away(tmp_path):
    fields = {"shard": 0, "rows": 1, "first_key": "a", "last_key": "a"}
    assert publish_shard(tmp_path, shard_stem(0, 1), b"first", fields)
    first = read_marker(tmp_path, 0, 1)
    assert not publish_shard(tmp_path, shard_stem(0, 1), b"second", fields)
    assert not publish_shard(tmp_path, shard_stem(0, 1), b"first", fields)
    assert read_marker(tmp_path, 0, 1) == first
    assert {path.name for path in tmp_path.iterdir()} == {first.file, "shard-00000-of-00001.json"}


def test_a_tail_is_held_against_the_palette_and_the_classes(store):
    labels = LabelStore(store)
    rows = labels.read_shard(0)
    assert value_problems(labels.plan, rows) == []
    unused = np.iinfo(rows.tail_classes.dtype).max
    for value, problem in (
        (CLASSES, f"a class id beyond {CLASSES - 1}"),
        (rows.classes[1, 0], "a class twice in one palette or tail"),
        (unused, None),
    ):
        tail = rows.tail_classes.copy()
        tail[1] = unused
        tail[1, 0] = value
        found = value_problems(labels.plan, dataclasses.replace(rows, tail_classes=tail))
        assert found == ([problem] if problem else [])


def test_a_verified_store_has_no_problems(store, images):
    found = verify_store(store, images, relabel=5, device="cpu")
    assert found.problems == ()
    assert (found.rows, found.shards, found.images_checked, found.relabeled) == (12, 3, 12, 5)
    assert found.relabel_kl == pytest.approx(found.stored_kl, abs=0.01)


def test_verify_tells_a_changed_image_and_another_folder(store, images, tmp_path):
    key = LabelStore(store).keys[4]
    data = bytearray((images / key).read_bytes())
    data[-20] ^= 1
    (images / key).write_bytes(data)
    (problem,) = verify_store(store, images).problems
    assert key in problem
    other = make_images(tmp_path / "other", 13)
    (problem,) = verify_store(store, other).problems
    assert "not those of the store" in problem
    assert "1 new" in problem


def test_a_flipped_bit_that_the_marker_hides_is_caught_by_the_rows(store):
    """Every byte of a row's chunk matters, also to a reader that was handed a forged digest."""
    path = shard_of(store)
    labels = LabelStore(store)
    reader = labels.reader(0)
    offset, size, _ = reader._chunks["scores"][1][2].tolist()
    good = path.read_bytes()
    end = offset + size - 4
    for place in range(offset, end):
        data = bytearray(good)
        # The compressed stream ends within a byte: its last bits, before the four bytes of its own check, are nobody's.
        data[place] ^= 1 if place == end - 5 else 1 << (place % 8)
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            ShardReader(path, labels.plan.layout, 4).read(np.array([2]))
    assert end - offset > 20


def test_a_damaged_marker_or_plan_is_refused(store):
    marker = sorted(store.glob("shard-*.json"))[0]
    marker.write_text(marker.read_text().replace('"rows": 4', '"rows": 3'))
    with pytest.raises(IntegrityError, match=marker.name):
        LabelStore(store)
    marker.unlink()
    with pytest.raises(IntegrityError, match="shard 0"):
        LabelStore(store)
    plan = store / "plan.json"
    plan.write_text(plan.read_text()[:-40])
    with pytest.raises(IntegrityError, match=r"plan\.json"):
        LabelStore(store)


def test_a_newer_format_is_refused_with_both_versions(store):
    from labeler.base.whole_files import read_sealed, write_sealed

    record = read_sealed(store / "plan.json")
    record["meta"]["format_version"] = "3.0"
    (store / "plan.json").unlink()
    write_sealed(store / "plan.json", record)
    with pytest.raises(MismatchError, match=r"3\.0.*1\.x or 2\.x"):
        LabelStore(store)


def test_what_is_no_store_is_said_so(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="not a label store"):
            LabelStore(path)
    with pytest.raises(InputError, match="cache"):
        LabelStore(tmp_path, cache="disk")


def forge(store: Path, change) -> tuple[Path, ShardReader | None]:
    """Change a shard's HDF5 content in place and open it as if its digest had been repaired too."""
    path, labels = shard_of(store), LabelStore(store)
    with h5py.File(path, "r+") as file:
        change(file, store)
    return path, ShardReader(path, labels.plan.layout, 4)


def external_link(file, store):
    del file["scores"]
    file["scores"] = h5py.ExternalLink(str(shard_of(store, 1)), "/scores")


def soft_link(file, store):
    del file["background"]
    file["background"] = h5py.SoftLink("/scores")


def external_storage(file, store):
    (store.parent / "secret").write_bytes(b"x" * 4096)
    del file["target"]
    file.create_dataset("target", (4,), "<i4", external=[(str(store.parent / "secret"), 0, h5py.h5f.UNLIMITED)])


def huge_dimensions(file, store):
    del file["scores"]
    shape = (10**12, CLASSES, GRID, GRID)
    file.create_dataset("scores", shape, "u1", chunks=(1, CLASSES, GRID, GRID), fletcher32=True)


def virtual_data(file, store):
    layout = h5py.VirtualLayout((4, CLASSES, GRID, GRID), "u1")
    layout[:] = h5py.VirtualSource(str(shard_of(store, 1)), "scores", (4, CLASSES, GRID, GRID))
    del file["scores"]
    file.create_virtual_dataset("scores", layout)


def no_checksum(file, store):
    data = file["scores"][:]
    del file["scores"]
    file.create_dataset("scores", data=data, chunks=(1, CLASSES, GRID, GRID))


def variable_length(file, store):
    del file["key"]
    file.create_dataset("key", data=["a", "b", "c", "d"], dtype=h5py.string_dtype())


def missing_chunks(file, store):
    del file["scores"]
    file.create_dataset("scores", (4, CLASSES, GRID, GRID), "u1", chunks=(1, CLASSES, GRID, GRID), fletcher32=True)


def extra_object(file, store):
    file["more"] = np.zeros(3)


HOSTILE = [
    external_link,
    soft_link,
    external_storage,
    huge_dimensions,
    virtual_data,
    no_checksum,
    variable_length,
    missing_chunks,
    extra_object,
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_what_no_shard_of_ours_holds_is_refused_before_it_is_read(store, change):
    with pytest.raises(IntegrityError, match="damaged or not a shard"):
        forge(store, change)


def test_a_shard_that_lacks_one_rows_chunk_is_refused_before_it_is_read(store):
    def change(file: h5py.File, _: Path) -> None:
        whole = file["scores"][:]
        del file["scores"]
        made = file.create_dataset("scores", whole.shape, "u1", chunks=(1, *whole.shape[1:]), fletcher32=True)
        made[:3] = whole[:3]

    with pytest.raises(IntegrityError, match="/scores lacks chunks"):
        forge(store, change)


@pytest.mark.parametrize(("more", "size"), [(1, 4), (0, 8)])
def test_places_in_a_file_take_four_bytes_below_the_limit(monkeypatch, more, size):
    layout = row_layout(1, (1, 1), 3, "logprob", "uint8", 16)
    payload = sum(8 * dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
    monkeypatch.setattr("labeler.store.hdf5.build_shard.MOST_IN_4_BYTES", payload + more)
    content = build_shard(rows_of(tuple("abcdefgh")), layout, {}, TABLE)
    assert content[9] == size  # of HDF5's superblock: "size of offsets"


def test_a_shard_without_rows_adds_none_to_a_column(images, tmp_path, config):
    for path in sorted(images.rglob("*.jpg"))[:4]:  # the whole first shard
        path.write_bytes(b"no image")
    label_images(images, tmp_path / "labels", config)
    labels = LabelStore(tmp_path / "labels")
    assert (len(labels), labels.markers[0].rows) == (8, 0)
    for name in ("classes", "region", "target", "image_size"):
        assert len(labels.column(name)) == 8


def test_importing_the_package_loads_neither_torch_nor_ray():
    code = "import labeler, sys; sys.exit(bool({'torch', 'ray', 'h5py', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_a_store_loads_neither_torch_nor_ray(store):
    code = (
        f"import sys, labeler; print(labeler.LabelStore({str(store)!r}).read([1]).dense().shape);"
        "sys.exit(bool({'torch', 'ray', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_decoding_on_a_device_equals_reading(store):
    labels = LabelStore(store)
    codes = labels.read_codes([2, 9])
    table = torch.from_numpy(labels.code_values)
    np.testing.assert_array_equal(table[torch.from_numpy(codes.scores).long()].numpy(), labels.read([2, 9]).scores)


def test_config_is_checked_at_the_door(config):
    for wrong in ({"palette": 0}, {"precision": "int4"}, {"workers": -1}, {"batch_size": 2.5}, {"decoder": "magick"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            dataclasses.replace(config, **wrong)
    assert isinstance(config, LabelerConfig)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 719, 720, 721, 5000])
def test_the_checksum_of_packed_planes_is_hdf5s_own(tmp_path, length):
    """Chunks are written past HDF5's filters, which must read them: of any length, also all zeros or all ones."""
    random = np.random.default_rng(length)
    for planes in (
        random.integers(0, 256, length, np.uint8),
        np.zeros(length, np.uint8),
        np.full(length, 255, np.uint8),
    ):
        if not length:
            assert fletcher32(b"") == 0
            continue
        with h5py.File(tmp_path / "file.h5", "w") as file:
            data = file.create_dataset("a", (1, length), "u1", chunks=(1, length), compression="gzip", fletcher32=True)
            data.id.write_direct_chunk((0, 0), packed_planes(planes.tobytes()))
            raw = file.create_dataset("b", (1, length), "u1", chunks=(1, length), fletcher32=True)
            raw[0] = planes
        with h5py.File(tmp_path / "file.h5") as file:
            np.testing.assert_array_equal(file["a"][0], planes)
            stored = file["b"].id.read_direct_chunk((0, 0))[1]
            assert stored[-4:] == fletcher32(planes.tobytes()).to_bytes(4, "little")
