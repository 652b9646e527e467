"""`token_label`: any timm family learns from token labels, in the right places, with tokens mixed where it can.

Legend: B images; C classes; h×w token grid, T = h·w tokens; D width of the features.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.backbones.lvvit import LVViT
from model.create import token_label
from model.feature_maps import layout
from model.wrapper import TokenLabeled

CLASSES = 5
TWO: dict[str, Any] = {"depth": 2}
# name -> (size, arguments that make it smaller, its grid, cells of patch_embed for each token or None)
FAMILIES: dict[str, tuple[int, dict[str, Any], tuple[int, int], tuple[int, int] | None]] = {
    "test_resnet": (64, {}, (2, 2), None),
    "regnetx_002": (64, {}, (2, 2), None),
    "test_efficientnet": (64, {}, (2, 2), None),
    "mobilenetv3_small_050": (64, {}, (2, 2), None),
    "test_convnext": (64, {}, (2, 2), None),
    "test_mambaout": (64, {}, (2, 2), None),
    "edgenext_xx_small": (64, {}, (2, 2), None),
    "test_coatnet": (64, {}, (2, 2), None),
    "maxvit_rmlp_pico_rw_256": (128, {}, (4, 4), None),
    "pvt_v2_b0": (64, {}, (2, 2), (8, 8)),
    "swin_tiny_patch4_window7_224": (128, {"depths": (1, 1, 1, 1), "embed_dim": 24}, (4, 4), (8, 8)),
    "volo_d1_224": (64, {}, (4, 4), (2, 2)),
    "vit_tiny_patch16_224": (64, TWO, (4, 4), (1, 1)),
    "deit_tiny_distilled_patch16_224": (64, TWO, (4, 4), (1, 1)),
    "vit_small_patch16_dinov3": (64, {"depth": 2, "embed_dim": 96}, (4, 4), (1, 1)),
    "beit_base_patch16_224": (64, {"depth": 2, "embed_dim": 48, "num_heads": 4}, (4, 4), (1, 1)),
    "eva02_tiny_patch14_224": (56, TWO, (4, 4), (1, 1)),
    "cait_xxs24_224": (64, TWO, (4, 4), (1, 1)),
    "xcit_nano_12_p8_224": (64, TWO, (8, 8), (1, 1)),
    "mixer_s32_224": (64, {}, (2, 2), (1, 1)),
    "gmlp_ti16_224": (64, {}, (4, 4), (1, 1)),
    "hiera_tiny_224": (64, {"embed_dim": 24}, (2, 2), (8, 8)),
}
# Each patch by itself enters `patch_embed`: mixing its tokens is mixing pixels.
PATCHED = [
    name for name in FAMILIES if name.startswith(("vit", "deit", "beit", "eva", "cait", "mixer", "gmlp", "swin"))
]
REFUSED = {
    "coat_tiny": (64, "gave list"),
    "crossvit_tiny_240": (240, "gave list"),
    "efficientvim_m1": (64, "gave list"),
    "pit_ti_224": (64, "single token"),
}


def built(name: str, size: Any = None, **arguments: Any) -> TokenLabeled:
    torch.manual_seed(0)
    side, smaller, _, _ = FAMILIES[name]
    net = token_label(name, **{"num_classes": CLASSES, "img_size": size or side, **smaller, **arguments})
    assert isinstance(net, TokenLabeled)
    return net


def box(y0: int, x0: int, y1: int, x1: int) -> SimpleNamespace:
    return SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1)


def lively(net: nn.Module) -> None:
    """Layers that begin at zero would hide what comes before them."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_training_step_of_every_family(name):
    size, _, grid, mix_scale = FAMILIES[name]
    net = built(name).train()
    assert (net.grid, net.mix_scale) == (grid, mix_scale)
    lively(net)
    x = torch.randn(2, 3, size, size)
    optimizer = create_optimizer_v2(net, "sgd", lr=0.01, weight_decay=0.1)
    cls, aux = net(x, None if mix_scale is None else box(0, 1, 1, 2))
    assert (cls.shape, aux.shape) == ((2, CLASSES), (2, grid[0] * grid[1], CLASSES))
    targets = torch.arange(aux.shape[1]) % CLASSES
    loss = F.cross_entropy(cls, torch.tensor([0, 1])) + F.cross_entropy(aux.flatten(0, 1), targets.repeat(2))
    loss.backward()
    classifier = net.get_classifier()
    heads = [net.aux_head, *(classifier if isinstance(classifier, tuple) else [classifier])]
    first = next(p for p in net.backbone.parameters() if p.ndim > 1)
    for parameter in (first, *(p for head in heads for p in head.parameters() if p.ndim > 1)):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    before = net.aux_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.aux_head.weight, before)
    with torch.no_grad():
        net.eval()
        features = net.forward_features(x)
        cls, aux = net.token_logits(features)
        assert torch.allclose(net(x), cls + 0.5 * aux.amax(1))
        assert torch.equal(net.backbone.forward_head(features), cls)
        assert torch.allclose(net.score_maps(x).flatten(2).mT, aux, atol=1e-5)


