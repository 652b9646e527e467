"""Dense class-logit maps [B, C, H, W] from image classifiers that were built to return [B, C].

A classifier pools its last feature map and sends the result through its head. Here the head sees every location by
itself, as if that location were the whole map. Three ways, the first that fits is taken:

1. a module with its own `score_maps(images)` is used as it is;
2. timm's protocol: `forward_features`, then every location through the module's own `forward_head`;
3. any other module: the last global pooling of its forward pass is found by watching one pass, and is then replaced by
   "every location is a batch item", so that the rest of the forward pass is the head.

Legend: B batch, C classes, H×W map grid, T = H·W tokens, D feature width, S side of the input, P prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labeler.errors import TeacherError

CHUNK_VALUES = 1 << 25
GIVE_SCORE_MAPS = "Give the module a score_maps(images) method that returns logits [B, C, H, W]."
CLASS_TOKEN = "the head reads the class token"
CLASS_TOKEN_NOTE = "the head was trained on the class token only: its scores of patch tokens are a guess"

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


class DenseMap(Protocol):
    """Images [B, 3, S, S] to logits [B, C, H, W]; `method` says in a few words how."""

    method: str

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenseReport:
    """What one pass over random images showed about a dense map; `notes` are for the user."""

    method: str
    num_classes: int
    grid: tuple[int, int]
    self_test: str
    notes: tuple[str, ...]


def dense_map(model: nn.Module, images: Tensor, name: str) -> tuple[DenseMap, DenseReport]:
    """The way to a dense map that fits `model`, tried on `images` [B, 3, S, S], or a `TeacherError`.

    The module must be in evaluation mode. B must be 2 or more: a wrongly replaced pooling could broadcast over B = 1.
    """
    notes: list[str] = []
    if hasattr(model, "score_maps"):
        dense: DenseMap = OwnScoreMaps(model)
        maps = _tried(dense, images, name)
        self_test = "not applicable: the module makes its own maps"
    else:
        _refuse_missing_head(model, name)
        with _PoolWatcher() as watcher:
            logits = _classifier_logits(model, images, name)
        if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            dense, why_not = _from_head(model, images, name)
        elif all(hasattr(model, part) for part in ("_process_input", "class_token", "encoder", "heads")):
            dense, why_not = _from_torchvision_tokens(model), CLASS_TOKEN
        else:
            dense, why_not = _from_pooling(model, watcher, name)
        maps = _tried(dense, images, name)
        self_test = _self_test(maps, logits, why_not, name)
        if why_not == CLASS_TOKEN and not isinstance(dense, TrainedTokenHead):
            notes.append(CLASS_TOKEN_NOTE)
        elif why_not:
            notes.append(f"the mean of a map need not be the model's output: {why_not}")
    grid = (maps.shape[2], maps.shape[3])
    if grid == (1, 1):
        notes.append("the map has a single cell at this input size")
    return dense, DenseReport(dense.method, maps.shape[1], grid, self_test, tuple(notes))


class OwnScoreMaps:
    """A module's own `score_maps`."""

    method = "the module's own score_maps"

    def __init__(self, model: Any) -> None:
        self.features: Callable[[Tensor], Tensor] = model.score_maps

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images)


