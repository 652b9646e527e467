"""Labeling speed against the bare teacher and against a loop that a user would write.

The teacher is ResNet-18 at 224 pixels with random weights. The bare teacher is its forward pass on tensors in memory,
with all cores and in channels-last layout (the faster one), without decoding, encoding or writing. On a CPU it runs
twice: malloc keeps freed memory, as in the labeler, or returns it, as in a script without that setting. The plain loop
is what a user would write: it decodes with PIL in `DataLoader` workers, applies the head to each position of the last
feature map, and saves the five largest scores of each position with `torch.save`, one file per image.

All sides run one forward pass per image; by default the labeler adds a second one on the mirrored image. The time to
encode the maps is shown beside that of a forward pass.

Each run is a separate process, so that no threads and workers are left over from the one before. Labeling is timed from
when the first worker is ready, the loop from its first request for a batch.

Legend: B images; C classes; D features; K = 5 classes per cell; H×W map grid, 7×7 here.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from labeler import LabelerConfig, TeacherConfig, label_images
from labeler.base.freed_memory import keep_freed_memory
from labeler.sources.decoding.create_decoder import automatic_decoder
from labeler.sources.folder_source import find_images
from labeler.store.encoder import encode_maps
from labeler.store.score_code import Encoding
from labeler.teacher.create_teacher import create_teacher
from scripts.benchmark.inputs import photographs
from scripts.benchmark.measure import (
    Case,
    Options,
    Result,
    in_own_process,
    milliseconds,
    note_of,
    synchronize,
    take_turns,
)

SIDE, TOP = 224, 5
BATCH, CUDA_BATCH = 32, 256
BATCHES_A_SHARD, SHARDS_EACH = 4, 3  # a worker prefetches within a shard only; every worker gets as many shards
CUDA_WORKERS = 4  # at most, sharing the GPU
NETWORK = "resnet18"
CEILING, LOOP = "bare teacher forward, resident tensors", "DataLoader + torch.save per image"
GIVES_BACK = f"{CEILING}, freed memory given back"
CODING, PASS = "encode_maps, default settings", f"forward pass of {NETWORK}"


def bare_forward(device: str, seconds: float, batch: int, cores: int, keep: bool) -> float:
    """Returns images per second of the network alone; `keep`: malloc keeps freed memory."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(cores)
    model = timm.create_model(NETWORK).eval().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), _precision(device):
        for _ in range(2):
            model(images)
        synchronize(device)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            model(images)
            synchronize(device)
            done += batch
        return done / (time.perf_counter() - started)


def labeling(images: str, workers: int, device: str, batch: int) -> float:
    """Returns images per second of labeling into a new store, from the first ready worker to the last shard."""
    teacher = TeacherConfig(NETWORK, random_weights=True, flip=False)
    with tempfile.TemporaryDirectory(dir=Path(images).parent) as folder:
        config = LabelerConfig(
            teacher, workers=workers, device=device, progress=False, batch_size=batch,
            shard_size=BATCHES_A_SHARD * batch, gpus_per_worker=1 / max(1, workers),
        )  # fmt: skip
        return label_images(images, Path(folder) / "labels", config).images_per_s


class Photographs(Dataset):
    """Photographs, preprocessed for the teacher: (image [3, S, S], position)."""

    def __init__(self, images: str, model: nn.Module) -> None:
        found = find_images(images)
        self.paths = [Path(found.name) / key for i, key in enumerate(found.keys) if i not in found.problems]
        self.transform = create_transform(**resolve_data_config({}, model=model))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[i]) as file:
            return self.transform(file.convert("RGB")), i


