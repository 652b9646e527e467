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
HALF = 3  # seeds below it and from it on are compared: tables of six seeds were trained by two commands


@dataclass(frozen=True)
class Comparison:
    """Results of one thing against another, seed by seed.

    Attributes:
        row: whose row of the table it is.
        parameters: of its network.
        first: shares of right answers of what it is compared with.
        second: its own.
        seeds: of each of them.
    """

    row: str
    parameters: int
    first: list[float]
    second: list[float]
    seeds: list[int]

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
    return Comparison(second[0], sides[1][seeds[0]]["parameters"], columns[0], columns[1], seeds)


def pooled_deviation(comparisons: Sequence[Comparison]) -> float:
    """Standard deviation of a paired difference from seed to seed, pooled over comparisons; NaN with one seed."""
    return _pooled([one.gains for one in comparisons if any(one.gains)])  # not the first row with itself


def _pooled(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation about each group's own mean, pooled; NaN where no group has two values."""
    squares = [(value - statistics.mean(group)) ** 2 for group in groups for value in group]
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(squares) / freedom) if freedom else math.nan


def gaps_of_halves(comparisons: Sequence[Comparison]) -> list[tuple[float, float]]:
    """The gap between the mean differences of seeds below `HALF` and from it on, and its standard error.

    Of each comparison that has two seeds or more of both.
    """
    halves = []
    for one in comparisons:
        of_seed = dict(zip(one.seeds, one.gains, strict=True))
        first, second = ([g for s, g in of_seed.items() if (s < HALF) == low] for low in (True, False))
        if any(one.gains) and min(len(first), len(second)) > 1:
            halves.append((first, second))
    spread = _pooled([half for both in halves for half in both])
    return [
        (abs(statistics.mean(a) - statistics.mean(b)), spread * math.sqrt(1 / len(a) + 1 / len(b))) for a, b in halves
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter NaN for fewer than two values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
