"""`fit --ranks`: processes that are started, stopped and explained together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import tiny_config, tiny_data, write_recipe

from train.__main__ import main
from train.record.checkpoint_folders import checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


def started(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", "fit", str(recipe), "--ranks", "2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK", b""):
            return int(child)
    raise AssertionError(f"there is no rank {rank}")


def test_two_ranks_train_and_the_first_speaks_for_both(data, tmp_path):
    recipe = write_recipe(tiny_config(*data, tmp_path / "run"), tmp_path / "recipe.toml")
    process = started(recipe, "--json")
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(told)["steps"] == 6
    assert json.loads((checkpoints(tmp_path / "run")[0] / "checkpoint.json").read_text())["world_size"] == 2


def test_where_a_rank_is_killed_the_last_line_says_which(data, tmp_path):
    config = tiny_config(*data, tmp_path / "run", **{"schedule.steps": 100_000, "run.save_every": 1})
    process = started(write_recipe(config, tmp_path / "recipe.toml"))
    until(lambda: checkpoints(tmp_path / "run"))
    os.kill(rank_of(process, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: rank 1 was ended by SIGKILL"
    assert "Traceback" not in errors


def test_a_signal_to_the_launcher_saves_and_stops_all(data, tmp_path):
    config = tiny_config(*data, tmp_path / "run", **{"schedule.steps": 100_000, "run.save_every": 1})
    process = started(write_recipe(config, tmp_path / "recipe.toml"))
    until(lambda: checkpoints(tmp_path / "run"))
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    last = errors.splitlines()[-1]
    assert re.fullmatch(r"error: stopped after step \d+\. --resume auto continues from there\.", last)


def test_a_typo_is_told_once_and_no_rank_is_started(capsys):
    assert main(["fit", "demo", "lrr=3", "--ranks", "2"]) == 2
    assert capsys.readouterr().err == "error: no section has a key 'lrr'. Did you mean 'lr'?\n"


def test_ranks_within_torchrun_are_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    recipe = write_recipe(tiny_config(*data, tmp_path / "run"), tmp_path / "recipe.toml")
    assert main(["fit", str(recipe), "--ranks", "2"]) == 2
    assert "--ranks starts the ranks itself: got RANK is set. Omit torchrun or --ranks." in capsys.readouterr().err


def test_what_every_rank_would_say_is_said_by_the_first_and_told_to_torchrun(tmp_path):
    """Under torchrun, which ends the others as soon as one has failed, and shows what this file says as the cause."""
    said = tmp_path / "error.json"
    place = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(said)}
    command = [sys.executable, "-m", "train", "fit", "demo", "lrr=3"]
    process = subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True)
    until(said.exists)
    assert json.loads(said.read_text())["message"]["message"] == "no section has a key 'lrr'. Did you mean 'lr'?"
    assert process.wait(30) == 2
    begun = time.monotonic()
    ended = subprocess.Popen(command, env={**os.environ, "RANK": "1"}, stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)
    ended.terminate()
    _, errors = ended.communicate(timeout=30)
    assert time.monotonic() - begun < 2.5
    assert errors == ""
