"""One idea of the images: a folder, a list, tar shards and parquet files of it give the same labels."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from containers import keys_of, write_list, write_parquet, write_tars
from remote_servers import flaky_server, needs_http
from tiny import encoded, make_images, picture

from labeler import InputError, LabelingError, LabelStore, label_images
from labeler.checks.verify import verify_store
from labeler.remote.failures import Patience
from labeler.sources.image_source import BadImage
from labeler.sources.open_source import holds_images, open_images, open_source
from labeler.store.check_store import check_store

COLUMNS = ("classes", "tail_classes", "tail_offsets", "region", "image_size", "target", "image_digest", "checksum")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_LABELING_CACHE", str(tmp_path / "cache"))


def containers(images: Path, folder: Path) -> dict[str, str]:
    write_list(images, "list.txt")
    write_list(images, "list.csv")
    return {
        "text list": str(images / "list.txt"),
        "table": str(images / "list.csv"),
        "tar shards": write_tars(images, folder / "tars"),
        "folder of tar shards": str(folder / "tars"),
        "parquet": str(write_parquet(images, folder / "parquet" / "train-00000-of-00001.parquet")),
        "parquet with a star": str(folder / "parquet" / "train-*.parquet"),
    }


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """Images in folders, some in folders of folders, one with a name that is awkward in a table."""
    root = make_images(tmp_path / "images", 13)
    (root / "class1/deep").mkdir()
    (root / "class1/deep/a, b.jpg").write_bytes(encoded(picture(77)))
    return root


def test_every_container_of_a_folder_gives_the_folders_labels(names, tmp_path, config):
    label_images(names, tmp_path / "labels", config)
    folder = LabelStore(tmp_path / "labels")
    for name, images in containers(names, tmp_path).items():
        store = tmp_path / f"labels of {name}"
        summary = label_images(images, store, config)
        assert summary.quarantined == 0
        other = LabelStore(store)
        assert other.keys == folder.keys, name
        for column in COLUMNS:
            np.testing.assert_array_equal(other.column(column), folder.column(column), err_msg=f"{name} {column}")
        assert verify_store(store, images, relabel=3, trusted=True).problems == (), name
        # Labels of one container belong to the others as well, and a second run has nothing to do.
        assert verify_store(store, names if "list" not in name else images).problems == (), name
        assert label_images(images, store, config).labeled_now == 0
    assert verify_store(tmp_path / "labels", tmp_path / "tars").problems == ()
    assert verify_store(tmp_path / "labels", tmp_path / "parquet").problems == ()


def test_another_image_in_a_parquet_file_is_found_though_sizes_are_not_known(names, tmp_path, config):
    file = write_parquet(names, tmp_path / "p" / "a.parquet")
    label_images(file, tmp_path / "labels", config)
    (names / "class1/deep/a, b.jpg").write_bytes(encoded(picture(78)))
    write_parquet(names, file)
    assert "its bytes have changed" in " ".join(verify_store(tmp_path / "labels", file).problems)
    (names / "class1/new.jpg").write_bytes(encoded(picture(79)))
    write_parquet(names, file)
    assert "1 new ('class1/new.jpg')" in " ".join(verify_store(tmp_path / "labels", file).problems)


@pytest.mark.parametrize("kind", ["csv", "json in tar", "parquet"])
def test_labels_of_a_source_are_true_classes_by_name_or_number(names, tmp_path, config, kind):
    """Names are matched with the teacher's; they are numbered in its order."""
    (tmp_path / "classes.txt").write_text("blue\ngreen\nred\nwhite\nblack\ngrey\n")
    config = replace(config, class_names=str(tmp_path / "classes.txt"))
    words = {key: ("red", "blue")[i % 2] for i, key in enumerate(sorted(keys_of(names)))}
    if kind == "csv":
        images = str(write_list(names, "list.csv", words))
    elif kind == "json in tar":
        images = write_tars(names, tmp_path / "tars", labels=words)
    else:  # numbers into the names that the file says
        numbers = {key: ["red", "grey", "blue"].index(word) for key, word in words.items()}
        images = str(write_parquet(names, tmp_path / "p.parquet", numbers, ["red", "green", "blue"]))
    label_images(images, tmp_path / "labels", config)
    store = LabelStore(tmp_path / "labels")
    expected = [{"red": 2, "blue": 0}[words[key]] for key in store.keys]
    assert store.column("target").tolist() == expected


