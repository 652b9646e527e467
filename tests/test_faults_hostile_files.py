"""Files from elsewhere: refused by name, without running code, touching another file, dying, or taking memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import hostile
import numpy as np
import pytest
import torch
from faults import counts, tally
from tiny import CLASSES

import labeler.store.foreign_store as foreign
from labeler import InputError, IntegrityError, LabelStore, TokenLabelError, label_images
from labeler.__main__ import main
from labeler.base.errors import ModelError
from labeler.base.plain_tensors import load_plain
from labeler.base.whole_files import sealed
from labeler.checks.verify import verify_store
from labeler.published_maps import read_map
from labeler.sources.image_source import BadImage
from labeler.store.hdf5.read_shard import ShardReader
from labeler.teacher.weights import read_checkpoint
from model.checkpoints import load_reference_checkpoint
from scripts.fuzz.hdf5_structures import hdf5_structures, lookup3
from scripts.fuzz.store_target import StoreTarget
from train.network import restore_network
from train.record.checkpoint import check_checkpoint, read_state, read_weights

ROOT = Path(__file__).parents[1]


def start_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user, who has neither written nor checked a store."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_anew(tmp_path / "state", monkeypatch)


@pytest.fixture
def half_store(images: Path, tmp_path: Path, config) -> Path:
    label_images(images, tmp_path / "half", dataclasses.replace(config, precision="float16"))
    return tmp_path / "half"


# Row 21


@pytest.mark.fault(21)
@pytest.mark.parametrize("change", hostile.HOSTILE_SHARDS, ids=lambda change: change.__name__)
def test_a_crafted_shard_is_refused_and_no_other_file_is_touched(store, tmp_path, change, stranger, monkeypatch):
    """In the child, and by the reader itself, which must not rely on it."""
    canary = tmp_path / "canary"
    shutil.copyfile(hostile.shards(store)[1], canary)
    path, plan = hostile.shards(store)[0], LabelStore(store, trusted=True).plan
    before = (canary.read_bytes(), canary.stat().st_mtime_ns)
    with h5py.File(path, "r+", libver="v110") as file:
        change(file, canary)
    hostile.repair(store)
    with hostile.watched(canary) as touched:
        with pytest.raises(IntegrityError, match=path.name):
            LabelStore(store)
        if change is not hostile.unknown_attribute:  # which only a check against the plan can tell
            with pytest.raises(IntegrityError, match=path.name):
                ShardReader(path, plan.layout, 4).read(np.arange(4))
        assert touched() == 0
    assert (canary.read_bytes(), canary.stat().st_mtime_ns) == before
    assert not (tmp_path / "state").exists()  # and it is not remembered as good
    tally(21, injected=1)


def test_the_watch_on_the_canary_sees_a_reader(tmp_path):
    (tmp_path / "canary").write_bytes(b"x")
    with hostile.watched(tmp_path / "canary") as touched:
        assert touched() == 0
        (tmp_path / "canary").read_bytes()
        assert touched() > 0


@pytest.mark.fault(21)
@pytest.mark.parametrize("key", [b"../../../etc/hostname", b"/etc/hostname", b"class0/./x.jpg", b"a//b"])
def test_a_key_that_leaves_the_image_root_is_refused(store, stranger, key):
    path = hostile.shards(store)[0]
    reader = LabelStore(store, trusted=True).reader(0)
    rows = reader.read(np.arange(4))
    with h5py.File(path, "r+", libver="v110") as file:
        width = file["key"].dtype.itemsize
        assert len(key) <= width + 8
        keys = (key[:width].decode(), *rows.keys[1:])
        file["key"][0] = keys[0].encode()
        file["checksum"][:] = dataclasses.replace(rows, keys=keys).checksums()
    hostile.repair(store)
    with pytest.raises(IntegrityError, match=r"a key that leaves the image root|not sorted"):
        LabelStore(store)
    tally(21, injected=1)


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["plan.json", "marker", "shard"])
def test_a_pipe_in_place_of_a_file_does_not_block(store, stranger, name):
    path = {"plan.json": store / name, "marker": next(store.glob("shard-*.json")), "shard": hostile.shards(store)[0]}
    path[name].unlink()
    os.mkfifo(path[name])
    if name == "shard":
        began = time.monotonic()
        assert foreign.refuse_hostile(store) is False  # not whole: the child did not open it
        assert time.monotonic() - began < 30
    else:
        with pytest.raises(IntegrityError, match="not a regular file"):
            LabelStore(store)
    tally(21, injected=1)


PLANS = {
    "shards": {"meta.shards": 10**12},
    "palette": {"meta.palette": 10**9},
    "grid": {"meta.grid": [10**6, 10**6]},
    "no grid": {"meta.grid": [4]},
    "classes": {"meta.num_classes": -1},
    "names": {"meta.class_names": [{}]},
    "true": {"meta.palette": True},
    "kind": {"meta.score_kind": "x"},
    "codes": {"code_values": [0.0]},
    "codes that are no numbers": {"code_values": [float("nan")] * 256},
    "folders": {"class_folders": {"a": 10**6}},
    "settings": {"settings": []},
    "meta": {"meta": []},
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_allocated(store, name):
    def change(plan):
        for place, value in PLANS[name].items():
            *path, last = place.split(".")
            (plan[path[0]] if path else plan)[last] = value

    hostile.edit_plan(store, change)
    with pytest.raises(TokenLabelError, match=r"plan\.json|cannot be read by this version"):
        LabelStore(store, trusted=True)
    tally(21, injected=1)


MARKERS = {
    "rows": -4, "size": "x", "file": 3, "quarantine": [{"key": 1}], "stats": {"kl": "x"}, "first_key": None,
}  # fmt: skip


@pytest.mark.fault(21)
@pytest.mark.parametrize("entry", MARKERS)
def test_a_marker_of_other_types_is_refused(store, entry):
    hostile.repair(store, **{entry: MARKERS[entry]})
    with pytest.raises(IntegrityError, match="no marker has"):
        LabelStore(store, trusted=True)
    tally(21, injected=1)


@pytest.mark.fault(21)
@pytest.mark.parametrize("rows", [10**6, 10**30])
def test_a_marker_of_more_rows_than_its_shard_can_have_is_refused(store, rows):
    hostile.repair(store, rows=rows, sha256="x")  # a shard that is damaged besides is not opened to count them
    with pytest.raises(IntegrityError, match=r"no marker has|is impossible: got 1,000,000 rows, expected at most 4"):
        LabelStore(store, trusted=True)
    tally(21, injected=1)


# Trust


def test_a_store_is_checked_once_and_what_one_wrote_oneself_never(store, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(foreign, "run_child", lambda *a, run=foreign.run_child: runs.append(a) or run(*a))
    assert LabelStore(store).trusted
    assert runs == []
    start_anew(tmp_path / "state", monkeypatch)
    for path in (store, store, Path(shutil.copytree(store, tmp_path / "copy"))):
        labels = LabelStore(path)
        assert (len(labels.read(range(12))), labels.trusted) == (12, False)
    assert len(runs) == 1
    hostile.repair(store, stats={"kl": 1.0})
    LabelStore(store)
    assert len(runs) == 2
    LabelStore(store, trusted=True)
    assert pickle.loads(pickle.dumps(labels)).keys == labels.keys
    assert len(runs) == 2


def test_a_user_without_a_state_folder_checks_every_time(store, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    for _ in range(2):
        assert not LabelStore(store).trusted


def test_shards_of_another_in_a_run_of_ones_own_are_not_trusted(store, images, config, tmp_path, monkeypatch):
    start_anew(tmp_path / "state", monkeypatch)
    marker = sorted(store.glob("shard-*.json"))[1]
    marker.unlink()
    label_images(images, store, config)
    assert not LabelStore(store).trusted


def test_a_store_from_elsewhere_does_not_choose_the_code_of_its_teacher(store, images, stranger, capsys):
    command = ["verify", str(store), "--images", str(images), "--relabel", "2", "--device", "cpu", "--quiet"]
    assert main(command) == 2
    assert "got 'tiny:colour_teacher'. Give --trusted" in capsys.readouterr().err
    assert main([*command, "--trusted"]) == 0
    assert main(command[:4]) == 0


def test_verify_names_a_hostile_shard_and_opens_no_hostile_view(store, tmp_path, stranger):
    (store / "labels.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (problem,) = verify_store(store).problems
    assert "labels.h5' is refused" in problem
    with h5py.File(hostile.shards(store)[2], "r+") as file:
        hostile.extra_object(file, tmp_path)
    hostile.repair(store)
    (problem,) = verify_store(store).problems
    assert f"{hostile.shards(store)[2].name}' is refused: got data sets" in problem


# Row 22


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another child, which names a file and then goes wrong."""
    script = f"import ctypes, os, sys, time\nprint('shard-00001-of-00003.x.h5', flush=True)\n{code}"
    monkeypatch.setattr(foreign, "COMMAND", (sys.executable, "-c", script))


