"""One definition of an image: both decoders of the labeler and both loaders see the same pixels and refuse the same."""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_images import PICTURE, RGB, bad_files, good_files, turned, with_faulty_exif
from conftest import SHARED
from faults import tally
from tiny import encoded, make_images, picture

from labeler import IntegrityError, LabelerConfig, LabelStore, label_images
from labeler.sources.decoding.create_decoder import create_decoder
from labeler.sources.decoding.decoder import DecodeSettings
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.decoding.plain_files import plain_file
from pipeline import LoaderConfig, create_loader

SIDE = 32
AGREE = 2.0  # of 255, mean over an image: what two ways to resize may differ by

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, over odd files


@pytest.fixture(scope="module")
def good() -> dict[str, tuple[bytes, np.ndarray]]:
    return good_files()


def write(root: Path, files: dict[str, bytes]) -> Path:
    (root / "c").mkdir(parents=True)
    for name, data in files.items():
        (root / "c" / name).write_bytes(data)
    return root


def settings(images: Path, store: Path | None, **changes: object) -> LoaderConfig:
    whole = {"train": False, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "mix": "none", "auto_augment": "none", "progress": False}
    plain |= {"batch_size": 8, "image_size": SIDE, "grid": (4, 4), "device": "cpu", "threads": 2}
    config = LoaderConfig(str(images), store and str(store), **whole, **plain)
    return replace(config, **changes)


def seen_by(config: LoaderConfig) -> dict[str, np.ndarray]:
    """Key -> float [S, S, 3] of 0 to 255: what the network sees of each image."""
    shown = {}
    for batch in create_loader(config):
        shown |= dict(zip(batch.keys, batch.images.permute(0, 2, 3, 1).numpy() * 255, strict=True))
    return shown


def labeled_by_both(images: Path, folder: Path, config: LabelerConfig) -> list[LabelStore]:
    stores = []
    for decoder in ("pil", "dali"):
        label_images(images, folder / decoder, replace(config, decoder=decoder, batch_size=8, shard_size=300))
        stores.append(LabelStore(folder / decoder))
    return stores


def all_ways_agree(images: Path, folder: Path, config: LabelerConfig) -> list[LabelStore]:
    """Label with PIL and with DALI, load with both backends, compare them image by image; returns the two stores."""
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    stores = labeled_by_both(images, folder, config)
    assert stores[0].keys == stores[1].keys
    assert stores[0].quarantine == stores[1].quarantine
    np.testing.assert_array_equal(stores[0].column("image_size"), stores[1].column("image_size"))
    keys = stores[0].keys
    files = [(images / key).read_bytes() for key in keys]
    ways = {}
    for name in ("pil", "cpu", "dali"):
        decode = create_decoder(name, DecodeSettings(SIDE, batch_size=len(files)))
        ways[f"labeler, {name}"] = dict(zip(keys, decode(files).pixels.numpy().astype(float), strict=True))
    for backend, store in itertools.product(("pil", "cpu", "dali"), stores):
        ways[f"loader, {backend}, {store.path.name}"] = seen_by(settings(images, store.path, backend=backend))
    wrong = [
        f"{key}: {one}, {two}"
        for (one, a), (two, b) in itertools.combinations(ways.items(), 2)
        for key in keys
        if np.abs(a[key] - b[key]).mean() > AGREE
    ]
    assert wrong == []
    for seed in range(2):  # the windows that are drawn for training are the same: so must be what they show
        training = settings(images, stores[0].path, train=True, seed=seed, batch_size=1)
        crops = [seen_by(replace(training, backend=backend)) for backend in ("pil", "dali", "cpu")]
        assert [key for key in keys if (crops[0][key] != crops[2][key]).any()] == []
        assert [key for key in keys if np.abs(crops[0][key] - crops[1][key]).mean() > AGREE] == []
    return stores


@pytest.mark.fault(18)
def test_each_format_is_read_by_its_definition(good):
    for name, (data, expected) in good.items():
        pixels = np.asarray(open_rgb(data, "exif"))
        assert pixels.shape == expected.shape, name
        assert np.abs(pixels.astype(int) - expected).mean() <= AGREE, name
    for kind in ("jpg", "png", "webp", "tif"):
        for tag in range(9):
            stored = np.asarray(open_rgb(good[f"turned {tag}.{kind}"][0], "ignore")).astype(int)
            assert np.abs(stored - RGB).mean() <= AGREE


@pytest.mark.fault(16)
@pytest.mark.fault(18)
def test_every_labeled_file_is_seen_alike_by_all_and_the_others_are_refused_by_all(good, tmp_path, config):
    bad = bad_files()
    images = write(tmp_path / "images", {**{name: data for name, (data, _) in good.items()}, **bad})
    stores = all_ways_agree(images, tmp_path, config)
    assert {entry["key"] for entry in stores[0].quarantine} == {f"c/{name}" for name in bad}
    assert len(stores[0]) == len(good)
    sizes = {f"c/{name}": list(expected.shape[:2]) for name, (_, expected) in good.items()}
    assert dict(zip(stores[0].keys, stores[0].column("image_size").tolist(), strict=True)) == sizes
    tally(18, injected=len(good) + len(bad))


