"""Draws a training batch as one picture, to check by eye that images and token labels agree.

Legend: B images; C classes; P palette size; S input side; H×W map grid; h×w token grid, T = h·w.

Each image has a row of four panels: the image with the outline of the network's input, its whole stored map, the input,
and the targets of the input's tokens. A dot marks the input's upper left corner in both. The names of the row's colors
are below the panels, and the meaning of their strength is at the end of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from labeler.base.errors import InputError
from labeler.report.charts import COLOURS, OTHER, lay_over
from labeler.report.page import class_name
from labeler.sources.decoding.pixels import open_rgb
from labeler.store.score_maps import ScoreMaps, class_shares
from pipeline.batch import Batch
from pipeline.loader import TokenLabelLoader

Colors = dict[int, tuple[int, int, int]]
Draw = ImageDraw.ImageDraw

HEIGHT, WIDE = 224, 280  # height of every panel; width of the first two (the others are HEIGHT wide)
MARGIN, GAP, LINE = 16, 10, 21
LEFTS = (MARGIN, MARGIN + WIDE + GAP, MARGIN + 2 * (WIDE + GAP), MARGIN + 2 * (WIDE + GAP) + HEIGHT + GAP)
WIDTH, HEADER, ROW, FOOTER = LEFTS[3] + HEIGHT + MARGIN, MARGIN + LINE, HEIGHT + 2 * LINE + 24, LINE + MARGIN
HEADINGS = ("image, and what the input shows", "its stored label map", "network input", "token targets")
PAPER, MOUNT, INK, SOFT, DOT = (255, 255, 255), (236, 236, 238), (25, 25, 30), (110, 110, 118), (255, 40, 40)
MIDDLE = (150, 150, 150)  # under the scale of strengths: the average gray of images
DOT_RADIUS, SWATCH, MANY_COLORS = 5, 12, 32
STEPS = 6  # of the scale of strengths
MORE = 90  # pixels for the number of classes that do not fit
RARE = 0.01  # share of the panels: classes with less are not named
FAINTEST = 0.2  # strength at probability 0 (it is 1 at probability 1): less would look like the gray background
CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
WHOLE = np.array([0.0, 0.0, 1.0, 1.0])
FONT = ImageFont.load_default(14)


@dataclass(frozen=True)
class Cells:
    """The most probable class of each cell.

    Attributes:
        classes: int64 [H, W]: −1 where none is named.
        strength: float32 [H, W]: how strongly to draw it, up to 1.
    """

    classes: np.ndarray
    strength: np.ndarray


@dataclass(frozen=True)
class Row:
    """One image of the batch.

    Attributes:
        image: The decoded image.
        map: The stored map; None without a store.
        region: y0, x0, y1, x1 of the part that the map covers, as fractions of the image.
        corners: [4, 2]: corners of the input in the image, (y, x) as fractions, from the upper left one on.
        crop: [4]: y0, x0, y1, x1 of the crop in the image; the corners of a rotated or shifted input are beyond it.
        pixels: The network's input.
        tokens: Targets, inside of the mix box those of the partner.
        box: The mix box as fractions of the input; None: no mixing.
    """

    image: Image.Image
    map: Cells | None
    region: np.ndarray
    corners: np.ndarray
    crop: np.ndarray
    pixels: Image.Image
    tokens: Cells
    box: np.ndarray | None

    def shares(self, count: int) -> np.ndarray:
        """Returns float64 [count]: the share of each class in the panels of map and targets."""
        parts = [cells for cells in (self.tokens, self.map) if cells]
        named = [(cells, cells.classes >= 0) for cells in parts]  # the map of a teacher that is sure of nothing has −1
        return np.mean([np.bincount(c.classes[n], c.strength[n] / c.classes.size, count) for c, n in named], 0)


def draw_batch(batch: Batch, loader: TokenLabelLoader, opacity: float = 0.55) -> Image.Image:
    """Draws a batch of a loader.

    Args:
        batch: The batch.
        loader: Its loader.
        opacity: 0 to 1: opacity of a class of probability 1 over the image.

    Returns:
        The picture.

    Raises:
        InputError: The opacity is out of range.
        IntegrityError: An image has changed since it was labeled.
    """
    if not 0 <= opacity <= 1:
        raise InputError("opacity is out of range", got=opacity, expected="0 to 1")
    rows = _rows(batch, loader)
    shares, labels = [row.shares(loader.aux_classes or loader.num_classes) for row in rows], batch.labels.tolist()
    if loader.aux_classes is not None:  # labels of the images' own classes, which no cell has
        labels = [-1] * len(labels)
    total = np.sum(shares, 0)
    present = [c for c in np.argsort(-total, kind="stable").tolist() if total[c] or c in labels]
    colors = assign_colours(present)
    page = Image.new("RGB", (WIDTH, HEADER + ROW * len(rows) + FOOTER), PAPER)
    draw = ImageDraw.Draw(page)
    for left, heading in zip(LEFTS, HEADINGS, strict=True):
        draw.text((left, MARGIN - 4), heading, SOFT, FONT)
    for b, row in enumerate(rows):
        top = HEADER + b * ROW
        for left, panel in zip(LEFTS, _panels(row, colors, opacity), strict=True):
            page.paste(panel, (left, top))
        draw.text((MARGIN, top + HEIGHT + 6), f"{b + 1}   {batch.keys[b][-64:]}", INK, FONT)
        if row.box is not None:
            whose = f"inside the box: targets{' and pixels' * batch.mixed_pixels} of image {len(rows) - b}"
            draw.text((LEFTS[2], top + HEIGHT + 6), whose, SOFT, FONT)
        _legend(draw, top + HEIGHT + 6 + LINE, shares[b], labels[b], colors, loader)
    draw_caption(page, MARGIN, page.height - FOOTER, "cell", opacity, len(present) > len(colors))
    return page


def draw_caption(page: Image.Image, left: int, top: int, cell: str, opacity: float, others: bool) -> None:
    """Draws the legend in one line: a scale of strengths, and the gray of other classes.

    Args:
        page: The picture.
        left: Position of the line in pixels.
        top: Position of the line in pixels.
        cell: Word for a cell.
        opacity: Opacity of a class of probability 1.
        others: Whether other classes occur.
    """
    draw = ImageDraw.Draw(page)

    def say(text: str) -> None:
        nonlocal left
        draw.text((left, top), text, SOFT, FONT)
        left += round(draw.textlength(text, FONT)) + 6

    say(f"Colour: the most probable class of each {cell}; the stronger, the more probable:  0%")
    scale = Cells(np.zeros((1, STEPS), np.int64), FAINTEST + (1 - FAINTEST) * np.linspace(0, 1, STEPS)[None])
    ground = Image.new("RGB", (STEPS * (SWATCH + 4), SWATCH), MIDDLE)
    page.paste(tinted(ground, scale, WHOLE, {0: COLOURS[0]}, opacity), (left, top + 3))
    left += ground.width + 6
    say("100%" + (".  " if others else "."))
    if others:
        draw.rectangle((left, top + 3, left + SWATCH, top + 3 + SWATCH), OTHER)
        left += SWATCH + 6
        say("other classes.")


def assign_colours(classes: Sequence[int]) -> Colors:
    """Assigns a color to each class: its own, or the next that is free.

    Args:
        classes: Class ids, the most frequent first.

    Returns:
        class id -> RGB; the last classes have none if there are too few colors.
    """
    palette = _palette()
    assigned: Colors = {}
    for number in classes[: len(palette)]:
        turned = palette[number % len(palette) :] + palette[: number % len(palette)]
        assigned[number] = next(color for color in turned if color not in assigned.values())
    return assigned


def first_classes(maps: ScoreMaps) -> list[Cells]:
    """Finds the palette's most probable class of each cell, for each map; `maps`: as arrays."""
    p = class_shares(maps).p
    slot, strength = p.argmax(1), FAINTEST + (1 - FAINTEST) * p.max(1)
    first = np.take_along_axis(maps.classes, slot.reshape(len(slot), -1), 1).reshape(slot.shape)
    return [Cells(c, s) for c, s in zip(first, strength, strict=True)]


