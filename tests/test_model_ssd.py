"""Mamba-2's and Mamba-3's operators and mixers: matrix products against steps, gradients, symmetry, edges.

Legend: B images; L length; H heads; P head width; N state size; G groups; D model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from labeler.base.errors import ModelError
from model.mixers import Mixer, create_mixer
from model.mixers.attention import rotate_positions
from model.ops import ssd_chunked, ssd_reference, ssd_scan, trapezoid_reference, trapezoid_ssd
from model.ops.ssd import rotate_pairs

LENGTHS = (1, 2, 17, 197)
SMALL: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 6, "head_dim": 8},
    "mamba3": {"d_state": 8, "head_dim": 8},
    "demansia2": {"d_state": 6, "head_dim": 8},
    "attention": {"head_dim": 4, "rotary_dim": 2, "d_conv": 3},
}
BY_STATES = ("mamba2", "mamba3", "demansia2")


def mixer(name: str, **changes: Any) -> Any:
    """A float64 mixer of width 8, all of whose parameters were moved from where they begin."""
    torch.manual_seed(0)
    net = create_mixer(name, 8, **{**SMALL[name], **changes}).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def tokens(length: int, batch: int = 2, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def inputs(length: int, groups: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """x [2, L, 4, 3], log_decay [2, L, 4], B and C [2, L, G, 5] in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, b, c = (
        torch.randn(2, length, *size, dtype=torch.float64, generator=generator)
        for size in ((4, 3), (groups, 5), (groups, 5))
    )
    decay = -2 * torch.rand(2, length, 4, dtype=torch.float64, generator=generator)
    return [part.requires_grad_() for part in (x, decay, b, c)]


def turning(length: int) -> list[torch.Tensor]:
    """x [2, L, 3, 4], step, log_decay and share [2, L, 3], turn [2, L, 3, 2], B and C [2, L, 3, 6] in float64."""
    generator = torch.Generator().manual_seed(length)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(2, length, 3, *size, dtype=torch.float64, generator=generator)

    parts = [draw(4) - 0.5, draw(), -draw(), draw(), 6 * draw(2) - 3, draw(6) - 0.5, draw(6) - 0.5]
    return [part.requires_grad_() for part in parts]


def same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 1e-11) -> None:
    for first, second in zip(one, other, strict=True):
        assert (first - second).abs().max() <= tolerance * (1 + second.abs().max())


