"""The time of a training step on the CPU by kind of work.

    python -m scripts.benchmark.studies.step_profile [--batch 8] [--bfloat16]

Runs torch's profiler on a step of DeMansia Tiny at 224², as in `python -m train fit`. Every operator's own time counts
for the outermost kind of work around it. The profiler slows small operators down, so the scan's share is slightly too
large.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from labeler.base.freed_memory import keep_freed_memory
from labeler.base.runtime import set_threads
from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
from scripts.benchmark.suites.train_suite import SIDE, demansia, our_step

# Kind of work -> prefixes of its operators' names; the first match counts.
KINDS = {
    "scan": ("token_labeling::scan", "GeneratedBackwardFor_token_labeling_scan", "token_labeling::_scan"),
    "loss": ("token_labeling::token_cross_entropy", "GeneratedBackwardFor_token_labeling_token_cross"),
    "optimizer and average": ("Optimizer.", "aten::lerp", "aten::_foreach"),
    "normalisation": ("aten::batch_norm", "aten::native_batch_norm", "NativeBatchNormBackward", "aten::rms_norm"),
    "convolutions": ("aten::conv", "ConvolutionBackward"),
    "linear layers": ("aten::linear", "aten::matmul", "MmBackward", "AddmmBackward", "aten::addmm"),
    "copies between layouts": ("aten::copy_", "aten::cat", "aten::stack", "aten::contiguous", "aten::clone"),
}


def main() -> None:
    parser = argparse.ArgumentParser("scripts.benchmark.studies.step_profile", description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images in a step (%(default)s)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute precision of the forward pass: bfloat16 autocast"
    )
    options = parser.parse_args()
    set_threads(None)
    keep_freed_memory()
    found = step_profile(options.batch, torch.bfloat16 if options.bfloat16 else torch.float32)
    total = sum(found.values())
    print(f"{total / 1e3:,.0f} ms of operators in a step of {options.batch} images")
    for kind, microseconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{kind:28}{microseconds / 1e3:10,.0f} ms{microseconds / total:8.1%}")


def step_profile(batch: int, precision: torch.dtype) -> dict[str, float]:
    """Returns kind of work -> microseconds, of the third step."""
    torch.manual_seed(0)
    data = synthetic_batch(batch, SIDE)
    step = our_step(demansia("cpu"), data, precision)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    found: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        found[kind_of(event)] += event.self_cpu_time_total
    return dict(found)


def kind_of(event: Any) -> str:
    kind = "everything else"
    while event is not None:
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        fits = [known for known, beginnings in KINDS.items() if name.startswith(beginnings)]
        kind, event = (fits[0] if fits else kind), event.cpu_parent
    return kind


if __name__ == "__main__":
    main()
