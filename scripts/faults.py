"""The fault matrix: runs the tests that inject faults, prints which rows hold, and writes `docs/reliability.md`.

    python -m scripts.faults            full counts (this is `make faults`; about ten minutes on two CPU cores)
    python -m scripts.faults --quick    the counts of the ordinary suite; writes no page

A row holds if all tests that are marked with its number passed, and at least one did. If its tests were skipped, the
row gives the reason instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from labeler.base.cores import usable_cores
from labeler.base.whole_files import replace_file

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
ROWS = {
    1: ("labeler worker killed", "rerun; none lost, none doubled"),
    2: ("crash inside a task", "attempts bounded, then the shard is named, the rest finishes"),
    3: ("driver killed", "rerun completes"),
    4: ("two drivers at once", "first marker wins; store equal to one driver's"),
    5: ("node lost", "shards rerun elsewhere"),
    6: ("worker out of memory", "attempts bounded, clear message"),
    7: ("kill at each step of a commit", "shard absent or whole"),
    8: ("power loss", "digest refuses, only that shard is labeled again"),
    9: ("disk full, file too large", "exit ≠ 0, older shards good, no temporary file left"),
    10: ("fsync or rename fails", "no marker"),
    11: ("bit flip in a shard's payload", "refused; only that shard is labeled again"),
    12: ("bit flip in a shard's metadata", "refused"),
    13: ("shard truncated or padded", "refused"),
    14: ("shard or marker missing", "the error names it"),
    15: ("images, teacher or settings changed between runs", "refuses to mix, says what differs"),
    16: ("bad image: truncated, empty, text, GIF, 1×1, 20000×1", "quarantine, exit 3, all others labeled"),
    17: ("pixel bomb", "quarantine, memory bounded"),
    18: ("EXIF, CMYK, palette, 16-bit", "labeler and loader see the same pixels"),
    19: ("image changed after labeling", "refused before training, or at the batch, by name"),
    20: ("traversal, link out of the root, NUL, duplicate, case collision", "exit 2, line number"),
    21: (
        "hostile HDF5: external storage, links, virtual data, huge dimensions, unbounded strings, cycles, disabled "
        "checksums, unknown filter",
        "refused, no other file touched",
    ),
    22: ("a file that crashes or hangs libhdf5", "the caller survives"),
    23: ("pickle in `.pt`, checkpoint, TokenLabeling file", "refused, no code run"),
    24: ("tensor bomb: strides, compression", "refused before any allocation"),
    25: ("killed in the middle of a checkpoint", "the previous one loads"),
    26: ("newest checkpoint corrupt", "falls back, says so"),
    27: ("disk full at a checkpoint", "old one kept, training says so"),
    28: ("SIGTERM, SIGINT", "saved, 143, resume equal bit for bit"),
    29: ("NaN or infinite loss", "skipped, buffers clean; stops after K"),
    30: ("resume at every step, also inside an accumulation", "equal bit for bit"),
    31: ("loader state of other data, batch, world size", "refused in one line"),
    32: ("a rank dies", "the others stop within a minute, no hang"),
    33: ("labels with NaN, class ids out of range", "refused"),
    34: ("label row missing for a training image", "named before the first batch"),
    35: (
        "config: unknown key, duplicate key, wrong type, `1e-3` as text, deep nesting",
        "one line, nearest valid name",
    ),
    36: ("GPU out of memory", "says the batch that would fit; checkpoint kept"),
    37: ("Ray address unreachable, version mismatch", "one line, no stack trace"),
    38: ("clock jumps, locale, non-UTF-8 names, spaces and newlines in paths", "same store"),
    39: ("read-only data, read-only store", "reading works; writing says so"),
    40: ("open-file and process limits", "works within, or says which limit"),
}


class Recorder:
    """A pytest plugin that records which tests belong to which row, and their outcomes."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.ended: dict[str, tuple[str, str]] = {}
        self.seconds: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.rows[item.nodeid] = [number for mark in item.iter_markers("fault") for number in mark.args]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.ended[report.nodeid] = ("failed", report.when or "")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.ended.setdefault(report.nodeid, ("skipped", reason.removeprefix("Skipped: ")))
        elif report.when == "call":
            self.ended.setdefault(report.nodeid, ("passed", ""))

    def of_row(self, number: int) -> list[tuple[str, str, str]]:
        """Returns (test, outcome, reason) of every test of a row."""
        return [(test, *self.ended[test]) for test, rows in self.rows.items() if number in rows and test in self.ended]


