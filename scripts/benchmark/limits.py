"""The speed limits of a machine: measured rates of its parts, and what a scan or a training step needs of each.

The limit of a phase is the time that its bottleneck takes. The limits of all phases are added, as if no phase
overlapped another and nothing else took time; no program reaches that.

Legend: B images; L sequence length; E inner width; N state size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.summary import Cost, summarize
from scripts.benchmark.measure import synchronize

# Multiply-adds per state update of the scan: two for the state and one for the output; twice as many for the gradients.
SCAN_FORWARD, SCAN_BACKWARD = 3, 6
BYTES_PER_PARAMETER = 4 * 11  # weight, gradient, two moments and moving average: read, and all but one written; cleared


@dataclass(frozen=True)
class Limits:
    """Rates of a machine: in float32 on a CPU; on a GPU products are in bfloat16, the rest in float32.

    Attributes:
        multiply: Multiply-adds per second of a large matrix product, measured.
        vector: Multiply-adds per second outside of products: on a CPU the same, on a GPU from its data sheet.
        exponentials: Exponentials per second: on a CPU of values in cache, measured; on a GPU from its data sheet.
        traffic: Bytes read or written per second, of tensors too large for the cache, measured.
    """

    multiply: float
    vector: float
    exponentials: float
    traffic: float

    @classmethod
    def measured(cls, device: str) -> Limits:
        side, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        here, there = torch.ones(2, (128 << 20) if device == "cpu" else (1 << 30), dtype=torch.uint8, device=device)
        multiply = side**3 / _seconds(lambda: a @ b, device)
        return cls(
            multiply,
            multiply if device == "cpu" else _per_second_on_gpu(128),
            _exponentials(device),
            2 * here.nbytes / _seconds(lambda: here.copy_(there), device),
        )

    @property
    def update(self) -> float:
        """Returns the seconds of one update of a scan's state, forward and backward."""
        return 2 / self.exponentials + (SCAN_FORWARD + SCAN_BACKWARD) / self.vector

    def text(self) -> str:
        return (
            f"{2 * self.multiply / 1e9:,.0f} GFLOP/s, {self.exponentials / 1e9:.1f} G exponentials/s, "
            f"{self.traffic / 1e9:,.0f} GB/s"
        )


def _exponentials(device: str) -> float:
    if device == "cpu":
        cached = torch.randn(1 << 18)
        out = torch.empty_like(cached)
        return cached.numel() / _seconds(lambda: torch.exp(cached, out=out), device)
    return _per_second_on_gpu(16)


def _per_second_on_gpu(each_cycle: int) -> float:
    """Returns a GPU's rate of an operation, `each_cycle` times per cycle and multiprocessor.

    A measured elementwise kernel would show the memory's speed instead.
    """
    found = torch.cuda.get_device_properties(0)
    return found.multi_processor_count * each_cycle * found.clock_rate * 1e3


def _seconds(call: Callable[[], object], device: str) -> float:
    """Returns the first decile of the times of many calls: the best that the machine can do."""
    call()
    times = []
    until = time.perf_counter() + 1.5
    while time.perf_counter() < until:
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.quantiles(times, n=10)[0] if len(times) > 1 else times[0]


def scan_limit(limits: Limits, updates: int, inputs: int) -> float:
    """Returns the least seconds of a scan, forward and backward, with `updates` state updates and `inputs` bytes.

    Inputs are read twice; the result, its gradient and the gradients of the inputs are read or written once.
    """
    compute = updates * limits.update
    return compute + 4 * inputs / limits.traffic


def model_cost(name: str, side: int) -> tuple[Cost, int]:
    """Returns the cost of one image and the number of parameters."""
    found = summarize(name, (side,))
    return found.costs[0], sum(found.parameters.values())


def inference_limit(limits: Limits, cost: Cost) -> float:
    """Returns the least seconds per image: matrix products and scan, without memory traffic."""
    products, scan = _parts(cost)
    return products / limits.multiply + scan / SCAN_FORWARD / limits.exponentials + scan / limits.vector


def step_limit(limits: Limits, cost: Cost, parameters: int, batch: int, activation_bytes: int) -> float:
    """Returns the least seconds of a training step.

    It is the sum of three times the forward products, the scan, writing and reading activations, and the update.
    `activation_bytes`: bytes of a number, 4 in float32, 2 in bfloat16.
    """
    products, scan = _parts(cost)
    image = 3 * products / limits.multiply
    image += scan / SCAN_FORWARD * limits.update
    image += 2 * cost.activations * activation_bytes / 4 / limits.traffic
    return batch * image + parameters * BYTES_PER_PARAMETER / limits.traffic


def _parts(cost: Cost) -> tuple[int, int]:
    scan = cost.macs.get("scan", 0)
    return sum(cost.macs.values()) - scan, scan
