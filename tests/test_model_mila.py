"""MILA against the published one: outputs, intermediates, gradients, names, counts and checkpoints.

Legend: B images; h×w grid of a stage; C its width; H heads, d = C / H; T = h·w tokens.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import SOURCES, Sample, close, keys, state, tensors

from labeler.base.errors import ModelError
from model import load_reference_checkpoint
from model.backbones.hierarchical.mila import NAMES, Mila
from model.backbones.hierarchical.mila_attention import (
    linear_attention,
    linear_attention_reference,
    rotate,
    rotation_table,
)

MICRO = {"img_size": 64, "num_classes": 10, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}
COUNTS = {"mila_tiny": 24_392_200, "mila_small": 43_015_048, "mila_base": 95_983_960}


def micro(found: dict[str, torch.Tensor], **settings: Any) -> Mila:
    net = Mila(**{**MICRO, "aux_head": False, **settings})
    net.load_state_dict(state(found))
    return net


def steps_of(net: Mila, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By their names in the fixture: what the stem, the stages, the first block and its attention give, as tokens."""
    seen: dict[str, torch.Tensor] = {}
    first = "layers.0.blocks.0"
    for name in ("patch_embed", first, f"{first}.attn", *(f"layers.{i}" for i in range(4))):

        def keep(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            inside = name.endswith("attn")
            seen[f"{name}.out" if inside else name] = output.flatten(1, 2)
            if inside:
                seen[f"{name}.in"] = inputs[0].flatten(1, 2)

        net.get_submodule(name).register_forward_hook(keep)
    net(x)
    return seen


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(source):
    found = tensors("mila_micro", source)
    net = micro(found).eval()
    close(net(found["x"]), found["eval.out"], 1e-5)
    close(net.forward_head(net.forward_features(found["x"]), pre_logits=True), found["eval.features"], 1e-5)
    seen = steps_of(net, found["x"])
    assert {f"mid.{name}" for name in seen} == {name for name in found if name.startswith("mid.")}
    for name, value in seen.items():
        close(value, found[f"mid.{name}"], 1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_in_float64_is_the_published_one(source):
    found = tensors("mila_micro", source)
    net = micro(found).eval().double()
    tolerance = 1e-12 if source == "full" else 1e-5  # the slim weights are the published ones to rounding
    close(net(found["x"].double()), found["eval.out_f64"], tolerance)


@pytest.mark.parametrize("name", ["eval_small", "eval_smallvar"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilons_are_the_published_ones(name, source):
    found = tensors("mila_micro", source)
    net = micro(found).eval()
    with torch.no_grad():
        if name == "eval_small":
            norm = net.patch_embed.conv3[1].norm
            for tensor in (norm.weight, norm.bias, net.layers[0].blocks[0].cpe1.bias):
                tensor.mul_(0.005)
        else:
            for key, tensor in net.named_buffers():
                if key.endswith("running_var"):
                    tensor.mul_(1e-3)
    close(net(found["x"]), found[f"{name}.out"], 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradients_are_the_published_ones(checkpointing, source):
    found = tensors("mila_micro", source)
    net = micro(found).train()
    net.set_grad_checkpointing(checkpointing)
    x = found["x"].clone().requires_grad_()
    logits = net(x)
    loss = torch.nn.functional.cross_entropy(logits, found["labels"])
    close(logits, found["train.out"], 1e-5)
    close(loss, found["train.loss"], 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5, 1e-8)
    checked = [name for name in found if name.startswith("grad.") and name != "grad.x"]
    assert len(checked) == 13
    for name in checked:
        close(net.get_parameter(name.removeprefix("grad.")).grad, found[name], 5e-5, 1e-8)


@pytest.mark.parametrize("name", COUNTS)
def test_names_shapes_and_counts_are_the_published_ones(name):
    with torch.device("meta"):
        net = timm.create_model(name, aux_head=False)
        plain = timm.create_model(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[name]
    assert plain.state_dict().keys() - net.state_dict().keys() == {"aux_head.weight", "aux_head.bias"}
    expected = keys("mlla_t")
    if name == "mila_tiny":
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
        assert expected["total_params"] == COUNTS[name]
        assert [stage.blocks[0].attn.num_heads for stage in net.layers] == expected["config"]["num_heads"]


def test_initial_weights_spread_as_the_published_ones():
    expected = keys("mlla_t")["init_mean_std_min_max_seed0"]
    torch.manual_seed(0)
    net = timm.create_model("mila_tiny", aux_head=False)
    for key, parameter in net.named_parameters():
        mean, std, *_ = expected[key]
        few = 4 * std / parameter.numel() ** 0.5  # what the mean of that many draws may differ by
        assert abs(float(parameter.detach().mean()) - mean) < 3e-3 + 2 * few, key
        assert abs(float(parameter.detach().std(correction=0)) - std) < 0.1 * std + 2 * few + 1e-6, key


@pytest.mark.parametrize("source", SOURCES)
def test_rotations_are_the_published_ones(source):
    found = tensors("mila_micro", source)
    for i, side in enumerate((16, 8, 4, 2)):
        expected = found[f"sd.layers.{i}.blocks.0.attn.rope.rotations"]
        close(rotation_table((side, side), 16 * 2**i, torch.empty(0)), expected, 1e-6)


def test_rotations_keep_lengths_and_depend_on_differences_of_places_alone():
    torch.manual_seed(0)
    table = rotation_table((5, 7), 12, torch.empty(0, dtype=torch.float64))
    q, k = torch.randn(2, 1, 12, dtype=torch.float64)
    turned_q, turned_k = (rotate(v.expand(1, 5, 7, 12), table)[0] for v in (q, k))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(5, 7))
    products = [turned_q[y, x] @ turned_k[y + 2, x + 3] for y, x in ((0, 0), (2, 1), (1, 3))]
    assert torch.allclose(products[0], torch.stack(products))
    assert not torch.allclose(products[0], turned_q[0, 0] @ turned_k[3, 2])  # rows and columns are told apart


@pytest.mark.parametrize("tokens", [1, 2, 49])
def test_attention_in_linear_time_is_attention_by_the_whole_matrix(tokens):
    torch.manual_seed(0)
    made = [torch.rand(2, 3, tokens, 4, dtype=torch.float64) for _ in range(2)]
    made += [torch.randn(2, 3, tokens, 4, dtype=torch.float64) for _ in range(3)]
    results = []
    for function in (linear_attention, linear_attention_reference):
        q, k, v, turned_q, turned_k = inputs = [part.clone().requires_grad_() for part in made]
        y = function(q, k, v, (turned_q, turned_k))
        y.square().sum().backward()
        results.append([y, *(part.grad for part in inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_attention_is_differentiated_rightly():
    torch.manual_seed(0)
    attention = micro_attention().double()
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,))


def micro_attention() -> torch.nn.Module:
    return Mila(**{**MICRO, "embed_dim": 8, "depths": (1,), "num_heads": (2,), "img_size": 16}).layers[0].blocks[0].attn


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (160, 32)])
def test_any_size_gives_what_a_model_built_for_it_gives(size):
    torch.manual_seed(0)
    first = Mila(**MICRO).eval()
    built = Mila(**{**MICRO, "img_size": size}).eval()
    built.load_state_dict(first.state_dict())  # rotations of another grid are passed over
    x = torch.randn(2, 3, *size)
    assert torch.equal(first(x), built(x))
    assert first.score_maps(x).shape == (2, 10, size[0] // 32, size[1] // 32)
    first.set_input_size(size)
    assert first.grid == built.grid == (size[0] // 32, size[1] // 32)
    for key, value in built.state_dict().items():
        assert torch.equal(first.state_dict()[key], value), key


def settings_of_yacs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What yacs, which is not installed, would put into a file."""

    class CfgNode(dict[str, Any]):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__ |= {"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}}

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["yacs.config"], "CfgNode", CfgNode, raising=False)
    return CfgNode({"MODEL": CfgNode({"NAME": "mlla_tiny"}), "AUG": CfgNode({"MESA": 1.0})})


def published(path: Path, config: Any = None, **settings: Any) -> tuple[Path, Mila]:
    """A file as the authors' script writes it."""
    torch.manual_seed(0)
    net = timm.create_model("mila_nano", num_classes=5, aux_head=False, **settings).eval()
    averaged = {key: 0.5 * value if value.is_floating_point() else value for key, value in net.state_dict().items()}
    content = {"model": net.state_dict(), "state_dict_ema": averaged, "epoch": 299, "max_accuracy": 83.5}
    torch.save({**content, "config": config}, path / "mila.pth")
    return path / "mila.pth", net


@pytest.mark.parametrize("side", [64, 96])
def test_a_published_file_finds_its_model(side, tmp_path):
    path, first = published(tmp_path, img_size=side, in_chans=1, mlp_ratio=2.0, qkv_bias=False)
    net, x = load_reference_checkpoint(path), torch.randn(2, 1, side, side)
    assert isinstance(net, Mila)
    assert (net.img_size, net.aux_head, net.num_classes) == ((side, side), None, 5)
    assert torch.equal(net(x), first(x))


def test_the_authors_settings_in_a_file_are_read_as_plain_values(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        path, first = published(tmp_path, settings_of_yacs(patch), img_size=64)
    assert "yacs" not in sys.modules
    assert torch.equal(load_reference_checkpoint(path).head.weight, first.head.weight)
    assert torch.equal(load_reference_checkpoint(path, ema=True).head.weight, 0.5 * first.head.weight)


@pytest.mark.parametrize("without_rotations", [False, True])
def test_a_published_file_loads_at_another_resolution(without_rotations, tmp_path):
    path, first = published(tmp_path, img_size=64)
    if without_rotations:
        held = torch.load(path, weights_only=True)["model"]
        torch.save({key: value for key, value in held.items() if "rotations" not in key}, path)
    net = timm.create_model("mila_nano", num_classes=5, aux_head=False, img_size=(96, 32))
    x = torch.randn(2, 3, 96, 32)
    assert torch.equal(load_reference_checkpoint(path, net)(x), first(x))


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    torch.save(Mila(**MICRO).state_dict(), tmp_path / "micro.pth")
    with pytest.raises(
        ModelError, match=r"no known MILA size, so its num_heads are unknown: got width 16.*pass model="
    ):
        load_reference_checkpoint(tmp_path / "micro.pth")
    path, _ = published(tmp_path)
    with pytest.raises(ModelError, match=r"does not fit Mila: got 2 missing \(aux_head\.weight, aux_head\.bias\)"):
        load_reference_checkpoint(path, timm.create_model("mila_nano", num_classes=5))
    damaged = torch.load(path, weights_only=True)["model"]
    key = "layers.0.blocks.0.attn.rope.rotations"
    damaged[key] = damaged[key][..., :1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("mila_nano", num_classes=5, aux_head=False).load_state_dict(damaged)


def test_the_fixture_sees_the_order_of_rotation_and_heads():
    """Rotations that ran within each head would change the output: the test above is not blind to it."""
    found = tensors("mila_micro")
    net = micro(found).eval()
    table = net.layers[0].blocks[0].attn.rope.rotations
    table.copy_(table.view(16, 16, 2, 4, 2)[:, :, :1].expand(-1, -1, 2, -1, -1).reshape(table.shape))
    expected = found["eval.out"]
    assert not isinstance(expected, Sample)
    assert (net(found["x"]) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_all_names_are_this_familys():
    assert set(COUNTS) <= set(NAMES)
    assert set(NAMES) <= set(timm.list_models("mila_*"))