def with_gradients(y: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((y * weights).sum(), given, allow_unused=True, materialize_grads=True)
    return [y, *gradients]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_give_what_steps_give(length, groups):
    given = inputs(length, groups)
    expected = with_gradients(ssd_reference(*given), given)
    for chunk in (2, 5, 16, 64, 256):
        same(with_gradients(ssd_chunked(*given, chunk), given), expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_trapezoid_that_turns_gives_what_its_steps_give(length):
    given = turning(length)
    expected = with_gradients(trapezoid_reference(*given), given)
    same(with_gradients(trapezoid_ssd(*given), given), expected)


def test_gradients_are_those_of_finite_differences():
    given = inputs(5, 2)
    assert torch.autograd.gradcheck(ssd_reference, given)
    assert torch.autograd.gradcheck(lambda *parts: ssd_chunked(*parts, chunk=2), given)
    assert torch.autograd.gradcheck(trapezoid_ssd, turning(4))


def test_one_state_of_ones_is_a_decaying_sum():
    x = torch.tensor([1.0, 0, 0, 2]).view(4, 1, 1)
    ones, half = torch.ones(4, 1, 1), torch.full((4, 1), 0.5).log()
    for operator in (ssd_reference, ssd_chunked, lambda *parts: ssd_chunked(*parts, chunk=3)):
        assert operator(x, half, ones, ones).flatten().tolist() == pytest.approx([1, 0.5, 0.25, 2.125])


def test_a_long_past_costs_no_precision():
    """In float32 the decay between near steps is right, though the sum of all decays before them is large."""
    x, decay, b, c = (part.detach() for part in inputs(197))
    decay = decay / 200
    decay[:, :40] = -60
    exact = ssd_reference(x, decay, b, c)
    for chunk in (64, 256):
        found = ssd_chunked(x.float(), decay.float(), b.float(), c.float(), chunk)
        assert (found - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    exact = [part.detach().to(dtype).double() for part in inputs(197)]
    found = ssd_chunked(*(part.to(dtype) for part in exact), chunk=64)
    assert found.dtype == dtype
    expected = ssd_reference(*exact)
    assert (found.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_leading_dimensions_are_free():
    given = [part.detach() for part in inputs(17)]
    one = ssd_chunked(*(part[0] for part in given), chunk=5)
    assert torch.allclose(one, ssd_chunked(*given, chunk=5)[0])
    many = ssd_chunked(*(part[None].expand(3, *part.shape) for part in given), chunk=5)
    assert torch.allclose(many[2], ssd_chunked(*given, chunk=5))
    none = [part[:0] for part in given]
    assert ssd_chunked(*none).shape == (0, 17, 4, 3)


def test_rotations_turn_pairs_and_leave_the_rest():
    found = rotate_pairs(torch.tensor([1.0, 0, 0, 1, 5, 7]), torch.tensor([torch.pi / 2, torch.pi]))
    assert found.tolist() == pytest.approx([0, 1, 0, -1, 5, 7], abs=1e-6)
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    turned = rotate_positions(x, 4)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.allclose(turned[..., 0, :], x[..., 0, :])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    same_vector = rotate_positions(x[..., :1, :].expand_as(x), 4)
    by_distance = same_vector @ same_vector.mT  # only the distance of two places counts
    assert torch.allclose(by_distance.diagonal(1, -2, -1), by_distance[..., :1, 1].expand(1, 2, 4))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", BY_STATES)
def test_a_mixer_by_matrix_products_is_the_one_by_steps(name, length):
    results = []
    for backend in ("chunked", "reference"):
        net, x = mixer(name, backend=backend), tokens(length).requires_grad_()
        results.append(with_gradients(net(x), [x, *net.parameters()]))
    same(*results)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "mamba"])
def test_a_mixers_gradients_are_those_of_finite_differences(name):
    net = mixer(name)
    assert torch.autograd.gradcheck(net, [tokens(5, 1).requires_grad_()])
    values = {key: value.detach().requires_grad_() for key, value in net.named_parameters()}
    x = tokens(3, 1)

    def run(*parts: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(values, parts, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, list(values.values()), fast_mode=True)


def swapped(name: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters with those of the two directions exchanged."""
    old = net.state_dict()
    new = dict(old)
    for key in old:
        first, *rest = key.split(".")
        other = ".".join([f"{first}_b", *rest])
        if other in old and first != "in_proj":
            new[key], new[other] = old[other], old[key]
    if "in_proj_b.weight" in old:  # the first direction's own part comes last
        whole, own = old["in_proj.weight"], old["in_proj_b.weight"]
        new["in_proj.weight"] = torch.cat([whole[: -len(own)], own])
        new["in_proj_b.weight"] = whole[-len(own) :]
    return new


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("name", BY_STATES)
def test_swapped_directions_turn_the_sequence_around(name, length):
    net, turned = mixer(name), mixer(name)
    turned.load_state_dict(swapped(name, net))
    x = tokens(length)
    same([turned(x.flip(1)).flip(1)], [net(x)])
    if length > 1:
        assert (net(x.flip(1)).flip(1) - net(x)).abs().max() > 1e-3  # the directions differ


@pytest.mark.parametrize("name", SMALL)
def test_directions_are_one_switch(name):
    """With "both" each token hears from all, with "forward" from itself and those before; the `_b` are left away."""
    for directions, later in (("both", True), ("forward", False)):
        net = mixer(name, directions=directions)
        assert isinstance(net, Mixer)
        assert net.no_weight_decay() <= {key for key, _ in net.named_parameters()}
        has_second = any("_b_" in f"{key.split('.')[0]}_" for key, _ in net.named_parameters())
        assert has_second == (later and name != "attention")
        x = tokens(7, 1).requires_grad_()
        for place in range(7):
            (gradient,) = torch.autograd.grad(net(x)[0, place].square().sum(), x)
            heard = gradient[0].abs().sum(1) > 1e-12  # what is added and taken away again leaves its rounding
            assert heard[: place + 1].all()
            assert later or not heard[place + 1 :].any()
            assert not later or heard.all()
    with pytest.raises(ModelError, match='unknown directions: got \'backward\', expected "both" or "forward"'):
        mixer(name, directions="backward")


@pytest.mark.parametrize("name", SMALL)
def test_images_of_a_batch_do_not_mix(name):
    net, x = mixer(name), tokens(17, 3)
    every = net(x)
    for i in range(3):
        same([net(x[i : i + 1])[0]], [every[i]])
    assert net(x[:0]).shape == (0, 17, 8)


@pytest.mark.parametrize("name", SMALL)
def test_projections_are_called_as_modules(name):
    """So that LoRA, which wraps them, is not ignored in silence."""
    net, called = mixer(name), []
    kinds = (nn.Linear, nn.Conv1d, nn.RMSNorm)
    names = [key for key, module in net.named_modules() if isinstance(module, kinds)]
    for key in names:
        net.get_submodule(key).register_forward_hook(lambda *_, key=key: called.append(key))
    net(tokens(5))
    assert sorted(called) == sorted(names)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_near_float32(name):
    torch.manual_seed(0)
    net = create_mixer(name, 64, **{**SMALL[name], "head_dim": 16} if name != "mamba" else {})
    x = torch.randn(2, 33, 64)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    half = net.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", SMALL)
def test_a_model_takes_the_mixer_by_its_name(name):
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_classes": 3}
    net = timm.create_model("demansia_nano", mixer=name, mixer_options=SMALL[name], directions="forward", **settings)
    assert {type(layer.mixer) for layer in net.layers} == {type(create_mixer(name, 16, **SMALL[name]))}
    cls, aux = net.train()(torch.randn(2, 3, 32, 32))
    (cls.sum() + aux.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_layers_may_have_other_mixers():
    others = {1: ("attention", {"head_dim": 4}), 2: ("mamba3", SMALL["mamba3"])}
    net = timm.create_model("demansia_nano", img_size=32, embed_dim=16, depth=4, d_state=4, layer_mixers=others)
    kinds = [type(layer.mixer).__name__ for layer in net.layers]
    assert kinds == ["BidirectionalMamba", "AttentionMixer", "BidirectionalMamba3", "BidirectionalMamba"]
    assert net.layers[3].mixer.A_log.shape == (32, 4)
    with pytest.raises(ModelError, match="a mixer for a layer that does not exist: got layer -1, expected 0 to 3"):
        timm.create_model("demansia_nano", depth=4, layer_mixers={-1: ("attention", {})})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("mamba2", {"head_dim": 5}, "the heads do not fill the inner width: got head_dim=5 for 16 channels"),
        ("mamba3", {"head_dim": 0}, "the heads do not fill the inner width: got head_dim=0 for 16 channels"),
        ("mamba3", {"rotated": 0.25}, "no pair of states turns: got rotated=0.25, d_state=8, expected 0.5 or 1"),
        ("mamba3", {"d_state": 3}, "no pair of states turns: got rotated=0.5, d_state=3"),
        ("mamba3", {"d_conv": 4}, "the mixer 'mamba3' has no such option: got 'd_conv'"),
        ("mamba2", {"d_sate": 4}, "the mixer 'mamba2' has no such option: got 'd_sate'. Did you mean 'd_state'?"),
        ("attention", {"head_dim": 3}, "the heads do not fill the width: got head_dim=3 for 8 channels"),
        ("attention", {"rotary_dim": 6}, "rotary_dim does not fit: got 6, expected an even number up to 4"),
    ],
)
def test_bad_options_are_told_in_one_line(name, options, told):
    with pytest.raises(ModelError) as refusal:
        mixer(name, **options)
    assert str(refusal.value).startswith(told)
    assert "\n" not in str(refusal.value)


def test_shapes_that_do_not_fit_are_told_in_one_line():
    x, decay, b, c = (part.detach() for part in inputs(5, 2))
    wrong = [
        (x, decay[:, :4], b, c),
        (x, decay, b[:, :4], c),
        (x, decay, b, c[..., :4]),
        (x[:, :, :3], decay[:, :, :3], b, c),
        (x[:, :0], decay[:, :0], b[:, :0], c[:, :0]),
        (x[0, 0], decay[0, 0], b[0, 0], c[0, 0]),
    ]
    for given in wrong:
        for operator in (ssd_reference, ssd_chunked):
            with pytest.raises(ModelError, match=r"x, log_decay, B and C do not fit together: got \[.*expected \[…, L"):
                operator(*given)
    with pytest.raises(ModelError, match="a chunk holds no step: got chunk = 0"):
        ssd_chunked(x, decay, b, c, 0)
    with pytest.raises(ModelError, match="unknown backend: got 'triton', expected one of auto, chunked, reference"):
        ssd_scan(x, decay, b, c, "triton")
