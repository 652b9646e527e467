"""Means, paired differences and their standard errors.

Differences are paired: what is compared has the same seed, and where two ways to teach a network are, the same network
and images. Few seeds say little about the spread of one difference, so the spread over seeds is pooled over a table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.evidence.tables import Table

Key = tuple[str, str]  # row and arm of a table


@dataclass(frozen=True)
class Comparison:
    """Results of one thing against another, seed by seed.

    Attributes:
        row: whose row of the table it is.
        parameters: of its network.
        first: shares of right answers of what it is compared with.
        second: its own.
    """

    row: str
    parameters: int
    first: list[float]
    second: list[float]

    @property
    def gains(self) -> list[float]:
        return [after - before for before, after in zip(self.first, self.second, strict=True)]


def compare_all(table: Table, results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """The comparisons of a table: the second arm with the first, or each row with the first one.

    Seeds of which one side is missing are left out, and so are rows without any.
    """
    if len(table.arms) == 2:
        sides = [((row.name, table.arms[0].name), (row.name, table.arms[1].name)) for row in table.rows]
    else:
        sides = [((table.rows[0].name, table.arms[0].name), (row.name, table.arms[0].name)) for row in table.rows]
    return [found for first, second in sides if (found := compare(results, first, second)) is not None]


def compare(results: Sequence[dict[str, Any]], first: Key, second: Key) -> Comparison | None:
    """Compares what has the key `second` with what has `first`; None: no seed has both."""
    sides = [{one["seed"]: one for one in results if (one["row"], one["arm"]) == key} for key in (first, second)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    columns = [[side[seed]["top1"] for seed in seeds] for side in sides]
    return Comparison(second[0], sides[1][seeds[0]]["parameters"], columns[0], columns[1])


def pooled_deviation(comparisons: Sequence[Comparison]) -> float:
    """Standard deviation of a paired difference from seed to seed, pooled over comparisons; NaN with one seed."""
    told = [one.gains for one in comparisons if any(one.gains)]  # not the first row with itself
    squares = [(gain - statistics.mean(gains)) ** 2 for gains in told for gain in gains]
    freedom = sum(len(gains) - 1 for gains in told)
    return math.sqrt(sum(squares) / freedom) if freedom else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter NaN for fewer than two values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
