"""What is measured in a layer, and the formulas.

Legend: B images; L sequence length; D model width; E channels that have a step size; K states that decay: channels
times state size, or heads; h×w grid of a layer's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BINS = 20  # of the forget gate, from 0 to 1
LONG = 0.9  # quantile of the states' reaches


@dataclass(frozen=True)
class Forget:
    """The forget gate of a direction: the share of a state that each step keeps, over all tokens and states.

    Attributes:
        mean: its mean.
        histogram: share of the values in each of `BINS` equal bins from 0 to 1.
        reach: tokens until a state that decays by the mean is 1/e of itself; infinite if nothing is forgotten.
        long_reach: the same of single states, by the mean of their logarithms: 90 % of the states reach less far.
    """

    mean: float
    histogram: tuple[float, ...]
    reach: float
    long_reach: float


@dataclass(frozen=True)
class Spread:
    """Statistics of a map.

    Attributes:
        mean: mean over the tokens.
        std: standard deviation over the tokens.
        least: smallest value.
        most: largest value.
    """

    mean: float
    std: float
    least: float
    most: float


@dataclass(frozen=True)
class DirectionInside:
    """One direction of a mixer, or another of the branches whose outputs it adds.

    Attributes:
        name: "forward", "backward", or the branch's name.
        contribution: [h, w]: length of the vector that it adds to each token.
        share: its part of the sum of all directions' mean contributions; 0 where all are zero.
        step: [h, w]: step size, mean over channels; None: it has none.
        input_weight: [h, w]: weight with which a token enters the states, mean of |dt·B|; None: there is none.
        forget: its forget gate; None: it has none.
        divided: [h, w]: length of linear attention's result with its normalization; None: it is none.
        undivided: [h, w]: the same without it; None likewise.
    """

    name: str
    contribution: torch.Tensor
    share: float
    step: torch.Tensor | None = None
    input_weight: torch.Tensor | None = None
    forget: Forget | None = None
    divided: torch.Tensor | None = None
    undivided: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerInside:
    """One layer on one image.

    Attributes:
        name: the block's name in the model.
        mixer: name of its mixer's class.
        gate: [h, w]: silu(z), mean over channels; None: it has no gate.
        directions: its directions.
        length: [h, w]: length of each token's vector as it enters the block.
        normed_length: [h, w]: the same behind the block's normalization, as the mixer reads it.
        classes: int64 [h, w]: first class of the token head on the layer's output; None: the head does not fit it.
        probability: [h, w]: the probability of that class; None likewise.
        settled: share of the tokens whose first class is that of the last layer; None likewise.
    """

    name: str
    mixer: str
    gate: torch.Tensor | None
    directions: tuple[DirectionInside, ...]
    length: torch.Tensor
    normed_length: torch.Tensor
    classes: torch.Tensor | None = None
    probability: torch.Tensor | None = None
    settled: float | None = None


def forget_gate(log_decay: torch.Tensor) -> Forget:
    """Measure a forget gate.

    Args:
        log_decay: [B, L, K], logarithm of the share of each state that each step keeps; for Mamba dt·A.

    Returns:
        Its measures.
    """
    logs = log_decay.double().flatten(0, -2)
    kept = logs.exp()
    counts = torch.histc(kept, BINS, 0, 1)
    reaches = -1 / logs.mean(0)  # -inf of states that never forget
    long = torch.where(reaches < 0, torch.inf, reaches).quantile(LONG, interpolation="lower")
    mean = float(kept.mean())
    return Forget(mean, tuple((counts / kept.numel()).tolist()), reach(mean), float(long))


def reach(decay: float) -> float:
    """Tokens until a state of which each step keeps the share `decay` is 1/e of itself; infinite for 1, 0 for 0."""
    if decay <= 0:
        return 0.0
    return math.inf if decay >= 1 else -1 / math.log(decay)


def input_weight(step: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of |dt·B| over channels and states.

    Args:
        step: dt, [B, L, E].
        b: B, [B, L, N], shared by all channels.

    Returns:
        [B, L]. The mean of an outer product is the product of the means.
    """
    return step.mean(-1) * b.abs().mean(-1)


def spread(values: torch.Tensor) -> Spread:
    """Statistics of a map [h, w]; the deviation is that of all tokens, not of a sample."""
    wide = values.double()
    return Spread(float(wide.mean()), float(wide.std(correction=0)), float(wide.min()), float(wide.max()))
