"""timm's whole interface, for every family: what a user of timm tries first must work.

Legend: B images; C classes; D model width; h×w token grid, T = h·w.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import calculate_drop_path_rates
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import NAMES, ModelError
from model.backbones.demansia import DeMansia
from model.backbones.demansia2 import DeMansia2
from model.backbones.lvvit import LVViT
from model.backbones.vim import Vim
from model.create import create_backbone
from model.summary import summarize
from model.token_heads import insert_token, resize_position_embedding

SMALL = {"img_size": 64, "num_classes": 7, "embed_dim": 48, "depth": 3}
FAMILIES = {
    "demansia_tiny": SMALL,
    "demansia2_tiny": {**SMALL, "attention_layers": (0,), "attention_head_dim": 48, "d_state": 16},
    "vim_tiny": SMALL,
    "lvvit_t": {**SMALL, "num_heads": 3},
}
WITH_TOKENS = ("demansia_tiny", "demansia2_tiny", "lvvit_t")


def small(name: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**FAMILIES[name], **changes})


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def images(n: int = 2, height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [DeMansia, DeMansia2, Vim, LVViT])
def test_without_settings_a_family_is_for_imagenet(family):
    with torch.device("meta"):
        net = family()
    assert (net.num_classes, net.img_size, net.grid) == (1000, (224, 224), (14, 14))
    assert net.get_classifier().out_features == 1000


@pytest.mark.parametrize("entry", NAMES)
def test_no_name_asks_for_trained_weights_by_itself(entry):
    assert inspect.signature(timm.models.model_entrypoint(entry)).parameters["pretrained"].default is False


def test_all_names_are_registered():
    assert set(NAMES) <= set(timm.list_models())
    assert len(NAMES) == 29


def test_training_gives_both_heads_and_evaluation_one_answer(name):
    net = small(name)
    out = net.train()(images())
    if name in WITH_TOKENS:
        cls, aux = out
        assert cls.shape == (2, 7)
        assert aux.shape == (2, 16, 7)
        net.eval()
        cls, aux = net.token_logits(net.forward_features(images()))
        assert torch.allclose(net(images()), cls + 0.5 * aux.amax(1))
    else:
        assert out.shape == (2, 7)


def test_features_then_head_is_the_model(name):
    net = small(name).eval()
    features = net.forward_features(images())
    assert features.shape == (2, 17, 48)
    assert torch.equal(net.forward_head(features), net(images()))
    assert net.forward_head(features, pre_logits=True).shape == (2, 48)
    assert net.num_features == net.head_hidden_size == 48


def test_classifiers_are_reset_together(name):
    net = small(name)
    assert net.get_classifier().out_features == 7
    net.reset_classifier(5)
    assert net.num_classes == 5
    out = net(images())
    assert all(part.shape[-1] == 5 for part in (out if isinstance(out, tuple) else (out,)))
    net.reset_classifier(0)
    features = net.eval().forward_features(images())
    assert torch.equal(net(images()), net.forward_head(features, pre_logits=True))
    assert isinstance(small(name, num_classes=0).get_classifier(), torch.nn.Identity)


def test_intermediates_are_maps_of_the_layers(name):
    net = small(name).eval()
    last, found = net.forward_intermediates(images(), indices=[0, 2], norm=True)
    assert [tuple(part.shape) for part in found] == [(2, 48, 4, 4)] * 2
    tokens = net.forward_intermediates(images(), indices=2, output_fmt="NLC", intermediates_only=True)
    assert [tuple(part.shape) for part in tokens] == [(2, 16, 48)] * 2
    assert torch.equal(last, net.forward_features(images()))
    net = small(name).eval()
    assert torch.equal(net.forward_intermediates(images(), [0])[0], net.forward_features(images()))  # all layers run
    assert small(name, depth=5, features_only=True).feature_info.out_indices == (2, 3, 4)  # the last three
    pyramid = small(name, features_only=True, out_indices=(0, 1)).eval()
    assert [tuple(part.shape) for part in pyramid(images())] == [(2, 48, 4, 4)] * 2
    assert pyramid.feature_info.channels() == [48, 48]


def test_images_need_not_be_square(name):
    net = small(name, img_size=(64, 96)).eval()
    assert net(images(2, 64, 96)).shape == (2, 7)
    assert net.grid == (4, 6)


def test_another_input_size_resizes_the_positions(name):
    net = small(name).eval()
    net.set_input_size((96, 64))
    assert net(images(1, 96, 64)).shape == (1, 7)
    assert net.grid == (6, 4)


def test_a_checkpoint_of_another_resolution_loads(name, tmp_path):
    first = small(name).eval()
    timm.models.save_for_hf(first, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changed(name)).eval()
    assert torch.equal(again(images()), first(images()))
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **{**changed(name), "img_size": 96}).eval()
    assert larger(images(1, 96, 96)).shape == (1, 7)
    assert torch.equal(larger.cls_token, first.cls_token)


def changed(name: str) -> dict[str, object]:
    return {key: value for key, value in FAMILIES[name].items() if key != "num_classes"}


def test_decay_spares_what_is_marked(name):
    net = small(name)
    spared = net.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= spared
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for key, parameter in net.named_parameters():
        marked = key in spared or parameter.ndim <= 1
        assert (id(parameter) in decayed) != marked, key


def test_layers_can_be_told_apart_for_their_learning_rates(name):
    net = small(name)
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) >= 4


def test_checkpointing_changes_nothing_but_memory(name):
    """What a block held is forgotten and reckoned again: its forward pass runs twice."""
    gradients = []
    for enable in (False, True):
        net, runs = small(name).train(), []
        block = net.blocks[1].attn if name == "lvvit_t" else net.layers[1].mixer
        block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        net.set_grad_checkpointing(enable)
        out = net(images())
        sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
        gradients.append(net.patch_embed.proj.weight.grad)
        assert len(runs) == 1 + enable
        with torch.no_grad():
            net(images())
        assert len(runs) == 2 + enable
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_other_channels_and_drop_rates(name):
    net = small(name, in_chans=1, drop_path_rate=0.3, drop_rate=0.1).train()
    out = net(images(channels=1))
    assert torch.isfinite(out[0] if isinstance(out, tuple) else out).all()


@pytest.mark.parametrize("bad", ["channels", "patch", "size", "flat"])
def test_images_that_do_not_fit_are_refused(name, bad):
    net = small(name)
    wrong = {
        "channels": images(channels=4),
        "patch": images(height=65, width=65),
        "size": images(height=96, width=96),
        "flat": images()[0],
    }[bad]
    with pytest.raises(ModelError, match="got") as caught:
        net(wrong)
    assert "expected" in str(caught.value)
    with pytest.raises(ModelError, match="patches"):
        small(name, img_size=65)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_a_mix_box_swaps_the_tokens_inside_it_and_nothing_else(name):
    net = small(name).eval()
    seen = []
    net.patch_embed.register_forward_hook(lambda _, __, out: seen.append(out))
    box = SimpleNamespace(y0=1, x0=0, y1=3, x1=2)
    plain, mixed = net.embed(images(3)), net.embed(images(3), box)
    assert torch.equal(seen[0], seen[1])  # the stem sees unmixed images
    place = net.cls_position(17)
    tokens = [torch.cat([s[:, :place], s[:, place + 1 :]], 1).unflatten(1, (4, 4)) for s in (plain, mixed)]
    position = torch.cat([net.pos_embed[:, :place], net.pos_embed[:, place + 1 :]], 1).unflatten(1, (4, 4))
    own, found = tokens[0] - position, tokens[1] - position
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 0:2] = True
    assert torch.allclose(found, torch.where(inside[..., None], own.flip(0), own), atol=1e-6)
    with pytest.raises(ModelError, match="does not lie inside the grid"):
        net.embed(images(), SimpleNamespace(y0=0, x0=0, y1=5, x1=2))


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_a_trained_model_is_a_teacher(name):
    net = small(name).eval()
    maps = net.score_maps(images())
    assert maps.shape == (2, 7, 4, 4)
    _, aux = net.token_logits(net.forward_features(images()))
    assert torch.equal(maps.flatten(2).mT, aux)
    with pytest.raises(ModelError, match="no auxiliary head"):
        small("vim_tiny").score_maps(images())


def test_nan_images_give_nan_and_no_silence():
    net = small("demansia_tiny").eval()
    broken = images()
    broken[0, 0, 3, 3] = torch.nan
    out = net(broken)
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


def test_the_summary_takes_any_timm_model():
    found = summarize("test_resnet", (64, 96))
    assert [cost.resolution for cost in found.costs] == [64, 96]
    assert sum(found.costs[1].macs.values()) > 2 * sum(found.costs[0].macs.values())
    with pytest.raises(ModelError, match="unknown model: got 'test_restnet'"):
        summarize("test_restnet")


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "convnext_atto", "lvvit_t", "demansia2_tiny", "mila_nano", "mambavision_nano"]
)
def test_the_parts_of_the_summary_add_up_to_what_torch_counts(name):
    """Blocks in a list, in a Sequential, and in stages: each multiply-add belongs to one part."""
    cost = summarize(name, (160,)).costs[0]
    net = create_backbone(name, img_size=160).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, 160, 160))
    assert sum(cost.macs.values()) == counter.get_total_flops() // 2
    assert "other" not in cost.macs


def test_drop_path_rates_rise_linearly_to_the_last_block(name):
    def rates(depth: int) -> list[float]:
        net = small(name, depth=depth, drop_path_rate=0.3)
        return [block.drop_path.drop_prob for block in getattr(net, net.BLOCKS)]

    assert rates(4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates(9) == pytest.approx(calculate_drop_path_rates(0.3, 9))
    assert rates(1) == [0]


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 4)), ((14, 14), (24, 24)), ((9, 5), (3, 7)), ((2, 8), (4, 4))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_resampled_bicubically_around_the_class_token(old, new, dtype):
    """Also where the old and the new grid have equally many tokens."""
    torch.manual_seed(0)
    planes, cls = torch.randn(1, 6, *old).to(dtype), torch.randn(1, 1, 6).to(dtype)
    found = resize_position_embedding(insert_token(planes.flatten(2).mT, cls, 3), old, new, 3, 2)
    resized = F.interpolate(planes.float(), new, mode="bicubic", antialias=True, align_corners=False).to(dtype)
    assert torch.equal(found, insert_token(resized.flatten(2).mT, cls, 2))


def test_the_summary_counts_what_the_design_counts():
    """DeMansia Tiny at 224²: 8.06M parameters and about 2.5 GMAC forward."""
    command = [sys.executable, "-m", "model", "summary", "demansia_tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["parameters"].values()) == 8_063_504
    (cost,) = found["costs"]
    assert cost["tokens"] == 196
    assert 2.2e9 < sum(cost["macs"].values()) < 2.8e9
    assert cost["activations"] > 10e6
    wrong = subprocess.run([*command[:4], "no_such_model"], capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2
    assert "no_such_model" in wrong.stderr
