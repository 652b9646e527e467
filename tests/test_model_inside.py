"""Looking inside a network: measures against formulas written out here, and parts that add up to the mixer's output.

Legend: L sequence length; E inner width; N state size; h×w token grid.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import model
from labeler import InputError
from model.backbones.hierarchical.mila_attention import on_map
from model.feature_maps import evaluation
from model.inside.flows import mixer_parts
from model.inside.look import look_inside
from model.inside.measures import BINS, forget_gate, input_weight, reach, spread
from model.inside.normalizers import results_of_mila
from model.inside.sites import sites_of
from model.mixers import create_mixer

WIDTH, LENGTH = 16, 9
HEADS = {"head_dim": 8, "d_state": 8}
DECAYING = {"input_gate": True, "forget_gate": "decay", "shortcut": True, "normalize": False}
MIXERS = {
    "mamba": {"d_state": 4},
    "mamba with layer scale, summed": {"d_state": 4, "layer_scale": 0.3, "halve": False},
    "mamba2": HEADS,
    "mamba3": HEADS,
    "demansia2": HEADS,
    "demansia2 as published": {**HEADS, "legacy": True},
    "linear_attention": {},
    "linear_attention with decay": DECAYING,
    "linear_attention beside an MLP": {"block": "transformer", "layer_scale": 0.5},
    "gated_conv": {},
    "attention": {"head_dim": 8},
}


def disturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module in evaluation mode, with random parts in all weights, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def tiny(depth: int = 2, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "num_classes": 5,
        "embed_dim": WIDTH,
        "depth": depth,
        "d_state": 4,
        "backend": "cpu",
    }
    return disturbed(timm.create_model("demansia_nano", **{**sizes, **settings}))


def image(side: int = 32) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))


def by_hand(mixer: torch.nn.Module, hidden: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    """dt [L, E], A [E, N] and B [L, N] of a direction of Mamba, channel by channel and tap by tap."""
    x = hidden[0] @ mixer.in_proj.weight.T[:, : mixer.d_inner]
    conv, taps = getattr(mixer, f"conv1d{name}"), mixer.conv1d.kernel_size[0]
    steps = x.flip(0) if name else x
    padded = torch.cat([torch.zeros(taps - 1, x.shape[1]), steps])
    u = F.silu(sum(padded[t : t + len(x)] * conv.weight[:, 0, t] for t in range(taps)) + conv.bias)
    u = u.flip(0) if name else u
    rank, n = mixer.dt_rank, mixer.d_state
    inner = u @ getattr(mixer, f"x_proj{name}").weight.T
    project = getattr(mixer, f"dt_proj{name}")
    dt = F.softplus(inner[:, :rank] @ project.weight.T + project.bias)
    return dt, -getattr(mixer, f"A{name}_log").exp(), inner[:, rank : rank + n]


def test_mamba_s_measures_are_those_of_the_formulas():
    net = tiny()
    seen: list[torch.Tensor] = []
    hook = net.layers[1].mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(image())
        hook.remove()
        mixer, layer = net.layers[1].mixer, look_inside(net, image()).layers[1]
        place = net.cls_position(17)
        rest = [i for i in range(17) if i != place]

        def as_map(values: torch.Tensor) -> torch.Tensor:
            return values[rest].reshape(4, 4)

        z = seen[0][0] @ mixer.in_proj.weight.T[:, mixer.d_inner :]
        torch.testing.assert_close(layer.gate, as_map(F.silu(z).mean(1)))
        assert [one.name for one in layer.directions] == ["forward", "backward"]
        for one, name in zip(layer.directions, ("", "_b"), strict=True):
            dt, a, b = by_hand(mixer, seen[0], name)
            kept = torch.exp(dt[:, :, None] * a)
            weight = (dt[:, :, None] * b[:, None, :]).abs().mean((1, 2))
            torch.testing.assert_close(one.step, as_map(dt.mean(1)))
            torch.testing.assert_close(one.input_weight, as_map(weight))
            mean = float(kept.double().mean())
            assert one.forget.mean == pytest.approx(mean, rel=1e-5)
            assert one.forget.reach == pytest.approx(-1 / math.log(mean), rel=1e-4)
            counts = [float(((kept >= i / BINS) & (kept < (i + 1) / BINS)).double().mean()) for i in range(BINS)]
            assert one.forget.histogram == pytest.approx(counts, abs=2 / kept.numel())


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("directions", ["both", "forward"])
def test_the_parts_of_a_mixer_add_up_to_its_output(name, directions):
    torch.manual_seed(1)
    mixer = disturbed(create_mixer(name.split()[0], WIDTH, directions=directions, **MIXERS[name]))
    hidden = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        parts, expected = mixer_parts(mixer, hidden), mixer(hidden)
    assert len(parts.flows) == len({flow.name for flow in parts.flows})
    torch.testing.assert_close(sum(flow.output for flow in parts.flows), expected, rtol=1e-4, atol=1e-5)
    for flow in parts.flows:
        for values in (flow.step, flow.log_decay, flow.input_weight):
            assert values is None or values.shape[:2] == (2, LENGTH)
        assert flow.log_decay is None or (flow.log_decay <= 0).all()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3", "demansia2", "linear_attention with decay"])
def test_a_token_s_values_stand_at_its_place_in_both_directions(name):
    """Without a convolution a token's values are its own: where one token changes, only its values do."""
    torch.manual_seed(1)
    without = {} if name == "mamba3" else {"d_conv": 1}
    mixer = disturbed(create_mixer(name.split()[0], WIDTH, **MIXERS[name], **without))
    hidden = torch.randn(1, LENGTH, WIDTH)
    other = hidden.clone()
    other[0, 2] += 1
    with torch.no_grad():
        parts = zip(mixer_parts(mixer, hidden).flows, mixer_parts(mixer, other).flows, strict=True)
    for one, two in parts:
        for part in ("step", "log_decay"):
            moved = (getattr(one, part) - getattr(two, part)).abs().amax(-1)[0]
            assert [i for i, value in enumerate(moved.tolist()) if value > 1e-6] == [2], (one.name, part)
        moved = (one.input_weight - two.input_weight).abs()[0]
        assert [i for i, value in enumerate(moved.tolist()) if value > 1e-6] == [2]


