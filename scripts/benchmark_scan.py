"""The `cpu` backend of the selective scan against two loops over time that autograd differentiates.

    python -m scripts.benchmark_scan [--rounds 5] [--slow-rounds 1] [--threads N] [--json]

Forward and backward, float32, both directions, B 8, L 197, E 384, N 16 unless told otherwise. All sides get the same
inputs in the same process, with denormals flushed in all threads, and take turns, so that whatever else the machine
does hits all of them; the ratio is of medians. Keep the cores idle: torch's threads wait for each other at every step.

- cpu: one call for both directions, hand-written backward.
- unbound: decays and inputs of all steps at once, then a loop over their `unbind`, both directions in one loop.
- stepwise: `scan_reference`, which forms each step's decay when it gets there. For comparison.
- indexed: as unbound, but a loop over `a[:, t]`, whose backward fills a tensor of the size of `a` at every step.

Legend: K directions, B batch, L length, E inner width, N state size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from model.ops import directional_scan, scan_reference

REVERSE = (False, True)
Scan = Callable[[Sequence[torch.Tensor]], torch.Tensor]
SOUGHT = {"unbound": 1.3, "indexed": 20.0}  # how many times slower than `cpu` these must be


def cpu(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return directional_scan(*inputs, True, REVERSE, "cpu")


def stepwise(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return scan_reference(*inputs, True, REVERSE)


def unbound(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return plain(inputs, lambda x: x.unbind(1))


def indexed(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return plain(inputs, lambda x: [x[:, t] for t in range(x.shape[1])])


def plain(inputs: Sequence[torch.Tensor], steps: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> torch.Tensor:
    """The scan with all decays formed at once; `steps` cuts [K·B, L, E, N] into its steps."""
    u, delta, A, B, C, D, delta_bias = inputs
    u, delta, B, C = (torch.stack([x[0], x[1].flip(1)]) for x in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias[:, None, None])
    a = torch.exp(dt.unsqueeze(-1) * A[:, None, None]).flatten(0, 1)
    x = ((dt * u).unsqueeze(-1) * B.unsqueeze(-2)).flatten(0, 1)
    h, states = torch.zeros_like(a[:, 0]), []
    for a_t, x_t in zip(steps(a), steps(x), strict=True):
        h = a_t * h + x_t
        states.append(h)
    y = (torch.stack(states, 1) @ C.flatten(0, 1).unsqueeze(-1)).view_as(u) + D[:, None, None] * u
    return torch.stack([y[0], y[1].flip(1)])


def make_inputs(batch: int, length: int, width: int, states: int) -> list[torch.Tensor]:
    """As in a fresh model: A = −1 … −N, step sizes around 0.01."""
    torch.manual_seed(0)
    u, delta = torch.randn(2, 2, batch, length, width)
    b, c = torch.randn(2, 2, batch, length, states)
    a = -torch.arange(1, states + 1.0).expand(2, width, states)
    inputs = [u, delta, a.clone(), b, c, torch.ones(2, width), torch.full((2, width), -4.6)]
    return [x.requires_grad_() for x in inputs]


def seconds(scan: Scan, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(scan(inputs), inputs, weight)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict:
    inputs = make_inputs(options.batch, options.length, options.width, options.states)
    weight = torch.randn_like(inputs[0])
    sides = {"cpu": cpu, "unbound": unbound, "stepwise": stepwise, "indexed": indexed}
    expected = cpu(inputs)
    for name in ("unbound", "stepwise"):  # warms up, too; `indexed` shares its arithmetic with `unbound`
        torch.testing.assert_close(sides[name](inputs), expected, rtol=1e-4, atol=1e-4)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(options.rounds, options.slow_rounds)):
        for name, scan in sides.items():
            if turn < (options.slow_rounds if name == "indexed" else options.rounds):
                taken[name].append(seconds(scan, inputs, weight))
    middle = {name: statistics.median(t) for name, t in taken.items() if t}
    return {
        name: {"median": m, "least": min(taken[name]), "most": max(taken[name]), "times_cpu": m / middle["cpu"]}
        for name, m in middle.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 8, "length": 197, "width": 384, "states": 16, "rounds": 5, "slow-rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="all cores unless told otherwise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # before torch starts its threads, which inherit it
    torch.set_num_threads(options.threads)
    result = {**vars(options), "torch": torch.__version__, "seconds": measure(options)}
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'backend':10}{'median s':>10}{'least':>10}{'most':>10}{'× cpu':>8}  sought")
    for name, t in result["seconds"].items():
        sought = f"≥ {SOUGHT[name]}" if name in SOUGHT else ""
        print(f"{name:10}{t['median']:10.3f}{t['least']:10.3f}{t['most']:10.3f}{t['times_cpu']:8.1f}  {sought}")


if __name__ == "__main__":
    main()
