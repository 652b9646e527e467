"""`LabelStore` of a URL: plan and markers at once, shards on first use, nothing taken on trust."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from remote_servers import flaky_server, needs_http, needs_s3, s3_service
from test_labeler_share import reseal
from tiny import make_images
from tiny_runs import outcome, tiny_config

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, MismatchError, label_images
from labeler.__main__ import main
from labeler.base.errors import RemoteError
from labeler.remote import remote_files
from labeler.remote.failures import Patience
from labeler.share.push_store import push_store
from pipeline import LoaderConfig, create_loader
from pipeline.__main__ import main as pipeline_main
from train import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve images, and their labels in six shards."""
    folder = tmp_path_factory.mktemp("remote")
    work = {"shard_size": 2, "batch_size": 3, "decoder": "pil", "threads": 1, "progress": False}
    label_images(make_images(folder / "images", 12), folder / "labels", LabelerConfig(TINY, **work))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> Path:
    """A cache and a memory of checked stores of the test's own, and short waits between tries."""
    monkeypatch.setattr(remote_files, "Patience", lambda: Patience(tries=4, seconds=20, first=0.01, longest=0.05))
    monkeypatch.setenv("TOKEN_LABELING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "cache"


@pytest.fixture(params=["file", "memory", pytest.param("http", marks=needs_http), pytest.param("s3", marks=needs_s3)])
def url(request, data, tmp_path, monkeypatch) -> str:
    """The store behind a URL."""
    if request.param == "http":
        with flaky_server(data) as server:
            yield f"{server.url}/labels"
    elif request.param == "s3":
        with s3_service(monkeypatch) as bucket:
            push_store(data / "labels", f"{bucket}/labels")
            yield f"{bucket}/labels"
    else:
        place = f"{request.param}://{tmp_path if request.param == 'file' else tmp_path.name}/there"
        push_store(data / "labels", place)
        yield place


def shards_here(cache: Path) -> list[int]:
    return sorted(int(path.name[6:11]) for path in cache.rglob("shard-*.h5"))


def same(left: LabelStore, right: LabelStore, rows: list[int]) -> bool:
    a, b = left.read(rows), right.read(rows)
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("classes", "scores", "background", "region")
    )


def test_it_reads_what_the_folder_reads_and_fetches_shards_on_first_use(url, data, own_cache):
    own = LabelStore(data / "labels")
    with LabelStore(url) as store:
        assert (len(store), store.meta, store.fingerprint) == (12, own.meta, own.fingerprint)
        assert url in repr(store)
        assert shards_here(own_cache) == []
        assert same(store, own, [5, 0, 4])
        assert shards_here(own_cache) == [0, 2]
        assert store.row_of(own.keys[11]) == 11
        assert shards_here(own_cache) == [0, 2, 5]
        assert store.keys == own.keys
        assert np.array_equal(store.column("image_digest"), own.column("image_digest"))
        assert same(store, own, list(range(12)))
        with pytest.raises(KeyError, match=f"'nothing' is not in the store '{url}'"):
            store.row_of("nothing")


def test_a_pickled_one_reads_the_same_and_notices_another_store(data, tmp_path):
    there = tmp_path / "there"
    push_store(data / "labels", there)
    store = LabelStore(f"file://{there}")
    kept = pickle.dumps(store)
    assert same(pickle.loads(kept), store, [3, 9])
    shutil.rmtree(there)
    shutil.copytree(data / "labels", there)
    work = {"shard_size": 3, "batch_size": 3, "decoder": "pil", "threads": 1, "progress": False}
    shutil.rmtree(there)
    label_images(data / "images", there, LabelerConfig(TINY, **work))
    with pytest.raises(MismatchError, match="has changed since it was opened"):
        pickle.loads(kept)


@needs_http
def test_what_is_in_the_cache_is_not_fetched_again(data):
    with flaky_server(data / "labels") as server:
        with LabelStore(server.url) as store:
            assert len(store.keys) == 12
        fetched = [path for method, path, _ in server.asked if method == "GET" and path.endswith(".h5")]
        assert len(fetched) == 6
        server.asked.clear()
        with LabelStore(server.url) as store:
            assert len(store.keys) == 12
        assert not [path for _, path, _ in server.asked if path.endswith(".h5")]


