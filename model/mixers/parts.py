"""Parts that several mixers share: their directions, and how steps and heads begin.

Legend: E inner width; H heads.
"""

from __future__ import annotations

import math

import torch
import torch.fx

from labeler.base.errors import ModelError

DT_MIN, DT_MAX = 1e-3, 0.1  # step sizes at the start of training
DIRECTIONS = {"both": ("", "_b"), "forward": ("",)}


@torch.fx.wrap
def widen(x: torch.Tensor) -> torch.Tensor:
    """Cast to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def direction_names(directions: str) -> tuple[str, ...]:
    """What the names of each direction's parameters end in.

    Args:
        directions: "both" or "forward".

    Returns:
        "" for the first direction, and "_b" for the second, which runs from the last token to the first.

    Raises:
        ModelError: another name.
    """
    if directions not in DIRECTIONS:
        raise ModelError("unknown directions", got=repr(directions), expected='"both" or "forward"')
    return DIRECTIONS[directions]


def head_count(inner: int, head_dim: int) -> int:
    """H = E / head_dim. Raises ModelError if the heads do not fill the inner width."""
    if head_dim < 1 or inner % head_dim:
        raise ModelError(
            "the heads do not fill the inner width",
            got=f"head_dim={head_dim} for {inner} channels",
            expected="a divisor",
            remedy="Set head_dim in mixer_options, or embed_dim or expand.",
        )
    return inner // head_dim


def initial_step_bias(count: int) -> torch.Tensor:
    """[count]: biases whose softplus is between DT_MIN and DT_MAX, uniform in the logarithm."""
    steps = torch.rand(count, dtype=torch.float32) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN)
    steps = steps.exp().clamp(min=1e-4)
    return steps + torch.log(-torch.expm1(-steps))
