"""Picking the encoding: by quality, or by the bytes that an image may take; and what a shard costs before its rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_labeler_encoder import teacher_like
from tiny import make_images

from labeler import InputError, LabelerConfig, LabelStore, MismatchError, TeacherConfig, label_images
from labeler.choose_encoding import asked_encoding, fit_threshold, measure
from labeler.store.hdf5.build_shard import build_shard
from labeler.store.plan import StoreMeta
from labeler.store.row_schema import ShardRows, class_dtype, row_layout
from labeler.store.score_code import QUALITIES, Encoding, code_table

TEACHER = TeacherConfig("tiny:colour_teacher")


def test_more_quality_is_truer_and_larger():
    logits = teacher_like(12, 300, 8, seed=0)
    costs = [measure(logits, QUALITIES[name]) for name in ("low", "default", "high")]
    assert [c.bytes for c in costs] == sorted(c.bytes for c in costs)
    assert [c.kl for c in costs] == sorted((c.kl for c in costs), reverse=True)
    assert costs[0].bytes < 0.85 * costs[2].bytes


def test_what_is_set_beside_the_quality_counts():
    config = LabelerConfig(TEACHER, quality="high", tail=7, levels=33)
    assert asked_encoding(config) == dataclasses.replace(QUALITIES["high"], tail=7, levels=33)
    assert asked_encoding(LabelerConfig(TEACHER)) == Encoding()


def test_the_threshold_that_fits_takes_about_the_bytes_that_it_may():
    logits = teacher_like(12, 300, 8, seed=1)
    kl = []
    for wanted in (300, 400, 500):
        cost = fit_threshold(logits, Encoding(), wanted)
        assert 0.9 * wanted <= cost.bytes <= wanted
        assert measure(logits, cost.encoding) == cost
        kl.append(cost.kl)
    assert kl == sorted(kl, reverse=True)


def test_a_rows_bytes_are_what_shards_of_such_rows_grow_by(tmp_path):
    config = LabelerConfig(TEACHER, shard_size=100, decoder="pil", threads=1, progress=False)
    few, many = make_images(tmp_path / "few", count=20), make_images(tmp_path / "many", count=80)
    label_images(few, tmp_path / "labels", dataclasses.replace(config, bytes_per_image=150))
    settings = LabelStore(tmp_path / "labels").plan.settings
    picked = {name: settings[name] for name in ("levels", "threshold")}
    label_images(many, tmp_path / "more", dataclasses.replace(config, **picked))
    shards = [next((tmp_path / name).glob("shard-*.h5")) for name in ("labels", "more")]
    assert (shards[1].stat().st_size - shards[0].stat().st_size) / 60 == pytest.approx(150, rel=0.2)


def test_a_run_that_goes_on_keeps_what_was_picked_and_refuses_other_bytes(images, tmp_path, config, monkeypatch):
    config = dataclasses.replace(config, levels=None, threshold=None, bytes_per_image=150)
    label_images(images, tmp_path / "labels", config)
    settings = LabelStore(tmp_path / "labels").plan.settings
    assert settings["bytes_per_image"] == 150
    assert 0 < settings["threshold"] < 1

    def again(*_: object) -> None:
        raise AssertionError("the sample was drawn again")

    monkeypatch.setattr("labeler.make_plan.fit_encoding", again)
    assert label_images(images, tmp_path / "labels", config).labeled_now == 0
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="bytes_per_image 160, the store has 150"):
        label_images(images, tmp_path / "labels", dataclasses.replace(config, bytes_per_image=160))


def test_too_few_bytes_are_refused_before_there_is_a_store(images, tmp_path, config):
    config = dataclasses.replace(config, levels=None, threshold=None, bytes_per_image=10)
    with pytest.raises(InputError, match=r"`bytes_per_image=10`, expected at least \d+"):
        label_images(images, tmp_path / "labels", config)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("beside", [{"threshold": 0.1}, {"precision": "float16"}])
def test_bytes_and_what_they_pick_exclude_each_other(beside):
    with pytest.raises(InputError, match="`bytes_per_image` picks the threshold"):
        LabelerConfig(TEACHER, bytes_per_image=500, **beside)


def test_a_shard_costs_at_most_six_kilobytes_before_its_first_row():
    """Of an ImageNet teacher: a thousand class names stand in the plan and the view, not in every shard."""
    layout = row_layout(64, (9, 9), 1000, "logprob", "uint8", 40, 192)
    names = tuple(f"a class of two or three words, {i}" for i in range(1000))
    teacher = {"name": "tf_efficientnet_lite2", "weights_sha256": "0" * 64, "notes": ["a note of some length " * 8]}
    meta = StoreMeta(1000, names, 64, (9, 9), "logprob", "uint8", "exif", teacher, "0" * 64, 150, 1, tail=192)
    rows = {name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in layout.items()}
    del rows["key"], rows["checksum"], rows["code_values"]
    shard = ShardRows(**rows, keys=("n01491361/n01491361_tiger_shark.JPEG",))
    assert class_dtype(1000) == rows["classes"].dtype
    assert len(build_shard(shard, layout, meta.attributes(0), code_table(20))) < 6_000
    assert "class_names" in meta.attributes()
