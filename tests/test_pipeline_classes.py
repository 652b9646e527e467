"""Whose classes a loader's labels are: the teacher's, or the images' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CLASSES, encoded, make_images, picture

from labeler import InputError, LabelerConfig, MismatchError, label_images
from pipeline import LoaderConfig, TokenLabelLoader, create_loader
from pipeline.batch_picture import FOOTER, HEADER, HEIGHT, MARGIN, ROW, draw_batch

NAMES = ("class0", "class1", "class2")


@pytest.fixture
def settings(images: Path, store: Path) -> LoaderConfig:
    """Three folders that are not the six classes of the teacher, whose true classes the store does not know."""
    return LoaderConfig(
        str(images), str(store), classes="images", batch_size=4, image_size=32, grid=(4, 4), device="cpu", threads=1,
        backend="pil",
    )  # fmt: skip


def labels_of(loader: TokenLabelLoader) -> dict[str, int]:
    samples = loader.samples
    return {samples.key(i): int(c) for i, c in enumerate(samples.labels)}


def table(folder: Path, rows: dict[str, str]) -> str:
    path = folder / "table.csv"
    path.write_text("path,label\n" + "".join(f"{key},{label}\n" for key, label in rows.items()))
    return str(path)


def relabeled(images: Path, folder: Path, config: LabelerConfig) -> str:
    label_images(images, folder, config)
    return str(folder)


def test_the_folders_in_sorted_order_are_the_images_own_classes(settings):
    loader = create_loader(settings)
    assert (loader.num_classes, loader.aux_classes, loader.class_names) == (3, CLASSES, NAMES)
    assert all(NAMES[label] == key.split("/")[0] for key, label in labels_of(loader).items())
    batch = next(iter(loader))
    assert [NAMES[label] for label in batch.labels] == [key.split("/")[0] for key in batch.keys]
    assert int(batch.targets.classes.max()) < CLASSES
    teachers = create_loader(replace(settings, classes="teacher"))
    assert (teachers.num_classes, teachers.aux_classes, set(labels_of(teachers).values())) == (CLASSES, None, {-1})


def test_the_targets_of_tokens_do_not_depend_on_the_classes(settings):
    one, other = (next(iter(create_loader(replace(settings, classes=kind)))) for kind in ("images", "teacher"))
    assert one.keys == other.keys
    assert one.targets.token_scores.equal(other.targets.token_scores)
    assert one.targets.num_classes == other.targets.num_classes == CLASSES


def test_a_picture_of_a_batch_draws_the_teachers_classes_and_no_label_among_them(settings):
    """The label 2 of the images' own classes is not the teacher's class 2: all panels are those without labels."""
    one, other = (
        draw_batch(next(iter(loader)), loader)
        for loader in (create_loader(replace(settings, classes=kind)) for kind in ("images", "teacher"))
    )
    for top in range(HEADER, one.height - FOOTER, ROW):
        panels = (MARGIN, top, one.width, top + HEIGHT)
        assert one.crop(panels).tobytes() == other.crop(panels).tobytes()


def test_without_token_labels_both_heads_have_the_images_classes(settings):
    loader = create_loader(replace(settings, token_labels=False))
    assert (loader.num_classes, loader.aux_classes) == (3, None)
    targets = next(iter(loader)).targets
    assert (targets.grid, targets.dense_tokens(5).shape) == ((4, 4), (4, 16, 5))
    with pytest.raises(InputError, match="do not know how many classes there are"):
        targets.dense_tokens()


@pytest.mark.parametrize("layout", ["class folders", "one class", "a loose image", "no folders", "known classes"])
def test_auto_is_the_images_own_classes_only_where_the_store_knows_none(settings, tmp_path, config, layout):
    images = make_images(tmp_path / "new", 12, {"one class": 1, "known classes": CLASSES}.get(layout, 4))
    if layout == "a loose image":
        (images / "loose.jpg").write_bytes(encoded(picture(40)))
    elif layout == "no folders":
        for i, path in enumerate(sorted(images.rglob("*.jpg"))):
            path.rename(images / f"{i}.jpg")
    store = relabeled(images, tmp_path / "new labels", config)
    loader = create_loader(replace(settings, images=str(images), store=store, classes="auto"))
    expected = ("images", 4) if layout == "class folders" else ("teacher", CLASSES)
    assert (loader.samples.classes.kind, loader.num_classes) == expected


def test_auto_without_a_store_is_plain_classification(settings):
    loader = create_loader(replace(settings, store=None, classes="auto"))
    assert (loader.num_classes, loader.aux_classes, loader.class_names) == (3, None, NAMES)


def test_a_number_of_classes_that_the_folders_do_not_have_is_refused_and_not_chosen(settings):
    with pytest.raises(MismatchError, match="3 folders, expected 5, one for each class"):
        create_loader(replace(settings, num_classes=5))
    assert create_loader(replace(settings, num_classes=CLASSES, classes="auto")).aux_classes is None


def test_a_listed_part_of_the_images_has_the_ids_of_all(settings, tmp_path):
    (tmp_path / "list.txt").write_text("class0/img000.jpg\nclass2/img002.jpg\nclass2/img005.jpg\nclass2/img008.jpg\n")
    loader = create_loader(replace(settings, image_list=str(tmp_path / "list.txt")))
    assert labels_of(loader)["class2/img002.jpg"] == 2
    assert loader.num_classes == 3


def test_labels_of_the_source_go_before_its_folders(settings, images, config, tmp_path):
    keys = [f"class{i % 3}/img{i:03d}.jpg" for i in range(12)]
    rows = {key: ("owl", "cat")[i % 2] for i, key in enumerate(keys)}
    source = table(images, rows)
    store = relabeled(Path(source), tmp_path / "new labels", config)
    loader = create_loader(replace(settings, images=source, store=store, classes="auto"))
    assert (loader.class_names, loader.num_classes, loader.aux_classes) == (("cat", "owl"), 2, CLASSES)
    assert all(("cat", "owl")[label] == rows[key] for key, label in labels_of(loader).items())


def test_every_image_needs_a_class_of_its_own(settings, images, config, tmp_path):
    (images / "loose.jpg").write_bytes(encoded(picture(40)))
    store = relabeled(images, tmp_path / "new labels", config)
    with pytest.raises(InputError, match=r"1 images is not known: .*'loose.jpg'.*classes=\"images\" every image needs"):
        create_loader(replace(settings, store=store))


def test_an_evaluation_finds_its_classes_by_name_and_refuses_others(settings, images):
    """Ids are those of training, whichever of the classes an evaluation has, in folders or in a table."""
    folders = create_loader(settings).samples.classes.folders
    evaluation = replace(settings, store=None, train=False, classes="teacher", class_folders=folders, num_classes=3)
    rows = {"class0/img000.jpg": "class2", "class1/img001.jpg": "class2"}
    loader = create_loader(replace(evaluation, images=table(images, rows)))
    assert list(labels_of(loader).values()) == [2, 2]
    with pytest.raises(InputError, match=r"1 label\(s\) that are not among the classes: 'dog'.*class0"):
        create_loader(replace(evaluation, images=table(images, {**rows, "class2/img002.jpg": "dog"})))
    (images / "class1").rename(images / "zebra")
    with pytest.raises(InputError, match=r"4 images .* 1 folder\(s\) that are not among the classes: 'zebra'"):
        create_loader(evaluation)
