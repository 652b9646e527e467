"""The fused mixer's Triton kernels in Triton's interpreter, against the plain modules in float64.

The interpreter is chosen when Triton is imported: the cases run in a process of their own, this file as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model.mixers.mamba import BidirectionalMamba
from model.ops import mixer_parts
from model.ops.mixer_parts import ReversedConv1d, conv_silu, gate

# name: batch, length, model width, states, taps, directions
CASES: dict[str, tuple[int, int, int, int, int, str]] = {
    "one token": (2, 1, 5, 3, 4, "both"),
    "fewer tokens than taps": (1, 3, 9, 4, 4, "both"),
    "two blocks of channels, three segments of rows": (1, 19, 70, 2, 4, "both"),
    "forward": (2, 18, 12, 16, 3, "forward"),
    "one tap": (1, 9, 8, 5, 1, "both"),
}
Found = dict[str, float]


def mixed(backend: str, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients of a whole mixer."""
    batch, length, width, states, taps, directions = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    mixer = BidirectionalMamba(width, states, taps, directions=directions, backend=backend)
    nn.init.normal_(mixer.D)
    x, grad = torch.randn(2, batch, length, width)
    mixer, x = mixer.to(dtype), x.to(dtype).requires_grad_()
    out = mixer(x)
    named = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(out, [*named.values()], grad.to(dtype))
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


def parts(backend: str, dtype: torch.dtype, of: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The same of the convolution and of the gate alone, on strided rows; both round to `of` first."""
    torch.manual_seed(7)
    convs = nn.ModuleList(kind(20, 20, 4, groups=20, padding=3) for kind in (nn.Conv1d, ReversedConv1d)).to(dtype)
    xz, grad_u, y, grad = (
        torch.randn(s).to(of).to(dtype) for s in ((2, 9, 40), (2, 2, 9, 20), (2, 2, 9, 20), (2, 9, 20))
    )
    x, z = xz.requires_grad_().chunk(2, -1)
    u, out = conv_silu(x, [*convs], backend)[0], gate(y.requires_grad_(), z, 0.5, backend)
    named = {"xz": xz, "y": y, **dict(convs.named_parameters())}
    gradients = torch.autograd.grad([u, out], [*named.values()], [grad_u, grad])
    return {"u": u.detach(), "out": out.detach(), **dict(zip(named, gradients, strict=True))}


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> Found:
    """The largest error of each, relative to the largest value."""
    return {
        key: ((found[key].double() - want).abs().max() / want.abs().max().clamp(min=1e-9)).item()
        for key, want in exact.items()
    }


def half_precision() -> Found:
    """Under autocast against float32: the step sizes' biases are not rounded to bfloat16."""
    mixer = BidirectionalMamba(12, 4, backend="triton")
    x = torch.randn(2, 10, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x)
    mixer.backend = "reference"
    return {"dtype is bfloat16": float(found.dtype == torch.bfloat16), **errors({"out": found}, {"out": mixer(x)})}


def dispatched() -> dict[str, bool]:
    """Whether the fused core runs: with plain modules, with a hook, without gradients, twice differentiated."""
    mixer, x = BidirectionalMamba(8, 2, backend="triton"), torch.randn(1, 5, 8)

    def is_fused() -> bool:
        nodes = [mixer(x).grad_fn]
        for node in nodes:
            nodes += [one for one, _ in node.next_functions if one is not None]
        return any("Core" in type(node).__name__ for node in nodes)

    found = {"plain": is_fused()}
    handle = mixer.x_proj_b.register_forward_hook(lambda *_: None)
    found["hooked"] = is_fused()
    handle.remove()
    with torch.no_grad():
        found["same without gradients"] = torch.equal(mixer(x), mixer(x.clone().requires_grad_()).detach())
    (first,) = torch.autograd.grad(mixer(x.requires_grad_()).sum(), x, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        found["second derivatives are refused"] = "once_differentiable" in str(error)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_the_fused_mixer_equals_the_plain_modules(found, name):
    for key, error in found[name].items():
        assert error < 5e-6, f"{key} is wrong by {error:.1e} of its largest value"


def test_convolution_and_gate_alone_equal_the_plain_modules(found):
    assert max(found["parts"].values()) < 2e-6
    # Triton's interpreter cuts a bfloat16 off where a device rounds it; sums of the taps' gradients stay near.
    assert max(found["parts in bfloat16"].values()) < 2**-7


def test_step_sizes_stay_precise_under_autocast(found):
    assert found["autocast"]["dtype is bfloat16"]
    assert found["autocast"]["out"] < 0.03


def test_the_fused_core_gives_way_to_hooks(found):
    expected = {"plain": True, "hooked": False, "same without gradients": True, "second derivatives are refused": True}
    assert found["dispatch"] == expected


def test_the_plain_gate_does_not_widen(monkeypatch):
    """A sum under a GPU's autocast is float32."""
    monkeypatch.setattr(mixer_parts, "_fused", lambda *_: None)
    y, z = torch.randn(2, 1, 3, 4), torch.randn(1, 3, 4)
    assert torch.equal(gate(y, z, 0.5), (y[0] + y[1]) * 0.5 * nn.functional.silu(z))
    assert torch.equal(gate(y[:1], z, 1.0), y[0] * nn.functional.silu(z))


if __name__ == "__main__":
    from model.ops import mixer_triton

    torch.set_num_threads(1)
    mixer_triton.SEGMENT = 8
    results: dict[str, dict] = {
        name: errors(mixed("triton", name, torch.float32), mixed("reference", name, torch.float64)) for name in CASES
    }
    results["parts"] = errors(parts("triton", torch.float32), parts("reference", torch.float64))
    bfloat16 = torch.bfloat16
    results["parts in bfloat16"] = errors(parts("triton", bfloat16), parts("reference", torch.float64, bfloat16))
    results["autocast"], results["dispatch"] = half_precision(), dispatched()
    print(json.dumps(results))
