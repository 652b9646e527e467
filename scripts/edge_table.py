"""Small networks side by side: parameters, multiply-adds, memory and time for one image on one CPU core.

    python -m scripts.edge_table --realtime --images PHOTOS

Each network is measured in a process of its own, in torch and as an ONNX file in onnxruntime, one thread each. Weights
are random, which changes none of the figures. With --images both answer photographs, in batches of 1 and 3.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from train.evaluation.single_images import list_images, load_batches, normalized
from train.evaluation.validate import Trained
from train.export.compare import compare, milliseconds
from train.export.onnx_file import load_onnx, write_onnx
from train.export.program import trace

SIDE = 224
# Name in the table -> name for timm and arguments.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vim_pico": ("vim_pico", {}),
    "demansia_pico": ("demansia_pico", {}),
    "demansia_nano": ("demansia_nano", {}),
    "mila_nano": ("mila_nano", {}),
    "mambavision_nano": ("mambavision_nano", {}),
    "ViT, 64 wide, 12 layers": ("vit_tiny_patch16_224", {"embed_dim": 64, "num_heads": 2}),
    "ViT, 128 wide, 12 layers": ("vit_tiny_patch16_224", {"embed_dim": 128, "num_heads": 4}),
    "MobileNetV3 small ×0.5": ("mobilenetv3_small_050", {}),
    "MobileNetV4 conv small ×0.5": ("mobilenetv4_conv_small_050", {}),
    "ResNet-10-T": ("resnet10t", {}),
}
# Larger ones, to see that every family can be exported.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lvvit_t": ("lvvit_t", {}),
    "demansia2_tiny": ("demansia2_tiny", {}),
    "ResNet-10-T with a token head": ("resnet10t", {"token_head": True}),
}


@contextmanager
def at_once(wanted: bool) -> Iterator[None]:
    """Nothing else on this core meanwhile; needs the right to real-time scheduling."""
    if wanted:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    try:
        yield
    finally:
        if wanted:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def create(name: str) -> Any:
    """The network of a name in the table."""
    architecture, arguments = (NETWORKS | FAMILIES)[name]
    if arguments.get("token_head"):
        return model.token_label(architecture).eval()
    return timm.create_model(architecture, **arguments).eval()


def photographs(folder: str, net: Any) -> list[torch.Tensor]:
    """The first four images of a folder, as a run's evaluation prepares them, in batches of 1 and 3."""
    how = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": 0.9, "crop_mode": "center", "orientation": "exif"}
    net.img_size = (SIDE, SIDE)
    trained = Trained(net, "", how, [], {})
    pixels: list[Any] = next(iter(load_batches(list_images([folder])[:4], trained, 4, 1)))
    return [normalized(pixels[:1], trained), normalized(pixels[1:], trained)]


def measure(name: str, realtime: bool, images: str | None) -> dict[str, Any]:
    """Measure one network. Called in a process of its own, as the peak of memory is the process's."""
    torch.set_num_threads(1)
    net = create(name)
    image = torch.randn(1, 3, SIDE, SIDE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        net(image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with at_once(realtime):
        torch_ms = milliseconds(net, image)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_onnx(trace(net, (SIDE, SIDE)), path)
        run, size = load_onnx(path), path.stat().st_size
        batches = [image] if images is None else photographs(images, net)
        difference = compare(run, net, batches, None).relative_difference
        with at_once(realtime):
            onnx_ms = milliseconds(run, image)
    return {
        "name": name, "parameters": sum(p.numel() for p in net.parameters()), "macs": counter.get_total_flops() // 2,
        "peak_kb": peak, "torch_ms": torch_ms, "onnx_ms": onnx_ms, "onnx_bytes": size, "difference": difference,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as a table in Markdown."""
    names = ["network", "parameters", "GMAC", "peak memory", "torch", "onnxruntime", "ONNX file", "difference"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [
            row["name"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['macs'] / 1e9:.2f}",
            f"{row['peak_kb'] / 1024:.0f} MB",
            f"{row['torch_ms']:.1f} ms",
            f"{row['onnx_ms']:.1f} ms",
            f"{row['onnx_bytes'] / 1e6:.1f} MB",
            f"{row['difference']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.edge_table", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS | FAMILIES, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--realtime", action="store_true", help="time with real-time priority; needs the right to it")
    parser.add_argument("--images", help="a folder of photographs")
    parser.add_argument("--one", choices=NETWORKS | FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(measure(options.one, options.realtime, options.images)))
        return 0
    rows = []
    for name in options.networks:
        command = [sys.executable, "-m", "scripts.edge_table", "--one", name, *(["--realtime"] * options.realtime)]
        command += [] if options.images is None else ["--images", options.images]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    print(table(rows))
    return 0 if len(rows) == len(options.networks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
