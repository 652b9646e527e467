"""Small SVG charts and images for the report, as self-contained HTML."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from labeler.report.template import fill

# Ten colors that are distinct over photographs and for most color-blind readers.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (153, 79, 214),
    (150, 220, 90),
    (255, 120, 130),
)
OTHER = (128, 128, 128)

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 190, 44, 34
FLOOR = HEIGHT - BOTTOM  # y of the horizontal axis
Point = tuple[float, float, str]  # x, y, name


@dataclass(frozen=True)
class Shape:
    """An element of an SVG image.

    Attributes:
        tag: Its SVG name.
        attributes: Its SVG attributes.
        text: Its text.
        hover: Text that is shown when the pointer is on it.
    """

    tag: str
    attributes: dict[str, str]
    text: str
    hover: str


def histogram(
    values: np.ndarray, label: str, *, bins: int = 32, top: float | None = None, percent: bool = False
) -> Markup:
    """Draws a histogram with the median marked.

    Args:
        values: The values.
        label: Caption.
        bins: Number of bins.
        top: End of the axis; None: the largest value.
        percent: Show values in percent.

    Returns:
        The chart as HTML.
    """
    values = np.asarray(values, np.float64).ravel()
    high = top if top is not None else max(float(values.max()), 1e-9)
    low = 0.0 if values.min() >= 0 and values.min() < high / 2 else float(values.min())
    counts, edges = np.histogram(values, bins, (low, high if high > low else low + 1))
    low, high = float(edges[0]), float(edges[-1])
    width, tall = (WIDTH - LEFT) / bins, max(1, counts.max())
    shapes = [
        _shape("rect", "bar", x=LEFT + i * width, width=width - 1, y=FLOOR * (1 - count / tall),
               height=FLOOR * count / tall,
               hover=f"{_tick(edges[i], percent)} to {_tick(edges[i + 1], percent)}: {count:,}")
        for i, count in enumerate(counts.tolist())
    ]  # fmt: skip
    middle = float(np.median(values))
    x = LEFT + (WIDTH - LEFT) * (middle - low) / (high - low)
    anchor, shift = ("end", -5) if x > WIDTH - 110 else ("start", 5)
    shapes += [
        _shape("line", "mark", x1=x, x2=x, y1=0, y2=FLOOR),
        _text(x + shift, 12, f"median {_tick(middle, percent)}", anchor, "strong"),
        _shape("line", "axis", x1=LEFT, x2=WIDTH, y1=FLOOR, y2=FLOOR),
        *(
            _text(LEFT + (WIDTH - LEFT) * i / 4, FLOOR + 15, _tick(low + (high - low) * i / 4, percent), place)
            for i, place in enumerate(("start", "middle", "middle", "middle", "end"))
        ),
        _text(LEFT - 6, 10, f"{tall:,}", "end"),
    ]
    return _draw(shapes, label)


def curve(values: Sequence[float], label: str) -> Markup:
    """Draws shares (0 to 1) against 1, 2, 3 … as a line with points."""
    count = len(values)
    step, every = (WIDTH - LEFT - 16) / max(1, count - 1), max(1, count // 8)

    def down(share: float) -> float:
        return FLOOR * (1 - 0.95 * share)

    points = [(LEFT + 8 + i * step, down(value)) for i, value in enumerate(values)]
    shapes = [shape for level in (0.25, 0.5, 0.75, 1.0) for shape in _level(down(level), f"{level:.0%}")]
    shapes.append(_line(points))
    shapes += [
        _shape("circle", "dot", cx=x, cy=y, r=3.5 if count <= 32 else 1.5, hover=f"{i + 1}: {value:.2%}")
        for i, ((x, y), value) in enumerate(zip(points, values, strict=True))
    ]
    shapes += [_text(x, FLOOR + 15, str(i + 1)) for i, (x, _) in enumerate(points) if i % every == 0]
    return _draw(shapes, label)


def heat_grid(values: np.ndarray, label: str) -> Markup:
    """Draws a grid [H, W] of shares between 0 and 1; NaN cells are empty."""
    height, width = values.shape
    side = min((WIDTH - LEFT) / width, (FLOOR + 10) / height)
    left = (WIDTH - side * width) / 2
    cells = [
        _shape("rect", x=left + j * side, y=i * side, width=side - 1, height=side - 1,
               fill=f"hsl({120 * value:.0f} 55% 48%)", hover=f"row {i}, column {j}: {value:.1%}")
        for i, row in enumerate(values.tolist())
        for j, value in enumerate(row)
        if value == value
    ]  # fmt: skip
    return _draw(cells, label)


def scatter(line: Sequence[Point], marks: Sequence[Point], label: str) -> Markup:
    """Draws points joined by a line, and marked points with their names; x is logarithmic, y starts at 0."""
    every = [*line, *marks]
    low, high = (math.log2(end(x for x, _, _ in every)) + room for end, room in ((min, -0.3), (max, 0.3)))
    top = 1.15 * max(max(y for _, y, _ in every), 1e-9)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT) * (math.log2(x) - low) / (high - low)

    def down(y: float) -> float:
        return FLOOR * (1 - y / top)

    step = _round_step(top / 3)
    shapes = [shape for k in range(int(top / step) + 1) for shape in _level(down(k * step), _tick(k * step, False))]
    shapes.append(_line((across(x), down(y)) for x, y, _ in line))
    shapes += [
        _shape("circle", kind, cx=across(x), cy=down(y), r=radius, hover=f"{name}: {x:,.0f} bytes, {y:.3f} nats")
        for points, kind, radius in ((line, "dot", 3), (marks, "spot", 5))
        for x, y, name in points
    ]
    for x, y, name in marks:
        anchor, shift = ("start", 8) if across(x) < 0.6 * WIDTH else ("end", -8)
        shapes.append(_text(across(x) + shift, down(y) - 7, name, anchor, "strong"))
    shapes += [
        _text(across(2.0**k), FLOOR + 15, f"{2**k:,}")
        for k in range(math.ceil(low), math.floor(high) + 1)
        if LEFT + 8 < across(2.0**k) < WIDTH - 14
    ]
    return _draw(shapes, label)


def _round_step(most: float) -> float:
    """Returns the largest of 1, 2 and 5 times a power of ten that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(power * k for k in (1, 2, 5) if power * k <= most * 1.000001)


