"""A store of format 1.0, written by the release that knew no other, is read, checked and trained from as before."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import colour_teacher

from labeler import LabelStore, MismatchError, label_images
from labeler.checks.verify import verify_store
from labeler.report.page import write_report
from labeler.sources.decoding.decode_reference import ReferenceDecoder
from labeler.sources.decoding.decoder import DecodeSettings
from pipeline import LoaderConfig, create_loader
from pipeline.targets.row_reader import LabelRowReader

HOME = Path(__file__).parent / "fixtures" / "store_1_0"  # six images of 24×32 pixels, the tiny teacher, shards of three


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(HOME, tmp_path / "old")
    return tmp_path / "old"


def test_its_rows_are_the_teachers_maps(old):
    labels = LabelStore(old / "labels")
    assert (labels.meta.format_version, labels.meta.palette, len(labels)) == ("1.0", 8, 6)
    maps = labels.read(range(6))
    assert maps.tail_classes.shape == (6, 0)
    dense = maps.dense()
    for row, key in enumerate(labels.keys):
        pixels = ReferenceDecoder(DecodeSettings(32))([(old / "images" / key).read_bytes()]).pixels
        truth = colour_teacher().score_maps((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).softmax(1)
        np.testing.assert_allclose(dense[row], truth[0].numpy(), atol=0.02)


def test_the_loader_decodes_its_rows_as_the_reader_does(old):
    """There code 0 is the highest score; in format 2 it stands for the background."""
    labels = LabelStore(old / "labels")
    rows = LabelRowReader(labels, torch.device("cpu"))
    found, expected = rows.decode(rows.read(np.arange(6))), labels.read(range(6))
    assert (labels.read_codes(range(6)).scores == 0).any()
    np.testing.assert_array_equal(found.scores.numpy(), expected.scores[:, : found.scores.shape[1]])
    np.testing.assert_array_equal(found.background.numpy(), expected.background)


def test_it_verifies_also_with_its_teacher(old):
    found = verify_store(old / "labels", old / "images", relabel=6, trusted=True)
    assert found.problems == ()
    assert (found.rows, found.relabeled) == (6, 6)
    assert found.relabel_kl == pytest.approx(found.stored_kl, rel=0.05)
    assert verify_store(old / "labels").problems == ()  # as a store from elsewhere, in a child process


def test_a_damaged_row_of_it_is_found(old):
    shard = sorted((old / "labels").glob("shard-*.h5"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert any(shard.name in problem for problem in verify_store(old / "labels", trusted=True).problems)


def test_it_is_reported_on(old, tmp_path):
    write_report(old / "labels", old / "images", tmp_path / "report.html")
    assert "token-label store 1.0" in (tmp_path / "report.html").read_text()


def test_the_loader_trains_from_it(old):
    settings = {"images": str(old / "images"), "store": str(old / "labels"), "batch_size": 3, "image_size": 32}
    loader = create_loader(LoaderConfig(**settings, grid=(4, 4), backend="pil", train=False, progress=False))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 3]
    labels = LabelStore(old / "labels")
    for batch in batches:
        tokens = batch.targets.dense_tokens(6)
        assert tokens.sum(-1).numpy() == pytest.approx(1, abs=1e-5)
        whole = labels.read([labels.row_of(key) for key in batch.keys]).dense().mean((2, 3))
        assert (batch.targets.dense_cls(6).argmax(1).numpy() == whole.argmax(1)).mean() > 0.6


def test_h5py_alone_reads_it_too(old):
    from examples.read_with_h5py import read_row

    key, classes, p, _ = read_row(old / "labels", None)
    dense = LabelStore(old / "labels").read([0]).dense()[0]
    assert key == "class0/0.png"
    np.testing.assert_allclose(p, dense[classes], atol=1e-6)


def test_a_run_does_not_go_on_in_it(old, config):
    with pytest.raises(MismatchError, match="format_version"):
        label_images(old / "images", old / "labels", dataclasses.replace(config, shard_size=3))


def test_its_shards_differ_from_format_2_by_their_version(old, images, tmp_path, config):
    label_images(images, tmp_path / "new", config)
    plans = [json.loads((path / "plan.json").read_text()) for path in (old / "labels", tmp_path / "new")]
    versions = [plan["meta"]["format_version"] for plan in plans]
    assert versions == ["1.0", "2.0"]
