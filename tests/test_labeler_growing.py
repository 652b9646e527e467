"""Stores that grow, and stores that become one: nothing lost, nothing doubled, old shards untouched, at any moment."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
import tomllib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import h5py
import hostile
import numpy as np
import pytest
import torch
from faults import counts, tally
from labeling_runs import in_child, wait_until
from tiny import CLASSES, encoded, make_images, picture
from tiny_runs import tiny_config

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, MismatchError, TeacherConfig, label_images
from labeler.__main__ import main
from labeler.base.errors import LabelingError
from labeler.checks.verify import verify_store
from labeler.remote.remote_files import RemoteFolder
from labeler.share.pull_store import pull_store
from labeler.share.push_store import push_store
from labeler.store.parts import extend_store
from labeler.store.parts.find_parts import store_files
from labeler.store.parts.merge_stores import merge_stores
from pipeline import LoaderConfig, create_loader

COLUMNS = ("classes", "tail_classes", "tail_offsets", "region", "image_size", "target", "image_digest", "checksum")
SLOW = TeacherConfig("tiny:slow_teacher")


def rows_by_key(store: Path | list[Path]) -> dict[str, tuple[bytes, ...]]:
    """Everything that is stored about each image."""
    labels = LabelStore(store)
    stored = labels.read_codes(range(len(labels)))
    columns = [stored.scores, stored.background, *map(labels.column, COLUMNS)]
    return {key: tuple(column[row].tobytes() for column in columns) for row, key in enumerate(labels.keys)}


def identities(store: Path) -> dict[str, tuple[int, int, str]]:
    """Inode, time and digest of each shard, marker and plan below a folder."""
    paths = [path for pattern in ("shard-*", "plan.json") for path in store.rglob(pattern)]
    return {
        str(path.relative_to(store)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in paths
    }


def add_images(folder: Path, names: tuple[str, ...], seed: int) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(encoded(picture(seed + i, 38 + i, 44)))


FIRST = ("class0/a0.jpg", "class1/a9 with a longer name.jpg", "class2/new.jpg", "class0/zz.jpg", "class1/b.jpg")
SECOND = ("class1/c.jpg", "class2/d.jpg")


@pytest.fixture
def extending(config: LabelerConfig) -> LabelerConfig:
    return dataclasses.replace(config, extend=True)


@pytest.fixture
def grown(images: Path, store: Path, extending: LabelerConfig) -> Path:
    """Twelve images, five more, and two more."""
    for seed, names in ((100, FIRST), (200, SECOND)):
        add_images(images, names, seed)
        label_images(images, store, extending)
    return store


def test_a_store_that_grew_equals_one_that_was_labeled_in_one_go(images, store, config, extending, tmp_path):
    before = identities(store)
    (images / "class0" / "bad.jpg").write_bytes(b"text")
    add_images(images, FIRST, 100)
    summary = label_images(images, store, extending)
    assert (summary.labeled_now, summary.rows, summary.quarantined) == (5, 17, 1)
    add_images(images, SECOND, 200)
    assert label_images(images, store, extending).labeled_now == 2
    label_images(images, tmp_path / "at once", config)

    assert rows_by_key(store) == rows_by_key(tmp_path / "at once")
    assert before.items() <= identities(store).items()
    assert not (store / "extending").exists()
    labels, at_once = LabelStore(store), LabelStore(tmp_path / "at once")
    assert [part.folder.name for part in labels.parts] == ["labels", "part-00001", "part-00002"]
    assert labels.quarantine == at_once.quarantine
    assert (labels.meta.num_images, labels.meta.shards, len(labels)) == (20, 3 + 2 + 1, 19)
    assert labels.meta.class_names == at_once.meta.class_names
    for key in labels.keys:
        assert labels.keys[labels.row_of(key)] == key
    with pytest.raises(KeyError, match=r"bad\.jpg' has no labels"):
        labels.row_of("class0/bad.jpg")
    with pytest.raises(KeyError, match="is not in the store"):
        labels.row_of("class9/none.jpg")
    assert verify_store(store, images, relabel=19, trusted=True).problems == ()
    lines = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["part"]) for line in lines] == [("class0/bad.jpg", 1)]


@pytest.mark.parametrize("cache", ["ram", "ram-compressed"])
def test_caches_hold_all_parts(grown, cache):
    files, held = LabelStore(grown), LabelStore(grown, cache=cache)
    rows = [18, 0, 12, 17, 5]
    np.testing.assert_array_equal(files.read(rows).scores, held.read(rows).scores)
    np.testing.assert_array_equal(files.read(rows).classes, held.read(rows).classes)


def test_a_store_without_parts_has_the_fingerprint_that_it_had(store):
    labels = LabelStore(store)
    digest = hashlib.sha256(labels.meta.dataset_fingerprint.encode())
    for marker in labels.markers:
        digest.update(marker.sha256.encode())
    assert labels.fingerprint == digest.hexdigest()


def test_plain_hdf5_sees_all_rows(grown):
    labels = LabelStore(grown)
    with h5py.File(grown / "labels.h5") as view:
        assert [key.decode() for key in view["key"][:].tolist()] == labels.keys
        np.testing.assert_array_equal(view["scores"][:], labels.read_codes(range(len(labels))).scores)
        np.testing.assert_array_equal(view["checksum"][:], labels.column("checksum"))
        assert (view.attrs["shards"], view.attrs["num_images"]) == (6, 19)


def test_the_other_commands_see_all_rows(grown, images, tmp_path, capsys):
    assert main(["verify", str(grown), "--images", str(images), "--json", "--quiet"]) == 0
    assert (found := json.loads(capsys.readouterr().out))["rows"] == 19
    assert found["images_checked"] == 19
    assert found["bytes"] == sum(path.stat().st_size for path in grown.rglob("*") if path.is_file())
    report = ["report", str(grown), "--images", str(images), "--audit", "19", "--out", str(tmp_path / "page.html")]
    assert main([*report, "--quiet", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["audit"]["images"] == 19
    assert "in 3 parts" in (tmp_path / "page.html").read_text()
    names = list(store_files(grown))
    assert len(names) == len(set(names))
    assert "part-00002/plan.json" in names
    assert {grown / name for name in names} == {path for path in grown.rglob("*") if path.is_file()}


def test_a_changed_image_of_any_part_is_found(grown, images):
    path = images / "class0" / "a0.jpg"  # the first key of all, and not of the first part
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    checked, problems = LabelStore(grown).check_images(images)
    assert checked == 19
    assert len(problems) == 1
    assert "class0/a0.jpg" in problems[0]


def test_nothing_new_is_said_and_changes_nothing(grown, images, extending, caplog):
    before = identities(grown)
    assert label_images(images, grown, extending).labeled_now == 0
    assert "nothing is new" in caplog.text
    assert identities(grown) == before


def test_a_grown_store_is_complete_for_a_plain_run_and_names_extend_for_new_images(grown, images, config):
    before = identities(grown)
    summary = label_images(images, grown, config)
    assert (summary.labeled_now, summary.rows) == (0, 19)
    assert identities(grown) == before
    add_images(images, ("class1/more.jpg",), 300)
    with pytest.raises(MismatchError, match=r"1 new \('class1/more.jpg'\).*`label --extend`"):
        label_images(images, grown, config)


def test_new_images_of_a_store_without_parts_are_pointed_to_extend(store, images, config):
    add_images(images, SECOND, 200)
    with pytest.raises(MismatchError, match=r"2 new.*`label --extend`"):
        label_images(images, store, config)


def test_a_damaged_shard_of_a_part_is_labeled_again(grown, images, config):
    expected, before = rows_by_key(grown), identities(grown)
    path = next((grown / "part-00001").glob("shard-00001-*.h5"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "part-00001" in verify_store(grown).problems[0]
    assert label_images(images, grown, config).labeled_now == 1
    assert rows_by_key(grown) == expected
    changed = {name for name, found in identities(grown).items() if found != before[name]}
    assert all(name.startswith("part-00001/shard-00001-") for name in changed)
    assert verify_store(grown, images).problems == ()


@pytest.mark.parametrize("name", ["class1/img001.jpg", "class1/b.jpg"], ids=["first part", "second part"])
def test_images_that_are_gone_or_changed_are_named_before_any_work(grown, images, extending, name, monkeypatch):
    monkeypatch.setattr("labeler.teacher.create_teacher.create_teacher", lambda *_: pytest.fail("work has begun"))
    add_images(images, ("class1/more.jpg",), 300)
    data = (images / name).read_bytes()
    (images / name).write_bytes(data + b"x")
    with pytest.raises(MismatchError, match=rf"changed after they were labeled: got '{name}', expected"):
        label_images(images, grown, extending)
    (images / name).unlink()
    with pytest.raises(MismatchError, match=rf"1 images of the store .* are gone.*got '{name}'.*merge"):
        label_images(images, grown, extending)
    assert not (grown / "extending").exists()


def test_other_settings_are_refused_before_any_shard(store, images, extending):
    add_images(images, SECOND, 200)
    with pytest.raises(MismatchError, match="palette 2"):
        label_images(images, store, dataclasses.replace(extending, palette=2))
    assert not list(store.rglob("extending/*"))


def test_there_must_be_a_whole_store_to_extend(store, images, tmp_path, extending):
    with pytest.raises(InputError, match=r"no label store .* to extend.*Omit `extend`"):
        label_images(images, tmp_path / "none", extending)
    next(store.glob("shard-00001-*.json")).unlink()
    with pytest.raises(IntegrityError, match=r"2 of 3 shards.*without `extend`"):
        label_images(images, store, extending)


def test_an_extension_that_was_begun_with_other_images_is_said(store, images, extending, monkeypatch):
    add_images(images, FIRST, 100)
    with monkeypatch.context() as patch:
        patch.setattr("labeler.run.finish_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label_images(images, store, extending)
    add_images(images, SECOND, 200)
    with pytest.raises(MismatchError, match=r"an extension .* was begun in .*extending.*2 new.*remove that folder"):
        label_images(images, store, extending)
    assert len(LabelStore(store)) == 12
    shutil.rmtree(store / "extending")
    assert label_images(images, store, extending).labeled_now == 7


def test_new_folders_have_the_classes_that_the_store_knows(tmp_path, config, extending):
    """Class names in a file: the new images are of one more of these classes, and of one that has none."""
    images, names = make_images(tmp_path / "images"), tmp_path / "names.txt"
    names.write_text("".join(f"class{i}\n" for i in range(CLASSES)))
    named = {"class_names": str(names)}
    label_images(images, tmp_path / "labels", dataclasses.replace(config, **named))
    add_images(images, ("class4/x.jpg", "other/y.jpg", "class1/z.jpg"), 50)
    label_images(images, tmp_path / "labels", extending)
    labels = LabelStore(tmp_path / "labels")
    found = {key: labels.column("target")[row] for row, key in enumerate(labels.keys)}
    assert [found[key] for key in ("class4/x.jpg", "other/y.jpg", "class1/z.jpg", "class2/img002.jpg")] == [4, -1, 1, 2]
    assert labels.meta.class_names[4] == "class4"


def test_a_view_that_a_kill_left_behind_is_said_and_mended(grown, images, config):
    shutil.copy(grown / "part-00001" / "labels.h5", grown / "labels.h5")
    problems = verify_store(grown).problems
    assert any("labels.h5 shows 5 rows of 19: run the labeling command again" in problem for problem in problems)
    label_images(images, grown, config)
    assert verify_store(grown).problems == ()


# Two at once, and kills


@pytest.mark.fault(4)
def test_of_two_extensions_at_once_the_first_wins(images, store, extending, tmp_path):
    add_images(images, FIRST, 100)
    slow = dataclasses.replace(extending, batch_size=1)
    both = [in_child(lambda: label_images(images, store, slow)) for _ in range(2)]
    for child in both:
        child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    labels = LabelStore(store)
    assert len(labels.keys) == len(set(labels.keys)) == 17
    assert len(labels.parts) == 2
    assert not (store / "extending").exists()
    assert verify_store(store, images).problems == ()
    tally(4, injected=1, lost=17 - len(set(labels.keys)), doubled=len(labels.keys) - len(set(labels.keys)))


def test_a_run_whose_images_another_has_just_added_adds_nothing(images, store, extending, monkeypatch, caplog):
    """The other is done between this one's look at the store and its first file."""
    add_images(images, FIRST, 100)
    found = extend_store.extension_of

    def late(*arguments):
        piece = found(*arguments)
        monkeypatch.undo()
        label_images(images, store, extending)
        return piece

    monkeypatch.setattr("labeler.run.extension_of", late)
    assert label_images(images, store, extending).labeled_now == 0
    assert "another run was faster" in caplog.text
    assert len(LabelStore(store).parts) == 2
    assert len(LabelStore(store).keys) == 17
    assert not (store / "extending").exists()


