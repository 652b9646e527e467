"""Labeling speed against the bare teacher: the share of the machine that decoding, coding and committing leave it.

    python -m scripts.benchmark_labeler IMAGES [--copies 4] [--repeats 3] [--device cpu] [--json]

IMAGES is a folder of photographs, of which `--copies` copies are labeled by ResNet-18 at 224 with random weights. The
rival is that network's plain forward pass, `model(x)`, on resident tensors with all cores, in channels-last layout (the
faster one here), in batches of the same size. Both alternate; labeling is timed from the first worker's readiness on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from labeler import LabelerConfig, TeacherConfig, label_images

BATCH, SIDE = 32, 224
TEACHER = TeacherConfig("resnet18", random_weights=True)


def bare_forward(device: str, seconds: float) -> float:
    """Images per second of the network alone."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = timm.create_model("resnet18").eval().to(device, memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    with torch.inference_mode(), mixed:
        for _ in range(2):
            model(images)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            model(images)
            if device == "cuda":
                torch.cuda.synchronize()
            done += BATCH
        return done / (time.perf_counter() - started)


def labeling(images: Path, workers: int, device: str) -> float:
    """Images per second of a whole labeling run into a new store."""
    with tempfile.TemporaryDirectory() as folder:
        size = {"batch_size": BATCH, "shard_size": BATCH}
        config = LabelerConfig(TEACHER, workers=workers, device=device, progress=False, **size)
        return label_images(images, Path(folder) / "labels", config).images_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = {"in this process": 0, f"{os.cpu_count()} Ray workers": os.cpu_count() or 1}
    rates: dict[str, list[float]] = {"bare forward": [], **{name: [] for name in ways}}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(options.copies):
            shutil.copytree(options.images, Path(folder) / str(copy))
        for _ in range(options.repeats):
            for name, workers in ways.items():
                before = bare_forward(options.device, 8)
                rate = labeling(Path(folder), workers, options.device)
                after = bare_forward(options.device, 8)
                rates["bare forward"] += [before, after]
                rates[name].append(rate)
                ratios[name].append(rate / ((before + after) / 2))
    result = {
        "images_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {name: [min(v), statistics.median(v), max(v)] for name, v in ratios.items()},
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{'':24}{'images/s':>10}   labeling / bare forward: median (lowest to highest)")
    for name, value in result["images_per_s"].items():
        low, middle, high = result["ratio"].get(name, (1, 1, 1))
        print(f"{name:24}{value:10.1f}   " + (f"{middle:.2f} ({low:.2f} to {high:.2f})" if name in ratios else ""))


if __name__ == "__main__":
    main()
