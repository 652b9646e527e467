"""The report: its figures are those of the store, and its page is whole."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from labeler import InputError, LabelStore, label_images
from labeler.report import write_report
from labeler.report_figures import cell_classes, check_truth, draw_sample


class WellFormed(HTMLParser):
    """Every tag that is opened is closed, in order."""

    EMPTY = frozenset({"meta", "img", "br", "rect", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(store, images, tmp_path):
    write_report(store, images, tmp_path / "page" / "report.html", title="A <b>title</b>")
    page = (tmp_path / "page" / "report.html").read_text()
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert "A &lt;b&gt;title&lt;/b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg") == 2 * 12


def test_the_sample_is_the_dense_distribution_in_short(store):
    labels = LabelStore(store)
    sample = draw_sample(labels, 100, seed=0)
    dense = labels.read(sample.rows).dense().astype(np.float64)
    np.testing.assert_array_equal(sample.top1, dense.argmax(1))
    np.testing.assert_allclose(sample.confidence, dense.max(1), rtol=1e-4)
    np.testing.assert_allclose(sample.entropy, -(dense * np.log(dense)).sum(1), atol=1e-4)
    np.testing.assert_allclose(sample.p.sum(1) + sample.left, 1, atol=1e-5)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_cell_classes_against_a_plain_loop(kind):
    random, none = np.random.default_rng(0), np.iinfo(kind).max
    blocks = random.choice([0, 1, 2, none], (6, 9))
    blocks[:3, :4] = none
    truth = np.kron(blocks, np.ones((5, 7), int)).astype(kind)
    region, grid = np.array([0.1, 0.2, 0.9, 1.0]), (4, 5)
    found = cell_classes(truth, region, grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            pixels = [
                truth[y, x]
                for y in range(30)
                for x in range(63)
                if i <= ((y + 0.5) / 30 - 0.1) / 0.8 * 4 < i + 1 and j <= ((x + 0.5) / 63 - 0.2) / 0.8 * 5 < j + 1
            ]
            counts = [pixels.count(c) for c in range(3)]
            best = int(np.argmax(counts))
            assert found[i, j] == (best if 2 * counts[best] > len(pixels) else -1)


def test_truth_made_from_the_maps_themselves_is_always_right(store, images, tmp_path):
    labels = LabelStore(store)
    sample = draw_sample(labels, 12, seed=0)
    for key, top1 in zip(sample.keys, sample.top1, strict=True):
        path = (tmp_path / "truth" / key).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(top1, np.ones((5, 5))).astype(np.uint8)).save(path)
    found = check_truth(sample, tmp_path / "truth")
    assert (found.right, found.images, found.cells) == (1.0, 12, 12 * 16)
    assert found.mirrored < 1
    assert found.transposed is not None
    assert found.transposed < 1
    write_report(store, images, tmp_path / "report.html", truth=tmp_path / "truth")
    assert "right class in the right place" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="no truth"):
        check_truth(sample, tmp_path)


def test_missing_images_and_the_quarantine_are_shown(images, tmp_path, config):
    (images / "class0" / "<bad>.jpg").write_bytes(b"text")
    label_images(images, tmp_path / "labels", dataclasses.replace(config))
    gone = LabelStore(tmp_path / "labels").keys[0]
    (images / gone).unlink()
    write_report(tmp_path / "labels", images, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;bad&gt;.jpg" in page
    assert "No such file" in page