class HeadPerLocation:
    """timm: features of every kind, each location alone through `forward_head`.

    layout  "NCHW" and "NHWC" features become 1×1 maps. Of "tokens" [B, P + T, D] the prefix is dropped, and each token
            is repeated, so that the class token, the mean, the maximum and attention over the tokens are that token.
    """

    def __init__(self, model: Any, layout: str) -> None:
        self.features: Callable[[Tensor], Tensor] = model.forward_features
        self.head: Callable[[Tensor], Tensor] = model.forward_head
        self.layout = layout
        self.prefix: int | None = getattr(model, "num_prefix_tokens", None)
        self.patch_grid: tuple[int, int] | None = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.method = f"forward_head on every location of the {layout} features"

    def __call__(self, images: Tensor) -> Tensor:
        return self.scores(self.features(images))

    def scores(self, features: Tensor) -> Tensor:
        """Logits [B, C, H, W] of features in this layout; `CHUNK_VALUES` of them go through the head at once."""
        cells, grid = self.cells(features)
        chunks = cells.split(max(1, CHUNK_VALUES // cells[0].numel()))
        logits = torch.cat([self.head(chunk) for chunk in chunks])
        return logits.unflatten(0, (len(features), *grid)).permute(0, 3, 1, 2)

    def cells(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Every location as a batch item for the head: [B·H·W, D, 1, 1], [B·H·W, 1, 1, D] or [B·T, P + 1, D]."""
        if self.layout == "tokens":
            prefix, grid = _token_grid(features.shape[1], self.prefix, self.patch_grid)
            tokens = features[:, prefix:].flatten(0, 1)
            # Never fewer than two: some heads skip a class token that they do not declare.
            return tokens[:, None].expand(-1, max(prefix, 1) + 1, -1), grid
        if self.layout == "NHWC":
            return features.flatten(0, 2)[:, None, None], (features.shape[1], features.shape[2])
        return features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None], (features.shape[2], features.shape[3])


class HeadPerToken:
    """A head that is a plain layer, on patch tokens [B, T, D]; `features` gives the tokens of images."""

    method = "the class head on every patch token"

    def __init__(self, features: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        self.features, self.head = features, head

    def __call__(self, images: Tensor) -> Tensor:
        tokens = self.features(images)
        _, grid = _token_grid(tokens.shape[1], 0, None)
        return self.head(tokens).unflatten(1, grid).permute(0, 3, 1, 2)


class TrainedTokenHead(HeadPerToken):
    """For networks that were themselves trained by token labeling: their auxiliary head knows patch tokens."""

    method = "the auxiliary head on every patch token"


class PoolingReplaced:
    """Any module: its last global pooling hands on every location as a batch item of its own.

    places  which of the global poolings of a forward pass to replace, counted from 0
    """

    def __init__(self, model: nn.Module, places: frozenset[int], pooling: str) -> None:
        self.model, self.places = model, places
        self.method = f"the module after its last {pooling}, on every location"

    def __call__(self, images: Tensor) -> Tensor:
        with _PoolWatcher(replace=self.places) as watcher:
            logits = self.model(images)
        return logits.unflatten(0, (len(images), *watcher.grid)).permute(0, 3, 1, 2)


def _from_head(model: Any, images: Tensor, name: str) -> tuple[DenseMap, str | None]:
    """The map of a timm model, and why its mean need not be the output (None: it must be)."""
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        expected = "forward_features to return [B, D, H, W], [B, H, W, D] or [B, T, D]"
        raise _refusal(name, "keeps no single map of features", _described(features), expected)
    with _PoolWatcher() as watcher:
        model.forward_head(features)
    first_pool = watcher.pools[0].at if watcher.pools else len(watcher.calls)
    if SPATIAL_CONV in watcher.calls[:first_pool]:
        raise _refusal(name, "has a head that mixes locations", SPATIAL_CONV, "a head that follows a global pooling")
    if features.dim() == 3 and _has_auxiliary_head(model, features):
        return TrainedTokenHead(lambda x: model.forward_features(x)[:, 1:], model.aux_head), CLASS_TOKEN
    dense = _readable_layout(model, features, name)
    if dense.layout == "tokens" and getattr(model, "global_pool", None) == "token":
        return dense, CLASS_TOKEN
    return dense, _why_no_mean(watcher, watcher.pools, before_counts=True)


def _readable_layout(model: Any, features: Tensor, name: str) -> HeadPerLocation:
    """The layout is the one that the head can read: the wrong one has W features where it wants D."""
    layouts = ["NCHW", "NHWC"] if str(getattr(model, "output_fmt", "NCHW")) == "NCHW" else ["NHWC", "NCHW"]
    failures: list[Exception] = []
    for layout in layouts if features.dim() == 4 else ["tokens"]:
        dense = HeadPerLocation(model, layout)
        try:
            dense.scores(features)
            return dense
        except TeacherError:
            raise
        except Exception as error:
            failures.append(error)
    raise _refusal(name, "has a head that does not take single locations", first_line(failures[0])) from failures[0]


def _has_auxiliary_head(model: Any, tokens: Tensor) -> bool:
    """Whether the output is the class head's plus half the largest token score, class token first."""
    if not all(isinstance(getattr(model, part, None), nn.Linear) for part in ("head", "aux_head")):
        return False
    output = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
    return torch.allclose(output, model.forward_head(tokens), rtol=1e-3, atol=1e-3)


def _from_torchvision_tokens(model: Any) -> HeadPerToken:
    """torchvision's VisionTransformer, whose forward pass keeps the class token only."""

    def tokens(images: Tensor) -> Tensor:
        patches = model._process_input(images)
        class_token = model.class_token.expand(len(images), -1, -1)
        return model.encoder(torch.cat([class_token, patches], dim=1))[:, 1:]

    return HeadPerToken(tokens, model.heads)


def _from_pooling(model: nn.Module, watcher: _PoolWatcher, name: str) -> tuple[DenseMap, str | None]:
    if not watcher.pools:
        problem = "has no global pooling to take apart (it reads a class token, or flattens a grid)"
        raise _refusal(name, problem, None, "an average or maximum over the whole map before the head")
    last = watcher.pools[-1]
    places = [place for place, pool in enumerate(watcher.pools) if pool.source is last.source]
    if mixing := {SPATIAL_CONV, *POOLS}.intersection(watcher.calls[last.at + 1 :]):
        got = f"{mixing.pop()} after it"
        raise _refusal(name, "pools the whole map before it comes to its head", got, "a head on single locations")
    dense = PoolingReplaced(model, frozenset(places), last.name)
    return dense, _why_no_mean(watcher, [watcher.pools[place] for place in places], before_counts=False)


def _why_no_mean(watcher: _PoolWatcher, pools: list[_Pool], before_counts: bool) -> str | None:
    """None where average pooling meets a linear head, so that the mean of the map is the output; or what is between."""
    if len(pools) != 1 or pools[0].name not in AVERAGES:
        return "the head pools by " + (" and ".join(pool.name for pool in pools) or "other means than an average")
    before, after = watcher.calls[: pools[0].at], watcher.calls[pools[0].at + 1 :]
    if between := next((call for call in after if call not in AFFINE_CALLS), None):
        return f"{between} comes between the pooling and the logits"
    if (
        mixing := next((call for call in before if call not in AFFINE_CALLS | LOCAL_CALLS), None)
        if before_counts
        else None
    ):
        return f"{mixing} comes before the pooling"
    return None


def _self_test(maps: Tensor, logits: Tensor, why_not: str | None, name: str) -> str:
    difference = float((maps.mean((2, 3)) - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
    if why_not:
        return f"not applicable: {why_not}, measured difference {difference:.0e}"
    # Convolutions on a GPU may round to ten bits.
    tolerance = 1e-5 if logits.device.type == "cpu" else 1e-3
    if not difference <= tolerance:
        got = f"a difference of {difference:.1e} of the largest logit"
        raise _refusal(name, "contradicts its dense map: the mean is not the output", got, f"at most {tolerance:.0e}")
    return f"mean of the map equals the model output, max difference {difference:.0e}"


def _classifier_logits(model: nn.Module, images: Tensor, name: str) -> Tensor:
    try:
        logits = model(images)
    except Exception as error:
        problem = f"does not run on {images.shape[-1]}×{images.shape[-1]} pixels"
        remedy = "Give --input-size with the side that it was built for."
        raise _refusal(name, problem, first_line(error), remedy=remedy) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise _refusal(name, "is not an image classifier", _described(logits), "logits [B, C]")
    return logits


def _tried(dense: DenseMap, images: Tensor, name: str) -> Tensor:
    """The maps of `images`, or why they are none."""
    try:
        maps = dense(images)
    except TeacherError:
        raise
    except Exception as error:
        raise _refusal(name, f"cannot be used by {dense.method}", first_line(error)) from error
    if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != len(images):
        raise _refusal(name, "gives no score maps", _described(maps), "logits [B, C, H, W]")
    if not maps.isfinite().all():
        raise _refusal(name, "gives scores that are not finite", remedy="Check its weights.")
    return maps


def _refuse_missing_head(model: Any, name: str) -> None:
    if hasattr(model, "get_classifier"):
        heads = [model.get_classifier()]
    else:
        heads = [getattr(model, part, None) for part in ("fc", "classifier", "head", "heads")]
    if getattr(model, "num_classes", None) == 0 or any(isinstance(head, nn.Identity) for head in heads):
        remedy = "Choose a classifier, or give --checkpoint with a trained head."
        raise _refusal(name, "has no classification head", "features only", "logits of classes", remedy)


def _token_grid(count: int, prefix: int | None, patch_grid: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and the grid of the others; an undeclared prefix is what makes the rest a grid."""
    for skipped in (0, 1, 2) if prefix is None else (prefix,):
        rest = count - skipped
        if patch_grid is not None and math.prod(patch_grid) == rest:
            return skipped, (patch_grid[0], patch_grid[1])
        side = math.isqrt(max(rest, 0))
        if side > 1 and side * side == rest:
            return skipped, (side, side)
    got = f"{count} tokens" + (f" with {prefix} in front of them" if prefix else "")
    raise TeacherError(
        "the teacher's tokens make no grid", got=got, expected="a token per patch", remedy=GIVE_SCORE_MAPS
    )


def _refusal(
    name: str, problem: str, got: str | None = None, expected: str | None = None, remedy: str = GIVE_SCORE_MAPS
) -> TeacherError:
    return TeacherError(f"teacher {name} {problem}", got=got, expected=expected, remedy=remedy)


def _described(output: object) -> str:
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


@dataclass(frozen=True)
class _Pool:
    """One global pooling of a pass: its place among all calls, its name and what it pooled."""

    at: int
    name: str
    source: Tensor


class _PoolWatcher(TorchFunctionMode):
    """Lists the calls and the global poolings of a pass, or replaces some of the poolings by their single locations."""

    def __init__(self, replace: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.replace = replace
        self.calls: list[str] = []
        self.pools: list[_Pool] = []
        self.seen = 0
        self.grid = (0, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "?")
        cells = _pooled_cells(name, args, kwargs or {}, out)
        if not self.replace:
            if cells is not None:
                self.pools.append(_Pool(len(self.calls), name, args[0]))
            self.calls.append(_kind(name, args))
        elif cells is not None:
            self.seen += 1
            if self.seen - 1 in self.replace:
                self.grid = (cells.shape[1], cells.shape[2])
                return cells.reshape(-1, *out.shape[1:])
        return out


def _pooled_cells(name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Tensor | None:
    """The locations [B, H, W, D] that a call pooled into one, or None if it is no global pooling."""
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not isinstance(out, Tensor):
        return None
    if name in POOLS and source.dim() == 4 and out.shape[2:] == (1, 1):
        kernel = kwargs.get("kernel_size", args[1] if len(args) > 1 else None)
        whole = name != "avg_pool2d" or kernel in (source.shape[2], tuple(source.shape[2:]), list(source.shape[2:]))
        return source.permute(0, 2, 3, 1) if whole else None
    if name not in REDUCTIONS or source.dim() not in (3, 4):
        return None
    given = kwargs.get("dim", args[1] if len(args) > 1 else ())
    axes = sorted(axis % source.dim() for axis in ([given] if isinstance(given, int) else given or ()))
    if source.dim() == 4:
        return source if axes == [1, 2] else source.permute(0, 2, 3, 1) if axes == [2, 3] else None
    tokens = source if axes == [1] else source.transpose(1, 2) if axes == [2] else None
    side = math.isqrt(tokens.shape[1]) if tokens is not None else 0
    return tokens.unflatten(1, (side, side)) if tokens is not None and side * side == tokens.shape[1] else None


def _kind(name: str, args: Any) -> str:
    """The name of a call; products of two activations and wide convolutions get names of their own."""
    if name == "conv2d" and tuple(args[1].shape[-2:]) != (1, 1):
        return SPATIAL_CONV
    if name in SCALINGS and all(isinstance(arg, Tensor) and not isinstance(arg, nn.Parameter) for arg in args[:2]):
        return PRODUCT
    return name