def killed_at(work, delay: float) -> None:
    child = in_child(work)
    child.join(delay)
    child.kill()
    child.join()


@pytest.mark.fault(3)
@pytest.mark.timeout(900)
def test_an_extension_that_is_killed_at_any_moment_loses_and_doubles_nothing(tmp_path, images, store, extending):
    config = dataclasses.replace(extending, teacher=SLOW, batch_size=1)
    label_images(images, tmp_path / "slow", dataclasses.replace(config, extend=False))
    begun, before = tmp_path / "slow", identities(tmp_path / "slow")
    old = LabelStore(begun).keys
    add_images(images, (*FIRST, *SECOND), 100)
    shutil.copytree(begun, tmp_path / "undisturbed")
    start = time.monotonic()
    in_child_done = in_child(lambda: label_images(images, tmp_path / "undisturbed", config))
    wait_until(lambda: not in_child_done.is_alive())
    duration, expected = time.monotonic() - start, rows_by_key(tmp_path / "undisturbed")
    random, moments = np.random.default_rng(0), Counter()
    for run in range(counts(2, 10)):
        work = tmp_path / f"run {run}"
        shutil.copytree(begun, work)
        mine = identities(work)
        killed_at(lambda work=work: label_images(images, work, config), float(random.uniform(0, 1.1 * duration)))
        keys = LabelStore(work).keys
        assert len(keys) in (12, 19)
        moments[len(keys), (work / "extending").exists()] += 1
        assert len(set(keys)) == len(keys)
        assert mine.items() <= identities(work).items()
        label_images(images, work, config)
        assert rows_by_key(work) == expected
        assert mine.items() <= identities(work).items()
        assert verify_store(work, images).problems == ()
        assert {str(p.relative_to(work)) for p in work.rglob("*")} == {
            str(p.relative_to(tmp_path / "undisturbed")) for p in (tmp_path / "undisturbed").rglob("*")
        }
        found = LabelStore(work).keys
        tally(3, kills=1, lost=len(set(expected) - set(found)), doubled=len(found) - len(set(found)))
    print("rows and extension after each kill:", dict(moments))
    assert before == identities(begun)
    assert set(old) < set(expected)