ENDS = {
    "ctypes.string_at(0)": "a crash of the process that checked it (SIGSEGV)",
    "os.abort()": "a crash of the process that checked it (SIGABRT)",
    "os._exit(7)": "exit status 7",
    "time.sleep(60)": "the check did not end within 9 s of processor time or 1 s in all",
    "print('\\x1b[2J\\x00'); sys.exit(1)": "?[2J?",
}


@pytest.mark.fault(22)
@pytest.mark.parametrize("code", ENDS)
def test_a_child_that_crashes_or_hangs_is_a_refusal_that_names_the_file(store, stranger, monkeypatch, code):
    child(monkeypatch, code)
    monkeypatch.setattr(
        foreign.Limits, "of", classmethod(lambda cls, size: cls(1 << 30, 9, 1 if "sleep" in code else 30))
    )
    began = time.monotonic()
    with pytest.raises(IntegrityError) as refusal:
        LabelStore(store)
    assert time.monotonic() - began < 20
    assert "shard-00001-of-00003.x.h5' is refused" in str(refusal.value)
    assert ENDS[code] in str(refusal.value)
    assert not list(Path(os.environ["XDG_STATE_HOME"]).rglob("*"))
    tally(22, injected=1)


@pytest.mark.fault(22)
def test_the_childs_processor_time_is_limited(store, stranger):
    """Too little for any store: a shard that asks for more than an honest one meets the same end."""
    with pytest.raises(IntegrityError, match=r"the check did not end"):
        foreign.run_child(store, foreign.Limits(2 << 30, 0, 60))
    tally(22, injected=1)


