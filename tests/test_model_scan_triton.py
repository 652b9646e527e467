"""The Triton scan in Triton's interpreter against an autograd loop in float64.

Triton decides when it is first imported whether kernels are interpreted, and other tests import it too: all checks run
in one process of their own, which is this file run as a script, and come back as figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import FULL
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
BOTH = (False, True)
INPUTS = ("u", "delta", "A", "B", "C", "D", "delta_bias")
# By the type a result is stored in, relative to its largest value. Rounding to fp16 moves that by up to 2^-11; to bf16
# by 2^-8 on a GPU, and by 2^-7 in the interpreter, which cuts instead of rounding.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-11}
OUTPUT_TOLERANCE = {**TOLERANCE, "float32": 2e-6}
# name: batch, length, width, states, reverse, then what differs from float32 with D, bias and softplus.
CASES: dict[str, tuple[int, int, int, int, tuple[bool, ...], dict]] = {
    "one token": (2, 1, 5, 5, BOTH, {}),
    "two tokens": (1, 2, 9, 16, (True,), {"without": ("D",)}),
    "three tokens": (2, 3, 9, 5, BOTH, {"without": ("delta_bias",)}),
    "a whole chunk": (1, 16, 5, 16, (False,), {}),
    "two blocks": (1, 17, 70, 5, BOTH, {"strided": True}),
    "plain": (1, 17, 9, 16, (False,), {"without": ("D", "delta_bias", "softplus")}),
    "bfloat16": (1, 18, 40, 16, BOTH, {"dtype": "bfloat16"}),
    "float16": (1, 3, 9, 16, (True,), {"dtype": "float16"}),
    "more directions than an integer has bits": (1, 3, 5, 5, BOTH * 35, {}),
    "large steps": (1, 17, 9, 16, (False,), {"scale": 20.0, "without": ("D",)}),
    "tiny steps": (1, 17, 9, 16, (True,), {"offset": -16.0, "without": ("D",)}),
    "197 tokens": (1, 197, 9, 16, (True,), {}),
}
if FULL:  # half of the time of all
    CASES["256 tokens"] = 1, 256, 5, 5, (True,), {"without": ("softplus",)}
    CASES["577 tokens"] = 1, 577, 5, 16, (False,), {"without": ("softplus",)}

Tensors = dict[str, torch.Tensor | None]


def draw(name: str) -> tuple[Tensors, torch.Tensor, bool, tuple[bool, ...]]:
    """The inputs of a case, the gradient of its output, and how it is run."""
    batch, length, width, states, reverse, options = CASES[name]
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    dtype = getattr(torch, options.get("dtype", "float32"))
    without = options.get("without", ())
    directions = len(reverse)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(directions, *shape, generator=generator)

    delta = normal(batch, length, width) * options.get("scale", 1.0) + options.get("offset", 0.0)
    bias = normal(width) / 2
    if "softplus" in without:  # steps are positive, and short enough for the state to remember earlier chunks
        delta, bias = delta.abs() / 8, bias.abs() / 8
    inputs: Tensors = {
        "u": normal(batch, length, width).to(dtype),
        "delta": delta.to(dtype),
        "A": -torch.exp(normal(width, states)),
        "B": normal(batch, length, states).to(dtype),
        "C": normal(batch, length, states).to(dtype),
        "D": None if "D" in without else normal(width),
        "delta_bias": None if "delta_bias" in without else bias,
    }
    grad_y = normal(batch, length, width).to(dtype)
    if options.get("strided"):
        for key in ("u", "delta", "B", "C"):
            inputs[key] = inputs[key].transpose(1, 2).contiguous().transpose(1, 2)
        grad_y = grad_y[..., :1].expand_as(grad_y)
    return inputs, grad_y, "softplus" not in without, reverse


def loop(inputs: Tensors, softplus: bool, reverse: tuple[bool, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the states before each chunk, [K, B, ⌈L/CHUNK⌉, N, E], one step at a time."""
    from model.ops.scan_triton import CHUNK

    outputs, borders = [], []
    for k, backwards in enumerate(reverse):
        u, delta, A, B, C, D, bias = (None if inputs[key] is None else inputs[key][k] for key in INPUTS)
        raw = delta if bias is None else delta + bias
        dt = F.softplus(raw) if softplus else raw
        h = u.new_zeros(len(u), *A.shape)
        ys, before = {}, []
        for step, t in enumerate(sorted(range(u.shape[1]), reverse=backwards)):
            if step % CHUNK == 0:
                before.append(h.mT)
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
            ys[t] = (h * C[:, t, None]).sum(-1) + (0 if D is None else D * u[:, t])
        outputs.append(torch.stack([ys[t] for t in sorted(ys)], 1))
        borders.append(torch.stack(before, 1))
    return torch.stack(outputs), torch.stack(borders)


