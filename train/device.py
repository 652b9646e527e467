"""The device that a rank works on, its numbers' precision, and its CPU threads."""

from __future__ import annotations

import os

import torch

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Of forward passes; "auto": bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        raise InputError("run.precision=float16 needs a GPU", expected="float32 or bfloat16 on a CPU")
    return PRECISIONS[name]


def set_threads(threads: int | None) -> int:
    """Of torch on a CPU; None: this machine's cores shared among its ranks. Results depend on their number."""
    if threads is None:
        threads = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the scan's states decay to numbers that CPUs are slow with
    return threads