def test_a_direction_whose_way_out_is_zero_contributes_nothing():
    net = tiny()
    mixer = net.layers[0].mixer
    with torch.no_grad():
        mixer.D_b.zero_()
        mixer.x_proj_b.weight[-mixer.d_state :] = 0  # C: nothing of the states is read
    forward, backward = look_inside(net, image()).layers[0].directions
    assert backward.contribution.eq(0).all()
    assert (forward.share, backward.share) == (1, 0)
    assert forward.contribution.gt(0).all()
    with torch.no_grad():
        mixer.out_proj.weight.zero_()
    assert [one.share for one in look_inside(net, image()).layers[0].directions] == [0, 0]


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999])
def test_the_reach_of_a_constant_decay(decay):
    """A state is 1/e of itself after `reach` steps, and both means are the decay itself."""
    gate = forget_gate(torch.full((2, 7, 5), math.log(decay), dtype=torch.float64))
    assert decay**gate.reach == pytest.approx(1 / math.e)
    assert gate.long_reach == pytest.approx(gate.reach) == pytest.approx(reach(decay))
    assert gate.histogram[min(int(decay * BINS + 1e-9), BINS - 1)] == 1


def test_the_reach_at_both_ends():
    assert reach(1.0) == math.inf
    assert reach(0.0) == 0
    gate = forget_gate(torch.zeros(1, 3, 2))
    assert gate.reach == gate.long_reach == math.inf
    assert gate.histogram[-1] == gate.mean == 1
    assert forget_gate(torch.full((1, 3, 2), -1e4)).reach == 0