@pytest.mark.parametrize("name", PATCHED)
def test_mixing_tokens_is_mixing_pixels_where_patches_do_not_overlap(name):
    size, _, (h, _), _ = FAMILIES[name]
    net = built(name).eval()
    lively(net)
    x, cell = torch.randn(4, 3, size, size), size // h
    y0, x0, y1, x1 = 1, 1, h, 2
    pixels = x.clone()
    where = (slice(None), slice(None), slice(y0 * cell, y1 * cell), slice(x0 * cell, x1 * cell))
    pixels[where] = x.flip(0)[where]
    given, plain = x.clone(), net(x)
    mixed = net(given, box(y0, x0, y1, x1))
    assert torch.allclose(mixed, net(pixels), atol=1e-5)
    assert torch.equal(given, x)
    assert not torch.allclose(mixed, plain, atol=1e-4)
    assert torch.equal(net(given), plain)  # nothing of it stays


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_convnext", "cait_xxs24_224"]
)
@pytest.mark.parametrize("wide", [False, True])
def test_scores_stand_where_the_image_changed(name, wide):
    side, _, (h, w), _ = FAMILIES[name]
    size, grid = ((side, 2 * side), (h, 2 * w)) if wide else ((2 * side, side), (2 * h, w))
    net = built(name, size).eval()
    lively(net)
    assert net.grid == grid
    x, cell = torch.randn(1, 3, *size), side // h
    with torch.no_grad():
        plain = net.score_maps(x)
        for row, column in ((0, 1), (grid[0] - 1, 0), (grid[0] - 1, grid[1] - 1)):
            changed = x.clone()
            changed[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] *= -2
            difference = (net.score_maps(changed) - plain).abs().sum((0, 1))
            assert divmod(int(difference.argmax()), grid[1]) == (row, column)


def test_another_grid_takes_means_or_interpolates():
    x = torch.randn(2, 3, 64, 64)
    fine, coarse, own = (built("vit_tiny_patch16_224", grid=grid).eval() for grid in (6, (2, 4), None))
    for net in (fine, coarse):
        net.load_state_dict(own.state_dict())
    maps = own.score_maps(x)
    means = maps.unflatten(2, (2, 2)).mean(3)
    assert torch.allclose(coarse.score_maps(x), means, atol=1e-5)
    assert torch.allclose(fine.score_maps(x), F.interpolate(maps, (6, 6), mode="bilinear", antialias=True), atol=1e-5)
    assert [net.train()(x)[1].shape[1] for net in (fine, coarse)] == [36, 8]
    assert (fine.mix_scale, coarse.mix_scale) == (None, (2, 1))
    with pytest.raises(ModelError, match=r'6×6 grid.*mix="image"'):
        fine(x, box(0, 0, 1, 1))


def test_a_backbone_without_a_place_to_mix_says_what_to_do():
    with pytest.raises(ModelError, match=r'ResNet cannot mix tokens.*mix="image"'):
        built("test_resnet")(torch.randn(2, 3, 64, 64), box(0, 0, 1, 1))
    with pytest.raises(ModelError, match="does not lie inside the grid"):
        built("vit_tiny_patch16_224")(torch.randn(2, 3, 64, 64), box(0, 0, 5, 1))


def test_volo_keeps_its_own_auxiliary_head():
    torch.manual_seed(0)
    plain = timm.create_model("volo_d1_224", img_size=64, num_classes=CLASSES).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = plain(x)
    with pytest.raises(ModelError, match=r"VOLO does not run on 3 channels of 224×224 pixels.*pass the img_size"):
        token_label(plain)
    net = token_label(plain, img_size=64)
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert plain.aux_head is None


def test_a_built_module_keeps_its_mode_and_gets_new_classes():
    plain = timm.create_model("test_resnet", num_classes=3)
    plain.bn1.eval()
    net = token_label(plain, num_classes=CLASSES, img_size=96)
    assert (net.grid, net.backbone.training, net.backbone.bn1.training) == ((3, 3), True, False)
    assert (net.num_features, net.pretrained_cfg) == (plain.num_features, plain.pretrained_cfg)
    assert net.eval()(torch.randn(1, 3, 64, 96)).shape == (1, CLASSES)  # a convolutional net takes any size
    net.reset_classifier(8)
    cls, aux = net.train()(torch.randn(2, 3, 96, 96))
    assert (cls.shape, aux.shape) == ((2, 8), (2, 9, 8))
    net.reset_classifier(0)
    assert net(torch.randn(2, 3, 96, 96)).shape == (2, plain.num_features)
    copied = copy.deepcopy(built("vit_tiny_patch16_224")).eval()
    copied.set_input_size((32, 64))
    assert copied.grid == (2, 4)
    assert copied(torch.randn(2, 3, 32, 64), box(0, 0, 1, 1)).shape == (2, CLASSES)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "test_resnet", "cait_xxs24_224", "swin_tiny_patch4_window7_224"]
)
def test_weight_decay_marks_and_layer_groups_are_the_backbones(name):
    net = built(name)
    inner = getattr(net.backbone, "no_weight_decay", set)()
    assert net.no_weight_decay() == {f"backbone.{n}" for n in inner}
    own = group_parameters(net, net.group_matcher(), reverse=True)
    backbone = group_parameters(net.backbone, net.backbone.group_matcher(), reverse=True)
    assert {k: own[f"backbone.{k}"] for k in backbone} == backbone
    assert own["aux_head.weight"] == max(own.values())
    net.set_grad_checkpointing()
    side = FAMILIES[name][0]
    assert net.train()(torch.randn(2, 3, side, side))[0].requires_grad


