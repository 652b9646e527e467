"""The ranks that train together, as `torchrun` starts them; alone without it."""

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

# A rank that waits longer than this for the others gives up: one of them hangs.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together, and the device that it works on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks to people."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on each of them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks, on each of them."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Statistics of the first rank for all: each rank's own saw its own images."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def world_size() -> int:
    """Ranks that train together, as the launcher says before they have met."""
    return _number("WORLD_SIZE", 1)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other ranks, and leave them at the end. Raises InputError where that cannot be."""
    rank, world = _number("RANK", 0), world_size()
    if not 0 <= rank < world:
        raise InputError("RANK does not fit WORLD_SIZE", got=f"{rank} of {world}", remedy="Start ranks with torchrun.")
    if device not in ("auto", "cpu", "cuda"):  # each rank has a GPU of its own
        raise InputError("run.device is not known", got=repr(device), expected="auto, cpu or cuda")
    place = pick_device(device, _number("LOCAL_RANK", 0))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        _join(rank, world, place)
    try:
        yield Ranks(rank, world, place)
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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, timeout=TIMEOUT
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise InputError(
                f"port {port} of {address} is in use", got=_first_line(error),
                remedy="Choose another with torchrun --master-port (or MASTER_PORT); `--standalone` finds a free one.",
            ) from None  # fmt: skip
        raise InputError(f"the first rank cannot be reached at {address}:{port}", got=_first_line(error)) from None


def _lost(error: Exception) -> TrainError:
    return TrainError(
        "another rank is gone", got=_first_line(error),
        remedy="Its own output says why; start all of them again with --resume auto.",
    )  # fmt: skip


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise InputError(f"{name} is not a number", got=repr(os.environ[name])) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
