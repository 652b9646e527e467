"""LV-ViT against the published one: outputs, intermediates, gradients, names and counts; and timm's interface.

Legend: B images; C classes; h×w token grid, T = h·w tokens; L = T + 1; D width.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from fixtures import SOURCES, close, keys, state, tensors
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay

import model  # noqa: F401  (registers the names)
from labeler.base.errors import ModelError
from model.backbones.lvvit import NAMES, LVViT

GRID = (4, 4)
MICRO = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def micro(found: dict[str, torch.Tensor], **settings: object) -> LVViT:
    net = LVViT(**{**MICRO, **settings})
    net.load_state_dict(state(found))
    return net


def box_of(found: dict[str, torch.Tensor], name: str) -> tuple[SimpleNamespace, torch.Tensor]:
    """(the mix box, bool [T]: the tokens inside)."""
    y0, x0, y1, x1 = found[f"train.{name}.box"].tolist()
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1), inside.flatten()


def published_loss(cls: torch.Tensor, aux: torch.Tensor, target: torch.Tensor, lam: float) -> torch.Tensor:
    """cls [B, C], aux [B, T, C] swapped back, target [B, C, 2 + T]."""
    own = -(target[..., 1] * cls.log_softmax(-1)).sum(-1).mean()
    partner = -(target[..., 1].flip(0) * cls.log_softmax(-1)).sum(-1).mean()
    tokens = -(target[..., 2:].mT * aux.log_softmax(-1)).sum(-1).mean()
    return lam * own + (1 - lam) * partner + 0.5 * tokens


def small(**settings: object) -> LVViT:
    torch.manual_seed(0)
    return timm.create_model(
        "lvvit_t", **{"img_size": (32, 48), "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5, **settings}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(dtype, source):
    found = tensors("lvvit_micro", source)
    net = micro(found).eval().to(dtype)
    x = found["x"].to(dtype)
    if dtype == torch.float64:
        close(net(x), found["eval.out_f64"], 1e-12)
        return  # the intermediates are at hand in float32 only
    close(net(x), found["eval.out"], 1e-5)
    close(net.patch_embed(x), found["mid.patch_embed"], 1e-5)
    last, steps = net.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    close(last, found["mid.norm"], 1e-5)
    for i, (tokens, prefix) in enumerate(steps):
        close(torch.cat([prefix, tokens], 1), found[f"mid.blocks.{i}"], 1e-5)


@pytest.mark.parametrize("name", ["eval_small", "eval_smallvar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilons_are_the_published_ones(name, dtype, source):
    found = tensors("lvvit_micro", source)
    net = micro(found).eval().to(dtype)
    with torch.no_grad():
        if name == "eval_small":
            for tensor in (net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.pos_embed, net.cls_token):
                tensor.mul_(0.005)
        else:
            for key, tensor in net.named_buffers():
                if key.endswith("running_var"):
                    tensor.mul_(1e-3)
    suffix, tolerance = ("_f64", 1e-12) if dtype == torch.float64 else ("", 1e-5)
    close(net(found["x"].to(dtype)), found[f"{name}.out{suffix}"], tolerance)


@pytest.mark.parametrize("name", ["box_a", "box_empty"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_training_loss_and_gradients_are_the_published_ones(name, checkpointing, source):
    found = tensors("lvvit_micro", source)
    net = micro(found).train()
    net.set_grad_checkpointing(checkpointing)
    x = found["x"].clone().requires_grad_()
    box, inside = box_of(found, name)
    cls, aux = net(x, box)
    aux = torch.where(inside[:, None], aux.flip(0), aux)  # theirs gives mixed tokens back to the image they came from
    close(cls, found[f"train.{name}.x_cls"], 1e-5)
    close(aux, found[f"train.{name}.x_aux"], 1e-5)
    loss = published_loss(cls, aux, found["target"], 1 - float(inside.float().mean()))
    close(loss, found[f"train.{name}.loss"], 1e-5)
    if name == "box_empty":
        return
    for key, buffer in net.named_buffers():
        close(buffer.float(), found[f"bnafter.{key}"].float(), 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5, 1e-8)
    for key, parameter in net.named_parameters():
        close(parameter.grad, found[f"grad.{key}"], 5e-5, 1e-8)


@pytest.mark.parametrize("source", SOURCES)
def test_training_in_float64_is_the_published_one(source):
    found = tensors("lvvit_micro", source)
    net = micro(found).double().train()
    box, inside = box_of(found, "box_a")
    cls, aux = net(found["x"].double(), box)
    aux = torch.where(inside[:, None], aux.flip(0), aux)
    close(cls, found["train.box_a.x_cls_f64"], 1e-12)
    close(aux, found["train.box_a.x_aux_f64"], 1e-12)
    loss = published_loss(cls, aux, found["target"].double(), 1 - float(inside.double().mean()))
    close(loss, found["train.box_a.loss_f64"], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_counts_are_the_published_ones(name):
    expected = keys(name)
    with torch.device("meta"):
        net = timm.create_model(name)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
    assert sum(p.numel() for p in net.parameters()) == expected["total_params"]
    assert net.no_weight_decay() == set(expected["no_weight_decay()"])
    assert len(net.blocks) == expected["depth"]
    assert {(b.skip_lam, b.attn.num_heads) for b in net.blocks} == {(expected["skip_lam"], expected["num_heads"])}


def test_initial_weights_spread_as_the_published_ones():
    expected = keys("lvvit_t")["init_mean_std_min_max_seed0"]
    torch.manual_seed(0)
    for key, parameter in timm.create_model("lvvit_t").named_parameters():
        mean, std, *_ = expected[key]
        assert abs(float(parameter.detach().mean()) - mean) < 3e-3, key
        assert abs(float(parameter.detach().std()) - std) < 0.1 * std + 1e-6, key


def test_classifier_settings_and_inputs():
    net = small(in_chans=4, drop_path_rate=0.3, drop_rate=0.1).train()
    assert [round(float(block.drop_path.drop_prob), 2) for block in net.blocks] == [0.0, 0.15, 0.3]
    cls, aux = net(torch.randn(3, 4, 32, 48))
    assert (cls.shape, aux.shape, net.grid) == ((3, 5), (3, 6, 5), (2, 3))
    net.reset_classifier(8)
    assert net.get_classifier() is net.head
    assert net.eval()(torch.randn(1, 4, 32, 48)).shape == (1, 8)
    assert net.score_maps(torch.randn(1, 4, 32, 48)).shape == (1, 8, 2, 3)
    assert net.forward_head(net.forward_features(torch.randn(1, 4, 32, 48)), pre_logits=True).shape == (1, 24)
    net.set_input_size((64, 32))
    assert net(torch.randn(2, 4, 64, 32)).shape == (2, 8)
    assert small(num_classes=0).eval()(torch.randn(2, 3, 32, 48)).shape == (2, 24)
    assert small(aux_head=False).train()(torch.randn(2, 3, 32, 48)).shape == (2, 5)


def test_a_batch_of_one_and_a_mix_box_leave_the_rest_alone():
    net = small().eval()
    x = torch.randn(2, 3, 32, 48)
    inside = net.embed(x, SimpleNamespace(y0=0, x0=1, y1=2, x1=2))
    plain = net.embed(x)
    changed = (inside - plain).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, False, True, False, False, True, False]  # class token, then two rows of three
    assert torch.equal(net.embed(x[:1], SimpleNamespace(y0=0, x0=0, y1=2, x1=3)), net.embed(x[:1]))


def test_features_only_and_pruning():
    net = small(features_only=True, out_indices=(0, 1))
    maps = net(torch.randn(2, 3, 32, 48))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 2, 3)] * 2
    assert net.feature_info.channels() == [24, 24]
    assert len(net.model.blocks) == 2
    full = small().eval()
    x = torch.randn(1, 3, 32, 48)
    last, steps = full.forward_intermediates(x, indices=[2], norm=True)
    assert torch.equal(steps[0].flatten(2).mT, full.forward_features(x)[:, 1:])
    assert torch.equal(last, full.forward_features(x))


def test_weight_decay_and_layer_groups():
    net = small()
    groups = param_groups_layer_decay(
        net, weight_decay=0.1, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [scale[id(p)] for p in (net.cls_token, net.blocks[0].norm1.weight, net.blocks[2].norm1.weight)]
    assert order[0] < order[1] < order[2]
    assert scale[id(net.norm.weight)] <= scale[id(net.head.weight)] == scale[id(net.aux_head.weight)] == 1.0


def test_saved_and_loaded_by_timm_at_another_size(tmp_path):
    net = small(img_size=64).eval()
    save_for_hf(net, tmp_path, model_config={"num_classes": 5}, safe_serialization=True)
    again = small(img_size=64, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), net(x))
    wide = small(
        img_size=(32, 96), pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")}
    )
    net.set_input_size((32, 96))
    x = torch.randn(1, 3, 32, 96)
    assert torch.allclose(wide.eval()(x), net(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 1, 32, 48), (1, 3, 48, 48), (3, 32, 48)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ModelError, match=r"got .*expected"):
        small()(torch.randn(shape))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="multiples of 16"):
        small(img_size=50)
    with pytest.raises(ModelError, match="num_heads=5"):
        small(num_heads=5)
    with pytest.raises(ModelError, match="does not lie inside the grid"):
        small()(torch.randn(2, 3, 32, 48), SimpleNamespace(y0=0, x0=0, y1=3, x1=1))


def test_each_activation_of_the_stem_is_a_module_of_its_own():
    """A module that is called twice stops torchao's static quantisation and captum's DeepLift."""
    net, called = timm.create_model("lvvit_t", depth=1), []
    for module in net.patch_embed.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(lambda module, *_: called.append(id(module)))
    net.patch_embed(torch.randn(1, 3, 32, 32))
    assert len(called) == len(set(called)) == 3
