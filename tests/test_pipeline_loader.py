"""The loader as a user meets it: what a batch holds, both backends alike, the ablation switch, mixing, evaluation.

Legend: B images; P palette size; T tokens; C classes; S input side.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, encoded, picture

from labeler import InputError, LabelerConfig, LabelStore, TeacherConfig, label_images
from pipeline import Batch, LoaderConfig, create_loader, sample_mix_box

PARTS = ("token_scores", "token_background", "cls_scores", "cls_background")
EVERYTHING = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5, "mix": "token"}


@pytest.fixture
def settings(images: Path, store: Path) -> LoaderConfig:
    """Twelve small images of three classes, in batches of four, on an 8×8 token grid."""
    folders = {"class0": 0, "class1": 1, "class2": 2}
    return LoaderConfig(
        str(images),
        str(store),
        class_folders=folders,
        batch_size=4,
        image_size=64,
        grid=(8, 8),
        device="cpu",
        threads=1,
    )


def level_difference(a: Batch, b: Batch, config: LoaderConfig) -> torch.Tensor:
    """[B]: mean difference of two batches' images, in levels of 255."""
    std = torch.tensor(config.std).view(1, 3, 1, 1)
    return ((a.images - b.images).abs() * std * 255).mean((1, 2, 3))


@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
def test_a_batch_holds_what_the_contract_says(settings, backend):
    loader = create_loader(replace(settings, backend=backend, mix="token"))
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    seen = set()
    for batch in batches:
        palette = LabelStore(settings.store).meta.palette
        assert batch.images.shape == (4, 3, 64, 64)
        assert batch.images.dtype == torch.float32
        assert batch.targets.classes.shape == (4, palette)
        assert batch.targets.token_scores.shape == (4, palette, 64)
        assert batch.targets.token_background.shape == (4, 64)
        assert batch.targets.cls_scores.shape == (4, palette)
        assert batch.targets.cls_background.shape == (4,)
        assert torch.allclose(batch.targets.dense_tokens(CLASSES).sum(-1), torch.ones(4, 64))
        assert batch.mix is not None
        assert batch.token_mix is batch.mix
        store = LabelStore(settings.store)
        assert [store.keys[row] for row in batch.rows] == list(batch.keys)
        assert batch.labels.tolist() == [int(key[5]) for key in batch.keys]  # class0/… class1/… class2/…
        seen |= set(batch.keys)
    assert len(seen) == 12


def test_dali_and_the_reference_show_the_same(photographs, tmp_path):
    """Real photographs, the same windows: images within a level of 255 on average, targets within 1e-5."""
    teacher = TeacherConfig("resnet10t", random_weights=True, input_size=128)
    label_images(photographs, tmp_path / "labels", LabelerConfig(teacher, progress=False))
    config = LoaderConfig(str(photographs), str(tmp_path / "labels"), batch_size=50, image_size=160, grid=(10, 10))
    for train in (True, False):
        pairs = zip(*(create_loader(replace(config, train=train, backend=b)) for b in ("dali", "pil")), strict=True)
        worst, count = torch.zeros(1), 0
        for a, b in pairs:
            assert a.keys == b.keys
            worst = torch.maximum(worst, level_difference(a, b, config).max())
            count += len(a)
            for part in PARTS:
                assert (getattr(a.targets, part) - getattr(b.targets, part)).abs().max() < 1e-5
            assert (a.targets.dense_tokens(1000) - b.targets.dense_tokens(1000)).abs().max() < 1e-5
        assert worst < 1
        assert count == 150


def test_the_backends_agree_under_all_augmentations_at_once(settings):
    config = replace(settings, auto_augment="rand-m9-mstd0.5-inc1-n3-p0.9", erase_prob=0.5, mix="image", batch_size=6)
    differences = []
    for epoch in range(8):
        loaders = [create_loader(replace(config, backend=name, seed=epoch)) for name in ("dali", "pil")]
        for a, b in zip(*loaders, strict=True):
            differences.append(level_difference(a, b, config))
            assert a.mix == b.mix
            for part in PARTS:
                assert (getattr(a.targets, part) - getattr(b.targets, part)).abs().max() < 1e-5
    # Equalising and posterising turn one level of the decoders' rounding into many, in few images.
    assert torch.cat(differences).median() < 1
    assert torch.cat(differences).mean() < 3


