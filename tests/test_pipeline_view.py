"""The picture of a batch: its colours and outlines are those of the batch.

Legend: B images; T tokens, 8×8 here.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from labeler.base.errors import InputError
from labeler.report.charts import COLOURS
from pipeline import LoaderConfig, MixBox, Views, create_loader
from pipeline import batch_picture as pictures
from pipeline.__main__ import main
from pipeline.targets.token_targets import NOTHING, TokenTargets

SIZE, GRID, COUNT, CLASSES = 64, 8, 4, 6


@pytest.fixture
def loader(images, store):
    return create_loader(
        LoaderConfig(
            str(images), str(store), batch_size=COUNT, image_size=SIZE, grid=(GRID, GRID), backend="pil",
            device="cpu", threads=1, progress=False,
        )
    )  # fmt: skip


@pytest.fixture
def batch(loader):
    return next(iter(loader))


def sure(classes: np.ndarray) -> TokenTargets:
    """Targets that name one class in each token with probability 1; classes [B, 8, 8]."""
    chosen = np.arange(CLASSES)[:, None, None] == classes[:, None]
    scores = torch.from_numpy(np.where(chosen, 0.0, NOTHING)).float().flatten(2)
    nothing = torch.full((len(classes), GRID * GRID), NOTHING)
    palette = torch.arange(CLASSES).repeat(len(classes), 1)
    return TokenTargets(palette, scores, nothing, scores[:, :, 0], nothing[:, 0])


def panel(picture: Image.Image, b: int, place: int) -> np.ndarray:
    """uint8 [224, width, 3]: a panel of row b."""
    left, top = pictures.LEFTS[place], pictures.HEADER + b * pictures.ROW
    width = pictures.WIDE if place < 2 else pictures.HEIGHT
    return np.asarray(picture.crop((left, top, left + width, top + pictures.HEIGHT)))


def token_colours(picture: Image.Image, b: int) -> np.ndarray:
    """[8, 8, 3]: the colour in the middle of each token's square."""
    step = pictures.HEIGHT // GRID
    return panel(picture, b, 3)[step // 2 :: step, step // 2 :: step]


def test_every_token_has_the_colour_of_its_target_and_inside_the_box_of_its_partners(batch, loader):
    classes = np.random.default_rng(0).integers(0, CLASSES, (COUNT, GRID, GRID))
    targets, box = sure(classes), MixBox(1, 2, 4, 8, 1 - 18 / 64)
    for mix in (None, box):
        picture = pictures.draw_batch(dataclasses.replace(batch, targets=targets, mix=mix), loader, opacity=1.0)
        expected = classes.copy()
        if mix is not None:
            expected[:, 1:4, 2:8] = classes[::-1, 1:4, 2:8]
        for b in range(COUNT):
            np.testing.assert_array_equal(token_colours(picture, b), np.array(COLOURS)[expected[b]])


@pytest.mark.parametrize("flipped", [False, True])
def test_the_outline_is_where_the_view_says_and_its_dot_tells_a_flip(batch, loader, flipped):
    affine = torch.tensor([[[1.0, 0, 0], [0, -1, 1] if flipped else [0, 1, 0]]], dtype=torch.float64)
    views = Views(torch.tensor([[0.25, 0.5, 0.75, 1.0]] * COUNT).double(), affine.repeat(COUNT, 1, 1))
    picture = pictures.draw_batch(dataclasses.replace(batch, views=views), loader)
    height, width = loader.samples.sizes[loader.samples.source.keys.index(batch.keys[0])]
    scale = min(pictures.HEIGHT / height, pictures.WIDE / width)
    y, x = np.nonzero((panel(picture, 0, 0) == pictures.DOT).all(-1))
    assert y.mean() == pytest.approx(pictures.HEIGHT / 2 - scale * height / 4, abs=1)
    # The right half of the image is shown: the input's left edge is its middle, its right edge when flipped.
    assert x.mean() == pytest.approx(pictures.WIDE / 2 + (scale * width / 2 if flipped else 0), abs=2.5)


def test_the_stored_map_lies_over_the_whole_image_in_the_same_colours(batch, loader):
    picture = pictures.draw_batch(batch, loader, opacity=1.0)
    maps = loader.samples.store.read(batch.rows)
    dense = maps.dense()
    for b in range(COUNT):
        height, width = loader.samples.sizes[loader.samples.source.keys.index(batch.keys[b])]
        scale = min(pictures.HEIGHT / height, pictures.WIDE / width)
        centre = (np.arange(4) + 0.5) / 4 - 0.5
        y = np.rint(pictures.HEIGHT / 2 + centre * scale * height).astype(int)
        x = np.rint(pictures.WIDE / 2 + centre * scale * width).astype(int)
        shown = panel(picture, b, 1)[np.ix_(y, x)].astype(float)
        strength = 0.2 + 0.8 * dense[b].max(0)[..., None]
        # Under the tint lies a grey: what is left of each channel after the tint is equal.
        ground = shown - strength * np.array(COLOURS)[dense[b].argmax(0)]
        assert np.ptp(ground, axis=-1).max() < 4


def footer(picture: Image.Image) -> set[tuple[int, ...]]:
    left, top = pictures.MARGIN, picture.height - pictures.FOOTER
    pixels = np.asarray(picture)[top:, left:].reshape(-1, 3)
    return {tuple(one) for one in pixels.tolist()}


def test_a_caption_shows_how_strong_a_colour_is_and_which_is_no_classs(batch, loader, monkeypatch):
    """Its scale goes from the tint of probability 0 to that of 1; grey is named where colours have run out."""
    for opacity in (1.0, 0.5):
        found = footer(pictures.draw_batch(batch, loader, opacity))
        for strength in (pictures.FAINTEST, 1.0):
            tint = np.array(pictures.MIDDLE) + opacity * strength * (np.array(COLOURS[0]) - pictures.MIDDLE)
            assert min(np.abs(tint - one).max() for one in found) <= 2
        assert pictures.OTHER not in found
    monkeypatch.setattr(pictures, "_palette", lambda: list(COLOURS[:2]))
    assert pictures.OTHER in footer(pictures.draw_batch(batch, loader))


def test_a_legend_says_how_many_classes_it_has_no_room_for(batch, loader, monkeypatch):
    told = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", lambda draw, place, text, *more: told.append(text))
    monkeypatch.setattr(
        pictures, "class_name", lambda store, number: f"class of a long name, number {number} " + "x" * 30
    )
    draw = ImageDraw.Draw(Image.new("RGB", (pictures.WIDTH, 40)))
    pictures._legend(draw, 0, np.full(CLASSES, 1 / CLASSES), 4, dict.fromkeys(range(CLASSES), (0, 0, 0)), loader)
    assert told[0].startswith("true class: class of a long name, number 4")
    assert told[-1] == f"and {CLASSES - (len(told) - 1)} more"


@pytest.mark.parametrize("options", [[], ["--mix", "image"], ["--mix", "token", "--erase-prob", "1"]])
def test_the_command_writes_one_picture(images, store, tmp_path, capsys, options):
    out = tmp_path / "new" / "batch.png"
    size = ["--image-size", str(SIZE), "--patch", "8", "--count", str(COUNT), "--backend", "pil"]
    assert main(["view", str(images), "--store", str(store), "--out", str(out), *size, "--json", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == (
            "PNG",
            (1070, pictures.HEADER + COUNT * pictures.ROW + pictures.FOOTER),
        )
        assert picture.size == (told["width"], told["height"])
    assert len(told["keys"]) == COUNT
    assert (told["mix"] is None) == (not options)


def test_what_cannot_be_drawn_is_told_in_one_line(images, store, tmp_path, capsys, batch, loader):
    out = tmp_path / "batch.png"
    for wrong, text in (
        (["--store", str(images)], "is not a label store"),
        (["--store", str(store), "--image-size", "96", "--patch", "20"], "patches do not fit"),
        (["--store", str(store), "--image-size", "64", "--patch", "8", "--opacity", "2"], "opacity"),
        (["--store", str(store), "--epoch", "-1"], "epoch"),
    ):
        assert main(["view", str(images), "--out", str(out), "--count", "4", "--backend", "pil", *wrong]) == 2
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        main(["view", str(images)])
    assert ended.value.code == 2
    assert not out.exists()
    with pytest.raises(InputError):
        pictures.draw_batch(batch, loader, opacity=-0.1)


def test_a_map_without_any_class_is_drawn(loader, batch):
    """That of a teacher to whom all classes are the same: no place of the palette is used."""
    scores = torch.zeros(COUNT, CLASSES, GRID * GRID)
    nothing = TokenTargets(
        torch.full((COUNT, CLASSES), -1), scores, scores[:, 0], scores[:, :, 0], scores[:, 0, 0]
    )  # fmt: skip
    picture = pictures.draw_batch(dataclasses.replace(batch, targets=nothing), loader, opacity=1.0)
    for b in range(COUNT):
        assert np.ptp(token_colours(picture, b).astype(int), axis=-1).max() < 16, "grey, no class's colour"