@needs_http
def test_a_bad_server_is_tried_again_and_one_that_lies_is_refused_by_name(data):
    with flaky_server(data / "labels") as server:
        server.faults = [("00002", 503), (".json", "drop"), (".h5", "drop"), (".h5", "flip"), ("plan", "hang up")]
        assert same(LabelStore(server.url), LabelStore(data / "labels"), list(range(12)))
        assert not server.faults
    with flaky_server(data / "labels") as server:
        name = next((data / "labels").glob("shard-00003*.h5")).name
        server.faults = [(name, "flip")] * 99
        with pytest.raises(IntegrityError, match=f"{server.url}/{name} is damaged"):
            LabelStore(server.url, trusted=True).read([6])
        server.faults = [("shard-00003-of-00006.json", "flip")]
        with pytest.raises(IntegrityError, match=f"'{server.url}/shard-00003-of-00006.json' is damaged"):
            LabelStore(server.url)
        server.faults = [("shard-00003", 503)] * 99
        with pytest.raises(RemoteError, match="answer 503 in each of 4 tries"):
            LabelStore(server.url)


def test_a_copy_that_is_damaged_in_the_cache_is_fetched_again(data, tmp_path, own_cache):
    push_store(data / "labels", tmp_path / "there")
    with LabelStore(f"file://{tmp_path}/there") as store:
        store.read([2])
    copy = next(own_cache.rglob("shard-*.h5"))
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert same(LabelStore(f"file://{tmp_path}/there"), LabelStore(data / "labels"), [2])


def test_a_store_that_is_only_partly_there_is_told(data, tmp_path):
    there = tmp_path / "there"
    push_store(data / "labels", there)
    (there / "shard-00002-of-00006.json").unlink()
    with pytest.raises(IntegrityError, match=r"there' is not complete: got 5 of 6 shards, without shard 2\. F"):
        LabelStore(f"file://{there}")
    with pytest.raises(InputError, match=r"nothing' is not a label store: got no plan\.json in it"):
        LabelStore(f"file://{tmp_path}/nothing")
    push_store(data / "labels", there)
    next(there.glob("shard-00002*.h5")).unlink()
    with pytest.raises(IntegrityError, match=r"shard-00002-of-00006\.\w+\.h5 is damaged: got no such file"):
        LabelStore(f"file://{there}").read([4])


def test_a_crafted_shard_is_refused_in_a_child_process_when_it_is_first_used(data, tmp_path):
    there = tmp_path / "there"
    push_store(data / "labels", there)
    old, other = next(there.glob("shard-00002*.h5")), next(there.glob("shard-00003*.h5")).read_bytes()
    digest = hashlib.sha256(other).hexdigest()
    name = f"shard-00002-of-00006.{digest[:12]}.h5"
    (there / name).write_bytes(other)
    old.unlink()
    reseal(there / "shard-00002-of-00006.json", file=name, sha256=digest, size=len(other))
    store = LabelStore(f"file://{there}")
    assert len(store.read([0, 11]).classes) == 2
    for _ in range(2):
        with pytest.raises(IntegrityError, match="is refused: got attributes differ from the plan: shard"):
            store.read([4])
    with pytest.raises(IntegrityError, match="is refused"):
        LabelStore(f"file://{there}").keys  # noqa: B018


def test_keys_that_cross_those_of_a_neighbour_are_refused(data, tmp_path):
    there = tmp_path / "there"
    push_store(data / "labels", there)
    reseal(there / "shard-00003-of-00006.json", first_key="a")
    with pytest.raises(IntegrityError, match="keys that are not below those of later shards"):
        LabelStore(f"file://{there}").read([4])


def test_a_checked_shard_is_not_checked_again(data, tmp_path, monkeypatch):
    push_store(data / "labels", tmp_path / "there")
    children = []
    run = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: children.append(given) or run(*given, **named))
    for _ in range(2):
        with LabelStore(f"file://{tmp_path}/there") as store:
            store.read([0, 1])
    assert len(children) == 1
    with LabelStore(f"file://{tmp_path}/there") as store:
        assert len(store.keys) == 12
    assert len(children) == 2
    with LabelStore(f"file://{tmp_path}/there") as store:
        store.read([7])
    assert len(children) == 2


