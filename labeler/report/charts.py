"""Small SVG charts and images for the report, as self-contained strings."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

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
Point = tuple[float, float, str]  # x, y, name


def histogram(
    values: np.ndarray, label: str, *, bins: int = 32, top: float | None = None, percent: bool = False
) -> str:
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
    width = (WIDTH - LEFT) / bins
    tall = max(1, counts.max())
    bars = "".join(
        f'<rect class="bar" x="{LEFT + i * width:.1f}" width="{width - 1:.1f}" '
        f'y="{(HEIGHT - BOTTOM) * (1 - count / tall):.1f}" height="{(HEIGHT - BOTTOM) * count / tall:.1f}">'
        f"<title>{_tick(edges[i], percent)} to {_tick(edges[i + 1], percent)}: {count:,}</title></rect>"
        for i, count in enumerate(counts.tolist())
    )
    middle = float(np.median(values))
    x = LEFT + (WIDTH - LEFT) * (middle - edges[0]) / (edges[-1] - edges[0])
    anchor = "end" if x > WIDTH - 110 else "start"
    shift = -5 if anchor == "end" else 5
    marks = (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="strong" x="{x + shift:.1f}" y="12" text-anchor="{anchor}">'
        f"median {_tick(middle, percent)}</text>"
    )
    return _frame(bars + marks + _x_axis(edges[0], edges[-1], percent) + _y_axis(tall), label)


def curve(values: Sequence[float], label: str) -> str:
    """Draws shares (0 to 1) against 1, 2, 3 … as a line with points."""
    count = len(values)
    step = (WIDTH - LEFT - 16) / max(1, count - 1)
    points = [(LEFT + 8 + i * step, (HEIGHT - BOTTOM) * (1 - 0.95 * value)) for i, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    radius = 3.5 if count <= 32 else 1.5
    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{i + 1}: {value:.2%}</title></circle>'
        for i, ((x, y), value) in enumerate(zip(points, values, strict=True))
    )
    every = max(1, count // 8)
    ticks = "".join(
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{i + 1}</text>'
        for i, (x, _) in enumerate(points)
        if i % every == 0
    )
    levels = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{(HEIGHT - BOTTOM) * (1 - 0.95 * v):.1f}" '
        f'y2="{(HEIGHT - BOTTOM) * (1 - 0.95 * v):.1f}"/><text x="{LEFT - 6}" text-anchor="end" '
        f'y="{(HEIGHT - BOTTOM) * (1 - 0.95 * v) + 4:.1f}">{v:.0%}</text>'
        for v in (0.25, 0.5, 0.75, 1.0)
    )
    return _frame(f'{levels}<polyline class="line" points="{line}"/>{dots}{ticks}', label)


def heat_grid(values: np.ndarray, label: str) -> str:
    """Draws a grid [H, W] of shares between 0 and 1; NaN cells are empty."""
    height, width = values.shape
    side = min((WIDTH - LEFT) / width, (HEIGHT - BOTTOM + 10) / height)
    left = (WIDTH - side * width) / 2
    cells = "".join(
        f'<rect x="{left + j * side:.1f}" y="{i * side:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" '
        f'fill="hsl({120 * value:.0f} 55% 48%)"><title>row {i}, column {j}: {value:.1%}</title></rect>'
        for i, row in enumerate(values.tolist())
        for j, value in enumerate(row)
        if value == value
    )
    return _frame(cells, label)


def scatter(line: Sequence[Point], marks: Sequence[Point], label: str) -> str:
    """Draws points joined by a line, and marked points with their names; x is logarithmic, y starts at 0."""
    every = [*line, *marks]
    low, high = (math.log2(end(x for x, _, _ in every)) + room for end, room in ((min, -0.3), (max, 0.3)))
    top = 1.15 * max(max(y for _, y, _ in every), 1e-9)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT) * (math.log2(x) - low) / (high - low)

    def down(y: float) -> float:
        return (HEIGHT - BOTTOM) * (1 - y / top)

    joined = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in line)
    dots = "".join(
        f'<circle class="{kind}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="{radius}">'
        f"<title>{escape(name)}: {x:,.0f} bytes, {y:.3f} nats</title></circle>"
        for points, kind, radius in ((line, "dot", 3), (marks, "spot", 5))
        for x, y, name in points
    )
    names = []
    for x, y, name in marks:
        anchor, shift = ("start", 8) if across(x) < 0.6 * WIDTH else ("end", -8)
        names.append(
            f'<text class="strong" x="{across(x) + shift:.1f}" y="{down(y) - 7:.1f}" text-anchor="{anchor}">'
            f"{escape(name)}</text>"
        )
    ticks = "".join(
        f'<text x="{across(2.0**k):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{2**k:,}</text>'
        for k in range(math.ceil(low), math.floor(high) + 1)
        if LEFT + 8 < across(2.0**k) < WIDTH - 14
    )
    step = _round_step(top / 3)
    levels = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{down(k * step):.1f}" y2="{down(k * step):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{down(k * step) + 4:.1f}" text-anchor="end">{_tick(k * step, False)}</text>'
        for k in range(int(top / step) + 1)
    )
    return _frame(f'{levels}<polyline class="line" points="{joined}"/>{dots}{"".join(names)}{ticks}', label)


def _round_step(most: float) -> float:
    """Returns the largest of 1, 2 and 5 times a power of ten that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(power * k for k in (1, 2, 5) if power * k <= most * 1.000001)


def bars(rows: Sequence[tuple[str, float]], label: str, form: str = ".1%") -> str:
    """Draws named shares, or other numbers in the format `form`, as horizontal bars."""
    top = max((share for _, share in rows), default=1) or 1
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td><div class='rule' style='width:{100 * share / top:.1f}%'></div></td>"
        f"<td class='n'>{share:{form}}</td></tr>"
        for name, share in rows
    )
    return f"<figure><table class='bars'>{lines}</table><figcaption>{escape(label)}</figcaption></figure>"


def picture(image: Any, quality: int = 85) -> str:
    """Returns an <img> tag that contains a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="">'


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


def _frame(inside: str, label: str) -> str:
    """Returns a figure with a caption."""
    return (
        f'<figure><svg viewBox="0 -4 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inside}</svg>'
        f"<figcaption>{escape(label)}</figcaption></figure>"
    )


def _x_axis(low: float, high: float, percent: bool) -> str:
    """Draws the horizontal axis."""
    ticks = "".join(
        f'<text x="{LEFT + (WIDTH - LEFT) * i / 4:.1f}" y="{HEIGHT - BOTTOM + 15}" '
        f'text-anchor="{("start", "middle", "middle", "middle", "end")[i]}">'
        f"{_tick(low + (high - low) * i / 4, percent)}</text>"
        for i in range(5)
    )
    return f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>{ticks}'


def _y_axis(tall: int) -> str:
    """Labels the vertical axis."""
    return f'<text x="{LEFT - 6}" y="10" text-anchor="end">{tall:,}</text>'


def _tick(value: float, percent: bool) -> str:
    """Returns a number as text."""
    if percent:
        return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
