"""The loader's speed against a torch `DataLoader` with one label file per image, and the cost of building targets.

    python -m scripts.benchmark_loader IMAGES [--store DIR] [--repeats 3] [--json]
    python -m scripts.benchmark_loader IMAGES --device cuda --threads 8 --hw-decoder-load 0.5

IMAGES is a folder of photographs; without `--store`, `--copies` copies of it are labeled by a synthetic teacher: 1,000
classes on an 18×18 grid. Everything runs on the CPU, both sides on the same cores.

Throughput: images per second of whole epochs in batches of 64: random-resized-crop to 224, flip, normalisation, token
labels on a 14×14 grid. The rival decodes with PIL and loads one top-5 `.pt` file per image in as many worker processes
as cores, which live on between epochs; its main process scatters the labels to all classes, crops them with ROI-align
and takes the softmax. "No label crop" leaves that out: what the rival could reach where a GPU crops its labels. Each
run is a process of its own and warms up for one epoch, so that files come from the page cache. The cores must be idle:
torch's threads wait for each other, so one more busy process makes small operations many times slower.

Targets: a batch of 128, from `ScoreMaps` and from top-5 labels that say the same, already mirrored where the image is.
Ours is complete without a softmax, which belongs to its loss; the rival's is dense. Peak memory is the growth of the
process's resident set (`ru_maxrss`) in one call, each side in a process of its own, after a call on two images has
loaded all code: inputs and libraries do not count, results and everything in between do.

Legend: B images; C classes; P palette size; K = 5 classes per cell; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from labeler import LabelerConfig, LabelStore, TeacherConfig, label_images
from labeler.score_maps import ScoreMaps
from pipeline import LoaderConfig, TokenTargets, create_loader, crop_score_maps
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.crops import random_resized_crops

CLASSES, MAP, GRID, TOP = 1000, 18, (14, 14), 5
SIDE, BATCH, TARGET_BATCH = 224, 64, 128
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class SyntheticTeacher(nn.Module):
    """Class scores of each 8×8 cell are a fixed linear function of its colour: a full-sized map for almost no time."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        weight = 3 * torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(weight, requires_grad=False)
        look = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 0.875}
        self.default_cfg = {"input_size": (3, 8 * MAP, 8 * MAP), **look}

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,bchw->bkhw", self.weight, nn.functional.avg_pool2d(images, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.score_maps(images).mean((2, 3))


def synthetic_teacher() -> nn.Module:
    return SyntheticTeacher()