@pytest.mark.fault(22)
def test_small_data_that_inflate_without_bound_end_the_check_not_the_caller(store, stranger, monkeypatch):
    """A chunk of 200 kB that HDF5's gzip makes 200 MB of, of which four numbers are wanted."""
    import zlib

    with h5py.File(hostile.shards(store)[0], "r+", libver="v110") as file:
        packed = zlib.compress(bytes(200_000_000), 1)
        file["target"].id.write_direct_chunk((0,), packed + struct.pack("<I", 0))
    hostile.repair(store)
    monkeypatch.setattr(foreign.Limits, "of", classmethod(lambda cls, size: cls(100 << 20, 60, 120)))
    with pytest.raises(IntegrityError, match=hostile.shards(store)[0].name):
        LabelStore(store)
    tally(22, injected=1)


# What fuzzing found: bytes of a B-tree's header on which libhdf5 2.0 ends its process, its checksum repaired.
CRASHES = {
    "SIGSEGV": (0, {5: 10}),
    "SIGFPE": (-1, {9: 1, 10: 0, 14: 0, 15: 0, 16: 0}),
}


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", CRASHES)
def test_a_shard_on_which_libhdf5_crashes_is_refused(tmp_path, stranger, name):
    """In a store of format 1.0: the shards of 2.0 have no B-trees."""
    store = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "fixtures" / "store_1_0" / "labels", store)
    path = hostile.shards(store)[0]
    data = bytearray(path.read_bytes())
    which, changes = CRASHES[name]
    starts = [start for start, end in hdf5_structures(bytes(data)) if data[start : start + 4] == b"BTHD"]
    start = sorted(starts)[which]
    for place, value in changes.items():
        data[start + place] = value
    data[start + 34 : start + 38] = lookup3(bytes(data[start : start + 34])).to_bytes(4, "little")
    path.write_bytes(data)
    hostile.repair(store)
    with pytest.raises(IntegrityError, match=path.name):
        LabelStore(store)
    tally(22, injected=1)


@pytest.mark.fault(22)
def test_the_caller_survives_fuzzed_shards(store, stranger):
    target = StoreTarget(store, np.random.default_rng(0))
    for _ in range(counts(4, 300)):
        target.run_one()  # raises what is not the project's own
    tally(22, injected=counts(4, 300))


# Row 23


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return hostile.training_checkpoint(tmp_path_factory.mktemp("run"))


