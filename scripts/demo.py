"""The whole project end to end on a laptop: scenes, a teacher, labels, their check and a report.

    python -m scripts.demo --out demo        (this is `make demo`)

About three minutes on two CPU cores; run again, it keeps what is done. Everything it writes is below --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from scripts.demo_teacher import train_teacher
from scripts.scenes import generate_scenes

TEACHER = "scripts.demo_teacher:scene_teacher"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--train", type=int, default=2000, help="scenes to label")
    parser.add_argument("--test", type=int, default=1000, help="scenes to test the teacher on")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    heading(1, "scenes: textured objects of ten classes, with the class of every pixel kept aside")
    scenes = generate_scenes(out / "scenes", options.train, options.test, options.seed, progress=True)

    heading(2, "teacher: a small timm network, trained on the image labels alone")
    teacher = train_teacher(scenes.root, out / "teacher.safetensors", options.teacher_steps, progress=True)
    print(f"test accuracy {teacher.test_accuracy:.1%} after {teacher.seconds:.0f} s of training")

    images, store, page = scenes.root / "train", out / "labels", out / "report.html"
    heading(3, "labels: the teacher's map of every image, by two Ray workers")
    who = (
        f"--teacher {TEACHER} --checkpoint {teacher.checkpoint} --tta flip --class-names {scenes.root / 'classes.txt'}"
    )
    summary = json.loads(labeler(f"label {images} --store {store} {who} --workers 2 --json"))

    heading(4, "verify: every bit, every image, and some rows labeled again")
    verified = json.loads(labeler(f"verify {store} --images {images} --relabel 50 --json"))

    heading(5, "report")
    truth = scenes.root / "truth" / "train"
    report_options = f"--truth {truth} --sample {options.train} --title 'Scenes, labeled' --json"
    told = json.loads(labeler(f"report {store} --images {images} --out {page} {report_options}"))

    results = {
        "teacher_accuracy": teacher.test_accuracy,
        "images": summary["rows"],
        "images_per_s": summary["images_per_s"],
        "bytes_per_image": summary["bytes_per_image"],
        "kl": summary["kl"],
        "coverage": summary["coverage"],
        "problems": len(verified["problems"]),
        "map_accuracy": told["truth"]["right"],
        "seconds": time.perf_counter() - started,
    }
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results, page)
    return 0


def labeler(arguments: str) -> str:
    """Run one command of the labeler as a user would; its standard output. Ends the demo where it fails."""
    print(f"$ python -m labeler {arguments}", flush=True)
    done = subprocess.run([sys.executable, "-m", "labeler", *shlex.split(arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the demo stopped: `labeler {arguments.split()[0]}` ended with status {done.returncode}")
    return done.stdout


def heading(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def print_summary(results: dict[str, float], page: Path) -> None:
    print(
        f"\n{results['images']:,} scenes labeled at {results['images_per_s']:.0f} images/s, "
        f"{results['bytes_per_image']:,.0f} bytes each, {results['problems']} problems found\n"
        f"teacher: {results['teacher_accuracy']:.1%} of test scenes right\n"
        f"labels:  {results['map_accuracy']:.1%} of object cells name the right class in the right place\n"
        f"         (KL to the teacher {results['kl']:.4f} nats, {results['coverage']:.1%} of its probability kept)\n"
        f"report:  {page}\n"
        f"demo took {results['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
