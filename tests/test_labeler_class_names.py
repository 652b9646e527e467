"""Class names and the classes that folders stand for."""

from __future__ import annotations

import pytest

from labeler.sources.class_names import imagenet_names, name_classes, targets_of

SYNSETS, DESCRIPTIONS = imagenet_names()


def test_imagenets_names_belong_to_a_thousand_classes_alone():
    keys = tuple(f"{synset}/a.jpg" for synset in SYNSETS[7:10])
    names, classes = name_classes(keys, 1000, None)
    assert names == DESCRIPTIONS
    assert classes == {synset: 7 + i for i, synset in enumerate(SYNSETS[7:10])}
    for count in (999, 1001):
        assert name_classes(keys, count, None) == ((), {})
    # Three folders and three classes: in sorted order, whatever they are called.
    assert name_classes(keys, 3, None) == (SYNSETS[7:10], {synset: i for i, synset in enumerate(SYNSETS[7:10])})


def test_a_folder_that_imagenet_does_not_know_leaves_all_without_a_class():
    assert name_classes(("n01440764/a.jpg", "mine/a.jpg"), 1000, None) == ((), {})
    assert name_classes(("a.jpg",), 1000, None) == ((), {})


def test_a_file_of_names_goes_first(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n")
    assert name_classes(("dog/a.jpg", "b.jpg"), 2, str(path)) == (("cat", "dog"), {"dog": 1})
    assert name_classes(("x/a.jpg", "y/a.jpg"), 2, str(path)) == (("cat", "dog"), {"x": 0, "y": 1})


def test_an_image_in_no_folder_has_no_class():
    assert targets_of(("x/a.jpg", "y/z/a.jpg", "u/a.jpg", "a.jpg"), {"x": 4, "y": 0}).tolist() == [4, 0, -1, -1]


@pytest.mark.parametrize("place", [0, 388, 999])
def test_descriptions_are_those_of_their_ids(place):
    expected = {0: ("n01440764", "tench"), 388: ("n02510455", "giant panda"), 999: ("n15075141", "toilet tissue")}
    assert (SYNSETS[place], DESCRIPTIONS[place]) == expected[place]
