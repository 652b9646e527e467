"""The whole project end to end on a laptop: scenes, a teacher, labels, their check, batches, three students, a report.

    python -m scripts.demo --out demo        (this is `make demo`)

Takes about four minutes on two CPU cores; a second run keeps finished parts. All files are written below --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from pipeline import LoaderConfig, create_loader
from scripts.demo.report import add_students
from scripts.demo.scenes import generate_scenes
from scripts.demo.students import Student, command, table, train_students
from scripts.demo.teacher import train_teacher

TEACHER = "scripts.demo.teacher:scene_teacher"
INPUT = "--image-size 64 --patch 8"


def main() -> int:
    """Runs the demo from the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (%(default)s)")
    parser.add_argument("--train", type=int, default=2000, help="number of scenes to label (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="number of scenes to test on (%(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=400, help="training steps of the teacher (%(default)s)")
    parser.add_argument("--student-steps", type=int, default=400, help="training steps per student (%(default)s)")
    parser.add_argument(
        "--tta", choices=("flip", "none"), default="flip", help="test-time augmentation of the teacher (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    options = parser.parse_args()
    started = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    heading(1, "scenes: textured objects of ten classes, and the true class of every pixel for later checks")
    scenes = generate_scenes(out / "scenes", options.train, options.test, options.seed, progress=True)

    heading(2, "teacher: a small timm network, trained on image labels only")
    teacher = train_teacher(scenes.root, out / "teacher.safetensors", options.teacher_steps, progress=True)
    print(f"test accuracy {teacher.test_accuracy:.1%} after {teacher.seconds:.0f} s of training")

    images, store, page = scenes.root / "train", out / "labels", out / "report.html"
    heading(3, "labels: the teacher's map of every image, computed by two Ray workers")
    teacher_options = (
        f"--teacher {TEACHER} --checkpoint {quoted(teacher.checkpoint)} --tta {options.tta} "
        f"--class-names {quoted(scenes.root / 'classes.txt')}"
    )
    summary = json.loads(
        command("labeler", f"label {quoted(images)} --store {quoted(store)} {teacher_options} --workers 2 --json")
    )

    heading(4, "verify: the whole store, all images, and some rows by labeling them again")
    verified = json.loads(
        command("labeler", f"verify {quoted(store)} --images {quoted(images)} --relabel 50 --trusted --json")
    )

    heading(5, "batches: crop images and maps together; draw one batch and time an epoch")
    picture = out / "batch.png"
    command("pipeline", f"view {quoted(images)} --store {quoted(store)} --out {quoted(picture)} {INPUT} --mix image")
    loader_rate = time_epoch(images, store)

    heading(6, "students: the same network, trained in three ways on the same scenes")
    students = train_students(out, options.seed, options.student_steps)

    heading(7, "report")
    truth = scenes.root / "truth" / "train"
    report_options = f"--truth {quoted(truth)} --sample {options.train} --title 'Scenes, labeled' --json"
    report = json.loads(
        command("labeler", f"report {quoted(store)} --images {quoted(images)} --out {quoted(page)} {report_options}")
    )
    add_students(page, students, scenes.root)

    results = {
        "teacher_accuracy": teacher.test_accuracy,
        "images": summary["rows"],
        "images_per_s": summary["images_per_s"],
        "bytes_per_image": summary["bytes_per_image"],
        "kl": summary["kl"],
        "first_kept": summary["first_kept"],
        "problems": len(verified["problems"]),
        "map_accuracy": report["truth"]["right"],
        "loader_images_per_s": loader_rate,
        "student_accuracy": {student.arm: student.accuracy for student in students},
        "student_images_per_s": {student.arm: student.images_per_s for student in students},
        "seconds": time.perf_counter() - started,
    }
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results, students, page, picture)
    return 0


def quoted(path: Path) -> str:
    """Returns the path, quoted for a shell."""
    return shlex.quote(str(path))


def time_epoch(images: Path, store: Path) -> float:
    """Returns the loader's images per second over one epoch of 64-pixel crops with RandAugment and token targets."""
    config = LoaderConfig(
        str(images), str(store), batch_size=32, image_size=64, grid=(8, 8), auto_augment="rand-m9-mstd0.5-inc1",
        mix="token", cache="ram",
    )  # fmt: skip
    started, seen = time.perf_counter(), 0
    for batch in create_loader(config):
        seen += len(batch)
    return seen / (time.perf_counter() - started)


def heading(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


def print_summary(results: dict[str, Any], students: list[Student], page: Path, picture: Path) -> None:
    rate = statistics.mean(student.images_per_s for student in students)
    labeled = f"at {results['images_per_s']:.0f} images/s" if results["images_per_s"] else "in an earlier run"
    print(
        f"\n{results['images']:,} scenes labeled {labeled}, "
        f"{results['bytes_per_image']:,.0f} bytes each, {results['problems']} problems found\n"
        f"teacher: {results['teacher_accuracy']:.1%} of test scenes right\n"
        f"labels:  {results['map_accuracy']:.1%} of object cells have the right class\n"
        f"         (KL from the teacher {results['kl']:.4f} nats, "
        f"first class kept in {results['first_kept']:.1%} of the cells)\n"
        f"batches: {results['loader_images_per_s']:.0f} images/s, augmented, with their token targets\n"
        f"students, {rate:.0f} images/s, right on unseen scenes when taught by\n{indented(table([students]))}\n"
        f"report:  {page}\n"
        f"picture: {picture}\n"
        f"demo took {results['seconds']:.0f} s"
    )


def indented(text: str) -> str:
    return "\n".join(f"         {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
