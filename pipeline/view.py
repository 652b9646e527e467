"""A training batch as one picture, so that a person can see that images and token labels agree.

Legend: B images; C classes; P palette size; S input side; H×W map grid; h×w token grid, T = h·w.

Each image has a row of four panels: itself with the outline of what the network sees of it, its whole stored map, the
network's input, and the targets of the input's tokens. A dot marks the input's upper left corner in both places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from labeler.decode_reference import open_rgb
from labeler.errors import InputError
from labeler.report import class_name
from labeler.report_charts import COLOURS, OTHER, lay_over
from labeler.store import LabelStore
from pipeline.batch import Batch
from pipeline.loader import TokenLabelLoader

Colour = tuple[int, int, int]
Colours = dict[int, Colour]

HEIGHT, WIDE = 224, 280  # of every panel; width of the first two, that of the others is HEIGHT
MARGIN, GAP, LINE = 16, 10, 21
LEFTS = (MARGIN, MARGIN + WIDE + GAP, MARGIN + 2 * (WIDE + GAP), MARGIN + 2 * (WIDE + GAP) + HEIGHT + GAP)
WIDTH, HEADER, ROW = LEFTS[3] + HEIGHT + MARGIN, MARGIN + LINE, HEIGHT + 2 * LINE + 24
HEADINGS = ("image, and what the input shows", "its stored label map", "network input", "token targets")
PAPER, MOUNT, INK, SOFT, DOT = (255, 255, 255), (236, 236, 238), (25, 25, 30), (110, 110, 118), (255, 40, 40)
DOT_RADIUS, SWATCH = 5, 12
FAINTEST = 0.2  # share of `opacity` that a class has at probability 0: less could not be told from the grey ground
CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
MANY_COLOURS = 32
FONT = ImageFont.load_default(14)


@dataclass(frozen=True)
class Cells:
    """The most probable class of each cell, int64 [H, W], and its probability, float32 [H, W]."""

    classes: np.ndarray
    p: np.ndarray


@dataclass(frozen=True)
class Row:
    """One image of the batch.

    map      the stored map, over `region` (y0, x0, y1, x1, fractions of the image); None without a store
    corners  [4, 2]: where the input's corners lie in the image, (y, x) as fractions, from the upper left one on
    crop     [4]: y0, x0, y1, x1 of the crop in the image; corners reach beyond it where the input is rotated or shifted
    tokens   targets, the partner's inside the mix box; `box` is that box as fractions of the input
    """

    image: Image.Image
    map: Cells | None
    region: np.ndarray
    corners: np.ndarray
    crop: np.ndarray
    shown: Image.Image
    tokens: Cells
    box: np.ndarray | None

    def shares(self, count: int) -> np.ndarray:
        """float64 [count]: each class's part of the map and of the targets together."""
        both = [self.tokens] if self.map is None else [self.tokens, self.map]
        return sum(np.bincount(c.classes.ravel(), c.p.ravel(), count) / c.p.size for c in both)


