"""What each family and each mixer costs on this machine: a table of `docs/models.md`.

    python -m scripts.model_costs                       # everything, some fifteen minutes on one core
    python -m scripts.model_costs --only mamba2 vim     # some rows again; the others keep their figures
    python -m scripts.model_costs --render              # write the table again, without measuring

Every model and resolution is measured in a process of its own, with one thread. A training step is a forward and a
backward pass of both heads and a step of AdamW; its memory is what two images take at its peak, gradients included,
beyond parameters and the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from labeler.base.errors import ModelError
from labeler.base.whole_files import replace_file
from model import token_label
from model.summary import multiply_adds
from scripts.benchmark.machine import describe
from scripts.benchmark.measure import extra_memory, in_own_process, milliseconds, take_turns
from scripts.evidence.render import fill

BATCH = 2  # batch norm in training wants more than one image
ROUNDS = {224: 3}
FEW = 2  # rounds at other sizes
SIDES = (224, 512)


@dataclass(frozen=True)
class Row:
    """A model: its title in the table, its name, and the arguments that make it another than the name says."""

    title: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)


def mixer(name: str, **options: Any) -> Row:
    return Row(f"DeMansia Tiny, `{name}`", "demansia_tiny", {"mixer": name, **options})


ROWS = {
    "mamba": Row("DeMansia Tiny, `mamba`", "demansia_tiny"),
    "forward": Row("DeMansia Tiny, `mamba`, one direction", "demansia_tiny", {"directions": "forward"}),
    "mamba2": mixer("mamba2"),
    "mamba3": mixer("mamba3"),
    "attention": mixer("attention"),
    "gated_conv": mixer("gated_conv"),
    "linear_attention": mixer("linear_attention"),
    "demansia2": Row("DeMansia-2 Tiny", "demansia2_tiny"),
    "vim": Row("Vim Tiny", "vim_tiny"),
    "lvvit": Row("LV-ViT-T", "lvvit_t"),
    "mila": Row("MILA-T", "mila_tiny"),
    "mambavision": Row("MambaVision-T", "mambavision_tiny"),
    "mambaout": Row("MambaOut-T (timm)", "mambaout_tiny"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scripts.model_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="sides of the images in pixels")
    parser.add_argument("--render", action="store_true", help="only write the table, from the figures that exist")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/costs/models.json"), help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"), help="page to write to (%(default)s)")
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    for name in [] if options.render else options.only or ROWS:
        for side in options.sides:
            print(f"{name} at {side}²", file=sys.stderr, flush=True)
            found["machine"] = describe("cpu")
            found["rows"].setdefault(name, {})[str(side)] = measured(name, side)
            replace_file(options.results, json.dumps(found, indent=1).encode() + b"\n")
    fill(options.page, "model costs", table(found))
    print(table(found))
    return 0


def measured(name: str, side: int) -> dict[str, Any]:
    """Figures of one model and size, or why there are none."""
    try:
        return in_own_process("scripts.model_costs:measure", name, side)
    except RuntimeError as error:
        return {"refused": str(error).split(": ")[-1]}


def measure(name: str, side: int) -> dict[str, Any]:
    """Measure in this process; a model that refuses the size is an answer, too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = ROWS[name]
    try:
        net = token_label(row.model, 1000, img_size=side, **row.arguments).train()
    except ModelError as error:
        return {"refused": str(error)}
    images = torch.randn(BATCH, 3, side, side)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)

    def step() -> None:
        cls, aux = net(images)
        (cls.float().logsumexp(-1).mean() + aux.float().logsumexp(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        with torch.inference_mode():
            net.eval()(images)

    rounds = ROUNDS.get(side, FEW)
    train = take_turns({"ms": milliseconds(step)}, rounds)["ms"]
    memory = extra_memory(step)
    inference = take_turns({"ms": milliseconds(infer)}, rounds)["ms"]
    with torch.no_grad():
        macs = sum(multiply_adds(net, images).values())
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "macs": macs,
        "train_ms": statistics.median(train) / BATCH,
        "infer_ms": statistics.median(inference) / BATCH,
        "memory_mb": memory,
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sides = sorted({int(side) for row in found["rows"].values() for side in row})
    parts = [f"{what} at {side}²" for side in sides for what in ("GMAC", "inference, ms", "training, ms", "memory, MB")]
    lines = [f"| | parameters | {' | '.join(parts)} |", f"|{'---|' * (len(parts) + 2)}"]
    for name in (name for name in ROWS if name in found["rows"]):
        by_side, cells = found["rows"][name], []
        for side in sides:
            one = by_side.get(str(side), {"refused": "not measured"})
            if "refused" in one:
                cells += [one["refused"], "", "", ""]
            else:
                cells += [
                    f"{one['macs'] / 1e9:.2f}",
                    *(f"{one[key]:.0f}" for key in ("infer_ms", "train_ms", "memory_mb")),
                ]
        size = next((one["parameters"] for one in by_side.values() if "parameters" in one), 0)
        lines.append(f"| {ROWS[name].title} | {size / 1e6:.2f}M | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
