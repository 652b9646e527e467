"""The report: its figures are those of the store, and its page is whole."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ColourTeacher, make_images

from labeler import InputError, LabelStore, TeacherConfig, import_token_label_files, label_images
from labeler.__main__ import main
from labeler.report.charts import curve, scatter
from labeler.report.figures import cell_classes, check_truth, draw_sample
from labeler.report.page import write_report
from labeler.report.truth import costs_of, palette_curve, reference_bytes, totals, truth_cards
from labeler.store.encoder import reference_kl


class ManyClasses(ColourTeacher):
    """Forty classes by colour, more than a palette and a tail hold."""

    num_classes = 40

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(2 * torch.randn(40, 3, generator=generator), requires_grad=False)
        self.bias = torch.nn.Parameter(2 * torch.randn(40, 1, 1, generator=generator), requires_grad=False)

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        return super().score_maps(images) + self.bias


def many_classes() -> torch.nn.Module:
    return ManyClasses()


@pytest.fixture
def sparse(images, tmp_path, config):
    """A store whose maps have codes, cells that count as background, a tail, and classes in none of them."""
    wanted = dataclasses.replace(
        config, teacher=TeacherConfig("test_labeler_report:many_classes"), palette=7, tail=9, levels=20, threshold=3e-3
    )
    label_images(images, tmp_path / "sparse", wanted)
    return tmp_path / "sparse"


@pytest.fixture
def imported(images, tmp_path):
    """A `logit` store of the reference's files."""
    for i, path in enumerate(sorted(images.rglob("*.jpg"))):
        values, ids = (3 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(i))).topk(5, dim=0)
        target = (tmp_path / "maps" / path.relative_to(images)).with_suffix(".pt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([values.half(), ids.half()]), target)
    import_token_label_files(tmp_path / "maps", images, tmp_path / "imported", num_classes=50, progress=False)
    return tmp_path / "imported"


def read_page(store, images, path, **options) -> str:
    """The page, whole."""
    write_report(store, images, path, **options)
    page = path.read_text()
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert "nan" not in re.sub(r"data:[^\"]*|<style>.*?</style>", "", page, flags=re.S).lower().split()
    return page


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


def test_a_map_of_more_classes_than_are_named_says_that_the_grey_ones_are_others(store, imported, images, tmp_path):
    """At most four classes are told apart by colours; the small teacher names fewer."""
    for labels in (LabelStore(store), LabelStore(imported)):
        page = read_page(labels.path, images, tmp_path / "report.html")
        legends = re.findall(r'<div class="legend">(.*?)</div>', page)
        first = [set(one.ravel().tolist()) for one in draw_sample(labels, 500, 0).top1]
        assert len(legends) == len(first)
        for legend, classes in zip(legends, first, strict=True):
            others = re.findall(r'rgb\(128, 128, 128\)"></i>(\d+) more', legend)
            assert others == ([str(len(classes) - 4)] if len(classes) > 4 else [])
    assert any(len(classes) > 4 for classes in first)


@pytest.mark.parametrize("name", ["store", "sparse", "imported"])
def test_the_sample_is_the_dense_distribution_in_short(request, name):
    labels = LabelStore(request.getfixturevalue(name))
    sample = draw_sample(labels, 100, seed=0)
    maps = labels.read(sample.rows)
    dense = maps.dense().astype(np.float64)
    np.testing.assert_allclose(sample.confidence, dense.max(1), rtol=1e-4)
    np.testing.assert_allclose(sample.entropy, -(dense * np.log(dense)).sum(1), atol=1e-4)
    np.testing.assert_allclose(sample.p.sum(1) + sample.tail + sample.left, 1, atol=1e-5)
    of_first = np.take_along_axis(dense, sample.top1[:, None], 1)[:, 0]
    np.testing.assert_allclose(of_first, dense.max(1), rtol=1e-4)
    left, in_tail = np.zeros_like(sample.left, float), np.zeros_like(sample.left, float)
    for image in range(len(dense)):
        palette, tail = maps.classes[image].tolist(), maps.tail_classes[image].tolist()
        for number in range(dense.shape[1]):
            place = palette.index(number) if number in palette else None
            if number in tail:
                in_tail[image] += dense[image, number]
            elif place is None:
                left[image] += dense[image, number]
            else:  # what counts as background in a cell is not named there
                left[image] += dense[image, number] * (maps.scores[image, place] == maps.background[image])
    np.testing.assert_allclose(sample.left, left, atol=1e-5)
    np.testing.assert_allclose(sample.tail, in_tail, atol=1e-5)
    classes, share = sample.named
    for image in range(len(dense)):
        used = classes[image] >= 0
        np.testing.assert_allclose(share[image, used], dense[image, classes[image, used]].mean((1, 2)), atol=1e-6)
        assert (share[image, ~used] == 0).all()
    if name == "sparse":
        assert 0.02 < in_tail.mean() < 0.5
        assert left.mean() > 0.01
        assert ((maps.classes >= 0)[:, :, None, None] & (sample.p == 0)).any()
        assert 1 - left.mean() == pytest.approx(totals(labels)["coverage"] / len(labels), abs=5e-3)


def test_the_palettes_curve_goes_by_share_and_not_by_place(sparse):
    sample = draw_sample(LabelStore(sparse), 100, seed=0)
    share = sample.p.mean((2, 3))
    assert (np.diff(share, axis=1) > 0).any()
    figure = palette_curve(sample)
    shown = [float(value) / 100 for value in re.findall(r"<title>\d+: ([\d.]+)%", figure)]
    assert shown[0] == pytest.approx(share.max(1).mean(), abs=1e-4)
    assert shown[-1] == pytest.approx(sample.p.sum(1).mean(), abs=1e-4)
    gains = np.diff([0.0, *shown])
    assert (np.diff(gains) < 1e-4).all()
    assert f"the tail has {sample.tail.mean():.1%} more" in figure


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
    assert "object cells have the right class" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="no truth"):
        check_truth(sample, tmp_path)