def bars(rows: Sequence[tuple[str, float]], label: str, form: str = ".1%") -> Markup:
    """Draws named shares, or other numbers in the format `form`, as horizontal bars."""
    top = max((value for _, value in rows), default=1) or 1
    return fill("bars.html", rows=rows, top=top, label=label, form=form)


def picture(image: Any, quality: int = 85) -> Markup:
    """Returns an <img> tag that contains a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    tag = Markup('<img src="data:image/jpeg;base64,{}" width="{}" height="{}" alt="">')
    return tag.format(data, image.width, image.height)


def lay_over(image: Any, colours: np.ndarray, strength: np.ndarray, region: np.ndarray) -> Any:
    """Tints a gray image with the colors of cells.

    Args:
        image: A PIL image.
        colours: uint8 [H, W, 3]: color of each cell.
        strength: float [H, W]: opacity of each cell, 0 to 1.
        region: y0, x0, y1, x1 of the part that the cells cover, as fractions.

    Returns:
        The tinted image.
    """
    from PIL import Image

    height, width = image.height, image.width
    box = (round(region[1] * width), round(region[0] * height), round(region[3] * width), round(region[2] * height))
    size = (max(1, box[2] - box[0]), max(1, box[3] - box[1]))
    tint = Image.fromarray(colours.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    mask = Image.fromarray((255 * strength).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    # The image is gray under the tint, since its own colors would mix with those of the cells.
    base = image.convert("L").convert("RGB")
    base.paste(tint, box[:2], mask)
    return base


def _draw(shapes: Sequence[Shape], label: str) -> Markup:
    """Returns a figure with a caption."""
    return fill("chart.html", shapes=shapes, label=label, width=WIDTH, height=HEIGHT)


def _shape(tag: str, kind: str = "", text: str = "", hover: str = "", **attributes: float | str) -> Shape:
    """Returns an element of the class `kind` of the style sheet; numbers get one decimal."""
    values = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in attributes.items()}
    return Shape(tag, {"class": kind, **values} if kind else values, text, hover)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> Shape:
    """Returns a text that starts, is centered or ends at x."""
    return _shape("text", kind, text, x=x, y=y, **{"text-anchor": anchor})


def _line(points: Iterable[tuple[float, float]]) -> Shape:
    """Returns a line through points."""
    return _shape("polyline", "line", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _level(y: float, text: str) -> tuple[Shape, Shape]:
    """Returns a horizontal grid line and its label."""
    return _shape("line", "grid", x1=LEFT, x2=WIDTH, y1=y, y2=y), _text(LEFT - 6, y + 4, text, "end")


def _tick(value: float, percent: bool) -> str:
    """Returns a number as text."""
    if percent:
        return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