def with_state(checkpoint: Path, copy: Path, data: bytes, model: dict | None = None) -> Path:
    """A copy of a checkpoint with another state.pt, and the digests that fit."""
    folder = Path(shutil.copytree(checkpoint, copy))
    (folder / "state.pt").write_bytes(data)
    record = json.loads((folder / "checkpoint.json").read_bytes())
    del record["xxh3"]
    record["model"].update(model or {})
    record["files"]["state.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "checkpoint.json").write_bytes(sealed(record))
    return folder


@pytest.mark.parametrize("model", [{"name": float("nan")}, {"weights": {}}, {"freeze_statistics": 2**63}, {"more": 1}])
def test_a_checkpoint_whose_record_describes_no_model_is_refused(checkpoint, tmp_path, model):
    folder = with_state(checkpoint, tmp_path / "copy", (checkpoint / "state.pt").read_bytes(), model)
    info = check_checkpoint(folder)
    with pytest.raises(IntegrityError, match=r"does not describe a model: got model\.\w+: "):
        restore_network(info, read_weights(folder, info))


def readers(checkpoint: Path, folder: Path) -> dict:
    """Each way into the project for a file of `torch.save`, and its own error."""

    def state(path: Path) -> object:
        copy = with_state(checkpoint, folder / f"copy-{path.name}", path.read_bytes())
        return read_state(copy, check_checkpoint(copy))

    return {
        "token-label file": (lambda path: read_map(path, CLASSES), BadImage),
        "teacher": (lambda path: read_checkpoint(str(path)), InputError),
        "published checkpoint": (load_reference_checkpoint, ModelError),
        "training state": (state, IntegrityError),
    }


WAYS = ("token-label file", "teacher", "published checkpoint", "training state")


@pytest.mark.fault(23)
@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_with_code_is_refused_and_not_run(checkpoint, tmp_path, way):
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    read, error = readers(checkpoint, tmp_path)[way]
    content = {"model": {"w": torch.zeros(3)}, "x": hostile.Canary(canary)}
    for kind in ("zip", "legacy", "pickle"):
        if kind == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(error):
            read(path)
        assert not canary.exists()
        shutil.rmtree(tmp_path / "copy-a.pt", ignore_errors=True)
        tally(23, injected=1)
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the canary is alive


@pytest.mark.fault(23)
@pytest.mark.parametrize("way", WAYS)
def test_no_environment_variable_makes_code_run(checkpoint, tmp_path, way, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "a.pt"
    torch.save({"x": hostile.Canary(tmp_path / "canary")}, path)
    read, error = readers(checkpoint, tmp_path)[way]
    with pytest.raises(error):
        read(path)
    assert not (tmp_path / "canary").exists()
    tally(23, injected=1)


# Row 24

MEASURED = """
    import resource, sys, time
    from pathlib import Path
    import h5py, torch
    sys.path[:0] = [{tests!r}, {root!r}]
    from test_faults_hostile_files import bombs_of, peak, readers
    ways = readers(Path({run!r}), Path({folder!r}))
    for name, path in bombs_of(Path({folder!r})).items():
        for way, (read, error) in ways.items():
            before = peak()
            try:
                read(path)
                print(name, way, "was read")
            except error as refusal:
                if peak() - before > 64 << 20:
                    print(name, way, "took", peak() - before, "bytes")
            except Exception as other:
                print(name, way, repr(other)[:200])
    print("done", (peak() >> 20))
"""


def peak() -> int:
    """Bytes of memory that this process had at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def bombs_of(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((folder / "bombs").glob("*.pt"))}


@pytest.mark.fault(24)
def test_a_tensor_bomb_is_refused_before_it_takes_memory(checkpoint, tmp_path):
    """Nine bombs by four ways in, in a process whose highest use of memory the system tells."""
    bombs = hostile.tensor_bombs(tmp_path / "bombs")
    assert max(path.stat().st_size for path in bombs.values()) < 24 << 20
    code = MEASURED.format(tests=str(ROOT / "tests"), root=str(ROOT), run=str(checkpoint), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    *wrong, last = result.stdout.splitlines()
    assert wrong == []
    assert last.startswith("done")
    tally(24, injected=4 * len(bombs))


@pytest.mark.fault(24)
def test_torch_itself_takes_what_a_bomb_asks_for(tmp_path):
    """Why the look beforehand is needed; here with harmless 8 MB."""
    bombs = hostile.tensor_bombs(tmp_path, 8_000_000)
    for name, kind in (("bytes", bytearray), ("typed tensor", torch.Tensor), ("strides", dict), ("compression", dict)):
        assert type(torch.load(bombs[name], weights_only=True)) is kind
        with pytest.raises(ValueError, match=r"asks for|in a file of|compressed"):
            load_plain(bombs[name])


@pytest.mark.fault(24)
@pytest.mark.parametrize("header", ["huge", "overlap", "length"])
def test_a_safetensors_file_that_claims_more_than_it_has_is_refused(tmp_path, header):
    shape = [10**6, 10**6] if header == "huge" else [4]
    entries = {
        f"w{i}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]} for i in range(1 + (header == "overlap"))
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60 if header == "length" else len(text)) + text + bytes(16))
    before = peak()
    with pytest.raises(InputError, match="not a file of plain weights"):
        read_checkpoint(str(path))
    with pytest.raises(ModelError, match="not a file of plain weights"):
        load_reference_checkpoint(path)
    assert peak() - before < 64 << 20
    tally(24, injected=2)


def test_honest_files_of_every_kind_are_read(tmp_path):
    linear = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": linear.state_dict(),
        "parameter": linear.weight,
        "optimizer": optimizer.state_dict(),
        "view": linear.bias[:1],
        "tied": [linear.weight, linear.weight],
        "rng": torch.get_rng_state(),
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "plain": (None, True, 1.5, "x", b"x", torch.Size([2]), torch.float32),
        "set": {1},
    }
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        found = load_plain(tmp_path / "a.pt")
        assert found.keys() == content.keys()
        assert torch.equal(found["parameter"], linear.weight)
        assert load_plain((tmp_path / "a.pt").read_bytes())["set"] == {1}


# Row 33


def rewrite(store: Path, **values) -> None:
    """Put values into the first row of every shard, with each digest repaired."""
    labels = LabelStore(store, trusted=True)
    for shard, path in enumerate(hostile.shards(store)):
        rows = labels.read_shard(shard)
        changed = {}
        for name, value in values.items():
            changed[name] = getattr(rows, name).copy()
            changed[name][0] = value
        with h5py.File(path, "r+", libver="v110") as file:
            for name, array in changed.items():
                file[name][:] = array
            file["checksum"][:] = dataclasses.replace(rows, **changed).checksums()
    hostile.repair(store)


BAD_LABELS = {
    "scores that are no numbers": {"scores": np.nan},
    "infinite scores": {"scores": np.inf},
    "background that is no number": {"background": np.nan},
    "class ids out of range": {"classes": CLASSES},
    "a class twice": {"classes": 0},
    "a target out of range": {"target": CLASSES},
    "a negative target": {"target": -2},
    "a region outside": {"region": (0, 0, 2, 1)},
    "a region of no numbers": {"region": np.nan},
}


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_no_teacher_gives_are_refused_though_every_digest_fits(half_store, stranger, name):
    rewrite(half_store, **BAD_LABELS[name])
    with pytest.raises(IntegrityError, match=hostile.shards(half_store)[0].name):
        LabelStore(half_store)
    assert any(
        hostile.shards(half_store)[0].name in problem for problem in verify_store(half_store, trusted=True).problems
    )
    if name == "class ids out of range":
        with pytest.raises(IntegrityError, match="a class id out of range"):
            LabelStore(half_store, trusted=True).read([0])
    tally(33, corruptions=1, silent=0)


@pytest.mark.fault(33)
@pytest.mark.parametrize("change", ["nan", "other"])
def test_codes_that_stand_for_no_number_are_refused(store, stranger, change):
    def edit(plan):
        plan["code_values"][3] = float("nan") if change == "nan" else 5.0

    hostile.edit_plan(store, edit)
    with pytest.raises(IntegrityError, match="code_values.3 nan" if change == "nan" else "code values"):
        LabelStore(store)
    tally(33, corruptions=1, silent=0)


BAD_TAILS = {
    "class ids out of range": {"tail_classes": CLASSES},
    "a class of the palette": {"tail_classes": (0, 1, 2, 3, 4)},
    "an offset that is none": {"tail_offsets": -128},
}


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", BAD_TAILS)
def test_tails_that_no_labeler_writes_are_refused_though_every_digest_fits(store, stranger, name):
    rewrite(store, **BAD_TAILS[name])
    with pytest.raises(IntegrityError, match=hostile.shards(store)[0].name):
        LabelStore(store)
    assert any(hostile.shards(store)[0].name in problem for problem in verify_store(store, trusted=True).problems)
    tally(33, corruptions=1, silent=0)


@pytest.mark.fault(33)
@pytest.mark.parametrize("tail", [-1, 1 << 20, 2.5, None, "64"])
def test_a_plan_with_a_tail_that_cannot_be_is_refused(store, stranger, tail):
    hostile.edit_plan(store, lambda plan: plan["meta"].update(tail=tail))
    with pytest.raises(IntegrityError, match="tail"):
        LabelStore(store)
    tally(33, corruptions=1, silent=0)
