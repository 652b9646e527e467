"""Growth as pictures."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmark.measure import Growth

COLUMNS, WIDTH, HEIGHT, DPI = 2, 5.5, 3.6, 110


def draw_growths(growths: list[Growth], path: Path) -> None:
    """One plot for each, side by side."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(growths))
    rows = -(-len(growths) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DPI, layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
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
        plot.set_title(growth.name, fontsize=9)
        plot.set_xlabel(growth.x, fontsize=8)
        plot.set_ylabel(growth.unit, fontsize=8)
        plot.grid(alpha=0.3)
        plot.tick_params(labelsize=8)
        plot.legend(fontsize=7)
    for plot in plots[len(growths) :]:
        plot.axis("off")
    figure.savefig(path, format="png", metadata={"Software": None})