def outcome(tests: list[tuple[str, str, str]]) -> str:
    """Returns "held", or why a row does not hold."""
    failed = [test for test, how, _ in tests if how == "failed"]
    skipped = [reason for _, how, reason in tests if how == "skipped"]
    if failed:
        return f"**failed**: {', '.join(test.split('::')[-1] for test in failed)}"
    if not any(how == "passed" for _, how, _ in tests):
        return f"not shown: {skipped[0]}" if skipped else "not shown: no test"
    return "held" + (f"; a part was skipped: {skipped[0]}" if skipped else "")


def figure(outcomes: dict[int, str], totals: Counter[str]) -> str:
    held = sum(text.startswith("held") for text in outcomes.values())
    return (
        f"{held} of {len(ROWS)} as specified; {totals['kills']:,} kills; labels lost {totals['lost']}, duplicated "
        f"{totals['doubled']}; shards byte-identical {totals['shards_identical']:,} of {totals['shards']:,}; silent "
        f"corruptions {totals['silent']} of {totals['corruptions']:,}; resumed digest equal "
        f"{totals['resumed_equal']:,} of {totals['resumed']:,}"
    )


def read_tallies(path: Path) -> tuple[Counter[str], dict[int, Counter[str]]]:
    total: Counter[str] = Counter()
    by_row: dict[int, Counter[str]] = defaultdict(Counter)
    for line in path.read_text().splitlines() if path.exists() else ():
        seen: dict[str, Any] = json.loads(line)
        row = seen.pop("row")
        total.update(seen)
        by_row[row].update(seen)
    return total, by_row


def page(outcomes: dict[int, str], by_row: dict[int, Counter[str]], told: str, tests: int, seconds: float) -> str:
    lines = [
        "# Reliability",
        "",
        "Written by `make faults` (`python -m scripts.faults`); do not edit. Every row is injected by tests against",
        "real files, processes, signals and a local Ray; `tests/` marks them with the row's number.",
        "",
        f"**{told}.**",
        "",
        f"{tests} tests in {seconds / 60:.0f} minutes; {platform.platform(terse=True)}, "
        f"{usable_cores()} CPU cores, Python {platform.python_version()}.",
        "",
        "| # | fault | must happen | outcome | counted |",
        "|---|---|---|---|---|",
    ]
    for number, (fault, must) in ROWS.items():
        seen = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in by_row.get(number, {}).items())
        lines.append(f"| {number} | {fault} | {must} | {outcomes[number]} | {seen} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run with reduced counts; only print the result")
    parser.add_argument(
        "--row", type=int, action="append", choices=ROWS, metavar="N", help="run only these rows; only print the result"
    )
    options = parser.parse_args()
    recorder, started = Recorder(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tallies = Path(folder) / "tally.jsonl"
        os.environ["FAULT_TALLY"] = str(tallies)
        if not options.quick:
            os.environ["FAULTS"] = "full"
        sys.path.insert(0, str(ROOT / "tests"))
        arguments = ["-q", "--durations=0", "--timeout=3600", "-m", "fault", str(ROOT / "tests")]
        pytest.main(arguments, plugins=[recorder, *([_OnlyRows(options.row)] if options.row else [])])
        totals, by_row = read_tallies(tallies)
    seconds = time.perf_counter() - started
    outcomes = {number: outcome(recorder.of_row(number)) for number in options.row or ROWS}
    for number, text in outcomes.items():
        print(f"{number:3}  {ROWS[number][0]:60.60}  {text}")
    if options.row:
        return 0 if all(text.startswith("held") for text in outcomes.values()) else 1
    text = figure(outcomes, totals)
    print(f"\n{text}")
    if not options.quick:
        PAGE.parent.mkdir(exist_ok=True)
        replace_file(PAGE, page(outcomes, by_row, text, len(recorder.ended), seconds).encode())
        print(PAGE)
    return 0 if all(text.startswith("held") for text in outcomes.values()) else 1


class _OnlyRows:
    """A pytest plugin that deselects the tests of other rows."""

    def __init__(self, rows: list[int]) -> None:
        self._rows = set(rows)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items for mark in item.iter_markers("fault") if self._rows & set(mark.args)]


if __name__ == "__main__":
    sys.exit(main())
