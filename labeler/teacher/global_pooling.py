"""Finds the global poolings of a forward pass and replaces them with "every location is a batch item".

A `TorchFunctionMode` sees every torch function that a module calls, whatever the module is made of. `PoolWatcher` lists
the calls and the global poolings among them; `PoolingReplaced` makes a pooling return all that it would have pooled, so
that the rest of the forward pass is a head on single locations; `why_no_mean` finds out from the calls whether the mean
of the locations' logits must equal the classifier's output.

Legend: B batch, C classes, H×W map grid, T = H·W tokens, D feature width, S side of the square input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POOLS = {"adaptive_avg_pool2d", "avg_pool2d", "adaptive_max_pool2d"}
REDUCTIONS = {"mean", "amax"}
AVERAGES = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}
SPATIAL_CONV, PRODUCT = "a convolution wider than 1×1", "a product of activations"
SCALINGS = {"mul", "__mul__", "__rmul__", "div", "__truediv__"}
# Calls through which the mean of the locations stays the mean; LOCAL_CALLS may come before the pooling only.
AFFINE_CALLS = SCALINGS | {
    "linear", "conv2d", "batch_norm", "dropout", "add", "__add__", "__radd__", "sub", "__sub__", "stack", "cat", "view",
    "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "is_contiguous",
    "to", "float", "type_as", "dim", "size", "__get__", "__getitem__", "__len__", "_assert",
}  # fmt: skip
LOCAL_CALLS = {
    "relu", "relu_", "relu6", "gelu", "silu", "hardswish", "hardtanh", "sigmoid", "tanh", "layer_norm", "rms_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """One global pooling of a pass.

    Attributes:
        at: Its index among all calls.
        name: Its name.
        source: Its input.
    """

    at: int
    name: str
    source: Tensor


class PoolWatcher(TorchFunctionMode):
    """Lists the calls and the global poolings of a pass.

    Attributes:
        calls: Names of all calls.
        pools: The global poolings among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.pools: list[Pool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "?")
        if _pooled_cells(name, args, kwargs or {}, out) is not None:
            self.pools.append(Pool(len(self.calls), name, args[0]))
        self.calls.append(_kind(name, args))
        return out


class _PoolReplacer(TorchFunctionMode):
    """Reindices the global poolings of a pass whose indices are in `indices`; `grid` is H, W of the last."""

    def __init__(self, indices: frozenset[int]) -> None:
        super().__init__()
        self.indices = indices
        self.seen = 0
        self.grid = (0, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cells = _pooled_cells(getattr(func, "__name__", "?"), args, kwargs or {}, out)
        if cells is None:
            return out
        self.seen += 1
        if self.seen - 1 not in self.indices:
            return out
        self.grid = (cells.shape[1], cells.shape[2])
        return cells.reshape(-1, *out.shape[1:])


class PoolingReplaced:
    """Computes logits [B, C, H, W] of images [B, 3, S, S] with any module, by replacing its last global pooling.

    Args:
        model: The module.
        indices: Which global poolings of a forward pass to replace, counted from 0.
        pooling: Name of the pooling.
    """

    def __init__(self, model: nn.Module, indices: frozenset[int], pooling: str) -> None:
        self.model, self.indices = model, indices
        self.method = f"the module after its last {pooling}, on every location"

    def __call__(self, images: Tensor) -> Tensor:
        """Computes logits [B, C, H, W] of images [B, 3, S, S]."""
        with _PoolReplacer(self.indices) as replacer:
            logits = self.model(images)
        return logits.unflatten(0, (len(images), *replacer.grid)).permute(0, 3, 1, 2)


def why_no_mean(watcher: PoolWatcher, pools: list[Pool], before_counts: bool) -> str | None:
    """Explains why the mean of the map may differ from the output.

    Args:
        watcher: The watched pass.
        pools: The poolings that feed the head.
        before_counts: Whether calls before the pooling belong to the head too.

    Returns:
        None for average pooling before a linear head, where they must be equal; otherwise the reason.
    """
    if len(pools) != 1 or pools[0].name not in AVERAGES:
        return "the head pools by " + (" and ".join(pool.name for pool in pools) or "other means than an average")
    before, after = watcher.calls[: pools[0].at], watcher.calls[pools[0].at + 1 :]
    if between := next((call for call in after if call not in AFFINE_CALLS), None):
        return f"{between} comes between the pooling and the logits"
    mixing = next((call for call in before if call not in AFFINE_CALLS | LOCAL_CALLS), None)
    return f"{mixing} comes before the pooling" if before_counts and mixing else None


def _pooled_cells(name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Tensor | None:
    """Returns the locations [B, H, W, D] that a call pooled into one; None if it is not a global pooling."""
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not isinstance(out, Tensor):
        return None
    if name in POOLS and source.dim() == 4 and out.shape[2:] == (1, 1):
        kernel = kwargs.get("kernel_size", args[1] if len(args) > 1 else None)
        whole = name != "avg_pool2d" or kernel in (source.shape[2], tuple(source.shape[2:]), list(source.shape[2:]))
        return source.permute(0, 2, 3, 1) if whole else None
    if name not in REDUCTIONS or source.dim() not in (3, 4):
        return None
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axes = [given] if isinstance(given, int) else given or ()
    return _reduced_cells(source, sorted(axis % source.dim() for axis in axes))


def _reduced_cells(source: Tensor, axes: list[int]) -> Tensor | None:
    """Returns [B, H, W, D] of [B, H, W, D], [B, D, H, W], [B, T, D] or [B, D, T] if `axes` are the whole map."""
    if source.dim() == 4:
        if axes == [1, 2]:
            return source
        return source.permute(0, 2, 3, 1) if axes == [2, 3] else None
    if axes not in ([1], [2]):
        return None
    tokens = source if axes == [1] else source.transpose(1, 2)
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side)) if side * side == tokens.shape[1] else None


def _kind(name: str, args: Any) -> str:
    """Returns the name of a call; products of two activations and wide convolutions have their own names."""
    if name == "conv2d" and tuple(args[1].shape[-2:]) != (1, 1):
        return SPATIAL_CONV
    if name in SCALINGS and all(isinstance(arg, Tensor) and not isinstance(arg, nn.Parameter) for arg in args[:2]):
        return PRODUCT
    return name