def test_without_labels_both_loaders_see_the_same_and_name_the_same_file(good, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    images = write(tmp_path / "images", {name: data for name, (data, _) in good.items()})
    shown = [seen_by(settings(images, None, backend=backend)) for backend in ("pil", "dali")]
    assert list(shown[0]) == list(shown[1])
    assert [key for key in shown[0] if np.abs(shown[0][key] - shown[1][key]).mean() > AGREE] == []
    for name, data in bad_files().items():
        alone = write(tmp_path / name, {name: data})
        for backend in ("pil", "cpu", "dali"):
            with pytest.raises(IntegrityError, match=f"/c/{name}' cannot be used"):
                seen_by(settings(alone, None, backend=backend))


@pytest.mark.fault(18)
def test_files_from_other_projects_tests_are_seen_alike(tmp_path, config):
    archive = SHARED / "data" / "awkward-images.zip"
    if not archive.exists():
        pytest.skip(f"awkward images are not at hand ({archive.name} in {archive.parent})")
    zipfile.ZipFile(archive).extractall(tmp_path / "images")
    stores = all_ways_agree(tmp_path / "images", tmp_path, config)
    refused = {entry["key"] for entry in stores[0].quarantine}
    assert refused == {"a/10ct_32bit_128.tiff", "a/16bit.s.tif"}  # floating point; signed
    tally(18, injected=len(stores[0]))


def test_dali_gets_ordinary_jpegs_and_pngs_as_they_are_and_no_others(good):
    untouched = ["plain.jpg", "progressive.jpg", "restarts.jpg", "full colour.jpg", "grey.jpg"]
    untouched += ["rgb.png", "grey.png", "gamma and profile.png", "short of its check sum.png"]
    for name, (data, _) in good.items():
        if name in untouched:
            assert plain_file(data) is data, name
        elif name.startswith(("turned", "faulty", "no exif")) and name.endswith(".jpg"):
            assert plain_file(data).count(b"Exif") == (name[7] in "2345678"), name
        else:
            assert plain_file(data) is None, name
    assert [name for name, data in bad_files().items() if plain_file(data)] == []
    # No byte of a header can be flipped or cut so that an exception comes out.
    rng = np.random.default_rng(0)
    for data in (with_faulty_exif(6), good["gamma and profile.png"][0]):
        for place in rng.integers(0, 700, 2000).tolist():
            damaged = bytearray(data)
            damaged[place] = rng.integers(256)
            plain_file(bytes(damaged))
            plain_file(data[:place])


@pytest.mark.parametrize("tag", range(9))
def test_a_faulty_exif_block_turns_an_image_for_dali_as_for_pil(tag):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    decode = create_decoder("dali", DecodeSettings(SIDE))
    shown = decode([with_faulty_exif(tag)])
    assert shown.sizes.tolist() == [list(turned(RGB, tag).shape[:2])]
    upright = decode([encoded(PICTURE, quality=95)]).pixels.numpy()[0]
    assert np.abs(shown.pixels.numpy()[0].astype(int) - turned(upright, tag)).mean() <= AGREE


def refuse_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files go to DALI as they are, as if the check of their heads knew nothing."""
    monkeypatch.setattr("labeler.sources.decoding.decode_dali.plain_file", lambda data: data)
    monkeypatch.setattr("pipeline.backends.dali_backend.plain_file", lambda data: data)


def test_an_image_that_dali_refuses_all_the_same_is_decoded_by_pil(good, tmp_path, config, monkeypatch, caplog):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    images = make_images(tmp_path / "images", 12)
    for i in (3, 4, 10):
        (images / f"class{i % 3}" / f"img{i:03d}.jpg").write_bytes(good["run lengths.bmp"][0])
    refuse_less(monkeypatch)
    store = labeled_by_both(images, tmp_path, config)[1]
    assert len(store) == 12
    for train in (False, True):
        config = settings(images, store.path, train=train, batch_size=2, prefetch=3)
        shown = [seen_by(replace(config, backend=backend)) for backend in ("pil", "dali")]
        assert len(shown[0]) == len(shown[1]) == 12
        assert all(np.abs(shown[0][key] - shown[1][key]).mean() <= AGREE for key in shown[0])
    assert "DALI cannot decode 'class0/img003.jpg'" in caplog.text
    # What others were waiting with it changes no bit of a batch.
    loader, resumed = create_loader(config), create_loader(config)
    batches = list(create_loader(config))
    for _ in itertools.islice(loader, 3):
        pass
    resumed.load_state_dict(loader.state_dict())
    for batch, expected in zip(resumed, batches[3:], strict=True):
        assert torch.equal(batch.images, expected.images)


def test_an_image_that_all_refuse_is_named_and_the_batches_before_it_come(good, tmp_path, config, monkeypatch):
    """Without labels, where nobody has looked at the images before."""
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    images = make_images(tmp_path / "images", 12)
    (images / "class0" / "img003.jpg").write_bytes(good["run lengths.bmp"][0])
    (images / "class2" / "img008.jpg").write_bytes(encoded(picture(8))[:-300])
    refuse_less(monkeypatch)
    seen: list[str] = []

    def collect() -> None:
        for batch in create_loader(settings(images, None, batch_size=1, prefetch=1)):
            seen.extend(batch.keys)

    with pytest.raises(IntegrityError, match=r"/class2/img008\.jpg'.*cannot be decoded"):
        collect()
    assert seen[:2] == ["class0/img000.jpg", "class0/img003.jpg"]
    assert "class2/img002.jpg" in seen


def test_labels_of_another_size_than_the_image_has_are_refused_by_name(good, tmp_path, config, monkeypatch):
    """As DALI once labeled a fax of 88 rows as one of 590."""
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    images = write(tmp_path / "images", {"a.tif": good["fax.tif"][0]})
    with monkeypatch.context() as patch:
        squeezed = lambda data, _: open_rgb(data, "exif").resize((20, 20))  # noqa: E731
        patch.setattr("labeler.sources.decoding.decode_reference.open_rgb", squeezed)
        label_images(images, tmp_path / "labels", config)
    for backend in ("pil", "dali"):
        with pytest.raises(IntegrityError, match=r"/images/c/a\.tif'.*48×64 pixels instead of 20×20.*Label it again"):
            seen_by(settings(images, tmp_path / "labels", backend=backend))
