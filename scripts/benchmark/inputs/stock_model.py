"""DeMansia made of stock operators, as one would write it without this project.

The mixer runs its two directions one after the other, the second on a flipped copy, with torch's convolution and linear
layers. It scans with `mamba_ssm` if that is installed, else in a loop over time. It shares the weights of the model
that it is compared with, so their outputs must agree.

Legend: B images; L sequence length; D model width; E inner width; N state size.
"""

from __future__ import annotations

import copy
import importlib

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.backbones.vision_mamba import Block, VisionMamba
from model.mixers import BidirectionalMamba
from model.ops import choose_backend

FAST = {"cpu": ("numba", "cpu"), "cuda": ("triton",)}  # device -> the backends of the scan that are measured


class StockMixer(nn.Module):
    """Computes the same function of [B, L, D] as a `BidirectionalMamba`, with its parameters."""

    def __init__(self, mixer: BidirectionalMamba) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x, z = self.mixer.in_proj(hidden).mT.chunk(2, 1)
        y = self.one_way(x, "")
        if "_b" in self.mixer.directions:
            y = y + self.one_way(x.flip(-1), "_b").flip(-1)
        return self.mixer.out_proj((y * self.mixer.scale * F.silu(z)).mT)

    def one_way(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Applies convolution and scan of one direction to x [B, E, L]."""
        m = self.mixer
        convolution = m.get_submodule(f"conv1d{name}")
        padding = convolution.weight.shape[-1] - 1
        steps = F.conv1d(x, convolution.weight, convolution.bias, padding=padding, groups=x.shape[1])
        x = F.silu(steps[..., : x.shape[-1]])
        parts = m.get_submodule(f"x_proj{name}")(x.mT).split([m.dt_rank, m.d_state, m.d_state], -1)
        projection = m.get_submodule(f"dt_proj{name}")
        delta = (parts[0] @ projection.weight.mT).mT
        a = -torch.exp(m.get_parameter(f"A{name}_log").float())
        d = m.get_parameter(f"D{name}").float()
        scan = mamba_ssm_scan() if x.is_cuda and has_mamba_ssm() else plain_scan
        inputs = (x, delta, a, parts[1].mT, parts[2].mT)
        return scan(*inputs, d, delta_bias=projection.bias.float(), delta_softplus=True)


def plain_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """Scans in a loop over time; u, delta and the result [B, E, L]; A [E, N]; B, C [B, N, L]."""
    dtype, (u, delta, B, C) = u.dtype, (x.float() for x in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->lben", dt, A)).unbind(0)
    added = torch.einsum("bel,bnl->lben", dt * u, B).unbind(0)
    state, states = torch.zeros_like(added[0]), []
    for decay_t, added_t in zip(decay, added, strict=True):
        state = decay_t * state + added_t
        states.append(state)
    y = torch.einsum("lben,bnl->bel", torch.stack(states), C)
    return (y + D[:, None] * u).to(dtype)


def has_mamba_ssm() -> bool:
    try:
        mamba_ssm_scan()
    except Exception:  # a package that cannot be imported here may fail in any way
        return False
    return True


def mamba_ssm_scan():  # type: ignore[no-untyped-def]
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def scan_in_use(device: str) -> str:
    return "mamba_ssm's scan" if device == "cuda" and has_mamba_ssm() else "a loop over time"


def our_scan(device: str) -> str:
    """Returns the backend of the scan, for a note; SystemExit if it is not the device's fast one."""
    try:
        found = choose_backend("auto", device)
    except ModelError as error:  # about what TOKEN_LABELING_SCAN names
        raise SystemExit(str(error)) from None
    if found not in FAST[device]:
        raise SystemExit(
            f"a slow scan is not measured: got backend {found!r} on {device}, expected {' or '.join(FAST[device])}. "
            "Unset TOKEN_LABELING_SCAN; `python -m train doctor` says which backends work."
        )
    return f"backend: {found}"


def stock_model(net: VisionMamba) -> VisionMamba:
    """Returns a copy of a network with stock mixers."""
    stock = copy.deepcopy(net)
    for layer in stock.layers:
        assert isinstance(layer, Block)
        layer.mixer = StockMixer(layer.mixer)  # type: ignore[assignment]
    return stock
