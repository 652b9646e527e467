"""Checks of the token cross-entropy's arguments: each error names what does not fit.

Legend: B images; C classes; P palette size; R tail size; T tokens.
"""

from __future__ import annotations

import torch

from labeler.base.errors import InputError


def check_targets(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    partner: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> None:
    """Raise InputError unless shapes, dtypes and devices fit; arguments as for `token_cross_entropy`."""
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise InputError("logits cannot be used", got=got, expected="floating point [B, T, C], none of them 0")
    batch, tokens, _ = logits.shape
    if classes.ndim != 2 or len(classes) != batch or classes.shape[1] == 0 or classes.dtype != torch.int64:
        got = f"{classes.dtype} {tuple(classes.shape)}"
        raise InputError("palette classes do not fit the logits", got=got, expected=f"int64 ({batch}, P), P ≥ 1")
    wanted = {"scores": (scores, (batch, classes.shape[1], tokens)), "background": (background, (batch, tokens))}
    if weight is not None:
        wanted["weight"] = (weight, (batch, tokens))
    if partner is not None:
        wanted["partner"] = (partner, (tokens,))
        if partner.dtype != torch.bool:
            raise InputError("partner is not a mask", got=partner.dtype, expected=torch.bool)
    for name, (tensor, shape) in wanted.items():
        _check_target(name, tensor, shape, logits.device)
    _check_target("classes", classes, tuple(classes.shape), logits.device)


def checked_tail(
    logits: torch.Tensor, classes: torch.Tensor | None, offsets: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Check the tail; an empty one (R = 0) becomes None, so that it costs nothing."""
    if classes is None and offsets is None:
        return None, None
    if classes is None or offsets is None:
        raise InputError(
            "a tail needs tail_classes and tail_offsets", got="only one of them", expected="both, or neither"
        )
    if classes.ndim != 2 or len(classes) != len(logits) or classes.dtype != torch.int64:
        got = f"{classes.dtype} {tuple(classes.shape)}"
        raise InputError("tail classes do not fit the logits", got=got, expected=f"int64 ({len(logits)}, R)")
    if not offsets.is_floating_point():
        raise InputError("tail offsets cannot be used", got=offsets.dtype, expected="floating point")
    for name, tensor in (("tail_classes", classes), ("tail_offsets", offsets)):
        _check_target(name, tensor, tuple(classes.shape), logits.device)
    return (classes, offsets) if classes.shape[1] else (None, None)


def _check_target(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise InputError(f"{name} does not fit the logits", got=tuple(tensor.shape), expected=shape)
    if tensor.requires_grad:
        raise InputError(f"{name} requires a gradient", remedy="Only the logits get a gradient: detach it.")
    if tensor.device != device:
        remedy = "Move the batch to the model's device."
        raise InputError(f"{name} is on another device", got=tensor.device, expected=device, remedy=remedy)


def refuse_unknown_classes(classes: torch.Tensor, tail_classes: torch.Tensor | None, count: int) -> None:
    """Raise InputError if a palette or a tail names a class of `count` or above. On a GPU this would wait for it."""
    for ids in (classes, tail_classes):
        if ids is not None and bool((ids >= count).any()):
            raise InputError(
                "the targets name a class that the logits lack", got=f"class {int(ids.max())}",
                expected=f"below {count}", remedy="The model needs as many classes as the label store.",
            )  # fmt: skip
