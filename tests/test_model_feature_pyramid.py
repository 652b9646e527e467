"""Feature pyramids on plain backbones: maps of four strides, for the decoders and detectors of other libraries."""

import pytest
import timm
import torch

import model
from model import ModelError

DECODERS = ("Unet", "FPN", "UPerNet", "Segformer", "DeepLabV3Plus", "DPT")
THREE = ("demansia_pico_sfp", "vim_pico_sfp", "lvvit_t_sfp")
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4}
OTHERS = {
    "lvvit": {"num_heads": 3},
    "demansia2": {"attention_layers": (0,), "attention_head_dim": 48, "d_state": 16},
}


def pyramid(name: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **OTHERS.get(name.split("_")[0], {}), **changes})


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", model.PYRAMIDS)
def test_maps_have_strides_4_8_16_and_32_for_any_size_that_fits(name):
    net = pyramid(name, features_only=True).eval()
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    for height, width in ((64, 64), (64, 128), (96, 32)):
        with torch.no_grad():
            maps = net(images(height, width))
        assert [tuple(one.shape) for one in maps] == [
            (2, channels, height // stride, width // stride)
            for channels, stride in zip(net.feature_info.channels(), (4, 8, 16, 32), strict=True)
        ]


def test_every_plain_backbone_has_one():
    plain = [name for name in model.NAMES if name.split("_")[0] in ("demansia", "demansia2", "vim", "lvvit")]
    assert [f"{name}_sfp" for name in plain] == list(model.PYRAMIDS)
    assert not set(model.PYRAMIDS) & set(model.NAMES)
    assert set(model.PYRAMIDS) <= set(timm.list_models())


@pytest.mark.parametrize("name", THREE)
def test_every_parameter_learns(name):
    net = pyramid(name, features_only=True)
    sum(one.square().mean() for one in net(images())).backward()
    without = [key for key, one in net.named_parameters() if one.grad is None or not one.grad.abs().sum()]
    assert without == []


@pytest.mark.parametrize("name", THREE)
def test_maps_of_the_last_layer_are_made_from_the_backbones_own_tokens(name):
    net = pyramid(name).eval()
    plain = timm.create_model(name.removesuffix("_sfp"), **{**SMALL, **OTHERS.get(name.split("_")[0], {})}).eval()
    # The weights of a trained network fit; only its heads have no place.
    missing, unexpected = net.backbone.load_state_dict(plain.state_dict(), strict=False)
    assert missing == []
    assert all(key.startswith(("head", "aux_head")) for key in unexpected)
    with torch.no_grad():
        tokens = plain.forward_intermediates(images(), [3], norm=True, intermediates_only=True)[0]
        for level, found in zip(net.levels, net(images()), strict=True):
            assert torch.equal(level(tokens), found)


def test_four_layers_give_one_map_each_and_later_layers_go():
    net = pyramid("vim_pico_sfp", layers=(0, 1, 1, 2)).eval()
    assert len(net.backbone.layers) == 3
    with torch.no_grad():
        after = net.backbone.forward_intermediates(images(), [0, 1, 2], intermediates_only=True)
        for level, i, found in zip(net.levels, (0, 1, 1, 2), net(images()), strict=True):
            assert torch.equal(level(after[i]), found)


def test_the_position_embedding_is_resized_for_other_sizes_and_kept_for_its_own():
    net, fixed = pyramid("vim_pico_sfp").eval(), pyramid("vim_pico_sfp").eval()
    fixed.backbone.dynamic_img_size = False
    with torch.no_grad():
        assert torch.equal(net(images())[0], fixed(images())[0])
        fixed.set_input_size((64, 128))
        assert torch.allclose(net(images(64, 128))[0], fixed(images(64, 128))[0], atol=1e-5)


def test_weight_decay_and_layer_groups_reach_into_the_backbone():
    net = pyramid("demansia_pico_sfp")
    names = dict(net.named_parameters())
    assert net.no_weight_decay() <= set(names)
    assert any("A_log" in name for name in net.no_weight_decay())
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(net, 0.05, layer_decay=0.5)
    scale = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    first, last = names["backbone.layers.0.mixer.in_proj.weight"], names["backbone.layers.3.mixer.in_proj.weight"]
    assert scale[id(first)] < scale[id(last)] < scale[id(names["levels.0.0.weight"])] == 1.0


def test_no_map_is_coarser_than_the_output_stride():
    net = pyramid("demansia_pico_sfp", features_only=True, output_stride=16).eval()
    assert net.feature_info.reduction() == [4, 8, 16, 16]
    with torch.no_grad():
        assert [one.shape[-1] for one in net(images())] == [16, 8, 4, 4]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": (0, 1, 2)}, "4 numbers from 0 to 3"),
        ({"layers": (0, 1, 2, 4)}, "4 numbers from 0 to 3"),
        ({"output_stride": 4}, "8, 16 or 32"),
        ({"patch_size": 14, "img_size": 56}, "power of two"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ModelError, match=told):
        pyramid("vim_pico_sfp", **changes)


def test_arguments_that_other_libraries_take_for_their_own_reach_the_backbone():
    smp = pytest.importorskip("segmentation_models_pytorch")
    own = {"embed_dim": 48, "depth": 3, "img_size": 64}
    net = smp.FPN("tu-demansia_pico_sfp", encoder_weights=None, classes=5, backbone_args=own)
    assert len(net.encoder.model.model.backbone.layers) == 3
    assert net(images()).shape == (2, 5, 64, 64)


def test_sides_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ModelError):
        pyramid("vim_pico_sfp")(images(64, 72))
    with pytest.raises(ModelError, match="no class head"):
        pyramid("vim_pico_sfp").reset_classifier(10)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", THREE)
def test_decoders_of_segmentation_models_take_it(name, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    depth = {"encoder_depth": 4} if decoder == "DPT" else {}
    net = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=5, img_size=64, **depth)
    found = net(images(64, 128))
    assert found.shape == (2, 5, 64, 128)
    found.square().mean().backward()
    first = next(one for key, one in net.named_parameters() if key.endswith("patch_embed.proj.weight"))
    assert first.grad.abs().sum() > 0
