"""The ranks that train together, as started by `torchrun`; without it a single rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from labeler.base.errors import InputError
from labeler.base.runtime import pick_device
from train.errors import TrainError

# A rank that waits longer than this for the others gives up, as one of them must hang.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        device: the device that it works on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints messages."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place. Returns it, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Collect a value from each rank. Returns them in the order of the ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Copy the first rank's buffers (BatchNorm statistics) to all, as each rank saw other images."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def world_size() -> int:
    """The number of ranks according to the launcher, known before they have joined."""
    return _number("WORLD_SIZE", 1)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other ranks, and leave them at the end.

    Args:
        device: "auto", "cpu" or "cuda".

    Yields:
        This rank.

    Raises:
        InputError: the device or the launcher's environment variables are wrong, or the first rank cannot be reached.
        TrainError: another rank is gone.
    """
    rank, world = _number("RANK", 0), world_size()
    if not 0 <= rank < world:
        raise InputError("RANK does not fit WORLD_SIZE", got=f"{rank} of {world}", remedy="Start ranks with torchrun.")
    if device not in ("auto", "cpu", "cuda"):  # no index: each rank has its own GPU
        raise InputError("unknown run.device", got=repr(device), expected="auto, cpu or cuda")
    chosen = pick_device(device, _number("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        _join(rank, world, chosen)
    try:
        yield Ranks(rank, world, chosen)
    except (dist.DistBackendError, dist.DistNetworkError) as error:
        raise _lost(error) from None
    except RuntimeError as error:
        if world > 1 and any(word in str(error) for word in ("gloo", "Gloo", "Connection", "NCCL", "Socket")):
            raise _lost(error) from None
        raise
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _join(rank: int, world: int, device: torch.device) -> None:
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT")
    if port is None:
        raise InputError("MASTER_PORT is not set", got=f"WORLD_SIZE={world}", remedy="Start ranks with torchrun.")
    os.environ.setdefault("MASTER_ADDR", address)
    try:
        gpu = device.type == "cuda"  # with its number NCCL connects at once, and not within the first step
        dist.init_process_group(
            "nccl" if gpu else "gloo", rank=rank, world_size=world, timeout=TIMEOUT, device_id=device if gpu else None
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise InputError(
                f"port {port} of {address} is in use", got=_first_line(error),
                remedy="Choose another: `torchrun --master-port` or MASTER_PORT; `--standalone` finds a free one.",
            ) from None  # fmt: skip
        raise InputError(f"the first rank cannot be reached at {address}:{port}", got=_first_line(error)) from None


def _lost(error: Exception) -> TrainError:
    return TrainError(
        "another rank is gone", got=_first_line(error),
        remedy="See its output for the reason; start all of them again with `resume=auto`.",
    )  # fmt: skip


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise InputError(f"{name} is not a number", got=repr(os.environ[name])) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
