"""Damage to a store that was whole, and runs that would mix what does not belong together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from faults import counts, tally
from labeling_runs import assert_undisturbed, state
from tiny import encoded, picture

from labeler import IntegrityError, LabelStore, MismatchError, TeacherConfig, TokenLabelError, label_images
from labeler.checks.verify import verify_store


def shards_of(store: Path) -> list[Path]:
    return sorted(store.glob("shard-*.h5"))


def marker_of(shard: Path) -> Path:
    return shard.with_name(shard.name.split(".")[0] + ".json")


def copied(store: Path, to: Path) -> Path:
    to.mkdir()
    for path in store.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def refusal(store: Path, **options: bool) -> str:
    """What the reader says when everything is read; nothing where it notices nothing."""
    try:
        LabelStore(store, **options).read(range(12))
    except TokenLabelError as error:
        return str(error)
    return ""


def payload(path: Path) -> list[range]:
    """The bytes of the rows in a shard's file: every chunk of every data set with one entry per row."""
    found = []
    with h5py.File(path) as file:
        for name in file:
            if name != "code_values":
                infos = [file[name].id.get_chunk_info(i) for i in range(file[name].id.get_num_chunks())]
                found += [range(info.byte_offset, info.byte_offset + info.size) for info in infos]
    return found


@pytest.mark.fault(11)
def test_a_flipped_bit_in_a_payload_is_refused_and_that_shard_alone_labeled_again(images, store, tmp_path, config):
    undisturbed, random = copied(store, tmp_path / "undisturbed"), np.random.default_rng(11)
    for n in range(counts(50, 1000)):
        path = shards_of(store)[n % 3]
        good = path.read_bytes()
        chunks = payload(path)
        place = int(random.choice(chunks[n % len(chunks)]))
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        said, before = refusal(store), state(store)
        tally(11, corruptions=1, silent=not said)
        assert path.name in said, f"byte {place} of {path.name}"
        assert label_images(images, store, config).labeled_now == 4
        kept = {name: value for name, value in before.items() if name.split(".")[0] != path.name.split(".")[0]}
        assert len(kept) == 4
        assert kept.items() <= state(store).items()
        assert path.read_bytes() == good
    assert_undisturbed(11, store, undisturbed)


def same_record(a: bytes, b: bytes) -> bool:
    """Whether two JSON texts say the same: the 17th digit of a number may change nothing."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.fault(12)
def test_a_flipped_bit_in_metadata_is_refused(store):
    """Headers, indices and attributes of a shard's file, its marker, and the plan; one shard is read for each flip."""
    random, silent = np.random.default_rng(12), []
    for n in range(counts(100, 4000)):
        shard = shards_of(store)[n % 3]
        path = (shard, shard, shard, marker_of(shard), store / "plan.json")[n % 5]
        good, skipped = path.read_bytes(), payload(shard) if path == shard else []
        places = np.setdiff1d(np.arange(len(good)), np.concatenate([[], *skipped]).astype(int))
        place, bit = int(random.choice(places)), int(random.integers(8))
        flipped = bytearray(good)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        said = refusal(store, trusted=True)  # without the child process that looks at unknown stores first
        path.write_bytes(good)
        if said:
            assert path.name in said
        elif not same_record(flipped, good):
            silent.append((path.name, place, bit))
    tally(12, corruptions=n + 1, silent=len(silent))
    assert silent == []
    assert refusal(store) == ""


@pytest.mark.fault(13)
def test_a_shard_that_is_cut_or_padded_is_refused_and_labeled_again(images, store, tmp_path, config):
    undisturbed, random = copied(store, tmp_path / "undisturbed"), np.random.default_rng(13)
    path = shards_of(store)[1]
    good = path.read_bytes()
    cuts = [0, 1, 8, len(good) - 1, *random.integers(1, len(good), counts(4, 100)).tolist()]
    tails = [b"\0", b"\n", bytes(8), bytes(4096), good, random.bytes(counts(4, 100))]
    for data in [*(good[:cut] for cut in cuts), *(good + tail for tail in tails), bytes(len(good))]:
        path.write_bytes(data)
        said = refusal(store)
        tally(13, corruptions=1, silent=not said)
        assert path.name in said
        (problem,) = verify_store(store).problems
        assert path.name in problem
        assert len(LabelStore(store).read(range(4))) == 4, "the shard before it is good"
    assert label_images(images, store, config).labeled_now == 4
    assert_undisturbed(13, store, undisturbed)