def draw_batch(batch: Batch, loader: TokenLabelLoader, opacity: float = 0.55) -> Image.Image:
    """The picture of a batch of this loader.

    opacity  0 to 1: how much of the image a class of probability 1 hides
    Raises IntegrityError where an image has changed since it was labeled.
    """
    if not 0 <= opacity <= 1:
        raise InputError("opacity is a share", got=opacity, expected="0 to 1")
    rows = _rows(batch, loader)
    shares = [row.shares(loader.num_classes) for row in rows]
    common = np.argsort(-sum(shares), kind="stable")
    labels = batch.labels.tolist()
    colours = assign_colours([c for c in common.tolist() if c in labels or any(s[c] for s in shares)])
    page = Image.new("RGB", (WIDTH, HEADER + ROW * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    for left, heading in zip(LEFTS, HEADINGS, strict=True):
        draw.text((left, MARGIN - 4), heading, SOFT, FONT)
    for b, row in enumerate(rows):
        top = HEADER + b * ROW
        for left, panel in zip(LEFTS, _panels(row, colours, opacity), strict=True):
            page.paste(panel, (left, top))
        _caption(draw, top + HEIGHT + 6, b, batch, row.box is not None)
        _legend(draw, top + HEIGHT + 6 + LINE, shares[b], labels[b], colours, loader.samples.store)
    return page


def assign_colours(classes: Sequence[int]) -> Colours:
    """A colour for each class, the most frequent first: its own, or the next that is free; those left over get none."""
    palette = _palette()
    found: dict[int, int] = {}
    for number in classes[: len(palette)]:
        taken = set(found.values())
        found[number] = next(s for i in range(len(palette)) if (s := (number + i) % len(palette)) not in taken)
    return {number: palette[slot] for number, slot in found.items()}


def first_classes(
    classes: torch.Tensor, scores: torch.Tensor, background: torch.Tensor, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, T] and float32 [B, T]: the palette's most probable class and its share of the whole distribution.

    classes [B, P], scores [B, P, T], background [B, T]: as `TokenTargets` has them
    """
    used = classes >= 0
    others = background + (num_classes - used.sum(1, keepdim=True)).log()
    known = scores.masked_fill(~used[..., None], -torch.inf)
    p, place = torch.cat([known, others[:, None]], 1).softmax(1)[:, :-1].max(1)
    return classes.gather(1, place).numpy(), p.numpy()


def _rows(batch: Batch, loader: TokenLabelLoader) -> list[Row]:
    config, samples, n = loader.config, loader.samples, len(batch)
    targets = batch.targets.to("cpu")
    token, p = first_classes(targets.classes, targets.token_scores, targets.token_background, loader.num_classes)
    box = None
    if batch.mix is not None and batch.mix.lam < 1:
        inside, mix = batch.mix.mask(config.grid).numpy(), batch.mix
        token, p = np.where(inside, token[::-1], token), np.where(inside, p[::-1], p)
        box = np.array([mix.y0, mix.x0, mix.y1, mix.x1]) / np.tile(config.grid, 2)
    maps, region = _stored_maps(batch, loader)
    corners = batch.views.to_image(torch.tensor(CORNERS, dtype=torch.float64).expand(n, 4, 2)).numpy()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    pixels = ((batch.images.cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    keys, rows = samples.source.images.keys, []
    for b, key in enumerate(batch.keys):
        sample = int(np.searchsorted(samples.positions, keys.index(key)))
        image = open_rgb(samples.read(sample), samples.orientation)
        tokens = Cells(token[b].reshape(config.grid), p[b].reshape(config.grid))
        crop = batch.views.boxes[b].numpy()
        rows.append(Row(image, maps[b], region[b], corners[b], crop, Image.fromarray(pixels[b]), tokens, box))
    return rows


def _stored_maps(batch: Batch, loader: TokenLabelLoader) -> tuple[Sequence[Cells | None], np.ndarray]:
    """The map of each image, and regions [B, 4]."""
    store, n = loader.samples.store, len(batch)
    if store is None:
        return [None] * n, np.zeros((n, 4))
    maps = store.read(batch.rows).to_torch()
    classes, p = first_classes(maps.classes, maps.scores.flatten(2), maps.background.flatten(1), maps.num_classes)
    grid = store.meta.grid
    return [Cells(c.reshape(grid), q.reshape(grid)) for c, q in zip(classes, p, strict=True)], maps.region.numpy()


def _panels(row: Row, colours: Colours, opacity: float) -> list[Image.Image]:
    # The part of the plane that holds image and outline, as large as the panel allows.
    low, high = np.minimum(row.corners.min(0), 0), np.maximum(row.corners.max(0), 1)
    sides = np.array([row.image.height, row.image.width])
    room = np.array([HEIGHT, WIDE])
    # Only an outline that leaves the image needs room for its line and its dot.
    spare = 2 * (DOT_RADIUS + 1) if (low < 0).any() or (high > 1).any() else 0
    size = sides * ((room - spare) / ((high - low) * sides)).min()
    start = room / 2 - size * (low + high) / 2
    shape = tuple(np.rint(size).astype(int).clip(1)[::-1].tolist())
    image = row.image.resize(shape, Image.Resampling.LANCZOS)
    panels = []
    for picture in (image, image if row.map is None else _tinted(image, row.map, row.region, colours, opacity)):
        panel = Image.new("RGB", (WIDE, HEIGHT), MOUNT)
        panel.paste(picture, tuple(np.rint(start[::-1]).astype(int).tolist()))
        panels.append(panel)
    _outline(panels[0], start + _corners(row.crop) * size, thin=True)
    _outline(panels[0], start + row.corners * size)
    _dot(panels[0], start + row.corners[0] * size)
    if row.map is None:
        ImageDraw.Draw(panels[1]).text((12, 10), "no label store", INK, FONT)
    shown = row.shown.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    panels += [shown, _tinted(shown, row.tokens, np.array([0.0, 0.0, 1.0, 1.0]), colours, opacity)]
    if row.box is not None:
        for panel in panels[2:]:
            _outline(panel, _corners(row.box) * HEIGHT)
    _dot(panels[2], np.zeros(2))
    return panels


def _tinted(image: Image.Image, cells: Cells, region: np.ndarray, colours: Colours, opacity: float) -> Image.Image:
    tints = np.array([colours.get(c, OTHER) for c in cells.classes.ravel().tolist()], np.uint8)
    strength = opacity * (FAINTEST + (1 - FAINTEST) * cells.p)
    return lay_over(image, tints.reshape(*cells.p.shape, 3), strength, region)


def _corners(box: np.ndarray) -> np.ndarray:
    """[4, 2]: (y, x) of the corners of a box, in the order of `CORNERS`."""
    return box[:2] + np.array(CORNERS) * (box[2:] - box[:2])


def _outline(panel: Image.Image, corners: np.ndarray, thin: bool = False) -> None:
    """A closed line through places [4, 2]; white inside black shows on any ground."""
    line = [(x, y) for y, x in (*corners, *corners[:2])]
    for colour, width in ((SOFT, 1),) if thin else ((INK, 5), (PAPER, 2)):
        ImageDraw.Draw(panel).line(line, colour, width, joint="curve")


def _dot(panel: Image.Image, place: np.ndarray) -> None:
    ImageDraw.Draw(panel).circle((place[1], place[0]), DOT_RADIUS, DOT, PAPER)


def _caption(draw: ImageDraw.ImageDraw, top: int, b: int, batch: Batch, mixed: bool) -> None:
    key, room = " ".join(batch.keys[b].split()), LEFTS[2] - 4 * MARGIN
    while draw.textlength(key, FONT) > room:
        key = "…" + key[2:]
    draw.text((MARGIN, top), f"{b + 1}   {key}", INK, FONT)
    if mixed:
        whose = f"inside the box: targets{' and pixels' * batch.mixed_pixels} of image {len(batch) - b}"
        draw.text((LEFTS[2], top), whose, SOFT, FONT)


def _legend(
    draw: ImageDraw.ImageDraw, top: int, shares: np.ndarray, label: int, colours: Colours, store: LabelStore | None
) -> None:
    """The row's classes, the true one first, then by their share, as many as there is room for."""
    others = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] and c != label and c in colours]
    left = float(MARGIN)
    for number in (label, *others):
        name = "not known" if number < 0 else class_name(store, number) if store else f"class {number}"
        text = f"true class: {name}" if number == label else name
        end = left + SWATCH + 6 + draw.textlength(text, FONT)
        if end > WIDTH - MARGIN:
            break
        draw.rectangle((left, top + 3, left + SWATCH, top + 3 + SWATCH), colours.get(number, OTHER))
        draw.text((left + SWATCH + 6, top), text, INK, FONT)
        left = end + 20


def _palette() -> list[Colour]:
    """The report's colours, then others as far as can be from all before them; none is near a grey."""
    chosen = list(COLOURS)
    vivid = [c for c in product(range(0, 256, 51), repeat=3) if max(c) - min(c) > 100 and max(c) > 120]
    while len(chosen) < MANY_COLOURS:
        chosen.append(
            max(vivid, key=lambda c: min(sum((a - b) ** 2 for a, b in zip(c, o, strict=True)) for o in chosen))
        )
    return chosen
