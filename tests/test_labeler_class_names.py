"""Class names and the classes that folders stand for."""

from __future__ import annotations

import numpy as np
import pytest

from labeler.sources.class_names import classes_of_keys, imagenet_names, name_classes, number_labels, true_classes
from labeler.sources.image_source import ImageSource

SYNSETS, DESCRIPTIONS = imagenet_names()


def images_of(keys: tuple[str, ...], labels: list[int] | None = None, names: tuple[str, ...] = ()) -> ImageSource:
    sizes = np.zeros(len(keys), np.int64)
    return ImageSource(
        "images", keys, sizes, None, labels=None if labels is None else np.array(labels), class_names=names
    )


def test_imagenets_names_belong_to_a_thousand_classes_alone():
    keys = tuple(f"{synset}/a.jpg" for synset in SYNSETS[7:10])
    names, classes = name_classes(images_of(keys), 1000, None)
    assert names == DESCRIPTIONS
    assert classes == {synset: 7 + i for i, synset in enumerate(SYNSETS[7:10])}
    for count in (999, 1001):
        assert name_classes(images_of(keys), count, None) == ((), {})
    # Three folders and three classes: in sorted order, whatever they are called.
    assert name_classes(images_of(keys), 3, None) == (
        SYNSETS[7:10],
        {synset: i for i, synset in enumerate(SYNSETS[7:10])},
    )


def test_a_folder_that_imagenet_does_not_know_leaves_all_without_a_class():
    assert name_classes(images_of(("n01440764/a.jpg", "mine/a.jpg")), 1000, None) == ((), {})
    assert name_classes(images_of(("a.jpg",)), 1000, None) == ((), {})


def test_a_file_of_names_goes_first(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n")
    assert name_classes(images_of(("dog/a.jpg", "b.jpg")), 2, str(path)) == (("cat", "dog"), {"dog": 1})
    assert name_classes(images_of(("x/a.jpg", "y/a.jpg")), 2, str(path)) == (("cat", "dog"), {"x": 0, "y": 1})


def test_an_image_in_no_folder_has_no_class():
    assert classes_of_keys(("x/a.jpg", "y/z/a.jpg", "u/a.jpg", "a.jpg"), {"x": 4, "y": 0}).tolist() == [4, 0, -1, -1]


@pytest.mark.parametrize("place", [0, 388, 999])
def test_descriptions_are_those_of_their_ids(place):
    expected = {0: ("n01440764", "tench"), 388: ("n02510455", "giant panda"), 999: ("n15075141", "toilet tissue")}
    assert (SYNSETS[place], DESCRIPTIONS[place]) == expected[place]


def test_labels_of_a_source_go_before_its_folders():
    """Names are matched like folders, in the source's order; numbers are the ids, if the teacher has that many."""
    keys = ("x/a.jpg", "x/b.jpg", "y/c.jpg")
    named = images_of(keys, [1, -1, 0], ("cat", "dog"))
    assert name_classes(named, 3, None, ("bird", "dog", "cat"))[1] == {"cat": 2, "dog": 1}
    assert true_classes(named, {"cat": 2, "dog": 1}, 3).tolist() == [1, -1, 2]
    assert name_classes(named, 2, None) == (("cat", "dog"), {"cat": 0, "dog": 1})
    assert true_classes(named, {}, 3).tolist() == [-1, -1, -1]
    numbered = images_of(keys, [4, -1, 0])
    assert true_classes(numbered, {}, 5).tolist() == [4, -1, 0]
    assert true_classes(numbered, {}, 4).tolist() == [-1, -1, -1]


def test_labels_are_ids_if_all_of_them_are_numbers():
    ids, names = number_labels(["3", "", "10", "-1"])
    assert (ids.tolist(), names) == ([3, -1, 10, -1], ())
    ids, names = number_labels(["dog", "3", "", "cat"])
    assert (ids.tolist(), names) == ([2, 0, -1, 1], ("3", "cat", "dog"))
