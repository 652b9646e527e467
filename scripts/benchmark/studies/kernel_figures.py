"""Compiles every Triton kernel for GPUs that are not there, and prints what can be told without one.

    python -m scripts.benchmark.studies.kernel_figures [--all] [--json]

The project's own functions launch the kernels, on tensors of the CPU, and Triton specialises them as it would for a
launch: an argument that is None or 1 is a constant, a divisible one is known to be. Only the launch itself is left out.
Registers, spills and shared memory are ptxas's; instructions are counted in the machine code, for a scan as often as
its loops run. `--all`: each optional pointer absent and present, float32 and bfloat16, and no figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = {80: "A100", 90: "H100, H200", 100: "B200"}
BATCH, LENGTH, WIDTH, STATES, TAPS, CLASSES = 2, 197, 384, 16, 4, 1000  # DeMansia Tiny
BINARIES = Path("backends/nvidia/bin")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)")


def compiled(launches: Callable[[], None], architecture: int) -> dict[str, Any]:
    """Kernel's name -> what Triton compiled for `launches`, for GPUs of compute capability `architecture` / 10."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    absent = mock.Mock()
    absent.get_current_target.return_value = GPUTarget("cuda", architecture, 32)
    absent.get_current_device.return_value = architecture  # kernels are cached per device
    found, run = {}, jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    before = driver._active
    driver.set_active(absent)
    try:
        with mock.patch.object(jit.JITFunction, "run", compile_only):
            launches()
    finally:
        driver._active = before
    return found


def scans(dtype: torch.dtype, skip: bool, bias: bool, softplus: bool = True) -> None:
    """Launches the scan forward and backward, with D and with the bias of the step size or without."""
    from model.ops import scan_triton

    u = torch.zeros(2, BATCH, LENGTH, WIDTH, dtype=dtype)
    b, a, row = u[..., :STATES].contiguous(), torch.zeros(2, WIDTH, STATES), torch.zeros(2, WIDTH)
    given = (u, u, a, b, b, row if skip else None, row if bias else None)
    _, saved = scan_triton.forward(*given, softplus, (False, True))
    scan_triton.backward(u, *given, saved, softplus, (False, True))


def mixers(dtype: torch.dtype) -> None:
    """Launches the convolution and the gate, forward and backward."""
    from model.ops import mixer_triton

    x, z = torch.zeros(BATCH, LENGTH, 2 * WIDTH, dtype=dtype).chunk(2, -1)
    taps = torch.zeros(2, TAPS + 1, WIDTH)
    u = mixer_triton.conv_silu_op(x, taps, [0, 1])
    mixer_triton.conv_silu_backward_op(u, x, taps, [0, 1], torch.empty_like(x))
    out = mixer_triton.gate_op(u, z, 0.5)
    mixer_triton.gate_backward_op(out, u, z, 0.5, torch.empty_like(z))


def losses(dtype: torch.dtype, mixed: bool, tail: bool) -> None:
    """Launches the loss and its gradient, with another image's tokens and with a palette's tail or without."""
    from train.loss import loss_triton

    logits = torch.zeros(BATCH, LENGTH - 1, CLASSES, dtype=dtype)
    ids, scores = torch.zeros(BATCH, 32, dtype=torch.int64), torch.zeros(BATCH, 32, LENGTH - 1)
    partner = torch.zeros(LENGTH - 1, dtype=torch.bool) if mixed else None
    others = (ids + 40, torch.zeros(BATCH, 32)) if tail else (None, None)
    target = (ids, scores, scores[:, 0], 0.1, partner, *others)
    loss, lse = loss_triton.token_loss(logits, *target)
    loss_triton.token_gradient(loss, logits, *target, lse, logits)


def compile_all(dtype: torch.dtype, architecture: int, flags: tuple[bool, ...] = (False, True)) -> int:
    """Compiles each kernel, in small tiles, with each optional pointer absent and present; returns how many.

    Args:
        dtype: of the tensors.
        architecture: compute capability times 10.
        flags: whether a pointer is there; all pairs are tried.
    """
    from model.ops import scan_triton

    count = len(compiled(lambda: mixers(dtype), architecture))
    with mock.patch.multiple(scan_triton, BACKWARD_STATES=128, FORWARD_STATES=128, STEPS=2):
        for one, other in itertools.product(flags, flags):
            count += len(compiled(lambda one=one, other=other: scans(dtype, one, other, one or other), architecture))
            count += len(compiled(lambda one=one, other=other: losses(dtype, one, other), architecture))
    return count


def figures(kernel: Any) -> dict[str, int]:
    """Registers and bytes of spills of a thread, shared memory of a program, and instructions as they stand."""
    import triton

    folder = Path(triton.__file__).parent / BINARIES
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([folder / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"], "spills": used["STACK"] + used["LOCAL"], "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps, **_counted(kernel, code),
    }  # fmt: skip


def _counted(kernel: Any, code: str) -> dict[str, int]:
    """Instructions that stand in the code, and of a scan's warp those that run per 10 · 32 updates of a state."""
    labels, operations = {}, []
    for line in code.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := INSTRUCTION.match(line):
            operations.append((found[1], found[2]))
    loops = []
    for i, (name, rest) in enumerate(operations):
        target = re.search(r"L_x_\d+", rest)
        if name == "BRA" and target and labels.get(target[0], i) < i:
            loops.append((labels[target[0]], i + 1))
    counts: dict[str, int] = {"instructions": sum(name not in ("NOP", "BRA") for name, _ in operations)}
    if kernel.metadata.name.startswith("scan") and loops:
        counts |= _per_update(kernel.metadata.name, operations, loops)
    return counts


def _per_update(name: str, operations: list[tuple[str, str]], loops: list[tuple[int, int]]) -> dict[str, int]:
    """Of the largest loop, which takes STEPS steps; the backward kernel's repeats a few in a loop inside."""
    from model.ops import scan_triton

    forward = name == "scan_forward"
    states = scan_triton.FORWARD_STATES if forward else scan_triton.BACKWARD_STATES
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    whole = Counter(name for name, _ in operations[start:end])
    inner = [loop for loop in loops if start <= loop[0] and loop[1] < end]
    if inner and not forward:
        again = Counter(name for name, _ in operations[slice(*inner[-1])])
        repeats = (scan_triton.CHUNK / scan_triton.STEPS - 1) / 2 - 1  # it stands there once
        whole = Counter({op: round(count + repeats * again[op]) for op, count in whole.items()})
    updates = scan_triton.STEPS * states / 32
    return {
        "tenths per update": round(10 * whole.total() / updates),
        "tenths of exponentials": round(10 * whole["MUFU"] / updates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.benchmark.studies.kernel_figures", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--all", action="store_true", help="compile every variant instead of telling figures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.all:
        for architecture, dtype in itertools.product(ARCHITECTURES, (torch.float32, torch.bfloat16)):
            print(f"sm_{architecture}, {dtype}: {compile_all(dtype, architecture)} kernels compiled", flush=True)
        return
    found: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in ARCHITECTURES:
        launches = (
            lambda: scans(torch.bfloat16, True, True),
            lambda: mixers(torch.bfloat16),
            lambda: losses(torch.bfloat16, True, True),
        )
        for launch in launches:
            for name, kernel in compiled(launch, architecture).items():
                found.setdefault(f"sm_{architecture}", {})[name.strip("_")] = figures(kernel)
    if options.json:
        print(json.dumps(found))
        return
    for architecture, kernels in found.items():
        for name, one in kernels.items():
            print(f"{architecture:7}{name:16}", ", ".join(f"{key} {value}" for key, value in one.items()))


if __name__ == "__main__":
    main()
