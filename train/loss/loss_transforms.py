"""The token cross-entropy inside transforms of `torch.func`, where custom operators cannot be differentiated.

Legend: V samples of `torch.vmap`. The operators are in `train.loss.token_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def no_second_derivative(ctx: Any, *_: Any) -> Any:
    """Raise RuntimeError; for the place of a backward pass."""
    raise RuntimeError(
        "token_cross_entropy has no second derivative (create_graph); use train.loss.loss_reference instead"
    )


def _each(apply: Callable[..., Any], info: Any, in_dims: tuple, inputs: tuple) -> list[Any]:
    """The results for V samples, computed one after another."""
    samples = range(info.batch_size)
    return [
        apply(*(x if dim is None else x.select(dim, v) for x, dim in zip(inputs, in_dims, strict=True)))
        for v in samples
    ]


class TransformedLoss(torch.autograd.Function):
    """apply(logits, classes, scores, background, weight, smoothing, partner, tail_classes, tail_offsets).

    Returns the weighted sum of losses, and logsumexp [B, T].
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, lse, _ = torch.ops.token_labeling.token_cross_entropy(*inputs, False, False)
        return loss, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *before, weight, ctx.smoothing, partner, tail_classes, tail_offsets = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*before, weight, partner, tail_classes, tail_offsets, output[1])

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor, _: torch.Tensor | None) -> tuple:
        *before, weight, partner, tail_classes, tail_offsets, lse = ctx.saved_tensors
        rest = (ctx.smoothing, partner, tail_classes, tail_offsets, lse)
        return TransformedGradient.apply(weight * factor, *before, *rest), *(None,) * 8

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        losses, lse = zip(*_each(TransformedLoss.apply, info, in_dims, inputs), strict=True)
        return (torch.stack(losses), torch.stack(lse)), (0, 0)


class TransformedGradient(torch.autograd.Function):
    """The gradient of `TransformedLoss` with respect to the logits."""

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return torch.ops.token_labeling.token_cross_entropy_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None: ...

    backward = staticmethod(no_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return torch.stack(_each(TransformedGradient.apply, info, in_dims, inputs)), 0