@pytest.mark.parametrize("call", range(4))
def test_a_kill_around_the_rename_leaves_a_store_that_any_run_mends(images, store, extending, config, call):
    """Before the rename, right after it, before the view, and after the view."""
    add_images(images, FIRST, 100)

    def work() -> None:
        renames = [0]
        rename = os.rename

        def dying(source: str, target: str) -> None:
            after = str(target).endswith("part-00001")
            if after and call == 0:
                os.kill(os.getpid(), 9)
            rename(source, target)
            renames[0] += after or bool(renames[0])
            if renames[0] == call:
                os.kill(os.getpid(), 9)

        os.rename = dying
        label_images(images, store, extending)

    child = in_child(work)
    child.join(120)
    assert child.exitcode == -9
    assert len(LabelStore(store)) == (12 if call == 0 else 17)
    assert (verify_store(store).problems != ()) == (call in (1, 2))
    label_images(images, store, extending if call == 0 else config)
    assert verify_store(store, images).problems == ()
    assert len(LabelStore(store)) == 17


# Several stores


@pytest.fixture
def pair(tmp_path: Path, config: LabelerConfig) -> tuple[Path, Path, Path]:
    """All images in six folders, a store of half of them, with a part, and one of the other half."""
    images = make_images(tmp_path / "images", 24, CLASSES)
    names = sorted(path.relative_to(images) for path in images.rglob("*.jpg"))
    (tmp_path / "names.txt").write_text("".join(f"class{i}\n" for i in range(CLASSES)))
    config = dataclasses.replace(config, class_names=str(tmp_path / "names.txt"))
    for half in ("one", "two"):
        for name in names[half == "two" :: 2]:
            (tmp_path / half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / name, tmp_path / half / name)
    later = sorted((tmp_path / "one").rglob("*.jpg"))[::3]
    held = {path: path.read_bytes() for path in later}
    for path in later:
        path.unlink()
    label_images(tmp_path / "one", tmp_path / "a", config)
    for path, data in held.items():
        path.write_bytes(data)
    label_images(tmp_path / "one", tmp_path / "a", dataclasses.replace(config, extend=True))
    label_images(tmp_path / "two", tmp_path / "b", config)
    return images, tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("copy", [False, True])
