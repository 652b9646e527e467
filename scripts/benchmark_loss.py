"""The closed-form token-labeling loss against dense targets: time and memory of a forward and backward pass on the CPU.

    python -m scripts.benchmark_loss [--repeats 7] [--json]

A batch of 128 images with 196 tokens, 1,000 classes and 32 of them in each palette. Both sides begin with score maps
and crops (`crop_score_maps`), so that the targets' construction counts, and end with the gradients of both heads'
logits, with a mix box on a quarter of the tokens and without one. The sides take turns; the cores must be idle.

Memory: growth of the process's largest resident set (`ru_maxrss`) in one such pass, less the gradients, which both
sides need, each in a process of its own after a pass over two images has loaded all code. The logits exist before.

Legend: B images; C classes; P palette size; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from labeler.score_maps import ScoreMaps
from pipeline.batch import Batch
from pipeline.geometry import Views, identity
from pipeline.mix import MixBox
from pipeline.targets import crop_score_maps
from scripts.benchmark_loader import spread
from train.loss import TokenLabelLoss
from train.loss_reference import dense_token_label_loss

BATCH, CLASSES, PALETTE, MAP, GRID = 128, 1000, 32, 18, (14, 14)
MIX = MixBox(0, 7, 7, 14, 0.75)
SIDES = ("closed", "dense")


class Inputs:
    def __init__(self, batch: int) -> None:
        random = torch.Generator().manual_seed(0)
        classes = torch.stack([torch.randperm(CLASSES, generator=random)[:PALETTE] for _ in range(batch)])
        scores = -6 + 2 * torch.randn(batch, PALETTE, MAP, MAP, generator=random)
        region = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(batch, 1)
        self.maps = ScoreMaps(classes, scores, torch.full((batch, MAP, MAP), -9.0), region, CLASSES)
        corner, size = torch.rand(2, batch, 2, generator=random, dtype=torch.float64)
        self.boxes = torch.cat([corner / 2, corner / 2 + 0.3 + size / 5], 1)
        self.logits = [torch.randn(batch, CLASSES, generator=random)]
        self.logits += [torch.randn(batch, GRID[0] * GRID[1], CLASSES, generator=random)]

    def run(self, side: str, mix: MixBox | None) -> tuple[float, list[torch.Tensor]]:
        """The loss, and the gradients of class and auxiliary logits."""
        cls_logits, aux_logits = (logits.detach().requires_grad_() for logits in self.logits)
        targets = crop_score_maps(self.maps, self.boxes, GRID)
        n, views = len(targets), Views(self.boxes, identity(len(targets)))
        batch = Batch(torch.empty(n, 3, 14, 14), targets, torch.full((n,), -1), mix, ("",) * n, np.full(n, -1), views)
        outputs = cls_logits, aux_logits
        loss = TokenLabelLoss()(outputs, batch) if side == "closed" else dense_token_label_loss(outputs, batch, GRID)
        return loss.item(), list(torch.autograd.grad(loss, [cls_logits, aux_logits]))


def measure_time(mix: MixBox | None, repeats: int) -> dict[str, list[float]]:
    inputs = Inputs(BATCH)
    (closed, dense), times = (inputs.run(side, mix) for side in SIDES), {side: [] for side in SIDES}
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(closed[1], dense[1], strict=True))
    # Summed over 1,000 classes one by one, the dense softmax is off by up to 3e-5 in float32.
    if abs(closed[0] / dense[0] - 1) > 2e-6 or off > 1e-4:
        raise SystemExit(f"the sides differ: losses {closed[0]} and {dense[0]}, gradients by {off:.1e}")
    for _ in range(repeats):
        for side in SIDES:
            started = time.perf_counter()
            inputs.run(side, mix)
            times[side].append((time.perf_counter() - started) * 1e3)
    return times


def extra_memory(side: str, mix: MixBox | None) -> float:
    """MB by which one pass raises the process's largest resident set, less the gradients."""
    Inputs(2).run(side, mix)
    inputs = Inputs(BATCH)
    # What was freed since the largest resident set so far would hide as much of the pass's growth: fill it.
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    filler, before = torch.ones(max(0, _max_rss() - now) + (1 << 20), dtype=torch.uint8), _max_rss()
    _, gradients = inputs.run(side, mix)
    grown = _max_rss() - before - sum(gradient.nbytes for gradient in gradients)
    del filler
    return grown / 1e6


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(side: str, mix: MixBox | None) -> float:
    # With a fixed threshold freed tensors leave the process at once; by default malloc keeps some megabytes.
    command = [sys.executable, "-m", "scripts.benchmark_loss", "--side", side, *(["--mix"] if mix else [])]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # one side's own process
    parser.add_argument("--mix", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    if options.side:
        print(extra_memory(options.side, MIX if options.mix else None))
        return
    result: dict[str, dict] = {}
    for name, mix in (("not mixed", None), ("mixed", MIX)):
        memory = {side: [in_own_process(side, mix) for _ in range(3)] for side in SIDES}
        for what, found in (("ms", measure_time(mix, options.repeats)), ("extra MB", memory)):
            ratio = spread(found["dense"], found["closed"])
            result[f"{name}, {what}"] = {side: spread(found[side]) for side in SIDES} | {"dense / closed": ratio}
    if options.json:
        print(json.dumps({"cores": cores} | result, indent=1))
        return
    print(f"{cores} cores; median (lowest to highest)")
    for name, row in result.items():
        print(f"{name:20}", *(f"{key} {mid:.1f} ({low:.1f} to {high:.1f})  " for key, (low, mid, high) in row.items()))


if __name__ == "__main__":
    main()
