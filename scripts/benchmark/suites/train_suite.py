"""A training step of DeMansia Tiny against the same network of stock operators, timm's DeiT-Tiny and the limit.

Ours is the step of `python -m train fit` with the recipe `demansia_tiny` on a batch in memory: network with drop path
and token mixing, loss, gradient and its norm, optimizer, moving average. The stock network does the same with the dense
loss, but without norm and average; DeiT-Tiny has the plain cross-entropy, since it has no token head. The end-to-end
figure is that of the second half of a short `fit` from JPEGs and a label store, beside the step alone. On a CPU malloc
keeps freed memory on all sides. Cases that do not fit in a GPU's memory are left out.

Legend: B images; C classes; T tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import model  # noqa: F401  registers the names
from labeler import LabelerConfig, TeacherConfig, label_images
from labeler.base.freed_memory import keep_freed_memory
from labeler.base.runtime import set_threads
from labeler.sources.decoding.create_decoder import automatic_decoder, has_dali
from pipeline.batch import Batch
from scripts.benchmark.inputs.photographs import about
from scripts.benchmark.inputs.stock_model import has_mamba_ssm, our_scan, scan_in_use, stock_model
from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
from scripts.benchmark.limits import Limits, model_cost, step_limit
from scripts.benchmark.measure import (
    KEPT,
    Case,
    Options,
    Result,
    free_gpu,
    in_own_process,
    milliseconds,
    note_of,
    per_second,
    take_turns,
)
from train.errors import TrainError
from train.loss.loss_reference import cross_entropy, dense_token_label_loss
from train.loss.token_label_loss import TokenLabelLoss
from train.optimization import build_optimizer
from train.ranks.distributed import Ranks
from train.recipes.recipe import load_recipe
from train.task import TokenLabelTask, TrainingStep
from train.trainer import fit

SIDE, GRID = 224, (14, 14)
# Steps of each half of an end-to-end run, and its images: on a GPU a few steps are too short to be timed.
STEPS, IMAGES = {"cpu": 6, "cuda": 200}, {"cpu": 200, "cuda": 6400}
OURS, DEIT = "DeMansia Tiny", "DeiT-Tiny (timm), class label only"
TEACHER = "scripts.benchmark.inputs.synthetic_teacher:synthetic_teacher"


def run(options: Options) -> Result:
    our_scan(options.device)  # exits before anything is measured if this machine would run a slow scan
    if options.device == "cpu":
        keep_freed_memory()  # for all sides: `fit` does so, and the others are faster with it, too
    batch = 8 if options.device == "cpu" else 64
    whole = end_to_end(options, batch)  # first, while a GPU's memory is free for its processes
    # With a loop over time the stock network needs too much memory for a larger batch.
    steps = step_cases(options, 256 if options.device == "cuda" and has_mamba_ssm() else batch)
    free_gpu(options.device)
    full = [full_batch_case(options)] if options.device == "cuda" else []
    return Result([*steps.cases, *full, *whole.cases], left_out=steps.left_out | whole.left_out)


def step_cases(options: Options, batch: int) -> Result:
    precisions = [torch.float32, torch.bfloat16] if options.device == "cpu" else [torch.bfloat16]
    try:
        cases = [step_case(options, batch, precision) for precision in precisions]
        return Result([*cases, loss_share(options, batch)])
    except (torch.OutOfMemoryError, TrainError) as error:  # `TrainError`: our step does not fit
        return Result(left_out={f"training step, {SIDE}², B {batch}": str(error).split(". ")[0]})


def step_case(options: Options, batch: int, precision: torch.dtype) -> Case:
    torch.manual_seed(0)
    data = synthetic_batch(batch, SIDE, device=options.device)
    net = demansia(options.device)
    deit = timm.create_model("deit_tiny_patch16_224").train().to(options.device)
    stock = f"the same of stock operators, {scan_in_use(options.device)}, dense loss"
    steps = {
        OURS: our_step(net, data, precision),
        stock: plain_step(stock_model(net), data, precision, dense_loss),
        DEIT: plain_step(deit, data, precision, class_loss),
    }
    fitting, missing = that_fit(steps, options.device)
    rates = {name: per_second(batch, milliseconds(step, options.device)) for name, step in fitting.items()}
    found = take_turns(rates, options.rounds(7))
    kind, limit_text = str(precision).removeprefix("torch."), ""
    if precision == (torch.float32 if options.device == "cpu" else torch.bfloat16):
        limits = Limits.measured(options.device)
        bytes_each = 4 if precision == torch.float32 else 2
        limit = step_limit(limits, *model_cost("demansia_tiny", SIDE), batch, bytes_each)
        found["limit"], limit_text = [batch / limit] * len(found[OURS]), f"limit: {limits.text()}"
    name = f"training step, {SIDE}², B {batch}, {kind}"
    # Three times the speed of a loop over time would mean little.
    sought = {stock: 3.0} if options.device == "cuda" and has_mamba_ssm() else {}
    note = note_of(limit_text, *missing, our_scan(options.device), KEPT[options.device])
    return Case(name, "images/s", found, more_is_better=True, sought=sought, note=note)


def that_fit(steps: dict[str, Callable[[], object]], device: str) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Runs each step once. Returns those that fit into the GPU's memory, and notes about the others."""
    fitting, missing = {}, []
    for name, step in steps.items():
        try:
            step()
            fitting[name] = step
        except torch.OutOfMemoryError:
            missing.append(f"no figure for {name}: the GPU is out of memory")
        free_gpu(device)
    return fitting, missing


