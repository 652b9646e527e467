"""DeMansia-2 against the published one: outputs, intermediates, gradients, names and counts; and what it does right.

Legend: B images; C classes; T tokens; L = T + 1.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from fixtures import SOURCES, close, keys, state, tensors
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model import load_reference_checkpoint, token_label
from model.backbones.demansia import DeMansia
from model.backbones.demansia2 import DeMansia2, trained_as_legacy

GRID = (4, 4)
MICRO = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_classes": 10, "head_dim": 16, "d_state": 16}
MICRO |= {"attention_layers": (1,), "attention_heads": 2, "attention_head_dim": 24, "rotary_dim": 12}
SMALLEST = {key: value for key, value in MICRO.items() if key != "num_classes"}
UNUSED = {f"layers.{i}.mixer.D_b" for i in (0, 2)}  # by the published behavior


def micro(found: dict[str, torch.Tensor] | None = None, **settings: Any) -> DeMansia2:
    torch.manual_seed(0)
    net = DeMansia2(**{**MICRO, "legacy": True, **settings})
    if found is not None:
        net.load_state_dict(state(found))
    return net


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(backend, dtype, source):
    found = tensors("demansia2_micro", source)
    net = micro(found, backend=backend).eval().to(dtype)
    x = found["x"].to(dtype)

    def check(value: torch.Tensor, name: str) -> None:
        if dtype == torch.float64 and f"{name}_f64" in found:
            close(value, found[f"{name}_f64"], 1e-12)
        else:
            close(value, found[name], 1e-5)

    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    sums: list[torch.Tensor] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0]))
        layer.mixer.register_forward_hook(lambda _, __, output: steps.append((output, sums[-1])))
    check(net(x), "eval.out")
    check(net.forward_features(x), "eval.features")
    check(net.patch_embed(x), "mid.patch_embed")
    for i, (hidden, residual) in enumerate(steps[: len(net.layers)]):
        check(hidden, f"mid.layers.{i}.hidden")
        check(residual, f"mid.layers.{i}.residual")


@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilons_are_the_published_ones(source):
    found = tensors("demansia2_micro", source)
    for dtype, name, tolerance in ((torch.float32, "out", 1e-5), (torch.float64, "out_f64", 1e-12)):
        net = micro(found).eval().to(dtype)
        with torch.no_grad():
            for tensor in (net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.pos_embed, net.cls_token):
                tensor.mul_(0.005)
        close(net(found["x"].to(dtype)), found[f"eval_small.{name}"], tolerance)


@pytest.mark.parametrize("source", SOURCES)
def test_a_mixer_alone_is_the_published_one(source):
    """Both directions, their mean, and what the sequence turned around gives in place of the channels."""
    found = tensors("demansia2_micro", source)
    mixer, parts = micro(found).double().layers[0].mixer, []
    mixer.out_proj.register_forward_hook(lambda _, __, out: parts.append(out))
    mixer.out_proj_b.register_forward_hook(lambda _, __, out: parts.append(out))
    u = found["mixer.u"].double()
    close(mixer(u), found["mixer.out_f64"], 1e-12)
    close(mixer.float()(found["mixer.u"]), found["mixer.out"], 1e-5)
    close(parts[2], found["mixer.out_forward_direction"], 1e-5)
    close(parts[3], found["mixer.out_b_before_unflip"], 1e-5)
    turned = micro(found, legacy=False).layers[0].mixer
    turned.D_b.data.copy_(turned.D)  # the published one has one D for both
    close(turned(found["mixer.u"]), found["mixer.out_if_sequence_flip_were_used"], 1e-5)


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("source", SOURCES)
def test_training_outputs_loss_and_gradients_are_the_published_ones(backend, source):
    found = tensors("demansia2_micro", source)
    net = micro(found, backend=backend).train()
    y0, x0, y1, x1 = found["train.box_a.box"].tolist()
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    inside = inside.flatten()
    x = found["x"].clone().requires_grad_()
    cls, aux = net(x, SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1))
    aux = torch.where(inside[:, None], aux.flip(0), aux)  # the published model gives mixed tokens' logits back
    close(cls, found["train.box_a.x_cls"], 1e-5)
    close(aux, found["train.box_a.x_aux"], 1e-5)
    target, lam = found["target"], 1 - inside.float().mean()
    own, partner = target[..., 1], target[..., 1].flip(0)
    loss = lam * soft_cross_entropy(cls, own) + (1 - lam) * soft_cross_entropy(cls, partner)
    loss = loss + soft_cross_entropy(aux, target[..., 2:].mT)
    close(loss, found["train.box_a.loss"], 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5)
    for name, parameter in net.named_parameters():
        if name in UNUSED:
            assert parameter.grad is None
        else:
            close(parameter.grad, found[f"grad.{name}"], 5e-5, 1e-8)


def test_names_shapes_counts_and_marks_are_the_published_ones():
    expected = keys("demansia2_tiny")
    with torch.device("meta"):
        net, small = timm.create_model("demansia2_tiny"), timm.create_model("demansia2_small")
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
    assert sum(p.numel() for p in net.parameters()) == expected["total_params"] == 9_514_032
    assert net.no_weight_decay() == {*expected["flag_no_weight_decay"], "pos_embed", "cls_token"}
    assert sum(p.numel() for p in small.parameters()) == 32_746_032
    assert (small.embed_dim, len(small.layers), small.layers[20].mixer.num_heads) == (384, 24, 6)
    assert {layer.drop_path.drop_prob for layer in (*net.layers, *small.layers)} == {0.0}


def test_it_begins_where_the_published_one_begins():
    """Spread and range of every parameter; of the few values of heads, the range over all layers."""
    torch.manual_seed(0)
    net, published = timm.create_model("demansia2_tiny", legacy=True), keys("demansia2_tiny")
    of_heads = collections.defaultdict(list)
    for name, (_, std, low, high) in published["init_mean_std_min_max_seed0"].items():
        if "running" in name:
            continue
        parameter = net.get_parameter(name).detach()
        if parameter.numel() == 8:
            of_heads[name.split(".")[-1]].append((low, high, *parameter.aminmax()))
            continue
        assert parameter.std().item() == pytest.approx(std, rel=0.12, abs=1e-6), name
        margin = 0.3 * (high - low) + 1e-6
        assert low - margin <= parameter.min() <= parameter.max() <= high + margin, name
    assert of_heads.keys() == {f"{part}{name}" for part in ("dt_bias", "A_log", "D") for name in ("", "_b")}
    for name, ranges in of_heads.items():
        low, high, own_low, own_high = torch.tensor(ranges).mT
        assert abs(own_low.min() - low.min()) < 0.4, name  # of 176 values
        assert abs(own_high.max() - high.max()) < 0.1, name


@pytest.mark.parametrize(("legacy", "expected"), [(False, 1.0), (True, 3**-0.5)])
def test_the_second_direction_begins_as_small_as_the_first(legacy, expected):
    """Unless it is as published, where only the first is divided by √depth."""
    mixer = micro(legacy=legacy).layers[0].mixer
    ratio = mixer.out_proj.weight.std() / mixer.out_proj_b.weight.std()
    assert ratio.item() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "later"),
    [
        ({"legacy": False, "attention_layers": ()}, True),
        ({"legacy": True, "attention_layers": ()}, False),
        ({"legacy": True}, True),
        ({"legacy": False, "directions": "forward"}, False),
    ],
)
def test_tokens_hear_from_later_ones_unless_it_is_as_published(settings, later):
    """As published, by attention alone."""
    net = micro(**settings).eval()
    x = torch.randn(1, 17, 32, requires_grad=True)
    hidden = x
    for layer in net.layers:
        hidden = layer(hidden)
    (gradient,) = torch.autograd.grad(hidden[0, 5].square().sum(), x)
    heard = gradient[0].abs().sum(1) > 0
    assert heard[:6].all()
    assert heard[6:].any() == later


def lightning(weights: dict[str, torch.Tensor], **settings: Any) -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.2.0",
        "state_dict": collections.OrderedDict(weights),
        "hyper_parameters": {"dtype": torch.float32, "img_size": (64, 64), **settings},
    }


def test_its_lightning_file_is_loaded(tmp_path):
    """The settings beside the weights say what no shape shows: the heads of the attention."""
    found, path = tensors("demansia2_micro"), tmp_path / "demansia2.ckpt"
    attention = {"causal": False, "d_conv": 4, "head_dim": 24, "num_heads": 2, "rotary_emb_dim": 12}
    torch.save(lightning(state(found), attn_cfg=attention), path)
    net = load_reference_checkpoint(path)
    assert type(net) is DeMansia2
    assert not net.training
    close(net(found["x"]), found["eval.out"], 1e-5)
    torch.save(lightning(state(found)), path)
    with pytest.raises(ModelError, match=r"heads of the attention in .* are unknown: got 48 channels.*Pass model="):
        load_reference_checkpoint(path)
    net = load_reference_checkpoint(path, micro())
    close(net(found["x"]), found["eval.out"], 1e-5)


def test_the_published_size_is_told_by_its_shapes(tmp_path):
    torch.manual_seed(0)
    first = timm.create_model("demansia2_tiny", num_classes=7, img_size=32, legacy=True).eval()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    net, x = load_reference_checkpoint(tmp_path / "a.ckpt"), torch.randn(2, 3, 32, 32)
    assert net.pretrained_cfg["architecture"] == "demansia2_tiny"
    assert torch.equal(net(x), first(x))
    one = DeMansia(img_size=32, embed_dim=16, depth=1, num_classes=3)
    torch.save(one.state_dict(), tmp_path / "b.ckpt")
    assert type(load_reference_checkpoint(tmp_path / "b.ckpt")) is DeMansia


def trained(legacy: bool) -> DeMansia2:
    """One step, after which the skip connections that the model uses are no longer 1."""
    net = micro(legacy=legacy).train()
    cls, _ = net(torch.randn(2, 3, 64, 64))
    cls.square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    return net


def test_weights_tell_which_second_direction_they_were_trained_with(tmp_path, caplog):
    """The published one never uses its own D: loaded into the other form they answer otherwise, so it says so."""
    published, both = trained(legacy=True), trained(legacy=False)
    for net, told in ((published, True), (both, False), (micro(), None)):
        assert trained_as_legacy(net.state_dict()) is told
    micro().load_state_dict(published.state_dict())
    micro(legacy=False).load_state_dict(both.state_dict())
    micro(legacy=False).load_state_dict(micro().state_dict())
    assert not caplog.records
    micro(legacy=False).load_state_dict(published.state_dict())
    torch.save(published.state_dict(), tmp_path / "published.pt")
    load_reference_checkpoint(tmp_path / "published.pt", micro(legacy=False))
    assert ["expected legacy=True" in record.message for record in caplog.records] == [True, True]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_is_loaded_in_the_form_that_it_was_trained_in(legacy, tmp_path, caplog):
    torch.manual_seed(0)
    net = timm.create_model("demansia2_tiny", num_classes=3, img_size=32, depth=1, legacy=legacy).train()
    cls, _ = net(torch.randn(2, 3, 32, 32))
    cls.square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_reference_checkpoint(tmp_path / "a.pt")(x), net.eval()(x))
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head_dim": 48}, "the heads do not fill the inner width: got head_dim=48 for 64 channels"),
        ({"attention_layers": (3,)}, "a mixer for a layer that does not exist: got layer 3, expected 0 to 2"),
        ({"rotary_dim": 13}, "rotary_dim does not fit: got 13, expected an even number up to 24"),
        ({"directions": "back"}, 'unknown directions: got \'back\', expected "both" or "forward"'),
        ({"backend": "fast"}, "unknown backend: got 'fast', expected one of auto, chunked, reference"),
        ({"dt_rank": 3}, "the mixer 'demansia2' has no such option: got 'dt_rank'"),
    ],
)
def test_bad_settings_are_told_in_one_line(settings, told):
    with pytest.raises(ModelError) as refusal:
        micro(**settings)(torch.zeros(1, 3, 64, 64))
    assert str(refusal.value).startswith(told)
    assert "\n" not in str(refusal.value)


def test_one_step_with_token_labels_lowers_the_loss():
    net = token_label("demansia2_tiny", 5, **{**SMALLEST, "img_size": 32}).train()
    images, generator = torch.randn(4, 3, 32, 32), torch.Generator().manual_seed(0)
    labels, token_labels = (torch.randint(5, size, generator=generator) for size in ((4,), (4, 4)))

    def loss() -> torch.Tensor:
        cls, aux = net(images)
        return F.cross_entropy(cls, labels) + F.cross_entropy(aux.flatten(0, 1), token_labels.flatten())

    before = loss()
    before.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch.optim.SGD(net.parameters(), 0.01).step()
    assert loss() < before
