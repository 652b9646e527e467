"""The closed-form token-labeling loss against dense targets: time and memory of a forward and backward pass.

A batch has 128 images with 196 tokens and 1,000 classes. Each image has 32 of them in its palette and none in its tail,
or as many as in a store of the default encoding. Both sides start from score maps and crops (`crop_score_maps`), so the
time to build targets counts, and end with the gradients of both heads' logits; with and without a mix box on a quarter
of the tokens. On a CPU, page faults of new tensors take much of both sides' time. In training malloc keeps freed
memory, which helps the dense side more, so both settings are shown. On a GPU, building targets waits for the device,
which hides part of the losses' time, so each case is also shown with targets built in advance.

Memory is the peak of one pass beyond the logits, without the gradients, which both sides need.

Legend: B images; C classes; P palette size; R tail size; T tokens.
"""

from __future__ import annotations

import torch

from labeler.base.freed_memory import freed_memory_kept
from labeler.base.runtime import set_threads
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from scripts.benchmark.inputs.synthetic_batch import CLASSES, PLACES, SyntheticLabels
from scripts.benchmark.measure import Case, Options, Result, alone_on_cpu, extra_memory, milliseconds, take_turns
from train.loss.loss_reference import dense_token_label_loss
from train.loss.token_label_loss import TokenLabelLoss

BATCH, GRID = 128, (14, 14)
SIZES = ((32, 0), PLACES)  # P and R
MIXES = {"not mixed": None, "mixed": MixBox(0, 7, 7, 14, 0.75)}
OURS, DENSE = "closed form", "dense targets, softmax, soft cross-entropy"
MEMORY = "scripts.benchmark.suites.loss_suite:memory_of"


class Inputs:
    def __init__(self, batch: int, device: str, palette: int = 32, tail: int = 0) -> None:
        random = torch.Generator().manual_seed(0)
        self.labels = SyntheticLabels(batch, palette, tail, device)
        self.images = torch.empty(batch, 3, *GRID, device=device)
        shapes = (batch, CLASSES), (batch, GRID[0] * GRID[1], CLASSES)
        self.logits = [torch.randn(shape, generator=random).to(device) for shape in shapes]

    def batch(self, mix: MixBox | None) -> Batch:
        return self.labels.batch(self.images, GRID, mix)

    def run(self, side: str, mix: MixBox | None, ready: Batch | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the loss and the gradients of class and auxiliary logits; `ready`: a batch built in advance."""
        outputs = tuple(logits.detach().requires_grad_() for logits in self.logits)
        batch = self.batch(mix) if ready is None else ready
        loss = TokenLabelLoss()(outputs, batch) if side == OURS else dense_token_label_loss(outputs, batch, GRID)
        return loss, list(torch.autograd.grad(loss, outputs))


def run(options: Options) -> Result:
    cases = []
    for palette, tail in SIZES:
        what = f"P {palette}, R {tail}" if tail else f"P {palette}"
        inputs = Inputs(BATCH, options.device, palette, tail)
        cases += [time_case(options, inputs, what, mix) for mix in MIXES]
        if options.device == "cpu":
            with freed_memory_kept():
                cases += [time_case(options, inputs, what, mix, ", freed memory kept as `fit` does") for mix in MIXES]
        else:
            ready = {mix: inputs.batch(box) for mix, box in MIXES.items()}
            cases += [time_case(options, inputs, what, mix, ", targets ready", ready[mix]) for mix in MIXES]
        del inputs
        for name in MIXES:
            about = name, options.device, palette, tail
            found = {
                side: [alone_on_cpu(options.device, MEMORY, side, *about) for _ in range(2)] for side in (OURS, DENSE)
            }
            cases.append(Case(f"memory beyond logits and gradients, {what}, {name}", "MB", found, sought={DENSE: 8}))
    return Result(cases)


def time_case(
    options: Options, inputs: Inputs, places: str, name: str, how: str = "", ready: Batch | None = None
) -> Case:
    mix = MIXES[name]
    refuse_difference(inputs, mix)
    sides = {
        side: milliseconds(lambda side=side: inputs.run(side, mix, ready), options.device, options.calls)
        for side in (OURS, DENSE)
    }
    what = f"forward and backward, B {BATCH}, T 196, C {CLASSES:,}, {places}, {name}{how}"
    return Case(what, "ms", take_turns(sides, options.rounds(9)), sought={DENSE: 5})


def refuse_difference(inputs: Inputs, mix: MixBox | None) -> None:
    (closed, ours), (dense, theirs) = (inputs.run(side, mix) for side in (OURS, DENSE))
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    # Summed over 1,000 classes one by one, the dense softmax is off by up to 3e-5 in float32.
    if abs(closed.item() / dense.item() - 1) > 2e-6 or off > 1e-4:
        raise SystemExit(f"the sides differ: losses {closed.item()} and {dense.item()}, gradients by {off:.1e}")


def memory_of(side: str, mix: str, device: str, palette: int, tail: int) -> float:
    set_threads(None)
    Inputs(2, device, palette, tail).run(side, MIXES[mix])
    inputs = Inputs(BATCH, device, palette, tail)
    gradients = sum(logits.nbytes for logits in inputs.logits)
    return extra_memory(lambda: inputs.run(side, MIXES[mix]), device) - gradients / 1e6
