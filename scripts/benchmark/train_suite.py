"""A training step of DeMansia Tiny against the same network of stock operators, timm's DeiT-Tiny and the limit.

Ours is the step that `python -m train fit` takes: network, token-label loss, gradient, optimizer and moving average of
the recipe `demansia_tiny`, on a resident batch. The stock network has the dense loss and the same optimizer, without
clipping and moving average; DeiT-Tiny the plain cross-entropy, as it has no token head. The end-to-end figure is that
of a whole `fit` from JPEGs and a label store, beside the same step on a resident batch.

Legend: B images; C classes; T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import model  # noqa: F401  registers the names
from labeler import LabelerConfig, TeacherConfig, label_images
from pipeline.batch import Batch
from scripts.benchmark.limits import Limits, model_cost, step_limit
from scripts.benchmark.measure import Case, Options, Result, in_own_process, milliseconds, take_turns
from scripts.benchmark.photographs import copies_of
from scripts.benchmark.stock_model import scan_in_use, stock_model
from scripts.benchmark.synthetic_batch import synthetic_batch
from train.distributed import Ranks
from train.loss import TokenLabelLoss
from train.loss_reference import cross_entropy, dense_token_label_loss
from train.optimization import build_optimizer
from train.recipe import load_recipe
from train.task import TokenLabelTask, TrainingStep

SIDE, GRID, STEPS = 224, (14, 14), 6
OURS, DEIT = "DeMansia Tiny", "DeiT-Tiny (timm), class label only"
TEACHER = "scripts.benchmark.synthetic_teacher:synthetic_teacher"


def run(options: Options) -> Result:
    batch = 8 if options.device == "cpu" else 64
    precisions = [torch.float32, torch.bfloat16] if options.device == "cpu" else [torch.bfloat16]
    cases = [step_case(options, batch, precision) for precision in precisions]
    cases.append(loss_share(options, batch))
    if options.device == "cuda":
        cases.append(full_batch_case(options))
    return Result([*cases, end_to_end(options, batch)])


def step_case(options: Options, batch: int, precision: torch.dtype) -> Case:
    torch.manual_seed(0)
    data = synthetic_batch(batch, SIDE, device=options.device)
    net = timm.create_model("demansia_tiny").train().to(options.device)
    deit = timm.create_model("deit_tiny_patch16_224").train().to(options.device)
    stock = f"the same of stock operators, {scan_in_use(options.device)}, dense loss"
    steps = {
        OURS: our_step(net, data, precision),
        stock: plain_step(stock_model(net), data, precision, lambda out: dense_token_label_loss(out, data, GRID)),
        DEIT: plain_step(deit, data, precision, lambda out: hard_loss(out, data)),
    }
    rates = {name: images_per_s(step, batch, options.device) for name, step in steps.items()}
    found = take_turns(rates, options.rounds(7), warmups=2)
    kind, note = str(precision).removeprefix("torch."), ""
    if precision == (torch.float32 if options.device == "cpu" else torch.bfloat16):
        limits = Limits.measured(options.device)
        bytes_each = 4 if precision == torch.float32 else 2
        limit = step_limit(limits, *model_cost("demansia_tiny", SIDE), batch, bytes_each)
        found["limit"], note = [batch / limit] * len(found[OURS]), f"limit: {limits.text()}"
    name = f"training step, {SIDE}², B {batch}, {kind}"
    return Case(name, "images/s", found, more_is_better=True, sought={stock: 3}, note=note)


def our_step(net: nn.Module, data: Batch, precision: torch.dtype) -> Callable[[], object]:
    recipe = load_recipe("demansia_tiny")
    device = data.images.device
    task = TokenLabelTask(net, TokenLabelLoss(), device)  # type: ignore[arg-type]
    task.setup_ema(recipe.ema.decay)
    step = TrainingStep(task, build_optimizer(net, recipe.optimizer), Ranks(0, 1, device), precision=precision)
    numbers = iter(range(1 << 30))
    return lambda: step.run(data, next(numbers))


def plain_step(
    net: nn.Module, data: Batch, precision: torch.dtype, loss_of: Callable[[object], torch.Tensor]
) -> Callable[[], object]:
    optimizer = build_optimizer(net, load_recipe("demansia_tiny").optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(data.images.device.type, precision, enabled=precision != torch.float32):
            loss = loss_of(net(data.images))
        loss.backward()
        optimizer.step()

    return step


def hard_loss(logits: torch.Tensor, data: Batch) -> torch.Tensor:
    return cross_entropy(data.targets.dense_cls(logits.shape[1]), logits.float()).mean()


def images_per_s(step: Callable[[], object], batch: int, device: str) -> Callable[[], float]:
    side = milliseconds(step, device)
    return lambda: batch / side() * 1e3


def loss_share(options: Options, batch: int) -> Case:
    """The loss and its gradient alone, as a share of the step."""
    torch.manual_seed(0)
    data = synthetic_batch(batch, SIDE, device=options.device)
    net = timm.create_model("demansia_tiny").train().to(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    shapes = (batch, 1000), (batch, GRID[0] * GRID[1], 1000)
    outputs = tuple(torch.randn(s, device=options.device).to(dtype).requires_grad_() for s in shapes)
    loss = TokenLabelLoss()
    sides = {
        "loss and its gradient": milliseconds(
            lambda: torch.autograd.grad(loss(outputs, data), outputs), options.device
        ),
        "whole step": milliseconds(our_step(net, data, dtype), options.device),
    }
    found = take_turns(sides, options.rounds(7), warmups=2)
    share = [100 * part / whole for part, whole in zip(*found.values(), strict=True)]
    return Case(f"the loss's share of the step, B {batch}", "%", {OURS: share}, note="sought: under 2 %")


def full_batch_case(options: Options) -> Case:
    """The recipe's batch of 768, or the largest half, quarter … of it that fits."""
    batch = 768
    while True:
        try:
            data = synthetic_batch(batch, SIDE, device=options.device)
            net = timm.create_model("demansia_tiny").train().to(options.device)
            step = images_per_s(our_step(net, data, torch.bfloat16), batch, options.device)
            found = take_turns({OURS: step}, options.rounds(7), warmups=2)
        except Exception as error:
            # TrainingStep names what would fit in an error of its own.
            if "out of memory" not in str(error) or batch < 16:
                raise
            data = net = step = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
            batch //= 2
            continue
        note = "sought on an H200: 5,000 images/s"
        return Case(f"training step, {SIDE}², B {batch}, bfloat16", "images/s", found, more_is_better=True, note=note)