def test_numbers_are_the_teachers_ids(names, tmp_path, config):
    numbers = {key: i % 3 for i, key in enumerate(sorted(keys_of(names)))}
    images = write_list(names, "list.tsv", {key: str(n) for key, n in numbers.items()})
    label_images(images, tmp_path / "labels", config)
    store = LabelStore(tmp_path / "labels")
    assert store.column("target").tolist() == [numbers[key] for key in store.keys]


def test_rows_without_a_path_are_numbered_and_rows_without_bytes_are_quarantined(names, tmp_path, config):
    write_parquet(names, tmp_path / "train.parquet", paths=False)
    source = open_source(tmp_path / "train.parquet")
    assert source.keys[:2] == ("train/00000000", "train/00000001")
    assert source.read(1) == (names / keys_of(names)[1]).read_bytes()
    values = [b"", None, encoded(picture(1)), b"no image"]
    pyarrow.parquet.write_table(pyarrow.table({"img": pyarrow.array(values, pyarrow.binary())}), tmp_path / "b.parquet")
    summary = label_images(tmp_path / "b.parquet", tmp_path / "labels", config)
    assert (summary.rows, summary.quarantined) == (1, 3)
    reasons = {one["key"]: one["reason"] for one in LabelStore(tmp_path / "labels").quarantine}
    assert reasons["b/00000000"] == reasons["b/00000001"] == "the row has no bytes"


