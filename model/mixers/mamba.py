"""The bidirectional Mamba mixer: one scan from the first token to the last, and one, with its own parameters, back.

Legend: B images; L sequence length; D model width; E inner width; N state size; R rank of the step size.

Gu and Dao, "Mamba" (2023); Zhu et al., "Vision Mamba" (2024). Parameters have the published names: `_b` marks the
second direction, which runs from the last token to the first.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn

from model.mixers.parts import direction_names, initial_step_bias, widen
from model.mixers.registry import register_mixer
from model.ops import directional_scan
from model.ops.mixer_parts import ReversedConv1d, StepSize, conv_silu, fused_core, gate
from model.ops.scan_operators import FLOPS_PER_STATE

torch.fx.wrap("directional_scan")  # not traced through: it checks shapes and dtypes
torch.fx.wrap("widen")


@register_mixer("mamba")
@register_notrace_module  # its scan is one operator, with nothing to trace in it
class BidirectionalMamba(nn.Module):
    """A Mamba mixer that scans the sequence in both directions.

    Args:
        d_model: model width D.
        d_state: state size N.
        d_conv: taps of the causal convolution.
        expand: E / D.
        dt_rank: R; None: D / 16, rounded up.
        directions: "both", or "forward" without the `_b` parameters.
        halve: average the two directions instead of adding them.
        layer_scale: initial factor of each output channel; None: none.
        backend: backend of the scan, see `model.ops.selective_scan`.

    Raises:
        ModelError: unknown directions.
    """

    dt_proj: StepSize

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: str = "both",
        halve: bool = True,
        layer_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.backend = expand * d_model, d_state, backend
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.directions = direction_names(directions)
        self.scale = 0.5 if halve and len(self.directions) == 2 else 1.0
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        for name in self.directions:
            self.register_parameter(f"A{name}_log", nn.Parameter(_initial_a_log(inner, d_state)))
            self.register_parameter(f"D{name}", nn.Parameter(torch.ones(inner)))
            conv = ReversedConv1d if name == "_b" else nn.Conv1d
            self.add_module(f"conv1d{name}", conv(inner, inner, d_conv, groups=inner, padding=d_conv - 1))
            self.add_module(f"x_proj{name}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{name}", StepSize(self.dt_rank, inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale))
        self._init_step_sizes(inner)

    def _init_step_sizes(self, inner: int) -> None:
        """Initialize the projections to step sizes: the forward bias to usual ones.

        The second direction starts with bias 0, as in the published models.
        """
        for name in self.directions:
            projection = getattr(self, f"dt_proj{name}")
            nn.init.uniform_(projection.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            nn.init.zeros_(projection.bias)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_step_bias(inner))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        xz = self.in_proj(hidden)
        convs, x_projs, dt_projs, a_logs, skips = (
            [getattr(self, part.format(name)) for name in self.directions]
            for part in ("conv1d{}", "x_proj{}", "dt_proj{}", "A{}_log", "D{}")
        )
        core = fused_core(xz, convs, x_projs, dt_projs, a_logs, skips, self.scale, self.backend)
        if core is None:
            core = self._core(xz, convs)
        out = self.out_proj(core)
        return out if self.gamma is None else out * self.gamma

    def _core(self, xz: torch.Tensor, convs: list[nn.Conv1d]) -> torch.Tensor:
        """What is between the outer projections, by modules and operators: [B, L, 2 E] -> [B, L, E]."""
        x, z = xz.chunk(2, -1)
        u, each = conv_silu(x, convs, self.backend)
        parts = [self._scan_inputs(one, name) for one, name in zip(each, self.directions, strict=True)]
        delta, a, b, c, d = (torch.stack(part) for part in zip(*parts, strict=True))
        y = directional_scan(
            u,
            delta,
            a,
            b,
            c,
            d,
            delta_softplus=True,
            reverse=tuple(name == "_b" for name in self.directions),
            backend=self.backend,
        )
        return gate(y, z, self.scale, self.backend)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: A and D of each direction."""
        return {part for name in self.directions for part in (f"A{name}_log", f"D{name}")}

    def macs_per_token(self) -> dict[str, int]:
        """Multiply-adds of the scans per token, on any backend."""
        return {"scan": len(self.directions) * self.d_inner * self.d_state * FLOPS_PER_STATE // 2}

    def _scan_inputs(self, u: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
        """Of one direction, from u [B, L, E]: delta [B, L, E], A [E, N], B and C [B, L, N], D [E].

        Parameters are read as attributes, since `torch.func.functional_call` may replace them.
        """
        a_log, skip = getattr(self, f"A{name}_log"), getattr(self, f"D{name}")
        x_proj, dt_proj = (getattr(self, f"{part}{name}") for part in ("x_proj", "dt_proj"))
        step, b, c = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return dt_proj(step), -torch.exp(widen(a_log)), b, c, widen(skip)


def _initial_a_log(inner: int, d_state: int) -> torch.Tensor:
    """[E, N]: log 1, log 2, … log N in every channel (the real part of S4D's)."""
    return torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(inner, 1)
