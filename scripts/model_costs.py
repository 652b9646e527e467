"""What each family and each mixer costs on this machine, and how costs grow with the image: tables of the docs.

    python -m scripts.model_costs                       # everything, some fifteen minutes on one core
    python -m scripts.model_costs --only mamba2 vim     # some rows again; the others keep their figures
    python -m scripts.model_costs --growth              # DeMansia Tiny beside DeiT-Tiny, 224 to 1,248 pixels
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
GROWTH_SIDES = (224, 384, 512, 768, 1024, 1248)


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

GROWTH = {"mamba": Row("DeMansia Tiny", "demansia_tiny"), "deit": Row("DeiT-Tiny (timm)", "deit_tiny_patch16_224")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scripts.model_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--growth", action="store_true", help=f"measure {' and '.join(GROWTH)} at {GROWTH_SIDES}")
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the images in pixels")
    parser.add_argument("--render", action="store_true", help="only write the table, from the figures that exist")
    parser.add_argument("--results", type=Path, help="default: benchmarks/costs/model.json, or growth.json")
    parser.add_argument("--page", type=Path, help="page to write to (default: docs/models.md, or docs/evidence.md)")
    options = parser.parse_args(arguments)
    if options.growth and options.only:
        parser.error("--growth has rows of its own: leave out --only")
    name, page, rows, sides, text_of = (
        ("growth", "evidence", GROWTH, GROWTH_SIDES, growth_table)
        if options.growth
        else ("model", "models", ROWS, SIDES, table)
    )
    results = options.results or Path(f"benchmarks/costs/{name}.json")
    found = json.loads(results.read_text()) if results.exists() else {"rows": {}}
    for row in [] if options.render else options.only or rows:
        for side in options.sides or sides:
            print(f"{row} at {side}²", file=sys.stderr, flush=True)
            found["machine"] = describe("cpu")
            found["rows"].setdefault(row, {})[str(side)] = measured(row, side)
            replace_file(results, json.dumps(found, indent=1).encode() + b"\n")
    fill(options.page or Path(f"docs/{page}.md"), f"{name} costs", text_of(found))
    print(text_of(found))
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
    row = {**ROWS, **GROWTH}[name]
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
    infer_memory = extra_memory(infer)
    with torch.no_grad():
        macs = sum(multiply_adds(net, images).values())
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "macs": macs,
        "train_ms": statistics.median(train) / BATCH,
        "infer_ms": statistics.median(inference) / BATCH,
        "memory_mb": memory,
        "infer_memory_mb": infer_memory,
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


def growth_table(found: dict[str, Any]) -> str:
    """A row for each size of the image, and the columns of each network."""
    columns = {"infer_ms": "inference, ms", "infer_memory_mb": "MB", "train_ms": "training, ms", "memory_mb": "MB"}
    names = [name for name in GROWTH if name in found["rows"]]
    heads = []
    for name in names:
        first, *others = columns.values()
        heads += [f"{GROWTH[name].title}: {first}", *others]
    lines = [f"| pixels | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for side in sorted({int(side) for name in names for side in found["rows"][name]}):
        figures = [found["rows"][name].get(str(side), {}) for name in names]
        cells = [f"{one[key]:,.0f}" if key in one else "" for one in figures for key in columns]
        lines.append(f"| {side:,}² | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
