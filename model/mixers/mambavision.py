"""MambaVision's mixer: half of the channels pass a forward scan, the other half a convolution alone.

Legend: B images; L sequence length; D model width; E inner width; N state size; R rank of the step size.

Hatamizadeh and Kautz, "MambaVision" (2024). Parameters have the published names.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.mixers.parts import widen
from model.ops import directional_scan
from model.ops.mixer_parts import StepSize
from model.ops.scan_operators import FLOPS_PER_STATE

torch.fx.wrap("directional_scan")  # not traced through: it checks shapes and dtypes
torch.fx.wrap("widen")


@register_notrace_module  # its scan is one operator, with nothing to trace in it
class MambaVisionMixer(nn.Module):
    """A Mamba mixer without a gate: the branch beside the scan is concatenated, so no channel needs to be causal.

    Args:
        d_model: model width D.
        d_state: state size N.
        d_conv: taps of the convolutions, which are centered; odd.
        expand: E / D; E is even.
        dt_rank: R; None: D / 16, rounded up.
        backend: backend of the scan, see `model.ops.selective_scan`.

    Raises:
        ModelError: an even d_conv, or an odd E.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int = 1,
        dt_rank: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if not d_conv % 2 or inner % 2:
            raise ModelError(
                "MambaVision's mixer has centered convolutions on two halves",
                got=f"d_conv={d_conv}, inner width {inner}",
                expected="an odd d_conv and an even width",
            )
        self.branch, self.d_state, self.backend = inner // 2, d_state, backend
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        half = self.branch
        self.in_proj = nn.Linear(d_model, inner, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, padding=d_conv // 2, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, padding=d_conv // 2, bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = StepSize(self.dt_rank, half)
        rates = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x, z = self.in_proj(hidden).mT.chunk(2, 1)
        x, z = F.silu(self.conv1d_x(x)).mT, F.silu(self.conv1d_z(z)).mT
        step, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = directional_scan(
            x.unsqueeze(0),
            self.dt_proj(step).unsqueeze(0),
            -torch.exp(widen(self.A_log)).unsqueeze(0),
            b.unsqueeze(0),
            c.unsqueeze(0),
            widen(self.D).unsqueeze(0),
            # The published networks were trained with the bias added twice: in the layer and before the softplus.
            widen(self.dt_proj.bias).unsqueeze(0),
            delta_softplus=True,
            backend=self.backend,
        )
        return self.out_proj(torch.cat([y.squeeze(0), z], -1))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: A and D."""
        return {"A_log", "D"}

    def macs_per_token(self) -> dict[str, int]:
        """Multiply-adds of the scan per token, on any backend."""
        return {"scan": self.branch * self.d_state * FLOPS_PER_STATE // 2}
