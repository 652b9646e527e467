"""What surrounds the scan in a mixer, fused for a CPU: equal to the plain modules, which run where one looks in."""

from __future__ import annotations

import hashlib

import pytest
import torch
from fixtures import HAS_NUMBA
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labeler.base.errors import ModelError
from model.mixers.mamba import BidirectionalMamba
from model.ops import mixer_parts
from model.ops.mixer_parts import ReversedConv1d, conv_silu, gate

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
FUSED, PLAIN = "numba", "cpu"


def convs(width: int, window: int, dtype: torch.dtype, directions: int = 2) -> list[nn.Conv1d]:
    torch.manual_seed(width + window)
    kinds = (nn.Conv1d, ReversedConv1d)[:directions]
    return [kind(width, width, window, groups=width, padding=window - 1).to(dtype) for kind in kinds]


def convolution(x: torch.Tensor, modules: list[nn.Conv1d], backend: str) -> list[torch.Tensor]:
    """The result and the gradients of x, weights and biases."""
    x = x.detach().requires_grad_()
    u, parts = conv_silu(x, modules, backend)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(u, parts, strict=True))
    weight = torch.linspace(-1, 1, u.numel(), dtype=u.dtype).view_as(u)
    return [u, *torch.autograd.grad(u, [x, *(p for one in modules for p in one.parameters())], weight)]


def gating(y: torch.Tensor, z: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """The result and the gradients of y and z."""
    y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
    out = gate(y, z, 0.5, backend)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [y, z], weight)]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, i
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max(), i


@pytest.mark.parametrize("length", [1, 2, 3, 16, 31, 32, 33, 70, 197])
@pytest.mark.parametrize(("width", "window"), [(5, 4), (70, 4), (32, 2), (40, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_length_width_and_window_equals_the_plain_modules_in_float64(length, width, window, dtype):
    modules, x = convs(width, window, dtype), torch.randn(2, length, width, dtype=dtype)
    found = convolution(x, modules, FUSED)
    expected = convolution(x.double(), convs(width, window, dtype=torch.float64), PLAIN)
    assert_close(found, expected, 1e-12 if dtype == torch.float64 else 3e-6)
    y, z = torch.randn(2, 2, length, width, dtype=dtype), torch.randn(2, length, width, dtype=dtype)
    expected = gating(y.double(), z.double(), PLAIN)
    assert_close(gating(y, z, FUSED), expected, 1e-12 if dtype == torch.float64 else 3e-6)


def test_one_direction_alone():
    modules, x = convs(48, 4, torch.float64, 1), torch.randn(2, 20, 48, dtype=torch.float64)
    assert_close(convolution(x, modules, FUSED), convolution(x, modules, PLAIN), 1e-12)
    y, z = torch.randn(1, 2, 20, 48, dtype=torch.float64), torch.randn(2, 20, 48, dtype=torch.float64)
    assert_close(gating(y, z, FUSED), gating(y, z, PLAIN), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    modules, x = convs(40, 4, dtype), torch.randn(2, 30, 40).to(dtype)
    found = convolution(x, modules, FUSED)
    assert {one.dtype for one in found} == {dtype}
    wide = convs(40, 4, torch.float64)
    for ours, theirs in zip(wide, modules, strict=True):
        ours.load_state_dict(theirs.state_dict())
    assert_close(found, convolution(x.double(), wide, PLAIN), 2 * torch.finfo(dtype).eps)


def test_strides_and_threads_change_no_bit():
    modules, x = convs(96, 4, torch.float32), torch.randn(3, 70, 96)
    laid_out = torch.stack([x.mT.contiguous().mT] * 2, -1)[..., 0]
    before, found = torch.get_num_threads(), set()
    try:
        for threads, given in ((1, x), (2, x), (5, laid_out), (2, laid_out)):
            torch.set_num_threads(threads)
            all_of_it = [*convolution(given, modules, FUSED), *gating(torch.stack([given, given]), given, FUSED)]
            found.add(hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in all_of_it)).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_a_nan_stays_visible():
    modules, x = convs(40, 4, torch.float32), torch.randn(1, 40, 40)
    x[0, 20, 3] = torch.nan
    fused, plain = (convolution(x, modules, backend)[0].isnan() for backend in (FUSED, PLAIN))
    assert fused.sum() == 8
    assert torch.equal(fused, plain)
    assert torch.equal(gating(torch.stack([x, x]), x, FUSED)[0].isnan(), x.isnan())


def test_far_from_zero_silu_is_what_torch_has():
    x = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30]).view(1, 1, -1)
    one = torch.ones(1, *x.shape)
    assert torch.allclose(gate(one, x, 1.0, FUSED), gate(one, x, 1.0, PLAIN), rtol=1e-6, atol=1e-36)


def test_gradients_of_a_whole_mixer_agree_with_differences():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(6, d_state=2, backend=FUSED).double()
    assert torch.autograd.gradcheck(mixer, torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True))


def test_second_derivatives_are_refused():
    x = torch.randn(1, 4, 8, requires_grad=True)
    for result in (conv_silu(x, convs(8, 4, torch.float32), FUSED)[0], gate(x[None], x, 1.0, FUSED)):
        (first,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        with pytest.raises(ModelError, match='backend="reference"'):
            first.sum().backward()


def test_a_hook_an_adapter_or_a_flop_counter_sees_the_convolution(monkeypatch):
    called = []
    monkeypatch.setattr(mixer_parts, "_numba", lambda: called.append("fused") or pytest.fail("fused"))
    modules, x, seen = convs(16, 4, torch.float32), torch.randn(1, 6, 16), []
    handle = modules[1].register_forward_hook(lambda *_: seen.append("hook"))
    conv_silu(x, modules, FUSED)
    assert seen == ["hook"]
    handle.remove()
    with FlopCounterMode(display=False) as counter:
        conv_silu(x, modules, FUSED)
    assert counter.get_total_flops() > 0
    torch.func.grad(lambda one: conv_silu(one, modules, FUSED)[0].sum())(x)
    assert not called


def test_computed_weights_are_used():
    modules, x = convs(16, 4, torch.float64), torch.randn(1, 6, 16, dtype=torch.float64)
    torch.nn.utils.parametrizations.weight_norm(modules[0])
    with torch.no_grad():
        modules[0].parametrizations.weight.original0.mul_(3)
    assert_close(convolution(x, modules, FUSED), convolution(x, modules, PLAIN), 1e-12)
