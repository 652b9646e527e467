"""A family of someone else's: its published weights are recognized, converted and loaded, and its token head built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

from labeler.base.errors import ModelError
from model import Family, PublishedWeights, load_reference_checkpoint, register_family, token_label
from model import families as registry
from model.backbones.lvvit import LVViT
from model.backbones.timm_interface import build_patch_model, fit_position_embedding


class Acorn(LVViT):
    """Somebody's model; its authors published weights under other names."""


@register_model
def acorn_mini(pretrained: bool = False, **kwargs: Any) -> Acorn:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 64, "aux_head": False}
    return build_patch_model(Acorn, "acorn_mini", pretrained, **{**small, **kwargs})


def as_published(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"acorn_{key}": value for key, value in net.state_dict().items()}


def recognize(state: dict[str, torch.Tensor]) -> bool:
    return "acorn_cls_token" in state


def builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    return partial(timm.create_model, "acorn_mini", num_classes=len(weights.state["acorn_head.bias"]))


def convert(state: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
    return fit_position_embedding({key.removeprefix("acorn_"): value for key, value in state.items()}, net)


ACORN = Family("Acorn", ("acorn_mini",), recognize, builder, convert, token_head={"aux_head": True})


@pytest.fixture(autouse=True)
def acorn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    return register_family(ACORN)


def saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"state_dict": state}, path)
    return path


def trained(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("acorn_mini", num_classes=5, **changes).eval()


def test_its_published_weights_are_recognized_and_renamed(tmp_path):
    first, x = trained(), torch.randn(2, 3, 64, 64)
    net = load_reference_checkpoint(saved(tmp_path / "acorn.pth", as_published(first)))
    assert isinstance(net, Acorn)
    assert torch.equal(net(x), first(x))


def test_they_are_resized_for_a_model_of_another_resolution(tmp_path):
    first, x = trained(), torch.randn(2, 3, 96, 48)
    path = saved(tmp_path / "acorn.pth", as_published(first))
    net = load_reference_checkpoint(path, trained(img_size=(96, 48)))
    first.set_input_size((96, 48))
    assert torch.equal(net(x), first(x))


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    weights = as_published(trained())
    del weights["acorn_head.bias"]
    path = saved(tmp_path / "acorn.pth", weights)
    with pytest.raises(ModelError, match=r"acorn\.pth are not those of any Acorn model: got KeyError.*Pass model="):
        load_reference_checkpoint(path)
    with pytest.raises(ModelError, match=r"does not fit Acorn: got 1 missing \(head\.bias\)"):
        load_reference_checkpoint(path, trained())


def test_a_conversion_that_breaks_names_the_file(tmp_path):
    def broken(state: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
        raise RuntimeError("no such tensor")

    register_family(Family("Acorn", ACORN.names, recognize, builder, broken))
    path = saved(tmp_path / "acorn.pth", as_published(trained()))
    with pytest.raises(ModelError, match=r"acorn\.pth cannot be converted for Acorn: got RuntimeError.*no such tensor"):
        load_reference_checkpoint(path, trained())


def test_the_refusal_of_others_names_every_family(tmp_path):
    with pytest.raises(ModelError, match=r"no known family: got conv, …, expected .* DeMansia, .*LV-ViT, .*Acorn"):
        load_reference_checkpoint(saved(tmp_path / "a.pth", {"conv": torch.zeros(1)}))


def test_a_plain_vision_transformer_is_no_lvvit(tmp_path):
    path = saved(tmp_path / "vit.pth", timm.create_model("test_vit").state_dict())
    with pytest.raises(ModelError, match="no known family"):
        load_reference_checkpoint(path)


def test_the_family_registered_last_is_asked_first():
    state = {**as_published(trained()), **trained().state_dict()}
    assert registry.family_of_state(state) is ACORN
    assert registry.family_of_state(trained().state_dict()).title == "LV-ViT"
    other = register_family(Family("Oak", (), lambda state: True, builder, convert))
    assert registry.family_of_state(state) is other
    register_family(ACORN)
    assert [family.title for family in registry.families()][-2:] == ["Oak", "Acorn"]


@pytest.mark.parametrize("name", ["acorn_mini", "acorn_mini.first_weights"])
def test_a_name_belongs_to_its_family_with_and_without_a_tag(name):
    assert registry.family_of_name(name) is ACORN
    assert registry.family_of_name("resnet50") is None


def test_token_label_builds_it_with_its_token_head():
    assert trained().aux_head is None
    net = token_label("acorn_mini", 5)
    assert isinstance(net, Acorn)
    cls, aux = net.train()(torch.randn(2, 3, 64, 64))
    assert cls.shape == (2, 5)
    assert aux.shape == (2, 16, 5)
    with pytest.raises(ModelError, match="aux_head=True"):
        token_label("acorn_mini", 5, aux_head=False)