def measure(name: str) -> dict[str, tuple[str, float]]:
    """The type of each result, and its largest error relative to the largest value."""
    from model.ops import scan_triton

    inputs, grad_y, softplus, reverse = draw(name)
    arguments = [inputs[key] for key in INPUTS]
    y, saved = scan_triton.forward(*arguments, softplus, reverse)
    forgotten, nothing = scan_triton.forward(*arguments, softplus, reverse, keep=False)
    assert torch.equal(forgotten, y)
    assert not nothing.numel()
    gradients = scan_triton.backward(grad_y, *arguments, saved, softplus, reverse)

    exact = {key: None if value is None else value.double().requires_grad_() for key, value in inputs.items()}
    exact_y, borders = loop(exact, softplus, reverse)
    given = [key for key in INPUTS if exact[key] is not None]
    expected = dict(
        zip(given, torch.autograd.grad(exact_y, [exact[key] for key in given], grad_y.double()), strict=True)
    )
    assert [key for key, gradient in zip(INPUTS, gradients, strict=True) if gradient is not None] == given

    def error(got: torch.Tensor, want: torch.Tensor) -> tuple[str, float]:
        assert got.shape == want.shape
        gap, top = (got.double() - want).abs().max().item(), want.abs().max().item()
        return str(got.dtype).removeprefix("torch."), gap / top if top else gap

    found = {"y": error(y, exact_y.detach()), "saved": error(saved, borders.detach())}
    return found | {
        key: error(gradient, expected[key]) for key, gradient in zip(INPUTS, gradients, strict=True) if key in expected
    }


def run(*command: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[str, float]]]:
    pytest.importorskip("triton")
    return json.loads(run(__file__, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients_equal_the_float64_loop(errors, name):
    stored = CASES[name][-1].get("dtype", "float32")
    for key, (dtype, error) in errors[name].items():
        assert dtype == (stored if key in ("y", "u", "delta", "B", "C") else "float32"), key
        tolerance = (OUTPUT_TOLERANCE if key in ("y", "saved") else TOLERANCE)[dtype]
        assert error < tolerance, f"{key} is wrong by {error:.1e} of its largest value"


def test_availability_is_told_with_its_reason(monkeypatch):
    from model.ops import scan_triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert scan_triton.is_available()[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    works, why = scan_triton.is_available()
    assert not works
    assert "no CUDA device" in why
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert scan_triton.is_available() == (False, "triton is not installed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: measure(name) for name in CASES}))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_a_compiler_is_told_the_room_for_saved_states(length):
    """One state before each chunk, as the kernels leave them."""
    from model.ops import scan_triton
    from model.ops.scan_operators import _saved_triton

    u, a = torch.empty(2, 3, length, 5, device="meta"), torch.empty(2, 5, 4, device="meta")
    chunks = len(range(0, length, scan_triton.CHUNK))
    assert _saved_triton(u, u, a).shape == (2, 3, chunks, 4, 5)
