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

from labeler.base.command_line import OneLineParser, add_command, at_least, run_command
from labeler.config import AUTOCASTS, DECODERS, ORIENTATIONS, PRECISIONS, VIEWS, LabelerConfig, TeacherConfig
from labeler.store.score_code import QUALITIES, Encoding

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
    teacher = TeacherConfig(
        name=options.teacher,
        checkpoint=options.checkpoint,
        random_weights=options.random_weights,
        num_classes=options.num_classes,
        input_size=options.input_size,
        mean=tuple(options.mean) if options.mean else None,
        std=tuple(options.std) if options.std else None,
        view=options.view,
        flip=options.tta == "flip",
        autocast=options.autocast,
        compile=options.compile,
    )
    own = {name: getattr(options, name) for name in LabelerConfig.__dataclass_fields__ if hasattr(options, name)}
    return LabelerConfig(**{**own, "teacher": teacher, "progress": not options.quiet})


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m labeler", description="Dense class labels from a teacher, in a checked store."
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
    default = LabelerConfig(TeacherConfig(""))
    label = add_command(commands, "label", _label, "label a folder of images; the same command again resumes")
    label.add_argument("images", type=Path, help="image root; sub-folders may name the classes")
    label.add_argument("--store", type=Path, required=True, help="folder of the label store")
    label.add_argument("--image-list", metavar="FILE", help="label only these keys, one a line")
    label.add_argument("--class-names", metavar="FILE", help="one class a line, in the teacher's order")

    teacher = label.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher", required=True, metavar="NAME", help="timm model, torchvision:NAME or package.module:function"
    )
    teacher.add_argument("--checkpoint", metavar="FILE", help=".safetensors or weights-only .pt")
    teacher.add_argument("--random-weights", action="store_true", help="seeded random weights, to try the machinery")
    teacher.add_argument("--num-classes", type=int)
    teacher.add_argument(
        "--input-size", type=int, metavar="S", help="side of the square input (default: the teacher's own)"
    )
    teacher.add_argument("--mean", type=float, nargs=3)
    teacher.add_argument("--std", type=float, nargs=3)
    teacher.add_argument(
        "--view", choices=VIEWS, default="full", help="the whole picture, or the teacher's centre crop"
    )
    teacher.add_argument(
        "--tta",
        choices=("none", "flip"),
        default="flip",
        help="flip: average with the mirrored image; none halves the cost",
    )
    teacher.add_argument(
        "--autocast", choices=AUTOCASTS, default="auto", help="auto: bf16 on a GPU, fp16 on a V100 or T4, none on a CPU"
    )
    teacher.add_argument("--compile", action="store_true", help="torch.compile the teacher")

    labels = label.add_argument_group("labels")
    base = Encoding()
    labels.add_argument("--quality", choices=tuple(QUALITIES), default=default.quality, help="how true, and how large")
    labels.add_argument(
        "--bytes-per-image", type=int, metavar="N", help="the truest labels of about N bytes, settled on a sample first"
    )
    labels.add_argument(
        "--palette", type=int, metavar="P", help=f"most classes with a plane of scores ({base.palette})"
    )
    labels.add_argument("--tail", type=int, metavar="R", help=f"most classes that share one plane ({base.tail})")
    labels.add_argument("--levels", type=int, help=f"steps of the square root of a probability ({base.levels})")
    labels.add_argument("--threshold", type=float, help=f"nats that a byte must save to be spent ({base.threshold:g})")
    labels.add_argument("--precision", choices=PRECISIONS, default=default.precision)

    labels.add_argument(
        "--audit", type=at_least(0), default=0, metavar="N", help="then say how true labels are, on N images"
    )

    images = label.add_argument_group("images")
    images.add_argument(
        "--orientation", choices=ORIENTATIONS, default=default.orientation, help="turn images as EXIF says, or not"
    )
    images.add_argument(
        "--min-side", type=int, default=default.min_side, help="smaller images are quarantined (%(default)s px)"
    )
    images.add_argument("--max-pixels", type=int, default=default.max_pixels, help="larger ones too (%(default)s)")
    images.add_argument("--decoder", choices=DECODERS, default=default.decoder, help="auto: DALI on a GPU, else PIL")

    work = label.add_argument_group("work")
    work.add_argument("--workers", type=int, default=0, help="0: in this process; else Ray actors, each with a teacher")
    work.add_argument(
        "--ray-address", metavar="ADDR", help='"auto" or host:port of a running cluster (default: a private Ray here)'
    )
    work.add_argument("--device", default="auto", help="cpu, cuda or auto")
    work.add_argument("--gpus-per-worker", type=float, default=1.0, help="may be a fraction")
    work.add_argument("--threads", type=int, help="CPU threads per worker (default: the cores shared out)")
    work.add_argument("--batch-size", type=int, default=default.batch_size)
    work.add_argument(
        "--shard-size", type=int, help="images per shard (default: by the number of images, at most 10,000)"
    )
    work.add_argument("--max-attempts", type=int, default=default.max_attempts, help="tries per shard (%(default)s)")


if __name__ == "__main__":
    # A signal between the return of main and here must not print a stack trace.
    status = main()
    sys.stdout.flush()
    os._exit(status) if status == STOPPED else sys.exit(status)