def write_top5_files(store: LabelStore, folder: Path) -> None:
    """One [2, K, H, W] float16 file per row, logits and class ids as the reference writes them; other classes are 0."""
    for rows in np.array_split(np.arange(len(store)), -(-len(store) // 32)):
        log_p = torch.from_numpy(store.read(rows).dense()).log()
        values, ids = (log_p - log_p.amin(1, keepdim=True)).topk(TOP, dim=1)
        for row, label in zip(rows.tolist(), torch.stack([values.half(), ids.half()], 1), strict=True):
            torch.save(label.clone(), folder / f"{row}.pt")


def mirrored(top5: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [..., H, W] and boxes [..., 4] of the mirrored image."""
    y0, x0, y1, x1 = boxes.unbind(-1)
    return top5.flip(-1), torch.stack([y0, 1 - x1, y1, 1 - x0], -1)


def rival_targets(top5: torch.Tensor, boxes: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, 2, K, H, W] and boxes [B, 4] to distributions of tokens [B, C, T] and of whole crops [B, C]."""
    values, ids = top5[:, 0].float(), top5[:, 1].long()
    n, _, height, width = values.shape
    dense = torch.zeros(n, classes, height, width).scatter_(1, ids, values)
    places = boxes.float()[:, [1, 0, 3, 2]] * torch.tensor([width, height, width, height])
    rois = torch.cat([torch.arange(n)[:, None].float(), places], 1)
    tokens = roi_align(dense, rois, GRID, aligned=True).flatten(2).softmax(1)
    return tokens, roi_align(dense, rois, (1, 1), aligned=True).flatten(1).softmax(1)


class RivalImages(Dataset):
    """Photographs with their label files: (image [3, S, S], label [2, K, H, W], box [4])."""

    def __init__(self, images: Path, keys: list[str], labels: Path) -> None:
        self.images, self.keys, self.labels = images, keys, labels

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with Image.open(self.images / self.keys[i]) as file:
            image = file.convert("RGB")
        label = torch.load(self.labels / f"{i}.pt", weights_only=True)
        y, x, h, w = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        box = torch.tensor([y / image.height, x / image.width, (y + h) / image.height, (x + w) / image.width])
        method = random.choice([InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
        image = tv.resized_crop(image, y, x, h, w, [SIDE, SIDE], method)
        if random.random() < 0.5:
            image, (label, box) = tv.hflip(image), mirrored(label, box)
        return tv.normalize(tv.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), label, box


def throughput(options: argparse.Namespace, cores: int) -> float:
    """Images per second of whole epochs, their beginnings included, after one that is not timed."""
    store = LabelStore(options.store)
    batches: Iterable[Any]
    if options.side == "ours":
        batches = create_loader(
            LoaderConfig(
                str(options.images), str(options.store), batch_size=BATCH, image_size=SIDE, grid=GRID, scale=SCALE,
                ratio=RATIO, auto_augment="none", mix="none", backend="dali", device=options.device,
                threads=options.threads or cores, hw_decoder_load=options.hw_decoder_load,
            )
        )  # fmt: skip
    else:
        images = RivalImages(options.images, store.keys, options.labels)
        how = {"num_workers": cores, "persistent_workers": True}
        batches = DataLoader(images, BATCH, shuffle=True, drop_last=True, **how)
    done, started = 0, 0.0
    for epoch in range(1 + options.epochs):
        if epoch == 1:  # the one before warmed up
            done, started = 0, time.perf_counter()
        for batch in batches:
            if options.side == "rival":
                rival_targets(batch[1], batch[2], store.meta.num_classes)
            done += BATCH
    if options.device != "cpu":
        torch.cuda.synchronize()
    return done / (time.perf_counter() - started)


class TargetInputs:
    """The same scores twice: as a palette of P planes and as the K largest of each cell; random crops and flips.

    An image has P classes in all, so its palette holds every class that its top-5 labels name, and 0 elsewhere.
    """

    def __init__(self, batch: int, palette: int) -> None:
        generator = torch.Generator().manual_seed(0)
        classes = torch.stack([torch.randperm(CLASSES, generator=generator)[:palette] for _ in range(batch)])
        values, places = (4 + 2 * torch.randn(batch, palette, MAP, MAP, generator=generator)).topk(TOP, dim=1)
        values = values.half()
        scores = torch.zeros(batch, palette, MAP, MAP).scatter_(1, places, values.float())
        region = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(batch, 1)
        self.maps = ScoreMaps(classes, scores, torch.zeros(batch, MAP, MAP), region, CLASSES)
        # Sides without a common factor with 18: a bin of whole cells would leave the sample count to float rounding.
        sizes = np.tile([3749, 4999], (batch, 1))
        windows = random_resized_crops(sizes, SCALE, RATIO, np.random.default_rng(0))
        self.boxes = torch.from_numpy(windows / np.tile(sizes, (1, 2)))
        self.hflip = torch.rand(batch, generator=generator) < 0.5
        ids = classes.gather(1, places.flatten(1)).view_as(places)
        self.top5 = torch.stack([values, ids.half()], 1)
        self.rival_boxes = self.boxes.clone()
        self.top5[self.hflip], self.rival_boxes[self.hflip] = mirrored(self.top5[self.hflip], self.boxes[self.hflip])

    def ours(self) -> TokenTargets:
        return crop_score_maps(self.maps, self.boxes, GRID, self.hflip)

    def rival(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rival_targets(self.top5, self.rival_boxes, CLASSES)


def compare_targets(batch: int, palette: int, calls: int) -> dict[str, Any]:
    """Milliseconds per call, alternating, and the largest difference of any probability."""
    inputs = TargetInputs(batch, palette)
    ours, (tokens, whole) = inputs.ours(), inputs.rival()
    pairs = ((ours.dense_tokens(CLASSES).mT, tokens), (ours.dense_cls(CLASSES), whole))
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    for _ in range(calls):
        for side, values in times.items():
            started = time.perf_counter()
            getattr(inputs, side)()
            values.append((time.perf_counter() - started) * 1e3)
    return {"ms": times, "difference": difference}


def peak_memory(options: argparse.Namespace) -> float:
    """MB by which one call raises the largest resident set that this process has had."""
    getattr(TargetInputs(2, options.palette), options.side)()
    inputs = TargetInputs(TARGET_BATCH, options.palette)
    # What was freed since the largest resident set so far would hide as much of the call's growth: fill it.
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    filler = torch.ones(max(0, _max_rss() - now) + (1 << 20), dtype=torch.uint8)
    before = _max_rss()
    kept = getattr(inputs, options.side)()
    grown = _max_rss() - before
    del kept, filler
    return grown / 1e6


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(images: Path, **options: object) -> float:
    """The figure that this script prints when it is called with hidden options."""
    # With a fixed threshold freed tensors leave the process at once; by default malloc keeps some megabytes.
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if "palette" in options else {})
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "scripts.benchmark_loader", str(images), *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.split()[-1])


def measure_throughput(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    images, store, labels = options.images, options.store, folder / "top5"
    if store is None:
        images, store = folder / "images", folder / "store"
        for copy in range(options.copies):
            shutil.copytree(options.images, images / str(copy))
        teacher = TeacherConfig("scripts.benchmark_loader:synthetic_teacher")
        label_images(images, store, LabelerConfig(teacher, device="cpu", progress=False))
    labels.mkdir()
    write_top5_files(LabelStore(store), labels)
    rates: dict[str, list[float]] = {side: [] for side in ("ours", "rival", "rival, no label crop")}
    for _ in range(options.repeats):
        for side, values in rates.items():
            own = {"device": options.device, "hw-decoder-load": options.hw_decoder_load}
            own |= {"threads": options.threads} if options.threads else {}
            values.append(in_own_process(images, store=store, labels=labels, epochs=options.epochs, side=side, **own))
    return rates


def measure_targets(options: argparse.Namespace, palette: int) -> dict[str, Any]:
    found = compare_targets(TARGET_BATCH, palette, 3 * options.repeats)
    if found["difference"] > 1e-4:
        raise SystemExit(f"the two sides' targets differ by {found['difference']:.1e}")
    memory: dict[str, list[float]] = {"ours": [], "rival": []}
    for _ in range(options.repeats):
        for side, values in memory.items():
            values.append(in_own_process(options.images, side=side, palette=palette))
    return {
        "difference": found["difference"],
        "ms": {side: spread(values) for side, values in found["ms"].items()},
        "peak_mb": {side: spread(values) for side, values in memory.items()},
        "times_faster": spread(found["ms"]["rival"], found["ms"]["ours"]),
        "times_less_memory": spread(memory["rival"], memory["ours"]),
    }


def spread(values: list[float], ratio_to: list[float] | None = None) -> list[float]:
    """Lowest, median and highest; with `ratio_to`, of the ratios to the run beside it."""
    if ratio_to is not None:
        values = [value / other for value, other in zip(values, ratio_to, strict=True)]
    return [min(values), statistics.median(values), max(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--store", type=Path, help="labels of these images (default: synthetic ones)")
    parser.add_argument("--copies", type=int, default=8, help="of IMAGES, for longer epochs; not with --store")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of our side's decoding and batches: cpu or cuda")
    parser.add_argument("--threads", type=int, help="of our side's decoding (default: all cores)")
    parser.add_argument("--hw-decoder-load", type=float, default=0.65, help="share of a GPU's hardware JPEG decoder")
    parser.add_argument("--json", action="store_true")
    for option, kind in (("--side", str), ("--labels", Path), ("--palette", int)):  # one side's own process
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    if options.side:
        print(peak_memory(options) if options.palette else throughput(options, cores))
        return
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_throughput(options, Path(folder))
    result = {
        "cores": cores,
        "images_per_s": {side: spread(values) for side, values in rates.items()},
        "ours_to": {side: spread(rates["ours"], values) for side, values in rates.items()},
        "targets": {palette: measure_targets(options, palette) for palette in (8, 32)},
    }
    print(json.dumps(result, indent=1) if options.json else report(result))


def report(result: dict[str, Any]) -> str:
    def cell(values: list[float], digits: int = 1) -> str:
        low, middle, high = (f"{value:.{digits}f}" for value in values)
        return f"{f'{middle} ({low} to {high})':26}"

    lines = [f"{result['cores']} cores; median (lowest to highest)", f"\n{'':24}{'images/s':26}ours / this"]
    for side, rate in result["images_per_s"].items():
        lines.append(f"{side:24}{cell(rate)}{cell(result['ours_to'][side], 2)}")
    for palette, found in result["targets"].items():
        lines.append(f"\n{f'targets, palette {palette}':24}{'ms':26}peak MB")
        lines += [f"{side:24}{cell(found['ms'][side])}{cell(found['peak_mb'][side])}" for side in found["ms"]]
        lines.append(f"{'rival / ours':24}{cell(found['times_faster'])}{cell(found['times_less_memory'])}")
        lines.append(f"largest difference between the sides' probabilities: {found['difference']:.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
