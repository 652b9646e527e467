"""Attention as a mixer: multi-head, with a causal convolution and rotary positions where they are asked for.

Legend: B images; L sequence length; D model width; H heads; P head width.
"""

from __future__ import annotations

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.mixers.parts import direction_names
from model.mixers.registry import register_mixer

BASE = 10_000.0  # of the rotary wavelengths


@torch.fx.wrap
def rotate_positions(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Turn the first `rotary_dim` channels of each head by their position (Su et al., "RoFormer", 2021).

    Channel i turns together with channel i + rotary_dim / 2.

    Args:
        x: queries or keys, [B, H, L, P].
        rotary_dim: an even number, at most P.

    Returns:
        [B, H, L, P].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    places = torch.arange(0, rotary_dim, 2, device=x.device, dtype=dtype) / rotary_dim
    angles = torch.arange(x.shape[-2], device=x.device, dtype=dtype).unsqueeze(-1) * BASE**-places
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x[..., :rotary_dim].chunk(2, -1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos, x[..., rotary_dim:]], -1)


@register_mixer("attention")
@register_notrace_module
class AttentionMixer(nn.Module):
    """Multi-head attention.

    Args:
        d_model: model width D.
        head_dim: P.
        num_heads: H; None: D / P, which must be whole.
        d_conv: taps of a causal convolution over queries, keys and values; 0: none.
        rotary_dim: channels of each head that positions turn; 0: none.
        bias: biases of both projections.
        directions: "both", or "forward": each token sees itself and those before it.

    Raises:
        ModelError: heads that do not fill the width, a rotary_dim that does not fit them, or unknown directions.
    """

    def __init__(
        self,
        d_model: int,
        head_dim: int = 64,
        num_heads: int | None = None,
        d_conv: int = 0,
        rotary_dim: int = 0,
        bias: bool = True,
        directions: str = "both",
    ) -> None:
        super().__init__()
        if head_dim < 1 or (num_heads is None and d_model % head_dim):
            raise ModelError("the heads do not fill the width", got=f"head_dim={head_dim} for {d_model} channels")
        if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
            raise ModelError("rotary_dim does not fit", got=rotary_dim, expected=f"an even number up to {head_dim}")
        self.head_dim, self.rotary_dim, self.d_conv = head_dim, rotary_dim, d_conv
        self.num_heads = d_model // head_dim if num_heads is None else num_heads
        self.causal = len(direction_names(directions)) == 1
        inner = self.num_heads * head_dim
        self.in_proj = nn.Linear(d_model, 3 * inner, bias=bias)
        if d_conv:
            self.conv1d = nn.Conv1d(3 * inner, 3 * inner, d_conv, groups=3 * inner, padding=d_conv - 1)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        length, x = hidden.shape[1], self.in_proj(hidden)
        if self.d_conv:
            x = self.conv1d(x.mT)[..., :length].mT
        q, k, v = x.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary_dim:
            q, k = rotate_positions(q, self.rotary_dim), rotate_positions(k, self.rotary_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def no_weight_decay(self) -> set[str]:
        """None beside timm's."""
        return set()

    def macs_per_token(self) -> dict[str, int]:
        """Nothing: all is torch's, which is counted where it runs."""
        return {}
