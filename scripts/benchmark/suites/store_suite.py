"""The label store: its size, error and read speed, and how they grow with the number of rows."""

from __future__ import annotations

from scripts.benchmark.measure import Options, Result
from scripts.benchmark.studies import store_growth, store_real, store_truth


def run(options: Options) -> Result:
    parts = [store_real.run(options), store_truth.run(options), store_growth.run(options)]
    return Result(
        [case for part in parts for case in part.cases],
        [growth for part in parts for growth in part.growths],
        {name: reason for part in parts for name, reason in part.left_out.items()},
        [curves for part in parts for curves in part.curves],
    )
