"""The matrix of faults: forty things that go wrong, and what must happen; tests count what they saw here.

`scripts.faults` runs the tests that are marked with `pytest.mark.fault(number)` at full counts, reads the tallies and
writes `docs/reliability.md`. In the ordinary suite counts are reduced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FULL = os.environ.get("FAULTS") == "full"
TALLY = os.environ.get("FAULT_TALLY")


def counts(ordinary: int, full: int) -> int:
    """How often to inject a fault: few times in the ordinary suite, more often under `make faults`."""
    return full if FULL else ordinary


def tally(row: int, **seen: int) -> None:
    """Add to what is known of a row of the matrix.

    kills                            processes killed
    lost, doubled                    labels that were missing, or there twice, afterwards
    shards, shards_identical         shards compared with those of an undisturbed run, and how many had the same bytes
    corruptions, silent              damages done, and how many went unnoticed
    resumed, resumed_equal           resumed training runs, and how many ended with the undisturbed run's digest
    injected                         other faults
    """
    known = {
        "kills", "lost", "doubled", "shards", "shards_identical", "corruptions", "silent", "resumed", "resumed_equal",
        "injected",
    }  # fmt: skip
    if unknown := seen.keys() - known:
        raise TypeError(f"no such count: {sorted(unknown)}")
    if TALLY:
        with Path(TALLY).open("a") as file:
            file.write(json.dumps({"row": row, **seen}) + "\n")