def test_true_maps_that_cannot_be_used_are_named(store, tmp_path):
    sample = draw_sample(LabelStore(store), 12, seed=0)
    path = (tmp_path / sample.keys[0]).with_suffix(".png")
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(
        InputError, match=rf"{path.name}' is not an image of class ids: got uint8 \(8, 8, 3\), expected"
    ):
        check_truth(sample, tmp_path)
    for data in (b"text", path.read_bytes()[:40]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{path.name}' cannot be read: got .*, expected a PNG of class ids"):
            check_truth(sample, tmp_path)


def test_a_page_that_cannot_be_written_is_one_line(store, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(store), "--images", str(images), "--out", str(tmp_path / "file" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "page.html' cannot be written: got " in said
    assert said.count("\n") == 1


def test_a_long_quarantine_is_cut_and_says_how_much_is_left(images, tmp_path, config):
    for i in range(203):
        (images / "class0" / f"bad{i:03}.jpg").write_bytes(b"text")
    label_images(images, tmp_path / "labels", config)
    page = read_page(tmp_path / "labels", images, tmp_path / "report.html")
    assert "203 images could not be labeled" in page
    assert "bad199.jpg" in page
    assert "bad200.jpg" not in page
    assert "and 3 more, see quarantine.jsonl" in page


def test_missing_images_and_the_quarantine_are_shown(images, tmp_path, config):
    (images / "class0" / "<bad>.jpg").write_bytes(b"text")
    label_images(images, tmp_path / "labels", dataclasses.replace(config))
    gone = LabelStore(tmp_path / "labels").keys[0]
    (images / gone).unlink()
    write_report(tmp_path / "labels", images, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;bad&gt;.jpg" in page
    assert "No such file" in page


def test_names_of_files_and_classes_are_text_wherever_they_stand_on_the_page(images, tmp_path, config):
    """In legends, charts and tables, of images that have a row, have none, or are no longer there."""
    names = [f"<script>{i}" for i in range(6)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    folder = next(path for path in sorted(images.iterdir()) if path.is_dir())
    first = sorted(folder.glob("*.jpg"))
    first[0].rename(folder / "<script>a&b.jpg")
    first[1].rename(folder / "<script>gone.jpg")
    (folder / "<script>bad.jpg").write_bytes(b"text")
    label_images(images, tmp_path / "labels", dataclasses.replace(config, class_names=str(tmp_path / "names.txt")))
    (folder / "<script>gone.jpg").unlink()
    page = read_page(tmp_path / "labels", images, tmp_path / "report.html", title="<script>")
    assert "<script" not in page
    for text in ("&lt;script&gt;a&amp;b.jpg", "&lt;script&gt;gone.jpg", "&lt;script&gt;bad.jpg", "&lt;script&gt;0"):
        assert text in page


def test_cards_say_what_the_markers_sum_up(sparse, images, tmp_path, config):
    labels = LabelStore(sparse)
    page = read_page(sparse, images, tmp_path / "report.html")
    sums = {name: sum(m.stats[name] for m in labels.markers) for name in labels.markers[0].stats}
    for figure, words in (
        (f"{sums['kl'] / 12:.4f}", "nats lost per cell"),
        (f"{sums['compared_kl'] / sums['reference_kl']:.2f}", "five float16 logits per cell"),
        (f"{sums['coverage'] / 12:.1%}", "have a code or a tail slot"),
        (f"{sums['first_kept'] / 12:.1%}", "of cells keep the teacher’s first class"),
    ):
        assert re.search(rf"<b>{re.escape(figure)}</b><span>[^<]*{words}", page), words
    label_images(
        images, tmp_path / "planes", dataclasses.replace(config, precision="float16", threshold=None, levels=None)
    )
    assert [words for _, words in truth_cards(LabelStore(tmp_path / "planes")) if "are in the palette" in words]


def test_an_imported_store_has_a_page_without_a_teachers_figures(imported, images, tmp_path):
    assert truth_cards(LabelStore(imported)) == []
    page = read_page(imported, images, tmp_path / "report.html")
    assert "nats lost per cell" not in page
    assert "--audit" not in page
    assert "Probability that the palette covers" in page
    with pytest.raises(InputError, match="was imported"):
        write_report(imported, images, tmp_path / "r.html", audit=3, device="cpu", trusted=True)


def test_other_images_are_an_error_and_some_missing_ones_a_note(store, images, tmp_path, capsys):
    command = ["report", str(store), "--out", str(tmp_path / "r.html"), "--images"]
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "not a folder of images" in capsys.readouterr().err
    (tmp_path / "others").mkdir()
    assert main([*command, str(tmp_path / "others")]) == 2
    assert "none of the store's images" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    for key in LabelStore(store).keys[:5]:
        (images / key).unlink()
    assert main([*command, str(images), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sampled"], told["missing"], told["audit"]) == (12, 5, None)
    assert "5 of the 12 sampled images were not found" in (tmp_path / "r.html").read_text()


def test_a_folder_of_other_images_is_refused_and_a_sample_that_is_missing_is_not_the_whole_store(
    store, images, tmp_path, capsys
):
    command = ["report", str(store), "--out", str(tmp_path / "r.html"), "--sample", "3", "--images"]
    others = make_images(tmp_path / "others", 12)
    for i, path in enumerate(sorted(others.rglob("*.jpg"))):
        path.rename(path.with_name(f"other{i}.jpg"))
    assert main([*command, str(others)]) == 2
    told = capsys.readouterr().err
    assert "none of the store's images is below" in told
    assert "got 0 of 12, expected for example 'class" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
    for key in draw_sample(LabelStore(store), 3, 0).keys:
        (images / key).unlink()
    assert main([*command, str(images)]) == 0
    assert "3 of 3 sampled images were not found" in capsys.readouterr().err
    assert "3 of the 3 sampled images were not found" in (tmp_path / "r.html").read_text()


def test_an_audit_stands_on_the_page_with_what_more_bytes_would_buy(sparse, images, tmp_path, capsys):
    page = read_page(sparse, images, tmp_path / "without.html")
    assert "How accurate the labels are" not in page
    assert "--audit 48" in page
    command = ["report", str(sparse), "--images", str(images), "--device", "cpu", "--quiet", "--audit", "8", "--json"]
    assert main([*command, "--out", str(tmp_path / "r.html")]) == 0
    found = json.loads(capsys.readouterr().out)["audit"]
    page = read_page(sparse, images, tmp_path / "r.html", audit=8, device="cpu")
    assert "How accurate the labels are" in page
    for words in (
        f"Storage, {found['storage']:.3f} nats",
        f"Mirror, {found['mirror']:.3f} nats",
        "at 50% of the sides",
    ):
        assert words in page
    assert page.count("this store") >= 2  # the name of its point and what it says when pointed at
    assert "top-5 files" in page


def test_points_of_the_cost_chart_are_measured(sparse, images, tmp_path):
    from labeler.checks.audit import audit_labels

    labels = LabelStore(sparse)
    audit, logits = audit_labels(labels, images, 12, device="cpu")
    costs = costs_of(labels, logits, audit)
    assert costs.images == 12
    sizes, errors = np.array([c.bytes for c in costs.several]), np.array([c.kl for c in costs.several])
    assert (np.diff(sizes) >= 0).all()
    assert sizes[-1] > sizes[0]
    assert (np.diff(errors) < 1e-3).all()  # the palette of seven, not the threshold, is what the finest lack
    assert errors[-1] < errors[0]
    assert costs.own == (sum(path.stat().st_size for path in sparse.glob("shard-*.h5")) / 12, audit.storage)
    torch.save(torch.zeros(2, 5, 4, 4, dtype=torch.float16), tmp_path / "map.pt")
    assert costs.reference[0] == reference_bytes((4, 4)) == pytest.approx((tmp_path / "map.pt").stat().st_size, abs=128)
    assert costs.reference[1] == pytest.approx(float(reference_kl(logits).mean()), rel=1e-5)


def test_charts_keep_their_points_inside():
    marks = [(900.0, 0.2, "this <store>"), (8005.0, 0.9, "top-5 files")]
    figure = scatter([(500.0, 0.3, "a"), (1000.0, 0.18, "b"), (4000.0, 0.05, "c")], marks, "label")
    assert "this &lt;store&gt;" in figure
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', figure)]
    assert len(places) == 5
    assert all(44 <= x <= 360 and 0 <= y <= 156 for x, y in places)
    across = {
        x: place for (x, _, _), (place, _) in zip([(500, 0, 0), (1000, 0, 0), (4000, 0, 0)], places, strict=False)
    }
    assert across[4000] - across[1000] == pytest.approx(2 * (across[1000] - across[500]), abs=0.2)
    assert len(re.findall("<circle", curve([0.5] * 128, "long"))) == 128
