"""Vision Mamba against the published one."""

from __future__ import annotations

import pytest
import timm
import torch
from fixtures import BACKENDS, SOURCES, close, keys, state, tensors

import model  # noqa: F401  (registers the names)
from model.backbones.vim import Vim

SETTINGS = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_classes": 10, "stem": "patch", "aux_head": False}


def micro(found: dict[str, torch.Tensor], **settings: object) -> Vim:
    net = Vim(**{**SETTINGS, **settings})
    net.load_state_dict(state(found))
    return net


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(backend, source):
    found = tensors("vim_micro", source)
    net = micro(found, backend=backend).eval()
    x = found["x"]
    close(net(x), found["eval.out"], 1e-5)
    close(net.forward_head(net.forward_features(x), pre_logits=True), found["eval.features"], 1e-5)
    if backend != "triton":
        close(net.double()(x.double()), found["eval.out_f64"], 1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilon_is_the_published_one(source):
    found = tensors("vim_micro", source)
    net = micro(found).eval()
    with torch.no_grad():
        for tensor in (net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.pos_embed, net.cls_token):
            tensor.mul_(0.005)
    close(net(found["x"]), found["eval_small.out"], 1e-5)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("no_divide", {"halve": False}),
        ("head_cls", {"cls_place": "start"}),
        ("bimamba_none", {"directions": "forward"}),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_variants_are_the_published_ones(variant, settings, source):
    found = tensors("vim_micro", source)
    net = Vim(**{**SETTINGS, **settings}).eval()
    wanted = net.state_dict().keys()
    net.load_state_dict({k: v for k, v in state(found).items() if k in wanted})
    close(net(found["x"]), found[f"variant.{variant}.out"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradients_are_the_published_ones(backend, source):
    found = tensors("vim_micro", source)
    net = micro(found, backend=backend).train()
    x = found["x"].clone().requires_grad_()
    logits = net(x)
    loss = torch.nn.functional.cross_entropy(logits, found["labels"])
    close(logits, found["train.out"], 1e-5)
    close(loss, found["train.loss"], 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5)
    for name, parameter in net.named_parameters():
        close(parameter.grad, found[f"grad.{name}"], 5e-5, 1e-8)


def test_the_smallest_is_small():
    with torch.device("meta"):
        net = timm.create_model("vim_pico")
    assert (net.embed_dim, len(net.layers), sum(p.numel() for p in net.parameters())) == (64, 12, 616_168)


@pytest.mark.parametrize("name", ["vim_tiny", "vim_small", "vim_base"])
def test_names_shapes_and_counts_are_the_published_ones(name):
    expected = keys(name)
    net = timm.create_model(name)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
    assert sum(p.numel() for p in net.parameters()) == expected["total_params"]
