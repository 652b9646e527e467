"""The options of every command of `python -m labeler`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeler.base.command_line import Run, add_command, at_least
from labeler.base.settings import add_flags
from labeler.config import LabelerConfig
from labeler.remote.urls import local_path, path_or_url
from labeler.teacher.teacher_config import TeacherConfig

PLACES = "hf://datasets/USER/NAME, s3://BUCKET/PATH, any URL that fsspec knows, or a folder"


def _add_label(commands: Any, run: Run) -> None:
    label = add_command(commands, "label", run, "label images; run the same command again to resume")
    label.add_argument(
        "images",
        type=path_or_url,
        help="folder of images, whose sub-folders may name the classes; a list (.txt, .csv, .tsv); .tar or .parquet "
        "files, such as 'name-{000..146}.tar'; or a URL of any of them",
    )
    label.add_argument("--store", type=local_path, required=True, help="folder of the label store")
    add_flags(label, LabelerConfig, "extend", "image_list", "class_names")
    teacher = label.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher",
        required=True,
        metavar="NAME",
        help="timm model, a run's folder, local-dir:DIR, hf-hub:NAME, torchvision:NAME or package.module:function",
    )
    add_flags(
        teacher, TeacherConfig, "checkpoint", "ema", "random_weights", "num_classes", "input_size", "mean", "std",
        "view", "autocast", "compile",
    )  # fmt: skip
    add_flags(teacher, LabelerConfig, "fit_head", "head_images", "head_accuracy")
    teacher.add_argument(
        "--tta",
        choices=("none", "flip"),
        default="flip",
        help="test-time augmentation; flip: average with the mirrored image, at twice the cost (%(default)s)",
    )
    labels = label.add_argument_group("labels")
    add_flags(
        labels, LabelerConfig, "quality", "bytes_per_image", "palette", "tail", "levels", "threshold", "precision"
    )
    labels.add_argument(
        "--audit",
        type=at_least(0),
        default=0,
        metavar="N",
        help="afterwards measure the accuracy of the labels on N images",
    )
    images = label.add_argument_group("images")
    add_flags(images, LabelerConfig, "orientation", "min_side", "max_pixels", "decoder")
    work = label.add_argument_group("work")
    add_flags(
        work, LabelerConfig, "workers", "ray_address", "device", "gpus_per_worker", "threads", "batch_size",
        "shard_size", "max_attempts",
    )  # fmt: skip


def _add_verify(commands: Any, run: Run) -> None:
    verify = add_command(commands, "verify", run, "check a store for any damage, and that it belongs to its images")
    verify.add_argument("store", type=path_or_url, help="folder or URL of the label store")
    verify.add_argument(
        "--images",
        type=path_or_url,
        help="the images that were labeled: also compare every image file with the one that was labeled",
    )
    verify.add_argument(
        "--relabel", type=at_least(0), default=0, metavar="N", help="also label N random rows again with the teacher"
    )
    verify.add_argument("--device", default="auto", help="device of --relabel: cpu, cuda or auto (%(default)s)")
    verify.add_argument(
        "--trusted", action="store_true", help="trust this store: --relabel may run the teacher that it names"
    )


def _add_report(commands: Any, run: Run) -> None:
    report = add_command(commands, "report", run, "write a self-contained HTML page about a store")
    report.add_argument("store", type=path_or_url, help="folder or URL of the label store")
    report.add_argument("--images", type=path_or_url, required=True, help="the images that were labeled")
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page to write")
    report.add_argument(
        "--truth", type=Path, help="folder of PNGs of class ids, named by key, to measure the accuracy of the maps"
    )
    report.add_argument(
        "--sample",
        type=at_least(1),
        default=500,
        metavar="N",
        help="number of rows that the charts are drawn from (%(default)s)",
    )
    report.add_argument("--title", help="heading of the page")
    report.add_argument(
        "--audit",
        type=at_least(0),
        default=0,
        metavar="N",
        help="measure the accuracy of the labels: run the teacher again on N images",
    )
    report.add_argument("--device", default="auto", help="device of --audit: cpu, cuda or auto (%(default)s)")
    report.add_argument(
        "--trusted", action="store_true", help="trust this store: --audit may run the teacher that it names"
    )


def _add_push(commands: Any, run: Run) -> None:
    push = add_command(commands, "push", run, "send a store to a URL; run the same command again to go on")
    push.add_argument("store", type=local_path, help="folder of the label store")
    push.add_argument("url", type=path_or_url, help=f"where to: {PLACES}")


def _add_pull(commands: Any, run: Run) -> None:
    pull = add_command(commands, "pull", run, "fetch a store from a URL, with every digest checked; again: go on")
    pull.add_argument("url", type=path_or_url, help=f"where from: {PLACES}")
    pull.add_argument("store", type=local_path, help="folder of the label store to write")
    pull.add_argument("--trusted", action="store_true", help="trust this store: skip the check in a child process")


def _add_merge(commands: Any, run: Run) -> None:
    merge = add_command(commands, "merge", run, "make one store of several, with the same settings and no image twice")
    merge.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="folders of two or more label stores")
    merge.add_argument("--store", type=Path, required=True, help="folder of the new label store")
    merge.add_argument(
        "--copy", action="store_true", help="copy the files; without it they are hard links where that is possible"
    )


def _add_import(commands: Any, run: Run) -> None:
    maps = add_command(commands, "import-token-labels", run, "convert TokenLabeling or ReLabel .pt files to a store")
    maps.add_argument("files", type=Path, help="folder of .pt maps, named and laid out like the images")
    maps.add_argument("--images", type=path_or_url, required=True, help="the images that the maps belong to")
    maps.add_argument("--store", type=local_path, required=True, help="folder of the label store")
    maps.add_argument("--num-classes", type=int, default=1000, help="number of classes of the maps (%(default)s)")
    maps.add_argument("--class-names", help="file of class names, one per line")


ADDED: dict[str, Callable[[Any, Run], None]] = {
    "label": _add_label,
    "verify": _add_verify,
    "report": _add_report,
    "push": _add_push,
    "pull": _add_pull,
    "merge": _add_merge,
    "import-token-labels": _add_import,
}
