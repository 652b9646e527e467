"""Labeling runs: they resume, keep to a folder of their own, can be stopped, and tell their status.

What becomes of them when things go wrong is in test_faults_*.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from labeling_runs import TESTS, command, start, state, wait_for_markers
from tiny import CLASSES, make_images

from labeler import LabelerConfig, LabelStore, TeacherConfig, label_images
from labeler.base.whole_files import publish_exclusively
from labeler.checks.verify import verify_store


def test_a_second_run_labels_nothing_and_changes_nothing(images, store, config):
    before = state(store)
    summary = label_images(images, store, config)
    assert summary.labeled_now == 0
    assert summary.rows == 12
    assert state(store) == before


def test_what_another_run_committed_meanwhile_is_not_counted_as_labeled_now(images, store, config, monkeypatch):
    """As where two runs share a store: both began when nothing was there, and one was faster."""
    import labeler.run

    done = []
    monkeypatch.setattr(labeler.run, "committed_shards", lambda path, plan: {})
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, n=1: done.append(n))
    summary = label_images(images, store, config)
    assert (summary.labeled_now, summary.rows) == (0, 12)
    assert sum(done) == 12


def test_a_folder_with_other_things_in_it_is_not_written_to(images, tmp_path, config):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(Exception, match=r"not empty.*thesis\.tex"):
        label_images(images, tmp_path / "used", config)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.tex"]


def test_the_first_marker_wins(tmp_path):
    assert publish_exclusively(tmp_path / "marker", b"first")
    assert not publish_exclusively(tmp_path / "marker", b"second")
    assert (tmp_path / "marker").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_143_and_what_is_committed(images, tmp_path, config, number):
    store = tmp_path / "labels"
    process = start(command(images, store, teacher="tiny:slow_teacher"))
    wait_for_markers(store, 1, lambda: process.poll() is None)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    # The run may have been over before the signal came; then it was whole.
    assert process.returncode in (143, 0)
    assert "Traceback" not in error
    assert not list(store.glob(".tmp-*"))
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    label_images(images, store, slow)
    assert verify_store(store, images).problems == ()


def run_cli(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "labeler", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_tells_its_status(images, tmp_path):
    store = tmp_path / "labels"
    done = start([*command(images, store), "--json"])
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0
    assert json.loads(out)["rows"] == 12
    checked = run_cli("verify", store, "--images", images, "--json", "--quiet")
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["problems"] == []
    (store / "labels.h5").unlink()
    assert run_cli("verify", store).returncode == 4
    for wrong in (
        ["label", images, "--store", store],
        ["label", tmp_path / "absent", "--store", store, "--teacher", "resnet18"],
        ["verify", tmp_path],
        ["label", images, "--store", tmp_path / "new", "--teacher", "resnet18", "--palette", "0"],
    ):
        result = run_cli(*wrong)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
    (images / "class0" / "bad.jpg").write_bytes(b"text")
    process = start(command(images, tmp_path / "other"))
    assert process.wait(120) == 3


def test_the_default_shard_size_gives_every_worker_some_and_wastes_no_bytes():
    from labeler.make_plan import default_shard_size

    assert [default_shard_size(n) for n in (1, 150, 20_000, 1_281_167)] == [256, 256, 313, 10_000]
    assert LabelerConfig(TeacherConfig("x")).shard_size is None
    assert CLASSES == 6


def test_folders_of_other_classes_than_the_teachers_are_told(images, tmp_path, config, caplog):
    """Three folders and six classes; with their names in --class-names they are known."""
    label_images(images, tmp_path / "labels", config)
    assert "the 3 folders of" in caplog.text
    assert "(class0, class1, class2) are not the teacher's 6 classes" in caplog.text
    assert "--class-names FILE" in caplog.text
    caplog.clear()
    (tmp_path / "names.txt").write_text("".join(f"class{i}\n" for i in range(CLASSES)))
    label_images(images, tmp_path / "named", dataclasses.replace(config, class_names=str(tmp_path / "names.txt")))
    assert not caplog.text


def test_labels_that_seldom_agree_with_the_folders_are_told(tmp_path, config, caplog):
    """Of five images of one answer of the teacher so many are in its folder; the others are in the next one's."""
    made = make_images(tmp_path / "images", 60, CLASSES)
    label_images(made, tmp_path / "first", config)
    answers = LabelStore(tmp_path / "first")
    chance, seldom = "no better than chance among 6 classes", "may end below one that learns the folders alone"
    for right, told in ((5, None), (2, seldom), (0, chance)):
        images = tmp_path / f"sorted-{right}"
        for c in range(CLASSES):
            (images / f"class{c}").mkdir(parents=True)
        for row, key in enumerate(answers.keys):
            first = int(answers.read([row]).dense()[0].mean((1, 2)).argmax())
            copy = images / f"class{(first + (row % 5 >= right)) % CLASSES}" / key.replace("/", "_")
            copy.write_bytes((made / key).read_bytes())
        (tmp_path / "names.txt").write_text("".join(f"class{i}\n" for i in range(CLASSES)))
        caplog.clear()
        named = dataclasses.replace(config, class_names=str(tmp_path / "names.txt"))
        summary = label_images(images, tmp_path / f"labels-{right}", named)
        assert summary.known == 60
        assert summary.agreement == pytest.approx(right / 5, abs=0.2)
        assert [text in caplog.text for text in (chance, seldom)] == [told == chance, told == seldom]
