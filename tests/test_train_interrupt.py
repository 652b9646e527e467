"""Ctrl-C before there is anything to save, with real processes and signals: one line, status 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny_config, tiny_data, write_recipe

from labeler.base.command_line import run_command
from labeler.base.signals import StopSignals


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_recipe(tiny_config(*tiny_data(folder), folder / "run"), folder / "recipe.toml")


# What was imported last when the signal comes: at the beginning, within torch, within timm, and by the training itself.
@pytest.mark.parametrize("module", ["labeler.base.errors", "torch.storage", "timm.layers", "train.trainer"])
def test_an_interrupt_while_the_program_starts_is_one_line_with_status_130(recipe, module):
    command = [sys.executable, "-X", "importtime", "-m", "train", "fit", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told, sent = [], False
    for line in process.stderr:
        if not line.startswith("import time:"):
            told.append(line)
        elif line.split("|")[-1].strip() == module and not sent:
            process.send_signal(signal.SIGINT)
            sent = True
    assert (process.wait(60), told, process.stdout.read()) == (130, ["interrupted\n"], "")
    assert not list(recipe.parent.glob("run/checkpoints/*"))


@pytest.mark.parametrize("package", ["labeler", "pipeline"])
def test_the_other_commands_start_so_too(package):
    command = [sys.executable, "-X", "importtime", "-m", package, "--help"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told, sent = [], False
    for line in process.stderr:
        if not line.startswith("import time:"):
            told.append(line)
        elif line.split("|")[-1].strip() == "argparse" and not sent:
            process.send_signal(signal.SIGINT)
            sent = True
    assert (process.wait(60), told) == (130, ["interrupted\n"])


def test_the_second_interrupt_of_a_run_does_what_interrupts_did_before():
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert (signals.requested, seen) == ("SIGINT", [])
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_that_is_interrupted_inside_another_program_ends_with_130(capsys):
    class Options:
        @staticmethod
        def run(options: object) -> int:
            raise KeyboardInterrupt

    assert run_command(Options) == 130  # type: ignore[arg-type]
    assert capsys.readouterr().err == "interrupted\n"
