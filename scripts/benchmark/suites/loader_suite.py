"""The loader's speed against a torch `DataLoader` with one label file per image, as token labeling's code has it.

All sides apply the same augmentation: random resized crop (bilinear or bicubic), flip and normalization; ours adds
token labels on a grid of side/16. The rivals decode images and load one top-5 `.pt` file per image in one persistent
worker process per core. In the main process, the first rival also scatters the labels to all classes, crops them with
ROI-align and applies the softmax. The second rival is the same without this label crop: its speed if that were free.

Each run is a separate process and warms up for one epoch, so that files come from the page cache. The cores must be
idle: torch's threads wait for each other, so one other busy process makes small operations many times slower.

Legend: B images; P palette size; K = 5 classes per cell; H×W map grid; S side of the network's input.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from torchvision.transforms import functional as tv

from labeler import LabelerConfig, LabelStore, TeacherConfig, label_images
from labeler.sources.decoding.create_decoder import has_dali
from pipeline import LoaderConfig, create_loader
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from scripts.benchmark.inputs import photographs
from scripts.benchmark.measure import Case, Growth, Options, Result, in_own_process, synchronize, take_turns
from scripts.benchmark.suites.targets_suite import RATIO, SCALE, TOP, mirrored, rival_targets

SIDE, BATCH, PATCH = 224, 64, 16
RESOLUTIONS, QUICK_RESOLUTIONS = (112, 160, 224, 320, 448), (112, 224)
IMAGES, QUICK_IMAGES = 1200, 300  # of one epoch on the CPU
HW_DECODER_LOADS = (0.65, 0.0, 0.5, 0.9)  # the default first
THREADS = (4, 8, 16)
METHODS = [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC]
OURS, BY_DALI, PIL_RIVAL, PIL_NO_CROP, V2_RIVAL = (
    "loader",
    "loader, DALI on the CPU",
    "DataLoader + PIL, one .pt per image",
    "DataLoader + PIL, no label crop",
    "torchvision v2 in DataLoader workers, no label crop",
)


@dataclass(frozen=True)
class Material:
    """Folders that all sides use: images, their label store, and one top-5 file per row of the store."""

    images: str
    store: str
    labels: str


class PilImages(Dataset):
    """Photographs with their label files: (image [3, S, S], label [2, K, H, W], box [4])."""

    def __init__(self, material: Material, keys: list[str], side: int) -> None:
        self.images, self.keys, self.labels, self.side = Path(material.images), keys, Path(material.labels), side

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with Image.open(self.images / self.keys[i]) as file:
            image = file.convert("RGB")
        label = torch.load(self.labels / f"{i}.pt", weights_only=True)
        y, x, h, w = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        box = torch.tensor([y / image.height, x / image.width, (y + h) / image.height, (x + w) / image.width])
        image = tv.resized_crop(image, y, x, h, w, [self.side, self.side], random.choice(METHODS))
        if random.random() < 0.5:
            image, (label, box) = tv.hflip(image), mirrored(label, box)
        return tv.normalize(tv.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), label, box


class V2Images(Dataset):
    """The same with torchvision's own decoder and tensor transforms: (image [3, S, S], label [2, K, H, W])."""

    def __init__(self, material: Material, keys: list[str], side: int) -> None:
        self.images, self.keys, self.labels = Path(material.images), keys, Path(material.labels)
        crops = [v2.RandomResizedCrop(side, SCALE, RATIO, interpolation=method, antialias=True) for method in METHODS]
        steps = [v2.RandomChoice(crops), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.images / self.keys[i]
        try:
            image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        except RuntimeError:  # no JPEG, or a kind of it that torchvision does not read
            with Image.open(path) as file:
                image = tv.pil_to_tensor(file.convert("RGB"))
        return self.transform(image), torch.load(self.labels / f"{i}.pt", weights_only=True)


def our_rate(
    material: dict[str, str],
    side: int,
    epochs: int,
    device: str,
    threads: int,
    hw_decoder_load: float = 0.65,
    backend: str = "auto",
) -> float:
    """Returns images per second of our loader, in batches of B = 64."""
    torch.set_num_threads(threads)
    config = LoaderConfig(
        material["images"], material["store"], batch_size=BATCH, image_size=side, grid=(side // PATCH, side // PATCH),
        scale=SCALE, ratio=RATIO, auto_augment="none", mix="none", backend=backend, device=device, threads=threads,
        hw_decoder_load=hw_decoder_load, progress=False,
    )  # fmt: skip
    return _rate(create_loader(config), lambda batch: None, epochs, device)


def rival_rate(name: str, material: dict[str, str], side: int, epochs: int, device: str, workers: int) -> float:
    """Returns images per second of a rival, whose batches are moved to the device as in a training loop."""
    torch.set_num_threads(workers)
    store, files = LabelStore(material["store"]), Material(**material)
    images = (V2Images if name == V2_RIVAL else PilImages)(files, list(store.keys), side)
    how: dict[str, Any] = {"num_workers": workers, "persistent_workers": True, "pin_memory": device == "cuda"}

    def finish(batch: list[torch.Tensor]) -> None:
        _, *rest = (part.to(device, non_blocking=True) for part in batch)
        if name == PIL_RIVAL:
            rival_targets(rest[0], rest[1], store.meta.num_classes, (side // PATCH, side // PATCH))

    return _rate(DataLoader(images, BATCH, shuffle=True, drop_last=True, **how), finish, epochs, device)


def _rate(batches: Iterable[Any], finish: Callable[[Any], None], epochs: int, device: str) -> float:
    """Returns images per second of whole epochs, with their start-up, after an epoch that is not timed."""
    done, started = 0, 0.0
    for epoch in range(1 + epochs):
        if epoch == 1:  # the one before warmed up
            synchronize(device)
            done, started = 0, time.perf_counter()
        for batch in batches:
            finish(batch)
            done += BATCH
    synchronize(device)
    return done / (time.perf_counter() - started)


def run(options: Options) -> Result:
    if options.device == "cuda" and not has_dali():  # `auto` would be another loader
        return Result(left_out={"all cases": "DALI is not installed"})
    print("loader: preparing images and labels …", file=sys.stderr)
    material = _prepare(options)
    cases = [_throughput(options, material)]
    if options.device == "cuda":
        cases += [_hardware_decoder(options, material), _threads(options, material)]
    left_out = {} if has_dali() else {BY_DALI: "DALI is not installed"}
    return Result(cases, [_resolutions(options, material)], left_out)


def _prepare(options: Options) -> Material:
    folder = options.scratch / "loader"
    # On a GPU an epoch of the CPU's size is too short to be timed.
    count = (QUICK_IMAGES if options.quick else IMAGES) * (20 if options.device == "cuda" else 1)
    images = photographs.about(options.images, folder / "images", count)
    teacher = TeacherConfig("scripts.benchmark.inputs.synthetic_teacher:synthetic_teacher")
    label_images(images, folder / "store", LabelerConfig(teacher, device=options.device, progress=False))
    (folder / "top5").mkdir()
    write_top5_files(LabelStore(folder / "store"), folder / "top5")
    return Material(str(images), str(folder / "store"), str(folder / "top5"))


def write_top5_files(store: LabelStore, folder: Path) -> None:
    """Writes float16 [2, K, H, W] for each row, logits and class ids as in the reference's files."""
    for rows in np.array_split(np.arange(len(store)), -(-len(store) // 32)):
        log_p = store.read(rows).to_torch().dense().log()
        values, ids = (log_p - log_p.amin(1, keepdim=True)).topk(TOP, dim=1)
        for row, label in zip(rows.tolist(), torch.stack([values.half(), ids.half()], 1), strict=True):
            torch.save(label.clone(), folder / f"{row}.pt")


def _sides(options: Options, material: Material, names: list[str], side: int, epochs: int) -> dict[str, Any]:
    """Returns side -> a function that runs it in a separate process."""
    parts, rest = asdict(material), (side, epochs, options.device, options.cores)

    def one(name: str) -> Callable[[], float]:
        if name in (OURS, BY_DALI):
            backend = {"backend": "auto" if name == OURS else "dali"}
            return lambda: in_own_process(f"{__name__}:our_rate", parts, *rest, **backend)
        return lambda: in_own_process(f"{__name__}:rival_rate", name, parts, *rest)

    return {name: one(name) for name in names}


def _throughput(options: Options, material: Material) -> Case:
    print(f"loader: {SIDE} px, {options.rounds(3)} rounds of all sides …", file=sys.stderr)
    ours = _ours(options)
    names = [*ours, PIL_RIVAL, PIL_NO_CROP, V2_RIVAL]
    sought = {PIL_RIVAL: 1.3} | ({V2_RIVAL: 2} if options.device == "cpu" else {}) | dict.fromkeys(ours[1:], 1.7)
    sides = _sides(options, material, names, SIDE, 1 if options.quick else 2)
    return Case(
        f"training batches of {BATCH} at {SIDE} px with 14×14 token targets",
        "images/s",
        take_turns(sides, options.rounds(3), warmups=0),
        more_is_better=True,
        sought=sought,
        note=f"All on the same {options.cores} cores; without their label crop the rivals do less than the loader.",
    )


def _ours(options: Options) -> list[str]:
    """Returns our sides: the loader as `auto` has it, which on a CPU is not DALI, and DALI."""
    return [OURS, BY_DALI] if options.device == "cpu" and has_dali() else [OURS]


def _resolutions(options: Options, material: Material) -> Growth:
    """Measures the median speed at each resolution."""
    names = [*_ours(options), V2_RIVAL, PIL_NO_CROP]
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for side in QUICK_RESOLUTIONS if options.quick else RESOLUTIONS:
        print(f"loader: {side} px …", file=sys.stderr)
        found = take_turns(_sides(options, material, names, side, 1), options.rounds(3), warmups=0)
        for name, rates in found.items():
            points[name].append((side, statistics.median(rates)))
    return Growth(
        "training batches by output resolution",
        "pixels along a side",
        "images/s",
        points,
        logarithmic=False,
        note=f"The loader's batches hold token targets, one for every {PATCH}×{PATCH} pixels.",
    )


def _hardware_decoder(options: Options, material: Material) -> Case:
    return _ours_only(options, material, {f"share {load:g}": {"hw_decoder_load": load} for load in HW_DECODER_LOADS},
                      "share of images for the GPU's hardware JPEG decoder")  # fmt: skip


def _threads(options: Options, material: Material) -> Case:
    counts = [options.cores, *(count for count in THREADS if count != options.cores)]
    return _ours_only(options, material, {f"{count} threads": {"threads": count} for count in counts},
                      "the loader's threads")  # fmt: skip


def _ours_only(options: Options, material: Material, settings: dict[str, dict[str, Any]], name: str) -> Case:
    """Measures our loader with different values of a setting; the default comes first."""
    print(f"loader: {name} …", file=sys.stderr)

    def one(setting: dict[str, Any]) -> Callable[[], float]:
        named = {"side": SIDE, "epochs": 2, "device": options.device, "threads": options.cores} | setting
        return lambda: in_own_process(f"{__name__}:our_rate", asdict(material), **named)

    sides = {side: one(setting) for side, setting in settings.items()}
    found = take_turns(sides, options.rounds(3), warmups=0)
    return Case(f"{name}, {SIDE} px", "images/s", found, more_is_better=True, note="The first is the default.")
