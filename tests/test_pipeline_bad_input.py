"""What goes wrong with images, labels and settings: a clear error, before the first batch where it can be known."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import tally
from tiny import encoded, make_images, picture

from labeler import InputError, IntegrityError, LabelerConfig, LabelStore, MismatchError, TeacherConfig, label_images
from pipeline import LoaderConfig, create_loader

BACKENDS = ("dali", "cpu", "pil")


@pytest.fixture
def settings(images: Path, store: Path) -> LoaderConfig:
    return LoaderConfig(
        str(images), str(store), batch_size=4, image_size=32, grid=(4, 4), device="cpu", threads=1, train=False
    )


def refused(config: LoaderConfig, kind: type[Exception], *words: str) -> None:
    """Creating the loader raises one line of this kind with these words in it."""
    with pytest.raises(kind) as caught:
        create_loader(config)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def refused_at_the_batch(config: LoaderConfig, *words: str) -> None:
    """The loader can be created; its first epoch raises IntegrityError with these words, and the next one as well."""
    loader = create_loader(config)
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            list(loader)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.fault(34)
def test_a_missing_image_is_named_before_the_first_batch(settings, images):
    (images / "class1/img004.jpg").unlink()
    refused(settings, MismatchError, "1 labeled images are missing", "'class1/img004.jpg'", "image_list")


@pytest.mark.fault(34)
def test_an_image_without_labels_is_named_before_the_first_batch(settings, images):
    (images / "class1/new.jpg").write_bytes(encoded(picture(99)))
    refused(settings, MismatchError, "1 of 13 images have no labels", "'class1/new.jpg'")
    tally(34, injected=1)


def test_a_renamed_image_is_named(settings, images):
    (images / "class1/img004.jpg").rename(images / "class1/other.jpg")
    refused(settings, MismatchError, "'class1/other.jpg'")


@pytest.mark.fault(19)
def test_an_image_of_another_size_on_disk_is_noticed_before_the_first_batch(settings, images):
    (images / "class1/img004.jpg").write_bytes(encoded(picture(99), quality=40))
    refused(settings, MismatchError, "changed after they were labeled", "labeler verify")
    tally(19, injected=1)


@pytest.mark.fault(19)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_byte_is_noticed_at_the_batch_by_name(settings, images, backend):
    path = images / "class1/img004.jpg"
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    refused_at_the_batch(replace(settings, backend=backend), "/images/class1/img004.jpg'", "its bytes have changed")
    tally(19, injected=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_goes_while_the_loader_runs_is_named(settings, images, backend):
    loader = create_loader(replace(settings, backend=backend))
    (images / "class2/img011.jpg").unlink()
    with pytest.raises(IntegrityError, match=re.escape("/images/class2/img011.jpg'")):
        list(loader)
    (images / "class2/img011.jpg").write_bytes(encoded(picture(11, 36 + 11 % 5, 40 + 11 % 7)))
    assert sum(map(len, loader)) == 12  # put back, the same loader goes on


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_without_labels_is_named_at_its_batch(settings, images, backend):
    """No store vouches for it, and its header is whole."""
    path = images / "class0/img006.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    config = replace(settings, store=None, backend=backend)
    refused_at_the_batch(config, "/images/class0/img006.jpg'", "cannot be decoded")
    for seed in range(5):  # whatever part of it a crop shows
        refused_at_the_batch(replace(config, train=True, seed=seed), "/images/class0/img006.jpg'", "cannot be decoded")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batches_before_a_bad_one_are_delivered(settings, images, backend):
    path = images / "class2/img008.jpg"
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    seen: list[str] = []

    def collect() -> None:
        for batch in create_loader(replace(settings, backend=backend, batch_size=1, prefetch=5)):
            seen.extend(batch.keys)

    with pytest.raises(IntegrityError, match=re.escape("/images/class2/img008.jpg'")):
        collect()
    assert seen == [key for key in LabelStore(settings.store).keys if key < "class2/img008.jpg"]


def test_training_goes_on_with_the_batch_that_failed(settings, images):
    """A network disk that was away for a moment costs no image and doubles none."""
    config = replace(settings, train=True)
    expected = [batch.keys for batch in create_loader(config)]
    loader = create_loader(config)
    path = images / expected[1][2]
    kept, seen = path.read_bytes(), []
    path.unlink()
    with pytest.raises(IntegrityError):
        seen += [batch.keys for batch in loader]
    path.write_bytes(kept)
    assert loader.state_dict()["batch"] <= 1
    seen = expected[: loader.state_dict()["batch"]] + [batch.keys for batch in loader]
    assert seen == expected


def test_formats_that_only_one_loader_decodes_are_refused(settings, images):
    (images / "class0/moving.gif").write_bytes(encoded(picture(1), "GIF"))
    refused(replace(settings, store=None), IntegrityError, "/images/class0/moving.gif'", "GIF")


def test_a_missing_class_folder_does_not_shift_the_others(settings, images, tmp_path):
    config = replace(settings, store=None, num_classes=3)
    (tmp_path / "list.txt").write_text("class0/img000.jpg\nclass2/img002.jpg\n")
    (batch,) = create_loader(replace(config, image_list=str(tmp_path / "list.txt")))
    assert batch.labels.tolist() == [0, 2]
    shutil.rmtree(images / "class1")
    refused(config, MismatchError, "2 folders", "3, one for each class", "class_folders")


def test_a_deleted_file_of_the_quarantine_is_no_change(tmp_path, config):
    images = make_images(tmp_path / "images")
    (images / "class0/img000.jpg").write_bytes(b"")
    label_images(images, tmp_path / "labels", config)
    (images / "class0/img000.jpg").unlink()
    settings = LoaderConfig(str(images), str(tmp_path / "labels"), batch_size=4, image_size=32, grid=(4, 4))
    assert len(create_loader(settings).samples) == 11


def test_what_is_no_image_is_named_before_the_first_batch(settings, images):
    (images / "class0/img006.jpg").write_bytes(b"not a picture")
    refused(replace(settings, store=None), IntegrityError, "/images/class0/img006.jpg'", "not an image")
    (images / "class0/img006.jpg").unlink()
    (images / "class0/img006.jpg").symlink_to(images / "gone.jpg")
    refused(replace(settings, store=None), IntegrityError, "/images/class0/img006.jpg'", "broken link")


def test_quarantined_images_are_left_out_and_told(tmp_path, config, caplog):
    images = make_images(tmp_path / "images")
    (images / "class0/img000.jpg").write_bytes(b"")
    (images / "class1/img001.jpg").write_bytes((images / "class1/img001.jpg").read_bytes()[:-200])
    label_images(images, tmp_path / "labels", config)
    settings = LoaderConfig(
        str(images), str(tmp_path / "labels"), batch_size=4, image_size=32, grid=(4, 4), train=False
    )
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = create_loader(settings)
    assert "2 images are in the quarantine" in caplog.text
    keys = [key for batch in loader for key in batch.keys]
    assert keys == LabelStore(tmp_path / "labels").keys
    assert len(keys) == 10


def test_the_store_of_other_images_is_refused(settings, tmp_path, config):
    others = make_images(tmp_path / "others", 5, classes=1)
    label_images(others, tmp_path / "other-labels", config)
    refused(replace(settings, store=str(tmp_path / "other-labels")), MismatchError, "have no labels")
    # The same names, other pictures.
    for path in (tmp_path / "others").rglob("*.jpg"):
        path.write_bytes(encoded(picture(77, 50, 60)))
    refused(replace(settings, images=str(others), store=str(tmp_path / "other-labels")), MismatchError, "changed")


def test_a_list_may_choose_among_the_labeled_images(settings, tmp_path):
    (tmp_path / "list.txt").write_text("class2/img002.jpg\nclass0/img003.jpg\n")
    (batch,) = create_loader(replace(settings, image_list=str(tmp_path / "list.txt")))
    assert batch.keys == ("class0/img003.jpg", "class2/img002.jpg")
    store = LabelStore(settings.store)
    assert batch.rows.tolist() == [store.row_of(key) for key in batch.keys]
    (tmp_path / "list.txt").write_text("class2/img002.jpg\n../secret.jpg\n")
    refused(replace(settings, image_list=str(tmp_path / "list.txt")), InputError, "line 2", "secret")


def test_another_class_count_is_refused(settings):
    refused(replace(settings, num_classes=1000), MismatchError, "6 in", "1000")
    refused(
        replace(settings, class_folders={"class0": 6, "class1": 1, "class2": 2}),
        MismatchError,
        "class 6",
        "less than 6",
    )


def test_unknown_classes_are_refused_where_they_are_needed(settings):
    assert (next(iter(create_loader(settings))).labels == -1).all()  # six classes, three folders: not known, not needed
    refused(replace(settings, token_labels=False), InputError, "true class of 12 images is not known")
    refused(
        replace(settings, store=None, class_folders={"class0": 0}), InputError, "of 8 images", "'class1/img001.jpg'"
    )


def test_a_damaged_or_incomplete_store_is_refused(settings, store):
    marker = sorted(store.glob("shard-*.json"))[1]
    kept = marker.read_bytes()
    marker.unlink()
    refused(settings, IntegrityError, "not complete", "without shard 1")
    marker.write_bytes(kept)
    shard = sorted(store.glob("shard-*.h5"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    refused(settings, IntegrityError, shard.name)
    refused(replace(settings, store=str(store / "nowhere")), InputError, "not a label store")


def test_fewer_images_than_a_batch_are_refused(settings):
    refused(replace(settings, train=True, batch_size=5, world_size=3, rank=1), InputError, "12 images", "15 or more")
    assert len(create_loader(replace(settings, train=True, batch_size=4, world_size=3))) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", ["token", "image"])
def test_a_batch_of_one_and_an_odd_batch_can_be_mixed(settings, backend, mix):
    for batch_size in (1, 3):
        config = replace(settings, train=True, batch_size=batch_size, mix=mix, backend=backend)
        for batch in create_loader(config):
            assert len(batch) == batch_size
            assert torch.isfinite(batch.images).all()
            assert batch.mix is not None


def test_a_folder_without_images_is_refused(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(replace(settings, images=str(tmp_path / "empty")), InputError, "no images below")
    refused(replace(settings, images=str(tmp_path / "nothing")), InputError, "not a folder")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backend": "nvjpeg"}, "backend"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"auto_augment": "rand-x9", "train": True}, "auto_augment"),
        ({"auto_augment": "augmix", "train": True}, "auto_augment"),
        ({"mix": "cutmix"}, "mix"),
        ({"mix": "token", "mix_alpha": 0.0, "train": True}, "mix_alpha"),
        ({"mix": "token"}, "mix"),
        ({"mix": "token", "mix_alpha": float("inf"), "train": True}, "mix_alpha"),
        ({"ratio": (1.0, float("inf"))}, "ratio"),
        ({"scale": (0.5,)}, "scale"),
        ({"grid": 8}, "grid"),
        ({"hflip": "x"}, "hflip"),
        ({"device": "gpu"}, "device"),
        ({"device": "mps"}, "device"),
        ({"auto_augment": "rand-p5", "train": True}, "auto_augment"),
        ({"auto_augment": "rand-ninf", "train": True}, "auto_augment"),
        ({"grid": (5, 4)}, "grid"),
        ({"grid": (4,)}, "grid"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"hflip": 1.5}, "hflip"),
        ({"crop_pct": 1.2}, "crop_pct"),
        ({"color_jitter": -1.0}, "color_jitter"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"seed": -1}, "seed"),
        ({"cache": "disk"}, "cache"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, change, word):
    with pytest.raises(InputError, match=word) as caught:
        create_loader(replace(settings, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(settings):
    refused(replace(settings, device="cuda"), InputError, "no GPU")


def test_images_and_labels_that_cannot_be_written_are_enough(settings, images, store):
    for path in (images, store):
        for child in [path, *path.rglob("*")]:
            child.chmod(0o555 if child.is_dir() else 0o444)
    try:
        assert sum(map(len, create_loader(settings))) == 12
    finally:
        for path in (images, store):
            for child in [path, *path.rglob("*")]:
                child.chmod(0o755 if child.is_dir() else 0o644)


def test_a_moved_store_and_moved_images_still_belong_together(settings, images, store, tmp_path):
    expected = np.concatenate([batch.rows for batch in create_loader(settings)])
    shutil.move(images, tmp_path / "elsewhere")
    shutil.move(store, tmp_path / "labels-elsewhere")
    config = replace(settings, images=str(tmp_path / "elsewhere"), store=str(tmp_path / "labels-elsewhere"))
    assert np.array_equal(np.concatenate([batch.rows for batch in create_loader(config)]), expected)


def test_labels_of_a_centre_crop_teacher_are_used_where_they_are(images, tmp_path, config):
    """The map covers the middle: an evaluation of the whole picture takes its nearest cells at the sides."""
    teacher = TeacherConfig("tiny:colour_teacher", view="center")
    label_images(images, tmp_path / "centre", LabelerConfig(teacher, decoder="pil", progress=False))
    store = LabelStore(tmp_path / "centre")
    settings = LoaderConfig(
        str(images), str(store.path), batch_size=12, image_size=64, grid=(8, 8), train=False, crop_pct=1.0,
        crop_mode="squash",
    )  # fmt: skip
    (batch,) = create_loader(settings)
    targets = batch.targets.token_scores.view(12, -1, 8, 8)
    maps = store.read(batch.rows)
    assert (maps.region[:, 1] > 0.1).any()
    assert torch.allclose(targets[:, :, 0, 0], torch.from_numpy(maps.scores[:, :, 0, 0]), atol=1e-5)
    assert torch.allclose(targets[:, :, -1, -1], torch.from_numpy(maps.scores[:, :, -1, -1]), atol=1e-5)