def test_own_models_come_as_they_are():
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_classes": CLASSES}
    assert isinstance(token_label("lvvit_t", num_heads=2, **small), LVViT)
    assert token_label("vim_tiny", **small).train()(torch.randn(2, 3, 32, 32))[1].shape == (2, 4, CLASSES)
    with pytest.raises(ModelError, match="aux_head=True"):
        token_label(timm.create_model("vim_tiny", **small))


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_work_are_refused_with_a_reason(name):
    size, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason):
        token_label(name, num_classes=CLASSES, img_size=size)


def test_bad_use_is_refused():
    with pytest.raises(ModelError, match="unknown model: got 'resnet5000'"):
        token_label("resnet5000")
    with pytest.raises(ModelError, match="no class head: got num_classes=0"):
        token_label("test_resnet", num_classes=0)
    with pytest.raises(ModelError, match="not a timm backbone"):
        token_label(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="already built: got depth, expected img_size or in_chans"):
        token_label(timm.create_model("test_resnet"), depth=3)
    with pytest.raises(ModelError, match="single token for 32×32 pixels"):
        token_label("test_resnet", img_size=32)
    with pytest.raises(ModelError, match=r"does not run on 3 channels of 50×50 pixels.*img_size"):
        token_label(timm.create_model("vit_tiny_patch16_224", depth=1), img_size=50)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_compiled_model_mixes_any_box_without_beginning_anew(name):
    net = built(name, drop_path_rate=0.0)
    images, (rows, columns) = torch.randn(2, 3, *net.img_size), net.grid
    boxes = [box(y, x, y + h, columns - 1) for y in (0, 1) for x in (0, 1, 2) for h in range(1, rows - 1)]
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(net.train(), backend=graphs, fullgraph=True)
    for one in boxes:
        for found, wanted in zip(compiled(images, mix=one), net(images, mix=one), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)
    assert graphs.frame_count <= 4 < len(boxes)  # 0 and 1 have graphs of their own


def test_a_compiled_model_may_have_sizes_that_vary():
    net = built("vit_tiny_patch16_224").eval()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for count in (2, 3):
        images = torch.randn(count, 3, *net.img_size)
        assert torch.allclose(compiled(images), net(images), atol=1e-5)


def test_mixing_follows_what_takes_the_place_of_patch_embed():
    """As peft's `modules_to_save` does: a copy in a module around both."""

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.first, self.second = inner, copy.deepcopy(inner)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(images)

    net = built("vit_tiny_patch16_224").eval()
    images, mix = torch.randn(2, 3, *net.img_size), box(0, 0, 2, 3)
    wanted = net(images, mix=mix)
    assert not torch.allclose(wanted, net(images), atol=1e-3)
    net.backbone.patch_embed = Around(net.backbone.patch_embed)
    assert torch.allclose(net(images, mix=mix), wanted, atol=1e-6)
    assert torch.allclose(copy.deepcopy(net)(images, mix=mix), wanted, atol=1e-6)


def test_shapes_are_reckoned_without_memory():
    """Under torch's fake tensors, as planners of memory and shards build models."""
    with FakeTensorMode():
        for net in (token_label("test_resnet", CLASSES, img_size=64), timm.create_model("lvvit_t", depth=1)):
            cls, aux = net.train()(torch.empty(2, 3, *net.img_size))
            assert cls.shape == (2, net.num_classes)
            assert aux.shape == (2, net.grid[0] * net.grid[1], net.num_classes)


def test_the_layout_of_maps_is_told_by_the_shape_of_the_image():
    """Of 64×96 pixels: 2×3 cells."""
    assert layout(torch.zeros(1, 2, 3, 3), None, (64, 96)) == "NHWC"
    assert layout(torch.zeros(1, 3, 2, 3), None, (64, 96)) == "NCHW"
    assert layout(torch.zeros(1, 2, 3, 3), SimpleNamespace(output_fmt="NCHW"), (64, 96)) == "NCHW"
    assert layout(torch.zeros(1, 6, 3), None, (64, 96)) == "tokens"
    assert layout(torch.zeros(1, 6), None, (64, 96)) is None
