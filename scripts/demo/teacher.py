"""The teacher of the demo: a small timm ResNet of stride 8, trained on the scenes' image labels in about a minute.

    python -m scripts.demo.teacher SCENES OUT.safetensors --steps 400

Training and labeling resize a scene to a square of `LABEL_SIDE` pixels; training then crops it.

Legend: N scenes; B batch; S side of a square picture.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from labeler.base.errors import InputError
from scripts.demo.scenes import CLASSES

LABEL_SIDE, TRAIN_SIDE = 80, 64
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALLEST_CROP = 0.5  # of the scene's area; such a crop nearly always holds most of the largest object
BATCH, RATE, DECAY, SMOOTHING = 64, 8e-3, 0.05, 0.1
RECIPE = 2  # increase with any change that affects the weights: stored teachers of another number are trained again


@dataclass(frozen=True)
class TeacherReport:
    """The file of weights and the result of the training; `seconds` and `images_per_s` are for training only."""

    checkpoint: str
    test_accuracy: float
    seconds: float
    images_per_s: float


def scene_teacher() -> nn.Module:
    """Returns the untrained network; with average pooling and a linear head, its output is the mean of its map."""
    model = ResNet(
        BasicBlock,
        layers=(1, 1, 0, 0),
        channels=(24, 48, 48, 48),
        stem_type="deep",
        stem_width=12,
        output_stride=8,
        zero_init_last=False,  # a full residual branch from the start: worth some fifty steps here
        num_classes=len(CLASSES),
    )
    return described(model, LABEL_SIDE)


def described(model: ResNet, side: int) -> ResNet:
    """Returns the model with the attributes that the labeler needs of a teacher: input size, mean and std."""
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (3, side, side),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": model.num_classes,
    }
    return model


def train_teacher(scenes: Path, out: Path, steps: int, progress: bool, seed: int = 0) -> TeacherReport:
    """Trains on `scenes`/train, tests on `scenes`/test, and writes the weights to the .safetensors file `out`.

    The file also has the settings and the result. If it exists with the same settings, nothing is trained. The same
    seed gives the same weights on the same machine with the same number of threads.
    """
    scenes, out = Path(scenes), Path(out)
    if steps < 2 or out.suffix != ".safetensors":
        got = f"{steps} steps, file {out.name}"
        raise InputError("the teacher cannot be trained", got=got, expected="2 steps or more, a .safetensors file")
    settings = {"recipe": RECIPE, "scenes": _complete_set(scenes), "steps": steps, "seed": seed}
    if (report := stored_report(out, settings)) is not None:
        return report
    train = load_split(scenes / "train", "loading scenes", progress)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = scene_teacher().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    fit_teacher(model, *train, steps, torch.Generator().manual_seed(seed), progress)
    seconds = time.perf_counter() - started
    accuracy = top1(model, *load_split(scenes / "test", "testing", progress))
    report = TeacherReport(str(out), accuracy, seconds, steps * BATCH / seconds)
    store_teacher(model, out, settings, report)
    return report


def load_split(
    folder: Path,
    title: str = "",
    progress: bool = False,
    side: int = LABEL_SIDE,
    classes: Sequence[str] = CLASSES,
) -> tuple[Tensor, Tensor]:
    """Loads all images of a split at the teacher's input size: pixels uint8 [N, 3, S, S] and labels int64 [N]."""
    files = sorted(folder.glob("*/*.jpg"))
    pixels = np.empty((len(files), 3, side, side), np.uint8)
    for i, file in enumerate(tqdm(files, title, disable=not progress, unit="img")):
        with Image.open(file) as image:
            pixels[i] = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.tensor([classes.index(file.parent.name) for file in files])


def random_crops(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Takes random resized crops and flips half of them: uint8 [B, 3, S, S] to float [B, 3, side, side] in 0..255."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    area, ratio = draw(SMALLEST_CROP, 1), (4 / 3) ** draw(-1, 1)
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = draw(-1, 1).sign()
    # In coordinates where the picture spans -1..1, a box of share `height` has its centre within 1 - height of 0.
    down, across = draw(-1, 1) * (1 - height), draw(-1, 1) * (1 - width)
    zero = torch.zeros_like(area)
    box = torch.stack([mirror * width, zero, across, zero, height, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(box, [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(pixels.float(), grid, align_corners=False, padding_mode="border")


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def fit_teacher(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    steps: int,
    generator: torch.Generator,
    progress: bool,
    side: int = TRAIN_SIDE,
    bfloat16: bool = False,
) -> None:
    """Trains `model` on random crops of `side` pixels; `bfloat16`: compute precision of its forward pass."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    bar = tqdm(range(steps), "teacher", disable=not progress, unit="step")
    for _ in bar:
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        crops = _normalised(random_crops(pixels[rows], side, generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(crops), labels[rows], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@torch.inference_mode()
def top1(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Returns the top-1 accuracy of the model."""
    guesses = torch.cat([model(_normalised(part)).argmax(1) for part in pixels.split(100)])
    return (guesses == labels).double().mean().item()


def _complete_set(scenes: Path) -> dict:
    try:
        recorded = json.loads((scenes / "scenes.json").read_text())
    except (OSError, ValueError):
        recorded = {}
    if not recorded.get("complete"):
        raise InputError(
            f"{scenes} does not contain a complete set of scenes", remedy=f"Run python -m scripts.demo.scenes {scenes}."
        )
    return recorded


def stored_report(out: Path, settings: dict) -> TeacherReport | None:
    """Returns the report in `out`, if that file is a teacher with these settings."""
    try:
        with safe_open(out, "pt") as file:
            kept = file.metadata() or {}
        if json.loads(kept["settings"]) == settings:
            return TeacherReport(**{**json.loads(kept["report"]), "checkpoint": str(out)})
    except Exception:  # a missing, foreign or damaged file: train
        return None
    return None


def store_teacher(model: nn.Module, out: Path, settings: dict, report: TeacherReport) -> None:
    """Writes weights, settings and report to the .safetensors file `out`, completely or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary, {"settings": json.dumps(settings), "report": json.dumps(asdict(report))})
    os.replace(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo.teacher", description="Train the demo's teacher.")
    parser.add_argument("scenes", type=Path, help="folder written by scripts.demo.scenes")
    parser.add_argument("out", type=Path, help=".safetensors file to write")
    parser.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    options = parser.parse_args()
    try:
        report = train_teacher(options.scenes, options.out, options.steps, True, options.seed)
    except InputError as error:
        parser.exit(error.exit_status, f"{error}\n")
    print(
        f"{report.test_accuracy:.1%} of the test scenes right after {report.seconds:.0f} s of training "
        f"({report.images_per_s:.0f} images/s): {report.checkpoint}"
    )


if __name__ == "__main__":
    main()
