"""The backend for CPUs: the reference's pixels bit for bit, with and without what makes it fast, and its threads."""

from __future__ import annotations

import gc
import io
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_images import good_files
from fixtures import HAS_NUMBA
from PIL import Image
from tiny import encoded, picture

from labeler.base.one_thread import one_thread
from labeler.sources.decoding import jpeg_pixels as jpeg
from labeler.sources.decoding.create_decoder import automatic_decoder, create_decoder
from labeler.sources.decoding.decoder import DecodeSettings
from labeler.sources.decoding.pixels import open_rgb
from pipeline import Batch, LoaderConfig, create_loader
from pipeline.backends import resize as resizing
from pipeline.backends.batch_memory import BatchMemory
from pipeline.prefetcher import Prefetcher

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg() is None, reason="simplejpeg is not installed")
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, over odd files


@pytest.fixture
def settings(images: Path, store: Path) -> LoaderConfig:
    """Twelve small images of three classes, in batches of four."""
    return LoaderConfig(
        str(images), str(store), batch_size=4, image_size=48, grid=(6, 6), device="cpu", threads=2, progress=False
    )


@pytest.fixture(params=["fast", "without simplejpeg and numba"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it fast is installed, or not."""
    if request.param != "fast":
        monkeypatch.setattr(jpeg, "simplejpeg", lambda: None)
        monkeypatch.setattr(resizing, "kernels", lambda name: None)


def assert_equal(loaded: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in loaded] == [batch.keys for batch in expected]
    for batch, other in zip(loaded, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.allclose(batch.targets.token_scores, other.targets.token_scores, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": False, "interpolation": "bicubic"},
        {"auto_augment": "rand-m9-mstd0.5-inc1-n3-p0.9", "erase_prob": 0.5, "mix": "image"},
        {"auto_augment": "3a", "color_jitter": 0.3, "image_size": 96, "seed": 5},
    ],
)
def test_every_pixel_is_the_references(settings, installed, changes):
    config = replace(settings, **changes)
    loaded, expected = (list(create_loader(replace(config, backend=name))) for name in ("cpu", "pil"))
    assert len(loaded) == 3
    assert_equal(loaded, expected)


def test_files_of_all_kinds_look_as_with_pil_alone(tmp_path, installed):
    """Grey, CMYK, turned by EXIF, progressive, 16 bits, transparent, TIFF, WebP …"""
    (tmp_path / "c").mkdir()
    for name, (data, _) in good_files().items():
        (tmp_path / "c" / name).write_bytes(data)
    for orientation in ("exif", "ignore"):
        config = LoaderConfig(
            str(tmp_path), batch_size=8, image_size=32, grid=(4, 4), device="cpu", threads=2, orientation=orientation,
            progress=False,
        )  # fmt: skip
        loaded, expected = (list(create_loader(replace(config, backend=name))) for name in ("cpu", "pil"))
        assert sum(map(len, loaded)) > 50
        for batch, other in zip(loaded, expected, strict=True):
            assert batch.keys == other.keys
            assert torch.equal(batch.images, other.images)


def test_the_labelers_pixels_are_pils(installed):
    files = [data for data, _ in good_files().values()]
    for view in ("full", "center"):
        fast, plain = (create_decoder(name, DecodeSettings(24, view, crop_pct=0.8))(files) for name in ("cpu", "pil"))
        assert torch.equal(fast.pixels, plain.pixels)
        assert fast.failures == plain.failures
        np.testing.assert_array_equal(fast.sizes, plain.sizes)


@needs_simplejpeg
def test_ordinary_jpegs_alone_are_left_to_simplejpeg():
    taken = set()
    for name, (data, _) in good_files().items():
        pixels = jpeg.jpeg_pixels(data, "exif")
        if pixels is not None:
            taken.add(name)
            np.testing.assert_array_equal(pixels, np.asarray(open_rgb(data, "exif")))
    assert {"plain.jpg", "progressive.jpg", "restarts.jpg", "full colour.jpg", "grey.jpg"} <= taken
    assert all(name.endswith(".jpg") for name in taken)
    assert "turned 6.jpg" not in taken
    assert jpeg.jpeg_pixels(good_files()["turned 6.jpg"][0], "ignore") is not None
    data = encoded(picture(1, 60, 80))
    assert jpeg.jpeg_pixels(data, "exif", size=(60, 80)).shape == (60, 80, 3)
    assert jpeg.jpeg_pixels(data, "exif", size=(80, 60)) is None
    assert jpeg.jpeg_pixels(data[:-40], "exif") is None


@needs_simplejpeg
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}])
def test_decoding_the_rows_above_a_windows_end_changes_none_of_them(how):
    rng = np.random.default_rng(0)
    pixels = np.asarray(picture(3, 90, 70)).astype(int) + rng.integers(-40, 40, (90, 70, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    shorter = 0
    for subsampling in (0, 1, 2):
        data = encoded(image, subsampling=subsampling, **how)
        whole = np.asarray(open_rgb(data, "exif"))
        for rows in (1, 8, 15, 16, 17, 40, 63, 90):
            found = jpeg.jpeg_pixels(data, "exif", rows=rows)
            np.testing.assert_array_equal(found[:rows], whole[:rows])
            shorter += len(found) < 90
    assert shorter == 3 * 7


@needs_numba
@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("side", [20, 64])
def test_the_compiled_resize_is_pillows_bit_for_bit(cubic, side, monkeypatch):
    """Larger, smaller, long and narrow windows, where Pillow resizes the height first, and boxes between pixels."""
    rng = np.random.default_rng(int(cubic))
    pixels = rng.integers(0, 256, (300, 280, 3), dtype=np.uint8)
    whole = (0, 0, 300, 280)
    cases = [((0, 0, h, w), None) for h, w in ((64, 64), (20, 20), (300, 280), (300, 30), (31, 270), (3, 2), (120, 59))]
    cases += [((7, 11, 207, 41), None), (whole, (10.5, 3.25, 200.125, 270.75)), (whole, (0.0, 0.0, 300.0, 33.3))]
    for window, box in cases:
        for flip in (False, True):
            found = resizing.resize(pixels, side, window, box, cubic, flip).reshape(side, side, 4)[..., :3]
            with monkeypatch.context() as patch:
                patch.setattr(resizing, "kernels", lambda name: None)
                expected = resizing.resize(pixels, side, window, box, cubic, flip).reshape(side, side, 4)[..., :3]
            np.testing.assert_array_equal(found, expected, err_msg=f"{window} {box}")


@needs_numba
def test_compiled_normalization_is_torchs_bit_for_bit():
    pixels = torch.arange(256 * 3).reshape(16, 16, 3).byte()
    padded = torch.cat([pixels, torch.full((16, 16, 1), 9).byte()], 2).reshape(16, 64)
    mean, scale, out = np.float32([123.7, 116.3, 103.5]), np.float32([0.0171, 0.0175, 0.0174]), np.empty((3, 16, 16))
    out = out.astype(np.float32)
    resizing.normalize(padded.numpy(), mean, scale, out)
    shape = (3, 1, 1)
    expected = torch.sub(pixels.permute(2, 0, 1), torch.from_numpy(mean).view(shape)) * torch.from_numpy(scale).view(
        shape
    )
    assert torch.equal(torch.from_numpy(out), expected)


def test_auto_is_this_backend_without_a_gpu(settings):
    assert create_loader(settings).backend.name == "cpu"
    assert automatic_decoder("cpu") == "cpu"
    assert replace(settings, backend="dali").backend == "dali"


def working() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("decoding", "batches", "images"))
    ]


def test_a_loader_that_is_dropped_ends_its_threads(settings):
    for left_after in (1, 2):
        batches = iter(create_loader(replace(settings, backend="cpu", batch_size=2, prefetch=1)))
        for _ in range(left_after):
            next(batches)
        assert working()
        del batches
        gc.collect()
        deadline = time.monotonic() + 10
        while working() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert working() == []


def test_a_closed_prefetcher_lets_go_of_who_waits():
    gate = threading.Event()

    def slow():
        gate.wait(10)
        yield 1

    ahead = Prefetcher(slow(), 1)
    seen: list[list[int]] = []
    waiting = threading.Thread(target=lambda: seen.append(list(ahead)), daemon=True)
    waiting.start()
    ahead.close()
    waiting.join(5)
    gate.set()
    assert seen == [[]]


def test_decoding_goes_on_while_a_batch_is_used(settings, monkeypatch):
    """The next batches are ready when the training step is over, and no more than the settings allow."""
    loader = create_loader(replace(settings, backend="cpu", batch_size=2, prefetch=1))
    loaded = []
    load = loader.backend._load
    monkeypatch.setattr(loader.backend, "_load", lambda *work: (load(*work), loaded.append(1))[0])
    batches = iter(loader)
    next(batches)
    before, deadline = -1, time.monotonic() + 10
    while before < len(loaded) and time.monotonic() < deadline:  # until nothing more is loaded
        before = len(loaded)
        time.sleep(0.3)
    assert 2 * 2 <= len(loaded) <= 2 * 4
    assert len(list(batches)) == 5


def test_memory_is_used_again_once_no_tensor_has_it():
    memory = BatchMemory(2)
    first, second, third = (torch.from_numpy(memory.take((2, 3))) for _ in range(3))
    assert len({part.data_ptr() for part in (first, second, third)}) == 3  # the third is not kept
    place = first.data_ptr()
    view = first[1].numpy()
    del first
    assert memory.take((2, 3)).ctypes.data not in (place, second.data_ptr())
    del view
    assert memory.take((3, 2)).ctypes.data != place
    assert memory.take((2, 3)).ctypes.data == place


def test_batches_that_are_kept_stay_as_they_are(settings):
    config = replace(settings, backend="cpu", batch_size=1, prefetch=1)
    kept = list(create_loader(config))
    for batch, other in zip(create_loader(config), kept, strict=True):  # each is given back at once
        assert torch.equal(batch.images, other.images)
    assert len({batch.images.data_ptr() for batch in kept}) == len(kept) == 12


def test_one_thread_is_for_the_caller_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if torch.get_num_threads() != 2:
            pytest.skip("torch has one thread here")
        inside = []
        with one_thread():
            inside.append(torch.get_num_threads())
            other = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert inside == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_jpeg_of_another_size_than_was_labeled_is_named(settings, images, monkeypatch):
    """The bytes are compared with their digest before; this is what the decoder itself notices."""
    loader = create_loader(replace(settings, backend="cpu"))
    wide = io.BytesIO()
    picture(1, 50, 90).save(wide, "JPEG")
    monkeypatch.setattr(type(loader.samples), "read", lambda self, i: wide.getvalue())
    with pytest.raises(Exception, match=r"/images/class.*50×90 pixels instead of"):
        next(iter(loader))
