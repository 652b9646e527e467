"""Linear attention's results with the division by the sum of a token's weights, and without it.

Han et al. (2024) name this normalization as what keeps tokens of any length comparable; Mamba has none.

Legend: B images; L sequence length; E inner width; H heads; h×w grid of a stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from model.backbones.hierarchical.mila_attention import LEAST as MILA_LEAST
from model.backbones.hierarchical.mila_attention import LinearAttention, linear_attention, rotate
from model.mixers.linear_attention import LEAST, Attention, attend_reference, rotate_along
from model.mixers.parts import widen


class Results(NamedTuple):
    """Length of each token's result, [B, L] or [B, h, w].

    Attributes:
        divided: of the mean of the values, weighted by the products of queries and keys.
        undivided: of the sum with the same weights, over L.
    """

    divided: torch.Tensor
    undivided: torch.Tensor


def results_of_attention(attention: Attention, u: torch.Tensor) -> Results:
    """Both results of the mixer's attention, whichever of them it uses.

    Args:
        attention: the attention.
        u: its values before the input gate, behind the convolution, [B, L, E].

    Returns:
        The lengths of both.
    """
    parts: Any = attention
    q, k = (F.elu(widen(parts.qk(u))) + 1).chunk(2, -1)
    v = widen(u) if parts.gate is None else widen(u) * F.softplus(parts.gate_up(parts.gate(u)))
    log_decay = None if parts.forget is None else -F.softplus(parts.forget(u)).mT
    turned = (rotate_along(q), rotate_along(k)) if parts.rotary else (q, k)
    heads = attention._heads
    y = attend_reference(heads(turned[0]), heads(turned[1]), heads(v), log_decay, parts.causal)
    total = attend_reference(heads(q), heads(k), torch.ones_like(y[..., :1]), log_decay, parts.causal)
    return _lengths(y / (total + LEAST), y / u.shape[1])


def results_of_mila(attention: LinearAttention, x: torch.Tensor) -> Results:
    """Both results of MILA's attention, without the convolution beside it, for x [B, h, w, C]."""
    grid = (x.shape[1], x.shape[2])
    table, heads = attention.rope(*grid), attention._heads
    queries, keys = (F.elu(attention.qk(x)) + 1).chunk(2, -1)
    q, k = heads(queries), heads(keys)
    y = linear_attention(q, k, heads(x), (heads(rotate(queries, table)), heads(rotate(keys, table))))
    total = (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + MILA_LEAST
    return Results(*(part.unflatten(1, grid) for part in _lengths(y, y * total)))


def _lengths(divided: torch.Tensor, undivided: torch.Tensor) -> Results:
    """Lengths [B, L] of results [B, H, L, ·] over all heads."""
    return Results(*(part.float().pow(2).sum((1, 3)).sqrt() for part in (divided, undivided)))
