"""All tables in one picture: each row's difference, in points, with its standard error."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

from labeler.base.whole_files import replace_file
from scripts.evidence.statistics import Comparison, compare_all, pooled_deviation
from scripts.evidence.tables import Table

COLUMNS, WIDTH, ROW, EDGE, DPI = 2, 5.5, 0.22, 0.9, 110


def draw(tables: Iterable[Table], results: Path, picture: Path) -> None:
    """Draws the tables that have results.

    Args:
        tables: what may have been trained.
        results: folder of the files of results.
        picture: PNG file to write.
    """
    known = [
        (table, json.loads(file.read_text())) for table in tables if (file := results / f"{table.name}.json").exists()
    ]
    shown = [(table, rows) for table, found in known if (rows := _told(table, found["results"]))]
    if not shown:
        return
    from matplotlib.figure import Figure

    lines = -(-len(shown) // COLUMNS)
    longest = [max(len(rows) for _, rows in shown[line * COLUMNS : (line + 1) * COLUMNS]) for line in range(lines)]
    heights = [EDGE + ROW * count for count in longest]
    figure = Figure(figsize=(WIDTH * COLUMNS, sum(heights)), dpi=DPI, layout="constrained")
    plots = list(figure.subplots(lines, COLUMNS, squeeze=False, height_ratios=heights).ravel())
    for plot, (table, rows) in zip(plots, shown, strict=False):
        _panel(plot, table, rows)
    for plot in plots[len(shown) :]:
        plot.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(picture, buffer.getvalue())


def _told(table: Table, results: list[dict[str, Any]]) -> list[Comparison]:
    """The comparisons of a table, without that of its first row with itself."""
    return compare_all(table, results)[0 if len(table.arms) == 2 else 1 :]


def _panel(plot: Any, table: Table, rows: list[Comparison]) -> None:
    """One table: a point for each row, the first on top."""
    titles = {row.name: row.title for row in table.rows}
    deviation = pooled_deviation(rows)
    means = [100 * statistics.mean(row.gains) for row in rows]
    errors = [0.0 if math.isnan(deviation) else 100 * deviation / math.sqrt(len(row.gains)) for row in rows]
    places = range(len(rows), 0, -1)
    plot.errorbar(means, places, xerr=errors, fmt="o", ms=4, capsize=2)
    plot.axvline(0, color="black", lw=0.8)
    plot.set_yticks(places, [fill(titles[row.row].replace("`", ""), 32) for row in rows], fontsize=7)
    plot.set_ylim(0.4, len(rows) + 0.6)
    against = table.arms[0].title if len(table.arms) == 2 else titles[table.rows[0].name]
    plot.set_title(fill(f"{table.name}: points more than “{against}”", 48), fontsize=8)
    plot.locator_params(axis="x", nbins=6)
    plot.tick_params(axis="x", labelsize=7)
    plot.grid(axis="x", alpha=0.3)
