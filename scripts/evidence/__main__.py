"""Tables of what token labels bring, trained on CIFAR-10 and written into docs/evidence.md.

    python -m scripts.evidence families --data cifar10-24k.zip --teacher-weights lite1.safetensors --seeds 0 1 2
    python -m scripts.evidence families --render           # write the table again, without training

Run again, it keeps what is done and goes on; results of other seeds, rows and arms stay in the table until the file of
results is removed. Runs and labels lie below --out, results in benchmarks/evidence; docs/evidence.png shows all tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from scripts.evidence.ablations import TABLES
from scripts.evidence.data import Teachers, label_all, unpack_pictures
from scripts.evidence.plots import draw
from scripts.evidence.render import markdown, write
from scripts.evidence.runs import plan, stores_of, train_all
from scripts.evidence.tables import Table

PICTURE = "evidence.png"  # beside the page


def main(arguments: Sequence[str] | None = None) -> int:
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser("python -m scripts.evidence", description=lines[0])
    parser.add_argument("table", choices=TABLES, help="the table")
    parser.add_argument("--data", type=Path, help=".zip file of train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--teacher-weights", type=Path, help="ImageNet weights of EfficientNet-Lite1, .safetensors")
    parser.add_argument("--teacher", type=Path, help="folder of a finished run, to be the teacher in its place")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds (%(default)s)")
    parser.add_argument("--rows", nargs="+", help="only these rows (default: all)")
    parser.add_argument("--arms", nargs="+", help="only these arms (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with one thread each (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after this time")
    parser.add_argument("--render", action="store_true", help="write the table from the results that exist")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/evidence"), help="folder of results (%(default)s)"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"), help="page to write to (%(default)s)")
    options = parser.parse_args(arguments)
    table = TABLES[options.table]
    for kind, choices in (("row", table.rows), ("arm", table.arms)):
        names, wanted = [choice.name for choice in choices], getattr(options, f"{kind}s")
        if unknown := set(wanted or []) - set(names):
            parser.error(f"no such {kind}: got {min(unknown)!r}, expected any of {', '.join(names)}")
    results = options.results / f"{table.name}.json"
    try:
        if not options.render:
            collect(table, options, results)
        write(table, results, options.page)
        draw(TABLES.values(), options.results, options.page.with_name(PICTURE))
    except InputError as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    print(f"\n{markdown(table, json.loads(results.read_text()))}\n\n{results}, {options.page}")
    return 0


def collect(table: Table, options: argparse.Namespace, results: Path) -> None:
    """Trains what is missing; the file of results is written after each run."""
    runs = plan(table, options.arms, options.seeds, options.out, options.rows)
    if options.data is None:
        raise InputError("nothing to train on", got="no --data", expected="the archive of CIFAR-10")
    stores = stores_of(runs)
    taught = any(labels.true_cells is None for labels in stores)
    if taught and (options.teacher_weights is None) == (options.teacher is None):
        got = "neither" if options.teacher is None else "both"
        raise InputError("one teacher makes the labels", got=got, expected="--teacher-weights or --teacher")
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = unpack_pictures(options.data, options.out, table.pictures)
    before = json.loads(results.read_text()) if results.exists() else {"labels": {}, "results": []}
    teachers = Teachers(options.teacher_weights, options.teacher)
    labels = label_all(pictures, stores, teachers, options.out)
    known = before["results"]
    for one in train_all(runs, pictures, options.jobs, options.minutes):
        known = with_result(known, one, table)
        # Where earlier results stay, so do the figures of the labels that they had.
        found = {"labels": {**labels, **before["labels"]}, "results": known}
        print(f"{one['row']:20}{one['arm']:14}seed {one['seed']}  {one['top1']:.2%}", file=sys.stderr, flush=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        replace_file(results, json.dumps(found, indent=1).encode() + b"\n")


def with_result(known: Sequence[dict[str, Any]], one: dict[str, Any], table: Table) -> list[dict[str, Any]]:
    """Results with one more, in the place of an earlier one of the same run; without those of rows that are gone."""
    places = {(row.name, arm.name) for row in table.rows for arm in table.arms}
    kept = [other for other in known if (other["row"], other["arm"]) in places]
    return [*(other for other in kept if any(other[key] != one[key] for key in ("row", "arm", "seed"))), one]


if __name__ == "__main__":
    raise SystemExit(main())