@pytest.mark.fault(14)
@pytest.mark.parametrize("missing", ["shard", "marker", "both"])
def test_a_missing_file_is_named_and_that_shard_alone_labeled_again(images, store, tmp_path, config, missing):
    undisturbed, path = copied(store, tmp_path / "undisturbed"), shards_of(store)[1]
    before = state(store)
    if missing != "marker":
        path.unlink()
    if missing != "shard":
        marker_of(path).unlink()
    said, (problem,) = refusal(store), verify_store(store).problems
    tally(14, corruptions=1, silent=not said)
    for text in (said, problem):
        assert (path.name if missing == "shard" else "shard 1") in text
    assert label_images(images, store, config).labeled_now == 4
    kept = {name: value for name, value in before.items() if "00001-of" not in name}
    assert kept.items() <= state(store).items()
    assert_undisturbed(14, store, undisturbed)


def test_a_missing_view_is_written_again_without_any_labeling(images, store, config):
    before = state(store)
    (store / "labels.h5").unlink()
    assert label_images(images, store, config).labeled_now == 0
    assert state(store) == before
    assert verify_store(store, images).problems == ()


def test_a_damaged_plan_is_told_with_the_way_out(images, store, config):
    (store / "plan.json").write_bytes(b"")
    for work in (lambda: LabelStore(store), lambda: label_images(images, store, config)):
        with pytest.raises(IntegrityError, match=r"plan\.json.*new folder"):
            work()


SETTINGS = [
    ({"palette": 4}, "palette"),
    ({"precision": "float16"}, "precision"),
    ({"tail": 2}, "tail"),
    ({"levels": 24}, "levels"),
    ({"threshold": 0.01}, "threshold"),
    ({"orientation": "ignore"}, "orientation"),
    ({"shard_size": 5}, "shard_size"),
    ({"min_side": 9}, "min_side"),
    ({"teacher": TeacherConfig("tiny:colour_teacher", view="center")}, "view"),
    ({"teacher": TeacherConfig("tiny:colour_teacher", flip=False)}, "flip"),
    ({"teacher": TeacherConfig("tiny:slow_teacher")}, "name"),
    ({"teacher": TeacherConfig("tiny:colour_teacher", mean=(0.4, 0.5, 0.5))}, "mean"),
]


@pytest.mark.fault(15)
@pytest.mark.parametrize(("change", "word"), SETTINGS, ids=[word for _, word in SETTINGS])
def test_other_settings_are_refused_by_name(images, store, config, change, word):
    before = state(store, "*")
    with pytest.raises(MismatchError, match=f"{word} .*the store has"):
        label_images(images, store, dataclasses.replace(config, **change))
    assert state(store, "*") == before
    tally(15, injected=1)


@pytest.mark.fault(15)
def test_a_teacher_of_the_same_name_with_other_weights_is_refused(images, store, config, monkeypatch):
    class Retrained(tiny.ColourTeacher):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.weight[0, 0] += 1e-3

    monkeypatch.setattr(tiny, "colour_teacher", Retrained)
    shards_of(store)[0].unlink()
    before = state(store, "*")
    with pytest.raises(MismatchError, match=r"weights_sha256 .*the store has"):
        label_images(images, store, config)
    assert state(store, "*") == before
    tally(15, injected=1)


@pytest.mark.fault(15)
@pytest.mark.parametrize("change", ["added", "removed", "renamed", "resized"])
def test_other_images_are_refused_and_named(images, store, config, change):
    some = images / "class0" / "img000.jpg"
    if change == "added":
        (images / "class0" / "added.jpg").write_bytes(encoded(picture(99)))
    elif change == "removed":
        some.unlink()
    elif change == "renamed":
        some.rename(some.with_name("renamed.jpg"))
    else:
        some.write_bytes(encoded(picture(99)))
    words = {
        "added": r"1 new \('class0/added\.jpg'\)",
        "removed": r"1 missing \('class0/img000\.jpg'\)",
        "renamed": r"1 new \('class0/renamed\.jpg'\); 1 missing \('class0/img000\.jpg'\)",
        "resized": "the same names, other file sizes",
    }
    before = state(store, "*")
    with pytest.raises(MismatchError, match=words[change]):
        label_images(images, store, config)
    assert state(store, "*") == before
    tally(15, injected=1)


@pytest.mark.fault(15)
def test_an_image_that_changed_within_its_size_is_told_when_the_images_are_compared(images, store, config):
    """A resumed run does not read what it has labeled: the digests of the rows tell, before training or on verify."""
    key = LabelStore(store).keys[4]
    data = bytearray((images / key).read_bytes())
    data[-20] ^= 1
    (images / key).write_bytes(data)
    label_images(images, store, config)
    (problem,) = verify_store(store, images).problems
    assert key in problem
    tally(15, injected=1)
