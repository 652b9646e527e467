"""Fine-tuning a trained network for other classes: its heads alone, adapters, or all of it.

    python -m scripts.lora --weights runs/cifar10_nano --images cifar100/train --validation cifar100/test

Each arm is a run of `fit` with the recipe cifar10_nano and image labels only. Run again, it keeps what is finished.
Everything that it writes is below --out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import train.__main__
from labeler.base.whole_files import replace_file
from scripts.cifar10 import command
from train.adapters.lora import add_adapters
from train.network import build_network, set_classes, train_mode
from train.recipes.config import TrainConfig
from train.recipes.recipe import load_recipe

RECIPE = "cifar10_nano"
# One learning rate for each kind of arm; none was searched for.
HEADS, ADAPTERS, ALL = "optimizer.lr=1e-2", "optimizer.lr=5e-3", "optimizer.lr=2e-3"
X_PROJ, DT_PROJ = 'lora.targets=["x_proj", "x_proj_b"]', 'lora.targets=["dt_proj", "dt_proj_b"]'
ARMS: dict[str, list[str]] = {
    "heads": ["model.train=heads", HEADS],
    "rank 4": ["lora.rank=4", ADAPTERS],
    "rank 16": ["lora.rank=16", ADAPTERS],
    "all": [ALL],
    "all, lr as adapters": [ADAPTERS],
    "rank 4, in_proj": ["lora.rank=4", 'lora.targets=["in_proj"]', ADAPTERS],
    "rank 4, out_proj": ["lora.rank=4", 'lora.targets=["out_proj"]', ADAPTERS],
    "rank 4, x_proj": ["lora.rank=4", X_PROJ, ADAPTERS],
    "rank 4, dt_proj": ["lora.rank=4", DT_PROJ, ADAPTERS],
}


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm, or read its results. Returns them."""
    folder = options.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    settings = [
        f"data.images={options.images}", "data.store=none", f"data.validation={options.validation}",
        f"model.weights={options.weights}", f"run.out={folder}", f"run.seed={seed}", "run.threads=1",
        f"schedule.steps={options.steps}", "run.eval_every=1000", *ARMS[arm],
    ]  # fmt: skip
    written = folder / "arm.json"
    if written.exists():
        return json.loads(written.read_text())
    summary = command(train.__main__, ["fit", RECIPE, *settings, "--resume", "auto", "--quiet", "--json"])
    newest = max((folder / "checkpoints").glob("step-*"))
    result = {
        "arm": arm, "seed": seed, "top1": summary["top1"], "seconds": summary["seconds"],
        "checkpoint": (newest / "weights.safetensors").stat().st_size,
        **costs(load_recipe(RECIPE, settings), options.classes),
    }  # fmt: skip
    replace_file(written, json.dumps(result).encode())
    return result


def costs(config: TrainConfig, classes: int) -> dict[str, int]:
    """Parameters that are trained, and bytes that training holds beside the weights.

    Returns:
        trained: the parameters; memory: gradients, Adam's two averages, and what a batch's forward pass keeps.
    """
    net = build_network(config.model, config.loss.dense_weight)
    add_adapters(net, config.lora, config.model.name)
    set_classes(net, classes, None, config.model)
    train_mode(net, config.model)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    images = torch.randn(config.run.batch_size, 3, config.model.img_size, config.model.img_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(images)  # held, and its graph with it, so that no address is used twice
    assert isinstance(out, tuple)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return {"trained": trained, "memory": 3 * 4 * trained + sum(kept.values())}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown, one line per arm."""
    lines = [
        "| trained | top-1 | seeds | parameters | memory | checkpoint | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = [one for one in results if one["arm"] == arm]
        if not runs:
            continue
        values = [100 * one["top1"] for one in runs]
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
        lines.append(
            f"| {arm} | {statistics.mean(values):.1f}{error} | {len(runs)} | {runs[0]['trained']:,} | "
            f"{runs[0]['memory'] / 1e6:.1f} MB | {runs[0]['checkpoint'] / 1e3:.0f} kB | "
            f"{statistics.mean(one['seconds'] for one in runs):.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="a run of the recipe cifar10_nano")
    parser.add_argument("--images", type=Path, required=True, help="training images in class folders")
    parser.add_argument("--validation", type=Path, required=True, help="test images in the same class folders")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="output folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of each arm (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of each arm (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to run; default: all")
    options = parser.parse_args(arguments)
    options.classes = sum(path.is_dir() for path in options.images.iterdir())
    options.out.mkdir(parents=True, exist_ok=True)
    results = [run_arm(arm, seed, options) for seed in options.seeds for arm in options.arms]
    print(f"\n{table(results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
