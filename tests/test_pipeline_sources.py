"""Folders, lists and tar shards."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import encoded, make_images, picture

from labeler import InputError, label_images
from labeler.sources.archive_file import ArchiveFile
from labeler.sources.image_source import BadImage
from labeler.sources.open_source import open_source
from labeler.sources.tar_source import tar_source
from pipeline import LoaderConfig, create_loader
from pipeline.order import EpochOrder


def write_tars(folder: Path, images: Path, per_shard: int = 5, classes: bool = False) -> Path:
    """The files below `images` as tar shards, names kept, with `.cls` files if wanted."""
    folder.mkdir()
    files = sorted(images.rglob("*.jpg"))
    for start in range(0, len(files), per_shard):
        with tarfile.open(folder / f"part-{start // per_shard:03d}.tar", "w") as archive:
            for path in files[start : start + per_shard]:
                name = str(path.relative_to(images))
                archive.add(path, name)
                if classes:
                    add(archive, name.replace(".jpg", ".cls"), path.parent.name[-1].encode())
    return folder


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def settings(images: Path, store: Path) -> LoaderConfig:
    return LoaderConfig(str(images), str(store), batch_size=4, image_size=32, grid=(4, 4), device="cpu", threads=1)


@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
def test_tar_shards_give_the_folders_batches(settings, images, tmp_path, backend):
    shards = write_tars(tmp_path / "shards", images)
    config = replace(settings, train=False, backend=backend)
    from_folder, from_tars = (list(create_loader(replace(config, images=str(path)))) for path in (images, shards))
    for a, b in zip(from_folder, from_tars, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets.token_scores, b.targets.token_scores)


def test_tar_shards_train_and_resume(settings, images, tmp_path):
    shards = write_tars(tmp_path / "shards", images)
    config = replace(settings, images=str(shards), shuffle_window=3)
    loader = create_loader(config)
    batches = [batch for _ in range(2) for batch in loader]
    assert len({key for batch in batches for key in batch.keys}) == 12
    resumed, state = create_loader(config), create_loader(config)
    iterator = iter(state)
    next(iterator)
    resumed.load_state_dict(state.state_dict())
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, batches[1:3], strict=True))


def test_webdataset_classes_are_read(settings, images, tmp_path):
    shards = write_tars(tmp_path / "shards", images, classes=True)
    loader = create_loader(replace(settings, images=str(shards), store=None))
    assert loader.num_classes == 3
    for batch in loader:
        assert batch.labels.tolist() == [int(key[5]) for key in batch.keys]
    # One file, named itself.
    one = create_loader(replace(settings, images=str(shards / "part-000.tar"), store=None))
    assert len(one.samples) == 5


def test_classes_that_shards_leave_open_are_the_stores_and_class_folders_go_first(settings, images, tmp_path, config):
    (tmp_path / "names.txt").write_text("".join(f"class{i}\n" for i in range(6)))
    label_images(images, tmp_path / "named", replace(config, class_names=str(tmp_path / "names.txt")))
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as archive:
        for i, name in enumerate(names):
            archive.add(images / name, name)
            if i % 2:
                add(archive, name.replace(".jpg", ".cls"), b"5")
    config = replace(settings, images=str(tmp_path / "shards"), store=str(tmp_path / "named"), train=False)
    own = {name: int(name[5]) for name in names}
    labels = {key: label for b in create_loader(config) for key, label in zip(b.keys, b.labels.tolist(), strict=True)}
    assert labels == {name: 5 if i % 2 else own[name] for i, name in enumerate(names)}
    for store in (config.store, None):
        chosen = replace(config, store=store, class_folders={"class0": 2, "class1": 0, "class2": 1})
        for batch in create_loader(chosen):
            assert batch.labels.tolist() == [(own[key] + 2) % 3 for key in batch.keys]


@pytest.mark.parametrize("labeled", [True, False])
def test_images_of_no_known_class_can_be_evaluated_but_not_trained_on(settings, images, labeled):
    """Without "none" they are refused: folders of other names name no class."""
    config = replace(settings, store=settings.store if labeled else None, num_classes=6, train=False, classes="none")
    assert [int(label) for batch in create_loader(config) for label in batch.labels] == [-1] * 12
    with pytest.raises(InputError, match=r"classes does not fit: got 'none'"):
        replace(config, train=True)
    with pytest.raises(InputError, match="the true class of 12 images is not known"):
        create_loader(replace(config, classes="teacher", token_labels=False, class_folders={"other": 0}))


def test_samples_of_one_name_belong_together_up_to_the_first_dot(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, shade in (("./x/1", 3), ("x/2", 1)):
            add(archive, f"{name}.left.png", encoded(picture(shade), "PNG"))
            add(archive, f"{name}.cls", str(shade).encode())
            add(archive, f"{name}.txt", b"a caption")
    source = tar_source([ArchiveFile(str(tmp_path / "a.tar"))], "a.tar")
    assert source.keys == ("x/1.left.png", "x/2.left.png")
    assert source.labels.tolist() == [3, 1]
    assert source.other == 2
    assert source.read(1) == encoded(picture(1), "PNG")
    assert source.head(0) == source.read(0)


def test_shards_are_read_one_after_the_other_in_a_new_order_each_epoch():
    """So that a network disk reads forwards; within a shard, and at its borders, images are shuffled."""
    groups = np.repeat(np.arange(20), 50)
    order = EpochOrder(1000, 4, groups=groups, window=25, seed=1)
    first, second = order.epoch(0), order.epoch(1)
    assert sorted(first) == list(range(1000))
    changes = (np.diff(groups[first]) != 0).sum()
    assert changes < 19 * 30  # a full shuffle changes shard 950 times
    middle = groups[first].reshape(20, 50)[:, 25]
    assert len(set(middle.tolist())) == 20
    assert not np.array_equal(groups[first], groups[second])
    assert not np.array_equal(np.argsort(first[:25]), np.arange(25))


def test_hard_links_have_the_bytes_of_their_file(tmp_path, images):
    other = images / "class0/linked.jpg"
    other.hardlink_to(images / "class0/img000.jpg")
    source = open_source(write_tars(tmp_path / "shards", images, per_shard=20))
    keys = source.keys
    assert "class0/linked.jpg" in keys
    first, second = (source.read(keys.index(f"class0/{name}.jpg")) for name in ("linked", "img000"))
    assert first == second == other.read_bytes()


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, b"caf\xe9.png".decode("utf-8", "surrogateescape"), encoded(picture(1), "PNG"))
    with pytest.raises(InputError, match="UTF-8"):
        open_source(tmp_path)


def test_a_bad_shard_is_named(tmp_path, images):
    shards = write_tars(tmp_path / "shards", images)
    bad = shards / "part-001.tar"
    whole = bad.read_bytes()
    for damaged in (b"no tar at all" * 100, whole[: len(whole) // 2], b""):
        bad.write_bytes(damaged)
        with pytest.raises(InputError, match=r"part-001\.tar"):
            open_source(shards)
    import gzip

    bad.write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match="uncompressed"):
        open_source(shards)


def test_a_shard_that_shrinks_later_is_noticed_by_name(tmp_path, images):
    shards = write_tars(tmp_path / "shards", images)
    source = open_source(shards)
    last = len(source) - 1
    path = shards / "part-002.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImage, match="its shard ends too early"):
        source.read(last)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(last)


def test_two_images_of_one_name_are_refused(tmp_path, images):
    shards = write_tars(tmp_path / "shards", images)
    (shards / "copy.tar").write_bytes((shards / "part-000.tar").read_bytes())
    with pytest.raises(InputError, match="same name"):
        open_source(shards)


@pytest.mark.parametrize("text", [b"dog", b"", b"1.5"])
def test_a_class_that_is_no_number_is_refused(tmp_path, text):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "1.png", encoded(picture(1), "PNG"))
        add(archive, "1.cls", text)
    with pytest.raises(InputError, match=r"1\.cls"):
        open_source(tmp_path)


def test_a_list_goes_with_a_folder(tmp_path, images):
    shards = write_tars(tmp_path / "shards", images)
    (tmp_path / "list.txt").write_text("class0/img000.jpg\n")
    with pytest.raises(InputError, match="image_list"):
        open_source(shards, tmp_path / "list.txt")
    source = open_source(images, tmp_path / "list.txt")
    assert source.keys == ("class0/img000.jpg",)


def test_a_tar_without_images_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "readme.txt", b"text")
    with pytest.raises(InputError, match="no images"):
        open_source(tmp_path)


def test_sizes_come_from_headers_and_follow_the_orientation_tag(tmp_path):
    from PIL import Image

    from pipeline.samples import scan_sizes

    (tmp_path / "c").mkdir()
    for tag in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = tag
        (tmp_path / f"c/{tag}.jpg").write_bytes(encoded(picture(tag, 30, 50), exif=exif))
    big = make_images(tmp_path / "c", 1) / "class0/img000.jpg"
    # A header longer than what is read first: 90 kB of comments before the frame.
    data = big.read_bytes()
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + b" " * 60_000
    big.write_bytes(data[:2] + 2 * comment + data[2:])
    sizes = scan_sizes(open_source(tmp_path), "exif", 2, False)
    assert sizes.tolist() == [[30, 50], [30, 50], [50, 30], [36, 40]]
