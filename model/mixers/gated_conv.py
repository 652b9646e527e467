"""Mamba's block without its scan: a gated convolution, which asks whether the state is needed.

Legend: B images; L sequence length; D model width; E inner width.

Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?" (2024).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.mixers.parts import direction_names
from model.mixers.registry import register_mixer


class TokenConv(nn.Conv1d):
    """A convolution of each channel along the sequence.

    Args:
        channels: E.
        taps: number of taps.
        causal: whether a token sees only itself and those before it. Otherwise the taps are centered on it, and an even
            number of taps is reduced by one.
    """

    def __init__(self, channels: int, taps: int, causal: bool) -> None:
        taps = taps if causal else taps - 1 + taps % 2
        if taps < 1:
            raise ModelError("the convolution has no taps", got=f"d_conv={taps}", expected="1 or more")
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1 if causal else taps // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, E] -> [B, L, E]."""
        return super().forward(x.mT)[..., : x.shape[1]].mT


@register_mixer("gated_conv")
class GatedConv(nn.Module):
    """A convolution along the sequence, gated.

    Args:
        d_model: model width D.
        d_conv: taps of the convolution, see `TokenConv`.
        expand: E / D.
        directions: "both": taps on both sides of a token; "forward": on it and before it.
    """

    def __init__(self, d_model: int, d_conv: int = 7, expand: int = 2, directions: str = "both") -> None:
        super().__init__()
        inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = TokenConv(inner, d_conv, causal=len(direction_names(directions)) == 1)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x, z = self.in_proj(hidden).chunk(2, -1)
        return self.out_proj(F.silu(self.conv1d(x)) * F.silu(z))

    def no_weight_decay(self) -> set[str]:
        """None beside timm's."""
        return set()

    def macs_per_token(self) -> dict[str, int]:
        """Nothing: all is torch's, which is counted where it runs."""
        return {}
