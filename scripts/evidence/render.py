"""A table's results as Markdown, put into a page between two marks."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from scripts.evidence.statistics import HALF, Comparison, compare_all, gaps_of_halves, mean_and_error, pooled_deviation
from scripts.evidence.tables import Table

END = "<!-- end of the table -->"


def markdown(table: Table, found: dict[str, Any]) -> str:
    """The table, and what all rows have in common.

    Args:
        table: what was trained.
        found: the file of its results.
    """
    rows = compare_all(table, found["results"])
    deviation = pooled_deviation(rows)
    lines = (_two_arms if len(table.arms) == 2 else _one_arm)(table, rows, deviation, found["labels"])
    notes = []
    if len(table.arms) == 2 and rows:
        mean, error = mean_and_error([statistics.mean(row.gains) for row in rows])
        notes.append(f"Mean difference of the {len(rows)} rows: {100 * mean:+.1f}{_plus_minus(error)} points.")
    if not math.isnan(deviation):
        notes.append(f"From seed to seed a difference varies by {100 * deviation:.1f} points.")
    if gaps := gaps_of_halves(rows):
        agree, largest = sum(gap < 2 * error for gap, error in gaps), max(gaps)
        notes.append(
            f"Seeds below {HALF} and from {HALF} on, apart: {agree} of {len(gaps)} differences agree within two "
            f"standard errors; the largest gap is {100 * largest[0]:.1f}{_plus_minus(largest[1])} points."
        )
    hours = sum(one["cpu_seconds"] for one in found["results"]) / 3600
    notes.append(f"{len(found['results'])} runs took {hours:.1f} hours of one core.")
    if len(found["labels"]) == 1:
        (labels,) = found["labels"].values()
        if labels["teacher"] is not None:
            notes.append(f"The teacher is right on {labels['teacher']:.1%} of CIFAR-10's test images.")
        if labels["agreement"] is not None:
            notes.append(f"{labels['agreement']:.1%} of the maps name the image's class.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes).replace("%", " %")


def _two_arms(
    table: Table, rows: Sequence[Comparison], deviation: float, labels: dict[str, dict[str, Any]]
) -> list[str]:
    """A row for each network: both arms and their difference."""
    titles = {row.name: row.title for row in table.rows}
    lines = [
        f"| | parameters | seeds | {table.arms[0].title} | {table.arms[1].title} | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        both = " | ".join(_percent(statistics.mean(values)) for values in (row.first, row.second))
        lines.append(
            f"| {titles[row.row]} | {row.parameters:,} | {len(row.gains)} | {both} | {_gain(row, deviation)} |"
        )
    return lines


def _one_arm(
    table: Table, rows: Sequence[Comparison], deviation: float, labels: dict[str, dict[str, Any]]
) -> list[str]:
    """A row for each choice: its result, what its labels are if they differ, and the difference from the first row."""
    choices = {row.name: row for row in table.rows}
    told = len({table.labels_of(row, table.arms[0]).name for row in table.rows}) > 1
    columns = [
        "",
        *(["teacher", "maps that name the class", "bytes a row"] if told else []),
        "seeds",
        "right",
        "difference",
    ]
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|" + "---|" * len(columns)]
    for row in rows:
        choice, (mean, error) = choices[row.row], mean_and_error(row.second)
        about: list[str] = []
        if told:
            about = _about(labels.get(table.labels_of(choice, table.arms[0]).name), _unlabeled(choice.overrides))
        gain = "" if choice is table.rows[0] else _gain(row, deviation)
        cells = [choice.title, *about, str(len(row.second)), _percent(mean, error), gain]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return lines


def _unlabeled(overrides: Sequence[str]) -> bool:
    return bool({"data.store=none", "data.token_labels=false"} & set(overrides))


def _about(labels: dict[str, Any] | None, unlabeled: bool) -> list[str]:
    """The teacher's accuracy, the share of right maps and the bytes of a row."""
    if labels is None or unlabeled:
        return ["", "", ""]
    agreement = "" if labels["agreement"] is None else _percent(labels["agreement"])
    teacher = "" if labels["teacher"] is None else _percent(labels["teacher"])
    return [teacher, agreement, f"{labels['bytes']:.0f}"]


def _gain(row: Comparison, deviation: float) -> str:
    return f"{100 * statistics.mean(row.gains):+.1f}{_plus_minus(deviation / math.sqrt(len(row.gains)))}"


def _percent(share: float, error: float = math.nan) -> str:
    return f"{100 * share:.1f}{_plus_minus(error)} %"


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {100 * error:.1f}"


def write(table: Table, results: Path, page: Path) -> None:
    """Replaces the table in a page by that of a file of results. Raises InputError as `fill` does."""
    fill(page, table.name, markdown(table, json.loads(results.read_text())))


def fill(page: Path, name: str, text: str) -> None:
    """Replaces what stands between a table's marks.

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
