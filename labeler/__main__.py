"""The command line: `python -m labeler label | verify | report | import-token-labels`.

Exit status: 0 all done; 1 the run stopped half-way (the same command resumes); 2 bad input or usage; 3 done, but some
images are in the quarantine; 4 an integrity check failed; 143 stopped by a signal, with everything finished kept.
"""

from __future__ import annotations

from labeler.base.interrupt import end_at_interrupt

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

from labeler.base.command_line import OneLineParser, add_command, at_least, parser_of_command, program, run_command
from labeler.base.settings import add_flags, settings_of
from labeler.config import LabelerConfig
from labeler.teacher.teacher_config import TeacherConfig

if TYPE_CHECKING:
    from labeler.audit import Audit

QUARANTINED = 3
STOPPED = 143


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return run_command(options, extra="label")
    except Stopped:
        print("stopped; everything committed is kept, and the same command goes on from there", file=sys.stderr)
        return STOPPED


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, for completion and documentation."""
    return parser_of_command(_parser(), command)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped


def _label(options: argparse.Namespace) -> int:
    from labeler.run import label_images

    summary = label_images(options.images, options.store, _config(options))
    audit = _audit_of_labels(options) if options.audit and summary.rows else None
    if options.json:
        print(json.dumps({**asdict(summary), "audit": audit and asdict(audit)}))
    else:
        known = "" if summary.agreement is None else f", agreement with the folders' classes {summary.agreement:.1%}"
        share = "" if summary.kl_of_reference is None else f" ({summary.kl_of_reference:.2f} of top-5 float16 files')"
        ignored = f" ({summary.other_files} files of other kinds left alone)" if summary.other_files else ""
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
    """The audit of what was just labeled, by the teacher that this command names: no store's word is taken for it."""
    from labeler.audit import audit_labels
    from labeler.store.label_store import LabelStore

    # The workers of a cluster may have had a device that this machine has not.
    device = "auto" if options.workers and options.ray_address else options.device
    found = audit_labels(
        LabelStore(options.store), options.images, options.audit, device=device, progress=not options.quiet
    )
    return found[0]


def _verify(options: argparse.Namespace) -> int:
    from labeler.verify import verify_store

    found = verify_store(
        options.store,
        options.images,
        options.relabel,
        device=options.device,
        progress=not options.quiet,
        trusted=options.trusted,
    )
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        for problem in found.problems:
            print(f"bad: {problem}", file=sys.stderr)
        print(found.text())
    return 4 if found.problems else 0


def _report(options: argparse.Namespace) -> int:
    from labeler.report.page import write_report

    found = write_report(
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
        t, a = found.truth, found.audit
        truth = None if t is None else {"right": t.right, "cells": t.cells, "images": t.images}
        record = {"report": str(options.out), "sampled": found.sampled, "missing": found.missing, "truth": truth}
        print(json.dumps({**record, "audit": a and asdict(a)}))
    else:
        if found.missing:
            print(f"{found.missing:,} of {found.sampled:,} sampled images were not found", file=sys.stderr)
        if found.audit:
            print(found.audit.text())
        print(options.out)
    return 0


def _import(options: argparse.Namespace) -> int:
    from labeler.importers import import_token_label_files

    summary = import_token_label_files(
        options.files, options.images, options.store, num_classes=options.num_classes, class_names=options.class_names,
        progress=not options.quiet,
    )  # fmt: skip
    print(json.dumps(asdict(summary)) if options.json else summary.text())
    return QUARANTINED if summary.quarantined else 0


def _config(options: argparse.Namespace) -> LabelerConfig:
    def given(group: Any) -> dict[str, Any]:
        values = {one.name: getattr(options, one.name) for one in settings_of(group) if hasattr(options, one.name)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    teacher = TeacherConfig(**{**given(TeacherConfig), "name": options.teacher, "flip": options.tta == "flip"})
    return LabelerConfig(**{**given(LabelerConfig), "teacher": teacher, "progress": not options.quiet})


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=program("labeler"), description="Dense class labels from a teacher, in a checked store."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_label(commands)
    verify = add_command(commands, "verify", _verify, "check every bit of a store, and that it fits its images")
    verify.add_argument("store", type=Path)
    verify.add_argument("--images", type=Path, help="also compare every image file with the one that was labeled")
    verify.add_argument(
        "--relabel", type=at_least(0), default=0, metavar="N", help="run the teacher again on N random rows"
    )
    verify.add_argument("--device", default="auto", help="for --relabel: cpu, cuda or auto")
    verify.add_argument("--trusted", action="store_true", help="the store is a friend's: --relabel may run its teacher")
    report = add_command(commands, "report", _report, "write one self-contained HTML page about a store")
    report.add_argument("store", type=Path)
    report.add_argument("--images", type=Path, required=True, help="the image root that was labeled")
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    report.add_argument("--truth", type=Path, help="folder of class-id PNGs by key: how often is the map right?")
    report.add_argument(
        "--sample", type=at_least(1), default=500, metavar="N", help="rows that the charts are drawn from"
    )
    report.add_argument("--title", help="heading of the page")
    report.add_argument(
        "--audit",
        type=at_least(0),
        default=0,
        metavar="N",
        help="say how true it all is: the teacher runs again on N images",
    )
    report.add_argument("--device", default="auto", help="for --audit: cpu, cuda or auto")
    report.add_argument("--trusted", action="store_true", help="the store is a friend's: --audit may run its teacher")
    other = add_command(commands, "import-token-labels", _import, "TokenLabeling / ReLabel .pt files to a store")
    other.add_argument("files", type=Path, help="folder of .pt maps, named and laid out like the images")
    other.add_argument("--images", type=Path, required=True)
    other.add_argument("--store", type=Path, required=True)
    other.add_argument("--num-classes", type=int, default=1000)
    other.add_argument("--class-names", help="text file, one class a line")
    return parser


def _add_label(commands: Any) -> None:
    label = add_command(commands, "label", _label, "label a folder of images; the same command again resumes")
    label.add_argument("images", type=Path, help="image root; sub-folders may name the classes")
    label.add_argument("--store", type=Path, required=True, help="folder of the label store")
    add_flags(label, LabelerConfig, "image_list", "class_names")
    teacher = label.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher",
        required=True,
        metavar="NAME",
        help="timm model, a run's folder, torchvision:NAME or package.module:function",
    )
    add_flags(
        teacher, TeacherConfig, "checkpoint", "ema", "random_weights", "num_classes", "input_size", "mean", "std",
        "view", "autocast", "compile",
    )  # fmt: skip
    teacher.add_argument(
        "--tta", choices=("none", "flip"), default="flip", help="flip: average with the mirrored image; none is cheaper"
    )
    labels = label.add_argument_group("labels")
    add_flags(
        labels, LabelerConfig, "quality", "bytes_per_image", "palette", "tail", "levels", "threshold", "precision"
    )
    labels.add_argument(
        "--audit", type=at_least(0), default=0, metavar="N", help="then say how true labels are, on N images"
    )
    images = label.add_argument_group("images")
    add_flags(images, LabelerConfig, "orientation", "min_side", "max_pixels", "decoder")
    work = label.add_argument_group("work")
    add_flags(
        work, LabelerConfig, "workers", "ray_address", "device", "gpus_per_worker", "threads", "batch_size",
        "shard_size", "max_attempts",
    )  # fmt: skip


if __name__ == "__main__":
    # A signal between the return of main and here must not print a stack trace.
    status = main()
    sys.stdout.flush()
    os._exit(status) if status == STOPPED else sys.exit(status)