def plain_loop(images: str, device: str, batch: int, cores: int) -> float:
    """Returns images per second of the plain loop, which saves [2, K, H, W] in float16: scores and class ids."""
    torch.set_num_threads(cores)
    model = timm.create_model(NETWORK).eval().to(device, memory_format=torch.channels_last)
    photos = Photographs(images, model)
    batches = DataLoader(photos, batch, num_workers=cores, pin_memory=device == "cuda")
    with tempfile.TemporaryDirectory(dir=Path(images).parent) as folder, torch.inference_mode(), _precision(device):
        started = time.perf_counter()
        for pixels, places in batches:
            pixels = pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
            features = model.forward_features(pixels)  # [B, D, H, W]
            scores = model.fc(features.permute(0, 2, 3, 1))  # [B, H, W, C]: the head at each place
            values, ids = scores.permute(0, 3, 1, 2).topk(TOP, dim=1)
            labels = torch.stack([values.half(), ids.half()], 1).cpu()
            for place, label in zip(places.tolist(), labels, strict=True):
                torch.save(label.clone(), Path(folder) / f"{place}.pt")
        return len(photos) / (time.perf_counter() - started)


def _precision(device: str) -> torch.autocast:
    """Returns an autocast context with the labeler's compute precision: bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")


def coding_times(device: str, batch: int, cores: int, rounds: int) -> dict[str, list[float]]:
    """Returns milliseconds of encoding a batch's maps, and of the forward pass that computes them."""
    keep_freed_memory()
    torch.set_num_threads(cores)
    teacher = create_teacher(TeacherConfig(NETWORK, random_weights=True, flip=False), device)
    coarse = torch.rand(batch, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic").to(device) * 2 - 1
    maps, encoding = teacher.score_maps(images), Encoding()
    sides = {CODING: lambda: encode_maps(maps, encoding), PASS: lambda: teacher.score_maps(images)}
    return take_turns({name: milliseconds(call, device) for name, call in sides.items()}, rounds, warmups=2)


def coding_case(options: Options, batch: int) -> Case:
    print("labeler: coding …", file=sys.stderr)
    found = in_own_process(f"{__name__}:coding_times", options.device, batch, options.cores, options.rounds(15))
    note = note_of(f"{options.cores} cores", "the labeler's default takes two passes over an image")
    return Case(f"coding the maps of {batch} images, 7×7 cells", "ms", found, note=note)


def run(options: Options) -> Result:
    cuda = options.device == "cuda"
    workers = min(CUDA_WORKERS, options.cores) if cuda else options.cores
    batch = CUDA_BATCH if cuda else BATCH
    count = (1 if options.quick else SHARDS_EACH) * workers * BATCHES_A_SHARD * batch
    images = photographs.about(options.images, options.scratch / "labeler" / "images", count)
    ways = {f"{workers} Ray workers": workers, "in this process": 0}
    left_out = {}
    if find_spec("ray") is None:
        left_out = {_name(way): "Ray is not installed" for way in ways if ways[way]}
    cases = [_case(options, images, way, batch, ways[way]) for way in ways if _name(way) not in left_out]
    return Result([*cases, coding_case(options, batch)], left_out=left_out)


def _name(way: str) -> str:
    return f"labeling with {NETWORK} at {SIDE} px, {way}"


def _case(options: Options, images: Path, way: str, batch: int, workers: int) -> Case:
    """Measures one way of labeling and its rivals, in turns."""
    print(f"labeler: {way}, {options.rounds(3)} rounds …", file=sys.stderr)

    def own(function: str, *arguments: object) -> Callable[[], float]:
        return lambda: in_own_process(f"{__name__}:{function}", *arguments)

    ceilings = [CEILING, GIVES_BACK] if options.device == "cpu" else [CEILING]
    forward = options.device, 3 if options.quick else 8, batch, options.cores
    sides = {
        f"labeler, {way}": own("labeling", images, workers, options.device, batch),
        **{name: own("bare_forward", *forward, name == CEILING) for name in ceilings},
        LOOP: own("plain_loop", images, options.device, batch, options.cores),
    }
    return Case(
        _name(way),
        "images/s",
        take_turns(sides, options.rounds(3), warmups=0),
        more_is_better=True,
        sought=dict.fromkeys(ceilings, 0.85),
        note=note_of(
            f"{options.cores} cores",
            f"the labeler's decoder: {automatic_decoder(options.device)}",
            "the bare forward pass reads, codes and writes nothing",
            "the loop, a plain script, gives freed memory back, too" if options.device == "cpu" else "",
        ),
    )
