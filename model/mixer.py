"""The bidirectional Mamba mixer: each token learns from all before it and, by other parameters, from all after it.

Legend: B images; L sequence length; D model width; E inner width; N state size; R rank of the step size.

Gu and Dao, "Mamba" (2023); Zhu et al., "Vision Mamba" (2024). Parameters carry the published names: `_b` is the second
direction, which runs from the last token to the first.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from model.ops import directional_scan

DT_MIN, DT_MAX = 1e-3, 0.1  # step sizes at the start of training


class BidirectionalMamba(nn.Module):
    """[B, L, D] -> [B, L, D].

    d_model, d_state, d_conv, expand  D, N, taps of the causal convolution, E / D
    dt_rank        R; None: D / 16, rounded up
    bidirectional  False: forwards only, without the `_b` parameters
    halve          the mean of both directions, not their sum
    layer_scale    initial factor of each output channel; None: none
    backend        of the scan, see `model.ops.selective_scan`
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bidirectional: bool = True,
        halve: bool = True,
        layer_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_state, self.backend = d_state, backend
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.directions = ("", "_b") if bidirectional else ("",)
        self.scale = 0.5 if bidirectional and halve else 1.0
        inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        for name in self.directions:
            self.register_parameter(f"A{name}_log", nn.Parameter(_initial_a_log(inner, d_state)))
            self.register_parameter(f"D{name}", nn.Parameter(torch.ones(inner)))
            self.add_module(f"conv1d{name}", nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1))
            self.add_module(f"x_proj{name}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{name}", nn.Linear(self.dt_rank, inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale))
        self._init_step_sizes(inner)

    def _init_step_sizes(self, inner: int) -> None:
        """So that softplus(bias) is spread evenly, in its logarithm, over DT_MIN to DT_MAX, forwards.

        The published models begin the second direction with bias 0; so do these.
        """
        for name in self.directions:
            projection = cast(nn.Linear, self.get_submodule(f"dt_proj{name}"))
            nn.init.uniform_(projection.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            nn.init.zeros_(projection.bias)
        steps = torch.exp(torch.rand(inner) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN)).clamp(min=1e-4)
        with torch.no_grad():
            self.get_parameter("dt_proj.bias").copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(hidden).chunk(2, -1)
        parts = [self._scan_inputs(x, name) for name in self.directions]
        inputs, delta, b, c = (torch.stack(part) for part in zip(*parts, strict=True))
        wide = torch.promote_types(self.get_parameter("A_log").dtype, torch.float32)
        a = torch.stack([-torch.exp(self.get_parameter(f"A{name}_log").to(wide)) for name in self.directions])
        d = torch.stack([self.get_parameter(f"D{name}").to(wide) for name in self.directions])
        y = directional_scan(
            inputs,
            delta,
            a,
            b,
            c,
            d,
            delta_softplus=True,
            reverse=tuple(name == "_b" for name in self.directions),
            backend=self.backend,
        )
        out = self.out_proj((y.sum(0) * self.scale) * F.silu(z))
        return out if self.gamma is None else out * self.gamma

    def _scan_inputs(self, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, L, E] of one direction to u [B, L, E], delta [B, L, E], B and C [B, L, N]."""
        convolution = cast(nn.Conv1d, self.get_submodule(f"conv1d{name}"))
        taps, length = convolution.kernel_size[0], x.shape[1]
        weight, bias, room = convolution.weight, cast(torch.Tensor, convolution.bias), (taps - 1, 0)
        if name == "_b":  # what comes after a token instead of what came before it
            weight, room = weight.flip(-1), (0, taps - 1)
        u = F.conv1d(F.pad(x.mT, room), weight.to(x.dtype), bias.to(x.dtype), groups=x.shape[2])
        u = F.silu(u).mT[:, :length]
        step, b, c = self.get_submodule(f"x_proj{name}")(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        # In float32: the bias is near −5, where bfloat16 would round the step size by a few percent.
        with torch.autocast(u.device.type, enabled=False):
            projection = self.get_submodule(f"dt_proj{name}")
            delta = projection(step.to(torch.promote_types(step.dtype, torch.float32)))
        return u, delta, b, c


def _initial_a_log(inner: int, d_state: int) -> torch.Tensor:
    """[E, N]: log 1, log 2, … log N in every channel (the real part of S4D's)."""
    return torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(inner, 1)
