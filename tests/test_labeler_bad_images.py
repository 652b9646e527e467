"""Bad and odd images: each is labeled or named in the quarantine, and the good ones' labels are all there."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import tally
from PIL import Image
from tiny import ColourTeacher, encoded, make_images, picture

from labeler import InputError, LabelStore, TeacherConfig, TeacherError, label_images
from labeler.checks.verify import verify_store
from labeler.sources.decoding.check_header import check_header
from labeler.sources.decoding.create_decoder import create_decoder
from labeler.sources.decoding.decoder import DecodeSettings, teacher_region
from labeler.sources.folder_source import find_images
from labeler.sources.image_source import BadImage, image_digest

PICTURE = picture(7, 48, 64)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def with_alpha() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(48 * 64).reshape(48, 64).astype(np.uint8)))
    return image


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encoded(PICTURE)
GREY16 = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)

GOOD = {
    "plain.jpg": JPEG,
    "progressive.jpg": encoded(PICTURE, progressive=True),
    "cmyk.jpg": encoded(PICTURE.convert("CMYK")),
    "grey.jpg": encoded(PICTURE.convert("L")),
    "palette.png": encoded(PICTURE.convert("P"), "PNG"),
    "alpha.png": encoded(with_alpha(), "PNG"),
    "grey16.png": encoded(GREY16, "PNG"),
    "rotated.jpg": encoded(PICTURE, exif=exif(6)),
    "rotated.png": encoded(PICTURE, "PNG", exif=exif(8)),
    "really-a-png.jpg": encoded(PICTURE, "PNG"),
    "web.webp": encoded(PICTURE, "WEBP", lossless=True),
    "bitmap.bmp": encoded(PICTURE, "BMP"),
    "UPPER.JPEG": JPEG,
    "two words & more.jpg": JPEG,
    "many.dots.in.a.name.jpg": JPEG,
    "größe-写真.jpg": JPEG,
    "new\nline.jpg": JPEG,
    "bit flipped.jpg": JPEG[:-100] + bytes([JPEG[-100] ^ 4]) + JPEG[-99:],
}
BAD = {
    "truncated.jpg": (JPEG[:-200], "truncated"),
    "cut in its header.jpg": (JPEG[:300], "broken header"),
    "without its end.jpg": (JPEG[:-2], "truncated"),
    "truncated.png": (encoded(PICTURE, "PNG")[:-2000], "cannot be decoded"),
    "zero bytes.jpg": (b"", "empty file"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "text.jpg": (b"no image at all\n" * 20, "not an image"),
    "moving.gif": (encoded(PICTURE, "GIF"), "GIF"),
    "1x1.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "20000x1.png": (encoded(Image.new("RGB", (20000, 1)), "PNG"), "too small"),
    "bomb.png": (png_of(60000, 60000), "bomb"),
    "large.png": (png_of(12000, 9000), "too large"),
    "headerless.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for name, data in {**GOOD, **{name: data for name, (data, _) in BAD.items()}}.items():
        (root / name).write_bytes(data)
    (root / "a folder.jpg").mkdir()
    (root / "a folder.jpg" / "inside.jpg").write_bytes(JPEG)
    (root / "notes.txt").write_text("left alone")
    (root / "broken link.jpg").symlink_to(root / "absent.jpg")
    (root / "link out.jpg").symlink_to("/etc/hostname")
    (root / "link inside.jpg").symlink_to(root / "plain.jpg")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.jpg")).write_bytes(JPEG)
    os.mkfifo(root / "pipe.jpg")
    return root


GOOD_KEYS = sorted([*GOOD, "a folder.jpg/inside.jpg", "link inside.jpg"])
LISTED = {
    "broken link.jpg": "broken link",
    "link out.jpg": "leaves the image root",
    "caf\\xe9.jpg": "not valid UTF-8",
    "pipe.jpg": "not a regular file",
}


@pytest.mark.fault(16)
@pytest.mark.parametrize("decoder", ["dali", "cpu", "pil"])
def test_every_bad_image_is_named_and_every_good_one_labeled(corpus, tmp_path, config, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    config = dataclasses.replace(config, decoder=decoder, batch_size=8, shard_size=100)
    summary = label_images(corpus, tmp_path / "labels", config)
    labels = LabelStore(tmp_path / "labels")
    assert labels.keys == GOOD_KEYS
    reasons = {entry["key"]: entry["reason"] for entry in labels.quarantine}
    expected = {**{name: word for name, (_, word) in BAD.items()}, **LISTED}
    assert sorted(reasons) == sorted(expected)
    assert {name: word for name, word in expected.items() if word not in reasons[name]} == {}
    assert (summary.rows, summary.quarantined, summary.other_files) == (len(GOOD_KEYS), len(expected), 1)
    lines = (tmp_path / "labels" / "quarantine.jsonl").read_text().split("\n")[:-1]
    assert {json.loads(line)["key"] for line in lines} == set(expected)
    assert verify_store(tmp_path / "labels", corpus).problems == ()
    with pytest.raises(KeyError, match="truncated"):
        labels.row_of("truncated.jpg")


@pytest.mark.fault(18)
def test_both_decoders_give_the_same_pixels():
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    for view in ("full", "center"):
        settings = DecodeSettings(24, view, crop_pct=0.8, interpolation="bicubic")
        fast = create_decoder("dali", settings)(list(GOOD.values()))
        plain = create_decoder("pil", settings)(list(GOOD.values()))
        assert fast.kept == plain.kept == list(range(len(GOOD)))
        np.testing.assert_array_equal(fast.sizes, plain.sizes)
        difference = (fast.pixels.int() - plain.pixels.int()).abs().float()
        assert difference.mean(dim=(1, 2, 3)).max() < 0.5  # of 255
    tally(18, injected=1)


@pytest.mark.fault(18)
def test_orientation_can_be_ignored_by_both():
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    for name in ("dali", "pil"):
        for orientation, size in (("exif", [64, 48]), ("ignore", [48, 64])):
            decode = create_decoder(name, DecodeSettings(8, orientation=orientation))
            assert decode([GOOD["rotated.jpg"]]).sizes.tolist() == [size]


def test_the_centre_view_stores_the_region_that_the_teacher_saw(tmp_path, config):
    images = make_images(tmp_path / "images", 3)
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, view="center"))
    label_images(images, tmp_path / "labels", config)
    labels = LabelStore(tmp_path / "labels")
    for (height, width), region in zip(labels.column("image_size"), labels.column("region"), strict=True):
        y0, x0, y1, x1 = region
        side = 0.875 * min(height, width)
        np.testing.assert_allclose([(y1 - y0) * height, (x1 - x0) * width], side, rtol=1e-5)
        np.testing.assert_allclose([(y0 + y1) / 2, (x0 + x1) / 2], 0.5, rtol=1e-5)
    assert teacher_region(30, 60, "full", 0.9) == (0.0, 0.0, 1.0, 1.0)


def test_no_images_at_all_is_an_error_before_any_work(tmp_path, config):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        label_images(tmp_path / "empty", tmp_path / "labels", config)
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(InputError, match="not a folder"):
            label_images(path, tmp_path / "labels", config)
    assert not (tmp_path / "labels").exists()


def test_only_bad_images_give_an_empty_store_with_a_full_quarantine(tmp_path, config):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"text")
    summary = label_images(tmp_path / "images", tmp_path / "labels", config)
    assert (summary.rows, summary.quarantined) == (0, 1)
    assert len(LabelStore(tmp_path / "labels").read([])) == 0
    assert verify_store(tmp_path / "labels").problems == ()


@pytest.mark.fault(19)
def test_a_file_that_changes_during_the_run_is_not_labeled(tmp_path, config):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    source = find_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(JPEG[:-1])
    with pytest.raises(BadImage, match="changed after the run began"):
        source.read(0)


def test_the_fingerprint_sees_names_and_sizes(tmp_path):
    root = make_images(tmp_path / "images", 4)
    before = find_images(root).fingerprint
    assert find_images(root).fingerprint == before
    path = next(root.rglob("*.jpg"))
    path.write_bytes(path.read_bytes() + b"\0")
    assert find_images(root).fingerprint != before
    assert image_digest(b"a") != image_digest(b"b")


def test_a_list_chooses_images(tmp_path, config):
    images = make_images(tmp_path / "images", 6)
    listed = tmp_path / "list.txt"
    listed.write_text("class1/img001.jpg\nclass0/img003.jpg\n\n")
    label_images(images, tmp_path / "labels", dataclasses.replace(config, image_list=str(listed)))
    assert LabelStore(tmp_path / "labels").keys == ["class0/img003.jpg", "class1/img001.jpg"]


def test_headers_are_judged_without_decoding():
    with pytest.raises(BadImage, match="too large"):
        check_header(png_of(9000, 12000), 8, 100_000_000)
    check_header(png_of(9000, 12000), 8, 200_000_000)


class Standardising(ColourTeacher):
    """Divides by each image's own spread, which a black one has not: its scores are NaN, in one cell only."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        maps = super().score_maps(images)
        maps[:, 0, 0, 0] /= (images.std((1, 2, 3)) > 0).float()
        return maps


