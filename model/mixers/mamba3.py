"""The Mamba-3 mixer: trapezoidal steps and states that turn, without a convolution (`model.ops.trapezoid_ssd`).

Legend: B images; L sequence length; D model width; E inner width; H heads; P head width; N state size; A angles.

Lahoti et al., "Mamba-3" (2026). `_b` marks the second direction, which runs from the last token to the first.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.mixers.parts import direction_names, head_count, initial_step_bias, widen
from model.mixers.registry import register_mixer
from model.ops import trapezoid_ssd

NORM_EPS = 1e-5
LEAST_DECAY = 1e-4  # of -A

torch.fx.wrap("trapezoid_ssd")
torch.fx.wrap("widen")


def heavy_tail(x: torch.Tensor) -> torch.Tensor:
    """1 + x above 0 and 1 / (1 - x) below: positive, smooth at 0, and with a long tail on both sides."""
    return x.clamp(min=0) + 1 / (1 - x.clamp(max=0))


class RateNorm(nn.RMSNorm):
    """RMSNorm of B or C, in at least float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, N] -> [B, L, N] in at least float32."""
        return F.rms_norm(widen(x), self.normalized_shape, widen(self.weight), self.eps)


@register_mixer("mamba3")
@register_notrace_module
class BidirectionalMamba3(nn.Module):
    """A Mamba-3 mixer in both directions, by the rule of `BidirectionalMamba`.

    The directions share x, the gate z and the output projection; all else is their own, and the mean of the two is
    gated. With "forward" it is the published mixer of rank 1.

    Args:
        d_model: model width D.
        d_state: state size N.
        expand: E / D.
        head_dim: P.
        rotated: share of the states that turn: 0.5 or 1.
        directions: "both", or "forward" without the `_b` parameters.
        backend: "chunked", "reference", or "auto": the former.

    Raises:
        ModelError: unknown directions, a share or state size with no pair to turn, or heads that do not fill the inner
            width.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        rotated: float = 0.5,
        directions: str = "both",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.head_dim, self.backend = expand * d_model, d_state, head_dim, backend
        self.heads = head_count(self.d_inner, head_dim)
        self.directions = direction_names(directions)
        self.angles = int(d_state * rotated) // 2
        if rotated not in (0.5, 1) or self.angles < 1:
            raise ModelError(
                "no pair of states turns",
                got=f"rotated={rotated}, d_state={d_state}",
                expected="0.5 or 1, and 4 or more",
            )
        own = sum(self._own_sizes())
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + own, bias=False)
        if len(self.directions) == 2:
            self.in_proj_b = nn.Linear(d_model, own, bias=False)
        for name in self.directions:
            self.register_parameter(f"dt_bias{name}", nn.Parameter(initial_step_bias(self.heads)))
            self.register_parameter(f"D{name}", nn.Parameter(torch.ones(self.heads)))
            for rate in ("B", "C"):
                self.add_module(f"{rate}_norm{name}", RateNorm(d_state, eps=NORM_EPS))
                self.register_parameter(f"{rate}_bias{name}", nn.Parameter(torch.ones(self.heads, d_state)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        inner = self.d_inner
        z, x, own = self.in_proj(hidden).split([inner, inner, sum(self._own_sizes())], -1)
        y = self._scan(x, own, "")
        if len(self.directions) == 2:
            back = self._scan(x.flip(1), self.in_proj_b(hidden).flip(1), "_b")
            y = (y + back.flip(1)) / 2
        return self.out_proj(y * F.silu(z))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: dt_bias, D and the biases of B and C."""
        return {f"{part}{name}" for name in self.directions for part in ("dt_bias", "D", "B_bias", "C_bias")}

    def macs_per_token(self) -> dict[str, int]:
        """Nothing: all is torch's matrix products, which are counted where they run."""
        return {}

    def _own_sizes(self) -> list[int]:
        """Channels of B, C, step sizes, A, shares and angles."""
        return [self.d_state, self.d_state, self.heads, self.heads, self.heads, self.angles]

    def _scan(self, x: torch.Tensor, own: torch.Tensor, name: str) -> torch.Tensor:
        """One direction, its first token first: x [B, L, E] and its own part of the projection -> [B, L, E]."""
        b, c, step, decay, share, angle = own.split(self._own_sizes(), -1)
        heads = x.unflatten(-1, (self.heads, self.head_dim))
        b, c = (
            getattr(self, f"{rate}_norm{name}")(part).unsqueeze(-2) + widen(getattr(self, f"{rate}_bias{name}"))
            for rate, part in (("B", b), ("C", c))
        )
        dt = F.softplus(widen(step) + widen(getattr(self, f"dt_bias{name}")))
        a = -heavy_tail(widen(decay)).clamp(min=LEAST_DECAY)
        turn = torch.tanh(widen(angle)).unsqueeze(-2) * math.pi * dt.unsqueeze(-1)
        y = trapezoid_ssd(heads, dt, dt * a, torch.sigmoid(widen(share)), turn, b, c, self.backend)
        return (y + heads * getattr(self, f"D{name}").unsqueeze(-1).to(heads.dtype)).flatten(-2)