def test_one_state_in_ten_reaches_farther_than_the_long_reach():
    decays = torch.linspace(0.5, 0.95, 10, dtype=torch.float64)
    assert forget_gate(decays.log().expand(1, 4, 10)).long_reach == pytest.approx(reach(float(decays[8])))


def test_the_weight_of_a_token_is_the_mean_of_the_outer_product():
    step, b = torch.rand(2, 3, 4), torch.randn(2, 3, 5)
    torch.testing.assert_close(input_weight(step, b), (step[..., None] * b[..., None, :]).abs().mean((-1, -2)))


def test_lengths_are_those_before_and_behind_the_normalization():
    net = tiny()
    with torch.no_grad():
        x = net.layers[0](net.embed(image()))
        place = net.cls_position(17)
        normed = net.layers[1].norm(x)
        tokens, even = (torch.cat([one[0, :place], one[0, place + 1 :]]) for one in (x, normed))
    layer = look_inside(net, image()).layers[1]
    torch.testing.assert_close(layer.length.flatten(), tokens.pow(2).sum(1).sqrt())
    torch.testing.assert_close(layer.normed_length.flatten(), even.pow(2).sum(1).sqrt())
    told = spread(layer.length)
    assert told.mean == pytest.approx(float(tokens.norm(dim=1).mean()))
    assert told.std == pytest.approx(float(tokens.norm(dim=1).std(correction=0)))
    assert (told.least, told.most) == (float(layer.length.min()), float(layer.length.max()))


@pytest.mark.parametrize("name", ["demansia_nano", "mila_nano", "mambavision_nano"])
def test_the_classes_of_the_last_layer_are_those_of_the_token_head(name):
    torch.manual_seed(0)
    net = disturbed(timm.create_model(name, num_classes=5, img_size=64))
    inside = look_inside(net, image(64))
    with torch.no_grad():
        maps, logits = net.score_maps(image(64))[0].softmax(0), net(image(64))[0]
    torch.testing.assert_close(inside.logits, logits)
    last = inside.layers[-1]
    if name == "demansia_nano":
        assert all(layer.classes is not None for layer in inside.layers)
    torch.testing.assert_close(last.classes, maps.argmax(0))
    torch.testing.assert_close(last.probability, maps.amax(0))
    assert last.settled == 1
    first = next(layer for layer in inside.layers if layer.classes is not None)
    assert first.settled == pytest.approx(float((first.classes == last.classes).double().mean()))


def test_the_classes_of_a_layer_are_those_of_a_network_that_ends_there():
    net = tiny(depth=3)
    layer = look_inside(net, image()).layers[0]
    net.layers = net.layers[:1]
    with torch.no_grad():
        torch.testing.assert_close(layer.classes, net.score_maps(image())[0].argmax(0))


@pytest.mark.parametrize("name", ["mila_nano", "mambavision_nano"])
def test_the_parts_of_blocks_in_stages_add_up(name):
    torch.manual_seed(0)
    arguments = {"layer_scale": 0.5, "window_size": (2, 2, 2)} if name == "mambavision_nano" else {}
    net = disturbed(timm.create_model(name, num_classes=5, img_size=64, **arguments))
    for site in sites_of(net, (64, 64)):
        seen: list[torch.Tensor] = []
        hook = site.norm.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            net(image(64))
            hook.remove()
            block, normed = site.block, seen[0]
            added = sum(flow.output for flow in site.parts(normed).flows)
            if name == "mila_nano":
                attended = block.attn(F.silu(on_map(block.dwc, block.in_proj(normed))))
                expected = block.out_proj(attended * F.silu(block.act_proj(normed))) - block.out_proj.bias
            else:
                expected = block.mixer(normed) * block.gamma_1
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", ["both", "forward"])
@pytest.mark.parametrize("forget_gate_kind", ["decay", "rotary", "none"])
def test_attention_s_results_with_and_without_normalization(directions, forget_gate_kind):
    """Each of them is what an attention gives that was built to use it."""
    settings = {"forget_gate": forget_gate_kind, "input_gate": True, "directions": directions, "num_heads": 2}
    hidden = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
    lengths, results = {}, {}
    for normalize in (True, False):
        torch.manual_seed(1)
        mixer = disturbed(create_mixer("linear_attention", WIDTH, normalize=normalize, **settings))
        with torch.no_grad():
            x = mixer.in_proj(hidden).chunk(2, -1)[0]
            back = mixer.attentions[-1]
            y = back(x.flip(1)).flip(1) if len(mixer.attentions) > 1 else back(x)
            lengths[normalize], results[normalize] = y.norm(dim=-1), mixer_parts(mixer, hidden).flows[-1].results
    for told in results.values():
        torch.testing.assert_close(told.divided, lengths[True])
        torch.testing.assert_close(told.undivided, lengths[False])


