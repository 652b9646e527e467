"""What a run tells while it goes: what begins, and its steps as a bar on a terminal, as lines in a file."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, tiny_data

from train import fit
from train.progress import Progress
from train.ranks.distributed import Ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


def told_by(capsys: pytest.CaptureFixture[str], config) -> list[str]:
    fit(config)
    return capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_a_run_begins_by_saying_what_it_is(data, tmp_path, capsys):
    images, store = data
    settings = {"data.validation": str(images), "run.progress": True, "run.eval_every": 2, "ema.decay": 0.5}
    model, work, place = told_by(capsys, tiny_config(images, store, tmp_path / "run", **settings))[:3]
    assert re.fullmatch(
        r"demansia_nano, [\d,]{5,7} parameters, 32×32 pixels, 4×4 tokens, 6 classes of the teacher", model
    )
    assert work == (
        f"12 images, token labels of {store}, 3 steps of 4 an epoch, 6 steps; evaluated every 2 epochs on 12 images"
    )
    assert place == f"cpu, float32; adamw, lr 0.001, moving average 0.5; {tmp_path / 'run'}"


def test_what_is_left_out_is_said_at_the_beginning(data, tmp_path, capsys):
    settings = {"run.progress": True, "run.micro_batch": 2, "model.train": "heads", "schedule.steps": 1}
    model, work, place = told_by(capsys, tiny_config(data[0], None, tmp_path / "run", **settings))[:3]
    trained = re.search(r"([\d,]+) parameters, ([\d,]+) of them trained", model)
    assert trained
    assert int(trained[2].replace(",", "")) == 2 * (16 + 1) * 6  # the class head and the token head: 16 wide, 6 classes
    assert work == (
        "12 images, no token labels, 3 steps of 4 (2 at a time) an epoch, 1 steps; "
        "no evaluation (data.validation is not set)"
    )
    assert "average" not in place


def test_quiet_runs_say_it_in_the_log(data, tmp_path, caplog):
    with caplog.at_level("INFO", "train"):
        fit(tiny_config(*data, tmp_path / "run", **{"schedule.steps": 2}))
    assert "3 steps of 4 an epoch" in caplog.text
    assert "step 1 of 2" not in caplog.text, "a quiet run tells no single steps"


def test_a_log_file_has_a_line_every_log_every_steps_and_no_bar(data, tmp_path, capsys):
    settings = {"data.validation": str(data[0]), "run.progress": True, "run.log_every": 2, "schedule.steps": 5}
    fit(tiny_config(*data, tmp_path / "run", **settings))
    told = capsys.readouterr().err
    assert not set("\r\x1b|") & set(told), "a bar is drawn over and over"
    number = r"\d+\.\d+"
    step = rf"epoch {number}: loss {number}, lr \d\.\d\de-\d\d, [\d,]+ images/s, \d+% waiting for data"
    lines = [line for line in told.splitlines() if ": loss" in line]
    for line, at, left in zip(lines, (2, 4, 5), (*[r", \d:\d\d:\d\d left"] * 2, ""), strict=True):
        assert re.fullmatch(rf"step {at} of 5, {step}{left}", line)
    assert len([line for line in told.splitlines() if "top-1" in line]) == 2


def test_bar_and_evaluations_tell_how_it_goes(data, tmp_path, capsys, monkeypatch):
    """The bar has loss and learning rate; every evaluation a line of its own."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    settings = {"data.validation": str(data[0]), "run.progress": True, "ema.decay": 0.5}
    fit(tiny_config(*data, tmp_path / "run", **settings))
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in told if re.match(r"step \d+ of", line)]
    assert len(lines) == 2
    number = r"\d+\.\d+"
    shares = rf"top-1 {number}%, top-5 {number}%, moving average {number}%, best {number}%"
    losses = rf"train loss {number}, evaluation loss {number}"
    assert re.fullmatch(rf"step 3 of 6, epoch 1\.0: {losses}, {shares}, \d+ images/s, \d:\d\d:\d\d left", lines[0])
    assert re.fullmatch(rf"step 6 of 6, epoch 2\.0: {losses}, {shares}", lines[1])
    assert any(re.search(rf"step 6/6 .*loss {number}, lr \d\.\d\de-\d\d, [\d,]+ images/s", line) for line in told)


@pytest.mark.parametrize(("step", "steps"), [(30, 60), (61_000, 517_070)])
def test_loss_rate_and_speed_fit_on_eighty_columns(monkeypatch, step, steps):
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress(True, Ranks(0, 1, torch.device("cpu")), step, steps) as progress:
            progress.report_steps("", ["loss 4.3346", "lr 1.55e-05", "1,020 images/s", "4% waiting for data"], [])
        shown = b""
        while not shown.endswith(b"\n"):  # a bar that is done
            shown += os.read(ours, 1 << 16)
    os.close(ours)
    last = [bar for bar in shown.decode().replace("\r", "\n").splitlines() if bar.strip()][-1]
    assert len(last) <= 80
    assert last.startswith(f"step {step}/{steps} |")
    assert "loss 4.3346, lr 1.55e-05, 1,020 images" in last
