"""Dense class-logit maps [B, C, H, W] from image classifiers that were built to return [B, C].

A classifier pools its last feature map and applies its head to the result. Here the head is applied to every location
by itself, as if that location were the whole map. There are three ways; the first that fits is used:

1. a module with its own `score_maps(images)` is used as it is;
2. timm's protocol: `forward_features`, then the module's own `forward_head` on every location
   (`labeler.teacher.head_per_location`; torchvision's VisionTransformer is handled in the same way);
3. any other module: the last global pooling of its forward pass is found by watching one pass. It is then replaced by
   "every location is a batch item", so that the rest of the forward pass is the head (`global_pooling`).

Legend: B batch, C classes, H×W map grid, T patch tokens, D feature width, S side of the square input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labeler.base.errors import TeacherError
from labeler.teacher.global_pooling import POOLS, SPATIAL_CONV, PoolingReplaced, PoolWatcher, why_no_mean
from labeler.teacher.head_per_location import GIVE_SCORE_MAPS, HeadPerLocation, HeadPerToken, TrainedTokenHead

HEADS = ("fc", "classifier", "head", "heads")
CLASS_TOKEN = "the head reads the class token"
CLASS_TOKEN_NOTE = "the head was trained on the class token only: its scores of patch tokens are a guess"


class DenseMap(Protocol):
    """A function from images [B, 3, S, S] to logits [B, C, H, W]; `method` describes it in a few words."""

    method: str

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenseReport:
    """What a pass over random images showed about a dense map.

    Attributes:
        method: How maps are computed.
        num_classes: C.
        grid: H, W.
        self_test: Result of comparing the map's mean with the model's output.
        notes: What a user must know.
    """

    method: str
    num_classes: int
    grid: tuple[int, int]
    self_test: str
    notes: tuple[str, ...]


def dense_map(model: nn.Module, images: Tensor, name: str) -> tuple[DenseMap, DenseReport]:
    """Finds a way to get a dense map from a model, and tests it.

    Args:
        model: The classifier, in evaluation mode.
        images: Random images [B, 3, S, S]; B is at least 2, since a wrongly replaced pooling could broadcast over 1.
        name: The teacher's name, for messages.

    Returns:
        The function from images to maps, and what the test showed.

    Raises:
        TeacherError: There is no such way, or the map contradicts the model's output.
    """
    notes: list[str] = []
    if hasattr(model, "score_maps"):
        dense: DenseMap = OwnScoreMaps(model)
        maps = _checked_maps(dense, images, name)
        self_test = "not applicable: the module makes its own maps"
    else:
        _refuse_missing_head(model, name)
        with PoolWatcher() as watcher:
            logits = _classifier_logits(model, images, name)
        if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            dense, why_not = _from_head(model, images, name)
        elif all(hasattr(model, part) for part in ("_process_input", "class_token", "encoder", "heads")):
            dense, why_not = _from_torchvision_tokens(model), CLASS_TOKEN
        else:
            dense, why_not = _from_pooling(model, watcher, name)
        maps = _checked_maps(dense, images, name)
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
        """Computes logits [B, C, H, W] of images [B, 3, S, S]."""
        return self.features(images)


def _from_head(model: Any, images: Tensor, name: str) -> tuple[DenseMap, str | None]:
    """Returns the map of a timm model, and why its mean may differ from the output (None: it must not)."""
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        expected = "forward_features to return [B, D, H, W], [B, H, W, D] or [B, T, D]"
        raise _refusal(name, "keeps no single map of features", _described(features), expected)
    with PoolWatcher() as watcher:
        model.forward_head(features)
    first_pool = watcher.pools[0].at if watcher.pools else len(watcher.calls)
    if SPATIAL_CONV in watcher.calls[:first_pool]:
        raise _refusal(name, "has a head that mixes locations", SPATIAL_CONV, "a head that follows a global pooling")
    if features.dim() == 3 and _has_auxiliary_head(model, features):
        return TrainedTokenHead(lambda x: model.forward_features(x)[:, 1:], model.aux_head), CLASS_TOKEN
    dense = _readable_layout(model, features, name)
    if fault := dense.order_fault(features):
        problem = "may keep its class token elsewhere than in front of the patch tokens, which would shift its maps"
        raise _refusal(name, problem, fault, "a head that finds its prefix tokens in front")
    if dense.layout == "tokens" and getattr(model, "global_pool", None) == "token":
        return dense, CLASS_TOKEN
    return dense, why_no_mean(watcher, watcher.pools, before_counts=True)


def _readable_layout(model: Any, features: Tensor, name: str) -> HeadPerLocation:
    """Finds the layout that the head can read; the wrong one has W features where it needs D."""
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
    """Whether the output for tokens [B, 1 + T, D] is that of the class head plus half of the largest token score."""
    if not all(isinstance(getattr(model, part, None), nn.Linear) for part in ("head", "aux_head")):
        return False
    output = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
    return torch.allclose(output, model.forward_head(tokens), rtol=1e-3, atol=1e-3)


def _from_torchvision_tokens(model: Any) -> HeadPerToken:
    """Returns the map of torchvision's VisionTransformer, whose forward pass keeps only the class token."""

    def tokens(images: Tensor) -> Tensor:
        """Computes patch tokens [B, T, D] of images [B, 3, S, S]."""
        patches = model._process_input(images)
        class_token = model.class_token.expand(len(images), -1, -1)
        return model.encoder(torch.cat([class_token, patches], dim=1))[:, 1:]

    return HeadPerToken(tokens, model.heads)


