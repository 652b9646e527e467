"""What is the machine's fault is never held against an image or a store: the run stops, and can go on later."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labeling_runs import in_own_process
from tiny import ColourTeacher, encoded, make_images, picture

from labeler import InputError, LabelingError, LabelStore, TeacherConfig, label_images
from labeler.ray_executor import _threads
from labeler.sources import folder_source
from labeler.sources.decoding.decoder import DecodeSettings
from labeler.sources.folder_source import find_images
from labeler.sources.image_source import BadImage
from labeler.store.foreign_store import run_child

DALI = "labeler.sources.decoding.decode_dali"
ROOT_THAT_LEAVES: list[Path] = []


class Unmounting(ColourTeacher):
    """The folder of images is empty after the first batch, as it is where a disk went away."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        if ROOT_THAT_LEAVES:
            root = ROOT_THAT_LEAVES.pop()
            root.rename(root.with_name("elsewhere"))
            root.mkdir()
        return super().score_maps(images)


def unmounting_teacher() -> torch.nn.Module:
    return Unmounting()


def test_images_that_go_away_during_a_run_stop_it_and_are_not_quarantined(images, tmp_path, config):
    config = dataclasses.replace(config, teacher=TeacherConfig("test_labeler_machine_failures:unmounting_teacher"))
    label_images(images, tmp_path / "undisturbed", config)
    # Two shards ahead of the first batch may be read already, the last ones never are.
    config = dataclasses.replace(config, shard_size=1)
    ROOT_THAT_LEAVES.append(images)
    with pytest.raises(LabelingError, match="can no longer be read"):
        label_images(images, tmp_path / "labels", config)
    assert not any(json.loads(p.read_text())["quarantine"] for p in (tmp_path / "labels").glob("shard-*.json"))
    images.rmdir()
    images.with_name("elsewhere").rename(images)
    assert label_images(images, tmp_path / "labels", config).quarantined == 0
    again, whole = LabelStore(tmp_path / "labels"), LabelStore(tmp_path / "undisturbed")
    assert again.keys == whole.keys
    np.testing.assert_array_equal(again.read(range(12)).scores, whole.read(range(12)).scores)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_an_error_of_the_machine_is_none_of_the_image(images, monkeypatch, number):
    def failing(number: int, reason: str) -> Any:
        def read_at(path: bytes, offset: int, size: int) -> bytes:
            raise OSError(number, reason)

        return read_at

    source = find_images(images)
    monkeypatch.setattr(folder_source, "read_at", failing(number, "broken"))
    with pytest.raises(LabelingError, match=r"broken at 'class0/img000\.jpg'"):
        source.read(0)
    monkeypatch.setattr(folder_source, "read_at", failing(errno.EIO, "a bad sector"))
    with pytest.raises(BadImage, match="a bad sector"):
        source.read(0)


def test_dali_that_cannot_start_or_decodes_nothing_more_blames_no_image(monkeypatch):
    dali = pytest.importorskip(
        "labeler.sources.decoding.decode_dali", reason="DALI has no wheel here", exc_type=ImportError
    )

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA driver failed: too old")

    decoder = dali.DaliDecoder(DecodeSettings(32))
    data = encoded(picture(0))
    with monkeypatch.context() as patch:
        patch.setattr(dali, "_teacher_input", fail)
        with pytest.raises(LabelingError, match=r"too old.*`decoder=cpu`"):
            decoder([data])
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_run", fail)
        with pytest.raises(LabelingError, match="too old"):
            decoder([data, data])
    assert decoder([data, b"no image"]).kept == [0]


def test_dali_decodes_on_the_gpu_of_the_teacher():
    dali = pytest.importorskip(
        "labeler.sources.decoding.decode_dali", reason="DALI has no wheel here", exc_type=ImportError
    )
    assert dali._gpu("cuda:1") == 1
    assert dali._gpu("cpu") is None


class Sick(ColourTeacher):
    """Over a black image its process breaks, as after an error of its GPU: from then on it fails at everything."""

    broken = False

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        Sick.broken |= bool((images.amax((1, 2, 3)) < -0.9).any())
        if Sick.broken:
            raise RuntimeError("an illegal memory access was encountered")
        return super().score_maps(images)


def sick_teacher() -> torch.nn.Module:
    return Sick()


def test_a_worker_that_fails_at_everything_takes_no_other_shard_with_it(images, tmp_path, config, local_ray):
    black = "class1/img001.jpg"
    (images / black).write_bytes(encoded(picture(0).point(lambda _: 0)))
    settings = dataclasses.replace(
        config, teacher=TeacherConfig("test_labeler_machine_failures:sick_teacher"), workers=1, shard_size=2
    )
    with pytest.raises(LabelingError, match=r"^1 shard\(s\) could not be labeled") as error:
        label_images(images, tmp_path / "labels", settings)
    assert "illegal memory access" in str(error.value)
    assert len(list((tmp_path / "labels").glob("shard-*.json"))) == 5


def test_a_gpu_that_is_not_there_is_told_before_any_worker_waits_for_one(images, tmp_path, config):
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    with pytest.raises(InputError, match="there is no GPU"):
        label_images(images, tmp_path / "labels", dataclasses.replace(config, workers=2, device="cuda"))
    assert not (tmp_path / "labels").exists()


def test_workers_get_the_most_cpus_with_which_all_find_room(config, caplog):
    small, large, head = {"CPU": 8.0}, {"CPU": 32.0, "GPU": 2.0}, {"memory": 1e9}
    wanted = dataclasses.replace(config, threads=None, workers=4)
    assert _threads([small], 0, wanted) == 2
    assert _threads([head, small, large], 0, wanted) == 8  # one on the small node, three on the large one
    assert _threads([small, large], 1, wanted) == 16  # two have a GPU, the others wait for one
    assert _threads([small, large], 0.5, wanted) == 8
    assert _threads([{"CPU": 2.0}], 0, wanted) == 1
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert _threads([small], 1, wanted) == 1
        assert _threads([small], 0, dataclasses.replace(wanted, threads=16)) == 16
    assert "no node of the Ray cluster has the 1 CPU(s) and 1 GPU(s)" in caplog.text
    assert (
        "no node of the Ray cluster has the 16 CPU(s) and 0 GPU(s) that a worker needs; the most are 8 and 0"
        in caplog.text
    )


def test_a_store_of_many_shards_is_checked_though_few_files_may_be_open(images, tmp_path, config):
    images = make_images(tmp_path / "many", 60)
    label_images(images, tmp_path / "labels", dataclasses.replace(config, shard_size=1))

    def checked(hard: int) -> str:
        used = {int(number) for number in os.listdir("/proc/self/fd")}
        few = [number for number in range(4096) if number not in used][12]
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard or few))
        return run_child(tmp_path / "labels")

    for hard in (4096, 0):  # 0: no more may be had
        assert in_own_process(tmp_path / f"few-{hard}", lambda hard=hard: print(checked(hard))) == (0, "whole\n")
