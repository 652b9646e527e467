"""The command line: `python -m labeler label | verify | report | merge | push | pull | import-token-labels`.

Exit status: 0 all done; 1 the run could not finish (the same command resumes); 2 bad input or usage; 3 done, but some
images are in the quarantine; 4 an integrity check failed; 143 stopped by a signal, with everything finished kept.
"""

from __future__ import annotations

from labeler.base.signals import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # before the imports, which take seconds

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from labeler.arguments import ADDED
from labeler.base.command_line import parser_of_command, parser_of_commands, run_command
from labeler.base.settings import settings_of
from labeler.base.signals import STOP_SIGNALS, STOPPED
from labeler.config import LabelerConfig
from labeler.teacher.teacher_config import TeacherConfig

if TYPE_CHECKING:
    from labeler.checks.audit import Audit

QUARANTINED = 3


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = command_parser().parse_args(arguments)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        return run_command(options, extra="label")
    except Stopped:
        print("stopped; everything committed is kept, and the same command resumes", file=sys.stderr)
        return STOPPED


def command_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    description = "Dense class labels from a teacher network, in a label store with checksums."
    return parser_of_commands("labeler", description, ADDED, RUNS)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the parser of one command, for completion and documentation."""
    return parser_of_command(command_parser(), command)


def _stop(number: int, frame: object) -> NoReturn:
    """Handles a signal by raising Stopped."""
    raise Stopped


def _label(options: argparse.Namespace) -> int:
    """Runs `label`."""
    from labeler.run import label_images

    summary = label_images(options.images, options.store, _config(options))
    audit = _audit_of_labels(options) if options.audit and summary.rows else None
    if options.json:
        print(json.dumps({**asdict(summary), "audit": audit and asdict(audit)}))
    else:
        known = "" if summary.agreement is None else f", agreement with the folders' classes {summary.agreement:.1%}"
        share = "" if summary.kl_of_reference is None else f" ({summary.kl_of_reference:.2f} of top-5 float16 files')"
        ignored = f" ({summary.other_files} files of other types ignored)" if summary.other_files else ""
        if summary.head:
            print(summary.head.text())
        print(
            f"{summary.rows:,} images in {summary.shards} shards, {summary.quarantined} in the quarantine{ignored}\n"
            f"{summary.labeled_now:,} labeled now in {summary.seconds:.1f} s ({summary.images_per_s:.1f} images/s)\n"
            f"{summary.bytes_per_image:,.0f} bytes per image, KL from the teacher {summary.kl:.4f} nats{share}, "
            f"first class kept in {summary.first_kept:.1%} of the cells{known}\n{summary.store}"
        )
        if audit:
            print(audit.text())
        if summary.quarantined:
            print(f"see {Path(options.store) / 'quarantine.jsonl'}", file=sys.stderr)
    return QUARANTINED if summary.quarantined else 0


def _audit_of_labels(options: argparse.Namespace) -> Audit:
    """Audits the new labels with the teacher that this command names, whatever the store says about its teacher."""
    from labeler.checks.audit import audit_labels
    from labeler.store.label_store import LabelStore

    # The workers of a cluster may have a device that this machine lacks.
    device = "auto" if options.workers and options.ray_address else options.device
    audit, _ = audit_labels(
        LabelStore(options.store), options.images, options.audit, device=device, progress=not options.quiet
    )
    return audit


def _verify(options: argparse.Namespace) -> int:
    """Runs `verify`."""
    from labeler.checks.verify import verify_store

    result = verify_store(
        options.store,
        options.images,
        options.relabel,
        device=options.device,
        progress=not options.quiet,
        trusted=options.trusted,
    )
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        for problem in result.problems:
            print(f"bad: {problem}", file=sys.stderr)
        print(result.text())
    return 4 if result.problems else 0


def _report(options: argparse.Namespace) -> int:
    """Runs `report`."""
    from labeler.report.page import write_report

    report = write_report(
        options.store,
        options.images,
        options.out,
        truth=options.truth,
        sample=options.sample,
        title=options.title,
        audit=options.audit,
        device=options.device,
        trusted=options.trusted,
        progress=not options.quiet,
    )
    if options.json:
        t, a = report.truth, report.audit
        truth = None if t is None else {"right": t.right, "cells": t.cells, "images": t.images}
        record = {"report": str(options.out), "sampled": report.sampled, "missing": report.missing, "truth": truth}
        print(json.dumps({**record, "audit": a and asdict(a)}))
    else:
        if report.missing:
            print(f"{report.missing:,} of {report.sampled:,} sampled images were not found", file=sys.stderr)
        if report.audit:
            print(report.audit.text())
        print(options.out)
    return 0


def _merge(options: argparse.Namespace) -> int:
    """Runs `merge`."""
    from labeler.store.parts.merge_stores import merge_stores

    merged = merge_stores(options.stores, options.store, options.copy)
    print(json.dumps(asdict(merged)) if options.json else merged.text())
    return 0


def _import(options: argparse.Namespace) -> int:
    """Runs `import-token-labels`."""
    from labeler.importers import import_token_label_files

    summary = import_token_label_files(
        options.files, options.images, options.store, num_classes=options.num_classes, class_names=options.class_names,
        progress=not options.quiet,
    )  # fmt: skip
    print(json.dumps(asdict(summary)) if options.json else summary.text())
    return QUARANTINED if summary.quarantined else 0


def _push(options: argparse.Namespace) -> int:
    """Runs `push`."""
    from labeler.share.push_store import push_store

    done = push_store(options.store, options.url, progress=not options.quiet)
    print(json.dumps(asdict(done)) if options.json else f"{done.text()}\n{done.url}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    """Runs `pull`."""
    from labeler.share.pull_store import pull_store

    done = pull_store(options.url, options.store, progress=not options.quiet, trusted=options.trusted)
    print(json.dumps(asdict(done)) if options.json else f"{done.text()}\n{done.store}")
    return 0


def _config(options: argparse.Namespace) -> LabelerConfig:
    """Returns the settings that the flags of `label` give."""

    def given(group: Any) -> dict[str, Any]:
        values = {one.name: getattr(options, one.name) for one in settings_of(group) if hasattr(options, one.name)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    teacher = TeacherConfig(**{**given(TeacherConfig), "name": options.teacher, "flip": options.tta == "flip"})
    return LabelerConfig(**{**given(LabelerConfig), "teacher": teacher, "progress": not options.quiet})


RUNS = {
    "label": _label,
    "verify": _verify,
    "report": _report,
    "push": _push,
    "pull": _pull,
    "merge": _merge,
    "import-token-labels": _import,
}


if __name__ == "__main__":
    # A signal between the return of main and here must not print a stack trace.
    status = main()
    sys.stdout.flush()
    os._exit(status) if status == STOPPED else sys.exit(status)
