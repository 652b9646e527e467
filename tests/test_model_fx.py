"""torch.fx's own tracer, and torchvision's feature extraction on top of it, see through every family."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import model  # noqa: F401  (registers the names)

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 4, "embed_dim": 32, "depth": 2}
BLOCKS = {"demansia_tiny": "layers", "demansia2_tiny": "layers", "vim_tiny": "layers", "lvvit_t": "blocks"}
OWN = {"demansia2_tiny": {"attention_layers": (1,), "attention_head_dim": 48, "head_dim": 16}}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_traced_model_trains_and_answers_as_the_plain_one(name):
    torch.manual_seed(0)
    net, images = timm.create_model(name, **TINY, **OWN.get(name, {})).train(), torch.randn(3, 3, 32, 32)
    results = []
    for run in (net, torch.fx.symbolic_trace(net)):
        net.zero_grad()
        out = run(images)
        out = torch.cat([part.flatten() for part in (out if isinstance(out, tuple) else (out,))])
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    torch.testing.assert_close(results[1], results[0])
    net.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images[:1]), net(images[:1]))


@pytest.mark.parametrize("name", BLOCKS)
def test_torchvision_extracts_a_blocks_output(name):
    torch.manual_seed(0)
    net, images = timm.create_model(name, **TINY, **OWN.get(name, {})).eval(), torch.randn(2, 3, 32, 32)
    nodes = get_graph_node_names(net)[1]
    last = [node for node in nodes if node.startswith(f"{BLOCKS[name]}.0")][-1]
    seen = []
    net.get_submodule(f"{BLOCKS[name]}.0").register_forward_hook(lambda _, __, output: seen.append(output))
    net(images)
    found = create_feature_extractor(net, {last: "block"})(images)["block"]
    torch.testing.assert_close(found, seen[0])