def test_a_cache_that_is_too_small_is_told_before_anything_is_fetched(data, tmp_path, monkeypatch, own_cache):
    push_store(data / "labels", tmp_path / "there")
    monkeypatch.setenv("TOKEN_LABELING_CACHE_BYTES", "30K")
    store = LabelStore(f"file://{tmp_path}/there")
    with pytest.raises(InputError, match=r"is too small: got .* TOKEN_LABELING_CACHE_BYTES=200G"):
        store.keys  # noqa: B018
    assert shards_here(own_cache) == []


def test_shards_in_use_stay_in_the_cache(data, tmp_path, monkeypatch, own_cache):
    push_store(data / "labels", tmp_path / "there")
    store = LabelStore(f"file://{tmp_path}/there", trusted=True)
    assert len(store.keys) == 12
    held = sum(path.stat().st_size for path in own_cache.rglob("*") if path.is_file())
    monkeypatch.setenv("TOKEN_LABELING_CACHE_BYTES", str(held + 10))
    other = LabelStore(f"file://{data}/labels", trusted=True)
    with pytest.raises(InputError, match="that are in use"):
        other.keys  # noqa: B018
    store.close()
    assert len(other.keys) == 12


def test_verify_takes_a_url(data, tmp_path, capsys):
    push_store(data / "labels", tmp_path / "there")
    url = f"file://{tmp_path}/there"
    assert main(["verify", url, "--images", str(data / "images"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("6 shards, 12 rows, ")


def test_verify_names_a_shard_and_a_view_that_are_damaged_there(data, tmp_path, capsys):
    there = tmp_path / "there"
    push_store(data / "labels", there)
    (there / "quarantine.jsonl").write_text("one\ntwo\n")
    assert main(["verify", f"file://{there}", "--quiet"]) == 4
    assert "quarantine.jsonl has 2 lines for 0 images" in capsys.readouterr().err
    shutil.copy(data / "labels/quarantine.jsonl", there)
    shard = next(there.glob("shard-00001*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["verify", f"file://{there}", "--quiet", "--trusted"]) == 0  # the cache has the right one
    shutil.rmtree(tmp_path / "cache")
    assert main(["verify", f"file://{there}", "--quiet"]) == 4
    assert f"bad: file://{there}/{shard.name} is damaged" in capsys.readouterr().err


def test_report_and_view_take_a_url(data, tmp_path):
    push_store(data / "labels", tmp_path / "there")
    url, images = f"file://{tmp_path}/there", str(data / "images")
    assert main(["report", url, "--images", images, "--out", str(tmp_path / "report.html"), "--quiet"]) == 0
    assert "Label store there" in (tmp_path / "report.html").read_text()
    out, small = (
        str(tmp_path / "view.png"),
        ["--image-size", "32", "--patch", "8", "--count", "4", "--backend", "pil"],
    )
    assert pipeline_main(["view", images, "--store", url, "--out", out, *small]) == 0
    assert Path(out).exists()


def test_a_loader_gives_the_same_batches(url, data):
    def batches(store: str) -> list[np.ndarray]:
        settings = {
            "batch_size": 4,
            "image_size": 32,
            "grid": (2, 2),
            "backend": "pil",
            "seed": 3,
            "progress": False,
        }
        loader = create_loader(LoaderConfig(images=str(data / "images"), store=store, **settings))
        return [batch.targets.token_scores.numpy() for batch in loader]

    own = batches(str(data / "labels"))
    assert len(own) == 3
    assert all(map(np.array_equal, batches(url), own))


def test_training_takes_a_url(data, tmp_path):
    push_store(data / "labels", tmp_path / "there")
    for name, store in (("own", data / "labels"), ("far", f"file://{tmp_path}/there")):
        fit(tiny_config(data / "images", store, tmp_path / name))
    assert outcome(tmp_path / "far") == outcome(tmp_path / "own")


@pytest.mark.parametrize(
    "command", [["label", "IMAGES", "--teacher", "x", "--store", "s3://b/l"], ["pull", "s3://b", "s3://c"]]
)
def test_what_is_written_here_is_no_url(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "expected a folder of this machine (push sends a store to a URL)" in capsys.readouterr().err


def test_the_package_is_imported_without_fsspec():
    heavy = ("fsspec", "aiohttp", "torch", "ray")
    code = f"import sys, labeler; labeler.LabelStore; print([one for one in {heavy} if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