def test_merged_stores_equal_one_that_was_labeled_in_one_go(pair, tmp_path, config, copy):
    images, a, b = pair
    before = identities(a), identities(b)
    merged = merge_stores([a, b], tmp_path / "merged", copy)
    config = dataclasses.replace(config, class_names=str(tmp_path / "names.txt"))
    label_images(images, tmp_path / "at once", config)
    assert rows_by_key(tmp_path / "merged") == rows_by_key([a, b]) == rows_by_key(tmp_path / "at once")
    assert (merged.parts, merged.rows, bool(merged.copied), bool(merged.linked)) == (3, 24, copy, not copy)
    assert (identities(a), identities(b)) == before
    assert verify_store(tmp_path / "merged", images).problems == ()
    assert LabelStore(tmp_path / "merged").fingerprint == LabelStore([a, b]).fingerprint
    with h5py.File(tmp_path / "merged" / "labels.h5") as view, h5py.File(a / "part-00001" / "labels.h5") as old:
        assert view["key"].shape == (24,)
        assert old["key"].shape == (4,)
    shards = {path.name: path.stat().st_ino for path in (tmp_path / "merged").glob("shard-*.h5")}
    assert all((a / name).stat().st_ino == inode for name, inode in shards.items()) == (not copy)
    # Labeled on, it is a store like any other; again, it is left as it is.
    assert label_images(images, tmp_path / "merged", config).labeled_now == 0
    again = merge_stores([a, b], tmp_path / "merged")
    assert (again.linked, again.copied) == (0, 0)
    assert not list(tmp_path.glob(".tmp-*"))