def _from_pooling(model: nn.Module, watcher: PoolWatcher, name: str) -> tuple[DenseMap, str | None]:
    """Returns the map of a module whose pass was watched, and why its mean may differ from the output (or None)."""
    if not watcher.pools:
        problem = "has no global pooling to replace (it reads a class token, or flattens a grid)"
        raise _refusal(name, problem, None, "an average or maximum over the whole map before the head")
    last = watcher.pools[-1]
    indices = [i for i, pool in enumerate(watcher.pools) if pool.source is last.source]
    if mixing := next((call for call in watcher.calls[last.at + 1 :] if call in {SPATIAL_CONV, *POOLS}), None):
        problem = "pools the whole map before its head"
        raise _refusal(name, problem, f"{mixing} after it", "a head on single locations")
    dense = PoolingReplaced(model, frozenset(indices), last.name)
    return dense, why_no_mean(watcher, [watcher.pools[i] for i in indices], before_counts=False)


def _self_test(maps: Tensor, logits: Tensor, why_not: str | None, name: str) -> str:
    """Compares maps [B, C, H, W] with the classifier's logits [B, C]. Raises TeacherError if they contradict."""
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
    """Computes the module's own output [B, C] for images [B, 3, S, S]."""
    try:
        logits = model(images)
    except Exception as error:
        problem = f"does not run on {images.shape[-1]}×{images.shape[-1]} pixels"
        remedy = "Give the `input_size` that it was built for."
        raise _refusal(name, problem, first_line(error), remedy=remedy) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise _refusal(name, "is not an image classifier", _described(logits), "logits [B, C]")
    return logits


def _checked_maps(dense: DenseMap, images: Tensor, name: str) -> Tensor:
    """Computes the maps [B, C, H, W] of images [B, 3, S, S]. Raises TeacherError if that fails."""
    try:
        maps = dense(images)
    except TeacherError:
        raise
    except Exception as error:
        raise _refusal(name, f"cannot be used by {dense.method}", first_line(error)) from error
    if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != len(images):
        raise _refusal(name, "returns no score maps", _described(maps), "logits [B, C, H, W]")
    if not maps.isfinite().all():
        raise _refusal(name, "returns scores that are not finite", remedy="Check its weights.")
    return maps


def _refuse_missing_head(model: Any, name: str) -> None:
    """Raises TeacherError if the model has no classification head."""
    if hasattr(model, "get_classifier"):
        heads = [model.get_classifier()]
    else:
        heads = [getattr(model, part, None) for part in HEADS]
    if getattr(model, "num_classes", None) == 0 or any(isinstance(head, nn.Identity) for head in heads):
        remedy = "Choose a classifier, give `checkpoint` with a trained head, or fit one with `fit_head`."
        raise _refusal(name, "has no classification head", "features only", "logits of classes", remedy)


def _refusal(
    name: str, problem: str, got: str | None = None, expected: str | None = None, remedy: str = GIVE_SCORE_MAPS
) -> TeacherError:
    """Returns the error for a teacher that cannot be used."""
    return TeacherError(f"teacher {name} {problem}", got=got, expected=expected, remedy=remedy)


def _described(output: object) -> str:
    """Describes the output of a model."""
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def first_line(error: BaseException) -> str:
    """Returns the message of an exception, short enough for one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