def demansia(device: str) -> nn.Module:
    rate = load_recipe("demansia_tiny").model.drop_path_rate
    return timm.create_model("demansia_tiny", drop_path_rate=rate).train().to(device)


def our_step(net: nn.Module, data: Batch, precision: torch.dtype) -> Callable[[], object]:
    recipe = load_recipe("demansia_tiny")
    device = data.images.device
    task = TokenLabelTask(net, TokenLabelLoss(), device)  # type: ignore[arg-type]
    task.setup_ema(recipe.ema.decay)
    step = TrainingStep(task, build_optimizer(net, recipe.optimizer), Ranks(0, 1, device), precision=precision)
    numbers = iter(range(1 << 30))
    return lambda: step.run(data, next(numbers))


def plain_step(
    net: nn.Module, data: Batch, precision: torch.dtype, loss_of: Callable[[nn.Module, Batch], torch.Tensor]
) -> Callable[[], object]:
    optimizer = build_optimizer(net, load_recipe("demansia_tiny").optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(data.images.device.type, precision, enabled=precision != torch.float32):
            loss = loss_of(net, data)
        loss.backward()
        optimizer.step()

    return step


def dense_loss(net: nn.Module, data: Batch) -> torch.Tensor:
    return dense_token_label_loss(net(data.images, mix=data.token_mix), data, GRID)


def class_loss(net: nn.Module, data: Batch) -> torch.Tensor:
    logits = net(data.images)
    return cross_entropy(data.targets.dense_cls(logits.shape[1]), logits.float()).mean()


def loss_share(options: Options, batch: int) -> Case:
    """Measures the loss and its gradient alone, as a share of the step."""
    torch.manual_seed(0)
    data = synthetic_batch(batch, SIDE, device=options.device)
    net = demansia(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    shapes = (batch, 1000), (batch, GRID[0] * GRID[1], 1000)
    outputs = tuple(torch.randn(s, device=options.device).to(dtype).requires_grad_() for s in shapes)
    loss = TokenLabelLoss()
    sides = {
        "loss and its gradient": milliseconds(
            lambda: torch.autograd.grad(loss(outputs, data), outputs), options.device, options.calls
        ),
        "whole step": milliseconds(our_step(net, data, dtype), options.device),
    }
    found = take_turns(sides, options.rounds(7), warmups=2)
    share = [100 * part / whole for part, whole in zip(*found.values(), strict=True)]
    note = note_of("sought: under 2 %", our_scan(options.device), KEPT[options.device])
    return Case(f"the loss's share of the step, B {batch}", "%", {OURS: share}, note=note)


def full_batch_case(options: Options) -> Case:
    """Measures the recipe's batch of 768, or the largest half, quarter … of it that fits."""
    batch = 768
    while (found := full_batch_rates(options, batch)) is None:
        free_gpu(options.device)
        batch //= 2
    note = note_of("sought on an H200: 5,000 images/s", our_scan(options.device))
    return Case(f"training step, {SIDE}², B {batch}, bfloat16", "images/s", found, more_is_better=True, note=note)


def full_batch_rates(options: Options, batch: int) -> dict[str, list[float]] | None:
    """Returns images per second, in rounds; None if out of memory."""
    try:
        data = synthetic_batch(batch, SIDE, device=options.device)
        step = our_step(demansia(options.device), data, torch.bfloat16)
        side = per_second(batch, milliseconds(step, options.device))
        return take_turns({OURS: side}, options.rounds(7), warmups=2)
    except (torch.OutOfMemoryError, TrainError) as error:
        # TrainingStep raises a TrainError that says what would fit.
        if batch < 16 or "out of memory" not in str(error):
            raise
        return None


def end_to_end(options: Options, batch: int) -> Result:
    """Measures `fit` from JPEGs beside the step alone; if it fails, the other cases are kept."""
    name = f"training end to end, {SIDE}², B {batch}"
    if options.device == "cuda" and not has_dali():
        return Result(left_out={name: "DALI is not installed"})
    try:
        found, waits = end_to_end_rates(options, batch)
    except RuntimeError as error:
        print(f"train: no end-to-end figure: {error}; see its output above", file=sys.stderr)
        return Result(left_out={name: str(error)})
    note = note_of(
        f"waiting for data: {100 * max(waits):.1f} % of the time at most",
        f"the loader's backend: {automatic_decoder(options.device)}",
        our_scan(options.device),
        KEPT[options.device],
    )
    return Result([Case(name, "images/s", found, more_is_better=True, note=note)])


def end_to_end_rates(options: Options, batch: int) -> tuple[dict[str, list[float]], list[float]]:
    """Returns images/s of both sides, measured in turns in separate processes, and the shares of waiting."""
    store = options.scratch / "train-labels"
    images = about(options.images, options.scratch / "train-images", IMAGES[options.device])
    own("label", str(images), str(store))
    whole, resident = "fit, from JPEGs and a label store", "the step alone, resident batch"
    found: dict[str, list[float]] = {whole: [], resident: []}
    waits: list[float] = []
    for turn in range(options.rounds(3)):
        print(f"train: end to end, round {turn + 1}", file=sys.stderr, flush=True)
        out = options.scratch / f"run-{turn}"
        rate, wait = own("fit_rate", str(images), str(store), str(out), batch, options.device)
        found[whole].append(rate)
        found[resident].append(own("resident_rate", batch, options.device))
        waits.append(wait)
    return found, waits


def own(function: str, *arguments: object) -> Any:
    return in_own_process(f"scripts.benchmark.suites.train_suite:{function}", *arguments)


def label(images: str, store: str) -> None:
    label_images(images, store, LabelerConfig(TeacherConfig(TEACHER), device="cpu", progress=False))


def fit_rate(images: str, store: str, out: str, batch: int, device: str) -> list[float]:
    """Returns images/s of the second half of a short run, and its share of waiting."""
    steps = STEPS[device]
    settings = {
        "data.images": images, "data.store": store, "run.out": out, "run.batch_size": batch, "run.device": device,
        "schedule.steps": 2 * steps, "run.log_every": steps, "run.tensorboard": "false",
        "run.precision": "float32" if device == "cpu" else "bfloat16",
    }  # fmt: skip
    fit(load_recipe("demansia_tiny", [f"{key}={value}" for key, value in settings.items()]))
    last = json.loads((Path(out) / "speed.jsonl").read_text().splitlines()[-1])
    return [last["images_per_s"], last["data_wait"]]


def resident_rate(batch: int, device: str) -> float:
    set_threads(None)
    if device == "cpu":
        keep_freed_memory()
    data = synthetic_batch(batch, SIDE, device=device)
    precision = torch.float32 if device == "cpu" else torch.bfloat16
    side = per_second(batch, milliseconds(our_step(demansia(device), data, precision), device, STEPS[device]))
    return take_turns({OURS: side}, 1)[OURS][0]
