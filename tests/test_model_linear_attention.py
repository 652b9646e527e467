"""The mixers "linear_attention" and "gated_conv": fast against plain, derivatives, directions, lengths; in a model.

Legend: B images; L sequence length; D width; H heads; N state size; P width of a head's values.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch

from labeler.base.errors import ModelError
from model import create_mixer
from model.mixers import LinearAttentionMixer, Mixer
from model.mixers.gated_conv import TokenConv
from model.mixers.linear_attention import CHUNK, attend, attend_reference, rotate_along
from model.summary import summarize

WIDTH = 8
MAMBA = {"input_gate": True, "forget_gate": "decay", "shortcut": True, "normalize": False, "num_heads": 1}
TRANSFORMER = {"forget_gate": "none", "num_heads": 2, "block": "transformer"}
DESIGNS: dict[str, dict[str, Any]] = {
    "mila": {},
    "mamba": MAMBA,
    "transformer": TRANSFORMER,
    "decay, normalized, two heads": {"forget_gate": "decay", "num_heads": 2},
    "rotary, forward": {"directions": "forward", "num_heads": 2},
    "all": {**MAMBA, "num_heads": 4, "normalize": True, "layer_scale": 0.5, "halve": False},
}


def mixer_of(design: str, **changes: Any) -> LinearAttentionMixer:
    torch.manual_seed(0)
    mixer = LinearAttentionMixer(WIDTH, **{"d_state": 4, "dt_rank": 2, **DESIGNS[design], **changes}).double()
    for name, parameter in mixer.named_parameters():
        if name.endswith(("D", "forget.bias")):  # away from their beginnings, which two directions may share
            torch.nn.init.normal_(parameter)
    return mixer


def sequence(length: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("form", ["all to all", "causal", "decaying"])
def test_chunks_are_the_same_as_token_by_token(form, length):
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(2, 3, length, n, generator=generator, dtype=torch.float64) for n in (4, 4, 5)]
    if form == "decaying":
        made.append(torch.randn(2, 3, length, generator=generator, dtype=torch.float64).exp().neg())
    weights = torch.randn(2, 3, length, 5, generator=generator, dtype=torch.float64)
    results = []
    for function in (attend, attend_reference):
        inputs = [part.clone().requires_grad_() for part in made]
        y = function(*inputs[:3], inputs[3] if form == "decaying" else None, form != "all to all")
        (y * weights).sum().backward()
        results.append([y, *(part.grad for part in inputs)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_states_that_are_forgotten_at_once_leave_a_token_to_itself():
    q, k, v = torch.rand(3, 1, 1, 2 * CHUNK, 3, dtype=torch.float64).unbind(0)
    y = attend(q, k, v, torch.full((1, 1, 2 * CHUNK), -1e4, dtype=torch.float64), True)
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("length", [1, 5])
def test_derivatives(design, length):
    mixer = mixer_of(design)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (sequence(length, 1).requires_grad_(), *(value.detach().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("length", [1, 2, 7, CHUNK + 1])
def test_the_plain_backend_gives_the_same(design, length):
    mixer, plain = mixer_of(design), mixer_of(design, backend="reference")
    plain.load_state_dict(mixer.state_dict())
    results = []
    for one in (mixer, plain):
        x = sequence(length).requires_grad_()
        y = one(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("design", ["mamba", "decay, normalized, two heads", "all"])
def test_swapped_directions_turn_the_sequence_around(design):
    mixer, turned = mixer_of(design), mixer_of(design)
    other = {"attentions.0": "attentions.1", "attentions.1": "attentions.0"}
    swapped = {other.get(name[:12], name[:12]) + name[12:]: value for name, value in mixer.state_dict().items()}
    turned.load_state_dict(swapped)
    x = sequence(9)
    torch.testing.assert_close(turned(x.flip(1)).flip(1), mixer(x))
    assert not torch.allclose(mixer(x.flip(1)).flip(1), mixer(x))


def test_attention_without_a_forget_gate_has_no_direction():
    """In a transformer's block not even an order: tokens that change places keep what they get."""
    mixer, x = mixer_of("transformer"), sequence(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order])
    in_mambas_block = mixer_of("mila", forget_gate="none")  # its convolution knows the neighbors
    in_mambas_block.attentions[0].conv1d.weight.data.copy_(in_mambas_block.attentions[0].conv1d.weight.data.flip(-1))
    plain = mixer_of("mila", forget_gate="none")
    torch.testing.assert_close(in_mambas_block(x.flip(1)).flip(1), plain(x))


def hears(mixer: torch.nn.Module, length: int = 6) -> torch.Tensor:
    """bool [L, L]: whether a token's output depends on another token."""
    x = sequence(length, 1).requires_grad_()
    rows = [torch.autograd.grad(mixer(x)[0, t].square().sum(), x)[0][0].abs().sum(-1) > 0 for t in range(length)]
    return torch.stack(rows)


@pytest.mark.parametrize("design", DESIGNS)
def test_tokens_hear_all_others_or_those_before_them(design):
    assert hears(mixer_of(design, directions="both")).all()
    forward = hears(mixer_of(design, directions="forward"))
    assert torch.equal(forward, torch.ones(6, 6, dtype=torch.bool).tril())


