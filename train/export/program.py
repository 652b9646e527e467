"""A network as a graph of plain operators with any batch size, and its file for torch itself.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import TrainError

Runner = Callable[[torch.Tensor], torch.Tensor]  # images [B, 3, S, S] -> logits [B, C]


@contextmanager
def silence() -> Iterator[None]:
    """Keep the warnings of exporters, which are about their own insides, from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def trace(net: nn.Module, size: tuple[int, int], any_batch: bool = True) -> torch.export.ExportedProgram:
    """Trace a network; its scans become a few doubling steps of plain operators.

    Args:
        net: the network, in evaluation mode, on the CPU.
        size: height and width of its images.
        any_batch: for batches of any size; otherwise for one image.

    Returns:
        The graph, for images [B, 3, height, width].

    Raises:
        TrainError: torch cannot trace it.
    """
    for module in net.modules():
        if isinstance(getattr(module, "backend", None), str):
            module.backend = "auto"  # type: ignore[assignment]  # another would stay in the graph as an operator of ours
    images, shapes = torch.zeros(2 if any_batch else 1, 3, *size), None
    if any_batch:
        shapes = ({0: torch.export.Dim("batch")},)
    try:
        with silence(), torch.no_grad():
            return torch.export.export(net, (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many types
        got = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TrainError("torch.export cannot trace this network", got=got) from None


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write the graph for `torch.export.load`."""
    with silence():
        torch.export.save(program, path)


def load_program(path: Path) -> Runner:
    """Load such a file."""
    net: Any = torch.export.load(path).module()
    return net
