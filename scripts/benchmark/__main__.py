"""Benchmarks of each part on this machine, against its alternatives.

    python -m scripts.benchmark                              # every suite: about an hour on two cores
    python -m scripts.benchmark store loss --quick           # a quick look: a few minutes, no files are written
    python -m scripts.benchmark --images PHOTOS              # with your photographs instead of drawn images
    python -m scripts.benchmark store --images PHOTOS --teacher NAME --checkpoint FILE      # with a real teacher's maps
    python -m scripts.benchmark --device cuda                # every suite except store
    python -m scripts.benchmark --render                     # write docs/benchmarks.md again, without measuring

Suites: store, labeler, loader, targets, loss, scan, model, train. The device does not matter for store, so with
--device cuda it only runs if it is named. Results are written to benchmarks/<machine>.json, where a suite replaces its
earlier results, and from all such files to docs/benchmarks.md and its plots. Do not use the machine for anything else
meanwhile: torch's threads wait for each other, so one other busy process makes small operations many times slower. Exit
status: 0 done, even if the machine lacks what some cases need; 1 a suite failed, the results of the others are kept; 2
bad usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labeler.base.errors import TokenLabelError
from labeler.sources.folder_source import find_images
from scripts.benchmark.machine import describe, versions
from scripts.benchmark.measure import Options, in_own_process
from scripts.benchmark.table import render, text

SUITES = ("store", "labeler", "loader", "targets", "loss", "scan", "model", "train")


def main() -> int:
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(
        "scripts.benchmark", description=lines[0], epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    none = "none: all of them, with --device cuda all but store"
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; {none}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="run fewer rounds with smaller sizes; write no files")
    parser.add_argument("--images", type=Path, help="a folder of photographs (default: drawn ones)")
    parser.add_argument(
        "--teacher", default=Options.teacher, help="a real teacher: `store` measures its maps of --images"
    )
    parser.add_argument("--checkpoint", type=Path, help="the teacher's weights (default: its pretrained weights)")
    parser.add_argument(
        "--rows", type=int, default=Options.rows, help="rows of the largest store in `store` (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of results (default: benchmarks)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the table and plots (default: docs)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files, 15 GB in a full run of `store`")
    parser.add_argument("--render", action="store_true", help="only write the table and plots, from existing results")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    refuse_impossible(parser, options)
    if options.render:
        render(options.out, options.docs)
        return 0
    machine, failed = describe(options.device), []
    found: dict[str, Any] = {"machine": machine, "suites": {}}
    for suite in options.suites or [name for name in SUITES if name != "store" or options.device == "cpu"]:
        print(f"{suite} …", file=sys.stderr, flush=True)
        try:
            found["suites"][suite] = measured(suite, options)
        except RuntimeError as error:
            print(f"{suite} failed: {error}; see its output above", file=sys.stderr)
            failed.append(suite)
            continue
        except KeyboardInterrupt:
            print(f"{suite} interrupted; earlier results are kept", file=sys.stderr)
            return 130
        if not options.quick:
            keep(found, options.out)
            render(options.out, options.docs)
    print(json.dumps(found) if options.json else text(found))
    return 1 if failed else 0


def refuse_impossible(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"no such suite: got {unknown[0]!r}, expected any of {', '.join(SUITES)}")
    for name, folder in {"images": options.images, "scratch": options.scratch}.items():
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: got {str(folder)!r}, expected an existing folder")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        parser.error(f"--checkpoint: got {str(options.checkpoint)!r}, expected an existing file")
    if options.rows < 1000:
        parser.error(f"--rows: got {options.rows}, expected 1000 or more")
    if options.images is not None:
        try:
            find_images(options.images)
        except TokenLabelError as error:
            parser.error(f"--images: {error}")
    if options.render and not list(options.out.glob("*.json")):
        parser.error(f"--render: no results in {str(options.out)!r}; measure first, or give their folder with --out")
    if not options.quick:
        try:
            for folder in (options.out, options.docs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"the folder {str(folder)!r} cannot be created: {error.strerror}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU; `python -m train doctor` says why")


def measured(suite: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a suite in a separate process, so that none affects another; returns its result as plain values."""
    started = time.monotonic()
    found = in_own_process(
        "scripts.benchmark.__main__:run_suite", suite, options.device, options.quick,
        None if options.images is None else str(options.images.resolve()),
        None if options.scratch is None else str(options.scratch.resolve()),
        teacher=options.teacher, rows=options.rows,
        checkpoint=None if options.checkpoint is None else str(options.checkpoint.resolve()),
    )  # fmt: skip
    chosen = {"device": options.device, "quick": options.quick, "photographs": "given" if options.images else "drawn"}
    if suite == "store":  # paths are the user's own
        chosen["asked"] = asked(options)
    about = {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - started), "versions": versions()}
    return {**about, **chosen, **found}


def asked(options: argparse.Namespace) -> str:
    """Returns the options of `store` that differ from their defaults, as docs/benchmarks.md shows them."""
    given = {"--teacher": options.teacher, "--checkpoint": options.checkpoint and "FILE", "--rows": options.rows}
    usual = {"--teacher": Options.teacher, "--checkpoint": None, "--rows": Options.rows}
    return " ".join(f"{name} {value}" for name, value in given.items() if value != usual[name])


def run_suite(
    suite: str, device: str, quick: bool, images: str | None, scratch: str | None, **chosen: Any
) -> dict[str, Any]:
    """Runs a suite in this process. `chosen`: teacher, checkpoint and rows, see `Options`."""
    import importlib

    from labeler.base.runtime import set_threads
    from scripts.benchmark.inputs.photographs import prepare

    cores = set_threads(None)  # as training does, before torch starts its threads
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"  # keeps the list of checked stores out of the user's folder
        photographs = prepare(None if images is None else Path(images), Path(folder) / "drawn")
        module = importlib.import_module(f"scripts.benchmark.suites.{suite}_suite")
        settings = Options(device, quick, photographs, Path(folder), cores, drawn=images is None, **chosen)
        return asdict(module.run(settings))


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes this run's results to the machine's file; each suite replaces its earlier result."""
    path = folder / f"{found['machine']['name']}.json"
    known = (json.loads(path.read_text())["suites"] if path.exists() else {}) | found["suites"]
    suites = {name: known[name] for name in SUITES if name in known}
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps({"machine": found["machine"], "suites": suites}, indent=1) + "\n")
    os.replace(written, path)


if __name__ == "__main__":
    sys.exit(main())
