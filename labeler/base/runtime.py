"""Where a process computes: device, precision and CPU threads, decided here for labeler, loader and training."""

from __future__ import annotations

import os

import torch

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)  # before it (V100, T4) a GPU only emulates bfloat16, at less than float32's speed


def pick_device(name: str, index: int | None = None) -> torch.device:
    """The device to compute on.

    Args:
        name: "cpu", "cuda", "cuda:1", or "auto": a GPU where torch can use one.
        index: The GPU of a name without a number; None: torch's current one.

    Raises:
        InputError: There is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError("the device is not known", got=repr(name), expected="auto, cpu, cuda or cuda:1")
    if device.type == "cpu":
        return device
    if device.index is not None:
        index = device.index
    elif index is None:
        index = torch.cuda.current_device() if count else 0
    if index >= count:
        raise InputError(
            f"there is no GPU {index} for torch here", got=f"device {name}, {count} GPUs",
            remedy="Use the device cpu, or see what `token-labeling doctor` and nvidia-smi say.",
        )  # fmt: skip
    return torch.device("cuda", index)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of forward passes: "float32", "bfloat16" or "float16".

    Args:
        name: One of these, or "auto": float32 on a CPU; bfloat16 on a GPU that computes in it, float16 on older ones.
        device: Where the passes are computed.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    own = bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return "bfloat16" if own else "float16"


def rank_threads(ranks: int = 1) -> int:
    """This process's share of the cores. Launchers say how many ranks a machine has; `ranks`: where none does."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", ranks))))


def set_threads(threads: int | None) -> int:
    """Set torch's CPU thread count; None: this rank's share of the cores. Results depend on it in their last bits."""
    threads = threads or rank_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the scan's states decay to numbers that CPUs are slow with
    return threads
