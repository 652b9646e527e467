"""Sheets of small pictures, one for each layer: maps of a quantity, forget gates, classes of the tokens.

Legend: S input side; h×w grid of a layer's tokens; C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from labeler.report.charts import OTHER
from model.inside.measures import Forget, LayerInside
from pipeline.batch_picture import (
    FAINTEST,
    FONT,
    GAP,
    INK,
    LINE,
    MARGIN,
    MOUNT,
    PAPER,
    SOFT,
    SWATCH,
    WHOLE,
    Cells,
    assign_colours,
    tinted,
)
from train.explain.quantities import Panel

SIDE, COLUMNS = 144, 6  # side of a panel in pixels, panels in a row
OPACITY = 0.7
NAMED = 12  # classes in the legend
# From dark to bright, evenly by eye and for color-blind readers.
SCALE = np.array(
    [(13, 8, 60), (65, 20, 110), (120, 35, 115), (175, 55, 95), (222, 90, 62), (247, 145, 40), (252, 205, 80),
     (252, 250, 200)], float,
)  # fmt: skip
Tile = tuple[str, Image.Image, str]  # what stands above it, the picture, what stands below it


def map_sheet(pixels: np.ndarray, panels: Sequence[Panel]) -> Image.Image:
    """The network's input uint8 [S, S, 3], and beside it each layer's map with its smallest and largest value."""
    tiles = [("what the network sees", photograph(pixels), "")]
    for panel in panels:
        values = panel.values.double().numpy()
        picture = Image.fromarray(heat(values, panel.low, panel.high)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        tiles.append((panel.layer, picture, f"{values.min():.3g} to {values.max():.3g}"))
    return _sheet(tiles)


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colors uint8 [h, w, 3] of values [h, w] on the scale from `low` to `high`; the middle color if they are equal."""
    place = np.full(values.shape, 0.5) if high <= low else ((values - low) / (high - low)).clip(0, 1)
    at = np.linspace(0, 1, len(SCALE))
    return np.stack([np.interp(place, at, SCALE[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def photograph(pixels: np.ndarray) -> Image.Image:
    """The network's input uint8 [S, S, 3] at a panel's size."""
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def forget_sheet(layers: Sequence[LayerInside]) -> Image.Image:
    """A histogram of each direction's forget gate in each layer that has one."""
    return _sheet(
        [
            (f"{layer.name} {one.name}", _histogram(one.forget), f"{one.forget.mean:.3f}, {_reach(one.forget)}")
            for layer in layers
            for one in layer.directions
            if one.forget is not None
        ]
    )


def _reach(forget: Forget) -> str:
    return "no end" if math.isinf(forget.reach) else f"{forget.reach:.3g} tokens"


def _histogram(forget: Forget) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), MOUNT)
    draw, top = ImageDraw.Draw(picture), max(forget.histogram) or 1
    width = SIDE / len(forget.histogram)
    for i, share in enumerate(forget.histogram):
        draw.rectangle((i * width, SIDE * (1 - share / top), (i + 1) * width - 2, SIDE), tuple(SCALE[2].astype(int)))
    draw.line((forget.mean * SIDE, 0, forget.mean * SIDE, SIDE), tuple(SCALE[4].astype(int)), 2)
    return picture


def class_sheet(pixels: np.ndarray, layers: Sequence[LayerInside], name: Callable[[int], str]) -> Image.Image:
    """Each layer's first class of each token over the network's input uint8 [S, S, 3]; `name`: of a class."""
    read = [
        (layer, layer.classes.numpy(), layer.probability.numpy())
        for layer in layers
        if layer.classes is not None and layer.probability is not None
    ]
    last = Counter(read[-1][1].ravel().tolist())
    every = Counter(number for _, classes, _ in read for number in classes.ravel().tolist())
    order = [number for number, _ in last.most_common()]  # so that they get their colors first
    order += [number for number, _ in every.most_common() if number not in last]
    colors, image = assign_colours(order[:NAMED]), photograph(pixels)
    tiles: list[Tile] = [("what the network sees", image, "")]
    for layer, classes, probability in read:
        cells = Cells(classes, FAINTEST + (1 - FAINTEST) * probability)
        tiles.append((layer.name, tinted(image, cells, WHOLE, colors, OPACITY), f"{layer.settled:.0%} as the last"))
    named = [(colors.get(number, OTHER), name(number)) for number in order[:NAMED]]
    return _sheet(tiles, named + ([(OTHER, f"… {len(order) - NAMED} more classes")] if len(order) > NAMED else []))


def _sheet(tiles: Sequence[Tile], legend: Sequence[tuple[tuple[int, int, int], str]] = ()) -> Image.Image:
    columns = min(COLUMNS, len(tiles))
    rows, entries = math.ceil(len(tiles) / columns), max(1, columns // 2)
    step = (SIDE + GAP, SIDE + 2 * LINE + GAP)
    below = MARGIN + rows * step[1]
    size = (2 * MARGIN + columns * step[0] - GAP, below + math.ceil(len(legend) / entries) * LINE + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for i, (above, picture, note) in enumerate(tiles):
        left, top = MARGIN + i % columns * step[0], MARGIN + i // columns * step[1]
        draw.text((left, top), _fitting(draw, above, from_end=True), INK, FONT)
        page.paste(picture, (left, top + LINE))
        draw.text((left, top + LINE + SIDE + 2), _fitting(draw, note), SOFT, FONT)
    for i, (color, text) in enumerate(legend):
        left, top = MARGIN + i % entries * 2 * step[0], below + i // entries * LINE
        draw.rectangle((left, top + 3, left + SWATCH, top + 3 + SWATCH), color)
        draw.text((left + SWATCH + 6, top), _fitting(draw, text, 2 * SIDE), INK, FONT)
    return page


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int = SIDE, from_end: bool = False) -> str:
    """The text, its end cut off where it is wider than `width` pixels; `from_end`: its beginning, marked by "…"."""
    fitting = text
    while text and draw.textlength(fitting, FONT) > width:
        text = text[1:] if from_end else text[:-1]
        fitting = f"…{text}" if from_end else text
    return fitting
