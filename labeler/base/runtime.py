"""Device, compute precision and CPU threads, chosen here for labeler, loader and training."""

from __future__ import annotations

import os

import numpy as np
import torch

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)  # before it (V100, T4) a GPU only emulates bfloat16, at less than float32's speed


def pick_device(name: str, index: int | None = None) -> torch.device:
    """Returns the device to compute on.

    Args:
        name: "cpu", "cuda", "cuda:1", or "auto", which is a GPU if torch can use one.
        index: The GPU to use if the name has no number; None: torch's current one.

    Raises:
        InputError: This machine has no such device.
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
    """Returns the compute precision of forward passes: "float32", "bfloat16" or "float16".

    Args:
        name: One of these, or "auto": float32 on a CPU, bfloat16 on a GPU that supports it, float16 on older GPUs.
        device: The device of the forward passes.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    own = bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return "bfloat16" if own else "float16"


def set_gpu_products(precision: torch.dtype) -> None:
    """Chooses how a GPU computes in training: TF32 for what a half-precision run leaves in float32, cuDNN's fastest.

    Where float32 is asked for, products of matrices and convolutions are float32: torch would take TF32 for the latter.

    Args:
        precision: Compute precision of the forward pass.
    """
    half = precision != torch.float32
    torch.set_float32_matmul_precision("high" if half else "highest")
    torch.backends.cudnn.allow_tf32 = half
    torch.backends.cudnn.benchmark = True  # tries all algorithms; shapes are the same in every step


def on_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns values of the host as a tensor on a device, without waiting for the copy or for the device's other work.

    Args:
        values: An array, or a tensor on the CPU; on a CPU it is not copied.
        device: The device.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda":  # a copy from memory that is not pinned would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def rank_threads(ranks: int = 1) -> int:
    """Returns this process's share of the cores; `ranks`: processes on this machine, if no launcher says so."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", ranks))))


def set_threads(threads: int | None) -> int:
    """Sets torch's CPU thread count.

    Args:
        threads: The count; None: this rank's share of the cores. It affects the last bits of results.

    Returns:
        The count that was set.
    """
    threads = threads or rank_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the states of the scan decay to denormal numbers, which are slow on CPUs
    return threads