def end_to_end(options: Options, batch: int) -> Case:
    """`fit` from JPEGs beside the resident step, in turns, each in a process of its own."""
    images, store = options.scratch / "train-images", options.scratch / "train-labels"
    copies_of(options.images, images, 2)
    label_images(images, store, LabelerConfig(TeacherConfig(TEACHER), device="cpu", progress=False))
    whole, resident = "fit, from JPEGs and a label store", "the step alone, resident batch"
    found: dict[str, list[float]] = {whole: [], resident: []}
    waits: list[float] = []
    for turn in range(options.rounds(3)):
        print(f"train: end to end, round {turn + 1}", file=sys.stderr, flush=True)
        out = options.scratch / f"run-{turn}"
        rate, wait = in_own_process(
            "scripts.benchmark.train_suite:fit_rate", str(images), str(store), str(out), batch, options.device
        )
        found[whole].append(rate)
        waits.append(wait)
        found[resident].append(in_own_process("scripts.benchmark.train_suite:resident_rate", batch, options.device))
    note = f"waiting for data: {100 * max(waits):.1f} % of the time at most"
    return Case(f"training end to end, {SIDE}², B {batch}", "images/s", found, more_is_better=True, note=note)


def fit_rate(images: str, store: str, out: str, batch: int, device: str) -> list[float]:
    """(images/s of the second half of a short run; share of waiting)."""
    import json

    from train.trainer import fit

    settings = {
        "data.images": images, "data.store": store, "run.out": out, "run.batch_size": batch, "run.device": device,
        "schedule.steps": 2 * STEPS, "run.log_every": STEPS,
        "run.precision": "float32" if device == "cpu" else "bfloat16",
    }  # fmt: skip
    fit(load_recipe("demansia_tiny", [f"{key}={value}" for key, value in settings.items()]))
    rows = [json.loads(line) for line in (Path(out) / "speed.jsonl").read_text().splitlines()][1:]
    return [sum(row[key] for row in rows) / len(rows) for key in ("images_per_s", "data_wait")]


def resident_rate(batch: int, device: str) -> float:
    from train.device import keep_freed_memory, set_threads

    set_threads(None)
    if device == "cpu":
        keep_freed_memory()
    data = synthetic_batch(batch, SIDE, device=device)
    net = timm.create_model("demansia_tiny").train().to(device)
    step = milliseconds(our_step(net, data, torch.float32 if device == "cpu" else torch.bfloat16), device, STEPS)
    return take_turns({"": lambda: batch / step() * 1e3}, 1)[""][0]
