"""Means, paired differences and their standard errors.

The differences between two arms are paired: the same network, images and seed. Few seeds say
little about the spread of one row, so the spread of the differences over seeds is pooled over all rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row's results over its seeds: values of both arms, seed by seed, and what the second has more."""

    name: str
    parameters: int
    first: list[float]
    second: list[float]

    @property
    def gains(self) -> list[float]:
        return [after - before for before, after in zip(self.first, self.second, strict=True)]


def paired(results: Sequence[dict[str, Any]], arms: tuple[str, str]) -> list[Row]:
    """Group results by row, in their order; seeds of which one arm is missing are left out, and so are empty rows."""
    values = {(one["row"], one["arm"], one["seed"]): one["top1"] for one in results}
    sizes = {one["row"]: one["parameters"] for one in results}
    rows = []
    for name, size in sizes.items():
        seeds = sorted({seed for row, _, seed in values if row == name})
        both = [seed for seed in seeds if all((name, arm, seed) in values for arm in arms)]
        columns = [[values[name, arm, seed] for seed in both] for arm in arms]
        if both:
            rows.append(Row(name, size, columns[0], columns[1]))
    return rows


def pooled_deviation(rows: Sequence[Row]) -> float:
    """Standard deviation of a row's paired difference from seed to seed, pooled over rows; NaN with one seed."""
    squares = [(gain - statistics.mean(row.gains)) ** 2 for row in rows for gain in row.gains]
    freedom = sum(len(row.gains) - 1 for row in rows)
    return math.sqrt(sum(squares) / freedom) if freedom else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter NaN for fewer than two values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
