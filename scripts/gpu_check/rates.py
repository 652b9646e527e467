"""The parts of `scripts.gpu_check` that measure: what is sought first, then the suites of `scripts.benchmark`.

Legend: B images; L sequence length; E inner width; N state size.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_check.__main__ import Says


def card(say: Says, device: str, quick: bool) -> None:
    """The machine, its versions, and the rates of a large product and a large copy."""
    import importlib.metadata

    versions = {}
    for name in ("torch", "triton", "timm", "h5py", "numpy", "ray", "nvidia-dali-cuda130", "numba", "mamba-ssm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    name = "CPU"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        name = f"{found.name}, {found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB"
    say(device=name, cores=len(os.sched_getaffinity(0)), python=sys.version.split()[0], versions=versions)
    side, size = (8192, 1 << 30) if device == "cuda" else (256, 1 << 22)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    x = torch.empty(size, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    product, copied = seconds(lambda: a @ a, device), seconds(lambda: y.copy_(x), device)
    say(teraflops=2 * side**3 / product / 1e12, gigabytes_per_s=2 * size / copied / 1e9)


def seconds(call: Callable[[], object], device: str, calls: int = 10) -> float:
    """Returns the median time of a call: on a GPU between events, so that starting it from Python does not count."""
    for _ in range(3 if device == "cuda" else 1):
        call()
    if device != "cuda":
        times = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def rates(say: Says, device: str, quick: bool) -> None:
    """What the project is measured by: training step, inference, scan and loss of DeMansia Tiny, and memory."""
    for B in (1,) if quick else (768, 256, 96):
        for measure in (train_step, inference, scan, loss):
            try:
                say(measured=measure.__name__, B=B, **measure(B, device, quick))
            except Exception as error:  # above all out of memory; smaller batches may fit
                say(measured=measure.__name__, B=B, failed=f"{type(error).__name__}: {str(error)[:200]}")
            if device == "cuda":
                torch.cuda.empty_cache()


def train_step(B: int, device: str, quick: bool) -> dict[str, float]:
    """The recipe's step on a batch in memory: GPU time alone, with Python's work, and how far Python is ahead."""
    step = _step(B, device, quick)
    for _ in range(2 if quick else 5):
        result = step()
    if device != "cuda":
        each = seconds(step, device)
        return {"ms": each * 1e3, "images_per_s": B / each, "loss": result.loss}
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    count, began = 10, time.perf_counter()
    for _ in range(count):
        step()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / count
    return {
        "ms": each * 1e3, "images_per_s": B / each, "python_ms": queued / count * 1e3, "loss": result.loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": torch.cuda.memory_reserved() / 2**30,
    }  # fmt: skip


def _step(B: int, device: str, quick: bool, **compiled: Any) -> Callable[[], Any]:
    import timm

    import model  # noqa: F401  registers the names
    from labeler.base.runtime import set_gpu_products
    from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
    from train.loss.token_label_loss import TokenLabelLoss
    from train.optimization import build_optimizer
    from train.ranks.distributed import Ranks
    from train.recipes.recipe import load_recipe
    from train.task import TokenLabelTask, TrainingStep

    recipe, side = load_recipe("demansia_tiny"), 64 if quick else 224
    precision = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cuda":
        set_gpu_products(precision)
    data = synthetic_batch(B, side, device=device)
    net = timm.create_model("demansia_tiny", img_size=side, drop_path_rate=recipe.model.drop_path_rate).train()
    net = net.to(device, memory_format=torch.channels_last)
    task = TokenLabelTask(net, TokenLabelLoss(in_place=device == "cuda"), torch.device(device))  # type: ignore[arg-type]
    optimizer = build_optimizer(net, recipe.optimizer)
    assert recipe.ema.decay is not None
    task.setup_ema(recipe.ema.decay)
    if compiled:
        task.compile(**compiled)
    made = TrainingStep(
        task, optimizer, Ranks(0, 1, torch.device(device)), precision=precision, channels_last=recipe.run.channels_last
    )
    numbers = iter(range(1 << 30))
    return lambda: made.run(data, next(numbers))


def inference(B: int, device: str, quick: bool) -> dict[str, float]:
    import timm

    import model  # noqa: F401  registers the names

    side = 64 if quick else 224
    net = timm.create_model("demansia_tiny", img_size=side).eval().to(device, memory_format=torch.channels_last)
    images = torch.randn(B, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        each = seconds(lambda: net(images), device)
    return {"ms": each * 1e3, "images_per_s": B / each}


def scan(B: int, device: str, quick: bool) -> dict[str, float]:
    """Both directions of the scan, forward and backward, as a part of 24 layers."""
    from model.ops import directional_scan
    from scripts.benchmark.suites.scan_suite import make_inputs

    inputs = make_inputs(B, device)
    wanted = torch.randn_like(inputs[0])

    def forward() -> torch.Tensor:
        return directional_scan(*inputs, True, (False, True))

    def both() -> object:
        return torch.autograd.grad(forward(), inputs, wanted)

    one, two = seconds(forward, device), seconds(both, device)
    return {"forward_us_an_image": 24e6 * one / B, "both_us_an_image": 24e6 * two / B}


def loss(B: int, device: str, quick: bool) -> dict[str, float]:
    from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
    from train.loss.token_label_loss import TokenLabelLoss

    data, criterion = synthetic_batch(B, 224, device=device), TokenLabelLoss()
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    outputs = tuple(torch.randn(s, device=device).to(kind).requires_grad_() for s in ((B, 1000), (B, 196, 1000)))
    each = seconds(lambda: torch.autograd.grad(criterion(outputs, data), outputs), device)
    return {"us_an_image": 1e6 * each / B}


def compiled(say: Says, device: str, quick: bool) -> None:
    """The step with the network through torch.compile, plain and with CUDA graphs."""
    for mode in ("default", "reduce-overhead"):
        for B in (2,) if quick else (96, 768):
            step = _step(B, device, quick, mode=mode)
            for _ in range(4):
                step()
            each = seconds(step, device)
            say(measured="compiled step", mode=mode, B=B, ms=each * 1e3, images_per_s=B / each)


def segments(say: Says, device: str, quick: bool) -> None:
    """The memory of the step at the recipe's batch where the allocator may extend its segments."""
    here = "scripts.benchmark.measure", f"{__name__}:train_step"
    for setting in ("", "expandable_segments:True"):
        variables = {"PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting} if setting else {}
        arguments = json.dumps([[1 if quick else 768, device, quick], {}])
        found = subprocess.run(
            [sys.executable, "-m", *here, arguments], env={**os.environ, **variables}, capture_output=True, text=True
        )
        figures = json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else {}
        failed = {} if figures else {"failed": (found.stderr.strip().splitlines() or [""])[-1][:200]}
        say(measured="memory", allocator=setting or "default", **figures, **failed)


def benchmark(suite: str, say: Says, device: str, quick: bool) -> None:
    """A suite of `scripts.benchmark`: its cases with all sides, and what it left out."""
    import tempfile

    from scripts.benchmark.__main__ import run_suite

    with tempfile.TemporaryDirectory() as scratch:
        found = run_suite(suite, device, quick, None, str(Path(scratch)))
    for case in found["cases"]:
        say(suite=suite, case=case["name"], unit=case["unit"], note=case["note"],
            medians={side: statistics.median(values) for side, values in case["values"].items()})  # fmt: skip
    for growth in found["growths"]:
        say(suite=suite, case=growth["name"], unit=growth["unit"], points=growth["points"])
    if found["left_out"]:
        say(suite=suite, left_out=found["left_out"])


benchmark_train = partial(benchmark, "train")
benchmark_scan = partial(benchmark, "scan")
benchmark_model = partial(benchmark, "model")
benchmark_loader = partial(benchmark, "loader")
benchmark_loss = partial(benchmark, "loss")
benchmark_labeler = partial(benchmark, "labeler")
benchmark_targets = partial(benchmark, "targets")
