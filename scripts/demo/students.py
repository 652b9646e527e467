"""The demo's comparison: the same network on the same scenes, taught in three ways.

    python -m scripts.demo.students demo --seeds 0 1 2        (after `make demo`, which runs seed 0)

All arms have the same network, images, crops, steps and seed; only the targets differ. The middle arm is the control:
it has a loss on every token, like token labels, but no map. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ARMS = {
    "image label only": "data.token_labels=false loss.dense_weight=0",
    "image label on every token": "data.token_labels=false",
    "token labels": "",
}


@dataclass(frozen=True)
class Student:
    """One arm's run: its folder, top-1 on the test scenes after the last step, and speed in images per second."""

    arm: str
    folder: Path
    accuracy: float
    images_per_s: float


def train_students(demo: Path, seed: int = 0, steps: int = 400) -> list[Student]:
    """Trains every arm with `python -m train fit demo`, as a user would."""
    return [train_student(demo, arm, seed, steps) for arm in ARMS]


def train_student(demo: Path, arm: str, seed: int, steps: int) -> Student:
    folder = demo / "students" / f"{arm.replace(' ', '-')}-seed{seed}"
    data = {"images": demo / "scenes" / "train", "store": demo / "labels", "validation": demo / "scenes" / "test"}
    where = " ".join(f"data.{name}={shlex.quote(str(path))}" for name, path in data.items())
    how = f"{where} run.out={shlex.quote(str(folder))} run.seed={seed} schedule.steps={steps} {ARMS[arm]}"
    summary = json.loads(command("train", f"fit demo {how.strip()} --resume auto --json"))
    speeds = [json.loads(line)["images_per_s"] for line in (folder / "speed.jsonl").read_text().splitlines()]
    return Student(arm, folder, summary["top1"], statistics.median(speeds))


def command(package: str, arguments: str) -> str:
    """Runs a package's command as a user would. Returns its standard output; exits the demo if it fails."""
    print(f"$ python -m {package} {arguments}", flush=True)
    done = subprocess.run([sys.executable, "-m", package, *shlex.split(arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the demo stopped: `{package} {arguments.split()[0]}` failed with status {done.returncode}")
    return done.stdout


def table(students: Sequence[Sequence[Student]]) -> str:
    """Returns a line for each arm, with mean and standard deviation over seeds; `students`: a list of arms per seed."""
    lines = []
    for same in zip(*students, strict=True):
        values = [student.accuracy for student in same]
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        each = f"  ({', '.join(f'{value:.1%}' for value in values)})" if len(values) > 1 else ""
        lines.append(f"{same[0].arm:28} {statistics.mean(values):.1%}{spread}{each}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder that `make demo` wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds, one run per arm each")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run (%(default)s)")
    options = parser.parse_args()
    print(table([train_students(options.demo, seed, options.steps) for seed in options.seeds]))


if __name__ == "__main__":
    main()
