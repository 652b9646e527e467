"""A class head and a token head of different classes.

Legend: B images; C classes; T tokens.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import model
from model.token_heads import TokenLabelHeads

OWN, TEACHERS = 5, 11
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16}
MODELS = {
    "demansia_nano": {**SMALL, "depth": 1},
    "vim_tiny": {**SMALL, "depth": 1},
    "lvvit_t": {**SMALL, "depth": 1, "num_heads": 2},
    "test_resnet": {"img_size": 64},
}


def heads(net: TokenLabelHeads) -> tuple[int, int]:
    """Classes of both heads, by their weights."""
    cls, aux = net.get_classifier(), net.aux_head  # type: ignore[operator]
    return len(cls.weight), len(aux.weight)  # type: ignore[union-attr, arg-type]


def images(net: TokenLabelHeads, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *net.img_size, generator=torch.Generator().manual_seed(4))  # type: ignore[misc]


@pytest.fixture(params=MODELS)
def net(request: pytest.FixtureRequest) -> TokenLabelHeads:
    torch.manual_seed(0)
    return model.token_label(request.param, OWN, aux_classes=TEACHERS, **MODELS[request.param])


def test_each_head_has_its_own_classes(net):
    cls, aux = net.train()(images(net))
    tokens = net.grid[0] * net.grid[1]
    assert (cls.shape, aux.shape) == ((2, OWN), (2, tokens, TEACHERS))
    assert net.score_maps(images(net)).shape == (2, TEACHERS, *net.grid)
    assert (net.num_classes, net.aux_classes, heads(net)) == (OWN, TEACHERS, (OWN, TEACHERS))


def test_an_evaluation_gives_the_class_logits_alone(net):
    """Also where there happen to be as many classes on both heads: they are not the same ones."""
    for aux_classes in (TEACHERS, OWN):
        net.reset_aux_head(aux_classes)
        features = net.eval().forward_features(images(net))
        cls, aux = net.token_logits(features)
        assert torch.equal(net(images(net)), cls)
    net.reset_aux_head()
    cls, aux = net.token_logits(features)
    assert not torch.equal(net(images(net)), cls)
    torch.testing.assert_close(net(images(net)), cls + 0.5 * aux.amax(1))


def test_heads_are_replaced_together_or_the_token_head_alone(net):
    cls = net.get_classifier()
    net.reset_aux_head(7)
    assert net.get_classifier() is cls
    assert (heads(net), net.aux_classes) == ((OWN, 7), 7)
    net.reset_classifier(4, aux_classes=9)
    assert (heads(net), net.num_classes, net.aux_classes) == ((4, 9), 4, 9)
    net.reset_classifier(3)
    assert (heads(net), net.aux_classes) == ((3, 3), None)
    net.reset_classifier(0)
    assert isinstance(net.aux_head, nn.Identity)


def test_a_built_model_gets_a_token_head_of_other_classes():
    built = timm.create_model("test_resnet", num_classes=OWN)
    assert heads(model.token_label(built, aux_classes=TEACHERS, img_size=64)) == (OWN, TEACHERS)
    ours = timm.create_model("demansia_nano", num_classes=OWN, **MODELS["demansia_nano"])
    assert heads(model.token_label(ours, aux_classes=TEACHERS)) == (OWN, TEACHERS)


def test_timm_builds_a_model_of_ours_with_both_numbers_of_classes():
    kwargs = {**MODELS["demansia_nano"], "num_classes": OWN, "aux_classes": TEACHERS}
    assert heads(timm.create_model("demansia_nano", **kwargs)) == (OWN, TEACHERS)
    assert timm.create_model("demansia_nano", **{**kwargs, "num_classes": 0})(torch.randn(2, 3, 32, 32)).shape == (
        2,
        16,
    )
