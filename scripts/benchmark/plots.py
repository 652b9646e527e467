"""Plots of growths and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.benchmark.measure import Curves, Growth

COLUMNS, WIDTH, HEIGHT, DPI = 2, 5.5, 3.6, 110
MARKS = ("s", "^", "v", "x")


def draw_growths(growths: list[Growth], path: Path) -> None:
    """Draws one plot for each growth, side by side."""
    figure, plots = _plots(len(growths), COLUMNS)
    for plot, growth in zip(plots, growths, strict=False):
        for side, points in growth.points.items():
            plot.plot([x for x, _ in points], [y for _, y in points], "o-", ms=4, label=side)
        if growth.logarithmic:
            plot.set_xscale("log")
            plot.set_yscale("log")
        else:
            plot.set_ylim(bottom=0)
        places = sorted({x for points in growth.points.values() for x, _ in points})
        plot.set_xticks(places, [f"{x:,.0f}" for x in places])
        plot.set_xticks([], minor=True)
        _label(plot, growth.name, growth.x, growth.unit)
    _save(figure, path)


def draw_curves(curves: list[Curves], path: Path) -> None:
    """Draws one plot for each, in one row."""
    figure, plots = _plots(len(curves), len(curves))
    for plot, curve in zip(plots, curves, strict=True):
        colours = {}
        for side, points in curve.lines.items():
            (line,) = plot.plot(*zip(*sorted(map(tuple, points)), strict=True), "o-", ms=4, label=side)
            colours[side.split(",")[0]] = line.get_color()
        for (side, points), shape in zip(curve.marks.items(), MARKS * len(curve.marks), strict=False):
            # Marks have the color of the line whose name is the same up to the comma.
            colour = colours.get(side.split(",")[0], "black")
            plot.plot(*zip(*points, strict=True), shape, ms=7, mfc="none", color=colour, label=side)
        plot.set_ylim(bottom=0)
        plot.set_xlim(left=0)
        _label(plot, curve.name, curve.x, curve.y)
    _save(figure, path)


def _plots(count: int, columns: int) -> tuple[Any, list[Any]]:
    """Returns a figure with `count` plots, at most `columns` in a row, and the plots."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DPI, layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for plot in plots[count:]:
        plot.axis("off")
    return figure, plots[:count]


def _label(plot: Any, name: str, x: str, y: str) -> None:
    plot.set_title(name, fontsize=9)
    plot.set_xlabel(x, fontsize=8)
    plot.set_ylabel(y, fontsize=8)
    plot.grid(alpha=0.3)
    plot.tick_params(labelsize=8)
    plot.legend(fontsize=7)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})
