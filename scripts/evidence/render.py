"""A table's results as Markdown, put into a page between two marks."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from scripts.evidence.statistics import mean_and_error, paired, pooled_deviation
from scripts.evidence.tables import Table

END = "<!-- end of the table -->"


def markdown(table: Table, found: dict[str, Any]) -> str:
    """The table, and a line with what all rows have in common.

    Args:
        table: what was trained.
        found: the file of its results.
    """
    arms = (table.arms[0], table.arms[1])
    rows = paired(found["results"], (arms[0].name, arms[1].name))
    titles = {row.name: row.title for row in table.rows}
    deviation = pooled_deviation(rows)
    lines = [f"| | parameters | seeds | {arms[0].title} | {arms[1].title} | difference |", "|---|---|---|---|---|---|"]
    for row in rows:
        gain = f"{100 * statistics.mean(row.gains):+.1f}{_plus_minus(deviation / math.sqrt(len(row.gains)))}"
        both = " | ".join(f"{statistics.mean(values):.1%}".replace("%", " %") for values in (row.first, row.second))
        lines.append(f"| {titles[row.name]} | {row.parameters:,} | {len(row.gains)} | {both} | {gain} |")
    mean, error = mean_and_error([statistics.mean(row.gains) for row in rows]) if rows else (math.nan, math.nan)
    hours = sum(one["cpu_seconds"] for one in found["results"]) / 3600
    notes = [f"Mean difference of the {len(rows)} rows: {100 * mean:+.1f}{_plus_minus(error)} points."]
    if not math.isnan(deviation):
        notes.append(f"From seed to seed a row's difference varies by {100 * deviation:.1f} points.")
    notes.append(f"{len(found['results'])} runs took {hours:.1f} hours of one core.")
    if found["teacher"] is not None:
        notes.append(f"The teacher is right on {found['teacher']:.1%} of the test images.")
    if found["agreement"] is not None:
        notes.append(f"{found['agreement']:.1%} of its maps name the image's class.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes).replace("%", " %")


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {100 * error:.1f}"


def write(table: Table, results: Path, page: Path) -> None:
    """Replace the table in a page by that of a file of results. Raises InputError as `fill` does."""
    fill(page, table.name, markdown(table, json.loads(results.read_text())))


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between a table's marks.

    Args:
        page: a Markdown file.
        name: the table's name in its mark.
        text: what shall stand there.

    Raises:
        InputError: the page has no marks for this table.
    """
    mark = f"<!-- table: {name} -->"
    place = re.compile(re.escape(mark) + ".*?" + re.escape(END), re.S)
    before = page.read_text()
    if not place.search(before):
        raise InputError(f"{page} has no place for the table", got=f"no {mark}", expected=f"{mark} and {END}")
    replace_file(page, place.sub(lambda _: f"{mark}\n{text}\n{END}", before).encode())