def fail_to_link(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Hard links of shards fail with an error of the operating system."""
    real = os.link

    def link(source: os.PathLike, target: os.PathLike) -> None:
        if Path(source).name.startswith("shard-"):
            raise OSError(number, os.strerror(number))
        real(source, target)

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP])
def test_a_merge_copies_where_the_file_system_has_no_links(pair, tmp_path, monkeypatch, number):
    images, a, b = pair
    fail_to_link(monkeypatch, number)
    merged = merge_stores([a, b], tmp_path / "merged")
    shards = list((tmp_path / "merged").rglob("shard-*.h5"))
    assert merged.copied >= len(shards) == merged.shards
    assert f"24 rows in {merged.shards} shards of 3 parts; {merged.linked} files linked, {merged.copied} copied" in (
        merged.text()
    )
    assert verify_store(tmp_path / "merged", images).problems == ()


def test_a_merge_that_cannot_write_says_so_and_leaves_nothing(pair, tmp_path, monkeypatch):
    _, a, b = pair
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot become a store: got a file"):
        merge_stores([a, b], tmp_path / "file")
    for number, error in ((errno.EROFS, InputError), (errno.ENOSPC, LabelingError)):
        with monkeypatch.context() as patch:
            fail_to_link(patch, number)
            with pytest.raises(error, match=os.strerror(number)):
                merge_stores([a, b], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_training_from_two_stores_equals_training_from_the_merged_one(pair, tmp_path):
    images, a, b = pair
    merge_stores([a, b], tmp_path / "merged")
    config = LoaderConfig(
        str(images), (str(a), str(b)), batch_size=4, image_size=32, grid=(4, 4), device="cpu", threads=1,
        auto_augment="rand-m9-mstd0.5-inc1", mix="token", backend="reference", progress=False,
    )  # fmt: skip
    two = create_loader(config)
    one = create_loader(dataclasses.replace(config, store=str(tmp_path / "merged"), cache="ram"))
    assert two.samples.fingerprint == one.samples.fingerprint
    for x, y in zip(two, one, strict=True):
        assert x.keys == y.keys
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.targets.token_scores, y.targets.token_scores)
        assert torch.equal(x.labels, y.labels)


def test_a_recipe_takes_a_list_of_stores(pair, tmp_path):
    from train import fit
    from train.recipes.overrides import apply_override
    from train.recipes.recipe import parse_config, refuse_absent_paths, to_toml

    images, a, b = pair
    stores = [str(a), str(b)]
    config = tiny_config(images, None, tmp_path / "run", **{
        "data.store": stores, "data.token_labels": True, "schedule.steps": 2,
    })  # fmt: skip
    assert config.data.store == tuple(stores)
    assert parse_config(tomllib.loads(to_toml(config)), "again") == config
    values: dict = {}
    apply_override(values, 'data.store=["a", "b"]')
    assert values["data"]["store"] == ["a", "b"]
    for name in ("labels", "2024", "true", "a[1]"):
        apply_override(values, f"data.store={name}")
        assert values["data"]["store"] == name
    fit(config)
    data = config.data.model_copy(update={"store": (str(a), str(tmp_path / "none"))})
    with pytest.raises(InputError, match="none' is not a label store"):
        refuse_absent_paths(config.model_copy(update={"data": data}))
    for wrong in ([], [1], 3):
        section = config.model_dump()["data"] | {"store": wrong}
        with pytest.raises(
            InputError, match=r"recipe: data\.store: got .*, expected text in quotes, or a list of texts"
        ):
            parse_config({**json.loads(json.dumps(config.model_dump())), "data": section}, "recipe")


def test_stores_that_do_not_belong_together_are_named(pair, tmp_path, config):
    _, a, b = pair
    with pytest.raises(MismatchError, match=r"12 images are both in .*class0/.*each image once"):
        LabelStore([b, b])
    with pytest.raises(MismatchError, match="are both in"):
        merge_stores([a, b, b], tmp_path / "merged")
    label_images(tmp_path / "two", tmp_path / "coarse", dataclasses.replace(config, palette=2))
    with pytest.raises(MismatchError, match="other settings: got palette 2, the store has"):
        LabelStore([a, tmp_path / "coarse"])
    with pytest.raises(MismatchError, match="palette"):
        merge_stores([a, tmp_path / "coarse"], tmp_path / "merged")
    with pytest.raises(InputError, match="no such folder"):
        merge_stores([a, tmp_path / "nowhere"], tmp_path / "merged")
    with pytest.raises(InputError, match="nothing to merge"):
        merge_stores([a], tmp_path / "merged")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"not empty: got thesis\.tex"):
        merge_stores([a, b], tmp_path / "used")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_folders_with_two_classes_are_named(tmp_path, config):
    for number, order in enumerate(("012345", "543210")):
        folder = tmp_path / f"images{number}"
        add_images(folder, (f"class1/{number}.jpg",), number)
        (tmp_path / "names.txt").write_text("".join(f"class{i}\n" for i in order))
        named = dataclasses.replace(config, class_names=str(tmp_path / "names.txt"))
        label_images(folder, tmp_path / f"labels{number}", named)
    with pytest.raises(MismatchError, match="class_names"):
        LabelStore([tmp_path / "labels0", tmp_path / "labels1"])


@pytest.mark.fault(3)
@pytest.mark.timeout(900)
def test_a_merge_that_is_killed_at_any_moment_is_whole_or_not_there(pair, tmp_path):
    images, a, b = pair
    expected, before = rows_by_key([a, b]), (identities(a), identities(b))
    start = time.monotonic()
    done = in_child(lambda: merge_stores([a, b], tmp_path / "undisturbed", copy=True))
    wait_until(lambda: not done.is_alive())
    duration, random, moments = time.monotonic() - start, np.random.default_rng(1), Counter()
    for run in range(counts(2, 10)):
        out, copy = tmp_path / f"run {run}", bool(run % 2)
        killed_at(lambda out=out, copy=copy: merge_stores([a, b], out, copy), float(random.uniform(0, duration)))
        moments[out.exists(), bool(list(tmp_path.glob(".tmp-*")))] += 1
        if out.exists():
            assert rows_by_key(out) == expected
            assert verify_store(out, images).problems == ()
        merge_stores([a, b], out, copy)
        assert rows_by_key(out) == expected
        assert verify_store(out, images).problems == ()
        assert not list(tmp_path.glob(".tmp-*"))
        assert (identities(a), identities(b)) == before
        found = LabelStore(out).keys
        tally(3, kills=1, lost=len(set(expected) - set(found)), doubled=len(found) - len(set(found)))
    print("whole, and begun, after each kill:", dict(moments))


# Stores that travel


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_grown_store_travels_and_grows_on_both_sides(images, store, config, extending, tmp_path, kind):
    place = {"folder": str(tmp_path / "there"), "memory": f"memory://{tmp_path.name}/labels"}[kind]
    push_store(store, place)
    pull_store(place, tmp_path / "back")
    for seed, names in ((100, FIRST), (200, SECOND)):
        add_images(images, names, seed)
        label_images(images, store, extending)
        pushed = push_store(store, place)
        assert pushed.skipped == len(LabelStore(store).parts) + 1 + (seed == 200)
    assert push_store(store, place).files == 0
    with LabelStore(place) as remote:
        assert (remote.keys, remote.fingerprint) == (LabelStore(store).keys, LabelStore(store).fingerprint)
        assert remote.read([0, 13, 18]).classes.tolist() == LabelStore(store).read([0, 13, 18]).classes.tolist()
        assert remote.keys[remote.row_of("class0/a0.jpg")] == "class0/a0.jpg"
    assert verify_store(place, images).problems == ()
    assert pull_store(place, tmp_path / "back").files == 3
    assert rows_by_key(tmp_path / "back") == rows_by_key(store)
    assert verify_store(tmp_path / "back", images).problems == ()
    assert not list((tmp_path / "back").glob("pulling*"))
    assert label_images(images, tmp_path / "back", config).labeled_now == 0


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_push_or_pull_of_a_part_that_stops_leaves_what_was_there(grown, images, tmp_path, monkeypatch, step):
    """At each file of the part in turn the service, or this machine, goes away."""
    place = tmp_path / "there"
    shutil.copytree(grown, tmp_path / "before")
    for name in ("part-00001", "part-00002"):
        shutil.rmtree(tmp_path / "before" / name)
    push_store(tmp_path / "before", place)
    sent: list[str] = []
    put, fetch = RemoteFolder.put, RemoteFolder.download

    def stopping(real):
        def call(self, name, *arguments, **options):
            if len(sent) == step:
                raise KeyboardInterrupt
            sent.append(name)
            return real(self, name, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "put", stopping(put))
        with pytest.raises(KeyboardInterrupt):
            push_store(grown, place)
    assert len(LabelStore(str(place))) == 12
    pull_store(place, tmp_path / "back")
    push_store(grown, place)
    assert len(LabelStore(str(place))) == 19
    sent.clear()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "download", stopping(fetch))
        with pytest.raises(KeyboardInterrupt) if step < 3 else nullcontext():
            pull_store(place, tmp_path / "back")
    assert len(LabelStore(tmp_path / "back")) == (12, 12, 17, 19)[step]
    pull_store(place, tmp_path / "back")
    assert rows_by_key(tmp_path / "back") == rows_by_key(grown)
    assert verify_store(tmp_path / "back", images).problems == ()


# Parts from elsewhere


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user, who has neither written nor checked a store."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_part_that_is_a_link_is_refused(grown, tmp_path):
    (grown / "part-00002").rename(tmp_path / "elsewhere")
    (grown / "part-00002").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="part-00002' is refused: got a link"):
        LabelStore(grown, trusted=True)
    assert "a link" in verify_store(grown, trusted=True).problems[0]


def test_a_part_with_other_settings_is_refused(grown, images, tmp_path, config):
    shutil.rmtree(grown / "part-00002")
    label_images(images, tmp_path / "coarse", dataclasses.replace(config, palette=2))
    shutil.copytree(tmp_path / "coarse", grown / "part-00002")
    with pytest.raises(MismatchError, match=r"part-00002.*palette 2"):
        LabelStore(grown)
    assert any("palette 2" in problem for problem in verify_store(grown).problems)


def test_a_part_with_images_of_another_is_found(grown):
    shutil.copytree(grown / "part-00001", grown / "part-00003")
    with pytest.raises(MismatchError, match=r"5 images are both in .*part-00001.*part-00003"):
        _ = LabelStore(grown).keys
    assert any("are both in" in problem for problem in verify_store(grown).problems)


def test_a_hostile_part_is_refused_and_every_part_is_checked(grown, tmp_path, stranger):
    assert LabelStore(grown).trusted is False
    assert len(list((tmp_path / "state" / "token-labeling" / "stores").iterdir())) == 3
    path = hostile.shards(grown / "part-00001")[0]
    with h5py.File(path, "r+", libver="v110") as file:
        hostile.external_link(file, tmp_path / "canary")
    hostile.repair(grown / "part-00001")
    with pytest.raises(IntegrityError, match=rf"part-00001/{path.name}"):
        LabelStore(grown)


def test_a_place_with_no_end_of_parts_is_refused(store, monkeypatch):
    monkeypatch.setattr("labeler.store.parts.open_part.MOST_PARTS", 20)
    plan = (store / "plan.json").read_bytes()
    monkeypatch.setattr("labeler.store.parts.open_part.read_record", lambda remote, name: plan)
    with pytest.raises(IntegrityError, match="more than 20 parts"):
        LabelStore(f"file://{store}")
    assert "more than 20 parts" in verify_store(f"file://{store}").problems[0]


def test_a_part_that_is_gone_is_said(grown):
    shutil.rmtree(grown / "part-00001")
    problems = verify_store(grown).problems
    assert "part-00002 is there, but not part-00001/plan.json" in problems
    assert len(LabelStore(grown)) == 12  # which verify alone can tell
