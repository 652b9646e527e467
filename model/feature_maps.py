"""The layout and the grid of any timm backbone's features, and one common layout for all of them.

Legend: B images; D width of the features; h×w token grid, T = h·w tokens. `size` is the height and width of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

Size = tuple[int, int]
Change = Callable[[torch.Tensor], torch.Tensor]


def token_grid(count: int, size: Size) -> Size | None:
    """The grid of `count` tokens whose aspect ratio is nearest to the image's.

    Args:
        count: number of tokens.
        size: height, width of the image.

    Returns:
        h, w with h·w = count; None: no such grid resembles the image's shape.
    """
    height, width = size
    best, least = None, max(height, width)
    for side in range(1, math.isqrt(max(count, 0)) + 1):
        for h, w in ((side, count // side), (count // side, side)):
            # A plain comparison: compilers cannot trace min(key=) with dynamic sizes.
            if count % side == 0 and abs(h * width - w * height) < least:
                best, least = (h, w), abs(h * width - w * height)
    return best


def layout(x: Any, owner: Any, size: Size) -> str | None:
    """Find the layout of a module's output.

    Args:
        x: the output.
        owner: the module; its `output_fmt` or `num_features` decide if they can.
        size: height, width of the image; otherwise its aspect ratio decides.

    Returns:
        "tokens", "NCHW" or "NHWC"; None: none of these.
    """
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4):
        return None
    if x.ndim == 3:
        return "tokens"
    for kind in ("NCHW", "NHWC"):
        if getattr(owner, "output_fmt", None) == kind:
            return kind

    width = getattr(owner, "num_features", None)
    if (x.shape[1] == width) != (x.shape[3] == width):
        return "NCHW" if x.shape[1] == width else "NHWC"

    def misfit(h: int, w: int) -> float:
        return abs(math.log(h * size[1] / (w * size[0])))

    return "NHWC" if misfit(x.shape[1], x.shape[2]) < misfit(x.shape[2], x.shape[3]) else "NCHW"


def grid_in(x: torch.Tensor, kind: str | None, size: Size) -> Size | None:
    """h, w of features of layout `kind`; None for tokens that make no grid of the image's shape."""
    if kind == "tokens":
        return token_grid(x.shape[1], size)
    return (x.shape[2], x.shape[3]) if kind == "NCHW" else (x.shape[1], x.shape[2])


def to_map(x: torch.Tensor, kind: str | None, size: Size) -> torch.Tensor:
    """Features of layout `kind` as [B, D, h, w]."""
    if kind == "tokens":
        return x.mT.unflatten(2, token_grid(x.shape[1], size) or (1, x.shape[1]))
    return x.permute(0, 3, 1, 2) if kind == "NHWC" else x


def resample(maps: torch.Tensor, grid: Size | None) -> torch.Tensor:
    """Resample maps to another grid: area means for a coarser grid, bilinear for a finer one.

    Args:
        maps: [B, D, height, width].
        grid: h, w; None: unchanged.

    Returns:
        [B, D, h, w].
    """
    if grid is None or maps.shape[2:] == grid:
        return maps
    if maps.shape[2] >= grid[0] and maps.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", antialias=True, align_corners=False)


class ChangedOutput:
    """Changes a module's output tensor, or the first of several, inside `with changed.by(module, change)`.

    The hook stays on the module: adding and removing it would make torch.compile recompile at every call.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.handle: RemovableHandle | None = None
        self.change: Change | None = None

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self.change is None:
            return output
        return (self.change(output[0]), *output[1:]) if isinstance(output, tuple) else self.change(output)

    @contextmanager
    def by(self, module: nn.Module | None, change: Change) -> Iterator[None]:
        """Apply `change` to the output of `module` until the context ends."""
        if module is not self.module:
            self._move(module)
        self.change = change
        try:
            yield
        finally:
            self.change = None

    def _move(self, module: nn.Module | None) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.module, self.handle = module, None if module is None else module.register_forward_hook(self)


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Put the module in evaluation mode; on exit each submodule returns to the mode it had."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        net.train(modes[0][1])  # some modules drop their caches here
        for part, mode in modes:
            part.training = mode