def test_normalized_weights_sum_to_one():
    """So values that are all the same come out as they are, whatever the gate forgets."""
    mixer = mixer_of("decay, normalized, two heads")
    attention = mixer.attentions[0]
    attention.conv1d = None
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 30, 16)
    torch.testing.assert_close(attention(x), x, rtol=1e-5, atol=1e-5)


def test_rotations_make_products_depend_on_the_distance():
    q, k = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = rotate_along(q.expand(1, 9, 12))[0] @ rotate_along(k.expand(1, 9, 12))[0].T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert len({round(float(value), 6) for value in products[0]}) == 9


def test_each_design_is_a_switch_that_changes_the_answer():
    x, answers = sequence(7), []
    for switch in ({}, {"input_gate": True}, {"forget_gate": "decay"}, {"forget_gate": "none"}, {"shortcut": True},
                   {"normalize": False}, {"num_heads": 2}, {"block": "transformer"}):  # fmt: skip
        answers.append(mixer_of("mila", **switch)(x))
    for one, other in itertools.combinations(answers, 2):
        assert not torch.allclose(one, other)


def test_both_blocks_have_about_as_many_parameters():
    sizes = [
        sum(p.numel() for p in LinearAttentionMixer(192, block=block, forget_gate="none").parameters())
        for block in ("mamba", "transformer")
    ]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_a_convolution_is_centered_or_causal(taps):
    for causal in (False, True):
        conv = TokenConv(WIDTH, taps, causal).double()
        reach = {int(d) for t, s in hears(conv, 9).nonzero().tolist() for d in (s - t,)}
        half = (taps - 1) // 2
        assert reach == (set(range(1 - taps, 1)) if causal else set(range(-half, half + 1)))
        assert conv(sequence(1)).shape == (2, 1, WIDTH)


def test_a_gated_convolution_is_a_mixer_without_a_state():
    for directions in ("both", "forward"):
        torch.manual_seed(0)
        mixer = create_mixer("gated_conv", WIDTH, d_conv=3, directions=directions)
        assert isinstance(mixer, Mixer)
        near = hears(mixer.double(), 9)
        both = torch.ones(9, 9, dtype=torch.bool).tril(1).triu(-1)
        assert torch.equal(near, both if directions == "both" else torch.ones(9, 9, dtype=torch.bool).tril().triu(-2))
    x = sequence(3, 1).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_gate": "decays"}, r"got forget_gate='decays'.*expected forget_gate one of decay, rotary, none"),
        ({"block": "vit"}, r"block='vit'.*block one of mamba, transformer"),
        ({"num_heads": 3}, "got num_heads=3, d_state=16 for 16 channels, expected a divisor"),
        ({"d_state": 3, "num_heads": 1}, "an even number of rotated channels"),
        ({"directions": "backward"}, 'unknown directions: got \'backward\', expected "both" or "forward"'),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, message):
    with pytest.raises(ModelError, match=message) as caught:
        LinearAttentionMixer(WIDTH, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no taps"):
        create_mixer("gated_conv", WIDTH, d_conv=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("design", DESIGNS)
def test_low_precision_is_near(design, dtype):
    mixer, x = mixer_of(design).float(), sequence(40).float()
    expected = mixer(x)
    with torch.autocast("cpu", dtype):
        found = mixer(x)
    whole = mixer.to(dtype)(x.to(dtype))
    assert whole.dtype == dtype
    for y in (found, whole):
        assert (y.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", ["mila", "mamba", "transformer", "gated_conv"])
def test_a_model_trains_with_it_by_its_name(name):
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_classes": 3, "patch_size": 8}
    mixer = "gated_conv" if name == "gated_conv" else "linear_attention"
    options = {} if name == "gated_conv" else DESIGNS[name]
    net = timm.create_model("demansia_nano", mixer=mixer, mixer_options=options, **settings)
    images = torch.randn(2, 3, 32, 32)
    cls, aux = net.train()(images)
    (cls.square().sum() + aux.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    marked = {part for part in net.no_weight_decay() if "mixer" in part}
    assert len(marked) == (4 if name == "mamba" else 0)  # D of two directions, in two layers
    net.eval()
    exported = torch.export.export(net, (images,))
    torch.testing.assert_close(exported.module()(images), net(images))
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images[:1]), net(images[:1]))


def test_the_summary_counts_its_products():
    @timm.models.register_model
    def attending(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        given = {key: kwargs[key] for key in ("img_size", "num_classes") if key in kwargs}
        fixed = {"embed_dim": 16, "depth": 2, "mixer": "linear_attention", "mixer_options": TRANSFORMER}
        return timm.create_model("demansia_nano", **fixed, **given)

    macs = summarize("attending", (32,), 3).costs[0].macs
    width, inner, tokens, state = 16, 32, 4 + 1, 16
    linear = width * inner + inner * 2 * 2 * state + inner * width + 2 * width * inner // 2
    attention = 2 * (inner * state + 2 * state)  # values and normalizer: keys by values, then queries by that
    assert macs["layers"] == 2 * tokens * (linear + attention)
