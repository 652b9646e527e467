"""The demo's teacher: a small timm ResNet of stride 8, trained on the scenes' image labels for about a minute.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample
from tqdm import tqdm

LABEL_SIDE, TRAIN_SIDE = 80, 64
CLASSES = 10
MEAN = STD = (0.5, 0.5, 0.5)
CANVAS = 112  # scenes are kept in one tensor of this side, in its upper left corner
BATCH, RATE, DECAY, SMALLEST_CROP = 64, 8e-3, 0.05, 0.5


@dataclass(frozen=True)
class TeacherReport:
    """Where the weights are, and what the training reached; `seconds` and `images_per_s` are of the training alone."""

    checkpoint: str
    test_accuracy: float
    seconds: float
    images_per_s: float


@dataclass(frozen=True)
class Scenes:
    """One split in memory: pixels uint8 [B, 3, CANVAS, CANVAS], size float [B, 2] (height, width), label int64 [B]."""

    pixels: Tensor
    size: Tensor
    label: Tensor


def scene_teacher() -> nn.Module:
    """The untrained network: average pooling and a linear head, so the mean of its map is its output."""
    model = ResNet(
        BasicBlock,
        layers=(1, 1, 0, 0),
        num_classes=CLASSES,
        channels=(32, 64, 64, 64),
        stem_width=16,
        stem_type="deep",
        output_stride=8,
        zero_init_last=False,
    )
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (3, LABEL_SIDE, LABEL_SIDE),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": CLASSES,
    }
    return model


def train_teacher(scenes: Path, out: Path, steps: int, progress: bool, seed: int = 0) -> TeacherReport:
    """Train on `scenes`/train, test on `scenes`/test, save weights to `out`; nothing is done where that was done before."""
    settings = {"scenes": json.loads((scenes / "scenes.json").read_text()), "steps": steps, "seed": seed}
    record = out.with_suffix(".json")
    if out.exists() and record.exists():
        found = json.loads(record.read_text())
        if found["settings"] == settings:
            return TeacherReport(**found["report"])
    train, test = load_split(scenes / "train"), load_split(scenes / "test")
    torch.manual_seed(seed)
    model = scene_teacher().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    fit(model, train, steps, torch.Generator().manual_seed(seed), progress)
    seconds = time.perf_counter() - started
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out)
    report = TeacherReport(str(out), accuracy(model, test), seconds, steps * BATCH / seconds)
    record.write_text(json.dumps({"settings": settings, "report": asdict(report)}, indent=1) + "\n")
    return report


def fit(model: nn.Module, data: Scenes, steps: int, generator: torch.Generator, progress: bool) -> None:
    """AdamW and one cycle over random resized crops and flips."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    bar = tqdm(range(steps), desc="teacher", disable=not progress, mininterval=2)
    for _ in bar:
        if len(order) < BATCH:
            order = torch.randperm(len(data.label), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        boxes, flip = random_boxes(len(rows), generator), torch.rand(len(rows), generator=generator) < 0.5
        logits = model(crop(data, rows, boxes, flip, TRAIN_SIDE))
        loss = cross_entropy(logits, data.label[rows], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def accuracy(model: nn.Module, data: Scenes) -> float:
    whole, right = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 0
    with torch.inference_mode():
        for rows in torch.arange(len(data.label)).split(100):
            pixels = crop(data, rows, whole.expand(len(rows), 4), torch.zeros(len(rows), dtype=torch.bool), LABEL_SIDE)
            right += int((model(pixels).argmax(1) == data.label[rows]).sum())
    return right / len(data.label)


def load_split(folder: Path) -> Scenes:
    """All images below `folder`/<class>; classes are numbered in sorted order."""
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.glob("*/*.jpg"))
    pixels = np.zeros((len(files), 3, CANVAS, CANVAS), np.uint8)
    sizes = np.zeros((len(files), 2), np.float32)
    for i, file in enumerate(files):
        image = np.asarray(Image.open(file)).transpose(2, 0, 1)
        height, width = sizes[i] = image.shape[1:]
        # The edge is repeated, so that sampling near it never meets black.
        pixels[i] = np.pad(image, ((0, 0), (0, CANVAS - int(height)), (0, CANVAS - int(width))), mode="edge")
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    return Scenes(torch.from_numpy(pixels), torch.from_numpy(sizes), labels)


def crop(data: Scenes, rows: Tensor, boxes: Tensor, flip: Tensor, side: int) -> Tensor:
    """Normalised [B, 3, S, S]; boxes [B, 4] are y0, x0, y1, x1 as fractions of each scene, flip bool [B]."""
    height, width = data.size[rows].unbind(1)
    place = (torch.arange(side) + 0.5) / side
    across = torch.where(flip[:, None], 1 - place, place)
    y = (boxes[:, 0:1] + place * (boxes[:, 2:3] - boxes[:, 0:1])) * height[:, None]
    x = (boxes[:, 1:2] + across * (boxes[:, 3:4] - boxes[:, 1:2])) * width[:, None]
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1) / CANVAS * 2 - 1
    pixels = data.pixels[rows].float() / 255
    sampled = grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    return ((sampled - MEAN[0]) / STD[0]).contiguous(memory_format=torch.channels_last)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """[B, 4]: boxes of a random area and shape at a random place."""
    area = SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(count, generator=generator)
    shape = (4 / 3) ** (2 * torch.rand(count, generator=generator) - 1)
    height, width = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    top = torch.rand(count, generator=generator) * (1 - height)
    left = torch.rand(count, generator=generator) * (1 - width)
    return torch.stack([top, left, top + height, left + width], 1)


def load_teacher(checkpoint: Path) -> nn.Module:
    """The trained network."""
    model = scene_teacher()
    model.load_state_dict(load_file(checkpoint))
    return model.eval()