def _rows(batch: Batch, loader: TokenLabelLoader) -> list[Row]:
    """Collects what to draw of each image."""
    config, samples, mix = loader.config, loader.samples, batch.mix
    of_tokens = {name: tensor.numpy() for name, tensor in batch.targets.to("cpu").tensors().items()}
    scores, background = (of_tokens[name] for name in ("token_scores", "token_background"))
    maps_of_tokens = ScoreMaps(
        of_tokens["classes"],
        scores.reshape(*scores.shape[:2], *config.grid),
        background.reshape(-1, *config.grid),
        num_classes=loader.aux_classes or loader.num_classes,
        tail_classes=of_tokens["tail_classes"],
        tail_offsets=of_tokens["tail_offsets"],
    )
    tokens, box = first_classes(maps_of_tokens), None
    if mix is not None and mix.lam < 1:
        inside = mix.mask(config.grid).view(config.grid).numpy()
        tokens = [
            Cells(np.where(inside, other.classes, own.classes), np.where(inside, other.strength, own.strength))
            for own, other in zip(tokens, reversed(tokens), strict=True)
        ]
        box = np.array([mix.y0, mix.x0, mix.y1, mix.x1]) / np.tile(config.grid, 2)
    stored = None if samples.store is None else samples.store.read(batch.rows)
    maps: Sequence[Cells | None] = [None] * len(batch) if stored is None else first_classes(stored)
    corners = batch.views.to_image(torch.tensor([CORNERS] * len(batch), dtype=torch.float64)).numpy()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    pixels = ((batch.images.cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    rows = []
    for b, (key, crop) in enumerate(zip(batch.keys, batch.views.boxes.numpy(), strict=True)):
        sample = int(np.searchsorted(samples.positions, samples.source.keys.index(key)))
        image = open_rgb(samples.read(sample), samples.orientation)
        region = WHOLE if stored is None else stored.region[b]
        rows.append(Row(image, maps[b], region, corners[b], crop, Image.fromarray(pixels[b]), tokens[b], box))
    return rows


def _panels(row: Row, colors: Colors, opacity: float) -> list[Image.Image]:
    """Draws the four panels of an image."""
    # Image and outline, as large as the panel allows.
    low, high = np.minimum(row.corners.min(0), 0), np.maximum(row.corners.max(0), 1)
    sides, room = np.array(row.image.size[::-1]), np.array([HEIGHT, WIDE])
    # Only an outline beyond the image needs room for its line and dot.
    spare = 2 * (DOT_RADIUS + 1) if (low < 0).any() or (high > 1).any() else 0
    size = sides * ((room - spare) / ((high - low) * sides)).min()
    start = room / 2 - size * (low + high) / 2
    shape = tuple(np.rint(size).astype(int).clip(1)[::-1].tolist())
    image = row.image.resize(shape, Image.Resampling.LANCZOS)
    panels = [Image.new("RGB", (WIDE, HEIGHT), MOUNT) for _ in range(2)]
    corner = tuple(np.rint(start[::-1]).astype(int).tolist())
    panels[0].paste(image, corner)
    if row.map is not None:
        panels[1].paste(tinted(image, row.map, row.region, colors, opacity), corner)
    _outline(panels[0], start + _corners(row.crop) * size, thin=True)
    _outline(panels[0], start + row.corners * size)
    _dot(panels[0], start + row.corners[0] * size)
    pixels = row.pixels.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    panels += [pixels, tinted(pixels, row.tokens, WHOLE, colors, opacity)]
    if row.box is not None:
        for panel in panels[2:]:
            _outline(panel, _corners(row.box) * HEIGHT)
    _dot(panels[2], np.full(2, DOT_RADIUS + 2))
    return panels


def tinted(image: Image.Image, cells: Cells, region: np.ndarray, colors: Colors, opacity: float) -> Image.Image:
    """Tints a gray image with the colors of cells.

    Args:
        image: The image.
        cells: Classes and strengths of the cells.
        region: y0, x0, y1, x1 of the part that the cells cover, as fractions.
        colors: class id -> RGB; others are gray.
        opacity: Opacity of a class of probability 1.

    Returns:
        The tinted image.
    """
    tints = np.array([colors.get(c, OTHER) for c in cells.classes.ravel().tolist()], np.uint8)
    return lay_over(image, tints.reshape(*cells.classes.shape, 3), opacity * cells.strength, region)


def _corners(box: np.ndarray) -> np.ndarray:
    """Returns [4, 2]: (y, x) of the corners of a box, in the order of `CORNERS`."""
    return box[:2] + np.array(CORNERS) * (box[2:] - box[:2])


def _outline(panel: Image.Image, corners: np.ndarray, thin: bool = False) -> None:
    """Draws a closed line through points [4, 2]; white inside of black is visible on any background."""
    line = [(x, y) for y, x in (*corners, *corners[:2])]
    for color, width in ((SOFT, 1),) if thin else ((INK, 5), (PAPER, 2)):
        ImageDraw.Draw(panel).line(line, color, width, joint="curve")


def _dot(panel: Image.Image, point: np.ndarray) -> None:
    """Draws a dot at (y, x)."""
    ImageDraw.Draw(panel).circle((point[1], point[0]), DOT_RADIUS, DOT, PAPER)


def _legend(draw: Draw, top: int, shares: np.ndarray, label: int, colors: Colors, loader: TokenLabelLoader) -> None:
    """Draws the names of the row's classes, the true one first, then by their share, as many as fit."""
    common = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] > RARE and c != label]
    store, left = loader.samples.store, float(MARGIN)
    first = [label] if loader.aux_classes is None else []
    for i, number in enumerate([*first, *common]):
        name = "not known" if number < 0 else class_name(store, number) if store else f"class {number}"
        text = " ".join(f"{'true class: ' * (number == label)}{name}".split())
        end = left + SWATCH + 6 + draw.textlength(text, FONT)
        if end > WIDTH - MARGIN - (i < len(common)) * MORE:
            draw.text((left, top), f"and {len(first) + len(common) - i} more", SOFT, FONT)
            break
        draw.rectangle((left, top + 3, left + SWATCH, top + 3 + SWATCH), colors.get(number, OTHER))
        draw.text((left + SWATCH + 6, top), text, INK, FONT)
        left = end + 20


def _palette() -> list[tuple[int, int, int]]:
    """Returns the report's colors, then others as far as possible from those before; none is near gray or black."""
    levels = range(0, 256, 51)
    vivid = [(r, g, b) for r in levels for g in levels for b in levels if max(r, g, b) - min(r, g, b) > 150]
    chosen = list(COLOURS)
    while len(chosen) < MANY_COLORS:
        distance = np.square(np.array(vivid)[:, None] - np.array(chosen)).sum(2).min(1)
        chosen.append(vivid[int(distance.argmax())])
    return chosen
