"""A store's open files: few however many shards it has, closed when asked to, and never under a thread that reads."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from tiny import make_images

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, label_images
from labeler.base.open_files import OpenFiles

SHARDS = 200
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell open files")

FEW_FILES = """
import os, resource, sys
import numpy as np
from labeler import LabelStore

used = {int(number) for number in os.listdir("/proc/self/fd")}
limit = [number for number in range(4096) if number not in used][20]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
store = LabelStore(sys.argv[1], trusted=True)
rows = np.random.default_rng(0).integers(0, len(store), 600)
print(len(store.keys), store.read(rows).scores.sum(dtype=np.float64))
held = []


def take_all():
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return


take_all()
print(store.read(rows[:4]).scores.shape)  # with the store's own files alone
store.close()
store = LabelStore(sys.argv[1], trusted=True)
take_all()
try:
    store.read([0])
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 200 shards of one image each."""
    folder = tmp_path_factory.mktemp("many")
    images = make_images(folder / "images", SHARDS)
    work = {"shard_size": 1, "batch_size": 1, "decoder": "pil", "threads": 1, "progress": False}
    label_images(images, folder / "labels", LabelerConfig(TINY, **work))
    return folder / "labels"


def open_files(store: Path) -> int:
    """Files of a store that this process has open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith(str(store))
        except OSError:  # the listing's own
            continue
    return count


@linux
def test_many_shards_are_read_where_few_files_may_be_open(many):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(many)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    rows = np.random.default_rng(0).integers(0, SHARDS, 600)
    expected = LabelStore(many).read(rows).scores.sum(dtype=np.float64)
    assert first.split() == [str(SHARDS), str(expected)]
    assert second.startswith("(4, ")
    assert third.startswith("InputError: no more files can be opened in")
    assert "ulimit -n" in third


@linux
def test_files_are_kept_up_to_the_bound_and_no_further(many):
    store = LabelStore(many)
    store._files = OpenFiles(16)
    for row in range(SHARDS):
        store.read([row])
    assert open_files(many) == 16
    store.read([SHARDS - 1, SHARDS - 16])  # among those used last
    assert open_files(many) == 16
    store.close()
    assert open_files(many) == 0


@linux
@pytest.mark.parametrize("cache", [None, "ram", "ram-compressed"])
def test_a_closed_store_holds_no_file_and_says_so_when_read(store, cache):
    with LabelStore(store, cache) as labels:
        assert len(labels.read([0, 7, 11])) == 3
        assert open_files(store) == (0 if cache == "ram-compressed" else 3)
        assert labels.row_of(labels.keys[7]) == 7
    assert open_files(store) == 0
    reads = [
        lambda: labels.read([0]), lambda: labels.read_codes([0], trim=True), lambda: labels.read_shard(0),
        lambda: labels.column("target"), lambda: labels.row_of("class0/img000.jpg"), lambda: labels.keys,
        lambda: labels.row_bytes([0]),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(InputError, match=r"is closed: got a read after close\(\).*open the store again"):
            read()
    labels.close()  # a second time
    assert labels.meta.num_classes == 6
    assert len(LabelStore(store).read([0])) == 1


def test_an_error_inside_the_block_is_not_hidden(store):
    with pytest.raises(IndexError), LabelStore(store) as labels:
        labels.read([99])
    assert labels.closed


def test_threads_that_close_each_others_files_read_what_one_thread_reads(many):
    """Two files for eight threads: nearly every read finds its file closed by another one."""
    expected = LabelStore(many).read_codes(range(SHARDS))
    store = LabelStore(many)
    store._files = OpenFiles(2)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, SHARDS, 150)
        found = store.read_codes(rows)
        return bool((found.scores == expected.scores[rows]).all() and (found.classes == expected.classes[rows]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(store._files) <= 2


def test_what_is_being_read_while_the_store_closes_is_right_or_refused(many):
    expected = LabelStore(many).read_codes(range(SHARDS)).scores
    for _ in range(5):
        store, begun = LabelStore(many), threading.Event()

        def read(store: LabelStore = store, begun: threading.Event = begun) -> int:
            for row in range(SHARDS):
                if row == 20:
                    begun.set()
                try:
                    assert (store.read_codes([row]).scores[0] == expected[row]).all()
                except InputError:
                    return row
            return SHARDS

        with ThreadPoolExecutor(2) as pool:
            reading = [pool.submit(read) for _ in range(2)]
            begun.wait(10)
            store.close()
            rows = [found.result() for found in reading]
        assert max(rows) >= 20


def test_a_fork_and_a_copy_read_on(many):
    store, (here, there) = LabelStore(many), multiprocessing.Pipe(duplex=False)
    expected = store.read(range(40)).scores

    def child() -> None:  # as DataLoader's workers begin
        there.send(store.read(range(40)).scores)
        store.close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    np.testing.assert_array_equal(here.recv(), expected)
    process.join()
    np.testing.assert_array_equal(store.read(range(40)).scores, expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read(range(40)).scores, expected)


def test_a_file_that_went_away_between_two_reads_is_named(store):
    labels = LabelStore(store)
    labels._files = OpenFiles(1)
    labels.read([0, 11])
    (store / labels.markers[0].file).unlink()
    with pytest.raises(IntegrityError, match="the file no longer exists"):
        labels.read([0])