def standardising_teacher() -> torch.nn.Module:
    return Standardising()


def test_an_image_whose_scores_are_not_finite_is_quarantined_and_no_other(images, tmp_path, config):
    black = Image.new("RGB", (40, 40))
    keys = ["class0/img000.jpg", "class2/img011.jpg"]  # the first of a batch, and a batch of its own
    for key in keys:
        (images / key).write_bytes(encoded(black))
    settings = dataclasses.replace(config, teacher=TeacherConfig("test_labeler_bad_images:standardising_teacher"))
    summary = label_images(images, tmp_path / "labels", settings)
    store = LabelStore(tmp_path / "labels")
    reason = "the teacher's scores are not finite"
    assert store.quarantine == [{"key": key, "reason": reason} for key in keys]
    assert (summary.rows, summary.quarantined) == (10, 2)
    assert np.isfinite([summary.kl, summary.coverage]).all()
    assert verify_store(tmp_path / "labels", images, relabel=10, device="cpu").problems == ()


def test_a_teacher_without_any_finite_score_is_told_at_once(tmp_path, config):
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(Image.new("RGB", (40, 40)), "PNG"))
    settings = dataclasses.replace(config, teacher=TeacherConfig("test_labeler_bad_images:standardising_teacher"))
    with pytest.raises(TeacherError, match="no finite scores for a whole batch"):
        label_images(tmp_path / "images", tmp_path / "labels", settings)
    with pytest.raises(InputError, match="`std` must be positive"):
        TeacherConfig("tiny:colour_teacher", std=(0.5, 0.0, 0.5))