def test_a_source_can_be_pickled_and_read_by_parts_from_another_folder(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tars(names, Path("tars"))
    write_parquet(names, Path("p.parquet"))
    for images in ("images", "tars", "p.parquet"):
        part = pickle.loads(pickle.dumps(open_source(images).part(range(3, 7))))
        monkeypatch.chdir("/")
        assert [part.read(i) for i in range(4)] == [(names / key).read_bytes() for key in part.keys]
        monkeypatch.chdir(tmp_path)


def test_images_can_be_opened_by_key_alone(names, tmp_path):
    write_tars(names, tmp_path / "tars")
    keys = ["class1/deep/a, b.jpg", "class0/away.jpg"]
    for images in (names, tmp_path / "tars"):
        source = open_images(images, keys)
        assert source.keys == tuple(sorted(keys))
        assert list(source.problems) == [0]
        assert source.read(1) == (names / keys[0]).read_bytes()
        with pytest.raises(BadImage):
            source.read(0)


def test_an_index_is_kept_and_belongs_to_its_file(tmp_path, monkeypatch):
    from labeler.sources import tar_source

    monkeypatch.setattr(tar_source, "KEEP_INDEX_FROM", 1)
    images = make_images(tmp_path / "images", 6)
    write_tars(images, tmp_path / "tars")
    first = open_source(tmp_path / "tars")
    monkeypatch.setattr(tar_source, "_read_index", lambda path, shown: pytest.fail("the index was kept"))
    again = open_source(tmp_path / "tars")
    assert again.keys == first.keys
    assert [again.read(i) for i in range(6)] == [first.read(i) for i in range(6)]
    for file in (tmp_path / "cache" / "index").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.undo()
    monkeypatch.setenv("TOKEN_LABELING_CACHE", str(tmp_path / "cache"))
    assert open_source(tmp_path / "tars").keys == first.keys
    (images / "class0/new.jpg").write_bytes(encoded(picture(5)))
    (tmp_path / "tars" / "part-000.tar").unlink()
    (tmp_path / "tars" / "part-001.tar").unlink()
    (tmp_path / "tars").rmdir()
    write_tars(images, tmp_path / "tars")
    assert "class0/new.jpg" in open_source(tmp_path / "tars").keys


def bad_sources(tmp_path: Path, images: Path) -> dict[str, tuple[str, str]]:
    """What is given -> (the images, what is said of it)."""
    parquet = write_parquet(images, tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes(parquet.read_bytes()[:-100])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "words.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"]}), tmp_path / "names.parquet")
    twice = pyarrow.array([{"bytes": b"x", "path": "a.jpg"}] * 2)
    pyarrow.parquet.write_table(pyarrow.table({"image": twice}), tmp_path / "twice.parquet")
    out = pyarrow.array([{"bytes": b"x", "path": "../a.jpg"}])
    pyarrow.parquet.write_table(pyarrow.table({"image": out}), tmp_path / "out.parquet")
    (images / "no_path.csv").write_text("image_id,label\n1,2\n")
    (images / "broken.csv").write_text('path,label\n"class0/img000.jpg,1\n')
    (images / "gone.csv").write_text("path\nclass0/gone.jpg\n")
    (images / "twice.csv").write_text("path\nclass0/img000.jpg\nclass0/img000.jpg\n")
    mixed = tmp_path / "mixed"
    write_tars(images, mixed)
    write_parquet(images, mixed / "a.parquet")
    return {
        "a truncated parquet": (str(tmp_path / "cut.parquet"), "cut.parquet' cannot be read"),
        "no column of images": (str(tmp_path / "words.parquet"), "no column of images: got the columns text, expected"),
        "images that are texts": (str(tmp_path / "names.parquet"), "has no images: got string"),
        "one key twice": (str(tmp_path / "twice.parquet"), "have the same name: got 'a.jpg'"),
        "a key that leaves the root": (str(tmp_path / "out.parquet"), "leaves the image root: got '../a.jpg'"),
        "a missing parquet": (str(tmp_path / "nowhere.parquet"), "nowhere.parquet' is not there: got 0 of 1 files"),
        "a missing tar": (str(tmp_path / "n-{0..1}.tar"), "n-0.tar' is not there: got 0 of 2 files. Check the name"),
        "a star for nothing": (str(tmp_path / "n-*.tar"), "stands for no files"),
        "an empty range": (str(tmp_path / "n-{3..1}.tar"), "got 3 to 1, expected a range such as {000..146}"),
        "a table without paths": (str(images / "no_path.csv"), "no column of paths: got the columns image_id, label"),
        "a broken table": (str(images / "broken.csv"), "broken.csv, line 3: got unexpected end of data"),
        "a file that is gone": (str(images / "gone.csv"), "gone.csv, line 2: got 'class0/gone.jpg', which is no file"),
        "a line twice": (str(images / "twice.csv"), "line 3: got 'class0/img000.jpg' again (see line 2)"),
        "two kinds of archives": (str(mixed), "both tar shards and parquet files: got 'part-000.tar' and 'a.parquet'"),
        "no such place": (str(tmp_path / "nowhere"), "is not a folder of images: got nothing there"),
        "a kind of URL": ("what://is/this", "what://is/this cannot be opened"),
    }


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, images):
    for name, (given, said) in bad_sources(tmp_path, images).items():
        with pytest.raises(InputError) as refused:
            open_source(given)
        told = str(refused.value)
        assert said.replace("'part-000.tar' and 'a.parquet'", "") in told.replace(
            "'a.parquet' and 'part-000.tar'", ""
        ).replace("'part-000.tar' and 'a.parquet'", ""), (name, told)
        assert "\n" not in told


def test_a_damaged_row_group_is_quarantined_and_no_other(names, tmp_path, config):
    file = write_parquet(names, tmp_path / "p.parquet", rows_per_group=5)
    meta = pyarrow.parquet.read_metadata(file)
    data, column = bytearray(file.read_bytes()), meta.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    summary = label_images(file, tmp_path / "labels", config)
    assert (summary.rows, summary.quarantined) == (9, 5)
    assert {one["reason"].partition(":")[0] for one in LabelStore(tmp_path / "labels").quarantine} == {
        "its row group 1 cannot be read"
    }


def test_without_pyarrow_the_remedy_is_said(names, tmp_path, monkeypatch):
    file = write_parquet(names, tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"no pyarrow\. pip install 'token-labeling\[parquet\]'"):
        open_source(file)


