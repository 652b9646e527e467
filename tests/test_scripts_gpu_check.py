"""The rehearsal of the check of a GPU: end to end on a CPU, and parts that crash, hang or find something wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import __main__ as gpu_check


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)  # twenty seconds to a minute; several times as long where other jobs fill the cores
def test_the_rehearsal_runs_every_part_and_all_are_right(tmp_path, capfd):
    assert gpu_check.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0, capfd.readouterr().err
    found = lines(tmp_path)
    assert found[-1]["wrong"] == []
    rehearsed = {name for name, part in gpu_check.PARTS.items() if not part.only_full}
    assert found[-1]["summary"] == dict.fromkeys(rehearsed, "right")
    checks = [record for record in found if "check" in record]
    assert {record["part"] for record in checks} == rehearsed - {"card", "rates"}
    assert all(record["ok"] for record in checks)
    rates = {record["measured"]: record for record in found if "measured" in record}
    assert rates["train_step"]["images_per_s"] > 0
    assert not [record for record in found if "failed" in record]


def crash(say: gpu_check.Says, device: str, quick: bool) -> None:
    say(known="before it")
    os.abort()


def hang(say: gpu_check.Says, device: str, quick: bool) -> None:
    say(known="before it")
    time.sleep(600)


def fail(say: gpu_check.Says, device: str, quick: bool) -> None:
    raise RuntimeError("no such kernel\nand more")


def wrong(say: gpu_check.Says, device: str, quick: bool) -> None:
    say.check("sum", float("nan"), 1.0)
    say.check("product", 0.5, 1.0)


def fine(say: gpu_check.Says, device: str, quick: bool) -> None:
    say.check("sum", 0.0, 0.0)


def test_a_part_that_crashes_hangs_or_fails_costs_only_itself(tmp_path, monkeypatch):
    parts = {one.__name__: gpu_check.Part(f"{__name__}:{one.__name__}", 15) for one in (crash, fail, wrong, fine)}
    parts["hang"] = gpu_check.Part(f"{__name__}:hang", 2)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "PRELOADED", [])
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = lines(tmp_path)
    assert found[-1]["summary"] == {
        "crash": "ended with -6",
        "fail": "error",
        "wrong": "wrong: sum",
        "fine": "right",
        "hang": "stopped after 2 s",
    }
    assert [record["part"] for record in found if record.get("known") == "before it"] == ["crash", "hang"]
    assert {"part": "fail", "error": "RuntimeError: no such kernel"} in found
    assert found[-1]["wrong"] == ["crash", "fail", "wrong", "hang"]


def test_what_does_not_fit_into_the_time_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", {"fine": gpu_check.Part(f"{__name__}:fine", 15)})
    assert gpu_check.main(["--device", "cpu", "--minutes", "0.2", "--out", str(tmp_path)]) == 0
    assert lines(tmp_path)[-1]["summary"] == {"fine": "no time left"}


@pytest.mark.parametrize("wrong", [["nothing"], ["--minutes", "0"], ["--out", "/proc/nowhere"]])
def test_wrong_usage_is_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(wrong)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("scripts.gpu_check: error: ")
