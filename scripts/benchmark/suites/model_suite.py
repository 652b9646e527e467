"""DeMansia Tiny's inference against the same network of stock operators and timm's DeiT-Tiny; cost against resolution.

Images are in memory. Time and memory against resolution are those of a forward and backward pass (of the sum of the
outputs) in training mode, with one image on a CPU and eight on a GPU, each network and resolution in a separate
process. A ViT's time is quadratic in its tokens; its memory is unless attention is fused, so both are shown.

Legend: B images; T tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

import model  # noqa: F401  registers the names
from labeler.base.runtime import set_threads
from scripts.benchmark.inputs.stock_model import our_scan, scan_in_use, stock_model
from scripts.benchmark.limits import Limits, inference_limit, model_cost
from scripts.benchmark.measure import (
    Case,
    Growth,
    Options,
    Result,
    extra_memory,
    free_gpu,
    in_own_process,
    milliseconds,
    note_of,
    per_second,
    spread,
    take_turns,
)

OURS, DEIT, UNFUSED = "DeMansia Tiny", "DeiT-Tiny (timm)", "DeiT-Tiny, attention not fused"
RESOLUTIONS = (224, 384, 512, 768, 1024)


def run(options: Options) -> Result:
    our_scan(options.device)  # exits before anything is measured if this machine would run a slow scan
    precisions = [torch.float32, torch.bfloat16] if options.device == "cpu" else [torch.bfloat16]
    cases = [inference_case(options, precision) for precision in precisions]
    return Result(cases, growths(options))


def inference_case(options: Options, precision: torch.dtype) -> Case:
    batch = 8 if options.device == "cpu" else 256
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, device=options.device)
    net = timm.create_model("demansia_tiny").eval().to(options.device)
    stock = f"the same of stock operators, {scan_in_use(options.device)}"
    deit = timm.create_model("deit_tiny_patch16_224").eval().to(options.device)
    nets = {OURS: net, stock: stock_model(net), DEIT: deit}
    with torch.inference_mode():
        torch.testing.assert_close(nets[stock](images), net(images), rtol=1e-3, atol=1e-3)
    sides = {
        name: per_second(batch, milliseconds(inference(one, images, precision), options.device))
        for name, one in nets.items()
    }
    found = take_turns(sides, options.rounds(7))
    kind = str(precision).removeprefix("torch.")
    note = our_scan(options.device)
    if precision == (torch.float32 if options.device == "cpu" else torch.bfloat16):
        limits = Limits.measured(options.device)
        found["limit"] = [1 / inference_limit(limits, model_cost("demansia_tiny", 224)[0])] * len(found[OURS])
        note = note_of(f"limit: {limits.text()}", note)
    return Case(f"inference, 224², B {batch}, {kind}", "images/s", found, more_is_better=True, note=note)


def inference(net: nn.Module, images: torch.Tensor, precision: torch.dtype) -> Callable[[], None]:
    def once() -> None:
        mixed = torch.autocast(images.device.type, precision, enabled=precision != torch.float32)
        with torch.inference_mode(), mixed:
            net(images)

    return once


def growths(options: Options) -> list[Growth]:
    sides = RESOLUTIONS[:2] if options.quick else RESOLUTIONS
    time: dict[str, list[tuple[float, float]]] = {OURS: [], DEIT: [], UNFUSED: []}
    memory: dict[str, list[tuple[float, float]]] = {name: [] for name in time}
    missing = []
    free_gpu(options.device)
    for side in sides:
        for name in time:
            print(f"model: {name} at {side}²", file=sys.stderr, flush=True)
            try:
                found = in_own_process(
                    "scripts.benchmark.suites.model_suite:measure_growth", name, side, options.device
                )
            except RuntimeError as error:  # most likely out of memory
                missing.append(f"no figure for {name} at {side:,}: {error}")
                print(f"model: {missing[-1]}; see its output above", file=sys.stderr)
                continue
            time[name].append((side, found[0]))
            memory[name].append((side, found[1]))
    images = 1 if options.device == "cpu" else 8
    what = f"forward and backward pass of {'an image' if images == 1 else f'{images} images'}"
    note = note_of(*missing, our_scan(options.device))
    pixels = "side of the image in pixels"
    return [
        Growth(f"time of a {what}", pixels, "ms", time, note=note_of(exponents(time), note)),
        Growth(f"memory of a {what}", pixels, "MB", memory, note=note_of(exponents(memory), note)),
    ]


def exponents(points: dict[str, list[tuple[float, float]]]) -> str:
    """Returns how each side grows with the number of tokens between its last two resolutions, in words."""
    largest = sorted({side for line in points.values() for side, _ in line})[-2:]
    found = []
    for name, line in points.items():
        if len(line) < 2:
            continue
        (side, low), (larger, high) = line[-2:]
        power = math.log(max(high, 1e-9) / max(low, 1e-9)) / (2 * math.log(larger / side))
        where = "" if [side, larger] == largest else f" (between {side:,} and {larger:,})"
        found.append(f"{name} with T to the power of {power:.2f}{where}")
    return "between the two largest: " + ", ".join(found) if found else ""


def measure_growth(name: str, side: int, device: str) -> list[float]:
    """Returns median milliseconds and peak MB of a forward and backward pass."""
    set_threads(None)
    set_fused_attn(name != UNFUSED)
    torch.manual_seed(0)
    known = "demansia_tiny" if name == OURS else "deit_tiny_patch16_224"
    images = torch.randn(1 if device == "cpu" else 8, 3, side, side, device=device)
    net = timm.create_model(known, img_size=side).train().to(device)

    def once() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = net(images)
        sum(part.float().sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()

    times = take_turns({name: milliseconds(once, device)}, 3)[name]
    net.zero_grad(set_to_none=True)
    return [spread(times)[1], extra_memory(once, device)]