@needs_http
def test_every_container_behind_a_url_gives_the_folders_labels(names, tmp_path, config):
    label_images(names, tmp_path / "labels", config)
    folder = LabelStore(tmp_path / "labels")
    local = containers(names, tmp_path)
    with flaky_server(tmp_path) as server:
        for name, images in local.items():
            if "folder" in name or "*" in images:  # a web server does not list folders
                continue
            url = server.url + images.removeprefix(str(tmp_path))
            label_images(url, tmp_path / f"remote {name}", config)
            other = LabelStore(tmp_path / f"remote {name}")
            for column in COLUMNS:
                np.testing.assert_array_equal(other.column(column), folder.column(column), err_msg=f"{name} {column}")
            assert verify_store(other.path, url, relabel=2, trusted=True).problems == ()
        before = len(server.asked)
        source = open_source(f"{server.url}/parquet/train-00000-of-00001.parquet")
        assert source.read(0) == (names / source.keys[0]).read_bytes()
        assert sum(method == "GET" for method, *_ in server.asked[before:]) < 6


@pytest.mark.parametrize(("name", "many"), [("photos", True), ("a.tar", True), ("a.txt", True), ("a.JPG", False)])
def test_a_url_stands_for_many_images_unless_it_is_one(name, many):
    assert holds_images(f"s3://bucket/{name}") is many


@needs_http
def test_a_remote_tar_may_have_an_unusual_name(tmp_path):
    images = make_images(tmp_path / "images", 2)
    write_tars(images, tmp_path / "tars", shards=1)
    (tmp_path / "tars" / "part-000.tar").rename(tmp_path / "tars" / "my images, 1.tar")
    with flaky_server(tmp_path) as server:
        source = open_source(f"{server.url}/tars/my images, 1.tar")
        assert [source.read(i) for i in range(2)] == [(images / key).read_bytes() for key in source.keys]
        fetched = [path for method, path, _ in server.asked if method == "GET"]
        assert fetched == ["/tars/my images, 1.tar"]


@needs_http
def test_a_server_that_fails_for_a_while_costs_no_image_and_one_that_is_gone_stops_the_run(names, tmp_path, config):
    label_images(names, tmp_path / "labels", config)
    write_list(names, "list.txt")
    with flaky_server(tmp_path) as server:
        server.faults += [("class0", 503), ("class1", "drop"), ("class2", "hang up"), ("class0", "cut")]
        url = f"{server.url}/images/list.txt"
        assert label_images(url, tmp_path / "remote", config).quarantined == 0
        np.testing.assert_array_equal(
            LabelStore(tmp_path / "remote").column("checksum"), LabelStore(tmp_path / "labels").column("checksum")
        )
        (names / "class0/img000.jpg").unlink()
        summary = label_images(url, tmp_path / "less", config)
        assert (summary.rows, summary.quarantined) == (13, 1)
        assert LabelStore(tmp_path / "less").quarantine[0]["reason"] == "there is no such file behind the URL"
        source = open_source(url)
        source.storage.remote.patience = Patience(tries=2, first=0.01)
        server.faults += [("class1", 500)] * 2
        with pytest.raises(LabelingError, match=r"answer 500 in each of 2 tries.* No image was quarantined for it"):
            source.read(source.position("class1/img001.jpg"))


def test_urls_of_every_file_system_that_fsspec_knows_will_do(names, tmp_path, config):
    """Here its own file:// and memory://, with their folders listed."""
    import fsspec

    label_images(names, tmp_path / "labels", config)
    memory = fsspec.filesystem("memory")
    for key in keys_of(names):
        memory.pipe_file(f"/set/{key}", (names / key).read_bytes())
    for i, url in enumerate((f"file://{names}", "memory://set")):
        label_images(url, tmp_path / f"remote {i}", config)
        np.testing.assert_array_equal(
            LabelStore(tmp_path / f"remote {i}").column("checksum"), LabelStore(tmp_path / "labels").column("checksum")
        )
        assert check_store(tmp_path / f"remote {i}").problems == ()
    memory.rm("/set", recursive=True)