def test_mila_s_results_with_and_without_normalization():
    torch.manual_seed(0)
    block = disturbed(timm.create_model("mila_nano", num_classes=5, img_size=64)).layers[1].blocks[0]
    x = torch.randn(1, 8, 8, 64)
    with torch.no_grad():
        told, attention = results_of_mila(block.attn, x), block.attn
        used = attention(x) - on_map(attention.lepe, x)
        q, k = (F.elu(attention.qk(x).flatten(1, 2)) + 1).unflatten(-1, (2, 2, 32)).unbind(2)
        weights = torch.einsum("bthd,bshd->bths", q, k).mean(-1)  # [B, T, H]
        plain = used.flatten(1, 2).unflatten(-1, (2, 32)) * weights.unsqueeze(-1)
    torch.testing.assert_close(told.divided, used.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.undivided.flatten(), plain.flatten(2).norm(dim=-1)[0], rtol=1e-4, atol=1e-4)


def test_maps_of_windows_are_put_together():
    """A picture that changes in its lower right corner alone changes the first windows' tokens there alone."""
    torch.manual_seed(0)
    net = disturbed(timm.create_model("mambavision_nano", num_classes=5, img_size=64, window_size=(1, 1, 1)))
    shape = {layer.length.shape for layer in look_inside(net, image(64)).layers}
    assert shape == {(8, 8), (4, 4)}
    other = image(64)
    other[..., 60:, 60:] += 3
    one, two = (look_inside(net, x).layers[0].length for x in (image(64), other))
    changed = (one - two).abs() > 1e-6
    assert changed[-1, -1]
    assert not changed[:4].any()
    assert not changed[:, :4].any()


@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
def test_the_backend_makes_no_difference(backend):
    if backend == "numba":
        pytest.importorskip("numba", reason="the extra train is not installed")
    one, two = (look_inside(tiny(backend=name), image()).layers[-1] for name in ("reference", backend))
    torch.testing.assert_close(one.length, two.length, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.directions[1].contribution, two.directions[1].contribution, rtol=1e-3, atol=1e-4)


def test_a_network_is_left_as_it_was():
    net = tiny().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    look_inside(net, image())
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with evaluation(net), torch.no_grad():
        torch.testing.assert_close(look_inside(net, image()).logits, net(image())[0])


def test_a_network_without_such_parts_is_refused():
    with pytest.raises(InputError) as refused:
        look_inside(timm.create_model("lvvit_s", img_size=32, depth=1, embed_dim=24, num_heads=2), image())
    assert str(refused.value) == (
        "this model has no parts to look into: got LVViT, expected DeMansia, DeMansia-2, Vim, MILA or MambaVision"
    )
    with pytest.raises(InputError, match=r"no parts to look into: got ResNet, "):
        look_inside(model.token_label("resnet10t", img_size=64), image(64))


def test_one_image_at_a_time():
    with pytest.raises(InputError, match=r"one image at a time: got \[2, 3, 32, 32\], expected \[1, "):
        look_inside(tiny(), image().repeat(2, 1, 1, 1))


def test_a_network_without_a_token_head_has_no_classes():
    assert [layer.classes for layer in look_inside(tiny(aux_head=False), image()).layers] == [None, None]