def test_without_token_labels_only_the_targets_change(settings):
    with_labels = list(create_loader(replace(settings, **EVERYTHING)))
    without = list(create_loader(replace(settings, token_labels=False, **EVERYTHING)))
    for a, b in zip(with_labels, without, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.keys == b.keys
        assert a.mix == b.mix
        one_hot = torch.nn.functional.one_hot(b.labels, CLASSES).float()
        assert torch.equal(b.targets.dense_cls(CLASSES), one_hot)
        assert torch.equal(b.targets.dense_tokens(CLASSES), one_hot[:, None].expand(-1, 64, -1))


def test_without_a_store_folders_name_the_classes(settings):
    loader = create_loader(replace(settings, store=None, class_folders=None))
    assert loader.num_classes == 3
    for batch in loader:
        assert batch.labels.tolist() == [int(key[5]) for key in batch.keys]
        assert set(batch.rows) == {-1}
    # The images and what is shown of them are those of the labeled loader.
    labeled = list(create_loader(settings))
    loader.set_epoch(0)
    assert all(torch.equal(a.images, b.images) for a, b in zip(loader, labeled, strict=True))


def test_class_folders_can_be_given(settings):
    loader = create_loader(
        replace(settings, store=None, class_folders={"class0": 7, "class1": 5, "class2": 0}, num_classes=8)
    )
    found = {key[:6]: label for batch in loader for key, label in zip(batch.keys, batch.labels.tolist(), strict=True)}
    assert found == {"class0": 7, "class1": 5, "class2": 0}


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
def test_mixing_in_pixels_moves_whole_patches_of_the_partner(settings, batch_size, backend):
    config = replace(settings, batch_size=batch_size, backend=backend)
    boxes = 0
    for epoch in range(3):
        plain, mixed = (create_loader(replace(config, mix=mix)) for mix in ("token", "image"))
        plain.set_epoch(epoch)
        mixed.set_epoch(epoch)
        for a, b in zip(plain, mixed, strict=True):
            inside = b.mix.mask((8, 8)).view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
            assert torch.equal(b.images, torch.where(inside, a.images.flip(0), a.images))
            assert b.token_mix is None
            assert torch.equal(a.targets.token_scores, b.targets.token_scores)
            boxes += bool(inside.any()) and not inside.all()
    assert boxes > 3


def test_mixing_off_is_off(settings):
    for batch in create_loader(replace(settings, mix="none")):
        assert batch.mix is None
        assert batch.token_mix is None
    share = [
        batch.mix is None
        for seed in range(20)
        for batch in create_loader(replace(settings, mix="token", mix_prob=0.5, seed=seed))
    ]
    assert 0.25 < np.mean(share) < 0.75


def test_erasing_replaces_a_box_by_noise_and_nothing_else(settings):
    plain, erased = (list(create_loader(replace(settings, erase_prob=p))) for p in (0.0, 1.0))
    for a, b in zip(plain, erased, strict=True):
        changed = (a.images != b.images).all(1)
        share = changed.float().mean((1, 2))
        assert ((share > 0.01) & (share < 0.4)).all()
        for image, area in zip(b.images, changed, strict=True):
            rows, columns = area.any(1).nonzero()[:, 0], area.any(0).nonzero()[:, 0]
            assert area[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            noise = image[:, area]
            assert noise.mean().abs() < 0.5
            assert 0.7 < noise.std() < 1.3


def test_epochs_differ_and_seeds_repeat(settings):
    loader = create_loader(replace(settings, **EVERYTHING))
    first, second = list(loader), list(loader)
    assert loader.epoch == 2
    assert [b.keys for b in first] != [b.keys for b in second]
    again = list(create_loader(replace(settings, **EVERYTHING)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    other = list(create_loader(replace(settings, seed=1, **EVERYTHING)))
    assert not torch.equal(first[0].images, other[0].images)


def test_training_goes_on_where_an_iteration_was_left_and_evaluation_begins_again(settings):
    whole = list(create_loader(settings))
    loader = create_loader(settings)
    for batch in loader:
        assert batch.keys == whole[0].keys
        break
    assert [batch.keys for batch in loader] == [batch.keys for batch in whole[1:]]
    assert loader.epoch == 1
    evaluation = create_loader(replace(settings, train=False))
    first = next(iter(evaluation))
    assert next(iter(evaluation)).keys == first.keys


def test_an_iteration_that_lost_its_place_says_so(settings):
    """Rather than to count batches of two iterations together."""
    loader = create_loader(settings)
    with pytest.raises(InputError, match="moved while this iterator was in use"):
        list(zip(loader, loader, strict=False))
    for move in (lambda: loader.set_epoch(5), lambda: loader.load_state_dict(loader.state_dict())):
        iterator = iter(loader)
        next(iterator)
        move()
        with pytest.raises(InputError, match="moved while this iterator was in use"):
            next(iterator)
    with pytest.raises(InputError, match="epoch"):
        loader.set_epoch(-1)


def test_set_epoch_keeps_the_place_in_the_epoch_that_it_names(settings):
    """So that `for epoch in range(start, end): loader.set_epoch(epoch); …` resumes where it was."""
    loader = create_loader(settings)
    next(iter(loader))
    resumed = create_loader(settings)
    resumed.load_state_dict(loader.state_dict())
    counts = []
    for epoch in range(resumed.epoch, 2):
        resumed.set_epoch(epoch)
        counts.append(len(list(resumed)))
    assert counts == [2, 3]


def test_a_dropped_iterator_may_be_collected_in_any_thread(settings, monkeypatch):
    import gc

    from pipeline.samples import Samples

    read = Samples.read
    monkeypatch.setattr(Samples, "read", lambda self, sample: (gc.collect(), read(self, sample))[1])
    loader = create_loader(settings)

    class Trainer:
        pass

    trainer = Trainer()
    trainer.itself, trainer.iterator = trainer, iter(loader)
    next(trainer.iterator)
    del trainer
    assert sum(1 for _ in loader) == 2


def test_labels_stay_float32_under_autocast(settings):
    expected = list(create_loader(settings))
    with torch.autocast("cpu", torch.bfloat16):
        found = list(create_loader(settings))
    for a, b in zip(expected, found, strict=True):
        assert b.targets.token_scores.dtype == torch.float32
        assert torch.equal(a.targets.token_scores, b.targets.token_scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_a_gpu_gives_the_batches_of_the_cpu(settings):
    config = replace(settings, auto_augment="rand-m9-mstd0.5-inc1", mix="image")
    for a, b in zip(create_loader(config), create_loader(replace(config, device="cuda")), strict=True):
        assert b.images.is_cuda
        assert a.keys == b.keys
        there = replace(b, images=b.images.cpu(), targets=b.targets.to("cpu"))
        assert level_difference(a, there, config).median() < 1
        for part in PARTS:
            assert (getattr(a.targets, part) - getattr(there.targets, part)).abs().max() < 1e-5


def test_evaluation_shows_every_image_once_in_order(settings):
    loader = create_loader(replace(settings, train=False, batch_size=5, auto_augment="rand-m9", erase_prob=1.0))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert [key for batch in batches for key in batch.keys] == LabelStore(settings.store).keys
    # Nothing random is left: another epoch is equal, augmentation or not.
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, loader, strict=True))
    centre = batches[0].views.boxes.mean(0)
    assert torch.allclose(centre[:2] + centre[2:], torch.ones(2, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
def test_evaluation_is_timms(settings, images, crop_mode, backend):
    from PIL import Image
    from timm.data import create_transform

    how = {"crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": "bicubic"}
    loader = create_loader(replace(settings, train=False, backend=backend, batch_size=12, **how))
    transform = create_transform(64, is_training=False, mean=loader.config.mean, std=loader.config.std, **how)
    (batch,) = loader
    for image, key in zip(batch.images, batch.keys, strict=True):
        with Image.open(images / key) as original:
            expected = transform(original.convert("RGB"))
        assert ((image - expected).abs() * torch.tensor(loader.config.std)[:, None, None]).mean() * 255 < 1


def test_a_map_with_fewer_cells_than_tokens_is_told_and_interpolated(settings, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = create_loader(settings)  # 4×4 cells, 8×8 tokens
    assert "4×4 cells for 8×8 tokens" in caplog.text
    (batch,) = create_loader(replace(settings, train=False, batch_size=12, crop_pct=1.0, crop_mode="squash"))
    maps = LabelStore(settings.store).read(batch.rows).scores
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps), (8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(batch.targets.token_scores, expected.flatten(2), atol=1e-5)
    assert loader.num_classes == CLASSES


@pytest.mark.parametrize("cache", ["none", "ram", "ram-compressed"])
def test_every_cache_gives_the_same_rows(settings, cache):
    expected, found = (list(create_loader(replace(settings, cache=name))) for name in ("none", cache))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.targets.token_scores, b.targets.token_scores)


def test_odd_files_look_the_same_to_the_labeler_and_to_both_loaders(tmp_path):
    """Grey, CMYK, palette, 16-bit and transparent pictures."""
    folder = tmp_path / "odd"
    folder.mkdir()
    colour = picture(5, 60, 80)
    grey16 = np.asarray(colour.convert("L"), np.uint16) * 257
    from PIL import Image

    tag = Image.Exif()
    tag[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    files = {
        "grey.jpg": encoded(colour.convert("L")),
        "cmyk.jpg": encoded(colour.convert("CMYK"), quality=95),
        "palette.png": encoded(colour.convert("P"), "PNG"),
        "deep.png": encoded(Image.fromarray(grey16), "PNG"),
        "alpha.png": encoded(colour.convert("RGBA"), "PNG"),
        "progressive.jpg": encoded(colour, progressive=True),
        "lossless.webp": encoded(colour, "WEBP", lossless=True),
        "plain.bmp": encoded(colour, "BMP"),
        "turned.tif": encoded(colour, "TIFF", exif=tag),
        "xmp.jpg": encoded(colour, xmp=xmp),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    label_images(folder, tmp_path / "labels", LabelerConfig(TeacherConfig("tiny:colour_teacher"), progress=False))
    config = LoaderConfig(str(folder), str(tmp_path / "labels"), batch_size=10, image_size=32, grid=(4, 4))
    (a,), (b,) = (list(create_loader(replace(config, backend=name))) for name in ("dali", "pil"))
    assert a.keys == b.keys
    assert level_difference(a, b, config).max() < 1
    # Without the store, headers tell the sizes.
    config = replace(config, store=None, class_folders={"odd": 0})
    (tmp_path / "root").mkdir()
    folder.rename(tmp_path / "root/odd")
    (c,), (d,) = (
        list(create_loader(replace(config, images=str(tmp_path / "root"), backend=name))) for name in ("dali", "pil")
    )
    assert level_difference(c, d, config).max() < 1
    assert level_difference(a, c, config).max() == 0


@pytest.mark.parametrize("default", ["type", "device"])
def test_batches_are_the_same_whatever_torchs_defaults_are(settings, default):
    settings = replace(settings, backend="pil", **EVERYTHING)
    expected = next(iter(create_loader(settings)))
    if default == "type":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")  # where nothing can be read
    try:
        batch = next(iter(create_loader(settings)))
        box = sample_mix_box((8, 8), 1.0, torch.Generator("cpu").manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert box == sample_mix_box((8, 8), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(batch.images, expected.images)
    assert batch.images.dtype == torch.float32
    for part in PARTS:
        assert torch.equal(getattr(batch.targets, part), getattr(expected.targets, part))


def test_the_readable_backend_goes_by_two_names(settings):
    assert replace(settings, backend="reference") == replace(settings, backend="pil")
