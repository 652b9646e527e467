"""Checkpoints are absent or whole: killed writers, damaged files, full disks, hostile contents."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import pickle
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import counts, tally
from forked_runs import Blow, forks
from tiny_runs import FULL, outcome, save_small_checkpoint, tiny_config, tiny_data, write_recipe

import train.record.checkpoint
from labeler import InputError, IntegrityError
from labeler.base.errors import TokenLabelError
from labeler.base.whole_files import TEMPORARY, read_sealed, sealed
from train import TrainConfig, fit
from train.errors import TrainError
from train.evaluation.validate import load_trained
from train.record.checkpoint import check_checkpoint, read_state, read_weights
from train.record.checkpoint_folders import FOLDER, checkpoints, find_checkpoint, newest_checkpoint, sweep

FILES = ("checkpoint.json", "weights.safetensors", "ema.safetensors", "state.pt")
SAVE = "tiny_runs:save_small_checkpoint"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of nine steps that was killed in the ninth: its checkpoints are of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    images, store = tiny_data(folder)
    config = tiny_config(images, store, folder / "run", **{**FULL, "data.validation": str(images)})
    [ended] = forks().fit(write_recipe(config, folder / "recipe.toml"), blow=Blow("train.task:TrainingStep.run", 9))
    assert ended.status == -signal.SIGKILL
    assert [path.name for path in checkpoints(folder / "run")] == ["step-00000008", "step-00000006"]
    return config


@pytest.fixture(scope="module")
def undisturbed(killed: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run ends with if nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(into(killed, folder))
    return outcome(folder)


@pytest.fixture
def run(killed: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A copy of the killed run."""
    shutil.copytree(killed.run.out, tmp_path / "run")
    return into(killed, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half the time of a tiny run and has no part in what is tested."""
    monkeypatch.setattr("train.record.run_folder.draw_run", lambda folder: False)


def into(config: TrainConfig, folder: Path, **run: Any) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(folder), **run})})


def newest(config: TrainConfig) -> Path:
    return checkpoints(Path(config.run.out))[0]


# Killed in the middle of a checkpoint


@pytest.mark.fault(25)
@pytest.mark.parametrize("before", ["one kept", "one removed", "one damaged"])
def test_a_process_killed_between_any_two_system_calls_of_a_checkpoint_leaves_a_whole_one(tmp_path, before):
    """About a hundred kills over the three cases; half a file written is a kill too."""
    kills, whole = 0, set()
    blows = [Blow("train.record.checkpoint:_write", call, half=True) for call in range(1, 5)]
    keep = 1 if before == "one removed" else 2
    while True:
        blow = blows.pop() if blows else Blow(SAVE, 1, kills - 4)
        run = tmp_path / str(kills)
        save_small_checkpoint(str(run), 1, keep)
        if before == "one damaged":
            save_small_checkpoint(str(run), 2, keep)
            (checkpoints(run)[0] / "state.pt").write_bytes(b"")
        [ended] = forks().run(SAVE, str(run), 2, keep, blow=blow)
        found = newest_checkpoint(run)
        assert found is not None
        folder, info = found
        assert info.step in (1, 2)
        for ema in (False, True):
            assert read_weights(folder, info, ema)["weight"].tolist() == [info.step] * 5
        assert read_state(folder, info) == {"step": info.step}
        for path in checkpoints(run) if before != "one damaged" else [folder]:
            check_checkpoint(path)  # the one being written is not there, rather than there and damaged
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended
        kills, whole = kills + 1, whole | {info.step}
        # The next process sweeps, saves again, and leaves nothing but whole checkpoints.
        sweep(run)
        save_small_checkpoint(str(run), 2, keep)
        steps = [check_checkpoint(path).step for path in (run / "checkpoints").iterdir()]
        assert sorted(steps) == ([2] if keep == 1 else [1, 2])
    assert kills >= 26
    assert whole == {1, 2}
    tally(25, kills=kills)


def test_what_cannot_be_swept_away_stops_no_run(tmp_path):
    """Here a file, where a folder was left to be removed."""
    left = tmp_path / FOLDER / f"{TEMPORARY}step"
    left.parent.mkdir()
    left.write_text("no folder")
    (left.parent / f"{TEMPORARY}other").mkdir()
    sweep(tmp_path)
    assert list(left.parent.iterdir()) == [left]


# Damaged


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.fault(26)
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink], ids=["flip", "cut", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(run, caplog, name, damage):
    damage(newest(run) / name)
    found = newest_checkpoint(Path(run.run.out))
    assert found is not None
    assert found[0].name == "step-00000006"
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"step-00000008/{name} is" in warning or (name == "checkpoint.json" and "step-00000008 is" in warning)
    assert warning.endswith("trying the one before it")
    tally(26, corruptions=1, silent=0)


@pytest.mark.fault(26)
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_before_a_damaged_checkpoint_bit_for_bit(run, undisturbed, name):
    flip(newest(run) / name)
    fit(run, resume="auto")
    assert outcome(Path(run.run.out)) == undisturbed
    tally(26, corruptions=1, silent=0, resumed=1, resumed_equal=1)


@pytest.mark.fault(26)
@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unnoticed(run, name):
    folder = newest(run)
    info, data = check_checkpoint(folder), (folder / name).read_bytes()
    draw = random.Random(name)
    refused, flips = 0, counts(200, 2000)
    for _ in range(flips):
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        try:
            # The letter of a number's exponent may be of either case: then nothing has changed.
            assert check_checkpoint(folder) == info
        except IntegrityError:
            refused += 1
    assert refused >= (0.98 * flips if name == "checkpoint.json" else flips)
    tally(26, corruptions=refused, silent=0)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run):
    for folder in checkpoints(Path(run.run.out)):
        cut(folder / "weights.safetensors")
    with pytest.raises(IntegrityError, match=r"all checkpoints .* are damaged: got step-00000008, step-00000006\. "):
        fit(run, resume="auto")
    with pytest.raises(IntegrityError, match=r"weights\.safetensors is damaged: got [\d,]+ bytes, expected"):
        fit(run, resume=newest(run))


# Hostile


class Code:
    """Runs when it is unpickled by something careless."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.canary,)


def replace_content(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes in, with digests that fit."""
    (folder / name).write_bytes(data)
    record = read_sealed(folder / "checkpoint.json")
    record["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "checkpoint.json").write_bytes(sealed(record))


@pytest.mark.fault(23)
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_training_state_is_refused_and_not_run(run, tmp_path, container):
    canary = tmp_path / "canary"
    state = read_state(newest(run), check_checkpoint(newest(run)))
    hostile = {**state, "skipped": Code(canary)}
    if container == "torch":
        torch.save(hostile, tmp_path / "hostile.pt")
        data = (tmp_path / "hostile.pt").read_bytes()
    else:
        data = pickle.dumps(hostile)
    replace_content(newest(run), "state.pt", data)
    with pytest.raises(IntegrityError, match=r"state\.pt is not plain data: .* None of its code was run\."):
        fit(run, resume="auto")
    assert not canary.exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False) if container == "torch" else pickle.loads(data)
    assert canary.exists()  # the trap itself works
    tally(23, injected=1)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", pickle.dumps([1]), saved([1]), saved({"loader": 3})],
    ids=["empty", "noise", "no tensors", "pickle", "list", "dictionary"],
)
def test_contents_of_another_kind_are_refused_in_one_line(run, name, data):
    replace_content(newest(run), name, data)
    with pytest.raises(TokenLabelError) as found:
        fit(run, resume="auto")
    assert "\n" not in str(found.value)
    assert newest(run).name in str(found.value) or "this is not the state of a loader" in str(found.value)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {}},
        {"files": {"state.pt": None}},
        {"files": {"state.pt": {"size": 3}}},
        {"files": {"../../../../images/class0/img000.jpg": {"size": 3, "sha256": ""}}},
        {"config": None},
        {"config": {}},
        {"step": "eight"},
        {"model": {"name": "nothing"}},
        {"model": None},
        {"world_size": None},
    ],
    ids=str,
)
def test_a_record_of_another_form_is_refused_in_one_line(run, change):
    folder = newest(run)
    (folder / "checkpoint.json").write_bytes(sealed({**unsealed(folder), **change}))
    shutil.rmtree(checkpoints(Path(run.run.out))[1])
    uses: list[Callable] = [] if "model" in change else [lambda: fit(run, resume=folder)]  # the recipe's own holds
    uses += [] if "config" in change else [lambda: load_trained(folder)]
    for use in uses:
        with pytest.raises(TokenLabelError) as found:
            use()
        assert "\n" not in str(found.value)


def unsealed(folder: Path) -> dict[str, Any]:
    return read_sealed(folder / "checkpoint.json")


# Full disks


@pytest.mark.fault(27)
def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_no_training(
    killed, undisturbed, tmp_path, monkeypatch, caplog
):
    write = train.record.checkpoint._write
    seen = []

    def full(path: Path, data: bytes) -> None:
        seen.append(path)
        if path.parent.name.startswith(".tmp-step-00000004") and path.name == "ema.safetensors":
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(train.record.checkpoint, "_write", full)
    config = into(killed, tmp_path / "run", keep=99)
    fit(config)
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert re.fullmatch(
        r"the checkpoint \S+/step-00000004 cannot be written: the disk is full; training continues, "
        r"and the newest one kept is \S+/step-00000003",
        message,
    )
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["9", "8", "6", "3", "2"]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert len(seen) > 15
    assert outcome(tmp_path / "run") == undisturbed
    tally(27, injected=1)


@pytest.mark.fault(27)
def test_a_disk_that_is_full_at_the_last_checkpoint_is_an_error_and_the_one_before_is_kept(
    killed, undisturbed, tmp_path, monkeypatch
):
    write = train.record.checkpoint._write

    def full(path: Path, data: bytes) -> None:
        if path.parent.name.startswith(".tmp-step-00000009"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    config = into(killed, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train.record.checkpoint, "_write", full)
        with pytest.raises(TrainError, match=r"step-00000009 cannot be written: got the disk is full\. the newest .*8"):
            fit(config)
    assert not list(tmp_path.rglob(".tmp-*"))
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == undisturbed
    tally(27, injected=1, resumed=1, resumed_equal=1)


@pytest.mark.fault(27)
def test_on_a_real_small_disk_training_ends_with_its_older_checkpoints_whole(killed, undisturbed, tmp_path):
    """Room for two checkpoints and a half, where five are kept."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    one = sum(-(-path.stat().st_size // 4096) * 4096 for path in newest(killed).iterdir())
    recipe = write_recipe(into(killed, disk / "run", keep=5), tmp_path / "recipe.toml")
    size = f"{(2 * one + one // 2 + 60_000) // 1024}k"
    [ended] = forks().run("tiny_runs:fit_on_a_small_disk", str(recipe), str(disk), size, str(kept))
    if ended.status == 77:
        pytest.skip("no small file system can be mounted here")
    assert ended.status == 1, ended.errors
    assert "the disk is full; training continues" in ended.errors
    assert "step-00000009 cannot be written: got the disk is full" in ended.errors
    assert "Traceback" not in ended.errors
    assert not list(kept.rglob(".tmp-*"))
    assert checkpoints(kept / "run")
    for folder in checkpoints(kept / "run"):
        check_checkpoint(folder)
    fit(into(killed, kept / "run"), resume="auto")
    assert outcome(kept / "run") == undisturbed
    tally(27, injected=1, resumed=1, resumed_equal=1)


@pytest.mark.fault(27)
def test_a_limit_on_the_size_of_files_is_told_as_what_it_is(killed, tmp_path):
    recipe = write_recipe(into(killed, tmp_path / "run"), tmp_path / "recipe.toml")
    limit = (newest(killed) / "weights.safetensors").stat().st_size - 1
    [ended] = forks().fit(recipe, file_size=limit)
    assert ended.status == 1
    assert "the file is too large; training continues, and there is no older one" in ended.errors
    assert re.search(r"error: the checkpoint \S+ cannot be written: got the file is too large\.", ended.errors)
    assert "Traceback" not in ended.errors
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    tally(27, injected=1)


# Removed and found


def test_what_is_saved_after_a_damaged_one_is_not_removed_in_its_favour(tmp_path):
    for step in (1, 3):
        save_small_checkpoint(str(tmp_path), step, 2)
    empty(checkpoints(tmp_path)[0] / "state.pt")
    save_small_checkpoint(str(tmp_path), 2, 1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "2"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == 2
    save_small_checkpoint(str(tmp_path), 3, 1)
    assert [check_checkpoint(path).step for path in checkpoints(tmp_path)] == [3]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint in"):
        find_checkpoint(tmp_path)
    with pytest.raises(IntegrityError, match=r"is not a checkpoint: got no checkpoint\.json"):
        check_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    save_small_checkpoint(str(tmp_path), 3, 1)
    before = {path: path.stat().st_mtime_ns for path in checkpoints(tmp_path)[0].iterdir()}
    save_small_checkpoint(str(tmp_path), 3, 1)
    assert {path: path.stat().st_mtime_ns for path in checkpoints(tmp_path)[0].iterdir()} == before
