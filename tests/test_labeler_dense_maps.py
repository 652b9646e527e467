"""Dense maps from classifiers: of every family, in the right place, equal to the classifier where they must be.

Legend: B batch, C classes, H×W map grid, T tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig

from labeler.base.errors import TeacherError
from labeler.teacher import head_per_location
from labeler.teacher.dense_maps import dense_map
from labeler.teacher.head_per_location import HeadPerLocation

CLASSES = 7
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4}
# Average pooling and a linear head: the mean of the map is the output.
AVERAGED = [
    "test_byobnet", "convmixer_768_32", "cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dla46x_c", "dpn48b",
    "efficientformerv2_s0", "test_efficientnet", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "hrnet_w18_small", "iformer_t", "levit_128s", "levit_conv_128s",
    "test_coatnet", "gmlp_ti16_224", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "test_nfnet", "pvt_v2_b0",
    "regnetx_002", "repvit_m1", "res2next50", "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100",
    "samvit_base_patch16_224", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tresnet_m",
    "twins_svt_small", "vit_base_patch16_siglip_gap_224", "visformer_tiny", "ese_vovnet19b_slim_dw",
    "legacy_xception", "xception41p",
]  # fmt: skip
# A norm, a hidden layer or another pooling on the way: a map, but no such equation.
NOT_AVERAGED = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "test_convnext", "cpubone_nano",
    "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "edgenext_xx_small", "efficientvit_b0", "eva02_tiny_patch14_224", "fasternet_t0", "gemma4_vit_167m",
    "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "inception_next_atto",
    "lcnetv2_small", "lowformer_b0", "test_mambaout", "poolformerv2_s12", "mobilenetv3_small_050",
    "naflexvit_base_patch16_parfac_gap", "qwen3_vit_88m", "rdnet_tiny", "repghostnet_050", "resnet50_clip",
    "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos",
    "vit_base_patch16_siglip_224", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p8_224",
]  # fmt: skip
REFUSED = {
    "coat_tiny": "no single map of features",
    "crossvit_tiny_240": "no single map of features",
    "efficientvim_m1": "no single map of features",
    "pit_ti_224": "tokens do not form a grid",
    "vgg11": "head that mixes locations",
}
# Building and filling a network takes most of a test's time; fewer and narrower layers are the same family.
SMALLER = {
    **{
        name: TINY
        for name in AVERAGED + NOT_AVERAGED
        if name.startswith(("beit", "deepseek", "gemma4", "naflex", "qwen3", "samvit", "vit_base"))
    },
    **{
        name: {"depth": 2}
        for name in AVERAGED + NOT_AVERAGED
        if name.startswith(("cait", "deit", "eva02", "tnt", "vit_tiny", "xcit"))
    },
    **{name: {"depths": (2, 2, 2, 2), "embed_dim": 48} for name in AVERAGED if name.startswith("swin")},
    **{name: {"layers": [1, 1, 1, 1]} for name in ("fastvit_t8", "res2next50", "sequencer2d_s", "tresnet_m")},
    **{name: {"embed_dim": 48} for name in ("hiera_tiny_224", "sam2_hiera_tiny")},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (48, 96, 192, 384)},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "dpn48b": {"k_sec": (1, 1, 1, 1)},
    "rdnet_tiny": {"growth_rates": (32,) * 7},
    "tiny_vit_5m_224": {"depths": (1, 1, 2, 1)},
    "twins_svt_small": {"depths": (1, 1, 1, 1)},
    "vgg11": {"mlp_ratio": 0.01},
}
SIZES = {"efficientvit_m0": 96, "shvit_s1": 96, "levit_128s": 128, "levit_conv_128s": 128, "crossvit_tiny_240": 240,
         "deepseek_vit_412m": 70, "eva02_tiny_patch14_224": 56, "gemma4_vit_167m": 96}  # fmt: skip
TORCHVISION = {
    "resnet18": True, "densenet121": True, "efficientnet_b0": True, "googlenet": True, "mnasnet0_5": True,
    "mobilenet_v2": True, "regnet_y_400mf": True, "shufflenet_v2_x0_5": True, "squeezenet1_1": True, "swin_t": True,
    "convnext_tiny": False, "mobilenet_v3_small": False, "vit_b_16": False,
}  # fmt: skip


TORCHVISION_SMALLER: dict[str, Callable[..., nn.Module]] = {
    "convnext_tiny": partial(
        torchvision.models.ConvNeXt,
        [CNBlockConfig(width, out, 1) for width, out in ((24, 48), (48, 96), (96, 192), (192, None))],
    ),
    "swin_t": partial(torchvision.models.SwinTransformer, [4, 4], 48, [2, 2, 2, 2], [2, 4, 8, 16], [7, 7]),
    "vit_b_16": partial(torchvision.models.VisionTransformer, 64, 16, 2, 4, 48, 96),
}


def lively(model: nn.Module, size: int | tuple[int, int] = 64) -> nn.Module:
    """Fresh heads may be zero, and fresh running statistics let signals fade: comparisons would be of nothing."""
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = None
    if norms:
        with torch.no_grad():
            model(noise(*size) if isinstance(size, tuple) else noise(size))
    return model.eval()


def timm_model(name: str, size: int | tuple[int, int] = 64, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"num_classes": CLASSES, **SMALLER.get(name, {}), **arguments}
    try:
        model = timm.create_model(name, img_size=size, **arguments)
    except TypeError:
        model = timm.create_model(name, **arguments)
    return lively(model, size)


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"aux_logits": False} if name == "googlenet" else {}
    if name in TORCHVISION_SMALLER:
        return lively(TORCHVISION_SMALLER[name](num_classes=CLASSES))
    if name in ("googlenet", "vgg11"):
        arguments["init_weights"] = False
    return lively(torchvision.models.get_model(name, num_classes=CLASSES, **arguments))


def noise(height: int = 64, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, images: Tensor, name: str, averaged: bool) -> None:
    with torch.inference_mode():
        dense, report = dense_map(model, images, name)
        maps, logits = dense(images), model(images)
    assert maps.shape == (2, CLASSES, *report.grid)
    assert report.grid[0] > 1
    assert logits.abs().max() > 1e-6
    assert maps.flatten(2).std(2).max() > 0
    difference = (maps.mean((2, 3)) - logits).abs().max() / logits.abs().max()
    assert report.self_test.startswith("mean of the map equals" if averaged else "not applicable")
    assert not averaged or difference <= 1e-5
    assert averaged or report.notes


@pytest.mark.parametrize("name", [*AVERAGED, *NOT_AVERAGED])
def test_timm_family_gives_a_map(name: str) -> None:
    size = SIZES.get(name, 64)
    check(timm_model(name, size), noise(size), name, name in AVERAGED)


@pytest.mark.parametrize("name", REFUSED)
def test_timm_family_is_refused_with_a_reason(name: str) -> None:
    size = SIZES.get(name, 64)
    with torch.inference_mode(), pytest.raises(TeacherError, match=REFUSED[name]) as caught:
        dense_map(timm_model(name, size), noise(size), name)
    assert "\n" not in str(caught.value)
    assert "score_maps" in str(caught.value)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_classifier_gives_a_map(name: str) -> None:
    check(torchvision_model(name), noise(), name, TORCHVISION[name])


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_torchvision_head_that_flattens_a_grid_is_refused(name: str) -> None:
    with torch.inference_mode(), pytest.raises(TeacherError, match="flattens a grid"):
        dense_map(torchvision_model(name), noise(), name)


# Which image region a location speaks for. A random network is local enough when its residual path is.


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_resnet", 128), ("test_convnext", 128), ("test_mambaout", 128), ("sequencer2d_s", 64),
     ("swinv2_tiny_window8_256", 128), ("swinv2_cr_tiny_224", 128), ("sam2_hiera_tiny", 128), ("hiera_tiny_224", 128),
     ("test_vit", 64), ("vit_base_patch16_siglip_224", 64), ("naflexvit_base_patch16_parfac_gap", 64),
     ("qwen3_vit_88m", 64), ("nest_tiny", 128), ("twins_svt_small", 128), ("volo_d1_224", 64),
     ("torchvision:resnet18", 224), ("torchvision:convnext_tiny", 128), ("torchvision:swin_t", 128),
     ("torchvision:vit_b_16", 64)],
)  # fmt: skip
def test_a_disturbed_corner_moves_the_same_corner_of_the_map(name: str, size: int) -> None:
    library, _, bare = name.rpartition(":")
    model = torchvision_model(bare) if library else timm_model(bare, size)
    images = 0.3 * noise(size)
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    with torch.inference_mode():
        dense, report = dense_map(model, images, name)
        height, width = report.grid
        disturbed = images[:1].repeat(4, 1, 1, 1)
        patches = disturbed.unflatten(3, (width, size // width)).unflatten(2, (height, size // height))
        for image, (row, column) in enumerate(corners):
            patches[image, :, row, :, column] += 1
        change = (dense(disturbed) - dense(images[:1])).abs().sum(1)
    loudest = torch.stack([change[:, row, column] for row, column in corners], 1).argmax(1)
    assert loudest.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit", "test_vit4"])
def test_oblong_map_equals_the_head_on_slices(name: str) -> None:
    """The reference slices one location out of the features; 2×3 locations tell transposed from straight."""
    tokens = name.startswith("test_vit")
    height, width = (32, 48) if tokens else (64, 96)
    model: Any = timm_model(name, (height, width), **({"global_pool": "avg"} if tokens else {}))
    images = noise(height, width)
    with torch.inference_mode():
        dense, report = dense_map(model, images, name)
        features, maps = model.forward_features(images), dense(images)
        assert report.grid == (2, 3)
        for y in range(2):
            for x in range(3):
                if tokens:
                    token = features[:, model.num_prefix_tokens + 3 * y + x]
                    expected = model.head(model.fc_norm(token))
                elif getattr(model, "output_fmt", "NCHW") == "NHWC":
                    expected = model.forward_head(features[:, y : y + 1, x : x + 1])
                else:
                    expected = model.forward_head(features[:, :, y : y + 1, x : x + 1])
                torch.testing.assert_close(maps[:, :, y, x], expected)


# Modules of no library, around one 1×1 feature map.


class Pooled(nn.Module):
    """Four-pixel cells, a squeeze-and-excitation gate, then `pool` and a linear layer; `scale` widens the head."""

    def __init__(self, pool: Callable[[Tensor], Tensor], scale: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.gate = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 1)
        self.pool, self.fc = pool, nn.Linear(16 * scale, CLASSES)

    def local(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.local(images)).flatten(1))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


POOLINGS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "module": (nn.AdaptiveAvgPool2d(1), True),
    "functional": (lambda x: F.adaptive_avg_pool2d(x, (1, 1)), True),
    "fixed kernel": (lambda x: F.avg_pool2d(x, x.shape[2:]), True),
    "fixed kernel module": (nn.AvgPool2d(4), True),
    "mean": (lambda x: x.mean([2, 3]), True),
    "mean from the end": (lambda x: torch.mean(x, dim=(-1, -2), keepdim=True), True),
    "mean, channels last": (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), True),
    "mean of tokens": (lambda x: tokens(x).mean(1), True),
    "mean of a flat map": (lambda x: x.flatten(2).mean(-1), True),
    "maximum": (lambda x: F.adaptive_max_pool2d(x, 1), False),
    "maximum module": (nn.AdaptiveMaxPool2d(1), False),
    "amax": (lambda x: x.amax((2, 3)), False),
    "both": (lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))), False),
    "side by side": (lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), False),
}


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.inference_mode()
def test_every_kind_of_pooling_is_found(pooling: str) -> None:
    pool, averaged = POOLINGS[pooling]
    copies = 2 if pooling == "side by side" else 1
    model, images = Pooled(pool, copies).eval(), noise(16)
    dense, report = dense_map(model, images, "mine")
    features = torch.cat([model.local(images)] * copies, 1).permute(0, 2, 3, 1)
    expected = F.linear(features, model.fc.weight, model.fc.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(dense(images), expected)
    torch.testing.assert_close(dense(images[:1]), expected[:1])
    assert report.self_test.startswith("mean") == averaged
    assert report.grid == (4, 4)


def refusal(model: nn.Module, size: int = 16) -> str:
    with torch.inference_mode(), pytest.raises(TeacherError) as caught:
        dense_map(model.eval(), noise(size), "mine")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_last_pooling_that_is_a_gate_is_not_taken_for_the_head() -> None:
    class Flattened(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.local(images).flatten(1))

    assert "cannot be used by the module after its last adaptive_avg_pool2d" in refusal(Flattened(nn.Identity(), 16))


def test_pooling_in_the_middle_of_a_network_is_refused() -> None:
    class Middle(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            context = F.adaptive_avg_pool2d(self.stem(images), 1)
            return self.fc(F.conv2d(context, torch.ones(16, 16, 3, 3), padding=1).flatten(1))

    assert "pools the whole map before its head" in refusal(Middle(nn.Identity()))


def test_networks_without_a_map_are_refused() -> None:
    vector = Pooled(nn.AdaptiveAvgPool2d(1))
    vector.forward_features = lambda x: vector.local(x).mean((2, 3))  # type: ignore[assignment]
    vector.forward_head = vector.fc  # type: ignore[assignment]
    assert "keeps no single map of features: got a tensor [2, 16]" in refusal(vector)
    headless = Pooled(nn.AdaptiveAvgPool2d(1))
    headless.fc = nn.Identity()  # type: ignore[assignment]
    assert "no classification head" in refusal(headless)
    assert "no classification head" in refusal(timm_model("test_resnet", num_classes=0), 64)
    assert "no classification head" in refusal(timm_model("test_vit", num_classes=0), 64)
    assert "not an image classifier: got a tensor [2, 4, 8, 8]" in refusal(nn.Conv2d(3, 4, 2, 2))


def test_wrong_input_size_is_told_in_one_line() -> None:
    told = refusal(timm_model("deit_tiny_patch16_224", 64), 96)
    assert "does not run on 96×96 pixels" in told
    assert "`input_size`" in told


def test_scores_that_are_not_finite_are_refused() -> None:
    model = Pooled(nn.AdaptiveAvgPool2d(1))
    nn.init.constant_(model.fc.weight, float("nan"))
    assert "not finite" in refusal(model)


def test_map_that_contradicts_the_classifier_is_refused() -> None:
    model = timm_model("test_resnet")
    plain = model.forward
    model.forward = lambda x: 1.001 * plain(x)  # type: ignore[method-assign]
    assert "contradicts its dense map" in refusal(model, 64)


@torch.inference_mode()
def test_own_score_maps_come_first() -> None:
    class Own(nn.Module):
        def score_maps(self, images: Tensor) -> Tensor:
            return F.avg_pool2d(images, 4)

    dense, report = dense_map(Own(), noise(16), "mine")
    assert (report.method, report.num_classes, report.grid) == ("the module's own score_maps", 3, (4, 4))
    torch.testing.assert_close(dense(noise(16)), F.avg_pool2d(noise(16), 4))
    Own.score_maps = lambda self, images: images.mean((2, 3))  # type: ignore[method-assign]
    assert "returns no score maps" in refusal(Own())


@torch.inference_mode()
def test_channels_last_features_are_recognised_without_being_declared() -> None:
    class Undeclared(Pooled):
        def forward_features(self, images: Tensor) -> Tensor:
            return self.local(images).permute(0, 2, 3, 1)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((1, 2)))

    model, images = Undeclared(nn.AdaptiveAvgPool2d(1)).eval(), noise(16, 32)
    dense, report = dense_map(model, images, "mine")
    assert report.grid == (4, 8)
    assert "NHWC" in report.method
    torch.testing.assert_close(dense(images), model.fc(model.forward_features(images)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "test_vit"])
@torch.inference_mode()
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = timm_model(name), noise()
    dense, _ = dense_map(model, images, name)
    whole, heads = dense(images), []
    assert isinstance(dense, HeadPerLocation)
    head = dense.head
    dense.head = lambda cells: (heads.append(len(cells)), head(cells))[1]
    cells, _ = dense.cells(model.forward_features(images))
    monkeypatch.setattr(head_per_location, "CHUNK_VALUES", 3 * cells[0].numel())
    torch.testing.assert_close(dense(images), whole)
    assert max(heads) == 3
    assert len(heads) > 2


# Where the class token stands.


class Sequence(nn.Module):
    """Sixteen patch tokens and a class token at `place` among them, which the head reads."""

    def __init__(self, place: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place, self.stem, self.fc = place, nn.Conv2d(3, 16, 4, 4), nn.Linear(16, CLASSES)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))

    def forward_features(self, images: Tensor) -> Tensor:
        patches, class_token = tokens(self.stem(images)), self.class_token.expand(len(images), -1, -1)
        return torch.cat([patches[:, : self.place], class_token, patches[:, self.place :]], 1)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x[:, min(self.place, x.shape[1] - 1)])

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class OthersPooled(Sequence):
    """The head reads the mean of the patch tokens."""

    def forward_head(self, x: Tensor) -> Tensor:
        place = min(self.place, x.shape[1] - 1)
        return self.fc(torch.cat([x[:, :place], x[:, place + 1 :]], 1).mean(1))


class AllPooled(Sequence):
    """The head reads the mean of all tokens."""

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1))


@pytest.mark.parametrize("declared", [None, 1])
@pytest.mark.parametrize("kind", [Sequence, OthersPooled])
@torch.inference_mode()
def test_class_token_must_stand_in_front(kind: type[Sequence], declared: int | None) -> None:
    front, middle, end = (kind(place).eval() for place in (0, 8, 16))
    if declared is not None:
        for model in (front, middle, end):
            model.num_prefix_tokens = declared  # type: ignore[assignment]
    dense, report = dense_map(front, noise(16), "mine")
    assert report.grid == (4, 4)
    torch.testing.assert_close(dense(noise(16)), front.fc(front.stem(noise(16)).movedim(1, 3)).movedim(3, 1))
    for model in (middle, end):
        told = refusal(model)
        assert "may keep its class token elsewhere" in told
        assert "score_maps(images)" in told


def test_class_token_that_nothing_tells_apart_is_refused() -> None:
    assert "no num_prefix_tokens, and a head that treats all tokens alike" in refusal(AllPooled(8))


def test_declared_prefix_that_leaves_no_grid_is_refused() -> None:
    model: Any = Sequence(0)
    model.num_prefix_tokens = 0
    told = refusal(model)
    assert "do not form a grid: got 17 tokens" in told
    assert "score_maps(images)" in told


@torch.inference_mode()
def test_networks_trained_on_tokens_use_their_token_head() -> None:
    model: Any = timm_model("volo_d1_224")
    dense, report = dense_map(model, noise(), "volo")
    expected = model.aux_head(model.forward_features(noise())[:, 1:]).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(dense(noise()), expected)
    assert "auxiliary head" in report.method
    assert not any("class token only" in note for note in report.notes)


@torch.inference_mode()
def test_notes_tell_what_a_map_is_worth() -> None:
    _, vit = dense_map(timm_model("test_vit"), noise(), "vit")
    assert "class token only" in vit.notes[0]
    _, convnext = dense_map(timm_model("test_convnext"), noise(), "convnext")
    assert "layer_norm comes between the pooling and the logits" in convnext.notes[0]
    assert "measured difference" in convnext.self_test
    _, single = dense_map(timm_model("test_resnet"), noise(32), "resnet")
    assert single.grid == (1, 1)
    assert "single cell" in single.notes[0]
